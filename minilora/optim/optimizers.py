"""SGD, Adam, AdamW and LoRA+: a handful of vector operations on the flat buffer, however many parameters there are."""

import math
from typing import Any

from minilora import kernels as K
from minilora.backend import get_xp
from minilora.functional import AdamStep
from minilora.layers import Embedding, Layer, LayerNorm, RMSNorm
from minilora.optim.flat import FlatBuffer, Parameters


class Optimizer:
    """`step()` moves the parameters along their gradients, `zero_grad()` forgets the gradients. `lr` may be set between steps.

    rates, decays: factors of lr and weight_decay, each a number or an array with one element per parameter element, as in LoRA+.
    Raises ValueError for an lr that is negative or not finite.
    """

    rates: Any = 1.0
    decays: Any = 1.0

    def __init__(self, params: Parameters, lr: float) -> None:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be a number of at least 0, got {lr}.")
        self.lr = lr
        self.t = 0  # steps done
        self.flat = FlatBuffer(params)

    def step(self) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        self.flat.zero_grad()


class SGD(Optimizer):
    """v <- momentum v + g;   w <- w - lr v,   or with Nesterov's momentum  w <- w - lr (g + momentum v).

    g includes weight_decay w. As in PyTorch, v starts at the first g. Raises ValueError for nesterov without momentum.
    """

    def __init__(self, params: Parameters, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> None:
        if nesterov and momentum <= 0:
            raise ValueError("SGD: nesterov needs a momentum above 0.")
        super().__init__(params, lr)
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.v = get_xp(self.flat.data).zeros_like(self.flat.data) if momentum else None

    def step(self) -> None:
        w, g = self.flat.data, self.flat.gather()
        if self.weight_decay:
            g = g + self.weight_decay * self.decays * w
        if self.v is not None:
            self.v *= self.momentum
            self.v += g
            g = g + self.momentum * self.v if self.nesterov else self.v
        w -= self.lr * self.rates * g
        self.t += 1


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1412.6980, algorithm 1, and 1711.05101, algorithm 2).

        m <- b1 m + (1 - b1) g              m^ = m / (1 - b1^t)
        v <- b2 v + (1 - b2) g^2            v^ = v / (1 - b2^t)
        w <- w - lr weight_decay w - lr m^ / (sqrt(v^) + eps)

    bias_correction=False omits the two divisions, as the original BERT code did: early steps are then larger by
    (1 - b1^t) / sqrt(1 - b2^t), 3.16 at t = 1 and 6.57 at t = 12 (arXiv 2006.05987, section 4).
    l2_sp > 0 adds L2-SP, decay towards the weights w_0 that the optimizer was made with (arXiv 1802.01483, section 3): before each
    step  w <- w - lr l2_sp (w - w_0).
    """

    decoupled = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        l2_sp: float = 0.0,
    ) -> None:
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}.")
        if not l2_sp >= 0:
            raise ValueError(f"l2_sp must be at least 0, got {l2_sp}.")
        super().__init__(params, lr)
        self.betas, self.eps, self.weight_decay, self.bias_correction = betas, eps, weight_decay, bias_correction
        self.m, self.v = (get_xp(self.flat.data).zeros_like(self.flat.data) for _ in range(2))
        self.l2_sp, self.initial = l2_sp, self.flat.data.copy() if l2_sp else None

    def step(self) -> None:
        w, g = self.flat.data, self.flat.gather()
        if self.initial is not None:
            w -= (self.lr * self.l2_sp * self.rates) * (w - self.initial)
        self.t += 1
        b1, b2 = self.betas
        c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if self.bias_correction else (1.0, 1.0)
        step = AdamStep(self.lr, self.weight_decay, b1, b2, c1, c2, self.eps, self.decoupled)
        K.adamw(w, g, self.m, self.v, self.rates, self.decays, step)


class Adam(AdamW):
    """Adam with weight decay, if any, added to the gradient (L2 regularisation), as in the original paper."""

    decoupled = False


def create_loraplus_optimizer(
    model: Layer,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **options: Any,
) -> Any:
    """LoRA+, as PEFT's function of the same name: B learns faster than A (arXiv 2402.12354, which found a ratio of about 16 best).

    An optimizer_cls of the model's trainable parameters, with the learning rates

        lr loraplus_lr_ratio     lora_B, and every vector: biases, gains, DoRA's magnitudes
        loraplus_lr_embedding    the adapter of an embedding
        lr                       the rest: lora_A, and fully trained matrices

    Biases and the gains of layer norms have no weight decay. `options` go to optimizer_cls. All are kept as factors of lr and of
    weight_decay, so that schedules, which set lr, act on all three. Raises ValueError for a ratio that is not a positive number.
    """
    if not 0 < loraplus_lr_ratio < math.inf:
        raise ValueError(f"LoRA+: loraplus_lr_ratio must be a positive number, got {loraplus_lr_ratio}.")
    optimizer: Any = optimizer_cls(model.parameters(), lr, weight_decay=loraplus_weight_decay, **options)  # type: ignore[call-arg]
    owners, flat = dict(model.modules()), optimizer.flat
    optimizer.rates, optimizer.decays = (get_xp(flat.data).ones_like(flat.data) for _ in range(2))
    start = 0
    for path, p in zip(flat.paths, flat.parameters, strict=True):
        owner, _, name = path.rpartition(".")
        part = slice(start, start := start + p.data.size)
        if isinstance(owners[owner], Embedding) and name != "weight":
            optimizer.rates[part] = loraplus_lr_embedding / lr
        elif name == "lora_B" or p.data.ndim == 1:
            optimizer.rates[part] = loraplus_lr_ratio
        if name == "bias" or isinstance(owners[owner], (LayerNorm, RMSNorm)):
            optimizer.decays[part] = 0
    return optimizer
