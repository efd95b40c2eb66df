"What is said of heatmaps follows from the figures, and from no others; the page and the report say it, and name nobody."
import json, re, shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest
from click.testing import CliRunner

from dicomcam import measured as measured_, passport as passport_, report as report_
from dicomcam.batches import dicom_dls
from dicomcam.cli import main
from dicomcam.data import lesion_mask
from dicomcam.figures import FIGURES, published
from dicomcam.labels import label_table
from dicomcam.measured import as_findings, readable_predictions, shown_at
from dicomcam.models import save_model
from dicomcam.passport import Passport, passport, passport_values
from dicomcam.report import report
from dicomcam.scale import HeatScale
from dicomcam.verdict import judged
from tiny import make_tiny

def values_of(n=40, **figures):
    "Values of `n` patients: figure -> map -> about how much a film, or how many of the first films are hits"
    rng = np.random.default_rng(0)
    rows = [(f'{i}.dcm', f'P{i}', 'ill', True, name, m, float(i < v) if isinstance(v, int) else v+rng.normal(0, .01))
        for i in range(n) for m, maps in figures.items() for name, v in maps.items()]
    return pd.DataFrame(rows, columns=['film', 'patient', 'state', 'found', 'map', 'measure', 'value'])

def said(*args, **figures): return {o.about: o for o in judged(Passport.of(values_of(*args, **figures), 'x').table)}

def pointing(hits, prior=4, noise=0): return dict(heatmap=hits, prior=prior, noise=noise)

GOOD, BAD = dict(heatmap=.1, prior=.5, noise=.6), dict(heatmap=.6, prior=.5, noise=.4) # probability as pixels go

# --- the verdict

def test_perfect_maps():
    s = said(pointing=pointing(40), deletion=GOOD, chexlocalize_miou=dict(heatmap=.8), drawn_spearman=dict(heatmap=.05))
    assert [o.good for o in s.values()] == [True]*6 and list(s) == ['all', 'place', 'single', 'outline', 'follows', 'drawn']
    assert s['place'].text.startswith('They point into the lesion in 100 of 100 films (91 to 100); 40 films of 40 patients.')
    assert 'where lesions usually are, in 10' in s['place'].text and s['all'].text == 'On films like these the heatmaps point at the disease.'

def test_useless_maps():
    "The place tells more: nothing is to be read from the maps, and that the model is followed makes them no better"
    s = said(pointing=pointing(10, prior=30), deletion=BAD, chexlocalize_miou=dict(heatmap=.1), drawn_spearman=dict(heatmap=.9))
    assert [s[o].good for o in ('all', 'place', 'outline', 'follows', 'drawn')] == [False]*5 and 'single' not in s
    assert 'A map of where lesions usually are does so in 75: read nothing from these heatmaps that the place does not tell.' in s['place'].text
    assert s['all'].text.startswith('Do not read')

@pytest.mark.parametrize('hits, prior', [(12, 10), (20, 20), (0, 0)])
def test_what_cannot_be_told_is_not_told(hits, prior):
    s = said(pointing=pointing(hits, prior))
    assert s['place'].good is None and s['all'].good is None and 'cannot be told which' in s['place'].text

def test_better_than_all_but_not_of_a_single_film():
    s = said(pointing=pointing(26, prior=4))
    assert s['place'].good and s['single'].good is False and '35 of 100 point elsewhere' in s['single'].text
    assert 'a single one may not' in s['all'].text

def test_a_baseline_that_is_not_there_beats_nobody():
    "Where lesions usually are is the map that is hardest to beat: without it nothing is claimed"
    s = said(pointing=dict(heatmap=40, noise=0))
    assert s['place'].good is None and 'not known here' in s['place'].text

@pytest.mark.parametrize('hits', [0, 5, 9])
def test_too_few_films(hits):
    s = said(9, pointing=pointing(hits, prior=0), deletion=GOOD, chexlocalize_miou=dict(heatmap=.9))
    assert s['all'].good is s['place'].good is s['follows'].good is None and 'outline' not in s and 'too few' in s['place'].text

