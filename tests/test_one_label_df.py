"A frame with one label for each group: its rows have the prediction of their sequence, as the model by hand gives it for that one alone"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from helpers import check_trains_on, fit
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.whole import WholeDL
from tbptt_fastai.sequences.axis import from_rows
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN

KINDS = np.array(['new','old','worn'])

def frame(lengths, seed=0, gap_at=None):
    "A row for each step, the groups mixed and out of order; `kind` is that of the whole group"
    rng = np.random.default_rng(seed)
    parts = [pd.DataFrame(dict(pump=f'p{g}', hour=np.arange(n, dtype=float), u=rng.standard_normal(n)+g%3, v=rng.standard_normal(n),
        mode=rng.choice(['idle','run'], n), kind=KINDS[g%3])) for g,n in enumerate(lengths)]
    df = pd.concat(parts)
    if gap_at is not None: df['hour'] += 100*(df.hour>=gap_at)
    return df.sample(frac=1, random_state=seed)

def make(x=('u','v'), df=None, model=None, **kwargs):
    set_seed(0)
    df = frame([40]*9) if df is None else df
    settings = dict(group='pump', time='hour', one_label=True, valid_groups=['p7','p8'], win_sz=20, sub_seq_len=10, bs=4)
    dls = SequenceDataLoaders.from_df(df, list(x), 'kind', **{**settings, **kwargs})
    learn = RNNLearner(dls, rnn_type='gru', hidden_size=6) if model is None else TbpttLearner(dls, model)
    return fit(learn, 2)

def label_of(learn, rows, x=('u','v'), codes=None):
    "What the model, by hand, says of one sequence alone"
    values = np.stack([rows[c].map(codes.index) if codes and c=='mode' else rows[c] for c in x], 1)
    dtype = next(learn.model.parameters()).dtype
    xb = torch.tensor(values.astype(np.float32)).to(dtype)[None]
    dim = getattr(learn.model, 'time_dim', 1)
    with torch.no_grad(): out = learn.model.eval()(xb if dim==1 else from_rows(xb, dim))
    assert out.shape==(1,3)
    return KINDS[out[0].argmax()]

def by_hand(learn, df, max_gap=None, **kwargs):
    "By a loop over groups, and over their parts between holes, put back by position"
    df,out = df.reset_index(drop=True),{}
    for _,rows in df.groupby('pump'):
        rows = rows.sort_values('hour')
        part = (rows.hour.diff()>max_gap).cumsum() if max_gap else np.zeros(len(rows))
        for _,piece in rows.groupby(part): out.update(dict.fromkeys(piece.index, label_of(learn, piece, **kwargs)))
    return np.array([out[i] for i in range(len(df))])

def predict(learn, df, **kwargs):
    with learn.no_bar(): return learn.predict_df(df, **kwargs)

UNEQUAL = [1, 9, 50, 17, 9, 3, 9, 33, 100]
def new_frame(**kwargs): return frame(UNEQUAL, 1, **kwargs)[['v','hour','pump','mode','u']]


@pytest.mark.parametrize('kw', [dict(), dict(bs=1), dict(time_dim=0), dict(time_dim=-1), dict(dtype=torch.float64), dict(win_sz=40, sub_seq_len=None), dict(val_bs=2)], ids=str)
def test_each_row_has_the_label_of_its_sequence_in_the_order_and_index_of_the_frame(kw):
    learn,df = make(**kw),new_frame()
    before,out = df.copy(),predict(learn, df)
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_frame_equal(out[df.columns], df)
    assert list(out.columns)==[*df.columns, 'kind_pred']
    expected = by_hand(learn, df)
    np.testing.assert_array_equal(out.kind_pred, expected)
    assert len(set(expected))>1 and (out.groupby('pump').kind_pred.nunique()==1).all()

def test_an_index_may_repeat():
    df = pd.concat([new_frame(), frame([12, 30], 5).assign(pump=lambda o: o.pump+'x')])
    assert df.index.duplicated().any()
    learn = make()
    out = predict(learn, df)
    assert list(out.index)==list(df.index)
    np.testing.assert_array_equal(out.kind_pred, by_hand(learn, df))

def test_parts_between_holes_are_sequences_of_their_own():
    learn,df = make(max_gap=2.),new_frame(gap_at=8)
    expected = by_hand(learn, df, max_gap=2)
    np.testing.assert_array_equal(predict(learn, df).kind_pred, expected)
    assert len(learn.dls.test_df(df).dataset)==len(UNEQUAL)+7
    assert (pd.Series(expected).groupby(df.pump.to_numpy()).nunique()>1).any() # else nothing is seen here

def test_without_groups_and_times_a_frame_is_one_sequence():
    learn,df = make(),new_frame()
    of = df[df.pump=='p2'].sort_values('hour')
    assert (predict(learn, of).kind_pred==label_of(learn, of)).all() and len(of)==50

