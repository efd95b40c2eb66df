"Volumes against geometry by hand, SimpleITK and highdicom; and what is no regular stack of slices, each in one line"
import re, warnings
from pathlib import Path

import numpy as np, pydicom, pytest, torch
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from test_dicom import image

from dicomcam.gradcam import gradcam
from dicomcam.pixels import dicom_pixels
from dicomcam.read import DicomError
from dicomcam.volume import Volume, dicom_volume

AXIAL = [1., 0, 0, 0, 1, 0]
N, H, W = 5, 6, 8
RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 4096, (N, H, W)).astype(np.uint16)

def place(k, orientation=AXIAL, first=(-10., -20, 30), gap=2.5):
    "Where slice `k` lies, `gap` mm apart along the normal"
    row, column = np.array(orientation, float).reshape(2, 3)
    return (np.array(first)+k*gap*np.cross(row, column)).round(6).tolist()

def plane(k, stored=None, uid='1.2.3', **attrs):
    "A CT slice that says as little in its name and number as those of scanners"
    header = dict(Modality='CT', SeriesInstanceUID=uid, SOPInstanceUID=f'{uid}.{k}', SOPClassUID=CTImageStorage, InstanceNumber=(3*k)%7,
        ImageType=['ORIGINAL', 'PRIMARY', 'AXIAL'], ImagePositionPatient=place(k), ImageOrientationPatient=AXIAL, PixelSpacing=[.5, .75],
        SliceThickness=9, RescaleSlope=1, RescaleIntercept=-1024)
    ds = image(STORED[k%N] if stored is None else stored, bits=12, **{**header, **attrs})
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds

def write(folder, planes):
    "Each into a file; the names are in no order"
    files = []
    for i, ds in enumerate(planes):
        files.append(folder/f'{(7*i+3)%len(planes)}-{i}.dcm')
        ds.save_as(files[-1], enforce_file_format=True)
    return files

def fails(files, *parts, **kw):
    "One line with all of these in it"
    with pytest.raises(DicomError) as e: dicom_volume(files, **kw)
    text = str(e.value)
    assert '\n' not in text and all(str(o) in text for o in parts), text

