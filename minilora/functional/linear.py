"""Dense layer: y = x W + b."""

from __future__ import annotations

from collections.abc import Collection

from minilora.backend import Array, get_xp


def linear(x: Array, W: Array, b: Array | None = None) -> Array:
    """y = x W + b.

    Shapes: x (T, m), W (m, n), b (n,) -> y (T, n). T counts tokens, whatever sequence they belong to.

    Backward needs x (only for dW) and W; y is not saved. Raises ValueError when the shapes do not fit.
    """
    check_linear(x, W, b)
    y = x @ W
    if b is not None:
        y += b
    return y


def linear_backward(dy: Array, x: Array, W: Array, need: Collection[str] = ("dx", "dW", "db")) -> tuple[Array, Array, Array]:
    """Gradients of y = x W + b, each formed only if `need` names it, else None.

        dx = dy W^T        (T, m)    a token's gradient is the sum over the outputs it fed
        dW = x^T dy        (m, n)    summed over tokens: that is all a dense gradient is
        db = sum_t dy_t    (n,)      b was added to every row

    x may be None when "dW" is not needed: a frozen layer saves nothing.
    """
    db = dy.sum(axis=0) if "db" in need else None  # y += b
    dW = x.T @ dy if "dW" in need else None  #       y = x @ W
    dx = dy @ W.T if "dx" in need else None
    return dx, dW, db


def check_linear(x: Array, W: Array, b: Array | None) -> None:
    """Raise ValueError unless x (T, m), W (m, n) and b (n,) fit, TypeError where they live on different devices."""
    get_xp(x, W, b)
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[0]:
        raise ValueError(f"linear: x has shape {x.shape} but W {W.shape}; x must be (tokens, {W.shape[0]}).{_hint(x, W)}")
    if b is not None and b.shape != (W.shape[1],):
        raise ValueError(f"linear: b has shape {b.shape}; with W {W.shape} it must be ({W.shape[1]},).")


def _hint(x: Array, W: Array) -> str:
    """The two mistakes people make: PyTorch's orientation, and a batch axis left in place."""
    if x.ndim == 2 and W.ndim == 2 and x.shape[1] == W.shape[1]:
        return " W looks transposed: here it is (in, out), PyTorch's Linear keeps (out, in)."
    if x.ndim > 2:
        return f" Pack the batch into rows: x.reshape(-1, {x.shape[-1]})."
    return ""
