"""Adapters exported for llama.cpp, and encoders in its files, as llama.cpp itself computes them.

Needs: pip install llama-cpp-python (it compiles, 20 minutes).

    python -m benchmarks.llama_cpp

For each architecture a small model of random weights in a GGUF file, without an adapter and with one that `minilora export --to gguf`
wrote: the largest difference between the logits of llama.cpp and ours, and how far the adapter moves them. For each encoder the largest
difference of the hidden states, relative to the largest one: with our GELU, and with llama.cpp's, by tanh from a table in half precision.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import minilora as ml  # noqa: E402
from minilora.formats.tokenizer import load_tokenizer  # noqa: E402
from minilora.layers import GELU, Layer  # noqa: E402
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


class TableGELU(Layer):
    """ggml_gelu on a CPU: for each x in half precision, gelu(x) by tanh in half precision. Inference only."""

    def forward(self, x: Any, keep: bool = True, need_dx: bool = True) -> Any:
        rounded = x.astype(np.float16).astype(np.float32)
        y = 0.5 * rounded * (1 + np.tanh(0.79788456 * rounded * (1 + 0.044715 * rounded * rounded)))
        return np.where(abs(x) < 10, y.astype(np.float16).astype(np.float32), np.maximum(x, 0)), None


def states(model: Path, ids: list[int], d: int) -> np.ndarray:
    """The hidden states (T, d) of an encoder, by llama.cpp."""
    import llama_cpp

    library = llama_cpp.Llama(str(model), embedding=True, n_batch=64, n_ubatch=64, verbose=False, n_threads=1, pooling_type=0)
    context = library._ctx.ctx
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, id in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = id, i, 1, 0, 1
    llama_cpp.llama_encode(context, batch)
    rows = [llama_cpp.llama_get_embeddings_ith(context, i) for i in range(len(ids))]
    return np.array([np.ctypeslib.as_array(row, (d,)) for row in rows])


def encoders() -> Iterator[tuple[str, float, float]]:
    """(model_type, the deviation of our hidden states, the deviation with llama.cpp's GELU)."""
    from test_gguf_encoders import CONFIGS, load_file, make, write

    for kind in CONFIGS:
        with tempfile.TemporaryDirectory() as name:
            weights = load_file(make(Path(name), kind) / "model.safetensors")
            head = [path for path in weights if path.startswith(("classifier", "pre_classifier", "head."))]
            more = {"modern-bert.attention.layer_norm_epsilon": 1e-5} if kind == "modernbert" else {}  # published files have both
            file = write(Path(name) / "m.gguf", Path(name), leave_out=head, meta=more)
            model = ml.load_model(file, "numpy", report=False)
            ids = load_tokenizer(file, None).encode("the cat sat on the mat").tolist()[:17]
            expected, deviations = states(file, ids, model.config.hidden_size), []
            for _ in range(2):
                ours = model.body.forward(np.array(ids), keep=False)[0]
                deviations.append(float(abs(ours - expected).max() / abs(expected).max()))
                for _, layer in model.modules():
                    vars(layer).update({key: TableGELU() for key, value in vars(layer).items() if isinstance(value, GELU)})
        yield kind, *deviations


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
    for kind, ours, with_table in encoders():
        print(f"{kind:<26} hidden states {ours:.1e}, with llama.cpp's GELU {with_table:.1e}")
        wrong += with_table > 1e-4
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
