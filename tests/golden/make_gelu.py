"""Print the coefficients of minilora/kernels/numpy/pointwise.py: erf(x / sqrt 2) = tanh(x P(x^2)) to float32 precision.

x P(x^2) = artanh(erf(x / sqrt 2)) is smooth. The fit of P minimises the error of x Phi(x): the weights are the derivative of tanh, and
increase step by step where the error is large, until it is nearly uniform (Lawson's algorithm).
"""

import math

import numpy as np
from numpy.polynomial import chebyshev, polynomial

LARGEST, DEGREE = 5.6, 8


def main() -> None:
    x = np.cos(np.linspace(0, np.pi / 2, 4001)) * LARGEST
    x = x[x > 1e-3]
    erf, erfc = (np.array([f(v / math.sqrt(2)) for v in x]) for f in (math.erf, math.erfc))
    expected = 0.5 * (np.log1p(erf) - np.log(erfc)) / x  # artanh, from erfc where erf is nearly 1
    counts = np.maximum((1 - erf * erf) * x * np.maximum(1, x), 1e-9)
    at, weights = 2 * (x / LARGEST) ** 2 - 1, counts
    for _ in range(200):
        fit = chebyshev.chebfit(at, expected, DEGREE, w=weights)
        error = np.abs((chebyshev.chebval(at, fit) - expected) * counts)
        weights = weights * (0.5 + 0.5 * error / error.mean()) ** 0.5
    in_powers = polynomial.Polynomial(chebyshev.cheb2poly(fit))(polynomial.Polynomial([-1, 2 / LARGEST**2]))
    for c in in_powers.coef:
        print(f"    {float(np.float32(c))!r},")


if __name__ == "__main__":
    main()
