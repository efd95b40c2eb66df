"Splits without leaks, refusals that name the file and the cure, model files that give the same numbers and run no code."
import json, os, pickle, shutil, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import numpy as np, pandas as pd, pydicom, pytest, torch
from PIL import Image
import dicomcam.cache
from fastai.vision.models.xresnet import xresnet18, xresnet50
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastai.data.core import DataLoaders
from fastai.layers import Mish
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
from dicomcam.batches import setup_of
from dicomcam.labels import has_class, is_multi, label_classes, label_text, positive_classes
from dicomcam.pil import TensorDicom
from dicomcam.training import trial_step
from dicomcam.view import View
from dicomcam.train import (ImageCache, XrayTfm, fill_card, demo_learner, dicom_dls, dicom_learner, label_table, load_model, patient_ids, patient_split, save_model,
                            split_counts, train_learner)

root = Path(__file__).resolve().parent.parent
small = dict(arch='xresnet18', size=32, bs=8, epochs=1)

@pytest.fixture(scope='module')
def learn(folder): return train_learner(folder, **small)

@pytest.fixture
def copy(folder, tmp_path): return shutil.copytree(folder, tmp_path/'copy')

def test_no_patient_on_both_sides(folder):
    for seed in range(5):
        t = dicom_dls(folder, size=32, seed=seed).setup.table
        assert not set(t.group[t.is_valid]) & set(t.group[~t.is_valid])
        for side in (True, False): assert set(t.label[t.is_valid == side]) == set(t.label)

def test_no_patient_on_both_sides_of_real_films(xrays):
    t = dicom_dls(xrays, size=32).setup.table
    true = [pydicom.dcmread(o, stop_before_pixels=True).PatientID for o in t.file]
    assert t.group.tolist() == true and t.group.nunique() == 209
    assert not set(t.group[t.is_valid]) & set(t.group[~t.is_valid])
    assert abs(t.is_valid.mean()-0.2) < 0.03

def test_same_seed_same_split(folder):
    a, b, c = (dicom_dls(folder, size=32, seed=s).setup.table.is_valid.tolist() for s in (1, 1, 2))
    assert a == b != c

def test_split_counts_add_up(folder):
    c = split_counts(dicom_dls(folder, size=32))
    assert c.images.sum() == 30 and set(c.index.get_level_values(0)) == {'train', 'valid'}

def test_batches_are_what_a_viewer_shows(folder):
    from dicomcam.dicom import dicom_pixels
    dls = dicom_dls(folder, size=96)
    x = dls.test_dl([str(dls.valid.items[0])]).one_batch()[0]
    assert x.shape == (1, 1, 96, 96) and x.dtype == torch.float32
    assert np.allclose(x[0, 0].cpu(), dicom_pixels(dls.valid.items[0]), atol=1e-5)

def test_labels_from_folders_and_dataframes(folder):
    a, df = label_table(folder), pd.read_csv(folder/'labels.csv')
    b, c = label_table(folder, labels=None), label_table(folder, labels=df)
    assert c.equals(a) and b.set_index('file').label.sort_index().equals(a.set_index('file').label.sort_index())

def test_files_without_a_patient_stand_alone(copy):
    files = label_table(copy).file[:3].tolist()
    for o in files[:2]:
        ds = pydicom.dcmread(o); ds.PatientID = ''; ds.save_as(o)
    assert patient_ids(files)[:2] == [str(o) for o in files[:2]]

@pytest.mark.parametrize('spoil, error, says', [
    (lambda p: shutil.rmtree(p), FileNotFoundError, 'no such folder'),
    (lambda p: (p/'labels.csv').unlink(), FileNotFoundError, 'labels=None'),
    (lambda p: next((p/'train').rglob('*.dcm')).unlink(), FileNotFoundError, '1 of 30 files are not there'),
    (lambda p: _labels(p, label='all the same'), ValueError, 'one class only'),
    (lambda p: _labels(p, label=None), ValueError, 'no label for'),
    (lambda p: (p/'labels.csv').write_text('file\na.dcm\n'), ValueError, 'needs two columns'),
])
def test_spoilt_labels(copy, spoil, error, says):
    spoil(copy)
    with pytest.raises(error, match=says) as e: label_table(copy)
    assert str(copy) in str(e.value) and '\n' not in str(e.value)

