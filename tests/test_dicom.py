"""Pixels against references that are not ours: the formulas of PS3.3 C.11 on small arrays, uncompressed twins, and bad input"""
import io, os, socket, sys, time, tracemalloc, zlib
from pathlib import Path

import numpy as np, pydicom, pytest
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence

from dicomcam.dicom import DicomError, PILDicom, decode_frame, dicom_pixels, level_counts, modality, read_dicom, stored_pixels

pytestmark = pytest.mark.filterwarnings('ignore')


def sample(name): return get_testdata_file(name, download=False)

def image(x, bits=None, ts=uid.ExplicitVRLittleEndian, **attrs):
    "A DICOM dataset that holds the array `x`: (h,w), (frames,h,w) or (h,w,3)"
    x = np.asarray(x)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ts, uid.SecondaryCaptureImageStorage, '1.2.3'
    ds = FileDataset('test', {}, file_meta=meta, preamble=b'\0'*128)
    ds.set_original_encoding(ts.is_implicit_VR, ts.is_little_endian)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, '1.2.3'
    colour = x.shape[-1]==3 and x.ndim==3
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3,'RGB') if colour else (1,'MONOCHROME2')
    if colour: ds.PlanarConfiguration = 0
    ds.Rows,ds.Columns = x.shape[:2] if colour else x.shape[-2:]
    if x.ndim==3 and not colour: ds.NumberOfFrames = len(x)
    if x.dtype.kind=='f': ds.BitsAllocated = 8*x.itemsize
    else:
        ds.BitsAllocated, ds.BitsStored = 8*x.itemsize, bits or 8*x.itemsize
        ds.HighBit, ds.PixelRepresentation = ds.BitsStored-1, int(x.dtype.kind=='i')
    kw = {'f4':'FloatPixelData', 'f8':'DoubleFloatPixelData'}.get(x.dtype.str[1:], 'PixelData')
    data = x.astype(x.dtype.newbyteorder('<' if ts.is_little_endian else '>')).tobytes()
    setattr(ds, kw, data + b'\0'*(len(data)%2))
    if kw=='PixelData': ds[kw].VR = 'OB' if x.itemsize==1 else 'OW'
    for k,v in attrs.items(): setattr(ds, k, v)
    return ds

def saved(ds):
    "Through a file and back: the bytes of it"
    f = io.BytesIO()
    ds.save_as(f, enforce_file_format=True)
    return f.getvalue()

def close(a, b, tol=1e-6): np.testing.assert_allclose(a, b, rtol=0, atol=tol)

RAMP = np.arange(-2000, 3000, dtype=np.int16).reshape(50, 100)


# --- the formulas of the standard, one value at a time ---

def linear(x, c, w): # PS3.3 C.11.2.1.2.1
    if x <= c - .5 - (w-1)/2: return 0
    if x > c - .5 + (w-1)/2: return 1
    return (x - (c-.5))/(w-1) + .5

def linear_exact(x, c, w): # PS3.3 C.11.2.1.3.2
    if x <= c - w/2: return 0
    if x > c + w/2: return 1
    return (x-c)/w + .5

def sigmoid(x, c, w): return 1/(1+np.exp(-4*(x-c)/w)) # PS3.3 C.11.2.1.3.1

def each(f, x, *args): return np.array([f(float(o), *args) for o in x.ravel()]).reshape(x.shape)


@pytest.mark.parametrize('fn,formula', [(None,linear), ('LINEAR',linear), ('LINEAR_EXACT',linear_exact), ('SIGMOID',sigmoid)])
@pytest.mark.parametrize('c,w', [(40,80), (-600,1500), (0,1), (12.5,3.5), (2000,8192)])
def test_windows(fn, formula, c, w):
    if (fn or 'LINEAR')=='LINEAR' and w==1: expected = each(lambda x: float(x>c-.5), RAMP) # C.11.2.1.2.1: width 1 is a threshold
    else: expected = each(formula, RAMP, c, w)
    attrs = dict(VOILUTFunction=fn) if fn else {}
    close(dicom_pixels(image(RAMP, WindowCenter=c, WindowWidth=w, **attrs)), expected)

