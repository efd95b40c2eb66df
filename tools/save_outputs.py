"""Run notebooks in a clean kernel, at full size, and save what they show: python tools/save_outputs.py [--check] [nbs/03_train.ipynb ...]

Without names all of them, index last. Then nbdev-clean removes counts and metadata, and tools/readme.py renews README.md.
`--check` saves nothing and needs no nbdev; with IN_TEST=1 in the environment it runs on small data, as nbdev-test does."""
import argparse, os, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

root = Path(__file__).resolve().parent.parent
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('notebooks', nargs='*', type=Path)
p.add_argument('--check', action='store_true', help='run, and save nothing')
args = p.parse_args()
fns = args.notebooks or sorted((root/'nbs').glob('*.ipynb'), key=lambda o: (o.stem == 'index', o.name))
if not args.check:
    from nbdev.clean import nbdev_clean
    os.environ.pop('IN_TEST', None)

for fn in fns: # on an error nothing of that notebook is written
    nb, start = nbformat.read(fn, 4), time.time()
    for c in nb.cells:
        if '#| eval: false' in c.source: c.metadata['tags'] = ['skip-execution']
    NotebookClient(nb, timeout=3600, kernel_name='python3', coalesce_streams=True, resources={'metadata': {'path': str(root/'nbs')}}).execute()
    if not args.check:
        nbformat.write(nb, fn)
        nbdev_clean.__wrapped__(fname=str(fn))
    print(f'{fn.name}: {time.time()-start:.0f} s', flush=True)
if not args.check and any(o.stem == 'index' for o in fns): subprocess.run([sys.executable, root/'tools'/'readme.py'], check=True)
