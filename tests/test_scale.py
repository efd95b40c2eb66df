"One scale for all films of a model: made by hand, drawn, kept in the model file, refused where it is not what it may be, and said wherever a map goes"
import pickle, re, warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pydicom, pytest, torch
from click.testing import CliRunner
from test_models import NONE, WORDS, refused, write

from dicomcam.absolute import absolute_scale, calibrate, calibrate_by, choose_scale, film_maxima, shown_smooth
from dicomcam.attribution import attribute
from dicomcam.batches import dicom_dls
from dicomcam.cli import main
from dicomcam.folder import write_heatmaps
from dicomcam.froc import froc, froc_curve, plot_froc
from dicomcam.heatmaps import Heatmaps, joined
from dicomcam.labels import label_table
from dicomcam.models import load_model, save_model
from dicomcam.networks import dicom_learner
from dicomcam.prior import lesion_prior
from dicomcam.scale import HeatScale, healthy_limit
from dicomcam.share import overlay, report, save_sc

ILL = 'Pneumothorax'

def heatmaps(*maxima, items=None, scale=None):
    "A bright position in each film, at the first of two layers, for the second of two classes"
    raw = torch.zeros(len(maxima), 2, 4, 4)
    raw[:, 1, 1, 2] = torch.tensor(maxima, dtype=torch.float32)
    images = torch.rand(len(maxima), 1, 32, 32, generator=torch.Generator().manual_seed(0))
    probs = torch.tensor([[.4, .6]]).expand(len(maxima), 2)
    return Heatmaps([raw, raw+1], images, probs, ['No Finding', ILL], ['5', '7'], 'gradcam', items, scale=scale)

def scale_to(threshold, top, layer='5', method='gradcam'): return HeatScale(threshold, top, ILL, layer, method, 60, 20)

@pytest.mark.parametrize('n,above', [(19, 0), (58, 0), (59, 0), (92, 0), (93, 1), (124, 2), (181, 4)])
def test_the_limit_of_healthy_films(n, above):
    "Of n maxima so many may lie above, that 95 % of all healthy films stay below in 95 of 100 scales (Wilks 1941)"
    maxima = np.random.default_rng(n).permutation(np.arange(1, n+1)).astype(float)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        limit = healthy_limit(maxima)
    assert (maxima >= limit).sum() == above and limit == pytest.approx(n-above)
    assert bool(caught) == (n < 59) and all(f'{n} healthy films' in str(o.message) and '59 films make it 95%' in str(o.message) for o in caught)

def test_a_limit_that_nobody_can_give():
    with pytest.raises(ValueError, match='18 healthy films: that 95% stay dark takes 19 or more, and 59 to be 95% sure'): healthy_limit(np.ones(18))
    with pytest.raises(ValueError, match='NaN or infinite'): healthy_limit(np.r_[np.ones(60), np.nan])

def test_scale_by_hand():
    h = heatmaps(*range(1, 60), 100, 200, 300)
    healthy = np.arange(62) < 59
    assert film_maxima(h, ILL, '5').tolist() == [*range(1, 60), 100, 200, 300]
    scale = absolute_scale(h, healthy, ILL, '5')
    assert (scale.threshold, scale.top, scale.healthy, scale.ill) == (pytest.approx(59), pytest.approx(280), 59, 3)
    assert scale.fits(ILL, '5', 'gradcam') and not scale.fits(ILL, '7', 'gradcam') and not scale.fits('No Finding', '5', 'gradcam')
    assert absolute_scale(h, healthy, ILL, '5', top=.5).top == pytest.approx(200)
    twice = absolute_scale(joined([h, h]), [*healthy]*2, ILL, '5', group=[*range(62)]*2)
    assert (twice.threshold, twice.top, twice.healthy, twice.ill) == (scale.threshold, scale.top, 59, 3) # two films of a patient are no two patients
    assert absolute_scale(heatmaps(*range(1, 60)), [True]*59, ILL, '5').top == pytest.approx(3*59, rel=1e-4) # no ill film is known
    assert absolute_scale(heatmaps(*range(1, 60), 3), healthy[:60], ILL, '5').top == pytest.approx(3*59, rel=1e-4) # the ill are no brighter
    dark = absolute_scale(heatmaps(*[-1.]*59, 5), healthy[:60], ILL, '5')
    assert 0 < dark.threshold < .01 and dark.top == 5