def test_one_of_several_windows():
    ds = image(RAMP, WindowCenter=[40,-600], WindowWidth=[80,1500])
    close(dicom_pixels(ds), each(linear, RAMP, 40, 80))
    close(dicom_pixels(ds, window=1), each(linear, RAMP, -600, 1500))
    close(dicom_pixels(ds, window=(1500,-600)), each(linear, RAMP, -600, 1500))
    with pytest.raises(DicomError, match='no window 2'): dicom_pixels(ds, window=2)

@pytest.mark.parametrize('w', [0, -5])
def test_invalid_window_is_as_none(w):
    close(dicom_pixels(image(RAMP, WindowCenter=40, WindowWidth=w)), dicom_pixels(image(RAMP)))

@pytest.mark.parametrize('attrs,slope,intercept', [({},1,0), (dict(RescaleSlope=2),2,0), (dict(RescaleIntercept=-1024),1,-1024),
                                                 (dict(RescaleSlope=.684, RescaleIntercept=200),.684,200), (dict(RescaleSlope=-1),-1,0)])
def test_rescale(attrs, slope, intercept):
    ds = image(RAMP, WindowCenter=40, WindowWidth=400, **attrs)
    close(modality(RAMP, ds), RAMP*slope+intercept, 1e-9)
    close(dicom_pixels(ds), each(linear, RAMP*slope+intercept, 40, 400))


def lut(entries, first, bits, data, vr='US'):
    it = Dataset()
    it.add_new('LUTDescriptor', 'SS' if first<0 else 'US', [entries, first, bits])
    it.add_new('LUTData', vr, data)
    return Sequence([it])

def by_table(x, first, table): return np.array([table[min(max(int(o)-first, 0), len(table)-1)] for o in x.ravel()], float).reshape(x.shape)

@pytest.mark.parametrize('first', [-1500, 0, 700])
@pytest.mark.parametrize('bits', [8, 12, 16])
def test_luts(first, bits):
    "C.11.1.1 and C.11.2.1.1: below the first value mapped the first entry, above the last the last"
    table = (np.linspace(0, 1, 1000)**2*(2**bits-1)).astype(int).tolist()
    close(modality(RAMP, image(RAMP, ModalityLUTSequence=lut(1000, first, bits, table))), by_table(RAMP, first, table))
    expected = by_table(RAMP, first, table)/(2**bits-1)
    close(dicom_pixels(image(RAMP, VOILUTSequence=lut(1000, first, bits, table))), expected)
    words = np.array(table, '<u2').tobytes()
    close(dicom_pixels(image(RAMP, VOILUTSequence=lut(1000, first, bits, words, 'OW'))), expected)

def test_numbers_of_signed_pixels_that_read_as_unsigned():
    "Implicit VR does not tell US from SS: -1500 may come as 64036"
    table = list(range(1000))
    close(modality(RAMP, image(RAMP, ModalityLUTSequence=lut(1000, 65536-1500, 16, table))), by_table(RAMP, -1500, table))
    x = RAMP.copy()
    x[:3] = -2000
    close(dicom_pixels(image(x, PixelPaddingValue=65536-2000)), dicom_pixels(image(x, PixelPaddingValue=-2000)))
    assert dicom_pixels(image(x, PixelPaddingValue=65536-2000, PhotometricInterpretation='MONOCHROME1'))[:3].max()==0

def test_lut_of_bytes_and_of_65536_entries():
    table = list(range(255, -1, -1))
    x = np.arange(256, dtype=np.uint8).reshape(16,16)
    close(dicom_pixels(image(x, VOILUTSequence=lut(256, 0, 8, bytes(table), 'OW'))), (255-x)/255)
    x = np.arange(65536, dtype=np.uint16).reshape(256,256)
    close(dicom_pixels(image(x, VOILUTSequence=lut(0, 0, 16, x.tobytes(), 'OW'))), x/65535)

def test_modality_lut_then_window():
    table = [i*3 for i in range(500)]
    ds = image(RAMP, ModalityLUTSequence=lut(500, 0, 16, table), WindowCenter=700, WindowWidth=600)
    close(dicom_pixels(ds), each(linear, by_table(RAMP, 0, table), 700, 600))

def test_voi_lut_goes_before_window():
    table = [0]*500 + [255]*500
    ds = image(RAMP, VOILUTSequence=lut(1000, 0, 8, table), WindowCenter=40, WindowWidth=80)
    close(dicom_pixels(ds), by_table(RAMP, 0, table)/255)


