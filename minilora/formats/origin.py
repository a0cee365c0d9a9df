"""Where a model came from: `load_model` notes it on the model, `save_model` and `save_adapter` write it down."""

from __future__ import annotations

from dataclasses import dataclass

from minilora.layers import Layer


@dataclass(frozen=True)
class Origin:
    """source: the folder or file. hub_id: the id, if the hub was named by one. drawn: paths of the modules that no file held, which were
    initialised at random; an adapter takes them along."""

    source: str | None = None
    hub_id: str | None = None
    drawn: tuple[str, ...] = ()


def origin(model: Layer) -> Origin:
    """The Origin of a model, its attribute `origin`; an empty one for a model that was not loaded."""
    return getattr(model, "origin", None) or Origin()
