"Training loops written by hand in plain PyTorch, that the library is held against. They import nothing of it."
import random
import torch
from fastai.data.load import DataLoader
from torch.utils._pytree import tree_map


def shuffled_epochs(n_windows, bs, n_epoch, seed, drop_last=False):
    "The batches of indices that a fastai loader draws in `n_epoch` epochs, if it is the first made after `random.seed(seed)`"
    random.seed(seed)
    dl = DataLoader(range(n_windows), bs=bs, shuffle=True, drop_last=drop_last)
    return [[b.tolist() for b in dl] for _ in range(n_epoch)]


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
