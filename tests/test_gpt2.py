"""GPT-2 against transformers and PEFT, with golden files and live."""

import numpy as np
import oracle
import pytest

import minilora as ml

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_loss_and_adapter_gradients_match_the_oracles(dtype, backend, tmp_path):
    model = oracle.adapted("gpt2", tmp_path / "m", dtype, backend)
    ids, labels, offsets = oracle.batch("gpt2")
    logits, _ = model.forward(ids, keep=False, offsets=offsets)
    loss, saved = model.loss(ids, labels, offsets)
    model.loss_backward(saved)
    assert logits.dtype == loss.dtype == dtype
    assert oracle.deviation(logits, oracle.GOLDEN["gpt2.logits"]) < TOLERANCE[dtype]
    assert oracle.deviation(loss, oracle.GOLDEN["gpt2.loss"]) < TOLERANCE[dtype]
    assert oracle.deviation(oracle.gradients(model), oracle.part("gpt2", "grads")) < TOLERANCE[dtype]


def test_thirty_steps_of_adamw_match_the_oracles(tmp_path):
    model = oracle.adapted("gpt2", tmp_path / "m", "float32")
    assert oracle.deviation(oracle.train(model, "gpt2"), oracle.GOLDEN["gpt2.run"]) < 1e-4
    after = oracle.as_peft(model, {path: p.data for path, p in model.parameters() if p.trainable})
    assert oracle.deviation(after, oracle.part("gpt2", "after")) < 1e-4


def test_the_golden_file_matches_the_installed_oracles():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"the oracle {package} is not installed: pip install 'minilora[oracle]'")
    now = oracle.live("gpt2")
    assert now.keys() == {key for key in oracle.GOLDEN if key.startswith("gpt2.")}
    for key, value in now.items():
        assert oracle.deviation(value, oracle.GOLDEN[key]) < (1e-4 if ".run" in key or ".after" in key else 1e-11), key


def test_options_that_would_change_the_result_are_refused(tmp_path):
    for option, value in {
        "activation_function": "relu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    }.items():
        with pytest.raises(ValueError, match=rf"config.json has {option} {value!r}; supported"):
            ml.load_model(oracle.write_checkpoint("gpt2", tmp_path / "m", **{option: value}), "numpy")


def test_a_sequence_may_have_at_most_all_positions():
    model = ml.GPT2(ml.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2), rng=0)
    assert model.forward(np.zeros(8, np.int64), keep=False, offsets=[0, 4, 8])[0].shape == (8, 5)
    with pytest.raises(ValueError, match="a sequence of 5 tokens is longer than the model's 4 positions"):
        model.forward(np.zeros(8, np.int64), keep=False, offsets=[0, 5, 8])
