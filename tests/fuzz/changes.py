"""How the files of each format are changed: by their structure, and by their bytes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from . import corpus, mutate
from .corpus import Files

Mutation = Callable[[random.Random, Files], Files]  # the files that are changed; the others stay


def json_file(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """A JSON file changed by its structure, or, one time in five, by its bytes."""
    if rng.random() < 0.2:
        return mutate.mutate_bytes(rng, data, other)
    return mutate.dump_json(mutate.mutate_json(rng, json.loads(data)), rng.choice((None, None, 2)))


def lines_file(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """JSON lines, one or two of them changed."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(lines))
        if lines[i][:1] in (b"{", b"[") and rng.random() < 0.8:
            try:
                lines[i] = mutate.dump_json(mutate.mutate_json(rng, json.loads(lines[i])))
            except (ValueError, RecursionError):  # it was changed before
                continue
            if rng.random() < 0.02:
                lines[i : i + 1] = [lines[i]] * min(2000, 200_000 // (1 + len(lines[i])) + 1)
        elif rng.random() < 0.3:
            lines.insert(i, rng.choice((b"", b" ", b"\xef\xbb\xbf", b"null", b"[1]", b"[", b"\x00", b"\xff\xfe", b"\r", b"\x0c", b"\x85")))
        else:
            return mutate.mutate_bytes(rng, b"\n".join(lines), other)
    return b"\n".join(lines)


def tensors_file(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """A safetensors file: its header changed as JSON, its length, or its bytes."""
    op = rng.random()
    if op < 0.25:
        return mutate.mutate_bytes(rng, data, other)
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    name = rng.choice(list(header))
    if op < 0.6 and name != "__metadata__":  # entries that are nearly right
        entry = dict(header[name])
        begin, end = entry["data_offsets"]
        change = rng.randrange(7)
        if change == 0:
            entry["shape"] = rng.choice(([2**61, 0], [end - begin], [0], [1] * 65, entry["shape"][::-1], [-1], [2**61], [2**32, 2**32]))
        elif change == 1:
            entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "f32", "C64", "I8", "U16", "F4"))
        elif change == 2:
            entry["data_offsets"] = rng.choice(([end, begin], [0, end], [begin, 2**61], [begin + 1, end + 1], [begin], [end, end]))
        elif change == 3:
            entry["dtype"], entry["shape"] = "F16", [*entry["shape"], 2]
        elif change == 4:
            entry["dtype"], entry["shape"] = "U8", [end - begin]
        elif change == 5:
            header[rng.choice((*header, *mutate.STRINGS))] = entry
        else:
            del header[name]
        header = header | {name: entry} if change < 5 else header
    else:
        header = mutate.mutate_json(rng, header)
    text = mutate.dump_json(header)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 10**8, 2**61, 2**64 - 1))
    body = bytearray(data[8 + n :])
    if rng.random() < 0.2 and body:  # numbers that are not finite
        at = rng.randrange(0, len(body), 4)
        body[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38)))
    return struct.pack("<Q", length) + text + bytes(body)


def one_of(**ways: Callable[[random.Random, bytes, bytes], bytes]) -> Mutation:
    """Change one of the files of a folder, rarely two, each in the way of its suffix."""

    def change(rng: random.Random, files: Files) -> Files:
        changed = {}
        for _ in range(1 if rng.random() < 0.9 else 2):
            name = rng.choice([name for name in files if name.rpartition(".")[2] in ways])
            changed[name] = ways[name.rpartition(".")[2]](rng, files[name], files[rng.choice(list(files))])
        return changed

    return change


