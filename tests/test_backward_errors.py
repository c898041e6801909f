"What a backward pass cannot do is said in words of a training, before the first optimizer step; a search that is broken off leaves nothing behind"
import copy
import numpy as np, pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from torch import nn
from helpers import fit
from tbptt_fastai.deploy.onnx import to_onnx
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.state.unroll import Unroll

rng = np.random.default_rng(0)
U = rng.standard_normal((400,2)).astype('f4')

def loaders(kind='windows'):
    if kind=='windows': return SequenceDataLoaders.from_arrays(U, U[:,:1], win_sz=40, sub_seq_len=10, bs=2)
    return SequenceDataLoaders.from_arrays([U[:150],U[150:]], [U[:150,:1],U[150:,:1]], sub_seq_len=10, bs=2)

def model(): return SequenceRNN(2, 1, hidden_size=4)
def weights(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

class Own(nn.Module):
    "Keeps its state, with its graph"
    def __init__(self):
        super().__init__()
        self.rnn,self.out,self.h = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1),None
    def reset(self): self.h = None
    def forward(self, x):
        out,self.h = self.rnn(x, self.h)
        return self.out(out)

@pytest.mark.parametrize('kind', ['windows', 'stream'])
@pytest.mark.parametrize('loss,said', [
    (nn.MSELoss(reduction='none'), r"The loss has shape \(.*1\), but a training step needs one number"),
    (lambda p,t: ((p-t)**2).mean(-1), 'needs one number. Use a mean'),
    (lambda p,t: nn.functional.mse_loss(p.detach(), t), r'The loss has no gradient: 6 of 6 parameters of SequenceRNN require one.*detaches')], ids=['none', 'no mean', 'detached'])
@pytest.mark.filterwarnings('ignore::UserWarning') # a loss that is no mean, in a stream
def test_a_loss_without_a_backward_pass_says_why(kind, loss, said):
    learn = TbpttLearner(loaders(kind), model(), loss_func=loss)
    before = weights(learn.model)
    with pytest.raises(ValueError, match='(?s)'+said): fit(learn, 1)
    assert same(before, learn.model.state_dict())

def test_a_state_that_is_kept_with_its_graph_is_named():
    with pytest.raises(ValueError, match='Own carries its state by itself, with the graph of the last sub-window. Detach it'): fit(TbpttLearner(loaders(), Own(), loss_func=nn.MSELoss()), 1)

def test_other_errors_of_a_backward_pass_stay_as_they_are():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise RuntimeError('a fault of the backward pass')
    with pytest.raises(RuntimeError, match='^a fault of the backward pass') as e: fit(TbpttLearner(loaders(), model(), loss_func=lambda p,t: Odd.apply((p-t).abs().mean())), 1)
    assert type(e.value) is RuntimeError

@pytest.mark.parametrize('make', [lambda loss: TbpttLearner(loaders(), model(), loss_func=loss), lambda loss: RNNLearner(loaders('stream'), loss_func=loss)])
@pytest.mark.parametrize('loss', [nn.MSELoss, nn.L1Loss, CrossEntropyLossFlat])
def test_the_class_of_a_loss_is_no_loss(make, loss):
    with pytest.raises(TypeError, match=rf'loss_func is the class {loss.__name__}; expected .*: {loss.__name__}\(\)'): make(loss)


class Stop(Callback):
    "Ctrl-C, once the learning rate is large"
    def __init__(self, event, error): setattr(self, event, self._stop); self.error = error
    def _stop(self):
        if self.learn.opt.hypers[-1]['lr']>.1: raise self.error

@pytest.mark.parametrize('kind', ['windows', 'stream'])
@pytest.mark.parametrize('event', ['before_batch', 'after_backward', 'after_batch'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_a_search_that_is_broken_off_leaves_weights_and_optimizer(kind, event, error, tmp_path):
    learn = TbpttLearner(loaders(kind), model(), loss_func=MSELossFlat(), path=tmp_path)
    fit(learn, 1)
    before,moments = weights(learn.model),copy.deepcopy(learn.opt.state_dict())
    learn.add_cb(Stop(event, error))
    with learn.no_bar(), learn.no_logging(), pytest.raises(error): learn.lr_find(show_plot=False)
    assert same(before, learn.model.state_dict())
    for a,b in zip(moments['state'], learn.opt.state_dict()['state']):
        for k,v in a.items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])), k
    assert not learn._grab_cbs(LRFinder) and not [*(tmp_path/'models').iterdir()]
    learn.remove_cb(Stop)
    fit(learn, 1)


@pytest.mark.parametrize('fmt', ['%d.%m.%Y %H:%M', '%Y-%m-%d %H:%M', '%d/%m/%Y %H:%M:%S'])
def test_dates_of_any_order_are_read_without_a_word(fmt, capfd, recwarn):
    "With the day in front, pandas warned where nothing can be raised, and Python printed that as an error"
    t = pd.date_range('2024-03-30', periods=100, freq='h')
    df = pd.DataFrame(dict(t=t.strftime(fmt), v=U[:100,0], w=U[:100,1]))
    dls = SequenceDataLoaders.from_df(df, x='v', y='w', time='t', bs=1)
    assert (dls.train_ds.index==df.index[:len(dls.train_ds.index)]).all()
    said = capfd.readouterr()
    assert 'Traceback' not in said.err and not [o for o in recwarn if 'dates' in str(o.message)]

def test_times_without_a_common_form_are_still_refused():
    df = pd.DataFrame(dict(t=['2024-01-01', 'noon', '3'], v=U[:3,0], w=U[:3,1]))
    with pytest.raises(ValueError, match="Column 't' is text that is no time"): SequenceDataLoaders.from_df(df, x='v', y='w', time='t', bs=1)

@pytest.mark.parametrize('cell', [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_the_export_of_an_unrolled_cell_says_nothing(cell, tmp_path, recwarn):
    pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    net = nn.Sequential(StatefulRNN(Unroll(cell(2, 5))), nn.Linear(5, 1))
    to_onnx(net, tmp_path/'m.onnx', torch.tensor(U[None,:30]), dynamic='streams')
    assert not [o for o in recwarn if issubclass(o.category, torch.jit.TracerWarning)]


@pytest.mark.parametrize('x,y,said', [(np.arange(400), U[:,:1], 'Make the inputs real by .astype.float.'), (U, np.arange(400)%3, 'make the targets real')])
def test_integers_are_named_where_they_are(x, y, said):
    with pytest.raises(ValueError, match=said): RNNLearner(SequenceDataLoaders.from_arrays(x, y, win_sz=40, bs=2))