def _labels(p, label): pd.read_csv(p/'labels.csv').assign(label=label).to_csv(p/'labels.csv', index=False)

def test_class_with_one_patient():
    df = pd.DataFrame(dict(label=['a']*4+['b']*2, group=['1', '2', '3', '4', '5', '5']))
    with pytest.raises(ValueError, match="'b' has one patient only"): patient_split(df)

def test_one_channel_stem(folder):
    assert dicom_learner(dicom_dls(folder, size=32), xresnet18).model[0][0].in_channels == 1

def test_model_file_gives_the_same_numbers(learn, folder, tmp_path):
    fn = save_model(learn, tmp_path/'m.safetensors')
    new, o = load_model(fn), learn.dls.valid.items[0]
    assert not new.model.training and list(new.dls.vocab) == list(learn.dls.vocab)
    assert torch.equal(new.predict(o)[2], learn.predict(o)[2])
    assert [o.name for o in tmp_path.iterdir()] == ['m.safetensors'] # no part left behind
    assert load_model(fn, learn.dls).validate()[0] == learn.validate()[0]

META_01 = dict(arch='xresnet18', act_cls='Mish', sa=True, size=32, method='pad', vocab=['No Pneumothorax', 'Pneumothorax'], multi=False,
               split=dict(by='PatientID', valid_pct=0.2, seed=42, fold=None), pixels=dict(rule='dicom_pixels', channels=1, levels=65536),
               versions=dict(dicomcam='0.1.0', fastai='2.8.4', torch='2.6.0', pydicom='3.0.1'))

def _meta(fn):
    with safe_open(fn, 'pt') as f: return json.loads(f.metadata()['dicomcam'])

def test_a_model_file_of_version_0_1(folder, tmp_path):
    "The words as 0.1 wrote them: it loads, says what its network says, and is written with the same words in the same order"
    set_seed(0)
    net = xresnet18(c_in=1, n_out=2, act_cls=Mish, sa=True).eval()
    save_file(net.state_dict(), tmp_path/'old.safetensors', metadata={'dicomcam': json.dumps(META_01)})
    learn, o = load_model(tmp_path/'old.safetensors'), label_table(folder).file[0]
    image = ImageCache(32, folder=False)(o).as_subclass(torch.Tensor)
    with torch.no_grad(): expected = net(image[None]).softmax(1)[0]
    assert torch.equal(learn.predict(o)[2].cpu(), expected)
    new = _meta(save_model(learn, tmp_path/'new.safetensors'))
    assert list(new) == list(META_01) and {**new, 'versions': 0} == {**META_01, 'versions': 0}
    assert list(new['versions']) == list(META_01['versions'])

def test_what_the_file_could_not_describe_is_not_saved(learn, tmp_path):
    dls = DataLoaders.from_dsets([(torch.zeros(3), 0)]*4, [(torch.zeros(3), 0)]*4, bs=2)
    assert setup_of(dls) is None and setup_of(None) is None
    other = Learner(dls, torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='from dicom_dls can be saved'): save_model(other, tmp_path/'m.safetensors')
    tanh = dicom_learner(learn.dls, xresnet18, act_cls=torch.nn.Tanh)
    with pytest.raises(ValueError, match='act_cls=Tanh cannot be saved'): save_model(tanh, tmp_path/'m.safetensors')
    assert not list(tmp_path.iterdir())

class Evil:
    def __reduce__(self): return print, ('code of a stranger runs',)

