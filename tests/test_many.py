"Thousands of images: in bounded memory, shared out over processes, and one that is broken costs itself."
import csv, filecmp, json, os, pickle, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from click.testing import CliRunner
from torch.utils import data

from dicomcam import report as report_
from dicomcam.attribution import attribute
from dicomcam.cli import main
from dicomcam.files import helping_with, remove_unfinished, whole
from dicomcam.folder import draw_heatmaps, write_heatmaps, write_table
from dicomcam.gradcam import gradcam
from dicomcam.items import as_batches
from dicomcam.results import predictions
from dicomcam.team import Team
from tiny import TinyNet, make_tiny

def films(folder): return sorted((folder/'train').rglob('*.dcm'))

def tree(folder): return sorted(str(o.relative_to(folder)) for o in Path(folder).rglob('*') if o.is_file())

def same(a, b):
    assert tree(a) == tree(b)
    assert filecmp.cmpfiles(a, b, tree(a), shallow=False)[1:] == ([], [])

# --- what is large is not copied ---

HUGE = 10**7 # images of 16 KB: 160 GB

@pytest.mark.parametrize('large', [
    torch.zeros(1).expand(HUGE, 1, 64, 64),
    np.broadcast_to(np.float32(0), (HUGE, 1, 64, 64)), # nor can it be written to, as an array on disk
    data.DataLoader(data.StackDataset(torch.zeros(1).expand(HUGE, 1, 64, 64)), batch_size=64),
    data.StackDataset(torch.zeros(1).expand(HUGE, 1, 64, 64))], ids=['tensor', 'array', 'loader', 'dataset'])
def test_a_large_batch_is_split_never_copied(large, recwarn):
    it = gradcam(TinyNet(), large, layers=-6, batches=True)
    assert [len(next(it)) for _ in range(2)] == [64, 64]
    assert not [o for o in recwarn if 'writable' in str(o.message)]

@pytest.mark.parametrize('bad', [np.zeros((0, 1, 8, 8), 'f4'), np.float32(1)[None][0:0], np.array(1.), np.zeros((2, 1, 8, 8), 'uint8')])
def test_an_array_that_is_no_batch(bad):
    with pytest.raises(ValueError, match='A batch is floating-point'): list(as_batches(bad, None)[1])

def test_parts_of_an_array_are_the_array():
    x = np.random.default_rng(0).random((7, 1, 32, 32), 'f4')
    assert torch.equal(torch.cat(list(as_batches(x, None, bs=3)[1])), torch.from_numpy(x))
    a, b = gradcam(TinyNet(), x, layers=-6), gradcam(TinyNet(), torch.from_numpy(x), layers=-6)
    assert torch.equal(a.raw[0], b.raw[0]) and torch.equal(a.images, b.images)

def test_batches_of_files_are_the_whole(folder):
    from dicomcam.batches import dicom_dls
    learn = make_tiny(dicom_dls(folder, size=64, bs=4))
    files = films(folder)[:10]
    for items in files, pd.DataFrame(dict(file=files)):
        parts, h = list(gradcam(learn, items, layers=-6, batches=True)), gradcam(learn, items, layers=-6)
        assert [len(o) for o in parts] == [4, 4, 2] and [f for o in parts for f in o.items] == h.items == files
        assert torch.equal(torch.cat([o.raw[0] for o in parts]), h.raw[0]) and all(o.native(0).shape == (96, 96) for o in parts)

GROWS = '''import resource, sys, torch
from dicomcam.gradcam import gradcam
from torch import nn
net, x = nn.Sequential(nn.Conv2d(1, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1).expand(1024, 1, 256, 256)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
for h in gradcam(net, x[:128], layers=0, batches=True): pass
before = peak()
for h in gradcam(net, x, layers=0, batches=True): pass
print(peak()-before)'''

