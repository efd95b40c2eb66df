"Results that are whole or not there at all, the cache, and a bar that is silent where nobody sees it."
import os, subprocess, sys, threading, time
from pathlib import Path

import pytest

from dicomcam.files import cache_folder, evict, progress_bar, remove, remove_unfinished, short_path, sweep, whole

def names(folder): return sorted(o.name for o in folder.iterdir())

def folder(path, **files):
    path.mkdir()
    for name, text in files.items(): (path/name).write_text(text)

# --- whole

def test_whole_file(tmp_path):
    path = tmp_path/'new'/'a.txt'
    with whole(path) as part:
        assert part.parent == path.parent and part.name.startswith('.') and not part.exists()
        part.write_text('text')
        assert not path.exists()
    assert path.read_text() == 'text' and names(path.parent) == ['a.txt']

def test_whole_replaces_a_file(tmp_path):
    path = tmp_path/'a.txt'
    path.write_text('old')
    with whole(path) as part:
        part.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and names(tmp_path) == ['a.txt']

def test_whole_folder(tmp_path):
    with whole(tmp_path/'out') as part: folder(part, a='1', b='2')
    assert names(tmp_path) == ['out'] and names(tmp_path/'out') == ['a', 'b']

def test_whole_replaces_entries_of_a_folder(tmp_path):
    out = tmp_path/'out'
    folder(out, mine='mine', a='old')
    folder(out/'b', old='old')
    folder(out/'c', old='old')
    (out/'d').write_text('old')
    with whole(out) as part:
        folder(part, a='new', c='a file now')
        folder(part/'b', new='new')
        folder(part/'d', new='a folder now')
    assert names(tmp_path) == ['out'] and names(out) == ['a', 'b', 'c', 'd', 'mine']
    assert (out/'mine').read_text() == 'mine' and (out/'a').read_text() == 'new' and (out/'c').read_text() == 'a file now'
    assert names(out/'b') == ['new'] and names(out/'d') == ['new']

def test_whole_without_merging(tmp_path):
    folder(tmp_path/'out', mine='mine')
    with pytest.raises(OSError):
        with whole(tmp_path/'out', merge=False) as part: folder(part, a='new')
    assert names(tmp_path) == ['out'] and names(tmp_path/'out') == ['mine']
    with whole(tmp_path/'other', merge=False) as part: folder(part, a='new')
    assert names(tmp_path/'other') == ['a']

def test_whole_of_nothing(tmp_path):
    with whole(tmp_path/'a'): pass
    assert names(tmp_path) == []

