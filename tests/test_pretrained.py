"""Networks that were trained before: their weights untouched, what they want to see done once and kept in the model file, and nothing
downloaded that was not asked for."""
import json, os, socket
from pathlib import Path

import numpy as np, pytest, torch
from fastai.torch_core import set_seed
from fastai.vision.models.xresnet import xresnet50
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dicomcam.gradcam import gradcam
from dicomcam.networks import Network, two_groups, build_model
from dicomcam.train import dicom_dls, dicom_learner, load_model, save_model
from dicomcam.weights import read_weights

LITE = 'tf_efficientnet_lite0'

@pytest.fixture(scope='module')
def timm(): return pytest.importorskip('timm', reason='the [timm] extra is not installed')

@pytest.fixture(scope='module')
def real_weights():
    "ImageNet weights of timm's tf_efficientnet_lite0"
    fn = os.environ.get('DICOMCAM_TEST_WEIGHTS')
    if not fn: pytest.skip('DICOMCAM_TEST_WEIGHTS names no file of weights of tf_efficientnet_lite0')
    return Path(fn)

def drawn(model, seed=0):
    "The weights of `model`, drawn anew with `seed`, batch norms too: none is what a new network begins with"
    g = torch.Generator().manual_seed(seed)
    return {name: (torch.rand(w.shape, generator=g)*.1+(.5 if 'var' in name else -.05)) if w.is_floating_point() else w
            for name, w in model.state_dict().items()}

@pytest.fixture(scope='module')
def drawn_weights(timm, tmp_path_factory):
    "A file of weights as timm keeps them, of numbers that mean nothing"
    fn = tmp_path_factory.mktemp('weights')/'drawn.safetensors'
    save_file(drawn(timm.create_model(LITE)), fn)
    return fn

@pytest.fixture(params=['drawn', 'real'])
def weights(request): return request.getfixturevalue(f'{request.param}_weights')

@pytest.fixture(scope='module')
def dls(folder): return dicom_dls(folder, size=64)

@pytest.fixture
def offline(monkeypatch):
    "Whoever asks for the network fails the test"
    def no(*args, **kw): pytest.fail('the network was asked for')
    for name in 'socket', 'create_connection', 'getaddrinfo': monkeypatch.setattr(socket, name, no)

def as_pth(weights, fn, wrap=lambda o: o):
    torch.save(wrap(load_file(weights)), fn)
    return fn

def one_line(error, *says):
    line = str(error.value)
    assert '\n' not in line and len(line) < 700 and all(o in line for o in says), line

# --- what goes in, and what comes out ---

def test_one_channel_says_what_three_said(timm, weights, dls, offline):
    "The 1000 logits of timm's own network on (x-mean)/std, three times the same"
    ours, theirs = dicom_learner(dls, LITE, pretrained=weights).model.eval().cpu(), timm.create_model(LITE).eval()
    kept = load_file(weights)
    theirs.load_state_dict(kept)
    ours.reset_classifier(1000)
    ours.classifier.load_state_dict({name: kept[f'classifier.{name}'] for name in ('weight', 'bias')})
    x = torch.rand(3, 1, 70, 64)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ('mean', 'std'))
    with torch.no_grad(): assert torch.allclose(ours(x), theirs((x.repeat(1, 3, 1, 1)-mean)/std), atol=1e-6)

@pytest.mark.parametrize('end, wrap', [('pth', dict), ('pt', lambda o: dict(model=o, opt=None)), ('bin', lambda o: dict(epoch=3, state_dict=o)),
                                       ('pth', lambda o: {f'module.{name}': torch.nn.Parameter(w, False) for name, w in o.items()})])
def test_either_kind_of_file(timm, drawn_weights, dls, tmp_path, end, wrap):
    fn = as_pth(drawn_weights, tmp_path/f'w.{end}', wrap)
    a, b = (build_model(LITE, 2, pretrained=o).state_dict() for o in (drawn_weights, fn))
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a if not name.startswith('classifier'))

