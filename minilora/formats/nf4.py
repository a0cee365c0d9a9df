"""NF4 weights in safetensors, in the layout that transformers and bitsandbytes write and read (quantization/nf4.py).

<path>                                       (out in / 2, 1) bytes, two numbers each
<path>.absmax                                (blocks,) bytes      the magnitudes of the blocks
<path>.nested_absmax, .nested_quant_map      float32              theirs, and the meaning of a byte of <path>.absmax
<path>.quant_map                             (16,) float32        the meaning of four bits
<path>.quant_state.bitsandbytes__nf4         JSON, as bytes       shape, block sizes, offset
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import to_numpy
from minilora.formats.atomic import json_object
from minilora.quantization.nf4 import BLOCK, CODE, NESTED, NF4

_STATE = ".quant_state.bitsandbytes__nf4"
_LARGEST = 1e38  # of a magnitude: the sum of two is finite in float32
_PARTS = ("absmax", "nested_absmax", "nested_quant_map", "quant_map")
_DECIDE = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
CONFIG = {**_DECIDE, "bnb_4bit_compute_dtype": "float32"}  # what config.json says of it


def is_nf4_config(config: Any) -> bool:
    """Whether a quantization_config of config.json names this layout."""
    return isinstance(config, dict) and all(config.get(key) == value for key, value in _DECIDE.items())


def packed(path: str, W: NF4) -> dict[str, np.ndarray]:
    """The tensors that W (in, out) has in a file."""
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": W.shape[::-1]}
    state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": W.offset}
    parts = {"absmax": W.absmax, "nested_absmax": W.nested_absmax, "nested_quant_map": W.nested_code}
    tensors = {f"{path}.{name}": to_numpy(value) for name, value in parts.items()}
    tensors |= {path: to_numpy(W.codes)[:, None], f"{path}.quant_map": CODE}
    return tensors | {path + _STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def unpacked(tensors: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The tensors of a file with its NF4 weights put together. Raises ValueError when the parts of one do not fit."""
    found = dict(tensors)
    for path in [name.removesuffix(_STATE) for name in tensors if name.endswith(_STATE)]:
        try:
            state = json_object(found.pop(path + _STATE).tobytes(), _STATE)
            codes, parts = found.pop(path), {name: np.asarray(found.pop(f"{path}.{name}")) for name in _PARTS}
            n, m = state["shape"]
            blocks = -(-n * m // BLOCK)
            nested, code, offset = parts["nested_absmax"], parts["nested_quant_map"], state["nested_offset"]
            fit = {
                "shape": all(type(size) is int and size > 0 for size in (n, m)),
                "dtypes": nested.dtype == code.dtype == np.float32,
                "block sizes": (state["blocksize"], state["nested_blocksize"]) == (BLOCK, NESTED),
                "numbers": codes.dtype == np.uint8 and codes.size == -(-n * m // 2),
                "magnitudes": parts["absmax"].dtype == np.uint8 and parts["absmax"].shape == (blocks,),
                "nested magnitudes": nested.shape == (-(-blocks // NESTED),) and bool((abs(nested) < _LARGEST).all()),
                "code": np.array_equal(parts["quant_map"], CODE) and code.shape == (256,) and bool((abs(code) <= 1).all()),
                "offset": type(offset) in (int, float) and abs(offset) < _LARGEST,
            }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: the NF4 weight {path} is incomplete ({type(error).__name__}: {error}).") from None
        if wrong := [name for name, fits in fit.items() if not fits]:
            raise ValueError(f"{source}: the NF4 weight {path} of shape {(n, m)} does not fit its {wrong[0]}.")
        found[path] = NF4((m, n), np.array(codes.ravel()), np.array(parts["absmax"]), np.array(nested), float(offset), nested_code=code)
    return found
