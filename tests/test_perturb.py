"Heatmaps by trial, by captum, smoothed, and by name: each against its formula and against another library"
import math, sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np, pytest, torch
from test_cam import batch, learner, marked, same, state
from test_gradcam import nearly
from test_layouts import Mixed, network, signal_net, volume_net
from tiny import TinyNet
from torch import nn
from torch.nn import functional as F

from dicomcam.attribution import ATTRIBUTIONS, attribute, attribution
from dicomcam.cam import cam
from dicomcam.gradcam import gradcam
from dicomcam.gradients import gradient_x_input, integrated_gradients
from dicomcam.methods import METHODS, cam_method
from dicomcam.perturb import ablationcam, filled, occlusion, scorecam
from dicomcam.smooth import augmented, noisy

GRADIENTS = 'integrated_gradients', 'gradient_x_input'
BY_TRIAL = dict(scorecam=scorecam, ablationcam=ablationcam, occlusion=occlusion)

def small(n_out=3): return TinyNet(n_out, c_in=3)

def head_of(net, layer): return nn.Sequential(*list(net)[int(layer)+1:])

def body_of(net, layer): return nn.Sequential(*list(net)[:int(layer)+1])

def summed(w, a): return torch.einsum('c,c...->...', w, a)

def seen(method):
    "Skip a method of captum where it is not installed"
    if method in GRADIENTS: pytest.importorskip('captum')
    return method

# Score-CAM

def score_by_hand(net, x, a, k):
    "Of one image (c, h, w) and its activation, channel by channel"
    scores = []
    for channel in a:
        mask = F.interpolate(channel[None, None], x.shape[1:], mode='bilinear', align_corners=False)[0]
        span = mask.max()-mask.min()
        mask = (mask-mask.min())/span if span > 0 else 0*mask
        scores.append(net((x*mask)[None])[0, k])
    return summed(torch.stack(scores).softmax(0), a)

@torch.no_grad()
@pytest.mark.parametrize('layer', ['3', '6', '7'])
def test_scorecam_is_its_formula(layer):
    net, x = small().double(), batch(2, size=48).double()
    h = scorecam(net, x, [0, 2], layer, bs=5)
    a = body_of(net, layer)(x)
    for i in range(2):
        for j, k in enumerate([0, 2]): nearly(h.raw[0][i, j], score_by_hand(net, x[i], a[i], k), 2e-6)

def peers_map(extract, x, layer, k):
    "The raw map of pytorch-grad-cam, before ReLU and scaling"
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    extract.activations_and_grads(x)
    a = extract.activations_and_grads.activations[0].numpy()
    return torch.as_tensor(extract.get_cam_image(x, layer, [ClassifierOutputTarget(k)]*len(x), a, None, False))

def test_scorecam_as_pytorch_grad_cam_has_it(monkeypatch):
    "but for the corners, which it aligns as it enlarges a channel"
    peer = pytest.importorskip('pytorch_grad_cam')
    monkeypatch.setattr(torch.nn, 'UpsamplingBilinear2d', partial(nn.Upsample, mode='bilinear', align_corners=False))
    net, x = small(), batch(2, size=48)
    h = scorecam(net, x, layers=['6', '7'])
    for name, raw in zip(h.layers, h.raw):
        for k in range(3):
            with peer.ScoreCAM(net, [net.get_submodule(name)]) as extract: nearly(raw[:, k], peers_map(extract, x, net.get_submodule(name), k), 1e-5)

def fine_net():
    "A layer whose grid is the image, where nothing is enlarged"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()

def test_scorecam_as_torchcam_has_it():
    torchcam = pytest.importorskip('torchcam.methods')
    net, x = fine_net(), batch(2, size=24)
    h = scorecam(net, x, layers='1')
    with torchcam.ScoreCAM(net, '1') as extract:
        for k in range(3): nearly(h.raw[0][:, k].relu(), extract(k, net(x), normalized=False)[0], 1e-5)

# Ablation-CAM

def ablation_by_hand(head, a, k):
    "Of one image's activation (c, *grid), with what comes after the layer"
    y, w = head(a[None])[0, k], []
    for c in range(len(a)):
        without = a.clone()
        without[c] = 0
        w.append((y-head(without[None])[0, k])/y.abs())
    return summed(torch.stack(w), a)

