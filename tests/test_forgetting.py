"""The loss on a general text, before and after: what a run has made the model forget."""

import json
import math

import numpy as np
import pytest

import minilora as ml
from minilora.cli import main
from minilora.data.text import GENERAL
from minilora.formats.adapter import load_adapter
from minilora.runs.finetune import finetune
from minilora.runs.folder import read_lines
from minilora.runs.recipe import Recipe
from minilora.runs.study import study

SMALL = {"steps": 3, "window": 64, "batch_size": 2, "eval_bytes": 64, "sample_bytes": 0, "save_every": 0, "backend": "numpy", "threads": 1}


def quiet(*_):
    pass


def loss_on(model, text, window=256):
    """Mean negative log-likelihood of every byte but the first, each read in its window."""
    text, total = np.frombuffer(text, np.uint8), 0.0
    for start in range(0, len(text) - 1, window):
        x = text[start : start + window + 1]
        z = model.forward(x[:-1])[0].astype(np.float64)
        total -= (z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[np.arange(len(z)), x[1:]].sum()
    return total / (len(text) - 1)


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_on_the_general_text(own, tmp_path):
    (tmp_path / "own.txt").write_text("To be, or not to be: that is the question. " * 9)
    change = {"forgetting": str(tmp_path / "own.txt")} if own else {}
    results = finetune(Recipe(**SMALL, **change), tmp_path / "run", quiet)
    found = json.loads((tmp_path / "run" / "run.json").read_text())["results"]["forgetting"]
    assert found == results["forgetting"]
    text = (tmp_path / "own.txt" if own else GENERAL).read_bytes()
    model = ml.load_model("pydoc")
    assert found["text"] == ("own.txt" if own else "general.txt")
    assert found["before"] == pytest.approx(loss_on(model, text), rel=1e-5)
    load_adapter(model, tmp_path / "run" / "adapter")
    assert found["after"] == pytest.approx(loss_on(model, text), rel=1e-5)
    assert abs(found["after"] - found["before"]) > 1e-3


def test_it_can_be_left_out(tmp_path, capsys):
    assert "forgetting" not in finetune(Recipe(**SMALL, forgetting=""), tmp_path / "run", quiet)
    assert main(["finetune", "--steps", "1", "--forgetting", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "other")]) == 1
    assert "nowhere.txt" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_table_of_a_study_has_it(tmp_path, capsys):
    table = study(Recipe(**SMALL), {"lora": {"method": "lora"}, "norms": {"method": "layer-norm"}}, 2, tmp_path / "study", quiet)
    records = read_lines(tmp_path / "study" / "runs.jsonl")
    for line in table:
        each = [r["forgetting"] for r in records if r["row"] == line.row]
        assert len(each) == 2
        assert line.forgetting == pytest.approx(sum(each) / 2)
    assert "forgets" in (tmp_path / "study" / "table.txt").read_text().splitlines()[0]
    run = finetune(Recipe(**SMALL), tmp_path / "run", quiet)["forgetting"]
    first = next(r["forgetting"] for r in records if (r["row"], r["seed"]) == ("lora", 0))
    assert first == pytest.approx(run["after"] - run["before"], abs=1e-6)
    assert all(math.isfinite(r["forgetting"]) for r in records)
