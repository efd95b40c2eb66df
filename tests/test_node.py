"A node that answers films: killed, fed with garbage, without room, and against Debian's Orthanc where it is installed."
import json, os, random, shutil, signal, socket, subprocess, sys, threading, time, warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pydicom, pytest
from pydicom import uid

pytest.importorskip('pynetdicom', reason='needs pynetdicom: pip install "dicomcam[network]"')
pytest.importorskip('highdicom', reason='needs highdicom: pip install "dicomcam[dicom]"')
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt

import aside
from dicomcam.apart import Apart
from dicomcam.archive import fetch, find, peer, send
from dicomcam.dimse import DicomPeer
from dicomcam.guard import CallersTLS, PeerTLS
from dicomcam.node import FilmQueue, Node, answer_films, listening, serve
from test_network import certificates, films, free_port, orthanc

KINDS = {'OT', 'SEG', 'SR'} # of an answer: picture, region, report

def explain(files):
    "A map that is bright in the middle, for each file"
    import torch
    from dicomcam.heatmaps import Heatmaps
    for o in files:
        if pydicom.dcmread(o).PatientID == 'odd': raise RuntimeError(f"{o}: 'odd' cannot be explained")
    bump, n = torch.ones(8, 8), len(files)
    bump[2:5, 2:5] = 2
    return Heatmaps([torch.stack([bump]*2)[None].repeat(n, 1, 1, 1)], torch.rand(n, 1, 64, 64), torch.tensor([[.2, .8]]*n), ['No', 'Yes'], ['5'], 'cam', items=files)

def a_node(folder, target=None, log=None, room=0, **kw):
    lines = [] if log is None else log
    return Node(FilmQueue(folder, room), explain, target, ['ME'], ['m.safetensors'], log=lines.append, **dict(port=0, quiet=0)|kw)

def sender(port, mine='ME', **kw): return DicomPeer('DICOMCAM', '127.0.0.1', port, mine, **kw)

