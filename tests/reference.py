"Training loops written by hand in plain PyTorch, that the library is held against. They import nothing of it."
import math
import random
import numpy as np
import torch
from fastai.data.load import DataLoader
from torch.utils._pytree import tree_map


def shuffled_epochs(n_windows, bs, n_epoch, seed, drop_last=False):
    "The batches of indices that a fastai loader draws in `n_epoch` epochs, if it is the first made after `random.seed(seed)`"
    random.seed(seed)
    dl = DataLoader(range(n_windows), bs=bs, shuffle=True, drop_last=drop_last)
    return [[b.tolist() for b in dl] for _ in range(n_epoch)]


def permutations(n, n_epoch, seed):
    "The orders in which a loader over sequences or windows takes them in `n_epoch` epochs, if it is the first made after `random.seed(seed)`"
    random.seed(seed)
    rng,orders = random.Random(random.randint(0, 2**32-1)),[]
    for _ in range(n_epoch):
        rng,order = random.Random(rng.randint(0, 2**32-1)),np.arange(n)
        np.random.default_rng(rng.getrandbits(64)).shuffle(order)
        orders.append(order)
    return orders


def window_epochs(n_windows, bs, n_epoch, seed):
    "The batches of indices of those orders"
    return [[order[i:i+bs].tolist() for i in range(0, n_windows, bs)] for order in permutations(n_windows, n_epoch, seed)]


def windows_by_hand(x, y, win_sz, stp_sz):
    "Every window of one pair of sequences, copied out one by one"
    starts = range(0, len(x)-win_sz+1, stp_sz)
    return torch.stack([x[s:s+win_sz] for s in starts]),torch.stack([y[s:s+win_sz] for s in starts])


def train_tbptt(rnn, head, x, y, epochs, sub_seq_len, lr, loss_func, n_skip=0, scale=lambda o: o, unscale=lambda o: o, clip=None):
    "Truncated backpropagation through time over windows x, y `(windows, time, channels)`; trains `rnn` and `head` in place"
    params = [*rnn.parameters(), *head.parameters()]
    opt = torch.optim.Adam(params, lr=lr)
    win_sz = x.shape[1]
    most = max(min(s+sub_seq_len, win_sz)-max(s, min(n_skip, s+sub_seq_len)) for s in range(0, win_sz, sub_seq_len))
    for epoch in epochs:
        for idxs in epoch:
            state = None
            for start in range(0, win_sz, sub_seq_len):
                xb,yb = x[idxs][:,start:start+sub_seq_len],y[idxs][:,start:start+sub_seq_len]
                out,state = rnn(scale(xb), state)
                state = tree_map(torch.detach, state)
                skip = max(n_skip-start, 0)
                counted = yb.shape[1]-skip
                if counted<=0: continue
                loss = loss_func(unscale(head(out))[:,skip:], yb[:,skip:])
                if counted<most: loss = loss*(counted/most)
                loss.backward()
                if clip is not None: torch.nn.utils.clip_grad_norm_(params, clip)
                opt.step()
                opt.zero_grad()


def train_full(rnn, head, x, y, epochs, lr, loss_func):
    "Plain backpropagation through whole windows"
    opt = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=lr)
    for epoch in epochs:
        for idxs in epoch:
            loss_func(head(rnn(x[idxs])[0]), y[idxs]).backward()
            opt.step()
            opt.zero_grad()


def train_any(forward, params, epochs, sub_seq_len, lr, loss_func, timed, n_inp=1, hypers=None, clip=None, n_acc=None, **adam):
    """Truncated backpropagation through time over `epochs`: lists of batches of windows, tuples of tensors `(*inputs, *targets)`.
    `timed` says which of them have a time axis (if no target has, the loss counts in a window's last sub-window only),
    `forward(inputs, state) -> (pred, state)` is the model, `hypers(fraction)` sets the optimizer's at that fraction of training,
    gradients of `n_acc` rows are added up before a step, and `adam` are more settings of the optimizer"""
    params = list(params)
    opt,rows = torch.optim.Adam(params, lr=lr, **adam),0
    for e,epoch in enumerate(epochs):
        for w,batch in enumerate(epoch):
            bs,win_sz = next(o.shape for o,t in zip(batch, timed) if t)[:2]
            state,starts = None,range(0, win_sz, sub_seq_len)
            for k,start in enumerate(starts):
                stop = min(start+sub_seq_len, win_sz)
                part = [o[:,start:stop] if t else o for o,t in zip(batch, timed)]
                if hypers: opt.param_groups[0].update(hypers((e+(w+k/len(starts))/len(epoch))/len(epochs)))
                pred,state = forward(part[:n_inp], state)
                state = tree_map(torch.detach, state)
                if not any(timed[n_inp:]) and stop<win_sz: continue
                loss = loss_func(pred, *part[n_inp:])
                if n_acc: loss,rows = loss/(n_acc/bs),rows+bs
                most = min(sub_seq_len, win_sz)
                if any(timed[n_inp:]) and stop-start<most: loss = loss*((stop-start)/most)
                loss.backward()
                if n_acc and rows<n_acc: continue
                rows = 0
                if clip is not None: torch.nn.utils.clip_grad_norm_(params, clip)
                opt.step()
                opt.zero_grad()


