"""The table: fastai's columns and values, NumPy's statistics, a row for each file whatever happens, and no process left behind"""
import csv, json, math, ntpath, os, signal, socket, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock
from urllib.parse import unquote_to_bytes

import numpy as np, pandas as pd, pydicom, pytest
from click.testing import CliRunner
from joblib import parallel_config
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence

from dicomcam import cli, summary
from dicomcam.dicom import DicomError
from dicomcam.summary import _batches, column_name, find_dicoms, header_row, is_phi, pixel_stats, summarize, years

pytestmark = pytest.mark.filterwarnings('ignore')
ROOT = Path(pydicom.__file__).parent/'data/test_files'
IMAGES = [get_testdata_file(f'{o}.dcm', download=False) for o in
          '''CT_small MR_small MR_small_RLE JPEG2000 JPEG-lossy SC_rgb_rle_2frame examples_rgb_color examples_palette examples_ybr_color rtdose
             liver_1frame image_dfl SC_rgb_small_odd SC_rgb_rle_32bit MR_small_bigendian JPEGLSNearLossless_08'''.split()]


@pytest.fixture(scope='module')
def radiographs():
    if 'DICOMCAM_TEST_DATA' not in os.environ: pytest.skip('DICOMCAM_TEST_DATA is not set: no real radiographs')
    return find_dicoms(os.environ['DICOMCAM_TEST_DATA'])

def run(code, **kwargs): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=600, **kwargs)

def dataset(**attrs):
    ds = FileDataset('test', {}, file_meta=FileMetaDataset(), preamble=b'\0'*128)
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = uid.ExplicitVRLittleEndian, '1.2', '1.3'
    ds.SOPInstanceUID = '1.2.3'
    for k,v in attrs.items(): setattr(ds, k, v)
    return ds


# --- the values ---

def test_as_fastai(radiographs):
    "The columns and values of fastai's from_dicoms: names as text, ages as years, the rest the same"
    from fastai.basics import L
    import fastai.medical.imaging
    fns = radiographs[:20]
    theirs = pd.DataFrame.from_dicoms(L(fns), px_summ=True)
    ours = summarize(fns, n_jobs=1, progress=False)
    assert [o for o in ours.columns if o in theirs.columns]==theirs.columns.tolist()
    for c in theirs.columns:
        if c=='PatientAge': assert ours[c].tolist()==[float(o.strip('Y')) for o in theirs[c]]
        elif c.startswith('img_'): np.testing.assert_allclose(ours[c], theirs[c].astype(float), rtol=1e-6)
        else: assert [str(o) for o in ours[c]]==[str(o) for o in theirs[c]], c
    assert {'MultiPixelSpacing','PixelSpacing','PixelSpacing1','img_min','img_max','img_mean','img_std','img_pct_window','fname'} <= set(theirs.columns)

