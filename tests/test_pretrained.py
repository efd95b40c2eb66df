"""Networks that were trained before: their weights untouched, what they want to see done once and kept in the model file, and nothing
downloaded that was not asked for."""
import json, os, shutil, socket
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastai.vision.models.xresnet import xresnet50
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dicomcam.gradcam import gradcam
from dicomcam.networks import Network, build_model, two_groups, can_download
from dicomcam.train import default_recipe, dicom_dls, dicom_learner, few_films, full_recipe, load_model, save_model, train_learner
from tiny import make_tiny

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

# --- training ---

def test_which_recipe(monkeypatch):
    "What a person names is kept; an architecture alone begins with random weights; nobody asks the network without need"
    def no(name): pytest.fail('asked')
    monkeypatch.setattr('dicomcam.training.can_download', no)
    assert full_recipe(arch='resnet18')['arch'] == 'resnet18' and 'pretrained' not in full_recipe(arch='resnet18')
    assert full_recipe(pretrained=False) == {**default_recipe(False), 'pretrained': False}
    assert full_recipe(pretrained='w.pth')['arch'] == LITE and full_recipe(pretrained='w.pth', arch='resnet18')['arch'] == 'resnet18'
    monkeypatch.setattr('dicomcam.training.can_download', lambda name: True)
    assert default_recipe() == default_recipe(True)
    monkeypatch.setattr('dicomcam.training.can_download', lambda name: False)
    with pytest.warns(UserWarning, match='No pretrained weights at hand.*--pretrained FILE') as said: assert default_recipe() == default_recipe(False)
    assert len(said) == 1 and '\n' not in str(said[0].message)

def test_can_download(monkeypatch):
    "None without timm, none without a network, and no error"
    monkeypatch.setattr('dicomcam.networks._check_reach', lambda name: None)
    assert can_download('no such network') is False
    def no(name): raise OSError('no network')
    monkeypatch.setattr('dicomcam.networks._check_reach', no)
    assert can_download(LITE) is False

def tiny_in_groups(dls, *args, pretrained=None, **kw):
    learn = make_tiny(dls)
    learn.splitter, learn.opt_func = two_groups, Adam
    return learn

RECIPE = dict(arch='xresnet18', size=32, bs=8, epochs=3, lr=1e-2)
PACES = dict(flat_cos=dict(schedule='flat_cos', ratio=10), one_cycle=dict(schedule='one_cycle'), fine_tune=dict(schedule='fine_tune', ratio=100, frozen=2))

@pytest.fixture
def tiny_pace(monkeypatch): monkeypatch.setattr('dicomcam.training.dicom_learner', tiny_in_groups)

class Break(Callback):
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 1: raise KeyboardInterrupt

def same(a, b): return all(torch.equal(v, w) for v, w in zip(a.model.state_dict().values(), b.model.state_dict().values()))

@pytest.mark.parametrize('pace', PACES)
@pytest.mark.parametrize('epoch', [1, 2])
def test_any_schedule_goes_on(folder, tmp_path, monkeypatch, tiny_pace, pace, epoch):
    "To the last bit, before and after the body is thawed"
    def broken(*args, **kw):
        learn = tiny_in_groups(*args, **kw)
        learn.add_cb(Break(epoch))
        return learn
    args = dict(RECIPE, checkpoint=tmp_path/'state.pt', **PACES[pace])
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('dicomcam.training.dicom_learner', broken)
        train_learner(folder, **args)
    rest, unbroken = train_learner(folder, resume=True, **args), train_learner(folder, **RECIPE, **PACES[pace])
    assert same(rest, unbroken) and rest.recorder.lrs == unbroken.recorder.lrs and rest.recorder.losses == unbroken.recorder.losses

def test_another_recipe_does_not_go_on(folder, tmp_path, tiny_pace):
    for name in 'w', 'other': (tmp_path/name).write_text(name)
    args = dict(RECIPE, schedule='fine_tune', frozen=2, pretrained=tmp_path/'w', checkpoint=tmp_path/'state.pt')
    train_learner(folder, **args)
    for change in dict(schedule='one_cycle'), dict(ratio=3.), dict(frozen=1), dict(wd=.1), dict(kept=8), dict(augment=False), dict(pretrained=tmp_path/'other'), dict(pretrained=False):
        key = dict(augment='augmentation').get(next(iter(change)), next(iter(change)))
        with pytest.raises(ValueError, match=f'a checkpoint of .*{key}') as e: train_learner(folder, resume=True, **{**args, **change})
        one_line(e)
    (tmp_path/'w').rename(tmp_path/'moved') # the same weights elsewhere
    train_learner(folder, resume=True, **{**args, 'pretrained': tmp_path/'moved'})

def test_the_front_stays_as_it_is(timm, drawn_weights, folder):
    "Weights and batch norms of the layers up to a stride of 4; the rest learns"
    args = dict(arch=LITE, pretrained=drawn_weights, size=32, bs=8, epochs=1, lr=1e-2)
    before = load_file(drawn_weights)
    after = train_learner(folder, **args).model.state_dict()
    changed = {name for name, w in after.items() if not name.startswith('classifier') and not torch.equal(w.cpu(), before[name])}
    front = 'conv_stem', 'bn1', 'blocks.0.', 'blocks.1.'
    assert changed and not any(name.startswith(front) for name in changed)
    assert any(name.startswith('blocks.2.') and name.endswith('running_mean') for name in changed)
    learn = train_learner(folder, fit=False, **{**args, 'kept': 0})
    assert all(w.requires_grad for w in learn.model.parameters())

