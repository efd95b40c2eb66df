"Intervals that hold the truth as often as they say, of shares, of skewed means, of areas, by patient; pairs; FROC curves worked out by hand."
from itertools import product

import numpy as np, pytest, torch
from matplotlib import pyplot as plt
from scipy.stats import beta, binom, norm, ttest_1samp, wilcoxon

from dicomcam.froc import froc, froc_curve, froc_point, plot_froc
from dicomcam.heatmaps import Heatmaps
from dicomcam.intervals import interval, mean_interval, paired_difference, patient_resamples, proportion_interval, roc_area, roc_counts

RATES, SIZES = (.1, .5, .9), (15, 30, 100)

def held(truth, intervals):
    "How many of the intervals, in percent, hold the truth"
    return 100*np.mean([low <= truth <= high for _, low, high in intervals])

# shares

def test_no_hit_in_29_is_not_never():
    assert mean_interval([0]*29) == proportion_interval([False]*29) and mean_interval([0]*29)[1:] == pytest.approx((0, 1-.025**(1/29)))
    assert proportion_interval([True]*14)[1:] == pytest.approx((beta.ppf(.025, 14, 1), 1))

@pytest.mark.parametrize('f', [mean_interval, proportion_interval])
@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('rate', RATES)
def test_a_share_is_held_in_95_of_100_studies(rate, n, f):
    "Computed, not simulated: the probability of each count whose interval holds the rate. (The percentile bootstrap: 78 for 15 images at 0.9)"
    ends = [f([1]*k+[0]*(n-k)) for k in range(n+1)]
    assert 93 <= 100*sum(binom.pmf(k, n, rate) for k, (_, low, high) in enumerate(ends) if low <= rate <= high) < 97.5

@pytest.mark.parametrize('n', SIZES)
def test_a_share_of_patients_with_several_images(n):
    "One to four films a patient, who are alike in what they hit: as if images were patients, 84 of 100"
    rng, ends, naive = np.random.default_rng(n), [], []
    for _ in range(500):
        who = np.repeat(np.arange(n), rng.integers(1, 5, n))
        hits = rng.random(len(who)) < rng.beta(1, 1, n)[who]
        ends.append(mean_interval(hits, group=who))
        naive.append(mean_interval(hits))
    assert 92.5 <= held(.5, ends) <= 97.5 and held(.5, naive) < 91

