"""The reference: pure functions f and f_backward, with the equations and shapes of each; one family a file."""

from minilora.functional.activations import relu, relu_backward, silu, silu_backward, swiglu, swiglu_backward, tanh, tanh_backward
from minilora.functional.adamw import AdamStep, adamw
from minilora.functional.attention import attention, attention_backward, bounds_of, positions, softmax, softmax_backward
from minilora.functional.dropout import check_p, dropout, dropout_backward, dropout_mask
from minilora.functional.embedding import check_ids, embedding, embedding_backward, take_rows, take_rows_backward
from minilora.functional.gelu import gelu, gelu_backward, gelu_tanh, gelu_tanh_backward
from minilora.functional.linear import check_linear, linear, linear_backward
from minilora.functional.lora import check_lora, lora_linear, lora_linear_backward
from minilora.functional.losses import IGNORE, Labelled, cross_entropy, labelled, linear_cross_entropy, mse
from minilora.functional.norm import check_norm, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from minilora.functional.rotary import check_rotary, rotary, rotary_backward, rotary_tables
