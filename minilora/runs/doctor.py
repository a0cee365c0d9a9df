"""`minilora doctor`: what this installation consists of, and whether its matrix products are right.

Some builds of BLAS return wrong numbers for some layouts (numpy/numpy#31776), and everything here stands on products. The factors are
small integers: every product and sum is exact in float32, so that the right result is known to the bit from integer arithmetic.
"""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from minilora import tuned
from minilora.backend import import_cupy
from minilora.kernels.cuda import blas
from minilora.runs import Say, silent
from minilora.runs.tune import tune

PACKAGES = (
    "minilora numpy safetensors tokenizers threadpoolctl ml_dtypes gguf matplotlib pyarrow jinja2 huggingface_hub mpi4py "
    "cupy-cuda13x cupy-cuda12x torch transformers peft"
).split()
SIZES = ((1, 1, 1), (3, 5, 2), (17, 31, 33), (64, 96, 40), (129, 67, 130))  # (m, k, n): around the sizes of BLAS kernels' blocks


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same matrix in the memory layouts that training has."""
    m, n = x.shape
    wide, every_other = np.zeros((m, n + 3), x.dtype), np.zeros((2 * m, n), x.dtype)
    wide[:, 2 : n + 2], every_other[::2] = x, x
    return {"rows": x, "columns": np.asfortranarray(x), "part of a wider one": wide[:, 2 : n + 2], "every other row": every_other[::2]}


def wrong_products(with_threads: bool = True) -> list[str]:
    """Names of the products that are not exact. A few milliseconds, without those of several threads."""
    wrong = set()
    for threads in (1, None) if with_threads else (1,):  # training has one BLAS thread in each of its own
        with threadpool_limits(threads, user_api="blas"), np.errstate(all="ignore"):
            for m, k, n in SIZES:
                rng = np.random.default_rng(m)
                a, b = (rng.integers(-8, 9, shape) for shape in ((m, k), (k, n)))
                expected, squares = a @ b, a @ a.T  # of integers: NumPy's own loops, without BLAS
                for dtype in ("float32", "float64"):
                    of_a, of_b = layouts(a.astype(dtype)), layouts(b.astype(dtype))
                    found = [f"A A^T ({how})" for how, x in of_a.items() if not np.array_equal(x @ x.T, squares)]
                    pairs = product(of_a.items(), of_b.items())
                    found += [f"A B ({how_a}, {how_b})" for (how_a, x), (how_b, y) in pairs if not np.array_equal(x @ y, expected)]
                    wrong |= {f"{name} in {dtype}, {m} x {k} x {n}" for name in found}
    return sorted(wrong)


def check_products() -> None:
    """Raise RuntimeError when a product is wrong: nothing that is trained here would be right."""
    if wrong := wrong_products(with_threads=False):
        raise RuntimeError(f"this NumPy's matrix products are wrong ({wrong[0]}); install another build of NumPy, and see minilora doctor.")


def doctor(say: Say = silent, measure: bool = False) -> dict[str, Any]:
    """Versions, BLAS, memory, the GPU, what suits the processor (measured first with `measure`), and the test of products.

    Raises RuntimeError, after printing, when products are wrong.
    """
    if measure:
        tune(say)
        tuned.apply()
    wrong = wrong_products()
    about: dict[str, Any] = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "blas": [
            {key: info.get(key) for key in ("internal_api", "version", "architecture", "num_threads")}
            for info in threadpool_info()
            if info["user_api"] == "blas"
        ],
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "gpu": _gpu(),
        "processor": tuned.processor(),
        "tuned": {"kernels": tuned.kernels, "sizes": tuned.sizes} if tuned.applied else None,
        "wrong_products": wrong,
    }
    say(f"python     {about['python']}")
    say(f"packages   {', '.join(f'{name} {found}' for name, found in about['packages'].items())}")
    for info in about["blas"]:
        say(f"blas       {info['internal_api']} {info['version']}, kernels for {info['architecture']}, {info['num_threads']} threads")
    size = "unknown" if about["memory_bytes"] is None else f"{about['memory_bytes'] / 1e9:.1f} GB"
    say(f"machine    {about['cores']} cores, memory {size}, {about['free_disk_bytes'] / 1e9:.1f} GB free on this disk")
    say(f"gpu        {about['gpu']}")
    say(f"tuned      {_tuned()}")
    say(f"products   {'right' if not wrong else 'WRONG: ' + '; '.join(wrong)}")
    if wrong:
        raise RuntimeError(f"{len(wrong)} matrix products are wrong; install another build of NumPy.")
    return about


def _tuned() -> str:
    """What `tune` found for this processor."""
    if not tuned.applied:
        return "no; minilora doctor --tune measures what suits this processor, in about two minutes"
    sizes = ", ".join(f"{name} {size:,}" for name, size in tuned.sizes.items())
    return f"kernels {tuned.kernels or 'as OpenBLAS chooses'}, {sizes} ({tuned.path()})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _gpu() -> str:
    try:
        cupy = import_cupy()
        how = "cuBLAS" if blas.bindings() is not None else "CuPy"
    except (ImportError, RuntimeError) as error:
        return f"none ({str(error).partition(';')[0]})"
    about, driver = cupy.cuda.runtime.getDeviceProperties(0), cupy.cuda.runtime.driverGetVersion()
    return f"{about['name'].decode()}, {about['totalGlobalMem'] / 1e9:.1f} GB, driver for CUDA {driver // 1000}, products by {how}"
