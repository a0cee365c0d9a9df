"""Shared by the scripts of this folder: flags, runs of the bundled model, labelled texts, the table of claims and measurements."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
SMALL: dict[str, Any] = {}  # what --quick changes in every recipe
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


@dataclass
class Claim:
    """A row of the table: the claim and its source, the published figure, the figure measured here, and whether they agree."""

    says: str
    claimed: str
    seen: str
    holds: bool


def flags(doc: str, **own: dict[str, Any]) -> argparse.Namespace:
    """Parse --quick, --out and the options of the script: {name: keywords of add_argument}."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run to test the script; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the picture and the figures")
    for name, keywords in own.items():
        parser.add_argument(f"--{name}", **keywords)
    args = parser.parse_args()
    if args.quick:
        SMALL.update(eval_bytes=4096, batch_size=2, window=64)
        args.out = args.out if args.out != RESULTS else Path("quick")
    return args


@contextmanager
def adapted(**fields: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(run folder, results) of the main job, the bundled model trained on Python source. `fields` override those of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        recipe = Recipe(**{"sample_bytes": 0, "backend": "numpy", "forgetting": "", **fields, **SMALL})
        yield run, finetune(recipe, run, say=lambda line: None)


def bits_after(**fields: Any) -> float:
    """Held-out bits per byte after a run as in `adapted`."""
    with adapted(**fields) as (_, results):
        return float(results["after"]["bits_per_byte"])


def write_texts(folder: Path, train: Sequence[tuple[str, Any]], valid: Sequence[tuple[str, Any]]) -> Path:
    """Write (text, label) pairs to train.jsonl and valid.jsonl in `folder`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("valid", valid)):
        lines = (json.dumps({"text": text, "label": str(label)}) + "\n" for text, label in part)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def real_texts(name: str, folder: Path, train: int, valid: int, choose: bool = False) -> Path:
    """A folder with the texts "films" (2 classes) or "questions" (6). choose: the half that is used only to choose settings."""
    from tests import assets

    texts: list[tuple[str, Any]] = assets.movie_snippets() if name == "films" else list(assets.questions())
    order = np.random.default_rng(0).permutation(len(texts))
    half = len(texts) // 2
    order = order[:half] if choose else order[half:]
    some = [texts[i] for i in order[: train + valid]]
    return write_texts(folder / name, some[:train], some[train:])


def table(claims: Sequence[dict[str, Any]]) -> str:
    """The claims of a results file as a Markdown table."""
    lines = ["| claim | published | measured here | confirmed |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {c['says']} | {c['claimed']} | {c['seen']} | {'yes' if c['holds'] else '**no**'} |" for c in claims])


def write_results(
    name: str, out: Path, claims: Sequence[Claim], figures: dict[str, Any], draw: Callable[[Any], None], size: tuple[float, float]
) -> None:
    """Print the table, write it and the figures to NAME.json, and draw NAME.png."""
    results = {"claims": [{**asdict(claim), "holds": bool(claim.holds)} for claim in claims], "figures": figures}
    print("\n" + table(results["claims"]))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture without matplotlib: pip install 'minilora[plot]'")
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / f"{name}.png", dpi=100)
    print(f"\nwritten to {out / name}.json and .png")


# -- README.md of this folder, written from the results by python -m examples.papers.shown ------------------------------------------

SCRIPTS = "methods few_sample bias_correction rank learning_rate batch_size rslora subspace forgetting quantised latency".split()
HEAD = """# The papers, reproduced at small scale

Each script trains, prints the published claims next to the measurements, and writes the figures and a picture to `results/`:

    pip install -e '.[plot]'
    python -m examples.papers.rank                    # from the root of the repository; --quick: a short test run

`methods`, `few_sample` and `bias_correction` adapt MiniLM to real texts and download both by name (`tests/assets.py`); the others use
the bundled model of 0.86 M parameters. **no** means that this small model does not show the effect; it does not refute a claim about
large models.
Measured on two cores. `python -m examples.papers.shown` writes this page from the results.
"""


def page() -> str:
    """The text of README.md."""
    parts = [HEAD]
    for name in SCRIPTS:
        file = RESULTS / f"{name}.json"
        if file.is_file():
            title = (Path(__file__).parent / f"{name}.py").read_text().split('"""')[1].split("\n\n")[0].replace("\n", " ").strip()
            claims = json.loads(file.read_text())["claims"]
            parts.append(f"## {title}\n\n`{name}.py`\n\n{table(claims)}\n\n![{name}](results/{name}.png)\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "README.md").write_text(page())
