"""Thin objects that own parameters and call `kernels`; one short file each. The contract is in `base.py`."""

from minilora.layers.activations import GELU, Activation, ReLU, SiLU, Tanh
from minilora.layers.base import Layer, Output, Parameter, Saved, needed
from minilora.layers.dropout import Dropout, reseed
from minilora.layers.embedding import Embedding
from minilora.layers.linear import Linear
from minilora.layers.norm import LayerNorm, RMSNorm
from minilora.layers.sequential import Sequential
