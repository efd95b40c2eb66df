"The course: what a reader of the tutorial on SIIM_SMALL could do there, each in its lesson; and how long a lesson takes"
import importlib.util, json, re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
HIDDEN = re.compile(r'^#\|\s*(hide|include:\s*false)\s*$', re.M)

# what the tutorial has: the lesson that has it, and what to look for in what a reader of that lesson sees
TUTORIAL = {
    'what DICOM is for: vendors, modalities, hospitals': ('01_dicom', r'vendor|manufacturer', r'modalit', r'hospital'),
    'a network protocol too': ('01_dicom', r'protocol'),
    'get_dicom_files': ('01_dicom', r'get_dicom_files\('),
    'items[i].dcmread()': ('01_dicom', r'\]\.dcmread\(\)'),
    'group 0010 is the patient': ('01_dicom', r'0010'),
    'group 0028 is the pixels': ('01_dicom', r'0028'),
    'SamplesPerPixel, PhotometricInterpretation': ('01_dicom', r'SamplesPerPixel', r'PhotometricInterpretation', r'MONOCHROME2'),
    'Rows, Columns, PixelSpacing': ('01_dicom', r'Rows', r'Columns', r'PixelSpacing'),
    'BitsAllocated, BitsStored, HighBit': ('01_dicom', r'BitsAllocated', r'BitsStored', r'HighBit', r'\b255\b'),
    'PixelRepresentation: signed and unsigned': ('01_dicom', r'PixelRepresentation', r'\bsigned', r'unsigned'),
    'LossyImageCompression 00 and 01': ('01_dicom', r'LossyImageCompression\b', r"['\"`]?00['\"`]?", r"['\"`]?01['\"`]?"),
    'LossyImageCompressionMethod and its codes': ('01_dicom', r'LossyImageCompressionMethod', r'ISO_10918_1'),
    'values of Modality, with a link': ('01_dicom', r'\bCR\b', r'\bDX\b', r'\bCT\b', r'\bMR\b', r'\]\(https://dicom\.(nema|innolitics)'),
    'patient, study, series, image': ('01_dicom', r'[Pp]atient', r'[Ss]tudy', r'[Ss]eries', r'[Ii]mage'),
    'PixelData[:200]': ('01_dicom', r'PixelData\[:200\]'),
    'pixel_array': ('01_dicom', r'\.pixel_array'),
    '.show()': ('01_dicom', r'\.show\('),
    'rescale, Hounsfield units': ('02_picture', r'RescaleSlope', r'Hounsfield'),
    'untar_data(URLs.SIIM_SMALL) and .ls()': ('03_data', r'untar_data\(URLs\.SIIM_SMALL\)', r'\.ls\(\)'),
    'from_dicoms beside summarize': ('03_data', r'from_dicoms\(', r'summarize\('),
    '.columns': ('03_data', r'\.columns'),
    'Modality.unique()': ('03_data', r'Modality\.unique\(\)'),
    'ages and sexes': ('03_data', r'PatientAge', r'PatientSex'),
    '250 are too few': ('03_data', r'\b250\b'),
    'DataBlock with aug_transforms(size=400)': ('04_batches', r'DataBlock\(', r'aug_transforms\(size='),
    'show_batch': ('04_batches', r'show_batch\('),
    'split by patient': ('04_batches', r'PatientID'),
    'xresnet50 with Mish and self-attention': ('05_training', r'xresnet50\(', r'act_cls=Mish', r'sa=True', r'n_out=2'),
    'its first convolution swapped': ('05_training', r'\[0\]\[0\]\s*=|nn\.Conv2d\(1,'),
    'and that model trained': ('05_training', r'Learner\(dls, model\b'),
    'LabelSmoothingCrossEntropy, accuracy, ranger': ('05_training', r'LabelSmoothingCrossEntropy', r'accuracy', r'ranger'),
    'lr_find()': ('05_training', r'lr_find\('),
    'fit_flat_cos(5, 5e-4)': ('05_training', r'fit_flat_cos\(', r'5e-4'),
    'show_results': ('06_results', r'show_results\('),
    'ClassificationInterpretation': ('06_results', r'ClassificationInterpretation\.from_learner\('),
    'plot_top_losses, plot_confusion_matrix': ('06_results', r'plot_top_losses\(', r'plot_confusion_matrix\('),
    'interpretability, the black box, the family of methods': ('08_cam', r'interpretab', r'black box', r'gradient'),
    'what it means to a radiologist': ('08_cam', r'radiologist'),
    'Hook and register_forward_hook': ('08_cam', r'Hook', r'register_forward_hook\('),
    'a layer by its place from the end': ('08_cam', r'\[-\d\]'),
    'the film of a patient': ('08_cam', r'def grab_x|grab_x\('),
    'einsum of weights and activations': ('08_cam', r"einsum\(['\"]ck,kij->cij['\"]"),
    'class 0 and class 1 of one film': ('08_cam', r'[Cc]lass(es)?\b'),
    'image and overlay side by side': ('08_cam', r'overlay|alpha='),
    'how Grad-CAM differs': ('09_gradcam', r'CAM', r'gradient'),
    'forward and backward hooks as context managers': ('09_gradcam', r'__enter__', r'__exit__', r'full_backward_hook|\.register_hook|HookBwd'),
    'any layer, several layers, both classes': ('09_gradcam', r'layers=', r'classes='),
}

