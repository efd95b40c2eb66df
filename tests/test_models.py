"Model files and checkpoints of strangers: refused in one line, before anything is built, whatever they claim."
import ast, copy, json, random, shutil, subprocess, sys, zipfile
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.layers import Mish
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import set_seed
from fastai.vision.models.xresnet import xresnet18
from safetensors.torch import save_file

from dicomcam.networks import ranger
from dicomcam.train import Checkpoint, XrayTfm, dicom_dls, dicom_learner, label_table, load_model, save_model, train_learner
from tiny import make_tiny

WORDS = dict(arch='xresnet18', act_cls='Mish', sa=True, size=32, method='pad', vocab=['a', 'b'], multi=False,
             split=dict(by='PatientID', valid_pct=.2, seed=42, fold=None), pixels=dict(rule='dicom_pixels', channels=1, levels=65536))

@pytest.fixture(scope='module')
def weights():
    set_seed(0)
    return xresnet18(c_in=1, n_out=2, act_cls=Mish, sa=True).state_dict()

NONE = {'x': torch.zeros(1)} # where the words are refused, nothing is asked of the tensors

def write(fn, weights, words):
    save_file(weights, fn, metadata={'dicomcam': words if isinstance(words, str) else json.dumps(words)})
    return fn

def refused(fn, *says):
    with pytest.raises(ValueError) as e: load_model(fn)
    line = str(e.value)
    assert line.startswith(f'{fn}: not a model that dicomcam saved (') and len(line.splitlines()) == 1 and len(line) < 600, line
    assert all(o in line for o in says), line

def test_a_good_file_loads(weights, tmp_path): assert load_model(write(tmp_path/'m', weights, WORDS)).network.arch == 'xresnet18'

@pytest.mark.parametrize('key, value', [
    ('arch', None), ('arch', 18), ('arch', ['xresnet18']), ('arch', 'resnet18.hf-hub'), ('arch', 'hf-hub:timm/resnet18.a1_in1k'), ('arch', 'hf_hub:a/b'),
    ('arch', 'local-dir:/'), ('arch', '../resnet18'), ('arch', 'resnet18.nonsense'), ('arch', 'resnet18.'), ('arch', ''), ('arch', '__init__'),
    ('act_cls', 'system'), ('act_cls', ['Mish']), ('act_cls', None),
    ('sa', 'x'), ('sa', 1), ('sa', None),
    ('size', 0), ('size', 1), ('size', 2), ('size', -64), ('size', 30_000), ('size', 10**9), ('size', '64'), ('size', 64.), ('size', True), ('size', None), ('size', [64, 64]),
    ('size', float('nan')), ('method', 'cut'), ('method', 1), ('method', {}),
    ('vocab', []), ('vocab', ['a']), ('vocab', [1, 2]), ('vocab', [False, True]), ('vocab', ['a', 'a']), ('vocab', 'ab'), ('vocab', {'a': 0, 'b': 1}),
    ('vocab', None), ('vocab', [['a'], ['b']]), ('vocab', ['a', None]), ('vocab', ['', 'a']), ('vocab', ['a', 'a ']), ('vocab', ['a', 'b'*201]),
    ('multi', 'no'), ('multi', 0), ('multi', None),
    ('split', None), ('split', {}), ('split', []), ('split', dict(WORDS['split'], by=1)), ('split', dict(WORDS['split'], valid_pct=2.)),
    ('split', dict(WORDS['split'], seed='x')), ('split', dict(WORDS['split'], other=1)), ('split', dict(WORDS['split'], valid_pct=float('nan'))),
    ('pixels', None), ('pixels', dict(rule='other', channels=1, levels=65536)), ('pixels', dict(rule='dicom_pixels', channels=3, levels=65536))])
def test_words_that_are_not_what_they_may_be(tmp_path, monkeypatch, key, value):
    monkeypatch.setattr('dicomcam.models.dicom_learner', lambda *a, **k: pytest.fail('built'))
    monkeypatch.setattr('dicomcam.models._empty_dls', lambda *a, **k: pytest.fail('built'))
    refused(write(tmp_path/'m', NONE, {**WORDS, key: value}), 'o architecture' if key == 'arch' and isinstance(value, str) else f'{key} is ')

