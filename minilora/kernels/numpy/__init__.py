"""Optimised kernels on NumPy, one family of operations a file.

A formula written plainly passes over memory once for every operation, and makes an array for each. Here arrays are walked through in blocks
that stay in the cache, with `out=`, and forward keeps what backward would compute again.
"""
