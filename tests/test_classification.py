"Classes: a label for each step or for each sequence, with the numbers of a loop by hand"
import copy
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F
from helpers import fit, sgd
from tbptt_fastai.learner import RNNLearner, TbpttLearner, scaling_from_data
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences

from_arrays,from_df,from_hdf5 = (getattr(SequenceDataLoaders, o) for o in ('from_arrays', 'from_df', 'from_hdf5'))
@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

VOCAB = ['fault', 'idle', 'run']

def steps(n=900, seed=0):
    "Two inputs in units of their own, and the state that a slow mean of the first one says"
    u = np.random.default_rng(seed).standard_normal((n,2))
    mean = np.convolve(u[:,0], np.ones(5)/5)[:n]
    return u*[1,50]+[0,900],np.where(mean>.3, 'run', np.where(mean<-.3, 'fault', 'idle'))

def codes(labels): return np.searchsorted(VOCAB, labels)

def many(n=24, T=60, seed=0):
    rng = np.random.default_rng(seed)
    y = np.array(['a','b','c'])[rng.integers(0, 3, n)]
    return [rng.standard_normal((T,2))+np.array([(ord(o)-98)*.5, 0]) for o in y],y

def frame(lengths=(300,240,360), seed=0):
    u,y = steps(sum(lengths), seed)
    return pd.DataFrame(dict(pump=np.repeat(list('xyz'[:len(lengths)]), lengths), u=u[:,0], v=u[:,1], state=y))

def step_loaders(kind, **kwargs):
    u,y = steps()
    kw = dict(sub_seq_len=25, bs=4, **kwargs)
    if kind=='windows': return from_arrays(u, y, win_sz=50, **kw)
    if kind=='stream': return from_arrays([u[:500],u[500:]], [y[:500],y[500:]], **kw)
    return from_df(frame(), ['u','v'], 'state', group='pump', **kw)


@pytest.mark.parametrize('kind', ['windows', 'stream', 'frame'])
def test_labels_are_numbers_of_a_vocabulary_and_inputs_are_scaled(kind):
    dls = step_loaders(kind)
    assert list(dls.vocab)==VOCAB and isinstance(dls.train, StreamDL)==(kind!='windows')
    x,y = dls.one_batch()
    assert y.dtype==torch.int64 and y.shape==x.shape[:2] and set(y.unique().tolist())<={0,1,2}
    learn = RNNLearner(dls, hidden_size=8, metrics=accuracy)
    assert learn.model.head.out_features==3 and learn.model.scale_y is None and not learn.model.last
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    trained = torch.cat([*dls.train_ds.arrays[0]])
    torch.testing.assert_close(learn.model.scale_x.std.double(), trained.std(0, correction=0), rtol=1e-5, atol=0)
    assert scaling_from_data(dls)[1] is None

@pytest.mark.parametrize('kind', ['windows', 'stream', 'frame'])
def test_accuracy_and_loss_are_those_of_a_loop_by_hand(kind):
    dls = step_loaders(kind)
    set_seed(0)
    learn = fit(RNNLearner(dls, hidden_size=8, metrics=accuracy), 3, 1e-2)
    with learn.no_bar(): loss,acc = learn.validate()
    right,nll,n = 0,0.,0
    for x,y in zip(*dls.valid_ds.arrays):
        x,y = (torch.as_tensor(o) for o in (x,y))
        parts = x.split(50) if kind=='windows' else [x]
        labels = y.split(50) if kind=='windows' else [y]
        for part,label in zip(parts, labels):
            if kind=='windows' and len(part)<50: continue
            with torch.no_grad(): out = learn.model.eval()(part[None].float())[0]
            nll += F.cross_entropy(out, label, reduction='sum').item()
            right += int((out.argmax(-1)==label).sum())
            n += len(label)
    assert acc==pytest.approx(right/n, abs=1e-6) and loss==pytest.approx(nll/n, rel=1e-5)
    assert acc>.5

