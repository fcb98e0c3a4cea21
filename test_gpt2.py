# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24", "tiktoken", "pytest", "torch==2.13.0"]
# ///
"""The same GPT-2 in PyTorch, and tests that compare every function of train_gpt2.py with it.

    pytest                        # all tests
    pytest -k layernorm           # the tests of one layer
    python test_gpt2.py           # every gradient of the 124M model, beside PyTorch's
    python test_gpt2.py --bench   # the speed of both

First comes the network, written with PyTorch's own functions and differentiated by autograd, then
what the tests share. The tests stand under the same headings as in train_gpt2.py.
"""
import argparse
import contextlib
import copy
import csv
import doctest
import faulthandler
import http.server
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import timeit
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import train_gpt2 as gpt2  # isort: skip # before numpy, whose BLAS it sets to one thread

import numpy as np
import pytest

try:
    import torch
    import torch.nn.functional as F
except ModuleNotFoundError:  # the benchmark hides it from the process that it compares with it
    torch = None

import prepro_tinyshakespeare as prepro

HERE = Path(__file__).resolve().parent
TRAIN = HERE / "train_gpt2.py"
PREPRO = HERE / "prepro_tinyshakespeare.py"
SMALL = gpt2.GPTConfig(vocab_size=17, n_positions=8, n_embd=12, n_layer=2, n_head=3)
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


# ------------------------------------------------------------------------------------------------
# GPT-2 in PyTorch. p is {name: tensor}, under the names of gpt2.parameter_table.

def torch_gpt2(p, config, ids, targets):
    """ids (B,T), targets (B,T) -> logits (B,T,V) and the mean loss."""
    def layernorm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"].T, p[f"{name}.bias"])
    x = p["wte.weight"][ids] + p["wpe.weight"][:ids.shape[1]]
    for i in range(config.n_layer):
        qkv = linear(layernorm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=2)
        q, k, v = (y.unflatten(2, (config.n_head, -1)).transpose(1, 2) for y in qkv)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(heads.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        hidden = linear(layernorm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"h.{i}.mlp.c_proj")
    logits = F.linear(layernorm(x, "ln_f"), p["wte.weight"])
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_params(model):
    """A model's parameters as separate tensors that autograd follows."""
    return {name: torch.tensor(view).requires_grad_() for name, view in model.params.items()}


# ------------------------------------------------------------------------------------------------
# What the tests share: comparing, models to compare, starting processes.

def error(ours, reference):
    """The largest difference, relative to the largest number in the reference; nan for nan."""
    reference = np.asarray(reference.detach() if torch.is_tensor(reference) else reference)
    ours = np.asarray(ours).reshape(reference.shape)
    largest = np.abs(reference).max()
    assert largest > 0, "the reference is all zero: equal to it shows nothing"
    return np.abs(ours - reference).max() / largest


def agree(ours, reference, tolerance):
    """Assert that every array of {name: array} agrees, and is finite."""
    assert ours.keys() == reference.keys()
    errors = {name: error(ours[name], reference[name]) for name in reference}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= tolerance}
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"


def our_results(model, ids, targets):
    """{name: array} of the loss, the logits and every gradient."""
    model.flat_grads[...] = 0
    logits = model.forward(ids)
    loss = model.forward(ids, targets)
    model.backward()
    return {"loss": np.array(loss), "logits": logits} | model.grads


def torch_results(model, ids, targets):
    """The same of PyTorch."""
    p = torch_params(model)
    logits, loss = torch_gpt2(p, model.config, torch.tensor(ids), torch.tensor(targets))
    loss.backward()
    return {"loss": loss, "logits": logits} | {name: x.grad for name, x in p.items()}


def gradients_agree(model, ids, targets, tolerance):
    """Assert that loss, logits and every gradient are PyTorch's."""
    agree(our_results(model, ids, targets), torch_results(model, ids, targets), tolerance)


def perturbed(config, dtype=np.float64):
    """A model whose biases are not 0 and whose layernorm weights are not 1."""
    model = gpt2.GPT2(config, dtype)
    model.flat_params += 0.1 * np.random.default_rng(0).standard_normal(model.flat_params.size)
    return model


def random_ids(config, B, T, seed=0):
    """Random ids and targets, both (B,T)."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=(2, B, T))


def saved_model(folder, config=SMALL, dtype=np.float32):
    """A model, and its files in this folder."""
    model = perturbed(config, dtype)
    model.save_pretrained(folder)
    return model


def numbers_of(model):
    """What training changes, as numbers that differ if any bit does."""
    return model.step, *map(zlib.crc32, (model.flat_params, model.flat_m, model.flat_v))


def words(*arguments):
    """A command line: strings are split into words; items of lists, numbers and paths are not."""
    line = []
    for x in arguments:
        line += x.split() if isinstance(x, str) else x if isinstance(x, list) else [x]
    return [str(x) for x in line]


def environment(**settings):
    """This environment without settings for Python and threads; every proxy is a closed port."""
    closed = "http://127.0.0.1:9"
    settings = dict(http_proxy=closed, https_proxy=closed, no_proxy="") | settings
    kept = {n: x for n, x in os.environ.items() if not re.match("PYTHON|OPENBLAS|.*_THREADS$", n)}
    return kept | {name: str(x) for name, x in settings.items()}


TEST_LIMIT = 600  # seconds; also on a machine that is ten times as slow
STARTED = []  # processes of a test


def start(*arguments, **options):
    """Python as a process: start(TRAIN, "--steps 2"), start("-c", [code]); options are Popen's."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | options
    process = subprocess.Popen([sys.executable, *words(*arguments)], encoding="utf-8", **options)
    STARTED.append(process)
    return process


def finish(process, status=0):
    """(stdout, stderr) of a process that ends with this status."""
    out, err = process.communicate(timeout=TEST_LIMIT / 2)
    assert process.returncode == status, err
    return out, err


@pytest.fixture(autouse=True)
def leave_nothing_behind(request, monkeypatch):
    """A test ends in time, or all do with a traceback. What it has changed is restored."""
    assert torch, "PyTorch is missing; pip install torch==2.13.0"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        terminal = os.dup(2)  # the stderr that pytest does not capture
    faulthandler.dump_traceback_later(TEST_LIMIT, exit=True, file=terminal)
    monkeypatch.setattr(gpt2.parallel, "threads", gpt2.parallel.threads)
    with mock.patch.dict(os.environ):
        yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()
    faulthandler.cancel_dump_traceback_later()
    os.close(terminal)


# ------------------------------------------------------------------------------------------------
# Layers.

def torch_attention(q, k, v):
    """Causal attention; the queries are the last T of S positions."""
    T, S = q.shape[2], k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, torch.ones(T, S).tril(S - T) > 0)