def test_two_films_of_each_patient_are_no_forty_films():
    v = values_of(18, pointing=pointing(18, prior=0))
    v['patient'] = v.film.map(lambda o: f'P{int(o[:-4])//2}')
    assert '9 patients. Patients are too few' in str(Passport.of(v, 'x'))

def test_without_any_mask():
    "Then only the model can be asked, and that is said"
    s = said(deletion=GOOD)
    assert s['place'].good is s['all'].good is None and "No lesion's place is known" in s['place'].text and s['follows'].good is True

def test_place_and_model_may_disagree():
    right = said(pointing=pointing(40), deletion=BAD)
    assert right['both'].good is False and "the model's reason" in right['both'].text and 'not the' in right['all'].text
    wrong = said(pointing=pointing(5, prior=30), deletion=GOOD)
    assert 'doubt the model' in wrong['both'].text and 'both' not in said(pointing=pointing(40), deletion=GOOD)

def test_healthy_films():
    "Few that show colour are no proof of anything; many that stay dark are"
    for n, lit, good in (100, 2, True), (100, 30, False), (20, 2, None):
        s = said(n, healthy_lit=dict(heatmap=lit), lesions_lit=dict(heatmap=n))
        assert s['healthy'].good is good and f'{100*lit//n} of 100 films' in s['healthy'].text and '100 of 100 lesions' in s['healthy'].text
    assert 'healthy' not in said(9, healthy_lit=dict(heatmap=0))

def test_deletion_and_road_have_to_agree():
    road = dict(heatmap=.5, prior=.1, noise=0.), dict(heatmap=0., prior=.1, noise=.2)
    assert [said(deletion=d, road=r)['follows'].good for d, r in ((GOOD, road[0]), (BAD, road[1]), (GOOD, road[1]), (BAD, road[0]))] == [True, False, None, None]

def test_an_interval_that_is_not_known_is_not_said():
    v = values_of(1, pointing=pointing(1))
    assert '100 of 100 films; 1 films' in str(Passport.of(v, 'x')) or 'of 100 films (' in str(Passport.of(v, 'x'))
    same = said(20, pointing=pointing(10), drawn_spearman=dict(heatmap=20)) # a correlation of 1 throughout
    assert '?' not in str(same) and 'nan' not in str(same)

def test_several_trainings():
    "Alike or not; and where they disagree most, the misses are: 20 of 100 films, all of them unread, or none"
    assert [said(repeat_correlation=dict(heatmap=v))['repeats'].good for v in (.95, .65, .2)] == [True, None, False]
    for trust, left, good in (np.arange(100), 0, True), (-np.arange(100), 1, None):
        v = values_of(100, pointing=pointing(20, prior=10), repeat_correlation=dict(heatmap=.9), consensus=dict(network=0.))
        v.loc[v.measure == 'pointing', 'value'] = 1-v.value
        v.loc[v.measure == 'consensus', 'value'] = trust
        p = Passport.of(v, 'x')
        assert p.table.value['all', 'misses_left', 'heatmap'] == left and {o.about: o.good for o in p.verdict}['unread'] is good

def test_every_map_is_compared_film_by_film():
    "Differences are paired: the same films in another order give the same, films that one map lacks do not count"
    v = values_of(30, mass=dict(heatmap=.5, prior=.3))
    v['value'] += np.random.default_rng(0).normal(0, .2, 30).repeat(2) # films differ more than maps
    table = Passport.of(v, 'x').table
    row = table.loc['all', 'mass', 'prior']
    assert row.difference == pytest.approx(.2, abs=.01) and row.difference_high-row.difference_low < .02 < .1 < row.high-row.low and row.p < .01
    pd.testing.assert_frame_equal(Passport.of(v.sample(frac=1, random_state=0), 'x').table.sort_index(), table.sort_index(), rtol=1e-9, atol=1e-9)
    fewer = Passport.of(v.drop(v[(v['map'] == 'prior') & (v.film == '3.dcm')].index), 'x').table.loc['all', 'mass', 'prior']
    assert fewer.n == 29 and fewer.difference == pytest.approx(.2, abs=.01)

