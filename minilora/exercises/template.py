"""An exercise, and the code that a student gets: minilora's own source, without the bodies to write."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from textwrap import dedent
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Blank:
    """A function or method to write, and what it returns. The first `keep` statements of its body are given."""

    function: str  # below minilora: "functional.linear:linear_backward"
    returns: str  # "dx (T, m), dW (m, n)"
    keep: int = 0

    @property
    def owner(self) -> Any:
        """The class or module that has it."""
        module, _, name = self.function.partition(":")
        owner = importlib.import_module(f"minilora.{module}")
        return attrgetter(name.rpartition(".")[0])(owner) if "." in name else owner

    @property
    def name(self) -> str:
        return self.function.replace(":", ".").rpartition(".")[2]

    @property
    def house(self) -> Any:
        """Minilora's own function: the solution."""
        return getattr(self.owner, self.name)

    def where(self) -> str:
        """File and line of the solution."""
        return f"{self.house.__module__.replace('.', '/')}.py, line {inspect.getsourcelines(self.house)[1]}"


@dataclass(frozen=True)
class Exercise:
    """checks: subjects of checking/catalogue.py, on which the written functions are checked."""

    stem: str  # "01_linear"
    title: str
    text: str
    write: list[Blank]
    hints: list[str]
    checks: list[str]

    @property
    def name(self) -> str:
        return self.stem.partition("_")[2]

    def three_hints(self) -> list[str]:
        """The docstring of the solution is the last one, where the file has two."""
        return [*self.hints, inspect.getdoc(self.write[0].house) or ""][:3]


@lru_cache
def exercises() -> dict[str, Exercise]:
    """{name: exercise} of the files NN_name.toml, in order."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        e = Exercise(path.stem, **{**data, "write": [Blank(**blank) for blank in data["write"]]})
        found[e.name] = e
    return found


def introduction(e: Exercise) -> str:
    """What the student reads first."""
    need = any("need" in inspect.signature(blank.house).parameters for blank in e.write)
    return f"""Exercise {e.stem[:2]}, {e.name}: {e.title}

{e.text.strip()}

Write {", ".join(blank.house.__qualname__ for blank in e.write)}.{" You may compute all gradients, whatever `need` names." if need else ""}
All other code is minilora's own, and the check uses the original.

    minilora exercise check {e.name}
    minilora exercise hint {e.name}            three hints, one more at every call
    minilora exercise solution {e.name}"""


def code(e: Exercise) -> list[str]:
    """The blocks of the file: imports, and each function or class with what is given and what is to be written."""
    blocks: list[str] = []
    imports = ["from __future__ import annotations"]
    for blank in e.write:
        owner, name = blank.owner, blank.name
        partners = dict.fromkeys(("__init__", name.replace("_backward", ""), name.replace("backward", "forward")))
        given = [inspect.getsource(vars(owner)[p]).rstrip() for p in partners if p != name and inspect.isfunction(vars(owner).get(p))]
        head = ['"""'.join(inspect.getsource(owner).split('"""')[:2]) + '"""'] if inspect.isclass(owner) else []
        blocks += ["\n\n".join([*head, *given, _empty(blank)])] if head else [*given, _empty(blank)]
        tree = ast.parse("\n".join([*head, *given, inspect.getsource(blank.house)]))
        imports += [line for line in _imports(tree, sys.modules[blank.house.__module__]) if line not in imports]
    return ["\n".join(imports), *blocks]


def _imports(tree: ast.AST, module: Any) -> list[str]:
    """Import from the module what it defines or has imported and the code uses."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & vars(module).keys() - defined)
    modules = [name for name in used if inspect.ismodule(vars(module)[name])]
    lines = [f"import {vars(module)[name].__name__} as {name}".replace("math as math", "math") for name in modules]
    rest = [name for name in used if name not in modules]
    return lines + ([f"from {module.__name__} import {', '.join(rest)}"] if rest else [])


def _empty(blank: Blank) -> str:
    """The function without its body."""
    source = inspect.getsource(blank.house)
    node: Any = ast.parse(dedent(source)).body[0]
    lines, first = source.splitlines(), 1 if ast.get_docstring(node) else 0
    body, indent = node.body[first:], " " * (node.body[0].col_offset + source.index("def"))
    kept = lines[body[0].lineno - 1 : body[blank.keep - 1].end_lineno] if blank.keep else []
    empty = f'raise NotImplementedError("{blank.house.__qualname__} is empty: it must return {blank.returns}")'
    return "\n".join([*lines[: node.body[0].lineno - 1], f'{indent}"""Return {blank.returns}."""', *kept, indent + empty])
