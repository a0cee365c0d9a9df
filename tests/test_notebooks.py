"""The notebooks of the course: each is what its script gives, was run without an error, and runs again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="needs: pip install 'minilora[notebooks]'")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_spec = importlib.util.spec_from_file_location("notebooks", EXAMPLES / "notebooks.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)
SCRIPTS = notebooks.scripts()


def test_every_script_of_the_course_is_a_notebook():
    assert [script.stem[:2] for script in SCRIPTS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebook_is_up_to_date(script):
    assert notebooks.outdated(script) == ""
    saved = json.loads((EXAMPLES / "notebooks" / f"{script.stem}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in saved["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1, "one picture"
    assert sum("install" in cell["metadata"].get("tags", []) for cell in code) == 1, "one install cell"
    first, last = ("".join(saved["cells"][i]["source"]) for i in (0, -1))
    assert first.startswith(f"# {int(script.stem[:2])}. ")
    assert ("colab.research.google.com" in first) == bool(notebooks.address())
    assert last.startswith("## Exercises")
    assert last.count("\n1. ") == last.count("\n2. ") == 1
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "\nLook at " in printed
    text = json.dumps(saved)
    assert "argparse" not in text


def test_the_badge_and_the_install_cell_lead_to_the_published_address(tmp_path, monkeypatch):
    assert "OWNER" not in "".join(path.read_text(encoding="utf-8") for path in notebooks.NOTEBOOKS.glob("*.ipynb"))
    monkeypatch.setattr(notebooks, "HERE", tmp_path / "examples")
    url = "https://github.com/some-one/minilora"
    for urls, found in (("", ""), ("Documentation = https://example.org/docs", ""), (f"Source = {url}/", url)):
        (tmp_path / "setup.cfg").write_text(f"[metadata]\nname = minilora\nproject_urls =\n    {urls}\n")
        assert notebooks.address() == found
        first, install = notebooks.notebook(SCRIPTS[0]).cells[:2]
        badge = f"(https://colab.research.google.com/github/some-one/minilora/blob/main/examples/notebooks/{SCRIPTS[0].stem}.ipynb)"
        assert (badge in first.source) == ("%pip" in install.source) == (f"git+{url}@main" in install.source) == bool(found)


def test_an_outdated_notebook_is_noticed(tmp_path, monkeypatch):
    script = tmp_path / SCRIPTS[0].name
    script.write_text(SCRIPTS[0].read_text(encoding="utf-8").replace("T, m, n = 5, 4, 3", "T, m, n = 5, 4, 2"), encoding="utf-8")
    assert "is not what" in notebooks.outdated(script)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    assert "is missing" in notebooks.outdated(SCRIPTS[0])


@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.stem)
def test_notebook_runs(script, monkeypatch):
    pytest.importorskip("nbclient", reason="needs: pip install 'minilora[notebooks]'")
    pytest.importorskip("ipykernel", reason="needs: pip install 'minilora[notebooks]'")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    made = notebooks.execute(notebooks.notebook(script))
    assert any("image/png" in output.get("data", {}) for cell in made.cells for output in cell.get("outputs", []))
