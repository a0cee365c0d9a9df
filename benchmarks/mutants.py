"""Every single change of our own backward lines, made mechanically: does `gradcheck` see it, blame the right place, and name the cause?

    python -m benchmarks.mutants [--every 10] [--only lora]      changes; every 10th, in files whose name has "lora"
    python -m benchmarks.mutants --keep FILE                     only those that are new, or that a result in this file says are not seen
    python -m benchmarks.mutants --false-alarms 200              no change, and so many seeds: nothing may be wrong
    python -m benchmarks.mutants --table FILE ...                the table in docs/gradcheck.md, from results in these files

A mutant is one change of one expression or statement in a function that computes a gradient. Its code object takes the place of the
original's, so nothing is imported again. Detected: a report of the catalogue that runs the changed line is not ok. Place: in a composite (a
block or a model), the first place that is blamed is a call of the changed function. Cause: what the report says, where the change is one of
the listed causes. Mutants that nothing detects are run beside the original; where every gradient of the catalogue is the same but for
rounding, they are equivalent, and listed with the reason in EQUIVALENT.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.rival_checkers import into_page
from minilora.checking.catalogue import catalogue
from minilora.checking.check import Check, unchanged
from minilora.checking.gradcheck import gradcheck
from minilora.kernels import dispatch
from minilora.layers import Layer

ROOT = Path(__file__).parent.parent
FILES = [
    *(f"functional/{name}" for name in "activations attention dropout embedding gelu linear lora losses norm rotary".split()),
    *(f"kernels/numpy/{name}" for name in "attention lora losses norm pointwise".split()),
    *("kernels/__init__", "kernels/grouped"),
    *(f"layers/{name}" for name in "activations base dropout embedding linear norm sequential".split()),
    *("lora/layer", "lora/variants/dora", "lora/variants/vera", "lora/variants/embedding", "lora/init/data"),
    *("adapters/bottleneck", "adapters/several"),
    *(f"models/{name}" for name in "attention bert block classifier decoder gpt2 llama modernbert stack".split()),
]
# functions that compute gradients under other names, and the variables of forward that are one (all lines of a function: None)
ALSO: dict[str, set[str] | None] = {
    "_collect": None,
    "through_softmax": None,
    "Parameter.add_grad": None,
    "mse": {"dy"},
    "cross_entropy": {"dlogits"},
    "linear_cross_entropy": {"dx", "dW", "p"},
    "_gelu_tanh": {"d"},
    "_silu": {"d"},
    "swiglu": {"d", "by_g"},
    "BertClassifier.loss": {"dlogits"},
}
PLAIN = " (references)"
MODELS = ("Block", "BertLayer", "GPT2", "Llama", "BertClassifier")


KEPT = "file function line kind change detected composite places name gradient cause blamed causes same".split()


class Mutant(NamedTuple):
    file: str
    function: str  # qualified name
    line: int
    kind: str
    change: str
    code: types.CodeType
    causes: tuple[str, ...]  # words of which the report has to have one; () where the change is none of the listed causes


# -- changes -----------------------------------------------------------------------------------------------------------------

SIGN, TIMES, LACKS = ("-1 times", "wrong sign"), ("times the true gradient", "times "), ("lacks", "is zero", "no gradient was written")


def changes(node: ast.AST, parent: ast.AST, final: bool, names: list[str]) -> Iterator[tuple[str, ast.AST | None, tuple[str, ...]]]:
    """(kind, what takes the place of the node, causes). final: the node is a gradient as it is returned, assigned or added.

    names: of the function's arrays, which may be confused.
    """
    name = isinstance(node, ast.Name)
    if isinstance(node, ast.expr) and final and not (isinstance(node, (ast.Constant, ast.Tuple))):
        yield "sign", negated(node), SIGN
    if isinstance(parent, ast.Assign) and isinstance(node, (ast.BinOp, ast.Call)) and not final:
        yield "sign", negated(node), ()
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult) and isinstance(node, (ast.Name, ast.BinOp)):
        yield "transposed", ast.Attribute(node, "T", ast.Load()), ()
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and isinstance(parent, (ast.BinOp, ast.AugAssign)):
        yield "sign", negated(node), ()
    if isinstance(node, ast.BinOp):
        left, right, op = node.left, node.right, type(node.op)
        if op in (ast.Add, ast.Sub):
            yield (
                "sign of a term",
                ast.BinOp(left, ast.Sub() if op is ast.Add else ast.Add(), right),
                (*SIGN, "has ", "times ") if final else (),
            )
            yield "term", left, LACKS if final else ()
            yield "term", right if op is ast.Add else negated(right), LACKS if final else ()
        if op is ast.Mult:
            yield "factor", left, TIMES if final and scalar(right) else ()
            yield "factor", right, TIMES if final and scalar(left) else ()
            yield "divided", ast.BinOp(left, ast.Div(), right), TIMES if final and (scalar(right)) else ()
        if op is ast.Div:
            yield "factor", left, TIMES if final and scalar(right) else ()
            yield "multiplied", ast.BinOp(left, ast.Mult(), right), TIMES if final and scalar(right) else ()
        if op is ast.MatMult:
            yield "swapped", ast.BinOp(right, ast.MatMult(), left), ()
            yield "transposed", ast.Attribute(node, "T", ast.Load()), ("transposed",) if final else ()
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield "not transposed", node.value, ()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("sum", "mean") and node.keywords:
        axis = [k for k in node.keywords if k.arg == "axis"]
        other = "mean" if node.func.attr == "sum" else "sum"
        yield "sum or mean", ast.Call(ast.Attribute(node.func.value, other, ast.Load()), node.args, node.keywords), TIMES if final else ()
        if axis and isinstance(axis[0].value, ast.Constant):
            flipped = [
                ast.keyword("axis", ast.Constant(1 - abs(axis[0].value.value) if axis[0].value.value != -1 else 0)),
                *(k for k in node.keywords if k.arg != "axis"),
            ]
            yield "axis", ast.Call(node.func, node.args, flipped), ("axis 1",) if final else ()
            if not any(k.arg == "keepdims" for k in node.keywords):
                yield "broadcast not summed", node.func.value, ("is left out",) if final else ()
                kept = [*node.keywords, ast.keyword("keepdims", ast.Constant(True))]
                yield "axis", ast.Call(node.func, node.args, kept), ("its values are right",) if final else ()
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("K.add"):
        yield "residual", node.args[0], LACKS
        yield "residual", node.args[1], LACKS
    if isinstance(node, ast.Call) and final and ast.unparse(node.func).endswith("backward") and node.args:
        yield "bypassed", node.args[0], ()
    if isinstance(node, ast.keyword) and node.arg == "need_dx" and not isinstance(node.value, ast.Constant):
        yield "need_dx", ast.keyword("need_dx", ast.Constant(False)), ("need_dx=False", "no gradient", "returned None", "raised")
    if name and node.id.startswith("s_") and isinstance(parent, ast.Call):  # what another call saved
        for other in (
            "s_norm_1",
            "s_norm_2",
            "s_attn",
            "s_mlp",
            "s_proj",
            "s_fc",
            "s_q",
            "s_k",
            "s_v",
            "s_ln_1",
            "s_ln_2",
            "s_wte",
            "s_wpe",
        ):
            if other != node.id and other.split("_")[1][:2] == node.id.split("_")[1][:2]:
                yield "saved of another", ast.Name(other, ast.Load()), ("what another call saved",)
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn, ast.Is, ast.IsNot)):
        flip = {ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}[type(node.ops[0])]
        yield "condition", ast.Compare(node.left, [flip()], node.comparators), ()
    if isinstance(node, (ast.If, ast.IfExp)) and isinstance(node.test, (ast.Name, ast.Attribute)):
        yield "condition", type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse), ()
    if isinstance(node, ast.AugAssign):
        yield (
            "overwritten",
            ast.Assign([node.target], node.value, lineno=node.lineno),
            ("+= is missing", "lacks") if "grad" in ast.unparse(node.target) else (),
        )
        if isinstance(node.op, (ast.Add, ast.Sub)):
            flip_op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield "sign of a term", ast.AugAssign(node.target, flip_op, node.value), ()
        yield "left out", ast.Pass(), ()
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("[...]"):
        yield "added to", ast.AugAssign(node.targets[0], ast.Add(), node.value), ()
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = node.value
        yield (
            "left out",
            ast.Pass(),
            ("no gradient was written", "never calls", "lacks")
            if "add_grad" in ast.unparse(call.func) or "backward" in ast.unparse(call.func)
            else (),
        )
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_grad":
            target = ast.Attribute(call.func.value, "grad", ast.Store())
            yield "overwritten", ast.Assign([target], call.args[0], lineno=node.lineno), ("+= is missing",)
    if (
        isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and not isinstance(parent, (ast.keyword, ast.Subscript, ast.Slice))
    ):
        yield "constant", ast.Constant(node.value + 1), ()
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names and isinstance(parent, (ast.BinOp, ast.Call)):
        others = names[names.index(node.id) + 1 :] + names[: names.index(node.id)]
        yield from (("confused", ast.Name(other, ast.Load()), ()) for other in others[: 2 if len(names) < 9 else 1])


def negated(node: ast.expr) -> ast.expr:
    return ast.Call(ast.Name("_neg", ast.Load()), [node], [])


def scalar(node: ast.AST) -> bool:
    text = ast.unparse(node)
    return (
        isinstance(node, ast.Constant)
        or text in ("s", "N", "times", "(2 / N)", "2 / error.size", "2 / N", "factor")
        or text.startswith("1 / math")
        or text.startswith("len(")
    )


def neg(value: Any) -> Any:
    """-value, element by element; None stays None."""
    return tuple(map(neg, value)) if isinstance(value, tuple) else None if value is None else -value


def mutants() -> Iterator[Mutant]:
    for file in FILES:
        path = ROOT / "minilora" / f"{file}.py"
        tree = ast.parse(path.read_text())
        for qualified, function in functions(tree):
            name = qualified.split(".")[-1]
            only = ALSO.get(qualified, ALSO.get(name, set()))
            if not (name.endswith("backward") or only is None or only):
                continue
            known = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}
            for i, (kind, _, causes) in enumerate(sites(function, only)):
                changed_tree = copy.deepcopy(tree)
                changed_function = dict(functions(changed_tree))[qualified]
                line, text = apply(changed_function, only, i)
                ast.fix_missing_locations(changed_tree)
                try:
                    code = compile(changed_tree, str(path), "exec")
                except (SyntaxError, ValueError, TypeError):
                    continue
                if code_of(code, qualified).co_freevars != function_of(file, qualified).__code__.co_freevars:
                    continue  # without its call of super()
                if kind not in ("confused", "saved of another") or text.split(" -> ")[1] in known:
                    yield Mutant(file, qualified, line, kind, text, code_of(code, qualified), causes)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node


def code_of(code: types.CodeType, qualified: str) -> types.CodeType:
    for part in qualified.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == part)
    return code


def walk(function: ast.FunctionDef, only: set[str] | None) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, bool]]:
    """(parent, field, index, node, final) of what may be changed: the body without docstring and annotations."""
    body = function.body[1:] if ast.get_docstring(function) else function.body

    def visit(parent: ast.AST, field: str, index: int | None, node: ast.AST, final: bool) -> Iterator[Any]:
        if isinstance(node, (ast.Raise, ast.FunctionDef)):
            return
        yield parent, field, index, node, final
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "ctx", "op", "ops", "func") and not isinstance(value, ast.Attribute):
                continue
            for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    yield from visit(node, name, i, child, passes(node, name, final))

    def statements(parent: Any, field: str) -> Iterator[tuple[Any, str, int, ast.stmt]]:
        for i, statement in enumerate(getattr(parent, field)):
            if only and isinstance(statement, (ast.If, ast.For)):
                yield from statements(statement, "body")
            elif not only or touches(statement, only):
                yield parent, field, i, statement

    for parent, field, i, statement in statements(function, "body"):
        if parent is not function or statement in body:
            yield from visit(parent, field, i, statement, False)


def touches(statement: ast.AST, only: set[str]) -> bool:
    """Whether the statement assigns to one of these, or passes it as the `out` of a NumPy function."""
    stored = statement.targets if isinstance(statement, ast.Assign) else [statement.target] if isinstance(statement, ast.AugAssign) else []
    stored += [k.value for n in ast.walk(statement) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "out"]
    return any(isinstance(n, ast.Name) and n.id in only for target in stored for n in ast.walk(target))


def passes(node: ast.AST, field: str, final: bool) -> bool:
    """Whether a child of the node is a gradient as it is returned, assigned or added."""
    if isinstance(node, ast.Return):
        return True
    if isinstance(node, ast.Assign) and field == "value":
        target = ast.unparse(node.targets[0])
        return target in (
            "dx",
            "dW",
            "db",
            "dA",
            "dB",
            "dq",
            "dk",
            "dv",
            "dm",
            "dE",
            "dgamma",
            "dbeta",
            "dlogits",
            "dg",
            "du",
            "dh",
            "dq[at]",
            "dk[seq]",
            "dv[seq]",
        )
    if isinstance(node, ast.Call) and field == "args":
        return ast.unparse(node.func).endswith("add_grad")
    if isinstance(node, (ast.Tuple, ast.IfExp)) and field in ("elts", "body"):
        return final
    return False


NOT_ARRAYS = set("s p n T N G K F xp e i at self need key offsets rows n_head keep mask step W_block first width saved".split())


def arrays_of(function: ast.FunctionDef) -> list[str]:
    """Names of the function's arrays: its arguments and variables of few letters."""
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    names = dict.fromkeys([a.arg for a in function.args.args] + stored)
    return [name for name in names if len(name) <= 6 and name not in NOT_ARRAYS and not name.startswith(("s_", "_", "at_"))]


