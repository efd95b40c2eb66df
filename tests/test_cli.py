"The commands, run as a person runs them: whole on a small folder, refused in one line, stopped in the middle."
import csv, json, math, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pydicom, pytest
from click.testing import CliRunner
from PIL import Image

from dicomcam import cli, demo, folder as folder_
from dicomcam.cli import main
from dicomcam.train import dicom_dls, label_table, load_model, patient_split

small = ['--arch', 'xresnet18', '--size', '64', '--epochs', '1']

def dicomcam(*args, **kw): return subprocess.run([sys.executable, '-m', 'dicomcam', *map(str, args)], capture_output=True, text=True, **kw)

def here(*args, status=0):
    "The same in this process, which is faster"
    r = CliRunner().invoke(main, [*map(str, args)])
    assert r.exit_code == status, (r.output, r.exception)
    return r

def one_line(r, *says):
    assert len(r.stderr.splitlines()) == 1 and all(o in r.stderr for o in says), r.stderr

@pytest.fixture(autouse=True)
def as_before():
    "A command changes training's progress bar: not for the tests after it"
    from fastprogress import fastprogress
    no_bar = fastprogress.NO_BAR
    yield
    fastprogress.NO_BAR = no_bar

@pytest.fixture(scope='module')
def model(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('model')/'m.safetensors'
    r = here('train', folder, *small, '--out', out)
    lines = r.stdout.splitlines()
    counts = dicom_dls(folder, size=64).setup.table.is_valid.value_counts()
    assert sum(int(o.split()[-2]) for o in lines if o.split()[-3:-2] == ['Pneumothorax']) == counts.sum() # of training and validation
    assert any(o.startswith('average_precision') and 'interval' in o for o in lines) and lines[-1] == f'Model in {out}'
    return out

def check(out, n_valid, vocab):
    m = json.loads((out/'metrics.json').read_text(encoding='utf-8'))
    for k in 'accuracy', 'auc', 'sensitivity', 'specificity': assert m[k]['low'] <= m[k]['value'] <= m[k]['high']
    assert set(m['split']) == {f'{s}, {v}' for s in ('train', 'valid') for v in vocab}
    assert m['images'] == sum(v['images'] for k, v in m['split'].items() if k.startswith('valid')) == n_valid
    assert {'data', 'summary', 'train', 'evaluate', 'heatmaps', 'report'} <= set(m['seconds'])
    pngs = list((out/'heatmaps').rglob('*.png'))
    assert len(pngs) == n_valid and all(Image.open(o).size[0] > 300 for o in pngs)
    assert (out/'model.safetensors').stat().st_size > 1e6
    assert '</html>' in (out/'report.html').read_text(encoding='utf-8')[-200:]
    assert sorted(o.name for o in out.iterdir()) == ['heatmaps', 'metrics.json', 'model.safetensors', 'report.html', 'summary.csv']
    return m

# demo

def test_demo_on_a_folder(folder, tmp_path):
    r = dicomcam('demo', '--data', folder, '--out', tmp_path/'out', *small)
    assert r.returncode == 0, r.stderr
    assert 'Results in' in r.stdout.splitlines()[-1]
    m = check(tmp_path/'out', dicom_dls(folder, size=32).setup.table.is_valid.sum(), ['No Pneumothorax', 'Pneumothorax'])
    assert len(pd.read_csv(tmp_path/'out'/'summary.csv')) == 30
    assert m['heatmaps']['layer']
    before = {o: o.stat().st_mtime_ns for o in (tmp_path/'out').rglob('*')}
    one_line(dicomcam('demo', '--data', folder, '--out', tmp_path/'out', *small), 'is there already', '--force')
    assert {o: o.stat().st_mtime_ns for o in (tmp_path/'out').rglob('*')} == before

def test_films_that_tell_no_patient(folder, tmp_path):
    "Without PatientID, as anonymised films are: a command says what to do, and does it"
    d = shutil.copytree(folder, tmp_path/'films')
    for o in d.rglob('*.dcm'):
        ds = pydicom.dcmread(o)
        del ds.PatientID
        ds.save_as(o)
    one_line(here('train', d, '--out', tmp_path/'m.safetensors', *small, status=2), 'no file has a PatientID', '--by none')
    here('train', d, '--out', tmp_path/'m.safetensors', *small, '--by', 'none')
    here('report', tmp_path/'m.safetensors', d, '--out', tmp_path/'r.html', '--by', 'none')

def test_what_a_command_reads_stays(folder, tmp_path):
    "--force replaces results, not the model, the labels or the folder that the command itself reads"
    d = shutil.copytree(folder, tmp_path/'films')
    (tmp_path/'m.safetensors').write_bytes(b'model')
    labels = (d/'labels.csv').read_bytes()
    for args in (['report', tmp_path/'m.safetensors', d, '--out', tmp_path/'m.safetensors'], ['train', d, '--out', d/'labels.csv'], ['demo', '--data', d, '--out', d]):
        one_line(here(*args, '--force', status=2), 'is what the command reads')
    assert (tmp_path/'m.safetensors').read_bytes() == b'model' and (d/'labels.csv').read_bytes() == labels

def test_demo_on_real_films(xrays, tmp_path):
    r = dicomcam('demo', '--data', xrays, '--out', tmp_path/'out', *small)
    assert r.returncode == 0, r.stderr
    n = len(patient_split(label_table(xrays))[1]) # a patient is on one side: 49 with scikit-learn 1.6, 50 later
    assert n in (49, 50)
    check(tmp_path/'out', n, ['No Pneumonia', 'Pneumonia'])

def test_demo_with_three_classes_and_names_that_hold_nan(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path/'NaNette')
    names = ['NaNa', 'c1', 'c2']
    pd.read_csv(copy/'labels.csv').assign(label=lambda df: [names[i%3] for i in range(len(df))]).to_csv(copy/'labels.csv', index=False)
    here('demo', '--data', copy, '--out', tmp_path/'out', '--phi', *small)
    m = json.loads((tmp_path/'out'/'metrics.json').read_text(encoding='utf-8'), parse_constant=pytest.fail) # NaN is not JSON
    assert m['positive'] == 'c2' and m['data'] == 'NaNette'
    assert {o.split(', ')[1] for o in m['split']} == set(names)

def test_what_is_not_known_is_null_in_metrics_json():
    known = dict(auc=np.float64(np.nan), low=[-math.inf, 0.5], name='NaN', n=3, none=None)
    assert demo._json_value(known) == dict(auc=None, low=[None, 0.5], name='NaN', n=3, none=None)

@pytest.mark.parametrize('spoil, says', [
    (lambda p: shutil.rmtree(p), 'folder'),
    (lambda p: next((p/'train').rglob('*.dcm')).unlink(), 'files are not there'),
    (lambda p: pd.read_csv(p/'labels.csv').assign(label='x').to_csv(p/'labels.csv', index=False), 'one class only'),
])
def test_bad_folder_is_one_line_and_status_2(folder, tmp_path, spoil, says):
    copy = shutil.copytree(folder, tmp_path/'copy')
    spoil(copy)
    one_line(here('demo', '--data', copy, '--out', tmp_path/'out', status=2), says)
    assert 'Traceback' in here('--debug', 'demo', '--data', copy, '--out', tmp_path/'out', status=2).stderr
    for command in ['train', copy], ['report', copy/'no.safetensors', copy]: one_line(here(*command, '--out', tmp_path/'x', status=2), '')
    assert set(tmp_path.iterdir()) <= {copy}

# all of them

def test_help_and_version():
    assert 'demo' in dicomcam('--help').stdout
    for o in 'summary', 'train', 'explain', 'report', 'demo': assert f'Example: dicomcam {o}' in here(o, '--help').stdout
    from dicomcam import __version__
    assert __version__ in dicomcam('--version').stdout

@pytest.mark.parametrize('args, says', [
    (['summary'], "Missing argument 'FOLDER'"), (['train', '.', '--epochs', 'ten'], '--epochs'), (['explian'], "No such command 'explian'"),
    (['train', '.', '--resume'], '--checkpoint'), (['summary', '.', '--out', 'x.xlsx'], '.parquet or .csv'), (['demo', '--colour'], '--colour')])
def test_misuse_is_one_line_and_status_2(args, says): one_line(here(*args, status=2), says)

def test_what_is_there_stays_and_what_fails_leaves_nothing(tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'mine.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='--force'):
        with cli._output(tmp_path/'out', False, folder=True): pass
    with pytest.raises(KeyboardInterrupt), cli._output(tmp_path/'out', True, folder=True) as part:
        part.mkdir()
        (part/'new.txt').write_text('half')
        raise KeyboardInterrupt
    assert [o.name for o in tmp_path.rglob('*')] == ['out', 'mine.txt']
    for text in 'first', 'second':
        with cli._output(tmp_path/'out', True, folder=True) as part:
            (part/'maps').mkdir(parents=True)
            (part/'maps'/f'{text}.txt').write_text(text)
            (part/'new.txt').write_text(text)
    assert sorted(o.name for o in tmp_path.rglob('*')) == ['maps', 'mine.txt', 'new.txt', 'out', 'second.txt'] and (tmp_path/'out'/'new.txt').read_text() == 'second'
    with cli._output(tmp_path/'deep'/'table.csv', False) as part: part.write_text('1')
    assert (tmp_path/'deep'/'table.csv').read_text() == '1' and len(list((tmp_path/'deep').iterdir())) == 1
    (tmp_path/'empty').mkdir()
    with cli._output(tmp_path/'empty', False, folder=True) as part: part.mkdir()

@pytest.mark.posix
@pytest.mark.parametrize('command', ['summary', 'train', 'demo'])
def test_out_is_tried_before_the_work(tmp_path, command):
    "The folder to work on is not there, but --out is what is told of"
    end = '.csv' if command == 'summary' else ''
    (tmp_path/f'folder{end}').mkdir()
    (tmp_path/f'file{end}').write_text('mine')
    wrong = 'file' if command == 'demo' else 'folder'
    outs = {tmp_path/f'{wrong}{end}': 'and is no', tmp_path/f'file{end}'/f'x{end}': 'cannot be written', tmp_path/'new'/f'{"x"*255}{end}': 'cannot be written'}
    work = ['--data', 'nowhere'] if command == 'demo' else ['nowhere']
    for out, says in outs.items(): one_line(here(command, *work, '--force', '--out', out, status=2), str(out), says)
    if command != 'summary':
        for out in '', '-': one_line(here(command, *work, '--out', out, status=2), 'no name for a result')
        one_line(here(command, *work, '--force', '--out', '/dev/null', status=2), '/dev/null: is there')
    one_line(here(command, *work, '--out', status=2), "'--out' requires")
    assert sorted(o.name for o in tmp_path.iterdir()) == [f'file{end}', f'folder{end}'] and (tmp_path/f'file{end}').read_text() == 'mine'

def test_checkpoint_is_tried_before_the_work(tmp_path):
    one_line(here('train', 'nowhere', '--checkpoint', tmp_path, '--out', tmp_path/'m', status=2), 'is no file')
    one_line(here('train', 'nowhere', '--checkpoint', tmp_path/'m', '--out', tmp_path/'m', status=2), 'cannot be the model and its checkpoint')

def test_two_commands_with_one_place(tmp_path):
    "Without --force the first to end has it, file or folder, whole"
    for name, folder in ('file', False), ('folder', True):
        def write(part, text):
            if folder: part.mkdir()
            (part/'a' if folder else part).write_text(text)
        with pytest.raises(FileExistsError, match='there already'):
            with cli._output(tmp_path/name, False, folder) as slow:
                with cli._output(tmp_path/name, False, folder) as fast: write(fast, 'fast')
                write(slow, 'slow')
        assert (tmp_path/name/'a' if folder else tmp_path/name).read_text() == 'fast'
    assert sorted(o.name for o in tmp_path.iterdir()) == ['file', 'folder']

def test_a_full_disk_is_one_line_whatever_a_library_calls_it(folder, model, tmp_path):
    resource = pytest.importorskip('resource')
    with pytest.raises(OSError, match='x: could not be written'), cli._output(tmp_path/'x', False): raise RuntimeError('No space left on device')
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = sorted((folder/'train').rglob('*.dcm'))[:2]
    for args in ['summary', folder, '--no-pixels', '--out', tmp_path/'s.csv'], ['report', model, folder, '--held-out', '--cases', 1, '--out', tmp_path/'r.html'], ['explain', model, *files, '--out', tmp_path/'maps']:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, was[1]))
        try: r = CliRunner().invoke(main, [*map(str, args)])
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
        assert r.exit_code == 2 and str(args[-1]) in r.stderr.splitlines()[-1] and 'File too large' in r.stderr.splitlines()[-1], r.output
    assert not list(tmp_path.iterdir())

