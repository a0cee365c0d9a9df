"""One suite for two backends. A test that takes `backend` runs on each of those requested:

`pytest` runs on NumPy and on the fake CuPy (tests/fakecupy), on any machine; `pytest --backend cupy` is the GPU.
"""

from __future__ import annotations

import os

os.environ["MINILORA_TUNED"] = os.devnull  # before minilora is imported, here and in every process of a test
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: each worker keeps to one core
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fakecupy
import numpy as np
import pytest

from minilora.backend import import_cupy, to_backend
from minilora.kernels import cuda
from minilora.kernels.cuda import blas
from minilora.runs import finetune
from minilora.runs.plot import plot_run

CHOICES = {"numpy": ["numpy"], "fake": ["fake"], "cupy": ["cupy"], "both": ["numpy", "fake"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=CHOICES, default="both", help="what tests run on; both: numpy and the fake CuPy")


def pytest_configure(config: pytest.Config) -> None:
    finetune.plot_run = lambda *_: None  # 0.2 s a run; the fixture `curves` draws it
    if config.getoption("backend") != "cupy":
        cuda.ENABLED = cuda.ENABLED and fakecupy.cuda.COMPILER is not None
    else:
        config.addinivalue_line("filterwarnings", "ignore:products go by CuPy's own calls:UserWarning")  # without nvmath-python
        try:
            import_cupy()
        except (ImportError, RuntimeError) as error:
            raise pytest.UsageError(f"--backend cupy: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    chosen = config.getoption("backend")
    if chosen != "cupy":
        sources = "CUDA sources compiled by g++" if cuda.ENABLED else "CUDA sources not run: no g++, or MINILORA_KERNELS=plain"
        names = {"numpy": f"numpy {np.__version__}", "fake": f"fake CuPy ({sources})"}
        return "backends: " + ", ".join(names[b] for b in CHOICES[chosen])
    cupy = import_cupy()
    version = cupy.cuda.runtime.driverGetVersion()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"backends: cupy {cupy.__version__} on {device}, driver for CUDA {version // 1000}.{version % 1000 // 10}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "gpu" in metafunc.fixturenames:
        names = [name for name in CHOICES[metafunc.config.getoption("backend")] if name != "numpy"]
        skip = pytest.mark.skip(reason="for CuPy only; --backend numpy skips it")
        metafunc.parametrize("gpu", names or [pytest.param("", marks=skip)], indirect=True)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", CHOICES[metafunc.config.getoption("backend")], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name for `layer.to(...)` and `to_backend(...)`: "numpy" or "cupy". The fake CuPy is installed for this test only."""
    if request.param == "fake":
        request.getfixturevalue("fake_cupy")
    return "numpy" if request.param == "numpy" else "cupy"


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The fake CuPy, which `import cupy` returns during this test; for tests that count. Products use its cuBLAS."""
    for name, module in fakecupy.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    bindings = blas.bindings
    bindings.cache_clear()
    yield fakecupy.module
    bindings.cache_clear()


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> ModuleType:
    """CuPy or the fake CuPy, for tests of what only a GPU does."""
    return request.getfixturevalue("fake_cupy") if request.param == "fake" else import_cupy()


@pytest.fixture
def xp(backend: str) -> ModuleType:
    """The module of the backend under test: numpy, cupy, or the fake CuPy."""
    return np if backend == "numpy" else import_cupy()


@pytest.fixture
def on(backend: str) -> Callable[..., Any]:
    """`on(x)`: an array, list or number as an array on the backend under test."""
    return lambda array, dtype=None: to_backend(np.asarray(array), backend, dtype)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of this test draws its picture, curves.png."""
    monkeypatch.setattr(finetune, "plot_run", plot_run)


@pytest.fixture(scope="session")
def peft() -> ModuleType:
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"the live comparison needs {name}: pip install 'minilora[oracle]'")
    return pytest.importorskip("peft", reason="the live comparison needs peft: pip install 'minilora[oracle]'")
