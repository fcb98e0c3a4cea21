"""Train GPT-2 in one file of NumPy: every forward and backward pass is written by hand.

    python train_gpt2.py                          # train a small GPT-2 on Shakespeare, byte by byte
    python train_gpt2.py --model gpt2 --steps 10  # train the 124M model on GPT-2's own tokens
    python train_gpt2.py --help

There is no autograd and no framework: a network is a few flat arrays of numbers and, for every
layer, one function that goes forward and one that goes backward.

The task. A language model predicts the next token. A token is a byte of text, or a longer piece of
a word; the program works with its number, the id. The network reads T tokens and gives, at every
position, one score to each of the V tokens that may come next. These scores are called logits; the
softmax function turns them into probabilities. The loss at a position is -log(probability of the
token that did come next): how surprised the model is, in nats, the unit of the natural logarithm.
So the targets are the ids moved by one:

    text      R   O   M   E   O   :
    ids      82  79  77  69  79
    targets  79  77  69  79  58

Training computes the gradient of the mean loss, which says for every parameter how the loss changes
with it, and moves all parameters a small step downhill; thousands of times, on other tokens.

The network, with the shapes of what it computes:

    ids (B,T)
        | embedding: one vector for the token plus one for its position
    x (N,C), the residual stream: every branch reads it and adds its result to it
        |---- layernorm, linear, attention, linear ---+
        + <-------------------------------------------+   these two branches are a block;
        |---- layernorm, linear, GELU, linear --------+   there are L blocks
        + <-------------------------------------------+
        | layernorm, linear
    logits (N,V)
        | cross-entropy with the targets
    losses (N,)

    B  sequences in a batch        C  channels, the width of the residual stream
    T  tokens in a sequence        H  attention heads, each of D = C/H channels
    N  = B*T positions             L  blocks
    V  tokens in the vocabulary    K  outputs of a linear layer
    S  positions that attention may look at: T in training, more when sampling

The rules:
  - The chain rule. If a layer computes y from x, a change of x_j changes the loss through every y_i
    that depends on x_j. So the gradients of the loss with respect to x and y are related by
        dx_j = sum_i dy_i ∂y_i/∂x_j.
    A backward function computes dx from dy in this way. dx always is the gradient of the loss, an
    array of the shape of x; ∂y_i/∂x_j is the partial derivative of one number by another.
  - Functions write into arrays that they are given: outputs first, then inputs, then weights. So
    memory is allocated once, and the same code runs in float32 and float64, as the arrays decide.
  - Gradients of activations are written. Gradients of parameters are added to what is there: a
    parameter that is used more than once (in several positions, layers or batches) gets the sum of
    the gradients of all uses, again by the chain rule.
  - All parameters lie in one flat array, so do all gradients and the optimizer's two moments. One
    table has the names and shapes; a parameter is a view of its part of the array.

Functions appear in the order in which data flows through them: layers, block and network, model,
optimizer, sampling, tokens, training, checkpoints. Processes, threads and the command line come
last; the rest can be read without them. test_gpt2.py compares every function with PyTorch.
"""
import argparse
import atexit
import codecs
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
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

# NumPy's BLAS must use one thread, as this file has threads of its own (see Threads). BLAS reads
# these variables when it is loaded; afterwards they are removed, so other libraries keep theirs.
_names = "OPENBLAS_NUM_THREADS MKL_NUM_THREADS BLIS_NUM_THREADS VECLIB_MAXIMUM_THREADS".split()
_added = {name: "1" for name in _names if name not in os.environ}
if "numpy" in sys.modules and not os.environ.keys() & {*_names, "OMP_NUM_THREADS"}:
    print("train_gpt2: numpy was imported first, so the threads of its BLAS compete with ours and "
          "steps take up to twice as long; import train_gpt2 before numpy", file=sys.stderr)
os.environ.update(_added)
import numpy as np  # noqa: E402

if int(np.__version__.split(".")[0]) < 2:
    print(f"NumPy {np.__version__} is too old; pip install 'numpy>=2'", file=sys.stderr)
    sys.exit(2)
np.ones((8, 8)) @ np.ones((8, 8))  # some BLAS libraries are loaded by the first product
for _name in _added:
    del os.environ[_name]


class UserError(ValueError):
    """A mistake that the user can correct: the message names the thing, its value, the way out."""


