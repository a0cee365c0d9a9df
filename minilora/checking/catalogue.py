"""Everything that has a gradient here, ready to be checked: what `minilora gradcheck` and the tests go through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.adapters import BottleneckConfig, BottleneckLinear, PartialConfig, PerSequence, inject
from minilora.backend import Array, to_backend
from minilora.checking.gradcheck import Report, gradcheck
from minilora.layers import (
    GELU,
    Attention,
    Block,
    Dropout,
    Embedding,
    FeedForward,
    Layer,
    LayerNorm,
    Linear,
    Parameter,
    ReLU,
    RMSNorm,
    Saved,
    Sequential,
    SiLU,
    Tanh,
)
from minilora.lora import LoraConfig, LoRALinear
from minilora.models import GPT2, MLP, BertClassifier, BertConfig, GPT2Config, Llama, LlamaConfig
from minilora.models.bert import BertLayer

OFFSETS = [0, 3, 4, 9]  # three sequences, of 3, 1 and 5 tokens


class Pair(Layer):
    """A functional pair with the contract of a layer; `arrays` are its parameters.

    forward(x, *arrays) -> y, saved        backward(dy, saved, x, *arrays) -> dx, d(array) for each array
    """

    def __init__(self, name: str, forward: Callable[..., Any], backward: Callable[..., Any], **arrays: Array) -> None:
        self.name, self.f, self.f_backward = name, forward, backward
        self.names = list(arrays)
        for key, value in arrays.items():
            setattr(self, key, Parameter(value))

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        y, saved = self.f(x, *(getattr(self, key).data for key in self.names))
        return y, self.save(need_dx, x, saved) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        x, inner = self.load(saved, need_dx)
        dx, *grads = self.f_backward(dy, inner, x, *(getattr(self, key).data for key in self.names))
        for key, g in zip(self.names, grads, strict=True):
            getattr(self, key).add_grad(g)
        return dx if need_dx else None


class LossOf(Layer):
    """A model's `loss` and `loss_backward` with the contract of a layer: y is the loss."""

    def __init__(self, model: GPT2 | BertClassifier | Llama, labels: np.ndarray) -> None:
        self.name, self.model, self.labels = f"{type(model).__name__}.loss", model, labels

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = False, offsets: Sequence[int] | None = None
    ) -> tuple[Array, Saved | None]:
        return self.model.loss(x, self.labels, offsets, keep=keep)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> None:
        self.model.loss_backward(saved)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        return self.model.parameters()


