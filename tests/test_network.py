"Archives: Debian's Orthanc where it is installed, and nodes that misbehave."
import io, json, os, re, shutil, socket, ssl, subprocess, threading, time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd, pydicom, pytest
from click.testing import CliRunner
from pydicom import uid

pytest.importorskip('pynetdicom', reason='needs pynetdicom: pip install "dicomcam[network]"')
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt

from dicomcam.archive import fetch, find, peer, send
from dicomcam.cli import main
from dicomcam.data import phantom
from dicomcam.summary import summarize

ONE = dict(tries=1, progress=False)
FIND, MOVE, GET = (f'1.2.840.10008.5.1.4.1.2.2.{o}' for o in (1, 2, 3))
SYNTAXES = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.JPEGBaseline8Bit]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='session')
def films(tmp_path_factory):
    "12 small films as JPEG, one of them also without compression, another study"
    d = phantom(tmp_path_factory.mktemp('films')/'phantom', n=12, size=64)
    ds = pydicom.dcmread(sorted(d.rglob('*.dcm'))[0])
    ds.decompress()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality, ds.PatientID, ds.StudyDate = '1.2.3.4', '1.2.3.5', 'DX', 'plain-one', '20240131'
    ds.save_as(d/'train'/'plain.dcm')
    return sorted(d.rglob('*.dcm'))

def same_film(a, b):
    a, b = pydicom.dcmread(a), pydicom.dcmread(b)
    return a == b and a.file_meta.TransferSyntaxUID == b.file_meta.TransferSyntaxUID

def check_fetched(df, films, dest):
    "Every film is there once, as it was sent, and the table is that of summarize"
    there = sorted(dest.rglob('*.dcm'))
    assert len(df) == len(films) == len(there) and df.error.isna().all(), df.error.unique()
    sent = {pydicom.dcmread(o, stop_before_pixels=True).SOPInstanceUID: o for o in films}
    for o in there: assert same_film(o, sent[o.stem])
    assert not [o for o in dest.rglob('*') if o.name.endswith('.part')]
    pd.testing.assert_frame_equal(df, summarize(list(df.fname), progress=False), check_dtype=False)

# Orthanc

@contextmanager
def orthanc(folder, **config):
    "Addresses of a new, empty archive: its own protocol, DICOMweb, and the port at which it looks for DICOMCAM"
    if not shutil.which('Orthanc', path=f'{os.environ["PATH"]}:/usr/sbin'): pytest.skip('Orthanc is not installed: apt-get install orthanc orthanc-dicomweb')
    plugins = [str(o) for o in Path('/usr/share/orthanc/plugins').glob('libOrthancDicomWeb.so')]
    if not plugins: pytest.skip('the plugin orthanc-dicomweb is not installed')
    http, dicom, ours = free_port(), free_port(), free_port()
    allow = {f'DicomAlwaysAllow{o}': True for o in ('Echo', 'Find', 'Get', 'Move', 'Store')}
    (folder/'config.json').write_text(json.dumps(dict(Name='test', HttpPort=http, DicomPort=dicom, DicomAet='ORTHANC', StorageDirectory=str(folder),
        IndexDirectory=str(folder), RemoteAccessAllowed=False, Plugins=plugins, DicomModalities=dict(us=['DICOMCAM', '127.0.0.1', ours]), **allow)|config))
    env = dict(os.environ, PATH=f'{os.environ["PATH"]}:/usr/sbin')
    with open(folder/'log', 'w') as log: p = subprocess.Popen(['Orthanc', folder/'config.json'], stdout=log, stderr=log, env=env)
    try:
        for _ in range(600):
            try: peer(f'dicom://ORTHANC@127.0.0.1:{dicom}').echo(); break
            except ConnectionError: assert p.poll() is None, (folder/'log').read_text()
            time.sleep(.1)
        yield f'dicom://ORTHANC@127.0.0.1:{dicom}', f'http://127.0.0.1:{http}/dicom-web', ours
    finally:
        p.terminate()
        p.wait()

@pytest.fixture(scope='session')
def archive(tmp_path_factory):
    with orthanc(tmp_path_factory.mktemp('orthanc')) as o: yield o

@pytest.fixture(scope='session')
def filled(archive, films):
    "The archive with the films in it, half by each protocol"
    for part, address in zip((films[::2], films[1::2]), archive):
        df = send(part, address, progress=False)
        assert set(df.status) == {'stored'} and list(df.fname) == [*map(str, part)]
    return archive