def sites(function: ast.FunctionDef, only: set[str] | None) -> list[tuple[str, Callable[[], int], tuple[str, ...]]]:
    return [
        (kind, None, causes)
        for parent, _, _, node, final in walk(function, only)
        for kind, _, causes in changes(node, parent, final, arrays_of(function))
    ]  # type: ignore[misc]


def apply(function: ast.FunctionDef, only: set[str] | None, number: int) -> tuple[int, str]:
    """Make the change of this number; (line, what became what)."""
    n, names = 0, arrays_of(function)
    for parent, field, index, node, final in list(walk(function, only)):
        for _, new, _ in changes(node, parent, final, names):
            if n == number:
                before = ast.unparse(node)
                if index is None:
                    setattr(parent, field, new)
                else:
                    getattr(parent, field)[index] = new
                line = getattr(node, "lineno", getattr(getattr(node, "value", None), "lineno", function.lineno))
                return line, f"{before} -> {ast.unparse(new)}"  # type: ignore[arg-type]
            n += 1
    raise IndexError(number)


# -- running -----------------------------------------------------------------------------------------------------------------


def function_of(file: str, qualified: str) -> types.FunctionType:
    value: Any = importlib.import_module("minilora." + file.replace("/", ".").removesuffix(".__init__"))
    for part in qualified.split("."):
        value = vars(value)[part] if isinstance(value, type) else getattr(value, part)
    while not hasattr(value, "__code__"):
        value = value.__func__ if hasattr(value, "__func__") else value.func
    return value


