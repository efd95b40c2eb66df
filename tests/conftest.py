import os
from pathlib import Path

if n := os.environ.get('PYTEST_XDIST_WORKER_COUNT'): # before torch is imported: the workers share the cores
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(n))))

import pytest

def pytest_configure(config):
    config.addinivalue_line('markers', 'posix: needs the signals, terminals or pipes of Linux and macOS')
    config.addinivalue_line('markers', 'long: goes first, else one worker ends with it while the others wait')

def pytest_collection_modifyitems(items): items.sort(key=lambda o: not o.get_closest_marker('long'))

def pytest_runtest_setup(item):
    if os.name == 'nt' and item.get_closest_marker('posix'): pytest.skip('Windows has no such signals, terminals or pipes')

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "A small phantom: 30 X-rays of 96 pixels with labels.csv, masks and boxes"
    from dicomcam.data import phantom
    return phantom(tmp_path_factory.mktemp('data')/'phantom', n=30, size=96, seed=1)

@pytest.fixture(scope='session')
def tiny_learner(folder):
    "A learner of `folder` at 64 pixels with a tiny network that has learnt nothing; change nothing of it, `make_tiny` makes another"
    from dicomcam.batches import dicom_dls
    from tiny import make_tiny
    return make_tiny(dicom_dls(folder, size=64))

@pytest.fixture(scope='session')
def xrays():
    "The folder of real X-rays that DICOMCAM_TEST_DATA names"
    d = os.environ.get('DICOMCAM_TEST_DATA')
    if not d: pytest.skip('DICOMCAM_TEST_DATA names no folder of real X-rays')
    return Path(d)