def test_what_is_not_a_model_file_is_refused(learn, tmp_path, capsys):
    good, bad = save_model(learn, tmp_path/'m.safetensors'), tmp_path/'bad.safetensors'
    def refuses(match='not a model that dicomcam saved'):
        with pytest.raises(ValueError, match=match) as e: load_model(bad)
        assert '\n' not in str(e.value) and str(bad) in str(e.value)
    bad.write_bytes(pickle.dumps(Evil())); refuses()
    bad.write_bytes(good.read_bytes()[:5000]); refuses()
    bad.write_bytes(b''); refuses()
    weights = load_file(good)
    save_file(weights, bad); refuses()                                       # no words about the network
    meta = {**asdict(learn.network), **learn.dls.setup.meta()}
    for key, value in dict(arch='os', act_cls='system', sa=False, vocab=['a', 'b', 'c']).items():
        save_file(weights, bad, metadata={'dicomcam': json.dumps({**meta, key: value})}); refuses()
    assert 'stranger' not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='no such file'): load_model(tmp_path/'none.safetensors')

def test_failed_save_leaves_the_old_file(learn, tmp_path, monkeypatch):
    fn = save_model(learn, tmp_path/'m.safetensors')
    before = fn.read_bytes()
    def full(weights, part, **kw): part.write_bytes(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr('dicomcam.models.save_file', full)
    with pytest.raises(OSError): save_model(learn, fn)
    assert fn.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize('cache', [True, False, 'new'])
def test_same_seed_same_weights(learn, folder, tmp_path, cache):
    "Whether the images come from the cache, or are decoded each time, or decoded and put there"
    again = train_learner(folder, data=dict(cache=tmp_path if cache == 'new' else cache), **small)
    for a, b in zip(learn.model.parameters(), again.model.parameters()): assert torch.equal(a, b)

def test_demo_learner_trains_once(folder, tmp_path, monkeypatch):
    fn = tmp_path/'m.safetensors'
    first = demo_learner(folder, fn, **small)
    monkeypatch.setattr('fastai.learner.Learner.fit', lambda *a, **k: pytest.fail('trained again'))
    again = demo_learner(folder, fn, **small)
    o = first.dls.valid.items[0]
    assert torch.equal(again.predict(o)[2], first.predict(o)[2])

# --- labels and splits ---

def test_one_label_several_or_none():
    labels = pd.Series(['a', 'b', None])
    assert has_class(labels, 'a').tolist() == [True, False, False] and not is_multi(labels)
    labels = pd.Series([('a', 'b'), (), ('b',)])
    assert has_class(labels, 'b').tolist() == [True, False, True] and is_multi(labels)
    assert [label_text(o) for o in ('a', ('a', 'b'), (), None, np.nan)] == ['a', 'a, b', 'none', '–', '–']
    assert label_classes('ab') == ('ab',) and label_classes(np.nan) == ()

def test_which_class_is_positive():
    assert positive_classes(['a', 'b'], False) == ['b'] and positive_classes(['a', 'b'], True) == ['a', 'b']
    assert positive_classes(['a', 'b', 'c'], False) == ['a', 'b', 'c'] and positive_classes(['a', 'b'], False, 'a') == ['a']
    with pytest.raises(ValueError, match="No class 'z'; there are a, b"): positive_classes(['a', 'b'], False, 'z')

def test_split_by_image_warns(folder):
    with pytest.warns(UserWarning, match='same patient may be on both sides'): t = dicom_dls(folder, size=32, by=None).setup.table
    assert t.group.nunique() == len(t)

def _table(folder): return pd.read_csv(folder/'labels.csv')

def test_columns_by_name(folder):
    df = _table(folder).assign(note='x')[['note', 'label', 'file']]
    t = label_table(folder, df, file_col='file', label_col='label')
    assert t.label.tolist() == df.label.tolist()
    with pytest.raises(ValueError, match="no column 'finding'; there are note, label, file"): label_table(folder, df, file_col='file', label_col='finding')

def test_repeated_file(folder):
    df = _table(folder)
    with pytest.raises(ValueError, match='more than once'): label_table(folder, pd.concat([df, df[:1]]))

def test_given_split_is_kept(folder):
    df, group = _table(folder), patient_ids(label_table(folder).file)
    valid = np.isin(group, sorted(set(group))[::3])
    t = dicom_dls(folder, df.assign(is_valid=valid), size=32).setup.table
    assert t.is_valid.tolist() == valid.tolist()
    t = dicom_dls(folder, df.assign(fold=np.where(valid, 3, 1)), size=32, fold=3).setup.table
    assert t.is_valid.tolist() == valid.tolist()
    assert dicom_dls(folder, df.assign(fold=np.where(valid, 3, 1)), size=32).setup.table.is_valid.tolist() == (~valid).tolist()
    with pytest.raises(ValueError, match='one side empty'): dicom_dls(folder, df.assign(fold=1), size=32, fold=2)

def test_given_split_with_a_patient_on_both_sides(folder):
    group = pd.Series(patient_ids(label_table(folder).file))
    twice = group[group.duplicated(keep=False)]
    df = _table(folder).assign(is_valid=False)
    df.loc[twice.index[0], 'is_valid'] = True
    with pytest.raises(ValueError, match=f'on both sides, {twice.iloc[0]}'): dicom_dls(folder, df, size=32)

def test_three_classes(folder):
    df = _table(folder)
    df['label'] = ['abc'[i%3] for i in range(len(df))]
    dls = dicom_dls(folder, df, size=32, valid_pct=.33)
    assert list(dls.vocab) == ['a', 'b', 'c'] and set(dls.setup.table.label[dls.setup.table.is_valid]) == {'a', 'b', 'c'}
    learn = dicom_learner(dls, xresnet18)
    learn.fit(1)
    assert learn.predict(dls.valid.items[0])[2].shape == (3,)

@pytest.mark.parametrize('delim', [True, False])
def test_several_labels(folder, delim, tmp_path):
    df = _table(folder)
    a, b = df.label == 'Pneumothorax', np.arange(len(df))%2 == 0
    if delim: df['label'] = ['|'.join(n for n, o in (('air', x), ('even', y)) if o) for x, y in zip(a, b)]
    else: df = df.assign(air=a, even=b)
    dls = dicom_dls(folder, df, size=32, **(dict(label_delim='|') if delim else dict(label_col=['air', 'even'])))
    assert list(dls.vocab) == ['air', 'even'] and dls.setup.table.label[~a & ~b].map(len).eq(0).all()
    assert [tuple(o) for o in dls.setup.table.label] == [tuple(n for n, o in (('air', x), ('even', y)) if o) for x, y in zip(a, b)]
    learn = dicom_learner(dls, xresnet18, class_weights='balanced')
    learn.fit(1)
    new, o = load_model(save_model(learn, tmp_path/'m.safetensors')), dls.valid.items[0]
    assert torch.equal(new.predict(o)[2], learn.predict(o)[2])

# --- loading ---

def test_unreadable_images(copy):
    files = label_table(copy).file
    files[0].write_bytes(files[0].read_bytes()[:3000])
    files[1].write_text('no X-ray')
    with pytest.warns(UserWarning, match='2 of 30 images cannot be read'): dls = dicom_dls(copy, size=32)
    assert set(dls.setup.skipped.index) == set(files[:2]) and len(dls.setup.table) == 28 and not set(files[:2]) & set(dls.setup.table.file)
    with pytest.raises(ValueError, match=str(files[0])): dicom_dls(copy, size=32, strict=True)

@pytest.fixture
def cache(tmp_path): return ImageCache(48, folder=tmp_path/'cache')

def test_cache_gives_what_decoding_gives(folder, cache):
    files = label_table(folder).file.tolist()
    assert cache.fill(files) == {} and len(list(cache.root.rglob('*.u16'))) == len(files)
    plain = ImageCache(48, folder=False)
    for o in files[:5]: assert torch.equal(cache(o), plain(o))

def test_cache_decodes_once(folder, cache, monkeypatch):
    files = label_table(folder).file.tolist()
    cache.fill(files)
    monkeypatch.setattr('dicomcam.cache.fit_image', lambda *a: pytest.fail('decoded again'))
    for o in files: assert ImageCache(48, folder=cache.root)(o).shape == (1, 48, 48)

def test_cache_knows_content(copy, cache):
    a, b = label_table(copy).file[:2]
    before, other = cache(a), cache(b)
    shutil.copy(b, a)
    assert torch.equal(cache(a), other) and not torch.equal(cache(a), before)

def test_cache_mends_itself(folder, cache):
    fn = label_table(folder).file[0]
    good = cache(fn)
    kept = cache.where(fn)
    for bad in (kept.read_bytes()[:200], b'', b'no array'):
        kept.write_bytes(bad)
        assert torch.equal(cache(fn), good) and kept.stat().st_size == 48*48*2
    assert not list(cache.root.rglob('*.part'))

def test_cache_is_bounded(folder, tmp_path):
    files = label_table(folder).file.tolist()
    one = 48*48*2
    old = ImageCache(48, folder=tmp_path, limit=20*one)
    old.fill(files[:15])
    for o in files[:15]: os.utime(old.where(o), (1, 1))
    new = ImageCache(48, folder=tmp_path, limit=20*one)
    new.fill(files[10:20])
    assert all(new.where(o).is_file() for o in files[10:20]) and new.used() <= 20*one
    new.stored = 0; new.limit = one
    assert new(files[25]).shape == (1, 48, 48) and not new.where(files[25]).is_file() # full: decoded, not kept
    before = new.used()
    new.limit = 20*one
    assert new.fill([tmp_path/'gone.dcm']) and new.used() == before # nothing readable asked for: nothing is thrown away
    new.clear()
    assert new.used() == 0

def test_cache_on_a_full_disk(folder, cache, monkeypatch):
    class Full(np.ndarray):
        def tofile(self, part): Path(part).write_bytes(b'half'); raise OSError(28, 'No space left on device')
    fit = dicomcam.cache.fit_image
    monkeypatch.setattr('dicomcam.cache.fit_image', lambda *a: fit(*a).view(Full))
    with pytest.warns(UserWarning, match='No space left'): x = cache(label_table(folder).file[0])
    assert x.shape == (1, 48, 48) and not [o for o in cache.root.rglob('*') if o.is_file()]

def test_cache_shared_by_processes(folder, cache):
    "Four processes fill the same folder at once, one of them is killed; nobody sees half a file"
    code = f"import sys; from dicomcam.train import *; c = ImageCache(48, folder={str(cache.root)!r}); print(c.fill(label_table({str(folder)!r}).file.tolist()), flush=True)"
    ps = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    while not list(cache.root.rglob('*')) and ps[0].poll() is None: time.sleep(.01)
    ps[0].kill()
    ps[0].communicate()
    assert [p.communicate()[0].strip() for p in ps[1:]] == ['{}']*3
    plain = ImageCache(48, folder=False)
    for o in label_table(folder).file: assert torch.equal(cache(o), plain(o))

def test_augmentation_is_fastais():
    "Each of the three, drawn to be the same for both, gives what fastai's own gives"
    from fastai.vision.augment import Brightness, Contrast, Rotate, Zoom
    set_seed(0)
    x = TensorDicom(torch.rand(3, 1, 40, 40)*.8+.1)
    smooth = TensorDicom(torch.nn.functional.avg_pool2d(x, 5, 1, 2))
    def ours(x, **kw):
        t, zero = XrayTfm(), torch.zeros(3)
        d = dict(angle=zero, zoom=zero+1, cx=zero, cy=zero, bright=zero, contrast=zero+1) | {k: zero+v for k, v in kw.items()}
        t.draw = lambda n: tuple(d.values())
        return t(x, split_idx=0)
    for a in (7, -3): assert torch.allclose(ours(x, angle=-np.deg2rad(a)), Rotate(p=1, draw=a)(x.clone(), split_idx=0), atol=1e-4)
    assert torch.allclose(ours(x, zoom=1.1), Zoom(p=1, draw=1.1, draw_x=.5, draw_y=.5)(x.clone(), split_idx=0), atol=1e-4)
    assert torch.allclose(ours(x, bright=torch.logit(torch.tensor(.6))), Brightness(p=1, draw=.6)(x.clone(), split_idx=0), atol=1e-5)
    assert torch.allclose(ours(x, contrast=1.2), Contrast(p=1, draw=1.2)(x.clone(), split_idx=0), atol=1e-5)
    assert torch.equal(XrayTfm()(x, split_idx=1), x) # not in validation
    set_seed(1); a = XrayTfm()(smooth, split_idx=0)
    set_seed(1); b = XrayTfm()(smooth, split_idx=0)
    assert torch.equal(a, b) and 0 <= a.min() and a.max() <= 1 and (a-smooth).abs().max() > .01

def test_augmentation_stays_in_its_bounds():
    angle, zoom, cx, cy, bright, contrast = XrayTfm().draw(20000)
    assert abs(angle).max() <= np.deg2rad(7.001) and 1 <= zoom.min() and zoom.max() <= 1.1 and .05 < (angle == 0).float().mean() < .15
    assert .4 <= torch.sigmoid(bright).min() and torch.sigmoid(bright).max() <= .6 and .79 < contrast.min() < .85 and 1.2 < contrast.max() < 1.26

def test_full_depth_from_the_cache(tmp_path, copy):
    ds = pydicom.dcmread(pydicom.data.get_testdata_file('MR_small.dcm'))
    for i, o in enumerate(label_table(copy).file): ds.PatientID = str(i); ds.save_as(o)
    x, y = dicom_dls(copy, size=64, cache=tmp_path/'cache', batch_tfms=[]).valid.one_batch()
    assert len(x[0].unique()) > 256

@pytest.mark.parametrize('method', ['pad', 'crop', 'squish'])
def test_heatmaps_find_the_way_back(method, tmp_path):
    "A bright spot in a wide image is bright at the same place of the native map, whatever the way into the square"
    from dicomcam.heatmaps import Heatmaps
    x = np.zeros((200, 320), np.float32); x[60:80, 120:140] = 1
    Image.fromarray((x*255).astype(np.uint8)).save(tmp_path/'wide.png') # of which only the size is read
    seen = ImageCache(64, method, False)(x)
    h = Heatmaps([seen[None]], seen[None], torch.ones(1, 1), ['a'], ['l'], 'cam', [tmp_path/'wide.png'], view=View(64, method))
    native = h.native(0).numpy()
    y, x = np.unravel_index(native.argmax(), native.shape)
    assert native.shape == (200, 320) and 60 <= y < 80 and 120 <= x < 140

# --- learners ---

def test_class_weights(folder):
    dls = dicom_dls(folder, size=32)
    n = dls.setup.table.label[~dls.setup.table.is_valid].value_counts()
    w = dicom_learner(dls, xresnet18, class_weights='balanced').loss_func.weight
    assert np.allclose(w.cpu(), [n.sum()/2/n[c] for c in dls.vocab])

def test_architectures_of_timm(folder, tmp_path):
    pytest.importorskip('timm', reason='the [timm] extra is not installed')
    dls = dicom_dls(folder, size=64)
    learn = dicom_learner(dls, 'resnet10t')
    learn.fit(1)
    new, o = load_model(save_model(learn, tmp_path/'m.safetensors')), dls.valid.items[0]
    assert torch.equal(new.predict(o)[2], learn.predict(o)[2])
    from dicomcam.cam import cam
    assert cam(learn, o).maps.shape == (1, 2, 1, 64, 64)
    with pytest.raises(ValueError, match='did you mean'): dicom_learner(dls, 'resnet10x')

def test_pretrained_weights_see_what_they_were_trained_on(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path/'hub/checkpoints').mkdir(parents=True)
    set_seed(0)
    rgb = xresnet50(n_out=1000)
    torch.save(dict(model=rgb.state_dict()), tmp_path/'hub/checkpoints/xrn50_940.pth')
    net = dicom_learner(dicom_dls(folder, size=32), pretrained=True, act_cls=torch.nn.ReLU, sa=False).model.eval().cpu()
    x, (mean, std) = torch.rand(2, 1, 64, 64), (torch.tensor(o)[:, None, None] for o in imagenet_stats)
    net[-1] = rgb[-1]
    with torch.no_grad(): assert torch.equal(net(x), rgb.eval()((x.repeat(1, 3, 1, 1)-mean)/std))
    with pytest.raises(ValueError, match='only xresnet50'): dicom_learner(dicom_dls(folder, size=32), xresnet18, pretrained=True)

def test_pretrained_offline(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    def offline(*a, **kw): raise URLError('no network')
    monkeypatch.setattr('fastai.vision.models.xresnet.load_state_dict_from_url', offline)
    with pytest.raises(ConnectionError, match='pretrained=False') as e:
        dicom_learner(dicom_dls(folder, size=32), pretrained=True, act_cls=torch.nn.ReLU, sa=False)
    assert '\n' not in str(e.value)

def test_mixed_precision(folder):
    learn = dicom_learner(dicom_dls(folder, size=32), xresnet18, amp=True)
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][:2]).all()
    assert next(learn.model.parameters()).dtype == torch.float32

