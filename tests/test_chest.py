"Networks of torchxrayvision: images, outputs and heatmaps are its own, whatever the weights; and nothing in a file of weights runs."
import functools, importlib.util, os, pickle, sys, tarfile, warnings, zipfile
from pathlib import Path

import numpy as np, pydicom, pytest, torch
from safetensors.torch import save_file
from torch import nn

from dicomcam import chest
from dicomcam.chest import CHEST_NETWORKS, ChestImages, OperatingPoints, chest_network, whole_weights
from dicomcam.classifier import Classifier
from dicomcam.data import DownloadError
from dicomcam.gradcam import gradcam
from dicomcam.kinds import other_kind
from dicomcam.models import save_model

DENSE, RES = 'densenet121-res224-all', 'resnet50-res512-all'

@pytest.fixture(scope='module')
def xrv():
    if not importlib.util.find_spec('torchxrayvision'): pytest.skip('needs torchxrayvision: pip install "dicomcam[xrv]"')
    with warnings.catch_warnings():
        import torchxrayvision
        import torchxrayvision.models
    return torchxrayvision

def spread(net, last):
    "Weights drawn at random whose scores are as a trained network's"
    with torch.no_grad():
        scores = net.eval()(torch.rand(4, 1, 64, 64)*2048-1024)
        last.weight.div_(scores.abs().max())
        last.bias.copy_(torch.linspace(-5, 1, len(last.bias)))
    return net

@pytest.fixture(scope='module')
def home(xrv, tmp_path_factory):
    "A home with files of weights where torchxrayvision keeps what it downloaded, as they are published: drawn at random"
    home = tmp_path_factory.mktemp('home')
    folder = home/'.torchxrayvision'/'models_data'
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    net = xrv.models.DenseNet()
    spread(net, net.classifier)
    for name in CHEST_NETWORKS[:-1]: torch.save(net, folder/file_of(xrv, name), _use_new_zipfile_serialization=name == CHEST_NETWORKS[1])
    import torchvision
    net = torchvision.models.resnet50(num_classes=18)
    net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    spread(net, net.fc)
    torch.save(net.state_dict(), folder/file_of(xrv, RES))
    return home

def file_of(xrv, name): return xrv.models.model_urls[name]['weights_url'].rsplit('/', 1)[1]

@pytest.fixture(autouse=True)
def at_home(request, monkeypatch):
    "No network, and that home, if a test has one"
    def refuse(*args, **kw): raise ConnectionError('no network in tests')
    monkeypatch.setattr('requests.get', refuse)
    if 'home' in request.fixturenames: monkeypatch.setenv('HOME', str(request.getfixturevalue('home')))

@pytest.fixture(scope='module')
def learn(xrv, home): return chest_network(DENSE, home/'.torchxrayvision'/'models_data'/file_of(xrv, DENSE))

@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "Films of any shape: smooth noise, 8 bits"
    def film(rows, cols, bits=8):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.ExplicitVRLittleEndian, '1.2.3'
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = pydicom.uid.SecondaryCaptureImageStorage, '1.2.3', 'CR'
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = rows, cols, 8, 8, 7
        ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 0, 'MONOCHROME2'
        y, x = np.mgrid[:rows, :cols]/100
        grey = 127+60*np.sin(5*x+y)+60*np.cos(3*y-x**2)+np.random.default_rng(0).normal(0, 4, (rows, cols))
        ds.PixelData = grey.clip(0, 255).astype(np.uint8).tobytes()
        fn = tmp_path_factory.mktemp('films')/f'{rows}x{cols}.dcm'
        ds.save_as(fn, enforce_file_format=True)
        return fn
    return film

def as_theirs(xrv, fn, size):
    "A film as torchxrayvision's manual has it"
    image = xrv.utils.read_xray_dcm(fn)[None]
    return xrv.datasets.XRayResizer(size)(xrv.datasets.XRayCenterCrop()(image))

# --- images

@pytest.mark.parametrize('rows, cols', [(300, 200), (201, 300), (302, 201), (224, 224), (150, 100), (700, 901)])
def test_images_are_those_of_torchxrayvision(xrv, films, rows, cols):
    fn = films(rows, cols)
    np.testing.assert_allclose(2048*ChestImages(224)(fn).numpy()-1024, as_theirs(xrv, fn, 224), atol=.01) # of 2,048: 1e-5

