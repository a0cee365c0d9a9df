"""One suite for two backends. A test that takes `backend` runs on each requested one:

`pytest` uses NumPy and the fake CuPy, on any machine; `pytest --backend cupy` uses the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import standin

from minilora.backend import import_cupy, to_backend
from minilora.kernels import cuda
from minilora.kernels.cuda import blas

CHOICES = {"numpy": ["numpy"], "standin": ["standin"], "cupy": ["cupy"], "both": ["numpy", "standin"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=CHOICES, default="both", help="backends under test; both: numpy and the fake cupy")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("backend") != "cupy":
        cuda.ENABLED = cuda.ENABLED and standin.cuda.COMPILER is not None
    else:
        try:
            import_cupy()
        except (ImportError, RuntimeError) as error:
            raise pytest.UsageError(f"--backend cupy: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    chosen = config.getoption("backend")
    if chosen != "cupy":
        sources = "CUDA sources compiled by g++" if cuda.ENABLED else "CUDA sources not run: no g++, or MINILORA_KERNELS=plain"
        names = {"numpy": f"numpy {np.__version__}", "standin": f"fake cupy ({sources})"}
        return "backends: " + ", ".join(names[b] for b in CHOICES[chosen])
    cupy = import_cupy()
    version = cupy.cuda.runtime.driverGetVersion()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"backends: cupy {cupy.__version__} on {device}, driver for CUDA {version // 1000}.{version % 1000 // 10}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "card" in metafunc.fixturenames:
        names = [name for name in CHOICES[metafunc.config.getoption("backend")] if name != "numpy"]
        skip = pytest.mark.skip(reason="needs CuPy; --backend numpy leaves it out")
        metafunc.parametrize("card", names or [pytest.param("", marks=skip)], indirect=True)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", CHOICES[metafunc.config.getoption("backend")], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name for `layer.to(...)` and `to_backend(...)`: "numpy" or "cupy". The fake CuPy is installed for this test only."""
    if request.param == "standin":
        request.getfixturevalue("standin_cupy")
    return "numpy" if request.param == "numpy" else "cupy"


@pytest.fixture
def standin_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The fake CuPy as `import cupy` during this test; for tests that count. Products use its cuBLAS."""
    for name, module in standin.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    bindings = blas.bindings
    bindings.cache_clear()
    yield standin.module
    bindings.cache_clear()


@pytest.fixture
def card(request: pytest.FixtureRequest) -> ModuleType:
    """cupy or the fake CuPy, for tests of GPU code."""
    return request.getfixturevalue("standin_cupy") if request.param == "standin" else import_cupy()


@pytest.fixture
def xp(backend: str) -> ModuleType:
    """The module of the backend under test: numpy, cupy or the fake cupy."""
    return np if backend == "numpy" else import_cupy()


@pytest.fixture
def on(backend: str) -> Callable[..., Any]:
    """`on(x)`: an array, list or number as an array on the backend under test."""
    return lambda array, dtype=None: to_backend(np.asarray(array), backend, dtype)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)