@pytest.mark.parametrize('key', list(WORDS))
def test_a_word_that_is_not_there(tmp_path, key):
    refused(write(tmp_path/'m', NONE, {k: v for k, v in WORDS.items() if k != key}), f'does not say {key}')

@pytest.mark.parametrize('words', ['', 'null', '[]', '3', '"x"', '{', '['*100_000, '{"size": ' + '9'*10_000 + '}', '\x00', '{"a":'*50_000])
def test_words_that_are_no_json_object(tmp_path, words): refused(write(tmp_path/'m', NONE, words))

def test_a_file_without_our_words(tmp_path):
    save_file(NONE, tmp_path/'m'); refused(tmp_path/'m')
    save_file(NONE, tmp_path/'m', metadata={'other': 'x'}); refused(tmp_path/'m')

@pytest.mark.parametrize('spoil, says', [
    (lambda w: w.pop('0.0.weight'), '0.0.weight'),
    (lambda w: w.update({'more\x1b[31m\n': torch.zeros(3)}), r'more\x1b[31m\n'),
    (lambda w: w.update({'m'*9999: torch.zeros(3)}), 'mmm'),
    (lambda w: w.update({'0.0.weight': torch.zeros(32, 3, 3, 3)}), '[32, 3, 3, 3]'),
    (lambda w: w.update({'0.0.weight': w['0.0.weight'].long()}), '0.0.weight'),
    (lambda w: w.update({'0.0.weight': torch.zeros([1]*5000)}), '0.0.weight'),
    (lambda w: w.update({'0.1.num_batches_tracked': torch.tensor(1.)}), 'num_batches_tracked'),
    (lambda w: w['0.0.weight'].fill_(torch.nan), '0.0.weight holds NaN'),
    (lambda w: w['0.1.running_var'].fill_(torch.inf), '0.1.running_var holds NaN or infinity'),
])
def test_tensors_of_another_network(weights, tmp_path, spoil, says):
    weights = {name: w.clone() for name, w in weights.items()}
    spoil(weights)
    refused(write(tmp_path/'m', weights, WORDS), says)

def test_classes_against_the_tensors(weights, tmp_path):
    refused(write(tmp_path/'m', weights, {**WORDS, 'vocab': [*'abc']}), '11.weight', '[2, 512]', '[3, 512]')

def test_size_against_the_network(tmp_path):
    timm = pytest.importorskip('timm', reason='the [timm] extra is not installed')
    vit = timm.create_model('vit_tiny_patch16_224', in_chans=1, num_classes=2)
    words = {**WORDS, 'arch': 'vit_tiny_patch16_224', 'size': vit.pretrained_cfg['input_size'][-1]}
    assert load_model(write(tmp_path/'m', vit.state_dict(), words)).dls.setup.size == words['size']
    refused(write(tmp_path/'m', vit.state_dict(), {**words, 'size': 64}), "'pos_embed' is [1, 197, 192] in the file, [1, 17, 192] in vit_tiny_patch16_224")
    refused(write(tmp_path/'m', NONE, {**words, 'arch': 'levit_128s', 'size': 64}), 'levit_128s takes no images of 64 pixels; it is made for 224.')

def test_half_the_digits_are_enough(weights, tmp_path):
    halves = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    assert next(load_model(write(tmp_path/'m', halves, WORDS)).model.parameters()).dtype == torch.float32

def test_classes_in_another_order(learn_ab, tmp_path):
    fn, dls = learn_ab
    assert list(load_model(fn, dls).dls.vocab) == list(dls.vocab)
    words = {**WORDS, 'vocab': [*dls.vocab][::-1]}
    set_seed(0)
    swapped = write(tmp_path/'m', xresnet18(c_in=1, n_out=2, act_cls=Mish, sa=True).state_dict(), words)
    with pytest.raises(ValueError, match='its classes are .* those of the dataloaders'): load_model(swapped, dls)

@pytest.fixture(scope='module')
def learn_ab(folder, tmp_path_factory):
    dls = dicom_dls(folder, size=32)
    return save_model(dicom_learner(dls, xresnet18), tmp_path_factory.mktemp('ab')/'m'), dls

