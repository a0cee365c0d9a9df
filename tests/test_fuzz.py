"""A few thousand cases of the fuzzer with a fixed seed, and inputs it found or that were found before it; see docs/fuzz.md."""

import ast
import gzip
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

import minilora as ml
from minilora.data.records import read_bytes
from minilora.formats import sandbox
from minilora.formats.chat import render_chat
from minilora.formats.gguf import read_gguf
from minilora.runs.checkpoint import read
from minilora.runs.folder import StudyFolder, read_lines
from minilora.runs.recipe import Recipe

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fuzzer reads memory from /proc")
TALK = [{"role": "user", "content": "Hi"}]


def test_a_thousand_cases():
    pytest.importorskip("gguf")
    from fuzz.__main__ import failures, run

    found = run(cases=1000, seed=3, jobs=2, quiet=True)
    assert not failures(found)
    assert sum(sum(each["counts"].values()) for each in found.values()) >= 990
    for name, each in found.items():
        assert each["counts"].get("accepted", 0) > 0, f"{name}: every mutated file was refused"
        if name not in ("metrics", "report"):  # which show what there is of a damaged file
            assert each["counts"].get("refused", 0) > 0, f"{name}: every mutated file was accepted"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'x'.center(10**9) }}",
        "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'ab' * 2000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 3000,
    ],
)
def test_a_template_has_limits(template):
    began = time.process_time()
    with pytest.raises(ValueError, match=r"the chat template (takes more than 1 s or 64 MB|needs more than 64 MB|writes|is nested)"):
        render_chat(template, TALK)
    assert time.process_time() - began < 1
    assert render_chat("{{ messages[0].content }}", TALK) == "Hi"  # the next one runs as if nothing had happened


def test_the_process_of_templates_is_started_again():
    assert sandbox.render("{{ 1 }}", {}) == "1"
    [process] = sandbox._processes.values()
    process.kill()
    process.wait()
    assert sandbox.render("{{ 2 }}", {}) == "2"


def test_an_interrupted_request_does_not_answer_the_next_one():
    def interrupt(*args):
        raise KeyboardInterrupt

    assert sandbox.render("{{ 1 }}", {}) == "1"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sandbox.render("{{ 2 }}", {}) == "2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "(.+)+!"}, "matching its expressions takes too long"),
        ({"target_modules": r"((\w|\w|\.)+)+!|.*q_proj"}, "matching its expressions takes too long"),
        ({"rank_pattern": {"(.+)+!": 3}}, "matching its expressions takes too long"),
        ({"modules_to_save": ["(?i)norm"]}, "modules_to_save='(?i)norm' is not a regular expression"),
        ({"rank_pattern": {"a{99999999999}": 3}}, "is not a regular expression"),
        ({"exclude_modules": "(" * 500 + ")" * 500}, "is not a regular expression"),
    ],
)
def test_expressions_of_an_adapter_have_limits(changes, message, tmp_path):
    model = ml.GPT2(ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3), rng=0)
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["c_attn"]), rng=0)
    ml.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    base = ml.GPT2(model.config, rng=0)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{re.escape(message)}"):
        ml.load_adapter(base, tmp_path)


def test_an_array_in_a_gguf_file_takes_no_more_memory_than_in_the_file(tmp_path):
    pytest.importorskip("gguf")
    from fuzz import corpus

    about = corpus.gguf()
    about["meta"] = [*about["meta"], ("other", corpus.ARRAY, (corpus.U8, 10**6, [7] * 10**6))]
    about["fields"] += 1
    (tmp_path / "m.gguf").write_bytes(corpus.gguf_bytes(about))
    began = time.process_time()
    read_gguf(tmp_path / "m.gguf")
    assert time.process_time() - began < 1  # an object for each element took 4 s


def test_records_of_runs_and_studies_that_no_run_writes(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n' + deep + '\n{"step": 3}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]
    record = {"row": "lora", "seed": 0, "trained": 10, "steps": 3, "failed": False, "value": 0.5, "seconds": 1.5}
    StudyFolder(tmp_path / "s", Recipe(), {}).begin()
    for line in (json.dumps(record | {"value": float("inf")}), deep, "\x85", b"\xff".decode("latin-1")):
        (tmp_path / "s" / "runs.jsonl").write_text(line, encoding="latin-1")
        with pytest.raises(ValueError, match=r"runs\.jsonl"):
            StudyFolder(tmp_path / "s", Recipe(), {})


def test_a_checkpoint_with_an_unknown_field(tmp_path):
    (tmp_path / "state.json").write_text('{"version": 1, "stepp": 3}')
    with pytest.raises(ValueError, match=r"state\.json: 'stepp' is unknown"):
        read(tmp_path)


def test_settings_with_many_dots(tmp_path, capsys):
    from minilora.cli import main

    (tmp_path / "r.toml").write_text("a." * 5000 + "a = 1\n")  # the parser takes 100 MB
    assert main(["finetune", "--config", str(tmp_path / "r.toml")]) == 1
    assert "dots in a line" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    from minilora.formats.atomic import write_file

    def write(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"):
        write_file(tmp_path / "x.json", write)
    assert not list(tmp_path.iterdir())


def test_nothing_runs_code_of_a_file():
    """No module that unpickles, and no eval, exec or compile."""
    for file in Path(ml.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not {"pickle", "marshal", "shelve", "dill", "joblib", "yaml"} & set(modules), f"{file}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("eval", "exec", "compile"), f"{file}:{node.lineno}"
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"{file}:{node.lineno}"


def test_compressed_data_have_a_limit(tmp_path):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(bytes(80 * 2**20)))
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz is more than 7\d,\d+,\d+ bytes without its compression"):
        read_bytes(tmp_path / "d.jsonl.gz")
