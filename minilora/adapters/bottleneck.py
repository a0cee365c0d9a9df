"""Bottleneck adapters: a small trainable network after a frozen projection (Houlsby et al., arXiv 1902.00751, section 2.1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from minilora.adapters.partial import PartialConfig
from minilora.backend import Array, Rng, backend_name, generator
from minilora.layers import GELU, Activation, Layer, Linear, Output, ReLU, Saved, SiLU, Tanh
from minilora.lora import LoraConfig
from minilora.lora.layer import trained_dtype
from minilora.lora.targets import CLASSIFIERS, check_names

# into the residual stream, two a block: BERT, GPT-2, both of Llama and of DistilBERT, ModernBERT
PROJECTIONS = ("output.dense", "c_proj", "o_proj", "down_proj", "out_lin", "lin2", "Wo")
NON_LINEARITIES: dict[str, Callable[[], Activation]] = {
    "relu": ReLU,
    "gelu": GELU,
    "gelu_new": partial(GELU, "tanh"),
    "silu": SiLU,
    "tanh": Tanh,
}


@dataclass
class BottleneckConfig(PartialConfig):
    """Bottleneck adapters after the projections into the residual stream (arXiv 1902.00751), and the layer norms and the head.

    reduction_factor  the bottleneck of a layer with n outputs has n / reduction_factor features, at least 1
    non_linearity     "relu", "gelu", "gelu_new" (GELU by tanh), "silu" or "tanh"
    init_std          standard deviation of the initial weights, normal and truncated at two of them; small, so that the adapted layer
                      computes nearly what the projection does. 1e-2 in the paper (section 3.6), 1e-3 in its code
    target_modules    names or an expression, as in LoraConfig; None is those of PROJECTIONS that the model has
    train             as in PartialConfig; the paper trains the layer norms
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    train: Sequence[str] = ("norm",)
    reduction_factor: float = 16
    non_linearity: str = "gelu"
    init_std: float = 1e-2
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("reduction_factor", 1), ("init_std", 0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
                raise ValueError(f"BottleneckConfig: {name} must be a number of at least {least}, got {value!r}.")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"BottleneckConfig: non_linearity is {self.non_linearity!r}; choose {', '.join(NON_LINEARITIES)}.")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self.target_modules = check_names("BottleneckConfig", "target_modules", self.target_modules)

    def targets(self, model: Layer, strict: bool = True) -> dict[str, Any]:
        """{path: Linear} to put a bottleneck after."""
        names = self.target_modules
        if names is None:
            names = [name for name in PROJECTIONS if any(f".{path}".endswith(f".{name}") for path, _ in model.modules())]
            if not names:
                raise ValueError(f"target_modules: nothing here is called {' or '.join(PROJECTIONS)}; name the layers to adapt.")
        task = "SEQ_CLS" if getattr(model, "output_head", "").endswith(CLASSIFIERS) else None  # whose head is fully trained
        like = LoraConfig(r=1, target_modules=names, modules_to_save=self.modules_to_save, task_type=task)
        found = like.targets(model, strict)
        if odd := sorted(path for path, layer in found.items() if not isinstance(layer, Linear)):
            raise ValueError(f"target_modules: {odd[0]} is not linear, but {type(found[odd[0]]).__name__}; a bottleneck follows a Linear.")
        return found

    def adapters(self, model: Layer, targets: dict[str, Any], rng: Any, train_step: Callable[[], Any] | None) -> tuple[Any, dict[str, Any]]:
        act = NON_LINEARITIES[self.non_linearity]
        sizes = {path: max(1, round(layer.out_features / self.reduction_factor)) for path, layer in targets.items()}
        return self, {path: BottleneckLinear(targets[path], sizes[path], act(), self.init_std, rng=rng) for path in targets}

    @property
    def method(self) -> str:
        full = ", ".join(self._full())
        return f"bottleneck adapters, reduction {self.reduction_factor:g}" + (f", with {full}" if full else "")


class BottleneckLinear(Linear):
    """h = x W + b;   y = h + f(h D + b_1) U + b_2.   x (T, m) -> h, y (T, n); D (n, d), b_1 (d,), U (d, n), b_2 (n,).

    Takes over the weight and bias of `base`, a projection into the residual stream (their paths stay those of the checkpoint), and
    freezes them; adds the layers `down` and `up`, 2 n d + d + n numbers. y - h is added before the residual sum, where the paper has it.

        da  = dy U^T         dU = a^T dy,   db_2 = sum dy         a = f(z)
        dz  = da f'(z)       dD = h^T dz,   db_1 = sum dz         z = h D + b_1
        dh  = dy + dz D^T    h feeds y twice: directly, and through the bottleneck
        dx  = dh W^T

    Saved: h (T, n), z (or a) and a (T, d). D and U are initially near zero, so that y is near h; were both zero, neither had a gradient.
    Unlike LoRA's update this one is not linear in x: it cannot be folded into W, and it costs time at inference.
    """

    def __init__(
        self, base: Linear, size: int, act: Activation | None = None, init_std: float = 1e-2, *, rng: Rng = None, dtype: Any = None
    ) -> None:
        rng, n = generator(rng), base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.freeze()
        self.down, self.act, self.up = Linear(n, size, rng=rng), act or GELU(), Linear(size, n, rng=rng)
        for layer in (self.down, self.up):
            layer.weight.data = truncated_normal(rng, layer.weight.data.shape, init_std)
            layer.bias.data = np.zeros(layer.out_features)  # type: ignore[union-attr]
            layer.to(backend_name(base.weight.data), dtype or trained_dtype(base.weight.data))
        self.enabled = True

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        at_h = need_dx or self.weight.trainable or (self.bias is not None and self.bias.trainable)
        h, s_h = super().forward(x, keep=keep and at_h, need_dx=need_dx)
        if not self.enabled:
            return h, self.save(need_dx, at_h, s_h, None, None, None) if keep else None
        z, s_down = self.down.forward(h, keep=keep, need_dx=at_h)
        a, s_act = self.act.forward(z, keep=keep)
        y, s_up = self.up.forward(a, keep=keep)
        y += h
        return y.astype(h.dtype, copy=False), self.save(need_dx, at_h, s_h, s_down, s_act, s_up) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        at_h, s_h, s_down, s_act, s_up = self.load(saved, need_dx)
        dh = dy  #                                                y = h + up(a)
        if s_up is not None:
            da = self.up.backward(dy, s_up)
            dz = self.act.backward(da, s_act)  #                  a = f(z)
            dh = self.down.backward(dz, s_down, need_dx=at_h)  #  z = down(h)
            if at_h:
                dh += dy
        return super().backward(dh, s_h, need_dx) if at_h else None  # h = x W + b


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """N(0, std^2) truncated at 2 std: values beyond are drawn again. float64, on the host."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(int(far.sum()))
    return std * x


def bottlenecks(model: Layer) -> list[tuple[str, BottleneckLinear]]:
    """(path, layer) of every BottleneckLinear in the model."""
    return [(path, layer) for path, layer in model.modules() if isinstance(layer, BottleneckLinear)]


def bottleneck_parameters(model: Layer) -> set[str]:
    """The paths of the parameters of all bottlenecks."""
    return {f"{path}.{part}.{name}" for path, _ in bottlenecks(model) for part in ("down", "up") for name in ("weight", "bias")}
