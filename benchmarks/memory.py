"""Peak memory of heatmaps by the number of films: does anything grow besides what is asked for?

    python benchmarks/memory.py [--films 200 2000] [--size 64] [--only batches joined explain report resamples] [--repeats 3]

The films are a small phantom's, each under many names and of a patient of its own; the network is an xresnet18 that has learnt
nothing. "batches" is `gradcam(..., batches=True)` with nothing kept, "joined" is `gradcam` with all in one, beside it the size of
its raw maps and of its images; "explain" and "report" are the commands; "resamples" is what a report's intervals take without
any network, a weight for each film in each of 1,000 draws. Each runs in a process of its own, `--repeats` times, whose smallest peak
(ru_maxrss, of Linux) is shown in MB, beside what is above that at 20 films. glibc has one arena there: with one for each thread, the
same run differs by tens of MB."""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd

def write_films(folder, n, seed=0):
    "`n` films with labels.csv."
    from dicomcam.labels import label_table
    from dicomcam.phantom import phantom
    from pydicom import dcmread
    few = label_table(phantom(folder/'few', n=20, size=64, seed=seed, progress=False))
    rows, sources = [], [dcmread(o) for o in few.file]
    for k in range(n):
        ds, label = sources[k % len(few)], few.label[k % len(few)]
        ds.PatientID, ds.SOPInstanceUID = str(k), f'1.2.3.{k}'
        to = folder/'train'/f'{k:05}.dcm'
        to.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(to)
        rows.append(dict(file=f'train/{k:05}.dcm', label=label))
    pd.DataFrame(rows).to_csv(folder/'labels.csv', index=False)

def write_model(folder, size, fn):
    "A network that has learnt nothing."
    from dicomcam.batches import dicom_dls
    from dicomcam.models import save_model
    from dicomcam.networks import dicom_learner
    save_model(dicom_learner(dicom_dls(folder, size=size), 'xresnet18'), fn)

def resamples(n):
    "The counts behind one ROC curve and its band."
    import numpy as np
    from dicomcam.intervals import patient_resamples, roc_counts
    scores = np.random.default_rng(0).random(n)
    roc_counts(scores > .5, scores, patient_resamples(np.arange(n), 1000, 42))

def peak(what, model, folder, n):
    "Do it with `n` films in this process; (peak in MB, MB of raw maps and images that are kept)."
    import resource
    kept = dict(raw=0, images=0)
    files = sorted((folder/'train').glob('*.dcm'))[:n]
    with tempfile.TemporaryDirectory() as d:
        if what == 'resamples': resamples(n)
        elif what in ('explain', 'report'):
            from dicomcam.cli import main
            table = pd.read_csv(folder/'labels.csv')[:n]
            table.to_csv(folder/f'labels{n}.csv', index=False)
            given = [str(o) for o in files] if what == 'explain' else [str(folder), '--labels', f'labels{n}.csv']
            main([what, str(model), *given, '--out', f'{d}/out'], standalone_mode=False)
        else:
            from dicomcam.gradcam import gradcam
            from dicomcam.models import load_model
            h = gradcam(load_model(model), files, layers=-6, batches=what == 'batches')
            if what == 'batches':
                for _ in h: pass
            else: kept = dict(raw=sum(o.nbytes for o in h.raw)/2**20, images=h.images.nbytes/2**20)
    return dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, **kept)

def in_a_process(what, model, folder, n, repeats):
    command = [sys.executable, __file__, '--child', what, str(model), str(folder), str(n)]
    def once():
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | dict(MALLOC_ARENA_MAX='1'))
        return json.loads(done.stdout.splitlines()[-1])
    return min((once() for _ in range(repeats)), key=lambda o: o['peak'])

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--films', type=int, nargs='*', default=[200, 2000])
p.add_argument('--size', type=int, default=64)
p.add_argument('--only', nargs='*', default=['batches', 'joined', 'explain', 'report', 'resamples'])
p.add_argument('--repeats', type=int, default=3)
p.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
args = p.parse_args()

if args.child:
    what, model, folder, n = args.child
    print(json.dumps(peak(what, Path(model), Path(folder), int(n))))
    sys.exit()

with tempfile.TemporaryDirectory() as d:
    folder, model = Path(d), Path(d)/'m.safetensors'
    write_films(folder, max(args.films))
    write_model(folder/'few', args.size, model)
    print('| what | films | peak, MB | above 20 films | raw maps | images |\n|---|---|---|---|---|---|')
    for what in args.only:
        base = in_a_process(what, model, folder, 20, args.repeats)['peak']
        for n in args.films:
            m = in_a_process(what, model, folder, n, args.repeats)
            print(f'| {what} | {n} | {m["peak"]:.0f} | {m["peak"]-base:+.0f} | {m["raw"]:.1f} | {m["images"]:.1f} |', flush=True)
