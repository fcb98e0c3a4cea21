"""GPT-2 training in one file of NumPy: every layer forward and backward by hand, nothing hidden.

    python train_gpt2.py                          # a small GPT-2 learns Shakespeare, byte by byte
    python train_gpt2.py --model gpt2 --steps 10  # the real 124M shape, on GPT-2's own tokens
    python train_gpt2.py --help

There is no autograd here and no tensor library: a network is a few flat arrays of numbers and, for
every layer, one function that goes forward and one that goes backward. It refuses to be general:
one architecture, one optimizer, no plug-ins, so that it can be read from top to bottom in a sitting.
It goes the data's own way: the layers from the embedding to the loss, each with its way back; the
block and the model they make; AdamW's step; the sample; training, and the command line around it.
Impatient readers begin at block_forward, block_backward and GPT2. Text and tokens are the business
of prepro_tinyshakespeare.py; test_gpt2.py has the same network in PyTorch, and holds every function
of this file against it.

Letters, the same everywhere:
    B  sequences in a batch        C  channels, the width of the stream (n_embd)
    T  tokens in a sequence        H  attention heads, each of D = C/H channels
    N  = B*T token positions       L  blocks, one above the other (n_layer)
    V  tokens in the vocabulary    K  outputs of a linear layer

Rules that hold everywhere:
  - dx is dLoss/dx, the gradient of the loss with respect to x, and has the shape of x.
  - A function writes into arrays it is given: outputs first, then inputs, then weights. So nothing
    is allocated twice, and the same code runs in float32 and in float64 (the arrays decide).
  - Gradients of activations are written; gradients of parameters are added to, because a parameter
    that is used in several places (a repeated token, the tied head, the micro-batches of one step)
    gets the sum of what each use asks of it.
  - All parameters lie in one flat array, in the order of one table of names and shapes; so do their
    gradients and AdamW's two moments. A parameter is a view into its place.
"""
import argparse
import codecs
import csv
import itertools
import math
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

