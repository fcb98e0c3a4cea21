"""The same GPT-2 in PyTorch, and tests that compare every function of train_gpt2.py with it.

    pytest                        # all tests
    pytest -k layernorm           # the tests of one layer
    python test_gpt2.py           # every gradient of the 124M shape, beside PyTorch's
    python test_gpt2.py --bench   # the speed of both

The first section is the network of train_gpt2.py, in the same order, written with PyTorch's own
functions and differentiated by autograd. Then come the tests, in the order of train_gpt2.py.
"""
import argparse
import contextlib
import csv
import doctest
import errno
import hashlib
import http.server
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib
from pathlib import Path

import train_gpt2 as gpt2  # isort: skip # before numpy, whose BLAS it sets to one thread

import numpy as np
import pytest

# The benchmark's processes without PyTorch do not import it, so that their memory can be compared.
if __name__ != "__main__" or sys.argv[1:2] not in (["--worker=ours"], ["--worker=floor"]):
    import torch
    import torch.nn.functional as F

import prepro_tinyshakespeare as prepro

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------
# GPT-2 in PyTorch. p is {name: tensor}, under the names of gpt2.parameter_table.

def torch_block(x, p, H):
    def pair(name):
        return p[f"{name}.weight"], p[f"{name}.bias"]

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"].T, p[f"{name}.bias"])
    B, T, C = x.shape
    qkv = linear(F.layer_norm(x, (C,), *pair("ln_1")), "attn.c_attn").chunk(3, dim=-1)
    q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in qkv)
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + linear(heads.transpose(1, 2).reshape(B, T, C), "attn.c_proj")
    hidden = linear(F.layer_norm(x, (C,), *pair("ln_2")), "mlp.c_fc")
    return x + linear(F.gelu(hidden, approximate="tanh"), "mlp.c_proj")


def torch_gpt2(p, config, ids, targets=None):
    """ids (B,T) -> logits (B,T,V), and with targets the mean loss: (logits, loss)."""
    x = p["wte.weight"][ids] + p["wpe.weight"][:ids.shape[1]]
    for h in (f"h.{i}." for i in range(config.n_layer)):
        x = torch_block(x, {n.removeprefix(h): p[n] for n in p if n.startswith(h)}, config.n_head)
    x = F.layer_norm(x, (config.n_embd,), p["ln_f.weight"], p["ln_f.bias"])
    logits = F.linear(x, p["wte.weight"])
    if targets is None:
        return logits, None
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_params(model):
    """A model's parameters as separate tensors that autograd follows."""
    return {name: torch.tensor(view).requires_grad_() for name, view in model.params.items()}


def error(ours, reference):
    """The largest difference, relative to the largest number in the reference."""
    reference = np.asarray(reference.detach() if torch.is_tensor(reference) else reference)
    ours = np.asarray(ours).reshape(reference.shape)
    largest = np.abs(reference).max()
    assert largest > 0, "the reference is all zero: equal to it shows nothing"
    assert np.isfinite(ours).all(), "not finite"
    return np.abs(ours - reference).max() / largest


def agree(ours, reference, tolerance):
    """Assert that every array of {name: array} agrees; return the largest error."""
    assert ours.keys() == reference.keys()
    errors = {name: error(ours[name], reference[name]) for name in reference}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= tolerance}
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"
    return max(errors.values())


def our_results(model, ids, targets):
    """{name: array} of the loss, the logits and every gradient."""
    model.flat_grads[:] = 0
    results = {"loss": np.array(model.forward(ids, targets)), "logits": model.logits()}
    model.backward()
    return results | model.grads


def torch_results(model, ids, targets):
    """The same of PyTorch."""
    p = torch_params(model)
    logits, loss = torch_gpt2(p, model.config, torch.tensor(ids), torch.tensor(targets))
    loss.backward()
    return {"loss": loss, "logits": logits} | {name: x.grad for name, x in p.items()}


def gradients_agree(model, ids, targets, tolerance):
    """Assert that loss, logits and every gradient are PyTorch's; return the largest error."""
    return agree(our_results(model, ids, targets), torch_results(model, ids, targets), tolerance)


def perturbed(config, dtype=np.float64, seed=0):
    """A model whose biases are not 0 and whose layernorm weights are not 1."""
    model = gpt2.GPT2(config, dtype, seed)
    model.flat_params += 0.1 * np.random.default_rng(seed).standard_normal(model.flat_params.size)
    return model


