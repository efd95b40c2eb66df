"""Real films: how good is the classifier, and do its heatmaps find the disease?

    python benchmarks/real.py FOLDER... --pretrained WEIGHTS [--boxes boxes.csv rsna_boxes.csv] [--out FILE.json]
    python benchmarks/real.py FOLDER... --pretrained WEIGHTS --films 100 200                  the learning curve

FOLDER holds DICOM files and labels.csv, and knows lesions by `masks/`, boxes.csv or the challenge's own masks of SIIM_SMALL
(`lesion_mask`); all folders together are split into five folds by patient. Each fold's network is trained by `train_learner` on the
other four. Everything is out of fold: a film's score, its heatmaps, the prior (lesions of the training side), and the layer and method
that are chosen for it: "chosen" by lesions that its network was trained on (`choose_layer`), "cross-validated" by
those of the other folds on out-of-fold maps. In Colab: `path = siim_small()`, then this script on that folder."""
import argparse, json, os, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
import numpy as np, pandas as pd, torch
from fastai.vision.augment import Flip
from sklearn.model_selection import StratifiedGroupKFold

from dicomcam.batches import XrayTfm
from dicomcam.choice import CANDIDATES, choose_layer, late_stages, training_prior
from dicomcam.data import lesion_mask
from dicomcam.files import plain_progress
from dicomcam.gradcam import gradcam
from dicomcam.intervals import interval, mean_interval, paired_difference, patient_resamples, roc_area, roc_counts
from dicomcam.labels import label_table
from dicomcam.localize import measures_by_image
from dicomcam.read import read_dicom
from dicomcam.results import class_scores, predictions
from dicomcam.tables import read_table
from dicomcam.training import train_learner

MEASURES = 'pointing', 'mass', 'auprc'

# --- data ---

def films_of(folders, k, seed):
    "All films: file, label, patient, view, fold."
    df = pd.concat([label_table(folder, by='PatientID') for folder in folders], ignore_index=True)
    df['view'] = [str(read_dicom(file, pixels=False).get('ViewPosition', '')) for file in df.file]
    folds = StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(df, df.label, df.group)
    for fold, (_, held_back) in enumerate(folds): df.loc[held_back, 'fold'] = fold
    return df.rename(columns=dict(group='patient')).astype(dict(fold=int))

def boxes_of(folders, names):
    "File -> boxes (x, y, width, height), of tables that the package does not look for by itself."
    boxes = {}
    for fn in (Path(folder)/name for folder in folders for name in names):
        if not fn.is_file(): continue
        for row in read_table(fn).itertuples():
            box = [float(getattr(row, o)) for o in ('x', 'y', 'width', 'height')]
            boxes.setdefault(Path(os.path.abspath(fn.parent/row.file)), []).append(box)
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

# --- one fold ---

def weighted(h, prior): return [h, h.times(prior)] if prior else [h]

def maps_of(learn, files, masks, positive, layers, prior):
    "Measures of all methods, layers and baselines; index: file, columns: map, layer, measure."
    values = []
    for start in range(0, len(files), 8): # maps of 1024 x 1024 are large
        part, drawn = files[start:start+8], masks[start:start+8]
        hs = [o for method in CANDIDATES for o in weighted(gradcam(learn, part, positive, layers, method), prior)]
        exact = measures_by_image(hs, drawn, positive, grow=0, measures=MEASURES, prior=prior)
        near = measures_by_image(hs, drawn, positive, measures=['pointing'], prior=prior)
        near.columns = near.columns.set_levels(['pointing_3%'], level='measure')
        values.append(pd.concat([exact, near], axis=1).set_axis(part))
    return pd.concat(values)

def add_chosen(values, choice):
    "The chosen layer and method once more, under a name that all folds share."
    names = {'chosen': choice['method'], 'chosen x prior': f'{choice["method"]} x prior'}
    extra = {(name, ''): values[method, choice['layer']] for name, method in names.items() if method in values}
    return pd.concat([values, pd.concat(extra, axis=1, names=values.columns.names)], axis=1)

