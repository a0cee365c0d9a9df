"""The same ten faults, given to `ml.gradcheck`, `torch.autograd.gradcheck` and `jax.test_util.check_grads`: what does each say?

    python -m benchmarks.rival_checkers [--jax PYTHON]      PYTHON: an interpreter that has jax; without it, its earlier answers are kept

Writes benchmarks/results/rival_checkers.json, and the table in docs/gradcheck.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/rival_checkers.json"
S = 0.5
FAULTS = {
    "sign": "the sign of db",
    "factor": "dW without the factor s",
    "transposed": "dW transposed",
    "broadcast": "db not summed over the rows",
    "residual": "the residual left out of dx",
    "stale": "backward reads the x of the last call",
    "column": "one column of dW left out",
    "gelu": "GELU by tanh, with the gradient of GELU by erf",
    "zero": "LoRA's dA 1.5 times too large, while B = 0",
    "overwritten": "the gradient assigned, not added",
}
LAST: dict[str, Any] = {}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (5, 4), "W": (4, 4), "b": (4,), "A": (4, 2)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()} | {"B": np.zeros((2, 4))}


def forward(fault: str, m: Any, *args: Any) -> Any:
    """y = s x W + b + x; or GELU by tanh; or x W + s (x A) B. m: the array module's tanh, exp and erf."""
    LAST["x"] = args[0]
    if fault == "gelu":
        x = args[0]
        return 0.5 * x * (1 + m.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    if fault == "zero":
        x, W, A, B = args
        return x @ W + S * ((x @ A) @ B)
    x, W, b = args
    return S * (x @ W) + b + x


def backward(fault: str, m: Any, dy: Any, *args: Any) -> tuple[Any, ...]:
    """The gradients of all arguments, with the fault."""
    if fault == "gelu":
        x = args[0]
        return (dy * (0.5 * (1 + m.erf(x / 2**0.5)) + x * m.exp(-0.5 * x * x) / 2.5066282746310002),)
    if fault == "zero":
        x, W, A, B = args
        du = S * (dy @ B.T)
        return dy @ W.T + du @ A.T, x.T @ dy, 1.5 * (x.T @ du), S * ((x @ A).T @ dy)
    x, W, _ = args
    x = LAST["x"] if fault == "stale" else x
    dx, dW, db = S * (dy @ W.T) + dy, S * (x.T @ dy), dy.sum(0)
    if fault == "column":
        dW = dW * m.array([0.0, 1.0, 1.0, 1.0])
    changed = {"sign": (dx, dW, -db), "factor": (dx, dW / S, db), "transposed": (dx, dW.T, db), "broadcast": (dx, dW, dy)}
    return changed.get(fault, (dx - dy, dW, db) if fault == "residual" else (dx, dW, db))


def inputs(fault: str) -> list[np.ndarray]:
    names = {"gelu": "x", "zero": "x W A B"}.get(fault, "x W b")
    return [arrays()[name] for name in names.split()]


def first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[0][:170] if lines else ""


def ours(fault: str) -> tuple[str, str]:
    import minilora as ml
    from minilora.functional.gelu import erf
    from minilora.layers import Parameter

    m = SimpleNamespace(tanh=np.tanh, exp=np.exp, erf=erf, array=np.array)
    x, *rest = inputs(fault)

    class Layer:
        name = "layer"

        def __init__(self) -> None:
            self.p = dict(zip({"zero": "WAB"}.get(fault, "Wb"), map(Parameter, rest), strict=False))

        def forward(self, x: Any) -> Any:
            return forward(fault, m, x, *(p.data for p in self.p.values())), x

        def backward(self, dy: Any, saved: Any) -> Any:
            dx, *grads = backward(fault, m, dy, saved, *(p.data for p in self.p.values()))
            for p, g in zip(self.p.values(), grads, strict=True):
                p.grad = g if p.grad is None or fault == "overwritten" else p.grad + g
            return dx

        def parameters(self) -> Any:
            return list(self.p.items())

    report = ml.gradcheck(Layer(), x)
    fault_ = report.faults[0] if report.faults else None
    return ("no", "ok") if fault_ is None else ("yes", f"{fault_.gradient} {fault_.cause or f'is wrong by {fault_.error:.0e}'}")


def of_torch(fault: str) -> tuple[str, str]:
    import torch

    m = SimpleNamespace(tanh=torch.tanh, exp=torch.exp, erf=torch.erf, array=lambda a: torch.tensor(a, dtype=torch.float64))
    if fault == "overwritten":
        return "cannot be expressed", "the engine adds gradients"

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*args)
            return forward(fault, m, *args)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            return backward(fault, m, dy, *ctx.saved_tensors)

    try:
        torch.autograd.gradcheck(Function.apply, [torch.tensor(a, requires_grad=True) for a in inputs(fault)])
    except Exception as error:
        return "yes", first_line(str(error))
    return "no", "passes"


def of_jax(fault: str) -> tuple[str, str]:
    import jax  # type: ignore[import-not-found]
    from jax.test_util import check_grads  # type: ignore[import-not-found]

    jax.config.update("jax_enable_x64", True)
    m = SimpleNamespace(tanh=jax.numpy.tanh, exp=jax.numpy.exp, erf=jax.scipy.special.erf, array=jax.numpy.array)
    if fault == "overwritten":
        return "cannot be expressed", "functions have no state"

    f = jax.custom_vjp(lambda *args: forward(fault, m, *args))
    f.defvjp(lambda *args: (forward(fault, m, *args), args), lambda args, dy: backward(fault, m, dy, *args))
    try:
        check_grads(f, inputs(fault), order=1, modes=["rev"])
    except Exception as error:
        return "yes", first_line(str(error))
    return "no", "passes"


TOOLS = {"minilora": ours, "torch": of_torch, "jax": of_jax}


def answers(tool: str) -> dict[str, tuple[str, str]]:
    return {fault: TOOLS[tool](fault) for fault in FAULTS}


def table(results: dict[str, Any]) -> str:
    lines = ["| fault | `ml.gradcheck` | `torch.autograd.gradcheck` | `jax.test_util.check_grads` |", "|---|---|---|---|"]
    for fault, words in FAULTS.items():
        cells = [results.get(tool, {}).get(fault, ("not run", "")) for tool in TOOLS]
        texts = [("" if seen == "yes" else f"**{seen}**: ") + text.replace("|", "/") for seen, text in cells]
        lines.append(f"| {words} | {' | '.join(texts)} |")
    return "\n".join(lines)


def into_page(name: str, text: str, page: Path = ROOT / "docs/gradcheck.md") -> None:
    """Put a table between its markers in a page."""
    before, _, rest = page.read_text().partition(f"<!-- {name} -->\n")
    page.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->{rest.partition(f'<!-- end of {name} -->')[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jax", help="a Python interpreter that has jax")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool:
        print(json.dumps(answers(args.tool)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {tool: answers(tool) for tool in ("minilora", "torch")}
    if args.jax:
        found = subprocess.run(
            [args.jax, "-m", "benchmarks.rival_checkers", "--tool", "jax"], capture_output=True, text=True, check=True, cwd=ROOT
        )
        results["jax"] = json.loads(found.stdout.splitlines()[-1])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    into_page("rival checkers", table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
