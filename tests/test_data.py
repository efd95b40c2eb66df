"The phantom (layout, masks, same bytes, no shortcut), its cache, where data comes from on line and off, and whose lesion is where."
import functools, gzip, hashlib, http.server, importlib.util, os, shutil, socket, subprocess, sys, tarfile, threading, time
from pathlib import Path

import cv2, numpy as np, pandas as pd, pydicom, pytest
from PIL import Image
from pydicom.uid import JPEGBaseline8Bit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dicomcam import anatomy, data, patients, projection, solids
from dicomcam import phantom as phantom_
from dicomcam.data import DownloadError, get_data, lesion_mask, phantom, rle_mask, siim_small

# tag and VR of the elements of a SIIM_SMALL file, in their order
SIIM = '''00080005CS 00080016UI 00080018UI 00080020DA 00080030TM 00080050SH 00080060CS 00080064CS 00080090PN 0008103ELO 00100010PN 00100020LO
00100030DA 00100040CS 00101010AS 00180015CS 00185101CS 0020000DUI 0020000EUI 00200010SH 00200011IS 00200013IS 00200020CS 00280002US 00280004CS
00280010US 00280011US 00280030DS 00280100US 00280101US 00280102US 00280103US 00282110CS 00282114CS 7FE00010OB'''.split()

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache')); monkeypatch.delenv('DICOMCAM_DATA', raising=False)
    return tmp_path/'cache'/'dicomcam'

@pytest.fixture(scope='module')
def small(tmp_path_factory): return phantom(tmp_path_factory.mktemp('p')/'small', n=12, size=128, seed=5, n_jobs=1, progress=False)

def read(p):
    with pydicom.config.disable_value_validation(): return pydicom.dcmread(p)

def content(p): return {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}
def mask_of(p, f): return cv2.imread(str(p/'masks'/f.rsplit('/', 1)[1].replace('.dcm', '.png')), cv2.IMREAD_UNCHANGED)

def run(code, env=None, **kw):
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=600, **kw)

# --- the phantom

def test_same_bytes_whatever_the_processes(small, tmp_path):
    two = phantom(tmp_path/'two', n=12, size=128, seed=5, n_jobs=2, progress=False)
    assert content(small)==content(two)
    assert content(small)!=content(phantom(tmp_path/'other', n=12, size=128, seed=6, progress=False))

def test_layout(small):
    df = pd.read_csv(small/'labels.csv'); box = pd.read_csv(small/'boxes.csv')
    assert list(df.columns)==['file','label'] and list(box.columns)==['file','x','y','width','height'] and len(df)==12
    assert sorted(df.file)==sorted(str(f.relative_to(small).as_posix()) for f in small.rglob('*.dcm'))
    assert (df.file.str.split('/').str[1]==df.label).all() and set(df.label)=={'No Pneumothorax','Pneumothorax'}
    ill = df.file[df.label=='Pneumothorax']
    assert set(box.file)==set(ill) and {f.name for f in (small/'masks').iterdir()}=={f[-10:-4]+'.png' for f in ill}

def test_masks_and_boxes_agree(small):
    for f,*b in pd.read_csv(small/'boxes.csv').values:
        m = mask_of(small, f)
        assert m.dtype==np.uint8 and m.shape==read(small/f).pixel_array.shape and set(np.unique(m))=={0,255}
        ys,xs = np.nonzero(m)
        assert b==[xs.min(), ys.min(), np.ptp(xs)+1, np.ptp(ys)+1]

def test_header_is_siims(small):
    for f in small.rglob('*.dcm'):
        ds = read(f)
        assert [f'{int(e.tag):08X}{e.VR}' for e in ds]==SIIM
        assert ds.file_meta.TransferSyntaxUID==JPEGBaseline8Bit and ds.Modality=='CR' and ds.PhotometricInterpretation=='MONOCHROME2'
        assert str(ds.PatientName)==ds.PatientID and ds.PatientAge.isdigit() and ds.SeriesDescription==f'view: {ds.ViewPosition}'
        im = ds.pixel_array
        assert im.shape==(128,128) and im.dtype==np.uint8 and 70<im.mean()<190 and im.std()>35

def test_patients_and_balance():
    plan = phantom_.who_comes(250, 42)
    assert len({w for w,_ in plan})==209 and sum(p for _,p in plan)==75
    assert [p for _,p in plan]!=sorted(p for _,p in plan) # labels are not in the order of the files