@contextmanager
def target():
    "An archive that keeps what it is sent: its address, and {UID of an object: its dataset}"
    kept = {}
    def store(event):
        ds = event.dataset
        ds.file_meta = event.file_meta
        kept[ds.SOPInstanceUID] = ds
        return 0
    ae = AE('PEER')
    for o in AllStoragePresentationContexts: ae.add_supported_context(o.abstract_syntax)
    server = ae.start_server(('127.0.0.1', 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try: yield f'dicom://PEER@127.0.0.1:{server.server_address[1]}', kept
    finally: server.shutdown()

def check_answers(kept, films):
    "Three objects in each film's study, and none elsewhere, each about this film"
    films = [pydicom.dcmread(o) for o in films]
    found = Counter((o.StudyInstanceUID, o.Modality) for o in kept)
    assert found == Counter((o.StudyInstanceUID, m) for o in films for m in KINDS)
    for o in films:
        for ds in kept:
            if ds.StudyInstanceUID == o.StudyInstanceUID: assert o.SOPInstanceUID in str(ds) and ds.PatientID == o.PatientID

def test_answers(films, tmp_path):
    log = []
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', peer(address), log)
        with listening(node) as port:
            assert {o.status for o in sender(port).put(films)} == {'stored'}
            assert {o.status for o in sender(port).put(films[:2])} == {'stored'} # once more: known
            answer_films(node)
            assert {o.status for o in sender(port).put(films[2:4])} == {'stored'} # answered already
            answer_films(node)
    check_answers(kept.values(), films)
    assert [o for o in (tmp_path/'queue').rglob('*') if o.is_file()] == [tmp_path/'queue'/'known'] # nothing of a patient stays
    told = '\n'.join(log)+(tmp_path/'queue'/'known').read_text()
    for o in films:
        ds = pydicom.dcmread(o)
        for value in (ds.PatientID, ds.SOPInstanceUID, ds.StudyInstanceUID): assert value not in told

def test_a_part_of_an_answer_is_told(films, tmp_path):
    "Nothing speaks for the class: a picture goes, neither region nor report, and a line says why"
    def dark(files):
        h = explain(files)
        h.raw = [-o for o in h.raw]
        return h
    log = []
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', peer(address), log)
        node.explain = dark
        with listening(node) as port: list(sender(port).put(films[:1]))
        answer_films(node)
    assert len(kept) == 1 and sum('neither region nor report' in o for o in log) == 1

def test_one_node_a_queue(films, tmp_path):
    node = a_node(tmp_path/'queue')
    with open(tmp_path/'queue'/'lock', 'w') as f:
        fcntl = pytest.importorskip('fcntl')
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(OSError, match='another node'): serve(node)

@pytest.mark.filterwarnings('ignore')
def test_nothing_of_a_patient_in_the_log(tmp_path, monkeypatch):
    "pydicom's warnings quote headers; what ends a thread of pynetdicom is a line"
    log = []
    monkeypatch.setattr(threading, 'excepthook', threading.excepthook)
    node = a_node(tmp_path/'queue', log=log)
    def once(node):
        warnings.warn("Invalid value: 'Doe^Jo'")
        t = threading.Thread(target=lambda: 1/0)
        t.start()
        t.join()
        raise KeyboardInterrupt
    monkeypatch.setattr('dicomcam.node.answer_films', once)
    with warnings.catch_warnings(record=True) as told, pytest.raises(KeyboardInterrupt): serve(node)
    assert not told and log[1:] == ['a connection ended by ZeroDivisionError']

def test_kept_and_told(films, tmp_path):
    log = []
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', peer(address), log, keep=True, phi=True)
        with listening(node) as port: list(sender(port).put(films[:2]))
        answer_films(node)
    assert len(list((tmp_path/'queue'/'kept').iterdir())) == 2 and pydicom.dcmread(films[0]).PatientID in '\n'.join(log)

def test_no_answer(films, tmp_path):
    "A film of another kind, and one that cannot be explained, get a line and no answer; the others theirs"
    log, odd, other = [], tmp_path/'odd.dcm', tmp_path/'other.dcm'
    for fn, uid_, keyword, value in ((odd, '1.2.3.1', 'PatientID', 'odd'), (other, '1.2.3.2', 'Modality', 'CT')):
        ds = pydicom.dcmread(films[0])
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid_
        ds[keyword].value = value
        ds.save_as(fn)
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', peer(address), log)
        with listening(node) as port: assert {o.status for o in sender(port).put([odd, other, *films[:3]])} == {'stored'}
        answer_films(node)
    check_answers(kept.values(), films[:3])
    told = [o for o in log if 'taken' not in o and 'answered' not in o]
    assert len(told) == 2 and any('cannot be explained' in o for o in told) and any('CT' in o for o in told) and "'odd'" not in str(told)
    assert not node.queue.films()

def test_other_kinds(folder, tiny_learner, films, tmp_path):
    "A model file says what films it was trained on; a CT, a knee and a view from the side get a line, and no answer"
    from safetensors import safe_open
    from dicomcam.models import save_model
    with safe_open(save_model(tiny_learner, tmp_path/'m.safetensors'), 'pt') as f: kinds = json.loads(f.metadata()['dicomcam'])['films']
    assert kinds['Modality'] == ['CR'] and kinds['BodyPartExamined'] == ['CHEST'] and set(kinds['ViewPosition']) <= {'AP', 'PA'}
    log, others = [], dict(Modality='CT', BodyPartExamined='KNEE', ViewPosition='LL')
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', peer(address), log, kinds=kinds | dict(ViewPosition=['AP', 'PA']))
        for i, (key, value) in enumerate(others.items()):
            ds = pydicom.dcmread(films[0])
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'1.2.3.{i}'
            ds[key].value = value
            ds.save_as(tmp_path/'other.dcm')
            node.queue.take((tmp_path/'other.dcm').read_bytes())
        node.queue.take(films[1].read_bytes())
        answer_films(node)
    check_answers(kept.values(), films[1:2])
    assert not node.queue.films()
    told = {o.split('its ')[1] for o in log if 'gets no answer' in o}
    assert told == {'Modality is CT, not CR', 'BodyPartExamined is …, not CHEST', 'ViewPosition is …, not AP or PA'}

def test_who_may_send(films, tmp_path):
    node = a_node(tmp_path/'queue')
    with listening(node) as port:
        for o in (sender(port, 'OTHER'), DicomPeer('OTHER', '127.0.0.1', port, 'ME')):
            with pytest.raises(OSError): o.echo()
            with pytest.raises(OSError): list(o.put(films[:1]))
        with pytest.raises(OSError, match='does not offer'): find(f'dicom://DICOMCAM@127.0.0.1:{port}', most=1, aet='ME')
        sender(port).echo()
    assert not node.queue.films()

@pytest.mark.parametrize('args, says', [
    (['--limit', 'nan'], 'nan is no number of seconds'),
    (['--timeout', 'inf'], 'inf is no number of seconds'),
    (['--quiet', 'nan'], 'nan is no number of seconds'),
    (['--from', 'SEVENTEEN_LETTERS'], 'SEVENTEEN_LETTERS: is no AE title'),
    (['--host', ''], 'Write 0.0.0.0 if that is meant'), # of a variable of the shell that is not set
])
def test_what_serve_is_not_told(args, says, tmp_path, monkeypatch):
    from click.testing import CliRunner
    from dicomcam.cli import main
    (tmp_path/'m').write_text('')
    monkeypatch.setattr(Apart, 'start', lambda self: ('layer', {}))
    def once(node): raise ValueError('it answers')
    monkeypatch.setattr('dicomcam.node.answer_films', once)
    monkeypatch.setattr(threading, 'excepthook', threading.excepthook)
    r = CliRunner().invoke(main, [*map(str, ['serve', tmp_path/'m', '--from', 'ME', '--to', 'dicom://PEER@127.0.0.1:1', '--port', free_port(), '--queue', tmp_path/'q', *args])])
    assert r.exit_code == 2 and says in r.output, r.output

def test_tls(films, certificates, tmp_path):
    "Callers whose certificate is listed are heard; others, those who say nothing, and those without TLS are not, and hold up nobody"
    log, files = [], [certificates/o for o in ('peer.pem', 'peer.key', 'me.pem')]
    node = a_node(tmp_path/'queue', log=log, tls=CallersTLS(*files), timeout=10)
    def stored(port, name): return {o.status for o in sender(port, tls=PeerTLS(files[0], certificates/f'{name}.pem', certificates/f'{name}.key')).put(films[:1])}
    with listening(node) as port, socket.create_connection(('127.0.0.1', port)): # who says nothing
        with pytest.raises(OSError, match='certificate of'): stored(port, 'other')
        assert not node.queue.films()
        with pytest.raises(ConnectionError): sender(port, timeout=1).echo()
        assert stored(port, 'me') == {'stored'} and len(node.queue.films()) == 1
    assert sum('refused a caller' in o for o in log) == 2
    with pytest.raises(OSError, match='no certificate'): CallersTLS(files[0], certificates/'me.key', files[2])

def test_what_is_not_taken(films, tmp_path):
    "Another film of the same number, no room, too large: told, not acknowledged, and nothing stays"
    log, twin = [], tmp_path/'twin.dcm'
    ds = pydicom.dcmread(films[0])
    ds.PixelData = pydicom.dcmread(films[1]).PixelData
    ds.save_as(twin)
    node = a_node(tmp_path/'queue', log=log, max_bytes=100_000)
    with listening(node) as port:
        assert [o.status for o in sender(port).put([films[0]])] == ['stored']
        assert 'cannot understand' in [o.error for o in sender(port).put([twin])][0]
        large = pydicom.dcmread(films[-1])
        large.SOPInstanceUID = large.file_meta.MediaStorageSOPInstanceUID = '1.2.3.9'
        large.add_new(0x00091010, 'OB', bytes(200_000))
        large.save_as(tmp_path/'large.dcm')
        with pytest.raises(ConnectionError): list(sender(port).put([tmp_path/'large.dcm']))
        node.queue.room = 1<<60
        assert 'out of resources' in [o.error for o in sender(port).put([films[1]])][0]
        node.queue.room = 0
        assert [o.status for o in sender(port).put([films[1]])] == ['stored']
    assert len(node.queue.films()) == 2 and not [o for o in tmp_path.rglob('*.part')]
    assert any('other pixels' in o for o in log) and any('no room' in o for o in log)

def test_the_target_is_not_there(films, tmp_path):
    "Answers wait, and go when it comes; what it refuses for good is kept apart"
    log, port = [], free_port()
    node = a_node(tmp_path/'queue', peer(f'dicom://PEER@127.0.0.1:{port}'), log)
    for o in films[:2]: node.queue.take(o.read_bytes())
    answer_films(node)
    assert len(list((tmp_path/'queue'/'answers').iterdir())) == 2 and 'cannot be reached' in log[-1]
    answer_films(node) # waits
    assert sum('answers wait' in o for o in log) == 1
    with target() as (address, kept):
        node.target, node.later = peer(address), 0
        answer_films(node)
        check_answers(kept.values(), films[:2])
    ae = AE('PEER')
    for o in AllStoragePresentationContexts: ae.add_supported_context(o.abstract_syntax)
    server = ae.start_server(('127.0.0.1', 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: 0xA900)])
    node.target = peer(f'dicom://PEER@127.0.0.1:{server.server_address[1]}')
    node.queue.take(films[3].read_bytes())
    answer_films(node)
    server.shutdown()
    assert len(list((tmp_path/'queue'/'refused').rglob('*.dcm'))) == 3 and not list((tmp_path/'queue'/'answers').iterdir())

def test_a_film_that_ends_the_process(films, tmp_path):
    "It is tried alone from then on, and given up at last; the others have their answers"
    def deadly(files):
        if any(pydicom.dcmread(o).SOPInstanceUID == deadly_one for o in files): raise SystemExit # as near to a crash as a test comes
        return explain(files)
    deadly_one, log, ends = pydicom.dcmread(films[0]).SOPInstanceUID, [], 0
    with target() as (address, kept):
        for o in films[:4]: FilmQueue(tmp_path/'queue', 0).take(o.read_bytes())
        for _ in range(30):
            node = a_node(tmp_path/'queue', peer(address), log)
            node.explain = deadly
            try: answer_films(node)
            except SystemExit: ends += 1
    check_answers(kept.values(), films[1:4])
    assert 'ended the process' in '\n'.join(log) and ends < 30 and not FilmQueue(tmp_path/'queue').films()

def test_a_film_that_breaks_in_the_decoder(films, tmp_path):
    "Pillow raises OSError for a spoilt picture: it is that film's, no full disk for which all have to wait"
    log, spoilt = [], pydicom.dcmread(films[0]).SOPInstanceUID
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', peer(address), log)
        for o in films[:3]: node.queue.take(o.read_bytes())
        def alone(files):
            if spoilt in [pydicom.dcmread(o).SOPInstanceUID for o in files]: raise OSError('broken data stream when reading image file')
            return explain(files)
        node.explain = alone
        answer_films(node)
    check_answers(kept.values(), films[1:3])
    assert not node.queue.films() and sum('broken data stream' in o for o in log) == 1

class Nobody:
    "Takes no answer: they stay"
    def put(self, files): return ()

def changed(film, fn, patient, number):
    "A copy of a film, of another patient and with another number"
    ds = pydicom.dcmread(film)
    ds.PatientID, ds.SOPInstanceUID = patient, number
    ds.file_meta.MediaStorageSOPInstanceUID = number
    ds.save_as(fn)
    return fn.read_bytes()

@pytest.mark.posix
def test_a_film_that_hangs(films, tmp_path, monkeypatch):
    "One that hangs is stopped, one that ends the process is given up at last: a line each, no result; the others have theirs"
    log, apart = [], Apart(aside.make, 3)
    monkeypatch.setattr('dicomcam.node.write_answers', aside.answers)
    assert apart.start() == 'layer 5'
    node = a_node(tmp_path/'queue', Nobody(), log)
    node.explain = apart
    good = {node.queue.take(o.read_bytes()) for o in films[:4]}
    bad = [node.queue.take(changed(films[0], tmp_path/o, o, f'1.2.3.{i}')) for i, o in enumerate(('hangs', 'crashes'))]
    answer_films(node)
    assert {o.name for o in (tmp_path/'queue'/'answers').iterdir()} == good and [o.stem for o in node.queue.films()] == bad[1:]
    for _ in range(25): answer_films(node)
    apart.stop()
    assert {o.name for o in (tmp_path/'queue'/'answers').iterdir()} == good and not node.queue.films()
    assert [o for o in log if bad[0] in o] == [f'film {bad[0]}: cannot be explained: it took more than 3 seconds']
    assert [o for o in log if bad[1] in o][-1] == f'film {bad[1]}: ended the process that explains it 20 times, and gets no answer'

@pytest.mark.posix
def test_a_model_that_is_gone(films, tmp_path):
    "Films wait until there is one"
    log = []
    node = a_node(tmp_path/'queue', Nobody(), log)
    node.explain = Apart(aside.broken, 3)
    with pytest.raises(ValueError, match='the model is broken'): node.explain.start()
    node.queue.take(films[0].read_bytes())
    answer_films(node)
    assert log == ['films wait: what explains cannot be started: the model is broken'] and len(node.queue.films()) == 1

PARENT = '''
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import aside
from dicomcam.apart import Apart
if __name__ == '__main__': Apart(aside.make, 10**6)(aside.sleep, Path(sys.argv[2]))
'''

@pytest.mark.posix
def test_nothing_outlives_the_node(tmp_path):
    "Killed in the middle of a film: no process goes on with it"
    (tmp_path/'parent.py').write_text(PARENT)
    with subprocess.Popen([*map(str, [sys.executable, tmp_path/'parent.py', Path(__file__).parent, tmp_path/'pid'])]) as p:
        while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text(): time.sleep(.05)
        p.kill()
    pid, end = int((tmp_path/'pid').read_text()), time.monotonic()+60
    def lives():
        try: return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0] != 'Z' if Path('/proc').exists() else not os.kill(pid, 0)
        except OSError: return False
    while lives() and time.monotonic() < end: time.sleep(.05)
    assert not lives()

