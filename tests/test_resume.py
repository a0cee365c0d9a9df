"""Nothing is lost: a run that is interrupted, killed or out of disk continues, and ends as the one that was not, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import library_bpe, library_wordpiece
from threadpoolctl import threadpool_info, threadpool_limits
from tiny import write_jsonl

import minilora as ml
from minilora.cli import main
from minilora.formats import atomic
from minilora.runs import checkpoint, folder, training
from minilora.runs.finetune import finetune
from minilora.runs.interrupt import locked
from minilora.runs.recipe import Recipe
from minilora.runs.resume import resume
from minilora.training.replicas import Replicas

HERE = Path(__file__).parent
SMALL = {"steps": 5, "lanes": 2, "threads": 1, "save_every": 2, "backend": "numpy", "lr": 0.01}
TEXT = {"window": 16, "batch_size": 3, "eval_bytes": 64, "sample_bytes": 4}
WORDS = "a man is eating food while she plays with the dog in the garden".split()


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a Llama with records to continue, a BERT with texts of two classes."""
    here, rng = tmp_path_factory.mktemp("resume"), np.random.default_rng(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 32}
    for name, tokenizer, make in (
        ("llama", library_bpe(), lambda n: ml.Llama(ml.LlamaConfig(vocab_size=n, **sizes), rng=0)),
        ("bert", library_wordpiece(), lambda n: ml.BertClassifier(ml.BertConfig(vocab_size=n, **sizes), rng=0)),
    ):
        ml.save_model(make(tokenizer.get_vocab_size()), here / name)
        tokenizer.save(str(here / name / "tokenizer.json"))
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(2, 9)))) for _ in range(40)]
    write_jsonl(here / "lm.jsonl", [{"prompt": t, "completion": " food"} for t in texts])
    write_jsonl(here / "classes.jsonl", [{"text": t, "label": "yes" if "man" in t else "no"} for t in texts])
    return here


def recipe_of(models, kind, **changes):
    if kind == "text":
        return Recipe(**{**SMALL, **TEXT, **changes})
    lm = {"model": str(models / "llama"), "data": str(models / "lm.jsonl"), "tokens_per_batch": 40}
    classify = {"model": str(models / "bert"), "data": str(models / "classes.jsonl"), "task": "classify", "new_head": True, "batch_size": 4}
    return Recipe(**{**SMALL, "window": 16, "steps": 8, **(lm if kind == "lm" else classify), **changes})


def what_is_left(run):
    """{file: content} of a run folder, without times."""
    files = [f for f in sorted(run.rglob("*")) if f.is_file() and f.name not in ("curves.png", ".lock")]
    left = {str(f.relative_to(run)): f.read_bytes() for f in files}
    about = json.loads(left.pop("run.json"))
    for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
        about["results"].pop(name)
    for name in ("threads", "save_every"):
        about["configuration"].pop(name)
    left["run.json"] = about
    if (name := "adapter/adapter_config.json") in left:
        left[name] = left[name].replace(str(run).encode(), b"")  # LoftQ's own base
    for name in [name for name in left if name.endswith("state.json")]:
        left[name] = {k: v for k, v in json.loads(left[name]).items() if k != "seconds"}
    return left


def interrupted(monkeypatch, recipe, run, step):
    """Run until a signal comes during a step."""
    note = training.Training._note

    def signalled(self, s):
        note(self, s)
        if s.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_note", signalled)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, run, quiet)


