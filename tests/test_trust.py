"Measures against values worked out by hand; baselines; weights that are put back"
import numpy as np, pytest, torch
from test_cam import batch, make, same, state
from tiny import TinyNet
from torch import nn

from dicomcam.cam import Heatmaps
from dicomcam.gradcam import gradcam
from dicomcam.faithful import steps_between
from dicomcam.trust import baselines, deletion, insertion, iobb, iou, localization, mass_in_mask, pointing_game, randomization, randomized

def heatmaps(*maps, classes=('a',)):
    raw = torch.stack([torch.as_tensor(m, dtype=torch.float32) for m in maps])[:, None].expand(-1, len(classes), -1, -1)
    g = torch.Generator().manual_seed(0)
    return Heatmaps([raw], torch.rand(len(raw), 1, *raw.shape[-2:], generator=g), torch.ones(len(raw), len(classes)), classes, ['l'], 'test')

def spot(y, x, value=1., shape=(40, 50)):
    m = np.zeros(shape)
    m[y, x] = value
    return m

LESION = spot(slice(10, 20), slice(30, 40))

@pytest.mark.parametrize('y,x,hit', [(10, 30, 1), (19, 39, 1), (15, 40, 1), (15, 41, 0), (20, 40, 1), (21, 40, 0), (0, 0, 0)])
def test_pointing_game_with_its_tolerance(y, x, hit):
    # grown by 0.03 * 50 = 1.5 pixels: one diagonal step (1.41) is in, two pixels are not
    assert pointing_game(heatmaps(spot(y, x)), [LESION], 'a').loc['test', 'mean'] == hit

@pytest.mark.parametrize('grow,hit', [(0, 0), (.05, 0), (.06, 1)])
def test_pointing_game_grows_by_the_longer_side(grow, hit):
    assert pointing_game(heatmaps(spot(15, 42)), [LESION], 'a', grow=grow).loc['test', 'mean'] == hit

def test_pointing_game_without_one_brightest_pixel():
    ties = spot(15, 35)+spot(0, 0)+spot(1, 1)+spot(2, 2)
    assert pointing_game(heatmaps(ties), [LESION], 'a').loc['test', 'mean'] == .25
    assert pointing_game(heatmaps(LESION*0-1), [LESION], 'a', grow=0).loc['test', 'mean'] == 100/2000

def test_mass_and_overlap_by_hand():
    m = spot(slice(15, 25), slice(30, 40)) + spot(slice(0, 2), slice(0, 5), .25) # half in the lesion, and a dim patch outside
    h, masks = heatmaps(m), [LESION]
    assert mass_in_mask(h, masks, 'a').loc['test', 'mean'] == pytest.approx(50/102.5)
    assert iou(h, masks, 'a').loc['test', 'mean'] == pytest.approx(50/150)
    assert iou(h, masks, 'a', at=.2).loc['test', 'mean'] == pytest.approx(50/160)
    assert iobb(h, masks, 'a').loc['test', 'mean'] == pytest.approx(.5)
    assert iobb(heatmaps(m+spot(0, 0, 2)), masks, 'a').loc['test', 'mean'] == 0

def test_best_iou_is_that_of_the_best_threshold():
    m = spot(slice(0, 40), slice(0, 50), .3) + LESION*.4 + spot(12, 32, .3)
    h = heatmaps(m)
    assert iou(h, [LESION], 'a', at=None).loc['test', 'mean'] == 1
    rng = np.random.default_rng(0)
    m = rng.random((40, 50)) + LESION*.3
    m = (m-m.min())/(m.max()-m.min())
    by_hand = max(((m >= t) & (LESION > 0)).sum()/((m >= t) | (LESION > 0)).sum() for t in np.arange(51)/50)
    assert iou(heatmaps(m), [LESION], 'a', at=None).loc['test', 'mean'] == pytest.approx(by_hand, abs=2e-3)

def test_all_measures_of_several_maps_beside_the_baselines():
    h, g = heatmaps(LESION, LESION[::-1].copy(), LESION), heatmaps(LESION*0, LESION, LESION)
    g.method = 'other'
    t = localization([h, g], [LESION, None, LESION], 'a')
    assert t.index.get_level_values('map').unique().tolist() == ['test', 'other', 'centre', 'noise', 'edges'] and (t.n == 2).all()
    assert (t.loc['test', 'mean'] == 1).all() and t.loc[('other', 'l', 'mass'), 'mean'] == .5
    known = t.dropna() # two images alike say nothing of the next, unless they are hits or misses
    assert ((known.low <= known['mean']) & (known['mean'] <= known.high)).all() and len(known) >= 10