def test_one_patient_one_anatomy(tmp_path):
    p = phantom(tmp_path/'p', n=60, size=32, progress=False)
    who = pd.DataFrame([(d.PatientID, d.PatientSex, d.PatientAge) for d in map(read, p.rglob('*.dcm'))], columns=['id','sex','age']).drop_duplicates()
    assert who.id.is_unique and len(who)==50
    assert len({read(f).SOPInstanceUID for f in p.rglob('*.dcm')})==60

def pair(seed, size=256):
    "the same study with and without its pneumothorax, with the lesion"
    a = patients.study(np.random.default_rng(seed), patients.patient(np.random.default_rng(seed+100)), True)
    ill,mask = anatomy.layers(a, size); side = a.ptx.side
    a.ptx = None; well,none = anatomy.layers(a, size)
    assert not none.any()
    return ill, well, mask, side

@pytest.mark.parametrize('seed', range(6))
def test_lesion_is_air_without_vessels(seed):
    ill,well,mask,side = pair(seed)
    x = np.broadcast_to(solids.grid(256)[0], mask.shape)
    assert mask.any() and (x[mask]*side>-3).all()
    assert np.abs(ill['lungs'])[mask].max()<1e-6 and ill['vessels'][mask].max()<1e-6 # nothing but air on those rays
    assert well['lungs'][mask].min()>0                                            # where the same patient, well, has lung
    assert np.allclose(ill['lungs'][x*side<-4], well['lungs'][x*side<-4])         # the other lung is as it was
    beside = (~mask)&(well['lungs']>.1)&(x*side>4)
    assert (ill['lungs'][beside]>=well['lungs'][beside]-1e-6).mean()>.9           # the lung left over is denser
    assert ill['pleura'].max()>0 and np.max(well['pleura'])==0

def test_scale_free():
    ims = []
    for size in (256,512,1024):
        rng = np.random.default_rng(3)
        im,m = projection.render(patients.study(rng, patients.patient(np.random.default_rng(4)), True), size, rng)
        ims.append([cv2.resize(o, (128,128), interpolation=cv2.INTER_AREA).astype(float) for o in (im,m)])
    for im,m in ims[1:]:
        assert np.corrcoef(im.ravel(), ims[0][0].ravel())[0,1]>.995
        a,b = m>127, ims[0][1]>127
        assert (a&b).sum()/(a|b).sum()>.95

# --- no shortcut

def features(p):
    for f,label in pd.read_csv(p/'labels.csv').values:
        d = read(p/f); im = d.pixel_array
        yield dict(y=label=='Pneumothorax', id=d.PatientID, sex=d.PatientSex=='F', age=int(d.PatientAge), ap=d.ViewPosition=='AP',
            spacing=float(d.PixelSpacing[0]), bytes=len(d.PixelData), mean=im.mean(), std=im.std(), min=im.min(), max=im.max(),
            **{f'p{q}': np.percentile(im, q) for q in (1,5,10,25,50,75,90,95,99)})

def auc(t, cols):
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return roc_auc_score(t.y, cross_val_predict(model, t[cols].astype(float), t.y, groups=t.id, cv=GroupKFold(5), method='predict_proba')[:,1])

def test_no_shortcut(tmp_path):
    ts = [pd.DataFrame(features(phantom(tmp_path/str(s), n=160, size=96, seed=s, progress=False))) for s in (1,2,3)]
    header = ['sex','age','ap','spacing','bytes']; pixel = [c for c in ts[0] if c not in header+['y','id']]
    for cols in (header, pixel, header+pixel):
        found = [auc(t, cols) for t in ts]
        assert np.mean(found)<=.65, f'{cols}: {found}'
    planted = ts[0].assign(mean=ts[0]['mean']+20*ts[0].y) # and one that is there is found
    assert auc(planted, pixel)>.65

# --- the cache

def test_cache(cache):
    p = phantom(n=2, size=32, progress=False)
    assert p.parent==cache and (p/'phantom.json').exists() and [o.name for o in cache.iterdir()]==[p.name]
    stamp = (p/'labels.csv').stat().st_mtime_ns
    assert phantom(n=2, size=32, progress=False)==p and (p/'labels.csv').stat().st_mtime_ns==stamp
    (p/'phantom.json').unlink() # not whole: made anew
    assert phantom(n=2, size=32, progress=False)==p and (p/'phantom.json').exists()

def test_cache_is_bounded(cache):
    ps = []
    for s in range(phantom_._KEEP+2):
        ps.append(phantom(n=2, size=32, seed=s, n_jobs=1, progress=False)); os.utime(ps[-1]/'phantom.json', (1e9+s,)*2)
    assert len(list(cache.iterdir()))==phantom_._KEEP and ps[-1].exists() and not ps[0].exists()