@pytest.mark.posix
@pytest.mark.skipif(sys.platform == 'darwin', reason='ru_maxrss is of another unit there')
def test_memory_does_not_grow_with_the_images():
    "1,024 images of 256 KB would be 256 MB"
    r = subprocess.run([sys.executable, '-c', GROWS], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert r.returncode == 0 and int(r.stdout) < 100, r.stdout+r.stderr

# --- the report ---

def test_the_report_keeps_one_batch_of_heatmaps(folder, tmp_path, monkeypatch):
    "No two batches are alive at once, and each case has the maps of its own image"
    from dicomcam.batches import dicom_dls
    learn, alive, most = make_tiny(dicom_dls(folder, size=64, bs=4)), [], []
    import weakref
    def watched(*args, **kw):
        assert kw['batches']
        return map(note, attribute(*args, **kw))
    def note(h):
        alive.append(weakref.ref(h))
        most.append(sum(o() is not None for o in alive))
        return h
    monkeypatch.setattr(report_, 'attribute', watched)
    df = predictions(learn, films(folder)[:14])
    fn = report_.report(learn, films(folder)[:14], tmp_path/'r.html', layers=-6, n=14, phi=True)
    html = fn.read_text(encoding='utf-8')
    assert len(alive) == 4 and max(most) <= 2 # the one before goes when the next is there
    at = [html.index(f'{o.name}, patient') for o in df.file]
    assert at == sorted(at) and html.count('<li class="case"') == 14

def test_cases_are_numbered_through_and_have_their_own_maps(folder):
    from dicomcam.batches import dicom_dls
    from dicomcam.pictures import heat_uri
    learn = make_tiny(dicom_dls(folder, size=64, bs=4))
    files, vocab = films(folder)[-6:], list(learn.dls.vocab)
    h = gradcam(learn, files, vocab, -6)
    cases = predictions(learn, files).assign(predicted=vocab[0], outcome='', scores=[dict.fromkeys(vocab, .5)]*6)
    about = report_._about_cases(gradcam(learn, files, vocab, -6, batches=True), cases, vocab, vocab[1], folder, False, 64, {})
    assert [o['no'] for o in about['cases']] == [1, 2, 3, 4, 5, 6] and about['outlined']
    for i, o in enumerate(about['cases']): assert o['maps'][1]['uri'] == heat_uri(h.heat(i, vocab[1]))

# --- shares ---

def test_shares_are_whole_batches(monkeypatch):
    "All of them, each once, in turn"
    shares = []
    for rank in range(3):
        monkeypatch.setenv('RANK', str(rank)), monkeypatch.setenv('WORLD_SIZE', '3')
        shares.append(Team().share(20, 4))
    assert shares == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 16, 17, 18, 19], [8, 9, 10, 11]]
    monkeypatch.setenv('RANK', '5')
    assert Team().share(3, 4) == []

def test_alone_nothing_is_asked_for():
    with Team() as team: assert team.first and team.share(3, 2) == [0, 1, 2] and team.from_first(1) == 1 and team.to_first(2) == [2]
    assert not torch.distributed.is_initialized()

def test_a_rank_without_company_is_alone(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with Team() as team: assert team.first and team.share(3, 2) == [0, 1, 2]

def test_drawn_in_shares_is_drawn_at_once(folder, tiny_learner, tmp_path):
    "Whatever the shares are, and where files are broken"
    from functools import partial
    explain, files, vocab = partial(gradcam, tiny_learner, layers=-6), films(folder)[:7], list(tiny_learner.dls.vocab)
    for k in 2, 6:
        bad = tmp_path/f'bad{k}.dcm'
        bad.write_bytes(files[k].read_bytes()[:200])
        files[k] = bad
    failed = write_heatmaps(tmp_path/'one', explain, files, vocab, bs=2) if (tmp_path/'one').mkdir() is None else None
    (tmp_path/'two').mkdir()
    parts = [pickle.loads(pickle.dumps(draw_heatmaps(tmp_path/'two', explain, files, vocab, bs=2, mine=o, progress=False))) for o in ([2, 3, 6], [0, 1, 4, 5], [])]
    assert write_table(tmp_path/'two', parts, files, vocab) == failed and list(failed) == [files[2], files[6]]
    same(tmp_path/'one', tmp_path/'two')

def test_a_helper_removes_until_its_share_is_done(tmp_path):
    part = tmp_path/'.out.12345678.part'
    for share_done in False, True:
        part.mkdir()
        with helping_with(part) as done:
            if share_done: done()
            remove_unfinished()
        assert part.exists() == share_done
    with pytest.raises(OSError), helping_with(part) as done:
        done()
        raise OSError('lost')
    assert not part.exists()
    with whole(tmp_path/'out') as other, helping_with(part): other.touch()
    assert (tmp_path/'out').exists()

@pytest.fixture(scope='module')
def job(folder, tmp_path_factory):
    "A model that has learnt nothing; six films and one that is broken"
    from dicomcam.batches import dicom_dls
    from dicomcam.models import save_model
    from dicomcam.networks import dicom_learner
    d = tmp_path_factory.mktemp('job')
    torch.manual_seed(0)
    save_model(dicom_learner(dicom_dls(folder, size=64), 'xresnet18'), d/'m.safetensors')
    for k, o in enumerate(films(folder)[:6]): (d/'films').mkdir(exist_ok=True), shutil.copy(o, d/'films'/f'{k}.dcm')
    (d/'films'/'2b.dcm').write_bytes((d/'films'/'2.dcm').read_bytes()[:200])
    return d

def test_two_processes_of_a_launcher(job, tmp_path):
    "The same files as one process writes, byte by byte, and what is said is said once"
    pytest.importorskip('accelerate', reason='the [distributed] extra is not installed')
    args, n = ['explain', str(job/'m.safetensors'), str(job/'films'), '--bs', '2', '--out'], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = CliRunner().invoke(main, [*args, str(tmp_path/'one')])
    finally: torch.set_num_threads(n)
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'dicomcam']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent.parent)}
    r = subprocess.run([*launch, *args, str(tmp_path/'two')], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)
    assert one.exit_code == 1 and r.returncode == 1, one.output+r.stderr
    same(tmp_path/'one', tmp_path/'two')
    assert r.stdout.splitlines() == [o.replace('one', 'two') for o in one.stdout.splitlines()]
    assert r.stderr.count('2b.dcm') == 1 and 'stopped' not in r.stderr
    assert sorted(o.name for o in tmp_path.iterdir()) == ['one', 'two']

