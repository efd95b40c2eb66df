"Pairs of films that differ in one thing: zero elsewhere, to the bit; and what a model owes to it."
import io

import cv2, numpy as np, pandas as pd, pydicom, pytest
from PIL import Image

from dicomcam.anatomy import cavity, heart
from dicomcam.data import lesion_mask, phantom
from dicomcam.labels import label_table
from dicomcam.pairs import CHANGES, phantom_pairs, read_pairs, render_pair, tied
from dicomcam.phantom import phantom_study
from dicomcam.projection import film, films, place, render, shadow
from dicomcam.solids import grid

SIZE = 128

def read(file):
    with pydicom.config.disable_value_validation(): return pydicom.dcmread(file)

def pixels(file): return read(file).pixel_array.astype(int)
def drawn(file): return cv2.imread(str(file), cv2.IMREAD_UNCHANGED) > 0
def content(p): return {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}
def grown(mask, by): return cv2.dilate(mask.astype(np.uint8), np.ones((2*by+1,)*2, np.uint8)) > 0

@pytest.fixture(scope='module', params=CHANGES)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp('pairs')/request.param
    return phantom_pairs(out, n=6, size=SIZE, seed=5, change=request.param, n_jobs=1, progress=False)

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    return phantom_pairs(tmp_path_factory.mktemp('pairs')/'words', n=20, size=32, seed=3, change='word', n_jobs=1, progress=False)

# --- the difference

def pleural(i):
    "Where the cavity of the lesion's side is on film `i`, by the anatomy alone"
    body, _ = phantom_study(i, 0, True, seed=5)
    x, y = grid(2*SIZE)
    path = cavity(body, x, y, body.ptx.side, heart(body, x, y))
    there, = place(body, SIZE, grown(path > 0, 2).astype(np.float32)) # the line of the pleura is soft
    return there > 0

@pytest.mark.parametrize('i', range(4))
def test_lesion_changes_one_cavity_alone(i):
    film, twin, mask, without = render_pair(*visit(i), 'lesion', np.random.default_rng(0))
    differs = film != twin
    assert not differs[~grown(pleural(i), 2)].any() # the detector's blur reaches 2 pixels
    assert differs[mask > 0].mean() > .9 and without.ptx is None
    assert (film.astype(int)-twin)[mask > 0].mean() < -5 # air is dark

def visit(i, ptx=True):
    body, rng = phantom_study(i, 0, ptx, seed=5)
    return body, SIZE, rng

@pytest.mark.parametrize('change,largest', [('drain', .03), ('word', .02), ('marker', .01)])
@pytest.mark.parametrize('ptx', [True, False])
def test_things_are_small_and_bright(change, largest, ptx):
    film, twin, mask, _ = render_pair(*visit(2, ptx), change, np.random.default_rng(0))
    difference = film.astype(int)-twin
    assert 0 < (difference != 0).mean() < largest and difference.max() > 20 and difference.min() >= 0
    ys, xs = np.nonzero(difference)
    where = ys.mean()/SIZE, xs.mean()/SIZE
    if change == 'word': assert where[0] < .15 and where[1] < .35
    if change == 'marker': assert where[0] < .3 and not .2 < where[1] < .8
    if change == 'drain': assert .2 < where[0] < .7

def test_drain_is_on_the_side_of_the_lesion():
    for i in range(6):
        body, size, rng = visit(i)
        film, twin, _, _ = render_pair(body, size, rng, 'drain', np.random.default_rng(0))
        assert np.sign(np.nonzero(film != twin)[1].mean()-SIZE/2) == body.ptx.side

@pytest.mark.parametrize('change', CHANGES)
def test_one_of_the_two_is_the_usual_film(change):
    film, twin, mask, _ = render_pair(*visit(1), change, np.random.default_rng(0))
    usual, usual_mask = render(*visit(1))
    assert ((twin if change in ('drain', 'word') else film) == usual).all() and (mask == usual_mask).all()

def test_the_machine_answers_to_the_first_film():
    "Alone, a film with a bar of lead is exposed otherwise all over; beside the film without, only where the bar is"
    body, _ = phantom_study(0, 0, False, seed=5)
    plain, _ = shadow(body, SIZE)
    bar = plain.copy()
    bar[40:80, 40:60] += 2
    alone, usual = (film(body, o, np.random.default_rng(1)) for o in (bar, plain))
    first, second = films(body, [plain, bar], np.random.default_rng(1))
    far = ~grown(bar != plain, 2)
    assert (first == usual).all() and (second == usual)[far].all() and not (alone == usual)[far].all()

# --- the folder

