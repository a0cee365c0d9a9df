"""The arithmetic of benchmarks/, and one small run end to end."""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from benchmarks import straight, toy, where
from benchmarks.report import COMPARED, Measured, disagreement, exponent, ratios, summary

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
