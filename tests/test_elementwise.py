"""Sums, products, rows of a bias and casts by packs of 16 bytes: equal to the operator to the bit, whatever the length and the address."""

import fakecupy
import ml_dtypes
import numpy as np
import pytest
from fakecupy import cuda as emulator

import minilora as ml
from minilora import kernels as K
from minilora.kernels import cuda
from minilora.kernels.cuda.pointwise import cast_two, multiply, rows_of

pytestmark = pytest.mark.skipif(not cuda.ENABLED, reason="CUDA sources run through g++ here")
KINDS = {"float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(params=KINDS)
def dtype(request):
    return np.dtype(KINDS[request.param])


@pytest.fixture(params=[1, 32])
def threads(request, monkeypatch, gpu):
    monkeypatch.setattr(emulator, "THREADS", request.param)


def drawn(n, dtype, gpu, seed=0, first=0):
    """n numbers, `first` numbers behind the beginning of an array."""
    return gpu.asarray(np.random.default_rng(seed).standard_normal(n + first).astype(dtype))[first:]


def equal(result, expected):
    np.testing.assert_array_equal(ml.to_numpy(result).astype("float64"), ml.to_numpy(expected).astype("float64"))
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 500])
@pytest.mark.parametrize("first", [0, 1])
def test_sums_and_products(n, first, dtype, gpu, threads):
    x, y = drawn(n, dtype, gpu, 0, first), drawn(n, dtype, gpu, 1)
    with fakecupy.count() as c:
        z, p = K.add(x, y), multiply(x, y)
    assert gpu is not fakecupy.module or c.launches == (2 if n else 0)
    equal(z, x + y)
    equal(p, x * y)


def test_what_is_not_contiguous_or_not_alike_goes_to_the_operator(gpu):
    x, y = drawn(12, "float32", gpu).reshape(3, 4), drawn(12, "float32", gpu, 1).reshape(4, 3)
    equal(K.add(x, y.T), x + y.T)
    equal(multiply(x, y.T), x * y.T)
    equal(K.add(x, x[:1]), x + x[:1])
    here = ml.to_numpy(x)
    equal(K.add(here, here), here + here)


@pytest.mark.parametrize(("rows", "n"), [(0, 8), (1, 8), (5, 16), (9, 3), (4, 257), (6, 4096)])
def test_rows_of_a_bias(rows, n, dtype, gpu, threads):
    b = drawn(n, np.float64 if dtype == np.float64 else np.float32, gpu)
    y = rows_of(b, rows, drawn(1, dtype, gpu))
    equal(y, gpu.asarray(np.tile(b.get().astype(dtype), (rows, 1))))


def test_two_matrices_are_cast_in_one_launch(dtype, gpu, threads):
    like = drawn(1, dtype, gpu)
    A, B = (drawn(n, cuda.real_of(like), gpu, n).reshape(-1, 3) for n in (9, 33))
    with fakecupy.count() as c:
        a, b = cast_two(A, B, like)
    assert gpu is not fakecupy.module or c.launches == (dtype.itemsize == 2)
    for result, matrix in ((a, A), (b, B)):
        equal(result, matrix.astype(dtype))
    for result, matrix in zip(cast_two(A.T, B, like), (A.T, B), strict=True):
        equal(result, matrix.astype(dtype))
