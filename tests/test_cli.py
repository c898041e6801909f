"The demo, as it is called from a shell"
import subprocess, sys
from pathlib import Path
import pytest
from tbptt_fastai.cli import tbptt_demo

def demo(*args): return subprocess.run([Path(sys.executable).with_name('tbptt-demo'), *args], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_table_and_figure(tmp_path):
    res = demo('--n-epoch', '1', '--stp-sz', '400', '--hidden-size', '4', '--rnn-type', 'gru', '--sub-seq-len', '150', '--seed', '3', '--out', 'figure.png')
    assert res.returncode==0, res.stderr
    assert (tmp_path/'figure.png').read_bytes().startswith(b'\x89PNG') and str(tmp_path/'figure.png') in res.stdout
    header,full,tbptt = [line for line in res.stdout.splitlines() if line][-5:-2]
    assert [o in header for o in ('valid loss [mV]', 'RMSE [mV]', 'seconds', 'steps/s', 'peak memory of a step [MiB]')]==[True]*5
    assert full.startswith('full backpropagation') and tbptt.startswith('TBPTT, 150 steps')
    memory_full,memory = (float(line.split()[-1]) for line in (full,tbptt))
    assert memory_full/memory==pytest.approx(500/150, rel=.05)


@pytest.mark.parametrize('kwargs,message', [
    (dict(sub_seq_len=501), 'sub_seq_len is 501, but a window has 500 steps'), (dict(win_sz=0), 'win_sz is 0'), (dict(n_epoch=0), 'n_epoch is 0'),
    (dict(lr=float('nan')), 'lr is nan'), (dict(out='nowhere/figure.png'), 'out is nowhere/figure.png, in a folder that does not exist'),
    (dict(out='figure.xyz'), 'out is figure.xyz; expected a name that ends in'), (dict(data='silverbox', path=__file__), 'expected a folder, found a file'),
])
def test_what_cannot_be_is_said_in_one_line_before_anything_is_trained(kwargs, message):
    with pytest.raises(SystemExit, match=f'^tbptt-demo: .*{message}'): tbptt_demo(**kwargs)


def test_a_wrong_choice_is_refused():
    res = demo('--rnn-type', 'cnn')
    assert res.returncode and "'cnn'" in res.stderr and 'Traceback' not in res.stderr


def test_the_recording(data_dir):
    pytest.importorskip('nonlinear_benchmarks')
    res = demo('--data', 'silverbox', '--path', str(data_dir/'nlb_cache'), '--n-epoch', '1', '--stp-sz', '1000', '--hidden-size', '4')
    assert res.returncode==0, res.stderr
