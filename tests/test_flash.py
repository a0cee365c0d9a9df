"""Attention on tensor cores: the fragments of all lanes, emulated by fibers on the CPU, against the reference implementation."""

from itertools import pairwise
from types import SimpleNamespace

import fakecupy
import ml_dtypes
import numpy as np
import pytest

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora.backend import import_cupy
from minilora.data.batches import random_windows
from minilora.kernels import cuda
from minilora.kernels.cuda import flash
from minilora.quantization.quantize import to_half_precision
from minilora.training.loop import train

pytestmark = pytest.mark.skipif(not cuda.ENABLED, reason="CUDA sources run through g++ here")

TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
TF32 = 4e-3  # what a GPU cuts float32 to; the emulator does not


@pytest.fixture(params=TOLERANCE)
def dtype(request, gpu, monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    return np.dtype(ml_dtypes.bfloat16 if request.param == "bfloat16" else request.param)


def tolerance(dtype, gpu):
    return TF32 if dtype == np.float32 and gpu is not fakecupy.module else TOLERANCE[dtype.name]


def column_blocks(T, widths, dtype, seed):
    """Column blocks of one matrix, as a fused projection returns them."""
    matrix = np.random.default_rng(seed).standard_normal((T, sum(widths))).astype(dtype)
    there = import_cupy().asarray(matrix)
    ends = np.cumsum([0, *widths])
    return [there[:, a:b] for a, b in pairwise(ends)]


def in_float32(x):
    return ml.to_numpy(x).astype("float64")


CASES = {  # offsets, rows, causal, heads, groups, and a window
    "one sequence": ([0, 70], None, True, 2, 1),
    "several": ([0, 3, 68, 90], None, True, 2, 2),
    "both ways": ([0, 5, 75], None, False, 2, 1),
    "some rows": ([0, 66, 130], [2, 40, 65, 69, 129], True, 2, 1),
    "short": ([0, 20, 30, 40], [4, 19, 35], False, 1, 1),
    "window": ([0, 5, 205, 215], None, True, 2, 1, 40),
    "window, both ways": ([0, 200], None, False, 2, 2, 20),
    "window, some rows": ([0, 166, 180], [2, 40, 90, 129, 165, 179], True, 1, 1, 66),
    "window of one": ([0, 70], None, True, 1, 1, 1),
}


@pytest.mark.parametrize(("d", "case"), [(d, case) for case in CASES for d in (32, 64, 128) if d == 64 or case in ("several", "short")])
def test_against_the_reference(dtype, d, case, gpu):
    if dtype == np.float16 and case not in ("several", "some rows", "short"):
        pytest.importorskip("torch", reason="the fragments of bfloat16; this runs with: pip install 'minilora[oracle]'")
    offsets, rows, causal, heads, groups, *window = CASES[case]
    window = window[0] if window else None
    T = offsets[-1]
    q, k, v = column_blocks(T, (heads * d, groups * d, groups * d), dtype, seed=0)
    if rows is not None:
        rows = np.array(rows)
        q = q[import_cupy().asarray(rows)]
    do = column_blocks(len(q), (heads * d,), dtype, seed=1)[0]
    assert flash.fits(q, k, v, heads)
    with fakecupy.count() as c:
        o, saved = flash.attention(q, k, v, heads, offsets, causal, n_kv_head=groups, rows=rows, window=window)
        got = flash.attention_backward(do, q, k, v, saved, heads, offsets, groups, {"dq", "dk", "dv"}, rows)
    assert gpu is not fakecupy.module or (c.launches, c.syncs) == (3, 0)
    here = [in_float32(x) for x in (q, k, v)]
    expected, P = F.attention(*here, heads, offsets, causal, n_kv_head=groups, rows=rows, window=window)
    reference = F.attention_backward(in_float32(do), *here, P, heads, offsets, groups, rows=rows)
    if rows is not None:  # the reference leaves dk and dv of a sequence without a query unset
        requested = np.unique(np.searchsorted(offsets, rows, side="right") - 1)
        unread = np.setdiff1d(np.arange(len(offsets) - 1), requested)
        for x in reference[1:]:
            for i in unread:
                x[offsets[i] : offsets[i + 1]] = 0
    for name, a, b in zip(("o", "dq", "dk", "dv"), (o, *got), (expected, *reference), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(in_float32(a), b, rtol=0, atol=tolerance(dtype, gpu) * max(1, np.abs(b).max()), err_msg=name)


def test_gradients_side_by_side_in_one_array(dtype, gpu):
    q, k, v = column_blocks(70, (128, 128, 128), dtype, seed=0)
    do = column_blocks(70, (128,), dtype, seed=1)[0]
    for rows in (None, np.array([2, 40, 69])):
        q_, do_ = (q, do) if rows is None else (q[:3], do[:3])
        _, saved = K.attention(q_, k, v, 2, [0, 3, 70], rows=rows)
        with fakecupy.count() as c:
            joined = K.attention_backward_joined(do_, q_, k, v, saved, 2, [0, 3, 70], rows)
        assert gpu is not fakecupy.module or rows is not None or c.launches == 2
        dq, dk, dv = K.attention_backward(do_, q_, k, v, saved, 2, [0, 3, 70], rows=rows)
        apart = [in_float32(x) for x in (F.take_rows_backward(dq, rows, 70), dk, dv)]
        np.testing.assert_array_equal(in_float32(joined), np.concatenate(apart, axis=1))


def test_large_scores_do_not_overflow(dtype, gpu):
    q, k, v = (20 * x for x in column_blocks(40, (64, 64, 64), dtype, seed=2))
    o, _ = flash.attention(q, k, v, 1)
    expected, _ = F.attention(in_float32(q), in_float32(k), in_float32(v), 1)
    np.testing.assert_allclose(in_float32(o), expected, atol=40 * tolerance(dtype, gpu))


def test_inputs_without_a_kernel(fake_cupy, monkeypatch):
    q, k, v = column_blocks(8, (64, 64, 64), np.dtype("float32"), seed=0)
    monkeypatch.delenv("CUPY_TF32", raising=False)
    assert not flash.fits(q, k, v, 1)  # float32 without TF32
    monkeypatch.setenv("CUPY_TF32", "1")
    assert flash.fits(q, k, v, 1)
    assert not flash.fits(q, k, v, 4)  # heads of 16
    assert not flash.fits(q[:, ::1][:, 1:33], k[:, :32], v[:, :32], 1)  # not aligned to 16 bytes
    assert not flash.fits(*(x.astype("float64") for x in (q, k, v)), 1)
    monkeypatch.setattr(fake_cupy.cuda, "Device", lambda: SimpleNamespace(compute_capability="75"))
    flash._has_the_instructions.cache_clear()
    with pytest.warns(UserWarning, match=r"capability is 7.5, below 8.0: .*--dtype float16 is faster"):
        assert not flash.fits(q, k, v, 1)  # a GPU before Ampere
    assert not flash.fits(q, k, v, 1)  # said once
    flash._has_the_instructions.cache_clear()


@pytest.mark.parametrize("name", ["bfloat16", "tf32"])
def test_a_model_takes_the_same_steps(name, gpu, monkeypatch):
    """Three steps of a decoder with heads of 32 features, by these kernels on one side and by the reference on NumPy."""
    monkeypatch.setenv("CUPY_TF32", "1")
    launched = []
    launch = flash._launch
    monkeypatch.setattr(flash, "_launch", lambda name, *args: launched.append(name) or launch(name, *args))

    def losses(backend):
        sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = ml.Llama(ml.LlamaConfig(vocab_size=30, max_position_embeddings=80, **sizes), rng=0).freeze()
        if name == "bfloat16":
            to_half_precision(model, "bfloat16")
        ml.inject(model.to(backend), ml.LoraConfig(r=4), rng=1)
        batches = random_windows(np.random.default_rng(0).integers(0, 30, 400), 40, 2, np.random.default_rng(1))
        run = train(model, ml.AdamW(model.parameters(), 1e-2), batches, 3, lambda step: 1.0, cuda_graph=False)
        return [step.loss for step in run]

    np.testing.assert_allclose(losses("cupy"), losses("numpy"), rtol=5e-3 if name == "bfloat16" or gpu is not fakecupy.module else 1e-5)
    # two blocks and three steps, and one more forward, which checks the last update
    assert {x: launched.count(x) for x in launched} == {"flash_forward": 8, "flash_dq": 6, "flash_dkv": 6}
