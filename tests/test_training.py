"""Optimizers, schedules, the flat buffer, replicas, the loop."""

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.data.batches import Batch, held_out_windows, random_windows, windows
from minilora.data.datasets import endless
from minilora.layers import Parameter
from minilora.optim.flat import FlatBuffer, clip_grad_norm
from minilora.training.evaluate import evaluate
from minilora.training.loop import train
from minilora.training.replicas import Replicas
from minilora.training.watch import Diverged

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizers.json").read_text())
CONFIG = ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3, dropout=0.0)


def tiny(dropout=0.0, dtype="float64", lora=True, seed=0):
    model = ml.GPT2(ml.GPT2Config(**{**vars(CONFIG), "dropout": dropout}), rng=seed, dtype=dtype)
    if lora:
        ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False), rng=seed)
    return model


def some_batch(lengths, seed=0):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    labels = np.where(rng.random(n) < 0.4, -100, rng.integers(0, 11, n))
    return Batch(rng.integers(0, 11, n), labels, np.concatenate([[0], np.cumsum(lengths)]))


def gradients(model):
    return {path: p.grad.copy() for path, p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_optimizer_steps_match_torch(name, backend, on):
    run, target = GOLDEN["runs"][name], on(np.array(GOLDEN["target"]))
    kind = {"sgd": ml.SGD, "adam": ml.Adam, "adamw": ml.AdamW}[name.split()[0]]
    p = Parameter(on(np.array(GOLDEN["start"])))
    optimizer = kind([p], **run["options"])
    for expected in run["steps"]:
        p.add_grad(4 * (p.data - target) ** 3 / 6)
        clip_grad_norm(optimizer.flat, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        np.testing.assert_allclose(ml.to_numpy(p.data), expected, rtol=2e-6)  # both add 1e-6 to the norm, torch at another place


def test_bias_correction_matches_the_paper():
    """The ratio of the steps is (1 - b1^t) / sqrt(1 - b2^t): 3.16 at t = 1, 6.57 at t = 12, 1.26 at t = 1000."""
    seen = {}
    corrected, raw = Parameter(np.zeros(1)), Parameter(np.zeros(1))
    a, b = ml.AdamW([corrected], 1.0, eps=0), ml.AdamW([raw], 1.0, eps=0, bias_correction=False)
    for t in range(1, 1001):
        before = float(corrected.data[0]), float(raw.data[0])
        for p, optimizer in ((corrected, a), (raw, b)):
            p.add_grad(np.ones(1))
            optimizer.step()
            optimizer.zero_grad()
        seen[t] = (float(raw.data[0]) - before[1]) / (float(corrected.data[0]) - before[0])
    assert seen[1] == pytest.approx(3.16, abs=0.005)
    assert seen[12] == pytest.approx(6.57, abs=0.005)
    assert max(seen, key=seen.get) == 12
    assert seen[1000] == pytest.approx(1.26, abs=0.005)


def test_parameters_are_views_of_the_flat_buffer(backend):
    model = tiny().to(backend)
    flat = ml.AdamW(model.parameters()).flat
    trainable = [p for _, p in model.parameters() if p.trainable]
    assert flat.data.size == sum(p.data.size for p in trainable)
    flat.data[...] = 7
    assert all(float(abs(p.data - 7).max()) == 0 for p in trainable)
    batch = some_batch([3, 5])
    model.loss_backward(model.loss(batch.ids, batch.labels, batch.offsets)[1])
    flat.grad[...] = 3
    assert all(float(abs(p.grad - 3).max()) == 0 for p in trainable)


def test_a_missing_gradient_counts_as_zero():
    p, q = Parameter(np.ones(2)), Parameter(np.ones(3))
    optimizer = ml.SGD([p, q], 1.0)
    for _ in range(2):  # in the second round the buffer still holds the first gradient
        p.add_grad(np.ones(2))
        q.add_grad(np.ones(3))
        optimizer.zero_grad()
        p.add_grad(np.ones(2))
        optimizer.step()
        optimizer.zero_grad()
    assert p.data.tolist() == [-1, -1]
    assert q.data.tolist() == [1, 1, 1]


def test_an_optimizer_detects_replaced_parameters():
    for change in (lambda m: m.to(dtype="float32"), lambda m: m.freeze()):
        model = tiny()
        optimizer = ml.SGD(model.parameters(), 0.1)
        change(model)
        with pytest.raises(RuntimeError, match="moved or frozen after the optimizer was made"):
            optimizer.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlatBuffer(tiny().freeze().parameters()), "nothing is trainable"),
        (lambda: ml.SGD([Parameter(np.ones(1))], -1), "lr must be"),
        (lambda: ml.SGD([Parameter(np.ones(1))], math.nan), "lr must be"),
        (lambda: ml.SGD([Parameter(np.ones(1))], 1, nesterov=True), "nesterov needs a momentum"),
        (lambda: ml.AdamW([Parameter(np.ones(1))], betas=(0.9, 1)), "betas"),
        (lambda: ml.schedule("steps", 10), "constant, linear, cosine"),
        (lambda: ml.schedule("linear", 10, warmup=10), "does not fit a run of 10"),
        (lambda: next(random_windows(np.zeros(8, np.uint8), 8, 2, np.random.default_rng(0))), "too short for one window of 8"),
        (lambda: evaluate(tiny(), []), "nothing to evaluate"),
        (lambda: Replicas(tiny(), ml.SGD(tiny().parameters(), 1).flat, 0), "threads must be at least 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_parameters_of_two_dtypes_are_refused():
    with pytest.raises(TypeError, match="float32, float64"):
        FlatBuffer([Parameter(np.ones(1)), Parameter(np.ones(1, np.float32))])


def test_clipping_scales_to_the_norm_and_keeps_small_gradients(on, xp):
    p, q = Parameter(on(np.zeros(2))), Parameter(on(np.zeros(1)))
    flat = FlatBuffer([p, q])
    p.add_grad(on(np.array([3.0, 0.0])))
    q.add_grad(on(np.array([4.0])))
    assert float(clip_grad_norm(flat, 10.0)) == pytest.approx(5)
    assert ml.to_numpy(flat.grad).tolist() == [3, 0, 4]
    assert float(clip_grad_norm(flat, 1.0)) == pytest.approx(5)
    np.testing.assert_allclose(ml.to_numpy(p.grad), [0.6, 0], rtol=1e-6)


def test_schedules():
    linear, cosine = ml.schedule("linear", 110, warmup=10), ml.schedule("cosine", 110, warmup=10, final=0.1)
    assert [linear(0), linear(9), linear(10), linear(60), linear(110)] == pytest.approx([1 / 11, 10 / 11, 1, 0.5, 0])
    assert [cosine(10), cosine(60), cosine(110), cosine(500)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert {ml.schedule("constant", 5)(s) for s in range(9)} == {1.0}


def test_accumulation_equals_the_large_batch_weighted_by_tokens():
    """Three batches with different numbers of labels, accumulated or packed into one: the same gradient."""
    parts = [some_batch([2, 3], 1), some_batch([7], 2), some_batch([1, 1, 6], 3)]
    whole = Batch(
        np.concatenate([b.ids for b in parts]),
        np.concatenate([b.labels for b in parts]),
        np.concatenate([[0], np.cumsum([n for b in parts for n in np.diff(b.offsets)])]),
    )
    assert len({b.labelled for b in parts}) > 1
    model = tiny()
    flat = FlatBuffer(model.parameters())
    with Replicas(model, flat) as replicas:
        loss = float(replicas.gradients(parts))
        apart = flat.grad.copy()
        expected = float(replicas.gradients([whole]))
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(apart, flat.grad, atol=1e-14)
    assert np.abs(apart).max() > 1e-3


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_replicas_give_the_gradient_of_the_batch(threads):
    batch = some_batch([3, 1, 5, 2, 4])
    model = tiny(lora=False)
    model.loss_backward(model.loss(batch.ids, batch.labels, batch.offsets)[1])
    expected = gradients(model)
    flat = FlatBuffer(model.parameters())
    with Replicas(model, flat, threads) as replicas:
        for _ in range(2):  # in the second round the buffers hold old gradients
            replicas.gradients([batch])
    for path, g in gradients(model).items():
        np.testing.assert_allclose(g, expected[path], atol=1e-14, err_msg=path)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_runs_are_equal_bit_for_bit(threads):
    def run():
        model = tiny(dropout=0.2, dtype="float32")
        optimizer = ml.AdamW(model.parameters(), 1e-2)
        text = np.random.default_rng(3).integers(0, 11, 400)
        batches = random_windows(text, 8, 5, np.random.default_rng(4))
        losses = [s.loss for s in train(model, optimizer, batches, 6, ml.schedule("linear", 6), threads=threads, accumulate=2)]
        return losses, optimizer.flat.data

    (losses, one), (again, two) = run(), run()
    assert losses == again
    assert one.tobytes() == two.tobytes()
    assert losses[-1] != losses[0]


def test_training_is_equal_on_both_backends(backend):
    """Equal losses, also with dropout: masks and batches do not depend on the backend."""

    def losses(where):
        model = tiny(dropout=0.3).to(where)
        text = np.random.default_rng(3).integers(0, 11, 400)
        steps = train(
            model, ml.AdamW(model.parameters(), 1e-2), random_windows(text, 8, 4, np.random.default_rng(4)), 12, ml.schedule("cosine", 12)
        )
        return [s.loss for s in steps]

    np.testing.assert_allclose(losses(backend), losses("numpy"), rtol=1e-9)


def test_training_learns_a_pattern(backend):
    text = np.tile(np.arange(8), 60)
    model = tiny(lora=False, dtype="float32").to(backend)
    steps = list(
        train(
            model, ml.AdamW(model.parameters(), 2e-2), random_windows(text, 8, 4, np.random.default_rng(0)), 40, ml.schedule("constant", 40)
        )
    )
    assert [s.step for s in steps] == list(range(1, 41))
    assert steps[0].tokens == 32
    assert steps[-1].loss < 0.3 * steps[0].loss


def learner():
    """A small model, its optimizer, and endless batches; always the same."""
    model = tiny(lora=False)
    text = np.random.default_rng(3).integers(0, 11, 400)
    return model, ml.SGD(model.parameters(), 0.1), random_windows(text, 8, 4, np.random.default_rng(4))


def states(steps):
    """The parameters before step 1, after step 1, ... of that run."""
    model, optimizer, batches = learner()
    found = [optimizer.flat.data.copy()]
    for _ in train(model, optimizer, batches, steps, ml.schedule("constant", 20)):
        found.append(optimizer.flat.data.copy())
    return found


@pytest.mark.parametrize(("check_every", "kept"), [(1, 5), (4, 3)])
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_state_with_a_finite_loss(check_every, kept):
    model, optimizer, batches = learner()

    def poisoned():
        for i, batch in enumerate(batches):
            if i == 6:  # as if step 6 had produced a parameter without a finite loss
                model.transformer.wpe.weight.data[3, 2] = np.nan
            yield batch

    seen = []
    with pytest.raises(Diverged, match=r"loss is not finite at step 7, first in transformer\.w") as caught:
        seen.extend(s.step for s in train(model, optimizer, poisoned(), 20, ml.schedule("constant", 20), check_every=check_every))
    assert caught.value.kept == kept  # the loss of step 6 is that of the parameters after step 5
    np.testing.assert_array_equal(optimizer.flat.data, states(kept)[kept])


@pytest.mark.parametrize("value", [np.nan, 1e200])  # finite parameters may give a loss that is not finite
def test_the_last_update_is_checked(value):
    model, optimizer, batches = learner()
    update = optimizer.step
    made = []

    def step():
        update()
        made.append(1)
        if len(made) == 3:
            optimizer.flat.data[...] = value

    optimizer.step = step
    with pytest.raises(Diverged, match=r"not finite after the last update \(step 3\)") as caught:
        list(train(model, optimizer, batches, 3, ml.schedule("constant", 20)))
    assert caught.value.kept == 2
    np.testing.assert_array_equal(optimizer.flat.data, states(2)[2])


def test_a_step_does_not_span_two_epochs():
    model, optimizer, batches = learner()
    five = [next(batches) for _ in range(5)]
    stream = endless(lambda rng: iter(five))
    steps = list(train(model, optimizer, stream, 6, ml.schedule("constant", 20), accumulate=2))
    assert [s.tokens for s in steps] == [64, 64, 32] * 2


def test_data_that_end_early_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="ended at step 3 of 5"):
        list(train(model, ml.SGD(model.parameters(), 0.1), iter([some_batch([8])] * 2), 5, ml.schedule("constant", 5)))


def test_a_batch_without_labels_is_refused():
    model, batch = tiny(), some_batch([4])
    batch.labels[:] = -100
    with pytest.raises(ValueError, match="no token in this batch is labelled"):
        next(train(model, ml.SGD(model.parameters(), 0.1), iter([batch]), 1, ml.schedule("constant", 1)))


def test_evaluation_is_the_mean_over_labelled_tokens_for_any_threads():
    model, batches = tiny(), [some_batch([4, 3], 1), some_batch([8], 2)]
    total = sum(float(model.loss(b.ids, b.labels, b.offsets, keep=False)[0]) * b.labelled for b in batches)
    count = sum(b.labelled for b in batches)
    assert evaluate(model, batches) == (pytest.approx(total / count), count)
    assert evaluate(model, batches, threads=3) == evaluate(model, batches)


def test_windows_and_splits():
    text = np.arange(50, dtype=np.uint8)
    batch = windows(text, np.array([0, 10]), 4)
    assert batch.ids.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert batch.labels.tolist() == [1, 2, 3, 4, 11, 12, 13, 14]
    assert batch.offsets.tolist() == [0, 4, 8]
    seen = np.concatenate([b.ids for b in held_out_windows(text, 7, 2)])
    assert seen.tolist() == list(range(49))
    assert [b.ids[0] for b in held_out_windows(text, 7, 1, most=3)] == [0, 21, 42]
    for n in (2, 7, 8, 9, 30, 50):  # for any length, each token but the first is predicted once
        assert np.concatenate([b.labels for b in held_out_windows(text[:n], 7, 2)]).tolist() == list(range(1, n))
    shards = some_batch([5, 1, 1, 5, 4]).split(3)
    assert sorted(int(s.offsets[-1]) for s in shards) == [5, 5, 6]
    even = some_batch([2] * 6)
    assert [s.ids.tolist() for s in even.split(3)] == even.ids.reshape(3, 4).tolist()  # in order
    assert len(some_batch([5]).split(4)) == 1
    starts = {int(b.ids[0]) for b in islice(random_windows(text, 7, 1, np.random.default_rng(0)), 300)}
    assert starts == set(range(43))  # every window, including the last


# -- out of memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "advice"), [(2, "2 of a batch's 8 sequences fit: --batch-size 2"), (0, "not one of 8 sequences fits")])
def test_out_of_memory_reports_what_fits_and_keeps_the_results(most, advice, backend, tmp_path, monkeypatch):
    from minilora.models import GPT2
    from minilora.runs.finetune import finetune
    from minilora.runs.recipe import Recipe

    steps, loss = 0, GPT2.loss

    def limited_loss(self, ids, labels, offsets=None, *args, **kwargs):
        nonlocal steps
        keep = kwargs.get("keep", True)
        steps += keep
        if keep and steps > (4 if backend == "numpy" else 2) and len(offsets) - 1 > most:  # memory for two steps
            raise MemoryError("out of memory")
        return loss(self, ids, labels, offsets, *args, **kwargs)

    monkeypatch.setattr(GPT2, "loss", limited_loss)
    recipe = Recipe(steps=9, window=256, eval_bytes=512, sample_bytes=0, threads=1, backend=backend)
    with pytest.raises(MemoryError, match=advice) as result:
        finetune(recipe, tmp_path / "run", say=lambda line: None)
    assert f"is in {tmp_path / 'run'}" in str(result.value)
    again = ml.load_model("pydoc", "numpy")
    ml.load_adapter(again, tmp_path / "run" / "adapter")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"]["stopped_after_step"] >= 1
