"Results have a shape that the loader alone decides, belong to their sequences, and are never NaN in silence"
import copy
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.interpret import Interpretation
from fastai.learner import Learner, load_learner
from torch import nn
from helpers import adam
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
import tbptt_fastai.instruments.diagnose # noqa: it adds methods to Learner

LENGTHS = [60,40,80]

def machines(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    xs = [rng.standard_normal((n,2)).astype(np.float32) for n in lengths]
    return xs,[np.cumsum(x[:,:1]*.3, 0).astype(np.float32) for x in xs]

def stream_loaders(**kwargs):
    xs,ys = machines()
    return SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), bs=2, sub_seq_len=10, **kwargs)

def window_loaders(): return SequenceDataLoaders.from_arrays(*machines([400]), win_sz=40, bs=4)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.head = StatefulRNN(nn.GRU(2, 5, batch_first=True)),nn.Linear(5, 1)
    def forward(self, x): return self.head(self.rnn(x))

def plain(dls, n_skip=0): return Learner(dls, Net(), nn.L1Loss(), opt_func=adam, cbs=TbpttResetCB(10, n_skip))
def own(dls, n_skip=0): return TbpttLearner(dls, Net(), 10, n_skip=n_skip, opt_func=adam)

def alone(learn, x):
    with torch.no_grad(): return learn.model.head(learn.model.rnn.rnn(torch.tensor(x)[None])[0])[0]

@pytest.fixture(params=[plain, own], ids=['plain','own'])
def make(request): return request.param


@pytest.mark.parametrize('lengths', [[30,30], [30], [30,50], [30,30,20], [10]*4], ids=str)
@pytest.mark.parametrize('loaded', [False, True])
def test_new_data_of_a_stream_has_one_shape_whatever_its_lengths(make, lengths, loaded):
    learn = make(stream_loaders())
    if loaded:
        learn.export('e.pkl')
        learn = load_learner('e.pkl')
    xs,ys = machines(lengths, seed=1)
    with learn.no_bar():
        for items,kwargs in ((xs, {}), (tuple(xs), {}), (list(zip(xs, ys)), dict(with_labels=True)), (Sequences(xs, ys), {}), ([pd.DataFrame(o) for o in xs], {})):
            dl = learn.dls.test_dl(items, **kwargs)
            assert isinstance(dl, StreamDL)
            preds,targs = learn.get_preds(dl=dl)
            assert preds.shape==(sum(lengths),1)
            for p,x in zip(dl.by_sequence(preds), xs, strict=True): torch.testing.assert_close(p, alone(learn, x), rtol=0, atol=1e-6)
            if kwargs:
                for t,y in zip(dl.by_sequence(targs), ys, strict=True): assert torch.equal(t, torch.tensor(y))
        for x in xs: # one alone is whole
            torch.testing.assert_close(learn.predict(x)[0], alone(learn, x), rtol=0, atol=1e-6)
            assert learn.get_preds(dl=learn.dls.test_dl(x))[0].shape==(1,len(x),1)
        if len(set(lengths))==1:
            windows = learn.get_preds(dl=learn.dls.test_dl(xs, as_stream=False))[0]
            assert windows.shape==(len(xs),lengths[0],1)
            torch.testing.assert_close(windows, torch.stack([alone(learn, x) for x in xs]), rtol=0, atol=1e-6)


@pytest.mark.parametrize('lengths', [[30,30], [30], [30,50]], ids=str)
def test_new_data_of_windows_has_one_shape_or_is_a_stream_because_it_was_said(make, lengths):
    learn = make(window_loaders())
    xs,_ = machines(lengths, seed=1)
    with learn.no_bar():
        stream = learn.dls.test_dl(xs, as_stream=True)
        preds = learn.get_preds(dl=stream)[0]
        assert preds.shape==(sum(lengths),1)
        for p,x in zip(stream.by_sequence(preds), xs, strict=True): torch.testing.assert_close(p, alone(learn, x), rtol=0, atol=1e-6)
        if len(set(lengths))>1:
            for items in (xs, Sequences(xs)):
                with pytest.raises(ValueError, match='have 30 to 50 steps, .* as_stream=True'): learn.dls.test_dl(items)
        else:
            dl = learn.dls.test_dl(xs)
            assert type(dl) is TbpttDL and learn.get_preds(dl=dl)[0].shape==(len(xs),30,1)
        assert learn.predict(xs[0])[0].shape==(30,1)