def require(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def by_rows(names, sums="", heads=False):
    """Decorate a layer that treats all rows of its arrays alike, so that threads share the rows.

    Read a decorated function as if it got whole arrays: the result is the same. `names` lists the
    arguments that are cut into blocks of rows (with heads=True, of sequences and heads); `sums`
    lists arrays that the function adds to, such as dweight. All others are passed whole.
    """
    def decorate(function):
        order = list(inspect.signature(function).parameters)
        cut, summed = ([order.index(name) for name in x.split()] for x in (names, sums))
        return functools.wraps(function)(
            lambda *args: run_in_blocks(function, args, cut, summed, heads))
    return decorate


# ------------------------------------------------------------------------------------------------
# Layers, each forward function directly above its backward function.

def embedding_forward(out, ids, wte, wpe):
    """The vector of each token plus the vector of its position: out_bt = wte[ids_bt] + wpe_t.

    ids (B,T), wte (V,C), wpe (T or more,C) -> out (N,C). Radford et al. 2018, equation 2.
    """
    B, T = ids.shape
    # out = wte[ids] + wpe[:T]
    np.take(wte, ids.ravel(), axis=0, out=out, mode="clip")  # the default mode would copy `out`
    by_sequence = out.reshape(B, T, -1)
    by_sequence += wpe[:T]


# Row i of wte is added to out_bt wherever ids_bt = i, and row t of wpe in every sequence b. Hence
#
#     dwte_i = sum of dout_bt over all (b,t) with ids_bt = i,    dwpe_t = sum_b dout_bt
#
# `dwte[ids.ravel()] += dout` would be wrong without any error: when an id occurs twice, NumPy adds
# only one of its gradients. Instead we sort the positions by id, sum each run of equal ids, and add
# every sum to its row once.

def embedding_backward(dwte, dwpe, dout, ids):
    """Add to dwte (V,C) and dwpe (T or more,C), from dout (N,C) and ids (B,T).

    Sorting the ids 5 7 5 takes positions 0 2 1; in 5 5 7, runs start at 0 and at 2. Row 5 gets two
    gradients:

    >>> dwte, dwpe = np.zeros((8, 1)), np.zeros((3, 1))
    >>> embedding_backward(dwte, dwpe, np.array([[1.], [10.], [100.]]), np.array([[5, 7, 5]]))
    >>> dwte.ravel(), dwpe.ravel()
    (array([  0.,   0.,   0.,   0.,   0., 101.,   0.,  10.]), array([  1.,  10., 100.]))
    """
    B, T = ids.shape
    dwpe[:T] += dout.reshape(B, T, -1).sum(axis=0)
    order = np.argsort(ids, axis=None, kind="stable")
    sorted_ids = ids.ravel()[order]
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    dwte[sorted_ids[starts]] += np.add.reduceat(dout[order], starts, axis=0)


@by_rows("out mean rstd inp")
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Layer normalization: shift each row to mean 0, scale it to variance 1, apply weight and bias.

        out = (inp - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + 1e-5)

    inp (N,C), weight (C,), bias (C,) -> out (N,C), mean (N,1), rstd (N,1). Ba et al. 2016, eq. 4.
    """
    average = np.full((inp.shape[1], 1), 1 / inp.shape[1], inp.dtype)  # x @ average: means of rows
    mean[...] = inp @ average
    shifted = inp - mean
    rstd[...] = 1 / np.sqrt(shifted**2 @ average + 1e-5)
    out[...] = shifted * rstd * weight + bias


# In one row of C numbers, xhat_i = (x_i - mean) rstd and out_i = xhat_i weight_i + bias_i. Hence
#
#     dweight_i = dout_i xhat_i,    dbias_i = dout_i,    dxhat_i = dout_i weight_i,
#
# where dweight and dbias are summed over the rows, which share them. x_j affects xhat_i in three
# ways: directly if i = j, through mean, and through rstd. Write [i=j] for 1 if i = j, else 0, and
# eps for 1e-5. As var = 1/C sum_i (x_i - mean)^2,
#
#     ∂mean/∂x_j   = 1/C
#     ∂var/∂x_j    = 2/C sum_i (x_i - mean) ([i=j] - 1/C)
#                  = 2/C (x_j - mean)                       since sum_i (x_i - mean) = 0
#     ∂rstd/∂x_j   = -1/2 (var + eps)^(-3/2) ∂var/∂x_j = -1/2 rstd^3 ∂var/∂x_j = -1/C rstd^2 xhat_j
#     ∂xhat_i/∂x_j = rstd ([i=j] - 1/C) + (x_i - mean) ∂rstd/∂x_j
#                  = rstd ([i=j] - 1/C - xhat_i xhat_j / C)
#
# The chain rule sums over every xhat_i that x_j affects, dx_j = sum_i dxhat_i ∂xhat_i/∂x_j:
#
#     dx_j = rstd (dxhat_j - mean(dxhat) - xhat_j mean(dxhat xhat))
#
# One term for each way. Adding a number to the whole row does not change xhat, so the loss has no
# slope in that direction: dx sums to 0, as the example shows.

@by_rows("dinp dout inp mean rstd", sums="dweight dbias")
def layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight):
    """Write dinp (N,C), which may be dout itself; add to dweight (C,) and dbias (C,).

    >>> (x, dout), (out, dx) = np.array([[[1., 2., 3.]], [[1., 0., 0.]]]), np.empty((2, 1, 3))
    >>> mean, rstd = np.empty((2, 1, 1))
    >>> weight, bias, dweight, dbias = np.ones(3), np.zeros(3), np.zeros(3), np.zeros(3)
    >>> layernorm_forward(out, mean, rstd, x, weight, bias)
    >>> layernorm_backward(dx, dweight, dbias, dout, x, mean, rstd, weight)
    >>> out.round(3), dx.round(3)
    (array([[-1.225,  0.   ,  1.225]]), array([[ 0.204, -0.408,  0.204]]))
    """
    N, C = inp.shape
    average, ones = np.full((C, 1), 1 / C, inp.dtype), np.ones(N, inp.dtype)
    xhat = (inp - mean) * rstd
    dweight += ones @ (dout * xhat)  # the sum over the rows
    dbias += ones @ dout
    dxhat = dout * weight
    dinp[...] = rstd * (dxhat - dxhat @ average - xhat * ((dxhat * xhat) @ average))


def linear_forward(out, inp, weight, bias=None):
    """A linear layer: every output is a weighted sum of the inputs. out = inp @ weight + bias.

    inp (N,C), weight (C,K), bias (K,) or None -> out (N,K).
    """
    matmul(out, inp, weight, bias)  # read it as out[...] = inp @ weight + bias


# out_nk = sum_c inp_nc weight_ck + bias_k has the partial derivatives ∂out_nk/∂inp_nc = weight_ck,
# ∂out_nk/∂weight_ck = inp_nc and ∂out_nk/∂bias_k = 1. The chain rule sums over affected outputs:
#
#     dinp_nc = sum_k dout_nk weight_ck           as a matrix product, dinp = dout @ weight^T
#     dweight_ck = sum_n inp_nc dout_nk           dweight = inp^T @ dout
#     dbias_k = sum_n dout_nk

def linear_backward(dinp, dweight, dbias, dout, inp, weight):
    """Write dinp (N,C); add to dweight (C,K) and to dbias (K,), if that is not None.

    >>> inp, weight = np.array([[1., 2.]]), np.array([[3., 4.], [5., 6.]])
    >>> (out, dinp), dweight, dbias = np.empty((2, 1, 2)), np.zeros((2, 2)), np.zeros(2)
    >>> linear_forward(out, inp, weight)
    >>> linear_backward(dinp, dweight, dbias, np.array([[1., 10.]]), inp, weight)
    >>> out, dinp, dweight.tolist(), dbias
    (array([[13., 16.]]), array([[43., 65.]]), [[1.0, 10.0], [2.0, 20.0]], array([ 1., 10.]))
    """
    matmul(dinp, dout, weight.T)
    matmul(dweight, inp.T, dout, add=True)  # dweight += inp.T @ dout
    if dbias is not None:  # dbias += dout.sum(axis=0), as a product with a row of ones
        matmul(dbias.reshape(1, -1), np.ones((1, len(dout)), dout.dtype), dout, add=True)


# Causal self-attention is the only layer in which positions exchange information. Three linear maps
# of the residual stream, computed as one product, give every position t a query q_t, a key k_t and
# a value v_t, each of D numbers. The query says what position t looks for, the key what a position
# offers, the value what it passes on. Position t gets a weighted mean of values:
#
#     1. score_ts = q_t · k_s / sqrt(D)                      how well the key s matches the query t
#     2. att_ts   = exp(score_ts) / sum_r exp(score_tr)      softmax: positive weights of sum 1
#     3. out_t    = sum_s att_ts v_s
#
# The causal mask sets score_ts to minus infinity for s > t, so att_ts = 0 there: no position sees
# what comes after it, and all T predictions can be trained at once. All this happens in H heads
# side by side, each with D of the C channels: a position can look for H things at once.

@functools.cache
def causal_mask(t):
    """A matrix (t,t): minus infinity above the diagonal, 0 elsewhere."""
    return np.triu(np.full((t, t), -np.inf, np.float32), 1)


def score_blocks(q, k):
    """Step 1 in blocks of queries: yields (slice of queries, slice of keys, scores (B,H,t,s)).

    A block needs only the keys up to its last query. More blocks need fewer keys; larger ones are
    computed faster.
    """
    T, S, scale = q.shape[2], k.shape[2], 1 / math.sqrt(q.shape[3])
    size = max(64, T // 8)
    for start in range(0, T, size):
        t = min(size, T - start)
        queries, keys = slice(start, start + t), slice(0, S - T + start + t)
        scores = (q[:, :, queries] * scale) @ k[:, :, keys].swapaxes(2, 3)
        scores[..., -t:] += causal_mask(t)
        yield queries, keys, scores


@by_rows("out lse q k v", heads=True)
def attention_forward(out, lse, q, k, v):
    """Causal attention: out_t = sum_s softmax_s(q_t · k_s / sqrt(D)) v_s over the s up to t.

    q (B,H,T,D), k and v (B,H,S,D) -> out (B,H,T,D), lse (B,H,T,1). The queries are the last T of S
    positions: S = T in training, S > T with a KV cache (see Sampling). The backward pass needs
    lse_t = log(sum_s exp(score_ts)), called log-sum-exp: with it, att_ts = exp(score_ts - lse_t)
    can be recomputed. So every head keeps T numbers instead of a (T,S) matrix. Vaswani et al. 2017,
    equation 1 and section 3.2.2; Dao et al. 2022 (FlashAttention), section 3.1.
    """
    for queries, keys, att in score_blocks(q, k):
        # att = softmax(scores);  lse = log(sum(exp(scores)));  out = att @ v
        row_max = att.max(axis=-1, keepdims=True)
        att -= row_max  # the largest exponential is exp(0), so none overflows
        np.exp(att, out=att)
        row_sum = att.sum(axis=-1, keepdims=True)
        lse[:, :, queries] = row_max + np.log(row_sum)
        out[:, :, queries] = att @ v[:, :, keys] / row_sum


# The three steps backward, in one head:
#
#     3. out_td = sum_s att_ts v_sd is a matrix product, as in the linear layer:
#            datt_ts = sum_d dout_td v_sd,    dv_sd = sum_t att_ts dout_td
#     2. In row t, let e_s = exp(score_s) and Z = sum_r e_r, so att_s = e_s / Z. Since
#        ∂e_s/∂score_r = [s=r] e_s and ∂Z/∂score_r = e_r, the quotient rule gives
#            ∂att_s/∂score_r = ([s=r] e_s Z - e_s e_r) / Z^2 = att_s ([s=r] - att_r)
#            dscore_r = sum_s datt_s ∂att_s/∂score_r = att_r (datt_r - sum_s datt_s att_s)
#        The sum is the same for all r of a row; call it delta. It is cheaper to get from out:
#            delta = sum_s datt_s att_s = sum_s sum_d dout_d v_sd att_s = sum_d dout_d out_d
#     1. score_ts = sum_d q_td k_sd / sqrt(D) is a matrix product again:
#            dq_td = sum_s dscore_ts k_sd / sqrt(D),    dk_sd = sum_t dscore_ts q_td / sqrt(D)
#
# The causal mask needs no line of its own: a masked score has att = 0, and so dscore = 0.

@by_rows("dq dk dv dout out lse q k v", heads=True)
def attention_backward(dq, dk, dv, dout, out, lse, q, k, v):
    """Write dq (B,H,T,D), dk and dv (B,H,S,D); dout (B,H,T,D), the rest as in attention_forward.

    One head with D = 1. The first query sees one key. The second has scores 0 and log 2, so att is
    (1/3, 2/3), and out = 1/3 * 3 + 2/3 * 6 = 5. With dout = 1, datt = v = (3, 6); minus delta = 5
    that is (-2, 1), times att it is dscore = (-2/3, 2/3). As q = 1, so is dk:

    >>> q, k, v = np.reshape([9, 1, 0, np.log(2), 3, 6], (3, 1, 1, 2, 1))
    >>> out, lse, dq, dk, dv = np.empty((5, 1, 1, 2, 1))
    >>> attention_forward(out, lse, q, k, v)
    >>> attention_backward(dq, dk, dv, np.reshape([0., 1.], (1, 1, 2, 1)), out, lse, q, k, v)
    >>> out.ravel().round(3), dk.ravel().round(3), dv.ravel().round(3)
    (array([3., 5.]), array([-0.667,  0.667]), array([0.333, 0.667]))
    """
    scale = 1 / math.sqrt(q.shape[3])
    dk[...] = 0
    dv[...] = 0
    for queries, keys, att in score_blocks(q, k):
        q_, dout_, out_, lse_ = (x[:, :, queries] for x in (q, dout, out, lse))
        att -= lse_
        np.exp(att, out=att)
        dv[:, :, keys] += att.swapaxes(2, 3) @ dout_
        # dscore = att * (dout @ v.T - delta)
        dscore = dout_ @ v[:, :, keys].swapaxes(2, 3)
        dscore -= np.vecdot(dout_, out_)[..., None]
        dscore *= att
        dq[:, :, queries] = dscore @ k[:, :, keys] * scale
        dk[:, :, keys] += dscore.swapaxes(2, 3) @ (q_ * scale)


# GELU is the nonlinear function between the two linear layers of a block; without it they would be
# no more than one. In GPT-2 it is x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3). The
# sigmoid function s(z) = 1 / (1 + exp(-z)) equals (1 + tanh(z/2)) / 2, so GELU is x s(z) with
# z = 2u = x (GELU_1 + GELU_3 x^2). This needs one exponential and is exact too.

GELU_1 = 2 * math.sqrt(2 / math.pi)
GELU_3 = GELU_1 * 0.044715


def one_plus_exp(x):
    """1 + exp(-z) for z = x (GELU_1 + GELU_3 x^2)."""
    with np.errstate(over="ignore"):  # if exp overflows, x / inf = 0 is the correct limit
        return 1 + np.exp(x * (-GELU_1 - GELU_3 * x**2))


@by_rows("out inp")
def gelu_forward(out, inp):
    """GELU: positive x pass, negative x are held back. out = x s(z) = x / (1 + exp(-z)).

    inp (N,K) -> out (N,K). Hendrycks & Gimpel 2016, section 2, in the tanh form.
    """
    np.divide(inp, one_plus_exp(inp), out=out)


# The sigmoid has the derivative ∂s/∂z = exp(-z) / (1 + exp(-z))^2 = s (1 - s). By the product rule
#
#     ∂out/∂x = s + x s (1 - s) ∂z/∂x = s (1 + (1 - s) x ∂z/∂x),    ∂z/∂x = GELU_1 + 3 GELU_3 x^2

@by_rows("dinp dout inp")
def gelu_backward(dinp, dout, inp):
    """Write dinp (N,K), which may be dout itself: dinp = dout * ∂out/∂x.

    >>> out, dinp, inp = np.empty((1, 3)), np.empty((1, 3)), np.array([[-1., 0., 1.]])
    >>> gelu_forward(out, inp)
    >>> gelu_backward(dinp, np.ones((1, 3)), inp)
    >>> out.round(3), dinp.round(3)  # at x = 0, ∂out/∂x = s = 1/2
    (array([[-0.159,  0.   ,  0.841]]), array([[-0.083,  0.5  ,  1.083]]))
    """
    s = 1 / one_plus_exp(inp)
    slope = s * (1 + (1 - s) * inp * (GELU_1 + 3 * GELU_3 * inp**2))
    np.multiply(dout, slope, out=dinp)


@by_rows("losses lse logits targets")
def crossentropy_forward(losses, lse, logits, targets):
    """Cross-entropy: the surprise -log(softmax(logits)_target) at every position, in nats.

    logits (N,V), targets (N,) -> losses (N,), and for the backward pass lse (N,1). With
    lse = log(sum_j exp(logits_j)), softmax_j = exp(logits_j - lse), so the loss is
    lse - logits_target. Bishop 2006, equation 4.108.
    """
    row_max = logits.max(axis=1, keepdims=True)
    shifted = logits - row_max  # the largest exponential is exp(0): none overflows
    target = shifted[np.arange(len(targets)), targets]
    log_sum = np.log(np.exp(shifted, out=shifted).sum(axis=1, keepdims=True))
    losses[...] = log_sum[:, 0] - target
    lse[...] = log_sum + row_max


# ∂lse/∂logits_j = exp(logits_j) / sum_i exp(logits_i) = probs_j, and ∂logits_target/∂logits_j is 1
# if j is the target, else 0. So softmax and logarithm together have a simple derivative, the
# predicted probability minus 1 for the target: ∂loss/∂logits_j = probs_j - [j=target].

@by_rows("dlogits lse logits targets")
def crossentropy_backward(dlogits, dloss, lse, logits, targets):
    """Write dlogits (N,V), which may be logits itself. dloss is a number, the same for all losses.

    Logits 0, log 2, 0 are probabilities 1/4, 1/2, 1/4. A target of probability 1/2 costs log 2:

    >>> logits, target = np.array([[0., np.log(2), 0.]]), np.array([1])
    >>> losses, lse, dlogits = np.empty(1), np.empty((1, 1)), np.empty((1, 3))
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
# The block and the network. The activations of a block are in a dict `a`:
#
#     x, out      (N,C)      the residual stream before and after the block
#     x_mid       (N,C)      the residual stream between the two branches
#     ln_1, ln_2  (N,C)      output of the first and second layernorm (*)
#     ln_1.stats  (2,N,1)    mean and rstd of the first layernorm; ln_2.stats of the second (*)
#     qkv         (N,3C)     queries, keys and values side by side; q, k, v (B,H,T,D) are its views
#     lse         (B,H,T,1)  log-sum-exp of attention
#     att         (N,C)      output of attention; heads (B,H,T,D) is a view of it
#     hidden      (N,4C)     the MLP (multilayer perceptron) between its two linear layers
#     gelu        (N,4C)     GELU of hidden (*)
#
# The arrays marked (*) are cheap to recompute from the others. So in large models all blocks share
# one of each, and the backward pass recomputes them. p has the parameters of a block, a pair
# (weight, bias) for each layer, and g has their gradients.

def block_forward(a, p, cache=None):
    """One block, x -> out, with a KV cache (2,B,H,S,D) if there is one (see Sampling).

    Radford et al. 2019, section 2.3: the layernorms are inside the branches.
    """
    layernorm_forward(a["ln_1"], *a["ln_1.stats"], a["x"], *p["ln_1"])       # (N,C)
    linear_forward(a["qkv"], a["ln_1"], *p["attn.c_attn"])                   # (N,3C)
    k, v = a["k"], a["v"]                                                    # (B,H,T,D)
    if cache is not None:
        cache[..., -k.shape[2]:, :] = k, v
        k, v = cache                                                         # (B,H,S,D)
    attention_forward(a["heads"], a["lse"], a["q"], k, v)                    # (B,H,T,D)
    linear_forward(a["x_mid"], a["att"], *p["attn.c_proj"])                  # (N,C)
    a["x_mid"] += a["x"]
    layernorm_forward(a["ln_2"], *a["ln_2.stats"], a["x_mid"], *p["ln_2"])   # (N,C)
    linear_forward(a["hidden"], a["ln_2"], *p["mlp.c_fc"])                   # (N,4C)
    gelu_forward(a["gelu"], a["hidden"])                                     # (N,4C)
    linear_forward(a["out"], a["gelu"], *p["mlp.c_proj"])                    # (N,C)
    a["out"] += a["x_mid"]


# A branch computes out = x + f(x), so ∂out_i/∂x_j = [i=j] + ∂f_i/∂x_j, and the chain rule gives
# dx_j = dout_j + sum_i dout_i ∂f_i/∂x_j: the gradient of the output, plus the same gradient taken
# backward through the branch. The first term reaches every block unchanged, which is why deep
# networks can be trained. In the code, dx is one array for the whole residual stream, to which
# each branch adds its part.

def block_backward(dx, g, a, p):
    """Turn dx (N,C), the gradient of out, into the gradient of x; add to the gradients g."""
    dbranch, dhidden = a["dbranch"], a["dhidden"]
    if a["recompute"]:
        layernorm_forward(a["ln_1"], *a["ln_1.stats"], a["x"], *p["ln_1"])
        layernorm_forward(a["ln_2"], *a["ln_2.stats"], a["x_mid"], *p["ln_2"])
        gelu_forward(a["gelu"], a["hidden"])
    linear_backward(dhidden, *g["mlp.c_proj"], dx, a["gelu"], p["mlp.c_proj"][0])        # (N,4C)
    gelu_backward(dhidden, dhidden, a["hidden"])                                         # (N,4C)
    linear_backward(dbranch, *g["mlp.c_fc"], dhidden, a["ln_2"], p["mlp.c_fc"][0])       # (N,C)
    layernorm_backward(dbranch, *g["ln_2"], dbranch, a["x_mid"], *a["ln_2.stats"], p["ln_2"][0])
    dx += dbranch                                                                        # (N,C)
    linear_backward(dbranch, *g["attn.c_proj"], dx, a["att"], p["attn.c_proj"][0])       # (N,C)
    attention_backward(a["dq"], a["dk"], a["dv"], a["dheads"],                       # (B,H,T,D)
                       a["heads"], a["lse"], a["q"], a["k"], a["v"])
    linear_backward(dbranch, *g["attn.c_attn"], a["dqkv"], a["ln_1"], p["attn.c_attn"][0])
    layernorm_backward(dbranch, *g["ln_1"], dbranch, a["x"], *a["ln_1.stats"], p["ln_1"][0])
    dx += dbranch                                                                        # (N,C)


# The network: embedding, blocks, a last layernorm, and a linear layer that gives the logits. That
# layer uses the embedding as its weights, logits = x @ wte.T (tied weights): a token gets a high
# logit if x points in the direction of the token's own vector.

def network_forward(a, p, ids, targets=None, past=0, cache=None):
    """ids (B,T) -> a["logits"] (N,V), and with targets (B,T) also a["losses"] (N,).

    With a KV cache (L,2,B,H,S,D), `past` of the S = past + T positions were computed before.
    """
    (wte,), (wpe,) = p["wte"], p["wpe"]
    embedding_forward(a["x"], ids, wte, wpe[past:])                          # (N,C)
    for i, (a_block, p_block) in enumerate(zip(a["blocks"], p["blocks"])):
        block_forward(a_block, p_block, None if cache is None else cache[i])  # (N,C)
    layernorm_forward(a["ln_f"], *a["ln_f.stats"], a["out"], *p["ln_f"])     # (N,C)
    linear_forward(a["logits"], a["ln_f"], wte.T)                            # (N,V)
    if targets is not None:
        crossentropy_forward(a["losses"], a["logits.lse"], a["logits"], targets.ravel())  # (N,)


# wte is used twice, so it gets two gradients: from the logits at the beginning, from the embedding
# at the end. The logits are the largest array; their gradient overwrites them.

def network_backward(g, a, p, ids, targets, dloss):
    """Add to the gradients g; dloss is the gradient of every single loss, a number."""
    ((wte,), (dwte,), (dwpe,)), dx = (p["wte"], g["wte"], g["wpe"]), a["dx"]
    crossentropy_backward(a["logits"], dloss, a["logits.lse"], a["logits"], targets.ravel())
    linear_backward(dx, dwte.T, None, a["logits"], a["ln_f"], wte.T)         # (N,C)
    layernorm_backward(dx, *g["ln_f"], dx, a["out"], *a["ln_f.stats"], p["ln_f"][0])
    for g_block, a_block, p_block in reversed([*zip(g["blocks"], a["blocks"], p["blocks"])]):
        block_backward(dx, g_block, a_block, p_block)                        # (N,C)
    embedding_backward(dwte, dwpe, dx, ids)


# ------------------------------------------------------------------------------------------------
# The model: a table of names and shapes, and flat arrays that hold all numbers.

@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT-2, named as in its config.json; the defaults are the 124M model's."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(type(value) is int and value > 0,
                    f"{name} is {value!r}; it must be a whole number above 0")
        require(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} does not divide into n_head "
                f"{self.n_head} heads; choose a multiple")


