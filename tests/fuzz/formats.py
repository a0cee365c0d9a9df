"""What is read, one Format each: the files it starts from, how they are changed, the reader, and an independent check of what it accepts.

A reader returns a value or raises a documented error; a check compares the value with what another program reads from the same files and
raises AssertionError.
"""

from __future__ import annotations

import csv
import io
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy

import minilora as ml
from minilora.cli import main
from minilora.cli.flags import parse
from minilora.data.datasets import load_examples
from minilora.data.records import read_records
from minilora.data.text import read_text
from minilora.formats.adapter import load_adapter
from minilora.formats.chat import assistant_spans, render_chat
from minilora.formats.fetch import read_weights
from minilora.formats.gguf import read_gguf, read_gguf_tokenizer
from minilora.formats.tensors import read_tensors, stored_dtypes
from minilora.formats.tokenizer import ByteTokenizer, gguf_tokenizer, load_tokenizer
from minilora.lora import lora_layers
from minilora.runs import checkpoint
from minilora.runs.folder import StudyFolder, lanes_of, read_lines
from minilora.runs.folder import read_records as read_runs
from minilora.runs.recipe import Recipe
from minilora.runs.run_file import run_of
from minilora.runs.study import summarise

from . import corpus, mutate
from .corpus import Files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Mutation = Callable[[random.Random, Files], Files]  # the files that are changed; the others stay
IDS = np.array([1, 5, 2, 10, 0, 7, 7])


@dataclass
class Format:
    name: str
    seeds: list[Files]
    mutation: Mutation
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None] = lambda folder, value: None
    weight: float = 1.0  # the share of the cases
    also: tuple[str, ...] = field(default=())  # names by which an error may call what it is about


# ---- mutations ---------------------------------------------------------------------------------------------------------------------------


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
        if lines[i] and rng.random() < 0.8:
            lines[i] = mutate.dump_json(mutate.mutate_json(rng, json.loads(lines[i]))) if lines[i][:1] in b"{[" else lines[i]
            if rng.random() < 0.02:
                lines[i : i + 1] = [lines[i]] * 2000
        elif rng.random() < 0.3:
            lines.insert(i, rng.choice((b"", b" ", b"\xef\xbb\xbf", b"null", b"[1]", b"[", b"\x00", b"\xff\xfe", b"\r", b"\x0c", b"\x85")))
        else:
            return mutate.mutate_bytes(rng, data, other)
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


# ---- readers and checks ------------------------------------------------------------------------------------------------------------------


def library_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by the safetensors library alone; BF16, which it lacks without ml_dtypes, by hand."""
    n = int.from_bytes(file.read_bytes()[:8], "little")
    entries = json.loads(file.read_bytes()[8 : 8 + n])
    if any(entry.get("dtype") == "BF16" for entry in entries.values()):
        data, found = file.read_bytes()[8 + n :], {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            a, b = entry["data_offsets"]
            if entry["dtype"] == "BF16":
                found[name] = (np.frombuffer(data[a:b], "<u2").astype("<u4") << 16).view("<f4").reshape(entry["shape"])
            else:
                one = {"x": {**entry, "data_offsets": [0, b - a]}}
                head = json.dumps(one).encode()
                found[name] = safetensors.numpy.load(struct.pack("<Q", len(head)) + head + data[a:b])["x"]
        return found
    return safetensors.numpy.load_file(file)


def same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys(), "other names"
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def read_safetensors(folder: Path) -> Any:
    tensors, metadata = read_tensors(folder / "m.safetensors")
    assert stored_dtypes(folder / "m.safetensors").keys() == tensors.keys()
    return tensors, metadata


def check_index(folder: Path, value: Any) -> None:
    places = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    found = {}
    for place in set(places.values()):
        found |= library_tensors(folder / place)
    same_tensors(value, found)
    assert value.keys() == places.keys()


def read_model(folder: Path) -> Any:
    model = ml.load_model(folder, "numpy")
    ids = IDS[: max(1, min(len(IDS), model.config.max_position_embeddings))] % model.config.vocab_size
    with np.errstate(all="ignore"):
        model.forward(ids, keep=False)
    return model


def check_model(folder: Path, model: Any) -> None:
    """Every weight is one of the file, transposed or not, and every size is that of config.json."""
    raw = json.loads((folder / "config.json").read_bytes())
    if "quantization_config" in raw:
        return
    stored = [value for value in library_tensors(folder / "model.safetensors").values() if value.dtype.kind == "f"]
    known = {(shape, part.astype("f4").tobytes()) for value in stored for part in (value, value.T) for shape in (part.shape,)}
    drawn = getattr(model.origin, "drawn", ())
    for path, p in model.parameters():
        if path.rpartition(".")[0] not in drawn:
            assert (p.data.shape, np.ascontiguousarray(p.data, "f4").tobytes()) in known, path
    aliases = {field: alias for alias, field in type(model.config).aliases.items()}
    for name, value in vars(model.config).items():
        given = raw.get(name, raw.get(aliases.get(name, name)))
        assert given is None or name in ("dropout", "rope_theta", "id2label", "num_labels", "problem_type") or given == value, name


def read_gguf_file(folder: Path) -> Any:
    config, tensors = read_gguf(folder / "m.gguf")
    size, vocabulary = read_gguf_tokenizer(folder / "m.gguf")
    tokenizer = gguf_tokenizer(vocabulary, size, folder / "m.gguf")
    return config, tensors, vocabulary, tokenizer.encode("the cat 2024").tolist()


def check_gguf(folder: Path, value: Any) -> None:
    """The tokens and the number of values agree with the library's reader."""
    import gguf

    config, tensors, vocabulary, _ = value
    reader = gguf.GGUFReader(folder / "m.gguf")
    assert vocabulary["tokens"] == reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tensors) == len(reader.tensors)
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert np.array_equal(gguf.dequantize(embedding.data, embedding.tensor_type), tensors["model.embed_tokens.weight"], equal_nan=True)
    assert config["hidden_size"] == reader.fields[f"{config['model_type']}.embedding_length"].contents()


