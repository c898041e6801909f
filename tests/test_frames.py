"Data frames: each group one sequence, in the order of time, and predictions find back to their rows"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.sequences.frames import group_sequences
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.loaders.streams import StreamDL


def frame(lengths, seed=0):
    "Groups a, b, ...; rows in disorder, the index says nothing about them"
    rng = np.random.default_rng(seed)
    rows = [dict(name=chr(97+g), day=pd.Timestamp('2024-01-01')+pd.Timedelta(days=t), t=t, u=rng.standard_normal(), v=float(t), y=rng.standard_normal()) for g,n in enumerate(lengths) for t in range(n)]
    df = pd.DataFrame(rows).sample(frac=1, random_state=seed)
    df.index = rng.permutation(len(df))+1000
    return df

def from_df(df, **kwargs): return SequenceDataLoaders.from_df(df, **{**dict(x=['u','v'], y='y', group='name', time='day', bs=3, sub_seq_len=4), **kwargs})


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.sampled_from([.1, .3, .5]), st.integers(0, 99))
def test_groups_in_order_of_time_split_at_their_ends(lengths, valid_pct, seed):
    df = frame(lengths, seed)
    if max(int(n*valid_pct) for n in lengths)==0:
        with pytest.raises(ValueError, match=f'the longest group has {max(lengths)} rows'): from_df(df, valid_pct=valid_pct, sub_seq_len=None)
        return
    dls = from_df(df, valid_pct=valid_pct, sub_seq_len=None)
    for ds,part in ((dls.train_ds, lambda n: (0, n-int(n*valid_pct))), (dls.valid_ds, lambda n: (n-int(n*valid_pct), n))):
        bounds = {chr(97+g): part(n) for g,n in enumerate(lengths)}
        assert sorted(ds.groups)==[k for k,(a,b) in bounds.items() if a<b]
        rows = df.loc[ds.index]
        for group,(x,y) in zip(ds.groups, ds):
            sorted_rows = df[df.name==group].sort_values('day').iloc[slice(*bounds[group])]
            np.testing.assert_array_equal(x, sorted_rows[['u','v']].to_numpy(np.float32))
            np.testing.assert_array_equal(y, sorted_rows[['y']].to_numpy(np.float32))
            assert rows[rows.name==group].t.tolist()==sorted_rows.t.tolist()
    assert isinstance(dls.train, StreamDL)


def test_predictions_find_back_to_their_rows():
    df = frame([9, 30, 4, 17])
    set_seed(0)
    model = nn.Sequential(StatefulRNN(nn.GRU(2, 4, batch_first=True)), nn.Linear(4, 1))
    learn = TbpttLearner(from_df(df, valid_groups=['d','b']), model)
    with learn.no_bar(): preds,targs = learn.get_preds()
    df.loc[learn.dls.valid_ds.index, 'pred'] = preds[:,0].numpy()
    np.testing.assert_array_equal(df.loc[learn.dls.valid_ds.index, 'y'].to_numpy(np.float32), targs[:,0])
    for group in 'bd':
        rows = df[df.name==group].sort_values('day')
        with torch.no_grad(): expected = model(torch.tensor(rows[['u','v']].to_numpy(), dtype=torch.float32)[None])[0,:,0]
        np.testing.assert_allclose(rows.pred, expected, atol=1e-6)
    assert df[df.name.isin(['a','c'])].pred.isna().all()


def test_times_may_be_text_or_numbers_or_left_out():
    df = frame([12, 8])
    days = from_df(df).train_ds
    for same in (df.assign(day=df.day.dt.strftime('%Y-%m-%d')), df.assign(day=df.day.dt.strftime('%m/%d/%Y')), df.assign(day=df.t), df.assign(day=df.day.dt.tz_localize('UTC'))):
        for a,b in zip(from_df(same).train_ds, days): assert torch.equal(a[0], b[0])
    unsorted = group_sequences(df, 'u', 'y', group='name')
    np.testing.assert_array_equal(unsorted['a'][0][:,0], df[df.name=='a'].u)
    whole = group_sequences(df[df.name=='a'], 'u', 'y', time='day')
    assert list(whole)==[None] and len(whole[None][0])==12


def test_groups_may_be_of_several_columns_and_of_any_type():
    df = frame([6, 6, 6]).assign(plant=lambda o: o.t%2)
    groups = group_sequences(df, 'u', 'y', group=['name','plant'], time='day')
    assert len(groups)==6 and ('a', 0) in groups
    assert all(len(o[0])==3 for o in groups.values())
    assert set(group_sequences(df.assign(name=df.name.astype('category')), 'u', 'y', 'name', 'day'))=={'a','b','c'}
    assert set(group_sequences(df.assign(name=df.name.map(ord)), 'u', 'y', 'name', 'day'))=={97,98,99}


