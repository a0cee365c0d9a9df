"""Initialisers of A and B: one file each."""
