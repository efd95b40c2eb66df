"CAM, `Heatmaps` and the engine below them: exact maps, the way back to the original, a model left as it was found"
import random
from types import SimpleNamespace
from unittest import mock

import numpy as np, pytest, torch
from fastai.vision.all import (CategoryBlock, CropPad, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Mish, Normalize, PILImageBW,
                               RandomResizedCrop, RatioResize, Resize, create_vision_model, xresnet18, xresnet50)
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tiny import TinyNet
from torchvision.models import densenet121, mobilenet_v3_small, resnet18, squeezenet1_0, squeezenet1_1

from dicomcam.cam import cam
from dicomcam.classifier import Classifier
from dicomcam.explain import _modules, as_found, outputs_of, view_of
from dicomcam.heatmaps import Heatmaps, read_mask
from dicomcam.layers import fine_stage, first_fine, last_stages, layer_name
from dicomcam.maps import positive, to_unit, upsample
from dicomcam.gradcam import gradcam

def lively(net, seed=0):
    "Normalisation layers as after training, rather than the identity"
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            for t, lo, hi in ((m.running_mean, -.2, .2), (m.running_var, .5, 2), (m.weight.data, .5, 1.5), (m.bias.data, -.2, .2)):
                t.copy_(torch.rand(t.shape, generator=g)*(hi-lo)+lo)
    return net

def batch(n=2, c=3, size=96, seed=0): return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))

def make(name):
    torch.manual_seed(0)
    return lively(dict(xresnet18=lambda: xresnet18(n_out=3, act_cls=Mish, sa=True), xresnet50=lambda: xresnet50(n_out=3, act_cls=Mish, sa=True),
                       resnet18=lambda: resnet18(num_classes=3), densenet121=lambda: densenet121(num_classes=3))[name]())

@pytest.mark.parametrize('name', ['xresnet18', 'xresnet50', 'resnet18', 'densenet121'])
def test_cam_adds_up_to_the_score_and_is_gradcam_times_positions(name):
    net, x = make(name).eval(), batch()
    h = cam(net, x)
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad(): out = net(x)
    torch.testing.assert_close(h.raw[0].mean((2, 3)) + head.bias.detach(), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.probs, out.softmax(1))
    # in a DenseNet a ReLU stands between stage and pooling: there it is HiResCAM that is CAM / (h*w)
    g = gradcam(net, x, method='hirescam' if name == 'densenet121' else 'gradcam')
    assert g.layers == h.layers
    torch.testing.assert_close(h.raw[0], g.raw[0]*h.raw[0][0, 0].numel(), rtol=1e-4, atol=1e-5*h.raw[0].abs().max().item())

class Flat(nn.Module):
    "Ends in a linear layer on all positions: no pooling"
    def __init__(self): super().__init__(); self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU()), nn.Linear(4*47*47, 2)
    def forward(self, x): return self.head(self.body(x).flatten(1))

class MaxPooled(Flat):
    def __init__(self): super().__init__(); self.head = nn.Linear(4, 2)
    def forward(self, x): return self.head(self.body(x).amax((2, 3)))

class Scaled(MaxPooled):
    "GAP and one linear layer, but the scores are not what that gives"
    def forward(self, x): return 2*self.head(self.body(x).mean((2, 3)))

def conv_after_pooling():
    timm = pytest.importorskip('timm')
    return timm.create_model('mobilenetv3_small_050', num_classes=2)

@pytest.mark.parametrize('net', [Flat, MaxPooled, Scaled, conv_after_pooling, lambda: mobilenet_v3_small(num_classes=2),
                                 lambda: create_vision_model(resnet18, 2, pretrained=False)])
def test_cam_refuses_another_head(net):
    with pytest.raises(ValueError, match='another head. Use gradcam'): cam(net(), batch())

class Convs(nn.Module):
    "No linear layer at all: a map for each class"
    def __init__(self): super().__init__(); self.first, self.conv = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 2, 1)
    def forward(self, x): return self.conv(self.first(x).relu()).mean((2, 3))

@pytest.mark.parametrize('make_net', [Convs, lambda: squeezenet1_1(num_classes=2), lambda: squeezenet1_0(num_classes=2)])
def test_cam_where_the_last_convolution_has_a_map_for_each_class(make_net):
    torch.manual_seed(0)
    net, x = make_net().eval(), batch()
    h = cam(net, x)
    with torch.no_grad(): torch.testing.assert_close(h.raw[0].mean((2, 3)), net(x))
    assert h.raw[0].shape[2] > 1 and torch.equal(cam(net, x, classes=[1]).raw[0][:, 0], h.raw[0][:, 1])

