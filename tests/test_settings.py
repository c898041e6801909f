"A wrong argument is refused by its name, before anything is made of it"
import dis, warnings
from functools import partial
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
import tbptt_fastai.instruments.diagnose, tbptt_fastai.instruments.find # noqa: with them come methods of a Learner
from tbptt_fastai.datasets.benchmarks import simulate_duffing
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.instruments.activation import activation_memory
from tbptt_fastai.instruments.adaptive import Adaptive
from tbptt_fastai.instruments.health import GradientHealth
from tbptt_fastai.learner import RNNLearner, ScaledL1Loss, TbpttLearner, default_loss, scaling_from_data
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders, split_by_time
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.models.sequence import SequenceRNN, Standardize
from tbptt_fastai.sequences.plot import as_label, plot_windows
from tbptt_fastai.sequences.windows import SequenceParts, Sequences, SequenceWindows
from tbptt_fastai.speed.graphs import CudaGraphCB
from tbptt_fastai.speed.optimizer import FusedAdam
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.state.stateful import InitialState, StatefulRNN
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.training.finite import FiniteCB
from tbptt_fastai.training.threads import ThreadHintCB, on_threads
from tbptt_fastai.truncation.schemes import Jittered, Overlap, RandomUnbiased

INF,NAN = float('inf'),float('nan')


def signal(n=400): return np.random.default_rng(0).standard_normal((n,1)).astype(np.float32)

def loaders(x=None, y=None, **kwargs):
    x,y = (signal() if o is None else o for o in (x, y))
    return SequenceDataLoaders.from_arrays(x, y, **{**dict(win_sz=50, bs=4, device='cpu'), **kwargs})

def refused(error, words, f, *args, **kwargs):
    with pytest.raises(error, match=words): f(*args, **kwargs)

not_dense = dict(sparse=(lambda t: t.to_sparse(), 'of layout torch.sparse_coo'),
                 rows=(lambda t: t.to_sparse_csr(), 'of layout torch.sparse_csr'),
                 meta=(lambda t: t.to('meta'), "on the device 'meta'"),
                 nested=(lambda t: torch.nested.nested_tensor([t, t[:5]]), 'nested'),
                 quantized=(lambda t: torch.quantize_per_tensor(t, .1, 0, torch.qint8), 'quantized'))

@pytest.mark.parametrize('kind', not_dense)
def test_a_tensor_without_a_number_at_each_place_is_refused_wherever_it_comes_in(kind):
    made,what = not_dense[kind]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch says that some of them are new, others old
        bad = made(torch.from_numpy(signal()))
    x = signal()
    for f,args,name in ((loaders, (bad, x), 'x'), (loaders, (x, bad), 'y'), (loaders, ([x,bad], [x,x]), r'x\[1\]'),
                        (loaders, ([x,x], [bad,x]), r'y\[0\]'), (Sequences, (bad,), 'x'), (Sequences, ([bad,bad],), r'x\[0\]'),
                        (SequenceWindows, (x, bad, 50), 'y'), (SequenceParts, (bad, x, 50), 'x'),
                        (loaders().test_dl, (bad,), 'test_items'), (split_by_time, (bad,), 'seqs'),
                        (StreamPredictor(SequenceRNN(1, 1)), (bad,), 'The chunk')):
        refused(TypeError, f'^{name} is a tensor that is {what}', f, *args)
    refused(TypeError, rf'^valid\[0\] is a tensor that is {what}', loaders, valid=(bad, x))


@pytest.mark.parametrize('value', ['a', None, [.2], 1j, True, np.array([.1,.2])])
def test_a_share_that_is_no_number_is_refused(value):
    df = pd.DataFrame(dict(u=signal()[:,0]))
    for f in (loaders, lambda **kw: loaders([signal(300), signal(400)], [signal(300), signal(400)], win_sz=None, **kw),
              lambda **kw: SequenceDataLoaders.from_df(df, x='u', y='u', **kw), lambda **kw: split_by_time(signal(), **kw),
              lambda **kw: SequenceDataLoaders.from_text('ab'*100, bs=2, **kw)):
        refused(TypeError, '^valid_pct is .* expected a share between 0 and 1', f, valid_pct=value)

