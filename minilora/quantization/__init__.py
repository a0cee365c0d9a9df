"""Weights of fewer bits: NF4, half precision, and a weight less a low-rank product. Each stands in for a weight as backend.Matrix does."""
