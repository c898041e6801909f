"Unusual frames: what is legal is right, what is not is refused by name"
import numpy as np, pandas as pd, pytest, torch
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from test_predict_df import by_hand, frame, make, new_frame, predict

from_df = SequenceDataLoaders.from_df


# --- A column with two parts to play

def test_a_column_of_numbers_that_is_input_and_class_is_a_number_as_input():
    df = frame([40, 25]).assign(gear=lambda o: o.hour.astype(int)%3*10+10)
    learn = make(x=['u','gear'], y='gear', vocab=[10,20,30], df=df)
    assert set(learn.dls.train_ds[0][0][:,1].tolist())=={10.,20.,30.}
    expected = np.array([10,20,30])[by_hand(learn, df, ['u','gear']).argmax(1)]
    np.testing.assert_array_equal(predict(learn, df).gear_pred, expected)
    with_labels = learn.dls.test_df(df, with_labels=True).dataset
    assert set(with_labels[0][0][:,1].tolist())=={10.,20.,30.} and set(with_labels[0][1].tolist())=={0,1,2}

def test_a_column_of_labels_that_is_input_and_target_is_embedded():
    df,x,codes = frame([40, 25]),['u','mode'],dict(mode=['idle','run','stop'])
    learn = make(x=x, y='mode', df=df)
    assert learn.dls.form.x_vocab==codes and learn.model.embed.n_classes=={1:3}
    expected = np.array(codes['mode'])[by_hand(learn, df, x, codes).argmax(1)]
    np.testing.assert_array_equal(predict(learn, df).mode_pred, expected)

def test_a_group_that_is_the_target_keeps_its_name():
    learn = make(y='pump')
    ds = learn.dls.test_df(frame([20, 30]), with_labels=True).dataset
    assert set(ds.groups)=={'a','b'} and set(torch.cat([y for _,y in ds]).tolist())=={0,1}


# --- Names of columns

@pytest.mark.parametrize('kind', [list, tuple, np.array, pd.Index, pd.Series, dict.fromkeys], ids=lambda o: o.__name__)
def test_names_come_in_any_kind_of_list(kind):
    learn = make(x=kind(['u','v']), y=kind(['y']), group=kind(['pump']), time=['hour'], valid_groups=kind(['b']))
    assert learn.dls.form.x==['u','v'] and type(learn.dls.form.x[0]) is str and list(learn.dls.valid_ds.groups)==['b']
    np.testing.assert_allclose(predict(learn, new_frame())[['y_pred']], by_hand(learn, new_frame()), atol=1e-5)

def test_a_set_of_names_has_no_order_and_is_refused():
    for kw in (dict(x={'u','v'}), dict(y={'y','z'}), dict(group={'pump'}), dict(valid_groups={'a','b'})):
        with pytest.raises(TypeError, match='is a set, which has no order: expected a list'): from_df(frame([40, 25]), **{**dict(x='u', y='y', group='pump', time='hour'), **kw})

def test_inputs_and_targets_may_be_levels_of_the_index():
    df,new = frame([40, 25, 31]),new_frame()
    expected = predict(make(df=df), new).y_pred
    for levels in (['u'], ['v','y'], ['hour','u','pump','y']):
        learn = make(df=df.set_index(levels))
        np.testing.assert_allclose(predict(learn, new.set_index([o for o in levels if o!='y'])).y_pred, expected, atol=1e-6)
    labelled = make(df=df.set_index('state'), y='state').dls
    assert list(labelled.vocab)==['high','low'] and len(labelled.test_df(df.set_index('state'), with_labels=True).dataset[0])==2

def test_a_frame_whose_columns_are_tuples():
    df = frame([40, 25])
    expected = predict(make(df=df), df).y_pred
    for columns in (pd.MultiIndex.from_product([['p'], df.columns]), pd.Index([('p', c) for c in df.columns], tupleize_cols=False)):
        named = df.set_axis(columns, axis=1)
        kw = dict(y=[('p','y')], group=[('p','pump')], time=('p','hour'))
        out = predict(make(df=named, x=[('p','u'),('p','v')], **kw), named)
        assert out.columns[-1]==('p','y_pred') and out.columns.nlevels==columns.nlevels
        np.testing.assert_allclose(out.iloc[:,-1], expected, atol=1e-6)
        with pytest.raises(KeyError, match="no column 'p'; it has"): make(df=named, x='p', **kw)

