"The page 'My CSV files': what it makes, held against the model called by hand between the holes of each file"
import pickle, subprocess, sys
from io import StringIO
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT/'nbs'/'how_to'/'my_csv_files.ipynb'

RUN = '''
import pickle, sys
from pathlib import Path
from fastcore.nbio import read_nb
from execnb.shell import CaptureShell
page,out = sys.argv[1],Path(sys.argv[2])
nb = read_nb(page)
assert 'unlink' in nb.cells[-1].source and 'rmdir' in nb.cells[-1].source
nb.cells = nb.cells[:-1]
shell = CaptureShell(page)
shell.run_all(nb, exc_stop=True)
if shell.exc: raise SystemExit(str(shell.exc))
ns = shell.user_ns
frames = {k:ns[k] for k in ('df','known','sixth','out','there','labelled','fresh','guess','right')}
files = {o.stem:(o.read_text() if o.suffix=='.csv' else None) for o in ns['folder'].iterdir()}
(out/'ns.pkl').write_bytes(pickle.dumps(dict(frames, preds=[float(o) for o in ns['preds']], files=files)))
ns['learn'].export(out/'machines.pkl')
ns['of_tweets'].export(out/'tweets.pkl')
'''

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "What is there at the end of the page"
    d = tmp_path_factory.mktemp('page')
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', RUN, PAGE, d], cwd=PAGE.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    ns = pickle.loads((d/'ns.pkl').read_bytes())
    return dict(ns, learn=load_learner(d/'machines.pkl'), of_tweets=load_learner(d/'tweets.pkl'))

def pieces(df, max_gap, group='machine', time='time'):
    "The rows of each group between holes"
    for _,rows in df.groupby(group):
        rows = rows.sort_values(time)
        yield from (o for _,o in rows.groupby((rows[time].diff()>max_gap).cumsum()))

def outputs(learn, rows, codes=None):
    values = np.stack([rows[c].map(codes.index) if codes and c=='mode' else rows[c] for c in learn.dls.form.x], 1)
    with torch.no_grad(): return learn.model.eval()(torch.tensor(values.astype(np.float32))[None])[0].numpy()


def test_five_files_have_holes_missing_values_integers_and_categories(page):
    files = {k:pd.read_csv(StringIO(text), parse_dates=['time']) for k,text in page['files'].items() if k.startswith('machine') and text}
    assert sorted(files)==[f'machine{i}' for i in range(1, 7)]
    for df in files.values():
        assert df.load.isna().any() and df.pumps.dtype==np.int64 and set(df['mode'])=={'day','night','weekend'}
        assert (df.time.diff()>pd.Timedelta('3h')).sum()==1
    assert sorted(page['df'].machine.unique())==[f'machine{i}' for i in range(1, 6)] and page['df'].index.duplicated().any()

def test_the_target_is_the_temperature_an_hour_later(page):
    df,known = page['df'],page['known']
    at = df.set_index(['machine','time']).temp
    later = at.reindex(pd.MultiIndex.from_arrays([known.machine, known.time+pd.Timedelta('1h')]))
    np.testing.assert_array_equal(known.later, later)
    ends = df[df.later.isna()]
    assert len(ends)==10 and at.reindex(pd.MultiIndex.from_arrays([ends.machine, ends.time+pd.Timedelta('1h')])).isna().all()

def test_the_sixth_frame_has_the_predictions_of_the_model_by_hand(page):
    out,sixth = page['out'],page['sixth']
    pd.testing.assert_frame_equal(out.drop(columns='later_pred'), sixth)
    parts = list(pieces(out, pd.Timedelta('3h')))
    assert len(parts)==2
    for rows in parts:
        expected = outputs(page['learn'], rows, ['day','night','weekend'])
        np.testing.assert_allclose(rows.later_pred, expected[:,0], atol=1e-4)

def test_another_process_and_a_live_predictor_say_the_same(page):
    np.testing.assert_allclose(page['there'].later_pred, page['out'].later_pred, atol=1e-4)
    np.testing.assert_allclose(page['preds'], page['out'].later_pred, atol=1e-3)

def test_a_learner_that_is_loaded_predicts_as_the_page_did(page):
    with page['learn'].no_bar(): again = page['learn'].predict_df(page['sixth'])
    pd.testing.assert_frame_equal(again, page['out'], atol=1e-4, rtol=0)

def test_labels_of_the_next_hour_are_those_of_a_loop(page):
    df = page['labelled']
    of = df[df.ticker=='FB'].reset_index(drop=True)
    for i in (400, 5000, 9999):
        ahead,day = of.value[i+1:i+13].mean(),of.value[i-287:i+1].mean()
        assert of.next_hour[i]==('lively' if ahead>day else 'calm')
        assert of.now[i]==('lively' if of.value[i-11:i+1].mean()>day else 'calm')

def test_predicted_labels_of_new_companies_are_those_of_the_model_by_hand(page):
    guess,fresh = page['guess'],page['fresh']
    assert list(guess.index)==list(fresh.index) and set(guess.ticker)=={'GOOG','IBM'}
    learn,vocab = page['of_tweets'],np.array(['calm','lively'])
    for _,rows in guess.groupby('ticker'):
        rows = rows.sort_values('timestamp')
        scores = outputs(learn, rows)
        sure = np.abs(scores[:,0]-scores[:,1])>1e-3
        np.testing.assert_array_equal(rows.next_hour_pred[sure], vocab[scores.argmax(1)][sure])
        assert sure.mean()>.99

def test_the_model_is_right_more_often_than_the_hour_before(page):
    share = page['right'].groupby('ticker').mean()
    assert list(share.index)==['GOOG','IBM'] and (share.model>share.hour_before).all()
    later = page['sixth'].sort_values('time').set_index('time').temp
    known = later.reindex(later.index+pd.Timedelta('1h')).to_numpy()
    error = np.nanmean(np.abs(page['out'].sort_values('time').later_pred-known))
    assert error<np.nanmean(np.abs(later.to_numpy()-known))