def quiet(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return dicom_volume(*args, **kw)


# --- what is right ---

def test_order_units_and_geometry(tmp_path):
    "Sorted by position, whatever names and numbers say; each slice by its own rescale; spacing of the positions, not the thickness"
    slopes = [1, .5, 2, 3, .25]
    files = write(tmp_path, [plane(k, RescaleSlope=slopes[k], RescaleIntercept=-1000+k) for k in range(N)])
    by_hand = STORED*np.array(slopes)[:, None, None]+(np.arange(N)-1000)[:, None, None]
    for given in tmp_path, files, files[::-1]:
        v = quiet(given)
        assert v.array.dtype == np.float32 and v.array.flags.c_contiguous
        np.testing.assert_array_equal(v.array, by_hand.astype(np.float32))
        assert v.spacing == (2.5, .5, .75) and v.files == files
        np.testing.assert_allclose(v.where((3, 2, 1)), [-10+.75, -20+2*.5, 30+3*2.5])
    assert re.fullmatch(r'Volume of 5 x 6 x 8 voxels of 2.5 x 0.5 x 0.75 mm, values -?\d+(\.\d+)? to \d+(\.\d+)?', repr(v))

TILT = np.deg2rad(20)
PLANES = dict(feet_first=[1., 0, 0, 0, -1, 0], sagittal=[0., 1, 0, 0, 0, -1], coronal=[1., 0, 0, 0, 0, -1],
    oblique=[np.cos(TILT), np.sin(TILT), 0, -np.sin(TILT)*.6, np.cos(TILT)*.6, -.8])

@pytest.mark.parametrize('name', PLANES)
def test_any_orientation(tmp_path, name):
    "Along the normal of the slices, whichever way that points"
    o = [round(x, 9) for x in PLANES[name]]
    write(tmp_path, [plane(k, ImageOrientationPatient=o, ImagePositionPatient=place(k, o)) for k in range(N)])
    v = quiet(tmp_path)
    np.testing.assert_array_equal(v.array, STORED-1024.)
    row, column = np.reshape(o, (2, 3))
    by_hand = np.array([-10, -20, 30])+3*2.5*np.cross(row, column)+2*.5*column+1*.75*row
    np.testing.assert_allclose(v.where((3, 2, 1)), by_hand, atol=1e-5)
    np.testing.assert_allclose(v.direction @ v.direction.T, np.eye(3), atol=1e-6)

@pytest.mark.parametrize('name', PLANES)
def test_equals_simpleitk(tmp_path, name):
    "Array, spacing and the place of each voxel, as ITK has them"
    sitk = pytest.importorskip('SimpleITK')
    o = [round(x, 9) for x in PLANES[name]]
    write(tmp_path, [plane(k, ImageOrientationPatient=o, ImagePositionPatient=place(k, o)) for k in range(N)])
    peer = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    v = quiet(tmp_path)
    np.testing.assert_array_equal(v.array, sitk.GetArrayFromImage(peer))
    np.testing.assert_allclose(v.spacing, peer.GetSpacing()[::-1], atol=1e-5)
    for voxel in (0, 0, 0), (4, 1, 7), (2, 5, 3):
        np.testing.assert_allclose(v.where(voxel), peer.TransformIndexToPhysicalPoint(voxel[::-1]), atol=1e-4)

def series_of_pydicom(name): return Path(get_testdata_file(name, download=False)).parent

def test_a_real_series():
    "Five slices of a CT, by hand and by highdicom"
    folder = series_of_pydicom('dicomdirtests/98892001/CT5N/2062')
    v = quiet(folder)
    assert [o.name for o in v.files] == ['3353', '3023', '2693', '2392', '2062']
    for o, values in zip(v.files, v.array):
        ds = pydicom.dcmread(o)
        np.testing.assert_array_equal(values, ds.pixel_array*float(ds.RescaleSlope)+float(ds.RescaleIntercept))
    np.testing.assert_allclose(v.where((2, 3, 5)), [-72.199997+5*.488281, -143+3*.488281, -1.2375+2*2.5])
    hd = pytest.importorskip('highdicom')
    peer = hd.get_volume_from_series([pydicom.dcmread(o) for o in v.files])
    if peer.array.shape[0] == 5 and peer.position == tuple(v.origin): np.testing.assert_array_equal(peer.array, v.array)
    else: np.testing.assert_array_equal(peer.array[::-1], v.array)
    assert peer.spacing == pytest.approx(v.spacing)

def test_localizers_are_left_out():
    "The same scan with its localizers: a warning names one, and the volume is the same"
    root = series_of_pydicom('dicomdirtests/98892001/CT5N/2062').parent
    files = [*sorted((root/'CT2N').iterdir()), *sorted((root/'CT5N').iterdir())]
    with pytest.warns(UserWarning, match=r'CT2N.6293: localizers are left out, 2 of 7 images'): v = dicom_volume(files)
    np.testing.assert_array_equal(v.array, dicom_volume(root/'CT5N').array)
    with pytest.warns(UserWarning, match='localizers'): fails(root/'CT2N', root/'CT2N', 'no image')

def test_datasets_and_a_report_beside(tmp_path):
    "Datasets in memory; what is no image does not count"
    planes = [plane(k) for k in range(N)]
    report = Dataset()
    report.SeriesInstanceUID, report.Modality = '1.9', 'SR'
    v = quiet([planes[3], report, *planes[:3], planes[4]])
    np.testing.assert_array_equal(v.array, STORED-1024.)
    assert v.files[3] is planes[3]

def test_positions_of_one_decimal():
    "Slices 1.25 mm apart that a scanner wrote to one decimal are a regular grid, and all of them count for the spacing"
    v = quiet([plane(k, ImagePositionPatient=[0, 0, round(1.25*k+1e-6, 1)]) for k in range(41)])
    assert v.spacing[0] == pytest.approx(1.25) and len(v.array) == 41

def enhanced(order, **attrs):
    "All slices in one file, frames in another order than that of their places"
    ds = image(STORED[order], bits=12, Modality='CT', SeriesInstanceUID='1.2.3', SOPClassUID='1.2.840.10008.5.1.4.1.1.2.1')
    def item(**kw):
        o = Dataset()
        for k, x in kw.items(): setattr(o, k, x)
        return o
    def group(**kw): return item(**{k: [item(**x)] for k, x in kw.items()})
    ds.SharedFunctionalGroupsSequence = [group(PlaneOrientationSequence=dict(ImageOrientationPatient=AXIAL),
        PixelMeasuresSequence=dict(PixelSpacing=[.5, .75], SliceThickness=9))]
    ds.PerFrameFunctionalGroupsSequence = [group(PlanePositionSequence=dict(ImagePositionPatient=place(k)),
        PixelValueTransformationSequence=dict(RescaleSlope=1+k, RescaleIntercept=-1024, RescaleType='HU')) for k in order]
    for k, x in attrs.items(): setattr(ds, k, x)
    return ds

def test_enhanced_multi_frame(tmp_path):
    "One file of many frames: place and rescale of each in its functional groups (PS3.3 C.7.6.16)"
    fn = tmp_path/'all.dcm'
    enhanced([3, 0, 4, 1, 2]).save_as(fn, enforce_file_format=True)
    for given in fn, tmp_path, [fn]:
        v = quiet(given)
        np.testing.assert_array_equal(v.array, STORED*(1.+np.arange(N))[:, None, None]-1024)
        assert v.spacing == (2.5, .5, .75) and v.files == [fn]*N
        np.testing.assert_allclose(v.where((1, 0, 0)), place(1))

def test_frames_without_a_place(tmp_path):
    "Frames that say nothing about their place; more frames claimed than there are"
    fn = tmp_path/'all.dcm'
    ds = enhanced([0, 1, 2, 3, 4])
    del ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    ds.save_as(fn, enforce_file_format=True)
    fails(fn, fn, 'frame 2', 'ImagePositionPatient')
    enhanced([0, 1, 2, 3, 4], NumberOfFrames=10**9).save_as(fn, enforce_file_format=True)
    fails(fn, fn, '1000000000 frames', '5')
    image(STORED, ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=AXIAL, PixelSpacing=[1, 1]).save_as(fn, enforce_file_format=True)
    fails(fn, fn, '5 frames', 'functional groups')


# --- several series ---

def test_several_series(tmp_path):
    "All are listed, with what to do"
    planes = [plane(k) for k in range(N)]+[plane(k, uid='1.2.9', SeriesDescription='thin\x1b[31m', Modality='PT') for k in range(3)]
    write(tmp_path, planes)
    fails(tmp_path, tmp_path, 'series=', '1.2.3 (CT, 5 files)', '1.2.9 (PT, thin\\x1b[31m, 3 files)')
    fails(tmp_path, '1.2.4', '1.2.3 (CT, 5 files)', series='1.2.4')
    assert len(quiet(tmp_path, series='1.2.9').array) == 3


# --- no regular grid ---

def ramp(k, places): # a volume that is linear in all directions, so that interpolation is exact
    y, x = np.mgrid[:H, :W]
    return (1000+40*places[k]+3*y+2*x).round().astype(np.uint16)

def uneven(places): return [plane(k, ramp(k, places), ImagePositionPatient=[0, 0, places[k]], RescaleIntercept=0) for k in range(len(places))]

def test_missing_slices(tmp_path):
    "Named with both neighbours, their positions and the number; interpolated where that is asked for"
    places = [0, 2, 4, 10, 12, 16]
    files = write(tmp_path, uneven(places))
    fails(files, files[2], files[3], 'missing slices: 2', 'at 4 and 10 mm', '3 in all', 'regrid=True')
    with pytest.warns(UserWarning, match='missing slices: 2.*interpolated'): v = dicom_volume(tmp_path, regrid=True)
    np.testing.assert_array_equal(v.array, np.stack([ramp(k, range(0, 18, 2)) for k in range(9)]))
    assert v.files == [files[0], files[1], files[2], None, None, files[3], files[4], None, files[5]] and v.spacing == (2, .5, .75)

def test_one_slice_missing_of_four():
    "The least there can be: three slices, two distances"
    fails(uneven([0, 1, 3]), 'missing slices: 1', 'at 1 and 3 mm')

def test_real_gap():
    "pydicom's CT2: slices of a scan from which most were taken out"
    folder = series_of_pydicom('dicomdirtests/77654033/CT2/17106')
    for regrid in False, True: # four slices do not make 165
        fails(folder, folder/'17106', folder/'17136', 'missing slices: 161', 'at -99.48 and 103.02 mm', 'more than there are', regrid=regrid)

def test_unequal_spacing(tmp_path):
    "Named with the slices where it is worst; interpolated onto the usual distance where that is asked for"
    places = [0, 2, 4, 7, 9, 11, 14] # 3 mm twice: the grid of 7 steps of 2 mm ends at the last slice
    files = write(tmp_path, uneven(places))
    fails(files, files[2], files[3], '2 mm apart, but 3 mm', 'at 4 and 7 mm', 'regrid=True')
    with pytest.warns(UserWarning, match='2 mm apart, but 3 mm'): v = dicom_volume(files, regrid=True)
    steps = np.linspace(0, 14, len(v.array))
    np.testing.assert_allclose(v.array, [ramp(0, [s])+0*i for i, s in enumerate(steps)], atol=.51)
    assert v.spacing[0] == pytest.approx(steps[1]) and v.files[0] == files[0] and v.files[-1] == files[-1] and None in v.files

def test_small_differences_do_not_add_up():
    "4 % at each slice are no regular grid after some"
    places = np.cumsum([0]+[1]*10+[1.04]*10).round(4).tolist()
    fails([plane(k, ImagePositionPatient=[0, 0, p]) for k, p in enumerate(places)], 'mm apart, but')

def test_tilted_gantry(tmp_path):
    "Slices shifted against each other in their plane: named; moved back where that is asked for"
    y, x = np.mgrid[:H, :W]
    def tilted(k): return plane(k, (1000+10*(y+2*(k-2))+7*x).astype(np.uint16), ImagePositionPatient=[0, k, 5*k], RescaleIntercept=0)
    files = write(tmp_path, [tilted(k) for k in range(N)]) # a row is 0.5 mm: two rows a slice
    fails(files, files[0], '2 mm beside', 'tilted gantry', 'regrid=True')
    with pytest.warns(UserWarning, match='tilted gantry'): v = dicom_volume(files, regrid=True)
    for k in range(N): # rows that the slice has no data for are left out
        rows = slice(max(0, 2*(k-2)), H+min(0, 2*(k-2)))
        np.testing.assert_allclose(v.array[k][rows], (1000+10*y+7*x)[rows], atol=1e-3)
    np.testing.assert_allclose(v.where((0, 0, 0)), [0, 2, 0])
    assert v.spacing == (5, .5, .75) and v.files == files

def test_within_half_a_pixel():
    "So little is rounding, not a tilt: nothing is moved"
    v = quiet([plane(k, ImagePositionPatient=[0, .05*k, 5*k]) for k in range(N)])
    np.testing.assert_array_equal(v.array, STORED-1024.)


# --- no stack at all ---

@pytest.mark.parametrize('attrs, said', [
    (dict(ImagePositionPatient=place(2)), ['lies where', 'one acquisition']),
    (dict(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), ['ImageOrientationPatient is (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)']),
    (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), ['right angle']),
    (dict(ImageOrientationPatient=[1, 0, 0]), ['not 6 numbers']),
    (dict(ImagePositionPatient=[0, 0, '1e300']), ['not 3 numbers, of less than a kilometre']),
    (dict(PixelSpacing=[.5, .5]), ['PixelSpacing is (0.5, 0.5)', '(0.5, 0.75)']),
    (dict(PixelSpacing=[0, 0]), ['PixelSpacing is not above 0']),
    (dict(stored=np.zeros((4, 4), np.uint16)), ['rows and columns is (4, 4)', '(6, 8)']),
    (dict(ImagePositionPatient=None), ['has no ImagePositionPatient', 'without it']),
    (dict(ImageOrientationPatient=None), ['has no ImageOrientationPatient']),
    (dict(PixelSpacing=None), ['has no PixelSpacing']),
    (dict(RescaleSlope=1e300), ['no numbers']),
    (dict(stored=np.zeros((H, W, 3), np.uint8), BitsStored=8, HighBit=7), ['colour']),
])
def test_one_file_that_does_not_belong(tmp_path, attrs, said):
    "It is named, with what is wrong"
    odd = plane(4, **attrs)
    for k in [k for k, x in attrs.items() if x is None]: delattr(odd, k)
    files = write(tmp_path, [plane(k) for k in range(4)]+[odd])
    fails(tmp_path, *said)
    if 'right' not in str(said): fails(files, files[4].name)

