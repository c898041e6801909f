"Data frames in, predictions of each row out: held against each group alone, by hand"
import pickle, subprocess, sys, warnings
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from helpers import check_trains_on, fit
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.sequences.axis import from_rows
from tbptt_fastai.sequences.frames import group_sequences
from tbptt_fastai.state.stateful import InitialState, StatefulRNN

from_df = SequenceDataLoaders.from_df


def frame(lengths, seed=0, names='abcdefgh'):
    "A row for each step, the groups mixed and out of order; the index says nothing"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame([dict(pump=names[g], hour=float(t), u=rng.standard_normal(), v=rng.standard_normal(), mode=rng.choice(['idle','run','stop']))
                       for g,n in enumerate(lengths) for t in range(n)])
    df['y'],df['z'] = df.u*2+1,df.v*100
    df['state'] = np.where(df.u>0, 'high', 'low')
    df = df.sample(frac=1, random_state=seed)
    df.index = rng.permutation(len(df))+500
    return df

def make(x=('u','v'), y='y', df=None, **kwargs):
    set_seed(0)
    own = {k:kwargs.pop(k) for k in ('n_skip','model','loss_func') if k in kwargs}
    df = frame([40, 25, 31]) if df is None else df
    dls = from_df(df, list(x), y, **{**dict(group='pump', time='hour', bs=3, sub_seq_len=7), **kwargs})
    if 'model' in own: return TbpttLearner(dls, **own)
    return fit(RNNLearner(dls, rnn_type='gru', hidden_size=6, **own), 2)

def alone(learn, df, x, codes=None):
    "The model's output for the rows of one group, in their order"
    values = np.stack([df[c].map(codes[c].index) if codes and c in codes else df[c] for c in x], 1)
    xb = torch.tensor(values.astype(np.float32))[None]
    dim = getattr(learn.model, 'time_dim', 1)
    with torch.no_grad():
        learn.model.eval()
        out = learn.model(xb if dim==1 else from_rows(xb, dim))
    return (out.transpose(1, 2) if dim==-1 else out.transpose(0, 1) if dim==0 else out)[0].numpy()

def by_hand(learn, df, x=('u','v'), codes=None, groups='pump', time='hour'):
    "Each group alone through the model, put back by position"
    df = df.reset_index(drop=True)
    out = None
    for _,rows in df.groupby(groups):
        rows = rows.sort_values(time)
        pred = alone(learn, rows, x, codes)
        if out is None: out = np.full((len(df), pred.shape[1]), np.nan)
        out[rows.index] = pred
    return out

def predict(learn, df, **kwargs):
    with learn.no_bar(): return learn.predict_df(df, **kwargs)

def new_frame(seed=1):
    "Other groups, other lengths, other order of the columns, no targets"
    df = frame([1, 9, 50, 17, 3, 8], seed, names=['new','b','much longer','x','y','z'])
    return df[['mode','v','hour','pump','u']]


@pytest.mark.parametrize('kw', [dict(), dict(n_skip=3), dict(y=['z','y']), dict(sub_seq_len=None), dict(win_sz=10, sub_seq_len=5), dict(time_dim=0), dict(time_dim=-1), dict(dtype=torch.float64)], ids=str)
def test_predictions_are_those_of_each_group_alone_put_back_by_position(kw):
    learn,df = make(**kw),new_frame()
    before = df.copy()
    out = predict(learn, df)
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_frame_equal(out[df.columns], df)
    names = [f'{o}_pred' for o in learn.dls.form.y]
    assert list(out.columns)==[*df.columns, *names]
    if kw.get('dtype') is torch.float64: learn.model.float()
    np.testing.assert_allclose(out[names].to_numpy(), by_hand(learn, df), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 99))
def test_any_lengths_in_any_order(learn_once, lengths, seed):
    df = frame(lengths, seed)
    np.testing.assert_allclose(predict(learn_once, df)[['y_pred']], by_hand(learn_once, df), atol=1e-5)

@pytest.fixture(scope='module')
def learn_once(): return make()


