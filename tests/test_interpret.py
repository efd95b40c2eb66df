"Figures equal to scikit-learn's, intervals that other computations give too, thresholds scored on other patients, headers that give the label away."
import json, warnings
from unittest import mock

import numpy as np, pandas as pd, pytest
from matplotlib import pyplot as plt
from scipy.stats import beta, bootstrap
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from dicomcam.gradcam import gradcam
from dicomcam.intervals import average_precision, interval_text, patient_resamples, roc_area, roc_counts
from dicomcam.interpret import (choose_threshold, evaluate, header_auc, plot_calibration, plot_confusion, plot_pr, plot_roc, plot_scores,
                                plot_subgroups, plot_top_losses, positive_scores, predictions, subgroups)
from dicomcam.results import class_columns, class_scores, known_table, prediction_classes
from dicomcam.train import dicom_dls, dicom_learner, label_table, load_model, save_model
from tiny import make_tiny

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def frame(p, y, patient=None):
    "What `predictions` gives, made up"
    patient = np.arange(len(p)) if patient is None else patient
    return pd.DataFrame(dict(file=[f'{i}.dcm' for i in range(len(p))], label=np.where(y, 'ill', 'well'), patient=[f'p{o}' for o in patient],
                             loss=0., well=1-np.asarray(p), ill=p))

@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    y = rng.random(120) < 0.4
    return np.clip(0.3*y+rng.random(120)*0.8, 0, 1).round(2), y # rounded: with ties

@pytest.fixture
def learn(tiny_learner): return tiny_learner

def two_labels(folder):
    "A learner whose images may have several labels"
    df = pd.read_csv(folder/'labels.csv')
    df['side'] = [['left', 'right', 'left|right', ''][i%4] for i in range(len(df))]
    return make_tiny(dicom_dls(folder, df, size=32, label_col='side', label_delim='|'))

def three_classes(folder):
    df = pd.read_csv(folder/'labels.csv')
    df['label'] = [f'c{i%3}' for i in range(len(df))]
    return make_tiny(dicom_dls(folder, df, size=32))

# figures

def test_values_are_scikit_learns(scores):
    p, y = scores
    r, called = evaluate(frame(p, y)), p >= 0.5
    want = dict(accuracy=sk.accuracy_score(y, called), auc=sk.roc_auc_score(y, p), average_precision=sk.average_precision_score(y, p),
                sensitivity=sk.recall_score(y, called), specificity=sk.recall_score(~y, ~called), ppv=sk.precision_score(y, called),
                npv=sk.precision_score(~y, ~called), brier=sk.brier_score_loss(y, p))
    for k, v in want.items(): assert r[k]['value'] == pytest.approx(v) and r[k]['low'] < v < r[k]['high'], k
    share, mean = calibration_curve(y, p, n_bins=10)
    n = np.bincount(np.minimum((p*10).astype(int), 9), minlength=10)
    assert r['calibration_error']['value'] == pytest.approx((n[n > 0]*abs(share-mean)).sum()/n.sum(), abs=.02) # the bins' edges differ for ties
    assert (r['images'], r['patients'], r['threshold'], r['positive']) == (120, 120, 0.5, 'ill')

@pytest.mark.parametrize('seed', range(3))
def test_weighted_curves_are_scikit_learns(seed):
    "Also with ties, and with images that do not count"
    rng = np.random.default_rng(seed)
    y, p = rng.random(40) < .5, rng.integers(0, 6, 40)/5
    w = patient_resamples(rng.integers(0, 25, 40), 50, seed)
    tp, fp = roc_counts(y, p, w)
    np.testing.assert_allclose(roc_area(tp, fp), [sk.roc_auc_score(y, p, sample_weight=o) for o in w])
    np.testing.assert_allclose(average_precision(tp, fp), [sk.average_precision_score(y, p, sample_weight=o) for o in w])

def test_intervals_are_scipys(scores):
    p, y = scores
    r, rng = evaluate(frame(p, y), n_resamples=4000), np.random.default_rng(5)
    assert r['auc'] == evaluate(frame(p, y), n_resamples=4000)['auc'] != evaluate(frame(p, y), n_resamples=4000, seed=1)['auc']
    def ci(f, *data): return bootstrap(data, f, paired=True, vectorized=False, n_resamples=4000, method='percentile', rng=rng).confidence_interval
    for k, f in dict(auc=sk.roc_auc_score, average_precision=sk.average_precision_score, brier=sk.brier_score_loss).items():
        assert (r[k]['low'], r[k]['high']) == pytest.approx(tuple(ci(f, y, p)), abs=.015), k
    assert (r['accuracy']['low'], r['accuracy']['high']) == pytest.approx(tuple(ci(sk.accuracy_score, y, p >= .5)), abs=.015)

