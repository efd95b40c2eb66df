"What is planted in headers and in the names of folders is looked for in all that the commands write without --phi, whatever it is packed in."
import base64, errno, gzip, io, json, os, re, shutil, struct, zipfile, zlib
from pathlib import Path

import pandas as pd, pydicom, pytest
from click.testing import CliRunner
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset

from dicomcam import demo
from dicomcam.cli import main

UID = '1.2.826.0.1.4747.'
PLANTED = dict(PatientName='Zqplantname^Anna', PatientID='zqplantid4711', PatientBirthDate='19310317', StudyDate='20191113', AcquisitionDateTime='20191113101112',
    AccessionNumber='zqplantacc', InstitutionName='Zqplanthospital', InstitutionAddress='Zqplantstreet', StationName='zqplantstation', ReferringPhysicianName='Zqplantdoctor', OperatorsName='Zqplantoperator',
    OtherPatientIDs='zqplantother', PatientAddress='Zqplanthome', MedicalRecordLocator='zqplantrecord', StudyDescription='zqplantstudy', SeriesDescription='zqplantseries', ImageComments='zqplantcomment',
    PatientComments='zqplantpatient', AdditionalPatientHistory='zqplanthistory', DerivationDescription='zqplantderived', ProtocolName='zqplantprotocol', DeviceSerialNumber='zqplantserial',
    StudyInstanceUID=UID+'1', SeriesInstanceUID=UID+'2', FrameOfReferenceUID=UID+'3')
WORDS = ['zqplant', UID, '19310317', '20191113'] # of which each secret, planted here or below, holds one

def plant(fn, i):
    "The film `fn` of patient `i` with a secret in each place where there may be one; the same file, larger"
    ds = pydicom.dcmread(fn)
    for k, v in PLANTED.items(): setattr(ds, k, v)
    ds.PatientID += f'-{i}'
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'{UID}9.{i}'
    block = ds.private_block(0x0009, 'Zqplantmaker', create=True)
    block.add_new(1, 'LO', 'zqplantprivate')
    block.add_new(2, 'OB', b'zqplantbytes ')
    item = Dataset()
    item.ScheduledProcedureStepDescription, item.ReferencedSOPInstanceUID = 'zqplantstep', UID+'4'
    ds.RequestAttributesSequence = [item]
    ds.add_new(0x00091ffe, 'UN', b'zqplantunknown ')
    ds.add_new(0x0018fffe, 'LO', 'zqplantnotinthedictionary')
    ds.add_new(0x60001500, 'LO', 'zqplantlabel')
    ds.add_new(0x60000022, 'LO', 'zqplantoverlay')
    ds.add_new(0x60004000, 'LT', 'zqplantoverlaytext')
    ds.save_as(fn)

# the search

def png_texts(data):
    "The text chunks of a PNG, unpacked (PNG specification, 11.3.3)"
    at = 8
    while at+8 <= len(data):
        n, kind = struct.unpack('>I4s', data[at:at+8])
        body = data[at+8:at+8+n]
        if kind in (b'zTXt', b'iTXt'):
            for k in range(len(body)): # the packed text begins somewhere behind its name
                try: yield zlib.decompress(body[k:])
                except zlib.error: pass
        at += 12+n

def unpacked(data):
    "The bytes themselves, and what is packed in them"
    yield data
    if data[:2] == b'\x1f\x8b': yield from unpacked(gzip.decompress(data))
    if data[:8] == b'\x89PNG\r\n\x1a\n': yield from png_texts(data)
    if data[:4] == b'PAR1':
        df = pd.read_parquet(io.BytesIO(data))
        yield df.to_csv().encode()
        yield repr(df.attrs).encode()
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            for o in z.infolist(): yield from (o.filename.encode(), *unpacked(z.read(o)))
    for o in re.findall(rb'base64,([A-Za-z0-9+/=]+)', data): yield from unpacked(base64.b64decode(o))

def told(data, words=WORDS):
    "Which of `words` stand in bytes"
    found = set()
    for o in unpacked(data):
        o = o.lower()
        found |= {w for w in words for code in ('utf-8', 'utf-16-le', 'utf-16-be') if w.lower().encode(code) in o}
    return found