def test_images_of_one_patient_count_once_where_all_are_hits():
    assert proportion_interval([1]*29, np.arange(29)%10)[1:] == pytest.approx((beta.ppf(.025, 10, 1), 1))
    share, low, high = proportion_interval([1, 0, 1], ['Ann']*3)
    assert share == 2/3 and np.isnan([low, high]).all()
    assert proportion_interval([1, 0]*10, np.arange(20)//2)[1:] == pytest.approx(proportion_interval([1, 0]*10)[1:], abs=.03) # at most as many as images

def test_what_is_no_share():
    with pytest.raises(ValueError, match='hits and misses'): proportion_interval([.2, 1])
    with pytest.raises(ValueError, match='3 values, but 2 patients'): proportion_interval([1, 0, 1], ['Ann', 'Bob'])

# means

SKEWED = dict(exponential=(lambda rng, n: rng.exponential(size=n), 1), iou=(lambda rng, n: rng.beta(.5, 2, n), .2), mostly_nothing=(lambda rng, n: rng.beta(2, 4, n)*(rng.random(n) < .7), .7/3),
              left=(lambda rng, n: rng.beta(6, 1.5, n), .8), even=(lambda rng, n: rng.normal(size=n), 0))

@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('name', SKEWED)
def test_a_mean_of_skewed_values_is_held_in_95_of_100_studies(name, n):
    "(The percentile bootstrap: 88 for 15 exponential values)"
    draw, truth = SKEWED[name]
    rng = np.random.default_rng(n)
    assert 92.5 <= held(truth, [mean_interval(draw(rng, n)) for _ in range(1000)]) <= 97.5

@pytest.mark.parametrize('n', SIZES)
def test_a_mean_by_patient(n):
    rng, ends, naive = np.random.default_rng(n), [], []
    for _ in range(700):
        who = np.repeat(np.arange(n), rng.integers(1, 5, n))
        values = rng.exponential(size=n)[who]+rng.exponential(size=len(who))
        ends.append(mean_interval(values, group=who))
        naive.append(mean_interval(values))
    assert 92.5 <= held(2, ends) <= 97.5 and held(2, naive) < 90

def test_a_mean_interval_worked_out():
    "Symmetric values: Student's interval; without spread, or of nobody, nothing is known; within 0 and 1 where values are"
    v = np.array([1., 2, 3, 4, 5])
    assert mean_interval(v) == pytest.approx((3, *ttest_1samp(v, 0).confidence_interval()))
    assert mean_interval(np.repeat(v, 3), group=np.repeat(list('abcde'), 3)) == pytest.approx(mean_interval(v))
    for nothing in [.3], [.3, .3, .3], []: assert np.isnan(mean_interval(nothing)[1:]).all()
    assert mean_interval([.01, .02, .03, .9])[1] == 0 and mean_interval([.99, .98, .97, .1])[2] == 1
    assert mean_interval(v, 500, 7) == mean_interval(v) # as it was called before

TIES = dict(two=lambda rng, n: np.full(n, .5), several=lambda rng, n: rng.random(n), flat=lambda rng, n: rng.beta(2, 40, n)) # what a map points at with its brightest pixels

@pytest.mark.parametrize('n', SIZES)
def test_pointing_with_ties_is_held_in_95_of_100_studies(n):
    """In 10 or 40 of 100 films several pixels are equally bright, and count by their share: two of them, any number, all of a flat map. (Hall's interval: 57 to
    97 for 15 films; Wilson's for as many hits and misses: up to 100)"""
    rng, shares = np.random.default_rng(n), []
    for rate, tied, between in product((.1, .5, .9), (.1, .4), TIES.values()):
        values = np.where(rng.random((160, n)) < tied, between(rng, (160, n)), rng.random((160, n)) < rate)
        truth = (1-tied)*rate+tied*between(np.random.default_rng(0), 10**5).mean()
        shares.append(held(truth, [mean_interval(o, hits=True) for o in values]))
    assert 89 <= min(shares) and 93 <= np.mean(shares) <= 97.5 # of 160 studies, 95 may come out as 90; of all, it is within 1

def test_the_caller_says_what_a_hit_is():
    "Shares of a film, as of a mass or an IoU, are no chances of a hit, be they ever so many zeros; chances are, be they ever so few"
    few = [0]*20+[.1, .2, .3, .1]
    assert mean_interval(few) != mean_interval(few, hits=True) and mean_interval([.06, .05, .07, .06]*4)[2] < .1 < mean_interval([.06, .05, .07, .06]*4, hits=True)[2]
    assert mean_interval([1, 0, 1, 1], hits=True) == mean_interval([1, 0, 1, 1]) == proportion_interval([1, 0, 1, 1])
    with pytest.raises(ValueError, match='A hit is 1'): mean_interval([2, 0], hits=True)

def test_pointing_is_said_to_be_hits_and_mass_is_not():
    import pandas as pd
    from dicomcam.localize import mean_of_measures, paired
    few, columns = np.r_[np.zeros(20), .1, .2, .3, .1], pd.MultiIndex.from_product([['a', 'b'], [''], ['pointing', 'mass']], names=['map', 'layer', 'measure'])
    values = pd.DataFrame({k: few if k[0] == 'a' else 0*few for k in columns}, columns=columns)
    t, d = mean_of_measures(values), paired(values, 'a', 'b')
    assert tuple(t.loc[('a', '', 'pointing')][:3]) == mean_interval(few, hits=True) and tuple(t.loc[('a', '', 'mass')][:3]) == mean_interval(few)
    assert d.high['pointing'] == paired_difference(few, 0*few, hits=True)['high'] != d.high['mass'] == paired_difference(few, 0*few)['high']

def test_pointing_with_ties_worked_out():
    "Two dozen misses, one of them a near miss: as sure as two dozen misses, and no surer; a share of 1 likewise; images of one patient count once"
    def of(*args, **kw): return mean_interval(*args, **kw, hits=True)
    assert of([.05]+[0]*23)[2] == pytest.approx(of([0]*24)[2], abs=.01) and of([.95]+[1]*23)[1] == pytest.approx(of([1]*24)[1], abs=.01)
    mean, low, high = of([.5, 1, 1, 0])
    spread = np.var([.5, 1, 1, 0, 0, 0, 1, 1])/.5625/.4375 # mean 4.5 of 8
    n, z = 4/spread, norm.ppf(.975)
    arm = z*np.sqrt(.625*.375/n+z**2/4/n**2)
    assert mean == .625 and spread == pytest.approx(.873, abs=.001) and (low+high, high-low) == pytest.approx([2*o/(1+z**2/n) for o in (.625+z**2/2/n, arm)])
    who, values = np.repeat(np.arange(12), 2), np.repeat([.05]+[0]*11, 2)
    once, twice, naive = of(values[::2]), of(values, group=who), of(values)
    assert naive[2] < once[2] < twice[2] == pytest.approx(once[2], abs=.05)
    assert of([.5]*8)[1:] == pytest.approx((.5-(h := (of([.5]*8)[2]-.5)), .5+h)) and .15 < h < .2 # all the same, and still not sure

def test_pairs_of_hits_and_a_few_that_lie_between():
    "One near miss among two dozen misses does not tell two maps apart to the hundredth"
    none, near = np.zeros(24), np.eye(24)[0]/20
    d, plain = paired_difference(near, none, hits=True), paired_difference(none, none)
    assert d['high'] == pytest.approx(plain['high'], abs=.01) and d['low'] == pytest.approx(plain['low'], abs=.01) and d['p'] == 1

# metrics from resamples

@pytest.mark.parametrize('n,gap', [(15, 2.3), (30, 1.2), (30, 3)])
def test_an_area_near_one_is_held(n, gap):
    "(The percentile bootstrap: 90 for 30 of either class and an AUC of 0.95)"
    truth, ends, rng = norm.cdf(gap/2**.5), [], np.random.default_rng(1)
    for i in range(300):
        y = np.arange(2*n) < n
        areas = roc_area(*roc_counts(y, rng.normal(size=2*n)+gap*y, patient_resamples(np.arange(2*n), 200, i)))
        ends.append(interval(areas, n).values())
    assert 92 <= held(truth, ends) <= 99.5

def test_a_share_from_resamples_is_that_without():
    "Whose images are in pairs: the resamples' variance says how many they are worth"
    rng = np.random.default_rng(0)
    hits, who = np.repeat(rng.random(40) < .8, 2), np.arange(80)//2
    w = patient_resamples(who, 4000, 0)
    got = interval(w@hits/w.sum(1), 40)
    assert (got['low'], got['high']) == pytest.approx(proportion_interval(hits, who)[1:], abs=.01)
    assert got == interval(np.r_[w@hits/w.sum(1), np.nan], 40) # what is not known does not count

@pytest.mark.parametrize('n', SIZES[:2])
def test_evaluate_holds_what_it_says(n):
    "Sensitivity 0.9, often 1 where there are 15 of the ill; specificity 0.5; a threshold that divides them so; two films a patient who are alike"
    import pandas as pd
    from dicomcam.results import evaluate
    rng, y, who, ends = np.random.default_rng(n), np.arange(4*n) < 2*n, np.arange(4*n)//2, []
    for _ in range(120):
        called = np.repeat(rng.random(2*n) < np.where(y[::2], .9, .5), 2)
        p = np.where(called, .7, .2)
        r = evaluate(pd.DataFrame(dict(file='a.dcm', label=np.where(y, 'ill', 'well'), patient=who.astype(str), loss=0., well=1-p, ill=p)), n_resamples=150)
        ends.append([(0, *list(r[k].values())[1:]) for k in ('sensitivity', 'specificity')])
    for truth, intervals in zip((.9, .5), zip(*ends)): assert 91 <= held(truth, intervals) <= 99.5

# pairs

def test_pairs_worked_out():
    a, b = [1, 1, 1, 1, 1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    d = paired_difference(a, b)
    assert d['value'] == pytest.approx(.6) and d['p'] == 2/2**6 and d['low'] > 0 # McNemar's exact p: six images, all for a
    assert paired_difference(b, a)['value'] == -d['value'] and paired_difference(b, a)['low'] == -d['high']
    same = paired_difference(a, a)
    assert same['value'] == 0 and same['p'] == 1 and same['low'] == -same['high'] < -.1
    x = np.array([.3, .5, .1, .4])
    assert paired_difference(x+[.1, .2, .3, .4], x)['p'] == 2/2**4
    with pytest.raises(ValueError, match='3 values and 2'): paired_difference([1, 0, 1], [1, 0])

def test_pairs_by_patient_are_no_more_evidence():
    rng = np.random.default_rng(3)
    a, b = rng.random(30), rng.random(30)-.2
    once, four = paired_difference(a, b), paired_difference(np.repeat(a, 4), np.repeat(b, 4), np.repeat(np.arange(30), 4))
    assert (four['low'], four['high'], four['p']) == pytest.approx((once['low'], once['high'], once['p']), abs=1e-6)
    assert once['p'] == pytest.approx(wilcoxon(a, b).pvalue, abs=.02) and paired_difference(a, b) == once

@pytest.mark.parametrize('n', [10, 30])
def test_chance_is_as_rare_as_p_says(n):
    "Hits of two maps that are alike, two images a patient: p below 0.05 in at most 5 of 100 studies, and the interval holds 0"
    rng, low, zero = np.random.default_rng(n), 0, 0
    for _ in range(150):
        who, ease = np.repeat(np.arange(n), 2), np.repeat(rng.random(n), 2)
        d = paired_difference(rng.random(2*n) < ease, rng.random(2*n) < ease, who)
        low, zero = low+(d['p'] <= .05), zero+(d['low'] <= 0 <= d['high'])
    assert low <= 14 and zero >= 138

def test_pairs_see_what_two_intervals_do_not():
    "An easy lesion is easy for both maps"
    rng = np.random.default_rng(0)
    ease = rng.normal(size=40)
    a, b = ease+.3+rng.normal(size=40)/4, ease+rng.normal(size=40)/4
    assert mean_interval(a)[1] < mean_interval(b)[2] and paired_difference(a, b)['low'] > 0 and paired_difference(a, b)['p'] < .001

# FROC

def spots(*values, shape=(8, 40)):
    "A map of -0.1 with spots of 2 x 2 pixels, ten apart"
    m = np.full(shape, -.1)
    for k, value in enumerate(values): m[3:5, 10*k+2:10*k+4] = value
    return m

FILMS = spots(.9, .5, .3), spots(.4, .8), spots(0, 0, .6), spots()
LESIONS = spots(1, 1) > 0, spots(1) > 0, None, None

def test_froc_worked_out():
    t = froc_curve(FILMS, LESIONS, thresholds=[.2, .7, .45])
    assert t.index.tolist() == [.7, .45, .2] and (t.lesions == 3).all() and (t.healthy == 2).all()
    assert t.sensitivity.tolist() == pytest.approx([1/3, 2/3, 1]) # 0.9; and 0.5; and 0.4
    assert t.fp_healthy.tolist() == [0, .5, .5] and t.lit.tolist() == [0, .5, .5]
    assert t.fp_film.tolist() == [1/4, 2/4, 3/4] # 0.8; and 0.6; and 0.3
    assert tuple(t.loc[.7, ['lit', 'lit_low', 'lit_high']]) == proportion_interval([0, 0])
    assert tuple(t.loc[.45, ['sensitivity', 'low', 'high']]) == proportion_interval([1, 1, 0], [0, 0, 1]) # two lesions of one patient
    point = froc_point(t, .1)
    assert (point.name, point.sensitivity) == (.7, pytest.approx(1/3)) and froc_point(t, .5).name == froc_point(t, 1, 'fp_film').name == .2
    with pytest.raises(ValueError, match='larger thresholds'): froc_point(t.iloc[1:], .1)

def test_froc_point_is_none_where_all_is_one_region():
    "A whole film that is lit touches the lesion, and no region of it is false"
    t = froc_curve([spots(.4, .8)+.2], [LESIONS[1]], thresholds=[.05, .4, .9], hit='touch')
    assert t.sensitivity.tolist() == [0, 1, 1] and t.fp_film.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match='larger thresholds'): froc_point(t, .1, 'fp_film')
    assert froc_point(t, 1, 'fp_film').name == .4

def test_froc_takes_a_threshold_at_least():
    with pytest.raises(ValueError, match='thresholds'): froc_curve(FILMS, LESIONS, thresholds=[])

def test_froc_by_patient():
    "Every film twice: no more evidence, if the patients are known"
    kw = dict(thresholds=[.45])
    once, twice = froc_curve(FILMS, LESIONS, **kw), froc_curve(FILMS*2, LESIONS*2, group=[0, 1, 2, 3]*2, **kw)
    naive = froc_curve(FILMS*2, LESIONS*2, **kw)
    assert (twice.high-twice.low).item() > (naive.high-naive.low).item() and (twice.fp_high-twice.fp_low).item() > (naive.fp_high-naive.fp_low).item()
    assert twice.sensitivity.item() == once.sensitivity.item()

def test_froc_the_higher_peak_of_merged_regions_counts():
    m = spots(.9, .5)
    m[3:5, 4:12] = .2 # a bridge
    t = froc_curve([m], [spots(0, 1) > 0], thresholds=[.1, .3, .6])
    assert t.sensitivity.tolist() == [0, 1, 0] and t.fp_film.tolist() == [1, 1, 1]
    assert t.fp_healthy.isna().all() and t.lit.isna().all() # no healthy film, nothing known of any

def test_froc_lesion_between_the_points_that_are_looked_at():
    heat, mask = np.zeros((2, 3000, 3000), np.float32)
    heat[1200:1300, 1200:1300] = 1
    mask[1245:1250, 1245:1250] = 1 # the points are 11 apart: 1243, 1254
    assert froc_curve([heat], [mask], thresholds=[.5], hit='touch').sensitivity.tolist() == [1]
    assert froc_curve([heat], [np.roll(mask, 500, 0)], thresholds=[.5], hit='touch').sensitivity.tolist() == [0]

def test_froc_criteria():
    wide = spots(.9)
    wide[:, :20] = wide[:, :20].clip(.5) # 160 pixels, 4 of them lesion
    def found(**kw): return froc_curve([wide], [LESIONS[1]], thresholds=[.4], **kw).sensitivity.item()
    assert found() == 1 and found(hit='iou') == found(hit='iobb') == 0
    assert [found(hit=o, overlap=.024) for o in ('iou', 'iobb')] == [1, 1] and [found(hit=o, overlap=4/160) for o in ('iou', 'iobb')] == [0, 0]
    bent = np.zeros((8, 40))
    bent[1:7, 2:4] = bent[6, 2:8] = 1 # 16 pixels in a box of 36
    lesion = np.zeros((8, 40), bool)
    lesion[1:7, 2:8] = True
    for hit, share in dict(iou=16/36, iobb=1).items():
        for overlap, yes in ((share-.01, 1), (share, 0)): assert froc_curve([bent], [lesion], thresholds=[.5], hit=hit, overlap=overlap).sensitivity.item() == yes, hit

def test_froc_of_large_films_and_of_all_thresholds():
    "A film of 1,200 x 900, whose map comes from 12 x 9 cells; the default thresholds reach from the top to nearly nothing"
    def large(a): return np.kron(a, np.ones((100, 100)))
    ill, mask = np.zeros((12, 9)), np.zeros((12, 9))
    ill[3, 4], ill[9, 1], mask[3, 4] = 2, .5, 1
    t = froc_curve([large(ill), large(ill*.1)], [large(mask), None])
    assert len(t) == 60 and t.index[0] == 2 and t.index[-1] == pytest.approx(.002)
    assert t.sensitivity.eq(1).all() and t.fp_healthy[t.index > .2].eq(0).all() and t.fp_healthy.iloc[-1] == 2 and t.fp_film.iloc[-1] == 1.5

@pytest.mark.parametrize('change,match', [(dict(hit='dice'), 'peak, iou, iobb'), (dict(thresholds=[0, 1]), 'above 0'), (dict(masks=[None]*4), 'needs films with a lesion'),
                                          (dict(masks=[LESIONS[0] & False, None, None, None]), 'None for a healthy film'), (dict(masks=[LESIONS[0].T, None, None, None]), 'A mask of'),
                                          (dict(maps=[spots()]*4), 'nothing speaks')])
def test_froc_that_cannot_be(change, match):
    with pytest.raises(ValueError, match=match): froc_curve(**dict(maps=FILMS, masks=LESIONS) | change)

def test_froc_of_heatmaps():
    "On the raw scale, not on each map's own; a map that speaks against the class is dark"
    raw = torch.tensor(np.stack([*FILMS, -spots(3)*30]), dtype=torch.float32)[:, None]
    h = Heatmaps([raw, raw*0+1], torch.zeros(5, 1, 8, 40), torch.ones(5, 1), ['a'], ['l', 'm'], 'test')
    masks = [*LESIONS, None]
    t = froc(h, masks, 'a', 'l', thresholds=[.2, .45, .7])
    assert t.sensitivity.tolist() == pytest.approx([1/3, 2/3, 1]) and t.lit.tolist()[0] == pytest.approx(1/3) # -0.1 * -30 = 3 all around the spot
    assert froc(h, masks, 'a', thresholds=[.5]).fp_healthy.item() == 1 # the last layer
    with pytest.raises(ValueError, match='5 images, but 4 masks'): froc(h, LESIONS, 'a')
    ax = plot_froc(t, label='map')
    assert ax.lines[0].get_xydata().tolist() == t[['fp_healthy', 'sensitivity']].to_numpy().tolist() and 'healthy film' in ax.get_xlabel()
    assert plot_froc(t, ax, per='fp_film').lines[-1].get_xdata().tolist() == t.fp_film.tolist()
    plt.close('all')
