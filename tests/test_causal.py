"What a score owes to what differs between two films, and whose fault it is when the map lies elsewhere: by models made by hand."
import numpy as np, pandas as pd, pytest, torch
from torch import nn

from dicomcam.causal import causal_effects, causal_map, causal_table
from dicomcam.gradcam import gradcam
from dicomcam.heatmaps import Heatmaps
from dicomcam.intervals import proportion_interval
from dicomcam.scale import HeatScale

SIZE = 16

def model(rows, columns, weight=1., bias=-2.):
    "Log-odds: the sum of a part of the image"
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(SIZE*SIZE, 2))
    for o in net.parameters(): o.data.zero_()
    net[0].weight.data.fill_(1)
    net[2].weight.data[1].view(SIZE, SIZE)[rows, columns] = weight
    net[2].bias.data[1] = bias
    return net.eval()

PATCH = np.s_[2:4, 2:4]

@pytest.fixture
def pair():
    "Six films with a bright patch, and without"
    without = torch.rand(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))/100
    films = without.clone()
    films[:, 0, 2:4, 2:4] += 1
    patch = np.zeros((SIZE, SIZE), bool)
    patch[PATCH] = True
    return films, without, [patch]*6

def odds(net, x): return torch.logit(net(x).double().softmax(1)[:, 1])

def test_map_adds_up_and_is_zero_elsewhere(pair):
    films, without, (patch, *_) = pair
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    torch.manual_seed(1)
    for o in net.parameters(): nn.init.normal_(o)
    h = causal_map(net, films, without, 1, n_steps=200)
    change = (odds(net, films)-odds(net, without)).detach()
    assert torch.allclose(h.raw[0][:, 0].sum((1, 2)).double(), change, rtol=.02, atol=1e-3)
    assert not h.raw[0][:, 0, ~torch.tensor(patch)].any() and h.method == 'causal' and h.layers == ['input']
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) # as it was found

def test_map_of_the_other_class_is_its_negative(pair):
    films, without, _ = pair
    maps = [causal_map(model(*PATCH), films, without, o).raw[0] for o in (0, 1)]
    assert torch.allclose(maps[0], -maps[1], atol=1e-5) and maps[1].max() > .5

def test_map_of_many_batches(pair):
    films, without, _ = (o*20 if isinstance(o, list) else o.repeat(20, 1, 1, 1) for o in pair)
    h = causal_map(model(*PATCH), films, without, 1)
    assert len(h) == 120 and torch.allclose(h.raw[0][:6], h.raw[0][-6:])

@pytest.mark.parametrize('n', [3, 5])
def test_a_twin_each(pair, n):
    films, without, regions = pair
    with pytest.raises(ValueError, match='twins'): causal_map(model(*PATCH), films, without[:n], 1)
    with pytest.raises(ValueError, match='twins'): causal_effects(model(*PATCH), gradcam(model(*PATCH), films, 1, '0'), without[:n], regions, 1)

def test_twins_of_another_size(pair):
    films, without, _ = pair
    with pytest.raises(ValueError, match='of one size'): causal_map(model(*PATCH), films, without[..., :8], 1)

def effects_of(net, pair, method='hirescam', **kw):
    films, without, regions = pair
    return causal_effects(net, gradcam(net, films, 1, '0', method), without, regions, 1, **kw)

def test_effects_are_the_scores(pair):
    films, without, _ = pair
    net = model(*PATCH)
    effects = effects_of(net, pair)
    mine = effects[effects['map'] == 'hirescam']
    assert list(effects['map'].unique()) == ['hirescam', 'centre', 'noise', 'edges'] and len(effects) == 24
    with torch.no_grad(): probs, before = (net(o).softmax(1)[:, 1] for o in (films, without))
    assert np.allclose(mine['with'], probs) and np.allclose(mine['without'], before) and np.allclose(mine.change, probs-before, atol=1e-6)
    assert np.allclose(mine.log_odds, (odds(net, films)-odds(net, without)).detach(), atol=1e-4)
    assert np.allclose(mine.mass, 1) and (mine.pointing == 1).all()

def test_sure_models_still_move_in_log_odds(pair):
    effects = effects_of(model(*PATCH, weight=2., bias=10.), pair)
    assert effects.change.max() < 1e-4 and np.allclose(effects.log_odds, 8, atol=.1)
    right, by = causal_table(effects, by='log_odds', at=1), causal_table(effects)
    assert right.loc['hirescam', '0', True, True].pairs == 6 and by.loc['hirescam', '0', False].pairs.sum() == 6

