"What is drawn of a frame: every channel by its name, classes by their labels, groups by theirs"
import subprocess, sys
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.torch_core import set_seed
from fasttransform import Transform
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.plot import plot_windows
from tbptt_fastai.sequences.windows import Sequences

LENGTHS = dict(north=1500, south=300, west=40)

def frame():
    rng = np.random.default_rng(0)
    df = pd.concat([pd.DataFrame(dict(pump=k, hour=range(n))) for k,n in LENGTHS.items()])
    df = df.assign(load=rng.standard_normal(len(df)), heat=60+rng.random(len(df)), mode=rng.choice(['idle','run'], len(df)))
    return df.assign(y=df.load, z=1000*df.heat, state=np.where(df.load>0, 'high', 'low'))

def loaders(y=('y','z'), **kw):
    set_seed(0)
    return SequenceDataLoaders.from_df(frame(), ['load','heat','mode'], y if isinstance(y, str) else list(y), group='pump', time='hour', **{**dict(sub_seq_len=50, bs=3), **kw})

def axes():
    "By rows, from the figure"
    fig = plt.gcf()
    return np.array([ax for ax in fig.axes]).reshape(-1, 3)

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def test_each_input_has_an_axis_and_each_output_a_colour():
    loaders().valid.show_batch()
    axs = axes()
    assert [ax.get_ylabel() for ax in axs[:,0]]==['y','z','load','heat','mode']
    assert all(len(ax.lines)==1 for ax in axs.flat)
    assert [ax.lines[0].get_color() for ax in axs[:,0]]==['C0','C1','0.4','0.4','0.4']
    assert [o.get_text() for o in axs[4,0].get_yticklabels()]==['idle','run'] and axs[4,0].lines[0].get_drawstyle()=='steps-mid'

@pytest.mark.parametrize('part', ['train','valid'])
@pytest.mark.parametrize('sub_seq_len', [20, None])
def test_groups_are_titles_of_their_own_curves(part, sub_seq_len):
    dls = loaders(sub_seq_len=sub_seq_len)
    getattr(dls, part).show_batch()
    axs,df = axes(),frame()
    assert {ax.get_title() for ax in axs[0]}==set(LENGTHS)
    for column in axs.T:
        name = column[0].get_title()
        n = LENGTHS[name]-int(.2*LENGTHS[name])
        of = df[df.pump==name]
        of = (of[:n] if part=='train' else of[n:])[:1000]
        for ax,c in zip(column, ['y','z','load','heat']): np.testing.assert_allclose(ax.lines[0].get_ydata(), of[c], rtol=1e-5)
        np.testing.assert_array_equal(column[4].lines[0].get_ydata(), of['mode']=='run')

def test_results_are_predictions_over_their_targets():
    learn = RNNLearner(loaders(), hidden_size=4)
    with learn.no_bar():
        preds,targs = learn.get_preds()
        learn.show_results()
    ds,axs = learn.dls.valid_ds,axes()
    for column in axs.T:
        i = ds.groups.index(column[0].get_title())
        for j,ax in enumerate(column[:2]):
            target,pred = ax.lines
            np.testing.assert_allclose(target.get_ydata(), learn.dls.valid.by_sequence(targs)[i][:,j], rtol=1e-5)
            np.testing.assert_allclose(pred.get_ydata(), learn.dls.valid.by_sequence(preds)[i][:,j], rtol=1e-5)
            assert target.get_color()==pred.get_color()==f'C{j}' and target.get_alpha()<1
    assert [o.get_text() for o in plt.gcf().legends[0].get_texts()]==['target','prediction']

def bands(ax):
    "Of an axis, from top to bottom: the numbers of classes, and the edges of the steps"
    found = [(o.get_coordinates()[0,0,1], o) for o in ax.collections]
    return [(np.ma.filled(o.get_array(), -1)[0].astype(int), o.get_coordinates()[0,:,0]) for _,o in sorted(found, key=lambda o: -o[0])]

def colours(ax, steps=slice(None)):
    "What is seen of each band"
    fig = ax.figure
    fig.canvas.draw()
    return [o.get_facecolors().reshape(-1, 4)[steps] for o in ax.collections]

def legend(): return {o.get_text():p.get_facecolor() for o,p in zip(plt.gcf().legends[0].get_texts(), plt.gcf().legends[0].get_patches())}