def test_what_diverged_is_not_saved(learn_ab, tmp_path):
    learn = dicom_learner(learn_ab[1], xresnet18)
    learn.model[-1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match='not saved: 11.bias holds NaN'): save_model(learn, tmp_path/'m')
    assert not list(tmp_path.iterdir())

# --- bombs, each in a process of its own: what it costs beyond a good file ---

COST = '''import resource, sys, time, os
os.environ['HF_HUB_OFFLINE'] = '1'
import socket
def no(*a, **kw): print('NETWORK'); raise OSError('no network here')
socket.socket.connect = socket.getaddrinfo = no
from dicomcam.models import load_model
try: import timm
except ImportError: pass
for fn in sys.argv[1:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try: load_model(fn); says = ''
    except ValueError as e: says = str(e)
    print((round(time.process_time()-start, 2), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024, says))'''

def raw(fn, tensors, words, pad=b''):
    "A safetensors file of zeros by hand, of which the tensors may claim anything"
    at, header = 0, {'__metadata__': {'dicomcam': json.dumps(words)}}
    for name, (dtype, shape, n) in tensors.items():
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at+n])
        at += n
    text = json.dumps(header).encode()
    fn.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(at) + pad)

@pytest.mark.posix
def test_bombs_cost_little(weights, tmp_path):
    names = lambda n: [f'{i:x}' for i in range(n)]
    files = {o: tmp_path/o for o in ('million', 'many', 'gigantic', 'header', 'endless', 'tensors', 'claims')}
    write(files['million'], NONE, {**WORDS, 'vocab': names(1_000_000)})
    write(files['many'], NONE, {**WORDS, 'vocab': names(300_000)}) # within the limit of the header
    write(files['gigantic'], weights, {**WORDS, 'arch': 'vit_gigantic_patch14_224'})
    files['header'].write_bytes((99*10**6).to_bytes(8, 'little') + b'{' + b' '*99*10**6)
    files['endless'].write_bytes((2**63).to_bytes(8, 'little') + b'{}')
    raw(files['tensors'], {f'{i}': ('F32', [0], 0) for i in range(50_000)}, WORDS)
    raw(files['claims'], {'0.0.weight': ('F32', [2**40], 16)}, WORDS)
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', COST, *map(str, files.values())], capture_output=True, text=True)
    assert r.returncode == 0 and 'NETWORK' not in r.stdout, r.stderr[-2000:]
    for name, line in zip(files, r.stdout.splitlines(), strict=True):
        seconds, megabytes, says = ast.literal_eval(line)
        assert says and '\n' not in says and seconds < 5 and megabytes < 500, (name, line[:300])

# --- checkpoints: which training is it? ---

def fit(learn, fn, epochs=1, resume=False, **recipe):
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(epochs, 1e-3, cbs=Checkpoint(fn, resume, recipe))
    return learn

def tiny(folder, **kw): return make_tiny(dicom_dls(folder, **{**dict(size=32, bs=8), **kw}))

@pytest.fixture(scope='module')
def checkpoint(folder, tmp_path_factory):
    fn = tmp_path_factory.mktemp('checkpoint')/'state.pt'
    fit(tiny(folder), fn, lr=.1)
    return fn

def other(folder, **change):
    "The labels of `folder`, otherwise"
    return pd.read_csv(folder/'labels.csv').assign(**change)

def flipped(df): return df.label[::-1].tolist()

@pytest.mark.parametrize('says, args, epochs, lr', [
    ('of 1 epochs, not of 2', {}, 2, .1),
    ('of lr 0.1, not 0.2', {}, 1, .2),
    ('of seed 42, not 7', dict(seed=7), 1, .1),
    ('of bs 8, not 4', dict(bs=4), 1, .1),
    ('of size 32, not 64', dict(size=64), 1, .1),
    ('of method "pad", not "crop"', dict(method='crop'), 1, .1),
    ('of valid_pct 0.2, not 0.4', dict(valid_pct=.4), 1, .1),
    ('of augmentation {', dict(batch_tfms=[]), 1, .1),
    ('of augmentation {', dict(batch_tfms=XrayTfm(max_rotate=8.)), 1, .1),
    ('of other labels', dict(labels=lambda f: other(f, label=flipped)), 1, .1),
    ('of vocab ["No Pneumothorax", "Pneumothorax"], not ["a", "b"]', dict(labels=lambda f: other(f, label=['a', 'b']*15)), 1, .1),
    ('of another split', dict(labels=lambda f: other(f, is_valid=lambda df: df.label.duplicated()), by=None), 1, .1),
    ('of other files', dict(labels=lambda f: other(f)[::-1]), 1, .1)])
