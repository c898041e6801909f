"One value that is not finite costs a training one window, against loops by hand that leave it out"
import warnings
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler # noqa: with it comes Learner.lr_find
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import mse
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, fit_own_lr, sgd, untaught_on_purpose
from reference import stream_by_hand
from test_graphs import TapeGraph
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.layout import Block, BlockRun
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.models.memories import LRU
from tbptt_fastai.speed.graphs import CudaGraphCB
from tbptt_fastai.speed.optimizer import FusedAdam
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.training.finite import FiniteCB, NotFiniteError, channel_ranges, carried_steps, surely_finite, washed_out
from tbptt_fastai.truncation.plan import SubWindow
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased

NAN,INF = float('nan'),float('inf')
WIN,SUB,BS,N = 30,12,4,16 # sub-windows of 12, 12 and 6 steps; four batches
SUBS = [(0, 12), (12, 24), (24, 30)]

def quiet(f, *args, **kwargs):
    "Each step that is skipped has a warning, which the tests count in `skipped`"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'A training step is skipped')
        return f(*args, **kwargs)

def net(rnn=nn.GRU, plain=False, stateful=StatefulRNN):
    torch.manual_seed(0)
    layer = rnn(2, 3, batch_first=True)
    return nn.Sequential(Unpack(layer) if plain else stateful(layer), nn.Linear(3, 1)).double()

class Unpack(nn.Module):
    def __init__(self, rnn): super().__init__(); self.rnn = rnn
    def forward(self, x): return self.rnn(x)[0]

def data(n=N, win_sz=WIN):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, win_sz, 2, generator=g, dtype=torch.float64),torch.randn(n, win_sz, 1, generator=g, dtype=torch.float64)

def window_dls(x, y, workers=0, time_dim=1):
    items = list(zip(x, y))
    own = dict(num_workers=workers) if workers else dict(num_workers=0)
    return DataLoaders(TfmdDL(items, bs=BS, **own), TfmdDL([o for o in items if o[0].isfinite().all() and o[1].isfinite().all()][:4], bs=BS, num_workers=0))

def learner(dls, model, cbs=(), sub=SUB, opt=adam, **kwargs):
    reset = TbpttResetCB(sub, **kwargs) if not hasattr(sub, 'sub_windows') else TbpttResetCB(truncation=sub, **kwargs)
    return Learner(dls, model, loss_func=nn.MSELoss(), opt_func=opt, lr=1e-2, cbs=[reset, *(cbs if isinstance(cbs, (list,tuple)) else [cbs])])

