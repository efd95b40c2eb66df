"""Every command is stopped at moments drawn at random: the right status, at most one line, nothing left of it.

DICOMCAM_SIGNALS: how many moments (12); DICOMCAM_SEED: which (0). Moments are shares of how long the command takes here."""
import os, random, signal, subprocess, sys, time
from itertools import cycle
from pathlib import Path

import pytest

pytestmark = [pytest.mark.posix, pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='/proc tells when a process is ready')]

small = ['--arch', 'xresnet18', '--size', '64', '--epochs', '1', '--bs', '4']
STOPPED = b'dicomcam: stopped; nothing half-written is left.\n'
WAYS = dict(ctrl_c=(signal.SIGINT, True), terminal=(signal.SIGHUP, True), kill=(signal.SIGTERM, False), twice=(signal.SIGINT, True))

def as_in_a_terminal():
    "What a shell's background jobs and nohup ignore, this process does not"
    for o in signal.SIGINT, signal.SIGHUP: signal.signal(o, signal.SIG_DFL)

class World:
    "A folder, a model, and a place where nothing may be left."
    def __init__(self, path):
        from dicomcam.phantom import phantom
        self.path, self.took = path, {}
        for o in 'cache', 'tmp', 'work': (path/o).mkdir()
        self.data = phantom(path/'data', n=12, size=64)
        self.env = {**os.environ, 'XDG_CACHE_HOME': str(path/'cache'), 'TMPDIR': str(path/'tmp'), 'OMP_NUM_THREADS': '1',
            'TORCHINDUCTOR_CACHE_DIR': str(path/'cache'/'torch')} # else it lies in TMPDIR, and stays there
        model = path/'model.safetensors'
        self.commands = dict(train=['train', self.data, *small], summary=['summary', self.data], explain=['explain', model, self.data, '--dicom'],
            report=['report', model, self.data, '--cases', 4], demo=['demo', '--data', self.data, *small])
        self.outs = dict(train='m.safetensors', summary='s.csv', explain='maps', report='r.html', demo='out')

    def start(self, name, out=None):
        args = [*self.commands[name], '--out', out or self.outs[name]]
        return subprocess.Popen([sys.executable, '-m', 'dicomcam', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=self.path/'work', env=self.env, start_new_session=True, preexec_fn=as_in_a_terminal)

    def left(self, pid):
        "Names of what should not be there, in no time after the end."
        shm = [o for name in (f'joblib_memmapping_folder_{pid}_*', f'sem.loky-{pid}-*') for o in Path('/dev/shm').glob(name)] # not another process's
        parts = [o for o in self.path.rglob('.*.part')]
        ours = [o for o in (self.path/'tmp').iterdir() if not any(o.glob('_remote_module_*'))] # torch 2.6 leaves those
        return [str(o) for o in [*shm, *parts, *ours, *(self.path/'work').iterdir()]]

def ready(p):
    "Wait until the process listens: before that, it is Python that starts, and not yet dicomcam."
    while p.poll() is None:
        status = dict(o.split(':\t', 1) for o in Path(f'/proc/{p.pid}/status').read_text().splitlines() if ':\t' in o)
        if int(status.get('SigBlk', '0'), 16)>>(signal.SIGINT-1) & 1: return
        time.sleep(.001)

def strike(p, way):
    sig, all_of_them = WAYS[way]
    for again in range(2 if way == 'twice' else 1):
        if again: time.sleep(.02)
        try: (os.killpg if all_of_them else os.kill)(p.pid, sig)
        except ProcessLookupError: pass

def gone(pid):
    "Is no process of the group left? Those that tidy up may take a moment."
    for _ in range(1000):
        try: os.killpg(pid, 0)
        except ProcessLookupError: return True
        time.sleep(.01)
    return False

def faults(world, name, p, out, err):
    "What is wrong with how a command ended."
    whole = world.path/'work'/world.outs[name]
    # of so few films the training makes no scale, and says so, whether it is stopped then or not
    err = b''.join(o for o in err.splitlines(True) if not o.startswith(b'dicomcam: No absolute scale: '))
    if not gone(p.pid): yield 'a process is left'
    if p.returncode == 0:
        if err: yield f'finished, but says {err}'
        if not whole.exists(): yield 'finished without a result'
    elif p.returncode != 130 or err != STOPPED: yield f'status {p.returncode}, {err.decode()}'
    elif whole.exists(): yield 'stopped, but the result is there'
    if whole.exists(): subprocess.run(['rm', '-r', whole], check=True)
    yield from (f'{o} is left' for o in world.left(p.pid))

def stopped_at(world, name, way, share):
    "Stop a command after a share of its time; None: as it says its last line. What is wrong then."
    p, start = world.start(name), time.monotonic()
    try:
        ready(p)
        if share is None:
            while (line := p.stdout.readline()) and world.outs[name].encode() not in line: pass
            world.took[name] = time.monotonic()-start
        else: time.sleep(share*world.took[name])
        strike(p, way)
        out, err = p.communicate(timeout=120)
    finally: p.kill()
    return [f'{name}, {way} at {share}: {o}' for o in faults(world, name, p, out, err)]

@pytest.mark.long
def test_a_signal_at_any_moment(tmp_path):
    world, rng = World(tmp_path), random.Random(int(os.environ.get('DICOMCAM_SEED', 0)))
    train = world.start('train', tmp_path/'model.safetensors')
    assert train.communicate() and train.returncode == 0
    ways, wrong = cycle(WAYS), []
    for name in world.commands: wrong += stopped_at(world, name, next(ways), None) # as it ends; and how long does it take?
    for _, name in zip(range(int(os.environ.get('DICOMCAM_SIGNALS', 12))-len(world.commands)), cycle(world.commands)):
        wrong += stopped_at(world, name, rng.choice(list(WAYS)), rng.random())
    assert wrong == [], '\n'.join(wrong)

# --- at one moment that is hard to meet

WAIT = """import os, signal, sys, time
def wait(): # not one long sleep: a signal that comes as that begins would be heard at its end
    for _ in range(3000): time.sleep(.01)
"""

def run(code, *args, **kw):
    "The command, in a process that runs `code` before. Its status, output and errors."
    code = f'{WAIT}{code}\nfrom dicomcam.__main__ import run\nrun()'
    p = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, timeout=60, preexec_fn=as_in_a_terminal, **kw)
    return p.returncode, p.stdout, p.stderr

