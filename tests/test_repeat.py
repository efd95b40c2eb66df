"Several maps of one film: mean, disagreement, likeness; which map is wrong, and what leaving maps unread spares; all worked out by hand"
import numpy as np, pandas as pd, pytest, torch

from dicomcam.heatmaps import Heatmaps
from dicomcam.localize import pointing_game
from dicomcam.repeat import abstain, abstention, layer_by_layer, map_copies, map_spread, trust_signals, repeatability, risk_areas, risk_coverage

def by_hand(*layers, probs=(.9, .1), method='gradcam', names=('4', '5')):
    "Heatmaps of two images and two classes, a raw array (2, 2, h, w) a layer."
    raw = [torch.as_tensor(o).float() for o in layers]
    return Heatmaps(raw, torch.rand(2, 1, 8, 8), torch.tensor([probs, probs]), ['well', 'ill'], names[:len(raw)], method)

def point(*places, value=1., size=8):
    "A map for each place, zero but there; the same for both classes."
    m = np.zeros((len(places), 2, size, size))
    for i, (y, x) in enumerate(places): m[i, :, y, x] = value
    return m

@pytest.fixture
def two(): return by_hand(point((1, 1), (2, 2))), by_hand(point((1, 1), (6, 6), value=3.), probs=(.7, .3))

def test_the_mean_is_of_raw_maps_and_the_spread_of_shares(two):
    s = map_spread(two)
    mean, spread = s.mean.maps[:, 1, 0], s.spread.maps[:, 1, 0]
    assert mean[0, 1, 1] == 2 and mean[1, 2, 2] == .5 and mean[1, 6, 6] == 1.5
    assert spread[0].max() == 0 and spread[1, 2, 2] == spread[1, 6, 6] == .5
    assert s.mean.probs[0].tolist() == pytest.approx([.8, .2]) and two[0].probs[0, 0] == pytest.approx(.9)
    assert s.mean.method == 'gradcam, mean of 2 maps' and s.spread.layers == ['4']

def test_measures_take_the_mean_map(two):
    mask = np.zeros((8, 8))
    mask[6, 6] = 1
    game = pointing_game(map_spread(two).mean, [None, mask], 'ill', grow=0)
    assert game['mean']['gradcam, mean of 2 maps'] == 1

def test_what_speaks_against_the_class_agrees_with_nothing_at_all():
    a, b = by_hand(-point((1, 1), (2, 2))), by_hand(point((1, 1), (2, 2))*0)
    assert map_spread([a, b]).spread.maps.max() == 0 and map_spread([a, b]).mean.maps.min() == -.5

def test_methods_and_layers_are_named():
    a, b = by_hand(point((1, 1), (2, 2)), names=['4']), by_hand(point((0, 0), (1, 1), size=4), method='hirescam', names=['5'])
    s = map_spread([a, b])
    assert (s.mean.method, s.mean.layers) == ('gradcam + hirescam, mean of 2 maps', ['4 + 5']) and s.mean.maps.shape[-1] == 8

def test_show_draws_image_mean_and_disagreement_on_one_scale(two):
    fig = map_spread(two).show(1, 'ill', mask=np.eye(8))
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:3] == ['image', 'ill 0.20, layer 4', 'disagreement']
    assert fig.axes[2].images[0].get_clim() == (0, .5) and fig.axes[2].images[0].get_array().max() == .5

@pytest.mark.parametrize('call', [map_spread, lambda hs: repeatability(hs, 'ill'), lambda hs: trust_signals(hs, 'ill')])
def test_maps_of_other_images_or_classes_are_refused(two, call):
    other = Heatmaps(two[0].raw, two[0].images, two[0].probs, ['well', 'sick'], ['4'], 'gradcam')
    with pytest.raises(ValueError, match='classes well, ill; 2 images, classes well, sick'): call([two[0], other])

def test_layers_must_be_as_many(two):
    with pytest.raises(ValueError, match='name one of each'): map_spread([two[0], by_hand(two[0].raw[0], two[0].raw[0])])

def test_signals_by_hand(two):
    table = trust_signals(two, 'ill')
    assert table.confirmed.tolist() == [1, 0] and table.consensus.tolist() == [1, .5]
    assert table.likeness.tolist() == pytest.approx([1, -1/63])  # two points among 64 pixels
    assert table.sharpness.tolist() == pytest.approx([63/64]*2)
    assert table.maximum.tolist() == [2, 1.5] and table.probability.tolist() == pytest.approx([.2, .2])

def test_signals_of_one_map_and_of_a_flat_one(two):
    table = trust_signals(two[0], 'ill')
    assert table[['confirmed', 'likeness']].isna().all(axis=None) and table.sharpness.notna().all()
    assert trust_signals(by_hand(-point((1, 1), (2, 2))), 'ill').isna().all(axis=None)

def test_repeatability_is_by_patient_and_leaves_flat_maps_out():
    rng = np.random.default_rng(0)
    x = torch.rand(6, 1, 8, 8)
    def h(raw): return Heatmaps([torch.tensor(raw)[:, None].float()], x, torch.ones(6, 1), ['ill'], ['4'], 'gradcam')
    maps = rng.random((6, 8, 8))
    flat = maps.copy()
    flat[0] = 0
    table = repeatability([h(maps), h(maps), h(flat)], 'ill', side=16)
    assert table.n.tolist() == [5]*4
    assert table['mean']['same'].tolist() == pytest.approx([1, 1])
    assert abs(table['mean']['different', 'spearman']) < .3
    one_patient = repeatability([h(maps), h(rng.random((6, 8, 8)))], 'ill', side=16, group=[7]*6)
    assert one_patient.low.isna().all() and one_patient.n.tolist() == [6, 6, 0, 0] # nobody else is there

