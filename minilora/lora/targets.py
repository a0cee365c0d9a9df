"""Which layers a configuration names: target_modules, exclude_modules, layers_to_transform and modules_to_save, by PEFT's rules.

target_modules    a list of names: each is a whole dotted path, or its last parts ("c_attn", "attn.c_attn")
                  one regular expression, which must match the whole path
                  "all-linear": every Linear except the output head
modules_to_save   a list of names: every module whose path ends with one, at a dot or not ("norm" is "input_layernorm" too)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from minilora.kernels.half import is_half
from minilora.layers.base import Layer
from minilora.layers.embedding import Embedding
from minilora.layers.linear import Linear
from minilora.lora.adapted import INSTEAD

CLASSIFIERS = ("classifier", "score")  # what transformers calls the head of its sequence classifiers


def find_targets(
    model: Layer,
    names: str | Sequence[str],
    *,
    exclude: str | Sequence[str] | None = None,
    blocks: Collection[int] = (),
    blocks_in: str | Sequence[str] | None = None,
    saved: Sequence[str] = (),
    adapt_head: bool = False,
    strict: bool = True,
) -> dict[str, Any]:
    """{path: Linear or Embedding} that `names` names, as in target_modules.

    exclude      names or an expression of layers to leave out; they win
    blocks       the numbers of the blocks to adapt, all if empty; blocks_in is the name of the list in which they count
    saved        names of fully trained modules (modules_to_save), which are never adapted
    adapt_head   "all-linear" includes the output head
    strict       every name must match something

    Raises ValueError when a name matches nothing, when nothing is left, or for a layer of another type.
    """
    modules = _modules(model)
    linears = {path: layer for path, layer in modules.items() if isinstance(layer, Linear)}
    if names == "all-linear":
        head = None if adapt_head else getattr(model, "output_head", None)
        named = [path for path in linears if path != head]
    elif isinstance(names, str):
        named = [path for path in modules if re.fullmatch(names, path)]
        if not any(isinstance(modules[path], (Linear, Embedding)) for path in named):
            raise ValueError(f"target_modules: no linear layer matches {names!r}; there are {_examples(linears)}.")
    else:
        unknown = [name for name in names if not any(_ends_with(path, name) for path in modules)]
        if unknown and (strict or len(unknown) == len(names)):
            raise ValueError(f"target_modules: no linear layer is called {unknown[0]!r}; {nearest(unknown[0], linears)}.")
        named = [path for path in modules if path in names or (_is_named(path, names) and _in_blocks(path, blocks, blocks_in))]

    excluded = _excluded(modules, exclude, strict)
    found = {path: modules[path] for path in named if path not in excluded and not _lies_in(path, saved)}
    if not found:
        raise ValueError("target_modules: no linear layer is left to adapt after exclude_modules, modules_to_save and layers_to_transform.")
    for path, layer in sorted(found.items()):
        if not isinstance(layer, (Linear, Embedding)):
            kind = "shares its weight with the embedding" if layer is None else f"is not linear, but {type(layer).__name__}"
            raise ValueError(f"target_modules: {path} {kind}; only a Linear or an Embedding with a weight of its own can be adapted.")
    return found


def find_modules(model: Layer, names: Sequence[str], strict: bool = True, optional: Collection[str] = ()) -> dict[str, Layer]:
    """{path: layer} of the fully trained modules: those whose path ends with one of `names`, as in modules_to_save.

    Raises ValueError when a name that is not optional matches nothing (if strict), for embeddings in half precision, in which activations
    would become float32, and for a weight that embedding and head share: there PEFT trains a copy of one and leaves the other unchanged.
    """
    modules = _modules(model)
    for name in names if strict else ():
        if not any(path.endswith(name) for path in modules) and name not in optional:
            raise ValueError(f"modules_to_save: no module is called {name!r}; {nearest(name, modules)}.")
    tied = None in modules.values()
    found = {}
    for path, layer in modules.items():
        if path.endswith(tuple(names)):
            if layer is None or (tied and _has_vocabulary(model, layer)):
                raise ValueError(f"modules_to_save: {path} cannot be fully trained, since embedding and head share their weight.")
            if any(isinstance(part, Embedding) and is_half(part.weight.data) for _, part in layer.modules()):
                raise ValueError(f"to train {path} needs weights of float32; {INSTEAD}")
            found[path] = layer
    return found


def biases(model: Layer) -> set[str]:
    """The paths of all biases."""
    return {path for path, _ in model.parameters() if path.rpartition(".")[2] == "bias"}


def check_names(who: str, field: str, value: Any) -> list[str]:
    """A collection of names as a list. Raises ValueError, naming the configuration `who` and the field, for anything else."""
    if isinstance(value, str):
        raise ValueError(f"{who}: {field} is {value!r}; it must be a list of names.")
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{who}: {field}={value!r} must hold names, and none of them empty.")
    return names


def fits(key: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches the path, or its end after a dot (PEFT's rule)."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def nearest(name: str, paths: Mapping[str, Layer | None]) -> str:
    """For a message: the names that resemble `name`, or else some that exist."""
    short = sorted({part for path in paths for part in (path, path.rpartition(".")[2])})
    near = difflib.get_close_matches(name, short, n=3, cutoff=0.4)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {_examples(paths)}"


def _modules(model: Layer) -> dict[str, Layer | None]:
    """{path: layer} of everything below the model; None for an output head that is the embedding's own weight."""
    modules: dict[str, Layer | None] = {path: layer for path, layer in model.modules() if path}
    head = getattr(model, "output_head", None)
    return modules if head is None or head in modules else {**modules, head: None}


def _has_vocabulary(model: Layer, layer: Layer) -> bool:
    """Whether the table of the token embeddings is here, or below."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return any(isinstance(part, Embedding) and part.weight.data.shape[0] == size for _, part in layer.modules())


def _excluded(paths: Iterable[str], names: str | Sequence[str] | None, strict: bool) -> set[str]:
    """The paths that exclude_modules names."""
    if not names:
        return set()
    if isinstance(names, str):
        excluded = {path for path in paths if re.fullmatch(names, path)}
        unused = [] if excluded else [names]
    else:
        excluded = {path for path in paths if _is_named(path, names)}
        unused = [name for name in names if not any(_ends_with(path, name) for path in excluded)]
    if unused and strict:
        raise ValueError(f"exclude_modules: {unused[0]!r} matches no module, so there is nothing to exclude.")
    return excluded


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(_ends_with(path, name) for name in names)


def _lies_in(path: str, names: Sequence[str]) -> bool:
    """Whether one of `names` is the path, or a part of it. (Here PEFT reads them as expressions, and requires a dot.)"""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def _in_blocks(path: str, blocks: Collection[int], blocks_in: str | Sequence[str] | None) -> bool:
    """Whether the number of the path's block, the first after `blocks_in` or else after any two names, is one of `blocks`."""
    if not blocks:
        return True
    lists = [blocks_in] if isinstance(blocks_in, str) else blocks_in or ()
    for pattern in [rf"(?:^|.*?\.){name}" for name in lists] or [r".*?\.[^.]*"]:
        if number := re.match(rf"{pattern}\.(?P<number>\d+)\.", path):
            return int(number["number"]) in blocks
    return False


def _examples(paths: Mapping[str, Layer | None]) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