@pytest.mark.filterwarnings('ignore:Split by image')
def test_a_checkpoint_of_another_training(folder, checkpoint, says, args, epochs, lr):
    args = {key: value(folder) if callable(value) and key == 'labels' else value for key, value in args.items()}
    with pytest.raises(ValueError) as e: Checkpoint(checkpoint, True, dict(lr=lr)).check(tiny(folder, **args), epochs)
    line = str(e.value)
    assert line.startswith(f'{checkpoint}: a checkpoint of ') and says in line and '\n' not in line and len(line) < 1000

def test_a_checkpoint_of_another_network_optimizer_or_loss(folder, checkpoint):
    def refused(says, learn):
        with pytest.raises(ValueError, match=says): Checkpoint(checkpoint, True, dict(lr=.1)).check(learn, 1)
    wide = tiny(folder); wide.model[-1] = torch.nn.Linear(16, 3); refused('of another network', wide)
    sgd = tiny(folder); sgd.opt_func = SGD; refused('of opt "ranger", not "SGD"', sgd)
    loss = tiny(folder); loss.loss_func = type(loss.loss_func)(weight=torch.tensor([1., 2.])); refused('of loss ', loss)

def test_a_film_of_the_same_name_and_length(folder, checkpoint, tmp_path):
    "Other patients behind the same names: only the headers tell"
    copy = shutil.copytree(folder, tmp_path/'copy')
    film = label_table(copy).file[0]
    data = film.read_bytes()
    film.write_bytes(data.replace(b'1.2.826', b'1.2.827'))
    assert film.stat().st_size == len(data) and film.read_bytes() != data
    with pytest.raises(ValueError, match='a checkpoint of other files. Ask'): Checkpoint(checkpoint, True, dict(lr=.1)).check(tiny(copy), 1)

def test_a_film_with_other_pixels(folder, checkpoint, tmp_path):
    "The same header and length, but not the same picture"
    copy = shutil.copytree(folder, tmp_path/'copy')
    film = label_table(copy).file[0]
    data = bytearray(film.read_bytes())
    data[-5] ^= 255
    film.write_bytes(data)
    with pytest.raises(ValueError, match='a checkpoint of other files'): Checkpoint(checkpoint, True, dict(lr=.1)).check(tiny(copy), 1)

def test_a_split_without_a_seed_is_saved(folder, tmp_path):
    learn = make_tiny(dicom_dls(folder, size=64, seed=None))
    learn.network.arch = 'xresnet18'
    learn.model = dicom_learner(learn.dls, 'xresnet18').model
    learn.network.act_cls, learn.network.sa = 'Mish', True
    save_model(learn, tmp_path/'m.safetensors')
    assert load_model(tmp_path/'m.safetensors').dls.setup.split['seed'] is None

def test_data_that_moved_are_the_same(folder, checkpoint, tmp_path, monkeypatch):
    moved = shutil.copytree(folder, tmp_path/'moved')
    Checkpoint(checkpoint, True, dict(lr=.1)).check(tiny(moved), 1)
    monkeypatch.chdir(tmp_path)
    Checkpoint(checkpoint, True, dict(lr=.1)).check(tiny('moved'), 1)

def test_a_checkpoint_tells_nobodys_name(folder, checkpoint):
    words = str(torch.load(checkpoint, weights_only=True)['training'])
    table = label_table(folder)
    assert not any(o in words for o in [*table.file.map(lambda o: o.stem), *table.group, str(folder)])

