"The mean lesion: as a map on each film's own view, as a baseline, and as a weight; measures against scikit-learn"
import numpy as np, pytest, torch
from sklearn.metrics import average_precision_score

from dicomcam.heatmaps import Heatmaps
from dicomcam.localize import baselines, localization, pointing_game
from dicomcam.measures import MEASURES
from dicomcam.phantom import phantom
from dicomcam.prior import lesion_prior
from dicomcam.view import View

def spot(y, x, shape=(40, 40)):
    m = np.zeros(shape)
    m[y, x] = 1
    return m

LEFT, RIGHT = spot(slice(10, 20), slice(0, 20)), spot(slice(10, 20), slice(20, 40))

def heatmaps(*maps, view=None, items=None):
    raw = torch.stack([torch.as_tensor(m, dtype=torch.float32) for m in maps])[:, None]
    return Heatmaps([raw], torch.zeros(len(raw), 1, *raw.shape[-2:]), torch.ones(len(raw), 1), ['a'], ['l'], 'test', items, view)

def test_each_film_counts_once_whatever_its_size():
    prior = lesion_prior([LEFT, np.kron(RIGHT, np.ones((3, 3))), None, LEFT*0], side=40, blur=0)
    assert prior.n == 2 and prior.grid == pytest.approx((LEFT+RIGHT)/2)
    with pytest.raises(ValueError, match='No lesion is known'): lesion_prior([None, LEFT*0])

def test_smoothing_keeps_the_mean():
    sharp, smooth = [lesion_prior([LEFT], 40, blur).grid for blur in (0, .05)]
    assert smooth.mean() == pytest.approx(sharp.mean(), rel=.02) and smooth.max() < sharp.max()

@pytest.mark.parametrize('method', ['pad', 'crop', 'squish'])
def test_seen_as_the_film_itself_is_seen(method):
    rows, cols = 120, 80
    y, x = np.mgrid[:rows, :cols]
    film = np.exp(-((y-50)**2+(x-30)**2)/400)
    prior, view = lesion_prior([film > .5], side=120, blur=0), View(60, method)
    seen, there = prior.seen(view, rows, cols, (60, 60)).numpy(), view.there((film > .5).astype(np.float32))/65535
    assert abs(seen-there).mean() < .01 and np.corrcoef(seen.ravel(), there.ravel())[0, 1] > .97
    if method == 'pad': assert not seen[:, :10].any() and not seen[:, -10:].any()

def test_prior_on_films_of_several_proportions(tmp_path):
    files = sorted(phantom(tmp_path/'p', n=2, size=64).rglob('*.dcm'))
    h = heatmaps(np.ones((40, 40)), np.ones((40, 40)), view=View(40, 'pad'), items=files)
    h._sizes = {0: (40, 40, None), 1: (40, 80, None)}
    prior = lesion_prior([np.ones((8, 8))])
    places = h.seen(prior)
    assert places[0].min() > .999 and not places[1, :10].any() and places[1, 11:29].min() > .999

def test_times_is_named_and_keeps_only_what_speaks_for_the_class():
    h = heatmaps(LEFT-RIGHT, -LEFT)
    prior = lesion_prior([LEFT, RIGHT], 40, 0)
    t = h.times(prior, floor=0)
    assert t.method == 'test x prior' and h.method == 'test'
    assert torch.equal(t.maps[0, 0, 0], torch.tensor(LEFT/2).float()) and not t.maps[1].any()
    assert (t.classes, t.layers, t.vocab) == (h.classes, h.layers, h.vocab) and torch.equal(t.probs, h.probs)
    half = h.times(prior).maps[0, 0, 0].numpy()
    assert half == pytest.approx(LEFT*.75+RIGHT*.25) # 1.5 and .5 of .5
    fig = t.show(0)
    assert any('test x prior' in ax.get_ylabel() for ax in fig.axes)

def test_volumes_have_no_prior():
    raw = torch.ones(1, 1, 4, 4, 4)
    h = Heatmaps([raw], torch.zeros(1, 1, 8, 8, 8), torch.ones(1, 1), ['a'], ['l'], 'test')
    with pytest.raises(ValueError, match='A prior is of films'): h.times(lesion_prior([LEFT]))

def test_prior_among_the_baselines():
    h, prior = heatmaps(LEFT, RIGHT), lesion_prior([LEFT], 40, 0)
    assert [o.method for o in baselines(h)] == ['centre', 'noise', 'edges']
    assert [o.method for o in baselines(h, prior=prior)] == ['centre', 'noise', 'edges', 'prior']
    game = pointing_game(h, [LEFT, RIGHT], 'a', grow=0, prior=prior)
    assert game['mean'][['test', 'prior']].tolist() == [1, .5] and game.n['prior'] == 2
    means = localization([h, h.times(prior, floor=0)], [LEFT, RIGHT], 'a', prior=prior)['mean'].droplevel('layer')
    assert means['test x prior', 'mass'] == .5 and means['prior', 'mass'] == .5 # of nothing, nothing is left

@pytest.mark.parametrize('levels', [2, 10, 1000])
def test_pixel_auprc_is_that_of_scikit_learn(levels):
    g = np.random.default_rng(0)
    mask = np.zeros((60, 50), bool)
    mask[10:30, 20:40] = True
    heat = np.round((g.random(mask.shape)+mask*.4)/1.4*levels)/levels
    heat = heat/heat.max()
    ours = MEASURES['auprc'](heat, mask, mask, .5)
    assert ours == pytest.approx(average_precision_score(mask.ravel(), np.floor(heat*1000).ravel()), abs=1e-9)
    assert ours == pytest.approx(average_precision_score(mask.ravel(), heat.ravel()), abs=.01)

def test_pixel_auprc_at_the_ends():
    mask = LEFT > 0
    measure = MEASURES['auprc']
    assert measure(LEFT, mask, mask, .5) == 1
    assert measure(LEFT*0, mask, mask, .5) == mask.mean() # says nothing: the lesion's share
