"What a guide teaches: a network that has a short cut looks at the lesion all the same; the rest of the training stays what it was."
import re, shutil

import numpy as np, pytest, torch
from click.testing import CliRunner
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from torch import nn

from dicomcam.batches import XrayTfm, dicom_dls
from dicomcam.cam import cam
from dicomcam.cli import main
from dicomcam.guide import LesionGuide, guided, lesion_loss, training_lesions
from dicomcam.measures import MEASURES
from dicomcam.networks import dicom_learner
from dicomcam.training import full_recipe, train_learner

SIZE = 64

def write_film(fn, image, patient):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.SOPClassUID, ds.SOPInstanceUID = ExplicitVRLittleEndian, CTImageStorage, generate_uid()
    ds.PatientID, ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = patient, *image.shape, 1, 'MONOCHROME2'
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.PixelData = 7, 0, np.uint8(image*255).tobytes()
    ds.save_as(fn, enforce_file_format=True)

@pytest.fixture(scope='module')
def spots(tmp_path_factory):
    """96 films of noise. Every second one has a faint spot somewhere, which is the lesion, and a bright mark in a corner, which gives
    it away. Folder; file -> mask"""
    path, rng, known = tmp_path_factory.mktemp('spots'), np.random.default_rng(0), {}
    rows = ['file,label']
    for i in range(96):
        image, mask = rng.normal(.4, .05, (SIZE, SIZE)), np.zeros((SIZE, SIZE), bool)
        y, x = rng.integers(20, SIZE-12, 2)
        mask[y-6:y+6, x-6:x+6] = True
        if i % 2:
            image[mask] += .1
            image[2:10, 2:10] += .4
            known[path/f'{i}.dcm'] = mask
        write_film(path/f'{i}.dcm', image.clip(0, 1), str(i))
        rows.append(f'{i}.dcm,{"ab"[i % 2]}')
    (path/'labels.csv').write_text('\n'.join(rows))
    return path, known

def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

