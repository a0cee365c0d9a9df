"""Several adapters on one model, their sums (against PEFT), and the LoRA of a fine-tuned model relative to its base."""

import json
from itertools import pairwise

import numpy as np
import pytest
from tiny import tiny_model
from versions import skip_before

import minilora as ml
from minilora.adapters import largest_changes
from minilora.cli import main
from minilora.data.batches import Batch
from minilora.lora import adaptation, lora_layers

IDS, OFFSETS = np.array([1, 5, 2, 10, 0, 7, 7, 3, 4, 9]), [0, 3, 4, 7, 10]


def base(kind, dtype="float64"):
    return tiny_model(kind, dtype).freeze()


def adapted(base, config, seed):
    """A replica with a perturbed adapter."""
    replica, rng = base.replica(), np.random.default_rng(seed)
    ml.inject(replica, config, rng=seed)
    for _, p in replica.parameters():
        if p.trainable:
            p.data = p.data + ml.to_backend(0.3 * rng.standard_normal(p.data.shape), ml.backend.backend_name(p.data), p.data.dtype)
    return replica


def logits(model):
    return ml.to_numpy(model.forward(IDS, keep=False, offsets=OFFSETS)[0])


CONFIGS = {
    "gpt2": [ml.LoraConfig(r=2, target_modules=["c_attn"]), ml.LoraConfig(r=3, lora_alpha=5), ml.BottleneckConfig()],
    "bert": [
        ml.LoraConfig(r=2, task_type="SEQ_CLS"),
        ml.LoraConfig(r=1, target_modules=["query", "pooler.dense"], bias="all", use_rslora=True),
        ml.PartialConfig(train=["norm"]),
    ],
    "llama": [ml.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), ml.BottleneckConfig(), ml.PartialConfig(train=["norm"])],
}


# -- one model with several adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_sequence_of_a_mixed_batch_uses_its_adapter(kind, backend):
    model = base(kind).to(backend)
    models = [model, *(adapted(model, config, i) for i, config in enumerate(CONFIGS[kind]))]
    rows = np.arange(4) if kind == "bert" else np.repeat(np.arange(4), np.diff(OFFSETS))
    alone = [ml.to_numpy(m.forward(IDS, keep=False, offsets=OFFSETS)[0]) for m in models]
    assert min(np.abs(a - b).max() for i, a in enumerate(alone) for b in alone[:i]) > 1e-3
    for which in ([0, 1, 2, 3], [3, 1, 0, 1], [2, 2, 2, 2]):
        together = ml.to_numpy(ml.mixed(models, which, OFFSETS).forward(IDS, keep=False, offsets=OFFSETS)[0])
        expected = np.stack([alone[which[owner]][i] for i, owner in enumerate(rows)])
        np.testing.assert_allclose(together, expected, rtol=1e-10, atol=1e-12)


def test_switching_copies_only_the_adapters():
    model = base("gpt2")
    one, two = (adapted(model, CONFIGS["gpt2"][0], seed) for seed in (0, 1))
    for (path, p), (_, q) in zip(one.parameters(), two.parameters(), strict=True):
        assert (p.data is q.data) != (".lora_" in path)
    assert ml.mixed([one, two], [0, 1, 0, 1], OFFSETS).transformer.h[0].ln_1.weight.data is model.transformer.h[0].ln_1.weight.data


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_gradients_of_a_mixed_batch(kind):
    """By finite differences; each adapter gets the gradient of its own sequences."""
    shared = base(kind)
    models = [adapted(shared, config, i) for i, config in enumerate(CONFIGS[kind])]
    which = [0, 2, 1, 0]
    mixed = ml.mixed(models, which, OFFSETS)
    assert ml.gradcheck(mixed, IDS, max_coordinates=15, offsets=OFFSETS).ok
    y, saved = mixed.forward(IDS, offsets=OFFSETS)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    mixed.backward(dy, saved)
    together = [{path: p.grad for path, p in m.parameters() if p.grad is not None} for m in models]
    rows = dict(enumerate(pairwise(OFFSETS))) if kind == "gpt2" else {i: (i, i + 1) for i in range(4)}
    for k, model in enumerate(models):
        model.zero_grad()
        for i, (a, b) in enumerate(pairwise(OFFSETS)):
            if which[i] == k:
                model.backward(dy[slice(*rows[i])], model.forward(IDS[a:b])[1])
        assert together[k].keys() == {path for path, p in model.parameters() if p.trainable}
        for path, p in model.parameters():
            if p.trainable:
                np.testing.assert_allclose(p.grad, together[k][path], rtol=1e-8, atol=1e-12, err_msg=path)


