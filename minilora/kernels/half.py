"""Half precision (float16, bfloat16) where no kernel takes it: arguments are upcast, the work is done in float32, results are downcast.

kernels/dispatch.py does so around any operation. That saves memory, not time; on a GPU the CUDA kernels and cuBLAS take half precision.
"""

from typing import Any

import numpy as np

HALF = ("float16", "bfloat16")


def is_half(x: Any) -> bool:
    """Whether x is an array of float16 or bfloat16. (ml_dtypes' bfloat16 is of kind "V".)"""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and dtype.itemsize == 2 and dtype.kind in "fV"


def upcast(x: Any) -> Any:
    """x in float32 where it is of half precision, also within tuples and lists; anything else as it is."""
    if type(x) in (tuple, list):
        return type(x)(map(upcast, x))
    return x.astype(np.float32) if is_half(x) else x


def downcast(x: Any, dtype: Any) -> Any:
    """The reverse of `upcast`, but for statistics of rows (..., 1), which stay in float32."""
    if type(x) in (tuple, list):
        return type(x)(downcast(v, dtype) for v in x)
    is_array = getattr(x, "ndim", 0) > 0 and x.dtype == np.float32
    return x.astype(dtype, copy=False) if is_array and x.shape[-1] != 1 else x