# --- values

@pytest.fixture(scope='module')
def values(tiny_learner, folder): return passport_values(tiny_learner, masks=folder, faithful=3)

def test_a_speck_of_a_mask_is_no_lesion():
    "What drawing left beside a lesion counts neither as lit nor as dark"
    from types import SimpleNamespace
    import torch
    from dicomcam.heatmaps import Heatmaps
    from dicomcam.measured import _lit_values
    mask = np.zeros((64, 64), bool)
    mask[:40, :40] = mask[50, 50] = True
    h = Heatmaps([torch.tensor(mask*1.)[None, None]], torch.zeros(1, 1, 64, 64), torch.ones(1, 1), ['a'], ['l'], 'test')
    scale = SimpleNamespace(fits=lambda *_: True, threshold=.5)
    assert _lit_values(h, mask, 'a', 'l', scale) == [('heatmap', 'lesions_lit', 1.)]

def test_values_are_those_of_their_functions(tiny_learner, folder, values):
    from dicomcam.choice import chosen
    from dicomcam.guide import training_prior
    from dicomcam.gradcam import gradcam
    from dicomcam.localize import localization
    from dicomcam.protocols import chexlocalize, wang
    from dicomcam.faithful import deletion
    files = [o for o in tiny_learner.dls.valid.items if lesion_mask(folder, o) is not None]
    h, masks = gradcam(tiny_learner, files, tiny_learner.dls.vocab[-1], chosen(tiny_learner)['layer']), [lesion_mask(folder, o) for o in files]
    cls, mean = h.classes[0], values.groupby(['map', 'measure']).value.mean()
    want = localization(h, masks, cls, grow=0, prior=training_prior(tiny_learner))['mean']
    for m in 'pointing', 'mass', 'iou', 'iobb', 'auprc':
        for name, theirs in dict(heatmap='gradcam', prior='prior', centre='centre').items():
            assert mean[name, m] == pytest.approx(want.xs((theirs, m), level=('map', 'measure')).item()), (name, m)
    assert mean['heatmap', 'chexlocalize_hit'] == chexlocalize(h, masks, cls)['mean']['hit_rate']
    table = wang(h, masks, cls)
    for t in .1, .25, .5: assert mean['heatmap', f'wang_{t:g}'] == table.accuracy[t] and mean['heatmap', f'wang_false_{t:g}'] == pytest.approx(table.afp[t])
    asked = values[(values.measure == 'deletion') & (values['map'] == 'heatmap')]
    some = gradcam(tiny_learner, asked.film.tolist(), cls, chosen(tiny_learner)['layer'])
    assert asked.value.mean() == pytest.approx(deletion(tiny_learner, some, cls)['mean'].loc['gradcam'], abs=1e-5)
    assert {'drawn_spearman', 'drawn_ssim', 'road', 'occlusion', 'insertion'} <= set(values.measure) and set(values.measure) <= {*FIGURES, 'score', 'size'}

def test_folds_are_joined(tiny_learner, folder, values):
    "Values of two parts of the films, put together, are the passport of all"
    table = label_table(folder)
    parts = [table[table.file.isin(tiny_learner.dls.valid.items)].iloc[k::2].reset_index(drop=True) for k in (0, 1)]
    joined = Passport.of([passport_values(tiny_learner, o, folder, faithful=0) for o in parts], 'x')
    whole = Passport.of(values, 'x')
    for m in 'pointing', 'auprc', 'wang_0.1':
        a, b = (o.table.loc[('all', m, 'heatmap'), ['value', 'low', 'high', 'n']] for o in (joined, whole))
        assert a.tolist() == pytest.approx(b.tolist(), nan_ok=True)

