"""Do healthy films stay dark, and lesions lit? python benchmarks/scale.py [seed ...] [--calibrate 201 202 203] [--judges 11 21 31]

For each training seed a network learns its phantom. Method, layer and scale are chosen on that phantom alone, as `dicomcam demo` does, or,
with `--calibrate`, on other phantoms that the network has not seen. Then films of the judging phantoms are looked at, once, at the threshold
of the scale. A lesion is lit if a region at or above the threshold touches it; `peak`: if the region's brightest point lies in it; `elsewhere`:
the same regions against the mirror image of the lesion, as a measure of luck. `pointing`: the brightest point of the map, over the lesions
that the network found, on the network's pixels with 3 % of tolerance, and `ahead` of the best baseline, paired. `misses left`: of the maps
that miss, the share that is still read where the least trusted fifth of the found lesions is not; trust is how far the same method at the
other of the last four stages confirms the brightest point. Last come all networks together, a patient's films as one. Intervals are by patient.

`--models DIR` takes DIR/s<seed>/model.safetensors, as `dicomcam demo` writes it, in place of a training; `--save DIR` writes the models with
what was chosen on other phantoms, which another run takes as they are; `--phantoms DIR` keeps the phantoms there, and not in the cache."""
import argparse, warnings
from pathlib import Path

import cv2, numpy as np, pandas as pd

from dicomcam.all import (Heatmaps, abstain, abstention, attribute, calibrate, choose_layer, choose_scale, dicom_dls, froc, joined,
    label_table, late_stages, layer_by_layer, lesion_mask, lesion_prior, load_model, mean_interval, measures_by_image, paired_difference,
    phantom, save_model, shown_by, train_learner, trust_signals)

CLS = 'Pneumothorax'

def films(seed, args):
    "Labels and patients of a phantom's films, each with its lesion."
    path = phantom(args.phantoms and args.phantoms/f'ph{seed}', n=args.n, seed=seed, n_jobs=args.n_jobs, progress=False)
    table = label_table(path)
    return table.assign(group=[f'{seed} {o}' for o in table.group], mask=[lesion_mask(path, o) for o in table.file])

def learner(seed, args):
    "A network of the phantom of that seed, and what its heatmaps are made by."
    saved = args.models and args.models/f's{seed}/model.safetensors'
    learn = load_model(saved) if saved else train_learner(phantom(seed=seed), seed)
    if args.calibrate:
        t = pd.concat([films(o, args) for o in args.calibrate])
        calibrate(learn, t.file.tolist(), t.label, t['mask'].tolist(), CLS, t.group)
    elif not learn.heat_scale:
        if saved: learn = load_model(saved, dicom_dls(phantom(seed=seed), size=144, seed=seed))
        choose_layer(learn, phantom(seed=seed))
        choose_scale(learn)
    if args.save:
        fn = args.save/f's{seed}/model.safetensors'
        fn.parent.mkdir(parents=True, exist_ok=True)
        save_model(learn, fn)
    return learn

def maps_of(learn, table):
    "Maps of a phantom's films, as the scale has them, and those of the other late stages."
    method, _ = shown_by(learn)
    return attribute(learn, table.file.tolist(), learn.heat_scale.cls, late_stages(learn), method, learn.heat_scale.smooth)

def trust_of(h, scale):
    "How far the other late stages confirm each map."
    shown, *others = sorted(layer_by_layer(h), key=lambda o: o.layers != [scale.layer])
    return trust_signals([shown, *others], scale.cls).confirmed

def interval(value, low, high, n=2): return f'{value:.{n}f} ({low:.{n}f} to {high:.{n}f})'

def on_the_scale(scale, h, masks, group):
    "What is lit of lesions and of healthy films."
    row, mirrored = {}, [o if o is None else np.fliplr(o) for o in masks]
    for name, hit, where in ('lit', 'touch', masks), ('peak', 'peak', masks), ('elsewhere', 'touch', mirrored):
        t = froc(h, where, scale.cls, scale.layer, group, [scale.threshold], hit).iloc[0]
        row[name] = interval(t.sensitivity, t.low, t.high)
        if name == 'lit': false = interval(t.fp_healthy, t.fp_low, t.fp_high, 3), interval(1-t.lit, 1-t.lit_high, 1-t.lit_low, 3)
    return row | {'false regions': false[0], 'healthy dark': false[1], 'lesions': int(t.lesions), 'healthy': int(t.healthy)}

def small(mask, side): return cv2.resize(255*mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA) > 127

