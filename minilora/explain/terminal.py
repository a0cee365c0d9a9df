"""What `minilora explain` prints."""

from shutil import get_terminal_size
from textwrap import indent
from typing import Any

from minilora.runs import Say

COSTS = {
    "forward": "forward, FLOPs",
    "dx": "gradients of activations, FLOPs",
    "dW": "gradients of parameters, FLOPs",
    "skipped": "gradients not formed, FLOPs",
    "saved": "saved for backward, bytes",
    "trained": "parameters trained",
    "adam": "gradient, m and v, bytes",
}


def show(result: dict[str, Any], say: Say) -> None:
    """Print an explanation, in sections."""
    about = f" ({result['about']})" if result.get("about") and " = " not in result["about"] else ""
    say(f"{result['place']}: {result.get('name', 'one step')}{about}\n")
    tokens = " ".join(repr(piece)[1:-1] if piece.strip() else repr(piece) for piece in result["tokens"])
    say(f"model {result['model']}, loss {result['loss']:.4f} on {len(result['tokens'])} tokens: {tokens}\n{result['note']}")
    _step(result, say) if result["step"] else _place(result, say)


def _place(r: dict[str, Any], say: Say) -> None:
    if r["operation"]:
        kernel = f", run here by the {r['implementation']} kernel" if r["implementation"] not in ("", "reference") else ""
        called = f", called by the layer in {r['layer']}" if r["layer"] else ""
        say(f"Operation {r['operation']}{called}{kernel}{'; ' if r['source'] else ''}{r['source']}.")
    if r["example"]:
        say("No layer calls it in this pass: the arrays are a small random example.")
    for name in ("equation", "gradient"):
        if r[name]:
            say(f"\n{name}\n{indent(r[name], '  ')}")
    sizes = ", ".join(f"{letter} = {size}" for letter, size in r["sizes"].items())
    say(f"\nshapes{', with ' if sizes else ''}{sizes}{' (' if r['letters'] else ''}{r['letters']}{')' if r['letters'] else ''}")
    say(f"  forward   {_arrays(r['forward'], '', 'written in place')}")
    backward = _arrays(r["backward"], "computed by forward", "gradients of parameters")
    say(f"  backward  {'not called: ' + r['no_backward'] if r['no_backward'] else backward}")
    for code in r["code"]:
        _code(code, say)
    if r["worked"]:
        say(f"\none number: token {r['token']} of 0 to {r['grid'][0] - 1}, feature {r['feature']} of 0 to {r['grid'][1] - 1}")
        _numbers(r["worked"], say)
    if "children" in r:
        head = ["what it calls, in this order", "", "backward as no.", "forward", "dx", "dW", "not formed", "bytes saved"]
        keys = ("place", "name", "backward", "forward", "dx", "dW", "skipped", "saved")
        _table(head, [[c[k] for k in keys] for c in r["children"]], say)
    for name, costs in r["costs"].items():
        rows = [[text, costs[key], costs["formulas"].get(key, "")] for key, text in COSTS.items() if costs[key]]
        _table([f"cost, {name}", "", ""], rows or [["no matrix product, nothing saved, nothing trained", "", ""]], say)


def _step(r: dict[str, Any], say: Say) -> None:
    say(f"\nids {' '.join(map(str, r['ids']))}  ->  loss {r['loss']:.6f}")
    at = f"{r['parameter']}[{','.join(map(str, r['index']))}]"
    head = ["backward, from the loss down", "", "dy", "|dy|", "dx, FLOPs", "dW, FLOPs", "gradients"]
    keys = ("place", "name", "dy", "norm_dy", "dx", "dW", "gradients")
    _table(head, [[c[k] for k in keys] for c in r["way"]], say)
    say(f"\n{at}: its gradient, and AdamW's first step with lr = {r['lr']} (w: all trained parameters, one after the other)")
    _numbers(r["worked"], say)
    say(
        f"\nafter the step of all adapters\n  {at}: {r['before']:.8g} -> {r['after']:.8g}\n  loss: {r['loss']:.6f} -> {r['loss_after']:.6f}"
    )


def _code(code: dict[str, Any], say: Say) -> None:
    """Both directions, each forward line with the backward lines that undo it."""
    half = (max(100, min(160, get_terminal_size((130, 40)).columns)) - 5) // 2
    heads = [f"{way} {file}" for way, file in zip(("forward,", "backward, beside what it undoes,"), code["files"], strict=False)]
    say(f"\n  {heads[0]:<{half}} | {heads[-1]}" if heads[1:] else f"\n  {heads[0]}")
    for f in code["forward"]:
        facing = [f"{b['line']:>4} {b['code'].strip()}" for b in code["backward"] if f["line"] in b["undoes"]] or [""]
        for left, right in zip([f"{f['line']:>4} {f['code']}", *[""] * (len(facing) - 1)], facing, strict=True):
            left, right = (text if len(text) <= half else f"{text[: half - 1]}…" for text in (left, right))
            say(f"  {left:<{half}} | {right}".rstrip(" |"))


def _numbers(entries: list[dict[str, Any]], say: Say) -> None:
    kinds = {"numbers": "    = {}", "value": "    = {:.8g}", "finite_difference": "    ~ {:.8g}  by finite difference"}
    kinds |= {"finite_difference_of_loss": kinds["finite_difference"] + " of the loss of the whole model"}
    for e in entries:
        say(f"  {e['formula']}" + (f"    ({e['remark']})" if e.get("remark") else ""))
        for key in (key for key in kinds if key in e):
            say(kinds[key].format(e[key]))


def _table(head: list[str], rows: list[list[Any]], say: Say) -> None:
    """Names to the left, numbers to the right."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [any(isinstance(row[k], (int, float)) for row in rows) for k in range(len(head))]
    for n, row in enumerate(cells):
        line = "  ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(row, widths, right, strict=True))
        say(("  " if n else "\n") + line.rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return (" x " if all(isinstance(v, int) for v in value) else ", ").join(map(str, value))
    return "" if value is None else value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _arrays(arrays: list[dict[str, Any]], no_argument: str, no_result: str) -> str:
    """What goes in, and what comes out."""
    into, out = (", ".join(_array(a) for a in arrays if a["result"] == result) for result in (False, True))
    return f"{into or no_argument}  ->  {out or no_result}"


def _array(a: dict[str, Any]) -> str:
    shape = tuple(a["shape"])
    return f"{a['name']} ({a['axes']}) = {shape}" if a["axes"] else f"{a['name']} {shape}"
