"Batches that continue each other, row by row: the text path of fastai, and lists of batches against loops by hand"
import copy, warnings
from functools import partial
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.rnn import ModelResetter
from fastai.callback.schedule import Learner # noqa: with it comes lr_find
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import Perplexity, accuracy
from fastai.text.data import LMDataLoader, TensorText
from fastai.text.learner import LMLearner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastai.torch_core import set_seed
from torch import nn
from torch.utils._pytree import tree_map
from helpers import adam, fit, learner, sgd
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.views import SubWindows
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.truncation.schemes import Overlap

VOCAB,SEQ,BS = 12,8,4


def documents(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(TensorText(torch.randint(2, VOCAB, (int(k),), generator=g)),) for k in torch.randint(20, 50, (n,), generator=g)]

def text_loaders(shuffle=True, seq_len=SEQ):
    "A last batch of fewer steps; documents are shuffled in each epoch"
    train = LMDataLoader(documents(), bs=BS, seq_len=seq_len, shuffle=shuffle, num_workers=0)
    valid = LMDataLoader(documents(4, 1), bs=BS, seq_len=seq_len, shuffle=False, num_workers=0)
    assert train.last_len!=seq_len and valid.last_len!=seq_len
    return DataLoaders(train, valid)

def language_model(dropout=0.):
    "Dropout of weights is never 0: there fastai puts a parameter in the place of a tensor, and fails in the next reset"
    ps = {o:p*dropout for o,p in awd_lstm_lm_config.items() if o.endswith('_p')}
    config = {**awd_lstm_lm_config, **ps, 'weight_p': max(ps['weight_p'], 1e-12), 'emb_sz': 6, 'n_hid': 10, 'n_layers': 2}
    return get_language_model(AWD_LSTM, VOCAB, config=config)

class Seen(Callback):
    "The first state of every batch, as the model has it when it is called; and losses"
    order = 70
    def __init__(self): self.begins,self.losses = [],[]
    def before_batch(self):
        self.begins.append((self.training, all(o.abs().max()==0 for h in self.model[0].hidden for o in h)))
    def after_batch(self): self.losses.append((self.training, self.learn.loss.item()))

def text_learner(cbs=(), dropout=0., **kwargs):
    set_seed(0)
    seen = Seen()
    learn = LMLearner(text_loaders(**kwargs), language_model(dropout), loss_func=CrossEntropyLossFlat(), cbs=[seen, *cbs], metrics=[accuracy, Perplexity()])
    return learn,seen

def trained(cbs=(), n_epoch=3, **kwargs):
    learn,seen = text_learner(cbs, **kwargs)
    return fit(learn, n_epoch, 1e-2),seen


@pytest.mark.parametrize('dropout', [0., 1.])
@pytest.mark.parametrize('sub_seq_len', [None, SEQ])
def test_one_line_leaves_the_text_path_of_fastai_as_it_is(sub_seq_len, dropout):
    "The whole batch as sub-window: the same losses, metrics and parameters, and as many states begin anew"
    (plain,a),(ours,b) = trained(dropout=dropout),trained([TbpttResetCB(sub_seq_len)], dropout=dropout)
    assert a.losses==b.losses and plain.recorder.values==ours.recorder.values
    for p,q in zip(plain.model.parameters(), ours.model.parameters(), strict=True): assert torch.equal(p, q)
    assert a.begins==b.begins and [sum(new for t,new in a.begins if t==training) for training in (True,False)]==[3, 3]
    with plain.no_bar(), ours.no_bar():
        assert plain.validate()==ours.validate()
        for p,q in zip(plain.get_preds(reorder=False), ours.get_preds(reorder=False), strict=True): assert torch.equal(p, q)


def state_of(model): return model[0].hidden

