"""The heart: LoraConfig, the LoRA layer, inject / merge / unmerge / disabled, factorize."""

from minilora.lora.config import LoraConfig
from minilora.lora.factorization import factorize
from minilora.lora.injection import adaptation, adapter_parameters, disabled, inject, lora_layers, merge, unmerge
from minilora.lora.layer import LoRALinear
