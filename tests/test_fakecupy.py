"""The fake CuPy enforces CuPy's rules. The rest of the suite would not notice what it lets pass."""

import copy
import math
from importlib.util import find_spec

import fakecupy
import numpy as np
import pytest
from fakecupy.arrays import METHODS

cp = fakecupy.module


@pytest.fixture
def host():
    return np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def x(host):
    return cp.asarray(host)


def test_the_lists_match_cupy():
    cupy = pytest.importorskip("cupy", reason="compares the lists with CuPy's own names; it needs CuPy, but no GPU")
    names = [*fakecupy.CONSTANTS.split(), *" ".join(fakecupy.FUNCTIONS.values()).split()]
    methods = [*" ".join(METHODS.values()).split(), *(n for n in vars(cp.ndarray) if not n.startswith("_"))]
    assert [name for name in names if not hasattr(cupy, name)] == []
    assert hasattr(cupy, "RawModule")
    assert find_spec("cupy.cublas") is not None  # importing it needs the CUDA libraries
    assert hasattr(cupy.cuda.MemoryPool, "free_all_blocks")
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    assert [name for name in fakecupy.LINALG.split() if not hasattr(cupy.linalg, name)] == []
    assert [name for name in methods if not hasattr(cupy.ndarray, name)] == []
    assert [name for name in fakecupy.LACKS.split() if hasattr(cupy, name)] == []
    operators = {n for n in vars(cp.ndarray) if n.startswith("__")} - {"__slots__", "__getattr__"}
    assert [n for n in operators if not hasattr(cupy.ndarray, n)] == []
    lacking = ("__index__", "__imatmul__", "__contains__")  # of numpy.ndarray
    assert [n for n in lacking if hasattr(cupy.ndarray, n) or hasattr(cp.ndarray, n)] == []


def test_it_is_not_a_numpy_array(x):
    assert not isinstance(x, np.ndarray)
    assert type(x).__module__ == "cupy"
    assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes, x.strides, len(x)) == ((2, 3), np.float32, 2, 6, 24, (12, 4), 2)
    assert (x.T.shape, x.flags.c_contiguous, x.T.flags.c_contiguous) == ((3, 2), True, False)


CONVERSIONS = {
    "asarray": np.asarray,
    "array": np.array,
    "ufunc": lambda x: np.add(x, 1),
    "reduction": np.sum,
    "concatenate": lambda x: np.concatenate([x, x]),
    "index": lambda x: np.zeros(6)[x],
    "assignment": lambda x: np.zeros((2, 3)).__setitem__(..., x),
    "in place": lambda x: np.zeros((2, 3)).__iadd__(x),
    "range": lambda x: range(x[0, 0]),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_no_implicit_conversion_to_numpy(convert, x):
    with pytest.raises(TypeError):
        convert(x)


MIXTURES = {
    "device + host": lambda x, h: x + h,
    "host + device": lambda x, h: h + x,
    "device @ host": lambda x, h: x @ h.T,
    "host @ device": lambda x, h: h.T @ x,
    "device == host": lambda x, h: x == h,
    "host < device": lambda x, h: h < x,
    "device += host": lambda x, h: x.__iadd__(h),
    "device * list": lambda x, h: x * [1, 2, 3],
    "device[host]": lambda x, h: x[np.array([0])],
    "device[list]": lambda x, h: x[[0]],
    "device[0] = host": lambda x, h: x.__setitem__(0, h[0]),
    "maximum": lambda x, h: cp.maximum(x, h),
    "where": lambda x, h: cp.where(x > 0, x, h),
    "concatenate": lambda x, h: cp.concatenate([x, h]),
    "vdot": lambda x, h: cp.vdot(x, h),
    "add.at": lambda x, h: cp.add.at(x, cp.asarray([0]), h),
    "sum of host": lambda x, h: cp.sum(h),
    "sum of list": lambda x, h: cp.sum([1.0, 2.0]),
}


@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)
def test_host_and_device_do_not_mix(mix, x, host):
    with pytest.raises(TypeError, match=r"Unsupported type|without a CuPy array"):
        mix(x, host)


