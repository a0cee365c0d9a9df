"""Matrices in place of a weight (backend.Matrix): NF4, and a weight less a low-rank product; and half precision for a whole model."""