def random_ids(config, B, T, seed=0):
    """Random ids and targets, both (B,T)."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=(2, B, T))


SMALL = gpt2.GPTConfig(vocab_size=17, n_positions=8, n_embd=12, n_layer=2, n_head=3)
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


def layers(B=2, T=5, H=3, C=12, K=7, V=17):
    """{layer: shapes of inputs, output and what is kept; our forward and backward; PyTorch's}.

    All sizes are different. In the lambdas, x are the inputs and g their gradients.
    """
    N, S, D, ids = B * T, T + 60, C // H, np.random.default_rng(1).integers(V // 3, size=(B, T))
    targets, mask = torch.tensor(ids.ravel()), torch.ones(T, S, dtype=torch.bool).tril(S - T)
    q, cached, attention = (B, H, T, D), (B, H, S, D), F.scaled_dot_product_attention
    ours = ((B, H, T, D), (B, H, T, 1),
            lambda out, kept, x: gpt2.attention_forward(out, kept, *x),
            lambda g, dout, out, kept, x: gpt2.attention_backward(*g, dout, out, kept, *x))
    return {
        "embedding": (
            dict(wte=(V, C), wpe=(T + 3, C)), (N, C), 0,
            lambda out, kept, x: gpt2.embedding_forward(out, ids, *x),
            lambda g, dout, out, kept, x: gpt2.embedding_backward(*g, dout, ids),
            lambda wte, wpe: (wte[torch.tensor(ids)] + wpe[:T]).flatten(0, 1)),
        "layernorm": (
            dict(inp=(N, C), weight=(C,), bias=(C,)), (N, C), (2, N, 1),
            lambda out, kept, x: gpt2.layernorm_forward(out, *kept, *x),
            lambda g, dout, out, kept, x: gpt2.layernorm_backward(*g, dout, x[0], *kept, x[1]),
            lambda inp, weight, bias: F.layer_norm(inp, (C,), weight, bias)),
        "linear": (
            dict(inp=(N, C), weight=(C, K), bias=(K,)), (N, K), 0,
            lambda out, kept, x: gpt2.linear_forward(out, *x),
            lambda g, dout, out, kept, x: gpt2.linear_backward(*g, dout, *x[:2]),
            lambda inp, weight, bias: F.linear(inp, weight.T, bias)),
        "linear with tied weights": (
            dict(inp=(N, C), wte=(V, C)), (N, V), 0,
            lambda out, kept, x: gpt2.linear_forward(out, x[0], x[1].T),
            lambda g, dout, out, kept, x:
                gpt2.linear_backward(g[0], g[1].T, None, dout, x[0], x[1].T),
            lambda inp, wte: F.linear(inp, wte)),
        "attention": (dict(q=q, k=q, v=q), *ours, lambda *x: attention(*x, is_causal=True)),
        "attention with a cache": (  # the queries are the last T of S positions
            dict(q=q, k=cached, v=cached), *ours, lambda *x: attention(*x, attn_mask=mask)),
        "gelu": (
            dict(inp=(N, K)), (N, K), 0,
            lambda out, kept, x: gpt2.gelu_forward(out, *x),
            lambda g, dout, out, kept, x: gpt2.gelu_backward(*g, dout, *x),
            lambda inp: F.gelu(inp, approximate="tanh")),
        "crossentropy": (  # the gradient of every loss is the same number, here 3
            dict(logits=(N, V)), (N,), (N, 1),
            lambda out, kept, x: gpt2.crossentropy_forward(out, kept, *x, ids.ravel()),
            lambda g, dout, out, kept, x:
                gpt2.crossentropy_backward(*g, 3.0, kept, *x, ids.ravel()),
            lambda logits: F.cross_entropy(logits, targets, reduction="none"))}


SIZES = {"small": {}, "T=1": dict(T=1), "three blocks of queries": dict(T=150),
         "several blocks of rows": dict(B=6, T=150, C=192, K=160, V=170)}


LAYERS = pytest.mark.parametrize("name", [
    "embedding", "layernorm", "linear", "linear with tied weights", "attention",
    "attention with a cache", "gelu", "crossentropy"])


@LAYERS
@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_layer_matches_torch(name, dtype, size):
    """Measured: 3e-15 in float64 and 6e-7 in float32."""
    shapes, out, kept, forward, backward, reference = layers(**SIZES[size])[name]
    rng, tolerance = np.random.default_rng(0), 3e-14 if dtype == np.float64 else 1e-5
    x = {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}
    dout = rng.standard_normal(out).astype(dtype)
    if name == "crossentropy":
        dout[:] = 3
    tensors = {n: torch.tensor(array, requires_grad=True) for n, array in x.items()}
    expected = reference(*tensors.values())
    expected.backward(torch.tensor(dout))
    out, kept = (np.full(shape, np.nan, dtype) for shape in (out, kept))
    forward(out, kept, [*x.values()])
    agree({"out": out}, {"out": expected}, tolerance)
    # gradients of activations are written, those of parameters are added, here to ones
    before = {n: 1 if n in ("weight", "bias", "wte", "wpe") else np.nan for n in x}
    grads = {n: np.full_like(array, before[n]) for n, array in x.items()}
    backward([*grads.values()], dout, out, kept, [*x.values()])
    grads = {n: array - np.nan_to_num(before[n]) for n, array in grads.items()}
    if name == "attention" and size == "T=1":  # one key: softmax is 1 whatever the score
        assert max(np.abs(grads.pop(n)).max() for n in "qk") < tolerance
    agree(grads, {n: tensors[n].grad for n in grads}, tolerance)


@LAYERS
def test_layer_matches_central_differences(name):
    """(f(x + h) - f(x - h)) / 2h for every single input, without PyTorch. Measured: below 1e-9."""
    shapes, out, kept, forward, backward, _ = layers(**SIZES["small"])[name]
    rng, h = np.random.default_rng(0), 1e-5
    x = {n: rng.standard_normal(shape) for n, shape in shapes.items()}
    dout = np.full(out, 3.0) if name == "crossentropy" else rng.standard_normal(out)
    out, kept = np.empty(out), np.empty(kept)

    def loss():
        forward(out, kept, [*x.values()])
        return (dout * out).sum()
    loss()
    grads, numeric = ({n: np.zeros_like(array) for n, array in x.items()} for _ in range(2))
    backward([*grads.values()], dout, out, kept, [*x.values()])
    for n, array in x.items():
        for i in np.ndindex(array.shape):
            value, sides = array[i], []
            for array[i] in value + h, value - h:
                sides.append(loss())
            array[i] = value
            numeric[n][i] = (sides[0] - sides[1]) / (2 * h)
    agree(grads, numeric, 1e-8)


@DTYPES
def test_layers_are_finite_and_right_far_from_zero(dtype):
    largest = np.finfo(dtype).max / 4
    logits = np.array([[largest, -largest, 0], [-largest, largest, 0], [1e4, 1e4, 1e4]], dtype)
    targets, losses, lse = np.array([0, 0, 2]), np.empty(3, dtype), np.empty((3, 1), dtype)
    q, k = np.array([[1e3, -1e3, 1e3], [1e3, 2e3, -1e3]], dtype).reshape(2, 1, 1, 3, 1)
    x = np.array([[-1e4, -50, -12, 12, 50, 1e4]], dtype)
    out, slope, heads, heads_lse = (np.empty_like(y) for y in (x, x, q, q))
    with np.errstate(all="raise", under="ignore"):
        gpt2.crossentropy_forward(losses, lse, logits, targets)
        gpt2.crossentropy_backward(logits, 1.0, lse, logits, targets)
        gpt2.attention_forward(heads, heads_lse, q, k, q)
        gpt2.gelu_forward(out, x)
        gpt2.gelu_backward(slope, np.ones_like(x), x)
    np.testing.assert_allclose(losses, [0, 2 * largest, math.log(3)], rtol=1e-5)
    np.testing.assert_allclose(logits, [[0, 0, 0], [-1, 1, 0], [1 / 3, 1 / 3, -2 / 3]],
                               atol=2e-3 if dtype == np.float32 else 1e-11)
    assert heads.ravel().tolist() == [1e3, 1e3, -1e3], "a query sees only the key that fits best"
    assert heads_lse.ravel().tolist() == [1e6, -1e6, 2e6]
    np.testing.assert_allclose(out, np.maximum(x, 0), atol=1e-30)
    np.testing.assert_allclose(slope, x > 0, atol=1e-20)


@pytest.mark.parametrize("B, T, S, H, D", [
    (3, 7, 7, 2, 4), (2, 64, 64, 3, 8), (1, 300, 300, 9, 4), (2, 600, 600, 5, 4), (2, 1, 70, 3, 4),
    (1, 70, 200, 2, 4)])
def test_attention_in_blocks_is_attention_with_the_whole_matrix(B, T, S, H, D):
    """S > T: the queries are the last T of S positions. Measured: 1.4e-15."""
    rng = np.random.default_rng(1)
    q, dout = rng.standard_normal((2, B, H, T, D))
    k, v = rng.standard_normal((2, B, H, S, D))
    out, lse, (dq, dk, dv) = np.empty_like(q), np.empty((B, H, T, 1)), map(np.empty_like, (q, k, v))
    gpt2.attention_forward(out, lse, q, k, v)
    gpt2.attention_backward(dq, dk, dv, dout, out, lse, q, k, v)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D) + np.triu(np.full((T, S), -np.inf), 1 + S - T)
    att = np.exp(scores) / np.exp(scores).sum(axis=3, keepdims=True)
    datt = dout @ v.swapaxes(2, 3)
    dscore = att * (datt - (datt * att).sum(axis=3, keepdims=True)) / math.sqrt(D)
    naive = dict(out=att @ v, dq=dscore @ k, dk=dscore.swapaxes(2, 3) @ q,
                 dv=att.swapaxes(2, 3) @ dout)
    agree(dict(out=out, dq=dq, dk=dk, dv=dv), naive, 2e-14)


def test_docstrings_have_examples_that_run():
    """At least one for each layer, adamw, sample and learning_rate."""
    assert doctest.testmod(gpt2).failed == 0
    names = {re.sub("train_gpt2.|_(for|back)ward$", "", test.name)
             for test in doctest.DocTestFinder().find(gpt2, "train_gpt2") if test.examples}
    assert {"embedding", "layernorm", "linear", "attention", "gelu", "crossentropy", "adamw",
            "sample", "learning_rate"} <= names


@DTYPES
@pytest.mark.parametrize("M, J, K", [(1, 1, 1), (3, 5, 7), (700, 300, 90), (90, 300, 700),
                                     (1, 999, 20000)])
@pytest.mark.parametrize("transposed", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_matmul_in_blocks_is_one_matmul(M, J, K, transposed, dtype):
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


def test_pool_does_every_item_once_hands_errors_on_and_runs_nested_calls_serially():
    pool, done = gpt2.Pool(4), []
    for n in (0, 1, 2, 50):
        pool(lambda i: done.append((n, i)), range(n))
    assert sorted(done) == [(n, i) for n in (0, 1, 2, 50) for i in range(n)]
    with pytest.raises(ZeroDivisionError):
        pool(lambda i: 1 / (i - 7), range(20))
    done.clear()

    def outer(i):
        own = threading.get_ident()
        pool(lambda j: done.append((i, j, threading.get_ident() == own)), range(3))
    pool(outer, range(4))
    assert sorted(done) == [(i, j, True) for i in range(4) for j in range(3)] and not pool.busy
    meeting = threading.Barrier(4, timeout=20)  # four items that wait for each other
    pool(lambda i: meeting.wait(), range(4))


@pytest.mark.parametrize("n, parts, slices", [(1, 5, 1), (5, 2, 2), (768, 3, 2), (50257, 16, 16),
                                              (10, 0.1, 1), (7, 7, 4), (12, 4.9, 4)])
def test_split_covers_everything_once(n, parts, slices):
    found = gpt2.split(n, parts)
    assert len(found) == slices and all(s.stop > s.start for s in found)
    assert [i for s in found for i in range(n)[s]] == list(range(n))


@pytest.mark.parametrize("shards", [1, 4])
def test_results_are_the_same_bits_on_any_number_of_threads(shards, monkeypatch):
    config = gpt2.GPTConfig(vocab_size=257, n_positions=128, n_embd=128, n_layer=2, n_head=4)
    ids, targets = random_ids(config, 12, 128)
    results = []
    for threads in (1, 2, 3, 8, 2):
        monkeypatch.setattr(gpt2.parallel, "threads", threads)
        model = gpt2.GPT2(config)
        model.n_shards = shards
        for _ in range(2):
            loss = model.forward(ids, targets)
            model.backward()
            norm = model.update(1e-2)
        results.append((loss, norm, model.flat_params.tobytes()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("version, quota, expected", [
    (0, "", 64), (2, "max 100000", 64), (2, "250000 100000", 2), (2, "50000 100000", 1),
    (1, "-1", 64), (1, "300000", 3)])
def test_a_containers_quota_limits_the_processors(version, quota, expected, monkeypatch):
    folder, files = "/sys/fs/cgroup/cpu", {}
    if version:
        files = {[f"{folder}/cpu.cfs_quota_us", f"{folder}.max"][version - 1]: f"{quota}\n",
                 f"{folder}/cpu.cfs_period_us": "100000\n"}
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with monkeypatch.context() as m:
        m.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
        m.setattr(Path, "exists", lambda path, **options: path.as_posix() in files)
        m.setattr(Path, "read_text", lambda path, **options: files[path.as_posix()])
        assert gpt2.usable_cpus() == expected
        m.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's processes on this machine share them
        assert gpt2.usable_cpus() == max(1, expected // 2)


def test_shards_use_the_threads_where_they_pay():
    shape = {name: size for name, size in gpt2.BABY.items() if name.startswith("n_")}
    config = gpt2.GPTConfig(vocab_size=257, **shape)
    found = [gpt2.choose_shards(config, 12, 64, threads) for threads in (1, 2, 8, 64)]
    assert found[:2] == [1, 2] and min(found[2:]) >= 4, "the default run, on several processors"
    assert gpt2.choose_shards(config, 1, 1024, 8) == 1
    assert gpt2.choose_shards(gpt2.GPTConfig(), 4, 64, 8) == 1


def python(*arguments, **environment):
    """Run Python in HERE, without settings for the threads of libraries."""
    kept = {name: x for name, x in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, timeout=120, text=True,
                          capture_output=True, encoding="utf-8", env=kept | environment)


def test_importing_sets_numpys_blas_to_one_thread_and_leaves_the_environment_and_torch_alone():
    ours = "import os; b = dict(os.environ); import train_gpt2; assert b == dict(os.environ); "
    torchs = "import torch; print(torch.get_num_threads())"
    assert python("-c", ours, OPENBLAS_NUM_THREADS="2").returncode == 0
    with_ours, alone = python("-c", ours + torchs), python("-c", torchs)
    assert with_ours.stdout == alone.stdout != "", with_ours.stderr
    pytest.importorskip("threadpoolctl")
    blas = python("-c", ours + "from threadpoolctl import threadpool_info; print("
                  "[x['num_threads'] for x in threadpool_info() if x['user_api'] == 'blas'])")
    assert blas.stdout.strip() in ("[1]", "[]"), blas  # []: one that threadpoolctl does not know


def test_numpy_imported_first_gets_one_line_on_stderr():
    found = python("-c", "import numpy, train_gpt2").stderr
    assert re.fullmatch(".*(BLAS.*numpy|numpy.*BLAS).*\n", found), found
    assert python("-c", "import train_gpt2, numpy").stderr == ""


def test_numpy_1_gets_one_line_that_says_what_to_install(tmp_path):
    Path(tmp_path, "numpy").mkdir()
    Path(tmp_path, "numpy", "__init__.py").write_text("__version__ = '1.26.4'\n")
    path = os.pathsep.join([str(tmp_path), str(HERE)])
    script = python(HERE / "train_gpt2.py", "--steps", "1", PYTHONPATH=path)
    assert script.returncode == 2 and len(script.stderr.splitlines()) == 1, script
    imported = python("-c", "import train_gpt2", PYTHONPATH=path)
    assert imported.returncode == 1 and "ImportError" in imported.stderr.splitlines()[-1], imported
    for found in script, imported:
        assert "numpy>=2" in found.stderr and "1.26.4" in found.stderr, found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_train_after_its_parent_has():
    found = python("-c", """if True:
        import os, signal, train_gpt2 as gpt2
        gpt2.parallel.threads = 4
        model = gpt2.GPT2(gpt2.GPTConfig(257, 64, 128, 1, 4))
        model.n_shards = 4
        for step in range(2):
            loss = model.forward([[1] * 64] * 8, [[2] * 64] * 8)
            model.backward()
            model.update(1e-3)
            child = child if step else os.fork()
            signal.alarm(20)  # ends a child that hangs
        assert child == 0 or os.waitpid(child, 0)[1] == 0, "the child failed"
        """)
    assert found.returncode == 0, found.stderr


CONFIGS = {  # config, B, T, shards
    "small": (SMALL, 2, 5, 1),
    "one token": (SMALL, 3, 1, 1),
    "full context, 11 blocks, one head": (gpt2.GPTConfig(57, 64, 32, 11, 1), 3, 64, 2),
    "several blocks of queries": (gpt2.GPTConfig(61, 200, 24, 2, 2), 2, 150, 1),
    "several blocks of rows": (gpt2.GPTConfig(1031, 64, 128, 1, 4), 12, 64, 1),
    "several shards": (gpt2.GPTConfig(31, 128, 36, 2, 3), 11, 128, 4)}


@DTYPES
@pytest.mark.parametrize("case", CONFIGS)
def test_model_matches_torch(case, dtype):
    """Measured: 3e-15 in float64 and 1.4e-6 in float32."""
    config, B, T, shards = CONFIGS[case]
    model = perturbed(config, dtype)
    model.n_shards = shards
    gradients_agree(model, *random_ids(config, B, T), 3e-14 if dtype == np.float64 else 2e-5)
    assert len(model.shards) == shards


def test_a_large_model_that_recomputes_has_the_same_bits_as_one_that_keeps(monkeypatch):
    model, ids_and_targets = perturbed(SMALL), random_ids(SMALL, 2, 5)
    our_results(model, *ids_and_targets)
    gradients, kept = model.flat_grads.copy(), gpt2.count(gpt2.activation_table(SMALL, 2, 5))
    monkeypatch.setattr(gpt2, "MAX_KEPT", 0)
    model = perturbed(SMALL)
    assert gpt2.count(gpt2.activation_table(SMALL, 2, 5)) == kept - 2 * 5 * (6 * 12 + 4)
    agree(our_results(model, *ids_and_targets), torch_results(model, *ids_and_targets), 3e-14)
    assert (model.flat_grads == gradients).all()


def test_shapes_and_shards_may_change_from_call_to_call():
    model = perturbed(SMALL)
    for B, T, model.n_shards in [(2, 5, 1), (4, 8, 4), (4, 8, 1), (1, 1, 4), (4, 3, 2), (4, 5, 2)]:
        gradients_agree(model, *random_ids(SMALL, B, T, seed=B * T), 2e-14)
        assert len(model.shards) == min(B, model.n_shards)


def test_a_batch_in_shards_has_the_gradient_of_its_sequences_and_backward_adds():
    """Every sequence by itself, with another dloss, twice. Measured: 1e-15."""
    config, B, T, shards = CONFIGS["several shards"]
    whole, single = perturbed(config), perturbed(config)
    whole.n_shards, losses = shards, []
    ids, targets = random_ids(config, B, T)
    for _ in range(2):
        loss = whole.forward(ids, targets)
        logits = whole.logits()
        whole.backward()
    for b in range(B):
        losses.append(single.forward(ids[b:b + 1], targets[b:b + 1]))
        agree({"logits": logits[b]}, {"logits": single.logits()[0]}, 1e-14)
        single.backward(2 / B)
    assert abs(np.mean(losses) - loss) < 1e-13
    agree(whole.grads, single.grads, 1e-14)


def test_logits_and_losses_without_a_backward_pass_are_the_same_and_stay():
    """What forward(ids) returns is not overwritten by later calls."""
    model, (ids, targets) = perturbed(SMALL), random_ids(SMALL, 2, 5)
    first = model.forward(ids)
    kept, second, loss = first.copy(), model.forward(targets), model.forward(ids, targets)
    third = model.logits()
    model.backward()
    assert (first == kept).all() and (third == first).all() and (second != first).any()
    assert model.forward(ids, targets, for_backward=False) == loss


def test_backward_needs_a_forward_with_targets_each_time():
    model, (ids, targets) = gpt2.GPT2(SMALL), random_ids(SMALL, 2, 5)
    for between in (lambda: None, lambda: model.forward(ids), lambda: gpt2.generate(model, ids, 1),
                    lambda: model.forward(ids, targets, for_backward=False), model.backward):
        between()
        model.flat_grads[:] = 0
        with pytest.raises(gpt2.UserError, match="forward"):
            model.backward()
        assert not model.flat_grads.any()
        model.forward(ids, targets)


def test_initialisation_is_gpt2s():
    """Standard deviations within 3%: the smallest matrix has 16,384 numbers, 3% is over 5 sigma."""
    config = gpt2.GPTConfig(vocab_size=257, n_positions=128, n_embd=128, n_layer=3, n_head=4)
    model = gpt2.GPT2(config, seed=5)
    for name, x in model.params.items():
        if x.ndim == 1:
            assert (x == name.endswith("weight")).all()
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(x.std() / std - 1) < 0.03 and abs(x.mean()) < std / 20, name
    assert (gpt2.GPT2(config, seed=5).flat_params == model.flat_params).all()
    assert (gpt2.GPT2(config, seed=6).flat_params != model.flat_params).any()


@pytest.mark.parametrize("model, count", [("gpt2", 124439808), ("gpt2-medium", 354823168),
                                          ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)])
def test_parameter_counts_are_openais(model, count):
    shape = {k: v for k, v in gpt2.MODELS[model].items() if k.startswith("n_")}
    assert gpt2.count(gpt2.parameter_table(gpt2.GPTConfig(**shape))) == count


@pytest.mark.parametrize("ids, targets, message", [
    ([1, 2], None, r"ids must be .* \(2,\)"), ([[]], None, "shape"), ([[1.5]], None, "float64"),
    ([[17]], None, r"ids are in 17\.\.17, .* 17 tokens"), ([[3, -1]], None, r"-1\.\.3"),
    ([[0] * 9], None, "T=9, more than n_positions=8"), ([[1, 2]], [[1]], r"targets .*\(1, 1\)"),
    ([[1]], [[17]], "targets are in 17"), ([[1]], [[0.5]], "targets must be")])
def test_ids_that_do_not_fit_raise_a_value_error(ids, targets, message):
    with pytest.raises(gpt2.UserError, match=message) as found:
        gpt2.GPT2(SMALL).forward(ids, targets)
    assert isinstance(found.value, ValueError)


def test_configs_that_make_no_network_raise_a_value_error():
    for change, message in (("n_head", 5), "n_head 5"), (("n_layer", 0), "n_layer is 0"):
        with pytest.raises(gpt2.UserError, match=message):
            gpt2.GPTConfig(**dict([change]))


@pytest.mark.parametrize("decay, clip", [(0.1, 1.0), (0.0, 0.0), (0.5, 0.3)])
def test_adamw_matches_torch(decay, clip):
    """Ten steps at a high learning rate, where errors add up. Measured: 6e-16."""
    model = perturbed(gpt2.GPTConfig(257, 64, 64, 2, 4))
    tensors = {name: torch.tensor(x) for name, x in model.params.items()}
    groups = [{"params": [x for x in tensors.values() if x.ndim == n], "weight_decay": d}
              for n, d in ((1, 0.0), (2, decay))]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.97), eps=1e-3)
    rng = np.random.default_rng(0)
    for step in range(10):
        model.flat_grads[:] = rng.standard_normal(model.flat_grads.size) * 10.0 ** (step % 3 - 2)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(model.grads[name])
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), clip or math.inf)
        adamw.step()
        ours = model.update(0.05, 0.8, 0.97, 1e-3, decay, clip)
        assert ours == pytest.approx(float(norm), rel=1e-12)
        assert not model.flat_grads.any() and model.step == step + 1
    agree(model.params, tensors, 1e-14)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = gpt2.GPT2(SMALL)
    before = model.flat_params.copy()
    model.grads["ln_f.bias"][3] = np.nan
    assert math.isnan(model.update(0.1))
    assert (model.flat_params == before).all() and not model.flat_m.any() and model.step == 0


def test_ten_steps_of_training_follow_torch():
    """The benchmark's two functions, in float32, with update()'s defaults. Measured: 1e-6."""
    config = gpt2.GPTConfig(257, 64, 64, 4, 4)
    model, ids = gpt2.GPT2(config), random_ids(config, 4, 64)
    steps = torch_trainer(model, compiled=False), our_trainer(model)
    theirs, ours = np.array([[step(*ids) for _ in range(10)] for step in steps])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours[-1] < ours[0] - 0.3


def test_learning_rate_at_its_corners():
    """The docstring's example has the rest."""
    assert gpt2.learning_rate(1, 10, 0, 1e-3, 1e-4) < 1e-3, "without a warm-up"
    assert gpt2.learning_rate(5, 5, 5, 1e-3, 1e-4) == 1e-3, "a warm-up as long as the run"
    assert gpt2.learning_rate(5, 5, 100, 1e-3, 1e-4) == pytest.approx(5e-5), "a longer one"


def test_greedy_generation_takes_the_likeliest_token():
    model, columns, ids = perturbed(SMALL), [], np.array([[3, 1], [4, 1]])
    out = gpt2.generate(model, ids, 6, temperature=0, on_token=columns.append)
    assert out.shape == (2, 8) and (out[:, :2] == ids).all()
    assert (np.stack(columns, axis=1) == out[:, 2:]).all()
    assert (out[:, 2:] == model.forward(out)[:, 1:-1].argmax(axis=-1)).all()
    assert (gpt2.generate(model, ids, 0) == ids).all()


@pytest.mark.parametrize("context, prompt, expected", [
    (8, 2, [2, *6 * [1], 6, 1, 1, 6, 1, 1, 6, 1]), (8, 20, [8, 6, 1, 1, 6]), (1, 3, [1, 1, 1]),
    (150, 60, [60] + 90 * [1])])
def test_cached_logits_are_uncached_logits_while_the_window_moves_by_a_quarter(
        context, prompt, expected, monkeypatch):
    """`expected` is how many tokens pass through the network for each new one. Measured: 1e-15."""
    config, seen, logits = gpt2.GPTConfig(17, context, 12, 2, 3), [], []
    model, embed, sample = perturbed(config), gpt2.embedding_forward, gpt2.sample
    monkeypatch.setattr(gpt2, "embedding_forward",
                        lambda out, ids, *rest: seen.append(ids.shape[1]) or embed(out, ids, *rest))
    monkeypatch.setattr(gpt2, "sample", lambda x, *rest: logits.append(x) or sample(x, *rest))
    rng, n = np.random.default_rng(0), len(expected)
    out = gpt2.generate(model, random_ids(config, 3, prompt)[0], n, rng=rng)
    assert seen == expected and out.shape == (3, prompt + n)
    model.n_shards, window = 2, 0  # in shards, the text is the same; with another seed it is not
    again, other = (gpt2.generate(model, out[:, :prompt], n, rng=np.random.default_rng(seed))
                    for seed in (0, 1))
    assert (again == out).all() and (other != out).any()
    for i, new in enumerate(expected):
        window = window + 1 if new == 1 < context else new
        uncached = model.forward(out[:, prompt + i - window:prompt + i])[:, -1]
        agree({"logits": logits[i]}, {"logits": uncached}, 2e-14)


P = np.array([0.4, 0.05, 0.3, 0.05, 0.2])
LIKELIEST, TWO, THREE = [1, 0, 0, 0, 0], [4 / 7, 0, 3 / 7, 0, 0], [4 / 9, 0, 3 / 9, 0, 2 / 9]


@pytest.mark.parametrize("options, expected", [
    (dict(), P), (dict(temperature=0.5), P**2 / sum(P**2)), (dict(temperature=0), LIKELIEST),
    (dict(temperature=1e-320), LIKELIEST), (dict(top_k=1), LIKELIEST), (dict(top_k=2), TWO),
    (dict(top_k=3), THREE), (dict(top_k=99), P), (dict(top_p=0.0), LIKELIEST),
    (dict(top_p=0.65), TWO), (dict(top_p=0.75), THREE), (dict(top_p=1.0), P),
    (dict(top_k=3, top_p=0.7), TWO)])  # of the three, 4/9 + 3/9 reach 0.7
def test_samples_come_as_often_as_their_probabilities_say(options, expected):
    """In 40,000 draws, within 5 sigma; what is left out never. Every other row is reversed."""
    options = dict(temperature=1.0, top_k=None, top_p=None) | options
    rows = np.tile([np.log(P) + 1000, np.log(P[::-1])], (20000, 1))
    drawn = gpt2.sample(rows, rng=np.random.default_rng(0), **options)
    drawn[1::2] = 4 - drawn[1::2]
    counts, expected = np.bincount(drawn, minlength=5), np.array(expected)
    limit = 5 * np.sqrt(expected * (1 - expected) / 40000) + 1e-12
    assert (np.abs(counts / 40000 - expected) <= limit).all()


def real_text():
    """Tinyshakespeare from data/; tests do not download it."""
    path = HERE / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("data/tinyshakespeare.txt is missing; prepro_tinyshakespeare.py downloads it")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def tokenizer(request, monkeypatch):
    """A tokenizer; GPT-2's if tiktoken and its merges are here, as tests do not download them."""
    if request.param == "gpt2":
        pytest.importorskip("tiktoken")
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", HERE / "data" / "tiktoken")
        if not Path(folder).is_dir():
            pytest.skip("GPT-2's merges are neither in TIKTOKEN_CACHE_DIR nor in data/tiktoken")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return gpt2.Tokenizer(request.param)


BOTH = pytest.mark.parametrize("tokenizer", ["byte", "gpt2"], indirect=True)
TEXT = "First Citizen:\nnaïve café, 日本語 🙂.\n\n<|endoftext|>All:\n  Speak!\r\n" + "".join(
    map(chr, range(256))) + "\u07ff\u0800\uffff\U00010000\U0010ffff"  # every byte of UTF-8


@BOTH
def test_tokens_decode_to_the_text_they_came_from(tokenizer):
    for text in (TEXT, "", "a", "<|endoftext|>", "<|endoftext|><|endoftext|>b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert ids.count(tokenizer.eot_token) == text.count("<|endoftext|>")
    assert tokenizer.n_vocab == tokenizer.eot_token + 1
    assert tokenizer.token_bytes(tokenizer.n_vocab) == b""
    assert tokenizer.decode([*tokenizer.encode("é"), tokenizer.n_vocab + 5]) == "é"
    expected = {"byte": [*b"Hello world", 256], "gpt2": [15496, 995, 50256]}
    assert tokenizer.encode("Hello world<|endoftext|>") == expected[tokenizer.name]


@BOTH
def test_token_counts_of_the_real_text(tokenizer):
    """Bytes as for nanoGPT's shakespeare_char; GPT-2's tokens as in llm.c."""
    train, val = prepro.tokenize(real_text(), tokenizer)
    counts = {"byte": (1003854, 111540), "gpt2": (305260, 32768)}
    assert (len(train), len(val)) == counts[tokenizer.name]
    if tokenizer.name == "gpt2":
        assert val[0] == tokenizer.eot_token and tokenizer.decode(val[1:5]) == "First Citizen:\n"


def test_gpt2_sections_are_split_as_in_llm_c():
    letters = gpt2.Tokenizer("byte")
    letters.name, letters.eot_token = "letters", 0
    train, val = prepro.tokenize("a\n\nb\n\n\n\nc" * 20, letters)
    ids = val + train
    assert ids[:11] == [0, *b"a\n\n", 0, *b"b\n\n", 0, *b"\n\n"] and ids[-2:] == [0, *b"c"]
    assert len(val) == len(ids) // 10


def write(path, header=(20240520, 1, 20), tokens=range(20), extra=b""):
    """A token file made by hand, right or wrong."""
    ints = np.zeros(256, "<i4")
    ints[:3] = header
    path.write_bytes(ints.tobytes() + np.array(tokens, "<u2").tobytes() + extra)
    return path


def test_token_files_have_llm_cs_format_byte_for_byte(tmp_path):
    gpt2.write_tokens(tmp_path / "a.bin", np.array([1, 2, 50256]))
    assert (tmp_path / "a.bin").read_bytes() == (
        b"\x88\xd8\x34\x01\1\0\0\0\3\0\0\0" + bytes(253 * 4) + b"\1\0\2\0\x50\xc4")
    assert list(gpt2.map_tokens(tmp_path / "a.bin")) == [1, 2, 50256]
    for wrong in [-1, 5], [65536]:
        with pytest.raises(gpt2.UserError, match=r"a.bin: ids must be in 0..65535"):
            gpt2.write_tokens(tmp_path / "a.bin", wrong)


@pytest.mark.parametrize("how, message", [
    (dict(header=(1234, 1, 20)), "not a token file of version 1"),
    (dict(header=(20240520, 2, 20)), "not a token file of version 1"),
    (dict(header=(20240520, 1, 21)), "says 21 tokens, it holds 20"),
    (dict(header=(20240520, 1, 19)), "says 19 tokens, it holds 20"),
    (dict(header=(20240520, 1, -1)), "says -1 tokens"),
    (dict(extra=b"x"), "it holds 20.5"),
    (dict(header=(20240520, 1, 1), tokens=[1]), "says 1 tokens")])
def test_wrong_token_files_are_errors(tmp_path, how, message):
    with pytest.raises(gpt2.UserError, match=f"t.bin: .*{message}.*; make it again"):
        gpt2.Tokens(write(tmp_path / "t.bin", **how), 257)


def test_ids_outside_the_vocabulary_are_errors_when_they_are_read(tmp_path):
    tokens = gpt2.Tokens(write(tmp_path / "t.bin", tokens=[*range(19), 257]), 257)
    for read in (lambda: list(tokens.all_batches(2, 4, 99)),
                 lambda: tokens.batch(np.random.default_rng(0), 400, 4)):
        with pytest.raises(gpt2.UserError, match="t.bin: id 257 is outside the vocabulary of 257"):
            read()
    with pytest.raises(gpt2.UserError, match="no 21 tokens in a row; lower --seq_len 20"):
        tokens.batch(np.random.default_rng(0), 4, 20)
    list(gpt2.Tokens(tmp_path / "t.bin", 258).all_batches(2, 4, 99))


def test_batches_are_windows_of_all_files_and_targets_are_one_later(tmp_path):
    write(tmp_path / "t0.bin", (20240520, 1, 12), range(12))
    write(tmp_path / "t1.bin", (20240520, 1, 3), range(100, 103))  # too short for 5 + 1 tokens
    write(tmp_path / "t2.bin", (20240520, 1, 8), range(200, 208))
    tokens, starts = gpt2.Tokens(tmp_path / "t*.bin", 257), []
    assert len(tokens) == 23
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(200):
        ids, targets = tokens.batch(rng, 3, 5)
        assert ids.shape == targets.shape == (3, 5)
        assert (np.diff(ids, axis=1) == 1).all() and (targets == ids + 1).all()
        assert (tokens.batch(again, 3, 5)[0] == ids).all()
        starts.extend(ids[:, 0])
    counts = np.bincount(starts, minlength=208)
    assert set(np.flatnonzero(counts)) == {*range(7), 200, 201, 202}  # all windows of 5 + 1 tokens
    assert counts[counts > 0].min() > 30, "600 draws from ten places"


@pytest.mark.parametrize("limit", [1, 18, 19, 20, 27, 99])
@pytest.mark.parametrize("B, T", [(1, 1), (2, 3), (3, 5), (5, 19), (7, 50)])
def test_validation_predicts_every_token_once_up_to_the_limit(tmp_path, B, T, limit):
    write(tmp_path / "t0.bin")
    write(tmp_path / "t1.bin", (20240520, 1, 9), range(100, 109))
    seen = []
    for ids, targets in gpt2.Tokens(tmp_path / "t*.bin", 257).all_batches(B, T, limit):
        assert ids.shape == targets.shape and ids.shape[0] <= B and ids.shape[1] <= T
        assert (targets == ids + 1).all()
        seen.extend(targets.ravel())
    assert seen == [*range(1, 20), *range(101, 109)][:limit]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "f"
    assert gpt2.write_file(path, b"old", b"er") == zlib.crc32(b"older")
    with pytest.raises(TypeError):
        gpt2.write_file(path, b"new", None)
    assert path.read_bytes() == b"older" and os.listdir(path.parent) == ["f"]


def words(*arguments):
    """A command line from words, numbers, and strings of several words."""
    return " ".join(map(str, arguments)).split()


FILES = "--train_bin train.bin --val_bin val.bin"
TINY = (f"{FILES} --n_layer 1 --n_embd 16 --n_head 2 --n_positions 16 --batch_size 6 --warmup 5 "
        "--max_new_tokens 30 --log_every 1 --eval_every 10 --sample_every 15")
TINY_CONFIG = gpt2.GPTConfig(257, 16, 16, 1, 2)


def make_tokens(folder):
    """Token files train.bin and val.bin of random letters."""
    rng = np.random.default_rng(3)
    for name, n in ("train", 3000), ("val", 200):
        gpt2.write_tokens(folder / f"{name}.bin", rng.integers(65, 91, size=n))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The program in this process, in a folder with token files; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    make_tokens(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words(*arguments)])
        try:
            gpt2.run_program(gpt2.main)
        except SystemExit as done:
            return done.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0
    return program


def run(program, *arguments, cwd, timeout=120, **options):
    """One of the programs as a process without a network: every proxy is a closed port."""
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(Path(cwd) / "no_tiktoken")}
    env |= {f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https", "HTTP", "HTTPS")}
    env = {name: value for name, value in env.items() if not name.startswith("PYTHON")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, HERE / program, *words(*arguments)], cwd=cwd, env=env,
                          text=True, encoding="utf-8", timeout=timeout, **options)


