"""NF4: the values of bitsandbytes, products, sizes in memory and on disk, and LoftQ's initialisation."""

import json
import os

import numpy as np
import pytest
from golden import make_nf4
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.checking.gradcheck import gradcheck
from minilora.quantization import nf4
from minilora.quantization.nf4 import NF4
from minilora.quantization.quantize import quantize_model

GOLDEN = load_file(make_nf4.FILE)


def of_bitsandbytes(name, backend="numpy"):
    """The result of bitsandbytes for a weight, as a minilora array."""
    out, fan_in = make_nf4.SHAPES[name]
    codes, absmax, nested, offset = (GOLDEN[f"{name}.{part}"] for part in ("codes", "absmax", "nested_absmax", "offset"))
    return NF4((fan_in, out), codes, absmax, nested, float(offset[0]), nested_code=GOLDEN["nested_code"]).to_backend(backend)


def random(m, n, seed=0):
    return np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)


@pytest.mark.parametrize("name", make_nf4.SHAPES)
def test_dequantization_matches_bitsandbytes_bit_for_bit(name, backend):
    np.testing.assert_array_equal(ml.to_numpy(of_bitsandbytes(name, backend).dense()).T, GOLDEN[f"{name}.dequantized"])


@pytest.mark.parametrize("name", make_nf4.SHAPES)
def test_quantization_matches_bitsandbytes(name):
    """The 4-bit codes are equal; of the 8-bit magnitudes, its CPU code sometimes takes the second nearest."""
    found, expected = NF4.of(make_nf4.weight(name).T), of_bitsandbytes(name)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(GOLDEN["code"], nf4.CODE)
    np.testing.assert_allclose(GOLDEN["nested_code"], nf4.DYNAMIC, rtol=3e-7)
    steps = np.abs(found.absmax.astype(int) - expected.absmax)
    if name != "one block":  # minus its mean this is 0, and all 256 fractions of 0 are equal
        assert steps.max() <= 1
        assert (steps > 0).mean() < 0.05
    np.testing.assert_allclose(found.nested_absmax, expected.nested_absmax, rtol=1e-6)
    assert found.offset == pytest.approx(expected.offset, rel=1e-6)
    np.testing.assert_allclose(found.dense(), expected.dense(), atol=2e-3)


def test_the_codebook_on_normal_numbers():
    """Mean squared error .00845; equidistant fractions k / 7 have .0116."""
    values = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)

    def error(code):
        q, largest = nf4.quantize_blocks(values, 64, code)
        return float(np.mean((code[q].reshape(-1, 64) * largest[:, None] - values.reshape(-1, 64)) ** 2))

    assert error(nf4.CODE) == pytest.approx(0.00845, abs=5e-5)
    assert error(np.linspace(-1, 1, 15, dtype=np.float32)) == pytest.approx(0.01148, rel=0.02)
    dense = NF4.of(values.reshape(2048, -1)).dense()
    assert float(np.mean((dense.ravel() - values) ** 2)) == pytest.approx(0.00845, abs=1e-4)  # double quantization adds almost no error


@pytest.mark.parametrize(("m", "n"), [(64, 48), (7, 13), (3, 200), (130, 66), (1, 5)])
@pytest.mark.parametrize("chunk", [1, 1000, nf4.CHUNK])
def test_products_match_the_dense_matrix(m, n, chunk, backend, on, monkeypatch):
    monkeypatch.setattr(nf4, "CHUNK", chunk)
    W = NF4.of(on(random(m, n)))
    dense = W.dense()
    assert (dense.shape, W.shape, W.T.shape) == ((m, n), (m, n), (n, m))
    x, dy = on(random(5, m, 1)), on(random(5, n, 2))
    for found, expected in ((x @ W, x @ dense), (dy @ W.T, dy @ dense.T), (W @ dy.T, dense @ dy.T), (W.T @ x.T, dense.T @ x.T)):
        assert found.dtype == expected.dtype == np.float32
        assert float(abs(found - expected).max()) <= 1e-5 * float(abs(expected).max())
    for M, A in ((W, dense), (W.T, dense.T)):
        assert float(abs(M.column_squares() - (A * A).sum(axis=0)).max()) <= 1e-5 * float((A * A).sum())
        assert float(abs(M.dense() - A).max()) == 0


# -- a model -----------------------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, 200, 40)
LABELS = np.append(IDS[1:], -100)


