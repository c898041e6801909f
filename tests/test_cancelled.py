"Whatever is cancelled or evaluated in between, a state never goes from one sequence to another"
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit, sgd, untaught_on_purpose
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.truncation.plan import SubWindow, Truncation
from tbptt_fastai.truncation.schemes import Exact, Overlap, RandomUnbiased

LENGTHS = 8,12,8,8


def sequences(lengths=LENGTHS):
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(n, 2, generator=g) for n in lengths]
    return xs,[x[:,:1] for x in xs]

def stream(lengths=LENGTHS, sub_seq_len=4, bs=2, **kwargs):
    return StreamDL(Sequences(*sequences(lengths), **kwargs), bs=bs, sub_seq_len=sub_seq_len)

def model(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(StatefulRNN(nn.GRU(2, 4, batch_first=True), **kwargs), nn.Linear(4, 1))

def plain():
    torch.manual_seed(0)
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1)
        def forward(self, x): return self.out(self.rnn(x)[0])
    return Plain()

class Cancel(Callback):
    "Cancel the n-th batches of a run, counted from 0"
    order = 13
    def __init__(self, *at, training=True): self.at,self.when = at,training
    def before_train(self): self.n = -1
    before_validate = before_train
    def before_batch(self):
        self.n += 1
        if self.training==self.when and self.n in self.at: raise CancelBatchException()

class Predicted(Callback):
    "Every prediction, with the block that it is for"
    order = 95
    def __init__(self, training=True): self.when,self.blocks,self.preds = training,[],[]
    def after_pred(self):
        if self.training!=self.when: return
        self.blocks.append(self.dl.sub_window)
        self.preds.append(self.pred.detach().clone())

def predictions_by_row(seen):
    "(sequence, first step) and predictions of each row of each block"
    for block,pred in zip(seen.blocks, seen.preds):
        rows = [(s,a,n) for s,a,n in zip(block.seq, block.start, block.n) if n]
        for (s,a,_),o in zip(rows, pred.split([int(n) for *_,n in rows])): yield s,a,o

@pytest.mark.parametrize('make', [model, plain])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('at', range(5))
def test_a_cancelled_block_leaves_no_state_of_another_sequence(make, training, at):
    "A row goes on from what it has seen of its own sequence"
    dl,seen,m = stream(),Predicted(training),make()
    learn = Learner(DataLoaders(dl, dl), m, MSELossFlat(), opt_func=sgd, cbs=[TbpttResetCB(), Cancel(at, training=training), seen])
    if training: fit(learn, 1, 0.)
    else:
        with learn.no_bar(): learn.validate()
    xs,_ = sequences()
    cancelled = list(dl.sub_windows().layout)[at]
    skipped = set(zip(cancelled.seq, cancelled.start))
    m.eval()
    for s,a,pred in predictions_by_row(seen):
        x = torch.cat([xs[s][b:b+4] for b in range(0, a+1, 4) if (s,b) not in skipped])
        with torch.no_grad(): assert torch.allclose(pred, m(x[None])[0,-len(pred):], atol=1e-6), (s, a)
    assert len(seen.preds)==4

@pytest.mark.parametrize('draw', [True, False])
def test_every_epoch_of_a_stream_draws_anew_where_sequences_begin(draw):
    lambdas = []
    class Watch(Callback):
        order = 99
        def after_pred(self):
            if self.training: lambdas.append(self.learn.mix_up.lam.flatten()[0].item())
    dl = stream((20, 20, 20), 10, 3)
    mixup = once_per_window(MixUp()) if draw else MixUp()
    set_seed(0)
    fit(Learner(DataLoaders(dl, dl), model(), nn.MSELoss(), opt_func=sgd, cbs=[TbpttResetCB(), mixup, Watch()]), 3)
    if draw: assert lambdas[::2]==lambdas[1::2] and len({*lambdas})==3
    else: assert len({*lambdas})==6

@pytest.mark.parametrize('windows', [True, False])
def test_an_export_holds_no_data_of_what_was_drawn_for(windows, tmp_path):
    xs,ys = sequences((5000, 5000))
    if windows: dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=5000, sub_seq_len=2500, bs=2)
    else: dls = DataLoaders(stream((5000, 5000), 2500), stream((5000, 5000), 2500))
    learn = Learner(dls, model(), nn.MSELoss(), opt_func=sgd, cbs=[TbpttResetCB(), once_per_window(MixUp())])
    fit(learn)
    learn.path = tmp_path
    learn.export('learner.pkl')
    data = (tmp_path/'learner.pkl').read_bytes()
    assert not any(x.numpy().tobytes()[i:][:64] in data for x in xs for i in (0, 4000, -64))

