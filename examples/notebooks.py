"""The course as notebooks: made from the scripts by jupytext, executed, and saved with their outputs.

    python examples/notebooks.py                # all; needs pip install -e '.[notebooks]'; a minute on two cores
    python examples/notebooks.py 02 03          # these
    python examples/notebooks.py --check        # fails if a notebook is not what its script would give; executes nothing

A script is a notebook in jupytext's percent format: `# %% title` begins a cell. Its docstring becomes the first text. The cell tagged
"script" reads the command line; in the notebook it is a line that sets the same names.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

BRANCH = "main"
HERE = Path(__file__).resolve().parent
NOTEBOOKS = HERE / "notebooks"
SECONDS = 120  # a cell may take
BADGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
CLONE = '# On your own machine: pip install -e ".[plot]" in a clone, and scikit-learn for the fifth notebook.'
COLAB = """\
# In Colab, run this first.
import sys

if "google.colab" in sys.modules:
    %pip install -q "minilora[plot] @ git+{address}@{branch}"\
"""


def address() -> str:
    """Where the repository is published: the GitHub address among `project_urls` of setup.cfg, "" as long as there is none."""
    setup = ConfigParser()
    setup.read(HERE.parent / "setup.cfg", encoding="utf-8")
    found = re.search(r"https://github\.com/[\w.-]+/[\w.-]+", setup.get("metadata", "project_urls", fallback=""))
    return found[0].removesuffix("/") if found else ""


def scripts() -> list[Path]:
    """The scripts of the course that take seconds."""
    return sorted(path for path in HERE.glob("0*.py") if '# %% tags=["script"]' in path.read_text(encoding="utf-8"))


def notebook(script: Path) -> NotebookNode:
    """The notebook of a script, not executed."""
    result = new_notebook(cells=list(_cells(script)))
    for i, cell in enumerate(result.cells):
        cell.id = f"cell-{i}"
    result.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return result


def _cells(script: Path) -> Iterator[NotebookNode]:
    first, *rest = jupytext.read(script).cells
    docstring, imports = _split(first.source)
    title, _, text = docstring.partition("\n")
    number, url = script.stem[:2].lstrip("0"), address()
    colab = f"{url.replace('github.com', 'colab.research.google.com/github')}/blob/{BRANCH}/examples/notebooks/{script.stem}.ipynb"
    badge = f"\n{BADGE}({colab})\n" if url else ""
    yield new_markdown_cell(f"# {number}. {title.rstrip('.')}\n{badge}{text.rstrip()}")
    install = [CLONE, *([COLAB.format(address=url, branch=BRANCH)] if url else [])]
    yield new_code_cell("\n".join(install), metadata={"tags": ["install"]})
    yield new_code_cell(re.sub(r"^import argparse\n", "", imports))
    for cell in rest:
        if cell.cell_type == "markdown":
            yield new_markdown_cell(cell.source)
            continue
        if "script" in cell.metadata.get("tags", []):
            yield new_code_cell(_settings(cell.source))
            continue
        if title := cell.metadata.get("title"):
            yield new_markdown_cell(f"## {title[0].upper()}{title[1:]}")
        yield new_code_cell(cell.source.strip("\n"))
        if ".savefig(" in cell.source:
            yield new_code_cell(f'from IPython.display import Image\n\nImage(filename=out / "{script.stem}.png")')


def _split(source: str) -> tuple[str, str]:
    """The docstring at the top of a script, and what follows it."""
    statement = ast.parse(source).body[0]
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    return str(statement.value.value), "\n".join(source.splitlines()[statement.end_lineno :]).strip()


def _settings(source: str) -> str:
    """The last line of the cell that reads the command line, with the defaults in place of the arguments."""
    return source.splitlines()[-1].replace("args.backend", '"auto"').replace("args.out", 'Path(".")')


def execute(made: NotebookNode) -> NotebookNode:
    """The notebook with its outputs. Raises CellExecutionError or CellTimeoutError."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times
    return made


def outdated(script: Path) -> str:
    """What is wrong with the saved notebook of a script, or an empty string: its source differs, or a cell has not been run."""
    path = NOTEBOOKS / f"{script.stem}.ipynb"
    if not path.exists():
        return f"{path.name} is missing"
    saved, expected = nbformat.read(path, as_version=4), notebook(script)
    if [(cell.cell_type, cell.source) for cell in saved.cells] != [(cell.cell_type, cell.source) for cell in expected.cells]:
        return f"{path.name} is not what {script.name} gives"
    if any(cell.cell_type == "code" and cell.execution_count is None for cell in saved.cells):
        return f"{path.name} has cells that were not run"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="NN", help="numbers of scripts; default: all")
    parser.add_argument("--check", action="store_true", help="fail if a notebook is not up to date")
    args = parser.parse_args()
    chosen = [script for script in scripts() if not args.only or script.stem[:2] in args.only]
    if args.check:
        if wrong := [problem for script in chosen if (problem := outdated(script))]:
            sys.exit("\n".join([*wrong, "run: python examples/notebooks.py"]))
        return
    NOTEBOOKS.mkdir(exist_ok=True)
    for script in chosen:
        path = NOTEBOOKS / f"{script.stem}.ipynb"
        nbformat.write(execute(notebook(script)), path)
        print(f"{path.relative_to(HERE.parent)}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