@pytest.mark.parametrize('change', [dict(seed=7), dict(lr=.01), dict(class_weights='balanced')])
def test_training_does_not_go_on_from_another(folder, tmp_path, monkeypatch, change):
    "The patients held back now had been trained on"
    monkeypatch.setattr('dicomcam.training.dicom_learner', lambda dls, *a, **kw: make_tiny(dls))
    args = dict(arch='xresnet18', size=32, bs=8, epochs=1, lr=1e-3, checkpoint=tmp_path/'state.pt')
    train_learner(folder, **args)
    train_learner(folder, resume=True, **args) # the same: nothing left to do
    with pytest.raises(ValueError, match=f'a checkpoint of .*{next(iter(change))}'): train_learner(folder, resume=True, **{**args, **change})

def test_a_checkpoint_of_version_0_2(tmp_path):
    torch.save(dict(epoch=1, epochs=2, model={}, opt={}, recorder={}, rng={}), tmp_path/'old.pt')
    with pytest.raises(ValueError, match='of version 0.2 or before, which does not say what data') as e: Checkpoint(tmp_path/'old.pt', resume=True)
    assert '\n' not in str(e.value)

# --- checkpoints: are the innards sound? ---

class Break(Callback):
    def before_batch(self):
        if self.training and self.epoch == 2: raise KeyboardInterrupt

def line(opt_func=ranger):
    "A learner of one layer and a mark that no weight decay is put on it"
    set_seed(1)
    x = torch.randn(32, 3)
    dls = DataLoaders.from_dsets([*zip(x, x.sum(1))], [*zip(x, x.sum(1))], bs=8, device='cpu')
    return Learner(dls, torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)), MSELossFlat(), opt_func=opt_func)

@pytest.fixture(scope='module')
def broken_off(tmp_path_factory):
    fn, learn = tmp_path_factory.mktemp('line')/'state.pt', line()
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(4, 1e-2, cbs=[Checkpoint(fn), Break()])
    return torch.load(fn, weights_only=True)

def put(*keys):
    "What puts a value at the place in a checkpoint that the keys name; the last is the value"
    def spoil(state):
        for key in keys[:-2]: state = state[key]
        state[keys[-2]] = keys[-1]
    return spoil

def drop(*keys):
    def spoil(state):
        for key in keys[:-1]: state = state[key]
        del state[keys[-1]]
    return spoil

NAN, WEIGHT = float('nan'), '1.weight'
def rng(key, at, value):
    def spoil(state):
        o = [*state['rng'][key]]
        o[at] = value
        state['rng'][key] = tuple(o)
    return spoil

