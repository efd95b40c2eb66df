"Figures equal to scikit-learn's, intervals that widen when images of one patient are not independent."
import numpy as np, pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

import dicomcam.interpret as di
from dicomcam.interpret import evaluate

def fake(monkeypatch, p, y, patient): monkeypatch.setattr(di, 'positive_scores', lambda *a: (p, y, patient))

@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    y = rng.random(120) < 0.4
    return np.clip(0.3*y+rng.random(120)*0.8, 0, 1), y

def test_values_are_scikit_learns(monkeypatch, scores):
    p, y = scores
    fake(monkeypatch, p, y, np.arange(len(y)))
    r = evaluate(None)
    want = dict(accuracy=accuracy_score(y, p > 0.5), auc=roc_auc_score(y, p), sensitivity=recall_score(y, p > 0.5),
                specificity=recall_score(~y, p <= 0.5))
    for k, v in want.items():
        assert r[k]['value'] == pytest.approx(v) and r[k]['low'] < v < r[k]['high'], k

def test_repeated_patients_widen_the_interval(monkeypatch, scores):
    "Each image four times: 480 images are no more evidence than 120, if the patients are known"
    p, y = (np.repeat(o, 4) for o in scores)
    width = lambda: evaluate(None)['auc']['high']-evaluate(None)['auc']['low']
    fake(monkeypatch, p, y, np.repeat(np.arange(120), 4))
    by_patient = width()
    fake(monkeypatch, p, y, np.arange(480))
    by_image = width()
    assert by_patient == pytest.approx(2*by_image, rel=0.25)

def test_one_class_has_no_auc(monkeypatch):
    fake(monkeypatch, np.array([0.2, 0.7]), np.array([True, True]), np.arange(2))
    r = evaluate(None, n_resamples=20)
    assert np.isnan(r['auc']['value']) and np.isnan(r['specificity']['value']) and r['sensitivity']['value'] == 0.5

def test_three_classes_are_refused():
    class Dls: vocab = ['a', 'b', 'c']
    class Learn: dls = Dls
    with pytest.raises(ValueError, match='need two classes, not 3'): di.positive_scores(Learn)
