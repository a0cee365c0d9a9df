"""Sequential: layers one after the other."""

from __future__ import annotations

from minilora.backend import Array
from minilora.layers.base import Layer, Output, Saved


class Sequential(Layer):
    """y = f_n(... f_2(f_1(x))).   `Sequential(Linear(2, 16), Tanh(), Linear(16, 1))`

    needs[i] says whether the gradient of the input of layer i is needed: by the caller, or by a trainable layer below
    it. Layers under the lowest trainable one run forward without saving and do not run backward.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        saves, needs = [], [need_dx]
        for layer in self.layers:
            needs.append(needs[-1] or layer.trainable)
            x, saved = layer.forward(x, keep=keep and needs[-1], need_dx=needs[-2])
            saves.append(saved)
        return x, self.save(need_dx, saves, needs) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        saves, needs = self.load(saved, need_dx)
        for i in reversed(range(len(self.layers))):
            if not needs[i + 1]:
                return None
            dy = self.layers[i].backward(dy, saves[i], need_dx=needs[i])
        return dy if need_dx else None
