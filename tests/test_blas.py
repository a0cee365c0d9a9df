"""Matrix products on the device: every layout against NumPy, with raw cuBLAS calls and with CuPy's own."""

import ast
from pathlib import Path

import fakecupy
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.backend import import_cupy
from minilora.cli import main
from minilora.kernels import cuda
from minilora.kernels.cuda import blas

LAYOUTS = ("rows", "columns", "part of a wider one", "every other row", "every other column")


def with_layout(x, layout):
    """x (..., m, n) on the device in the memory layout `layout`."""
    there = import_cupy().asarray
    if layout == "columns":
        return there(np.ascontiguousarray(x.swapaxes(-1, -2))).swapaxes(-1, -2)
    *stack, m, n = x.shape
    room, at = {
        "rows": ((m, n), (slice(None), slice(None))),
        "part of a wider one": ((m, n + 5), (slice(None), slice(2, n + 2))),
        "every other row": ((2 * m, n), (slice(0, 2 * m, 2), slice(None))),
        "every other column": ((m, 2 * n), (slice(None), slice(0, 2 * n, 2))),
    }[layout]
    wide = there(np.full((*stack, *room), 7, x.dtype))
    wide[(..., *at)] = there(x)
    return wide[(..., *at)]


@pytest.fixture(params=["cuBLAS", "CuPy"])
def way(request, gpu, monkeypatch):
    if request.param == "CuPy":
        monkeypatch.setattr(blas, "bindings", lambda: None)
    return request.param


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    stack=st.sampled_from([(), (3,), (2, 3), (1, 2), (2, 1)]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtype=st.sampled_from(["float32", "float64"]),
    alpha=st.sampled_from([1.0, -0.5]),
    beta=st.sampled_from([0.0, 1.0, 0.25]),
)
def test_all_layouts(way, sizes, stack, layouts, dtype, alpha, beta):
    (m, k, n), rng = sizes, np.random.default_rng(0)
    a, b, c = (rng.standard_normal((*stack, *shape)).astype(dtype) for shape in ((m, k), (k, n), (m, n)))
    out = with_layout(c, layouts[2])
    assert blas.gemm(with_layout(a, layouts[0]), with_layout(b, layouts[1]), out, alpha, beta) is out
    np.testing.assert_allclose(out.get(), alpha * (a @ b) + beta * c, rtol=1e-5, atol=1e-5)
    new = blas.gemm(with_layout(a, layouts[0]), with_layout(b, layouts[1]), alpha=alpha)
    np.testing.assert_allclose(new.get(), alpha * (a @ b), rtol=1e-5, atol=1e-5, strict=True)


def test_memory_outside_the_result_is_not_written(way):
    xp = import_cupy()
    wide = xp.asarray(np.full((3, 9), 7.0))
    blas.gemm(xp.ones((3, 2)), xp.ones((2, 4)), wide[:, 1:5])
    assert wide.get().tolist() == [[7, 2, 2, 2, 2, 7, 7, 7, 7]] * 3


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_half_precision_factors_with_a_float32_result(way, dtype, stack):
    """Only the factors are rounded: sums are float32, and the results are not rounded again."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((*stack, *shape)).astype(dtype) for shape in ((4, 100), (100, 3)))
    exact = a.astype("float64") @ b.astype("float64")
    there = [import_cupy().asarray(x) for x in (a, b)]
    same, wide = blas.gemm(*there), blas.gemm(*there, dtype="float32")
    assert (same.dtype, wide.dtype) == (dtype, np.float32)
    if blas.bindings() is not None:  # CuPy first rounds to half precision
        np.testing.assert_allclose(wide.get(), exact, rtol=0, atol=1e-4)
    np.testing.assert_allclose(same.get().astype("float64"), exact, rtol=float(ml_dtypes.finfo(dtype).eps), atol=0.02)


def test_empty_dimensions(way):
    zeros, xp = import_cupy().zeros, import_cupy()
    assert blas.gemm(zeros((2, 0)), zeros((0, 3))).get().tolist() == [[0, 0, 0]] * 2
    assert blas.gemm(zeros((2, 0)), zeros((0, 3)), xp.ones((2, 3)), beta=0.5).get().tolist() == [[0.5] * 3] * 2
    assert blas.gemm(zeros((0, 4)), zeros((4, 3))).shape == (0, 3)


def test_mismatched_shapes_are_refused(way):
    xp = import_cupy()
    for a, b in (
        (xp.ones((2, 3)), xp.ones((4, 2))),
        (xp.ones((2, 3)), xp.ones((3, 2), dtype="float32")),
        (xp.ones((1, 2, 3)), xp.ones((2, 3, 2))),
    ):
        with pytest.raises(ValueError, match="do not make"):
            blas.gemm(a, b)


def test_views_are_not_copied(fake_cupy):
    """Queries, keys and values are columns of one matrix; CuPy's products would copy each."""
    qkv = fakecupy.module.asarray(np.random.default_rng(0).standard_normal((6, 12)))
    for a, b in ((qkv[:, :4], qkv[:, 4:8].T), (qkv[:, :4].T, qkv[:, 8:])):
        with fakecupy.count() as c:
            blas.gemm(a, b)
        assert c.launches == 1


