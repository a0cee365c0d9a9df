"""Matrices that stand in for a weight in products."""
