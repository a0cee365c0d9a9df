"""Initialisers of A and B, by what they read: shapes alone, the weight, or data."""
