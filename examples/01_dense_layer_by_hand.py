"""The gradient of a dense layer, written by hand, and how one knows that it is right.

    y = x W + b             x (T, m), W (m, n), b (n,) -> y (T, n)
    L = mean((y - t)^2)     over all N = T n elements

Backward reads in the reverse order of forward. Each line takes dL/d(left side) to dL/d(what stood on the right):

    dy = 2 (y - t) / N      (T, n)    from L = mean((y - t)^2)
    db = sum_t dy_t         (n,)      from y = x W + b: b was added to every row
    dW = x^T dy             (m, n)    from y = x W + b: a sum over rows
    dx = dy W^T             (T, m)    from y = x W + b: what the layer below receives

Whether that is right is not a matter of opinion. Move one number by h, up and down, and look at the loss:

    dL/da ~ (L(a + h) - L(a - h)) / 2h      wrong by O(h^2), and by rounding, about 1e-16 L / h

L is quadratic in each number here, so only the rounding remains, which is why this is done in float64.
"""

import argparse

import numpy as np

import minilora as ml

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", default="auto", choices=["auto", "numpy", "cupy"])
parser.add_argument("--out", default=".", help="not used here: this example draws nothing")
backend = ml.choose_backend(parser.parse_args().backend)

T, m, n = 5, 4, 3
rng = np.random.default_rng(0)
x, W, b, t = (ml.to_backend(rng.normal(size=shape), backend) for shape in [(T, m), (m, n), (n,), (T, n)])

# -- by hand: the whole of it ---------------------------------------------------------------------------------------

y = x @ W + b
dy = 2 * (y - t) / y.size
db = dy.sum(axis=0)
dW = x.T @ dy
dx = dy @ W.T

# -- by finite differences: the same numbers, from the loss alone ---------------------------------------------------


def loss():
    return float(((x @ W + b - t) ** 2).mean())


def differences(array, h=1e-5):
    """dL/d(array), one element at a time; `array` is moved in place and put back."""
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

# A check is worth something only if it can fail. Three classic mistakes, against the same differences:
print("\nthree mistakes, and what the check says")
print(f"  dW without the 2 / N                          {relative_error(x.T @ (y - t), differences(W)):.1e}")
print(f"  db from the first row only                    {relative_error(dy[0], differences(b)):.1e}")
print(f"  dx with T, the rows, in place of N = T n      {relative_error(dx * n, differences(x)):.1e}")

# -- the same with minilora: forward returns what its backward will need --------------------------------------------

layer = ml.Linear(m, n, dtype="float64").to(backend)
layer.weight.data[...], layer.bias.data[...] = W, b

y, saved = layer.forward(x)
value, dy = ml.mse(y, t)
dx_layer = layer.backward(dy, saved)  # returns dx; adds dW and db into .grad

pairs = [(layer.weight.grad, dW), (layer.bias.grad, db), (dx_layer, dx)]
print(f"\nml.Linear beside the lines above              {max(relative_error(a, by_hand) for a, by_hand in pairs):.1e}")
print("\nand for any layer, in one line: ml.gradcheck(layer, x)")
print(ml.gradcheck(layer, x))