@pytest.mark.parametrize('value', [0, 1, -.1, INF, NAN])
def test_a_share_out_of_bounds_is_refused(value):
    refused(ValueError, '^valid_pct is .* expected a share between 0 and 1', loaders, valid_pct=value)

def test_a_share_of_any_library_is_a_number():
    expected = loaders(valid_pct=.25).train_ds.steps
    for value in (np.float32(.25), np.array(.25), torch.tensor(.25)): assert loaders(valid_pct=value).train_ds.steps==expected


schemes = [(Jittered, (20,), 'std', [INF,NAN,-1,'a',None]), (Jittered, (20,), 'half', [INF,NAN,-.1,1.1,'a',None]),
           (RandomUnbiased, (), 'mean', [INF,NAN,1,0,'a',None,[20]]), (RandomUnbiased, (20,), 'alpha', [INF,NAN,2,'a',[3]]),
           (Adaptive, (), 'delta', [INF,NAN,0,-1,'a',None])]

@pytest.mark.parametrize('cls,args,name,values', schemes)
def test_a_number_of_a_scheme_is_real_finite_and_within_bounds(cls, args, name, values):
    for value in values:
        error = ValueError if isinstance(value, (int,float)) else TypeError
        refused(error, f'^{name} is .*; expected', cls, *args, **{name: value})

def test_the_bounds_of_a_scheme_themselves_are_taken():
    for half,std in ((0, 0), (1, 0.)): assert Jittered(20, half, std).half==half
    assert RandomUnbiased(np.float64(1.5), 2.5).mean==1.5

def test_the_scheme_of_a_length_is_a_scheme():
    refused(TypeError, '^scheme is None; expected a function', Adaptive, scheme=None)
    refused(TypeError, '^scheme gives None for a length of 400', Adaptive, scheme=lambda k: None)
    assert Adaptive(scheme=lambda k: Overlap(k, k)).sub_seq_len==400


no_modules = [(None,'got None'), ('gru',"got 'gru'"), (nn.GRU,'got the class GRU'), (nn.GRUCell,'got the class GRUCell')]

@pytest.mark.parametrize('given,what', no_modules)
def test_what_is_no_module_is_not_wrapped(given, what):
    refused(TypeError, f'^StatefulRNN {what}.*expected a recurrent module', StatefulRNN, given)
    refused(TypeError, f'^StreamPredictor {what}.*expected a learner, or a model', StreamPredictor, given)

def test_a_first_state_is_made_by_something_that_can_be_called():
    refused(TypeError, '^initial is 5; expected an InitialState', StatefulRNN, nn.GRU(1, 2), initial=5)

@pytest.mark.parametrize('groups,words', [(5,'groups is 5'), ('ab',"groups is 'ab'"), ([['a'],['b']],r"groups\[0\] is \['a'\]")])
def test_names_are_a_list_of_what_can_be_looked_up(groups, words):
    x = signal()
    for f in (lambda **kw: loaders([x,x], [x,x], **kw), lambda **kw: Sequences([x,x], **kw),
              lambda **kw: InitialState(torch.zeros(2, 3), **kw), StreamPredictor(SequenceRNN(1, 1)).reset):
        refused(TypeError, f'^{words}', f, groups=groups)
    assert Sequences([x,x], groups=np.array(['a','b'])).groups==['a','b']
    assert Sequences([x,x], groups=[('a',1),('b',2)]).groups==[('a',1),('b',2)]


@pytest.mark.parametrize('files', [None, 5, b'x', {}, [None], [b'x']])
def test_what_is_no_file_is_not_opened(files):
    refused(TypeError, '^The files are .* expected a pattern', SequenceDataLoaders.from_hdf5, files, x='u', y='y')

def test_tokens_that_cannot_be_sorted_are_refused_and_taken_in_an_order_that_is_given():
    text = SequenceDataLoaders.from_text
    refused(TypeError, r"^The text has tokens of several types, \['int', 'str'\]", text, [1,'a']*50, bs=2)
    refused(TypeError, r"^text\[1\] is \['b'\]", text, ['a',['b']]*50, bs=2)
    refused(TypeError, 'vocab', text, 'ab'*50, vocab=5, bs=2)
    assert list(text([1,'a']*50, vocab=['a',1], bs=2, sub_seq_len=5).vocab)==['a',1]

@pytest.mark.parametrize('items', [[], ()])
def test_no_test_items_are_refused(items): refused(ValueError, '^There are no test items', loaders().test_dl, items)


