"""BERT against transformers and PEFT, with golden files and live; saved values; the options of the classifier."""

from itertools import pairwise

import numpy as np
import oracle
import pytest
from golden import make_models

import minilora as ml
from minilora import functional as F
from minilora.layers import Saved

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
TINY = {"vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 7}
IDS, OFFSETS = np.array([1, 5, 2, 10, 0, 7, 7]), [0, 3, 4, 7]


def tiny(dtype="float64", **config):
    return ml.BertClassifier(ml.BertConfig(**TINY, max_position_embeddings=4, **config), rng=0, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_loss_and_adapter_gradients_match_the_oracles(dtype, backend, tmp_path):
    model = oracle.adapted("bert", tmp_path / "m", dtype, backend)
    ids, labels, offsets = oracle.batch("bert")
    logits, _ = model.forward(ids, keep=False, offsets=offsets)
    loss, saved = model.loss(ids, labels, offsets)
    model.loss_backward(saved)
    assert logits.dtype == loss.dtype == dtype
    assert oracle.deviation(logits, oracle.GOLDEN["bert.logits"]) < TOLERANCE[dtype]
    assert oracle.deviation(loss, oracle.GOLDEN["bert.loss"]) < TOLERANCE[dtype]
    assert oracle.deviation(oracle.gradients(model), oracle.part("bert", "grads")) < TOLERANCE[dtype]


def test_thirty_steps_of_adamw_match_the_oracles(tmp_path):
    model = oracle.adapted("bert", tmp_path / "m", "float32")
    assert oracle.deviation(oracle.train(model, "bert"), oracle.GOLDEN["bert.run"]) < 1e-4
    after = oracle.as_peft(model, {path: p.data for path, p in model.parameters() if p.trainable})
    assert oracle.deviation(after, oracle.part("bert", "after")) < 1e-4


def test_the_golden_file_matches_the_installed_oracles():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"the oracle {package} is not installed: pip install 'minilora[oracle]'")
    now = oracle.live("bert")
    assert now.keys() == {key for key in oracle.GOLDEN if key.startswith("bert.")}
    for key, value in now.items():
        assert oracle.deviation(value, oracle.GOLDEN[key]) < (1e-4 if ".run" in key or ".after" in key else 1e-11), key


@pytest.mark.filterwarnings("ignore")  # warnings of transformers
@pytest.mark.parametrize("task", ["gelu_new", "relu", "regression", "token types"])
def test_other_options_match_transformers(task, tmp_path):
    """Every gradient of full training, by name, for options that the golden file lacks."""
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed: pip install 'minilora[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    torch.manual_seed(0)
    change = {"num_labels": 1} if task == "regression" else {"hidden_act": task} if task != "token types" else {}
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "initializer_range": 0.3}
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**(make_models.CONFIGS["bert"] | off | change))).eval()
    theirs.save_pretrained(tmp_path / "m")
    theirs = theirs.double()
    ours = ml.load_model(tmp_path / "m", "numpy", "float64").unfreeze()

    sequences = make_models.data("bert")[0]
    ids, offsets = np.concatenate(sequences), np.cumsum([0, *map(len, sequences)])
    types = np.arange(len(ids)) % 2 if task == "token types" else np.zeros(len(ids), np.int64)
    parts = [{"input_ids": torch.tensor(ids[None, a:b]), "token_type_ids": torch.tensor(types[None, a:b])} for a, b in pairwise(offsets)]
    theirs_logits = torch.cat([theirs(**part).logits for part in parts])
    logits, saved = ours.forward(ids, offsets=offsets, token_types=types)
    assert oracle.deviation(logits, theirs_logits.detach().numpy()) < 1e-10
    if task == "regression":
        labels = np.array([0.5, -1.5, -100, 2])
        loss, s_loss = ours.loss(ids, labels, offsets)
        ours.loss_backward(s_loss)
        judge = ((theirs_logits[[0, 1, 3], 0] - torch.tensor(labels[[0, 1, 3]])) ** 2).mean()
        assert oracle.deviation(loss, judge.detach().numpy()) < 1e-10
        judge.backward()
    else:
        dy = np.random.default_rng(0).standard_normal(logits.shape)
        ours.backward(dy, saved)
        (theirs_logits * torch.tensor(dy)).sum().backward()
    expected = {path: p.grad.numpy() for path, p in theirs.named_parameters()}
    found = oracle.gradients(ours)
    for grads in (expected, found):  # torch gives the row of the padding token, 0, no gradient; here nothing is padded
        grads["bert.embeddings.word_embeddings.weight"] = grads["bert.embeddings.word_embeddings.weight"][1:]
    zero = {path for path in expected if path.endswith("key.bias")}
    assert max(np.abs(found.pop(path)).max() for path in zero) < 1e-14
    assert oracle.deviation(found, {path: g for path, g in expected.items() if path not in zero}) < 1e-10