def test_one_film_at_a_time(tiny_learner, folder, monkeypatch):
    "However many films there are"
    seen, before = [], measured_.attribute
    def attribute(learn, items, *args, **kw):
        h = before(learn, items, *args, **kw)
        seen.append(len(h))
        return h
    monkeypatch.setattr(measured_, 'attribute', attribute)
    passport_values(tiny_learner, label_table(folder).iloc[:8], folder, faithful=1)
    assert len(seen) > 4 and set(seen) == {1}

def test_where_lesions_usually_are_is_never_of_the_same_patient(tiny_learner, folder):
    "Of a model that knows no training film the prior is the mean lesion of the other patients here"
    films = pd.DataFrame(dict(file=list('abc'), patient=['x', 'x', 'y']))
    masks = {o: np.eye(64, k=10*i) > 0 for i, o in enumerate('abc')}
    prior_of = measured_._priors(masks.get, films)
    assert prior_of('x').n == 1 and prior_of('y').n == 2 and np.allclose(prior_of('x').grid, measured_.lesion_prior([masks['c']]).grid)
    assert measured_._priors(masks.get, films.iloc[:2])('x') is None

def test_healthy_films_are_looked_at_on_a_scale(folder):
    from dicomcam.choice import chosen
    from dicomcam.froc import froc
    from dicomcam.gradcam import gradcam
    learn = make_tiny(dicom_dls(folder, size=64))
    learn.heat_scale = HeatScale(.05, 1., learn.dls.vocab[-1], chosen(learn)['layer'], 'gradcam', 20, 20)
    table = label_table(folder).iloc[:12]
    v = passport_values(learn, table, folder, faithful=0)
    masks = [lesion_mask(folder, o) for o in table.file]
    row = froc(gradcam(learn, table.file.tolist(), learn.dls.vocab[-1], chosen(learn)['layer']), masks, learn.dls.vocab[-1], thresholds=[.05]).iloc[0]
    means = v.groupby('measure').value.mean()
    assert (means.lesions_lit, means.false_regions, means.healthy_lit) == pytest.approx((row.sensitivity, row.fp_healthy, row.lit)) and 0 < row.lit
    other = passport_values(learn, table.iloc[:3], folder, method='hirescam', layer='4', faithful=0)
    assert 'healthy_lit' not in set(other.measure) # the scale is of other maps

def test_the_same_network_twice(tiny_learner, folder):
    v = passport_values(tiny_learner, masks=folder, faithful=0, others=[tiny_learner])
    means = v.groupby('measure').value.mean()
    assert means.repeat_ssim == pytest.approx(1) and means.repeat_correlation == pytest.approx(1)
    assert {'misses_left', 'repeat_ssim'} <= set(Passport.of(v, 'x').table.loc['all'].index.get_level_values('measure'))

def test_a_method_named_alone_is_judged_where_lesions_showed_best(folder, tmp_path, monkeypatch):
    "By the passport, the report and explain alike"
    from dicomcam.cli import _engine
    learn = make_tiny(dicom_dls(folder, size=64))
    learn.choice = dict(layer='1', method='hirescam', reason='by hand')
    assert [shown_at(learn), shown_at(learn, 'gradcam'), shown_at(learn, layer='2')] == [('hirescam', '1'), ('gradcam', '1'), ('gradcam', '2')] and shown_at(learn, 'occlusion') == ('occlusion', None)
    monkeypatch.setattr('dicomcam.models.load_model', lambda fn: learn)
    assert [_engine('m', how, None, None, None, None)[2].split(',')[0] for how in (None, 'gradcam')] == ['1', '1']
    assert passport(learn, label_table(folder).iloc[:2], method='gradcam', faithful=0).made == 'Heatmaps: Grad-CAM of layer 1.'

def test_masks_of_another_number(tiny_learner):
    with pytest.raises(ValueError, match='but 2 masks'): passport_values(tiny_learner, masks=[None, None])

