"""Files run no code, but for a pickle that is asked for; and no name from a file is run, or says where something is written"""
import ast, os, sys
from contextlib import contextmanager
from pathlib import Path
import h5py, numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import load_learner
from helpers import fit
import tbptt_fastai
from tbptt_fastai.deploy.onnx import to_onnx
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.checkpoint import TbpttCheckpoint

PACKAGE = Path(tbptt_fastai.__file__).parent
SOURCES = sorted(PACKAGE.rglob('*.py'))
EVIL = '__import__("os").system("touch pwned")'
NAMES = ['../x', '/etc/../x', 'a;touch pwned', '`touch pwned`', '$(touch pwned)', "'; import os; os.system('touch pwned') #", EVIL, '"two" and \'one\'', '%s%n%(x)d',
    'two\nlines', '{0.__class__.__mro__}', '$x_1$', r'$\frac{1}$', '@df', 'x.T', '\\', '|', 'é ✓']


# What runs is what the library says, seen from Python's own audit

class Audit:
    "What Python reports while it listens: programs, compiled sources, classes of pickles, files that are written"
    seen = None
    def __call__(self, event, args):
        if self.seen is None: return
        if event in ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'pickle.find_class'): self.seen.append((event, args))
        if event=='compile' and args[0] is not None: self.seen.append((event, args[0] if isinstance(args[0], str) else repr(args[0])))
        if event=='open' and isinstance(args[0], (str,bytes)) and isinstance(args[1], str) and set(args[1])&set('wax+'):
            self.seen.append((event, os.fsdecode(args[0])))

AUDIT = Audit()
sys.addaudithook(AUDIT)

@contextmanager
def no_name_is_run(tmp_path, pickles=False):
    "Neither by `eval` nor by a shell; and nothing is written outside of the test's folder"
    AUDIT.seen = seen = []
    try: yield
    finally: AUDIT.seen = None
    known = str(tmp_path.resolve()),str(Path(os.path.realpath(os.environ.get('TMPDIR', '/tmp')))),os.devnull
    for event,what in seen:
        if event=='compile': assert not any(o in what for o in NAMES if len(o)>5), what
        elif event=='open': assert str(Path(what).resolve()).startswith(known) or '__pycache__' in what, what
        else: assert pickles and event=='pickle.find_class', (event, what)
    assert not [*tmp_path.rglob('pwned')] and not Path('pwned').exists() and not (tmp_path.parent/'x').exists()

def test_the_audit_sees_what_it_is_for(tmp_path):
    for wrong in (lambda: os.system('true'), lambda: eval(EVIL+' and 1'), lambda: open(tmp_path.parent.parent/'out', 'a').close()):
        with pytest.raises(AssertionError), no_name_is_run(tmp_path/'folder'): wrong()
    for o in (tmp_path.parent.parent/'out', Path('pwned')): o.unlink(missing_ok=True)


# The sources

def called(tree):
    "Names of all that is called in a source, with the call"
    for o in ast.walk(tree):
        if isinstance(o, ast.Call): yield ast.unparse(o.func),o

RUNS_CODE = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'importlib.import_module', 'import_module'}
READS_OBJECTS = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'yaml', 'subprocess', 'runpy', 'pty'}

