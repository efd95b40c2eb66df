"The command, run as a person runs it: whole on a small folder, and refused in one line."
import json, os, shutil, subprocess, sys

import pandas as pd, pytest
from PIL import Image

from dicomcam.cli import lesion_mask
from dicomcam.train import dicom_dls

small = ['--arch', 'xresnet18', '--size', '32', '--epochs', '1']

def dicomcam(*args, **kw): return subprocess.run([sys.executable, '-m', 'dicomcam', *map(str, args)], capture_output=True, text=True, **kw)

def check(out, n_valid, vocab):
    m = json.loads((out/'metrics.json').read_text())
    for k in 'accuracy', 'auc', 'sensitivity', 'specificity': assert m[k]['low'] <= m[k]['value'] <= m[k]['high']
    assert set(m['split']) == {f'{s}, {v}' for s in ('train', 'valid') for v in vocab}
    assert m['images'] == sum(v['images'] for k, v in m['split'].items() if k.startswith('valid')) == n_valid
    assert {'data', 'summary', 'train', 'evaluate', 'heatmaps'} <= set(m['seconds'])
    pngs = list((out/'heatmaps').glob('*.png'))
    assert len(pngs) == n_valid and all(Image.open(o).size[0] > 300 for o in pngs)
    assert (out/'model.safetensors').stat().st_size > 1e6
    return m

def test_demo_on_a_folder(folder, tmp_path):
    r = dicomcam('demo', '--data', folder, '--out', tmp_path/'out', *small)
    assert r.returncode == 0, r.stderr
    assert 'Results in' in r.stdout.splitlines()[-1]
    m = check(tmp_path/'out', dicom_dls(folder, size=32).table.is_valid.sum(), ['No Pneumothorax', 'Pneumothorax'])
    assert len(pd.read_csv(tmp_path/'out'/'summary.csv')) == 30
    assert m['heatmaps']['layer']

def test_demo_on_real_films(xrays, tmp_path):
    r = dicomcam('demo', '--data', xrays, '--out', tmp_path/'out', *small)
    assert r.returncode == 0, r.stderr
    check(tmp_path/'out', 50, ['No Pneumonia', 'Pneumonia'])

@pytest.mark.parametrize('spoil, says', [
    (lambda p: shutil.rmtree(p), 'folder'),
    (lambda p: next((p/'train').rglob('*.dcm')).unlink(), 'files are not there'),
    (lambda p: pd.read_csv(p/'labels.csv').assign(label='x').to_csv(p/'labels.csv', index=False), 'one class only'),
])
def test_bad_folder_is_one_line_and_status_2(folder, tmp_path, spoil, says):
    copy = shutil.copytree(folder, tmp_path/'copy')
    spoil(copy)
    r = dicomcam('demo', '--data', copy, '--out', tmp_path/'out')
    assert r.returncode == 2 and len(r.stderr.splitlines()) == 1 and says in r.stderr, r.stderr
    assert 'Traceback' in dicomcam('--debug', 'demo', '--data', copy, '--out', tmp_path/'out').stderr
    assert not (tmp_path/'out').exists()

def test_help_and_version():
    assert 'demo' in dicomcam('--help').stdout and 'Example' in dicomcam('demo', '--help').stdout
    from dicomcam import __version__
    assert __version__ in dicomcam('--version').stdout

def test_lesion_from_mask_boxes_or_nothing(folder, tmp_path):
    boxes = pd.read_csv(folder/'boxes.csv')
    f = boxes.file[0]
    drawn = lesion_mask(folder, folder/f)
    copy = shutil.copytree(folder, tmp_path/'copy')
    shutil.rmtree(copy/'masks')
    b = boxes[boxes.file == f]
    boxed = lesion_mask(copy, copy/f)
    assert boxed.shape == drawn.shape and boxed.sum() <= (b.width.round()+1).mul(b.height.round()+1).sum()
    assert boxed[drawn].mean() > 0.95 # the box holds the lesion
    os.remove(copy/'boxes.csv')
    assert lesion_mask(copy, copy/f) is None
