"""Open notebooks in JupyterLab in a real browser, run all their cells and photograph the result, and a progress bar on the way: python tools/jupyterlab.py [--out DIR] [nbs/01_dicom.ipynb ...]

Runs on copies, on small data. Needs `pip install jupyterlab playwright` and a chromium (apt install chromium, or playwright install chromium). Exit status 1 if a
cell ends in an error or an image does not show."""
import argparse, os, secrets, shutil, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Error, sync_playwright

root = Path(__file__).resolve().parent.parent
RUN = '''async fn => { // the notebook's own commands, as the menu gives them
    const app = window.jupyterapp, panel = await app.commands.execute('docmanager:open', {path: fn, factory: 'Notebook'})
    await panel.context.ready; await panel.sessionContext.ready
    for (const c of panel.content.model.cells) if (c.sharedModel.source.startsWith('#| eval: false')) c.sharedModel.source = '' // pip install
    window.ran = false; app.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true }) }'''
STATE = '''() => { const n = window.jupyterapp.shell.currentWidget.content, out = [...n.model.cells].flatMap(c => c.type == 'code' ? c.outputs.toJSON() : [])
    return {errors: out.filter(o => o.output_type == 'error').map(o => `${o.ename}: ${o.evalue}`), pictures: out.filter(o => o.data && o.data['image/png']).length} }'''

def serve(folder, port, token):
    "JupyterLab on a folder, ready to answer"
    p = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--expose-app-in-browser', f'--port={port}', f'--IdentityProvider.token={token}',
                          f'--ServerApp.root_dir={folder}'], env={**os.environ, 'IN_TEST': '1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(120):
        try: urlopen(f'http://127.0.0.1:{port}/api?token={token}').close()
        except OSError: time.sleep(.5)
        else: return p
    p.kill(); sys.exit('JupyterLab did not start within a minute')

def look(page, fn, out, limit):
    "Run one notebook; how it ended"
    page.evaluate(RUN, fn.name)
    bars, end = 0, time.monotonic()+limit
    while not page.evaluate('() => window.ran'):
        if time.monotonic() > end: sys.exit(f'{fn}: not at its end after {limit} seconds')
        found = page.locator('.jp-OutputArea progress:visible')
        if (now := found.count()) and not bars:
            with suppress(Error): found.first.scroll_into_view_if_needed(timeout=1000); page.screenshot(path=out/f'{fn.stem}-bar.png') # it may be done by then
        bars = max(bars, now)
        page.wait_for_timeout(200)
    page.evaluate('() => { window.jupyterapp.shell.collapseLeft(); window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0 }')
    state, pane = page.evaluate(STATE) | {'progress bars': bars}, page.locator('.jp-WindowedPanel-outer:visible').first
    for k in range(3): # top, middle, end
        for _ in range(2): # what comes into view is drawn then, and may change the height
            pane.evaluate('(o, k) => o.scrollTo(0, k/2*o.scrollHeight)', k)
            page.wait_for_timeout(700)
        page.screenshot(path=out/f'{fn.stem}-{k}.png')
    state['shown'] = page.evaluate('() => [...document.querySelectorAll(".jp-OutputArea img")].filter(o => o.complete && o.naturalWidth).length')
    return state

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', type=Path)
    p.add_argument('--out', type=Path, default=Path('screenshots'))
    p.add_argument('--limit', type=int, default=600, help='seconds for one notebook')
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    fns, token, port, bad = a.notebooks or sorted((root/'nbs').glob('[0-9]*.ipynb')), secrets.token_hex(16), 8899, 0
    with tempfile.TemporaryDirectory() as d, sync_playwright() as pw:
        for o in fns: shutil.copy(o, d)
        server, browser = serve(d, port, token), pw.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        try:
            for o in fns:
                page = browser.new_page(viewport=dict(width=1280, height=1000))
                page.goto(f'http://127.0.0.1:{port}/lab?token={token}&reset')
                page.wait_for_function('() => window.jupyterapp && window.jupyterapp.shell', timeout=60000)
                page.evaluate('() => window.jupyterapp.restored')
                s = look(page, o, a.out, a.limit)
                print(o.name, s, flush=True)
                bad += bool(s['errors']) or bool(s['pictures'] and not s['shown'])
                page.close()
        finally:
            browser.close(); server.terminate(); server.wait()
    sys.exit(bool(bad))