@pytest.mark.parametrize('error', [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('before', [True, False])
def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path, error, before):
    if before:
        (tmp_path/'file').write_text('old')
        folder(tmp_path/'folder', a='old')
    for name in 'file', 'folder':
        with pytest.raises(error):
            with whole(tmp_path/name) as part:
                if name == 'file': part.write_text('half')
                else: folder(part, a='half')
                raise error
    assert names(tmp_path) == (['file', 'folder'] if before else [])
    if before: assert (tmp_path/'file').read_text() == (tmp_path/'folder'/'a').read_text() == 'old'

def test_two_writers_do_not_share_a_part(tmp_path):
    with whole(tmp_path/'a') as one, whole(tmp_path/'a') as two:
        assert one != two
        one.write_text('first')
        two.write_text('second')
    assert names(tmp_path) == ['a'] and (tmp_path/'a').read_text() == 'first' # the outer block ends last

def test_folders_made_for_it_go_too(tmp_path):
    with pytest.raises(ValueError):
        with whole(tmp_path/'new'/'deep'/'a'): raise ValueError
    assert names(tmp_path) == []

def test_what_is_unfinished_can_be_removed_from_outside(tmp_path):
    with pytest.raises(FileNotFoundError):
        with whole(tmp_path/'new'/'a') as one, whole(tmp_path/'b') as two:
            one.write_text('half')
            folder(two, a='half')
            remove_unfinished()
            assert names(tmp_path) == []
            raise FileNotFoundError
    assert names(tmp_path) == []

@pytest.mark.posix
def test_two_do_not_merge_into_a_folder_at_once(tmp_path):
    import fcntl
    folder(tmp_path/'out', a='old')
    def merge():
        with whole(tmp_path/'out') as part: folder(part, a='new')
    fd = os.open(tmp_path/'out', os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    thread = threading.Thread(target=merge)
    thread.start()
    thread.join(.3)
    assert (tmp_path/'out'/'a').read_text() == 'old'
    os.close(fd) # gives the lock back
    thread.join()
    assert (tmp_path/'out'/'a').read_text() == 'new' and names(tmp_path) == ['out']

# --- the cache

def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path/'dicomcam' and cache_folder('images') == tmp_path/'dicomcam'/'images'
    assert names(tmp_path) == []

def test_no_home_is_told(monkeypatch, tmp_path):
    def home(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', home)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    with pytest.raises(OSError, match='HOME'): cache_folder()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder('images') == tmp_path/'dicomcam'/'images'

def entries(tmp_path):
    "Four folders that cost 10 each, the first used longest ago."
    for o in 'abcd': folder(tmp_path/o, x='')
    return [(when, 10, tmp_path/o) for when, o in enumerate('abcd')][::-1]

@pytest.mark.parametrize('limit, left', [(40, 'abcd'), (39, 'bcd'), (20, 'cd'), (0, '')])
def test_evict(tmp_path, limit, left):
    evict(entries(tmp_path), limit)
    assert names(tmp_path) == list(left)

def test_evict_keeps_what_is_in_use(tmp_path):
    evict(entries(tmp_path), 20, keep=[tmp_path/'a'])
    assert names(tmp_path) == ['a', 'd']

def test_sweep(tmp_path):
    old = [tmp_path/o for o in ('.a.txt.0123abcd.part', '.b.0123abcd.part', '.hidden', 'a.part')]
    for o in old[:1]+old[2:]: o.write_text('')
    folder(old[1], x='')
    (tmp_path/'.a.txt.ffffffff.part').write_text('at work')
    for o in old: os.utime(o, (1e9, 1e9))
    sweep(tmp_path, 'a.txt')
    assert names(tmp_path) == ['.a.txt.ffffffff.part', '.b.0123abcd.part', '.hidden', 'a.part']
    sweep(tmp_path)
    assert names(tmp_path) == ['.a.txt.ffffffff.part', '.hidden', 'a.part']
    os.utime(tmp_path/'.a.txt.ffffffff.part', (time.time()-7200,)*2)
    sweep(tmp_path, age=3600)
    assert names(tmp_path) == ['.hidden', 'a.part']

def test_remove(tmp_path):
    folder(tmp_path/'folder', a='')
    (tmp_path/'file').write_text('')
    for o in 'folder', 'file', 'neither': remove(tmp_path/o)
    assert names(tmp_path) == []

@pytest.mark.posix
def test_remove_takes_a_link_not_what_it_points_to(tmp_path):
    folder(tmp_path/'mine', a='')
    (tmp_path/'link').symlink_to(tmp_path/'mine')
    remove(tmp_path/'link')
    assert names(tmp_path) == ['mine'] and names(tmp_path/'mine') == ['a']

# --- what people see

def test_progress_bar_is_silent_without_a_terminal():
    code = 'from dicomcam.files import progress_bar\nassert sum(progress_bar(range(5))) == sum(progress_bar(iter(range(5)), 5)) == 10'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (0, '', '')

def test_progress_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr('dicomcam.files._watched', lambda: True)
    assert list(progress_bar(iter(range(5)), 5)) == [0, 1, 2, 3, 4]

def test_plain_progress():
    code = 'from dicomcam.files import plain_progress; from fastprogress import fastprogress as f; plain_progress(); print(f.NO_BAR)'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout == 'True\n', r.stderr

def test_short_path(monkeypatch, tmp_path):
    for o in 'HOME', 'USERPROFILE': monkeypatch.setenv(o, str(tmp_path))
    assert short_path(tmp_path/'data'/'a.csv') == str(Path('~')/'data'/'a.csv')
    assert short_path('data/a.csv') == 'data/a.csv'

def test_light_import():
    code = 'import sys, dicomcam.files; print([o for o in ("torch", "fastai", "pandas", "matplotlib") if o in sys.modules])'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout == '[]\n', r.stderr
