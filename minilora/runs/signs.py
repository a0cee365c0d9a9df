"""Signs that a run goes wrong, each with its cause and what to do about it, in one sentence."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora.lora import lora_layers

_STEPS = 20  # compared with the last so many
_TIMES = 20.0  # so many times their median is an explosion


def explosion(records: Sequence[dict[str, Any]]) -> str:
    """Of the last step: its gradient is far larger than those before."""
    *before, last = [r["grad_norm"] for r in records[-_STEPS - 1 :]]
    before = [norm for norm in before if norm is not None]
    if last is None or len(before) < _STEPS or last <= _TIMES * statistics.median(before):
        return ""
    times = f"{last / statistics.median(before):.0f} times the median of the {_STEPS} steps before"
    return f"step {records[-1]['step']}: the norm of the gradient is {last:.3g}, {times}; a lower --lr or a longer --warmup may help."


def rising(records: Sequence[dict[str, Any]], patience: int | None) -> str:
    """Of a measurement: the second in a row above the best so far."""
    measured = [(r["step"], r["held_out_loss"]) for r in records if r.get("held_out_loss") is not None]
    if len(measured) < 3 or measured[-3] != min(measured, key=lambda each: each[1]):
        return ""
    step, best = measured[-3]
    what = f"the held-out loss has risen from {best:.4f} at step {step} to {measured[-1][1]:.4f}: the model overfits"
    return f"{what}; the result of step {step} is kept" + ("." if patience else ", and --patience ends such a run.")


def still_zero(model: Any) -> str:
    """After training: matrices B that have not moved."""
    paths = [path for path, layer in lora_layers(model) if hasattr(layer, "lora_B") and not bool(layer.lora_B.data.any())]
    if not paths:
        return ""
    more = f" and {len(paths) - 1} others" if len(paths) > 1 else ""
    return f"lora_B of {paths[0]}{more} is still zero: no gradient reaches it, so that its adapter changes nothing."


def never_predicted(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """After training: classes of the held-out texts that the model never chooses. confusion[i][j]: texts of class i taken for class j."""
    C = np.asarray(confusion)
    missing = [labels[i] if i < len(labels) else str(i) for i in range(len(C)) if C[i].sum() and not C[:, i].sum()]
    if not missing:
        return ""
    return f"never predicted: {', '.join(missing)}; more steps, a higher --lr, or more texts of this class may help."