def layers(dtype=np.float64, B=2, T=5, H=3, C=12, K=7, V=17):
    """To test a new layer, add a row: its arrays, the same in PyTorch, what can be in place.

    The first word of the name is the layer's; the arrays have the names of its arguments. PyTorch's
    function takes the arrays that have a gradient and gives `out`. "dinp dout": the backward
    function may write dinp over dout.
    """
    N = B * T
    rng = np.random.default_rng(0)
    ids = rng.integers(V // 3, size=(B, T))

    def new(*shape):
        return rng.standard_normal(shape).astype(dtype)

    def attention(S):
        sizes = dict(q=T, k=S, v=S, out=T)
        return {n: new(B, H, size, C // H) for n, size in sizes.items()} | {"lse": new(B, H, T, 1)}
    return {
        "embedding": (
            dict(wte=new(V, C), wpe=new(T + 3, C), ids=ids, out=new(N, C)),
            lambda wte, wpe: (wte[ids] + wpe[:T]).flatten(0, 1), None),
        "layernorm": (
            dict(inp=new(N, C), weight=new(C), bias=new(C), out=new(N, C)),
            lambda inp, weight, bias: F.layer_norm(inp, (C,), weight, bias), "dinp dout"),
        "linear": (
            dict(inp=new(N, C), weight=new(C, K), bias=new(K), out=new(N, K)),
            lambda inp, weight, bias: F.linear(inp, weight.T, bias), None),
        "linear with tied weights": (
            dict(inp=new(N, C), weight=new(V, C).T, out=new(N, V)),
            lambda inp, weight: inp @ weight, None),
        "attention": (attention(T), torch_attention, None),
        "attention with a cache": (attention(T + 60), torch_attention, None),
        "gelu": (
            dict(inp=new(N, K), out=new(N, K)),
            lambda inp: F.gelu(inp, approximate="tanh"), "dinp dout"),
        "crossentropy": (  # its output is called losses; the gradient of each is the same number
            dict(logits=new(N, V), targets=ids.ravel(), lse=new(N, 1), out=new(N), dloss=3.0,
                 dout=np.full(N, 3, dtype)),
            lambda logits: F.cross_entropy(logits, torch.tensor(ids.ravel()), reduction="none"),
            "dlogits logits")}


LAYER_NAMES = list(dict.fromkeys(name.split()[0] for name in layers()))
FUNCTIONS = [f"{name}_{way}" for name in LAYER_NAMES for way in ("forward", "backward")]
LAYERS = pytest.mark.parametrize("name", layers())
SIZES = {"small": {}, "eight chunks of queries": dict(T=600, H=5, C=20),
         "several blocks of rows": dict(B=7, T=151, C=252, K=250, V=260)}


def run_layer(name, in_place, size="small", dtype=np.float64):
    """Run a layer forward and backward -> its inputs, arrays, forward pass, and PyTorch's layer.

    Gradients of parameters start at 1, so that adding to them differs from writing them; 1 is
    subtracted from the result.
    """
    arrays, reference, both = layers(dtype, **SIZES[size])[name]
    inputs = {n: arrays[n] for n in inspect.signature(reference).parameters}
    dout = np.random.default_rng(1).standard_normal(arrays["out"].shape).astype(dtype)
    arrays = {"losses": arrays["out"], "dout": dout} | arrays
    arrays |= {f"d{n}": np.ones_like(x) for n, x in inputs.items()}

    def call(way, arguments):
        function = getattr(gpt2, f"{name.split()[0]}_{way}")
        function(**{n: arguments.get(n) for n in inspect.signature(function).parameters})
    call("forward", arrays)
    if in_place and both:
        written, read = both.split()
        arrays[written] = arrays[read].copy()
        call("backward", arrays | {read: arrays[written]})
    else:
        call("backward", arrays)
    for n in arrays.keys() & {"dwte", "dwpe", "dweight", "dbias"}:
        arrays[n] -= 1
    return inputs, arrays, lambda: call("forward", arrays), reference


@LAYERS
@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_layer_matches_torch(name, dtype, size):
    """In place where it may be. Measured: 3e-15 in float64 and 1e-6 in float32."""
    inputs, arrays, _, reference = run_layer(name, True, size, dtype)
    tensors = {n: torch.tensor(x, requires_grad=True) for n, x in inputs.items()}
    out = reference(*tensors.values())
    out.backward(torch.tensor(arrays["dout"]))
    expected = {"out": out} | {f"d{n}": x.grad for n, x in tensors.items()}
    agree({n: arrays[n] for n in expected}, expected, 3e-14 if dtype == np.float64 else 1e-5)


@LAYERS
def test_layer_matches_central_differences(name):
    """(f(x + h) - f(x - h)) / 2h for every single input, without PyTorch. Measured: below 6e-10."""
    inputs, arrays, forward, _ = run_layer(name, False)
    h = 1e-5
    for n, x in inputs.items():
        numeric = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            value = x[i]
            for x[i], factor in (value + h, 0.5 / h), (value - h, -0.5 / h):
                forward()
                numeric[i] += factor * (arrays["dout"] * arrays["out"]).sum()
            x[i] = value
        assert error(arrays[f"d{n}"], numeric) < 1e-8, n


def test_attention_gelu_and_crossentropy_are_right_far_from_zero():
    """1e4 has a spacing of 1e-3 in float32, and probabilities come from exp(1e4 - lse)."""
    q, k = np.array([[1e3, -1e3, 1e3], [1e3, 2e3, -1e3]], np.float32).reshape(2, 1, 1, 3, 1)
    out = np.empty_like(q)
    x = np.array([[-1e4, -50, -12, 12, 50, 1e4]], np.float32)
    activated, slope = np.empty((2, 1, 6), np.float32)
    logits = np.array([[1e38, -1e38, 0], [-1e38, 1e38, 0], [1e4, 1e4, 1e4]], np.float32)
    targets = np.array([0, 0, 2])
    losses = np.empty(3, np.float32)
    lse = np.empty((3, 1), np.float32)
    with np.errstate(all="raise", under="ignore"):
        gpt2.attention_forward(out, np.empty_like(q), q, k, q)
        gpt2.gelu_forward(activated, x)
        gpt2.gelu_backward(slope, np.ones_like(x), x)
        gpt2.crossentropy_forward(losses, lse, logits, targets)
        gpt2.crossentropy_backward(logits, 1.0, lse, logits, targets)
    assert out.ravel().tolist() == [1e3, 1e3, -1e3], "a query sees only the key that fits best"
    assert activated == pytest.approx(np.maximum(x, 0), abs=1e-30)
    assert slope == pytest.approx(1.0 * (x > 0), abs=1e-20)
    assert losses == pytest.approx([0, 2e38, math.log(3)], rel=1e-5)
    expected = np.array([[0, 0, 0], [-1, 1, 0], [1 / 3, 1 / 3, -2 / 3]])
    assert logits == pytest.approx(expected, abs=2e-3)


def test_attention_weights_give_the_output_of_attention():
    _, a, _, _ = run_layer("attention with a cache", False, "eight chunks of queries")
    assert error(gpt2.attention_weights(a["q"], a["k"], a["lse"]) @ a["v"], a["out"]) < 1e-13


def test_docstrings_have_examples_that_run():
    """At least one for each layer, and for the functions that a reader meets after them."""
    assert doctest.testmod(gpt2).failed == 0
    names = {re.sub("train_gpt2.|_(for|back)ward$", "", test.name)
             for test in doctest.DocTestFinder().find(gpt2) if test.examples}
    assert names >= {*LAYER_NAMES, "adamw", "learning_rate", "train", "sample", "generate", "split"}


# ------------------------------------------------------------------------------------------------
# The network and the model.

@pytest.mark.parametrize("config, B, T, shards", [
    (gpt2.GPTConfig(57, 64, 32, 11, 1), 3, 64, 2),  # the full context, 11 blocks, one head
    (gpt2.GPTConfig(31, 128, 36, 2, 3), 11, 128, 4)])
def test_model_and_network_match_torch(config, B, T, shards):
    """Measured: 4e-15. The table compares in float32."""
    model = perturbed(config)
    model.n_shards = shards
    for seed in 1, 2:  # the second time, nothing of the first is left
        gradients_agree(model, *random_ids(config, B, T, seed), 3e-14)
    assert len(model.shards) == shards


def test_model_config_refuses_sizes_that_make_no_model():
    for sizes, message in [(dict(n_head=5), "n_embd 768 is not divisible by n_head 5"),
                           (dict(n_layer=0), "n_layer is 0"), (dict(n_head=True), "is True"),
                           (dict(n_head="9" * 99), "n_head is '9{19}; it must"),
                           (dict(n_layer=65537), "n_layer is 65537; it must be .* to 65536")]:
        with pytest.raises(gpt2.UserError, match=message):
            gpt2.GPTConfig(**sizes)


def test_model_shapes_and_shards_may_change_from_call_to_call():
    """Also after a batch that was too large: the memory is full at its last shard."""
    model = perturbed(SMALL)
    for B, T, model.n_shards in [(4, 8, 4), (4, 8, 1), (4, 1, 1), (1, 4, 1), (2, 4, 1), (2, 4, 3)]:
        batch = random_ids(SMALL, B, T)
        gradients_agree(model, *batch, 2e-14)
        assert len(model.shards) == min(B, model.n_shards)
    large = random_ids(SMALL, 9, 7)
    for next_batch in batch, large:
        found = [None, None, MemoryError]
        with mock.patch.object(gpt2, "activations", side_effect=found), pytest.raises(MemoryError):
            model.forward(*large)
        gradients_agree(model, *next_batch, 2e-14)


def test_model_activation_count_is_what_is_allocated():
    config = gpt2.GPTConfig(1031, 64, 128, 5, 4)
    with mock.patch.object(np, "empty", wraps=np.empty) as empty:
        gpt2.activations(config, 3, 64, np.float32)
    sizes = [math.prod(call.args[0]) for call in empty.call_args_list]
    assert gpt2.activation_count(config, 3 * 64) == sum(sizes)


def test_model_gives_new_arrays_and_copies_what_it_is_given():
    """Ids may be lists, or of another type. A copy of the model has its gradients, too."""
    model = perturbed(SMALL)
    ids, targets = random_ids(SMALL, 2, 5)
    expected = torch_results(model, ids, targets)
    logits = model.forward(ids.astype(np.uint16))
    model.forward(targets.tolist())
    loss = model.forward(ids, targets)
    ids[...] = 1
    targets[...] = 2
    model.backward()
    ours = {"loss": np.array(loss), "logits": logits} | copy.deepcopy(model).grads
    agree(ours, expected, 2e-14)


def test_model_initialisation_is_gpt2s():
    """Standard deviations within 3%: the smallest matrix has 16,384 numbers, 3% is over 5 sigma."""
    for name, x in gpt2.GPT2(gpt2.GPTConfig(257, 128, 128, 3, 4)).params.items():
        if x.ndim == 1:
            assert (x == name.endswith("weight")).all()
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(x.std() / std - 1) < 0.03 and abs(x.mean()) < std / 20, name


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", [*FUNCTIONS, "add", "adamw"])
def test_model_after_an_interrupt_is_as_good_as_new(name, call):
    """Ctrl-C when a function has done its work for one of three shards. The next step then has the
    bits of a step by a copy of the model without gradients."""
    model = perturbed(SMALL)
    model.n_shards = gpt2.parallel.threads = 3
    batch = random_ids(SMALL, 4, 8)
    step = our_trainer(model)
    step(*batch)
    function = getattr(gpt2, name)
    calls = iter([1, 2])

    def interrupted(*args):
        function(*args)
        if next(calls, None) == call:
            signal.raise_signal(signal.SIGINT)  # reaches the main thread, whichever this is
        time.sleep(0.001)  # the other threads are still at work
    with mock.patch.object(gpt2, name, interrupted), pytest.raises(KeyboardInterrupt):
        step(*batch)
    twin = copy.deepcopy(model)
    twin.flat_grads[...] = 0
    assert step(*batch) == our_trainer(twin)(*batch)
    assert numbers_of(model) == numbers_of(twin)


@pytest.mark.parametrize("ids, targets, message", [
    ([1, 2], None, r"ids must be .* \(2,\)"), (np.empty((1, 0), int), None, r"\(1, 0\)"),
    ([[1.5]], None, "float64"), ([[True]], None, "bool"), ([["1"]], None, "integers.*<U1"),
    ([[[1]]], None, r"\(1, 1, 1\)"), ([[3, -1]], None, r"-1\.\.3"), ([[1]], [[17]], "targets are"),
    ([[17]], None, r"ids are in 17\.\.17, .* 17 tokens"), ([[0] * 9], None, r"T in 1\.\.8, not"),
    ([[1, 2]], [[1]], r"targets .*\(1, 1\)")])
def test_model_refuses_ids_that_do_not_fit(ids, targets, message):
    with pytest.raises(gpt2.UserError, match=message):
        gpt2.GPT2(SMALL).forward(ids, targets)


def test_model_backward_needs_a_forward_with_targets_each_time():
    model = gpt2.GPT2(SMALL)
    for between in (model.backward, lambda: model.forward([[1]]), lambda: model.forward([[17]]),
                    lambda: next(gpt2.generate(model, [[1]], 1))):
        model.forward([[1]], [[2]])
        with contextlib.suppress(gpt2.UserError):
            between()
        with pytest.raises(gpt2.UserError, match="needs a forward"):
            model.backward()


# ------------------------------------------------------------------------------------------------
# The optimizer.

@pytest.mark.parametrize("options", [
    {}, dict(weight_decay=0, grad_clip=0),
    dict(beta1=0.8, beta2=0.97, eps=1e-3, weight_decay=0.5, grad_clip=0.3)])
def test_adamw_matches_torch(options):
    """Ten steps at a high learning rate, where errors add up. Measured: 5e-16. The norms of the
    gradients are about 0.3, 3 and 30, so some are clipped and some are not. Between the steps, a
    gradient that is not finite changes nothing."""
    model = perturbed(gpt2.GPTConfig(257, 64, 64, 4, 4))
    rng = np.random.default_rng(0)
    p = torch_params(model)
    o = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0) | options
    groups = [{"params": [x for x in p.values() if x.ndim == n], "weight_decay": decay}
              for n, decay in ((1, 0.0), (2, o["weight_decay"]))]
    reference = torch.optim.AdamW(groups, lr=0.05, betas=(o["beta1"], o["beta2"]), eps=o["eps"])
    for step in range(10):
        model.grads["ln_f.bias"][3] = [np.nan, np.inf][step % 2]
        assert not math.isfinite(model.update(0.05))
        model.flat_grads += rng.normal(0, 10.0 ** (step % 3 - 3), model.flat_grads.size)
        for name, x in p.items():
            x.grad = torch.tensor(model.grads[name])
        norm = torch.nn.utils.clip_grad_norm_(p.values(), o["grad_clip"] or math.inf).item()
        reference.step()
        assert model.update(0.05, **options) == pytest.approx(norm, rel=1e-12)
    agree(model.params, p, 1e-14)


def test_learning_rate_at_its_corners():
    """In a run of three steps; a warm-up may be as long as the run, or longer."""
    for warmup, rates in (0, [0.85, 0.55, 0.4]), (3, [1 / 3, 2 / 3, 1]), (10, [0.1, 0.2, 0.3]):
        found = [gpt2.learning_rate(step, 3, warmup, 1.0, 0.4) for step in (1, 2, 3)]
        assert found == pytest.approx(rates)


# ------------------------------------------------------------------------------------------------
# The training loop.

def test_train_takes_steps_on_the_mean_of_all_micro_batches():
    """As forward, backward and update with all of a step's windows at once. Measured: 2e-12."""
    model = perturbed(SMALL)
    model.n_shards = 2
    by_hand = copy.deepcopy(model)
    model.forward = mock.Mock(wraps=model.forward)
    rng = np.random.default_rng(0)
    options = dict(beta1=0.8, beta2=0.9, weight_decay=0.3, grad_clip=0.5)
    steps = gpt2.train(model, rng.integers(17, size=50), 4, 2, 5, lambda step: 0.01 * step, rng,
                       grad_accum=3, **options)
    for number, (step, loss, norm) in enumerate(steps, 1):
        batch = np.concatenate([call.args for call in model.forward.call_args_list], axis=1)
        assert batch.shape == (2, 6, 5)
        model.forward.reset_mock()
        assert step == number and loss == pytest.approx(by_hand.forward(*batch), rel=1e-13)
        by_hand.backward()
        assert norm == pytest.approx(by_hand.update(0.01 * number, **options), rel=1e-12)
        assert error(model.flat_params, by_hand.flat_params) < 3e-11
    assert number == 4


def test_train_draws_every_window_equally_often():
    """3,600 draws of 5 + 1 of 23 tokens, from 18 starts, within 5 sigma."""
    model = gpt2.GPT2(gpt2.GPTConfig(32, 5, 4, 1, 1))
    model.forward = mock.Mock(wraps=model.forward)
    tokens = np.arange(5, 28, dtype=np.uint16)
    [*gpt2.train(model, tokens, 6, 600, 5, lambda step: 1e-3, np.random.default_rng(0))]
    ids, targets = np.concatenate([x.args for x in model.forward.call_args_list], axis=1)
    starts = ids[:, 0] - 5
    assert (ids == tokens[starts[:, None] + np.arange(5)]).all() and (targets == ids + 1).all()
    counts = np.bincount(starts, minlength=18)
    assert len(counts) == 18 and np.abs(counts - 200).max() <= 5 * math.sqrt(200)


# ------------------------------------------------------------------------------------------------
# Sampling.

@pytest.mark.parametrize("context, prompt, expected", [
    (8, 2, [[2], *6 * [[1]], [6], [1], [1], [6], [1], [1], [6], [1]]),
    (8, 20, [[8], [6], [1], [1], [6]]), (1, 3, [[1], [1], [1]]), (150, 60, [[60], *90 * [[1]]]),
    (150, 64, [[64], [1]]), (150, 65, [[64, 1], [1]]), (150, 200, [[64, 64, 22], [64, 48], [1]])])
def test_generate_with_its_cache_is_the_whole_window_each_time(context, prompt, expected):
    """`expected` says for every new token how many pass through the network: all of the window, in
    chunks of 64, when it has moved by a quarter, otherwise one. Measured: 1e-15."""
    model = perturbed(gpt2.GPTConfig(17, context, 12, 2, 3))
    model.n_shards = 2
    forward = model.forward
    model.forward = mock.Mock(wraps=forward)
    ids, _ = random_ids(model.config, 3, prompt)
    with mock.patch.object(gpt2, "sample", wraps=gpt2.sample) as sample:
        text = np.column_stack([ids, *gpt2.generate(model, ids, len(expected))])
    calls = model.forward.call_args_list
    assert [call.args[0].shape[1] for call in calls] == sum(expected, [])
    last_calls = np.cumsum([len(chunks) for chunks in expected]) - 1  # before each new token
    for end, (last, drawn) in enumerate(zip(last_calls, sample.call_args_list), prompt):
        window = calls[last].kwargs["cache"].shape[-2]
        uncached = forward(text[:, end - window:end])[:, -1]
        assert error(drawn.args[0], uncached) < 2e-14


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (0.5, None, None, [64, 1, 36, 1, 16]), (0, None, None, [1, 0, 0, 0, 0]),
    (1e-320, None, None, [1, 0, 0, 0, 0]), (1.0, 3, None, [8, 0, 6, 0, 4]),
    (1.0, 99, None, [8, 1, 6, 1, 4]), (1.0, None, 0.0, [1, 0, 0, 0, 0]),
    (1.0, None, 0.65, [8, 0, 6, 0, 0]), (1.0, 3, 0.75, [8, 0, 6, 0, 0])])  # 14/18 > 0.75