def test_names_of_predictions_are_given_and_none_is_written_over(learn_once):
    df = new_frame()
    assert predict(learn_once, df, names='guess').columns[-1]=='guess'
    with pytest.raises(ValueError, match="has a column 'y_pred' already"): predict(learn_once, df.assign(y_pred=0))
    with pytest.raises(ValueError, match='expected a name of its own'): predict(learn_once, df, names=['a','b'])


def test_a_training_goes_on_after_a_prediction_as_without_it():
    check_trains_on(make, lambda learn: predict(learn, new_frame()))


def test_what_a_new_frame_lacks_is_named_at_once(learn_once):
    df = new_frame()
    with pytest.raises(KeyError, match="no columns 'u', 'pump', 'hour'; it has"): predict(learn_once, df[['v','mode']])
    with pytest.raises(KeyError, match="no column 'v'; it has"): learn_once.dls.test_df(df.drop(columns='v'))
    with pytest.raises(TypeError, match='df is a dict'): predict(learn_once, dict(u=[1.]))
    with pytest.raises(ValueError, match='no rows'): predict(learn_once, df.iloc[:0])
    nan = df.reset_index(drop=True)
    nan.loc[20,'u'] = np.nan
    with pytest.raises(ValueError, match=f"Row 20 of group '{nan.pump[20]}' has nan in column 'u'"): predict(learn_once, nan)
    with pytest.raises(TypeError, match="Column 'u' is of type .*expected numbers"): predict(learn_once, df.assign(u='text'))


def test_loaders_of_arrays_say_that_they_predict_no_frame():
    arrays = SequenceDataLoaders.from_arrays([np.zeros(30), np.zeros(20)], [np.zeros(30), np.zeros(20)], sub_seq_len=5)
    with pytest.raises(TypeError, match='come from no data frame'): arrays.test_df(new_frame())


def test_targets_of_a_new_frame_give_losses_and_metrics(learn_once):
    df = frame([20, 30], 3)
    dl = learn_once.dls.test_df(df, with_labels=True)
    with learn_once.no_bar(): loss = learn_once.validate(dl=dl)[0]
    assert loss==pytest.approx(np.abs(by_hand(learn_once, df)[:,0]-df.y).mean(), rel=1e-4)
    np.testing.assert_array_equal(dl.dataset.index, df.index[dl.dataset.rows])


# --- Without targets, and by position

def test_group_sequences_takes_new_data_without_targets():
    df = frame([5, 3])
    with_y,without = group_sequences(df, 'u', 'y', 'pump', 'hour'),group_sequences(df.drop(columns='y'), 'u', None, 'pump', 'hour')
    for k,(x,y,index) in without.items():
        assert y is None and np.array_equal(x, with_y[k][0]) and list(index)==list(with_y[k][2])

def test_an_index_may_repeat():
    files = [frame([12], seed, names=[f'm{seed}']).reset_index(drop=True) for seed in range(5)]
    df = pd.concat(files)
    assert df.index.duplicated().any()
    learn = make(df=df)
    out = predict(learn, df)
    assert list(out.index)==list(df.index)
    np.testing.assert_allclose(out[['y_pred']], by_hand(learn, df), atol=1e-5)
    ds = learn.dls.valid_ds
    np.testing.assert_array_equal(df.iloc[ds.rows].y.to_numpy(np.float32), torch.cat([y[:,0] for _,y in ds]))
    spoilt = df.copy()
    spoilt.iloc[30, df.columns.get_loc('u')] = np.nan
    with pytest.raises(ValueError, match=f"Row {df.index[30]} at position 30 of group 'm2' has nan"): make(df=spoilt)


# --- Another process

def test_an_exported_learner_predicts_the_same(tmp_path):
    learn,df = make(x=['u','mode'], max_gap=2, df=frame([40, 25, 31])),new_frame()
    df['hour'] = df.hour+10*(df.hour>4)
    expected = predict(learn, df)
    learn.export(tmp_path/'l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    assert repr(loaded.dls.form)==repr(learn.dls.form) and loaded.dls.form.x_vocab==dict(mode=['idle','run','stop'])
    pd.testing.assert_frame_equal(predict(loaded, df), expected)
    df.to_pickle(tmp_path/'df.pkl')
    code = (f"import pandas as pd; from tbptt_fastai.all import *; l = load_learner(r'{tmp_path}/l.pkl')\n"
            f"with l.no_bar(): l.predict_df(pd.read_pickle(r'{tmp_path}/df.pkl')).to_pickle(r'{tmp_path}/out.pkl')")
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path/'out.pkl'), expected)