TEXTS = ("the cat 2024 ☃\n<|end|>", "a" * 200, " \t\n naïve日本")


def read_tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder, 400)
    ids = [tokenizer.encode(text).tolist() for text in TEXTS]
    for text, each in zip(TEXTS, ids, strict=True):
        tokenizer.decode(each)
        tokenizer.offsets(text)
    assert tokenizer.stop_ids is not None
    return ids


def check_tokenizer(folder: Path, ids: Any) -> None:
    """The ids of a tokenizer.json alone are the library's own."""
    import tokenizers

    if {file.name for file in folder.iterdir()} == {"tokenizer.json"}:
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.no_padding()
        library.no_truncation()
        assert ids == [library.encode(text).ids for text in TEXTS]
    assert all(0 <= i < 400 for each in ids for i in each)


def read_template(folder: Path) -> Any:
    """A rendering, and the spans of the answers."""
    template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    talk = corpus.small.TALK
    text = render_chat(template, talk, True, bos_token="<s>", eos_token="</s>")
    return template, text, assistant_spans(template, talk, ["<|im_end|>"], eos_token="</s>"), talk


def check_template(folder: Path, value: Any) -> None:
    template, text, (whole, spans), _ = value
    assert isinstance(text, str)
    for start, end in list(spans):
        assert 0 <= start <= end <= len(whole)


def read_talk(folder: Path) -> Any:
    return load_examples(folder / "d.jsonl", "lm", ByteTokenizer(), 200, chat_template=(folder / "t.jinja").read_text(encoding="utf-8"))


class Adapters:
    """Loads adapters into a model that is read once."""

    def __init__(self, base: Path) -> None:
        self.base = ml.load_model(base, "numpy")

    def read(self, folder: Path) -> Any:
        model = self.base.replica().freeze()
        config = load_adapter(model, folder)
        with np.errstate(all="ignore"):
            model.forward(IDS, keep=False)
        return model, config

    def check(self, folder: Path, value: Any) -> None:
        model, _ = value
        stored = library_tensors(folder / "adapter_model.safetensors")
        for path, layer in lora_layers(model):
            for name in ("lora_A", "lora_B"):
                key = f"base_model.model.{path}.{name}.weight"
                if key in stored and hasattr(layer, name):
                    assert np.array_equal(getattr(layer, name).data.T, stored[key].astype("f4")), key


def read_run(folder: Path) -> Any:
    """The run as a function, or as the command line shows it."""
    run = run_of(folder)
    text, out, err = io.StringIO(), sys.stdout, sys.stderr
    sys.stdout, sys.stderr = text, text
    try:
        status = main(["info", str(folder)])
    finally:
        sys.stdout, sys.stderr = out, err
    shown = text.getvalue()
    assert status == 0 or "minilora: error: " in shown, "no message"
    assert "Traceback" not in shown, "a traceback"
    assert not any(ord(c) < 32 and c not in "\n\t\r" or 127 <= ord(c) < 160 for c in shown), "a control character"
    return run