def test_sample_draws_tokens_as_often_as_their_probabilities_say(
        temperature, top_k, top_p, expected):
    """In 40,000 draws, within 5 sigma; what is left out never. Every other row is reversed."""
    logits = np.log([8, 1, 6, 1, 4], dtype=np.float32) + 20
    rows = np.tile([logits, logits[::-1]], (20000, 1))
    drawn = gpt2.sample(rows, temperature, top_k, top_p, np.random.default_rng(0))
    drawn[1::2] = 4 - drawn[1::2]
    probs = np.array(expected) / sum(expected)
    limit = 5 * np.sqrt(probs * (1 - probs) / 40000) + 1e-12
    assert (np.abs(np.bincount(drawn, minlength=5) / 40000 - probs) <= limit).all()


def test_sample_needs_no_token_beyond_the_share_top_p():
    """The first has exactly half of the probability."""
    logits = np.log([[4, 2, 1, 1]] * 99)
    assert not gpt2.sample(logits, 1.0, None, 0.5, np.random.default_rng(0)).any()


def test_generate_refuses_a_wrong_prompt_and_options_out_of_bounds():
    model = gpt2.GPT2(SMALL)
    for ids, *options in [([1, 2],), ([[17]],), ([[]],), ([[1]], -1), ([[1]], math.nan),
                          ([[1]], 1.0, 0), ([[1]], 1.0, None, -1), ([[1]], 1.0, None, math.nan)]:
        with pytest.raises(gpt2.UserError):
            next(gpt2.generate(model, ids, 1, *options))
    one, another = ([*gpt2.generate(model, [[1]] * 99, 1)][0] for _ in range(2))
    assert (one != another).any(), "without a generator, every text is a new one"


# ------------------------------------------------------------------------------------------------
# Tokens.

@pytest.fixture(params=["byte", "gpt2"])
def tokenizer(request, monkeypatch):
    """A tokenizer; GPT-2's if its merges are here, as tests do not download them."""
    monkeypatch.setattr(gpt2, "DATA", HERE / "data")
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", gpt2.DATA / "tiktoken"))
    if request.param == "gpt2" and not list(folder.glob("*")):
        pytest.skip(f"GPT-2's merges are missing; {PREPRO.name} --tokenizer gpt2 gets them")
    return gpt2.Tokenizer(request.param)


TEXT = "First Citizen:\nnaïve café, 日本語 🙂.\n\n<|endoftext|>All:\n  Speak!\r\n" + "".join(
    map(chr, range(256))) + "\u07ff\u0800\uffff\U00010000\U0010ffff"  # every byte of UTF-8


def test_tokens_decode_to_the_text_they_came_from(tokenizer):
    for text in TEXT, "", "a", "<|endoftext|>", "<|endoftext|><|endoftext|>b":
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.eot_token) == text.count("<|endoftext|>")
    assert tokenizer.decode([*tokenizer.encode("é"), tokenizer.n_vocab]) == "é"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) in ("é", "\ufffd")
    assert tokenizer.decode(tokenizer.encode("\ud800")) in ("?", "\ufffd")
    expected = {"byte": [*b"Hello world", 256], "gpt2": [15496, 995, 50256]}
    assert tokenizer.encode("Hello world<|endoftext|>") == expected[tokenizer.name]


def test_tokens_of_gpt2_are_kept_in_data(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # nothing is downloaded
    with pytest.raises(gpt2.UserError, match="need tiktoken"):
        gpt2.Tokenizer("gpt2")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(Path("data/tiktoken"))


def test_token_counts_of_the_real_text(tokenizer):
    """Bytes as for nanoGPT's shakespeare_char; GPT-2's tokens as in llm.c."""
    if not (gpt2.DATA / "tinyshakespeare.txt").exists():
        pytest.skip(f"{gpt2.DATA}/tinyshakespeare.txt is missing; {PREPRO.name} downloads it")
    counts = {"byte": [1003854, 111540], "gpt2": [305260, 32768]}
    parts = prepro.tokenize(prepro.tinyshakespeare(), tokenizer)
    assert [len(ids) for ids in parts] == counts[tokenizer.name]


def test_token_files_have_llm_cs_format_and_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    sizes = []
    with mock.patch.object(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size)):
        gpt2.write_tokens(path, [1, 2, 50256])
    assert sizes == [1030], "all is on the disk before the file gets its name"
    for wrong in [-1, 5], [65536]:
        with pytest.raises(gpt2.UserError, match=r"a.bin: .*0..65535"):
            gpt2.write_tokens(path, wrong)
    with pytest.raises(TypeError):
        gpt2.write_file(path, [b"new", None])
    assert os.listdir(path.parent) == ["a.bin"] and path.read_bytes() == (
        b"\x88\xd8\x34\x01\1\0\0\0\3\0\0\0" + bytes(253 * 4) + b"\1\0\2\0\x50\xc4")


def test_token_files_are_found_by_name_before_pattern_and_checked(tmp_path):
    for name, tokens in ("t2", [5, 6]), ("t1", [1, 2, 3]), ("n[1]", [9, 9]), ("n1", [8, 8]):
        gpt2.write_tokens(tmp_path / f"{name}.bin", tokens)
    for pattern, tokens in ("t?.bin", [1, 2, 3, 5, 6]), ("n[1].bin", [9, 9]), ("n*", [8, 8, 9, 9]):
        assert gpt2.read_tokens(tmp_path / pattern, 10).tolist() == tokens
    bad = tmp_path / "bad.bin"
    for tokens, message in ([5], "not a token file; make it"), (
            [0] * 9999 + [257], "id 257 is outside the vocabulary of 257; .*--tokenizer"):
        gpt2.write_tokens(bad, tokens)
        with pytest.raises(gpt2.UserError, match=f"bad.bin: {message}"):
            gpt2.read_tokens(bad, 257)
    assert isinstance(gpt2.read_tokens(tmp_path / "t1.bin", 10), np.memmap)  # still on the disk
    good = (tmp_path / "t1.bin").read_bytes()
    for wrong in b"", b"\1" + good[1:], good[:4] + b"\2" + good[5:], good[:-2], good + b"x":
        bad.write_bytes(wrong)
        with pytest.raises(gpt2.UserError, match="bad.bin: not a token file; make it"):
            gpt2.read_tokens(tmp_path / "b*.bin", 257)


# ------------------------------------------------------------------------------------------------
# A run.

FILES = "--train_bin train.bin --val_bin val.bin"
TINY = (f"{FILES} --n_layer 1 --n_embd 16 --n_head 2 --n_positions 16 --seq_len 12 --batch_size 6 "
        "--warmup 5 --max_new_tokens 30 --log_every 1 --eval_every 10 --sample_every 15")
TINY_CONFIG = gpt2.GPTConfig(257, 16, 16, 1, 2)
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals and locks")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The program in this process, in a folder with token files; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # pytest keeps its own handlers
    rng = np.random.default_rng(3)
    for name, n in ("train", 3000), ("val", 200):
        gpt2.write_tokens(f"{name}.bin", rng.integers(65, 91, size=n))

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words(*arguments)])
        with pytest.raises(SystemExit) as end:
            gpt2.run_program(gpt2.main)
        return end.value.code
    return program


def program_with(before, step=1, code="pass"):
    """A program that runs `before`, then train_gpt2.py, and `code` at the beginning of a step."""
    Path("first.py").write_text(f"""
import os, sys
from signal import *
sys.path.insert(0, {str(HERE)!r})
sys.argv[0] = "train_gpt2.py"
import train_gpt2 as gpt2
signal(SIGINT, SIG_DFL)  # which a job in the background ignores, as nohup's does the other
signal(SIGHUP, SIG_DFL)
{before}
def watched(model, *args, forward=gpt2.GPT2.forward, **options):
    if model.step == {step} - 1:
        gpt2.GPT2.forward = forward
        {code}
    return forward(model, *args, **options)
gpt2.GPT2.forward = watched
gpt2.run_program(gpt2.main)""")
    return "first.py"


def read_log(out):
    """The rows of a run's log."""
    return list(csv.DictReader(Path(out, "log.csv").read_text().splitlines()))


def samples(text):
    """The texts between two rules of 80 dashes."""
    return re.findall("-{80}\n(.*?)\n-{80}", text, re.S)


def result_of(out, steps):
    """What must be the same: the log without its times, and the last checkpoint's numbers."""
    state = gpt2.read_state(Path(out) / f"step_{steps:06}")
    return [list(row.values())[:5] for row in read_log(out)], state["rng"], state["model"]


def error_line(capsys):
    """What a run that failed has printed on stderr, which must be one line."""
    return re.fullmatch("train_gpt2.py: error: (.*)\n", capsys.readouterr().err)[1]


@pytest.mark.parametrize("B, limit, n", [(1, 1, 1), (1, 7, 7), (5, 999, 999), (5, 2000, 1001),
                                         (400, 0, 1001)])