def test_interval_holds_the_truth_nineteen_times_in_twenty():
    "200 made-up studies of a model whose probabilities are true: AUC 5/6, Brier score 1/6, calibration error 0 (which chance alone inflates: three in four is what the mirror gets)"
    rng, hits = np.random.default_rng(0), []
    for _ in range(200):
        p = rng.random(80)
        y = rng.random(80) < p
        r = evaluate(frame(p, y), n_resamples=300)
        hits.append((r['auc']['low'] <= 5/6 <= r['auc']['high'], r['brier']['low'] <= 1/6 <= r['brier']['high'], r['calibration_error']['low'] <= .03))
    auc, brier, cal = np.mean(hits, 0)
    assert .89 <= auc <= .99 and .89 <= brier <= .99 and cal >= .7, (auc, brier, cal)

def test_repeated_patients_widen_the_interval(scores):
    "Each image four times: 480 images are no more evidence than 120, if the patients are known"
    p, y = (np.repeat(o, 4) for o in scores)
    def width(patient):
        r = evaluate(frame(p, y, patient))
        return np.array([r[k]['high']-r[k]['low'] for k in ('auc', 'accuracy', 'ppv', 'brier')])
    assert width(np.repeat(np.arange(120), 4)) == pytest.approx(2*width(np.arange(480)), rel=0.25)

def test_nothing_wrong_is_not_certain():
    y = np.arange(40) < 14
    r = evaluate(frame(np.where(y, .9, .2), y))
    for k, n in dict(accuracy=40, sensitivity=14, specificity=26, ppv=14, npv=26, auc=14).items():
        assert r[k]['value'] == r[k]['high'] == 1 and r[k]['low'] == pytest.approx(beta.ppf(.025, n, 1)), k
    assert r['average_precision']['value'] == 1 and np.isnan(r['average_precision']['low'])
    r = evaluate(frame(np.where(y, .1, .2), y, np.repeat(np.arange(20), 2))) # nobody found, images in pairs
    assert r['sensitivity']['low'] == 0 and r['sensitivity']['high'] == pytest.approx(1-beta.ppf(.025, 7, 1))
    assert np.isnan(r['ppv']['value']) # no alarm, no share of right ones

def test_interval_as_text():
    assert interval_text('AUC', dict(value=.756, low=.6, high=float('nan'))) == 'AUC 0.76'

def test_one_class_has_no_auc():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = evaluate(frame(np.array([0.2, 0.7]), np.array([True, True])), n_resamples=20)
    assert np.isnan(r['auc']['value']) and np.isnan(r['specificity']['value']) and r['sensitivity']['value'] == 0.5

# operating point

def test_threshold_keeps_the_sensitivity(scores):
    p, y = scores
    for s in .5, .8, .95, 1.:
        t = choose_threshold(y, p, s)
        assert (p[y] >= t).mean() >= s > (p[y] > t).mean()
    def j(t): return (p[y] >= t).mean()+(p[~y] < t).mean()
    assert j(choose_threshold(y, p)) == max(map(j, np.unique(p)))
    with pytest.raises(ValueError, match='one only'): choose_threshold(y[y], p[y])
    with pytest.raises(ValueError, match='between 0 and 1'): choose_threshold(y, p, 90)

def test_threshold_is_not_scored_on_its_own_patients():
    "On pure noise Youden's J is 0; chosen and scored on the same images it is not"
    rng, same, crossed = np.random.default_rng(1), [], []
    for _ in range(40):
        y, p = rng.random(60) < .5, rng.random(60)
        r = evaluate(frame(p, y), threshold='youden', n_resamples=10)
        crossed.append(r['sensitivity']['value']+r['specificity']['value']-1)
        same.append((p[y] >= r['threshold']).mean()+(p[~y] < r['threshold']).mean()-1)
        assert r['threshold'] == choose_threshold(y, p)
    assert np.mean(same) > .12 and abs(np.mean(crossed)) < .06

def test_no_patient_is_judged_by_a_threshold_of_its_own_images(monkeypatch, scores):
    import dicomcam.results as di
    (p, y), patient, own = scores, np.arange(120)//3, di.choose_threshold
    known = dict(zip(p+np.arange(120)*1e-6, patient))
    seen = []
    monkeypatch.setattr(di, 'choose_threshold', lambda y, p, s=None: seen.append({known[o] for o in p}) or own(y, p, s))
    evaluate(frame(p+np.arange(120)*1e-6, y, patient), threshold=('sensitivity', .9), n_resamples=5)
    *folds, last = seen
    assert len(last) == 40 and len(folds) == 5 and sum(40-len(o) for o in folds) == 40 # each patient is left out once, whole