def test_colour_follows_the_score_and_begins_at_the_threshold():
    raw = np.array([-3, 0, 1.99, 2, 4, 8, 80])
    assert scale_to(2., 8.).heat(raw).tolist() == [0, 0, 0, .25, .5, 1, 1]

def test_dark_film_has_no_colour_and_a_line():
    h = heatmaps(1., 3., scale=scale_to(2., 4.))
    for i, lit in (0, False), (1, True):
        fig = h.show(i, layers='5')
        overlaid, title = fig.axes[2].images[1], fig.axes[2].get_title()
        assert (np.asarray(overlaid.get_alpha()) > 0).any() == lit
        assert title.endswith('\nnothing here speaks for Pneumothorax') == (not lit)
        assert fig.axes[1].get_title().endswith('by its own maximum') # of the other class nothing is known
        assert np.asarray(overlaid.get_alpha()).max() == pytest.approx(.6*h.heat(i, ILL, '5', native=False, scale=None).max())
        bar = fig.axes[-1]
        assert 'units of the score' in bar.get_ylabel() and bar.get_ylim() == (0, 4) and 2 in bar.get_yticks()
        assert any('2: healthy' in o.get_text() for o in bar.get_yticklabels())
    plt.close('all')

@pytest.mark.parametrize('h,kw', [(heatmaps(1., scale=scale_to(2., 4.)), dict(scale='own')), (heatmaps(1.), {}), (heatmaps(1., scale=scale_to(2., 4.)), dict(layers='7'))])
def test_own_maximum_says_so(h, kw):
    "Asked for, of a model without a scale, and at a layer that the scale is not of"
    fig = h.show(0, ILL, **{'layers': '5', **kw})
    assert fig.axes[-1].get_ylabel() == 'gradcam / its maximum' and np.asarray(fig.axes[1].images[1].get_alpha()).max() > .55
    plt.close('all')

def test_scale_stays_where_units_stay():
    h = heatmaps(1., 3., scale=scale_to(2., 4.))
    assert joined([h, h]).scale == pickle.loads(pickle.dumps(h)).scale == h.scale
    assert h.times(lesion_prior([np.ones((32, 32))])).scale is None
    assert heatmaps(1., scale=scale_to(2., 4., layer='6')).scale is None # of none of these maps
    assert h.heat(0, ILL, '5').max() == 1 # what measures take
    with pytest.raises(ValueError, match='units differ. Make one with absolute_scale'): h.heat(0, ILL, '7', scale=h.scale)
    with pytest.raises(ValueError, match="pass 'own', None or a HeatScale"): h.show(0, scale='absolute')

def test_boxes_are_around_what_has_colour():
    h = heatmaps(1., 3., scale=scale_to(2., 4.))
    assert [len(h.boxes(i, ILL, '5', scale=None)) for i in (0, 1)] == [0, 1] and len(h.boxes(0, ILL, '5')) == 1
    found = h.boxes(1, ILL, '5', scale=None).iloc[0]
    assert found.peak == h.heat(1, ILL, '5', scale=None).max() < 1

GOOD = scale_to(2., 4.).words()

@pytest.mark.parametrize('words', [
    [], None, 'x', {}, {**GOOD, 'more': 1}, {k: v for k, v in GOOD.items() if k != 'top'}, dict(GOOD, top=2.), dict(GOOD, threshold=0.), dict(GOOD, threshold=-1.),
    dict(GOOD, threshold=float('nan')), dict(GOOD, top=float('inf')), dict(GOOD, top='4'), dict(GOOD, top=4), dict(GOOD, threshold=True), dict(GOOD, cls=1), dict(GOOD, cls='a'*401),
    dict(GOOD, layer=''), dict(GOOD, method=None), dict(GOOD, healthy=-1), dict(GOOD, healthy=True), dict(GOOD, ill=1.5), dict(GOOD, healthy=10**9), dict(GOOD, films=[])])
def test_words_of_a_strangers_scale(tmp_path, monkeypatch, words):
    monkeypatch.setattr('dicomcam.models.dicom_learner', lambda *a, **k: pytest.fail('built'))
    refused(write(tmp_path/'m', NONE, {**WORDS, 'scale': words}), 'scale is ')

