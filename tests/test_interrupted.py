"After an interruption anywhere a learner is as good as a new one with the same weights; the long form is bench/interrupts.py"
import copy, importlib.util, os, signal, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import mae
from helpers import fit, loaders, sgd
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.instruments.adaptive import Adaptive
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import read_ahead
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.state.turns import taking_turns, training_turn
from tbptt_fastai.truncation.schemes import Exact, Overlap

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    spec = importlib.util.spec_from_file_location('bench_interrupts', Path(__file__).resolve().parent.parent/'bench'/'interrupts.py')
    interrupts = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interrupts)


@contextmanager
def often_switched():
    "In it, threads take turns as often as they can"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try: yield
    finally: sys.setswitchinterval(before)

def at_once(*fs):
    "What all return, in threads that start together"
    with ThreadPoolExecutor(len(fs)) as pool: return [o.result(120) for o in [pool.submit(f) for f in fs]]


# --- at random

@pytest.mark.parametrize('start', range(0, 300, 30))
def test_what_follows_is_bitwise_that_of_a_new_learner(start):
    counts,bad = interrupts.run(range(start, start+30))
    assert not bad,'\n'.join(bad)
    assert sum(n for (_,end),n in counts.items() if end=='same')>=20


# --- one kind each

class Raises(Callback):
    "Once"
    def __init__(self, event, order=2000):
        self.order,self.left = order,1
        setattr(self, event, self.fail)
    def fail(self):
        if self.left and self.training:
            self.left = 0
            raise KeyboardInterrupt('stop')

def stopped(make, event, **kwargs):
    "A learner whose fit was interrupted"
    learn = make(cbs=Raises(event), **kwargs)
    with pytest.raises(KeyboardInterrupt): fit(learn)
    return learn

def library(signals, **kwargs):
    return TbpttLearner(loaders(signals, shuffle=False), SequenceRNN(2, 1, hidden_size=4), loss_func=MSELossFlat(), opt_func=sgd, num_threads=1, **kwargs)
def of_fastai(signals, cbs=None, **kwargs):
    model = SequenceRNN(2, 1, hidden_size=4)
    return Learner(loaders(signals, shuffle=False), model, loss_func=MSELossFlat(), opt_func=sgd, cbs=[TbpttResetCB(), *([cbs] if cbs else [])], **kwargs)

@pytest.mark.parametrize('make', [library, of_fastai])
@pytest.mark.parametrize('event', ['after_backward', 'before_step', 'after_step'])
def test_the_first_step_after_an_interruption_has_the_gradient_of_that_step_alone(signals, make, event):
    "A step of plain gradient descent, by hand"
    learn = stopped(lambda **kw: make(signals, **kw), event)
    assert all(p.grad is not None and p.grad.any() for p in learn.model.parameters()) # for the one who looks for the error
    model,lr = copy.deepcopy(learn.model),.1
    x,y = (o[:,:20] for o in next(iter(learn.dls.train.whole_windows())))
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    expected = [p-lr*p.grad for p in model.parameters()]
    class Stop(Callback):
        order = 3000
        def after_step(self):
            seen.extend(p.detach().clone() for p in self.learn.model.parameters())
            raise KeyboardInterrupt('stop')
    seen = []
    learn.add_cb(Stop())
    with pytest.raises(KeyboardInterrupt): fit(learn, lr=lr)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(seen, expected, strict=True))

@pytest.mark.parametrize('make', [library, of_fastai])
def test_a_fit_that_has_ended_leaves_gradients_as_ever(signals, make):
    "... such as those that GradientAccumulation has collected"
    learn = fit(make(signals))
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    seen = []
    class Look(Callback):
        def before_train(self): seen.extend(p.grad.clone() for p in self.learn.model.parameters())
    learn.add_cb(Look())
    with learn.no_bar(): learn.validate()
    fit(learn)
    assert seen and all((g==1).all() for g in seen)