# --- Classes

def test_classes_come_back_as_labels():
    learn,df = make(y='state'),new_frame()
    out = predict(learn, df)
    np.testing.assert_array_equal(out.state_pred, np.array(['high','low'])[by_hand(learn, df).argmax(1)])
    numbers = make(y='n', df=frame([40, 25]).assign(n=lambda o: np.where(o.u>0, 10, 20)), vocab=[20,10])
    assert set(predict(numbers, df).n_pred)<={10,20} and predict(numbers, df).n_pred.dtype==np.int64

@pytest.mark.parametrize('kind', [str, 'category', object])
def test_inputs_of_strings_and_categories_are_embedded(kind):
    df = frame([40, 25, 31]).astype(dict(mode=kind))
    learn,new = make(x=['mode','u'], df=df),new_frame()
    assert learn.dls.train_ds.x_names==['mode','u'] and learn.model.embed.n_classes=={0:3}
    assert learn.model.scale_x.mean[0]==0 and learn.model.scale_x.std[0]==1 and learn.model.scale_x.mean[1]!=0
    np.testing.assert_allclose(predict(learn, new)[['y_pred']], by_hand(learn, new, ['mode','u'], dict(mode=['idle','run','stop'])), atol=1e-5)
    untrained = RNNLearner(learn.dls, rnn_type='gru', hidden_size=6).model.embed.embeds[0].weight
    assert (learn.model.embed.embeds[0].weight.abs().mean()-untrained.abs().mean()).abs()>1e-3

def test_what_an_embedding_gives_is_that_of_its_class():
    learn = make(x=['u','mode'])
    embed,x = learn.model.embed,torch.tensor([[[.5, 2.], [.1, 0.]]])
    expected = torch.cat([x[...,:1], embed.embeds[0].weight[[2,0]][None]], -1)
    torch.testing.assert_close(embed(x), expected)
    first = make(x=['mode','u']).model.embed
    torch.testing.assert_close(first(x.flip(-1)), torch.cat([x[...,:1], first.embeds[0].weight[[2,0]][None]], -1))

def test_classes_are_those_of_the_training_rows_alone():
    df = frame([40, 25])
    df['mode'] = np.where((df.pump=='a')&(df.hour>37), 'odd', df['mode'])
    last = df[df['mode']=='odd'].index
    with pytest.raises(ValueError, match=r"Row (%s) of group 'a' has 'odd' in column 'mode', which is none of the 3 classes"%'|'.join(map(str, last))): make(x=['mode','u'], df=df)
    known = make(x=['mode','u'], df=df, x_vocab=dict(mode=['odd','stop','run','idle']))
    assert known.dls.form.x_vocab==dict(mode=['odd','stop','run','idle'])
    one = make(x=['mode','u'], df=df, on_unknown='class')
    assert one.dls.form.x_vocab==dict(mode=['#na#','idle','run','stop'])
    declared = make(x=['mode','u'], df=df.assign(mode=pd.Categorical(df['mode'], ['stop','run','idle','odd','never'])))
    assert declared.dls.form.x_vocab==dict(mode=['stop','run','idle','odd','never'])

def test_unknown_classes_are_refused_or_one_class_of_their_own():
    strict,lenient = (make(x=['mode','u'], on_unknown=o) for o in ('raise','class'))
    new = new_frame().reset_index(drop=True)
    new.loc[[3,7],'mode'] = ['fault',None]
    with pytest.raises(ValueError, match="Row 3 of group .* has 'fault' in column 'mode'"): predict(strict, new)
    codes = dict(mode=['#na#','idle','run','stop'])
    coded = new.assign(mode=new['mode'].where(new['mode'].isin(codes['mode']), '#na#'))
    np.testing.assert_allclose(predict(lenient, new)[['y_pred']], by_hand(lenient, coded, ['mode','u'], codes), atol=1e-5)

