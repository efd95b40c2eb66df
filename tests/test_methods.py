"EigenGrad-CAM, ShapleyCAM and Finer-CAM: each as pytorch-grad-cam has it, and as its formula has it, by another road"
import pytest, torch
from fastai.vision.all import Mish, xresnet18
from test_cam import batch, lively
from test_gradcam import activation_and_gradient, nearly
from tiny import TinyNet
from torch import nn
from torch.nn import functional as F

from dicomcam.gradcam import gradcam
from dicomcam.methods import METHODS, SCORES

def net_of(n_out=5):
    "A network whose score bends above stage 6: Mish, in float64"
    torch.manual_seed(0)
    return lively(xresnet18(n_out=n_out, act_cls=Mish)).double().eval()

@pytest.fixture(scope='module')
def net(): return net_of()

def images(size=64): return batch(2, size=size).double()

def peer_of(name):
    "A method of pytorch-grad-cam that keeps its map as it is before the ReLU"
    peer = pytest.importorskip('pytorch_grad_cam')
    class Kept(getattr(peer, name)):
        def get_cam_image(self, *args):
            self.raw = super().get_cam_image(*args)
            return self.raw
    return Kept

def targets(k):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    return [ClassifierOutputTarget(k)]*2

def rest(out, k=1):
    "The score that the paper of ShapleyCAM recommends"
    return out[:, k] + out.log_softmax(1)[:, k]

# as pytorch-grad-cam has them

@pytest.mark.parametrize('layer', ['5', '6', '7'])
def test_eigengradcam_as_pytorch_grad_cam_has_it(net, layer):
    with peer_of('EigenGradCAM')(net, [net.get_submodule(layer)]) as extract:
        extract(images(), targets(1))
        theirs = torch.as_tensor(extract.raw)
    ours = gradcam(net, images(), 1, layer, 'eigengradcam').raw[0][:, 0]
    turned = (ours*theirs).sum((1, 2), keepdim=True).sign() # theirs has whichever sign the decomposition had
    nearly(ours*turned, theirs, 1e-5)

@pytest.mark.parametrize('target', [None, rest])
@pytest.mark.parametrize('layer', ['5', '6', '7'])
def test_shapleycam_as_pytorch_grad_cam_has_it(net, layer, target):
    with peer_of('ShapleyCAM')(net, [net.get_submodule(layer)]) as extract:
        extract(images(), [lambda out: rest(out[None])[0]]*2 if target else targets(1))
        theirs = torch.as_tensor(extract.raw)
    ours = gradcam(net, images(), None if target else 1, layer, 'shapleycam', target=target)
    nearly(ours.raw[0][:, 0], theirs, 1e-5)

@pytest.mark.parametrize('n_out', [2, 3, 5])
def test_finercam_as_pytorch_grad_cam_has_it(n_out):
    kept, net = peer_of('GradCAM'), net_of(n_out)
    net[-1].weight.data.div_(20) # theirs adds 1e-9 to the probabilities' sum, which counts where a network is sure
    from pytorch_grad_cam import FinerCAM
    ours = gradcam(net, images(), layers='6', method='finercam')
    for k in range(n_out):
        with FinerCAM(net, [net[6]], base_method=kept) as extract:
            extract(images(), target_idx=k)
            nearly(ours.raw[0][:, k], torch.as_tensor(extract.base_cam.raw), 1e-5)

# by another road

@pytest.mark.parametrize('layer', ['5', '7'])
def test_eigengradcam_is_the_principal_component(net, layer):
    ours = gradcam(net, images(), 1, layer, 'eigengradcam').raw[0][:, 0].double()
    a, g = activation_and_gradient(net, layer, images(), 1)
    for i in range(2):
        x = (g[i]*a[i]).flatten(1)
        covariance = torch.cov(x)
        _, vectors = torch.linalg.eigh(covariance)
        m = vectors[:, -1] @ (x-x.mean(1, keepdim=True))
        nearly(ours[i].flatten(), m*(m @ x.sum(0)).sign(), 1e-5)
        assert (ours[i]*x.sum(0).view_as(ours[i])).sum() > 0

def gradient_at(net, layer, x, score, step):
    "Activation of a layer, and the gradient of the score where that activation is `1+step` times itself"
    kept = {}
    def swap(module, inp, out):
        kept['a'] = out.detach()
        kept['leaf'] = (out.detach()*(1+step)).requires_grad_()
        return kept['leaf'].clone()
    with net.get_submodule(layer).register_forward_hook(swap): total = score(net(x)).sum()
    return kept['a'], *torch.autograd.grad(total, kept['leaf'])