def by_hand(model, x, y, bad=None, n_epoch=2, subs=SUBS, n_skip=0, batches=None):
    "Training by windows; of each that is in `bad`, by its number, the sub-windows before that one; the losses of all steps"
    rnn,head = model[0].rnn,model[1]
    opt,losses = torch.optim.Adam(model.parameters(), lr=1e-2),[]
    for _ in range(n_epoch):
        for b in range(len(x)//BS):
            state = None
            for k,(start,stop) in enumerate(subs):
                if k==(bad or {}).get(b): break
                out,state = rnn(x[b*BS:(b+1)*BS,start:stop], state)
                state = tuple(o.detach() for o in state) if isinstance(state, tuple) else state.detach()
                loss = nn.functional.mse_loss(head(out), y[b*BS:(b+1)*BS,start:stop])
                losses.append(loss.item())
                (loss*((stop-start)/SUB)).backward()
                opt.step()
                opt.zero_grad()
    return model,losses

def assert_same(a, b, tol=1e-12):
    for (name,p),q in zip(a.state_dict().items(), b.state_dict().values()): torch.testing.assert_close(p, q, rtol=0, atol=tol, msg=name)

class Taken(Callback):
    "The loss of each step that was taken"
    def before_fit(self): self.found = []
    def after_step(self): self.found.append(self.learn.loss.item())


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('rnn', [nn.GRU, nn.LSTM])
@pytest.mark.parametrize('what', ['input', 'target'])
@pytest.mark.parametrize('k', range(3))
@pytest.mark.parametrize('value', [NAN, INF])
def test_a_window_is_left_out_from_the_bad_sub_window_on(value, k, what, rnn, workers):
    if workers and (value==INF or rnn is nn.LSTM or k!=1): return
    x,y = data()
    expected,losses = by_hand(net(rnn), x, y, {1: k})
    start,stop = SUBS[k]
    bad = x.clone(),y.clone()
    bad[what=='target'][6,stop-3,0] = value # one row of the second batch
    learn = learner(window_dls(*bad, workers), net(rnn), [cb := FiniteCB('skip', limit=2), seen := Taken()])
    quiet(fit_own_lr, learn, 2)
    assert_same(learn.model, expected)
    np.testing.assert_allclose(seen.found, losses, rtol=1e-6)
    assert len(learn.recorder.losses)==len(losses) and torch.stack(learn.recorder.losses).isfinite().all()
    assert len(cb.skipped)==2 and f'steps {start}:{stop} of 30' in cb.skipped[0] and 'window 1,' in cb.skipped[0]
    assert abs(learn.pct_train-1)<1e-9 and learn.train_iter==24

@pytest.mark.parametrize('plain', [False, True])
def test_several_windows_and_plain_layers(plain):
    x,y = data()
    bad = x.clone()
    bad[0,0,1],bad[9,13],bad[15,29,0] = NAN,INF,-INF # first, middle and last
    # float64 takes an infinite input into a finite state: it is the gradient that is NaN
    expected,_ = by_hand(net(), x, y, {0: 0, 2: 1, 3: 2}, 3)
    learn = learner(window_dls(bad, y), net(plain=plain), cb := FiniteCB('skip', limit=9))
    quiet(fit_own_lr, learn, 3)
    assert_same(learn.model, expected)
    assert len(cb.skipped)==9

def test_a_training_that_is_finite_stays_what_it_is_bit_by_bit():
    x,y = data()
    a,b,c = (learner(window_dls(x, y), net(), cbs) for cbs in ([], [FiniteCB()], [FiniteCB('skip')]))
    for o in (a, b, c): fit(o, 2, how='fit_flat_cos')
    for o in (b, c):
        assert_same(a.model, o.model, 0)
        assert torch.equal(torch.stack(a.recorder.losses), torch.stack(o.recorder.losses)) and a.recorder.values==o.recorder.values

class OnTape(CudaGraphCB):
    "Replays what was recorded on the CPU"
    graph = TapeGraph

@pytest.mark.parametrize('graphs', [False, True])
@pytest.mark.parametrize('k', range(3))
def test_a_learner_of_the_library_and_steps_that_are_replayed(k, graphs):
    x,y = data()
    bad = x.clone()
    bad[13,SUBS[k][0]] = NAN # the last batch: there are graphs by then
    expected,losses = by_hand(net(), x, y, {3: k})
    tape = OnTape()
    learn = TbpttLearner(window_dls(bad, y), net(), sub_seq_len=SUB, loss_func=nn.MSELoss(), opt_func=adam, lr=1e-2, num_threads=1,
        cbs=[FiniteCB('skip'), *([tape] if graphs else [])])
    quiet(fit_own_lr, learn, 2)
    assert_same(learn.model, expected)
    assert len(learn.recorder.losses)==len(losses) and (tape.n_replayed>10)==graphs

class Evaluate(Callback):
    "In the middle of a training"
    order,run_valid = 70,False
    def after_batch(self):
        learn = self.learn
        kept = {k:vars(learn)[k] for k in ('dl','iter','n_iter','training','train_iter','pct_train','epoch','n_epoch','xb','yb','pred','loss') if k in vars(learn)}
        recorder = learn.recorder
        with learn.removed_cbs([self, recorder]): learn.get_preds(dl=learn.dls.valid)
        for k,v in kept.items(): setattr(learn, k, v)
        learn.model.train(learn.training)

@pytest.mark.parametrize('k', range(3))
def test_an_evaluation_in_between_changes_nothing(k):
    x,y = data()
    expected,_ = by_hand(net(), x, y, {1: k})
    bad = x.clone()
    bad[5,SUBS[k][0]] = NAN
    def trained(*cbs): return quiet(fit_own_lr, learner(window_dls(bad, y), net(), [FiniteCB('skip'), *cbs]), 2)
    assert_same(trained(Evaluate()).model, expected)

def test_metrics_of_the_training_are_those_of_the_steps_that_were_taken():
    x,y = data()
    bad = x.clone()
    bad[5,13] = NAN
    learn = learner(window_dls(bad, y), net(), FiniteCB('skip'))
    learn.metrics = [mse]
    learn.recorder.train_metrics = True
    quiet(fit_own_lr, learn, 1)
    _,losses = by_hand(net(), x, y, {1: 1}, 1)
    weights = [stop-start for b in range(4) for k,(start,stop) in enumerate(SUBS) if b!=1 or k<1]
    found = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert np.isfinite(found['train_mse']) and len(losses)==len(weights)
    np.testing.assert_allclose(found['train_mse'], np.mean(losses), rtol=1e-6) # fastai weighs by rows

@pytest.mark.parametrize('scheme', [Overlap(6, 12), Exact(5), RandomUnbiased(8.), Jittered(10, std=2.)], ids=str)
@pytest.mark.parametrize('what', [0, 1])
def test_schemes_leave_out_what_a_loader_without_that_window_has_not(scheme, what):
    "In the first sub-window: so it is as if the window were not there. It is the last one, as some schemes draw for each"
    x,y = data()
    random = isinstance(scheme, (RandomUnbiased, Jittered))
    b = 3 if random else 1
    bad = x.clone(),y.clone()
    bad[what][4*b+1,0] = NAN
    rest = [i for i in range(N) if i//BS!=b]
    def trained(x, y, *cbs):
        set_seed(3)
        return quiet(fit_own_lr, learner(window_dls(x, y), net(), cbs, scheme), 2)
    expected,found = trained(x[rest], y[rest]),trained(*bad, FiniteCB('skip'))
    assert_same(found.model, expected.model)
    assert len(found.recorder.losses)==len(expected.recorder.losses)

def test_overlapping_sub_windows_in_the_middle_of_a_window():
    x,y = data()
    bad = x.clone()
    bad[5,20] = NAN # the update at step 24 is the first that sees it
    learn = quiet(fit_own_lr, learner(window_dls(bad, y), net(), cb := FiniteCB('skip'), Overlap(6, 12)), 1)
    assert len(cb.skipped)==1 and 'of 30' in cb.skipped[0]
    assert len(learn.recorder.losses)==3*5+3


# ---- streams

LENGTHS = [70, 230, 110, 55, 135, 40]
def sequences():
    g = torch.Generator().manual_seed(2)
    return [[torch.randn(n, c, generator=g, dtype=torch.float64) for n in LENGTHS] for c in (2, 1)]

def stream_dls(xs, ys, n_valid=None, bs=3, **kwargs):
    ds = Sequences([o.numpy() for o in xs], [o.numpy() for o in ys], groups=[f's{i}' for i in range(len(xs))], check=False, dtype=torch.float64, **kwargs)
    good = [i for i,o in enumerate(zip(xs, ys)) if all(t.isfinite().all() for t in o)]
    valid = Sequences([xs[i].numpy() for i in good], [ys[i].numpy() for i in good], dtype=torch.float64)
    return DataLoaders(StreamDL(ds, bs=bs, sub_seq_len=20), StreamDL(valid, bs=2, sub_seq_len=20))

def stream_loop(model, xs, ys, bad=(), n_skip=0, n_epoch=2, bs=3, restarts=True):
    "`bad`: (sequence, step). The step of its block is not taken, and that row starts anew, with a washout"
    rnn,head = model[0].rnn,model[1]
    opt,sizes = torch.optim.Adam(model.parameters(), lr=1e-2),[]
    most = bs*20
    for _ in range(n_epoch):
        states,begun = [None]*bs,[0]*bs
        for step in stream_by_hand(LENGTHS, bs, 20, range(len(LENGTHS))):
            preds,targets,is_bad = [],[],False
            for row,p in enumerate(step):
                if p is None: continue
                i,a,b = p
                if a==0: states[row],begun[row] = None,0
                out,states[row] = rnn(xs[i][None,a:b], states[row])
                states[row] = tuple(o.detach() for o in states[row]) if isinstance(states[row], tuple) else states[row].detach()
                first = max(begun[row]+n_skip-a, 0)
                preds.append(head(out)[0,first:])
                targets.append(ys[i][a:b][first:])
                if any(i==s and a<=t<b for s,t in bad):
                    is_bad = True
                    if restarts: states[row],begun[row] = None,b
            n = sum(map(len, targets))
            if is_bad or not n: continue
            sizes.append(n)
            (nn.functional.mse_loss(torch.cat(preds), torch.cat(targets))*(n/most)).backward()
            opt.step()
            opt.zero_grad()
    return model,sizes

PLANTED = dict(start=[(1, 0)], first=[(1, 7)], middle=[(1, 105)], last=[(1, 229)], two=[(1, 45), (4, 61)], twice=[(1, 45), (1, 67)], short=[(5, 39)])

@untaught_on_purpose
@pytest.mark.parametrize('n_skip', [0, 5, 33])
@pytest.mark.parametrize('rnn', [nn.GRU, nn.LSTM])
@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize('bad', PLANTED.values(), ids=PLANTED)
def test_rows_of_a_stream_start_anew_and_the_others_go_on(bad, value, rnn, n_skip):
    if n_skip==33 and value==INF: return
    xs,ys = sequences()
    broken = [o.clone() for o in xs]
    for i,t in bad: broken[i][t,1] = value
    good = [o.clone() for o in xs]
    if n_skip==33 and bad in ([(1, 0)], [(1, 7)]): pytest.skip('in the washout')
    expected,sizes = stream_loop(net(rnn), good, ys, bad, n_skip)
    learn = learner(stream_dls(broken, ys), net(rnn), cb := FiniteCB('skip', limit=50), 20, n_skip=n_skip, check=False)
    quiet(fit_own_lr, learn, 2)
    assert len(learn.recorder.losses)==len(sizes)
    assert_same(learn.model, expected)
    assert len(cb.skipped)>=2 and all(f"'s{bad[0][0]}'" in o or len(bad)>1 for o in cb.skipped)

@pytest.mark.parametrize('seed', range(8))
def test_any_places_in_a_stream(seed):
    rng = np.random.default_rng(seed)
    xs,ys = sequences()
    broken = [o.clone() for o in xs]
    bad = [(i, int(rng.integers(LENGTHS[i]))) for i in rng.integers(len(LENGTHS), size=rng.integers(1, 6))]
    for i,t in bad: broken[i][t,rng.integers(2)] = (NAN, INF, -INF)[rng.integers(3)]
    bs = int(rng.integers(1, 6))
    expected,sizes = stream_loop(net(), xs, ys, bad, bs=bs)
    learn = learner(stream_dls(broken, ys, bs=bs), net(), FiniteCB('skip', limit=50), 20)
    quiet(fit_own_lr, learn, 2)
    assert_same(learn.model, expected)
    assert len(learn.recorder.losses)==len(sizes)

def test_what_a_state_becomes_on_padding_is_no_fault():
    class Logs(nn.Module):
        "A sum of logarithms, which is infinite on padding"
        def __init__(self): super().__init__(); self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        def initial_state(self, bs, device, dtype): return torch.zeros(bs, 1, device=device, dtype=dtype)
        def forward(self, x, state):
            out = state[:,None]+x.abs().log().sum(-1, keepdim=True).cumsum(1)
            return out*.01+self.b,out[:,-1]
    xs,ys = sequences()
    learn = fit_own_lr(learner(stream_dls(xs, ys), StatefulRNN(Logs()), FiniteCB(), 20, check=False), 1)
    assert learn.model.rnn.b.abs().item()>0

def test_a_bad_target_costs_a_stream_one_step_and_no_state():
    xs,ys = sequences()
    broken = [o.clone() for o in ys]
    broken[1][105] = NAN
    expected,sizes = stream_loop(net(), xs, ys, [(1, 105)], restarts=False)
    learn = quiet(fit_own_lr, learner(stream_dls(xs, broken), net(), FiniteCB('skip'), 20), 2)
    assert_same(learn.model, expected)

def test_an_evaluation_between_a_skipped_step_of_a_stream_and_the_next():
    xs,ys = sequences()
    broken = [o.clone() for o in xs]
    broken[1][105] = NAN
    for model in (net(), Resetting(net())):
        expected,_ = stream_loop(net(), xs, ys, [(1, 105)])
        learn = quiet(fit_own_lr, learner(stream_dls(broken, ys), model, [FiniteCB('skip'), Evaluate()], 20), 2)
        assert_same(getattr(learn.model, 'model', learn.model), expected)

class Resetting(nn.Module):
    "Resets its StatefulRNN, as fastai's ModelResetter asks for in each evaluation"
    def __init__(self, model): super().__init__(); self.model = model
    def reset(self): self.model[0].reset()
    def forward(self, x): return self.model(x)

def overlap_loop(model, xs, ys, bad, bs=3):
    "Every block, backpropagation over it and the one before, from the state at the start of that; rows by themselves"
    rnn,head,opt,n_steps = model[0].rnn,model[1],torch.optim.Adam(model.parameters(), lr=1e-2),0
    steps = stream_by_hand(LENGTHS, bs, 20, range(len(LENGTHS)))
    states = [None]*bs
    for j in range(len(steps)):
        preds,targets,is_bad,kept = [],[],False,[None]*bs
        for row in range(bs):
            state = states[row]
            for k in range(max(j-1, 0), j+1):
                if k==j: kept[row] = None if state is None else state.detach()
                if steps[k][row] is None: continue
                i,a,b = steps[k][row]
                out,state = rnn(xs[i][None,a:b], None if a==0 else state)
                has_bad = any(i==s and a<=t<b for s,t in bad)
                is_bad = is_bad or has_bad
                if has_bad: state = None # what comes after it in this step is not trained on
                if k==j:
                    preds.append(head(out)[0])
                    targets.append(ys[i][a:b])
        states = kept
        if is_bad: continue
        n,n_steps = sum(map(len, targets)),n_steps+1
        (nn.functional.mse_loss(torch.cat(preds), torch.cat(targets))*(n/(bs*20))).backward()
        opt.step()
        opt.zero_grad()
    return model,n_steps

@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize('bad', [*PLANTED.values(), [(1, 20)], [(1, 39), (0, 3)]], ids=str)
def test_a_stream_with_an_overlap(bad, value):
    xs,ys = sequences()
    broken = [o.clone() for o in xs]
    for i,t in bad: broken[i][t,1] = value
    expected,n_steps = overlap_loop(net(), xs, ys, bad)
    learn = quiet(fit_own_lr, learner(stream_dls(broken, ys), net(), FiniteCB('skip', limit=99), Overlap(20, 40)), 1)
    assert len(learn.recorder.losses)==n_steps
    assert_same(learn.model, expected)

def test_a_washout_is_counted_from_where_a_row_began_anew():
    block = Block(np.array([0, 3, -1]), np.array([20, 40, 0]), np.array([4, 3, 0]), most=8)
    res = washed_out(block, {1: (3, 38), 0: (7, 20)}, 4)
    assert res.counts.tolist()==[[True]*4, [False,False,True,False], [False]*4]
    assert res.n_counted==5 and res.weight==5/8 and block.n_counted==7 and block.weight==7/8
    np.testing.assert_array_equal(res.counted_at, [0,1,2,3,6])
    assert washed_out(block, {1: (3, 36)}, 4) is block
    two = [Block(np.array([3]), np.array([a]), np.array([4])) for a in (40, 44)]
    run = BlockRun(two, SubWindow(0, 2, 0, 1.), 4)
    assert washed_out(run, {0: (3, 40)}, 6).counts.tolist()==[[False]*6+[True]*2]

def test_states_have_been_through_these_steps():
    a,b = (Block(np.array(seq), np.array(start), np.array([4, 4])) for seq,start in (([0, 3], [4, 8]), ([0, 5], [8, 0])))
    assert carried_steps(a, a).all()
    run = BlockRun([a, b], SubWindow(0, 2, 1, 1., 1), 4) # the next one begins with b
    assert carried_steps(run, a).tolist()==[[True]*4+[False]*4]*2
    assert carried_steps(run, b).tolist()==[[True]*8, [False]*4+[True]*4] # another sequence

class SeesStates(Callback):
    order = 2000
    def after_batch(self):
        reset = self.learn.tbptt_reset_cb
        if self.training: assert all(o.isfinite().all() for o in reset.owner.states.values())

def test_no_state_that_is_not_finite_outlives_its_step():
    x,y = data()
    x[5,13] = NAN
    learn = quiet(fit_own_lr, learner(window_dls(x, y), net(), [FiniteCB('skip'), SeesStates()]), 1)
    assert len(learn.recorder.losses)==10

def test_batches_that_continue_each_other():
    x,y = data()
    bad = x.clone()
    bad[5,13] = NAN # row 1 of the second batch
    dls = window_dls(bad, y)
    learn = quiet(fit_own_lr, learner(dls, net(), cb := FiniteCB('skip'), continuing=True), 1)
    model = net()
    rnn,head,opt,state = model[0].rnn,model[1],torch.optim.Adam(model.parameters(), lr=1e-2),None
    for b in range(4):
        for start,stop in SUBS:
            out,state = rnn(x[b*BS:(b+1)*BS,start:stop], state)
            state = state.detach()
            if (b,start)==(1,12):
                state[:,1] = 0
                continue
            (nn.functional.mse_loss(head(out), y[b*BS:(b+1)*BS,start:stop])*((stop-start)/SUB)).backward()
            opt.step()
            opt.zero_grad()
    assert_same(learn.model, model)
    assert len(cb.skipped)==1


# ---- what goes wrong in the model

class Breaks(nn.Module):
    "Is not finite in the n-th training step"
    def __init__(self, model, n, where):
        super().__init__()
        self.model,self.n,self.where = model,n,where
    def forward(self, x):
        self.n -= self.training
        is_now = self.n==0 and self.training
        if is_now and self.where=='state':
            handle = self.model[0].rnn.register_forward_hook(lambda m,a,o: (o[0], o[1].clone().index_fill(1, torch.tensor([2]), INF)))
        out = self.model(x)
        if is_now and self.where=='state': handle.remove()
        if is_now and self.where=='prediction': out = out+torch.zeros_like(out).index_fill(0, torch.tensor([2]), INF)
        if is_now and self.where=='gradient': out.register_hook(lambda g: g*NAN)
        return out

@pytest.mark.parametrize('where', ['prediction', 'state', 'gradient'])
@pytest.mark.parametrize('n', [1, 5, 6, 12])
def test_a_model_that_breaks_once(n, where):
    x,y = data()
    b,k = divmod(n-1, 3)
    expected,_ = by_hand(net(), x, y, {b: k}, 1)
    model = Breaks(net(), n, where)
    learn = quiet(fit_own_lr, learner(window_dls(x, y), model, cb := FiniteCB('skip'), check=False), 1)
    assert_same(learn.model.model, expected)
    named = dict(prediction='the prediction', state="the carried state of 'model.0' in row 2", gradient="the gradient of 'model.0.rnn.weight_ih_l0' and 5 others")
    assert len(cb.skipped)==1 and f'First found in {named[where]}.' in cb.skipped[0]

@pytest.mark.parametrize('where', ['prediction', 'state', 'gradient'])
def test_a_stop_leaves_the_weights_before_that_step(where):
    x,y = data()
    model = Breaks(net(), 5, where)
    learn = learner(window_dls(x, y), model, FiniteCB(), check=False)
    with pytest.raises(NotFiniteError) as e: fit_own_lr(learn, 1)
    expected,_ = by_hand(net(), x[:8], y[:8], {1: 1}, 1)
    assert_same(learn.model.model, expected)
    report = e.value.report
    assert (report.epoch, report.step, report.window, report.steps)==(0, 4, 1, 'steps 12:24 of 30')
    assert len(report.ranges)==3 and not any('NaN' in o or 'inf' in o for o in report.ranges)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.model[0].slot.state is None
    a,b = fit_own_lr(learn, 1),fit_own_lr(learner(window_dls(x, y), expected), 1) # it goes on as one with these weights
    a.opt.clear_state()
    assert len(a.recorder.losses)==12 and len(b.recorder.losses)==12

@pytest.mark.parametrize('what', [0, 1])
@pytest.mark.parametrize('n_target', [1, 3])
def test_the_report_names_row_step_and_range(what, n_target):
    x,y = (o.numpy() for o in data())
    xs,ys = [o.copy() for o in x],[np.repeat(o, n_target, 1) for o in y]
    data_ = (xs, ys)[what]
    data_[9][17,n_target-1 if what else 1] = NAN
    data_[9][19,0] = -INF
    dls = SequenceDataLoaders.from_arrays(xs, ys, win_sz=30, sub_seq_len=12, bs=4, shuffle=False, check=False, dtype=torch.float64, valid=(list(x[:2]), ys[:2]),
        x_names=['pressure','flow'], y_names=[f'y{i}' for i in range(n_target)])
    model = net()
    model[1] = nn.Linear(3, n_target).double()
    learn = learner(dls, model, FiniteCB())
    with pytest.raises(NotFiniteError) as e: fit_own_lr(learn, 1)
    report = e.value.report
    assert report.places[0]==('the targets' if what else 'the inputs')+', row 1, step 17' and report.window==2
    part = (np.stack(xs[8:12]),np.stack(ys[8:12]))
    for kind,o,names in zip(('input','target'), part, (['pressure','flow'], [f'y{i}' for i in range(n_target)])):
        for k,name in enumerate(names):
            v = o[:,12:24,k]
            good,text = v[np.isfinite(v)],next(r for r in report.ranges if r.startswith(f'{kind} {name} '))
            assert f'{good.min():.4g} to {good.max():.4g}' in text
            assert (f'{np.isnan(v).sum()} NaN' in text)==bool(np.isnan(v).any()) and (f'{np.isinf(v).sum()} inf' in text)==bool(np.isinf(v).any())

def test_the_report_of_a_stream_names_the_sequence():
    xs,ys = sequences()
    xs[4] = xs[4].clone()
    xs[4][61,0] = NAN
    learn = learner(stream_dls(xs, ys), net(), FiniteCB(), 20)
    with pytest.raises(NotFiniteError) as e: fit_own_lr(learn, 1)
    report = e.value.report
    assert report.places[0]=="the inputs, row 1 (sequence 's4'), step 61" and 's4[60:80]' in report.steps
    assert report.places[1]=="the carried state of '0' in row 1 ('s4')"

@pytest.mark.parametrize('time_dim', [0, -1])
def test_other_axes(time_dim):
    x,y = data()
    bad = x.clone()
    bad[5,13,1] = NAN
    move = (lambda o: o.transpose(0, 1)) if time_dim==0 else (lambda o: o.movedim(2, 1))
    batches = [(move(a), move(b)) for a,b in zip(bad.split(BS), y.split(BS))]
    class Moved(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return move(self.model(x.transpose(0, 1) if time_dim==0 else x.movedim(1, 2)))
    torch.manual_seed(0)
    model = Moved(net(stateful=lambda o: StatefulRNN(o)))
    dls = DataLoaders(torch.utils.data.DataLoader(batches, batch_size=None), torch.utils.data.DataLoader([batches[0]], batch_size=None), device='cpu')
    cb = FiniteCB('skip')
    learn = quiet(fit_own_lr, learner(dls, model, cb, time_dim=time_dim), 2)
    expected,_ = by_hand(net(), x, y, {1: 1})
    assert_same(learn.model.model, expected)
    assert 'the inputs, row 1, step 13' in cb.skipped[0] and 'input[1]' in cb.skipped[0]

def test_a_complex_state():
    x,y = (o.float() for o in data())
    bad = x.clone()
    bad[5,13] = NAN
    torch.manual_seed(0)
    model = nn.Sequential(StatefulRNN(LRU(2, 4)), nn.LazyLinear(1))
    model(x)
    model[0].reset()
    learn = quiet(fit_own_lr, learner(window_dls(bad, y), model, cb := FiniteCB('skip')), 2)
    assert len(cb.skipped)==2 and "the carried state of '0' in row 1" in cb.skipped[0]
    assert all(torch.view_as_real(p).isfinite().all() if p.is_complex() else p.isfinite().all() for p in model.parameters())

class Normed(nn.Module):
    def __init__(self, model): super().__init__(); self.norm,self.model = nn.BatchNorm1d(2).double(),model
    def forward(self, x): return self.model(self.norm(x.transpose(1, 2)).transpose(1, 2))

@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_running_statistics_are_those_before_the_step(policy):
    x,y = data()
    bad = x.clone()
    bad[13,0] = NAN # the last batch
    def trained(x, y, *cbs):
        learn = learner(window_dls(x, y), Normed(net()), cbs)
        try: quiet(fit_own_lr, learn, 1)
        except NotFiniteError: pass
        return learn
    expected,found = trained(x[:12], y[:12]),trained(bad, y, FiniteCB(policy))
    assert_same(found.model, expected.model, 0)
    assert found.model.norm.num_batches_tracked==9

def test_a_buffer_with_infinite_numbers_is_no_fault():
    class Masked(Normed):
        def __init__(self, model): super().__init__(model); self.register_buffer('mask', torch.full((3,3), -INF))
    x,y = data()
    learn = fit_own_lr(learner(window_dls(x, y), Masked(net()), FiniteCB()), 1)
    assert learn.model.mask.isinf().all()

def test_what_a_model_or_counts_takes_care_of_is_no_fault():
    x,y = data()
    bad_x,bad_y = x.clone(),y.clone()
    bad_x[5,13],bad_y[6,14] = NAN,NAN
    class Fills(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model(x.nan_to_num())
    learn = learner(window_dls(bad_x, bad_y), Fills(net()), FiniteCB(), counts=lambda y: ~y.isnan().any(-1))
    fit_own_lr(learn, 1)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_large_numbers_are_finite():
    x,y = data()
    class Large(nn.Module):
        def __init__(self, model): super().__init__(); self.model,self.scale = model,nn.Parameter(torch.full((4,), 1e308, dtype=torch.float64))
        def forward(self, x): return self.model(x)+0*self.scale.min()
    class Huge(Callback):
        def after_backward(self): self.learn.model.scale.grad = torch.full((4,), 1e308, dtype=torch.float64) # whose sum is infinite
        def before_step(self): self.learn.model.scale.grad = None
    learn = fit_own_lr(learner(window_dls(x, y), Large(net()), [FiniteCB(), Huge()]), 1)
    assert len(learn.recorder.losses)==12

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_one_number_in_many_tensors(dtype, value):
    tensors = [torch.ones(3, 5, dtype=dtype), torch.zeros((), dtype=torch.float32), torch.ones(0, dtype=dtype), torch.ones(7, dtype=torch.float64)]
    assert surely_finite(tensors)
    for i in (0, 1, 3):
        broken = [o.clone() for o in tensors]
        broken[i].view(-1)[-1] = value
        assert not surely_finite(broken)
    assert not surely_finite([torch.tensor([INF,-INF], dtype=dtype)])

@pytest.mark.filterwarnings('ignore:Sparse invariant checks')
def test_sparse_gradients():
    g = torch.sparse_coo_tensor([[1, 1]], torch.tensor([[1., NAN], [0., 0.]]), (3, 2))
    assert not surely_finite([g, torch.zeros(2)]) and surely_finite([torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))])

def test_ranges_of_classes_and_of_nothing():
    assert channel_ranges([torch.tensor([[3, 1, 2]])], 'input', None)==['input[0] 1 to 3']
    assert channel_ranges([torch.full((2, 3), NAN)], 'target', None)==['target[0] no finite value, 6 NaN']
    two = channel_ranges([torch.zeros(1, 2, 1), torch.ones(1, 3)], 'input', ['a'], timed=[True, False])
    assert two==['input a 0 to 0', 'input 1[0] 1 to 1', 'input 1[1] 1 to 1', 'input 1[2] 1 to 1']


# ---- half precision

class OnCpu(MixedPrecision):
    "With the autocast of the CPU, and a GradScaler there"
    def before_fit(self):
        self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', torch.bfloat16, enabled=False),torch.amp.GradScaler('cpu', **self.kwargs),[]

def scaled_by_hand(model, x, y, bad, init_scale):
    rnn,head,scaler = model[0].rnn,model[1],torch.amp.GradScaler('cpu', init_scale=init_scale)
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for b in range(4):
        state = None
        for k,(start,stop) in enumerate(SUBS):
            if bad.get(b)==k: break
            out,state = rnn(x[b*BS:(b+1)*BS,start:stop], state)
            state = state.detach()
            scaler.scale(nn.functional.mse_loss(head(out), y[b*BS:(b+1)*BS,start:stop])*((stop-start)/SUB)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    return model,scaler.get_scale()

@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_an_overflow_that_a_scaler_handles_is_no_fault(policy):
    x,y = (o.float()*30 for o in data())
    expected,scale = scaled_by_hand(net().float(), x, y, {}, 2.**127)
    mixed = OnCpu(init_scale=2.**127)
    learn = fit_own_lr(learner(window_dls(x, y), net().float(), [mixed, cb := FiniteCB(policy), watch := Scale()]), 1)
    assert_same(learn.model, expected, 1e-7)
    assert not cb.skipped and watch.last_scale==scale<2.**127 # it did overflow

class Scale(Callback):
    def after_batch(self):
        if self.training: self.last_scale = self.learn.scaler.get_scale()

@pytest.mark.parametrize('k', range(3))
def test_bad_data_is_a_fault_with_a_scaler_too_and_leaves_its_scale_alone(k):
    x,y = (o.float() for o in data())
    bad = x.clone()
    bad[5,SUBS[k][0]] = NAN
    expected,scale = scaled_by_hand(net().float(), x, y, {1: k}, 2.**10)
    learn = quiet(fit_own_lr, learner(window_dls(bad, y), net().float(), [OnCpu(init_scale=2.**10), cb := FiniteCB('skip'), watch := Scale()]), 1)
    assert_same(learn.model, expected, 1e-7)
    assert len(cb.skipped)==1 and watch.last_scale==scale==2.**10 and not torch.is_autocast_enabled('cpu')

class Entered(OnCpu):
    "Counts how often autocast is entered and left"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.depth = self,0
    def __enter__(self): self.depth += 1
    def __exit__(self, *args): self.depth -= 1

def test_each_autocast_that_was_entered_is_left():
    x,y = (o.float() for o in data())
    x[5,0] = NAN
    learn = quiet(fit_own_lr, learner(window_dls(x, y), net().float(), [mixed := Entered(init_scale=2.**10), FiniteCB('skip')]), 1)
    assert mixed.depth==0 and len(learn.recorder.losses)==9

@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_gradient_that_overflows_at_any_scale_is_a_fault(policy):
    x,y = (o.float() for o in data())
    model = Breaks(net().float(), 5, 'gradient')
    expected,scale = scaled_by_hand(net().float(), x, y, {1: 1}, 1.)
    learn = learner(window_dls(x, y), model, [OnCpu(init_scale=1.), cb := FiniteCB(policy), watch := Scale()], check=False)
    if policy=='skip':
        quiet(fit_own_lr, learn, 1)
        assert len(cb.skipped)==1 and len(learn.recorder.losses)==10 # and the scale is halved by fastai
        assert_same(learn.model.model, expected, 1e-7)
    else:
        with pytest.raises(NotFiniteError, match='First found in the gradient of'): fit_own_lr(learn, 1)


# ---- limits and refusals

def test_after_so_many_skipped_windows_it_stops():
    x,y = data()
    for i in (1, 5, 9): x[i,13] = NAN
    learn = learner(window_dls(x, y), net(), cb := FiniteCB('skip', limit=2))
    with pytest.raises(NotFiniteError, match=r'window 2,(.|\n)*2 windows were skipped before \(limit=2\)'): quiet(fit_own_lr, learn, 1)
    assert len(cb.skipped)==2
    with pytest.raises(NotFiniteError): quiet(fit_own_lr, learn, 1) # each fit has its own
    assert len(cb.skipped)==2
    with pytest.raises(NotFiniteError): fit_own_lr(learner(window_dls(x, y), net(), FiniteCB('skip', limit=0)), 1)
    assert len(quiet(fit_own_lr, learner(window_dls(x, y), net(), FiniteCB('skip', limit=3)), 1).recorder.losses)==3*1+3

def test_each_skipped_window_has_a_warning():
    x,y = data()
    x[5,13] = NAN
    with pytest.warns(UserWarning, match='A training step is skipped. NaN or inf in step 4 of epoch 0'):
        fit_own_lr(learner(window_dls(x, y), net(), FiniteCB('skip')), 1)

@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_weights_that_are_not_finite_end_it_at_once(policy):
    x,y = data()
    model = net()
    with torch.no_grad(): model[1].weight[0,1] = NAN
    learn = learner(window_dls(x, y), model, FiniteCB(policy), check=False)
    with pytest.raises(NotFiniteError, match="First found in the weights before the step: '1.weight'"): fit_own_lr(learn, 1)

@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_last_step_that_ruins_the_weights_is_an_error(policy):
    x,y = data()
    class Ruin(Callback):
        def after_step(self):
            if self.learn.train_iter==11: self.learn.model[1].bias.data.fill_(INF)
    learn = learner(window_dls(x, y), net(), [FiniteCB(policy), Ruin()])
    with pytest.raises(NotFiniteError, match="the weights after the step: '1.bias'"): fit_own_lr(learn, 1)

def test_without_the_callback_a_warning_says_that_weights_are_not_finite():
    x,y = data()
    x[5,13] = NAN
    for make in (lambda: learner(window_dls(x, y), net(), check=False), lambda: learner(window_dls(x, y), net(), sub=None, check=False)):
        with pytest.warns(UserWarning, match="After epoch 0 the weights are not finite: '0.rnn.weight_ih_l0' and 5 others(.|\n)*FiniteCB()"): fit_own_lr(make(), 1)
    x,y = data()
    fit_own_lr(learner(window_dls(x, y), net()), 1) # else a warning would be an error

def test_a_search_of_the_learning_rate_may_diverge():
    u,y = np.random.default_rng(0).standard_normal((2, 2000, 1)).astype(np.float32)
    dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, sub_seq_len=50, bs=4)
    learn = RNNLearner(dls, hidden_size=4, num_threads=1, loss_func=nn.MSELoss(), opt_func=sgd, cbs=[FiniteCB('skip', limit=0)])
    with learn.no_bar(): learn.lr_find(end_lr=1e30, stop_div=False, num_it=40, show_plot=False)
    fit(learn, 1, 1e-3)
    learn = RNNLearner(dls, hidden_size=4, num_threads=1, loss_func=nn.MSELoss(), opt_func=sgd)
    with learn.no_bar(): learn.lr_find(end_lr=1e30, stop_div=False, num_it=40, show_plot=False) # no warning, which would be an error

def test_accumulated_gradients_are_refused_or_looked_at():
    x,y = data()
    x[5,13] = NAN
    with pytest.raises(ValueError, match='GradientAccumulation adds up the gradients'):
        fit_own_lr(learner(window_dls(x, y), net(), [FiniteCB('skip'), GradientAccumulation(8)]), 1)
    learn = learner(window_dls(x, y), net(), [FiniteCB(), GradientAccumulation(8)])
    with pytest.raises(NotFiniteError, match='step 4 of epoch 0'): fit_own_lr(learn, 1)
    assert all(not p.grad.any() for p in learn.model.parameters() if p.grad is not None)

class Own(nn.Module):
    "Carries a state by itself"
    def __init__(self): super().__init__(); self.model,self.h = net(plain=True),None
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.model[0].rnn(x, self.h)
        self.h = h.detach()
        return self.model[1](out)

def test_a_model_that_carries_its_state_by_itself():
    x,y = data()
    for k in range(3):
        bad = x.clone()
        bad[5,SUBS[k][0]] = NAN
        expected,_ = by_hand(net(), x, y, {1: k})
        assert_same(quiet(fit_own_lr, learner(window_dls(bad, y), Own(), FiniteCB('skip')), 2).model.model, expected)
    xs,ys = ([o[:40] for o in seqs] for seqs in sequences())
    dls = stream_dls(xs, ys, bs=6)
    with pytest.raises(ValueError, match=r"policy is 'skip'.*but the reset\(\) of Own resets all rows"): fit_own_lr(learner(dls, Own(), FiniteCB('skip'), 20), 1)
    with pytest.raises(ValueError, match='resets all rows'): fit_own_lr(learner(window_dls(x, y), Own(), FiniteCB('skip'), continuing=True), 1)
    fit_own_lr(learner(dls, Own(), FiniteCB(), 20), 1)

def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"policy is 'drop'; expected one of \('stop', 'skip'\)"): FiniteCB('drop')
    with pytest.raises(ValueError, match='limit is -1'): FiniteCB(limit=-1)
    with pytest.raises(TypeError, match='limit'): FiniteCB(limit='a')
    x,y = data()
    with pytest.raises(ValueError, match='this learner has none'): fit_own_lr(Learner(window_dls(x, y), net(plain=True), loss_func=nn.MSELoss(), cbs=FiniteCB()), 1)

def test_several_processes_do_not_skip(monkeypatch):
    monkeypatch.setattr('tbptt_fastai.training.finite.num_distrib', lambda: 2)
    x,y = data()
    with pytest.raises(NotImplementedError, match='2 processes train together'): fit_own_lr(learner(window_dls(x, y), net(), FiniteCB('skip')), 1)

def test_an_evaluation_after_a_fit_keeps_its_reports():
    x,y = data()
    x[5,13] = NAN
    learn = quiet(fit_own_lr, learner(window_dls(x, y), net(), cb := FiniteCB('skip')), 1)
    with learn.no_bar():
        learn.validate()
        learn.get_preds(dl=learn.dls.train)
    assert len(cb.skipped)==1

@untaught_on_purpose
def test_a_washout_of_windows_and_steps_before_it():
    x,y = data()
    x[5,3] = NAN # in steps that have no loss and are run before the first that has one
    learn = quiet(fit_own_lr, learner(window_dls(x, y), net(), cb := FiniteCB('skip'), n_skip=12), 1)
    assert len(learn.recorder.losses)==6 and len(cb.skipped)==1
    assert 'First found in the inputs of steps without a loss, before this step' in cb.skipped[0]


# ---- with checkpoints

class Killed(BaseException): "As if the process were gone"

class KillAt(Callback):
    order = 2000
    def __init__(self, n): self.left = iter(range(n-1))
    def after_batch(self):
        if self.learn.training and next(self.left, None) is None: raise Killed

@pytest.mark.parametrize('data_', ['windows', 'stream'])
@pytest.mark.parametrize('n', [4, 5, 6, 7, 8, 17])
def test_a_training_that_was_killed_goes_on_with_what_was_left_out(tmp_path, n, data_):
    def make(path):
        if data_=='windows':
            x,y = data()
            x[5,13] = NAN
            return Learner(window_dls(x, y), net(), loss_func=nn.MSELoss(), opt_func=adam, lr=1e-2,
                cbs=[TbpttResetCB(SUB), FiniteCB('skip')], path=path)
        xs,ys = sequences()
        xs[1][105] = NAN
        cbs = [TbpttResetCB(20, n_skip=5, check=False), FiniteCB('skip')]
        return Learner(stream_dls(xs, ys), net(), loss_func=nn.MSELoss(), opt_func=adam, lr=1e-2, cbs=cbs, path=path)
    whole = quiet(fit_own_lr, make(tmp_path/'a'), 2, cbs=KillAt(10**9))
    learn = make(tmp_path/'b')
    with pytest.raises(Killed): quiet(fit_own_lr, learn, 2, cbs=[TbpttCheckpoint(every=2), KillAt(n)])
    again = quiet(fit_own_lr, make(tmp_path/'b'), 2, cbs=[TbpttCheckpoint(every=2, resume=True), KillAt(10**9)])
    assert_same(again.model, whole.model, 0)
    assert again.finite_cb.skipped==whole.finite_cb.skipped
    assert torch.equal(torch.stack(again.recorder.losses), torch.stack(whole.recorder.losses))


# ---- gradients whose squares are beyond the range of their type

class Larger(nn.Module):
    "The gradient of the n-th training step is that many times as large"
    def __init__(self, model, n, factor): super().__init__(); self.model,self.n,self.factor = model,n,factor
    def forward(self, x):
        out = self.model(x)
        self.n -= self.training
        if self.n==0 and self.training: out.register_hook(lambda g: g*self.factor)
        return out

def kept_by_optimizer(learn): return [o for state in getattr(learn.opt, 'opt', learn.opt).state.values() for o in state.values() if isinstance(o, torch.Tensor)]

@pytest.mark.parametrize('opt', [FusedAdam, Adam, adam])
@pytest.mark.parametrize('n', [1, 5, 12])
def test_a_gradient_whose_square_is_infinite_costs_one_window_and_no_mean_of_squares(n, opt):
    x,y = data()
    b,k = divmod(n-1, 3)
    def trained(bad=None):
        model = Larger(net(), n, 1e200) if bad is None else Breaks(net(), n, 'gradient')
        learn = learner(window_dls(x, y), model, cb := FiniteCB('skip'), opt=opt, check=False)
        return quiet(fit_own_lr, learn, 2),cb
    (learn,cb),(expected,_) = trained(),trained(bad=NAN)
    assert_same(learn.model.model, expected.model.model, 0)
    assert len(cb.skipped)==1 and "First found in the square of the gradient of 'model.0.rnn." in cb.skipped[0]
    assert all(o.isfinite().all() for o in kept_by_optimizer(learn)) and len(learn.recorder.losses)==24-(3-k)

def test_a_stop_before_a_step_with_such_a_gradient_leaves_weights_and_optimizer():
    x,y = data()
    learn = learner(window_dls(x, y), Larger(net(), 5, 1e200), FiniteCB(), check=False)
    with pytest.raises(NotFiniteError, match='square of the gradient'): fit_own_lr(learn, 1)
    expected,_ = by_hand(net(), x[:8], y[:8], {1: 1}, 1)
    assert_same(learn.model.model, expected)
    assert all(o.isfinite().all() for o in kept_by_optimizer(learn))

def test_a_gradient_that_is_clipped_is_as_large_as_the_optimizer_gets_it():
    x,y = data()
    class Scaled(Callback):
        def before_step(self):
            for p in self.learn.model.parameters(): p.grad.mul_(1e-200 if self.learn.model.n==0 else 1)
    learn = fit_own_lr(learner(window_dls(x, y), Larger(net(), 5, 1e200), [FiniteCB(), Scaled()], check=False), 1)
    assert len(learn.recorder.losses)==12

def test_a_learning_rate_of_one_step_is_put_back_where_it_is_left_out():
    x,y = data()
    learn = learner(window_dls(x, y), Larger(net(), 3, 1e200), FiniteCB('skip'), Jittered(12, std=3., rescale='lr'), check=False)
    set_seed(0)
    quiet(fit_own_lr, learn, 1)
    assert learn.opt.hypers[0]['lr']==1e-2

@pytest.mark.parametrize('own', [False, True])
def test_means_that_are_not_finite_at_the_end_of_an_epoch_are_said(own):
    x,y = data()
    class Spoils(Callback):
        order = 2000
        def after_step(self): kept_by_optimizer(self.learn)[2].fill_(INF) # a mean of squares: the weights stay as they are
    learn = learner(window_dls(x, y), net(), [Spoils(), *([FiniteCB()] if own else [])])
    if own:
        with pytest.raises(NotFiniteError, match="means of the optimizer after the step: '0.rnn.weight_ih_l0'"): fit_own_lr(learn, 1)
    else:
        with pytest.warns(UserWarning, match="the means of the optimizer are not finite: '0.rnn.weight_ih_l0'"): fit_own_lr(learn, 1)
