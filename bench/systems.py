"What the benchmarks of recorded systems share: a recording as one window, and a training that ends with the weights of the best validation"
import contextlib, io
from time import process_time
from fastai.callback.tracker import SaveModelCallback
from tbptt_fastai.all import SequenceWindows, TbpttDL

def in_one(u, y):
    "All steps as one window"
    return TbpttDL(SequenceWindows([u], [y], win_sz=len(u)), bs=1, num_workers=0)

def fit_best(learn, updates, lr, method='fit_flat_cos'):
    "At most so many updates, in whole epochs, but one epoch at least; how many there were, and the seconds of the processor"
    of_epoch = len(learn.tbptt_reset_cb.training_view(learn.dls.train))
    n_epoch = max(updates//of_epoch, 1)
    start = process_time()
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): # SaveModelCallback prints
        getattr(learn, method)(n_epoch, lr, cbs=SaveModelCallback())
    return n_epoch*of_epoch,process_time()-start
