"Plain layers inside a model of the user's carry their state while training, and the model stays what it was"
import copy, io
from functools import partial
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.progress import ProgressCallback # with it comes Learner.no_bar
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import TensorBase, set_seed
from torch import nn
from helpers import adam, fit, fit_own_lr, item_loaders, learner, untaught_on_purpose
from reference import shuffled_epochs, train_tbptt, windows_by_hand
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.state.carry import Carry, recurrent_layers
from tbptt_fastai.state.stateful import StatefulRNN

SEED,N_EPOCH,LR,WIN,SUB,BS = 3,2,1e-2,120,50,5


class Plain(nn.Module):
    "A model as people write it"
    def __init__(self, rnn=None, head=None):
        super().__init__()
        self.rnn,self.head = rnn or nn.LSTM(2, 6, batch_first=True),head or nn.Linear(6, 1)
    def forward(self, x):
        out,_ = self.rnn(x)
        return self.head(out)

class HidesKeyword(Plain):
    def forward(self, x): return self.head(self.rnn(input=x, hx=None)[0])

class OwnZeros(Plain):
    def forward(self, x): return self.head(self.rnn(x, (x.new_zeros(1, len(x), 6), x.new_zeros(1, len(x), 6)))[0])

class TwoRoles(nn.Module):
    "An encoder that carries, and a decoder that gets its state from the encoder"
    def __init__(self):
        super().__init__()
        self.enc,self.dec,self.out = nn.GRU(2, 4, batch_first=True),nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1)
    def forward(self, x):
        out,h = self.enc(x)
        return self.out(out+self.dec(x, h)[0])

class StepByStep(Plain):
    "Only the first call has no state: which of its states to keep cannot be known"
    def forward(self, x):
        h,out = None,[]
        for x_t in x.split(1, dim=1):
            o,h = self.rnn(x_t, h)
            out.append(o)
        return self.head(torch.cat(out, 1))

class Packed(Plain):
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]]*len(x), batch_first=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


@pytest.fixture
def xy(signals): return windows_by_hand(*map(torch.from_numpy, signals), WIN, 60)

def plain_learner(xy, model, **kwargs):
    set_seed(SEED)
    dls = item_loaders(list(zip(*xy)), bs=BS, shuffle=True)
    return learner(dls, model, SUB, loss_func=nn.functional.l1_loss, opt_func=adam, **kwargs)

def assert_clean(model, keys):
    "No hook, no state, no attribute is left"
    for m in model.modules():
        assert not (m._forward_hooks or m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs or m._forward_hooks_with_kwargs)
        assert not isinstance(vars(m).get('_state'), (torch.Tensor,tuple)) and 'forward' not in vars(m) and 'carry_in_evaluation' not in vars(m)
    assert list(model.state_dict())==keys


@pytest.mark.parametrize('kind', [Plain, HidesKeyword])
@pytest.mark.parametrize('rnn', [partial(nn.LSTM, num_layers=2), nn.GRU, nn.RNN])
def test_one_line_on_a_learner_equals_the_loop_by_hand(xy, rnn, kind):
    torch.manual_seed(0)
    model = kind(rnn(2, 6, batch_first=True))
    by_hand,keys = copy.deepcopy(model),list(model.state_dict())
    fit(plain_learner(xy, model), N_EPOCH)
    train_tbptt(by_hand.rnn, by_hand.head, *xy, shuffled_epochs(len(xy[0]), BS, N_EPOCH, SEED), SUB, LR, nn.functional.l1_loss)
    for a,b in zip(model.parameters(), by_hand.parameters()): assert torch.equal(a, b)
    assert_clean(model, keys)


def test_a_layer_with_a_state_of_its_own_is_left_alone(xy):
    torch.manual_seed(0)
    model = TwoRoles()
    x,seen = torch.randn(4, 100, 2),[]
    model.dec.register_forward_pre_hook(lambda m,args: seen.append(args[1].clone()))
    enc = copy.deepcopy(model.enc)
    with Carry(model):
        for part in x.split(50, dim=1): model(part)
    h1 = enc(x[:,:50])[1]
    torch.testing.assert_close(seen, [h1, enc(x[:,50:], h1)[1]])