def catalogue(seed: int = 0) -> Iterator[tuple[str, Any, Array, dict[str, Any]]]:
    """(name, object, x, forward options) of every pair, layer and model, on small odd shapes, in float64 on NumPy."""
    from minilora.checking.catalogue_family import family

    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    yield from ((pair.name, pair, x, {}) for pair, x in _pairs(draw, rng))

    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    ids = rng.integers(0, 7, 9)
    yield "Linear", Linear(5, 4, **d), draw(6, 5), {}
    yield "Linear, no bias", Linear(5, 4, bias=False, **d), draw(6, 5), {}
    yield "LoRALinear", LoRALinear(Linear(5, 4, **d), r=2, **d), draw(6, 5), {}
    yield "LoRALinear, rsLoRA, dropout", LoRALinear(Linear(5, 4, **d), 3, 8, 0.3, True, **d), draw(6, 5), {}
    yield "LoRALinear, the seed's init", LoRALinear(Linear(5, 4, **d), r=2, init="seed", **d), draw(6, 5), {}
    yield from family(seed + 1)
    for act in (GELU(), ReLU()):
        yield f"BottleneckLinear, {type(act).__name__}", _shaken(BottleneckLinear(Linear(5, 4, **d), 3, act, **d), rng), draw(6, 5), {}
    bottleneck = BottleneckLinear(Linear(5, 4, **d), 2, rng=rng)
    bottleneck.bias.trainable = True  # type: ignore[union-attr]  # as with BottleneckConfig(train=["bias"])
    yield "BottleneckLinear, the bias trained", bottleneck, draw(6, 5), {}
    several = [Linear(5, 4, **d), LoRALinear(Linear(5, 4, **d), r=2, **d), bottleneck]
    yield "PerSequence", PerSequence(several, {6: [np.array(rows, dtype=int) for rows in ([0, 3], [1, 2, 5], [4])]}), draw(6, 5), {}
    yield "Embedding", Embedding(7, 5, **d), ids, {}
    yield "LayerNorm", _shaken(LayerNorm(5, dtype="float64"), rng), draw(6, 5), {}
    yield "RMSNorm", _shaken(RMSNorm(5, dtype="float64"), rng), draw(6, 5), {}
    for layer in (ReLU(), GELU(), GELU("tanh"), SiLU(), Tanh(), Dropout(0.4)):
        yield type(layer).__name__ + (", tanh" if layer.__dict__.get("f") is K.gelu_tanh else ""), layer, draw(6, 5), {}
    yield "Attention, causal", Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "Attention, both ways", Attention(6, 2, causal=False, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "FeedForward", FeedForward(4, 7, **d), draw(6, 4), {}
    yield "Block", _shaken(Block(6, 3, dropout=0.2, **d), rng), draw(9, 6), {"offsets": OFFSETS}
    yield "Sequential", Sequential(Linear(5, 4, **d), Tanh(), Dropout(0.2), Linear(4, 3, **d)), draw(6, 5), {}
    yield "Sequential, frozen below", Sequential(Linear(5, 4, **d).freeze(), ReLU(), Linear(4, 3, **d)), draw(6, 5), {}
    yield "MLP", MLP([5, 7, 6, 3], Tanh, **d), draw(6, 5), {}

    config = GPT2Config(vocab_size=7, n_positions=6, n_embd=6, n_layer=2, n_head=3, n_inner=9, dropout=0.1)
    labels = np.where(rng.random(9) < 0.3, -100, rng.integers(0, 7, 9))
    for name, change in _GPT2_VARIANTS.items():
        model = _shaken(GPT2(config, **d), rng)
        change(model)
        yield f"GPT2, {name}", model, ids, {"offsets": OFFSETS}
        yield f"GPT2.loss, {name}", LossOf(model, labels), ids, {"offsets": OFFSETS}

    encoder: dict[str, Any] = {"vocab_size": 7, "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 9}
    encoder |= {"max_position_embeddings": 6, "dropout": 0.1}
    for name, alter in _BERT_VARIANTS.items():
        classifier = _shaken(BertClassifier(BertConfig(**encoder, num_labels=3), **d), rng)
        alter(classifier)
        yield f"BertClassifier.loss, {name}", LossOf(classifier, np.array([2, -100, 0])), ids, {"offsets": OFFSETS}
    yield "BertClassifier, head only", classifier, ids, {"offsets": OFFSETS}
    yield "BertLayer", _shaken(BertLayer(BertConfig(**encoder), **d), rng), draw(9, 6), {"offsets": OFFSETS}
    number = _shaken(BertClassifier(BertConfig(**encoder, num_labels=1, pooling="mean", hidden_act="relu"), **d), rng)
    inject(number, LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]), rng=1)
    yield "BertClassifier.loss, regression on the mean", LossOf(number, np.array([0.7, -100, -1.2])), ids, {"offsets": OFFSETS}

    for name, (options, change_llama) in _LLAMA_VARIANTS.items():
        sizes = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 9, "num_hidden_layers": 2, "head_dim": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 6}
        llama = _shaken(Llama(LlamaConfig(**{**sizes, **heads, **options}), **d), rng)
        change_llama(llama)
        yield f"Llama, {name}", llama, ids, {"offsets": OFFSETS}
        yield f"Llama.loss, {name}", LossOf(llama, labels), ids, {"offsets": OFFSETS}


def check_all(backend: str = "numpy", tol: float = 1e-7) -> Iterator[tuple[str, Report]]:
    """(name, report) for everything in the catalogue, on a backend."""
    for name, layer, x, options in catalogue():
        on_device = x if x.dtype.kind != "f" else to_backend(x, backend)
        yield name, gradcheck(layer.to(backend), on_device, tol=tol, max_coordinates=40, **options)