@pytest.mark.parametrize('spoil', [
    *(drop(key) for key in ('epoch', 'training', 'model', 'opt', 'recorder', 'rng')), put('more', 1),
    *(put(key, value) for key in ('epoch', 'training', 'model', 'opt', 'recorder', 'rng') for value in (None, 'x', [], NAN)),
    *(put('epoch', o) for o in (-1, 0, 5, 10**9, True, 1.)), put('training', 'epochs', 4), put('training', 'epochs', '9'*10**6), put('training', 'epochs', [[]]),
    drop('model', WEIGHT), put('model', 'more', torch.zeros(1)), *(put('model', WEIGHT, o) for o in (
        None, [1, 2, 3], torch.zeros(1, 4), torch.zeros(1, 3).double(), torch.full((1, 3), NAN), torch.zeros(1, 3, device='meta'), torch.zeros(1, 3).to_sparse())),
    drop('opt', 'state'), drop('opt', 'hypers'), put('opt', 'state', []), put('opt', 'state', 0, []), put('opt', 'state', 0, None), put('opt', 'hypers', []),
    put('opt', 'hypers', 0, {}), put('opt', 'hypers', 0, 'lr', 'x'), put('opt', 'hypers', 0, 'lr', NAN), put('opt', 'hypers', 0, 'mom', torch.zeros(3)),
    drop('opt', 'count'), put('opt', 'count', 'x'), put('opt', 'count', 10**30), put('opt', 'slow_weights', None), put('opt', 'slow_weights', 0, []),
    put('opt', 'slow_weights', 0, 0, torch.zeros(9)), drop('opt', 'state', 2, 'grad_avg'), put('opt', 'state', 2, 'grad_avg', torch.zeros(9)),
    put('opt', 'state', 2, 'sqr_avg', torch.full((1, 3), NAN)), put('opt', 'state', 2, 'step', 'x'), put('opt', 'state', 2, 'more', 1),
    *(drop('recorder', key) for key in ('values', 'lrs', 'losses', 'iters', 'count', 'val')),
    *(put('recorder', key, value) for key in ('values', 'lrs', 'losses', 'iters', 'count', 'val') for value in (None, 'x', -1, [[[]]], {}, 10**30)),
    put('recorder', 'values', [[1.]]), put('recorder', 'values', [[1., 2.], [1.]]), put('recorder', 'values', 0, 0, 'x'), put('recorder', 'count', 0),
    put('recorder', 'losses', torch.zeros(3)), put('recorder', 'val', torch.zeros(3)),
    *(drop('rng', key) for key in ('python', 'numpy', 'loader', 'torch', 'cuda')),
    *(put('rng', key, value) for key in ('python', 'numpy', 'loader', 'torch') for value in (None, 'x', [], (), 3, torch.zeros(3))),
    rng('python', 1, (1, 2)), rng('python', 0, 9), rng('loader', 1, (-1,)*625), rng('numpy', 2, 10**6), rng('numpy', 2, -5), rng('numpy', 1, [1]),
    put('rng', 'torch', torch.zeros(5056, dtype=torch.uint8)), put('rng', 'cuda', None), put('rng', 'cuda', [torch.zeros(16, dtype=torch.uint8)]*99),
])
def test_innards_that_are_not_sound(broken_off, tmp_path, spoil):
    "One line, before anything of the learner or of the random numbers has changed"
    state, fn, learn = copy.deepcopy(broken_off), tmp_path/'state.pt', line()
    spoil(state)
    torch.save(state, fn)
    weights = {key: value.clone() for key, value in learn.model.state_dict().items()}
    before = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]
    with pytest.raises(ValueError, match='checkpoint') as e: Checkpoint(fn, resume=True).check(learn, 4)
    assert '\n' not in str(e.value) and str(fn) in str(e.value) and len(str(e.value)) < 600
    assert all(torch.equal(value, weights[key]) for key, value in learn.model.state_dict().items())
    assert before == [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]

@pytest.mark.parametrize('opt_func', [ranger, Adam, SGD, lambda params, **kw: OptimWrapper(params, torch.optim.AdamW, **kw)])
@pytest.mark.parametrize('frozen', [False, True])
def test_any_optimizer_goes_on(tmp_path, opt_func, frozen):
    "Of fastai or of PyTorch, with weights that have no memory since they are frozen"
    def run(*cbs):
        learn = line(opt_func)
        learn.model[0].weight.requires_grad_(not frozen)
        with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(4, 1e-2, cbs=cbs)
        return learn
    with pytest.raises(KeyboardInterrupt): run(Checkpoint(tmp_path/'state.pt'), Break())
    rest, unbroken = run(Checkpoint(tmp_path/'state.pt', resume=True)), run()
    assert all(torch.equal(a, b) for a, b in zip(rest.model.state_dict().values(), unbroken.model.state_dict().values()))
    assert rest.recorder.lrs == unbroken.recorder.lrs and rest.recorder.losses == unbroken.recorder.losses

class Greedy:
    def __reduce__(self): return bytearray, (10**10,)

@pytest.mark.parametrize('bomb', ['array', 'deflated', 'words', 'no archive'])
def test_checkpoints_that_unfold(broken_off, tmp_path, bomb):
    "Ten gigabytes for a few hundred bytes"
    fn = tmp_path/'state.pt'
    torch.save({**broken_off, 'versions': Greedy()} if bomb == 'array' else broken_off, tmp_path/'good.pt')
    with zipfile.ZipFile(tmp_path/'good.pt') as old, zipfile.ZipFile(fn, 'w') as new:
        for part in old.infolist():
            data = old.read(part)
            if bomb == 'words' and part.filename.endswith('data.pkl'): data = b'\x80\x02(' + b'N'*5_000_000 + b't.'
            new.writestr(part.filename, data, zipfile.ZIP_DEFLATED if bomb == 'deflated' and '/data/' in part.filename else None)
    if bomb == 'no archive': fn.write_bytes(b'PK\x03\x04 no archive')
    with pytest.raises(ValueError, match='not a checkpoint'): Checkpoint(fn, resume=True)

