"One value that is not finite does no harm to a stream, and none at all to the others"
import copy, io
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.models.memories import CachedAttention, CausalConv
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.state.stateful import InitialState, StatefulRNN, learned_state

NAN,INF = float('nan'),float('inf')
STEPS,ROWS = 40,4


class Plain(nn.Module):
    "Plain layers, one with the batch second"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.LSTM(2, 5, 2, batch_first=True),nn.GRU(5, 3)
    def forward(self, x): return self.b(self.a(x)[0].transpose(0, 1))[0].transpose(0, 1)

class Leaky(nn.Module):
    "A leaky sum from a first value of its own"
    def __init__(self): super().__init__(); self.leak = nn.Parameter(torch.tensor(.9))
    def initial_state(self, bs, device, dtype): return dict(h=torch.full((bs,2), .5, device=device, dtype=dtype))
    def forward(self, x, state):
        h,out = state['h'],[]
        for u in x.unbind(1):
            h = h*self.leak+u
            out.append(h)
        return torch.stack(out, 1),dict(h=h)

class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        gru = nn.GRU(2, 4, batch_first=True)
        self.rnn = StatefulRNN(gru, initial=learned_state(gru))
        nn.init.normal_(self.rnn.initial.tensors[0])
    def forward(self, x): return self.rnn(x)

MODELS = dict(
    sequence=lambda: SequenceRNN(2, 1, 'lstm', 6, num_layers=2),
    plain=Plain,
    mixed=lambda: nn.Sequential(StatefulRNN(nn.GRU(2, 2, batch_first=True)), Plain()),
    memory=lambda: StatefulRNN(Leaky()),
    learned=Learned,
    attention=lambda: StatefulRNN(CachedAttention(2, 3)),
    convolution=lambda: StatefulRNN(CausalConv(2, 3)),
)
CHUNKS = dict(whole=[STEPS], single=[1]*STEPS, some=[9,1,13,17])
BAD = {1:[0,1,7,8,9,22], 3:[39], 2:[]} # row and steps

def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model,x = MODELS[name]().to(dtype).eval(),torch.randn(ROWS, STEPS, 2, dtype=dtype)
    bad = x.clone()
    for i,(row,steps) in enumerate(BAD.items()):
        for k in steps: bad[row,k,k%2] = (NAN,INF,-INF)[k%3]
    return model,x,bad

def alone(model, x):
    "One sequence, from its start"
    if not len(x): return x.new_empty(0)
    with torch.no_grad():
        model = copy.deepcopy(model)
        if hasattr(model, 'reset'): model.reset()
        return model(x[None])[0]

def by_hand(model, x, policy):
    "What one stream gives, if its bad steps are treated so"
    good = torch.isfinite(x).all(1)
    if policy=='hold':
        filled = pd.DataFrame(x.numpy()).replace([INF,-INF], NAN).ffill().to_numpy().copy()
        return alone(model, torch.from_numpy(filled))
    like = alone(model, torch.zeros_like(x))
    out = torch.full_like(like, NAN)
    if policy=='skip': out[good] = alone(model, x[good])
    else:
        start = None
        for k in range(len(x)+1):
            if k<len(x) and good[k]: start = k if start is None else start
            elif start is not None: out[start:k],start = alone(model, x[start:k]),None
    return out

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('sizes', CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize('policy', ['hold','skip','reset'])
@pytest.mark.parametrize('name', MODELS)
def test_a_stream_does_what_was_said_for_chunks_of_any_size(name, policy, sizes, dtype):
    model,x,bad = build(name, dtype)
    if policy=='hold': bad[1,:2] = x[1,:2] # there is nothing to hold yet
    predictor,unharmed = (StreamPredictor(model, on_nan=policy) for _ in range(2))
    y = torch.cat([predictor(o) for o in bad.split(sizes, 1)], 1)
    expected = torch.stack([by_hand(model, o, policy) for o in bad])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 if dtype==torch.float32 else 1e-12, equal_nan=True)
    same = torch.cat([unharmed(o) for o in x.split(sizes, 1)], 1)
    assert torch.equal(y[[0,2]], same[[0,2]]) # bit by bit
    for a,b in zip(*(torch.utils._pytree.tree_leaves(o.state_dict()['states']) for o in (predictor, unharmed))):
        if name in ('memory','attention','convolution'): assert torch.equal(a[[0,2]], b[[0,2]])
        else: assert torch.equal(a[:,[0,2]], b[:,[0,2]])
    then = torch.randn(ROWS, 11, 2, dtype=dtype) # and it goes on
    expected = torch.stack([by_hand(model, torch.cat(o), policy)[STEPS:] for o in zip(bad, then)])
    torch.testing.assert_close(predictor(then), expected, rtol=0, atol=1e-5 if dtype==torch.float32 else 1e-12)