def test_what_is_published():
    "Looked up in the papers: a few by hand"
    t = published().set_index(['measure', 'map', 'finding'])
    assert t.value['wang_0.1', 'CAM', 'Pneumothorax'] == .4591 and t.value['wang_false_0.5', 'CAM', 'Pneumonia'] == 1.0132
    assert t.value['arun_auprc', 'U-Net', 'Pneumothorax'] == .404 and t.high['arun_auprc', 'eight methods', 'Pneumonia'] == .519
    assert set(published().measure) <= set(FIGURES) and not t.index.duplicated().any() and t.source.notna().all()

# --- the page

def test_page_and_json(values, tmp_path):
    p = Passport.of(values, 'Pneumothorax', 'Heatmaps by <b>hand</b>.')
    html = p.to_html(tmp_path/'p.html').read_text(encoding='utf-8')
    text = re.sub(r'\s+', ' ', re.sub('<[^>]*>', ' ', html.split('</style>')[1]))
    for o in p.verdict: assert o.text in html.replace('&#39;', "'")
    for m in set(values.measure) & set(FIGURES): assert FIGURES[m].name in text
    assert '://' not in html and '<script' not in html and 'U-Net' in text and 'by &lt;b&gt;hand' in text and html.count('<img') == (3 if p.table.patients['all', 'pointing', 'heatmap'] >= 10 else 1) # of few patients, what is published
    assert not [o for o in {*values.film.map(lambda o: o.name), *values.patient} if o in html]
    told = json.loads(p.to_json(tmp_path/'p.json').read_text(), parse_constant=pytest.fail)
    assert len(told['table']) == len(p.table) and told['verdict'][0]['text'] == p.verdict[0].text and not [o for o in set(values.patient) if o in str(told)]
    assert p._repr_html_().count('<li') == len(p.verdict)

def test_kinds_of_films_in_words():
    "Those with the disease first, so that `it` is known; none is called by the name of a column"
    films = pd.DataFrame(dict(film=range(5), patient=range(5), measure='pointing', state=['healthy', 'healthy', 'ill', 'unknown', 'healthy']))
    assert passport_._films_text(films, 'Mass') == '5 films of 5 patients: 1 with Mass, 3 without it, 1 without a label; a lesion is drawn on 0.'

def test_groups_of_few_patients_are_too_few(tmp_path):
    "Six of each size are not drawn, and nothing is said of them"
    v = values_of(12, pointing=pointing(12), size=dict(lesion=.1))
    v.loc[v.measure == 'size', 'value'] = np.arange(12)
    p = Passport.of(v, 'x')
    assert p.words()['sets'] == ['All lesions', 'In films called so', 'The smaller half', 'The larger half']
    text = re.sub('<[^>]*>', ' ', p.to_html(tmp_path/'p.html').read_text().split('</style>')[1])
    assert text.count('too few') == 2+1 and 'heatmaps, all lesions' in str(passport_._forest(p.table, 'pointing', 'x')) and 'smaller' not in str(passport_._forest(p.table, 'pointing', 'x').index)

def test_mean_map_and_disagreement_of_a_few_films(tiny_learner, folder, monkeypatch, tmp_path):
    "Of copies of the film, or of several trainings; of no film that names the patient"
    how = dict(masks=folder, faithful=0)
    p = passport(tiny_learner, **how) # whose validation set has one ill film
    assert len(p.maps) == 1 and all(o['uri'].startswith('data:image/jpeg') and o['says'].startswith('Mean map of 4 copies') for o in p.maps)
    assert p.to_html(tmp_path/'p.html').read_text().count('and the disagreement"') == 1 and p._repr_html_().count('image/jpeg') == 0
    both = passport(tiny_learner, **how, pictures=1, others=[tiny_learner])
    assert both.maps[0]['says'] == 'Mean map of 2 trainings, and where they disagree. They correlate by 1.00.'
    ill = pd.DataFrame(dict(measure='size', film=[o for o in label_table(folder).file if lesion_mask(folder, o) is not None]))
    assert passport_._few(ill, 2) == [ill.film.iloc[0], ill.film.iloc[-1]] and len(passport_._few(ill, 99)) == len(ill)
    monkeypatch.setattr(passport_, 'read_dicom', lambda *args, **kw: dict(BurnedInAnnotation='YES'))
    assert passport(tiny_learner, **how).maps == () == passport(tiny_learner, **how, pictures=0).maps