def test_answered_before_the_kill(films, tmp_path):
    "Its answer was there already, but the film had not gone yet: answered once"
    with target() as (address, kept):
        node = a_node(tmp_path/'queue', Nobody())
        film = node.queue.take(films[0].read_bytes())
        answer_films(node)
        node = a_node(tmp_path/'queue', peer(address))
        place = tmp_path/'queue'/'films'/'study'/f'{film}.dcm'
        place.parent.mkdir()
        shutil.copy(films[0], place)
        for _ in range(2): answer_films(node)
    check_answers(kept.values(), films[:1])
    assert not node.queue.films()

def answers_of(explain, film, folder):
    "What a node answers with that explains by `explain`"
    with target() as (address, kept):
        node = a_node(folder/'queue', peer(address))
        node.explain = explain
        node.queue.take(film.read_bytes())
        answer_films(node)
    assert not node.queue.films()
    return list(kept.values())

@pytest.mark.parametrize('absolute', [False, True])
def test_nothing_lights_up(absolute, films, tmp_path):
    "The picture alone, which says so; with a scale of the model that is the scale's doing, and told as well"
    from dicomcam.scale import HeatScale
    def dark(files):
        h = explain(files)
        if absolute: h.scale = HeatScale(5., 9., 'Yes', '5', 'cam', 100, 100)
        else: h.raw[0][:] = 0
        return h
    picture, = answers_of(dark, films[0], tmp_path)
    assert picture.Modality == 'OT' and picture.StudyInstanceUID == pydicom.dcmread(films[0]).StudyInstanceUID
    if absolute: assert 'absolute scale: colour from 5 on' in picture.DerivationDescription and 'nothing here speaks for Yes' in picture.DerivationDescription