def parameter_table(config):
    """{name: shape} of all parameters, under GPT-2's own names; weights are (inputs, outputs).

    Matrices come first: only they decay in AdamW, and so they are one slice of a flat array.
    """
    C = config.n_embd
    table = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.n_positions, C)}
    for h in (f"h.{i}" for i in range(config.n_layer)):
        table |= {f"{h}.ln_1.weight": (C,), f"{h}.ln_1.bias": (C,),
                  f"{h}.attn.c_attn.weight": (C, 3 * C), f"{h}.attn.c_attn.bias": (3 * C,),
                  f"{h}.attn.c_proj.weight": (C, C), f"{h}.attn.c_proj.bias": (C,),
                  f"{h}.ln_2.weight": (C,), f"{h}.ln_2.bias": (C,),
                  f"{h}.mlp.c_fc.weight": (C, 4 * C), f"{h}.mlp.c_fc.bias": (4 * C,),
                  f"{h}.mlp.c_proj.weight": (4 * C, C), f"{h}.mlp.c_proj.bias": (C,)}
    table |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return dict(sorted(table.items(), key=lambda item: -len(item[1])))


MAX_KEPT = 1 << 26  # parameters of a small model, and elements that it keeps instead of recomputing


def activation_table(config, B, T, for_backward=True):
    """{name: shape}. The first axis is the block; its length is 1 if all blocks share one array.

    Small models keep what large ones recompute. Without a backward pass nothing is kept.
    """
    N, C, H, L = B * T, config.n_embd, config.n_head, config.n_layer if for_backward else 1
    small = max(count(parameter_table(config)), 6 * L * N * C) <= MAX_KEPT
    kept = L if small else 1
    table = {"x": (L + 1, N, C), "ln_1": (kept, N, C), "ln_1.stats": (kept, 2, N, 1),
             "qkv": (L, N, 3 * C), "lse": (L, B, H, T, 1), "att": (L, N, C), "x_mid": (L, N, C),
             "ln_2": (kept, N, C), "ln_2.stats": (kept, 2, N, 1), "hidden": (L, N, 4 * C),
             "gelu": (kept, N, 4 * C), "ln_f": (1, N, C), "ln_f.stats": (1, 2, N, 1),
             "logits": (1, N, config.vocab_size), "logits.lse": (1, N, 1), "losses": (1, N)}
    if for_backward:
        table |= {"dx": (1, N, C), "dbranch": (1, N, C), "dhidden": (1, N, 4 * C),
                  "dqkv": (1, N, 3 * C)}
    return table