@pytest.mark.parametrize('bad', ['best', ('specificity', .9), ('sensitivity', 2)])
def test_bad_threshold(scores, bad):
    with pytest.raises(ValueError, match='threshold is|sensitivity lies'): evaluate(frame(*scores), threshold=bad)

def test_threshold_needs_two_patients_of_either_class():
    with pytest.raises(ValueError, match='two patients'): evaluate(frame(np.array([.1, .9, .3]), np.array([False, True, False])), threshold='youden')

# what goes in

def test_predictions_from_every_source(learn):
    df, table = predictions(learn), known_table(learn)
    assert prediction_classes(df) == list(learn.dls.vocab)
    assert list(df.columns) == ['file', 'label', 'patient', 'loss', *learn.dls.vocab] and len(df) == table.is_valid.sum()
    known = table.set_index('file')
    assert df.label.tolist() == known.label[df.file].tolist() and df.patient.tolist() == known.group[df.file].tolist()
    own = [df[l][i] for i, l in enumerate(df.label)]
    np.testing.assert_allclose(df.loss, -np.log(own))
    pd.testing.assert_frame_equal(predictions(learn, learn.dls.valid), df)
    pd.testing.assert_frame_equal(predictions(learn, table[table.is_valid]), df)
    blind = predictions(learn, df.file.tolist())
    assert blind.label.isna().all() and blind.loss.isna().all() and blind.patient.tolist() == df.patient.tolist()
    pd.testing.assert_frame_equal(blind[list(learn.dls.vocab)], df[list(learn.dls.vocab)])
    assert len(predictions(learn, str(df.file[0]))) == 1
    with pytest.raises(ValueError, match='label of .*unknown'): evaluate(blind)
    with pytest.raises(ValueError, match="'x' is none of the classes"): predictions(learn, table.assign(label='x'))
    with pytest.raises(ValueError, match="No class 'x'"): evaluate(df, positive='x')

def test_predictions_of_a_loaded_model(folder, tmp_path):
    learn = dicom_learner(dicom_dls(folder, size=32), 'xresnet18')
    loaded = load_model(save_model(learn, tmp_path/'m.safetensors'))
    table = label_table(folder).iloc[:4]
    pd.testing.assert_frame_equal(predictions(loaded, table), predictions(learn, table))
    assert known_table(loaded) is None
    with pytest.raises(ValueError, match='no validation set'): predictions(loaded)

def test_evaluate_takes_learner_and_frame(learn):
    r = evaluate(learn)
    assert str(r) == str(evaluate(predictions(learn))) == str(evaluate(learn, positive=learn.dls.vocab[1])) # as text, for NaN is not NaN
    assert evaluate(learn, positive=learn.dls.vocab[0])['auc']['value'] == pytest.approx(r['auc']['value'])
    assert json.loads(json.dumps(r))['images'] == r['images']

@pytest.mark.parametrize('make, positive', [(three_classes, 'c1'), (two_labels, 'left')])
def test_more_classes_and_several_labels(folder, make, positive):
    learn = make(folder)
    df = predictions(learn)
    with pytest.raises(ValueError, match='Which class counts as positive'): evaluate(df)
    p, y, _ = positive_scores(df, positive=positive)
    assert (p == df[positive]).all() and y.tolist() == [positive in (o if isinstance(o, tuple) else [o]) for o in df.label] and 0 < y.sum() < len(y)
    assert evaluate(df, positive=positive)['auc']['value'] == pytest.approx(sk.roc_auc_score(y, p))
    if make is two_labels:
        is_c = np.array([[c in o for c in learn.dls.vocab] for o in df.label])
        np.testing.assert_allclose(df.loss, [sk.log_loss(t, q, labels=[False, True]) for t, q in zip(is_c, df[list(learn.dls.vocab)].to_numpy())])

MEETING = ['label', 'file', 'loss', 'patient', 'label (class)', 'predicted'] # classes called as columns of the table are, and as what becomes of those

def named_as_columns(folder):
    df = pd.read_csv(folder/'labels.csv')
    df['label'] = [MEETING[i%6] for i in range(len(df))]
    return make_tiny(dicom_dls(folder, df, size=64))