def test_predictions_may_be_columns_of_any_name():
    df = frame([40, 25]).rename(columns=dict(y=0))
    learn = make(df=df, y=0)
    assert predict(learn, df).columns[-1]=='0_pred' and predict(learn, df, names=1).columns[-1]==1
    assert predict(learn, df, names=pd.Index(['guess'])).columns[-1]=='guess'

def test_there_is_one_column_of_times():
    with pytest.raises(ValueError, match=r"time is \['hour', 'u'\]: expected one column"): make(time=['hour','u'])


# --- Times

def order_of(times, **kwargs):
    "Which steps of the first group are in which sequence of the training, when its times are given so"
    df = frame([12, 8])
    ds = from_df(df.assign(hour=times(df.hour)), 'u', 'y', group='pump', time='hour', valid_groups='b', **kwargs).train_ds
    hours = dict(zip(df.u.astype(np.float32), df.hour))
    return [[hours[np.float32(o)] for o in x[:,0].tolist()] for x,_ in ds]

KINDS = dict(
    numbers=lambda t: t.astype(object), fractions=lambda t: (t/10).astype(object), integers=lambda t: t.astype(int).astype(object),
    dates=lambda t: (pd.Timestamp('2024-01-28')+pd.to_timedelta(t, unit='D')).dt.date, categories=lambda t: pd.Categorical(t),
    text=lambda t: pd.Categorical((pd.Timestamp('2024-01-28')+pd.to_timedelta(t, unit='D')).dt.strftime('%Y-%m-%d')),
    backwards=lambda t: pd.Categorical(t, categories=sorted(set(t), reverse=True)), negative=lambda t: t-1000, small=lambda t: (t-6).astype(np.int8))
@pytest.mark.parametrize('kind', KINDS)
def test_times_of_any_kind_are_in_order(kind): assert order_of(KINDS[kind])==[list(range(12))]

def test_objects_that_are_numbers_have_gaps_in_numbers():
    assert order_of(lambda t: (t+9*(t>4)).astype(object), max_gap=2.5)==[[*range(5)], [*range(5, 12)]]

@pytest.mark.parametrize('dtype,first,hole', [(np.int8, -100, 150), (np.int16, -30_000, 60_000), (np.int32, -2**31, 2**32-100), (np.int64, -2**63, 2**63+1000), (np.uint8, 0, 200), (np.uint64, 2**63, 2**62), ('Int8', -100, 150)], ids=str)
def test_a_hole_is_one_whatever_the_type_of_the_times(dtype, first, hole):
    "The difference of two numbers of a type may be too large for it"
    def times(t): return pd.Series([first+int(o)+hole*(o>4) for o in t], t.index, dtype=dtype)
    assert order_of(times, max_gap=2)==[[*range(5)], [*range(5, 12)]]
    with pytest.warns(UserWarning, match='There is a hole of'): order_of(times)

@pytest.mark.parametrize('gap', [np.timedelta64(90, 'm'), pd.Timedelta('90min'), pd.offsets.Minute(90), pd.Timedelta('90min').to_pytimedelta(), '1.5h'], ids=repr)
def test_a_gap_is_a_time_of_any_kind(gap):
    def times(t): return pd.to_timedelta(t+(t>4), unit='h')
    assert order_of(times, max_gap=gap)==[[*range(5)], [*range(5, 12)]]

@pytest.mark.parametrize('times', [lambda t: t+1j, lambda t: pd.arrays.IntervalArray.from_arrays(t, t+1), lambda t: pd.Categorical(pd.arrays.IntervalArray.from_arrays(t, t+1))])
def test_what_has_no_order_in_time_is_refused(times):
    with pytest.raises(TypeError, match="Column 'hour' is of type .*; expected real numbers, dates, durations or periods"): order_of(times)


# --- Classes

def test_a_class_that_is_called_na_hides_no_unknown_one():
    df = frame([40, 25]).assign(mode=lambda o: np.where(o.hour==3, '#na#', o['mode']))
    learn = make(x=['mode','u'], df=df)
    assert learn.dls.form.x_vocab==dict(mode=['#na#','idle','run','stop'])
    with pytest.raises(ValueError, match="has 'fault' in column 'mode', which is none of the 4 classes"): predict(learn, df.assign(mode='fault'))

