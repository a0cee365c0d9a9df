"""Steps that are captured once and replayed as a CUDA graph: the same numbers, few launches, and a fallback where capture is impossible."""

import warnings

import fakecupy
import numpy as np
import pytest

import minilora as ml
from minilora.backend import forget_constants
from minilora.data.batches import Batch, random_windows
from minilora.kernels import cuda
from minilora.kernels.cuda import blas
from minilora.kernels.cuda.replay import AFTER, Replay
from minilora.kernels.memory import POOL_OWNERS, peak_memory
from minilora.training.loop import train

pytestmark = pytest.mark.skipif(not cuda.ENABLED, reason="records launches of the CUDA sources, which need g++ here")

GPT2 = ml.GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2)
SIZES = {"num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA = ml.LlamaConfig(vocab_size=40, max_position_embeddings=16, **SIZES)
GEMMA = ml.LlamaConfig(
    vocab_size=40, max_position_embeddings=16, model_type="gemma3_text", sliding_window=3, sliding_window_pattern=2, head_dim=6, **SIZES
)
TEXT = np.random.default_rng(0).integers(0, 40, 500)


def model_of(config, dropout=0.0):
    model = (ml.GPT2 if config is GPT2 else ml.Llama)(config, rng=0)
    ml.inject(model.to("cupy"), ml.LoraConfig(r=2, lora_dropout=dropout), rng=1)
    return model


def losses(config, record, steps=9, dropout=0.0, batches=None, recompute=False, **options):
    """(loss, norm) of each step, and the trained parameters at the end."""
    model = model_of(config, dropout)
    if recompute:
        model.transformer.recompute = True
    optimizer = ml.AdamW(model.parameters(), 1e-2)
    batches = batches or random_windows(TEXT, 8, 3, np.random.default_rng(2))
    run = train(model, optimizer, batches, steps, lambda step: 1 - step / steps, cuda_graph=record, check_every=1, clip=0.1, **options)
    return [(step.loss, step.grad_norm) for step in run], ml.to_numpy(optimizer.flat.data)


@pytest.mark.parametrize("config", [GPT2, LLAMA, GEMMA], ids=["GPT-2", "Llama", "Gemma 3"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_run_equals_a_plain_run(config, accumulate, gpu):
    """Other data, another rate and another bias correction in every step; some rows have no label."""

    def batches():
        rng = np.random.default_rng(3)
        for batch in random_windows(TEXT, 8, 3, rng):
            batch.labels[[2, 5, 9]] = -100
            yield batch

    plain, recorded = (losses(config, record, batches=batches(), accumulate=accumulate) for record in (False, True))
    rtol = 0 if gpu is fakecupy.module else 1e-4  # to the bit, but that a GPU's products may take another way while recorded
    np.testing.assert_allclose(plain[0], recorded[0], rtol=rtol)
    np.testing.assert_allclose(plain[1], recorded[1], rtol=rtol, atol=rtol)


def test_the_cost_of_a_replayed_step(fake_cupy):
    """The cost of ten more steps, read only at the end."""

    def counted(steps):
        forget_constants()
        model = model_of(GPT2)
        batches = random_windows(TEXT, 8, 3, np.random.default_rng(2))
        with fakecupy.count() as c:
            list(train(model, ml.AdamW(model.parameters(), 1e-2), batches, steps, lambda step: 1.0, check_every=steps))
        return c

    few, more = counted(9), counted(19)
    assert more.syncs - few.syncs == 20  # the losses and norms of ten steps
    assert (more.launches - few.launches) / 10 <= 6  # ids and labels into place, the graph, copies of loss and norm, AdamW
    assert (more.to_device - few.to_device) / 10 == 2  # ids and labels


@pytest.mark.parametrize("recompute", [False, True])
def test_masks_change_in_every_step_and_match_a_plain_run(recompute, fake_cupy, monkeypatch):
    monkeypatch.setattr("minilora.training.replicas.SHARD_ON_DEVICE", 12)  # shards of one sequence: a layer draws several masks per step
    plain, recorded = (losses(GPT2, record, dropout=0.3, recompute=recompute) for record in (False, True))
    assert plain[0] == recorded[0]
    np.testing.assert_array_equal(plain[1], recorded[1])
    assert losses(GPT2, False)[0] != plain[0]


def test_shapes_that_do_not_repeat_are_not_captured(fake_cupy):
    def batches():
        for length in (5, 6, 7, 8, 5, 6, 7, 8, 5):
            ids = TEXT[: 2 * length]
            yield Batch(ids, ids, np.array([0, length, 2 * length]))

    assert losses(GPT2, True, batches=batches())[0] == losses(GPT2, False, batches=batches())[0]


def test_a_bad_id_is_refused_before_the_launch(fake_cupy):
    """CuPy would wrap it silently, and a replay checks nothing."""

    def batches():
        for i, batch in enumerate(random_windows(TEXT, 8, 3, np.random.default_rng(2))):
            batch.ids[4] += 100 * (i == AFTER + 2)
            yield batch

    with pytest.raises(ValueError, match=r"id \d+ at position 4 is outside 0 to 39"):
        losses(GPT2, True, batches=batches())


@pytest.mark.filterwarnings("default")
def test_without_the_bindings_steps_are_not_captured(fake_cupy, monkeypatch):
    expected = losses(GPT2, False)
    monkeypatch.setattr(blas, "bindings", lambda: None)
    plain = losses(GPT2, True)
    np.testing.assert_allclose(plain[0], expected[0], rtol=1e-4)
    replay, x = Replay(), fake_cupy.asarray(np.eye(3))
    for i in range(AFTER + 1):
        if i == AFTER - 1:
            with pytest.warns(UserWarning, match="could not be captured: calling cuBLAS API during stream capture"):
                (y,) = replay("key", lambda x: (x @ x,), [x])
        else:
            (y,) = replay("key", lambda x: (x @ x,), [x])
        np.testing.assert_array_equal(y.get(), np.eye(3))


@pytest.mark.parametrize("wrong", ["counts", "waits", "reads the host"])
def test_work_that_cannot_be_replayed_is_detected(wrong, fake_cupy):
    """A changing number, a synchronisation, a host array: the graph is dropped, the results stay right."""
    replay, calls = Replay(), []

    def work(x):
        calls.append(1)
        if wrong == "waits":
            assert float(x.sum()) > 0
        if wrong == "reads the host":
            x = x * fake_cupy.asarray(np.arange(3.0))
        return (x * len(calls) if wrong == "counts" else x * 2,)

    with warnings.catch_warnings(record=True) as result:
        warnings.simplefilter("always")
        for i in range(AFTER + 2):
            (y,) = replay(0, work, [np.ones(3) + i])
            factor = len(calls) if wrong == "counts" else 2
            np.testing.assert_array_equal(y.get(), (1 + i) * factor * (np.arange(3) if wrong == "reads the host" else 1))
    assert ["could not be captured" in str(warning.message) for warning in result] == [True]
    assert replay.captured is None


def test_memory_of_a_graph_is_counted_and_freed(fake_cupy, monkeypatch):
    monkeypatch.setattr("minilora.kernels.memory._most_held", 0)
    replay = Replay()
    before = peak_memory("cupy")
    for _ in range(AFTER):
        replay(0, lambda x: (x + 1,), [np.ones(3)])
    assert peak_memory("cupy") - before == fakecupy.POOL_BYTES
    pool = replay.captured[1].pool
    for _ in range(AFTER):  # another graph replaces it
        replay(1, lambda x: (x + 2,), [np.ones(4)])
    assert pool.freed
    assert peak_memory("cupy") - before == fakecupy.POOL_BYTES
    pool = replay.captured[1].pool
    replay.close()
    assert pool.freed
    assert not POOL_OWNERS
    assert peak_memory("cupy") - before == fakecupy.POOL_BYTES  # the peak


def test_a_run_frees_its_graph(fake_cupy, monkeypatch):
    """Also if the run is closed early."""
    made = []
    monkeypatch.setattr(fake_cupy.cuda, "MemoryPool", lambda pool=fake_cupy.cuda.MemoryPool: made.append(pool()) or made[-1])
    losses(GPT2, True)
    model = model_of(GPT2)
    run = train(
        model, ml.AdamW(model.parameters(), 1e-2), random_windows(TEXT, 8, 3, np.random.default_rng(2)), 9, lambda step: 1.0, check_every=1
    )
    for _ in range(AFTER + 1):
        next(run)
    run.close()
    assert [pool.freed for pool in made] == [True, True]


def test_the_graph_is_freed_if_memory_runs_out(fake_cupy):
    replay = Replay()
    for _ in range(AFTER):
        replay(0, lambda x: (x + 1,), [np.ones(3)])

    def needs_free_memory(x):
        if POOL_OWNERS:
            raise MemoryError("out of memory")
        return (x + 3,)

    (y,) = replay("another shape", needs_free_memory, [np.ones(4)])
    assert y.get().tolist() == [4] * 4
    with pytest.raises(MemoryError):
        replay("a third", lambda x: (_ for _ in ()).throw(MemoryError()), [np.ones(5)])


def test_the_toy_benchmark_takes_the_same_steps(fake_cupy, tmp_path):
    from argparse import Namespace
    from itertools import islice

    from benchmarks import toy

    o = Namespace(folder=tmp_path)
    toy.prepare(o)
    here, there = (list(islice(toy.ours(o, backend), 8)) for backend in ("numpy", "cupy"))
    np.testing.assert_allclose(here, there, rtol=1e-5)