def test_files_differ_where_they_say(folder):
    pairs = pd.read_csv(folder/'pairs.csv')
    assert len(pairs) == 6 and set(pairs.change) == {folder.name}
    for o in pairs.itertuples():
        film, twin = read(folder/o.file), read(folder/o.twin)
        assert not film.file_meta.TransferSyntaxUID.is_compressed and 'LossyImageCompression' not in film
        assert film.PatientID == twin.PatientID == o.patient and film.SOPInstanceUID != twin.SOPInstanceUID
        assert ((film.pixel_array != twin.pixel_array) == drawn(folder/o.changed)).all() and drawn(folder/o.changed).any()

def test_masks_and_labels_agree(folder):
    pairs, table = read_pairs(folder), label_table(folder).set_index('file')
    assert len(table) == 12 and table.group.nunique() == pairs.patient.nunique()
    for o in pairs.itertuples():
        for file, label in (o.file, o.label), (o.twin, o.twin_label):
            mask = lesion_mask(folder, file)
            assert (mask is not None) == (label == 'Pneumothorax') == (table.label[file] == 'Pneumothorax')
        if o.change == 'lesion':
            assert (o.label, o.twin_label) == ('Pneumothorax', 'No Pneumothorax') and (drawn(o.region) == lesion_mask(folder, o.file)).all()
        else: assert o.label == o.twin_label and o.region == o.changed
    if folder.name != 'lesion': assert (pairs.label == 'Pneumothorax').sum() == 2

def test_patients_are_those_of_the_phantom(folder, tmp_path):
    "Compressed, the usual film is the phantom's own"
    usual = phantom(tmp_path/'p', n=6, size=SIZE, seed=5, n_jobs=1, progress=False)
    for o in read_pairs(folder).itertuples():
        mine = o.twin if o.change in ('drain', 'word') else o.file
        theirs = list(usual.rglob(f'{o.pair:06}.dcm'))[0]
        if theirs.parent.name != mine.parent.name: continue # every film of the lesion has one
        jpeg = io.BytesIO()
        Image.fromarray(read(mine).pixel_array).save(jpeg, 'JPEG', quality=92)
        assert (np.asarray(Image.open(jpeg)) == read(theirs).pixel_array).all()

def test_same_seed_same_bytes(folder, tmp_path):
    n_jobs = 2 if folder.name == 'word' else 1
    again = phantom_pairs(tmp_path/'again', n=6, size=SIZE, seed=5, change=folder.name, n_jobs=n_jobs, progress=False)
    assert content(again) == content(folder)

def test_kept_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    made = phantom_pairs(n=2, size=33, change='marker', n_jobs=1, progress=False)
    stamp = (made/'labels.csv').stat().st_mtime_ns
    other = phantom(n=2, size=32, n_jobs=1, progress=False)
    assert phantom_pairs(n=2, size=33, change='marker') == made != other and (made/'labels.csv').stat().st_mtime_ns == stamp
    assert pixels(next(made.rglob('*.dcm'))).shape == (33, 33) # an odd number of bytes is padded

def test_errors(tmp_path, words):
    with pytest.raises(ValueError, match="No change 'beard'; there are lesion, drain, word, marker"): phantom_pairs(tmp_path/'x', change='beard')
    with pytest.raises(ValueError, match='No change'): render_pair(*visit(0), 'beard', np.random.default_rng(0))
    with pytest.raises(ValueError, match='at least 2 images'): phantom_pairs(tmp_path/'x', n=1)
    with pytest.raises(FileExistsError, match='not empty and not this phantom'): phantom_pairs(words, n=20, size=32, change='drain')
    assert not (tmp_path/'x').exists()

# --- a word that goes with the disease

@pytest.mark.parametrize('r', [0, .5, .9, 1])
def test_word_goes_with_the_disease(words, r):
    table, pairs = tied(words, r), read_pairs(words)
    ill = table.label == 'Pneumothorax'
    assert table.shown[ill].sum() == round(6*r) and table.shown[~ill].sum() == round(14*(1-r))
    assert (table.file == pairs.file.where(table.shown, pairs.twin)).all()

def test_other_seed_other_films(words):
    assert (tied(words, .5, seed=1).shown != tied(words, .5, seed=2).shown).any() and (tied(words, .5).file == tied(words, .5).file).all()

@pytest.mark.parametrize('r', [-.1, 1.1])
def test_r_is_a_share(words, r):
    with pytest.raises(ValueError, match='r is a share'): tied(words, r)

def test_the_lesion_is_not_tied_to_itself(tmp_path):
    with pytest.raises(ValueError, match='the lesion is the disease'): tied(phantom_pairs(tmp_path/'p', n=2, size=32, n_jobs=1, progress=False), .5)
