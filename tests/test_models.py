"Model files and checkpoints of strangers: refused in one line, before anything is built, whatever they claim."
import ast, json, subprocess, sys

import pytest, torch
from fastai.layers import Mish
from fastai.torch_core import set_seed
from fastai.vision.models.xresnet import xresnet18
from safetensors.torch import save_file

from dicomcam.train import dicom_dls, dicom_learner, load_model, save_model

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
    ('vocab', None), ('vocab', [['a'], ['b']]), ('vocab', ['a', None]),
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
    refused(write(tmp_path/'m', vit.state_dict(), {**words, 'size': 64}), 'vit_tiny_patch16_224 takes no images of 64 pixels')

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
