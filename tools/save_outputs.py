"""Run notebooks at full size in a clean kernel and save what they show: python tools/save_outputs.py [nbs/03_train.ipynb ...]

Without arguments all of them, index last. Then nbdev-clean removes counts and metadata, and tools/readme.py renews README.md.
`nbdev-test` runs the same cells on small data and saves nothing."""
import os, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

root = Path(__file__).resolve().parent.parent
os.environ.pop('IN_TEST', None)

def run(fn):
    "Execute one notebook in place; on an error nothing is written"
    nb, start = nbformat.read(fn, 4), time.time()
    for c in nb.cells:
        if '#| eval: false' in c.source: c.metadata['tags'] = ['skip-execution']
    NotebookClient(nb, timeout=3600, kernel_name='python3', coalesce_streams=True, resources={'metadata': {'path': str(root/'nbs')}}).execute()
    nbformat.write(nb, fn)
    nbdev_clean.__wrapped__(fname=str(fn))
    print(f'{fn.name}: {time.time()-start:.0f} s', flush=True)

if __name__ == '__main__':
    fns = [Path(o) for o in sys.argv[1:]] or sorted((root/'nbs').glob('*.ipynb'), key=lambda o: (o.stem == 'index', o.name))
    for fn in fns: run(fn)
    if any(o.stem == "index" for o in fns): subprocess.run([sys.executable, root/'tools'/'readme.py'], check=True)
