"""Rotary frequencies for sequences beyond the length of pre-training: `rope_scaling` in config.json, or `rope_parameters`.

    f_i = theta^(-2 i / d), i = 0 ... d / 2 - 1, the angle by which pair i of a head is rotated from one position to the next; it
    repeats after 2 pi / f_i positions. L is original_max_position_embeddings, s the factor.

linear     f_i / s                                                                                      (arXiv 2306.15595)
dynamic    f_i up to max_position_embeddings, where it is transformers' too; longer sequences are refused
llama3     f_i, where it repeats more than high_freq_factor times in L; f_i / s, where less than low_freq_factor times; between, a mixture
yarn       f_i and f_i / s mixed likewise, from beta_fast to beta_slow times; cos and sin times an attention factor  (arXiv 2309.00071)
longrope   f_i / short_factor_i, where long_factor is the same; cos and sin times an attention factor     (arXiv 2402.13753)
"""

import math
from typing import Any

import numpy as np

_LENGTH = "original_max_position_embeddings"
_KEYS = {  # rope_type: the settings that it needs, and those that it may have
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "llama3": (f"factor low_freq_factor high_freq_factor {_LENGTH}", ""),
    "yarn": (f"factor {_LENGTH}", "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"),
    "longrope": (f"short_factor long_factor {_LENGTH}", "factor attention_factor"),
}
_LISTS = "short_factor", "long_factor"


def check_scaling(rope: dict[str, Any], where: str, limit: int) -> dict[str, Any] | None:
    """The settings of a rotary embedding, without a theta and without what is null; None for the default ones.

    Some files say "type" for rope_type. L is `limit`, max_position_embeddings, if it is not given. Raises ValueError, beginning with
    `where`, for what is not supported, lacks, is unknown, or is no positive number.
    """
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    part = rope.pop("partial_rotary_factor", 1)
    if not isinstance(kind, str) or kind not in _KEYS or part != 1:
        raise ValueError(f"{where}; supported: rope_type {', '.join(_KEYS)}, and no partial_rotary_factor.")
    needs, may = (names.split() for names in _KEYS[kind])
    if _LENGTH in needs:
        rope.setdefault(_LENGTH, limit)
    if wrong := [*(name for name in needs if name not in rope), *sorted(rope.keys() - {*needs, *may})]:
        raise ValueError(f"{where}; a rotary embedding of type {kind} {'lacks' if wrong[0] in needs else 'does not have'} {wrong[0]}.")
    for name, value in rope.items():
        values = value if name in _LISTS and isinstance(value, list) else [value]
        good = isinstance(value, bool) if name == "truncate" else all(type(x) in (int, float) and 0 < x < 1e38 for x in values)
        if not good or (name in _LISTS) != isinstance(value, list):
            raise ValueError(f"{where}; {name} is {value!r:.40}, which does not fit.")
    if kind == "longrope":
        rope.setdefault("factor", limit / rope[_LENGTH])
        if rope["short_factor"] != rope["long_factor"]:
            raise ValueError(f"{where}; longrope is supported where short_factor and long_factor are the same.")
    if rope.get("high_freq_factor", 1) <= rope.get("low_freq_factor", 0):
        raise ValueError(f"{where}; high_freq_factor must be above low_freq_factor.")
    return None if kind == "default" else {"rope_type": kind, **rope}


def frequencies(d: int, theta: float, rope: dict[str, Any] | None) -> tuple[np.ndarray, float]:
    """f (d / 2,) and the attention factor, for heads of d features and settings that `check_scaling` returned. All in float64.

    Raises ValueError where the settings give no finite frequencies.
    """
    theta, rope = float(theta), {name: float(x) if type(x) is int else x for name, x in (rope or {}).items()}  # an int may be beyond int64
    f = theta ** (-np.arange(0, d, 2) / d)
    kind, s, L = rope.get("rope_type"), rope.get("factor", 1), rope.get(_LENGTH, 1)
    attention = 1.0
    with np.errstate(all="ignore"):
        if kind == "linear":
            f = f / s
        elif kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = np.clip((L * f / (2 * math.pi) - low) / np.float64(high - low), 0, 1)  # repeats, from low to high
            f = f / s * (1 - kept) + f * kept
        elif kind == "yarn":
            rotations = np.array([rope.get("beta_fast", 32), rope.get("beta_slow", 1)])
            ends = d * np.log(L / (rotations * 2 * math.pi)) / (2 * np.log(theta))  # the i at which a pair repeats so often in L
            first, last = (math.floor(ends[0]), math.ceil(ends[1])) if rope.get("truncate", True) and np.isfinite(ends).all() else ends
            first, last = max(first, 0), min(last, d - 1)
            kept = 1 - np.clip((np.arange(d // 2) - first) / (last - first if last != first else 1e-3), 0, 1)
            f = f / s * (1 - kept) + f * kept
            one, all_ = rope.get("mscale"), rope.get("mscale_all_dim")
            attention = _scale(s, one) / _scale(s, all_) if one and all_ else _scale(s)
        elif kind == "longrope":
            if len(rope["short_factor"]) != d // 2:
                raise ValueError(f"longrope: short_factor has {len(rope['short_factor'])} numbers; a head of {d} features needs {d // 2}.")
            f = f / np.array(rope["short_factor"])
            attention = float(np.sqrt(1 + np.log(s) / np.log(L))) if s > 1 else 1.0
    attention = rope.get("attention_factor", attention)
    if not np.isfinite([*f, attention]).all():
        raise ValueError(f"rope_type {kind} with theta {theta} and {rope!r:.200} gives no finite frequencies.")
    return f, attention


def _scale(s: float, m: float = 1) -> float:
    """YaRN's attention factor, section 3.4."""
    return 0.1 * m * math.log(s) + 1 if s > 1 else 1.0