for _blas in ("OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):  # see "Threads" for why;
    os.environ.setdefault(f"{_blas}_THREADS", "1")                       # heeded at NumPy's import

import numpy as np

from prepro_tinyshakespeare import TOKENIZERS, Refused, Tokens, find_tokens, reason

# ------------------------------------------------------------------------------------------------
# Threads. NumPy uses one core, but lets go of Python's lock while it computes. So a layer is
# written as a function of a piece of its output (a block of rows, a group of heads), and a few
# threads work through the pieces, with BLAS told to stay on one thread (above). A piece fits into a
# core's cache, where a formula in plain NumPy costs little more than one pass over memory. How work
# is cut depends on the shapes alone and never on the number of threads; therefore the results do
# not either, to the bit.

PIECE = 1 << 16  # elements of a block, at least, for elementwise work: smaller fight over the lock


class Pool:
    """`pool(work, pieces)` calls work(*piece) for every piece, on `threads` threads.

    A call from within a piece is no further cause for threads: it does its pieces one by one.
    """

    def __init__(self, threads):
        self.threads, self.inboxes, self.done = threads, [], queue.SimpleQueue()
        self.at_work = False
        # glibc gives large arrays fresh pages and takes them back, at a page fault per 4 KB, unless
        # it has seen one as large be freed. After this one, temporaries are recycled.
        np.empty(31 << 20, np.uint8)

    def __call__(self, work, pieces):
        pieces = list(pieces)
        if self.at_work or len(pieces) < 2:
            for piece in pieces:
                work(*piece)
            return
        helpers = min(self.threads, len(pieces)) - 1
        while len(self.inboxes) < helpers:
            self.inboxes.append(queue.SimpleQueue())
            threading.Thread(target=self._serve, args=(self.inboxes[-1],), daemon=True).start()
        job = work, pieces, itertools.count().__next__  # the counter deals each piece out once
        self.at_work = True
        for inbox in self.inboxes[:helpers]:
            inbox.put(job)
        errors = [self._work(*job), *(self.done.get() for _ in range(helpers))]
        self.at_work = False
        for error in filter(None, errors):
            raise error

    @staticmethod
    def _work(work, pieces, next_number):
        try:
            while (number := next_number()) < len(pieces):
                work(*pieces[number])
        except BaseException as error:
            return error

    def _serve(self, inbox):
        while True:
            self.done.put(self._work(*inbox.get()))


def usable_cpus():
    """The number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


parallel = Pool(usable_cpus())


def split(n, pieces):
    """range(n) as at most so many slices: a power of two, so that 2, 4 or 8 threads end together."""
    pieces = 1 << int(math.log2(max(1, min(n, pieces))))
    return [slice(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


def row_blocks(rows, width=1):
    """The rows of an array in blocks of PIECE elements or more, as arguments for `parallel`."""
    return [(block,) for block in split(rows, rows * width / PIECE)]


def matmul(out, a, b, bias=None, add=False):
    """out = a @ b (+ bias), or out += a @ b; a (M,J), b (J,K), bias (K,) -> out (M,K).

    Wide products are cut by columns, tall ones by rows, as each piece reads the uncut operand whole:
    it is the smaller one. Large pieces run faster, so their size grows with the product too; when
    all threads are at work anyway, there is just one.
    """
    if out.strides[0] < out.strides[1]:  # a transposed view; (a b)^T = b^T a^T lies as memory does
        out, a, b = out.T, b.T, a.T
    (M, J), K = a.shape, b.shape[1]
    pieces, whole = min(16, max(M, K) / 64, math.sqrt(M * J * K / 2**22)), slice(None)
    pieces = 1 if parallel.at_work else pieces

    def piece(rows, cols):
        if add:
            out[rows, cols] += a[rows] @ b[:, cols]
        else:
            np.matmul(a[rows], b[:, cols], out=out[rows, cols])
        if bias is not None:
            out[rows, cols] += bias[cols]
    parallel(piece, [(whole, cols) for cols in split(K, pieces)] if K >= M else
             [(rows, whole) for rows in split(M, pieces)])


# ------------------------------------------------------------------------------------------------
# Layers, each forward directly above its backward.

def embedding_forward(out, ids, wte, wpe):
    """What the token is plus where it stands: out_bt = wte[ids_bt] + wpe[t].

    ids (B,T), wte (V,C), wpe (T or more,C) -> out (N,C). Radford et al. 2018, equation 2.
    """
    np.take(wte, ids.ravel(), axis=0, out=out, mode="clip")  # GPT2.forward has checked the ids
    by_sequence = out.reshape(*ids.shape, -1)
    by_sequence += wpe[:ids.shape[1]]


# A row of wte is used wherever its token stands, so it gets the gradients of all those places:
#     dwte[i] = sum of dout_bt over all (b,t) with ids_bt = i
# (as a matrix: out = onehot @ wte, so dwte = onehot^T @ dout). The tempting dwte[ids] += dout keeps
# only one of several equal ids. Instead: sort the places by id, sum each run, add each sum once.

def embedding_backward(dwte, dwpe, dout, ids):
    """Adds to dwte (V,C) and dwpe (T or more,C). dout (N,C), ids (B,T)."""
    dwpe[:ids.shape[1]] += dout.reshape(*ids.shape, -1).sum(axis=0)
    order = np.argsort(ids, axis=None, kind="stable")
    in_order = ids.ravel()[order]
    starts = np.flatnonzero(np.diff(in_order, prepend=-1))
    dwte[in_order[starts]] += np.add.reduceat(dout[order], starts, axis=0)


def layernorm_forward(out, mean, rstd, inp, weight, bias, eps=1e-5):
    """Each row brought to mean 0 and variance 1: out = (inp - mean) * rstd * weight + bias.

    inp (N,C), weight (C,), bias (C,) -> out (N,C), mean (N,1), rstd = 1/sqrt(var + eps) (N,1). Kept
    for backward are mean and rstd, two numbers a row; xhat = (inp - mean) * rstd would be C.
    Ba et al. 2016, equation 4.
    """
    def piece(rows):
        x, y = inp[rows], out[rows]
        mean[rows] = x.mean(axis=1, keepdims=True)
        np.subtract(x, mean[rows], out=y)
        var = np.vecdot(y, y)[:, None] / x.shape[1]
        rstd[rows] = 1 / np.sqrt(var + eps)
        y *= rstd[rows]
        y *= weight
        y += bias
    parallel(piece, row_blocks(*inp.shape))


# In one row, xhat_i = (x_i - mean) rstd and out_i = xhat_i weight_i + bias_i, so
#     dweight_i = dout_i xhat_i,   dbias_i = dout_i,   dxhat_i = dout_i weight_i.
# x_j acts on xhat_i in three ways: directly (if i = j), through the mean, with dmean/dx_j = 1/C,
# and through rstd = (var + eps)^(-1/2), where var = sum_i (x_i - mean)^2 / C:
#     dvar/dx_j  = 2/C sum_i (x_i - mean) ([i = j] - 1/C) = 2/C (x_j - mean),
#                  as sum_i (x_i - mean) = 0
#     drstd/dx_j = -1/2 rstd^3 dvar/dx_j = -1/C rstd^2 xhat_j
#     dxhat_i/dx_j = ([i = j] - 1/C) rstd + (x_i - mean) drstd/dx_j
#                  = rstd ([i = j] - 1/C - xhat_i xhat_j / C)
#     dx_j = sum_i dxhat_i dxhat_i/dx_j
#          = rstd (dxhat_j - mean_i(dxhat_i) - xhat_j mean_i(dxhat_i xhat_i))
# Three terms: dxhat, less its mean, less its part along xhat. Neither shifting nor stretching a row
# changes xhat, so no gradient goes that way.

def layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight):
    """Writes dinp (N,C), which may be dout itself; adds to dweight (C,) and dbias (C,)."""
    blocks = row_blocks(*inp.shape)
    sums = np.empty((len(blocks), 2, inp.shape[1]), inp.dtype)  # each block's dweight and dbias

    def piece(i, rows):
        dy, xhat = dout[rows], inp[rows] - mean[rows]
        xhat *= rstd[rows]
        sums[i] = (dy * xhat).sum(axis=0), dy.sum(axis=0)
        dxhat = np.multiply(dy, weight, out=dinp[rows])
        xhat *= np.vecdot(dxhat, xhat)[:, None] / xhat.shape[1]  # its part along xhat
        dxhat -= dxhat.mean(axis=1, keepdims=True)
        dxhat -= xhat
        dxhat *= rstd[rows]
    parallel(piece, [(i, rows) for i, (rows,) in enumerate(blocks)])
    dweight += sums[:, 0].sum(axis=0)
    dbias += sums[:, 1].sum(axis=0)


def linear_forward(out, inp, weight, bias=None):
    """out = inp @ weight + bias. inp (N,C), weight (C,K), bias (K,) or none -> out (N,K)."""
    matmul(out, inp, weight, bias)


# out_nk = sum_c inp_nc weight_ck + bias_k. The gradient of a factor is dout times the other factor,
# summed over whichever index the factor does not have:
#     dinp_nc = sum_k dout_nk weight_ck,  dweight_ck = sum_n inp_nc dout_nk,  dbias_k = sum_n dout_nk
# In matrices: dinp = dout @ weight^T and dweight = inp^T @ dout (their shapes allow nothing else).

def linear_backward(dinp, dweight, dbias, dout, inp, weight):
    """Writes dinp (N,C); adds to dweight (C,K) and dbias (K,), unless that is None."""
    matmul(dinp, dout, weight.T)
    matmul(dweight, inp.T, dout, add=True)

    def piece(cols):
        dbias[cols] += dout[:, cols].sum(axis=0)
    if dbias is not None:
        parallel(piece, row_blocks(*dout.T.shape))


# Causal self-attention is the only layer in which positions see each other. Position t has a query
# q_t; every position s has a key k_s and a value v_s. What t gets is a mean of the values up to its
# own, each weighted by how well its key answers t's query:
#     1. score_ts = q_t . k_s / sqrt(D), or minus infinity if s > t: no looking ahead
#     2. att_ts = exp(score_ts) / sum_s exp(score_ts)
#     3. out_t = sum_s att_ts v_s
# This happens in H heads side by side, each on its own D of the C channels.

QUERIES = 64  # positions t computed together; they need keys only up to the last of them
AHEAD = np.triu(np.full((QUERIES, QUERIES), -np.inf, np.float32), 1)  # hides what comes later


def attention_cut(q, k):
    """Pieces (batch, heads) for `parallel`, and the blocks of queries (and their keys) in each."""
    (B, H, T, _), S = q.shape, k.shape[2]
    pieces = B * H * min(T, QUERIES) * S / PIECE
    return ([(batch, heads) for batch in split(B, pieces) for heads in split(H, pieces / B)],
            [(slice(t, min(t + QUERIES, T)), slice(0, S - T + min(t + QUERIES, T)))
             for t in range(0, T, QUERIES)])


def by_head(B, H, *arrays):
    """(B*T, C) arrays as (B,H,T,D) views."""
    return [x.reshape(B, -1, H, x.shape[1] // H).swapaxes(1, 2) for x in arrays]


def attention_scores(q, k):
    """Step 1: q (..,t,D), k (..,s,D) -> (..,t,s). The last t keys stand where the queries do."""
    t, scale = q.shape[-2], 1 / math.sqrt(q.shape[-1])
    scores = (q * scale) @ k.swapaxes(-1, -2)
    scores[..., -t:] += AHEAD[:t, :t]
    return scores


def attention_forward(out, lse, q, k, v):
    """Causal attention in H heads: out_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s over s <= t.

    q (B*T,C), k and v (B*S,C) -> out (B*T,C), lse (B,H,T,1); the T queries stand at the last of the
    S positions. Kept for backward is lse = log sum_s exp(score_ts), from which any att_ts =
    exp(score_ts - lse_t) can be had again: T numbers per head instead of T*S. Vaswani et al. 2017,
    equation 1 and section 3.2.2; Dao et al. 2022 (FlashAttention), section 3.1.
    """
    q, k, v, out = by_head(*lse.shape[:2], q, k, v, out)
    pieces, blocks = attention_cut(q, k)

    def piece(*group):
        for rows, keys in blocks:
            att = attention_scores(q[group][..., rows, :], k[group][..., keys, :])
            top = att.max(axis=-1, keepdims=True)
            att -= top  # the largest exponential is 1: none overflows
            np.exp(att, out=att)
            total = att.sum(axis=-1, keepdims=True)
            lse[group][..., rows, :] = top + np.log(total)
            out[group][..., rows, :] = att @ v[group][..., keys, :] / total
    parallel(piece, pieces)


# The three steps backwards:
#     3. out_td = sum_s att_ts v_sd is a product of matrices, so
#            datt_ts = sum_d dout_td v_sd,   dv_sd = sum_t att_ts dout_td
#     2. in one row, datt_s/dscore_r = att_s ([s = r] - att_r), so
#            dscore_r = sum_s datt_s datt_s/dscore_r = att_r (datt_r - sum_s datt_s att_s)
#        where sum_s datt_s att_s = sum_d dout_d sum_s att_s v_sd = sum_d dout_d out_d
#     1. score_ts = sum_d q_td k_sd / sqrt(D) is a product again:
#            dq_td = sum_s dscore_ts k_sd / sqrt(D),   dk_sd = sum_t dscore_ts q_td / sqrt(D)
# The mask needs no line: where it hid a score, att = 0, and so dscore = 0.

def attention_backward(dq, dk, dv, dout, out, lse, q, k, v):
    """Writes dq (B*T,C), dk and dv (B*S,C); dout (B*T,C), the rest as in attention_forward."""
    q, k, v, out, dq, dk, dv, dout = by_head(*lse.shape[:2], q, k, v, out, dq, dk, dv, dout)
    pieces, blocks = attention_cut(q, k)
    scale = 1 / math.sqrt(q.shape[-1])

    def piece(*group):
        dk[group] = dv[group] = 0
        for rows, keys in blocks:
            q_, dout_, out_, lse_ = (x[group][..., rows, :] for x in (q, dout, out, lse))
            k_, v_, dk_, dv_ = (x[group][..., keys, :] for x in (k, v, dk, dv))
            att = attention_scores(q_, k_)
            att -= lse_
            np.exp(att, out=att)
            dv_ += att.swapaxes(-1, -2) @ dout_
            dscore = dout_ @ v_.swapaxes(-1, -2)
            dscore -= np.vecdot(dout_, out_)[..., None]
            dscore *= att
            dq[group][..., rows, :] = dscore @ k_ * scale
            dk_ += dscore.swapaxes(-1, -2) @ (q_ * scale)
    parallel(piece, pieces)


# GELU is x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3). Since (1 + tanh(u))/2 =
# sigmoid(2u) exactly, it is x / (1 + exp(-z)) with z = 2u = x (GELU_1 + GELU_3 x^2): one
# exponential. An expression would take a new array for each of its steps; here one takes all.

GELU_1 = 2 * math.sqrt(2 / math.pi)
GELU_3 = GELU_1 * 0.044715


def one_plus_exp(out, x):
    """out = 1 + exp(-z(x)). Where exp overflows to infinity, the 0 that results is right."""
    np.multiply(x, x, out=out)
    out *= -GELU_3
    out -= GELU_1
    out *= x  # -z
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1


def gelu_forward(out, inp):
    """A gate that lets large x through and holds negative ones back: out = x sigmoid(z(x)).

    inp (N,K) -> out (N,K). Hendrycks & Gimpel 2016, section 2, in the tanh form that GPT-2 has.
    """
    def piece(rows):
        one_plus_exp(out[rows], inp[rows])
        np.divide(inp[rows], out[rows], out=out[rows])
    parallel(piece, row_blocks(*inp.shape))


# out = x s(z) with the sigmoid s = 1 / (1 + exp(-z)), whose own derivative is ds/dz = s (1 - s), so
#     dout/dx = s + x s (1 - s) dz/dx = s (1 + (1 - s) x dz/dx),   dz/dx = GELU_1 + 3 GELU_3 x^2

def gelu_backward(dinp, dout, inp):
    """Writes dinp (N,K), which may be dout itself. s is computed again rather than kept."""
    def piece(rows):
        x = inp[rows]
        s, slope = np.empty_like(x), x * x
        one_plus_exp(s, x)
        np.divide(1, s, out=s)
        slope *= 3 * GELU_3
        slope += GELU_1
        slope *= x  # x dz/dx
        slope -= slope * s
        slope += 1
        slope *= s  # dout/dx
        np.multiply(dout[rows], slope, out=dinp[rows])
    parallel(piece, row_blocks(*inp.shape))


def crossentropy_forward(losses, lse, logits, targets):
    """How surprised the network is by each target, in nats: -log softmax(logits)_target.

    logits (N,V), targets (N,) -> losses (N,), and for backward lse (N,1) = log sum_j exp(logits_j).
    As log(exp(a)/exp(b)) = a - b, the loss is lse - logits_target; both are taken relative to the
    largest logit, so nothing overflows and no logarithm sees 0. Bishop 2006, equation 4.108.
    """
    def piece(rows):
        x = logits[rows]
        top = x.max(axis=1, keepdims=True)
        x = x - top
        target = x[np.arange(len(x)), targets[rows]]
        log_total = np.log(np.exp(x, out=x).sum(axis=1, keepdims=True))
        losses[rows] = log_total[:, 0] - target
        lse[rows] = log_total + top
    parallel(piece, row_blocks(*logits.shape))


# loss = lse - logits_target, and dlse/dlogits_j = exp(logits_j) / sum_i exp(logits_i) = p_j, so
#     dloss/dlogits_j = p_j - [j = target],   with p_j = exp(logits_j - lse):
# what the network expected, less what came. Logarithm and softmax together leave just this.

def crossentropy_backward(dlogits, dloss, lse, logits, targets):
    """Writes dlogits (N,V), which may be logits itself; dloss is every loss's gradient, a number."""
    def piece(rows):
        p = np.subtract(logits[rows], lse[rows], out=dlogits[rows])
        np.exp(p, out=p)
        p[np.arange(len(p)), targets[rows]] -= 1
        p *= dloss
    parallel(piece, row_blocks(*logits.shape))


# ------------------------------------------------------------------------------------------------
# The block. A stream x (N,C) runs up through the network. Every block reads it twice and adds what
# it finds: first from other positions (attention), then from the position itself (the MLP, 4C wide
# inside). p are the block's parameters and g their gradients, in pairs of weight and bias; a are
# its activations. Backward needs nearly all of those again, 16C numbers a position and block. But
# 6C of them, the outputs of the layernorms and of GELU, are quickly made again from the others. So
# they are not kept: all blocks share one array for each.

def block_forward(a, x, p):
    """x (N,C) -> a["x"] (N,C). Radford et al. 2019, section 2.3: layernorms inside the branches."""
    layernorm_forward(a["norm"], *a["ln_1.stats"], x, *p["ln_1"])
    linear_forward(a["qkv"], a["norm"], *p["attn.c_attn"])
    attention_forward(a["attn"], a["attn.lse"], *np.split(a["qkv"], 3, axis=1))
    linear_forward(a["mid"], a["attn"], *p["attn.c_proj"])
    a["mid"] += x
    layernorm_forward(a["norm"], *a["ln_2.stats"], a["mid"], *p["ln_2"])
    linear_forward(a["fc"], a["norm"], *p["mlp.c_fc"])
    gelu_forward(a["gelu"], a["fc"])
    linear_forward(a["x"], a["gelu"], *p["mlp.c_proj"])
    a["x"] += a["mid"]


# The stream forks at every branch: x' = x + branch(x), so dx = dx' + (dx' taken back through
# branch). The plain dx' is why deep networks learn at all: it reaches every block undiminished. In
# the code dx is one array that runs back down the stream, and each branch adds its part to it.

def block_backward(dx, g, a, x, p):
    """Turns dx (N,C), the gradient of the block's output, into that of its input x (N,C)."""
    dbranch, qkv, dqkv = a["d.branch"], np.split(a["qkv"], 3, axis=1), np.split(a["d.qkv"], 3, axis=1)
    gelu_forward(a["gelu"], a["fc"])
    linear_backward(a["d.fc"], *g["mlp.c_proj"], dx, a["gelu"], p["mlp.c_proj"][0])
    gelu_backward(a["d.fc"], a["d.fc"], a["fc"])
    layernorm_forward(a["norm"], *a["ln_2.stats"], a["mid"], *p["ln_2"])
    linear_backward(dbranch, *g["mlp.c_fc"], a["d.fc"], a["norm"], p["mlp.c_fc"][0])
    layernorm_backward(dbranch, *g["ln_2"], dbranch, a["mid"], *a["ln_2.stats"], p["ln_2"][0])
    dx += dbranch
    linear_backward(dbranch, *g["attn.c_proj"], dx, a["attn"], p["attn.c_proj"][0])
    attention_backward(*dqkv, dbranch, a["attn"], a["attn.lse"], *qkv)
    layernorm_forward(a["norm"], *a["ln_1.stats"], x, *p["ln_1"])
    linear_backward(dbranch, *g["attn.c_attn"], a["d.qkv"], a["norm"], p["attn.c_attn"][0])
    layernorm_backward(dbranch, *g["ln_1"], dbranch, x, *a["ln_1.stats"], p["ln_1"][0])
    dx += dbranch


# The network: the embedding, the blocks, a last layernorm, and the head, which scores every token
# of the vocabulary: it is the embedding turned round. `blocks` has (g, a, x, p) for each.

def network_forward(a, blocks, p, ids, targets=None):
    """ids (B,T) -> a["logits"] (N,V), and with targets (N,) a["losses"] (N,)."""
    embedding_forward(a["embedded"], ids, p["wte.weight"], p["wpe.weight"])
    for _, *block in blocks:
        block_forward(*block)
    layernorm_forward(a["ln_f"], *a["ln_f.stats"], a["x"], p["ln_f.weight"], p["ln_f.bias"])
    linear_forward(a["logits"], a["ln_f"], p["wte.weight"].T)
    if targets is not None:
        crossentropy_forward(a["losses"], a["logits.lse"], a["logits"], targets)


# wte is used twice, so it gets two gradients: from the head here at the start, and in the end from
# the embedding. The logits turn into their own gradient in place, as the largest array there is.

def network_backward(g, a, blocks, p, ids, targets, dloss):
    """Adds to every gradient in g; dloss is each loss's own."""
    dlogits, dx = a["logits"], a["dx"]
    crossentropy_backward(dlogits, dloss, a["logits.lse"], a["logits"], targets)
    linear_backward(dx, g["wte.weight"].T, None, dlogits, a["ln_f"], p["wte.weight"].T)
    layernorm_backward(dx, g["ln_f.weight"], g["ln_f.bias"], dx, a["x"], *a["ln_f.stats"],
                       p["ln_f.weight"])
    for block in reversed(blocks):
        block_backward(dx, *block)
    embedding_backward(g["wte.weight"], g["wpe.weight"], dx, ids)


# ------------------------------------------------------------------------------------------------
# The model: two tables of names and shapes, and flat arrays carved by them.

@dataclass(frozen=True)
class GPTConfig:
    """The five numbers that make a GPT-2; the defaults are those of the 124M one."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise Refused(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise Refused(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads; "
                          "choose a multiple")


def for_each_block(config, table):
    """A block's table, once for every block: h.0.name, ..., h.1.name, ..."""
    return {f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in table.items()}


def parameter_table(config):
    """{name: shape} of all parameters, under GPT-2's own names; weights are (in, out)."""
    C = config.n_embd
    return {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.n_positions, C),
            **for_each_block(config, {
                "ln_1.weight": (C,), "ln_1.bias": (C,),
                "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
                "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
                "ln_2.weight": (C,), "ln_2.bias": (C,),
                "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
                "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}),
            "ln_f.weight": (C,), "ln_f.bias": (C,)}


def activation_table(config, B, T):
    """{name: shape} of what forward leaves for backward, and what every block uses again."""
    N, C, H = B * T, config.n_embd, config.n_head
    return {"embedded": (N, C),
            **for_each_block(config, {
                "ln_1.stats": (2, N, 1), "qkv": (N, 3 * C), "attn": (N, C),
                "attn.lse": (B, H, T, 1), "mid": (N, C), "ln_2.stats": (2, N, 1),
                "fc": (N, 4 * C), "x": (N, C)}),
            "ln_f": (N, C), "ln_f.stats": (2, N, 1), "logits.lse": (N, 1), "dx": (N, C),
            "shared.norm": (N, C), "shared.d.branch": (N, C), "shared.gelu": (N, 4 * C),
            "shared.d.fc": (N, 4 * C), "shared.d.qkv": (N, 3 * C)}


def size(table):
    """The number of elements in a table."""
    return sum(map(math.prod, table.values()))


def spans(table):
    """{name: slice}: where each entry of a table lies in its flat array."""
    stops = itertools.accumulate(map(math.prod, table.values()))
    return {name: slice(stop - math.prod(shape), stop)
            for stop, (name, shape) in zip(stops, table.items())}


def carve(flat, table):
    """{name: view} of a flat array. Write d[name][...] = or d[name] +=: d[name] = loses the view."""
    return {name: flat[span].reshape(table[name]) for name, span in spans(table).items()}


def under(prefix, views):
    """The views whose names begin with prefix, under the rest of their names."""
    return {name[len(prefix):]: view for name, view in views.items() if name.startswith(prefix)}


def pairs(views):
    """{"ln_1.weight": w, "ln_1.bias": b, ...} -> {"ln_1": (w, b), ...}."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in views)
    return {name: (views[f"{name}.weight"], views[f"{name}.bias"]) for name in names}


class GPT2:
    """GPT-2 (Radford et al. 2019), its gradients, and the state of its optimizer.

    params and grads are {name: view} into flat_params and flat_grads, laid out by parameter_table,
    as are AdamW's moments flat_m and flat_v. B and T may change from call to call.
    """

    def __init__(self, config, dtype=np.float32, seed=1337):
        self.config, self.table, self.steps = config, parameter_table(config), 0
        self.flat_params = np.empty(size(self.table), dtype)
        self.flat_grads, self.flat_m, self.flat_v = (np.zeros_like(self.flat_params) for _ in "gmv")
        self.params = carve(self.flat_params, self.table)
        self.grads = carve(self.flat_grads, self.table)
        self.flat_acts, self.more_grads = np.empty(0, dtype), []
        self.shape = self.targets = None
        self._initialize(np.random.default_rng(seed))

    def _initialize(self, rng):
        """GPT-2's: matrices normal with standard deviation 0.02, biases 0, layernorm weights 1.

        The c_proj, whose 2L outputs add up in the stream, get 0.02/sqrt(2L) (section 2.3).
        """
        for name, param in self.params.items():
            if param.ndim == 1:
                param[...] = name.endswith("weight")
            else:
                rng.standard_normal(dtype=param.dtype, out=param)
                param *= 0.02 / math.sqrt(2 * self.config.n_layer if "c_proj" in name else 1)

    def _make_room(self, B, T):
        """Activations for (B,T), carved from one array that is kept from call to call.

        Sequences meet only in the gradients. So where parameters are few beside activations, the
        batch is cut into parts that pass through the whole network each on its thread, with
        gradients of their own, added up in the end: layers need not wait for each other's pieces.
        """
        if self.shape == (B, T):
            return
        self.shape, N, config = (B, T), B * T, self.config
        ratio = size(activation_table(config, B, T)) / self.flat_params.size
        cut = split(B, min(8, N / 256, ratio / 3))
        table = {"logits": (N, config.vocab_size), "losses": (N,)}
        for i, part in enumerate(cut):
            part_table = activation_table(config, part.stop - part.start, T)
            table |= {f"{i}.{name}": shape for name, shape in part_table.items()}
        if self.flat_acts.size < size(table):
            self.flat_acts = np.empty(size(table), self.flat_params.dtype)
        acts = carve(self.flat_acts, table)
        self.logits_and_losses = acts["logits"], acts["losses"]
        self.more_grads += [np.zeros_like(self.flat_grads) for _ in cut[1 + len(self.more_grads):]]
        self.parts = []
        for i, part in enumerate(cut):
            rows, a = slice(part.start * T, part.stop * T), under(f"{i}.", acts)
            g = carve(self.more_grads[i - 1], self.table) if i else self.grads
            blocks, x, shared = [], a["embedded"], under("shared.", a)
            for h in range(config.n_layer):
                g_h, a_h, p_h = (under(f"h.{h}.", views) for views in (g, a, self.params))
                blocks.append((pairs(g_h), a_h | shared, x, pairs(p_h)))
                x = a_h["x"]
            a |= {"x": x, "logits": acts["logits"][rows], "losses": acts["losses"][rows]}
            self.parts.append((part, rows, g, a, blocks))

    def _checked(self, ids):
        """ids as an array (B,T) of tokens this model knows, or Refused."""
        ids, config = np.asarray(ids), self.config
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise Refused(f"ids must be whole numbers of shape (B,T), not {ids.dtype} {ids.shape}")
        if ids.shape[1] > config.n_positions:
            raise Refused(f"T={ids.shape[1]} is longer than n_positions={config.n_positions}")
        for bad in ids[(ids < 0) | (ids >= config.vocab_size)]:
            raise Refused(f"id {bad} is outside the vocabulary of {config.vocab_size}")
        return ids

    def forward(self, ids, targets=None):
        """ids (B,T) -> logits (B,T,V), kept in self.logits; with targets (B,T) -> the mean loss."""
        self.ids = self._checked(ids)
        self.targets = None if targets is None else self._checked(targets)
        if targets is not None and self.targets.shape != self.ids.shape:
            raise Refused(f"targets {self.targets.shape} are not of ids' shape {self.ids.shape}")
        self._make_room(*self.ids.shape)

        def part(sequences, rows, _, a, blocks):
            network_forward(a, blocks, self.params, self.ids[sequences],
                            None if targets is None else self.targets.ravel()[rows])
        parallel(part, self.parts)
        logits, losses = self.logits_and_losses
        self.logits = logits.reshape(*self.ids.shape, -1)
        return self.logits if targets is None else float(losses.mean())

    def backward(self, dloss=1.0, accumulate=False):
        """Fills grads with dloss times the gradient of forward's loss, or adds that to them.

        The logits turn into their own gradient, so every backward needs a forward before it.
        """
        assert self.targets is not None, "backward() without a forward(ids, targets) before it"
        more_grads, each = self.more_grads[:len(self.parts) - 1], dloss / self.ids.size

        def clear(block):
            for flat in more_grads if accumulate else [self.flat_grads, *more_grads]:
                flat[block] = 0

        def part(sequences, rows, g, a, blocks):
            network_backward(g, a, blocks, self.params, self.ids[sequences],
                             self.targets.ravel()[rows], each)

        def add_up(block):
            for flat in more_grads:
                self.flat_grads[block] += flat[block]
        blocks = row_blocks(self.flat_grads.size)
        parallel(clear, blocks)
        parallel(part, self.parts)
        parallel(add_up, blocks)
        self.targets = self.logits = None

    def update(self, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0):
        """One step of AdamW; returns the gradient's norm, before it is clipped to grad_clip (0: not).

        If the norm is not finite, nothing changes.
        """
        norm = global_norm(self.flat_grads)
        if math.isfinite(norm):
            self.steps += 1
            clip = min(1, grad_clip / (norm + 1e-6)) if grad_clip else 1
            adamw(self.flat_params, self.flat_m, self.flat_v, self.flat_grads, self.table,
                  self.steps, lr, beta1, beta2, eps, weight_decay, clip)
        return norm

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, rng=None,
                 on_token=None):
        """ids (B,T) -> (B, T + max_new_tokens), continued token by token; see sample().

        Past n_positions the window slides. on_token, if given, is called with every new (B,).
        """
        ids, rng = np.asarray(ids), rng or np.random.default_rng()
        for _ in range(max_new_tokens):
            logits = self.forward(ids[:, -self.config.n_positions:])[:, -1]
            new = sample(logits, temperature, top_k, top_p, rng)
            ids = np.concatenate([ids, new[:, None]], axis=1)
            if on_token:
                on_token(new)
        return ids


# ------------------------------------------------------------------------------------------------
# The step.

def global_norm(flat_grads):
    """The length of the whole gradient, sqrt(sum of squares), a float."""
    blocks = row_blocks(flat_grads.size)
    squares = np.empty(len(blocks))

    def piece(i, block):
        squares[i] = np.dot(flat_grads[block], flat_grads[block])
    parallel(piece, [(i, block) for i, (block,) in enumerate(blocks)])
    return math.sqrt(squares.sum())


def adamw(params, m, v, grads, table, step, lr, beta1, beta2, eps, weight_decay, clip):
    """AdamW on flat arrays in place. Loshchilov & Hutter 2019, algorithm 2; with g = clip * grads:

        m = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
        p = p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
        mhat = m / (1 - beta1^step),      vhat = v / (1 - beta2^step)

    m and v start at 0, for which mhat and vhat make up. Only matrices decay. With root =
    sqrt(1 - beta2^step), mhat / (sqrt(vhat) + eps) = root mhat / (sqrt(v) + root eps).
    """
    root = math.sqrt(1 - beta2**step)
    rate = lr * root / (1 - beta1**step)
    matrices = [span for name, span in spans(table).items() if len(table[name]) == 2]

    def piece(block):
        g, m_, v_ = grads[block], m[block], v[block]
        for span in matrices:
            start, stop = max(span.start, block.start), min(span.stop, block.stop)
            if start < stop:
                params[start:stop] *= 1 - lr * weight_decay
        m_ *= beta1
        m_ += (1 - beta1) * clip * g
        v_ *= beta2
        v_ += (1 - beta2) * clip**2 * g * g
        params[block] -= rate * m_ / (np.sqrt(v_) + eps * root)
    parallel(piece, row_blocks(params.size))


# ------------------------------------------------------------------------------------------------
# The sample.

def sample(logits, temperature, top_k, top_p, rng):
    """Draws a next token for each row: logits (B,V) -> ids (B,).

    From softmax(logits / temperature), of which top_k leaves the k likeliest tokens and top_p the
    fewest likeliest that together reach probability top_p (Holtzman et al. 2020, section 3.1).
    Temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return logits.argmax(axis=1)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]  # likeliest first
    ranked = np.take_along_axis(logits, order, axis=1).astype(np.float64)
    p = np.exp((ranked - ranked[:, :1]) / temperature)
    if top_p is not None:
        p[p.cumsum(axis=1) - p >= top_p * p.sum(axis=1, keepdims=True)] = 0
    reached = p.cumsum(axis=1)  # the tokens' stretches of 0..sum(p); a random point falls into one
    rank = (reached < rng.random((len(p), 1)) * reached[:, -1:]).sum(axis=1)
    return order[np.arange(len(p)), rank]


def print_sample(model, tokenizer, args, rng):
    """Prints a text of the model's as it comes."""
    prompt = args.prompt
    if prompt is None:  # texts as bytes have no <|endoftext|> between them
        prompt = "\n" if args.tokenizer == "byte" else "<|endoftext|>"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take two tokens

    def show(new):
        known = new[new < tokenizer.n_vocab]
        print(decoder.decode(tokenizer.decode_bytes(known.tolist())), end="", flush=True)
    print("-" * 80 + "\n" + prompt, end="")
    model.generate([tokenizer.encode(prompt)], args.max_new_tokens, args.temperature, args.top_k,
                   args.top_p, rng, show)
    print("\n" + "-" * 80, flush=True)


# ------------------------------------------------------------------------------------------------
# Training.

def learning_rate(step, steps, warmup, lr, min_lr):
    """For step 1..steps: up a line to lr at step `warmup`, then down half a cosine to min_lr."""
    if step <= warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train_step(model, tokens, rng, lr, args):
    """One step on grad_accum micro-batches: (loss before the step, norm of the gradient)."""
    loss, share = 0.0, 1 / args.grad_accum
    for micro in range(args.grad_accum):
        loss += share * model.forward(*tokens.batch(rng, args.batch_size, args.seq_len))
        model.backward(share, accumulate=micro > 0)
    return loss, model.update(lr, args.beta1, args.beta2, weight_decay=args.weight_decay,
                              grad_clip=args.grad_clip)


def evaluate(model, tokens, B, T):
    """The mean loss over all of tokens, in nats per token."""
    total, count, shown = 0.0, 0, time.monotonic()
    for ids, targets in tokens.once(B, T):
        total += model.forward(ids, targets) * ids.size
        count += ids.size
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            print(f"validating: {count:,} of {len(tokens):,} tokens", file=sys.stderr)
    return total / count


def duration(seconds):
    """Seconds as people write them: 8s, 1m43s, 2h05m."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
    return f"{minutes // 60}h{minutes % 60:02}m"


def describe(args, model, train, val):
    """Prints what is going to be trained."""
    def amount(count):
        return f"{count:,} ({count * model.flat_params.itemsize / 1e6:,.1f} MB)"
    config, params = model.config, model.flat_params.size
    acts = size(activation_table(config, args.batch_size, args.seq_len))
    print(f"""\
model        {args.model}: L={config.n_layer} H={config.n_head} C={config.n_embd} \
V={config.vocab_size} context {config.n_positions}
parameters   {amount(params)}, as many gradients, and AdamW's moments {amount(2 * params)}
activations  {amount(acts)} for B={args.batch_size} T={args.seq_len}, {args.grad_accum} x per step
train        {len(train):,} {args.tokenizer} tokens in {", ".join(train.paths)}
validate     {len(val):,} in {", ".join(val.paths)}
threads      {parallel.threads}""", flush=True)


def run(args):
    """Trains, validates and samples as the command line says."""
    parallel.threads = args.threads
    tokenizer = TOKENIZERS[args.tokenizer]()
    config = GPTConfig(args.vocab_size or tokenizer.n_vocab, args.n_positions, args.n_embd,
                       args.n_layer, args.n_head)
    if args.seq_len > config.n_positions:
        raise Refused(f"--seq_len {args.seq_len} is longer than the context, --n_positions "
                      f"{config.n_positions}; lower the one or raise the other")
    if (args.train_bin is None) != (args.val_bin is None):
        raise Refused("--train_bin and --val_bin belong together; give both, or neither")
    paths = (args.train_bin, args.val_bin)
    if paths == (None, None):
        paths = find_tokens(args.data, args.tokenizer)
    train, val = (Tokens(path, config.vocab_size) for path in paths)
    model = GPT2(config, seed=args.seed)
    describe(args, model, train, val)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(Path(args.out) / "log.csv", "w", newline="", encoding="utf-8") as file:
        log = csv.DictWriter(file, "step loss val_loss norm lr ms tokens_per_second".split())
        log.writeheader()
        train_loop(args, model, tokenizer, train, val, log)


def train_loop(args, model, tokenizer, train, val, log):
    """All steps; logs, validates and samples on the way and at the end."""
    batches, samples = (np.random.default_rng([args.seed, purpose]) for purpose in (1, 2))
    width, times = len(str(args.steps)), []
    for step in range(min(1, args.steps), args.steps + 1):
        row, last = {"step": step}, step == args.steps
        if step:
            start = time.perf_counter()
            lr = learning_rate(step, args.steps, args.warmup, args.lr, args.min_lr)
            loss, norm = train_step(model, train, batches, lr, args)
            times.append(time.perf_counter() - start)
            if not math.isfinite(loss + norm):
                raise Refused(f"step {step}: the loss is {loss}, the gradient's norm {norm}; lower "
                              f"--lr from {args.lr:g}, or lengthen --warmup from {args.warmup}")
        if step and (last or step == 1 or step % args.log_every == 0):
            each, times = sum(times) / len(times), []  # seconds per step since the last line
            speed = args.batch_size * args.seq_len * args.grad_accum / each
            row |= dict(loss=f"{loss:.6f}", norm=f"{norm:.6f}", lr=f"{lr:.6e}",
                        ms=f"{1e3 * each:.2f}", tokens_per_second=f"{speed:.0f}")
            print(f"step {step:{width}}/{args.steps} | loss {loss:.4f} | norm {norm:.2f} | "
                  f"lr {lr:.2e} | {1e3 * each:3.0f} ms | {speed:5.0f} tok/s | "
                  f"eta {duration(each * (args.steps - step))}", flush=True)
        if last or step % args.eval_every == 0:
            row["val_loss"] = f"{evaluate(model, val, args.batch_size, args.seq_len):.6f}"
            print(f"step {step:{width}} | val loss {float(row['val_loss']):.4f}", flush=True)
        if len(row) > 1:
            log.writerow(row)
        if last or step % args.sample_every == 0:
            print_sample(model, tokenizer, args, samples)


# ------------------------------------------------------------------------------------------------
# The command line. What depends on the model, its shape and how it likes to be trained, is here.

BABY = dict(n_layer=4, n_head=4, n_embd=128, n_positions=64, tokenizer="byte", batch_size=12,
            steps=2000, lr=1e-3, min_lr=1e-4, beta2=0.99, log_every=20)
GPT2_124M = dict(n_layer=12, n_head=12, n_embd=768, n_positions=1024, tokenizer="gpt2",
                 batch_size=4, steps=1000, lr=3e-4, min_lr=3e-5, beta2=0.95, log_every=1)
MODELS = {"baby": BABY, "gpt2": GPT2_124M,
          "gpt2-medium": GPT2_124M | dict(n_layer=24, n_head=16, n_embd=1024),
          "gpt2-large": GPT2_124M | dict(n_layer=36, n_head=20, n_embd=1280),
          "gpt2-xl": GPT2_124M | dict(n_layer=48, n_head=25, n_embd=1600)}


def at_least(low, kind=int, high=math.inf):
    """A reader of numbers from low to high, for argparse."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"{text} is not a {'whole ' * (kind is int)}number of at least {low}"
                + f" and at most {high}" * (high < math.inf))
        return value
    return read


