# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24", "tiktoken"]
# ///
"""Train GPT-2 in one file of NumPy: every forward and backward pass is written by hand.

    python train_gpt2.py                          # train a small GPT-2 on Shakespeare, byte by byte
    python train_gpt2.py --model gpt2 --steps 10  # train the 124M model on GPT-2's own tokens
    python train_gpt2.py --help

The task. A language model predicts the next token. A token is a byte or a longer piece of text; the
program works with its number, the id. The network reads T tokens and gives, at every position, one
score to each of the V tokens that may come next. These scores are called logits; the softmax
function, exp(z_i) / sum_j exp(z_j) for logits z, turns them into probabilities. The correct
answers, the targets, are the ids shifted by one position:

    text      R   O   M   E   O   :
    ids      82  79  77  69  79
    targets  79  77  69  79  58

The target of position 0 is the input at position 1. A network that could see it would learn to copy
it. Its predictions would be almost perfect, but after the last token of a text there is nothing to
copy. Therefore the scores at a position depend only on the tokens up to that position.

The loss at a position is -log(probability of the target): how surprised the model is, in nats, the
unit of the natural logarithm. Giving each of V tokens the probability 1/V costs log V nats, 5.55
for the 257 tokens of the default run (256 bytes and an end-of-text token). Predicting from how
often each byte occurs costs 3.35. Predicting from how often it follows the byte before it costs
2.49. The default run ends near 1.6.

The numbers in the network that are learned are its parameters. Training takes a batch of tokens,
computes the gradient of their mean loss, which tells how the loss changes with each parameter, and
moves every parameter a small step downhill. It repeats this thousands of times with other batches.

Letters, for the shapes of arrays (heads, blocks and layers are explained where they occur):

    B  sequences in a batch        C  channels: the numbers in the vector of a position
    T  tokens in a sequence        H  attention heads, each of D = C/H channels
    V  tokens in the vocabulary    L  blocks
    N  = B*T positions; row b*T + t is position t of sequence b
    K  outputs of a linear layer
    S  positions that attention can read: T; when text is generated, also earlier, kept ones

The network, with the shapes of what it computes:

    ids (B,T)
        | embedding: one vector for the token plus one for its position
    x (N,C), the residual stream: one vector for each position
        |---- layernorm, linear, attention, linear ---+   a branch reads x and adds a correction
        + <-------------------------------------------+   (a residual); it does not replace x
        |---- layernorm, linear, GELU, linear --------+   these two branches are a block,
        + <-------------------------------------------+   and there are L blocks
        | layernorm, linear
    logits (N,V)
        | cross-entropy, the loss, with the targets
    losses (N,)

The rules:
  - Gradients. dx is the gradient of the mean loss with respect to x, an array with the shape of x:
    dx_j = ∂loss/∂x_j. A d before a name means this; partial derivatives are written with ∂.
  - The chain rule. If a layer computes y from x, a change of x_j changes the loss through every y_i
    that depends on x_j, so
        dx_j = sum_i dy_i ∂y_i/∂x_j.
    A forward function computes y from x, and its backward function dx from dy in this way.
  - Layers write into arrays given to them: outputs first, then inputs, then parameters. Large
    arrays are therefore allocated once, and their type decides between float32 and float64.
  - An activation is an array that the network computes. Backward functions overwrite the gradients
    of activations but add to those of parameters, because a parameter is used more than once: at
    all positions, in every batch of a step (there can be several); one even in two layers.

Functions appear in the order in which data flows through them, up to the training loop and
sampling. The rest supports the loop. Start at Layers; of the lines above it, read only by_rows's
docstring and require. test_gpt2.py compares every layer, the network and AdamW with PyTorch.

Sources: Ba et al. 2016, Layer Normalization. Bishop 2006, Pattern Recognition and Machine Learning.
Dao et al. 2022, FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness.
Hendrycks & Gimpel 2016, Gaussian Error Linear Units. Holtzman et al. 2020, The Curious Case of
Neural Text Degeneration. Loshchilov & Hutter 2017, SGDR; 2019, Decoupled Weight Decay
Regularization. Radford et al. 2018, Improving Language Understanding by Generative Pre-Training;
2019, Language Models are Unsupervised Multitask Learners. Vaswani et al. 2017, Attention Is All You
Need.
"""
import argparse
import atexit
import codecs
import contextlib
import datetime
import functools
import glob
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# NumPy's matrix products come from a library called BLAS. It must use one thread, as this file has
# threads of its own (see Threads). It reads these variables when it is loaded; afterwards they are
# restored, so that other libraries keep their settings.
_names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
          "VECLIB_MAXIMUM_THREADS"]
_before = dict(os.environ)
if "numpy" in sys.modules and "1" not in map(_before.get, _names):
    print("train_gpt2: numpy was imported first, so the threads of its BLAS compete with ours and "
          "steps take up to twice as long; import train_gpt2 before numpy", file=sys.stderr)
os.environ.update(dict.fromkeys(_names, "1"))
try:
    import numpy as np
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print("train_gpt2.py: error: NumPy is missing; pip install numpy", file=sys.stderr)
    sys.exit(2)
np.ones((8, 8)) @ np.ones((8, 8))  # some BLAS libraries are loaded by the first product
os.environ.clear()
os.environ.update(_before)


class UserError(ValueError):
    """An error that the user can fix; the message says what is wrong, the value, what to do."""


def require(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def by_rows(names, sums="", heads=False):
    """Decorate a function whose rows are independent, so that threads can divide the rows.

    Read a decorated function as if it received whole arrays: the result is the same. (How: see
    Threads.) `names` lists the arguments that are cut into parts: of rows, or of sequences and
    heads if `heads` is true. `sums` lists arrays to which every part adds, such as dweight. All
    others are passed whole.
    """
    def decorate(function):
        order = inspect.getfullargspec(function).args

        @functools.wraps(function)
        def in_blocks(*args, **kwargs):
            args = dict(zip(order, args), **kwargs)
            run_in_blocks(function, args, names.split(), sums.split(), heads)
        return in_blocks
    return decorate


# ------------------------------------------------------------------------------------------------
# Layers, each forward function above its backward function.
#
# The embedding turns every token into a vector. wte (word token embedding) has one for each token,
# wpe (word position embedding) one for each position; both are parameters, learned like all others.
# Attention, the only layer that reads other positions, compares their contents, not their places,
# so the position has to be in the vector. Adding it keeps the number of channels; training finds
# room for both in C numbers.
def embedding_forward(out, ids, wte, wpe):
    """The vector of each token plus the vector of its position: out_bt = wte[ids_bt] + wpe_t.

    ids (B,T), wte (V,C), wpe (T or more,C) -> out (N,C). Ids must be below V: they are not checked.
    Radford et al. 2018, equation 2.
    """
    B, T = ids.shape
    # out[...] = wte[ids.ravel()], without a copy (np.take makes one unless mode="clip" is given)
    np.take(wte, ids.ravel(), axis=0, out=out, mode="clip")
    by_sequence = out.reshape(B, T, -1)
    by_sequence += wpe[:T]


# Row i of wte is added to out_bt wherever ids_bt = i, and row t of wpe in every sequence b. Hence
#
#     dwte_i = sum of dout_bt over all (b,t) with ids_bt = i,    dwpe_t = sum_b dout_bt
#
# `dwte[ids.ravel()] += dout` would be silently wrong: when an id occurs twice, NumPy adds
# only one of its gradients. np.add.at would be right; sorting and summing equal ids is faster.
def embedding_backward(dwte, dwpe, dout, ids):
    """Add to dwte (V,C) and dwpe (T or more,C), from dout (N,C) and ids (B,T).

    With the ids 5 7 5, row 5 gets two gradients, 1 and 100:

    >>> dwte = np.zeros((8, 1))
    >>> dwpe = np.zeros((3, 1))
    >>> embedding_backward(dwte, dwpe, np.array([[1.], [10.], [100.]]), np.array([[5, 7, 5]]))
    >>> dwte.ravel(), dwpe.ravel()
    (array([  0.,   0.,   0.,   0.,   0., 101.,   0.,  10.]), array([  1.,  10., 100.]))
    """
    B, T = ids.shape
    dwpe[:T] += dout.reshape(B, T, -1).sum(axis=0)
    order = np.argsort(ids, axis=None, kind="stable")  # the same order of sums on every machine
    sorted_ids = ids.ravel()[order]
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))  # where the id changes
    dwte[sorted_ids[starts]] += np.add.reduceat(dout[order], starts, axis=0)  # sums of equal ids


# Layer normalization. The numbers in the residual stream grow with every branch that adds to it;
# layernorm gives every branch inputs of the same size.
def normalize(x):
    """Shift each row of x (N,C) to mean 0, scale it to variance 1 -> xhat (N,C), rstd (N,1).

    xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + 1e-5); 1e-5 avoids a division by 0.
    """
    average = np.full((x.shape[1], 1), 1 / x.shape[1], x.dtype)  # x @ average: means of rows,
    shifted = x - x @ average                                    # faster than x.mean()
    rstd = 1 / np.sqrt(shifted**2 @ average + 1e-5)
    return shifted * rstd, rstd


@by_rows("out inp")
def layernorm_forward(out, inp, weight, bias):
    """Normalize each row, then scale and shift each channel: out = xhat * weight + bias.

    weight and bias are learned: where another size or mean is better, training can set it.
    inp (N,C), weight (C,), bias (C,) -> out (N,C). Ba et al. 2016, equation 4.
    """
    xhat, _ = normalize(inp)
    out[...] = xhat * weight + bias


# In one row of C numbers, xhat_i = (x_i - mean) rstd and out_i = xhat_i weight_i + bias_i. Hence
#
#     dweight_i = dout_i xhat_i,    dbias_i = dout_i,    dxhat_i = dout_i weight_i,
#
# and dweight and dbias are summed over the rows, because all rows use the same weight and bias. x_j
# affects xhat_i in three ways: directly if i = j, through mean, and through rstd. Write [i=j] for 1
# if i = j, else 0, and eps for 1e-5. As var = 1/C sum_i (x_i - mean)^2,
#
#     ∂mean/∂x_j         = 1/C
#     ∂(x_i - mean)/∂x_j = [i=j] - 1/C
#     ∂var/∂x_j          = 2/C sum_i (x_i - mean) ([i=j] - 1/C)
#                        = 2/C (x_j - mean)                    since sum_i (x_i - mean) = 0
#     ∂rstd/∂x_j         = -1/2 (var + eps)^(-3/2) ∂var/∂x_j
#                        = -1/2 rstd^3 2/C (x_j - mean)
#                        = -1/C rstd^2 xhat_j                  since xhat_j = (x_j - mean) rstd
#     ∂xhat_i/∂x_j       = rstd ∂(x_i - mean)/∂x_j + (x_i - mean) ∂rstd/∂x_j
#                        = rstd ([i=j] - 1/C) - 1/C rstd^2 (x_i - mean) xhat_j
#                        = rstd ([i=j] - 1/C - 1/C xhat_i xhat_j)
#
# The chain rule sums over every xhat_i that x_j affects, dx_j = sum_i dxhat_i ∂xhat_i/∂x_j. With
# avg(y) = 1/C sum_i y_i this is
#
#     dx_j = rstd (dxhat_j - avg(dxhat) - xhat_j avg(dxhat xhat))
#
# one term for each of the three ways. As a check: adding a number to the whole row changes nothing,
# so sum_j dx_j = 0; scaling all x_j - mean changes nothing (but for eps), so sum_j dx_j xhat_j = 0.
@by_rows("dinp dout inp", sums="dweight dbias")
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight):
    """Write dinp (N,C), which may be the array dout; add to dweight (C,) and dbias (C,).

    The row 1, 2, 3 has mean 2 and rstd 1 / sqrt(2/3) = 1.225, so xhat = (-1.225, 0, 1.225). With
    dout = dxhat = (1, 0, 0), avg(dxhat) = 1/3 and avg(dxhat xhat) = -0.408. So the first number of
    dx is 1.225 (1 - 1/3 - (-1.225)(-0.408)) = 0.204:

    >>> inp = np.array([[1., 2., 3.]])
    >>> dout = np.array([[1., 0., 0.]])
    >>> dinp = np.empty((1, 3))
    >>> dweight = np.zeros(3)
    >>> dbias = np.zeros(3)
    >>> layernorm_backward(dinp, dweight, dbias, dout, inp, np.ones(3))
    >>> dinp.round(3), dweight.round(3), dbias
    (array([[ 0.204, -0.408,  0.204]]), array([-1.225,  0.   ,  0.   ]), array([1., 0., 0.]))
    """
    N, C = inp.shape
    average = np.full((C, 1), 1 / C, inp.dtype)
    ones = np.ones(N, inp.dtype)
    xhat, rstd = normalize(inp)
    dweight += ones @ (dout * xhat)  # ones @: the sum over the rows, faster than sum(axis=0)
    dbias += ones @ dout
    dxhat = dout * weight
    dinp[...] = rstd * (dxhat - dxhat @ average - xhat * ((dxhat * xhat) @ average))


