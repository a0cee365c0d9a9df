"""Finite differences for every gradient: `gradcheck(layer, x)`, and `catalogue` for all that the project has.

(Not called `gradcheck`, since a module of that name would hide the function `minilora.gradcheck`.)
"""