def coverage(entries: list[Any], codes: set[types.CodeType]) -> tuple[dict[tuple[str, int], list[int]], list[float]]:
    """{(file, line): the entries that run it}, and the seconds of each entry."""
    found: dict[tuple[str, int], list[int]] = {}
    seconds = []
    inside = str(ROOT / "minilora")
    for i, (name, layer, x, options) in enumerate(entries):
        dispatch.PLAIN = name.endswith(PLAIN)
        lines: set[tuple[str, int]] = set()

        def local(frame: Any, event: str, arg: Any, lines: Any = lines) -> Any:
            lines.add((frame.f_code.co_filename, frame.f_lineno))
            return local

        def start(frame: Any, event: str, arg: Any) -> Any:
            return local if frame.f_code in codes else None

        before = time.perf_counter()
        with unchanged(layer), np.errstate(all="ignore"):
            sys.settrace(start)
            try:
                Check(layer, x, 1e-7, 0, 1, options).entries()
            finally:
                sys.settrace(None)
        seconds.append(time.perf_counter() - before)
        for file, line in lines:
            found.setdefault((file.removeprefix(inside + "/").removesuffix(".py"), line), []).append(i)
    dispatch.PLAIN = False
    return found, seconds


def run(entry: Any, **how: Any) -> Any:
    name, layer, x, options = entry
    dispatch.PLAIN = name.endswith(PLAIN)
    try:
        return gradcheck(layer, x, **how, **options)
    finally:
        dispatch.PLAIN = False


