"""What `minilora explain` prints."""

from __future__ import annotations

from shutil import get_terminal_size
from textwrap import indent
from typing import Any

from minilora.runs import Say

NAMES = {"forward": "forward", "dx": "gradients of activations", "dW": "gradients of parameters", "skipped": "gradients not formed"}


def show(result: dict[str, Any], say: Say) -> None:
    """Print an explanation, in sections."""
    width = max(100, min(160, get_terminal_size((130, 40)).columns))
    tokens = " ".join(repr(piece)[1:-1] if piece.strip() else repr(piece) for piece in result["tokens"])
    about = f" ({result['about'].rstrip('.')})" if result.get("about") and " = " not in result["about"] else ""
    say(result["place"] + (f": {result['name']}{about}" if "name" in result else ": one step"))
    _title(say, "the pass")
    say(f"  model {result['model']}, loss {result['loss']:.4f} on {len(result['tokens'])} tokens: {tokens}")
    say(f"  {result['note']}")
    _step(result, say) if result.get("step") else _place(result, say, width)


def _place(r: dict[str, Any], say: Say, width: int) -> None:
    if r["operation"]:
        kernel = "" if r["implementation"] in ("", "reference") else f", run here by the {r['implementation']} kernel"
        called = f", called by the layer in {r['layer']}" if r["layer"] else ""
        say(f"  operation {r['operation']}{called}{kernel}" + (f"; {r['source']}" if r["source"] else ""))
    if r["example"]:
        say("  no layer calls it in this pass: the arrays are a small random example")
    for name in ("equation", "gradient"):
        if r[name]:
            _title(say, name)
            say(indent(r[name], "  "))
    _title(say, "shapes" + (f", with {', '.join(f'{k} = {v}' for k, v in r['sizes'].items())}" if r["sizes"] else ""))
    for name in ("forward", "backward"):
        into, out = (", ".join(map(_array, (a for a in r[name] if a["result"] == result))) for result in (False, True))
        if out:
            say(f"  {name:<9} {into}  ->  {out}")
    if r["no_backward"]:
        say(f"  backward  not called: {r['no_backward']}")
    for code in r["code"]:
        _code(code, say, width)
    if r["worked"]:
        _title(say, f"one number: token {r['token']} of 0 to {r['grid'][0] - 1}, feature {r['feature']} of 0 to {r['grid'][1] - 1}")
        for entry in r["worked"]:
            _entry(entry, say)
    if r.get("children"):
        _title(say, "what it calls, forward in this order and backward by the numbers")
        say(f"  {'':<28} {'':<18} {'back':>5} {'forward':>14} {'dx':>14} {'dW':>14} {'not formed':>14} {'saved bytes':>12}")
        for c in r["children"]:
            back = "-" if c["backward"] is None else c["backward"]
            numbers = "".join(f" {c[k]:>14,}" for k in ("forward", "dx", "dW", "skipped"))
            say(f"  {c['place'][:28]:<28} {c['name'][:18]:<18} {back:>5}{numbers} {c['saved']:>12,}")
    _costs(r, say)


def _code(code: dict[str, Any], say: Say, width: int) -> None:
    """Both directions, each forward line with the backward lines that undo it."""
    _title(say, " and ".join(code["files"]))
    half = (width - 5) // 2
    shown = [b for b in code["backward"] if b["undoes"]]
    for f in code["forward"]:
        facing = [b for b in shown if f["line"] in b["undoes"]] or [None]
        for k, b in enumerate(facing):
            left = f"{f['line']:>4} {f['code']}" if k == 0 else ""
            right = "" if b is None else f"{b['line']:>4} {b['code'].strip()}"
            say(f"  {_cut(left, half):<{half}} | {_cut(right, half)}".rstrip(" |"))


def _entry(e: dict[str, Any], say: Say) -> None:
    say(f"  {e.get('formula') or _name(e)}")
    say(f"    = {e['numbers']}\n    = {e['value']:.8g}" if e.get("numbers") else f"    = {e['value']:.8g}")
    for key, text in (("finite_difference", "finite difference"), ("finite_difference_of_loss", "finite difference of the loss of the whole model")):
        if e.get(key) is not None:
            say(f"    ~ {e[key]:.8g}  {text}")


def _costs(r: dict[str, Any], say: Say) -> None:
    """FLOPs of matrix products, and bytes, as counted in this pass; LoRA's and those of training everything."""
    for name, costs in r["costs"].items():
        rows = [(NAMES[key], costs[key], costs["formulas"].get(key, "")) for key in NAMES]
        saved = " + ".join(f"{t['formula']} ({t['name'] or t['by']})" for t in r["saved"]) if name == "LoRA" and r["operation"] else ""
        rows += [("bytes saved for backward", costs["saved"], saved), ("parameters trained", costs["trained"], "")]
        rows += [("bytes: gradient, m and v", costs["adam"], "12 a parameter")]
        _title(say, f"cost, {'with LoRA' if name == 'LoRA' else name}: FLOPs of matrix products, and bytes")
        for text, value, formula in (row for row in rows if row[1]):
            say(f"  {text:<26}{value:>14,}   {formula}".rstrip())
        if not any(value for _, value, _ in rows):
            say("  no matrix product, nothing saved, nothing trained")


def _step(r: dict[str, Any], say: Say) -> None:
    _title(say, f"backward, from the loss down to {r['place']}")
    say(f"  {'place':<34} {'':<22} {'dy':<12} {'|dy|':>10} {'dx FLOPs':>14} {'dW FLOPs':>14}  gradients")
    for c in r["way"]:
        size = "" if c["norm_dy"] is None else f"{c['norm_dy']:.4g}"
        shape = " x ".join(map(str, c["dy"]))
        say(f"  {c['place'][:34]:<34} {c['name'][:22]:<22} {shape:<12} {size:>10} {c['dx']:>14,} {c['dW']:>14,}  {', '.join(c['gradients'])}")
    at = ",".join(map(str, r["index"]))
    _title(say, f"the gradient of {r['parameter']}[{at}]")
    for entry in r["worked"]:
        _entry(entry, say)
    _title(say, f"AdamW, first step, lr = {r['lr']}: m and v were zero")
    for entry in r["adamw"]:
        _entry(entry, say)
    _title(say, "after the step of all adapters")
    say(f"  {r['parameter']}[{at}] = {r['before']:.8g} -> {r['after']:.8g}")
    say(f"  loss {r['loss']:.6f} -> {r['loss_after']:.6f}")


def _title(say: Say, text: str) -> None:
    say(f"\n{text}")


def _array(a: dict[str, Any]) -> str:
    return f"{a['name']} ({a['axes']}) = {tuple(a['shape'])}" if a["axes"] else f"{a['name']} {tuple(a['shape'])}"


def _name(e: dict[str, Any]) -> str:
    return f"{e['name']}[{','.join(map(str, e['index']))}]"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