def gguf_file(rng: random.Random, about: dict[str, Any]) -> bytes:
    """A GGUF file: counts, fields, tensors or bytes changed."""
    about = {**about, "meta": list(about["meta"]), "infos": list(about["infos"])}
    op = rng.random()
    if op < 0.25:
        return mutate.mutate_bytes(rng, corpus.gguf_bytes(about), corpus.gguf_bytes(about))
    if op < 0.32:
        about[rng.choice(("version", "tensors", "fields"))] = rng.choice(mutate.SIZES) % 2**32
    elif op < 0.7:
        i = rng.randrange(len(about["meta"]))
        about["meta"][i] = field_of(rng, *about["meta"][i])
        if rng.random() < 0.1:
            about["meta"].append(about["meta"][i])
            about["fields"] += rng.choice((0, 1))
        if rng.random() < 0.1:
            del about["meta"][i]
            about["fields"] -= rng.choice((0, 1))
    else:
        i = rng.randrange(len(about["infos"]))
        name, dims, count, kind, offset = about["infos"][i]
        change = rng.randrange(6)
        dims = [rng.choice([*mutate.SIZES, *dims]) for _ in dims] if change == 0 else dims
        dims = dims * rng.choice((0, 2, 20)) if change == 1 else dims
        count = rng.choice([0, len(dims), 1, 4, 5, 2**31, 2**32 - 1]) if change in (1, 2) else count
        kind = rng.randrange(45) if change == 3 else kind
        offset = rng.choice([*mutate.SIZES, offset + 1, offset + 32]) if change == 4 else offset
        name = rng.choice([*mutate.STRINGS, about["infos"][0][0], "blk.99999999999999999999.attn_q.weight"]) if change == 5 else name
        about["infos"][i] = (name, dims, count, kind, offset)
    return corpus.gguf_bytes(about)


def field_of(rng: random.Random, name: str, kind: int, value: Any) -> tuple[str, int, Any]:
    """Another field in place of one: another value, type, count or name."""
    op = rng.random()
    if op < 0.1:
        return rng.choice([*mutate.STRINGS, "llama.expert_count", "general.alignment", "tokenizer.ggml.eot_token_id", name]), kind, value
    if kind == corpus.ARRAY and op < 0.7:
        inner, count, items = value
        if op < 0.3:
            return name, kind, (inner, rng.choice([*mutate.SIZES, count - 1, count + 1]), items)
        if op < 0.4:
            return name, kind, (rng.randrange(14), count, items if rng.random() < 0.5 else [1] * min(count, 300))
        if op < 0.45:
            return name, kind, (corpus.U8, 300_000, [1] * 300_000) if rng.random() < 0.1 else (corpus.ARRAY, 1, [(corpus.U8, 2, [1, 2])])
        items = list(items)
        items[rng.randrange(len(items))] = rng.choice(mutate.STRINGS) if inner == corpus.STRING else rng.choice(mutate.SIZES)
        return name, kind, (inner, count, items)
    new = rng.choice((kind, kind, rng.randrange(14)))
    if new == corpus.STRING:
        return name, new, rng.choice([*mutate.STRINGS, b"\xff\xfe"])
    if new == corpus.ARRAY:
        inner = (corpus.ARRAY, 1, [(corpus.ARRAY, 1, [(corpus.U8, 1, [7])])])
        return name, new, rng.choice([(corpus.U32, 1, [2]), (corpus.STRING, 2, ["llama", "x"]), (corpus.U8, 0, []), inner])
    if new in (corpus.F32, corpus.F64):
        return name, new, rng.choice((0.0, -1.0, 1e-5, 3e38, float("nan"), float("inf"), 1.5))
    return name, new, rng.choice([*mutate.SIZES, -1])


def text_file(words: list[str]) -> Callable[[random.Random, bytes, bytes], bytes]:
    """A text changed by pieces of its own grammar, or by bytes."""

    def change(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
        if rng.random() < 0.25:
            return mutate.mutate_bytes(rng, data, other)
        text = data.decode()
        for _ in range(rng.choice((1, 1, 2, 4))):
            text = mutate.mutate_text(rng, text, words)
        return text.encode("utf-8", "surrogatepass")

    return change