def linear_forward(out, inp, weight, bias=None):
    """A linear layer: every output is a weighted sum of the inputs. out = inp @ weight + bias.

    inp (N,C), weight (C,K), bias (K,) or None -> out (N,K).
    """
    matmul(out, inp, weight)  # read it as out[...] = inp @ weight
    if bias is not None:
        out += bias


# out_nk = sum_c inp_nc weight_ck + bias_k has the partial derivatives ∂out_nk/∂inp_nc = weight_ck,
# ∂out_nk/∂weight_ck = inp_nc and ∂out_nk/∂bias_k = 1. The chain rule sums over affected outputs:
#
#     dinp_nc = sum_k dout_nk weight_ck           as a matrix product, dinp = dout @ weight^T
#     dweight_ck = sum_n inp_nc dout_nk           dweight = inp^T @ dout
#     dbias_k = sum_n dout_nk
def linear_backward(dinp, dweight, dbias, dout, inp, weight):
    """Write dinp (N,C); add to dweight (C,K) and to dbias (K,), if that is not None.

    >>> inp = np.array([[1., 2.], [1., 0.]])
    >>> weight = np.array([[3., 4.], [5., 6.]])
    >>> out = np.empty((2, 2))
    >>> linear_forward(out, inp, weight, np.array([100., 0.]))
    >>> out
    array([[113.,  16.],
           [103.,   4.]])
    >>> dout = np.array([[1., 10.], [100., 0.]])
    >>> dinp = np.empty((2, 2))
    >>> dweight = np.zeros((2, 2))
    >>> dbias = np.zeros(2)
    >>> linear_backward(dinp, dweight, dbias, dout, inp, weight)
    >>> dinp.tolist(), dweight.tolist(), dbias.tolist()
    ([[43.0, 65.0], [300.0, 500.0]], [[101.0, 10.0], [2.0, 20.0]], [101.0, 10.0])
    """
    matmul(dinp, dout, weight.T)
    matmul(dweight, inp.T, dout, add=True)  # dweight += inp.T @ dout
    if dbias is not None:  # dbias += dout.sum(axis=0), as a product that threads divide
        matmul(dbias.reshape(1, -1), np.ones((1, len(dout)), dout.dtype), dout, add=True)


# Attention is the only layer in which positions exchange information. In each of H heads, a linear
# map of the normalized residual stream gives every position t a query q_t, a key k_t and a value
# v_t, of D numbers each. The query says what position t looks for, the key what a position offers,
# the value what it passes on. Position t gets a weighted mean of values:
#
#     1. score_ts = q_t · k_s / sqrt(D)                      how well the key s matches the query t
#     2. att_ts   = exp(score_ts) / sum_r exp(score_tr)      softmax: positive weights of sum 1
#     3. out_t    = sum_s att_ts v_s
#
# Every head has its own q, k and v, so a position can look for H things at once. The outputs of
# the heads, side by side, are C numbers again; the next linear layer mixes them.
#
# Why sqrt(D)? q · k is a sum of D products. If their factors are independent, with mean 0 and
# variance 1, the sum has variance D, and divided by sqrt(D) it has variance 1 for any D. If scores
# were large, att would be near 1 for one key and near 0 for all others from the beginning. Then
# ∂att_s/∂score_r = att_s ([s=r] - att_r), derived below, is almost 0: q and k hardly learn.
#
# The causal mask sets score_ts to minus infinity for s > t, so att_ts = 0 there: no position sees
# its target, and one pass through the network trains all T predictions. Without the mask, the model
# learns to copy: the loss falls to 0.05 in 500 steps. Here is the matrix att of a head of the
# default run that attends to the previous byte ("." is masked):
#
#     query \ key    R     O     M     E     O     :
#         R         1.00   .     .     .     .     .
#         O         0.98  0.02   .     .     .     .
#         M         0.01  0.97  0.02   .     .     .
#         E         0.00  0.03  0.96  0.01   .     .
#         O         0.01  0.00  0.06  0.90  0.03   .
#         :         0.11  0.00  0.00  0.01  0.85  0.03

@functools.cache
def causal_mask(n):
    """A matrix (n,n): minus infinity above the diagonal, 0 elsewhere."""
    return np.triu(np.full((n, n), -np.inf, np.float32), 1)


