"""Pages that are made when the site is built, and what the marks in a page stand for.

    <!-- code NAME -->     the source of the operation NAME and of its backward pass, without their docstrings (dora.NAME: of a variant)
    <!-- facts NAME -->    a table: the implementations of NAME, and when each runs
    <!-- exercise NAME --> which exercise asks for this, if the code follows in another way
    <!-- explained -->     links to the pages of `minilora explain`
    <!-- operations -->    a table of all derivations

A link to a file of the repository leads to its listing on the site.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import posixpath
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the package itself
import explained  # noqa: E402
from course import cells  # noqa: E402

from minilora import functional as F  # noqa: E402
from minilora import kernels  # noqa: E402

LISTED = ("minilora/**/*.py", "minilora/**/*.cu*", "examples/*.py", "examples/papers/*.py", "benchmarks/*.py", "tests/*.py")
API = "backend functional kernels layers lora adapters models quantization formats data optim training runs checking".split()
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
OPTIONAL = {
    "exercises.md": "Exercises",
    "gradcheck.md": "Checking gradients",
    "explain.md": "minilora explain",
    "report.md": "minilora report",
}
EXERCISES = {  # derivation: the exercise in which a reader writes it, where it has another name
    "lora_linear": "lora",
    "linear_cross_entropy": "online_softmax",
    "dora.dora_linear": "dora",
    "dora.column_norms": "dora_norms",
    "vera.vera_linear": "vera",
    "embedding.lora_embedding": "lora_embedding",
}
DATA = sorted([*ROOT.glob("benchmarks/results/*.json"), *ROOT.glob("examples/**/*.png")])
MARK = re.compile(r"<!-- (code|facts|exercise|operations|explained)(?: ([\w.]+))? -->")
LINK = re.compile(r"(?<=\]\()(?!https?:|data:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
made_from: dict[str, str] = {}  # page: the file of the repository that it shows, if that lies elsewhere


def on_config(config: Any) -> Any:
    """Let the blocks that run import the package and worked.py; put the pages that there are into the navigation."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    known = str(config.nav)
    guides[:0] = [{title: page} for page, title in OPTIONAL.items() if page not in known and (ROOT / "docs" / page).exists()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for src_uri, source, content in _pages():
        if source:
            made_from[src_uri] = source
        files.append(File.generated(config, src_uri, content=content))
    for name, content in explained.pages():
        files.append(File.generated(config, f"explained/{name}.html", content=content))
    for path in [*DATA, *NOTEBOOKS]:
        files.append(File.generated(config, f"source/{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the marks, and lead links out of docs/ to the listings."""
    makers: dict[str, Callable[..., str]] = {
        "code": _code,
        "facts": _facts,
        "exercise": _exercise,
        "operations": _operations,
        "explained": explained.links,
    }
    src_uri = page.file.src_uri
    if src_uri.startswith("source/"):
        return markdown
    here, origin = posixpath.dirname(src_uri), posixpath.dirname(made_from.get(src_uri, f"docs/{src_uri}"))
    markdown = MARK.sub(lambda mark: makers[mark[1]](*filter(None, [mark[2]])), markdown)
    return LINK.sub(lambda link: _link(link[1], origin, here) + (link[2] or ""), markdown)


def _pages() -> Iterator[tuple[str, str, str]]:
    """(page, the file that it shows, its Markdown)."""
    listed = [path for pattern in LISTED for path in sorted(ROOT.glob(pattern))]
    hidden = "---\nhide: [navigation, toc]\nsearch: {exclude: true}\n---\n"
    for path in listed:
        name = path.relative_to(ROOT).as_posix()
        language = "python" if path.suffix == ".py" else "cuda"
        text = path.read_text(encoding="utf-8").rstrip()
        yield f"source/{name}.md", name, f'{hidden}# {name}\n\n````{language} linenums="1"\n{text}\n````\n'
    for folder in sorted({path.parent for path in [*listed, *DATA]}):
        name = folder.relative_to(ROOT).as_posix()
        files = [f"- [{path.name}]({path.name}.md)" for path in listed if path.parent == folder]
        files += [f"- [{path.name}]({path.name})" for path in DATA if path.parent == folder]
        yield f"source/{name}/index.md", f"{name}/", f"{hidden}# {name}\n\n" + "\n".join(files) + "\n"
    for name in ("CONTRIBUTING", "CHANGELOG"):
        yield f"{name.lower()}.md", f"{name}.md", (ROOT / f"{name}.md").read_text(encoding="utf-8")
    for page, name in (("course/index.md", "examples/README.md"), ("papers.md", "examples/papers/README.md")):
        yield page, name, (ROOT / name).read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        yield f"course/{path.stem}.md", f"examples/notebooks/{path.name}", cells(path)
    yield "api/index.md", "minilora/__init__.py", _public()
    for package in API:
        yield f"api/{package}.md", "", _reference(package)


def _link(target: str, origin: str, here: str) -> str:
    """The link as the site has it: `target` is relative to `origin`, a folder of the repository, and the page is in `here`."""
    path = posixpath.normpath(posixpath.join(origin, target)).lstrip("/")
    pages = {source: page for page, source in made_from.items() if not source.endswith(".ipynb")}
    pages |= {f"explained/{name}.html": f"explained/{name}.html" for name in explained.NAMES}
    pages |= {"README.md": "index.md", "examples": "course/index.md"}
    if origin != "examples/notebooks":  # whose pages link to the scripts themselves
        pages |= {f"examples/{path.stem}.py": f"course/{path.stem}.md" for path in NOTEBOOKS}
    page = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
    if not page and (ROOT / path).is_dir():
        page = pages.get(f"{path}/", "")
    if not page and (ROOT / path).exists():
        page = f"source/{path}"
    return posixpath.relpath(page, here or ".") if page else target  # MkDocs names what leads nowhere


# -- what the marks stand for -------------------------------------------------------------------------------------------------


def _code(name: str) -> str:
    """The two functions as they are in the source, and the exercise that asks for the second."""
    before = _exercise(name)
    variant, _, name = name.rpartition(".")
    module = importlib.import_module(f"minilora.lora.variants.{variant}") if variant else F
    functions = [f for f in (getattr(module, name), getattr(module, f"{name}_backward", None)) if f]
    path = _file(functions[0])
    text = "\n\n\n".join(map(_without_docstring, functions))
    return f'{before}```python title="{path}"\n{text}\n```\n\nWith its docstrings: [{path}](/{path}).{_explained(name)}'


def _explained(name: str) -> str:
    """A link to the page of `minilora explain`, if there is one."""
    return f" With real numbers: [`minilora explain {name}`](/explained/{name}.html)." if name in explained.OPERATIONS else ""


def _exercise(name: str) -> str:
    """An invitation to write the backward pass before reading it, if there is an exercise."""
    exercise = EXERCISES.get(name, name)
    if not list((ROOT / "minilora" / "exercises").glob(f"*_{exercise}.toml")):
        return ""
    commands = f"`minilora exercise start {exercise}`, then `minilora exercise check`"
    return f'!!! tip "Before you read on"\n    Write the backward pass yourself: {commands}.\n\n'


def _without_docstring(function: Any) -> str:
    lines = textwrap.dedent(inspect.getsource(function)).rstrip().splitlines()
    body = ast.parse("\n".join(lines)).body[0]
    assert isinstance(body, ast.FunctionDef)
    first = body.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines)


def _facts(name: str) -> str:
    """The row of the table of kernels."""
    rows = ["| implementation | runs | gain |", "|---|---|---|"]
    for kernel in kernels.TABLE[name].kernels:
        function = kernel.backward if kernel.where == "reference" and kernel.backward else kernel.forward
        path = _file(function)
        where = {"reference": "reference", "numpy": "NumPy kernel", "cuda": "CUDA kernel"}[kernel.where]
        rows.append(f"| {where}: [{path}](/{path}) | {_when(kernel)} | {kernel.gain} |")
    return "\n".join(rows)


def _when(kernel: Any) -> str:
    if kernel.where == "reference":
        return "wherever no kernel does"
    return f"on {'a GPU' if kernel.where == 'cuda' else 'the CPU'}{f', if {kernel.when}' if kernel.when else ''}"


def _operations() -> str:
    """Every derivation with its first formula, in the order of the navigation."""
    rows = ["| derivation | equation |", "|---|---|"]
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in re.findall(r"- derivations/(?!index)(\w+)\.md", navigation):
        title, equation = _head(ROOT / "docs" / "derivations" / f"{name}.md")
        rows.append(f"| [{title}](/docs/derivations/{name}.md) | {equation} |")
    return "\n".join(rows)


def _head(path: Path) -> tuple[str, str]:
    """The title of a derivation, and its first formula."""
    text = path.read_text(encoding="utf-8")
    title, formula = re.search(r"^# (.*)$", text, re.MULTILINE), re.search(r"\$\$(.*?)\$\$", text, re.DOTALL)
    assert title, f"{path} has no title"
    return title[1], f"${' '.join(formula[1].split())}$" if formula else ""


def _file(function: Any) -> str:
    """Where a function is, as a path in the repository."""
    while isinstance(function, partial):
        function = function.func
    module = function.__module__
    if not module.startswith("minilora"):
        module = "minilora.kernels"  # Python's own operator.add
    path = module.replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").exists() else f"{path}/__init__.py"


# -- the API ------------------------------------------------------------------------------------------------------------------


def _public() -> str:
    """What `import minilora as ml` offers: each name with the first line of its docstring."""
    import minilora

    lines = ["# API", "", "`import minilora as ml` offers these names; the pages below list every module.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for name in sorted(n for n in dir(minilora) if not n.startswith("_")):
        thing = getattr(minilora, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            first = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| [`ml.{name}`][{thing.__module__}.{thing.__qualname__}] | `{first}` |")
    lines += ["", "## Packages", ""]
    for package in API:
        about = (importlib.import_module(f"minilora.{package}").__doc__ or "").splitlines()[0]
        lines.append(f"- [`minilora.{package}`]({package}.md): {about}")
    return "\n".join(lines)


def _reference(package: str) -> str:
    """A page with the docstrings of all modules of a package."""
    folder = ROOT / "minilora" / package
    modules = sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules if path.stem != "__init__"]
    return f"# minilora.{package}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"
