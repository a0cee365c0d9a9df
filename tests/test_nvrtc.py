"""The CUDA sources through NVRTC, the compiler that CuPy hands them to on a card: it needs no card, and here no header either."""

import pytest
from test_cuda import FILES

from minilora.kernels import cuda


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("file", FILES)
def test_nvrtc_compiles_the_sources(file, real):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVIDIA's NVRTC, which minilora[oracle] brings")
    options = [f"-DREAL={real}".encode(), b"--gpu-architecture=sm_90", b"-std=c++17"]
    error, program = nvrtc.nvrtcCreateProgram(cuda.source_of(file).encode(), file.encode(), 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert not log.strip(b" \0"), log.decode()  # no warning either
