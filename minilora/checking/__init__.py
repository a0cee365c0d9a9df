"""Finite differences for every gradient: `gradcheck(layer, x)`, and `catalogue` for everything in the project.

(The package is not called `gradcheck`, as that name would hide the function `minilora.gradcheck`.)
"""