def learner(path, cbs=(), seed=0, **data):
    "A network of three convolutions, 8 x 8 positions"
    dls = dicom_dls(path, size=SIZE, cache=False, **{'batch_tfms': [], **data})
    set_seed(seed)
    learn = dicom_learner(dls, 'xresnet18', opt_func='adamw', cbs=list(cbs), amp=False)
    learn.model = nn.Sequential(conv(1, 8), conv(8, 16), conv(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    return learn

def fit(learn, epochs=12):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn

def seen(learn, known):
    "In how many of the films held back the brightest point lies in the lesion, and how many are called right"
    table = learn.dls.setup.table
    files = [o for o in table.file[table.is_valid] if o in known]
    h = cam(learn, files, 'b')
    return np.mean([MEASURES['pointing'](h.heat(i), known[o], known[o], .5) for i, o in enumerate(files)]), learn.validate()[1]

def test_a_guided_network_looks_at_the_lesion(spots):
    path, known = spots
    alone, right = seen(fit(learner(path)), known)
    assert right == 1 and alone < .5 # the mark is enough
    guided, right = seen(fit(learner(path, [LesionGuide(mask_of=known.get)])), known)
    assert right == 1 and guided > .8

def test_the_loss_is_minus_the_logarithm_of_the_share_inside():
    rng = np.random.default_rng(1)
    maps, masks = rng.normal(size=(3, 4, 6)), np.zeros((3, 1, 32, 48))
    masks[0, 0, 4:20, 10:30], masks[1, 0, 5:7, 40:44], masks[2] = 1, 1, 1
    expected = []
    for a, mask in zip(maps, masks):
        share = np.exp(a)/np.exp(a).sum()
        inside = mask.reshape(4, 8, 6, 8).mean((1, 3))
        expected.append(-np.log((share*np.maximum(inside/inside.max(), 1e-6)).sum()))
    assert lesion_loss(torch.tensor(maps), torch.tensor(masks)).item() == pytest.approx(np.mean(expected), rel=1e-9)
    assert expected[2] == pytest.approx(0, abs=1e-9) # a lesion everywhere

def test_a_lesion_that_left_the_image_teaches_nothing():
    maps = torch.randn(2, 4, 4, dtype=torch.double, requires_grad=True)
    lesion_loss(maps, torch.zeros(2, 1, 32, 32, dtype=torch.double)).backward()
    assert maps.grad.abs().max() < 1e-12

class Watch(Callback):
    "Notes what the network was given, and what the loss was asked of"
    order = 16
    def __init__(self): self.drawn, self.scores, self.losses = [], [], []
    def after_pred(self):
        if self.training: self.scores.append((len(self.pred), len(self.y)))
    def after_loss(self):
        if self.training: self.losses.append((self.loss.item(), self.loss_grad.item(), self.loss_func(self.pred, self.y).item()))
    def after_batch(self):
        if self.training: self.drawn.append((self.xb[0][-len(self.lesion_guide.drawn):], self.lesion_guide.drawn))

def test_masks_move_with_their_films(spots):
    path, known = spots
    watch = Watch()
    fit(learner(path, [LesionGuide(mask_of=known.get), watch], batch_tfms=[XrayTfm(20., 1.5, 0.), Flip()]), 2)
    contrast = [(x[m > .9].mean()-x[m < .1].mean()).item() for x, m in watch.drawn]
    assert np.mean(contrast) > .07 # the spot is brighter by .1, where the mask is
    assert len({m.sum().item() for _, m in watch.drawn}) > 1 # zoomed by chance

def test_the_loss_of_the_labels_is_asked_of_the_batch_alone(spots):
    path, known = spots
    watch = Watch()
    fit(learner(path, [LesionGuide(mask_of=known.get, weight=2., n=3), watch]), 1)
    assert all(n == labels for n, labels in watch.scores)
    for loss, total, of_labels in watch.losses: assert loss == pytest.approx(of_labels) and total > loss

def test_nothing_is_left_behind(spots):
    path, known = spots
    learn = fit(learner(path, [LesionGuide(mask_of=known.get)]), 1)
    assert not any(o._forward_hooks for o in learn.model.modules())
    assert all(o.requires_grad for o in learn.model.parameters())
    assert not any(isinstance(o, torch.Tensor) for o in vars(learn.lesion_guide).values())

def test_an_interrupted_training_leaves_no_hook(spots):
    path, known = spots
    class Stop(Callback):
        order = 16
        def after_loss(self): raise KeyboardInterrupt
    learn = learner(path, [LesionGuide(mask_of=known.get), Stop()])
    with pytest.raises(KeyboardInterrupt): fit(learn, 1)
    assert not any(o._forward_hooks for o in learn.model.modules())

def test_a_failed_batch_leaves_no_hook_to_the_next_training(spots):
    path, known = spots
    learn = learner(path, [LesionGuide(mask_of=known.get)])
    def fail(module, inp):
        if module.training: raise RuntimeError('out of memory')
    handle = learn.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match='out of memory'): fit(learn, 1)
    handle.remove()
    fit(learn, 1)
    assert not any(o._forward_hooks for o in learn.model.modules())

def test_dataloaders_of_others_say_so(spots):
    learn = learner(spots[0])
    del learn.dls.setup
    assert 'dicom_dls' in LesionGuide(mask_of=spots[1].get).unfit(learn)

def test_only_films_of_the_training_side_teach(spots):
    path, known = spots
    learn = learner(path)
    table = learn.dls.setup.table
    assert set(training_lesions(learn, mask_of=known.get)) == set(known) - set(table.file[table.is_valid])

def test_a_lesion_on_a_film_without_the_class_teaches_nothing(spots):
    path, known = spots
    everywhere = np.ones((SIZE, SIZE), bool)
    guide = LesionGuide(mask_of=lambda file: known.get(file, everywhere))
    watch = Watch()
    fit(learner(path, [guide, watch]), 1)
    assert guide.films <= len(known) and max(m.mean() for _, m in watch.drawn) < .1

def test_of_many_some_are_used(spots):
    path, known = spots
    guide = LesionGuide(mask_of=known.get, most=10, fewest=5)
    learn = fit(learner(path, [guide]), 1)
    assert guided(learn) == 10 < len(training_lesions(learn, mask_of=known.get)) and guided(learner(path)) == 0

@pytest.mark.parametrize('how', ['too few', 'another head', 'no such class', 'several'])
def test_what_cannot_be_guided_says_so(spots, how):
    path, known = spots
    guide = LesionGuide(mask_of=known.get if how != 'too few' else lambda file: None, cls='c' if how == 'no such class' else None)
    learn = learner(path, [guide])
    if how == 'several': learn.dls.vocab = ['a', 'b', 'c']
    if how == 'another head': learn.model.insert(6, nn.Linear(2, 2))
    says = {'too few': f'0 films of the training side have a known lesion.*masks/ or boxes.csv.*{path}',
        'another head': 'this model has another head', 'no such class': "'c'", 'several': 'Pass cls'}[how]
    with pytest.raises(ValueError, match=says): fit(learn, 1)

def test_a_checkpoint_knows_its_guide(tmp_path, spots):
    path, known = spots
    def go_on(weight, resume=True):
        words = dict(arch='xresnet18', size=SIZE, bs=8, epochs=1, lr=1e-3, data=dict(cache=False), checkpoint=tmp_path/'state.pt')
        return train_learner(path, resume=resume, cbs=LesionGuide(mask_of=known.get, weight=weight), **words)
    go_on(.5, resume=False)
    go_on(.5)
    with pytest.raises(ValueError, match='cbs'): go_on(.7)

@pytest.fixture(scope='module')
def boxed(spots, tmp_path_factory):
    "The same films with boxes.csv"
    path, known = spots
    out = shutil.copytree(path, tmp_path_factory.mktemp('boxed')/'films')
    corners = {file.name: np.argwhere(mask).min(0) for file, mask in known.items()}
    (out/'boxes.csv').write_text('\n'.join(['file,x,y,width,height', *(f'{name},{x},{y},12,12' for name, (y, x) in corners.items())]))
    return out

def test_a_recipe_guides_where_it_can(spots, boxed):
    path, _ = spots # nobody has drawn on these films
    words = dict(arch='xresnet18', size=SIZE, bs=8, epochs=1, lr=1e-3, fit=False, data=dict(cache=False))
    learn = train_learner(boxed, guide=True, **words)
    assert learn.lesion_guide.unfit(learn) is None and not hasattr(train_learner(boxed, **words), 'lesion_guide')
    assert not hasattr(train_learner(path, guide=True, **words), 'lesion_guide')
    with pytest.raises(ValueError, match='^0 films of the training side'): train_learner(path, guide=LesionGuide(), **words)
    assert full_recipe(pretrained='weights.pth')['guide'] is True and 'guide' not in full_recipe(pretrained=False)

def test_the_command_guides_and_says_so(spots, boxed, tmp_path):
    def train(folder, *more):
        words = ['train', folder, '--arch', 'xresnet18', '--size', SIZE, '--epochs', 1, '--out', tmp_path/'m.safetensors', '--force', *more]
        return CliRunner().invoke(main, [*map(str, words)])
    told = train(boxed, '--guide')
    assert told.exit_code == 0 and re.search(r'Lesions of \d\d films have shown', told.output), told.output
    assert 'Lesions of' not in train(boxed).output
    refused = train(spots[0], '--guide')
    assert refused.exit_code and 'masks/ or boxes.csv' in f'{refused.exception} {refused.output}'

@pytest.mark.parametrize('change', [dict(n=0), dict(weight=0), dict(weight=-1.), dict(weight=float('nan'))])
def test_what_guides_nothing(change):
    with pytest.raises(ValueError, match='more than 0'): LesionGuide(**change)

def test_mask_of_another_size_is_refused(spots):
    learn = dicom_learner(dicom_dls(spots[0], size=SIZE), 'xresnet18')
    with pytest.raises(ValueError, match=r'dcm: A mask of \(3, 3\)'): training_lesions(learn, mask_of=lambda file: np.ones((3, 3)))
