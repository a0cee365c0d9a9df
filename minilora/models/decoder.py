"""What decoders share: the head, the loss of the next token, and generation token by token.

    h = body(ids)        logits = h W_head        W_head = lm_head, or embedding^T: a "tied" head

The body is in models/stack.py, its parts are in the file of each model.
"""

from functools import partial
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array
from minilora.functional.attention import Offsets
from minilora.layers import Layer, Linear, Output, Saved, needed
from minilora.models.attention import KVCache
from minilora.models.stack import Body, Prefix


class Decoder(Layer):
    """ids (T,) -> logits (T, vocab_size). For training use `loss` and `loss_backward`, which never hold all logits.

    A model names its body as its checkpoint does, and sets `lm_head` where the head is not tied.
    """

    output_head = "lm_head"  # what "all-linear" leaves out
    weights_are_in_out = False  # the orientation of Linear weights in files
    lm_head: Any = None
    config: Any

    @property
    def body(self) -> Body:
        """The attribute that is a Body."""
        return next(value for value in list(vars(self).values()) if isinstance(value, Body))  # a list: see Layer.children

    @property
    def embedding(self) -> Any:
        """The table of token embeddings."""
        return self.body.parts().embeddings[0]

    @property
    def head(self) -> Array | None:
        """The head's weight (d, vocab_size), or None where lm_head is more than a weight: an adapted layer."""
        if self.lm_head is None:
            return self.embedding.weight.data.T
        return self.lm_head.weight.data if type(self.lm_head) is Linear else None

    def forward(self, x: Array, keep: bool = True, need_dx: bool = False, offsets: Offsets = None) -> Output:
        h, s_h = self.body.forward(x, keep=keep, offsets=offsets)
        if self.lm_head is None:
            logits, s_head = K.product(h, self.head), h if self.embedding.weight.trainable else None
        else:
            logits, s_head = self.lm_head.forward(h, keep=keep, need_dx=self.body.trainable)
        return logits, self.save(need_dx, s_head, s_h) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        s_head, s_h = self.load(saved, need_dx)
        if self.lm_head is not None:
            dh = self.lm_head.backward(dy, s_head, need_dx=self.body.trainable)  # logits = lm_head(h)
        else:
            E = self.embedding.weight
            if E.trainable:
                E.add_grad(K.product(dy.T, s_head))  #                             logits = h E^T
            dh = K.product(dy, E.data)
        if self.body.trainable:
            self.body.backward(dh, s_h)  #                                         h = body(ids)

    def loss(
        self,
        ids: Array,
        labels: np.ndarray | F.Labelled,
        offsets: Offsets = None,
        count: int | None = None,
        keep: bool = True,
        prefix: Prefix | None = None,
    ) -> Output:
        """The sum over labelled rows of -log p(labels_t | ids_0 ... ids_t), divided by `count` (default: the number of those rows).

        ids (T,); labels (T,) on the host: labels[t] is the token that row t has to predict (already shifted), or -100; or F.Labelled,
        whose labels may be on a device. prefix: the result of `body.prefix(ids, offsets)`.
        The last block, the head and the softmax run on labelled rows only, the latter two in blocks of the vocabulary (all of it
        at once where the head is not a plain Linear). With keep=True the gradient of h is computed here, and `loss_backward(saved)`
        continues from it. Raises ValueError when no row is labelled and no `count` is given.
        """
        rows, targets, _ = F.labelled(labels)
        if targets.size == 0 and count is None:
            raise ValueError("loss: no row is labelled.")
        h, s_h = self.body.forward(ids, keep=keep, offsets=offsets, rows=rows, prefix=prefix)
        W, dh, dW, dz, s_head = self.head, None, None, None, None
        if W is not None:
            owner = self.embedding if self.lm_head is None else self.lm_head
            need = needed(dx=keep and self.body.trainable, dW=keep and owner.weight.trainable)
            loss, dh, dW = K.linear_cross_entropy(h, W, targets, count, need)
        else:
            z, s_head = self.lm_head.forward(h, keep=keep, need_dx=self.body.trainable)
            loss, dz = z.sum(), z  # without any row
            if len(z):
                loss, dz = K.cross_entropy(z, F.Labelled(None, targets, len(z)), times=len(z) / (count or len(z)))
        return loss, self.save(False, dh, dW, dz, s_head, s_h) if keep else None

    def loss_backward(self, saved: Saved | None) -> None:
        """Add the gradients of `loss` to the trainable parameters."""
        dh, dW, dz, s_head, s_h = self.load(saved, False)
        if dz is not None:
            dh = self.lm_head.backward(dz, s_head, need_dx=self.body.trainable)  # z = lm_head(h)
        elif dW is not None and self.lm_head is None:
            self.embedding.weight.add_grad(dW.T)  #                                the head is the embedding, transposed
        elif dW is not None:
            self.lm_head.weight.add_grad(dW)
        if dh is not None:  # None: only the head is trained
            self.body.backward(dh, s_h)  #                                         h = body(ids)

    def decode(self, ids: Array, cache: KVCache) -> Array:
        """The logits (vocab_size,) of the token after `ids` (t,), which follow the tokens in the cache and are added to it.

        Raises ValueError for a sequence beyond max_position_embeddings, and leaves the cache's length as it was.
        """
        total = cache.length + len(ids)
        places = self.body.places(total)[cache.length :]
        _, blocks, norm = self.body.parts()
        h, _ = self.body.embed(ids, places, keep=False)
        inputs = self.body.block_inputs(places, h)
        for i, block in enumerate(blocks):
            h, _ = block.forward(h, keep=False, extend=partial(cache.extend, i), **inputs)
        cache.length = total
        h = h[-1:] if norm is None else norm.forward(h[-1:], keep=False)[0]
        W = self.head
        return (K.product(h, W) if W is not None else self.lm_head.forward(h, keep=False)[0])[0]
