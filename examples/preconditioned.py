"""Optimizers whose steps of A and B take account of each other: Riemannian preconditioning, LoRA-Pro and LoRA-FA.

    from examples.preconditioned import create_lora_pro_optimizer
    optimizer = create_lora_pro_optimizer(model, ml.AdamW, lr=1e-3)

With G = x^T dy, which is never formed, a layer y = x W + s (x A) B has gA = s G B^T and gB = s A^T G: the length of each depends on the
other factor. Multiplied by small (r, r) matrices, they move A B as a step along G would, whatever the lengths of the two factors.
This is done just before the optimizer reads the gradients, so that its moments are those of the transformed gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora.backend import Array, get_xp
from minilora.layers import Layer
from minilora.lora import LoRALinear, lora_layers
from minilora.optim.optimizers import AdamW, Optimizer


def riemannian(A: Array, B: Array, gA: Array, gB: Array, s: float, reg: float) -> tuple[Array, Array]:
    """gA (B B^T + reg I)^-1 and (A^T A + reg I)^-1 gB: the gradient in the metric of A B (arXiv 2402.02347, section 3).

    Shapes: A, gA (m, r), B, gB (r, n). s is not used.
    """
    return gA @ _inverse(B @ B.T, reg), _inverse(A.T @ A, reg) @ gB


def lora_pro(A: Array, B: Array, gA: Array, gB: Array, s: float, reg: float) -> tuple[Array, Array]:
    """Of the steps that move s A B along the tangent part of G, those nearest to gA and gB (LoRA-Pro, arXiv 2407.18242, section 2).

        gA' = gA (B B^T)^-1 / s^2 + A X,      gB' = (A^T A)^-1 gB (I - B^T (B B^T)^-1 B) / s^2 - X B
        A^T A X + X B B^T = - A^T gA (B B^T)^-1 / s^2        solved in the eigenvectors of the two

    Then s (gA' B + A gB') = P G + G Q - P G Q, P and Q the projections onto A's columns and B's rows; X changes nothing of that.
    Shapes as in `riemannian`; reg is added to the eigenvalues, which are zero as long as B is.
    """
    xp = get_xp(A)
    a, U = _eigen(A.T @ A)
    b, V = _eigen(B @ B.T)
    of_A, of_B = (U / (a + reg)) @ U.T, (V / (b + reg)) @ V.T
    PA = gA @ of_B / s**2
    PB = of_A @ gB / s**2
    PB = PB - (PB @ B.T) @ (of_B @ B)
    X = U @ ((U.T @ (-A.T @ PA) @ V) / (a[:, None] + b[None, :] + xp.asarray(reg, dtype=A.dtype))) @ V.T
    return PA + A @ X, PB - X @ B


def lora_fa(A: Array, B: Array, gA: None, gB: Array, s: float, reg: float) -> tuple[None, Array]:
    """(A^T A + reg I)^-1 gB / s^2: of all steps of B alone, the one that moves s A B nearest to G (arXiv 2308.03303, and PEFT)."""
    return None, _inverse(A.T @ A, reg) @ gB / s**2


def preconditioned(optimizer_cls: type[Optimizer], model: Layer, method: Callable[..., Any], reg: float) -> Any:
    """A subclass of optimizer_cls that applies `method` to the gradients of every LoRALinear before each step.

    Raises ValueError when the model has no trainable LoRALinear.
    """
    layers = [layer for _, layer in lora_layers(model) if isinstance(layer, LoRALinear) and layer.lora_B.trainable]
    if not layers:
        raise ValueError("preconditioning needs trainable lora_A and lora_B; this model has none.")

    class Preconditioned(optimizer_cls):  # type: ignore[valid-type, misc]
        def step(self) -> None:
            self.flat.gather()
            for layer in layers:
                A, B = layer.lora_A, layer.lora_B
                for p, g in zip((A, B), method(A.data, B.data, A.grad, B.grad, layer.scaling, reg), strict=True):
                    if g is not None and p.grad is not None:
                        p.grad[...] = g
            super().step()

    return Preconditioned


def create_riemannian_optimizer(model: Layer, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **options: Any) -> Any:
    """An optimizer_cls whose gradients of lora_A and lora_B are preconditioned; other parameters are unchanged. As PEFT's."""
    return preconditioned(optimizer_cls, model, riemannian, reg)(model.parameters(), lr, **options)


def create_lora_pro_optimizer(model: Layer, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-8, **options: Any) -> Any:
    """An optimizer_cls that follows LoRA-Pro's gradients of lora_A and lora_B; other parameters are unchanged."""
    return preconditioned(optimizer_cls, model, lora_pro, reg)(model.parameters(), lr, **options)


def create_lorafa_optimizer(model: Layer, lr: float, weight_decay: float = 0.0, eps: float = 1e-6, reg: float = 1e-8) -> Any:
    """LoRA-FA: freezes every lora_A, so that a layer keeps x A for backward and not x, and gives AdamW the gradient of B by `lora_fa`.

    As PEFT's function of this name, without its arguments for rank and alpha: here each layer knows its scaling.
    """
    for _, layer in lora_layers(model):
        if isinstance(layer, LoRALinear):
            layer.lora_A.trainable = False
    return preconditioned(AdamW, model, lora_fa, reg)(model.parameters(), lr, eps=eps, weight_decay=weight_decay)


def _eigen(M: Array) -> tuple[Array, Array]:
    """Eigenvalues, none below zero, and eigenvectors of a Gram matrix (r, r)."""
    values, V = get_xp(M).linalg.eigh(M)
    return get_xp(M).maximum(values, 0), V


def _inverse(M: Array, reg: float) -> Array:
    """(M + reg I)^-1 of a Gram matrix."""
    values, V = _eigen(M)
    return (V / (values + reg)) @ V.T
