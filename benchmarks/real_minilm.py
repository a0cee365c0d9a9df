"""MiniLM on 200 labelled film snippets: LoRA with the command line against a ridge classifier on frozen sentence embeddings.

    python -m benchmarks.real_minilm                 five seeds, then peak memory against PEFT
    python -m benchmarks.real_minilm --select        the search behind LEARN, on snippets that are used for nothing else

Each seed draws 200 snippets for training and 1,000 others for evaluation. LEARN was chosen on the first 4,000 snippets of one
shuffle; the reported figures use the other 6,603. Needs the extra `test` (scikit-learn's ridge) and, for the memory comparison,
`oracle`. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.real_models import compare_peaks, minilora
from tests import assets

TRAIN, HELD_OUT, FOR_CHOOSING = 200, 1000, 4000
LEARN: dict[str, Any] = {"target-modules": "query,value", "lora-alpha": 16, "epochs": 6, "lr": 4e-3}
GRID = {"target-modules": ["query,value", "all-linear"], "lora-alpha": [16], "epochs": [3, 6], "lr": [1e-3, 2e-3, 4e-3]}

Snippets = list[tuple[str, int]]


def draw(snippets: Snippets, seed: int) -> tuple[Snippets, Snippets]:
    """(training snippets, evaluation snippets) of one seed."""
    order = np.random.default_rng(seed).permutation(len(snippets))
    some = [snippets[i] for i in order[: TRAIN + HELD_OUT]]
    return some[:TRAIN], some[TRAIN:]


def lora(model: Path, parts: tuple[Snippets, Snippets], seed: int, learn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report of `minilora finetune` in a new run folder. The held-out part chooses nothing."""
    data = folder / "data"
    data.mkdir(parents=True)
    for name, part in zip(("train", "valid"), parts, strict=True):
        records = ({"text": text, "label": ["negative", "positive"][label]} for text, label in part)
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [word for name, value in learn.items() for word in (f"--{name}", value)]
    where = ["--seed", seed, "--backend", "numpy", "--out", folder / "run"]
    return minilora("finetune", "--model", model, "--data", data, "--task", "classify", *flags, *where)


def frozen(model: Path) -> Callable[[tuple[Snippets, Snippets]], float]:
    """A function that returns the held-out accuracy of a ridge on mean-pooled embeddings; leave-one-out chooses the penalty."""
    from sklearn.linear_model import RidgeClassifierCV

    import minilora as ml
    from minilora.formats.tokenizer import load_tokenizer

    encoder, tokenizer = ml.load_model(model, "numpy"), load_tokenizer(model, 30522)

    def embedded(part: Snippets) -> np.ndarray:
        means = []
        for first in range(0, len(part), 32):
            ids = [tokenizer.encode(text) for text, _ in part[first : first + 32]]
            means.append(encoder.embed(np.concatenate(ids), np.cumsum([0, *map(len, ids)])))
        return np.concatenate(means)

    def accuracy(parts: tuple[Snippets, Snippets]) -> float:
        (X, y), (X_new, y_new) = ((embedded(part), [label for _, label in part]) for part in parts)
        return float(RidgeClassifierCV(np.logspace(-3, 3, 13)).fit(X, y).score(X_new, y_new))

    return accuracy


def memory(model: Path, parts: tuple[Snippets, Snippets], folder: Path) -> dict[str, Any]:
    """Peak memory of one epoch with LEARN. Both sides share one random head, which MiniLM lacks."""
    import minilora as ml
    from minilora.data.datasets import batches_of
    from minilora.data.examples import Example
    from minilora.formats.tokenizer import load_tokenizer

    ml.save_model(ml.load_model(model, "numpy"), folder / "model")
    tokenizer = load_tokenizer(model, 30522)
    examples = [Example(tokenizer.encode(text), np.array([label]), per_sequence=True) for text, label in parts[0]]
    targets = {"all-linear": ["query", "key", "value", "dense"]}.get(LEARN["target-modules"]) or LEARN["target-modules"].split(",")
    fields = {"r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": "SEQ_CLS"}
    return compare_peaks(folder / "model", list(batches_of(examples, 8, np.random.default_rng(0))), fields, folder)


def select(model: Path, snippets: Snippets, seeds: int, folder: Path) -> None:
    for n, values in enumerate(tqdm(list(product(*GRID.values())), desc="settings")):
        learn = dict(zip(GRID, values, strict=True))
        runs = [lora(model, draw(snippets, seed), seed, learn, folder / f"{n}-{seed}") for seed in range(seeds)]
        tqdm.write(f"{mean(run['after']['accuracy'] for run in runs):.3f}  {learn}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--select", action="store_true", help="search the grid on the snippets for choosing; report nothing else")
    parser.add_argument("--no-peft", action="store_true", help="leave out the memory comparison")
    args = parser.parse_args()
    model, snippets = assets.minilm(), assets.movie_snippets()
    snippets = [snippets[i] for i in np.random.default_rng(0).permutation(len(snippets))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.select:
            return select(model, snippets[:FOR_CHOOSING], args.seeds, folder)
        ridge, runs, heads = frozen(model), [], []
        for seed in tqdm(range(args.seeds), desc="seeds"):
            parts = draw(snippets[FOR_CHOOSING:], seed)
            heads.append(ridge(parts))
            runs.append(lora(model, parts, seed, LEARN, folder / str(seed)))
        peaks = None if args.no_peft else memory(model, parts, folder)

    tuned, size = [run["after"]["accuracy"] for run in runs], max(run["saved_bytes"] for run in runs)
    print(f"\naccuracy on {HELD_OUT:,} held-out snippets after training on {TRAIN}\n\n| seed | frozen, ridge head | LoRA |\n|---|---|---|")
    for seed, (head, lora_) in enumerate(zip(heads, tuned, strict=True)):
        print(f"| {seed} | {head:.3f} | {lora_:.3f} |")
    print(f"| mean ± s.d. | {mean(heads):.3f} ± {stdev(heads):.3f} | {mean(tuned):.3f} ± {stdev(tuned):.3f} |\n")
    print(f"adapter and head: {size / 1e6:.2f} MB; a run: {mean(run['seconds'] for run in runs):.0f} s")
    if peaks:
        print(f"peak memory of training: {peaks['minilora'] / 1e6:.0f} MB, PEFT {peaks['peft'] / 1e6:.0f} MB: {peaks['ratio']:.2f}")
    seconds = sum(run["seconds"] for run in runs)
    result = {"learn": LEARN, "ridge": heads, "lora": tuned, "adapter_bytes": size, "seconds": seconds, "peak_memory": peaks}
    print(json.dumps({"benchmark": "real_minilm", "train": TRAIN, "held_out": HELD_OUT, **result}))


if __name__ == "__main__":
    main()
