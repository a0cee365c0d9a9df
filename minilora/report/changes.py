"""What training changed: the singular values of every dW, its effective rank and directions, and what it amplifies.

With dW = U diag(S) V^T, (m, n):

    effective rank   exp(- sum_i p_i log p_i),   p_i = S_i / sum_j S_j         (Roy and Vetterli 2007, eq. 3)
    similarity       phi(i, j) = ||U_i^T U'_j||_F^2 / min(i, j)                (LoRA, arXiv 2106.09685, eq. 4)
    amplification    ||dW||_F / ||U_r^T W V_r||_F                              (the same, section 7.3)

U_i are the first i columns of U. Random subspaces of R^m have phi(i, j) = max(i, j) / m on average.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Matrix
from minilora.formats.adapter_config import read_adapter_config
from minilora.formats.checkpoint import load_model
from minilora.formats.fetch import origin
from minilora.formats.tensors import map_tensors
from minilora.kernels import upcast
from minilora.layers import Linear
from minilora.lora import LoRALinear, lora_layers
from minilora.lora.layer import scaling
from minilora.report.read import Run
from minilora.runs.run_file import open_model

FULL = 8  # directions of a full-rank change that the amplification is about; of a product A B all r


@dataclass
class Change:
    """The change of one weight (m, n). NaN stands for what needs the base model, where that is not at hand."""

    shape: tuple[int, int]
    r: int
    S: np.ndarray  # singular values, in decreasing order
    directions: np.ndarray  # (m, r), those of A by its singular values, as in the paper; without A those of dW
    norm: float  # ||dW||_F
    effective_rank: float
    weight: float = math.nan  # ||W||_F
    within: float = math.nan  # ||U_r^T W V_r||_F
    amplification: float = math.nan


def effective_rank(S: np.ndarray) -> float:
    """1 for one direction, k for k equal ones, 0 for dW = 0."""
    p = S[S > 0] / S.sum() if S.any() else np.zeros(0)
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def similarity(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """phi(i, j) for all i and j: (columns of U, columns of V). Both have orthonormal columns of one length."""
    i, j = np.ogrid[1 : U.shape[1] + 1, 1 : V.shape[1] + 1]
    return ((U.T @ V) ** 2).cumsum(0).cumsum(1) / np.minimum(i, j)


def change_of(dW: np.ndarray | tuple[np.ndarray, np.ndarray], W: Any = None) -> Change:
    """The change dW of a weight W (m, n). As (A, B), its product is not formed: with A = Q R and B^T = P T,

    A B = Q (R T^T) P^T,   and only the small R T^T is decomposed.
    """
    if isinstance(dW, tuple):
        (Q, R), (P, T) = (np.linalg.qr(X.astype(np.float64)) for X in (dW[0], dW[1].T))
        U, S, Vt = np.linalg.svd(R @ T.T, full_matrices=False)
        U, Vt, directions, r = Q @ U, Vt @ P.T, Q @ np.linalg.svd(R, full_matrices=False)[0], len(S)
    else:
        U, S, Vt = np.linalg.svd(dW.astype(np.float64), full_matrices=False)
        directions, r = U, min(FULL, len(S))
    change = Change((len(U), Vt.shape[1]), r, S, directions[:, :64], float(np.linalg.norm(S)), effective_rank(S))
    if W is not None:
        W = upcast(W.dense() if isinstance(W, Matrix) else W).astype(np.float64)
        change.weight, change.within = (float(np.linalg.norm(X)) for X in (W, U[:, :r].T @ W @ Vt[:r].T))
        if change.norm and change.within:
            change.amplification = float(np.linalg.norm(S[:r])) / change.within
    return change


def changes_of(run: Run) -> dict[str, Change]:
    """{path: change} of every matrix that the run adapted or fully trained. What cannot be known is said in run.missing."""
    adapter, found = run.path / "adapter", None
    if (run.path / "model").is_dir():
        found = run.attempt("The change of the weights, from the base model,", lambda: _fully_trained(run))
    elif adapter.is_dir():
        found = run.attempt("The base model, which the amplification needs,", lambda: _adapted(run))
        found = run.attempt("The adapter", lambda: _from_file(adapter)) if found is None else found
    if not found:
        run.missing.append("No change of a weight matrix is known, so there are no singular values.")
    return found or {}


def _adapted(run: Run) -> dict[str, Change]:
    found = {}
    for path, layer in lora_layers(open_model(run.path, "numpy")):
        product = type(layer) is LoRALinear and layer.offset is None
        dW = (layer.scaling * layer.lora_A.data, layer.lora_B.data) if product else layer.delta()
        found[path] = change_of(dW, layer.weight.data)
    return found


def _fully_trained(run: Run) -> dict[str, Change]:
    """Every linear layer, but those that the base has not."""
    classes: dict[str, Any] = {"labels": run.labels, "new_head": True} if run.labels else {}
    base = load_model(run.settings["model"], "numpy", download=False, report=False, **classes)
    before = {path: layer.weight.data for path, layer in base.modules() if isinstance(layer, Linear) and path not in origin(base).drawn}
    after = dict(open_model(run.path, "numpy").modules())
    return {path: change_of(after[path].weight.data - W, W) for path, W in before.items()}


def _from_file(folder: Path) -> dict[str, Change]:
    """The products A B in an adapter's files."""
    config, (tensors, _) = read_adapter_config(folder), map_tensors(folder / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if (name := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)) and not config.use_dora:
            s = scaling(config.alpha_of(name[1]), config.rank_of(name[1]), config.use_rslora)
            found[name[1]] = change_of((s * upcast(A).T, upcast(tensors[key.replace("lora_A", "lora_B")]).T))
    return found
