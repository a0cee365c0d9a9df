"""One contiguous buffer for all trainable parameters, one for their gradients (docs/flat-buffer.md)."""

from collections.abc import Callable, Iterable

import numpy as np

from minilora.backend import Array, Matrix, get_xp
from minilora.kernels.half import is_half
from minilora.kernels.memory import shared_zeros
from minilora.layers import Parameter

Parameters = Iterable["Parameter | tuple[str, Parameter]"]


class FlatBuffer:
    """`data` and `grad` (n,) hold all trainable parameters, concatenated; each `p.data` and `p.grad` becomes a view into them.

    An optimizer step, a norm, a sum over replicas or a checkpoint is then one operation on one vector, however many parameters there
    are. Takes the items of `layer.parameters()`, or parameters alone; frozen ones are left unchanged.

    Raises ValueError when nothing is trainable, or a trainable parameter is quantized or half precision; TypeError when dtypes differ.
    """

    def __init__(self, parameters: Parameters) -> None:
        every = (item if isinstance(item, tuple) else ("", item) for item in parameters)
        named = [(path, p) for path, p in every if p.trainable]
        if not named:
            raise ValueError("nothing is trainable: inject LoRA, or unfreeze some parameters, before making an optimizer.")
        for path, p in named:
            if isinstance(p.data, Matrix):
                raise ValueError(f"{path} is quantized and cannot be trained; load the model without, or leave it frozen.")
            if is_half(p.data):
                raise ValueError(f"{path} is {p.data.dtype}, in which small steps are lost; train adapters, or load it in float32.")
        dtypes = {str(p.data.dtype) for _, p in named}
        if len(dtypes) > 1:
            raise TypeError(f"trainable parameters must share one dtype, got {', '.join(sorted(dtypes))}.")
        self.paths = [path for path, _ in named]
        self.parameters = [p for _, p in named]
        xp = get_xp(*(p.data for p in self.parameters))
        zeros: Callable[..., Array] = shared_zeros if xp is np else xp.zeros  # for the processes of training/replicas.py
        self.data, self.grad = (zeros(sum(p.data.size for p in self.parameters), self.parameters[0].data.dtype) for _ in range(2))
        self.views = _views(self.data, self.parameters)
        for p, view in zip(self.parameters, self.views, strict=True):
            view[...] = p.data
            p.data = view
        adopt(self.grad, self.parameters)

    def gather(self) -> Array:
        """The gradient (n,), with zeros where a parameter received none.

        Raises RuntimeError as `check` does.
        """
        self.check()
        fill_missing(self.parameters)
        return self.grad

    def check(self) -> None:
        """Raise RuntimeError when a parameter was frozen, or its array replaced, since the buffer was made."""
        for path, p, view in zip(self.paths, self.parameters, self.views, strict=True):
            if p.data is not view or p.home is None:
                raise RuntimeError(f"{path or 'a parameter'} was moved or frozen after the optimizer was made; make a new optimizer.")

    def norms(self) -> Array:
        """(2, parameters): the Euclidean norms of every parameter's gradient, as it is in the buffer, and of its values.

        On a GPU a dozen launches, however many parameters there are: differences of cumulative sums, in float64.
        """
        xp = get_xp(self.data)
        if xp is np:
            return np.array([[np.linalg.norm(x) for x in row] for row in (_views(self.grad, self.parameters), self.views)])
        ends = xp.asarray(np.cumsum([view.size for view in self.views]) - 1)
        sums = xp.stack([xp.cumsum(xp.square(x), dtype="float64")[ends] for x in (self.grad, self.data)])
        return xp.sqrt(xp.maximum(0, xp.concatenate([sums[:, :1], sums[:, 1:] - sums[:, :-1]], axis=1)))

    def claim(self) -> None:
        """After a replayed CUDA graph, which wrote the gradients into the buffer: let every p.grad be its view."""
        for p in self.parameters:
            p.grad = p.home

    def zero_grad(self) -> None:
        """Forget all gradients; the next backward assigns."""
        for p in self.parameters:
            p.grad = None


def adopt(grad: Array, parameters: list[Parameter]) -> None:
    """From now on the parameters write their gradients into consecutive parts of `grad`."""
    for p, home in zip(parameters, _views(grad, parameters), strict=True):
        p.grad, p.home = None, home


def fill_missing(parameters: list[Parameter]) -> None:
    """Set the gradient to zero where no backward pass has written one."""
    for p in parameters:
        if p.grad is None and p.home is not None:
            p.grad = p.home
            p.grad[...] = 0


def clip_grad_norm(flat: FlatBuffer, max_norm: float, scale: float = 1.0) -> Array:
    """Scale the gradient so that its Euclidean norm is at most max_norm. Returns the norm before, as a 0-d array.

    The factor min(1, max_norm / norm) is computed where the gradient is: nothing is copied to the host. scale: factor of the gradient
    (training/loss_scale.py), by which it is divided first.
    """
    grad = flat.gather()
    xp = get_xp(grad)
    if scale != 1:
        grad *= 1 / scale
    norm = xp.sqrt(xp.vdot(grad, grad) if xp is np else (grad * grad).sum())  # CuPy's vdot cannot be captured in a CUDA graph
    grad *= xp.minimum(1, max_norm / (norm + 1e-6)).astype(grad.dtype)
    return norm


def _views(buffer: Array, parameters: list[Parameter]) -> list[Array]:
    views, start = [], 0
    for p in parameters:
        views.append(buffer[start : start + p.data.size].reshape(p.data.shape))
        start += p.data.size
    return views