def run_fold(fold, films, lesion, recipe, flip, n_films, threads, seed):
    "Train on the other folds; scores and measures of this one, and what was chosen."
    torch.set_num_threads(threads)
    plain_progress()
    start, other = time.monotonic(), films.fold != fold
    if n_films: other &= films.index.isin(films[other].sample(frac=1, random_state=seed).index[:n_films])
    here = films[other | (films.fold == fold)]
    table = here[['file', 'label']].assign(fold=(here.fold == fold).astype(int), file=here.file.astype(str))
    data = dict(labels=table, fold=1) | (dict(batch_tfms=[XrayTfm(), Flip()]) if flip else {})
    learn = train_learner(os.path.commonpath(films.file.tolist()), seed, data=data, **recipe)
    positive = learn.dls.vocab[-1]
    df = predictions(learn)
    trained = round(time.monotonic()-start)
    res = dict(fold=fold, scores=dict(zip(df.file, class_scores(df)[positive])), train_seconds=trained, values=None)
    known = {} if n_films else {file: mask for file in df.file if (mask := lesion(file)) is not None}
    if known:
        choice = choose_layer(learn, mask_of=lesion)
        prior = training_prior(learn, mask_of=lesion)
        layers = list(dict.fromkeys([*late_stages(learn), choice['layer']]))
        values = maps_of(learn, list(known), list(known.values()), positive, layers, prior)
        res |= dict(values=add_chosen(values, choice), choice=choice)
    return res | dict(seconds=round(time.monotonic()-start))

# --- all folds ---

def auc(films, resamples=2000):
    "ROC AUC with its interval by patient."
    y = (films.label == max(films.label.unique())).to_numpy()
    weights = patient_resamples(films.patient.to_numpy(), resamples, 42)
    return interval(roc_area(*roc_counts(y, films.score.to_numpy(), weights))) | dict(n=len(films))

def share(values, group):
    "Mean with its interval by patient."
    mean, low, high = mean_interval(values.to_numpy(), group=group)
    return dict(value=float(mean), low=float(low), high=float(high), n=len(values))

def best_elsewhere(values, maps, measure):
    "Map and layer that score best on these films, ties by mass."
    means = values.loc[:, [o for o in values.columns if o[0] in maps]].mean().unstack('measure')
    return means.sort_values([measure, 'mass'], ascending=False).index[0]

def add_cross_validated(values, fold, found):
    """For the films of each fold the map and layer that scored best on the found lesions of the other folds, whose maps are out of fold
    too: by pointing, and weighted with the prior by pixel AUPRC. A fold's own lesions have no say. Also what was taken in each fold."""
    columns, taken = [], []
    for name, measure in {'': 'pointing', ' x prior': 'auprc'}.items():
        maps, parts = [f'{o}{name}' for o in CANDIDATES], []
        for k in sorted(fold.unique()):
            best = best_elsewhere(values[(fold != k) & found], maps, measure)
            parts.append(values.loc[fold == k, best])
            taken.append(dict(fold=int(k), map=best[0], layer=best[1], by=measure))
        columns.append(pd.concat({(f'cross-validated{name}', ''): pd.concat(parts)}, axis=1, names=values.columns.names))
    return pd.concat([values, *columns], axis=1), taken

def localized(values, patient, found):
    "All maps and measures, on all lesions and on the found; what is compared pair by pair."
    sets = dict(all=values.index, found=values.index[found])
    table, pairs = [], []
    for name, files in sets.items():
        part, group = values.loc[files], patient[files].to_numpy()
        table += [dict(films=name, map=m, layer=layer, measure=what, **share(part[m, layer, what], group)) for m, layer, what in part]
        for a in ('chosen', 'chosen x prior', 'cross-validated', 'cross-validated x prior'):
            for b in 'prior', 'centre', 'edges', 'noise':
                if not {a, b} <= set(part.columns.get_level_values('map')): continue
                for what in part[a, ''].columns:
                    difference = paired_difference(part[a, '', what].to_numpy(), part[b, '', what].to_numpy(), group)
                    pairs.append(dict(films=name, map=a, less=b, measure=what, **difference))
    return pd.DataFrame(table), pd.DataFrame(pairs)