def test_the_fake_cublas_has_the_functions_of_the_real_one():
    """cublas.py itself needs CuPy: its functions are read from the source."""
    tree = ast.parse(Path(blas.__file__).with_name("cublas.py").read_text())
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert named == ["create", "destroy", "set_stream", "set_workspace", "gemm_ex", "gemm_strided_batched_ex"]
    assert all(callable(getattr(fakecupy.blas, name)) for name in named)


def test_products_where_cublas_cannot_be_called(fake_cupy, monkeypatch):
    """As where CuPy's cuBLAS is of another version, or cannot be initialised."""

    def create():
        raise RuntimeError("CUDA driver is not found")

    monkeypatch.setattr(fakecupy.blas, "create", create)
    with pytest.warns(UserWarning, match=r"CuPy's own calls, .* CUDA driver is not found"):
        assert blas.bindings() is None
    blas.bindings.cache_clear()
    monkeypatch.setenv("MINILORA_BLAS", "cupy")
    assert blas.bindings() is None
    blas.bindings.cache_clear()


def test_without_cublas_one_sentence_says_what_to_install(fake_cupy, monkeypatch, capsys, cwd):
    def create():
        raise ImportError('Failure finding "libcublas.so.13": No such file\n  listdir("/usr/lib"):\n    libc.so')

    monkeypatch.setattr(fakecupy.blas, "create", create)
    with pytest.raises(ImportError, match=r"cannot load cuBLAS, .*libcublas.so.13.: No such file\); pip install 'minilora\[cuda13\]'"):
        blas.gemm(fake_cupy.ones((2, 2)), fake_cupy.ones((2, 2)))
    if cuda.ENABLED:
        assert main(["finetune", "--backend", "cupy", "--steps", "1", "--out", "run"]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("minilora: error: CuPy cannot load cuBLAS")
    assert main(["doctor"]) == 0
    assert "gpu        none (CuPy cannot load cuBLAS, which products need (Failure finding" in capsys.readouterr().out


def test_tf32_is_kept_where_products_go_by_cupy(fake_cupy, monkeypatch):
    """cupy.cublas.gemm ignores CUPY_TF32; CuPy's matrix product does not."""
    monkeypatch.setattr(blas, "bindings", lambda: None)
    monkeypatch.setattr(fake_cupy.cublas, "gemm", lambda *_, **__: pytest.fail("without TF32"))
    monkeypatch.setenv("CUPY_TF32", "1")
    x = fake_cupy.asarray(np.arange(4, dtype="float32").reshape(2, 2))
    np.testing.assert_array_equal(blas.gemm(x, x, x + 1, 2.0, 1.0).get(), [[5, 8], [15, 26]])