@pytest.mark.parametrize('how', ['get', 'move', 'web'])
def test_fetch_from_orthanc(how, filled, films, tmp_path, monkeypatch):
    dicom, web, ours = filled
    if how == 'move': monkeypatch.setattr('dicomcam.dimse._GET', '1.2.3') # an archive that does not know C-GET
    source, more = (web, {}) if how == 'web' else (dicom, dict(port=ours))
    peer(source).echo()
    table = find(source, most=100)
    assert len(table) == 13 and set(table.Modality) == {'CR', 'DX'}
    assert sorted(table.SOPClassUID.unique()) == sorted({pydicom.dcmread(o).SOPClassUID for o in films})
    df = fetch(source, table, tmp_path/'films', progress=False, **more)
    check_fetched(df, films, tmp_path/'films')

@pytest.mark.parametrize('n', [0, 1])
def test_what_is_asked_for(n, filled):
    source = filled[n]
    assert set(find(source, dict(Modality='DX')).PatientID) == {'plain-one'}
    assert len(find(source, dict(PatientID='plain*'))) == len(find(source, dict(PatientID='plain-one'))) == 1
    assert len(find(source, dict(StudyInstanceUID='1.2.3.4'))) == len(find(source, dict(StudyDate='20240101-20240229'))) == 1
    assert len(find(source, dict(PatientID='nobody'))) == 0
    assert len(find(source, dict(Modality='CR'), most=5)) == 5

@pytest.mark.parametrize('n', [0, 1])
def test_only_what_is_missing_is_fetched(n, filled, films, tmp_path):
    source, asked = filled[n], []
    fetch(source, dict(Modality='CR'), tmp_path, most=5, progress=False)
    before = {o: o.stat().st_mtime_ns for o in tmp_path.rglob('*.dcm')}
    assert len(before) == 5
    check_fetched(fetch(source, {}, tmp_path, most=100, progress=False), films, tmp_path)
    assert {o: o.stat().st_mtime_ns for o in before} == before

def test_the_commands(filled, films, tmp_path):
    def run(*args, status=0):
        r = CliRunner().invoke(main, [*map(str, args)])
        assert r.exit_code == status, (r.output, r.exception)
        return r
    r = run('fetch', filled[0], '--patient', 'plain-one', '--out', tmp_path/'films')
    lines = r.stdout.splitlines()
    assert '1.2.3.4' in lines[1] and 'plain-one' not in r.output and '1 of 1 films' in lines[-1]
    assert len(list(tmp_path.rglob('*.dcm'))) == 1 and len(pd.read_csv(tmp_path/'films'/'summary.csv')) == 1
    assert 'plain-one' in run('fetch', filled[1], '--study', '1.2.3.4', '--modality', 'DX', '--date', '20240131', '--max', 3, '--phi', '--out', tmp_path/'films').stdout
    assert '0 films' in run('fetch', filled[1], '--patient', 'nobody', '--out', tmp_path/'none', status=2).stderr
    (tmp_path/'broken.dcm').write_bytes(films[0].read_bytes()[:-100])
    r = run('send', tmp_path/'broken.dcm', films[0], '--to', filled[0], status=1)
    assert f'{films[0]}: stored' in r.stdout and 'cut off' in r.stderr and '1 of 2 stored' in r.stdout
    assert 'is no address' in run('send', films[0], '--to', 'nowhere', status=2).stderr

# a film that cannot go as it is

@contextmanager
def node(handlers=(), syntaxes=SYNTAXES, get=True, **kw):
    "A node of pynetdicom at a free port; its address"
    ae = AE('PEER')
    for o in (FIND, MOVE, *[GET]*get): ae.add_supported_context(o)
    for o in AllStoragePresentationContexts: ae.add_supported_context(o.abstract_syntax, syntaxes, True, True)
    for k, v in kw.items(): setattr(ae, k, v)
    server = ae.start_server(('127.0.0.1', 0), block=False, evt_handlers=list(handlers))
    try: yield f'dicom://PEER@127.0.0.1:{server.server_address[1]}'
    finally: server.shutdown()

def test_decompressed_only_where_it_must_be(films, tmp_path):
    came = {}
    def store(event):
        came[event.request.AffectedSOPInstanceUID] = event.encoded_dataset()
        return 0
    with node([(evt.EVT_C_STORE, store)], SYNTAXES[:1]) as address: df = send(films[:3], address, **ONE)
    assert list(df.status) == ['stored, decompressed']*3
    for o in films[:3]:
        ds = pydicom.dcmread(o)
        got = pydicom.dcmread(io.BytesIO(came[ds.SOPInstanceUID]))
        assert (got.pixel_array == ds.pixel_array).all() and got.LossyImageCompression == '01' and got.StudyInstanceUID == ds.StudyInstanceUID
    with node([(evt.EVT_C_STORE, store)]) as address: df = send(films[:3], address, **ONE)
    assert list(df.status) == ['stored']*3 # as the file has it, to the byte
    for o in films[:3]: assert o.read_bytes().endswith(came[pydicom.dcmread(o).SOPInstanceUID][-2000:])

