"""Films a second that a node takes, explains and answers, beside the explain command on the same files.

    python benchmarks/node.py MODEL FOLDER [--to ADDRESS] [--n 50]

MODEL is a file that train wrote, FOLDER holds films that it knows. The node and who sends to it are in one process, and so is,
without --to, the archive that takes the answers and forgets them. Needs pynetdicom and highdicom. Time is the clock's."""
import argparse, json, platform, tempfile, time, warnings
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

warnings.simplefilter('ignore')
from pynetdicom import AE, AllStoragePresentationContexts, evt

from dicomcam.apart import Apart
from dicomcam.archive import peer
from dicomcam.attribution import attribute
from dicomcam.dimse import DicomPeer
from dicomcam.folder import write_heatmaps
from dicomcam.models import load_model
from dicomcam.node import FilmQueue, Node, answer_films, listening
from dicomcam.summary import find_dicoms

@contextmanager
def archive():
    "One that forgets what it takes; its address"
    ae = AE('ARCHIVE')
    for o in AllStoragePresentationContexts: ae.add_supported_context(o.abstract_syntax)
    server = ae.start_server(('127.0.0.1', 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: 0)])
    try: yield f'dicom://ARCHIVE@127.0.0.1:{server.server_address[1]}'
    finally: server.shutdown()

def seconds(f):
    "How long `f` takes, and what it gives"
    start = time.perf_counter()
    result = f()
    return time.perf_counter()-start, result

def explainer(model):
    "What explains files, ready to do so, in the process apart that the command has as well"
    import torch
    learn = load_model(model)
    maps = partial(attribute, learn)
    maps(torch.zeros(1, 1, learn.dls.setup.size, learn.dls.setup.size)) # what is loaded at first use
    return maps, ''

class Nobody:
    "Takes no answer: they are made and stay"
    def put(self, files): return ()

def measured(model, files, address, folder, here=False):
    "Films a second, by step; explained in a process apart, or `here`"
    learn = load_model(model)
    maps = partial(attribute, learn)
    maps(files[:1]) # what is loaded at first use
    apart = Apart(partial(explainer, model), 600)
    apart.start()
    node = Node(FilmQueue(folder/'queue', 0), maps if here else apart, Nobody(), ['BENCHMARK'], ['benchmark'], port=0, quiet=0, log=lambda _: None)
    with listening(node) as port: received, sent = seconds(lambda: list(DicomPeer('DICOMCAM', '127.0.0.1', port, 'BENCHMARK').put(files)))
    if any(o.error for o in sent): raise SystemExit(next(o.error for o in sent if o.error))
    def explain():
        while node.queue.films(): answer_films(node)
    explained, _ = seconds(explain)
    node.target = peer(address)
    def answer():
        while any((folder/'queue'/'answers').iterdir()): answer_films(node)
    answered, _ = seconds(answer)
    command, _ = seconds(lambda: write_heatmaps(folder/'heatmaps', maps, files, list(learn.dls.vocab), dicom=True))
    times = dict(received=received, explained=explained, answered=answered, all_three=received+explained+answered, explain_command=command)
    return {k: round(len(files)/v, 2) for k, v in times.items()}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('folder')
    p.add_argument('--to', help='address of an archive, as for dicomcam send')
    p.add_argument('--n', type=int, default=50)
    p.add_argument('--here', action='store_true', help='explain in this process, without a limit on its time')
    args = p.parse_args()
    files = list(islice(find_dicoms(args.folder), args.n))
    with tempfile.TemporaryDirectory() as d, archive() as address:
        print(json.dumps(dict(machine=platform.machine(), films=len(files), per_second=measured(args.model, files, args.to or address, Path(d), args.here)), indent=1))