def check_run(folder: Path, run: Any) -> None:
    raw = json.loads((folder / "run.json").read_bytes())
    if run is not None:
        assert run.labels == raw.get("labels")
        assert run.configuration == raw.get("configuration", {})
        for name in ("dtype", "window", "seed"):
            assert name not in run.configuration or getattr(run.recipe, name) == run.configuration[name], name


def read_study(folder: Path) -> Any:
    from dataclasses import asdict

    raw = json.loads((folder / "seed").read_bytes())
    recipe = Recipe(**raw["recipe"])
    lanes_of(folder)
    store = StudyFolder(folder, recipe, raw["rows"], raw["sha256"])
    records = read_runs(folder / "runs.jsonl")
    if records:
        with np.errstate(all="ignore"):
            table = [summarise(row, [r for r in records if r["row"] == row], "accuracy") for row in {r["row"] for r in records}]
        assert all(isinstance(asdict(line), dict) for line in table)
        ml_table(table)
    return store.records


def ml_table(table: Any) -> None:
    from minilora.runs.study import format_table

    format_table(table, "accuracy")


def check_study(folder: Path, records: Any) -> None:
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records == lines


def read_checkpoint(folder: Path) -> Any:
    return checkpoint.read(folder)


def check_checkpoint(folder: Path, state: Any) -> None:
    raw = json.loads((folder / "state.json").read_bytes())
    assert state.step == raw.get("step", 0)
    same_tensors(state.tensors, library_tensors(folder / "state.safetensors"))


def read_metrics(folder: Path) -> Any:
    return read_lines(folder / "metrics.jsonl")


def read_jsonl(folder: Path) -> Any:
    records = list(read_records(folder / "d.jsonl"))
    examples = load_examples(folder / "d.jsonl", "lm", ByteTokenizer(), 64)
    return records, examples


def check_jsonl(folder: Path, value: Any) -> None:
    records, examples = value
    text = (folder / "d.jsonl").read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        expected = json.loads(text)
    else:
        expected = [json.loads(line.removeprefix("\ufeff")) for line in text.split("\n") if line.removeprefix("\ufeff").strip()]
    assert json.dumps([record for _, record in records]) == json.dumps(expected)
    assert len(examples) == len(expected)
    for example in examples:
        assert 0 < len(example.ids) <= 64
        assert (example.labels != -100).any()


def read_table(folder: Path) -> Any:
    file = next(file for file in folder.iterdir() if file.suffix in (".csv", ".tsv"))
    return list(read_records(file)), load_examples(file, "classify", ByteTokenizer(), 64, labels=["x", "y", "z"])


def check_table(folder: Path, value: Any) -> None:
    file = next(file for file in folder.iterdir() if file.suffix in (".csv", ".tsv"))
    text = file.read_bytes().decode("utf-8-sig")
    csv.field_size_limit(10**9)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",") if row]
    rows = [row for row in rows if len(row) > 1 or row[0].strip()]
    names = [name.strip().removeprefix("\ufeff") for name in rows[0]]
    assert [list(record.values()) for _, record in value[0]] == rows[1:]
    assert all(list(record) == names for _, record in value[0])
    assert [int(example.labels[0]) for example in value[1]] == [("x", "y", "z", "0", "1", "2").index(r["label"].strip()) % 3 for _, r in value[0]]


def read_toml(folder: Path) -> Any:
    args = parse(["finetune", "--config", str(folder / "r.toml")])
    known = {name: value for name, value in vars(args).items() if value is not None and name in Recipe.__dataclass_fields__}
    try:
        return args, Recipe(**known)
    except ValueError:  # of the setting, as the command line says it
        return args, None


def check_toml(folder: Path, value: Any) -> None:
    args, _ = value
    raw = tomllib.loads((folder / "r.toml").read_bytes().decode("utf-8-sig"))
    names = {"rank": "r", "alpha": "lora_alpha", "max_length": "window", "init": "init_lora_weights"}
    for name, given in raw.items():
        dest = names.get(name.replace("-", "_"), name.replace("-", "_"))
        found = getattr(args, dest)
        assert found == given or isinstance(given, str) or (found is None and given is False) or given is False, name


