"""Do healthy films stay dark, and lesions lit? python benchmarks/scale.py [seed ...] [--judges 11 21 31] [--models DIR]

For each training seed a network learns its phantom, and method, layer and scale are chosen on that phantom alone. Then films of
other phantoms are looked at, once, at the threshold of the scale. A lesion is lit if a region at or above the threshold touches it;
`peak`: if the region's brightest point lies in it; `elsewhere`: the same regions against the mirror image of the lesion, as a
measure of luck. `--models DIR` takes DIR/s<seed>/model.safetensors, as `dicomcam demo` writes it, in place of a training."""
import argparse, warnings
from pathlib import Path

import numpy as np, pandas as pd

from dicomcam.all import (attribute, choose_layer, choose_scale, dicom_dls, froc, label_table, lesion_mask, load_model, phantom,
    shown_by, train_learner)

def learner(seed, models):
    "A network of the phantom of that seed, and what its heatmaps are made by."
    path = phantom(seed=seed)
    if models is None: learn = train_learner(path, seed)
    else: learn = load_model(Path(models)/f's{seed}/model.safetensors', dicom_dls(path, size=144, seed=seed))
    if not getattr(learn, 'choice', None): choose_layer(learn, path)
    if not getattr(learn, 'heat_scale', None): choose_scale(learn)
    return learn

def judged(learn, seed, n):
    "What films of another phantom show on the learner's scale: a row."
    table, scale = label_table(phantom(n=n, seed=seed)), learn.heat_scale
    masks = [lesion_mask(phantom(n=n, seed=seed), o) for o in table.file]
    method, layer = shown_by(learn)
    h = attribute(learn, table.file.tolist(), scale.cls, layer, method, scale.smooth)
    row, there = {}, dict(masks=masks, elsewhere=[o if o is None else np.fliplr(o) for o in masks])
    for name, hit, where in ('lit', 'touch', 'masks'), ('peak', 'peak', 'masks'), ('elsewhere', 'touch', 'elsewhere'):
        t = froc(h, there[where], scale.cls, layer, table.group, [scale.threshold], hit).iloc[0]
        row[name] = f'{t.sensitivity:.2f} ({t.low:.2f} to {t.high:.2f})'
        if name == 'lit': false, dark = t.fp_healthy, f'{1-t.lit:.3f} ({1-t.lit_high:.3f} to {1-t.lit_low:.3f})'
    return row | {'false regions': round(false, 3), 'healthy dark': dark, 'lesions': int(t.lesions), 'healthy': int(t.healthy)}

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('seeds', nargs='*', type=int, default=[1, 2, 3])
p.add_argument('--judges', nargs='*', type=int, default=[11, 21, 31], help='Seeds of the phantoms that judge.')
p.add_argument('--n', type=int, default=100, help='Films of each of them.')
p.add_argument('--models')
args = p.parse_args()

rows = []
for seed in args.seeds:
    with warnings.catch_warnings(action='ignore'): learn = learner(seed, args.models)
    for judge in args.judges:
        scale = learn.heat_scale
        rows.append(dict(trained=seed, judge=judge, method=scale.method, layer=scale.layer, threshold=round(scale.threshold, 3),
            **judged(learn, judge, args.n)))
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