RUNS = {
    "text": ("text", {}),
    "text, dropout and accumulation": ("text", {"lora_dropout": 0.2, "accumulate": 2, "window": 11}),
    "lm": ("lm", {"lora_dropout": 0.1, "accumulate": 2}),
    "lm, upper block": ("lm", {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]}),
    "classify": ("classify", {"lora_dropout": 0.1}),
    "full, L2-SP": ("classify", {"method": "full", "reinit": 1, "l2_sp": 0.1}),
    "bottleneck": ("classify", {"method": "bottleneck"}),
    "bitfit": ("classify", {"method": "bitfit"}),
    "PiSSA": ("lm", {"init_lora_weights": "pissa", "r": 2}),
    "EVA": ("lm", {"init_lora_weights": "eva", "r": 2}),
    "LoRA-GA, LoRA+": ("lm", {"init_lora_weights": "lora_ga", "r": 2, "loraplus_lr_ratio": 4}),
    "LoftQ": ("lm", {"init_lora_weights": "loftq", "r": 2}),
    "DoRA": ("lm", {"use_dora": True, "r": 2}),
    "VeRA": ("lm", {"peft_type": "VERA", "r": 8}),
    "float16": ("lm", {"dtype": "float16"}),
    "measured": ("lm", {"eval_every": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_continues_bit_for_bit(name, models, tmp_path, monkeypatch):
    kind, changes = RUNS[name]
    recipe = recipe_of(models, kind, **changes)
    finetune(recipe, tmp_path / "whole", quiet)
    interrupted(monkeypatch, recipe, tmp_path / "run", 3)
    resume(tmp_path / "run", quiet, threads=2)
    expected, found = what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "run")
    for what in (expected["run.json"], found["run.json"]):
        what["configuration"].pop("model")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_data_dependent_initialiser_reads_no_data_again(models, tmp_path, monkeypatch):
    recipe = recipe_of(models, "lm", init_lora_weights="eva", r=2)
    interrupted(monkeypatch, recipe, tmp_path / "run", 3)
    monkeypatch.setattr("minilora.lora.init.data.eva", lambda *_, **__: pytest.fail("EVA looked at the data again"))
    resume(tmp_path / "run", quiet)


@pytest.mark.parametrize("kind", ["text", "lm", "classify"])
@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_the_number_of_threads_changes_nothing(kind, lanes, models, tmp_path):
    recipe = recipe_of(models, kind, lanes=lanes, lora_dropout=0.2, accumulate=2, steps=3)
    for threads in (1, 2, 4):
        finetune(replace(recipe, threads=threads), tmp_path / str(threads), quiet)
    one, *others = (what_is_left(tmp_path / str(threads)) for threads in (1, 2, 4))
    assert all(other == one for other in others)


def test_each_thread_of_a_run_computes_its_products_alone(models, tmp_path, monkeypatch):
    """Sums in a product would depend on the number of BLAS threads."""
    seen, gradients = [], Replicas.gradients

    def watched(*args, **options):
        seen.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        return gradients(*args, **options)

    monkeypatch.setattr(Replicas, "gradients", watched)
    with threadpool_limits(2, "blas"):
        finetune(recipe_of(models, "lm", steps=2), tmp_path / "run", quiet)
        assert set(seen) == {1}
        assert {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"} == {2}


# -- killed, and out of disk -----------------------------------------------------------------------------------------------------


def test_a_save_that_ends_at_any_system_call_leaves_the_old_state_or_the_new_one(tmp_path):
    """Killed before and after each call, a full disk, an error of the disk, a short write."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, to end a process at a system call")
    library = tmp_path / "calls.so"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, HERE / "crash" / "calls.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, HERE / "crash" / "save.py", library, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert all(calls > 10 for calls in found["calls"].values())


def command(*flags):
    return [sys.executable, "-m", "minilora", "finetune", *map(str, flags)]


def test_killed_at_any_moment(models, tmp_path):
    """Three kills here; `python -m benchmarks.killed` takes as many as asked."""
    flags = "--steps 30 --window 16 --batch-size 2 --eval-bytes 64 --sample-bytes 4 --save-every 2 --lanes 2 --threads 1".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    subprocess.run(command(*flags, "--out", whole), env=env, check=True, capture_output=True)
    for steps in (2, 11, 24):
        process = subprocess.Popen(
            command("--resume", run) if run.exists() else command(*flags, "--out", run), env=env, stderr=subprocess.DEVNULL
        )
        begun = time.monotonic()
        while len(folder.read_lines(run / "metrics.jsonl")) < steps and time.monotonic() - begun < 60:
            time.sleep(0.01)
        process.kill()
        process.wait()
    subprocess.run(command("--resume", run), env=env, check=True, capture_output=True)
    expected, found = what_is_left(whole), what_is_left(run)
    assert [name for name in expected if found.get(name) != expected[name]] == []


def test_a_full_disk_does_not_end_training(models, tmp_path, monkeypatch, capsys):
    write, failures = checkpoint.write, []

    def full(run, state, *args):
        if state.step == 2:
            failures.append(state.step)
            raise OSError(28, "No space left on device")
        write(run, state, *args)

    monkeypatch.setattr(checkpoint, "write", full)
    recipe = recipe_of(models, "text")
    finetune(recipe, tmp_path / "run", quiet)
    assert failures == [2]
    assert "step 2: no checkpoint could be written (No space left on device); training goes on." in capsys.readouterr().err
    assert checkpoint.read_last(tmp_path / "run").step == 5


def test_lines_that_cannot_be_written_are_written_later(tmp_path, capsys):
    lines = folder.Lines(tmp_path / "a.jsonl", [])

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    lines.file.close()
    lines.file = Full()
    lines.add({"step": 1})
    lines.add({"step": 2})
    assert "training goes on" in capsys.readouterr().err
    lines.sync()
    lines.add({"step": 3})
    lines.close()
    assert [r["step"] for r in folder.read_lines(tmp_path / "a.jsonl")] == [1, 2, 3]


def test_what_was_being_written_is_removed_wherever_it_is(tmp_path):
    kept = [tmp_path / name for name in ("run.json", ".lock", "adapter/a.safetensors", "checkpoints/step-00000002/state.json")]
    for path in [*kept, *(atomic.temporary_of(path) for path in kept)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    atomic.temporary_of(tmp_path / "checkpoints" / "step-00000004").mkdir()
    folder.clean(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_second_signal_stops_at_once(models, tmp_path, monkeypatch):
    monkeypatch.setattr(training.Training, "_note", lambda self, s: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe_of(models, "text"), tmp_path / "run", quiet)
    assert checkpoint.read_last(tmp_path / "run") is None


# -- the best result -------------------------------------------------------------------------------------------------------------


def test_the_best_result_is_kept_and_patience_ends_the_run(models, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    measure = training.measure
    monkeypatch.setattr(training, "measure", lambda *a, **k: {**measure(*a, **k), "loss": next(losses)})
    recipe = recipe_of(models, "text", steps=20, eval_every=2, patience=2, save_every=1, keep=20)
    result = finetune(recipe, tmp_path / "run", quiet)
    records = folder.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r] == [(2, 3.0), (4, 1.0), (6, 2.0), (8, 1.5)]
    assert (result["steps"], result["best_step"]) == (8, 4)
    assert [each.step for each in map(checkpoint.read, checkpoint.checkpoints(tmp_path / "run"))] == list(range(1, 9))
    model = ml.load_model("pydoc", "numpy")
    ml.load_adapter(model, tmp_path / "run" / "adapter")
    best = checkpoint.read(checkpoint.checkpoints(tmp_path / "run")[3])
    found = np.concatenate([p.data.ravel() for _, p in model.parameters() if p.trainable])
    assert best.step == 4
    np.testing.assert_array_equal(found, best.tensors["data"])


# -- what cannot be continued ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(models, tmp_path, monkeypatch):
    """A run that was interrupted after three steps, and its own copy of the model and the data."""
    for name in ("llama", "lm.jsonl"):
        (shutil.copytree if (models / name).is_dir() else shutil.copy)(models / name, tmp_path / name)
    interrupted(monkeypatch, recipe_of(tmp_path, "lm"), tmp_path / "run", 3)
    return tmp_path


def refused(capsys, *flags):
    capsys.readouterr()
    assert main(["finetune", *map(str, flags)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("minilora: error: ")
    return error


def test_settings_that_differ_are_named(stopped, capsys):
    for flags, message in {
        ("--r", "4"): "has r 8, not 4",
        ("--method", "full"): "has method 'lora', not 'full'",
        ("--lanes", "3"): "has lanes 2, not 3",
        ("--dtype", "bfloat16"): "has dtype 'float32', not 'bfloat16'",
        ("--data", stopped / "other.jsonl"): "has data ",
        ("--out", stopped / "new"): "leave --out away",
    }.items():
        assert message in refused(capsys, "--resume", stopped / "run", *flags)
    assert checkpoint.read_last(stopped / "run").step == 3


def test_other_data_and_other_weights_are_refused(stopped, capsys):
    with (stopped / "lm.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": " dog"}\n')
    assert "the training data have changed since the run began" in refused(capsys, "--resume", stopped / "run")
    ml.save_model(ml.Llama(ml.load_model(stopped / "llama", "numpy").config, rng=1), stopped / "llama")
    assert "the model's weights have changed since the run began" in refused(capsys, "--resume", stopped / "run")


def test_folders_without_a_run_and_ended_runs(models, tmp_path, capsys):
    assert "holds no run" in refused(capsys, "--resume", tmp_path)
    finetune(recipe_of(models, "text", steps=1), tmp_path / "run", quiet)
    assert "has ended after step 1" in refused(capsys, "--resume", tmp_path / "run")


def test_damaged_checkpoints(stopped, capsys):
    checkpoint.write(stopped / "run", replace(checkpoint.read_last(stopped / "run"), step=4), keep=2)
    file = checkpoint.checkpoints(stopped / "run")[-1] / "state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert checkpoint.read_last(stopped / "run").step == 3  # the one before
    assert f"{file} is damaged" in capsys.readouterr().err
    for each in checkpoint.checkpoints(stopped / "run"):
        (each / "state.json").write_text('{"version": 99}')
    assert "no checkpoint can be read" in refused(capsys, "--resume", stopped / "run")


def test_two_processes_in_one_folder(stopped, capsys):
    with locked(stopped / "run"):
        error = refused(capsys, "--resume", stopped / "run")
    assert f"is in use by process {os.getpid()} on " in error
    (stopped / "run" / ".lock").write_text("process 1 on nowhere")  # a process that is no more
    resume(stopped / "run", quiet)


def test_a_folder_that_another_run_has_used_meanwhile(tmp_path, monkeypatch):
    """It was free when this run looked, and is free again when it takes the lock: another one has begun and ended in between."""
    run = tmp_path / "run"

    def late(folder):
        (folder / "run.json").write_text("{}")
        return locked(folder)

    monkeypatch.setattr("minilora.runs.finetune.locked", late)
    with pytest.raises(FileExistsError, match="is in use; name another folder"):
        finetune(Recipe(**SMALL, **TEXT), run, quiet)
    assert (run / "run.json").read_text() == "{}"


def test_a_closed_standard_output_does_not_end_training(models, tmp_path):
    flags = "--steps 3 --window 16 --batch-size 2 --eval-bytes 64 --sample-bytes 4 --lanes 1".split()
    line = " ".join(command(*flags, "--out", tmp_path / "run"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, end in enumerate((" | head -c 1", " >&-")):
        line = " ".join(command(*flags, "--out", tmp_path / str(number)))
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line + end], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / str(number) / "adapter").is_dir()


def test_control_characters_do_not_reach_the_terminal(models, tmp_path, capsys):
    write_jsonl(tmp_path / "odd.jsonl", [{"text": " ".join(WORDS[: 2 + i // 2]), "label": f"\x1b[31m{i % 2}\x07"} for i in range(20)])
    flags = ["--model", models / "bert", "--task", "classify", "--data", tmp_path / "odd.jsonl", "--steps", 1, "--new-head"]
    flags += ["--window", 16]
    assert main(["finetune", *map(str, flags), "--backend", "numpy", "--out", str(tmp_path / "\x1b[31mrun")]) == 0
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\\x1b[31mrun" in shown
