"""SmolLM2-135M on prompts and completions from Python's help, 8 pairs per batch, LoRA r 8 on all linear layers.

    python -m benchmarks.completions [--random] [--shape qwen3-0.6b] [--pairs 8] [--rounds 5] [--threads 2] [--no-compile]

The loss covers the completion. A prompt is a run of sentences of 60 to 120 tokens, its completion the sentences that follow, 20 to 60
tokens. The rival pads each batch to its longest pair, with labels of -100. --random: a Llama of SmolLM2's shape with random weights
and random tokens, which needs no download. --shape: the same of another model's shape.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.harness import RIVALS, compare, positive

PROMPT, COMPLETION = (60, 120), (20, 60)
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5},
    },
    "qwen3-0.6b": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6},
    },
    "llama-3.2-1b": {
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        "rope_scaling": LLAMA3 | {"factor": 32.0},
    },
    "llama-3.1-8b": {  # its head is a matrix of its own; 32 GB in float32
        **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        **{"rope_scaling": LLAMA3 | {"factor": 8.0}, "tie_word_embeddings": False},
    },
    "gemma3-270m": {
        **{"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768, "rope_theta": 1e6},
        **{"sliding_window": 512, "query_pre_attn_scalar": 256, "pad_token_id": 0},
    },
}
RANDOM = {"action": "store_true", "help": "random weights and tokens"}
Pair = tuple[list[int], list[int]]


def prepare(o: Namespace) -> None:
    import minilora as ml

    model, encode = smollm2(o.random, o.shape)
    ml.save_model(model, o.folder / "model")
    ml.inject(model, ml.LoraConfig(r=8, task_type="CAUSAL_LM"), rng=0)
    ml.save_adapter(model, o.folder / "adapter")
    pairs = list(help_pairs(encode) if encode else random_pairs(model.config.vocab_size))
    (o.folder / "pairs.json").write_text(json.dumps([pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]))


def smollm2(random: bool, shape: str = "") -> tuple[Any, Callable[[str], list[int]] | None]:
    """(model, function from text to tokens); random: (a random model of the same shape, or of another one, None)."""
    import minilora as ml

    if random or shape:
        config = ml.LlamaConfig(**{"tie_word_embeddings": True, **SHAPES[shape or "smollm2-135m"]})
        return ml.Llama(config, rng=0).freeze(), None
    from minilora.formats.tokenizer import load_tokenizer
    from tests.assets import smollm2 as file

    model = ml.load_model(file(), "numpy")
    tokenizer = load_tokenizer(file(), model.config.vocab_size)
    return model, lambda text: tokenizer.encode(text, add_special=False).tolist()


def help_pairs(encode: Callable[[str], list[int]]) -> Iterator[Pair]:
    """Pairs of consecutive sentences of pydoc's topics that fit the lengths PROMPT and COMPLETION."""
    from pydoc_data.topics import topics

    for text in topics.values():
        prompt: list[int] = []
        completion: list[int] = []
        for sentence in re.split(r"(?<=[.:])\s+(?=[A-Z])", text):
            ids = encode(" " + " ".join(sentence.split()))
            if len(prompt) < PROMPT[0]:
                prompt = prompt + ids if len(prompt) + len(ids) <= PROMPT[1] else []
            elif len(completion) + len(ids) > COMPLETION[1]:
                prompt, completion = [], []
            else:
                completion += ids
                if len(completion) >= COMPLETION[0]:
                    yield prompt, completion
                    prompt, completion = [], []


def random_pairs(vocabulary: int, count: int = 500) -> Iterator[Pair]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        prompt, completion = (rng.zipf(1.3, rng.integers(low, high + 1)) % vocabulary for low, high in (PROMPT, COMPLETION))
        yield prompt.tolist(), completion.tolist()


def ours(o: Namespace) -> Iterator[float]:
    from benchmarks.ours import adapted, training
    from minilora.data.datasets import batches_of, endless
    from minilora.data.examples import Example
    from minilora.functional import IGNORE

    examples = []
    for prompt, completion in json.loads((o.folder / "pairs.json").read_text()):
        labels = np.array([IGNORE] * (len(prompt) - 1) + completion)  # the target of each token but the last
        examples.append(Example(np.array([*prompt, *completion])[:-1], labels))
    return training(adapted(o), endless(lambda rng: batches_of(examples, o.pairs, rng)), o)


def rival(o: Namespace) -> Iterator[float]:
    import torch

    from benchmarks.rivals import adapted, shuffled, training

    pairs = json.loads((o.folder / "pairs.json").read_text())

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for numbers in shuffled(len(pairs), o.pairs):
            chosen = [pairs[i] for i in numbers]
            longest = max(len(prompt) + len(completion) for prompt, completion in chosen)
            ids, labels, mask = [], [], []
            for prompt, completion in chosen:
                pad = longest - len(prompt) - len(completion)
                ids.append([*prompt, *completion, *[0] * pad])
                labels.append([*[-100] * len(prompt), *completion, *[-100] * pad])
                mask.append([1] * (longest - pad) + [0] * pad)
            yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}

    return training(adapted("AutoModelForCausalLM", o, use_cache=False), batches())


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}

if __name__ == "__main__":
    shape = {"choices": [*SHAPES], "default": "", "help": "random weights of this shape, and random tokens"}
    pairs = {"type": positive, "default": 8, "help": "pairs in a batch"}
    sys.exit(compare("completions", __doc__, SIDES, steps=2, random=RANDOM, shape=shape, pairs=pairs))