@pytest.mark.parametrize('fn', IMAGES, ids=lambda o: Path(o).name)
@pytest.mark.parametrize('window', [(80,40), (1500,-600), (300,100)])
def test_as_numpy(fn, window):
    s = pixel_stats(pydicom.dcmread(fn), window)
    ds = pydicom.dcmread(fn)
    x = ds.pixel_array.astype(np.float64)
    expected = dict(img_min=x.min(), img_max=x.max(), img_mean=x.mean(), img_std=x.std())
    for k,v in expected.items(): assert s[k]==pytest.approx(v, rel=1e-6), k
    u,(w,l) = x*float(ds.get('RescaleSlope', 1))+float(ds.get('RescaleIntercept', 0)), window
    assert s['img_pct_window']==pytest.approx(((u>l-w//2) & (u<l+w//2)).mean(), rel=1e-6)

def test_as_numpy_on_radiographs(radiographs):
    df = summarize(radiographs[:30], n_jobs=2, progress=False)
    for fn,r in zip(radiographs, df.itertuples()):
        x = pydicom.dcmread(fn).pixel_array
        np.testing.assert_allclose([r.img_min, r.img_max, r.img_mean, r.img_std], [x.min(), x.max(), x.mean(), x.std()], rtol=1e-6)
        assert r.img_pct_window==pytest.approx(((x>0) & (x<80)).mean(), rel=1e-6)

@pytest.mark.parametrize('age,expected', [('067Y',67), ('67',67), ('006M',.5), ('026W',.4983), ('073D',.19986), (' 12Y ',12), ('012y',12)])
def test_years(age, expected): assert years(age)==pytest.approx(expected, rel=1e-3)

@pytest.mark.parametrize('age', ['', 'Y', '67X', 'old', '-5Y', '6.5'])
def test_no_years(age): assert math.isnan(years(age))

def test_types():
    ds = dataset(PatientName='Doe^Jane=土井', PatientAge='067Y', PatientWeight='70.5', SeriesNumber='3', ImageType=['ORIGINAL','PRIMARY'], PixelSpacing=[.1,.2],
                 Rows=7, PatientBirthDate='', PatientSize=None, StudyInstanceUID='1.2.840')
    row,problems = header_row(ds)
    assert not problems and {k:(v,type(v)) for k,v in row.items()}=={k:(v,type(v)) for k,v in dict(
        PatientName='Doe^Jane=土井', PatientAge=67., PatientWeight=70.5, SeriesNumber=3, MultiImageType=1, ImageType='ORIGINAL', ImageType1='PRIMARY',
        MultiPixelSpacing=1, PixelSpacing=.1, PixelSpacing1=.2, Rows=7, PatientBirthDate='', PatientSize=None, StudyInstanceUID='1.2.840',
        SOPInstanceUID='1.2.3').items()}

def test_sequences_and_private_elements():
    it,code = Dataset(), Dataset()
    code.CodeValue, it.PersonIdentificationCodeSequence = '42', Sequence([code])
    it.PersonName = 'Doe^Jane'
    ds = dataset(ContentSequence=Sequence([it, Dataset()]), ReferencedImageSequence=Sequence([]))
    for creator in ('ACME','OTHER'):
        block = ds.private_block(0x0011, creator, create=True)
        block.add_new(1, 'LO', f'one of {creator}')
        block.add_new(2, 'DS', ['1.5','2'])
    ds.add_new(0x60000010, 'US', 5); ds.add_new(0x60020010, 'US', 6); ds.add_new(0x00091001, 'LO', 'no creator'); ds.add_new(0x00080000, 'UL', 9)
    ds.add_new(0x00280010, 'US', 3); ds.add_new(0x00089999, 'LO', 'unknown')
    row,problems = header_row(ds)
    assert not problems
    assert json.loads(row['ContentSequence'])==[{'PersonIdentificationCodeSequence': '[{"CodeValue": "42"}]', 'PersonName':'Doe^Jane'}, {}]
    assert row['ReferencedImageSequence']=='[]'
    assert row['(0011,xx01) ACME']=='one of ACME' and row['(0011,xx01) OTHER']=='one of OTHER'
    assert row['Multi(0011,xx02) ACME']==1 and row['(0011,xx02) ACME']==1.5 and row['(0011,xx02) ACME1']==2
    assert row['OverlayRows']==5 and row['OverlayRows (6002)']==6
    assert row['(0009,1001)']=='no creator' and row['(0008,9999)']=='unknown' and row['(0008,0000)']==9
    assert len(row)==sum(1 if ds[t].VM<2 or ds[t].VR=='SQ' else ds[t].VM+1 for t in ds.keys())

def test_long_values():
    ds = dataset(GridFrameOffsetVector=list(range(500)), RedPaletteColorLookupTableData=bytes(1000), AdditionalPatientHistory='x'*50_000)
    row,_ = header_row(ds)
    assert row['RedPaletteColorLookupTableData']=='1000 bytes' and len(row['AdditionalPatientHistory'])==10_000
    assert json.loads(row['GridFrameOffsetVector'])==list(range(500)) and 'GridFrameOffsetVector1' not in row

def test_wide_and_long(tmp_path, monkeypatch):
    "A header of very many elements is cut, and the row says so; of a long sequence no more items are looked at than a cell holds; a time limit may be infinite"
    ds = dataset(Modality='CR')
    for i in range(6000): ds.add_new(0x00200000+0x4000+i, 'CS', 'X')
    ds.save_as(tmp_path/'a.dcm', enforce_file_format=True)
    df = summarize([tmp_path/'a.dcm', IMAGES[0]], pixels=False, n_jobs=1, progress=False, time_limit=math.inf)
    assert summary.MAX_CELLS<=len(df.columns)<6000 and 'the rest of the header is too long' in df.error[0] and df.error.isna()[1] and df.Modality[0]=='CR'
    header, seen = summary._header, []
    monkeypatch.setattr(summary, '_header', lambda *args: seen.append(1) or header(*args))
    row, problems = header_row(dataset(ReferencedImageSequence=Sequence([Dataset() for _ in range(50_000)])))
    assert row['ReferencedImageSequence']=='50000 items' and not problems and len(seen)<5000


# --- identifying attributes ---

@pytest.mark.parametrize('kw,phi', [(o,True) for o in '''PatientName PatientID PatientBirthDate PatientSex PatientAge PatientWeight StudyDate StudyTime AccessionNumber
    InstitutionName ReferringPhysicianName StudyInstanceUID SOPInstanceUID SeriesDescription OperatorsName DeviceSerialNumber AcquisitionDate StudyID
    PatientComments RequestAttributesSequence DeviceUID ProtocolName StationName'''.split()] +
    [(o,False) for o in 'Modality Rows Columns PixelSpacing ViewPosition BodyPartExamined SOPClassUID KVP PhotometricInterpretation WindowCenter'.split()])
def test_is_phi(kw, phi): assert is_phi(pydicom.datadict.tag_for_keyword(kw))==phi

def test_is_phi_by_group():
    assert is_phi(0x00091001) and is_phi(0x50010010) and is_phi(0x60003000) and is_phi(0x60024000) and not is_phi(0x60000010)
    assert is_phi(0x60000022) and is_phi(0x60021500) and is_phi(0x60010010) and is_phi(0x60001234) # description, label, private, unknown

def test_is_phi_by_kind():
    "Elements that the dictionary does not have; text, persons, dates, addresses and UIDs of single objects, though the standard's table does not list them"
    assert is_phi(0x00089999) and is_phi(0x00080000) and is_phi(0x7ffe0010)
    for o in DicomDictionary:
        if pydicom.datadict.dictionary_VR(o) in 'PN DA DT TM AS AE LT ST UT UC UR'.split(): assert is_phi(o), hex(o)
    kept = 'SOPClassUID ReferencedSOPClassUID CodingSchemeUID ContextUID CodeValue CodeMeaning Manufacturer ManufacturerModelName SoftwareVersions ConvolutionKernel'
    assert not any(is_phi(pydicom.datadict.tag_for_keyword(o)) for o in kept.split())
    told = 'MultiFrameSourceSOPInstanceUID VolumeFrameOfReferenceUID CommentsOnTheScheduledProcedureStep PatientBirthDateInAlternativeCalendar PlacerOrderNumberProcedure'
    assert all(is_phi(pydicom.datadict.tag_for_keyword(o)) for o in told.split())

def test_phi_stays_out(tmp_path):
    "Nothing of the patient is left in the frame, nested or private; duplicates are still told"
    secret = 'Zqxj'
    it = Dataset()
    it.PatientName, it.CodeValue = secret, 'kept'
    ds = dataset(PatientName=secret, PatientID=secret, PatientAge='067Y', Modality='CR', DerivationCodeSequence=Sequence([it]))
    ds.private_block(0x0011, 'ACME', create=True).add_new(1, 'LO', secret)
    fns = [tmp_path/f'{i}.dcm' for i in range(2)]
    for o in fns: ds.save_as(o, enforce_file_format=True)
    df = summarize(fns, pixels=False, phi=False, n_jobs=1, progress=False)
    assert secret not in df.to_csv() and '67' not in df.drop(columns='fname').to_csv() and 'kept' in df.to_csv()
    assert df.duplicate.all() and 'SOPInstanceUID' not in df and df.Modality.tolist()==['CR']*2
    assert secret in summarize(fns, pixels=False, n_jobs=1, progress=False).to_csv()

def test_phi_of_every_place(tmp_path):
    "Unknown elements, overlay labels, the instance's UID and private elements in items, the creator's name, the way to the folder: none is left"
    secret = 'Zqxj'
    it = Dataset()
    it.SOPInstanceUID, it.CodeMeaning = '1.2.77777', 'kept'
    it.add_new(0x00089998, 'LO', secret)
    it.private_block(0x0011, secret, create=True).add_new(1, 'LO', secret)
    ds = dataset(Modality='CR', DerivationCodeSequence=Sequence([it]), RequestedProcedurePriority='LOW', SOPInstanceUID='1.2.77777', TextValue=secret, ContentDescription=secret)
    ds.private_block(0x0011, secret, create=True).add_new(1, 'LO', 'x')
    for tag, vr in (0x00089999, 'LO'), (0x00089997, 'UN'), (0x60000022, 'LO'), (0x60021500, 'LO'), (0x60004000, 'LT'), (0x60003000, 'OB'), (0x50002600, 'LO'), (0x60007777, 'LO'):
        ds.add_new(tag, vr, secret.encode() if vr in ('UN', 'OB') else secret)
    ds.add_new(0x60000010, 'US', 7)
    folder = tmp_path/secret/'disc'
    (folder/'a').mkdir(parents=True)
    for o in 'a/1.dcm', '2.dcm': ds.save_as(folder/o, enforce_file_format=True)
    (folder/'3.dcm').write_bytes(Path(IMAGES[0]).read_bytes()[:3000])
    (folder/'4.dcm').symlink_to(folder/'none')
    files = find_dicoms(folder)
    for given in folder, str(folder), files:
        df = summarize(given, phi=False, n_jobs=1, progress=False)
        text = ' '.join(df.columns)+df.to_csv()
        assert secret not in text and secret.encode().hex() not in text and '77777' not in text and str(tmp_path) not in text
        assert df.fname.tolist()==['2.dcm', '3.dcm', '4.dcm', os.path.join('a', '1.dcm')] and df.error[1:3].notna().all()
        assert 'kept' in text and df.OverlayRows[0]==7 and df.duplicate.tolist()==[True, False, False, True]
    assert summarize(files[-1], phi=False, n_jobs=1, progress=False).fname.tolist()==['1.dcm']
    assert summarize(files, pixels=False, n_jobs=1, progress=False).fname.tolist()==[str(o) for o in files]
    assert len(summarize([], phi=False, progress=False))==0

# --- whatever happens ---

def bad_files(path):
    (path/'text.dcm').write_text('no image '*99)
    (path/'empty.dcm').write_bytes(b'')
    (path/'cut.dcm').write_bytes(Path(IMAGES[0]).read_bytes()[:30000])
    return [path/'text.dcm', IMAGES[0], path/'empty.dcm', path, path/'missing.dcm', IMAGES[1], path/'cut.dcm', IMAGES[0]]

@pytest.mark.parametrize('n_jobs', [1, 2])
def test_a_row_for_each(tmp_path, n_jobs):
    files = bad_files(tmp_path)
    df = summarize(files, n_jobs=n_jobs, progress=False)
    assert df.fname.tolist()==[str(o) for o in files]
    assert df.error.isna().tolist()==[False,True,False,False,False,True,False,True]
    for i,words in {0:'not a DICOM file', 2:'is empty', 3:'is a folder', 4:'No such file', 6:'cut off in (7FE0,0010)'}.items(): assert words in df.error[i]
    assert str(tmp_path) not in ' '.join(df.error.dropna()) # the name has a column of its own
    assert df.img_mean.notna().tolist()==df.error.isna().tolist()
    assert df.PatientName[6]==df.PatientName[1]=='CompressedSamples^CT1' # what could be read is there
    assert df.duplicate.tolist()==[False,True,False,False,False,False,True,True]

def test_empty():
    df = summarize([], progress=False)
    assert len(df)==0 and {'fname','img_mean','error'} <= set(df.columns)

def test_unreadable_element(tmp_path):
    ds = dataset(Modality='CR')
    ds.add_new(0x00200013, 'IS', '5')
    ds.save_as(tmp_path/'a.dcm', enforce_file_format=True)
    b = (tmp_path/'a.dcm').read_bytes()
    (tmp_path/'a.dcm').write_bytes(b.replace(b'IS\x02\x005 ', b'IS\x02\x00x!'))
    r = summarize([tmp_path/'a.dcm'], pixels=False, n_jobs=1, progress=False).iloc[0]
    assert 'InstanceNumber cannot be read' in r.error and r.Modality=='CR' and r.warnings>0

@pytest.mark.parametrize('n_jobs', [1, 2])
def test_quiet(n_jobs):
    "Warnings are counted into the row and do not reach the screen"
    r = run(f'''from dicomcam.summary import *
df = summarize([{get_testdata_file('badVR.dcm', download=False)!r}, {IMAGES[0]!r}], n_jobs={n_jobs})
assert df.warnings.tolist()[0]>0 and df.warnings.tolist()[1]==0, df.warnings.tolist()''')
    assert r.returncode==0 and r.stdout==r.stderr=='', r.stderr

def test_written_and_read(tmp_path):
    "CSV and Parquet take every file of pydicom's own: 800 columns, and types that differ from file to file"
    df = summarize(ROOT, n_jobs=2, progress=False)
    df.to_parquet(tmp_path/'a.parquet')
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'a.parquet'), df, check_dtype=False)
    df.to_csv(tmp_path/'a.csv', index=False)
    assert pd.read_csv(tmp_path/'a.csv', low_memory=False).shape==df.shape
    assert df.columns.is_unique

def test_csv_one_row_a_file(tmp_path):
    "Whatever text a header holds: pandas and the csv module read as many rows as there are files, with the text as it was; no cell is run by a spreadsheet"
    odd = ['a\rb', 'a\nb', 'a\r\nb', '\rx', 'a\x0bb', 'a\x0c\x1c\x85b', 'a\u2028b\u2029', 'a"b,c;d', '=1+1', '+49 30', '@x', '-2', '-x']
    for i, text in enumerate(odd): dataset(PatientComments=text, PatientName=f'n{i}', SpecificCharacterSet='ISO_IR 192').save_as(tmp_path/f'{i:02}.dcm', enforce_file_format=True)
    out = tmp_path/'a.csv'
    r = CliRunner().invoke(cli.main, ['summary', str(tmp_path), '--no-pixels', '--out', str(out)])
    assert r.exit_code==0, r.output
    with open(out, newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    df = pd.read_csv(out)
    assert [o['PatientName'] for o in rows]==df.PatientName.tolist()==[f'n{i}' for i in range(len(odd))]
    marked = ["'"+o if o[0] in '=+-@\r' and o!='-2' else o for o in odd]
    assert [o['PatientComments'] for o in rows]==df.PatientComments.tolist()==marked

def die_on(fns, word):
    if any(word in o for o in fns): os._exit(11)
    return [dict(fname=o, error=None) for o in fns]

def test_a_process_that_dies():
    "costs the row of the file that killed it, and no other"
    names = [f'{i:03}' for i in range(30)]
    names[7] = names[22] = 'killer'
    rows = [r for batch in _batches(partial(die_on, word='killer'), [names[i:i+5] for i in range(0, 30, 5)], 2) for r in batch]
    assert [r['fname'] for r in rows]==names
    assert [i for i,r in enumerate(rows) if r['error']]==[7,22] and 'crashed' in rows[7]['error']

def test_text_that_is_no_text(tmp_path):
    "Half surrogate pairs and NULs in a value and in a private creator, integers of more than 64 bits: CSV and Parquet take the table"
    ds = Dataset()
    ds.PatientComments = 'x\udcff\0y'
    for tag, value in (0x00110010, 'AC\udcffME'), (0x00111001, 'one'): ds.add_new(tag, 'LO', value)
    row, problems = header_row(ds)
    assert not problems and row['PatientComments']=='x\\udcffy' and row['(0011,xx01) AC\\udcffME']=='one'
    files = [tmp_path/'1.dcm', tmp_path/'2.dcm']
    for o, text in zip(files, (b'7 ', b'1'+b'0'*21)):
        ds = dataset()
        ds.add_new(0x00200013, 'IS', 5)
        ds.save_as(o, enforce_file_format=True)
        o.write_bytes(o.read_bytes().replace(b'IS\x02\x005 ', b'IS'+len(text).to_bytes(2, 'little')+text))
    df = summarize(files, pixels=False, n_jobs=1, progress=False)
    df.to_parquet(tmp_path/'a.parquet')
    assert df.error.isna().all() and pd.read_parquet(tmp_path/'a.parquet').InstanceNumber.tolist()==['7', str(10**21)]

def test_unreadable_in_a_sequence(tmp_path):
    "is said too, with the name of the sequence"
    item = Dataset()
    item.add_new(0x00200013, 'IS', '5')
    dataset(ReferencedImageSequence=Sequence([item])).save_as(tmp_path/'a.dcm', enforce_file_format=True)
    b = (tmp_path/'a.dcm').read_bytes()
    (tmp_path/'a.dcm').write_bytes(b.replace(b'IS\x02\x005 ', b'IS\x02\x00x!'))
    assert 'ReferencedImageSequence: InstanceNumber cannot be read' in summarize([tmp_path/'a.dcm'], pixels=False, n_jobs=1, progress=False).error[0]

@pytest.mark.posix
@pytest.mark.parametrize('end', ['csv', 'parquet'])
def test_a_name_that_is_not_utf8(tmp_path, end):
    "The file is read, its name leads back to it and is no other file's, and the table is written"
    folder = tmp_path/'films'
    folder.mkdir()
    names = [b'Z\xfcrich 1.dcm', 'Zürich 1.dcm'.encode(), b'Z%FCrich 1.dcm', b'Z\xfcrich\n2.dcm', b'Z\\xfcrich 1.dcm']
    try:
        for i, o in enumerate(names): dataset(Modality='CR', PatientName=f'n{i}').save_as(os.path.join(os.fsencode(folder), o).decode(errors='surrogateescape'), enforce_file_format=True)
    except (OSError, UnicodeError): pytest.skip('this file system takes UTF-8 only')
    r = CliRunner().invoke(cli.main, ['summary', str(folder), '--no-pixels', '--out', str(tmp_path/f'a.{end}')])
    assert r.exit_code==0, r.output
    df = (pd.read_csv if end=='csv' else pd.read_parquet)(tmp_path/f'a.{end}')
    assert df.error.isna().all() and df.fname.is_unique and len(df)==5
    back = [os.fsdecode(unquote_to_bytes(o.removeprefix('file:'))) if o.startswith('file:') else o for o in df.fname]
    assert [str(pydicom.dcmread(o).PatientName) for o in back]==df.PatientName.tolist()
    assert sum('Z%FCrich' in o for o in df.fname)==3

# --- a file that takes too long, a process that is killed ---

@pytest.mark.posix
def test_time_is_over(monkeypatch):
    "The row says so and keeps what was read; the others go on; the alarm that somebody else has set goes on too. Ctrl-C is not taken for it"
    stats, left = summary.pixel_stats, []
    def slow(ds, *args):
        left.append(signal.getitimer(signal.ITIMER_REAL)[0])
        if ds.filename==IMAGES[1]: signal.raise_signal(signal.SIGALRM) # as when the time is over
        return stats(ds, *args)
    monkeypatch.setattr(summary, 'pixel_stats', slow)
    before = signal.getsignal(signal.SIGALRM)
    handler = lambda *_: None
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 10**6)
    try:
        df = summarize(IMAGES[:3], n_jobs=1, progress=False, time_limit=9999)
        assert signal.getsignal(signal.SIGALRM)==handler and 9999<signal.getitimer(signal.ITIMER_REAL)[0]<=10**6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(0<o<=9999 for o in left) and len(left)==3
    assert df.error.isna().tolist()==df.img_mean.notna().tolist()==[True, False, True]
    assert df.error[1]=='not read within 9999 seconds; pass a larger time_limit to wait longer' and df.Modality[1]=='MR'
    monkeypatch.setattr(summary, 'pixel_stats', mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): summarize(IMAGES[:3], n_jobs=1, progress=False)

def test_time_is_over_in_a_thread():
    "No alarm there, and no error"
    with ThreadPoolExecutor(1) as pool: df = pool.submit(summarize, IMAGES[:2], n_jobs=1, progress=False).result()
    assert df.error.isna().all()

def hang(files, how, limit):
    "In place of `_rows`: the file named `hangs` blocks for ever, where an alarm is heard or not"
    def row(file):
        if file!='hangs': return dict(fname=file, error=None)
        with summary._limited(limit):
            if how=='deaf': signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]) # as a decoder in C
            time.sleep(1000)
    try: return [row(o) for o in files]
    except summary._Late: return [dict(fname=o, error='heard') for o in files]

