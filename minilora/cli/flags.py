"""The flags of every verb. Those of a recipe, and their names in a TOML file, come from the fields of `Recipe`."""

import argparse
import difflib
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from minilora import __version__
from minilora.formats import tomllib
from minilora.runs.recipe import GROUPS, Recipe

_VERBS = {
    "finetune": "adapt a model to data; without arguments, the bundled model to Python source",
    "study": "several ways to fine-tune, several seeds: mean, deviation, worst and failed runs; continues if interrupted",
    "evaluate": "measure a model on data: loss, perplexity, or accuracy, F1 and Matthews correlation",
    "generate": "continue a text, token by token",
    "merge": "fold an adapter into its model, as a folder that transformers loads",
    "export": "write an adapter in the format of PEFT, mlx-lm, or llama.cpp and Ollama",
    "push": "publish an adapter or a model on the hub",
    "extract": "turn a full fine-tune into a LoRA of its base model, by singular value decomposition",
    "compare": "the largest change of each weight between two models, with their adapters",
    "report": "one HTML page about a run, or two: curves, norms, singular values, similarity, time, samples",
    "info": "the contents of a model or a run folder: parameters, memory, adaptable modules",
    "explain": "a layer, an operation or a whole step: equation, source in both directions, real numbers, cost",
    "gradcheck": "check every gradient of this package by finite differences",
    "exercise": "write a backward pass yourself: start writes a file, check says what is wrong with it",
    "doctor": "versions, BLAS, memory and the GPU of this installation, and whether its matrix products are right",
}
_FIELDS = {field.name: field for field in fields(Recipe)}
_MODEL = "a run folder, an adapter or model folder, a .gguf file, an id of the hub, or pydoc, the bundled model"
_ANY_MODEL: dict[str, Any] = {"nargs": "?", "default": "pydoc", "help": f"{_MODEL} (default)"}
_THE_RUNS = "the run's"
_LONGEST, _DOTS = 100_000, 200  # of a settings file


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb and its flags. Values of a --config file become defaults, so that flags on the command line win.

    Raises as `_set_defaults`.
    """
    words = sys.argv[1:] if argv is None else argv
    verb = next((word for word in words if word in _VERBS), None)
    parser, verbs = make_parser()
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    path = config.parse_known_args(words)[0].config
    if path is not None and verb is not None:
        _set_defaults(verbs[verb], path)
    return parser.parse_args(words)


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the verbs by name."""
    parser = argparse.ArgumentParser(prog="minilora", description="Low-rank adaptation with every gradient written by hand.")
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    choices = parser.add_subparsers(required=True, dest="verb", metavar="VERB")
    verbs = {name: choices.add_parser(name, help=help, description=help) for name, help in _VERBS.items()}
    for p in verbs.values():
        p.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with any of these flags; the command line wins")
        p.add_argument("--json", action="store_true", help="print one JSON object on standard output, everything else on standard error")

    add = _add_recipe(verbs["finetune"])
    add("--out", metavar="FOLDER", help="a new run folder (default: runs/METHOD-N)")
    add("--resume", metavar="RUN", help="continue a run that was interrupted, with its own settings")

    add = verbs["study"].add_argument
    add("--rows", type=_names, metavar="NAMES", help="methods, few-sample, or names of single rows, see runs/study.py")
    add("--seeds", type=int, metavar="N", help="runs of each row (default: 5)")
    add("--quick", action="store_true", help="a small version, with 2 seeds: minutes")
    _add_recipe(verbs["study"])("--out", metavar="FOLDER", help="of the study, new or to be continued (default: studies/NAMES)")

    add = verbs["evaluate"].add_argument
    add("model", **_ANY_MODEL)
    _add_adapter(add)
    add("--split", choices=("train", "valid", "test", "all"), help="default: test, valid, or what the run held out; of a file all")
    add("--all", dest="split", action="store_const", const="all", help="--split all; of a run's data also those it was trained on")
    _add_fields(add, "data task window mask_prompt encoding seed eval_size eval_bytes", _THE_RUNS)
    _add_fields(add, "threads backend")

    add = verbs["generate"].add_argument
    add("model", **_ANY_MODEL)
    _add_adapter(add)
    add("--prompt", default="def ", help="the text to continue (default: 'def ')")
    add("--chat", action="store_true", help="put the prompt into the model's chat template, as the user's turn")
    add("--system", metavar="TEXT", help="the system's turn, with --chat")
    add("--tokens", "--bytes", type=int, default=400, metavar="N", help="length at most (default: 400)")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that sum to P (default: 1)")
    add("--stop", action="append", metavar="TEXT", help="end before this text, or special token; may be given several times")
    _add_fields(add, "seed backend")

    add = verbs["merge"].add_argument
    add("model", help="a run folder or an adapter folder, or a model with --adapter")
    _add_adapter(add)
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the merged model")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the merged model (default: that of the base's files)")

    add = verbs["export"].add_argument
    add("model", help="a run folder, an adapter folder of PEFT or mlx-lm, or a model with --adapter")
    _add_adapter(add)
    add("--to", choices=("peft", "mlx", "gguf"), required=True, help="gguf: for llama.cpp and Ollama")
    add("--out", type=Path, required=True, metavar="PATH", help="a new folder; with gguf a new file")

    add = verbs["push"].add_argument
    add("folder", type=Path, help="a run folder, an adapter folder or a model folder")
    add("hub_id", metavar="HUB_ID", help="where it is published, as name/adapter")
    add("--private", action="store_true", help="for nobody else to see")

    add = verbs["extract"].add_argument
    add("model", help="a run of full fine-tuning, a model, or an adapter whose rank is to change")
    add("--base", help="the model it was tuned from (default: that of the run or adapter)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the adapter")
    add("--energy", type=float, metavar="X", help="instead of --r: for each layer the lowest rank that keeps this share, 0 to 1")
    add("--whole", action=argparse.BooleanOptionalAction, default=True, help="with changed biases, norms and head (default)")
    add("--data", metavar="PATH", help="held-out data: approximate the layers' outputs, not their weights, and measure")
    _add_fields(add, "r threads")
    _add_fields(add, "task window", _THE_RUNS)
    _add_weights(add)

    add = verbs["compare"].add_argument
    add("first", help=_MODEL)
    add("second", help="another of the same kind")
    _add_weights(add)

    add = verbs["report"].add_argument
    add("run", help="a run folder")
    add("other", nargs="?", metavar="run2", help="another, to compare")
    add("--out", type=Path, metavar="FILE", help="a new file (default: report.html in the first folder)")

    add = verbs["info"].add_argument
    add("model", **_ANY_MODEL)
    add("--kernels", action="store_true", help="the implementation that runs for each operation of the model, and why")
    add("--for", dest="readers", metavar="READERS", help="which of these read the adapter: peft, mlx, llama.cpp, vllm, or all")
    _add_weights(add)
    _add_fields(add, "backend", "numpy")

    add = verbs["explain"].add_argument
    add("place", nargs="?", default="lora", metavar="PLACE", help="a path in the model or its end, an operation, or lora (default)")
    add("--model", default="pydoc", help=f"{_MODEL} (default)")
    add("--text", default="def add(a, b):", help="what the model reads (default: 'def add(a, b):')")
    add("--token", type=int, metavar="I", help="row of the number that is worked out (default: of the largest gradient)")
    add("--feature", type=int, metavar="J", help="its column")
    add("--step", action="store_const", const=True, help="from the text to one changed number of the adapter at PLACE")
    add("--html", type=Path, metavar="FILE", help="also write a page, to choose token and feature in")

    add = verbs["gradcheck"].add_argument
    add("what", nargs="?", help="path/file.py:Layer, or a model; without it, everything in this package")
    add("--x", metavar="ROWSxCOLUMNS", help="the shape of the layer's input (default: the file's own x, or 5 rows)")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="stop a layer that takes longer (default: 60)")
    add("--table", action="store_true", help="print every gradient, not only what is wrong")
    _add_fields(add, "backend")

    verbs["doctor"].add_argument("--tune", action="store_true", help="measure first what suits this processor, and keep it")
    add = verbs["exercise"].add_argument
    add("action", choices=("list", "start", "check", "hint", "solution"))
    add("name", nargs="?", help="of an exercise, its number or its file (default: the next one that is not solved)")
    add("--out", metavar="FOLDER", help="of the files, and of progress.json (default: exercises)")
    add("--notebook", action="store_true", help="start: write a Jupyter notebook")
    add("--force", action="store_true", help="start: overwrite a file")
    add("--limit", type=float, metavar="SECONDS", help="check: the time that it may take (default: 60)")
    return parser, verbs