def test_the_head_is_new_whatever_its_size(timm, drawn_weights, tmp_path):
    "Of a file with other classes, without a head, or with as many classes as ours"
    kept = load_file(drawn_weights)
    body = {name: w for name, w in kept.items() if not name.startswith('classifier')}
    five = dict(zip(('classifier.weight', 'classifier.bias'), (torch.ones(5, 1280), torch.ones(5))))
    for i, other in enumerate((body, body|five, kept)):
        save_file(other, tmp_path/f'{i}.safetensors')
        model = build_model(LITE, 5, pretrained=tmp_path/f'{i}.safetensors')
        assert model.classifier.out_features == 5 and not torch.equal(model.classifier.weight, torch.ones(5, 1280))
        assert torch.equal(model.conv_stem.weight, kept['conv_stem.weight'])
        assert 'state_dict' not in model.pretrained_cfg # no second copy of the weights

def test_an_xresnet(dls, tmp_path, offline):
    set_seed(0)
    theirs = xresnet50(n_out=10).eval()
    torch.save(dict(model=theirs.state_dict()), tmp_path/'x.pth')
    ours = dicom_learner(dls, xresnet50, torch.nn.ReLU, sa=False, pretrained=tmp_path/'x.pth').model.eval().cpu()
    x, body = torch.rand(2, 1, 64, 64), lambda m, x: torch.nn.Sequential(*[*m][:-1])(x)
    mean, std = torch.tensor([.485, .456, .406])[:, None, None], torch.tensor([.229, .224, .225])[:, None, None]
    ours[-1] = theirs[-1]
    with torch.no_grad(): assert torch.allclose(ours(x), theirs((x.repeat(1, 3, 1, 1)-mean)/std), atol=1e-6)

def test_the_pipeline_changes_no_grey_level(timm, drawn_weights, dls):
    "What the weights want to see is done in the network, and nowhere else"
    learn = dicom_learner(dls, LITE, pretrained=drawn_weights)
    seen = []
    learn.model.conv_stem.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x, _ = learn.dls.valid.one_batch()
    learn.model.eval()(x)
    assert 'Normalize' not in str(learn.dls.after_batch) and x.shape[1] == 1 and 0 <= x.min() and x.max() <= 1
    assert torch.equal(seen[0].as_subclass(torch.Tensor), ((x.repeat(1, 3, 1, 1)-.5)/.5).as_subclass(torch.Tensor))

# --- the model file ---

def words(fn):
    with safe_open(fn, 'pt') as f: return json.loads(f.metadata()['dicomcam'])

def test_the_model_file_gives_the_same_numbers(timm, weights, dls, tmp_path, offline):
    learn = dicom_learner(dls, LITE, pretrained=weights)
    learn.model.eval()
    fn = save_model(learn, tmp_path/'m.safetensors')
    new, file = load_model(fn), dls.valid.items[0]
    assert words(fn)['inputs'] == dict(mean=[.5]*3, std=[.5]*3) and new.network == learn.network
    assert torch.equal(new.predict(file)[2], learn.predict(file)[2])
    a, b = (gradcam(o, file) for o in (learn, new))
    assert a.layers == b.layers and torch.equal(a.maps, b.maps)
    again = save_model(new, tmp_path/'again.safetensors')
    assert words(again) == words(fn) and [*load_file(again)] == [*load_file(fn)]
    assert set(load_file(fn)) == set(load_file(weights)) # timm's own names, and no more

def test_a_file_of_random_weights_has_no_new_word(dls, tmp_path):
    assert not {'inputs', 'heatmap'} & set(words(save_model(dicom_learner(dls, 'xresnet18'), tmp_path/'m')))

def test_the_choice_of_heatmap_is_kept(dls, tmp_path):
    learn = dicom_learner(dls, 'xresnet18')
    assert learn.choice is None
    learn.choice = dict(layer='7', method='gradcam', reason='hits 0.44 of 39 lesions of the training side')
    new = load_model(save_model(learn, tmp_path/'m'))
    assert new.choice == learn.choice == words(tmp_path/'m')['heatmap']
    learn.choice = dict(layer=7, method='gradcam', reason='')
    with pytest.raises(ValueError, match='heatmap is .*, not layer, method and reason'): save_model(learn, tmp_path/'m')

