"""Every file that pydicom installs with itself: pixels that agree with a reference, or the documented error. Nothing is downloaded"""
import json, subprocess, sys
from collections import Counter
from pathlib import Path

import numpy as np, pydicom, pytest
from pydicom.pixels.processing import apply_color_lut

from dicomcam.dicom import DicomError, dicom_pixels, read_dicom

ROOT = Path(pydicom.__file__).parent/'data/test_files'
FILES = sorted(o for o in ROOT.rglob('*') if o.is_file())

# what becomes of each kind of file, with the [codecs] extra and without
COUNTS = {'pixels': 91, 'not DICOM': 10, 'no pixel data': 73, 'cannot be decoded': 2}
WITHOUT = {'pixels': 88, 'not DICOM': 10, 'no pixel data': 73, 'cannot be decoded': 5}
ONLY_WITH_CODECS = {'JPEG-lossy.dcm', 'JPGExtended.dcm', 'SC_rgb_jpeg_gdcm.dcm'} # 12-bit JPEG (two) and JPEG Lossless
DAMAGED = {'MR_truncated.dcm', 'JPEG2000-embedded-sequence-delimiter.dcm'} # cut off; a sequence delimiter inside the codestream


def outcome(fn):
    try: dicom_pixels(fn)
    except DicomError as e:
        assert str(e).startswith(f'{fn}: ') and '\n' not in str(e)
        e = str(e).removeprefix(f'{fn}: ')
        for words,kind in (('is not a DICOM','not DICOM'), ('has no pixel data','no pixel data'), ('Rows or Columns is missing','no pixel data')):
            if words in e: return kind
        assert e.startswith('cannot be decoded (') and pydicom.uid.UID(read_dicom(fn).file_meta.TransferSyntaxUID).name in e
        return 'cannot be decoded'
    return 'pixels'

def walk(block=()):
    "The outcome of each file, in a process of its own, as if the modules `block` were not installed"
    code = f'import sys; sys.modules.update(dict.fromkeys({list(block)!r})); sys.path.insert(0, {str(Path(__file__).parent)!r})\n' \
           'import json, warnings; warnings.simplefilter("ignore"); import test_corpus as t\n' \
           'print(json.dumps([t.outcome(o) for o in t.FILES]))'
    return json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)

def named(outcomes, kind): return {fn.name for fn,o in zip(FILES, outcomes) if o==kind}


def test_with_codecs():
    pytest.importorskip('imagecodecs', reason='the [codecs] extra is not installed')
    res = walk()
    assert Counter(res)==COUNTS
    assert named(res, 'cannot be decoded')==DAMAGED
    images = [fn for fn,o in zip(FILES, res) if o in ('pixels','cannot be decoded')]
    assert res.count('pixels') >= .95*len(images)

def test_without_codecs():
    res = walk(['imagecodecs', 'gdcm'])
    assert Counter(res)==WITHOUT
    assert named(res, 'cannot be decoded')==DAMAGED | ONLY_WITH_CODECS

def test_decoders_agree():
    "gdcm, where it is installed, changes nothing"
    a,b = walk(), walk(['gdcm'])
    assert a==b


# --- agreement with references that are not ours ---

def scaled(x, ds):
    "What the docs promise for an image without a window, from values in modality units"
    if ds.BitsStored<=8 and 'RescaleSlope' not in ds: return x/(2.**ds.BitsStored-1)
    lo,hi = np.percentile(x, [.5, 99.5], method='inverted_cdf')
    if lo==hi: lo,hi = x.min(), x.max()
    return np.clip((x-lo)/((hi-lo) or 1), 0, 1)

def by_highdicom(fn, ds):
    hd = pytest.importorskip('highdicom', reason='highdicom, the reference, is not installed')
    voi = 'WindowCenter' in ds or 'VOILUTSequence' in ds
    x = hd.imread(fn).get_frame(1, apply_voi_transform=voi, apply_icc_profile=False, voi_output_range=(0,1), dtype=np.float64)
    return x/(2.**ds.BitsStored-1) if x.ndim==3 else x if voi else scaled(x, ds)

def by_hand(fn, ds):
    "pydicom's own array, then NumPy"
    if ds.get_item('NumberOfFrames') and not ds.get_item('NumberOfFrames').value.strip().isdigit(): del ds.NumberOfFrames
    x = ds.pixel_array
    if x.ndim==4 or x.ndim==3 and ds.SamplesPerPixel==1: x = x[0]
    if ds.PhotometricInterpretation=='PALETTE COLOR': return apply_color_lut(x, ds)[...,:3]/65535
    if x.ndim==3: return x/(2.**ds.BitsStored-1)
    if 'WindowCenter' not in ds: return scaled(x.astype(float), ds)
    x = x*float(ds.get('RescaleSlope', 1)) + float(ds.get('RescaleIntercept', 0))
    y = np.clip((x-(ds.WindowCenter-.5))/(ds.WindowWidth-1)+.5, 0, 1)
    return 1-y if ds.PhotometricInterpretation=='MONOCHROME1' else y

BY_HAND = { # where highdicom is no reference, and why
    **dict.fromkeys(['ExplVR_BigEnd.dcm', 'MR_small_bigendian.dcm', 'MR_small_expb.dcm', 'SC_rgb_small_odd_big_endian.dcm', 'liver_expb_1frame.dcm',
                     'rtdose_expb.dcm', 'rtdose_expb_1frame.dcm'], 'it reads little endian only'),
    **dict.fromkeys(['6154', '6247', '6278'], 'it puts a LINEAR window through a rescale slope other than 1 with a width that is 1-slope off'),
    'SC_rgb_small_odd.dcm': 'it misses an attribute', 'badVR.dcm': 'it does not read the number of frames, 1A',
    'examples_palette.dcm': 'it has no scale for 16-bit palettes'}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('fn', FILES, ids=lambda o: str(o.relative_to(ROOT)))
def test_reference(fn):
    try: x = dicom_pixels(fn)
    except DicomError: return # counted above
    ds = pydicom.dcmread(fn, force=True)
    y = (by_hand if fn.name in BY_HAND else by_highdicom)(fn, ds)
    assert x.dtype==np.float32 and 0<=x.min() and x.max()<=1
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)