# --- the command

@pytest.fixture(scope='module')
def model(tmp_path_factory, folder):
    from dicomcam.training import train_learner
    return save_model(train_learner(folder, fit=False, arch='xresnet18', size=64, bs=8), tmp_path_factory.mktemp('model')/'m.safetensors')

def run(*args, status=0):
    r = CliRunner().invoke(main, [*map(str, args)])
    assert r.exit_code == status, (r.output, r.exception)
    return r

def test_command(folder, model, tmp_path):
    r = run('passport', model, folder, '--held-out', '--faithful', 0, '--also', model, '--films', 0, '--json', '--out', tmp_path/'p.html')
    said = json.loads((tmp_path/'p.json').read_text())['verdict']
    assert r.stdout.splitlines()[1:-1] == [o['text'] for o in said] and 'p.html' in r.stdout.splitlines()[-1]
    assert sorted(o.name for o in tmp_path.iterdir()) == ['p.html', 'p.json'] and 'other trainings' in (tmp_path/'p.html').read_text()

def test_command_of_those_held_back(folder, model, tmp_path):
    "The report says that they were; not where they are split by something else"
    for by, says in ((), True), (('--by', 'none'), False):
        run('report', model, folder, '--held-out', *by, '--cases', 1, '--force', '--out', tmp_path/'r.html')
        assert ('no patient is on both sides' in texts(tmp_path/'r.html')) == says != ('is not known here' in texts(tmp_path/'r.html'))

@pytest.mark.parametrize('args, says', [(['--out', 'there.html'], 'is there already'), (['--positive', 'Flu'], "No class 'Flu'"),
    (['--method', 'magic'], "No method 'magic'"), (['--json', '--out', 'x.json'], 'Name an HTML file'), (['--also', 'there.html', '--force', '--out', 'there.html'], 'is what the command reads'), (['--labels', 'no.csv'], 'no such file')])
