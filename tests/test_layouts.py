"Networks of all kinds against autograd by hand and other libraries; what used to be wrong without a word, or stopped"
import collections, copy, gc, math, pickle, threading, warnings, weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pandas as pd, pytest, torch, torchvision
from fastai.vision.all import RandomResizedCropGPU, Resize
from PIL import Image
from test_cam import batch, learner, lively, make, marked, same, state
from test_gradcam import nearly
from tiny import TinyNet, make_tiny
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dicomcam.cam import cam
from dicomcam.faithful import deletion, randomization, randomized
from dicomcam.gradcam import gradcam
from dicomcam.heatmaps import find_class
from dicomcam.perturb import occlusion
from dicomcam.methods import METHODS
from dicomcam.pixels import dicom_pixels
from dicomcam.read import read_dicom

# a walk: where positions are in the last layer that has them, written down from what each network is

CHANNELS_FIRST = '''
test_byobnet 160, test_coatnet 160, test_convnext 160, test_convnext2 160, test_convnext3 160, test_efficientnet 160, test_efficientnet_evos 160,
test_efficientnet_gn 160, test_efficientnet_ln 160, test_maxvit 160, test_nfnet 160, test_resnet 160,
convnext_atto 96, mobileone_s1 96, cpubone_nano 224, cs3darknet_focus_s 128, cspnext_tiny 96, dla34 96, edgenext_xx_small 128, efficientformerv2_s0 224,
tinynet_d 152, efficientvit_b0 96, efficientvit_m0 224, fasternet_t0 96, fastvit_t8 128, ghostnet_050 128, hardcorenas_b 128, hgnetv2_b0 96,
inception_next_atto 96, lcnetv2_small 96, mobilenetv3_small_050 96, mobilevit_xxs 128, nf_regnet_b0 96, poolformer_s12 96, pvt_v2_b0 96, regnetx_002 96,
resnetv2_18 96, rexnet_100 96, shvit_s1 224, starnet_s050 96, swiftformer_xs 224, visformer_tiny 224, ese_vovnet19b_slim_dw 96'''

TV_CHANNELS_FIRST = '''
alexnet 128, convnext_tiny 64, densenet121 96, efficientnet_b0 96, googlenet 96, inception_v3 128, mnasnet0_5 96, mobilenet_v2 96, mobilenet_v3_small 96,
regnet_x_400mf 96, resnet18 96, shufflenet_v2_x0_5 96, squeezenet1_1 96, resnet34 64'''

OTHERS = { # class and register tokens stand before those of the grid
    'test_vit 160': ('tokens', 1), 'test_vit2 160': ('tokens', 1), 'test_vit3 160': ('tokens', 1), 'test_vit4 160': ('tokens', 1),
    'test_vit_relpos 160': ('tokens', 0), 'vit_tiny_patch16_224 224': ('tokens', 1), 'deit_tiny_patch16_224 224': ('tokens', 1),
    'eva02_tiny_patch14_224 224': ('tokens', 1), 'convit_tiny 224': ('tokens', 1), 'pit_ti_224 224': ('tokens', 1),
    'levit_128 224': ('tokens', 0), 'efficientformer_l1 224': ('tokens', 0), 'cait_xxs24_224 224': ('tokens', 1),
    'test_mambaout 160': ('nhwc', 0)}

TV_OTHERS = {'swin_t 64': ('nhwc', 0), 'swin_v2_t 64': ('nhwc', 0), 'vit_b_32 224': ('tokens', 1)}

def listed(names): return [tuple(o.split()) for o in names.replace('\n', ' ').split(',')]

WALK = [('timm', *o, ('nchw', 0)) for o in listed(CHANNELS_FIRST)] + [('torchvision', *o, ('nchw', 0)) for o in listed(TV_CHANNELS_FIRST)]
WALK += [('timm', *k.split(), v) for k, v in OTHERS.items()] + [('torchvision', *k.split(), v) for k, v in TV_OTHERS.items()]

def network(library, name):
    "A network of either library for five classes, its weights drawn at random"
    torch.manual_seed(0)
    if library == 'timm':
        timm = pytest.importorskip('timm')
        if not timm.is_model(name): pytest.skip(f'timm {timm.__version__} has no {name}')
        return timm.create_model(name, num_classes=5).eval()
    kw = dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    net = getattr(torchvision.models, name)(weights=None, num_classes=5, **kw).eval()
    if name.startswith('vit'): nn.init.normal_(net.heads.head.weight) # torchvision draws zeros
    return net

