"""Which layers a configuration names, by PEFT's rules.

target_modules    a list of names: each is a whole dotted path, or its last parts ("c_attn", "attn.c_attn")
                  one regular expression, which must match the whole path
                  "all-linear": every Linear except the output head and what is fully trained
exclude_modules   names or an expression, as in target_modules
modules_to_save   a list of names: every module whose path ends with one, at a dot or not ("norm" is "input_layernorm" too)
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from minilora.layers.base import Layer
from minilora.layers.embedding import Embedding
from minilora.layers.linear import Linear
from minilora.lora.layer import check_float32

CLASSIFIERS = ("classifier", "score")  # what transformers calls the head of its sequence classifiers


def find_targets(model: Layer, config: Any, strict: bool = True) -> dict[str, Any]:
    """{path: Linear or Embedding} that a LoraConfig adapts. strict: every name must match something.

    Raises ValueError when a name matches nothing, when nothing is left, or for a layer of another type.
    """
    modules, names, exclude, blocks = _modules(model), config.target_modules, config.exclude_modules or (), config.layers_to_transform
    linears = [path for path, layer in modules.items() if isinstance(layer, Linear)]
    if names == "all-linear":
        head = getattr(model, "output_head", None) or ""
        is_head = not head.endswith(CLASSIFIERS) or config.task_type == "SEQ_CLS"  # to PEFT, a classifier's is one only with this task
        named = [path for path in linears if (path != head or not is_head) and not path.endswith(tuple(config.saved_modules))]
    else:
        named = [path for path in modules if _is_named(path, names)]
        if blocks:
            named = [path for path in named if path in names or _in_blocks(path, blocks, config.layers_pattern)]
        if (unknown := _unmatched(names, modules)) and (strict or not named):
            what = f"matches {names!r}; there are {_examples(linears)}"
            if not isinstance(names, str):
                what = f"is called {unknown[0]!r}; {nearest(unknown[0], linears)}"
            raise ValueError(f"target_modules: no linear layer {what}.")
    if strict and (unknown := _unmatched(exclude, modules)):
        raise ValueError(f"exclude_modules: {unknown[0]!r} matches no module, so there is nothing to exclude.")
    found = {path: modules[path] for path in named if not _is_named(path, exclude) and not _lies_in(path, config.saved_modules)}
    if not found:
        raise ValueError("target_modules: no linear layer is left to adapt after exclude_modules, modules_to_save and layers_to_transform.")
    for path, layer in sorted(found.items()):
        if not isinstance(layer, (Linear, Embedding)):
            kind = "shares its weight with the embedding" if layer is None else f"is not linear, but {type(layer).__name__}"
            raise ValueError(f"target_modules: {path} {kind}; only a Linear or an Embedding with a weight of its own can be adapted.")
    return found


def find_modules(model: Layer, names: Sequence[str], strict: bool = True) -> dict[str, Layer]:
    """{path: layer} of the fully trained modules: those whose path ends with one of `names`, as in modules_to_save.

    Raises ValueError when a name matches nothing (if strict), for embeddings in half precision, in which activations would become
    float32, and for a weight that embedding and head share: there PEFT trains a copy of one and leaves the other unchanged.
    """
    modules = _modules(model)
    if unknown := [name for name in names if strict and not any(path.endswith(name) for path in modules)]:
        raise ValueError(f"modules_to_save: no module is called {unknown[0]!r}; {nearest(unknown[0], modules)}.")
    tied, vocabulary = None in modules.values(), getattr(getattr(model, "config", None), "vocab_size", None)
    found = {}
    for path, layer in modules.items():
        if path.endswith(tuple(names)):
            tables = [part.weight.data for _, part in layer.modules() if isinstance(part, Embedding)] if layer else []
            if layer is None or (tied and any(table.shape[0] == vocabulary for table in tables)):
                raise ValueError(f"modules_to_save: {path} cannot be fully trained, since embedding and head share their weight.")
            for table in tables:
                check_float32(table, f"to train {path}")
            found[path] = layer
    return found


def biases(model: Layer) -> set[str]:
    """The paths of all biases."""
    return {path for path, _ in model.parameters() if path.rpartition(".")[2] == "bias"}


def check_names(who: str, field: str, value: Any) -> list[str]:
    """A collection of names as a list. Raises ValueError, naming the configuration `who` and the field, for anything else."""
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if isinstance(value, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{who}: {field} is {value!r}; it must be a list of names, none of them empty.")
    return names


def fits(key: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches the path, or its end after a dot (PEFT's rule)."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def nearest(name: str, paths: Collection[str]) -> str:
    """For a message: the names that resemble `name`, or else some that exist."""
    short = sorted({part for path in paths for part in (path, path.rpartition(".")[2])})
    near = difflib.get_close_matches(name, short, n=3, cutoff=0.4)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {_examples(paths)}"


def _modules(model: Layer) -> dict[str, Any]:
    """{path: layer} of everything below the model; None for an output head that is the embedding's own weight."""
    modules: dict[str, Any] = {path: layer for path, layer in model.modules() if path}
    head = getattr(model, "output_head", None)
    return modules if head is None or head in modules else {**modules, head: None}


def _is_named(path: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


def _unmatched(names: str | Sequence[str], paths: Collection[str]) -> list[str]:
    """The names, or the expression, that match none of the paths."""
    if isinstance(names, str):
        return [] if any(_is_named(path, names) for path in paths) else [names]
    return [name for name in names if not any(_is_named(path, [name]) for path in paths)]


def _lies_in(path: str, names: Iterable[str]) -> bool:
    """Whether one of `names` is the path, or a part of it. (Here PEFT reads them as expressions, and requires a dot.)"""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def _in_blocks(path: str, blocks: Collection[int], blocks_in: str | Sequence[str] | None) -> bool:
    """Whether the number of the path's block, the first after `blocks_in` or else after any two names, is one of `blocks`."""
    lists = [blocks_in] if isinstance(blocks_in, str) else blocks_in or ()
    for pattern in [rf"(?:^|.*?\.){name}" for name in lists] or [r".*?\.[^.]*"]:
        if number := re.match(rf"{pattern}\.(?P<number>\d+)\.", path):
            return int(number["number"]) in blocks
    return False


def _examples(paths: Iterable[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
