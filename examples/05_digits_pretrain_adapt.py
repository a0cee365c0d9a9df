"""Pretrain on the digits 0-4, adapt to 5-9: LoRA of several ranks, full fine-tuning, the head alone, and training from scratch.

    h1 = relu(x W1 + b1),   h2 = relu(h1 W2 + b2),   logits = h2 W3 + b3        x: 64 grey values of an 8 x 8 image

ml.inject freezes the model and adds  s (x A) B  to the output of every dense layer, with r (m + n) trainable numbers instead of m n:

    ml.inject(model, ml.LoraConfig(r=8, lora_alpha=16, rank_pattern={"layers.4": 4}))     the head has 5 outputs: r <= 5

Within `with ml.disabled(model):` the model computes the base model's output, bit for bit: one base, many adapters. Full
fine-tuning overwrites the base. All methods use the same 250 labels, each at the best learning rate of a small search.

This base saw only 700 small images. Compare with the last row, training from scratch, before drawing conclusions about transfer.
The parameter counts and the exact return to the base model carry over to large models.
"""

import argparse
import copy
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

try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("this example needs the digits data set of scikit-learn: pip install scikit-learn") from None

SIZES, LABELLED = [64, 128, 128, 5], 250
images, digit = load_digits(return_X_y=True)
x_all = ml.to_backend((images / 16).astype("float32"), backend)

# %% training


def fit(model, rows, lr, rng, steps=200, batch=64):
    optimizer, rate = ml.AdamW(model.parameters(), lr), ml.schedule("linear", steps)
    for step in range(steps):
        some = rng.choice(rows, batch)
        optimizer.lr = lr * rate(step)
        optimizer.zero_grad()
        logits, saved = model.forward(x_all[ml.to_backend(some, backend)], need_dx=False)
        _, dlogits = ml.cross_entropy(logits, digit[some] % 5)  # classes 5-9 become 0-4
        model.backward(dlogits, saved, need_dx=False)
        optimizer.step()


def predict(model, rows):
    logits, _ = model.forward(x_all[ml.to_backend(rows, backend)], keep=False)
    return ml.to_numpy(logits).argmax(axis=1)


def accuracy(model, rows):
    return float((predict(model, rows) == digit[rows] % 5).mean())


def adapted(method, base, seed):
    """A copy of the base prepared for training, and its learning rate."""
    model = copy.deepcopy(base)
    if method.startswith("LoRA"):
        r = int(method.split()[-1])
        ml.inject(model, ml.LoraConfig(r=r, lora_alpha=2 * r, rank_pattern={"layers.4": min(r, 4)}), rng=seed)
        return model, 3e-2
    if method == "head only":
        model.freeze().layers[-1].unfreeze()
        return model, 3e-2
    return (model if method == "full" else ml.MLP(SIZES, rng=seed + 100).to(backend)), 1e-2


methods = ["head only", "LoRA, r = 1", "LoRA, r = 2", "LoRA, r = 4", "LoRA, r = 8", "full", "from scratch"]
trained, results, difference = {}, {method: [] for method in ["base", *methods]}, 0.0
for seed in range(3):
    rng = np.random.default_rng(seed)
    rows_old, rows_new = (rng.permutation(np.flatnonzero(digit // 5 == k)) for k in (0, 1))
    base = ml.MLP(SIZES, rng=seed).to(backend)
    fit(base, rows_old[:700], 3e-3, rng, steps=400)
    held_old, held_new = rows_old[700:], rows_new[LABELLED:]
    results["base"].append((accuracy(base, held_new), accuracy(base, held_old), np.nan))
    for method in methods:
        model, lr = adapted(method, base, seed)
        trained[method] = sum(p.data.size for _, p in model.parameters() if p.trainable)
        fit(model, rows_new[:LABELLED], lr, rng)
        off = np.nan
        if method.startswith("LoRA"):
            with ml.disabled(model):
                off = accuracy(model, held_old)
                difference = max(difference, float(abs(model.forward(x_all, keep=False)[0] - base.forward(x_all, keep=False)[0]).max()))
        results[method].append((accuracy(model, held_new), accuracy(model, held_old), off))
        if (seed, method) == (0, "LoRA, r = 8"):
            gallery = list(zip(held_new[:12], predict(base, held_new[:12]), predict(model, held_new[:12]) + 5, strict=True))

print(f"accuracy on held-out digits, median of 3 seeds; {LABELLED} labelled examples of 5-9; random guessing scores 0.2")
print("                  trained     new, 5-9    old, 0-4    old, adapter off")
for method, rows in results.items():
    new, old, off = np.median(rows, axis=0)
    print(f"{method:<15} {trained.get(method, 0):9,}  {new:11.3f} {old:11.3f} {f'{off:15.3f}' if method.startswith('LoRA') else ''}")
print(f"with the adapter off, the outputs differ from the base's by at most {difference}")

# %% the picture

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture without matplotlib: pip install 'minilora[plot]'")
    raise SystemExit from None
plt.switch_backend("Agg")  # draws to a file; needs no display

figure = plt.figure(figsize=(11, 4.6), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
axes = left.subplots()
styles = {"LoRA": "#0072B2 o-", "head only": "#E69F00 s", "full": "#D55E00 D", "from scratch": "#555555 x"}
for kind, style in styles.items():
    chosen = [method for method in methods if method.startswith(kind)]
    low, middle, high = (np.array([f([row[0] for row in results[m]]) for m in chosen]) for f in (np.min, np.median, np.max))
    x = [trained[m] for m in chosen]
    colour, marker = style.split()
    axes.errorbar(x, middle, [middle - low, high - middle], fmt=marker, color=colour, markersize=7, capsize=3, label=kind)
axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy, held-out 5-9", title=f"{LABELLED} labels; median, range of 3 seeds")
axes.legend(loc="lower right")
axes.grid(alpha=0.3)
right.suptitle("held-out digits: base model \N{RIGHTWARDS ARROW} LoRA, r = 8")
for panel, (row, before, after) in zip(right.subplots(3, 4).flat, gallery, strict=True):
    panel.imshow(images[row].reshape(8, 8), cmap="gray_r")
    panel.set_title(f"{before} \N{RIGHTWARDS ARROW} {after}", fontsize=11, color="black" if after == digit[row] else "#D55E00")
    panel.axis("off")
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "05_digits_pretrain_adapt.png", dpi=120)
print(f"picture {out / '05_digits_pretrain_adapt.png'}")
print("Look at the last column of the table: with the adapter off, the old digits are recognised as before. Full fine-tuning forgot them.")

# %% [markdown]
# ## Exercises
#
# 1. Adapt the first layer only (`target_modules=["layers.0"]`, without `rank_pattern`), then the last only. Which of the two is worth
#    more, at how many trained numbers?
# 2. Use 50 labels in place of 250. Which method loses least, and is pretraining worth more or less than before?
