"""The cost of the LoRA variants: forward and backward of one layer, 768 x 3072, 1024 tokens, r = 8, one thread.

python -m benchmarks.family_layer        one line of JSON: medians of the ratios to LoRA; the methods alternate in each round
"""

import json
import time

import numpy as np
from threadpoolctl import threadpool_limits

import minilora as ml
from minilora.layers import Layer

TOKENS, IN, OUT, ROUNDS = 1024, 768, 3072, 15


def layer(config: ml.LoraConfig | None = None, quantize: bool = False) -> Layer:
    """One layer with an adapter; without a configuration, a frozen one."""
    model = ml.MLP([IN, OUT], rng=0).freeze()
    if quantize:
        ml.quantize_model(model)
    if config is not None:
        ml.inject(model, config, rng=0)
    return model.layers[0]


def main() -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((TOKENS, size)).astype(np.float32) for size in (IN, OUT))
    layers = {
        "LoRA": layer(ml.LoraConfig()),
        "frozen": layer(),
        "DoRA": layer(ml.LoraConfig(use_dora=True)),
        "DoRA, exact": layer(ml.LoraConfig(use_dora="exact")),
        "PiSSA": layer(ml.LoraConfig(init_lora_weights="pissa")),
        "LoRA on NF4": layer(ml.LoraConfig(), quantize=True),
        "LoRA-FA": layer(ml.LoraConfig()),
        "VeRA, r = 256": layer(ml.VeraConfig()),
    }
    layers["LoRA-FA"].lora_A.trainable = False
    times: dict[str, list[float]] = {name: [] for name in layers}
    with threadpool_limits(1):
        for _ in range(ROUNDS):
            for name, adapted in layers.items():
                adapted.zero_grad()
                start = time.perf_counter()
                adapted.backward(dy, adapted.forward(x)[1])
                times[name].append(time.perf_counter() - start)
    ratios = {name: round(float(np.median(np.divide(took, times["LoRA"]))), 2) for name, took in times.items()}
    print(json.dumps({"milliseconds_of_lora": round(1e3 * float(np.median(times["LoRA"])), 1), **ratios}))


if __name__ == "__main__":
    main()
