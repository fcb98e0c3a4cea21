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
import inspect
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

def torch_gpt2(p, config, ids, targets):
    """ids (B,T), targets (B,T) -> logits (B,T,V) and the mean loss."""
    def layernorm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"].T, p[f"{name}.bias"])
    x = p["wte.weight"][ids] + p["wpe.weight"][:ids.shape[1]]
    for h in (f"h.{i}" for i in range(config.n_layer)):
        qkv = linear(layernorm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=2)
        q, k, v = (y.unflatten(2, (config.n_head, -1)).transpose(1, 2) for y in qkv)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(heads.transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        hidden = linear(layernorm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"{h}.mlp.c_proj")
    logits = F.linear(layernorm(x, "ln_f"), p["wte.weight"])
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
    """Assert that every array of {name: array} agrees."""
    assert ours.keys() == reference.keys()
    errors = {name: error(ours[name], reference[name]) for name in reference}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= tolerance}
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"


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
    """Assert that loss, logits and every gradient are PyTorch's."""
    agree(our_results(model, ids, targets), torch_results(model, ids, targets), tolerance)


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


def torch_attention(q, k, v):
    """Attention with the whole matrix (B,H,T,S). The queries are the last T of S positions."""
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.mT / math.sqrt(q.shape[3])
    return scores.masked_fill(torch.ones(T, S).triu(1 + S - T) > 0, -math.inf).softmax(dim=3) @ v


