from fastai.distributed import *
from tbptt_fastai.all import *

set_seed(0)
dls = create_dls_duffing(bs=16, win_sz=200, stp_sz=100, sub_seq_len=50) # 16 windows per process
learn = RNNLearner(dls, rnn_type='gru', hidden_size=16, n_skip=10, metrics=fun_rmse)
with learn.distrib_ctx(): learn.fit_flat_cos(2, 3e-3)
learn.save('duffing') # the first process saves, and no other
teardown_distrib()
