"""The error function. NumPy has none, and CuPy's turns float16 into float64."""

from __future__ import annotations

from minilora.backend import Array, get_xp

_K = 2.5
# (1 + 2x) exp(x^2) erfc(x) in powers of t = (x - K) / (x + K); tests/golden/make_erf.py prints them
_G = [
    float(c)
    for c in """1.2648381843668617 -0.12235676308240215 -0.09902453957365122 0.1576299190229927 -0.10296705603621854
    0.03276089327566133 0.0009318927733468689 -0.004382078440847587 0.0004918662388834135 0.0006321251464155949
    -8.848168029900339e-05 -0.00011352632492718974 6.2749300957096e-06 2.2712248592600015e-05 2.5875002384947698e-06
    -4.244612526599291e-06 -1.550921327837679e-06 5.650897898007257e-07 4.973311423124062e-07 -2.595789779732572e-09
    -1.0181458785967409e-07 -1.9529757279629242e-08 1.043327246672333e-08 3.3505549185349607e-09""".split()
]


def erf(x: Array) -> Array:
    """erf(x) = 2 / sqrt(pi) * integral of exp(-s^2) from 0 to x, to about 5e-16 absolute in float64.

    For x >= 0:  erf(x) = 1 - exp(-x^2) G(t) / (1 + 2x),  G a polynomial in t = (x - K) / (x + K), which maps
    [0, inf) to [-1, 1) (Shepherd and Laframboise, Math. Comp. 36, 1981).  erf is odd, and 1 to rounding from x = 6 on.
    """
    xp = get_xp(x)
    a = xp.minimum(abs(x), 6)
    t = (a - _K) / (a + _K)
    G = t * _G[-1] + _G[-2]
    for c in reversed(_G[:-2]):
        G *= t
        G += c
    return xp.copysign(1 - xp.exp(-a * a) * G / (1 + 2 * a), x)