def test_broken_file(tmp_path):
    "Cut off in its pixels, cut off in its header, empty: each names the file"
    files = write(tmp_path, [plane(k) for k in range(N)])
    whole = files[3].read_bytes()
    for part in whole[:-20], whole[:200], b'':
        files[3].write_bytes(part)
        fails(files, files[3])

def test_nothing_to_stack(tmp_path):
    "An empty folder, no folder, one slice"
    fails(tmp_path, tmp_path, 'no image')
    fails(tmp_path/'none', tmp_path/'none', 'no such')
    fails([], 'no image')
    file, = write(tmp_path, [plane(0)])
    fails(tmp_path, file, 'one slice')


# --- for a network ---

def test_tensor_is_what_dicom_pixels_shows(tmp_path):
    "The same window, slice by slice; without one, between two percentiles of the whole volume"
    files = write(tmp_path, [plane(k) for k in range(N)])
    v = dicom_volume(tmp_path)
    x = v.tensor((1500, -600))
    assert x.shape == (1, 1, N, H, W) and x.dtype == torch.float32
    np.testing.assert_allclose(x[0, 0], [dicom_pixels(o, window=(1500, -600)) for o in files], atol=1e-6)
    before, x = v.array.copy(), v.tensor()
    low, high = np.sort(v.array.ravel())[[1, -2]] # of 240 values: the 0.5th and the 99.5th percentile
    np.testing.assert_allclose(x[0, 0], np.clip((v.array-low)/(high-low), 0, 1), atol=1e-6)
    np.testing.assert_array_equal(v.array, before)

