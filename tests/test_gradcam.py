"Every method against other libraries or its formula, on several networks; the modes, formats and precisions that it must work in"
import contextlib, gc
from unittest import mock

import pytest, torch
from fastai.vision.all import Mish, ResBlock, XResNet, xresnet18
from test_cam import batch, lively, make, same, state
from tiny import TinyNet
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet121

from dicomcam.gradcam import _Lean, gradcam
from dicomcam.methods import METHODS, cam_method

LAYERS = dict(xresnet18=['4', '6', '7'], bottlenecks=['5', '7'], resnet18=['layer2', 'layer4.1'],
    densenet121=['features.denseblock2', 'features.denseblock4', 'features'])
STAGES = ['4', '5', '6', '7'] # of a TinyNet
CUDA = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU'))

def nearly(a, b, rel=1e-6):
    "Largest difference as a share of the largest value, in float64"
    a, b = a.double(), b.double()
    assert a.shape == b.shape and (a-b).abs().max() <= rel*b.abs().max(), f'{(a-b).abs().max()/b.abs().max():.1e}'

def small(n_out=3): return TinyNet(n_out, c_in=3)

def bottlenecks():
    "An xresnet50 with one block a stage"
    torch.manual_seed(0)
    return lively(XResNet(ResBlock, 4, [1, 1, 1, 1], n_out=3, act_cls=Mish, sa=True))

@pytest.fixture(params=LAYERS)
def net(request): return request.param, (bottlenecks() if request.param == 'bottlenecks' else make(request.param)).eval()

def test_gradcam_as_captum_has_it(net):
    captum = pytest.importorskip('captum.attr')
    name, net = net
    h = gradcam(net, batch(), layers=LAYERS[name])
    for l, r in zip(h.layers, h.raw):
        attr = captum.LayerGradCam(net, net.get_submodule(l))
        for k in range(3):
            nearly(r[:, k].relu(), attr.attribute(batch(), k, relu_attributions=True)[:, 0].detach())
            nearly(r[:, k], attr.attribute(batch(), k)[:, 0].detach())

def test_gradcam_as_torchcam_has_it(net):
    torchcam = pytest.importorskip('torchcam.methods')
    name, net = net
    layers = [l for l in LAYERS[name] if l != 'features'] # torchcam keeps the tensor that DenseNet's last ReLU overwrites
    h = gradcam(net, batch(), layers=layers)
    with torchcam.GradCAM(net, layers) as extract:
        out = net(batch())
        for k in range(3):
            for r, o in zip(h.raw, extract(k, out, normalized=False, retain_graph=True)): nearly(r[:, k].relu(), o)

def test_hirescam_as_captum_has_it(net):
    captum = pytest.importorskip('captum.attr')
    name, net = net
    h = gradcam(net, batch(), layers=LAYERS[name], method='hirescam')
    for l, r in zip(h.layers, h.raw):
        attr = captum.LayerGradientXActivation(net, net.get_submodule(l))
        for k in range(3): nearly(r[:, k], attr.attribute(batch(), k).sum(1).detach())

def activation_and_gradient(net, layer, x, k):
    "By another road: the layer's output replaced by a leaf of our own, the score differentiated in float64"
    kept = {}
    with torch.no_grad():
        hook = net.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.update(a=o.clone()))
        net(x)
    hook.remove()
    leaf = kept['a'].requires_grad_()
    hook = net.get_submodule(layer).register_forward_hook(lambda m, i, o: leaf.clone())
    net(x)[:, k].sum().backward()
    hook.remove()
    return leaf.detach(), leaf.grad

def written_out(method, a, g):
    "The formulas of the papers, one channel and one position at a time"
    n, c, h, w = a.shape
    out = torch.zeros(n, h, w, dtype=torch.float64)
    for i in range(n):
        for k in range(c):
            A, G = a[i, k], g[i, k]
            weight = 0.
            if method == 'gradcam++':
                for y in range(h):
                    for x in range(w):
                        d = 2*G[y, x]**2 + A.sum()*G[y, x]**3
                        weight += (G[y, x]**2/d if d != 0 else 0.)*max(G[y, x], 0.)
            elif method == 'xgradcam': weight = (A*G).sum()/A.sum() if A.sum() != 0 else 0.
            elif method == 'gradcam': weight = G.sum()/(h*w)
            elif method == 'hirescam': weight = G
            elif method == 'layercam': weight = G.clamp(min=0)
            out[i] += weight*A
    return out

