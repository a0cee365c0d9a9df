"""The CUDA sources through NVRTC, the compiler that CuPy hands them to on a GPU: it needs no GPU, and here no header either."""

import pytest
from test_cuda import VARIANTS

from minilora.kernels import cuda


@pytest.mark.parametrize(("file", "dtype", "options"), VARIANTS)
def test_nvrtc_compiles_the_sources(file, dtype, options):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVIDIA's NVRTC, which minilora[oracle] brings")
    result = [option.encode() for option in (*cuda.options_of(dtype), *options, "--gpu-architecture=sm_90", "-std=c++17")]
    error, program = nvrtc.nvrtcCreateProgram(cuda.source_of(file).encode(), file.encode(), 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    (error,) = nvrtc.nvrtcCompileProgram(program, len(result), result)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size + 1)  # not of one byte, which Python shares between objects
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert not log.strip(b" \0"), log.decode()  # no warnings
