"""The reproductions of papers: each script runs with --quick, and the page matches the results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from examples.papers import shown

ROOT = Path(__file__).resolve().parents[1]
ON_THE_BUNDLED_MODEL = [
    name for name in shown.SCRIPTS if name not in ("methods", "few_sample", "bias_correction", "latency", "learning_rate")
]


@pytest.mark.parametrize("name", ON_THE_BUNDLED_MODEL)
def test_a_quick_run(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(shown, "SMALL", {})
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(tmp_path)])
    runpy.run_module(f"examples.papers.{name}", run_name="__main__")
    claims = json.loads((tmp_path / f"{name}.json").read_text())["claims"]
    assert shown.table(claims) in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_matches_the_results():
    assert (ROOT / "examples" / "papers" / "README.md").read_text() == shown.page()


def test_every_script_has_results_and_a_picture():
    for name in shown.SCRIPTS:
        assert (shown.RESULTS / f"{name}.json").is_file(), name
        assert (shown.RESULTS / f"{name}.png").is_file(), name