def test_cam_of_one_map_is_two_classes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    h = cam(net, batch())
    torch.testing.assert_close(h.raw[0].mean((2, 3)), torch.cat([-net(batch()), net(batch())], 1).detach())

@pytest.mark.parametrize('name', ['efficientnet_b0', 'mobilenetv2_050', 'densenet121', 'test_efficientnet'])
def test_cam_after_the_last_activation_in_timm(name):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net, x = lively(timm.create_model(name, num_classes=3, drop_rate=.2)).eval(), batch()
    h = cam(net, x)
    with torch.no_grad(): score = net(x) - net.get_classifier().bias
    torch.testing.assert_close(h.raw[0].mean((2, 3)), score, rtol=1e-3, atol=1e-4*h.raw[0].abs().max().item())

def test_cam_with_a_dropout_before_the_head():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(8, 3))
    h = cam(net, batch())
    with torch.no_grad(): torch.testing.assert_close(h.raw[0].mean((2, 3))+net[-1].bias, net.eval()(batch()))

def test_single_logit_is_two_classes():
    torch.manual_seed(0)
    net = lively(resnet18(num_classes=1)).eval()
    h, g = cam(net, batch()), gradcam(net, batch())
    with torch.no_grad(): p = net(batch()).sigmoid()
    torch.testing.assert_close(h.probs, torch.cat([1-p, p], 1))
    torch.testing.assert_close(h.raw[0][:, 0], -h.raw[0][:, 1])
    torch.testing.assert_close(g.raw[0][:, 0], -g.raw[0][:, 1])
    torch.testing.assert_close(h.raw[0], g.raw[0]*9, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cam(net, batch(), classes=1).raw[0][:, 0], h.raw[0][:, 1])

# steps to a picture

def test_upsample_keeps_edges_together():
    m = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(upsample(m, (50, 70)), F.interpolate(m, (50, 70), mode='bilinear', align_corners=False))
    assert upsample(m[0, 0], (9, 9)).shape == (9, 9) and upsample(m[None], (9, 9)).shape == (1, 2, 3, 9, 9)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('value', [0., 1e-4, 7.3, -6e4])
def test_constant_maps_become_zeros(dtype, value):
    m = torch.full((2, 5, 5), value, dtype=dtype)
    for o in (to_unit(m), to_unit(positive(m)), to_unit(upsample(m, (37, 41)))): assert o.dtype == torch.float32 and (o == 0).all()

def test_to_unit_takes_each_map_by_itself():
    m = torch.rand(3, 4, 6, 6)*torch.tensor([1e-6, 1., 1e6])[:, None, None, None]
    u = to_unit(m)
    assert (u.amax((2, 3)) == 1).all() and (u.amin((2, 3)) == 0).all()
    torch.testing.assert_close(u[1, 2], (m[1, 2]-m[1, 2].min())/(m[1, 2].max()-m[1, 2].min()))
    assert (positive(torch.tensor([-1., 2.])) == torch.tensor([0., 2.])).all()

# the way back

def learner(files, size, method, norm=False, tfm=None):
    "A fastai Learner that is not of `dicom_dls`"
    tfms = [Normalize.from_stats([.3], [.2], cuda=False)] if norm else []
    dls = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=lambda o: o.stem[-1], item_tfms=tfm or Resize(size, method=method),
                    batch_tfms=tfms, splitter=lambda o: ([0, 1], [0, 1])).dataloaders(files, bs=2, num_workers=0)
    return Learner(dls, TinyNet(), loss_func=CrossEntropyLossFlat())

def marked(path, rows, cols, y, x):
    a = np.zeros((rows, cols), np.uint8)
    a[y-30:y+30, x-20:x+20] = 255
    Image.fromarray(a).save(path)
    return a