def test_killed_run_leaves_nothing_half_written(cache):
    code = 'from dicomcam.data import phantom; phantom(n=2000, size=512, n_jobs=1, progress=False)' # minutes
    p = subprocess.Popen([sys.executable, '-c', code], env=os.environ)
    while not list(cache.glob('.*/train/*/*.dcm')) and p.poll() is None: time.sleep(.05)
    p.kill(); p.wait()
    left = list(cache.iterdir())
    assert len(left)==1 and left[0].name.endswith('.part')
    phantom(n=2, size=32, n_jobs=1, progress=False)
    assert left[0].exists() # it may belong to a run that is still going
    os.utime(left[0], (1e9,1e9)); phantom(n=3, size=32, n_jobs=1, progress=False)
    assert not left[0].exists()

def test_failed_run_leaves_nothing(cache, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(phantom_, '_make_one', stop)
    with pytest.raises(KeyboardInterrupt): phantom(n=2, size=32, n_jobs=1, progress=False)
    assert not cache.exists() or not list(cache.iterdir())

def test_two_processes_one_folder(cache):
    code = 'from dicomcam.data import phantom; print(phantom(n=6, size=64, n_jobs=1, progress=False))'
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    out = [p.communicate(timeout=600) for p in ps]
    assert all(p.returncode==0 for p in ps), out
    assert len({o[0] for o in out})==1 and len(list(cache.iterdir()))==1 and len(list(cache.rglob('*.dcm')))==6

@pytest.mark.parametrize('late', [False, True])
def test_another_process_was_faster(cache, monkeypatch, late):
    "Its phantom stays, untouched: this one's is thrown away, whether it came in time to be seen or in the very last moment"
    make, is_phantom = phantom_._make, phantom_._is_phantom
    out, asked = cache/f'phantom-{phantom_._VERSION}-2-32-42', []
    def other(part, *args):
        make(part, *args)
        monkeypatch.setattr(phantom_, '_make', make)
        phantom(n=2, size=32, n_jobs=1, progress=False)
        (out/'labels.csv').write_text('the first one')
    def blind(folder, key):
        asked.append(folder)
        return len(asked) != 4 and is_phantom(folder, key) # the fourth look is that before the renaming
    monkeypatch.setattr(phantom_, '_make', other)
    if late:
        monkeypatch.setattr(phantom_, '_is_phantom', blind)
        monkeypatch.setattr(phantom_, 'remove', lambda path: None) # it was not there to be seen, hence not removed either
    assert phantom(n=2, size=32, n_jobs=1, progress=False)==out
    assert (out/'labels.csv').read_text()=='the first one' and [o.name for o in cache.iterdir()]==[out.name]

def test_dest(small, tmp_path):
    (tmp_path/'empty').mkdir(); (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    assert len(list(phantom(tmp_path/'empty', n=2, size=32, progress=False).rglob('*.dcm')))==2
    for bad in ('mine', 'mine/thesis.txt'):
        with pytest.raises(FileExistsError, match='not empty and not this phantom'): phantom(tmp_path/bad, n=2, size=32)
    assert (tmp_path/'mine'/'thesis.txt').read_text()=='x' and not list(tmp_path.glob('.*'))
    before = content(small)
    assert phantom(small, n=12, size=128, seed=5)==small and content(small)==before
    with pytest.raises(FileExistsError): phantom(small, n=12, size=128, seed=6)

@pytest.mark.parametrize('kw', [dict(n=1), dict(n=0), dict(size=8)])
def test_absurd_sizes(kw):
    with pytest.raises(ValueError, match='at least'): phantom(**{'n':2, 'size':32, **kw})

# --- SIIM_SMALL and get_data

@pytest.fixture
def siim(tmp_path, monkeypatch):
    "fastai as on a fresh machine, and where it would download SIIM_SMALL from"
    import fastai.data.external as ext
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'fastai')); ext.fastai_cfg.cache_clear()
    def at(url): monkeypatch.setattr(ext.URLs, 'SIIM_SMALL', url); return tmp_path/'fastai'
    yield at
    ext.fastai_cfg.cache_clear()

@pytest.fixture
def server(tmp_path):
    (tmp_path/'www').mkdir()
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(tmp_path/'www')))
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    yield tmp_path/'www', f'http://127.0.0.1:{s.server_port}/siim_small.tgz'
    s.shutdown(); s.server_close()

def archive(small, fn):
    with tarfile.open(fn, 'w:gz') as t: t.add(small/'train', 'siim_small/train'); t.add(small/'labels.csv', 'siim_small/labels.csv')

