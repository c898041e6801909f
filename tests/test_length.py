"Full backpropagation over long sequences is named once, with what it costs"
import warnings
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from fastai.learner import Learner
from helpers import fit
from tbptt_fastai.instruments.activation import activation_memory
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.training.length import LengthHintCB, estimate_activations
from tbptt_fastai.truncation.schemes import Overlap

N = 12_500 # 10,000 for training

def frame(n=N): return pd.DataFrame(dict(u=np.random.default_rng(0).standard_normal(n))).assign(y=lambda o: o.u)
def from_df(n=N, **kw): return SequenceDataLoaders.from_df(frame(n), 'u', 'y', **kw)
def from_arrays(n=N, **kw): return SequenceDataLoaders.from_arrays(frame(n).u.to_numpy(), frame(n).y.to_numpy(), **kw)
def learner(dls, **kw): return RNNLearner(dls, rnn_type='rnn', hidden_size=2, num_threads=1, **kw)

@pytest.mark.parametrize('make', [from_df, from_arrays])
def test_the_fit_names_long_sequences_once(make):
    learn = learner(make())
    with pytest.warns(UserWarning, match='up to 10,000 steps are trained whole.*1 x 10,000 time steps, and keeps about 156 KiB.*sub_seq_len, such as 100') as said: fit(learn, 1)
    assert sum('trained whole' in str(o.message) for o in said)==1
    fit(learn, 1) # a warning would be an error

@pytest.mark.parametrize('make,kw', [(lambda: from_df(sub_seq_len=5000), {}), (lambda: from_arrays(sub_seq_len=5000), {}), (lambda: from_df(12_490), {}), (lambda: from_arrays(win_sz=2000), {}),
                                     (from_df, dict(sub_seq_len=None)), (from_df, dict(sub_seq_len=5000)), (from_arrays, dict(truncation=Overlap(5000, 5000)))])
def test_short_ones_and_what_was_said_are_not_worth_a_word(make, kw): fit(learner(make(), **kw), 1)

def test_rows_of_a_stream_are_counted():
    dls = SequenceDataLoaders.from_arrays([np.zeros(12_500), np.zeros(50), np.zeros(25_000)], [np.zeros(12_500), np.zeros(50), np.zeros(25_000)], bs=2)
    assert '2 x 20,000 time steps, and keeps about 625 KiB' in LengthHintCB().hint(learner(dls))
    own = TbpttLearner(from_df(), nn.Linear(1, 1), loss_func=nn.L1Loss())
    assert 'keeps' not in LengthHintCB().hint(own)

@pytest.mark.parametrize('kind', ['rnn','gru','lstm'])
@pytest.mark.parametrize('hidden,layers', [(16,1), (40,2), (100,1)])
def test_the_estimate_is_that_of_the_instrument(kind, hidden, layers):
    model = SequenceRNN(1, 1, kind, hidden, layers)
    measured = activation_memory(model, torch.randn(3, 200, 1))
    assert 1/1.5<estimate_activations(model)*3*200/measured<1.5
