"""Real films: how good is the classifier, and do its heatmaps find the disease?

    python benchmarks/real.py FOLDER... --pretrained WEIGHTS [--boxes boxes.csv rsna_boxes.csv] [--out FILE.json]
    python benchmarks/real.py FOLDER... --pretrained WEIGHTS --films 100 200                  the learning curve

FOLDER holds DICOM files and labels.csv, and knows lesions by `masks/`, boxes.csv or the challenge's own masks of SIIM_SMALL
(`lesion_mask`); all folders together are split into five folds by patient. Each fold's network is trained by `train_learner` on the
other four; lesions of their films guide the map while it trains (`LesionGuide`; not with `--guide 0`). Everything is out of fold: a
film's score, its heatmaps, the prior (lesions of the training side), and the layer and method that are chosen for it, by lesions of
the films that its network was trained on. Heatmaps of three kinds: as they are, the mean with that of the mirror image, and the mean
of the latter over several trainings. In Colab: `path = siim_small()`, then this script on that folder."""
import argparse, copy, json, os, pickle, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
import cv2, numpy as np, pandas as pd, torch
from fastai.callback.core import Callback
from fastai.learner import defaults
from fastai.vision.augment import Flip
from sklearn.model_selection import StratifiedGroupKFold
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dicomcam.batches import XrayTfm
from dicomcam.choice import CANDIDATES, choose_layer, late_stages, layer_scores
from dicomcam.data import lesion_mask
from dicomcam.files import plain_progress
from dicomcam.gradcam import gradcam
from dicomcam.guide import LesionGuide, training_lesions, training_prior
from dicomcam.intervals import interval, mean_interval, paired_difference, patient_resamples, roc_area, roc_counts
from dicomcam.labels import label_table
from dicomcam.localize import measures_by_image
from dicomcam.maps import positive as speaks_for
from dicomcam.models import load_model, save_model
from dicomcam.passport import Passport, passport_values
from dicomcam.pixels import dicom_pixels
from dicomcam.protocols import arun_similarity
from dicomcam.read import read_dicom
from dicomcam.results import class_scores, predictions
from dicomcam.tables import read_table
from dicomcam.training import full_recipe, train_learner

MEASURES = 'pointing', 'mass', 'auprc'
SIDE = 32 # of the mean maps

# --- data ---

def films_of(folders, k, seed):
    "All films: file, label, patient, view, fold."
    df = pd.concat([label_table(folder, by='PatientID') for folder in folders], ignore_index=True)
    df['view'] = [str(read_dicom(file, pixels=False).get('ViewPosition', '')) for file in df.file]
    folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(df, df.label, df.group)
    for fold, (_, held_back) in enumerate(folds): df.loc[held_back, 'fold'] = fold
    return df.rename(columns=dict(group='patient')).astype(dict(fold=int))

def rows_of(folders, names):
    "Absolute file and row, of tables that the package does not look for by itself."
    for fn in (Path(folder)/name for folder in folders for name in names):
        if not fn.is_file(): continue
        for row in read_table(fn).itertuples(): yield Path(os.path.abspath(fn.parent/row.file)), row

def boxes_of(folders, names):
    "File -> boxes (x, y, width, height)."
    boxes = {}
    for file, row in rows_of(folders, names):
        boxes.setdefault(file, []).append([float(getattr(row, o)) for o in ('x', 'y', 'width', 'height')])
    return boxes

def mask_of(file, folders, boxes):
    "What anybody has drawn on a film, joined; None where nobody has."
    file = Path(os.path.abspath(file))
    folder = next(o for o in folders if file.is_relative_to(o))
    mask = lesion_mask(folder, file)
    for x, y, width, height in boxes.get(file, []):
        if mask is None:
            ds = read_dicom(file, pixels=False)
            mask = np.zeros((ds.Rows, ds.Columns), bool)
        mask[int(y):round(y+height), int(x):round(x+width)] = True
    return mask

# --- training ---

class Averaged(Callback):
    "At the end the weights' moving average takes their place."
    decay = .98
    def before_fit(self): self.mean = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
    def after_batch(self):
        if self.training: self.mean.update_parameters(self.model)
    def after_fit(self): self.model.load_state_dict(self.mean.module.state_dict())