def test_a_file_without_header_is_sent(films, tmp_path):
    whole, came = films[-1].read_bytes(), []
    bare = tmp_path/'bare.dcm'
    bare.write_bytes(whole[whole.index(b'\x08\x00\x05\x00CS'):])
    def store(event):
        came.append(event.dataset.SOPInstanceUID)
        return 0
    with node([(evt.EVT_C_STORE, store)]) as address: assert list(send([bare], address, **ONE).status) == ['stored, written anew']
    assert came == [pydicom.dcmread(films[-1]).SOPInstanceUID]

def test_each_file_has_its_own_status(films, tmp_path):
    "Refused, refused for now, stored with a warning, no DICOM file: each in its row"
    tries = {}
    by_name = {pydicom.dcmread(o).SOPInstanceUID: i for i, o in enumerate(films)}
    def status(event):
        i = by_name[event.request.AffectedSOPInstanceUID]
        tries[i] = tries.get(i, 0)+1
        if i == 2: return 0xA700 if tries[i] < 3 else 0
        return {1: 0xA900, 3: 0xB000, 4: 0xA701}.get(i, 0)
    no_film = tmp_path/'no.dcm'
    no_film.write_text('no film')
    with node([(evt.EVT_C_STORE, status)]) as address: df = send([*films[:5], no_film], address, pause=0, progress=False)
    assert list(df.status) == ['stored', '', 'stored', 'stored, with a warning (0xB000)', '', '']
    assert df.error[1] == 'refused: the film is not what it says it is (0xA900)' and 'out of resources' in df.error[4]
    assert 'not a DICOM file' in df.error[5] and tries == {0: 1, 1: 1, 2: 3, 3: 1, 4: 5}

# nodes that misbehave

def one_line(e, *says):
    text = str(e.value)
    assert len(text.splitlines()) == 1 and all(o in text for o in says), text

def test_nobody_is_there():
    with pytest.raises(ConnectionError) as e: find(f'dicom://PEER@127.0.0.1:{free_port()}', most=1)
    one_line(e, 'cannot be reached')
    with pytest.raises(ConnectionError) as e: find(f'http://127.0.0.1:{free_port()}/dicom-web', most=1)
    one_line(e, 'cannot be reached')

@pytest.mark.parametrize('host', ['nowhere', 'a..b'])
def test_no_such_machine(host, films, monkeypatch):
    look = socket.getaddrinfo
    def unknown(name, *args, **kwargs):
        if name == 'nowhere': raise socket.gaierror(-2, 'Name or service not known')
        return look(name, *args, **kwargs)
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    for work in (lambda o: find(o, most=1), lambda o: send(films[:1], o, **ONE)):
        with pytest.raises(ConnectionError) as e: work(f'dicom://PEER@{host}:104')
        one_line(e, f'PEER@{host}:104: cannot be reached: no machine of this name')

@pytest.mark.parametrize('kw, aet, says', [
    (dict(require_called_aet=True), 'OTHER', 'another AE title than OTHER'),
    (dict(require_calling_aet=['SOMEBODY']), 'PEER', 'by the name DICOMCAM')])
def test_refused_association(kw, aet, says, films):
    with node(**kw) as address:
        address = address.replace('PEER', aet)
        with pytest.raises(OSError) as e: find(address, most=1)
        one_line(e, says)
        with pytest.raises(OSError) as e: send(films[:2], address, tries=2, pause=0, progress=False)
        one_line(e, says)

def test_refused_presentation_context(films):
    ae = AE('PEER')
    ae.add_supported_context('1.2.840.10008.1.1')
    server = ae.start_server(('127.0.0.1', 0), block=False)
    address = f'dicom://PEER@127.0.0.1:{server.server_address[1]}'
    try:
        peer(address).echo()
        with pytest.raises(OSError) as e: find(address, most=1)
        one_line(e, 'does not offer')
    finally: server.shutdown()

@contextmanager
def raw(talk):
    "A port where `talk` gets each connection; the address"
    with socket.create_server(('127.0.0.1', 0)) as s:
        open_ = []
        def serve():
            while True:
                try: c, _ = s.accept()
                except OSError: return
                open_.append(c)
                try: talk(c)
                except OSError: pass
        threading.Thread(target=serve, daemon=True).start()
        yield f'dicom://PEER@127.0.0.1:{s.getsockname()[1]}'
        for c in open_: c.close()

def test_refused_for_now(films):
    "What may pass is tried again"
    n = []
    def refuse(c):
        n.append(c.recv(1<<16))
        c.sendall(b'\x03\0\0\0\0\4\0\2\3\2') # rejected, transient, by the provider, local limit exceeded
    with raw(refuse) as address, pytest.raises(ConnectionError) as e: send(films[:2], address, tries=3, pause=0, progress=False)
    one_line(e, 'Local limit exceeded')
    assert len(n) == 3

HEADER = b'\x02\0' # of an A-ASSOCIATE-AC; its length comes next