def test_siim_small_downloads(siim, server, small, capsys):
    www,url = server; home = siim(url); archive(small, www/'siim_small.tgz')
    p = siim_small(PATIENT)
    assert p.name=='siim_small' and home in p.parents and content(p/'train')==content(small/'train')
    assert pd.read_csv(p/'labels.csv').shape==(12,2)
    (www/'siim_small.tgz').unlink()
    assert siim_small()==p and get_data()==p # no server needed any more
    assert 'SIIM_SMALL: ' in capsys.readouterr().out.splitlines()[-1]

def test_siim_small_from_an_archive_put_there(siim, small):
    home = siim(f'http://127.0.0.1:{closed()}/siim_small.tgz')
    with pytest.raises(DownloadError) as e: siim_small()
    (home/'archive').mkdir(parents=True, exist_ok=True); archive(small, home/'archive'/'siim_small.tgz')
    assert str(home/'archive'/'siim_small.tgz') in str(e.value)  # the place that the message names is the place looked at
    assert content(siim_small()/'train')==content(small/'train')

def closed():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

PATIENT = 300 # seconds: where somebody answers, a slow machine may take its time

def refused(timeout=PATIENT):
    with pytest.raises(DownloadError, match='phantom') as e: siim_small(timeout)
    assert '\n' not in str(e.value)
    return str(e.value)

def test_offline_nothing_answers(siim): siim(f'http://127.0.0.1:{closed()}/siim_small.tgz'); refused()
def test_offline_server_without_it(siim, server): siim(server[1]); assert '404' in refused()

def test_offline_damaged_archive(siim, server):
    www,url = server; siim(url); (www/'siim_small.tgz').write_bytes(b'not an archive'); refused()

def test_offline_server_that_hangs(siim):
    "It would hang for ever: to come back at all is the test"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(5); siim(f'http://127.0.0.1:{s.getsockname()[1]}/siim_small.tgz'); refused(timeout=1)

def test_offline_name_server_that_hangs(siim, monkeypatch):
    siim('http://nowhere.invalid/siim_small.tgz')
    answer = threading.Event()
    def hang(*a, **k):
        answer.wait() # nobody has told us yet when we come back
        raise socket.gaierror
    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    try:
        refused(timeout=1)
        assert not answer.is_set()
    finally: answer.set()

def test_get_data(siim, monkeypatch, small, tmp_path, capsys):
    siim(f'http://127.0.0.1:{closed()}/siim_small.tgz')
    monkeypatch.setattr(data, 'phantom', lambda: small)
    assert get_data()==small and 'cannot be downloaded' in capsys.readouterr().out # it says so
    assert get_data('phantom')==small==get_data(small)==get_data(str(small))
    with pytest.raises(DownloadError): get_data('siim')
    monkeypatch.setenv('DICOMCAM_DATA', str(small)); capsys.readouterr()
    assert get_data()==small and capsys.readouterr().out.startswith('$DICOMCAM_DATA')
    monkeypatch.setenv('DICOMCAM_DATA', str(tmp_path/'gone'))
    with pytest.raises(FileNotFoundError, match=r'gone is not a folder \(\$DICOMCAM_DATA\).*labels.csv'): get_data()

def test_light_import():
    r = run('import sys, dicomcam.data; print([m for m in ("torch","fastai") if m in sys.modules])')
    assert r.stdout.strip()=='[]', r.stderr

# --- where the lesions are

@pytest.fixture
def films(small, tmp_path):
    "Two patients' films of one name, and one of another; no masks, no boxes. 128 x 128 pixels"
    out, some = tmp_path/'films', sorted((small/'train').rglob('*.dcm'))
    for o, source in zip(('A/1.dcm', 'B/1.dcm', 'B/2.dcm'), some):
        (out/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, out/o)
    (out/'masks').mkdir()
    return out

def draw(fn, at=(3, 4), size=(128, 128), mode='L'):
    m = np.zeros(size, np.uint8); m[at] = 255
    fn.parent.mkdir(parents=True, exist_ok=True)
    im = Image.fromarray(m)
    if mode == 'RGBA': im = Image.merge('RGBA', [im, im, im, Image.new('L', im.size, 255)]) # opaque everywhere
    elif mode == 'I;16': im = Image.fromarray(m.astype(np.uint16)*200)
    elif mode == 'RGB': im = Image.merge('RGB', [im, Image.new('L', im.size), Image.new('L', im.size)])
    else: im = im.convert(mode)
    im.save(fn)