def model(**options):
    """A model with fairly large layers: tiny ones have more magnitudes than weights."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ml.Llama(ml.LlamaConfig(**sizes), rng=0, **options)


def logits(model):
    return model.forward(IDS, keep=False)[0]


def linear(model):
    return {path: layer.weight.data for path, layer in model.modules() if isinstance(layer, ml.Linear)}


def test_sizes_in_memory_and_on_disk(tmp_path):
    plain, quantized = ml.load_model("pydoc", "numpy"), ml.load_model("pydoc", "numpy", quantize="nf4")
    total = sum(W.nbytes for W in linear(plain).values())
    assert all(isinstance(W, NF4) for W in linear(quantized).values())
    assert sum(W.nbytes for W in linear(quantized).values()) <= 0.14 * total
    for name, m in (("plain", plain), ("quantized", quantized)):
        ml.save_model(m, tmp_path / name)
    sizes = [os.path.getsize(tmp_path / name / "model.safetensors") for name in ("plain", "quantized")]
    rest = sizes[0] - total
    assert sizes[1] - rest <= 0.14 * total


def test_the_bundled_model_loses_little():
    """Held out, of 2.79 bits per byte: 0.016 more with 4-bit weights."""
    from minilora.formats.tokenizer import ByteTokenizer
    from minilora.runs.recipe import Recipe
    from minilora.runs.tasks import measure, training_task

    task = training_task(Recipe(eval_bytes=32 * 256), ByteTokenizer())
    plain, quantized = (measure(ml.load_model("pydoc", "numpy", quantize=how), task)["bits_per_byte"] for how in ("", "nf4"))
    assert abs(quantized - plain) < 0.03


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized_weights_round_trip_unchanged(family, tmp_path, backend):
    m = model() if family == "llama" else ml.GPT2(ml.GPT2Config(200, 40, 64, 1, 4), rng=0)
    quantize_model(m)
    ml.save_model(m, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    again = ml.load_model(tmp_path, backend)
    assert float(abs(logits(again) - logits(m.to(backend))).max()) < 1e-6  # the head is transposed in memory
    for path, W in linear(m).items():
        assert path == "lm_head" or float(abs(linear(again)[path].dense() - W.dense()).max()) == 0
    if family == "llama":
        assert not isinstance(again.lm_head.weight.data, NF4)


def test_a_quantized_layer_cannot_be_trained():
    m = model()
    quantize_model(m)
    m.unfreeze()
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight is quantized and cannot be trained"):
        ml.AdamW(m.parameters())
    with pytest.raises(ValueError, match="quantize is 'int8'; choose 'nf4', or '' for none"):
        ml.load_model("pydoc", quantize="int8")


@pytest.mark.parametrize("config", [{}, {"use_dora": "exact"}, {"init_lora_weights": "pissa"}], ids=str)
def test_adapters_on_quantized_weights(config, tmp_path, backend):
    """Equal to the dense matrix of the quantized weights: logits, gradients, merged, saved."""
    quantized, dense = model(), model()
    quantize_model(quantized)
    for path, W in linear(quantized).items():
        if isinstance(W, NF4):
            layer = dict(dense.modules())[path]
            layer.weight.data = W.dense()
    found = {}
    for m in (quantized, dense):
        ml.inject(m, ml.LoraConfig(r=4, target_modules="all-linear", **config), rng=0)
        rng = np.random.default_rng(1)
        for _, p in m.parameters():
            if p.trainable:
                p.data = p.data + 0.1 * rng.standard_normal(p.data.shape).astype(np.float32)
        m.to(backend)
        m.loss_backward(m.loss(IDS, LABELS)[1])
        gradients = {path: ml.to_numpy(p.grad) for path, p in m.parameters() if p.trainable}
        unmerged = ml.to_numpy(logits(m))
        ml.merge(m)
        found[m] = gradients, unmerged, ml.to_numpy(logits(m))
        ml.unmerge(m)
    for a, b in zip(found[quantized][1:], found[dense][1:], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    for path, g in found[dense][0].items():
        np.testing.assert_allclose(found[quantized][0][path], g, atol=1e-4 * np.abs(g).max(), err_msg=path)
    ml.save_adapter(quantized, tmp_path)
    for base in (quantize_model, lambda m: None):  # the adapter also loads onto the original weights
        again = model()
        base(again)
        ml.load_adapter(again.to(backend), tmp_path)
    assert float(abs(logits(again) - logits(quantized)).max()) > 0


def test_gradients_through_quantized_weights(backend, on):
    d = {"rng": 0, "dtype": "float64"}
    x = on(np.random.default_rng(0).standard_normal((6, 5)))
    for config in ({}, {"use_dora": "exact"}):
        m = ml.MLP([5, 7, 4], ml.Tanh, **d)
        quantize_model(m)
        ml.inject(m, ml.LoraConfig(r=2, **config), rng=0)
        report = gradcheck(m.to(backend, "float64"), x)
        assert report.ok, str(report)


# -- LoftQ -------------------------------------------------------------------------------------------------------------------


def loftq(m, rounds=5):
    ml.inject(m, ml.LoraConfig(r=4, lora_alpha=6, init_lora_weights="loftq", loftq_config={"loftq_iter": rounds}), rng=0)
    return m


def test_loftq_is_closer_to_the_weight_than_quantization_alone():
    def error(rounds):
        m, W = model(), linear(model())
        return sum(
            np.linalg.norm(layer.weight.data + layer.delta() - W[path]) ** 2 for path, layer in ml.lora.lora_layers(loftq(m, rounds))
        )

    alone = sum(np.linalg.norm(NF4.of(W).dense() - W) ** 2 for path, W in linear(model()).items() if path != "lm_head")
    assert error(5) < error(1) < 0.95 * alone


def test_a_loftq_adapter_loads_onto_its_base_only(tmp_path):
    m = loftq(model())
    ml.save_adapter(m, tmp_path / "adapter")
    with ml.disabled(m):
        ml.save_model(m, tmp_path / "base")
    again = ml.load_model(tmp_path / "base", "numpy")
    ml.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(logits(again), logits(m), atol=1e-6)
    other = model()
    for prepare in (lambda m: None, quantize_model):
        prepare(other)
        with pytest.raises(ValueError, match="made for a base model with other weights"):
            ml.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_bits": 8}, "supported: 4 bits"),
        ({"loftq_iter": 0}, "at least one iteration"),
        ({"bits": 4}, "no option 'bits'; known: loftq_bits, loftq_iter"),
    ],
)
def test_loftq_refused(options, message):
    m = model()
    with pytest.raises(ValueError, match=message):
        ml.inject(m, ml.LoraConfig(r=2, init_lora_weights="loftq", loftq_config=options))
    assert not any(isinstance(W, NF4) for W in linear(m).values())
    quantize_model(m)
    with pytest.raises(ValueError, match="quantized already"):
        loftq(m)


# -- damaged files -----------------------------------------------------------------------------------------------------------

PATH = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{PATH}.quant_state.bitsandbytes__nf4"


def edited_state(**changes):
    return lambda t: t | {STATE: np.frombuffer(json.dumps(json.loads(t[STATE].tobytes()) | changes).encode(), np.uint8)}


DAMAGED = {
    "no JSON": (lambda t: t | {STATE: np.zeros(4, np.uint8)}, "is incomplete"),
    "a part missing": (lambda t: {k: v for k, v in t.items() if k != f"{PATH}.absmax"}, r"is incomplete \(KeyError"),
    "codes cut": (lambda t: t | {PATH: t[PATH][:-1]}, "does not fit its numbers"),
    "magnitudes cut": (lambda t: t | {f"{PATH}.absmax": t[f"{PATH}.absmax"][:-1]}, "does not fit its magnitudes"),
    "not finite": (lambda t: t | {f"{PATH}.nested_absmax": t[f"{PATH}.nested_absmax"] * np.nan}, "does not fit its nested magnitudes"),
    "a fraction that is not finite": (
        lambda t: t | {f"{PATH}.nested_quant_map": t[f"{PATH}.nested_quant_map"] * np.nan},
        "does not fit its code",
    ),
    "fractions beyond 1": (lambda t: t | {f"{PATH}.nested_quant_map": t[f"{PATH}.nested_quant_map"] * 2}, "does not fit its code"),
    "magnitudes that overflow": (
        lambda t: t | {f"{PATH}.nested_absmax": np.full_like(t[f"{PATH}.nested_absmax"], 3e38)},
        "does not fit its nested magnitudes",
    ),
    "a shape of fractions": (edited_state(shape=[64.0, 64.0]), "does not fit its shape"),
    "a shape below zero": (edited_state(shape=[-64, -64]), "does not fit its shape"),
    "another dtype": (lambda t: t | {f"{PATH}.nested_absmax": t[f"{PATH}.nested_absmax"].astype(np.float64)}, "does not fit its dtypes"),
    "whole fractions": (lambda t: t | {f"{PATH}.nested_quant_map": np.zeros(256, np.int8)}, "does not fit its dtypes"),
    "an infinite offset": (edited_state(nested_offset=float("inf")), "does not fit its offset"),
    "another code": (lambda t: t | {f"{PATH}.quant_map": t[f"{PATH}.quant_map"] / 2}, "does not fit its code"),
    "another block size": (edited_state(blocksize=128), "does not fit its block sizes"),
    "an offset that is none": (edited_state(nested_offset="x"), "does not fit its offset"),
    "another shape": (edited_state(shape=[32, 128]), r"q_proj.weight has shape \(128, 32\), the model expects \(64, 64\)"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files(what, tmp_path):
    m = model()
    quantize_model(m)
    ml.save_model(m, tmp_path)
    change, message = DAMAGED[what]
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: np.ascontiguousarray(value) for name, value in change(tensors).items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        ml.load_model(tmp_path, "numpy")
    assert "\n" not in str(caught.value)
