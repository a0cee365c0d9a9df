"""What the package may cost to read, and which way its imports may run. `python tests/budgets.py` prints all of it.

A module's imports are read from its source, those inside functions too. Blocks under TYPE_CHECKING load nothing and do not count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minilora"

TOTAL = 21_100  # lines of Python in the package; CONTRIBUTING.md says what they are, and that they are to become 16,500
STUDENT = 2_250  # lines of the student's part, with everything that it imports except kernels/
FILE = 350
# imports run to the left
ORDER = "backend functional kernels layers lora models adapters training runs exercises explain report cli".split()

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """{dotted name below minilora: file} of the package, without the facade minilora/__init__.py and __main__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def lines(path: Path) -> int:
    """Lines of a file, all of them."""
    return len(path.read_text().splitlines())


def imports() -> Graph:
    """{module: modules of the package that it imports}."""
    files = modules()
    return {name: set(_imported(ast.parse(path.read_text()), files)) - {name} for name, path in files.items()}


def _imported(node: ast.AST, files: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (name for alias in node.names if (name := alias.name.removeprefix("minilora.")) in files)
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minilora":
        base = node.module.removeprefix("minilora").removeprefix(".")
        for alias in node.names:  # `from package import module` and `from module import name`
            inner = f"{base}.{alias.name}" if base else alias.name
            if inner in files:
                yield inner
            elif base in files:
                yield base
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, files)


def package_of(module: str) -> str:
    return module.split(".")[0]


def packages(graph: Graph) -> Graph:
    """The same graph between packages."""
    result: Graph = {}
    for name, targets in graph.items():
        result.setdefault(package_of(name), set()).update({package_of(t) for t in targets} - {package_of(name)})
    return result


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def upward(graph: Graph) -> list[str]:
    """Imports of a package of ORDER from one that stands to its left."""
    rank = {name: i for i, name in enumerate(ORDER)}
    wrong = []
    for name, targets in sorted(graph.items()):
        for target in sorted(targets):
            a, b = package_of(name), package_of(target)
            if a in rank and b in rank and rank[b] > rank[a]:
                wrong.append(f"{name} imports {target}")
    return wrong


def student(graph: Graph) -> dict[str, int]:
    """{module: lines} of backend, functional, layers and lora (without variants/ and init/), and of all that these import.

    The walk stops at kernels/, which holds faster implementations of what functional/ defines, and chooses between them.
    """
    files = modules()
    own = ("backend", "functional", "layers", "lora")
    todo = [m for m in files if package_of(m) in own and not m.startswith(("lora.variants", "lora.init"))]
    part: dict[str, int] = {}
    while todo:
        module = todo.pop()
        if module not in part and package_of(module) != "kernels":
            part[module] = lines(files[module])
            todo += graph[module]
    return part


def main() -> int:
    graph, files = imports(), modules()
    sizes: dict[str, int] = {}
    for name, path in files.items():
        sizes[package_of(name)] = sizes.get(package_of(name), 0) + lines(path)
    total = sum(sizes.values()) + sum(lines(PACKAGE / f) for f in ("__init__.py", "__main__.py"))
    print("  ".join(f"{name} {size:,}" for name, size in sorted(sizes.items(), key=lambda item: -item[1])))
    part = student(graph)
    beside = sorted(m for m in part if package_of(m) not in ("backend", "functional", "layers", "lora"))
    print(f"package total    {total:,} lines (budget {TOTAL:,})")
    print(f"student's part   {sum(part.values()):,} lines (budget {STUDENT:,}); with {', '.join(beside) or 'nothing else'}")
    long = [f"{name} {lines(path)}" for name, path in files.items() if lines(path) > FILE]
    longest = max(files, key=lambda name: lines(files[name]))
    print(f"longest file     {longest}, {lines(files[longest])} lines (budget {FILE}){'; too long: ' + ', '.join(long) if long else ''}")
    around, up = circles(graph) + circles(packages(graph)), upward(graph)
    print(f"circles          {'; '.join(' - '.join(c) for c in around) or 'none'}")
    print(f"upward imports   {'; '.join(up) or 'none'}")
    return int(total > TOTAL or sum(part.values()) > STUDENT or bool(long or around or up))


if __name__ == "__main__":
    sys.exit(main())
