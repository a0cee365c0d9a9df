"""Lanes on copies of the process: the same gradients as on threads, and nothing is left behind when one of them ends."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.data.batches import Batch, random_windows
from minilora.training import processes
from minilora.training.loop import train
from minilora.training.prefix import PrefixCache
from minilora.training.replicas import Replicas

pytestmark = pytest.mark.skipif(not processes.available, reason="processes are copied on Linux only")


def begin(threads=2, lanes=4, steps=6, **options):
    model = ml.GPT2(ml.GPT2Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=3), rng=0)
    ml.inject(model, ml.LoraConfig(r=2, lora_dropout=0.2), rng=1)
    optimizer = ml.AdamW(model.parameters(), 1e-2)
    batches = random_windows(np.arange(500) % 31, 12, 8, np.random.default_rng(1))
    return model, optimizer, train(model, optimizer, batches, steps, lambda step: 1.0, threads=threads, lanes=lanes, **options)


def result_of(threads, **options):
    _, optimizer, steps = begin(threads, **options)
    return [float(step.loss) for step in steps], optimizer.flat.data.tobytes()


@pytest.mark.parametrize(("threads", "lanes"), [(2, 2), (2, 5), (3, 4), (4, 4)])
def test_copies_and_threads_and_one_process_take_the_same_steps(threads, lanes, monkeypatch):
    copied = result_of(threads, lanes=lanes)
    monkeypatch.setattr(processes, "available", False)
    assert copied == result_of(threads, lanes=lanes) == result_of(1, lanes=lanes)
    assert multiprocessing.active_children() == []


def test_an_error_in_a_copy_is_raised_here(monkeypatch):
    model, _, steps = begin()
    here, backward = os.getpid(), type(model).loss_backward

    def fails(self, saved):
        if os.getpid() != here:
            raise MemoryError("no memory is left")
        return backward(self, saved)

    monkeypatch.setattr(type(model), "loss_backward", fails)
    with pytest.raises(MemoryError, match="no memory is left"):
        next(steps)
    assert multiprocessing.active_children() == []


def test_a_copy_that_is_killed_is_named():
    _, _, steps = begin(steps=10**6)
    next(steps)
    (copy,) = multiprocessing.active_children()
    os.kill(copy.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a part of the step was killed; if memory ran out"):
        for _ in steps:
            pass
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("made", [0, 1, 2])
def test_a_refused_copy_is_one_sentence_and_leaves_none(made, monkeypatch):
    fork, calls = os.fork, []

    def refused():
        calls.append(1)
        if len(calls) > made:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    with pytest.raises(RuntimeError, match=r"this process cannot be copied \(Cannot allocate memory\): use --threads 1, or free memory"):
        next(begin(threads=4)[2])
    assert multiprocessing.active_children() == []


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(*line):
    """A process in a group of its own, once it has copies; and these."""
    process = subprocess.Popen([sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until, children = time.monotonic() + 60, []
    while not children and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children, process.communicate()
    return process, children


def test_copies_end_with_a_process_that_is_killed():
    code = "from test_processes import begin; [step for step in begin(steps=10**6)[2]]"
    process, copies = started("-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}")
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while any(map(running, copies)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, copies))


def test_ctrl_c_ends_the_run_after_its_step(tmp_path):
    out = tmp_path / "run"
    sizes = ["--steps", "100000", "--threads", "2", "--lanes", "2", "--window", "16", "--batch-size", "4"]
    process, copies = started("-m", "minilora", "finetune", *sizes, "--out", str(out))
    until = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"minilora finetune --resume {out} continues from step" in printed
    assert list((out / "checkpoints").glob("step-*"))
    assert not any(map(running, copies))


def test_outputs_of_frozen_blocks_are_computed_once_and_known_to_all():
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    model = ml.BertClassifier(ml.BertConfig(vocab_size=31, **sizes), rng=0)
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["query"], layers_to_transform=[2], task_type="SEQ_CLS"), rng=0)
    flat, cache, gradients = ml.AdamW(model.parameters(), 1e-3).flat, PrefixCache(), []
    batches = [Batch(ids, np.array([0, 1, 1]), np.array([0, 5, 8, 12]), per_sequence=True) for ids in (np.arange(12), np.arange(12)[::-1])]
    for prefix, threads in ((cache, 2), (None, 2), (None, 1)):
        with Replicas(model, flat, threads, prefix, lanes=2) as replicas:
            for batch in (*batches, batches[0]):
                replicas.gradients([batch], (0, 1))
        gradients.append(flat.grad.copy())
    assert len(cache.kept) == 6
    assert cache.bytes == 2 * 12 * 8 * 4
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-6)  # each sequence alone, or in its shard
    np.testing.assert_array_equal(gradients[1], gradients[2])
