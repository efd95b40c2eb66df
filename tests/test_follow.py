"Does a map follow the model? Forest plots, ROAD, agreement with occlusion, weights drawn anew, and localisation beside all of it."
import numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from scipy import ndimage
from torch import nn

from dicomcam.faithful import deletion, likeness, mean_likeness, randomization, randomizations
from dicomcam.heatmaps import Heatmaps
from dicomcam.localize import (by_lesion, iobb, iou, localization, mass_in_mask, mean_of_measures, measures_by_image, group_of_rows, paired,
                               pointing_game)
from dicomcam.perturb import occlusion
from dicomcam.plots import plot_forest, plot_forests
from dicomcam.road import disagreement, imputed, occlusion_agreement, road, road_films, side_by_side
from tiny import TinyNet

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

# forest plots

def table_of(**columns): return pd.DataFrame(columns, pd.Index(['gradcam', 'gradcam', 'noise'], name='map'))

def test_a_forest_has_a_row_for_each_row():
    "Names are the index and what stands left of the value; the ends are those of the table; maps that know nothing are grey"
    table = table_of(layer=['6', '7', ''], mean=[.8, .4, .1], low=[.7, np.nan, 0], high=[.9, np.nan, .3], n=9)
    ax = plot_forest(table, title='pointing', line=.1)
    assert [o.get_text() for o in ax.get_yticklabels()] == ['gradcam layer 6', 'gradcam layer 7', 'noise'] and ax.get_title() == 'pointing'
    (points, _, (bars,)), (grey, _, (grey_bars,)) = ax.containers
    assert points.get_xydata().tolist() == [[.8, 0], [.4, 1]] and grey.get_xydata().tolist() == [[.1, 2]] and grey.get_color() == 'gray'
    assert np.allclose([o[:, 0] for o in bars.get_segments()], [[.7, .9], [.4, .4]]) and np.allclose(grey_bars.get_segments()[0][:, 0], [0, .3])
    assert ax.get_ylim() == (2.5, -.5) # the first row on top

def test_a_forest_of_any_table():
    "Another value, several levels of names, the axes given, a name that matplotlib would set as a formula"
    ax = plt.subplots()[1]
    index = pd.MultiIndex.from_tuples([('$a_1$', 1)])
    assert plot_forest(pd.DataFrame(dict(accuracy=[.5], low=.4, high=.6), index), ax) is ax
    assert ax.get_yticklabels()[0].get_text() == r'\$a_1\$ 1'
    with pytest.raises(KeyError, match='low'): plot_forest(pd.DataFrame(dict(mean=[.5])))
    with pytest.raises(ValueError, match='a value left of low'): plot_forest(pd.DataFrame(dict(low=[.5], high=1)))

def test_several_measures_side_by_side():
    table = table_of(mean=[.8, .4, .1], low=[.7, .2, 0], high=[.9, .5, .3])
    fig = plot_forests(dict(mass=table, deletion=table), dict(deletion='small is good'))
    assert [o.get_title() for o in fig.axes] == ['mass', 'deletion'] and [o.get_xlabel() for o in fig.axes] == ['', 'small is good']

# localisation by patient, two maps, which lesions

def maps_of(method, *maps, layer='l', probs=None, cls='ill'):
    raw = torch.tensor(np.stack(maps), dtype=torch.float32)[:, None]
    n, size = len(raw), raw.shape[2:]
    return Heatmaps([raw], torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(0)), torch.ones(n, 1) if probs is None else torch.tensor(probs)[:, None],
                    [cls], [layer], method, vocab=['well', cls] if cls == 'ill' else [0, 1])

def blob(y, x, r=3, size=24):
    ys, xs = np.mgrid[:size, :size]
    return ((ys-y)**2+(xs-x)**2 <= r*r).astype(float)