# -- frozen means not computed and not saved ------------------------------------------------------------------------------------


def arrays(saved):
    """The total number of elements that a `saved` holds."""
    if isinstance(saved, Saved):
        return arrays(saved.values)
    if isinstance(saved, (tuple, list)):
        return sum(map(arrays, saved))
    return saved.size if hasattr(saved, "dtype") else 0


def kept(model):
    return arrays(model.loss(IDS, np.array([1, 0, 1]), OFFSETS)[1])


def test_frozen_layers_save_nothing_and_backward_stops_at_the_lowest_trainable(monkeypatch):
    model = tiny().freeze()
    model.classifier.unfreeze()
    n, d = len(OFFSETS) - 1, TINY["hidden_size"]
    assert kept(model) == n * d + n * 2 + n + 1  # the pooled rows, dlogits, the bounds: nothing with a row per token
    model.bert.encoder.layer[2].output.dense.unfreeze()
    last = kept(model)
    model.bert.encoder.layer[2].attention.self.query.unfreeze()
    block = kept(model)
    model.bert.encoder.layer[1].output.LayerNorm.unfreeze()
    assert n * d < last < block < kept(model) < kept(tiny())

    def never(*_):
        raise AssertionError("ran below the lowest trainable parameter")

    for place in (model.bert.encoder.layer[0], model.bert.encoder.layer[1].intermediate.dense, model.bert.embeddings):
        monkeypatch.setattr(place, "backward", never)
    _, saved = model.loss(IDS, np.array([1, 0, 1]), OFFSETS)
    model.loss_backward(saved)
    assert {path for path, p in model.parameters() if p.grad is not None} == {path for path, p in model.parameters() if p.trainable}
    assert model.loss(IDS, np.array([1, 0, 1]), OFFSETS, keep=False)[1] is None


# -- the classifier -------------------------------------------------------------------------------------------------------------


