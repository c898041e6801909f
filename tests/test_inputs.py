"What a model is given at run time: its channels, several inputs, and values that are not finite"
import copy, io
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from torch import nn
from helpers import adam, fit
from tbptt_fastai.deploy.onnx import to_onnx
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.models.memories import CachedAttention, CausalConv
from tbptt_fastai.models.sequence import SequenceRNN, Standardize
from tbptt_fastai.sequences.windows import Sequences, SequenceWindows
from tbptt_fastai.state.stateful import InitialState, StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB

NAN,INF = float('nan'),float('inf')


def three_channels(n=400, seed=0):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n,3)).astype(np.float32)
    return u,np.cumsum(u.sum(1, keepdims=True)*.1, 0).astype(np.float32)

def window_learner(): return RNNLearner(SequenceDataLoaders.from_arrays(*three_channels(), win_sz=40, bs=4), hidden_size=4)

def stream_learner():
    u,y = three_channels()
    return RNNLearner(SequenceDataLoaders.from_arrays([u[:150], u[150:]], [y[:150], y[150:]], bs=2, sub_seq_len=10), hidden_size=4)

@pytest.fixture(params=[window_learner, stream_learner], ids=['windows','stream'])
def learn(request): return request.param()

OTHER = [1, 2, 4]
def of(n, *shape): return torch.randn(*shape, n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('n', OTHER)
def test_a_model_that_scales_refuses_other_channels(n):
    scale = Standardize(torch.zeros(3), torch.ones(3))
    for f in (scale, scale.inverse):
        with pytest.raises(ValueError, match=rf'has shape \(2, 5, {n}\), the statistics have shape \(3,\): expected the 3 channels'): f(of(n, 2, 5))
        assert f(of(3, 2, 5)).shape==(2,5,3) and f(of(3, 5)).shape==(5,3)
    for model in (SequenceRNN(3, 1), SequenceRNN(3, 1, scale_x=Standardize(.5, 2.)), SequenceRNN(3, 1, scale_x=scale)):
        with pytest.raises(ValueError, match='made for 3'): model(of(n, 2, 5))


def test_one_value_for_all_fits_any_channels_and_other_layouts_are_not_made_larger():
    for n in (1, 3): assert torch.equal(Standardize(1., 2.)(of(n, 2, 5)), (of(n, 2, 5)-1)/2)
    first = Standardize(torch.zeros(3, 1), torch.ones(3, 1)) # channels before time
    assert first(torch.ones(2, 3, 5)).shape==(2,3,5)
    for shape in ((2,1,5), (2,2,5), (5,)):
        with pytest.raises(ValueError, match=r'the statistics have shape \(3, 1\)'): first(torch.ones(shape))
    with pytest.raises(ValueError, match=r'the statistics have shape \(1,\)'): Standardize(torch.zeros(1), torch.ones(1))(of(3, 2, 5))
    with pytest.raises(ValueError, match=r'the statistics have shape \(3,\)'): Standardize(0., torch.ones(3))(of(1, 2, 5))


@pytest.mark.parametrize('name,n', [('scale_x', 3), ('scale_y', 2)])
def test_scalings_of_other_channels_are_refused_when_the_model_is_made(name, n):
    for wrong in {1, 2, 3}-{n}:
        with pytest.raises(ValueError, match=rf'{name} has statistics of shape \({wrong},\), the model has {n} channels'):
            SequenceRNN(3, 2, **{name: Standardize(torch.zeros(wrong), torch.ones(wrong))})


@pytest.mark.parametrize('n', OTHER)
def test_new_data_of_other_channels_is_refused(learn, n):
    for given in (learn, exported(learn)):
        with given.no_bar():
            with pytest.raises(ValueError, match=rf'x has channels \({n},\), in training it had \(3,\)'): given.predict(of(n, 40))
            with pytest.raises(ValueError, match='x has channels'): given.dls.test_dl([of(n, 40), of(n, 30)])
            with pytest.raises(ValueError, match='x has channels'): given.dls.test_dl(Sequences(of(n, 40)))
            with pytest.raises(ValueError, match='y has channels'): given.dls.test_dl([(of(3, 40), of(n+1, 40))], with_labels=True)
        predictor = StreamPredictor(given)
        with pytest.raises(ValueError, match=rf'The chunk has channels \({n},\), the model was trained with \(3,\)'): predictor(of(n, 2, 7))
        with pytest.raises(ValueError, match='The chunk has channels'): predictor(of(n, 7))
        assert predictor(of(3, 2, 7)).shape==(2,7,1)

def exported(learn):
    learn.export('e.pkl')
    return load_learner('e.pkl')


class Broadcasts(nn.Module):
    "Scales by hand, so that any number of channels fits that broadcasting makes fit"
    def __init__(self):
        super().__init__()
        self.rnn,self.head = nn.GRU(3, 4, batch_first=True),nn.Linear(4, 1)
        self.register_buffer('mean', torch.arange(3.))
    def forward(self, x): return self.head(self.rnn(x-self.mean)[0])

@pytest.mark.parametrize('loader', [lambda x, y: StreamDL(Sequences(x, y), bs=2, sub_seq_len=10), lambda x, y: TbpttDL(SequenceWindows(x, y, 40), bs=2, sub_seq_len=10)])
@pytest.mark.parametrize('plain', [False, True])
def test_other_loaders_of_other_channels_are_refused_for_any_model(loader, plain):
    u,y = three_channels()
    good,bad,bad_y = loader(u, y),loader(u[:,:1], y),loader(u, np.repeat(y, 3, 1))
    def make(train, valid):
        dls = DataLoaders(train, valid)
        return Learner(dls, Broadcasts(), nn.L1Loss(), opt_func=adam, cbs=TbpttResetCB(10)) if plain else TbpttLearner(dls, Broadcasts(), 10)
    learn = make(good, loader(u, y))
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging():
        for dl,match in ((bad, 'x has channels'), (bad_y, 'y has channels')):
            with pytest.raises(ValueError, match=match): learn.validate(dl=dl)
            with pytest.raises(ValueError, match=match): learn.get_preds(dl=dl)
            with pytest.raises(ValueError, match=match): make(good, dl)
        learn.validate()
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    with pytest.raises(ValueError, match='x has channels|The chunk has channels'): StreamPredictor(learn)(of(1, 2, 5))
    predictor = StreamPredictor(learn.model) # which does not know the data: the first chunk says
    predictor(of(3, 2, 5))
    with pytest.raises(ValueError, match='the one before had'): predictor(of(1, 2, 5))
    predictor.reset()
    assert predictor(of(1, 2, 5)).shape==(2,5,1)


def frame(columns='abc', n=400): return pd.DataFrame(three_channels(n)[0], columns=list(columns))

def test_names_of_channels_are_compared_where_both_are_known():
    y = pd.DataFrame(three_channels()[1], columns=['out'])
    for kwargs in (dict(win_sz=40), dict(groups=['m'])):
        dls = SequenceDataLoaders.from_arrays(frame(), y, bs=4, **kwargs)
        assert dls.train_ds.x_names==dls.valid_ds.x_names==list('abc') and dls.train_ds.y_names==['out']
        for wrong in ('bac', 'abd'):
            with pytest.raises(ValueError, match=rf"channels \['{wrong[0]}', .* in training it had \['a', 'b', 'c'\]"): dls.test_dl(frame(wrong))
            with pytest.raises(ValueError, match='x has the channels'): SequenceDataLoaders.from_arrays(frame(), y, valid=(frame(wrong), y), **kwargs)
        with pytest.raises(ValueError, match='y has the channels'): dls.test_dl([(frame(), y.rename(columns=dict(out='other')))], with_labels=True)
        for same in (frame(), frame('bac').to_numpy(), frame('bac')[list('abc')].to_numpy()): dls.test_dl(same)
    with pytest.raises(ValueError, match='The sequences of x have columns'): Sequences([frame(), frame('cab')])
    assert Sequences(pd.DataFrame(three_channels()[0])).x_names is None # columns that are numbers
    df = frame().assign(y=y.out, m=0)
    dls = SequenceDataLoaders.from_df(df, x=list('abc'), y='y', group='m', bs=1, sub_seq_len=10)
    with pytest.raises(ValueError, match='x has the channels'): dls.test_dl(df[['b','a','c']])
    dls.test_dl(df[list('abc')])


# several inputs

class Machine(nn.Module):
    "Categories and signals of every step, and constants of each machine"
    def __init__(self):
        super().__init__()
        self.emb = nn.ModuleList([nn.Embedding(7, 2), nn.Embedding(3, 1)])
        self.first,self.rnn,self.head = nn.Linear(4, 5),StatefulRNN(nn.LSTM(2+3+5, 6, batch_first=True)),nn.Linear(6+4, 2)
        self.own = nn.GRU(2+3+5, 3, batch_first=True)
        self.last = nn.Linear(3, 2)
    def forward(self, x, cat, static):
        n = x.shape[1]
        cats = [emb(cat[...,i]) for i,emb in enumerate(self.emb)]
        both = torch.cat([x, *cats, self.first(static)[:,None].expand(-1, n, -1)], -1)
        return self.head(torch.cat([self.rnn(both), static[:,None].expand(-1, n, -1)], -1))+self.last(self.own(both)[0])

def machine(bs=3, steps=60, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x,cat,static = torch.randn(bs, steps, 2, dtype=dtype),torch.stack([torch.randint(n, (bs, steps)) for n in (7, 3)], -1),torch.randn(bs, 4, dtype=dtype)
    return Machine().to(dtype).eval(),(x, cat, static)

TIMED = True,True,False

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize('sizes', [[1]*60, [7]*8+[4], [4]*15, [2,58], [60]], ids=str)
def test_several_inputs_in_chunks_give_what_the_whole_gives(sizes, dtype, tol):
    "... also in chunks of as many steps as there are constants"
    model,(x,cat,static) = machine(dtype=dtype)
    with torch.no_grad(): whole = model(x, cat, static)
    predictor = StreamPredictor(model, timed=TIMED)
    y = torch.cat([predictor(*o, static) for o in zip(x.split(sizes, 1), cat.split(sizes, 1))], 1)
    torch.testing.assert_close(y, whole, rtol=0, atol=tol)
    predictor = StreamPredictor(model, ndim=(3,3,2), timed=TIMED) # one stream alone
    one = [predictor(a.numpy(), b.numpy(), static[1].numpy()) for a,b in zip(x[1].split(sizes), cat[1].split(sizes))]
    np.testing.assert_allclose(np.concatenate(one), whole[1], atol=tol, rtol=0)


def test_which_inputs_have_a_time_axis_is_said_or_known_by_the_learner():
    model,xs = machine()
    with pytest.raises(ValueError, match='given 3 inputs. Say which have a time axis'): StreamPredictor(model)(*xs)
    with pytest.raises(ValueError, match='there are 3 inputs; expected a bool for each'): StreamPredictor(model, timed=(True,False))(*xs)
    with pytest.raises(ValueError, match='there are 3 inputs; expected a bool for each, and one that is True'): StreamPredictor(model, timed=(False,)*3)(*xs)
    dls = DataLoaders([(*xs, torch.zeros(3, 60, 2))], [(*xs, torch.zeros(3, 60, 2))])
    dls.n_inp = 3
    learn = Learner(dls, model, nn.L1Loss(), cbs=TbpttResetCB(10, timed=(*TIMED, True)))
    assert torch.equal(StreamPredictor(learn)(*xs), StreamPredictor(model, timed=TIMED)(*xs))


REFUSED = dict(
    streams=(lambda x, c, s: (x, c, s[:2]), 'as many streams in all of them'),
    steps=(lambda x, c, s: (x, c[:,:9], s), 'as many steps in those with a time axis'),
    one=(lambda x, c, s: (x[0], c[0], s[0]), r'expected \(streams, time, channels\)'),
    two=(lambda x, c, s: (x[:,:,0], c, s), r'expected \(streams, time, channels\)'),
    empty=(lambda x, c, s: (x[:,:0], c[:,:0], s), 'none of them empty'),
)
@pytest.mark.parametrize('change,match', REFUSED.values(), ids=REFUSED)
def test_inputs_that_do_not_belong_together_are_refused_and_change_nothing(change, match):
    model,(x,cat,static) = machine()
    predictor,other = (StreamPredictor(model, timed=TIMED) for _ in range(2))
    for o in (predictor, other): o(x[:,:20], cat[:,:20], static)
    with pytest.raises(ValueError, match=match): predictor(*change(x[:,20:], cat[:,20:], static))
    assert torch.equal(predictor(x[:,20:], cat[:,20:], static), other(x[:,20:], cat[:,20:], static))
    for ndim in (3, (3,3)):
        with pytest.raises(ValueError, match='expected a tuple, with the dimensions of each of 3 inputs'): StreamPredictor(model, ndim, timed=TIMED)(x, cat, static)
    with pytest.raises(ValueError, match=r'have \(3, 3, 2\) dimensions; expected \(3, 3, 3\)'): StreamPredictor(model, (3,3,3), timed=TIMED)(x, cat, static)
    with pytest.raises(TypeError, match='The chunk is a dict'): predictor(dict(x=x))


@pytest.mark.parametrize('sizes', [[1]*60, [7]*8+[4], [4]*15])
def test_a_file_of_several_inputs_gives_what_the_whole_gives(sizes):
    ort = pytest.importorskip('onnxruntime')
    model,(x,cat,static) = machine()
    given = (model, dict(timed=TIMED)) if len(sizes)%2 else (StreamPredictor(model, timed=TIMED), {})
    state = to_onnx(given[0], 'm.onnx', (x[:,:10], cat[:,:10], static), **given[1])
    session = ort.InferenceSession('m.onnx', providers=['CPUExecutionProvider'])
    assert [o.name for o in session.get_inputs()]==['x0','x1','x2',*state]
    assert [o.shape for o in session.get_inputs()][:3]==[['streams','steps',2], ['streams','steps',2], ['streams',4]]
    with torch.no_grad(): whole = model(x, cat, static)
    for rows in (slice(None), slice(1, 2)): # as many streams as the example, and another number
        now,out = {k:v[:,rows] for k,v in state.items()},[]
        for a,b in zip(x[rows].split(sizes, 1), cat[rows].split(sizes, 1)):
            y,*new = session.run(None, dict(x0=a.numpy(), x1=b.numpy(), x2=static[rows].numpy(), **now))
            now = dict(zip(state, new))
            out.append(y)
        np.testing.assert_allclose(np.concatenate(out, 1), whole[rows], atol=1e-5)
    with pytest.raises(ValueError, match='Say which have a time axis'): to_onnx(model, 'n.onnx', (x, cat, static))


def test_an_input_that_a_model_does_not_use_is_none_of_the_file():
    pytest.importorskip('onnxruntime')
    class Half(nn.Module):
        def __init__(self): super().__init__(); self.rnn = nn.GRU(2, 3, batch_first=True)
        def forward(self, x, static): return self.rnn(x)[0]
    to_onnx(Half(), 'm.onnx', (torch.randn(2, 5, 2), torch.randn(2, 4)), timed=(True,False))


def test_a_chunk_that_is_a_frame_has_the_columns_of_the_training_in_their_order():
    y = three_channels()[1]
    for loaders in (lambda x: SequenceDataLoaders.from_arrays(x, y, win_sz=40, bs=4), lambda x: SequenceDataLoaders.from_arrays(x, y, groups=['m'], bs=1, sub_seq_len=10)):
        learn = RNNLearner(loaders(frame()), hidden_size=4)
        predictor = StreamPredictor(learn)
        expected = predictor(frame().to_numpy()[:50])
        predictor.reset()
        assert np.array_equal(predictor(frame()[:50]), expected)
        for wrong in ('bac', 'abd'):
            with pytest.raises(ValueError, match=rf"The chunk has the channels \['{wrong[0]}'.* trained with \['a', 'b', 'c'\]"): predictor(frame(wrong)[50:])
        unnamed = StreamPredictor(RNNLearner(loaders(frame().to_numpy()), hidden_size=4))
        assert unnamed(frame('bac')[:50]).shape==(50,1)


# channels, of any loader and any layer

def batches_of(n, k=2): return [(of(n, 4, 20), torch.zeros(4, 20, 1)) for _ in range(k)]
KINDS = dict(list=batches_of, torch=lambda n: torch.utils.data.DataLoader([(x[i], y[i]) for x,y in batches_of(n) for i in range(4)], 4),
             fastai=lambda n: TfmdDL([(x[i], y[i]) for x,y in batches_of(n) for i in range(4)], bs=4, num_workers=0))

class Bare(nn.Module):
    "A recurrent layer, plain or in a StatefulRNN, that is given the data as it is"
    def __init__(self, cls, stateful):
        super().__init__()
        rnn = cls(3, 4, batch_first=True)
        self.rnn,self.head = StatefulRNN(rnn) if stateful else rnn,nn.Linear(4, 1)
    def forward(self, x):
        o = self.rnn(x)
        return self.head(o[0] if isinstance(o, tuple) else o)

@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('sub', [10, None])
@pytest.mark.parametrize('n', OTHER)
@pytest.mark.parametrize('make', [Broadcasts, lambda: Bare(nn.GRU, False), lambda: Bare(nn.LSTM, True)], ids=['broadcasts','plain','stateful'])
def test_batches_of_other_channels_than_in_training_are_refused(make, n, sub, name):
    "... whose loader is not ours, after a training, and by a learner that was exported"
    loader = KINDS[name]
    learn = fit(Learner(DataLoaders(loader(3), loader(3)), make(), nn.L1Loss(), cbs=TbpttResetCB(sub)))
    torch.save(learn, 'l.pkl')
    for given in (learn, torch.load('l.pkl', weights_only=False)):
        with given.no_bar(), given.no_logging():
            given.validate(dl=loader(3))
            for f in (given.validate, given.get_preds):
                with pytest.raises(ValueError, match=rf'channels \[\({n},\)\], in training they had channels \[\(3,\)\]'): f(dl=loader(n))
            given.dls = DataLoaders(loader(3), loader(n))
            with pytest.raises(ValueError, match='in training they had'): fit(given)

@pytest.mark.parametrize('sub', [10, None])
@pytest.mark.parametrize('n', OTHER)
@pytest.mark.parametrize('cls', [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize('stateful', [False, True])
def test_a_layer_that_is_given_other_channels_is_named(stateful, cls, n, sub):
    match = rf'{cls.__name__} \(rnn(.rnn)?\) is made for 3 channels, and was given {n}'
    learn = Learner(DataLoaders(batches_of(n), batches_of(n)), Bare(cls, stateful), nn.L1Loss(), cbs=TbpttResetCB(sub))
    with pytest.raises(ValueError, match=match): fit(learn)
    with learn.no_bar():
        for f in (learn.validate, learn.get_preds):
            with pytest.raises(ValueError, match=match): f(dl=batches_of(n))
    with pytest.raises(ValueError, match=match): StreamPredictor(learn.model)(of(n, 2, 5))
    predictor = StreamPredictor(learn.model)
    expected = predictor(of(3, 2, 5))
    with pytest.raises(ValueError, match=match): predictor(of(n, 2, 5)) # and the stream goes on from where it was
    other = StreamPredictor(learn.model)
    assert torch.equal(other(of(3, 2, 5)), expected) and torch.equal(other(of(3, 2, 5)), predictor(of(3, 2, 5)))

def test_another_error_of_a_model_is_its_own():
    class Fails(Bare):
        def forward(self, x): raise RuntimeError('mine')
    learn = Learner(DataLoaders(batches_of(3), batches_of(3)), Fails(nn.GRU, False), nn.L1Loss(), cbs=TbpttResetCB(None))
    with learn.no_bar(), pytest.raises(RuntimeError, match='mine'): learn.validate()

def test_constants_of_another_size_are_refused():
    class Adds(Bare):
        def forward(self, x, s): return super().forward(x)+s.mean(-1)[:,None,None]
    def loader(n): return [(x, torch.ones(4, n), y) for x,y in batches_of(3)]
    dls = DataLoaders(loader(2), loader(2))
    dls.n_inp = 2
    learn = fit(Learner(dls, Adds(nn.GRU, True), nn.L1Loss(), cbs=TbpttResetCB(10, timed=(True,False,True))))
    with learn.no_bar(), pytest.raises(ValueError, match=r'channels \[\(3,\), \(1,\)\], in training'): learn.validate(dl=loader(1))

def test_a_training_goes_by_its_own_data():
    class Any(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.head = nn.GRU(1, 4, batch_first=True),nn.Linear(4, 1)
        def forward(self, x): return self.head(self.rnn(x.mean(-1, keepdim=True))[0])
    learn = fit(Learner(DataLoaders(batches_of(3), batches_of(3)), Any(), nn.L1Loss(), cbs=TbpttResetCB(10)))
    learn.dls = DataLoaders(batches_of(2), batches_of(2))
    fit(learn)
    learn.tbptt_reset_cb.check = False
    with learn.no_bar(): learn.validate(dl=batches_of(4))

def test_pictures_may_have_another_size_in_an_evaluation_but_no_other_channels():
    class Video(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.head = nn.GRU(1, 4, batch_first=True),nn.Linear(4, 1)
        def forward(self, x): return self.head(self.rnn(x.flatten(2).mean(-1, keepdim=True))[0])
    for channels,other in (((), None), ((3,), (1,))):
        def loader(size, channels=channels): return [(torch.randn(4, 20, *channels, size, size), torch.zeros(4, 20, 1)) for _ in range(2)]
        learn = fit(Learner(DataLoaders(loader(6), loader(8)), Video(), nn.L1Loss(), cbs=TbpttResetCB(10)))
        with learn.no_bar(): learn.validate(dl=loader(5))
        if other is None: continue
        with learn.no_bar(), pytest.raises(ValueError, match='in training they had'): learn.validate(dl=loader(6, other))
