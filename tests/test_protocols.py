"The published figures, on small arrays worked out by hand, and against the published steps written out"
import json, os
from pathlib import Path

import cv2, numpy as np, pytest, torch
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.metrics import structural_similarity
from sklearn.metrics import auc, precision_recall_curve
from torch.nn import functional as F

from dicomcam.heatmaps import Heatmaps
from dicomcam.intervals import proportion_interval
from dicomcam.protocols import (arun_auprc, arun_average_mask, arun_localization, arun_randomization, arun_similarity, arun_ssim, arun_view, box_overlap, chexlocalize,
                                chexlocalize_bootstrap, chexlocalize_hit, chexlocalize_iou, chexlocalize_segmentation, chexlocalize_threshold, reachable, wang, wang_boxes, wang_localization)

def heatmaps(*maps, size=None):
    "Of one class; the network's input is as large as the maps, or as `size`"
    raw = torch.stack([torch.as_tensor(np.asarray(m), dtype=torch.float32) for m in maps])[:, None]
    return Heatmaps([raw], torch.zeros(len(raw), 1, *(size or raw.shape[-2:])), torch.ones(len(raw), 1), ['a'], ['l'], 'test')

def box(y, x, value=1., shape=(12, 12)):
    m = np.zeros(shape)
    m[y, x] = value
    return m

LESION = box(slice(2, 6), slice(2, 6)) > 0 # 16 pixels
HALF = box(slice(4, 8), slice(2, 6))+box(0, 10, .3) # 16 pixels, 8 of them in the lesion, and a dim one elsewhere

def smooth(seed, shape=(7, 7), zoom=9): return ndimage.zoom(np.random.default_rng(seed).random(shape)**3, zoom, order=1).astype(np.float32)

# CheXlocalize

def test_chexlocalize_worked_out():
    bright = chexlocalize_segmentation(HALF)
    assert bright.dtype == bool and bright.sum() == 16 and chexlocalize_iou(bright, LESION) == 8/24
    assert chexlocalize_segmentation(HALF, .2).sum() == 17 and chexlocalize_segmentation(HALF, .3).sum() == 16 # above, not at
    assert chexlocalize_segmentation(HALF-5, .2).sum() == 17 # the minimum is taken off
    assert chexlocalize_hit(HALF, LESION) == 1 and chexlocalize_hit(np.roll(HALF, 2, 0), LESION) == 0 # of 16 the first
    for flat in (np.zeros, np.ones): assert not chexlocalize_segmentation(flat((12, 12))).any() and chexlocalize_hit(flat((12, 12)), LESION) == 0

def test_chexlocalize_what_does_not_count():
    bright, none = chexlocalize_segmentation(HALF), np.zeros((12, 12), bool)
    assert np.isnan([chexlocalize_iou(*o) for o in ((bright, None), (bright, none), (none, LESION), (none, none))]).all()
    assert [chexlocalize_iou(*o, true_positives=False) for o in ((bright, none), (none, LESION))] == [0, 0] and np.isnan(chexlocalize_iou(none, none, False))
    assert np.isnan(chexlocalize_hit(HALF, None)) and np.isnan(chexlocalize_hit(HALF, none))

def runs(text):
    "The lengths of COCO's runs: 5 bits a character, the low ones first, 32 says that more follow, 16 in the last one that it is negative"
    lengths, value, shift = [], 0, 0
    for code in text.encode():
        code -= 48
        value += (code & 31) << shift
        shift += 5
        if code & 32: continue
        if code & 16: value -= 1 << shift # two's complement
        if len(lengths) > 2: value += lengths[-2] # from the fourth run on the difference from the last one of its colour is written
        lengths.append(value)
        value = shift = 0
    return lengths

def drawn(rle):
    "COCO's mask: runs outside and inside by turns, down the columns"
    lengths = runs(rle['counts'])
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(rle['size'], order='F')

