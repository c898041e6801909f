"Held-back ends of sequences that begin with the state of what came before them"
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.losses import L1LossFlat
from fastai.metrics import mse
from fastai.torch_core import set_seed
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.sequences.windows import Sequences, SequenceWindows
from tbptt_fastai.state.stateful import InitialState, StatefulRNN
from helpers import fit

LENGTHS = dict(a=103, b=57, c=211)
CUTS = {k: n-int(n*.3) for k,n in LENGTHS.items()}

def rows_of(name, n, rng):
    u = rng.normal(size=n)
    return pd.DataFrame(dict(name=name, t=np.arange(n), u=u, y=np.convolve(u, .9**np.arange(20))[:n]))

@pytest.fixture(scope='module')
def df():
    rng = np.random.default_rng(0)
    rows = pd.concat([rows_of(*o, rng) for o in LENGTHS.items()], ignore_index=True)
    return rows.sample(frac=1, random_state=1)

def loaders(df, **kwargs):
    set_seed(0)
    kw = dict(group='name', time='t', sub_seq_len=16, bs=2, dtype=torch.float64, valid_pct=.3)
    return SequenceDataLoaders.from_df(df, 'u', 'y', **{**kw, **kwargs})

def learner(dls, rnn_type='lstm', **kwargs):
    set_seed(3)
    return RNNLearner(dls, rnn_type, hidden_size=5, loss_func=L1LossFlat(), metrics=mse, **kwargs)

def alone(learn, df, name, start=0):
    "Inputs, targets and predictions of a group from a step on, run at once by the model from its first state"
    group = df[df.name==name].sort_values('t')[start:]
    model = learn.model.eval()
    model.reset()
    x = torch.tensor(group[['u']].to_numpy())[None]
    with torch.no_grad(): pred = model(x)[0]
    model.reset()
    return group,pred,torch.tensor(group[['y']].to_numpy())

def evaluated(learn, dl=None):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.valid if dl is None else dl)

@pytest.mark.parametrize('rnn_type', ['lstm', 'gru'])
@pytest.mark.parametrize('sub_seq_len', [1, 16, 64, None])
@pytest.mark.parametrize('bs', [1, 2, 3])
@pytest.mark.parametrize('warm_up', [True, 5, 16, 60])
def test_predictions_are_those_of_the_model_run_over_what_came_before(df, rnn_type, sub_seq_len, bs, warm_up):
    dls = loaders(df, sub_seq_len=sub_seq_len, bs=bs, valid_warm_up=warm_up)
    learn = learner(dls, rnn_type)
    preds,targets = evaluated(learn)
    parts = {}
    for name,cut in CUTS.items():
        n = cut if warm_up is True else min(cut, warm_up)
        parts[name] = [o[n:] for o in alone(learn, df, name, cut-n)]
    torch.testing.assert_close(preds, torch.cat([parts[o][1] for o in dls.valid_ds.groups]), rtol=0, atol=1e-12)
    assert torch.equal(targets, torch.cat([parts[o][2] for o in dls.valid_ds.groups]))
    assert dls.valid_ds.index.equals(pd.concat([parts[o][0] for o in dls.valid_ds.groups]).index)
    assert [len(o) for o in dls.valid.by_sequence(preds)]==[LENGTHS[o]-CUTS[o] for o in dls.valid_ds.groups]

@pytest.mark.parametrize('n_skip,warm_up', [(0, True), (10, True), (50, True), (10, 4), (20, 16), (70, 30)])
@pytest.mark.filterwarnings('ignore:(?s).*not longer than n_skip')
def test_loss_and_metrics_are_of_the_steps_after_warm_up_and_washout(df, n_skip, warm_up):
    learn = learner(loaders(df, valid_warm_up=warm_up), n_skip=n_skip)
    with learn.no_bar(): loss,metric = learn.validate()
    errors = []
    for name,cut in CUTS.items():
        n = cut if warm_up is True else min(cut, warm_up)
        _,pred,y = alone(learn, df, name, cut-n)
        errors.append((pred-y)[max(n, n_skip):])
    errors = torch.cat(errors)
    np.testing.assert_allclose([loss, metric], [errors.abs().mean(), (errors**2).mean()], rtol=1e-6)

def test_a_washout_that_is_over_before_the_held_back_end_takes_nothing_from_it(df):
    learn = learner(loaders(df, valid_warm_up=True), n_skip=30)
    with learn.no_bar(): losses = learn.get_preds(with_loss=True)[-1]
    assert losses.isfinite().all() and len(losses)==sum(LENGTHS[o]-CUTS[o] for o in CUTS)
    learn = learner(loaders(df, valid_warm_up=20), n_skip=30)
    with learn.no_bar(): losses = learn.get_preds(with_loss=True)[-1]
    assert [int(o.isnan().sum()) for o in learn.dls.valid.by_sequence(losses)]==[10]*3

