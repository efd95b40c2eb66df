"What tests/test_node.py has done by a process apart. Light: each start of one imports it."
import os, signal, time

def make(): return 'explainer', 'layer 5'

def broken(): raise ValueError('the model is broken')

def answers(explain, films, folders, cls, model):
    "As `write_answers`; a film may hang, or end the process"
    assert explain == 'explainer'
    said = [o.read_bytes() for o in films]
    if any(b'hangs' in o for o in said): time.sleep(10**6)
    if any(b'crashes' in o for o in said): os.kill(os.getpid(), signal.SIGTERM)
    for folder, data in zip(folders, said):
        folder.mkdir()
        (folder/'1.dcm').write_bytes(data)
    return ['']*len(films)

def sleep(explain, fn):
    "Leave the number of this process, and never return"
    fn.write_text(str(os.getpid()))
    time.sleep(10**6)