@pytest.mark.parametrize('method', ['squish', 'crop', 'pad'])
@pytest.mark.parametrize('rows,cols', [(601, 400), (400, 601), (500, 500), (333, 1000)])
@pytest.mark.parametrize('size', [96, (96, 160)])
def test_native_undoes_resize(tmp_path, method, rows, cols, size):
    "The network's own input, taken for a map, must fall on the original's pixels again"
    y, x = rows//2+40, cols//2-30
    a = marked(tmp_path/'a.png', rows, cols, y, x); marked(tmp_path/'b.png', rows, cols, y, x)
    learn = learner([tmp_path/'a.png', tmp_path/'b.png'], size, method)
    xb, = learn.dls.test_dl([tmp_path/'a.png']).one_batch()
    h = Heatmaps([xb[:, :1]], xb, torch.tensor([[1.]]), ['a'], ['in'], 'input', [tmp_path/'a.png'], view_of(learn.dls))
    m = h.native(0).numpy()
    assert m.shape == (rows, cols)
    ys, xs = np.mgrid[:rows, :cols]
    assert abs((m*ys).sum()/m.sum() - (y-.5)) < 1 and abs((m*xs).sum()/m.sum() - (x-.5)) < 1
    _, _, _, (bx, by, bw, bh) = h.where(0)
    assert abs(m.sum()/(a/255).sum() - 1) < .05 and np.abs(m-a/255).mean() < .02
    if method == 'crop': assert m[:max(int(by), 0)].sum() == 0 and m[:, :max(int(bx), 0)].sum() == 0
    else: assert bx <= 0 and by <= 0 and bx+bw >= cols-1 and by+bh >= rows-1

def test_native_says_what_it_cannot_undo(tmp_path):
    files = [tmp_path/'a.png', tmp_path/'b.png']
    for o in files: marked(o, 100, 100, 50, 50)
    for tfm in (RandomResizedCrop(96), [CropPad(96), Resize(96)], RatioResize(96)):
        h = cam(learner(files, 96, 'crop', tfm=tfm), files)
        assert len(h) == 2
        with pytest.raises(ValueError, match="is among the transforms: .* through fastai's Resize only"): h.native(0)
    with pytest.raises(ValueError, match='^CropPad'): cam(learner(files, 96, 'crop', tfm=CropPad(96)), files).where(0)

def test_heat_is_what_a_picture_shows(tmp_path):
    marked(tmp_path/'a.png', 300, 200, 150, 100); marked(tmp_path/'b.png', 300, 200, 150, 100)
    h = cam(learner([tmp_path/'a.png', tmp_path/'b.png'], 96, 'pad'), tmp_path/'a.png')
    for native, m in ((True, h.native(0, 'b')), (False, h.maps[0, 1, 0])):
        heat = h.heat(0, 'b', native=native)
        assert heat.dtype == np.float32 and np.array_equal(heat, to_unit(positive(m)).numpy())
        ax = h.show(0, 'b', native=native).axes[1]
        assert np.array_equal(np.asarray(ax.images[1].get_array()), heat)
    assert h.heat(0).shape == (300, 200)

def test_boxes_in_pixels_and_millimetres(tmp_path):
    import pydicom
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Rows, ds.Columns, ds.PixelSpacing = '1.2.840.10008.5.1.4.1.1.7', '1.2.3', 40, 60, [.2, .5]
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.save_as(tmp_path/'a.dcm', enforce_file_format=True)
    raw = torch.zeros(1, 1, 40, 60); raw[0, 0, 5:15, 20:50] = 1; raw[0, 0, 30:35, 2:6] = .7; raw[0, 0, 20, 20] = .4
    h = Heatmaps([raw], raw, torch.ones(1, 1), ['a'], ['l'], 'test', [tmp_path/'a.dcm'])
    b = h.boxes(0)
    assert b[['x', 'y', 'width', 'height']].values.tolist() == [[20, 5, 30, 10], [2, 30, 4, 5]]
    assert b.width_mm.tolist() == [15, 2] and b.height_mm.tolist() == [2, 1]
    assert b.mass.tolist() == pytest.approx([300/314.4, 14/314.4])
    assert [len(h.boxes(0, at=o)) for o in (.3, .42, .69, .71)] == [3, 2, 2, 1]
    assert len(Heatmaps([raw*0], raw, torch.ones(1, 1), ['a'], ['l'], 'test').boxes(0)) == 0

def test_files_through_a_learner(tmp_path):
    files = [tmp_path/f'{i}{"ab"[i%2]}.png' for i in range(5)]
    for i, f in enumerate(files): marked(f, 200, 300, 60+20*i, 100+10*i)
    learn = learner(files[:2], 96, 'squish', norm=True)
    h = cam(learn, files)
    assert h.items == files and h.classes == ['a', 'b'] and h.maps.shape == (5, 2, 1, 96, 96) and len(h) == 5
    with learn.no_bar(): probs, _ = learn.get_preds(dl=learn.dls.test_dl(files))
    torch.testing.assert_close(h.probs, probs, rtol=1e-4, atol=1e-5)
    assert 0 <= h.images.min() and .99 < h.images.max() <= 1.001
    torch.testing.assert_close(cam(learn, h.inputs).raw[0], h.raw[0], rtol=1e-4, atol=1e-4)
    one = cam(learn, str(files[3]), 'b')
    torch.testing.assert_close(one.raw[0][0, 0], h.raw[0][3, 1], rtol=1e-4, atol=1e-4)
    fig = h.show(2, mask=np.arange(200*300).reshape(200, 300) % 7, native=True)
    assert [a.get_title() for a in fig.axes[1:3]] == [f'{c} {h.probs[2, k]:.2f}, layer 7' for k, c in enumerate('ab')]