def test_classes_that_are_called_as_columns_are(folder, tmp_path):
    "Nothing lost, nothing mixed up, in memory and in a file"
    learn = named_as_columns(folder)
    df, vocab = predictions(learn), list(learn.dls.vocab)
    assert sorted(vocab) == sorted(MEETING) and df.columns.is_unique and prediction_classes(df) == vocab
    assert list(df.columns) == ['file', 'label', 'patient', 'loss', *class_columns(vocab)] and 'predicted' in df
    probs, targets = learn.get_preds()
    np.testing.assert_allclose(class_scores(df), probs)
    assert df.label.tolist() == [vocab[o] for o in targets] and df.file.map(lambda o: o.is_file()).all()
    df.to_csv(tmp_path/'p.csv', index=False)
    for table in df, pd.read_csv(tmp_path/'p.csv'):
        for i, cls in enumerate(vocab):
            p, y, _ = positive_scores(table, positive=cls)
            np.testing.assert_allclose(p, probs[:, i], rtol=1e-6)
            assert y.tolist() == (targets == i).tolist()
            assert evaluate(table, positive=cls, n_resamples=5)['brier']['value'] == pytest.approx(((p-y)**2).mean())
    subgroups(df, positive='label', n_resamples=5)
    fig = plot_top_losses(learn, gradcam, 2)
    assert any(o.get_title().startswith(df.nlargest(1, 'loss').label.iloc[0]+'\n') for o in fig.axes)

def test_only_names_that_meet_change():
    assert class_columns(['ill', 'Label', 'mass', 'predicted']) == ['ill', 'Label', 'mass', 'predicted']
    names = ['label', 'label (class)', 'x', 'a.b', 'a+b']
    assert class_columns(names, ['x', 'a.b']) == ['label', 'label (class)', 'x (class)', 'a.b (class)', 'a+b']

# drawings

def test_figures_draw_what_they_say(scores):
    p, y = scores
    fig, axs = plt.subplots(1, 5)
    assert [f(y, p, ax) for f, ax in zip((plot_roc, plot_pr, plot_calibration, plot_scores, plot_confusion), axs)] == list(axs)
    fpr, tpr, _ = sk.roc_curve(y, p, drop_intermediate=False)
    np.testing.assert_allclose(axs[0].lines[0].get_xydata(), np.c_[fpr, tpr])
    assert f'AUC {sk.roc_auc_score(y, p):.2f} (' in axs[0].get_legend().get_texts()[0].get_text()
    precision, recall, _ = sk.precision_recall_curve(y, p)
    np.testing.assert_allclose(axs[1].lines[0].get_xydata()[1:], np.c_[recall, precision][:-1][::-1])
    share, mean = calibration_curve(y, p, n_bins=10)
    assert len([o for o in axs[2].containers]) == len(share)
    assert sum(o.get_height() for c in axs[3].containers for o in c) == len(y)
    cm = sk.confusion_matrix(y, p >= .5)
    assert [o.get_text() for o in axs[4].texts] == [f'{n}\n{n/cm[i].sum():.0%}' for i in (0, 1) for n in cm[i]]
    three = plot_confusion([0, 1, 2, 2], np.eye(3)[[0, 1, 1, 2]], classes=['a', 'b', 'c'])
    assert [o.get_text() for o in three.texts] == ['1\n100%', '0\n0%', '0\n0%', '0\n0%', '1\n100%', '0\n0%', '0\n0%', '1\n50%', '1\n50%']

