"""Every environment that dicomcam promises to run in: nox -s tests-3.12, nox -s lowest, nox -s colab (nox --list: all).

Needs `pip install nox uv`. `DICOMCAM_TEST_DATA=FOLDER` adds the tests on real X-rays. `colab` takes Google's own list
of what is installed there, or the one that is given, and all lessons, or those that are given:
nox -s colab -- constraints.txt nbs/01_dicom.ipynb"""
import re
from pathlib import Path
from urllib.request import urlretrieve

import nox

nox.options.default_venv_backend = 'uv'
nox.options.sessions = ['tests']
COLAB = 'https://raw.githubusercontent.com/googlecolab/backend-info/main/pip-freeze.gpu.txt'
THERE = '''torch torchvision timm fastai fastcore pandas numpy matplotlib pillow scipy scikit-learn scikit-image
    opencv-python safetensors joblib requests click jinja2 ipython ipykernel'''.split()

@nox.session(python=['3.11', '3.12', '3.13'])
def tests(session):
    "The newest dependencies: notebooks and tests"
    session.install('-e', '.[dev]')
    session.run('nbdev-test')
    session.run('pytest', *session.posargs)

@nox.session(python='3.11')
def lowest(session):
    "The oldest dependencies that settings.ini allows"
    # with the fasttransform of that time: fastai before 2.8.11 cannot print a Pipeline of newer ones
    session.install('--resolution', 'lowest-direct', '-e', '.[dev]', 'fasttransform==0.0.2')
    session.run('nbdev-test')
    # mypy would look at the types of NumPy, pandas and OpenCV of that time
    session.run('pytest', '--deselect', 'tests/test_house.py::test_style', *session.posargs)

@nox.session(python='3.11')
def order(session):
    "The tests in random order, and on one core"
    session.install('-e', '.[dev]', 'pytest-randomly')
    session.run('pytest', *session.posargs)
    session.run('taskset', '-c', '0', 'pytest', '-p', 'no:randomly', *session.posargs, external=True)

@nox.session(python='3.11')
def coverage(session):
    "Which lines the tests reach"
    session.install('-e', '.[dev]', 'pytest-cov')
    session.run('pytest', '--cov=dicomcam', '--cov-report=term-missing', *session.posargs)

def frozen(session):
    "What is installed, {package: version}"
    python = ['--python', session.virtualenv.location]
    lines = session.run('uv', 'pip', 'freeze', *python, silent=True, external=True).splitlines()
    return dict(o.split('==') for o in lines if '==' in o)

def colab_pins(text):
    "Colab's list as constraints: local versions (+cu128), direct URLs and its choice of CUDA libraries are not on PyPI"
    lines = [o for o in text.splitlines() if '==' in o and not re.match('cuda|nvidia', o)]
    return '\n'.join(re.sub(r'\+\w+$', '', o) for o in lines)

def lesson_extras(nbs='nbs'):
    "The extras that the lessons install: 13 begins with `%pip install -q \"dicomcam[dicom]\"`"
    asked = [re.findall(r'%pip install.*dicomcam\[([\w,]+)\]', o.read_text('utf-8')) for o in Path(nbs).glob('*.ipynb')]
    return ','.join(sorted({e for found in asked for extras in found for e in extras.split(',')}))

@nox.session(python='3.13')
def colab(session):
    "What Colab has: installing the wheel and the lessons' extras changes none of it, and all lessons run in it"
    given = Path(session.posargs[0]).resolve() if session.posargs else Path(urlretrieve(COLAB)[0])
    tmp = Path(session.create_tmp())
    pins = tmp/'constraints.txt'
    pins.write_text(colab_pins(given.read_text()))
    session.install('-c', pins, *THERE)
    before = frozen(session)
    session.run('uv', 'build', '--wheel', '--out-dir', tmp/'dist', external=True)
    wheel, = (tmp/'dist').glob('dicomcam-*.whl')
    session.install('-c', pins, f'dicomcam[{lesson_extras()}] @ {wheel.resolve().as_uri()}')
    after = frozen(session)
    changed = {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v}
    if changed: session.error(f'installing dicomcam changes what Colab has: {changed}')
    session.install('-c', pins, 'nbclient', 'nbformat')
    lessons = session.posargs[1:] or sorted(str(o) for o in Path('nbs').glob('*.ipynb'))
    session.run('python', 'tools/save_outputs.py', '--check', *lessons, env={'IN_TEST': '1'})

@nox.session(python='3.12')
def jupyterlab(session):
    "The lessons in JupyterLab 4 in a real browser: nox -s jupyterlab -- --out screenshots nbs/01_dicom.ipynb"
    session.install('-e', '.[dev]', 'jupyterlab>=4')
    session.run('python', 'tools/jupyterlab.py', *session.posargs)