def test_a_fault_of_ours_is_called_so(tmp_path, monkeypatch):
    def broken(folder): raise KeyError('\x1b[31mcolumn\n')
    monkeypatch.setattr('dicomcam.summary.find_dicoms', broken)
    r = here('summary', '.', '--out', tmp_path/'s.csv', status=70)
    one_line(r, 'a fault of dicomcam: KeyError', 'issues', '--debug')
    monkeypatch.setattr('dicomcam.summary.find_dicoms', lambda folder: 1/0 if folder else None)
    assert 'Traceback' in here('--debug', 'summary', '.', '--out', tmp_path/'s.csv', status=70).stderr
    one_line(here('--colour', status=2), '--colour')

@pytest.fixture(scope='module')
def many(folder, tmp_path_factory):
    "20000 X-rays (30, each under many names): no command is through with them before a test can stop it"
    out = tmp_path_factory.mktemp('many')
    files = sorted((folder/'train').rglob('*.dcm'))
    for k in range(20000): os.link(files[k%len(files)], out/f'{k}.dcm')
    return out

@pytest.mark.posix
@pytest.mark.parametrize('when, sig', [('train', signal.SIGINT), ('explain', signal.SIGINT), ('explain', signal.SIGTERM), ('explain', signal.SIGHUP), ('summary', signal.SIGINT)])
def test_ctrl_c_leaves_nothing_and_exits_130(folder, many, model, tmp_path, when, sig):
    args, sign = dict(train=(['train', folder, *small[:4], '--epochs', '999999'], 'train_loss'), # the head of fastai's table
                      explain=(['explain', model, many], 'Heatmaps of'), summary=(['summary', many, '--out', 'x.csv'], 'Reading'))[when]
    p = subprocess.Popen([sys.executable, '-u', '-m', 'dicomcam', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                         preexec_fn=lambda: [signal.signal(o, signal.SIG_DFL) for o in (signal.SIGINT, signal.SIGHUP)]) # which background jobs and nohup ignore
    try:
        while sign not in (line := p.stdout.readline()): assert line, p.stderr.read()
        p.send_signal(sig)
        out, err = p.communicate(timeout=300)
    finally: p.kill()
    assert p.returncode == 130 and err == 'dicomcam: stopped; nothing half-written is left.\n', err
    assert not list(tmp_path.iterdir())

# summary

def test_summary(folder, tmp_path):
    assert '30 files, 0 with' in here('summary', folder, '--out', tmp_path/'a.parquet').stdout
    df = pd.read_parquet(tmp_path/'a.parquet')
    assert len(df) == 30 and 'PatientID' in df and df.img_mean.notna().all()
    here('summary', folder, '--out', tmp_path/'b.csv', '--no-phi', '--no-pixels')
    df = pd.read_csv(tmp_path/'b.csv')
    assert 'PatientID' not in df and 'img_mean' not in df and len(df) == 30
    one_line(here('summary', folder, '--out', tmp_path/'b.csv', status=2), 'is there already')
    here('summary', folder, '--out', tmp_path/'b.csv', '--force')
    assert 'PatientID' in pd.read_csv(tmp_path/'b.csv')
    (tmp_path/'none').mkdir()
    one_line(here('summary', tmp_path/'none', '--out', tmp_path/'c.csv', status=2), 'no DICOM file')
    one_line(here('summary', tmp_path/'nowhere', '--out', tmp_path/'c.csv', status=2), 'nowhere')

# train

def test_train_goes_on_where_it_stopped(folder, tmp_path):
    args = ['train', folder, '--labels', 'labels.csv', '--arch', 'xresnet18', '--size', 64, '--bs', 4, '--seed', 3]
    one_line(here(*args, '--size', 32, '--out', tmp_path/'x', status=2), '--size', '64')
    here(*args, '--epochs', 2, '--out', tmp_path/'whole.safetensors')
    ck = tmp_path/'state.pt'
    r = CliRunner().invoke(main, [*map(str, args), '--epochs', '2', '--checkpoint', str(ck), '--out', str(tmp_path/'a'/'x.safetensors')], catch_exceptions=False)
    assert r.exit_code == 0 and ck.is_file()
    one_line(here(*args, '--epochs', 2, '--checkpoint', ck, '--out', tmp_path/'y', status=2), 'state.pt', '--resume')
    r = here(*args, '--epochs', 2, '--checkpoint', ck, '--resume', '--out', tmp_path/'resumed.safetensors')
    assert (tmp_path/'resumed.safetensors').read_bytes() == (tmp_path/'whole.safetensors').read_bytes() and 'auc ' in r.stdout
    one_line(here(*args, '--epochs', 3, '--checkpoint', ck, '--resume', '--out', tmp_path/'y', status=2), 'of 2 epochs')

def test_train_on_three_classes_tells_of_each(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path/'copy')
    pd.read_csv(copy/'labels.csv').assign(label=lambda df: [f'c{i%3}' for i in range(len(df))]).to_csv(copy/'other.csv', index=False)
    r = here('train', copy, '--labels', 'other.csv', *small, '--out', tmp_path/'m.safetensors')
    assert [o[:3] for o in r.stdout.splitlines() if 'held back' in o] == ['c0,', 'c1,', 'c2,']

# explain

def rows(out):
    with open(out/'heatmaps.csv', encoding='utf-8') as f: return list(csv.DictReader(f))

def test_explain_tells_what_the_heatmaps_tell(folder, model, tmp_path):
    from dicomcam.gradcam import gradcam
    files = sorted((folder/'train'/'Pneumothorax').glob('*.dcm'))
    r = here('explain', model, *files, '--class', 'Pneumothorax', '--layer', -7, '--method', 'layercam', '--bs', 4, '--phi', '--out', tmp_path/'maps')
    assert r.stdout.splitlines()[-1].startswith(f'{len(files)} of {len(files)} explained. Results in {tmp_path/"maps"}')
    h, got = gradcam(load_model(model), files, layers=-7, method='layercam'), rows(tmp_path/'maps')
    for i, o in enumerate(files):
        mine = [r for r in got if r['file'] == str(o)]
        assert (tmp_path/'maps'/mine[0]['heatmap']).is_file() and mine[0]['class'] == 'Pneumothorax'
        np.testing.assert_allclose([float(mine[0][c]) for c in h.classes], h.probs[i], atol=1e-5)
        boxes = h.boxes(i, 'Pneumothorax')
        np.testing.assert_allclose([[float(r[k]) for k in boxes] for r in mine if r['x']], boxes.to_numpy().reshape(-1, len(boxes.columns)), rtol=1e-3)
    assert len(list((tmp_path/'maps').glob('*.png'))) == len(files)

def test_explain_with_dicom_objects(folder, model, tmp_path):
    pytest.importorskip('highdicom')
    files = sorted((folder/'train').rglob('*.dcm'))[:2]
    here('explain', model, *files, '--dicom', '--out', tmp_path/'maps')
    for o in files:
        sc, seg = (pydicom.dcmread(next((tmp_path/'maps').rglob(f'{o.stem}.{k}.dcm'))) for k in ('sc', 'seg'))
        src = pydicom.dcmread(o, stop_before_pixels=True)
        assert sc.Modality == 'OT' and seg.Modality == 'SEG' and sc.StudyInstanceUID == seg.StudyInstanceUID == src.StudyInstanceUID
        assert seg.pixel_array.any() and seg.Rows == src.Rows

def test_explain_folders_patterns_and_names_that_meet(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = next((folder/'train').rglob('*.dcm'))
    for o in 'a/same.dcm', 'b/c/same.dcm', 'b/twin.dcm', 'b/twin': Path(o).parent.mkdir(parents=True, exist_ok=True), shutil.copy(file, o)
    Path('b/notes.txt').write_text('no DICOM')
    here('explain', model, 'a', 'b', 'a/same.dcm', '--out', 'maps')
    assert sorted(str(o.relative_to('maps')) for o in Path('maps').rglob('*.png')) == ['a/same.dcm.png', 'b/c/same.dcm.png', 'b/twin.dcm.png', 'b/twin.png']
    here('explain', model, '**/same.dcm', '--out', 'two')
    assert sorted(str(o.relative_to('two')) for o in Path('two').rglob('*.png')) == ['a/same.png', 'b/c/same.png']
    one_line(here('explain', model, 'c*', '--out', 'none', status=2), 'c*')

def test_one_bad_file_does_not_stop_the_rest(folder, model, tmp_path):
    files = sorted((folder/'train').rglob('*.dcm'))[:6]
    bad = tmp_path/'cut.dcm'
    bad.write_bytes(files[0].read_bytes()[:200])
    (tmp_path/'text.dcm').write_text('no image')
    r = here('explain', model, *files[:3], bad, tmp_path/'text.dcm', *files[3:], '--bs', 4, '--phi', '--out', tmp_path/'maps', status=1)
    assert '6 of 8 explained' in r.stdout.splitlines()[-1]
    assert sorted(o.split(':')[0] for o in r.stderr.splitlines()) == sorted([str(bad), str(tmp_path/'text.dcm')])
    got = rows(tmp_path/'maps')
    assert {o['file'] for o in got if o['error']} == {str(bad), str(tmp_path/'text.dcm')} and len({o['file'] for o in got}) == 8
    assert list(dict.fromkeys(o['file'] for o in got)) == [str(o) for o in [*files[:3], bad, tmp_path/'text.dcm', *files[3:]]]
    assert len(list((tmp_path/'maps').rglob('*.png'))) == 6
    one_line(here('explain', model, bad, '--out', tmp_path/'none', status=2), 'None of the 1 files')
    assert not (tmp_path/'none').exists()

@pytest.mark.parametrize('args, says', [(['--class', 'Flu'], "'Flu'"), (['--layer', '99'], '99'), (['--layer', 'no.such'], 'no.such'), (['--method', 'magic'], "'magic'")])
def test_wrong_class_layer_method_are_the_persons_mistake_not_the_files(folder, model, tmp_path, args, says):
    one_line(here('explain', model, folder, *args, '--out', tmp_path/'maps', status=2), says)
    assert not list(tmp_path.iterdir())

def test_explain_streams():
    "A batch is asked for when it is needed, and no batch is larger than said"
    asked = []
    def explain(files):
        asked.append(files)
        if 'bad' in files: raise ValueError('bad')
        return files
    files = ['bad' if k == 7 else f'{k}' for k in range(1000)]
    it = folder_._each(explain, files, 5)
    assert next(it) == (files[:5], 0, None) and len(asked) == 1
    rest = list(it)
    assert len(rest) == 999 and max(map(len, asked)) == 5 and len(asked) == 200+5
    assert [k for k, (h, i, e) in enumerate(rest, 1) if e] == [7] and all(e or h[i] == files[k] for k, (h, i, e) in enumerate(rest, 1))

@pytest.mark.posix
def test_a_terminal_sees_progress_and_time_left(folder, model, tmp_path):
    import pty
    files, seen = sorted((folder/'train').rglob('*.dcm'))[:4], []
    master, slave = pty.openpty()
    command = [sys.executable, '-m', 'dicomcam', 'explain', str(model), *map(str, files), '--bs', '1', '--out', str(tmp_path/'maps')]
    p = subprocess.Popen(command, stdout=slave, stderr=slave, env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '100'})
    os.close(slave)
    try:
        while data := os.read(master, 1024): seen.append(data)
    except OSError: pass # the other end is closed
    os.close(master)
    text = b''.join(seen).decode()
    assert p.wait() == 0 and 'Heatmaps of layer' in text, text
    for n in range(1, 5): assert re.search(rf'\[{n}/4 (\d+:)?\d\d:\d\d<(\d+:)?\d\d:\d\d\]', text), text # done, of how many, for how long<how long still

# report

def test_report(folder, model, tmp_path):
    r = here('report', model, folder, '--held-out', '--cases', 3, '--out', tmp_path/'r.html')
    table = label_table(folder)
    n = len(patient_split(table)[1])
    assert f'Looking at {n} images' in r.stdout and r.stdout.splitlines()[-1] == f'Report in {tmp_path/"r.html"}'
    text = (tmp_path/'r.html').read_text(encoding='utf-8')
    assert '<h1>m.safetensors</h1>' in text and folder.name not in text.split('</h1>')[0] and not any(o in text for o in table.group) # no PatientID
    one_line(here('report', model, folder, '--out', tmp_path/'r.html', status=2), 'is there already')
    pd.read_csv(folder/'labels.csv').replace('Pneumothorax', 'Flu').to_csv(tmp_path/'flu.csv', index=False)
    one_line(here('report', model, folder, '--labels', tmp_path/'flu.csv', '--out', tmp_path/'x.html', status=2), "'Flu'")

# lesions

def test_lesion_from_mask_boxes_or_nothing(folder, tmp_path):
    from dicomcam.trust import lesion_mask
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
