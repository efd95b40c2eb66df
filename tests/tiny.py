"A tiny network for tests that need some network, not one that has learnt anything: made in no time, the same on any machine."
import torch
from torch import nn

def _conv(n_in, n_out, stride=1):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

class TinyNet(nn.Sequential):
    """Twelve children, as fastai's xresnets have: a stem of three convolutions, pooling, four stages of strides 4, 8, 16 and 32
    (`model[-8]` to `model[-5]`), average, flatten, dropout, linear layer. 5,000 weights, drawn with `seed`; in evaluation mode."""
    def __init__(self, n_out=2, seed=0, c_in=1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(_conv(c_in, 4, 2), _conv(4, 4), _conv(4, 8), nn.MaxPool2d(3, 2, padding=1),
                _conv(8, 8), _conv(8, 8, 2), _conv(8, 16, 2), _conv(16, 16, 2),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(16, n_out))
            self.know(torch.rand(8, c_in, 64, 64))

    @torch.no_grad()
    def know(self, x):
        "Set batch norms and the last layer's bias so that the scores of the images `x` spread about zero."
        norms = [o for o in self.modules() if isinstance(o, nn.BatchNorm2d)]
        for o in norms: o.momentum = 1.
        self.train()(x)
        for o in norms: o.momentum = .1
        nn.init.zeros_(self[-1].bias)
        scores = self.eval()(x)
        scale = 1/scores.std(0).clamp(min=1e-3)
        self[-1].weight.mul_(scale[:, None])
        self[-1].bias.copy_(-(scores*scale).mean(0))

def make_tiny(dls, seed=0):
    "A learner as `dicom_learner` makes it for `dls`, from `dicom_dls`, but with a `TinyNet`; not trained, in evaluation mode."
    from dicomcam.networks import Network, dicom_learner
    learn = dicom_learner(dls, 'xresnet18', amp=False)
    images = torch.cat([x for x, in dls.test_dl(list(dls.train.items), num_workers=0)]).cpu()
    learn.model = TinyNet(len(dls.vocab), seed)
    learn.model.know(images.as_subclass(torch.Tensor))
    learn.model.to(dls.device)
    learn.network = Network('TinyNet', 'ReLU', False)
    return learn
