"""Names: one `inject`, and a renamed initialiser, whose old name raises one sentence that has the new one."""

import importlib

import numpy as np
import pytest

import minilora as ml
from minilora.formats.atomic import read_json, write_json


def test_there_is_one_inject_under_each_of_its_names():
    adapters, lora = importlib.import_module("minilora.adapters"), importlib.import_module("minilora.lora")
    assert ml.inject is adapters.inject is lora.inject
    assert callable(lora.lora_layers)


def test_the_init_seed_is_called_normal():
    for make in (lambda: ml.LoraConfig(init_lora_weights="seed"), lambda: ml.LoRALinear(ml.Linear(3, 2, rng=0), r=1, init="seed")):
        with pytest.raises(ValueError, match=r"^init_lora_weights='seed' has a new name: 'normal'\.$"):
            make()


def test_an_adapter_initialised_with_seed_still_loads(tmp_path):
    """The file's tensors replace the values of its initialiser."""
    config = ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=3)
    model, again = ml.GPT2(config, rng=0), ml.GPT2(config, rng=0)
    ml.inject(model, ml.LoraConfig(r=2, init_lora_weights="normal"), rng=0)
    ml.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    write_json(file, {**read_json(file), "init_lora_weights": "seed"})
    assert ml.load_adapter(again, tmp_path).init_lora_weights is True
    ids = np.array([1, 5, 2])
    np.testing.assert_array_equal(again.forward(ids, keep=False)[0], model.forward(ids, keep=False)[0])