def test_baselines_know_nothing_of_the_model():
    a, b = [gradcam(TinyNet(3, seed, c_in=3), batch(3)) for seed in (0, 1)]
    assert not torch.equal(a.maps, b.maps)
    for p, q in zip(baselines(a), baselines(b)): assert torch.equal(p.maps, q.maps) and p.maps.shape == (3, 3, 1, 96, 96)
    centre, noise, edges = baselines(a)
    top = centre.maps[0, 0, 0].argmax().item()
    assert abs(top//96-47.5) <= .5 and abs(top % 96-47.5) <= .5
    assert noise.maps[0, 0, 0].unique().numel() > 9000 and not torch.equal(noise.maps[0], noise.maps[1])
    h = heatmaps(LESION)
    h.images[:] = torch.tensor(LESION)
    e = baselines(h)[2].maps[0, 0, 0]
    assert e[15, 30] > 5*e[15, 35] and e[15, 30] > 5*e[15, 5]

@pytest.mark.parametrize('masks,match', [([LESION]*2, '1 images, but 2 masks'), ([None], 'No mask at all'), ([LESION[:, :-1]], 'rows x columns'), ([LESION*0], 'without a lesion')])
def test_masks_that_cannot_be(masks, match):
    with pytest.raises(ValueError, match=match): pointing_game(heatmaps(LESION), masks, 'a')

def test_masks_from_files(tmp_path):
    from PIL import Image
    Image.fromarray((LESION*255).astype(np.uint8)).save(tmp_path/'m.png')
    assert mass_in_mask(heatmaps(LESION), [tmp_path/'m.png'], 'a').loc['test', 'mean'] == 1

# deletion and insertion

class Sum(nn.Module):
    "Probability: the mean over the lesion, whose pixels are 1"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor(LESION, dtype=torch.float32))
    def forward(self, x): s = (x[:, 0]*self.w).sum((1, 2))/self.w.sum(); return torch.stack([1-s, s], 1)

def same_score(s): return s

def test_deletion_and_insertion_worked_out():
    "100 of 2000 pixels carry the score: with them first, it is gone after 1 of 20 steps; with them last, after all"
    h, worst = heatmaps(LESION, classes=(0, 1)), heatmaps(1-LESION, classes=(0, 1))
    h.images, worst.images = h.images*0+1, worst.images*0+1
    h.images[:, :, 0, 0] = worst.images[:, :, 0, 0] = 0 # what black means
    kw = dict(steps=20, fill='black', act=same_score)
    assert deletion(Sum(), h, 1, **kw).loc['test', 'mean'] == pytest.approx(.5/20, abs=1e-6)
    assert insertion(Sum(), h, 1, **kw).loc['test', 'mean'] == pytest.approx(1-.5/20, abs=1e-6)
    assert deletion(Sum(), worst, 1, **kw).loc['test', 'mean'] == pytest.approx(1-.5/20, abs=1e-6)
    assert deletion(Sum(), h, 0, **kw).loc['test', 'mean'] == pytest.approx(1-.5/20, abs=1e-6)
    assert deletion(Sum(), h, 1, **kw).loc['noise', 'mean'] == pytest.approx(.5, abs=.05)
    with pytest.raises(ValueError, match='blur, mean, black'): deletion(Sum(), h, 1, fill='white')

def test_steps_from_one_image_to_the_other():
    a, b, heat = torch.zeros(1, 4, 5), torch.ones(1, 4, 5), np.arange(20.).reshape(4, 5)
    s = steps_between(a, b, heat, 10)
    assert s.sum((1, 2, 3)).tolist() == list(range(0, 21, 2)) and s[1, 0, 3].tolist() == [0, 0, 0, 1, 1]
    tied = steps_between(a, b, heat*0, 10)[5, 0]
    assert tied.sum() == 10 and 0 < tied[:2].sum() < 10 # ties at random, not from the top

def test_deletion_of_a_class_asked_for_by_itself():
    net, x = TinyNet(3, c_in=3).train(), batch(2)
    before = state(net)
    alone, all3 = gradcam(net, x, classes=2), gradcam(net, x)
    assert deletion(net, alone, 2, steps=4).loc['gradcam', 'mean'] == pytest.approx(deletion(net, all3, 2, steps=4).loc['gradcam', 'mean'])
    assert same(state(net), before)

# weights drawn anew

def test_randomized_goes_from_the_top_down_and_puts_all_back():
    net = TinyNet(3, c_in=3)
    before, changed, children = state(net), [], ['11', '7', '6', '5', '4', '2', '1', '0']
    for n in randomized(net):
        other = {k.split('.')[0] for k, v in net.state_dict().items() if not torch.equal(v, before[4][k])}
        changed.append((n, other))
    assert changed == [(n, set(children[:i])) for i, n in enumerate(children, 1)]
    assert same(state(net), before)
    for n in randomized(net): break
    assert same(state(net), before)
    with pytest.raises(KeyError):
        for n in randomized(net): raise KeyError
    assert same(state(net), before)

def test_randomized_weights_are_as_wide_as_the_trained():
    net = make('xresnet18')
    wide = {n: p.pow(2).mean().sqrt().item() for n, p in net.named_parameters() if p.ndim > 2}
    for n in randomized(net): drawn = {k: net.get_parameter(k).pow(2).mean().sqrt().item() for k in wide}
    assert all(drawn[k] == pytest.approx(wide[k], rel=.1) for k in wide if net.get_parameter(k).numel() > 1000)

def test_randomization_tells_a_map_that_does_not_care():
    net, x = TinyNet(3, c_in=3), batch(4)
    before = state(net)
    r = randomization(net, x, 1, '4', 'eigencam')
    assert (r.loc[['from 11 on', 'from 7 on', 'from 5 on'], 'mean'] > 1-1e-9).all() # these lie above the layer
    assert r.loc['from 4 on', 'mean'] < .99 and (r.n == 4).all()
    g = randomization(net, x, 1, '6', 'gradcam')
    assert abs(g.loc['from 7 on', 'mean']) < 1 and abs(g.loc['noise', 'mean']) < .1
    assert same(state(net), before)