def channels_first(t, layout):
    "An output as (n, c, h, w), by hand"
    kind, prefix = layout
    if kind == 'nhwc': return t.permute(0, 3, 1, 2)
    if kind == 'nchw': return t
    n, t_all, c = t.shape
    side = math.isqrt(t_all-prefix)
    return t[:, prefix:].reshape(n, side, side, c).permute(0, 3, 1, 2)

def by_autograd(net, layer, x, k, layout):
    "Grad-CAM by a hook and `torch.autograd.grad` alone"
    kept = []
    def keep(m, i, o):
        kept.append(o)
        return o.clone() # what comes next may change it in place
    with net.get_submodule(layer).register_forward_hook(keep): score = net(x)[:, k].sum()
    a, g = (channels_first(o, layout) for o in (kept[0], *torch.autograd.grad(score, kept[0])))
    return (g.mean((2, 3), keepdim=True)*a).sum(1).detach()

@pytest.mark.parametrize('library,name,size,layout', WALK, ids=[o[1] for o in WALK])
def test_a_walk_along_many_networks(library, name, size, layout):
    net, x = network(library, name), batch(2, size=int(size))
    h = gradcam(net, x, classes=[0])
    assert len(h) == len(h.raw[0]) == 2 and h.classes == [0]
    nearly(h.raw[0][:, 0], by_autograd(net, h.layers[0], x, 0, layout), 1e-5)

def test_a_small_map_beside_as_few_tokens_is_a_grid():
    "Its last map is 4 x 4, and it met 4 tokens before: no attention all the same"
    assert gradcam(network('timm', 'mobilevit_xxs'), batch(1, size=128), classes=[0]).layers == ['final_conv']

def test_the_walk_is_long(): assert len({o[1] for o in WALK}) >= 60

def test_shuffled_tokens_have_no_places():
    with pytest.raises(ValueError, match='layers=, layout='): gradcam(network('timm', 'hiera_tiny_224'), batch(1, size=224), classes=[0])

# transformers against other libraries

def spatial(t): return t.permute(0, 3, 1, 2) if t.ndim == 4 else t[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)

TRANSFORMERS = [('timm', 'vit_tiny_patch16_224', 'blocks.11.norm1', 224), ('timm', 'swin_tiny_patch4_window7_224', 'norm', 224), ('torchvision', 'swin_t', 'norm', 64)]

@pytest.mark.parametrize('library,name,layer,size', TRANSFORMERS, ids=[o[1] for o in TRANSFORMERS])
def test_transformers_as_pytorch_grad_cam_has_them(library, name, layer, size):
    peer = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net, x = network(library, name), batch(1, size=size)
    h = gradcam(net, x, 1, layer)
    with peer.GradCAM(net, [net.get_submodule(layer)], reshape_transform=spatial) as extract:
        extract(x, [ClassifierOutputTarget(1)])
        a, g = (torch.as_tensor(o[0]) for o in (extract.activations_and_grads.activations, extract.activations_and_grads.gradients))
        m = torch.as_tensor(extract.get_cam_image(x, None, None, a.numpy(), g.numpy(), False))
    nearly(h.raw[0][:, 0], m, 1e-5)

class Shown(nn.Module):
    "For torchcam, which reads channels first: a layer that returns its positions as such, and a way back"
    def __init__(self, norm, layout): super().__init__(); self.norm, self.layout, self.seen = norm, layout, nn.Identity()
    def forward(self, x):
        x = self.norm(x)
        if self.layout == 'nhwc': return self.seen(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        grid = self.seen(x[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2))
        return torch.cat([x[:, :1], grid.flatten(2).transpose(1, 2)], 1)

@pytest.mark.parametrize('library,name,layer,size', TRANSFORMERS, ids=[o[1] for o in TRANSFORMERS])
def test_transformers_as_torchcam_has_them(library, name, layer, size):
    torchcam = pytest.importorskip('torchcam.methods')
    net, x = network(library, name), batch(1, size=size)
    h = gradcam(net, x, 1, layer)
    net.set_submodule(layer, Shown(net.get_submodule(layer), 'nhwc' if 'swin' in name else 'tokens'))
    with torchcam.GradCAM(net, f'{layer}.seen') as extract:
        m, = extract(1, net(x), normalized=False)
    nearly(h.raw[0][:, 0].relu(), m, 1e-5)

# volumes and signals

def volume_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3)).eval()