@pytest.mark.parametrize('method', ['gradcam', 'gradcam++', 'xgradcam', 'hirescam', 'layercam'])
@pytest.mark.parametrize('arch,layer', [('xresnet18', '6'), ('resnet18', 'layer4'), ('densenet121', 'features.denseblock4')])
def test_methods_against_their_formulas_in_float64(method, arch, layer):
    net = make(arch).double().eval()
    x = batch(1, size=64).double()
    h = gradcam(net, x, 1, layer, method)
    nearly(h.raw[0][:, 0], written_out(method, *activation_and_gradient(net, layer, x, 1)), 1e-5)

def test_methods_where_they_divide_by_zero():
    a, g = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    for f, _ in METHODS.values():
        assert (f(a, g) == 0).all()
        assert f(a+1, g).isfinite().all() and f(a, g+1).isfinite().all()

def test_eigencam_is_the_first_principal_direction():
    net = small()
    h = gradcam(net, batch(), layers='6', method='eigencam')
    a, _ = activation_and_gradient(net, '6', batch(), 0)
    for i in range(2):
        x = a[i].flatten(1).double()
        val, vec = torch.linalg.eigh(x@x.T)
        m = (vec[:, -1]@x).view(6, 6)
        nearly(h.raw[0][i, 0], m*m.sum().sign(), 1e-4)
    assert (h.raw[0] >= 0).all() and torch.equal(h.raw[0][:, 0], h.raw[0][:, 2]) # after a ReLU, of one sign; the same for all classes

# one forward pass, and no more of autograd than needed

def test_one_forward_for_all_classes_and_layers():
    net, n = small(), []
    gradcam(net, batch(1), layers=STAGES) # what its layers return is learnt once, from one image
    hook = net.register_forward_hook(lambda *a: n.append(1))
    h = gradcam(net, batch(4), layers=STAGES)
    hook.remove()
    assert len(n) == 1 and h.maps.shape == (4, 3, 4, 96, 96)
    for i in range(4): # a batch is its images
        for r, o in zip(gradcam(net, batch(4)[i:i+1], layers=STAGES).raw, h.raw): nearly(r[0], o[i], 1e-4)

def test_no_parameter_gradients():
    net = small()
    for m in METHODS: gradcam(net, batch(), method=m)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())

def test_backward_stops_at_the_earliest_layer():
    net, seen = small(), []
    hooks = [net.get_submodule(n).register_full_backward_hook(lambda m, gi, go, n=n: seen.append(n)) for n in ('4', '5', '7')]
    gradcam(net, batch(), classes=0, layers='6')
    for o in hooks: o.remove()
    assert seen == ['7']

def test_many_calls_grow_no_memory():
    "A tensor that a call leaves behind would be there 200 times; a few may be of others in this process"
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), torch.randn(2, 1, 12, 12)
    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(3): gradcam(net, x)
    before = tensors()
    for _ in range(200): gradcam(net, x)
    assert tensors() < before+100
    assert not any(o._forward_hooks or o._forward_pre_hooks or o._backward_hooks for o in net.modules())

# whatever the caller's mode

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize('frozen', [False, True])
def test_modes_and_frozen_parameters(mode, frozen):
    net = small().train()
    expected = gradcam(net, batch(), layers=['5', '7'])
    net.requires_grad_(not frozen)
    before = state(net)
    with mode(): got = gradcam(net, batch(), layers=['5', '7'])
    assert same(state(net), before)
    for a, b in zip(got.raw, expected.raw): assert torch.equal(a, b) and not a.requires_grad and not a.is_inference()

