"""The verbs: each passes its flags to a function that Python users call too, and returns what --json prints."""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from minilora.backend import choose_backend
from minilora.checking.verb import gradcheck_run
from minilora.exercises.student import exercise
from minilora.explain.explain import explain
from minilora.report.page import report_run
from minilora.runs import Say
from minilora.runs.doctor import doctor
from minilora.runs.evaluate import evaluate_run
from minilora.runs.export import export, push
from minilora.runs.finetune import finetune
from minilora.runs.generate import generate_run
from minilora.runs.info import describe
from minilora.runs.merge import compare, extract_run, merge_run
from minilora.runs.recipe import WITHOUT_EFFECT, Recipe
from minilora.runs.resume import resume
from minilora.runs.study import study_run


def _given(args: Namespace) -> dict[str, Any]:
    """The flags that were given or have a default, without those of every verb: the arguments of the verb's function."""
    return {name: value for name, value in vars(args).items() if value is not None and name not in ("verb", "config", "json", "debug")}


def _recipe(args: Namespace) -> Recipe:
    """The recipe of the flags. Those without effect on its data are named on standard error."""
    given = _given(args)
    values = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    recipe = Recipe(**values)
    what, names = WITHOUT_EFFECT[recipe.kind]
    for name in sorted(values.keys() & set(names.split())):
        print(f"--{name.replace('_', '-')} has no effect on {what}.", file=sys.stderr)
    return recipe


def _finetune(args: Namespace, say: Say) -> dict[str, Any]:
    if args.resume is None:
        return finetune(_recipe(args), args.out, say)
    if args.out is not None:
        raise ValueError("--resume continues in the run's own folder; leave --out away.")
    return resume(args.resume, say, **{name: value for name, value in _given(args).items() if name != "resume"})


def _generate(args: Namespace, say: Say) -> dict[str, Any]:
    return generate_run(**_given(args), show=lambda piece: None if args.json else print(piece, end="", flush=True))


def _merge(args: Namespace, say: Say) -> dict[str, Any]:
    changes = merge_run(**_given(args), say=say)
    still_zero = [path for path, change in changes.items() if change == 0]
    return {"folder": str(args.out), "adapters": len(changes), "largest_change": max(changes.values()), "still_zero": still_zero}


def _compare(args: Namespace, say: Say) -> dict[str, Any]:
    changes = compare(**_given(args), say=say)
    return {"largest_change": max(changes.values()), "changes": changes}


def _gradcheck(args: Namespace, say: Say) -> dict[str, Any]:
    given = _given(args)
    return gradcheck_run(given.pop("what", None), choose_backend(given.pop("backend", "auto")), say, **given)


VERBS: dict[str, Callable[[Namespace, Say], dict[str, Any]]] = {
    "finetune": _finetune,
    "study": lambda args, say: study_run(_recipe(args), args.rows, args.seeds, args.out, args.quick, say),
    "evaluate": lambda args, say: evaluate_run(**_given(args), say=say),
    "generate": _generate,
    "merge": _merge,
    "export": lambda args, say: export(**_given(args), say=say),
    "push": lambda args, say: push(**_given(args), say=say),
    "extract": lambda args, say: extract_run(**_given(args), say=say),
    "compare": _compare,
    "report": lambda args, say: report_run(**_given(args), say=say),
    "info": lambda args, say: describe(**_given(args), say=say),
    "explain": lambda args, say: explain(**_given(args), say=say),
    "gradcheck": _gradcheck,
    "exercise": lambda args, say: exercise(**_given(args), say=say),
    "doctor": lambda args, say: doctor(say, args.tune),
}
