"""SmolLM2 (135 M parameters, a GGUF file) fine-tuned on a text with the command line: loss on that text and on other text.

    python -m benchmarks.real_smollm2            then peak memory against PEFT

The training text is Python's help (pydoc's topics, which every Python has); its last tenth is held out. Other text: film snippets, and
source of the standard library. The memory comparison needs the extra `oracle`. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.real_models import compare_peaks, minilora
from minilora.data.batches import random_windows
from minilora.data.text import split_text, stdlib_source
from tests import assets

WINDOW, BATCH, STEPS = 256, 4, 60
OTHER_BYTES = 24_000


def texts() -> tuple[str, dict[str, str]]:
    """(the training text, other texts by name)."""
    snippets = "\n".join(text for text, _ in assets.movie_snippets())
    source = stdlib_source(held_out=True).tobytes().decode("utf-8", errors="replace")
    return "\n\n".join(topics[name] for name in sorted(topics)), {
        "film snippets": snippets[:OTHER_BYTES],
        "Python source": source[:OTHER_BYTES],
    }


def memory(model: Path, text: Path, folder: Path, steps: int = 3) -> dict[str, Any]:
    import minilora as ml
    from minilora.data.text import read_text
    from minilora.runs.run_file import tokenizer_of
    from minilora.runs.tasks import tokens_of

    ml.save_model(ml.load_model(model, "numpy"), folder / "model")  # for transformers
    tokens = tokens_of(split_text(read_text(text))[0], tokenizer_of(model))
    windows = random_windows(tokens, WINDOW, BATCH, np.random.default_rng(0))
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    fields = {"r": 8, "lora_alpha": 16, "target_modules": names, "task_type": "CAUSAL_LM"}
    return compare_peaks(model, [next(windows) for _ in range(steps)], fields, folder, folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-peft", action="store_true", help="leave out the memory comparison")
    args = parser.parse_args()
    model = assets.smollm2()
    topics_text, others = texts()
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=2 + 2 * len(others), desc="SmolLM2") as bar:
        folder = Path(temporary)
        (folder / "topics.txt").write_text(topics_text)
        sizes = ["--window", WINDOW, "--batch-size", BATCH, "--steps", args.steps, "--backend", "numpy"]
        run = minilora("finetune", "--model", model, "--data", folder / "topics.txt", *sizes, "--out", folder / "run")
        losses = {"pydoc topics": (run["before"]["loss"], run["after"]["loss"])}
        bar.update()
        for name, text in others.items():
            (folder / "other.txt").write_text(text)
            pair = []
            for which in (model, folder / "run"):
                pair.append(minilora("evaluate", which, "--data", folder / "other.txt", "--window", WINDOW)["loss"])
                bar.update()
            losses[name] = (pair[0], pair[1])
        peaks = None if args.no_peft else memory(model, folder / "topics.txt", folder)
        bar.update()

    print("\n| held-out text | loss before | after | perplexity before | after |\n|---|---|---|---|---|")
    for name, (before, after) in losses.items():
        print(f"| {name} | {before:.3f} | {after:.3f} | {np.exp(before):.2f} | {np.exp(after):.2f} |")
    print(f"\n{run['steps']} steps of {WINDOW * BATCH} tokens, {run['tokens_per_second']:.0f} tokens per second, {run['seconds']:.0f} s")
    print(f"adapter: {run['saved_bytes'] / 1e6:.1f} MB, model: {run['model_bytes'] / 1e6:.0f} MB")
    if peaks:
        print(f"peak memory of training: {peaks['minilora'] / 1e6:.0f} MB, PEFT {peaks['peft'] / 1e6:.0f} MB: {peaks['ratio']:.2f}")
    result = {"steps": run["steps"], "losses": losses, "seconds": run["seconds"], "tokens_per_second": run["tokens_per_second"]}
    print(json.dumps({"benchmark": "real_smollm2", **result, "adapter_bytes": run["saved_bytes"], "peak_memory": peaks}))


if __name__ == "__main__":
    main()