def test_images_of_one_patient_are_one_witness():
    "Each film twice: the same means, and with the patients known the intervals are no narrower; a film without a mask has no say"
    rng = np.random.default_rng(0)
    masks = [blob(*o) > 0 for o in rng.integers(4, 20, (12, 2))]
    maps = [ndimage.gaussian_filter(m+rng.normal(size=m.shape), 2) for m in masks]
    h, who = maps_of('a', *maps, *maps, maps[0]), [*range(12), *range(12), 99]
    masks = masks*2+[None]
    naive, known = localization(h, masks, 'ill'), localization(h, masks, 'ill', group=who)
    assert (naive['mean'] == known['mean']).all() and (known.n == 24).all()
    wide = (known.high-known.low)/(naive.high-naive.low)
    assert wide['a', 'l', 'mass'] > 1.2 and wide['a', 'l', 'pointing'] > 1.2 and (wide.loc['a'] > .95).all()
    values = measures_by_image(h, masks, 'ill')
    assert mean_of_measures(values, group_of_rows(values, who)).equals(known)
    for f, m in ((pointing_game, 'pointing'), (mass_in_mask, 'mass'), (iou, 'iou'), (iobb, 'iobb')):
        assert f(h, masks, 'ill', group=who).loc['a', ['low', 'high']].tolist() == known.loc[('a', 'l', m), ['low', 'high']].tolist()

def test_two_maps_on_the_same_films():
    masks = [blob(y, 12) > 0 for y in range(4, 20)]
    right, wrong = maps_of('right', *masks), maps_of('wrong', *[np.roll(m, 12, 1) for m in masks])
    values = measures_by_image([right, wrong, maps_of('wrong', *masks, layer='m')], masks, 'ill', measures=('pointing', 'mass'))
    d = paired(values, 'right', ('wrong', 'l'))
    assert d.value.tolist() == [1, 1] and (d.p < .001).all() and (d.low.dropna() > .5).all() and d.index.tolist() == ['pointing', 'mass']
    assert paired(values, ('wrong', 'l'), 'right').value.tolist() == [-1, -1]
    by_patient = paired(values, 'right', 'noise', group=np.arange(16)//4)
    assert by_patient.p.tolist() == pytest.approx([2/2**4]*2) # four patients
    for name in 'left', 'wrong', ('right', 'm'):
        with pytest.raises(ValueError, match='No one map'): paired(values, name, 'noise')

def test_lesions_by_size_and_by_confidence():
    "Nine lesions; the map finds the large ones, the network is sure of the small; films without a mask have no say"
    sizes = [1, 1, 1, 3, 3, 3, 6, 6, 6]
    masks = [None, *[blob(12, 12, r) > 0 for r in sizes]]
    h = maps_of('a', *[blob(12, 12) if r == 6 else blob(2, 2) for r in (6, *sizes)], probs=[.1, *np.linspace(.95, .15, 9)])
    values = measures_by_image(h, masks, 'ill', grow=0, measures=('pointing',))
    t = by_lesion(values, h, masks, 'ill').loc[:, 'a', 'l', 'pointing']
    assert t.index[:2].tolist() == ['all', 'found (from 0.5 on)'] and t.n.tolist() == [9, 5, 3, 3, 3, 3, 3, 3]
    assert t['mean'].tolist() == pytest.approx([1/3, 0, 0, 0, 1, 1, 0, 0])
    assert t.index[2].startswith('size % 0.9 to ') and t.index[-1].endswith(' to 0.95')
    assert by_lesion(values, h, masks, 'ill', group=[*'xaaabbbccc']).loc[:, 'a', 'l', 'pointing'].high['all'] > t.high['all']
    alike = [None]+[masks[1]]*9
    lesions = by_lesion(measures_by_image(h, alike, 'ill', measures=('mass',)), h, alike, 'ill').index.get_level_values('lesions').unique()
    assert len(lesions) == 5 and not any('size' in o for o in lesions) # all of one size

# weights drawn anew

def test_likeness_has_two_figures():
    "The rank correlation of the raw maps, signs and all, and the SSIM of what speaks for the class; a flat map has neither"
    rng = np.random.default_rng(0)
    a = torch.tensor(ndimage.gaussian_filter(rng.normal(size=(3, 20, 20)), (0, 2, 2)), dtype=torch.float32)
    assert likeness(a, a).to_numpy() == pytest.approx(1) and likeness(a, -a).spearman.to_numpy() == pytest.approx(-1) and (likeness(a, -a).ssim < .8).all()
    t = likeness(a, torch.stack([a[0]**3, a[1]*0, -a[2].abs()]))
    assert t.spearman[0] == pytest.approx(1) and t.ssim[0] < .99 and np.isnan(t.loc[1]).all() and np.isnan(t.ssim[2]) and not np.isnan(t.spearman[2])
    assert mean_likeness(t)[3] == 2 and mean_likeness(t.loc[[1]])[3] == 0 and np.isnan(mean_likeness(t.loc[[1]])[0])
    assert np.isnan(likeness(torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8)).ssim[0]) # of a volume

