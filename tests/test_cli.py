"The demo, as it is called from a shell"
import subprocess, sys
from pathlib import Path
import pytest

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


@pytest.mark.parametrize('args,message', [
    (['--sub-seq-len', '501'], 'tbptt-demo: sub_seq_len is 501, but a window has 500 steps'),
    (['--win-sz', '0'], 'tbptt-demo: win_sz is 0'),
    (['--n-epoch', '0'], 'tbptt-demo: n_epoch is 0'),
    (['--lr', 'nan'], 'tbptt-demo: lr is nan'),
    (['--out', 'nowhere/figure.png'], 'tbptt-demo: out is nowhere/figure.png, in a folder that does not exist'),
    (['--out', 'figure.xyz'], 'tbptt-demo: out is figure.xyz; expected a name that ends in'),
    (['--rnn-type', 'cnn'], "'cnn'"),
])
def test_what_cannot_be_is_said_in_one_line(args, message):
    res = demo(*args)
    assert res.returncode and message in res.stderr and 'Traceback' not in res.stderr


def test_the_recording(data_dir):
    pytest.importorskip('nonlinear_benchmarks')
    res = demo('--data', 'silverbox', '--path', str(data_dir/'nlb_cache'), '--n-epoch', '1', '--stp-sz', '1000', '--hidden-size', '4')
    assert res.returncode==0, res.stderr