# --- trainings that must not end as if all were well ---

def quick(monkeypatch): monkeypatch.setattr('dicomcam.training.dicom_learner', lambda dls, *a, **kw: make_tiny(dls))

def test_a_training_that_diverged_is_an_error(folder, monkeypatch):
    quick(monkeypatch)
    with pytest.raises(ValueError, match='^The training diverged.* smaller learning rate than 1e.30'):
        train_learner(folder, arch='xresnet18', size=32, bs=8, epochs=1, lr=1e30)

class Nan(Callback):
    "As where mixed precision leaves out a step: the loss is NaN once, the weights are sound"
    def after_loss(self):
        if self.training and self.iter == 0: self.learn.loss = self.learn.loss*torch.nan # what is shown; not `loss_grad`, of which the step is made

def test_a_loss_that_was_no_number_is_said(folder, monkeypatch):
    def learner(dls, *a, **kw):
        learn = make_tiny(dls)
        learn.add_cb(Nan())
        return learn
    monkeypatch.setattr('dicomcam.training.dicom_learner', learner)
    with pytest.warns(UserWarning, match='loss was not a number'): train_learner(folder, arch='xresnet18', size=32, bs=8, epochs=1, lr=1e-3)

def test_no_batch_is_no_training(folder, monkeypatch):
    "However it comes about that the training side makes no batch"
    def none(dls, *a, **kw):
        dls.train.bs = 1000
        return make_tiny(dls)
    monkeypatch.setattr('dicomcam.training.dicom_learner', none)
    with pytest.raises(ValueError, match='images to train on make no batch of 1000'):
        train_learner(folder, arch='xresnet18', size=32, bs=8, epochs=1, lr=1e-3)

# --- a full disk ---

FULL = '''import sys, warnings
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[3])
from dicomcam.train import Checkpoint, dicom_dls, dicom_learner, save_model
from tiny import make_tiny
dls = dicom_dls(sys.argv[1], size=32, bs=8, cache=False)
learn, large = make_tiny(dls), dicom_learner(dls, 'xresnet18')
full = Path(sys.argv[2])
warnings.simplefilter('always')
with warnings.catch_warnings(record=True) as said, learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoint(full/'state.pt'))
assert not [o for o in said if 'checkpoint' in str(o.message)]
before = torch.load(full/'state.pt', weights_only=True)['epoch']
large.model.train()
with warnings.catch_warnings(record=True) as said, large.no_bar(), large.no_logging(): large.fit(1, cbs=Checkpoint(full/'state.pt'))
print([str(o.message) for o in said if 'the one before it remains' in str(o.message)])
try: save_model(large, full/'m.safetensors')
except OSError as e: print(e)
assert torch.load(full/'state.pt', weights_only=True)['epoch'] == before and [o.name for o in full.iterdir()] == ['state.pt']'''

@pytest.mark.posix
def test_a_full_disk_costs_neither_the_checkpoint_nor_half_a_file(folder, tmp_path):
    "A file system of 4 MB, where model and state of the second network take 20 and more"
    full = tmp_path/'full'
    full.mkdir()
    mount = shutil.which('mount')
    if not mount or subprocess.run([mount, '-t', 'tmpfs', '-o', 'size=4m', 'none', full], capture_output=True).returncode:
        pytest.skip('no file system may be mounted here')
    try: r = subprocess.run([sys.executable, '-W', 'ignore', '-c', FULL, str(folder), str(full), str(Path(__file__).parent)], capture_output=True, text=True)
    finally: subprocess.run(['umount', full], check=True)
    assert r.returncode == 0, r.stdout + r.stderr[-2000:]
    warned, error = r.stdout.splitlines()
    assert 'state.pt: the checkpoint of epoch 0 could not be written (' in warned
    assert error.startswith(f'{full}/m.safetensors: ') and 'No space left' in error
