"""The main job, several times over: python benchmarks/demo.py [seed ...] [--data FOLDER]

Runs `dicomcam demo` for each seed (of the phantom, the split and the training) and prints ROC AUC on the
validation patients, and how often the heatmap's brightest pixel lies in the lesion of those correctly found, beside what the image
centre would score."""
import argparse, tempfile
from pathlib import Path

import pandas as pd

from dicomcam.cli import run_demo

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('seeds', nargs='*', type=int, default=[1, 2, 3])
p.add_argument('--data', default='phantom')
args = p.parse_args()

rows = []
for seed in args.seeds:
    with tempfile.TemporaryDirectory() as out: m = run_demo(args.data, Path(out)/'demo', seed)
    row = dict(seed=seed, **{k: round(m[k]['value'], 3) for k in ('auc', 'accuracy', 'sensitivity', 'specificity')}, seconds=m['seconds']['total'])
    for k, v in m['heatmaps'].get('pointing_game', {}).items(): row[f'pointing {k}'] = f'{v["value"]:.2f} of {v["n"]}'
    rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False), flush=True)
