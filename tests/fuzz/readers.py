"""The readers, and for each an independent check of what it accepts: what another program reads from the same files.

A reader returns a value or raises a documented error; a check raises AssertionError.
"""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jinja2.sandbox import ImmutableSandboxedEnvironment

import minilora as ml
from minilora.cli import main
from minilora.cli.flags import parse
from minilora.data.datasets import load_examples
from minilora.data.records import read_records
from minilora.data.text import read_text
from minilora.formats.adapter import load_adapter
from minilora.formats.chat import assistant_spans, render_chat
from minilora.formats.gguf import read_gguf, read_gguf_tokenizer
from minilora.formats.tensors import map_tensors, stored_dtypes
from minilora.formats.tokenizer import ByteTokenizer, gguf_tokenizer, load_tokenizer
from minilora.lora import lora_layers
from minilora.quantization.nf4 import is_nf4
from minilora.report.page import report_run
from minilora.runs import checkpoint
from minilora.runs.folder import StudyFolder, lanes_of, read_lines
from minilora.runs.recipe import Recipe
from minilora.runs.run_file import run_of
from minilora.runs.study import summarise

from . import corpus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IDS = np.array([1, 5, 2, 10, 0, 7, 7])


def library_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by the safetensors library alone; BF16, which it lacks without ml_dtypes, by hand."""
    n = int.from_bytes(file.read_bytes()[:8], "little")
    entries = json.loads(file.read_bytes()[8 : 8 + n])
    if any(entry.get("dtype") == "BF16" for name, entry in entries.items() if name != "__metadata__"):
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
    tensors, metadata = map_tensors(folder / "m.safetensors")
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
        if path.rpartition(".")[0] not in drawn and not is_nf4(p.data):
            assert (p.data.shape, np.ascontiguousarray(p.data, "f4").tobytes()) in known, path
    aliases = {field: alias for alias, field in type(model.config).aliases.items()}
    for name, value in vars(model.config).items():
        given = raw.get(name, raw.get(aliases.get(name, name)))
        unread = ("sliding_window", "max_window_layers", "layer_types")  # by some model types
        derived = ("dropout", "rope_theta", "rope_scaling", "rope_local_base_freq", "id2label", "num_labels", "problem_type", *unread)
        assert given is None or name in derived or given == value, name


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
    fused = sum("attn_qkv" in tensor.name for tensor in reader.tensors) if config["model_type"] != "modernbert" else 0
    assert len(tensors) == len([tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"]) + 2 * fused
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    read = next(value for name, value in tensors.items() if re.search(r"(embed_tokens|word_embeddings|tok_embeddings)\.weight$", name))
    assert np.array_equal(gguf.dequantize(embedding.data, embedding.tensor_type), read, equal_nan=True)
    width = reader.fields[f"{reader.fields['general.architecture'].contents()}.embedding_length"].contents()
    assert width == config.get("hidden_size", config.get("dim"))


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
    whole, spans = assistant_spans(template, talk, ["<|im_end|>"], eos_token="</s>")
    return text, whole, list(spans)


def check_template(folder: Path, value: Any) -> None:
    """The spans lie in the text, and a template without functions of transformers is rendered by jinja2 alone."""
    text, whole, spans = value
    template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    if not any(name in template for name in ("generation", "namespace", "raise_", "strftime", "tojson", "dict", "__", "lipsum")):
        plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        more = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None, "add_generation_prompt": True}
        assert text == plain.from_string(template).render(messages=corpus.small.TALK, **more)
    for start, end in spans:
        assert 0 <= start <= end <= len(whole)


def read_talk(folder: Path) -> Any:
    return load_examples(folder / "d.jsonl", "lm", ByteTokenizer(), 200, chat_template=(folder / "t.jinja").read_text(encoding="utf-8"))


def check_talk(folder: Path, examples: Any) -> None:
    """The ids are the bytes of the conversation, written without jinja2."""
    for record, example in zip(json_records(folder / "d.jsonl"), examples, strict=True):
        if "messages" in record:
            parts = (f"<|im_start|>{m['role']}\n{m.get('content') or ''}<|im_end|>\n" for m in record["messages"])
            assert bytes(example.ids.tolist()) == "".join(parts).encode()[: len(example.ids)]
            assert len(example.ids) <= 200


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

    def check_mlx(self, folder: Path, value: Any) -> None:
        model, _ = value
        stored = library_tensors(folder / "adapters.safetensors")
        for path, layer in lora_layers(model):
            for name in ("lora_A", "lora_B"):
                assert np.array_equal(getattr(layer, name).data, stored[f"{path}.{name.lower()}"].astype("f4")), path

    def check_gguf(self, folder: Path, value: Any) -> None:
        """By the library: what it reads of A is what was loaded."""
        import gguf

        model, _ = value
        stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(folder / "a.gguf").tensors}
        for path, layer in lora_layers(model):
            name = f"blk.0.attn_{path[-6]}.weight.lora_a"
            assert np.array_equal(layer.lora_A.data.T, stored[name]), path


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
    assert not any((ord(c) < 32 and c not in "\n\t\r") or 127 <= ord(c) < 160 for c in shown), "a control character"
    return run


def read_report(folder: Path) -> Any:
    """The page about a run."""
    with np.errstate(all="ignore"):
        report_run(folder, out=folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def check_report(folder: Path, page: Any) -> None:
    """Text of the files cannot become a part of the page."""
    assert "<b>hostile" not in page


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
    records = store.records
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
    assert records == json_records(folder / "runs.jsonl")


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


def json_records(file: Path) -> list[Any]:
    """What json reads of a file of records."""
    text = file.read_bytes().decode("utf-8-sig") if file.is_file() else ""
    if text.lstrip().startswith("["):
        return json.loads(text)
    lines = (line.removeprefix("\ufeff").strip() for line in text.split("\n"))
    return [json.loads(line) for line in lines if line]


def check_jsonl(folder: Path, value: Any) -> None:
    records, examples = value
    expected = json_records(folder / "d.jsonl")
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
    assert [int(example.labels[0]) for example in value[1]] == [
        ("x", "y", "z", "0", "1", "2").index(r["label"].strip()) % 3 for _, r in value[0]
    ]


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
        assert found == given or found != found or isinstance(given, str) or (found is None and given is False) or given is False, name


def read_plain(folder: Path) -> Any:
    return read_text(next(file for file in folder.iterdir() if file.suffix in (".txt", ".gz")))


def check_plain(folder: Path, value: Any) -> None:
    import gzip

    file = next(file for file in folder.iterdir() if file.suffix in (".txt", ".gz"))
    data = file.read_bytes() if file.suffix == ".txt" else gzip.decompress(file.read_bytes())
    assert value.tobytes() == data.decode("utf-8-sig").removeprefix("\ufeff").encode()