def score_chunks(q, k):
    """Step 1 with the mask, for n queries at a time: yields (queries, keys, scores).

    `queries` is a slice of the T queries, `keys` of the S keys; scores (B,H,n,number of keys). All
    queries at once would be simpler; with S = T that is

        scores = q @ k.swapaxes(2, 3) / sqrt(D) + causal_mask(T)      (B,H,T,T)

    If S > T (in sampling, where earlier keys are kept), query i is at position S - T + i. A
    chunk needs only the keys up to its last query. Smaller chunks skip more of the masked keys;
    larger chunks run faster.
    """
    T, S = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3])
    size = max(64, T // 8)  # measured to be fast
    for start in range(0, T, size):
        stop = min(start + size, T)
        queries = slice(start, stop)
        keys = slice(0, S - T + stop)
        scores = (q[:, :, queries] * scale) @ k[:, :, keys].swapaxes(2, 3)
        n = stop - start
        scores[..., -n:] += causal_mask(n)  # all queries of the chunk see the keys before these
        yield queries, keys, scores


@by_rows("out lse q k v", heads=True)
def attention_forward(out, lse, q, k, v):
    """Causal attention: out_t = sum_s softmax_s(q_t · k_s / sqrt(D)) v_s over the s up to t.

    q (B,H,T,D), k and v (B,H,S,D) -> out (B,H,T,D), lse (B,H,T,1). S = T in training; S >= T in
    sampling, where the keys and values of earlier positions are kept in an array, the KV cache. The
    backward pass recomputes att_ts = exp(score_ts - lse_t) from lse_t = log(sum_s exp(score_ts)),
    called log-sum-exp, so that a head keeps T numbers instead of a matrix (T,S). Vaswani et al.
    2017, equation 1, sections 3.2.1 and 3.2.2; Dao et al. 2022, section 3.1.

    One head with D = 1. The first query (9, but any would do) sees one key, so its att is 1. The
    second has scores 0 and log 2, so its att is (1/3, 2/3), and out = 1/3 * 3 + 2/3 * 6 = 5:

    >>> q = np.array([9., 1.]).reshape(1, 1, 2, 1)  # (B,H,T,D)
    >>> k = np.array([0., np.log(2)]).reshape(1, 1, 2, 1)
    >>> v = np.array([3., 6.]).reshape(1, 1, 2, 1)
    >>> out = np.empty((1, 1, 2, 1))
    >>> lse = np.empty((1, 1, 2, 1))
    >>> attention_forward(out, lse, q, k, v)
    >>> out.ravel().round(3)
    array([3., 5.])
    """
    for queries, keys, att in score_chunks(q, k):  # att holds the scores, then their exponentials
        # att = softmax(scores);  lse = log(sum(exp(scores)));  out = att @ v
        row_max = att.max(axis=-1, keepdims=True)
        att -= row_max  # softmax stays the same; the largest exponential is exp(0): no overflow
        np.exp(att, out=att)
        row_sum = att.sum(axis=-1, keepdims=True)
        lse[:, :, queries] = row_max + np.log(row_sum)
        out[:, :, queries] = att @ v[:, :, keys] / row_sum  # fewer divisions than att / row_sum


def attention_weights(q, k, lse):
    """The whole matrices att (B,H,T,S) of attention_forward, to look at (see the README)."""
    att = np.zeros((*q.shape[:3], k.shape[2]), q.dtype)
    for queries, keys, scores in score_chunks(q, k):
        att[:, :, queries, keys] = np.exp(scores - lse[:, :, queries])
    return att


# The three steps backward, in one head; a subscript d counts its D numbers:
#
#     3. out_td = sum_s att_ts v_sd is a matrix product, as in the linear layer:
#            datt_ts = sum_d dout_td v_sd,    dv_sd = sum_t att_ts dout_td
#     2. In row t, let e_s = exp(score_s) and Z = sum_i e_i, so att_s = e_s / Z. Since
#        ∂e_s/∂score_r = [s=r] e_s and ∂Z/∂score_r = e_r, the quotient rule gives
#            ∂att_s/∂score_r = ([s=r] e_s Z - e_s e_r) / Z^2 = att_s ([s=r] - att_r)
#            dscore_r = sum_s datt_s ∂att_s/∂score_r = att_r (datt_r - sum_s datt_s att_s)
#        The sum is the same for all r of a row; call it delta. Using out, it has D terms, not S:
#            delta = sum_s datt_s att_s = sum_s sum_d dout_d v_sd att_s = sum_d dout_d out_d
#     1. score_ts = sum_d q_td k_sd / sqrt(D) is a matrix product again:
#            dq_td = sum_s dscore_ts k_sd / sqrt(D),    dk_sd = sum_t dscore_ts q_td / sqrt(D)
#
# The causal mask is added again where the scores are recomputed. It needs no other line: a masked
# score has att = 0, and so dscore = 0.
@by_rows("dq dk dv dout out lse q k v", heads=True)
def attention_backward(dq, dk, dv, dout, out, lse, q, k, v):
    """Write dq (B,H,T,D), dk and dv (B,H,S,D); dout (B,H,T,D), the rest as in attention_forward.

    The example of attention_forward, with dout = 1 for the second query: datt = v = (3, 6).
    Subtracting delta = dout * out = 5 gives (-2, 1), and multiplying by att gives dscore =
    (-2/3, 2/3). As q = 1, dk is the same; dq = 2/3 log 2, because k = (0, log 2); and dv =
    att * dout = (1/3, 2/3):

    >>> q = np.array([9., 1.]).reshape(1, 1, 2, 1)
    >>> k = np.array([0., np.log(2)]).reshape(1, 1, 2, 1)
    >>> v = np.array([3., 6.]).reshape(1, 1, 2, 1)
    >>> out = np.array([3., 5.]).reshape(1, 1, 2, 1)
    >>> lse = np.log([1., 1. + 2.]).reshape(1, 1, 2, 1)
    >>> dout = np.array([0., 1.]).reshape(1, 1, 2, 1)
    >>> dq, dk, dv = np.empty((3, 1, 1, 2, 1))
    >>> attention_backward(dq, dk, dv, dout, out, lse, q, k, v)
    >>> dq.ravel().round(3), dk.ravel().round(3), dv.ravel().round(3)
    (array([0.   , 0.462]), array([-0.667,  0.667]), array([0.333, 0.667]))
    """
    scale = 1 / math.sqrt(q.shape[3])
    dk[...] = 0
    dv[...] = 0
    for queries, keys, att in score_chunks(q, k):
        q_, dout_, out_, lse_ = (x[:, :, queries] for x in (q, dout, out, lse))
        att -= lse_
        np.exp(att, out=att)
        dv[:, :, keys] += att.swapaxes(2, 3) @ dout_
        # dscore = att * (dout @ v.T - delta)
        dscore = dout_ @ v[:, :, keys].swapaxes(2, 3)
        dscore -= (dout_ * out_).sum(axis=-1, keepdims=True)
        dscore *= att
        dq[:, :, queries] = dscore @ k[:, :, keys] * scale
        dk[:, :, keys] += dscore.swapaxes(2, 3) @ (q_ * scale)


# GELU is the nonlinear function between the two linear layers of the second branch, which is called
# the MLP (multilayer perceptron). Attention moves information between positions; the MLP processes
# it at each position separately. Without a nonlinear function between them, the two linear
# layers would collapse into a single one.
#
# GELU is x times the probability that a standard normal random number is below x. GPT-2
# approximates it as x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), where 0.044715 gives
# the best fit. As tanh(u) = (1 - exp(-2u)) / (1 + exp(-2u)), this is x s(z) with the sigmoid
# function s(z) = 1 / (1 + exp(-z)) and z = 2u = x (GELU_1 + GELU_3 x^2), with these constants:

GELU_1 = 2 * math.sqrt(2 / math.pi)
GELU_3 = GELU_1 * 0.044715


def gelu_denominator(x):
    """1 + exp(-z), the denominator of s(z), for z = x (GELU_1 + GELU_3 x^2)."""
    with np.errstate(over="ignore"):  # if exp overflows, x / inf = 0 is the correct limit
        return 1 + np.exp(x * (-GELU_1 - GELU_3 * x**2))


@by_rows("out inp")
def gelu_forward(out, inp):
    """out = x s(z): large positive inputs hardly change, large negative ones become almost 0.

    inp (N,K) -> out (N,K). Hendrycks & Gimpel 2016, section 2, in the tanh form.
    """
    np.divide(inp, gelu_denominator(inp), out=out)


# The sigmoid has the derivative ∂s/∂z = exp(-z) / (1 + exp(-z))^2 = s (1 - s), because
# 1 - s = exp(-z) / (1 + exp(-z)). By the product rule
#
#     ∂out/∂x = s + x s (1 - s) ∂z/∂x = s (1 + (1 - s) x ∂z/∂x),    ∂z/∂x = GELU_1 + 3 GELU_3 x^2
@by_rows("dinp dout inp")
def gelu_backward(dinp, dout, inp):
    """Write dinp (N,K), which may be the array dout: dinp = dout * ∂out/∂x.

    At x = 0, ∂out/∂x = s = 1/2. At -x, z becomes -z and s becomes 1 - s; therefore
    out(x) - out(-x) = x, and the slopes at x and -x add up to 1:

    >>> inp = np.array([[-1., 0., 1.]])
    >>> out = np.empty((1, 3))
    >>> dinp = np.empty((1, 3))
    >>> gelu_forward(out, inp)
    >>> gelu_backward(dinp, np.ones((1, 3)), inp)
    >>> out.round(3), dinp.round(3)
    (array([[-0.159,  0.   ,  0.841]]), array([[-0.083,  0.5  ,  1.083]]))
    """
    s = 1 / gelu_denominator(inp)
    slope = s * (1 + (1 - s) * inp * (GELU_1 + 3 * GELU_3 * inp**2))
    np.multiply(dout, slope, out=dinp)


@by_rows("losses lse logits targets")
def crossentropy_forward(losses, lse, logits, targets):
    """Cross-entropy, the loss: -log(softmax(logits)_target) at every position, in nats.

    logits (N,V), targets (N,) -> losses (N,), and for the backward pass lse (N,1). With
    lse = log(sum_j exp(logits_j)), softmax_j = exp(logits_j - lse), so the loss is
    lse - logits_target. Bishop 2006, equation 4.108.
    """
    row_max = logits.max(axis=1, keepdims=True)
    shifted = logits - row_max  # the largest exponential is exp(0): none overflows
    target = shifted[np.arange(len(targets)), targets]
    log_sum = np.log(np.exp(shifted, out=shifted).sum(axis=1, keepdims=True))
    losses[...] = log_sum[:, 0] - target  # row_max cancels
    lse[...] = log_sum + row_max


# ∂lse/∂logits_j = exp(logits_j) / sum_i exp(logits_i) = probs_j and ∂logits_target/∂logits_j =
# [j=target], so the loss at a position has the derivative probs_j - [j=target]: the predicted
# probability, minus 1 for the target. Let dloss be the derivative of the mean loss with respect to
# the loss at this position. Then
#
#     dlogits_j = dloss (probs_j - [j=target])
@by_rows("dlogits lse logits targets")
def crossentropy_backward(dlogits, dloss, lse, logits, targets):
    """Write dlogits (N,V), which may be the array logits. dloss is a number: 1/N for a mean of N.

    Logits 0, log 2, 0 give probabilities 1/4, 1/2, 1/4; a target of probability 1/2 costs log 2:

    >>> logits = np.array([[0., np.log(2), 0.]])
    >>> target = np.array([1])
    >>> losses = np.empty(1)
    >>> lse = np.empty((1, 1))
    >>> dlogits = np.empty((1, 3))
    >>> crossentropy_forward(losses, lse, logits, target)
    >>> crossentropy_backward(dlogits, 1.0, lse, logits, target)
    >>> losses.round(3), dlogits.round(3)
    (array([0.693]), array([[ 0.25, -0.5 ,  0.25]]))
    """
    probs = np.subtract(logits, lse, out=dlogits)
    np.exp(probs, out=probs)
    probs[np.arange(len(targets)), targets] -= 1
    probs *= dloss


# ------------------------------------------------------------------------------------------------
# The block and the network. `a` has the activations of a block:
#     x, x_mid, out  (N,C)      the residual stream before, between and after the two branches
#     ln_1, ln_2     (N,C)      output of the first and second layernorm
#     qkv            (N,3C)     each row is q, then k, then v; each of them has D numbers of the
#                               first head, D of the second, ...; q, k, v (B,H,T,D) are its views
#     lse            (B,H,T,1)  log-sum-exp of attention
#     attended       (N,C)      output of attention, head after head; heads (B,H,T,D) is its view
#     hidden, gelu   (N,4C)     the MLP before and after GELU (4 is GPT-2's choice)
# and, for the backward pass, arrays shared by all blocks:
#     dx             (N,C)      gradient of the residual stream (see block_backward)
#     dbranch        (N,C)      gradient of ln_2, x_mid, attended, ln_1, x in turn; view: dheads
#     dhidden        (N,4C)     gradient of gelu, then of hidden
#     dqkv           (N,3C)     gradient of qkv; dq, dk, dv are its views
#
# `p` has the parameters of a block and `g` their gradients, both under GPT-2's names; each layer is
# a pair (weight, bias). attn.c_attn makes queries, keys and values; attn.c_proj mixes the heads;
# mlp.c_fc widens C to 4C; mlp.c_proj goes back to C.
def block_forward(a, p, cache=None):
    """One block, a.x -> a.out. Radford et al. 2019, section 2.3.

    With a KV cache (B,2,H,S,D), attention uses the keys and values of all S positions.
    """
    layernorm_forward(a.ln_1, a.x, *p.ln_1)                   # (N,C)
    linear_forward(a.qkv, a.ln_1, *p.attn.c_attn)             # (N,3C)
    k, v = a.k, a.v                                           # (B,H,T,D)
    if cache is not None:
        T = k.shape[2]
        cache[..., -T:, :] = np.stack([k, v], axis=1)  # the last T of S positions
        k, v = cache[:, 0], cache[:, 1]                       # (B,H,S,D)
    attention_forward(a.heads, a.lse, a.q, k, v)              # (B,H,T,D)
    linear_forward(a.x_mid, a.attended, *p.attn.c_proj)       # (N,C)
    a.x_mid += a.x
    layernorm_forward(a.ln_2, a.x_mid, *p.ln_2)               # (N,C)
    linear_forward(a.hidden, a.ln_2, *p.mlp.c_fc)             # (N,4C)
    gelu_forward(a.gelu, a.hidden)                            # (N,4C)
    linear_forward(a.out, a.gelu, *p.mlp.c_proj)              # (N,C)
    a.out += a.x_mid


# A branch f, with its layernorm inside, gives out = x + f(x). So ∂out_i/∂x_j = [i=j] + ∂f_i/∂x_j,
# and dx_j = dout_j + sum_i dout_i ∂f_i/∂x_j: the gradient of out, plus what comes back through the
# branch. The first term carries the gradient of the last block's out to every block unchanged; a
# layernorm after the addition would change it. Without this term, the gradient would be multiplied
# by 2L matrices ∂f/∂x, one after another, and could shrink or grow exponentially.
def block_backward(g, a, p):
    """Turn a.dx (N,C), the gradient of a.out, into that of a.x; add to the gradients g.

    Each line ends with the array whose gradient it computes (x_mid, x: only the branch's part).
    """
    linear_backward(a.dhidden, *g.mlp.c_proj, a.dx, a.gelu, p.mlp.c_proj.weight)     # gelu
    gelu_backward(a.dhidden, a.dhidden, a.hidden)                                    # hidden
    linear_backward(a.dbranch, *g.mlp.c_fc, a.dhidden, a.ln_2, p.mlp.c_fc.weight)    # ln_2
    layernorm_backward(a.dbranch, *g.ln_2, a.dbranch, a.x_mid, p.ln_2.weight)        # x_mid
    a.dx += a.dbranch
    linear_backward(a.dbranch, *g.attn.c_proj, a.dx, a.attended, p.attn.c_proj.weight)  # attended
    attention_backward(a.dq, a.dk, a.dv, a.dheads, a.heads, a.lse, a.q, a.k, a.v)    # q, k, v
    linear_backward(a.dbranch, *g.attn.c_attn, a.dqkv, a.ln_1, p.attn.c_attn.weight)    # ln_1
    layernorm_backward(a.dbranch, *g.ln_1, a.dbranch, a.x, p.ln_1.weight)            # x
    a.dx += a.dbranch


# The network: embedding, blocks, a last layernorm (ln_f), and a linear layer that gives the logits.
# That layer uses the embedding as its weights, logits = ln_f @ wte.T (the weights are tied, saving
# V*C parameters): a token gets a high logit if ln_f points in the direction of its own vector.
# `a` has the list a.h of the blocks' activations (a block's out is the next block's x, the same
# array), x of the first block and out of the last, ln_f (N,C), logits (N,V), lse (N,1) and losses
# (N,) of cross-entropy, and the shared dx.
def network_forward(a, p, ids, targets=None, cache=None):
    """ids (B,T) -> a.logits (N,V), and with targets (B,T) also a.losses (N,).

    With a KV cache (B,L,2,H,S,D), ids are the last T of S positions.
    """
    past = 0 if cache is None else cache.shape[-2] - ids.shape[1]  # positions before ids
    embedding_forward(a.x, ids, p.wte.weight, p.wpe.weight[past:])                   # (N,C)
    for i in range(len(a.h)):
        block_forward(a.h[i], p.h[i], None if cache is None else cache[:, i])        # (N,C)
    layernorm_forward(a.ln_f, a.out, *p.ln_f)                                        # (N,C)
    linear_forward(a.logits, a.ln_f, p.wte.weight.T)                                 # (N,V)
    if targets is not None:
        crossentropy_forward(a.losses, a.lse, a.logits, targets.ravel())             # (N,)


def network_backward(g, a, p, ids, targets, dloss):
    """Add to the gradients g; dloss as in crossentropy_backward. wte gets one from each use."""
    wte = p.wte.weight
    dwte = g.wte.weight  # and dwte.T is a view of it
    dlogits = a.logits  # the largest array is overwritten
    crossentropy_backward(dlogits, dloss, a.lse, a.logits, targets.ravel())          # (N,V)
    linear_backward(a.dx, dwte.T, None, dlogits, a.ln_f, wte.T)                      # (N,C)
    layernorm_backward(a.dx, *g.ln_f, a.dx, a.out, p.ln_f.weight)                    # (N,C)
    for i in reversed(range(len(a.h))):
        block_backward(g.h[i], a.h[i], p.h[i])                                       # (N,C)
    embedding_backward(dwte, g.wpe.weight, a.dx, ids)


# ------------------------------------------------------------------------------------------------
# The optimizer. Plain gradient descent moves every parameter against its gradient, p = p - lr g,
# where lr is the learning rate (in this section p is one parameter and g its gradient). AdamW keeps
# two running averages for every parameter, called moments: m of its gradient, which smooths the
# noise of single batches, and v of the gradient's square, which tells its usual size. Dividing m by
# sqrt(v) makes steps of at most about lr whatever the size of the gradients, so one lr serves all
# parameters; eps avoids a division by 0. In step t = 1, 2, ..., with beta1 and beta2 below 1:
#
#     m = beta1 m + (1 - beta1) g          mhat = m / (1 - beta1^t)
#     v = beta2 v + (1 - beta2) g^2        vhat = v / (1 - beta2^t)
#     p = p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
#
# m and v start at 0, so at first they are too small. With the same g in every step, m would be
# (1 - beta1) (1 + beta1 + ... + beta1^(t-1)) g = (1 - beta1^t) g. mhat divides by that factor, and
# vhat by 1 - beta2^t. Weight decay pulls a parameter toward 0. It stays large only if the data keep
# pushing it, so what is special to single texts leaves little trace. The code works on m and v
# directly: with root = sqrt(1 - beta2^t), sqrt(vhat) = sqrt(v) / root, and so
#
#     lr mhat / (sqrt(vhat) + eps) = rate m / (sqrt(v) + root eps),   rate = lr root / (1 - beta1^t)
@by_rows("params m v grads")
def adamw(params, m, v, grads, step, lr, beta1, beta2, eps, weight_decay, clip):
    """Update params, m and v (n,) with g = clip * grads, then set grads to 0.

    clip is at most 1 and limits large gradients (see GPT2.update). Loshchilov & Hutter 2019,
    algorithm 2, except that lr also multiplies the decay, as in PyTorch. In step 1 mhat = g and
    vhat = g^2, so every parameter moves by lr, however large its gradient is (here by 0.01, and by
    0.01 * 0.1 for the decay):

    >>> params = np.ones(2)
    >>> m = np.zeros(2)
    >>> v = np.zeros(2)
    >>> adamw(params, m, v, np.array([5., -0.1]), 1, 0.01, 0.9, 0.95, 1e-8, 0.1, 1)
    >>> params.round(6), m.round(6)
    (array([0.989, 1.009]), array([ 0.5 , -0.01]))
    """
    root = math.sqrt(1 - beta2**step)
    rate = lr * root / (1 - beta1**step)
    m *= beta1
    m += (1 - beta1) * clip * grads
    v *= beta2
    v += (1 - beta2) * clip**2 * grads**2
    params *= 1 - lr * weight_decay
    params -= rate * m / (np.sqrt(v) + root * eps)
    grads[...] = 0


def learning_rate(step, steps, warmup, lr, min_lr):
    """The learning rate of a step in 1..steps: a line up to lr, then half a cosine down to min_lr.

    The line up is the warm-up. AdamW's first steps would be full-sized even though m and v are then
    estimated from only a few batches, so lr starts small. Toward the end, small steps average out
    the noise of single batches. Loshchilov & Hutter 2017, equation 5.

    >>> [round(learning_rate(step, 100, 20, 1.0, 0.2), 9) for step in (1, 10, 20, 60, 100)]
    [0.05, 0.5, 1.0, 0.6, 0.2]
    """
    if step <= warmup:
        return lr * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------------------
# The model: a table of names and shapes, and one flat array each for the parameters, gradients, m
# and v, so that all are updated, summed or saved at once. Each parameter is a view of its part.

@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT-2, by OpenAI's names; the defaults are those of the 124M model."""
    vocab_size: int = 50257  # V
    n_positions: int = 1024  # the largest T
    n_embd: int = 768  # C
    n_layer: int = 12  # L
    n_head: int = 12  # H

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(type(value) is int and 0 < value <= 65536,
                    f"{name} is {value!r:.20}; it must be a whole number from 1 to 65536")
        require(self.n_embd % self.n_head == 0,
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; choose a multiple")


def parameter_table(config):
    """{name: shape} of all parameters, under GPT-2's own names; weights are (inputs, outputs).

    Matrices come first, so that they form one slice: AdamW's weight decay is for matrices only.
    """
    C = config.n_embd
    block = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
             "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    layers = {f"h.{i}.{name}": block[name] for i in range(config.n_layer) for name in block}
    table = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.n_positions, C)}
    for name, shape in (layers | {"ln_f": (C,)}).items():
        table |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return dict(sorted(table.items(), key=lambda item: -len(item[1])))  # 2 dimensions before 1