def trained(films, lesion, fold, n_films, seed, args):
    "A learner that has seen the other folds, or `n_films` of them."
    other = films.fold != fold
    if n_films: other &= films.index.isin(films[other].sample(frac=1, random_state=args.seed).index[:n_films])
    here = films[other | (films.fold == fold)]
    table = here[['file', 'label']].assign(fold=(here.fold == fold).astype(int), file=here.file.astype(str))
    data = dict(labels=table, fold=1) | (dict(batch_tfms=[XrayTfm(), Flip()]) if args.flip else {})
    kept = Path(args.keep)/f'fold{fold}-{n_films or "all"}-{seed}.safetensors' if args.keep else None
    known = bool(kept and kept.is_file())
    taught = args.guide > 0 and any(lesion(file) is not None for file in films.file[other])
    guide = taught and LesionGuide(mask_of=lesion, weight=args.guide, fewest=1)
    learn = train_learner(os.path.commonpath(films.file.tolist()), seed, not known, data=data, **args.recipe | dict(guide=guide))
    if known: return load_model(kept, learn.dls)
    if kept: save_model(learn, kept)
    return learn

# --- maps ---

def with_maps(h, raw, kind, probs):
    "Heatmaps of the same films, with other maps."
    new = copy.copy(h)
    new.raw, new.probs, new.method = raw, probs, f'{h.method}{kind}'
    return new

def mirrored(learn, h):
    "The mean with the map of the mirror image, turned back."
    other = gradcam(learn, h.inputs.flip(-1), None, h.layers, h.method)
    return with_maps(h, [(a+b.flip(-1))/2 for a, b in zip(h.raw, other.raw)], '', h.probs)

def share_of_maximum(raw): return speaks_for(raw)/speaks_for(raw).amax((2, 3), keepdim=True).clamp(min=1e-30)

def mean_of(hs):
    "The mean of the maps of several networks, each as a share of its maximum."
    return with_maps(hs[0], [sum(map(share_of_maximum, o))/len(hs) for o in zip(*(h.raw for h in hs))], '', sum(h.probs for h in hs)/len(hs))

KINDS = '', ', mirror', ', mean of trainings' # what is added to a method's name

def maps_of(learns, files, layers):
    "Kind -> heatmaps, one a method; and those of each network, plain and mirrored."
    plain = [[gradcam(learn, files, None, layers, method) for method in CANDIDATES] for learn in learns]
    mirror = [[mirrored(learn, h) for h in hs] for learn, hs in zip(learns, plain)]
    kinds = [plain[0], mirror[0]] + ([[mean_of(hs) for hs in zip(*mirror)]] if len(learns) > 1 else [])
    return dict(zip(KINDS, kinds)), dict(zip(KINDS, (plain, mirror)))

def one(h, i):
    "The heatmaps of one film alone."
    new = copy.copy(h)
    new.raw, new.images, new.probs, new.items, new._sizes = [o[i:i+1] for o in h.raw], h.images[i:i+1], h.probs[i:i+1], h.items[i:i+1], {}
    return new

def similarities(each, cls):
    "SSIM of the Grad-CAM of two trainings: of the same film, and of one and the next film."
    values = {}
    for kind, (a, b, *_) in each.items():
        a, b = a[0], b[0]
        for layer in a.layers[1:3]:
            for name, step in {'same film': 0, 'another film': 1}.items():
                pairs = [(one(a, i), one(b, (i+step) % len(b))) for i in range(len(a))]
                values[f'gradcam{kind}', layer, f'ssim, {name}'] = [arun_similarity(*o, cls, layer)['value'] for o in pairs]
    return pd.DataFrame(values, each[''][0][0].items)

def only(h, layer, name):
    "The heatmaps of one layer, under another name."
    new = with_maps(h, [h.raw[h.layer(layer)]], '', h.probs)
    new.layers, new.asked, new.method = [''], [''], name
    return new

def measured(learns, known, cls, layers, choices, prior):
    "Measures of all methods, layers and baselines; index: file, columns: map, layer, measure."
    values, files = [], list(known)
    for part in np.array_split(np.arange(len(files)), max(1, round(len(files)/8))): # maps of 1024 x 1024 are large
        part = [files[i] for i in part]
        kinds, each = maps_of(learns, part, layers)
        hs = [with_maps(h, h.raw, kind, h.probs) for kind in kinds for h in kinds[kind]]
        chosen = [only(kinds[kind][CANDIDATES.index(o['method'])], o['layer'], f'chosen{kind}') for kind, o in choices.items()]
        chosen += [h.times(prior) for h in chosen]
        drawn = [known[file] for file in part]
        exact = measures_by_image(hs+chosen, drawn, cls, grow=0, measures=MEASURES, prior=prior).set_axis(part)
        near = measures_by_image(chosen, drawn, cls, measures=['pointing'], prior=prior).set_axis(part)
        near.columns = near.columns.set_levels(['pointing_3%'], level='measure')
        more = [similarities(each, cls)] if len(learns) > 1 else []
        values.append(pd.concat([exact, near, *more], axis=1))
    return pd.concat(values)

