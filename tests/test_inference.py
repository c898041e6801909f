"Prediction in chunks, in Python and by onnxruntime, is prediction of the whole"
import copy, dataclasses, io, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.models.memories import LRU, CachedAttention, CausalConv
from tbptt_fastai.deploy.onnx import to_onnx
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
from tbptt_fastai.models.sequence import SequenceRNN, Standardize
from tbptt_fastai.models.text import TextRNN


class Memory(nn.Module):
    "A leaky sum, a count of steps for each stream, and the last two inputs, seen again two steps later"
    def __init__(self):
        super().__init__()
        self.leak,self.first = nn.Parameter(torch.tensor(.9)),nn.Parameter(torch.randn(2))
    def initial_state(self, bs, device, dtype):
        return {'sum': self.first.expand(bs, 2).to(device, dtype), 'late': (torch.zeros(bs, 2, 2, device=device, dtype=dtype), torch.zeros(bs, dtype=torch.int64, device=device))}
    def forward(self, x, state):
        h,(late,n),out = state['sum'],state['late'],[]
        late = torch.cat([late, x], 1)
        for u in x.unbind(1):
            h,n = h*self.leak+u,n+1
            out.append(h/n[:,None])
        return torch.stack(out, 1)+late[:,:-2],{'sum': h, 'late': (late[:,-2:], n)}

class Plain(nn.Module):
    "Three plain layers, one of them with the batch second, dropout and a normalization between them"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.LSTM(2, 5, 2, batch_first=True, dropout=.3),nn.GRU(5, 4),nn.RNN(4, 3, batch_first=True)
        self.norm,self.drop = nn.BatchNorm1d(5),nn.Dropout(.5)
    def forward(self, x):
        out = self.norm(self.drop(self.a(x)[0]).transpose(1, 2)).transpose(1, 2)
        return self.c(self.b(input=out.transpose(0, 1))[0].transpose(0, 1))[0]

scale = dict(scale_x=Standardize(torch.tensor([1., 2.]), torch.tensor([3., 4.])), scale_y=Standardize(torch.tensor(1.), torch.tensor(2.)))
MODELS = dict(
    lstm=lambda: SequenceRNN(2, 3, 'lstm', 6, num_layers=2, dropout=.2),
    gru=lambda: SequenceRNN(2, 1, 'gru', 6),
    rnn=lambda: SequenceRNN(2, 1, 'rnn', 6, **copy.deepcopy(scale)),
    stateful=lambda: StatefulRNN(nn.LSTM(2, 4, batch_first=True)),
    plain=Plain,
    mixed=lambda: nn.Sequential(StatefulRNN(nn.GRU(2, 2, batch_first=True)), Plain()),
    text=lambda: TextRNN(20, 8, hidden_size=7),
    memory=lambda: StatefulRNN(Memory()),
    attention=lambda: StatefulRNN(CachedAttention(2, 3)),
    convolution=lambda: StatefulRNN(CausalConv(2, 3)),
)
CHUNKS = {'1': [1]*220, '7': [7]*31+[3], '100': [100, 100, 20], 'mixed': [1, 50, 2, 1, 99, 67]}

def build(name, dtype=torch.float32, bs=3):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype),torch.randint(20, (bs, 220)) if name=='text' else torch.randn(bs, 220, 2, dtype=dtype)

