"""The CUDA sources: compiled if there is a compiler, run on the CPU with real threads, equal to the reference implementations."""

import re
import shutil
import subprocess

import fakecupy
import ml_dtypes
import numpy as np
import pytest
from fakecupy import cuda as emulator

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora.backend import backend_name
from minilora.kernels import cuda, grouped
from minilora.kernels.cuda import flash
from minilora.kernels.cuda import losses as losses_module

# and how many kernels each has
FILES = {"activations": 4, "adamw": 1, "dropout": 1, "elementwise": 5, "flash": 3, "norm": 2, "rotary": 1, "softmax": 3}
VARIANTS = [(file, dtype, ()) for file in FILES for dtype in cuda.REAL if file != "flash"]
VARIANTS += [("flash", dtype, (f"-DD={d}",)) for dtype in cuda.REAL if dtype != "float64" for d in flash.HEADS]
off = emulator.COMPILER is None or not cuda.ENABLED
needs_gpp = pytest.mark.skipif(off, reason="CUDA sources run through g++ here, and not with MINILORA_KERNELS=plain")


def test_every_source_is_listed_and_its_kernels_are_used():
    folder = cuda._HERE
    assert {path.stem for path in folder.glob("*.cu")} == set(FILES)
    python = "".join(path.read_text() for path in folder.parent.rglob("*.py"))
    for file, count in FILES.items():
        names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", cuda.source_of(file))
        assert len(names) == count
        assert all(f'"{name}"' in python for name in names)


