"""Fast twins of pairs in `functional/`, under the same names: what the layers call. To understand a gradient, read the pair there.

On NumPy an elementwise formula written plainly passes over memory once for every operation, and makes an array for each. Here the
arrays are walked through in blocks that stay in the cache, with `out=`, and forward keeps what backward would compute again.
On CuPy a pass is a launch, and CUDA sources do in one what a formula takes many for: cuda/. A twin agrees with its pair to rounding:
tests/test_kernels.py. Activations may be of 16 bits: half.py.
"""

from minilora.kernels import cuda
from minilora.kernels.activations import gelu, gelu_backward, gelu_tanh, gelu_tanh_backward, silu, silu_backward
from minilora.kernels.adamw import adamw
from minilora.kernels.attention import attention, attention_backward
from minilora.kernels.dropout import dropout, dropout_backward, dropout_mask
from minilora.kernels.elementwise import add, multiply
from minilora.kernels.gate import swiglu, swiglu_backward
from minilora.kernels.half import wide
from minilora.kernels.joined import attention_backward_joined
from minilora.kernels.linear import linear, linear_backward, product
from minilora.kernels.lora import lora_linear, lora_linear_backward
from minilora.kernels.losses import cross_entropy, linear_cross_entropy
from minilora.kernels.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from minilora.kernels.rotary import rotary, rotary_backward
