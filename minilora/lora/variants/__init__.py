"""Variants of the LoRA layer: one file each."""