def test_the_class_of_unknown_values_may_stand_anywhere():
    df,vocab = frame([40, 25]),['idle','run','#na#','stop']
    learn = make(x=['mode','u'], df=df, x_vocab=dict(mode=vocab), on_unknown='class')
    assert learn.dls.form.x_vocab==dict(mode=vocab)
    new = df.assign(mode=df['mode'].where(df.hour!=2, 'fault').where(df.hour!=3))
    coded = df.assign(mode=df['mode'].where((df.hour!=2)&(df.hour!=3), '#na#'))
    np.testing.assert_allclose(predict(learn, new)[['y_pred']], by_hand(learn, coded, ['mode','u'], dict(mode=vocab)), atol=1e-5)

@pytest.mark.parametrize('kind', [np.array, pd.Index, tuple, pd.Series])
def test_a_vocabulary_comes_in_any_kind_of_list(kind):
    classes = ['stop','idle','run']
    learn = make(x=['mode','u'], y='mode', x_vocab=dict(mode=kind(classes)), vocab=kind(classes))
    assert learn.dls.form.x_vocab==dict(mode=classes) and list(learn.dls.vocab)==classes and {type(o) for o in learn.dls.vocab}=={str}

@pytest.mark.parametrize('vocab', ['idle', {'idle'}, 3, [['idle'],['run']]], ids=repr)
def test_what_is_no_vocabulary_is_refused(vocab):
    for kw in (dict(x=['u'], y='mode', vocab=vocab), dict(x=['mode','u'], x_vocab=dict(mode=vocab))):
        with pytest.raises(TypeError, match='expected a list, whose order|expected strings or numbers'): make(**kw)
    with pytest.raises(TypeError, match='expected a dict with the classes of each column'): make(x=['mode','u'], x_vocab=vocab)

def test_values_of_several_types_are_named():
    df = frame([40, 25])
    for odd in (3, ['run'], True):
        mixed = df.assign(mode=[odd if t==4 else o for t,o in zip(df.hour, df['mode'])])
        for kw in (dict(x=['u'], y='mode'), dict(x=['mode','u'])):
            with pytest.raises(TypeError, match=f"Column 'mode' has values of several types, .*{type(odd).__name__}"): make(df=mixed, **kw)
    xs,ys = [np.zeros(4), np.zeros(5)],[np.array(['a', 1, 'b', 'b'], object), np.array(['a']*5)]
    with pytest.raises(TypeError, match="y has values of several types, .*int"): SequenceDataLoaders.from_arrays(xs, ys)
    with pytest.raises(TypeError, match='cannot be looked up by its name'): make(df=df.assign(pump=[[o] for o in df.pump]))

def test_labels_are_not_looked_for_where_targets_are_numbers():
    df = frame([40, 25])
    with pytest.raises(TypeError, match="Column 'y' is of type .*expected numbers"): make(df=df).dls.test_df(df.assign(y=df.state), with_labels=True)


# --- Arguments

def test_what_is_no_argument_is_refused_not_left_aside():
    learn = make()
    with pytest.raises(TypeError, match=r"unexpected arguments \['batch'\]"): predict(learn, new_frame(), batch=3)
    with pytest.raises(TypeError, match=r"unexpected arguments \['as_stream'\]"): learn.dls.test_df(new_frame(), as_stream=False)
    with pytest.raises(TypeError, match=r"unexpected arguments \['batch'\]"): learn.dls.test_dl([np.zeros((9, 2), np.float32)]*2, batch=3)
    xs = [np.zeros(30), np.zeros(20)]
    with pytest.raises(ValueError, match='valid_groups are names of the sequences in valid, which is not given'): SequenceDataLoaders.from_arrays(xs, xs, valid_groups=['a','b'])

@pytest.mark.parametrize('kw,error,match', [
    (dict(valid_pct='a'), TypeError, "valid_pct is 'a', a str; expected a share"), (dict(valid_pct=None), TypeError, 'valid_pct is None'), (dict(valid_pct=True), TypeError, 'valid_pct is True'),
    (dict(val_bs=0), ValueError, 'val_bs is 0'), (dict(dt=-1), ValueError, 'dt is -1'), (dict(dt='1s'), TypeError, "dt is '1s'"), (dict(dt=float('nan')), ValueError, 'dt is nan')], ids=str)