@pytest.mark.parametrize('path', SOURCES, ids=lambda o: o.relative_to(PACKAGE).as_posix())
def test_no_source_runs_what_it_has_read(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for name,call in called(tree):
        kwargs = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in RUNS_CODE, name
        assert not name.endswith(('.eval', '.query')) or name.startswith('self.') or not (call.args or call.keywords), name # of a frame
        if name=='torch.load': assert kwargs.get('weights_only')=='True', ast.unparse(call)
        assert 'allow_pickle' not in kwargs and 'shell' not in kwargs and name not in ('load_learner', 'pd.read_pickle'), ast.unparse(call)
    imported = {a.name.split('.')[0] for o in ast.walk(tree) if isinstance(o, ast.Import) for a in o.names}
    imported |= {(o.module or '').split('.')[0] for o in ast.walk(tree) if isinstance(o, ast.ImportFrom)}
    assert not imported&READS_OBJECTS


# Files that would run code

RAN = []

def note(o): RAN.append(o)

class Runs:
    "Runs code when it is read"
    def __reduce__(self): return note,(1,)

def small(path='.', **kwargs):
    u = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    return RNNLearner(SequenceDataLoaders.from_arrays(u, u.roll(1), win_sz=50, sub_seq_len=10, bs=2, device='cpu', path=path), 'gru', 3, num_threads=1, **kwargs)

@pytest.fixture(autouse=True)
def nothing_ran():
    RAN.clear()
    yield
    assert not RAN

FORMS = dict(whole=lambda o: Runs(), beside=lambda o: {'model': o, 'opt': Runs()}, within=lambda o: {**o, 'more': Runs()})

@pytest.mark.parametrize('form', FORMS)
def test_weights_are_read_without_running_code(form):
    learn = small()
    learn.create_opt()
    learn.save('mine')
    torch.save(FORMS[form](learn.model.state_dict()), 'models/theirs.pth')
    before = [o.clone() for o in learn.model.state_dict().values()]
    with pytest.raises(Exception, match='(?i)weights.?only'): learn.load('theirs')
    assert all(map(torch.equal, before, learn.model.state_dict().values()))
    learn.load('mine')

def test_an_export_runs_code_and_fastai_says_so():
    "The one format that does; it is asked for by name"
    torch.save(Runs(), 'theirs.pkl')
    with pytest.warns(UserWarning, match='(?s)pickle.*Only load files you trust'), pytest.raises(Exception): load_learner('theirs.pkl')
    assert RAN==[1]
    RAN.clear()

def test_the_state_of_a_predictor_is_tensors_alone():
    learn = small()
    a,b = StreamPredictor(learn),StreamPredictor(learn)
    x = torch.randn(2, 7, 1)
    a(x)
    torch.save(a.state_dict(), 'state.pt')
    b.load_state_dict(torch.load('state.pt', weights_only=True))
    assert torch.equal(a(x), b(x))

def checkpoints(path, **kwargs):
    "The files of a training that has ended, and a training that goes on with the last of them"
    def train(resume): return fit(small(path, **kwargs), 2, cbs=[TbpttCheckpoint(every=5, resume=resume), SaveModelCallback()])
    train(False)
    return sorted((path/'checkpoint').iterdir()),lambda: train(True)

def edited(files, edit):
    for o in files:
        content = torch.load(o, weights_only=True)
        edit(content)
        torch.save(content, o)

def test_a_checkpoint_is_read_without_running_code(tmp_path):
    files,go_on = checkpoints(tmp_path)
    edited(files, lambda o: o['trained'].update(more=Runs()))
    with pytest.raises(ValueError, match='cannot be read'): go_on()

@pytest.mark.parametrize('cb,setting', [('SaveModelCallback', 'fname'), ('SaveModelCallback', 'monitor'), ('TbpttResetCB', 'sub_seq_len')])
@pytest.mark.parametrize('where', ['start', 'now'])
def test_a_checkpoint_does_not_say_where_something_is_written(tmp_path, cb, setting, where):
    files,go_on = checkpoints(tmp_path/'run')
    edited(files, lambda o: o[where]['parts'][cb]['plain'].update({setting: '../../elsewhere'}))
    with pytest.raises(ValueError, match=f"(?s)checkpoint have {setting}='../../elsewhere' for {cb}, which was made with '"): go_on()
    assert not [*tmp_path.rglob('elsewhere*')]

def test_a_checkpoint_changes_no_attribute_of_a_learner_but_its_counters(tmp_path):
    files,go_on = checkpoints(tmp_path/'run')
    edited(files, lambda o: o['trained']['counters'].update(path='elsewhere', model_dir='elsewhere', lr=7.))
    learn = go_on()
    assert learn.path==tmp_path/'run' and learn.model_dir=='models' and learn.lr!=7.

class Weather(Callback):
    outside = 'cold'
    def after_epoch(self): self.outside = 'warm'

def test_strings_that_change_in_a_training_are_gone_on_with(tmp_path):
    def train(resume):
        cb = Weather()
        fit(small(tmp_path), 2, cbs=[TbpttCheckpoint(every=5, resume=resume), cb])
        return cb.outside
    assert train(False)==train(True)=='warm'


# Names

def frame(names, n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame({name: rng.standard_normal(n).cumsum() for name in names})

def settings(**kwargs): return {**dict(win_sz=None, sub_seq_len=10, bs=2, device='cpu'), **kwargs}

def trained(dls, **kwargs): return fit(RNNLearner(dls, 'gru', 3, num_threads=1, **kwargs))

def drawn(learn):
    with learn.no_bar():
        learn.dls.show_batch()
        learn.show_results()
    for i in plt.get_fignums(): plt.figure(i).savefig(f'{i}.png')
    plt.close('all')

def of_groups(names, n=40):
    "Each group with a class as input, and a number"
    df = pd.concat([frame(['u', 'y'], n).assign(group=o, kind=[o, 'other']*(n//2)) for o in names], ignore_index=True)
    return df,SequenceDataLoaders.from_df(df, x=['u', 'kind'], y='y', group='group', **settings())

def test_names_of_columns(tmp_path):
    df = frame([*NAMES, 'target; touch pwned'])
    with no_name_is_run(tmp_path):
        dls = SequenceDataLoaders.from_df(df, x=NAMES, y='target; touch pwned', **settings())
        learn = trained(dls)
        with learn.no_bar(): out = learn.predict_df(df[NAMES])
        drawn(learn)
    assert list(out.columns[:-1])==NAMES and np.isfinite(out.iloc[:,-1]).all()
    plain = SequenceDataLoaders.from_df(df.set_axis([f'c{i}' for i in range(df.shape[1])], axis=1), x=[f'c{i}' for i in range(len(NAMES))], y=f'c{len(NAMES)}', **settings())
    for a,b in zip(dls.valid, plain.valid): assert all(map(torch.equal, a, b)) # as by names that are none

@pytest.mark.parametrize('role', ['group', 'time'])
@pytest.mark.parametrize('name', NAMES)
def test_the_name_of_a_column_of_groups_or_times(tmp_path, role, name):
    df = frame(['u', 'y']).assign(**{name: np.repeat([1, 2], 30) if role=='group' else np.arange(60)})
    with no_name_is_run(tmp_path): dls = SequenceDataLoaders.from_df(df, x='u', y='y', **{role: name}, **settings())
    assert len(dls.train.dataset)==(2 if role=='group' else 1)

def test_names_of_groups_and_classes(tmp_path):
    with no_name_is_run(tmp_path):
        df,dls = of_groups(NAMES)
        learn = trained(dls)
        with learn.no_bar(): out = learn.predict_df(df)
        drawn(learn)
        with pytest.raises(ValueError) as e: learn.predict_df(df.assign(kind=EVIL+'?'))
    assert repr(EVIL+'?') in str(e.value)
    assert list(out['group'])==list(df['group']) and set(dls.form.x_vocab['kind'])=={*NAMES, 'other'}

def test_labels(tmp_path):
    df = frame(['u'], 40*len(NAMES)).assign(label=np.repeat(NAMES, 40), group=np.repeat(np.arange(2*len(NAMES)), 20))
    with no_name_is_run(tmp_path):
        dls = SequenceDataLoaders.from_df(df, x='u', y='label', group='group', **settings())
        learn = trained(dls)
        with learn.no_bar(): out = learn.predict_df(df[['u', 'group']])
        drawn(learn)
    assert set(out.iloc[:,-1])<=set(NAMES) and sorted(dls.vocab)==sorted(NAMES)

def test_text(tmp_path):
    with no_name_is_run(tmp_path): dls = SequenceDataLoaders.from_text(NAMES*20, bs=2, sub_seq_len=10, device='cpu')
    assert sorted(dls.vocab)==sorted(NAMES)

@pytest.mark.skipif(os.name!='posix', reason='these systems have no such file names')
def test_names_of_files_and_datasets(tmp_path):
    files = [o.replace('/', '_')+'.h5' for o in NAMES]+['[ab]*.h5', '-rf.h5', '~.h5', '%s.h5']
    u = np.random.default_rng(0).standard_normal(60)
    for i,file in enumerate(files):
        with h5py.File(file, 'w') as f:
            for name in NAMES[i%4:]: f[name] = u+i
            f['y'] = u
    names = NAMES[3:]
    with no_name_is_run(tmp_path):
        dls = SequenceDataLoaders.from_hdf5(files, x=names, y='y', **settings())
        learn = trained(dls)
        drawn(learn)
    assert [float(o[0][0,0]) for o in map(dls.train.dataset.__getitem__, range(len(files)))]==pytest.approx([u[0]+i for i in range(len(files))], abs=1e-5)
    with pytest.raises(KeyError, match='has no dataset'), no_name_is_run(tmp_path): SequenceDataLoaders.from_hdf5(files[:1], x=EVIL+'?', y='y', **settings())

@pytest.mark.skipif(os.name!='posix', reason='these systems have no such file names')
@pytest.mark.parametrize('file', ['[ab].h5', 'a*.h5', '?.h5', '[!x].h5'])
@pytest.mark.parametrize('form', [str, Path])
def test_a_file_that_is_there_is_no_pattern(file, form):
    for i,name in enumerate((file, 'a.h5', 'ab.h5')):
        with h5py.File(name, 'w') as f: f['u'] = f['y'] = np.full(60, float(i))+np.arange(60)/100
    dls = SequenceDataLoaders.from_hdf5(form(file), x='u', y='y', **settings())
    assert len(dls.train.dataset)==1 and float(dls.train.dataset[0][0][0,0])==0

def test_an_exported_learner_has_the_names_and_runs_none(tmp_path):
    df,dls = of_groups(NAMES)
    learn = trained(dls)
    with no_name_is_run(tmp_path), learn.no_bar():
        expected = learn.predict_df(df)
        learn.export('learner.pkl')
    with no_name_is_run(tmp_path, pickles=True):
        loaded = load_learner('learner.pkl')
        with loaded.no_bar(): pd.testing.assert_frame_equal(loaded.predict_df(df), expected)

def test_a_checkpoint_of_such_data(tmp_path):
    df,dls = of_groups(NAMES)
    folder = '; touch pwned %s `x`'
    def train(resume):
        set_path = RNNLearner(dls, 'gru', 3, num_threads=1, path=tmp_path/folder)
        return fit(set_path, 2, cbs=TbpttCheckpoint('$(touch pwned)', every=5, resume=resume))
    with no_name_is_run(tmp_path): whole = train(False)
    with no_name_is_run(tmp_path): again = train(True)
    assert all(map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values()))
    files = [*(tmp_path/folder/'$(touch pwned)').iterdir()]
    assert len(files)==2 and all(o.name.startswith('epoch') for o in files)

@pytest.mark.parametrize('name', [o.replace('.', '_') for o in NAMES])
def test_names_of_layers_in_an_onnx_file(tmp_path, name):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnns = nn.ModuleDict({name: StatefulRNN(nn.GRU(1, 3, batch_first=True))})
        def forward(self, x): return self.rnns[name](x)
    with no_name_is_run(tmp_path): state = to_onnx(Model(), tmp_path/'model.onnx', torch.randn(2, 5, 1))
    assert list(state)==[f'rnns.{name}.state0']
    model = onnx.load(tmp_path/'model.onnx', load_external_data=False)
    assert {o.name for o in model.graph.input}=={'x', *state}
    assert all(o.data_location==onnx.TensorProto.DEFAULT for o in model.graph.initializer) and not model.functions
    assert {o.domain for o in model.opset_import}<={'', 'ai.onnx'}

def test_a_name_is_in_a_message_as_it_is(tmp_path):
    for name in NAMES:
        df = frame([name, 'y']).assign(**{name: [np.nan]*60})
        with pytest.raises(ValueError) as e, no_name_is_run(tmp_path): SequenceDataLoaders.from_df(df, x=name, y='y', **settings())
        assert repr(name) in str(e.value)