def test_runs_worked_out():
    "3 out, 2 in, 1 out, 4 in, and 2 out: the fourth is 2 more than the second, the fifth 1 more than the third; 50 = 18+32"
    assert runs('32121') == [3, 2, 1, 4, 2]
    assert drawn(dict(size=[4, 3], counts='32121')).astype(int).tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0]]
    assert runs('b1') == [50] and not drawn(dict(size=[5, 10], counts='b1')).any()
    assert runs('0934N') == [0, 9, 3, 13, 1] # N: 30-32 = -2

@pytest.mark.parametrize('name, miou', [('Enlarged Cardiomediastinum', .4623), ('Cardiomegaly', .3662), ('Airspace Opacity', 0), ('Support Devices', .0333)])
def test_chexlocalize_published_sample(name, miou):
    "Of each finding one of the two films has a lesion drawn: the mean is the IoU of that one"
    folder = os.environ.get('DICOMCAM_TEST_CHEXLOCALIZE')
    if not folder: pytest.skip('DICOMCAM_TEST_CHEXLOCALIZE names no folder `sample` of the repository rajpurkarlab/cheXlocalize')
    said, truth = (json.loads((Path(folder)/fn).read_text()) for fn in ('gradcam_segmentations_val_sample.json', 'gt_segmentations_val.json'))
    values = [chexlocalize_iou(drawn(said[film][name]), drawn(truth[film][name])) for film in truth if name in said[film]]
    assert round(float(np.nanmean(values)), 4) == miou and np.isfinite(values).sum() == 1

@pytest.mark.parametrize('seed', range(6))
def test_chexlocalize_segmentation_step_by_step(seed):
    "Grey levels cut off, not rounded; Otsu; outlines drawn and filled"
    m = smooth(seed)
    grey = np.uint8(255*((m-m.min())/(m-m.min()).max()))
    otsu = cv2.threshold(grey, 0, grey.max(), cv2.THRESH_OTSU)[1]
    image = Image.new('1', grey.shape[::-1])
    for c in cv2.findContours(otsu, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]:
        if len(c) > 1: ImageDraw.Draw(image).polygon([tuple(map(int, o[0])) for o in c], outline=1, fill=1)
    assert (chexlocalize_segmentation(m) == np.array(image)).all() and (chexlocalize_segmentation(m, fill=False) == (otsu > 0)).all()

def test_chexlocalize_holes_and_single_pixels():
    ring = HALF+box(9, 9)
    ring[5:7, 3:5] = 0
    assert chexlocalize_segmentation(ring, fill=False).sum() == 13 and chexlocalize_segmentation(ring).sum() == 16

def test_chexlocalize_bootstrap_draw_by_draw():
    values = [.2, np.nan, .6, .1, .9, .3]
    np.random.seed(0)
    means = sorted(np.nanmean(np.array(values)[np.random.choice(6, size=6, replace=True)]) for _ in range(1000))
    assert chexlocalize_bootstrap(values) == pytest.approx((means[24], np.mean(means), means[974]), abs=1e-12)
    assert np.isnan(chexlocalize_bootstrap([np.nan]*3)).all()
    low, mean, high = chexlocalize_bootstrap(values, n=20) # of fewer than 40 the first is the lowest
    assert low < mean < high

def test_chexlocalize_threshold_is_that_of_largest_miou():
    bordered = box(slice(1, 7), slice(1, 7), .45)
    bordered[2:6, 2:6] = 1
    assert chexlocalize_threshold([bordered, HALF], [LESION, None]) == .5
    assert chexlocalize_threshold([bordered], [LESION], (.1, .3)) == .1 # both alike: the first
    with pytest.raises(ValueError, match='No map with a lesion'): chexlocalize_threshold([bordered, HALF], [None, None])
    with pytest.raises(ValueError, match='shorter'): chexlocalize_threshold([bordered, HALF], [LESION])

