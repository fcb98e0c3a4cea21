"""The answer key: GPT-2 in PyTorch, and every function of train_gpt2.py held against it.

    pytest                  # everything
    pytest -k layernorm     # what has to do with layernorm
    python test_gpt2.py     # a table for people: each gradient of the 124M shape beside PyTorch's
    python test_gpt2.py --bench   # the speed of both

The first part is the second half of the teaching text: the network of train_gpt2.py, in the same
order and under the same names, written with PyTorch's own functions and differentiated by autograd.
"""
import argparse
import csv
import errno
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import train_gpt2 as gpt2  # first: it tells NumPy's BLAS to stay on one thread

import numpy as np
import pytest
if not {"ours", "floor"} & set(sys.argv):  # the benchmark's processes that do without, to the MB
    import torch
    import torch.nn.functional as F

import prepro_tinyshakespeare as prepro

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared" / "data"  # where a machine without a network may keep the downloads


# ------------------------------------------------------------------------------------------------
# GPT-2 in PyTorch. p is {name: tensor}, under the names of gpt2.parameter_table.

def torch_embedding(ids, wte, wpe):
    return wte[ids] + wpe[:ids.shape[1]]


def torch_layernorm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)


def torch_linear(x, weight, bias=None):
    return F.linear(x, weight.T, bias)