def test_weights_drawn_several_times():
    "The mean over seeds of each image's likeness; one seed as before; the weights are put back; another film's map beside the baselines"
    net, x = TinyNet(2), torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    one, other, both = (randomization(net, x, 1, '6', **kw) for kw in (dict(seed=1), dict(seeds=[2]), dict(seeds=[1, 2])))
    rows = [o for o in one.index if o.startswith('from')]
    assert both.loc[rows, 'mean'].to_numpy() == pytest.approx((one.loc[rows, 'mean']+other.loc[rows, 'mean']).to_numpy()/2, abs=1e-6)
    assert ((both.ssim[rows] > 0) & (both.ssim[rows] < .5)).all()
    assert one.index[len(rows):].tolist() == ['centre', 'noise', 'edges', 'another film'] and one.columns.tolist() == ['mean', 'low', 'high', 'n', 'ssim', 'ssim_low', 'ssim_high']
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    table = randomizations(net, x, 1, [('gradcam', '6'), ('eigencam', '5')], seeds=[1, 2])
    assert table.loc['gradcam', '6'].equals(both) and table.index.names == ['map', 'layer', 'weights'] and (table.loc['eigencam', '5'].loc[['from 11 on', 'from 6 on'], 'mean'] > .99).all()
    assert 'another film' not in randomization(net, x[:1], 1, '6').index

# the model's answers

class Left(nn.Module):
    "Probability: the mean of the left half"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): s = self.w*x[:, 0, :, :x.shape[3]//2].mean((1, 2)); return torch.stack([1-s, s], 1)

def same_score(s): return s

def test_deletion_of_several_maps_by_patient():
    "Of several methods at once as of each by itself; the interval goes by patients"
    films = torch.ones(6, 1, 16, 16)*torch.linspace(.5, 1, 6).view(-1, 1, 1, 1)
    left, right = (maps_of(o, *[blob(8, x, 3, 16)]*6, cls=1) for o, x in (('left', 3), ('right', 12)))
    for h in left, right: h.images = films
    kw = dict(steps=8, fill=0., act=same_score)
    both = deletion(Left(), [left, right], 1, **kw)
    assert both.index.tolist() == ['left', 'right', 'centre', 'noise', 'edges'] and both.loc['left', 'mean'] < both.loc['centre', 'mean'] < both.loc['right', 'mean']
    assert deletion(Left(), right, 1, **kw).loc['right', ['mean', 'low', 'high']].tolist() == both.loc['right', ['mean', 'low', 'high']].tolist()
    by = deletion(Left(), [left, right], 1, group=[0, 0, 0, 1, 1, 1], **kw)
    assert (by['mean'] == both['mean']).all() and (by.high-by.low > both.high-both.low).all()

# ROAD

def test_missing_pixels_worked_out_by_hand():
    """1 4 1 / ? ? 4 / 1 4 1: the left one has five neighbours in the image, of weights 1/6, 1/6, 1/6, 1/12, 1/12; the middle one all eight.
    a*2/3 = (1+1+m)/6 + (4+4)/12 and m = (4+4+4+a)/6 + 4/12, so a = (1+m/6)*3/2 = 1.5+m/4 and m = 7/3+a/6"""
    x = torch.tensor([[[1., 4, 1], [9, 9, 4], [1, 4, 1]]])
    missing = np.zeros((3, 3), bool)
    missing[1, :2] = True
    m = (7/3+1.5/6)/(1-1/24)
    got = imputed(x, missing, noise=0)
    assert got[0, 1, :2].tolist() == pytest.approx([1.5+m/4, m], abs=1e-6) and torch.equal(got[:, ~torch.tensor(missing)], x[:, ~torch.tensor(missing)])
    assert x[0, 1, 0] == 9 and torch.equal(imputed(x, missing & False), x) # not in place
    with pytest.raises(ValueError, match='All pixels are missing'): imputed(x, missing | True)

def test_missing_pixels_as_pytorch_grad_cam_makes_them_up():
    road_of = pytest.importorskip('pytorch_grad_cam.metrics.road')
    rng = np.random.default_rng(0)
    for size, share in (((9, 12), .2), ((20, 15), .6), ((16, 16), .95)):
        x, missing = torch.tensor(rng.random((3, *size)), dtype=torch.float32), rng.random(size) < share
        theirs = road_of.NoisyLinearImputer(noise=0)(x, torch.tensor(~missing, dtype=torch.float32))
        assert torch.allclose(imputed(x, missing, noise=0), theirs, atol=1e-5)

def test_road_as_pytorch_grad_cam_has_it(monkeypatch):
    "ROADCombined, without its noise, of a map without ties"
    metrics = pytest.importorskip('pytorch_grad_cam.metrics.road')
    targets = pytest.importorskip('pytorch_grad_cam.utils.model_targets')
    x, heat = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)), np.random.default_rng(0).random((2, 20, 20)).astype(np.float32)
    h = maps_of('a', *heat, cls=1)
    h.images = x
    monkeypatch.setattr(metrics.NoisyLinearImputer.__init__, '__defaults__', (0., None))
    theirs = metrics.ROADCombined()(x, heat, [targets.ClassifierOutputTarget(1)]*2, Left())
    assert road(Left(), h, 1, noise=0, act=same_score).loc['a', 'mean'] == pytest.approx(np.mean(theirs), abs=2e-3)