def _pairs(draw: Callable[..., np.ndarray], rng: np.random.Generator) -> Iterator[tuple[Pair, np.ndarray]]:
    x = draw(6, 5)
    labels = np.array([0, 3, -100, 1, 4, 4])
    kept = labels[labels != -100]

    def both(f: Callable[[Array], Array], f_backward: Callable[..., Array], from_output: bool = False) -> tuple[Callable, Callable]:
        """An elementwise pair: what it saves is its input, or its output."""
        return (lambda x: ((y := f(x)), y if from_output else x)), (lambda dy, saved, x: [f_backward(dy, saved)])

    yield (
        Pair(
            "linear", lambda x, W, b: (F.linear(x, W, b), None), lambda dy, s, x, W, b: F.linear_backward(dy, x, W), W=draw(5, 4), b=draw(4)
        ),
        x,
    )
    yield (
        Pair(
            "lora_linear",
            lambda x, A, B: F.lora_linear(x, fixed_weight(x), None, A, B, 0.7),
            lambda dy, u, x, A, B: F.lora_linear_backward(dy, x, u, fixed_weight(x), A, B, 0.7),
            A=draw(5, 2),
            B=draw(2, 4),
        ),
        x,
    )
    for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "softmax"):
        f, f_backward = getattr(F, name), getattr(F, f"{name}_backward")
        yield Pair(name, *both(f, f_backward, from_output=name in ("tanh", "softmax"))), x
    yield Pair("layer_norm", F.layer_norm, lambda dy, s, x, g, b: F.layer_norm_backward(dy, s, g), gamma=draw(5), beta=draw(5)), x
    yield Pair("rms_norm", F.rms_norm, lambda dy, s, x, g: F.rms_norm_backward(dy, s, g), gamma=draw(5)), x
    yield Pair("dropout", lambda x: (F.dropout(x, 0.4, 11), None), lambda dy, s, x: [F.dropout_backward(dy, 0.4, 11)]), x
    ids = rng.integers(0, 6, 9)
    yield Pair("embedding", lambda E: (F.embedding(ids, E), None), lambda dy, s, E: [F.embedding_backward(dy, ids, E)]), x
    for causal in (True, False):

        def attend(q: Array, k: Array, v: Array, causal: bool = causal) -> tuple[Array, list[Array]]:
            return F.attention(q, k, v, 3, OFFSETS, causal)

        def attend_backward(dy: Array, s: list[Array], q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
            return F.attention_backward(dy, q, k, v, s, 3, OFFSETS)

        yield Pair(f"attention, {'causal' if causal else 'both ways'}", attend, attend_backward, k=draw(9, 6), v=draw(9, 6)), draw(9, 6)

    def attend_grouped(q: Array, k: Array, v: Array) -> tuple[Array, list[Array]]:
        return F.attention(q, k, v, 6, OFFSETS, n_kv_head=2)

    def attend_grouped_backward(dy: Array, s: list[Array], q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        return F.attention_backward(dy, q, k, v, s, 6, OFFSETS, n_kv_head=2)

    yield Pair("attention, grouped heads", attend_grouped, attend_grouped_backward, k=draw(9, 4), v=draw(9, 4)), draw(9, 12)
    for interleaved in (False, True):

        def turn(x: Array, interleaved: bool = interleaved) -> tuple[Array, None]:
            return F.rotary(x, *_tables(x), interleaved), None

        def turn_back(dy: Array, s: None, x: Array, interleaved: bool = interleaved) -> list[Array]:
            return [F.rotary_backward(dy, *_tables(x), interleaved)]

        yield Pair(f"rotary, {'interleaved' if interleaved else 'halves'}", turn, turn_back), draw(9, 12)
    for name, loss in {
        "mse": lambda x: F.mse(x, x * 0 + 0.3),
        "cross_entropy": lambda x: F.cross_entropy(x, labels),
    }.items():
        yield Pair(name, loss, lambda dy, saved, x: [dy * saved]), x
    yield (
        Pair(
            "linear_cross_entropy",
            lambda x, W: _split_first(F.linear_cross_entropy(x, W, kept, block=2)),
            lambda dy, saved, x, W: [dy * g for g in saved],
            W=draw(5, 7),
        ),
        draw(5, 5),
    )


_BOTTLENECK = BottleneckConfig(reduction_factor=3, init_std=0.5)
_LAST = BottleneckConfig(reduction_factor=2, init_std=0.5, train=[], target_modules=r".*\.1\..*(output\.dense|mlp\.c_proj|o_proj)")

_GPT2_VARIANTS: dict[str, Callable[[GPT2], object]] = {
    "all trained": lambda model: model,
    "LoRA on all linear layers": lambda model: inject(model, LoraConfig(r=2, lora_dropout=0.2), rng=1),
    "LoRA on the last block": lambda model: inject(
        model, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], layers_to_transform=[1]), rng=1
    ),
    "recomputed": lambda model: setattr(model.transformer, "recompute", True),
    "biases only": lambda model: inject(model, PartialConfig(train=["bias"])),
    "bottlenecks": lambda model: inject(model, _BOTTLENECK, rng=1),
    "bottleneck on the last mlp": lambda model: inject(model, _LAST, rng=1),
}