@pytest.mark.parametrize('name,value,error,words', [
    ('num_workers',-1,ValueError,'num_workers is -1'), ('num_workers','a',TypeError,"num_workers is 'a'"),
    ('num_workers',1.5,TypeError,'num_workers is 1.5'), ('dt','a',TypeError,"dt is 'a'"), ('dt',0,ValueError,'dt is 0'),
    ('dt',NAN,ValueError,'dt is nan'), ('x_names',5,TypeError,'x_names is 5'), ('y_names',5,TypeError,'y_names is 5'),
    ('device','gpu',ValueError,"device is 'gpu'; expected"), ('device',[1],TypeError,r'device is \[1\]'),
    ('device','meta',ValueError,"device is 'meta', which cannot"), ('device','cuda:99',ValueError,"device is 'cuda:99', which cannot"),
    ('device','xpu:99',ValueError,"device is 'xpu:99', which cannot"), ('path',None,TypeError,'path is None'),
    ('vocab',5,TypeError,'The labels of vocab are 5')])
def test_a_setting_of_loaders_that_cannot_be_is_refused(name, value, error, words):
    refused(error, f'^{words}', loaders, **{name: value})

def test_a_loader_by_itself_refuses_the_same():
    ds = SequenceWindows(signal(), signal(), 50)
    refused(ValueError, '^num_workers is -1', TbpttDL, ds, num_workers=-1)
    refused(ValueError, '^bs is 0', TbpttDL, ds, bs=0)


def test_an_unsigned_class_that_no_int64_holds_is_refused_with_its_row():
    y = np.array([0,1,2**63+5,3]*100, np.uint64)
    df = pd.DataFrame(dict(u=signal()[:,0], y=y))
    refused(ValueError, f"^Row 2 has {2**63+5} in column 'y', above the largest", SequenceDataLoaders.from_df, df, x='u', y='y')
    refused(TypeError, r'^y\[0\] is of type torch.uint64', loaders, y=y)
    df.y = df.y.clip(upper=2**63-1)
    dls = SequenceDataLoaders.from_df(df, x='u', y='y', bs=1, device='cpu')
    assert dls.train.one_batch()[1].max()==2**63-1

def test_unsigned_numbers_that_are_an_input_stay_what_they_are():
    df = pd.DataFrame(dict(u=np.full(400, 2**63+5, np.uint64), y=signal()[:,0]))
    x,_ = SequenceDataLoaders.from_df(df, x='u', y='y', bs=1, dtype=torch.float64, device='cpu').train.one_batch()
    assert (x[x!=0]==float(2**63+5)).all()


chunks = dict(text='abc', words=np.array([['a'],['b']]), none=None, ragged=[[1.],[2.,3.]], objects=np.array([[None],[1.]], object),
              dates=np.array([['2020-01-01']], 'datetime64[s]'), a_set={1.}, bytes=b'abc', module=nn.Linear(1, 1),
              words_in_a_frame=pd.DataFrame(dict(u=['a','b'])), records=np.zeros(3, [('a','f4')]),
              masked=np.ma.masked_array(np.ones((5,1)), [[True]]+[[False]]*4))

@pytest.mark.parametrize('kind', chunks)
@pytest.mark.parametrize('of_learner', [True, False])
def test_a_chunk_without_numbers_is_refused_and_nothing_has_changed(kind, of_learner):
    model = SequenceRNN(1, 1)
    stream = StreamPredictor(RNNLearner(loaders(), hidden_size=4) if of_learner else model)
    x = torch.from_numpy(signal(20))
    stream(x[:10])
    before = stream.state_dict()
    refused(TypeError, '^The chunk is ', stream, chunks[kind])
    with pytest.raises(TypeError, match='^There is no chunk'): stream()
    again = StreamPredictor(stream.model)
    again.load_state_dict(before)
    assert torch.equal(stream(x[10:]), again(x[10:]))

@pytest.mark.parametrize('made', [lambda x: x[::-1], lambda x: x[None,:,::-1][0][::-1], lambda x: x[::-1].astype('>f4'),
                                  lambda x: pd.DataFrame(x)[::-1], lambda x: x[::-1].tolist()])
