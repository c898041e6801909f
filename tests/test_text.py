"Text: contiguous rows, the state of each carried through the whole epoch, and new text from the model"
import copy
from types import SimpleNamespace
import pytest
import torch
from fastai.callback.rnn import RNNCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Perplexity, accuracy
from fastai.optimizer import OptimWrapper
from fastai.text.data import SortedDL, TensorText, pad_input, pad_input_chunk
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import set_seed
from functools import partial
from torch import nn
from torch.utils._pytree import tree_map
from helpers import adam, fit
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.text import TextRows
from tbptt_fastai.models.text import TextRNN, sample_text
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB

TEXT = 'the quick brown fox jumps over the lazy dog. '*23+'end'


def make(dropout=0., **kwargs):
    set_seed(0)
    dls = SequenceDataLoaders.from_text(TEXT, **{**dict(bs=4, sub_seq_len=25, valid_pct=.2), **kwargs})
    return dls,TextRNN(len(dls.vocab), emb_sz=8, hidden_size=16, dropout=dropout)


@pytest.mark.parametrize('text', [TEXT, TEXT.split(), list(TEXT)])
@pytest.mark.parametrize('bs', [1, 4, 7])
def test_rows_are_the_text_and_its_next_tokens(text, bs):
    rows = TextRows(text, sorted(set(text)), bs)
    back = [[rows.vocab[i] for i in o] for o in (torch.cat([x for x,_ in rows]), torch.cat([y for _,y in rows]))]
    assert back==[list(text[:-1]), list(text[1:])] and len(rows)==bs
    assert max(rows.lengths)-min(rows.lengths)<=1


def test_equals_the_loop_by_hand():
    "Rows by hand; the state is carried through the epoch, and the loss of the last, ragged block counts by its tokens"
    dls,model = make()
    by_hand = copy.deepcopy(model)
    learn = TbpttLearner(dls, model, opt_func=partial(OptimWrapper, opt=torch.optim.Adam), grad_clip=.5, metrics=[accuracy, Perplexity()])
    fit(learn, 2)
    vocab = sorted(set(TEXT))
    n_train = len(TEXT)-int(len(TEXT)*.2)
    ids = torch.tensor([vocab.index(c) for c in TEXT[:n_train]])
    n = len(ids)-1
    bounds = [k*(n//4)+min(k, n%4) for k in range(5)] # the first rows have one more
    opt = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    longest = max(b-a for a,b in zip(bounds, bounds[1:]))
    lstm = by_hand.rnn.rnn
    for _ in range(2):
        state = None
        for start in range(0, longest, 25):
            width = min(25, longest-start)
            x,y,real = (torch.zeros(4, width, dtype=t) for t in (torch.int64,torch.int64,torch.bool))
            for row,(a,b) in enumerate(zip(bounds, bounds[1:])):
                m = min(width, b-a-start)
                x[row,:m],y[row,:m],real[row,:m] = ids[a+start:a+start+m],ids[a+start+1:a+start+m+1],True
            out,state = lstm(by_hand.embedding(x), state)
            state = tree_map(torch.detach, state)
            loss = nn.functional.cross_entropy(by_hand.head(out)[real], y[real])
            k = int(real.sum())
            if k<100: loss = loss*(k/100)
            loss.backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), .5)
            opt.step()
            opt.zero_grad()
    for a,b in zip(model.parameters(), by_hand.parameters(), strict=True): assert torch.equal(a, b)
    # validation by whole rows
    total,right,count = 0.,0,0
    by_hand.eval()
    for x,y in dls.valid_ds:
        with torch.no_grad(): scores = by_hand(x[None])[0]
        total,right,count = total+nn.functional.cross_entropy(scores, y, reduction='sum').item(),right+(scores.argmax(1)==y).sum().item(),count+len(y)
    with learn.no_bar(): loss,acc,perplexity = learn.validate()
    assert count==int(len(TEXT)*.2)-1
    assert loss==pytest.approx(total/count, abs=1e-5) and acc==pytest.approx(right/count, abs=1e-6)
    assert perplexity==pytest.approx(torch.tensor(total/count).exp().item(), rel=1e-5)


def test_a_learner_builds_its_model_from_the_text():
    learn = TbpttLearner(make()[0], rnn_type='gru', hidden_size=8, num_layers=2)
    assert isinstance(learn.model, TextRNN) and learn.model.rnn.rnn.num_layers==2
    fit(learn, 1)


