"""Mutations of bytes, of text, and of JSON by its structure. Each is a function of a random.Random: the same seed gives the same file."""

from __future__ import annotations

import json
import random
import struct
from typing import Any


class Raw(str):
    """Text that stands in a JSON file as it is, such as NaN or a number of 5,000 digits."""

    __slots__ = ()


SIZES = [0, 1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 10**9, 10**30]
STRINGS = [
    "",
    "x",
    " ",
    "\x00",
    "\x1b[31mred\x9b0m\r\x07",
    "\ud800",
    "<b>hostile</b>",
    '"><b>hostile',
    "</script><b>hostile",
    "\ufdd0",
    "é" * 50,
    "a" * 3000,
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    "C:\\x",
    "org/name",
    "(.+)+!",
    "(a|a)*" * 12 + "!",
    ".*" * 9 + "!",
    "(",
    "(?i)x",
    "(?P<number>x)",
    "\\1",
    "a{99999999999}",
    "(" * 500 + ")" * 500,
    "{{ 'a' * 10**9 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "9" * 4301,
    "NaN",
    "-1",
    "None",
    "true",
    "////////",
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("9" * 5000),
    Raw("[" * 1500 + "]" * 1500),
    Raw("[" * 100_000),
    Raw('{"a":' * 900 + "1" + "}" * 900),
    [],
    {},
    [[]],
    [1],
    ["x"],
    [None],
    [1.5, "x"],
    {"x": 1},
    [{"x": [1]}],
    {"": ""},
]


def any_value(rng: random.Random) -> Any:
    """A value that few programs expect."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(SIZES) * rng.choice((1, 1, 1, -1))
    return rng.choice(STRINGS) if kind < 0.6 else rng.choice(OTHERS)


def paths_of(value: Any, at: tuple[Any, ...] = (), most: int = 400) -> list[tuple[Any, ...]]:
    """The places in a JSON value, at most `most` of each list or object."""
    found = [at]
    if isinstance(value, dict):
        for key in list(value)[:most]:
            found += paths_of(value[key], (*at, key), most)
    elif isinstance(value, list):
        for i in range(min(len(value), most)):
            found += paths_of(value[i], (*at, i), most)
    return found


def get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of the value with `new` at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def mutate_json(rng: random.Random, value: Any, times: int | None = None) -> Any:
    """A JSON value with one or a few changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if times is None else times):
        paths = paths_of(value, most=60)
        path = rng.choice(paths)
        here = get(value, path)
        value = put(value, path, _changed(rng, here, value, paths))
    return value


def _changed(rng: random.Random, here: Any, root: Any, paths: list[tuple[Any, ...]]) -> Any:
    op = rng.random()
    if op < 0.4:
        return any_value(rng)
    if op < 0.5:
        return get(root, rng.choice(paths))  # something from elsewhere in the file
    if isinstance(here, bool) or here is None:
        return any_value(rng)
    if isinstance(here, int):
        return rng.choice((here + 1, here - 1, -here, here * 2, here // 2, float(here), here + 0.5, str(here), rng.choice(SIZES)))
    if isinstance(here, float):
        return rng.choice((-here, here * 1e30, here / 1e30, round(here) if abs(here) < 1e300 else 1, str(here), 0.0))
    if isinstance(here, str):
        return mutate_text(rng, here, STRINGS) if rng.random() < 0.7 else [here]
    if isinstance(here, list):
        copy = list(here)
        if not copy or op < 0.6:
            copy.insert(rng.randint(0, len(copy)), any_value(rng))
        elif op < 0.7:
            del copy[rng.randrange(len(copy))]
        elif op < 0.8:
            copy = copy * rng.choice((2, 3, 100 if len(copy) < 50 else 2))
        elif op < 0.9:
            rng.shuffle(copy)
        else:
            copy = copy[: rng.randrange(len(copy))]
        return copy if rng.random() < 0.95 else {str(i): each for i, each in enumerate(copy)}
    items = list(here.items())
    if not items or op < 0.6:
        items.append((rng.choice([*STRINGS, *here]), any_value(rng)))
    elif op < 0.75:
        del items[rng.randrange(len(items))]
    elif op < 0.85:  # another name
        i = rng.randrange(len(items))
        items[i] = (rng.choice([*STRINGS, *here, items[i][0] + "x"]), items[i][1])
    elif op < 0.93:
        i, j = rng.randrange(len(items)), rng.randrange(len(items))
        items[i], items[j] = (items[i][0], items[j][1]), (items[j][0], items[i][1])
    else:  # the same name twice
        name, each = rng.choice(items)
        items.append((f"@@TWICE@@{name}", any_value(rng) if rng.random() < 0.7 else each))
    return dict(items)


def dump_json(value: Any, indent: int | None = None) -> bytes:
    """The bytes of a JSON value with Raw parts and doubled names."""
    raws: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"@@RAW{len(raws) - 1}@@"
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(plain(value), indent=indent).replace("@@TWICE@@", "")
    for i, raw in enumerate(raws):
        text = text.replace(f'"@@RAW{i}@@"', raw)
    return text.encode()


def mutate_text(rng: random.Random, text: str, words: list[str]) -> str:
    """A text with one piece inserted, removed, doubled, replaced or cut."""
    n, op = len(text), rng.random()
    a = rng.randint(0, n)
    b = min(n, a + rng.choice((0, 1, 1, 2, 5, 20, n)))
    word = rng.choice(words)
    if op < 0.35:
        return text[:a] + word + text[a:]
    if op < 0.6:
        return text[:a] + word + text[b:]
    if op < 0.75:
        return text[:a] + text[b:]
    if op < 0.9:
        return text[:a] + text[a:b] * rng.choice((2, 3, 20)) + text[b:]
    return text[:a]


def mutate_bytes(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bits flipped, bytes replaced, ranges removed, doubled, cut, or spliced in from another file."""
    data, op = bytearray(data), rng.random()
    n = len(data)
    if op < 0.3 or not n:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if n:
                data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif op < 0.45:
        data[rng.randrange(n)] = rng.choice((0, 1, 9, 10, 13, 34, 44, 92, 123, 127, 128, 255, rng.randrange(256)))
    elif op < 0.6:
        kind, most = rng.choice((("<I", 2**32), ("<Q", 2**64), ("<H", 2**16)))
        at = rng.randrange(n)
        data[at : at + struct.calcsize(kind)] = struct.pack(kind, rng.choice(SIZES) % most)
    elif op < 0.75:
        del data[rng.randrange(n) :]
    elif op < 0.85:
        a = rng.randrange(n)
        del data[a : a + rng.choice((1, 2, 8, 100))]
    elif op < 0.93:
        a = rng.randrange(n)
        piece = data[a : a + rng.choice((1, 2, 8, 100))]
        data[a:a] = piece * rng.choice((1, 2, 50))
    else:
        a, b = rng.randrange(n), rng.randrange(len(other) + 1)
        data[a:] = other[b:]
    return bytes(data)