@pytest.mark.parametrize('sub_seq_len', [3, 5])
def test_smaller_sub_windows_are_the_loop_by_hand(sub_seq_len):
    "Gradients go back over a sub-window, the state through the whole epoch; the loss of a shorter one counts by its steps"
    set_seed(0)
    dls,model,by_hand = text_loaders(shuffle=False),language_model(),language_model()
    by_hand.load_state_dict(model.state_dict())
    learn = LMLearner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=adam, alpha=0., beta=0., cbs=TbpttResetCB(sub_seq_len))
    fit(learn, 2, 1e-2)
    opt = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    for _ in range(2):
        by_hand.train()
        by_hand.reset()
        for x,y in dls.train:
            x,y = (o.as_subclass(torch.Tensor) for o in (x, y))
            for a,b in zip(x.split(sub_seq_len, 1), y.split(sub_seq_len, 1)):
                loss = nn.functional.cross_entropy(by_hand(a)[0].flatten(0, 1), b.flatten())*(a.shape[1]/min(sub_seq_len, x.shape[1]))
                loss.backward()
                opt.step()
                opt.zero_grad()
    for p,q in zip(model.parameters(), by_hand.parameters(), strict=True): torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
    by_hand.eval()
    by_hand.reset()
    with torch.no_grad(): losses = [nn.functional.cross_entropy(by_hand(x.as_subclass(torch.Tensor))[0].flatten(0, 1), y.as_subclass(torch.Tensor).flatten()).item() for x,y in dls.valid]
    with learn.no_bar(): assert learn.validate()[0]==pytest.approx(sum(losses)/len(losses), abs=1e-5)


def signal_batches(n=5, rows=4, steps=10, seed=0):
    "One signal for each row, cut in batches; the last is shorter"
    torch.manual_seed(seed)
    u = torch.randn(rows, n*steps-3, 1)
    y = torch.sin(u.cumsum(1)/3)
    return list(zip(u.split(steps, 1), y.split(steps, 1)))

class Net(nn.Module):
    def __init__(self, stateful):
        super().__init__()
        torch.manual_seed(0)
        rnn = nn.LSTM(1, 6, batch_first=True)
        self.rnn,self.out,self.stateful = StatefulRNN(rnn) if stateful else rnn,nn.Linear(6, 1),stateful
    def forward(self, x): return self.out(self.rnn(x) if self.stateful else self.rnn(x)[0])
    def by_hand(self, x, state):
        out,state = (self.rnn.rnn if self.stateful else self.rnn)(x, state)
        return self.out(out),tree_map(torch.detach, state)

def run_by_hand(model, batches, sub_seq_len, n_epoch):
    opt = torch.optim.SGD(model.parameters(), lr=1e-1)
    for _ in range(n_epoch):
        state = None
        for x,y in batches:
            width = sub_seq_len or x.shape[1]
            for a,b in zip(x.split(width, 1), y.split(width, 1)):
                pred,state = model.by_hand(a, state)
                ((pred-b).square().mean()*(a.shape[1]/min(width, x.shape[1]))).backward()
                opt.step()
                opt.zero_grad()

def preds_by_hand(model, batches):
    state,preds = None,[]
    for x,_ in batches:
        with torch.no_grad(): pred,state = model.by_hand(x, state)
        preds.append(pred)
    return preds

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('sub_seq_len', [None, 10, 4])
@pytest.mark.parametrize('make', [Learner, TbpttLearner])
def test_a_list_of_batches_that_continue_is_the_loop_by_hand(stateful, sub_seq_len, make):
    train,valid,model = signal_batches(),signal_batches(seed=1),Net(stateful)
    by_hand = copy.deepcopy(model)
    dls,own = DataLoaders(train, valid),dict(loss_func=MSELossFlat(), opt_func=sgd)
    if make is Learner: learn = Learner(dls, model, cbs=TbpttResetCB(sub_seq_len, continuing=True), **own)
    else: learn = TbpttLearner(dls, model, sub_seq_len, continuing=True, num_threads=1, **own)
    fit(learn, 2, 1e-1)
    run_by_hand(by_hand, train, sub_seq_len, 2)
    for p,q in zip(model.parameters(), by_hand.parameters(), strict=True): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    expected = preds_by_hand(by_hand, valid)
    losses = [(p-y).square().mean() for p,(_,y) in zip(expected, valid)]
    with learn.no_bar(): assert learn.validate()[0]==pytest.approx(sum(losses).item()/len(losses), abs=1e-6)
    with learn.no_bar(): preds = learn.get_preds(dl=valid, concat_dim=1)[0]
    torch.testing.assert_close(preds, torch.cat(expected, 1), rtol=0, atol=1e-6)
    learn.add_cb(SubWindowEvalCB(3))
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds(dl=valid, concat_dim=1)[0], preds, rtol=0, atol=1e-6)