def test_sequences_do_not_affect_each_other(backend):
    model = tiny(num_labels=3).to(backend)
    together, _ = model.forward(IDS, keep=False, offsets=OFFSETS)
    means = ml.to_numpy(model.embed(IDS, OFFSETS))
    for i, (a, b) in enumerate(pairwise(OFFSETS)):
        alone, _ = model.forward(IDS[a:b], keep=False)
        np.testing.assert_allclose(ml.to_numpy(together)[i], ml.to_numpy(alone)[0], rtol=1e-12)
        h, _ = model.bert.forward(IDS[a:b], keep=False)
        np.testing.assert_allclose(means[i], ml.to_numpy(h).mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("labels", [np.array([1, -100, 0]), np.array([0.5, -100, -2.0])], ids=["classes", "numbers"])
def test_gradients_of_shards_add_up(labels, backend):
    model = tiny(num_labels=2 if labels.dtype == np.int64 else 1).to(backend)

    def gradient(parts):
        model.zero_grad()
        total = 0.0
        for a, b in parts:
            first, last = OFFSETS[a], OFFSETS[b]
            loss, saved = model.loss(IDS[first:last], labels[a:b], np.array(OFFSETS[a : b + 1]) - first, 2)
            model.loss_backward(saved)
            total += float(loss)
        return total, np.concatenate([ml.to_numpy(p.grad).ravel() for _, p in model.parameters()])

    complete, parts = gradient([(0, 3)]), gradient([(0, 1), (1, 2), (2, 3)])  # the second has no label
    assert complete[0] == pytest.approx(parts[0], rel=1e-12)
    np.testing.assert_allclose(complete[1], parts[1], atol=1e-14)
    assert np.abs(complete[1]).max() > 1e-3


def test_mean_pooling_by_configuration():
    model = tiny(pooling="mean")
    W, b = model.classifier.weight.data, model.classifier.bias.data
    np.testing.assert_allclose(model.forward(IDS, keep=False, offsets=OFFSETS)[0], model.embed(IDS, OFFSETS) @ W + b, rtol=1e-12)
    assert ml.BertConfig.from_json(model.config.to_json(), "here").pooling == "mean"


def test_dropout_is_off_by_default_and_in_inference():
    labels = np.array([1, 0, 1])
    assert len({float(tiny().loss(IDS, labels, OFFSETS)[0]) for _ in range(3)}) == 1
    model = tiny(dropout=0.5)
    assert len({float(model.loss(IDS, labels, OFFSETS)[0]) for _ in range(3)}) == 3
    assert len({float(model.loss(IDS, labels, OFFSETS, keep=False)[0]) for _ in range(3)}) == 1


def test_a_sequence_may_have_at_most_all_positions():
    assert tiny().forward(IDS[:4], keep=False)[0].shape == (1, 2)
    with pytest.raises(ValueError, match="a sequence of 7 tokens is longer than the model's 4 positions"):
        tiny().forward(IDS, keep=False)


BAD_CALLS = {
    "labels a token": (lambda m: m.loss(IDS, IDS, OFFSETS), ValueError, "3 sequences; one label a sequence"),
    "no label": (lambda m: m.loss(IDS, np.full(3, -100), OFFSETS), ValueError, "no sequence is labelled"),
    "label too large": (lambda m: m.loss(IDS, np.array([0, 2, 1]), OFFSETS), ValueError, "id 2 at position 1 is outside 0 to 1"),
    "numbers for classes": (lambda m: m.loss(IDS, np.array([0.5, 1, 1]), OFFSETS), TypeError, "integer array"),
    "ids too large": (lambda m: m.forward(IDS + 1, offsets=OFFSETS), ValueError, "id 11 at position 3"),
    "a token type too large": (
        lambda m: m.forward(IDS, offsets=OFFSETS, token_types=IDS),
        ValueError,
        "id 5 at position 1 is outside 0 to 1",
    ),
    "offsets": (lambda m: m.forward(IDS, offsets=[0, 9]), ValueError, "offsets must rise"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    call, kind, message = BAD_CALLS[case]
    with pytest.raises(kind, match=message):
        call(tiny())


BAD_CONFIGS = {
    "heads": ({"num_attention_heads": 4}, "hidden_size 6 is not a multiple of num_attention_heads 4"),
    "size": ({"hidden_size": 0}, "hidden_size must be a positive integer"),
    "text for a size": ({"vocab_size": "many"}, "vocab_size must be a positive integer"),
    "activation": ({"hidden_act": "silu"}, "hidden_act is 'silu'; supported: gelu, gelu_new"),
    "positions": ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'; supported: absolute"),
    "decoder": ({"is_decoder": True}, "is_decoder True; supported: False"),
    "task": ({"problem_type": "multi_label_classification"}, "multi_label_classification'; supported"),
    "task and labels": ({"problem_type": "regression", "num_labels": 3}, "does not go with num_labels 3"),
    "names of labels": ({"id2label": {"0": "a", "2": "b"}}, "must name the labels 0 to 1"),
    "no table of labels": ({"id2label": ["a", "b"]}, "config.json: "),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(case):
    change, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message) as caught:
        ml.BertConfig.from_json({**TINY, **change}, "config.json")
    assert str(caught.value).startswith("config.json")


def test_the_number_of_labels_selects_the_loss():
    one, three = (ml.BertConfig.from_json({"id2label": {str(i): "x" for i in range(n)}}, "here") for n in (1, 3))
    assert one.regression
    assert not three.regression
    assert ml.BertConfig.from_json(three.to_json(), "there") == three
    logits = np.array([[0.2, -1.0, 0.4]])
    assert float(F.cross_entropy(logits, np.array([1]))[0]) == pytest.approx(float(np.log(np.exp(logits).sum()) + 1.0))