@pytest.mark.parametrize('n_skip', [0, 3])
@pytest.mark.parametrize('windows', [True, False])
def test_the_first_batch_of_an_evaluation_can_be_cancelled(windows, n_skip):
    if windows: dls = SequenceDataLoaders.from_arrays(*sequences((12, 12, 12)), valid=sequences((12, 12, 12)), win_sz=12, sub_seq_len=4, bs=1)
    else: dls = DataLoaders(stream(), stream())
    def validated(*cbs):
        learn = Learner(dls, model(), MSELossFlat(), opt_func=sgd, cbs=[TbpttResetCB(n_skip=n_skip), *cbs])
        with learn.no_bar(): return learn.validate(dl=dls.train.new(shuffle=False))
    class Drop(Callback):
        "Its metrics are left out as well"
        order = 13
        def before_validate(self): self.n = 0
        def before_batch(self):
            self.n += 1
            if self.n==1: raise CancelBatchException()
        def after_cancel_batch(self): self.learn.yb = ()
    assert validated()[0]!=validated(Drop())[0]>0

@untaught_on_purpose
def test_a_search_with_a_warm_up_draws_as_the_training_does():
    "The dropout of the model that goes along is not the model's"
    def drawn(search):
        set_seed(0)
        xs,ys = sequences((30, 30, 30, 30))
        dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=30, sub_seq_len=5, bs=2, shuffle=False)
        torch.manual_seed(0)
        net = nn.Sequential(StatefulRNN(nn.GRU(2, 4, batch_first=True)), nn.Dropout(.5), nn.Linear(4, 1))
        seen = Predicted()
        learn = Learner(dls, net, MSELossFlat(), opt_func=sgd, cbs=[TbpttResetCB(n_skip=7), seen])
        torch.manual_seed(1)
        if search:
            with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1e-30, end_lr=1e-29, num_it=6, show_plot=False, suggest_funcs=())
        else: fit(learn, 1, 1e-30)
        return seen.preds[:6]
    for a,b in zip(drawn(True), drawn(False), strict=True): assert torch.equal(a, b)

def test_an_evaluation_between_two_steps_leaves_groups_and_states_alone():
    groups = list('abcd')
    def trained(evaluate):
        torch.manual_seed(0)
        rnn = nn.GRU(2, 4, batch_first=True)
        first = learned_state(rnn, groups=groups)
        with torch.no_grad():
            for p in first.parameters(): p.normal_()
        xs,ys = sequences()
        valid = StreamDL(Sequences(xs[2:], ys[2:], groups=list('da')), bs=2)
        seen = Predicted()
        class Evaluate(Callback):
            order = 13
            def before_batch(self):
                if not self.training or not evaluate: return
                kept = {k:getattr(self.learn, k) for k in ('dl', 'iter', 'n_iter', 'xb', 'yb', 'training')}
                self.learn._do_epoch_validate(1)
                for k,v in kept.items(): setattr(self.learn, k, v)
                self.model.train()
        dls = DataLoaders(stream(groups=groups), valid)
        learn = Learner(dls, nn.Sequential(StatefulRNN(rnn, initial=first), nn.Linear(4, 1)), MSELossFlat(), opt_func=sgd,
                        cbs=[TbpttResetCB(), seen, Evaluate()])
        fit(learn, 1, 0.)
        return [(repr(b), p) for b,p in zip(seen.blocks, seen.preds) if b.steps<=4]
    a,b = trained(False),trained(True)
    assert len(a)>4
    for (block,pred),(other,same) in zip(a, [o for o in b if o[0] in {r for r,_ in a}]): assert block==other and torch.equal(pred, same)

class Twice(Truncation):
    "Each part twice: the second time from where the first began"
    block = 4
    def plan(self, win_sz, rng):
        for start in range(0, win_sz, 4):
            stop = min(start+4, win_sz)
            yield SubWindow(start, stop, start, carry=start)
            yield SubWindow(start, stop, start)

@pytest.mark.parametrize('make', [model, plain])
@pytest.mark.parametrize('kind', ['windows', 'stream', 'uneven'])
def test_a_part_that_is_run_twice_starts_from_the_same_state(make, kind):
    lengths = (16, 9, 13, 6) if kind=='uneven' else (16, 16, 16, 16)
    xs,ys = sequences(lengths)
    if kind=='windows': dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=16, bs=2, shuffle=False)
    else: dls = DataLoaders(stream(lengths), stream(lengths))
    seen,m = Predicted(),make()
    fit(Learner(dls, m, MSELossFlat(), opt_func=sgd, cbs=[TbpttResetCB(truncation=Twice()), seen]), 1, 0.)
    for a,b in zip(seen.preds[::2], seen.preds[1::2]): assert torch.equal(a, b)
    if kind=='uneven': return
    with torch.no_grad(): whole = m.eval()(torch.stack(xs[:2]))
    assert torch.allclose(torch.cat([o.view(2, 4, 1) for o in seen.preds[:8:2]], 1), whole, atol=1e-6)

@pytest.mark.parametrize('scheme', [Overlap(4, 8), RandomUnbiased(8, block=4), Exact(5)], ids=repr)
def test_a_call_that_is_cancelled_leaves_no_pieces_behind(scheme):
    xs,ys = sequences((24, 24, 24, 24))
    dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=24, bs=2)
    m,calls = model(),[]
    def cancel(module, args):
        if not module.training: return
        calls.append(1)
        if len(calls)==2: raise CancelBatchException()
    m.register_forward_pre_hook(cancel)
    fit(Learner(dls, m, MSELossFlat(), opt_func=sgd, cbs=TbpttResetCB(truncation=scheme)), 2)
    assert len(calls)>6