def spot(mask): return [tuple(int(k) for k in o) for o in np.argwhere(mask)]

def boxes(films, *rows, header='file,x,y,width,height'): (films/'boxes.csv').write_text('\n'.join([header, *rows])+'\n')

def refuses(films, file, *says):
    with pytest.raises(ValueError) as e: lesion_mask(films, films/file)
    assert '\n' not in str(e.value) and all(o in str(e.value) for o in says), e.value

def test_films_of_one_name_do_not_share_a_mask(films):
    draw(films/'masks'/'1.png')
    for o in 'A/1.dcm', 'B/1.dcm': refuses(films, o, '1.png', 'A/1.dcm', 'B/1.dcm', f'masks/{o}.png')
    draw(films/'masks'/'A'/'1.png', (5, 6))
    assert spot(lesion_mask(films, films/'A'/'1.dcm')) == [(5, 6)]
    refuses(films, 'B/1.dcm', 'masks/B/1.dcm.png')
    draw(films/'masks'/'B'/'1.dcm.png', (7, 8))
    assert spot(lesion_mask(films, films/'B'/'1.dcm')) == [(7, 8)]
    (films/'masks'/'1.png').unlink()
    assert lesion_mask(films, films/'B'/'2.dcm') is None

def test_a_mask_beside_all_others(films):
    draw(films/'masks'/'2.png')
    for o in '2.json', '2.txt': (films/'B'/o).write_text('{"no": "film"}') # what else is called so is no film
    (films/'B'/'2').mkdir(); (films/'A'/'2').symlink_to('nowhere'); (films/'A'/'loop').symlink_to(films)
    (films/'A'/'2.link').symlink_to(films/'B'/'2.dcm') # the same film
    assert spot(lesion_mask(films, films/'B'/'2.dcm')) == [(3, 4)]
    shutil.copy(films/'A'/'1.dcm', films/'2.ima') # another film, another ending
    refuses(films, 'B/2.dcm', '2.ima')

def test_masks_of_films_named_by_uid(films):
    "1.2.3 and 1.2.4 are films of one 'stem'"
    for o, name in ('1.dcm', '1.2.3'), ('2.dcm', '1.2.4'): (films/'B'/o).rename(films/'B'/name)
    draw(films/'masks'/'B'/'1.2.png')
    for o in '1.2.3', '1.2.4': refuses(films, f'B/{o}', f'masks/B/{o}.png')
    draw(films/'masks'/'B'/'1.2.4.png', (9, 9))
    assert spot(lesion_mask(films, films/'B'/'1.2.4')) == [(9, 9)]

def test_films_behind_a_link_are_looked_at(films, tmp_path):
    (films/'A').rename(tmp_path/'elsewhere'); (films/'A').symlink_to(tmp_path/'elsewhere')
    draw(films/'masks'/'1.png')
    refuses(films, 'B/1.dcm', 'A/1.dcm')

def test_a_film_of_another_folder(films, tmp_path):
    "Another hospital's film of the same name has none of this folder's lesions"
    draw(films/'masks'/'2.png')
    other = shutil.copy(films/'B'/'2.dcm', tmp_path/'2.dcm')
    with pytest.warns(UserWarning, match='2.png is not taken for .*2.dcm, which is not in'): assert lesion_mask(films, other) is None

def test_however_the_film_is_spelled(films, tmp_path, monkeypatch):
    draw(films/'masks'/'B'/'2.png')
    boxes(films, 'A\\1.dcm,1,1,1,1', ' B/../A/1.dcm ,2,2,1,1')
    (tmp_path/'link').symlink_to(films)
    monkeypatch.chdir(tmp_path)
    for path, under in (films, 'films'), ('films', films), ('link', films), (films, 'link'), ('films/A/..', films/'B'/'..'):
        for o, found in ('B/2.dcm', [(3, 4)]), ('A/1.dcm', [(1, 1), (2, 2)]):
            assert spot(lesion_mask(path, Path(under)/o)) == found

@pytest.mark.parametrize('size', [(64, 64), (128, 64), (256, 256)])
def test_a_mask_of_another_size(films, size):
    draw(films/'masks'/'2.png', size=size)
    refuses(films, 'B/2.dcm', f'{size[0]} x {size[1]} pixels, its film 128 x 128')

@pytest.mark.parametrize('mode', ['L', '1', 'P', 'RGB', 'RGBA', 'I;16'])
def test_a_mask_of_any_mode(films, mode):
    draw(films/'masks'/'2.png', mode=mode)
    assert spot(lesion_mask(films, films/'B'/'2.dcm')) == [(3, 4)]