def mean_maps(learn, known, cls, layers):
    "The mean lesion and the mean Grad-CAM of each layer, (SIDE, SIDE)."
    def small(o): return cv2.resize(o.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    h = gradcam(learn, list(known), None, layers)
    means = {layer: np.mean([small(h.heat(i, cls, layer)) for i in range(len(h))], 0) for layer in layers}
    return dict(lesion=np.mean([small(o) for o in known.values()], 0), **means)

# --- one fold ---

def judged(learns, known, lesion):
    "What is chosen on the training side, and how it does on the `known` lesions of the films that were held back."
    learn, layers = learns[0], late_stages(learns[0])
    cls, of_training = learn.dls.vocab[-1], training_lesions(learn, mask_of=lesion)
    kinds, choices = maps_of(learns, list(of_training), layers)[0], {}
    for kind, hs in kinds.items():
        scores = layer_scores(hs, of_training, cls)
        (layer, method), share = scores.index[0], scores.pointing
        choices[kind] = dict(layer=layer, method=method, pointing=float(share.iloc[0]), films=len(of_training))
    prior = training_prior(learn, mask_of=lesion)
    values = measured(learns, known, cls, layers, choices, prior)
    return dict(values=values, choices=choices, mean_maps=mean_maps(learn, known, cls, layers), n=len(known))

def run_fold(fold, films, lesion, n_films, args):
    "Train on the other folds; scores and measures of this one, and what was chosen."
    kept = Path(args.keep)/f'fold{fold}-{n_films or "all"}.pickle' if args.keep else None
    if kept: kept.parent.mkdir(parents=True, exist_ok=True)
    if kept and kept.is_file(): return pickle.loads(kept.read_bytes())
    torch.set_num_threads(max(1, (os.cpu_count() or 1)//args.jobs))
    plain_progress()
    if args.ema and Averaged not in defaults.callbacks: defaults.callbacks.append(Averaged)
    start = time.monotonic()
    learns = [trained(films, lesion, fold, n_films, args.seed+1000*i, args) for i in range(1 if n_films else args.trainings)]
    took = round(time.monotonic()-start)
    tables = [predictions(learn) for learn in learns]
    scores = pd.concat([class_scores(df)[learns[0].dls.vocab[-1]].set_axis(df.file) for df in tables], axis=1)
    res = dict(fold=fold, scores=scores.set_axis(range(len(learns)), axis=1), train_seconds=took)
    known = {file: mask for file in scores.index if (mask := lesion(file)) is not None}
    if known and not n_films and not args.auc: res |= judged(learns, known, lesion)
    res['seconds'] = round(time.monotonic()-start)
    if kept: kept.write_bytes(pickle.dumps(res))
    return res

def run_folds(films, lesion, args, n_films=None):
    "What `run_fold` says of each fold."
    return in_folds(partial(run_fold, films=films, lesion=lesion, n_films=n_films, args=args), args)

def in_folds(run, args):
    "What `run` gives of each fold."
    if args.jobs == 1: return [run(fold) for fold in range(args.folds)]
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) as pool: return list(pool.map(run, range(args.folds)))

def passport_of_fold(fold, films, lesion, args):
    "What a fold's network says of the films that it has not seen; layer, method and prior are of the films that it has."
    torch.set_num_threads(max(1, (os.cpu_count() or 1)//args.jobs))
    plain_progress()
    learn = trained(films, lesion, fold, None, args.seed, args)
    choice = choose_layer(learn, mask_of=lesion)
    print(f'fold {fold}:', choice, flush=True)
    table = films.loc[films.fold == fold, ['file', 'label', 'patient']].rename(columns=dict(patient='group')).reset_index(drop=True)
    return passport_values(learn, table, lesion, prior=training_prior(learn, mask_of=lesion), faithful=args.faithful)

# --- all folds ---

def auc(films, y, score='score', resamples=2000):
    "ROC AUC of a score for `y`, with its interval by patient."
    weights = patient_resamples(films.patient.to_numpy(), resamples, 42)
    area = roc_area(*roc_counts(np.asarray(y, bool), films[score].to_numpy(float), weights))
    return interval(area) | dict(n=len(films), positive=int(np.sum(y)))

def is_positive(films): return films.label == max(films.label.unique())

def of_pixels(file):
    "Two numbers of a film that say nothing of a disease, at 224 x 224 pixels."
    x = cv2.resize(dicom_pixels(file).astype(np.float32), (224, 224), interpolation=cv2.INTER_AREA)
    return dict(brightness=float(x.mean()), step=float(np.abs(np.diff(x, axis=0)).mean()))

def questions(films, read):
    "AUC of the score for the label, for what readers say, within views; and of trivial numbers for the label."
    rows = {'the label': auc(films, is_positive(films))}
    for view, o in films.groupby('view'):
        if o.label.nunique() == 2: rows[f'the label, view {view}'] = auc(o, is_positive(o))
    films = films.assign(read=films.file.map(read))
    normal, opacity = films.read == 'Normal', films.read == 'Lung Opacity'
    if normal.any():
        rows['the label, films read as Normal'] = auc(films[normal], is_positive(films)[normal])
        both = normal | opacity
        rows['opacity or Normal, as read'] = auc(films[both], opacity[both])
        both &= is_positive(films)
        rows['opacity or Normal, within the label'] = auc(films[both], opacity[both])
    pixels = pd.DataFrame([of_pixels(o) for o in films.file], films.index)
    films = films.join(pixels)
    rows['the label, by mean brightness alone'] = auc(films, is_positive(films), 'brightness')
    rows['the label, by mean vertical step alone'] = auc(films, is_positive(films), 'step')
    return rows

def share(values, group, hits=False):
    "Mean with its interval by patient."
    mean, low, high = mean_interval(values.to_numpy(), group=group, hits=hits)
    return dict(value=float(mean), low=float(low), high=float(high), n=len(values))

def localized(values, patient, sets):
    "All maps and measures, on all lesions and on the found; what is compared pair by pair."
    table, pairs = [], []
    others = 'prior', 'centre', 'edges', 'noise', 'chosen', 'chosen x prior'
    for name, here in sets.items():
        part, group = values[here], patient[here].to_numpy()
        table += [dict(films=name, map=m, layer=layer, measure=what, **share(part[m, layer, what], group, what == 'pointing')) for m, layer, what in part]
        judged = [o for o in part.columns.unique('map') if o.startswith('chosen')]
        for a, b in ((a, b) for a in judged for b in others if a != b and b in part.columns.unique('map')):
            for what in part[a, ''].columns:
                difference = paired_difference(part[a, '', what].to_numpy(), part[b, '', what].to_numpy(), group,
                    hits=what == 'pointing')
                pairs.append(dict(films=name, map=a, less=b, measure=what, **difference))
    return pd.DataFrame(table), pd.DataFrame(pairs)

def show(rows, index, columns):
    "Rows with value, low and high as a table of 'value (low to high)'."
    df = pd.DataFrame(rows)
    df['text'] = [f'{o.value:.3f} ({o.low:.3f} to {o.high:.3f})' for o in df.itertuples()]
    print(df.pivot_table('text', index, columns, 'first', sort=False).to_string(), end='\n\n')

def heatmaps_of(folds, films):
    "What the heatmaps of all folds say, together."
    values = pd.concat([o['values'] for o in folds]).rename_axis(columns=['map', 'layer', 'measure'])
    known = films.set_index('file').loc[values.index]
    sets = dict(all=known.score >= 0, found=known.score >= .5, **{'found by the mean': known['mean'] >= .5})
    table, pairs = localized(values, known.patient, sets)
    for name in sets:
        print(f'\nlesions: {name}, {sets[name].sum()} films')
        show(table[table.films == name], ['map', 'layer'], 'measure')
        show(pairs[pairs.films == name], ['map', 'less'], 'measure')
    n = [o['n'] for o in folds]
    means = {k: np.average([o['mean_maps'][k] for o in folds], 0, n).round(3).tolist() for k in folds[0]['mean_maps']}
    return dict(choices=[o['choices'] for o in folds], localization=table.to_dict('records'), differences=pairs.to_dict('records'), mean_maps=means)

def with_scores(films, folds):
    "Films, those of the folds with their out-of-fold score: of the first network, and the mean of all."
    scores = pd.concat([o['scores'] for o in folds])
    return films.assign(score=films.file.map(scores[0]), mean=films.file.map(scores.mean(axis=1)))

def main(args):
    start = time.monotonic()
    folders = [Path(os.path.abspath(o)) for o in args.folders]
    films = films_of(folders, args.folds, args.seed)
    lesion = partial(mask_of, folders=folders, boxes=boxes_of(folders, args.boxes))
    args.recipe = full_recipe(**(dict(pretrained=args.pretrained) if args.pretrained else {}) | json.loads(args.recipe))
    about = args.recipe | dict(pretrained=bool(args.recipe.get('pretrained')))
    res = dict(films=len(films), patients=films.patient.nunique(), seed=args.seed, recipe=about, flip=args.flip, ema=args.ema, guide=args.guide)
    for n in args.films:
        part = with_scores(films, run_folds(films, lesion, args, n))
        res.setdefault('learning_curve', []).append(dict(trained_on=n, **auc(part, is_positive(part))))
        print('trained on', res['learning_curve'][-1], flush=True)
    folds = run_folds(films, lesion, args)
    films = with_scores(films, folds)
    read = {file: row.rsna for file, row in rows_of(folders, args.read)}
    print(f'{len(films)} films, {res["patients"]} patients, {args.folds} folds')
    res |= dict(auc=auc(films, is_positive(films)), auc_of_mean=auc(films, is_positive(films), 'mean'), questions=questions(films, read))
    res['readings'] = [dict(label=a, read=b, films=int(n)) for (a, b), n in films.groupby(['label', films.file.map(read)]).size().items()] if read else []
    show([dict(of=k, **v) for k, v in res['questions'].items()], 'of', 'n')
    print('mean of trainings:', res['auc_of_mean'])
    for fold in folds: print(f'fold {fold["fold"]}:', fold.get('choices'), flush=True)
    if all('values' in o for o in folds): res |= heatmaps_of(folds, films)
    if args.passport:
        values = in_folds(partial(passport_of_fold, films=films, lesion=lesion, args=args), args)
        passport = Passport.of(values, max(films.label.unique()), f'Out of fold: each film by the one of {args.folds} networks that has '
            'not seen it, at the layer and by the method that hit most lesions of those that it has seen.')
        passport.to_html(args.passport, 'Trust passport of real films')
        passport.to_json(Path(args.passport).with_suffix('.json'))
        print(passport, flush=True)
        res['passport'] = [o._asdict() for o in passport.verdict]
    res |= dict(train_seconds=[o['train_seconds'] for o in folds], fold_seconds=[o['seconds'] for o in folds], seconds=round(time.monotonic()-start))
    print(res['seconds'], 'seconds')
    if args.out: Path(args.out).write_text(json.dumps(res))

def arguments(given=None):
    "What a person may say; None: on the command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folders', nargs='+')
    p.add_argument('--pretrained', help='file of weights; without it, as `default_recipe` has it')
    p.add_argument('--recipe', default='{}', help='JSON: other arguments for train_learner')
    p.add_argument('--flip', action='store_true', help='train on mirror images too')
    p.add_argument('--ema', action='store_true', help='train to the moving average of the weights')
    p.add_argument('--guide', type=float, default=.5, metavar='WEIGHT', help='how much lesions of the training side guide the map; 0: not at all')
    p.add_argument('--boxes', nargs='*', default=[], help='further tables of boxes in FOLDER')
    p.add_argument('--read', nargs='*', default=[], help="tables in FOLDER of what readers say: file,rsna; 'Lung Opacity', 'Normal'")
    p.add_argument('--films', nargs='*', type=int, default=[], help='also train on so many films only')
    p.add_argument('--trainings', type=int, default=1, help='networks a fold')
    p.add_argument('--auc', action='store_true', help='no heatmaps')
    p.add_argument('--passport', metavar='FILE.html', help='page to write, with FILE.json beside it: what may be said of the heatmaps; with --keep no network is trained twice')
    p.add_argument('--faithful', type=int, default=4, help='films a fold on which the passport holds the heatmaps against the network')
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--jobs', type=int, default=1, help='folds at a time')
    p.add_argument('--keep', help='folder for the results of each fold, which are not made again')
    p.add_argument('--out', help='JSON file to write')
    args = p.parse_args(given)
    if args.passport and args.out and Path(args.passport).with_suffix('.json') == Path(args.out): p.error('--out is where the JSON of --passport goes')
    return args

if __name__ == '__main__': main(arguments())