def test_the_loss_of_a_mixture_is_that_of_its_logits_or_refused():
    """A decoder's loss sees the labelled rows alone: a shared head may, but a head of each model could not tell whose they are."""
    labels = np.where(np.arange(10) % 3, IDS, -100)
    for kind in ("gpt2", "llama"):
        model = base(kind)
        mixed = ml.mixed([model, adapted(model, CONFIGS[kind][0], 0)], [0, 1, 1, 0], OFFSETS)
        expected, _ = ml.cross_entropy(mixed.forward(IDS, keep=False, offsets=OFFSETS)[0], labels)
        assert float(mixed.loss(IDS, labels, OFFSETS, keep=False)[0]) == pytest.approx(float(expected), rel=1e-12)
    headed = ml.mixed([model, adapted(model, ml.LoraConfig(r=2, modules_to_save=["lm_head"]), 0)], [0, 1, 1, 0], OFFSETS)
    with pytest.raises(ValueError, match="mixed: a layer got 6 rows; the batch it was made for has 10"):
        headed.loss(IDS, labels, OFFSETS, keep=False)


def test_bad_mixtures():
    model = base("bert")
    other = adapted(model, ml.PartialConfig(modules_to_save=["word_embeddings"]), 0)
    for models, which, message in (
        ([model, model], [0, 1, 2, 0], "expected one of 0 to 1 for each of 4 sequences"),
        ([model, model], [0, 1], r"which is \[0, 1\]"),
        ([model, base("gpt2")], [0, 1, 0, 0], "have different layers"),
        ([model, other], [0, 1, 0, 0], "differ in bert.embeddings.word_embeddings, an embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.mixed(models, which, OFFSETS)
    mixed = ml.mixed([model, adapted(model, CONFIGS["bert"][0], 0)], [0, 1, 0, 0], OFFSETS)
    with pytest.raises(ValueError, match="got 3 rows; the batch it was made for has 10 or 4"):
        mixed.forward(IDS[:3], keep=False)


# -- weighted sums ----------------------------------------------------------------------------------------------------------------


def deltas(model):
    return {path: ml.to_numpy(layer.delta()) for path, layer in lora_layers(model)}


def test_cat_is_the_sum_and_svd_is_the_best_of_its_rank(backend):
    model = base("gpt2").to(backend)
    one = adapted(model, ml.LoraConfig(r=2, lora_alpha=5), 0)
    two = adapted(model, ml.LoraConfig(r=1, target_modules=["c_attn", "c_fc"], use_rslora=True), 1)
    expected = {path: 0.7 * d for path, d in deltas(one).items()}
    for path, d in deltas(two).items():
        expected[path] = expected[path] - 1.3 * d
    exact = ml.combine(model, [one, two], [0.7, -1.3], "cat")
    for path, d in deltas(exact).items():
        np.testing.assert_allclose(d, expected[path], atol=1e-12)
    assert {layer.r for _, layer in lora_layers(exact)} == {2, 3}
    best = ml.combine(model, [one, two], [0.7, -1.3])  # svd of rank 2, their largest rank
    for path, d in deltas(best).items():
        left = np.linalg.svd(expected[path], compute_uv=False)[2:]
        assert np.linalg.norm(d - expected[path]) == pytest.approx(np.linalg.norm(left), abs=1e-10)
    same = ml.combine(model, [one], [1.0], "linear")
    np.testing.assert_allclose(logits(same), logits(one), atol=1e-12)
    assert adaptation(model).config is None


@pytest.mark.filterwarnings("ignore")  # warnings of PEFT
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("how", "r"), [("cat", None), ("linear", None), ("svd", None), ("svd", 3)])
def test_sums_match_peft(kind, how, r, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed: pip install 'minilora[oracle]'")
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed: pip install 'minilora[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    skip_before(peft, (0, 20), "saves tensors of every adapter with each")
    if how == "svd":
        skip_before(peft, (0, 21), "multiplies by the scale twice in a sum by SVD")
    ml.save_model(base(kind, "float32"), tmp_path / "m")
    names = ("c_attn", "c_fc") if kind == "gpt2" else ("q_proj", "up_proj")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).double()
    theirs, torch_rng = None, torch.manual_seed(0)
    for name, alpha, targets in (("a", 3, names[:1]), ("b", 5, names)):
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False)
        if theirs is None:
            theirs = peft.get_peft_model(plain, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    for path, p in theirs.named_parameters():
        if "lora_" in path:
            p.data = 0.3 * torch.randn(p.shape, generator=torch_rng, dtype=p.dtype)
    theirs.save_pretrained(tmp_path)
    weights = [0.8, -0.6]
    theirs.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=how, svd_rank=r)
    theirs.set_adapter("sum")

    model = ml.load_model(tmp_path / "m", "numpy", "float64")
    models = [model.replica() for _ in weights]
    for replica, name in zip(models, "ab", strict=True):
        ml.load_adapter(replica, tmp_path / name)
    ours = ml.combine(model, models, weights, how, r)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS[None, :7])).logits[0].numpy()
        plain_logits = model.forward(IDS[:7], keep=False)[0]
    found = ours.forward(IDS[:7], keep=False)[0]
    assert np.abs(found - plain_logits).max() > 3e-3  # the sum has an effect
    np.testing.assert_allclose(found, expected, atol=1e-5 if kind == "llama" else 1e-6)
    ml.save_adapter(ours, tmp_path / "sum")  # and PEFT reads the saved sum
    again = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "sum").double().eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(IDS[None, :7])).logits[0].numpy(), found, atol=1e-5)