@pytest.mark.parametrize('talk', [
    lambda c: None, # hangs
    lambda c: c.close(),
    lambda c: c.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n'),
    lambda c: c.sendall(HEADER+b'\0\0\1\0'+b'half'), # and hangs in the middle
    lambda c: (c.sendall(HEADER+b'\0\0\1\0'+b'half'), c.close()),
    lambda c: [c.sendall(HEADER+b'\xff\xff\xff\xff'), *(c.sendall(bytes(1<<20)) for _ in range(10**4))], # without end
    lambda c: c.sendall(os.urandom(5000))])
def test_no_dicom_node(talk):
    before = threading.active_count()
    with raw(talk) as address, pytest.raises(ConnectionError) as e: find(address, most=1, timeout=.5)
    one_line(e, 'does not answer as DICOM does')

def answers(films, keys=()):
    "What C-FIND says of films; a study, a series and an image for each"
    def find(event):
        for o in films:
            if all(event.identifier.get(k) in ('', None, o.get(k)) for k in ('StudyInstanceUID', 'SeriesInstanceUID')): yield 0xFF00, o
    return find

def handing_out(films, change=lambda i, ds: ds):
    "Handlers of an archive that has films; `change` takes what goes out, with its number"
    films, sent = [pydicom.dcmread(o) for o in films], []
    def get(event):
        yield 1
        ds = change(len(sent), next(o for o in films if o.SOPInstanceUID == event.identifier.SOPInstanceUID))
        sent.append(ds)
        if ds is None:
            event.assoc.abort()
            return
        yield 0xFF00, ds
    return [(evt.EVT_C_FIND, answers(films)), (evt.EVT_C_GET, get)]

def test_broken_off_in_the_middle(films, tmp_path):
    "What came stays, and the same goes on from there; or goes on by itself"
    breaks = handing_out(films, lambda i, ds: None if i in (4, 6) else ds)
    with node(breaks) as address:
        with pytest.raises(ConnectionError) as e: fetch(address, {}, tmp_path, most=100, **ONE)
        one_line(e, 'broke off', '4 of 13 films', 'goes on from there')
        assert len(list(tmp_path.rglob('*.dcm'))) == 4
        check_fetched(fetch(address, {}, tmp_path, most=100, pause=0, progress=False), films, tmp_path)

def test_hangs_in_the_middle(films, tmp_path):
    over = threading.Event()
    def change(i, ds):
        if i == 2: over.wait()
        return ds
    with node(handing_out(films[:4], change)) as address:
        try:
            with pytest.raises(ConnectionError) as e: fetch(address, {}, tmp_path, most=100, timeout=1, **ONE)
        finally: over.set()
    one_line(e, 'was silent for 1 seconds', '2 of 4 films')

def test_another_film_than_asked_for(films, tmp_path):
    "Another film, and the right number with another study: not accepted, and told"
    def change(i, ds):
        if i == 1: return pydicom.dcmread(films[0])
        if i == 2: ds.StudyInstanceUID = '1.9.9'
        return ds
    with node(handing_out(films[:4], change)) as address:
        table = find(address, most=100)
        df = fetch(address, table, tmp_path, **ONE)
    assert list(df.error.notna()) == [False, True, True, False] and df.error[1:3].str.contains('another film').all()
    assert len(list(tmp_path.rglob('*.dcm'))) == 2

def test_answers_that_were_not_asked_for(films):
    "An archive that ignores what is asked for gives only what fits"
    def search(event):
        for o in films: yield 0xFF00, pydicom.dcmread(o, stop_before_pixels=True)
    with node([(evt.EVT_C_FIND, search)]) as address:
        assert len(find(address, dict(PatientID='plain-one'))) == 1

def test_no_answer_is_lost(films, monkeypatch):
    "pynetdicom's own thread, which does not pause here, does not take them"
    class Open:
        def clear(self): pass
        def set(self): pass
        def wait(self): time.sleep(.001) # so that it seems to pause
    from pynetdicom.association import Association
    run = Association._run_reactor
    def restless(self):
        if self.is_requestor: self._reactor_checkpoint = Open()
        run(self)
    monkeypatch.setattr(Association, '_run_reactor', restless)
    with node(handing_out(films)) as address:
        for _ in range(3): assert len(find(address, most=100, timeout=5)) == len(films)