def signal_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 5, 2), nn.ReLU(), nn.Conv1d(4, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(8, 3)).eval()

def r3d_18():
    torch.manual_seed(0)
    return lively(torchvision.models.video.r3d_18(num_classes=3)).eval()

BODIES = [(volume_net, (1, 8, 12, 10), '3'), (signal_net, (2, 64), '2'), (r3d_18, (3, 8, 32, 32), 'layer2')]

@pytest.mark.parametrize('make_net,shape,layer', BODIES, ids=['conv3d', 'conv1d', 'r3d_18'])
def test_volumes_and_signals_as_captum_has_them(make_net, shape, layer):
    captum = pytest.importorskip('captum.attr')
    net, x = make_net(), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    h = gradcam(net, x, layers=layer)
    attr = captum.LayerGradCam(net, net.get_submodule(layer))
    for k in range(3): nearly(h.raw[0][:, k], attr.attribute(x, k)[:, 0].detach(), 1e-5)
    assert h.maps.shape == (2, 3, 1, *shape[1:])

@pytest.mark.parametrize('make_net,shape,layer', BODIES, ids=['conv3d', 'conv1d', 'r3d_18'])
def test_volumes_and_signals_as_monai_has_them(make_net, shape, layer):
    visualize = pytest.importorskip('monai.visualize', exc_type=ImportError)
    net, x = make_net(), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    h = gradcam(net, x, layers=layer)
    peer = visualize.GradCAM(net, layer, upsampler=lambda size: lambda m: m, postprocessing=lambda m: m)
    for k in range(3): nearly(h.raw[0][:, k].relu(), peer(x, k)[:, 0].detach(), 1e-5)

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('make_net,shape,layer', BODIES[:2], ids=['conv3d', 'conv1d'])
def test_every_method_takes_volumes_and_signals(make_net, shape, layer, method):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    h = gradcam(make_net(), x, 1, method=method)
    assert h.raw[0].isfinite().all() and h.raw[0].ndim == len(shape)+1 and h.heat(0, native=False).shape == shape[1:]

# threads

def test_four_threads_on_one_model():
    net, xs = TinyNet(3, c_in=3), [batch(1, size=64, seed=i) for i in range(8)]
    expected = [gradcam(net, x, i % 3, '6').raw[0] for i, x in enumerate(xs)]
    net.train()
    net[4].requires_grad_(False)
    net[6].eval()
    before = state(net)
    with ThreadPoolExecutor(4) as pool: maps = list(pool.map(lambda i: gradcam(net, xs[i % 8], i % 8 % 3, '6').raw[0], range(80)))
    assert all(torch.equal(o, expected[i % 8]) for i, o in enumerate(maps))
    assert same(state(net), before)

# layouts that could be read in two ways

class Mixed(nn.Module):
    "Channels last, as many as there are rows"
    def __init__(self): super().__init__(); self.conv, self.dense, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.dense(self.conv(x).permute(0, 2, 3, 1)).relu().mean((1, 2)))

def test_two_readings_are_an_error_and_the_caller_decides():
    torch.manual_seed(0)
    net, x = Mixed().eval(), batch(2, size=64)
    with pytest.raises(ValueError, match="nchw or nhwc. Say which: layout='nchw'"): gradcam(net, x, layers='dense')
    h = gradcam(net, x, [1], 'dense', layout='nhwc')
    nearly(h.raw[0][:, 0], by_autograd(net, 'dense', x, 1, ('nhwc', 0)), 1e-5)
    assert torch.equal(gradcam(net, x, [1], 'dense', layout=lambda t: t.movedim(-1, 1)).raw[0], h.raw[0])
    with pytest.raises(ValueError, match="No layout 'hwc'; there are nchw, nhwc, tokens"): gradcam(net, x, layers='dense', layout='hwc')

class Flips(nn.Module):
    "Scores of the image and of its mirror image, averaged"
    def __init__(self): super().__init__(); self.net = TinyNet(2, c_in=3)
    def forward(self, x): return self.net(torch.cat([x, x.flip(-1)])).unflatten(0, (2, len(x))).mean(0)

@pytest.mark.parametrize('layers', [None, 'net.6'])
def test_rows_that_are_not_the_images(layers):
    with pytest.raises(ValueError, match='returns 2 rows of one image|no layer that has positions'): gradcam(Flips().eval(), batch(2, size=64), layers=layers)