def test_training_steps_by_hand_for_a_label_at_each_step():
    u,y = steps(400)
    dls = from_arrays(u, y, win_sz=80, sub_seq_len=40, bs=4, shuffle=False, dtype=torch.float64)
    learn = RNNLearner(dls, hidden_size=6, opt_func=sgd)
    rnn,head = copy.deepcopy(learn.model.rnn.rnn),copy.deepcopy(learn.model.head)
    fit(learn, 1, .1)
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], .1)
    x = torch.from_numpy((u-u[:320].mean(0))/u[:320].std(0)).reshape(5, 80, 2)[:4]
    t,state = torch.from_numpy(codes(y)).reshape(5, 80)[:4],None
    for a in (0, 40):
        out,state = rnn(x[:,a:a+40], state)
        F.cross_entropy(head(out).flatten(0, 1).float(), t[:,a:a+40].flatten()).backward() # float, as fastai's loss has it
        opt.step()
        opt.zero_grad()
        state = tuple(o.detach() for o in state)
    for p,q in zip([*learn.model.rnn.parameters(), *learn.model.head.parameters()], [*rnn.parameters(), *head.parameters()]):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)

def sequence_loaders(**kwargs):
    X,y = many()
    return from_arrays(X, y, valid=many(9, seed=1), **{**dict(sub_seq_len=20, bs=8, shuffle=False, dtype=torch.float64), **kwargs})

def test_training_steps_by_hand_for_a_label_of_each_sequence():
    "The state goes through all sub-windows, the loss is after the last one, and so is the only step"
    X,y = many()
    learn = RNNLearner(sequence_loaders(), hidden_size=6, opt_func=sgd, metrics=accuracy)
    assert learn.model.last and list(learn.dls.vocab)==['a','b','c']
    rnn,head = copy.deepcopy(learn.model.rnn.rnn),copy.deepcopy(learn.model.head)
    fit(learn, 2, .5)
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], .5)
    flat = np.concatenate(X)
    def scaled(X): return torch.from_numpy((np.stack(X)-flat.mean(0))/flat.std(0))
    x,t = scaled(X),torch.from_numpy(np.searchsorted(list('abc'), y))
    for i in (0,8,16)*2:
        with torch.no_grad(): _,state = rnn(x[i:i+8,:40])
        out,_ = rnn(x[i:i+8,40:], state)
        F.cross_entropy(head(out[:,-1]).float(), t[i:i+8]).backward()
        opt.step()
        opt.zero_grad()
    for p,q in zip([*learn.model.rnn.parameters(), *learn.model.head.parameters()], [*rnn.parameters(), *head.parameters()]):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    X,y = many(9, seed=1)
    with torch.no_grad(): pred = head(rnn(scaled(X))[0][:,-1]).argmax(1).numpy()
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx((pred==np.searchsorted(list('abc'), y)).mean(), abs=1e-6)


FORMS = dict(
    array=lambda y: y, list=lambda y: y.tolist(), objects=lambda y: y.astype(object), series=pd.Series, string=lambda y: pd.Series(y, dtype='string'),
    category=lambda y: pd.Series(y, dtype='category'))

@pytest.mark.parametrize('form', FORMS)
def test_labels_of_every_form_are_the_same(form):
    X,y = many()
    dls = from_arrays(X, FORMS[form](y), valid=(X, FORMS[form](y)), bs=8)
    assert list(dls.vocab)==['a','b','c'] and all(type(o) is str for o in dls.vocab)
    assert [int(o[1]) for o in dls.train_ds]==np.searchsorted(list('abc'), y).tolist()
    u,y = steps()
    dls = from_arrays(u, FORMS[form](y), win_sz=50, bs=4)
    assert list(dls.vocab)==VOCAB
    np.testing.assert_array_equal(dls.train_ds[3][1], codes(y)[150:200])
    df = frame()
    df['state'] = FORMS[form](df.state.to_numpy())
    dls = from_df(df, 'u', 'state', group='pump', sub_seq_len=20)
    assert list(dls.vocab)==VOCAB
    np.testing.assert_array_equal(dls.train_ds[0][1], codes(frame().state)[:240])

def test_categories_keep_their_order_and_those_that_do_not_occur():
    order = ['run','idle','fault','off']
    df = frame()
    df['state'] = pd.Categorical(df.state, order)
    dls = from_df(df, 'u', 'state', group='pump', sub_seq_len=20)
    assert list(dls.vocab)==order and RNNLearner(dls, hidden_size=3).model.head.out_features==4
    np.testing.assert_array_equal(dls.train_ds[0][1], [order.index(o) for o in frame().state[:240]])