REFUSED = {
    "counts": ([1.0], "cat", None, "the weights \\[1.0\\] do not match 2 adapters"),
    "not a number": ([1.0, float("nan")], "cat", None, "do not match 2 adapters; pass one finite number"),
    "way": ([1.0, 1.0], "ties", None, "unknown way 'ties'; choose cat, svd, linear"),
    "ranks": ([1.0, 1.0], "linear", None, "the ranks must be the same"),
    "rank": ([1.0, 1.0], "svd", 7, "rank 7 does not fit a matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sums(case):
    weights, how, r, message = REFUSED[case]
    model = base("gpt2")
    with pytest.raises(ValueError, match=message):
        ml.combine(model, [adapted(model, ml.LoraConfig(r=n), n) for n in (1, 2)], weights, how, r)


def test_adapters_without_a_sum():
    model, other = base("bert"), base("bert")
    other.bert.pooler.dense.weight.data = other.bert.pooler.dense.weight.data + 1
    lora = adapted(model, ml.LoraConfig(r=1), 0)
    for second, message in (
        (adapted(model, ml.LoraConfig(r=1, task_type="SEQ_CLS"), 0), "fully trained classifier.bias; only LoRA adapters have a sum"),
        (adapted(model, ml.PartialConfig(train=["norm"]), 0), "only LoRA adapters have a sum"),
        (model, "has no LoRA adapter; only LoRA adapters have a sum"),
        (adapted(other, ml.LoraConfig(r=1), 0), "bert.pooler.dense is no plain LoRA, or was made for other weights"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.combine(model, [lora, second], [1, 1])
    with pytest.raises(ValueError, match="the base model has an adapter itself"):
        ml.combine(lora, [lora], [1])


# -- extraction -------------------------------------------------------------------------------------------------------------------


def fine_tuned(model, rank=None, seed=0, everything=False):
    """Change all dense weights by products of a rank, or fully; with `everything` also biases, norms and embeddings."""
    rng, replica = np.random.default_rng(seed), model.replica()
    for path, layer in replica.modules():
        if isinstance(layer, ml.Linear) and path != model.output_head:
            m, n = layer.weight.data.shape
            dW = rng.standard_normal((m, n)) if rank is None else rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
            layer.weight.data = layer.weight.data + 0.2 * ml.to_backend(dW, ml.backend.backend_name(layer.weight.data))
    for _, p in replica.parameters():
        if everything and p.data.ndim == 1:
            p.data = p.data + 0.1 * rng.standard_normal(p.data.shape)
    return replica


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_low_rank_change_is_extracted_exactly(kind, backend):
    model = base(kind).to(backend)
    tuned = fine_tuned(model, 2)
    adapter, layers = ml.extract(model, tuned, 2)
    np.testing.assert_allclose(logits(adapter), logits(tuned), atol=1e-9)
    assert max(layer.largest_error for layer in layers) < 1e-12
    assert {layer.rank for layer in ml.extract(model, tuned, energy=1 - 1e-9)[1]} == {2}  # found from the energy
    assert np.abs(logits(tuned) - logits(model)).max() > 1e-2


def test_the_rank_is_the_lowest_that_keeps_the_energy():
    model = base("gpt2")
    adapter, layers = ml.extract(model, fine_tuned(model), energy=0.8)
    ranks = {layer.path: layer.rank for layer in layers}
    assert len(set(ranks.values())) > 1
    for path, layer in lora_layers(adapter):
        S = np.linalg.svd(dict(fine_tuned(model).modules())[path].weight.data - layer.weight.data, compute_uv=False)
        kept = (S**2).cumsum() / (S**2).sum()
        assert kept[layer.r - 1] >= 0.8 > (kept[layer.r - 2] if layer.r > 1 else 0)
        assert layer.r == ranks[path]
        assert np.linalg.norm(layer.delta()) ** 2 == pytest.approx(kept[layer.r - 1] * (S**2).sum())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_with_inputs_the_outputs_are_closest(kind, backend):
    """Whitened with data, the output error on these data is smaller and the error in the weights larger."""
    model = base(kind).to(backend)
    tuned = fine_tuned(model)
    rng = np.random.default_rng(3)
    batches = [Batch(rng.integers(0, 11, 60), np.zeros(60, int), np.arange(0, 66, 6)) for _ in range(3)]
    roots = ml.input_roots(tuned, batches)
    R = {path: ml.to_numpy(r) for path, r in roots.items()}
    plain, white = (dict(lora_layers(ml.extract(model, tuned, 2, inputs=inputs)[0])) for inputs in (None, roots))
    compared = 0
    for path, layer in plain.items():
        dW = ml.to_numpy(dict(tuned.modules())[path].weight.data - layer.weight.data)
        out, weight = (
            [np.linalg.norm(L @ (dW - ml.to_numpy(each[path].delta()))) for each in (plain, white)] for L in (R[path], np.eye(len(dW)))
        )
        assert out[1] <= out[0] * (1 + 1e-9)
        assert weight[0] <= weight[1] * (1 + 1e-9)
        compared += out[1] < 0.9 * out[0]
        if path.endswith(("c_attn", "query")):  # x^T x / T of the layer's inputs plus the ridge; factorize divides by the rows
            x = collected(tuned, path, batches)
            C = x.T @ x / len(x)
            np.testing.assert_allclose(R[path].T @ R[path] / len(C), C + 1e-6 * np.trace(C) / len(C) * np.eye(len(C)), atol=1e-10)
    assert compared > 0


def collected(model, path, batches):
    """All inputs of one layer, collected by a wrapped forward, independently of the code under test."""
    replica, seen = model.replica(), []
    layer = dict(replica.modules())[path]
    plain = layer.forward
    layer.forward = lambda x, *args, **options: (seen.append(ml.to_numpy(x)), plain(x, *args, **options))[1]
    for batch in batches:
        replica.forward(batch.ids, keep=False, offsets=batch.offsets)
    return np.concatenate(seen)


def test_biases_norms_and_head_are_extracted_and_embeddings_are_not(tmp_path):
    model = base("bert")
    tuned = fine_tuned(model, 2, everything=True)
    tuned.classifier.weight.data = tuned.classifier.weight.data + 1
    adapter, _ = ml.extract(model, tuned, 2)
    np.testing.assert_allclose(logits(adapter), logits(tuned), atol=1e-9)
    ml.save_adapter(adapter, tmp_path)
    again = base("bert")
    ml.load_adapter(again, tmp_path)
    np.testing.assert_allclose(logits(again), logits(tuned), atol=1e-9)
    bare, _ = ml.extract(model, tuned, 2, whole=False)
    assert adaptation(bare).base_values == {}
    assert np.abs(logits(bare) - logits(tuned)).max() > 1e-2
    tuned.bert.embeddings.word_embeddings.weight.data = tuned.bert.embeddings.word_embeddings.weight.data + 0.5
    changes = largest_changes(model, tuned)
    assert changes["bert.embeddings.word_embeddings.weight"] == 0.5
    assert changes["classifier.weight"] == 1
    assert adaptation(ml.extract(model, tuned, 2)[0]).config.modules_to_save.count("classifier") == 1


def test_changing_the_rank_of_an_adapter():
    model = base("llama")
    first = adapted(model, ml.LoraConfig(r=3, lora_alpha=7), 0)
    second, layers = ml.extract(model, first, 1)
    for path, layer in lora_layers(second):
        dW = dict(lora_layers(first))[path].delta()
        S = np.linalg.svd(dW, compute_uv=False)
        assert np.linalg.norm(dW - layer.delta()) == pytest.approx(np.linalg.norm(S[1:]), abs=1e-10)
    merged = first.replica()
    ml.merge(merged)
    assert largest_changes(model, merged) == largest_changes(model, first)
    assert max(layer.largest_change for layer in layers) == max(largest_changes(model, first).values())


BAD = {
    "rank": (lambda m: ml.extract(m, fine_tuned(m), 7), "rank 7 is beyond transformer.h.0.attn.c_attn, which is 6 x 18"),
    "no rank": (lambda m: ml.extract(m, fine_tuned(m), 0), "the rank must be at least 1"),
    "energy": (lambda m: ml.extract(m, fine_tuned(m), energy=1.5), "the energy to keep is 1.5"),
    "nothing": (lambda m: ml.extract(m, m.replica(), 2), "no linear layer differs"),
    "another": (lambda m: ml.extract(m, base("bert"), 2), "not of one kind: transformer.wte.weight is missing in the second"),
    "bottleneck": (lambda m: ml.extract(m, adapted(m, ml.BottleneckConfig(), 0), 2), "down.weight is missing in the first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_extractions(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(base("gpt2"))


# -- the command line -------------------------------------------------------------------------------------------------------------


def run(capsys, *argv):
    status = main([str(a) for a in argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_extract_and_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    small = ["--data", "poem.txt", "--steps", "6", "--window", "32", "--batch-size", "2", "--threads", "1", "--eval-bytes", "256"]
    small += ["--sample-bytes", "0", "--backend", "numpy"]
    assert run(capsys, "finetune", *small, "--method", "full", "--lr", "0.003", "--out", "run")[0] == 0
    data = ["--data", "poem.txt", "--window", "32", "--threads", "1"]
    status, out, err = run(capsys, "extract", "run", "--out", "adapter", "--r", "16", *data, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["base"] == "pydoc"
    before, extracted, tuned = (result["held_out"][name]["bits_per_byte"] for name in ("base", "extracted", "tuned"))
    assert tuned < extracted < before
    assert set(result["left_out"]) == {"transformer.wte.weight", "transformer.wpe.weight"}

    status, out, _ = run(capsys, "compare", "pydoc", "run")
    assert status == 0
    last = out.splitlines()[-1]
    assert "of 52 parameters differ; the largest change is" in last
    status, out, _ = run(capsys, "compare", "run", "run", "--json")
    assert json.loads(out)["largest_change"] == 0
    status, out, _ = run(capsys, "extract", "adapter", "--energy", "0.5", "--out", "smaller")
    assert status == 0
    assert "extracted a LoRA of rank" in out

    for argv, message in (
        (["extract", "run", "--out", "adapter"], "adapter is in use; name another folder with --out"),
        (["extract", "run/model", "--r", "500", "--out", "x"], "rank 500 is beyond transformer.h.0.attn.c_attn, which is 128 x 384"),
        (["extract", "pydoc", "--out", "x"], "does not name the model it was tuned from; name it with --base"),
        (["extract", "pydoc", "--base", "pydoc", "--out", "x"], "no linear layer differs"),
    ):
        status, _, err = run(capsys, *argv)
        assert status == 1
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "x").exists()
