"The main job on the real recording, as the page on costs shows it"
import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import fit
from tbptt_fastai.all import RNNLearner, TbpttLearner, create_dls_silverbox, fun_rmse, rmse, set_seed # by name: a star would import fastcore's test_eq and friends as tests

pytest.importorskip('nonlinear_benchmarks')


def test_the_example_reaches_the_published_figures(data_dir):
    "Published for full backpropagation: L1 0.0029 V, RMSE 0.0096 V"
    set_seed(0)
    dls = create_dls_silverbox(bs=16, win_sz=500, stp_sz=10, sub_seq_len=100)
    lrn = RNNLearner(dls, rnn_type='lstm', hidden_size=40, sub_seq_len=100, metrics=[fun_rmse])
    with lrn.no_bar(), lrn.no_logging(): lrn.fit_flat_cos(n_epoch=10, lr=3e-3)
    assert len(lrn.recorder.losses)==10*5*310 # five sub-windows of 310 batches
    with lrn.no_bar():
        lrn.show_results(max_n=2)
        assert len(plt.gcf().axes)==4
        loss,rmse_v = lrn.validate()
        preds,targs = lrn.get_preds()
    assert loss<=.0032 and rmse_v<=.0100
    error = (preds-targs).double().numpy()
    np.testing.assert_allclose([loss, rmse_v], [np.abs(error).mean(), np.sqrt((error**2).mean())], atol=1e-6)


@pytest.mark.parametrize('sub_seq_len', ['dls', None, 100])
def test_sub_windows_are_said_by_the_loaders_or_by_the_learner(data_dir, sub_seq_len):
    dls = create_dls_silverbox(bs=16, win_sz=500, stp_sz=1000, sub_seq_len=100)
    learn = TbpttLearner(dls, rnn_type='lstm', hidden_size=40, metrics=rmse, sub_seq_len=sub_seq_len)
    fit(learn, 1, 3e-3, 'fit_flat_cos')
    assert len(learn.recorder.losses)==len(dls.train)//(5 if sub_seq_len is None else 1)