def count(table):
    """The number of elements in a table."""
    return sum(math.prod(shape) for shape in table.values())


def views(flat, table):
    """{name: view} of a flat array. d[name][...] = x writes to a view; d[name] = x replaces it."""
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in table.values()])[:-1])
    return {name: part.reshape(table[name]) for name, part in zip(table, parts)}


def by_layer(arrays, n_layer):
    """{"ln_f.weight": w, "ln_f.bias": b, ...} -> {"ln_f": [w, b], ..., "blocks": [{...}, ...]}.

    The arrays of h.2.ln_1 are in blocks[2]["ln_1"].
    """
    layers = {"blocks": [{} for _ in range(n_layer)]}
    for name, array in arrays.items():
        block, layer = re.match(r"(?:h\.(\d+)\.)?(.*)\.", name).groups()
        place = layers["blocks"][int(block)] if block else layers
        place.setdefault(layer, []).append(array)
    return layers


class Shard:
    """Some sequences of a batch (a slice), with activations and gradients of their own.

    Sequences interact only through the sum of their gradients. So for small models each thread
    takes a slice of the batch through the whole network; large models have a single shard.
    """

    def __init__(self, config, sequences, T, for_backward, flat_grads):
        B, H, L = sequences.stop - sequences.start, config.n_head, config.n_layer
        table = activation_table(config, B, T, for_backward)
        arrays = views(np.empty(count(table), flat_grads.dtype), table)
        blocks = [{name: x[i % len(x)] for name, x in arrays.items()} for i in range(L)]
        for i, a in enumerate(blocks):
            a["out"] = arrays["x"][(i + 1) % len(arrays["x"])]
            a["recompute"] = len(arrays["gelu"]) < L
            for name, heads in {"qkv": ["q", "k", "v"], "att": ["heads"],
                                "dqkv": ["dq", "dk", "dv"], "dbranch": ["dheads"]}.items():
                if name in a:  # (N, several C) -> several (B,H,T,D)
                    x = a[name].reshape(B, T, len(heads), H, -1)
                    a |= zip(heads, x.transpose(2, 0, 3, 1, 4))
        self.sequences, self.flat_grads = sequences, flat_grads
        self.a = blocks[-1] | {"x": blocks[0]["x"], "blocks": blocks}
        self.g = by_layer(views(flat_grads, parameter_table(config)), L)


class GPT2:
    """GPT-2 (Radford et al. 2019), its gradients, and the moments of its optimizer.

    params and grads are {name: view} of flat_params and flat_grads, laid out by parameter_table. A
    batch is processed in at most n_shards shards. seed=None leaves the parameters to be filled.

    >>> model = GPT2(GPTConfig(vocab_size=5, n_positions=4, n_embd=6, n_layer=1, n_head=2))
    >>> for step in range(30):
    ...     loss = model.forward([[0, 1, 2]], targets=[[1, 2, 3]])
    ...     model.backward()
    ...     norm = model.update(lr=0.1)
    >>> model.forward([[0, 1, 2]]).argmax(axis=-1)
    array([[1, 2, 3]])
    """

    def __init__(self, config, dtype=np.float32, seed=1337):
        self.config, table, self.n_shards, self.step = config, parameter_table(config), 1, 0
        self.flat_params = np.empty(count(table), dtype)
        self.flat_grads, self.flat_m, self.flat_v = np.zeros((3, self.flat_params.size), dtype)
        self.params, self.grads = views(self.flat_params, table), views(self.flat_grads, table)
        self.layers, self.layout, self.batch = by_layer(self.params, config.n_layer), None, None
        rng = np.random.default_rng(seed)
        for name, param in self.params.items() if seed is not None else ():
            if param.ndim == 1:
                param[...] = name.endswith(".weight")  # 1; biases are 0
            else:
                # A c_proj ends each of the 2L branches, whose results add up in the residual
                # stream. Smaller ones keep the sum from growing with L (section 2.3).
                rng.standard_normal(dtype=param.dtype, out=param)
                param *= 0.02 / math.sqrt(2 * config.n_layer if "c_proj" in name else 1)

    @classmethod
    def from_pretrained(cls, folder, dtype=np.float32):
        """The model in a folder in Hugging Face's format. Raises UserError if it is not a GPT-2."""
        model = cls(read_config(folder), dtype, seed=None)
        read_tensors(Path(folder) / "model.safetensors", model.params)
        return model

    def save_pretrained(self, folder):
        """Write the files that transformers.GPT2LMHeadModel reads; returns the weights' CRC-32."""
        folder, last = Path(folder), self.config.vocab_size - 1
        config = {"architectures": ["GPT2LMHeadModel"], **PLAIN_GPT2, **asdict(self.config),
                  "bos_token_id": last, "eos_token_id": last}
        limit = {"max_length": self.config.n_positions}  # for transformers' pipeline
        write_file(folder / "config.json", json.dumps(config, indent=2).encode())
        write_file(folder / "generation_config.json", json.dumps(limit).encode())
        return write_tensors(folder / "model.safetensors",
                             {f"transformer.{name}": x for name, x in self.params.items()})

    def _checked(self, ids, name="ids"):
        """ids as an array (B,T) of tokens that this model knows. Raises UserError otherwise."""
        ids, V, context = np.asarray(ids), self.config.vocab_size, self.config.n_positions
        require(ids.ndim == 2 and ids.size and ids.dtype.kind in "iu" and ids.shape[1] <= context,
                f"{name} must be whole numbers of shape (B,T) with T from 1 to {context}, not "
                f"{ids.dtype} {ids.shape}")
        require(0 <= ids.min() and ids.max() < V,
                f"{name} are in {ids.min()}..{ids.max()}, outside the vocabulary of {V} tokens")
        return ids

    def _run(self, ids, targets=None, for_backward=False, past=0, cache=None):
        """The forward pass of all shards, which are laid out anew if the shape has changed."""
        self.batch, (B, T) = (ids, targets) if for_backward else None, ids.shape
        layout = B, T, for_backward, self.n_shards
        if self.layout != layout:
            self.layout, self.shards = layout, []  # frees the old activations first
            for sequences in split(B, self.n_shards):
                first = not self.shards or not for_backward
                grads = self.flat_grads if first else np.zeros_like(self.flat_grads)
                self.shards.append(Shard(self.config, sequences, T, for_backward, grads))

        def forward(shard):
            own = shard.sequences
            network_forward(shard.a, self.layers, ids[own], None if targets is None
                            else targets[own], past, None if cache is None else cache[:, :, own])
        parallel(forward, self.shards)

    def logits(self):
        """The logits (B,T,V) of the last forward pass, as a new array."""
        logits = np.concatenate([shard.a["logits"] for shard in self.shards])
        return logits.reshape(*self.layout[:2], -1)

    def forward(self, ids, targets=None, for_backward=True):
        """ids (B,T) -> logits (B,T,V), a new array; with targets (B,T) -> the mean loss, a float.

        With for_backward=False the loss takes a fraction of the memory. Raises UserError for ids or
        targets that do not fit the model.
        """
        ids = self._checked(ids)
        if targets is None:
            self._run(ids)
            return self.logits()
        targets = self._checked(targets, "targets")
        require(targets.shape == ids.shape, f"targets have shape {targets.shape}, ids {ids.shape}")
        self._run(ids, targets, for_backward)
        return float(np.concatenate([shard.a["losses"] for shard in self.shards]).mean())

    def backward(self, dloss=1.0):
        """Add dloss times the gradient of forward()'s loss to grads, which update() sets to 0.

        Raises UserError unless a forward(ids, targets) came before; each serves one backward().
        """
        require(self.batch is not None, "backward() needs a forward(ids, targets) before each call")
        (ids, targets), self.batch = self.batch, None

        def backward(shard):
            own = shard.sequences
            network_backward(shard.g, shard.a, self.layers, ids[own], targets[own],
                             dloss / ids.size)
        parallel(backward, self.shards)
        for shard in self.shards[1:]:
            move(self.flat_grads, shard.flat_grads)

    def update(self, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0):
        """One step of AdamW, after which grads are 0; returns their global norm before clipping.

        Clipping scales a gradient whose norm (length) is above grad_clip down to that length; 0
        means never. Matrices decay, biases and layernorm weights do not. If the norm is not finite,
        nothing changes.
        """
        total = np.zeros(1)
        add_squares(total, self.flat_grads)
        norm = math.sqrt(total[0])
        if math.isfinite(norm):
            self.step += 1
            clip = min(1, grad_clip / (norm + 1e-6)) if grad_clip else 1
            n = sum(param.size for param in self.params.values() if param.ndim == 2)
            for part, decay in (slice(0, n), weight_decay), (slice(n, None), 0):
                adamw(self.flat_params[part], self.flat_m[part], self.flat_v[part],
                      self.flat_grads[part], self.step, lr, beta1, beta2, eps, decay, clip)
        return norm


