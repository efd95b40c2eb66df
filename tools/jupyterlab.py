"""Open notebooks in JupyterLab in a real browser, run all their cells, and photograph the result.

    python tools/jupyterlab.py [--out DIR] [--views 3] [--dark] [nbs/01_dicom.ipynb ...]

Takes a picture of a progress bar on the way too. Runs on copies, on small data. All cells are drawn, also those out of
sight, so that no picture is of a place that JupyterLab has not drawn yet. Needs `pip install jupyterlab playwright` and
a chromium (apt install chromium, or playwright install chromium). Exit status 1 if a cell ends in an error, if no image
shows, or if a picture shows no cell."""
import argparse, os, secrets, shutil, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Error, sync_playwright

root = Path(__file__).resolve().parent.parent
PORT = 8899

RUN = '''async fn => { // the notebook's own commands, as the menu gives them
    const app = window.jupyterapp
    const panel = await app.commands.execute('docmanager:open', {path: fn, factory: 'Notebook'})
    await panel.context.ready
    await panel.sessionContext.ready
    panel.content.notebookConfig = {...panel.content.notebookConfig, windowingMode: 'none', scrollPastEnd: false}
    for (const c of panel.content.model.cells)
        if (c.sharedModel.source.startsWith('#| eval: false')) c.sharedModel.source = '' // pip install
    window.ran = false
    app.commands.execute('notebook:run-all-cells').finally(() => { window.ran = true })
}'''

STATE = '''() => {
    const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells]
    const out = cells.flatMap(c => c.type == 'code' ? c.outputs.toJSON() : [])
    const errors = out.filter(o => o.output_type == 'error').map(o => `${o.ename}: ${o.evalue}`)
    return {errors, pictures: out.filter(o => o.data && o.data['image/png']).length}
}'''

SHOWN = '''() => {
    const images = [...document.querySelectorAll(".jp-OutputArea img")]
    return images.filter(o => o.complete && o.naturalWidth).length
}'''
CELLS = '''pane => { // how many cells, with something in them, can be seen
    const seen = pane.getBoundingClientRect()
    const inside = o => { const r = o.getBoundingClientRect(); return r.bottom > seen.top && r.top < seen.bottom }
    return [...pane.querySelectorAll('.jp-Cell')].filter(o => inside(o) && o.innerText.trim()).length
}'''
FIRST_CELL = '''() => {
    window.jupyterapp.shell.collapseLeft()
    window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0
}'''

def serve(folder, token, settings):
    "JupyterLab on a folder, ready to answer; the theme and all else that it keeps go into `settings`"
    options = ['--no-browser', '--allow-root', '--expose-app-in-browser', f'--port={PORT}',
        f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder}']
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, 'IN_TEST': '1', 'JUPYTERLAB_SETTINGS_DIR': settings,
        'JUPYTERLAB_WORKSPACES_DIR': settings})
    for _ in range(120):
        try: urlopen(f'http://127.0.0.1:{PORT}/api?token={token}').close()
        except OSError: time.sleep(.5)
        else: return server
    server.kill()
    sys.exit('JupyterLab did not start within a minute')

def watch(page, name, out, limit):
    "Wait until all cells have run; the most progress bars that showed at once, the first of them photographed"
    most = 0
    end = time.monotonic()+limit
    while not page.evaluate('() => window.ran'):
        if time.monotonic() > end: sys.exit(f'{name}: not at its end after {limit} seconds')
        bars = page.locator('.jp-OutputArea progress:visible')
        now = bars.count()
        if now and not most:
            with suppress(Error): # it may be done by then
                bars.first.scroll_into_view_if_needed(timeout=1000)
                page.screenshot(path=out/f'{name}-bar.png')
        most = max(most, now)
        page.wait_for_timeout(200)
    return most

def photograph(page, name, out, views):
    "Pictures from the top to the end, evenly spread; how many of them show nothing"
    pane, blank = page.locator('.jp-WindowedPanel-outer:visible').first, 0
    for k in range(views):
        pane.evaluate('(o, at) => o.scrollTo(0, at*(o.scrollHeight-o.clientHeight))', k/max(views-1, 1))
        page.wait_for_timeout(700)
        page.screenshot(path=out/f'{name}-{k}.png')
        blank += not pane.evaluate(CELLS)
    return blank

def look(page, fn, args):
    "Run one notebook; how it ended"
    page.evaluate(RUN, fn.name)
    bars = watch(page, fn.stem, args.out, args.limit)
    page.evaluate(FIRST_CELL)
    state = page.evaluate(STATE)
    blank = photograph(page, fn.stem, args.out, args.views)
    return {**state, 'progress bars': bars, 'shown': page.evaluate(SHOWN), 'blank': blank}

def open_page(browser, token, dark):
    "JupyterLab in a new page, ready"
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.goto(f'http://127.0.0.1:{PORT}/lab?token={token}&reset', timeout=120000)
    page.wait_for_function('() => window.jupyterapp && window.jupyterapp.shell', timeout=120000)
    page.evaluate('() => window.jupyterapp.restored')
    page.add_style_tag(content='.Toastify { display: none }') # the question about news lies over the cells
    if dark: page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    return page

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', type=Path)
    p.add_argument('--out', type=Path, default=Path('screenshots'))
    p.add_argument('--limit', type=int, default=600, help='seconds for one notebook')
    p.add_argument('--views', type=int, default=3, help='pictures of one notebook')
    p.add_argument('--dark', action='store_true', help='in the dark theme')
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    fns = args.notebooks or sorted(o for o in (root/'nbs').glob('*.ipynb') if o.stem != 'index')
    token = secrets.token_hex(16)
    bad = 0
    temporary = tempfile.TemporaryDirectory
    with temporary() as folder, temporary() as settings, sync_playwright() as pw:
        for fn in {o for fn in fns for o in (fn, *fn.parent.glob('*.json'))}: shutil.copy(fn, folder)
        server = serve(folder, token, settings)
        browser = pw.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        try:
            for fn in fns:
                page = open_page(browser, token, args.dark)
                state = look(page, fn, args)
                print(fn.name, state, flush=True)
                bad += bool(state['errors'] or state['blank'] or state['pictures'] and not state['shown'])
                page.close()
        finally:
            browser.close()
            server.terminate()
            server.wait()
    sys.exit(bool(bad))