def parameter_count(config):
    """The number of parameters."""
    return sum(math.prod(shape) for shape in parameter_table(config).values())


def views(flat, table):
    """{name: view} of a flat array: writing to views[name][...] writes to the array."""
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in table.values()])[:-1])
    return {name: part.reshape(table[name]) for name, part in zip(table, parts)}


class Layer(NamedTuple):
    """The parameters of one layer, or their gradients."""
    weight: np.ndarray
    bias: np.ndarray = None


def by_layer(arrays):
    """{"h.0.ln_1.weight": w, "h.0.ln_1.bias": b, ...} -> p, where p.h[0].ln_1 is Layer(w, b)."""
    p = SimpleNamespace()
    for name in dict.fromkeys(name.rpartition(".")[0] for name in arrays):  # each layer once
        *path, last = name.split(".")  # "h", "0" and "ln_1"
        place = p
        for part in path:
            place = vars(place).setdefault(part, SimpleNamespace())
        setattr(place, last, Layer(arrays[f"{name}.weight"], arrays.get(f"{name}.bias")))
    p.h = list(vars(p.h).values())  # it had the names "0", "1", ...
    return p


def activations(config, B, T, dtype):
    """The arrays of a forward and backward pass of B sequences of T tokens, under their names."""
    N = B * T
    C, H, V = config.n_embd, config.n_head, config.vocab_size

    def new(*shape):
        return np.empty(shape, dtype)

    def by_head(x):  # x (N,m*C), with m = 3 for qkv and 1 for the others -> m views (B,H,T,D)
        return x.reshape(B, T, -1, H, C // H).transpose(2, 0, 3, 1, 4)
    shared = dict(dx=new(N, C), dbranch=new(N, C), dhidden=new(N, 4 * C), dqkv=new(N, 3 * C))
    first = x = new(N, C)
    blocks = []
    for _ in range(config.n_layer):
        a = SimpleNamespace(
            x=x, ln_1=new(N, C), qkv=new(N, 3 * C), lse=new(B, H, T, 1), attended=new(N, C),
            x_mid=new(N, C), ln_2=new(N, C), hidden=new(N, 4 * C), gelu=new(N, 4 * C),
            out=new(N, C), **shared)
        a.q, a.k, a.v = by_head(a.qkv)
        a.dq, a.dk, a.dv = by_head(a.dqkv)
        [a.heads], [a.dheads] = by_head(a.attended), by_head(a.dbranch)
        blocks.append(a)
        x = a.out
    return SimpleNamespace(h=blocks, x=first, out=x, ln_f=new(N, C), logits=new(N, V),
                           lse=new(N, 1), losses=new(N), dx=shared["dx"])


class GPT2:
    """GPT-2 (Radford et al. 2019), its gradients, and the moments of its optimizer.

    params and grads are {name: view} of flat_params and flat_grads, laid out by parameter_table.
    seed=None leaves the parameters uninitialized. Sequences interact only through the sum of their
    gradients. Therefore, with n_shards > 1, each thread takes a shard (some sequences of the batch)
    through the whole network, with its own activations and gradients. That is faster if the model
    is so small that threads cannot divide its matrix products well.
    """

    def __init__(self, config, dtype=np.float32, seed=1337):
        n = parameter_count(config)
        self.config = config
        self.n_shards = 1
        self.step = 0
        self.flat_params = np.empty(n, dtype)
        self.flat_grads, self.flat_m, self.flat_v = np.zeros((3, n), dtype)
        self._make_views()
        if seed is not None:
            self._initialize(np.random.default_rng(seed))

    def _make_views(self):
        table = parameter_table(self.config)
        self.params = views(self.flat_params, table)
        self.grads = views(self.flat_grads, table)
        self.p = by_layer(self.params)
        self.shape, self.shards = None, []  # of the activations
        self.batch = None  # (ids, targets) between forward() and backward()
        self.unfinished = False  # true while gradients change; stays true after an exception

    def _initialize(self, rng):
        for name, param in self.params.items():
            if param.ndim == 1:  # layernorm's weights are 1, biases 0
                param[...] = 1 if name.endswith(".weight") else 0
            else:
                # Random: equal channels would get equal gradients, and stay equal. The standard
                # deviation 0.02 is GPT-2's. The residual stream adds up 2L branches, each ending in
                # a c_proj. Variances of independent numbers add, so the sum is about sqrt(2L) times
                # as large as one branch: c_proj's weights are divided by that.
                rng.standard_normal(dtype=param.dtype, out=param)
                param *= 0.02 / math.sqrt(2 * self.config.n_layer if "c_proj" in name else 1)

    def __getstate__(self):  # copy.deepcopy and pickle take the flat arrays and make new views
        names = ["config", "n_shards", "step", "flat_params", "flat_grads", "flat_m", "flat_v"]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state):
        vars(self).update(state)
        self._make_views()

    @classmethod
    def from_pretrained(cls, folder, dtype=np.float32):
        """The model in a folder in Hugging Face's format. Raises UserError if it is not a GPT-2."""
        model = cls(read_config(folder), dtype, seed=None)
        read_tensors(Path(folder) / "model.safetensors", model.params)
        return model

    def save_pretrained(self, folder):
        """Write the files that transformers.GPT2LMHeadModel.from_pretrained reads."""
        write_model(folder, self)

    def _checked(self, ids, name="ids"):
        """A copy of ids (B,T), if they are tokens that this model knows; otherwise UserError."""
        ids = np.asarray(ids)
        V, context = self.config.vocab_size, self.config.n_positions
        require(ids.ndim == 2 and ids.size and ids.dtype.kind in "iu" and ids.shape[1] <= context,
                f"{name} must be integers (B,T), T in 1..{context}, not {ids.dtype} {ids.shape}")
        require(0 <= ids.min() and ids.max() < V,
                f"{name} are in {ids.min()}..{ids.max()}, outside the vocabulary of {V} tokens")
        return ids.astype(np.intp)

    def _make_shards(self, B, T):
        """Allocate activations, and gradients for all shards but the first: it uses flat_grads."""
        self.shape, self.shards = None, []  # frees the old ones first
        shards = []
        for sequences in split(B, self.n_shards):  # slices of about the same size
            grads = np.zeros_like(self.flat_grads) if shards else self.flat_grads
            shards.append(SimpleNamespace(
                sequences=sequences, flat_grads=grads,
                g=by_layer(views(grads, parameter_table(self.config))),
                a=activations(self.config, sequences.stop - sequences.start, T, grads.dtype)))
        self.shape, self.shards = (B, T, self.n_shards), shards

    def forward(self, ids, targets=None, cache=None):
        """ids (B,T) -> logits (B,T,V), a new array; with targets (B,T) -> the mean loss, a float.

        With a KV cache (B,L,2,H,S,D), ids are the last T of S positions (see generate). Raises
        UserError for ids or targets that do not fit the model.
        """
        self.batch = None
        ids = self._checked(ids)
        if targets is not None:
            targets = self._checked(targets, "targets")
            require(targets.shape == ids.shape,
                    f"targets have shape {targets.shape}, ids {ids.shape}; they must be equal")
        if self.shape != (*ids.shape, self.n_shards):
            self._make_shards(*ids.shape)

        def forward_shard(shard):
            network_forward(shard.a, self.p, *(
                None if x is None else x[shard.sequences] for x in (ids, targets, cache)))
        parallel(forward_shard, self.shards)  # forward_shard(shard) for every shard
        if targets is None:
            logits = np.concatenate([shard.a.logits for shard in self.shards])
            return logits.reshape(*ids.shape, -1)
        self.batch = ids, targets
        return float(np.concatenate([shard.a.losses for shard in self.shards]).mean())

    def backward(self, factor=1.0):
        """Add factor times the gradient of forward()'s loss to grads, which update() sets to 0.

        Raises UserError unless forward(ids, targets) was called before each backward().
        """
        require(self.batch is not None, "backward() needs a forward(ids, targets) before each call")
        (ids, targets), self.batch = self.batch, None
        if self.unfinished:  # discard what an interrupted call left behind
            self.flat_grads[...] = 0
        self.unfinished = True

        def backward_shard(shard):
            if shard.flat_grads is not self.flat_grads:
                shard.flat_grads[...] = 0
            rows = shard.sequences
            network_backward(shard.g, shard.a, self.p, ids[rows], targets[rows], factor / ids.size)
        parallel(backward_shard, self.shards)
        for shard in self.shards[1:]:
            add(self.flat_grads, shard.flat_grads)
        self.unfinished = False

    def update(self, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0):
        """One step of AdamW, after which grads are 0; returns their global norm before clipping.

        The global norm is the length of all gradients as one vector. If it is above grad_clip, the
        gradients are scaled down to that length, so that one unusual batch cannot dominate the
        moments, and with them the next steps; grad_clip=0 never does this. Matrices decay; biases
        and layernorm's weights do not, as is the custom: they are few, and 0 is not a natural value
        for a scale. If the norm is inf or nan, nothing is updated, but grads are 0 afterwards.
        """
        self.unfinished = True
        total = np.zeros(1)
        add_squares(total, self.flat_grads)  # total += the sum of their squares
        norm = math.sqrt(total[0])
        if not math.isfinite(norm):
            self.flat_grads[...] = 0
            self.unfinished = False
            return norm
        clip = min(1, grad_clip / (norm + 1e-6)) if grad_clip else 1  # 1e-6 as in PyTorch
        n = sum(param.size for param in self.params.values() if param.ndim == 2)
        for part, decay in (slice(0, n), weight_decay), (slice(n, None), 0):
            adamw(self.flat_params[part], self.flat_m[part], self.flat_v[part],
                  self.flat_grads[part], self.step + 1, lr, beta1, beta2, eps, decay, clip)
        self.step += 1
        self.unfinished = False
        return norm