@pytest.mark.posix
@pytest.mark.parametrize('how', ['heard', 'deaf'])
def test_time_is_over_in_a_process(how):
    "Python hears the alarm; where nothing does, the process is ended, and that costs the row of the file and no other"
    names = ['a', 'b', 'hangs', 'c']
    batches = [['a', 'b'], ['hangs'], ['c']]
    rows = [r for batch in _batches(partial(hang, how=how, limit=.2), batches, 2, .2) for r in batch]
    assert [r['fname'] for r in rows]==names and [r['error'] for r in rows if r['fname']!='hangs']==[None]*3
    assert rows[2]['error']==('heard' if how=='heard' else 'not read within 0.2 seconds; pass a larger time_limit to wait longer')

def killed(files):
    "In place of `_rows`: what the system does when memory runs out"
    if 'bomb' in files: os.kill(os.getpid(), signal.SIGKILL)
    return [dict(fname=o, error=None) for o in files]

@pytest.mark.posix
def test_a_process_that_is_killed():
    rows = [r for batch in _batches(killed, [['a', 'bomb'], ['b']], 2) for r in batch]
    assert [r['fname'] for r in rows]==['a', 'bomb', 'b'] and [r['error'] is None for r in rows]==[True, False, True]
    assert 'memory ran out' in rows[1]['error']