@pytest.mark.parametrize('key, value', [
    *(('inputs', o) for o in (None, [], 'x', {}, dict(mean=[.5]), dict(mean=[.5], std=[.5], more=1), dict(mean=[.5]*3, std=[.5]), dict(mean=[.5]*2, std=[.5]*2),
        dict(mean=[], std=[]), dict(mean=[0], std=[1]), dict(mean=[.5], std=[0.]), dict(mean=[.5], std=[-1.]), dict(mean=[float('nan')], std=[1.]),
        dict(mean=[.5], std=[float('inf')]), dict(mean=[1e30], std=[1.]), dict(mean='abc', std='abc'), dict(mean=[.5]*1000, std=[.5]*1000))),
    *(('heatmap', o) for o in (None, [], 'x', {}, dict(layer='a', method='b'), dict(layer='a', method='b', reason='c', more='d'),
        dict(layer=1, method='b', reason='c'), dict(layer='', method='b', reason='c'), dict(layer='a', method='b', reason='c'*401)))])
def test_new_words_are_checked(dls, tmp_path, key, value):
    "Before anything is asked of the tensors"
    good = {**Network('xresnet18', 'Mish', True).words(), **dls.setup.meta()}
    save_file(dict(x=torch.zeros(1)), tmp_path/'bad', metadata=dict(dicomcam=json.dumps({**good, key: value})))
    with pytest.raises(ValueError) as e: load_model(tmp_path/'bad')
    one_line(e, 'not a model that dicomcam saved', f'{key} is ')

def test_inputs_against_the_tensors(timm, drawn_weights, dls, tmp_path):
    "Three channels in the words and one in the tensors, and the other way"
    fn = save_model(dicom_learner(dls, LITE, pretrained=drawn_weights), tmp_path/'m')
    for inputs in dict(mean=[.5], std=[.5]), None:
        other = {key: value for key, value in {**words(fn), 'inputs': inputs}.items() if value is not None}
        save_file(load_file(fn), tmp_path/'bad', metadata=dict(dicomcam=json.dumps(other)))
        with pytest.raises(ValueError) as e: load_model(tmp_path/'bad')
        one_line(e, 'conv_stem.weight', '[32, 3, 3, 3]', '[32, 1, 3, 3]')

# --- sizes ---

def test_a_transformer_is_made_for_the_size_of_the_images(timm, dls, tmp_path):
    set_seed(0)
    theirs = timm.create_model('vit_tiny_patch16_224')
    save_file(theirs.state_dict(), tmp_path/'vit.safetensors')
    learn = dicom_learner(dls, 'vit_tiny_patch16_224', pretrained=tmp_path/'vit.safetensors')
    theirs.set_input_size(img_size=(64, 64))
    assert torch.equal(learn.model.pos_embed.cpu(), theirs.pos_embed)
    new, file = load_model(save_model(learn, tmp_path/'m.safetensors')), dls.valid.items[0]
    learn.model.eval()
    assert torch.equal(new.predict(file)[2], learn.predict(file)[2])

def test_a_network_of_one_size_says_so(timm, dls):
    with pytest.raises(ValueError) as e: dicom_learner(dls, 'mixer_b16_224')
    one_line(e, 'mixer_b16_224 takes no images of 64 pixels; it is made for 224.')

# --- groups of layers ---

def test_two_groups_learn_at_their_own_rates(timm, drawn_weights, dls):
    learn = dicom_learner(dls, LITE, pretrained=drawn_weights)
    body, head = two_groups(learn.model)
    assert len(head) == 2 and len(body)+2 == len([*learn.model.parameters()])
    learn.freeze()
    norm, conv = learn.model.bn1.weight, learn.model.conv_stem.weight
    assert norm.requires_grad and not conv.requires_grad # batch norms learn all the same, as fastai has it
    learn.opt.set_hyper('lr', slice(1e-4, 1e-3))
    assert np.allclose([o['lr'] for o in learn.opt.hypers], [1e-4, 1e-3])

