"""Write nf4.safetensors: small weights, quantized to NF4 with double quantization by bitsandbytes on a CPU.

pip install bitsandbytes==0.50.2 torch    (in a separate environment: nothing else needs it)
python tests/golden/make_nf4.py
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("nf4.safetensors")
SHAPES = {"square": (64, 64), "many blocks": (96, 200), "odd": (7, 13), "one block": (3, 5)}  # (out, in), PyTorch's orientation


def weight(name: str) -> np.ndarray:
    """(out, in), with the standard deviation of typical weights, one row of zeros and one large number."""
    W = np.random.default_rng(list(SHAPES).index(name)).standard_normal(SHAPES[name]).astype(np.float32) * 0.02
    W[0] = 0
    W[1, 2] = 1.5
    return W


def main() -> None:
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.numpy import save_file

    tensors = {}
    for name in SHAPES:
        codes, state = bnb.quantize_4bit(torch.from_numpy(weight(name)), quant_type="nf4", compress_statistics=True)
        tensors |= {
            f"{name}.codes": codes.numpy().ravel(),
            f"{name}.absmax": state.absmax.numpy(),
            f"{name}.nested_absmax": state.state2.absmax.numpy(),
            f"{name}.offset": state.offset.numpy().reshape(1),
            f"{name}.dequantized": bnb.dequantize_4bit(codes, state).numpy(),
        }
    tensors |= {"code": state.code.numpy(), "nested_code": state.state2.code.numpy()}
    save_file(tensors, FILE)


if __name__ == "__main__":
    main()
