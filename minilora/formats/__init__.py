"""Files: checkpoints, adapters, GGUF, tokenizers, chat templates. Knows no training."""

import sys
from importlib import import_module
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:
    import tomli as tomllib


def extra(module: str, name: str, what: str) -> Any:
    """A module of the extra `name`. Raises ImportError, with the pip command for `what`, where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise ImportError(f"{what} needs {module.partition('.')[0]}: pip install 'minilora[{name}]'.") from None
