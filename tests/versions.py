"""Tests are written against the versions of the extra `oracle`, and skip what PEFT from 0.19 and transformers from 5.17 do otherwise."""

import re
from types import ModuleType

import pytest

LORA_ONLY = "before 0.21, PEFT does not save the biases that bias='lora_only' trains"


def is_before(module: ModuleType, *version: int) -> bool:
    return tuple(int(part) for part in re.findall(r"\d+", module.__version__)[: len(version)]) < version


def skip_before(module: ModuleType, version: tuple[int, ...], why: str) -> None:
    """Skip the test where an earlier version of the module is installed."""
    if is_before(module, *version):
        pytest.skip(f"{module.__name__} {module.__version__}: {why}")