@pytest.mark.parametrize('vocab,to', [([3,5,9], lambda o: np.array([3,5,9])[o]), ([False,True], lambda o: o>0), ([2.,1.,0.], lambda o: o.astype(float)), (range(3), lambda o: o.astype(np.int8))])
def test_numbers_are_labels_if_a_vocabulary_is_given(vocab, to):
    u,y = steps()
    numbers = to(codes(y))
    expected = [list(vocab).index(o) for o in numbers.tolist()]
    dls = from_arrays(u, numbers, win_sz=50, bs=4, vocab=vocab)
    np.testing.assert_array_equal(dls.train_ds[3][1], expected[150:200])
    dls = from_df(frame().assign(state=numbers), 'u', 'state', sub_seq_len=20, vocab=vocab)
    np.testing.assert_array_equal(dls.train_ds[0][1], expected[:720])
    assert list(dls.vocab)==list(vocab) and RNNLearner(dls, hidden_size=3).model.head.out_features==len(vocab)

def test_integers_in_a_file_are_labels_if_a_vocabulary_is_given(tmp_path):
    h5py = pytest.importorskip('h5py')
    u,y = steps()
    with h5py.File(tmp_path/'a.h5', 'w') as f: f['u'],f['state'] = u,codes(y)+1
    dls = from_hdf5([tmp_path/'a.h5'], 'u', 'state', sub_seq_len=50, vocab=[1,2,3])
    assert dls.train_ds.in_files and RNNLearner(dls, hidden_size=3).model.head.out_features==3
    np.testing.assert_array_equal(dls.train_ds[0][1], codes(y)[:720])


def test_groups_of_a_frame_may_have_one_label_each():
    X,y = many()
    df = pd.DataFrame(np.concatenate(X), columns=['u','v']).assign(part=np.repeat(range(24), 60), label=np.repeat(y, 60))
    dls = from_df(df, ['u','v'], 'label', group='part', one_label=True, valid_groups=[3,7], win_sz=30, sub_seq_len=15, bs=4)
    assert len(dls.train_ds)==44 and dls.one_batch()[1].shape==(4,)
    assert [dls.vocab[int(o[1])] for o in dls.valid_ds]==[y[3],y[3],y[7],y[7]] and dls.valid_ds.groups_of(range(4))==[3,3,7,7]
    learn = fit(RNNLearner(dls, hidden_size=8, metrics=accuracy), 2)
    with learn.no_bar(): assert learn.get_preds()[0].shape==(4,3)

@pytest.mark.parametrize('kind', ['windows', 'stream', 'frame', 'sequences'])
def test_interpretation_counts_what_a_loop_counts(kind):
    dls = sequence_loaders() if kind=='sequences' else step_loaders(kind)
    learn = fit(RNNLearner(dls, hidden_size=8), 1)
    with learn.no_bar():
        interp = ClassificationInterpretation.from_learner(learn)
        matrix = interp.confusion_matrix()
        preds,targs = learn.get_preds()
        interp.plot_confusion_matrix()
    expected = np.zeros((3,3), int)
    np.add.at(expected, (targs.flatten(), preds.argmax(-1).flatten()), 1)
    np.testing.assert_array_equal(matrix, expected)
    assert [o.get_text() for o in plt.gca().get_xticklabels()]==list(dls.vocab)

@pytest.mark.parametrize('kind', ['windows', 'stream', 'frame'])
def test_results_at_each_step_are_drawn_with_their_labels(kind):
    learn = RNNLearner(step_loaders(kind), hidden_size=8)
    with learn.no_bar(): learn.show_results(max_n=2)
    def drawn(ax): return [set(np.ma.filled(o.get_array(), -1).ravel().astype(int).tolist()) for o in ax.collections]
    def labels(): return [o.get_text() for o in plt.gcf().legends[0].get_texts()]
    ax = plt.gcf().axes[0]
    pred,target = ax.collections
    assert [o.get_text() for o in ax.get_yticklabels()]==['prediction','target'] and len(pred.get_array()[0])==len(target.get_array()[0])
    found = set.union(*(o for ax in plt.gcf().axes for o in drawn(ax)))
    assert found<={0,1,2} and labels()==[VOCAB[i] for i in sorted(found)]
    learn.dls.show_batch(max_n=2)
    assert labels()==VOCAB and len(plt.gcf().axes[0].collections)==1

def test_results_of_sequences_are_written_above_them():
    learn = RNNLearner(sequence_loaders(), hidden_size=8)
    y = many(9, seed=1)[1]
    with learn.no_bar():
        learn.show_results(max_n=2, shuffle=False)
        preds,_,decoded = learn.get_preds(with_decoded=True)
    assert [o.get_title() for o in plt.gcf().axes]==[f'target: {y[i]}\nprediction: {"abc"[decoded[i]]}' for i in range(2)]
    with learn.no_bar(): Interpretation.from_learner(learn).show_results([4,0])
    assert [o.get_title() for o in plt.gcf().axes]==[f'target: {y[i]}\nprediction: {"abc"[decoded[i]]}' for i in (4,0)]
    learn.dls.show_batch(max_n=1)
    assert plt.gcf().axes[0].get_title()==f'target: {many()[1][0]}'