# --- processes ---

def test_after_torch():
    "fastai's from_dicoms with two workers hangs here for ever: the processes that it forks inherit torch's locks"
    r = run(f'''import torch
a = torch.rand(500,500); (a@a).sum()
from dicomcam.summary import summarize
assert len(summarize({IMAGES!r}*4, n_jobs=2))=={4*len(IMAGES)}''')
    assert r.returncode==0, r.stderr

def test_two_blocks_of_one_creator():
    "A private creator may reserve two blocks of a group (PS3.5 7.8.1): neither of two elements with the same name is lost"
    ds = pydicom.Dataset()
    for tag, value in (0x00110010, 'ACME'), (0x00110011, 'ACME'), (0x00111001, 'one'), (0x00111101, 'two'): ds.add_new(tag, 'LO', value)
    row, problems = header_row(ds, phi=True)
    assert not problems and row['(0011,xx01) ACME']=='one' and row['(0011,xx01) ACME (0011,1101)']=='two'

RUNS = f'''
import os, subprocess
import dicomcam.summary as summary

def watched(batches, total): # in place of the progress bar
    for i, rows in enumerate(batches):
        if i==10: print('running', flush=True)
        yield rows

summary.progress_bar = watched
try: summary.summarize({IMAGES!r}*100_000, n_jobs=2) # hours
except KeyboardInterrupt: print('stopped', flush=True)
ps = subprocess.run(['ps','-o','args=','--ppid',str(os.getpid())], capture_output=True, text=True).stdout
print(ps.count('popen_loky'), flush=True)
'''