def test_sampling_steps_through_the_state():
    dls,model = make(dropout=.5)
    learn = TbpttLearner(dls, model)
    fit(learn, 3)
    model.train() # sampling has no dropout in any case
    likeliest,text = sample_text(learn, 'the qu', n=30, temperature=0),'the qu'
    model.eval()
    for _ in range(30): # the whole text anew for each character
        with torch.no_grad(): text += dls.vocab[int(model(torch.tensor([[dls.vocab.index(c) for c in text]]))[0,-1].argmax())]
    assert likeliest==text
    set_seed(1)
    a = sample_text(learn, 'the ', n=50)
    set_seed(1)
    assert sample_text(learn, 'the ', n=50)==a!=sample_text(learn, 'the ', n=50)
    assert sample_text(learn, 'the', n=0)=='the'
    assert sample_text(learn, list('the'), n=2, temperature=0)[:3]==list('the')


@pytest.mark.parametrize('training', [True, False])
def test_sampling_leaves_the_model_as_it_was(training):
    dls,model = make(dropout=.5)
    learn = TbpttLearner(dls, model)
    model.train()
    model(dls.one_batch()[0])
    model.train(training)
    state = model.rnn.state
    sample_text(learn, 'the', n=3)
    assert model.training==training and model.rnn.state is state and not model.rnn._forward_pre_hooks


def test_a_model_with_a_state_of_its_own_begins_each_text_anew():
    class Own(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.embedding,self.rnn,self.head = nn.Embedding(n, 8),nn.GRU(8, 8, batch_first=True),nn.Linear(8, n)
            self.reset()
        def reset(self): self.h = None
        def forward(self, x):
            out,h = self.rnn(self.embedding(x), self.h)
            self.h = h.detach()
            return self.head(out),out # and more, as the models of fastai.text
    dls,_ = make()
    learn = TbpttLearner(dls, Own(len(dls.vocab)))
    learn.model.h = torch.full((1,1,8), 9.)
    texts = []
    for _ in range(2):
        set_seed(0)
        texts.append(sample_text(learn, 'the', n=30))
    assert texts[0]==texts[1] and learn.model.h is None


def test_tokens_of_any_kind_are_shown(capsys):
    for text in ('the end '*40, ('the end '*40).split(), [1,2,3]*60):
        dls = SequenceDataLoaders.from_text(text, bs=2, sub_seq_len=5, valid_pct=.2)
        dls.show_batch(max_n=1)
        shown = capsys.readouterr().out
        assert shown.splitlines()[0].startswith('text') and repr(dls.train_ds.join(dls.one_batch()[0][0])) in shown
    learn = TbpttLearner(dls)
    with learn.no_bar(): learn.show_results(max_n=1)
    assert 'predicted' in capsys.readouterr().out


def test_a_text_for_validation_joins_the_vocabulary_and_an_export_samples_the_same(tmp_path):
    dls = SequenceDataLoaders.from_text(TEXT, valid=TEXT[:200]+'X', bs=4, val_bs=2, sub_seq_len=25)
    assert 'X' in dls.vocab and len(dls.valid_ds)==2 and isinstance(dls.valid, StreamDL)
    learn = TbpttLearner(dls, TextRNN(len(dls.vocab), hidden_size=8))
    learn.export(tmp_path/'text.pkl')
    set_seed(0)
    text = sample_text(learn, 'the', n=10)
    set_seed(0)
    assert sample_text(load_learner(tmp_path/'text.pkl'), 'the', n=10)==text


def test_what_makes_no_text_is_refused_by_name():
    dls,model = make()
    learn = TbpttLearner(dls, model)
    for match,make_it in {
        "'T', which is not in the vocabulary": lambda: SequenceDataLoaders.from_text('The end', valid_pct=.3, vocab='abcdefghijklmnopqrstuvwxyz ', bs=1, sub_seq_len=2),
        'text of the validation set has 2 tokens; 4 rows': lambda: SequenceDataLoaders.from_text('ab'*5, bs=4, sub_seq_len=2, valid_pct=.2),
        'sub_seq_len is 0': lambda: SequenceDataLoaders.from_text(TEXT, sub_seq_len=0),
        "prompt 'X' has 'X'": lambda: sample_text(learn, 'X'),
        "prompt '' is empty": lambda: sample_text(learn, ''),
        'use sample_text': lambda: learn.predict('the'),
        'no vocabulary': lambda: sample_text(SimpleNamespace(dls=SimpleNamespace(), model=model), 'the'),
        'temperature is -1': lambda: sample_text(learn, 'the', temperature=-1),
        'expected a string or a list of tokens': lambda: SequenceDataLoaders.from_text(5),
        "rnn_type is 'lstmm'": lambda: TextRNN(5, rnn_type='lstmm'),
    }.items():
        with pytest.raises((ValueError,TypeError), match=match): make_it()

@pytest.mark.parametrize('bs,steps', [(6, 60), (8, 40)])
def test_a_classifier_that_resets_itself_in_every_call_is_refused_in_sub_windows(bs, steps):
    "fastai's `SentenceEncoder` has a `reset()`, and calls it in each forward pass"
    set_seed(0)
    config = {**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 12, 'n_layers': 2}
    x = torch.randint(2, 30, (24, steps))
    dl = torch.utils.data.DataLoader(list(zip(x, (x[:,0]>15).long())), batch_size=bs)
    def refused_or_trained(sub_seq_len):
        model = get_text_classifier(AWD_LSTM, 30, 2, seq_len=20, config=config)
        return fit(Learner(DataLoaders(dl, dl), model, CrossEntropyLossFlat(), cbs=[TbpttResetCB(sub_seq_len), RNNCallback()]))
    with pytest.raises(ValueError, match='gives other predictions than in one piece|remembers nothing'): refused_or_trained(20)
    refused_or_trained(None)


def documents_of_unequal_length():
    "(tokens, label), of 15 to 70 tokens"
    torch.manual_seed(0)
    return [(TensorText(torch.randint(2, 30, (n,))), torch.tensor(n%2)) for n in torch.randint(15, 70, (24,)).tolist()]

@pytest.mark.parametrize('pad', [pad_input, partial(pad_input_chunk, pad_idx=1, seq_len=20)])
@pytest.mark.parametrize('cls', [TfmdDL, SortedDL])
@pytest.mark.parametrize('make', [Learner, TbpttLearner])
@pytest.mark.parametrize('sub_seq_len', [20, 7])
def test_padded_documents_of_unequal_length_are_refused_by_name_before_the_first_step(pad, cls, make, sub_seq_len):
    set_seed(0)
    dl = cls(documents_of_unequal_length(), bs=6, num_workers=0, before_batch=pad)
    def learner(sub_seq_len, *cbs):
        model = get_text_classifier(AWD_LSTM, 30, 2, seq_len=20, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 12, 'n_layers': 2})
        if make is TbpttLearner: return TbpttLearner(DataLoaders(dl, dl), model, sub_seq_len, loss_func=CrossEntropyLossFlat(), cbs=[RNNCallback(), *cbs], num_threads=1)
        return Learner(DataLoaders(dl, dl), model, CrossEntropyLossFlat(), cbs=[TbpttResetCB(sub_seq_len), RNNCallback(), *cbs])
    with pytest.raises(ValueError, match=r'SentenceEncoder \(0\) remembers nothing.*sub_seq_len=None'): fit(learner(sub_seq_len))
    learn = fit(learner(None))
    learn.add_cb(SubWindowEvalCB(sub_seq_len))
    with learn.no_bar(), pytest.raises(ValueError, match='remembers nothing'): learn.validate()