@pytest.mark.parametrize('kind', ['windows', 'sequences'])
def test_predictions_for_new_data_by_a_learner_that_was_exported(kind, tmp_path):
    dls = sequence_loaders(dtype=torch.float32) if kind=='sequences' else step_loaders(kind)
    learn = fit(RNNLearner(dls, hidden_size=8), 1)
    X,y = many(5, seed=2) if kind=='sequences' else ([o[0].numpy() for o in dls.valid_ds], [np.array(VOCAB)[o[1]] for o in dls.valid_ds])
    with torch.no_grad(): expected = learn.model.eval()(torch.tensor(np.stack(X)).float()).softmax(-1)
    learn.export(tmp_path/'l.pkl')
    for o in (learn, load_learner(tmp_path/'l.pkl')):
        with o.no_bar():
            _,pred,probs = o.predict(X[0])
            torch.testing.assert_close(probs, expected[0])
            torch.testing.assert_close(pred, expected[0].argmax(-1))
            torch.testing.assert_close(o.get_preds(dl=o.dls.test_dl(X))[0], expected)
            targs = o.get_preds(dl=o.dls.test_dl(list(zip(X, y)), with_labels=True))[1]
        assert np.array(list(o.dls.vocab))[targs].tolist()==np.array(y).tolist()

def test_new_sequences_of_unequal_length_have_a_prediction_for_each_step():
    learn = fit(RNNLearner(step_loaders('stream'), hidden_size=8, metrics=accuracy))
    u,y = steps(200, seed=3)
    dl = learn.dls.test_dl([(u[:120], y[:120]), (u[120:], y[120:])], with_labels=True)
    with learn.no_bar(), torch.no_grad():
        preds,targs = learn.get_preds(dl=dl)
        expected = torch.cat([learn.model.eval()(torch.from_numpy(o[None]).float())[0] for o in (u[:120], u[120:])])
        assert learn.validate(dl=dl)[1]==pytest.approx((expected.argmax(-1)==targs).double().mean().item(), abs=1e-6)
    torch.testing.assert_close(preds, expected.softmax(-1))
    np.testing.assert_array_equal(targs, codes(y))

@pytest.mark.parametrize('kind', ['windows', 'stream', 'sequences'])
def test_the_search_for_a_learning_rate_runs(kind):
    learn = RNNLearner(sequence_loaders(shuffle=True) if kind=='sequences' else step_loaders(kind), hidden_size=8)
    with learn.no_bar(), learn.no_logging(): assert 0<learn.lr_find(num_it=30, show_plot=False).valley

def a_frame(**kwargs): return frame().assign(**kwargs)
def from_frame(df, **kwargs): return from_df(df, 'u', 'state', group='pump', **kwargs)
X,Y = many()
U,S = steps()