def torch_attention(q, k, v, H):
    B, T, C = q.shape
    q, k, v = (x.view(B, T, H, C // H).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)


def torch_gelu(x):
    return F.gelu(x, approximate="tanh")


def torch_crossentropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")


def torch_block(x, p, H):
    def linear(name, x):
        return torch_linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
    h = torch_layernorm(x, p["ln_1.weight"], p["ln_1.bias"])
    h = torch_attention(*linear("attn.c_attn", h).chunk(3, dim=-1), H)
    x = x + linear("attn.c_proj", h)
    h = torch_layernorm(x, p["ln_2.weight"], p["ln_2.bias"])
    return x + linear("mlp.c_proj", torch_gelu(linear("mlp.c_fc", h)))


def torch_gpt2(p, config, ids, targets=None):
    """ids (B,T) -> logits (B,T,V), and with targets the mean loss: (logits, loss)."""
    x = torch_embedding(ids, p["wte.weight"], p["wpe.weight"])
    for i in range(config.n_layer):
        x = torch_block(x, gpt2.under(f"h.{i}.", p), config.n_head)
    x = torch_layernorm(x, p["ln_f.weight"], p["ln_f.bias"])
    logits = torch_linear(x, p["wte.weight"].T)
    return logits, None if targets is None else torch_crossentropy(logits, targets).mean()


def torch_params(model):
    """A model's parameters as separate tensors that autograd follows."""
    return {name: torch.tensor(view).requires_grad_() for name, view in model.params.items()}


# ------------------------------------------------------------------------------------------------
# How numbers are compared.

def error(ours, reference):
    """The largest difference over the largest reference value; a reference of zeros shows nothing."""
    ours, reference = (np.asarray(x.detach() if torch.is_tensor(x) else x) for x in (ours, reference))
    ours = ours.reshape(reference.shape)
    largest = np.abs(reference).max()
    assert largest > 0, "the reference is all zero: nothing would be shown"
    assert np.isfinite(ours).all(), "not finite"
    return np.abs(ours - reference).max() / largest


def agree(ours, reference, tolerance):
    """Asserts that {name: array} agree, each by itself."""
    assert ours.keys() == reference.keys()
    errors = {name: error(ours[name], reference[name]) for name in reference}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= tolerance}
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"
    return max(errors.values())


def gradients_agree(model, ids, targets, tolerance):
    """Asserts that logits, loss and every gradient are PyTorch's; returns the largest error."""
    p = torch_params(model)
    logits, loss = torch_gpt2(p, model.config, torch.tensor(ids), torch.tensor(targets))
    loss.backward()
    ours = {"loss": np.array(model.forward(ids, targets)), "logits": model.logits.copy()}
    model.backward()
    reference = {"loss": loss, "logits": logits} | {name: x.grad for name, x in p.items()}
    return agree(ours | model.grads, reference, tolerance)


def perturbed(config, dtype=np.float64, seed=0):
    """A model whose biases are not 0 and whose layernorm weights are not 1, so that terms show."""
    model = gpt2.GPT2(config, dtype, seed)
    model.flat_params += 0.1 * np.random.default_rng(seed).standard_normal(model.flat_params.size)
    return model


def random_ids(config, B, T, seed=0):
    """ids and targets (B,T), with repeats."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=(2, B, T))


SMALL = gpt2.GPTConfig(vocab_size=17, n_positions=8, n_embd=12, n_layer=2, n_head=3)
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


# ------------------------------------------------------------------------------------------------
# The layers. For each: its inputs, what of them is differentiated, our pair, and PyTorch's function.
# Sizes differ pairwise; upstream gradients are random.

class Layer:
    """One layer on random inputs: x are arrays, ids and targets are whole numbers."""

    def __init__(self, dtype, B=2, T=5, H=3, C=12, K=7, V=17, seed=0):
        self.dtype, self.B, self.T, self.H, self.C, self.K, self.V = dtype, B, T, H, C, K, V
        self.rng = np.random.default_rng(seed)
        self.ids = self.rng.integers(V // 3, size=(B, T))  # a third of the tokens: many repeats
        self.x = {name: self.random(*shape) for name, shape in self.shapes().items()}
        self.out = np.full(self.out_shape(), np.nan, dtype)
        self.forward()
        self.dout = self.random(*self.out.shape)

    def random(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtype)

    def empty(self, *names):
        """Where gradients of activations are written."""
        return {name: np.full_like(self.x[name], np.nan) for name in names}

    def zeros(self, *names):
        """Where gradients of parameters are added up."""
        return {name: np.zeros_like(self.x[name]) for name in names}


class Embedding(Layer):
    def shapes(self): return {"wte": (self.V, self.C), "wpe": (self.T + 3, self.C)}
    def out_shape(self): return self.B * self.T, self.C
    def forward(self): gpt2.embedding_forward(self.out, self.ids, self.x["wte"], self.x["wpe"])
    def torch(self, x): return torch_embedding(torch.tensor(self.ids), x["wte"], x["wpe"])
    def backward(self):
        g = self.zeros("wte", "wpe")
        gpt2.embedding_backward(g["wte"], g["wpe"], self.dout, self.ids)
        return g


class LayerNorm(Layer):
    def shapes(self): return {"inp": (self.B * self.T, self.C), "weight": (self.C,), "bias": (self.C,)}
    def out_shape(self): return self.B * self.T, self.C
    def torch(self, x): return torch_layernorm(x["inp"], x["weight"], x["bias"])
    def forward(self):
        self.stats = np.full((2, self.B * self.T, 1), np.nan, self.dtype)
        gpt2.layernorm_forward(self.out, *self.stats, *self.x.values())
    def backward(self):
        g = self.empty("inp") | self.zeros("weight", "bias")
        gpt2.layernorm_backward(*g.values(), self.dout, self.x["inp"], *self.stats, self.x["weight"])
        return g


class Linear(Layer):
    def shapes(self): return {"inp": (self.B * self.T, self.C), "weight": (self.C, self.K), "bias": (self.K,)}
    def out_shape(self): return self.B * self.T, self.K
    def forward(self): gpt2.linear_forward(self.out, *self.x.values())
    def torch(self, x): return torch_linear(**{"x": x["inp"], "weight": x["weight"], "bias": x["bias"]})
    def backward(self):
        g = self.empty("inp") | self.zeros("weight", "bias")
        gpt2.linear_backward(*g.values(), self.dout, self.x["inp"], self.x["weight"])
        return g


class TiedHead(Layer):
    """linear with the transposed embedding and no bias."""
    def shapes(self): return {"inp": (self.B * self.T, self.C), "wte": (self.V, self.C)}
    def out_shape(self): return self.B * self.T, self.V
    def forward(self): gpt2.linear_forward(self.out, self.x["inp"], self.x["wte"].T)
    def torch(self, x): return torch_linear(x["inp"], x["wte"].T)
    def backward(self):
        g = self.empty("inp") | self.zeros("wte")
        gpt2.linear_backward(g["inp"], g["wte"].T, None, self.dout, self.x["inp"], self.x["wte"].T)
        return g


class Attention(Layer):
    def shapes(self): return dict.fromkeys("qkv", (self.B * self.T, self.C))
    def out_shape(self): return self.B * self.T, self.C
    def forward(self):
        self.lse = np.full((self.B, self.H, self.T, 1), np.nan, self.dtype)
        gpt2.attention_forward(self.out, self.lse, *self.x.values())
    def torch(self, x):
        return torch_attention(*(x[name].view(self.B, self.T, self.C) for name in "qkv"), self.H)
    def backward(self):
        g = self.empty("q", "k", "v")
        gpt2.attention_backward(*g.values(), self.dout, self.out, self.lse, *self.x.values())
        return g


class Gelu(Layer):
    def shapes(self): return {"inp": (self.B * self.T, self.K)}
    def out_shape(self): return self.B * self.T, self.K
    def forward(self): gpt2.gelu_forward(self.out, self.x["inp"])
    def torch(self, x): return torch_gelu(x["inp"])
    def backward(self):
        g = self.empty("inp")
        gpt2.gelu_backward(g["inp"], self.dout, self.x["inp"])
        return g


class CrossEntropy(Layer):
    """Its upstream gradient is one number for all positions, as the mean of the losses has it."""
    def shapes(self): return {"logits": (self.B * self.T, self.V)}
    def out_shape(self): return self.B * self.T,
    def forward(self):
        self.lse = np.full((self.B * self.T, 1), np.nan, self.dtype)
        gpt2.crossentropy_forward(self.out, self.lse, self.x["logits"], self.ids.ravel())
    def torch(self, x): return torch_crossentropy(x["logits"], torch.tensor(self.ids))
    def backward(self):
        self.dout[:] = self.dout[0]
        g = self.empty("logits")
        gpt2.crossentropy_backward(g["logits"], self.dout[0], self.lse, self.x["logits"], self.ids.ravel())
        return g


LAYERS = pytest.mark.parametrize("layer", [Embedding, LayerNorm, Linear, TiedHead, Attention, Gelu,
                                           CrossEntropy], ids=lambda layer: layer.__name__.lower())


@LAYERS
@DTYPES
@pytest.mark.parametrize("T", [5, 1, 150])
def test_layer_matches_torch(layer, dtype, T):
    """Measured: below 1e-15 in float64 (limit 1e-10) and 5e-7 in float32 (limit 1e-5).

    T=150 takes attention through three blocks of queries, the last of them not full.
    """
    layer = layer(dtype, T=T)
    ours = layer.backward()
    x = {name: torch.tensor(array, requires_grad=True) for name, array in layer.x.items()}
    out = layer.torch(x)
    out.backward(torch.tensor(layer.dout).view(out.shape))
    tolerance = 1e-10 if dtype == np.float64 else 1e-5
    agree({"out": layer.out}, {"out": out}, tolerance)
    if layer.__class__ is Attention and T == 1:  # one key: softmax is 1 whatever the score
        assert max(np.abs(ours.pop(name)).max() for name in "qk") < tolerance
        del x["q"], x["k"]
    agree(ours, {name: tensor.grad for name, tensor in x.items()}, tolerance)


@LAYERS
def test_layer_matches_central_differences(layer):
    """(f(x + h) - f(x - h)) / 2h for every single input, without PyTorch. Measured: below 1e-9."""
    layer, h = layer(np.float64), 1e-5
    ours = layer.backward()
    numeric = {name: np.empty_like(array) for name, array in layer.x.items()}
    for name, array in layer.x.items():
        for i in np.ndindex(array.shape):
            value, sides = array[i], []
            for array[i] in (value + h, value - h):
                layer.forward()
                sides.append((layer.dout * layer.out).sum())
            array[i] = value
            numeric[name][i] = (sides[0] - sides[1]) / (2 * h)
    agree(ours, numeric, 1e-8)


@LAYERS
def test_layer_adds_to_parameter_gradients_and_writes_activation_gradients(layer):
    first, again = layer(np.float64), layer(np.float64)
    once = first.backward()
    again.zeros = lambda *names: {name: once[name].copy() for name in names}
    twice = again.backward()
    for name in once:
        added = name in ("weight", "bias", "wte", "wpe")
        np.testing.assert_allclose(twice[name], once[name] * (2 if added else 1), rtol=1e-12)


def test_embedding_gives_a_repeated_token_the_sum_of_its_gradients():
    dwte, dwpe, naive = (np.zeros((4, 2)) for _ in range(3))
    ids, dout = np.array([[3, 1, 3]]), np.arange(6.0).reshape(3, 2)
    gpt2.embedding_backward(dwte, dwpe, dout, ids)
    np.add.at(naive, ids.ravel(), dout)
    assert (dwte == naive).all() and (dwte[3] == dout[0] + dout[2]).all() and (dwte[0] == 0).all()


def test_layernorm_gives_nothing_to_a_shift_or_a_stretch_of_the_row():
    layer = LayerNorm(np.float64)
    dinp, x = layer.backward()["inp"], layer.x["inp"]
    assert np.abs(dinp.sum(axis=1)).max() < 1e-12
    assert np.abs((dinp * (x - x.mean(axis=1, keepdims=True))).sum(axis=1)).max() < 1e-4  # eps is felt


@DTYPES
def test_crossentropy_is_finite_for_any_finite_logits(dtype):
    largest = np.finfo(dtype).max / 4
    logits = np.array([[largest, -largest, 0], [-largest, largest, 0], [1e4, 1e4, 1e4]], dtype)
    targets, losses, lse = np.array([0, 0, 2]), np.empty(3, dtype), np.empty((3, 1), dtype)
    gpt2.crossentropy_forward(losses, lse, logits, targets)
    np.testing.assert_allclose(losses, [0, 2 * largest, math.log(3)], rtol=1e-5)
    gpt2.crossentropy_backward(logits, 1.0, lse, logits, targets)
    expected = [[0, 0, 0], [-1, 1, 0], [1 / 3, 1 / 3, -2 / 3]]
    np.testing.assert_allclose(logits, expected, atol=2e-3 if dtype == np.float32 else 1e-11)


@DTYPES
def test_gelu_is_quiet_and_right_far_from_zero(dtype):
    x = np.array([[-1e4, -50, -12, 12, 50, 1e4]], dtype)
    out, dinp = np.empty_like(x), np.empty_like(x)
    with np.errstate(all="raise", under="ignore"):
        gpt2.gelu_forward(out, x)
        gpt2.gelu_backward(dinp, np.ones_like(x), x)
    np.testing.assert_allclose(out, np.maximum(x, 0), atol=1e-30)
    np.testing.assert_allclose(dinp, x > 0, atol=1e-20)


# ------------------------------------------------------------------------------------------------
# The tricks, each beside its naive twin.

def test_gelu_by_sigmoid_is_gelu_by_tanh():
    x, out = np.linspace(-9, 9, 1000).reshape(10, 100), np.empty((10, 100))
    gpt2.gelu_forward(out, x)
    naive = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(out, naive, atol=1e-15)


@pytest.mark.parametrize("B, T, S, H, D", [(3, 7, 7, 2, 4), (2, 64, 64, 3, 8), (1, 200, 200, 5, 16),
                                           (40, 64, 64, 4, 8), (2, 1, 70, 3, 4), (1, 70, 200, 2, 4)])
def test_attention_in_blocks_is_attention_with_the_whole_matrix(B, T, S, H, D):
    """S > T: queries at the last T of S positions. Measured: 3e-16 and below."""
    rng = np.random.default_rng(1)
    q, dout = rng.standard_normal((2, B * T, H * D))
    k, v = rng.standard_normal((2, B * S, H * D))
    out, lse = np.empty_like(q), np.empty((B, H, T, 1))
    gpt2.attention_forward(out, lse, q, k, v)
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
    gpt2.attention_backward(dq, dk, dv, dout, out, lse, q, k, v)

    def heads(x): return x.reshape(B, -1, H, D).swapaxes(1, 2)
    def unheads(x): return x.swapaxes(1, 2).reshape(-1, H * D)
    q, k, v, dout = map(heads, (q, k, v, dout))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D) + np.triu(np.full((T, S), -np.inf), 1 + S - T)
    att = np.exp(scores) / np.exp(scores).sum(axis=3, keepdims=True)
    datt = dout @ v.swapaxes(2, 3)
    dscore = att * (datt - (datt * att).sum(axis=3, keepdims=True)) / math.sqrt(D)
    naive = {"out": att @ v, "dq": dscore @ k, "dk": dscore.swapaxes(2, 3) @ q,
             "dv": att.swapaxes(2, 3) @ dout}
    agree(dict(out=out, dq=dq, dk=dk, dv=dv), {n: unheads(x) for n, x in naive.items()}, 1e-14)


@DTYPES
@pytest.mark.parametrize("M, J, K", [(1, 1, 1), (3, 5, 7), (700, 300, 90), (90, 300, 700), (1, 999, 5000)])
@pytest.mark.parametrize("transposed", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_matmul_in_pieces_is_one_matmul(M, J, K, transposed, dtype):
    rng = np.random.default_rng(2)
    a, b, out = (rng.standard_normal(shape[::-1] if i in transposed else shape).astype(dtype)
                 for i, shape in enumerate([(M, J), (J, K), (M, K)]))
    a, b, out = (x.T if i in transposed else x for i, x in enumerate((a, b, out)))
    tolerance = 1e-14 if dtype == np.float64 else 1e-5
    before, bias = out.copy(), rng.standard_normal(K).astype(dtype)
    gpt2.matmul(out, a, b, add=True)
    agree({"sum": out}, {"sum": before + a @ b}, tolerance)
    if 2 not in transposed:
        gpt2.matmul(out, a, b, bias)
        agree({"product": out}, {"product": a @ b + bias}, tolerance)


def test_parallel_does_every_piece_once_and_hands_errors_on():
    pool, done = gpt2.Pool(3), []
    for pieces in (0, 1, 2, 50):
        done.clear()
        pool(done.append, [(i,) for i in range(pieces)])
        assert sorted(done) == list(range(pieces))

    def fail(i):
        if i == 7:
            raise KeyError("seven")
        done.append(i)
    done.clear()
    with pytest.raises(KeyError, match="seven"):
        pool(fail, [(i,) for i in range(20)])
    pool(done.append, [(99,)])
    assert 99 in done


@pytest.mark.parametrize("n, pieces", [(1, 5), (5, 2), (768, 3), (50257, 16), (10, 0.1), (7, 7)])
def test_split_covers_everything_once(n, pieces):
    slices = gpt2.split(n, pieces)
    assert [i for s in slices for i in range(n)[s]] == list(range(n))
    assert all(s.stop > s.start for s in slices)


@pytest.fixture
def threads():
    """Puts the number of threads back."""
    before = gpt2.parallel.threads
    yield
    gpt2.parallel.threads = before


def test_results_are_the_same_bits_on_any_number_of_threads(threads):
    config = gpt2.GPTConfig(vocab_size=257, n_positions=128, n_embd=128, n_layer=2, n_head=4)
    ids, targets = random_ids(config, 12, 128)
    results = []
    for gpt2.parallel.threads in (1, 2, 3, 8, 2):
        model = gpt2.GPT2(config)
        losses = []
        for _ in range(2):
            losses.append(model.forward(ids, targets))
            model.backward()
            losses.append(model.update(1e-2))
        results.append((losses, model.flat_grads.tobytes(), model.flat_params.tobytes()))
    assert all(result == results[0] for result in results[1:])


# ------------------------------------------------------------------------------------------------
# The model.

CONFIGS = {  # config, B, T
    "small": (SMALL, 2, 5),
    "one token": (SMALL, 3, 1),
    "one block, one head": (gpt2.GPTConfig(5, 3, 6, 1, 1), 1, 3),
    "full context": (gpt2.GPTConfig(257, 64, 32, 3, 4), 3, 64),
    "several blocks of queries": (gpt2.GPTConfig(61, 200, 24, 2, 2), 2, 150),
    "several pieces": (gpt2.GPTConfig(1031, 64, 128, 1, 4), 12, 64),
    "several parts": (gpt2.GPTConfig(31, 128, 36, 2, 3), 11, 128),
}


@DTYPES
@pytest.mark.parametrize("case", CONFIGS)
def test_model_matches_torch(case, dtype):
    """Measured: below 2e-14 in float64 (limit 1e-9), 6e-6 in float32 (limit 1e-4)."""
    config, B, T = CONFIGS[case]
    model = perturbed(config, dtype)
    gradients_agree(model, *random_ids(config, B, T), 1e-9 if dtype == np.float64 else 1e-4)


def test_model_shapes_may_change_from_call_to_call():
    model = perturbed(SMALL)
    for B, T in [(2, 5), (4, 8), (1, 1), (3, 4), (2, 5)]:
        gradients_agree(model, *random_ids(SMALL, B, T, seed=B * T), 1e-9)


def test_a_batch_in_parts_has_the_gradient_of_its_sequences():
    """One forward over 11 sequences in several parts, against each sequence by itself. Measured: 2e-15."""
    config, B, T = CONFIGS["several parts"]
    whole, single = perturbed(config), perturbed(config)
    ids, targets = random_ids(config, B, T)
    for accumulate in (False, True):  # added onto itself, the gradient is twice as large
        loss = whole.forward(ids, targets)
        logits = whole.logits.copy()
        whole.backward(accumulate=accumulate)
    assert len(whole.parts) == 4
    losses = []
    for b in range(B):
        losses.append(single.forward(ids[b:b + 1], targets[b:b + 1]))
        agree({"logits": logits[b]}, {"logits": single.logits[0]}, 1e-13)
        single.backward(2 / B, accumulate=b > 0)
    assert len(single.parts) == 1 and abs(np.mean(losses) - loss) < 1e-13
    agree(whole.grads, single.grads, 1e-13)


def test_backward_twice_gives_the_same_gradients():
    model = perturbed(SMALL, np.float32)
    grads = []
    for _ in range(2):
        model.forward(*random_ids(SMALL, 2, 5))
        model.backward()
        grads.append(model.flat_grads.copy())
    assert grads[0].any() and (grads[0] == grads[1]).all()


def test_backward_needs_a_forward_with_targets_each_time():
    model = gpt2.GPT2(SMALL)
    ids, targets = random_ids(SMALL, 2, 5)
    with pytest.raises(AssertionError, match="forward"):
        model.backward()
    model.forward(ids)
    with pytest.raises(AssertionError, match="forward"):
        model.backward()
    model.forward(ids, targets)
    model.backward()
    with pytest.raises(AssertionError, match="forward"):
        model.backward()


@DTYPES
def test_a_changed_future_token_leaves_earlier_logits_unchanged_bit_for_bit(dtype):
    config = gpt2.GPTConfig(61, 200, 24, 2, 2)
    model = perturbed(config, dtype)
    ids = random_ids(config, 2, 150)[0]
    before = model.forward(ids).copy()
    for t in (0, 1, 63, 64, 65, 127, 128, 149):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = model.forward(changed)
        assert (after[:, :t] == before[:, :t]).all()
        assert (after[:, t:] != before[:, t:]).any(axis=-1).all(), "later positions see the change"


def test_accumulated_micro_batches_give_the_gradient_of_the_large_batch():
    """Measured: 3e-16."""
    model, parts = perturbed(SMALL), perturbed(SMALL)
    ids, targets = random_ids(SMALL, 6, 5)
    loss = model.forward(ids, targets)
    model.backward()
    part_losses = []
    parts.flat_grads[:] = 77  # the first micro-batch must not care
    for i in range(3):
        part_losses.append(parts.forward(ids[2 * i:2 * i + 2], targets[2 * i:2 * i + 2]))
        parts.backward(1 / 3, accumulate=i > 0)
    assert abs(sum(part_losses) / 3 - loss) < 1e-14
    agree(parts.grads, model.grads, 1e-13)


def test_views_share_memory_with_the_flat_arrays_after_a_step():
    model = gpt2.GPT2(SMALL)
    model.forward(*random_ids(SMALL, 2, 5))
    model.backward()
    model.update(0.1)
    for views, flat in ((model.params, model.flat_params), (model.grads, model.flat_grads)):
        assert all(np.shares_memory(view, flat) for view in views.values())
        np.testing.assert_array_equal(np.concatenate([x.ravel() for x in views.values()]), flat)
    assert model.params["h.0.attn.c_attn.weight"].shape == (12, 36)


def test_initialisation_is_gpt2s():
    """Standard deviations within 3%: the smallest matrix has 16,384 numbers, 3% is over 5 sigma."""
    config = gpt2.GPTConfig(vocab_size=257, n_positions=128, n_embd=128, n_layer=3, n_head=4)
    model = gpt2.GPT2(config, seed=5)
    for name, x in model.params.items():
        if name.endswith("bias"):
            assert (x == 0).all()
        elif "ln_" in name:
            assert (x == 1).all()
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(x.std() / std - 1) < 0.03 and abs(x.mean()) < std / 20, name
    assert (gpt2.GPT2(config, seed=5).flat_params == model.flat_params).all()
    assert (gpt2.GPT2(config, seed=6).flat_params != model.flat_params).any()


@pytest.mark.parametrize("model, count", [("gpt2", 124439808), ("gpt2-medium", 354823168),
                                          ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)])
def test_parameter_counts_are_openais(model, count):
    shape = {k: v for k, v in gpt2.MODELS[model].items() if k.startswith("n_")}
    assert gpt2.size(gpt2.parameter_table(gpt2.GPTConfig(**shape))) == count


@pytest.mark.parametrize("ids, message", [
    ([1, 2], "shape"), ([[]], "shape"), ([[1.5]], "whole numbers"), ([[17]], "id 17"), ([[-1]], "id -1"),
    ([[0] * 9], "n_positions=8")])
def test_ids_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(gpt2.Refused, match=message):
        gpt2.GPT2(SMALL).forward(ids)
    with pytest.raises(gpt2.Refused, match="targets"):
        gpt2.GPT2(SMALL).forward([[1, 2]], [[1]])


@pytest.mark.parametrize("change, message", [(dict(n_head=5), "n_head 5"), (dict(n_layer=0), "n_layer"),
                                             (dict(vocab_size=-1), "vocab_size is -1")])
def test_configs_that_make_no_network_are_refused(change, message):
    with pytest.raises(gpt2.Refused, match=message):
        gpt2.GPTConfig(**change)


# ------------------------------------------------------------------------------------------------
# The step.

@pytest.mark.parametrize("decay, clip", [(0.1, 1.0), (0.0, 0.0), (0.5, 0.3)])
def test_adamw_matches_torch(decay, clip):
    """Ten steps at a high learning rate, where errors add up. Measured: 1e-14."""
    model = perturbed(gpt2.GPTConfig(257, 64, 64, 2, 4))
    tensors = {name: torch.tensor(x) for name, x in model.params.items()}
    groups = [{"params": [x for x in tensors.values() if x.ndim == n], "weight_decay": d}
              for n, d in ((1, 0.0), (2, decay))]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.97), eps=1e-8)
    rng = np.random.default_rng(0)
    for step in range(10):
        model.flat_grads[:] = rng.standard_normal(model.flat_grads.size) * 10.0 ** (step % 3 - 2)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(model.grads[name])
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), clip or math.inf)
        adamw.step()
        ours = model.update(0.05, 0.8, 0.97, 1e-8, decay, clip)
        assert abs(ours / float(norm) - 1) < 1e-12
    agree(model.params, tensors, 1e-12)


def test_a_stretch_of_the_parameters_is_updated_as_it_is_within_the_whole():
    whole, before = perturbed(SMALL), perturbed(SMALL).flat_params
    n, grads = before.size, np.random.default_rng(5).standard_normal(before.size)
    whole.flat_grads[:] = grads
    for _ in range(3):
        whole.update(0.1)
    for stretch in (slice(0, 700), slice(700, n - 100), slice(n - 100, n)):  # cut within matrices
        model = gpt2.GPT2(SMALL, np.float64, 0, stretch)
        model.flat_params[:], model.flat_grads[:] = before, grads
        for _ in range(3):
            model.update(0.1)
        assert model.flat_m.size == stretch.stop - stretch.start
        changed = np.flatnonzero(model.flat_params != before)
        assert (changed == np.arange(n)[stretch]).all()
        np.testing.assert_array_equal(model.flat_params[stretch], whole.flat_params[stretch])


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = gpt2.GPT2(SMALL)
    before = model.flat_params.copy()
    model.grads["ln_f.bias"][3] = np.nan
    assert math.isnan(model.update(0.1))
    assert (model.flat_params == before).all() and not model.flat_m.any() and model.steps == 0


def test_ten_steps_of_training_follow_torch():
    """Losses in float32 at the default run's learning rate. Measured: 1e-6 (limit 1e-4)."""
    config = gpt2.GPTConfig(257, 64, 64, 4, 4)
    model = gpt2.GPT2(config)
    p = torch_params(model)
    groups = [{"params": [x for x in p.values() if x.ndim == n], "weight_decay": d} for n, d in ((1, 0), (2, 0.1))]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    ids, targets = random_ids(config, 4, 64)
    ours, theirs = [], []
    for _ in range(10):
        ours.append(model.forward(ids, targets))
        model.backward()
        model.update(1e-3)
        loss = torch_gpt2(p, config, torch.tensor(ids), torch.tensor(targets))[1]
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        adamw.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[-1] < ours[0] - 0.3


def test_learning_rate_at_its_corners():
    def lr(step): return gpt2.learning_rate(step, 1000, 100, 1e-3, 1e-4)
    assert lr(1) == pytest.approx(1e-5) and lr(50) == pytest.approx(5e-4)
    assert lr(100) == 1e-3 and lr(550) == pytest.approx(5.5e-4) and lr(1000) == pytest.approx(1e-4)
    assert lr(101) < 1e-3
    assert gpt2.learning_rate(1, 10, 0, 1e-3, 1e-4) < 1e-3
    assert gpt2.learning_rate(5, 5, 5, 1e-3, 1e-4) == 1e-3
    assert gpt2.learning_rate(5, 5, 100, 1e-3, 1e-4) == pytest.approx(5e-5)


# ------------------------------------------------------------------------------------------------
# The sampler.

def test_greedy_generation_takes_the_likeliest_token_and_the_window_slides():
    model = perturbed(SMALL)
    ids = np.array([[3, 1], [4, 1]])
    out, columns = model.generate(ids, 12, temperature=0), []
    assert out.shape == (2, 14) and (out[:, :2] == ids).all()
    for t in range(2, 14):
        assert (out[:, t] == model.forward(out[:, max(0, t - 8):t])[:, -1].argmax(axis=1)).all()
    model.generate(ids, 12, temperature=0, on_token=columns.append)
    assert (np.stack(columns, axis=1) == out[:, 2:]).all()


def test_generation_repeats_with_the_same_generator():
    model = perturbed(SMALL)
    first, second, other = (model.generate([[1]], 30, rng=np.random.default_rng(s)) for s in (1, 1, 2))
    assert (first == second).all() and (first != other).any()


LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2]))