# --- lasting ---

three = {**small, 'epochs': 3}
KILL = getattr(signal, 'SIGKILL', signal.SIGTERM) # on Windows either ends a process at once
TRAIN = f'''import os, sys, torch
from dicomcam.train import *
from fastai.callback.core import Callback
class Kill(Callback):
    def before_batch(self):
        if self.epoch == 2 and self.training and self.iter == 1: os.kill(os.getpid(), {int(KILL)})
from fastai.learner import Learner
fit = Learner.fit_flat_cos
Learner.fit_flat_cos = lambda self, *a, cbs=(), **kw: fit(self, *a, cbs=[*cbs, Kill()], **kw)
torch.set_num_threads(int(sys.argv[3])) # sums depend on it in the last digit
train_learner(sys.argv[1], checkpoint=sys.argv[2], arch='xresnet18', size=32, bs=8, epochs=3)'''

def test_going_on_after_a_kill(folder, tmp_path):
    "A process that is killed in its third epoch; going on gives the figures and weights of an unbroken run, to the last digit"
    fn = tmp_path/'train.pt'
    p = subprocess.run([sys.executable, '-c', TRAIN, str(folder), str(fn), str(torch.get_num_threads())],
                       capture_output=True, text=True)
    assert abs(p.returncode) == KILL and fn.is_file(), p.stderr[-2000:]
    whole, rest = train_learner(folder, **three), train_learner(folder, checkpoint=fn, resume=True, **three)
    assert np.array_equal(np.array(whole.recorder.values), np.array(rest.recorder.values))
    assert whole.recorder.losses == rest.recorder.losses and whole.recorder.lrs == rest.recorder.lrs
    for k, v in whole.model.state_dict().items(): assert torch.equal(v, rest.model.state_dict()[k]), k
    again = train_learner(folder, checkpoint=fn, resume=True, **three) # nothing left to do
    for k, v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k