@pytest.fixture(scope='module')
def learn(folder):
    torch.manual_seed(0)
    learn = dicom_learner(dicom_dls(folder, size=64, cache=False), 'xresnet18')
    learn.choice = dict(layer='5', method='gradcam', reason='of a test')
    with pytest.warns(UserWarning, match='healthy films: that 95% of all stay below the largest'): choose_scale(learn)
    return learn

def test_scale_of_a_learner(learn, folder):
    scale, table = learn.heat_scale, learn.dls.setup.table
    assert (scale.cls, scale.layer, scale.films) == (ILL, '5', 'of both sides') and scale.method in ('gradcam', 'gradcam, mirror')
    assert scale.healthy == table.group[table.label != ILL].nunique() and scale.ill == table.group[table.label == ILL].nunique()
    h = attribute(learn, table.file.tolist(), None, ['5', '7'], 'gradcam', shown_smooth(learn))
    assert h.scale == scale and h.drawn_by(0, ILL, '5') == scale and h.drawn_by(0, ILL, '7') is None
    healthy = (table.label != ILL).to_numpy()
    assert not any(h.heat(i, ILL, '5', scale=None).any() for i in np.flatnonzero(healthy)) # so few films: the largest of them
    assert attribute(learn, table.file[:1].tolist(), None, '5', 'hirescam').scale is None

def test_who_names_something_gets_it(learn):
    assert [shown_smooth(learn, smooth='noise'), shown_smooth(learn, layer='5'), shown_smooth(learn, 'gradcam'), shown_smooth(learn, scale='own')] == ['noise', None, None, None]

def test_few_healthy_films_make_no_scale(learn, folder):
    table = learn.dls.setup.table[learn.dls.setup.table.label != ILL][:10]
    known = learn.heat_scale
    with pytest.warns(UserWarning, match='No absolute scale: 10 healthy films'):
        assert choose_scale(learn, [*table.file, table.file.iloc[0]], [*table.label, None], smoothings=(None,)) is None # a label not known is not healthy
    assert learn.heat_scale is None
    learn.heat_scale = known

def test_scale_goes_with_the_model(learn, tmp_path):
    other = load_model(save_model(learn, tmp_path/'m.safetensors'))
    assert other.heat_scale == learn.heat_scale
    other.heat_scale = None
    assert load_model(save_model(other, tmp_path/'n.safetensors')).heat_scale is None

LESION, SPOT, OTHER = np.zeros((32, 32), bool), (1, 1), (3, 3)
LESION[8:16, 8:16] = True

def film_maps(spots, method, items):
    "A map a film of stages '5' and '6', whose brightest point is known: (place, height) of each stage"
    raw = [torch.zeros(len(items), 1, 4, 4) for _ in range(2)]
    for i, item in enumerate(items):
        for stage, o in zip(raw, spots(item)): stage[(i, 0, *o[0])] = o[1]
    return Heatmaps(raw, torch.rand(len(items), 1, 32, 32), torch.ones(len(items), 1), [ILL], ['5', '6'], method)

@pytest.fixture
def shown(monkeypatch):
    "A learner whose maps are known: gradcam points well and is no brighter than healthy films, hirescam the other way round but at stage 6"
    def spots(method, smooth):
        def of(film):
            healthy = film < 60
            if method == 'gradcam': return [(OTHER if healthy else SPOT, 1 if healthy else .9)]*2
            at_6 = SPOT if film % 5 else OTHER # four in five; stage 5 lights up elsewhere
            return [(OTHER, .1 if healthy else 5), (OTHER if healthy else at_6, .1 if healthy else 2 if smooth else 1)]
        return of
    def attribute(learn, files, cls, layers, method, smooth, batches):
        assert cls == ILL and layers == ['5', '6'] and batches
        name = f'{method}, {smooth}' if smooth else method
        return (film_maps(spots(method, smooth), name, o) for o in (files[:50], files[50:]))
    monkeypatch.setattr('dicomcam.absolute.attribute', attribute)
    monkeypatch.setattr('dicomcam.absolute.late_stages', lambda learn, stages: ['5', '6'])
    return SimpleNamespace(dls=SimpleNamespace(vocab=['No Finding', ILL]), choice=None, heat_scale=None)

FILMS, LABELS, MASKS = list(range(80)), ['No Finding']*60+[ILL]*20, [None]*60+[LESION]*20