def test_classes_are_bands_the_target_above_the_prediction():
    learn = RNNLearner(loaders('state'), hidden_size=4)
    with learn.no_bar():
        preds,targs,decoded = learn.get_preds(with_decoded=True)
        learn.show_results()
    ds,dl,axs = learn.dls.valid_ds,learn.dls.valid,axes()
    assert [ax.get_ylabel() for ax in axs[:,0]]==['state','load','heat','mode'] and not axs[0,0].lines
    bottom_up = [o.get_text() for o in axs[0,0].get_yticklabels()]
    assert bottom_up==['prediction','target'] and axs[0,0].get_yticks().tolist()==[.5,1.5]
    for ax in axs[0]:
        i = ds.groups.index(ax.get_title())
        (target,edges),(pred,_) = bands(ax)
        np.testing.assert_array_equal(target, dl.by_sequence(targs)[i])
        np.testing.assert_array_equal(pred, dl.by_sequence(decoded)[i])
        np.testing.assert_allclose(edges, np.arange(len(target)+1)-.5)

def test_a_class_has_one_colour_that_the_legend_names():
    loaders('state').valid.show_batch()
    axs,of = axes(),legend()
    assert list(of)==['high','low'] and len(set(of.values()))==2
    assert not axs[0,0].get_yticklabels() and axs[0,0].get_ylabel()=='state'
    for ax in axs[0]:
        (codes,_), = bands(ax)
        seen, = colours(ax)
        np.testing.assert_allclose(seen, [of[['high','low'][i]] for i in codes])

def test_the_legend_of_classes_covers_no_axis_and_no_label_is_cut():
    y = torch.arange(30).repeat_interleave(10)[None]
    for names,shown in (([f'a rather long class of number {i}' for i in range(30)], 6), ([f'c{i}' for i in range(30)], 20)):
        plot_windows(torch.randn(1, 300, 2), y, y.flip(1), vocab=names)
        fig = plt.gcf()
        fig.canvas.draw()
        box,whole = fig.legends[0].get_window_extent(),fig.bbox
        texts = [o.get_text() for o in fig.legends[0].get_texts()]
        assert len(texts)<=shown and texts[-1]==f'(and {30-len(texts)+1} more)' and all(len(o)<=24 for o in texts)
        for ax in fig.axes:
            assert not box.overlaps(ax.get_window_extent()) and ax.get_window_extent().height>130
            around = ax.get_tightbbox()
            assert whole.x0<=around.x0 and around.x1<=whole.x1 and whole.y0<=around.y0 and around.y1<=whole.y1
        assert whole.x0<=box.x0 and box.x1<=whole.x1 and whole.y0<=box.y0 and box.y1<=whole.y1

def test_few_integers_are_classes_and_many_are_counts():
    x,few = torch.randn(2, 40, 1),torch.tensor([7,3,7,-1]).repeat_interleave(10).expand(2, -1)
    axs = plot_windows(x, few, few.flip(1))
    assert list(legend())==['-1','3','7'] and axs[0,0].get_ylabel()=='class'
    (target,_),(pred,_) = bands(axs[0,1])
    np.testing.assert_array_equal(np.array([-1,3,7])[target], few[1])
    np.testing.assert_array_equal(np.array([-1,3,7])[pred], few.flip(1)[1])
    counts = torch.arange(80).reshape(2, 40)
    axs = plot_windows(x, counts, counts.float()+.5)
    assert [o.get_drawstyle() for o in axs[0,0].lines]==['steps-mid','default'] and axs[0,0].get_ylabel()=='output'
    assert plot_windows(x, counts)[0,0].lines[0].get_drawstyle()=='steps-mid'

def test_ignored_targets_are_left_white_and_ends_are_respected():
    y = torch.tensor([[0,1,-100,1,0],[1,1,0,0,0]])
    axs = plot_windows(torch.randn(2, 5, 1), y, vocab=['a','b'], dt=.5, lengths=[5,1])
    (codes,edges), = bands(axs[0,0])
    np.testing.assert_array_equal(codes, [0,1,-1,1,0])
    np.testing.assert_allclose(edges, np.arange(6)*.5-.25)
    assert colours(axs[0,0])[0][2,3]==0 and list(legend())==['a','b']
    (codes,edges), = bands(axs[0,1])
    assert codes.tolist()==[1] and len(edges)==2
    np.testing.assert_allclose(colours(axs[0,1])[0][0], legend()['b'])

def test_as_many_steps_and_sequences_are_drawn_as_are_asked_for():
    dls = loaders()
    dls.valid.show_batch(max_n=1, steps=30)
    assert len(plt.gcf().axes)==5 and all(len(ax.lines[0].get_ydata())==30 for ax in plt.gcf().axes)
    learn = RNNLearner(dls, hidden_size=4)
    with learn.no_bar(): learn.show_results(max_n=1, steps=30)
    assert all(len(o.get_ydata())==30 for ax in plt.gcf().axes for o in ax.lines)
    with pytest.raises(ValueError, match='max_n is 0'): dls.valid.show_batch(max_n=0)

