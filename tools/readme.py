"""README.md from nbs/index.ipynb: python tools/readme.py [--check]

nbdev-readme does this with Quarto; this does it with nbconvert, which pip installs. Cells marked `#| hide` or
`#| eval: false` are left out, of `#| echo: false` the output stays, `#| fig-alt:` describes a figure. Figures go to nbs/index_files/. With --check nothing is written: exit status 1 if README.md is not what the
notebook gives."""
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
figures = Path('nbs/index_files')

def prepare(cell):
    "What Quarto makes of the directives of a cell: its figure's description"
    alt = re.search(r'^#\| fig-alt: (.*)$', cell.source, re.M)
    if '#| echo: false' in cell.source: cell.metadata['transient'] = {'remove_source': True}
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    for o in cell.get('outputs', []):
        if 'image/png' in o.get('data', {}): o.data = {'image/png': o.data['image/png']}
        elif 'text/html' in o.get('data', {}): o.data.pop('text/plain', None)
    return [alt[1] if alt else 'a figure' for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]

def render():
    "Text of README.md, and the figures it shows as {path relative to the repository: bytes}"
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith(('#| hide', '#| eval: false'))]
    nb.metadata['language_info'] = {'name': 'python'}
    alts = iter([alt for c in nb.cells for alt in prepare(c)])
    text, res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': str(figures), 'unique_key': 'index'})
    text = re.sub(r'<style.*?</style>\n*', '', text, flags=re.S)
    text = re.sub(r'!\[png\]', lambda _: f'![{next(alts)}]', text)
    text = '\n'.join(o.rstrip() for o in text.splitlines())
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n', res['outputs']

if __name__ == '__main__':
    text, files = render()
    want = {'README.md': text.encode(), **files}
    if '--check' in sys.argv:
        stale = [k for k, v in want.items() if not (root/k).is_file() or (root/k).read_bytes() != v]
        if stale: sys.exit(f'out of step with nbs/index.ipynb: {", ".join(stale)}. Run: python tools/readme.py')
    else:
        for old in (root/figures).glob('*'): old.unlink()
        for k, v in want.items():
            (root/k).parent.mkdir(parents=True, exist_ok=True)
            (root/k).write_bytes(v)
