"""The same code on NumPy and CuPy: train a small MLP with LoRA on both and compare losses and time.

Only three lines depend on the backend:

    backend = ml.choose_backend("auto")      "cupy" if there is a usable GPU, else "numpy"
    x = ml.to_backend(x, backend)            data are created on the host by NumPy, then copied
    model = ml.MLP(...).to(backend)          weights too: equal seeds give equal values on both backends

Two habits keep a GPU busy. A loss stays on the device (a 0-d array) and becomes a number only when it is printed. Time is
measured after `synchronize`, since kernels run asynchronously.

The two backends sum the same products in a different order. The first comparison, float32 against float64 on NumPy, shows
the size of such rounding differences. A real mistake is larger by orders of magnitude.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.backend import synchronize

# %% tags=["script"]
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", default="auto", choices=["auto", "numpy", "cupy"], help="auto: both if there is a GPU")
parser.add_argument("--out", default=".", type=Path, help="folder for the picture")
args = parser.parse_args()
requested, out = args.backend, args.out

# %% the job

SIZES, T, STEPS, WARM_UP = [256, 512, 512, 10], 256, 40, 5
rng = np.random.default_rng(0)
x_host = rng.normal(size=(T, SIZES[0]))
labels = (x_host @ rng.normal(size=(SIZES[0], SIZES[-1]))).argmax(axis=1)  # labels stay on the host


def train(backend, dtype):
    """Losses of all steps, and milliseconds per step (without the first few, in which a GPU compiles its kernels)."""
    x = ml.to_backend(x_host, backend, dtype)
    model = ml.MLP(SIZES, ml.GELU, rng=0)
    ml.inject(model, ml.LoraConfig(r=8, lora_alpha=16), rng=1)
    model.to(backend, dtype)
    optimizer = ml.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        if step == WARM_UP:
            synchronize(backend)
            start = time.perf_counter()
        optimizer.zero_grad()
        logits, saved = model.forward(x, need_dx=False)
        loss, dlogits = ml.cross_entropy(logits, labels)
        model.backward(dlogits, saved, need_dx=False)
        optimizer.step()
        losses.append(loss)
    synchronize(backend)
    elapsed = time.perf_counter() - start
    return np.array([float(loss) for loss in losses]), 1000 * elapsed / (STEPS - WARM_UP)


# %% the runs

runs = [("numpy", "float64"), ("numpy", "float32")]
if requested != "numpy":
    try:
        runs.append((ml.choose_backend("cupy"), "float32"))
    except (ImportError, RuntimeError) as reason:
        if requested == "cupy":
            raise SystemExit(str(reason)) from None
        print(f"NumPy only: {reason}")

print("backend  dtype       first loss     last loss    largest difference  ms per step")
previous, curves = None, {}
for backend, dtype in runs:
    losses, ms = train(backend, dtype)
    curves[f"{backend}, {dtype}"] = losses
    difference = "" if previous is None else f"{abs(losses - previous).max():.1e}"
    print(f"{backend:<8} {dtype:<9} {losses[0]:12.6f}  {losses[-1]:12.6f}    {difference:>18}    {ms:9.2f}")
    previous = losses  # the next line is compared with this one

# %% the picture

try:
    import matplotlib.pyplot as plt
except ImportError:
    print("no picture without matplotlib: pip install 'minilora[plot]'")
    raise SystemExit from None
plt.switch_backend("Agg")  # draws to a file; needs no display

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
exact = curves["numpy, float64"]
for (name, losses), colour, style in zip(curves.items(), ("black", "#0072B2", "#D55E00"), ("-", "--", ":"), strict=False):
    left.semilogy(losses, color=colour, linestyle=style, linewidth=2, label=name)
    if losses is not exact:
        right.semilogy(abs(losses - exact) / exact, color=colour, linewidth=2, label=f"{name}, against float64")
right.axhline(np.finfo("float32").eps, color="grey", linestyle="--", linewidth=1)
right.text(STEPS, np.finfo("float32").eps / 1.3, "one rounding in float32", color="dimgrey", ha="right", va="top")
left.set(title="the losses: one curve", xlabel="step", ylabel="cross-entropy")
right.set(title="their differences", xlabel="step", ylabel="relative difference of the loss", ylim=(1e-9, 1e-2))
left.legend()
right.legend()
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "06_switch_to_gpu.png", dpi=120)
print(f"picture {out / '06_switch_to_gpu.png'}")
print("Look at the right half: the difference begins at one rounding and grows as training amplifies it. A mistake would begin at 1.")

# %% [markdown]
# ## Exercises
#
# 1. Reverse the rows of `x_host` and of `labels`: the same sums in another order. Train in float32 both ways; how far apart are the losses?
# 2. Run with `OMP_NUM_THREADS=1` and with all cores. At which size of the layers does a second core begin to help?