RIGHT, TRUST = [1, 1, 0, 1, 0], [.9, .8, .7, .6, .5]

def test_risk_and_coverage_by_hand():
    table = risk_coverage(RIGHT, TRUST)
    assert table.index.tolist() == TRUST and table['read'].tolist() == [1, 2, 3, 4, 5]
    assert table.risk.tolist() == pytest.approx([0, 0, 1/3, 1/4, 2/5]) and (table.low <= table.risk).all()

def test_films_without_trust_are_read_last_and_equals_together():
    for worst in (np.nan, -5):
        table = risk_coverage(RIGHT, [2, 2, 1, worst, worst])
        assert table['read'].tolist() == [2, 3, 5] and table.misses.tolist() == [0, 1, 2]
    # two together, then the wrong one, then two of no trust: (2*0 + 1*1/3 + 2*2/5)/5
    assert risk_areas(RIGHT, pd.DataFrame(dict(a=[2, 2, 1, np.nan, np.nan]))).value['a'] == pytest.approx((1/3+4/5)/5)

def test_areas_by_hand_best_and_chance():
    areas = risk_areas(RIGHT, pd.DataFrame(dict(a=TRUST)))
    assert areas.value['a'] == pytest.approx((1/3+1/4+2/5)/5)
    assert areas.value['best possible'] == pytest.approx((1/4+2/5)/5) and areas.value['chance'] == pytest.approx(2/5)
    assert areas.index.tolist() == ['best possible', 'a', 'chance']

def test_areas_resample_patients():
    "Each film five times over is no more evidence"
    five = [np.repeat(o, 5) for o in (RIGHT, TRUST, range(5))]
    once = risk_areas(RIGHT, pd.DataFrame(dict(a=TRUST))).loc['a']
    assert risk_areas(five[0], pd.DataFrame(dict(a=five[1])), group=five[2]).loc['a', ['low', 'high']].tolist() == \
        pytest.approx(once[['low', 'high']].tolist(), abs=.05)

@pytest.mark.parametrize('right, trust, says', [([1], [1, 2], '1 maps right or wrong, but 2'), ([.5], [1], 'True and False'), ([], [], 'at least one')])
def test_what_is_neither_right_nor_wrong_is_refused(right, trust, says):
    with pytest.raises(ValueError, match=says): risk_coverage(right, trust)

def test_the_threshold_is_that_of_other_films():
    others = [.5, .1, .9, .3, .7, np.nan]
    assert abstain([.3, .29, .9, np.nan], others, .8).tolist() == [False, True, False, True]
    assert (~abstain(others[:5], others, .8)).sum() == 4
    assert abstain([0.], others, 1).tolist() == [True] and not abstain(others[:5], others, 1).any()

@pytest.mark.parametrize('others, coverage, says', [([], .8, 'takes some'), ([np.nan], .8, 'takes some'), ([1], 0, 'coverage=0'), ([1], 80, 'coverage=80')])
def test_a_threshold_takes_films_and_a_share(others, coverage, says):
    with pytest.raises(ValueError, match=says): abstain([1], others, coverage)

def test_what_abstention_spares_by_hand():
    table = abstention([1, 1, 1, 0, 0], [True, False, False, True, False])
    assert table.value.to_dict() == pytest.approx({'coverage': 3/5, 'risk of all': 2/5, 'risk': 1/3, 'misses left': 1/2, 'right unread': 1/3})
    assert table.n.tolist() == [5, 5, 3, 2, 3]
    assert np.isnan(abstention([1, 1], [False, True]).value['misses left'])  # there is none

def test_copies_of_one_network_are_brought_back_to_their_place():
    "A network that sees the left edge alone sees the right edge of the image in its mirror image"
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2*8*8, 2)).eval()
    for w in net.parameters(): w.data.zero_()
    net[0].weight.data[0] = 1
    net[3].weight.data[1, :64:8] = 1
    x = torch.rand(2, 1, 8, 8)+.1
    plain, mirror, brighter = map_copies(net, x, 1, 0, 'hirescam', factors=[2.])
    assert not plain.raw[0][..., 1:].any() and not mirror.raw[0][..., :-1].any()
    assert torch.allclose(plain.raw[0][:, 0, :, 0], x[:, 0, :, 0]) and torch.allclose(mirror.raw[0][:, 0, :, -1], x[:, 0, :, -1], atol=1e-6)
    assert torch.allclose(brighter.raw[0], 2*plain.raw[0]) and {h.method for h in (plain, mirror, brighter)} == {'hirescam'}
    assert len(map_copies(net, x, 1, 0, 'hirescam', factors=[], flip=False)) == 1

def test_a_map_is_confirmed_by_the_others_where_it_is_brightest():
    "The first points at (1, 1); one of three witnesses too, one is half as bright there, one has nothing"
    half = point((1, 1), (1, 1))
    half[:, :, 5, 5] = 2
    hs = [by_hand(o) for o in (point((1, 1), (1, 1)), point((1, 1), (1, 1), value=9.), half, point((4, 4), (4, 4)))]
    assert trust_signals(hs, 'ill').confirmed.tolist() == [.5, .5]
    assert trust_signals(hs[::-1], 'ill').confirmed.tolist() == [0, 0]

def test_layers_become_maps_of_their_own():
    a, b = layer_by_layer(by_hand(point((1, 1), (2, 2)), point((1, 1), (0, 0), size=4)))
    assert (a.layers, b.layers, b.raw[0].shape[-1]) == (['4'], ['5'], 4) and len(map_spread([a, b]).mean) == 2