def test_overlay_lies_where_the_image_lies(tmp_path):
    marked(tmp_path/'a.png', 300, 200, 150, 100); marked(tmp_path/'b.png', 300, 200, 150, 100)
    learn = learner([tmp_path/'a.png', tmp_path/'b.png'], 96, 'pad')
    h = cam(learn, tmp_path/'a.png')
    for native, extent in ((False, [-50, 250, 300, 0]), (True, [0, 200, 300, 0])):
        ax = h.show(0, native=native).axes[1]
        assert [list(o.get_extent()) for o in ax.images] == [extent, extent]

# what goes wrong says so

@pytest.mark.parametrize('items,match', [
    (torch.randn(3, 96, 96), r'x\[None\]'), (torch.randn(2, 1, 96, 96), 'cannot take a batch of shape'), (torch.zeros(2, 3, 96, 96, dtype=torch.uint8), 'floating'),
    (torch.zeros(0, 3, 96, 96), r'\(n, c, h, w\)'), ('a.dcm', 'need a Learner'), (torch.randn(1, 3, 1, 1), 'larger image')])
def test_items_that_cannot_be(items, match):
    with pytest.raises(ValueError, match=match): cam(resnet18(num_classes=2), items)

def test_missing_files(tmp_path):
    marked(tmp_path/'a.png', 100, 100, 50, 50); marked(tmp_path/'b.png', 100, 100, 50, 50)
    learn = learner([tmp_path/'a.png', tmp_path/'b.png'], 96, 'pad')
    with pytest.raises(FileNotFoundError, match='c.png'): cam(learn, [tmp_path/'a.png', tmp_path/'c.png'])
    with pytest.raises(ValueError, match='No items'): cam(learn, [])

def test_classes_and_layers_that_are_not_there():
    net = resnet18(num_classes=30)
    with pytest.raises(ValueError, match='30 classes'): cam(net, batch())
    with pytest.raises(ValueError, match='No class 30'): cam(net, batch(), 30)
    with pytest.raises(ValueError, match='did you mean layer4.1.conv'): layer_name(net, 'layer4.1.conv')
    with pytest.raises(ValueError, match='children'): layer_name(net, -11)
    with pytest.raises(ValueError, match='No layer Conv2d'): layer_name(net, nn.Conv2d(1, 1, 1))
    assert [layer_name(net, o) for o in (-3, net.layer4, 'layer4')] == ['layer4']*3

def test_stages_that_a_report_offers():
    assert last_stages(xresnet18(), '7') == ['5', '6', '7'] and last_stages(TinyNet(), '7', n=2) == ['6', '7']
    assert last_stages(nn.Sequential(TinyNet()), '0.7') == ['0.5', '0.6', '0.7']
    assert last_stages(resnet18(), 'layer4') == ['layer2', 'layer3', 'layer4']
    assert last_stages(nn.Sequential(nn.Conv2d(1, 1, 3)), '0') == ['0']

@pytest.mark.parametrize('sizes,first', [([40, 20, 10], 'b'), ([40, 20, 16], 'c'), ([8, 4, 2], 'a'), ([15, 16, 15], 'b')])
def test_first_fine_layer(sizes, first): assert first_fine('abc', sizes) == first

@pytest.mark.parametrize('size,stage', [(64, -8), (127, -8), (128, -7), (256, -6), (400, -6), (511, -6), (512, -5), (1024, -5)])
def test_fine_stage_of_an_xresnet(size, stage):
    learn = SimpleNamespace(network=SimpleNamespace(arch='xresnet50'), dls=SimpleNamespace(setup=SimpleNamespace(size=size)))
    assert fine_stage(learn) == stage
    learn.network.arch = 'resnet18'
    assert fine_stage(learn) is None

class Pair(nn.Module):
    def __init__(self): super().__init__(); self.net = resnet18(num_classes=2)
    def forward(self, x): return self.net(x), x

def test_scores_of_another_shape():
    with pytest.raises(ValueError, match='got a tuple of 2'): gradcam(Pair(), batch())

# the model comes back as it went in