def test_told_by_which_scale(films, tmp_path):
    "Where something lights up on a scale of the model, the picture and the report say which it is"
    from dicomcam.scale import HeatScale
    def bright(files):
        h = explain(files)
        h.scale = HeatScale(1.5, 9., 'Yes', '5', 'cam', 100, 100)
        return h
    kinds = {o.Modality: o.to_json() for o in answers_of(bright, films[0], tmp_path)}
    assert set(kinds) == KINDS
    for o in ('OT', 'SR'): assert 'absolute scale: colour from 1.5 on' in kinds[o]

def many(films, n, folder):
    "As many films, copies with numbers of their own, each in a study of its own"
    folder.mkdir()
    for i in range(n):
        ds = pydicom.dcmread(films[i % len(films)])
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'1.2.4.{i+1}'
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = f'1.2.5.{i+1}', f'1.2.6.{i+1}', f'patient-{i+1}'
        ds.save_as(folder/f'{i:04}.dcm')
    return sorted(folder.iterdir())

ZYGOTE = '''
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, highdicom, pynetdicom
from test_node import a_node, explain, peer
from dicomcam.node import serve
for _ in sys.stdin:
    pid = os.fork()
    if not pid: serve(a_node(sys.argv[2], peer(sys.argv[3]), port=int(sys.argv[4]), quiet=.05))
    print(pid, flush=True)
    os.waitpid(pid, 0)
'''