def test_checkpoint_on_a_full_disk(folder, tmp_path, monkeypatch):
    fn, save, n = tmp_path/'train.pt', torch.save, []
    def full(state, part):
        n.append(state['epoch'])
        if len(n) > 1: part.write_bytes(b'half'); raise OSError(28, 'No space left on device')
        save(state, part)
    monkeypatch.setattr('dicomcam.checkpoints.torch.save', full)
    with pytest.warns(UserWarning, match='the one before it remains'): train_learner(folder, checkpoint=fn, **three)
    assert n == [1, 2, 3] and [o.name for o in tmp_path.iterdir()] == ['train.pt']
    assert torch.load(fn, weights_only=True)['epoch'] == 1

@pytest.mark.parametrize('bad', [b'', b'no checkpoint', 'pickle', 'other epochs', 'other network'])
def test_what_is_no_checkpoint(folder, tmp_path, bad, capsys):
    fn = tmp_path/'train.pt'
    if bad == 'pickle': torch.save(Evil(), fn)
    elif bad == 'other epochs': train_learner(folder, checkpoint=fn, **small)
    elif bad == 'other network': train_learner(folder, checkpoint=fn, **small, sa=False)
    else: fn.write_bytes(bad)
    with pytest.raises(ValueError, match='checkpoint') as e: train_learner(folder, checkpoint=fn, resume=True, **three)
    assert str(fn) in str(e.value) and '\n' not in str(e.value) and 'stranger' not in capsys.readouterr().out

