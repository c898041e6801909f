"A training as a table, whatever becomes of the fit"
import pytest, torch
from fastai.callback.core import Callback
from fastai.imports import noop
from fastai.learner import Learner
from fastai.data.core import DataLoaders
from torch import nn
from tbptt_fastai.instruments.table import TrainingTable

class Interrupt(Callback):
    def after_batch(self): raise KeyboardInterrupt

@pytest.fixture
def learn():
    x = torch.randn(8, 1)
    dls = DataLoaders.from_dsets(list(zip(x, x)), list(zip(x, x)), bs=4, device='cpu')
    learn = Learner(dls, nn.Linear(1, 1), nn.MSELoss())
    learn.remove_cbs([o for o in learn.cbs if o.name=='progress'])
    learn.lines = []
    learn.logger = learn.lines.append
    return learn

def interrupted(learn, *cbs):
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[*cbs, Interrupt()])

def test_a_fit_is_one_table_and_the_logger_is_as_before(learn, capsys):
    before = learn.logger
    learn.add_cb(TrainingTable())
    learn.fit(2)
    assert len(learn.training_table.rows)==2 and learn.lines==[] and learn.logger is before

def test_after_an_interrupted_fit_another_one_logs_as_before(learn):
    interrupted(learn, TrainingTable())
    learn.fit(1)
    assert len(learn.lines)==1

def test_after_an_interrupted_fit_the_next_table_has_its_own_rows(learn):
    before = learn.logger
    table = TrainingTable()
    learn.add_cb(table)
    for _ in range(2): interrupted(learn)
    learn.fit(3)
    assert len(table.rows)==3 and learn.lines==[] and learn.logger is before

def test_without_a_logger_there_is_no_table(learn, capsys):
    learn.logger = noop
    learn.fit(1, cbs=TrainingTable())
    assert learn.logger is noop and capsys.readouterr().out==''