@pytest.mark.parametrize('value', [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_it_is_refused_by_default_with_stream_and_step_and_nothing_changes(name, value):
    model,x,_ = build(name)
    predictor,other = StreamPredictor(model),StreamPredictor(model)
    for o in (predictor, other): o(x[:,:20])
    bad = x[:,20:].clone()
    bad[2,5,1] = value
    for o in (bad, bad.numpy()):
        with pytest.raises(ValueError, match=r"Stream 2 has \[.*(nan|inf)\] at step 5 of the chunk.*on_nan='hold'"): predictor(o)
    with pytest.raises(ValueError, match='Stream 0 has'): StreamPredictor(model)(bad[2])
    assert torch.equal(predictor(x[:,20:]), other(x[:,20:]))


def test_a_model_may_take_them_as_they_are():
    class Fills(Plain):
        def forward(self, x): return super().forward(torch.nan_to_num(x))
    model,x,bad = Fills().eval(),*build('plain')[1:]
    bad = torch.where(torch.isfinite(bad), bad, NAN)
    with torch.no_grad(): expected = model(bad)
    torch.testing.assert_close(StreamPredictor(model, on_nan=None)(bad), expected)
    with pytest.raises(ValueError, match="on_nan is 'drop'; expected one of"): StreamPredictor(model, on_nan='drop')


@pytest.mark.parametrize('policy', ['skip','reset'])
def test_a_stream_without_a_finite_step_waits(policy):
    "... at its beginning, within it, and while it is to begin anew"
    model,x,_ = build('mixed')
    none = x.clone()
    none[1] = NAN
    predictor = StreamPredictor(model, on_nan=policy)
    assert predictor(none[:,:5])[1].isnan().all() # before anything
    torch.testing.assert_close(predictor(x[:,5:15])[1], alone(model, x[1,5:15]), rtol=0, atol=1e-5)
    predictor(none[:,15:20])
    expected = alone(model, torch.cat([x[1,5:15], x[1,20:30]]))[10:] if policy=='skip' else alone(model, x[1,20:30])
    torch.testing.assert_close(predictor(x[:,20:30])[1], expected, rtol=0, atol=1e-5)
    predictor.reset([False,True,True,False])
    y = predictor(none[:,:5])
    torch.testing.assert_close(y[2], alone(model, x[2,:5]), rtol=0, atol=1e-5)
    saved = predictor.state_dict()
    for o in (predictor, StreamPredictor(model, on_nan=policy)):
        o.load_state_dict(saved)
        y = o(x[:,:9])
        torch.testing.assert_close(y[1], alone(model, x[1,:9]), rtol=0, atol=1e-5)
        torch.testing.assert_close(y[2], alone(model, torch.cat([x[2,:5], x[2,:9]]))[5:], rtol=0, atol=1e-5)
    predictor.reset()
    all_nan = torch.full_like(x, NAN)
    assert predictor(all_nan).isnan().all()
    if policy=='reset': torch.testing.assert_close(predictor(x), torch.stack([alone(model, o) for o in x]), rtol=0, atol=1e-5)


@pytest.mark.parametrize('policy', ['skip','reset'])
def test_rows_that_begin_anew_do_not_take_others_with_them(policy):
    model,x,bad = build('sequence')
    predictor = StreamPredictor(model, on_nan=policy)
    predictor(x[:,:10])
    predictor.reset([True,False,False,False])
    part = x[:,10:20].clone()
    part[1,0] = NAN
    part[0,3] = INF
    y,gone_on = predictor(part),predictor(x[:,20:])
    before = x[1,:10]
    if policy=='skip': expected = alone(model, torch.cat([before, x[1,11:]]))[10:]
    else: expected = alone(model, x[1,11:])
    torch.testing.assert_close(torch.cat([y[1,1:], gone_on[1]]), expected, rtol=0, atol=1e-5)
    if policy=='skip': expected = alone(model, torch.cat([x[0,10:13], x[0,14:]]))
    else: expected = torch.cat([alone(model, x[0,10:13]), alone(model, x[0,14:])])
    torch.testing.assert_close(torch.cat([y[0,:3], y[0,4:], gone_on[0]]), expected, rtol=0, atol=1e-5)


def test_a_row_that_waits_keeps_its_state_while_another_begins_anew():
    model,x,_ = build('sequence')
    predictor = StreamPredictor(model, on_nan='skip')
    predictor(x[:,:10])
    predictor.reset([True,False,False,False])
    part = x[:,10:20].clone()
    part[1] = NAN
    predictor(part)
    torch.testing.assert_close(predictor(x[:,20:])[1], alone(model, torch.cat([x[1,:10], x[1,20:]]))[10:], rtol=0, atol=1e-5)


def test_what_is_held_is_of_the_chunk_before_of_one_channel_and_saved():
    model,x,_ = build('plain')
    first = x[:,:10].clone()
    first[0,9,1] = NAN # the one before is held, over two chunks
    gap = torch.full_like(x[:,10:13], NAN)
    gap[:,:,0] = x[:,10:13,0]
    predictor = StreamPredictor(model, on_nan='hold')
    predictor(first)
    file = io.BytesIO()
    torch.save(predictor.state_dict(), file)
    file.seek(0)
    filled = x[:,:13].clone()
    filled[0,9,1] = filled[0,8,1]
    filled[:,10:,1] = filled[:,9:10,1]
    with torch.no_grad(): expected = model(filled)[:,10:]
    other = StreamPredictor(model, on_nan='hold')
    other.load_state_dict(torch.load(file))
    for o in (predictor, other): torch.testing.assert_close(o(gap), expected, rtol=0, atol=1e-6)
    other.reset([True,False,False,False])
    with pytest.raises(ValueError, match='Stream 0 has .* at step 0 of the chunk, and no finite value before'): other(gap)
    with pytest.raises(ValueError, match='no finite value before'): StreamPredictor(model, on_nan='hold')(gap)
    raising = StreamPredictor(model)
    raising(x[:,:10])
    other.load_state_dict(raising.state_dict()) # of a predictor that holds nothing
    raising.load_state_dict(predictor.state_dict())


class Two(nn.Module):
    "A signal, its categories, and constants"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn = nn.Embedding(5, 2),nn.GRU(2+2+3, 4, batch_first=True)
    def forward(self, x, cat, static):
        return self.rnn(torch.cat([x, self.emb(cat), static[:,None].expand(-1, x.shape[1], -1)], -1))[0]

@pytest.mark.parametrize('policy', ['hold','skip','reset'])
def test_inputs_with_a_time_axis_are_treated_and_constants_have_to_be_finite(policy):
    torch.manual_seed(0)
    model,x,cat,static = Two(),torch.randn(3, 12, 2),torch.randint(5, (3, 12)),torch.randn(3, 3)
    bad = x.clone()
    bad[1,4] = NAN
    predictor,timed = StreamPredictor(model, timed=(True,True,False), on_nan=policy),(True,True,False)
    y = predictor(bad, cat, static)
    with torch.no_grad():
        one = lambda rows: model(x[1:2,rows], cat[1:2,rows], static[1:2])[0]
        rest = [k for k in range(12) if k!=4]
        if policy=='hold':
            held = x.clone()
            held[1,4] = x[1,3]
            expected = model(held, cat, static)[1,rest]
        elif policy=='skip': expected = one(rest)
        else: expected = torch.cat([one(range(4)), one(range(5, 12))])
    torch.testing.assert_close(y[1,rest], expected, rtol=0, atol=1e-6)
    static = static.clone()
    static[2,0] = INF
    with pytest.raises(ValueError, match='Stream 2 has .* in an input without a time axis'): predictor(x, cat, static)


class Label(nn.Module):
    def __init__(self, form): super().__init__(); self.rnn,self.form = nn.GRU(2, 3, batch_first=True),form
    def forward(self, x): return self.form(self.rnn(x)[0])

class Counts(nn.Module):
    "A count of steps that all rows share"
    def initial_state(self, bs, device, dtype): return torch.zeros(bs, 2),torch.zeros(())
    def forward(self, x, state): return x+state[0][:,None],(state[0]+x.sum(1),state[1]+x.shape[1])

@pytest.mark.parametrize('policy', ['skip','reset'])
@pytest.mark.parametrize('form', [lambda o: o[:,-1], lambda o: (o,o), lambda o: o.argmax(-1), lambda o: o.mean(1, keepdim=True).expand(-1, 12, -1)[:,:,:1].squeeze(-1)[:,:12]])
def test_what_cannot_be_left_out_is_refused_and_changes_nothing(policy, form):
    model,x = Label(form),torch.randn(3, 12, 2)
    bad = x.clone()
    bad[1,4] = NAN
    predictor,other = StreamPredictor(model, on_nan=policy),StreamPredictor(model)
    for o in (predictor, other): o(x)
    with pytest.raises(TypeError, match="Use on_nan='hold' or 'raise'"): predictor(bad)
    for a,b in zip(*(torch.utils._pytree.tree_leaves(o(x)) for o in (predictor, other))): assert torch.equal(a, b)
    with pytest.raises(TypeError, match='parts that are not of single streams'):
        counting = StreamPredictor(StatefulRNN(Counts()), on_nan=policy)
        counting(x)
        counting(bad)


@pytest.mark.parametrize('policy', ['skip','reset'])
def test_one_stream_as_an_array(policy):
    model,x,bad = build('sequence')
    predictor = StreamPredictor(model, on_nan=policy)
    y = np.concatenate([predictor(o) for o in np.split(bad[1].numpy(), [5, 8, 23])])
    np.testing.assert_allclose(y, by_hand(model, bad[1], policy), atol=1e-5)