def judge(mutant: Mutant, entries: list[Any], where: list[int], seconds: list[float]) -> dict[str, Any]:
    """What the checker says to a mutant."""
    function = function_of(mutant.file, mutant.function)
    original = function.__code__
    function.__globals__.setdefault("_neg", neg)
    leaves = sorted((i for i in where if not entries[i][0].startswith(MODELS)), key=lambda i: seconds[i])
    models = sorted((i for i in where if entries[i][0].startswith(MODELS)), key=lambda i: seconds[i])
    result: dict[str, Any] = {**mutant._asdict(), "detected": "", "composite": "", "places": [], "cause": ""}
    del result["code"]
    try:
        function.__code__ = mutant.code
        signal.alarm(600)
        for i in [*leaves, *models]:
            report = run(entries[i], max_coordinates=12) if i in leaves else run(entries[i], by_call=True, tol=1e-6)
            if not report.ok and report.verdict != "nothing to check":
                result["detected"] = entries[i][0]
                result["leaf_cause"] = report.faults[0].cause if report.faults else ""
                result["leaf_gradient"] = report.faults[0].gradient if report.faults else ""
                break
        for i in models[:4] if result["detected"] else []:
            report = run(entries[i], by_call=True, tol=1e-6)
            if report.verdict != "WRONG":  # a broken promise, or a few coordinates
                report = run(entries[i], max_coordinates=3)
            if report.verdict == "WRONG" and report.faults:
                fault = report.faults[0]
                result |= {"composite": entries[i][0], "places": fault.places, "name": fault.name, "gradient": fault.gradient}
                result |= {"cause": fault.cause, "source": fault.source, "blamed": is_right(mutant, function, original, fault)}
                break
    except TimeoutError:
        result["detected"] = "timeout"
    finally:
        signal.alarm(0)
        function.__code__ = original
    if not result["detected"]:
        result["same"] = all(agree(gradients(entries[i]), gradients(entries[i], function, mutant.code)) for i in where)
    return result