def test_real_images_are_those_of_torchxrayvision(xrv, xrays):
    for fn in sorted(xrays.rglob('*.dcm'))[:3]:
        ours, theirs = ChestImages(512)(fn).numpy(), as_theirs(xrv, fn, 512)
        assert np.abs(ours-(theirs/2048+.5)).max() < 1e-5

def test_images_of_arrays(films):
    fn = films(300, 200)
    np.testing.assert_allclose(ChestImages(64)(pydicom.dcmread(fn).pixel_array), ChestImages(64)(fn), atol=1e-6)

# --- networks

def test_the_networks_of_torchxrayvision(xrv):
    assert {o for o in xrv.models.model_urls if o.startswith(('densenet', 'resnet'))} == set(CHEST_NETWORKS)

@functools.cache
def theirs_of(xrv, name, home):
    "Read by torchxrayvision"
    return xrv.models.get_model(name, cache_dir=str(home/'.torchxrayvision'/'models_data'))

def known_of(theirs): return [i for i, o in enumerate(theirs.targets) if o and theirs.op_threshs[i].isfinite()]

@pytest.mark.parametrize('name', [DENSE, 'densenet121-res224-nih', 'densenet121-res224-rsna', RES])
def test_outputs_are_those_of_torchxrayvision(xrv, home, name, films):
    "From the files that it publishes and a film to probabilities, those of the findings that were trained"
    learn, theirs, fn = chest_network(name), theirs_of(xrv, name, home), films(300, 280)
    size, known = xrv.models.model_urls[name]['input_resolution'], known_of(theirs)
    assert learn.dls.vocab == [theirs.targets[i] for i in known] and len(known) >= 2
    with torch.no_grad(): want = theirs(torch.from_numpy(as_theirs(xrv, fn, size))[None])[0, known]
    probs, _ = learn.get_preds(dl=learn.dls.test_dl([fn], num_workers=0))
    assert (probs[0]-want).abs().max() < 1e-5 and want.min() < .5 < want.max()
    _, above, same = learn.predict(fn)
    assert above.tolist() == (want >= .5).tolist() and (same-want).abs().max() < 1e-5

def test_findings():
    pytest.importorskip('torchxrayvision')
    for name, n in {DENSE: 18, RES: 16, 'densenet121-res224-rsna': 2}.items():
        about = chest._about(name)
        assert sum(bool(label) and np.isfinite(t) for label, t in zip(about['labels'], about['op_threshs'])) == n

@pytest.mark.parametrize('name', [DENSE, RES])
def test_probabilities_are_stretched_as_theirs(xrv, name):
    t = torch.tensor(xrv.models.model_urls[name]['op_threshs'])
    t = t[t.isfinite()]
    scores = torch.cat([torch.randn(99, len(t), generator=torch.Generator().manual_seed(0))*4, t.logit()[None]])
    want = xrv.models.op_norm(scores.sigmoid(), t)
    torch.testing.assert_close(OperatingPoints(t).activation(scores), want, atol=1e-6, rtol=0)

def test_real_films(xrv, home, learn, xrays):
    files = sorted(xrays.rglob('*.dcm'))[:4]
    theirs = theirs_of(xrv, DENSE, home)
    with torch.no_grad(): want = theirs(torch.from_numpy(np.stack([as_theirs(xrv, fn, 224) for fn in files])))
    h = gradcam(learn, files, classes='Pneumothorax')
    c = Classifier(learn)
    xb = torch.cat([o for o in c.batches(files)[1]])
    torch.testing.assert_close(c.probs(c.scores(xb)), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(h.probs[:, 0], want[:, h.vocab.index('Pneumothorax')], atol=1e-5, rtol=0)

@pytest.mark.parametrize('layer', ['denseblock4', 'denseblock3', 'transition2'])
def test_heatmaps_explain_the_score_before_the_sigmoid(xrv, home, learn, films, layer):
    "Grad-CAM of torchxrayvision's network, by hand"
    theirs, fn = theirs_of(xrv, DENSE, home), films(300, 280)
    kept = {}
    x = torch.from_numpy(as_theirs(xrv, fn, 224))[None].requires_grad_()
    with getattr(theirs.features, layer).register_forward_hook(lambda m, i, out: kept.update(out=out) or out.clone()):
        logits = theirs.classifier(theirs.features2(x))
    g, = torch.autograd.grad(logits[0, 3], kept['out'])
    want = (g.mean((2, 3), keepdim=True)*kept['out']).sum(1)[0].detach()
    h = gradcam(learn, [fn], classes='Pneumothorax', layers=f'features.{layer}')
    np.testing.assert_allclose(h.raw[0][0, 0], want, atol=1e-4*want.abs().max())
    assert h.native(0).shape == (300, 280) and not h.native(0)[:9].any() and h.native(0)[10].any() # the middle square only

def test_all_findings_at_once(learn, films):
    h = gradcam(learn, [films(300, 280), films(200, 210)])
    assert h.probs.shape == (2, 18) and h.classes == list(learn.dls.vocab)

def test_it_cannot_be_saved(learn, tmp_path):
    with pytest.raises(ValueError, match='pixels'): save_model(learn, tmp_path/'m.safetensors')

def test_warnings_stay(xrv, home):
    "torchxrayvision silences those of everybody"
    for name in [o for o in sys.modules if o.startswith('torchxrayvision')]: del sys.modules[name]
    before = list(warnings.filters)
    chest._about(DENSE)
    assert warnings.filters == before

# --- files of weights

@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), nn.ModuleList([nn.Linear(1, 1, bias=False)]))