DURING = """
import dicomcam.summary
def find_dicoms(folder):
    try: os.kill(os.getpid(), signal.{}); wait()
    except BaseException: raise SystemExit(3) # as some library may have it
dicomcam.summary.find_dicoms = find_dicoms"""

@pytest.mark.parametrize('sig', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_what_was_begun_is_removed_whoever_would_catch_an_exception(tmp_path, sig):
    assert run(DURING.format(sig), 'summary', '.', '--out', tmp_path/'new'/'deep'/'s.csv') == (130, b'', STOPPED)
    assert list(tmp_path.iterdir()) == []

def test_a_signal_while_the_first_module_is_imported(tmp_path):
    (tmp_path/'click.py').write_text(f'{WAIT}os.kill(os.getpid(), signal.SIGINT)\nwait()')
    assert run('', 'summary', '.', env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}'}) == (130, b'', STOPPED)

def test_a_signal_while_all_is_tidied_up_changes_nothing(tmp_path):
    again = 'import dicomcam.files as f\nf.remove_unfinished = lambda old=f.remove_unfinished: (os.kill(os.getpid(), signal.SIGTERM), old())'
    assert run(again+DURING.format('SIGINT'), 'summary', '.', '--out', tmp_path/'s.csv') == (130, b'', STOPPED)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('sig', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_it_is_too_late_once_the_result_takes_its_place(tmp_path, sig):
    "while it is moved, and as the process ends"
    code = f"""
import atexit, dicomcam.files as f, dicomcam.summary as s, dicomcam.text as t
s.find_dicoms, s.summarize = (lambda folder: [1]), lambda *args, **kwargs: __import__('pandas').DataFrame(dict(error=[None]))
def put(part, path, merge): os.kill(os.getpid(), signal.{sig}); time.sleep(.1); part.replace(path)
f._put = put
atexit.register(lambda: (os.kill(os.getpid(), signal.{sig}), time.sleep(.1)))"""
    status, out, err = run(code, 'summary', '.', '--out', tmp_path/'s.csv')
    assert (status, err) == (0, b'') and out.endswith(b's.csv\n') and [o.name for o in tmp_path.iterdir()] == ['s.csv']

def test_what_must_be_ignored_is(tmp_path):
    "nohup, and the background jobs of a script"
    for o in 'SIGHUP', 'SIGINT':
        code = f'signal.signal(signal.{o}, signal.SIG_IGN)\nimport click; main = click.Group.main\n' \
            f'click.Group.main = lambda *args, **kwargs: (os.kill(os.getpid(), signal.{o}), time.sleep(.1), main(*args, **kwargs))'
        assert run(code, '--version')[0] == 0

def test_worker_processes_hear_nothing_from_the_terminal():
    "Not even when multiprocessing has started its first process, after which it unblocks what it had not blocked"
    code = """import click
def main(*args, **kwargs):
    import subprocess
    from multiprocessing import resource_tracker
    resource_tracker.ensure_running()
    held = 'import signal; print(*sorted(o.name for o in signal.pthread_sigmask(signal.SIG_BLOCK, [])))'
    subprocess.run([sys.executable, '-c', held])
click.Group.main = main"""
    assert run(code) == (0, b'SIGHUP SIGINT\n', b'')

# --- where the output goes

def summary(world, out, **kw):
    command = [sys.executable, '-m', 'dicomcam', 'summary', str(world/'data'), '--no-pixels', '--out', str(out)]
    return subprocess.run(command, cwd=world, timeout=60, **kw)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    from dicomcam.phantom import phantom
    path = tmp_path_factory.mktemp('world')
    phantom(path/'data', n=2, size=64)
    return path

@pytest.mark.parametrize('closed', [[0], [1], [2], [0, 1, 2]])
def test_closed_streams(world, tmp_path, closed):
    "No file that is opened takes their numbers, and what is printed gets into none"
    p = summary(world, tmp_path/'s.csv', preexec_fn=lambda: [os.close(o) for o in closed])
    assert p.returncode == 0 and (tmp_path/'s.csv').read_text().count('\n') == 3

def test_nobody_reads_what_is_printed(world, tmp_path):
    "`dicomcam ... | head -1` loses lines, not work"
    r, w = os.pipe()
    os.close(r)
    p = summary(world, tmp_path/'s.csv', stdout=w, stderr=subprocess.PIPE)
    os.close(w)
    assert (p.returncode, p.stderr) == (0, b'') and (tmp_path/'s.csv').exists()
    if Path('/dev/full').exists():
        with open('/dev/full', 'wb') as full: p = summary(world, tmp_path/'t.csv', stdout=full, stderr=subprocess.PIPE)
        assert (p.returncode, p.stderr) == (0, b'') and (tmp_path/'t.csv').exists()

def test_no_control_character_gets_out(tmp_path):
    status, out, err = run('', '--debug', 'summary', 'no\x1b[31m\nwhere\u202e', '--out', tmp_path/'s.csv')
    assert status == 2 and b'Traceback' in err and rb'no\x1b[31m' in err and not {b'\x1b', '\u202e'.encode()} & {err[i:i+n] for i in range(len(err)) for n in (1, 3)}
    code = 'import dicomcam.summary as s; s.find_dicoms = lambda folder: print("a\\x1b[31m\\nb\\r") or []'
    assert run(code, 'summary', '.', '--out', tmp_path/'s.csv')[1] == b'a\\x1b[31m\nb\r\n'

# --- odd worlds

def without_rights():
    "root may write anywhere; this process may not"
    import ctypes
    if os.geteuid() == 0:
        for capability in 1, 2: ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH

@pytest.mark.parametrize('env', [dict(LC_ALL='C', PYTHONUTF8='0'), dict(LANG='C'), dict(TERM='dumb', COLUMNS='20'), dict(HOME=None), dict(HOME='/proc')], ids=str)
def test_odd_worlds(world, tmp_path, env):
    "Each finishes, and prints what it prints elsewhere"
    env = {k: v for k, v in {**os.environ, 'XDG_CACHE_HOME': '', **env}.items() if v is not None}
    p = summary(world, tmp_path/'é 😀 \'\n.csv', env=env, capture_output=True)
    assert (p.returncode, p.stderr) == (0, b''), p.stderr
    assert [o.name for o in tmp_path.iterdir()] == ['é 😀 \'\n.csv'] and p.stdout.startswith(b'Reading 2 files') and p.stdout.count(b'\n') == 2

def test_names_that_are_not_utf8(world, tmp_path):
    out = os.fsencode(tmp_path)+b'/\xff\x1b.csv'
    p = summary(world, os.fsdecode(out), capture_output=True)
    assert (p.returncode, p.stderr) == (0, b'') and os.path.exists(out) and rb'\udcff\x1b.csv' in p.stdout

@pytest.mark.skipif(sys.platform != 'linux', reason='root gives up its rights by prctl')
def test_a_home_that_is_read_only(world, tmp_path):
    home = tmp_path/'home'
    home.mkdir(mode=0o500)
    env = {**os.environ, 'HOME': str(home), 'XDG_CACHE_HOME': '', 'MPLCONFIGDIR': ''}
    p = summary(world, home/'s.csv', env=env, capture_output=True, preexec_fn=without_rights)
    assert p.returncode == 2 and p.stderr == f'dicomcam: {home}/s.csv: cannot be written there. Permission denied.\n'.encode()
    p = summary(world, tmp_path/'s.csv', env=env, capture_output=True, preexec_fn=without_rights)
    assert (p.returncode, p.stderr) == (0, b'')