def rows_by_hand(lengths, bs, sub_seq_len, order):
    "The queue of sequences of each row: the longest first, each to the row with the least to do; within a row in the given order"
    queues,work = [[] for _ in range(min(bs, len(lengths)))],[0]*min(bs, len(lengths))
    for i in sorted(order, key=lambda i: -math.ceil(lengths[i]/sub_seq_len)):
        row = work.index(min(work))
        queues[row].append(i)
        work[row] += math.ceil(lengths[i]/sub_seq_len)
    return [sorted(q, key=list(order).index) for q in queues]


def stream_by_hand(lengths, bs, sub_seq_len, order):
    "For each step, what each row holds: (sequence, start, stop), or None where none is left"
    parts = [[(i, a, min(a+sub_seq_len, lengths[i])) for i in q for a in range(0, lengths[i], sub_seq_len)] for q in rows_by_hand(lengths, bs, sub_seq_len, order)]
    return [[p[k] if k<len(p) else None for p in parts] for k in range(max(map(len, parts)))]


def train_stream(rnn, head, xs, ys, orders, bs, sub_seq_len, lr, loss_func, n_skip=0, first_state=None, params=None):
    """Truncated backpropagation through time over sequences xs, ys of unequal length, laid end to end in rows; trains `rnn` and `head` in place.
    A loss is the mean over the real steps, and weighs by their number. `first_state(sequence)` is the state `(layers, 1, size)` it begins with"""
    lengths = [len(x) for x in xs]
    opt = torch.optim.Adam(params or [*rnn.parameters(), *head.parameters()], lr=lr)
    n_rows = min(bs, len(lengths))
    most = n_rows*max(min(a+sub_seq_len, n)-max(a, min(n_skip, n)) for n in lengths for a in range(0, n, sub_seq_len))
    for order in orders:
        state = None
        for step in stream_by_hand(lengths, bs, sub_seq_len, order):
            width = max(p[2]-p[1] for p in step if p)
            x,y = (torch.zeros(n_rows, width, seqs[0].shape[1], dtype=seqs[0].dtype) for seqs in (xs,ys))
            real,count = torch.zeros(n_rows, width, dtype=bool),torch.zeros(n_rows, width, dtype=bool)
            for row,p in enumerate(step):
                if not p: continue
                i,a,b = p
                x[row,:b-a],y[row,:b-a],real[row,:b-a] = xs[i][a:b],ys[i][a:b],True
                count[row,max(n_skip-a, 0):b-a] = True
            if state is None and first_state: state = tree_map(lambda *o: torch.cat(o, dim=1), *[first_state(p[0] if p else 0) for p in step])
            elif state is not None:
                begins = [row for row,p in enumerate(step) if not p or p[1]==0]
                state = tree_map(lambda o: o.clone(), state)
                for row in begins:
                    new = first_state(step[row][0] if step[row] else 0) if first_state else None
                    for k,o in enumerate(state if isinstance(state, tuple) else [state]): o[:,row] = 0 if new is None else (new if isinstance(new, tuple) else [new])[k][:,0]
            with torch.set_grad_enabled(bool(count.any())): out,state = rnn(x, state)
            state = tree_map(torch.detach, state)
            if not count.any(): continue
            n = int(count.sum())
            loss = loss_func(head(out)[count], y[count])
            if n<most: loss = loss*(n/most)
            loss.backward()
            opt.step()
            opt.zero_grad()


