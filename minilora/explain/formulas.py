"""One coordinate of what an operation computes: formulas.txt, and what its formulas use that is no expression of whole arrays."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.functional.attention import _heads, _probabilities, _sequences

Arrays = dict[str, Any]


@cache
def formulas() -> dict[str, list[str]]:
    """{operation: lines "y[i,j] = expression"}."""
    blocks = Path(__file__).with_name("formulas.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return {name: lines for name, *lines in (block.split("\n") for block in blocks[1:])}


def _rotary(a: Arrays, i: int, j: int) -> Arrays:
    half = a["cos"].shape[1]
    second, c = divmod(j % (2 * half), half)
    return {"c": c, "mate": j - half if second else j + half, "sign": 1 if second else -1}


def _attention(a: Arrays, i: int, j: int) -> Arrays:
    """Of the sequence of token i and the key head of feature j, as in functional/attention.py. g: the key that token i attends to most."""
    q, k, v, H, G = a["q"], a["k"], a["v"], a["n_head"], a["n_kv_head"] or a["n_head"]
    rows, seq, places = next(s for s in _sequences(a["offsets"], len(k), a["rows"]) if i < s[0].stop)
    d = q.shape[1] // H
    head, e = divmod(j, d)
    share, nth = divmod(head, H // G)
    Q, K, V = _heads(q[rows], H, G), _heads(k[seq], G, G)[share], _heads(v[seq], G, G)[share]
    P = _probabilities(Q, _heads(k[seq], G, G), H, a.get("causal", True), places, a.get("window"))[share]
    S = np.where(P > 0, Q[share] @ K.T / math.sqrt(d), -np.inf)
    r, key = int(nth * len(places) + i - rows.start), int(places[i - rows.start])
    found = {"Q": Q[share], "K": K, "V": V, "P": P, "S": S, "d": d, "e": e, "r": r, "g": int(P[r].argmax())}
    found |= {"key": key, "at": int(seq.start) + key, "l": share * d + e}
    return found | ({"dO": _heads(a["dy"][rows], H, G)[share]} if "dy" in a else {})


def _loss(a: Arrays, i: int, j: int) -> Arrays:
    """labels (T,) are 0 where they do not count; counted (T,) is 0 there, else the factor of the loss."""
    labels = np.array(a["labels"].targets if isinstance(a["labels"], F.Labelled) else a["labels"])
    seen = labels != F.IGNORE
    return {"label": labels * seen, "counted": seen * a.get("times", 1.0), "N": a.get("count") or int(seen.sum())}


GIVEN: dict[str, Callable[[Arrays, int, int], Arrays]] = {
    "rotary": _rotary,
    "attention": _attention,
    "cross_entropy": _loss,
    "linear_cross_entropy": _loss,
    "embedding": lambda a, i, j: {"id": int(a["ids"][i])},
    "lora_embedding": lambda a, i, j: {"id": int(a["ids"][i])},
    "take_rows": lambda a, i, j: {"row": i if a["rows"] is None else int(a["rows"][i])},
    "dropout": lambda a, i, j: {"mask": F.dropout_mask(a["x"], a["x"].shape, a["p"], a["key"])},
    "dropout_mask": lambda a, i, j: {"kept": (a["y"] > 0).astype(int)},
    "adamw": lambda a, i, j: {**a["step"]._asdict(), "w_new": F.adamw(*(a[n] for n in "w g m v rates decays step".split()))[0]},
}
