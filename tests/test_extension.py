"""A new variant and a new initialiser are one file and one line in a table each: this is the file, and here are the lines."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import minilora as ml
from minilora.layers import Parameter
from minilora.lora import LoRALinear, lora_layers
from minilora.lora.registry import DATA_INITIALISERS, INITIALISERS, METHODS

CONFIG = ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)
IDS, LABELS, OFFSETS = np.array([1, 5, 2, 10, 0, 7, 7, 3]), np.array([5, 2, 10, -100, 7, 7, 3, -100]), [0, 4, 8]


# -- the file of a variant --------------------------------------------------------------------------------------------------------


class GainLinear(LoRALinear):
    """y = gain * (x W) + b + scaling (x A) B: LoRA with a trained number for each output (out,)."""

    trains = ("lora_A", "lora_B", "gain")

    def __init__(self, base, *args, **options):
        super().__init__(base, *args, **options)
        self.gain = Parameter(np.ones(base.out_features, self.lora_A.data.dtype))

    def delta(self):
        return super().delta() + self.weight.data * (self.gain.data - 1)

    def adapted_forward(self, x, b, mask):
        y, saved = super().adapted_forward(x, b, mask)
        h = x @ self.weight.data
        return y + h * (self.gain.data - 1), (h, *saved)

    def adapted_backward(self, dy, saved, mask, need_dx):
        h, *rest = saved
        dx = super().adapted_backward(dy, rest, mask, need_dx)
        self.gain.add_grad((dy * h).sum(axis=0))  # y = ... + h * (gain - 1)
        return dx + (dy * (self.gain.data - 1)) @ self.weight.data.T if need_dx else None


@dataclass
class GainConfig(ml.LoraConfig):
    peft_type: ClassVar[str] = "GAIN"

    def classes(self):
        return {"Linear": GainLinear}


# -- the files of two initialisers ------------------------------------------------------------------------------------------------


def tiny(layer, rng):
    return 0.01 * rng.standard_normal((layer.in_features, layer.r)), 0.01 * rng.standard_normal((layer.r, layer.out_features))


def tiny_where_the_data_are(model, targets, config, train_step):
    train_step()
    return config, dict.fromkeys(list(targets)[1:], tiny)


@pytest.fixture(autouse=True)
def lines(monkeypatch):
    monkeypatch.setitem(METHODS, "GAIN", "test_extension:GainConfig")
    monkeypatch.setitem(INITIALISERS, "tiny", "test_extension:tiny")
    monkeypatch.setitem(DATA_INITIALISERS, "tiny_data", "test_extension:tiny_where_the_data_are")
    monkeypatch.setitem(sys.modules, "test_extension", sys.modules[__name__])


# -- they work as the others do ---------------------------------------------------------------------------------------------------


def trained(config, steps=10, dtype="float64", **options):
    model = ml.GPT2(CONFIG, rng=0, dtype=dtype)
    ml.inject(model, config, rng=0, **options)
    optimizer = ml.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss, saved = model.loss(IDS, LABELS, OFFSETS)
        model.loss_backward(saved)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    return model


def logits(model):
    return model.forward(IDS, keep=False, offsets=OFFSETS)[0]


def test_a_variant_trains_saves_loads_merges_and_has_the_right_gradients(tmp_path):
    model = trained(GainConfig(r=2, init_lora_weights="tiny"))
    assert {type(layer) for _, layer in lora_layers(model)} == {GainLinear}
    ml.save_adapter(model, tmp_path)
    again = ml.GPT2(CONFIG, rng=0, dtype="float64")
    assert isinstance(ml.load_adapter(again, tmp_path), GainConfig)
    np.testing.assert_array_equal(logits(again), logits(model))
    assert np.abs(logits(ml.GPT2(CONFIG, rng=0, dtype="float64")) - logits(model)).max() > 1e-3
    report = ml.gradcheck(model, IDS, offsets=OFFSETS)
    assert report.ok, report
    before = logits(model)
    ml.merge(model)
    np.testing.assert_allclose(logits(model), before, rtol=1e-9, atol=1e-12)
    with ml.disabled(model):
        np.testing.assert_array_equal(logits(model), logits(ml.GPT2(CONFIG, rng=0, dtype="float64")))


def test_an_initialiser_trains_saves_and_loads(tmp_path):
    model = trained(ml.LoraConfig(r=2, init_lora_weights="tiny"))
    ml.save_adapter(model, tmp_path)
    again = ml.GPT2(CONFIG, rng=0, dtype="float64")
    ml.load_adapter(again, tmp_path)
    np.testing.assert_array_equal(logits(again), logits(model))
    layer = ml.LoRALinear(ml.Linear(200, 100, rng=0), r=4, init="tiny", rng=0)
    assert layer.lora_B.data.std() == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match="'tiny', 'eva', 'lora_ga', 'tiny_data'"):
        ml.LoraConfig(init_lora_weights="small")


def test_an_initialiser_from_data_is_called_with_the_data():
    calls = []
    model = trained(ml.LoraConfig(r=2, init_lora_weights="tiny_data"), train_step=lambda: calls.append(1))
    assert calls == [1]
    assert len(lora_layers(model)) == 2 * 4 - 1  # it left one layer out