@pytest.mark.parametrize('what', ['whole', 'state'])
@pytest.mark.parametrize('new', [False, True])
def test_whatever_torch_saved(net, tmp_path, what, new):
    torch.save(net if what == 'whole' else net.state_dict(), tmp_path/'net.pt', _use_new_zipfile_serialization=new)
    found = whole_weights(tmp_path/'net.pt')
    assert found.keys() == net.state_dict().keys()
    for name, w in net.state_dict().items(): assert torch.equal(found[name], w) and not found[name].requires_grad

def test_safetensors(net, tmp_path):
    save_file(net.state_dict(), tmp_path/'net.safetensors')
    assert torch.equal(whole_weights(tmp_path/'net.safetensors')['0.weight'], net[0].weight)

def test_files_of_before_torch_1_6(net, tmp_path):
    "With the source of each layer, and without an attribute that layers have had since"
    for o in net.modules(): del o._non_persistent_buffers_set
    torch.save(net, tmp_path/'net.pt', _use_new_zipfile_serialization=False)
    data = (tmp_path/'net.pt').read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = whole_weights(tmp_path/'net.pt')
    assert [*found] == [f'{o}.{name}' for o, names in {'0': 'weight bias', '1': 'weight bias running_mean running_var num_batches_tracked',
        '2.1': 'weight bias', '3.0': 'weight'}.items() for name in names.split()] and b'module' in data

class Hostile:
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args

