"Evaluation in sub-windows gives the numbers of whole windows"
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # with it comes Learner.no_bar
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import mae, rmse
from torch import nn
from helpers import fit, untaught_on_purpose
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.state.stateful import StatefulRNN

pytestmark = untaught_on_purpose # of the fixture


class Mixed(nn.Module):
    "A StatefulRNN and a plain layer; one value per step, or one for the window"
    last = False
    def __init__(self):
        super().__init__()
        self.a,self.b,self.out,self.seen = StatefulRNN(nn.GRU(2, 5, batch_first=True)),nn.LSTM(5, 6, batch_first=True),nn.Linear(6, 1),[]
    def forward(self, x):
        self.seen.append(x.shape[1])
        out = self.out(self.b(self.a(x))[0])
        return out[:,-1] if self.last else out

@pytest.fixture
def learn(signals):
    torch.manual_seed(0)
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=130, stp_sz=60, bs=3, valid_pct=.4)
    learn = Learner(dls, Mixed(), loss_func=nn.functional.l1_loss, metrics=[fun_rmse, rmse, mae], cbs=TbpttResetCB(50, n_skip=70))
    fit(learn, 1)
    return learn

def values(learn):
    with learn.no_bar(), learn.no_logging(): return [*learn.validate(), *learn.validate(0)],learn.get_preds(with_input=True, with_loss=True)


@pytest.mark.parametrize('sub_seq_len', [1,40,64,129,130,1000])
def test_loss_metrics_and_predictions_are_those_of_whole_windows(learn, sub_seq_len):
    expected,expected_preds = values(learn)
    learn.model.seen.clear()
    learn.add_cb(SubWindowEvalCB(sub_seq_len))
    got,preds = values(learn)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    for a,b in zip(preds, expected_preds): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert max(learn.model.seen)==min(sub_seq_len, 130)


def test_training_is_the_same_bit_by_bit(learn, signals):
    def trained(cbs):
        torch.manual_seed(0)
        dls = SequenceDataLoaders.from_arrays(*signals, win_sz=130, stp_sz=60, bs=3, valid_pct=.4, shuffle=False)
        learn = Learner(dls, Mixed(), loss_func=nn.functional.l1_loss, cbs=[TbpttResetCB(50), *cbs])
        fit(learn, 2)
        return list(learn.model.parameters())
    for a,b in zip(trained([]), trained([SubWindowEvalCB(40)])): assert torch.equal(a, b)


def test_one_prediction_per_window_is_that_of_its_end(learn):
    learn.model.last = True
    learn.loss_func = lambda pred,y: (pred-y[:,-1]).abs().mean()
    learn.metrics,learn.tbptt_reset_cb.n_skip = [],0
    with learn.no_bar(): expected = [learn.validate(), learn.get_preds()[0]]
    learn.add_cb(SubWindowEvalCB(40))
    with learn.no_bar():
        np.testing.assert_allclose(learn.validate(), expected[0], atol=1e-6)
        torch.testing.assert_close(learn.get_preds()[0], expected[1], atol=1e-6, rtol=0)


def test_a_failing_evaluation_leaves_nothing_behind(learn):
    expected,_ = values(learn)
    learn.add_cb(SubWindowEvalCB(40))
    out,calls = learn.model.out.forward,[]
    def fail(x):
        calls.append(1)
        if len(calls)==3: raise KeyboardInterrupt
        return out(x)
    learn.model.out.forward = fail
    with pytest.raises(KeyboardInterrupt), learn.no_bar(): learn.validate()
    del learn.model.out.forward
    assert not learn.model.b._forward_hooks and learn.model.a.state is None and 'carry_in_evaluation' not in vars(learn.model.a)
    learn.remove_cb(SubWindowEvalCB)
    np.testing.assert_allclose(values(learn)[0], expected, atol=1e-6) # the training loader shuffles: sums are in another order


def test_settings_and_models_that_cannot_be_cut_are_refused(learn):
    with pytest.raises(ValueError, match='sub_seq_len is 0'): SubWindowEvalCB(0)
    class Pair(Mixed):
        def forward(self, x): return (super().forward(x),)*2
    learn.model,learn.loss_func,learn.metrics = Pair(),lambda p,y: (p[0]-y).abs().mean(),[]
    learn.add_cb(SubWindowEvalCB(40))
    with pytest.raises(TypeError, match='Pair gives a tuple'), learn.no_bar(): learn.validate()


def test_a_model_that_carries_by_itself_predicts_the_same(signals):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out,self.h = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1),None
        def forward(self, x):
            h,self.h = self.rnn(x, self.h)
            self.h = self.h.detach()
            return self.out(h)
        def reset(self): self.h = None
    torch.manual_seed(0)
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=130, stp_sz=60, bs=3, valid_pct=.4)
    learn = Learner(dls, Own(), loss_func=nn.functional.l1_loss, cbs=TbpttResetCB(50))
    with learn.no_bar(): expected,_ = learn.get_preds()
    learn.add_cb(SubWindowEvalCB(40))
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0], expected, atol=1e-6, rtol=0)


def test_what_comes_after_sees_the_window_and_the_type_it_would_see(learn):
    "Inputs are whole again, and predictions are cast as an earlier callback (MixedPrecision) had cast them"
    seen = []
    class Half(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, x): return self.m(x).bfloat16()
    class Cast(Callback):
        order = 10
        def after_pred(self): self.learn.pred = self.pred.float()
    class Look(Callback):
        order = 13
        def after_pred(self): seen.append((self.x.shape[1], self.pred.shape[1], self.pred.dtype))
    learn.model = Half(learn.model)
    learn.add_cbs([SubWindowEvalCB(40), Cast(), Look()])
    learn.tbptt_reset_cb.n_skip = 0
    with learn.no_bar(): learn.validate()
    assert set(seen)=={(130,130,torch.float32)}


def test_scores_as_many_as_steps_are_not_taken_for_steps():
    "40 classes for the window, in sub-windows of 40 steps"
    class Classify(Mixed):
        def forward(self, x): return self.out(self.b(self.a(x))[0][:,-1])
    torch.manual_seed(0)
    model = Classify()
    model.out = nn.Linear(6, 40)
    items = [(torch.randn(80, 2), torch.tensor(i)) for i in range(6)]
    dls = DataLoaders(*[TfmdDL(items, bs=3, num_workers=0)]*2)
    learn = Learner(dls, model, loss_func=nn.functional.cross_entropy, cbs=TbpttResetCB(40))
    with learn.no_bar(): expected,_ = learn.get_preds()
    learn.add_cb(SubWindowEvalCB(40))
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0], expected, atol=1e-6, rtol=0)