@pytest.mark.parametrize('cut', [0, 10, 60])
def test_a_mask_that_is_no_image(films, cut):
    fn = films/'masks'/'2.png'
    draw(fn); fn.write_bytes(fn.read_bytes()[:cut])
    refuses(films, 'B/2.dcm', str(fn), 'cannot be read as an image')

def test_a_mask_of_no_image(films):
    draw(films/'masks'/'2.png')
    ds = read(films/'B'/'2.dcm'); del ds.PixelData, ds.Rows, ds.Columns; ds.save_as(films/'B'/'2.dcm')
    refuses(films, 'B/2.dcm', 'holds no image')

@pytest.mark.parametrize('header, says', [('file,x,y,width', 'no column height'), ('name,x,y,w,h', 'no column file, width, height'), ('B/2.dcm,1,2,3,4', 'no column file, x')])
def test_boxes_without_their_columns(films, header, says):
    boxes(films, 'B/2.dcm,1,2,3,4'[:-2*(header.count(',') == 3) or None], header=header)
    refuses(films, 'B/2.dcm', 'boxes.csv', says)

@pytest.mark.parametrize('row', ['1,2,3,', ',2,3,4', 'a,2,3,4', '1,2,0,4', '1,2,3,-4', '1,2,inf,4', 'nan,2,3,4', '1,2,3,4;5', '1e999,2,3,4'])
def test_a_box_that_is_no_rectangle(films, row):
    boxes(films, 'A/1.dcm,1,1,1,1', f'B/2.dcm,{row}')
    refuses(films, 'A/1.dcm', 'boxes.csv', 'a box of B/2.dcm is no rectangle')

def test_a_film_without_a_rectangle(films):
    "As lists of healthy films have it"
    boxes(films, 'A/1.dcm,1,1,1,1', 'B/2.dcm,,,,')
    assert lesion_mask(films, films/'B'/'2.dcm') is None and spot(lesion_mask(films, films/'A'/'1.dcm')) == [(1, 1)]
    boxes(films, 'B/2.dcm,,,,')
    assert lesion_mask(films, films/'B'/'2.dcm') is None

@pytest.mark.parametrize('row', ['128,5,3,3', '5,200,3,3', '-9,5,3,3', '1e300,5,3,3', '-1e300,5,3,3'])
def test_a_box_outside_the_film(films, row):
    boxes(films, f'B/2.dcm,{row}')
    refuses(films, 'B/2.dcm', 'boxes.csv', 'a box of B/2.dcm lies at', 'its film has 128 x 128 pixels')

@pytest.mark.parametrize('row, n', [('126,126,5,5', 4), ('-2,-2,3,3', 1), ('-1e9,-1e9,1e10,1e10', 128**2)])
def test_a_box_that_leaves_the_film(films, row, n):
    boxes(films, f'B/2.dcm,{row}')
    with pytest.warns(UserWarning, match='cut at its edge'): assert lesion_mask(films, films/'B'/'2.dcm').sum() == n

def test_a_box_smaller_than_a_pixel(films):
    boxes(films, 'B/2.dcm,4.2,3.2,.2,.2')
    assert spot(lesion_mask(films, films/'B'/'2.dcm')) == [(3, 4)]

def test_boxes_of_films_that_are_not_there(films):
    boxes(films, 'A/1.dcm,1,1,1,1', 'B/gone.dcm,1,1,1,1', '"x\n",1,1,1,1')
    with pytest.warns(UserWarning, match=r'2 of 3 files are not there, first .*gone.dcm'): assert lesion_mask(films, films/'B'/'2.dcm') is None
    boxes(films, 'images/1.dcm,1,1,1,1')
    refuses(films, 'B/2.dcm', '1 of 1 files are not there')

@pytest.mark.parametrize('encoding', ['utf-16', 'utf-8-sig'])
def test_boxes_of_a_spreadsheet(films, encoding):
    (films/'boxes.csv').write_bytes('file;x;y;width;height\r\nA/1.dcm;1;1;1;1\r\n;;;;\r\n'.encode(encoding))
    assert spot(lesion_mask(films, films/'A'/'1.dcm')) == [(1, 1)]
    (films/'boxes.csv').write_bytes(b'PK\3\4')
    refuses(films, 'A/1.dcm', 'boxes.csv', 'a spreadsheet')

def test_boxes_of_another_name(films):
    boxes(films, 'B/2.dcm,1,1,1,1')
    (films/'boxes.csv').rename(films/'readers.csv')
    assert lesion_mask(films, films/'B'/'2.dcm') is None
    assert spot(lesion_mask(films, films/'B'/'2.dcm', boxes='readers.csv')) == [(1, 1)]