_BERT_VARIANTS: dict[str, Callable[[BertClassifier], object]] = {
    "all trained": lambda model: model,
    "LoRA on query and value": lambda model: inject(
        model, LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]), rng=1
    ),
    "LoRA on all linear layers": lambda model: inject(model, LoraConfig(r=2, lora_dropout=0.2), rng=1),
    "LoRA on the last layer": lambda model: inject(
        model, LoraConfig(r=2, target_modules=["key", "intermediate.dense"], layers_to_transform=[1]), rng=1
    ),
    "last intermediate only": lambda model: model.freeze().bert.encoder.layer[1].intermediate.unfreeze(),
    "bottlenecks": lambda model: inject(model, _BOTTLENECK, rng=1),
    "bottlenecks in the last layer": lambda model: inject(model, _LAST, rng=1),
    "biases only": lambda model: inject(model, PartialConfig(train=["bias"])),
    "norms only": lambda model: inject(model, PartialConfig(train=["norm"])),
    "head only": lambda model: inject(model, PartialConfig(train=["head"])),
}


_LLAMA_VARIANTS: dict[str, tuple[dict[str, Any], Callable[[Llama], object]]] = {
    "all trained, tied": ({"tie_word_embeddings": True}, lambda model: model),
    "all trained, free head, biases": ({"attention_bias": True, "mlp_bias": True}, lambda model: model),
    "LoRA on all linear layers, qwen2": (
        {"model_type": "qwen2", "num_hidden_layers": 1},
        lambda model: inject(model, LoraConfig(r=2, lora_dropout=0.2), rng=1),
    ),
    "LoRA on the last v and gate, tied": (
        {"tie_word_embeddings": True},
        lambda model: inject(model, LoraConfig(r=1, target_modules=["v_proj", "gate_proj"], layers_to_transform=[1]), rng=1),
    ),
    "LoRA on k and the head": ({}, lambda model: inject(model, LoraConfig(r=2, target_modules=["k_proj", "lm_head"]), rng=1)),
    "head only": ({}, lambda model: inject(model, PartialConfig(train=["head"]))),
    "bottlenecks": ({"mlp_bias": True}, lambda model: inject(model, _BOTTLENECK, rng=1)),
    "bottleneck on the last o_proj": ({}, lambda model: inject(model, _LAST, rng=1)),
    "norms only": ({}, lambda model: inject(model, PartialConfig(train=["norm"]))),
}


def _shaken(layer: Any, rng: np.random.Generator) -> Any:
    """Gains and biases away from 1 and 0, where mistakes hide."""
    for _, p in layer.parameters():
        p.data = p.data + 0.3 * rng.standard_normal(p.data.shape)
    return layer


def fixed_weight(x: Array) -> Array:
    """A fixed frozen weight (5, 4), where x lives and in its dtype."""
    return to_backend(np.linspace(-1, 1, 20).reshape(5, 4), "numpy" if isinstance(x, np.ndarray) else "cupy", x.dtype)


def _tables(x: Array) -> tuple[Array, Array]:
    """Rotary tables for 3 heads of 4 features, where x lives."""
    return F.rotary_tables(F.positions(9, OFFSETS, 9), 4, 100.0, x)


def _split_first(values: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return values[0], values[1:]