@pytest.mark.parametrize('photometric,shape,inverted', [('MONOCHROME2',None,0), ('MONOCHROME2','IDENTITY',0), ('MONOCHROME2','INVERSE',1),
                                                       ('MONOCHROME1',None,1), ('MONOCHROME1','INVERSE',1), ('MONOCHROME1','IDENTITY',1)])
def test_inverted_once(photometric, shape, inverted):
    attrs = dict(PresentationLUTShape=shape) if shape else {}
    y = dicom_pixels(image(RAMP, PhotometricInterpretation=photometric, WindowCenter=40, WindowWidth=800, **attrs))
    e = each(linear, RAMP, 40, 800)
    close(y, 1-e if inverted else e)

def test_padding_is_black_and_out_of_the_contrast():
    x = np.tile(np.arange(1000, 1100, dtype=np.int16), (20,1))
    padded = np.pad(x, 10, constant_values=-2000)
    y = dicom_pixels(image(padded, PixelPaddingValue=-2000))
    close(y[10:-10,10:-10], dicom_pixels(image(x)))
    assert (y[:10]==0).all()
    inv = dicom_pixels(image(padded, PixelPaddingValue=-2000, PhotometricInterpretation='MONOCHROME1'))
    close(inv[10:-10,10:-10], 1-y[10:-10,10:-10])
    assert (inv[:10]==0).all()
    ranged = dicom_pixels(image(np.where(padded<0, np.int16(-1500), padded), PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1000))
    close(ranged, y)
    f = np.where(padded<0, np.nan, padded).astype(np.float32)
    close(dicom_pixels(image(f)), y)

def test_no_window():
    "8 bits: the whole range; deeper ones: the 0.5th to the 99.5th percentile"
    x = np.arange(30, 94, dtype=np.uint8).reshape(8,8)
    close(dicom_pixels(image(x)), x/255)
    lo,hi = np.percentile(RAMP, [.5, 99.5], method='inverted_cdf')
    close(dicom_pixels(image(RAMP)), np.clip((RAMP-lo)/(hi-lo), 0, 1))
    assert (dicom_pixels(image(np.full((4,4), 7, np.int16)))==0).all()


# --- bit depths, layouts, colours ---

@pytest.mark.parametrize('dtype,bits', [('u1',8), ('i1',8), ('u2',12), ('i2',12), ('u2',16), ('i2',16), ('u4',32), ('i4',32), ('f4',None), ('f8',None)])
@pytest.mark.parametrize('ts', [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian])
def test_types(dtype, bits, ts):
    lo,hi = (-1e4,1e4) if dtype[0]=='f' else (0,2**bits-1) if dtype[0]=='u' else (-2**(bits-1), 2**(bits-1)-1)
    x = np.linspace(lo, hi, 4096).reshape(64,64).astype(dtype)
    c,w = float(hi+lo)/2, float(hi-lo)*.8
    ds = image(x, bits, ts, WindowCenter=round(c,2), WindowWidth=round(w,2))
    b = saved(ds)
    np.testing.assert_array_equal(stored_pixels(read_dicom(b)), x)
    close(dicom_pixels(b), each(linear, x.astype(float), round(c,2), round(w,2)), 2e-6)

def test_one_bit():
    x = np.arange(64).reshape(8,8)%3==0
    ds = image(np.packbits(x, bitorder='little')[None].astype(np.uint8))
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 1, 1, 0
    close(dicom_pixels(saved(ds)), x)

def test_unused_high_bits_are_no_pixels():
    "12 bits stored in 16, an overlay in the top bits, as old files have it"
    x = np.arange(4096, dtype=np.uint16).reshape(64,64)
    ds = image(x | 0x8000, 12, WindowCenter=2048, WindowWidth=4096)
    close(dicom_pixels(ds), each(linear, x.astype(float), 2048, 4096))

@pytest.mark.parametrize('dtype', ['u1','u2'])
def test_planar_configuration(dtype):
    x = np.random.default_rng(0).integers(0, 2**(8*int(dtype[1])), (6,10,3)).astype(dtype)
    full = 2.**(8*int(dtype[1]))-1
    close(dicom_pixels(image(x)), x/full)
    ds = image(x, PlanarConfiguration=1)
    ds.PixelData = x.transpose(2,0,1).tobytes()
    close(dicom_pixels(ds), x/full)

