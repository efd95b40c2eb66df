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


# --- codestreams that are cut off ---

def waves(bits, colour=False):
    "A smooth picture with some noise, up to its last row"
    h, w = np.mgrid[:48, :40]
    x = (np.sin(h/9)*np.cos(w/7)+1)/2*(.7*2**bits) + np.random.default_rng(0).integers(0, 2**bits//9, h.shape)
    x = x.astype(np.uint8 if bits <= 8 else np.uint16)
    return np.stack([x, x[::-1], x[:,::-1]], -1) if colour else x

def pillow(x, **kwargs):
    from PIL import Image
    f = io.BytesIO()
    Image.fromarray(x).save(f, 'JPEG', **kwargs)
    return f.getvalue()

def by_pydicom(x, bits, ts):
    ds = image(x, bits)
    ds.compress(ts)
    return pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)

def by_imagecodecs(function, x, **kwargs):
    ic = pytest.importorskip('imagecodecs', reason='the [codecs] extra is not installed')
    if not hasattr(ic, function): pytest.skip(f'imagecodecs {ic.__version__} has no {function}')
    return bytes(getattr(ic, function)(x, **kwargs))

CODESTREAMS = { # name: (transfer syntax, bits, colour, encoder)
    'baseline': (uid.JPEGBaseline8Bit, 8, False, pillow),
    'baseline colour': (uid.JPEGBaseline8Bit, 8, True, pillow),
    'baseline restarts': (uid.JPEGBaseline8Bit, 8, False, lambda x: pillow(x, restart_marker_blocks=4)),
    'extended 12': (uid.JPEGExtended12Bit, 12, False, lambda x: by_imagecodecs('jpeg8_encode', x, bitspersample=12, level=95)),
    'extended 8': (uid.JPEGExtended12Bit, 8, True, lambda x: by_imagecodecs('jpeg8_encode', x, level=95)),
    'lossless 12': (uid.JPEGLosslessSV1, 12, False, lambda x: by_imagecodecs('jpeg8_encode', x, lossless=True, bitspersample=12)),
    'lossless 8': (uid.JPEGLossless, 8, False, lambda x: by_imagecodecs('jpeg8_encode', x, lossless=True)),
    'lossless colour': (uid.JPEGLossless, 8, True,
        lambda x: by_imagecodecs('jpeg8_encode', x, lossless=True, colorspace='rgb', outcolorspace='rgb')),
    'jpeg-ls': (uid.JPEGLSLossless, 12, False, lambda x: by_pydicom(x, 12, uid.JPEGLSLossless)),
    'jpeg 2000': (uid.JPEG2000Lossless, 12, False, lambda x: by_pydicom(x, 12, uid.JPEG2000Lossless)),
    'htj2k': (uid.HTJ2KLossless, 16, False, lambda x: by_imagecodecs('htj2k_encode', x, reversible=True)),
    'rle': (uid.RLELossless, 12, False, lambda x: by_pydicom(x, 12, uid.RLELossless))}
JPEGS = [o for o in CODESTREAMS if CODESTREAMS[o][0] in uid.JPEGTransferSyntaxes]

def coded(name):
    "The picture, its codestream without padding, and a function that makes a file of a codestream"
    ts, bits, colour, encode = CODESTREAMS[name]
    x = waves(bits, colour)
    src = encode(x)
    if ts != uid.RLELossless: src = src[:src.rindex(b'\xff\xd9')+2]
    return x, src, lambda o: encoded_frame(x, o, ts, bits)

