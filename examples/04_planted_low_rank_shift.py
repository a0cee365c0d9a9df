"""The rank that a task needs: a frozen 64 x 64 map, a planted shift of rank 4, and LoRA of ranks 1 to 32 against theory.

    t = x (W + dW)           dW = P Q of rank 4, unknown to the trainer
    y = x W + (x A) B        A (64, r), B (r, 64); W frozen; all data in each step, float64

The loss is mean((x (dW - A B))^2), so the optimum is the best rank-r product *for these data*. With x^T x / T = L^T L,

    ||x (dW - A B)||^2 / T = ||L dW - L A B||^2        hence the lowest loss is that of L dW (Eckart and Young, 1936):
    floor(r) = sum_{i > r} S_i(L dW)^2 / 64            S: singular values; / 64 as the loss is a mean over outputs

ml.factorize(dW, r, x) computes that product directly. Without x it truncates the SVD of dW, the best in weights but not in outputs.

The LoRA paper compares trained matrices as follows (arXiv 2106.09685, section 7.2); U are the left singular vectors of A:

    phi(i, j) = ||U8[:, :i]^T U32[:, :j]||_F^2 / min(i, j)       1: one subspace contains the other; j / 64: two random ones
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

# %% the task

d, T = 64, 256
rng = np.random.default_rng(0)
x_host = rng.normal(size=(T, d)) * np.geomspace(0.5, 2, d)  # inputs of small to large variance
P = rng.normal(size=(d, 4))
P[: d // 2, :2] = 0  # two directions read inputs of large variance,
P[d // 2 :, 2:] = 0  # two read inputs of small variance with larger weights: dW and x dW have different leading directions
P[:, 2:] *= 1.5
dW_host = 3 * P @ rng.normal(size=(4, d)) / d
W_host = rng.normal(size=(d, d)) / d**0.5
x, W, dW = (ml.to_backend(a, backend) for a in (x_host, W_host, dW_host))
t = x @ (W + dW)


# %% training, and theory


def train(r, steps=2000):
    """(loss reached, A before, A after) of LoRA with rank r, by gradient descent with Nesterov momentum."""
    base = ml.Linear(d, d, bias=False, dtype="float64").to(backend)
    base.weight.data = W
    layer = ml.LoRALinear(base, r=r, alpha=r, rng=r)
    before = ml.to_numpy(layer.lora_A.data.copy())
    optimizer = ml.SGD(layer.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        y, saved = layer.forward(x, need_dx=False)
        _, dy = ml.mse(y, t)
        layer.backward(dy, saved, need_dx=False)
        optimizer.step()
    loss, _ = ml.mse(layer.forward(x, keep=False)[0], t)
    return float(loss), before, ml.to_numpy(layer.lora_A.data)


def floor(r, inputs=None):
    A, B = ml.factorize(dW, r, inputs)
    return float(ml.mse(x @ (W + A @ B), t)[0])


def phi(A, A_other, i, j=8):
    U, V = (np.linalg.svd(a, full_matrices=False)[0] for a in (A, A_other))
    return float(np.sum((U[:, :i].T @ V[:, :j]) ** 2)) / min(i, j)


runs = {r: train(r) for r in (1, 2, 3, 4, 8, 32)}
print("rank    loss reached      floor, whitened      SVD of dW alone       reached / floor - 1")
for r, (loss, _, _) in runs.items():
    best = floor(r, x)
    excess = f"{loss / best - 1:+.1e}" if best > 1e-20 else "rounding errors"
    print(f"{r:4d}    {loss:.6e}        {best:.6e}          {floor(r):.6e}      {excess:>19}")

print("\nphi(i, 8): share of the first i directions of A at rank 8 that lies in the first 8 of A at rank 32")
print("i                        " + "".join(f"{i:8d}" for i in (1, 2, 4, 8)))
for name, k in [("trained", 2), ("before training", 1)]:
    print(f"{name:<25}" + "".join(f"{phi(runs[8][k], runs[32][k], i):8.2f}" for i in (1, 2, 4, 8)))
print(f"{'expected at random':<25}" + f"{8 / d:8.2f}" * 4)

# %% the picture

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture without matplotlib: pip install 'minilora[plot]'")
    raise SystemExit from None
plt.switch_backend("Agg")  # draws to a file; needs no display

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
ranks = np.arange(1, 9)
left.plot(ranks, [floor(int(r)) for r in ranks], "x--", color="#E69F00", linewidth=1, markersize=8, label="SVD of dW alone")
left.plot(ranks, [floor(int(r), x) for r in ranks], color="black", linewidth=1, label="floor, whitened")
left.plot(list(runs)[:-1], [loss for loss, _, _ in runs.values()][:-1], "o", color="#0072B2", fillstyle="none", markersize=11, label="LoRA")
for r in (4, 8):
    left.annotate(f"{runs[r][0]:.0e}", (r, 0), (0, -20), textcoords="offset points", ha="center", color="#0072B2")
left.set(title="loss over rank (planted: rank 4)", xlabel="rank r", ylabel="mean squared error", xticks=ranks, ylim=(-0.03, None))
left.legend()
i = np.arange(1, 9)
right.plot(i, [phi(runs[8][2], runs[32][2], int(k)) for k in i], "o-", color="#0072B2", label="trained")
right.plot(i, [phi(runs[8][1], runs[32][1], int(k)) for k in i], "s:", color="#D55E00", label="before training")
right.set(title="directions shared by A at ranks 8 and 32", xlabel="i", ylabel="phi(i, 8)", ylim=(0, 1.05), xticks=i)
right.legend()
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "04_planted_low_rank_shift.png", dpi=120)
print(f"\npicture {out / '04_planted_low_rank_shift.png'}")
print("Look at the circles on the black line: gradient descent finds what the theorem promises, to rounding.")

# %% [markdown]
# ## Exercises
#
# 1. Plant a shift of rank 8 with singular values 1, 1/2, 1/4, ... Predict the loss at rank 4 before you run it.
# 2. Make all inputs equally large (replace `geomspace` by 1). Why does the dashed curve then meet the black line?