def state(net):
    return ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], [p.grad for p in net.parameters()],
            [len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in net.modules()],
            {k: v.clone() for k, v in net.state_dict().items()}, torch.is_grad_enabled())

def same(a, b): return a[:4] == b[:4] and a[5] == b[5] and all(torch.equal(v, b[4][k]) for k, v in a[4].items())

def randoms(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

class Breaks(nn.Module):
    def forward(self, x): raise KeyError('broken on purpose')

@pytest.mark.parametrize('f', [cam, gradcam])
@pytest.mark.parametrize('breaks', [False, True])
def test_model_is_left_as_found(f, breaks, tmp_path):
    net = resnet18(num_classes=2).train()
    net.layer2.eval(); net.layer1.requires_grad_(False)
    if breaks: net.avgpool = Breaks()
    before, rng = state(net), randoms()
    if breaks:
        with pytest.raises(KeyError): f(net, batch())
    else: f(net, batch())
    assert same(state(net), before) and randoms() == rng

def test_learner_is_left_as_found(tmp_path):
    for o in 'ab': marked(tmp_path/f'{o}.png', 100, 100, 50, 50)
    learn = learner([tmp_path/'a.png', tmp_path/'b.png'], 96, 'pad')
    learn.model.train()
    before, rng = state(learn.model), randoms()
    gradcam(learn, [tmp_path/'a.png', tmp_path/'b.png'])
    assert same(state(learn.model), before) and randoms() == rng

class Meddles(nn.Module):
    "Sets modes and gradients of its own parts"
    def __init__(self): super().__init__(); self.net = resnet18(num_classes=2)
    def forward(self, x):
        out = self.net(x)
        self.net.avgpool.train()
        self.net.layer2.requires_grad_(True)
        return out

@pytest.mark.parametrize('f', [cam, gradcam])
@pytest.mark.parametrize('training', [False, True])
def test_what_a_network_does_to_itself_is_undone(f, training):
    net = Meddles().train(training).requires_grad_(False)
    before = state(net)
    f(net, batch())
    assert same(state(net), before)

ENDS = [nn.Softmax(1), nn.Sigmoid(), nn.LogSoftmax(1), nn.LogSigmoid(), nn.Identity(), nn.Sequential(nn.Softmax(1), nn.Flatten(0), nn.Unflatten(0, (2, 3)))]

@pytest.mark.parametrize('end', ENDS, ids=str)
def test_an_output_is_read_alike_with_and_without_a_graph(end):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), end), torch.randn(2, 3, 2, 2)
    with torch.no_grad(): watched = Classifier(net).asked(x)
    asked = Classifier(net).asked(x, graph=True)
    assert asked.scores[0].requires_grad and torch.equal(asked.values, watched.values)

def test_the_state_of_a_model_is_found_once_a_batch():
    net = resnet18(num_classes=2)
    gradcam(net, batch()) # which layer that is is remembered
    with mock.patch('dicomcam.explain._modules', wraps=_modules) as looks: gradcam(net, batch())
    assert looks.call_count == 1

def test_dropout_that_never_sleeps_leaves_the_random_state():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.net = resnet18(num_classes=2)
        def forward(self, x): return F.dropout(self.net(x), .5, training=True)
    net, rng = Noisy(), randoms()
    gradcam(net, batch())
    assert randoms() == rng

def test_graph_starts_at_the_earliest_layer():
    net = resnet18(num_classes=2)
    seen = {}
    hooks = [getattr(net, n).register_forward_hook(lambda m, i, o, n=n: seen.update({n: o.requires_grad})) for n in ('conv1', 'layer1', 'layer3')]
    with as_found(net), outputs_of(net, ['layer2', 'layer4']) as acts: net(batch())
    for o in hooks: o.remove()
    assert seen == dict(conv1=False, layer1=False, layer3=True)
    assert acts['layer2'].is_leaf and not acts['layer4'].is_leaf

def test_jpeg_masks_without_their_noise(tmp_path):
    "Compression leaves grey specks around a lesion, which are no lesion"
    mask = np.zeros((64, 64), np.uint8)
    mask[20:41, 23:44] = 255
    Image.fromarray(mask).save(tmp_path/'m.jpg', quality=60)
    assert (np.asarray(Image.open(tmp_path/'m.jpg'))[mask == 0] > 0).any()
    assert (read_mask(tmp_path/'m.jpg', 64, 64) != (mask > 0)).mean() < .01
    assert read_mask(mask//255, 64, 64).sum() == 21*21 # 1 is as good as 255 where nothing was lost