def ycc(rgb): # PS3.3 C.7.6.3.1.2
    r,g,b = np.moveaxis(rgb.astype(float), -1, 0)
    y = [.299*r+.587*g+.114*b, -.1687*r-.3313*g+.5*b+128, .5*r-.4187*g-.0813*b+128]
    return np.clip(np.round(np.stack(y, -1)), 0, 255).astype(np.uint8)

def test_ybr():
    rgb = np.random.default_rng(0).integers(40, 200, (6,5,3)).astype(np.uint8).repeat(2, 1) # colour changes every second column
    yc = ycc(rgb)
    close(dicom_pixels(image(yc, PhotometricInterpretation='YBR_FULL')), rgb/255, 2.5/255)
    ds = image(yc, PhotometricInterpretation='YBR_FULL_422')
    pairs = yc.reshape(-1, 2, 3)
    ds.PixelData = np.stack([pairs[:,0,0], pairs[:,1,0], pairs[:,0,1], pairs[:,0,2]], -1).tobytes()
    close(dicom_pixels(ds), rgb/255, 2.5/255)

@pytest.mark.parametrize('bits,ts', [(8,uid.ExplicitVRLittleEndian), (16,uid.ExplicitVRLittleEndian), (16,uid.ExplicitVRBigEndian)])
def test_palette(bits, ts):
    table = np.random.default_rng(0).integers(0, 2**bits, (3,300)).astype(f'u{bits//8}')
    x = np.random.default_rng(1).integers(0, 400, (20,30)).astype(np.uint16)
    ds = image(x, ts=ts, PhotometricInterpretation='PALETTE COLOR')
    for c,t in zip(('Red','Green','Blue'), table):
        setattr(ds, f'{c}PaletteColorLookupTableDescriptor', [300, 20, bits])
        setattr(ds, f'{c}PaletteColorLookupTableData', t.astype(t.dtype.newbyteorder('<' if ts.is_little_endian else '>')).tobytes())
    expected = table.T[np.clip(x.astype(int)-20, 0, 299)]/(2.**bits-1)
    close(dicom_pixels(ds), expected)
    close(dicom_pixels(saved(ds)), expected)


# --- frames ---