def tellers(folder, words=WORDS):
    "Files in a folder -> what they tell, in their name too"
    files = {o.relative_to(folder): o for o in folder.rglob('*') if o.is_file()}
    says = {name: told(o.read_bytes(), words) | told(str(name).encode(), words) for name, o in files.items()}
    return {str(name): o for name, o in says.items() if o}

def test_the_search_finds_what_is_packed(tmp_path):
    text, image = 'a zqplant b', Image.new('L', (4, 4))
    for k, zipped in enumerate((False, True)):
        info = PngImagePlugin.PngInfo()
        info.add_text('Title', text, zip=zipped)
        image.save(tmp_path/f'{k}.png', pnginfo=info)
        info = PngImagePlugin.PngInfo()
        info.add_itxt('Title', text, zip=zipped)
        image.save(tmp_path/f'i{k}.png', pnginfo=info)
        (tmp_path/f'{k}.html').write_text(f'<img src="data:image/png;base64,{base64.b64encode((tmp_path/f"{k}.png").read_bytes()).decode()}">')
    image.save(tmp_path/'nothing.png')
    pd.DataFrame(dict(a=[text]*100)).to_parquet(tmp_path/'a.parquet', compression='gzip')
    (tmp_path/'a.gz').write_bytes(gzip.compress(text.encode()))
    (tmp_path/'a.txt').write_text(text.upper(), encoding='utf-16')
    (tmp_path/'ZQPLANT.txt').touch()
    with zipfile.ZipFile(tmp_path/'a.pt', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('data.pkl', text*9)
    assert set(tellers(tmp_path)) == {o.name for o in tmp_path.iterdir()}-{'nothing.png'}

# the commands

SMALL = ['--arch', 'xresnet18', '--size', '64', '--epochs', '1']

def dicomcam(*args, status=0):
    r = CliRunner().invoke(main, [*map(str, args)])
    assert r.exit_code == status, (r.output, r.exception)

@pytest.fixture(scope='module')
def secret(folder, tmp_path_factory):
    "The phantom below folders that name a patient; films of one class are called as those of the other are"
    d = shutil.copytree(folder, tmp_path_factory.mktemp('data')/'Zqplantfolder^Jane'/'zqplantstudies')
    df = pd.read_csv(d/'labels.csv')
    shutil.rmtree(d/'masks')
    (d/'boxes.csv').unlink()
    n = {}
    for i, (old, label) in enumerate(zip(df.iloc[:, 0], df.label)):
        k = n[label] = n.get(label, 0)+1
        new = f'{Path(old).parent.as_posix()}/{k}.dcm'
        (d/old).rename(d/new)
        df.iloc[i, 0] = new
        plant(d/new, i)
    df.to_csv(d/'labels.csv', index=False)
    return d

@pytest.fixture(scope='module')
def model(secret, tmp_path_factory):
    out = tmp_path_factory.mktemp('model')
    dicomcam('train', secret, *SMALL, '--checkpoint', out/'state.pt', '--out', out/'m.safetensors')
    return out/'m.safetensors'

def test_train_tells_nothing(model):
    assert sorted(o.name for o in model.parent.iterdir()) == ['m.safetensors', 'state.pt'] and not tellers(model.parent)

@pytest.mark.parametrize('end', ['csv', 'parquet'])
def test_summary_tells_nothing(end, secret, tmp_path):
    bad = tmp_path/'zqplantfolder'/'study'
    shutil.copytree(secret/'train'/'Pneumothorax', bad)
    spoil(bad)
    for phi in 'no-phi', 'phi': dicomcam('summary', bad, f'--{phi}', '--out', tmp_path/phi/f't.{end}')
    assert not tellers(tmp_path/'no-phi') and tellers(tmp_path/'phi') == {f't.{end}': set(WORDS)}

def spoil(d):
    "Files in `d` that cannot be read, or not in full, of which something must be said"
    file = next(d.glob('*.dcm'))
    (d/'cut.dcm').write_bytes(file.read_bytes()[:700])
    (d/'text.dcm').write_text('zqplanttext')
    ds = pydicom.dcmread(file)
    ds.PatientWeight = ds.WindowCenter = ds.WindowWidth = '12345678'
    ds.save_as(d/'number.dcm')
    (d/'number.dcm').write_bytes((d/'number.dcm').read_bytes().replace(b'12345678', b'zqplant '))

def test_explain_tells_nothing(secret, model, tmp_path):
    "Beside the DICOM objects, which are to be filed with the patient's study: in those, only what says whose they are"
    d = tmp_path/'zqplantfolder'/'study'
    d.mkdir(parents=True)
    for label in 'Pneumothorax', 'No Pneumothorax': (d/label).mkdir(), shutil.copy(secret/'train'/label/'1.dcm', d/label)
    spoil(d/'Pneumothorax')
    out = tmp_path/'out'
    dicomcam('explain', model, d, '--dicom', '--out', out, status=1)
    objects = sorted(out.rglob('*.dcm'))
    assert len(list(out.rglob('1.png'))) == 2 and len(objects) >= 2
    for o in objects:
        ds = pydicom.dcmread(o)
        for elem in ds.iterall():
            if elem.VR in ('LO', 'SH', 'ST', 'LT', 'UT', 'UC', 'UR') and elem.keyword not in ('PatientID', 'AccessionNumber', 'StudyDescription'):
                assert not told(str(elem.value).encode()) and str(tmp_path) not in str(elem.value), elem
        assert not [o for o in ds.iterall() if o.tag.is_private]
        o.unlink()
    assert not tellers(out) and 'cut.dcm' in (out/'heatmaps.csv').read_text()
    dicomcam('explain', model, d/'Pneumothorax'/'1.dcm', '--phi', '--out', out, '--force')
    assert tellers(out) == {'heatmaps.csv': {'zqplant'}} # the path

def test_report_tells_nothing(secret, model, tmp_path):
    d = tmp_path/'zqplantfolder'
    shutil.copytree(secret, d)
    labels = pd.read_csv(d/'labels.csv')
    for old in labels.file: (d/old).rename((d/old).with_name(f'zqplantfilm{Path(old).name}')) # in a report no file has a name
    labels['file'] = [(Path(o).parent/f'zqplantfilm{Path(o).name}').as_posix() for o in labels.file]
    labels.to_csv(d/'labels.csv', index=False)
    for phi in [], ['--phi']: dicomcam('report', model, d, '--cases', 4, *phi, '--out', tmp_path/f'out{len(phi)}'/'r.html')
    assert not tellers(tmp_path/'out0') and tellers(tmp_path/'out1') == {'r.html': {'zqplant'}} # patients, films, the folder

def test_demo_tells_nothing(secret, tmp_path):
    "And films of one name in two folders have a picture each"
    out = tmp_path/'out'
    dicomcam('demo', '--data', secret, '--out', out, *SMALL)
    assert sorted(o.name for o in out.iterdir()) == ['heatmaps', 'metrics.json', 'model.safetensors', 'report.html', 'summary.csv'] and not tellers(out)
    n = json.loads((out/'metrics.json').read_text())['images']
    films = [o.relative_to(out/'heatmaps') for o in (out/'heatmaps').rglob('*.png')]
    assert len(films) == n and all((secret/'train'/o).with_suffix('.dcm').is_file() for o in films)

# a demo that fails

def test_a_demo_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(data, files, out, *rest):
        (out/'summary.csv').write_text('half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(demo, '_results', full)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'summary.csv').write_text('whole')
    for out in 'new', 'mine':
        with pytest.raises(OSError, match='No space left'): demo.run_demo(folder, tmp_path/out)
    assert [o.relative_to(tmp_path).as_posix() for o in sorted(tmp_path.rglob('*'))] == ['mine', 'mine/summary.csv'] and (tmp_path/'mine'/'summary.csv').read_text() == 'whole'
    with pytest.raises(NotADirectoryError, match='is a file'): demo.run_demo(folder, tmp_path/'mine'/'summary.csv')
