"The demo, as it is called from a shell, and what its figure shows"
import os, re, signal, subprocess, sys, time
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest
from fastai.torch_core import set_seed
from helpers import fit
from tbptt_fastai import __version__
from tbptt_fastai.datasets import cli, demo
from tbptt_fastai.datasets.cli import tbptt_demo
from tbptt_fastai.datasets.benchmarks import create_dls_duffing
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.models.sequence import rnn_types

SMALL = '--stp-sz', '400', '--hidden-size', '4'
COMMAND = Path(sys.executable).with_name('tbptt-demo')
def heeds_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL) # what runs in the background of a shell does not
def shell(*args): return subprocess.run([COMMAND, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_run_prints_its_table_and_writes_its_figure(tmp_path):
    res = shell(*SMALL, '--n-epoch', '1', '--rnn-type', 'gru', '--sub-seq-len', '150', '--seed', '3', '--out', 'figure.png')
    assert res.returncode==0, res.stderr
    assert (tmp_path/'figure.png').read_bytes().startswith(b'\x89PNG') and f"Figure: {tmp_path/'figure.png'}" in res.stdout
    header,full,tbptt = [line for line in res.stdout.splitlines() if line][-4:-1]
    assert re.split(' {2,}', header.strip())==['MAE [mV]', 'RMSE [mV]', 'seconds updates', 'activations per update [MiB]']
    assert full.startswith('full backpropagation') and tbptt.startswith('TBPTT, sub-windows of 150')
    (*_,n_full,memory_full),(*_,n,memory) = (map(float, line.split()[-5:]) for line in (full,tbptt))
    assert memory_full/memory==pytest.approx(500/150, rel=.05) and n==4*n_full # sub-windows of 150, 150, 150 and 50 steps


@pytest.fixture(scope='module')
def runs():
    dls = create_dls_duffing(win_sz=500, stp_sz=100, sub_seq_len=100)
    return dls,[demo.train(name, dls, steps, 3, 3e-3, 0, 1, rnn_type='lstm', hidden_size=8) for name,steps in (('full',None),('TBPTT',100))]

@pytest.fixture
def figure(runs):
    dls,trained = runs
    fig = demo.figure(trained, demo.shown_window(dls)[1][:,0].numpy(), dls.valid_ds.dt)
    yield fig,trained,dls
    plt.close(fig)

def axes(fig): return {ax.get_label(): ax for ax in fig.axes}

def test_the_loss_panel_shows_the_validation_loss_of_each_epoch(figure):
    fig,trained,_ = figure
    ax = axes(fig)['loss']
    assert len(ax.lines)==2 and ax.get_ylabel()=='mean absolute error [mV]' and ax.get_xlabel()=='epoch'
    for line,run in zip(ax.lines, trained):
        assert line.get_xdata().tolist()==[1,2,3] and len(run.losses)==3
        np.testing.assert_allclose(line.get_ydata(), 1e3*np.array(run.losses))
        assert ax.get_ylim()[0]==0 and max(line.get_ydata())<ax.get_ylim()[1]

def test_losses_and_errors_of_a_run_are_those_of_a_learner(runs):
    dls,(_,run) = runs
    set_seed(0)
    dls.train.rng.seed(0)
    learn = RNNLearner(dls, sub_seq_len=100, rnn_type='lstm', hidden_size=8, metrics=fun_rmse)
    fit(learn, 3, 3e-3, 'fit_flat_cos')
    assert run.losses==[v[1] for v in learn.recorder.values] and run.n_updates==len(learn.recorder.losses)
    loss,rmse = learn.validate()
    assert [run.losses[-1],run.rmse]==pytest.approx([loss,rmse])
    preds,targets = learn.get_preds()
    np.testing.assert_allclose(run.pred, preds[1,:,0], atol=1e-6)
    np.testing.assert_allclose(demo.shown_window(dls)[1], targets[1])

def test_signal_and_error_show_target_and_predictions_in_mV(figure):
    fig,trained,dls = figure
    y = demo.shown_window(dls)[1][:,0].numpy()
    signal,error = axes(fig)['signal'],axes(fig)['error']
    seconds = np.arange(500)*dls.valid_ds.dt
    for line,values in zip(signal.lines, (y, *(r.pred for r in trained)), strict=True):
        np.testing.assert_allclose(line.get_xdata(), seconds)
        np.testing.assert_allclose(line.get_ydata(), 1e3*values)
    for line,run in zip(error.lines, trained, strict=True): np.testing.assert_allclose(line.get_ydata(), 1e3*(run.pred-y))
    assert [ax.get_ylabel() for ax in (signal,error)]==['y [mV]', 'prediction − target [mV]'] and error.get_xlabel()=='time [s]'

def test_one_legend_names_all_lines_where_nothing_is_drawn(figure):
    fig,trained,_ = figure
    fig.canvas.draw()
    legend, = fig.legends
    assert [o.get_text() for o in legend.get_texts()]==['target', *(r.name for r in trained)] and not any(ax.get_legend() for ax in fig.axes)
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in fig.axes)
    for ax in fig.axes: # the same training has the same colour and style everywhere
        lines = ax.lines[-2:]
        assert [(o.get_color(), o.get_linestyle()) for o in lines]==[(o.get_color(), o.get_linestyle()) for o in axes(fig)['error'].lines]


@pytest.mark.parametrize('kwargs,message', [
    (dict(sub_seq_len=501), '--sub-seq-len is 501, but a window has 500 steps (--win-sz). Use at most 500'), (dict(win_sz=0), '--win-sz is 0'), (dict(n_epoch=0), '--n-epoch is 0'),
    (dict(hidden_size=0), '--hidden-size is 0'), (dict(stp_sz=-1), '--stp-sz is -1'), (dict(sub_seq_len=0), '--sub-seq-len is 0'), (dict(threads=0), '--threads is 0'),
    (dict(lr=float('nan')), '--lr is nan'), (dict(lr=0.), '--lr is 0.0'), (dict(lr=float('inf')), '--lr is inf'), (dict(out='nowhere/figure.png'), '--out is nowhere/figure.png, in a folder that does not exist'),
    (dict(seed=-1), '--seed is -1'), (dict(seed=2**70), '--seed is 1180591620717411303424'), (dict(threads=10**6), '--threads is 1000000; expected at most'),
    (dict(out='folder.png'), '--out is folder.png, which is a folder'),
    (dict(out='figure.xyz'), '--out is figure.xyz; expected a name that ends in .png'), (dict(data='silverbox', path=__file__), 'expected a folder, found a file'),
])
def test_what_cannot_be_is_said_in_one_line_before_anything_is_made(kwargs, message, monkeypatch):
    monkeypatch.setattr(demo, 'create_dls_duffing', None)
    Path('folder.png').mkdir()
    with pytest.raises(SystemExit, match='^tbptt-demo: ') as e: tbptt_demo(**kwargs)
    assert message in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('args,message', [(('--rnn-type', 'cnn'), "'cnn'"), (('--hiden-size', '4'), '--hiden-size'), (('--n-epoch', '1.5'), "'1.5'"), (('--hidden-size', '0'), 'is 0')])
def test_a_typo_is_refused_before_anything_is_imported(args, message):
    code = "import sys; sys.meta_path.insert(0, type('', (), {'find_spec': staticmethod(lambda name, *_: sys.exit(f'{name} is imported') if name in ('torch','fastai','pandas') else None)})())"
    res = subprocess.run([sys.executable, '-c', f"{code}\nfrom tbptt_fastai.datasets.cli import tbptt_demo\nsys.argv[1:] = {args!r}\nfrom fastcore.script import _run_cli\n_run_cli(tbptt_demo.__wrapped__, False, None)"],
                         capture_output=True, text=True)
    assert res.returncode and message in res.stderr and 'Traceback' not in res.stderr and 'is imported' not in res.stderr

def test_a_wrong_choice_is_refused():
    res = shell('--rnn-type', 'cnn')
    assert res.returncode and "'cnn'" in res.stderr and 'Traceback' not in res.stderr

def test_the_choices_are_those_of_the_library(): assert {str(o) for o in cli.RNN}==set(rnn_types)

def test_every_format_of_a_figure_can_be_written():
    assert all(o[1:] in plt.gcf().canvas.get_supported_filetypes() for o in cli.FIGURES)

def test_the_version_is_printed():
    res = shell('--version')
    assert res.returncode==0 and res.stdout.strip()==f'tbptt_fastai {__version__}'


def test_the_ending_of_a_figure_may_be_in_capitals(monkeypatch):
    monkeypatch.setattr(demo, 'compare', lambda *args: None)
    tbptt_demo(out='figure.PNG')

@pytest.mark.skipif(os.name=='nt', reason='Windows has another signal')
@pytest.mark.parametrize('delay', [.3, .8, 1.4])
def test_ctrl_c_before_the_first_epoch_is_one_line(delay):
    with subprocess.Popen([COMMAND, *SMALL, '--n-epoch', '100000'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          preexec_fn=heeds_ctrl_c) as p:
        time.sleep(delay)
        p.send_signal(signal.SIGINT)
        _,err = p.communicate(timeout=60)
    err = [o for o in err.decode().splitlines() if o.strip()]
    assert p.returncode==130 and err[-1].startswith('tbptt-demo: interrupted') and not any('Traceback' in o or 'terminate' in o for o in err)

def test_a_training_that_diverges_is_named(capsys):
    tbptt_demo(stp_sz=4000, hidden_size=4, n_epoch=1, lr=1e30)
    assert 'diverged: the validation MAE is nan. Use a smaller --lr.' in capsys.readouterr().out

@pytest.mark.skipif(os.name=='nt', reason='Windows has another signal')
def test_ctrl_c_says_what_was_reached(tmp_path):
    with subprocess.Popen([COMMAND, *SMALL, '--n-epoch', '100000'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          preexec_fn=heeds_ctrl_c) as p:
        seen = b''
        while b'Epoch 3/' not in seen:
            part = os.read(p.stdout.fileno(), 10_000)
            assert part, p.stderr.read().decode()
            seen += part
        p.send_signal(signal.SIGINT)
        _,err = p.communicate(timeout=60)
    err = err.decode()
    assert p.returncode==130 and 'Traceback' not in err
    assert re.search(r'^tbptt-demo: interrupted in full backpropagation, after \d+ of 100000 epochs, where the validation MAE was [\d.]+ mV$', err, re.M)

def test_what_is_finished_is_shown_when_the_rest_is_interrupted(monkeypatch, capsys):
    trained = []
    def train(name, *args, **kwargs):
        if trained: raise KeyboardInterrupt(f'in {name}')
        trained.append(name)
        return demo.Run(name, [.004,.002], .005, 10, 1., 2**20, np.zeros(500))
    monkeypatch.setattr(demo, 'train', train)
    with pytest.raises(SystemExit) as e: tbptt_demo(stp_sz=400)
    out,err = capsys.readouterr()
    assert e.value.code==130 and 'full backpropagation' in out.splitlines()[-1] and err.strip().endswith('interrupted in TBPTT, sub-windows of 100')


def test_a_run_on_the_recording_succeeds(data_dir):
    pytest.importorskip('nonlinear_benchmarks')
    res = shell('--data', 'silverbox', '--path', str(data_dir/'nlb_cache'), '--n-epoch', '1', '--stp-sz', '1000', '--hidden-size', '4')
    assert res.returncode==0, res.stderr

def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'nonlinear_benchmarks', None)
    with pytest.raises(SystemExit, match=re.escape("pip install 'tbptt_fastai[benchmarks]'")): tbptt_demo(data='silverbox')
