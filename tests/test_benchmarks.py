"""The arithmetic of benchmarks/, and one small run end to end."""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from benchmarks import footprint, footprint_count, footprint_tables, straight, toy, where
from benchmarks.report import COMPARED, Measured, disagreement, exponent, ratios, summary
from minilora.checking.calls import arrays_in, owner
from minilora.checking.trace import trace
from minilora.kernels.dispatch import PLAIN
from minilora.lora import adaptation
from minilora.models.bert import BertConfig

needs_ml_dtypes = pytest.mark.skipif(not importlib.util.find_spec("ml_dtypes"), reason="bfloat16 needs ml_dtypes")
ROOT = Path(__file__).parent.parent


def test_ratios_are_taken_within_a_round():
    """The machine is ten times slower after the first round: this changes a ratio of medians, but not the ratios within a round."""
    assert ratios([1, 10, 11], [2, 20, 20]) == {"median": 0.5, "min": 0.5, "max": 0.55}


def test_the_exponent_is_that_of_the_upper_half():
    x = [1, 2, 4, 8, 16, 32]
    assert exponent(x, [5 * a**1.5 for a in x]) == pytest.approx(1.5)
    assert exponent(x[::-1], [max(64, 3 * a**2) for a in x[::-1]]) == pytest.approx(2, abs=1e-9)  # constant below 8
    assert exponent([2, 4], [10, 5]) == pytest.approx(-1)


def test_losses_are_compared_step_for_step():
    assert disagreement([2.0, 1.0], [2.0, 1.1]) == pytest.approx(0.05)  # relative to the first loss
    assert disagreement([2.0, 1.0], [2.0]) == disagreement([], []) == math.inf
    assert disagreement([2.0, math.nan], [2.0, math.nan]) == disagreement([math.inf], [math.inf]) == math.inf
    late = [1.0] * COMPARED
    assert disagreement([*late, 1.0], [*late, 2.0]) == 0


def sides(*losses):
    return [Measured(f"side{i}", [1.0 + i, 2.0 + i], list(values), 100 * (i + 1), 10, [0.0]) for i, values in enumerate(losses)]


@pytest.mark.parametrize("wrong", [[2.0, 1.001], [2.0, math.nan], [2.0]])
def test_a_rival_with_different_losses_fails_the_benchmark(wrong):
    right = [2.0, 1.0]
    result = summary(sides(right, right, [2.0, 1.0000001]), 10, 1e-4)
    assert result["ok"]
    assert result["best"] == "side1"
    assert result["ratio_to_best"] == {"median": pytest.approx(7 / 12), "min": 0.5, "max": pytest.approx(2 / 3)}
    assert result["sides"]["side2"]["memory_ratio"] == pytest.approx(1 / 3)
    assert result["sides"]["side1"]["seconds_per_step"] == [0.2, 0.3]
    result = summary(sides(right, right, wrong), 10, 1e-4)
    assert not result["ok"]
    json.dumps(result, allow_nan=False)
    assert summary(sides(right, wrong), 10, None)["ok"]  # without a tolerance, losses are not compared


def test_without_a_rival_the_benchmark_fails():
    assert not summary(sides([2.0]), 10, 1e-4)["ok"]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.toy", "--rounds", "1", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="the rivals are not installed (pip install 'minilora[oracle]')")
def test_a_small_run():
    done = run("--steps", "2", "--no-compile")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["command"] == "python -m benchmarks.toy --rounds 1 --threads 1 --steps 2 --no-compile"
    assert list(result["sides"]) == ["ours", "eager", "malloc", "plain"]
    assert result["losses"]["apart"] < 1e-5
    assert result["losses"]["last"] < result["losses"]["first"]
    assert all(side["seconds_per_step"][0] > 0 and side["peak_memory_bytes"] > 1e7 for side in result["sides"].values())


def test_the_floor_is_made_of_every_product_of_a_step():
    model = ml.MLP([6, 5, 4], rng=0)
    ml.inject(model, ml.LoraConfig(r=2), rng=0)
    x, labels = np.ones((7, 6), "float32"), np.arange(7) % 4

    def step():
        logits, saved = model.forward(x, need_dx=False)
        model.backward(ml.cross_entropy(logits, labels)[1], saved, need_dx=False)

    (made,) = where.products(step)
    T, r = 7, 2
    expected = 0
    for m, n, need_dx in ((6, 5, False), (5, 4, True)):
        expected += 2 * T * (m * n + m * r + r * n)  # x W, u = x A, u B
        expected += 2 * T * (r * n + r * n + m * r)  # dB = u^T dy, du = dy B^T, dA = x^T du
        expected += 2 * T * (m * n + m * r) * need_dx  # dy W^T, du A^T
    assert sum(2 * room.size * a.shape[-1] for _, a, _, room in made) == expected
    found = where.where(step, threads=2, rounds=1)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["floor_seconds"] > 0


def test_the_straight_line_takes_the_same_steps(tmp_path):
    o = argparse.Namespace(folder=tmp_path)
    toy.prepare(o)
    ours, line = ([next(steps) for _ in range(5)] for steps in (toy.ours(o), straight.line(o)))
    assert ours == line


def test_bad_input_is_one_sentence():
    done = run("--rounds", "0")
    assert done.returncode == 2
    assert done.stderr.endswith("error: argument --rounds: '0' should be an integer of at least 1\n")