@pytest.mark.parametrize('lists, requests', [(True, 2), (False, 14)])
def test_move_together(lists, requests, films, tmp_path):
    "The films of a series by one C-MOVE for ten, each by its own where an archive knows no lists"
    series, asked = [], []
    for i, fn in enumerate(films[:12]):
        ds = pydicom.dcmread(fn)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = '1.2.3', '1.2.4'
        ds.save_as(tmp_path/f'{i}.dcm')
        series.append(tmp_path/f'{i}.dcm')
    def move(event):
        asked.append(event.identifier.SOPInstanceUID)
        names = asked[-1] if isinstance(asked[-1], pydicom.multival.MultiValue) else [asked[-1]]
        some = [o for o in map(pydicom.dcmread, series) if o.SOPInstanceUID in names] if lists or len(names) == 1 else []
        yield '127.0.0.1', ours, dict(contexts=[build_context(o.SOPClassUID, o.file_meta.TransferSyntaxUID) for o in some[:1]] or None)
        yield len(some)
        for o in some: yield 0xFF00, o
    ours = free_port()
    with node([*handing_out(series), (evt.EVT_C_MOVE, move)], get=False) as address:
        check_fetched(fetch(address, find(address, most=100), tmp_path/'films', port=ours, **ONE), series, tmp_path/'films')
    assert len(asked) == requests

# TLS

@pytest.fixture(scope='session')
def certificates(tmp_path_factory):
    "A folder with certificates NAME.pem, their keys NAME.key"
    if not shutil.which('openssl'): pytest.skip('openssl is not installed')
    d = tmp_path_factory.mktemp('certificates')
    for name, host in (('peer', 'IP:127.0.0.1'), ('me', 'IP:127.0.0.1'), ('other', 'IP:127.0.0.1'), ('elsewhere', 'DNS:elsewhere')):
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-subj', f'/CN={name}',
            '-addext', f'subjectAltName={host}', '-days', '2', '-keyout', d/f'{name}.key', '-out', d/f'{name}.pem'], check=True, capture_output=True)
    return d

@contextmanager
def tls_node(certificates, name='peer', handlers=()):
    "As `node`, with TLS, for who has the certificate `me`; its address"
    ae = AE('PEER')
    for o in (FIND, MOVE, GET, '1.2.840.10008.1.1'): ae.add_supported_context(o)
    for o in AllStoragePresentationContexts: ae.add_supported_context(o.abstract_syntax, SYNTAXES, True, True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates/'me.pem')
    context.load_cert_chain(certificates/f'{name}.pem', certificates/f'{name}.key')
    context.verify_mode = ssl.CERT_REQUIRED
    server = ae.start_server(('127.0.0.1', 0), block=False, evt_handlers=list(handlers), ssl_context=context)
    try: yield f'dicom-tls://PEER@127.0.0.1:{server.server_address[1]}'
    finally: server.shutdown()

def as_who(certificates, name='me', ca='peer'): return dict(ca=certificates/f'{ca}.pem', cert=certificates/f'{name}.pem', key=certificates/f'{name}.key', timeout=10)

def test_encrypted(films, certificates, tmp_path, monkeypatch):
    "Sent, fetched by C-GET, and by C-MOVE, where the archive connects with TLS as well; by the commands too"
    came, me, films = [], as_who(certificates), films[-4:]
    def store(event):
        came.append(event.dataset.SOPInstanceUID)
        return 0
    def move(event):
        "The archive is the client now"
        context = ssl.create_default_context(cafile=certificates/'me.pem')
        context.load_cert_chain(certificates/'peer.pem', certificates/'peer.key')
        ds = next(o for o in map(pydicom.dcmread, films) if o.SOPInstanceUID == event.identifier.SOPInstanceUID)
        yield '127.0.0.1', ours, dict(contexts=[build_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)], tls_args=(context, '127.0.0.1'))
        yield 1
        yield 0xFF00, ds
    ours = free_port()
    with tls_node(certificates, handlers=[*handing_out(films), (evt.EVT_C_STORE, store), (evt.EVT_C_MOVE, move)]) as address:
        assert set(send(films[:2], address, **ONE, **me).status) == {'stored'} and len(came) == 2
        check_fetched(fetch(address, {}, tmp_path/'get', most=100, **ONE, **me), films, tmp_path/'get')
        files = [o for k in ('ca', 'cert', 'key') for o in (f'--tls-{k}', str(me[k]))]
        r = CliRunner().invoke(main, ['send', str(films[0]), '--to', address, *files])
        assert r.exit_code == 0 and '1 of 1 stored' in r.output, r.output
        r = CliRunner().invoke(main, ['fetch', address, '--max', '2', '--out', str(tmp_path/'command'), *files])
        assert r.exit_code == 0 and '2 of 2 films' in r.output, r.output
        monkeypatch.setattr('dicomcam.dimse._GET', '1.2.3')
        check_fetched(fetch(address, find(address, most=100, **me), tmp_path/'move', port=ours, **ONE, **me), films, tmp_path/'move')
        with pytest.raises(OSError) as e: fetch(address, find(address, most=100, **me), tmp_path/'none', port=ours, **ONE, **me|dict(key=None, cert=None))
        one_line(e, 'certificate')