@by_rows("total part")
def move(total, part):
    """Add part (n,) to total (n,), and set it to 0."""
    total += part
    part[...] = 0


@by_rows("flat", sums="total")
def add_squares(total, flat):
    """Add the sum of flat (n,) ** 2 to total (1,)."""
    total += np.dot(flat, flat)


# ------------------------------------------------------------------------------------------------
# The optimizer. Plain gradient descent moves every parameter against its gradient, p = p - lr g.
# AdamW keeps two running averages for every parameter, called moments: m of its gradient, which
# smooths the noise of single batches, and v of the gradient's square, which tells its usual size.
# Dividing m by sqrt(v) makes steps of about lr whatever the size of the gradients, so one learning
# rate serves all parameters. In step t = 1, 2, ... with the gradient g:
#
#     m = beta1 m + (1 - beta1) g          mhat = m / (1 - beta1^t)
#     v = beta2 v + (1 - beta2) g^2        vhat = v / (1 - beta2^t)
#     p = p - lr (mhat / (sqrt(vhat) + eps) + weight_decay p)
#
# m and v start at 0, so at first they are too small; mhat and vhat correct that. Weight decay pulls
# parameters toward 0, so that only those stay large which the data keep large. The code works on m
# and v directly: with root = sqrt(1 - beta2^t), sqrt(vhat) = sqrt(v) / root, and so
#
#     lr mhat / (sqrt(vhat) + eps) = rate m / (sqrt(v) + root eps),   rate = lr root / (1 - beta1^t)

@by_rows("params m v grads")
def adamw(params, m, v, grads, step, lr, beta1, beta2, eps, weight_decay, clip):
    """Update params, m and v (n,) in place with g = clip * grads, then set grads to 0.

    Loshchilov & Hutter 2019, algorithm 2. In step 1 mhat = g and vhat = g^2, so every parameter
    moves by lr, however large its gradient is (here by 0.01, and by 0.01 * 0.1 for the decay):

    >>> params, m, v = np.ones(2), np.zeros(2), np.zeros(2)
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

    The line up is the warm-up: AdamW's first steps have full size, although m and v then rest on
    few batches, so lr starts small. Loshchilov & Hutter 2017, equation 5.

    >>> [round(learning_rate(step, 100, 20, 1.0, 0.2), 9) for step in (1, 10, 20, 60, 100)]
    [0.05, 0.5, 1.0, 0.6, 0.2]
    """
    if step <= warmup:
        return lr * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------------------
# Sampling: draw a token from the predicted probabilities, append it to the text, predict again.
# Keys and values of earlier positions do not change when a token is appended, because the causal
# mask hides it from them. So they are kept, in the KV cache, and only the new token has to go
# through the network.

def sample(logits, temperature, top_k, top_p, rng):
    """Draw the next token for each row: logits (B,V) -> ids (B,).

    The probabilities are softmax(logits / temperature): below 1, temperature favours likely tokens
    more, and 0 takes the likeliest. top_k keeps the k likeliest tokens; top_p keeps the fewest
    likeliest tokens whose probabilities add up to top_p (Holtzman et al. 2020, section 3.1).

    >>> logits, rng = np.log([[0.5, 0.3, 0.2]] * 1000), np.random.default_rng(0)
    >>> np.bincount(sample(logits, 1.0, 2, None, rng), minlength=3)  # near 625, 375 and 0
    array([604, 396,   0])
    """
    if temperature == 0:
        return logits.argmax(axis=1)
    with np.errstate(over="ignore"):  # for a tiny temperature, exp(-inf) = 0 is the correct limit
        scaled = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    probs = np.exp(scaled)  # up to a factor, which does not matter below
    if top_k is not None and top_k < probs.shape[1]:
        probs[probs < np.partition(probs, -top_k)[:, [-top_k]]] = 0
    if top_p is not None:
        ranked = np.sort(probs)[:, ::-1]
        kept = ranked.cumsum(axis=1) - ranked < top_p * ranked.sum(axis=1, keepdims=True)
        kept[:, 0] = True
        probs[probs < np.where(kept, ranked, np.inf).min(axis=1, keepdims=True)] = 0
    ends = probs.cumsum(axis=1)  # a random point falls into the interval of one token
    return (ends > rng.random((len(probs), 1)) * ends[:, -1:]).argmax(axis=1)