def read_plain(folder: Path) -> Any:
    return read_text(next(file for file in folder.iterdir() if file.suffix in (".txt", ".gz")))


def check_plain(folder: Path, value: Any) -> None:
    import gzip

    file = next(file for file in folder.iterdir() if file.suffix in (".txt", ".gz"))
    data = file.read_bytes() if file.suffix == ".txt" else gzip.decompress(file.read_bytes())
    assert value.tobytes() == data.decode("utf-8-sig").removeprefix("\ufeff").encode()


# ---- the table ---------------------------------------------------------------------------------------------------------------------------

TEMPLATES = [
    corpus.small.CHATML,
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m.content | trim }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% set ns.x = ns.x + 1 %}{% endfor %}",
    "{%- macro show(m) -%}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{%- endmacro -%}{% for m in messages %}{{ show(m) }}{% endfor %}"
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}",
]
PIECES = """{{_'a'_*_10**9_}}|{{_10**10**8_}}|{{_'x'.center(10**9)_}}|{{_'%1000000000d'_%_1_}}|{{_'{:1000000000}'.format(1)_}}|{{_range(10**9)_|_list_}}
{%_for_a_in_range(99999)_%}{%_for_b_in_range(99999)_%}{%_endfor_%}{%_endfor_%}|{%_macro_f()_%}{{_f()_}}{%_endmacro_%}{{_f()_}}
{%_macro_g()_%}{{_g()_}}{{_g()_}}{%_endmacro_%}{{_g()_}}|{{_messages.__class__.__mro___}}|{{_''.__class__.__base__.__subclasses__()_}}
{{_cycler.__init__.__globals__.os.popen('id').read()_}}|{{_self.__init__.__globals___}}|{{_lipsum(n=99999)_}}|{{_raise_exception('no')_}}
{{_strftime_now('%Y')_}}|{{_strftime_now('%9999999d')_}}|{%_include_'/etc/passwd'_%}|{%_import_'os'_as_os_%}|{%_extends_'x'_%}
{{_messages|tojson(indent=999999999)_}}|{{_messages.append(1)_}}|{{_namespace(__class__=1)_}}|{{_dict(a=1).update(b=2)_}}|{{_['a'*99999]*99999_}}
{%_set_ns=namespace(x='a')_%}{%_for_i_in_range(40)_%}{%_set_ns.x=ns.x~ns.x_%}{%_endfor_%}{{_ns.x_}}|{%_set_ns=namespace(x='a')_%}{%_for_i_in_range(40)_%}{%_set_ns.x=ns.x+ns.x_%}{%_endfor_%}
{{_messages|map(attribute='content')|join('x'*99999)_}}|{{_'a'.replace('a','b'*9999).replace('b','c'*99999)_}}|{{_(1,2)|batch(10**9,0)|list_}}
{%_if_true_%}|{%_endif_%}|{%_for_m_in_messages_%}|{%_endfor_%}|{%_generation_%}|{%_endgeneration_%}|{%-|-%}|{{|}}|{#|#}|{%_break_%}|{%_continue_%}
{%_raw_%}|{%_endraw_%}|{%_set_messages=[]_%}|{{_loop.index_}}|{{_m_}}|{{_undefined.x_}}|{{_1/0_}}|{{_'a'[10**30:]_}}|{{_-1**0.5_}}|{{_messages[99]_}}
{{_messages|sum_}}|{{_messages|sort_}}|{{_'%s'|format(messages)_}}|{{_'{0.__class__}'.format(1)_}}|{{_caller()_}}|{%_call_show(1)_%}|{%_endcall_%}|{{_((((((((1))))))))_}}
{%_filter_upper_%}|{%_endfilter_%}|{%_autoescape_true_%}|{%_endautoescape_%}|\x1b[2J|\ud800|\ufdd0|\ufdd1|<|im_end|>|</s>|a|_|=|~|+|[|]|(|)|'|"|\\|.|0|9999999999999999999999"""
WORDS = [piece.replace("_", " ") if "__" not in piece else piece for line in PIECES.split("\n") for piece in line.split("|")]
DEEP = ["(" * 3000, "{% if 1 %}" * 300, "[" * 5000, "{{ " + "-" * 20000 + "1 }}", "{{ " + "a." * 3000 + "a }}", "{{ " + "1+" * 5000 + "1 }}"]