def test_settings_that_say_nothing_are_refused(kw, error, match):
    with pytest.raises(error, match=match): make(**kw)
    xs = [np.zeros(30), np.zeros(20)]
    with pytest.raises(error, match=match): SequenceDataLoaders.from_arrays(xs, xs, **kw)

def test_no_sequences_and_sparse_ones_are_refused():
    learn,xs = make(),[torch.zeros(30, 2), torch.zeros(20, 2)]
    with pytest.raises(ValueError, match='There are no test items'): learn.dls.test_dl([])
    with pytest.raises(TypeError, match=r'x\[0\] is a tensor that is of layout torch.sparse_coo; expected a dense one'): SequenceDataLoaders.from_arrays([o.to_sparse() for o in xs], xs)

@pytest.mark.parametrize('x', [None, [], [3]], ids=str)
def test_names_of_datasets_are_names(tmp_path, x):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path/'a.h5', 'w') as f: f['u'] = f['y'] = np.zeros(30)
    from_hdf5 = SequenceDataLoaders.from_hdf5
    with pytest.raises(TypeError, match='expected the name of a dataset'): from_hdf5(tmp_path/'a.h5', x, 'y')
    with pytest.raises(TypeError, match='expected the name of a dataset'): from_hdf5(tmp_path/'a.h5', 'u', x)
    with pytest.raises(TypeError, match='The files are 3; expected a pattern'): from_hdf5(3, 'u', 'y')

def test_a_new_frame_in_another_unit_of_time_is_named():
    learn = make(max_gap=2)
    with pytest.warns(UserWarning, match='max_gap is 2, less than each of the steps of this frame: each row is a sequence'): out = predict(learn, new_frame().assign(hour=lambda o: o.hour*60))
    alone = new_frame().assign(pump=range(len(out)))
    np.testing.assert_allclose(out[['y_pred']], by_hand(learn, alone), atol=1e-5)
    predict(learn, new_frame().groupby('pump').head(1)) # each group has one row: no warning


# --- Live

def test_live_rows_of_a_frame_without_classes_are_read_as_in_training():
    new = frame([30], 5).sort_values('hour')
    learn = make()
    expected = predict(learn, new).y_pred
    for kind in ('float64', 'Float64', object):
        live = StreamPredictor(learn)
        rows = new[['u','v']].astype(kind)
        np.testing.assert_allclose([live(rows[i:i+1])[0,0] for i in range(len(rows))], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"has the channels .*Select those by df\[names\]"): StreamPredictor(learn)(new.iloc[:3])
    with pytest.raises(TypeError, match='not all numbers'): StreamPredictor(learn)(new[['u','v']].assign(u='high'))

def test_live_columns_without_names_are_found_by_their_numbers():
    df = frame([40, 25]).rename(columns=dict(u=0, v=1))
    learn = make(df=df, x=[0, 1])
    new = df[df.pump=='a'].sort_values('hour')
    expected = predict(learn, new).y_pred
    for columns in ([0, 1], [1, 0]): np.testing.assert_allclose(StreamPredictor(learn)(new[columns])[:,0], expected, atol=1e-5)
    with pytest.raises(KeyError, match='no column 1; it has'): StreamPredictor(learn)(new[[0]])

def test_live_integers_and_flags_are_numbers_as_in_training():
    df = frame([40, 25]).assign(u=lambda o: o.hour.astype(int)%3, v=lambda o: o.z>0)
    learn = make(df=df)
    new = df[df.pump=='a'].sort_values('hour')
    np.testing.assert_allclose(StreamPredictor(learn)(new[['u','v']])[:,0], predict(learn, new).y_pred, atol=1e-5)

def test_live_frames_for_a_model_without_the_form_of_a_frame():
    learn,new = make(),frame([30], 5).sort_values('hour')
    expected = StreamPredictor(learn.model)(torch.tensor(new[['u','v']].to_numpy(np.float32)))
    np.testing.assert_allclose(StreamPredictor(learn.model)(new[['u','v']]), expected, atol=1e-6)
