"""The toy step (toy.py) against the same step as a straight line of NumPy calls: what layers, checks and `saved` cost.

python -m benchmarks.straight [--rounds 5]

The line has no function but NumPy's, no check and no choice. It computes what the layers compute, in the same order: the losses agree.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle

import numpy as np
from safetensors.numpy import load_file

from benchmarks import toy
from benchmarks.harness import compare

prepare, ours = toy.prepare, toy.ours


def line(o: Namespace) -> Iterator[float]:
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, "blas")
    t = load_file(o.folder / "toy.safetensors")
    W, b, A, B = ([np.ascontiguousarray(t[f"{name}.{part}"].T) for name in toy.LINEAR] for part in ("weight", "bias", "lora_A", "lora_B"))
    s, (b1, b2), eps = np.float32(toy.ALPHA / toy.R), (0.9, 0.999), 1e-8
    w = np.concatenate([x.ravel() for pair in zip(A, B, strict=True) for x in pair])
    g, m, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    start, grads = 0, []
    for i in range(3):
        for matrices in (A, B):
            end = start + matrices[i].size
            grads.append(g[start:end].reshape(matrices[i].shape))
            matrices[i] = w[start:end].reshape(matrices[i].shape)
            start = end
    gA, gB = grads[::2], grads[1::2]
    for step, (x, labels) in enumerate(cycle(zip(t["x"], t["labels"], strict=True)), 1):
        u0 = x @ A[0]
        z0 = x @ W[0]
        z0 += b[0]
        z0 += (s * u0) @ B[0]
        h0 = np.maximum(z0, 0)
        u1 = h0 @ A[1]
        z1 = h0 @ W[1]
        z1 += b[1]
        z1 += (s * u1) @ B[1]
        h1 = np.maximum(z1, 0)
        u2 = h1 @ A[2]
        z = h1 @ W[2]
        z += b[2]
        z += (s * u2) @ B[2]

        z = z - z.max(axis=1, keepdims=True)
        e = np.exp(z)
        total = e.sum(axis=1, keepdims=True)
        onehot = labels[:, None] == np.arange(z.shape[1])
        loss = (np.log(total[:, 0]) - (z * onehot).sum(axis=1)).mean()
        dy = (e / total - onehot) / len(z)

        gB[2][...] = (s * u2).T @ dy
        du = s * (dy @ B[2].T)
        gA[2][...] = h1.T @ du
        dh = dy @ W[2].T
        dh += du @ A[2].T
        dy = dh * (z1 > 0)
        gB[1][...] = (s * u1).T @ dy
        du = s * (dy @ B[1].T)
        gA[1][...] = h0.T @ du
        dh = dy @ W[1].T
        dh += du @ A[1].T
        dy = dh * (z0 > 0)
        gB[0][...] = (s * u0).T @ dy
        gA[0][...] = x.T @ (s * (dy @ B[0].T))

        m *= b1
        m += (1 - b1) * g
        v *= b2
        v += (1 - b2) * (g * g)
        w -= (toy.LR / (1 - b1**step)) * m / (np.sqrt(v) / (1 - b2**step) ** 0.5 + eps)
        yield float(loss)


SIDES = {"ours": ours, "line": line}

if __name__ == "__main__":
    sys.exit(compare("straight", __doc__, SIDES, steps=300, warmup=50))