@pytest.mark.parametrize("options, expected", [
    (dict(), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (dict(top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
    (dict(top_k=99), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (dict(top_p=0.65), [4 / 7, 0, 3 / 7, 0, 0]),
    (dict(top_p=0.75), [4 / 9, 0, 3 / 9, 0, 2 / 9]),
    (dict(top_p=1.0), [0.4, 0.05, 0.3, 0.05, 0.2]),
    (dict(top_p=0.0), [1, 0, 0, 0, 0]),
    (dict(top_k=3, top_p=0.7), [4 / 7, 0, 3 / 7, 0, 0]),  # of the three, 4/9 + 3/9 reach 0.7
    (dict(temperature=0.5), [.16 / .295, .0025 / .295, .09 / .295, .0025 / .295, .04 / .295])])
def test_samples_come_as_often_as_their_probabilities_say(options, expected):
    """Of 40,000 draws, a share p is within 5 sigma = 0.0125 or closer; what is left out never comes."""
    options = dict(temperature=1.0, top_k=None, top_p=None) | options
    rows = np.tile(LOGITS, (40000, 1))
    counts = np.bincount(gpt2.sample(rows, rng=np.random.default_rng(0), **options), minlength=5)
    expected = np.array(expected)
    assert (np.abs(counts / 40000 - expected) <= 5 * np.sqrt(expected * (1 - expected) / 40000) + 1e-12).all()


# ------------------------------------------------------------------------------------------------
# Text and tokens.

def real_text():
    """Tinyshakespeare where this machine has it."""
    for path in (HERE / "data" / "tinyshakespeare.txt", SHARED / "tinyshakespeare.txt"):
        if path.exists():
            return path.read_text(encoding="utf-8")
    pytest.skip("tinyshakespeare.txt is neither in data/ nor in ../shared/data, and tests do not download")


@pytest.fixture
def tokenizer(request, monkeypatch):
    """A tokenizer; GPT-2's where its merges are on this machine."""
    if request.param == "gpt2":
        for folder in (os.environ.get("TIKTOKEN_CACHE_DIR"), SHARED / "tiktoken", HERE / "data" / "tiktoken"):
            if folder and Path(folder).is_dir():
                monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
                break
        else:
            pytest.skip("GPT-2's merges are on no known place of this machine, and tests do not download")
    return prepro.TOKENIZERS[request.param]()


BOTH = pytest.mark.parametrize("tokenizer", ["byte", "gpt2"], indirect=True)


@BOTH
def test_tokens_decode_to_the_text_they_came_from(tokenizer):
    text = "First Citizen:\nBefore we proceed — naïve café, 日本語 🙂.\n\n<|endoftext|>All:\n  Speak!\r\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert max(ids) < tokenizer.n_vocab and ids.count(tokenizer.eot_token) == 1
    assert tokenizer.n_vocab == tokenizer.eot_token + 1


def test_gpt2_tokens_are_gpt2s(tokenizer_gpt2):
    assert tokenizer_gpt2.encode("Hello world") == [15496, 995]
    assert tokenizer_gpt2.encode("<|endoftext|>") == [50256]


@pytest.fixture
def tokenizer_gpt2(monkeypatch):
    return tokenizer.__wrapped__(types.SimpleNamespace(param="gpt2"), monkeypatch)


@BOTH
def test_token_counts_of_the_real_text(tokenizer):
    train, val = prepro.tokenize(real_text(), tokenizer)
    assert (len(train), len(val)) == {"byte": (1003854, 111540), "gpt2": (305260, 32768)}[tokenizer.name]
    if tokenizer.name == "gpt2":
        assert val[0] == tokenizer.eot_token and tokenizer.decode(val[1:5]) == "First Citizen:\n"[:-1] + "\n"


def test_gpt2_sections_are_split_as_in_llm_c():
    class Letters(prepro.ByteTokenizer):
        name, eot_token = "letters", 0
    train, val = prepro.tokenize("a\n\nb\n\n\n\nc" * 20, Letters())
    ids = np.concatenate([val, train]).tolist()
    assert ids[:11] == [0, *b"a\n\n", 0, *b"b\n\n", 0, *b"\n\n"] and ids[-2:] == [0, *b"c"]
    assert len(val) == len(ids) // 10


def write(path, header=(20240520, 1, 20), tokens=range(20), extra=b""):
    ints = np.zeros(256, "<i4")
    ints[:3] = header
    path.write_bytes(ints.tobytes() + np.array(tokens, "<u2").tobytes() + extra)
    return path


def test_token_files_have_llm_cs_format_byte_for_byte(tmp_path):
    prepro.write_tokens(tmp_path / "a.bin", np.array([1, 2, 50256]))
    assert (tmp_path / "a.bin").read_bytes() == (
        b"\x88\xd8\x34\x01" + b"\x01\0\0\0" + b"\x03\0\0\0" + bytes(253 * 4) + b"\x01\0\x02\0\x50\xc4")
    assert list(prepro.map_tokens(tmp_path / "a.bin")) == [1, 2, 50256]


@pytest.mark.parametrize("how, message", [
    (dict(header=(1234, 1, 20)), "not a token file .magic 1234"),
    (dict(header=(20240520, 2, 20)), "version 2"),
    (dict(header=(20240520, 1, 21)), "says 21 tokens, it holds 20"),
    (dict(header=(20240520, 1, 19)), "says 19 tokens, it holds 20"),
    (dict(header=(20240520, 1, -1)), "says -1 tokens"),
    (dict(extra=b"x"), "it holds 20.5"),
    (dict(header=(20240520, 1, 1), tokens=[1]), "says 1 tokens")])
def test_token_files_that_are_wrong_are_refused(tmp_path, how, message):
    with pytest.raises(prepro.Refused, match=f"t.bin: .*{message}.*; make it again"):
        prepro.Tokens(write(tmp_path / "t.bin", **how), 257)


def test_token_files_that_are_missing_short_or_folders_are_refused(tmp_path):
    with pytest.raises(prepro.Refused, match="no such file; run python prepro"):
        prepro.Tokens(tmp_path / "none*.bin", 257)
    (tmp_path / "t.bin").write_bytes(b"\x88\xd8\x34\x01")
    with pytest.raises(prepro.Refused, match="too short"):
        prepro.Tokens(tmp_path / "t.bin", 257)
    (tmp_path / "d.bin").mkdir()
    with pytest.raises(prepro.Refused, match="d.bin: "):
        prepro.Tokens(tmp_path / "d.bin", 257)


def test_ids_outside_the_vocabulary_are_refused_with_file_and_id(tmp_path):
    tokens = prepro.Tokens(write(tmp_path / "t.bin", tokens=[*range(19), 300]), 257)
    with pytest.raises(prepro.Refused, match="t.bin: id 300 at token 19 .* 257"):
        list(tokens.once(2, 4))
    with pytest.raises(prepro.Refused, match="t.bin: id 300 at token 19"):
        for _ in range(100):
            tokens.batch(np.random.default_rng(), 4, 4)
    with pytest.raises(prepro.Refused, match="has no 21 tokens in a row; lower --seq_len 20"):
        tokens.batch(np.random.default_rng(), 4, 20)


def test_batches_are_windows_of_all_shards_and_targets_are_one_later(tmp_path):
    write(tmp_path / "t0.bin", (20240520, 1, 12), range(12))
    write(tmp_path / "t1.bin", (20240520, 1, 3), range(100, 103))  # too short for a window of 5 + 1
    write(tmp_path / "t2.bin", (20240520, 1, 8), range(200, 208))
    tokens, starts = prepro.Tokens(tmp_path / "t*.bin", 257), []
    assert len(tokens) == 23
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(200):
        ids, targets = tokens.batch(rng, 3, 5)
        assert ids.shape == targets.shape == (3, 5)
        assert (np.diff(ids, axis=1) == 1).all() and (targets == ids + 1).all()
        assert (tokens.batch(again, 3, 5)[0] == ids).all()
        starts.extend(ids[:, 0])
    counts = np.bincount(starts, minlength=208)
    assert set(np.flatnonzero(counts)) == {*range(7), 200, 201, 202}  # every window of 5 + 1 tokens
    assert counts[counts > 0].min() > 30, "600 draws from ten places"


@pytest.mark.parametrize("B, T", [(1, 1), (2, 3), (3, 5), (5, 19), (7, 50)])
def test_validation_predicts_every_token_once(tmp_path, B, T):
    write(tmp_path / "t0.bin")
    write(tmp_path / "t1.bin", (20240520, 1, 9), range(100, 109))
    seen = []
    for ids, targets in prepro.Tokens(tmp_path / "t*.bin", 257).once(B, T):
        assert ids.shape == targets.shape and ids.shape[0] <= B and ids.shape[1] <= T
        assert (targets == ids + 1).all()
        seen.extend(targets.ravel())
    assert seen == [*range(1, 20), *range(101, 109)]


def test_validation_loss_is_the_mean_over_all_tokens(tmp_path):
    model = perturbed(gpt2.GPTConfig(32, 4, 12, 1, 3))
    tokens = prepro.Tokens(write(tmp_path / "t.bin"), 32)
    each = []
    for ids, targets in tokens.once(1, 4):
        each.extend([model.forward(ids, targets)] * ids.size)
    assert gpt2.evaluate(model, tokens, 3, 4) == pytest.approx(np.mean(each), abs=1e-13)


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "f"
    with prepro.written_whole(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError):
        with prepro.written_whole(path) as file:
            file.write(b"new")
            raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["f"]


# ------------------------------------------------------------------------------------------------
# The programs.

def run(program, *arguments, cwd, timeout=120):
    """Runs one of the programs where no network is: every proxy is a closed port."""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    env |= {f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https", "HTTP", "HTTPS")}
    env["TIKTOKEN_CACHE_DIR"] = str(cwd / "no_tiktoken")
    return subprocess.run([sys.executable, HERE / program, *map(str, arguments)], cwd=cwd, env=env,
                          capture_output=True, text=True, encoding="utf-8", timeout=timeout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The default run, made short, in an empty folder without a network."""
    folder = tmp_path_factory.mktemp("run")
    return run("train_gpt2.py", "--steps", 100, "--eval_every", 50, "--max_new_tokens", 50,
               cwd=folder), folder


def test_without_a_network_it_says_so_and_learns_from_pythons_own_text(trained):
    result, folder = trained
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert "tinyshakespeare" in first and "could not be fetched" in first and "pydoc_data" in first
    assert (folder / "data" / "pydoc_byte_train.bin").exists()
    losses = [float(x) for x in re.findall(r"^step +\d+ \| val loss (\S+)", result.stdout, re.M)]
    assert len(losses) == 2 and losses[1] < 2.7  # from 5.55 = ln 257; measured: 2.55 after 100 steps


def test_the_log_is_readable_by_people_and_programs(trained):
    result, folder = trained
    line = (r"^step +\d+/100 \| loss \d\.\d{4} \| norm \d+\.\d\d \| lr \d\.\d\de-\d\d \| +\d+ ms "
            r"\| +\d+ tok/s \| +\d+ GFLOP/s \| eta (\d+m)?\d+s$")
    assert len(re.findall(line, result.stdout, re.M)) == 3  # steps 1, 50, 100
    with open(folder / "out" / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "step loss val_loss norm lr ms tokens_per_second".split()
    assert [int(row["step"]) for row in rows] == [1, 50, 100]
    assert [row["step"] for row in rows if row["val_loss"]] == ["50", "100"]
    assert [row["step"] for row in rows if row["loss"]] == ["1", "50", "100"]
    shown = re.search(r"100 \| val loss (\S+)", result.stdout)[1]
    assert f"{float(rows[-1]['val_loss']):.4f}" == shown


def test_the_same_command_gives_the_same_losses(trained):
    result, folder = trained
    again = run("train_gpt2.py", "--steps", 100, "--eval_every", 50, "--max_new_tokens", 50,
                "--threads", 3, cwd=folder)

    def numbers(text): return re.findall(r"loss \S+|norm \S+|lr \S+", text), text.split("-" * 80)[1]
    assert numbers(again.stdout) == numbers(result.stdout)


def test_steps_0_validates_and_samples_only(trained):
    _, folder = trained
    result = run("train_gpt2.py", "--steps", 0, "--data", "pydoc", "--prompt", "The ",
                 "--max_new_tokens", 5, "--out", "out0", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^step 0 \| val loss 5\.\d{4}$", result.stdout, re.M)  # near ln 257 = 5.55
    assert "\nThe " in result.stdout and " ms |" not in result.stdout


def test_help_shows_the_defaults_of_the_model_asked_for(tmp_path):
    result = run("train_gpt2.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and "(default: 3500)" in result.stdout and "n_embd" in result.stdout
    result = run("train_gpt2.py", "--model", "gpt2-xl", "--help", cwd=tmp_path)
    assert "(default: 1600)" in result.stdout and "(default: gpt2)" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--n_heads", "3"], "unrecognized arguments: --n_heads"),
    (["--model", "gpt3"], "invalid choice: 'gpt3'"),
    (["--n_layer", "0"], "--n_layer: 0 is not a whole number of at least 1"),
    (["--lr", "high"], "--lr: high is not a number of at least 0"),
    (["--lr", "nan"], "--lr: nan is not a number"),
    (["--lr", "inf"], "--lr: inf is not a number"),
    (["--top_p", "1.5"], "--top_p: 1.5 is not a number of at least 0 and at most 1"),
    (["--n_embd", "100", "--n_head", "3"], "n_embd 100 .* n_head 3"),
    (["--seq_len", "65"], "--seq_len 65 .* 64"),
    (["--train_bin", "x.bin"], "--val_bin"),
    (["--train_bin", "x.bin", "--val_bin", "y.bin"], "x.bin: no such file"),
    (["--data", "novel"], "data.novel_byte_train.bin: no such file"),
    (["--tokenizer", "gpt2"], "GPT-2's merges")])
def test_wrong_options_get_one_line_and_status_2(tmp_path, arguments, message):
    result = run("train_gpt2.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(f"train_gpt2.py: error: .*{message}.*\n", result.stderr), result.stderr


def test_prepro_makes_token_files_of_any_text(tmp_path):
    (tmp_path / "novel.txt").write_text("Es war einmal — né.\n" * 50, encoding="utf-8")
    result = run("prepro_tinyshakespeare.py", "--text", "novel.txt", cwd=tmp_path)
    assert result.returncode == 0 and "novel_byte_train.bin: 1,035 byte tokens" in result.stdout
    parts = [prepro.map_tokens(tmp_path / "data" / f"novel_byte_{split}.bin") for split in ("train", "val")]
    assert prepro.ByteTokenizer().decode(np.concatenate(parts)) == "Es war einmal — né.\n" * 50


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"\xff\xfe", "not UTF-8 .byte 0 is 0xff"), (b"a", "too few"), (None, "No such file")])
def test_prepro_refuses_texts_it_cannot_use(tmp_path, content, message):
    if content is not None:
        (tmp_path / "novel.txt").write_bytes(content)
    result = run("prepro_tinyshakespeare.py", "--text", "novel.txt", cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(f"prepro_tinyshakespeare.py: error: novel.*{message}.*\n", result.stderr)
    assert not list(tmp_path.glob("data/*.bin"))


def test_prepro_says_what_to_do_when_the_download_fails(tmp_path):
    result = run("prepro_tinyshakespeare.py", cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(r"prepro_\S+: error: https://\S+/input.txt could not be fetched: .*; download it "
                        r"by hand and put it at data.tinyshakespeare.txt\n", result.stderr)


# ------------------------------------------------------------------------------------------------
# Weights in and out.

def saved_model(folder, config=SMALL, dtype=np.float32):
    """A perturbed model and the folder that it is saved in."""
    model = perturbed(config, dtype)
    model.save_pretrained(folder)
    return model


def tensors_of(path):
    """A safetensors file read by its description alone: ({name: entry}, the numbers' bytes)."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + length]), data[8 + length:]


def write_raw(path, entries):
    """{name: (dtype, shape, bytes)} as a safetensors file."""
    index, payload = {}, b""
    for name, (dtype, shape, raw) in entries.items():
        index[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(payload), len(payload) + len(raw)]}
        payload += raw
    header = json.dumps(index).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + payload)


def raw_entries(model):
    return {name: ("F32", x.shape, x.tobytes()) for name, x in model.params.items()}


def test_what_is_saved_is_what_is_loaded_bit_for_bit(tmp_path):
    for dtype in (np.float32, np.float64):
        model = saved_model(tmp_path, dtype=dtype)
        again = gpt2.GPT2.from_pretrained(tmp_path, dtype)
        assert again.config == SMALL and again.flat_params.tobytes() == model.flat_params.tobytes()
        index, numbers = tensors_of(tmp_path / "model.safetensors")
        assert index.pop("__metadata__") == {"format": "pt"} and len(index) == len(model.params)
        for name, x in model.params.items():
            entry = index[f"transformer.{name}"]
            start, stop = entry["data_offsets"]
            assert entry["shape"] == list(x.shape) and numbers[start:stop] == x.tobytes()


def test_files_in_the_wild_are_read(tmp_path):
    """No prefix, a stored head, old masks, and half precision."""
    model = saved_model(tmp_path)
    path, wte = tmp_path / "model.safetensors", model.params["wte.weight"]
    mask = {"h.0.attn.bias": ("BOOL", (1, 1, 8, 8), bytes(64)), "h.1.attn.masked_bias": ("F32", (), bytes(4))}
    write_raw(path, mask | raw_entries(model) | {"lm_head.weight": ("F32", wte.shape, wte.tobytes())})
    assert (gpt2.GPT2.from_pretrained(tmp_path).flat_params == model.flat_params).all()
    write_raw(path, {n: ("F16", x.shape, x.astype("<f2").tobytes()) for n, x in model.params.items()})
    assert (gpt2.GPT2.from_pretrained(tmp_path).flat_params == model.flat_params.astype(np.float16)).all()
    upper = {n: (x.view(np.uint32) >> 16).astype("<u2") for n, x in model.params.items()}
    write_raw(path, {n: ("BF16", x.shape, x.tobytes()) for n, x in upper.items()})
    cut = (model.flat_params.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert (gpt2.GPT2.from_pretrained(tmp_path).flat_params == cut).all()


@pytest.mark.parametrize("change, message", [
    (lambda e: e.pop("h.1.mlp.c_fc.bias"), "has no tensor h.1.mlp.c_fc.bias"),
    (lambda e: e.update({"extra": ("F32", (1,), bytes(4))}), "unknown tensor extra"),
    (lambda e: e.update({"ln_f.bias": ("F32", (6, 2), bytes(48))}), r"ln_f.bias is F32 \(6, 2\)"),
    (lambda e: e.update({"ln_f.bias": ("I32", (12,), bytes(48))}), r"ln_f.bias is I32"),
    (lambda e: e.update({"transformer.ln_f.bias": e["ln_f.bias"]}), "has ln_f.bias twice"),
    (lambda e: e.update({"lm_head.weight": ("F32", (17, 12), bytes(17 * 48))}), "lm_head.weight is not wte"),
    (lambda e: e.update({"lm_head.weight": ("BOOL", (17, 12), bytes(17 * 12))}), "lm_head.weight is not wte"),
])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    entries = raw_entries(saved_model(tmp_path))
    change(entries)
    write_raw(tmp_path / "model.safetensors", entries)
    with pytest.raises(prepro.Refused, match=f"model.safetensors: .*{message}"):
        gpt2.GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, value", [
    ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
    ("tie_word_embeddings", False), ("n_inner", 100), ("n_embd", "12"), ("n_layer", None), ("n_head", 0),
    ("vocab_size", 1.5), ("layer_norm_epsilon", 1e-6), ("model_type", "llama"), ("n_positions", True)])
def test_configs_of_something_else_are_refused_by_name(tmp_path, name, value):
    saved_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(prepro.Refused, match=f"config.json: {name} is {value!r}"):
        gpt2.GPT2.from_pretrained(tmp_path)


def mutated(data, rng):
    """The bytes with something wrong: flipped, cut, doubled, or a number in the header changed."""
    data, kind = bytearray(data), rng.integers(5)
    at = int(rng.integers(min(len(data), 3000) if rng.random() < 0.7 else len(data)))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 3:
        digits = [i for i in range(min(len(data), 3000)) if chr(data[i]).isdigit()]
        data[digits[int(rng.integers(len(digits)))] if digits else at] = ord("0") + int(rng.integers(10))
    else:
        data[at:at + 4] = rng.bytes(4)
    return bytes(data)


def test_mutated_weight_files_are_refused_or_load_to_what_they_hold(tmp_path):
    saved_model(tmp_path)
    path, rng, loaded = tmp_path / "model.safetensors", np.random.default_rng(7), 0
    original = path.read_bytes()
    for _ in range(2000):
        path.write_bytes(mutated(original, rng))
        try:
            with np.errstate(all="ignore"):
                model = gpt2.GPT2.from_pretrained(tmp_path)
        except prepro.Refused as refused:
            assert "model.safetensors" in str(refused) and "\n" not in str(refused)
            continue
        loaded += 1
        index, numbers = tensors_of(path)
        for name, x in model.params.items():
            entry = index.get(f"transformer.{name}") or index[name]
            start, stop = entry["data_offsets"]
            if entry["dtype"] == "F32":
                assert x.tobytes() == numbers[start:stop], name
    assert 100 < loaded < 1500


def test_mutated_token_files_are_refused_or_load_to_what_they_hold(tmp_path):
    path, rng, loaded = write(tmp_path / "t.bin"), np.random.default_rng(8), 0
    original = path.read_bytes()
    for _ in range(1000):
        data = mutated(original, rng)
        path.write_bytes(data)
        try:
            ids = np.concatenate([x.ravel() for x, _ in prepro.Tokens(path, 2**16).once(2, 4)])
        except prepro.Refused:
            continue
        loaded += 1
        held = np.frombuffer(data, "<u2", offset=1024)
        assert (ids == held[:-1]).all() and len(held) == int.from_bytes(data[8:12], "little")
    assert loaded > 100


# ------------------------------------------------------------------------------------------------
# The cache.

@pytest.mark.parametrize("B, dtype, tolerance", [(1, np.float64, 1e-12), (3, np.float64, 1e-12), (3, np.float32, 1e-5)])
def test_cached_logits_are_uncached_logits_at_every_position(B, dtype, tolerance):
    """Measured: 2e-15 in float64, 4e-7 in float32."""
    config = gpt2.GPTConfig(61, 150, 24, 2, 2)
    cached, uncached = perturbed(config, dtype), perturbed(config, dtype)
    ids, cache = random_ids(config, B, 150)[0], None
    for t in [5, *range(6, 151)]:
        logits, cache = cached.continue_with(ids[:, :t], cache)
        agree({"logits": logits}, {"logits": uncached.forward(ids[:, :t])[:, -1]}, tolerance)


def test_past_the_context_the_window_slides_by_a_quarter():
    model, fresh, seen = perturbed(SMALL), perturbed(SMALL), []
    step = model.continue_with

    def watched(ids, cache):
        logits, cache = step(ids, cache)
        seen.append(ids.shape[1])
        agree({"logits": logits}, {"logits": fresh.forward(ids)[:, -1]}, 1e-12)
        return logits, cache
    model.continue_with = watched
    assert model.generate([[3, 1]], 16, rng=np.random.default_rng(0)).shape == (1, 18)
    assert seen == [2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 6, 7, 8, 6, 7, 8]


def test_a_character_in_two_tokens_is_not_broken(capsys):
    class Speaker:
        def generate(self, ids, n, *rest):
            assert ids == [[79, 104]]
            for byte in "é!".encode():
                rest[-1](np.array([byte]))
    args = types.SimpleNamespace(prompt="Oh", tokenizer="byte", max_new_tokens=3, temperature=1, top_k=None, top_p=None)
    gpt2.print_sample(Speaker(), prepro.ByteTokenizer(), args, None)
    assert capsys.readouterr().out == "Ohé!\n"


# ------------------------------------------------------------------------------------------------
# Runs that stop, go on, and fail.

TINY = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--n_positions", "16", "--seq_len", "16",
        "--batch_size", "3", "--train_bin", "train.bin", "--val_bin", "val.bin", "--warmup", "5",
        "--max_new_tokens", "30", "--log_every", "1", "--eval_every", "10", "--sample_every", "15"]
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows ends a process without asking it")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with token files, in which runs take a second."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    for name, n in ("train", 3000), ("val", 200):
        prepro.write_tokens(tmp_path / f"{name}.bin", rng.integers(65, 91, size=n))
    return tmp_path


def trainer(monkeypatch, *arguments):
    """train_gpt2.py's main in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *map(str, arguments)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        gpt2.files.program("train_gpt2.py", gpt2.main)
    except SystemExit as done:
        return done.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def result_of(out, steps):
    """What must be the same: the log without its times, and all numbers of the last checkpoint."""
    log = [line.split(",")[:5] for line in (Path(out) / "log.csv").read_text().splitlines()]
    folder = Path(out) / f"step_{steps:06}"
    state = prepro.read_trainer(folder, verify=True)
    return log, state["rng"], [(folder / f"{x}.safetensors").read_bytes() for x in ("model", "optimizer")]


def start(*arguments, cwd):
    return subprocess.Popen([sys.executable, HERE / "train_gpt2.py", *map(str, arguments)], cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tiny, number, monkeypatch, capfd):
    assert trainer(monkeypatch, *TINY, "--steps", 400, "--out", "whole") == 0
    whole = capfd.readouterr().out
    process, seen = start(*TINY, "--steps", 400, "--out", "parts", cwd=tiny), ""
    while "step   7/" not in seen:
        seen += process.stdout.readline()
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "stopping after this step" in errors
    stopped = int(re.search(r"stopped after step (\d+), which is saved in parts", rest)[1])
    assert stopped < 400
    assert trainer(monkeypatch, "--resume", "--out", "parts") == 0
    assert result_of("parts", 400) == result_of("whole", 400)
    texts = re.compile("-{80}\n(.*?)\n-{80}", re.S)
    assert texts.findall(seen + rest + capfd.readouterr().out) == texts.findall(whole)


@POSIX
def test_a_run_killed_at_any_moment_goes_on_from_a_whole_checkpoint(tiny, monkeypatch):
    """20 kills at random moments of a run that does little but save."""
    options = [*TINY, "--steps", 300, "--save_every", 1, "--eval_every", 1000, "--sample_every", 1000]
    assert trainer(monkeypatch, *options, "--out", "whole") == 0
    rng, kills, saved = np.random.default_rng(4), 0, 0
    while kills < 20:
        going_on = saved > 0
        process = start(*(["--resume", "--steps", 300] if going_on else options), "--out", "killed", cwd=tiny)
        process.stdout.readline()  # its first word: everything is imported
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        kills += 1
        folders = prepro.checkpoints("killed")
        if folders:
            prepro.read_trainer(folders[-1], verify=True)
            saved = int(folders[-1].name[5:])
        if saved >= 300:
            break
    assert saved > 0
    if saved < 300:
        assert trainer(monkeypatch, "--resume", "--out", "killed") == 0
    assert result_of("killed", 300)[0] == result_of("whole", 300)[0]
    assert result_of("killed", 300)[2] == result_of("whole", 300)[2]
    assert not list(Path("killed").glob("*.tmp"))


def test_resuming_refuses_what_would_change_the_run(tiny, monkeypatch, capsys):
    assert trainer(monkeypatch, *TINY, "--steps", 6, "--save_every", 3) == 0
    capsys.readouterr()
    for arguments, message in [
            (["--n_embd", 32], "--n_embd 32 would change"), (["--lr", 1], "--lr 1.0 would change"),
            (["--seed", 1], "--seed 1 would change"), (["--train_bin", "val.bin"], "--train_bin val.bin would"),
            (["--batch_size", 4], "the run had 3 sequences a step, not 4"), ([], "the run has made 6 already"),
            (["--steps", 5], "the run has made 6 already"), (["--out", "other"], "other has no checkpoint")]:
        assert trainer(monkeypatch, "--resume", *arguments) == 2
        assert re.fullmatch(f"train_gpt2.py: error: .*{message}.*\n", capsys.readouterr().err)
    prepro.write_tokens("train.bin", np.arange(100))
    assert trainer(monkeypatch, "--resume", "--steps", 9) == 2
    assert "the run had [3000, 200] tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_opens(tiny, name, monkeypatch, capsys):
    assert trainer(monkeypatch, *TINY, "--steps", 6, "--save_every", 3) == 0
    path = Path("out/step_000006") / name
    data = path.read_bytes()
    capsys.readouterr()
    flipped = bytearray(data)
    flipped[len(data) * 2 // 3] ^= 4
    for damaged in (data[:len(data) // 2], bytes(flipped), b""):
        path.write_bytes(damaged)
        assert trainer(monkeypatch, "--resume", "--steps", 8) == 2
        assert re.fullmatch(f"train_gpt2.py: error: out.step_000006.{name}: .*\n", capsys.readouterr().err)
    shutil.rmtree("out/step_000006")
    assert trainer(monkeypatch, "--resume", "--steps", 8) == 0


def test_a_full_disk_leaves_the_checkpoint_before(tiny, monkeypatch, capsys):
    """ENOSPC at the first write of a save, at the second, ..., until one succeeds."""
    assert trainer(monkeypatch, *TINY, "--steps", 4, "--save_every", 2) == 0
    capsys.readouterr()
    shutil.rmtree("out/step_000004")
    before, failures = prepro.read_trainer("out/step_000002", verify=True), 0
    model = gpt2.GPT2.from_pretrained("out/step_000002")

    def full_after(n):
        left = [n]

        class Full:
            def __init__(self, file): self.file = file
            def __enter__(self): return self
            def __exit__(self, *args): self.file.close()
            def __getattr__(self, name): return getattr(self.file, name)
            def write(self, data):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return self.file.write(data)

        def opened(path, mode="r", *args, **kwargs):
            file = open(path, mode, *args, **kwargs)
            return Full(file) if mode == "wb" else file
        return opened
    for n in range(100):
        monkeypatch.setattr(prepro, "open", full_after(n), raising=False)
        try:
            prepro.save_checkpoint("out", vars(model.config), model.params, {"m": model.flat_m, "v": model.flat_v},
                                   before | {"step": 4})
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures += 1
        finally:
            monkeypatch.undo()
        assert [p.name for p in prepro.checkpoints(tiny / "out")] == ["step_000002"]
        assert not list((tiny / "out").glob("*.tmp")) and prepro.read_trainer(tiny / "out/step_000002", verify=True)
        os.chdir(tiny)
    assert failures == 1 + 2 + len(model.params) + 2 + 2 + 1  # config, two headers and what they head, trainer
    assert prepro.read_trainer("out/step_000004", verify=True)["step"] == 4


def test_an_earlier_run_is_put_aside(tiny, monkeypatch, capsys):
    for _ in range(3):
        assert trainer(monkeypatch, *TINY, "--steps", 1) == 0
    assert capsys.readouterr().out.count("out holds an earlier run: it is out.") == 2
    assert all((Path(x) / "log.csv").exists() for x in ("out", "out.1", "out.2"))
    Path("out/thesis.txt").write_text("mine")
    assert trainer(monkeypatch, *TINY, "--steps", 1) == 2
    assert "thesis.txt, which is not a run's" in capsys.readouterr().err and Path("out/thesis.txt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(tiny, monkeypatch, capsys):
    with np.errstate(all="ignore"):
        assert trainer(monkeypatch, *TINY, "--steps", 300, "--save_every", 1, "--lr", 1e37, "--grad_clip", 0,
                    "--warmup", 2) == 2
    step, advice = re.fullmatch(r"train_gpt2.py: error: step (\d+): the loss is (.*)\n", capsys.readouterr().err).groups()
    assert "lower --lr from 1e+37" in advice
    folders = prepro.checkpoints("out")
    assert folders[-1].name == f"step_{int(step) - 1:06}" and prepro.read_trainer(folders[-1], verify=True)


def test_weights_speak_and_exit(tiny, monkeypatch, capsys):
    assert trainer(monkeypatch, *TINY, "--steps", 2) == 0
    capsys.readouterr()
    options = ["--init_from", "out", "--prompt", "ROMEO:", "--num_samples", 2, "--seed", 7, "--max_new_tokens", 40,
               "--temperature", 0.8, "--top_k", 40, "--top_p", 0.95]
    assert trainer(monkeypatch, *options) == 0
    said = capsys.readouterr().out
    assert said.count("ROMEO:") == 2 and "step" not in said and len(said) > 60
    assert trainer(monkeypatch, *options) == 0 and capsys.readouterr().out == said
    assert trainer(monkeypatch, "--init_from", "out", "--steps", 1, "--out", "tuned", *TINY[10:]) == 0  # trains on
    assert "out" in capsys.readouterr().out.splitlines()[0] and Path("tuned/step_000001").is_dir()


# ------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine.

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server with the bytes `content`; `behave` says how it misbehaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            how, first = state.behave.pop(0) if state.behave else "", 0
            state.ranges.append(self.headers.get("Range"))
            if how == "404" or how == "416":
                return self.send_error(int(how))
            if self.headers.get("Range") and how != "ignores ranges":
                first = int(self.headers["Range"][6:-1])
            body = state.content[first:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if how == "breaks off" else body)

        def log_message(self, *args): pass
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    state = types.SimpleNamespace(behave=[], ranges=[], content=np.random.default_rng(0).bytes(300000),
                                  url=f"http://127.0.0.1:{web.server_port}/f")
    yield state
    web.shutdown()


@pytest.mark.parametrize("behave, ranges", [
    ([], [None]), (["breaks off", ""], [None, "bytes=150000-"]),
    (["breaks off", "breaks off", ""], [None, "bytes=150000-", "bytes=225000-"]),
    (["breaks off", "ignores ranges"], [None, "bytes=150000-"]),
    (["breaks off", "416", ""], [None, "bytes=150000-", None])])
def test_a_download_goes_on_where_it_stopped_and_appears_whole(server, behave, ranges):
    server.behave = list(behave)
    for attempt in range(behave.count("breaks off")):
        with pytest.raises(prepro.Refused, match="/f could not be fetched: .* bytes are kept.*; by hand"):
            prepro.download(server.url, "w", "by hand")
        assert not Path("w").exists()
    prepro.download(server.url, "w", "by hand", hashlib.sha256(server.content).hexdigest())
    assert Path("w").read_bytes() == server.content and not Path("w.part").exists() and server.ranges == ranges


def test_a_download_that_is_missing_or_something_else_is_refused(server):
    server.behave = ["404"]
    with pytest.raises(prepro.Refused, match="/f could not be fetched: .*; by hand"):
        prepro.download(server.url, "w", "by hand")
    with pytest.raises(prepro.Refused, match="sha256 .* where 00 was expected"):
        prepro.download(server.url, "w", "by hand", "00")
    assert not Path("w").exists() and not Path("w.part").exists()


def test_gpt2_is_fetched_by_name(server, monkeypatch):
    monkeypatch.setattr(prepro, "MODEL_URL", server.url + "/{}/{}")
    assert prepro.find_model("gpt2", ["gpt2"]) == Path("data/gpt2")
    assert Path("data/gpt2/model.safetensors").read_bytes() == server.content
    monkeypatch.setattr(prepro, "MODEL_URL", "http://127.0.0.1:9/{}/{}")
    with pytest.raises(prepro.Refused, match="http://127.0.0.1:9/gpt2-xl/config.json and "
                       "http://127.0.0.1:9/gpt2-xl/model.safetensors by hand into data.gpt2-xl"):
        prepro.find_model("gpt2-xl", ["gpt2", "gpt2-xl"])


# ------------------------------------------------------------------------------------------------
# Bad input: one line that names the thing, the value and the way out, and exit status 2.

def make(name, change=None):
    """Makes, in this folder, a model `m` and then something wrong with its file `name`."""
    def making():
        saved_model("m", gpt2.GPTConfig(257, 16, 16, 1, 2))
        data = (Path("m") / name).read_bytes()
        (Path("m") / name).write_bytes(change(data)) if change else (Path("m") / name).unlink()
    return making


def header(**changes):
    """A safetensors file with one entry of its header changed."""
    def change(data):
        length = int.from_bytes(data[:8], "little")
        index = json.loads(data[8:8 + length])
        index["transformer.ln_f.bias"] |= changes
        text = json.dumps(index).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length:]
    return change


def config_with(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def tokens_file(*args, **kwargs):
    return lambda: write(Path("bad.bin"), *args, **kwargs)


BAD = ["--train_bin", "bad.bin", "--val_bin", "val.bin", "--steps", "1"]
FROM_M = ["--init_from", "m", "--prompt", "x"]
BAD_INPUT = [  # what is on the command line, what the message says, what has to be there
    *[([f"--{name}", value], f"--{name}: {value} is not a whole number of at least 1", None)
      for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "batch_size", "seq_len", "grad_accum",
                   "log_every", "eval_every", "save_every", "sample_every", "top_k", "num_samples", "threads")
      for value in ("0",)],
    *[([f"--{name}", "-1"], f"--{name}: .*-1", None) for name in ("steps", "warmup", "seed", "max_new_tokens")],
    *[([f"--{name}", value], f"--{name}: {value} is not a number", None)
      for name in ("lr", "min_lr", "weight_decay", "grad_clip", "temperature") for value in ("nan", "much")],
    (["--n_layer", "2.5"], "2.5 is not a whole number", None), (["--lr", "inf"], "inf is not a number", None),
    (["--top_p", "1.5"], "1.5 is not a number of at least 0 and at most 1", None),
    (["--beta1", "2"], "--beta1: 2 is not", None), (["--beta2", "-0.1"], "--beta2", None),
    (["--n_heads", "3"], "unrecognized arguments: --n_heads", None), (["play"], "unrecognized arguments: play", None),
    (["--n_embd"], "--n_embd: expected one argument", None),
    (["--model", "gpt3"], "invalid choice: 'gpt3'", None), (["--tokenizer", "word"], "invalid choice: 'word'", None),
    (["--n_embd", "18", "--n_head", "4", *TINY[6:]], "n_embd 18 .* n_head 4 heads; choose a multiple", None),
    (["--seq_len", "65"], "--seq_len 65 .* --n_positions 64; lower", None),
    (["--train_bin", "train.bin"], "--train_bin and --val_bin belong together", None),
    (["--train_bin", "no*.bin", "--val_bin", "val.bin"], "no.*bin: no such file", None),
    (["--data", "novel"], "data.novel_byte_train.bin: no such file; make it with", None),
    ([*TINY, "--steps", "1", "--out", "val.bin"], "val.bin", None),
    ([*TINY, "--steps", "1", "--out", "val.bin/x"], "val.bin", None),
    ([*TINY, "--seq_len", "16", "--vocab_size", "70"], "train.bin: id .* outside the vocabulary of 70", None),
    (["--prompt", ""], "--prompt: is empty; give some text", None),
    (["--prompt_file", "none.txt"], "none.txt: No such file", None),
    (["--prompt_file", "empty.txt"], "empty.txt: the file is empty", lambda: Path("empty.txt").write_bytes(b"")),
    (["--prompt_file", "l1.txt"], "l1.txt: not UTF-8", lambda: Path("l1.txt").write_bytes(b"caf\xe9")),
    (["--resume"], "--resume: out has no checkpoint", None),
    (["--init_from", "nowhere"], "nowhere: has no config.json; give a folder", None),
    (["--init_from", "m", "--n_embd", "32"], "--n_embd 32 would change what --init_from goes on from, which has 16",
     make("config.json", lambda data: data)),
    (["--init_from", "m", "--prompt", "x", "--tokenizer", "gpt2"], "need the package tiktoken: pip install tiktoken",
     make("config.json", lambda data: data)),
    (FROM_M, "m: has no config.json", make("config.json")), (FROM_M, "m: has no model.safetensors", make("model.safetensors")),
    (FROM_M, "config.json: not a JSON object", make("config.json", lambda data: data[:20])),
    (FROM_M, "config.json: not a JSON object", make("config.json", lambda data: b"[1]")),
    (FROM_M, "config.json: not a JSON object", make("config.json", lambda data: b"\xff\xfe")),
    (FROM_M, "activation_function is 'relu'", make("config.json", config_with(activation_function="relu"))),
    (FROM_M, "n_embd is '16'", make("config.json", config_with(n_embd="16"))),
    (FROM_M, "n_embd 15 does not divide into n_head 2", make("config.json", config_with(n_embd=15))),
    (FROM_M, "ln_f.bias is F32|wpe.weight is F32", make("config.json", config_with(n_positions=32, n_embd=16))),
    (FROM_M, "has no tensor h.1", make("config.json", config_with(n_layer=2))),
    ([*FROM_M, "--seq_len", "16"], "no tokenizer here has 300 tokens", make("config.json", config_with(vocab_size=300))),
    (FROM_M, "model.safetensors: not a safetensors file", make("model.safetensors", lambda data: b"")),
    (FROM_M, "model.safetensors: not a safetensors file", make("model.safetensors", lambda data: data[:7])),
    (FROM_M, "a header of 18446744073709551615 bytes", make("model.safetensors", lambda data: b"\xff" * 8 + data[8:])),
    (FROM_M, "its header is not JSON", make("model.safetensors", lambda data: data[:8] + b"x" + data[9:])),
    (FROM_M, "its tensors do not fill", make("model.safetensors", lambda data: data[:-4])),
    (FROM_M, "its tensors do not fill", make("model.safetensors", lambda data: data + b"1234")),
    (FROM_M, "has dtype 'F31'", make("model.safetensors", header(dtype="F31"))),
    (FROM_M, "cannot lie at", make("model.safetensors", header(shape=[17]))),
    (FROM_M, "has the shape", make("model.safetensors", header(shape=[-16]))),
    (FROM_M, "has the shape", make("model.safetensors", header(data_offsets=[0]))),
    (FROM_M, "cannot lie at|do not fill", make("model.safetensors", header(data_offsets=[0, 64]))),
    (FROM_M, "is not a tensor", make("model.safetensors", header(more=1))),
    (BAD, "bad.bin: not a token file .magic 1,", tokens_file((1, 1, 20))),
    (BAD, "bad.bin: version 2", tokens_file((20240520, 2, 20))),
    (BAD, "says 21 tokens, it holds 20", tokens_file((20240520, 1, 21))),
    (BAD, "too short for a token file's header", lambda: Path("bad.bin").write_bytes(b"12")),
    (BAD, "bad.bin: has no 65 tokens in a row; lower --seq_len 64", tokens_file()),
    (BAD, "bad.bin: id 300 at token", tokens_file((20240520, 1, 70), [300] * 70)),
    (["--n_embd", "1000000000000", "--n_head", "1", *TINY[6:]], "not enough memory", None),
    ([*TINY, "--batch_size", "100000000000"], "not enough memory", None)]


@pytest.mark.parametrize("arguments, message, making", BAD_INPUT, ids=[
    re.sub(r"[^\w.-]+", "_", " ".join(a))[:40] + f"_{i}" for i, (a, *_) in enumerate(BAD_INPUT)])
def test_bad_input_gets_one_line_and_status_2(tiny, arguments, message, making, monkeypatch, capsys):
    if making:
        making()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiny / "none"))
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if it were not installed: no waiting for a network
    with np.errstate(all="ignore"):
        assert trainer(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"(validating.*\n)*train_gpt2.py: error: .*({message}).*\n", said), said


def test_there_are_at_least_60_cases_of_bad_input():
    assert len(BAD_INPUT) >= 60


# ------------------------------------------------------------------------------------------------
# Many processes, under torchrun.

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WITH_GLOO = pytest.mark.skipif(sys.platform != "linux", reason="torchrun --standalone with gloo is tested on Linux")
NET = ["--n_layer", 2, "--n_embd", 32, "--n_head", 2, "--n_positions", 32, "--seq_len", 32, "--warmup", 5,
       "--train_bin", "train.bin", "--val_bin", "val.bin", "--max_new_tokens", 5, "--log_every", 1,
       "--eval_every", 10]
FOR_EVER = [*NET, "--batch_size", 6, "--steps", 10**6, "--save_every", 5, "--eval_every", 10**6,
            "--sample_every", 10**6, "--out", "two"]


def torchrun(*command, cwd):
    """Two ranks, started; they end with the test."""
    return subprocess.Popen([*TORCHRUN, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8",
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def two_ranks(*command, cwd, status=0):
    """Two ranks, until they end: (stdout, stderr)."""
    process = torchrun(*command, cwd=cwd)
    out, err = process.communicate(timeout=60)
    assert (process.returncode == 0) == (status == 0), err
    return out, err


def seen_until(text, process):
    """Reads a process's stdout until it has said this."""
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"ended before {text!r}: {seen}{process.stderr.read()}"
        seen += line
    return seen


def workers(process):
    """The process ids of torchrun's ranks, in order."""
    table = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(int(line.split()[0]) for line in table.stdout.splitlines() if "train_gpt2.py" in line)


def losses(out):
    """Loss, validation loss and norm of every step in a run's log."""
    with open(Path(out) / "log.csv", encoding="utf-8", newline="") as file:
        return np.array([[float(row[name] or 0) for name in ("step", "loss", "val_loss", "norm")]
                         for row in csv.DictReader(file)])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same 20 steps, saved after 10 too, by one process (one/) and by two ranks (two/)."""
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(3)
    for name, n in ("train", 3000), ("val", 200):
        prepro.write_tokens(folder / f"{name}.bin", rng.integers(65, 91, size=n))
    common = [*NET, "--steps", 20, "--save_every", 10]
    one = run("train_gpt2.py", *common, "--batch_size", 12, "--out", "one", cwd=folder)
    assert one.returncode == 0, one.stderr
    two, _ = two_ranks(HERE / "train_gpt2.py", *common, "--batch_size", 6, "--out", "two", cwd=folder)
    return folder, one.stdout, two


@WITH_GLOO
def test_two_ranks_train_as_one_process_does(both):
    """Measured: equal to the log's last digit, in 20 steps."""
    folder, one, two = both
    assert len(losses(folder / "one")) == 20
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-5)
    texts = re.compile("-{80}\n(.*?)\n-{80}", re.S)
    assert texts.findall(one) == texts.findall(two) != []
    assert "in each of 2 processes" in two and two.count("| network ") == two.count("| lr ") == 20
    assert "in each of" not in one and "network" not in one


@WITH_GLOO
def test_a_run_goes_on_with_another_number_of_ranks(both):
    folder, *_ = both
    for out in "one", "two":
        shutil.copytree(folder / out, folder / f"{out}_on")
    rest = ["--resume", "--steps", 30, "--out"]
    assert run("train_gpt2.py", *rest, "two_on", "--batch_size", 12, cwd=folder).returncode == 0
    assert run("train_gpt2.py", *rest, "one", "--batch_size", 12, cwd=folder).returncode == 0
    two_ranks(HERE / "train_gpt2.py", *rest, "one_on", "--batch_size", 6, cwd=folder)
    assert len(losses(folder / "one")) == 30
    for out in "one_on", "two_on":
        np.testing.assert_allclose(losses(folder / out), losses(folder / "one"), rtol=1e-5)
        for name in "model", "optimizer":
            a, b = (np.fromfile(folder / x / f"step_000030/{name}.safetensors", np.uint8) for x in ("one", out))
            assert len(a) == len(b)


@WITH_GLOO
def test_a_run_does_not_go_on_with_another_total_batch(both):
    folder, *_ = both
    _, err = two_ranks(HERE / "train_gpt2.py", "--resume", "--steps", 30, "--out", "two", "--batch_size", 12,
                       cwd=folder, status=2)
    assert "train_gpt2.py: error: --resume: the run had 12 sequences a step, not 24" in err
    result = run("train_gpt2.py", "--resume", "--steps", 30, "--out", "two", cwd=folder)
    assert result.returncode == 2 and "the run had 12 sequences a step, not 6" in result.stderr


@WITH_GLOO
def test_an_earlier_run_is_put_aside_only_when_every_rank_has_read_its_weights(both):
    folder, *_ = both
    shutil.copytree(folder / "two", folder / "again")
    (folder / "late.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(HERE)!r})
import train_gpt2 as gpt2
read = gpt2.files.read_weights
gpt2.files.read_weights = lambda *args: (time.sleep(int(os.environ["RANK"])), read(*args))
gpt2.files.program("late.py", gpt2.main)
""", encoding="utf-8")
    out, _ = two_ranks("late.py", "--init_from", "again", "--out", "again", "--steps", 1, "--train_bin", "train.bin",
                       "--val_bin", "val.bin", "--max_new_tokens", 5, "--seq_len", 32, cwd=folder)
    assert "again holds an earlier run: it is again.1 from now on" in out


@WITH_GLOO
def test_two_ranks_asked_for_a_text_only_print_it_once(both):
    folder, *_ = both
    out, err = two_ranks(HERE / "train_gpt2.py", "--init_from", "one", "--prompt", "Ohé", "--max_new_tokens", 0,
                         cwd=folder)
    assert out == "Ohé\n" and "error" not in err


@WITH_GLOO
def test_ranks_have_the_same_parameters_and_moments_only_of_their_own_stretch(tiny):
    Path("ranks.py").write_text(f"""
import hashlib, json, sys, types
sys.path.insert(0, {str(HERE)!r})
import train_gpt2 as gpt2, numpy as np
ranks, config = gpt2.Ranks(), gpt2.GPTConfig(101, 16, 15, 2, 3)
stretch = ranks.own(gpt2.size(gpt2.parameter_table(config)))
model = gpt2.GPT2(config, stretch=stretch)
args = types.SimpleNamespace(grad_accum=2, batch_size=2, seq_len=8, beta1=0.9, beta2=0.95,
                             weight_decay=0.1, grad_clip=1)
tokens, rng, steps = gpt2.Tokens("train.bin", 101), np.random.default_rng(0), []
for step in range(5):
    numbers = gpt2.train_step(model, tokens, rng, 1e-2, args, ranks, stop=ranks.rank)
    steps.append([hashlib.sha256(model.flat_params.tobytes()).hexdigest(), *map(float, numbers)])
json.dump({{"steps": steps, "stretch": [stretch.start, stretch.stop], "n": model.flat_params.size,
           "moments": [model.flat_m.size, model.flat_v.size]}}, open(f"rank{{ranks.rank}}.json", "w"))
""", encoding="utf-8")
    two_ranks("ranks.py", cwd=tiny)
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] and len({step[0] for step in first["steps"]}) == 5
    assert all(step[-1] == 1 for step in first["steps"])  # what one rank says, every rank hears
    n = first["n"]
    assert n % 2 and first["stretch"] == [0, n // 2] and second["stretch"] == [n // 2, n]
    assert first["moments"] == [n // 2] * 2 and second["moments"] == [n - n // 2] * 2


@WITH_GLOO
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_leaves_a_whole_checkpoint(tiny, rank):
    """Without torchrun's help: it is held, so the other rank has to notice by itself."""
    process = torchrun(HERE / "train_gpt2.py", *FOR_EVER, cwd=tiny)
    seen_until("step      20/", process)
    pids = workers(process)
    assert len(pids) == 2
    process.send_signal(signal.SIGSTOP)
    os.kill(pids[rank], signal.SIGKILL)
    other, start = Path(f"/proc/{pids[1 - rank]}/stat"), time.monotonic()
    while other.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < start + 30:
        time.sleep(0.05)
    waited = time.monotonic() - start
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert waited < 30 and process.returncode != 0
    assert f"train_gpt2.py: error: rank {1 - rank}: another process of this run cannot be reached" in err
    assert "Traceback" not in err.partition("torch")[0]
    prepro.read_trainer(prepro.checkpoints(tiny / "two")[-1], verify=True)


@WITH_GLOO
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_ranks_that_are_stopped_save_first(tiny, number):
    process = torchrun(HERE / "train_gpt2.py", *FOR_EVER, "--save_every", 10**6, cwd=tiny)
    seen = seen_until("step      20/", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    stopped = int(re.search(r"stopped after step (\d+), which is saved in two", seen + out)[1])
    assert process.returncode != 0 and "cannot be reached" not in err
    assert [folder.name for folder in prepro.checkpoints("two")] == [f"step_{stopped:06}"]
    prepro.read_trainer(f"two/step_{stopped:06}", verify=True)


def test_without_torchrun_torch_is_not_imported(tiny):
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import train_gpt2 as gpt2; gpt2.main(); "
            "print('torch' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", code, *map(str, NET), "--steps", "1"], cwd=tiny,
                            capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "False", result.stderr


# ------------------------------------------------------------------------------------------------
# The checker itself.

@pytest.mark.parametrize("name", ["embedding", "layernorm", "linear", "attention", "gelu", "crossentropy"])
def test_a_corrupted_backward_is_noticed(name, monkeypatch):
    """Each backward leaves one of its results 0.1% too large: the comparison must fail."""
    function = getattr(gpt2, f"{name}_backward")

    def corrupted(first, *rest):
        before = first.copy() if name == "embedding" else 0
        function(first, *rest)
        first += 0.001 * (first - before)
    model = perturbed(SMALL)
    gradients_agree(model, *random_ids(SMALL, 2, 5), 1e-9)
    monkeypatch.setattr(gpt2, f"{name}_backward", corrupted)
    with pytest.raises(AssertionError, match="off by more than"):
        gradients_agree(model, *random_ids(SMALL, 2, 5), 1e-4)


def test_the_checker_refuses_an_empty_comparison():
    with pytest.raises(AssertionError, match="all zero"):
        error(np.zeros(3), np.zeros(3))
    with pytest.raises(AssertionError, match="not finite"):
        error(np.array([1, np.nan]), np.ones(2))


# ------------------------------------------------------------------------------------------------
# The table for people.

def table(model, B=4, T=64, tolerance=1e-4):
    """Prints logits, loss and each gradient beside PyTorch's; returns whether all are within tolerance."""
    config, T = model.config, min(T, model.config.n_positions)
    ids, targets = random_ids(config, B, T)
    print(f"{config}, B={B}, T={T}, float32; OK: within {tolerance:g} of the largest value\n")
    p = torch_params(model)
    logits, loss = torch_gpt2(p, config, torch.tensor(ids), torch.tensor(targets))
    loss.backward()
    reference = {"logits": logits, "loss": loss} | {name: x.grad for name, x in p.items()}
    ours = {"loss": np.array(model.forward(ids, targets)), "logits": model.logits.copy()}
    model.backward()
    ours |= model.grads
    good = True
    print(f"{'':28} {'shape':16} {'largest':>10} {'difference':>10} {'relative':>9}")
    for name, x in reference.items():
        x, y = np.asarray(x.detach()), ours[name]
        relative = error(y, x)
        good &= bool(relative <= tolerance)
        print(f"{name:28} {str(x.shape):16} {np.abs(x).max():10.3e} {np.abs(x - y).max():10.3e} "
              f"{relative:9.1e} {'OK' if relative <= tolerance else 'NOT OK'}")
    print("\nall OK" if good else "\nNOT OK")
    return good


# ------------------------------------------------------------------------------------------------
# The benchmark: this trainer and PyTorch, each in a process of its own, take steps in turn.

BENCH = {  # L, H, C, V, B, T, steps in a turn
    "baby": (4, 4, 128, 257, 12, 64, 40), "baby384": (6, 6, 384, 257, 16, 256, 2),
    "124M": (12, 12, 768, 50257, 4, 64, 2), "124M-long": (12, 12, 768, 50257, 1, 1024, 1)}
LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0


def our_trainer(model):
    """A function (ids, targets) -> loss that takes one step."""
    def step(ids, targets):
        loss = model.forward(ids, targets)
        model.backward()
        model.update(LR, *BETAS, weight_decay=DECAY, grad_clip=CLIP)
        return loss
    return step


def torch_trainer(model, compiled):
    """The same step with PyTorch at its best on a CPU."""
    config, p = model.config, torch_params(model)
    optimizer = torch.optim.AdamW(
        [{"params": [x for x in p.values() if x.ndim == 2], "weight_decay": DECAY},
         {"params": [x for x in p.values() if x.ndim == 1], "weight_decay": 0}],
        lr=LR, betas=BETAS, fused=True)
    network = torch.compile(torch_gpt2) if compiled else torch_gpt2

    def step(ids, targets):
        optimizer.zero_grad(set_to_none=True)
        loss = network(p, config, torch.tensor(ids), torch.tensor(targets))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), CLIP)
        optimizer.step()
        return loss.item()
    return step


def without_all_but_products():
    """Leaves of the layers only the linear ones, and of those only the products of matrices."""
    product = gpt2.matmul
    gpt2.matmul = lambda out, a, b, bias=None, add=False: product(out, a, b)
    for name in vars(gpt2).copy():
        if re.fullmatch("(embedding|layernorm|attention|gelu|crossentropy)_(for|back)ward", name):
            setattr(gpt2, name, lambda *args: None)
    linear_backward = gpt2.linear_backward
    gpt2.linear_backward = lambda dinp, dw, db, *rest: linear_backward(dinp, dw, None, *rest)


def time_each_layer(model, step, batch):
    """{kind of layer: its share of our step}. What parts of a batch do side by side counts once."""
    seconds, start = dict.fromkeys(["linear", "attention", "layernorm", "gelu", "crossentropy",
                                    "embedding", "adamw"], 0.0), time.perf_counter()
    for name, function in vars(gpt2).copy().items():
        kind = {"global_norm": "adamw"}.get(name, re.sub("_(for|back)ward$", "", name))
        if kind in seconds:
            def timed(*args, kind=kind, function=function):
                begin, side_by_side = time.perf_counter(), gpt2.parallel.at_work
                result = function(*args)
                took = time.perf_counter() - begin
                width = min(gpt2.parallel.threads, len(model.parts)) if side_by_side else 1
                seconds[kind] += took / width
                return result
            setattr(gpt2, name, timed)
    for _ in range(3):
        step(*batch())
    total = time.perf_counter() - start
    return {kind: s / total for kind, s in seconds.items()}


def bench_worker(which, shape, threads):
    """Reads how many steps to take, line by line, and answers each with JSON."""
    L, H, C, V, B, T = shape
    model = gpt2.GPT2(gpt2.GPTConfig(V, T, C, L, H))
    gpt2.parallel.threads = threads
    if which in ("torch", "compiled"):
        torch.set_num_threads(threads)
    rng, losses = np.random.default_rng(0), []

    def batch():
        return rng.integers(V, size=(2, B, T))
    if which == "floor":
        without_all_but_products()

        def step(ids, targets):
            model.forward(ids, targets)
            model.backward(accumulate=True)
    else:
        step = our_trainer(model) if which == "ours" else torch_trainer(model, which == "compiled")
    if which in ("torch", "compiled"):
        model = None  # its weights are copied
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            ids, targets = batch()
            start = time.perf_counter()
            losses.append(step(ids, targets))
            times.append(1e3 * (time.perf_counter() - start))
        answer = {"ms": times, "loss": losses[-1] if losses else None, "peak": peak_memory()}
        if not times and which == "ours":
            answer["shares"] = time_each_layer(model, step, batch)
        print(json.dumps(answer), flush=True)


def peak_memory():
    """The most memory this process has had, in MB; nan where the system does not say."""
    if Path("/proc/self/status").exists():  # Linux; getrusage there counts the parent's, too
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def bench_one(name, shape, in_turn, turns, threads, compiled):
    """Measures one configuration and prints its row and where our time goes."""
    rivals = ("ours", "compiled" if compiled else "torch", "floor")
    workers = [subprocess.Popen(
        [sys.executable, __file__, "--bench_worker", which, "--config", ",".join(map(str, shape)),
         "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for which in rivals]

    def ask(worker, steps):
        print(steps, file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())
    for worker in workers:
        ask(worker, 3)  # warms up
    answers = []
    for turn in range(turns):
        print(f"{name}: turn {turn + 1} of {turns}", end="\r", file=sys.stderr, flush=True)
        answers.append([ask(worker, in_turn) for worker in workers])
    shares = ask(workers[0], 0)["shares"]
    for worker in workers:
        worker.communicate()
    ours, torchs, floor = ([np.median(a["ms"]) for a in column] for column in zip(*answers))
    ratios = np.array(torchs) / ours
    last, tokens = answers[-1], shape[4] * shape[5]
    ms = [np.median(column) for column in (ours, torchs, floor)]
    agreeing = abs(last[0]["loss"] - last[1]["loss"]) <= 1e-3
    print(f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} | {np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
          f"| {1e3 * tokens / ms[0]:.0f} | {1e3 * tokens / ms[1]:.0f} "
          f"| {last[0]['peak']:.0f} | {last[1]['peak']:.0f} | {last[0]['peak'] / last[1]['peak']:.2f} "
          f"| {ms[2]:.1f} ({ms[2] / ms[0]:.0%}) "
          f"| {last[0]['loss']:.4f} {last[1]['loss']:.4f}{'' if agreeing else ' NOT OK'} |")
    return agreeing, f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()) + \
        f", the rest {1 - sum(shares.values()):.0%}"


def bench(args):
    """Prints the table of the README's section on speed."""
    configs = {args.config: None} if args.config else dict.fromkeys(BENCH)
    print(f"torch {torch.__version__}{' compiled' if args.compile else ''}, numpy {np.__version__}, "
          f"{args.threads} threads\n")
    print("| config | ms/step | PyTorch | ratio (min-max) | tok/s | PyTorch | peak MB | PyTorch | ratio "
          "| products alone | loss, PyTorch's |\n" + "|---" * 11 + "|", flush=True)
    good, notes = True, []
    for name in configs:
        *shape, in_turn = BENCH.get(name) or [*map(int, name.split(",")), 2]
        one_good, note = bench_one(name, shape, args.steps or in_turn, args.turns, args.threads, args.compile)
        good &= one_good
        notes.append(note)
    print("\nwhere our step goes:", *notes, sep="\n")
    if not args.config:
        bench_sampling()
    return good


def bench_sampling():
    """Prints how fast one sequence is sampled at 124M, and how fast that could be."""
    model, times = gpt2.GPT2(gpt2.GPTConfig()), []
    model.generate([[50256]], 64, top_k=40, on_token=lambda new: times.append(time.perf_counter()))
    token = np.median(np.diff(times))

    def read(threads):
        gpt2.parallel.threads, before, start = threads, gpt2.parallel.threads, time.perf_counter()
        blocks = gpt2.split(model.flat_params.size, 64)
        gpt2.parallel(lambda block: np.dot(model.flat_params[block], model.flat_params[block]), [(b,) for b in blocks])
        gpt2.parallel.threads = before
        return 1e3 * (time.perf_counter() - start)
    one, all_ = (min(read(threads) for _ in range(5)) for threads in (1, gpt2.parallel.threads))
    print(f"\nsampling 124M, one sequence: {1 / token:.0f} tok/s, {1e3 * token:.1f} ms a token; reading the "
          f"weights once takes {one:.1f} ms on one thread, {all_:.1f} ms on {gpt2.parallel.threads}")


def main():
    parser = argparse.ArgumentParser(description="GPT-2's gradients beside PyTorch's; or its speed.")
    parser.add_argument("--init_from", metavar="FOLDER", help="compare with these weights, not new ones")
    parser.add_argument("--bench", action="store_true", help="compare the speed")
    parser.add_argument("--config", help="one of " + ", ".join(BENCH) + ", or L,H,C,V,B,T")
    parser.add_argument("--steps", type=int, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--compile", action="store_true", help="PyTorch with torch.compile")
    parser.add_argument("--threads", type=int, default=prepro.usable_cpus(), help="of each")
    parser.add_argument("--bench_worker", choices=["ours", "torch", "compiled", "floor"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bench_worker:
        bench_worker(args.bench_worker, [*map(int, args.config.split(","))], args.threads)
        return 0
    if args.bench:
        return 0 if bench(args) else 1
    if args.init_from:
        try:
            model = gpt2.GPT2.from_pretrained(prepro.find_model(args.init_from, []))
        except prepro.Refused as error:
            prepro.refuse("test_gpt2.py", error)
    else:
        model = gpt2.GPT2(gpt2.GPTConfig())
    return 0 if table(model) else 1


if __name__ == "__main__":
    sys.exit(main())
