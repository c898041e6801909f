"Batches that continue each other, row by row: the text path of fastai, and lists of batches against loops by hand"
import copy
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
    with learn.no_bar(): preds = learn.get_preds(reorder=False, concat_dim=1)[0]
    torch.testing.assert_close(preds, torch.cat(expected, 1), rtol=0, atol=1e-6)
    learn.add_cb(SubWindowEvalCB(3))
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds(reorder=False, concat_dim=1)[0], preds, rtol=0, atol=1e-6)