@pytest.mark.posix
def test_kill(films, tmp_path):
    "Killed at ten moments while films come: each that was acknowledged is answered, and once"
    films = many(films, int(os.environ.get('DICOMCAM_NODE_FILMS', 8)), tmp_path/'many')
    moments, port, acknowledged = random.Random(int(os.environ.get('DICOMCAM_FUZZ_SEED', 1))), free_port(), set()
    with target() as (address, kept):
        args = [sys.executable, '-c', ZYGOTE, Path(__file__).parent, tmp_path/'queue', address, port]
        with subprocess.Popen([*map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as zygote:
            def start():
                zygote.stdin.write('\n')
                zygote.stdin.flush()
                return int(zygote.stdout.readline())
            def feed():
                while left := [o for o in films if o not in acknowledged]:
                    try:
                        for o in sender(port, timeout=5).put(left[:2]):
                            if o.status: acknowledged.add(o.file)
                    except OSError: time.sleep(.05)
            threading.Thread(target=feed, daemon=True).start()
            for _ in range(10):
                pid = start()
                time.sleep(moments.uniform(.1, .8))
                os.kill(pid, signal.SIGKILL)
            pid = start()
            end = time.monotonic()+120
            while len(kept) < 3*len(films) and time.monotonic() < end: time.sleep(.1)
            time.sleep(.5)
            os.kill(pid, signal.SIGKILL)
            zygote.stdin.close()
    assert acknowledged == set(films)
    check_answers(kept.values(), films)

def mutants(port, films, count, seed):
    "What a sender says at first and then, as bytes: from a real talk, mutated; and noise"
    talk, rng = [], random.Random(seed)
    ae = AE('ME')
    ae.requested_contexts = [build_context(pydicom.dcmread(films[0]).SOPClassUID, uid.JPEGBaseline8Bit)]
    assoc = ae.associate('127.0.0.1', port, ae_title='DICOMCAM', evt_handlers=[(evt.EVT_DATA_SENT, lambda e: talk.append(e.data))])
    assoc.send_c_store(pydicom.dcmread(films[0]))
    assoc.release()
    for i in range(count):
        kind = rng.randrange(5)
        if kind == 0: yield [rng.randbytes(rng.randrange(2000))], False
        else:
            parts = [bytearray(o.replace(b'3680043', b'%d' % (10**6+i))) for o in talk] # another film
            for _ in range(rng.choice((1, 3, 30))):
                o = rng.choices(parts[kind == 4:], [len(o) for o in parts[kind == 4:]])[0]
                o[rng.randrange(len(o))] = rng.randrange(256)
            if kind == 1: rng.shuffle(parts)
            if kind == 2: parts = parts[:rng.randrange(len(parts))]
            yield parts, kind == 4

def talk_to(port, parts, listens):
    "Say all of it; one who listens waits for an answer to the first part and before the last, as those do whose films are taken"
    with socket.create_connection(('127.0.0.1', port)) as c:
        c.settimeout(5)
        try:
            for i, o in enumerate(parts):
                c.sendall(o)
                if listens and i in (0, len(parts)-2): c.recv(10_000)
        except OSError: pass

def test_garbage(films, tmp_path):
    "Random and mutated PDUs: the node goes on, and keeps nothing that is no film"
    count, seed = (int(os.environ.get(f'DICOMCAM_FUZZ_{o}', n)) for o, n in (('COUNT', 40), ('SEED', 0)))
    node = a_node(tmp_path/'queue', timeout=.3)
    with listening(node) as port:
        for parts, listens in mutants(port, films, count, seed): talk_to(port, parts, listens)
        df = send([films[1]], f'dicom://DICOMCAM@127.0.0.1:{port}', tries=9, pause=.1, progress=False, aet='ME') # until those that still wait for more have gone
        assert list(df.status) == ['stored'], df.error[0]
    for o in node.queue.films(): pydicom.dcmread(o).PatientID

# Orthanc

def check_objects(files):
    "dciodvfy finds no error in any of them, dcmtk none in a report"
    here = f'{Path(sys.executable).parent}{os.pathsep}/usr/bin'
    for o in files:
        tools = ['dciodvfy'] + ['dsrdump']*(pydicom.dcmread(o).Modality == 'SR')
        for tool in filter(None, (shutil.which(t, path=here) for t in tools)):
            r = subprocess.run([tool, o], capture_output=True, text=True)
            assert r.returncode == 0 and 'Error' not in r.stderr and 'E:' not in r.stderr, r.stderr

def test_serve_for_orthanc(films, folder, tmp_path):
    "Films that the archive sends, and dcmtk's storescu: each has its answer in its study, without an error"
    import requests, torch
    from dicomcam.batches import dicom_dls
    from dicomcam.cli import _engine
    from dicomcam.models import dicom_learner, save_model
    films = many(films, int(os.environ.get('DICOMCAM_NODE_FILMS', 6)), tmp_path/'many')
    for seed in range(20): # until one has a map for each film: it is not trained, and half of them have none
        torch.manual_seed(seed)
        model = save_model(dicom_learner(dicom_dls(folder, size=64), 'xresnet18', pretrained=False), tmp_path/'m.safetensors')
        h = _engine(model, None, None, None, None, None)[1](films[:13])
        if all(h.heat(i).any() for i in range(len(h.items))): break
    (tmp_path/'orthanc').mkdir()
    with orthanc(tmp_path/'orthanc') as (dicom, web, ours):
        send(films[::2], dicom, progress=False)
        args = [sys.executable, '-m', 'dicomcam', 'serve', tmp_path/'m.safetensors', '--to', web, '--from', 'ORTHANC', '--from', 'STORESCU', '--port', ours,
            '--queue', tmp_path/'queue', '--quiet', .2, '--modality', 'CR', '--modality', 'DX', '--limit', 600, '--free', 1, '--max-film', 16, '--max-pdu', 64, '--associations', 4]
        with subprocess.Popen([*map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as node:
            try:
                while 'listens' not in (line := node.stdout.readline()): assert line, 'it ended'
                api = web.removesuffix('dicom-web')
                requests.post(f'{api}modalities/us/store', json=dict(Resources=requests.get(f'{api}instances').json())).raise_for_status()
                send(films[1::2], dicom, progress=False)
                if storescu := shutil.which('storescu', path='/usr/bin'): subprocess.run([storescu, '-aet', 'STORESCU', '-aec', 'DICOMCAM', '-xy', '127.0.0.1', str(ours), *map(str, films[1::2])], check=True)
                else: send(films[1::2], f'dicom://DICOMCAM@127.0.0.1:{ours}', aet='STORESCU', progress=False)
                end = time.monotonic()+600
                while len(requests.get(f'{api}instances').json()) < 4*len(films) and time.monotonic() < end: time.sleep(.3)
            finally: node.terminate()
        fetch(web, {}, tmp_path/'got', most=1000, progress=False)
    got = [pydicom.dcmread(o) for o in (tmp_path/'got').rglob('*.dcm')]
    answers = [o for o in got if o.Modality in KINDS]
    check_answers(answers, films)
    check_objects([o.filename for o in answers])
