"""One coordinate of what an operation computes: formulas.txt, and the arrays and numbers that its formulas use beside the arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.functional.attention import _heads, _probabilities, _sequences
from minilora.quantization.residual import dense

Arrays = dict[str, Any]


def formulas() -> dict[str, list[str]]:
    """{operation: lines "y[i,j] = expression"}."""
    blocks = Path(__file__).with_name("formulas.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return {name: lines for name, *lines in (block.split("\n") for block in blocks[1:])}


def _lora(a: Arrays, i: int, j: int) -> Arrays:
    x = a["x"] if a.get("mask") is None else a["x"] * a["mask"]
    return {"u": x @ a["A"], **({"du": a["s"] * (a["dy"] @ a["B"].T)} if "dy" in a else {})}


def _dora(a: Arrays, i: int, j: int) -> Arrays:
    if a.get("mask") is not None:  # another formula: nothing is worked out
        return dict.fromkeys(("x", "u", "dy"))
    z = a["x"] @ a["A"]
    found = {"z": z, "u": a["x"] @ a["W"] + a["s"] * (z @ a["B"])}
    du = a["dy"] * (a["m"] / a["c"]) if "dy" in a else None
    return found if du is None else found | {"du": du, "dz": a["s"] * (du @ a["B"].T)}


def _vera(a: Arrays, i: int, j: int) -> Arrays:
    u = (a["x"] if a.get("mask") is None else a["x"] * a["mask"]) @ a["A"]
    return {"u": u, **({"dB": u.T @ a["dy"], "du": a["dy"] @ (a["d"][:, None] * a["B"] * a["e"]).T} if "dy" in a else {})}


def _embedded(a: Arrays, i: int, j: int) -> Arrays:
    return {"id": int(a["ids"][i]), "u": a["A"][a["ids"]], **({"du": a["s"] * (a["dy"] @ a["B"].T)} if "dy" in a else {})}


def _norm(a: Arrays, i: int, j: int) -> Arrays:
    eps = a.get("eps", 1e-6 if a.get("beta") is None else 1e-5)
    centred = a["x"] if a.get("beta") is None else a["x"] - a["x"].mean(axis=1, keepdims=True)
    return {"eps": eps, "n": a["x"].shape[1], "xhat": centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)}


def _rotary(a: Arrays, i: int, j: int) -> Arrays:
    half = a["cos"].shape[1]
    second, c = divmod(j % (2 * half), half)
    return {"c": c, "mate": j - half if second else j + half, "sign": 1 if second else -1}


def _attention(a: Arrays, i: int, j: int) -> Arrays:
    """Of the sequence of token i and the key head of feature j, as in functional/attention.py. g: the key that token i attends to most."""
    H, q, k, v, dy = a["n_head"], a["q"], a["k"], a["v"], a.get("dy")
    G, d = a.get("n_kv_head") or H, q.shape[1] // H
    rows, seq, places = next(s for s in _sequences(a.get("offsets"), len(k), a.get("rows")) if i < s[0].stop)
    head, e = divmod(j, d)
    share, nth = divmod(head, H // G)
    Q, K, V = _heads(q[rows], H, G), _heads(k[seq], G, G)[share], _heads(v[seq], G, G)[share]
    P = _probabilities(Q, _heads(k[seq], G, G), H, a.get("causal", True), places, a.get("window"))[share]
    S = np.where(P > 0, Q[share] @ K.T / math.sqrt(d), -np.inf)
    r, key = int(nth * len(places) + i - rows.start), int(places[i - rows.start])
    found = {"Q": Q[share], "K": K, "V": V, "P": P, "S": S, "d": d, "e": e, "r": r, "g": int(P[r].argmax())}
    if dy is not None:
        dO = _heads(dy[rows], H, G)[share]
        found |= {"dO": dO, "dP": dO @ V.T, "dS": F.softmax_backward(dO @ V.T, P)}
    return found | {"key": key, "at": int(seq.start) + key, "l": share * d + e}


def _loss(a: Arrays, i: int, j: int) -> Arrays:
    z = a["logits"] if "logits" in a else a["x"] @ a["W"]
    label = np.array(a["labels"].targets if isinstance(a["labels"], F.Labelled) else a["labels"])
    top = z.max(axis=1)
    logsumexp = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
    seen = label != F.IGNORE
    found = {"z": z, "label": label * seen, "counted": seen * float(a.get("times") or 1), "logsumexp": logsumexp}
    found |= {"N": a.get("count") or int(seen.sum())}
    return found if "logits" in a else found | {"p": np.exp(z - logsumexp[:, None])}


GIVEN: dict[str, Callable[[Arrays, int, int], Arrays]] = {
    "lora_linear": _lora,
    "dora_linear": _dora,
    "column_norms": lambda a, i, j: {"V": dense(a["W"]) + a["s"] * a["A"] @ a["B"]},
    "vera_linear": _vera,
    "lora_embedding": _embedded,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "rotary": _rotary,
    "attention": _attention,
    "cross_entropy": _loss,
    "linear_cross_entropy": _loss,
    "gelu_tanh": lambda a, i, j: {"root": math.sqrt(2 / math.pi)},
    "embedding": lambda a, i, j: {"id": int(a["ids"][i])},
    "take_rows": lambda a, i, j: {"row": i if a["rows"] is None else int(a["rows"][i])},
    "dropout": lambda a, i, j: {"mask": F.dropout_mask(a["x"], a["x"].shape, a["p"], a["key"])},
    "dropout_mask": lambda a, i, j: {"kept": (a["y"] > 0).astype(int)},
    "adamw": lambda a, i, j: {**a["step"]._asdict(), "w_new": F.adamw(*(a[n] for n in "w g m v rates decays step".split()))[0]},
}