def _add_recipe(p: argparse.ArgumentParser) -> Callable[..., Any]:
    """Every field of Recipe as a flag, in groups. Returns the add_argument of the group "output"."""
    groups = {name: p.add_argument_group(name) for name in GROUPS}
    for name, field in _FIELDS.items():
        _add_fields(groups[field.metadata["group"]].add_argument, name)
    return groups["output"].add_argument


def _add_fields(add: Callable[..., Any], names: str, default: str = "") -> None:
    """Fields of Recipe as flags; None where they are not given. default: in words, where it is not the recipe's."""
    for field in map(_FIELDS.__getitem__, names.split()):
        about, kinds = field.metadata, set(str(field.type).split(" | ")) - {"None"}
        options: dict[str, Any] = {"metavar": about["metavar"], "choices": about["choices"] or None}
        if kinds == {"bool", "str"}:
            options |= {"nargs": "?", "const": True}
        elif kinds == {"bool"} and not field.default:
            options = {"action": "store_const", "const": True}
        elif kinds == {"bool"}:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options["type"] = next((parse for kind, parse in _PARSERS.items() if kind in kinds), str)
        value = "" if field.default is None or isinstance(field.default, bool) else str(field.default).removesuffix(".0")
        words = default or about["unset"] or value
        text = about["help"] + (f" (default: {words})" if words else "")
        add(f"--{field.name.replace('_', '-')}", *about["aliases"], help=text, **options)


