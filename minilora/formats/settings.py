"""Settings from a TOML file, for `--config`."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_settings(path: str | Path, allowed: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of a flat TOML file. `allowed` gives the type of each name: bool, int, float, str, list, or a union of them.

    Names may be written with dashes, as flags are; an integer is accepted for a float. Raises FileNotFoundError; ValueError for
    invalid TOML, an unknown name (with suggestions), a duplicate, or a value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no settings file {path}.")
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid TOML ({error}).") from None
    settings: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(allowed))}."
            raise ValueError(f"{path}: there is no setting {key!r}; {hint}")
        if name in settings:
            raise ValueError(f"{path}: {key!r} is given twice, with a dash and with an underscore.")
        kinds = get_args(allowed[name]) or (allowed[name],)
        if float in kinds and int not in kinds and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise ValueError(f"{path}: {key} must be of type {expected}, got {value!r}.")
        settings[name] = value
    return settings