@pytest.mark.parametrize('rnn_type', ['lstm', 'gru'])
def test_training_is_the_same_bits_with_a_warm_validation_in_between(df, rnn_type):
    models = []
    for warm_up in (0, True):
        learn = learner(loaders(df, valid_warm_up=warm_up), rnn_type)
        set_seed(5)
        models.append(fit(learn, 3))
    cold,warm = models
    assert all(map(torch.equal, cold.model.parameters(), warm.model.parameters()))
    assert [o[0] for o in cold.recorder.values]==[o[0] for o in warm.recorder.values] # of the training
    assert [o[1] for o in cold.recorder.values]!=[o[1] for o in warm.recorder.values]
    loss = torch.cat([(p-y)[CUTS[o]:].abs() for o in CUTS for _,p,y in [alone(warm, df, o)]]).mean()
    np.testing.assert_allclose(warm.recorder.values[-1][1], float(loss), rtol=1e-6)

def test_statistics_and_training_data_are_without_the_held_back_end(df):
    cold,warm = loaders(df),loaders(df, valid_warm_up=True)
    for a,b in zip(cold.train_ds.arrays, warm.train_ds.arrays): assert all(map(torch.equal, a, b))
    assert cold.valid_ds.index.equals(warm.valid_ds.index)
    assert list(warm.valid_ds.warm_up)==[CUTS[o] for o in warm.valid_ds.groups]

@pytest.mark.parametrize('hole,expected', [(30, dict(c=148-30)), (148, {}), (170, dict(c=148))])
def test_what_came_before_ends_at_a_hole(df, hole, expected):
    "The group c has 211 rows, of which those from 148 on are held back"
    later = df.t.where(~((df.name=='c')&(df.t>=hole)), df.t+1000)
    dls = loaders(df.assign(t=later), valid_warm_up=True, max_gap=10)
    ds = dls.valid_ds
    warm = {} if ds.warm_up is None else {g:n for g,n in zip(ds.groups, ds.warm_up.tolist()) if g=='c' and n}
    assert warm==expected
    assert len(ds.index)==sum(LENGTHS[o]-CUTS[o] for o in CUTS)
    learn = learner(dls)
    preds = pd.Series(evaluated(learn)[0][:,0], index=ds.index)
    group = df[df.name=='c'].sort_values('t')
    for start,stop in ((0, hole), (hole, 211)):
        part = group[start:stop].assign(name='part')
        _,pred,_ = alone(learn, part, 'part')
        held = [i for i,at in enumerate(range(start, stop)) if at>=148]
        np.testing.assert_allclose(preds[part.index[held]], pred[held,0], rtol=0, atol=1e-12)

ARRAYS = [np.random.default_rng(i).normal(size=(n, 2)).astype('f4') for i,n in enumerate((40, 33, 90))]

@pytest.mark.parametrize('make', [lambda o: o, lambda o: [torch.from_numpy(a) for a in o], lambda o: [a.copy() for a in o[:1]]])
@pytest.mark.parametrize('warm_up', [True, 7])
def test_arrays_have_it_too(make, warm_up):
    xs = make(ARRAYS)
    dls = SequenceDataLoaders.from_arrays(xs, [o[:,:1] for o in xs], sub_seq_len=8, bs=2, valid_pct=.25, valid_warm_up=warm_up)
    learn = TbpttLearner(dls, SequenceRNN(2, 1, 'lstm', 4), loss_func=L1LossFlat())
    expected = []
    for x in xs:
        cut = len(x)-len(x)//4
        n = cut if warm_up is True else warm_up
        model = learn.model.eval()
        model.reset()
        with torch.no_grad(): expected.append(model(torch.as_tensor(x[cut-n:])[None])[0,n:])
    torch.testing.assert_close(evaluated(learn)[0], torch.cat(expected), rtol=0, atol=1e-6)

def test_files_have_it_too(tmp_path):
    h5py = pytest.importorskip('h5py')
    for i,o in enumerate(ARRAYS):
        with h5py.File(tmp_path/f'{i}.h5', 'w') as f: f['u'],f['y'] = o,o[:,0]
    kw = dict(sub_seq_len=8, bs=2, valid_pct=.25, valid_warm_up=9)
    dls = SequenceDataLoaders.from_hdf5(f'{tmp_path}/*.h5', 'u', 'y', **kw)
    in_memory = SequenceDataLoaders.from_arrays(ARRAYS, [o[:,0] for o in ARRAYS], groups=[0, 1, 2], **kw)
    learn = learner(dls)
    assert dls.valid_ds.in_files and not in_memory.valid_ds.in_files
    for a,b in zip(evaluated(learn), evaluated(learn, in_memory.valid)): assert torch.equal(a, b)

def test_classes_have_it_too(df):
    labelled = df.assign(y=np.where(df.y>0, 'high', 'low'))
    dls = loaders(labelled, valid_warm_up=True)
    set_seed(0)
    learn = RNNLearner(dls, hidden_size=5)
    scores = evaluated(learn)[0]
    raw = torch.cat([alone(learn, df, o)[1][CUTS[o]:] for o in dls.valid_ds.groups])
    torch.testing.assert_close(scores, raw.softmax(-1), rtol=0, atol=1e-12)