def whole(model, x):
    with torch.no_grad(): return copy.deepcopy(model).eval()(x)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('sizes', CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize('name', MODELS)
def test_chunks_give_what_the_whole_gives(name, sizes, dtype):
    model,x = build(name, dtype)
    predictor = StreamPredictor(model)
    y = torch.cat([predictor(o) for o in x.split(sizes, 1)], 1)
    torch.testing.assert_close(y, whole(model, x), rtol=0, atol=1e-5 if dtype==torch.float32 else 1e-10)
    assert not y.requires_grad and y.dtype==dtype
    predictor.reset()
    one = torch.cat([predictor(o) for o in x[1].split(sizes)])
    torch.testing.assert_close(one, y[1], rtol=0, atol=1e-5 if dtype==torch.float32 else 1e-10)


def test_arrays_give_arrays_and_the_number_of_streams_stays():
    model,x = build('lstm')
    predictor,arrays = StreamPredictor(model),x.double().numpy()
    y = [predictor(o) for o in np.split(arrays, [5], axis=1)]
    assert isinstance(y[0], np.ndarray) and y[0].dtype==np.float32
    np.testing.assert_allclose(np.concatenate(y, 1), whole(model, x), atol=1e-5)
    with pytest.raises(ValueError, match='has 2 streams; expected 3, as many as before'): predictor(x[:2])
    with pytest.raises(ValueError, match='has 1 streams; expected 3'): predictor(x[0])
    with pytest.raises(ValueError, match='3 dimensions, or 2 for one stream'): predictor(x[0,0])
    with pytest.raises(ValueError, match='none of them empty'): predictor(x[:,:0])
    predictor.reset()
    assert predictor(x[:2]).shape==(2,220,3)
    assert StreamPredictor(nn.Sequential(nn.Flatten(2), StatefulRNN(nn.GRU(6, 2, batch_first=True))), ndim=4)(torch.randn(5, 2, 3)).shape==(5,2)


@pytest.mark.parametrize('name', ['lstm', 'plain', 'mixed', 'text', 'memory'])
def test_some_streams_begin_anew(name):
    model,x = build(name)
    predictor,full = StreamPredictor(model),whole(model, x)
    predictor(x[:,:50])
    predictor.reset([False, True, False])
    predictor.reset(torch.tensor([False, False, True])) # both
    y = predictor(x[:,50:120])
    torch.testing.assert_close(y[0], full[0,50:120], rtol=0, atol=1e-5)
    torch.testing.assert_close(y[1:], whole(model, x[1:,50:120]), rtol=0, atol=1e-5)
    torch.testing.assert_close(predictor(x[:,120:])[1:], whole(model, x[1:,50:])[:,70:], rtol=0, atol=1e-5) # once
    for rows in ([True], [0, 1, 1]):
        with pytest.raises(ValueError, match='expected bool with one value for each of 3 streams'): predictor.reset(rows)
    predictor.reset()
    torch.testing.assert_close(predictor(x), full, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='each of 0 streams'): StreamPredictor(model).reset([True])


@pytest.mark.parametrize('name', ['lstm', 'plain', 'mixed', 'text', 'memory'])
def test_a_saved_state_is_gone_back_to(name):
    model,x = build(name)
    predictor = StreamPredictor(model)
    predictor(x[:,:50])
    predictor.reset([False, True, False])
    saved,file = predictor.state_dict(),io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    y = predictor(x[:,50:])
    for state in (saved, torch.load(file)):
        for other in (predictor, StreamPredictor(copy.deepcopy(model))):
            other.load_state_dict(state)
            assert torch.equal(other(x[:,50:]), y)
    with pytest.raises(ValueError, match="saved state is of"): StreamPredictor(nn.Sequential(nn.Identity(), nn.Identity(), nn.Sequential(nn.GRU(2, 2)))).load_state_dict(saved)
    one,two = nn.Sequential(StatefulRNN(nn.GRU(2, 2))),nn.Sequential(StatefulRNN(nn.GRU(2, 2)), StatefulRNN(nn.GRU(2, 2)))
    for model,other in ((one, two), (two, one)):
        with pytest.raises(ValueError, match='saved state is of the layers'): StreamPredictor(other).load_state_dict(StreamPredictor(model).state_dict())


def saved_of(model, x):
    predictor = StreamPredictor(model)
    predictor(x)
    return predictor.state_dict()

def gru(hidden): return nn.Sequential(StatefulRNN(nn.GRU(2, hidden, batch_first=True)), nn.Linear(hidden, 1))

OTHERS = dict(
    hidden=(lambda x: saved_of(gru(5), x), ValueError, r"state of 0 is \(1, 3, 5\); expected \(1, 3, 4\)"),
    lstm=(lambda x: saved_of(nn.Sequential(nn.LSTM(2, 4, batch_first=True), ), x), ValueError, r"state of 0 is \(\(1, 3, 4\), \(1, 3, 4\)\); expected \(1, 3, 4\)"),
    empty=(lambda x: {}, TypeError, r"The state is a dict of \[\]; expected what `state_dict\(\)` of a StreamPredictor gives"),
    weights=(lambda x: gru(4).state_dict(), TypeError, "dict of .'0.rnn.weight_ih_l0'"),
    no_dict=(lambda x: [1], TypeError, 'The state is a list; expected'),
    no_begins=(lambda x: {k:o for k,o in saved_of(gru(4), x).items() if k!='begins'}, TypeError, r"dict of \['states', 'n_streams', 'groups'\]"),
    no_layer=(lambda x: saved_of(gru(4), x)|{'states':{}}, ValueError, r"is of the layers \[\]; those of this model are \['0'\]"),
    streams=(lambda x: saved_of(gru(4), x)|{'n_streams':2}, ValueError, r"state of 0 is \(1, 3, 4\); expected \(1, 2, 4\)"),
    no_streams=(lambda x: saved_of(gru(4), x)|{'n_streams':None}, ValueError, r"expected \(1, 0, 4\)"),
    begins=(lambda x: saved_of(gru(4), x)|{'begins':torch.tensor([True])}, ValueError, 'expected bool with one value for each of 3 streams'),
    groups=(lambda x: saved_of(gru(4), x)|{'groups':['a']}, ValueError, 'There are 1 groups; expected one for each of 3 streams'),
)

@pytest.mark.parametrize('other,error,match', OTHERS.values(), ids=OTHERS)
def test_another_state_is_refused_and_changes_nothing(other, error, match):
    torch.manual_seed(0)
    x = torch.randn(3, 10, 2)
    predictor = StreamPredictor(gru(4))
    predictor(x)
    predictor.reset([True, False, False])
    before = predictor.state_dict()
    with pytest.raises(error, match=match): predictor.load_state_dict(other(x))
    after = predictor.state_dict()
    assert torch.equal(before['states']['0'], after['states']['0']) and torch.equal(before['begins'], after['begins']) and (after['n_streams'],after['groups'])==(3,None)


def test_a_state_of_a_memory_has_as_many_streams_as_it_says():
    model,x = build('memory')
    with pytest.raises(ValueError, match='state of the model is of 3 streams; expected of 2 streams'): StreamPredictor(model).load_state_dict(saved_of(model, x)|{'n_streams':2})


def test_a_state_may_be_from_before_the_first_chunk_or_have_layers_that_carry_nothing():
    model = nn.ModuleDict(dict(used=nn.GRU(2, 3, batch_first=True), unused=StatefulRNN(nn.GRU(2, 3))))
    model.forward = lambda x: model['used'](x)[0]
    predictor,x = StreamPredictor(model),torch.randn(2, 5, 2)
    first = predictor.state_dict()
    y = [predictor(x)]
    second = predictor.state_dict()
    y.append(predictor(x))
    for state,expected in zip((second, first), reversed(y)):
        predictor.load_state_dict(state)
        assert torch.equal(predictor(x), expected)


class OneHot(nn.Module):
    def __init__(self): super().__init__(); self.rnn = nn.GRU(4, 3, batch_first=True)
    def forward(self, x): return self.rnn(nn.functional.one_hot(x, 4).float())[0]

@pytest.mark.parametrize('shape', [(7,1), (2,7,1)])
def test_integers_are_tokens(shape):
    x = torch.ones(shape, dtype=torch.int16)
    model = SequenceRNN(1, 1, 'gru', 5, scale_x=Standardize(torch.zeros(1), torch.ones(1))) # would take (time, 1) for streams of one step each
    for o in (x, x.numpy()):
        with pytest.raises(TypeError, match='The chunk is torch.int16, SequenceRNN has no nn.Embedding: .* Convert a signal to floats'): StreamPredictor(model)(o)
    tokens = torch.ones(2, 7, dtype=torch.int64)
    assert StreamPredictor(OneHot(), ndim=2)(tokens).shape==(2,7,3) and StreamPredictor(MODELS['text']())(tokens).shape[:2]==(2,7)
    with pytest.raises(ValueError, match='with 2 dimensions'): StreamPredictor(MODELS['text']())(tokens[...,None])


class Last(nn.Module):
    "The input of the step before; its state is a view of what it was given"
    def initial_state(self, bs, device, dtype): return (torch.zeros(bs, 2, device=device, dtype=dtype),)
    def forward(self, x, state): return torch.cat([state[0][:,None], x[:,:-1]], 1),(x[:,-1],)

def test_neither_saved_nor_kept_states_are_views():
    predictor,buffer,x = StreamPredictor(StatefulRNN(Last())),torch.empty(3, 10, 2),torch.randn(3, 60, 2)
    y = []
    for chunk in x.split(10, 1): # a buffer that is filled again and again
        buffer.copy_(chunk)
        y.append(predictor(buffer))
    assert torch.equal(torch.cat(y, 1)[:,1:], x[:,:-1])
    saved = predictor.state_dict()
    saved['states'][''][0].fill_(5)
    assert torch.equal(predictor(x)[:,0], x[:,-1])
    predictor.load_state_dict(saved)
    saved['states'][''][0].fill_(6)
    assert (predictor(x)[:,0]==5).all()


def test_a_failed_call_changes_nothing():
    model,x = build('mixed')
    predictor,full = StreamPredictor(model),whole(model, x)
    model.train()
    model[1].norm.eval()
    predictor(x[:,:50])
    with pytest.raises(RuntimeError): predictor(torch.randn(3, 5, 9))
    hook = model[1].c.register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): predictor(x[:,50:60])
    hook.remove()
    assert model.training and model[1].drop.training and not model[1].norm.training and model[0].state is None
    torch.testing.assert_close(predictor(x[:,50:]), full[:,50:], rtol=0, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Predicting(Callback):
    "Predicts a chunk after each batch, of training and of evaluation"
    order = 20
    def __init__(self): self.seen = []
    def before_fit(self): self.predictor,self.x = StreamPredictor(self.learn),torch.randn(5, 60, 2, generator=torch.Generator().manual_seed(0))
    def after_batch(self):
        modes = [m.training for m in self.model.modules()]
        self.predictor.reset()
        with torch.no_grad(): expected = copy.deepcopy(self.model).eval()(self.x)
        y = torch.cat([self.predictor(o) for o in self.x.split(25, 1)], 1)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        assert modes==[m.training for m in self.model.modules()]
        self.seen.append((self.training, y[0,-1,0].item()))

@pytest.mark.parametrize('name', ['lstm', 'plain', 'mixed'])
@pytest.mark.parametrize('stream', [False, True])
def test_training_goes_on_as_if_nobody_predicted(signals, name, stream):
    def trained(cbs):
        set_seed(0)
        parts = [[o[:700] for o in signals], [o[700:] for o in signals]]
        cut = lambda part: [[o[a:b] for a,b in ((0,130), (130,180), (180,330), (330,500))] for o in part]
        if stream: dls = SequenceDataLoaders.from_arrays(*cut(parts[0]), valid=cut(parts[1]), bs=2, sub_seq_len=50)
        else: dls = SequenceDataLoaders.from_arrays(*signals, win_sz=200, stp_sz=100, bs=2, valid_pct=.4, sub_seq_len=50)
        learn = TbpttLearner(dls, nn.Sequential(MODELS[name](), nn.Linear(3, 1)), cbs=cbs)
        fit(learn, 2)
        return [*learn.model.state_dict().values(), torch.get_rng_state(), torch.tensor(learn.recorder.values), torch.stack(learn.recorder.losses)],learn
    (alone,_),(watched,learn) = trained([]),trained(Predicting())
    for a,b in zip(alone, watched, strict=True): assert torch.equal(a, b)
    seen = learn.predicting.seen
    assert {o for o,_ in seen}=={True,False} and len({y for training,y in seen if training})>len(learn.dls.train) # the weights of the moment


def test_a_predictor_within_a_carried_evaluation_meets_none_of_its_states():
    "Neither context sees the other's states"
    model,x = build('mixed')
    full,predictor = whole(model, x),StreamPredictor(model)
    model.eval()
    with torch.no_grad(), Carry(model, evaluation=True):
        for a,b in ((0,100),(100,220)):
            torch.testing.assert_close(predictor(x.flip(0)[:,a:b]), full.flip(0)[:,a:b], rtol=0, atol=1e-5)
            torch.testing.assert_close(model(x[:,a:b]), full[:,a:b], rtol=0, atol=1e-5)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        gru = nn.GRU(2, 4, 2, batch_first=True)
        self.rnn = StatefulRNN(gru, initial=learned_state(gru, ['a','b']))
        nn.init.normal_(self.rnn.initial.tensors[0])
    def forward(self, x): return self.rnn(x)
    def whole(self, x, groups):
        with torch.no_grad(): return self.rnn.rnn(x, self.rnn.initial.tensors[0][:,[int(o=='b') for o in groups]].contiguous())[0]

def test_first_states_are_those_of_the_groups_that_were_given():
    torch.manual_seed(0)
    model,x = Grouped(),torch.randn(3, 60, 2)
    predictor = StreamPredictor(model)
    with pytest.raises(ValueError, match='no first state for group None'): predictor(x)
    predictor.reset(groups=list('bab'))
    with pytest.raises(ValueError, match='has 2 streams; expected 3, as many as groups'): predictor(x[:2])
    y = torch.cat([predictor(o) for o in x.split(13, 1)], 1)
    torch.testing.assert_close(y, model.whole(x, 'bab'), rtol=0, atol=1e-5)
    predictor.reset([True, True, False], groups=list('aaa'))
    state = predictor.state_dict()
    y = predictor(x)
    torch.testing.assert_close(y[:2], model.whole(x[:2], 'aa'), rtol=0, atol=1e-5)
    predictor.load_state_dict(state)
    assert torch.equal(predictor(x), y)
    predictor.reset([False, False, True]) # of the group it had
    torch.testing.assert_close(predictor(x)[2], model.whole(x[2:], 'b')[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='There are 2 groups'): predictor.reset([True]*3, groups=['a','b'])


@dataclasses.dataclass
class Sum:
    h: torch.Tensor

class NoFirst(nn.Module):
    "Its first state is not known from outside"
    def forward(self, x, state):
        out = x.cumsum(1)+(0 if state is None else state.h)
        return out,Sum(out[:,-1:])

def test_models_whose_state_cannot_be_kept_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(2, 3, batch_first=True)
        def reset(self): self.h = None
    with pytest.raises(TypeError, match='^Own has a reset'): StreamPredictor(Own())
    with pytest.raises(TypeError, match='^1 has a reset'): StreamPredictor(nn.Sequential(nn.LSTM(2, 2), Own()))
    with pytest.raises(ValueError, match='LSTM .0. is bidirectional'): StreamPredictor(nn.Sequential(nn.LSTM(2, 2, bidirectional=True)))
    with pytest.raises(TypeError, match='Linear has no recurrent layer'): StreamPredictor(nn.Linear(2, 2))
    predictor,x = StreamPredictor(StatefulRNN(NoFirst())),torch.randn(2, 9, 2)
    predictor(x)
    with pytest.raises(ValueError, match='first state of a NoFirst is not known'): predictor.reset([True, False])
    torch.testing.assert_close(predictor(x)[:,-1], 2*x.sum(1))


def run_onnx(path, state, x, sizes):
    session,out = pytest.importorskip('onnxruntime').InferenceSession(str(path), providers=['CPUExecutionProvider']),[]
    names = [o.name for o in session.get_inputs()]
    assert [o.name for o in session.get_outputs()]==['y', *(f'{o}.next' for o in state)]
    for chunk in x.split(sizes, 1):
        y,*new = session.run(None, {k:v for k,v in {'x':chunk.numpy(), **state}.items() if k in names})
        state = dict(zip(state, new))
        out.append(torch.from_numpy(y))
    return torch.cat(out, 1)

@pytest.mark.parametrize('sizes', CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize('name', [o for o in MODELS if o!='memory'])
def test_onnx_gives_what_the_whole_gives(name, sizes):
    pytest.importorskip('onnxruntime')
    model,x = build(name, bs=4)
    state = to_onnx(model.train(), 'm.onnx', x[:,:10]) # the other sizes are dynamic
    assert model.training
    y = run_onnx('m.onnx', state, x, sizes)
    torch.testing.assert_close(y, whole(model, x), rtol=0, atol=1e-5)
    one = run_onnx('m.onnx', {k:v.take([0], 0 if name in ('attention','convolution') else 1) for k,v in state.items()}, x[:1], sizes)
    torch.testing.assert_close(one, y[:1], rtol=0, atol=1e-5)


def test_onnx_of_a_memory_gives_the_whole_step_by_step():
    pytest.importorskip('onnxruntime')
    model,x = build('memory')
    state = to_onnx(StreamPredictor(model), 'm.onnx', x[:,:1], dynamic=('streams',))
    assert {k:(v.shape,v.dtype.name) for k,v in state.items()}=={'state0':((3,2),'float32'), 'state1':((3,2,2),'float32'), 'state2':((3,),'int64')}
    torch.testing.assert_close(run_onnx('m.onnx', state, x, [1]*220), whole(model, x), rtol=0, atol=1e-5)
    torch.testing.assert_close(run_onnx('m.onnx', {k:v[1:] for k,v in state.items()}, x[1:], [1]*220), whole(model, x[1:]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="differs by|cannot run the exported"): to_onnx(model, 'no.onnx', x[:,:1])
    assert not Path('no.onnx').exists()


def test_onnx_begins_with_the_first_states_of_groups_and_refuses_what_it_cannot_hold():
    pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model,x = Grouped(),torch.randn(3, 60, 2)
    state = to_onnx(model, 'm.onnx', x, groups=list('bab'))
    assert list(state)==['rnn.state0']
    torch.testing.assert_close(run_onnx('m.onnx', state, x, [20]*3), model.whole(x, 'bab'), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="dynamic has 'time'; expected 'streams', 'steps'"): to_onnx(model, 'm.onnx', x, dynamic=['time'])
    with pytest.raises(TypeError, match='The first state of the model is not known'): to_onnx(StatefulRNN(NoFirst()), 'm.onnx', x)
    with pytest.raises(TypeError, match='GRU gives a tuple'): to_onnx(nn.GRU(2, 2, batch_first=True), 'm.onnx', x)
    with pytest.raises(ValueError, match='The state state0 is torch.complex64; ONNX has no operators'): to_onnx(StatefulRNN(LRU(2, 3)), 'm.onnx', x)
    class Counting(Memory):
        def initial_state(self, *args): return 0
        def forward(self, x, state): return x+state,state+1
    with pytest.raises(ValueError, match='use model.float.*does not support double'): to_onnx(nn.Sequential(StatefulRNN(nn.LSTM(2, 2, batch_first=True))).double(), 'm.onnx', x)
    with pytest.raises(ValueError, match='numbers that do not change'): to_onnx(StatefulRNN(Counting()), 'm.onnx', x)


def test_one_dynamic_size_may_be_given_by_its_name():
    pytest.importorskip('onnxruntime')
    model,x = build('gru')
    state = to_onnx(model, 'm.onnx', x[:,:1], dynamic='streams')
    torch.testing.assert_close(run_onnx('m.onnx', {k:v[:,1:] for k,v in state.items()}, x[1:], [1]*220), whole(model, x[1:]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="dynamic has 'time'"): to_onnx(model, 'm.onnx', x, dynamic='time')


def test_a_trace_that_is_wrong_elsewhere_is_found():
    "A condition on values is fixed by the example, and torch says so"
    pytest.importorskip('onnxruntime')
    class Condition(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = StatefulRNN(nn.GRU(2, 3, batch_first=True))
        def forward(self, x): return self.rnn(x)*(2 if x[0,0,0]>0 else 1)
    with pytest.warns(torch.jit.TracerWarning, match='Python boolean'), pytest.raises(ValueError, match='differs by .* from the model in chunk'): to_onnx(Condition(), 'm.onnx', torch.ones(3, 20, 2)/100)
    class Share(Condition):
        def forward(self, x): return self.rnn(x)/int(x.shape[0])
    with pytest.warns(torch.jit.TracerWarning, match='Python integer'), pytest.raises(ValueError, match='differs by'): to_onnx(Share(), 'm.onnx', torch.ones(3, 20, 2), dynamic=('streams',))
    assert not Path('m.onnx').exists()
    with pytest.warns(torch.jit.TracerWarning, match='Python integer'): to_onnx(Share(), 'm.onnx', torch.ones(3, 20, 2), dynamic=('steps',))


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'pip install tbptt_fastai\[onnx\]'): to_onnx(MODELS['gru'](), 'm.onnx', torch.ones(1, 5, 2))


class OwnFirst(nn.Module):
    "Gives its layer zeros in every call, so that nothing is carried"
    def __init__(self, batch_first=True):
        super().__init__()
        self.rnn,self.head,self.own = nn.GRU(2, 4, batch_first=batch_first),nn.Linear(4, 1),batch_first
    def forward(self, x): return self.head(self.rnn(x, torch.zeros(1, len(x), 4))[0] if self.own else self.rnn(x)[0])

@pytest.mark.parametrize('batch_first,match', [(True, 'a state of its own in every call'), (False, 'took the 10 steps for a batch')])
def test_a_model_that_carries_nothing_is_refused(batch_first, match):
    with pytest.raises(ValueError, match=match): StreamPredictor(OwnFirst(batch_first))(torch.randn(3, 10, 2))


def test_layers_of_a_state_that_is_returned_are_kept():
    "For one stream only what has one row loses its batch dimension"
    out = StreamPredictor(nn.GRU(1, 4, 2, batch_first=True))(torch.randn(5, 1))
    assert out[0].shape==(5,4) and out[1].shape[0]==2