def test_an_export_that_fails_leaves_data_and_optimizer(signals, tmp_path):
    learn = fit(library(signals, path=tmp_path))
    class Unpicklable:
        def __reduce__(self): raise KeyboardInterrupt('stop')
    learn.model.bad = Unpicklable()
    dls,opt = learn.dls,learn.opt
    with pytest.raises(KeyboardInterrupt): learn.export()
    assert learn.dls is dls and learn.opt is opt and opt.hypers[0]['lr']==1e-2
    del learn.model.bad
    fit(learn)
    learn.export()
    assert learn.dls is dls and (tmp_path/'export.pkl').exists()

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward', 'after_step', 'after_batch', 'after_train'])
@pytest.mark.parametrize('kind', ['windows', 'stream'])
def test_the_same_learner_goes_on_from_its_checkpoint_as_if_nothing_had_been(signals, event, kind, tmp_path):
    u,y = signals
    def made(folder, cbs=None):
        torch.manual_seed(0)
        how = dict(sub_seq_len=20, bs=2)
        if kind=='windows': dls = SequenceDataLoaders.from_arrays(u[:600], y[:600], win_sz=100, **how)
        else: dls = SequenceDataLoaders.from_arrays([u[:200],u[200:330],u[330:600]], [y[:200],y[200:330],y[330:600]], groups=list('abc'), **how)
        model = nn.Sequential(SequenceRNN(2, 1, hidden_size=4), nn.Dropout(.2))
        dls.train.rng.seed(0)
        return TbpttLearner(dls, model, num_threads=1, path=tmp_path/folder, cbs=cbs)
    def ended(learn): return [*learn.model.parameters(), torch.tensor(learn.recorder.values), torch.stack([*learn.recorder.losses])]
    whole = made('whole')
    torch.manual_seed(1)
    fit(whole, 2, cbs=TbpttCheckpoint(every=3))
    class Later(Callback):
        "In the second epoch"
        order,left = 2000,[1] # of the class: what a callback itself has is put back
        def __init__(self): setattr(self, event, self.fail)
        def fail(self):
            if self.training and self.learn.epoch and self.left:
                self.left.pop()
                raise ValueError('stop')
    learn = made('stopped', Later())
    torch.manual_seed(1)
    with pytest.raises(ValueError): fit(learn, 2, cbs=TbpttCheckpoint(every=3))
    fit(learn, 2, cbs=TbpttCheckpoint(every=3, resume=True))
    assert not Later.left and all(torch.equal(a, b) for a,b in zip(ended(learn), ended(whole), strict=True))


# --- two learners in two threads

def mapped(a, name):
    np.save(f'{name}.npy', a)
    return np.load(f'{name}.npy', mmap_mode='r')

def deterministic(kind, signals, seed):
    "A learner whose draws are those of its own loader"
    u,y = (o[:600] for o in signals)
    torch.manual_seed(seed)
    how = dict(sub_seq_len=20, bs=2)
    if kind=='stream': dls = SequenceDataLoaders.from_arrays([u[:200],u[200:330],u[330:]], [y[:200],y[200:330],y[330:]], groups=list('abc'), **how)
    elif kind=='files': dls = SequenceDataLoaders.from_arrays(mapped(u, 'u'), mapped(y, 'y'), win_sz=100, **how)
    else: dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, **how)
    dls.train.rng.seed(seed)
    truncation = dict(overlap=Overlap(10, 20), exact=Exact(30), adaptive=Adaptive(delta=.5, k_max=20, n_batches=1, step=2)).get(kind)
    return TbpttLearner(dls, SequenceRNN(2, 1, hidden_size=4), num_threads=1, metrics=mae, **({} if truncation is None else dict(truncation=truncation)))

def all_of(learn):
    fit(learn, 2)
    with learn.no_bar(), learn.no_logging():
        preds = learn.get_preds()
        found = learn.tbptt_find(show=False, n_batches=1, max_lag=8, n_losses=1, bias=.5).phi
    fit(learn)
    return [*learn.model.parameters(), torch.tensor(learn.recorder.values), torch.stack([*learn.recorder.losses]), *preds, torch.from_numpy(found)]

no_lag = pytest.mark.filterwarnings('ignore:No lag up to:UserWarning') # the windows are short

@no_lag
@pytest.mark.parametrize('kinds', [('windows','stream'), ('overlap','adaptive'), ('exact','files'), ('stream','stream')], ids=' '.join)
def test_two_learners_in_two_threads_train_as_one_after_the_other(signals, kinds):
    alone = [all_of(deterministic(kind, signals, i)) for i,kind in enumerate(kinds)]
    learners = [deterministic(kind, signals, i) for i,kind in enumerate(kinds)]
    with often_switched(): found = at_once(*(lambda o=o: all_of(o) for o in learners))
    for a,b in zip(alone, found, strict=True): assert all(map(torch.equal, a, b))
    assert not Carry.entered