def test_scalars_of_python_and_numpy_are_operands(x, host):
    np.testing.assert_array_equal((2 * x + np.float32(1)).get(), 2 * host + 1)
    np.testing.assert_array_equal((np.float32(1) - x / 2).get(), 1 - host / 2)


def test_promotion_follows_numpy_2(x):
    assert (x * 0.1).dtype == np.float32
    assert (x * np.float64(0.1)).dtype == np.float64
    assert (x * cp.asarray(0.1)).dtype == np.float64  # a 0-d array is not a Python number
    assert (x.astype("float16") * 2).dtype == np.float16


def test_reductions_and_elements_are_arrays(x):
    for value in (x.sum(), x.mean(), x.max(), x.argmax(), (x > 0).any(), cp.vdot(x, x), cp.allclose(x, x), x[0, 0], x.sum() + 1):
        assert isinstance(value, cp.ndarray)
        assert value.shape == ()
    assert all(isinstance(row, cp.ndarray) for row in x)


def test_an_element_is_a_view_and_in_place_operators_write(x):
    element, row = x[1, 2], x[0]
    element += 10
    row *= 0
    element[...] = -element
    np.testing.assert_array_equal(x.get(), [[0, 0, 0], [3, 4, -15]])


def test_copies_do_not_share_memory(x, host):
    host[...] = 9
    x.get()[...] = 9
    assert x.max().item() == 5
    copies = [
        copy.deepcopy(x),
        copy.copy(x),
        x.copy(),
        cp.array(x),
        cp.asarray(x, dtype="float64"),
        x[cp.asarray([0, 1])],
        x[cp.asarray(1)],
    ]
    x[...] = 9
    assert all(c.max().item() == 5 for c in copies)
    assert cp.asarray(x) is x


def test_index_arrays_wrap_around(x):
    i = cp.asarray([2, -1, 3])
    np.testing.assert_array_equal(x[i].get(), x.get()[[0, 1, 1]])
    np.testing.assert_array_equal(x[:, cp.asarray([4])].get(), x.get()[:, [1]])
    np.testing.assert_array_equal(x[..., None, cp.asarray([4])].get(), x.get()[..., None, [1]])
    x[cp.asarray([5])] = -1
    np.testing.assert_array_equal(x[1].get(), [-1, -1, -1])
    with pytest.raises(IndexError):
        x[2]  # plain integers are checked, as in CuPy
    with pytest.raises(IndexError):
        x[cp.asarray([0.0])]


def test_add_at_accumulates_and_has_the_dtypes_of_atomic_add():
    y = cp.zeros(3)
    cp.add.at(y, cp.asarray([0, 2, 3, 0]), cp.asarray([1.0, 2.0, 4.0, 8.0]))
    assert y.tolist() == [13, 0, 2]
    with pytest.raises(TypeError, match="only supports int32"):
        cp.add.at(cp.zeros(3, dtype="int64"), cp.asarray([0]), 1)


def test_missing_names_explain_why(x):
    with pytest.raises(AttributeError, match="CuPy has no 'errstate'"):
        cp.errstate  # noqa: B018
    for name in ("random", "einsum_path", "trapezoid"):
        with pytest.raises(AttributeError):
            getattr(cp, name)
    for name in ("sort", "resize", "scatter_add", "anything"):
        with pytest.raises(AttributeError, match="not in the list of the fake CuPy"):
            getattr(x, name)
    for name in ("reduceat", "reduce", "outer"):
        assert not hasattr(cp.add, name)
    with pytest.raises(TypeError, match="no argument where"):
        x.sum(where=x > 0)
    with pytest.raises(AttributeError):
        x.flags.writeable = False
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.asarray(["text"])