CSV_WORDS = [*',;\t"\n\r ', '""', '"\n', "\r\n", "\x00", "\ufeff", "label", "text", "a,b", "9" * 4301, "1.5", "nan", "x", "-1", "1_0", "\x1b[2J", "\ud800"]
TOML_WORDS = [
    *("rank = 8\n", "r = 4\n", "steps = 3\n", "[x]\n", "[[x]]\n", "seed = -1\n", "lr = nan\n", "lr = inf\n", "lr = 1e999\n", "epochs = inf\n"),
    *("lr = " + "9" * 400 + "\n", "steps = " + "9" * 4301 + "\n", "data = [" + "[" * 1000 + "]" * 1001 + "\n", 'model = "\\u001b[2J"\n'),
    *("window = 1979-05-27\n", "window = 1979-05-27T07:32:00Z\n", "window = 0x10\n", "x.y = 1\n", 'data = """a\nb"""\n', "r = true\n"),
    *("target-modules = [1]\n", 'target-modules = "a,b"\n', 'layers-to-transform = "1,x"\n', "layers-to-transform = [1, 2]\n", "use-dora = true\n"),
    *("'", '"', "=", "[", "]", "{", "}", "#", ".", ",", "\n", "\\", "\x00", "\x1b[2J", "é", "-", "_", "0", "1", "true", "a.b.c." * 2000 + "x = 1\n"),
    *("modules-to-save = " + "[" * 400 + "]" * 400 + "\n", "config = 'x'\n", "help = 1\n", "json = true\n", "debug = true\n", "quantize = 'nf4'\n"),
]
TEXT_WORDS = ["\x00", "\ufeff", "\n", "\r\n", '{"text": "a"}\n', "[" * 100_000, '{"a":' * 5000, "\ud800", "é", " ", "x" * 5000, "\x1b[2J"]
RECORDS = [
    {"text": "the cat sat"},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"text": "on the mat ☃", "id": 3, "meta": {"a": [1, None]}},
]
TALKS = [
    {"messages": corpus.small.TALK},
    {"messages": [{"role": "system", "content": "s"}, *corpus.small.TALK], "tools": [{"name": "f", "args": [1]}]},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1}, *corpus.small.TALK * 3]},
]


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def longer(change: Callable[..., bytes]) -> Callable[[random.Random, bytes, bytes], bytes]:
    """Sometimes a conversation of thousands of turns."""

    def mutated(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
        if rng.random() < 0.002:
            return lines([{"messages": corpus.small.TALK * rng.choice((100, 800, 4000))}])
        return change(rng, data, other)

    return mutated


def all_formats() -> dict[str, Format]:
    """{name: Format}. Makes the corpus, which takes a second."""
    work = Path(tempfile.mkdtemp(prefix="minilora-corpus-"))
    models = corpus.models(work)
    adapters = Adapters(work / "llama")
    bits = safetensors.numpy.save({"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.arange(3, dtype="i8"), "c": np.zeros((0, 4), "f2")})
    named = safetensors.numpy.save({"x": np.ones((4, 4), "f8"), "flag": np.array([True])}, {"format": "pt", "minilora.base": "ab:cd:ef"})
    llama = safetensors.numpy.load(models["llama"]["model.safetensors"])
    names = sorted(llama)
    parts = {"s1.safetensors": names[:5], "s2.safetensors": names[5:]}
    shards = {file: safetensors.numpy.save({name: llama[name] for name in held}) for file, held in parts.items()}
    weight_map = {name: file for file, held in parts.items() for name in held}
    shards["model.safetensors.index.json"] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    trees = {kind: corpus.gguf(kind) for kind in ("llama", "qwen2")}
    run = {
        "version": "0.1.0",
        "configuration": {"model": str(work / "bert"), "dtype": "float32", "quantize": "", "data": "d.csv", "task": "classify", "window": 64}
        | {"mask_prompt": True, "encoding": "utf-8", "seed": 0, "train_size": None, "eval_size": 8, "batch_size": 8, "lr": 0.001},
        "labels": ["x", "y", "z"],
        "trained_on": {"sha256": "ab", "sequences": 9},
        "results": {"headline": "accuracy", "before": {"accuracy": 0.3, "loss": None}, "after": {"accuracy": 0.9, "loss": 0.2}, "steps": 3},
    }
    rows = {"lora": {"method": "lora"}, "full": {"method": "full"}}
    record = {"row": "lora", "seed": 0, "trained": 10, "steps": 3, "failed": False, "value": 0.5, "seconds": 1.5, "measured": {"loss": 1.0}}
    recipe = {"data": "d.jsonl", "steps": 3}
    study: Files = {"seed": json.dumps({"recipe": recipe, "rows": rows, "sha256": "ab"}).encode()}
    StudyFolder(work / "study", Recipe(**recipe), rows, "ab").begin()
    study |= corpus.read_folder(work / "study")
    study["runs.jsonl"] = lines([record, {**record, "seed": 1, "value": None, "failed": True, "why": "diverged"}, {**record, "row": "full"}])
    state = checkpoint.State(step=3, updates=3, batches=3, parameters={"a": [2]}, tensors={"data": np.ones(2, "f4"), "m": np.zeros(2, "f4")})
    checkpoint.write(work, state)
    saved = corpus.read_folder(work / "checkpoints" / "step-00000003")
    template = {"t.jinja": corpus.small.CHATML.encode()}
    table = b'text,label\nthe cat,x\n"a ""quoted"", one\nof two lines",y\nlast,z\n'
    toml = b'model = "pydoc"\nrank = 4\nlr = 0.001\nsteps = 20\ntarget-modules = ["c_attn"]\nuse-dora = true\nschedule = "cosine"\n'
    metrics = lines([{"step": i, "loss": 1.0 / (i + 1), "lr": 1e-3, "grad_norm": 0.5, "tokens": 64} for i in range(4)])
    import gzip

    plain = {"a.txt": "def f(x):\n    return x  # naïve ☃\n".encode() * 3}
    found = [
        Format("safetensors", [{"m.safetensors": bits}, {"m.safetensors": named}], one_of(safetensors=tensors_file), read_safetensors,
               lambda folder, value: same_tensors(value[0], library_tensors(folder / "m.safetensors")), 12),
        Format("index", [shards], one_of(json=json_file, safetensors=tensors_file), read_weights, check_index, 6),
        Format("config", [{name: data for name, data in files.items() if name in ("config.json", "model.safetensors")}
               for files in models.values()], one_of(json=json_file, safetensors=tensors_file), read_model, check_model, 8),
        Format("gguf", [{"m.gguf": kind.encode()} for kind in trees], lambda rng, files:
               {"m.gguf": gguf_file(rng, trees[files["m.gguf"].decode()])}, read_gguf_file, check_gguf, 5),
        Format("tokenizer", list(corpus.tokenizers(work / "tokenizers").values()), one_of(json=json_file), read_tokenizer, check_tokenizer, 4),
        Format("template", [{"chat_template.jinja": text.encode()} for text in TEMPLATES],
               one_of(jinja=text_file([*WORDS, *DEEP])), read_template, check_template, 6, ("the chat template",)),
        Format("conversation", [{"d.jsonl": lines([talk]), **template} for talk in TALKS], one_of(jsonl=longer(lines_file)), read_talk,
               weight=6),
        Format("adapter", list(corpus.adapters(work / "adapters", work / "llama").values()), one_of(json=json_file, safetensors=tensors_file),
               adapters.read, adapters.check, 8),
        Format("run", [{"run.json": json.dumps(run).encode()}], one_of(json=json_file), read_run, check_run, 8),
        Format("study", [study], one_of(json=json_file, jsonl=lines_file), read_study, check_study, 8),
        Format("checkpoint", [saved], one_of(json=json_file, safetensors=tensors_file), read_checkpoint, check_checkpoint, 6),
        Format("metrics", [{"metrics.jsonl": metrics}], one_of(jsonl=lines_file), read_metrics, weight=4),
        Format("jsonl", [{"d.jsonl": lines(RECORDS[i:])} for i in range(3)] + [{"d.jsonl": json.dumps(RECORDS).encode()}],
               one_of(jsonl=lines_file), read_jsonl, check_jsonl, 12),
        Format("csv", [{"d.csv": table}, {"d.tsv": table.replace(b",", b"\t")}], one_of(csv=text_file(CSV_WORDS), tsv=text_file(CSV_WORDS)),
               read_table, check_table, 12),
        Format("toml", [{"r.toml": toml}], one_of(toml=text_file(TOML_WORDS)), read_toml, check_toml, 4),
        Format("text", [plain, {"a.txt.gz": gzip.compress(plain["a.txt"], mtime=0)}],
               one_of(txt=text_file(TEXT_WORDS), gz=mutate.mutate_bytes), read_plain, check_plain, 10),
    ]
    return {each.name: each for each in found}


STATE = SimpleNamespace()