def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, rng=None):
    """Continue ids (B,T): yields the next token of every sequence (B,); see sample() for options.

    The model sees a window of the last tokens, at most n_positions. When it is full, it moves on,
    keeping the last three quarters.
    """
    ids, rng, config = np.asarray(ids), rng or np.random.default_rng(), model.config
    cache = np.empty((config.n_layer, 2, len(ids), config.n_head, config.n_positions,
                      config.n_embd // config.n_head), model.flat_params.dtype)
    start, past = max(0, ids.shape[1] - config.n_positions), 0  # of the window; cached positions
    for _ in range(max_new_tokens):
        if ids.shape[1] - start > config.n_positions:
            start, past = ids.shape[1] - max(1, config.n_positions * 3 // 4), 0
        new = model._checked(ids[:, start + past:])
        model._run(new, past=past, cache=cache[..., :past + new.shape[1], :])
        past += new.shape[1]
        token = sample(model.logits()[:, -1], temperature, top_k, top_p, rng)
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
        self.name, self.n_vocab, self.eot_token = name, self.sizes[name], self.sizes[name] - 1
        self.bpe = None
        if name == "gpt2":
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
            try:
                import tiktoken
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # it is not installed, or whatever its download raises
                raise UserError(f"GPT-2's tokens need the package tiktoken ({error!r:.80}): pip "
                                "install tiktoken; without a network, set TIKTOKEN_CACHE_DIR to a "
                                "folder that it has filled; or use --tokenizer byte") from None

    def encode(self, text):
        """A string -> a list of ids. <|endoftext|> in the text becomes that one token."""
        if self.bpe:
            return self.bpe.encode(text, allowed_special={"<|endoftext|>"})
        parts = (part.encode("utf-8") for part in text.split("<|endoftext|>"))
        return [id for part in parts for id in (self.eot_token, *part)][1:]

    def token_bytes(self, id):
        """The bytes of a token: one or more characters, or a part of one; none for unknown ids."""
        if id >= self.eot_token:
            return b"<|endoftext|>" * (id == self.eot_token)
        return self.bpe.decode_single_token_bytes(id) if self.bpe else bytes([id])

    def decode(self, ids):
        """Ids -> a string; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(id)) for id in ids).decode("utf-8", errors="replace")


DATA, MAGIC, VERSION = Path("data"), 20240520, 1


def write_file(path, *parts):
    """Write bytes to a file that appears at `path` whole or not at all; returns their CRC-32."""
    path, crc32 = Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
                crc32 = zlib.crc32(part, crc32)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return crc32


def write_tokens(path, ids):
    """Write a token file as llm.c does: 256 int32 (magic, version, count, zeros), uint16 ids."""
    ids, header = np.asarray(ids), np.zeros(256, "<i4")
    require(0 <= ids.min() and ids.max() < 2**16, f"{path}: ids must be in 0..65535")
    header[:3] = MAGIC, VERSION, len(ids)
    write_file(path, header, ids.astype("<u2"))


class Tokens:
    """The ids in a token file, or in all files that match a pattern, one after another.

    They stay on disk until they are read. Raises UserError for a file that is missing or damaged.
    """

    def __init__(self, pattern, vocab_size):
        self.paths, self.vocab_size, self.files = sorted(glob.glob(str(pattern))), vocab_size, []
        require(self.paths, f"{pattern}: no such file; make it with prepro_tinyshakespeare.py")
        for path in self.paths:
            found, n_bytes = np.fromfile(path, "<i4", 3).tolist(), os.path.getsize(path)
            expected = [MAGIC, VERSION, (n_bytes - 1024) // 2]
            require(found == expected and n_bytes > 1026 and n_bytes % 2 == 0,
                    f"{path}: not a token file: {n_bytes} bytes that start with {found}, not "
                    f"{expected}; make it again with prepro_tinyshakespeare.py")
            self.files.append(np.memmap(path, "<u2", mode="r", offset=1024))

    def __len__(self):
        return sum(map(len, self.files))

    def read(self, start, stop):
        """The ids from start to stop - 1; raises UserError for one outside the vocabulary."""
        parts = []
        for path, file in zip(self.paths, self.files):
            part = file[max(0, start):max(0, stop)]
            require(part.max(initial=0) < self.vocab_size, f"{path}: id {part.max(initial=0)} is "
                    f"outside the vocabulary of {self.vocab_size}; give its --tokenizer")
            parts.append(part)
            start, stop = start - len(file), stop - len(file)
        return np.concatenate(parts, dtype=np.int64)

    def batch(self, rng, B, T):
        """B random windows, every start equally likely -> ids (B,T), targets (B,T)."""
        require(len(self) > T, f"{self.paths[0]}: too few tokens for --seq_len {T}; lower it")
        starts = rng.integers(len(self) - T, size=B)
        windows = np.stack([self.read(start, start + T + 1) for start in starts])
        return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------------------
# Training.

def train_step(model, tokens, rng, lr, args, processes, stop=0):
    """One step of the optimizer -> (loss before it, norm of the gradient, sum of all `stop`).

    For a batch too large for memory, the gradient is the mean over grad_accum smaller ones, called
    micro-batches. torchrun's processes share the sequences of each among themselves.
    """
    sums, share = np.array([0.0, stop]), 1 / (args.grad_accum * processes.size)
    for _ in range(args.grad_accum):
        ids, targets = tokens.batch(rng, args.batch_size, args.seq_len)
        sums[0] += share * model.forward(processes.own(ids), processes.own(targets))
        model.backward(share)
    processes.all_reduce(sums)
    processes.all_reduce(model.flat_grads)
    norm = model.update(lr, args.beta1, args.beta2, 1e-8, args.weight_decay, args.grad_clip)
    return float(sums[0]), norm, int(sums[1])


def choose_shards(config, B, T, threads):
    """The number of shards for steps of (B,T): one for each thread, if each has enough to do.

    A shard costs a gradient array, to be added up in every step, which is little if its activations
    are larger. With fewer than some 192 positions, a shard is not worth a thread.
    """
    ratio = count(activation_table(config, B, T)) / count(parameter_table(config))
    return max(1, int(min(threads, B, B * T / 192, ratio)))


def evaluate(model, tokens, args):
    """The mean loss of the first args.eval_tokens tokens (0: of all), in nats per token."""
    T, total, done = args.seq_len, 0.0, 0
    limit = min(args.eval_tokens or len(tokens), len(tokens) - 1)
    room = count(activation_table(model.config, args.batch_size, T))  # as much as training uses
    B = max(1, 1024 // T, room // count(activation_table(model.config, 1, T, False)))
    while done < limit:  # batches (B,T), and last one sequence of what is left
        t = min(T, limit - done)
        b = min(B, (limit - done) // t)
        ids = tokens.read(done, done + b * t + 1)
        loss = model.forward(ids[:-1].reshape(b, t), ids[1:].reshape(b, t), for_backward=False)
        total, done = total + loss * b * t, done + b * t
        show_progress(f"validation: {done:,} of {limit:,} tokens")
    show_progress("")
    return total / limit


def print_sample(model, tokenizer, args, rng):
    """Print a text of the model's while it is generated."""
    prompt = args.prompt or ("\n" if args.tokenizer == "byte" else "<|endoftext|>")
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    ids, context = tokenizer.encode(prompt), model.config.n_positions
    if len(ids) > context:
        print(f"the prompt has {len(ids)} tokens, the last {context} are used", file=sys.stderr)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character
    say(prompt, end="")
    for token in generate(model, [ids], args.max_new_tokens, args.temperature, args.top_k,
                          args.top_p, rng):
        say(decoder.decode(tokenizer.token_bytes(int(token[0]))), end="")
    say(decoder.decode(b"", final=True))


def show_progress(text):
    """Replace the last line of the terminal, if stderr is one."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{text:79}\r", end="", file=sys.stderr, flush=True)


STOP = []  # what asks the program to stop adds its exit status: signals, and a closed pipe
COLUMNS = "step", "loss", "val_loss", "norm", "lr", "ms", "tokens_per_second"


def say(text, end="\n"):
    """Print at once. If nobody reads the output any more, discard it and ask to stop."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        STOP.append(128 + 13)  # 13 is SIGPIPE


def on_signal(number, frame):
    """At the first SIGINT or SIGTERM, ask to stop after the step; at the second, stop at once."""
    if STOP:
        raise KeyboardInterrupt
    STOP.append(128 + number)
    os.write(2, b"\nstopping after this step; press again to stop at once\n")


def open_log(out, step):
    """Open OUT/log.csv to append rows after `step`. A new run renames the folder of an old one."""
    path, lines = out / "log.csv", []
    if step == 0 and (path.exists() or checkpoints(out)):
        numbers = (i for i in range(1, 10**6) if not Path(f"{out}.{i}").exists())
        earlier = f"{out}.{next(numbers)}"
        os.replace(out, earlier)
        say(f"{out} held an earlier run, which is now {earlier}")
    elif path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if re.match(r"\d+(,[^,]*){6}$", line)
            and int(line.split(",")[0]) <= step]
    write_file(path, "".join(f"{line}\n" for line in [",".join(COLUMNS), *kept]).encode())
    return open(path, "a", encoding="utf-8", newline="\n")


def train_loop(args, model, tokenizer, train, val, processes, rngs, save):
    """All steps that are left, with log, validation, samples and checkpoints on the way.

    rngs are the random generators of batches and of samples; save() writes a checkpoint.
    """
    times, width, first = [], len(str(args.steps)), processes.rank == 0
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, on_signal)
    tokens = args.batch_size * args.seq_len * args.grad_accum
    # for each token 6 multiplications or additions per parameter, and 12 C S per block in
    # attention, where a query sees S = T/2 keys on average
    flops = 6 * tokens * (model.flat_params.size + args.n_layer * args.n_embd * args.seq_len)
    log = open_log(Path(args.out), model.step) if first else None
    for step in range(model.step + 1, args.steps + 1):
        last, start, processes.seconds, row = step == args.steps, time.perf_counter(), 0.0, {}
        lr = learning_rate(step, args.steps, args.warmup, args.lr, args.min_lr)
        loss, norm, stop = train_step(model, train, rngs[0], lr, args, processes, len(STOP))
        require(math.isfinite(loss + norm), f"step {step}: the loss is {loss}, the gradient's norm "
                f"{norm}; lower --lr {args.lr:g} or raise --warmup {args.warmup}")
        times.append(time.perf_counter() - start)
        if first and (last or step == 1 or step % args.log_every == 0):
            seconds, times = sum(times) / len(times), []  # on average since the last line
            row |= dict(loss=round(loss, 6), norm=round(norm, 6), lr=f"{lr:.6e}",
                        ms=round(1e3 * seconds, 2), tokens_per_second=round(tokens / seconds))
            left = datetime.timedelta(seconds=round(seconds * (args.steps - step)))
            network = f" | network {1e3 * processes.seconds:.0f} ms" * (processes.size > 1)
            say(f"step {step:{width}}/{args.steps} | loss {loss:.4f} | norm {norm:.2f} | "
                f"lr {lr:.2e} | {1e3 * seconds:3.0f} ms | {tokens / seconds:5.0f} tok/s | "
                f"{flops / seconds / 1e9:3.0f} GFLOP/s | {left} left{network}")
        if first and (last or step % args.eval_every == 0):
            row["val_loss"] = round(evaluate(model, val, args), 6)
            say(f"step {step:{width}} | val loss {row['val_loss']:.4f}")
        if first and (last or step % args.sample_every == 0):
            say("-" * 80)
            print_sample(model, tokenizer, args, rngs[1])
            say("-" * 80)
        if row:
            row = {"step": step} | row
            print(*(row.get(name, "") for name in COLUMNS), sep=",", file=log, flush=True)
        if first and (last or stop or step % args.save_every == 0):
            save()
        if stop:
            say(f"stopped after step {step}, saved in {args.out}; --resume continues")
            sys.exit((STOP or [128 + signal.SIGTERM])[0])


# ------------------------------------------------------------------------------------------------
# Checkpoints. A model is a folder in Hugging Face's format: config.json, model.safetensors, and the
# tokenizer's files. A safetensors file is the length of a JSON text in 8 bytes, that JSON text, and
# the numbers: our flat array with its table in front. The checkpoint of a run, OUT/step_000250, has
# also AdamW's moments in optimizer.safetensors and the rest of the run's state in trainer.json.

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PLAIN_GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False, "tie_word_embeddings": True}


def write_tensors(path, tensors):
    """Write {name: array of floats} as a safetensors file; returns the file's CRC-32."""
    index, stop = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        start, stop = stop, stop + x.nbytes
        index[name] = {"dtype": f"F{8 * x.itemsize}", "shape": x.shape,
                       "data_offsets": (start, stop)}
    header = json.dumps(index).encode()
    header += b" " * (-len(header) % 8)
    return write_file(path, len(header).to_bytes(8, "little"), header, *(
        x.astype(x.dtype.newbyteorder("<"), copy=False) for x in tensors.values()))


