"Which layer and method: measured on the training side only, kept with the network, taken where nobody names another"
import json
import numpy as np, pytest

from dicomcam.batches import dicom_dls
from dicomcam.choice import choose_layer, chosen, late_stages, shown_by, default_layer
from dicomcam.data import lesion_mask
from dicomcam.demo import run_demo
from dicomcam.guide import training_lesions, training_prior
from dicomcam.models import load_model, save_model
from dicomcam.networks import dicom_learner

@pytest.fixture(scope='module')
def learn(folder): return dicom_learner(dicom_dls(folder, size=64, cache=False), 'xresnet18')

def test_what_is_held_back_has_no_say(learn, folder):
    table, asked = learn.dls.setup.table, []
    def mask_of(file):
        asked.append(file)
        return lesion_mask(folder, file)
    choose_layer(learn, mask_of=mask_of, fewest=1)
    assert set(asked) == set(table.file[~table.is_valid])
    assert set(training_lesions(learn, folder)) <= set(table.file[~table.is_valid])
    assert training_prior(learn).n == len(training_lesions(learn))

@pytest.mark.parametrize('best', ['5', '7'])
def test_the_layer_that_hits_the_lesions_is_chosen(learn, folder, monkeypatch, best):
    from dicomcam import choice
    def gradcam(learn, items, cls=None, layers=None, method=None, batches=False):
        from dicomcam.gradcam import gradcam
        h = gradcam(learn, items, cls, layers)
        if not batches: return h
        h.method = method
        for name, raw in zip(h.layers, h.raw):
            raw[:] = 0
            for i, file in enumerate(items):
                y, x = np.argwhere(lesion_mask(folder, file)).mean(0)*raw.shape[-1]/h.where(i)[0]
                if name == best and method == 'hirescam': raw[i, :, int(y), int(x)] = 1
                else: raw[i, :, 0, 0] = 1
        return [h]
    monkeypatch.setattr(choice, 'gradcam', gradcam)
    found = choose_layer(learn, folder, fewest=1)
    assert (found['layer'], found['method']) == (best, 'hirescam') and 'of the training side' in found['reason']

def test_few_lesions_choose_nothing(learn):
    assert choose_layer(learn, fewest=1000) == default_layer(learn) == learn.choice
    assert 'no lesion' in learn.choice['reason']

def test_choice_goes_with_the_model(learn, tmp_path):
    learn.choice = None
    assert chosen(learn)['layer'] == '4' # 16 x 16 positions of 64 pixels
    learn.choice = dict(layer='6', method='layercam', reason='of a test')
    other = load_model(save_model(learn, tmp_path/'m.safetensors'))
    assert chosen(other) == learn.choice and shown_by(other) == ('layercam', '6')
    assert shown_by(other, 'eigencam') == ('eigencam', None) and shown_by(other, layer='5') == ('gradcam', '5')

def test_stages_of_xresnets_and_of_timm(folder):
    pytest.importorskip('timm')
    dls = dicom_dls(folder, size=64, cache=False)
    assert late_stages(dicom_learner(dls, 'xresnet18')) == ['4', '5', '6', '7']
    learn = dicom_learner(dls, 'tf_efficientnet_lite0')
    assert late_stages(learn) == ['blocks.2', 'blocks.4', 'blocks.6', 'bn2'] and default_layer(learn)['layer'] == 'bn2'

def test_demo_tells_what_it_looks_at_and_why(folder, tmp_path):
    m = run_demo(folder, tmp_path/'demo', arch='xresnet18', size=64, epochs=1)
    heat = json.loads((tmp_path/'demo/metrics.json').read_text())['heatmaps']
    kept = load_model(tmp_path/'demo/model.safetensors').choice
    assert {k: heat[k] for k in ('layer', 'method', 'reason')} == kept and m['heatmaps']['images'] == len(list((tmp_path/'demo/heatmaps').rglob('*.png')))
    assert heat['reason'] in (tmp_path/'demo/report.html').read_text()
    if 'pointing_game' in heat: assert {'centre', 'noise', 'edges', 'prior'} < set(heat['pointing_game'])
