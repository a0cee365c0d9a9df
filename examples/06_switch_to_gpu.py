"""The same code on NumPy and on CuPy: train a small MLP with LoRA on both, and compare the losses and the time.

Nothing below asks which backend it runs on. Three lines decide it:

    backend = ml.choose_backend("auto")      "cupy" where a GPU can be used, else "numpy"
    x = ml.to_backend(x, backend)            data are made on the host by NumPy, then moved
    model = ml.MLP(...).to(backend)          so are weights: equal seeds give equal values on both

Two habits keep a GPU busy: a loss stays on the device (a 0-d array) and becomes a number only when it is printed, and time is
taken after `synchronize`, since the device works on while Python has gone ahead.

The two backends add up the same products in another order. How far apart may that put them? The yardstick is printed first:
float32 beside float64 on NumPy. A real mistake is larger by orders of magnitude.
"""

import argparse
import time

import numpy as np

import minilora as ml
from minilora.backend import synchronize

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backend", default="auto", choices=["auto", "numpy", "cupy"], help="auto: both, where there is a GPU")
parser.add_argument("--out", default=".", help="not used here: this example draws nothing")
args = parser.parse_args()

SIZES, T, STEPS, WARM_UP = [256, 512, 512, 10], 256, 40, 5
rng = np.random.default_rng(0)
x_host = rng.normal(size=(T, SIZES[0]))
labels = (x_host @ rng.normal(size=(SIZES[0], SIZES[-1]))).argmax(axis=1)  # labels stay on the host


def train(backend, dtype):
    """The loss of every step, and milliseconds a step (without the first few, in which a GPU compiles its kernels)."""
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

print("backend  dtype       first loss     last loss    largest difference    ms a step")
previous = None
for backend, dtype in runs:
    losses, ms = train(backend, dtype)
    difference = "" if previous is None else f"{abs(losses - previous).max():.1e}"
    print(f"{backend:<8} {dtype:<9} {losses[0]:12.6f}  {losses[-1]:12.6f}    {difference:>18}    {ms:9.2f}")
    previous = losses  # each line is compared with the line above
