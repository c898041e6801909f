import os, sys
from pathlib import Path
import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use('agg')
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    "The longest come first, so that no process is left alone with one of them: notebooks, and among these the tutorials"
    items.sort(key=lambda o: (not o.nodeid.startswith('tests/test_notebooks'), 'tutorials/' not in o.nodeid))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    "Whatever a test saves, it saves in a folder of its own"
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def closed_figures():
    "What a test draws is gone when it ends"
    yield
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


@pytest.fixture
def signals():
    "1200 steps of two inputs and one output that remembers about 20 steps"
    rng = np.random.default_rng(0)
    u = rng.standard_normal((1200,2)).astype(np.float32)
    y = np.convolve(u[:,0]*u[:,1], np.exp(-np.arange(60)/20)/5)[:len(u),None].astype(np.float32)
    return u,y


@pytest.fixture(scope='session')
def data_dir():
    "The folder with real recordings, if there is one"
    path = os.environ.get('TBPTT_DATA')
    if not path or not Path(path).exists(): pytest.skip('TBPTT_DATA names no folder with real data')
    return Path(path)
