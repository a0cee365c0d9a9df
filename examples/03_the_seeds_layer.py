"""One LoRA layer with three initialisations: A and B drawn from N(0, 1), B = 0, and A = B = 0.

The seed's sample computes   x @ (W + A @ B),   A (m, r), B (r, n), both drawn from N(0, 1), and trains A and B. Here:

    y  = x W + s (x A) B            s = alpha / r; the sample has s = 1. W + A B is never formed
    dB = s (x A)^T dy               zero if A = 0
    dA = s x^T (dy B^T)             zero if B = 0: A moves from the second step on
    dx = dy W^T + s (dy B^T) A^T

Each element of A B is a sum of r products of two N(0, 1) numbers, with standard deviation sqrt(r); W has sigma. At the first step

    ||x A B|| / ||x W|| ~ sqrt(r) / sigma     which is sqrt(r d) for W ~ N(0, 1 / d), the scale that keeps y as large as x

Training must first undo this perturbation. It is undone only in the directions that the examples cover, so the error on new
data stays high. With B = 0 the layer initially equals the frozen one exactly. With A = B = 0 both gradients are zero and stay zero.
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

# %% the layer

rng = np.random.default_rng(0)


def normal(*shape, sigma=1.0):
    return ml.to_backend(rng.normal(0, sigma, shape), backend)


def lora(W, r, init):
    """A LoRALinear over W without bias, with s = alpha / r = 1 as in the sample."""
    base = ml.Linear(*W.shape, bias=False, dtype="float64").to(backend)
    base.weight.data = W
    return ml.LoRALinear(base, r=r, alpha=r, init=init, rng=1)


def norm(a):
    return float((a * a).sum()) ** 0.5


# %% the seed's sample: 1000 x 1000, rank 10

W, x = normal(1000, 1000), normal(1, 1000)
layer = lora(W, 10, "normal")
A, B = layer.lora_A.data, layer.lora_B.data
y, _ = layer.forward(x, keep=False)
sizes = [p.data.size for _, p in layer.parameters()]
trained = sum(p.data.size for _, p in layer.parameters() if p.trainable)
print(f"x @ (W + A @ B) against x W + (x A) B       relative difference {norm(x @ (W + A @ B) - y) / norm(y):.1e}")
print(f"trainable parameters                        {trained:,} of {sum(sizes):,} (the sample's nn.Parameter(W) trains all of them)")

# %% the first step of a layer with W ~ N(0, 1/d)

d, r, T = 384, 8, 192  # fewer examples than dimensions, as is usual in fine-tuning
W = normal(d, d, sigma=d**-0.5)
shift = normal(d, 4) @ normal(4, d, sigma=0.16 * d**-0.5)  # the target is W + shift: rank 4, a tenth of y's variance
x, x_new = normal(T, d), normal(T, d)
t, t_new = x @ (W + shift), x_new @ (W + shift)
print(f"\nd = {d}, r = {r}, first step     ||x A B|| / ||x W||      ||dA||       ||dB||        sqrt(r d) = {(r * d) ** 0.5:.1f}")
for name, init in [("A, B ~ N(0, 1)", "normal"), ("A Kaiming, B = 0", True), ("A = 0, B = 0", None)]:
    layer = lora(W, r, init or True)
    if init is None:
        layer.lora_A.data[...] = 0
    y, saved = layer.forward(x, need_dx=False)
    layer.backward(ml.mse(y, t)[1], saved, need_dx=False)
    ratio = norm(x @ layer.delta()) / norm(x @ W)
    print(f"  {name:<26} {ratio:15.4g} {norm(layer.lora_A.grad):15.4g} {norm(layer.lora_B.grad):12.4g}")

# %% the effect on training: 150 steps from both initialisations, each with its best learning rate


def train(init, lr, steps=150, every=5):
    """Rows (step, loss on the training data, loss on new data); the first row is before any step."""
    layer, rows = lora(W, r, init), []
    optimizer = ml.AdamW(layer.parameters(), lr)
    for step in range(steps + 1):
        optimizer.lr = lr * (1 - step / steps)
        optimizer.zero_grad()
        y, saved = layer.forward(x, need_dx=False)
        loss, dy = ml.mse(y, t)
        if step % every == 0:
            y_new, _ = layer.forward(x_new, keep=False)
            rows.append((step, float(loss), float(ml.mse(y_new, t_new)[0])))
        layer.backward(dy, saved, need_dx=False)
        optimizer.step()
    return np.array(rows)


frozen = float(ml.mse(x_new @ W, t_new)[0])
print(f"\nmean squared error on new data, frozen W: {frozen:.4f}")
best = {}
for name, init in [("A, B ~ N(0, 1)", "normal"), ("A Kaiming, B = 0", True)]:
    runs = {lr: train(init, lr) for lr in (0.03, 0.3, 1.0)}
    lr = min(runs, key=lambda lr: runs[lr][-1, 2])
    best[name] = run = runs[lr]
    print(f"  {name:<18} lr {lr:<5} first {run[0, 2]:10.4f}    last {run[-1, 2]:8.4f}    training, last {run[-1, 1]:.1e}")

# %% the picture

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture without matplotlib: pip install 'minilora[plot]'")
    raise SystemExit from None
plt.switch_backend("Agg")  # draws to a file; needs no display

figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
for (name, run), colour in zip(best.items(), ("#D55E00", "#0072B2"), strict=True):
    axes.semilogy(run[:, 0], run[:, 2], color=colour, linewidth=2, label=f"{name}: new data")
    axes.semilogy(run[:, 0], run[:, 1], color=colour, linewidth=1.5, linestyle=":", label=f"{name}: training data")
axes.axhline(frozen, color="black", linestyle="--", linewidth=1, label="frozen W: new data")
axes.set(title=f"LoRA of rank {r} on {T} examples in {d} dimensions", xlabel="step", ylabel="mean squared error")
axes.legend(fontsize=9)
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "03_the_seeds_layer.png", dpi=120)
print(f"picture {out / '03_the_seeds_layer.png'}")
print("Look at the distance between the two curves of one colour: what is learned on the training data but not for new data.")

# %% [markdown]
# ## Exercises
#
# 1. Initialise with A = 0 and B from N(0, 1). Which of the two moves at the first step? Compare the loss after 150 steps with that of
#    B = 0.
# 2. Take 2,000 examples in place of 192. Does the first initialisation now reach the second on new data? Explain with the number of
#    directions that the examples cover.