# ------------------------------------------------------------------------------------------------
# The training loop.

def windows(tokens, starts, T):
    """Windows of tokens (n,) at starts (B,) -> ids (B,T), and targets (B,T), one token further."""
    rows = tokens[np.reshape(starts, (-1, 1)) + np.arange(T + 1)].astype(np.intp)
    return rows[:, :-1], rows[:, 1:]


def train(model, tokens, steps, B, T, schedule, rng, grad_accum=1, share=lambda rows: rows,
          all_reduce=lambda loss, grads: loss, **adamw_options):
    """The whole of training: after each step, yields (step, loss before it, norm of the gradient).

    A step takes grad_accum batches (micro-batches), each of B windows of T tokens at random places,
    and adds their gradients: one batch of all would need more memory. schedule(step) is the
    learning rate. share and all_reduce are for several processes (see Data parallel training): each
    takes its share of every batch, and losses and gradients are summed over all processes.

    >>> model = GPT2(GPTConfig(vocab_size=5, n_positions=4, n_embd=6, n_layer=1, n_head=2))
    >>> tokens = np.array([0, 1, 2, 3] * 20)
    >>> rng = np.random.default_rng(0)
    >>> steps = [*train(model, tokens, 100, B=8, T=4, schedule=lambda step: 0.03, rng=rng)]
    >>> bool(1.5 < steps[0][1] < 1.7 and steps[-1][1] < 0.1)  # log 5 = 1.61; 0123 repeats
    True
    """
    for step in range(model.step + 1, steps + 1):
        loss = 0.0
        for _ in range(grad_accum):
            starts = rng.integers(len(tokens) - T, size=B)
            ids, targets = windows(tokens, share(starts), T)
            fraction = len(ids) / (B * grad_accum)  # of all sequences of the step
            loss += fraction * model.forward(ids, targets)
            model.backward(fraction)
        loss = all_reduce(loss, model.flat_grads)
        norm = model.update(schedule(step), **adamw_options)
        yield step, loss, norm


# ------------------------------------------------------------------------------------------------
# Sampling: draw a token from the predicted probabilities, append it to the text, predict again. The
# causal mask hides the new token from earlier positions, so their keys and values do not change.
# They are kept, in the KV cache, and only the new token passes through the network.

def sample(logits, temperature, top_k, top_p, rng):
    """Draw the next token for each row: logits (B,V) -> ids (B,).

    The probabilities are softmax(logits / temperature): a temperature below 1 favours likely tokens
    more, and 0 always takes the most likely one. top_k keeps the k most likely tokens. Of these,
    top_p takes the most likely, one by one, until their sum reaches the share top_p of the total
    (Holtzman et al. 2020, section 3.1). Raises UserError for a temperature or top_p below 0 and for
    a top_k below 1.

    >>> logits = np.log([[0.5, 0.3, 0.2]] * 1000)
    >>> ids = sample(logits, 1.0, 2, None, np.random.default_rng(0))
    >>> counts = np.bincount(ids, minlength=3)  # near 625, 375 and 0
    >>> bool(545 < counts[0] < 705 and counts[2] == 0)
    True
    """
    require(temperature >= 0, f"temperature is {temperature}; it must be at least 0")
    require(top_k is None or top_k >= 1, f"top_k is {top_k}; it must be at least 1")
    require(top_p is None or top_p >= 0, f"top_p is {top_p}; it must be at least 0")
    if temperature == 0:
        return logits.argmax(axis=1)
    with np.errstate(over="ignore"):  # for a tiny temperature, exp(-inf) = 0 is the correct limit
        scaled = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    probs = np.exp(scaled)  # up to a factor, which does not matter below
    if top_k is not None and top_k < probs.shape[1]:
        probs[probs < np.partition(probs, -top_k)[:, [-top_k]]] = 0  # below the k-th largest
    if top_p is not None:
        ranked = np.sort(probs)[:, ::-1]
        before = ranked.cumsum(axis=1) - ranked  # the sum of the more likely ones
        kept = before < top_p * ranked.sum(axis=1, keepdims=True)
        kept[:, 0] = True  # even if top_p is 0
        probs[probs < np.where(kept, ranked, np.inf).min(axis=1, keepdims=True)] = 0
    ends = probs.cumsum(axis=1)  # a random point falls into the interval of one token
    return (ends > rng.random((len(probs), 1)) * ends[:, -1:]).argmax(axis=1)  # the first True


def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Continue ids (B,T): yields the next token of every sequence (B,); see sample() for options.

    The model sees a window of the last tokens, at most n_positions. When the window is full, its
    oldest quarter is dropped. Every token then has a new position, so all keys and values change
    and the cache is filled again; dropping a quarter at a time makes this rare. Tokens that are not
    yet in the cache pass through the network in chunks of at most 64, to save memory.

    With a cache of the first two tokens, the third gets the same logits as without:

    >>> model = GPT2(GPTConfig(vocab_size=5, n_positions=8, n_embd=6, n_layer=1, n_head=2))
    >>> cache = np.empty((1, 1, 2, 2, 3, 3), np.float32)  # (B,L,2,H,S,D)
    >>> two = model.forward([[4, 2]], cache=cache[..., :2, :])
    >>> third = model.forward([[3]], cache=cache)
    >>> np.allclose(third[0, 0], model.forward([[4, 2, 3]])[0, 2], atol=1e-6)
    True
    """
    ids = np.asarray(ids)
    require(ids.ndim == 2, f"ids must have the shape (B,T), not {ids.shape}")
    rng = rng or np.random.default_rng()
    config = model.config
    context = config.n_positions
    cache = np.empty((len(ids), config.n_layer, 2, config.n_head, context,
                      config.n_embd // config.n_head), model.flat_params.dtype)
    start = max(0, ids.shape[1] - context)  # where the window begins
    past = 0  # how many of its tokens are cached
    for _ in range(max_new_tokens):
        if ids.shape[1] - start > context:
            start = ids.shape[1] - max(1, context * 3 // 4)
            past = 0
        rest = ids[:, start + past:]  # not yet in the cache
        for new in np.split(rest, range(64, rest.shape[1], 64), axis=1):
            past += new.shape[1]
            logits = model.forward(new, cache=cache[..., :past, :])
        token = sample(logits[:, -1], temperature, top_k, top_p, rng)
        ids = np.concatenate([ids, token[:, None]], axis=1)
        yield token


# ------------------------------------------------------------------------------------------------
# Tokens. A text becomes a file of ids, from which training draws random windows.

class Tokenizer:
    """Text to ids and back. "byte" has the 256 bytes of UTF-8 and <|endoftext|>; "gpt2" is GPT-2's
    byte pair encoding (Radford et al. 2019, section 2.2), from the package tiktoken.

    >>> Tokenizer("byte").encode("Oh!<|endoftext|>")
    [79, 104, 33, 256]
    """
    sizes = {"byte": 257, "gpt2": 50257}

    def __init__(self, name):
        self.name = name
        self.n_vocab = self.sizes[name]
        self.eot_token = self.n_vocab - 1
        self.bpe = None
        if name == "gpt2":
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
            try:
                import tiktoken
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # it is not installed, or whatever its download raises
                raise UserError(f"GPT-2's tokens need tiktoken ({error!r:.80}); pip install it; "
                                "offline, set TIKTOKEN_CACHE_DIR to its filled cache") from None

    def encode(self, text):
        """A string -> a list of ids. <|endoftext|> in the text becomes that one token."""
        if self.bpe:
            return self.bpe.encode(text, allowed_special={"<|endoftext|>"})
        parts = (part.encode("utf-8", "replace") for part in text.split("<|endoftext|>"))
        return [id for part in parts for id in (self.eot_token, *part)][1:]

    def token_bytes(self, id):
        """The bytes of a token: one or more characters, or a part of one; none for unknown ids."""
        if id == self.eot_token:
            return b"<|endoftext|>"
        if id > self.eot_token:
            return b""
        return self.bpe.decode_single_token_bytes(id) if self.bpe else bytes([id])

    def decode(self, ids):
        """Ids -> a string; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(id)) for id in ids).decode("utf-8", errors="replace")


DATA = Path("data")
MAGIC, VERSION = 20240520, 1  # how a token file begins


