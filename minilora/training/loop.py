"""The training loop: the body of `train` is one optimizer step. Printing, logging and saving are left to the caller."""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from minilora.backend import get_xp
from minilora.data.batches import Batch
from minilora.layers import Layer
from minilora.optim.flat import clip_grad_norm
from minilora.optim.optimizers import Optimizer
from minilora.optim.schedules import Schedule
from minilora.training.cuda_graph import step_graph
from minilora.training.loss_scale import LossScale
from minilora.training.prefix import PrefixCache
from minilora.training.ranks import Ranks
from minilora.training.replicas import Replicas
from minilora.training.watch import Step, Watch


def train(
    model: Layer,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    steps: int,
    schedule: Schedule,
    *,
    clip: float = 1.0,
    accumulate: int = 1,
    threads: int = 1,
    lanes: int | None = None,
    ranks: Ranks | None = None,
    done: int = 0,
    seed: int = 0,
    check_every: int | None = None,
    prefix: PrefixCache | None = None,
    cuda_graph: bool = True,
    loss_scale: LossScale | None = None,
    norms_every: int = 0,
) -> Iterator[Step]:
    """Take the steps after `done` up to `steps`, of `accumulate` batches each, at optimizer.lr * schedule(step); yield each as a Step.

    A step takes fewer than `accumulate` batches where an epoch ends (Batch.ends_epoch).

    lanes         parts of a batch, which fix the arithmetic: any number of threads gives the same result (replicas.py); default: threads
    ranks         the processes that share the lanes (ranks.py); all of them call this with the same arguments
    check_every   steps between two readings of losses and gradient norms, before whose update it is checked that they are finite.
                  Default: 1 on NumPy; 10 on a GPU, where reading synchronises. Steps are yielded when they are read
    prefix        cache for the outputs of frozen blocks, for data that repeat (prefix.py)
    cuda_graph    on one GPU: replay steps of one shape as a CUDA graph (cuda_graph.py)
    loss_scale    scale of float16 gradients (loss_scale.py); default: a new one if activations are float16. Every step is then read;
                  one whose gradients overflow is yielded with a norm that is not finite, and without an update
    norms_every   steps between two measurements of Step.norms, the norms by parameter (watch.py); default: none

    Raises Diverged when a loss or gradient norm is not finite (with a loss scale: 20 times in a row); the parameters are then those of
    the last step whose own loss was finite. Raises ValueError when `batches` ends early or no token of a step has a label.
    """
    flat, peak_lr = optimizer.flat, optimizer.lr
    on_host = get_xp(flat.data) is np
    scaler = LossScale.of(model) if loss_scale is None else loss_scale
    watch = Watch(flat, 1 if scaler else check_every or (1 if on_host else 10), norms_every, done)
    with (
        Replicas(model, flat, threads, prefix, lanes=lanes, ranks=ranks) as replicas,
        step_graph(replicas, clip) if cuda_graph and not on_host and ranks is None else nullcontext() as graph,
    ):
        for step in range(done + 1, steps + 1):
            batch = _take(batches, accumulate, step, steps)
            optimizer.lr = peak_lr * schedule(step - 1)
            scale = scaler.value if scaler else 1.0
            with np.errstate(all="ignore"):  # what is not finite is reported by `watch`, once
                if graph is not None and graph.fits(batch):
                    loss, norm = graph.gradients(batch, (seed, step), scale)
                else:
                    loss = replicas.gradients(batch, (seed, step), scale)
                    norm = clip_grad_norm(flat, clip, scale)
                finite = watch.read(step, loss, norm, optimizer.lr, batch, last=step == steps)
                if scaler:
                    scaler.update(finite)
                if finite:
                    optimizer.step()
                elif scaler is None or scaler.lost:
                    raise watch.diverged()
            yield from watch.report()
        if steps > done:
            watch.check_result(model, replicas.shards(batch)[0], steps)
    optimizer.lr = peak_lr


def _take(batches: Iterator[Batch], n: int, step: int, steps: int) -> list[Batch]:
    """The next n batches, fewer where an epoch ends. Raises ValueError when there are no more."""
    taken: list[Batch] = []
    while len(taken) < n and not (taken and taken[-1].ends_epoch):
        if (batch := next(batches, None)) is None:
            raise ValueError(f"the data ended at step {step} of {steps}.")
        taken.append(batch)
    return taken
