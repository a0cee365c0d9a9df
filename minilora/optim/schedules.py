"""Learning-rate schedules: functions of the step, from 0, that return a factor of the peak rate.

All start with a linear warm-up: step s < warmup has the factor (s + 1) / (warmup + 1), so that no step has rate 0.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def schedule(name: str, total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """ "constant", "linear" or "cosine" over `total` steps; the last two fall to `final` times the peak.

    Raises ValueError for an unknown name, or a warm-up that is not shorter than the run.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown schedule {name!r}; choose {', '.join(SHAPES)}.")
    if not 0 <= warmup < max(total, 1):
        raise ValueError(f"warmup of {warmup} steps does not fit a run of {total}.")
    shape = SHAPES[name]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (1 - final) * shape(progress)

    return factor


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
