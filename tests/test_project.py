"What holds the project together: README and modules in step with the notebooks, light imports, a complete wheel."
import ast, importlib.util, json, os, re, shutil, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import nbformat, pytest

root = Path(__file__).resolve().parent.parent
env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}

bin = Path(sys.executable).parent # where this environment's commands are

def run(*args, **kw): return subprocess.run(args, capture_output=True, text=True, cwd=root, env=env, **kw)

def test_readme_is_the_index_notebook():
    r = run(sys.executable, 'tools/readme.py', '--check')
    assert r.returncode == 0, r.stderr

def test_modules_are_the_notebooks(tmp_path):
    "Exporting the notebooks again gives the modules as they are"
    for o in ('nbs', 'dicomcam', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md'):
        (shutil.copytree if (root/o).is_dir() else shutil.copy)(root/o, tmp_path/o)
    subprocess.run([bin/'nbdev-export'], cwd=tmp_path, env=env, check=True, capture_output=True)
    for o in sorted((root/'dicomcam').glob('*.py')):
        assert (tmp_path/'dicomcam'/o.name).read_text() == o.read_text(), f'{o.name} is out of step: run nbdev-export'

def test_notebooks_are_clean(tmp_path):
    "nbdev-clean has nothing to clean"
    copy = shutil.copytree(root/'nbs', tmp_path/'nbs')
    run(bin/'nbdev-clean', '--fname', str(copy), check=True)
    for o in sorted((root/'nbs').rglob('*.ipynb')):
        assert (copy/o.relative_to(root/'nbs')).read_text() == o.read_text(), f'{o.name}: run nbdev-clean'

def test_notebooks_are_light():
    for o in sorted((root/'nbs').rglob('*.ipynb')): assert o.stat().st_size < 2e6, f'{o.name} is over 2 MB'

@pytest.mark.parametrize('module', ['dicomcam', 'dicomcam.data', 'dicomcam.dicom', 'dicomcam.summary', 'dicomcam.cli', 'dicomcam.demo'])
def test_imports_without_fastai(module):
    code = f'import sys, {module}; sys.exit(bool({{"fastai", "torch"}} & set(sys.modules)))'
    assert run(sys.executable, '-c', code).returncode == 0

def test_help_needs_no_fastai():
    r = run(sys.executable, '-X', 'importtime', '-m', 'dicomcam', '--help')
    assert 'torch' not in r.stderr and 'fastai' not in r.stderr

def test_version_is_one():
    import dicomcam
    from importlib.metadata import version
    assert dicomcam.__version__ == version('dicomcam')

def test_citation_is_of_this_version():
    assert f'version: {importlib.import_module("dicomcam").__version__}\n' in (root/'CITATION.cff').read_text()

def test_every_public_name_in_all():
    "`from dicomcam.all import *` gives what every module exports"
    import dicomcam.all as a
    names = [o.stem for o in (root/'dicomcam').glob('*.py') if not o.stem.startswith('_') and o.stem not in ('all', 'cli', 'files', 'text', 'tables', 'solids', 'patients', 'anatomy', 'projection', 'dicom', 'train', 'interpret', 'trust', 'share')]
    for o in names:
        for k in importlib.import_module(f'dicomcam.{o}').__all__: assert hasattr(a, k), f'{o}.{k}'

def test_wheel_and_sdist(tmp_path):
    "The sdist builds, the wheel builds from it, and it has the requirements, the command and nbdev's entry point"
    pytest.importorskip('build', reason='needs the package build')
    r = run(sys.executable, '-m', 'build', '--outdir', str(tmp_path), '.')
    assert r.returncode == 0, r.stdout+r.stderr
    import zipfile
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as z:
        read = lambda end: z.read(next(o for o in z.namelist() if o.endswith(end))).decode()
        meta, entry = read('METADATA'), read('entry_points.txt')
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    for o in cfg['DEFAULT']['requirements'].split(): assert f'Requires-Dist: {o}' in meta, o
    assert 'dicomcam = dicomcam.__main__:run' in entry and 'dicomcam = dicomcam._modidx:d' in entry
    assert 'Requires-Python: >=3.11' in meta and 'Provides-Extra: codecs' in meta
    assert tomllib.loads((root/'pyproject.toml').read_text())['project']['description'] in meta

@pytest.mark.parametrize('fn', [o for o in sorted((root/'nbs').rglob('*.ipynb')) if '#| default_exp' in o.read_text(encoding='utf-8')], ids=lambda o: o.stem)
def test_docs_can_be_built(fn):
    "For the docs, nbdev runs each cell that imports something or is exported, and no other: what else stands in such a cell would miss what it needs"
    for c in json.loads(fn.read_text(encoding='utf-8'))['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or re.search(r'^#\|\s*(export|eval: false)', src, re.M): continue
        nodes = ast.parse(re.sub(r'^\s*[%!].*', '', src, flags=re.M))
        imports = [o for o in ast.walk(nodes) if isinstance(o, (ast.Import, ast.ImportFrom))]
        assert not imports or all(o in imports for o in nodes.body), src

def loaded(fn):
    "A script as a module; the tests' own environment has no nox"
    nox = SimpleNamespace(options=SimpleNamespace(), session=lambda **kw: lambda f: f)
    spec = importlib.util.spec_from_file_location(Path(fn).stem, root/fn)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'nox', nox)
        spec.loader.exec_module(module)
    return module

def test_colab_gets_what_the_lessons_install(tmp_path):
    "`nox -s colab` installs the extras of the lessons' own %pip lines, and no others"
    extras = loaded('noxfile.py').lesson_extras
    assert extras(root/'nbs').split(',') == ['dicom', 'network', 'timm']
    (tmp_path/'a.ipynb').write_text(json.dumps('%pip install -q dicomcam\n%pip install -q "dicomcam[xrv,dask]"'))
    assert extras(tmp_path) == 'dask,xrv'

def test_no_lesson_passes_without_its_extra():
    "A lesson that leaves out its cells because an extra is missing says so in words that save_outputs.py takes for a failure"
    left_out = loaded('tools/save_outputs.py').left_out
    leaving = [o for o in sorted((root/'nbs').glob('*.ipynb')) if 'input_transformers_cleanup' in o.read_text()]
    assert [o.stem for o in leaving] == ['13_share', '14_network']
    for fn in leaving:
        nb = nbformat.read(fn, 4)
        assert not left_out(nb), f'{fn.name} is saved without what its cells show'
        cell, = [c for c in nb.cells if 'input_transformers_cleanup' in c.source]
        said = re.search(r"print\('(.*)'\)", cell.source)[1]
        cell.outputs = [nbformat.v4.new_output('stream', text=said+'\n')]
        assert left_out(nb) == [said]

def test_a_name_in_the_docs_leads_to_one_room():
    "Where two modules export one name, links of the docs lead to either"
    from dicomcam._modidx import d
    names = [o.split('.')[2] for syms in d['syms'].values() for o in syms if o.count('.') == 2]
    assert not {o for o in names if names.count(o) > 1 and not o.startswith('_')}