def test_bad_input_is_one_line(folder, model, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    Path('there.html').write_text('')
    r = run('passport', model, folder, '--held-out', '--faithful', 0, *args, status=2)
    assert len(r.stderr.splitlines()) == 1 and says in r.stderr and [o.name for o in tmp_path.iterdir()] == ['there.html']

# --- the report

def texts(fn): return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', re.sub(r'(?s)<(script|style).*?</\1>', '', fn.read_text(encoding='utf-8'))))

def test_report_says_it_above_the_cases(tiny_learner, folder, tmp_path):
    "Of the heatmaps that are shown first"
    t = texts(report(tiny_learner, fn=tmp_path/'r.html', n=3, path=folder))
    assert 0 < t.index('In short') < t.index('They point into the lesion in') < t.index('Sort by') < t.rindex('They point into the lesion in')
    shown = passport(tiny_learner, masks=folder, faithful=0)
    assert shown.verdict[1].text in t

@pytest.fixture
def broken(folder, tmp_path):
    "A folder in which one film is cut off"
    d = shutil.copytree(folder, tmp_path/'films')
    table = label_table(d)
    table.file[2].write_bytes(table.file[2].read_bytes()[:1500])
    return d, label_table(d)

def test_a_broken_film_costs_the_report_that_film(broken, tiny_learner, tmp_path):
    d, table = broken
    with pytest.warns(UserWarning, match='1 of 30 images cannot be read'):
        fn = report(tiny_learner, table, tmp_path/'r.html', '5', n=2)
    t = texts(fn)
    assert 'nobody can tell whether the heatmaps below point at the disease' in t and 'They point' not in t # without a folder of lesions
    assert '1 image could not be read and left out: number 3 of the 30 in the labels.' in t and '29 images of' in t and table.file[2].name not in fn.read_text()
    assert f'left out: {table.file[2]}: no' in report_._left_out(tiny_learner, table, {table.file[2]: f'{table.file[2]}: no'}, True) # with --phi

def test_a_broken_film_costs_the_passport_that_film(broken, tiny_learner):
    d, table = broken
    masks = [lesion_mask(d, o) if i != 2 else None for i, o in enumerate(table.file)]
    with pytest.warns(UserWarning, match='1 of 30'): v = passport_values(tiny_learner, table, masks, faithful=0)
    assert v.film.nunique() == 29 and set(v[v.measure == 'size'].film) == {o for o, m in zip(table.file, masks) if m is not None}

def test_only_broken_films(broken, tiny_learner):
    d, table = broken
    with pytest.raises(ValueError, match='None of the 1 images can be read, first .*is cut off'): readable_predictions(tiny_learner, table.iloc[2:3])

def test_labels_of_one_finding_for_a_network_of_several(folder, tmp_path):
    "Pneumothorax and No Pneumothorax, of a network that finds three things: figures and loss are of the one that the labels know"
    table = label_table(folder)
    three = table[['file']].assign(label=[('Effusion', 'Mass', 'Pneumothorax', 'Mass|Pneumothorax', '')[i % 5] for i in range(len(table))])
    learn = make_tiny(dicom_dls(folder, three, size=64, label_delim='|', cache=False))
    assert learn.dls.setup.multi and set(as_findings(learn, table).label) == {('Pneumothorax',), ()}
    assert as_findings(learn, table.assign(label='Flu')).label[0] == 'Flu' # which it does not know, and says so
    table = table.iloc[:10]
    fn = report(learn, table, tmp_path/'r.html', '5', n=2, path=folder)
    t = texts(fn)
    assert 'Pneumothorax: positive from' in t and 'Mass: positive from' not in t and ('Label Pneumothorax.' in t or 'Label none.' in t) and 'They point into the lesion in' in t
    df, _ = readable_predictions(learn, as_findings(learn, table))
    p = df.Pneumothorax.where(table.label == 'Pneumothorax', 1-df.Pneumothorax)
    assert {f'{-np.log(o):.6f}' for o in p} >= set(re.findall('data-loss="(.*?)"', fn.read_text()))

# --- the scale, made anew

def test_scale_of_a_model_by_a_folder(tmp_path):
    "Where lesions are known with the map that shows them; without any of what the model says; of few healthy films there is none"
    from dicomcam.data import phantom
    from dicomcam.models import load_model
    from dicomcam.training import train_learner
    films = phantom(tmp_path/'films', n=44, size=64, seed=5)
    fn = save_model(train_learner(films, fit=False, arch='xresnet18', size=64, bs=8), tmp_path/'m.safetensors')
    r, made = run('scale', fn, films, '--out', tmp_path/'s.safetensors'), load_model(tmp_path/'s.safetensors')
    assert made.choice['reason'].startswith('shows ') and made.choice['reason'] in r.stdout and str(made.heat_scale) in r.stdout
    assert made.heat_scale.healthy >= 19 and made.heat_scale.layer == made.choice['layer'] and 's.safetensors' in r.stdout.splitlines()[-1]
    assert 'is what the command reads' in run('scale', fn, films, '--out', fn, '--force', status=2).stderr
    for o in ('masks', 'boxes.csv'): (films/o).rename(tmp_path/o)
    run('scale', fn, films, '--out', tmp_path/'plain.safetensors')
    plain = load_model(tmp_path/'plain.safetensors')
    assert plain.heat_scale.healthy == made.heat_scale.healthy and not plain.choice
    t = pd.read_csv(films/'labels.csv').groupby('label').head(9)
    t.to_csv(films/'few.csv', index=False)
    assert 'too few healthy images for a scale' in run('scale', fn, films, '--labels', 'few.csv', '--out', tmp_path/'few.safetensors', status=2).stderr and not (tmp_path/'few.safetensors').exists()