def write_file(path, parts):
    """Write these parts, bytes or arrays, to a file that appears at `path` whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_tokens(path, ids):
    """Write a token file as llm.c does: 256 int32 (magic, version, count, zeros), uint16 ids."""
    ids = np.asarray(ids)
    require(0 <= ids.min() and ids.max() < 2**16, f"{path}: ids must be in 0..65535")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    write_file(path, [header, ids.astype("<u2")])


def read_tokens(pattern, vocab_size):
    """The ids (n,) of a token file, or of all files that match a pattern, one after another.

    A single file stays on disk until it is read. Raises UserError for a file that is missing or
    damaged, or has an id outside the vocabulary.
    """
    folder, name = os.path.split(pattern)  # only the name is a pattern: a folder may be called x[1]
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), name)))
    if os.path.exists(pattern):
        paths = [pattern]
    require(paths, f"{pattern or '(empty)'}: no such file; make one with prepro_tinyshakespeare.py "
            "and give it as --train_bin or --val_bin")
    files = []
    for path in paths:
        n = (os.path.getsize(path) - 1024) / 2
        require(n > 1 and np.fromfile(path, "<i4", 3).tolist() == [MAGIC, VERSION, n],
                f"{path}: not a token file; make it again with prepro_tinyshakespeare.py")
        files.append(np.memmap(path, "<u2", mode="r", offset=1024))
        largest = files[-1].max()
        require(largest < vocab_size, f"{path}: id {largest} is outside the vocabulary of "
                f"{vocab_size}; give its --tokenizer")
    return files[0] if len(files) == 1 else np.concatenate(files)


# ------------------------------------------------------------------------------------------------
# A run: what the program does between the steps. It logs, validates, samples, saves and stops.

LOG_HEADER = b"step,loss,val_loss,norm,lr,ms,tokens_per_second\n"
STOP = []  # if the program is asked to stop: the exit status to stop with


def say(text, end="\n", file=None):
    """Print at once. If that is impossible (a closed pipe, a full disk), ask to stop instead."""
    file = file or sys.stdout
    try:
        print(text, end=end, file=file, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        if isinstance(error, BrokenPipeError):
            STOP.append(141)  # 128 + SIGPIPE
        else:
            STOP.append(2)
            say(f"error: cannot print: {error}", file=sys.stderr)


def show_progress(text):
    """Replace the last line of the terminal, if stderr is one."""
    if sys.stderr and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        say(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr)


@contextlib.contextmanager
def locked(folder, wait=False):
    """Hold the system's lock on a folder; it ends with this process, however that ends.

    Raises UserError if another process holds it, or waits. Systems without locks do nothing.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as at_end:
        try:
            import fcntl
            descriptor = os.open(folder, os.O_RDONLY)
            at_end.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training in this folder; wait, or give "
                            "another --out") from None
        except (ImportError, OSError):
            pass
        yield


def activation_count(config, N):
    """The number of elements in the activations of N positions."""
    C, H, L = config.n_embd, config.n_head, config.n_layer
    return N * (L * (16 * C + H) + 11 * C + config.vocab_size + 2)


def choose_shards(config, B, T, threads):
    """The number of shards for steps of (B,T): one for each thread, if each has enough to do.

    Each shard needs its own gradient array, which has to be summed in every step; that is cheap if
    its activations are larger. A shard of fewer than about 128 positions is not worth a thread.
    """
    ratio = activation_count(config, B * T) / parameter_count(config)
    return max(1, int(min(threads, B, B * T / 128, ratio)))


def evaluate(model, tokens, B, T, limit=0):
    """The mean loss of the first `limit` tokens (0: of all), in nats per token.

    Every token but the first is predicted once, in batches of the shape of training.
    """
    limit = min(limit or len(tokens), len(tokens) - 1)
    done = 0
    total = 0.0
    while done < limit:
        t = min(T, limit - done)  # the last sequence may be shorter,
        b = min(B, (limit - done) // t)  # and the last batch smaller
        ids, targets = windows(tokens, done + t * np.arange(b), t)
        total += model.forward(ids, targets) * b * t
        done += b * t
        show_progress(f"validation: {done:,} of {limit:,} tokens")
    show_progress("")
    return total / limit


def print_sample(model, tokenizer, args, number):
    """Generate text and print it as it is produced; the seed and the number determine it."""
    prompt = args.prompt or ("\n" if tokenizer.name == "byte" else "<|endoftext|>")
    ids, context = tokenizer.encode(prompt), model.config.n_positions
    if len(ids) > context:
        say(f"the prompt has {len(ids)} tokens; only the last {context} are used", file=sys.stderr)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character
    rng = np.random.default_rng([args.seed, 2, number])
    say(prompt, end="")
    for token in generate(model, [ids], args.max_new_tokens, args.temperature, args.top_k,
                          args.top_p, rng):
        say(decoder.decode(tokenizer.token_bytes(int(token[0]))), end="")
        if STOP:
            break
    say(decoder.decode(b"", final=True))


def open_log(out, state):
    """Open OUT/log.csv to append after what it had when `state` was saved (None: a new run).

    Raises UserError if that part has changed, or if the file is not a log.
    """
    path = Path(out) / "log.csv"
    size, crc32 = state["log"] if state else (len(LOG_HEADER), zlib.crc32(LOG_HEADER))
    content = path.read_bytes()[:size] if path.exists() else LOG_HEADER
    require(not path.exists() or zlib.crc32(content) == crc32,
            f"{path} is not this run's log, or was edited; restore it, or move it elsewhere")
    write_file(path, [content])
    return open(path, "a", encoding="utf-8", newline="\n")


class Run:
    """A model in training with its tokens. Making one says what is trained on what."""

    def __init__(self, args, state, tokenizer, processes):
        self.args = args
        self.state = state
        self.tokenizer = tokenizer
        self.files = tokenizer_files(tokenizer, args.n_positions)
        self.processes = processes
        require(args.batch_size % processes.size == 0, f"--batch_size {args.batch_size} is not "
                f"divisible by the {processes.size} processes; give a multiple")
        self.B = args.batch_size // processes.size
        self.schedule = functools.partial(learning_rate, steps=args.steps, warmup=args.warmup,
                                          lr=args.lr, min_lr=args.min_lr)
        self.model, self.rng = make_model(args, state, self.B)
        self.tokens = read_tokens(args.train_bin, self.model.config.vocab_size)
        self.val_tokens = read_tokens(args.val_bin, self.model.config.vocab_size)
        n, n_val = len(self.tokens), len(self.val_tokens)
        require(n > args.seq_len, f"{args.train_bin}: {n} tokens are too few for --seq_len "
                f"{args.seq_len}; lower it, or give more text")
        say(f"model     {args.folder or args.model}: {self.model.flat_params.size:,} parameters, "
            f"{self.model.config}\n"
            f"batch     B={args.batch_size} T={args.seq_len}, micro-batches {args.grad_accum}, "
            f"processes {processes.size}, shards {min(self.B, self.model.n_shards)}, "
            f"threads {parallel.threads}\n"
            f"train     {n:,} {args.tokenizer} tokens in {args.train_bin}\n"
            f"validate  {min(args.eval_tokens or n_val, n_val):,} of {n_val:,} tokens in "
            f"{args.val_bin}")

    def save(self):
        """Write a checkpoint."""
        args, model = self.args, self.model
        options = {name: x for name, x in vars(args).items() if name not in UNSAVED}
        for name in "train_bin", "val_bin":  # relative to OUT: the project may be moved
            with contextlib.suppress(ValueError):  # on another drive of Windows
                options[name] = os.path.relpath(options[name], args.out)
        log = (Path(args.out) / "log.csv").read_bytes()
        save_checkpoint(args.out, model, self.files, {
            "step": model.step, "options": options, "shards": model.n_shards,
            "rng": self.rng.bit_generator.state, "log": (len(log), zlib.crc32(log)),
            "model": checksum(model)})

    def validate(self):
        """Print the validation loss and return it."""
        loss = evaluate(self.model, self.val_tokens, self.B, self.args.seq_len,
                        self.args.eval_tokens)
        say(f"step {self.model.step} | val loss {loss:.4f}")
        return loss

    def take_steps(self):
        """Take the steps that are left; stop early if asked to."""
        args, processes = self.args, self.processes
        if processes.size > 1:
            options = {f"--{name}": x for name, x in vars(args).items()
                       if name not in UNSAVED | {"train_bin", "val_bin"}}
            processes.require_equal(options | {
                "step": self.model.step, "training text": zlib.crc32(self.tokens),
                "set of weights": checksum(self.model), "order": self.rng.bit_generator.state})
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        for number in signal.SIGINT, signal.SIGTERM, hangup:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, frame: STOP.append(128 + number))
        log = open_log(args.out, self.state) if processes.rank == 0 else None
        times = []  # since the last line of the log
        start = time.perf_counter()
        for step, loss, norm in train(
                self.model, self.tokens, args.steps, args.batch_size, args.seq_len, self.schedule,
                self.rng, args.grad_accum, processes.share, processes.all_reduce, beta1=args.beta1,
                beta2=args.beta2, weight_decay=args.weight_decay, grad_clip=args.grad_clip):
            times.append(time.perf_counter() - start)
            require(math.isfinite(loss + norm), f"step {step}: the loss is {loss}, the gradient's "
                    f"norm {norm}; lower --lr {args.lr:g} or raise --warmup {args.warmup}")
            last = step == args.steps
            if processes.rank == 0:
                self.report(step, loss, norm, times, log)
            stop = processes.stop or (STOP and processes.size == 1)
            if processes.rank == 0 and (last or stop or step % args.save_every == 0):
                self.save()
            if stop and not last:
                if processes.rank == 0:
                    say(f"stopped after step {step}, saved in {args.out}; --resume continues",
                        file=sys.stderr)
                sys.exit(STOP[0] if STOP else 143)  # the signal reached another process only
            start = time.perf_counter()

    def report(self, step, loss, norm, times, log):
        """Log, validate and sample, each if it is due."""
        args = self.args
        last = step == args.steps
        hurry = self.processes.stop and not last
        validates = last or step % args.eval_every == 0
        if validates or step == 1 or step % args.log_every == 0:
            seconds = sum(times) / len(times)
            times.clear()
            speed = args.batch_size * args.seq_len * args.grad_accum / seconds
            left = datetime.timedelta(seconds=round(seconds * (args.steps - step)))
            lr = self.schedule(step)
            say(f"step {step:{len(str(args.steps))}}/{args.steps} | loss {loss:.4f} | norm "
                f"{norm:.2f} | lr {lr:.2e} | {1e3 * seconds:3.0f} ms | {speed:5.0f} tok/s | "
                f"{left} left")
            val_loss = f"{self.validate():.6f}" if validates and not hurry else ""
            print(step, f"{loss:.6f}", val_loss, f"{norm:.6f}", f"{lr:.6e}", f"{1e3 * seconds:.2f}",
                  f"{speed:.0f}", sep=",", file=log, flush=True)
        if (last or step % args.sample_every == 0) and not hurry:
            say("-" * 80)
            print_sample(self.model, self.tokenizer, args, step)
            say("-" * 80)


# ------------------------------------------------------------------------------------------------
# Checkpoints. A model is a folder in Hugging Face's format: config.json, model.safetensors, and the
# tokenizer's files. A safetensors file is the length of a JSON text in 8 bytes, that JSON text, and
# the numbers: our flat array with its table in front. A run's checkpoint, OUT/step_000250, contains
# also AdamW's moments in optimizer.safetensors and the rest of the run's state in trainer.json.

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PLAIN_GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False, "tie_word_embeddings": True}
UNSAVED = {"model", "init_from", "resume", "out", "threads", "folder"}
CHANGED = ("{}: a file in this folder has changed since it was saved; remove the folder to resume "
           "from the checkpoint before it")


def write_tensors(path, tensors):
    """Write {name: array of floats} as a safetensors file."""
    index = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, x in tensors.items():
        start, stop = stop, stop + x.nbytes
        index[name] = {"dtype": f"F{8 * x.itemsize}", "shape": x.shape,
                       "data_offsets": (start, stop)}
    header = json.dumps(index).encode()
    header += b" " * (-len(header) % 8)
    numbers = (x.astype(x.dtype.newbyteorder("<"), copy=False) for x in tensors.values())
    write_file(path, [len(header).to_bytes(8, "little"), header, *numbers])


def read_tensors(path, arrays):
    """Fill {name: array} from a safetensors file, which may be in another float format.

    Names may begin with `transformer.`. Raises UserError for a damaged file, for a tensor that is
    missing or has another shape, and for one that is not needed (except causal masks, which old
    files have, and lm_head.weight, which is wte.weight again).
    """
    path = Path(path)
    if not path.exists() and [*path.parent.glob("model*.index.json"), *path.parent.glob("*.bin")]:
        raise UserError(f"{path} is missing, and the weights are in other files; write it with "
                        'transformers: model.save_pretrained(FOLDER, max_shard_size="10GB")')
    known = r"__metadata__|lm_head\.weight|h\.\d+\.attn\.(masked_)?bias"
    try:
        data = np.memmap(path, np.uint8, "r")  # stays on disk until it is used
        length = int.from_bytes(data[:8].tobytes(), "little")
        index = json.loads(data[8:8 + length].tobytes())
        index = {name.removeprefix("transformer."): entry for name, entry in index.items()}
        other = [name for name in arrays.keys() ^ index.keys() if not re.fullmatch(known, name)]
        require(not other, f"{', '.join(sorted(other)):.80} missing or surplus")
        for name, array in arrays.items():
            entry = index[name]
            require(tuple(entry["shape"]) == array.shape,
                    f"{name} is {entry['shape']!s:.40}, in the model {[*array.shape]}")
            start, stop = entry["data_offsets"]
            x = np.frombuffer(data[8 + length:], FLOATS[entry["dtype"]], array.size, start)
            require(stop == start + x.nbytes, f"{name} ends at byte {stop!r:.20}")
            x = x.reshape(array.shape)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                x = (x.astype(np.uint32) << 16).view(np.float32)
            array[...] = x
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise UserError(f"{path}: damaged, or not the floats of this model ({error!s:.160}); get "
                        "it again, with its config.json") from None