def test_noise_is_on_what_was_made_up():
    x, missing = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)), blob(12, 12, 9) > 0
    plain, noisy = imputed(x, missing, 0), imputed(x, missing, .2)
    off = (noisy-plain)[:, torch.tensor(missing)]
    assert off.std().item() == pytest.approx(.2*x.std().item(), rel=.15) and torch.equal(noisy[:, torch.tensor(~missing)], x[:, torch.tensor(~missing)])
    assert torch.equal(imputed(x, missing, .2), noisy) and not torch.equal(imputed(x, missing, .2, seed=1), noisy)

def test_road_films():
    "Exactly the share is made up, of ties too: the brightest first, then the darkest"
    x, heat = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0)), np.arange(100.).reshape(10, 10)
    films = road_films(x, heat, (.1, .3), noise=.5)
    changed = (films != x)[:, 0].flatten(1)
    assert changed.sum(1).tolist() == [10, 30, 10, 30] and changed[0, 90:].all() and changed[1, 70:].all() and changed[2, :10].all() and changed[3, :30].all()
    assert (road_films(x, heat*0, (.5,), noise=.5) != x).flatten(1).sum(1).tolist() == [50, 50]
    for shares in (0,), (.5, 1):
        with pytest.raises(ValueError, match='between 0 and 1'): road_films(x, heat, shares)

def two_maps(n=14):
    "Films whose left half the model looks at, a lesion on the right; a map that follows the model, and one that finds the lesion"
    rng = np.random.default_rng(0)
    left, right = [np.stack([blob(y, x, 3, 24) for y in rng.integers(6, 18, n)]) for x in (5, 18)]
    films = torch.tensor(left+right+.05*rng.random((n, 24, 24)), dtype=torch.float32)[:, None]
    def smooth(a): return ndimage.gaussian_filter(a, (0, 1, 1))
    follows, finds = maps_of('follows', *smooth(left), cls=1), maps_of('finds', *smooth(right), cls=1)
    for h in follows, finds: h.images = films
    return follows, finds, [m > 0 for m in right]

def test_road_tells_what_the_model_looks_at():
    follows, finds, _ = two_maps()
    t = road(Left(), [follows, finds], 1, shares=(.05, .2), act=same_score)
    assert t.index.tolist() == ['follows', 'finds', 'centre', 'noise', 'edges'] and t.columns.tolist() == ['layer', 'mean', 'low', 'high', 'n']
    assert t.low['follows'] > max(t.high['finds'], .02) and abs(t['mean']['noise']) < .01 and (t.n == 14).all()

