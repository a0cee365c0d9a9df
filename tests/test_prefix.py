"""Cached frozen prefixes, recomputed blocks and shards change nothing in the result."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import minilora as ml
from minilora.data.batches import Batch
from minilora.training.loop import train
from minilora.training.prefix import PrefixCache
from minilora.training.replicas import Replicas

SIZES = {"vocab_size": 11, "hidden_size": 6, "intermediate_size": 9, "num_attention_heads": 3, "num_hidden_layers": 4}
LAYERS = {"layers_to_transform": [2, 3], "init_lora_weights": False, "r": 2}


def model_of(kind, dropout=0.0, targets=None):
    if kind == "gpt2":
        model = ml.GPT2(
            ml.GPT2Config(vocab_size=11, n_positions=16, n_embd=6, n_layer=4, n_head=3, dropout=dropout), rng=0, dtype="float64"
        )
    elif kind == "bert":
        config = ml.BertConfig(**SIZES, max_position_embeddings=16, num_labels=3, dropout=dropout)
        model = ml.BertClassifier(config, rng=0, dtype="float64")
    else:
        model = ml.Llama(ml.LlamaConfig(**SIZES, head_dim=4, max_position_embeddings=16), rng=0, dtype="float64")
    for _, p in model.parameters():
        p.data = p.data * (10 if p.data.ndim == 2 else 1)  # otherwise gradients would be close to zero
    names = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "output.dense"], "llama": ["q_proj", "up_proj"]}[kind]
    ml.inject(model, ml.LoraConfig(target_modules=names, lora_dropout=dropout, **{**LAYERS, **(targets or {})}), rng=0)
    return model


def batch_of(kind, lengths=(3, 1, 5, 7, 2), seed=0):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    per_sequence = kind == "bert"
    labels = rng.integers(0, 3, len(lengths)) if per_sequence else np.where(rng.random(n) < 0.4, -100, rng.integers(0, 11, n))
    return Batch(rng.integers(0, 11, n), labels, np.concatenate([[0], np.cumsum(lengths)]), per_sequence)


def gradient(model, batch, prefix=None, threads=1, tokens=512, seed=()):
    flat = ml.SGD(model.parameters(), 0.1).flat
    with Replicas(model, flat, threads, prefix, tokens) as replicas:
        loss = float(replicas.gradients([batch], seed=seed))
    return loss, ml.to_numpy(flat.grad).copy()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_a_frozen_prefix_is_computed_once_with_equal_results(kind, backend):
    model, batch = model_of(kind).to(backend), batch_of(kind)
    loss, expected = gradient(model, batch)
    cache, calls = PrefixCache(), []
    body = model.body
    plain = type(body).prefix
    body.prefix = lambda *args: calls.append(len(args[0])) or plain(body, *args)
    for _ in range(3):
        again, found = gradient(model, batch, cache)
        assert again == pytest.approx(loss, rel=1e-12)
        np.testing.assert_allclose(found, expected, atol=1e-13)
    lengths = [3, 1, 5, 7, 2]
    assert calls == lengths  # each sequence once, alone
    other = batch_of(kind, (4, 2), seed=1)
    gradient(model, other, cache)
    gradient(model, other, cache)
    assert calls == [*lengths, 4, 2]
    assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_nothing_is_cached_if_the_first_block_is_trained(kind):
    model, batch = model_of(kind, targets={"layers_to_transform": [0]}), batch_of(kind)
    cache = PrefixCache()
    assert gradient(model, batch, cache)[0] == gradient(model, batch)[0]
    assert (cache.kept, cache.bytes) == ({}, 0)


def test_beyond_its_limit_a_cache_computes_again():
    model, batch = model_of("gpt2"), batch_of("gpt2")
    _, expected = gradient(model, batch)
    cache = PrefixCache(limit=8 * 6 * 7)
    for _ in range(2):
        np.testing.assert_allclose(gradient(model, batch, cache)[1], expected, atol=1e-13)
    assert [len(x) for x in cache.kept.values()] == [3, 1, 2]  # of 3, 1, 5, 7 and 2 tokens, in order, those that fit
    assert cache.bytes == 8 * 6 * 6


def test_threads_keep_each_sequence_once():
    model, batches = model_of("gpt2"), [batch_of("gpt2", seed=s) for s in range(8)]
    cache = PrefixCache()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda batch: cache(model, batch), batches * 2))
    for batch in batches:
        np.testing.assert_allclose(cache(model, batch).x, model.body.prefix(batch.ids, batch.offsets).x, atol=1e-13)
    assert cache.bytes == sum(x.nbytes for x in cache.kept.values())


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_recomputed_blocks_give_the_same_gradient_with_dropout(kind, backend):
    model, batch = model_of(kind, dropout=0.3).to(backend), batch_of(kind)
    loss, expected = gradient(model, batch, seed=(1, 2))
    for _, layer in model.modules():
        if hasattr(layer, "recompute"):
            layer.recompute = True
    again, found = gradient(model, batch, seed=(1, 2))
    assert again == loss
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize(("threads", "tokens"), [(1, 4), (2, 3), (3, 1), (8, 512)])
def test_shards_of_any_size_give_the_same_gradient(kind, threads, tokens):
    model, batch = model_of(kind), batch_of(kind)
    loss, expected = gradient(model, batch)
    again, found = gradient(model, batch, threads=threads, tokens=tokens)
    assert again == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_one_sequence_of_one_token_on_more_threads_than_sequences(kind):
    batch = Batch(np.array([3]), np.array([1]), np.array([0, 1]), kind == "bert")
    model = model_of(kind)
    expected = gradient(model, batch)[1]
    np.testing.assert_allclose(gradient(model, batch, PrefixCache(), threads=4)[1], expected, atol=1e-14)


def test_runs_with_and_without_the_cache_are_equal():
    def losses(prefix):
        model = model_of("llama")
        batches = iter([batch_of("llama", seed=s) for s in (0, 1, 0, 1, 0, 1)])
        return [s.loss for s in train(model, ml.AdamW(model.parameters(), 1e-2), batches, 6, ml.schedule("constant", 6), prefix=prefix)]

    np.testing.assert_allclose(losses(PrefixCache()), losses(None), rtol=1e-10)