def gradients(entry: Any, function: Any = None, code: Any = None) -> list[dict[str, Any]]:
    """Every gradient of an entry, right after forward and with another forward in between; with this code for the function."""
    name, layer, x, options = entry
    original = getattr(function, "__code__", None)
    dispatch.PLAIN = name.endswith(PLAIN)
    try:
        if function is not None:
            function.__code__ = code
        with unchanged(layer), np.errstate(all="ignore"):
            check = Check(layer, x, 1e-7, 0, 1, options)
            check.analyse()
            return [check.alone, check.analytic]
    finally:
        dispatch.PLAIN = False
        if function is not None:
            function.__code__ = original


def agree(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether all are equal, but for rounding."""
    pairs = [(a[name], b[name]) for a, b in zip(some, others, strict=True) for name in a]
    return all(a is b or np.allclose(a, b, rtol=0, atol=1e-13 * abs(a).max()) for a, b in pairs)


def is_right(mutant: Mutant, function: types.FunctionType, original: types.CodeType, fault: Any) -> bool:
    """Whether the blamed call runs the changed function: it is its backward, or a function that only this operation calls."""
    path, _, line = fault.source.rpartition(":")
    here = path.endswith(f"minilora/{mutant.file}.py")
    name = mutant.function.split(".")[-1]
    if (
        here
        and line.isdigit()
        and original.co_firstlineno <= int(line) < original.co_firstlineno + 80
        and int(line) == original.co_firstlineno
    ):
        return True
    if fault.name in USERS.get(name, ()) or (here and fault.name == mutant.function.split(".")[0]):
        return True
    owner = mutant.function.split(".")[0]
    return name == "backward" and any(
        owner in [base.__name__ for base in kind.__mro__] for kind in kinds(Layer) if kind.__name__ == fault.name
    )


def kinds(kind: type) -> Iterator[type]:
    yield kind
    for sub in kind.__subclasses__():
        yield from kinds(sub)


USERS = {  # the operations or layers that run a function which is no backward of its own
    "softmax_backward": ("attention", "softmax"),
    "silu_backward": ("silu", "swiglu"),
    "activation_backward": ("silu", "gelu_tanh", "gelu"),
    "through_softmax": ("attention",),
    "_collect": ("attention",),
    "take_rows_backward": ("take_rows", "cross_entropy"),
    "rms_norm_backward": ("rms_norm", "layer_norm"),
    "_gelu_tanh": ("gelu_tanh",),
    "_silu": ("silu", "swiglu"),
    "swiglu": ("swiglu",),
    "linear_backward": ("linear", "lora_linear"),
    "lora_linear_backward": ("lora_linear",),
    "attention_backward": ("attention",),
    "cross_entropy": ("cross_entropy",),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "dora_linear_backward": ("dora_linear",),
    "column_norms_backward": ("column_norms",),
    "vera_linear_backward": ("vera_linear",),
    "lora_embedding_backward": ("lora_embedding",),
    "embedding_backward": ("embedding", "lora_embedding"),
    "adapted_backward": ("LoRALinear", "DoRALinear", "VeRALinear", "HeldNorms"),
    "embed_backward": ("GPT2Body", "Bert", "LlamaBody", "GPT2Body.embed", "Bert.embed", "LlamaBody.embed"),
    "loss_backward": ("LossOf",),
    "loss": ("LossOf",),
    "attention_backward_joined": ("Attention",),
    "add_grad": ("Linear", "LayerNorm", "RMSNorm", "Embedding", "LoRALinear", "DoRALinear", "VeRALinear"),
    "prefix": (),
}


EQUIVALENT = {  # (what the file and the change have, the reason); the first that fits is given
    "empty": "the array is overwritten before it is read",
    "zeros": "minus zero is zero",
    ".T).T": "the matrix is symmetric",
    "average": "a vector is its own transpose",
    **dict.fromkeys(("e.T", "d.T", " e).T", " M).T", " dy).T"), "a vector is its own transpose"),
    "init/data": "a count of calls, read by the initialiser alone",
}
SAME_SHAPE = "both names are one array, or arrays of one shape and kind of which only that is read"


def false_alarms(seeds: int) -> None:
    """Every entry of the catalogue along one direction, and in every tenth seed every call of it: what is reported as wrong is printed."""
    wrong = checks = 0
    for seed in range(seeds):
        for name, layer, x, options in catalogue(seed):
            if seed % 10 == 0:
                report = gradcheck(layer, x, by_call=True, tol=1e-6, seed=seed, **options)
                entries, verdict = report.entries, report.verdict
            elif name.endswith("large"):
                continue
            else:
                with unchanged(layer), np.errstate(all="ignore"):
                    check = Check(layer, x, 1e-7, seed, 1, options)
                    entries = check.entries([list(check.checked)])
                verdict = next((v for v in ("WRONG", "inconclusive") if v in [e.verdict(1e-7) for e in entries]), "ok")
            checks += len(entries)
            wrong += verdict == "WRONG"
            if verdict != "ok":
                print(seed, name, verdict, [e for e in entries if e.verdict(1e-7) != "ok"][:2], flush=True)
        print(f"seed {seed}: {checks} checks so far, {wrong} reports that something is wrong", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """What the page says."""
    n = summary(results)
    missed = [r for r in results if not r["detected"]]
    changed = n["mutants"] - sum(r["same"] for r in missed)
    lines = ["| | of | number | share |", "|---|---|---|---|"]
    rows = [
        ("detected", "changes that change a gradient", n["detected"], changed),
        ("the right place first, in a block or a model", "those that one runs", n["place right"], n["seen in a composite"]),
        ("the right cause", "those of a listed cause", n["cause right"], n["listed cause"]),
    ]
    lines += [f"| {what} | {of}: {total:,} | {number:,} | {number / max(total, 1):.1%} |" for what, of, number, total in rows]
    for title, same in (("are not seen", False), ("change no gradient", True)):
        part = [r for r in missed if r["same"] == same]
        lines += ["", f"{len(part)} of {n['mutants']:,} changes {title}{':' if part else '.'}"]
        lines += ["", "| file | change | why |", "|---|---|---|"] if part else []
        for r in part:
            why = next((why for words, why in EQUIVALENT.items() if words in f"{r['file']} {r['change']}"), SAME_SHAPE) if same else ""
            lines.append(f"| {r['file']}.py:{r['line']} | `{r['change'].replace('|', '/')[:90]}` | {why} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", default="", help="only files whose name contains this")
    parser.add_argument("--keep", type=Path, help="a file of results, of which those that detect a change stay")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutants.json")
    parser.add_argument("--false-alarms", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--table", type=Path, nargs="+", help="files of results")
    args = parser.parse_args()
    if args.false_alarms:
        return false_alarms(args.false_alarms)
    if args.table:
        results = [r for file in args.table for r in json.loads(file.read_text())]
        args.out.write_text(json.dumps([{k: r[k] for k in KEPT if k in r} for r in results]).replace("}, {", "},\n {") + "\n")
        return into_page("mutants", table(results))
    entries = list(catalogue())
    entries += [(f"{name}{PLAIN}", *rest) for name, *rest in entries if name.startswith(MODELS)]
    listed = [m for m in mutants() if args.only in m.file][args.start :: args.every]
    results = []
    if args.keep:
        seen, listed = kept(args.keep, listed)
        results += seen
    where, seconds = coverage(entries, {function_of(m.file, m.function).__code__ for m in listed})
    print(f"{len(listed)} mutants, {len(entries)} entries of {sum(seconds):.0f} s", flush=True)

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    for n, mutant in enumerate(listed):
        result = judge(mutant, entries, where.get((mutant.file, mutant.line), []), seconds)
        results.append(result)
        state = "MISSED" if not result["detected"] else "place" if result.get("blamed") is False else "ok"
        found = (result["composite"], result["places"][:1], result.get("gradient"), result["cause"][:110])
        print(
            n, state, f"{mutant.file}:{mutant.line}", mutant.kind, "|", mutant.change[:90], "|", result["detected"], "|", *found, flush=True
        )
        args.out.write_text(json.dumps(results, indent=1, default=str).replace(f"{ROOT}/", "") + "\n")
    summary(results)


def kept(file: Path, listed: list[Mutant]) -> tuple[list[dict[str, Any]], list[Mutant]]:
    """Results in the file that detect one of these mutants, and the other mutants. Equal changes of a function follow in order."""
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in json.loads(file.read_text()):
        known.setdefault((r["file"], r["function"], r["kind"], r["change"]), []).append(r)
    seen, others = [], []
    for m in listed:
        same = known.get((m.file, m.function, m.kind, m.change), [])
        if same and all(r["detected"] for r in same):
            seen.append({**same.pop(0), "line": m.line})
        else:
            others.append(m)
    return seen, others


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    seen = [r for r in results if r["detected"]]
    placed = [r for r in seen if r["composite"]]
    listed = [r for r in placed if r["causes"]]
    named = [r for r in listed if any(words in r["cause"] for words in r["causes"])]
    numbers = {
        "mutants": len(results),
        "detected": len(seen),
        "missed": len(results) - len(seen),
        "seen in a composite": len(placed),
        "place right": sum(bool(r["blamed"]) for r in placed),
        "listed cause": len(listed),
        "cause right": len(named),
    }
    print(json.dumps(numbers))
    return numbers


if __name__ == "__main__":
    main()