@torch.no_grad()
@pytest.mark.parametrize('make,shape,layer', [(small, (3, 48, 48), '4'), (small, (3, 48, 48), '7'), (volume_net, (1, 8, 12, 10), '3'), (signal_net, (2, 64), '2')])
def test_ablationcam_is_its_formula(make, shape, layer):
    net, x = make().double(), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    h = ablationcam(net, x, [0, 2], layer, bs=5)
    a = body_of(net, layer)(x)
    for i in range(2):
        for j, k in enumerate([0, 2]): nearly(h.raw[0][i, j], ablation_by_hand(head_of(net, layer), a[i], k), 1e-4) # scores are float32

class Joins(nn.Module):
    "A layer, and what came before it, side by side; where `adds`, one on top of the other"
    def __init__(self, adds=False):
        super().__init__()
        self.adds, self.stem, self.layer, self.head = adds, nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 if adds else 16, 3)
    def after(self, s, a): return self.head((s+a if self.adds else torch.cat([s, a], 1)).relu().mean((2, 3)))
    def forward(self, x):
        s = self.stem(x).relu()
        return self.after(s, self.layer(s).relu_())

class Merges(Joins):
    "Rows of one batch in which the second is lost, where the number of rows is not that of the images"
    def after(self, s, a): return self.head((a if len(a) == len(s) else a[:1].expand(len(a), -1, -1, -1)).mean((2, 3)))

@torch.no_grad()
@pytest.mark.parametrize('make,once', [(Joins, False), (partial(Joins, True), True), (partial(Merges, True), False)], ids=['beside', 'on top', 'merged'])
def test_what_comes_before_the_layer_runs_once_where_that_is_right(make, once):
    torch.manual_seed(0)
    net, x, rows = make().eval(), batch(1, size=24), []
    with net.stem.register_forward_pre_hook(lambda m, i: rows.append(len(i[0]))): h = ablationcam(net, x, 1, 'layer')
    assert rows[-1] == (1 if once else 8)
    s = net.stem(x).relu()
    a = net.layer(s)
    nearly(h.raw[0][0, 0], ablation_by_hand(lambda o: net.after(s, o.relu()), a[0], 1), 1e-4)

def test_ablationcam_as_pytorch_grad_cam_has_it():
    "but for the sign, where the score is negative"
    peer = pytest.importorskip('pytorch_grad_cam')
    net, x = small(), batch(2, size=48)
    with torch.no_grad(): sign = net(x).sign()
    assert len(sign.unique()) == 2
    for name in '6', '7':
        h = ablationcam(net, x, layers=name)
        for k in range(3):
            layer = net.get_submodule(name)
            with peer.AblationCAM(net, [layer]) as extract: m = peers_map(extract, x, layer, k)
            nearly(h.raw[0][:, k], m*sign[:, k, None, None], 1e-4)

@torch.no_grad()
def test_a_logit_and_its_opposite_have_opposite_maps():
    for method in ablationcam, occlusion:
        raw, = method(small(1), batch(2, size=32)).raw
        nearly(raw[:, 0], -raw[:, 1], 1e-6)
        assert raw.any()

@torch.no_grad()
def test_a_score_of_zero():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = batch(1, size=16)
    net[4].bias.sub_(net(x)[0])
    assert ablationcam(net, x).raw[0].isfinite().all()

# layouts

@torch.no_grad()
def test_tokens():
    "The channel of a vision transformer's grid is set to zero; the class token keeps its own"
    net, x = network('timm', 'test_vit'), batch(1, size=160)
    name = [n for n, _ in net.named_modules() if n.endswith('norm1')][-1]
    layer = net.get_submodule(name)
    kept = []
    with layer.register_forward_hook(lambda m, i, o: kept.append(o)): y = net(x)[0, 1]
    out, w = kept[0], []
    for c in range(out.shape[2]):
        without = out.clone()
        without[:, 1:, c] = 0
        with layer.register_forward_hook(lambda m, i, o: without): w.append((y-net(x)[0, 1])/y.abs())
    grid = out[0, 1:].T.reshape(-1, 10, 10)
    h = ablationcam(net, x, 1, layer)
    nearly(h.raw[0][0, 0], summed(torch.stack(w), grid), 1e-4)
    nearly(scorecam(net, x, 1, layer).raw[0][0, 0], score_by_hand(net, x[0], grid, 1), 2e-4) # all weights are nearly the same

