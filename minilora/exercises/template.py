"""An exercise, and the code that a student gets: minilora's own source, without the bodies to write."""

import ast
import inspect
import sys
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from textwrap import dedent
from typing import Any, NamedTuple

from minilora.formats import tomllib


class Blank(NamedTuple):
    """A function of a module, or a method of a class, to write. The first `keep` statements of its body are given."""

    owner: Any
    name: str
    returns: str  # "dx (T, m), dW (m, n)"
    keep: int

    @property
    def solution(self) -> Any:
        """Minilora's own function: the solution."""
        return getattr(self.owner, self.name)


class Exercise(NamedTuple):
    """checks: subjects of checking/catalogue.py, on which the written functions are checked."""

    name: str
    stem: str  # "01_linear", of its files
    title: str
    text: str
    write: list[Blank]
    hints: list[str]
    checks: list[str]

    @property
    def functions(self) -> str:
        return ", ".join(blank.solution.__qualname__ for blank in self.write)


@lru_cache
def exercises() -> dict[str, Exercise]:
    """{name: exercise} of the files NN_name.toml, in order. Where one has two hints, the docstring of the solution is the third."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        data, blanks = tomllib.loads(path.read_text(encoding="utf-8")), []
        for blank in data["write"]:
            module, _, function = blank["function"].partition(":")
            owner, _, name = function.rpartition(".")
            blanks.append(Blank(resolve_name(f"minilora.{module}:{owner}"), name, blank["returns"], blank.get("keep", 0)))
        hints = [*data["hints"], inspect.getdoc(blanks[0].solution) or ""][:3]
        e = Exercise(path.stem.partition("_")[2], path.stem, data["title"], data["text"].strip("\n"), blanks, hints, data["checks"])
        found[e.name] = e
    return found


def introduction(e: Exercise) -> str:
    """What the student reads first."""
    need = any("need" in inspect.signature(blank.solution).parameters for blank in e.write)
    return f"""{e.title[0].upper() + e.title[1:]} (exercise {e.stem[:2]}, {e.name})

{e.text}

Write {e.functions}.{" You may compute all gradients, whatever `need` names." if need else ""}
All other code is minilora's own, and the check uses the original.

    minilora exercise check {e.name}
    minilora exercise hint {e.name}            three hints, one more at every call
    minilora exercise solution {e.name}"""


def code(e: Exercise) -> list[str]:
    """The blocks of the file: imports, and each function or class with what is given and what is to be written."""
    imports, blocks = ["from __future__ import annotations"], list[str]()
    for blank in e.write:
        partners = dict.fromkeys(("__init__", blank.name.replace("_backward", ""), blank.name.replace("backward", "forward")))
        own = [vars(blank.owner)[name] for name in partners if name != blank.name and inspect.isfunction(vars(blank.owner).get(name))]
        given = [inspect.getsource(function).rstrip() for function in own]
        head = []
        if inspect.isclass(blank.owner):
            head = ['"""'.join(inspect.getsource(blank.owner).split('"""')[:2]) + '"""']
        blocks += ["\n\n".join([*head, *given, empty(blank)])] if head else [*given, empty(blank)]
        tree = ast.parse("\n".join([*head, *given, inspect.getsource(blank.solution)]))
        imports += [line for line in _imports(tree, sys.modules[blank.solution.__module__]) if line not in imports]
    return ["\n".join(imports), *blocks]


def empty(blank: Blank) -> str:
    """The function without its body."""
    source = inspect.getsource(blank.solution)
    node: Any = ast.parse(dedent(source)).body[0]
    lines, body = source.splitlines(), node.body[bool(ast.get_docstring(node)) :]
    kept = lines[body[0].lineno - 1 : body[blank.keep - 1].end_lineno] if blank.keep else []
    todo = f'raise NotImplementedError("{blank.solution.__qualname__} is empty: it must return {blank.returns}")'
    indent = " " * (node.body[0].col_offset + source.index("def"))
    return "\n".join([*lines[: node.body[0].lineno - 1], f'{indent}"""Return {blank.returns}."""', *kept, indent + todo])


def _imports(tree: ast.AST, module: Any) -> list[str]:
    """Lines that import what the code uses, from the module that it is taken from."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & vars(module).keys() - defined)
    modules = {name: vars(module)[name].__name__ for name in used if inspect.ismodule(vars(module)[name])}
    rest = ", ".join(name for name in used if name not in modules)
    lines = [f"import {full}" if full == name else f"import {full} as {name}" for name, full in modules.items()]
    return [*lines, f"from {module.__name__} import {rest}"] if rest else lines
