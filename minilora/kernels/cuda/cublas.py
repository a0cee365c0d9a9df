"""The functions of cuBLAS that products need, called in the library that CuPy has loaded: nothing else has to be installed.

Importing this file raises ImportError, OSError or AttributeError where there is no such library. A call that cuBLAS refuses raises
RuntimeError with its status. Addresses are integers; the rest is as in NVIDIA's manual, cuBLAS, sections 2.4 and 2.8.
"""

from ctypes import CDLL, byref, c_char_p, c_int, c_longlong, c_size_t, c_void_p

from cupy_backends.cuda.libs import cublas as _of_cupy

_LIBRARY = CDLL(_of_cupy.__file__)  # CuPy's extension: looking a name up in it also searches the cuBLAS that it is linked to
_LIBRARY.cublasGetStatusString.restype = c_char_p

_HANDLE, _SHAPE = c_void_p, (c_int,) * 5  # transposed a, transposed b, m, n, k
_MATRIX, _STACK = (c_void_p, c_int, c_int), (c_void_p, c_int, c_int, c_longlong)  # address, type, leading dimension, step

_LIBRARY.cublasCreate_v2.argtypes = (c_void_p,)
_LIBRARY.cublasDestroy_v2.argtypes = (_HANDLE,)
_LIBRARY.cublasSetStream_v2.argtypes = (_HANDLE, c_void_p)
_LIBRARY.cublasSetWorkspace_v2.argtypes = (_HANDLE, c_void_p, c_size_t)
_gemm, _gemms = _LIBRARY.cublasGemmEx, _LIBRARY.cublasGemmStridedBatchedEx
_gemm.argtypes = (_HANDLE, *_SHAPE, c_void_p, *_MATRIX, *_MATRIX, c_void_p, *_MATRIX, c_int, c_int)
_gemms.argtypes = (_HANDLE, *_SHAPE, c_void_p, *_STACK, *_STACK, c_void_p, *_STACK, c_int, c_int, c_int)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS: {_LIBRARY.cublasGetStatusString(status).decode()}.")


def create() -> int:
    handle = c_void_p()
    _check(_LIBRARY.cublasCreate_v2(byref(handle)))
    return handle.value or 0


def destroy(handle: int) -> None:
    _check(_LIBRARY.cublasDestroy_v2(handle))


def set_stream(handle: int, stream: int) -> None:
    _check(_LIBRARY.cublasSetStream_v2(handle, stream))


def set_workspace(handle: int, address: int, size: int) -> None:
    _check(_LIBRARY.cublasSetWorkspace_v2(handle, address, size))


def gemm_ex(*arguments: int) -> None:
    """C = alpha op(A) op(B) + beta C: handle, op(A), op(B), m, n, k, alpha, A, B, beta, C, compute type, algorithm."""
    _check(_gemm(*arguments))


def gemm_strided_batched_ex(*arguments: int) -> None:
    """The same for a stack of matrices, at one distance each; their number precedes the compute type."""
    _check(_gemms(*arguments))