@pytest.mark.posix
def test_one_that_is_lost_ends_all(job, tmp_path):
    "Killed, with a fault, through a mistake of the person's: every process ends, in one line, and nothing is left"
    args = ['explain', str(job/'m.safetensors'), str(job/'films'), '--bs', '2', '--out', str(tmp_path/'out')]
    jobs = [dict(args=args, spoilt=o) for o in ([None, 'kill'], ['kill', None], [None, 'fault'])]
    jobs += [dict(args=[*args, '--class', 'Flu'], spoilt=[None, None]), dict(args=args, spoilt=[None, None])]
    (job/'jobs.json').write_text(json.dumps(jobs))
    r = subprocess.run([sys.executable, str(Path(__file__).parent/'two.py'), str(job/'jobs.json')], capture_output=True, text=True, timeout=900)
    killed, first_killed, fault, mistake, well = map(json.loads, r.stdout.splitlines())
    def lines(o, rank): return [s for s in o['said'][rank].splitlines() if s.startswith('dicomcam: ')]
    for o in killed, first_killed, fault, mistake:
        for rank in range(2):
            if o['status'][rank] != -9: assert len(lines(o, rank)) == 1 and len(o['said'][rank].splitlines()) <= 2, o
    assert killed['status'] == [2, -9] and 'another process' in lines(killed, 0)[0]
    assert first_killed['status'] == [-9, 2] and 'another process' in lines(first_killed, 1)[0]
    assert fault['status'] == [2, 70] and 'KeyError' in lines(fault, 1)[0]
    assert mistake['status'] == [2, 2] and "'Flu'" in lines(mistake, 0)[0]
    assert well['status'] == [1, 1] and well['said'][1] == ''
    assert [o.name for o in tmp_path.iterdir()] == ['out'] # of the last job alone
    with open(tmp_path/'out'/'heatmaps.csv', encoding='utf-8') as f: assert len({o['file'] for o in csv.DictReader(f)}) == 7

# --- any method ---

@pytest.mark.parametrize('method, smooth', [('scorecam', None), ('occlusion', None), ('cam', 'noise'), ('layercam', 'tta')])
def test_explain_and_report_take_any_method(folder, tiny_learner, tmp_path, monkeypatch, method, smooth):
    monkeypatch.setattr('dicomcam.models.load_model', lambda fn: tiny_learner)
    files, how = films(folder)[:2], ['--method', method, *(['--smooth', smooth] if smooth else [])]
    r = CliRunner().invoke(main, ['explain', 'm', *map(str, files), *how, '--out', str(tmp_path/'maps')])
    assert r.exit_code == 0, r.output
    layer = r.stdout.splitlines()[0].removeprefix('Heatmaps of layer ').split(', ')[0]
    h = attribute(tiny_learner, files, method=method, smooth=smooth, **(dict(layers=layer) if method in ('scorecam', 'layercam') else {}))
    table = pd.read_csv(tmp_path/'maps'/'heatmaps.csv').groupby('file', sort=False).first()
    boxes = pd.concat([h.boxes(i).reindex([0]) for i in range(2)]) # a map may have none
    np.testing.assert_allclose(table[['x', 'y', 'width', 'height']], boxes[['x', 'y', 'width', 'height']].astype(float))
    html = report_.report(tiny_learner, files, tmp_path/'r.html', method=method, smooth=smooth).read_text(encoding='utf-8')
    words = dict(scorecam='Score-CAM', occlusion='occlusion', cam='CAM', layercam='Layer-CAM')[method]
    assert html.count('<li class="case"') == 2 and f'what speaks for a class ({words}' in html

@pytest.mark.parametrize('how, says', [(['--method', 'magic'], 'occlusion'), (['--smooth', 'butter'], 'tta'), (['--method', 'occlusion', '--layer', '-6'], 'leave layers out')])
def test_a_method_that_is_not_there(folder, tiny_learner, tmp_path, monkeypatch, how, says):
    monkeypatch.setattr('dicomcam.models.load_model', lambda fn: tiny_learner)
    for command in ['explain', 'm', str(films(folder)[0])], ['report', 'm', str(folder)]:
        r = CliRunner().invoke(main, [*command, *how, '--out', str(tmp_path/'x')])
        assert r.exit_code == 2 and says in r.stderr.splitlines()[-1], r.output
    assert not list(tmp_path.iterdir())
