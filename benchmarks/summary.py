"""Files per second of `summarize`, beside fastai's `from_dicoms` and beside a bare loop that reads, parses and decodes; and its memory.

    python benchmarks/summary.py FOLDER [--cores 2] [--rounds 3] [--many 20000]

FOLDER holds JPEG Baseline images. All is measured in one run, in turns, and the ratios are what counts. Prints JSON."""
import argparse, io, json, os, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, pydicom
from joblib import Parallel, delayed
from PIL import Image
from pydicom.encaps import get_frame

from dicomcam.summary import find_dicoms, summarize

FASTAI = '''import sys, time, warnings
warnings.simplefilter('ignore')
sys.modules['gdcm'] = None # it decodes JPEG several times slower than Pillow, and pydicom would prefer it
from dicomcam.summary import find_dicoms
from fastai.basics import L
import fastai.medical.imaging, pandas as pd
fns = L(find_dicoms(sys.argv[1]))
run = lambda o: pd.DataFrame.from_dicoms(o, px_summ=True, progress=False, **eval(sys.argv[2]))
run(fns[:20])
t = time.perf_counter()
assert len(run(fns))==len(fns)
print(len(fns)/(time.perf_counter()-t))'''

def fastai_speed(path):
    "Files per second of fastai in each of its settings, each in a process of its own; None where it does not finish"
    res = {}
    for kw in ('dict(n_workers=0)', 'dict(n_workers=2)', 'dict(n_workers=2, threadpool=True)'):
        try: res[kw] = float(subprocess.run([sys.executable, '-c', FASTAI, str(path), kw], capture_output=True, text=True, check=True, timeout=120).stdout)
        except (subprocess.SubprocessError, ValueError): res[kw] = None
    return res

def bare(fns):
    "Read, parse every element, decode to an array: what no table can do without"
    for fn in fns:
        ds = pydicom.dcmread(io.BytesIO(Path(fn).read_bytes()))
        for tag in ds.keys(): ds[tag].value
        np.asarray(Image.open(io.BytesIO(get_frame(ds.PixelData, 0, number_of_frames=1))))

def speed(f, fns):
    t = time.perf_counter()
    f(fns)
    return len(fns)/(time.perf_counter()-t)

MANY = '''import resource, sys, threading, time, subprocess, os
import pandas as pd
from dicomcam.summary import find_dicoms, summarize
mb = lambda: int(open('/proc/self/statm').read().split()[1])*resource.getpagesize()/1e6
fns = find_dicoms(sys.argv[1])
before,peak,tree = mb(), 0, 0
def watch():
    global peak, tree
    while True:
        peak = max(peak, mb())
        ps = subprocess.run(['ps','-o','rss=,args=','--ppid',str(os.getpid())], capture_output=True, text=True).stdout.splitlines()
        tree = max(tree, mb() + sum(int(o.split()[0]) for o in ps if 'loky' in o)/1e3)
        time.sleep(.2)
threading.Thread(target=watch, daemon=True).start()
t = time.perf_counter()
df = summarize(fns, n_jobs=int(sys.argv[2]), progress=False)
t = time.perf_counter()-t
assert len(df)==len(fns) and df.error.isna().all()
frame = df.memory_usage(deep=True).sum()/1e6
print(dict(files=len(fns), files_per_s=round(len(fns)/t), before_mb=round(before), frame_mb=round(frame), beyond_frame_mb=round(peak-before-frame),
           all_processes_mb=round(tree)))'''

def many(fns, n, cores):
    "Memory on `n` hard links to the files"
    with tempfile.TemporaryDirectory() as d:
        src = [Path(shutil.copy(fn, Path(d)/f'{i:05}.dcm')) for i,fn in enumerate(fns)]
        for i in range(len(src), n): os.link(src[i%len(src)], Path(d)/f'{i:05}.dcm')
        return eval(subprocess.run([sys.executable, '-c', MANY, d, str(cores)], capture_output=True, text=True, check=True).stdout)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder')
    p.add_argument('--cores', type=int, default=2)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--many', type=int, default=20000)
    a = p.parse_args()
    found = find_dicoms(a.folder)
    fns = found*4
    with Parallel(n_jobs=a.cores) as pool:
        def ceiling(fns): pool(delayed(bare)(fns[i::a.cores]) for i in range(a.cores))
        tasks = dict(ceiling=ceiling, summarize=lambda o: summarize(o, n_jobs=a.cores, progress=False),
                     headers=lambda o: summarize(o, pixels=False, n_jobs=a.cores, progress=False))
        for f in tasks.values(): f(fns[:64]) # start the processes
        rounds = [{k: speed(f, fns) for k,f in tasks.items()} for _ in range(a.rounds)]
    theirs = fastai_speed(a.folder)
    best = max(o for o in theirs.values() if o)
    res = {k: round(statistics.median(r[k] for r in rounds)) for k in tasks}
    print(json.dumps(dict(files_per_s=res | dict(fastai=round(best)), fastai_settings=theirs,
        summarize_over_fastai=round(res['summarize']/best, 2),
        summarize_over_ceiling=round(statistics.median(r['summarize']/r['ceiling'] for r in rounds), 2),
        memory=many(found, a.many, a.cores) if a.many else None), indent=1))