def test_classes_among_the_inputs():
    x,df = ['mode','u'],new_frame()
    learn = make(x=x)
    np.testing.assert_array_equal(predict(learn, df).kind_pred, by_hand(learn, df, x=x, codes=['idle','run']))

def test_numbers_are_labels_if_a_vocabulary_is_given():
    df = frame([40]*9)
    learn = make(df=df.assign(kind=df.kind.map(dict(new=30, old=10, worn=20))), vocab=[30,10,20])
    new = new_frame()
    out = predict(learn, new)
    assert out.kind_pred.dtype==np.int64
    np.testing.assert_array_equal(out.kind_pred, [dict(new=30, old=10, worn=20)[o] for o in by_hand(learn, new)])

def test_any_model_with_one_answer():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = StatefulRNN(nn.LSTM(2, 5, batch_first=True)),nn.Linear(5, 3)
        def forward(self, x): return self.head(self.rnn(x)[:,-1])
    set_seed(0)
    learn,df = make(model=Own()),new_frame()
    np.testing.assert_array_equal(predict(learn, df).kind_pred, by_hand(learn, df))

def test_an_exported_learner_predicts_the_same(tmp_path):
    learn,df = make(x=['mode','u'], max_gap=2.),new_frame(gap_at=8)
    expected = predict(learn, df)
    learn.export(tmp_path/'l.pkl')
    pd.testing.assert_frame_equal(predict(load_learner(tmp_path/'l.pkl'), df), expected)

def test_scores_come_one_for_each_sequence_in_the_order_of_the_loader():
    learn,df = make(),new_frame()
    dl = learn.dls.test_df(df)
    with learn.no_bar(): preds = learn.get_preds(dl=dl)[0]
    assert isinstance(dl, WholeDL) and preds.shape==(len(UNEQUAL),3) and dl.dataset.groups==list(dict.fromkeys(df.pump))
    for name,p in zip(dl.dataset.groups, preds): assert KINDS[p.argmax()]==label_of(learn, df[df.pump==name].sort_values('hour'))
    np.testing.assert_array_equal(dl.dataset.index, df.index[dl.dataset.rows])

def test_labels_of_a_new_frame_give_metrics():
    set_seed(0)
    learn,df = make(),frame(UNEQUAL, 1)
    learn.metrics = accuracy
    dl = learn.dls.test_df(df, with_labels=True)
    with learn.no_bar(): assert learn.validate(dl=dl)[1]==pytest.approx((pd.DataFrame(dict(g=df.pump, ok=by_hand(learn, df)==df.kind)).groupby('g').ok.first()).mean())
    two = df.assign(kind=np.where(df.hour>5, 'old', 'new'))
    with pytest.raises(ValueError, match="has the labels .*but one_label says"): learn.dls.test_df(two, with_labels=True)
    halves = make(max_gap=2.)
    apart = new_frame(gap_at=8).assign(kind=lambda o: np.where(o.hour>50, 'old', 'new'))
    with pytest.raises(ValueError, match="has the labels .*but one_label says"): halves.dls.test_df(apart, with_labels=True)

def test_a_training_goes_on_after_a_prediction_as_without_it():
    check_trains_on(make, lambda learn: predict(learn, new_frame()))

@pytest.mark.parametrize('lengths', [[20], [20,20,20]], ids=str)
def test_a_model_that_answers_at_each_step_is_refused_by_name(lengths):
    learn = make()
    learn.model.last = False
    with pytest.raises(ValueError, match='expected 1 for each|expected one for each'): predict(learn, frame(lengths))


# --- The loader

@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('bs', [1, 2, 3, 64])
def test_each_sequence_comes_once_in_batches_of_one_length(bs, shuffle):
    xs = [torch.full((n,1), float(i)) for i,n in enumerate(UNEQUAL)]
    dl = WholeDL(Sequences(xs, xs), bs=bs, shuffle=shuffle)
    batches = list(dl)
    assert len(batches)==len(dl)==dl.n_whole
    seen = [(len(row), int(row[0,0])) for x,y in batches for row in x]
    assert sorted(seen)==sorted((n, i) for i,n in enumerate(UNEQUAL)) and [n for n,_ in seen]==sorted(UNEQUAL, reverse=True)
    assert all(len(x)<=bs and torch.equal(x, y) for x,y in batches)

def test_what_a_loader_of_whole_sequences_cannot_do_is_refused():
    xs = [torch.zeros(n, 1) for n in UNEQUAL]
    for kw in (dict(num_workers=1), dict(drop_last=True)):
        with pytest.raises(ValueError, match='Leave both out'): WholeDL(Sequences(xs, xs), **kw)