class Twice(nn.Module):
    def __init__(self): super().__init__(); self.first, self.conv, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.conv(self.conv(self.first(x)).relu()).mean((2, 3)))

def test_a_layer_called_twice():
    with pytest.raises(ValueError, match='Layer conv ran 2 times in one forward pass. Take first'): gradcam(Twice(), batch(size=32), layers='conv')
    assert gradcam(Twice(), batch(size=32)).layers == ['first']

# a network that changes its input, classes and targets

class InPlace(nn.Module):
    def __init__(self): super().__init__(); self.net = TinyNet(3, c_in=3)
    def forward(self, x): return self.net(x.sub_(.5).mul_(2))

class NotInPlace(InPlace):
    def forward(self, x): return self.net((x-.5)*2)

@pytest.mark.parametrize('f', [gradcam, cam])
def test_a_network_that_changes_its_input(f):
    x = batch(size=64)
    before = x.clone()
    h, g = f(InPlace(), x), f(NotInPlace(), x)
    assert torch.equal(x, before) and torch.equal(h.images, before) and torch.equal(h.raw[0], g.raw[0])
    assert deletion(InPlace(), h, 1, steps=4).equals(deletion(NotInPlace(), g, 1, steps=4))

def test_an_index_of_a_class_is_that_of_the_model():
    net, x = TinyNet(3, c_in=3), batch(size=64)
    h, one = gradcam(net, x), gradcam(net, x, classes=[2])
    with pytest.raises(ValueError, match='No map of class 0 here; there are 2'): deletion(net, one, 0, steps=4)
    assert deletion(net, one, 2, steps=4).equals(deletion(net, h, 2, steps=4))
    with pytest.raises(ValueError, match='No class: name one'): gradcam(net, x, classes=[])

def test_targets():
    net, x = TinyNet(3, c_in=3), batch(4, size=64)
    h = gradcam(net, x)
    top = h.probs.argmax(1)
    for target, columns in (('predicted', top), ([2, 0, 1, 1], torch.tensor([2, 0, 1, 1]))):
        g = gradcam(net, x, target=target)
        nearly(g.raw[0][:, 0], h.raw[0][torch.arange(4), columns], 1e-5)
        torch.testing.assert_close(g.probs[:, 0], h.probs[torch.arange(4), columns])
    difference = gradcam(net, x, target=lambda out: out[:, 0]-out[:, 2])
    nearly(difference.raw[0][:, 0], h.raw[0][:, 0]-h.raw[0][:, 2], 1e-4)
    with pytest.raises(ValueError, match='wanted one number an image'): gradcam(net, x, target=lambda out: out.sum())
    with pytest.raises(ValueError, match='one class for each image'): gradcam(net, x, target=[0, 1])
    with pytest.raises(ValueError, match='not both'): gradcam(net, x, 0, target='predicted')

class Keyed(nn.Module):
    def __init__(self, wrap): super().__init__(); self.net, self.wrap = TinyNet(3, c_in=3), wrap
    def forward(self, x): return self.wrap(self.net(x))

@pytest.mark.parametrize('wrap,key', [(lambda o: dict(logits=o, extra=o.sum()), 'logits'), (lambda o: (o.sum(), o), 1)], ids=['dict', 'tuple'])
def test_outputs_by_key(wrap, key):
    x = batch(size=64)
    assert torch.equal(gradcam(Keyed(wrap), x, output=key).raw[0], gradcam(TinyNet(3, c_in=3), x).raw[0])
    with pytest.raises(ValueError, match='output=KEY'): gradcam(Keyed(wrap), x)
    with pytest.raises(ValueError, match="No output 'scores'"): gradcam(Keyed(wrap), x, output='scores')

# probabilities

def test_act_with_one_output():
    net, x = TinyNet(1, c_in=3), batch(size=64)
    with torch.no_grad(): z = net(x)
    p = (z+3)/10
    torch.testing.assert_close(gradcam(net, x, act=lambda o: (o+3)/10).probs, torch.cat([1-p, p], 1))

ENDS = [(nn.Sigmoid(), torch.sigmoid), (nn.Softmax(1), lambda o: o.softmax(1)), (nn.LogSoftmax(1), lambda o: o.softmax(1)), (nn.Identity(), lambda o: o.softmax(1))]

