"After an interruption anywhere a learner is as good as a new one with the same weights; the long form is bench/interrupts.py"
import copy, importlib.util, os, signal, sys, threading, warnings
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from helpers import adam, fit, item_loaders, loaders, sgd
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import read_ahead
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checkpoint import TbpttCheckpoint

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    spec = importlib.util.spec_from_file_location('bench_interrupts', Path(__file__).resolve().parent.parent/'bench'/'interrupts.py')
    interrupts = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interrupts)


# --- at random

@pytest.mark.parametrize('start', range(0, 300, 30))
def test_what_follows_is_bitwise_that_of_a_new_learner(start):
    counts,bad = interrupts.run(range(start, start+30))
    assert not bad,'\n'.join(bad)
    assert sum(n for (_,end),n in counts.items() if end=='same')>=17
