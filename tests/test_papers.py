"""The reproductions of papers: each script runs with --quick, and the page matches the results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.papers import shown

ROOT = Path(__file__).resolve().parents[1]
ON_THE_BUNDLED_MODEL = [
    name for name in shown.SCRIPTS if name not in ("methods", "few_sample", "bias_correction", "latency", "learning_rate")
]


@pytest.mark.parametrize("name", ON_THE_BUNDLED_MODEL)
def test_a_quick_run(name, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", f"examples.papers.{name}", "--quick", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    claims = json.loads((tmp_path / f"{name}.json").read_text())["claims"]
    assert shown.table(claims) in done.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_matches_the_results():
    assert (ROOT / "examples" / "papers" / "README.md").read_text() == shown.page()


def test_every_script_has_results_and_a_picture():
    for name in shown.SCRIPTS:
        assert (shown.RESULTS / f"{name}.json").is_file(), name
        assert (shown.RESULTS / f"{name}.png").is_file(), name