@pytest.mark.parametrize('name, who, says', [
    ('peer', dict(ca='other'), 'its certificate is not believed: self-signed certificate'),
    ('elsewhere', dict(ca='elsewhere'), "certificate is not valid for '127.0.0.1'"),
    ('peer', dict(name='other'), 'certificate of'), # refused, or cut off before it could say so
])
def test_wrong_certificate(name, who, says, films, certificates):
    with tls_node(certificates, name) as address:
        for work in (lambda **kw: find(address, most=1, **kw), lambda **kw: send(films[:1], address, **ONE, **kw)):
            with pytest.raises(OSError) as e: work(**as_who(certificates, **who))
            one_line(e, says, 'PEER@127.0.0.1')

def test_expired(films, certificates, tmp_path):
    "The peer's, or this side's: told so, and not that somebody is to be named"
    for o in ('peer', 'me'):
        run = partial(subprocess.run, check=True, capture_output=True)
        run(['openssl', 'req', '-new', '-key', certificates/f'{o}.key', '-subj', f'/CN={o}', '-addext', 'subjectAltName=IP:127.0.0.1', '-out', tmp_path/'csr'])
        (tmp_path/'ca').mkdir(exist_ok=True)
        (tmp_path/'ca'/'index').write_text('')
        (tmp_path/'ca.cnf').write_text(f'[ca]\ndefault_ca=a\n[a]\ndatabase={tmp_path}/ca/index\nnew_certs_dir={tmp_path}/ca\npolicy=p\nrand_serial=yes\ndefault_md=sha256\ncopy_extensions=copy\n[p]\ncommonName=supplied\n')
        run(['openssl', 'ca', '-config', tmp_path/'ca.cnf', '-batch', '-selfsign', '-keyfile', certificates/f'{o}.key', '-in', tmp_path/'csr', '-out', tmp_path/f'{o}.pem',
            '-startdate', '20200101000000Z', '-enddate', '20200102000000Z', '-notext'])
        shutil.copy(certificates/f'{o}.key', tmp_path)
    shutil.copy(certificates/'me.pem', tmp_path/'real.pem')
    shutil.move(tmp_path/'me.pem', tmp_path/'late.pem')
    shutil.copy(certificates/'me.pem', tmp_path/'me.pem')
    with tls_node(tmp_path) as address, pytest.raises(OSError) as e: find(address, most=1, **as_who(certificates)|dict(ca=tmp_path/'peer.pem'))
    one_line(e, 'certificate has expired')
    assert '--tls-ca' not in str(e.value)
    shutil.copy(tmp_path/'late.pem', tmp_path/'me.pem') # whom the node believes
    shutil.copy(certificates/'peer.pem', tmp_path/'peer.pem')
    with tls_node(tmp_path) as address, pytest.raises(OSError) as e: find(address, most=1, ca=certificates/'peer.pem', cert=tmp_path/'late.pem', key=certificates/'me.key', timeout=10)
    one_line(e, 'certificate of this side', 'expired')

@pytest.mark.posix
def test_key_that_all_may_read(certificates, tmp_path, recwarn):
    key = Path(shutil.copy(certificates/'me.key', tmp_path))
    for mode, told in ((0o600, 0), (0o640, 0), (0o644, 1)):
        key.chmod(mode)
        peer('dicom-tls://PEER@127.0.0.1:1', cert=certificates/'me.pem', key=key)
        assert len([o for o in recwarn if f'{key}: everybody on this machine may read this key' in str(o.message)]) == told

def test_no_certificate(films, certificates, tmp_path):
    "None of this side, none that is one, of whom nothing encrypts, to whom does not, or who says nothing"
    with tls_node(certificates) as address:
        with pytest.raises(OSError) as e: find(address, most=1, ca=certificates/'peer.pem')
        one_line(e, 'certificate of')
        with pytest.raises(ConnectionError) as e: find(address.replace('-tls', ''), most=1, timeout=2)
        one_line(e, 'does not answer as DICOM does')
    (tmp_path/'no.pem').write_text('no certificate')
    for wrong in (dict(ca=tmp_path/'none.pem'), dict(cert=certificates/'me.pem', key=tmp_path/'none.key')):
        with pytest.raises(FileNotFoundError) as e: find('dicom-tls://PEER@127.0.0.1:1', most=1, **wrong)
        one_line(e, str([*wrong.values()][-1])+': no such file')
    for wrong in (dict(ca=tmp_path/'no.pem'), dict(cert=certificates/'me.pem', key=certificates/'other.key'), dict(key=certificates/'me.key')):
        for address in ('dicom-tls://PEER@127.0.0.1:1', 'https://127.0.0.1:1'):
            with pytest.raises(OSError) as e: find(address, most=1, **wrong)
            one_line(e, 'no certificate', str([*wrong.values()][0]))
    subprocess.run(['openssl', 'ec', '-in', certificates/'me.key', '-aes128', '-passout', 'pass:word', '-out', tmp_path/'locked.key'], check=True, capture_output=True)
    with pytest.raises(OSError) as e: find('dicom-tls://PEER@127.0.0.1:1', most=1, cert=certificates/'me.pem', key=tmp_path/'locked.key')
    one_line(e, 'locked.key', 'locked by a password') # and asks nobody for it
    with node() as address, pytest.raises(OSError) as e: find(address.replace('dicom', 'dicom-tls'), most=1, **as_who(certificates))
    one_line(e, 'does not speak TLS')
    with raw(lambda c: None) as address, pytest.raises(ConnectionError) as e: find(address.replace('dicom', 'dicom-tls'), most=1, **as_who(certificates)|dict(timeout=.5))
    one_line(e, 'was silent for 0.5 seconds')
    with pytest.raises(ValueError, match='is not encrypted'): find('dicom://PEER@127.0.0.1:1', most=1, **as_who(certificates))