def pointing(learn, h, masks, prior):
    "Of each found lesion: does the map, does each baseline point at it?"
    scale, side = learn.heat_scale, h.images.shape[-1]
    at_input = Heatmaps(h.raw, h.images, h.probs, h.classes, h.layers, h.method, vocab=h.vocab)
    found = [None if m is None or p < .5 else small(m, side) for m, p in zip(masks, h.probs[:, h.cls(0, scale.cls)].tolist())]
    values = measures_by_image(at_input, found, scale.cls, scale.layer, measures=('pointing',), prior=prior)
    return values.droplevel(['layer', 'measure'], axis=1)

def pointed(values, group):
    "The pointing game, and how far the map is ahead of the best baseline; `prior` knows the judged lesions themselves."
    values = values.rename(columns={values.columns[0]: 'map'})
    mine, *others = values.columns
    best = max(others, key=lambda o: values[o].mean())
    ahead = paired_difference(values[mine], values[best], group)
    return {'pointing': interval(*mean_interval(values[mine].to_numpy(), group=group, hits=True)), 'found': len(values),
        'ahead': f'of {best} by {interval(ahead["value"], ahead["low"], ahead["high"])}, p = {ahead["p"]:.4f}'}

def judged(learn, args):
    "A row for each judging phantom, and one for all of them."
    tables = [films(o, args) for o in args.judges]
    maps = [maps_of(learn, t) for t in tables]
    if len(tables) > 1: tables, maps = [*tables, pd.concat(tables, ignore_index=True)], [*maps, joined(maps)]
    prior = lesion_prior(tables[-1]['mask'])
    for judge, t, h in zip([*args.judges, 'all'], tables, maps):
        masks, group = t['mask'].tolist(), t.group.to_numpy()
        values = pointing(learn, h, masks, prior)
        group = group[values.index]
        found = values.set_axis(['map', *values.columns[1:]], axis=1).assign(group=group, trust=trust_of(h, learn.heat_scale)[values.index])
        yield dict(judge=judge, **on_the_scale(learn.heat_scale, h, masks, t.group.to_numpy()), **pointed(values, group), **left(found)), found

def left(found):
    "Which share of the maps that miss is still read, if the least trusted fifth of all is not."
    trust = found.trust.to_numpy()
    o = abstention((found['map'] >= .5).to_numpy(), abstain(trust, trust), found.group.to_numpy()).loc['misses left']
    return {'misses left': f'{interval(o.value, o.low, o.high)} of {o.n:.0f}'}

def all_networks(found):
    "All networks together: the map against each baseline, and what abstention leaves."
    found = pd.concat(found, ignore_index=True)
    baselines = [o for o in found if o not in ('map', 'group', 'trust')]
    ahead = {o: paired_difference(found['map'].to_numpy(), found[o].to_numpy(), found.group.to_numpy(), hits=True) for o in baselines}
    hits = mean_interval(found['map'].to_numpy(), group=found.group.to_numpy(), hits=True)
    print(f'all networks: pointing {interval(*hits)} of {len(found)}', *(f'ahead of {o} by {interval(d["value"], d["low"], d["high"])}, '
        f'p = {d["p"]:.4f}' for o, d in ahead.items()), f'misses left {left(found)["misses left"]}', sep='; ')

def main(args):
    rows, every = [], []
    for seed in args.seeds:
        with warnings.catch_warnings(action='ignore'): learn = learner(seed, args)
        scale = learn.heat_scale
        print(f'seed {seed}: {scale.method}, layer {scale.layer}, {scale.healthy} healthy patients, {scale.ill} ill; {scale}; {learn.choice["reason"]}',
            flush=True)
        for row, found in judged(learn, args) if args.judges else ():
            rows.append(dict(trained=seed, **row))
            print('; '.join(f'{k} {v}' for k, v in rows[-1].items()), flush=True)
        if args.judges: every.append(found) # of all judges
    print(pd.DataFrame(rows).to_string(index=False))
    if every: all_networks(every)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('seeds', nargs='*', type=int, default=[1, 2, 3])
    p.add_argument('--calibrate', nargs='*', type=int, help='Seeds of the phantoms by which map and scale are chosen.')
    p.add_argument('--judges', nargs='*', type=int, default=[11, 21, 31], help='Seeds of the phantoms that judge.')
    p.add_argument('--n', type=int, default=100, help='Films of each of them.')
    p.add_argument('--models', type=Path)
    p.add_argument('--save', type=Path)
    p.add_argument('--phantoms', type=Path)
    p.add_argument('--n-jobs', type=int, default=-1)
    main(p.parse_args())