def test_regions_may_be_left_out(pair):
    films, without, regions = pair
    effects = effects_of(model(*PATCH), (films, without, [None, *regions[1:]]))
    assert set(effects.image) == set(range(1, 6))
    table = causal_table(effects, group=list('aabbcc'))
    assert table.loc['hirescam', '0', True, True].pairs == 5

ELSEWHERE = np.s_[10:12, 10:12]

def by_hand(net, pair, where):
    "Heatmaps that light up `where` on the films of a pair, whatever the model does"
    films, without, regions = pair
    raw = torch.zeros(6, 1, SIZE, SIZE)
    raw[(slice(None), 0, *where)] = 1
    h = Heatmaps([raw], films, torch.ones(6, 1), [1], ['last'], 'by hand', vocab=[0, 1])
    return causal_table(causal_effects(net, h, without, regions, 1, grow=0)).loc['by hand', 'last']

@pytest.mark.parametrize('looks,shows,verdict', [(PATCH, PATCH, 'the map is right'), (PATCH, ELSEWHERE, 'the map fails'),
    (ELSEWHERE, PATCH, 'the map invents'), (ELSEWHERE, ELSEWHERE, 'the model fails')])
def test_failing_map_or_failing_model(pair, looks, shows, verdict):
    table = by_hand(model(*looks), pair, shows)
    cell = table[table.verdict == verdict]
    assert cell.pairs.tolist() == [6] and table.pairs.sum() == 6
    assert (cell.share.iloc[0], cell.low.iloc[0], cell.high.iloc[0]) == tuple(proportion_interval([True]*6))
    other = table.xs(not cell.index[0][0], level='reacts')
    assert other.share.isna().all() and (other.pairs == 0).all()

def test_shares_are_of_the_pairs_to_which_the_model_reacts_alike():
    effects = pd.DataFrame(dict(image=range(8), map='m', layer='l', change=[.5]*5+[0.]*3, log_odds=0., pointing=[1, 1, 1, 0, .2, 1, 0, 0], mass=0., dark=False))
    table = causal_table(effects).loc['m', 'l']
    assert table.pairs.to_dict() == {(True, True): 3, (True, False): 2, (False, True): 1, (False, False): 2}
    assert np.allclose(table.share, [.6, .4, 1/3, 2/3])
    grouped = causal_table(effects, group=[0, 0, 1, 1, 2, 3, 4, 5]).loc['m', 'l']
    assert np.allclose(grouped[['share', 'low', 'high']].iloc[0].astype(float), proportion_interval([1, 1, 1, 0, 0], [0, 0, 1, 1, 2]))

@pytest.mark.parametrize('threshold,verdict', [(.5, 'the map invents'), (2., 'the model fails')])
def test_a_map_that_is_dark_on_the_scale_of_all_films_shows_nothing(pair, threshold, verdict):
    "Its brightest pixel lies in the region, and is no brighter than those of healthy films"
    films, without, regions = pair
    raw = torch.zeros(6, 1, SIZE, SIZE)
    raw[:, 0, *PATCH] = 1
    h = Heatmaps([raw, raw+1], films, torch.ones(6, 1), ['ill'], ['5', '7'], 'gradcam', vocab=['well', 'ill'])
    def tables(): return causal_table(causal_effects(model(*ELSEWHERE), h, without, regions, -1, grow=0))
    def verdicts(layer): return (t := tables().loc['gradcam', layer]).verdict[t.pairs > 0].tolist()
    assert verdicts('5') == ['the map invents'] # by its own maximum
    h.scale = HeatScale(threshold, 3., 'ill', '5', 'gradcam', 60, 20)
    assert verdicts('5') == [verdict] and verdicts('7') == ['the map invents'] # of layer 7 no scale is known

def test_unknown_change():
    with pytest.raises(ValueError, match="No change 'words'"): causal_table(pd.DataFrame(), by='words')

def test_files_of_a_learner(tmp_path, tiny_learner):
    "Films as files, through a Learner's transforms"
    from dicomcam.pairs import phantom_pairs, read_pairs
    pairs = read_pairs(phantom_pairs(tmp_path/'p', n=3, size=96, change='word', n_jobs=1, progress=False))
    films, twins = pairs.file.tolist(), pairs.twin.tolist()
    h = causal_map(tiny_learner, films, twins, 'Pneumothorax', n_steps=3)
    effects = causal_effects(tiny_learner, gradcam(tiny_learner, films, 'Pneumothorax', -6), twins, pairs.region.tolist(), 'Pneumothorax')
    assert h.items == films and h.native(0).shape == (96, 96) and len(effects) == 12 and effects.change.abs().max() > 0