# --- the lesions of SIIM_SMALL

UID = '1.2.276.0.7230010.3.1.4.8323329.%d.1517875%d.1' # as all of the challenge's
HIT, TWO, NONE = (UID % o for o in ((1, 201), (2, 202), (3, 203)))
LINES = [(NONE, '-1'), (TWO, '0 1'), (HIT, '2050 3 1021 2'), (TWO, '1048575 1')] # a film's lines need not be neighbours

def by_hand(line, rows=1024, cols=1024):
    "The same, pixel by pixel"
    mask, at, numbers = np.zeros((rows, cols), bool), 0, iter(map(int, line.split()))
    for skipped in numbers:
        at += skipped
        for _ in range(next(numbers)):
            mask[at%rows, at//rows] = True
            at += 1
    return mask

def table(lines): return gzip.compress(('ImageId, EncodedPixels\r\n'+''.join(f'{uid}, {line}\r\n' for uid, line in lines)).encode(), mtime=0)

@pytest.fixture
def challenge(films, server, monkeypatch):
    "Where the table can be downloaded, and a film that becomes one of the challenge: `film(uid)`"
    www, url = server
    (www/'rle.csv.gz').write_bytes(table(LINES))
    monkeypatch.setattr(data, 'find_spec', lambda name: None)
    monkeypatch.setattr(data, '_TABLE_URL', url.replace('siim_small.tgz', 'rle.csv.gz'))
    monkeypatch.setattr(data, '_TABLE_SHA256', hashlib.sha256(table(LINES)).hexdigest())
    clear = data._siim_lines.cache_clear
    clear()
    def film(uid, size=1024):
        ds = read(films/'B'/'2.dcm')
        ds.SOPInstanceUID, ds.Rows, ds.Columns = uid, size, size
        ds.save_as(films/'B'/'2.dcm')
        return lesion_mask(films, films/'B'/'2.dcm')
    yield film
    clear()

@pytest.mark.parametrize('line', ['', '-1', '0 1', '5 0 1 2', '3 4 5 6', '34 1', '0 35'])
def test_run_lengths(line): np.testing.assert_array_equal(rle_mask(line, (5, 7)), by_hand('' if line == '-1' else line, 5, 7))

def test_run_lengths_of_several_lesions():
    np.testing.assert_array_equal(rle_mask(['3 4', '1 2 10 5'], (5, 7)), by_hand('3 4', 5, 7)|by_hand('1 2 10 5', 5, 7))
    assert rle_mask([]).shape == (1024, 1024) and not rle_mask([]).any()

@pytest.mark.parametrize('line', ['1', '1 2 3', '-1 4', '-1 -1', '0 36', '35 1', '1 99999999999999999999', '1 a', '1.0 2', '\u0661 2'])
def test_no_run_lengths(line):
    with pytest.raises(ValueError, match='no run lengths|goes beyond 5 x 7'): rle_mask(line, (5, 7))

def test_a_film_of_the_challenge(challenge, cache):
    assert spot(challenge(HIT)) == [(2, 2), (2, 3), (3, 2), (3, 3), (4, 2)]
    assert spot(challenge(TWO)) == [(0, 0), (1023, 1023)]
    assert challenge(NONE) is None and challenge(UID % (9, 209)) is None
    assert [o.name for o in (cache/'siim').iterdir()] == [data._TABLE]

def test_what_a_folder_says_comes_first(challenge, films):
    boxes(films, 'B/2.dcm,7,7,1,1')
    assert spot(challenge(HIT)) == [(7, 7)]
    draw(films/'masks'/'2.png', (9, 8), size=(1024, 1024))
    assert spot(challenge(HIT)) == [(9, 8)]

def test_the_table_is_downloaded_once(challenge, monkeypatch):
    challenge(HIT)
    data._siim_lines.cache_clear() # as in the next process
    monkeypatch.setattr(data, 'urlopen', None)
    assert challenge(HIT).any()

@pytest.mark.parametrize('uid', ['1.2.840.1', '1.2.276.0.7230010.3.1.4.8323329.1.1560082132.1', f'{HIT}.5', HIT.replace('8323329', '2831159')])
def test_films_of_other_hospitals_ask_nobody(challenge, monkeypatch, uid):
    monkeypatch.setattr(data, '_siim_lines', lambda: pytest.fail('the table is asked for'))
    assert challenge(uid) is None

def test_a_film_of_the_challenge_that_was_made_smaller(challenge): assert challenge(HIT, 512) is None

def test_what_cannot_be_read_has_no_lesion(challenge, films):
    (films/'B'/'2.dcm').write_bytes(b'')
    assert lesion_mask(films, films/'B'/'2.dcm') is None and lesion_mask(films, films/'gone.dcm') is None

@pytest.mark.parametrize('fault', ['gone', 'another file', 'nobody answers', 'cache'])
def test_the_table_cannot_be_had(challenge, cache, server, monkeypatch, fault):
    "One line, once; and no half of a file is kept"
    www, _ = server
    if fault == 'gone': (www/'rle.csv.gz').unlink()
    if fault == 'another file': (www/'rle.csv.gz').write_bytes(table(LINES[:1]))
    if fault == 'nobody answers': monkeypatch.setattr(data, '_TABLE_URL', f'http://127.0.0.1:{closed()}/rle.csv.gz')
    if fault == 'cache':
        cache.mkdir(parents=True); (cache/'siim').write_text('a file')
    with pytest.warns(UserWarning, match=r'masks of the SIIM challenge could not be had from http.*dicomcam\[xrv\]') as w: assert challenge(HIT) is None
    said = [str(o.message) for o in w if o.category is UserWarning] # sockets may be collected meanwhile, with warnings of their own
    assert len(said) == 1 and '\n' not in said[0]
    assert not cache.exists() or not list(cache.rglob('*.gz')) and not list(cache.rglob('*.part'))
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert challenge(TWO) is None # nobody is asked again

def test_the_table_of_a_server_that_hangs():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(5)
        with pytest.raises(OSError): data._fetched(f'http://127.0.0.1:{s.getsockname()[1]}/rle.csv.gz', 1)

def test_the_table_of_a_server_that_drips():
    "A byte now and then: no single wait is long, and it would take for ever"
    stop = threading.Event()
    class Drips(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            self.send_response(200); self.end_headers()
            while not stop.wait(.1): self.wfile.write(b'.')
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Drips)
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    try:
        with pytest.raises(OSError, match='within 1 seconds'): data._fetched(f'http://127.0.0.1:{s.server_port}/x', 1)
    finally: stop.set(); s.shutdown(); s.server_close()

def test_a_table_that_is_none(challenge, cache):
    (cache/'siim').mkdir(parents=True)
    for content in b'no gzip', table(LINES)[:40], gzip.compress(b'a,b,c\n1,2,3\n'):
        (cache/'siim'/data._TABLE).write_bytes(content); data._siim_lines.cache_clear()
        with pytest.warns(UserWarning, match='no lesion of a film of SIIM is known'): assert challenge(HIT) is None

@pytest.fixture(scope='module')
def lines():
    "UID -> lines, as torchxrayvision has them"
    if not importlib.util.find_spec('torchxrayvision'): pytest.skip('needs torchxrayvision: pip install "dicomcam[xrv]"')
    data._siim_lines.cache_clear()
    yield data._siim_lines()
    data._siim_lines.cache_clear()

def test_the_table_of_torchxrayvision(lines):
    "12,954 lines of 12,047 films; a lesion in 2,669 of them, a pneumothorax covers 1 % of a film, none a quarter"
    assert data._siim_table(1).name == data._TABLE
    assert hashlib.sha256(data._siim_table(1).read_bytes()).hexdigest() == data._TABLE_SHA256
    assert len(lines) == 12047 and sum(map(len, lines.values())) == 12954
    assert all(map(data._OF_SIIM.fullmatch, lines))
    ill = {uid: o for uid, o in lines.items() if [line.strip() for line in o] != ['-1']}
    share = np.array([sum(sum(map(int, line.split()[1::2])) for line in o) for o in ill.values()])/1024**2
    assert len(ill) == 2669 and .005 < np.median(share) < .02 and share.max() < .25

def test_masks_of_torchxrayvision(lines, challenge, monkeypatch):
    "Each run by hand; fastai's tutorial prints the header of 3297"
    assert lines[UID.replace('1517875%d.1', '1517875177.149805') % 3297] == ['-1']
    several = [uid for uid, o in lines.items() if len(o) > 1]
    for uid in several[:2]+list(lines)[1:40:6]:
        want = np.any([by_hand(line.strip()) for line in lines[uid] if line.strip() != '-1'] or [by_hand('')], axis=0)
        monkeypatch.setattr(data, '_siim_lines', lambda: lines)
        mask = challenge(uid)
        np.testing.assert_array_equal(want if mask is None else mask, want)
        assert (mask is None) == (not want.any())