def test_the_map_that_shows_most_lesions_is_taken(shown):
    scale = calibrate(shown, FILMS, LABELS, MASKS, methods=('gradcam', 'hirescam'), smoothings=(None,))
    assert (scale.method, scale.layer, scale.healthy, scale.ill, scale.films) == ('hirescam', '6', 60, 20, 'given') and scale is shown.heat_scale
    assert scale.threshold == pytest.approx(.1) and shown.choice['method'] == 'hirescam' and shown.choice['layer'] == '6'
    assert shown.choice['reason'].startswith('shows 0.80 of 20 lesions that the network has not seen')
    assert shown_smooth(shown) is None and calibrate(shown, FILMS, LABELS, MASKS, ILL, methods=('hirescam',), smoothings=('mirror',)).top == pytest.approx(2)
    assert shown_smooth(shown) == 'mirror' and shown.choice['method'] == 'hirescam'

def test_calibration_leaves_out_what_is_not_known(shown):
    "Films of unknown label do not count at all, ill ones of unknown lesion only for the scale, a patient's films as one"
    scale = calibrate(shown, [*FILMS, 7], [*LABELS, None], [*MASKS[:75], *[None]*4, ~LESION & LESION, LESION], group=[0, 0, *range(2, 81)], methods=('hirescam',), smoothings=(None,))
    assert (scale.healthy, scale.ill) == (59, 20) and 'of 15 lesions' in shown.choice['reason']
    with pytest.raises(ValueError, match='No lesion is known: choose_scale makes a scale without any'): calibrate(shown, FILMS, LABELS, [None]*80)
    with pytest.raises(ValueError, match='18 healthy films'): calibrate(shown, FILMS[42:], LABELS[42:], MASKS[42:], methods=('hirescam',), smoothings=(None,))

def test_calibration_by_a_folder(monkeypatch):
    "Its labels, patients and lesions; without lesions the map stays what it was"
    seen = []
    table = pd.DataFrame(dict(file=['a', 'b'], label=['No Finding', ILL], group=['p', 'q']))
    monkeypatch.setattr('dicomcam.absolute.label_table', lambda path: table)
    for name in 'calibrate', 'choose_scale': monkeypatch.setattr(f'dicomcam.absolute.{name}', lambda *a, name=name, **kw: seen.append((name, [list(o) for o in a[1:]], list(kw['group']))))
    for mask in LESION, None:
        monkeypatch.setattr('dicomcam.absolute.lesion_mask', lambda path, file: mask if file == 'b' else None)
        calibrate_by(None, 'folder')
    assert [o[0] for o in seen] == ['calibrate', 'choose_scale'] and all(o[1][:2] == [['a', 'b'], ['No Finding', ILL]] and o[2] == ['p', 'q'] for o in seen)

def test_patients_of_films_that_are_given(shown):
    shown.choice = dict(layer='6', method='hirescam', reason='of a test')
    def healthy(**kw): return choose_scale(shown, [*FILMS, 3], [*LABELS, None], smoothings=(None,), **kw).healthy
    with pytest.MonkeyPatch.context() as m:
        m.setattr('dicomcam.absolute.attribute', lambda *a, **k: [film_maps(lambda film: [(SPOT, 1+film)]*2, 'hirescam', a[1])])
        assert healthy() == 60 and healthy(group=[0, 0, *range(2, 81)]) == 59

def texts(fn): return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', fn.read_text()))

def test_report_on_the_scale(learn, folder, tmp_path):
    table = label_table(folder)
    healthy = table[table.label != ILL][:3].reset_index(drop=True)
    t = texts(report(learn, healthy, tmp_path/'r.html', n=3))
    assert 'on one scale for all cases' in t and f'{learn.heat_scale.threshold:.3f} in units of the score' in t
    assert t.count('nothing here speaks for Pneumothorax') == 3 and 'by its own maximum' in t
    t = texts(report(learn, healthy, tmp_path/'r.html', n=3, scale='own'))
    assert 'each map by its own maximum' in t and 'nothing here speaks' not in t

