"""Signs that a run goes wrong: each is shown when its cause is there, and not before. Events for TensorBoard."""

import sys

import numpy as np
import pytest
from tiny import IDS, gpt2

import minilora as ml
from minilora.runs import signs
from minilora.runs.finetune import finetune
from minilora.runs.folder import read_lines
from minilora.runs.recipe import Recipe


def records(norms=(), losses=()):
    return [{"step": i, "grad_norm": norm} for i, norm in enumerate(norms, 1)] + [
        {"step": 10 * i, "grad_norm": 1.0, "held_out_loss": loss} for i, loss in enumerate(losses, 1)
    ]


def test_an_exploding_gradient():
    assert signs.explosion(records([1.0] * 20 + [21.0])).startswith("step 21: the norm of the gradient is 21, 21 times the median")
    assert signs.explosion(records([1.0] * 20 + [19.0])) == ""
    assert signs.explosion(records([1.0] * 19 + [50.0])) == ""  # too early to say
    assert signs.explosion(records([*[1.0] * 20, None])) == ""


def test_a_rising_held_out_loss():
    assert "risen from 1.0000 at step 20 to 1.3000" in signs.rising(records(losses=[2.0, 1.0, 1.2, 1.3]), None)
    for losses in ([2.0, 1.0, 1.2], [2.0, 1.0, 1.2, 0.9], [1.0, 2.0], [2.0, 1.0, 1.2, 1.3, 1.4]):
        assert signs.rising(records(losses=losses), None) == ""


def test_a_B_that_does_not_move():
    model = gpt2()
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["c_attn", "c_fc"]), rng=0)
    assert signs.still_zero(model).startswith("lora_B of transformer.h.0.attn.c_attn and 3 others is still zero")
    optimizer = ml.SGD(model.parameters(), 0.1)
    model.loss_backward(model.loss(IDS, np.append(IDS[1:], -100))[1])
    optimizer.step()
    assert signs.still_zero(model) == ""


def test_a_class_that_is_never_predicted():
    assert signs.never_predicted([[3, 0, 0], [1, 0, 0], [0, 0, 0]], ["a", "b", "c"]).startswith("never predicted: b;")
    assert signs.never_predicted([[3, 1], [1, 2]], ["a", "b"]) == ""


def test_tensorboard_reads_the_figures_of_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads events; needs tensorboard")
    recipe = Recipe(log="tensorboard", steps=3, window=16, batch_size=2, eval_bytes=64, sample_bytes=0, threads=1, backend="numpy")
    finetune(recipe, tmp_path / "run", lambda line: None)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    for name in ("loss", "lr", "grad_norm", "tokens"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        finetune(Recipe(log="tensorboard", steps=1, eval_bytes=64), tmp_path / "run", lambda line: None)