def test_chexlocalize_of_heatmaps():
    "Bilinear to the original's size, corners not aligned; what speaks against the class left out; n is what counts"
    raw = np.random.default_rng(0).normal(size=(3, 4, 4))
    lesion = box(slice(10, 30), slice(5, 25), shape=(40, 40)) > 0
    t = chexlocalize(heatmaps(*raw, size=(40, 40)), [lesion, None, lesion], 'a')
    up = F.interpolate(torch.tensor(raw, dtype=torch.float32)[:, None], (40, 40), mode='bilinear', align_corners=False)[:, 0].clamp(min=0).numpy()
    ious = [chexlocalize_iou(chexlocalize_segmentation(up[i]), lesion) for i in (0, 2)]
    assert t.loc['miou', 'mean'] == pytest.approx(np.mean(ious)) and t.loc['hit_rate', 'mean'] == np.mean([chexlocalize_hit(up[i], lesion) for i in (0, 2)])
    assert t.n.tolist() == [2, 2] and (t.loc['miou', 'low'], t.loc['miou', 'high']) == pytest.approx(chexlocalize_bootstrap([ious[0], np.nan, ious[1]])[::2], nan_ok=True)
    tuned = chexlocalize(heatmaps(*raw, size=(40, 40)), [lesion, None, None], 'a', threshold=.7)
    assert tuned.loc['miou', 'mean'] == pytest.approx(chexlocalize_iou(chexlocalize_segmentation(up[0], .7), lesion))
    with pytest.raises(ValueError, match='3 images, but 1 masks'): chexlocalize(heatmaps(*raw), [lesion], 'a')

def test_chexlocalize_cutoff_of_the_probability():
    "Below it there is no segmentation; the brightest pixel is there all the same"
    h = heatmaps(HALF, HALF)
    h.probs[:] = torch.tensor([[.2], [.7]])
    t = chexlocalize(h, [LESION, np.roll(LESION, 1, 0)], 'a', cutoff=.5)
    assert t.n.tolist() == [1, 2] and t['mean'].tolist() == pytest.approx([12/20, 1])
    t = chexlocalize(h, [LESION, np.roll(LESION, 1, 0)], 'a', cutoff=.5, true_positives=False)
    assert t.n.tolist() == [2, 2] and t['mean'].tolist() == pytest.approx([6/20, 1])

# ChestX-ray8

def test_wang_boxes_at_both_levels():
    m = box(slice(4, 8), slice(2, 6), 100/255)
    m[4:6, 2:6], m[0, 10], m[11, 0] = 1, 70/255, 60/255 # the last lies at 60, and not above
    assert wang_boxes(m).tolist() == [[10, 0, 1, 1], [2, 4, 4, 4], [2, 4, 4, 2]] # x, y, width, height
    assert wang_boxes(m*7+3).tolist() == wang_boxes(m).tolist() and wang_boxes(np.ones((4, 4))).shape == (0, 4)
    truth = [[2, 2, 4, 4], [10, 0, 2, 2]]
    assert box_overlap(wang_boxes(m), truth).tolist() == [[0, 1], [.5, 0], [1, 0]]
    assert box_overlap(wang_boxes(m), truth, 'iou').tolist() == pytest.approx(np.array([[0, 1/4], [8/24, 0], [8/16, 0]]))
    assert box_overlap(np.zeros((0, 4)), truth).shape == (0, 2)
    with pytest.raises(ValueError, match='iobb, iou'): box_overlap(truth, truth, 'dice')

def test_wang_worked_out():
    m = box(slice(4, 8), slice(2, 6), 100/255)
    m[4:6, 2:6], m[0, 10] = 1, 70/255
    t = wang_localization([m, m, m*0], [[[2, 2, 4, 4], [8, 8, 2, 2]], [], [[0, 0, 1, 1]]], at=(.1, .5), group=['a', 'a', 'b'])
    assert t.accuracy.tolist() == [1/3, 1/3] and t.boxes.tolist() == [3, 3] and t.films.tolist() == [3, 3] # of three boxes one is found
    assert t.afp.tolist() == [(1+3)/3, (2+3)/3] # IoBB 0.5 is not above 0.5
    assert tuple(t.loc[.1, ['accuracy', 'low', 'high']]) == proportion_interval([1, 0, 0], ['a', 'a', 'b'])
    assert t.index.name == 'T(iobb)' and wang_localization([m], [[[2, 2, 4, 4]]], at=(.4, .5), by='iou').accuracy.tolist() == [1, 0]