def seen(lesson):
    "What a reader of the lesson sees, code and prose"
    cells = json.loads((nbs/f'{lesson}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n'.join(s for s in (''.join(c['source']) for c in cells) if not HIDDEN.search(s))

@pytest.mark.parametrize('what', TUTORIAL)
def test_what_the_tutorial_has(what):
    lesson, *patterns = TUTORIAL[what]
    text = seen(lesson)
    for o in patterns: assert re.search(o, text), f'{lesson} has nothing like {o}'

def test_the_whole_way_in_forty_lines():
    "Lesson 0: header, batches, network, training, result, heatmap, all of it in sight"
    text = seen('00_start')
    for o in (r'dcmread\(\)', r'DataBlock\(', r'Learner\(dls, model', r'loss_func=', r'opt_func=ranger', r'\.fit', r'plot_confusion_matrix\(', r'gradcam\(|\bcam\('):
        assert re.search(o, text), o

# --- links, films, files ---

def prose(fn): return '\n'.join(''.join(c['source']) for c in json.loads(fn.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')

def test_links_between_notebooks_lead_somewhere():
    for fn in nbs.rglob('*.ipynb'):
        for o in re.findall(r'\]\(([^)#:\s]+\.ipynb)', prose(fn)): assert (fn.parent/o).is_file(), f'{fn.name}: {o}'

@pytest.mark.parametrize('lesson', [*(o.stem for o in sorted(nbs.glob('0[0-9]_*.ipynb'))), '13_share', '14_network', '15_cli', 'A2_speed', 'A3_resume'])
def test_films_are_those_of_the_reader(lesson):
    "SIIM_SMALL, the phantom or what DICOMCAM_DATA names, in tests too"
    source = '\n'.join(''.join(c['source']) for c in json.loads((nbs/f'{lesson}.ipynb').read_text(encoding='utf-8'))['cells'])
    assert 'get_data()' in seen(lesson) and "setdefault('DICOMCAM_DATA'" in source and "Modality='CR'" not in source
    assert not re.search(r"[!=]= 'Pneumothorax'", source) # a folder of one's own has other classes

def test_commands_write_into_a_folder_of_their_own():
    "Whatever stops lesson 15, nothing lies beside it"
    text = seen('15_cli')
    assert 'os.chdir(tempfile.mkdtemp())' in text and text.index('os.chdir(') < text.index('--out')

# --- limits ---

spec = importlib.util.spec_from_file_location('lessons', root/'tools'/'lessons.py')
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)

@pytest.mark.parametrize('lesson', [o.stem for o in sorted(nbs.glob('*.ipynb')) if o.stem != 'index'])
def test_lessons_keep_to_their_limits(lesson):
    "Minutes, lines, pictures, questions"
    assert not lessons.measure(nbs/f'{lesson}.ipynb').broken

@pytest.mark.parametrize('prose, hidden, code, broken', [
    ('', 'port = 1', 'print(port)', ['cell 2: nothing says what port is']), ('It listens at `port`.', 'port = 1', 'print(port)', []),
    ('', 'def show(x): return x', 'show(1)', ['cell 2: nothing says what show is']), ('', 'import json', 'json.loads("1")', []),
    ('', 'if 1: train = partial(train, n=1)', 'train()', []), ('', 'port = 1', 'port = 2\nprint(port)', [])])
def test_hidden_names_are_told(tmp_path, prose, hidden, code, broken):
    "What visible code takes from a hidden cell is named before; imports and what a test makes smaller need no words"
    cells = [('markdown', prose), ('code', f'#| hide\n{hidden}'), ('code', code)]
    cells = [dict(cell_type=kind, source=[source], outputs=[]) for kind, source in cells]
    (tmp_path/'lesson.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert [o for o in lessons.measure(tmp_path/'lesson.ipynb').broken if 'nothing says' in o] == broken