def test_values_that_are_not_those_of_all_steps_are_not_cut():
    dl = stream_loaders().valid
    assert [len(o) for o in dl.by_sequence(torch.zeros(sum(LENGTHS), 3))]==LENGTHS
    for wrong in (torch.zeros(3, 60), torch.zeros(sum(LENGTHS)-1)):
        with pytest.raises(ValueError, match='the sequences of this loader have 180 steps'): dl.by_sequence(wrong)


def test_interpretation_of_a_stream_ranks_steps_and_takes_none_for_an_item(make):
    learn = make(stream_loaders())
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        losses,idxs = interp.top_losses(5)
        preds,targs = learn.get_preds()
        expected = (preds-targs).abs()[:,0]
        torch.testing.assert_close(losses, expected.topk(5)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(expected[idxs], losses, rtol=0, atol=1e-6)
        for use in (lambda: interp[0], lambda: interp.top_losses(2, items=True), lambda: interp.show_results([0]), lambda: interp.plot_top_losses(2)):
            with pytest.raises(ValueError, match='one for each step.*by_sequence'): use()


@pytest.mark.parametrize('ds_idx', [0, 1])
def test_interpretation_of_a_stream_with_washout_is_refused_and_its_losses_are_found_as_it_says(make, ds_idx):
    learn = make(stream_loaders(), n_skip=5)
    with learn.no_bar():
        with pytest.raises(ValueError, match='first 5 steps of each sequence are washout'): Interpretation.from_learner(learn, ds_idx=ds_idx)
        preds,targs,losses = learn.get_preds(with_loss=True)
        expected = [(p-t).abs()[:,0] for p,t in zip(*map(learn.dls.valid.by_sequence, (preds, targs)))]
        counted = torch.cat([torch.cat([torch.full((5,), -1.), o[5:]]) for o in expected])
        torch.testing.assert_close(losses.nan_to_num(-float('inf')).topk(4)[0], counted.topk(4)[0], rtol=0, atol=1e-6)
        for o,e in zip(learn.dls.valid.by_sequence(losses), expected): assert o.nanmean().item()==pytest.approx(e[5:].mean().item(), abs=1e-6)


def test_interpretation_of_windows_with_washout_counts_the_other_steps(make):
    learn = make(window_loaders(), n_skip=5)
    with learn.no_bar():
        preds,targs = learn.get_preds()
        expected = (preds-targs).abs()[:,5:].mean((1,2))
        interp = Interpretation.from_learner(learn)
        losses,idxs = interp.top_losses()
        torch.testing.assert_close(losses, expected.sort(descending=True)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(interp[idxs[0]][1][0], preds[idxs[0]], rtol=0, atol=1e-6)


class OneValue(nn.Module):
    "One number for each window"
    def __init__(self, form): super().__init__(); self.rnn,self.head,self.form = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1),form
    def forward(self, x): return self.form(self.head(self.rnn(x)[0]))

@pytest.mark.parametrize('form,error', [
    (lambda o: o[:,-1,0], r'predictions of shape \(\d+,\) for \d+ steps, none step by step'),
    (lambda o: o[:,-1], r'predictions of shape \(\d+, 1\) for \d+ steps, none step by step'),
    (lambda o: o.mean(), r'predictions of shape \(\) for \d+ steps'),
    (lambda o: dict(out=o), 'gives a dict')], ids=['bs','bs,1','none','dict'])
def test_a_memory_is_followed_through_predictions_of_each_step_alone(form, error):
    items = [(torch.randn(40, 2), torch.randn(())) for _ in range(12)]
    dls = DataLoaders(TbpttDL(items, bs=4, sub_seq_len=10), TbpttDL(items, bs=4, sub_seq_len=10))
    def loss(pred, targ): return ((pred['out'][:,-1,0] if isinstance(pred, dict) else pred).squeeze()-targ).abs().mean()
    learn = TbpttLearner(dls, OneValue(form), 10, loss_func=loss)
    with pytest.raises(TypeError, match=error): learn.check_memory_grads()


@pytest.mark.parametrize('width', [20, 80])
def test_all_columns_are_shown_in_a_narrow_terminal(monkeypatch, width):
    monkeypatch.setenv('COLUMNS', str(width))
    table = own(stream_loaders()).check_memory_grads()
    with pd.option_context('display.max_columns', 2, 'display.width', width):
        verdict,_,head,*rows = repr(table).split('\n')
        before = pd.get_option('display.max_columns')
    assert head.split()==['norm','through','memory','share','verdict'] and len(rows)==len(table) and '...' not in head
    assert before==2 and all('through the memory' in o or 'directly only' in o for o in rows)
