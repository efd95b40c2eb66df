"""Damaged files: bytes flipped, truncated, lengths changed, elements removed. DICOMCAM_MUTANTS sets how many (2000)"""
import io, os, random, struct, time
from pathlib import Path

import pydicom, pytest
from joblib import Parallel, delayed
from pydicom.data import get_testdata_file

from dicomcam.dicom import DicomError, dicom_pixels
from dicomcam.summary import summarize

N = int(os.environ.get('DICOMCAM_MUTANTS', 2000))
BASES = '''CT_small MR_small_RLE MR_small_bigendian MR_small_implicit MR_small_jp2klossless MR_small_jpeg_ls_lossless image_dfl
    JPGExtended JPEGLSNearLossless_08 SC_rgb_jpeg SC_rgb_jpeg_gdcm SC_rgb_jls_lossy_line SC_rgb_rle_2frame SC_rgb_small_odd_jpeg
    JPEG2000 examples_palette rtdose_rle liver_1frame nested_priv_SQ reportsi badVR'''.split()


def flip(b, rnd):
    for _ in range(rnd.choice((1, 4, 16, 64))): b[rnd.randrange(len(b))] = rnd.randrange(256)

def flip_header(b, rnd):
    for _ in range(rnd.choice((1, 2, 8))): b[rnd.randrange(132, min(len(b), 2500))] = rnd.randrange(256)

def cut(b, rnd): del b[rnd.randrange(len(b)):]

def drop_bytes(b, rnd):
    i = rnd.randrange(len(b))
    del b[i:i+rnd.randrange(1, 200)]

def change_length(b, rnd):
    "Overwrite two or four bytes after something that looks like a VR"
    vrs = [i for i in range(132, min(len(b)-12, 6000)) if bytes(b[i:i+2]) in (b'OW',b'OB',b'US',b'DS',b'CS',b'UI',b'SQ',b'LO',b'IS')]
    i = rnd.choice(vrs or [140])
    b[i+2:i+4] = struct.pack('<H', rnd.choice((0, 1, 7, 0xfffe, 0xffff, rnd.randrange(65536))))
    if rnd.random()<.4: b[i+4:i+8] = struct.pack('<I', rnd.choice((0, 0xffffffff, 0x7fffffff, 1<<20)))

def drop_element(b, rnd):
    "Remove or spoil an element of the image module, if the file can still be parsed"
    try:
        ds = pydicom.dcmread(io.BytesIO(bytes(b)), force=True)
        tags = [t for t in ds.keys() if t.group in (0x28,0x7fe0)] or list(ds.keys())
        tag = rnd.choice(tags)
        if rnd.random()<.6 or ds[tag].VR!='US': del ds[tag]
        else: ds[tag].value = rnd.choice((0, 1, 2, 3, 7, 12, 64, 65535))
        out = io.BytesIO()
        ds.save_as(out)
        b[:] = out.getvalue()
    except Exception: flip_header(b, rnd)

MUTATIONS = flip, flip_header, cut, drop_bytes, change_length, drop_element


@pytest.fixture(scope='module')
def mutants(tmp_path_factory):
    path = tmp_path_factory.mktemp('mutants')
    bases = [Path(get_testdata_file(f'{o}.dcm', download=False)).read_bytes() for o in BASES]
    fns = []
    for i in range(N):
        rnd = random.Random(i)
        b = bytearray(bases[i%len(bases)])
        for _ in range(rnd.choice((1, 1, 2))): rnd.choice(MUTATIONS)(b, rnd) if len(b)>200 else None
        fns.append(path/f'{i:06}.dcm')
        fns[-1].write_bytes(b)
    return fns


def attempt(fn):
    t = time.perf_counter()
    try: kind = f'pixels {dicom_pixels(fn).ndim}'
    except DicomError as e: kind = 'error' if str(fn) in str(e) and '\n' not in str(e) else f'unclear error: {e}'
    except BaseException as e: kind = f'{type(e).__name__}: {e}'
    return kind, time.perf_counter()-t


@pytest.mark.filterwarnings('ignore')
def test_pixels(mutants):
    "Pixels or one clear error from each, none hangs, and the process lives"
    kinds,secs = zip(*Parallel(n_jobs=2)(delayed(attempt)(o) for o in mutants))
    assert set(kinds) <= {'pixels 2', 'pixels 3', 'error'}
    assert kinds.count('error') > N/10 and len(kinds)-kinds.count('error') > N/10 # the mutations do damage, but not everything
    assert max(secs) < 60 # each takes milliseconds; a loaded machine may take seconds


def test_summary(mutants):
    "No row is lost, and each that has no pixel statistics says why"
    df = summarize(mutants, n_jobs=2, progress=False)
    assert df.fname.tolist() == [str(o) for o in mutants]
    assert (df.img_mean.notna() | df.error.notna()).all()
    assert not df.error.str.contains('crash', na=False).any()
