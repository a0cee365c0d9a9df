"""The heart: LoraConfig, the LoRA layer, inject / merge / unmerge / disabled, factorize."""

from minilora.lora.adapted import adaptation, lora_layers
from minilora.lora.config import LoraConfig
from minilora.lora.factorization import factorize
from minilora.lora.injection import disabled, inject, merge, unmerge
from minilora.lora.layer import LoRALinear