@no_lag
def test_a_learner_that_is_interrupted_in_one_thread_leaves_that_of_another_alone(signals):
    alone = all_of(deterministic('stream', signals, 0))
    learn,other = deterministic('stream', signals, 0),deterministic('windows', signals, 1)
    def fails():
        for event in ('after_pred', 'after_backward', 'before_step', 'after_batch', 'before_epoch')*3:
            cb = Raises(event)
            with pytest.raises(KeyboardInterrupt): fit(other, cbs=cb)
    with often_switched(): found,_ = at_once(lambda: all_of(learn), fails)
    assert all(map(torch.equal, alone, found)) and not Carry.entered


# --- a process that forks

def in_child(f, seconds=20):
    "Does it hold in a forked process? It may not hang there"
    pid = os.fork()
    if pid==0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try: ok = f()
        except BaseException: os._exit(3)
        os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==0

@pytest.fixture
def forks():
    "Python warns of a fork beside threads"
    if not hasattr(os, 'fork'): pytest.skip('this system does not fork')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        yield

@pytest.mark.parametrize('at', ['under way', 'read'])
def test_a_forked_process_goes_on_with_what_is_read_ahead(forks, at):
    go = threading.Event()
    def read(i):
        if threading.current_thread() is not main: go.wait()
        return 10*i
    main,expected = threading.current_thread(),[(i,10*i) for i in range(1, 5)]
    if at=='read': go.set()
    it = read_ahead(read, range(5))
    if at=='under way': threading.Timer(.2, go.set).start()
    assert next(it)==(0,0)
    go.clear()
    if at=='read': go.set()
    assert in_child(lambda: [*it]==expected)
    go.set()
    assert [*it]==expected

@pytest.mark.parametrize('how', ['goes on', 'reads anew', 'trains'])
def test_a_forked_process_reads_files_that_are_read_ahead(forks, signals, how, tmp_path):
    import h5py
    u,y = (np.tile(o, (20,1)) for o in signals)
    for i in range(3):
        with h5py.File(f'{i}.h5', 'w') as f:
            for name,a in zip('uy', (u, y)): f.create_dataset(name, data=a, chunks=(64, a.shape[1]), compression='gzip')
    dls = SequenceDataLoaders.from_hdf5([tmp_path/f'{i}.h5' for i in range(3)], 'u', 'y', sub_seq_len=8000, bs=2)
    view = dls.train.new(shuffle=False).sub_windows()
    whole = [*view]
    def same(batches, expected): return len(batches)==len(expected) and all(torch.equal(a, b) for o,p in zip(batches, expected) for a,b in zip(o, p))
    it = iter(view)
    next(it)
    def goes_on(): return same([*it], whole[1:])
    def anew(): return same([*dls.train.new(shuffle=False).sub_windows()], whole)
    def trains(): return bool(torch.stack(fit(RNNLearner(dls, hidden_size=2, num_threads=1)).recorder.losses).isfinite().all())
    assert in_child({'goes on': goes_on, 'reads anew': anew, 'trains': trains}[how], 60)
    assert goes_on()

@pytest.mark.parametrize('how', ['evaluates', 'trains'])
def test_a_forked_process_predicts_beside_an_evaluation_and_is_refused_beside_a_training(forks, how):
    model,begun,done = SequenceRNN(1, 1, hidden_size=4),threading.Event(),threading.Event()
    x = torch.randn(1, 5, 1)
    expected = StreamPredictor(model)(x)
    def hold():
        with (taking_turns if how=='evaluates' else training_turn)(model):
            begun.set()
            done.wait(30)
    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert begun.wait(30)
    def child():
        if how=='evaluates': return torch.equal(StreamPredictor(model)(x), expected)
        with pytest.raises(RuntimeError, match='trained in another thread'): StreamPredictor(model)(x)
        return torch.equal(StreamPredictor(copy.deepcopy(model))(x), expected)
    assert in_child(child)
    done.set()
    thread.join(30)
    assert torch.equal(StreamPredictor(model)(x), expected)