def linear_volume(shape, spacing):
    "Values that are linear in mm"
    v = Volume(np.empty(shape, np.float32), spacing, np.array([1., 2, 3]), np.eye(3)[::-1], list('abcdefghijkl'[:shape[0]]))
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
    v.array[:] = (v.where(index) @ [1., 2, 3])
    return v

def test_resample():
    "Exact on what is linear; the first voxel stays where it is; as many voxels as fit"
    v = linear_volume((6, 8, 10), (2.5, .5, .75))
    for new in .5, (1.25, .5, .3), (.7, .4, .33):
        r = v.resample(new)
        full = np.broadcast_to(new, 3)
        assert r.spacing == tuple(full) and r.array.dtype == np.float32
        assert r.array.shape == tuple(int((n-1)*s/t+1e-6)+1 for n, s, t in zip(v.array.shape, v.spacing, full))
        np.testing.assert_allclose(r.array, linear_volume(r.array.shape, r.spacing).array, atol=1e-3)
        assert r.files == [None]*len(r.array)
    assert v.resample((2.5, .3, .3)).files == v.files
    np.testing.assert_array_equal(v.resample(v.spacing).array, v.array)
    for bad in 0, -1, float('nan'):
        with pytest.raises(ValueError, match='spacing of'): v.resample(bad)