def test_run_validates_on_every_token_once(B, limit, n):
    ids = np.arange(1002) * 7 % 32
    model = perturbed(gpt2.GPTConfig(32, 4, 12, 1, 3))
    with mock.patch.object(gpt2, "show_progress") as progress:
        loss = gpt2.evaluate(model, ids, B, 4, limit)
    assert progress.call_args == mock.call("")  # the terminal's line is empty again
    assert model.shape[0] <= B
    parts = [ids[i:min(i + 4, n) + 1] for i in range(0, n, 4)]
    losses = [model.forward([part[:-1]], [part[1:]]) * (len(part) - 1) for part in parts]
    assert loss == pytest.approx(sum(losses) / n, abs=1e-12)


def test_run_logs_and_prints_the_numbers_of_every_step(train, capsys, monkeypatch):
    """The loss is that before the step, the validation loss that after it. By the clock here, step
    n takes 40 n seconds, and what comes after it 1,000; a line has the mean since the one before.
    """
    times = [0, 40, 1040, 1120, 2120, 2240, 3240, 3400, 4400, 4600, 5600]
    monkeypatch.setattr(gpt2, "time", mock.Mock(perf_counter=mock.Mock(side_effect=times)))
    assert train(TINY, "--steps 5 --grad_accum 2 --eval_every 3 --log_every 4 --lr 0.01 --seed 5 "
                 "--beta1 0.8 --beta2 0.9 --weight_decay 0.3 --grad_clip 0.05 --threads 3 "
                 "--eval_tokens 150") == 0
    model = gpt2.GPT2(TINY_CONFIG, seed=5)
    tokens, val_tokens = (gpt2.read_tokens(f"{name}.bin", 257) for name in ("train", "val"))
    steps = gpt2.train(model, tokens, 5, 6, 12, lambda step: 0.002 * step,
                       np.random.default_rng([5, 1]), grad_accum=2, beta1=0.8, beta2=0.9,
                       weight_decay=0.3, grad_clip=0.05)
    rows = [[step, loss, gpt2.evaluate(model, val_tokens[:151], 6, 12), norm, 0.002 * step]
            for step, loss, norm in steps]
    step_line = "step {0}/5 | loss {1:.4f} | norm {3:.2f} | lr {4:.2e} | "
    val_line = "step {0} | val loss {2:.4f}"
    lines = [(0, step_line + "40000 ms |     4 tok/s | 0:02:40 left"),
             (2, step_line + "100000 ms |     1 tok/s | 0:03:20 left"), (2, val_line),
             (3, step_line + "160000 ms |     1 tok/s | 0:02:40 left"),
             (4, step_line + "200000 ms |     1 tok/s | 0:00:00 left"), (4, val_line)]
    shown = capsys.readouterr().out.splitlines()
    assert "7,680 parameters, GPTConfig" in shown[0] and "validate  150 of 200 tokens" in shown[3]
    assert shown[4:10] == [line.format(*rows[i]) for i, line in lines]
    log = [[float(x or 0) for x in row.values()] for row in read_log("out")]
    logged = [rows[i] for i in (0, 2, 3, 4)]
    for i in 0, 2:  # without validation
        logged[i][2] = 0
    np.testing.assert_allclose([row[:5] for row in log], logged, rtol=2e-6)
    assert [row[5:] for row in log] == [[40e3, 4], [100e3, 1], [160e3, 1], [200e3, 1]]


def test_run_shows_progress_in_one_line_of_a_terminal(monkeypatch, capsys):
    gpt2.show_progress("not a terminal")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "8")
    gpt2.show_progress("12345678")
    gpt2.show_progress("")
    assert capsys.readouterr().err == "\r1234567\r\r       \r"


@pytest.mark.parametrize("name, prompt, shown, note", [
    ("byte", "Oh, so long", "Oh, so long", "the prompt has 11 tokens; only the last 8 are used\n"),
    ("byte", "just 8 B", "just 8 B", ""), ("byte", None, "\n", ""),
    ("gpt2", None, "<|endoftext|>", "")])
def test_run_samples_whole_characters(monkeypatch, capsys, name, prompt, shown, note):
    """The last token here is the first byte of a character that has no end."""
    generate = mock.Mock(return_value=[np.array([byte]) for byte in "é!".encode() + b"\xc3"])
    monkeypatch.setattr(gpt2, "generate", generate)
    tokenizer = gpt2.Tokenizer("byte")
    tokenizer.name = name
    gpt2.print_sample(perturbed(SMALL), tokenizer, types.SimpleNamespace(
        prompt=prompt, max_new_tokens=3, temperature=1, top_k=2, top_p=0.5, seed=7), 20)
    _, *arguments, rng = generate.call_args.args
    assert arguments == [[tokenizer.encode(shown)], 3, 1, 2, 0.5]
    assert rng.random() == np.random.default_rng([7, 2, 20]).random()
    assert capsys.readouterr() == (f"{shown}é!\ufffd\n", note)
    monkeypatch.setattr(gpt2, "STOP", [141])  # asked to stop, it prints one token only
    gpt2.print_sample(perturbed(SMALL), tokenizer, types.SimpleNamespace(
        prompt="A", max_new_tokens=3, temperature=1, top_k=2, top_p=0.5, seed=7), 20)
    assert capsys.readouterr().out == "A\ufffd\n"