TWO = '''import sys, warnings
from dicomcam.train import *
from fastai.distributed import *
from fastai.torch_core import rank_distrib, set_seed
from fastai.vision.models.xresnet import xresnet18
import torch
set_seed(1)
DistributedDL._broadcast = lambda self, t, rank: t # fastai sends the order of the images by CUDA; with the same seed both have it
learn = dicom_learner(dicom_dls(sys.argv[1], size=32, bs=4), xresnet18)
with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_flat_cos(2, 1e-3, cbs=Checkpoint(sys.argv[2]+'/train.pt'))
torch.save([p.detach() for p in learn.model.parameters()], f'{sys.argv[2]}/{rank_distrib()}.pt')
if not rank_distrib(): save_model(learn, sys.argv[2]+'/m.safetensors')'''

def test_two_processes(folder, tmp_path):
    "fastai's `distrib_ctx` on two CPU processes: the same weights on both at the end, other than at the start, and a model file that loads"
    pytest.importorskip('accelerate', reason='the [distributed] extra is not installed')
    (tmp_path/'two.py').write_text(TWO)
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'two.py', str(folder), str(tmp_path)],
                       cwd=tmp_path, env={**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root)},
                       capture_output=True, text=True, timeout=1800)
    assert r.returncode == 0, r.stderr[-3000:]
    a, b = (torch.load(tmp_path/f'{i}.pt') for i in (0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    new = load_model(tmp_path/'m.safetensors')
    assert all(torch.equal(p, q) for p, q in zip(a, new.model.parameters()))

def test_a_file_that_another_process_clears(folder, tmp_path, monkeypatch):
    c, stat = ImageCache(32, folder=tmp_path), Path.stat
    for o in label_table(folder).file[:2]: c(o)
    def gone(self, **kw):
        if self.suffix == '.u16': first.unlink(missing_ok=True)
        return stat(self, **kw)
    first = min(tmp_path.rglob('*.u16'))
    monkeypatch.setattr(Path, 'stat', gone)
    assert c.used() == 32*32*2
    c.clear()
    assert c.used() == 0

def test_lr_find_leaves_nothing_in_the_data(copy, tmp_path, monkeypatch):
    "Nor does it need to write there: folders of films are often read-only"
    monkeypatch.chdir(tmp_path)
    before = sorted(copy.rglob('*'))
    learn = dicom_learner(dicom_dls(copy, size=32, bs=4, cache=False), xresnet18)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert sorted(copy.rglob('*')) == before

# --- the batch that fills the card ---

def test_fill_card(learn, monkeypatch):
    "Doubled while a step fits with an eighth to spare, and while an epoch keeps its steps"
    dls = dicom_dls(learn.dls.path, size=32, bs=4)
    on_card = dicom_learner(dls, xresnet18)
    assert fill_card(on_card, steps=1) == 4 # a CPU: as given
    monkeypatch.setattr(type(dls), 'device', torch.device('meta'))
    tried = []
    def step(learn, bs):
        tried.append(bs)
        if bs > 10: raise torch.OutOfMemoryError('full')
    assert fill_card(on_card, steps=1, step=step) == 8 and tried == [9, 18]
    assert fill_card(on_card, steps=2, step=lambda *_: None) == 8
    assert fill_card(on_card, steps=1, step=lambda *_: None) == 16
    monkeypatch.undo()
    assert len(dls.train) == len(dls.train_ds)//16 and dls.one_batch()[0].shape[0] == 16

@pytest.mark.parametrize('amp', [False, True])
def test_a_step_on_trial_leaves_no_trace(learn, amp):
    on_trial = dicom_learner(dicom_dls(learn.dls.path, size=32), xresnet18, amp=amp)
    before, rng = {k: v.clone() for k, v in on_trial.model.state_dict().items()}, torch.get_rng_state()
    trial_step(on_trial, 3)
    assert all(torch.equal(v, before[k]) for k, v in on_trial.model.state_dict().items()) and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in on_trial.model.parameters())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU')
def test_fill_card_on_a_card(folder):
    learn = dicom_learner(dicom_dls(folder, size=32, bs=2), xresnet18)
    assert fill_card(learn, steps=2) == 8