@pytest.mark.parametrize('end,probs', ENDS, ids=['sigmoid', 'softmax', 'log_softmax', 'scores'])
def test_networks_that_end_in_probabilities(end, probs):
    net, x = TinyNet(3, c_in=3), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): p = probs(net(x))
    torch.testing.assert_close(gradcam(nn.Sequential(net, end), x).probs, p)

@pytest.mark.parametrize('loss', [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, nn.CrossEntropyLoss()], ids=['module', 'function', 'softmax'])
def test_losses_without_an_activation(tiny_learner, loss):
    learn = make_tiny(tiny_learner.dls)
    learn.loss_func = loss
    x, = learn.dls.test_dl(list(learn.dls.train.items)[:2], num_workers=0).one_batch()
    with torch.no_grad(): z = learn.model(x.as_subclass(torch.Tensor))
    expected = z.softmax(1) if isinstance(loss, nn.CrossEntropyLoss) else z.sigmoid()
    torch.testing.assert_close(gradcam(learn, x).probs, expected)

# weights drawn anew

class RMSNorm(nn.Module):
    def __init__(self, c): super().__init__(); self.weight = nn.Parameter(torch.rand(c)+.5)
    def forward(self, x): return x*self.weight[:, None, None]/x.pow(2).mean(1, keepdim=True).add(1e-6).sqrt()

class LayerScale(nn.Module):
    def __init__(self, c): super().__init__(); self.gamma = nn.Parameter(torch.rand(c)+.5)
    def forward(self, x): return x*self.gamma[:, None, None]

@pytest.mark.parametrize('scale', [RMSNorm, LayerScale])
def test_scales_drawn_anew_do_not_silence(scale):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, 2), scale(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval(), batch(size=32)
    for _ in randomized(net):
        with torch.no_grad(): assert net(x).std(0).min() > 0
    table = randomization(net, x, 1)
    assert (table.n == 2).iloc[:3].all() and table['mean'].iloc[:3].notna().all()

class Dead(nn.Module):
    "Its maps are constant"
    def __init__(self): super().__init__(); self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.conv(torch.ones_like(x)*x.mean((2, 3), keepdim=True)).mean((2, 3)))

def test_constant_maps_do_not_count():
    table = randomization(Dead().eval(), batch(size=16), 1, 'conv')
    assert (table.n == 0).all() and table['mean'].isna().all()

# what used to stop

def test_a_crop_at_validation_has_no_way_back(tmp_path):
    files = [tmp_path/'a.png', tmp_path/'b.png']
    for o in files: marked(o, 100, 100, 50, 50)
    learn = learner(files, 96, 'squish', tfm=Resize(96))
    learn.dls.valid.after_batch.add(RandomResizedCropGPU(64))
    h = gradcam(learn, files)
    with pytest.raises(ValueError, match='^RandomResizedCropGPU is among the transforms'): h.native(0)

@pytest.mark.parametrize('f', [gradcam, cam])
def test_weights_that_are_nan(f):
    net = TinyNet(3, c_in=3)
    with torch.no_grad(): net[4][0].weight[0] = math.nan
    with pytest.raises(ValueError, match='image 0, image 1: the network gives NaN or infinity for 2 images'): f(net, batch(size=64))

class Again(nn.Module):
    "Its last stages run again on the way back"
    def __init__(self, again, reentrant=False):
        super().__init__()
        self.net, self.again, self.reentrant = TinyNet(3, c_in=3), again, reentrant
    def forward(self, x):
        net = list(self.net)
        first, again, last = (nn.Sequential(*o) for o in (net[:5], net[5:8], net[8:]))
        x = first(x)
        return last(checkpoint(again, x, use_reentrant=self.reentrant) if self.again else again(x))

@pytest.mark.parametrize('n', [2, 6])
@pytest.mark.parametrize('layers', [None, ['net.4'], ['net.4', 'net.6']])
def test_activation_checkpointing(n, layers):
    x = batch(n, size=64)
    for a, b in zip(gradcam(Again(True), x, layers=layers).raw, gradcam(Again(False), x, layers=layers).raw): nearly(a, b, 1e-5)