def test_run_with_a_loss_that_is_not_finite_stops_and_overwrites_nothing(train, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's would be shown
        assert train(TINY, "--steps 300 --save_every 1 --lr 1e37 --grad_clip 0 --warmup 2") == 2
    step = re.fullmatch(r"step (\d+): the loss is .*, the gradient's norm .*; lower --lr 1e\+37 or "
                        "raise --warmup 2", error_line(capsys))[1]
    assert gpt2.checkpoints("out")[-1].name == f"step_{int(step) - 1:06}"
    checkpoint_is_whole(gpt2.checkpoints("out")[-1])
    with mock.patch.object(gpt2.GPT2, "update", return_value=math.inf):
        assert train(TINY, "--steps 1 --out norm") == 2 and "norm inf" in error_line(capsys)


def test_run_asked_to_stop_at_its_last_step_ends_as_any_other(train, monkeypatch, capsys):
    monkeypatch.setattr(gpt2, "STOP", [])

    def share(processes, rows):
        gpt2.STOP.append(143)
        return rows
    monkeypatch.setattr(gpt2.Processes, "share", share)
    assert train(TINY, "--steps 1") == 143
    assert read_log("out")[0]["val_loss"] and capsys.readouterr().err == ""
    monkeypatch.setattr(gpt2, "print_sample", mock.Mock(side_effect=KeyboardInterrupt))
    assert train("--init_from out") == 130  # nothing is to be saved


PIPE = "reading, writing = os.pipe(); os.dup2(writing, 1); os.dup2(writing, 2); os.close(writing)"
STOPPED = "stopped after step 17, saved in run; --resume continues\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
@pytest.mark.parametrize("before, in_step, status, message", [
    ("", "raise_signal(SIGHUP)", 129, STOPPED),  # the terminal was closed
    ("signal(SIGHUP, SIG_IGN)", "raise_signal(SIGHUP); raise_signal(SIGTERM)", 143, STOPPED),
    (PIPE, "os.close(reading); raise_signal(SIGINT)", 130, ""),  # Ctrl-C ends tee, too
    (PIPE, "os.close(reading); gpt2.say(''); raise_signal(SIGINT)", 141, ""),  # tee ends first
    ("", "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 2,
     f"error: cannot print: [Errno 28] No space left on device\n{STOPPED}"),
    ("sys.stderr = None", "raise_signal(SIGINT)", 130, "")])
def test_run_that_has_to_stop_resumes_bit_for_bit(train, capsys, before, in_step, status, message):
    """In the first micro-batch, after a sample was drawn. A run with its output gone saves, too."""
    options = f"{TINY} --batch_size 5 --grad_accum 3 --steps 32"  # an odd number of draws
    assert train(options, "--out whole") == 0
    whole = samples(capsys.readouterr().out)
    _, err = finish(start(program_with(before, 17, in_step), options, "--out run"), status)
    assert err == message
    checkpoint_is_whole(Path("run/step_000017"))
    assert train("--resume --threads 3 --out run") == 0
    assert result_of("run", 32) == result_of("whole", 32)
    assert len(whole) == 3 and samples(capsys.readouterr().out) == whole[1:]


@POSIX
def test_run_has_its_folder_for_itself(train, capsys, monkeypatch):
    """While it trains, from any other run; afterwards, from any but --resume."""
    def others(*args):
        for arguments in f"{TINY} --steps 1 --out run", "--resume --out run --steps 9":
            assert train(arguments) == 2
            assert error_line(capsys) == ("run: another process is training in this folder; wait, "
                                          "or give another --out")
    monkeypatch.setattr(gpt2, "print_sample", mock.Mock(side_effect=others))
    assert train(TINY, "--steps 2 --save_every 1 --out run") == 0
    gpt2.print_sample.assert_called_once()
    with mock.patch("fcntl.flock", side_effect=OSError("no locks")), gpt2.locked("run"):
        pass  # some file systems have none
    assert train(TINY, "--steps 1 --out run") == 2
    assert error_line(capsys) == ("run holds a run of 2 steps: --resume continues it, --out "
                                  "starts another elsewhere")


def test_run_refuses_a_log_that_is_not_its_own_and_leaves_it(train, capsys):
    """A log that was removed begins again."""
    assert train(TINY, "--steps 3") == 0
    path = Path("out", "log.csv")
    log = path.read_bytes()
    for changed in log.replace(b"\n", b"\r\n"), log.replace(b"\n2,", b"\n4,"), log[:-1], b"":
        path.write_bytes(changed)
        assert train("--resume --steps 4") == 2
        assert error_line(capsys).startswith(f"{path} is not this run's log, or was edited; ")
        assert path.read_bytes() == changed
    path.unlink()
    assert train("--resume --steps 4") == 0 and [row["step"] for row in read_log("out")] == ["4"]


# ------------------------------------------------------------------------------------------------
# Checkpoints.

def tensors_of(path):
    """A safetensors file read by its description alone: ({name: entry}, the numbers' bytes)."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + length]), data[8 + length:]


def write_index(path, index, numbers):
    """A safetensors file with this index, a text."""
    Path(path).write_bytes(len(index).to_bytes(8, "little") + index.encode() + numbers)


def edit_json(path, **changes):
    """Change values of the JSON object in a file."""
    Path(path).write_text(json.dumps(gpt2.read_json(path) | changes))


@DTYPES
def test_checkpoint_is_loaded_as_it_was_saved_bit_for_bit(tmp_path, dtype):
    model = saved_model(tmp_path, dtype=dtype)
    again = gpt2.GPT2.from_pretrained(tmp_path, dtype)
    assert again.config == SMALL and again.flat_params.tobytes() == model.flat_params.tobytes()
    path = tmp_path / "model.safetensors"
    index, numbers = tensors_of(path)
    assert index.pop("__metadata__") == {"format": "pt"}
    assert {*index} == {f"transformer.{name}" for name in model.params}
    assert (path.stat().st_size - len(numbers)) % 8 == 0
    assert gpt2.read_json(tmp_path / "generation_config.json") == {"max_length": 8}
    assert gpt2.read_json(tmp_path / "config.json") == {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "tie_word_embeddings": True, "vocab_size": 17, "n_positions": 8, "n_embd": 12,
        "n_layer": 2, "n_head": 3, "bos_token_id": 16, "eos_token_id": 16}


@pytest.mark.parametrize("dtype, convert", [
    ("F16", np.float16), ("BF16", lambda x: (x.view(np.uint32) >> 16).astype(np.uint16))])
def test_checkpoint_may_be_of_another_program(tmp_path, dtype, convert):
    """No prefix, a stored lm_head, old causal masks, half precision, any order of the index, no
    n_inner, PyTorch's name of the same GELU."""
    model = saved_model(tmp_path)
    path = tmp_path / "model.safetensors"
    model.flat_params[...] = (model.flat_params * 64).round() / 64  # 8 bits hold such numbers
    tensors = {name: convert(x) for name, x in model.params.items()}
    gpt2.write_tensors(path, tensors | {
        "lm_head.weight": tensors["wte.weight"], "h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
        "h.1.attn.masked_bias": np.ones((), np.float32)})
    index, numbers = tensors_of(path)
    for name in tensors:
        index[name]["dtype"] = dtype
    write_index(path, json.dumps(dict(reversed(index.items()))), numbers)
    edit_json(tmp_path / "config.json", n_inner=48, activation_function="gelu_pytorch_tanh")
    found = gpt2.GPT2.from_pretrained(tmp_path)
    assert (found.flat_params == model.flat_params).all() and found.config == SMALL


@pytest.mark.parametrize("old, new, message", [
    ("h.1.mlp.c_fc.bias", "h.1.extra", "h.1.extra, h.1.mlp.c_fc.bias missing or surplus"),
    ("17, 12", "12, 17", r"wte.weight is \[12, 17\], in the model \[17, 12\]"),
    ("F32", "I32", "I32"), ("0, 816", "0, 815", "wte.weight ends at byte 815"),
    ("0, 816", "-96, 720", ""), ("0, 816", '"0", "816"', ""), (r"\[0, 816\]", "1", ""),
    ("0, 816", "0, 817", ""), ("0, 816", f"{10**400}, 816", ""), (".*", "[]", ""),
    (".*", "[" * 10**5, "")])
def test_checkpoint_whose_weights_do_not_fit_is_an_error(tmp_path, old, new, message):
    """Of the text of the index, the first such part, or all of it, is another."""
    saved_model(tmp_path)
    path = tmp_path / "model.safetensors"
    index, numbers = tensors_of(path)
    write_index(path, re.sub(old, new, json.dumps(index), count=1), numbers)
    with pytest.raises(gpt2.UserError, match=rf"model.safetensors: damaged, .*\(.*{message}.*\);"):
        gpt2.GPT2.from_pretrained(tmp_path)
    for name in "pytorch_model.bin", "model.safetensors.index.json":
        path = path.rename(tmp_path / name)
        with pytest.raises(gpt2.UserError, match='s is missing.*max_shard_size="10GB"'):
            gpt2.GPT2.from_pretrained(tmp_path)


def test_checkpoint_opens_in_transformers(tmp_path, tokenizer):
    """The same tokens, logits and gradients (in float64, measured: 3e-15)."""
    files = gpt2.tokenizer_files(tokenizer, 16)
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 16
    vocab = json.loads(files["vocab.json"])
    assert sorted(vocab.values()) == [*range(tokenizer.n_vocab)]
    assert vocab["<|endoftext|>"] == tokenizer.eot_token
    assert files["merges.txt"].startswith(b"#version: 0.2\n")
    assert files["merges.txt"].count(b"\n") == 1 + tokenizer.n_vocab - 257
    printable = b"".join(tokenizer.token_bytes(vocab[x]) for x in "A~¡ÿĀĠĊŃ")
    assert printable == bytes([65, 126, 161, 255, 0, 32, 10, 173])
    transformers = pytest.importorskip("transformers")
    model = perturbed(gpt2.GPTConfig(tokenizer.n_vocab, 16, 12, 2, 3))
    gpt2.save_checkpoint(tmp_path, model, files, {})
    folder = gpt2.find_model(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [TEXT, "", " a", "It's  1234", *TEXT.split()]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    network = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    ids, targets = random_ids(model.config, 3, 16)
    logits = network(torch.tensor(ids)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    grads = {name.removeprefix("transformer."): x.grad for name, x in network.named_parameters()}
    agree(our_results(model, ids, targets), {"loss": loss, "logits": logits} | grads, 1e-13)


def checkpoint_is_whole(folder):
    """Assert that a checkpoint has all files, none left over, and the numbers it was saved with."""
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "optimizer.safetensors", "tokenizer_config.json", "trainer.json", "vocab.json"]
    model, _ = gpt2.load_checkpoint(folder, gpt2.read_state(folder))
    assert folder.name == f"step_{model.step:06}"
    tokenizer = gpt2.read_json(folder / "tokenizer_config.json")
    assert tokenizer["model_max_length"] == model.config.n_positions


def test_checkpoint_used_is_the_last_one_also_after_a_million_steps(tmp_path):
    for name in "step_1000000", "step_000250", "step_999999", "step_x":
        os.mkdir(tmp_path / name)
    assert gpt2.find_model(tmp_path) == tmp_path / "step_1000000"


@POSIX
def test_checkpoint_is_whole_after_a_kill_at_any_file_event(train):
    """Run k5 is killed before the sixth time that it opens, renames or removes a file or folder,
    k6 before the seventh, and so on until one ends. All go on to the same result."""
    options = f"{TINY} --steps 3 --save_every 1 --max_new_tokens 0 --eval_tokens 16"
    assert train(options, "--out whole") == 0
    finish(start(program_with("""
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.fsync = lambda descriptor: None  # slow, and only needed when the power fails
run = 0
while os.fork():
    status = os.wait()[1]
    assert status in (0, SIGKILL)
    if status == 0:
        sys.exit()
    run += 1
events = iter(range(run))
def kill(event, args):
    if event in ("open", "os.rename", "os.rmdir", "shutil.rmtree") and next(events, None) is None:
        raise_signal(SIGKILL)
sys.addaudithook(kill)
sys.argv[-1] = f"k{run}" """), options, "--out k"))
    runs = sorted(Path().glob("k*"))
    assert len(runs) > 40
    for run in runs:
        for folder in gpt2.checkpoints(run):
            checkpoint_is_whole(folder)
        if not Path(run, "step_000003").exists():
            assert train("--resume" if gpt2.checkpoints(run) else options, "--out", run) == 0
            assert sorted(os.listdir(run)) == ["log.csv", "step_000002", "step_000003"]
        assert result_of(run, 3) == result_of("whole", 3)


def test_checkpoint_has_the_options_that_are_not_given(train, capsys):
    """The project is moved, into a folder whose name looks like a pattern. Nothing of a save that
    was left unfinished is in a checkpoint."""
    saved_model("m", TINY_CONFIG)
    gpt2.write_file("out/unfinished/surplus", [b"half"])
    assert train(TINY, "--init_from m --steps 6 --save_every 3 --lr 0.01 --seed 0 --top_k 5 "
                 "--prompt=-x --train_bin tr*.bin") == 0
    checkpoint_is_whole(Path("out/step_000003"))
    os.mkdir("new[1]")
    for name in "train.bin", "val.bin", "out":
        os.rename(name, f"new[1]/{name}")
    resume = "--resume --out new[1]/out"
    assert train(resume, "--steps 9 --lr 0.02 --warmup 0 --threads 1") == 0
    rates = [float(row["lr"]) for row in read_log("new[1]/out")]
    assert len(rates) == 9 and rates[7] == pytest.approx(gpt2.learning_rate(8, 9, 0, 0.02, 1e-5))
    saved = gpt2.read_state(Path("new[1]/out/step_000009"))["options"]
    assert {"seed": 0, "top_k": 5, "lr": 0.02, "steps": 9, "prompt": "-x"}.items() <= saved.items()
    for arguments, message in [
            ("--n_embd 32", "--n_embd 32 does not fit .*, which has 16; leave it out"),
            ("--tokenizer gpt2", "--tokenizer gpt2 does not fit .*, which has byte; leave it out"),
            ("", "--steps 9: the run has already completed that many steps; .*")]:
        assert train(resume, arguments) == 2
        assert re.fullmatch(message, error_line(capsys))


def test_checkpoint_that_has_changed_is_an_error_and_the_one_before_it_opens(train, capsys):
    """A file is cut short, is another or has one other number. The weights fit 4 heads, too."""
    assert train(TINY, "--steps 6 --save_every 3") == 0
    folder = Path("out", "step_000006")
    for name, old, new in [
            ("config.json", b'"n_head": 2', b'"n_head": 4'), ("model.safetensors", b"", b"x"),
            ("optimizer.safetensors", b"", b"x"), ("trainer.json", b'"step": 6', b'"step": 5'),
            ("trainer.json", b'"crc32"', b'"crc"')]:
        data = (folder / name).read_bytes()
        changed = [data.replace(old, new)] if old else [
            data[:i] + bytes([data[i] ^ 1]) + data[i + 1:] for i in (len(data) // 3, len(data) - 1)]
        for damaged in *changed, data[:len(data) // 2], b"", b"{}", b"[]", b"[" * 10**5:
            (folder / name).write_bytes(damaged)
            assert train("--resume --steps 8") == 2
            assert str(folder) in error_line(capsys)
        (folder / name).write_bytes(data)
    shutil.rmtree(folder)
    assert train("--resume --steps 8") == 0 and len(read_log("out")) == 8


# ------------------------------------------------------------------------------------------------
# Data parallel training.

@pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested on Linux")
@pytest.mark.parametrize("rank, name, statuses, step, message", [
    (0, "SIGTERM", [143, 143], 20, ""), (1, "SIGTERM", [143, 143], 20, ""),
    (0, "SIGKILL", [-9, 2], 15, "error: rank 1 lost the connection to another process; see"),
    (1, "SIGKILL", [2, -9], 15, "error: rank 0 lost the connection to another process; see")])
def test_processes_train_as_one_does_and_end_together(train, rank, name, statuses, step, message):
    """A signal reaches one of the two; then a single process goes on. Only rank 0 prints, and a run
    that is to stop does not validate. Measured: equal to the log's last digit."""
    options = f"{TINY} --steps 30 --save_every 5"
    assert train(options, "--out one") == 0
    program = program_with("" if rank else f"""
def report(run, step, *args, report=gpt2.Run.report):
    report(run, step, *args)
    step == 19 and raise_signal({name})  # after the sum: both stop after the next step
gpt2.Run.report = report""", 20, f"os.environ['RANK'] == '1' == '{rank}' and raise_signal({name})")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(program, options, "--out two", env=environment(
        RANK=i, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for i in (0, 1)]
    (out, err), (other_out, other_err) = map(finish, processes, statuses)
    assert message in err + other_err
    assert "processes 2," in out and "step 20 | val" not in out and other_out == ""
    assert gpt2.checkpoints("two")[-1] == Path(f"two/step_{step:06}")
    checkpoint_is_whole(Path(f"two/step_{step:06}"))
    assert train("--resume --out two") == 0
    one, two = ([[float(row[name]) for name in ("loss", "norm")] for row in read_log(out)]
                for out in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.parametrize("arguments, message", [
    ("--out first --lr 0.5 --top_k 2",
     "rank 1 has another --lr, --top_k than rank 0; start all processes with .*"),
    ("--out first --train_bin val.bin --val_bin train.bin", "rank 1 has another training text .*"),
    ("--out second --steps 4",
     "rank 1 has another --steps, step, set of weights, order than rank 0; .*"),
    ("--out first --batch_size 7", "--batch_size 7 is not divisible by the 2 processes; .*"),
    ("--out first --threads 1", None)])
def test_processes_that_differ_are_told_in_what(train, monkeypatch, capsys, arguments, message):
    """The other process does always what the first call here does: it resumes from step 1."""
    rows = []

    def exchange(processes, flat):
        if flat.ndim == 2:
            rows.append(flat[0].copy())
            flat[1] = rows[0]
        else:
            flat *= 2
    assert train(TINY, "--steps 1 --out first") == 0
    shutil.copytree("first", "second")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed", mock.Mock())
    monkeypatch.setattr(gpt2.Processes, "sum", exchange)
    assert train("--resume --steps 3 --out second") == 0
    assert train("--resume --steps 3", arguments) == (2 if message else 0)
    if message:
        assert re.fullmatch(message, error_line(capsys))


@pytest.mark.parametrize("message, kind", [
    ("Connection closed by peer", gpt2.UserError), ("connection reset", gpt2.UserError),
    ("Timed out waiting", gpt2.UserError), ("unsupported dtype", RuntimeError)])
def test_processes_call_only_a_lost_connection_one(message, kind):
    processes = gpt2.Processes()  # one, without a network
    processes.size = 2
    processes.tensor = np.asarray
    processes.network = mock.Mock(all_reduce=mock.Mock(side_effect=RuntimeError(message)))
    with pytest.raises(kind):
        processes.all_reduce(0.0, np.zeros(1))


@pytest.mark.parametrize("rank, size", [(0, 2), (1, 1), (0, 0), ("one", 2)])
def test_processes_without_torchrun_are_an_error(train, monkeypatch, capsys, rank, size):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))
    assert train(TINY, "--steps 1") == 2
    assert re.fullmatch("the processes of WORLD_SIZE .* cannot connect .*; start them with "
                        "torchrun; .*GLOO_SOCKET_IFNAME.*", error_line(capsys))


# ------------------------------------------------------------------------------------------------
# Threads.

@pytest.mark.parametrize("parts, evenly, expected", [
    (0, True, 1), (3, True, 2), (5, True, 4), (11, True, 6), (23, True, 12), (47, True, 24),
    (50.9, True, 48), (1e9, True, 96), (7, False, 7), (1e9, False, 100)])
def test_split_gives_all_items_in_slices_of_about_the_same_size(parts, evenly, expected):
    """Of 100 items. If evenly, 2, 3, 4, 6, 8 or 12 threads can have the same number of slices."""
    blocks = gpt2.split(100, parts, evenly)
    assert len(blocks) == expected
    assert [i for block in blocks for i in range(100)[block]] == [*range(100)]
    assert all(block.stop - block.start - 100 // expected in (0, 1) for block in blocks)


@pytest.mark.parametrize("M, J, K, n_blocks", [
    (3, 5, 7, 1), (700, 300, 90, 2), (90, 300, 700, 2), (1, 999, 20000, 2), (100, 4000, 100, 1),
    (500, 400, 600, 4), (3100, 1000, 3200, 24)])
def test_matmul_in_blocks_is_one_matmul(M, J, K, n_blocks, monkeypatch):
    """Few blocks, none below 64 wide. The layers' tests have other numbers than 1."""
    pool = mock.Mock(wraps=gpt2.parallel)
    monkeypatch.setattr(gpt2, "parallel", pool)
    out = np.full((M, K), 5.0, np.float32)
    gpt2.matmul(out, np.ones((M, J), np.float32), np.ones((J, K), np.float32), add=True)
    assert (out == J + 5).all() and len(pool.call_args.args[1]) == n_blocks


def test_pool_does_every_item_once_and_nested_calls_serially():
    pool = gpt2.Pool(4)
    done = []

    def outer(i):
        thread = threading.get_ident()
        pool(lambda j: done.append((i, j, threading.get_ident() == thread)), range(3))
    pool(outer, range(50))
    assert sorted(done) == [(i, j, True) for i in range(50) for j in range(3)]


def test_pool_raises_an_error_of_any_thread_when_all_have_finished():
    """Each of four threads in turn, which have begun at once."""
    pool = gpt2.Pool(4)
    start = threading.Barrier(4, timeout=30)
    finished = []

    def work(item):
        start.wait()
        if item == bad:
            raise ZeroDivisionError
        time.sleep(0.05)
        finished.append((bad, item))
    for bad in range(4):
        with pytest.raises(ZeroDivisionError):
            pool(work, range(4))
        assert sorted(finished[3 * bad:]) == [(bad, item) for item in range(4) if item != bad]


def test_pool_begins_nothing_new_after_an_interrupt():
    pool = gpt2.Pool(2)
    done = []

    def work(item):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        done.append(item)
        time.sleep(0.001)
    with pytest.raises(KeyboardInterrupt):
        pool(work, range(100))
    n = len(done)
    time.sleep(0.01)
    assert len(done) == n < 50


def losses_and_numbers(n_shards):
    """What three steps of a new model give, bit for bit."""
    model = gpt2.GPT2(gpt2.GPTConfig(257, 128, 128, 2, 4))
    model.n_shards = n_shards
    step = our_trainer(model)
    losses = [step(*random_ids(model.config, 12, 128, seed)) for seed in range(3)]
    return losses, numbers_of(model)


def test_threads_do_not_change_a_bit():
    """Neither their number nor what another thread of Python trains at the same time."""
    shards = [1, 3, 4]
    gpt2.parallel.threads = 1
    expected = [losses_and_numbers(n) for n in shards]
    for gpt2.parallel.threads in 2, 8, 3:
        assert [losses_and_numbers(n) for n in shards] == expected
    with ThreadPoolExecutor(3) as executor:
        assert [*executor.map(losses_and_numbers, shards)] == expected


@pytest.mark.parametrize("quota, expected", [
    (FileNotFoundError, 64), ("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1),
    ("9900000 100000", 64)])
def test_threads_are_limited_by_a_containers_quota(quota, expected, monkeypatch):
    """Of 64 processors, by cgroup v2. torchrun's processes on this machine share what is left."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for processes, threads in ("", expected), ("0", expected), ("2", max(1, expected // 2)):
        monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=[quota]))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert gpt2.usable_cpus() == threads


@pytest.mark.parametrize("L, C, V, B, T, threads, expected", [
    (3, 128, 257, 12, 64, 3, 3), (3, 128, 257, 12, 64, 64, 6),  # 128 positions for each
    (3, 128, 257, 3, 1024, 8, 3), (3, 128, 257, 1, 64, 8, 1),  # one sequence for each
    (12, 768, 50257, 32, 64, 8, 3)])  # with 124M gradients and 422M activations
def test_shards_are_chosen_where_they_pay(L, C, V, B, T, threads, expected):
    assert gpt2.choose_shards(gpt2.GPTConfig(V, 1024, C, L, 4), B, T, threads) == expected


def test_import_sets_blas_to_one_thread_and_leaves_the_environment_alone():
    """On Linux a process can count its threads."""
    code = """if True:
        import os
        before = dict(os.environ)
        import train_gpt2, numpy as np
        assert dict(os.environ) == before
        np.ones((900, 900)) @ np.ones((900, 900))
        tasks = "/proc/self/task"
        print(len(os.listdir(tasks)) if os.path.exists(tasks) else 1)"""
    settings = environment(OMP_NUM_THREADS=3, OPENBLAS_NUM_THREADS=2, VECLIB_MAXIMUM_THREADS=4)
    assert finish(start("-c", [code], cwd=HERE, env=settings)) == ("1\n", "")


def test_import_after_numpy_or_without_it_gets_one_line_on_stderr():
    """Nothing if BLAS has one thread already. -S hides what pip has installed."""
    late = ["import numpy, train_gpt2"]
    _, err = finish(start("-c", late, cwd=HERE))
    assert re.fullmatch(".*numpy was imported first.*BLAS.*before numpy\n", err)
    assert finish(start("-c", late, cwd=HERE, env=environment(OMP_NUM_THREADS=1)))[1] == ""
    _, err = finish(start("-S", TRAIN, "--steps 1"), status=2)
    assert err == "train_gpt2.py: error: NumPy is missing; pip install numpy\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_of_a_process_that_has_trained_can_train():
    """A child has none of its parent's threads."""
    code = """if True:
        import multiprocessing, time, train_gpt2 as gpt2
        step = lambda: gpt2.parallel(time.sleep, [0.1] * 8)
        gpt2.parallel.threads = 4
        step()
        child = multiprocessing.get_context("fork").Process(target=step, daemon=True)
        child.start()
        child.join(100)
        assert child.exitcode == 0, child"""
    finish(start("-c", [code], cwd=HERE))


# ------------------------------------------------------------------------------------------------
# The command line.

DEFAULTS = dict(
    model="baby", init_from=None, resume=False, steps=5500, prompt=None, out="out", train_bin=None,
    val_bin=None, tokenizer="byte", n_layer=3, n_head=4, n_embd=128, n_positions=64, batch_size=12,
    seq_len=64, grad_accum=1, lr=3e-3, min_lr=1e-4, warmup=100, beta1=0.9, beta2=0.99,
    weight_decay=0.1, grad_clip=1.0, seed=1337, threads=None, log_every=50, eval_every=500,
    eval_tokens=0, sample_every=1000, save_every=250, max_new_tokens=500,
    temperature=0.8, top_k=None, top_p=None, folder=None)
GPT2 = dict(
    model="gpt2", steps=1000, tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, n_positions=1024,
    batch_size=4, lr=3e-4, min_lr=3e-5, beta2=0.95, log_every=1, eval_tokens=8192)
FROM = dict(model="baby", steps=None, lr=1e-4, min_lr=1e-5, seq_len=16, n_positions=16, n_layer=1)


@pytest.mark.parametrize("arguments, changes", [
    ("--seed 5 --steps 0", {"seed": 5, "steps": 0}), ("--model gpt2", GPT2),
    ("--model gpt2-medium", GPT2 | dict(model="gpt2-medium", n_layer=24, n_head=16, n_embd=1024)),
    ("--model gpt2-large", GPT2 | dict(model="gpt2-large", n_layer=36, n_head=20, n_embd=1280)),
    ("--model gpt2-xl", GPT2 | dict(model="gpt2-xl", n_layer=48, n_head=25, n_embd=1600)),
    ("--init_from bytes", FROM | dict(init_from="bytes", folder=Path("bytes"), n_head=2,
                                      n_embd=16)),
    ("--init_from gpt2", GPT2 | FROM | dict(init_from="gpt2", folder=Path("data/gpt2"), n_head=3,
                                            n_embd=6))])
def test_command_has_these_defaults(tmp_path, monkeypatch, arguments, changes):
    """Of baby, of OpenAI's models, and to go on from a model."""
    monkeypatch.chdir(tmp_path)
    saved_model("bytes", TINY_CONFIG)
    saved_model("data/gpt2", gpt2.GPTConfig(50257, 16, 6, 1, 3))
    args, _ = gpt2.parse_arguments(words(arguments))
    assert vars(args) == DEFAULTS | changes


def test_command_resumes_runs_of_versions_with_other_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_model("out/step_000001")
    options = {"tokenizer": "byte", "train_bin": "t", "val_bin": "v", "steps": 9, "other": 1}
    monkeypatch.setattr(gpt2, "read_state", lambda folder: {
        "step": 1, "options": options | vars(SMALL)})
    args, _ = gpt2.parse_arguments(["--resume", "--seq_len", "8"])
    assert args.steps == 9 and args.val_bin == str(Path("out/v"))


def test_command_refuses_numbers_out_of_bounds():
    bounds = {
        (0, 2**32): "steps warmup seed eval_tokens max_new_tokens",
        (1, 2**32): "batch_size seq_len grad_accum top_k log_every eval_every sample_every "
                    "save_every",
        (1, 65536): "n_layer n_head n_embd n_positions", (1, 256): "threads",
        (0.0, 1e38): "lr min_lr weight_decay grad_clip temperature",
        (0.0, 0.99999): "beta1 beta2", (0.0, 1.0): "top_p"}
    parser = gpt2.make_parser()
    for (low, high), names in bounds.items():
        beyond = [low - 1, high + 1] if type(low) is int else [-1e-9, high * 1.001, "inf"]
        for name in names.split():
            for value in low, high:
                assert getattr(parser.parse_args([f"--{name}={value}"]), name) == value
            for value in *beyond, "nan", "x", "", "9" * 200, "9" * 5000:
                with pytest.raises(gpt2.UserError, match=f"--{name}: must be .{{20,99}}, not "):
                    parser.parse_args([f"--{name}={value}"])


@pytest.mark.parametrize("arguments, message", [
    ("--step 3", "unrecognized arguments: --step 3"),
    ("--model gpt2 --init_from m", "not allowed with argument"),
    ("--resume --model gpt2", "not allowed with argument"),
    ("", "data/ lacks what is needed; put prepro_tinyshakespeare.py.*--train_bin and --val_bin"),
    ("--resume", "--resume: out has no checkpoint; give the run's folder as --out"),
    ("--seq_len 65", "--seq_len 65 is more than --n_positions 64; lower it"),
    ("--train_bin train.bin", "--train_bin and --val_bin belong together"),
    ("--val_bin val.bin", "--train_bin and --val_bin belong together"),
    ("--train_bin no*.bin --val_bin val.bin", r"no\*\.bin: no such file; make one with"),
    ("--train_bin short.bin --val_bin val.bin", "short.bin: 64 tokens are too few for --seq_len"),
    (f"{TINY} --steps 1 --out val.bin", "val.bin.*; check the path"),
    (f"{TINY} --steps 1", "out.log.csv is not this run's log, or was edited; restore it, or move"),
    ("--init_from baby", "baby.{1,2}config.json'; check the path"),
    ("--init_from m --n_embd 32", "--n_embd 32 does not fit m, which has 16; leave it out"),
    ("--init_from m300", "m300 has another vocabulary; give the --tokenizer to use with it"),
    ("--init_from m --tokenizer gpt2", "GPT-2's tokens need tiktoken .*; pip install it"),
    ("--n_layer 24 --n_head 1 --n_embd 65536 " + FILES,
     "need 19,[0-9]{3}.[0-9] GB of memory, the system has [0-9,.]+; lower --n_layer")])
def test_command_that_cannot_run_gets_one_line_and_changes_nothing(
        train, monkeypatch, capsys, arguments, message):
    saved_model("m", TINY_CONFIG)
    saved_model("m300", gpt2.GPTConfig(300, 16, 16, 1, 2))
    gpt2.write_tokens("short.bin", range(64))
    gpt2.write_tokens("data/tinyshakespeare_byte_train.bin", range(64))  # one of two
    gpt2.write_file("out/log.csv", [b"of another run"])
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for module in "prepro_tinyshakespeare", "tiktoken":
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setattr(gpt2, "adamw", None)  # all this is known before a step is made
    assert train(arguments) == 2
    assert re.match(f".*({message})", error_line(capsys))
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name, value", [
    ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 100),
    ("scale_attn_weights", False), ("add_cross_attention", True), ("tie_word_embeddings", False),
    ("layer_norm_epsilon", 1e-6), ("model_type", "llama"), ("n_embd", "12"), ("n_layer", None)])
def test_command_refuses_a_model_that_is_no_plain_gpt2(tmp_path, name, value):
    saved_model(tmp_path)
    edit_json(tmp_path / "config.json", **{name: value})
    with pytest.raises(gpt2.UserError, match=f"config.json: {name} is {value!r}"):
        gpt2.read_config(tmp_path)


@pytest.mark.parametrize("arguments, n_bytes", [
    ("--max_new_tokens 0", 4 * (7680 + 16 * 693)),
    (f"{FILES} --steps 1 --batch_size 32 --threads 2", 4 * (5 * 7680 + 32 * 16 * 693))])
def test_command_needs_memory_for_what_it_does(train, monkeypatch, capsys, arguments, n_bytes):
    """Parameters and activations (693 numbers a position); for training, also two moments and the
    gradients of every shard. Systems without os.sysconf have enough until NumPy has not."""
    saved_model("m", TINY_CONFIG)
    gpt2.write_tokens("train.bin", range(17))  # one window
    for memory, status in (n_bytes, 0), (n_bytes - 1, 2):
        monkeypatch.setattr(os, "sysconf", lambda name: memory if "PHYS" in name else 1, False)
        assert train("--init_from m", arguments, "--out", memory) == status
    monkeypatch.delattr(os, "sysconf")
    capsys.readouterr()
    monkeypatch.setattr(gpt2, "make_model", mock.Mock(side_effect=MemoryError("no\nroom")))
    assert train("--init_from m", arguments) == 2 and error_line(capsys) == "no room"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
def test_command_help_shows_the_defaults_of_a_model_and_tells_of_a_full_disk():
    out, _ = finish(start(TRAIN, "-h --model gpt2"))
    assert "0 only validates and samples (default: 1000)" in " ".join(out.split())
    with open("/dev/full", "w") as full:
        _, err = finish(start(TRAIN, "--help", stdout=full), 2)
    assert re.fullmatch("error: cannot print: .*No space left on device\n", err)


def test_command_trains_a_model_that_learns_on_any_number_of_threads(tmp_path):
    """In a folder where nothing but NumPy can be imported, without a network, from Python's own
    text. A resumed run keeps this text and the four shards it began with. Measured: the validation
    loss falls from 5.55 = log 257 to 2.92; how frequent every byte is would give about 3.35.
    """
    program = shutil.copy(TRAIN, tmp_path)
    shutil.copy(PREPRO, tmp_path)
    for name in "torch", "tiktoken":
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    out, err = finish(start(program, "--steps 60 --eval_every 30 --eval_tokens 8192 "
                            "--save_every 30 --max_new_tokens 50 --threads 4", cwd=tmp_path))
    assert re.match(".*tinyshakespeare.* could not be downloaded.*pydoc_data", out) and err == ""
    losses = [float(x) for x in re.findall(r"^step +\d+ \| val loss (\S+)", out, re.M)]
    assert len(losses) == 2 and losses[1] < 3.1
    result = result_of(tmp_path / "out", 60)
    shutil.rmtree(tmp_path / "out" / "step_000060")
    for part in "train", "val":
        gpt2.write_tokens(tmp_path / f"data/tinyshakespeare_byte_{part}.bin", range(20))
    again, _ = finish(start(program, "--resume --threads 1", cwd=tmp_path))
    assert result_of(tmp_path / "out", 60) == result
    assert "shards 4, threads 4\n" in out and "shards 4, threads 1\n" in again
    assert samples(again) == samples(out) != []
    out, _ = finish(start(program, "--init_from out --prompt É:", cwd=tmp_path,
                          env=environment(PYTHONIOENCODING="ascii")))
    assert out.startswith("É:")


# ------------------------------------------------------------------------------------------------
# prepro_tinyshakespeare.py.

def test_prepro_splits_a_text_as_nanogpt_and_llm_c_do():
    """Bytes: 90% of the characters train. Others: 32,768 validate, or a tenth of all."""
    letters = gpt2.Tokenizer("byte")
    train, val = prepro.tokenize("é" * 99, letters)
    assert (len(train), len(val)) == (178, 20)
    letters.name, letters.eot_token = "letters", 0
    for times, n_val in (20, 24), (30000, 32768):
        train, val = prepro.tokenize("a\n\nb\n\n\n\nc" * times, letters)
        ids = val + train
        assert ids[:11] == [0, *b"a\n\n", 0, *b"b\n\n", 0, *b"\n\n"] and ids[-2:] == [0, *b"c"]
        assert len(val) == n_val


def test_prepro_prints_a_command_that_runs_and_replaces_no_other_text(train, monkeypatch, capsys):
    """Two processes at once make the same files. Without a step, a run validates and samples."""
    text = "Es war einmal — né.\n" * 50
    path = Path("my novel[1].txt")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    processes = [start(PREPRO, "--text", path) for _ in range(2)]
    out, _ = [finish(process)[0] for process in processes]
    command = re.search("now run: python train_gpt2.py (.*)\n", out)[1]
    command = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    assert command[4:] == ["--tokenizer", "byte", "--out", "out_my novel[1]"]
    monkeypatch.setattr(gpt2, "usable_cpus", lambda: 7)
    assert train(command, "--steps 0 --eval_tokens 999 --prompt The --max_new_tokens 5") == 0
    assert re.search(r"threads 7\n.*\nvalidate  (\d+) of \1 tokens in .*\n"
                     r"step 0 \| val loss 5\.\d{4}\nThe", capsys.readouterr().out)
    assert not Path(command[-1]).exists()
    path.write_text("another text")
    _, err = finish(start(PREPRO, "--text", path), 2)
    assert "train.bin has the tokens of another text; remove it, or rename this text" in err
    ids = np.concatenate([gpt2.read_tokens(path, 257) for path in command[1:4:2]])
    assert gpt2.Tokenizer("byte").decode(ids) == text


@pytest.mark.parametrize("program, arguments, file, content, message", [
    (PREPRO, "--text a.txt", "a.txt", b"ab\xff", "a.txt: byte 2 is not UTF-8; save it as UTF-8"),
    (PREPRO, "--text a.txt", "a.txt", b"abc", "a: 3 characters are too few; give more text"),
    (PREPRO, "--text a.txt --tokenizer gpt2", "a.txt", b"ab", "GPT-2's tokens need tiktoken"),
    (PREPRO, "", "data/tinyshakespeare.txt", b"ab", "tinyshakespeare.txt is another text: its SHA"),
    (PREPRO, "", "a.txt", b"", "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
     "tinyshakespeare/input.txt could not be downloaded: .*data.tinyshakespeare.txt"),
    (TRAIN, "--init_from gpt2", "a.txt", b"", "https://huggingface.co/openai-community/gpt2/"
     "resolve/main/config.json could not be downloaded: .*hf download openai-community/gpt2 ")])
def test_prepro_without_what_it_needs_gets_one_line(
        tmp_path, program, arguments, file, content, message):
    """Run as scripts: train_gpt2.py must know the UserError of the module that prepro imports."""
    gpt2.write_file(tmp_path / file, [content])
    env = environment(TIKTOKEN_CACHE_DIR=tmp_path / "nothing")
    _, err = finish(start(program, arguments, cwd=tmp_path, env=env), 2)
    assert re.fullmatch(f"{program.name}: error: .*{message}.*\n", err), err
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))


def test_prepro_downloads_what_is_missing_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepro, "download", lambda url, path, advice: gpt2.write_file(
        path, [url.encode()]))
    folder = Path("data", "gpt2-medium")
    gpt2.write_file(folder / "config.json", [b"kept"])
    assert gpt2.find_model("gpt2-medium") == folder
    kept, url = ((folder / name).read_text() for name in ("config.json", "model.safetensors"))
    assert kept == "kept" and url.endswith("/gpt2-medium/resolve/main/model.safetensors")


CONTENT = np.random.default_rng(0).bytes(300000)
HEADER = b"HTTP/1.0 200 OK\r\nContent-Length: 300000\r\n\r\n"


@pytest.mark.parametrize("answer, silence, reason", [
    (b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT, 0, None), (HEADER + CONTENT, 0, None),
    (b"HTTP/1.0 404 Not Found\r\n\r\n", 0, ".*Not Found"), (b"no HTTP\r\n\r\n", 0, "no HTTP"),
    (HEADER + CONTENT[:9], 3, "timed out"),
    (HEADER.replace(b"300000", b"x"), 0, "invalid literal for int.*"),
    (HEADER + CONTENT[:150000], 0, "the connection ended after 150,000 of 300,000 bytes"),
    (None, 0, "no answer within 0.5 seconds")])
def test_prepro_download_appears_whole_or_says_why_not(tmp_path, monkeypatch, answer, silence,
                                                       reason):
    """From a server that sends this answer, is silent for so many seconds, and hangs up. None: the
    look-up of its name takes for ever."""
    def respond(connection, address, server):
        connection.recv(9999)
        connection.sendall(answer)
        time.sleep(silence)
    monkeypatch.setattr(prepro, "TIMEOUT", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if answer is None:
        monkeypatch.setattr("socket.getaddrinfo", lambda *args: threading.Event().wait())
    failure = pytest.raises(gpt2.UserError, match=f"/f could not be downloaded: {reason}; by hand")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), respond) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        with failure if reason else contextlib.nullcontext():
            prepro.download(f"http://127.0.0.1:{server.server_port}/f", tmp_path / "w", "by hand")
        server.shutdown()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if reason else [CONTENT])


