"""The verbs of `minilora exercise`: files in the student's folder, and beside them progress.json, how far the student has come."""

import inspect
import os
import subprocess
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import Any

from minilora.exercises.examine import examine
from minilora.exercises.template import Exercise, code, exercises, introduction
from minilora.formats.atomic import read_json, write_json, write_text
from minilora.runs import Say

Progress = dict[str, dict[str, int]]  # {"solved": {exercise: whether its last check was right}, "hints": {exercise: hints shown}}


def exercise(
    action: str, name: str = "", out: str = "exercises", force: bool = False, notebook: bool = False, limit: float = 60, *, say: Say
) -> dict[str, Any]:
    """list, start, check, hint or solution. name: an exercise, its number or a file; by default the next one that is not solved.

    Raises ValueError for an exercise that does not exist, FileExistsError where `start` would overwrite a file, FileNotFoundError where
    there is none to check.
    """
    file = Path(name) if name.endswith((".py", ".ipynb")) else None
    folder = file.parent if file else Path(out)
    progress = _read(folder, say)
    if action == "list":
        for e in exercises().values():
            say(f"{'x' if progress['solved'].get(e.name) else ' '} {e.stem[:2]} {e.name:<16} {e.title}")
        say(f"{sum(progress['solved'].values())} of {len(exercises())} are solved (x).")
        return {"exercises": list(exercises()), **progress}
    e = _choose(file.stem if file else name, progress)
    result: dict[str, Any] = {"exercise": e.name}
    if action == "start":
        return result | {"file": str(_start(e, folder, force, notebook, say))}
    if action == "solution":
        sources = {f"{blank.solution.__module__}.{blank.solution.__qualname__}": inspect.getsource(blank.solution) for blank in e.write}
        say("\n".join(f"# {place}\n{source}" for place, source in sources.items()))
        return result | {"solution": sources}
    if action == "hint":
        progress["hints"][e.name] = min(progress["hints"].get(e.name, 0) + 1, 3)
        result["hints"] = e.hints[: progress["hints"][e.name]]
        for i, hint in enumerate(result["hints"], 1):
            say(f"Hint {i} of 3. {hint}" if "\n" in hint else fill(f"Hint {i} of 3. {hint}", 100))
    else:
        path = file or _file(e, folder)
        wrong = _check(e, path, limit, say)
        result |= {"ok": not wrong, "wrong": wrong}
        progress["solved"][e.name] = not wrong
        left = [other for other in exercises() if not progress["solved"].get(other)]
        onward = f"Next: minilora exercise start {left[0]}" if left else "All exercises are solved."
        say(f"{path}: {wrong or f'right. {onward}'}")
    write_json(folder / "progress.json", progress)
    return result


def check_here(name: str, names: dict[str, Any]) -> None:
    """For a notebook, `check_here("linear", globals())`: print what is wrong with the functions that were defined there."""
    progress, wrong = _read(Path(), print), examine(exercises()[name], names)
    progress["solved"][name] = not wrong
    write_json("progress.json", progress)
    print(wrong or f"{name} is right.")


def _read(folder: Path, say: Say) -> Progress:
    """The progress kept in a folder. A damaged file is set aside under another name."""
    path = folder / "progress.json"
    none: Progress = {"solved": {}, "hints": {}}
    if not path.exists():
        return none
    try:
        progress = read_json(path)
        if progress.keys() == none.keys() and all(isinstance(n, int) for part in progress.values() for n in part.values()):
            return progress
        reason = f"{path} is not a progress file."
    except (ValueError, AttributeError) as error:
        reason = f"{error}"
    aside = next(p for i in range(1, 10**6) if not (p := folder / f"progress.damaged-{i}.json").exists())
    path.rename(aside)
    say(f"{reason} It is kept as {aside}, and a new one is begun; `minilora exercise check NAME` adds what is solved.")
    return none


def _choose(name: str, progress: Progress) -> Exercise:
    """The exercise of this name, number or file name; without one, the next that is not solved, or the first."""
    known = exercises()
    name = name or next((other for other in known if not progress["solved"].get(other)), next(iter(known)))
    for e in known.values():
        if name in (e.name, e.stem, e.stem[:2], e.stem[:2].lstrip("0")):
            return e
    near = get_close_matches(name, known, cutoff=0.5) or [other for other in known if name in other]
    hint = f"did you mean {' or '.join(near)}?" if near else "`minilora exercise list` names them."
    raise ValueError(f"there is no exercise {name!r}; {hint}")


def _file(e: Exercise, folder: Path) -> Path:
    """The answer: the Python file or the notebook, whichever was changed last."""
    files = [path for end in ("py", "ipynb") if (path := folder / f"{e.stem}.{end}").is_file()]
    if not files:
        raise FileNotFoundError(f"{folder / e.stem}.py does not exist; `minilora exercise start {e.name}` writes it.")
    return max(files, key=lambda path: path.stat().st_mtime)


def _start(e: Exercise, folder: Path, force: bool, notebook: bool, say: Say) -> Path:
    path = folder / f"{e.stem}.{'ipynb' if notebook else 'py'}"
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists, and may hold your answer; --force overwrites it.")
    text, (first, *blocks) = introduction(e), code(e)
    if notebook:
        check = f'from minilora.exercises import check_here\n\ncheck_here("{e.name}", globals())'
        write_json(path, _notebook(text, first, *blocks, check))
    else:
        write_text(path, "\n\n\n".join([f'"""{text}\n"""\n\n{first}', *blocks]) + "\n")
    say(f"{path}: write {e.functions}, then run `minilora exercise check {path}`.")
    return path


def _notebook(text: str, *blocks: str) -> dict[str, Any]:
    """nbformat 4.5."""
    cells: list[dict[str, Any]] = [{"id": "text", "cell_type": "markdown", "metadata": {}, "source": text}]
    for i, block in enumerate(blocks):
        cells.append({"id": f"code-{i}", "cell_type": "code", "metadata": {}, "source": block, "execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _check(e: Exercise, path: Path, limit: float, say: Say) -> str:
    """`examine` in a process of its own, which may take `limit` seconds. What the file prints is passed on, up to 2,000 characters."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; `minilora exercise start {e.name}` writes one.")
    with tempfile.TemporaryDirectory() as temporary:
        answer, result, printed = path.absolute(), Path(temporary, "result"), Path(temporary, "printed")
        if path.suffix == ".ipynb":
            answer = Path(temporary, "answer.py")
            try:
                sources = ["".join(cell["source"]) for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
            except (TypeError, KeyError):
                raise ValueError(f"{path} is not a notebook of nbformat 4.") from None
            answer.write_text("\n\n".join(source for source in sources if "check_here(" not in source), encoding="utf-8")
        run = [sys.executable, "-c", "from minilora.exercises.examine import main; main()", e.name, str(answer), str(result)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with printed.open("w") as output:
            try:
                status = subprocess.run(run, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                return f"the check did not end within {limit:g} seconds; is there a loop without an end? --limit gives it more time."
        with printed.open(errors="replace") as output:
            if text := output.read(2000).rstrip():
                say(text)
        return result.read_text(encoding="utf-8") if result.exists() else f"the file ended Python with status {status} during the check."