def alive(session):
    "The processes of a session; a Z is dead: whoever started it has only not asked after it yet"
    ps = subprocess.run(['ps','-o','stat=,args=','-s',str(session)], capture_output=True, text=True).stdout
    return [o for o in ps.splitlines() if not o.startswith('Z')]

@pytest.mark.posix
@pytest.mark.parametrize('whole_group', [True, False], ids=['terminal','notebook'])
def test_interrupt(whole_group):
    "Ctrl-C: stops long before the end and leaves no process behind"
    p = subprocess.Popen([sys.executable, '-c', RUNS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a job in the background inherits that it is ignored
    try:
        assert p.stdout.readline()=='running\n'
        (os.killpg if whole_group else os.kill)(p.pid, signal.SIGINT)
        out,err = p.communicate(timeout=120)
        assert out=='stopped\n0\n', err
        end = time.monotonic()+120
        while (left := alive(p.pid)) and time.monotonic()<end: time.sleep(.1) # a killed process takes a moment to go
        assert not left
    finally:
        if alive(p.pid): os.killpg(p.pid, signal.SIGKILL)

@pytest.mark.posix
def test_progress_in_a_terminal():
    import pty
    main,side = pty.openpty()
    code = f'from dicomcam.summary import *; summarize({IMAGES!r}*20, n_jobs=2)'
    p = subprocess.Popen([sys.executable, '-c', code], stdout=side, stderr=side, env={**os.environ, 'COLUMNS': '100'})
    os.close(side)
    out = b''
    try:
        while b := os.read(main, 4096): out += b
    except OSError: pass # the terminal is closed
    os.close(main)
    assert p.wait()==0 and b'100.00%' in out and b'<00:00' in out # at the end no time is left

def test_dask():
    "The same call on a cluster gives the same frame"
    distributed = pytest.importorskip('distributed', reason='the [dask] extra is not installed')
    files = [*find_dicoms(ROOT), *IMAGES]
    expected = summarize(files, n_jobs=1, progress=False)
    import dask
    patient = {f'distributed.comm.timeouts.{o}': '600s' for o in ('connect', 'tcp')}
    with (dask.config.set(patient), mock.patch.dict(os.environ), # dask leaves OMP_NUM_THREADS=1 behind in it, which later tests would hand to their processes
          distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster, distributed.Client(cluster)):
        with parallel_config('dask'): df = summarize(files, progress=False)
    pd.testing.assert_frame_equal(df, expected)


# --- finding files ---

def test_find(tmp_path):
    src = Path(IMAGES[0]).read_bytes()
    for o in ('b/2.dcm', 'b/IM0001', 'a/x', 'a/10', 'c.txt'):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).write_bytes(src)
    (tmp_path/'not.dcm').write_text('no')
    if os.name != 'nt': os.mkfifo(tmp_path/'fifo.dcm')
    (tmp_path/'loop').symlink_to(tmp_path)
    assert [str(o.relative_to(tmp_path)) for o in find_dicoms(tmp_path)]==['c.txt', 'a/10', 'a/x', 'b/2.dcm', 'b/IM0001']
    assert find_dicoms(tmp_path/'c.txt')==[tmp_path/'c.txt']
    with pytest.raises(DicomError, match='no such file or folder'): find_dicoms(tmp_path/'nowhere')
    with pytest.raises(DicomError, match='not a DICOM file'): find_dicoms(tmp_path/'not.dcm')

def test_dicomdir():
    fns = find_dicoms(ROOT/'dicomdirtests/DICOMDIR')
    assert len(fns)==31 and all(o.is_file() for o in fns)
    assert set(fns) <= set(find_dicoms(ROOT/'dicomdirtests')) and len(find_dicoms(ROOT/'dicomdirtests'))==81

def test_a_file_that_mentions_the_dicomdir(tmp_path):
    "A film that has the class of a DICOMDIR in a UID or in a comment is no DICOMDIR, and is found"
    dataset(PatientComments='1.2.840.10008.1.3.10', SOPInstanceUID='1.2.840.10008.1.3.10.5').save_as(tmp_path/'a.dcm', enforce_file_format=True)
    (tmp_path/'DICOMDIR').write_bytes((ROOT/'dicomdirtests/DICOMDIR').read_bytes())
    assert find_dicoms(tmp_path)==[tmp_path/'a.dcm']

@pytest.mark.posix
def test_odd_worlds(tmp_path):
    "Pipes, sockets and devices are no files; links that lead nowhere or in a circle get a row; a link to a folder gets a warning"
    (tmp_path/'a.dcm').write_bytes(Path(IMAGES[0]).read_bytes())
    os.mkfifo(tmp_path/'fifo.dcm')
    (tmp_path/'device.dcm').symlink_to('/dev/zero')
    (tmp_path/'gone.dcm').symlink_to(tmp_path/'nothing')
    for a, b in ('round.dcm', 'again.dcm'), ('again.dcm', 'round.dcm'): (tmp_path/a).symlink_to(tmp_path/b)
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub'/'link').symlink_to(tmp_path)
    here = os.getcwd()
    os.chdir(tmp_path) # a socket's name may have 108 characters
    with socket.socket(socket.AF_UNIX) as s:
        try: s.bind('socket.dcm')
        finally: os.chdir(here)
        with pytest.warns(UserWarning, match='link: a link to a folder is not followed'): files = find_dicoms(tmp_path)
    assert [o.name for o in files]==['a.dcm', 'again.dcm', 'gone.dcm', 'round.dcm']
    df = summarize(files, n_jobs=1, progress=False)
    assert df.error.isna().tolist()==[True, False, False, False] and 'No such file' in df.error[2]

UNPRIVILEGED = '''
import os, sys, warnings
import pandas, pyarrow
from dicomcam.summary import find_dicoms, summarize
from pathlib import Path
summarize([sys.argv[1]+'/a.dcm'], n_jobs=1, progress=False) # import all
if os.geteuid()==0: os.setuid(65534)
warnings.simplefilter('always')
files = find_dicoms(sys.argv[1])
for o in summarize(files, n_jobs=1, progress=False).itertuples(): print(Path(o.fname).relative_to(sys.argv[1]), '|', o.error)
'''

@pytest.mark.posix
def test_folders_that_are_closed():
    "A folder that may be read but not searched gives rows; one that may not be read, a warning that names it; and the others are read"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        for o in 'a.dcm', 'shut/b.dcm', 'listed/c.dcm', 'listed/sub/d.dcm', 'z/e.dcm':
            (path/o).parent.mkdir(exist_ok=True, parents=True)
            (path/o).write_bytes(Path(IMAGES[0]).read_bytes())
            (path/o).chmod(0o644)
        (path/'z'/'e.dcm').chmod(0)
        (path/'shut').chmod(0)
        (path/'listed').chmod(0o644)
        try: r = subprocess.run([sys.executable, '-c', UNPRIVILEGED, folder], capture_output=True, text=True)
        finally:
            for o in 'shut', 'listed': (path/o).chmod(0o755)
    assert r.returncode==0, r.stderr
    rows = dict(o.split(' | ') for o in r.stdout.splitlines())
    assert list(rows)==['a.dcm', 'listed/c.dcm', 'z/e.dcm'] and rows['a.dcm'] in ('None', 'nan')
    assert 'Permission denied' in rows['listed/c.dcm'] and 'Permission denied' in rows['z/e.dcm']
    assert f'{folder}/shut: this folder cannot be searched (Permission denied)' in r.stderr and f'{folder}/listed/sub: this folder' in r.stderr

def test_a_folder_that_changes(tmp_path):
    "What is deleted or becomes a folder after it was found has a row that says so"
    for o in 'abc': (tmp_path/o).write_bytes(Path(IMAGES[0]).read_bytes())
    files = find_dicoms(tmp_path)
    (tmp_path/'a').unlink()
    (tmp_path/'b').unlink()
    (tmp_path/'b').mkdir()
    df = summarize(files, n_jobs=1, progress=False)
    assert 'No such file' in df.error[0] and 'is a folder' in df.error[1] and df.error.isna()[2]

@pytest.mark.parametrize('parts', [['..', 'secret'], ['/etc', 'secret'], ['a', '..', '..', 'secret'], ['/etc/secret']], ids=str)
def test_dicomdir_stays_in_its_folder(tmp_path, parts):
    "Entries that lead out of it are left out, with a warning that counts them"
    records = [Dataset(), Dataset(), Dataset()]
    records[0].ReferencedFileID, records[1].ReferencedFileID = parts, ['a', 'film']
    dataset(DirectoryRecordSequence=Sequence(records)).save_as(tmp_path/'DICOMDIR', enforce_file_format=True)
    with pytest.warns(UserWarning, match='DICOMDIR: 1 of 2 entries lead out of its folder'): files = find_dicoms(tmp_path/'DICOMDIR')
    assert files==[tmp_path/'a'/'film']

@pytest.mark.parametrize('parts', [['C:', 'secret'], ['..\\secret'], ['a', 'D:secret']], ids=str)
def test_dicomdir_on_windows(parts, monkeypatch):
    monkeypatch.setattr(os.path, 'basename', ntpath.basename)
    assert not summary._inside(parts) and summary._inside(['A', 'IM000001'])

def test_dicomdir_that_is_none(tmp_path):
    "The list of records is text, or a file's name a number: one error"
    for i, (tag, vr, value) in enumerate([(0x00041220, 'LO', 'text'), (0x00041220, 'SQ', [Dataset()])]):
        if vr=='SQ': value[0].add_new(0x00041500, 'US', 5)
        ds = dataset()
        ds.add_new(tag, vr, value)
        ds.save_as(tmp_path/f'{i}', enforce_file_format=True)
        with pytest.raises(DicomError, match=f'{i}: cannot be read as a DICOMDIR'): find_dicoms(tmp_path/f'{i}')

def test_one_column_for_one_element():
    "Over all of pydicom's files: two elements never share a column"
    for fn in find_dicoms(ROOT):
        ds = pydicom.dcmread(fn, force=True)
        names = []
        for t in ds.keys():
            try: names.append(column_name(ds[t]))
            except Exception: pass
        assert len(set(names))==len(names), fn

# --- the image cache is for its owner alone ---

def modes(root): return {oct(o.stat().st_mode & 0o777) for o in [root, *root.rglob('*')] if o.is_dir()}, {oct(o.stat().st_mode & 0o777) for o in root.rglob('*') if o.is_file()}

@pytest.mark.posix
@pytest.mark.parametrize('umask', [0, 0o022])
def test_cache_is_private(tmp_path, monkeypatch, umask):
    "Folders 0700, files 0600, whatever the umask; a folder of the user's stays as it is; what an older version left open is closed"
    from dicomcam.cache import ImageCache
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    before = os.umask(umask)
    try:
        ImageCache(32)(IMAGES[0])
        assert modes(tmp_path/'xdg'/'dicomcam')==({'0o700'}, {'0o600'})
        (tmp_path/'xdg'/'dicomcam').chmod(0o755)
        ImageCache(32).fill([IMAGES[0], IMAGES[1]])
        assert modes(tmp_path/'xdg'/'dicomcam')==({'0o700'}, {'0o600'})
        (tmp_path/'mine').mkdir()
        (tmp_path/'mine').chmod(0o775)
        ImageCache(32, folder=tmp_path/'mine')(IMAGES[0])
    finally: os.umask(before)
    assert oct((tmp_path/'mine').stat().st_mode & 0o777)=='0o775'
    made, = (tmp_path/'mine').iterdir()
    assert modes(made)==({'0o700'}, {'0o600'})

@pytest.mark.posix
def test_models_of_the_cache_are_private(tmp_path, monkeypatch):
    "A model may have learnt something of its patients"
    from dicomcam.training import _demo_file
    for o in 'ab':
        (tmp_path/'films'/'train'/o).mkdir(parents=True)
        (tmp_path/'films'/'train'/o/'1.dcm').write_bytes(Path(IMAGES[0]).read_bytes())
    (tmp_path/'films'/'labels.csv').write_text('file,label\ntrain/a/1.dcm,a\ntrain/b/1.dcm,b\n')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    before = os.umask(0)
    try: file = _demo_file(tmp_path/'films', 42, {})
    finally: os.umask(before)
    assert file.parent==tmp_path/'xdg'/'dicomcam'/'models' and modes(tmp_path/'xdg'/'dicomcam')==({'0o700'}, set())

def test_errors_quote_no_header_without_phi(monkeypatch):
    "What an error says of a value may be a name"
    def read(*args): raise DicomError("Rows cannot be read: invalid literal for int() with base 10: 'DOE^JANE'")
    monkeypatch.setattr(summary, 'read_dicom', read)
    for phi in (True, False):
        error = summarize(IMAGES[:1], phi=phi, n_jobs=1, progress=False).error[0]
        assert ('DOE' in error) == phi and 'Rows cannot be read' in error