# ------------------------------------------------------------------------------------------------
# The table: python test_gpt2.py

def compare(folder):
    """Print loss, logits and every gradient beside PyTorch's; return whether all agree.

    Without a folder, of a new 124M model: there all biases are 0 and all layernorm weights 1, and a
    layer that forgets them would be right, so they get noise. Measured: 2e-6, and 5e-6 for a model
    that the default run has trained.
    """
    tolerance = 1e-4 if folder else 1e-5
    if folder:
        model = gpt2.GPT2.from_pretrained(gpt2.find_model(folder))
    else:
        model = gpt2.GPT2(gpt2.GPTConfig())
        rng = np.random.default_rng(0)
        for x in model.params.values():
            if x.ndim == 1:
                x += 0.02 * rng.standard_normal(x.shape)
    B, T = 1, min(256, model.config.n_positions)  # more than one chunk of queries
    print(f"{model.config}, B={B}, T={T}, float32; OK: within {tolerance:g} of the largest value\n"
          f"\n{'':28} {'shape':16} {'largest':>10} {'difference':>10} {'relative':>9}")
    batch = random_ids(model.config, B, T)
    ours = our_results(model, *batch)
    good = True
    for name, x in torch_results(model, *batch).items():
        largest = x.abs().max().item()
        relative = error(ours[name], x)
        good &= bool(relative <= tolerance)
        print(f"{name:28} {str(tuple(x.shape)):16} {largest:10.3e} {relative * largest:10.3e} "
              f"{relative:9.1e} {'OK' if relative <= tolerance else 'NOT OK'}")
    print("\nall OK" if good else "\nNOT OK")
    return good