class Ensemble(nn.Module):
    "The mean of several heads' scores, by `torch.func.vmap`"
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Sequential(*list(TinyNet(3, c_in=3))[:8]), nn.BatchNorm2d(16)
        self.mean, self.weight = nn.Parameter(torch.randn(3, 16)*.1), nn.Parameter(torch.randn(3, 16, 2))
    def forward(self, x):
        x = self.body(x)
        def head(mean, weight): return F.batch_norm(x-mean[:, None, None], self.norm.running_mean, self.norm.running_var).mean((2, 3))@weight
        return torch.func.vmap(head)(self.mean, self.weight).mean(0)

@pytest.mark.parametrize('n', [2, 6])
def test_ensembles_of_torch_func(n):
    torch.manual_seed(0)
    net, x = Ensemble().eval(), batch(n, size=64)
    h = gradcam(net, x, layers='body.7')
    for k in range(2): nearly(h.raw[0][:, k], by_autograd(net, 'body.7', x, k, ('nchw', 0)), 1e-5)

def test_compiled_models():
    net, x = TinyNet(3, c_in=3), batch(size=64)
    assert torch.equal(gradcam(torch.compile(net, backend='eager'), x, layers=[net[6]]).raw[0], gradcam(net, x, layers='6').raw[0])

def test_scripted_models():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch.jit is going
        net = torch.jit.trace(TinyNet(3, c_in=3), batch(size=64))
    with pytest.raises(ValueError, match='Pass the nn.Module that it was made of'): gradcam(net, batch(size=64))

class Bare(nn.Module):
    "No weights at all"
    def __init__(self): super().__init__(); self.pool = nn.AvgPool2d(8)
    def forward(self, x): return self.pool(x).pow(2).mean((2, 3))

def test_models_without_weights():
    x = batch(size=64)
    nearly(gradcam(Bare(), x, [1], 'pool').raw[0][:, 0], by_autograd(Bare(), 'pool', x.requires_grad_(), 1, ('nchw', 0)), 1e-5)

def test_dynamically_quantised_models():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch.ao is going
        net = torch.ao.quantization.quantize_dynamic(TinyNet(3, c_in=3), {nn.Linear})
    with pytest.raises(ValueError, match='quantised model, explain the one that it was made of'): gradcam(net, batch(size=64))

# whatever holds the images

def test_items_of_all_kinds(tiny_learner, folder):
    files = list(tiny_learner.dls.valid.items)[:3]
    h = gradcam(tiny_learner, files)
    kinds = dict(strings=[str(o) for o in files], table=pd.DataFrame(dict(file=files)), datasets=[read_dicom(o) for o in files],
        arrays=[(dicom_pixels(o)*255).round().astype(np.uint8) for o in files])
    kinds['pictures'] = [Image.fromarray(o) for o in kinds['arrays']]
    for kind, items in kinds.items():
        g = gradcam(tiny_learner, items)
        assert (g.items == files) == (kind in ('strings', 'table')), kind
        torch.testing.assert_close(g.images, h.images, rtol=0, atol=1e-2)
        nearly(g.raw[0], h.raw[0], .2)
    assert torch.equal(gradcam(tiny_learner.model, h.inputs.numpy()).raw[0], gradcam(tiny_learner.model, h.inputs).raw[0])
    with pytest.raises(ValueError, match='A table needs a column file'): gradcam(tiny_learner, pd.DataFrame(dict(path=files)))

def test_a_loader_and_a_folder(tiny_learner, folder):
    valid = gradcam(tiny_learner, tiny_learner.dls.valid)
    assert valid.items == list(tiny_learner.dls.valid.items)
    assert torch.equal(valid.raw[0], gradcam(tiny_learner, list(tiny_learner.dls.valid.items)).raw[0])
    assert len(gradcam(tiny_learner, folder)) == 30

def test_batches_one_after_another(tiny_learner):
    net, x = TinyNet(3, c_in=3), batch(70, size=64)
    parts = list(gradcam(net, x, 1, batches=True))
    assert [len(o) for o in parts] == [64, 6]
    assert torch.equal(torch.cat([o.raw[0] for o in parts]), gradcam(net, x, 1).raw[0])
    files = list(tiny_learner.dls.train.items)
    assert [f for o in gradcam(tiny_learner, files, batches=True) for f in o.items] == files

def test_between_two_batches_the_model_is_as_found():
    net = TinyNet(3, c_in=3).train()
    before = state(net)
    for _ in gradcam(net, batch(70, size=64), 1, batches=True): assert same(state(net), before)

