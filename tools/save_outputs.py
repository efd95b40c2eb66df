"""Run notebooks in a clean kernel, at full size, and save what they show.

    python tools/save_outputs.py [--check] [nbs/05_training.ipynb ...]

Without names all of them, the overview last. Then nbdev-clean removes counts and metadata, and tools/readme.py renews
README.md. `--check` saves nothing and needs no nbdev; with IN_TEST=1 in the environment it runs on small data, as
nbdev-test does."""
import argparse, os, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

root = Path(__file__).resolve().parent.parent

def notebooks():
    "Lessons, then the library's, then the overview."
    lessons = sorted(o for o in (root/'nbs').glob('*.ipynb') if o.stem != 'index')
    return [*lessons, *sorted((root/'nbs'/'api').glob('*.ipynb')), root/'nbs'/'index.ipynb']

def left_out(nb):
    "What a lesson says that lacks an extra and therefore leaves its cells out"
    texts = [o.get('text', '') for c in nb.cells for o in c.get('outputs', [])]
    return [o.strip() for o in texts if 'the cells below do nothing' in o]

def run(fn):
    "The notebook with its outputs. On an error, and where an extra is missing, nothing is written."
    nb = nbformat.read(fn, 4)
    for c in nb.cells:
        if '#| eval: false' in c.source: c.metadata['tags'] = ['skip-execution']
    where = {'metadata': {'path': str(Path(fn).resolve().parent)}}
    NotebookClient(nb, timeout=3600, kernel_name='python3', coalesce_streams=True, resources=where).execute()
    if left_out(nb): raise SystemExit(f'{fn}: {left_out(nb)[0]}')
    return nb

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', type=Path)
    p.add_argument('--check', action='store_true', help='run, and save nothing')
    args = p.parse_args()
    fns = args.notebooks or notebooks()
    if not args.check:
        from nbdev.clean import nbdev_clean
        os.environ.pop('IN_TEST', None)
    # torch warns of torch.jit.script where fastai is imported: nothing that a reader can mend
    os.environ['PYTHONWARNINGS'] = 'ignore::FutureWarning:torch.jit._script'
    for fn in fns:
        start = time.time()
        nb = run(fn)
        if not args.check:
            nbformat.write(nb, fn)
            nbdev_clean.__wrapped__(fname=str(fn))
        print(f'{fn.name}: {time.time()-start:.0f} s', flush=True)
    overview = any(o.resolve() == root/'nbs'/'index.ipynb' for o in fns)
    if overview and not args.check: subprocess.run([sys.executable, root/'tools'/'readme.py'], check=True)