def _add_adapter(add: Callable[..., Any]) -> None:
    add("--adapter", metavar="FOLDER", help="an adapter to load into the model: a folder, or a .gguf file")
    _add_weights(add)


def _add_weights(add: Callable[..., Any]) -> None:
    add("--allow-other-weights", action="store_true", help="accept an adapter that was trained on a base with other weights")


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


_PARSERS: dict[str, Callable[[str], Any]] = {"list[str]": _names, "list[int]": _numbers, "float": float, "int": int}  # by annotation


def _set_defaults(p: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of a flat TOML file the defaults of a verb's flags. Names may have dashes; an integer is accepted for a float.

    Raises FileNotFoundError; ValueError for invalid TOML, an unknown name, two names of one setting, or a value that the flag refuses.
    """
    actions: dict[str, argparse.Action] = {}  # by each name of the flag: "r" and "rank" are one
    for each in p._actions:
        if each.dest not in ("help", "config"):
            names = [flag for flag in each.option_strings or [each.dest] if not flag.startswith("--no-")]
            actions |= {name.removeprefix("--").replace("-", "_"): each for name in names}
    seen: dict[str, str] = {}
    for name, value in _read_toml(path).items():
        if (action := actions.get(name.replace("-", "_"))) is None:
            near = difflib.get_close_matches(name.replace("-", "_"), actions, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(actions))}."
            raise ValueError(f"{path}: there is no setting {name!r}; {hint}")
        if (other := seen.setdefault(action.dest, name)) != name:
            raise ValueError(f"{path}: {other} and {name} are the same setting; give one.")
        kinds = _toml_types(action)
        if kinds == (float,) and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) not in kinds:
            raise ValueError(f"{path}: {name} must be of type {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}.")
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{path}: {name} is {value!r}; choose {', '.join(map(str, action.choices))}.")
        if isinstance(value, str) and callable(action.type):
            try:
                value = action.type(value)
            except ValueError:
                raise ValueError(f"{path}: {name} is {value!r:.60}, which --{name.replace('_', '-')} would refuse.") from None
        p.set_defaults(**{action.dest: value})
        action.required = False
        if action.nargs != "?" and not action.option_strings:
            action.nargs = "?"


def _read_toml(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    if len(raw) > _LONGEST or any(line.count(b".") > _DOTS for line in raw.splitlines()):  # the parser's memory grows as dots squared
        raise ValueError(f"{path} is not a settings file: it has more than {_LONGEST:,} bytes, or {_DOTS} dots in a line.")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML ({error}).") from None


def _toml_types(action: argparse.Action) -> tuple[type, ...]:
    """The types of a flag's value in a TOML file."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return (bool,)
    if isinstance(action, argparse._AppendAction):
        return (list,)
    if action.type in (_names, _numbers):
        return str, list
    if action.const is True:
        return bool, str
    return (float,) if action.type is float else (int,) if action.type is int else (str,)