def shapley_written_out(net, layer, x, score, step=1e-4):
    "Hessian times activation by differences: how the gradient changes along the activation"
    (a, up), (_, down), (_, g) = (gradient_at(net, layer, x, score, o) for o in (step, -step, 0.))
    weight = (g - .5*(up-down)/(2*step)).mean((2, 3), keepdim=True)
    return (weight*a).sum(1)

@pytest.mark.parametrize('target', [None, rest])
def test_shapleycam_against_differences(net, target):
    def score(out): return rest(out) if target else out[:, 1]
    several = ['5', '6', '7']
    h = gradcam(net, images(), None if target else 1, several, 'shapleycam', target=target)
    for layer, raw in zip(several, h.raw): nearly(raw[:, 0], shapley_written_out(net, layer, images(), score), 1e-5)
    plain = gradcam(net, images(), None if target else 1, '5', target=target)
    assert (h.raw[0]-plain.raw[0]).abs().max() > .01*plain.raw[0].abs().max() # the second derivatives do something

def test_shapleycam_is_gradcam_where_the_score_does_not_bend():
    net, x = TinyNet(3, c_in=3), batch(size=64)
    assert torch.equal(gradcam(net, x, layers='7', method='shapleycam').raw[0], gradcam(net, x, layers='7').raw[0])

@pytest.mark.parametrize('n', [2, 5])
def test_shapleycam_of_a_batch_is_that_of_its_images(n):
    net, x = net_of().float(), batch(n, size=64)
    h = gradcam(net, x, layers=['5', '6'], method='shapleycam')
    for i in range(n):
        one = gradcam(net, x[i:i+1], layers=['5', '6'], method='shapleycam')
        for a, b in zip(one.raw, h.raw): nearly(a[0], b[i], 1e-4)

class Attends(nn.Module):
    "Fused attention, which has no second derivative of its own"
    def __init__(self): super().__init__(); self.conv, self.qkv, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 24), nn.Linear(8, 3)
    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))

def test_shapleycam_through_attention():
    torch.manual_seed(0)
    net = Attends().double().eval()
    ours = gradcam(net, images(), 1, 'conv', 'shapleycam').raw[0][:, 0]
    nearly(ours, shapley_written_out(net, 'conv', images(), lambda out: out[:, 1]), 1e-5)

def finer_written_out(scores, k):
    "One image at a time, as the paper and pytorch-grad-cam have it"
    found = []
    for s in scores:
        p = s.softmax(0)
        near = sorted((d for d in range(len(s)) if d != k), key=lambda d: (s[d]-s[k]).abs().item())[:3]
        found.append(sum(p[d]*(s[k]-s[d]) for d in near)/sum(p[d] for d in near))
    return torch.stack(found)

def test_finercam_against_its_formula(net):
    h = gradcam(net, images(), layers='6', method='finercam')
    torch.testing.assert_close(h.probs, net(images()).softmax(1).detach().float())
    for k in range(5):
        a, g = gradient_at(net, '6', images(), lambda out: finer_written_out(out, k), 0.)
        nearly(h.raw[0][:, k], (g.mean((2, 3), keepdim=True)*a).sum(1), 1e-5)

def test_finercam_of_targets_and_of_two_classes(net):
    h = gradcam(net, images(), layers='6', method='finercam')
    for target, columns in (('predicted', h.probs.argmax(1)), ([3, 0], torch.tensor([3, 0]))):
        g = gradcam(net, images(), layers='6', method='finercam', target=target)
        nearly(g.raw[0][:, 0], h.raw[0][torch.arange(2), columns], 1e-5)
    one = gradcam(TinyNet(1, c_in=3), batch(size=64), layers='6') # a single logit: z and -z, 2z apart
    both = gradcam(TinyNet(1, c_in=3), batch(size=64), layers='6', method='finercam')
    nearly(both.raw[0], 2*one.raw[0], 1e-5)
    with pytest.raises(ValueError, match='finercam compares classes, and a function is none'):
        gradcam(net, images(), method='finercam', target=lambda out: out[:, 0])

def test_finercam_of_a_network_that_is_sure():
    "Probabilities too small for float32 leave their ratios: the map does not vanish"
    scores = torch.tensor([[0., 200, -40, -10]])
    f = SCORES['finercam']
    torch.testing.assert_close(f(scores, torch.tensor([1])), torch.tensor([200.]), rtol=1e-4, atol=0)

# the table

def test_an_entry_comes_apart_as_ever():
    f, grad = METHODS['gradcam']
    assert grad is True and f(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)).shape == (1, 3, 3)
