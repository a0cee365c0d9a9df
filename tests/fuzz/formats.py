"""What is read, one Format each: the files it starts from, how they are changed, the reader, and the check of what it accepts."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from minilora.formats.fetch import read_weights
from minilora.runs import checkpoint
from minilora.runs.folder import StudyFolder
from minilora.runs.recipe import Recipe

from . import corpus, mutate
from .changes import Mutation, gguf_file, json_file, lines_file, one_of, tensors_file, text_file
from .corpus import Files
from .readers import (
    Adapters,
    check_checkpoint,
    check_gguf,
    check_index,
    check_jsonl,
    check_model,
    check_plain,
    check_report,
    check_run,
    check_study,
    check_table,
    check_talk,
    check_template,
    check_tokenizer,
    check_toml,
    library_tensors,
    read_checkpoint,
    read_gguf_file,
    read_jsonl,
    read_metrics,
    read_model,
    read_plain,
    read_report,
    read_run,
    read_safetensors,
    read_study,
    read_table,
    read_talk,
    read_template,
    read_tokenizer,
    read_toml,
    same_tensors,
)


@dataclass
class Format:
    name: str
    seeds: list[Files]
    mutation: Mutation
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None] = lambda folder, value: None
    weight: float = 1.0
    also: tuple[str, ...] = field(default=())  # names by which an error may call what it is about


# ---- the table ---------------------------------------------------------------------------------------------------------------------------

TEMPLATES = [
    corpus.small.CHATML,
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m.content | trim }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% set ns.x = ns.x + 1 %}{% endfor %}",
    "{%- macro show(m) -%}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{%- endmacro -%}{% for m in messages %}{{ show(m) }}{% endfor %}"
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}",
]
WEIGHTS = {  # of the cases; those that take longer get fewer
    **{"safetensors": 12, "index": 8, "config": 3, "gguf": 5, "tokenizer": 4, "template": 6, "conversation": 6, "adapter": 3},
    **{"mlx": 3, "gguf-adapter": 3},
    **{"run": 3, "report": 0.2, "study": 12, "checkpoint": 10, "metrics": 6, "jsonl": 14, "csv": 14, "toml": 2, "text": 14},
}
PIECES = """{{_'a'_*_10**9_}}|{{_10**10**8_}}|{{_'x'.center(10**9)_}}|{{_'%1000000000d'_%_1_}}|{{_'{:1000000000}'.format(1)_}}
{{_range(10**9)_}}
{%_for_a_in_range(99999)_%}{%_for_b_in_range(99999)_%}{%_endfor_%}{%_endfor_%}|{%_macro_f()_%}{{_f()_}}{%_endmacro_%}{{_f()_}}
{%_macro_g()_%}{{_g()_}}{{_g()_}}{%_endmacro_%}{{_g()_}}|{{_messages.__class__.__mro___}}|{{_''.__class__.__base__.__subclasses__()_}}
{{_cycler.__init__.__globals__.os.popen('id').read()_}}|{{_self.__init__.__globals___}}|{{_lipsum(n=99999)_}}|{{_raise_exception('no')_}}
{{_strftime_now('%Y')_}}|{{_strftime_now('%9999999d')_}}|{%_include_'/etc/passwd'_%}|{%_import_'os'_as_os_%}|{%_extends_'x'_%}
{{_messages|tojson(indent=999999999)_}}|{{_messages.append(1)_}}|{{_namespace(__class__=1)_}}|{{_dict(a=1).update(b=2)_}}|{{_['a'*99999]*99999_}}
{%_set_ns=namespace(x='a')_%}{%_for_i_in_range(40)_%}{%_set_ns.x=ns.x~ns.x_%}{%_endfor_%}{{_ns.x_}}
{%_set_ns=namespace(x='a')_%}{%_for_i_in_range(40)_%}{%_set_ns.x=ns.x+ns.x_%}{%_endfor_%}
{{_messages|map(attribute='content')|join('x'*99999)_}}|{{_'a'.replace('a','b'*9999).replace('b','c'*99999)_}}|{{_(1,2)|batch(10**9,0)|list_}}
{%_if_true_%}|{%_endif_%}|{%_for_m_in_messages_%}|{%_endfor_%}|{%_generation_%}|{%_endgeneration_%}|{%-|-%}|{{|}}|{#|#}|{%_break_%}|{%_continue_%}
{%_raw_%}|{%_endraw_%}|{%_set_messages=[]_%}|{{_loop.index_}}|{{_m_}}|{{_undefined.x_}}|{{_1/0_}}|{{_'a'[10**30:]_}}|{{_-1**0.5_}}|{{_messages[99]_}}
{{_messages|sum_}}|{{_messages|sort_}}|{{_'%s'|format(messages)_}}|{{_'{0.__class__}'.format(1)_}}|{{_caller()_}}|{%_call_show(1)_%}|{%_endcall_%}|{{_((((((((1))))))))_}}
{%_filter_upper_%}|{%_endfilter_%}|{%_autoescape_true_%}|{%_endautoescape_%}|\x1b[2J|\ud800|\ufdd0|\ufdd1|<|im_end|>|</s>|a|_|=|~|+|[|]|(|)|'|"|\\|.|0|9999999999999999999999"""
WORDS = [piece.replace("_", " ") if "__" not in piece else piece for line in PIECES.split("\n") for piece in line.split("|")]
DEEP = [
    "(" * 3000,
    "{% if 1 %}" * 300,
    "[" * 5000,
    "{{ " + "-" * 20000 + "1 }}",
    "{{ " + "a." * 3000 + "a }}",
    "{{ " + "1+" * 5000 + "1 }}",
]

CSV_WORDS = [
    *',;\t"\n\r ',
    '""',
    '"\n',
    "\r\n",
    "\x00",
    "\ufeff",
    "label",
    "text",
    "a,b",
    "9" * 4301,
    "1.5",
    "nan",
    "x",
    "-1",
    "1_0",
    "\x1b[2J",
    "\ud800",
]
TOML_WORDS = [
    *(
        "rank = 8\n",
        "r = 4\n",
        "steps = 3\n",
        "[x]\n",
        "[[x]]\n",
        "seed = -1\n",
        "lr = nan\n",
        "lr = inf\n",
        "lr = 1e999\n",
        "epochs = inf\n",
    ),
    *("lr = " + "9" * 400 + "\n", "steps = " + "9" * 4301 + "\n", "data = [" + "[" * 1000 + "]" * 1001 + "\n", 'model = "\\u001b[2J"\n'),
    *("window = 1979-05-27\n", "window = 1979-05-27T07:32:00Z\n", "window = 0x10\n", "x.y = 1\n", 'data = """a\nb"""\n', "r = true\n"),
    *(
        "target-modules = [1]\n",
        'target-modules = "a,b"\n',
        'layers-to-transform = "1,x"\n',
        "layers-to-transform = [1, 2]\n",
        "use-dora = true\n",
    ),
    *(
        "'",
        '"',
        "=",
        "[",
        "]",
        "{",
        "}",
        "#",
        ".",
        ",",
        "\n",
        "\\",
        "\x00",
        "\x1b[2J",
        "é",
        "-",
        "_",
        "0",
        "1",
        "true",
        "a.b.c." * 2000 + "x = 1\n",
    ),
    *(
        "modules-to-save = " + "[" * 400 + "]" * 400 + "\n",
        "config = 'x'\n",
        "help = 1\n",
        "json = true\n",
        "debug = true\n",
        "quantize = 'nf4'\n",
    ),
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
    trees = {kind: corpus.gguf(kind) for kind in ("llama", "qwen2", "gemma3", "scaled")}
    trees |= {kind: corpus.gguf_encoder(kind) for kind in ("bert", "xlm-roberta", "modernbert")}
    run = {
        "version": "0.1.0",
        "configuration": {
            "model": str(work / "bert"),
            "dtype": "float32",
            "quantize": "",
            "data": "d.csv",
            "task": "classify",
            "window": 64,
        }
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
    study["runs.jsonl"] = lines(
        [record, {**record, "seed": 1, "value": None, "failed": True, "why": "diverged"}, {**record, "row": "full"}]
    )
    state = checkpoint.State(
        step=3, updates=3, batches=3, parameters={"a": [2]}, tensors={"data": np.ones(2, "f4"), "m": np.zeros(2, "f4")}
    )
    checkpoint.write(work, state)
    saved = corpus.read_folder(work / "checkpoints" / "step-00000003")
    names = ["a.weight", "b.bias"]
    norms = [{"parameters": names}, *({"step": i, "grad_norms": [0.1, 0.2], "norms": [1.0, 2.0]} for i in (1, 4))]
    measured: Files = {
        "run.json": json.dumps(run).encode(),
        "metrics.jsonl": lines([{"step": i, "loss": 1.0 / i, "lr": 1e-3, "grad_norm": 0.5, "tokens": 64} for i in (1, 2, 3, 4)]),
        "norms.jsonl": lines(norms),
        "confusion.json": json.dumps({"before": [[1, 2, 0], [0, 1, 0], [1, 1, 1]], "after": [[3, 0], [0, 1]]}).encode(),
    }
    template = {"t.jinja": corpus.small.CHATML.encode()}
    table = b'text,label\nthe cat,x\n"a ""quoted"", one\nof two lines",y\nlast,z\n'
    toml = b'model = "pydoc"\nrank = 4\nlr = 0.001\nsteps = 20\ntarget-modules = ["c_attn"]\nuse-dora = true\nschedule = "cosine"\n'
    metrics = lines([{"step": i, "loss": 1.0 / (i + 1), "lr": 1e-3, "grad_norm": 0.5, "tokens": 64} for i in range(4)])
    import gzip

    plain = {"a.txt": "def f(x):\n    return x  # naïve ☃\n".encode() * 3}
    found = [
        Format(
            "safetensors",
            [{"m.safetensors": bits}, {"m.safetensors": named}],
            one_of(safetensors=tensors_file),
            read_safetensors,
            lambda folder, value: same_tensors(value[0], library_tensors(folder / "m.safetensors")),
        ),
        Format("index", [shards], one_of(json=json_file, safetensors=tensors_file), read_weights, check_index),
        Format(
            "config",
            [{name: data for name, data in files.items() if name in ("config.json", "model.safetensors")} for files in models.values()],
            one_of(json=json_file, safetensors=tensors_file),
            read_model,
            check_model,
        ),
        Format(
            "gguf",
            [{"m.gguf": kind.encode()} for kind in trees],
            lambda rng, files: {"m.gguf": gguf_file(rng, trees[files["m.gguf"].decode()])},
            read_gguf_file,
            check_gguf,
        ),
        Format(
            "tokenizer", list(corpus.tokenizers(work / "tokenizers").values()), one_of(json=json_file), read_tokenizer, check_tokenizer, 4
        ),
        Format(
            "template",
            [{"chat_template.jinja": text.encode()} for text in TEMPLATES],
            one_of(jinja=text_file([*WORDS, *DEEP])),
            read_template,
            check_template,
            also=("the chat template",),
        ),
        Format(
            "conversation",
            [{"d.jsonl": lines([talk]), **template} for talk in TALKS],
            one_of(jsonl=longer(lines_file)),
            read_talk,
            check_talk,
        ),
        Format(
            "adapter",
            list(corpus.adapters(work / "adapters", work / "llama").values()),
            one_of(json=json_file, safetensors=tensors_file),
            adapters.read,
            adapters.check,
        ),
        Format("run", [{"run.json": json.dumps(run).encode()}], one_of(json=json_file), read_run, check_run),
        Format("report", [measured], one_of(json=json_file, jsonl=lines_file), read_report, check_report),
        Format("study", [study], one_of(json=json_file, jsonl=lines_file), read_study, check_study),
        Format("checkpoint", [saved], one_of(json=json_file, safetensors=tensors_file), read_checkpoint, check_checkpoint),
        Format("metrics", [{"metrics.jsonl": metrics}], one_of(jsonl=lines_file), read_metrics),
        Format(
            "jsonl",
            [{"d.jsonl": lines(RECORDS[i:])} for i in range(3)] + [{"d.jsonl": json.dumps(RECORDS).encode()}],
            one_of(jsonl=lines_file),
            read_jsonl,
            check_jsonl,
        ),
        Format(
            "csv",
            [{"d.csv": table}, {"d.tsv": table.replace(b",", b"\t")}],
            one_of(csv=text_file(CSV_WORDS), tsv=text_file(CSV_WORDS)),
            read_table,
            check_table,
        ),
        Format("toml", [{"r.toml": toml}], one_of(toml=text_file(TOML_WORDS)), read_toml, check_toml),
        Format(
            "text",
            [plain, {"a.txt.gz": gzip.compress(plain["a.txt"], mtime=0)}],
            one_of(txt=text_file(TEXT_WORDS), gz=mutate.mutate_bytes),
            read_plain,
            check_plain,
        ),
    ]
    found += [
        Format(
            "mlx",
            [corpus.mlx_adapter(work / "mlx", work / "llama")],
            one_of(json=json_file, safetensors=tensors_file),
            adapters.read,
            adapters.check_mlx,
        ),
        Format(
            "gguf-adapter",
            [{"a.gguf": b""}],
            lambda rng, _: {"a.gguf": gguf_file(rng, corpus.gguf_adapter())},
            lambda folder: adapters.read(folder / "a.gguf"),
            adapters.check_gguf,
        ),
    ]
    for each in found:
        each.weight = WEIGHTS.get(each.name, 1)
    return {each.name: each for each in found}