def write_model(folder, model):
    """Write config.json, generation_config.json and model.safetensors."""
    last = model.config.vocab_size - 1
    config = {"architectures": ["GPT2LMHeadModel"], **PLAIN_GPT2, **asdict(model.config),
              "bos_token_id": last, "eos_token_id": last}
    limit = {"max_length": model.config.n_positions}  # for transformers' pipeline
    for name, content in ("config.json", config), ("generation_config.json", limit):
        write_file(Path(folder) / name, [json.dumps(content, indent=2).encode()])
    write_tensors(Path(folder) / "model.safetensors",
                  {f"transformer.{name}": x for name, x in model.params.items()})


def read_json(path):
    """The JSON object in a file. Raises UserError if there is none."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), f"{path}: not a JSON object; replace it, or remove its folder")
    return found


def read_config(folder):
    """The GPTConfig of a folder's config.json. Raises UserError for what is not a plain GPT-2."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    if found.get("activation_function") == "gelu_pytorch_tanh":  # another name for the same
        found["activation_function"] = "gelu_new"
    try:
        config = GPTConfig(**{name: found.get(name) for name in asdict(GPTConfig())})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    plain = PLAIN_GPT2 | ({"n_inner": 4 * config.n_embd} if found.get("n_inner") else {})
    for name, value in plain.items():
        require(found.get(name, value) == value, f"{path}: {name} is {found.get(name)!r:.40}; use "
                f"a plain GPT-2, which has {value!r}")
    return config