@pytest.mark.parametrize('model,exc,message', [
    (OwnZeros, ValueError, r'OwnZeros gives its recurrent layers \(rnn\) a state of its own'),
    (StepByStep, ValueError, 'LSTM rnn is called twice in one forward pass'),
    (Packed, TypeError, 'not over a PackedSequence'),
    (partial(Plain, nn.GRU(2, 3, bidirectional=True, batch_first=True)), ValueError, r'GRU \(rnn\) is bidirectional'),
])
def test_what_cannot_be_carried_is_refused_before_anything_is_learned(xy, model, exc, message):
    model = model()
    keys,before = list(model.state_dict()),copy.deepcopy(model.state_dict())
    with pytest.raises(exc, match=message):
        learn = plain_learner(xy, model)
        fit(learn, N_EPOCH)
    assert_clean(model, keys)
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])


@pytest.mark.parametrize('model', [StepByStep, Packed, OwnZeros])
def test_full_backpropagation_takes_any_model(xy, model):
    learn = plain_learner(xy, model())
    learn.tbptt_reset_cb.sub_seq_len = None
    fit(learn, 1)
    assert len(learn.recorder.losses)==len(learn.dls.train)


class Breaks(Plain):
    "Fails in the middle of its forward pass, with the hooks in place"
    fail_at,calls = None,0
    def forward(self, x):
        out,_ = self.rnn(x)
        self.calls += self.training
        if self.calls==self.fail_at: raise self.exc
        return self.head(out)

@pytest.mark.parametrize('exc', [KeyboardInterrupt('stop'), RuntimeError('in the model')])
def test_a_failing_model_is_left_as_it_was(xy, exc):
    model = Breaks()
    keys,start = list(model.state_dict()),copy.deepcopy(model.state_dict())
    learn = plain_learner(xy, model)
    model.fail_at,model.exc = 5,exc
    with pytest.raises(type(exc)): fit(learn, 1, 0.)
    assert_clean(model, keys)
    assert 'all_batches' not in vars(learn)
    model.fail_at = None
    model.load_state_dict(start)
    fresh = plain_learner(xy, copy.deepcopy(model))
    with fresh.no_bar(), learn.no_bar(): assert list(learn.validate())==list(fresh.validate())
    fit(fresh, N_EPOCH)
    learn.dls,learn.opt = plain_learner(xy, model).dls,None
    fit(learn, N_EPOCH)
    for a,b in zip(model.parameters(), fresh.model.parameters()): assert torch.equal(a, b)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

@pytest.mark.parametrize('copied', [copy.deepcopy, pickled])
def test_a_copy_made_in_mid_fit_carries_nothing(xy, copied):
    class Copy(Callback):
        order = 99
        def after_batch(self): copies[self.training] = copied(self.model)
    copies,learn = {},plain_learner(xy, Plain())
    learn.add_cb(Copy())
    fit(learn, 1)
    x = torch.randn(4, 20, 2)
    for training in (True, False):
        first = copies[training].train()(x)
        assert torch.equal(copies[training](x), first)