def test_fine_tuning_is_fastais(folder, tiny_pace):
    ours = train_learner(folder, **RECIPE, schedule='fine_tune', ratio=100, frozen=1)
    theirs = train_learner(folder, fit=False, **RECIPE)
    with theirs.no_bar(), theirs.no_logging(): theirs.fine_tune(2, RECIPE['lr'], freeze_epochs=1)
    for a, b in zip(ours.model.state_dict().values(), theirs.model.state_dict().values()): assert torch.allclose(a, b, atol=1e-5)

def test_only_the_head_learns_at_first(folder, tiny_pace):
    start = train_learner(folder, fit=False, **RECIPE).model.state_dict()
    frozen = {name: w.clone() for name, w in start.items()}
    seen = []
    class Look(Callback):
        order = 99
        def after_epoch(self): seen.append({name: torch.equal(w, frozen[name]) for name, w in self.model.state_dict().items()})
    def watched(*args, **kw):
        learn = tiny_in_groups(*args, **kw)
        learn.add_cb(Look())
        return learn
    with pytest.MonkeyPatch.context() as m:
        m.setattr('dicomcam.training.dicom_learner', watched)
        train_learner(folder, **RECIPE, schedule='fine_tune', ratio=100, frozen=2)
    conv, head = '0.0.weight', '11.weight'
    assert [o[conv] for o in seen] == [True, True, False] and not any(o[head] for o in seen)

@pytest.mark.parametrize('pace, says', [(dict(schedule='x'), "No schedule 'x'; there are flat_cos"), (dict(schedule='fine_tune', frozen=3), 'frozen=3 of 3 epochs'),
                                        (dict(ratio=0), 'ratio=0')])
def test_paces_that_are_none(folder, tiny_pace, pace, says):
    with pytest.raises(ValueError) as e: train_learner(folder, **RECIPE, **pace)
    one_line(e, says)

def test_an_optimizer_by_its_name(dls):
    assert dicom_learner(dls, 'xresnet18', opt_func='adamw').opt_func is Adam
    with pytest.raises(ValueError, match="No optimizer 'x'; there are ranger, adamw"): dicom_learner(dls, 'xresnet18', opt_func='x')

def test_few_films(dls): assert few_films(dls).startswith(f'{len(dls.train_ds)} films to train on: below a few hundred')

# --- commands ---

def run(*args):
    from click.testing import CliRunner
    from dicomcam.cli import main
    return CliRunner().invoke(main, [*map(str, args)])

def test_what_train_takes_for_weights(folder, monkeypatch, tmp_path):
    asked = []
    def stop(*args, **kw): asked.append(kw.get('pretrained')); raise ValueError('enough')
    monkeypatch.setattr('dicomcam.training.train_learner', stop)
    out = ('--out', tmp_path/'m')
    for args in ([folder, '--pretrained'], [folder, '--pretrained', 'w.pth'], [folder, '--pretrained', 'none'], ['--pretrained=w.pth', folder], [folder, '--arch', 'x']):
        assert run('train', *args, *out).exit_code == 2
    assert asked == [True, 'w.pth', False, 'w.pth', None]

def test_train_does_not_write_over_its_weights(folder, drawn_weights):
    before = drawn_weights.read_bytes()
    r = run('train', folder, '--pretrained', drawn_weights, '--out', drawn_weights, '--force')
    assert r.exit_code == 2 and 'is what the command reads' in r.output and drawn_weights.read_bytes() == before

def trained_and_explained(folder, weights, tmp_path):
    out = tmp_path/'m.safetensors'
    args = 'train', folder, '--pretrained', weights, '--arch', LITE, '--size', 64, '--epochs', 1, '--bs', 8, '--out', out
    r = run(*args, '--checkpoint', tmp_path/'state.pt')
    assert r.exit_code == 0 and 'from pretrained weights' in r.output and 'films to train on' in r.output, r.output
    again = run(*args[:-1], tmp_path/'again', '--checkpoint', tmp_path/'state.pt', '--resume')
    assert again.exit_code == 0 and (tmp_path/'again').read_bytes() == out.read_bytes(), again.output
    assert words(out)['inputs'] == dict(mean=[.5]*3, std=[.5]*3)
    r = run('explain', out, *sorted(Path(folder).rglob('*.dcm'))[:3], '--out', tmp_path/'maps')
    assert r.exit_code == 0 and (tmp_path/'maps/heatmaps.csv').is_file() and len([*(tmp_path/'maps').rglob('*.png')]) >= 3, r.output

def test_train_and_explain(timm, drawn_weights, folder, tmp_path): trained_and_explained(folder, drawn_weights, tmp_path)

def test_train_and_explain_real_films(timm, real_weights, xrays, tmp_path):
    "Forty films, the real weights, the real commands"
    table = pd.read_csv(xrays/'labels.csv').groupby('label').head(20)
    for file in table.file:
        (tmp_path/'films'/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(xrays/file, tmp_path/'films'/file)
    table.to_csv(tmp_path/'films/labels.csv', index=False)
    trained_and_explained(tmp_path/'films', real_weights, tmp_path)