def test_numbers_are_classes_if_a_vocabulary_says_so():
    df = frame([40, 25]).assign(gear=lambda o: o.hour.astype(int)%3*10)
    learn = make(x=['u','gear'], df=df, x_vocab=dict(gear=[0,10,20]))
    assert learn.model.embed.n_classes=={1:3}
    np.testing.assert_allclose(predict(learn, df)[['y_pred']], by_hand(learn, df, ['u','gear'], dict(gear=[0,10,20])), atol=1e-5)
    with pytest.raises(ValueError, match="classes of 'gears'"): make(x=['u','gear'], df=df, x_vocab=dict(gears=[1]))
    with pytest.raises(ValueError, match="on_unknown is 'drop'"): make(x=['u','gear'], df=df, on_unknown='drop')
    with pytest.raises(TypeError, match="values of several types"): make(x=['u','gear'], df=df.assign(gear=df.gear.astype(object).where(df.hour>2, 'a')))

def test_a_model_is_given_codes_that_are_classes():
    learn = make(x=['u','mode'])
    with pytest.raises(ValueError, match='Channel 1 has 3; expected the number of one of 3 classes'): learn.model(torch.tensor([[[0., 3.]]]))
    with pytest.raises(ValueError, match='Channel 1 has 0.5'): learn.model(torch.tensor([[[0., .5]]]))

@pytest.mark.parametrize('dim', [0, -1])
def test_embeddings_where_time_is_another_axis(dim):
    learn,new = make(x=['mode','u'], time_dim=dim),new_frame()
    np.testing.assert_allclose(predict(learn, new)[['y_pred']], by_hand(learn, new, ['mode','u'], dict(mode=['idle','run','stop'])), atol=1e-5)


# --- Holes

def holey(step=1.):
    df = frame([40, 25, 31])
    df['hour'] = (df.hour+100*(df.hour>=10)+7*(df.hour>=20))*step
    return df

@pytest.mark.parametrize('as_time', [False, True])
@pytest.mark.parametrize('max_gap,cuts', [(5, [10,20]), (50, [10]), (8, [10]), (7.5, [10,20])])
def test_a_new_sequence_begins_after_a_hole(max_gap, cuts, as_time):
    df = holey()
    if as_time: df,max_gap = df.assign(hour=pd.Timestamp('2024-01-01')+pd.to_timedelta(df.hour, unit='h')),f'{max_gap}h'
    learn = make(df=df, max_gap=max_gap, valid_groups=['c'])
    part = df.sort_values(['pump','hour']).groupby('pump').cumcount()
    part = sum((part>=c).astype(int) for c in cuts)
    assert sorted(learn.dls.train_ds.groups)==sorted(['a']*(1+len(cuts))+['b']*(1+len(cuts)))
    assert sorted(learn.dls.train_ds.lengths)==sorted(df.assign(part=part)[df.pump!='c'].groupby(['pump','part']).size())
    new = df.assign(part=part)
    np.testing.assert_allclose(predict(learn, df)[['y_pred']], by_hand(learn, new, groups=['pump','part']), atol=1e-5)

def test_the_held_back_end_is_of_the_group_not_of_its_parts():
    dls = from_df(holey(), 'u', 'y', group='pump', time='hour', max_gap=5, sub_seq_len=5)
    assert sorted(dls.valid_ds.groups)==['a','b','c']
    assert sum(dls.valid_ds.lengths)==8+5+6 and sum(dls.train_ds.lengths)==32+20+25

def test_parts_have_the_first_state_of_their_group():
    df = holey()
    first = InitialState(nn.Parameter(torch.tensor([[[.5]*4, [-.5]*4, [.1]*4]])), groups=list('abc'), batch_dim=1)
    model = nn.Sequential(StatefulRNN(nn.GRU(2, 4, batch_first=True), initial=first), nn.Linear(4, 1))
    learn = fit(make(df=df, max_gap=50, model=model, loss_func=nn.L1Loss()), 1)
    out = predict(learn, df).reset_index(drop=True)
    for i,name in enumerate('abc'):
        rows = out[out.pump==name].sort_values('hour')
        for part in (rows[rows.hour<50], rows[rows.hour>50]):
            h,_ = model[0].rnn(torch.tensor(part[['u','v']].to_numpy(np.float32))[None], model[0].initial.tensors[0][:,i:i+1].detach())
            np.testing.assert_allclose(part.y_pred, model[1](h)[0,:,0].detach(), atol=1e-5)

