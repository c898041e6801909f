"Everything that a notebook needs: this library, and the parts of fastai that go with it"
from fastai.basics import *
from fastai.callback.all import *
from tbptt_fastai.state import *
from tbptt_fastai.rnn import *
from tbptt_fastai.carry import *
from tbptt_fastai.truncation import *
from tbptt_fastai.windows import *
from tbptt_fastai.loader import *
from tbptt_fastai.data import *
from tbptt_fastai.metrics import *
from tbptt_fastai.callback import *
from tbptt_fastai.evaluation import *
from tbptt_fastai.learner import *
from tbptt_fastai.memory import *
from tbptt_fastai.datasets import *