def test_saved_files_are_those_of_the_plain_model(xy, tmp_path):
    "... in size, in content, and they load where this package is not installed"
    def saved(model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return buffer.getvalue()
    model = Plain()
    size = len(saved(model))
    fit(plain_learner(xy, model), 1)
    data = saved(model)
    assert len(data)==size and b'tbptt_fastai' not in data


def test_a_removed_callback_is_gone(xy):
    learn = plain_learner(xy, Plain())
    class Fail(Callback):
        order = 13
        def before_train(self): raise RuntimeError('before the first batch')
    learn.add_cb(Fail())
    with pytest.raises(RuntimeError): fit(learn, 1)
    learn.remove_cbs([Fail, TbpttResetCB])
    calls = []
    learn.model.rnn.register_forward_pre_hook(lambda m,args: calls.append(len(args)))
    fit(learn, 1)
    assert set(calls)=={1} and len(learn.recorder.losses)==len(learn.dls.train)


def test_evaluation_in_pieces_leaves_the_training_state_alone():
    model,x = nn.Sequential(StatefulRNN(nn.GRU(2, 3, batch_first=True)), Plain(nn.LSTM(3, 6, batch_first=True))),torch.randn(2, 30, 2)
    whole = model.eval()(x)
    model.train()(x)
    state = model[0].state.clone()
    model.eval()
    with Carry(model, evaluation=True): parts = torch.cat([model(o) for o in x.split(7, dim=1)], 1)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(model[0].state, state)
    torch.testing.assert_close(model(x), whole)


@pytest.mark.parametrize('stateful', [True,False])
def test_a_cancelled_sub_window_does_not_leak_a_state(xy, stateful):
    "The first sub-window of a window is skipped by another callback: what follows starts from zeros, not from the window before"
    class Skip(Callback):
        order = 0
        def before_batch(self):
            if self.training and self.train_iter==3: raise CancelBatchException
    class See(Callback):
        order = 40
        def __init__(self): self.preds = []
        def after_pred(self):
            if self.training: self.preds.append((self.x.clone(), self.pred.detach()))
    torch.manual_seed(0)
    model = nn.Sequential(StatefulRNN(nn.LSTM(2, 6, batch_first=True)), nn.Linear(6, 1)) if stateful else Plain()
    see = See()
    learn = plain_learner(xy, model)
    learn.add_cbs([Skip(), see])
    fit(learn, 1, 0.)
    x,pred = see.preds[3] # the second sub-window of the second window
    torch.testing.assert_close(pred, model.eval()(x))


@pytest.mark.parametrize('where', ['before_train','after_batch','after_epoch'])
@pytest.mark.parametrize('stateful', [True,False])
def test_an_evaluation_in_the_middle_changes_nothing(xy, where, stateful):
    "... whether it comes before the training of an epoch or within a window, if learner and loader are put back"
    class Evaluate(Callback):
        order = 20
        def evaluate(self):
            learn = self.learn
            kept = {k:getattr(learn, k) for k in ('dl','iter','n_iter','training','train_iter','pct_train','epoch','n_epoch','xb','yb','pred','loss') if k in vars(learn)}
            with learn.no_logging(), learn.no_bar():
                recorder = learn.recorder
                learn.remove_cb(recorder)
                with learn.removed_cbs([self]): learn.get_preds()
                learn.add_cb(recorder)
            for k,v in kept.items(): setattr(learn, k, v)
            learn.model.train(learn.training)
        def __getattr__(self, k):
            if k==where: return self.evaluate if where!='after_batch' or (self.learn.training and self.learn.train_iter in (2,4)) else lambda: None
            return super().__getattr__(k)
    def trained(cbs):
        torch.manual_seed(0)
        model = nn.Sequential(StatefulRNN(nn.LSTM(2, 6, batch_first=True)), nn.Linear(6, 1)) if stateful else Plain()
        learn = plain_learner(xy, model)
        learn.add_cbs(cbs)
        fit(learn, 1)
        return model
    for a,b in zip(trained([Evaluate()]).parameters(), trained([]).parameters()): assert torch.equal(a, b)


def test_an_evaluation_that_takes_the_prepared_run_is_no_silent_loss(xy):
    class Evaluate(Callback):
        def before_epoch(self):
            learn = self.learn
            with learn.removed_cbs([self]), learn.no_logging(): learn.get_preds()
    for order,ok in ((11,True), (20,False)):
        learn,cb = plain_learner(xy, Plain()),Evaluate()
        cb.order = order
        if ok: fit_with(learn, cb)
        else:
            with pytest.raises(RuntimeError, match='another callback evaluated in `before_epoch`'): fit_with(learn, cb)


def test_a_learner_copied_after_a_failure_is_on_its_own(xy):
    class Fail(Callback):
        order = 13
        def before_train(self): raise RuntimeError('before the first batch')
    learn = plain_learner(xy, Plain())
    with pytest.raises(RuntimeError): fit_with(learn, Fail())
    other = copy.deepcopy(learn)
    before = copy.deepcopy(learn.model.state_dict())
    other.remove_cb(TbpttResetCB)
    fit(other, 1)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

def fit_with(learn, cb):
    fit_own_lr(learn, 1, cbs=cb)


def test_a_frozen_layer_in_evaluation_mode_carries_as_well(xy):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc,self.dec,self.out = StatefulRNN(nn.GRU(2, 4, batch_first=True)),nn.GRU(4, 4, batch_first=True),nn.Linear(4, 1)
        def train(self, mode=True):
            super().train(mode)
            self.enc.eval()
            return self
        def forward(self, x): return self.out(self.dec(self.enc(x))[0])
    torch.manual_seed(0)
    model,x = Frozen(),torch.randn(3, 40, 2)
    whole = model.eval()(x)
    model.train()
    with Carry(model): parts = torch.cat([model(o) for o in x.split(15, dim=1)], 1)
    torch.testing.assert_close(parts, whole)


def test_a_layer_over_another_axis_is_refused(xy):
    class PerFrame(nn.Module):
        "Reads the two values of each step as a sequence, then the steps"
        def __init__(self):
            super().__init__()
            self.frame,self.time,self.out = nn.GRU(1, 3, batch_first=True),nn.GRU(3, 4, batch_first=True),nn.Linear(4, 1)
        def forward(self, x):
            frames = self.frame(x.reshape(-1, 2, 1), *self.own(x))[1][0]
            return self.out(self.time(frames.view(*x.shape[:2], 3))[0])
        def own(self, x): return ()
    class OwnState(PerFrame):
        def own(self, x): return (x.new_zeros(1, x.shape[0]*x.shape[1], 3),)
    with pytest.raises(ValueError, match='runs over another axis than time'): fit(plain_learner(xy, PerFrame()), 1)
    model = OwnState()
    fit(plain_learner(xy, model), 1) # left alone
    whole = model.eval()(xy[0][:3])
    model.train()
    with Carry(model): parts = torch.cat([model(o) for o in xy[0][:3].split(50, dim=1)], 1)
    torch.testing.assert_close(parts, whole)


@untaught_on_purpose
def test_the_warm_up_of_a_washout_needs_no_graph(xy):
    seen = []
    class Look(Plain):
        def forward(self, x):
            seen.append((x.shape[1], torch.is_grad_enabled(), type(x) is torch.Tensor))
            return super().forward(x)
    set_seed(SEED)
    typed = [(TensorBase(x), TensorBase(y)) for x,y in zip(*xy)]
    dls = DataLoaders(*[TfmdDL(typed, bs=BS, num_workers=0)]*2)
    learn = Learner(dls, Look(), loss_func=nn.functional.l1_loss, opt_func=adam, cbs=TbpttResetCB(SUB, n_skip=50, check=False))
    fit(learn, 1)
    assert seen[:3]==[(50,False,True), (50,True,True), (20,True,True)]


@untaught_on_purpose
def test_the_loaders_tell_inputs_from_targets(xy):
    "`dls.n_inp`, as fastai's own split has it"
    x,y = xy
    dls = DataLoaders(*[torch.utils.data.DataLoader(list(zip(x, y, torch.arange(len(x)))), BS)]*2)
    dls.n_inp = 1
    learn = Learner(dls, Plain(), loss_func=lambda p,y,label: nn.functional.l1_loss(p, y), opt_func=adam, cbs=TbpttResetCB(SUB, n_skip=60))
    fit(learn, 1)
    assert len(learn.recorder.losses)==2*len(dls.train)


def test_a_layer_in_two_roles_is_refused_whatever_comes_first():
    x,h = torch.randn(3, 10, 2),torch.zeros(1, 3, 2)
    class Roles(nn.Module):
        def __init__(self, rnn, calls):
            super().__init__()
            self.rnn,self.calls = rnn,calls
        def forward(self, x): return [self.rnn(x, *o) for o in self.calls]
    for rnn,calls in ((StatefulRNN(nn.GRU(2, 2, batch_first=True)),[(),()]), (nn.GRU(2, 2, batch_first=True),[(h,),()]), (nn.GRU(2, 2, batch_first=True),[(),(h,)])):
        model = Roles(rnn, calls)
        with pytest.raises(ValueError, match='rnn is called twice in one forward pass'), Carry(model): model(x)
    with Carry(model := Roles(nn.GRU(2, 2, batch_first=True), [(h,),(h,)])): model(x) # left alone


def test_a_layer_in_a_StatefulRNN_is_not_carried_twice():
    model = nn.ModuleDict(dict(a=StatefulRNN(nn.GRU(2, 2)), b=nn.GRU(2, 2)))
    assert list(recurrent_layers(model).values())==['b']
