"""The command `dicomcam`, which is also `python -m dicomcam`: from its first import on there is one way to end it.

Ctrl-C, `kill` and a closed terminal end it at once, with one line and status 130: no exception is raised, as that may
come up in any line of any library. Only once a result is moved to its place is it too late to stop."""
import io, os, re, signal, sys, threading
from contextlib import suppress
from pathlib import Path

from dicomcam.text import for_terminal

_SIGNALS = [getattr(signal, o) for o in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGBREAK') if hasattr(signal, o)]

def _ignore():
    "From here on it is too late to stop."
    for o in _SIGNALS: signal.signal(o, signal.SIG_IGN)

def _children():
    "Numbers of the processes that this one has started, where /proc tells: one may be known to nobody else yet."
    for o in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):
            parent = o.read_text(errors='replace').rpartition(')')[2].split()[1]
            if int(parent) == os.getpid(): yield int(o.parent.name)

def _end_children():
    "Worker processes end on SIGTERM. What watches over semaphores ignores it: it tidies up when this process has gone."
    workers = sys.modules['multiprocessing'].active_children() if 'multiprocessing' in sys.modules else []
    for pid in {*_children(), *(o.pid for o in workers)}:
        with suppress(OSError): os.kill(pid, signal.SIGTERM)
    for o in workers: o.join(5)

def _stop(pid, *_):
    "End process `pid`, and leave nothing behind."
    try:
        _ignore()
        if os.getpid() != pid: return # a copy of it
        _end_children()
        if 'dicomcam.files' in sys.modules: sys.modules['dicomcam.files'].remove_unfinished()
        os.write(2, b'dicomcam: stopped; nothing half-written is left.\n')
    finally: os._exit(130)

def _pass_on(signals):
    "Wait for `signals` in a thread; the main one is told."
    while True:
        signal.sigwait(signals)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

def _hold(signals):
    "Block `signals` for good: until Python 3.12, multiprocessing unblocks some when it starts its first process."
    mask = signal.pthread_sigmask
    def unless_held(how, which): return mask(how, set(which)-signals if how == signal.SIG_UNBLOCK else which)
    mask(signal.SIG_BLOCK, signals)
    signal.pthread_sigmask = unless_held

def _listen():
    """Stop on the signals that do not have to be ignored, as with nohup. Those that a terminal sends to all processes
    at once are held back: worker processes inherit that, so that none of them answers for itself."""
    pid = os.getpid()
    mine = [o for o in _SIGNALS if o == signal.SIGTERM or signal.getsignal(o) != signal.SIG_IGN]
    for o in mine: signal.signal(o, lambda *_: _stop(pid))
    if not hasattr(signal, 'pthread_sigmask'): return # Windows
    held = set(mine)-{signal.SIGTERM}
    _hold(held)
    if held: threading.Thread(target=_pass_on, args=[held], daemon=True).start()

class _Bytes(io.FileIO):
    "Where standard output goes. When nobody reads it any more, or the disk is full, its lines are lost, but no work."
    def write(self, data):
        with suppress(OSError): return super().write(data)
        return len(data)

class _Lines(io.TextIOWrapper):
    "Text without control characters, whoever prints it. Only ends of lines are as they were."
    def write(self, text):
        super().write(re.sub(r'[^\r\n]+', lambda m: for_terminal(m[0]), text))
        return len(text)

def _stream(number, old):
    "Standard output or error, instead of `old`: None if it was closed."
    raw = io.BufferedWriter(_Bytes(number, 'w', closefd=False))
    return _Lines(raw, old.encoding if old else 'utf-8', 'backslashreplace', line_buffering=True)

def _open_streams():
    "All three streams are open and usable; else the next file that is opened would be taken for one of them."
    for number in range(3):
        try: os.fstat(number)
        except OSError: os.open(os.devnull, os.O_RDWR) # takes the lowest free number
    sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)

def run() -> None:
    "Run the command that the command line names, and end the process with its status."
    _listen()
    _open_streams()
    quiet = 'ignore:resource_tracker:UserWarning' # of joblib's, after a stop: it says that it tidies up
    os.environ['PYTHONWARNINGS'] = ','.join(filter(None, [os.environ.get('PYTHONWARNINGS'), quiet]))
    from dicomcam.cli import main
    try: main(prog_name='dicomcam', obj=_ignore)
    finally: _ignore()

if __name__ == '__main__': run()
