"""The command line: the main job in small, and bad input reported in one sentence."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import minilora as ml
from minilora.cli import main
from minilora.cli.flags import make_parser
from minilora.data.text import HELD_OUT, TRAIN, stdlib_source
from minilora.formats.fetch import Origin
from minilora.formats.tokenizer import ByteTokenizer

QUICK = [
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--window",
    "32",
    "--eval-bytes",
    "256",
    "--sample-bytes",
    "8",
    "--backend",
    "numpy",
    "--warmup",
    "1",
]
BIASES, NORMS = 4 * (384 + 128 + 512 + 128), 9 * 2 * 128  # parameters of linear layers, and of gains and biases
TRAINED = {"lora": 65536 + BIASES + NORMS, "full": 858880, "bitfit": BIASES + NORMS // 2, "layer-norm": NORMS}
TRAINED["bottleneck"] = 8 * (2 * 128 * 8 + 8 + 128) + NORMS


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return path


def run(capsys, *argv):
    """(exit status, stdout, stderr) of a verb."""
    status = main([str(a) for a in argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def finetune(capsys, *argv):
    status, out, err = run(capsys, "finetune", *QUICK, *argv)
    assert status == 0, err
    return out


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck", "bitfit", "layer-norm"])
def test_finetune_writes_a_complete_run_folder(method, cwd, text, capsys, curves):
    out = finetune(capsys, "--method", method, "--data", text)
    folder = cwd / "runs" / f"{method}-1"
    made = "model" if method == "full" else "adapter"
    assert {p.name for p in folder.iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "norms.jsonl",
        "samples.txt",
        "curves.png",
        "checkpoints",
        ".lock",
        made,
    }
    result = json.loads((folder / "run.json").read_text())
    assert result["configuration"]["method"] == method
    results = result["results"]
    assert results["headline"] == "bits_per_byte"
    assert results["after"]["bits_per_byte"] < results["before"]["bits_per_byte"]
    assert results["steps"] == 4
    assert results["trainable_share"] == pytest.approx(TRAINED[method] / 858880)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "tokens"}
    for word in ("trainable parameters", "held out  bits per byte", "a sample before", "a sample after", str(folder.relative_to(cwd))):
        assert word in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_equal_runs_write_equal_files(cwd, text, capsys):
    for out in ("a", "b"):
        finetune(capsys, "--data", text, "--out", out, "--threads", "2")
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl", "norms.jsonl", "samples.txt"):
        assert (cwd / "a" / name).read_bytes() == (cwd / "b" / name).read_bytes(), name
    finetune(capsys, "--data", text, "--out", "c", "--threads", "2", "--seed", "1")
    assert (cwd / "a" / "metrics.jsonl").read_bytes() != (cwd / "c" / "metrics.jsonl").read_bytes()


def test_generate_merge_and_info_on_a_run_folder(cwd, text, capsys):
    finetune(capsys, "--data", text, "--out", "run", "--r", "2", "--target-modules", "c_attn,c_fc", "--lr", "0.05")
    status, out, _ = run(capsys, "info", "run")
    assert status == 0
    assert "LoRA on 8 layers, r = 2" in out
    assert "c_attn (4: 128 x 384)" in out
    assert "held out    bits per byte" in out

    status, out, _ = run(capsys, "merge", "run", "--out", "merged")
    assert status == 0
    assert "merged 8 adapters into merged; the largest change of a weight is" in out
    write = ["--prompt", "the quick", "--bytes", "12", "--temperature", "0", "--backend", "numpy"]
    texts = {where: run(capsys, "generate", where, *write)[1] for where in ("run", "merged", "pydoc")}
    assert texts["run"] == texts["merged"]
    assert all(t.startswith("the quick") for t in texts.values())
    status, out, _ = run(capsys, "info", "merged")
    assert "LoRA" not in out
    assert "858,880" in out


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        (["--use-dora", "--init", "pissa"], "DoRA (pissa) r=8"),
        (["--init-lora-weights", "eva", "--loraplus-lr-ratio", "4"], "LoRA (eva, LoRA+ of 4) r=8"),
        (["--init", "lora_ga", "--backend", "numpy"], "LoRA (lora_ga) r=8"),
        (["--quantize", "nf4"], "LoRA (nf4) r=8"),
        (["--peft-type", "VERA", "--r", "300", "--lora-dropout", "0.1"], "VeRA r=300 on 16 layers"),
        (["--init", "loftq"], "LoRA (loftq) r=8"),
    ],
)
def test_lora_variants(flags, method, cwd, text, capsys):
    out = finetune(capsys, "--data", text, "--out", "run", "--lr", "0.003", *flags)
    assert method in out
    results = json.loads((cwd / "run" / "run.json").read_text())["results"]
    assert results["after"]["bits_per_byte"] < results["before"]["bits_per_byte"]
    status, out, err = run(capsys, "evaluate", "run", "--data", text, "--window", "32", "--json")
    assert status == 0, err
    assert f"adapter     {method.split()[0]} on " in run(capsys, "info", "run")[1]
    assert run(capsys, "merge", "run", "--out", "merged", "--dtype", "float32")[0] == 0
    assert json.loads(out)["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)  # of the same held-out part
    held_out = ["--data", text, "--window", "32", "--split", "valid", "--eval-bytes", "256", "--json"]
    losses = [run(capsys, "evaluate", where, *held_out)[1] for where in ("run", "merged")]
    assert json.loads(losses[1])["loss"] == pytest.approx(json.loads(losses[0])["loss"], rel=1e-5)


def test_generate_merge_and_info_on_other_adapters(cwd, text, capsys):
    finetune(capsys, "--data", text, "--out", "norms", "--method", "layer-norm", "--lr", "0.05")
    finetune(capsys, "--data", text, "--out", "necks", "--method", "bottleneck", "--reduction-factor", "32", "--lr", "0.05")
    assert "adapter     layer norms: 2,304 parameters, 0.3% of the model" in run(capsys, "info", "norms")[1]
    out = run(capsys, "info", "necks")[1]
    assert "bottleneck adapters, reduction 32, with layer norms on 8 layers: 11,552 parameters" in out
    assert "c_attn (4: 128 x 384)" in out
    assert "down" not in out
    status, out, _ = run(capsys, "merge", "norms", "--out", "merged")
    assert status == 0
    assert "the largest change of a weight is" in out
    write = ["--prompt", "the quick", "--bytes", "12", "--temperature", "0", "--backend", "numpy"]
    texts = {where: run(capsys, "generate", where, *write)[1] for where in ("norms", "merged", "necks", "pydoc")}
    assert texts["norms"] == texts["merged"]
    status, _, err = run(capsys, "merge", "necks", "--out", "no")
    assert status == 1
    assert "bottleneck" in err
    assert not (cwd / "no").exists()


def test_generate_and_info_on_the_bundled_model_and_full_runs(cwd, text, capsys):
    assert "858,880: 3.4 MB in float32" in run(capsys, "info")[1]
    finetune(capsys, "--data", text, "--out", "full", "--method", "full")
    assert run(capsys, "generate", "full", "--bytes", "5", "--backend", "numpy")[0] == 0
    status, _, err = run(capsys, "merge", "full", "--out", "m")
    assert status == 1
    assert "has no adapter to merge" in err


def test_gradcheck_prints_a_table_and_fails_on_a_wrong_gradient(capsys, monkeypatch):
    monkeypatch.setattr(
        "minilora.checking.catalogue.catalogue", lambda: [("Linear", ml.Linear(3, 2, rng=0, dtype="float64"), np.ones((4, 3)), {})]
    )
    status, out, _ = run(capsys, "gradcheck", "--backend", "numpy")
    assert status == 0
    assert "Linear" in out
    assert "all 1 agree" in out
    monkeypatch.setattr("minilora.kernels.linear_backward", lambda dy, saved, x, W, need: (dy @ W.T, 2 * x.T @ dy, dy.sum(axis=0)))
    status, out, err = run(capsys, "gradcheck", "--backend", "numpy")
    assert status == 1
    assert "is 2 times the true gradient" in out
    assert "1 of 1 backward passes disagree" in err


def poison(path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["transformer.wpe.weight"][0] = 3e38  # finite, but its square overflows
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path / "model.safetensors")


def test_a_diverged_run_reports_the_step_and_keeps_the_last_good_state(cwd, text, capsys):
    status, _, err = run(capsys, "finetune", *QUICK, "--data", text, "--lr", "1e30", "--out", "run", "--method", "full", "--clip", "1e30")
    assert status == 1
    assert "is not finite at step" in err
    assert "transformer." in err
    assert "Traceback" not in err
    model = ml.load_model(cwd / "run" / "model", "numpy")  # finite, or it would not load
    assert sum(p.data.size for _, p in model.parameters()) == 858880
    assert "stopped_after_step" in (cwd / "run" / "run.json").read_text()


def bad(name):
    return lambda d: ["finetune", *QUICK, "--out", "new", *name]


def folder_in_use(d):
    (d / "used").mkdir()
    (d / "used" / "thesis.txt").write_text("years of work")
    return ["finetune", *QUICK, "--out", "used"]


def empty(d):
    (d / "empty.txt").write_text("  \n")
    return bad(["--data", "empty.txt"])(d)


def short(d):
    (d / "short.txt").write_text("x" * 300)
    return bad(["--data", "short.txt"])(d)


def empty_folder(d):
    (d / "nothing").mkdir()
    return bad(["--data", "nothing"])(d)


def broken_adapter(d):
    ml.save_model(ml.load_model("pydoc", "numpy"), d / "base")
    model = ml.load_model(d / "base", "numpy")
    ml.inject(model, ml.LoraConfig(r=2))
    ml.save_adapter(model, d / "adapter")
    path = d / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return ["generate", "adapter", "--backend", "numpy"]


def adapter_of_another_model(d):
    model = ml.GPT2(ml.GPT2Config(vocab_size=256, n_positions=8, n_embd=6, n_layer=1, n_head=1), rng=0)
    ml.inject(model, ml.LoraConfig(r=2))
    model.origin = Origin("pydoc")  # a wrong base
    ml.save_adapter(model, d / "adapter")
    return ["merge", "adapter", "--out", "merged"]


def a_file_as_run_folder(d):
    (d / "file").write_text("mine")
    return ["finetune", *QUICK, "--out", "file"]


BAD = {
    "no such start": (bad(["--init", "magic"]), "init_lora_weights is 'magic'; choose one of True, False, 'gaussian'"),
    "a start beyond the SVD": (bad(["--init", "lora_ga", "--r", "100"]), "rank 100 needs 200 singular vectors"),
    "two methods": (bad(["--peft-type", "VERA", "--use-dora"]), "use_dora and VeRA exclude each other"),
    "a removed value": (bad(["--quantize", "bfloat16"]), "quantize='bfloat16' is no longer supported; use dtype='bfloat16'"),
    "LoRA+ without LoRA": (bad(["--method", "full", "--loraplus-lr-ratio", "4"]), "loraplus_lr_ratio is for LoRA; method full"),
    "rank 0": (bad(["--r", "0"]), "rank r must be an integer of at least 1, got 0"),
    "rank too large": (bad(["--r", "500"]), "rank 500 is beyond transformer.h.0.attn.c_attn"),
    "unknown module": (bad(["--target-modules", "q_proj,c_attn"]), "no linear layer is called 'q_proj'"),
    "near module": (bad(["--target-modules", "c_attm"]), "did you mean 'c_attn'"),
    "no such data": (bad(["--data", "absent.txt"]), "No such file or directory (absent.txt)"),
    "empty data": (empty, "empty.txt is empty"),
    "empty folder": (empty_folder, "no .py, .txt or .md files below nothing"),
    "text shorter than a window": (short, "too short for one window of 32"),
    "window beyond positions": (bad(["--window", "257"]), "a window of 257 is longer than the model's 256 positions"),
    "no steps": (bad(["--steps", "0"]), "steps must be at least 1"),
    "warm-up": (bad(["--warmup", "9"]), "warmup of 9 steps does not fit a run of 4"),
    "threads": (bad(["--threads", "-1"]), "threads must be at least 0"),
    "rate": (bad(["--lr", "nan"]), "lr must be a number of at least 0"),
    "no such model": (bad(["--model", "gpt5"]), "there is no model at gpt5"),
    "used run folder": (folder_in_use, "used is in use"),
    "a file as run folder": (a_file_as_run_folder, "file is in use"),
    "unwritable": (bad(["--out", "/proc/run"]), "/proc/run"),
    "truncated adapter": (broken_adapter, "not a readable safetensors file"),
    "adapter of another model": (adapter_of_another_model, "other weights"),
    "nothing to merge": (lambda d: ["merge", "pydoc", "--out", "m"], "pydoc has no adapter to merge"),
    "empty prompt": (lambda d: ["generate", "--prompt", "", "--backend", "numpy"], "the prompt is empty"),
    "tokens below 0": (lambda d: ["generate", "--tokens", "-1", "--backend", "numpy"], "n is -1; it must be at least 0"),
    "prompt of a broken shell": (
        lambda d: ["generate", "--prompt", "a\udcff", "--backend", "numpy"],
        "unpaired surrogate at character 1",
    ),
    "system without a chat": (lambda d: ["generate", "--system", "You help."], "give --chat too"),
    "temperature": (lambda d: ["generate", "--temperature", "-1", "--backend", "numpy"], "temperature is -1.0"),
    "info on nothing": (lambda d: ["info", "nowhere"], "there is no model at nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case, cwd, capsys):
    make, message = BAD[case]
    argv = make(cwd)
    before = {p: p.read_bytes() for p in cwd.rglob("*") if p.is_file()}
    status, _, err = run(capsys, *argv)
    assert status == 1
    result = [line for line in err.splitlines() if line.startswith("minilora: error:")]
    assert len(result) == 1
    assert message in result[0]
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in cwd.rglob("*") if p.is_file()} == before
    assert not (cwd / "new").exists()


def test_an_untrained_adapter_is_reported(cwd, capsys):
    model = ml.load_model("pydoc", "numpy")
    ml.inject(model, ml.LoraConfig(r=2))
    ml.save_adapter(model, cwd / "adapter")
    status, _, err = run(capsys, "merge", "adapter", "--out", "m")
    assert status == 0
    assert "16 adapters are still zero" in err


def test_command_and_module_are_equal_and_unknown_verbs_are_refused():
    for command in ([sys.executable, "-m", "minilora"], [os.path.join(os.path.dirname(sys.executable), "minilora")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"minilora {ml.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "minilora", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_halves_of_the_standard_library_source_do_not_overlap():
    train, held_out = stdlib_source(held_out=False), stdlib_source(held_out=True)
    assert len(train) > 1_500_000
    assert len(held_out) > 66_000
    assert not set(TRAIN) & set(HELD_OUT)
    assert bytes(held_out[:2000]) not in bytes(train)
    assert b"import" in bytes(train[:20000])


def test_bytes_and_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve ☃").tolist()) == "naïve ☃"
    assert tokenizer.decode([104, 105, 0xE2]) == "hi\ufffd"


def test_every_verb_has_help_and_a_wrong_flag_one_line(capsys):
    """Each flag once, each with its dashes, and no traceback."""
    words = {"compare": ["first", "second"], "report": ["run", "other"], "exercise": ["action", "name"]}
    words |= {"explain": ["place"], "gradcheck": ["what"]}
    words |= {key: ["model"] for key in ("evaluate", "generate", "merge", "export", "extract", "info")}
    words |= {"push": ["folder", "hub_id"]}
    for name, p in make_parser()[1].items():
        assert [action.dest for action in p._actions if not action.option_strings] == words.get(name, [])
        assert f"minilora {name}" in p.format_help()
        with pytest.raises(SystemExit) as stopped:
            main([name, "--no-such-flag"])
        assert stopped.value.code == 2
        assert "usage: minilora" in capsys.readouterr().err


def test_info_names_the_kernels_of_a_model(capsys):
    pytest.importorskip("minilora.kernels.report")
    rows = [line.split() for line in run(capsys, "info", "--kernels")[1].splitlines() if line.startswith("kernel ")]
    assert {"numpy", "reference"} >= {where for _, _, where, *_ in rows}
    result = json.loads(run(capsys, "info", "--kernels", "--json")[1])
    assert [row["operation"] for row in result["kernels"]] == [name for _, name, *_ in rows]