def test_a_hole_is_named_once_in_a_warning():
    df = holey()
    with pytest.warns(UserWarning, match=r"hole of 101 of group '.' after 9.0: 101 times the median step, the longest of 3 such holes") as said: make(df=df)
    assert sum('hole' in str(o.message) for o in said)==1
    times = df.assign(hour=pd.Timestamp('2024-01-01')+pd.to_timedelta(df.hour, unit='h'))
    with pytest.warns(UserWarning, match=r"hole of 4 days 05:00:00 of group '.' after 2024-01-01 09:00:00"): make(df=times)
    make(df=df, max_gap=float('inf')) # a warning would be an error
    make(df=times, max_gap=float('inf'))
    make(df=frame([40, 25, 31]).assign(hour=lambda o: o.hour+19*(o.hour>=10))) # 20 times
    with pytest.warns(UserWarning, match="21 times"): make(df=frame([40, 25, 31]).assign(hour=lambda o: o.hour+20*(o.hour>=10)))
    zoned = times.assign(hour=times.hour.dt.tz_localize('UTC').dt.tz_convert('Asia/Tokyo'))
    with pytest.warns(UserWarning, match=r"after 2024-01-01 18:00:00\+09:00"): make(df=zoned)
    learn = make(df=frame([40, 25, 31]))
    with pytest.warns(UserWarning, match="hole of 101"): predict(learn, df)

def test_a_gap_that_says_nothing_is_refused():
    df = holey()
    times = df.assign(hour=pd.Timestamp('2024-01-01')+pd.to_timedelta(df.hour, unit='h'))
    for o,gap,exc,match in [(df, '1h', TypeError, 'expected a number in the unit'), (times, 3, TypeError, "expected a time with its unit, such as '1h'"), (times, 'long', ValueError, "max_gap is 'long'"),
                            (df, 0, ValueError, 'above 0'), (df, -1., ValueError, 'above 0'), (times, '0h', ValueError, 'above 0'), (df, True, TypeError, 'max_gap is True'), (df, float('nan'), ValueError, 'above 0'),
                            (df, .5, ValueError, 'each row would be a sequence of its own'), (times, '1min', ValueError, 'each row would be a sequence')]:
        with pytest.raises(exc, match=match): make(df=o, max_gap=gap)
    with pytest.raises(ValueError, match='no column of times'): make(df=df, max_gap=3, time=None)


# --- Times

def test_times_and_groups_may_be_levels_of_the_index():
    df = frame([40, 25, 31])
    learn = make(df=df)
    new = new_frame()
    for levels in (['hour'], ['pump'], ['pump','hour']):
        by_level = make(df=df.set_index(levels))
        for p,q in zip(learn.model.parameters(), by_level.model.parameters()): assert torch.equal(p, q)
        out = predict(by_level, new.set_index(levels))
        assert out.index.names==levels and 'y_pred' in out and not set(levels)&set(out.columns)
        np.testing.assert_allclose(out.y_pred, predict(learn, new).y_pred, atol=1e-6)

def berlin(n=60):
    "Half hours over the end of daylight saving, in which two to three o'clock comes twice"
    utc = pd.date_range('2024-10-26 12:00', periods=n, freq='30min', tz='UTC')
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(pump='a', hour=utc.tz_convert('Europe/Berlin'), u=rng.standard_normal(n), v=0.))
    return df.assign(y=df.u).sample(frac=1, random_state=0)

def test_an_hour_that_comes_twice_is_two_hours_if_times_have_a_zone():
    df = berlin()
    learn = make(df=df, max_gap='45min', x=['u'])
    assert list(learn.dls.train_ds.lengths)==[48] # no hole
    utc = df.assign(hour=df.hour.dt.tz_convert('UTC'))
    text = df.assign(hour=df.hour.astype(str)) # of two offsets
    for same in (utc, text): torch.testing.assert_close(make(df=same, max_gap='45min', x=['u']).dls.train_ds[0][0], learn.dls.train_ds[0][0])
    local = df.assign(hour=df.hour.dt.tz_localize(None))
    with pytest.raises(ValueError, match='has the same hour as an earlier one.*when daylight saving ends, give times with a zone'): make(df=local, x=['u'])

