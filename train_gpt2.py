"""GPT-2 training in one file of NumPy: every layer forward and backward by hand, nothing hidden.

    python train_gpt2.py                          # a small GPT-2 learns Shakespeare, byte by byte
    python train_gpt2.py --model gpt2 --steps 10  # the real 124M shape, on GPT-2's own tokens
    python train_gpt2.py --help

There is no autograd here and no tensor library: a network is a few flat arrays of numbers and, for
every layer, one function that goes forward and one that goes backward. It refuses to be general:
one architecture, one optimizer, no plug-ins, so that it can be read from the top in a sitting. It
goes the data's own way: the layers from the embedding to the loss, each with its way back; the
block, the network and the model they make; AdamW's step; the sample; many machines; training.
Impatient readers begin at block_forward, block_backward and the network below them. Files and the
command line are the business of prepro_tinyshakespeare.py; test_gpt2.py has the same network in
PyTorch, and holds every function of this file against it.

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
import atexit
import codecs
import itertools
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

for _blas in ("OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):  # see "Threads" for why;
    os.environ.setdefault(f"{_blas}_THREADS", "1")                       # heeded at NumPy's import

import numpy as np

import prepro_tinyshakespeare as files
from prepro_tinyshakespeare import TOKENIZERS, Refused, Tokens

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
        self.threads, self.at_work, self.helpers = threads, False, ThreadPoolExecutor(256)
        # glibc gives large arrays fresh pages and takes them back, at a page fault per 4 KB, unless
        # it has seen one as large be freed. After this one, temporaries are recycled.
        np.empty(31 << 20, np.uint8)

    def __call__(self, work, pieces):
        pieces = list(pieces)
        if self.at_work or len(pieces) < 2:
            for piece in pieces:
                work(*piece)
            return
        next_number = itertools.count().__next__  # deals each piece out once

        def work_on():
            while (number := next_number()) < len(pieces):
                work(*pieces[number])
        self.at_work = True
        helpers = min(self.threads, len(pieces)) - 1
        helpers = [self.helpers.submit(work_on) for _ in range(helpers)]
        try:
            work_on()
        finally:
            wait(helpers)
            self.at_work = False
        for helper in helpers:
            helper.result()  # raises what went wrong there

parallel = Pool(files.usable_cpus())

def split(n, pieces):
    """range(n) in at most so many slices: a power of two, so 2, 4 or 8 threads end together."""
    pieces = 1 << int(math.log2(max(1, min(n, pieces))))
    return [slice(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]

def row_blocks(rows, width=1):
    """The rows of an array in blocks of PIECE elements or more, as arguments for `parallel`."""
    return [(block,) for block in split(rows, rows * width / PIECE)]

def matmul(out, a, b, bias=None, add=False):
    """out = a @ b (+ bias), or out += a @ b; a (M,J), b (J,K), bias (K,) -> out (M,K).

    Wide products are cut by columns, tall ones by rows, as each piece reads the uncut operand
    whole: it is the smaller one. Large pieces run faster, so their size grows with the product too;
    when all threads are at work anyway, there is just one.
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
#     dinp_nc = sum_k dout_nk weight_ck, dweight_ck = sum_n inp_nc dout_nk, dbias_k = sum_n dout_nk
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
    """(B*T, C) or (B,T,C) arrays as (B,H,T,D) views."""
    return [x.reshape(B, -1, H, x.shape[-1] // H).swapaxes(1, 2) for x in arrays]

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
    """Writes dlogits (N,V), which may be logits itself; dloss is each loss's gradient, a number."""
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
    attention_forward(a["attn"], a["attn.lse"], a["q"], a["k"], a["v"])
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
    dbranch, attn = a["d.branch"], (a["attn"], a["attn.lse"], a["q"], a["k"], a["v"])
    gelu_forward(a["gelu"], a["fc"])
    linear_backward(a["d.fc"], *g["mlp.c_proj"], dx, a["gelu"], p["mlp.c_proj"][0])
    gelu_backward(a["d.fc"], a["d.fc"], a["fc"])
    layernorm_forward(a["norm"], *a["ln_2.stats"], a["mid"], *p["ln_2"])
    linear_backward(dbranch, *g["mlp.c_fc"], a["d.fc"], a["norm"], p["mlp.c_fc"][0])
    layernorm_backward(dbranch, *g["ln_2"], dbranch, a["mid"], *a["ln_2.stats"], p["ln_2"][0])
    dx += dbranch
    linear_backward(dbranch, *g["attn.c_proj"], dx, a["attn"], p["attn.c_proj"][0])
    attention_backward(a["d.q"], a["d.k"], a["d.v"], dbranch, *attn)
    layernorm_forward(a["norm"], *a["ln_1.stats"], x, *p["ln_1"])
    linear_backward(dbranch, *g["attn.c_attn"], a["d.qkv"], a["norm"], p["attn.c_attn"][0])
    layernorm_backward(dbranch, *g["ln_1"], dbranch, x, *a["ln_1.stats"], p["ln_1"][0])
    dx += dbranch

# The network: the embedding, the blocks, a last layernorm, and the head, which scores every token
# of the vocabulary: it is the embedding turned round. `blocks` has (g, a, x, p) for each.

def network_forward(a, blocks, p, ids, targets=None, past=0):
    """ids (B,T) -> a["logits"] (N,V), and with targets (N,) a["losses"] (N,).

    The first of the ids stands at position `past`.
    """
    embedding_forward(a["embedded"], ids, p["wte.weight"], p["wpe.weight"][past:])
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
    """{name: view} of a flat array. Write d[name][...] = x, as d[name] = x loses the view."""
    return {name: flat[span].reshape(table[name]) for name, span in spans(table).items()}

def under(prefix, views):
    """The views whose names begin with prefix, under the rest of their names."""
    return {name[len(prefix):]: view for name, view in views.items() if name.startswith(prefix)}

def pairs(views):
    """{"ln_1.weight": w, "ln_1.bias": b, ...} -> {"ln_1": (w, b), ...}."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in views)
    return {name: (views[f"{name}.weight"], views[f"{name}.bias"]) for name in names}

def thirds(qkv, names="qkv"):
    """Queries, keys and values as views of the array (..,3C) in which they lie side by side."""
    return dict(zip(names, np.split(qkv, 3, axis=-1)))

class GPT2:
    """GPT-2 (Radford et al. 2019), its gradients, and the state of its optimizer.

    params and grads are {name: view} into flat_params and flat_grads, laid out by parameter_table.
    flat_m and flat_v are AdamW's moments, for the `stretch` (a slice) of the parameters that
    update() is to update: all of them by default. seed None leaves the parameters to be filled.
    """

    def __init__(self, config, dtype=np.float32, seed=1337, stretch=slice(None)):
        self.config, self.table, self.steps = config, parameter_table(config), 0
        self.stretch = slice(*stretch.indices(size(self.table)))
        self.flat_params = np.empty(size(self.table), dtype)
        self.flat_grads = np.zeros(self.flat_params.size, dtype)  # takes no memory before its use
        self.flat_m, self.flat_v = (np.zeros(self.flat_params[stretch].size, dtype) for _ in "mv")
        self.params = carve(self.flat_params, self.table)
        self.grads = carve(self.flat_grads, self.table)
        self.flat_acts, self.more_grads = np.empty(0, dtype), []
        self.shape = self.targets = None
        if seed is not None:
            self._initialize(np.random.default_rng(seed))

    @classmethod
    def from_pretrained(cls, folder, dtype=np.float32, stretch=slice(None)):
        """A model from a folder in Hugging Face's layout: config.json and model.safetensors."""
        model = cls(GPTConfig(**files.read_config(folder)), dtype, None, stretch)
        files.read_weights(Path(folder) / "model.safetensors", model.params)
        return model

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors as transformers.GPT2LMHeadModel reads them."""
        files.write_model(folder, vars(self.config), self.params)

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

    def make_room(self, B, T):
        """Activations for (B,T), carved from one array that is kept from call to call.

        Sequences meet only in the gradients. So where parameters are few beside activations, the
        batch is cut into parts that pass through the whole network each on its thread, with
        gradients of their own, added up in the end: layers need not wait for each other's pieces.
        """
        if self.shape == (B, T):
            return
        self.shape, N, config = (B, T), B * T, self.config
        ratio = size(activation_table(config, B, T)) / self.flat_params.size
        cut = split(B, min(8, N / 256, 1 + ratio / 4))
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
            shared |= thirds(shared["d.qkv"], ["d.q", "d.k", "d.v"])
            for h in range(config.n_layer):
                g_h, a_h, p_h = (under(f"h.{h}.", views) for views in (g, a, self.params))
                blocks.append((pairs(g_h), a_h | shared | thirds(a_h["qkv"]), x, pairs(p_h)))
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
        self.make_room(*self.ids.shape)

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
        """One step of AdamW; returns the gradient's norm, before clipping to grad_clip (0: none).

        If the norm is not finite, nothing changes.
        """
        norm = global_norm(self.flat_grads)
        if math.isfinite(norm):
            self.steps += 1
            clip = min(1, grad_clip / (norm + 1e-6)) if grad_clip else 1
            adamw(self.flat_params[self.stretch], self.flat_m, self.flat_v,
                  self.flat_grads[self.stretch], self.table, self.stretch.start, self.steps, lr,
                  beta1, beta2, eps, weight_decay, clip)
        return norm

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, rng=None,
                 on_token=None):
        """ids (B,T) -> (B, T + max_new_tokens), continued token by token; see sample().

        Past n_positions the window slides on by a quarter of it at a time. on_token, if given, is
        called with every new (B,).
        """
        ids, rng, context = np.asarray(ids), rng or np.random.default_rng(), self.config.n_positions
        first, cache = max(0, ids.shape[1] - context), None
        for _ in range(max_new_tokens):
            if ids.shape[1] - first > context:
                first, cache = ids.shape[1] - max(1, context * 3 // 4), None
            logits, cache = self.continue_with(ids[:, first:], cache)
            new = sample(logits, temperature, top_k, top_p, rng)
            ids = np.concatenate([ids, new[:, None]], axis=1)
            if on_token:
                on_token(new)
        return ids

    def continue_with(self, ids, cache=None):
        """ids (B,T) -> logits (B,V) for what comes next, and a cache to go on from.

        Keys and values of a position never change, as nothing looks ahead. So they are kept in the
        cache (L,B,n_positions,3C), and with it only the last of the ids goes through the network.
        """
        (B, T), C, context = ids.shape, self.config.n_embd, self.config.n_positions
        if cache is None:
            logits = self.forward(ids)[:, -1]
            cache = np.empty((self.config.n_layer, B, context, 3 * C), logits.dtype)
            for part, *_, blocks in self.parts:
                for kept, (_, a, *_) in zip(cache, blocks):
                    kept[part, :T] = a["qkv"].reshape(-1, T, 3 * C)
            return logits, cache
        new = self._checked(ids[:, -1:])
        self.make_room(B, 1)
        for part, _, _, a, blocks in self.parts:
            blocks = [(g, acts | thirds(kept[part, :T])
                       | {"qkv": kept[part, T - 1], "q": kept[part, T - 1, :C]}, x, p)
                      for kept, (g, acts, x, p) in zip(cache, blocks)]
            network_forward(a, blocks, self.params, new[part], past=T - 1)
        return self.logits_and_losses[0], cache

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

def adamw(params, m, v, grads, table, first, step, lr, beta1, beta2, eps, weight_decay, clip):
    """AdamW on flat arrays in place. Loshchilov & Hutter 2019, algorithm 2; with g = clip * grads:

        m = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
        p = p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
        mhat = m / (1 - beta1^step),      vhat = v / (1 - beta2^step)

    m and v start at 0, for which mhat and vhat make up. Only matrices decay. With root =
    sqrt(1 - beta2^step), mhat / (sqrt(vhat) + eps) = root mhat / (sqrt(v) + root eps). The arrays
    are a stretch of those that the table describes, from their element `first` on.
    """
    root = math.sqrt(1 - beta2**step)
    rate = lr * root / (1 - beta1**step)
    matrices = [span for name, span in spans(table).items() if len(table[name]) == 2]

    def piece(block):
        g, m_, v_ = grads[block], m[block], v[block]
        for span in matrices:
            start, stop = max(span.start - first, block.start), min(span.stop - first, block.stop)
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
    p = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    if top_k is not None and top_k < p.shape[1]:
        p[p < np.partition(p, -top_k)[:, [-top_k]]] = 0
    if top_p is not None:
        ranked = np.sort(p)[:, ::-1]
        needed = ranked.cumsum(axis=1) - ranked < top_p * ranked.sum(axis=1, keepdims=True)
        needed[:, 0] = True
        p[p < np.where(needed, ranked, np.inf).min(axis=1, keepdims=True)] = 0
    reached = p.cumsum(axis=1)  # the tokens' stretches of 0..sum(p); a random point falls into one
    return (reached > rng.random((len(p), 1)) * reached[:, -1:]).argmax(axis=1)

def print_sample(model, tokenizer, args, rng):
    """Prints a text of the model's as it comes."""
    prompt = args.prompt
    if prompt is None:  # texts as bytes have no <|endoftext|> between them
        prompt = "\n" if args.tokenizer == "byte" else "<|endoftext|>"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take two tokens

    def show(new):
        known = new[new < tokenizer.n_vocab]
        print(decoder.decode(tokenizer.decode_bytes(known.tolist())), end="", flush=True)
    print(prompt, end="", flush=True)
    model.generate([tokenizer.encode(prompt)], args.max_new_tokens, args.temperature, args.top_k,
                   args.top_p, rng, show)
    print(decoder.decode(b"", final=True), flush=True)

# ------------------------------------------------------------------------------------------------
# Many machines. torchrun starts one process, a rank, on each. Every rank holds the whole model and
# takes its share of each batch. As the gradients are one flat array, to add up those of all ranks
# is one call, and torch is no more than the transport: its tensors are views of NumPy's memory.
# AdamW is sharded (ZeRO stage 1; Rajbhandari et al. 2020, section 5.1): a rank has the moments of
# its own stretch of the parameters only, updates those, and gets the others from their ranks.

class Ranks:
    """The processes of a run, rank 0..size-1. Without torchrun there is one: nothing to do."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.seconds = 0.0  # spent on the network
        if self.size > 1:
            from torch import distributed, from_numpy
            self.network, self.tensor = distributed, from_numpy
            self._call(self.network.init_process_group, "gloo")
            atexit.register(self.network.destroy_process_group)

    def _call(self, function, *args):
        start = time.perf_counter()
        try:
            function(*args)
        except RuntimeError as error:
            raise Refused(f"rank {self.rank}: another process of this run cannot be reached "
                          f"({files.reason(error):.200}); start all again, with --resume") from None
        self.seconds += time.perf_counter() - start

    def own(self, n, rank=None):
        """The share of range(n) that this rank has, or another."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def add_up(self, flat):
        """Every rank's array becomes the sum of them all, on each to the bit the same."""
        if self.size > 1:
            self._call(self.network.all_reduce, self.tensor(flat))

    def exchange(self, flat):
        """Every rank's own share of an array goes to all the others."""
        for rank in range(self.size) if self.size > 1 else ():
            self._call(self.network.broadcast, self.tensor(flat[self.own(len(flat), rank)]), rank)

# ------------------------------------------------------------------------------------------------
# Training.

def learning_rate(step, steps, warmup, lr, min_lr):
    """For step 1..steps: up a line to lr at step `warmup`, then down half a cosine to min_lr."""
    if step <= warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

def train_step(model, tokens, rng, lr, args, ranks, stop=0):
    """One step on grad_accum micro-batches: (loss before it, gradient's norm, sum of `stop`)."""
    numbers, share = np.array([0.0, stop]), 1 / (args.grad_accum * ranks.size)
    for micro in range(args.grad_accum):
        batch = tokens.batch(rng, args.batch_size * ranks.size, args.seq_len)
        ids, targets = (x[ranks.own(len(x))] for x in batch)
        numbers[0] += share * model.forward(ids, targets)
        model.backward(share, accumulate=micro > 0)
    ranks.add_up(numbers)
    ranks.add_up(model.flat_grads)
    norm = model.update(lr, args.beta1, args.beta2, weight_decay=args.weight_decay,
                        grad_clip=args.grad_clip)
    ranks.exchange(model.flat_params)
    return float(numbers[0]), norm, numbers[1]

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

def describe(args, model, train, val, ranks):
    """Prints what is going to be trained."""
    def amount(*arrays):
        return f"{sum(x.size for x in arrays):,} ({sum(x.nbytes for x in arrays) / 1e6:,.1f} MB)"
    model.make_room(args.batch_size, args.seq_len)
    config, origin = model.config, args.folder or f"{args.model} from scratch"
    print(f"""\
model        {origin}: L={config.n_layer} H={config.n_head} C={config.n_embd} \
V={config.vocab_size} context {config.n_positions}
parameters   {amount(model.flat_params)}
gradients    {amount(model.flat_grads, *model.more_grads)}
moments      {amount(model.flat_m, model.flat_v)} of AdamW
activations  {amount(model.flat_acts)} for B={args.batch_size} T={args.seq_len}, \
{args.grad_accum} x per step
train        {len(train):,} {args.tokenizer} tokens in {", ".join(train.paths)}
validate     {len(val):,} in {", ".join(val.paths)}
threads      {parallel.threads}{f" in each of {ranks.size} processes" * (ranks.size > 1)}""",
          flush=True)

def begin(args, ranks, tokens):
    """(model, state) to begin with: new, with the weights of a folder, or where a run was saved."""
    config = GPTConfig(*(getattr(args, name) for name in GPTConfig.__annotations__))
    state = {"step": 0, "tokens": tokens, "batch": args.batch_size * ranks.size,
             "rng": [np.random.default_rng([args.seed, i]).bit_generator.state for i in (1, 2)]}
    stretch = ranks.own(size(parameter_table(config)))
    if args.folder is None:
        return GPT2(config, seed=args.seed, stretch=stretch), state
    model = GPT2.from_pretrained(args.folder, stretch=stretch)
    if args.resume:
        state = files.read_state(args.folder, args.steps, state)
        model.steps = state["updates"]
        files.read_moments(args.folder, model.flat_m, model.flat_v, stretch.start)
    return model, state

def save(args, model, ranks, state):
    """Writes a checkpoint; returns its folder."""
    moments = {"m": model.flat_m, "v": model.flat_v}
    if ranks.size > 1:  # all ranks' stretches are put together for the file
        for name, own in moments.items():
            moments[name] = np.empty_like(model.flat_params)
            moments[name][model.stretch] = own
            ranks.exchange(moments[name])
    if ranks.rank == 0:
        state |= {"updates": model.steps, "args": vars(args)}
        return files.save_checkpoint(args.out, vars(model.config), model.params, moments, state)

def train_loop(args, model, tokenizer, train, val, ranks, state):
    """All steps; logs, validates, samples and saves on the way and at the end."""
    batches, samples = np.random.default_rng(), np.random.default_rng()
    batches.bit_generator.state, samples.bit_generator.state = state["rng"]
    tokens = state["batch"] * args.seq_len * args.grad_accum
    flops = 6 * tokens * (model.flat_params.size + args.n_layer * args.n_embd * args.seq_len)
    log = files.Log(args.out, state["step"], args.steps, tokens, flops) if ranks.rank == 0 else None
    caught, stop = files.note_signals(), 0
    for step in range(state["step"] + min(1, args.steps), args.steps + 1):
        last = step == args.steps
        if step:
            start, ranks.seconds = time.perf_counter(), 0.0
            lr = learning_rate(step, args.steps, args.warmup, args.lr, args.min_lr)
            loss, norm, stop = train_step(model, train, batches, lr, args, ranks, sum(caught))
            if not math.isfinite(loss + norm):
                raise Refused(f"step {step}: the loss is {loss}, the gradient's norm {norm}; "
                              f"lower --lr from {args.lr:g}, or lengthen --warmup from "
                              f"{args.warmup}; what {args.out} has of before stays")
        if ranks.rank == 0:
            if step:
                log.step(step, loss, norm, lr, time.perf_counter() - start, ranks.seconds,
                         last or step == 1 or step % args.log_every == 0)
            if last or step % args.eval_every == 0:
                log.validation(step, evaluate(model, val, args.batch_size, args.seq_len))
            log.write()
            if last or step % args.sample_every == 0:
                print("-" * 80)
                print_sample(model, tokenizer, args, samples)
                print("-" * 80, flush=True)
        if step and (last or stop or step % args.save_every == 0):
            rng = [batches.bit_generator.state, samples.bit_generator.state]
            saved = save(args, model, ranks, state | {"step": step, "rng": rng})
        if stop:
            print(f"stopped after step {step}, which is saved in {saved}; --resume goes on")
            sys.exit(128 + (caught or [signal.SIGTERM])[0])

# ------------------------------------------------------------------------------------------------
# The command line. What depends on the model, its shape and how it likes to be trained, is here.

BABY = dict(n_layer=4, n_head=4, n_embd=128, n_positions=64, tokenizer="byte", batch_size=12,
            steps=3500, lr=3e-3, min_lr=1e-4, beta2=0.99, log_every=50)
GPT2_124M = dict(n_layer=12, n_head=12, n_embd=768, n_positions=1024, tokenizer="gpt2",
                 batch_size=4, steps=1000, lr=3e-4, min_lr=3e-5, beta2=0.95, log_every=1)
MODELS = {"baby": BABY, "gpt2": GPT2_124M,
          "gpt2-medium": GPT2_124M | dict(n_layer=24, n_head=16, n_embd=1024),
          "gpt2-large": GPT2_124M | dict(n_layer=36, n_head=20, n_embd=1280),
          "gpt2-xl": GPT2_124M | dict(n_layer=48, n_head=25, n_embd=1600)}
FINE_TUNING = GPT2_124M | dict(lr=1e-4, min_lr=1e-5)  # for what --init_from gives

def main():
    """The program."""
    ranks = Ranks()
    if ranks.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        ranks.add_up(np.zeros(1))  # waits for rank 0, which may have files to fetch
    args = files.parse_arguments(MODELS, FINE_TUNING)
    parallel.threads = args.threads or files.usable_cpus()
    tokenizer = TOKENIZERS[args.tokenizer]()
    args.vocab_size = args.vocab_size or tokenizer.n_vocab
    paths = args.only_sample or files.find_tokens(args.data, args.tokenizer, args.train_bin,
                                                  args.val_bin)
    if ranks.rank == 0:
        ranks.add_up(np.zeros(1))
    if args.only_sample:
        model = GPT2.from_pretrained(args.folder)
        for number in range(args.num_samples or 1):
            print_sample(model, tokenizer, args, np.random.default_rng([args.seed, 2, number]))
        return
    train, val = (Tokens(path, args.vocab_size) for path in paths)
    model, state = begin(args, ranks, [len(train), len(val)])
    ranks.add_up(np.zeros(1))  # all have read what rank 0 may now put aside
    describe(args, model, train, val, ranks)
    if ranks.rank == 0 and args.steps and not args.resume:
        files.put_aside(args.out)
    train_loop(args, model, tokenizer, train, val, ranks, state)

if __name__ == "__main__":
    files.program("train_gpt2.py", main)