@pytest.mark.parametrize('make,exc,message', [
    (lambda: from_arrays(X, Y), ValueError, r'one label for each sequence.*Give valid=\(x, y\)'),
    (lambda: from_arrays(X, np.searchsorted(list('abc'), Y)), ValueError, 'y has one number for each of 24 sequences. For classes give vocab'),
    (lambda: from_arrays(X, [1.]*24), ValueError, 'y has one number for each of 24 sequences'),
    (lambda: from_arrays(X, Y, valid=(X, ['d']*24), vocab=list('abc')), ValueError, r"valid_y has 'd' at 0, which is not in the vocabulary of 3"),
    (lambda: from_arrays(X, Y, valid=(X, [np.repeat(o, 60) for o in Y])), ValueError, 'for each sequence in one of y and valid_y'),
    (lambda: from_arrays([*X[:23], X[0][:9]], Y, valid=(X, Y)), ValueError, 'windows of one length need win_sz'),
    (lambda: from_arrays(X, Y[:-1]), ValueError, 'x has 24 sequences, y has 1'),
    (lambda: from_arrays(U, S[:-1], win_sz=50), ValueError, '900 steps of x and 899 of y'),
    (lambda: from_arrays(U, S[:,None], win_sz=50), ValueError, r'y has labels of shape \(900, 1\); expected one label for each step'),
    (lambda: from_arrays([U,U], [S,codes(S)], win_sz=50), TypeError, 'labels and numbers'),
    (lambda: from_arrays(U, codes(S), vocab=[0,1], win_sz=50), ValueError, 'y has 2 at .*not in the vocabulary of 2'),
    (lambda: from_arrays(U, S, vocab=['run','run','idle','fault'], win_sz=50), ValueError, 'each of them once'),
    (lambda: from_arrays(U, np.repeat('run', 900), win_sz=50), ValueError, "vocabulary is .*'run'.*two labels or more"),
    (lambda: from_arrays(U, np.where(S=='run', None, S), win_sz=50), ValueError, 'y has None at'),
    (lambda: from_frame(a_frame(state=[None,*S[1:]])), ValueError, "Row 0 has no label in column 'state'"),
    (lambda: from_frame(a_frame(), vocab=['run','idle']), ValueError, "Column 'state' has 'fault' at .*not in the vocabulary"),
    (lambda: from_df(a_frame(other=S), 'u', ['state','other']), ValueError, 'expected one column of labels'),
    (lambda: from_df(a_frame(), 'u', ['state','v']), ValueError, 'expected one column of labels'),
    (lambda: from_df(a_frame(), 'u', 'label'), KeyError, "no column 'label'"),
    (lambda: from_df(a_frame(when=pd.Timestamp('2024-01-01')), 'when', 'u'), TypeError, "Column 'when' is of type .*expected numbers"),
    (lambda: from_frame(a_frame(), one_label=True, valid_groups=['x'], win_sz=50), ValueError, r"Group 'x' has the labels \['fault', 'idle', 'run'\], but one_label"),
    (lambda: from_frame(a_frame(), one_label=True, win_sz=50), ValueError, 'Hold back groups by valid_groups'),
    (lambda: from_frame(a_frame(state=1.), one_label=True, valid_groups=['x'], win_sz=50), ValueError, 'target is a number: give vocab'),
    (lambda: Sequences(U, S), TypeError, 'Labels as targets become numbers of classes in SequenceDataLoaders.from_arrays'),
    (lambda: SequenceDataLoaders.from_sequences(Sequences(U, codes(S)).classify(VOCAB), Sequences(U, codes(S)).classify(VOCAB[::-1])), ValueError, 'The labels are .*in training'),
    (lambda: SequenceDataLoaders.from_sequences(Sequences(U, codes(S)).classify(VOCAB), Sequences(U, codes(S))), ValueError, 'None, one_label=False in validation'),
    (lambda: RNNLearner(step_loaders('windows'), loss_func=nn.L1Loss()), TypeError, 'the loss is L1Loss'),
    (lambda: RNNLearner(step_loaders('windows'), loss_func=MSELossFlat()), TypeError, 'the loss is MSELoss'),
    (lambda: RNNLearner(sequence_loaders(), loss_func=nn.MSELoss()), TypeError, 'the loss is MSELoss'),
    (lambda: sequence_loaders().test_dl([X[0], X[1][:40]]), ValueError, '40 to 60 steps, but one prediction is made for each'),
    (lambda: sequence_loaders().test_dl([(X[0], 'z')], with_labels=True), ValueError, "y has 'z' at 0"),
    (lambda: RNNLearner(from_arrays(np.arange(900)%5, S, win_sz=50)), ValueError, 'needs items'),
])
def test_what_does_not_fit_is_refused_by_name(make, exc, message):
    with pytest.raises(exc, match=message): make()

def test_labels_of_sequences_in_files_need_arrays(tmp_path):
    np.save(tmp_path/'x.npy', np.stack(X))
    x = list(np.load(tmp_path/'x.npy', mmap_mode='r'))
    with pytest.raises(ValueError, match='windows of one length, in memory'): from_arrays(x, Y, valid=(x, Y))

def test_a_label_that_only_validation_has_is_in_the_vocabulary():
    dls = from_arrays(X, Y, valid=(X, ['d']*24), bs=4)
    assert list(dls.vocab)==list('abcd') and int(dls.valid_ds[0][1])==3

def test_a_model_of_your_own_has_the_same_loss():
    dls = step_loaders('windows')
    learn = fit(TbpttLearner(dls, nn.Sequential(nn.LSTM(2, 4, batch_first=True), Take(), nn.Linear(4, 3)), metrics=accuracy))
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)

class Take(nn.Module):
    def forward(self, o): return o[0]

def test_sequences_have_no_vocabulary_by_themselves():
    assert Sequences(U).vocab is None and not Sequences(U).one_label