def tokenizer_files(tokenizer, n_positions):
    """{file name: bytes} from which transformers' AutoTokenizer makes the same tokenizer."""
    merges = b"#version: 0.2\n"
    if tokenizer.bpe:  # OpenAI's own files, which tiktoken keeps
        from tiktoken.load import read_file_cached
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        vocab = read_file_cached(url + "encoder.json")
        merges = read_file_cached(url + "vocab.bpe")
    else:  # every byte stands as a printable character: itself, or one from U+0100 on
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        vocab = {chr(256 + others.index(b) if b in others else b): b for b in range(256)}
        vocab = json.dumps(vocab | {"<|endoftext|>": 256}).encode()
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_positions,
              **dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")}
    return {"vocab.json": vocab, "merges.txt": merges,
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def checkpoints(out):
    """The checkpoints in a run's folder, from the first to the last."""
    found = [path for path in Path(out).glob("step_*") if re.fullmatch(r"\d{1,18}", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(out, model, files, state):
    """Write OUT/step_... with `files` {name: bytes}, whole or not at all; keep the one before."""
    unfinished = Path(out) / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    model.save_pretrained(unfinished)
    write_tensors(unfinished / "optimizer.safetensors", {"m": model.flat_m, "v": model.flat_v})
    state["crc32"] = zlib.crc32(json.dumps(state).encode())
    files = files | {"trainer.json": json.dumps(state, indent=2).encode()}
    for name, content in files.items():
        write_file(unfinished / name, [content])
    os.replace(unfinished, Path(out) / f"step_{model.step:06}")
    for old in checkpoints(out)[:-2]:
        os.replace(old, unfinished)
        shutil.rmtree(unfinished)


def checksum(model):
    """The CRC-32 of the sizes, the parameters and the moments of a model."""
    crc32 = zlib.crc32(repr(model.config).encode())
    for flat in model.flat_params, model.flat_m, model.flat_v:
        crc32 = zlib.crc32(flat, crc32)
    return crc32


def read_state(folder):
    """The state of a run, in a checkpoint's trainer.json. Raises UserError if it has changed."""
    state = read_json(folder / "trainer.json")
    crc32 = state.pop("crc32", None)
    require(crc32 == zlib.crc32(json.dumps(state).encode()), CHANGED.format(folder))
    return state


def load_checkpoint(folder, state):
    """(model, random generator) of a checkpoint. Raises UserError if a number has changed."""
    model = GPT2.from_pretrained(folder)
    read_tensors(folder / "optimizer.safetensors", {"m": model.flat_m, "v": model.flat_v})
    require(checksum(model) == state["model"], CHANGED.format(folder))
    model.step = state["step"]
    rng = np.random.default_rng()
    rng.bit_generator.state = state["rng"]
    return model, rng


# ------------------------------------------------------------------------------------------------
# Data parallel training. torchrun starts several processes, on one machine or on several. Each has
# the whole model and takes its share of every batch. They exchange only the flat array of
# gradients: an all-reduce gives every process the sum over all. All make the same update with it,
# so their parameters stay equal. torch is only the transport: it uses NumPy's memory.

class Processes:
    """The processes of a run, of ranks 0..size-1. Without torchrun there is one, and no network."""

    def __init__(self):
        self.stop = 0  # above 0 if any process has been asked to stop
        try:
            self.rank = int(os.environ.get("RANK", 0))
            self.size = int(os.environ.get("WORLD_SIZE", 1))
            require(0 <= self.rank < self.size, f"RANK {self.rank}, WORLD_SIZE {self.size}")
            if self.size > 1:
                from torch import distributed, from_numpy
                self.network, self.tensor = distributed, from_numpy
                # others wait while rank 0 downloads or validates, however long that takes
                distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
                atexit.register(distributed.destroy_process_group)
        except Exception as error:  # of many kinds
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the processes of WORLD_SIZE {os.environ.get('WORLD_SIZE')} cannot connect "
                f"({reason:.160}); start them with torchrun; on several machines, set "
                "GLOO_SOCKET_IFNAME to their network interface") from None

    def share(self, rows):
        """This process's share of the rows of a batch."""
        n = len(rows) // self.size
        return rows[n * self.rank:n * (self.rank + 1)]

    def sum(self, flat):
        """Replace every process's array by the sum over all processes, the same bits for each."""
        if self.size == 1:
            return
        try:
            self.network.all_reduce(self.tensor(flat))
        except RuntimeError as error:
            require(not re.search("connection|closed|reset by peer|timed out", str(error), re.I),
                    f"rank {self.rank} lost the connection to another process; see its output, "
                    "then restart all with --resume")
            raise

    def all_reduce(self, loss, grads):
        """Sum loss and gradients over all processes; find out whether any is asked to stop."""
        sums = np.array([loss, len(STOP)])
        self.sum(sums)
        self.sum(grads)
        self.stop = int(sums[1])
        return float(sums[0])

    def require_equal(self, values):
        """Raise UserError if another process has other values in {name: value} than rank 0."""
        table = np.zeros((self.size, len(values)))
        table[self.rank] = [zlib.crc32(repr(value).encode()) for value in values.values()]
        self.sum(table)
        for rank, row in enumerate(table):
            names = [name for name, x, first in zip(values, row, table[0]) if x != first]
            require(not names, f"rank {rank} has another {', '.join(names)} than rank 0; start all "
                    "processes with the same options and the same files")


# ------------------------------------------------------------------------------------------------
# Threads. A NumPy operation uses one core, but it releases the GIL (a lock that lets only one
# thread at a time run Python) while it computes. So a few threads, each calling NumPy on a part of
# the arrays, use all cores. A block of rows fits into a core's cache, so a formula of eight
# operations reads memory once, not eight times. How arrays are cut depends on their shapes, on the
# number of shards, and on nothing else; in particular not on the number of threads or on what other
# threads do. Therefore the results do not either, bit for bit.

MIN_BLOCK = 1 << 16  # elements; with smaller blocks, threads spend their time waiting for the GIL


class Pool:
    """pool(work, items) calls work(item) for every item, on `threads` threads.

    Nested calls run serially, as all threads are busy. Several threads may call one pool.
    """

    def __init__(self, threads):
        self.threads = threads
        self.executor = ThreadPoolExecutor(256)
        self.this_thread = threading.local()
        # Memory of large arrays goes back to the system when they are freed, and a new one costs a
        # page fault per 4 KB. Freeing one array this large raises the size above which glibc does
        # so; later temporaries are then reused.
        np.empty(31 << 20, np.uint8)

    def is_nested(self):
        """Whether this thread is working on an item."""
        return getattr(self.this_thread, "nested", False)

    def __call__(self, work, items):
        """Call work(item) for every item; raises the first error that a call raised."""
        if len(items) < 2 or self.is_nested():
            for item in items:
                work(item)
            return
        left = deque(items)  # popleft gives every item to one thread only, also without a GIL
        running = set()  # threads

        def work_through():
            try:
                running.add(threading.get_ident())
                self.this_thread.nested = True
                while True:
                    try:
                        item = left.popleft()
                    except IndexError:  # none is left
                        return
                    work(item)
            finally:
                self.this_thread.nested = False
                running.discard(threading.get_ident())
        try:
            helpers = [self.executor.submit(work_through)
                       for _ in range(min(self.threads, len(items)) - 1)]
            work_through()
            for helper in helpers:
                helper.result()  # waits, and raises the error that the thread has met
        except BaseException:  # an error or Ctrl-C: nothing new begins, and what has begun ends
            left.clear()
            while running:
                with contextlib.suppress(KeyboardInterrupt):  # a second one changes nothing
                    time.sleep(1e-4)
            raise


def split(n, parts, evenly=False):
    """range(n) as at most `parts` slices of about the same size.

    With evenly=True there are 1, 2, 4, 6, 12 or a multiple of 24, which 2, 3, 4, 6, 8 or 12 threads
    share well.

    >>> split(5, 2)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    parts = max(1, min(n, int(parts)))
    if evenly:
        parts -= parts % next(unit for unit in (24, 12, 6, 4, 2, 1) if unit <= parts)
    return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def run_in_blocks(function, args, cut, sums, heads):
    """Call function(**args) for blocks of the arguments named in `cut`; see by_rows."""
    if heads:  # attention: the work is in its scores
        B, H, T, _ = args["q"].shape
        n = B * H * min(T, 64) * args["k"].shape[2] / MIN_BLOCK
        blocks = [(b, h) for b in split(B, n, evenly=True) for h in split(H, n / B, evenly=True)]
    else:
        n = max(args[name].size for name in cut) / MIN_BLOCK
        blocks = split(len(args[cut[0]]), n, evenly=True)
    if len(blocks) == 1:
        function(**args)
        return
    partial = {name: np.zeros((len(blocks), *args[name].shape), args[name].dtype) for name in sums}

    def work(number):
        function(**args | {name: args[name][blocks[number]] for name in cut}
                 | {name: x[number] for name, x in partial.items()})
    parallel(work, range(len(blocks)))
    for name, x in partial.items():
        args[name] += x.sum(axis=0)


def matmul(out, a, b, add=False):
    """out[...] = a @ b, or out += a @ b; a (M,J), b (J,K) -> out (M,K), in blocks.

    Every block reads the other operand whole, so the longer side of out is cut. BLAS is faster on
    large blocks, so there are few: as many as the square root of the product's size in units of
    2^22 multiplications, at most 24, none below 64 wide.
    """
    (M, J), K = a.shape, b.shape[1]
    n = 1 if parallel.is_nested() else min(24, max(M, K) / 64, math.sqrt(M * J * K / 2**22))

    def work(block):
        rows, columns = (slice(None), block) if K >= M else (block, slice(None))
        part = out[rows, columns]
        if add:
            part += np.matmul(a[rows], b[:, columns], out=np.empty_like(part))
        else:
            np.matmul(a[rows], b[:, columns], out=part)
    parallel(work, split(max(M, K), n, evenly=True))


@by_rows("total part")
def add(total, part):
    """Add part (n,) to total (n,)."""
    total += part


@by_rows("flat", sums="total")
def add_squares(total, flat):
    """Add the sum of flat (n,) ** 2 to total (1,)."""
    total += np.dot(flat, flat)


def usable_cpus():
    """The number of processors of this process, by a container's quota and torchrun's share."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cpus = min(cpus, quota // period)
    with contextlib.suppress(ValueError, ZeroDivisionError):
        cpus //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, cpus)


parallel = Pool(usable_cpus())
if hasattr(os, "register_at_fork"):  # a forked child does not have its parent's threads
    os.register_at_fork(after_in_child=lambda: parallel.__init__(parallel.threads))


# ------------------------------------------------------------------------------------------------
# The command line.

LARGE = dict(steps=1000, tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, n_positions=1024,
             batch_size=4, lr=3e-4, min_lr=3e-5, beta2=0.95, log_every=1, eval_tokens=8192)
PRESETS = {"baby": {}, "gpt2": LARGE,
           "gpt2-medium": LARGE | dict(n_layer=24, n_head=16, n_embd=1024),
           "gpt2-large": LARGE | dict(n_layer=36, n_head=20, n_embd=1280),
           "gpt2-xl": LARGE | dict(n_layer=48, n_head=25, n_embd=1600)}
FINE_TUNING = dict(steps=None, lr=1e-4, min_lr=1e-5)


def number(kind, low, high):
    """A type for argparse: a number of this kind in low..high."""
    def read(text):
        with contextlib.suppress(ValueError):  # no number at all
            if low <= kind(text) <= high:
                return kind(text)
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {name} from {low} to {high}, not {text:.20}")
    return read


size = number(int, 1, 65536)
natural = number(int, 1, 2**32)
count = number(int, 0, 2**32)
real = number(float, 0, 1e38)


def make_parser():
    """The options with the defaults of the preset baby."""
    parser = argparse.ArgumentParser(
        prog="train_gpt2.py", allow_abbrev=False, add_help=False,
        description="Train GPT-2 in NumPy. Without options, a small model learns Shakespeare.")
    parser.error = lambda message: require(False, f"{message} (see --help)")

    def add(name, kind, default, text, group=None):
        text += "" if default is None else " (default: %(default)s)"
        look = {"choices": list(kind)} if isinstance(kind, dict) else {"type": kind, "metavar": "X"}
        (group or section).add_argument(f"--{name}", default=default, help=text, **look)
    section = parser.add_argument_group("most used: what to train, and for how long")
    section.add_argument("-h", "--help", action="help", help="show this text and exit")
    start = section.add_mutually_exclusive_group()
    add("model", PRESETS, "baby", "preset: architecture and hyperparameters", start)
    add("init_from", str, None, "start from the weights in the folder of a model or a run, or from "
        "OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl; without --steps, only sample", start)
    start.add_argument("--resume", action="store_true",
                       help="continue the run in --out with its options, except those given")
    add("steps", count, 5500, "training steps; 0 only validates and samples")
    add("prompt", str, None, "text that samples continue")
    add("out", str, "out", "folder for log.csv and checkpoints")
    section = parser.add_argument_group("data: the tokens to train and validate on")
    add("train_bin", str, None, "token file, or a pattern of several (default: Shakespeare)")
    add("val_bin", str, None, "the same for validation")
    add("tokenizer", Tokenizer.sizes, "byte", "bytes, or GPT-2's 50,257 tokens")
    section = parser.add_argument_group("architecture: the sizes of a new model")
    add("n_layer", size, 3, "L, blocks")
    add("n_head", size, 4, "H, attention heads")
    add("n_embd", size, 128, "C, channels")
    add("n_positions", size, 64, "longest context")
    section = parser.add_argument_group("training: batches and the optimizer")
    add("batch_size", natural, 12, "B, sequences in a micro-batch, shared among all processes")
    add("seq_len", natural, None, "T, tokens in a sequence (default: 64, or n_positions if less)")
    add("grad_accum", natural, 1, "micro-batches per step")
    add("lr", real, 3e-3, "highest learning rate")
    add("min_lr", real, 1e-4, "learning rate at the end")
    add("warmup", count, 100, "steps up to the highest learning rate")
    add("beta1", number(float, 0, 0.99999), 0.9, "AdamW: decay of the average gradient")
    add("beta2", number(float, 0, 0.99999), 0.99, "AdamW: decay of the average squared gradient")
    add("weight_decay", real, 0.1, "decoupled weight decay of matrices")
    add("grad_clip", real, 1.0, "maximum global gradient norm (0: no clipping)")
    add("seed", count, 1337, "seed of weights, batches and samples")
    add("threads", number(int, 1, 256), None, "threads (default: one per processor)")
    section = parser.add_argument_group("evaluation: what happens between steps")
    add("log_every", natural, 50, "steps between log lines")
    add("eval_every", natural, 500, "steps between validations")
    add("eval_tokens", count, 0, "validate on the first so many tokens (0: all)")
    add("sample_every", natural, 1000, "steps between samples")
    add("save_every", natural, 250, "steps between checkpoints, of which two are kept")
    section = parser.add_argument_group("sampling: how text is generated")
    add("max_new_tokens", count, 500, "tokens in a sample")
    add("temperature", real, 0.8, "below 1 favours likely tokens more; 0 takes the likeliest")
    add("top_k", natural, None, "draw from the k likeliest tokens")
    add("top_p", number(float, 0, 1), None, "draw from the likeliest tokens of this probability")
    return parser


def fetch(function, name):
    """Call a function of prepro_tinyshakespeare.py, which fills data/, and return its result."""
    try:
        import prepro_tinyshakespeare
    except ModuleNotFoundError:
        raise UserError("data/ lacks what is needed; put prepro_tinyshakespeare.py, which gets it, "
                        "beside train_gpt2.py, or give --train_bin and --val_bin") from None
    return getattr(prepro_tinyshakespeare, function)(name)


def find_model(name):
    """The folder of a model: NAME, or the last checkpoint in it; data/NAME for OpenAI's models."""
    if name in PRESETS and name != "baby":
        if not (DATA / name / "model.safetensors").exists():
            fetch("download_model", name)
        return DATA / name
    return (checkpoints(name) or [Path(name)])[-1]


def parse_arguments(argv):
    """The options of a run, and the state in which a resumed run was saved (or None).

    An option that is given wins over that of a saved run, and that over the preset's. args.folder
    has the weights to start from; if args.steps is None, the run only prints samples.
    """
    parser = make_parser()
    first, _ = parser.parse_known_args([x for x in argv if x not in ("-h", "--help")])
    folder = state = None
    parser.set_defaults(**PRESETS[first.model])
    if first.init_from is not None:
        folder = find_model(first.init_from)
        sizes = asdict(read_config(folder))
        names = {size: name for name, size in Tokenizer.sizes.items()}
        tokenizer = names.get(sizes.pop("vocab_size"))  # it is no option
        preset = LARGE if tokenizer == "gpt2" else {}
        parser.set_defaults(**preset | sizes | FINE_TUNING | {"tokenizer": tokenizer})
    elif first.resume:
        require(checkpoints(first.out),
                f"--resume: {first.out} has no checkpoint; give the run's folder as --out")
        folder = checkpoints(first.out)[-1]
        state = read_state(folder)
        options = state["options"]
        sizes = asdict(read_config(folder)) | {"tokenizer": options["tokenizer"]}
        for name in "train_bin", "val_bin":
            options[name] = os.path.normpath(os.path.join(first.out, options[name]))
        argv = [f"--{name}={x}" for name, x in options.items()
                if x is not None and name in vars(first)] + argv  # other versions may have others
    args = parser.parse_args(argv)
    for name, value in sizes.items() if folder else ():
        require(getattr(args, name, value) == value, f"--{name} {getattr(args, name, value)} does "
                f"not fit {folder}, which has {value}; leave it out")
    require(args.tokenizer, f"{folder} has another vocabulary; give the --tokenizer to use with it")
    require((args.train_bin is None) == (args.val_bin is None),
            "--train_bin and --val_bin belong together; give both, or neither")
    args.seq_len = args.seq_len or min(64, args.n_positions)
    require(args.seq_len <= args.n_positions,
            f"--seq_len {args.seq_len} is more than --n_positions {args.n_positions}; lower it")
    require(state is None or args.steps > state["step"], f"--steps {args.steps}: the run has "
            "already completed that many steps; give a larger number")
    args.folder = folder
    return args, state


def make_model(args, state, B):
    """(model, generator of batches): new, or from the folder; B sequences must fit into memory."""
    config = read_config(args.folder) if args.folder else GPTConfig(
        Tokenizer.sizes[args.tokenizer], args.n_positions, args.n_embd, args.n_layer, args.n_head)
    shards = state["shards"] if state else choose_shards(config, B, args.seq_len, parallel.threads)
    arrays = 1 if args.steps is None else 3 + min(shards, B)  # parameters, moments, gradients
    n_bytes = 4 * (arrays * parameter_count(config) + activation_count(config, B * args.seq_len))
    memory = 2**47  # what a process on Windows can address
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(n_bytes <= memory, f"this model and batch need {n_bytes / 1e9:,.1f} GB of memory, the "
            f"system has {memory / 1e9:,.1f}; lower --n_layer, --n_embd, --batch_size or --seq_len")
    rng = np.random.default_rng([args.seed, 1])
    if state:
        model, rng = load_checkpoint(args.folder, state)
    elif args.folder:
        model = GPT2.from_pretrained(args.folder)
    else:
        model = GPT2(config, seed=args.seed)
    model.n_shards = shards
    return model, rng


def main():
    """The program."""
    STOP.clear()
    processes = Processes()
    leader = processes.rank == 0  # only this one prints and writes; others wait while it downloads
    if not leader:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        processes.sum(np.zeros(1))
    args, state = parse_arguments(sys.argv[1:])
    parallel.threads = args.threads or usable_cpus()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # a loss of nan is reported as such
    tokenizer = Tokenizer(args.tokenizer)
    if args.train_bin is None and args.steps is not None:
        paths = [DATA / f"tinyshakespeare_{args.tokenizer}_{part}.bin" for part in ("train", "val")]
        if not all(path.exists() for path in paths):
            paths = fetch("prepare", args.tokenizer)
        args.train_bin, args.val_bin = paths
    if leader:
        processes.sum(np.zeros(1))
    if args.steps is None:
        model, _ = make_model(args, state, 1)
        print_sample(model, tokenizer, args, 0)
    elif args.steps == 0:
        run = Run(args, state, tokenizer, processes)
        run.validate()
        print_sample(run.model, tokenizer, args, 0)
    else:
        with locked(args.out) if leader else contextlib.nullcontext():
            earlier = [int(path.name[5:]) for path in checkpoints(args.out)]
            require(args.resume or not earlier or not leader, f"{args.out} holds a run of "
                    f"{max(earlier, default=0)} steps: --resume continues it, --out starts another "
                    "elsewhere")
            Run(args, state, tokenizer, processes).take_steps()


def run_program(main):
    """Run main() and exit. An error that the user can fix prints one line, with status 2."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # models write characters that a terminal may not have
            stream.reconfigure(encoding="utf-8", errors="replace")
    status = 0
    try:
        main()
    except (UserError, OSError, MemoryError) as error:
        message = " ".join(str(error).split())  # one line
        if isinstance(error, OSError):
            message += "; check the path, permissions and space left"
        say(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT
    except SystemExit as end:
        status = end.code
    say("", end="")  # notices a closed pipe
    sys.exit(status or (STOP[0] if STOP else 0))


if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # for prepro_tinyshakespeare's imports
    run_program(main)