def small_config(kind, times=1):
    """A configuration of a family. times: a factor of its width."""
    d, more = 48 * times, {}
    sizes = {"vocab_size": 300, "hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "gpt2":
        return ml.GPT2Config(vocab_size=300, n_positions=512, n_embd=d, n_layer=3, n_head=4)
    if kind == "bert":
        return BertConfig(**sizes, pooling="mean")
    if kind != "llama, head of its own":
        more["tie_word_embeddings"] = True
    if kind == "gemma3_text":
        more |= {"sliding_window": 100, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16 * times}
    heads = {"num_key_value_heads": 2, "head_dim": 16 * times, "max_position_embeddings": 512}
    return ml.LlamaConfig(**sizes, **heads, model_type=kind.partition(",")[0], **more)


def a_small_model(kind, dtype="float32"):
    """(configuration, model) of a family, with LoRA of rank 8 on all linear layers."""
    config = small_config(kind)
    model = footprint.build(config, dtype)
    ml.inject(model, footprint.lora_config(config), rng=0)
    return config, model


optimised = pytest.mark.skipif(PLAIN, reason="references save other arrays than the kernels that are counted")
KINDS = ["llama", "llama, head of its own", "qwen3", "gemma3_text", "gpt2", "bert"]
DTYPES = ["float32", pytest.param("bfloat16", marks=needs_ml_dtypes), "nf4"]


@optimised
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_from_a_configuration_is_what_a_model_holds_and_saves(kind, dtype, recompute):
    config, model = a_small_model(kind, dtype)
    T, classes = 200, getattr(config, "num_labels", 0)
    counted = footprint_count.count(config, dtype, 2, T, threads=2, recompute=recompute)
    frozen = {id(p.data): p.data for _, p in model.parameters() if not p.trainable}
    original = adaptation(model).base_values.values()  # of a classifier's head, before training
    assert counted.weights == sum(value.nbytes for value in [*frozen.values(), *original])
    optimizer = ml.AdamW(model.parameters())
    assert counted.trained == optimizer.flat.data.size
    assert counted.adapters == 6 * optimizer.flat.data.nbytes

    model.body.recompute = recompute
    labels = np.zeros(1 if classes else T, int)
    _, kept = model.loss(np.arange(T), labels, np.array([0, T]))
    parameters = {id(owner(p.data)) for _, p in model.parameters()}
    arrays = {id(owner(a)): owner(a) for a in arrays_in(kept) if a.dtype.kind not in "iu"}
    each = footprint_count.BYTES.get(dtype, 4)
    of_the_head = 4 * classes + each * config.hidden_size if classes else 0  # for each sequence: the gradient of the logits, and the mean
    assert counted.saved == sum(a.nbytes for i, a in arrays.items() if i not in parameters) - of_the_head


@optimised
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_flops_of_a_configuration_are_those_that_run(kind, recompute):
    config, model = a_small_model(kind)
    T, classes = 200, getattr(config, "num_labels", 0)
    model.body.recompute = recompute
    with trace(model) as calls:
        _, kept = model.loss(np.arange(2 * T) % 300, np.zeros(2 if classes else 2 * T, int), np.array([0, T, 2 * T]))
        model.loss_backward(kept)
    ran = sum(call.flops.total for call in calls if "classifier" not in call.place and call.name != "linear")
    assert footprint_count.count(config, "float32", 2, T, recompute=recompute).flops == ran


@optimised
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "bert"])
def test_the_peak_of_a_step_is_within_a_tenth_of_the_count(monkeypatch, kind, dtype, recompute):
    """Of what NumPy allocates. The process, and what the C allocator keeps, are not in it."""
    config = small_config(kind, 6)
    monkeypatch.setattr(footprint, "configuration", lambda name: config)
    tracemalloc.start()
    try:
        steps = footprint.ours(Namespace(model=kind, dtype=dtype, sequences=1, recompute=recompute, threads=1))
        next(steps)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    steps.close()
    counted = footprint_count.count(config, dtype, 1, footprint.LENGTH, 1, recompute)
    assert counted.total - footprint_count.PROCESS == pytest.approx(peak, rel=0.1)


def test_a_count_refuses_sequences_that_share_a_lane():
    with pytest.raises(ValueError, match=r"^8 sequences would share 2 lanes; count at most one sequence a thread\.$"):
        footprint_count.count(small_config("llama"), "float32", 8, 256, threads=2)


def test_the_tables_say_what_was_not_measured_on_an_idle_machine():
    found = {
        "model": "small",
        "dtype": "float32",
        "sequences": 1,
        "threads": 2,
        "recompute": False,
        "seconds": [2.0, 1.5],
        "peak_memory_bytes": 2e8,
    }
    results = {"points": [found | {"busy_cores": 0.0}], "speed": {"1": 1e11, "2": 2e11}, "busy_cores": 0.0}
    results["machine"] = {"cpu": "a processor", "cores": 2, "numpy": "2", "blas": "a BLAS"}
    idle = footprint_tables.tables(results, {"small": small_config("qwen3")}, {"small": "Small"})
    assert idle["laptop"].splitlines()[-1] == "| Small | 0 M | 0.20 GB | 0.1 GB by count | 0.1 GB by count | 0.1 GB by count | 1.5 s |"
    assert idle["processor"].endswith("Products: 100 GFLOP/s on 1 thread, 200 GFLOP/s on 2 threads.")
    results["points"][0]["busy_cores"] = results["busy_cores"] = 0.5
    busy = footprint_tables.tables(results, {"small": small_config("qwen3")}, {"small": "Small"})
    assert busy["laptop"].endswith("| to be measured |")
    assert "Products: to be measured." in busy["processor"]
    assert "4 d + 3 q + 3 k + 3 f + 7 r" in busy["formulas"]
