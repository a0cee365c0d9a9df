"""Print the coefficients of minilora/functional/activations.py. Needs mpmath: pip install mpmath

G(t) = (1 + 2x) exp(x^2) erfc(x), with x = K (1 + t) / (1 - t), is smooth on [-1, 1]; it is interpolated at
Chebyshev nodes in 50 digits and rewritten in powers of t.
"""

from mpmath import cos, erfc, exp, mp, mpf, pi, sqrt

mp.dps = 50
K, TERMS, NODES = mpf("2.5"), 24, 60


def G(t: mpf) -> mpf:
    x = K * (1 + t) / (1 - t)
    return (1 + 2 * x) * exp(x * x) * erfc(x) if x < 1e6 else 2 / sqrt(pi)


def main() -> None:
    angles = [pi * (j + mpf(1) / 2) / NODES for j in range(NODES)]
    values = [G(cos(a)) for a in angles]
    T = [[mpf(1)], [mpf(0), mpf(1)]]  # Chebyshev polynomials in powers of t
    while len(T) < TERMS:
        doubled = [mpf(0)] + [2 * c for c in T[-1]]
        T.append([c - (T[-2][i] if i < len(T[-2]) else 0) for i, c in enumerate(doubled)])
    powers = [mpf(0)] * TERMS
    for m in range(TERMS):
        weight = sum(v * cos(m * a) for v, a in zip(values, angles, strict=True)) * (1 if m == 0 else 2) / NODES
        for i, c in enumerate(T[m]):
            powers[i] += weight * c
    for c in powers:
        print(f"    {float(c)!r},")


if __name__ == "__main__":
    main()