def start(*arguments, cwd):
    """train_gpt2.py, started in a process of its own."""
    return subprocess.Popen([sys.executable, HERE / "train_gpt2.py", *words(*arguments)], cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8")


def rows(out):
    """The rows of a run's log."""
    with open(Path(out) / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def samples(text):
    """The texts between two rules of 80 dashes."""
    return re.findall("-{80}\n(.*?)\n-{80}", text, re.S)


def test_a_step_has_the_loss_and_the_gradient_of_all_its_micro_batches(tmp_path):
    args = types.SimpleNamespace(grad_accum=3, batch_size=2, seq_len=4, beta1=0.8, beta2=0.9,
                                 weight_decay=0.3, grad_clip=0.05)
    tokens = gpt2.Tokens(write(tmp_path / "t.bin"), 32)
    model, whole = (perturbed(gpt2.GPTConfig(32, 4, 12, 1, 3)) for _ in range(2))
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(2):
        loss, norm, stop = gpt2.train_step(model, tokens, rng, 0.1, args, gpt2.Processes(), stop=5)
        batches = [tokens.batch(again, 2, 4) for _ in range(3)]
        ids, targets = (np.concatenate(x) for x in zip(*batches))
        assert loss == pytest.approx(whole.forward(ids, targets), abs=1e-13) and stop == 5
        whole.backward()
        assert norm == pytest.approx(np.linalg.norm(whole.flat_grads), rel=1e-12)
        whole.update(0.1, 0.8, 0.9, 1e-8, 0.3, 0.05)
        agree(model.params, whole.params, 1e-9)
    assert model.step == 2


def test_validation_loss_is_the_mean_over_the_first_eval_tokens(tmp_path, monkeypatch):
    """A forward takes as many tokens as training's memory allows, at least 1,024."""
    config, sizes = gpt2.GPTConfig(32, 4, 12, 1, 3), []
    model, ids = perturbed(config), np.random.default_rng(1).integers(32, size=9002)
    forward, tokens = model.forward, gpt2.Tokens(
        write(tmp_path / "t.bin", (20240520, 1, 9002), ids), 32)
    monkeypatch.setattr(model, "forward", lambda ids, *rest, **options: (
        sizes.append(ids.size), forward(ids, *rest, **options))[1])
    for batch_size, eval_tokens, n in (1, 7, 7), (1, 3001, 3001), (1000, 0, 9001):
        sizes.clear()
        args = types.SimpleNamespace(seq_len=4, batch_size=batch_size, eval_tokens=eval_tokens)
        loss, (first, *_) = gpt2.evaluate(model, tokens, args), sizes
        each = [forward(ids[None, i:min(i + 4, n)], ids[None, i + 1:min(i + 4, n) + 1])
                * min(4, n - i) for i in range(0, n, 4)]
        assert loss == pytest.approx(sum(each) / n, abs=1e-12) and sum(sizes) == n
        used, room = (gpt2.count(gpt2.activation_table(config, B, 4, how))
                      for B, how in ((first // 4, False), (batch_size, True)))
        assert n < 1024 or first == 1024 or first > 4000 and used <= room


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_stdout_needs_no_reconfigure(
        train, monkeypatch, terminal):
    out, err = [], []
    for name, said in ("stdout", out), ("stderr", err):
        monkeypatch.setattr(sys, name, types.SimpleNamespace(
            write=said.append, flush=lambda: None, isatty=lambda: terminal))
    assert train(TINY, "--steps 1 --max_new_tokens 0") == 0 and "step 1/1 | loss" in "".join(out)
    err = "".join(err)
    assert ("\rvalidation: 199 of 199 tokens" in err) == bool(err) == terminal and "\n" not in err


def test_the_log_has_the_loss_before_each_step_and_the_validation_loss_after_it(train, capsys):
    options = "--steps 4 --grad_accum 2 --eval_every 2 --log_every 3 --lr 0.01 --seed 5"
    assert train(TINY, options) == 0
    said, log = capsys.readouterr().out, rows("out")
    assert list(log[0]) == "step loss val_loss norm lr ms tokens_per_second".split()
    assert [row["step"] for row in log] == ["1", "2", "3", "4"]
    assert [row["step"] for row in log if row["val_loss"]] == ["2", "4"]
    assert [row["step"] for row in log if row["loss"]] == ["1", "3", "4"]
    model, rng = gpt2.GPT2(TINY_CONFIG, seed=5), np.random.default_rng([5, 1])
    train_tokens, val_tokens = (gpt2.Tokens(f"{name}.bin", 257) for name in ("train", "val"))
    for row in log:
        loss = 0
        for _ in range(2):
            loss += model.forward(*train_tokens.batch(rng, 6, 16)) / 2
            model.backward(0.5)
        lr = gpt2.learning_rate(int(row["step"]), 4, 5, 0.01, 1e-4)
        norm = model.update(lr, 0.9, 0.99)
        if row["loss"]:
            assert [float(row[name]) for name in ("loss", "norm", "lr")] == pytest.approx(
                [loss, norm, lr], rel=1e-5)
            assert f"{row['step']}/4 | loss {loss:.4f} | norm {norm:.2f} | lr {lr:.2e} |" in said
        if row["val_loss"]:
            pairs = [*val_tokens.all_batches(1, 16, 199)]
            val = sum(model.forward(ids, targets) * ids.size for ids, targets in pairs) / 199
            assert float(row["val_loss"]) == pytest.approx(val, abs=2e-6)
            assert f"step {row['step']} | val loss {val:.4f}\n" in said


@pytest.mark.parametrize("scale", [1e-4, 100])
def test_the_printed_time_and_throughput_are_the_clocks(train, monkeypatch, capsys, scale):
    """Steps of 1, 5, 9, 13 units of time; a line has the mean since the line before."""
    clock = (scale * i * i for i in range(100))
    monkeypatch.setattr(gpt2, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    assert train(TINY, "--steps 4 --log_every 2 --batch_size 60") == 0
    said, log = capsys.readouterr().out, rows("out")
    tokens, P = 60 * 16, gpt2.count(gpt2.parameter_table(TINY_CONFIG))
    flops = tokens * (6 * P + 12 * 1 * 16 * (16 / 2))
    for row, step, units in zip(log, (1, 2, 4), (1, 5, 11)):
        seconds = units * scale
        left = time.strftime("%H:%M:%S", time.gmtime(round(seconds * (4 - step))))
        assert float(row["ms"]) == pytest.approx(1000 * seconds)
        assert int(row["tokens_per_second"]) == round(tokens / seconds)
        assert (f"| {1e3 * seconds:3.0f} ms | {tokens / seconds:5.0f} tok/s | "
                f"{flops / seconds / 1e9:3.0f} GFLOP/s | {left.removeprefix('0')} left\n") in said


def saved_model(folder, config=SMALL, dtype=np.float32):
    """A perturbed model, saved in a folder."""
    model = perturbed(config, dtype)
    model.save_pretrained(folder)
    return model


def tensors_of(path):
    """A safetensors file read by its description alone: ({name: entry}, the numbers' bytes)."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + length]), data[8 + length:]


def write_raw(path, entries):
    """Write {name: (dtype, shape, bytes)} as a safetensors file."""
    index, end = {}, 0
    for name, (dtype, shape, raw) in entries.items():
        index[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    header, numbers = json.dumps(index).encode(), b"".join(raw for *_, raw in entries.values())
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + numbers)


def entries_of(model):
    """The entries of write_raw for a model, without the prefix `transformer.`."""
    return {name: ("F32", x.shape, x.tobytes()) for name, x in model.params.items()}


@DTYPES
def test_what_is_saved_is_what_is_loaded_bit_for_bit(tmp_path, dtype):
    model = saved_model(tmp_path, dtype=dtype)
    again = gpt2.GPT2.from_pretrained(tmp_path, dtype)
    assert again.config == SMALL and again.flat_params.tobytes() == model.flat_params.tobytes()
    index, numbers = tensors_of(tmp_path / "model.safetensors")
    assert index.pop("__metadata__") == {"format": "pt"}
    assert {*index} == {f"transformer.{name}" for name in model.params}
    assert ((tmp_path / "model.safetensors").stat().st_size - len(numbers)) % 8 == 0


def test_files_in_the_wild_are_read(tmp_path):
    """No prefix, a stored lm_head, old causal masks, and half precision."""
    model = saved_model(tmp_path)
    path, wte, flat = tmp_path / "model.safetensors", model.params["wte.weight"], model.flat_params
    others = {"h.0.attn.bias": ("BOOL", (1, 1, 8, 8), bytes(64)),
              "h.1.attn.masked_bias": ("F32", (), bytes(4)),
              "lm_head.weight": ("F32", wte.shape, wte.tobytes())}
    write_raw(path, others | entries_of(model))
    assert (gpt2.GPT2.from_pretrained(tmp_path).flat_params == flat).all()
    for dtype, convert, expected in [
            ("F16", lambda x: x.astype("<f2"), flat.astype(np.float16)),
            ("BF16", lambda x: (x.view(np.uint32) >> 16).astype("<u2"),
             (flat.view(np.uint32) & 0xFFFF0000).view(np.float32))]:
        write_raw(path, {n: (dtype, x.shape, convert(x).tobytes())
                         for n, x in model.params.items()})
        assert (gpt2.GPT2.from_pretrained(tmp_path).flat_params == expected).all()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_inner": None, "other": 1}))
    assert gpt2.read_config(tmp_path) == SMALL


@pytest.mark.parametrize("name, entry, message", [
    ("h.1.mlp.c_fc.bias", None, "h.1.mlp.c_fc.bias is missing"),
    ("extra", ("F32", (1,), bytes(4)), "extra is unknown"),
    ("ln_f.bias", ("F32", (6, 2), bytes(48)), r"ln_f.bias is F32 \(6, 2\)"),
    ("ln_f.bias", ("I8", (12,), bytes(12)), "ln_f.bias is I8"),
    ("ln_f.bias", ("F31", (48,), bytes(48)), "ln_f.bias is F31"),
    ("ln_f.bias", ("F32", (17,), bytes(48)), "ln_f.bias cannot be F32 .17. at"),
    ("ln_f.bias", ("F32", (-16,), bytes(48)), "ln_f.bias cannot be F32 .-16. at"),
    ("ln_f.bias", ("F32", (12.0,), bytes(48)), "ln_f.bias cannot be F32"),
    ("transformer.ln_f.bias", ("F32", (12,), bytes(48)), "occurs with and without"),
    ("lm_head.weight", ("F32", (17, 12), bytes(17 * 48)), "lm_head.weight differs from wte")])
def test_weights_that_do_not_fit_are_errors_by_name(tmp_path, name, entry, message):
    entries = entries_of(saved_model(tmp_path)) | {name: entry}
    if entry is None:
        del entries[name]
    write_raw(tmp_path / "model.safetensors", entries)
    with pytest.raises(gpt2.UserError, match=f"model.safetensors: .*{message}"):
        gpt2.GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, value", [
    ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("n_inner", 100),
    ("scale_attn_weights", False), ("add_cross_attention", True), ("tie_word_embeddings", False),
    ("layer_norm_epsilon", 1e-6), ("model_type", "llama"), ("n_embd", "12"), ("n_layer", None),
    ("n_head", 0), ("vocab_size", 1.5), ("n_positions", True)])
def test_configs_of_something_else_are_errors_by_name(tmp_path, name, value):
    saved_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(gpt2.UserError, match=f"config.json: {name} is {value!r}"):
        gpt2.GPT2.from_pretrained(tmp_path)


def mutated(data, rng):
    """The bytes with something wrong: flipped, cut, longer, or a digit of the header changed."""
    at = int(rng.integers(min(len(data), 3000) if rng.random() < 0.7 else len(data)))
    digits = [i for i in range(3000) if chr(data[i]).isdigit()]
    digit = digits[at % len(digits)]
    return [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:], data[:at],
            data[:at] + rng.bytes(4) + data[at:], data[:at] + rng.bytes(4) + data[at + 4:],
            data[:digit] + b"%d" % rng.integers(10) + data[digit + 1:]][rng.integers(5)]


def test_mutated_weight_files_are_errors_or_load_to_what_they_hold(tmp_path):
    saved_model(tmp_path)
    path, rng, loaded = tmp_path / "model.safetensors", np.random.default_rng(7), 0
    original = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(mutated(original, rng))
        try:
            with np.errstate(all="ignore"):
                model = gpt2.GPT2.from_pretrained(tmp_path)
        except gpt2.UserError as error:
            assert "model.safetensors" in str(error) and "\n" not in str(error)
            continue
        loaded += 1
        index, numbers = tensors_of(path)
        for name, x in model.params.items():
            entry = index.get(f"transformer.{name}") or index[name]
            if entry["dtype"] == "F32":
                assert x.tobytes() == numbers[slice(*entry["data_offsets"])], name
    assert 50 < loaded < 750


def test_transformers_computes_what_our_model_computes(tmp_path):
    """Logits, every gradient and greedy generation, in float64. Measured: 3e-15."""
    transformers = pytest.importorskip("transformers")
    model, (ids, targets) = saved_model(tmp_path, dtype=np.float64), random_ids(SMALL, 3, 8)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    logits = theirs(torch.tensor(ids)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    ours = {"loss": np.array(model.forward(ids, targets)), "logits": model.logits()}
    model.backward()
    grads = {name.removeprefix("transformer."): x.grad for name, x in theirs.named_parameters()}
    agree(ours | model.grads, {"loss": loss, "logits": logits} | grads, 1e-13)
    greedy = theirs.generate(torch.tensor(ids[:, :2]), max_new_tokens=6, do_sample=False,
                             eos_token_id=None, pad_token_id=0)
    assert (gpt2.generate(model, ids[:, :2], 6, temperature=0) == greedy.numpy()).all()


@BOTH
def test_a_checkpoint_opens_in_transformers_with_its_tokenizer(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    model = gpt2.GPT2(gpt2.GPTConfig(tokenizer.n_vocab, 16, 8, 1, 2))
    folder = gpt2.save_checkpoint(tmp_path, model, gpt2.tokenizer_files(tokenizer, 16), {})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [TEXT, "", " a", "It's  1234", *TEXT.split()]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    assert theirs.model_max_length == 16 and theirs.eos_token_id == tokenizer.eot_token
    pipe = transformers.pipeline("text-generation", str(folder))
    said = pipe("ROMEO:", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ours = gpt2.generate(model, [tokenizer.encode("ROMEO:")], 4, temperature=0)[0]
    assert said == tokenizer.decode(ours)


@BOTH
def test_tokenizer_files_have_the_content_of_gpt2s(tokenizer):
    """The merges of GPT-2 are compared with the SHA-256 of OpenAI's vocab.bpe."""
    files = gpt2.tokenizer_files(tokenizer, 99)
    vocab, config = (json.loads(files[name]) for name in ("vocab.json", "tokenizer_config.json"))
    assert sorted(vocab.values()) == [*range(tokenizer.n_vocab)]
    assert vocab["<|endoftext|>"] == tokenizer.eot_token
    assert config["tokenizer_class"] == "GPT2Tokenizer" and config["model_max_length"] == 99
    if tokenizer.name == "byte":
        assert [vocab[x] for x in "A~¡ÿĀĠĊŃ"] == [65, 126, 161, 255, 0, 32, 10, 173]
        assert files["merges.txt"] == b"#version: 0.2\n"
    else:
        assert (vocab["!"], vocab["Ġthe"], vocab["Ċ"]) == (0, 262, 198)
        assert hashlib.sha256(files["merges.txt"]).hexdigest() == (
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")


def test_a_run_from_a_folder_keeps_that_folders_tokenizer_files(train):
    saved_model("m", TINY_CONFIG)
    for name in "tokenizer.json", "vocab.json", "merges.txt", "readme":
        Path("m", name).write_bytes(f"my {name}\r\n".encode())
    assert train("--init_from m --steps 1 --train_bin train.bin --val_bin val.bin") == 0
    assert {path.name for path in Path("out/step_000001").iterdir()} == {
        "tokenizer.json", "vocab.json", "merges.txt", "config.json", "model.safetensors",
        "generation_config.json", "optimizer.safetensors", "trainer.json"}
    assert Path("out/step_000001/vocab.json").read_bytes() == b"my vocab.json\r\n"


def checkpoint_is_whole(folder):
    """Assert that a checkpoint has all files, none left over, and the numbers it was saved with."""
    state = gpt2.read_json(folder / "trainer.json")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "optimizer.safetensors", "tokenizer_config.json", "trainer.json", "vocab.json"]
    assert folder.name == f"step_{gpt2.load_checkpoint(folder, state).step:06}"


def result_of(out, steps):
    """What must be the same: the log without its times, and the last checkpoint's state."""
    folder = Path(out) / f"step_{steps:06}"
    log = [[row[name] for name in ("step", "loss", "val_loss", "norm", "lr")] for row in rows(out)]
    state = gpt2.read_json(folder / "trainer.json")
    return log, state["rngs"], state["crc32"]


def test_checkpoints_from_step_1000000_on_are_found_and_pruned(tmp_path):
    model = gpt2.GPT2(SMALL)
    for model.step in 999_998, 999_999, 1_000_000, 1_000_001:
        gpt2.save_checkpoint(tmp_path, model, {}, {})
    assert [path.name for path in gpt2.checkpoints(tmp_path)] == ["step_1000000", "step_1000001"]
    assert len([*tmp_path.iterdir()]) == 2
    assert gpt2.find_model(tmp_path).name == "step_1000001"


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """ENOSPC at the first write of a save, at the second, and so on, until one succeeds."""
    model, files, failures = gpt2.GPT2(SMALL), {"vocab.json": b"{}"}, 0
    model.step = 2
    before = gpt2.save_checkpoint(tmp_path, model, files, {})
    model.step = 4

    class Full(io.FileIO):
        def write(self, data):
            writes.append(data)
            if len(writes) > failures:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)
    monkeypatch.setattr(gpt2, "open", Full, raising=False)
    while len(gpt2.checkpoints(tmp_path)) < 2:
        writes = []
        try:
            gpt2.save_checkpoint(tmp_path, model, files, {})
        except OSError as error:
            assert error.errno == errno.ENOSPC and [*tmp_path.iterdir()] == [before]
            failures += 1
    # config, length and header and tensors of two files, vocab.json, trainer.json
    assert failures == 2 + 2 + len(model.params) + 2 + 2 + 1 + 1
    for folder in gpt2.checkpoints(tmp_path):
        gpt2.load_checkpoint(folder, gpt2.read_json(folder / "trainer.json"))


POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals and pipes")
RARELY = "--eval_every 1000 --sample_every 1000"


def read_until(text, process):
    """Read a process's stdout until it has said this; returns all of it."""
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"ended before {text!r}: {seen}{process.stderr.read()}"
        seen += line
    return seen


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGPIPE])
def test_a_run_that_is_stopped_resumes_bit_for_bit(train, number, capfd):
    """SIGPIPE stands for a closed pipe, which ends a run quietly."""
    assert train(TINY, "--steps 400 --out whole") == 0
    whole, process = capfd.readouterr().out, start(TINY, "--steps 400 --out run", cwd=".")
    seen = read_until("step   7/", process)
    if number == signal.SIGPIPE:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)
        stopped = int(gpt2.checkpoints("run")[-1].name[5:])
    else:
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "stopping after this step" in errors
        stopped = int(re.search(r"stopped after step (\d+), saved in run", rest)[1])
        seen += rest
    assert 7 <= stopped < 400
    Path("elsewhere").mkdir()
    os.rename("run", "elsewhere/moved")  # a moved run resumes and writes where it now is
    os.chdir("elsewhere")
    assert train("--resume --threads 3 --out moved") == 0
    assert result_of("moved", 400)[2] == result_of("../whole", 400)[2]
    assert not Path("../run").exists()
    if number != signal.SIGPIPE:  # its last step may lack a validation loss and a sample
        assert result_of("moved", 400) == result_of("../whole", 400)
        assert samples(seen + capfd.readouterr().out) == samples(whole) != []


def test_a_run_killed_at_any_moment_resumes_from_a_whole_checkpoint(train):
    """Kills at random moments of a run that does little but save."""
    options = f"{TINY} --steps 300 --save_every 1 {RARELY}"
    assert train(options, "--out whole") == 0
    rng = np.random.default_rng(4)
    for _ in range(10):
        resumed = "--resume --steps 300" if gpt2.checkpoints("killed") else options
        process = start(resumed, "--out killed", cwd=".")
        process.stdout.readline()  # its first word: everything is imported
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        for folder in gpt2.checkpoints("killed")[-2:]:
            checkpoint_is_whole(folder)
    assert gpt2.checkpoints("killed")
    if gpt2.checkpoints("killed")[-1].name != "step_000300":
        assert train("--resume --out killed") == 0
    assert result_of("killed", 300) == result_of("whole", 300)
    assert [path.name for path in sorted(Path("killed").glob("step_*"))] == ["step_000299",
                                                                             "step_000300"]


def test_nothing_of_an_unfinished_save_gets_into_a_checkpoint(train):
    Path("out/step_000002.tmp").mkdir(parents=True)
    Path("out/step_000002.tmp/model.safetensors.123.tmp").write_bytes(b"half")
    assert train(TINY, "--steps 2") == 0
    checkpoint_is_whole(Path("out/step_000002"))


def test_what_is_given_with_resume_wins_and_the_rest_is_as_saved(train, capsys):
    assert train(TINY, "--steps 6 --save_every 3 --lr 0.01 --seed 9 --top_k 5") == 0
    shutil.copy("train.bin", "x_byte_train.bin")
    assert train("--resume --steps 9 --lr 0.02 --warmup 0") == 0
    assert [row["step"] for row in rows("out")] == [str(i) for i in range(1, 10)]
    expected = gpt2.learning_rate(8, 9, 0, 0.02, 1e-4)
    assert float(rows("out")[7]["lr"]) == pytest.approx(expected, rel=1e-5)
    state = gpt2.read_json(Path("out/step_000009/trainer.json"))
    assert {"seed": 9, "top_k": 5, "lr": 0.02, "steps": 9}.items() <= state["options"].items()
    Path("data").mkdir()
    for name in "train", "val":
        shutil.copy("val.bin", f"data/x_byte_{name}.bin")
    assert train("--resume --steps 10 --data x") == 0
    assert "data/x_byte_train.bin" in capsys.readouterr().out.replace(os.sep, "/")
    for arguments, message in [
            ("--n_embd 32", "--n_embd 32 does not fit .*, which has 16; leave it out"),
            ("--tokenizer gpt2", "--tokenizer gpt2 does not fit .* byte"),
            ("--model gpt2", "--model gpt2 does not fit .* baby"),
            ("--init_from out", "--init_from and --resume exclude each other"),
            ("", "--steps 10: the run has done so many already; give more"),
            ("--steps 9", "--steps 9: the run has done so many already; give more"),
            ("--out other", "other has no checkpoint")]:
        capsys.readouterr()
        assert train("--resume", arguments) == 2
        assert re.fullmatch(f"train_gpt2.py: error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors",
                                  "trainer.json"])
def test_a_damaged_checkpoint_is_an_error_and_the_one_before_it_opens(train, name, capsys):
    assert train(TINY, "--steps 6 --save_every 3") == 0
    path = Path("out/step_000006", name)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) * 2 // 3] ^= 4
    wrong = [data[:len(data) // 2], b"", b"{}" if "json" in name else bytes(flipped)]
    for damaged in wrong:
        path.write_bytes(damaged)
        capsys.readouterr()
        assert train("--resume --steps 8") == 2
        assert re.fullmatch(f"train_gpt2.py: error: out.step_000006.{name}.*\n",
                            capsys.readouterr().err)
    shutil.rmtree("out/step_000006")
    assert train("--resume --steps 8") == 0


@pytest.mark.parametrize("out", ["out", "runs/out/"])
def test_an_earlier_run_is_renamed(train, capsys, out):
    for seed in 1, 2, 3:
        assert train(TINY, "--steps 1 --seed", seed, "--out", out) == 0
    assert capsys.readouterr().out.count("held an earlier run, which is now") == 2
    seeds = [gpt2.read_json(Path(f"{Path(out)}{end}/step_000001/trainer.json"))["options"]["seed"]
             for end in (".1", ".2", "")]
    assert seeds == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(train, capsys):
    with np.errstate(all="ignore"):
        assert train(TINY, "--steps 300 --save_every 1 --lr 1e37 --grad_clip 0 --warmup 2") == 2
    step = re.fullmatch(r"train_gpt2.py: error: step (\d+): the loss is .*, the gradient's "
                        r"norm .*; lower --lr 1e\+37 .*\n", capsys.readouterr().err)[1]
    assert gpt2.checkpoints("out")[-1].name == f"step_{int(step) - 1:06}"
    checkpoint_is_whole(gpt2.checkpoints("out")[-1])


@pytest.mark.parametrize("warmup", [0, 1, 3, 100])
def test_a_warm_up_may_be_as_long_as_the_run(warmup):
    found = [gpt2.learning_rate(step, 3, warmup, 0.5, 0.5) for step in (1, 2, 3)]
    assert found == pytest.approx([0.5 * min(1, step / max(1, warmup)) for step in (1, 2, 3)])


def test_init_from_samples_or_trains_on(train, capsys):
    assert train(TINY, "--steps 2") == 0
    capsys.readouterr()
    sampling = ("--init_from out --num_samples 2 --max_new_tokens 40 --temperature 0.8 --top_k 40 "
                "--top_p 0.95 --prompt", "ROMEO:", "--seed")
    assert train(*sampling, 7) == 0
    said = capsys.readouterr().out
    first, second = said.split("ROMEO:")[1:]
    assert first != second and "step" not in said and len(said) > 60
    assert train(*sampling, 7) == 0 and capsys.readouterr().out == said
    assert train(*sampling, 8) == 0 and capsys.readouterr().out != said
    assert train("--init_from out --steps 1 --out tuned --train_bin train.bin --val_bin val.bin "
                 "--prompt To") == 0  # with --steps, a prompt is for the samples
    said = capsys.readouterr().out
    assert Path("tuned/step_000001").is_dir() and samples(said)[0].startswith("To")
    assert re.match(r"model +out.step_000002: [\d,]+ parameters, L=1 H=2 C=16 V=257", said)
    assert float(rows("tuned")[0]["lr"]) == pytest.approx(1e-4 / 100)  # fine-tuning, warm-up


def test_a_prompt_longer_than_the_context_is_cut_and_one_line_says_so(train, capsys):
    saved_model("m", TINY_CONFIG)
    prompt = "abcdefghijklmnopqrstuvwxyz"
    assert train("--init_from m --temperature 0 --max_new_tokens 3 --prompt", prompt) == 0
    said = capsys.readouterr()
    assert said.err == "the prompt has 26 tokens, the last 16 are used\n"
    assert train("--init_from m --temperature 0 --max_new_tokens 3 --prompt", prompt[-16:]) == 0
    short = capsys.readouterr()
    assert said.out == prompt[:-16] + short.out and short.err == ""


def test_a_character_in_two_tokens_is_not_broken(monkeypatch, capsys):
    def generate(model, ids, n, *rest):
        assert ids == [[79, 104]]
        for byte in "é!".encode() + b"\xc3":
            rest[-1](np.array([byte]))
    monkeypatch.setattr(gpt2, "generate", generate)
    args = types.SimpleNamespace(prompt="Oh", tokenizer="byte", max_new_tokens=3, temperature=1,
                                 top_k=None, top_p=None)
    gpt2.print_sample(perturbed(SMALL), gpt2.Tokenizer("byte"), args, None)
    assert capsys.readouterr().out == "Ohé!\ufffd\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The default run, made short, in an empty folder without a network."""
    folder = tmp_path_factory.mktemp("run")
    options = "--steps 100 --eval_every 50 --max_new_tokens 50"
    return run("train_gpt2.py", options, cwd=folder), folder, options


def test_without_a_network_it_says_so_and_learns_from_pythons_own_text(trained):
    """Measured: the validation loss falls from 5.55 = log 257 to 2.55 in 100 steps."""
    result, folder, _ = trained
    assert result.returncode == 0 and result.stderr == ""
    first = result.stdout.splitlines()[0]
    for word in "tinyshakespeare", "could not be downloaded", "pydoc_data":
        assert word in first
    assert (folder / "data" / "pydoc_byte_train.bin").exists()
    losses = [float(x) for x in re.findall(r"^step +\d+ \| val loss (\S+)", result.stdout, re.M)]
    assert len(losses) == 2 and losses[1] < 2.7 and len(samples(result.stdout)) == 1


def test_the_same_command_gives_the_same_run_on_any_number_of_threads(trained):
    """With 8 shards: a run that is resumed keeps the number that it was started with."""
    result, folder, options = trained
    again = run("train_gpt2.py", options, "--threads", gpt2.usable_cpus(), cwd=folder)
    assert "out held an earlier run, which is now out.1" in again.stdout
    assert result_of(folder / "out", 100) == result_of(folder / "out.1", 100)
    assert samples(again.stdout) == samples(result.stdout)


def test_steps_0_validates_and_samples_only(trained):
    folder = trained[1]
    result = run("train_gpt2.py", "--steps 0 --data pydoc --prompt The --max_new_tokens 5 --out o",
                 cwd=folder)
    assert result.returncode == 0 and re.search(r"^val loss 5\.\d{4}$", result.stdout, re.M)
    assert "\nThe" in result.stdout and " ms |" not in result.stdout
    assert not (folder / "o").exists()


def test_help_has_every_option_and_the_defaults(tmp_path):
    result = run("train_gpt2.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    for text in ["(default: out)", *(f"--{x[0]}" for x in gpt2.OPTIONS if len(x) == 5)]:
        assert text in result.stdout
    assert "(default: 5000, or 1000 for gpt2)" in " ".join(result.stdout.split())


@POSIX
@pytest.mark.parametrize("program, arguments", [
    ("train_gpt2.py", "--help"), ("prepro_tinyshakespeare.py", "--help"),
    ("prepro_tinyshakespeare.py", "--text novel.txt")])
def test_a_closed_pipe_ends_a_program_quietly(tmp_path, program, arguments):
    (tmp_path / "novel.txt").write_text("Once upon a time. " * 9)
    reading, writing = os.pipe()
    os.close(reading)
    result = run(program, arguments, cwd=tmp_path, stdout=writing)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_alone_in_a_folder_it_trains_resumes_and_samples(tmp_path):
    """train_gpt2.py without prepro_tinyshakespeare.py; and with no tokens, it says what to do."""
    shutil.copy(HERE / "train_gpt2.py", tmp_path)
    program = tmp_path / "train_gpt2.py"
    result = run(program, cwd=tmp_path)
    assert result.returncode == 2 and re.fullmatch(
        r"train_gpt2.py: error: data. lacks tinyshakespeare byte, and prepro_tinyshakespeare.*; "
        r"put it beside train_gpt2.py, or .*--train_bin and --val_bin.*\n", result.stderr)
    make_tokens(tmp_path)
    for name in "torch", "tiktoken":  # what is not needed is not imported
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    for arguments in (f"{TINY} --steps 3", "--resume --steps 5",
                      "--init_from out --prompt A --max_new_tokens 5"):
        result = run(program, arguments, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
    assert len(rows(tmp_path / "out")) == 5 and result.stdout.startswith("A")


def test_prepro_makes_token_files_of_any_text(tmp_path):
    text = "Es war einmal — né.\n" * 50
    (tmp_path / "novel.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    result = run("prepro_tinyshakespeare.py", "--text novel.txt", cwd=tmp_path)
    assert result.returncode == 0 and "novel_byte_train.bin: 1,035 byte tokens" in result.stdout
    ids = [gpt2.map_tokens(tmp_path / f"data/novel_byte_{split}.bin") for split in ("train", "val")]
    assert gpt2.Tokenizer("byte").decode(np.concatenate(ids)) == text


@pytest.mark.parametrize("program, arguments, content, message", [
    ("prepro", "--text novel.txt", b"", "novel.txt: the file is empty"),
    ("prepro", "--text novel.txt", b"ab\xff", "novel.txt: byte 2 is not UTF-8"),
    ("prepro", "--text novel.txt", b"a", "novel: 1 characters are too few"),
    ("prepro", "--text none.txt", b"a", "none.txt.*; check the path"),
    ("prepro", "", b"a", "https://.*/input.txt could not be downloaded: .*; download it in another "
     "way and save it as data.tinyshakespeare.txt"),
    ("prepro", "--tokenizer gpt2 --text novel.txt", b"a", "GPT-2's tokens need the package"),
    ("train", "--init_from gpt2", b"", "https://.*/openai-community/gpt2/resolve/main/config.json "
     "could not be downloaded: .*; or get it with hf download openai-community/gpt2 --local-dir"),
    ("train", "--data novel", b"", "data.novel_byte_train.bin: no such file; make it with python "
     "prepro_tinyshakespeare.py --text novel.txt --tokenizer byte")])
def test_what_is_missing_gets_one_line_and_status_2(tmp_path, program, arguments, content, message):
    """Run as scripts: train_gpt2.py must know the UserError of the module that prepro imports."""
    (tmp_path / "novel.txt").write_bytes(content)
    program = {"prepro": "prepro_tinyshakespeare.py", "train": "train_gpt2.py"}[program]
    result = run(program, arguments, cwd=tmp_path)
    assert result.returncode == 2 and not list(tmp_path.rglob("*.bin"))
    assert re.fullmatch(f"{program}: error: .*{message}.*\n", result.stderr), result.stderr


def spoil(name, change):
    """A function that makes a model in m/ and changes the bytes of its file `name`."""
    def making():
        saved_model("m", TINY_CONFIG)
        Path("m", name).write_bytes(change(Path("m", name).read_bytes()))
    return making


def config(**changes):
    return spoil("config.json", lambda data: json.dumps(json.loads(data) | changes).encode())


def weights(change):
    return spoil("model.safetensors", change)


FROM_M, BAD = "--init_from m --prompt x", "--train_bin bad.bin --val_bin val.bin --steps 1"
BAD_INPUT = [  # the command line, what the message says, what has to be there
    *[(f"--{x[0]} {x[2] - 1}", f"--{x[0]} must be (at least|from) {x[2]}.*, not {x[2] - 1}", None)
      for x in gpt2.OPTIONS if len(x) == 5 and x[2] is not None],
    *[(f"--lr {value}", f"--lr must be at least 0, not {value}", None) for value in ("nan", "inf")],
    ("--beta1 1", "--beta1 must be from 0 to 0.9.*, not 1.0", None),
    ("--beta2 1", "--beta2 must be from 0 to 0.9.*, not 1.0", None),
    ("--top_p 1.5", "--top_p must be from 0 to 1, not 1.5", None),
    ("--n_layer 2.5", "--n_layer: .*'2.5'", None), ("--lr high", "--lr: .*'high'", None),
    ("--n_heads 3", "unrecognized arguments: --n_heads", None), ("play", "arguments: play", None),
    ("--n_embd", "--n_embd: expected one argument", None),
    ("--tokenizer word", "invalid choice: 'word'", None),
    (f"--n_embd 18 --n_head 4 {FILES}", "n_embd 18 .* n_head 4", None),
    ("--seq_len 65", "--seq_len 65 is more than --n_positions 64; lower", None),
    ("--train_bin train.bin", "--train_bin and --val_bin belong together", None),
    ("--train_bin no*.bin --val_bin val.bin", "no[*].bin: no such file", None),
    (f"{TINY} --steps 1 --out val.bin", "val.bin.*; check the path", None),
    (f"{TINY} --steps 1 --out val.bin/x", "val.bin.*; check the path", None),
    (f"{TINY} --vocab_size 70", "train.bin: id .* is outside the vocabulary of 70", None),
    ("--resume", "--resume: out has no checkpoint", None),
    ("--init_from nowhere", "nowhere.config.json'; check the path", None),
    ("--init_from m --n_embd 32", "--n_embd 32 does not fit m, which has 16", config()),
    (f"{FROM_M} --tokenizer gpt2", "need the package tiktoken .*: pip install tiktoken", config()),
    (FROM_M, "config.json: not a JSON object", spoil("config.json", lambda data: data[:20])),
    (FROM_M, "config.json: not a JSON object", spoil("config.json", lambda data: b"[1]")),
    (FROM_M, "n_embd 15 does not divide into n_head 2", config(n_embd=15)),
    (FROM_M, "wpe.weight is F32 .16, 16., expected .* .32, 16", config(n_positions=32)),
    (FROM_M, "no tokenizer has 300 tokens; give the --tokenizer", config(vocab_size=300)),
    (FROM_M, "model.safetensors: not a safetensors file", weights(lambda data: b"")),
    (FROM_M, "model.safetensors: not a safetensors", weights(lambda data: b"\xff" * 8 + data[8:])),
    (FROM_M, "its tensors have .* bytes, it holds", weights(lambda data: data + b"1234")),
    (BAD, "bad.bin: not a token file", lambda: Path("bad.bin").write_bytes(b"12")),
    (BAD, "bad.bin.*check the path", lambda: Path("bad.bin").mkdir()),
    (f"--n_embd 1000000000000 --n_head 1 {FILES}",
     "need [0-9.,]+ GB of memory, the system has [0-9.,]+; lower", None),
    (f"{TINY} --batch_size 100000000000", "need [0-9.,]+ GB of memory", None)]


@pytest.mark.parametrize("arguments, message, making", BAD_INPUT, ids=[
    re.sub(r"[^\w.-]+", "_", case[0])[-40:] + f"_{i}" for i, case in enumerate(BAD_INPUT)])
def test_bad_input_gets_one_line_and_status_2_and_loses_nothing(
        train, arguments, message, making, monkeypatch, capsys):
    if making:
        making()
    Path("out").mkdir()
    Path("out/log.csv").write_text("an earlier run")
    before = {path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if it were not installed
    monkeypatch.setattr(gpt2, "adamw", None)  # all this is known before a step is made
    assert train(arguments) == 2
    said = capsys.readouterr()
    assert re.fullmatch(f"train_gpt2.py: error: .*({message}).*\n", said.err), said.err
    assert "step 1/" not in said.out
    assert before <= {path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_memory_is_counted_with_one_gradient_array_for_each_shard(train, monkeypatch):
    counted = []
    monkeypatch.setattr(gpt2, "require_memory", counted.append)
    monkeypatch.setattr(gpt2, "choose_shards", lambda *args: 3)
    assert train(TINY, "--steps 1") == 0
    activations, parameters = (gpt2.count(table) for table in (
        gpt2.activation_table(TINY_CONFIG, 6, 16), gpt2.parameter_table(TINY_CONFIG)))
    assert counted == [4 * (activations + 6 * parameters)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server that has server.content; server.how says how it misbehaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepro, "TIMEOUT", 0.2)
    ended = threading.Event()

    def wait(*args, **options):
        ended.wait(20)
        raise OSError

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if state.how == "404":
                return self.send_error(404)
            body = state.content
            self.send_response(200)
            if state.how != "no length":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            whole = state.how in ("", "no length")
            self.wfile.write(body if whole else body[:len(body) // 2])
            if state.how == "falls silent":
                ended.wait(20)

        def log_message(self, *args):
            pass
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    state = types.SimpleNamespace(how="", content=np.random.default_rng(0).bytes(300000),
                                  url=f"http://127.0.0.1:{web.server_port}/f", wait=wait)
    yield state
    ended.set()
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("how, reason", [
    ("404", ".*Not Found"), ("falls silent", "timed out|no answer within 0.2 .*"),
    ("breaks off", "the connection ended after 150,000 of 300,000 bytes"),
    ("another sha256", "the SHA-256 is [0-9a-f]{64}, not 00"),
    ("no such name", "no answer within 0.2 seconds")])
def test_a_download_that_fails_leaves_nothing_and_says_why(server, monkeypatch, how, reason):
    """Also where the look-up of the name takes for ever, it gives up."""
    server.how = "" if how == "another sha256" else how
    if how == "no such name":
        monkeypatch.setattr(prepro.urllib.request, "urlopen", server.wait)
    start = time.monotonic()
    with pytest.raises(gpt2.UserError, match=f"/f could not be downloaded: ({reason}); by hand"):
        prepro.download(server.url, "w", "by hand", "00" if how == "another sha256" else None)
    assert os.listdir() == [] and time.monotonic() - start < 3


def test_a_download_appears_whole_and_models_are_downloaded_by_name(server, monkeypatch):
    for server.how in "", "no length":
        prepro.download(server.url, "w", "", hashlib.sha256(server.content).hexdigest())
        assert Path("w").read_bytes() == server.content and os.listdir() == ["w"]
        os.remove("w")
    monkeypatch.setattr(prepro, "MODEL_URL", server.url + "/{}/{}")
    assert gpt2.find_model("gpt2") == Path("data/gpt2")
    assert Path("data/gpt2/model.safetensors").read_bytes() == server.content
    monkeypatch.setattr(prepro, "MODEL_URL", None)
    prepro.download_model("gpt2")  # it is there: no second download
    assert gpt2.find_model("gpt2") == Path("data/gpt2")


# ------------------------------------------------------------------------------------------------
# Several processes, under torchrun.

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WITH_GLOO = pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested on Linux")


def torchrun(*arguments, cwd, program=HERE / "train_gpt2.py"):
    """Two processes, started."""
    return subprocess.Popen([*TORCHRUN, program, *words(*arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def two(*arguments, status=0, **options):
    """Two processes, until they end: (stdout, stderr)."""
    process = torchrun(*arguments, **options)
    out, err = process.communicate(timeout=60)
    assert (process.returncode == 0) == (status == 0), err
    return out, err


def losses(out):
    """Loss, validation loss and norm of every step in a run's log."""
    return [[float(row[name] or 0) for name in ("loss", "val_loss", "norm")] for row in rows(out)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same 20 steps, saved after 10 too, by one process (one/) and by two (two/)."""
    folder = tmp_path_factory.mktemp("two")
    make_tokens(folder)
    one = run("train_gpt2.py", TINY, "--steps 20 --save_every 10 --out one", cwd=folder)
    assert one.returncode == 0, one.stderr
    out, _ = two(TINY, "--steps 20 --save_every 10 --out two", cwd=folder)
    return folder, one.stdout, out


@WITH_GLOO
def test_two_processes_train_as_one_does(both):
    """Measured: equal to the log's last digit, in 20 steps."""
    folder, one, two = both
    assert len(losses(folder / "one")) == 20
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-5)
    assert samples(one) == samples(two) != []
    assert "processes 2," in two and two.count("| network ") == two.count("| lr ") == 20
    assert "processes 1," in one and "network" not in one


@WITH_GLOO
def test_a_run_resumes_with_another_number_of_processes(both):
    folder, *_ = both
    for out in "one", "two":
        shutil.copytree(folder / out, folder / f"{out}_on")
    for out in "two_on", "one":
        assert run("train_gpt2.py", "--resume --steps 30 --out", out, cwd=folder).returncode == 0
    two("--resume --steps 30 --out one_on", cwd=folder)
    assert len(losses(folder / "one")) == 30
    for out in "one_on", "two_on":
        np.testing.assert_allclose(losses(folder / out), losses(folder / "one"), rtol=1e-5)
    out, err = two("--init_from one --prompt Ohé --max_new_tokens 0", cwd=folder)
    assert out == "Ohé\n" and "error" not in err  # a sample is printed once
    _, err = two("--resume --steps 40 --out two --batch_size 7", cwd=folder, status=2)
    assert "--batch_size 7 cannot be shared equally among 2 processes; give a multiple" in err


@WITH_GLOO
def test_an_earlier_run_is_renamed_when_every_process_has_read_its_weights(both):
    folder, *_ = both
    shutil.copytree(folder / "two", folder / "again")
    (folder / "late.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(HERE)!r})
import train_gpt2 as gpt2
read = gpt2.read_tensors
gpt2.read_tensors = lambda *args: (time.sleep(int(os.environ["RANK"])), read(*args))
gpt2.run_program(gpt2.main)
""", encoding="utf-8")
    out, _ = two("--init_from again --out again --steps 1 --train_bin train.bin --val_bin val.bin "
                 "--max_new_tokens 5", cwd=folder, program="late.py")
    assert "again held an earlier run, which is now again.1" in out


def workers(process):
    """{rank: process id} of torchrun's children."""
    found = {}
    for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
            found |= {int(rank[1]): int(pid)} if rank else {}
    return found


@WITH_GLOO
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_and_leaves_a_whole_checkpoint(train, rank):
    """torchrun itself is stopped meanwhile, so the other process has to notice."""
    process = torchrun(TINY, RARELY, "--steps 999999 --save_every 5", cwd=".")
    read_until("step     20/", process)
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
    assert f"train_gpt2.py: error: rank {1 - rank} lost the connection to another process" in err
    checkpoint_is_whole(gpt2.checkpoints("out")[-1])


@WITH_GLOO
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_that_are_stopped_save_first(train, number):
    process = torchrun(TINY, RARELY, "--steps 100000", cwd=".")
    seen = read_until("step     20/", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    stopped = int(re.search(r"stopped after step (\d+), saved in out", seen + out)[1])
    assert process.returncode != 0 and "lost the connection" not in err
    assert gpt2.checkpoints("out")[-1].name == f"step_{stopped:06}"
    checkpoint_is_whole(gpt2.checkpoints("out")[-1])


def test_only_a_lost_connection_is_called_one_and_processes_wait_for_days(monkeypatch):
    def all_reduce(tensor):
        raise RuntimeError(tensor)
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(gpt2.atexit, "register", lambda function: None)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda *args, timeout: waits.append(timeout.days))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    processes = gpt2.Processes()
    processes.tensor = str
    assert waits[0] >= 1 and (processes.own(np.arange(6)) == [3, 4, 5]).all()
    for message in "Connection closed by peer [::1]:1", "connection reset", "Timed out waiting":
        with pytest.raises(gpt2.UserError, match="rank 1 lost the connection.*; start all again"):
            processes.all_reduce(message)
    with pytest.raises(RuntimeError, match="unsupported dtype"):
        processes.all_reduce("unsupported dtype")


@pytest.mark.parametrize("name, i", [
    ("embedding", 0), ("embedding", 1), ("layernorm", 0), ("layernorm", 1), ("layernorm", 2),
    ("linear", 0), ("linear", 1), ("linear", 2), ("attention", 0), ("attention", 1),
    ("attention", 2), ("gelu", 0), ("crossentropy", 0)])
def test_a_corrupted_backward_is_noticed(name, i, monkeypatch):
    """One result of one backward function is 0.1% too large: the comparison must fail."""
    function, batch = getattr(gpt2, f"{name}_backward"), random_ids(SMALL, 2, 5)
    added = name == "embedding" or name in ("layernorm", "linear") and i > 0

    def corrupted(*args):
        before = args[i].copy() if added and args[i] is not None else 0
        function(*args)
        if args[i] is not None:  # the last layer has no bias
            args[i][...] += 0.001 * (args[i] - before)
    gradients_agree(perturbed(SMALL), *batch, 1e-12)
    monkeypatch.setattr(gpt2, f"{name}_backward", corrupted)
    with pytest.raises(AssertionError, match="off by more than"):
        gradients_agree(perturbed(SMALL), *batch, 1e-4)


def test_the_checker_refuses_an_empty_comparison():
    with pytest.raises(AssertionError, match="all zero"):
        error(np.zeros(3), np.zeros(3))
    with pytest.raises(AssertionError, match="not finite"):
        error(np.array([1, np.nan]), np.ones(2))
    with pytest.raises(AssertionError):
        agree({}, {"missing": np.ones(2)}, 1)


def test_the_table_has_status_1_if_a_gradient_is_off(tmp_path, monkeypatch, capsys):
    perturbed(SMALL, np.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test_gpt2.py", "--init_from", str(tmp_path)])

    def status():
        with pytest.raises(SystemExit) as end:
            gpt2.run_program(main)
        return end.value.code
    assert status() == 0 and (out := capsys.readouterr().out).endswith("\nall OK\n")
    assert all(f"\n{name} " in out for name in ("logits", "loss", *gpt2.parameter_table(SMALL)))
    forward = gpt2.gelu_forward
    monkeypatch.setattr(gpt2, "gelu_forward", lambda out, inp: forward(out, inp * 1.001))
    assert status() == 1 and capsys.readouterr().out.endswith("\nNOT OK\n")
    Path(tmp_path, "config.json").unlink()
    assert status() == 2 and re.fullmatch(".*config.json.*\n", capsys.readouterr().err)


def test_the_benchmark_runs():
    found = python(Path(__file__).resolve(), "--bench", "--config", "1,2,8,11,4,8", "--turns", "1",
                   "--steps", "1", "--threads", "2")
    assert found.returncode == 0, found
    assert "| 1,2,8,11,4,8 |" in found.stdout and "attention" in found.stdout, found.stdout


# ------------------------------------------------------------------------------------------------
# The table: python test_gpt2.py

def table(model, B=4, T=64, tolerance=1e-4):
    """Print loss, logits and every gradient beside PyTorch's; return whether all agree."""
    config, T, good = model.config, min(T, model.config.n_positions), True
    print(f"{config}, B={B}, T={T}, float32; OK: within {tolerance:g} of the largest value\n\n"
          f"{'':28} {'shape':16} {'largest':>10} {'difference':>10} {'relative':>9}")
    ids, targets = random_ids(config, B, T)
    reference, ours = torch_results(model, ids, targets), our_results(model, ids, targets)
    for name, x in reference.items():
        x = np.asarray(x.detach())
        relative = error(ours[name], x)
        good &= bool(relative <= tolerance)
        print(f"{name:28} {str(x.shape):16} {np.abs(x).max():10.3e} "
              f"{np.abs(ours[name] - x).max():10.3e} {relative:9.1e} "
              f"{'OK' if relative <= tolerance else 'NOT OK'}")
    print("\nall OK" if good else "\nNOT OK")
    return good


# ------------------------------------------------------------------------------------------------
# The benchmark: python test_gpt2.py --bench. Three processes take steps in turn: ours, PyTorch, and
# the floor, which does only the matrix products of our step.

BENCH = {  # L, H, C, V, B, T, steps in a turn
    "baby": (4, 4, 128, 257, 12, 64, 40), "baby384": (6, 6, 384, 257, 16, 256, 2),
    "124M": (12, 12, 768, 50257, 4, 64, 2), "124M-long": (12, 12, 768, 50257, 1, 1024, 1),
    "long": (4, 4, 128, 257, 1, 1024, 20)}


def our_trainer(model):
    """A function (ids, targets) -> loss that takes one step."""
    def step(ids, targets):
        loss = model.forward(ids, targets)
        model.backward()
        model.update(1e-3)
        return loss
    return step


def torch_trainer(model, compiled):
    """The same step, with update()'s defaults and the fastest that PyTorch has for a CPU."""
    config, p = model.config, torch_params(model)
    optimizer = torch.optim.AdamW(
        [{"params": [x for x in p.values() if x.ndim == n], "weight_decay": decay}
         for n, decay in ((2, 0.1), (1, 0))], lr=1e-3, betas=(0.9, 0.95), fused=True)
    network = torch.compile(torch_gpt2) if compiled else torch_gpt2

    def step(ids, targets):
        optimizer.zero_grad(set_to_none=True)
        loss = network(p, config, torch.tensor(ids), torch.tensor(targets))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        return loss.item()
    return step


def keep_only_products():
    """Reduce every layer to its matrix products: two in attention, five in its backward."""
    product, linear_backward = gpt2.matmul, gpt2.linear_backward

    def blocks(q, k):
        size = max(64, q.shape[2] // 8)  # as in gpt2.score_blocks; S = T
        for start in range(0, q.shape[2], size):
            queries, keys = slice(start, start + size), slice(0, start + size)
            yield queries, keys, q[:, :, queries] @ k[:, :, keys].swapaxes(2, 3)

    @gpt2.by_rows("out lse q k v", heads=True)
    def attention_forward(out, lse, q, k, v):
        for _, keys, scores in blocks(q, k):
            scores @ v[:, :, keys]

    @gpt2.by_rows("dq dk dv dout out lse q k v", heads=True)
    def attention_backward(dq, dk, dv, dout, out, lse, q, k, v):
        for queries, keys, scores in blocks(q, k):
            scores.swapaxes(2, 3) @ dout[:, :, queries]
            dscores = dout[:, :, queries] @ v[:, :, keys].swapaxes(2, 3)
            dscores @ k[:, :, keys]
            dscores.swapaxes(2, 3) @ q[:, :, queries]
    for name in vars(gpt2).copy():
        if re.fullmatch("(embedding|layernorm|gelu|crossentropy)_(for|back)ward|move", name):
            setattr(gpt2, name, lambda *args: None)
    gpt2.attention_forward, gpt2.attention_backward = attention_forward, attention_backward
    gpt2.matmul = lambda out, a, b, bias=None, add=False: product(out, a, b)
    gpt2.linear_backward = lambda dinp, dw, db, *rest: linear_backward(dinp, dw, None, *rest)


def time_each_layer(model, step):
    """{layer: its share of our step}. Time that shards spend side by side counts once."""
    kinds = "linear", "attention", "layernorm", "gelu", "crossentropy", "embedding", "adamw"
    took, others = dict.fromkeys(kinds, 0), {"add_squares": "adamw", "move": "adamw"}
    lock = threading.Lock()
    for name, function in vars(gpt2).copy().items():
        kind = others.get(name, re.sub("_(for|back)ward$", "", name))
        if kind in kinds and callable(function):
            def timed(*args, kind=kind, function=function):
                width = min(gpt2.parallel.threads, len(model.shards)) if gpt2.parallel.busy else 1
                start = time.perf_counter()
                function(*args)
                seconds = (time.perf_counter() - start) / width
                with lock:
                    took[kind] += seconds
            setattr(gpt2, name, timed)
    start = time.perf_counter()
    for _ in range(3):
        step()
    total = time.perf_counter() - start
    return {kind: seconds / total for kind, seconds in took.items()}


def bench_worker(which, shape, threads):
    """Read how many steps to take, line by line, and answer each with JSON."""
    L, H, C, V, B, T = shape
    model = gpt2.GPT2(gpt2.GPTConfig(V, T, C, L, H))
    gpt2.parallel.threads, model.n_shards = threads, gpt2.choose_shards(model.config, B, T, threads)
    rng, losses = np.random.default_rng(0), []
    if which in ("ours", "floor"):
        step = our_trainer(model)
        if which == "floor":
            keep_only_products()
            model.update = lambda lr: None
    else:
        torch.set_num_threads(threads)
        step, model = torch_trainer(model, which == "compiled"), None  # its parameters are copied
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            batch = rng.integers(V, size=(2, B, T))
            start = time.perf_counter()
            losses.append(step(*batch))
            times.append(1e3 * (time.perf_counter() - start))
        status = Path("/proc/self/status")  # Linux; getrusage's maximum includes the parent's
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1] if status.exists() else "nan"
        answer = {"ms": times, "loss": losses[-1], "peak": float(peak) / 1e3}
        if not times and which == "ours":
            answer["shares"] = time_each_layer(model, lambda: step(*batch))
        print(json.dumps(answer), flush=True)


def bench_one(name, shape, in_turn, args):
    """Measure one configuration, print its row -> (do the losses agree?, a line of shares)."""
    workers = [subprocess.Popen(
        [sys.executable, __file__, f"--worker={which}", "--config", ",".join(map(str, shape)),
         "--threads", str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for which in ("ours", "compiled" if args.compile else "torch", "floor")]

    def ask(steps, asked=workers):
        answers = []
        for worker in asked:
            print(steps, file=worker.stdin, flush=True)
            answers.append(json.loads(worker.stdout.readline()))
        return answers
    ask(3)  # warms up
    answers = []
    for turn in range(args.turns):
        gpt2.show_progress(f"{name}: turn {turn + 1} of {args.turns}")
        answers.append(ask(in_turn))
    gpt2.show_progress("")
    shares = ask(0, workers[:1])[0]["shares"]
    shares["the rest"] = 1 - sum(shares.values())
    for worker in workers:
        worker.communicate()
    medians = np.array([[np.median(a["ms"]) for a in turn] for turn in answers])
    (ms, torch_ms, floor_ms), ratios = np.median(medians, axis=0), medians[:, 1] / medians[:, 0]
    (ours, torchs, _), tokens = answers[-1], shape[4] * shape[5]
    agreeing = abs(ours["loss"] - torchs["loss"]) <= 1e-3
    print(f"| {name} | {ms:.1f} | {torch_ms:.1f} | {np.median(ratios):.2f} ({min(ratios):.2f}-"
          f"{max(ratios):.2f}) | {1e3 * tokens / ms:.0f} | {1e3 * tokens / torch_ms:.0f} "
          f"| {ours['peak']:.0f} | {torchs['peak']:.0f} | {ours['peak'] / torchs['peak']:.2f} "
          f"| {floor_ms:.1f} ({floor_ms / ms:.0%}) | {ours['loss']:.4f} {torchs['loss']:.4f}"
          f"{'' if agreeing else ' NOT OK'} |", flush=True)
    return agreeing, f"{name}: " + ", ".join(f"{kind} {part:.0%}" for kind, part in shares.items())


def machine():
    """Processor, versions, and NumPy's BLAS kernel if threadpoolctl can tell."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, blas = re.search(r"model name\s*: (.*)", info), []
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_info
        blas = [f"{x['internal_api']} {x['version']} {x.get('architecture')}"
                for x in threadpool_info() if x["user_api"] == "blas" and "numpy" in x["filepath"]]
    return ", ".join([name[1] if name else platform.processor() or platform.machine(),
                      f"numpy {np.__version__}", *blas, f"torch {torch.__version__}"])


def bench(args):
    """Print the table of the README's section on speed; return whether all losses agree."""
    print(f"{machine()}{' compiled' if args.compile else ''}, {args.threads} threads\n\n"
          "| config | ms/step | PyTorch | ratio (min-max) | tok/s | PyTorch | peak MB | PyTorch "
          "| ratio | products alone | loss, PyTorch's |\n" + "|---" * 11 + "|", flush=True)
    results = []
    for name in [args.config] if args.config else BENCH:
        *shape, in_turn = BENCH.get(name) or [*map(int, name.split(",")), 2]
        results.append(bench_one(name, shape, args.steps or in_turn, args))
    agreeing, notes = zip(*results)
    print("\nwhere our step goes:", *notes, sep="\n", flush=True)
    if not args.config:
        bench_sampling(args.threads)
    return all(agreeing)


def bench_sampling(threads, n=64):
    """Print the time per token of a 124M model beside transformers', and of reading the weights."""
    model, gpt2.parallel.threads = gpt2.GPT2(gpt2.GPTConfig()), threads
    ways = {"ours": lambda: gpt2.generate(model, [[50256]], n, top_k=40)}
    try:
        import transformers
        torch.set_num_threads(threads)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        prompt = torch.tensor([[50256]])
        ways["transformers"] = lambda: theirs.generate(
            prompt, min_new_tokens=n, max_new_tokens=n, do_sample=True, top_k=40,
            attention_mask=torch.ones_like(prompt), pad_token_id=0)
    except ImportError:
        print("\ntransformers is not installed", end="")
    blocks = [model.flat_params[block] for block in gpt2.split(model.flat_params.size, 64)]
    ways["reading the weights once"] = lambda: [
        gpt2.parallel(lambda block: np.dot(block, block), blocks) for _ in range(n)]
    times = {name: [] for name in ways}
    for _ in range(4):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - start) / n)
    print("\nsampling one sequence, 124M, ms a token: " + ", ".join(  # the first time warms up
        f"{name} {np.median(found[1:]):.1f}" for name, found in times.items()))


def main():
    """The table, or the benchmark; exit status 1 if numbers differ from PyTorch's."""
    parser = argparse.ArgumentParser(description="Gradients beside PyTorch's, or speed.")
    parser.add_argument("--init_from", metavar="FOLDER", help="compare with these weights")
    parser.add_argument("--bench", action="store_true", help="compare the speed")
    parser.add_argument("--config", help="one of " + ", ".join(BENCH) + ", or L,H,C,V,B,T")
    parser.add_argument("--steps", type=int, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--compile", action="store_true", help="PyTorch with torch.compile")
    parser.add_argument("--threads", type=int, default=gpt2.usable_cpus(), help="of each process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return bench_worker(args.worker, [*map(int, args.config.split(","))], args.threads)
    if args.bench:
        sys.exit(0 if bench(args) else 1)
    folder = args.init_from and gpt2.find_model(args.init_from)
    model = gpt2.GPT2.from_pretrained(folder) if folder else gpt2.GPT2(gpt2.GPTConfig())
    sys.exit(0 if table(model) else 1)


if __name__ == "__main__":
    gpt2.run_program(main)
