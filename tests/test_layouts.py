"Networks of all kinds against autograd by hand and other libraries; what used to be wrong without a word, or stopped"
import math, pickle, warnings
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

def test_the_walk_is_long(): assert len({o[1] for o in WALK}) >= 60

def test_shuffled_tokens_have_no_places():
    with pytest.raises(ValueError, match='layers=, layout='): gradcam(network('timm', 'hiera_tiny_224'), batch(1, size=224), classes=[0])