def parse_arguments(argv=None):
    """The command line as a namespace; defaults are those of the --model it names."""
    count, whole, real = at_least(1), at_least(0), at_least(0, float)
    share = at_least(0, float, 1)
    flags = {
        "data": [
            ("data", str, "tinyshakespeare", "train on data/NAME_TOKENIZER_{train,val}.bin"),
            ("train_bin", str, None, "train on these token files instead (a path or a glob)"),
            ("val_bin", str, None, "and validate on these"),
            ("tokenizer", TOKENIZERS, None, "bytes, or GPT-2's 50,257 tokens"),
            ("out", str, "out", "folder for log.csv")],
        "model": [
            ("model", MODELS, "baby", "a shape and how to train it; the flags below override"),
            ("n_layer", count, None, "L, blocks"), ("n_head", count, None, "H, attention heads"),
            ("n_embd", count, None, "C, channels"), ("n_positions", count, None, "longest context"),
            ("vocab_size", count, None, "V, if not the tokenizer's")],
        "optimisation": [
            ("steps", whole, None, "0 only validates and samples"),
            ("batch_size", count, None, "B, sequences in a micro-batch"),
            ("seq_len", count, 64, "T, tokens in a sequence"),
            ("grad_accum", count, 1, "micro-batches in a step"),
            ("lr", real, None, "highest learning rate"),
            ("min_lr", real, None, "learning rate at the end"),
            ("warmup", whole, 100, "steps up to the highest"),
            ("beta1", share, 0.9, "AdamW's memory for the gradient"),
            ("beta2", share, None, "and for its square"),
            ("weight_decay", real, 0.1, "pull of matrices to 0, in units of lr"),
            ("grad_clip", real, 1.0, "longest gradient let through; 0: any"),
            ("seed", whole, 1337, "for weights, batches and samples"),
            ("threads", count, usable_cpus(), "for the arithmetic; results do not depend on it")],
        "evaluation": [
            ("log_every", count, None, "steps between lines"),
            ("eval_every", count, 250, "steps between validations, each of the whole file"),
            ("sample_every", count, 1000, "steps between samples")],
        "sampling": [
            ("prompt", str, None, "what to go on from, if not a new line or <|endoftext|>"),
            ("max_new_tokens", whole, 500, "length"),
            ("temperature", real, 1.0, "0 takes the likeliest token"),
            ("top_k", count, None, "draw from the k likeliest tokens"),
            ("top_p", share, None, "draw from the likeliest that reach this probability")]}
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train GPT-2 in NumPy; without arguments a small one on Shakespeare, as bytes.",
        epilog="These are the defaults of the --model given; other models have others.")
    for title, group in flags.items():
        add = parser.add_argument_group(title).add_argument
        for name, kind, default, text in group:
            limits = {"choices": kind} if isinstance(kind, dict) else {"type": kind, "metavar": "X"}
            add(f"--{name}", default=default, help=text, **limits)
    parser.error = lambda message: refuse(f"{message} (see --help)")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", nargs="?")
    parser.set_defaults(**MODELS.get(first.parse_known_args(argv)[0].model, BABY))
    return parser.parse_args(argv)


def refuse(message):
    """Ends the program over what a person can mend: one line, exit status 2."""
    print(f"train_gpt2.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    """The program."""
    for stream in (sys.stdout, sys.stderr):  # a sample may hold characters that a terminal does not
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        run(parse_arguments())
    except Refused as error:
        refuse(error)
    except OSError as error:
        refuse(f"{error.filename or 'files'}: {reason(error)}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