def _zip(fn, compressed=False, **parts):
    with zipfile.ZipFile(fn, 'w', zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as z:
        for name, data in parts.items(): z.writestr(f'net/{name.replace("_pkl", ".pkl")}', data)

def _attacks(net, fn):
    "What a stranger's file may be: name -> function that writes it"
    mark = str(fn)+'.ran'
    def save(o, **kw): return lambda: torch.save(o, fn, **kw)
    class Layer(nn.Linear):
        def __setstate__(self, state): Path(mark).touch()
    script = lambda: torch.jit.save(torch.jit.script(net[0]), fn)
    def tar():
        with tarfile.open(fn, 'w') as t:
            info = tarfile.TarInfo('storages'); info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            t.addfile(info)
    call = Hostile(os.system, f'touch {mark}')
    return dict(
        call=save(dict(a=call)), old_call=save([call], _use_new_zipfile_serialization=False),
        code=save(Hostile(eval, f'open({mark!r}, "w")')), attribute=save(dict(a=Hostile(getattr, net, 'training'))),
        beside=save({**net.state_dict(), 'x': Hostile(os.mkdir, mark)}), called=save(Hostile(nn.Linear, 3, 10**9)),
        numpy=save(dict(a=np.zeros(3))), imported=save(dict(a=Hostile(__import__, 'this'))), subclass=save(Path('/')),
        bare=lambda: fn.write_bytes(pickle.dumps(call)), script=script, tar=tar,
        bomb=lambda: _zip(fn, True, data_pkl=bytes(10**7)), empty=lambda: fn.write_bytes(b''), none=save({}), text=save(dict(a='b')),
        words=lambda: fn.write_text('<html>Not Found</html>'), nothing=save(nn.Identity()), number=save(3))

NAMES = ('call old_call code attribute beside called numpy imported subclass bare script tar bomb empty none text words nothing number').split()

@pytest.mark.parametrize('attack', NAMES)
def test_a_strangers_file_is_read_and_does_not_run(net, tmp_path, attack):
    fn = tmp_path/'net.pt'
    attacks = _attacks(net, fn)
    assert set(attacks) == set(NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of torch.jit
        attacks[attack]()
    with pytest.raises(ValueError, match='net.pt: no weights that can be read') as e: whole_weights(fn)
    assert '\n' not in str(e.value) and [o.name for o in tmp_path.iterdir()] == ['net.pt']

def test_a_layer_does_not_run(net, tmp_path):
    "Its class is never looked up, so neither is what it does when it is built"
    torch.save(net, tmp_path/'net.pt')
    built = []
    monkey = nn.Module.__setstate__
    try:
        nn.Module.__setstate__ = lambda self, state: built.append(self)
        whole_weights(tmp_path/'net.pt')
    finally: nn.Module.__setstate__ = monkey
    assert built == []

@pytest.mark.parametrize('share', [.1, .5, .99])
@pytest.mark.parametrize('new', [False, True])
def test_half_a_file(net, tmp_path, new, share):
    torch.save(net, tmp_path/'net.pt', _use_new_zipfile_serialization=new)
    data = (tmp_path/'net.pt').read_bytes()
    (tmp_path/'net.pt').write_bytes(data[:int(len(data)*share)])
    with pytest.raises(ValueError, match='no weights that can be read'): whole_weights(tmp_path/'net.pt')

# --- what may go wrong

def says(error, *args, **kw):
    with pytest.raises(error) as e: chest_network(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

@pytest.mark.parametrize('name', ['densenet121', 'all', '', 'densenet121-res224-siim', 'xrv:'+DENSE])
def test_no_such_network(name):
    told = says(ValueError, name)
    assert 'did you mean' in told and all(o in told for o in CHEST_NETWORKS)

def test_without_torchxrayvision(monkeypatch):
    monkeypatch.setattr(chest, 'find_spec', lambda name: None)
    assert 'pip install "dicomcam[xrv]"' in says(ImportError, DENSE)

def test_offline(xrv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    told = says(DownloadError, DENSE)
    assert all(o in told for o in (DENSE, file_of(xrv, DENSE), str(tmp_path/'.torchxrayvision'), 'weights=FILE'))
    assert capsys.readouterr().out == ''

def test_weights_of_another_network(home, xrv, tmp_path):
    folder = home/'.torchxrayvision'/'models_data'
    assert 'not the weights of' in says(ValueError, DENSE, folder/file_of(xrv, RES))
    assert 'not the weights of' in says(ValueError, RES, folder/file_of(xrv, DENSE))
    assert 'no such file' in says(FileNotFoundError, RES, tmp_path/'gone.pt')
    weights = whole_weights(folder/file_of(xrv, RES))
    torch.save({**weights, 'fc.weight': weights['fc.weight'][:9]}, tmp_path/'w.pt')
    assert 'not the weights of' in says(ValueError, RES, tmp_path/'w.pt')
    torch.save({**weights, 'fc.weight': torch.zeros(1).expand(18, 10**12)}, tmp_path/'w.pt') # no file is too small for that
    assert 'not the weights of' in says(ValueError, RES, tmp_path/'w.pt')
    torch.save({**weights, 'fc.bias': weights['fc.bias']*np.nan}, tmp_path/'w.pt')
    assert 'NaN or infinity' in says(ValueError, RES, tmp_path/'w.pt')

def test_weights_from_their_state_dict(home, xrv, films, tmp_path):
    "As torchxrayvision's own objects name them"
    theirs, fn = theirs_of(xrv, RES, home), films(300, 280)
    torch.save(theirs.state_dict(), tmp_path/'w.pt')
    one, other = (chest_network(RES, o) for o in (tmp_path/'w.pt', None))
    torch.testing.assert_close(one.model(torch.ones(1, 1, 64, 64)/3), other.model(torch.ones(1, 1, 64, 64)/3))

# --- by name

def test_a_model_by_name(home, learn, folder):
    from dicomcam.batches import dicom_dls
    from dicomcam.models import load_model
    same = load_model(f'xrv:{DENSE}')
    assert all(torch.equal(a, b) for a, b in zip(same.model.parameters(), learn.model.parameters()))
    with pytest.raises(ValueError, match='No chest network'): load_model('xrv:all')
    with pytest.raises(ValueError, match='its classes are'): load_model(f'xrv:{DENSE}', dicom_dls(folder, size=64))

def test_findings_of_a_folder_without_labels(home, films, tmp_path, monkeypatch):
    "dicomcam explain"
    import pandas as pd
    from click.testing import CliRunner
    from dicomcam.cli import main
    file, name = films(300, 280), 'densenet121-res224-rsna'
    one = CliRunner().invoke(main, ['explain', '--model', f'xrv:{name}', '--out', str(tmp_path/'one')])
    assert one.exit_code == 2 and "Missing argument" in one.stderr
    r = CliRunner().invoke(main, ['explain', '--model', f'xrv:{name}', str(file), '--out', str(tmp_path/'out')])
    assert r.exit_code == 0, r.output
    df = pd.read_csv(tmp_path/'out'/'heatmaps.csv')
    learn = chest_network(name)
    probs, _ = learn.get_preds(dl=learn.dls.test_dl([file], num_workers=0))
    np.testing.assert_allclose(df[list(learn.dls.vocab)].iloc[0], probs[0], atol=1e-5)
    assert len(list((tmp_path/'out').rglob('*.png'))) == 1
    monkeypatch.setenv('HOME', str(tmp_path))
    r = CliRunner().invoke(main, ['explain', f'xrv:{name}', str(file), '--out', str(tmp_path/'again')])
    assert r.exit_code == 2 and 'could not be downloaded' in r.stderr.splitlines()[-1] and not (tmp_path/'again').exists()

# --- to go on with

def test_fine_tuning(xrv, home, learn, folder, tmp_path, monkeypatch):
    "The same body, a new head; in two groups; and the model file is read without torchxrayvision"
    from dicomcam.batches import dicom_dls
    from dicomcam.models import load_model
    from dicomcam.networks import dicom_learner
    dls = dicom_dls(folder, size=64, method='crop', bs=4)
    weights = home/'.torchxrayvision'/'models_data'/file_of(xrv, DENSE)
    ours, downloaded = (dicom_learner(dls, f'xrv:{DENSE}', pretrained=o) for o in (weights, True))
    x = torch.rand(2, 1, 64, 64)
    want = learn.model.features(2048*x-1024)
    for o in ours, downloaded:
        torch.testing.assert_close(o.model.eval().features((x-.5)*2048), want)
        assert o.model.classifier.out_features == 2 and [len(g) for g in o.splitter(o.model)][1] == 2
    random = dicom_learner(dls, f'xrv:{DENSE}')
    assert not torch.equal(random.model.features.conv0.weight, ours.model.features.conv0.weight)
    ours.freeze()
    with ours.no_bar(): ours.fit(1, 1e-3)
    save_model(ours, tmp_path/'m.safetensors')
    monkeypatch.setattr(chest, 'find_spec', lambda name: None)
    again = load_model(tmp_path/'m.safetensors')
    with torch.no_grad(): torch.testing.assert_close(again.model(x), ours.model.eval()(x))
    assert again.dls.setup.method == 'crop' and again.network == ours.network

@pytest.mark.parametrize('name, told', [('xrv:resnet50', 'did you mean resnet50-res512-all'), ('xrv:', 'did you mean')])
def test_no_such_network_to_go_on_with(name, told):
    from dicomcam.networks import build_model
    with pytest.raises(ValueError, match=told): build_model(name, 2)

def test_films_that_it_knows(learn):
    "A node answers these alone: frontal chest films"
    def is_other(**header):
        ds = pydicom.Dataset()
        for key, value in header.items(): setattr(ds, key, value)
        return other_kind(ds, learn.dls.setup.films)
    assert not is_other(Modality='CR') and not is_other(Modality='DX', BodyPartExamined='CHEST', ViewPosition='PA')
    assert all(is_other(**dict(Modality='CR')|more) for more in (dict(Modality='CT'), dict(BodyPartExamined='KNEE'), dict(ViewPosition='LL')))

def test_random_weights_need_no_torchxrayvision(monkeypatch):
    from dicomcam.networks import build_model
    monkeypatch.setattr(chest, 'find_spec', lambda name: None)
    assert build_model(f'xrv:{DENSE}', 3)(torch.zeros(2, 1, 64, 64)).shape == (2, 3)
    with pytest.raises(ImportError, match='dicomcam.xrv'): build_model(f'xrv:{DENSE}', 3, pretrained=True)
