"Unusual frames: what is legal is right, what is not is refused by name"
import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import set_seed
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from helpers import fit
from test_predict_df import by_hand, frame, make, new_frame, predict

from_df = SequenceDataLoaders.from_df


# --- A column with two parts to play

def test_a_column_of_numbers_that_is_input_and_class_is_a_number_as_input():
    df = frame([40, 25]).assign(gear=lambda o: o.hour.astype(int)%3*10+10)
    learn = make(x=['u','gear'], y='gear', vocab=[10,20,30], df=df)
    assert set(learn.dls.train_ds[0][0][:,1].tolist())=={10.,20.,30.}
    expected = np.array([10,20,30])[by_hand(learn, df, ['u','gear']).argmax(1)]
    np.testing.assert_array_equal(predict(learn, df).gear_pred, expected)
    with_labels = learn.dls.test_df(df, with_labels=True).dataset
    assert set(with_labels[0][0][:,1].tolist())=={10.,20.,30.} and set(with_labels[0][1].tolist())=={0,1,2}

def test_a_column_of_labels_that_is_input_and_target_is_embedded():
    df,x,codes = frame([40, 25]),['u','mode'],dict(mode=['idle','run','stop'])
    learn = make(x=x, y='mode', df=df)
    assert learn.dls.form.x_vocab==codes and learn.model.embed.n_classes=={1:3}
    expected = np.array(codes['mode'])[by_hand(learn, df, x, codes).argmax(1)]
    np.testing.assert_array_equal(predict(learn, df).mode_pred, expected)

def test_a_group_that_is_the_target_keeps_its_name():
    learn = make(y='pump')
    ds = learn.dls.test_df(frame([20, 30]), with_labels=True).dataset
    assert set(ds.groups)=={'a','b'} and set(torch.cat([y for _,y in ds]).tolist())=={0,1}