def test_an_exported_learner_takes_new_data_without_a_warm_up(df, tmp_path):
    from fastai.learner import load_learner
    learn = learner(loaders(df, valid_warm_up=True))
    learn.export(tmp_path/'warm.pkl')
    loaded = load_learner(tmp_path/'warm.pkl')
    assert len(loaded.dls.valid_ds.evaluated)==0
    with loaded.no_bar(): out = loaded.predict_df(df.drop(columns='y'))
    for name in LENGTHS:
        group,pred,_ = alone(learn, df, name)
        np.testing.assert_allclose(out.loc[group.index, 'y_pred'], pred[:,0], rtol=0, atol=1e-12)

def test_targets_that_do_not_count_are_left_out_too(df):
    def counts(y): return y.abs()<2
    learn = learner(loaders(df, valid_warm_up=True), counts=lambda y: counts(y)[...,0])
    with learn.no_bar(): loss = learn.validate()[0]
    errors = torch.cat([(p-y)[CUTS[o]:][counts(y[CUTS[o]:])].abs() for o in CUTS for _,p,y in [alone(learn, df, o)]])
    np.testing.assert_allclose(loss, float(errors.mean()), rtol=1e-6)

def test_each_group_begins_with_a_state_of_its_own(df):
    states = {name: tuple(torch.full((1, 5), float(i+j)) for j in range(2)) for i,name in enumerate(LENGTHS)}
    dls = loaders(df, valid_warm_up=True, dtype=torch.float32)
    rnn,head = nn.LSTM(1, 5, batch_first=True),nn.Linear(5, 1)
    first = InitialState(tuple(torch.stack(o, 1) for o in zip(*states.values())), list(states), batch_dim=1)
    model = nn.Sequential(StatefulRNN(rnn, initial=first), head)
    preds = dict(zip(dls.valid_ds.groups, dls.valid.by_sequence(evaluated(TbpttLearner(dls, model, loss_func=L1LossFlat()))[0])))
    for name,cut in CUTS.items():
        x = torch.tensor(df[df.name==name].sort_values('t')[['u']].to_numpy(), dtype=torch.float32)
        with torch.no_grad(): expected = head(rnn(x[None], tuple(o[:,None] for o in states[name]))[0])[0,cut:]
        torch.testing.assert_close(preds[name], expected, rtol=0, atol=1e-6)

@pytest.mark.parametrize('kwargs,message', [
    (dict(valid_groups='a', valid_warm_up=True), 'nothing comes before them'),
    (dict(win_sz=20, valid_warm_up=5), 'each window starts from the first state'),
    (dict(valid_warm_up=-1), 'valid_warm_up is -1'),
    (dict(valid_warm_up=1.5), 'expected a whole number'),
    (dict(valid_warm_up='all'), 'expected a whole number')])
def test_what_cannot_be_is_refused(df, kwargs, message):
    with pytest.raises((ValueError,TypeError), match=message): loaders(df, **kwargs)

def test_a_validation_set_of_its_own_has_nothing_before_it():
    with pytest.raises(ValueError, match='nothing comes before them'):
        SequenceDataLoaders.from_arrays(ARRAYS, ARRAYS, valid=(ARRAYS, ARRAYS), valid_warm_up=3)

def test_training_on_such_sequences_is_refused():
    ds = Sequences(ARRAYS, ARRAYS).with_warm_up([3, 0, 4])
    dls = SequenceDataLoaders.from_sequences(ds, ds, sub_seq_len=8, bs=2)
    with pytest.raises(ValueError, match='in training use n_skip'):
        TbpttLearner(dls, SequenceRNN(2, 2, 'lstm', 4), loss_func=L1LossFlat())

@pytest.mark.parametrize('steps', [[40, 0, 0], [0, -1, 0], [0, 0, 200]])
def test_a_sequence_has_a_step_that_is_evaluated(steps):
    with pytest.raises(ValueError, match='expected at least one that is evaluated'): Sequences(ARRAYS, ARRAYS).with_warm_up(steps)

def test_windows_have_no_warm_up_of_their_own():
    with pytest.raises(ValueError, match='each of which starts from the first state'): SequenceWindows(ARRAYS[0], ARRAYS[0], 10).with_warm_up([3])

def test_results_are_drawn_from_the_end_of_the_warm_up(df):
    import matplotlib.pyplot as plt
    learn = learner(loaders(df, valid_warm_up=True, bs=3))
    with learn.no_bar(): learn.show_results(max_n=3, shuffle=False, steps=20)
    texts = {}
    for ax in plt.gcf().axes:
        for line in ax.get_lines():
            if len(line.get_ydata())==20: texts.setdefault(ax.get_title() or None, []).append(np.asarray(line.get_ydata()))
    plt.close('all')
    _,pred,y = alone(learn, df, 'c')
    lines = [o for group in texts.values() for o in group]
    for expected in (y[148:168,0], pred[148:168,0]):
        assert any(np.allclose(o, expected, atol=1e-6) for o in lines)