@pytest.mark.parametrize('end', ['nothing', 'zeros', 'marker'])
@pytest.mark.parametrize('name', CODESTREAMS)
def test_cut_codestream(name, end, tmp_path):
    "Wherever it ends, and whatever follows: an error, never grey; in the table too"
    from dicomcam.summary import summarize
    if (name, end) == ('rle', 'zeros'): pytest.skip('zeros are data of RLE')
    x, src, as_file = coded(name)
    after = dict(nothing=b'', zeros=bytes(len(src)//2), marker=b'\xff\xd9')[end]
    for part in (.4, .6, .8, .95):
        b = as_file(src[:int(len(src)*part)] + after)
        with pytest.raises(DicomError, match='cannot be decoded'): dicom_pixels(b)
        with pytest.raises(DicomError, match='cannot be decoded'): stored_pixels(read_dicom(b))
    row, = summarize([write(tmp_path/'a.dcm', b)], n_jobs=1, progress=False).to_dict('records')
    assert 'cannot be decoded' in row['error'] and not row.get('img_mean', 0) > 0

@pytest.mark.parametrize('name', JPEGS)
def test_end_marker_alone_is_missing(name):
    "The data are whole, and some file lacks the marker, or has padding after it: the same picture"
    x, src, as_file = coded(name)
    whole = stored_pixels(read_dicom(as_file(src)))
    for o in (src[:-2], src[:-1], src[:-2]+bytes(9), src+bytes(99)):
        np.testing.assert_array_equal(stored_pixels(read_dicom(as_file(o))), whole)

@pytest.mark.parametrize('progressive', [False, True])
def test_the_last_pixel_may_be_grey(progressive):
    "128 is what a JPEG decoder paints where data are missing; it is no proof that they are"
    x = waves(8)
    x[-16:,-16:] = 128
    b = encoded_frame(x, pillow(x, quality=95, progressive=progressive), uid.JPEGBaseline8Bit, 8)
    assert stored_pixels(read_dicom(b))[-1,-1] == 128


# --- bombs: a small file that takes seconds or gigabytes ---

def refused(b, words):
    "It is refused, before it is decoded"
    for f in (dicom_pixels, lambda o: stored_pixels(read_dicom(o))):
        t = time.process_time()
        with pytest.raises(DicomError, match=words): f(b)
        assert time.process_time()-t < 1

def test_scans_without_end():
    "A progressive JPEG of 3,000 scans over 4,000 x 4,000 pixels: it would take 20 s"
    src = pillow(np.zeros((8,8), np.uint8), progressive=True)
    i = src.index(b'\xff\xc2')
    src = src[:i+5] + (4000).to_bytes(2, 'big')*2 + src[i+9:]
    last, end = src.rindex(b'\xff\xda'), src.rindex(b'\xff\xd9')
    b = encoded_frame(np.zeros((8,8), np.uint8), src[:end] + src[last:end]*3000 + b'\xff\xd9', uid.JPEGBaseline8Bit, 8,
        Rows=4000, Columns=4000)
    refused(b, 'scans')

@pytest.mark.parametrize('kind', ['blocks', 'precincts', 'tile'])
def test_jpeg2000_in_tiny_pieces(kind):
    "Code-blocks of 4 x 4, precincts of 2 x 2, or the first in a tile's header: 2.7 GB for a few hundred bytes"
    src = by_pydicom(np.zeros((64,64), np.uint8), 8, uid.JPEG2000Lossless)
    b = bytearray(src)
    for i in (b.index(b'\xff\x51')+6, b.index(b'\xff\x51')+22): b[i:i+8] = (7000).to_bytes(4, 'big')*2 # image, tile
    cod = b.index(b'\xff\x52')
    length = int.from_bytes(b[cod+2:cod+4], 'big')
    style = bytearray(b[cod:cod+2+length])
    style[10:12] = b'\0\0'
    if kind == 'precincts':
        style[4] |= 1
        style[10:12] = b'\x04\x04'
        style += b'\x11'*(style[9]+1)
        style[2:4] = (len(style)-2).to_bytes(2, 'big')
    if kind != 'tile': b[cod:cod+2+length] = style
    else:
        sod = b.index(b'\xff\x93')
        b[sod:sod] = style
    refused(encoded_frame(np.zeros((8,8), np.uint8), bytes(b), uid.JPEG2000Lossless, 8, Rows=7000, Columns=7000), 'blocks')

def test_jpeg2000_decodes_in_32_bits():
    "So each of its values counts twice: 9999 x 9999 of them, in a file of 500 bytes, took 1.2 GB"
    src = bytearray(by_pydicom(np.zeros((64,64), np.uint8), 8, uid.JPEG2000Lossless))
    for i in (src.index(b'\xff\x51')+6, src.index(b'\xff\x51')+22): src[i:i+8] = (9999).to_bytes(4, 'big')*2
    refused(encoded_frame(np.zeros((8,8), np.uint8), bytes(src), uid.JPEG2000Lossless, 8, Rows=9999, Columns=9999), 'max_pixels')

@pytest.mark.parametrize('kind', ['unsigned', 'signed', 'float', 'colour'])
def test_memory_of_a_large_frame(kind):
    "Four million values: the picture itself has 16 MB, and all that it takes on the way is a few times as much"
    n = 1152 if kind == 'colour' else 2000
    x = dict(unsigned=np.full((n,n), 9, 'u2'), signed=np.full((n,n), -9, 'i2'), float=np.full((n,n), 9, 'f4'), colour=np.full((n,n,3), 9, 'u1'))[kind]
    ds = image(x)
    tracemalloc.start()
    y = dicom_pixels(ds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert y.nbytes < peak < 2.2*y.nbytes

def test_wide_values_count_more():
    "A value of 32 bits is as two of 16; a palette's pixel becomes three"
    with pytest.raises(DicomError, match='128 values'): dicom_pixels(image(np.zeros((8,8), np.float32)), max_pixels=100)
    with pytest.raises(DicomError, match='192 values'):
        dicom_pixels(image(np.zeros((8,8), np.uint8), PhotometricInterpretation='PALETTE COLOR'), max_pixels=100)

def test_segmented_palette_bomb():
    "Six bytes stand for 65,535 entries, and a megabyte of them for ten billion"
    ds = image(np.zeros((8,8), np.uint8), PhotometricInterpretation='PALETTE COLOR')
    words = np.tile(np.array([1, 65535, 9], '<u2'), 150_000)
    for c in ('Red', 'Green', 'Blue'):
        setattr(ds, f'{c}PaletteColorLookupTableDescriptor', [256, 0, 16])
        setattr(ds, f'Segmented{c}PaletteColorLookupTableData', np.array([0, 1, 7], '<u2').tobytes() + words.tobytes())
    t = time.process_time()
    assert dicom_pixels(ds).max() < 1e-3
    assert time.process_time()-t < 2


# --- bits in odd places ---

@pytest.mark.parametrize('ts', [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless])
@pytest.mark.parametrize('dtype', ['u2', 'i2'])
def test_high_bit(dtype, ts):
    "12 bits stored in the upper bits of 16 (PS3.5 8.1.1), noise in the lower ones"
    low = -2048 if dtype == 'i2' else 0
    x = np.arange(low, low+4096).reshape(64, 64).astype(dtype)
    noise = np.random.default_rng(0).integers(0, 16, x.shape).astype(dtype)
    ds = image(x*16+noise, ts=uid.ExplicitVRLittleEndian if ts == uid.RLELossless else ts)
    if ts == uid.RLELossless: ds.compress(ts)
    ds.BitsStored, ds.HighBit, ds.WindowCenter, ds.WindowWidth = 12, 15, 100, 1000
    np.testing.assert_array_equal(stored_pixels(read_dicom(saved(ds))), x)
    close(dicom_pixels(saved(ds)), each(linear, x.astype(float), 100, 1000))

@pytest.mark.parametrize('shape', [(5,7), (3,5), (1,1), (4,4), (9,13)])
def test_frames_of_bits(shape):
    "Frames of one bit are packed without a gap (PS3.5 8.1.1)"
    x = np.random.default_rng(0).integers(0, 2, (9, *shape)).astype(np.uint8)
    ds = image(x, 1)
    packed = np.packbits(x.ravel(), bitorder='little').tobytes()
    ds.BitsAllocated, ds.HighBit, ds.PixelData = 1, 0, packed + b'\0'*(len(packed)%2)
    for i, o in enumerate(x): np.testing.assert_array_equal(stored_pixels(read_dicom(saved(ds)), i), o)
    close(dicom_pixels(saved(ds), frame=8), x[8])
    ds.PixelData = packed[:len(packed)//2]
    with pytest.raises(DicomError, match='cannot be decoded'): dicom_pixels(ds, frame=8)


# --- two codecs of segmentations ---

FRAME_DEFLATE = uid.UID('1.2.840.10008.1.2.8.1')

def deflate(b):
    c = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return c.compress(b) + c.flush()

def rle(b):
    "One segment of PS3.5 annex G, literal runs only"
    runs = [b[i:i+128] for i in range(0, len(b), 128)]
    return b'\1\0\0\0\x40\0\0\0' + bytes(56) + b''.join(bytes([len(o)-1])+o for o in runs)

def frames_of(x, bits, ts, encode):
    ds = image(x, bits)
    if bits == 1: ds.BitsAllocated, ds.HighBit = 1, 0
    raw = [np.packbits(o.ravel(), bitorder='little').tobytes() if bits == 1 else o.tobytes() for o in x]
    ds.file_meta.TransferSyntaxUID = ts
    ds.PixelData = pydicom.encaps.encapsulate([encode(o) for o in raw])
    ds['PixelData'].VR = 'OB'
    return ds

@pytest.mark.parametrize('shape', [(5,7), (16,16), (300,301)])
@pytest.mark.parametrize('ts,encode', [(uid.RLELossless, rle), (FRAME_DEFLATE, deflate)])
def test_one_bit_compressed(ts, encode, shape):
    x = np.random.default_rng(0).integers(0, 2, (3, *shape)).astype(np.uint8)
    b = saved(frames_of(x, 1, ts, encode))
    for i, o in enumerate(x):
        np.testing.assert_array_equal(stored_pixels(read_dicom(b), i), o)
        close(dicom_pixels(b, frame=i), o)
    with pytest.raises(DicomError, match='cannot be decoded'): dicom_pixels(frames_of(x, 1, ts, lambda o: encode(o[:-2])))

@pytest.mark.parametrize('dtype,bits', [('u1',8), ('u2',12), ('i2',16), ('u1',6)])
def test_deflated_frames(dtype, bits):
    x = (np.random.default_rng(0).integers(0, 2**bits, (2,11,13)) - (2**(bits-1) if dtype == 'i2' else 0)).astype(dtype)
    b = saved(frames_of(x, bits, FRAME_DEFLATE, deflate))
    for i, o in enumerate(x): np.testing.assert_array_equal(stored_pixels(read_dicom(b), i), o)
    np.testing.assert_array_equal(dicom_pixels(b, frame=1), dicom_pixels(image(x, bits), frame=1))
    with pytest.raises(DicomError, match='cannot be decoded'): dicom_pixels(frames_of(x, bits, FRAME_DEFLATE, lambda o: deflate(o)[:-9]))

def test_deflated_frames_in_the_table(tmp_path):
    from dicomcam.summary import summarize
    x = np.arange(64, dtype=np.uint8).reshape(1,8,8)
    row, = summarize([write(tmp_path/'a.dcm', saved(frames_of(x, 8, FRAME_DEFLATE, deflate)))], n_jobs=1, progress=False).to_dict('records')
    assert row['transfer_syntax'] == 'Deflated Image Frame Compression' and row['img_mean'] == 31.5 and row['error'] is None

def test_deflated_frame_bomb():
    "A megabyte that inflates to a gigabyte is inflated to the size of its frame"
    bomb = deflate(bytes(1<<30))
    ds = frames_of(np.zeros((1,8,8), np.uint8), 8, FRAME_DEFLATE, lambda o: bomb)
    tracemalloc.start()
    assert (dicom_pixels(ds) == 0).all()
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


# --- whatever the header says: pixels in [0, 1], or an error ---

@pytest.mark.parametrize('colour', ['RGB', 'YBR_FULL'])
def test_colours_beyond_bits_stored(colour):
    x = waves(8, True)
    y = dicom_pixels(encoded_frame(x, pillow(x), uid.JPEGBaseline8Bit, 6, PhotometricInterpretation=colour))
    np.testing.assert_array_equal(y, dicom_pixels(encoded_frame(x, pillow(x), uid.JPEGBaseline8Bit, 8, PhotometricInterpretation=colour)))
    assert .5 < y.max() <= 1

def test_colours_have_no_sign():
    x = waves(8, True)
    close(dicom_pixels(image(x, PixelRepresentation=1)), x/255)

@pytest.mark.parametrize('bits', [0, 17, 40000])
def test_tables_of_no_bits(bits):
    ds = image(np.arange(64, dtype=np.uint8).reshape(8,8))
    with pytest.raises(DicomError, match='entries of .* bits'): dicom_pixels(image(RAMP, VOILUTSequence=lut(4, 0, bits, [1,2,3,4])))
    ds.PhotometricInterpretation = 'PALETTE COLOR'
    for c in ('Red', 'Green', 'Blue'):
        setattr(ds, f'{c}PaletteColorLookupTableDescriptor', [4, 0, bits])
        setattr(ds, f'{c}PaletteColorLookupTableData', b'\1\0\2\0\3\0\4\0')
    with pytest.raises(DicomError, match='entries of .* bits'): dicom_pixels(ds)

def test_first_value_of_a_table_is_signed_as_the_pixels_are():
    "PS3.3 C.11.1.1: by Pixel Representation, not by what values the image happens to have"
    x, table = np.arange(-1500, 1500, dtype=np.int16).reshape(50, 60), list(range(3000))
    bright = np.maximum(x, 0)
    for o in (x, bright): close(modality(o, image(o, ModalityLUTSequence=lut(3000, 65536-1500, 16, table))), o.astype(float)+1500)
    y = dicom_pixels(image(x, VOILUTSequence=lut(3000, 65536-1500, 12, table)))
    np.testing.assert_array_equal(dicom_pixels(image(bright, VOILUTSequence=lut(3000, 65536-1500, 12, table)))[x>=0], y[x>=0])
    unsigned = np.full((8,8), 64036, np.uint16)
    close(modality(unsigned, image(unsigned, ModalityLUTSequence=lut(3000, 64030, 16, table))), unsigned*0.+6)

@pytest.mark.parametrize('attrs', [dict(RescaleSlope='nan'), dict(RescaleIntercept='nan'), dict(RescaleSlope='inf'), dict(RescaleSlope='1e308'),
                                   dict(RescaleIntercept='-inf'), dict(ModalityLUTSequence=lut(4, 0, 16, b'', 'OW'))])
def test_no_number_no_picture(attrs):
    "Black, as it was, is a picture too"
    with pytest.raises(DicomError, match='cannot be displayed'): dicom_pixels(image(RAMP, **attrs))

def test_segmented_palette():
    "PS3.3 C.7.9.2: discrete, linear and indirect segments, of 16 and of 8 bits"
    expected = np.array([10, 20, *range(21, 41), 10, 20, *range(21, 41)])
    for bits in (8, 16):
        kind = f'<u{bits//8}'
        pointer = (0).to_bytes(4, 'little')
        data = np.array([0, 2, 10, 20, 1, 20, 40, 2, 2], kind).tobytes() + pointer
        ds = image(np.arange(44, dtype=np.uint8).reshape(4, 11), PhotometricInterpretation='PALETTE COLOR')
        for c in ('Red', 'Green', 'Blue'):
            setattr(ds, f'{c}PaletteColorLookupTableDescriptor', [44, 0, bits])
            setattr(ds, f'Segmented{c}PaletteColorLookupTableData', data)
        close(dicom_pixels(ds)[..., 0].ravel(), expected/(2**bits-1))

NUMBERS = [0, 1, 2, 7, 8, 12, 15, 16, 17, 255, 4096, 32767, 32768, 65535]
DECIMALS = ['0', '1', '-1', 'nan', 'inf', '-inf', '1e308', '-1e308', '1e-308', '40', '-1024', '400', '']

def random_table(rnd, vr):
    it = Dataset()
    if rnd.random() < .9: it.add_new('LUTDescriptor', rnd.choice(['US', 'SS']), [rnd.choice(NUMBERS[:-2]) for _ in range(rnd.choice([3, 3, 3, 3, 2]))])
    data = bytes(rnd.randrange(256) for _ in range(rnd.choice([0, 1, 2, 15, 16, 64, 300])))
    if rnd.random() < .9: it.add_new('LUTData', vr, data if vr == 'OW' else list(data))
    return Sequence([it] if rnd.random() < .95 else [])

def random_image(seed):
    "An image whose header was made by dice"
    import random
    rnd, rng = random.Random(seed), np.random.default_rng(seed)
    dtype = rnd.choice(['u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'f4', 'f8'])
    x = rng.integers(0, 256, (6,8,3)[:rnd.choice([2, 2, 3])]).astype(dtype)
    if dtype[0] == 'f': x.flat[:rnd.choice([0, 1, 24])] = rnd.choice([np.nan, np.inf, -np.inf, 3e38])
    if x.ndim == 2 and rnd.random() < .2: x = x*0 + rnd.choice([0, 1])
    ds = image(x.astype(dtype))
    for k in ('BitsStored', 'HighBit', 'PixelRepresentation', 'PlanarConfiguration', 'PixelPaddingValue', 'PixelPaddingRangeLimit'):
        if rnd.random() < .25: setattr(ds, k, rnd.choice(NUMBERS))
    for k in ('RescaleSlope', 'RescaleIntercept', 'WindowCenter', 'WindowWidth'):
        if rnd.random() < .3: setattr(ds, k, rnd.choice([rnd.choice(DECIMALS), [rnd.choice(DECIMALS), rnd.choice(DECIMALS)]]))
    for k in ('ModalityLUTSequence', 'VOILUTSequence'):
        if rnd.random() < .15: setattr(ds, k, random_table(rnd, rnd.choice(['OW', 'US'])))
    if rnd.random() < .3: ds.VOILUTFunction = rnd.choice(['LINEAR', 'LINEAR_EXACT', 'SIGMOID', 'NONE'])
    if rnd.random() < .3: ds.PhotometricInterpretation = rnd.choice(['MONOCHROME1', 'PALETTE COLOR', 'RGB', 'YBR_FULL', 'YBR_FULL_422', ' x'])
    for c in ('Red', 'Green', 'Blue'):
        setattr(ds, f'{c}PaletteColorLookupTableDescriptor', [rnd.choice(NUMBERS) for _ in range(3)])
        part = rnd.choice(['', 'Segmented'])
        setattr(ds, f'{part}{c}PaletteColorLookupTableData', bytes(rnd.randrange(4) for _ in range(rnd.choice([0, 1, 8, 64, 512]))))
    return ds

def test_random_headers():
    "Pixels in [0, 1], none of them NaN, or one error"
    n = 0
    for seed in range(1500):
        try: y = dicom_pixels(random_image(seed))
        except DicomError: continue
        n += 1
        assert y.dtype == np.float32 and 0 <= y.min() and y.max() <= 1, seed # false for NaN, too
    assert 300 < n < 1400

def test_a_transfer_syntax_of_two_lines():
    "What a file calls its encoding is told in one line, without control characters"
    ds = pydicom.dcmread(get_testdata_file('CT_small.dcm', download=False))
    ds.file_meta.TransferSyntaxUID = '1.2.8\n0.10008\x1b.1'
    with pytest.raises(DicomError) as e: dicom_pixels(ds)
    assert str(e.value).isprintable() and '1.2.8\\n0' in str(e.value)