class Block(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.conv, self.act, self.conv2, self.act2, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.Linear(8, 3)
    def forward(self, x):
        x = self.conv2(self.act(self.conv(x)))
        x = x.mul_(2) if self.act.inplace else x*2
        return self.head(self.act2(x).mean((2, 3)))

@pytest.mark.parametrize('method', METHODS)
def test_in_place_after_the_layer(method):
    torch.manual_seed(0)
    a, b = Block(False), Block(True)
    b.load_state_dict(a.state_dict())
    for layers in ('conv', 'conv2', ['conv', 'conv2'], ['conv', 'act', 'conv2']):
        for p, q in zip(gradcam(a, batch(), layers=layers, method=method).raw, gradcam(b, batch(), layers=layers, method=method).raw): assert torch.equal(p, q)

@pytest.mark.parametrize('device', ['cpu', CUDA])
@pytest.mark.parametrize('how', ['channels_last', 'bfloat16', 'float16', 'autocast bfloat16', 'autocast float16'])
@pytest.mark.parametrize('method', ['gradcam', 'hirescam', 'eigencam'])
def test_formats_and_precisions(device, how, method):
    net, x, layers = make('resnet18').to(device), batch(4).to(device), ['layer3', 'layer4']
    exact = gradcam(net, x, layers=layers, method=method)
    if how == 'channels_last': net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    elif how in ('bfloat16', 'float16'): net, x = net.to(getattr(torch, how)), x.to(getattr(torch, how))
    auto = 'autocast' in how
    with torch.autocast(device, getattr(torch, how.split()[-1]) if auto else None, enabled=auto):
        got = gradcam(net, x, layers=layers, method=method)
    for a, b in zip(got.raw, exact.raw):
        assert a.dtype == torch.float32 and a.device.type == 'cpu'
        alike = torch.cosine_similarity(a.flatten(2), b.flatten(2), dim=2).min()
        assert alike > (.99999 if how == 'channels_last' else .95 if 'bfloat16' in how else .995), alike

def test_small_gradients_survive_float16():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    net[-1].weight.data.mul_(2e-4)
    x = torch.rand(1, 1, 34, 34)
    a, b = gradcam(net, x, layers=0), gradcam(net.half(), x.half(), layers=0)
    nearly(b.raw[0], a.raw[0], .05)

# heads, layers, names

def test_layers_by_module_index_and_name():
    net = small()
    h = gradcam(net, batch(), layers=[net[-6], -5, '4.0'])
    assert h.layers == ['6', '7', '4.0'] and [h.layer(o) for o in (net[-6], -5, '4.0', '6', None)] == [0, 1, 2, 0, 2]
    assert torch.equal(gradcam(net, batch()).raw[0], gradcam(net, batch(), layers=-5).raw[0])
    with pytest.raises(ValueError, match='No map of layer'): h.layer(-8)

def test_classes_by_number_and_repeated():
    net = small()
    h = gradcam(net, batch())
    for classes, expected in (([2, -1, 0], [2, 2, 0]), ([0, 1, 0], [0, 1, 0])): # the graph lasts until the last of them
        g = gradcam(net, batch(), classes=classes)
        assert g.classes == expected and torch.equal(g.raw[0], h.raw[0][:, expected]) and torch.equal(g.probs, h.probs[:, expected])

def test_multilabel_probabilities():
    net = small()
    with torch.no_grad(): p = net(batch()).sigmoid()
    torch.testing.assert_close(gradcam(net, batch(), act=torch.sigmoid).probs, p)

def test_score_vector_for_a_single_logit():
    class One(nn.Module):
        def __init__(self): super().__init__(); self.net = small(1)
        def forward(self, x): return self.net(x)[:, 0]
    h = gradcam(One(), batch())
    assert h.classes == [0, 1] and torch.equal(h.raw[0][:, 0], -h.raw[0][:, 1])
    torch.testing.assert_close(h.probs.sum(1), torch.ones(2))

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.spare, self.side = small(2), nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
    def forward(self, x):
        self.side(x)
        return self.net(x)

UNFIT = [(True, 'No layer True'), ('spare', 'did not run'), ('side', 'do not depend'), ('net.11', 'net.11 has no positions'), ('net.8', 'net.8 has no positions')]

@pytest.mark.parametrize('layer,match', UNFIT)
def test_layers_that_cannot_be(layer, match):
    with pytest.raises(ValueError, match=match): gradcam(Unused(), batch(), layers=['net.7', layer])

def test_methods_by_name():
    with pytest.raises(ValueError, match='there are gradcam, '): gradcam(small(), batch(), method='gradkam')
    @cam_method('mine')
    def mine(a, g): return a.sum(1)
    try: assert gradcam(small(), batch(), method='mine').method == 'mine'
    finally: del METHODS['mine']

def test_default_stage_of_other_networks():
    from torchvision.models import efficientnet_b0, mobilenet_v3_small, squeezenet1_1, vgg11
    nets = densenet121, vgg11, efficientnet_b0, mobilenet_v3_small, squeezenet1_1
    names = {f.__name__: gradcam(f(num_classes=2), batch(1), classes=1).layers[0] for f in nets}
    assert names == dict(densenet121='features', vgg11='features', efficientnet_b0='features', mobilenet_v3_small='features', squeezenet1_1='classifier.1')
    assert gradcam(nn.Sequential(nn.Identity(), xresnet18(n_out=2, act_cls=Mish)), batch(1)).layers == ['1.7']

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU')
def test_cuda_gives_what_cpu_gives():
    net = make('xresnet18')
    a = gradcam(net, batch(), layers=[-6, -5])
    b = gradcam(net.cuda(), batch(), layers=[-6, -5])
    for p, q in zip(a.raw, b.raw): nearly(q, p, 1e-3)

# batch norms in eval mode and convolutions of one pixel take a shorter way back

class Shaped(nn.Module):
    "Batch norm whose weights the network makes itself, one that is training, one without weights, one after pooling"
    def __init__(self):
        super().__init__()
        self.conv, self.make, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Conv2d(4, 4, 3, padding=1)
        self.live, self.plain, self.flat, self.head = nn.BatchNorm2d(4, momentum=0.), nn.BatchNorm2d(4, affine=False), nn.BatchNorm1d(4), nn.Linear(4, 2)
    def forward(self, x):
        x = self.conv(x)
        w, b = self.make(x.mean((0, 2, 3))).split(4)
        x = self.live(F.batch_norm(x, torch.zeros_like(w), torch.ones_like(w), w, b))
        return self.head(self.flat(self.plain(self.last(x).relu()).mean((2, 3))))

class Points(nn.Module):
    "Convolutions of one pixel: plain ones, with groups, with a step, with a rim, and two whose weights or bias the network makes itself"
    def __init__(self):
        super().__init__()
        self.conv, self.make, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 16), nn.Linear(4, 2)
        self.mid = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=2),
            nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 1, padding='same'))
        self.one, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    def forward(self, x):
        x = self.conv(x).relu()
        made = self.make(x.mean((0, 2, 3)))
        x = F.conv2d(self.mid(x), made.view(4, 4, 1, 1)).relu()
        x = F.conv2d(x, torch.eye(4, dtype=x.dtype)[..., None, None], made[:4])
        x = self.last(torch.stack([self.one(o) for o in x])).relu() # one image alone has no axis of images
        return self.head(x.mean((2, 3)))

