"""The verbs: each passes its flags to a function that Python users call too, and returns what --json prints."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from minilora.backend import choose_backend
from minilora.checking.catalogue import check_all
from minilora.cli.flags import REMOVED
from minilora.runs.evaluate import evaluate_run
from minilora.runs.extract import compare, extract_run
from minilora.runs.finetune import finetune
from minilora.runs.generate import generate_run
from minilora.runs.info import describe
from minilora.runs.merge import merge_run
from minilora.runs.recipe import WITHOUT_EFFECT, Recipe
from minilora.runs.study import study_run

Say = Callable[[str], None]


def _finetune(args: Namespace, say: Say) -> dict[str, Any]:
    return finetune(_recipe(args), args.out, say)


def _study(args: Namespace, say: Say) -> dict[str, Any]:
    return study_run(_recipe(args), args.rows, args.seeds, args.out, args.quick, say)


def _evaluate(args: Namespace, say: Say) -> dict[str, Any]:
    names = "data adapter split task window mask_prompt encoding seed eval_size eval_bytes threads backend allow_other_weights"
    return evaluate_run(args.model, say=say, **_set(args, names))


def _generate(args: Namespace, say: Say) -> dict[str, Any]:
    names = "adapter backend allow_other_weights chat system tokens temperature seed top_k top_p stop"
    show = (lambda piece: None) if args.json else lambda piece: print(piece, end="", flush=True)
    return generate_run(args.model, args.prompt, show=show, **_set(args, names))


def _merge(args: Namespace, say: Say) -> dict[str, Any]:
    changes = merge_run(args.model, args.out, say=say, **_set(args, "adapter dtype allow_other_weights"))
    still_zero = [path for path, change in changes.items() if change == 0]
    return {"folder": str(args.out), "adapters": len(changes), "largest_change": max(changes.values()), "still_zero": still_zero}


def _extract(args: Namespace, say: Say) -> dict[str, Any]:
    return extract_run(args.model, args.out, say=say, **_set(args, "base r energy data task window whole threads allow_other_weights"))


def _compare(args: Namespace, say: Say) -> dict[str, Any]:
    changes = compare(args.first, args.second, args.allow_other_weights, say)
    return {"largest_change": max(changes.values()), "changes": changes}


def _info(args: Namespace, say: Say) -> dict[str, Any]:
    return describe(args.model, say=say, **_set(args, "allow_other_weights kernels backend"))


def _gradcheck(args: Namespace, say: Say) -> dict[str, Any]:
    errors, wrong = {}, []
    say(f"{'what':<44} {'gradients':>9} {'worst error':>12}")
    for name, report in check_all(choose_backend(args.backend or "auto")):
        say(f"{name:<44} {len(report.entries):>9} {report.worst:>12.1e}  {report.verdict}")
        errors[name] = report.worst
        if not report.ok:
            wrong.append(name)
            say(str(report))
    if wrong:
        what = "backward passes disagree with finite differences, or could not be compared"
        raise ArithmeticError(f"{len(wrong)} of {len(errors)} {what}: {', '.join(wrong)}.")
    say(f"all {len(errors)} agree with central differences in float64, relative error at most {max(errors.values()):.1e}")
    return {"checked": len(errors), "worst": max(errors.values()), "errors": errors}


VERBS = {
    "finetune": _finetune,
    "study": _study,
    "evaluate": _evaluate,
    "generate": _generate,
    "merge": _merge,
    "extract": _extract,
    "compare": _compare,
    "info": _info,
    "gradcheck": _gradcheck,
}


def _set(args: Namespace, names: str) -> dict[str, Any]:
    """{name: value} of the flags that were given, or have a default."""
    return {name: value for name in names.split() if (value := getattr(args, name)) is not None}


def _recipe(args: Namespace) -> Recipe:
    """The recipe of the flags. Those without effect on its data are named on standard error; a removed one raises ValueError."""
    for name, why in REMOVED.items():
        if getattr(args, name) is not None:
            raise ValueError(why)
    values = _set(args, " ".join(field.name for field in fields(Recipe)))
    recipe = Recipe(**values)
    what, names = WITHOUT_EFFECT[recipe.kind]
    for name in sorted(values.keys() & set(names.split())):
        print(f"--{name.replace('_', '-')} has no effect on {what}.", file=sys.stderr)
    return recipe
