"""Runs `dicomcam` as two processes that are told of one another as a launcher tells them, over and over, with all imports done once.

    python two.py JOBS.json

A job: args, of the command, and spoilt: for each process the number of the batch-th picture in which it fails, and how
('kill' or an error's name), or null. Prints a line of JSON for each job: for each process its status (negative: the signal) and what it said."""
import json, os, signal, sys
from pathlib import Path
from socket import socket

os.environ['MPLBACKEND'] = 'agg'
import dicomcam.folder as folder
from dicomcam import __main__ as program
import dicomcam.gradcam, dicomcam.models, dicomcam.objects, matplotlib.pyplot # so that a process has them

def spoil(how):
    "The process fails at its first picture"
    def write(*args):
        if how == 'kill': os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError('broken')
    if how: folder._write = write

def start(rank, port, args, how, said):
    "A copy of this process, which runs the command"
    if pid := os.fork(): return pid
    try:
        signal.alarm(120) # of the test: what waits for ever ends so
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        fd = os.open(said, os.O_CREAT | os.O_WRONLY)
        for o in 1, 2: os.dup2(fd, o)
        spoil(how)
        sys.argv = ['dicomcam', *args]
        program.run()
        os._exit(0)
    except SystemExit as e: sys.stdout.flush(), os._exit(e.code or 0)
    finally: os._exit(99)

def free_port():
    with socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

for job in json.loads(Path(sys.argv[1]).read_text()):
    port, said = free_port(), [Path(f'{sys.argv[1]}.{rank}') for rank in range(2)]
    pids = [start(rank, port, job['args'], how, out) for rank, (how, out) in enumerate(zip(job['spoilt'], said))]
    status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(dict(status=status, said=[o.read_text() for o in said])), flush=True)
    for o in said: o.unlink()