class TakesLengths(nn.Module):
    "The state after the last real step of each row, found by its length"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.out = nn.Embedding(30, 8),nn.GRU(8, 8, batch_first=True),nn.Linear(8, 2)
    def forward(self, x, lengths): return self.out(self.rnn(self.emb(x))[0][torch.arange(len(x)),lengths-1])

@pytest.mark.parametrize('longest', [60, 20])
@pytest.mark.parametrize('loader', ['torch', 'TfmdDL', 'TbpttDL', 'list', 'iterable'])
@pytest.mark.parametrize('make', [Learner, TbpttLearner])
def test_a_model_that_takes_lengths_is_refused_by_name_in_sub_windows(longest, loader, make):
    "... also where those of the first batch all lie in its first sub-window"
    torch.manual_seed(0)
    lengths = torch.randint(longest-8, longest+1, (12,))
    items = [(torch.randint(2, 30, (60,)), n, n%2) for n in lengths]
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(items)
        def __len__(self): return 12
    dl = {'torch': lambda: torch.utils.data.DataLoader(items, batch_size=4), 'TfmdDL': lambda: TfmdDL(items, bs=4, num_workers=0, n_inp=2),
        'TbpttDL': lambda: TbpttDL(items, bs=4, num_workers=0, n_inp=2), 'iterable': lambda: torch.utils.data.DataLoader(Stream(), batch_size=4),
        'list': lambda: list(torch.utils.data.DataLoader(items, batch_size=4))}[loader]
    def learner(sub_seq_len):
        torch.manual_seed(0)
        own = dict(loss_func=CrossEntropyLossFlat(), opt_func=adam)
        if make is TbpttLearner: return TbpttLearner(DataLoaders(dl(), dl()), TakesLengths(), sub_seq_len, num_threads=1, **own)
        return Learner(DataLoaders(dl(), dl()), TakesLengths(), cbs=TbpttResetCB(sub_seq_len), **own)
    learn = learner(20)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=r'TakesLengths cannot be run on a sub-window of 20 steps[\s\S]*by the length of each row' if longest==60 else 'A window of 40 steps in sub-windows of 20 gives other predictions'): fit(learn)
    for k,o in learn.model.state_dict().items(): assert torch.equal(o, before[k])
    fit(learner(None))