@pytest.mark.parametrize("broken", [None, *FUNCTIONS])
def test_table_has_status_1_if_a_layer_is_off(broken, tmp_path, monkeypatch, capsys):
    """The first result of one function is 0.1% too large."""
    saved_model(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test_gpt2.py", "--init_from", str(tmp_path)])
    if broken:
        function = getattr(gpt2, broken)

        def off(first, *rest):
            function(first, *rest)
            np.multiply(first, 1.001, out=first)
        monkeypatch.setattr(gpt2, broken, off)
    with pytest.raises(SystemExit) as end:
        gpt2.run_program(main)
    out = capsys.readouterr().out
    expected = (1, "NOT OK") if broken else (0, "all OK")
    assert (end.value.code, out.split("\n")[-2]) == expected
    assert all(f"\n{name} " in out for name in ("logits", "loss", *gpt2.parameter_table(SMALL)))


# ------------------------------------------------------------------------------------------------
# The benchmark: python test_gpt2.py --bench. Two processes, ours and PyTorch's, take steps in turn.

BENCH = {  # L, H, C, V, B, T
    "baby": [4, 4, 128, 257, 12, 64], "baby384": [6, 6, 384, 257, 16, 256],
    "124M": [12, 12, 768, 50257, 4, 64], "124M-long": [12, 12, 768, 50257, 1, 1024],
    "long": [4, 4, 128, 257, 1, 1024]}
WORKERS = {  # the first has no PyTorch, so that memory can be compared
    "ours": "import sys; sys.modules['torch'] = None; import test_gpt2; test_gpt2.bench_worker",
    "PyTorch": "import test_gpt2; test_gpt2.bench_worker"}


def our_trainer(model):
    """A function (ids, targets) -> loss that takes one step."""
    def step(ids, targets):
        loss = model.forward(ids, targets)
        model.backward()
        model.update(1e-3)
        return loss
    return step


def torch_trainer(model):
    """The same step, with update()'s defaults and PyTorch's fused AdamW."""
    config, p = model.config, torch_params(model)
    optimizer = torch.optim.AdamW(
        [{"params": [x for x in p.values() if x.ndim == n], "weight_decay": decay}
         for n, decay in ((2, 0.1), (1, 0))], lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(ids, targets):
        optimizer.zero_grad()
        loss = torch_gpt2(p, config, torch.tensor(ids), torch.tensor(targets))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        return loss.item()
    return step


def peak_memory():
    """The largest memory this process has had, in MB, on Linux; elsewhere nan."""
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    return math.nan


def bench_worker(L, H, C, V, B, T):
    """A process of the benchmark: answer every line of stdin, a number of steps, with JSON."""
    imported = peak_memory()
    model = gpt2.GPT2(gpt2.GPTConfig(V, T, C, L, H))
    if torch:
        torch.set_num_threads(gpt2.parallel.threads)
        step = torch_trainer(model)
        del model  # it has copies
    else:
        model.n_shards = gpt2.choose_shards(model.config, B, T, gpt2.parallel.threads)
        step = our_trainer(model)
    # What can be learned shows differences that random tokens hide, such as another weight decay:
    # a text that goes up by one or two, around a circle of at most 16 tokens.
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 3, size=100_000).cumsum() % min(V, 16)
    losses = []

    def one_step():
        starts = rng.integers(len(tokens) - T, size=B)
        losses.append(step(*gpt2.windows(tokens, starts, T)))
    for line in sys.stdin:
        times = sorted(timeit.repeat(one_step, number=1, repeat=int(line)))
        print(json.dumps({"ms": 1e3 * times[len(times) // 2], "losses": losses[:3],
                          "memory": f"{peak_memory():.0f} ({imported:.0f})"}), flush=True)


def operations(L, H, C, V, B, T):
    """The floating-point operations that the matrix products of one step need."""
    # Each of the B T positions meets every weight of the linear layers, 12 C^2 in a block and V C
    # for the logits, and in every block the C numbers of the keys, then of the values, of (T + 1)/2
    # positions on average: a multiplication and an addition each. Backward has twice as many.
    return 3 * 2 * B * T * (L * 12 * C * C + V * C + L * 2 * C * (T + 1) / 2)


def peak_speed(product, threads):
    """The speed of large matrix products, one on each thread, in GFLOP/s: the best of nine."""
    n = 1024
    a = np.ones((n, n), np.float32)
    seconds = min(timeit.repeat(lambda: gpt2.parallel(lambda i: product(a, a), range(threads)),
                                number=1, repeat=9))
    return threads * 2 * n**3 / seconds / 1e9


def bench_one(name, turns, speed):
    """Measure one configuration and print its row; return whether the losses agree."""
    workers = {trainer: start("-c", [f"{code}(*{BENCH[name]})"], cwd=HERE, env=os.environ,
                              stdin=subprocess.PIPE, stderr=None)
               for trainer, code in WORKERS.items()}
    found = {trainer: [] for trainer in WORKERS}
    steps = 3
    for turn in range(turns + 1):  # the first is a warm-up
        for trainer in WORKERS if turn % 2 == 0 else reversed(WORKERS):
            print(steps, file=workers[trainer].stdin, flush=True)
            line = workers[trainer].stdout.readline()
            gpt2.require(line, "a process of the benchmark has ended")
            found[trainer].append(json.loads(line))
        if turn == 0:  # a turn takes about two seconds
            steps = max(1, min(40, int(2000 / found["ours"][0]["ms"])))
    for worker in workers.values():
        worker.communicate()
    ours, theirs = found.values()
    difference = np.abs(np.subtract(ours[0]["losses"], theirs[0]["losses"])).max()
    agreeing = bool(difference <= 2e-5)  # measured: 2e-6; without weight decay 2e-4
    times, torch_times = ([answer["ms"] for answer in x[1:]] for x in (ours, theirs))
    ms = np.median(times)
    ratios = np.divide(torch_times, times)
    bound = operations(*BENCH[name]) / speed / 1e6
    print(f"| {name} | {ms:.1f} | {np.median(torch_times):.1f} | {np.median(ratios):.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f}) | {bound:.1f} ({bound / ms:.0%}) "
          f"| {ours[-1]['memory']} | {theirs[-1]['memory']} "
          f"| {difference:.0e} {'OK' if agreeing else 'NOT OK'} |", flush=True)
    return agreeing


def bench_sampling(n=64):
    """Print the time per token of a 124M model, and transformers' if it is installed."""
    model = gpt2.GPT2(gpt2.GPTConfig())
    ways = {"ours": lambda: [*gpt2.generate(model, [[50256]], n, top_k=40)]}
    with contextlib.suppress(ImportError):
        import transformers
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        ways["transformers"] = lambda: theirs.generate(
            torch.tensor([[50256]]), min_new_tokens=n, max_new_tokens=n, do_sample=True, top_k=40,
            attention_mask=torch.tensor([[1]]), pad_token_id=0)
    for name, way in ways.items():
        times = timeit.repeat(way, number=1, repeat=4)[1:]
        print(f"sampling one sequence, 124M, {name}: {1e3 * np.median(times) / n:.1f} ms a token")


def bench(only, turns):
    """Print the table of the README's section on speed; return whether all losses agree."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"THE MACHINE IS BUSY (load {os.getloadavg()[0]:.1f}), which slows PyTorch more than "
              "NumPy: wait until it is idle\n")
    np.show_runtime()  # with the BLAS kernel, if threadpoolctl is installed
    threads = gpt2.parallel.threads
    speed = peak_speed(np.matmul, threads)
    torch.set_num_threads(1)
    torch_speed = peak_speed(lambda a, b: torch.from_numpy(a) @ torch.from_numpy(b), 1)
    torch.set_num_threads(threads)
    print(f"one large product, GFLOP/s: numpy {peak_speed(np.matmul, 1):.0f} on one thread, "
          f"{speed:.0f} on {threads}; torch {torch.__version__} {torch_speed:.0f} on one\n"
          f"PyTorch eager, {threads} threads; bound: the arithmetic at that speed; memory after "
          "the import in brackets; difference of the first three losses\n\n"
          "| config | ms/step | PyTorch | ratio (min-max) | bound, ms (share) "
          "| peak MB | PyTorch | difference |\n" + "|---" * 8 + "|", flush=True)
    good = [bench_one(name, turns, speed) for name in ([only] if only else BENCH)]
    if not only:
        bench_sampling()
    return all(good)


@pytest.mark.parametrize("change, status", [("", 0), ("beta2=0.99", 1), ("weight_decay=0", 1)])
def test_bench_has_status_1_if_our_optimizer_is_another(change, status, monkeypatch, capsys):
    code = "import functools, train_gpt2 as g; g.GPT2.update = functools.partialmethod"
    monkeypatch.setitem(WORKERS, "ours", f"{code}(g.GPT2.update, {change}); {WORKERS['ours']}")
    monkeypatch.setitem(BENCH, "tiny", [2, 4, 64, 257, 4, 64])
    monkeypatch.setattr(sys, "argv", words("test_gpt2.py --bench --config tiny --turns 1"))
    with pytest.raises(SystemExit) as end:
        gpt2.run_program(main)
    assert end.value.code == status
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| tiny | ") and row.endswith(" NOT OK |") == bool(status)


def main():
    """The table, or the benchmark; exit status 1 if numbers differ from PyTorch's."""
    parser = argparse.ArgumentParser(description="Gradients beside PyTorch's, or speed.")
    parser.add_argument("--init_from", metavar="FOLDER", help="compare with these weights")
    parser.add_argument("--bench", action="store_true", help="compare the speed")
    parser.add_argument("--config", choices=BENCH, help="only one configuration")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default: 5)")
    args = parser.parse_args()
    gpt2.require(torch, "PyTorch is missing; pip install torch==2.13.0")
    good = bench(args.config, args.turns) if args.bench else compare(args.init_from)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    gpt2.run_program(main)