def test_resample_does_not_alias():
    "A pattern finer than the new voxels becomes its mean"
    x = np.indices((16, 16, 16)).sum(0) % 2*100.
    v = Volume(x.astype(np.float32), (1., 1., 1.), np.zeros(3), np.eye(3)[::-1], [None]*16)
    inner = v.resample(4).array[1:-1, 1:-1, 1:-1]
    assert np.abs(inner-50).max() < 5

def test_gradcam_of_a_series(tmp_path):
    "From files to a map whose peak is a place in the patient: where the only bright voxel of the volume lies"
    stored = np.zeros((N, H, W), np.uint16)
    stored[3, 2, 6] = 3000
    write(tmp_path, [plane(k, stored[k]) for k in range(N)])
    v = dicom_volume(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(2, 2)).eval()
    for o in net.parameters(): o.data = o.data.abs()
    heat = gradcam(net, v.tensor((4000, 0)), classes=[1]).heat(0, 1)
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert peak == (3, 2, 6)
    np.testing.assert_allclose(v.where(peak), [-10+6*.75, -20+2*.5, 30+3*2.5])

@pytest.mark.parametrize('what, other', [('Modality', 'PT'), ('PatientID', 'somebody else'), ('FrameOfReferenceUID', '1.2.9'), ('RescaleSlope', None)])
def test_slices_of_another_patient_place_or_unit(tmp_path, what, other):
    "They have the same SeriesInstanceUID; nobody is named"
    same = dict(Modality='CT', PatientID='one', FrameOfReferenceUID='1.2.8', RescaleSlope=1)
    planes = [plane(k, **same) for k in range(N)]
    quiet(write(tmp_path, planes))
    if other is None: del planes[2][what]
    else: setattr(planes[2], what, other)
    files = write(tmp_path, planes)
    fails(files, files[2], f'its {what} is not that of most')
    with pytest.raises(DicomError) as e: dicom_volume(files)
    assert 'somebody' not in str(e.value)