def test_numbers_in_any_layout_of_memory_are_the_same_chunk(made):
    x,model = np.random.default_rng(0).standard_normal((20,2)).astype(np.float32),SequenceRNN(2, 1)
    plain = made(x)
    plain = np.array(plain, np.float32)
    expected = StreamPredictor(model)(torch.from_numpy(plain))
    assert np.allclose(np.asarray(StreamPredictor(model)(made(x))), expected, atol=1e-6)

def test_settings_of_a_predictor_are_refused():
    model = SequenceRNN(1, 1)
    for name,value,error in (('ndim','a',TypeError), ('ndim',0,ValueError), ('ndim',(3,'a'),TypeError), ('timed',5,TypeError),
                             ('timed','ab',TypeError), ('timed',(1,0),TypeError)):
        refused(error, f'^{name} is ', StreamPredictor, model, **{name: value})
    stream = StreamPredictor(model)
    stream(signal(5))
    for rows in ('a', np.array(['a']), {}): refused(TypeError, '^rows is .*expected bool', stream.reset, rows)


@pytest.mark.parametrize('name', [r'$\frac{1}$', '$', '$$$', 'cost [$]', '$x', '^_{}', r'a $\nothing$ b', '$ $ $'])
def test_any_name_can_be_drawn(name):
    x = torch.randn(2, 10, 2)
    axs = plot_windows(x, x, x_names=[name,'b'], y_names=[name,name], titles=[name,name])
    axs[0,0].figure.canvas.draw()
    axs = plot_windows(x, torch.tensor([0,1]), torch.tensor([1,1]), vocab=[name,'b'])
    axs[0,0].figure.canvas.draw()

def test_a_formula_stays_a_formula():
    for name in ('force [N]', 'acceleration [$m/s^2$]', r'$\frac{1}{2}$ of it'): assert as_label(name)==name


# ---- settings of callbacks, instruments, models and optimizers

WILD = [1j, '', b'x', {}, object(), np.array([1., 2.]), np.array('a'), torch.zeros(0), torch.zeros(3, 2), pd.DataFrame(dict(u=[1., 2.])), pd.Series(['a','b']), nn.Linear(1, 1)]

def is_raised(e):
    "By a statement of the library, and not in an expression?"
    tb = e.__traceback__
    while tb.tb_next is not None: tb = tb.tb_next
    code = tb.tb_frame.f_code
    return 'tbptt_fastai' in code.co_filename and code.co_code[tb.tb_lasti]==dis.opmap['RAISE_VARARGS']

def small_dls():
    x = np.random.default_rng(0).standard_normal((200, 1)).astype(np.float32)
    return SequenceDataLoaders.from_arrays(x, x, win_sz=40, sub_seq_len=10, bs=2, device='cpu')

def of_learner(name): return lambda **kwargs: getattr(RNNLearner(small_dls(), hidden_size=3, num_threads=1), name)(**kwargs)
def optimizer(**kwargs): return FusedAdam([nn.Parameter(torch.ones(2))], lr=kwargs.pop('lr', 1e-3), **kwargs)

REFUSED = [(FiniteCB, 'policy'), (FiniteCB, 'limit'), (TbpttCheckpoint, 'resume'), (TbpttCheckpoint, 'every'), (ThreadHintCB, 'times'), (GradientHealth, 'low'),
    (GradientHealth, 'high'), (CudaGraphCB, 'n_shapes'), (of_learner('tbptt_find'), 'bias'), (of_learner('tbptt_find'), 'tau'), (of_learner('tbptt_find'), 'show'),
    (of_learner('check_memory_grads'), 'tol'), (of_learner('check_sub_windows'), 'tol'), (partial(simulate_duffing, 50), 'fs'), (partial(simulate_duffing, 50), 'noise'),
    (partial(simulate_duffing, 50), 'zeta'), (partial(simulate_duffing, 50), 'bandwidth'), (partial(simulate_duffing, 50), 'beta'), (partial(simulate_duffing, 50), 'gain'),
    (partial(Unroll, nn.GRUCell(1, 2)), 'batch_first'), (partial(Carry, SequenceRNN(1, 1)), 'evaluation'), (lambda num_threads: on_threads(num_threads).__enter__(), 'num_threads'),
    (lambda **o: TbpttDL(SequenceWindows(torch.zeros(50, 1), torch.zeros(50, 1), 10), **o), 'shuffle'), (partial(RNNLearner, small_dls()), 'check'),
    (partial(ScaledL1Loss, torch.ones(2)), 'time_dim')]