def test_wang_of_heatmaps():
    "Signed maps: the level counts from the minimum; each region of a mask is a box"
    m = box(slice(4, 6), slice(2, 6))-box(11, 11, 3.)
    two = LESION | (box(slice(9, 11), slice(8, 10)) > 0)
    t = wang(heatmaps(m, HALF), [two, None], 'a', at=(.1,))
    assert t.loc[.1, 'boxes'] == 2 and t.loc[.1, 'films'] == 2
    pairs = [box_overlap(wang_boxes(m), [[2, 2, 4, 4], [8, 9, 2, 2]]), box_overlap(wang_boxes(HALF), [])]
    assert t.accuracy.item() == (pairs[0] > .1).any(0).mean() and t.afp.item() == sum((~(o > .1).any(1)).sum() for o in pairs)/2
    assert [0, 0, 12, 12] in wang_boxes(m).tolist() # 3/4 of the range lies below what is nothing

def test_wang_counts_no_speck_as_a_box():
    "What drawing left, a pixel beside a lesion of 1,600, is no box that could be found"
    lesion = box(slice(0, 40), slice(0, 40), shape=(64, 64)) > 0
    speck = lesion | (box(50, 50, shape=(64, 64)) > 0)
    t = wang(heatmaps(lesion), [speck], 'a')
    assert (t.boxes == 1).all() and (t.accuracy == 1).all() and (t.afp == 0).all()

# Arun

def test_arun_auprc_worked_out():
    score, lesion = np.array([4., 3, 2, 1]), np.array([True, False, True, False])
    assert arun_auprc(score, lesion) == pytest.approx(.5*1+.5*(1/2+2/3)/2) # from recall 0 to 1/2 precision 1; then a trapezoid from 1/2 to 2/3
    assert np.isnan(arun_auprc(score, lesion & False)) and np.isnan(arun_auprc(score*np.nan, lesion))
    assert arun_auprc(lesion*1., lesion) == 1

def test_arun_view():
    m = smooth(1)
    up = F.interpolate(torch.tensor(m)[None, None], (320, 320), mode='bilinear', align_corners=False)[0, 0].numpy()
    want = np.clip((up-up.min())/(np.percentile(up, 99)-up.min()), 0, 1)
    np.testing.assert_allclose(arun_view(m), want, rtol=1e-6)
    assert .005 < (arun_view(m) == 1).mean() < .02 and np.isnan(arun_view(m*0+2)).all()
    assert np.isnan(arun_view(box(0, 0), side=12)).all() # a single pixel of 144 lies above the 99th percentile: nothing is seen of it

def test_arun_ssim_by_its_formula():
    a, b = np.random.default_rng(0).random((2, 7, 7)) # one window
    c1, c2, c = .02**2, .06**2, np.cov(a.ravel(), b.ravel())
    want = (2*a.mean()*b.mean()+c1)*(2*c[0, 1]+c2)/((a.mean()**2+b.mean()**2+c1)*(c[0, 0]+c[1, 1]+c2))
    assert arun_ssim(a, b) == pytest.approx(want) and arun_ssim(a, a) == 1 and np.isnan(arun_ssim(a, a*np.nan))
    assert arun_ssim(a, b, 1) == pytest.approx(structural_similarity(a, b, data_range=1)) != arun_ssim(a, b)

def test_arun_localization_and_the_average_mask():
    disk = np.hypot(*np.mgrid[-20:20, -20:20]) < 8
    maps = disk+.1*np.random.default_rng(0).random((40, 40)), np.roll(disk, 10, 0)*1., disk*1.
    average = arun_average_mask([disk, None, np.kron(np.roll(disk, 5, 1), np.ones((2, 2)))], 40)
    np.testing.assert_array_equal(average, (disk*1.+np.roll(disk, 5, 1))/2)
    t = arun_localization(heatmaps(*maps), [disk, disk, None], 'a', average=average, side=40)
    def area(m): return auc(*precision_recall_curve(disk.ravel(), arun_view(m, 40).ravel())[1::-1])
    assert t.loc['test', 'mean'] == pytest.approx((area(maps[0])+area(maps[1]))/2) and t.n.tolist() == [2, 2]
    assert t.loc['average mask', 'mean'] == pytest.approx(auc(*precision_recall_curve(disk.ravel(), average.ravel())[1::-1]))
    flat = arun_localization(heatmaps(maps[0], disk*0), [disk]*2, 'a', side=40)
    assert flat.n.item() == 1 and flat['mean'].item() == pytest.approx(area(maps[0])) # a flat map does not count
    with pytest.raises(ValueError, match='No mask at all'): arun_average_mask([None])
    with pytest.raises(ValueError, match='one side to both'): arun_localization(heatmaps(*maps), [disk]*3, 'a', average=average)

