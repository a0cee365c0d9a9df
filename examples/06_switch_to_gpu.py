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

import numpy as np

import minilora as ml
from minilora.backend import synchronize

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", default="auto", choices=["auto", "numpy", "cupy"], help="auto: both if there is a GPU")
parser.add_argument("--out", default=".", help="ignored: this example draws no picture")
args = parser.parse_args()

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


runs = [("numpy", "float64"), ("numpy", "float32")]
if args.backend != "numpy":
    try:
        runs.append((ml.choose_backend("cupy"), "float32"))
    except (ImportError, RuntimeError) as reason:
        if args.backend == "cupy":
            raise SystemExit(str(reason)) from None
        print(f"NumPy only: {reason}")

print("backend  dtype       first loss     last loss    largest difference  ms per step")
previous = None
for backend, dtype in runs:
    losses, ms = train(backend, dtype)
    difference = "" if previous is None else f"{abs(losses - previous).max():.1e}"
    print(f"{backend:<8} {dtype:<9} {losses[0]:12.6f}  {losses[-1]:12.6f}    {difference:>18}    {ms:9.2f}")
    previous = losses  # the next line is compared with this one