def read_tensors(path, arrays):
    """Fill {name: array} from a safetensors file, which may be in another float format.

    Names may begin with `transformer.`; causal masks in old files are skipped. Raises UserError for
    a damaged file (its tensors must fill it without gaps) and for names and shapes that do not fit.
    """
    found, end = {}, 0
    try:
        data = np.memmap(path, np.uint8, "r")  # stays on disk until it is used
        length = int.from_bytes(data[:8].tobytes(), "little")
        index, data = json.loads(data[8:8 + length].tobytes()), data[8 + length:]
        index.pop("__metadata__", None)
        for name, entry in sorted(index.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            require(start == end, f"{name} is at byte {start}, expected {end}")
            if not re.search(r"\.attn\.(masked_)?bias$", name):
                x = data[start:stop].view(FLOATS[entry["dtype"]]).reshape(entry["shape"])
                found[name.removeprefix("transformer.")] = x
            end = stop
        require(end == len(data), f"its tensors have {end} bytes, it holds {len(data)}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file of floats, or damaged ({error!s:.100}); "
                        "download or save it again") from None
    if "lm_head.weight" in found:
        require(np.array_equal(found.pop("lm_head.weight"), found.get("wte.weight")),
                f"{path}: lm_head.weight differs from wte.weight; use a model with tied weights")
    for name in sorted(arrays.keys() | found.keys()):
        shape, fit = (x[name].shape if name in x else "missing" for x in (found, arrays))
        require(shape == fit, f"{path}: {name} is {shape}, but {fit} in the model; use a "
                "model.safetensors and a config.json that belong together")
    for name, x in found.items():
        if x.dtype == "<u2":  # BF16 is the upper half of a float32
            x = (x.astype(np.uint32) << 16).view(np.float32)
        arrays[name][...] = x


def read_json(path, names=()):
    """The JSON object in a file. Raises UserError if there is none, or not with all these names."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict) and found.keys() >= {*names},
            f"{path}: not a JSON object, or not a complete one; replace it, or remove its folder")
    return found


def read_config(folder):
    """The GPTConfig of a folder's config.json. Raises UserError for what is not a plain GPT-2."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    try:
        config = GPTConfig(**{name: found.get(name) for name in asdict(GPTConfig())})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    inner = {"n_inner": 4 * config.n_embd} if found.get("n_inner") else {}
    for name, value in (PLAIN_GPT2 | inner).items():
        require(found.get(name, value) == value,
                f"{path}: {name} is {found.get(name)!r}; use a plain GPT-2, which has {value!r}")
    return config


def tokenizer_files(tokenizer, n_positions):
    """{file name: bytes} from which transformers' AutoTokenizer makes the same tokenizer."""
    merges = b"#version: 0.2\n"
    if tokenizer.bpe:  # OpenAI's own files, which tiktoken keeps
        from tiktoken.load import read_file_cached
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        vocab, merges = read_file_cached(url + "encoder.json"), read_file_cached(url + "vocab.bpe")
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
    found = [path for path in Path(out).glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(out, model, files, state):
    """Write OUT/step_... with `files` {name: bytes}, whole or not at all; keep the one before."""
    unfinished = Path(out) / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # a run may have been killed while saving
    try:
        moments = {"m": model.flat_m, "v": model.flat_v}
        crc32 = {"model.safetensors": model.save_pretrained(unfinished), "optimizer.safetensors":
                 write_tensors(unfinished / "optimizer.safetensors", moments)}
        state = {"step": model.step, "shards": model.n_shards, "crc32": crc32, **state}
        write_file(unfinished / "trainer.json", json.dumps(state, indent=2).encode())
        for name, content in files.items():
            write_file(unfinished / name, content)
        os.replace(unfinished, Path(out) / f"step_{model.step:06}")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, state):
    """The model of a checkpoint with its moments. Raises UserError if a file is damaged."""
    for name, crc32 in state["crc32"].items():
        require(zlib.crc32(np.fromfile(folder / name, np.uint8)) == crc32, f"{folder / name}: its "
                f"CRC-32 has changed; remove {folder} to resume from the checkpoint before it")
    model = GPT2.from_pretrained(folder)
    read_tensors(folder / "optimizer.safetensors", {"m": model.flat_m, "v": model.flat_v})
    model.step = state["step"]
    return model


def prepro():
    """The module prepro_tinyshakespeare.py, which gets what is missing in data/."""
    try:
        import prepro_tinyshakespeare
    except ModuleNotFoundError:
        raise UserError("data/ lacks what is needed; put prepro_tinyshakespeare.py, which gets it, "
                        "beside train_gpt2.py, or give --train_bin and --val_bin") from None
    return prepro_tinyshakespeare


def find_tokens(args):
    """(training file, validation file): those given, or tinyshakespeare's, made if missing."""
    if args.train_bin:
        return args.train_bin, args.val_bin
    paths = [DATA / f"tinyshakespeare_{args.tokenizer}_{split}.bin" for split in ("train", "val")]
    return paths if all(path.exists() for path in paths) else prepro().prepare(args.tokenizer)


def find_model(name):
    """The folder of a model: NAME, or the last checkpoint in it; data/NAME for OpenAI's models."""
    if name not in MODELS or name == "baby":
        return (checkpoints(name) or [Path(name)])[-1]
    if not (DATA / name / "model.safetensors").exists():
        prepro().download_model(name)
    return DATA / name


# ------------------------------------------------------------------------------------------------
# Data parallel training. torchrun starts several processes, on one machine or on several. Each has
# the whole model and takes its own sequences of every batch. They exchange only the flat array of
# gradients: an all-reduce gives every process the sum over all. All make the same update with it,
# so their parameters stay equal. torch is only the transport: it uses NumPy's memory.

class Processes:
    """The processes of a run, of ranks 0..size-1. Without torchrun there is one, and no network."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.seconds = 0.0  # spent on the network
        if self.size > 1:
            from torch import distributed, from_numpy
            self.network, self.tensor = distributed, from_numpy
            # others wait while rank 0 downloads or validates, however long that takes
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            atexit.register(distributed.destroy_process_group)

    def own(self, rows):
        """This process's share of the rows of a batch."""
        n = len(rows) // self.size
        return rows[n * self.rank:n * (self.rank + 1)]

    def all_reduce(self, flat):
        """Replace every process's array by the sum over all processes, the same bits for each."""
        start = time.perf_counter()
        try:
            if self.size > 1:
                self.network.all_reduce(self.tensor(flat))
        except RuntimeError as error:
            require(not re.search("connection|closed|reset by peer|timed out", str(error), re.I),
                    f"rank {self.rank} lost the connection to another process, which may say why; "
                    "start all again with --resume")
            raise
        self.seconds += time.perf_counter() - start


# ------------------------------------------------------------------------------------------------
# Threads. A NumPy operation uses one core, but it releases the GIL (the lock that lets only one
# thread at a time run Python) while it computes. So a few threads, each calling NumPy on a part of
# the arrays, use all cores. A block of rows fits into a core's cache, so a formula of eight
# operations reads memory once, not eight times. How arrays are cut depends on their shapes only and
# never on the number of threads; therefore the results do not either, bit for bit.

MIN_BLOCK = 1 << 16  # elements; with smaller blocks, threads spend their time waiting for the GIL


class Pool:
    """pool(work, items) calls work(item) for every item, on `threads` threads.

    Nested calls run serially, as all threads are busy.
    """

    def __init__(self, threads):
        self.threads, self.busy, self.executor = threads, False, ThreadPoolExecutor(256)
        # glibc gives large arrays back to the system when they are freed, and new ones cost a page
        # fault per 4 KB. Freeing one array this large raises the size from which it does so.
        np.empty(31 << 20, np.uint8)

    def __call__(self, work, items):
        """Call work(item) for every item; raises the first error that a call raised."""
        left = iter(items)  # under the GIL, every item goes to one thread only

        def work_through():
            for item in left:
                work(item)
        if self.busy or len(items) < 2:
            return work_through()
        self.busy = True
        helpers = [self.executor.submit(work_through) for _ in items[1:self.threads]]
        try:
            work_through()
        finally:
            wait(helpers)
            self.busy = False
        for helper in helpers:
            helper.result()  # raises the error that a thread has met


def split(n, parts):
    """range(n) as at most `parts` slices, a power of two: so 2, 4 or 8 threads end together.

    >>> split(5, 3)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    parts = 1 << int(math.log2(max(1, min(n, parts))))
    return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def run_in_blocks(function, args, cut, summed, heads):
    """Call function(*args) for blocks of the arguments numbered `cut`; see by_rows."""
    if heads:  # attention: the work is in its scores
        (B, H, T, _), S = args[-3].shape, args[-2].shape[2]
        n = B * H * min(T, 64) * S / MIN_BLOCK
        blocks = [(b, h) for b in split(B, n) for h in split(H, n / B)]
    else:
        blocks = split(len(args[cut[0]]), max(args[i].size for i in cut) / MIN_BLOCK)
    if len(blocks) == 1:
        return function(*args)
    partial = {i: np.zeros((len(blocks), *args[i].shape), args[i].dtype) for i in summed}

    def work(number):
        own = {i: args[i][blocks[number]] for i in cut} | {i: partial[i][number] for i in summed}
        function(*(own.get(i, arg) for i, arg in enumerate(args)))
    parallel(work, range(len(blocks)))
    for i in summed:
        np.add(args[i], partial[i].sum(axis=0), out=args[i])


def matmul(out, a, b, bias=None, add=False):
    """out[...] = a @ b + bias, or out += a @ b; a (M,J), b (J,K), bias (K,) or None -> out (M,K).

    out may be a transposed view, if there is no bias. Every block reads the other operand whole, so
    the larger is cut: wide products into columns, tall ones into rows. BLAS is faster on large
    blocks, so there are few: as many as the square root of the product's size in units of 2^22
    multiplications, at most 16, none below 64 wide.
    """
    if not out.flags.c_contiguous:  # a transposed view: (a b)^T = b^T a^T is in memory's order
        out, a, b = out.T, b.T, a.T
    (M, J), K = a.shape, b.shape[1]
    n = 1 if parallel.busy else min(16, max(M, K) / 64, math.sqrt(M * J * K / 2**22))

    def work(block):
        rows, cols = (slice(None), block) if K >= M else (block, slice(None))
        if add:
            out[rows, cols] += a[rows] @ b[:, cols]
        else:
            np.matmul(a[rows], b[:, cols], out=out[rows, cols])
        if bias is not None:
            out[rows, cols] += bias[cols]
    parallel(work, split(max(M, K), n))


def usable_cpus():
    """The number of processors of this process, by a container's quota and torchrun's share."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us":  # versions 2 and 1
        if Path(path).exists():
            quota, *period = Path(path).read_text().split()
            if quota not in ("max", "-1"):
                period = period or [Path(path).with_name("cpu.cfs_period_us").read_text()]
                cpus = min(cpus, max(1, int(quota) // int(period[0])))
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


parallel = Pool(usable_cpus())
if hasattr(os, "register_at_fork"):  # a forked child does not have its parent's threads
    os.register_at_fork(after_in_child=lambda: parallel.__init__(parallel.threads))


# ------------------------------------------------------------------------------------------------
# The command line.

MODELS = {"baby": {}, "gpt2": {}, "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
          "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
          "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}
FINE_TUNING = dict(lr=1e-4, min_lr=1e-5)
HIGHEST = {"n_layer": 10000, "beta1": 0.99999, "beta2": 0.99999, "top_p": 1}
# Titles of groups, and options: name, type or choices, lowest value, default, help. Where the
# default is a pair, its first value is for baby, its second for the larger models.
OPTIONS = [
    "most used: what to train, and for how long",
    ("model", MODELS, None, "baby", "preset: architecture and hyperparameters"),
    ("init_from", str, None, None, "start from the weights in the folder of a model or a run, or "
     "from OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl; without --steps, only sample"),
    ("resume", bool, None, None, "continue the run in --out with its options, except those given"),
    ("steps", int, 0, (5500, 1000), "training steps; 0 only validates and samples"),
    ("prompt", str, None, None, "text that samples continue"),
    ("out", str, None, "out", "folder for log.csv and checkpoints"),
    "data: the tokens to train and validate on",
    ("train_bin", str, None, None, "token file, or a pattern of several (default: Shakespeare)"),
    ("val_bin", str, None, None, "the same for validation"),
    ("tokenizer", Tokenizer.sizes, None, ("byte", "gpt2"), "bytes, or GPT-2's 50,257 tokens"),
    "architecture: the sizes of a new model",
    ("n_layer", int, 1, (3, 12), "L, blocks"),
    ("n_head", int, 1, (4, 12), "H, attention heads"),
    ("n_embd", int, 1, (128, 768), "C, channels"),
    ("n_positions", int, 1, (64, 1024), "longest context"),
    "training: batches and the optimizer",
    ("batch_size", int, 1, (12, 4), "B, sequences in a micro-batch, shared among all processes"),
    ("seq_len", int, 1, None, "T, tokens in a sequence: 64, or n_positions if that is less"),
    ("grad_accum", int, 1, 1, "micro-batches per step"),
    ("lr", float, 0, (3e-3, 3e-4), "highest learning rate"),
    ("min_lr", float, 0, (1e-4, 3e-5), "learning rate at the end"),
    ("warmup", int, 0, 100, "steps up to the highest learning rate"),
    ("beta1", float, 0, 0.9, "AdamW: decay of the average gradient, below 1"),
    ("beta2", float, 0, (0.99, 0.95), "AdamW: decay of the average squared gradient, below 1"),
    ("weight_decay", float, 0, 0.1, "decoupled weight decay of matrices"),
    ("grad_clip", float, 0, 1.0, "maximum global gradient norm (0: no clipping)"),
    ("seed", int, 0, 1337, "seed of weights, batches and samples"),
    ("threads", int, 1, None, "threads, if not one per processor"),
    "evaluation: what happens between steps",
    ("log_every", int, 1, (50, 1), "steps between log lines"),
    ("eval_every", int, 1, 500, "steps between validations"),
    ("eval_tokens", int, 0, (0, 8192), "validate on the first so many tokens (0: all)"),
    ("sample_every", int, 1, 1000, "steps between samples"),
    ("save_every", int, 1, 250, "steps between checkpoints, of which two are kept"),
    "sampling: how text is generated",
    ("num_samples", int, 1, 1, "samples with --init_from"),
    ("max_new_tokens", int, 0, 500, "tokens in a sample"),
    ("temperature", float, 0, 0.8, "below 1 favours likely tokens more; 0 takes the likeliest"),
    ("top_k", int, 1, None, "draw from the k likeliest tokens"),
    ("top_p", float, 0, None, "draw from the likeliest tokens that reach this probability")]


def parse_arguments(argv):
    """The options of a run, and the state in which a resumed run was saved (or None).

    Options that are not given come from the preset, or from the run that --resume continues.
    args.folder has the weights to start from; with args.only_sample, the run only prints samples.
    """
    parser = argparse.ArgumentParser(
        prog="train_gpt2.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train GPT-2 in NumPy. Without options, a small model learns Shakespeare.")
    parser.error = lambda message: require(False, f"{message} (see --help)")
    pairs, lowest, folder, state = {}, {}, None, None
    for option in OPTIONS:
        if isinstance(option, str):
            group = parser.add_argument_group(option)
            continue
        name, kind, lowest[name], default, text = option
        pairs[name] = default if isinstance(default, tuple) else (default, default)
        default = " or, for gpt2, ".join(map(str, dict.fromkeys(pairs[name])))
        text += f" (default: {default})" * (default != "None")
        reading = {"action": "store_true"} if kind is bool else \
            {"choices": kind} if isinstance(kind, dict) else {"type": kind, "metavar": "X"}
        group.add_argument(f"--{name}", help=text, **reading)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        low, high = lowest[name], HIGHEST.get(name, sys.float_info.max)
        limits = f"from {low} to {high}" if name in HIGHEST else f"at least {low}"
        require(low is None or low <= value <= high,
                f"--{name} must be {limits}, not {value!s:.20}")
    require(("train_bin" in given) == ("val_bin" in given),
            "--train_bin and --val_bin belong together; give both, or neither")
    require(len(given.keys() & {"model", "init_from", "resume"}) < 2,
            "--model, --init_from and --resume exclude each other; give one of them")
    large = "init_from" in given or given.get("model", "baby") != "baby"
    args = {name: pair[large] for name, pair in pairs.items()} | MODELS[given.get("model", "baby")]
    if "resume" in given:
        out = given.get("out", "out")
        require(checkpoints(out), f"--resume: {out} has no checkpoint; give the run as --out")
        folder = checkpoints(out)[-1]
        state = read_json(folder / "trainer.json", ["step", "options", "shards", "rngs", "crc32"])
        args |= state["options"]
    elif "init_from" in given:
        folder = find_model(given["init_from"])
        by_size = {size: name for name, size in Tokenizer.sizes.items()}
        args |= FINE_TUNING | {"tokenizer": by_size.get(read_config(folder).vocab_size)}
    if folder:
        sizes = asdict(read_config(folder))
        args |= sizes
        for name in given.keys() & {*sizes, "tokenizer" if state else None}:
            require(given[name] == args[name], f"--{name} {given[name]} does not fit {folder}, "
                    f"which has {args[name]}; leave it out")
    args = argparse.Namespace(**args | given, folder=folder)
    require(args.tokenizer, f"{folder} has another vocabulary; give the --tokenizer to use with it")
    args.seq_len = args.seq_len or min(64, args.n_positions)
    require(args.seq_len <= args.n_positions,
            f"--seq_len {args.seq_len} is more than --n_positions {args.n_positions}; lower it")
    require(not state or args.steps > state["step"],
            f"--steps {args.steps}: the run has done so many already; give more")
    args.only_sample = "init_from" in given and "steps" not in given
    return args, state


def main():
    """The program."""
    STOP.clear()
    processes = Processes()
    if processes.rank > 0:  # only rank 0 prints and writes; the others wait while it downloads
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        processes.all_reduce(np.zeros(1))
    args, state = parse_arguments(sys.argv[1:])
    tokenizer, paths = Tokenizer(args.tokenizer), () if args.only_sample else find_tokens(args)
    if processes.rank == 0:
        processes.all_reduce(np.zeros(1))
    parallel.threads = args.threads or usable_cpus()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # a loss of nan is reported as such
    config = read_config(args.folder) if args.folder else GPTConfig(
        tokenizer.n_vocab, args.n_positions, args.n_embd, args.n_layer, args.n_head)
    B, rest = divmod(args.batch_size, processes.size)
    require(rest == 0, f"--batch_size {args.batch_size} cannot be shared equally among "
            f"{processes.size} processes; give a multiple")
    shards = state["shards"] if state else choose_shards(config, B, args.seq_len, parallel.threads)
    require_memory(4 * count(activation_table(config, B, args.seq_len))
                   + 4 * count(parameter_table(config)) * (1 if args.only_sample else 3 + shards))
    if args.folder is None:
        model = GPT2(config, seed=args.seed)
    else:
        model = load_checkpoint(args.folder, state) if state else GPT2.from_pretrained(args.folder)
    if args.only_sample:
        for i in range(args.num_samples):
            print_sample(model, tokenizer, args, np.random.default_rng([args.seed, 2, i]))
        return
    train, val = (Tokens(path, config.vocab_size) for path in paths)
    args.train_bin, args.val_bin = map(os.path.abspath, paths)  # --resume may be called elsewhere
    rngs, model.n_shards = [np.random.default_rng([args.seed, i]) for i in (1, 2)], shards
    for rng, saved in zip(rngs, state["rngs"] if state else ()):
        rng.bit_generator.state = saved
    say(f"model     {args.folder or args.model}: {model.flat_params.size:,} parameters, {config}\n"
        f"batch     B={args.batch_size} T={args.seq_len}, micro-batches {args.grad_accum}, "
        f"processes {processes.size}, shards {len(split(B, shards))}, threads {parallel.threads}\n"
        f"train     {len(train):,} {args.tokenizer} tokens in {', '.join(train.paths)}\n"
        f"validate  {args.eval_tokens or len(val):,} of {len(val):,} tokens in "
        f"{', '.join(val.paths)}")
    if args.steps == 0:
        say(f"val loss {evaluate(model, val, args):.4f}")
        return print_sample(model, tokenizer, args, rngs[1])
    files = {path.name: path.read_bytes() for path in (args.folder.iterdir() if args.folder else ())
             if re.search("token|vocab|merges", path.name)}
    files = files or tokenizer_files(tokenizer, config.n_positions)
    processes.all_reduce(np.zeros(1))  # all have read their files, which may be in args.out
    options = {name: value for name, value in vars(args).items()
               if name not in ("resume", "out", "threads", "folder", "only_sample")}

    def save():
        save_checkpoint(args.out, model, files, {
            "options": options, "rngs": [rng.bit_generator.state for rng in rngs]})
    train_loop(args, model, tokenizer, train, val, processes, rngs, save)


def require_memory(n_bytes):
    """Raise UserError if the system has less memory."""
    memory = 2**47  # on Windows, where a smaller array than this raises MemoryError
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(n_bytes <= memory, f"this model and batch need {n_bytes / 1e9:,.1f} GB of memory, the "
            f"system has {memory / 1e9:,.1f}; lower --n_layer, --n_embd, --batch_size or --seq_len")


def run_program(main):
    """Run main() and exit. A mistake that the user can correct prints one line, with status 2."""
    status = 0
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # models write characters that a terminal may not have
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except (UserError, OSError, MemoryError) as error:
        advice = "; check the path, permissions and space left" * isinstance(error, OSError)
        print(f"{Path(sys.argv[0]).name}: error: {error}{advice}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status = end.code
    say("", end="")  # notices a closed pipe
    sys.exit(STOP[0] if STOP else status)


if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # for prepro_tinyshakespeare's imports
    run_program(main)