@pytest.mark.parametrize(("file", "dtype", "options"), VARIANTS)
def test_the_sources_compile_for_a_gpu(file, dtype, options, tmp_path):
    nvcc = shutil.which("nvcc")
    if dtype in ("float64", "float16"):
        pytest.importorskip("torch", reason="two of four dtypes in the default run; this runs with: pip install 'minilora[oracle]'")
    if nvcc is None:
        pytest.skip("nvcc is not installed (CuPy compiles the sources by itself, through NVRTC, where there is a GPU)")
    (tmp_path / "source.cu").write_text(cuda.source_of(file))
    command = [
        nvcc,
        "-ptx",
        "-arch=sm_80",
        *cuda.options_of(dtype),
        *options,
        "-Werror",
        "all-warnings",
        "-o",
        str(tmp_path / "out.ptx"),
        "source.cu",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.ptx").read_text()
    assert text.count(".visible .entry") == FILES[file]
    if dtype != "float64":
        assert ".f64" not in text, "a float kernel computes in double somewhere: slow on a GPU"


@pytest.fixture(params=[1, 4, 32, 64])
def threads(request, monkeypatch, fake_cupy):
    """Run blocks with this number of real threads."""
    monkeypatch.setattr(emulator, "THREADS", request.param)
    return request.param


def device(*shape, dtype="float64", seed=0):
    return fakecupy.module.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(ml.to_numpy(a), ml.to_numpy(b), rtol=0, atol=tolerance)


@needs_gpp
def test_rows_are_summed_by_many_threads(threads):
    x, gamma, beta, dy = device(5, 70), device(70, seed=1), device(70, seed=2), device(5, 70, seed=3)
    for got, pair in ((K.layer_norm(x, gamma, beta), F.layer_norm(x, gamma, beta)), (K.rms_norm(x, gamma), F.rms_norm(x, gamma))):
        close(got[0], pair[0])
        for a, b in zip(got[1].value, pair[1], strict=True):
            close(a, b)
        backward = "layer_norm_backward" if got[1].by is K.TABLE["layer_norm"].kernels[1] else "rms_norm_backward"
        for a, b in zip(getattr(K, backward)(dy, got[1], gamma), getattr(F, backward)(dy, pair[1], gamma), strict=True):
            close(a, b)


@needs_gpp
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offsets", [[0, 7, 14, 21], [0, 3, 12, 21]])
def test_attention(threads, causal, offsets, monkeypatch):
    monkeypatch.setattr(grouped, "KEPT", 8)  # probabilities of some sequences are kept, others are recomputed
    q, k, v, do = device(21, 24), device(21, 12, seed=1), device(21, 12, seed=2), device(21, 24, seed=3)
    for rows, window in ((None, None), (np.array([2, 6, 9, 20]), None), (None, 4), (np.array([2, 6, 9, 20]), 2)):
        q_, do_ = (q, do) if rows is None else (q[: len(rows)], do[: len(rows)])
        o, saved = K.attention(q_, k, v, 6, offsets, causal, n_kv_head=3, rows=rows, window=window)
        expected, P = F.attention(q_, k, v, 6, offsets, causal, n_kv_head=3, rows=rows, window=window)
        close(o, expected)
        got = K.attention_backward(do_, q_, k, v, saved, 6, offsets, 3, rows=rows)
        pair = F.attention_backward(do_, q_, k, v, P, 6, offsets, 3, rows=rows)
        if rows is None:  # the reference leaves dk and dv of a sequence without a query unset
            for a, b in zip(got, pair, strict=True):
                close(a, b)
        else:
            close(got[0], pair[0])


@needs_gpp
def test_the_loss_in_blocks_of_the_vocabulary(threads, monkeypatch):
    monkeypatch.setattr(losses_module, "LOGITS", 5 * 256)
    x, W, labels = device(5, 8), device(8, 700, seed=1), np.array([0, 699, 256, 255, 3])
    got, pair = (f(x, W, labels, 9, {"dx"}) for f in (K.linear_cross_entropy, F.linear_cross_entropy))
    close(got[0], pair[0])
    close(got[1], pair[1])
    assert K.linear_cross_entropy(x, W, labels, 9, ())[1] is None


@needs_gpp
def test_dropout_masks_match_numpy_bit_for_bit(threads):
    x = device(37, 11, dtype="float32")
    for p, key in ((0.1, 5), (0.5, 2**64 - 3), (0, 1)):
        np.testing.assert_array_equal(K.dropout(x, p, key)[0].get(), F.dropout(x.get(), p, key))
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        K.dropout(x, 1.0, 5)


@needs_gpp
@pytest.mark.parametrize("kind", [ml.AdamW, ml.Adam])
@pytest.mark.parametrize("vectors", [False, True])
def test_adamw_in_one_launch(threads, kind, vectors):
    there, here = (ml.Linear(5, 3, rng=0, dtype="float64").to(backend) for backend in ("cupy", "numpy"))
    optimizers = [kind(model.parameters(), 1e-2, weight_decay=0.1) for model in (there, here)]
    for step in range(3):
        for model, optimizer in zip((there, here), optimizers, strict=True):
            if vectors:
                optimizer.rates, optimizer.decays = (ml.to_backend(np.linspace(a, 1, 18), backend_name(optimizer.m)) for a in (0.5, 0))
            for i, (_, p) in enumerate(model.parameters()):
                p.grad = None
                p.add_grad(ml.to_backend(np.random.default_rng(7 * step + i).standard_normal(p.data.shape), backend_name(p.data)))
        with fakecupy.count() as counted:
            optimizers[0].step()
        assert counted.launches == 1
        optimizers[1].step()
    for (_, a), (_, b) in zip(there.parameters(), here.parameters(), strict=True):
        close(a.data, b.data, 1e-15)


@needs_gpp
def test_the_fake_cupy_refuses_wrong_arguments(fake_cupy):
    module = fake_cupy.RawModule(code=cuda.source_of("dropout"), options=("-DREAL=float",))
    launch = module.get_function("dropout")
    x = device(4, dtype="float32")
    good = [x, np.uint64(1), cuda.NULL, np.uint64(2), np.float32(1), x, np.int64(4)]
    for place, bad in ((0, None), (0, device(4)), (1, 1), (4, np.float64(1)), (6, np.int32(4)), (0, device(4, 4, dtype="float32").T)):
        with pytest.raises((TypeError, ValueError)):
            launch((1,), (32,), (*good[:place], bad, *good[place + 1 :]))
    with pytest.raises(TypeError, match="7 arguments"):
        launch((1,), (32,), tuple(good[:-1]))
    with pytest.raises(ValueError, match="launched"):
        launch((0,), (32,), tuple(good))


@needs_gpp
def test_without_the_sources_the_reference_runs_on_the_device(monkeypatch, fake_cupy):
    x, gamma = device(4, 6), device(6, seed=1)
    run = lambda: (K.gelu(x), K.rms_norm(x, gamma), K.dropout(x, 0.5, 3))  # noqa: E731
    with_them = run()
    monkeypatch.setattr(cuda, "ENABLED", False)
    for (a, kernel), (b, reference) in zip(with_them, run(), strict=True):
        close(a, b)
        assert (kernel.by.where, reference.by.where) == ("cuda", "reference")


@needs_gpp
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("r", "masked"), [(1, False), (3, True), (8, True), (12, False)])
def test_the_bias_is_a_row_of_b_in_half_precision(dtype, r, masked, threads):
    """y = x W + b + s (x mask) A B in 4 launches: the factors, x A, [u 1 0] [s B; b; 0], and x W, added to it."""
    x, W = device(9, 16, dtype=dtype), device(16, 10, dtype=dtype, seed=1)
    b, A, B = device(10, dtype="float32", seed=2), device(16, r, dtype="float32", seed=3), device(r, 10, dtype="float32", seed=4)
    mask = fakecupy.module.asarray((np.arange(9 * 16) % 3).reshape(9, 16).astype("float32")) if masked else None
    with fakecupy.count() as c:
        y, saved = K.lora_linear(x, W, b, A, B, 0.75, mask)
    assert c.launches == (4 if mask is None else 6)
    exact = [None if a is None else a.get().astype("float64") for a in (x, W, b, A, B)]
    expected, u = F.lora_linear(*exact, 0.75, None if mask is None else mask.get())
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert (y.dtype, saved.value.shape) == (dtype, (9, r))
    np.testing.assert_allclose(y.get().astype("float64"), expected, atol=2 * eps * np.abs(expected).max())
    np.testing.assert_allclose(saved.value.get().astype("float64"), u, atol=2 * eps * np.abs(u).max())


@needs_gpp
def test_unsupported_shapes_use_the_reference(fake_cupy):
    x, short, none = device(4, 8), device(4), device(0, 8)
    for call in (lambda: K.layer_norm(x, short, short), lambda: K.rms_norm(x, short), lambda: K.rotary(x, device(3, 2), device(3, 2))):
        with pytest.raises(ValueError, match="shape"):
            call()
    A, B, W = device(8, 2), device(2, 5), device(8, 5)
    y, u = K.lora_linear(none, W, None, A, B, 1.0)
    assert (y.shape, u.value.shape) == ((0, 5), (0, 2))
    assert K.lora_linear_backward(device(0, 5), none, u, W, A, B, 1.0)[0].shape == (0, 8)
    assert K.gelu(none)[0].shape == K.dropout(none, 0.5, 1)[0].shape == (0, 8)