def test_agreement_with_occlusion():
    follows, finds, _ = two_maps()
    occluded = occlusion(Left(), follows.images, 1, fill=0., patch=4, act=same_score)
    t = occlusion_agreement([follows, finds], occluded, 1, group=np.arange(14)//2)
    assert t.low['follows'] > .5 > t.high['finds'] and t.ssim['follows'] > t.ssim['finds'] and t.columns.tolist()[:5] == ['layer', 'mean', 'low', 'high', 'n']
    with pytest.raises(ValueError, match='the same ones'): occlusion_agreement(follows, occlusion(Left(), follows.images[:2], 1, act=same_score), 1)

# side by side

def test_side_by_side_says_where_the_two_disagree():
    follows, finds, masks = two_maps()
    occluded = occlusion(Left(), follows.images, 1, fill=0., patch=4, act=same_score)
    r = side_by_side(Left(), [follows, finds], [None, *masks[1:]], 1, occluded=occluded, shares=(.05, .2), steps=4, act=same_score, group=np.arange(14))
    assert r.table.index.tolist() == [('follows', 'l'), ('finds', 'l'), ('centre', ''), ('noise', ''), ('edges', '')]
    assert r.table.columns.get_level_values(0).unique().tolist() == ['pointing', 'mass', 'auprc', 'deletion', 'insertion', 'road', 'occlusion']
    assert r.table.pointing.loc[('finds', 'l')].tolist()[:1] == [1] and r.table.pointing.n.eq(13).all() and r.table.road.n.eq(14).all()
    assert r.table.deletion.loc[('finds', 'l')].tolist() == pytest.approx(deletion(Left(), finds, 1, steps=4, act=same_score).loc['finds'].tolist()[1:])
    assert r.sentence.startswith('finds at layer l has the best pointing (1.00). The map that finds the lesion best is not the one that the model follows most: '
                                 'follows at layer l is behind by 1.00 in pointing, and ahead by ')
    assert 'road' in r.sentence.split('ahead by')[1].split('.')[0]
    assert len(plot_forests(r.forests()).axes) == 7
    table, values = mean_of_measures(r.values), r.values
    assert table['mean'].to_numpy() == pytest.approx([r.table.loc[k[:2], (k[2], 'mean')] for k in values])

def answers(**maps):
    "Values of one layer each, a measure each"
    return pd.DataFrame({(m, '' if m == 'noise' else 'l', k): v for m, o in maps.items() for k, v in o.items()}).rename_axis(columns=['map', 'layer', 'measure'])

def test_what_is_not_proven_is_not_said():
    rng = np.random.default_rng(0)
    base = rng.random(20)
    hit, miss, some = [1]*20, [0]*20, [1]*11+[0]*9
    a, b = dict(pointing=hit, deletion=base), dict(pointing=miss, deletion=base-.2)
    assert 'b at layer l is behind by 1.00 in pointing, and ahead by deletion' in disagreement(answers(a=a, b=b))
    assert disagreement(answers(a=a, b=b | dict(deletion=base+rng.normal(size=20)))).endswith('By deletion no map is proven to be followed more than it.')
    near = disagreement(answers(a=a, b=b | dict(pointing=[1]*19+[0])))
    assert 'The model follows b at layer l more, by deletion; in pointing the two are not told apart (difference 0.05).' in near
    alone = disagreement(answers(a=a))
    assert alone == 'a at layer l has the best pointing (1.00). By deletion no map is proven to be followed more than it.'
    assert 'by deletion a map that knows nothing of the model comes first (noise)' in disagreement(answers(a=a, noise=dict(pointing=some, deletion=base-.1))).replace('By', 'by')
    many = answers(a=a, **{f'm{i}': dict(pointing=[1]*13+[0]*7, deletion=base+1) for i in range(40)}, b=b | dict(pointing=[1]*14+[0]*6))
    assert disagreement(answers(a=a, b=b | dict(pointing=[1]*13+[0]*7))).count('is not the one') == 1 and disagreement(many).count('is not the one') == 0 # the best of 42 is no surprise

def test_films_of_one_patient_prove_no_more():
    "Six films of two patients"
    a, b = dict(pointing=[1]*12, road=np.linspace(.1, .2, 12)), dict(pointing=[0]*12, road=np.linspace(.3, .5, 12))
    assert 'is not the one' in disagreement(answers(a=a, b=b)) and 'is not the one' not in disagreement(answers(a=a, b=b), group=[0]*6+[1]*6)