class Own(nn.Module):
    "Carries a state by itself, as an attribute"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.out = nn.GRU(1, 6, batch_first=True),nn.Linear(6, 1)
        self.reset()
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return self.out(out)
    def by_hand(self, x, state):
        out,state = self.rnn(x, state)
        return self.out(out),state.detach()

class Evaluate(Callback):
    "In the middle of a training, on other data"
    order = 20
    def __init__(self, batches, **kwargs): self.batches,self.kwargs = batches,kwargs
    def after_batch(self):
        if not (self.training and self.train_iter in (2, 4)): return
        learn = self.learn
        kept = {k:getattr(learn, k) for k in ('dl','iter','n_iter','training','train_iter','pct_train','epoch','n_epoch','xb','yb','pred','loss') if k in vars(learn)}
        with learn.no_logging(), learn.no_bar():
            recorder = learn.recorder
            learn.remove_cb(recorder)
            with learn.removed_cbs([self]): learn.get_preds(dl=self.batches, concat_dim=1, **self.kwargs)
            learn.add_cb(recorder)
        for k,v in kept.items(): setattr(learn, k, v)
        learn.model.train(learn.training)

def list_learner(model, cbs=(), sub_seq_len=4, train=None, n_epoch=2, **kwargs):
    dls = DataLoaders(train or signal_batches(), signal_batches(seed=1))
    own = dict(loss_func=MSELossFlat(), opt_func=sgd)
    return Learner(dls, model, cbs=[TbpttResetCB(**{**dict(sub_seq_len=sub_seq_len, continuing=True), **kwargs}), *cbs], **own)

def assert_same(a, b, atol=1e-6):
    for p,q in zip(a.parameters(), b.parameters(), strict=True): torch.testing.assert_close(p, q, rtol=0, atol=atol)

MODELS = {'StatefulRNN': partial(Net, True), 'plain': partial(Net, False), 'own': Own}

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('resetter', [False, True])
@pytest.mark.parametrize('inner', [False, True])
@pytest.mark.parametrize('continuing', [False, True])
def test_an_evaluation_in_the_middle_changes_nothing(name, resetter, inner, continuing):
    "... though fastai, and its ModelResetter, reset a model that has a `reset()` for each evaluation"
    if name=='plain' and resetter: return
    if inner and not continuing and name!='own': return
    def trained(*cbs):
        model = MODELS[name]()
        if resetter and name=='StatefulRNN': model.reset = model.rnn.reset
        return fit(list_learner(model, [*cbs, *([ModelResetter()] if resetter else [])], continuing=continuing), 2, 1e-1).model
    evaluate = Evaluate(signal_batches(3, 2, 10, 5), inner=inner)
    model,again = trained(evaluate),trained()
    assert_same(model, again)
    if not continuing: return
    again = MODELS[name]()
    run_by_hand(again, signal_batches(), 4, 2)
    assert_same(model, again)

def test_a_state_that_an_evaluation_changes_in_place_is_refused_in_the_middle():
    class InPlace(Own):
        def __init__(self):
            super().__init__()
            del self.h
            self.register_buffer('h', torch.zeros(1, 4, 6), persistent=False)
        def reset(self): self.h = self.h.zero_() if 'h' in self._buffers else None
        def forward(self, x):
            out,h = self.rnn(x, self.h.clone())
            self.h.copy_(h.detach())
            return self.out(out)
    with pytest.raises(RuntimeError, match='changed a state of InPlace in place'): fit(list_learner(InPlace(), [Evaluate(signal_batches(seed=5))]))


