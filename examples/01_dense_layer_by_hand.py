"""The gradient of a dense layer, derived by hand and checked against finite differences.

    y = x W + b             x (T, m), W (m, n), b (n,) -> y (T, n)
    L = mean((y - t)^2)     over all N = T n elements

Backward runs through the forward lines in reverse order:

    dy = 2 (y - t) / N      (T, n)    from L = mean((y - t)^2)
    db = sum_t dy_t         (n,)      from y = x W + b: b is added to every row
    dW = x^T dy             (m, n)    from y = x W + b: a sum over rows
    dx = dy W^T             (T, m)    from y = x W + b: the gradient that the layer below receives

The check moves one number at a time by h, up and down, and compares the losses:

    dL/da ~ (L(a + h) - L(a - h)) / 2h      truncation error O(h^2), rounding error about 1e-16 L / h

L is quadratic in each number here, so only the rounding error remains. Finite differences need float64.
"""

import argparse
from pathlib import Path

import numpy as np

import minilora as ml

# %% tags=["script"]
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", default="auto", choices=["auto", "numpy", "cupy"])
parser.add_argument("--out", default=".", type=Path, help="folder for the picture")
args = parser.parse_args()
backend, out = ml.choose_backend(args.backend), args.out

# %% the data
T, m, n = 5, 4, 3
rng = np.random.default_rng(0)
x, W, b, t = (ml.to_backend(rng.normal(size=shape), backend) for shape in [(T, m), (m, n), (n,), (T, n)])

# %% the gradients by hand

y = x @ W + b
dy = 2 * (y - t) / y.size
db = dy.sum(axis=0)
dW = x.T @ dy
dx = dy @ W.T

# %% the same gradients by finite differences


def loss():
    return float(((x @ W + b - t) ** 2).mean())


def differences(array, h=1e-5):
    """dL/d(array), one element at a time; changes `array` in place and restores it."""
    elements, gradient = array.ravel(), np.empty(array.size)
    for i in range(array.size):
        before = float(elements[i])
        elements[i] = before + h
        up = loss()
        elements[i] = before - h
        down = loss()
        elements[i] = before
        gradient[i] = (up - down) / (2 * h)
    return ml.to_backend(gradient.reshape(array.shape), backend)


def relative_error(a, reference):
    return float(abs(a - reference).max() / abs(reference).max())


print("gradient          first element                    largest relative")
print("             by hand       by difference           error of all")
rows = [("dW", dW, W), ("db", db, b), ("dx", dx, x)]
for name, gradient, array in rows:
    numeric = differences(array)
    first, second = float(gradient.ravel()[0]), float(numeric.ravel()[0])
    print(f"  {name}    {first:+.12f}   {second:+.12f}        {relative_error(gradient, numeric):.1e}")

# A check must be able to fail: three common mistakes, against the same finite differences.
print("\nrelative error of three common mistakes")
print(f"  dW without the 2 / N                          {relative_error(x.T @ (y - t), differences(W)):.1e}")
print(f"  db from the first row only                    {relative_error(dy[0], differences(b)):.1e}")
print(f"  dx divided by T instead of N = T n            {relative_error(dx * n, differences(x)):.1e}")

# %% the same layer in minilora: forward returns what backward needs

layer = ml.Linear(m, n, dtype="float64").to(backend)
layer.weight.data[...], layer.bias.data[...] = W, b

y, saved = layer.forward(x)
value, dy = ml.mse(y, t)
dx_layer = layer.backward(dy, saved)  # returns dx; adds dW and db to .grad

pairs = [(layer.weight.grad, dW), (layer.bias.grad, db), (dx_layer, dx)]
print(f"\nml.Linear against the lines above             {max(relative_error(a, by_hand) for a, by_hand in pairs):.1e}")
print("\nthe check of any layer, in one line: ml.gradcheck(layer, x)")
print(ml.gradcheck(layer, x))

# %% the picture

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture without matplotlib: pip install 'minilora[plot]'")
    raise SystemExit from None
plt.switch_backend("Agg")  # draws to a file; needs no display

steps = np.logspace(-12, 0, 49)


def errors(dtype, central):
    """The relative error of dL/dW[0, 0] by differences, for each step h; L is made quartic, so that h can be too large as well."""
    x_, W_, b_, t_ = (ml.to_numpy(array).astype(dtype) for array in (x, W, b, t))
    e = np.zeros_like(W_)
    e[0, 0] = 1

    def quartic(h):
        return (((x_ @ (W_ + dtype(h) * e) + b_ - t_) ** 2).mean()) ** 2

    exact = float(2 * quartic(0) ** 0.5 * ml.to_numpy(dW)[0, 0])  # d(L^2) = 2 L dL
    ways = [(quartic(h) - quartic(-h)) / (2 * h) if central else (quartic(h) - quartic(0)) / h for h in steps]
    return np.abs(np.array(ways, dtype=float) / exact - 1) + 1e-16


figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
axes.loglog(steps, errors(np.float64, True), color="#0072B2", linewidth=2, label="central, float64")
axes.loglog(steps, errors(np.float64, False), color="#E69F00", linewidth=2, label="one-sided, float64")
axes.loglog(steps, errors(np.float32, True), color="#D55E00", linewidth=2, label="central, float32")
axes.set(title="how good a finite difference is: error over its step", xlabel="h", ylabel="relative error", ylim=(1e-13, 10))
axes.annotate("rounding", (1e-10, 1e-5), rotation=-27, color="dimgrey")
axes.annotate("truncation", (6e-2, 1e-6), color="dimgrey")
axes.legend()
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "01_dense_layer_by_hand.png", dpi=120)
print(f"\npicture {out / '01_dense_layer_by_hand.png'}")
print("Look at the three curves: each falls, has a best h, and rises. With float32 the best is near 1e-4: too coarse for a check.")

# %% [markdown]
# ## Exercises
#
# 1. Replace the loss by `L = mean(|y - t|)`. Derive `dy`, change the two lines, and run the check. What happens where an element of
#    `y - t` is zero?
# 2. Let a second layer follow, `z = y V`, with the loss on `z`. Write `dV`, `dy`, and from it `dW`; check all three.
