"""The training of a run: its steps, their records, checkpoints, measurements on held-out data, and interruptions."""

import math
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minilora.data.batches import Batch
from minilora.data.records import note
from minilora.optim.optimizers import AdamW
from minilora.runs import checkpoint, signs
from minilora.runs.checkpoint import State
from minilora.runs.folder import Lines, read_lines
from minilora.runs.interrupt import Interruption
from minilora.runs.prepare import prefix_for, steps_of
from minilora.runs.recipe import ResolvedRecipe
from minilora.runs.tasks import Task, measure
from minilora.training.loss_scale import LossScale
from minilora.training.ranks import Ranks, Stopped
from minilora.training.watch import Diverged, Step

NORMS = 100  # measurements of the norms of every parameter in a run, at most, and one after the last step's gradient

Records = list[dict[str, Any]]


class Training:
    """Trains a prepared model from `state`, which has been restored into it; that of step 0 is the beginning.

    about    what every checkpoint of the run says: base, data, before, method
    seconds, tokens   of the training alone
    saved             the step of the last checkpoint
    """

    def __init__(
        self,
        model: Any,
        optimizer: AdamW,
        task: Task,
        plan: ResolvedRecipe,
        folder: Path,
        scale: LossScale | None,
        about: dict[str, Any],
        state: State,
    ) -> None:
        self.model, self.optimizer, self.task, self.plan, self.folder = model, optimizer, task, plan, folder
        self.scale, self.about = scale, about
        self.step, self.batches, self.seconds, self.tokens = state.step, state.batches, state.seconds, state.tokens
        self.saved = self.evaluated = state.step
        records = [r for r in read_lines(folder / "metrics.jsonl") if r.get("step", math.inf) <= state.step]
        if len(records) != state.step:
            raise ValueError(f"{folder / 'metrics.jsonl'} has {len(records)} steps, the checkpoint is of step {state.step}.")
        norms = [r for r in read_lines(folder / "norms.jsonl")[1:] if r.get("step", math.inf) <= state.step]
        self.events = Events(folder) if plan.log == "tensorboard" else None
        self.records = Lines(folder / "metrics.jsonl", records)
        self.norms = Lines(folder / "norms.jsonl", [{"parameters": optimizer.flat.paths}, *norms])

    def run(self, interruption: Interruption, ranks: Ranks | None = None) -> None:
        """Take the steps that are left. Raises KeyboardInterrupt after a checkpoint, once an interruption is requested."""
        plan, (unit, nats) = self.plan, self.task.unit
        options = {"loss_scale": self.scale, "norms_every": -(-plan.steps // NORMS), "done": self.step, "ranks": ranks}
        steps: Any = steps_of(self.model, self.optimizer, self._batches(), plan, prefix_for(self.task, plan), **options)
        with tqdm(total=plan.steps, initial=self.step, unit="step", desc=plan.method, dynamic_ncols=True) as bar, closing(steps):
            for s in steps:
                self._note(s)
                bar.set_postfix_str(f"{s.loss / nats:.3f} {unit}, {self.tokens / self.seconds:,.0f} tokens/s", refresh=False)
                bar.update()
                if not s.latest:
                    continue
                stop = interruption.requested  # read once: a signal that comes later is for the next step
                over = stop or (plan.patience is not None and self.best()[2] >= plan.patience)
                if over or s.step == plan.steps or _due(s.step, self.saved, plan.save_every):
                    self.save()
                if stop:
                    raise KeyboardInterrupt
                if over:
                    return

    def _batches(self) -> Iterator[Batch]:
        """Those that have not been taken, counted."""
        for batch in islice(self.task.batches(self.plan.seed), self.batches, None):
            self.batches += 1
            yield batch

    def _note(self, s: Step) -> None:
        """Add a step to the records, measured on held-out data when that is due."""
        self.step, self.seconds, self.tokens = s.step, self.seconds + s.seconds, self.tokens + s.tokens
        norm = s.grad_norm if math.isfinite(s.grad_norm) else None  # JSON has no infinity; the step was left out
        record: dict[str, Any] = {"step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": norm, "tokens": s.tokens}
        if s.latest and _due(s.step, self.evaluated, self.plan.eval_every):
            self.evaluated = s.step
            loss = measure(self.model, self.task, self.plan.threads)["loss"]
            record["held_out_loss"] = loss
            if loss < self.best()[0]:
                self.save("best")
        self.records.add(record)
        if self.events is not None:
            self.events.add(record)
        records = self.records.records
        for sign in (signs.explosion(records), signs.rising(records, self.plan.patience) if "held_out_loss" in record else ""):
            if sign:
                tqdm.write(sign, file=sys.stderr)
        if s.norms is not None:
            grads, values = ([float(f"{x:.6g}") for x in row] for row in s.norms)
            self.norms.add({"step": s.step, "grad_norms": grads, "norms": values})

    def best(self) -> tuple[float, int, int]:
        """(the lowest held-out loss so far, its step, the number of measurements since)."""
        measured = [(r["held_out_loss"], r["step"]) for r in self.records.records if r.get("held_out_loss") is not None]
        if not measured:
            return math.inf, 0, 0
        at = min(range(len(measured)), key=measured.__getitem__)
        return *measured[at], len(measured) - 1 - at

    def save(self, kind: str = "step") -> None:
        """Write a checkpoint. If that fails, training goes on, and the last one stays."""
        if not self.plan.save_every and kind == "step":
            return
        position = {"step": self.step, "batches": self.batches, "seconds": self.seconds, "tokens": self.tokens}
        state = checkpoint.capture(self.model, self.optimizer, self.scale, **position, **self.about)
        if state is None:
            return
        try:
            if kind == "step":
                self.sync()
            checkpoint.write(self.folder, state, kind, self.plan.keep if kind == "step" else 1)
            self.saved = self.step if kind == "step" else self.saved
        except OSError as error:
            note(f"step {self.step}: no checkpoint could be written ({error.strerror or error}); training goes on.")

    def sync(self) -> None:
        """Write all records. Raises OSError."""
        self.records.sync()
        self.norms.sync()

    def close(self) -> None:
        self.records.close()
        self.norms.close()
        if self.events is not None:
            self.events.close()

    def take_best(self) -> int | None:
        """Put the parameters with the lowest held-out loss into the model. Returns their step; None where nothing was measured."""
        state = checkpoint.read_last(self.folder, "best") if self.plan.eval_every else None
        if state is None:
            return None
        checkpoint.restore(state, self.model, self.optimizer, None, str(self.folder))
        return state.step


def assist(model: Any, optimizer: AdamW, task: Task, plan: ResolvedRecipe, scale: LossScale | None, state: State, ranks: Ranks) -> None:
    """Take the steps of a run whose rank 0 records, measures, saves and decides when it ends."""
    options = {"loss_scale": scale, "done": state.step, "ranks": ranks}
    batches = islice(task.batches(plan.seed), state.batches, None)
    with suppress(Stopped, Diverged):
        for _ in steps_of(model, optimizer, batches, plan, prefix_for(task, plan), **options):
            pass


class Events:
    """The figures of a run as TensorBoard events (--log tensorboard): `add(record)` writes those of a step. ImportError without it."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError("--log tensorboard needs TensorBoard: pip install tensorboard.") from error
        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventFileWriter(str(folder / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        values = [self.summary.Value(tag=k, simple_value=v) for k, v in record.items() if k != "step" and v is not None]
        self.writer.add_event(self.event(step=record["step"], summary=self.summary(value=values)))

    def close(self) -> None:
        self.writer.close()


def _due(step: int, last: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies after `last`, up to `step`."""
    return bool(every) and step // every > last // every  # type: ignore[operator]
