"Splits without leaks, refusals that name the file and the cure, model files that give the same numbers and run no code."
import json, pickle, shutil

import numpy as np, pandas as pd, pydicom, pytest, torch
from fastai.vision.models.xresnet import xresnet18
from safetensors.torch import load_file, save_file

from dicomcam.train import (demo_learner, dicom_dls, dicom_learner, label_table, load_model, patient_ids, patient_split, save_model,
                            split_counts, train_learner)

small = dict(arch='xresnet18', size=32, bs=8, epochs=1)

@pytest.fixture(scope='module')
def learn(folder): return train_learner(folder, **small)

@pytest.fixture
def copy(folder, tmp_path): return shutil.copytree(folder, tmp_path/'copy')

def test_no_patient_on_both_sides(folder):
    for seed in range(5):
        t = dicom_dls(folder, size=32, seed=seed).table
        assert not set(t.group[t.is_valid]) & set(t.group[~t.is_valid])
        for side in (True, False): assert set(t.label[t.is_valid == side]) == set(t.label)

def test_no_patient_on_both_sides_of_real_films(xrays):
    t = dicom_dls(xrays, size=32).table
    true = [pydicom.dcmread(o, stop_before_pixels=True).PatientID for o in t.file]
    assert t.group.tolist() == true and t.group.nunique() == 209
    assert not set(t.group[t.is_valid]) & set(t.group[~t.is_valid])
    assert abs(t.is_valid.mean()-0.2) < 0.03

def test_split_by_image_is_allowed(folder):
    t = dicom_dls(folder, size=32, by=None).table
    assert t.group.nunique() == len(t)

def test_same_seed_same_split(folder):
    a, b, c = (dicom_dls(folder, size=32, seed=s).table.is_valid.tolist() for s in (1, 1, 2))
    assert a == b != c

def test_split_counts_add_up(folder):
    c = split_counts(dicom_dls(folder, size=32))
    assert c.images.sum() == 30 and set(c.index.get_level_values(0)) == {'train', 'valid'}

def test_batches_are_what_a_viewer_shows(folder):
    from dicomcam.dicom import dicom_pixels
    dls = dicom_dls(folder, size=96)
    x = dls.test_dl([str(dls.valid.items[0])]).one_batch()[0]
    assert x.shape == (1, 1, 96, 96) and x.dtype == torch.float32
    assert np.allclose(x[0, 0].cpu(), dicom_pixels(dls.valid.items[0]), atol=1e-6)

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
    meta = {**learn.setup, **learn.dls.setup}
    for key, value in dict(arch='os', act_cls='system', sa=False, vocab=['a', 'b', 'c']).items():
        save_file(weights, bad, metadata={'dicomcam': json.dumps({**meta, key: value})}); refuses()
    assert 'stranger' not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='no such file'): load_model(tmp_path/'none.safetensors')

def test_failed_save_leaves_the_old_file(learn, tmp_path, monkeypatch):
    fn = save_model(learn, tmp_path/'m.safetensors')
    before = fn.read_bytes()
    def full(weights, part, **kw): part.write_bytes(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr('dicomcam.train.save_file', full)
    with pytest.raises(OSError): save_model(learn, fn)
    assert fn.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def test_same_seed_same_weights(learn, folder):
    again = train_learner(folder, **small)
    for a, b in zip(learn.model.parameters(), again.model.parameters()): assert torch.equal(a, b)

def test_demo_learner_trains_once(folder, tmp_path, monkeypatch):
    fn = tmp_path/'m.safetensors'
    first = demo_learner(folder, fn, **small)
    monkeypatch.setattr('fastai.learner.Learner.fit', lambda *a, **k: pytest.fail('trained again'))
    again = demo_learner(folder, fn, **small)
    o = first.dls.valid.items[0]
    assert torch.equal(again.predict(o)[2], first.predict(o)[2])
