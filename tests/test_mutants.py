"""Damaged files (bytes flipped, truncated, lengths changed, elements removed), bombs, and model files that lie.
DICOMCAM_FUZZ_COUNT sets how many (2000), DICOMCAM_FUZZ_SEED which (0). Each has 5 s of CPU and 2 GB more than the process has"""
import io, json, os, random, struct, warnings
from pathlib import Path

import pydicom, pytest
from pydicom.data import get_testdata_file

import bombs
from dicomcam.dicom import DicomError, dicom_pixels
from dicomcam.summary import summarize

N, SEED = (int(os.environ.get(f'DICOMCAM_FUZZ_{k}', v)) for k, v in (('COUNT', 2000), ('SEED', 0)))
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


def mutant(i):
    "The `i`th case: every 50th a bomb of up to 200 KB, half of them damaged; else a file of pydicom's, damaged"
    rnd = random.Random(f'{SEED} {i}')
    if i%50 == 49: b = bytearray(rnd.choice(list(bombs.BOMBS.values()))(rnd.randrange(1000, 200_000)))
    else: b = bytearray(Path(get_testdata_file(f'{BASES[i%len(BASES)]}.dcm', download=False)).read_bytes())
    for _ in range(rnd.choice((0, 1)) if i%50 == 49 else rnd.choice((1, 1, 2))):
        if len(b) > 200: rnd.choice(MUTATIONS)(b, rnd)
    return b

@pytest.fixture(scope='module')
def mutants(tmp_path_factory):
    path = tmp_path_factory.mktemp('mutants')
    fns = [path/f'{i:06}.dcm' for i in range(N)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i, fn in enumerate(fns): fn.write_bytes(mutant(i))
    return fns

def within_limits(job, cases):
    "The outcomes of the cases; fails if one took more time or memory than it may, or ended the process"
    limited = pytest.importorskip('limited', reason='limits of Linux', exc_type=ImportError)
    done = limited.results(job, cases)
    slow = [(str(case), o, secs) for case, (o, secs) in zip(cases, done) if secs >= 5]
    assert not slow, slow
    return [o for o, _ in done]

def attempt(fn):
    try: return f'pixels {dicom_pixels(fn).ndim}'
    except DicomError as e: return 'error' if str(fn) in str(e) and '\n' not in str(e) and 'memory' not in str(e) else f'unclear error: {e}'

@pytest.mark.filterwarnings('ignore')
def test_pixels(mutants):
    "Pixels or one clear error from each, none hangs, and the process lives"
    kinds = within_limits(attempt, mutants)
    odd = [(str(fn), kind) for fn, kind in zip(mutants, kinds) if kind not in ('pixels 2', 'pixels 3', 'error')]
    assert not odd, odd[:9]
    assert kinds.count('error') > N/10 and N-kinds.count('error') > N/10 # the mutations do damage, but not everything

def test_summary(mutants):
    "No row is lost, and each that has no pixel statistics says why"
    df = summarize(mutants, n_jobs=2, progress=False)
    assert df.fname.tolist() == [str(o) for o in mutants]
    assert (df.img_mean.notna() | df.error.notna()).all()
    assert not df.error.str.contains('crash|not read within', na=False).any()

# --- model files ---

GOOD = dict(arch='xresnet18', act_cls='Mish', sa=True, size=32, method='pad', vocab=['a', 'b'], multi=False,
    split=dict(by='PatientID', valid_pct=.2, seed=42, fold=None), pixels=dict(rule='dicom_pixels', channels=1, levels=65536))
ODD = (None, 0, 1, -1, 10**9, 10**30, .5, float('nan'), float('inf'), True, '', 'x', '../../x', 'hf-hub:a/b', 'resnet18.hf-hub', 'vit_gigantic_patch14_224',
    'resnet152', '\0', '\x1b[31m', '\ud800', 'a'*10**5, [], [1, 2], [False, True], ['a'], ['a']*3, [[]], {}, dict(by=1), [str(o) for o in range(10**5)])

def lie(i, fn):
    "The `i`th model file: words or tensors that are not what they should be, or bytes that are no safetensors file"
    import numpy as np
    from safetensors.numpy import save
    rnd = random.Random(f'model {SEED} {i}')
    words = dict(GOOD)
    for _ in range(rnd.choice((0, 1, 1, 2))):
        key = rnd.choice([*words, 'other'])
        if rnd.random() < .2: words.pop(key, None)
        else: words[key] = rnd.choice(ODD)
    kinds = [np.float32, np.float16, np.int64, np.uint8]
    tensors = {rnd.choice(['0.0.weight', '0.0.bias', 'fc.weight', 'x', '']): np.zeros([rnd.choice((0, 1, 2, 64)) for _ in range(rnd.randrange(5))], rnd.choice(kinds))
        for _ in range(rnd.choice((0, 1, 3)))}
    text = rnd.choice([json.dumps(words)]*8 + ['', 'null', '['*5000, '{"a":'*5000])
    b = bytearray(save(tensors, metadata={'dicomcam': text}))
    if rnd.random() < .2: b[:8] = struct.pack('<Q', rnd.choice((0, 1, 1<<20, 1<<40, (1<<64)-1)))
    if rnd.random() < .3: rnd.choice((flip, cut, drop_bytes))(b, rnd)
    fn.write_bytes(b)

def load(fn):
    from dicomcam.train import load_model
    try: load_model(fn)
    except ValueError as e: return 'error' if str(e).startswith(str(fn)) and len(str(e).splitlines()) == 1 else f'unclear error: {e}'
    return 'loads'

def test_model_files(tmp_path):
    "A model file of a stranger is refused in one line"
    import dicomcam.train # here, so that no child imports it
    fns = [tmp_path/f'{i:06}.safetensors' for i in range(max(1, N//20))]
    for i, fn in enumerate(fns): lie(i, fn)
    odd = [(str(fn), kind) for fn, kind in zip(fns, within_limits(load, fns)) if kind not in ('loads', 'error')]
    assert not odd, odd[:9]