def test_bands_hold_the_curve_and_widen_with_the_patients(scores):
    p, y = (np.repeat(o, 4) for o in scores)
    def area(f, patient):
        v = f(y, p, patient=patient).collections[0].get_paths()[0].vertices
        return abs(np.sum(v[:-1, 0]*v[1:, 1]-v[1:, 0]*v[:-1, 1]))/2
    for f in plot_roc, plot_pr: assert area(f, np.arange(480)//4) > 1.5*area(f, None) > .05

# subgroups

def test_subgroups_add_up(learn):
    df = predictions(learn)
    g = subgroups(df)
    assert len(g.index.get_level_values('element').unique()) >= 1
    for name, o in g.groupby('element'): assert (o.images.sum(), o.positives.sum()) == (len(df), (df.label == 'Pneumothorax').sum())
    plot_subgroups(g)

def test_a_group_whose_interval_is_empty_up_to_rounding_is_drawn():
    "matplotlib refuses error bars below zero, and an interval from resamples may miss its own value in the last digit"
    index = pd.MultiIndex.from_tuples([('PatientSex', 'F'), ('PatientSex', 'M')], names=['element', 'value'])
    auc = np.array([.75, .8])
    df = pd.DataFrame(dict(images=4, auc=auc, low=np.nextafter(auc, 1), high=np.nextafter(auc, 0)), index)
    _, caps, _ = plot_subgroups(df).containers[0]
    assert np.allclose([o.get_xdata() for o in caps], auc)

def test_subgroups_of_real_films(xrays):
    "Half of the films, scores drawn at random; the view position of the whole folder gives the label away, age does not"
    table = label_table(xrays)
    with pytest.warns(UserWarning, match=r'ViewPosition alone predicts Pneumonia: AUC 0\.(59|60)'): h = header_auc(table, 'Pneumonia')
    assert set(h.index) == {'PatientSex', 'PatientAge', 'ViewPosition'} # modality does not vary, the manufacturer is unknown
    assert .57 < h.value['ViewPosition'] < .63 and h.low['ViewPosition'] > .5 > h.low['PatientAge']
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(file=table.file, label=table.label, patient=table.group, loss=0., no=0., Pneumonia=rng.random(len(table))))
    with pytest.warns(UserWarning, match='alone predicts'): g = subgroups(df, positive='Pneumonia')
    assert g.images['ViewPosition'].to_dict() == dict(AP=140, PA=110) and list(g.images['PatientAge'].index) == ['0-17', '18-39', '40-59', '60-79', '80+']
    assert g.rate['ViewPosition']['AP'] == pytest.approx(58/140)
    ap = df[[o.startswith('AP') for o in _views(table.file)]]
    assert g.auc['ViewPosition']['AP'] == pytest.approx(sk.roc_auc_score(ap.label == 'Pneumonia', ap.Pneumonia))

def _views(files):
    import pydicom
    return [pydicom.dcmread(o, stop_before_pixels=True).ViewPosition for o in files]

def test_labels_at_random_make_no_header_suspect(xrays):
    table, rng = label_table(xrays), np.random.default_rng(3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        h = header_auc(table.assign(label=rng.permutation(table.label)), 'Pneumonia', n_resamples=200)
    assert (abs(h.value-.5) < .1).all()

def test_too_few_patients_for_a_header_to_learn_from(folder):
    "scikit-learn 1.6 may put all positives into one fold: nothing is said then, rather than an error from inside"
    table = label_table(folder)
    ill = np.flatnonzero(table.label == 'Pneumothorax')
    rest = np.setdiff1d(np.arange(len(table)), ill)
    with mock.patch('dicomcam.results.StratifiedGroupKFold') as k:
        k().split.return_value = [(rest, ill), (ill, rest)]
        assert header_auc(table, 'Pneumothorax').empty
        g = subgroups(frame(np.linspace(0, 1, len(table)), table.label == 'Pneumothorax').assign(file=table.file), positive='ill')
    assert len(g) and g.header_auc.isna().all()

# pictures

def test_interpretation_draws_what_the_network_saw(learn):
    from fastai.vision.all import ClassificationInterpretation # which also tells it how to draw images
    interp = ClassificationInterpretation.from_learner(learn)
    df = predictions(learn)
    vocab = list(learn.dls.vocab)
    want = sk.confusion_matrix(df.label, [vocab[i] for i in df[vocab].to_numpy().argmax(1)], labels=vocab)
    assert (interp.confusion_matrix() == want).all()
    interp.plot_top_losses(2)
    worst = interp.top_losses(2)[1].tolist()
    assert [df.loss.rank(ascending=False)[i] for i in worst] == [1, 2]
    for ax, i in zip(plt.gcf().axes, worst):
        im = ax.images[0]
        assert im.cmap.name in ('gray', 'bone', 'Greys_r') and np.abs(np.squeeze(im.get_array())-learn.dls.valid_ds[i][0][0].numpy()).max() < 1/255
    interp.plot_confusion_matrix()
    assert interp.most_confused() or (np.diag(want) == want.sum(1)).all()

def test_top_losses_with_their_heatmaps(learn):
    df = predictions(learn).nlargest(3, 'loss')
    asked = []
    def explain(learn, files):
        asked.extend(files)
        return gradcam(learn, files, layers=-7)
    fig = plot_top_losses(learn, explain, k=3, ncols=2)
    assert asked == df.file.tolist()
    drawn = [ax for ax in fig.axes if ax.images]
    assert len(drawn) >= 6 and f'{df.label.iloc[0]}\nloss {df.loss.iloc[0]:.2f}' == drawn[0].get_title()
    np.testing.assert_allclose(drawn[0].images[0].get_array(), gradcam(learn, df.file.tolist(), layers=-7).picture(0))
    assert len(drawn[1].images) == 2 # image and overlay
    with pytest.raises(ValueError, match='No labels'): plot_top_losses(learn, explain, items=df.file.tolist())
