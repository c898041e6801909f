from h import *
exec(open('/tmp/rvH/t2.py').read().split("class RandLen")[1].join(['class RandLen','']).split("class DictDS")[0].replace("from h import *",""))
trial('random length jittered', lambda p,s: learner(p,s,data=rl,truncation=Jittered(12)), every=3)
trial('random length unbiased', lambda p,s: learner(p,s,data=rl,truncation=RandomUnbiased(12)), every=3)
trial('counts most skipped', partial(learner, data=rl, sub_seq_len=15, counts=lambda y: (y[...,0]>.9)&(y[...,1]>.8)), every=1)
class Draw(Callback):
    def after_batch(self): torch.rand(1)
trial('rl draws', partial(learner, data=rl, sub_seq_len=15), cbs=lambda: [Draw()], every=1)