def test_heatmaps_pickle_without_the_model():
    net = TinyNet(3, c_in=3)
    h = gradcam(net, batch(size=64), layers=[net[6]])
    saved = pickle.dumps(h)
    assert b'TinyNet' not in saved and b'Conv2d' not in saved
    again = pickle.loads(saved)
    assert again.layer('6') == 0 and torch.equal(again.raw[0], h.raw[0]) and h.layer(net[6]) == 0

# CAM where an activation stands between the last convolution and the pooling

@pytest.mark.parametrize('library,name', [('timm', 'tinynet_d'), ('timm', 'mobilenetv2_035'), ('torchvision', 'mobilenet_v2'), ('torchvision', 'efficientnet_b0'),
                                          ('torchvision', 'densenet121')])
def test_cam_after_the_last_activation(library, name):
    net, x = lively(network(library, name)), batch(size=96)
    h = cam(net, x)
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad(): torch.testing.assert_close(h.raw[0].mean((2, 3))+head.bias, net(x), rtol=1e-3, atol=1e-4*h.raw[0].abs().max().item())

def test_a_network_that_was_explained_goes():
    "What is remembered of a network's layers does not keep the network"
    net = TinyNet()
    gradcam(net, torch.zeros(1, 1, 64, 64) + torch.arange(64)/64, classes=0)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None

# --- what a stranger found ---

class Finished(nn.Module):
    "Ends in probabilities, in one of many spellings."
    def __init__(self, end):
        super().__init__()
        self.conv, self.end = nn.Conv2d(1, 3, 3), end
    def forward(self, x): return self.end(self.conv(x).mean((2, 3)))

@pytest.mark.parametrize('end', [torch.special.expit, lambda z: z.sigmoid().clone(), lambda z: z.sigmoid().double().float(), lambda z: z.softmax(1).clamp(0, 1),
    F.hardsigmoid, lambda z: z.sigmoid()[:, :], lambda z: z.sigmoid()[:, :].clone(), lambda z: torch.clamp(input=z.sigmoid(), min=0, max=1)])
def test_probabilities_in_other_spellings_are_not_squashed_again(end):
    torch.manual_seed(0)
    net, x = Finished(end).eval(), torch.rand(2, 1, 8, 8)
    for h in gradcam(net, x), gradcam(net, x, layers='conv'), occlusion(net, x): assert torch.equal(h.probs, net(x).detach())

def test_a_part_that_is_replaced_is_not_explained_any_more():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Identity()
        def forward(self, x): return self.b(self.a(x)).mean((2, 3))
    net, x = Two().eval(), torch.rand(2, 1, 12, 12)
    assert gradcam(net, x).layers == ['a']
    net.b = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid())
    assert gradcam(net, x).layers == gradcam(copy.deepcopy(net), x).layers != ['a']

def test_as_many_targets_as_images():
    net, x = Finished(nn.Identity()).eval(), torch.rand(3, 1, 8, 8)
    for target in ([0, 1, 2, 0], [0, 1]):
        with pytest.raises(ValueError, match='one class for each image'): gradcam(net, x, target=target)
        with pytest.raises(ValueError, match='one class for each image'): list(gradcam(net, x, target=target, batches=True))

def test_a_black_first_image_does_not_decide_for_all():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(2, 1, 12, 12)
    if not net(x).abs().sum(): net[2].weight.data.abs_()
    x[0] = 0
    assert gradcam(net, x).layers == gradcam(copy.deepcopy(net), x.flip(0)).layers

def test_a_layer_that_returns_a_named_tuple():
    Named = collections.namedtuple('Named', 'maps')
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
        def forward(self, x): return Named(self.conv(x))
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = Names()
        def forward(self, x): return self.l(x).maps.mean((2, 3))
    net, x = Net().eval(), torch.rand(2, 1, 8, 8)
    assert torch.equal(gradcam(net, x, layers='l').raw[0], gradcam(net, x, layers='l.conv').raw[0])