def run_folds(args, films, lesion, recipe, n_films=None):
    "What `run_fold` says of each fold."
    threads = max(1, (os.cpu_count() or 1)//args.jobs)
    one = partial(run_fold, films=films, lesion=lesion, recipe=recipe, flip=args.flip, n_films=n_films,
        threads=threads, seed=args.seed)
    if args.jobs == 1: return [one(fold) for fold in range(args.folds)]
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) as pool: return list(pool.map(one, range(args.folds)))

def show(rows, index, columns):
    "Rows with value, low and high as a table of 'value (low to high)'."
    df = pd.DataFrame(rows)
    df['text'] = [f'{o.value:.3f} ({o.low:.3f} to {o.high:.3f})' for o in df.itertuples()]
    print(df.pivot_table('text', index, columns, 'first', sort=False).to_string(), end='\n\n')

def main(args):
    start = time.monotonic()
    folders = [Path(os.path.abspath(o)) for o in args.folders]
    films = films_of(folders, args.folds, args.seed)
    lesion = partial(mask_of, folders=folders, boxes=boxes_of(folders, args.boxes))
    recipe = dict(pretrained=args.pretrained) if args.pretrained else {}
    recipe |= json.loads(args.recipe)
    res = dict(films=len(films), patients=films.patient.nunique(), seed=args.seed, recipe=recipe, flip=args.flip)
    for n in args.films:
        for fold in run_folds(args, films, lesion, recipe, n): films.loc[films.file.isin(fold['scores']), 'score'] = films.file.map(fold['scores'])
        res.setdefault('learning_curve', []).append(dict(trained_on=n, **auc(films)))
        print('trained on', n, auc(films), flush=True)
    folds = run_folds(args, films, lesion, recipe)
    for fold in folds: films.loc[films.fold == fold['fold'], 'score'] = films.file.map(fold['scores'])
    views = {view: auc(o) for view, o in films.groupby('view') if o.label.nunique() == 2}
    res |= dict(auc=auc(films), auc_of_view=views, train_seconds=[o['train_seconds'] for o in folds], choices=[o.get('choice') for o in folds])
    print(f'{len(films)} films, {res["patients"]} patients, {args.folds} folds')
    show([dict(of='all films', **res['auc']), *(dict(of=f'view {k}', **v) for k, v in views.items())], 'of', 'n')
    for fold in folds: print(f'fold {fold["fold"]}:', fold.get('choice'))
    values = [o['values'] for o in folds if o['values'] is not None]
    if values:
        values = pd.concat(values)
        known = films.set_index('file').loc[values.index]
        found = known.score >= .5
        values, taken = add_cross_validated(values, known.fold, found)
        if args.values: values.to_pickle(args.values)
        print(pd.DataFrame(taken).to_string(index=False))
        table, pairs = localized(values, known.patient, found.to_numpy())
        res |= dict(cross_validated=taken, localization=table.to_dict('records'), differences=pairs.to_dict('records'))
        for name in 'all', 'found':
            print(f'\nlesions: {name}, {table[table.films == name].n.iloc[0]} films')
            show(table[table.films == name], ['map', 'layer'], 'measure')
            show(pairs[pairs.films == name], ['map', 'less'], 'measure')
    res['seconds'] = round(time.monotonic()-start)
    print(res['seconds'], 'seconds')
    if args.out: Path(args.out).write_text(json.dumps(res, indent=2))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folders', nargs='+')
    p.add_argument('--pretrained', help='file of weights; without it, as `default_recipe` has it')
    p.add_argument('--recipe', default='{}', help='JSON: other arguments for train_learner')
    p.add_argument('--flip', action='store_true', help='train on mirror images too, and always on augmented ones')
    p.add_argument('--boxes', nargs='*', default=[], help='further tables of boxes in FOLDER')
    p.add_argument('--films', nargs='*', type=int, default=[], help='also train on so many films only')
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--jobs', type=int, default=1, help='folds at a time')
    p.add_argument('--values', help='pickle to write: measures of each film')
    p.add_argument('--out', help='JSON file to write')
    main(p.parse_args())