@pytest.mark.parametrize('make,name', REFUSED, ids=[f'{i}-{o[1]}' for i,o in enumerate(REFUSED)])
def test_what_can_be_no_such_setting_is_refused_by_its_name(make, name):
    for o in WILD:
        with pytest.raises((TypeError,ValueError), match=f'^{name}') as e: make(**{name: o})
        assert is_raised(e.value), (name, o, e.value)

@pytest.mark.parametrize('name', ['lr', 'mom', 'sqr_mom', 'eps', 'wd'])
def test_hyperparameters_of_the_optimizer_are_numbers(name):
    for o in (1j, '', None, np.array('a'), torch.zeros(3, 2), float('nan'), float('inf'), object(), nn.Linear(1, 1)):
        with pytest.raises((TypeError,ValueError), match=f'^{name} is'): optimizer(**{name: o})
    for o in (np.float32(.5), torch.tensor(.5), [.5]): assert optimizer(**{name: o}).hypers[0][name]==.5
    if 'mom' in name:
        with pytest.raises(ValueError, match=f'^{name} is 1; expected a number of 0 or more and below 1'): optimizer(**{name: 1})

@pytest.mark.parametrize('make', [lambda o: Standardize(o), lambda o: Standardize(0., o), lambda o: ScaledL1Loss(o)])
def test_statistics_are_real_numbers(make):
    for o in ('', None, 2**63, 1j, True, object(), nn.Linear(1, 1)):
        with pytest.raises(TypeError, match='expected real numbers, one for each channel'): make(o)
    assert Standardize(0, 2)(torch.ones(1, 1, 1)).item()==.5

@pytest.mark.parametrize('name,expected', [('loss_func', 'a loss of predictions'), ('opt_func', 'makes an optimizer'), ('cbs', 'expected callbacks')])
def test_parts_of_a_learner_are_what_they_are_for(name, expected):
    for make in (RNNLearner, partial(TbpttLearner, model=SequenceRNN(1, 1))):
        for o in (0, 'a', [1], np.array([1., 2.]), Overlap(2, 4)):
            with pytest.raises(TypeError, match=f'(?s){name}.*{expected}'): make(small_dls(), **{name: o})
    kinds = {type(o) for o in RNNLearner(small_dls(), cbs=[FiniteCB, GradientHealth()]).cbs}
    assert {FiniteCB, GradientHealth}<=kinds

@pytest.mark.parametrize('o', [0, 'a', nn.GRU, pd.DataFrame(), None])
def test_models_and_loaders_are_such(o):
    for make in (Carry, activation_memory):
        with pytest.raises(TypeError, match='expected a model'): make(o)
    for make in (scaling_from_data, default_loss):
        with pytest.raises(TypeError, match='expected DataLoaders'): make(o)

def test_devices_of_single_loaders_and_folders_of_checkpoints():
    ds = Sequences([torch.zeros(20, 1), torch.zeros(30, 1)], [torch.zeros(20, 1), torch.zeros(30, 1)])
    for make in (TbpttDL, StreamDL):
        for o in (.5, -1, 2**63, 'gpu', 'meta'):
            with pytest.raises((TypeError,ValueError), match='^device is'): make(ds, bs=1, sub_seq_len=5, device=o)
    for o in (0, None, ['a'], b'x', nn.Linear(1, 1)):
        with pytest.raises(TypeError, match='^path is.*name of a folder'): TbpttCheckpoint(o)
    for o in (0, 'a', True, {'a': True}, [1]):
        with pytest.raises(TypeError, match='^timed is'): Unroll(nn.GRUCell(1, 2), timed=o)

def test_numbers_of_numpy_and_in_tensors_are_numbers():
    torch.manual_seed(3) # with some weights no lag has a bias that small, of which it warns
    learn = RNNLearner(small_dls(), hidden_size=3, num_threads=1)
    a,b = learn.tbptt_find(.1, 1, 8, n_losses=1, tau=2, show=False),learn.tbptt_find(torch.tensor(.1), np.int64(1), np.array(8), n_losses=1, tau=torch.tensor(2), show=0)
    assert a.beta==b.beta and a.suggestion==b.suggestion
    assert simulate_duffing(50, noise=torch.tensor(1e-4))[1].shape==(50,)
