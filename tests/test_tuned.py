"""What suits the processor: measured once, kept, recorded in a run, and kept by a run that is resumed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from minilora import tuned
from minilora.cli import main
from minilora.kernels.numpy.blocks import blocks
from minilora.runs import tune as tune_module
from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe
from minilora.runs.resume import resume
from minilora.training import loop

SIZES = {"shard": 256, "block": 2**14, "logits": 2**18}
GOOD = {"kernels": "", "sizes": SIZES}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("MINILORA_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "kernels", "")
    monkeypatch.setattr(tuned, "applied", False)
    for name, size in tuned.SIZES.items():
        monkeypatch.setitem(tuned.sizes, name, size)


def keep(content):
    tuned.path().parent.mkdir()
    tuned.path().write_text(content if isinstance(content, str) else json.dumps({"processor": tuned.processor(), **content}))


def test_measured_sizes_are_used(capfd):
    keep(GOOD)
    tuned.apply()
    assert tuned.sizes == SIZES
    assert [len(part) for (part,) in blocks(np.zeros(2**15))] == [2**14, 2**14]
    assert main(["doctor"]) == 0
    assert "tuned      kernels as OpenBLAS chooses, shard 256, block 16,384, logits 262,144 (" in capfd.readouterr().out


def test_those_of_another_processor_are_not(capfd):
    keep(GOOD | {"processor": "another"})
    tuned.apply()
    assert tuned.sizes == tuned.SIZES
    assert main(["doctor"]) == 0
    assert "tuned      no; minilora doctor --tune" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "tuned.json is not valid JSON"),
        ('{"processor": 1', "tuned.json is not valid JSON"),
        ("[]", "tuned.json lacks the processor, the kernels or the sizes"),
        ({"sizes": SIZES}, "tuned.json lacks the processor, the kernels or the sizes"),
        (GOOD | {"kernels": "a;b"}, "kernels is 'a;b'"),
        (GOOD | {"kernels": 5}, "kernels is 5"),
        (GOOD | {"sizes": 5}, "sizes is 5"),
        (GOOD | {"sizes": SIZES | {"block": 0}}, "block is 0, which is not a size"),
        (GOOD | {"sizes": SIZES | {"block": "1"}}, "block is '1', which is not a size"),
        (GOOD | {"sizes": SIZES | {"tile": 1}}, "tile is 1, which is not a size"),
    ],
)
def test_a_damaged_file_is_named_and_ignored(content, why, capsys):
    keep(content)
    tuned.apply()
    shown = capsys.readouterr().err
    assert why in shown
    assert shown.endswith("; the usual sizes are used: run minilora doctor --tune again.\n")
    assert shown.count("\n") == 1
    assert tuned.sizes == tuned.SIZES
    assert tuned.kernels == ""


def test_kernels_are_named_before_numpy_is_loaded():
    keep(GOOD | {"kernels": "Haswell"})
    script = "import minilora, os, sys; print('numpy' in sys.modules, os.environ.get('OPENBLAS_CORETYPE'))"
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}

    def printed(before="", **more):
        return subprocess.run([sys.executable, "-c", before + script], env=env | more, capture_output=True, text=True, check=True).stdout

    assert printed() == "False Haswell\n"
    assert printed(OPENBLAS_CORETYPE="Zen") == "False Zen\n"  # the user's own choice
    assert printed(before="import numpy; ") == "True None\n"


ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
AMD = "model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: fpu avx2 avx512f\n"


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (ARM, ", family 0x41 model 0xd40, sve"),
        (AMD, "AMD EPYC, family 25 model 17, avx512f"),
        ("uarch\t: sifive,u74\n", ", family ? model ?, no avx2"),
    ],
)
def test_processors_have_names(info, expected, monkeypatch):
    monkeypatch.setattr(tuned.Path, "is_file", lambda self: True)
    monkeypatch.setattr(tuned.Path, "read_text", lambda self, **options: info)
    assert tuned.processor().endswith(expected)


@pytest.mark.parametrize("home", ["/proc/1/root/root", "", "/no/such/folder", "\\"])
def test_a_home_that_is_missing_or_not_readable_does_not_matter(home):
    env = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"} | {"HOME": home}
    done = subprocess.run([sys.executable, "-c", "import minilora"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_tuning_takes_what_gains_two_percent(monkeypatch, capfd):
    speeds = {"": ("SkylakeX", 100e9), "Haswell": ("Haswell", 107e9), "Zen": ("Haswell", 106e9)}
    ratios = {"shard": [(384, 0.99), (512, 1.2)], "block": [(2**15, 0.9), (2**16, 0.8)], "logits": [(2**18, 1.0)]}
    asked = []

    def measured(what, kernels):
        asked.append((what, kernels))
        return speeds[kernels] if what == "kernels" else ratios[what]

    monkeypatch.setattr(tune_module, "KERNELS", tuple(speeds))
    monkeypatch.setattr(tune_module, "_in_a_process", measured)
    assert main(["doctor", "--tune"]) == 0
    kept = json.loads(tuned.path().read_text())
    assert (kept["kernels"], kept["sizes"]) == ("Haswell", {"shard": 768, "block": 2**16, "logits": 2**20})
    assert asked[-3:] == [("shard", "Haswell"), ("block", "Haswell"), ("logits", "Haswell")]
    assert tuned.sizes["block"] == 2**16
    assert "block      65,536; times of a step" in capfd.readouterr().out


def test_nothing_is_measured_that_cannot_be_kept(monkeypatch, capsys):
    monkeypatch.setenv("MINILORA_TUNED", os.devnull)
    assert main(["doctor", "--tune"]) == 1
    assert f"{os.devnull} is not a file, so nothing can be kept there: unset MINILORA_TUNED first." in capsys.readouterr().err


def test_an_interrupted_measurement_leaves_the_file_as_it_was(monkeypatch):
    keep(GOOD)
    before = tuned.path().read_bytes()

    def interrupted(what, kernels):
        if what == "block":
            raise KeyboardInterrupt
        return ("SkylakeX", 1e9) if what == "kernels" else [(384, 0.5)]

    monkeypatch.setattr(tune_module, "_in_a_process", interrupted)
    assert main(["doctor", "--tune"]) == 130
    assert tuned.path().read_bytes() == before
    assert [file.name for file in tuned.path().parent.iterdir()] == ["tuned.json"]


def test_a_resumed_run_keeps_its_sizes(tmp_path, monkeypatch, capfd):
    """Sizes that were measured in between would change its last digits."""
    recipe = Recipe(backend="numpy", steps=4, batch_size=4, window=64, eval_bytes=2048, sample_bytes=0, save_every=2, forgetting="")
    for name, size in SIZES.items():
        monkeypatch.setitem(tuned.sizes, name, size)
    finetune(recipe, tmp_path / "whole")

    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return clip(*args)

    with monkeypatch.context() as patch:
        clip = loop.clip_grad_norm
        patch.setattr(loop, "clip_grad_norm", interrupted)
        with pytest.raises(MemoryError):
            finetune(recipe, tmp_path / "stopped")
    for name, size in tuned.SIZES.items():
        monkeypatch.setitem(tuned.sizes, name, size)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")  # without effect here: NumPy is loaded
    resume(tmp_path / "stopped")
    assert "kernels   Zen, but the run began with OpenBLAS's own choice: its last digits may differ" in capfd.readouterr().out
    assert tuned.sizes == tuned.SIZES
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["sizes"] == SIZES
    whole, stopped = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    finetune(recipe, tmp_path / "other")
    assert (tmp_path / "other" / "adapter" / "adapter_model.safetensors").read_bytes() != whole


@pytest.mark.parametrize(("threads", "lanes"), [(3, 2), (2, 1), (100_000, 1)])
def test_threads_that_do_not_help_are_named(threads, lanes, tmp_path, capfd):
    recipe = {"steps": 1, "batch_size": 2, "window": 64, "eval_bytes": 2048, "sample_bytes": 0, "forgetting": ""}
    finetune(Recipe(backend="numpy", threads=threads, lanes=lanes, **recipe), tmp_path / "run")
    shown = capfd.readouterr().out
    assert f"threads   {threads} are no faster than {min(lanes, os.cpu_count())}: the machine has" in shown
    finetune(Recipe(backend="numpy", threads=1, lanes=lanes, **recipe), tmp_path / "one")
    assert "threads  " not in capfd.readouterr().out


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to become another user")
def test_the_folder_of_another_user_does_not_matter(tmp_path):
    keep(GOOD)
    tuned.path().parent.chmod(0o700)
    tmp_path.chmod(0o700)
    script = "import os; from minilora import tuned; os.setuid(65534); tuned.apply()"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
