"""Adapters exported for llama.cpp, as llama.cpp itself computes them. Needs: pip install llama-cpp-python (it compiles, 20 minutes).

    python -m benchmarks.llama_cpp

For each architecture a small model of random weights in a GGUF file, without an adapter and with one that `minilora export --to gguf`
wrote: the largest difference between the logits of llama.cpp and ours, and how far the adapter moves them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import minilora as ml  # noqa: E402
from minilora.lora import lora_layers  # noqa: E402
from minilora.runs.export import export  # noqa: E402

IDS = np.array([1, 5, 9, 13, 40, 41, 66, 3])
KINDS = (
    "llama, tied",
    "llama, free head, biases",
    "llama3",
    "linear",
    "yarn",
    "mistral",
    "qwen2",
    "qwen3, heads of 128",
    "smollm3",
    "gemma3",
)


def theirs(model: Path, adapter: Path | None) -> np.ndarray:
    """The logits (T, vocab_size) of llama.cpp."""
    import llama_cpp

    options: dict[str, Any] = {} if adapter is None else {"lora_path": str(adapter)}
    library = llama_cpp.Llama(str(model), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, **options)  # float32
    library.eval(IDS.tolist())
    return np.array(library.scores[: len(IDS)])


def main() -> int:
    from test_gguf import VARIANTS, random_model, small, write

    wrong = 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = random_model(small(**{**VARIANTS[kind], "max_position_embeddings": 64}))
            ml.save_model(model, folder / "base")
            write(folder / "base.gguf", model)
            adapted, rng = ml.load_model(folder / "base"), np.random.default_rng(2)
            ranks = {"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}
            ml.inject(adapted, ml.LoraConfig(target_modules="all-linear", base_model_name_or_path=str(folder / "base"), **ranks), rng=0)
            for _, layer in lora_layers(adapted):
                layer.lora_B.data = rng.normal(0, 0.1, layer.lora_B.data.shape).astype(np.float32)
            ml.save_adapter(adapted, folder / "adapter")
            export(folder / "adapter", "gguf", folder / "adapter.gguf")
            base, ours = model.forward(IDS)[0], adapted.forward(IDS)[0]
            plain = abs(theirs(folder / "base.gguf", None) - base).max()
            with_adapter = abs(theirs(folder / "base.gguf", folder / "adapter.gguf") - ours).max()
            print(f"{kind:<26} base {plain:.1e}, with the adapter {with_adapter:.1e}; it moves the logits by {abs(ours - base).max():.2f}")
            wrong += with_adapter > max(1e-4, 3 * plain)  # Gemma's GELU is a table in float16 there
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