def test_a_transform_is_undone_in_the_picture():
    class Halve(Transform):
        def encodes(self, o:torch.Tensor): return o/2
        def decodes(self, o:torch.Tensor): return o*2
    dls = loaders('y', after_batch=[Halve()])
    dls.valid.show_batch(max_n=1, steps=30)
    n,ax = LENGTHS[plt.gcf().axes[0].get_title()],plt.gcf().axes[0]
    of = frame()
    of = of[of.pump==ax.get_title()].y[n-int(.2*n):][:30]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), of, rtol=1e-5)

def test_many_named_channels_are_counted_and_unnamed_ones_share_an_axis():
    axs = plot_windows(torch.randn(1, 30, 12), torch.randn(1, 30, 10), x_names=[f'x{i}' for i in range(12)], y_names=[f'y{i}' for i in range(10)])
    assert [ax.get_ylabel() for ax in axs[:,0]]==[f'y{i}' for i in range(7)]+['y7 (and 2 more)']+[f'x{i}' for i in range(7)]+['x7 (and 4 more)']
    assert all(len(ax.lines)==1 for ax in axs.flat)
    axs = plot_windows(torch.randn(1, 30, 12), torch.randn(1, 30, 10))
    assert [len(ax.lines) for ax in axs.flat]==[10,12] and len({o.get_color() for o in axs[0,0].lines})==10

@pytest.mark.parametrize('bs', [2, 3])
@pytest.mark.parametrize('shuffle', [False, True])
def test_sequences_are_drawn_in_their_order_whatever_their_lengths(bs, shuffle):
    xs = [torch.randn(n, 1) for n in (20, 50, 7)]
    StreamDL(Sequences(xs, xs, groups=['a','b','c']), bs=bs, sub_seq_len=5, shuffle=shuffle).show_whole()
    for x,ax,name in zip(xs, axes()[0], 'abc'):
        assert ax.get_title()==name
        np.testing.assert_allclose(ax.lines[0].get_ydata(), x[:,0])

def test_a_stream_shows_itself_without_the_loaders_of_frames():
    code = ("import sys, torch; from tbptt_fastai.loaders.streams import StreamDL; from tbptt_fastai.sequences.windows import Sequences\n"
            "assert not any('dataloaders' in o for o in sys.modules if o.startswith('tbptt_fastai'))\n"
            "xs = [torch.randn(n, 1) for n in (20, 50)]; dl = StreamDL(Sequences(xs, xs), bs=2, sub_seq_len=5); dl.show_batch()\n"
            "assert dl.few(1, steps=10).dataset.lengths.tolist()==[10]")
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr

@pytest.mark.parametrize('warm_up', [True, 30])
@pytest.mark.parametrize('steps', [1000, 5])
def test_the_steps_that_warm_a_state_up_are_not_drawn(warm_up, steps):
    learn = RNNLearner(loaders(y='y', valid_warm_up=warm_up), rnn_type='gru', hidden_size=4)
    with learn.no_bar():
        preds = dict(zip(learn.dls.valid_ds.groups, learn.dls.valid.by_sequence(learn.get_preds()[0])))
        learn.show_results(steps=steps)
    drawn = axes()
    plt.close('all')
    learn.dls.valid.show_batch(steps=steps)
    for column,batch in zip(drawn.T, axes().T):
        name = column[0].get_title()
        of = frame()
        of = of[of.pump==name][-int(.2*LENGTHS[name]):][:steps]
        assert batch[0].get_title()==name
        np.testing.assert_allclose(column[0].lines[0].get_ydata(), of.y, rtol=1e-5)
        np.testing.assert_allclose(column[0].lines[1].get_ydata(), preds[name][:steps,0], atol=1e-6)
        for ax,c in ((column[1], 'load'), (batch[0], 'y'), (batch[2], 'heat')): np.testing.assert_allclose(ax.lines[0].get_ydata(), of[c], rtol=1e-5)

def test_a_sequence_of_one_step_is_a_point():
    xs = [torch.randn(n, 1) for n in (20, 1, 7)]
    StreamDL(Sequences(xs, xs), bs=3, sub_seq_len=5).show_whole()
    assert [ax.lines[0].get_marker() for ax in axes()[0]]==['None','.','None']