@pytest.mark.parametrize('name', MODELS)
def test_a_run_begins_anew_after_another_and_after_one_that_was_broken_off(name):
    "A second fit, an interrupted one, an evaluation before and after"
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter==3: raise KeyboardInterrupt
    model,again = MODELS[name](),MODELS[name]()
    learn = list_learner(model)
    fit(learn, 1, 1e-1)
    with learn.no_bar(): learn.validate()
    fit(learn, 1, 1e-1)
    run_by_hand(again, signal_batches(), 4, 2)
    assert_same(model, again)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, 0., cbs=Stop())
    fit(learn, 1, 1e-1)
    run_by_hand(again, signal_batches(), 4, 1)
    assert_same(model, again)
    valid = signal_batches(seed=1)
    expected = torch.cat(preds_by_hand(again, valid), 1)
    for _ in range(2):
        with learn.no_bar(): torch.testing.assert_close(learn.get_preds(dl=valid, concat_dim=1)[0], expected, rtol=0, atol=1e-6)
    learn.add_cb(SubWindowEvalCB(3))
    for _ in range(2):
        with learn.no_bar(): torch.testing.assert_close(learn.get_preds(dl=valid, concat_dim=1)[0], expected, rtol=0, atol=1e-6)


def test_overlapping_sub_windows_are_the_loop_by_hand():
    "Gradients go back over a batch at most, the state goes on"
    model,by_hand,scheme = Net(True),Net(True),Overlap(3, 6)
    fit(list_learner(model, sub_seq_len='dls', truncation=scheme), 1, 1e-1)
    opt,state = torch.optim.SGD(by_hand.parameters(), lr=1e-1),None
    for x,y in signal_batches():
        for o in scheme.sub_windows(x.shape[1]):
            first,at = ([],state) if o.next_start==o.start else by_hand_with_graph(by_hand, x[:,o.start:o.next_start], state)
            parts = [first] if o.next_start>o.start else []
            if o.next_start<o.stop: parts.append(by_hand_with_graph(by_hand, x[:,o.next_start:o.stop], at)[0])
            pred = torch.cat(parts, 1)[:,o.loss_start-o.start:]
            ((pred-y[:,o.loss_start:o.stop]).square().mean()*o.weight).backward()
            opt.step()
            opt.zero_grad()
            state = None if at is None else tree_map(torch.detach, at)
    assert_same(model, by_hand)

def by_hand_with_graph(model, x, state):
    out,state = model.rnn.rnn(x, state)
    return model.out(out),state

def test_a_scheme_that_keeps_states_in_the_middle_is_refused_for_a_model_of_its_own_state():
    with pytest.raises(ValueError, match='Own carries a state by itself, which cannot be kept'): fit(list_learner(Own(), sub_seq_len='dls', truncation=Overlap(3, 6)))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('sub_seq_len', [None, 5])
def test_a_search_of_the_learning_rate_compares_along_the_run(name, sub_seq_len):
    "At a rate of next to nothing the model is as good as the untrained one, wherever it is in the run"
    learn = list_learner(MODELS[name](), sub_seq_len=sub_seq_len)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1e-12, end_lr=1e-11, num_it=12, show_plot=False)
    if sub_seq_len: assert all(o==1 for o in learn.recorder.losses)


def torch_loader(n=12, bs=4, **kwargs): return torch.utils.data.DataLoader(list(zip(torch.randn(n, 10, 1), torch.randn(n, 10, 1))), batch_size=bs, **kwargs)