def test_channels_last_and_functions():
    torch.manual_seed(0)
    net, x = Mixed().eval(), batch(2, size=64)
    for method in scorecam, ablationcam:
        with pytest.raises(ValueError, match='nchw or nhwc'): method(net, x, layers='dense')
        h = method(net, x, layers='dense', layout='nhwc')
        assert torch.equal(method(net, x, layers='dense', layout=lambda t: t.movedim(-1, 1)).raw[0], h.raw[0])
        assert h.raw[0].shape == (2, 3, 8, 8) and h.raw[0].any()
    with pytest.raises(ValueError, match='^layout= makes a copy of the output, in which no channel can be set to zero'):
        ablationcam(net, x, layers='dense', layout=lambda t: t.movedim(-1, 1).clone())

@pytest.mark.parametrize('method', BY_TRIAL.values(), ids=BY_TRIAL)
@pytest.mark.parametrize('make,shape', [(volume_net, (1, 8, 12, 10)), (signal_net, (2, 64))], ids=['volumes', 'signals'])
def test_volumes_and_signals(make, shape, method):
    h = method(make(), torch.randn(2, *shape), 1)
    assert h.raw[0].isfinite().all() and h.heat(0, native=False).shape == shape[1:]

# occlusion

def occlusion_by_hand(score, x, nothing, patch, stride):
    "Of one image (c, h, w)"
    total, n = torch.zeros(x.shape[1:], dtype=x.dtype), torch.zeros(x.shape[1:], dtype=x.dtype)
    for r in range(0, x.shape[1]-patch[0]+stride[0], stride[0]):
        for c in range(0, x.shape[2]-patch[1]+stride[1], stride[1]):
            if r >= x.shape[1] or c >= x.shape[2]: continue
            there = slice(r, r+patch[0]), slice(c, c+patch[1])
            hidden = x.clone()
            hidden[:, *there] = nothing[:, *there]
            total[there] += score(x[None])[0]-score(hidden[None])[0]
            n[there] += 1
    return total/n

@torch.no_grad()
@pytest.mark.parametrize('fill', ['mean', 'blur', 'black', .25])
def test_occlusion_is_its_formula(fill):
    net, x = small().double(), batch(2, size=32)[:, :, :, :29].double()
    h = occlusion(net, x, [0, 2], patch=(9, 6), stride=(4, 6), fill=fill, bs=7)
    assert h.layers == ['input'] and h.raw[0].shape == (2, 2, 32, 29)
    for i in range(2):
        for j, k in enumerate([0, 2]): nearly(h.raw[0][i, j], occlusion_by_hand(lambda o: net(o)[:, k], x[i], filled(x, fill)[i], (9, 6), (4, 6)), 1e-4)

CAPTUM = [(small, (3, 32, 29), (9, 6), (4, 5)), (volume_net, (1, 8, 12, 10), (3, 5, 4), (2, 5, 3)), (signal_net, (2, 64), (10,), (7,))]

@pytest.mark.parametrize('make,shape,patch,stride', CAPTUM, ids=['images', 'volumes', 'signals'])
def test_occlusion_as_captum_has_it(make, shape, patch, stride):
    captum = pytest.importorskip('captum.attr')
    net, x = make(), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for fill in 'mean', 'blur', .5:
        h = occlusion(net, x, patch=patch, stride=stride, fill=fill)
        for k in range(3):
            a = captum.Occlusion(net).attribute(x, (shape[0], *patch), (shape[0], *stride), filled(x, fill), k)
            nearly(h.raw[0][:, k], a[:, 0], 1e-5)

def test_what_takes_the_place_of_an_image():
    x = batch(2, size=32)
    assert filled(x, 'blur').std() < .2*x.std() and filled(torch.ones(1, 1, 9, 3), 'blur').allclose(torch.ones(1))
    assert torch.equal(filled(x, 'black')[0, 1], x[0, 1].min().expand(32, 32)) and filled(x, 2).unique().tolist() == [2]