def test_frames_and_functional_groups():
    "PS3.3 C.7.6.16: what holds for a frame is in its functional groups, what holds for all in the shared ones"
    x = np.stack([RAMP, RAMP//2, RAMP//4])
    ds = image(x)
    def voi(c, w):
        it = Dataset()
        it.WindowCenter,it.WindowWidth = c,w
        return Sequence([it])
    def rescale(s, i):
        it = Dataset()
        it.RescaleSlope,it.RescaleIntercept = s,i
        return Sequence([it])
    shared, frames = Dataset(), [Dataset() for _ in x]
    shared.PixelValueTransformationSequence = rescale(2, -10)
    for i,o in enumerate(frames): o.FrameVOILUTSequence = voi(100*i, 300+i)
    frames[2].PixelValueTransformationSequence = rescale(3, 7)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(frames)
    b = saved(ds)
    for i,(s,c) in enumerate([(2,-10), (2,-10), (3,7)]): close(dicom_pixels(b, frame=i), each(linear, x[i].astype(float)*s+c, 100*i, 300+i))
    with pytest.raises(DicomError, match='no frame 3'): dicom_pixels(b, frame=3)
    with pytest.raises(DicomError, match='no frame -1'): dicom_pixels(b, frame=-1)


# --- compressed files and their uncompressed twins ---

@pytest.mark.parametrize('name', ['MR_small_RLE', 'MR_small_bigendian', 'MR_small_expb', 'MR_small_implicit', 'MR_small_jp2klossless',
                                 'MR_small_jpeg_ls_lossless', 'MR_small_padded'])
def test_lossless_twins(name): np.testing.assert_array_equal(dicom_pixels(sample(f'{name}.dcm')), dicom_pixels(sample('MR_small.dcm')))

@pytest.mark.parametrize('a,b', [('rtdose_expb','rtdose'), ('rtdose_rle','rtdose'), ('rtdose_expb_1frame','rtdose_1frame'), ('rtdose_rle_1frame','rtdose_1frame'),
                                 ('liver_expb_1frame','liver_1frame'), ('SC_rgb_small_odd_big_endian','SC_rgb_small_odd')])
def test_more_twins(a, b):
    for frame in range(int(read_dicom(sample(f'{a}.dcm')).get('NumberOfFrames', 1))):
        np.testing.assert_array_equal(dicom_pixels(sample(f'{a}.dcm'), frame=frame), dicom_pixels(sample(f'{b}.dcm'), frame=frame))

@pytest.mark.parametrize('ts', [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
@pytest.mark.parametrize('dtype,bits', [('u1',8), ('u2',12), ('u2',16), ('i2',16)])
def test_compressed_here(ts, dtype, bits):
    x = (np.random.default_rng(0).integers(0, 2**bits, (40,50)) - (2**(bits-1) if dtype[0]=='i' else 0)).astype(dtype)
    ds = image(x, bits, WindowCenter=100, WindowWidth=1000)
    expected = dicom_pixels(ds)
    ds.compress(ts)
    np.testing.assert_array_equal(dicom_pixels(saved(ds)), expected)

def encoded_frame(x, data, ts, bits, **attrs):
    ds = image(x, bits, **attrs)
    ds.file_meta.TransferSyntaxUID = ts
    ds.PixelData = pydicom.encaps.encapsulate([data])
    ds['PixelData'].VR = 'OB'
    return saved(ds)

def test_codecs():
    "JPEG Lossless and 12-bit JPEG, which need the extra; HTJ2K, which does not, but only imagecodecs can write it"
    ic = pytest.importorskip('imagecodecs', reason='the [codecs] extra is not installed')
    x = np.random.default_rng(0).integers(0, 4096, (40,50)).astype(np.uint16)
    b = encoded_frame(x, ic.ljpeg_encode(x, bitspersample=12), uid.JPEGLosslessSV1, 12)
    np.testing.assert_array_equal(stored_pixels(read_dicom(b)), x)
    smooth = (2000+1500*np.sin(np.arange(64)/9)[:,None]*np.cos(np.arange(72)/7)).astype(np.uint16)
    b = encoded_frame(smooth, ic.jpeg8_encode(smooth, level=98, bitspersample=12), uid.JPEGExtended12Bit, 12)
    assert np.abs(stored_pixels(read_dicom(b)).astype(int)-smooth).max()<40
    if hasattr(ic, 'HTJ2K') and ic.HTJ2K.available:
        b = encoded_frame(x, ic.htj2k_encode(x, reversible=True), uid.HTJ2KLossless, 16)
        np.testing.assert_array_equal(stored_pixels(read_dicom(b)), x)


# --- full depth, reduced scale ---

def test_full_depth_reaches_the_batch():
    "A 12-bit image has more than 256 levels in a fastai batch, of the right type and range"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Resize, torch
    fns = [sample('CT_small.dcm')]*6
    b = DataBlock((ImageBlock(cls=PILDicom), CategoryBlock), get_y=lambda o: 'ab'[len(o)%2], splitter=lambda o: ([0,1,2,3],[4,5]),
                  item_tfms=Resize(64)).dataloaders(fns, bs=2, num_workers=0).one_batch()[0]
    assert b.shape==(2,1,64,64) and b.dtype==torch.float32 and 0<=b.min()<b.max()<=1
    assert len(b[0].unique())>256

def test_create():
    fn = sample('CT_small.dcm')
    x = dicom_pixels(fn)
    for o in (fn, Path(fn), Path(fn).read_bytes(), pydicom.dcmread(fn), x):
        im = PILDicom.create(o)
        assert isinstance(im, PILDicom) and im.mode=='F'
        np.testing.assert_array_equal(np.asarray(im), x)
    rgb = sample('examples_rgb_color.dcm')
    assert PILDicom.create(rgb).mode=='RGB' and PILDicom.create(rgb, mode='F').mode=='F' and PILDicom.create(fn, mode='RGB').mode=='RGB'
    close(np.asarray(PILDicom.create(rgb))/255, dicom_pixels(rgb), .5/255+1e-6)

@pytest.fixture(scope='module')
def radiograph():
    "A 1024 x 1024 JPEG Baseline radiograph: a real one where there is one, else a smooth one made here"
    if 'DICOMCAM_TEST_DATA' in os.environ: return str(sorted(Path(os.environ['DICOMCAM_TEST_DATA']).rglob('*.dcm'))[0])
    from PIL import Image
    x = (128+100*np.sin(np.arange(1024)/60)[:,None]*np.cos(np.arange(1024)/45)).astype(np.uint8)
    f = io.BytesIO()
    Image.fromarray(x).save(f, 'JPEG', quality=90)
    return encoded_frame(x, f.getvalue(), uid.JPEGBaseline8Bit, 8)

@pytest.mark.parametrize('size,expected', [(1024,1024), (513,1024), (512,512), (400,512), ((256,200),256), (224,256), (100,128), (8,128)])
def test_reduced(radiograph, size, expected):
    full, small = dicom_pixels(radiograph), dicom_pixels(radiograph, size=size)
    assert small.shape==(expected,expected)
    k = 1024//expected
    close(small, full.reshape(expected,k,expected,k).mean((1,3)), .06)

def test_reduced_is_cheaper(radiograph, monkeypatch):
    "The decoder itself makes the small picture: what it hands out is small, and nothing has been decoded large and then resized"
    from PIL import Image
    def refuse(*args, **kwargs): raise AssertionError('decoded in full, and resized')
    for o in ('resize', 'reduce', 'thumbnail'): monkeypatch.setattr(Image.Image, o, refuse)
    ds = read_dicom(radiograph)
    assert decode_frame(ds).size==(1024,1024) and decode_frame(ds, size=128).size==(128,128)


# --- what cannot be read ---

def write(path, b):
    path.write_bytes(b)
    return path

def deflated(n):
    "A deflated file whose dataset inflates to about `n` bytes"
    b = saved(image(np.zeros((8,8), np.uint8), ts=uid.DeflatedExplicitVRLittleEndian))
    head = b[:b.index(uid.DeflatedExplicitVRLittleEndian.encode())+32]
    head = b[:132+12+pydicom.dcmread(io.BytesIO(b)).file_meta.FileMetaInformationGroupLength]
    c = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    element = b'\x09\x00\x01\x10OB\0\0' + n.to_bytes(4, 'little')
    return head + c.compress(element) + b''.join(c.compress(bytes(1<<20)) for _ in range(n>>20)) + c.flush()

BAD = dict(
    empty=(lambda p: write(p/'a.dcm', b''), 'is empty'),
    text=(lambda p: write(p/'a.dcm', b'This is not an image, whatever its name says.\n'*99), 'not a DICOM file'),
    folder=(lambda p: p, 'is a folder'),
    missing=(lambda p: p/'a.dcm', 'No such file'),
    fifo=(lambda p: os.mkfifo(p/'a.dcm') or p/'a.dcm', 'not a regular file'),
    device=(lambda p: Path('/dev/zero'), 'not a regular file'),
    prefix_only=(lambda p: write(p/'a.dcm', b'\0'*128+b'DICM'), 'no DICOM elements'),
    header_cut=(lambda p: write(p/'a.dcm', Path(sample('CT_small.dcm')).read_bytes()[:2000]), 'cut off'),
    pixels_cut=(lambda p: write(p/'a.dcm', Path(sample('CT_small.dcm')).read_bytes()[:20000]), 'Explicit VR Little Endian'),
    jpeg_cut=(lambda p: write(p/'a.dcm', Path(sample('SC_rgb_jpeg_dcmtk.dcm')).read_bytes()[:2500]), 'cut off in (7FE0,0010)'),
    too_large=(lambda p: write(p/'a.dcm', saved(image(np.zeros((8,8), np.uint8), Rows=60000, Columns=60000))), '3,600,000,000 values'),
    deflate_bomb=(lambda p: write(p/'a.dcm', deflated(1<<30)), 'inflates to more than'),
    no_size=(lambda p: write(p/'a.dcm', saved(image(np.zeros((8,8), np.uint8), Rows=None))), 'Rows or Columns is missing'),
    not_an_image=(lambda p: Path(sample('reportsi.dcm')), 'no pixel data'),
    video=(lambda p: write(p/'a.dcm', encoded_frame(np.zeros((8,8), np.uint8), b'\0\0\1\0', uid.MPEG4HP41, 8)), 'MPEG-4'),
    codestream_lies=(lambda p: write(p/'a.dcm', encoded_frame(np.zeros((8,8), np.uint8), huge_jpeg(), uid.JPEGBaseline8Bit, 8)), '65000 x 65000 x 1'),
)

def huge_jpeg():
    from PIL import Image
    f = io.BytesIO()
    Image.fromarray(np.zeros((8,8), np.uint8)).save(f, 'JPEG')
    b = bytearray(f.getvalue())
    i = b.index(b'\xff\xc0')
    b[i+5:i+9] = (65000).to_bytes(2, 'big')*2
    return bytes(b)

@pytest.mark.parametrize('kind', [pytest.param(o, marks=pytest.mark.posix if o in ('fifo', 'device') else ()) for o in BAD])
def test_bad_input(kind, tmp_path):
    "One error that names the file and says what is wrong, soon, in little memory"
    make,words = BAD[kind]
    fn = make(tmp_path)
    tracemalloc.start()
    t = time.perf_counter()
    with pytest.raises(DicomError) as e: dicom_pixels(fn)
    t = time.perf_counter()-t
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(e.value).startswith(str(fn)) and words in str(e.value) and '\n' not in str(e.value)
    assert t<60 and peak<50e6 # each takes milliseconds, the bomb a second or two; a loaded machine may take longer

@pytest.mark.posix
def test_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path) # a socket's name has at most 100 letters or so
    with socket.socket(socket.AF_UNIX) as s:
        s.bind('a.dcm')
        with pytest.raises(DicomError, match='not a regular file'): dicom_pixels(tmp_path/'a.dcm')

def test_limit_can_be_set():
    ds = image(np.zeros((100,100), np.uint8))
    with pytest.raises(DicomError, match='10,000 values'): dicom_pixels(ds, max_pixels=9999)
    assert dicom_pixels(ds, max_pixels=10000).shape==(100,100)

def test_missing_decoder_names_the_cure():
    "Without the extra, JPEG Lossless cannot be decoded, and the message says what to install"
    import subprocess
    code = f'''import sys
sys.modules['imagecodecs'] = sys.modules['gdcm'] = None
from dicomcam.dicom import dicom_pixels
dicom_pixels({sample('SC_rgb_jpeg_gdcm.dcm')!r})'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    last = r.stderr.strip().splitlines()[-1]
    assert 'DicomError' in last and 'JPEG Lossless' in last and 'pip install "dicomcam[codecs]"' in last

@pytest.mark.parametrize('missing', ['BitsStored', 'HighBit', 'PixelRepresentation', 'PhotometricInterpretation', 'SamplesPerPixel', 'BitsAllocated'])
def test_defaults(missing):
    ds = image(np.arange(64, dtype=np.uint16).reshape(8,8), WindowCenter=30, WindowWidth=40)
    expected = dicom_pixels(ds)
    delattr(ds, missing)
    np.testing.assert_array_equal(dicom_pixels(saved(ds)), expected)

def test_no_prefix_no_meta():
    "Old files are a bare dataset: no preamble, no transfer syntax"
    ds = image(RAMP, WindowCenter=40, WindowWidth=80)
    for implicit,little in ((True,True), (False,True), (False,False)):
        x = image(RAMP, ts=uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian, WindowCenter=40, WindowWidth=80)
        f = io.BytesIO()
        plain = Dataset(x)
        plain.save_as(f, implicit_vr=implicit, little_endian=little)
        close(dicom_pixels(f.getvalue()), dicom_pixels(ds))

def test_light_import():
    import subprocess
    code = "import sys; from dicomcam.dicom import *; import dicomcam.summary; assert not {'torch','fastai','pandas','matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)

def test_image_type_has_its_old_place():
    "`dicomcam.dicom` hands out fastai's types, once they are asked for; nothing else that it lacks"
    import dicomcam.dicom, dicomcam.pil
    assert dicomcam.dicom.PILDicom is dicomcam.pil.PILDicom and dicomcam.dicom.TensorDicom is dicomcam.pil.TensorDicom
    with pytest.raises(AttributeError, match='no attribute'): dicomcam.dicom.PILDico

@pytest.mark.parametrize('dtype,shape', [('u1',(8,8)), ('u1',(7,7)), ('u2',(9,9)), ('i2',(8,9)), ('i4',(5,5)), ('f4',(5,4))])
def test_level_counts(dtype, shape):
    x = (np.random.default_rng(0).standard_normal(shape)*30+100).astype(dtype)
    for o in (x, x[::-1], x.T): # whatever lies in memory
        v,n = level_counts(o)
        e,m = np.unique(x, return_counts=True)
        np.testing.assert_array_equal(v, e)
        np.testing.assert_array_equal(n, m)
