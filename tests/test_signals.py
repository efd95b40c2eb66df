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
            cwd=self.path/'work', env=self.env, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def left(self, pid):
        "Names of what should not be there, in no time after the end."
        shm = Path('/dev/shm').glob(f'*{pid}*') if Path('/dev/shm').exists() else []
        parts = [o for o in self.path.rglob('.*.part')]
        return [str(o) for o in [*shm, *parts, *(self.path/'tmp').iterdir(), *(self.path/'work').iterdir()]]

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

def test_a_signal_at_any_moment(tmp_path):
    world, rng = World(tmp_path), random.Random(int(os.environ.get('DICOMCAM_SEED', 0)))
    train = world.start('train', tmp_path/'model.safetensors')
    assert train.communicate() and train.returncode == 0
    ways, wrong = cycle(WAYS), []
    for name in world.commands: wrong += stopped_at(world, name, next(ways), None) # as it ends; and how long does it take?
    for _, name in zip(range(int(os.environ.get('DICOMCAM_SIGNALS', 12))-len(world.commands)), cycle(world.commands)):
        wrong += stopped_at(world, name, rng.choice(list(WAYS)), rng.random())
    assert wrong == []