def layers(dtype=np.float64, B=2, T=5, H=3, C=12, K=7, V=17):
    """{layer: (its arrays, under the names of the arguments; the same layer in PyTorch)}.

    The inputs are the arguments of the layer in PyTorch. All sizes are different.
    """
    rng, N, heads, S = np.random.default_rng(0), B * T, (B, H, T, C // H), T + 60

    def new(*shape):
        return rng.standard_normal(shape).astype(dtype)
    ids, cached = rng.integers(V // 3, size=(B, T)), (B, H, S, C // H)
    return {
        "embedding": (dict(wte=new(V, C), wpe=new(T + 3, C), out=new(N, C), ids=ids),
                      lambda wte, wpe: (wte[ids] + wpe[:T]).flatten(0, 1)),
        "layernorm": (dict(inp=new(N, C), weight=new(C), bias=new(C), out=new(N, C),
                           mean=new(N, 1), rstd=new(N, 1)),
                      lambda inp, weight, bias: F.layer_norm(inp, (C,), weight, bias)),
        "linear": (dict(inp=new(N, C), weight=new(C, K), bias=new(K), out=new(N, K)),
                   lambda inp, weight, bias: F.linear(inp, weight.T, bias)),
        "linear with tied weights": (dict(inp=new(N, C), weight=new(V, C).T, out=new(N, V)),
                                     lambda inp, weight: inp @ weight),
        "attention": (dict(q=new(*heads), k=new(*heads), v=new(*heads), out=new(*heads),
                           lse=new(B, H, T, 1)), torch_attention),
        "attention with a cache": (dict(q=new(*heads), k=new(*cached), v=new(*cached),
                                        out=new(*heads), lse=new(B, H, T, 1)), torch_attention),
        "gelu": (dict(inp=new(N, K), out=new(N, K)), lambda inp: F.gelu(inp, approximate="tanh")),
        "crossentropy": (  # the gradient of every loss is the same number
            dict(logits=new(N, V), out=new(N), lse=new(N, 1), targets=ids.ravel(), dloss=3.0,
                 dout=np.full(N, 3, dtype)),
            lambda logits: F.cross_entropy(logits, torch.tensor(ids.ravel()), reduction="none"))}


LAYERS = pytest.mark.parametrize("name", layers())
SIZES = {"small": {}, "T=1": dict(T=1), "eight blocks of queries": dict(T=600, H=5, C=20),
         "several blocks of rows": dict(B=6, T=150, C=192, K=160, V=170)}


def run_layer(name, size="small", dtype=np.float64):
    """Run a layer forward and backward: its inputs, arrays, forward pass, and PyTorch's layer."""
    arrays, reference = layers(dtype, **SIZES[size])[name]
    inputs = {n: arrays[n] for n in inspect.signature(reference).parameters}
    dout = np.random.default_rng(1).standard_normal(arrays["out"].shape).astype(dtype)
    arrays = {"losses": arrays["out"], "dout": dout} | arrays
    arrays |= {f"d{n}": np.ones_like(x) for n, x in inputs.items()}

    def call(way):
        function = getattr(gpt2, f"{name.split()[0]}_{way}")
        function(*map(arrays.get, inspect.signature(function).parameters))
    call("forward")
    call("backward")
    for n in arrays.keys() & {"dwte", "dwpe", "dweight", "dbias"}:
        arrays[n] -= 1  # gradients of parameters were added to ones, those of activations written
    return inputs, arrays, lambda: call("forward"), reference


@LAYERS
@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_layer_matches_torch(name, dtype, size):
    """Measured: 3e-15 in float64 and 6e-7 in float32."""
    inputs, arrays, _, reference = run_layer(name, size, dtype)
    tensors = {n: torch.tensor(x, requires_grad=True) for n, x in inputs.items()}
    out = reference(*tensors.values())
    out.backward(torch.tensor(arrays["dout"]))
    expected = {"out": out} | {f"d{n}": x.grad for n, x in tensors.items()}
    tolerance = 3e-14 if dtype == np.float64 else 1e-5
    if name == "attention" and size == "T=1":  # one key: softmax is 1 whatever the score
        del expected["dq"], expected["dk"]
        assert max(np.abs(arrays["dq"]).max(), np.abs(arrays["dk"]).max()) < tolerance
    agree({n: arrays[n] for n in expected}, expected, tolerance)


@LAYERS
def test_layer_matches_central_differences(name):
    """(f(x + h) - f(x - h)) / 2h for every single input, without PyTorch. Measured: below 1e-9."""
    inputs, arrays, forward, _ = run_layer(name)
    h = 1e-5
    for n, x in inputs.items():
        numeric = np.empty_like(x)
        for i in np.ndindex(x.shape):
            value, sides = x[i], []
            for x[i] in value + h, value - h:
                forward()
                sides.append((arrays["dout"] * arrays["out"]).sum())
            x[i] = value
            numeric[i] = (sides[0] - sides[1]) / (2 * h)
        assert error(arrays[f"d{n}"], numeric) < 1e-8, n


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
    assert losses == pytest.approx([0, 2 * largest, math.log(3)], rel=1e-5)
    assert logits == pytest.approx(np.array([[0, 0, 0], [-1, 1, 0], [1 / 3, 1 / 3, -2 / 3]]),
                                   abs=2e-3 if dtype == np.float32 else 1e-11)
    assert heads.ravel().tolist() == [1e3, 1e3, -1e3], "a query sees only the key that fits best"
    assert heads_lse.ravel().tolist() == [1e6, -1e6, 2e6]
    assert out == pytest.approx(np.maximum(x, 0), abs=1e-30)
    assert slope == pytest.approx(1.0 * (x > 0), abs=1e-20)


def test_docstrings_have_examples_that_run():
    """At least one for each layer, adamw, sample and learning_rate."""
    assert doctest.testmod(gpt2).failed == 0
    names = {re.sub("train_gpt2.|_(for|back)ward$", "", test.name)
             for test in doctest.DocTestFinder().find(gpt2) if test.examples}
    assert names >= {"embedding", "layernorm", "linear", "attention", "gelu", "crossentropy",
                     "adamw", "sample", "learning_rate"}


@pytest.mark.parametrize("M, J, K", [(3, 5, 7), (700, 300, 90), (90, 300, 700), (1, 999, 20000)])
@pytest.mark.parametrize("transposed", ["", "a", "b", "out", "a out", "a b out"])
def test_matmul_in_blocks_is_one_matmul(M, J, K, transposed):
    rng = np.random.default_rng(2)
    a, b, out = (np.array(rng.standard_normal(shape), order="F" if name in transposed else "C")
                 for name, shape in {"a": (M, J), "b": (J, K), "out": (M, K)}.items())
    before, bias = out.copy(), rng.standard_normal(K)
    gpt2.matmul(out, a, b, add=True)
    assert error(out, before + a @ b) < 1e-14
    if "out" not in transposed:
        gpt2.matmul(out, a, b, bias)
        assert error(out, a @ b + bias) < 1e-14


def test_pool_does_every_item_once_hands_errors_on_and_runs_nested_calls_serially():
    pool, done = gpt2.Pool(4), []
    with pytest.raises(ZeroDivisionError):
        pool(lambda i: 1 / (i - 7), range(20))

    def nested(i):
        own = threading.get_ident()
        pool(lambda j: done.append((i, j, threading.get_ident() == own)), range(3))
    pool(nested, range(50))
    assert sorted(done) == [(i, j, True) for i in range(50) for j in range(3)] and not pool.busy
    meeting = threading.Barrier(4, timeout=20)  # four items that wait for each other
    pool(lambda i: meeting.wait(), range(4))


@pytest.mark.parametrize("shards", [1, 4])
def test_results_are_the_same_bits_on_any_number_of_threads(shards, monkeypatch):
    config, results = gpt2.GPTConfig(257, 128, 128, 2, 4), []
    batch = random_ids(config, 12, 128)
    for threads in (1, 2, 3, 8, 2):
        monkeypatch.setattr(gpt2.parallel, "threads", threads)
        model = gpt2.GPT2(config)
        model.n_shards, step = shards, our_trainer(model)
        results.append((step(*batch), step(*batch), model.flat_params.tobytes()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("file, quota, expected", [
    ("", "", 64), ("cpu.max", "max 100000", 64), ("cpu.max", "250000 100000", 2),
    ("cpu.max", "50000 100000", 1), ("cpu/cpu.cfs_quota_us", "-1", 64),
    ("cpu/cpu.cfs_quota_us", "300000", 3)])
def test_a_containers_quota_limits_the_processors(file, quota, expected, monkeypatch):
    files = {f"/sys/fs/cgroup/{file}": quota, "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with monkeypatch.context() as m:
        m.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
        m.setattr(Path, "exists", lambda path, **options: path.as_posix() in files)
        m.setattr(Path, "read_text", lambda path, **options: files[path.as_posix()])
        assert gpt2.usable_cpus() == expected
        m.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's processes on this machine share them
        assert gpt2.usable_cpus() == max(1, expected // 2)


def test_shards_use_the_threads_where_they_pay():
    config = gpt2.GPTConfig(257, 64, 128, 3, 4)
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


def test_numpy_imported_first_or_too_old_gets_one_line_on_stderr(tmp_path):
    assert python("-c", "import train_gpt2, numpy").stderr == ""
    first = python("-c", "import numpy, train_gpt2").stderr
    assert re.fullmatch(".*numpy was imported first.*BLAS.*before numpy\n", first)
    gpt2.write_file(tmp_path / "numpy" / "__init__.py", b"__version__ = '1.26.4'")
    path = os.pathsep.join([str(tmp_path), str(HERE)])
    for arguments in ["train_gpt2.py", "--steps", "1"], ["-c", "import train_gpt2"]:
        found = python(*arguments, PYTHONPATH=path)
        assert found.returncode == 2 and re.fullmatch("NumPy 1.26.4 .*numpy>=2'\n", found.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_train_after_its_parent_has():
    found = python("-c", """if True:
        import multiprocessing, train_gpt2 as gpt2
        model, ids = gpt2.GPT2(gpt2.GPTConfig(257, 64, 128, 1, 4)), [[1] * 64] * 8
        model.n_shards = gpt2.parallel.threads = 4
        step = lambda: (model.forward(ids, ids), model.backward(), model.update(1e-3))
        step()
        child = multiprocessing.get_context("fork").Process(target=step, daemon=True)
        child.start()
        child.join(20)
        assert child.exitcode == 0, child""")
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
    for seed in 1, 2:  # the second time, nothing of the first is left
        batch, tolerance = random_ids(config, B, T, seed), 3e-14 if dtype == np.float64 else 2e-5
        gradients_agree(model, *batch, tolerance)
    assert len(model.shards) == shards


def test_a_large_model_that_recomputes_has_the_same_bits_as_one_that_keeps(monkeypatch):
    sizes, found = [], []
    for most in gpt2.MAX_KEPT, 0:
        monkeypatch.setattr(gpt2, "MAX_KEPT", most)
        sizes.append(gpt2.count(gpt2.activation_table(SMALL, 2, 5)))
        found.append(our_results(perturbed(SMALL), *random_ids(SMALL, 2, 5)))
    assert sizes[1] == sizes[0] - 2 * 5 * (6 * 12 + 4)
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


def test_shapes_and_shards_may_change_from_call_to_call():
    model = perturbed(SMALL)
    for B, T, model.n_shards in [(2, 5, 1), (4, 8, 4), (4, 8, 1), (1, 1, 4), (4, 3, 2), (4, 5, 2)]:
        gradients_agree(model, *random_ids(SMALL, B, T, seed=B * T), 2e-14)
        assert len(model.shards) == min(B, model.n_shards)


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
    for between in (lambda: None, lambda: model.forward(ids), model.backward,
                    lambda: next(gpt2.generate(model, ids, 1)),
                    lambda: model.forward(ids, targets, for_backward=False)):
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


def test_parameter_counts_are_openais():
    counts = {name: gpt2.count(gpt2.parameter_table(gpt2.GPTConfig(**sizes)))
              for name, sizes in gpt2.MODELS.items() if name != "baby"}
    assert [*counts.values()] == [124439808, 354823168, 774030080, 1557611200]


@pytest.mark.parametrize("ids, targets, message", [
    ([1, 2], None, r"ids must be .* \(2,\)"), ([[]], None, "shape"), ([[1.5]], None, "float64"),
    ([[17]], None, r"ids are in 17\.\.17, .* 17 tokens"), ([[3, -1]], None, r"-1\.\.3"),
    ([[0] * 9], None, "T from 1 to 8, not int64"), ([[1, 2]], [[1]], r"targets .*\(1, 1\)"),
    ([[1]], [[17]], "targets are in 17")])
def test_ids_that_do_not_fit_raise_a_value_error(ids, targets, message):
    with pytest.raises(gpt2.UserError, match=message) as found:
        gpt2.GPT2(SMALL).forward(ids, targets)
    assert isinstance(found.value, ValueError)


@pytest.mark.parametrize("decay, clip", [(0.1, 1.0), (0.0, 0.0), (0.5, 0.3)])
def test_adamw_matches_torch(decay, clip):
    """Ten steps at a high learning rate, where errors add up. Measured: 6e-16."""
    model, rng = perturbed(gpt2.GPTConfig(257, 64, 64, 2, 4)), np.random.default_rng(0)
    p = torch_params(model)
    groups = [{"params": [x for x in p.values() if x.ndim == n], "weight_decay": d}
              for n, d in ((1, 0.0), (2, decay))]
    adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.97), eps=1e-3)
    for step in range(10):
        model.flat_grads[:] = rng.standard_normal(model.flat_grads.size) * 10.0 ** (step % 3 - 2)
        for name, x in p.items():
            x.grad = torch.tensor(model.grads[name])
        norm = torch.nn.utils.clip_grad_norm_(p.values(), clip or math.inf).item()
        adamw.step()
        assert model.update(0.05, 0.8, 0.97, 1e-3, decay, clip) == pytest.approx(norm, rel=1e-12)
        assert not model.flat_grads.any() and model.step == step + 1
    agree(model.params, p, 1e-14)


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


@pytest.mark.parametrize("warmup, expected", [(0, [0.85, 0.55, 0.4]), (1, [1, 0.7, 0.4]),
                                              (3, [1 / 3, 2 / 3, 1]), (100, [0.01, 0.02, 0.03])])
def test_learning_rate_at_its_corners(warmup, expected):
    """In a run of three steps; a warm-up may be as long as the run, or longer."""
    found = [gpt2.learning_rate(step, 3, warmup, 1.0, 0.4) for step in (1, 2, 3)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("context, prompt, expected", [
    (8, 2, [2, *6 * [1], 6, 1, 1, 6, 1, 1, 6, 1]), (8, 20, [8, 6, 1, 1, 6]), (1, 3, [1, 1, 1]),
    (150, 60, [60] + 90 * [1])])
def test_cached_logits_are_uncached_logits_while_the_window_moves_by_a_quarter(
        context, prompt, expected, monkeypatch):
    """`expected` is how many tokens pass through the network for each new one. Measured: 1e-15."""
    config, seen, window = gpt2.GPTConfig(17, context, 12, 2, 3), [], 0
    model, sample, ids = perturbed(config), gpt2.sample, random_ids(config, 3, prompt)[0]
    monkeypatch.setattr(gpt2, "sample", lambda logits, *options: seen.append(
        (model.layout[1], logits)) or sample(logits, *options))
    texts = []
    for model.n_shards, seed in (1, 0), (2, 0), (1, 1):
        rng = np.random.default_rng(seed)
        texts.append(np.column_stack([ids, *gpt2.generate(model, ids, len(expected), rng=rng)]))
    assert (texts[0] == texts[1]).all() and (texts[0] != texts[2]).any()
    assert [new for new, _ in seen] == 3 * expected
    for end, (new, logits) in enumerate(seen[:len(expected)], prompt):
        window = window + 1 if new == 1 < context else new
        uncached = model.forward(texts[0][:, end - window:end])[:, -1]
        assert error(logits, uncached) < 2e-14


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, None, None, [8, 1, 6, 1, 4]), (0.5, None, None, [64, 1, 36, 1, 16]),
    (0, None, None, [1, 0, 0, 0, 0]), (1e-320, None, None, [1, 0, 0, 0, 0]),
    (1.0, 1, None, [1, 0, 0, 0, 0]), (1.0, 3, None, [8, 0, 6, 0, 4]),
    (1.0, 99, None, [8, 1, 6, 1, 4]), (1.0, None, 0.0, [1, 0, 0, 0, 0]),
    (1.0, None, 0.65, [8, 0, 6, 0, 0]), (1.0, None, 1.0, [8, 1, 6, 1, 4]),
    (1.0, 3, 0.75, [8, 0, 6, 0, 0])])  # of the three, the first two have 14/18
def test_samples_come_as_often_as_their_probabilities_say(temperature, top_k, top_p, expected):
    """In 40,000 draws, within 5 sigma; what is left out never. Every other row is reversed."""
    logits, expected = np.log([8, 1, 6, 1, 4]) + 1000, np.array(expected) / sum(expected)
    rows = np.tile([logits, logits[::-1]], (20000, 1))
    drawn = gpt2.sample(rows, temperature, top_k, top_p, np.random.default_rng(0))
    drawn[1::2] = 4 - drawn[1::2]
    limit = 5 * np.sqrt(expected * (1 - expected) / 40000) + 1e-12
    assert (np.abs(np.bincount(drawn, minlength=5) / 40000 - expected) <= limit).all()


@pytest.fixture(params=["byte", "gpt2"])
def tokenizer(request, monkeypatch):
    """A tokenizer; GPT-2's if tiktoken and its merges are here, as tests do not download them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", str(HERE / "data" / "tiktoken"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", folder)
    if request.param == "gpt2" and not (Path(folder).is_dir() and pytest.importorskip("tiktoken")):
        pytest.skip("GPT-2's merges are neither in TIKTOKEN_CACHE_DIR nor in data/tiktoken")
    return gpt2.Tokenizer(request.param)


TEXT = "First Citizen:\nnaïve café, 日本語 🙂.\n\n<|endoftext|>All:\n  Speak!\r\n" + "".join(
    map(chr, range(256))) + "\u07ff\u0800\uffff\U00010000\U0010ffff"  # every byte of UTF-8


def test_tokens_decode_to_the_text_they_came_from(tokenizer):
    for text in (TEXT, "", "a", "<|endoftext|>", "<|endoftext|><|endoftext|>b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.eot_token) == text.count("<|endoftext|>")
    assert tokenizer.decode([*tokenizer.encode("é"), tokenizer.n_vocab + 5]) == "é"
    expected = {"byte": [*b"Hello world", 256], "gpt2": [15496, 995, 50256]}
    assert tokenizer.encode("Hello world<|endoftext|>") == expected[tokenizer.name]


def test_token_counts_of_the_real_text(tokenizer):
    """Bytes as for nanoGPT's shakespeare_char; GPT-2's tokens as in llm.c."""
    path = HERE / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is missing; prepro_tinyshakespeare.py downloads it")
    train, val = prepro.tokenize(prepro.read_text(path), tokenizer)
    counts = {"byte": (1003854, 111540), "gpt2": (305260, 32768)}
    assert (len(train), len(val)) == counts[tokenizer.name]


def test_gpt2_sections_are_split_as_in_llm_c():
    letters = gpt2.Tokenizer("byte")
    letters.name, letters.eot_token = "letters", 0
    train, val = prepro.tokenize("a\n\nb\n\n\n\nc" * 20, letters)
    ids = val + train
    assert ids[:11] == [0, *b"a\n\n", 0, *b"b\n\n", 0, *b"\n\n"] and ids[-2:] == [0, *b"c"]
    assert len(val) == len(ids) // 10


def write(path, tokens=range(20), start=None, extra=b""):
    """A token file made by hand, right or wrong."""
    header = np.zeros(256, "<i4")
    header[:3] = start or (20240520, 1, len(tokens))
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes() + extra)


def test_token_files_have_llm_cs_format_and_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    gpt2.write_tokens(path, np.array([1, 2, 50256]))
    assert gpt2.Tokens(path, 50257).read(0, 3).tolist() == [1, 2, 50256]
    for wrong in [-1, 5], [65536]:
        with pytest.raises(gpt2.UserError, match=r"a.bin: .*0..65535"):
            gpt2.write_tokens(path, wrong)
    with pytest.raises(TypeError):
        gpt2.write_file(path, b"new", None)
    assert os.listdir(path.parent) == ["a.bin"] and path.read_bytes() == (
        b"\x88\xd8\x34\x01\1\0\0\0\3\0\0\0" + bytes(253 * 4) + b"\1\0\2\0\x50\xc4")
    assert gpt2.write_file(path, b"new", b"er") == zlib.crc32(b"newer")


def test_batches_are_windows_over_all_files_and_every_start_is_equally_likely(tmp_path):
    """3,600 draws of 5 + 1 tokens from 18 starts, within 5 sigma; one file is shorter than that."""
    parts = [*range(12)], [*range(100, 103)], [*range(200, 208)]
    for i, part in enumerate(parts):
        write(tmp_path / f"t{i}.bin", part)
    tokens, text = gpt2.Tokens(tmp_path / "t*.bin", 257), np.concatenate(parts)
    ids, targets = tokens.batch(np.random.default_rng(0), 3600, 5)
    starts = np.searchsorted(text, ids[:, 0])
    windows = starts[:, None] + np.arange(5)
    assert (ids == text[windows]).all() and (targets == text[windows + 1]).all()
    counts = np.bincount(starts, minlength=18)
    assert len(counts) == 18 and np.abs(counts - 200).max() < 5 * math.sqrt(200)


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
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # pytest keeps its own handlers
    make_tokens(tmp_path)

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words(*arguments)])
        with pytest.raises(SystemExit) as end:
            gpt2.run_program(gpt2.main)
        return end.value.code
    return program


PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def run(program, *arguments, cwd, **options):
    """One of the programs as a process without a network: every proxy is a closed port."""
    env = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}
    env = os.environ | env | {"TIKTOKEN_CACHE_DIR": str(Path(cwd) / "no_tiktoken")}
    return subprocess.run([sys.executable, "-E", HERE / program, *words(*arguments)], cwd=cwd,
                          env=env, timeout=120, **PIPES | options)


def start(*arguments, launcher="", program=HERE / "train_gpt2.py"):
    """train_gpt2.py as a process, or as those of a launcher, started."""
    return subprocess.Popen([sys.executable, *words(launcher), program, *words(*arguments)],
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
                            **PIPES)


def rows(out):
    """The rows of a run's log."""
    with open(Path(out) / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def samples(text):
    """The texts between two rules of 80 dashes."""
    return re.findall("-{80}\n(.*?)\n-{80}", text, re.S)


def mean_loss(model, ids, T):
    """The mean loss of all ids but the first, one sequence of at most T at a time."""
    parts = [ids[i:i + T + 1] for i in range(0, len(ids) - 1, T)]
    losses = [model.forward([part[:-1]], [part[1:]]) * (len(part) - 1) for part in parts]
    return sum(losses) / (len(ids) - 1)


@pytest.mark.parametrize("batch_size, eval_tokens, n", [
    (1, 1, 1), (1, 7, 7), (1, 3001, 3001), (1, 9001, 9001), (1000, 9002, 9001), (1000, 0, 9001)])
def test_validation_predicts_every_token_once(tmp_path, monkeypatch, batch_size, eval_tokens, n):
    """Up to the limit. A forward takes as many as training's memory allows, at least 1,024."""
    config, ids, seen = gpt2.GPTConfig(32, 4, 12, 1, 3), np.arange(9002) * 7 % 32, []
    for name, part in ("t0", ids[:2001]), ("t1", ids[2001:]):
        write(tmp_path / f"{name}.bin", part)
    tokens, model = gpt2.Tokens(tmp_path / "t?.bin", 32), perturbed(config)
    forward, expected = model.forward, mean_loss(model, ids[:n + 1], 4)
    monkeypatch.setattr(model, "forward", lambda *batch, **options: (
        seen.append(batch), forward(*batch, **options))[1])
    args = types.SimpleNamespace(seq_len=4, batch_size=batch_size, eval_tokens=eval_tokens)
    assert gpt2.evaluate(model, tokens, args) == pytest.approx(expected, abs=1e-12)
    for i, batches in enumerate(zip(*seen)):
        assert (np.concatenate([batch.ravel() for batch in batches]) == ids[i:n + i]).all()
    room, one = (gpt2.count(gpt2.activation_table(config, B, 4, for_backward))
                 for B, for_backward in ((batch_size, True), (1, False)))
    assert seen[0][0].size == min(n // 4 * 4 or n, max(1024, room // one * 4))


def test_progress_is_one_line_on_a_terminal_and_stdout_needs_no_reconfigure(train, monkeypatch):
    out, err = [], []
    for name, said in ("stdout", out), ("stderr", err):
        monkeypatch.setattr(sys, name, types.SimpleNamespace(
            write=said.append, flush=lambda: None, isatty=lambda: True))
    assert train(TINY, "--steps 1 --max_new_tokens 0") == 0 and "step 1/1 | loss" in "".join(out)
    assert "\rvalidation: 199 of 199 tokens" in "".join(err) and "\n" not in "".join(err)


@pytest.mark.parametrize("unit", [1e-4, 100])
def test_log_and_output_have_the_numbers_of_every_step(train, capsys, monkeypatch, unit):
    """Loss and gradient of all micro-batches before the step, the validation loss after it.

    Step n takes n units of time by the clock; a line has the mean since the line before.
    """
    clock, train_step = [0], gpt2.train_step

    def timed_step(model, *rest):
        clock[0] += unit * (model.step + 1)
        return train_step(model, *rest)
    monkeypatch.setattr(gpt2, "train_step", timed_step)
    monkeypatch.setattr(gpt2, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert train(TINY, "--steps 4 --grad_accum 2 --eval_every 2 --log_every 3 --lr 0.01 --seed 5 "
                 "--beta1 0.8 --beta2 0.9 --weight_decay 0.3 --grad_clip 0.05") == 0
    said, log, tokens = capsys.readouterr().out, rows("out"), 2 * 6 * 16
    steps = {name: "".join(row["step"] for row in log if row[name]) for name in log[0]}
    assert steps == {"step": "1234", "loss": "134", "val_loss": "24", "norm": "134", "lr": "134",
                     "ms": "134", "tokens_per_second": "134"}
    model, rng = gpt2.GPT2(TINY_CONFIG, seed=5), np.random.default_rng([5, 1])
    train_tokens, val_tokens = (gpt2.Tokens(f"{name}.bin", 257) for name in ("train", "val"))
    for step, row in enumerate(log, 1):
        batch = np.concatenate([train_tokens.batch(rng, 6, 16) for _ in range(2)], axis=1)
        loss, lr = model.forward(*batch), gpt2.learning_rate(step, 4, 5, 0.01, 1e-4)
        model.backward()
        norm, seconds = model.update(lr, 0.8, 0.9, 1e-8, 0.3, 0.05), unit * (0, 1, 0, 2.5, 4)[step]
        if row["loss"]:
            gflops = tokens * (6 * model.flat_params.size + 12 * 16 * (16 / 2)) / seconds / 1e9
            left = time.strftime("%H:%M:%S", time.gmtime(round(seconds * (4 - step))))
            found = [float(row[name]) for name in ("loss", "norm", "lr", "ms")]
            assert found == pytest.approx([loss, norm, lr, 1000 * seconds], rel=1e-5)
            assert int(row["tokens_per_second"]) == round(tokens / seconds)
            assert (f"step {step}/4 | loss {loss:.4f} | norm {norm:.2f} | lr {lr:.2e} | "
                    f"{1e3 * seconds:3.0f} ms | {tokens / seconds:5.0f} tok/s | "
                    f"{gflops:3.0f} GFLOP/s | {left.removeprefix('0')} left\n") in said
        if row["val_loss"]:
            val = mean_loss(model, val_tokens.read(0, 200), 16)
            assert float(row["val_loss"]) == pytest.approx(val, abs=2e-6)
            assert f"step {step} | val loss {val:.4f}\n" in said


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


@DTYPES
def test_what_is_saved_is_what_is_loaded_bit_for_bit(tmp_path, dtype):
    model, path = saved_model(tmp_path, dtype=dtype), tmp_path / "model.safetensors"
    again = gpt2.GPT2.from_pretrained(tmp_path, dtype)
    assert again.config == SMALL and again.flat_params.tobytes() == model.flat_params.tobytes()
    index, numbers = tensors_of(path)
    assert index.pop("__metadata__") == {"format": "pt"}
    assert {*index} == {f"transformer.{name}" for name in model.params}
    assert (path.stat().st_size - len(numbers)) % 8 == 0
    one, other = (json.dumps(index[f"transformer.h.0.ln_1.{name}"]["data_offsets"]).encode()
                  for name in ("weight", "bias"))
    path.write_bytes(path.read_bytes().replace(one, other))  # two in one place leave a gap
    with pytest.raises(gpt2.UserError, match="model.safetensors: not a safetensors file"):
        gpt2.GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype, convert, expected", [
    ("F32", np.float32, np.float32), ("F16", np.float16, np.float16),
    ("BF16", lambda x: (x.view(np.uint32) >> 16).astype(np.uint16),
     lambda x: (x.view(np.uint32) & 0xFFFF0000).view(np.float32))])
def test_files_in_the_wild_are_read(tmp_path, dtype, convert, expected):
    """No prefix, a stored lm_head, old causal masks, half precision, n_inner null."""
    model, path = saved_model(tmp_path), tmp_path / "model.safetensors"
    tensors = {name: convert(x) for name, x in model.params.items()}
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
                "h.1.attn.masked_bias": np.ones((), np.float32),
                "lm_head.weight": tensors["wte.weight"]}
    gpt2.write_tensors(path, tensors)
    if dtype == "BF16":
        path.write_bytes(path.read_bytes().replace(b'"F16", ', b'"BF16",'))
    config = json.loads((tmp_path / "config.json").read_text()) | {"n_inner": None, "other": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = gpt2.GPT2.from_pretrained(tmp_path)
    assert (found.flat_params == expected(model.flat_params)).all() and found.config == SMALL


@pytest.mark.parametrize("name, array, message", [
    ("h.1.mlp.c_fc.bias", None, r"h.1.mlp.c_fc.bias is missing, but \(48,\)"),
    ("extra", np.ones(1), r"extra is \(1,\), but missing"),
    ("ln_f.bias", np.ones((6, 2)), r"ln_f.bias is \(6, 2\), but \(12,\)"),
    ("ln_f.bias", np.ones(12, np.int8), "not a safetensors file of floats"),
    ("lm_head.weight", np.ones((17, 12)), "lm_head.weight differs from wte")])
def test_weights_that_do_not_fit_are_errors_by_name(tmp_path, name, array, message):
    tensors, path = saved_model(tmp_path).params | {name: array}, tmp_path / "model.safetensors"
    gpt2.write_tensors(path, {n: x for n, x in tensors.items() if x is not None})
    with pytest.raises(gpt2.UserError, match=f"model.safetensors: {message}"):
        gpt2.GPT2.from_pretrained(tmp_path)


def test_mutated_weight_files_are_errors_or_load_to_what_they_hold(tmp_path):
    """1,000 times, up to four bytes are replaced, or there are more or fewer than before."""
    saved_model(tmp_path)
    path, rng, loaded = tmp_path / "model.safetensors", np.random.default_rng(7), 0
    original = path.read_bytes()
    for _ in range(1000):
        start, n = rng.integers([rng.choice([3000, len(original)]), 5])
        stop = start + rng.choice([n, n, n, 3, 5000])
        new = bytes(rng.choice([*b'0123456789FB,:{"\xff'], n).tolist())
        path.write_bytes(original[:start] + new + original[stop:])
        try:
            model = gpt2.GPT2.from_pretrained(tmp_path)
        except gpt2.UserError as error:
            assert "model.safetensors" in str(error) and "\n" not in str(error)
            continue
        loaded += 1
        index, numbers = tensors_of(path)
        for name, x in model.params.items():
            entry = index.get(f"transformer.{name}") or index[name]
            assert x.tobytes() == numbers[slice(*entry["data_offsets"])], name
    assert 50 < loaded < 750


def test_a_checkpoint_opens_in_transformers_with_the_same_tokens_and_numbers(tmp_path, tokenizer):
    """Logits and every gradient in float64, and greedy generation. Measured: 3e-15.

    GPT-2's tokenizer files have the SHA-256 of OpenAI's encoder.json and vocab.bpe.
    """
    files = gpt2.tokenizer_files(tokenizer, 16)
    if tokenizer.name == "byte":
        vocab = json.loads(files["vocab.json"])
        assert {*vocab.values()} == {*range(257)} and vocab["<|endoftext|>"] == 256
        assert [vocab[x] for x in "A~¡ÿĀĠĊŃ"] == [65, 126, 161, 255, 0, 32, 10, 173]
    else:
        assert [hashlib.sha256(files[x]).hexdigest() for x in ("vocab.json", "merges.txt")] == [
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"]
    transformers = pytest.importorskip("transformers")
    model = perturbed(gpt2.GPTConfig(tokenizer.n_vocab, 16, 12, 2, 3))
    gpt2.save_checkpoint(tmp_path, model, files, {})
    folder, prompt = gpt2.find_model(tmp_path), tokenizer.encode("ROMEO:")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [TEXT, "", " a", "It's  1234", *TEXT.split()]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    assert theirs.model_max_length == 16 and theirs.eos_token_id == tokenizer.eot_token
    pipe = transformers.pipeline("text-generation", str(folder))
    said = pipe("ROMEO:", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ours = [int(token[0]) for token in gpt2.generate(model, [prompt], 4, temperature=0)]
    assert said == tokenizer.decode(prompt + ours)
    network = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    ids, targets = random_ids(model.config, 3, 16)
    logits = network(torch.tensor(ids)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    grads = {name.removeprefix("transformer."): x.grad for name, x in network.named_parameters()}
    agree(our_results(model, ids, targets), {"loss": loss, "logits": logits} | grads, 1e-13)


def checkpoint_is_whole(folder):
    """Assert that a checkpoint has all files, none left over, and the numbers it was saved with."""
    state = gpt2.read_json(folder / "trainer.json")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "optimizer.safetensors", "tokenizer_config.json", "trainer.json", "vocab.json"]
    assert folder.name == f"step_{gpt2.load_checkpoint(folder, state).step:06}"


def result_of(out, steps):
    """What must be the same: the log without its times, and the last checkpoint's state."""
    log = [[row[name] for name in ("step", "loss", "val_loss", "norm", "lr")] for row in rows(out)]
    state = gpt2.read_json(Path(out) / f"step_{steps:06}" / "trainer.json")
    return log, state["rngs"], state["crc32"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """ENOSPC at the first write of a save, at the second, and so on, until one succeeds."""
    model, files, failures = gpt2.GPT2(SMALL), {"vocab.json": b"{}"}, 0
    model.step = 999_999
    gpt2.save_checkpoint(tmp_path, model, files, {})

    class Full(io.FileIO):
        def write(self, data):
            writes.append(data)
            if len(writes) > failures:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)
    monkeypatch.setattr(gpt2, "open", Full, raising=False)
    model.step = 1_000_000
    while len(gpt2.checkpoints(tmp_path)) < 2:
        writes = []
        try:
            gpt2.save_checkpoint(tmp_path, model, files, {})
        except OSError as error:
            assert error.errno == errno.ENOSPC and os.listdir(tmp_path) == ["step_999999"]
            failures += 1
    # config, length and header and tensors of two files, vocab.json, trainer.json
    assert failures == 2 + 2 + len(model.params) + 2 + 2 + 1 + 1
    model.step, failures = 1_000_001, 99
    gpt2.save_checkpoint(tmp_path, model, files, {})
    assert sorted(os.listdir(tmp_path)) == ["step_1000000", "step_1000001"]
    for folder in gpt2.checkpoints(tmp_path):
        gpt2.load_checkpoint(folder, gpt2.read_json(folder / "trainer.json"))
    assert gpt2.find_model(tmp_path) == folder == tmp_path / "step_1000001"


RARELY = "--eval_every 1000 --sample_every 1000"


def read_until(text, process):
    """Read a process's stdout until it has said this; returns all of it."""
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"ended before {text!r}: {seen}{process.stderr.read()}"
        seen += line
    return seen


@pytest.mark.skipif(os.name != "posix", reason="Windows has other signals and pipes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_a_run_that_is_stopped_resumes_bit_for_bit(train, number, capfd):
    """None stands for a closed pipe, which ends a run quietly."""
    assert train(TINY, "--steps 400 --out whole") == 0
    whole, process = capfd.readouterr().out, start(TINY, "--steps 400 --out run")
    seen = read_until("step   7/", process)
    if number is None:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)
    else:
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "stopping after this step" in errors
        stopped, seen = int(gpt2.checkpoints("run")[-1].name[5:]), seen + rest
        assert 7 <= stopped < 400 and f"stopped after step {stopped}, saved in run" in rest
    os.renames("run", "elsewhere/moved")  # a moved run resumes and writes where it now is
    os.chdir("elsewhere")
    assert train("--resume --threads 3 --out moved") == 0
    assert result_of("moved", 400)[2] == result_of("../whole", 400)[2]
    if number:  # after a closed pipe, the last step may lack a validation loss and a sample
        assert result_of("moved", 400) == result_of("../whole", 400)
        assert samples(seen + capfd.readouterr().out) == samples(whole) != []


def test_a_run_killed_at_any_moment_resumes_from_a_whole_checkpoint(train):
    """Kills at random moments of a run that does little but save."""
    options = f"{TINY} --steps 300 --save_every 1 {RARELY}"
    assert train(options, "--out whole") == 0
    rng = np.random.default_rng(4)
    for _ in range(10):
        resumed = "--resume --steps 300" if gpt2.checkpoints("killed") else options
        process = start(resumed, "--out killed")
        process.stdout.readline()  # its first word: everything is imported
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        for folder in gpt2.checkpoints("killed")[-2:]:
            checkpoint_is_whole(folder)
    train("--resume --out killed")  # unless it has done all steps
    assert result_of("killed", 300) == result_of("whole", 300)
    assert sorted(os.listdir("killed")) == ["log.csv", "step_000299", "step_000300"]


def test_what_is_given_with_resume_wins_and_the_rest_is_as_saved(train, capsys):
    assert train(TINY, "--steps 6 --save_every 3 --lr 0.01 --seed 9 --top_k 5") == 0
    assert train("--resume --steps 9 --lr 0.02 --warmup 0") == 0
    assert [row["step"] for row in rows("out")] == [str(i) for i in range(1, 10)]
    assert float(rows("out")[7]["lr"]) == pytest.approx(gpt2.learning_rate(8, 9, 0, 0.02, 1e-4))
    state = gpt2.read_json(Path("out/step_000009/trainer.json"))
    assert {"seed": 9, "top_k": 5, "lr": 0.02, "steps": 9}.items() <= state["options"].items()
    assert train("--resume --steps 10 --train_bin val.bin --val_bin train.bin") == 0
    assert re.search(r"train +200 byte tokens in .*val.bin\n", capsys.readouterr().out)
    for arguments, message in [
            ("--n_embd 32", "--n_embd 32 does not fit .*, which has 16; leave it out"),
            ("--tokenizer gpt2", "--tokenizer gpt2 does not fit .* byte"),
            ("", "--steps 10: the run has done so many already; give more")]:
        assert train("--resume", arguments) == 2
        assert re.fullmatch(f"train_gpt2.py: error: .*{message}.*\n", capsys.readouterr().err)


def test_a_damaged_checkpoint_is_an_error_and_the_one_before_it_opens(train, capsys):
    assert train(TINY, "--steps 6 --save_every 3") == 0
    for name in "config.json", "model.safetensors", "optimizer.safetensors", "trainer.json":
        path = Path("out/step_000006", name)
        data = path.read_bytes()
        changed = b"{}" if "json" in name else data[:-1] + bytes([data[-1] ^ 4])
        for damaged in data[:len(data) // 2], b"", changed:
            path.write_bytes(damaged)
            assert train("--resume --steps 8") == 2
            assert re.fullmatch(f"train_gpt2.py: error: out.step_000006.{name}.*\n",
                                capsys.readouterr().err)
        path.write_bytes(data)
    shutil.rmtree("out/step_000006")
    assert train("--resume --steps 8") == 0 and len(rows("out")) == 8


def test_an_earlier_run_is_renamed(train, capsys):
    for seed in 1, 2, 3:
        assert train(TINY, "--steps 1 --out runs/out/ --seed", seed) == 0
    assert capsys.readouterr().out.count("held an earlier run, which is now") == 2
    for seed, out in (1, "out.1"), (2, "out.2"), (3, "out"):
        state = gpt2.read_json(f"runs/{out}/step_000001/trainer.json")
        assert state["options"]["seed"] == seed and len(rows(f"runs/{out}")) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(train, capsys):
    assert train(TINY, "--steps 300 --save_every 1 --lr 1e37 --grad_clip 0 --warmup 2") == 2
    step = re.fullmatch(r"train_gpt2.py: error: step (\d+): the loss is .*, the gradient's "
                        r"norm .*; lower --lr 1e\+37 .*\n", capsys.readouterr().err)[1]
    assert gpt2.checkpoints("out")[-1].name == f"step_{int(step) - 1:06}"
    checkpoint_is_whole(gpt2.checkpoints("out")[-1])


def test_init_from_with_steps_trains_on_with_the_models_own_tokenizer_files(train, capsys):
    """An unfinished save was left in the folder, of which nothing gets into the checkpoint."""
    saved_model("m", TINY_CONFIG)
    gpt2.write_file("out/unfinished/model.safetensors.123.tmp", b"half")
    for name in "tokenizer.json", "vocab.json", "merges.txt", "readme":
        Path("m", name).write_bytes(f"my {name}\r\n".encode())
    assert train("--init_from m --steps 1 --prompt To", FILES) == 0
    said = capsys.readouterr().out
    assert samples(said)[0].startswith("To")
    assert re.match(r"model +m: [\d,]+ parameters, GPTConfig\(", said)
    assert float(rows("out")[0]["lr"]) == pytest.approx(1e-4 / 100)  # fine-tuning, warm-up
    assert sorted(os.listdir("out")) == ["log.csv", "step_000001"]
    assert {*os.listdir("out/step_000001")} == {
        "tokenizer.json", "vocab.json", "merges.txt", "config.json", "model.safetensors",
        "generation_config.json", "optimizer.safetensors", "trainer.json"}
    assert Path("out/step_000001/vocab.json").read_bytes() == b"my vocab.json\r\n"


def test_options_come_from_the_preset(tmp_path):
    saved_model(tmp_path, TINY_CONFIG)
    for arguments, expected in ((["--seed", "1"], (3, 12, 5500, 3e-3, 0.99)),
                                (["--model", "gpt2"], (12, 4, 1000, 3e-4, 0.95)),
                                (["--model", "gpt2-xl"], (48, 4, 1000, 3e-4, 0.95)),
                                (["--init_from", str(tmp_path)], (1, 4, 1000, 1e-4, 0.95))):
        args, _ = gpt2.parse_arguments(arguments)
        assert (args.n_layer, args.batch_size, args.steps, args.lr, args.beta2) == expected


def test_a_sample_has_whole_characters_and_a_long_prompt_gets_a_note(monkeypatch, capsys):
    def generate(model, ids, *options):
        assert ids == [[*b"Oh, so long"]] and options == (3, 1, 2, 0.5, None)
        return (np.array([byte]) for byte in "é!".encode() + b"\xc3")
    monkeypatch.setattr(gpt2, "generate", generate)
    args = types.SimpleNamespace(prompt="Oh, so long", tokenizer="byte", max_new_tokens=3,
                                 temperature=1, top_k=2, top_p=0.5)
    gpt2.print_sample(perturbed(SMALL), gpt2.Tokenizer("byte"), args, None)
    said = capsys.readouterr()
    assert said.out == "Oh, so longé!\ufffd\n"
    assert said.err == "the prompt has 11 tokens, the last 8 are used\n"


def test_the_default_run_learns_and_is_the_same_on_any_number_of_threads(tmp_path):
    """Without a network, from Python's own text. A resumed run keeps the four shards it began with.

    Measured: the validation loss falls from 5.55 = log 257 to 2.55 in 100 steps.
    """
    result = run("train_gpt2.py", "--steps 100 --eval_every 50 --save_every 50 --max_new_tokens 50 "
                 "--threads 4", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert re.match(".*tinyshakespeare.* could not be downloaded.*pydoc_data", result.stdout)
    losses = [float(x) for x in re.findall(r"^step +\d+ \| val loss (\S+)", result.stdout, re.M)]
    assert len(losses) == 2 and losses[1] < 2.7 and len(samples(result.stdout)) == 1
    assert gpt2.read_json(tmp_path / "out" / "step_000100" / "trainer.json")["shards"] == 4
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "step_000100")
    again = run("train_gpt2.py", "--resume --out again --threads 1", cwd=tmp_path)
    assert result_of(tmp_path / "again", 100) == result_of(tmp_path / "out", 100)
    assert samples(again.stdout) == samples(result.stdout)


def test_help_has_every_option_and_a_closed_pipe_ends_it_quietly(tmp_path):
    result = run("train_gpt2.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    for text in ["(default: out)", *(f"--{x[0]}" for x in gpt2.OPTIONS if len(x) == 5)]:
        assert text in result.stdout
    assert "(default: 5500 or, for gpt2, 1000)" in " ".join(result.stdout.split())
    if os.name == "posix":
        reading, writing = os.pipe()
        os.close(reading)
        result = run("train_gpt2.py", "--help", cwd=tmp_path, stdout=writing)
        os.close(writing)
        assert (result.returncode, result.stderr) == (141, "")


def test_alone_in_a_folder_it_trains_resumes_and_samples(tmp_path):
    """train_gpt2.py without prepro_tinyshakespeare.py; and with no tokens, it says what to do."""
    program = shutil.copy(HERE / "train_gpt2.py", tmp_path)
    result = run(program, cwd=tmp_path)
    assert result.returncode == 2 and re.fullmatch(
        "train_gpt2.py: error: .*prepro_tinyshakespeare.py.*--train_bin.*\n", result.stderr)
    make_tokens(tmp_path)
    for name in "torch", "tiktoken":  # what is not needed is not imported
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    sampling, said = "--init_from out --num_samples 2 --prompt ROMEO: --seed", []
    for arguments in (f"{TINY} --steps 3", "--resume --steps 5", "--init_from out",
                      f"{sampling} 7", f"{sampling} 7", f"{sampling} 8"):
        result = run(program, arguments, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        said.append(result.stdout)
    empty, first, second = said[3].split("ROMEO:")
    assert empty == "" and first != second and said[3] == said[4] != said[5]
    assert said[2].startswith("\n") and len(rows(tmp_path / "out")) == 5


def test_prepro_makes_token_files_of_any_text_and_steps_0_validates_and_samples(train, capsys):
    """With the command that prepro prints."""
    text = "Es war einmal — né.\n" * 50
    Path("novel.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    result = run("prepro_tinyshakespeare.py", "--text novel.txt", cwd=".")
    assert result.returncode == 0 and "novel_byte_train.bin: 1,035 byte tokens" in result.stdout
    command = re.search("now run: python train_gpt2.py (.*)\n", result.stdout)[1]
    files = [gpt2.Tokens(path, 257) for path in re.findall(r"\S+\.bin", command)]
    assert gpt2.Tokenizer("byte").decode(np.concatenate([x.read(0, len(x)) for x in files])) == text
    assert train(command, "--steps 0 --prompt The --max_new_tokens 5") == 0
    said = capsys.readouterr().out
    assert re.search(r"^val loss 5\.\d{4}\nThe", said, re.M) and " ms |" not in said
    assert not Path("out").exists()


@pytest.mark.parametrize("program, arguments, content, message", [
    ("prepro", "--text novel.txt", b"", "novel.txt: the file is empty"),
    ("prepro", "--text novel.txt", b"ab\xff", "novel.txt: byte 2 is not UTF-8"),
    ("prepro", "--text novel.txt", b"a", "novel: 1 characters are too few"),
    ("prepro", "", b"a", "https://.*/input.txt could not be downloaded: .*tinyshakespeare.txt"),
    ("prepro", "--tokenizer gpt2 --text novel.txt", b"a", "GPT-2's tokens need the package"),
    ("train", "--init_from gpt2", b"", "https://.*/gpt2/.* not be downloaded: .*hf download")])
def test_what_is_missing_gets_one_line_and_status_2(tmp_path, program, arguments, content, message):
    """Run as scripts: train_gpt2.py must know the UserError of the module that prepro imports."""
    (tmp_path / "novel.txt").write_bytes(content)
    program = {"prepro": "prepro_tinyshakespeare.py", "train": "train_gpt2.py"}[program]
    result = run(program, arguments, cwd=tmp_path)
    assert result.returncode == 2 and not list(tmp_path.rglob("*.bin"))
    assert re.fullmatch(f"{program}: error: .*{message}.*\n", result.stderr), result.stderr


def config(**changes):
    """A function that makes a model in m/, with these changes in its config.json."""
    def making():
        saved_model("m", TINY_CONFIG)
        found = json.loads(Path("m/config.json").read_text())
        Path("m/config.json").write_text(json.dumps(found | changes))
    return making


FROM_M, BAD = "--init_from m --prompt x", "--train_bin bad.bin --val_bin val.bin --steps 1"
HUGE = gpt2.GPTConfig(257, 64, 10**5, 1, 1)  # parameters, two moments, gradients of two shards
GB = 4e-9 * (gpt2.count(gpt2.activation_table(HUGE, 2000, 64))
             + 5 * gpt2.count(gpt2.parameter_table(HUGE)))
BAD_INPUT = [  # the command line, what the message says, what has to be there
    *[(f"--{x[0]} {x[2] - 1}", f"--{x[0]} must be (at least|from) {x[2]}.*, not {x[2] - 1}", None)
      for x in gpt2.OPTIONS if len(x) == 5 and x[2] is not None],
    *[(f"--{name} {value}", f"--{name} must be .*, not {value}", None) for name, value in [
        ("lr", "nan"), ("lr", "inf"), ("beta1", 1.0), ("beta2", 1.0), ("top_p", 1.5)]],
    *[(FROM_M, f"config.json: {name} is {value!r}", config(**{name: value})) for name, value in [
        ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True),
        ("n_inner", 100), ("scale_attn_weights", False), ("add_cross_attention", True),
        ("tie_word_embeddings", False), ("layer_norm_epsilon", 1e-6), ("model_type", "llama"),
        ("n_embd", "12"), ("n_layer", None), ("n_head", 0), ("n_positions", True)]],
    ("--n_heads 3", "unrecognized arguments: --n_heads", None),
    ("--model gpt2 --init_from m", "--model, --init_from and --resume", config()),
    (f"--n_embd 18 --n_head 4 {FILES}", "n_embd 18 .* n_head 4", None),
    ("--seq_len 65", "--seq_len 65 is more than --n_positions 64; lower", None),
    ("--train_bin train.bin", "--train_bin .*--val_bin", None),
    ("--train_bin no*.bin --val_bin val.bin", "no[*].bin: no such file", None),
    (f"{TINY} --steps 1 --out val.bin", "val.bin.*; check the path", None),
    ("--resume", "--resume: out has no checkpoint", None),
    ("--init_from nowhere", "nowhere.config.json'; check the path", None),
    ("--init_from m --n_embd 32", "--n_embd 32 does not fit m, which has 16", config()),
    (f"{FROM_M} --tokenizer gpt2", "need the package tiktoken .*: pip install tiktoken", config()),
    ("--init_from .", "not a JSON object", lambda: Path("config.json").write_text("[1]")),
    (FROM_M, "m .*; give the --tokenizer", config(vocab_size=300)),
    *[(BAD, "bad.bin: not a token file", lambda case=case: write(Path("bad.bin"), *case))
      for case in [(range(20), (1234, 1, 20)), (range(20), (20240520, 2, 20)), ([5], None),
                   (range(20), (20240520, 1, 19)), (range(20), None, b"x"), ([], None)]],
    (BAD, "bad.bin: .* --seq_len 64", lambda: write(Path("bad.bin"), range(64))),
    (f"{TINY} --val_bin *.bin --steps 0", "bad.bin: id 257 is outside the vocabulary of 257",
     lambda: write(Path("bad.bin"), [9, 257])),
    (BAD, "bad.bin.*check the path", lambda: Path("bad.bin").mkdir()),
    (f"--n_layer 1 --n_head 1 --n_embd {10**5} --batch_size 2000 --threads 2 {FILES}",
     f"need {GB:,.1f} GB .* has [0-9.,]+; lower", None)]


@pytest.mark.parametrize("arguments, message, making", BAD_INPUT)
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
    said = capsys.readouterr().err
    assert re.fullmatch(f"train_gpt2.py: error: .*({message}).*\n", said), said
    assert before <= {path.read_bytes() for path in Path().rglob("*") if path.is_file()}


CONTENT = np.random.default_rng(0).bytes(300000)
FOUND = b"HTTP/1.0 200 OK\r\nContent-Length: 300000\r\n\r\n"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server that sends server.answer, and hangs up after so many seconds of silence."""
    def respond(connection, address, web):
        connection.recv(9999)
        connection.sendall(web.answer)
        time.sleep(web.silence)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepro, "TIMEOUT", 0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), respond) as web:
        web.url, web.silence = f"http://127.0.0.1:{web.server_port}/f", 0
        threading.Thread(target=web.serve_forever, args=[0.01], daemon=True).start()
        yield web
        web.shutdown()


@pytest.mark.parametrize("how, reason", [
    ("404", ".*Not Found"), ("silent", "timed out|no answer within 0.2 .*"),
    ("breaks off", "the connection ended after 150,000 of 300,000 bytes"),
    ("another file", "the SHA-256 is [0-9a-f]{64}, not 00"),
    ("no such name", "no answer within 0.2 seconds")])
def test_a_download_that_fails_leaves_nothing_and_says_why(server, monkeypatch, how, reason):
    """Also where the look-up of the name takes for ever, it gives up."""
    answers = {"404": b"HTTP/1.0 404 Not Found\r\n\r\n", "another file": FOUND + CONTENT}
    server.answer = answers.get(how, FOUND + CONTENT[:150000])
    server.silence, start = 2 * (how == "silent"), time.monotonic()
    if how == "no such name":
        monkeypatch.setattr("socket.getaddrinfo", lambda *args: threading.Event().wait())
    with pytest.raises(gpt2.UserError, match=f"/f could not be downloaded: ({reason}); by hand"):
        prepro.download(server.url, "w", "by hand", "00")
    assert os.listdir() == [] and time.monotonic() - start < 3


def test_a_download_appears_whole_and_models_are_downloaded_by_name(server, monkeypatch):
    for server.answer in b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT, FOUND + CONTENT:
        prepro.download(server.url, "w", "", hashlib.sha256(CONTENT).hexdigest())
        assert Path("w").read_bytes() == CONTENT and os.listdir() == ["w"]
        os.remove("w")
    monkeypatch.setattr(prepro, "MODEL_URL", server.url + "/{}/{}")
    assert gpt2.find_model("gpt2") == Path("data/gpt2")
    assert Path("data/gpt2/model.safetensors").read_bytes() == CONTENT
    monkeypatch.setattr(prepro, "MODEL_URL", None)
    prepro.download_model("gpt2")  # it is there: no second download
    assert gpt2.find_model("gpt2") == Path("data/gpt2")


# ------------------------------------------------------------------------------------------------
# Several processes, under torchrun.

def torchrun(*arguments, **options):
    """Two processes, started."""
    if sys.platform != "linux":
        pytest.skip("gloo is tested on Linux")
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2"
    return start(*arguments, launcher=launcher, **options)


def finish(process, succeeds=True):
    """What torchrun's processes print until they end: (stdout, stderr)."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode == 0) == succeeds, err
    return out, err


def test_two_processes_train_as_one_does_and_any_number_resumes_a_run(train, capsys):
    """One run has one process all along, the other has two, then one, then two again. Measured:
    equal to the log's last digit, in 40 steps."""
    assert train(TINY, "--steps 20 --out one") == 0
    one, (two, _) = capsys.readouterr().out, finish(torchrun(TINY, "--steps 20 --out two"))
    assert samples(one) == samples(two) != []
    assert "processes 2," in two and two.count("| network ") == two.count("| lr ") == 20
    assert "processes 1," in one and "network" not in one
    assert train("--resume --steps 30 --out one") == train("--resume --steps 30 --out two") == 0
    assert train("--resume --steps 40 --out one") == 0
    finish(torchrun("--resume --steps 40 --out two"))
    one, two = ([[float(row[name] or 0) for name in ("loss", "val_loss", "norm")]
                 for row in rows(out)] for out in ("one", "two"))
    assert len(one) == 40
    np.testing.assert_allclose(two, one, rtol=1e-5)
    out, err = finish(torchrun("--init_from one --prompt Ohé --max_new_tokens 0"))
    assert out == "Ohé\n" and "error" not in err  # a sample is printed once
    _, err = finish(torchrun(TINY, "--batch_size 7"), succeeds=False)
    assert "--batch_size 7 cannot be shared equally among 2 processes; give a multiple" in err


def test_an_earlier_run_is_renamed_when_every_process_has_read_its_weights(train):
    assert train(TINY, "--steps 1") == 0
    Path("late.py").write_text("""
import os, time, train_gpt2 as gpt2
read = gpt2.read_tensors
gpt2.read_tensors = lambda *args: (time.sleep(int(os.environ["RANK"])), read(*args))
gpt2.run_program(gpt2.main)
""")
    out, _ = finish(torchrun(FILES, "--init_from out --steps 1", program="late.py"))
    assert "out held an earlier run, which is now out.1" in out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_run_and_leaves_a_whole_checkpoint(train, rank):
    """torchrun is killed before, so the other process has to notice by itself."""
    process = torchrun(TINY, RARELY, "--steps 50000 --save_every 5")
    read_until("step    20/", process)
    children = " ".join(path.read_text() for path in Path("/proc").glob(
        f"{process.pid}/task/*/children"))
    process.kill()
    os.kill(sorted(map(int, children.split()))[rank], signal.SIGKILL)
    _, err = finish(process, succeeds=False)
    assert f"train_gpt2.py: error: rank {1 - rank} lost the connection to another process" in err
    checkpoint_is_whole(gpt2.checkpoints("out")[-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_that_are_stopped_save_first(train, number):
    process = torchrun(TINY, RARELY, "--steps 100000")
    seen = read_until("step     20/", process)
    process.send_signal(number)
    out, err = finish(process, succeeds=False)
    folder = gpt2.checkpoints("out")[-1]
    assert f"stopped after step {int(folder.name[5:])}, saved in out" in seen + out
    assert "lost the connection" not in err
    checkpoint_is_whole(folder)


def test_only_a_lost_connection_is_called_one_and_processes_wait_for_days(monkeypatch):
    def fail(error):
        raise error
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "distributed", types.SimpleNamespace(
        all_reduce=fail, destroy_process_group=waits.clear,
        init_process_group=lambda *args, timeout: waits.append(timeout.days)))
    monkeypatch.setattr(torch, "from_numpy", RuntimeError)
    processes = gpt2.Processes()
    assert waits[0] >= 1 and (processes.own(np.arange(6)) == [3, 4, 5]).all()
    for message in "Connection closed by peer [::1]:1", "connection reset", "Timed out waiting":
        with pytest.raises(gpt2.UserError, match="rank 1 lost the connection.*; start all again"):
            processes.all_reduce(message)
    with pytest.raises(RuntimeError, match="unsupported dtype"):
        processes.all_reduce("unsupported dtype")


@pytest.mark.parametrize("name, i", [(name, i) for name, results in (
    ("embedding", 2), ("layernorm", 3), ("linear", 3), ("attention", 3), ("gelu", 1),
    ("crossentropy", 1)) for i in range(results)])
def test_a_corrupted_backward_is_noticed(name, i, monkeypatch):
    """One result of one backward function is 0.1% too large: the comparison must fail."""
    function = getattr(gpt2, f"{name}_backward")
    added = name == "embedding" or name in ("layernorm", "linear") and i > 0

    def corrupted(*args):
        before = np.copy(args[i]) if added else 0
        function(*args)
        if args[i] is not None:  # the last layer has no bias
            args[i][...] += 0.001 * (args[i] - before)
    monkeypatch.setattr(gpt2, f"{name}_backward", corrupted)
    with pytest.raises(AssertionError, match="off by more than"):
        gradients_agree(perturbed(SMALL), *random_ids(SMALL, 2, 5), 1e-4)


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
    found = python("test_gpt2.py", "--bench", "--config=1,2,8,11,4,8", "--turns=1", "--steps=1")
    assert found.returncode == 0, found
    assert "| 1,2,8,11,4,8 |" in found.stdout and "attention" in found.stdout, found.stdout


# ------------------------------------------------------------------------------------------------
# The table: python test_gpt2.py

def table(model, tolerance=1e-4):
    """Print loss, logits and every gradient beside PyTorch's; return whether all agree."""
    B, T, good = 4, min(64, model.config.n_positions), True
    print(f"{model.config}, B={B}, T={T}, float32; OK: within {tolerance:g} of the largest value\n"
          f"\n{'':28} {'shape':16} {'largest':>10} {'difference':>10} {'relative':>9}")
    batch = random_ids(model.config, B, T)
    reference, ours = torch_results(model, *batch), our_results(model, *batch)
    for name, x in reference.items():
        x = x.detach().numpy()
        largest, relative = np.abs(x).max(), error(ours[name], x)
        good &= bool(relative <= tolerance)
        print(f"{name:28} {str(x.shape):16} {largest:10.3e} {relative * largest:10.3e} "
              f"{relative:9.1e} {'OK' if relative <= tolerance else 'NOT OK'}")
    print("\nall OK" if good else "\nNOT OK")
    return good


# ------------------------------------------------------------------------------------------------
# The benchmark: python test_gpt2.py --bench. Three processes take steps in turn: ours, PyTorch, and
# the floor, which does only the matrix products of our step.

BENCH = {  # L,H,C,V,B,T
    "baby": "4,4,128,257,12,64", "baby384": "6,6,384,257,16,256", "124M": "12,12,768,50257,4,64",
    "124M-long": "12,12,768,50257,1,1024", "long": "4,4,128,257,1,1024"}


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


def clock(function, *args):
    """(how long a call takes in ms, its result)."""
    start = time.perf_counter()
    result = function(*args)
    return 1e3 * (time.perf_counter() - start), result


def keep_only_products(T):
    """Reduce every layer to its matrix products: two in attention, five in its backward."""
    product, line = gpt2.matmul, np.zeros((1, 1, T, 1))
    blocks = [(queries, keys) for queries, keys, _ in gpt2.score_blocks(line, line)]

    @gpt2.by_rows("out lse q k v", heads=True)
    def attention_forward(out, lse, q, k, v):
        for queries, keys in blocks:
            q[:, :, queries] @ k[:, :, keys].swapaxes(2, 3) @ v[:, :, keys]

    @gpt2.by_rows("dq dk dv dout out lse q k v", heads=True)
    def attention_backward(dq, dk, dv, dout, out, lse, q, k, v):
        for queries, keys in blocks:
            scores = q[:, :, queries] @ k[:, :, keys].swapaxes(2, 3)
            scores.swapaxes(2, 3) @ dout[:, :, queries]
            dscores = dout[:, :, queries] @ v[:, :, keys].swapaxes(2, 3)
            dscores @ k[:, :, keys]
            dscores.swapaxes(2, 3) @ q[:, :, queries]
    for name in vars(gpt2).copy():
        if re.fullmatch("(emb|layern|gelu|cross).*_(for|back)ward|adamw|add_squares|move", name):
            setattr(gpt2, name, lambda *args: None)
    gpt2.attention_forward, gpt2.attention_backward = attention_forward, attention_backward
    # a product with one row sums the gradient of a bias
    gpt2.matmul = lambda out, a, b, *bias, **add: len(a) > 1 and product(out, a, b)


def time_each_layer(model, step):
    """Each layer's share of our step. Time that shards spend side by side counts once."""
    took = {}
    for name, function in vars(gpt2).copy().items():
        if layer := re.fullmatch("(?!block|net)(.*)_(for|back)ward|adamw|add_squares|move", name):
            def timed(*args, times=took.setdefault(layer[1] or "adamw", []), function=function):
                width = min(gpt2.parallel.threads, len(model.shards)) if gpt2.parallel.busy else 1
                times.append(clock(function, *args)[0] / width)
            setattr(gpt2, name, timed)
    total = sum(clock(step)[0] for _ in range(3))
    took["the rest"] = [total - sum(map(sum, took.values()))]
    return ", ".join(f"{layer} {sum(times) / total:.0%}" for layer, times in took.items())


def bench_worker(args):
    """Read how many steps to take, line by line, and answer each with JSON; then time layers."""
    L, H, C, V, B, T = map(int, args.config.split(","))
    model, rng = gpt2.GPT2(gpt2.GPTConfig(V, T, C, L, H)), np.random.default_rng(0)
    model.n_shards = gpt2.choose_shards(model.config, B, T, args.threads)
    gpt2.parallel.threads, step = args.threads, our_trainer(model)
    if args.worker == "floor":
        keep_only_products(T)
    elif args.worker != "ours":
        torch.set_num_threads(args.threads)
        step, model = torch_trainer(model, args.worker == "compiled"), None  # it has copies
    for line in sys.stdin:
        batches = rng.integers(V, size=(int(line), 2, B, T))
        times, losses = zip(*(clock(step, *batch) for batch in batches))
        status = Path("/proc/self/status")  # Linux; getrusage's maximum includes the parent's
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1] if status.exists() else "nan"
        middle = sorted(times)[len(times) // 2]  # np.median would import numpy.ma: 2 MB
        print(json.dumps([middle, losses[-1], float(peak) / 1e3]), flush=True)
    if args.worker == "ours":
        print(time_each_layer(model, lambda: step(*batches[0])))


def bench_one(name, args):
    """Measure one configuration and print its row -> (do the losses agree?, a line of shares)."""
    shape = BENCH.get(name, name)
    workers = [subprocess.Popen(
        [sys.executable, __file__, f"--worker={which}", f"--config={shape}",
         f"--threads={args.threads}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for which in ("ours", "compiled" if args.compile else "torch", "floor")]

    def take(steps):
        for worker in workers:
            print(steps, file=worker.stdin, flush=True)
            yield json.loads(worker.stdout.readline())
    gpt2.show_progress(f"measuring {name}")
    warm_up, *_ = take(3)
    steps = args.steps or int(np.clip(2000 / warm_up[0], 1, 40))
    turns = np.array([[*take(steps)] for _ in range(args.turns)])
    gpt2.show_progress("")
    shares, *_ = [worker.communicate()[0].strip() for worker in workers]
    times, (loss, torch_loss, _), (peak, torch_peak, _) = turns[..., 0], *turns[-1, :, 1:].T
    (ms, torch_ms, floor_ms), ratios = np.median(times, axis=0), times[:, 1] / times[:, 0]
    tokens = 1e3 * math.prod(map(int, shape.split(",")[4:]))
    agreeing = abs(loss - torch_loss) <= 1e-3
    print(f"| {name} | {ms:.1f} | {torch_ms:.1f} | {np.median(ratios):.2f} ({min(ratios):.2f}-"
          f"{max(ratios):.2f}) | {tokens / ms:.0f} | {tokens / torch_ms:.0f} | {peak:.0f} "
          f"| {torch_peak:.0f} | {peak / torch_peak:.2f} | {floor_ms:.1f} ({floor_ms / ms:.0%}) "
          f"| {loss:.4f} {torch_loss:.4f}{'' if agreeing else ' NOT OK'} |", flush=True)
    return agreeing, f"{name}: {shares}"


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


def bench_sampling(threads, n=64):
    """Print the time per token of a 124M model beside transformers', and of reading the weights."""
    model, gpt2.parallel.threads = gpt2.GPT2(gpt2.GPTConfig()), threads
    ways = {"ours": lambda: [*gpt2.generate(model, [[50256]], n, top_k=40)]}
    try:
        import transformers
        torch.set_num_threads(threads)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        ways["transformers"] = lambda: theirs.generate(
            torch.tensor([[50256]]), min_new_tokens=n, max_new_tokens=n, do_sample=True, top_k=40,
            attention_mask=torch.tensor([[1]]), pad_token_id=0)
    except ImportError:
        print("\ntransformers is not installed", end="")
    blocks = [model.flat_params[block] for block in gpt2.split(model.flat_params.size, 64)]
    ways["reading the weights once"] = lambda: [
        gpt2.parallel(lambda block: np.dot(block, block), blocks) for _ in range(n)]
    times = [[clock(way)[0] / n for way in ways.values()] for _ in range(4)]
    medians = np.median(times[1:], axis=0)  # the first time warms up
    print("\nsampling one sequence, 124M, ms a token: " + ", ".join(
        f"{name} {ms:.1f}" for name, ms in zip(ways, medians)))


def bench(args):
    """Print the table of the README's section on speed; return whether all losses agree."""
    print(f"{machine()}{' compiled' if args.compile else ''}, {args.threads} threads\n\n"
          "| config | ms/step | PyTorch | ratio (min-max) | tok/s | PyTorch | peak MB | PyTorch "
          "| ratio | products alone | loss, PyTorch's |\n" + "|---" * 11 + "|", flush=True)
    results = [bench_one(name, args) for name in ([args.config] if args.config else BENCH)]
    agreeing, shares = zip(*results)
    print("\nwhere our step goes:", *shares, sep="\n", flush=True)
    if not args.config:
        bench_sampling(args.threads)
    return all(agreeing)


def main():
    """The table, or the benchmark; exit status 1 if numbers differ from PyTorch's."""
    parser = argparse.ArgumentParser(description="Gradients beside PyTorch's, or speed.")
    parser.add_argument("--init_from", metavar="FOLDER", help="compare with these weights")
    parser.add_argument("--bench", action="store_true", help="compare the speed")
    parser.add_argument("--config", help="one of " + ", ".join(BENCH) + ", or L,H,C,V,B,T")
    parser.add_argument("--steps", type=int, help="steps in a turn (default: 1 to 40, for 2 s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--compile", action="store_true", help="PyTorch with torch.compile")
    parser.add_argument("--threads", type=int, default=gpt2.usable_cpus(), help="of each process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return bench_worker(args)
    if args.bench:
        sys.exit(0 if bench(args) else 1)
    folder = args.init_from and gpt2.find_model(args.init_from)
    model = gpt2.GPT2.from_pretrained(folder) if folder else gpt2.GPT2(gpt2.GPTConfig())
    sys.exit(0 if table(model) else 1)


if __name__ == "__main__":
    gpt2.run_program(main)
