"""A complete training loop without autograd: a multi-layer perceptron learns to separate two spirals.

    z1 = x W1 + b1,   h1 = tanh(z1),   z2 = h1 W2 + b2,   h2 = tanh(z2),   logits = h2 W3 + b3
    L  = mean_t(logsumexp(logits_t) - logits_t[label_t])                   cross-entropy

`forward` returns the output and what the backward pass of this call needs. The loss returns its value and its gradient.
`backward` runs through the same layers in reverse and adds dW, db to `.grad`. The optimizer then updates the weights:

    logits, saved = model.forward(x)    loss, dlogits = ml.cross_entropy(logits, labels)    model.backward(dlogits, saved)

need_dx=False: the gradient of the data is not needed, so the dx of the first layer is never computed.
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


def spirals(count, rng):
    """Two arms of one and a half turns, half a turn apart, with noise: x (count, 2) and labels (count,)."""
    labels = np.arange(count) % 2
    angle = 3 * np.pi * np.sqrt(rng.uniform(0.02, 1, count))
    x = np.stack([np.cos(angle + np.pi * labels), np.sin(angle + np.pi * labels)], axis=1) * angle[:, None] / (3 * np.pi)
    return (x + rng.normal(0, 0.06, x.shape)).astype("float32"), labels


rng = np.random.default_rng(0)
x_host, labels = spirals(600, rng)
x_new_host, labels_new = spirals(600, rng)
x, x_new = ml.to_backend(x_host, backend), ml.to_backend(x_new_host, backend)  # labels stay on the host

# %% the training loop

model = ml.MLP([2, 32, 32, 2], ml.Tanh, rng=0).to(backend)
optimizer = ml.AdamW(model.parameters(), lr=1e-2)


def accuracy(x, labels):
    logits, _ = model.forward(x, keep=False)  # keep=False: inference, nothing is saved
    return float((ml.to_numpy(logits).argmax(axis=1) == labels).mean())


before = accuracy(x_new, labels_new)
losses = []
for _ in range(600):
    optimizer.zero_grad()
    logits, saved = model.forward(x, need_dx=False)
    loss, dlogits = ml.cross_entropy(logits, labels)
    model.backward(dlogits, saved, need_dx=False)
    optimizer.step()
    losses.append(loss)  # stays on the device; converted to a number once, below, so that no step synchronises the GPU
losses = [float(loss) for loss in losses]

print(f"parameters              {sum(p.data.size for _, p in model.parameters()):,}")
print(f"loss                    {losses[0]:.3f} -> {losses[-1]:.4f} in {len(losses)} steps")
print(f"accuracy, training      {accuracy(x, labels):.3f}")
print(f"accuracy, new points    {before:.3f} -> {accuracy(x_new, labels_new):.3f}")

# %% the picture

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture without matplotlib: pip install 'minilora[plot]'")
    raise SystemExit from None
plt.switch_backend("Agg")  # draws to a file; needs no display

axis = np.linspace(-1.2, 1.2, 240, dtype="float32")
grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
z = ml.to_numpy(model.forward(ml.to_backend(grid, backend), keep=False)[0])
p = 1 / (1 + np.exp(z[:, 0] - z[:, 1])).reshape(len(axis), len(axis))  # softmax over two classes

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
shade = left.contourf(axis, axis, p, levels=np.linspace(0, 1, 11), cmap="PuOr", alpha=0.5)
left.contour(axis, axis, p, levels=[0.5], colors="black", linewidths=1.2)
for label, colour, marker in [(0, "#E66100", "o"), (1, "#5D3A9B", "s")]:
    points = x_new_host[labels_new == label]
    left.scatter(*points.T, s=14, c=colour, marker=marker, edgecolors="white", linewidths=0.4, label=f"class {label}")
left.set(title=f"new points and the boundary, accuracy {accuracy(x_new, labels_new):.3f}", xlabel="x1", ylabel="x2", aspect="equal")
left.legend(loc="upper right", framealpha=0.9)
figure.colorbar(shade, ax=left, label="probability of class 1", ticks=[0, 0.5, 1])
right.semilogy(losses, color="#0072B2")
right.axhline(np.log(2), color="grey", linestyle="--", linewidth=1)
right.text(len(losses), np.log(2) * 1.15, "guessing: log 2", ha="right", color="dimgrey")
right.set(title="training loss", xlabel="step", ylabel="cross-entropy", ylim=(min(losses) / 2, 2))
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "02_mlp_boundary.png", dpi=120)
print(f"picture                 {out / '02_mlp_boundary.png'}")
print("Look at the boundary between the arms, and far from all points: there the network is certain as well, without a reason.")

# %% [markdown]
# ## Exercises
#
# 1. Remove one hidden layer, then make it 8 wide. At which width does the boundary no longer follow the arms?
# 2. The loop never writes `dW` down. Compute `dh2`, `dz2`, `dh1` and `dz1` by hand from `dlogits`, and compare `x.T @ dz1` with the
#    `grad` of the first weight after one `backward`.
