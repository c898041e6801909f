"A compiled model trains as it does without: bit by bit, as the backend used here runs what was traced as it is"
import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback # with it comes Learner.no_bar
from fastai.torch_core import set_seed
from torch import nn
from torch._dynamo.testing import CompileCounter # counts graphs, and needs no compiler
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.state.stateful import InitialState, StatefulRNN
from tbptt_fastai.training.parts import on_trial
from tbptt_fastai.truncation.schemes import Exact, Overlap

pytestmark = pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning') # torch's own, while it traces

class Plain(nn.Module):
    "Plain layers"
    def __init__(self):
        super().__init__()
        self.lstm,self.gru,self.head = nn.LSTM(2, 6, batch_first=True),nn.GRU(6, 5, batch_first=True),nn.Linear(5, 1)
    def forward(self, x): return self.head(self.gru(self.lstm(x)[0])[0])

class Steps(nn.Module):
    "A memory step by step, which compiles whole"
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(2+4, 4)
    def initial_state(self, bs, device, dtype): return torch.zeros(bs, 4, device=device, dtype=dtype)
    def forward(self, x, h):
        out = []
        for x_t in x.unbind(1):
            h = torch.tanh(self.w(torch.cat([x_t, h], -1)))
            out.append(h)
        return torch.stack(out, 1),h

def stateful(rnn, n_out, **kwargs): return nn.Sequential(StatefulRNN(rnn, **kwargs), nn.Linear(n_out, 1))

models = {
    'lstm': lambda: stateful(nn.LSTM(2, 6, batch_first=True), 6), 'gru, two layers': lambda: stateful(nn.GRU(2, 6, 2, batch_first=True), 6), 'plain': Plain,
    'steps': lambda: stateful(Steps(), 4), 'learned first state': lambda: stateful(Steps(), 4, initial=InitialState(nn.Parameter(torch.zeros(1, 4)))),
}

def windows(signals): return SequenceDataLoaders.from_arrays(*[o[:800] for o in signals], valid=[o[800:] for o in signals], win_sz=80, bs=5, sub_seq_len=30)

def stream(signals):
    ends = np.cumsum([0, 40, 80, 60, 20, 60, 40])
    return SequenceDataLoaders.from_arrays(*[[o[a:b] for a,b in zip(ends, ends[1:])] for o in signals], bs=3, sub_seq_len=20, valid_pct=.5)

def compiled(model, how, **kwargs):
    torch._dynamo.reset()
    if how=='torch.compile': return torch.compile(model, **kwargs)
    model.compile(**kwargs)
    return model

def trained(signals, make, data, change, n_epoch=1, **kwargs):
    set_seed(0)
    dls = data(signals)
    torch.manual_seed(0)
    learn = TbpttLearner(dls, change(make()), loss_func=nn.MSELoss(), **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, 1e-2)
        return [*learn.model.parameters(), torch.stack(learn.recorder.losses), torch.tensor(learn.recorder.values), learn.get_preds()[0]]

@pytest.mark.parametrize('how', ['torch.compile', 'model.compile'])
@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.parametrize('make', models.values(), ids=models)
def test_parameters_losses_and_predictions_are_those_of_the_eager_model(signals, make, data, how):
    counter = CompileCounter()
    res = trained(signals, make, data, lambda m: compiled(m, how, backend=counter))
    assert counter.frame_count>0 and all(map(torch.equal, res, trained(signals, make, data, lambda m: m)))

@pytest.mark.parametrize('how', ['torch.compile', 'model.compile'])
@pytest.mark.parametrize('scheme', [Overlap(10, 20), Exact(20)], ids=['overlap', 'exact'])
@pytest.mark.parametrize('make', [models['steps'], Plain], ids=['steps', 'plain'])
def test_schemes_that_run_a_sub_window_in_pieces_give_what_the_eager_model_gives(signals, make, scheme, how):
    res = trained(signals, make, windows, lambda m: compiled(m, how, backend='eager'), truncation=scheme)
    assert all(map(torch.equal, res, trained(signals, make, windows, lambda m: m, truncation=scheme)))

@pytest.mark.parametrize('how', ['torch.compile', 'model.compile'])
def test_a_stateful_module_that_compiles_whole_is_one_graph(signals, how):
    "For each mode, length and first state: `fullgraph=True` would raise where the graph breaks"
    counter = CompileCounter()
    trained(signals, models['steps'], windows, lambda m: compiled(m, how, backend=counter, fullgraph=True))
    assert 0<counter.frame_count<=8

@pytest.mark.parametrize('how', ['torch.compile', 'model.compile'])
@pytest.mark.parametrize('make', [models['lstm'], models['steps'], Plain], ids=['lstm', 'steps', 'plain'])
def test_more_epochs_make_no_more_graphs(signals, make, how):
    def graphs(n_epoch):
        counter = CompileCounter()
        trained(signals, make, windows, lambda m: compiled(m, how, backend=counter), n_epoch)
        return counter.frame_count
    assert graphs(2)==graphs(6)

def test_a_layer_in_two_roles_is_refused_in_a_compiled_model(signals):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = StatefulRNN(Steps()),nn.Linear(4, 1)
        def forward(self, x): return self.head(self.rnn(x)+self.rnn(x.flip(1)))
    with pytest.raises(Exception, match='called twice'):
        trained(signals, Twice, windows, lambda m: compiled(m, 'torch.compile', backend='eager'))

def test_a_compiled_model_used_by_itself_carries_until_reset():
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager,x = models['steps'](),torch.randn(3, 20, 2)
    model = torch.compile(eager, backend='eager', fullgraph=True)
    whole = model(x)
    eager[0].reset()
    parts = torch.cat([model(o) for o in x.split(10, 1)], 1)
    torch.testing.assert_close(parts, whole)
    assert not eager[0].state.requires_grad

def test_trials_in_two_threads_leave_the_compiler_as_it_was():
    "The second begins before the first ends"
    torch._dynamo.reset()
    first,second = on_trial(nn.Linear(1, 1)),on_trial(nn.Linear(1, 1))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    counter = CompileCounter()
    torch.compile(lambda x: x+1, backend=counter)(torch.ones(2))
    assert counter.frame_count==1