def test_arithmetic_and_linear_algebra_fail_silently():
    z = cp.zeros((2, 2))
    assert cp.isnan(z / z).all()
    assert cp.isnan(cp.linalg.cholesky(z - 1)).all()
    assert cp.isnan(cp.linalg.solve(z, cp.ones((2, 3)))).all()
    assert all(cp.isnan(part).all() for part in cp.linalg.svd(z / z))
    with pytest.raises(np.linalg.LinAlgError):
        cp.linalg.cholesky(cp.ones((2, 3)))


def test_linear_algebra_matches_numpy(host, x):
    U, S, Vt = cp.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(((U * S) @ Vt).get(), host, atol=1e-6)


def launches(f):
    with fakecupy.count() as c:
        f()
    assert (c.syncs, c.transfers) == (0, 0)
    return c.launches


def test_launches_are_counted(x):
    i = cp.asarray([0, 1])
    assert launches(lambda: x + 1) == 1
    assert launches(lambda: cp.exp(-x) * x) == 3
    assert launches(lambda: x.sum(axis=0)) == 1
    assert launches(lambda: x @ x.T) == 1
    assert launches(lambda: x[i]) == 1
    assert launches(lambda: x.__setitem__(i, 0)) == 1
    assert launches(lambda: cp.add.at(x, i, x)) == 1
    assert launches(lambda: x.T.reshape(-1)) == 1  # must copy
    assert launches(lambda: cp.zeros((2, 2))) == 1
    assert launches(lambda: x.astype("float64")) == 1
    assert launches(lambda: (x.reshape(-1), x.T, x[:, 1:], x[0, 0], x.transpose(1, 0), cp.empty(3), x.astype("float32", copy=False))) == 0


WAITS = {
    "get": lambda x: x.get(),
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool(x[0, 0]),
    "math": lambda x: math.sqrt(x[0, 0]),
    "format": lambda x: f"{x[0, 0]:.3f}",
    "repr": repr,
    "str": str,
    "method nonzero": lambda x: x.nonzero(),
    "flatnonzero": lambda x: cp.flatnonzero(x),
    "where with one argument": lambda x: cp.where(x > 0),
    "x[mask]": lambda x: x[x > 0],
    "x[mask] = 0": lambda x: x.__setitem__(x > 0, 0),
    "add.at mask": lambda x: cp.add.at(x, x > 0, 1),
    "synchronize": lambda x: cp.cuda.get_current_stream().synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_every_synchronisation_is_counted(wait, x):
    with fakecupy.count() as c:
        wait(x)
    assert c.syncs == 1


def test_where_with_three_arguments_does_not_synchronise(x):
    with fakecupy.count() as c:
        y = cp.where(x > 2, x, -math.inf)
    assert (c.syncs, c.launches, y.dtype) == (0, 2, np.float32)


def test_transfers_are_counted_in_bytes(host):
    with fakecupy.count() as c:
        x = cp.asarray(host)
        cp.asarray(x)
        assert (c.to_device, c.to_host, c.bytes, c.syncs) == (1, 0, 24, 0)
        x.get()
        float(x[0, 0])
        cp.asnumpy(x)
    assert (c.to_device, c.to_host, c.transfers, c.bytes, c.syncs) == (1, 3, 4, 24 + 24 + 4 + 24, 3)


def test_products_are_recorded(x):
    with fakecupy.count() as outer:
        x @ x.T
        with fakecupy.count() as inner:
            x.T @ x
            cp.einsum("ij,ik->jk", x, x[:, :1])
            cp.outer(x[0], x[1])
            x * x
    assert inner.products == [(3, 3), (3, 1), (3, 3)]
    assert outer.products == [(2, 2), *inner.products]


def test_module_level_functions(x, host):
    assert cp.get_array_module(host, x) is cp
    assert cp.get_array_module(host) is np
    assert cp.is_available()
    assert cp.result_type(x, np.float64) == np.float64
    assert cp.float32 is np.float32
    assert cp.get_default_memory_pool().used_bytes() < cp.get_default_memory_pool().total_bytes()