def test_folder_and_secondary_capture_on_the_scale(folder, tmp_path):
    files = sorted(folder.rglob('*.dcm'))[:2]
    def explain(scale): return lambda o: heatmaps(1., 3., items=list(o), scale=scale)
    for name, scale, own, boxes in ('absolute', scale_to(2., 4., '7'), None, 1), ('own', scale_to(2., 4., '7'), 'own', 2), ('unknown', None, None, 2):
        out = tmp_path/name
        out.mkdir()
        assert not write_heatmaps(out, explain(scale), files, ['No Finding', ILL], ILL, dicom=True, scale=own)
        df = pd.read_csv(out/'heatmaps.csv')
        assert df.x.notna().sum() == boxes
        said = [pydicom.dcmread(o).DerivationDescription for o in sorted(out.rglob('*.sc.dcm'))]
        assert ['nothing here speaks for Pneumothorax' in o for o in said] == [name == 'absolute', False]
        if name == 'absolute': assert all('colour from 2 on' in o for o in said)
        else: assert all('by its own maximum' in o for o in said)

def test_secondary_capture_of_a_dark_film(folder, tmp_path):
    h = heatmaps(1., 3., items=sorted(folder.rglob('*.dcm'))[:2], scale=scale_to(2., 4.))
    dark, lit = (pydicom.dcmread(save_sc(h, i, tmp_path/'sc.dcm', ILL, '5')) for i in (0, 1))
    assert 'nothing here speaks for Pneumothorax' in dark.DerivationDescription and 'nothing' not in lit.DerivationDescription
    pixels = dark.pixel_array[:96, :96]
    assert (pixels == pixels[..., :1]).all() and (lit.pixel_array[:96, :96] != overlay(h, 1, ILL, '5', alpha=0)).any() # grey, and not
    own = pydicom.dcmread(save_sc(h, 0, tmp_path/'own.dcm', ILL, '5', scale='own'))
    assert 'by its own maximum' in own.DerivationDescription and (own.pixel_array[:96, :96] != pixels).any()

def test_explain_on_the_scale(learn, folder, tmp_path):
    model = save_model(learn, tmp_path/'m.safetensors')
    file = label_table(folder).query('label != @ILL').file.iloc[0]
    def run(*args): return CliRunner().invoke(main, ['explain', str(model), str(file), '--class', ILL, '--force', '--out', str(tmp_path/'out'), *args])
    r = run()
    assert r.exit_code == 0 and 'absolute scale: colour from' in r.stdout and pd.read_csv(tmp_path/'out'/'heatmaps.csv').x.isna().all()
    r = run('--scale', 'own')
    assert r.exit_code == 0 and 'each by its own maximum' in r.stdout
    r = run('--scale', 'absolute', '--layer', '7')
    assert r.exit_code == 2 and 'knows no absolute scale of gradcam, layer 7' in r.stderr

def test_lit_is_to_touch_at_the_threshold_of_the_scale():
    h = heatmaps(1., 3., 1., 5.)
    mask = np.zeros((32, 32), bool)
    mask[8:16, 18:19] = True # beside the peak, within the region
    t = froc(h, [mask, mask, None, None], ILL, '5', thresholds=[scale_to(2., 4.).threshold], hit='touch').iloc[0]
    assert (t.sensitivity, t.lit, t.fp_healthy, t.lesions, t.healthy) == (.5, .5, .5, 2, 2)

def test_a_speck_is_no_lesion():
    mask = np.zeros((64, 64), bool)
    mask[:40, :40], mask[50, 50] = True, True
    assert froc_curve([mask*1.], [mask], thresholds=[.5]).lesions.item() == 1
    mask[50:52, 50:52] = True
    assert froc_curve([mask*1.], [mask], thresholds=[.5]).lesions.item() == 2

def test_band_of_froc_goes_as_far_as_the_curve():
    "Regions merge as the threshold falls: where the curve comes back, neither it nor its band goes"
    noise = np.random.default_rng(0).normal(size=(6, 24, 24))
    mask = np.zeros((24, 24), bool)
    mask[:6, :6] = True
    t = froc_curve([o.clip(0) for o in noise], [mask]*2+[None]*4)
    ax = plot_froc(t)
    x, band = ax.lines[0].get_xdata(), ax.collections[0].get_paths()[0].vertices[:, 0]
    assert len(x) < len(t) and x[-1] == band.max() == t.fp_healthy.max() and t.fp_healthy.iloc[-1] < x[-1]
    plt.close('all')
