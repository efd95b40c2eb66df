"Jobs on files that may be hostile, each within limits of its own: `results` runs them in child processes"
import os, pickle, resource, time

GB = 1<<30

def _serve(job, cases, out, seconds, memory):
    "In the child: the outcome of each case, until one of them kills it"
    size = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size+memory, size+memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(out, 'wb') as f:
        for case in cases:
            start = time.process_time()
            soft = int(start)+seconds+1
            resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
            try: outcome = job(case)
            except BaseException as e: outcome = f'{type(e).__name__}: {e}'
            pickle.dump((outcome, time.process_time()-start), f)
            f.flush()

def results(job, cases, seconds=5, memory=2*GB):
    """What `job` says of each case, and its CPU time. It may take `seconds` of CPU and `memory` more bytes of address
    space than the process has now; 'killed by signal n' of one that took more time, or crashed"""
    done = []
    while len(done) < len(cases):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                _serve(job, cases[len(done):], write, seconds, memory)
            finally: os._exit(0)
        os.close(write)
        with os.fdopen(read, 'rb') as f:
            while True:
                try: done.append(pickle.load(f))
                except EOFError: break
        _, status = os.waitpid(pid, 0)
        if len(done) < len(cases): done.append((f'killed by signal {os.WTERMSIG(status)}', seconds))
    return done