@pytest.mark.parametrize('arch', ['resnet10t', 'vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'convnext_atto', 'vgg11'])
def test_the_head_of_any_architecture(timm, arch):
    with torch.device('meta'): model = timm.create_model(arch, num_classes=3)
    body, head = two_groups(model)
    assert {p.shape[0] for p in head} == {3} and not {id(p) for p in body} & {id(p) for p in head}
    assert len(body)+len(head) == len([*model.parameters()])

# --- strangers' files ---

class Evil:
    def __reduce__(self): return print, ('code of a stranger runs',)

class Greedy:
    def __reduce__(self): return bytearray, (10**10,)

def endless():
    o = {}
    o['state_dict'] = o
    return o

@pytest.mark.parametrize('o', [Evil(), dict(model=Evil()), Greedy(), {}, [], 3, None, dict(a=1), dict(model=dict(a=torch.ones(1), b='x')), endless(),
                               dict(a=torch.tensor([1, torch.nan])), 'text', b'', b'PK\x03\x04', 'half', 'safetensors', 'nothing'])
def test_files_that_hold_no_weights(dls, tmp_path, capsys, o):
    fn = tmp_path/'w.pth'
    torch.save(o, fn)
    if isinstance(o, bytes): fn.write_bytes(o)
    if o == 'half':
        torch.save(dict(a=torch.ones(1000)), fn)
        fn.write_bytes(fn.read_bytes()[:2000])
    if o == 'safetensors': fn = fn.rename(tmp_path/'w.safetensors')
    if o == 'nothing': fn = tmp_path/'none.pth'
    error, says = (FileNotFoundError, 'no such file') if o == 'nothing' else (ValueError, 'no weights that can be read')
    with pytest.raises(error) as e: dicom_learner(dls, xresnet50, torch.nn.ReLU, sa=False, pretrained=fn)
    one_line(e, str(fn), says)
    assert 'stranger' not in capsys.readouterr().out

@pytest.mark.parametrize('spoil', [lambda w: w.pop('conv_stem.weight'), lambda w: w.update(more=torch.ones(1)),
                                   lambda w: w.update({'conv_stem.weight': torch.ones(32, 1, 3, 3)}), lambda w: w.update({'a\x1b[31m\n'*999: torch.ones(1)})])
def test_weights_of_another_network(timm, drawn_weights, dls, tmp_path, spoil):
    other = load_file(drawn_weights)
    spoil(other)
    save_file(other, tmp_path/'w.safetensors')
    with pytest.raises(ValueError) as e: dicom_learner(dls, LITE, pretrained=tmp_path/'w.safetensors')
    one_line(e, str(tmp_path), f'not the weights of {LITE}')

def test_other_networks_of_timm_and_fastai(timm, drawn_weights, dls):
    for arch, kw in ('resnet10t', {}), ('vit_tiny_patch16_224', {}), ('convnext_atto', {}), (xresnet50, dict(act_cls=torch.nn.ReLU, sa=False)):
        with pytest.raises(ValueError) as e: dicom_learner(dls, arch, pretrained=drawn_weights, **kw)
        one_line(e, str(drawn_weights), 'not the weights of')

# --- no network ---

def test_offline_is_said_at_once(timm, dls, monkeypatch):
    "One question of three seconds; no download is tried that would try for a minute"
    asked = []
    def get_session():
        class Session:
            def head(self, url, timeout): asked.append(timeout); raise RuntimeError('no way\nout')
        return Session()
    monkeypatch.setattr('huggingface_hub.utils.get_session', get_session)
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *args: None)
    with pytest.raises(ConnectionError) as e: dicom_learner(dls, LITE, pretrained=True)
    one_line(e, 'no way', 'pretrained=FILE', 'pretrained=False')
    assert asked == [3]