def train_overlap(rnn, head, x, y, epochs, k1, k2, opt, loss_func, losses='last', n_skip=0):
    "Every `k1` steps, backpropagation over the last `k2`, step by step, from the state that the model had at their start when it was last run over it"
    win_sz = x.shape[1]
    stops = [min(t, win_sz) for t in range(k1, win_sz+k1, k1)]
    begin = {stop: (max(stop-k2, 0), (stop-1)//k1*k1 if losses=='last' else max(stop-k2, 0)) for stop in stops}
    most = max(stop-max(first, min(n_skip, stop)) for stop,(_,first) in begin.items())
    for epoch in epochs:
        for idxs in epoch:
            xb,yb,seen = x[idxs],y[idxs],{0: None} # states, the newest of each step
            for stop,(start,first) in begin.items():
                state,out,new = seen[start],[],{}
                first = max(first, n_skip)
                with torch.set_grad_enabled(first<stop):
                    for t in range(start, stop):
                        o,state = rnn(xb[:,t:t+1], state)
                        new[t+1] = tree_map(lambda s: s.detach().clone(), state)
                        out.append(head(o))
                seen.update(new)
                if first>=stop: continue
                loss = loss_func(torch.cat(out, 1)[:,first-start:], yb[:,first:stop])*((stop-first)/most)
                loss.backward()
                opt.step()
                opt.zero_grad()


def scaled_gradients(rnn, head, x, y, state, factors, loss_func):
    """Backpropagation through one segment x, y `(bs, time, ...)` from a state, by a recursion over single steps: the gradient with respect to the state after
    step t is multiplied by `factors[t+1]` where it goes back over the boundary before step t+1. The loss is the sum over steps of `loss_func`.
    Returns the gradients and the last state"""
    params = [*rnn.parameters(), *head.parameters()]
    before,grads = [],[torch.zeros_like(p) for p in params]
    for t in range(x.shape[1]):
        before.append(state)
        with torch.no_grad(): _,state = rnn(x[:,t:t+1], state)
    last,delta = state,None
    for t in reversed(range(x.shape[1])):
        start = None if before[t] is None else tree_map(lambda s: s.detach().clone().requires_grad_(), before[t])
        leaves = [] if start is None else list(start) if isinstance(start, tuple) else [start]
        out,end = rnn(x[:,t:t+1], start)
        total = loss_func(head(out), y[:,t:t+1])
        if delta is not None: total = total+sum((s*d).sum() for s,d in zip(end if isinstance(end, tuple) else [end], delta))
        g = torch.autograd.grad(total, [*params, *leaves])
        grads = [a+b for a,b in zip(grads, g)]
        delta = [factors.get(t, 1.)*o for o in g[len(params):]]
    return grads,tree_map(torch.detach, last)


def stream_of_sizes(lengths, bs, usual, sizes):
    "As `stream_by_hand`, in steps of the given sizes, one after the other"
    queues,place,res = rows_by_hand(lengths, bs, usual, range(len(lengths))),None,[]
    place = [(0, 0)]*len(queues)
    for size in sizes:
        step = []
        for row,(i,a) in enumerate(place):
            if i==len(queues[row]): step.append(None); continue
            seq = queues[row][i]
            b = min(a+size, lengths[seq])
            step.append((seq, a, b))
            place[row] = (i+1, 0) if b==lengths[seq] else (i, b)
        res.append(step)
    assert all(i==len(q) for (i,_),q in zip(place, queues))
    return res


def train_scheme_on_stream(rnn, head, xs, ys, bs, size, runs, opt, loss_func, weigh, n_skip=0, steps=None):
    """A scheme over sequences in rows, each row run alone and block by block. `runs` are, for each training step, `(first block, one past the last, first whose
    losses count, block that the next step starts from, {block: factor})`; `weigh(run, counted steps, rows)` is the weight of a mean loss"""
    lengths = [len(x) for x in xs]
    steps = steps or stream_by_hand(lengths, bs, size, range(len(lengths)))
    state = [None]*len(steps[0])
    for run in runs:
        lo,hi,first,carry,factors = run
        preds,targets,kept = [],[],[None]*len(state)
        for row in range(len(state)):
            s = state[row]
            for k in range(lo, hi):
                if k in factors and k>lo and s is not None:
                    f = factors[k]
                    s = tree_map(lambda o: o.detach()+f*(o-o.detach()), s)
                if k==carry: kept[row] = None if s is None else tree_map(torch.detach, s)
                if steps[k][row] is None: s = None; continue
                i,a,b = steps[k][row]
                out,s = rnn(xs[i][None,a:b], None if a==0 else s)
                if k>=first and b>n_skip: preds.append(head(out)[0,max(n_skip-a, 0):]); targets.append(ys[i][max(a, n_skip):b])
            if carry==hi: kept[row] = None if s is None else tree_map(torch.detach, s)
        state = kept
        n = sum(map(len, targets))
        if not n: continue
        (loss_func(torch.cat(preds), torch.cat(targets))*weigh(run, n, len(state))).backward()
        opt.step()
        opt.zero_grad()


class OwnState(torch.nn.Module):
    "A model that carries its state by itself, and can only reset all of it"
    def __init__(self, rnn, head):
        super().__init__()
        self.rnn,self.head = rnn,head
        self.reset()
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return self.head(out)