def test_encrypted_web(films, certificates, tmp_path):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates/'me.pem')
    context.load_cert_chain(certificates/'peer.pem', certificates/'peer.key')
    context.verify_mode = ssl.CERT_REQUIRED
    with web(films[:2], context=context) as (address, _):
        address = address.replace('http', 'https')
        assert fetch(address, {}, tmp_path, most=1, **ONE, **as_who(certificates)).error.isna().all()
        for who in (as_who(certificates, ca='other'), as_who(certificates, 'other')):
            with pytest.raises(OSError) as e: find(address, most=1, **who)
            one_line(e, address)

def test_too_large(films, tmp_path):
    with node(handing_out(films[:1])) as address, pytest.raises(ConnectionError) as e: fetch(address, {}, tmp_path, most=1, max_bytes=2000, **ONE)
    one_line(e, 'sends more than')
    assert not list(tmp_path.rglob('*.dcm'))

def test_no_room(films, tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    with node(handing_out(films[:2])) as address:
        monkeypatch.setattr(Path, 'write_bytes', full)
        with pytest.raises(OSError) as e: fetch(address, {}, tmp_path, most=100, **ONE)
    one_line(e, 'No space left', '.dcm')
    assert not isinstance(e.value, ConnectionError) and not [o for o in tmp_path.rglob('*') if o.is_file()]

def test_no_way_to_get(films, tmp_path):
    "C-MOVE needs a port of our own, and a name that the archive knows"
    with node(handing_out(films[:1]), get=False) as address, pytest.raises(OSError) as e: fetch(address, {}, tmp_path, most=1, **ONE)
    one_line(e, 'has no C-GET', '--port')

# DICOMweb that misbehaves

@contextmanager
def web(films, answer=lambda request, film: None, context=None):
    "A DICOMweb service that has films; `answer` may answer in its stead: a code, or bytes of a film. Its address, and all requests"
    films, seen = [pydicom.dcmread(o) for o in films], []
    class Service(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *args): pass
        def reply(self, code, body, kind):
            self.send_response(code)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def do_GET(self):
            seen.append((self.path, dict(self.headers)))
            here = [o for o in films if all(u in (o.StudyInstanceUID, o.SeriesInstanceUID, o.SOPInstanceUID) for u in re.findall(r'/([0-9.]+)', self.path.split('?')[0])[0:])]
            one = '/instances/' in self.path
            said = answer(self, here[0] if one else None)
            if isinstance(said, int): return self.reply(said, b'', 'text/plain')
            if said is None and one:
                said = io.BytesIO()
                here[0].save_as(said)
                said = said.getvalue()
            if one: return self.reply(200, b'--x\r\nContent-Type: application/dicom\r\n\r\n'+said+b'\r\n--x--', 'multipart/related; boundary=x')
            rows = [json.loads(o.to_json(bulk_data_threshold=0, bulk_data_element_handler=lambda _: 'x')) for o in here] if 'offset=0' in self.path else []
            self.reply(200, said or json.dumps(rows).encode(), 'application/dicom+json')
    with ThreadingHTTPServer(('127.0.0.1', 0), Service) as server:
        if context: server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=[.02], daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', seen
        server.shutdown()

def test_web_service(films, tmp_path):
    "One film is not there, the service is busy once, and breaks off once: what can be had is had"
    calls = {}
    def answer(request, film):
        if film is None: return
        n = calls[film.SOPInstanceUID] = calls.get(film.SOPInstanceUID, 0)+1
        i = len(calls)
        if i == 2: return 404
        if i == 3 and n == 1: return 503
        if i == 4 and n == 1:
            request.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf')
            request.close_connection = True
            raise ConnectionResetError
    with web(films[:5], answer) as (address, _): df = fetch(address, {}, tmp_path, most=100, pause=0, progress=False)
    assert list(df.error.notna()) == [False, True, False, False, False] and 'HTTP 404' in df.error[1]

@pytest.mark.parametrize('what, says', [(b'', 'is empty'), (b'garbage'*100, 'not a DICOM file'), ('cut', 'cut off'), ('bomb', 'deeply')])
def test_what_comes_is_no_film(what, says, films, tmp_path):
    import bombs
    if what == 'cut': what = films[0].read_bytes()[:-100]
    if what == 'bomb': what = bombs.within(10**5, True)
    with web(films[:1], lambda _, film: film and what) as (address, _): df = fetch(address, {}, tmp_path, most=1, **ONE)
    assert says in df.error[0] and not [o for o in tmp_path.rglob('*') if o.is_file()]

@pytest.mark.parametrize('said, says', [(b'<html>', 'no DICOM JSON'), (b'['*10**5, 'no DICOM JSON'), (b'{"a": 1}', 'no DICOM JSON'), (b'[1]', 'no DICOM JSON'),
    (b'[]'+b' '*10**6, 'more than'), (401, 'does not let this side in'), (500, 'HTTP 500'), (503, 'just now'), (302, 'HTTP 302')])
def test_no_web_service(said, says):
    with web([], lambda *_: said) as (address, _), pytest.raises(OSError) as e: find(address, dict(PatientName='Doe^*'), max_bytes=10**5+1)
    one_line(e, says, address)
    assert 'Doe' not in str(e.value)

def test_silent_web_service():
    with raw(lambda c: None) as address, pytest.raises(ConnectionError) as e: find(address.replace('dicom://PEER@', 'http://'), most=1, timeout=.5)
    one_line(e, 'was silent for 0.5 seconds')

@pytest.mark.parametrize('name, value, header', [('DICOMCAM_TOKEN', 's3cret', 'Bearer s3cret'), ('DICOMCAM_LOGIN', 'ada:s3cret', 'Basic YWRhOnMzY3JldA==')])
@pytest.mark.parametrize('file', [False, True])
def test_secrets(name, value, header, file, tmp_path, monkeypatch, caplog):
    "They come from the environment or a file, go to the archive alone, and are told nobody"
    caplog.set_level(0)
    (tmp_path/'secret').write_text(value+'\n')
    monkeypatch.setenv(f'{name}_FILE' if file else name, str(tmp_path/'secret') if file else value)
    with web([], lambda *_: 403) as (address, seen):
        with pytest.raises(PermissionError) as e: find(address, dict(PatientID='17'))
    assert seen[0][1]['Authorization'] == header
    with pytest.raises(ValueError) as refused: find('http://192.0.2.1/dicom-web', most=1)
    assert 'https' in str(refused.value)
    assert 's3cret' not in f'{e.value}{refused.value}{caplog.text}' and repr(peer(address)).count('s3cret') == 0
    with pytest.raises(ValueError) as e: peer('https://ada:s3cret@archive')
    assert 's3cret' not in str(e.value)

def test_large_answer(films, tmp_path):
    with web(films[:1]) as (address, _), pytest.raises(OSError) as e: fetch(address, find(address, most=1), tmp_path, max_bytes=1000, **ONE)
    one_line(e, 'sends more than 1,000 bytes')

# the structured report

def test_report_of_a_finding(folder, tiny_learner, tmp_path):
    "Patient, study and film are those of the film, the region is the segmentation, and dciodvfy and dcmtk find no error"
    import highdicom as hd
    from dicomcam.all import gradcam, save_seg, save_sr
    file = sorted(folder.rglob('*.dcm'))[0]
    h = gradcam(tiny_learner, [file])
    seg = save_seg(h, 0, tmp_path/'seg.dcm')
    fn = save_sr(seg, tmp_path/'sr.dcm', 'Pneumo\\thorax\n'*9, .123, 'gradcam', ['m.safetensors', 'sha256 0a1b'])
    sr, film = hd.sr.srread(fn), pydicom.dcmread(file)
    for o in ('PatientID', 'PatientName', 'StudyInstanceUID'): assert sr[o].value == film[o].value
    text = fn.read_bytes()
    for o in (film.SOPInstanceUID, pydicom.dcmread(seg).SOPInstanceUID, 'm.safetensors', 'sha256 0a1b', 'NOT FOR DIAGNOSTIC USE', '0.123'): assert o.encode() in text
    assert (sr.CompletionFlag, sr.VerificationFlag) == ('PARTIAL', 'UNVERIFIED')
    region, box = sr.content.get_planar_roi_measurement_groups()
    assert region.finding_type.value == '309825002' and len(region.get_measurements()) == 1
    assert box.tracking_uid == region.tracking_uid and box.roi.GraphicType == 'POLYLINE' # OHIF shows a report by its shapes
    for tool in ('dciodvfy', 'dsrdump'):
        if shutil.which(tool):
            r = subprocess.run([tool, fn], capture_output=True, text=True)
            assert r.returncode == 0 and 'Error' not in r.stderr and 'E:' not in r.stderr, r.stderr