def test_what_cannot_continue_is_refused_before_the_first_step():
    from fastai.data.core import TfmdDL
    items = list(zip(torch.randn(14, 10, 1), torch.randn(14, 10, 1)))
    uneven = [signal_batches()[0], tuple(o[:3] for o in signal_batches()[1])]
    refused = [
        ('shuffles its items', torch_loader(shuffle=True), {}),
        ('shuffles its items', TfmdDL(items[:12], bs=4, shuffle=True), {}),
        ('has 2 rows, the one before it 4', TfmdDL(items, bs=4), {}),
        ('has 2 rows, the one before it 4', torch_loader(14), {}),
        ('has 3 rows, the one before it 4', uneven, {}),
        ('n_skip is 2, but each batch continues', torch_loader(), dict(n_skip=2)),
        ('no recurrent layer and no StatefulRNN', torch_loader(), dict(model=nn.Linear(1, 1), sub_seq_len=None)),
    ]
    for match,dl,kwargs in refused:
        settings = {**dict(sub_seq_len=5, continuing=True), **kwargs}
        model = settings.pop('model', None) or Net(True)
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=match): fit(Learner(DataLoaders(dl, torch_loader()), model, MSELossFlat(), cbs=TbpttResetCB(**settings)))
        with pytest.raises(ValueError, match=match): fit(Learner(DataLoaders(torch_loader(), dl), model, MSELossFlat(), cbs=TbpttResetCB(**settings)))
        assert_same(model, before, 0)
    fit(list_learner(Net(True), train=TfmdDL(items, bs=4, drop_last=True)))

def test_rows_that_are_missing_are_refused_when_they_come():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([signal_batches()[0], tuple(o[:3] for o in signal_batches()[1])])
        def __len__(self): return 2
    dl = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match='has 3 rows, the one before it 4'): fit(list_learner(Net(True), train=dl))

def test_a_stream_says_by_itself_where_it_goes_on():
    from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
    xs = [torch.randn(n, 1) for n in (40, 30, 20)]
    dls = SequenceDataLoaders.from_arrays(xs, xs, bs=2, sub_seq_len=10)
    with pytest.raises(ValueError, match='A StreamDL says by itself'): TbpttLearner(dls, Net(True), continuing=True)


def test_the_text_loader_of_fastai_is_known_wherever_it_is():
    from fastai.distributed import DistributedDL
    dl = text_loaders().train
    for o in (dl, SubWindows(dl), DistributedDL(dl, rank=0, world_size=2, device='cpu')): assert SubWindows(o, 3).continuing
    assert not SubWindows(dl, 3, continuing=False).continuing and not SubWindows(torch_loader(), 3).continuing
    said = torch_loader()
    said.continuing = True
    assert SubWindows(said, 3).continuing

def test_a_loop_by_hand_over_the_view_resets_once():
    batches = signal_batches()
    view = SubWindows(batches, 4, continuing=True)
    for _ in range(2): assert [view.is_first for _ in view]==[True]+[False]*(sum(-(-x.shape[1]//4) for x,_ in batches)-1)
    view = SubWindows(batches, 4)
    assert sum(view.is_first for _ in view)==len(batches)

def test_without_it_each_batch_is_a_window_of_its_own():
    model,again = Net(True),Net(True)
    fit(list_learner(model, continuing=False), 1, 1e-1)
    for x,y in signal_batches(): run_by_hand(again, [(x, y)], 4, 1)
    assert_same(model, again)

def test_a_search_of_the_learning_rate_goes_along_a_text_as_that_of_fastai():
    "An AWD_LSTM cannot be copied, so the losses are those of the search itself"
    def losses(*cbs):
        learn,_ = text_learner(cbs, dropout=1.)
        with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
            warnings.filterwarnings('ignore', message='SequentialRNN cannot be copied')
            learn.lr_find(num_it=20, show_plot=False)
        return [o.item() for o in learn.recorder.losses]
    plain = losses()
    assert losses(TbpttResetCB(None))==plain==losses(TbpttResetCB(SEQ)) and len(losses(TbpttResetCB(3)))>=20

class Pair(Net):
    "Predictions and more, as the models of fastai.text give, taken apart by a callback"
    def forward(self, x): return super().forward(x),x

def test_a_search_of_the_learning_rate_takes_apart_what_a_callback_does():
    class TakeFirst(Callback):
        order = 0
        def after_pred(self): self.learn.pred = self.learn.pred[0]
    learn = list_learner(Pair(True), [TakeFirst()], continuing=None)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1e-12, end_lr=1e-11, num_it=12, show_plot=False)
    assert all(o==1 for o in learn.recorder.losses)