@pytest.mark.parametrize('kw,why', [(dict(patch=0), 'patch=0: pass a number of pixels, or one for each of 2 axes'), (dict(stride=(2, 2, 2)), 'stride=.2, 2, 2.: '),
    (dict(patch=4, stride=5), 'stride=5 leaves pixels between patches of 4'), (dict(fill='grey'), "No fill 'grey'; there are blur, mean, black"),
    (dict(bs=0), 'bs=0'), (dict(classes=1, target='predicted'), 'Pass classes or a target')])
def test_what_occlusion_does_not_take(kw, why):
    with pytest.raises(ValueError, match=f'^{why}') as e: occlusion(small(), batch(1, size=32), **kw)
    assert '\n' not in str(e.value)

def test_a_patch_larger_than_the_image_hides_it_all():
    net, x = small(), batch(1, size=32)
    with torch.no_grad(): lost = net(x)-net(filled(x, 0))
    nearly(occlusion(net, x, patch=(99, 40), stride=50, fill=0).raw[0], lost[..., None, None].expand(1, 3, 32, 32), 1e-4)

# what is asked

class Parts(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return dict(scores=self.net(x), size=x.shape)

def rivals():
    "A network and images of which it predicts different classes"
    net, x = small(), batch(4, size=32)
    with torch.no_grad():
        net[-1].bias.sub_(net(x).mean(0))
        k = net(x).argmax(1)
    assert len(k.unique()) > 1
    return net, x, k

@pytest.mark.parametrize('method', [*BY_TRIAL, *GRADIENTS])
def test_targets_and_outputs(method):
    net, x, k = rivals()
    explain = partial(attribute, method=seen(method))
    h = explain(net, x)
    expected = h.raw[0][range(4), k]
    for target in 'predicted', k.tolist():
        one = explain(net, x, target=target)
        nearly(one.raw[0][:, 0], expected, 1e-6)
        nearly(one.probs[:, 0], h.probs[range(4), k])
    nearly(explain(net, x, target=lambda out: out[:, 2]).raw[0][:, 0], h.raw[0][:, 2], 1e-6)
    of_part = explain(Parts(net), x, target=k.tolist(), output='scores', **dict(layers='net.6') if attribution(method).layered else {})
    nearly(of_part.raw[0][:, 0], expected, 1e-6)
    with pytest.raises(ValueError, match='one class for each image'): explain(net, x, target=[0, 1])
    with pytest.raises(ValueError, match='not both'): explain(net, x, 1, target='predicted')

@pytest.mark.parametrize('method', [*BY_TRIAL, *GRADIENTS])
def test_parts_of_any_size_give_the_same(method, monkeypatch):
    "Copies in one forward pass; images in one batch"
    import dicomcam.classifier as classifier
    net, x, k = rivals()
    net, x = net.double(), x.double() # in float32, a sum in another order may be on the other side of a ReLU
    h = attribute(net, x, target='predicted', method=seen(method))
    if method != 'gradient_x_input':
        for bs in 3, 1000: nearly(attribute(net, x, target='predicted', method=method, bs=bs).raw[0], h.raw[0], 1e-4)
    monkeypatch.setattr(classifier, 'as_batches', partial(classifier.as_batches, bs=3))
    parts = list(attribute(net, x, method=method, target=k.tolist(), batches=True))
    assert [len(o) for o in parts] == [3, 1]
    nearly(torch.cat([o.raw[0] for o in parts]), h.raw[0], 1e-4)

def test_channels_that_are_zero_are_not_tried():
    net, x, rows = fine_net(), batch(1, size=24), []
    with torch.no_grad(): net[0].weight[2:], net[0].bias[2:] = 0, -1
    with net.register_forward_pre_hook(lambda m, i: rows.append(len(i[0]))):
        scorecam(net, x, layers='1', bs=2)
        assert sum(rows[-2:]) == 3 # two channels, and one for all that are zero
        ablationcam(net, x, layers='1')
        assert rows[-1] == 2
    with torch.no_grad(): net[0].bias[:2], net[0].weight[:] = -1, 0
    for method in scorecam, ablationcam: assert not method(net, x, layers='1').raw[0].any()

class InPlace(nn.Module):
    def __init__(self): super().__init__(); self.net = small()
    def forward(self, x): return self.net(x.sub_(.5).mul_(2))

class NotInPlace(InPlace):
    def forward(self, x): return self.net((x-.5)*2)

@pytest.mark.parametrize('method', [*BY_TRIAL, *GRADIENTS])
def test_a_network_that_changes_its_input(method):
    x = batch(2, size=32)
    a, b = (attribute(net().eval(), x, target='predicted', method=seen(method), smooth='tta') for net in (InPlace, NotInPlace))
    assert torch.equal(a.raw[0], b.raw[0]) and torch.equal(a.images, x)

class Fails(nn.Module):
    "Raises at its tenth forward pass"
    def __init__(self): super().__init__(); self.net, self.n = small(), 0
    def forward(self, x):
        self.n += 1
        if self.n > 9: raise KeyError('tenth')
        return self.net(x)

@pytest.mark.parametrize('method', [*BY_TRIAL, *GRADIENTS])
def test_an_exception_leaves_the_model_as_it_was(method):
    net = Fails().train()
    net.net[3].eval()
    net.net[4].requires_grad_(False)
    before = state(net)
    with pytest.raises(KeyError, match='tenth'):
        attribute(net, batch(2, size=32), method=seen(method), smooth='noise', **dict(bs=2) if method != 'gradient_x_input' else {})
    assert same(state(net), before) and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

def test_two_threads_on_one_model():
    net, xs = small(), [batch(1, size=32, seed=i) for i in range(4)]
    expected = [ablationcam(net, x).raw[0] for x in xs]
    with ThreadPoolExecutor(2) as pool: maps = list(pool.map(lambda i: ablationcam(net, xs[i % 4]).raw[0], range(8)))
    assert all(torch.equal(o, expected[i % 4]) for i, o in enumerate(maps))

# captum

def test_gradient_x_input_as_captum_has_it_and_its_formula():
    captum = pytest.importorskip('captum.attr')
    net, x = small().double(), batch(2, size=32).double()
    h = gradient_x_input(net, x)
    for k in range(3):
        inputs = x.clone().requires_grad_()
        g, = torch.autograd.grad(net(inputs)[:, k].sum(), inputs)
        nearly(h.raw[0][:, k], (g*x).sum(1))
        nearly(h.raw[0][:, k], captum.InputXGradient(net).attribute(inputs, k).sum(1).detach())

@pytest.mark.parametrize('make,shape', [(small, (3, 32, 32)), (volume_net, (1, 8, 12, 10)), (signal_net, (2, 64))], ids=['images', 'volumes', 'signals'])
def test_integrated_gradients_as_captum_has_them_and_their_formula(make, shape):
    captum = pytest.importorskip('captum.attr')
    net, x = make().double(), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    h, b = integrated_gradients(net, x, 1, n_steps=10, fill='mean', bs=3), filled(x, 'mean')
    nearly(h.raw[0][:, 0], captum.IntegratedGradients(net).attribute(x.clone().requires_grad_(), b, 1, n_steps=10).sum(1).detach(), 1e-5)
    points, weights = np.polynomial.legendre.leggauss(10)
    total = 0
    for t, w in zip((points+1)/2, weights/2):
        inputs = (b+t*(x-b)).requires_grad_()
        total = total + w*torch.autograd.grad(net(inputs)[:, 1].sum(), inputs)[0]
    nearly(h.raw[0][:, 0], ((x-b)*total).sum(1), 1e-5)

@pytest.mark.parametrize('method', GRADIENTS)
def test_without_captum_one_line_says_so(method, monkeypatch):
    monkeypatch.setitem(sys.modules, 'captum', None)
    with pytest.raises(ImportError, match='^This method is of captum, which is not here: pip install captum$'): attribute(small(), batch(1, size=32), method=method)

class Steps(nn.Module):
    "A score that no gradient leads to"
    def forward(self, x): return (x[:, 0, ::8, ::8] > 0).float().flatten(1)[:, :3]

def test_a_score_without_a_gradient():
    assert occlusion(Steps(), batch(1, size=32)).raw[0].any()
    pytest.importorskip('captum')
    for method in GRADIENTS:
        with pytest.raises(ValueError, match='Take occlusion'): attribute(Steps(), batch(1, size=32), method=method)

# smoothing

SOME = 'cam', 'gradcam', 'eigencam', 'scorecam', 'ablationcam', 'occlusion', 'gradient_x_input'

@pytest.mark.parametrize('method', SOME)
def test_one_copy_without_noise_is_the_image(method):
    net, x = small(), batch(2, size=48)
    h = attribute(net, x, method=seen(method))
    for smooth in partial(noisy, n=1, sd=0), partial(augmented, factors=[1], flip=False):
        s = attribute(net, x, method=method, smooth=smooth)
        assert torch.equal(s.raw[0], h.raw[0]) and torch.equal(s.probs, h.probs)

def test_noise_is_the_mean_of_copies_and_its_seed_decides():
    net, x = small(), batch(2, size=32)
    x[1] *= 5
    h = gradcam(net, x, layers=['5', '6'])
    s = attribute(net, x, layers=['5', '6'], smooth=partial(noisy, n=3, sd=.2, seed=7))
    draw, width = torch.Generator().manual_seed(7), .2*torch.stack([o.max()-o.min() for o in x])[:, None, None, None]
    copies = [gradcam(net, x+width*torch.randn(3, 32, 32, generator=draw), layers=['5', '6']).raw for _ in range(3)]
    for raw, *of_copies in zip(s.raw, *copies): nearly(raw, sum(of_copies)/3, 1e-5)
    assert torch.equal(s.probs, h.probs) and not torch.equal(s.raw[0], h.raw[0]) and s.method == 'gradcam, noisy'
    again = [attribute(net, x, layers=['5', '6'], smooth=partial(noisy, n=3, sd=.2, seed=seed)).raw[0] for seed in (7, 8)]
    assert torch.equal(again[0], s.raw[0]) and not torch.equal(again[1], s.raw[0])
    nearly(attribute(net, x[1:], layers='5', smooth=partial(noisy, n=3, sd=.2, seed=7)).raw[0], s.raw[0][1:], 1e-5) # whatever else is in the batch
    state = torch.get_rng_state()
    attribute(net, x, smooth='noise')
    assert torch.equal(torch.get_rng_state(), state)

def test_augmentation_is_that_of_pytorch_grad_cam():
    tta = pytest.importorskip('ttach')
    net, x = small(), batch(2, size=32)
    maps = [t.deaugment_mask(gradcam(net, t.augment_image(x)).raw[0]) for t in tta.Compose([tta.HorizontalFlip(), tta.Multiply([.9, 1, 1.1])])]
    assert len(maps) == 6
    nearly(attribute(net, x, smooth='tta').raw[0], sum(maps)/6, 1e-5)

@pytest.mark.parametrize('method', SOME)
def test_the_mirror_image_of_a_symmetric_network_is_nothing_new(method):
    net, x = fine_net(), batch(2, size=23)
    for o in net[0], net[2]: o.weight.data = (o.weight.data+o.weight.data.flip(-1))/2
    h, s = (attribute(net, x, method=seen(method), smooth=o) for o in (None, partial(augmented, factors=[1])))
    nearly(s.raw[0], h.raw[0], 1e-4)
    s = attribute(net, x.flip(-1), method=method, smooth='tta')
    nearly(s.raw[0].flip(-1), attribute(net, x, method=method, smooth='tta').raw[0], 1e-4)

def test_signals_are_not_mirrored_and_volumes_are():
    net, x = signal_net(), torch.randn(2, 2, 64)
    nearly(attribute(net, x, smooth=partial(augmented, factors=[1])).raw[0], gradcam(net, x).raw[0])
    net, x = volume_net(), torch.randn(1, 1, 8, 12, 10)
    nearly(attribute(net, x, smooth=partial(augmented, factors=[1])).raw[0], (gradcam(net, x).raw[0]+gradcam(net, x.flip(-1)).raw[0].flip(-1))/2, 1e-5)

@pytest.mark.parametrize('method', ['gradcam', 'scorecam'])
def test_copies_are_asked_about_the_class_of_the_image(method):
    "which they would not be predicted as"
    net, x, k = rivals()
    smooth = partial(noisy, n=3, sd=.5)
    with torch.no_grad(): assert (net(x+.5*(x.max()-x.min())*torch.randn(3, 32, 32)).argmax(1) != k).any()
    h = attribute(net, x, method=method, smooth=smooth)
    for s in smooth, lambda maps_of: noisy(augmented(maps_of, [1], False), 3, .5):
        for target in 'predicted', k.tolist():
            one = attribute(net, x, method=method, smooth=s, target=target)
            nearly(one.raw[0][:, 0], h.raw[0][range(4), k], 1e-5)

@pytest.mark.parametrize('smooth,kw,why', [('blur', {}, "No smoothing 'blur'; there are noise, tta, mirror."), (partial(noisy, n=0), {}, 'n=0: '),
    (partial(augmented, factors=[]), {}, 'No factors'), ('tta', dict(target=lambda out: out[:, 0]), 'A function as target may look at places')])
def test_what_smoothing_does_not_take(smooth, kw, why):
    with pytest.raises(ValueError, match=f'^{why}') as e: attribute(small(), batch(1, size=32), smooth=smooth, **kw)
    assert '\n' not in str(e.value)
    if kw: assert attribute(small(), batch(1, size=32), smooth=partial(augmented, flip=False), **kw).raw[0].any()

# by name

def test_every_method_by_name():
    net, x = small(), batch(1, size=48)
    by_name = dict(cam=cam, **BY_TRIAL) | {o: partial(gradcam, method=o) for o in METHODS}
    if pytest.importorskip('captum'): by_name |= dict(integrated_gradients=integrated_gradients, gradient_x_input=gradient_x_input)
    assert set(ATTRIBUTIONS) == set(by_name)
    for name, f in by_name.items():
        h, own = attribute(net, x, [0, 1], method=name), f(net, x, [0, 1])
        assert torch.equal(h.raw[0], own.raw[0]) and h.layers == own.layers and h.method == own.method == name
        assert ATTRIBUTIONS[name].does and ATTRIBUTIONS[name].costs

def test_a_method_that_was_added_is_found():
    @cam_method('mean activation', grad=False)
    def f(a, g): return a.mean(1)
    try:
        assert torch.equal(attribute(small(), batch(1, size=32), 1, 6, 'mean activation').raw[0], gradcam(small(), batch(1, size=32), 1, 6, 'mean activation').raw[0])
        with pytest.raises(ValueError, match='gradient_x_input, mean activation'): attribution('gradkam')
    finally: del METHODS['mean activation']

def test_files_of_a_learner(tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(2)]
    for o in files: marked(o, 200, 150, 60, 70)
    h = attribute(learner(files, 64, 'pad'), files, method='occlusion', patch=16)
    assert h.items == files and h.native(0).shape == (200, 150) and h.images.shape[2:] == (64, 64) and h.raw[0].any()

@pytest.mark.parametrize('kw,why', [(dict(method='gradkam'), "No method 'gradkam'; there are cam, gradcam, "), (dict(method='occlusion', layers=6), 'occlusion is of no layer'),
    (dict(method='cam', target='predicted'), 'cam takes no target, but classes.'), (dict(patch=3, fill=0), 'gradcam takes no fill, patch, but layout, target.'),
    (dict(method='scorecam', layers='layer9'), 'No layer'), (dict(method='ablationcam', layers=9), 'Layer 9 has no positions')])
def test_what_attribute_does_not_take(kw, why):
    with pytest.raises(ValueError, match=f'^{why}') as e: attribute(small(), batch(1, size=32), **kw)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('method', ['gradcam', 'scorecam', 'ablationcam', 'occlusion'])
@pytest.mark.parametrize('smooth', [None, 'tta'])
def test_a_class_an_image_by_any_method(method, smooth):
    "Over several batches; more classes than images are an error at the end"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x, target = torch.rand(3, 1, 10, 10), [2, 0, 1]
    h, each = (attribute(net, x, method=method, smooth=smooth, **o) for o in (dict(target=target), dict(classes=[0, 1, 2])))
    for i, k in enumerate(target): torch.testing.assert_close(h.raw[0][i, 0], each.raw[0][i, k])
    with pytest.raises(ValueError, match='4 targets'): attribute(net, x, method=method, smooth=smooth, target=[*target, 0])
