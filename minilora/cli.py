"""The command line: argparse, and for each verb a few lines onto functions that Python users call too.

With --json a verb prints exactly one JSON object on standard output; everything else goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from minilora.formats.atomic import to_json

# What bad input, a missing extra or a full disk raise: told in one line. Anything else is a bug and shows its traceback.
_TOLD = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C; argparse itself exits with 2."""
    parser, verbs = _parser()
    debug = False
    try:
        args = _with_settings(parser, verbs, argv)
        debug = args.debug
        told = args.run(args)
        if args.json:
            print(to_json(told))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("minilora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minilora generate | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _TOLD as error:
        if debug:
            raise
        text = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.strerror and error.filename else str(error)
        print(f"minilora: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return 1


# -- verbs: each returns what --json prints ---------------------------------------------------------------------------------


def _finetune(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.runs.finetune import finetune

    return finetune(_recipe(args), args.out, _say(args))


def _study(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.runs.study import as_json, quick, rows_named, study

    recipe = quick(_recipe(args)) if args.quick else _recipe(args)
    names = args.rows or (["methods"] if recipe.task == "classify" else ["lora", "full", "bottleneck", "bitfit", "layer-norm"])
    out = args.out or f"studies/{'-'.join(args.rows or [recipe.kind])}{'-quick' * args.quick}"
    return as_json(study(recipe, rows_named(names), (2 if args.quick else 5) if args.seeds is None else args.seeds, out, _say(args)), out)


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.runs.evaluate import evaluate_run

    names = "adapter split backend threads task window mask_prompt encoding seed eval_size eval_bytes allow_other_weights".split()
    return evaluate_run(args.model, args.data, say=_say(args), **{name: getattr(args, name) for name in names})


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.models.generate import generate_text
    from minilora.runs.run_file import open_model, tokenizer_of

    if args.system is not None and not args.chat:
        raise ValueError("--system is a turn of a conversation; give --chat too.")
    model = open_model(args.model, args.backend, args.adapter, allow_other_weights=args.allow_other_weights)
    if not hasattr(model, "decode"):
        raise ValueError(f"{args.model} ({type(model).__name__}) does not generate text: it is no decoder.")
    tokenizer = tokenizer_of(args.model, model.config.vocab_size)
    before = prompt = args.prompt
    if args.chat:
        turns = [("user", prompt)] if args.system is None else [("system", args.system), ("user", prompt)]
        prompt = tokenizer.render([{"role": role, "content": content} for role, content in turns], add_generation_prompt=True)
        before, ids = "", tokenizer.encode(prompt, add_special=False)
    else:
        ids = tokenizer.encode_prompt(prompt)

    def show(piece: str) -> None:
        nonlocal before  # the prompt comes with the first piece, after all that can be wrong
        if not args.json:
            print(before + piece, end="", flush=True)
            before = ""

    drawing = {"top_k": args.top_k, "top_p": args.top_p, "stop": args.stop or ()}
    result = generate_text(model, tokenizer, ids, args.tokens, args.temperature, args.seed, **drawing, show=show)
    show("\n")
    return {"prompt": prompt, **result}


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.formats.checkpoint import STORED
    from minilora.runs.run_file import merge_run

    changes = merge_run(args.model, args.out, args.adapter, args.dtype or STORED, args.allow_other_weights)
    still = [path for path, change in changes.items() if change == 0]
    _say(args)(f"merged {len(changes)} adapters into {args.out}; the largest change of a weight is {max(changes.values()):.3g}")
    if still:
        print(f"warning: {len(still)} adapters are still zero, {still[0]} first: was anything trained?", file=sys.stderr)
    return {"folder": str(args.out), "adapters": len(changes), "largest_change": max(changes.values()), "still_zero": still}


def _extract(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.runs.extract import extract_run

    asked = (args.base, args.r, args.energy, args.data, args.task, args.window, args.whole, args.threads, args.allow_other_weights)
    return extract_run(args.model, args.out, *asked, say=_say(args))


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.runs.extract import compare

    changes, say = compare(args.first, args.second, args.allow_other_weights), _say(args)
    changed = sorted((path for path, change in changes.items() if change), key=lambda path: -changes[path])
    for path in changed[:10]:
        say(f"{changes[path]:10.3g}  {path}")
    largest = f"; the largest change is {changes[changed[0]]:.3g}" if changed else ""
    say(f"{len(changed)} of {len(changes)} parameters differ{largest}")
    return {"largest_change": max(changes.values()), "changes": changes}


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.runs.run_file import describe

    told, say = describe(args.model, args.allow_other_weights), _say(args)
    say(f"model       {told['model']}: {told['model_type']}, " + ", ".join(f"{k} {v}" for k, v in told["config"].items() if type(v) is int))
    say(f"parameters  {told['parameters']:,}: {told['bytes_float32'] / 1e6:.1f} MB in float32")
    if adapter := told.get("adapter"):
        on = f" on {adapter['layers']} layers" if adapter["layers"] else ""
        ranks = f", r = {', '.join(map(str, adapter['r']))}" if "r" in adapter else ""
        share = adapter["parameters"] / told["parameters"]
        say(f"adapter     {adapter['method']}{on}{ranks}: {adapter['parameters']:,} parameters, {share:.1%} of the model")
    if (results := told.get("results")) and "after" in results:
        name = results["headline"]
        before, after = (results[when][name] for when in ("before", "after"))
        if before is not None and after is not None:  # null stands for what is not finite
            say(f"held out    {name.replace('_', ' ')} {before:.3f} before, {after:.3f} after")
    say("adaptable   " + "; ".join(f"{name} ({v['layers']}: {', '.join(v['sizes'])})" for name, v in told["adaptable"].items()))
    return told


def _gradcheck(args: argparse.Namespace) -> dict[str, Any]:
    from minilora.backend import choose_backend
    from minilora.checking.catalogue import check_all

    say, errors, wrong = _say(args), {}, []
    say(f"{'what':<44} {'gradients':>9} {'worst error':>12}")
    for name, report in check_all(choose_backend(args.backend)):
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


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe that the flags ask for."""
    from dataclasses import fields

    from minilora.runs.recipe import WITHOUT_EFFECT, Recipe

    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if getattr(args, field.name, None) is not None}
    recipe = Recipe(**given)
    what, names = WITHOUT_EFFECT[recipe.kind]
    for name in sorted(given.keys() & set(names.split())):
        print(f"--{name.replace('_', '-')} has no effect on {what}.", file=sys.stderr)
    return recipe


# -- arguments ---------------------------------------------------------------------------------------------------------------


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the verbs by name."""
    from minilora import __version__
    from minilora.runs.recipe import DTYPES, METHODS, OPTIMIZERS, TASKS

    parser = argparse.ArgumentParser(prog="minilora", description="Low-rank adaptation with every gradient written by hand.")
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(
        required=True, dest="verb", metavar="finetune | study | evaluate | generate | merge | extract | compare | info | gradcheck"
    )

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=help, description=help)
        p.set_defaults(run=run)
        p.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with any of these flags; flags given here win")
        p.add_argument("--json", action="store_true", help="print one JSON object on standard output, all else on standard error")
        return p

    def where(p: argparse.ArgumentParser) -> None:
        p.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto", help="where to compute (default: auto)")

    def weights(p: argparse.ArgumentParser) -> None:
        p.add_argument("--allow-other-weights", action="store_true", help="take an adapter that was trained on a base with other weights")

    def recipe_flags(p: argparse.ArgumentParser) -> None:
        add = p.add_argument
        add("--model", help="a model folder, a .gguf file, an id of the hub (default: the bundled one, pydoc)")
        add("--data", metavar="PATH", help="text or records, a file or a folder (default: the standard library's source)")
        add("--task", choices=TASKS, help="continue a text, or classify it (default: lm)")
        add("--method", choices=METHODS, help="what to train (default: lora)")
        add("--peft-type", choices=("LORA", "VERA"), help="the kind of adapter (default: LORA; VERA wants an r of 256)")
        add("--r", "--rank", type=int, metavar="R", help="rank of the adapters (default: 8)")
        add("--lora-alpha", "--alpha", type=float, metavar="ALPHA", help="the update is scaled by alpha / r (default: 32)")
        add("--lora-dropout", type=float, metavar="P", help="dropout on what the adapters read (default: 0)")
        add("--use-rslora", action="store_const", const=True, help="scale by alpha / sqrt(r) instead")
        add("--use-dora", action="store_const", const=True, help="train the magnitudes of W's columns apart from their directions")
        add("--init-lora-weights", "--init", metavar="HOW", help="initialiser of A and B: gaussian, pissa, olora, eva, lora_ga, loftq")
        add("--quantize", choices=("nf4", "float16", "bfloat16"), help="quantize the frozen weights of linear layers")
        add("--dtype", choices=DTYPES, help="of activations and frozen matrices (default: float32)")
        add("--loraplus-lr-ratio", type=float, metavar="X", help="learning rate of B over that of A (LoRA+; default: 1)")
        add("--optimizer", choices=OPTIMIZERS, help="AdamW, or a relative that knows A and B (default: adamw)")
        add("--target-modules", type=_names, metavar="NAMES", help="names separated by commas, or all-linear (the default)")
        add("--layers-to-transform", type=_numbers, metavar="N,N", help="numbers of the blocks to adapt (default: all)")
        add("--reduction-factor", type=float, metavar="X", help="width of a layer over that of its bottleneck (default: 16)")
        add("--bias", choices=("none", "all", "lora_only"), help="biases to train too (default: all for pydoc, else none)")
        add("--modules-to-save", type=_list, metavar="NAMES", help="modules to train fully (default: layer norms for pydoc, else none)")
        add("--lr", type=float, help="peak learning rate (default: by model, task and method)")
        add("--schedule", choices=("constant", "linear", "cosine"), help="shape of the learning rate (default: linear)")
        add("--warmup", type=float, metavar="STEPS", help="steps of linear warm-up, or below 1 a share (default: 10)")
        add("--weight-decay", type=float, metavar="X", help="decoupled weight decay (default: 0)")
        add("--pull", type=float, metavar="X", help="decoupled decay towards the weights it began with (default: 0)")
        add("--bias-correction", action=argparse.BooleanOptionalAction, help="Adam's (default: on)")
        add("--reinit", type=int, metavar="L", help="re-initialise the pooler and the top L blocks (method full; default: no)")
        add("--clip", type=float, metavar="NORM", help="largest gradient norm (default: 1)")
        add("--steps", type=int, help="optimizer steps (default: 120 for text, else by --epochs)")
        add("--epochs", type=float, help="times to go through records (default: 3)")
        add("--batch-size", type=int, metavar="N", help="windows or texts a batch (default: 8)")
        add("--tokens-per-batch", type=int, metavar="N", help="tokens a batch of records (default: 2048)")
        add("--accumulate", type=int, metavar="N", help="batches a step (default: 1)")
        add("--recompute", action="store_const", const=True, help="save less for the backward pass and compute more")
        add("--cache", action=argparse.BooleanOptionalAction, help="keep what frozen blocks give over epochs (default)")
        add("--window", "--max-length", type=int, metavar="N", help="longest sequence, in tokens (default: 256)")
        add("--mask-prompt", action=argparse.BooleanOptionalAction, help="learn completions only (default), or prompts too")
        add("--encoding", metavar="NAME", help="of text and record files (default: utf-8)")
        add("--new-head", action="store_const", const=True, help="replace a classifier that the model has by one for the data")
        add("--eval-bytes", type=int, metavar="N", help="held-out text to measure on (default: 65536 bytes for pydoc, else 8192 tokens)")
        add("--train-size", type=int, metavar="N", help="how many texts with a class to learn from (default: all)")
        add("--eval-size", type=int, metavar="N", help="how many of them to measure on (default: all that are held out)")
        add("--threads", type=int, metavar="N", help="replicas, one thread each (default: the cores, at most 8)")
        add("--tf32", action="store_const", const=True, help="on a GPU: products in TF32, faster and less exact")
        add("--sample-bytes", type=int, metavar="N", help="length of the samples (default: 240 for pydoc, else none)")
        where(p)

    def opened(p: argparse.ArgumentParser) -> None:
        p.add_argument("model", nargs="?", default="pydoc", help=f"{a_model} (default)")
        p.add_argument("--adapter", metavar="FOLDER", help="an adapter to put on the model")

    a_model = "a run folder, an adapter or model folder, a .gguf file, an id of the hub, or pydoc, the bundled model"

    p = verb("finetune", _finetune, "adapt a model to data; without arguments, the bundled model to Python source")
    recipe_flags(p)
    p.add_argument("--seed", type=int, help="seed of initial weights, batches and samples (default: 0)")
    p.add_argument("--out", metavar="FOLDER", help="a new run folder (default: runs/METHOD-N)")

    p = verb("study", _study, "several ways to fine-tune, several seeds: mean, deviation, worst and failed runs; goes on if interrupted")
    recipe_flags(p)
    p.add_argument("--rows", type=_list, metavar="NAMES", help="methods, few-sample, or names of single rows, see runs/study.py")
    p.add_argument("--seeds", type=int, metavar="N", help="runs of each row (default: 5)")
    p.add_argument("--quick", action="store_true", help="in small, with 2 seeds: minutes")
    p.add_argument("--seed", type=int, help="of the examples to learn and to measure (default: 0)")
    p.add_argument("--out", metavar="FOLDER", help="of the study, new or to be gone on with (default: studies/NAMES)")

    p = verb("evaluate", _evaluate, "measure a model on data: loss, perplexity, or accuracy, F1 and Matthews correlation")
    opened(p)
    p.add_argument("--data", metavar="PATH", help="text or records, a file or a folder (default: the data of the run)")
    p.add_argument(
        "--split", choices=("train", "valid", "test", "all"), help="default: test, valid, or what the run held out; of a file all"
    )
    p.add_argument("--all", dest="split", action="store_const", const="all", help="--split all; of a run's data also what it has learnt")
    p.add_argument("--task", choices=TASKS, help="default: what the run was trained for, or the model is for")
    p.add_argument("--window", "--max-length", type=int, metavar="N", help="longest sequence, in tokens (default: the run's, else 256)")
    p.add_argument("--mask-prompt", action=argparse.BooleanOptionalAction, help="completions only, or prompts too (default: as the run)")
    p.add_argument("--encoding", metavar="NAME", help="of the data (default: the run's, else utf-8)")
    p.add_argument("--seed", type=int, help="of what is held out where no split is given (default: the run's, else 0)")
    p.add_argument("--eval-size", type=int, metavar="N", help="how many texts with a class at most (default: the run's, for its own data)")
    p.add_argument("--eval-bytes", type=int, metavar="N", help="how much held-out text (default: the run's, for its own data)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: the cores, at most 8")
    weights(p)
    where(p)

    p = verb("generate", _generate, "let a model write on, token by token")
    opened(p)
    p.add_argument("--prompt", default="def ", help="text to go on from (default: 'def ')")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template, as the user's turn")
    p.add_argument("--system", metavar="TEXT", help="the system's turn, with --chat")
    p.add_argument("--tokens", "--bytes", type=int, default=400, metavar="N", help="how much to write at most (default: 400)")
    p.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P (default: 1)")
    p.add_argument("--stop", action="append", metavar="TEXT", help="end before this text, or special token; may be given several times")
    p.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    weights(p)
    where(p)

    p = verb("merge", _merge, "fold an adapter into its model, as a folder that transformers loads")
    p.add_argument("model", help="a run folder or an adapter folder, or a model with --adapter")
    p.add_argument("--adapter", metavar="FOLDER", help="an adapter to put on the model")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the merged model")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the merged model (default: that of the base's files)")
    weights(p)

    p = verb("extract", _extract, "turn a full fine-tune into a LoRA of its base model, by singular value decomposition")
    p.add_argument("model", help="a run of full fine-tuning, a model, or an adapter that is to have another rank")
    p.add_argument("--base", help="the model it was tuned from (default: what the run or adapter names)")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the adapter")
    p.add_argument("--r", "--rank", type=int, default=8, metavar="R", help="rank of every layer (default: 8)")
    p.add_argument("--energy", type=float, metavar="X", help="instead: for each layer the lowest rank that keeps so much, 0 to 1")
    p.add_argument("--data", metavar="PATH", help="held-out data: the closest in what layers put out, not in weights; and a measurement")
    p.add_argument("--task", choices=TASKS, help="default: what the run was trained for, or the model is for")
    p.add_argument("--window", "--max-length", type=int, metavar="N", help="longest sequence, in tokens (default: the run's, else 256)")
    p.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True, help="changed biases, norms and head go along (default)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: the cores, at most 8")
    weights(p)

    p = verb("compare", _compare, "the largest change of each weight between two models, adapters counted in")
    p.add_argument("first", help=a_model)
    p.add_argument("second", help="another of the same kind")
    weights(p)

    p = verb("info", _info, "what is in a model or a run folder: parameters, memory, adaptable modules")
    p.add_argument("model", nargs="?", default="pydoc", help=f"{a_model} (default)")
    weights(p)

    p = verb("gradcheck", _gradcheck, "check every gradient of this package by finite differences")
    where(p)
    return parser, dict(verbs.choices)


def _with_settings(
    parser: argparse.ArgumentParser, verbs: dict[str, argparse.ArgumentParser], argv: list[str] | None
) -> argparse.Namespace:
    """Parse; with --config, once more, with the file's values as defaults: so flags that are given win."""
    from minilora.formats.settings import read_settings

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(argv)[0].config
    if path is None:
        return parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    name = next((word for word in words if word in verbs), None)
    if name is None:
        return parser.parse_args(argv)
    actions: dict[str, argparse.Action] = {}  # by each name of the flag: "r" and "rank" are one
    for action in verbs[name]._actions:
        if action.dest not in ("help", "config"):
            actions |= {_setting(flag): action for flag in action.option_strings or [action.dest] if not flag.startswith("--no-")}
    settings = read_settings(path, {setting: _type_of(action) for setting, action in actions.items()})
    seen: dict[str, str] = {}
    for setting, value in settings.items():
        action = actions[setting]
        if (other := seen.setdefault(action.dest, setting)) != setting:
            raise ValueError(f"{path}: {other} and {setting} are the same setting; give one.")
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{path}: {setting} is {value!r}; choose {', '.join(map(str, action.choices))}.")
        if isinstance(value, str) and callable(action.type):
            value = action.type(value)
        action.default, action.required = value, False
        if action.nargs != "?" and not action.option_strings:
            action.nargs = "?"
    return parser.parse_args(argv)


def _setting(flag: str) -> str:
    """The name that a flag has in a TOML file."""
    return flag.removeprefix("--").replace("-", "_")


def _type_of(action: argparse.Action) -> Any:
    """The type that a flag has in a TOML file."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return bool
    if isinstance(action, argparse._AppendAction):
        return list
    if action.type in (_names, _list, _numbers):
        return str | list
    return action.type if action.type in (int, float) else str


def _say(args: argparse.Namespace) -> Any:
    """print, or with --json print to standard error."""
    return lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def _list(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else _list(text)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