@pytest.mark.parametrize('said', [None, FutureWarning])
def test_text_of_two_offsets_is_read_by_every_pandas(said, monkeypatch):
    "Before version 3 it gives objects, since 2.1 with a warning"
    df = berlin()
    expected = make(df=df, x=['u']).dls.train_ds[0][0]
    read = pd.to_datetime
    def older(o, utc=False):
        if utc: return read(o, utc=True)
        if said: warnings.warn('parsing datetimes with mixed time zones will raise an error unless `utc=True`', said)
        return o.map(read).astype(object)
    monkeypatch.setattr(pd, 'to_datetime', older)
    assert torch.equal(make(df=df.assign(hour=df.hour.astype(str)), x=['u']).dls.train_ds[0][0], expected)

def test_an_hour_that_is_left_out_in_spring_is_no_hole_if_times_have_a_zone():
    utc = pd.date_range('2024-03-30 12:00', periods=60, freq='30min', tz='UTC')
    df = berlin().assign(hour=utc.tz_convert('Europe/Berlin'))
    assert list(make(df=df, max_gap='45min', x=['u']).dls.train_ds.lengths)==[48]
    assert list(make(df=df.assign(hour=df.hour.dt.tz_localize(None)), max_gap='45min', x=['u']).dls.train_ds.lengths)==[26,22]

def test_times_may_be_periods_or_durations():
    df = frame([12, 8])
    days = from_df(df, 'u', 'y', group='pump', time='hour').train_ds
    whole = df.hour.astype(int)
    for same in (pd.PeriodIndex([pd.Period(ordinal=o, freq='D') for o in whole]), pd.to_timedelta(whole, unit='h'), whole.astype('Int64')):
        for a,b in zip(from_df(df.assign(hour=same), 'u', 'y', group='pump', time='hour').train_ds, days): assert torch.equal(a[0], b[0])
    with pytest.raises(ValueError, match='inf as hour'): from_df(df.assign(hour=df.hour.replace(3., np.inf)), 'u', 'y', group='pump', time='hour')


# --- Live

def test_live_step_by_step_in_strings_is_as_the_frame():
    learn = make(x=['mode','u'])
    new = frame([30], 5).sort_values('hour')
    expected = predict(learn, new).y_pred
    live = StreamPredictor(learn)
    got = [live(new[['mode','u']].iloc[i:i+1])[0,0] for i in range(len(new))]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match='Select those by df'): live(new[['u','mode']].iloc[:1])
    with pytest.raises(ValueError, match="has 'fault' in column 'mode'"): live(pd.DataFrame(dict(mode=['fault'], u=[.1])))
    np.testing.assert_allclose(StreamPredictor(learn)(new.assign(mode=new['mode'].map(['idle','run','stop'].index))[['mode','u']].to_numpy())[:,0], expected, atol=1e-5)

def test_a_missing_class_is_held_as_a_missing_number_is():
    learn = make(x=['mode','u'])
    new = frame([30], 5).sort_values('hour')[['mode','u']].reset_index(drop=True)
    holes = new.copy()
    holes.loc[[4,9],'mode'],holes.loc[7,'u'] = None,np.nan
    np.testing.assert_allclose(StreamPredictor(learn, on_nan='hold')(holes), StreamPredictor(learn)(holes.ffill()), atol=1e-6)
    with pytest.raises(ValueError, match='Stream 0 has .*nan.* at step 4 of the chunk'): StreamPredictor(learn)(holes)

def test_embedded_inputs_as_an_onnx_file(tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    from tbptt_fastai.deploy.onnx import to_onnx
    learn,x = make(x=['mode','u']),torch.tensor([[[0.,.3],[2,.2],[1,-.4]]])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of the exporter
        to_onnx(learn, tmp_path/'m.onnx', x)
    session = ort.InferenceSession(str(tmp_path/'m.onnx'))
    state = {o.name:np.zeros([d if isinstance(d, int) else 1 for d in o.shape], np.float32) for o in session.get_inputs()[1:]}
    with torch.no_grad(): np.testing.assert_allclose(session.run(None, {'x': x.numpy(), **state})[0], learn.model.eval()(x), atol=1e-5)