def test_arun_masks_as_the_network_saw_them(tmp_path):
    "Of a film of 40 x 60 the network saw the middle 40 x 40"
    from dicomcam.view import View
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path/'a.png')
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:45] = True
    raw = torch.tensor(mask[:, 10:50]*1.)[None, None].float()
    h = Heatmaps([raw], torch.zeros(1, 1, 40, 40), torch.ones(1, 1), ['a'], ['l'], 'test', items=[tmp_path/'a.png'], view=View(40, 'crop'))
    assert h.where(0)[3] == (10, 0, 40, 40)
    assert arun_localization(h, [mask], 'a', side=40)['mean'].item() == 1

def test_arun_similarity_and_randomization():
    maps = [smooth(k, zoom=6) for k in range(6)]
    near, noise = [m+.01*smooth(9, zoom=6) for m in maps], list(np.random.default_rng(0).random((6, 42, 42)))
    a, b, c = heatmaps(*maps), heatmaps(*near), heatmaps(*noise)
    s = arun_similarity(a, b, 'a', side=42)
    each = [arun_ssim(arun_view(x, 42), arun_view(y, 42)) for x, y in zip(maps, near)]
    assert s['value'] == pytest.approx(np.mean(each)) and s['low'] < s['value'] < s['high'] and s['n'] == 6
    t = arun_randomization(a, dict(fc=b, conv1=c), 'a', side=42, pairs=30)
    assert t.index.tolist() == ['fc', 'conv1', 'other images'] and t.passes.tolist() == [False, True, False] and t.n.tolist() == [6, 6, 30]
    assert t.loc['fc', 'mean'] == pytest.approx(s['value']) and t.equals(arun_randomization(a, dict(fc=b, conv1=c), 'a', side=42, pairs=30))
    others = [arun_ssim(arun_view(maps[i], 42), arun_view(maps[j], 42)) for i in range(6) for j in range(i)]
    assert min(others) <= t.loc['other images', 'mean'] <= max(others) and abs(t.loc['other images', 'mean']-np.mean(others)) < .1
    with pytest.raises(ValueError, match='6 images and 1'): arun_similarity(a, heatmaps(maps[0]), 'a')
    with pytest.raises(ValueError, match='no other'): arun_randomization(heatmaps(maps[0]), {}, 'a')

# what the grid can reach

def test_reachable_is_the_mask_on_the_layers_grid(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[10:20, 25:40] = True # 10 x 15 pixels, on cells of 10 x 10 that begin at column 10: half of a cell, and a whole one
    from dicomcam.view import View
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path/'a.png')
    h = Heatmaps([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)], torch.zeros(2, 1, 40, 40), torch.ones(2, 3), list('abc'), ['l', 'm'], 'test', items=[tmp_path/'a.png']*2, view=View(40, 'crop'))
    ideal = reachable(h, [mask, None], 'l')
    want = torch.zeros(4, 4)
    want[1, 1:3] = torch.tensor([.5, 1])
    for k in range(3): assert torch.equal(ideal.raw[0][0, k], want) and not ideal.raw[0][1, k].any()
    assert reachable(h, [mask, None]).raw[0][0, 0].tolist() == [[.125, .25], [0, 0]] # the last layer: cells of 20 x 20
    assert (ideal.method, ideal.layers, ideal.classes) == ('reachable', [''], list('abc'))
    whole = reachable(heatmaps(mask), [mask])
    assert chexlocalize(whole, [mask], 'a')['mean'].tolist() == [1, 1]
