import os
from pathlib import Path

import pytest

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "A small phantom: 30 X-rays of 96 pixels with labels.csv, masks and boxes"
    from dicomcam.data import phantom
    return phantom(tmp_path_factory.mktemp('data')/'phantom', n=30, size=96, seed=1)

@pytest.fixture(scope='session')
def xrays():
    "The folder of real X-rays that DICOMCAM_TEST_DATA names"
    d = os.environ.get('DICOMCAM_TEST_DATA')
    if not d: pytest.skip('DICOMCAM_TEST_DATA names no folder of real X-rays')
    return Path(d)
