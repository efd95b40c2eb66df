"Files of 4 MB that are made to stop a folder: each is read, or refused in one line, within 5 s of CPU and 1 GB"
import io, json, os, subprocess, sys
from pathlib import Path

import pydicom, pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

import bombs
from dicomcam.dicom import DicomError, dicom_pixels, read_dicom
from dicomcam.read import conversion_cost, element_values
from dicomcam.summary import header_row, summarize

MB = 10**6
pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits of Linux')

CHILD = '''import json, logging, sys, warnings
import limited
from dicomcam.pixels import dicom_pixels
from dicomcam.summary import summarize
import pandas
warnings.simplefilter('ignore')
logging.disable()
def attempt(case):
    what, fn = case
    if what == 'table':
        df = summarize([fn], n_jobs=1, progress=False)
        return [len(df), df.error[0]]
    try: return list(dicom_pixels(fn).shape)
    except ValueError as e: return str(e)
print(json.dumps(limited.results(attempt, json.loads(sys.argv[1]), 5, limited.GB)))
'''

@pytest.mark.parametrize('first', range(6))
def test_bombs(first, tmp_path):
    names = list(bombs.BOMBS)[first::6]
    for name in names: (tmp_path/f'{name}.dcm').write_bytes(bombs.BOMBS[name](4*MB))
    cases = [(what, str(tmp_path/f'{name}.dcm')) for name in names for what in ('pixels', 'table')]
    tests = Path(__file__).parent
    env = os.environ | dict(PYTHONPATH=f'{tests}{os.pathsep}{tests.parent}')
    run = subprocess.run([sys.executable, '-c', CHILD, json.dumps(cases)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    for (what, fn), (outcome, secs) in zip(cases, json.loads(run.stdout.splitlines()[-1])):
        said = f'{fn} as {what}: {outcome}, {secs:.1f} s'
        if what == 'table': good = isinstance(outcome, list) and outcome[0] == 1
        else: good = outcome == [8, 8] or outcome.startswith(f'{fn}: ') and '\n' not in outcome
        assert good and 'memory' not in str(outcome) and secs < 5, said

# --- what is large and good ---

def encoded(ds, **kwargs):
    out = io.BytesIO()
    ds.save_as(out, **kwargs)
    return out.getvalue()

def of(keyword, items):
    "An item whose one sequence has these items"
    ds = Dataset()
    setattr(ds, keyword, items)
    return ds

def simple(**values):
    ds = Dataset()
    for k, v in values.items(): setattr(ds, k, v)
    return ds

@pytest.mark.parametrize('undefined', [False, True])
def test_2000_frames(undefined):
    "An enhanced object whose every frame has eight sequences and twenty elements of its own is read, and shown by its window"
    frames = []
    for i in range(2000):
        frame = Dataset()
        frame.FrameContentSequence = [simple(DimensionIndexValues=[1, i+1], TemporalPositionIndex=i+1, StackID='1', InStackPositionNumber=i+1)]
        frame.PlanePositionSequence = [simple(ImagePositionPatient=[0, 0, i])]
        frame.PlaneOrientationSequence = [simple(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
        frame.PixelMeasuresSequence = [simple(PixelSpacing=[1, 1], SliceThickness=1)]
        frame.FrameVOILUTSequence = [simple(WindowCenter=32, WindowWidth=64)]
        frame.PixelValueTransformationSequence = [simple(RescaleSlope=1, RescaleIntercept=0, RescaleType='US')]
        for o in frame: o.is_undefined_length = undefined
        frames.append(frame)
    ds = pydicom.dcmread(io.BytesIO(bombs.film()))
    ds.PerFrameFunctionalGroupsSequence = frames
    ds['PerFrameFunctionalGroupsSequence'].is_undefined_length = undefined
    b = encoded(ds)
    assert len(read_dicom(b).PerFrameFunctionalGroupsSequence) == 2000
    assert dicom_pixels(b)[7, 7] > .9
    row, problems = header_row(read_dicom(b))
    assert row['PerFrameFunctionalGroupsSequence'] == '2000 items' and problems == []

def test_contours():
    "The 50,000 numbers of a contour are read, and take nothing else from the table"
    points = [float(i) for i in range(50_000)]
    ds = pydicom.dcmread(io.BytesIO(bombs.film(ts=bombs.IMPLICIT)))
    ds.PatientID = 'x'
    ds.ROIContourSequence = [of('ContourSequence', [simple(ContourData=points)]) for _ in range(3)]
    b = encoded(ds)
    assert list(read_dicom(b).ROIContourSequence[2].ContourSequence[0].ContourData) == points
    row, problems = header_row(read_dicom(b))
    assert row['ROIContourSequence'].count('1 items') == 3 and row['Rows'] == 8 and problems == []

def test_palette_and_lut_of_65536_entries():
    lut = simple(LUTDescriptor=[0, 0, 16], LUTData=list(range(65536)))
    lut['LUTDescriptor'].VR = lut['LUTData'].VR = 'US'
    ds = pydicom.dcmread(io.BytesIO(bombs.film(ts=bombs.IMPLICIT)))
    ds.VOILUTSequence = [lut]
    for colour in ('Red', 'Green', 'Blue'): ds.add_new(f'{colour}PaletteColorLookupTableData', 'OW', bytes(131072))
    row, problems = header_row(read_dicom(encoded(ds)))
    assert row['RedPaletteColorLookupTableData'] == '131072 bytes' and '131072 bytes' in row['VOILUTSequence'] and problems == []

# --- the limits ---

def test_the_limit_of_parts_can_be_raised():
    b = bombs.film(bombs.sequence(bombs.item()*1000, True))
    with pytest.raises(DicomError, match='more than 2,000 parts .* larger max_parts'): read_dicom(b, max_parts=2000)
    assert len(read_dicom(b, max_parts=4000).ReferencedImageSequence) == 1000

@pytest.mark.parametrize('name', ['items', 'items_undefined', 'items_within', 'tiny', 'frames'])
def test_the_limit_of_parts_holds_in_a_deflated_file_too(name):
    import zlib
    plain = bombs.BOMBS[name](60_000)
    body = zlib.compress(plain[132+12+28:], wbits=-15)
    b = bombs.meta(bombs.DEFLATED) + body
    assert dicom_pixels(b).shape == (8, 8)
    with pytest.raises(DicomError, match='more than 2,000 parts'): read_dicom(b, max_parts=2000)

def test_deflation_is_what_the_transfer_syntax_says():
    "Not what the first bytes mention, nor hidden behind them"
    ct = Path(get_testdata_file('image_dfl.dcm', download=False)).read_bytes()
    assert read_dicom(ct).file_meta.TransferSyntaxUID == bombs.DEFLATED
    with pytest.raises(DicomError, match='inflates to more than 2,000 bytes'): read_dicom(ct, max_pixels=1000)
    with pytest.raises(DicomError, match='cut off'): read_dicom(ct[:-1000])
    b = bombs.film(bombs.element(0x00204000, 'LT', b'Not ' + bombs.DEFLATED.encode()) + bombs.element(0x00091010, 'OB', bytes(5000)))
    assert dicom_pixels(b, max_pixels=1000).shape == (8, 8)

def test_nesting_says_which_limit():
    with pytest.raises(DicomError, match='more deeply than Python follows .*sys.setrecursionlimit'): read_dicom(bombs.within(40_000, True))

@pytest.mark.parametrize('name, vr, tag, one', [('WindowCenter', 'DS', 0x00281050, b'1\\'), ('ContrastBolusVolume', 'DS', 0x00181041, b'1\\')])
def test_a_long_element_costs_its_own_cell(name, vr, tag, one):
    ds = read_dicom(bombs.texts(vr, tag, one)(500_000) if tag < 0x00280000 else bombs.BOMBS['window'](500_000))
    row, problems = header_row(ds)
    assert row[name] is None and row['Rows'] == 8 and problems == [f'{name} cannot be read (more values than a table takes; read_dicom has them)']
    assert element_values(ds, [name, 'Rows']) == {'Rows': 8}
    assert len(ds[name].value) >= 250_000 # for whoever asks

def test_cost_is_no_less_than_the_values():
    ds = read_dicom(get_testdata_file('CT_small.dcm', download=False))
    for tag, raw in ds.items(): assert conversion_cost(raw) >= (ds[tag].VM if ds[tag].VR in ('DS', 'IS', 'CS', 'UI', 'PN') else 1)
