"""Everything that has a gradient here, ready to be checked: what `minilora gradcheck` and the tests check."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minilora.backend import to_backend
from minilora.checking.catalogue_layers import adapters, layers
from minilora.checking.catalogue_models import models
from minilora.checking.catalogue_pairs import pairs
from minilora.checking.gradcheck import gradcheck
from minilora.checking.report import Report
from minilora.checking.subjects import Subject


def catalogue(seed: int = 0) -> Iterator[Subject]:
    """(name, object, x, forward options) of every pair, layer and model, on small odd shapes, in float64 on NumPy."""
    rng = np.random.default_rng(seed)
    for part in (pairs, layers, adapters, models):
        yield from part(rng)


def check_all(backend: str = "numpy", tol: float = 1e-7) -> Iterator[tuple[str, Report]]:
    """(name, report) for everything in the catalogue, on a backend."""
    for name, layer, x, options in catalogue():
        on_device = x if x.dtype.kind != "f" else to_backend(x, backend)
        yield name, gradcheck(layer.to(backend), on_device, tol=tol, max_coordinates=40, **options)