def spoil(column, value, row=5):
    df = frame([12, 8])
    df[column] = df[column].astype(object) if isinstance(value, str) else df[column]
    df.iloc[row, df.columns.get_loc(column)] = value
    return df

@pytest.mark.parametrize('make,match', [
    (lambda: spoil('u', np.nan), r"Row {row} of group '{group}' has nan in column 'u'"),
    (lambda: spoil('y', np.inf), r"Row {row} of group '{group}' has inf in column 'y'"),
    (lambda: spoil('day', pd.NaT), r"Row {row} of group '{group}' has no day"),
    (lambda: spoil('name', None), r"Row {row} has no group: its 'name' is missing"),
])
def test_what_is_missing_is_named_by_group_and_row(make, match):
    df = make()
    with pytest.raises(ValueError, match=match.format(row=df.index[5], group=df.name.iloc[5])): from_df(df)


def test_integer_targets_are_classes():
    df = frame([12, 8]).assign(label=lambda o: o.t%3, twice=lambda o: o.t*2)
    assert from_df(df, y='label').train_ds[0][1].dtype==torch.int64 and from_df(df, y='label').train_ds[0][1].ndim==1
    assert from_df(df, y=['label','twice']).train_ds[0][1].shape[1]==2
    assert from_df(df, y=['label','y']).train_ds[0][1].dtype==torch.float32


def test_long_groups_are_cut_into_parts_for_training_only():
    dls = from_df(frame([40, 25]), win_sz=10, sub_seq_len=5)
    assert sum(dls.train_ds.lengths)==32+20 and max(dls.train_ds.lengths)==10 and len(dls.train_ds)==4+2
    assert len(dls.valid_ds.index)==13


def test_what_makes_no_sequence_is_refused_by_name():
    df = frame([12, 8])
    twice = df.copy()
    i,j = np.flatnonzero(df.name=='b')[:2]
    twice.iloc[j, twice.columns.get_loc('day')] = twice.iloc[i].day
    with pytest.raises(ValueError, match=f"Row {twice.index[j]} of group 'b' has the same day as an earlier one, {twice.iloc[i].day}"): from_df(twice)
    from_df(df.assign(day=pd.Timestamp('2024-01-01')+pd.to_timedelta(df.t, unit='D'))) # the same day in two groups is no repetition
    for kw,exc,match in [(dict(x='w'), KeyError, "no column 'w'; it has"), (dict(group='z'), KeyError, "no column 'z'"), (dict(x='day'), TypeError, "Column 'day' is of type .*; expected numbers"),
                         (dict(valid_groups='z'), ValueError, "no group 'z' to hold back"), (dict(valid_groups=['a','b']), ValueError, 'no group is left for training'), (dict(valid_groups=[]), ValueError, 'none is held back'),
                         (dict(valid_pct=1.5), ValueError, 'valid_pct is 1.5'), (dict(sub_seq_len=100), ValueError, 'sub_seq_len is 100, but the longest sequence has 10 steps'), (dict(win_size=3), TypeError, "win_size")]:
        with pytest.raises(exc, match=match): from_df(df, **kw)
    with pytest.raises(TypeError, match='df is a dict'): from_df(dict(u=[1.]))
    with pytest.raises(ValueError, match='expected at least one column'): from_df(df, x=[])
    with pytest.raises(ValueError, match=r"columns of the same name: \['u'\]"): from_df(pd.concat([df, df[['u']]], axis=1))
    with pytest.raises(TypeError, match="Column 'u' is of type complex128"): from_df(df.assign(u=df.u*1j))
    with pytest.raises(ValueError, match='no rows'): from_df(df.iloc[:0])
    with pytest.raises(ValueError, match='Row 1003 at position 20 of group .* has the same day as an earlier one'): from_df(pd.concat([df, df.loc[[1003]]]))
    with pytest.raises(ValueError, match="text that is no time"): from_df(df.assign(day='monday'))


def test_a_group_too_short_for_validation_is_in_training_only():
    dls = from_df(frame([1, 3, 30]), valid_pct=.2)
    assert sorted(dls.train_ds.groups)==['a','b','c'] and dls.valid_ds.groups==['c']
    assert sum(dls.train_ds.lengths)==28


def test_stocks_are_split_by_stock_and_by_date(data_dir):
    df = pd.read_csv(data_dir/'stocks.csv')
    dls = from_df(df, x='value', y='change', group='stock', time='Date', bs=5, sub_seq_len=64)
    assert dls.train_ds.lengths.tolist()==[1844]*5 and dls.valid_ds.lengths.tolist()==[461]*5
    assert dls.train.waste==0
    last = df.sort_values('Date').groupby('stock').tail(461)
    assert sorted(dls.valid_ds.index)==sorted(last.index)
