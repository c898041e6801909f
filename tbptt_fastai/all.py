"Everything that a notebook needs: the names of this library that users type, and the parts of fastai that go with them"
from fastai.basics import *
from fastai.callback.all import *
# these add check_memory_grads, check_sub_windows and tbptt_find to Learner
import tbptt_fastai.instruments.diagnose, tbptt_fastai.instruments.find
from tbptt_fastai.datasets.benchmarks import create_dls_duffing, create_dls_silverbox, simulate_duffing
from tbptt_fastai.deploy.onnx import to_onnx
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.instruments.activation import activation_memory
from tbptt_fastai.instruments.adaptive import Adaptive
from tbptt_fastai.instruments.health import GradientHealth
from tbptt_fastai.learner import RNNLearner, TbpttLearner, scaling_from_data
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.views import SubWindows
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.models.memories import CachedAttention, CausalConv, FastWeights, LRU, WorkingMemory
from tbptt_fastai.models.sequence import SequenceRNN, Standardize
from tbptt_fastai.models.text import TextRNN, sample_text
from tbptt_fastai.sequences.text import TextRows
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences
from tbptt_fastai.speed.graphs import CudaGraphCB
from tbptt_fastai.speed.optimizer import FusedAdam
from tbptt_fastai.state.carry import Carry, without_carrying
from tbptt_fastai.state.encoded import EncodedState
from tbptt_fastai.state.stateful import InitialState, StatefulRNN, learned_state
from tbptt_fastai.state.stored import PassedState, StoredState
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.training.finite import FiniteCB
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.training.threads import ThreadHintCB
from tbptt_fastai.truncation.interleaved import Interleaved
from tbptt_fastai.truncation.plan import Fixed, SubWindow, Truncation
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased
import tbptt_fastai.helptexts as _helptexts

_ours = [o for o in list(globals().values()) if getattr(o, '__module__', '').startswith('tbptt_fastai.')]
_helptexts.add_parameters(*_ours, Learner.tbptt_find, Learner.check_memory_grads, Learner.check_sub_windows)
del _ours