SHAPED = dict(shaped=Shaped, points=Points)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', ['xresnet18', 'densenet121', 'shaped', 'points'])
def test_the_lean_way_back_gives_the_same_maps(name, dtype):
    torch.manual_seed(0)
    net = lively(SHAPED[name]()).eval() if name in SHAPED else make(name).eval()
    if name == 'shaped': net.live.train()
    net, x, layers = net.to(dtype), batch(5, size=64).to(dtype), LAYERS.get(name, ['conv', 'last'])
    h = gradcam(net, x, layers=layers)
    with mock.patch('dicomcam.gradcam._Lean', contextlib.nullcontext): plain = gradcam(net, x, layers=layers)
    for a, b in zip(h.raw, plain.raw): nearly(a, b, .05 if dtype == torch.bfloat16 else 1e-6)

def test_the_lean_way_back_keeps_less_and_is_gone_afterwards():
    net, x, kept = xresnet18(n_out=2).eval(), batch(7, size=64), []
    def count(t): kept.append(t.numel() if len(t) == 7 else 0); return t
    sizes = []
    for mode in _Lean, contextlib.nullcontext:
        kept.clear()
        with mode(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t): net(x)
        sizes.append(sum(kept))
    assert sizes[0] < .75*sizes[1], sizes
    with pytest.raises(RuntimeError, match='boom'), _Lean(): raise RuntimeError('boom')
    out = net(x)
    assert any('BatchNorm' in type(f).__name__ for f in graph(out.grad_fn))

@pytest.mark.parametrize('n, layers, lean', [(4, ['4', '7'], True), (4, '6', True), (4, '7', False), (3, ['4', '7'], False)])
def test_the_lean_way_back_is_taken_where_there_is_one(n, layers, lean):
    "The last stage of an xresnet is followed by its head, which has neither batch norms nor convolutions"
    with mock.patch('dicomcam.gradcam._Lean', side_effect=_Lean) as made: gradcam(xresnet18(n_out=2), batch(n, size=64), layers=layers)
    assert made.called == lean

@pytest.mark.parametrize('inside', [True, False])
def test_the_lean_way_back_under_autocast(inside):
    "Of the caller, whose rounding is the network's affair only, or of the network itself"
    torch.manual_seed(0)
    net, x = lively(Points()).eval(), batch(5, size=32)
    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16, enabled=inside): return self.net(x)
    with torch.autocast('cpu', torch.bfloat16, enabled=not inside): h = gradcam(Rounds(), x, layers=['net.conv', 'net.last'])
    with mock.patch('dicomcam.gradcam._Lean', contextlib.nullcontext):
        with torch.autocast('cpu', torch.bfloat16, enabled=not inside): plain = gradcam(Rounds(), x, layers=['net.conv', 'net.last'])
    for a, b in zip(h.raw, plain.raw): nearly(a, b, .05 if inside else 1e-6)

def graph(f):
    "All nodes of autograd's graph"
    seen, todo = set(), [f]
    while todo:
        if (o := todo.pop()) not in seen: seen.add(o); todo += [n for n, _ in o.next_functions if n]
    return seen
