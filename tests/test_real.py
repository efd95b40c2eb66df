"The benchmark on real films: its maps are the package's, and its questions are asked of the right films"
import importlib.util, json, sys, warnings
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from dicomcam.attribution import attribute
from dicomcam.batches import dicom_dls
from dicomcam.networks import dicom_learner
from dicomcam.smooth import augmented
from fastai.torch_core import no_random

@pytest.fixture(scope='module')
def real():
    "The script as a module; what it sets for its own process is taken back"
    spec = importlib.util.spec_from_file_location('real', Path(__file__).parents[1]/'benchmarks/real.py')
    module, there = importlib.util.module_from_spec(spec), sys.modules.get('gdcm')
    with warnings.catch_warnings(): spec.loader.exec_module(module)
    del sys.modules['gdcm']
    if there: sys.modules['gdcm'] = there
    return module

@pytest.fixture(scope='module')
def learns(folder):
    def drawn(seed):
        with no_random(seed): return dicom_learner(dicom_dls(folder, size=64, cache=False), 'xresnet18')
    return [drawn(seed) for seed in range(2)]

def test_maps_of_mirror_images_and_of_several_trainings(real, learns):
    files, layers = learns[0].dls.valid.items[:3], ['5', '7']
    kinds, each = real.maps_of(learns, files, layers)
    assert list(kinds) == list(real.KINDS)
    for method, h in zip(real.CANDIDATES, kinds[', mirror']):
        same = attribute(learns[0], files, None, layers, method, partial(augmented, factors=[1]))
        assert h.method == method and all(torch.allclose(*o, atol=1e-6) for o in zip(h.raw, same.raw))
    a, b = (hs[0] for hs in each[', mirror'])
    mean = kinds[', mean of trainings'][0]
    assert torch.allclose(mean.probs, (a.probs+b.probs)/2)
    def share(h): return (h.raw[1].clamp(min=0)/h.raw[1].clamp(min=0).amax((2, 3), keepdim=True)).nan_to_num(0)
    assert torch.allclose(mean.raw[1], (share(a)+share(b))/2)
    assert all(o.raw[0].min() < 0 for o in (a, b)) and mean.raw[0].min() >= 0

def test_questions_are_of_the_films_that_they_name(real, monkeypatch):
    rng = np.random.default_rng(0)
    films = pd.DataFrame(dict(file=[Path(f'{i}.dcm') for i in range(40)], label=['ill']*20+['a healthy one']*20))
    films = films.assign(patient=range(40), view=['AP', 'PA']*20, score=(films.label == 'ill')*.5+.4*rng.random(40))
    read = {o: 'Lung Opacity' if i % 3 else 'Normal' for i, o in enumerate(films.file)}
    monkeypatch.setattr(real, 'of_pixels', lambda file: dict(brightness=int(file.stem), step=1.))
    asked = real.questions(films, read)
    assert asked['the label']['value'] == 1 and asked['the label']['n'] == 40
    assert {o: asked[f'the label, view {o}']['n'] for o in ('AP', 'PA')} == dict(AP=20, PA=20)
    within = asked['opacity or Normal, within the label']
    assert asked['the label, films read as Normal']['n'] == 14 and within['n'] == 20 and within['value'] < 1
    assert asked['the label, by mean vertical step alone']['value'] == .5
    assert asked['the label, by mean brightness alone']['value'] == 0

def test_boxes_of_other_tables_join_what_is_drawn(real, folder, tmp_path):
    file = folder/pd.read_csv(folder/'labels.csv').file[0]
    other = tmp_path/'films'
    (other/'train').mkdir(parents=True)
    (other/'train/a.dcm').write_bytes(file.read_bytes())
    (other/'read.csv').write_text('file,x,y,width,height\ntrain/a.dcm,1,2,3,4\ntrain/a.dcm,10,2,1,1\n')
    boxes = real.boxes_of([other], ['read.csv', 'none.csv'])
    mask = real.mask_of(other/'train/a.dcm', [other], boxes)
    assert mask.sum() == 13 and mask[2:6, 1:4].all() and mask[2, 10]
    assert real.mask_of(other/'train/a.dcm', [other], {}) is None

def test_the_whole_way(real, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    monkeypatch.setattr(real, 'CANDIDATES', ('gradcam',))
    recipe = '{"arch": "xresnet18", "size": 64, "bs": 4, "epochs": 1}'
    args = real.arguments([str(folder), '--recipe', recipe, '--folds', '2', '--keep', str(tmp_path/'kept'),
        '--out', str(tmp_path/'real.json')])
    real.main(args)
    res, told = json.loads((tmp_path/'real.json').read_text()), capsys.readouterr().out
    assert res['films'] == 30 and res['recipe']['arch'] == 'xresnet18' and res['readings'] == []
    maps, kinds = {o['map'] for o in res['localization']}, real.KINDS[:2]
    assert {f'{m}{kind}' for m in (*real.CANDIDATES, 'chosen') for kind in kinds} | {'prior', 'chosen x prior'} < maps
    ill = (pd.read_csv(folder/'labels.csv').label == 'Pneumothorax').sum()
    assert {o['n'] for o in res['localization'] if o['films'] == 'all'} == {ill} and 'chosen, mirror' in told
    monkeypatch.setattr(real, 'train_learner', None)
    assert real.run_fold(1, None, None, None, args)['fold'] == 1 # what was kept is not made again