def test_two_models_that_share_layers_and_the_random_state():
    "The second begins while the first is at work; each is left as it was found, and so are the random numbers"
    torch.manual_seed(0)
    back = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    nets = [nn.Sequential(back, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).train() for _ in range(2)]
    x = torch.rand(2, 1, 12, 12)
    wanted = [gradcam(o, x).raw[0] for o in nets]
    torch.manual_seed(7)
    after, wrong = torch.rand(3), []
    torch.manual_seed(7)
    def ask(k):
        for _ in range(10):
            if not torch.equal(gradcam(nets[k], x).raw[0], wanted[k]): wrong.append(k)
    threads = [threading.Thread(target=ask, args=[k]) for k in range(2)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert not wrong and back.training and all(p.requires_grad for p in back.parameters())
    assert torch.equal(torch.rand(3), after)

def test_deletion_of_one_output_of_several():
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
        def forward(self, x): return dict(logits=self.conv(x).mean((2, 3)), more=x)
    net, x = Dict().eval(), torch.rand(2, 1, 16, 16)
    h = gradcam(net, x, output='logits')
    assert deletion(net, h, 0, steps=2, output='logits')['mean'].between(0, 1).all()
    with pytest.raises(ValueError, match='output=KEY'): deletion(net, h, 0, steps=2)

def test_volumes_have_no_boxes():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    h = gradcam(net, torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match='Volumes and signals have no boxes'): h.boxes(0)
    with pytest.raises(ValueError, match='Volumes and signals'): deletion(net, h, 0)

@pytest.mark.parametrize('end', [lambda z: 1/(1+torch.exp(-z)), lambda z: (1+(-z).exp()).reciprocal(), lambda z: (1+torch.exp(-z))**-1, lambda z: z.exp()/(1+z.exp()),
    lambda z: z.exp()/z.exp().sum(1, keepdim=True), lambda z: z.log_softmax(1).exp(), lambda z: torch.stack([z.softmax(1), (2*z).softmax(1)]).mean(0),
    lambda z: (z.sigmoid()+(2*z).sigmoid())/2, lambda z: 1-z.sigmoid()])
def test_probabilities_by_hand_are_not_squashed_again(end): test_probabilities_in_other_spellings_are_not_squashed_again(end)

@pytest.mark.parametrize('end', [lambda z: z.exp()/2, lambda z: z/(1+z.exp()), lambda z: z.softmax(1)*z, lambda z: 4*z.sigmoid(), lambda z: 1+z.exp(), lambda z: z.exp()])
def test_what_only_looks_like_a_probability(end):
    torch.manual_seed(0)
    net, x = Finished(end).eval(), torch.rand(2, 1, 8, 8)
    for h in gradcam(net, x), gradcam(net, x, layers='conv'), occlusion(net, x): assert torch.equal(h.probs, net(x).detach().softmax(1))

@pytest.mark.parametrize('cls', [True, False, np.True_, [0, True]])
def test_yes_and_no_are_no_classes(cls):
    for how in dict(classes=cls), dict(target=[cls]*2):
        with pytest.raises(ValueError, match='No class .*there are 0, 1'): gradcam(TinyNet(), torch.rand(2, 1, 64, 64), **how)
    assert find_class(True, [False, True]) == 1 # where a class is called so

def test_yes_and_no_ask_for_no_map():
    h = gradcam(TinyNet(), torch.rand(2, 1, 64, 64))
    for cls in True, False, np.True_:
        for ask in h.cls, h.native, h.heat, h.boxes:
            with pytest.raises(ValueError, match='No class (np.)?(True|False).*; there are 0, 1'): ask(0, cls)
    h.classes = h.vocab = [False, True]
    assert [h.cls(0, o) for o in (True, False)] == [1, 0]

@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'CMYK'])
def test_an_image_of_four_channels(tiny_learner, mode):
    with pytest.raises(ValueError, match=r"\(rows, columns, 3\), not .*im.convert\('RGB'\)"): gradcam(tiny_learner, Image.new(mode, (64, 64)))

def test_a_palette_is_not_its_numbers(tiny_learner):
    im = Image.fromarray(np.arange(64*64).reshape(64, 64).astype(np.uint8)).convert('RGB').quantize(8)
    assert torch.equal(gradcam(tiny_learner, im).images, gradcam(tiny_learner, im.convert('RGB')).images)

@pytest.mark.parametrize('reentrant, layers', [(False, 'net.6'), (True, 'net.4'), (True, 'net.6')])
@pytest.mark.filterwarnings('ignore:None of the inputs')
def test_layers_that_checkpointing_loses(reentrant, layers):
    with pytest.raises(ValueError, match=f'(?i)^[^\n]*{layers}[^\n]*switch (that|activation checkpointing) off[^\n]*$'):
        gradcam(Again(True, reentrant), batch(6, size=64), layers=layers)
