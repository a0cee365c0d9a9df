"""Every example runs as a user would run it, with warnings as errors, and prints the figures that its text states.

On NumPy each draws its picture. On the fake CuPy (or on a GPU, with `--backend cupy`) the same files run unchanged; the run on the
fake CuPy has no matplotlib, so the line that replaces the picture is tested too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fakecupy
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def run(script: str, *args: str, cwd: Path, without: tuple[str, ...] = (), fake_cupy: bool = False) -> subprocess.CompletedProcess[str]:
    """Run examples/<script>.py in its own process, as if the modules in `without` were not installed."""
    path = str(EXAMPLES / f"{script}.py")
    command = [path, *args]
    if without or fake_cupy:
        lines = ["import runpy, sys", *(f"sys.modules[{name!r}] = None" for name in without)]
        if fake_cupy:
            lines += [f"sys.path.insert(0, {str(ROOT / 'tests')!r})", "import fakecupy", "sys.modules |= fakecupy.modules"]
        lines += [f"sys.argv = {command!r}", f"runpy.run_path({path!r}, run_name='__main__')"]
        command = ["-c", "\n".join(lines)]
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    env = {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


class Printed:
    """The output of an example; `row(label)` returns the numbers after the label in the only line that begins with it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def row(self, label: str) -> list[float]:
        lines = [line.strip() for line in self.text.splitlines() if line.strip().startswith(label)]
        assert len(lines) == 1, f"{len(lines)} lines begin with {label!r} in:\n{self.text}"
        return [float(number.replace(",", "")) for number in NUMBER.findall(lines[0][len(label) :])]


@pytest.fixture
def printed(backend, tmp_path):
    """`printed("02_mlp_boundary", picture=True)`: run it on the backend under test and check its streams and its picture."""

    def of(script: str, picture: bool = False) -> Printed:
        fake = sys.modules.get("cupy") is fakecupy.module
        if picture and not fake:
            pytest.importorskip("matplotlib")
        if fake and script[:2] in ("03", "04", "05"):  # the longest: with the oracles only, so that the default run stays short
            pytest.importorskip("torch", reason="takes 4 to 10 s on the fake CuPy; it runs with: pip install 'minilora[oracle]'")
        folder = tmp_path / "new" / "folder"
        done = run(
            script, "--backend", backend, "--out", str(folder), cwd=tmp_path, fake_cupy=fake, without=("matplotlib",) if fake else ()
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert "Traceback" not in done.stderr
        if picture and fake:
            assert "pip install 'minilora[plot]'" in done.stdout
        elif picture:
            assert str(folder / f"{script}.png") in done.stdout
            assert (folder / f"{script}.png").read_bytes().startswith(b"\x89PNG")
            assert (folder / f"{script}.png").stat().st_size > 10_000
        assert len(list(tmp_path.rglob("*.*"))) == (picture and not fake)  # and no other file was written
        return Printed(done.stdout)

    return of


def test_01_dense_layer_by_hand(printed):
    out = printed("01_dense_layer_by_hand", picture=True)
    table = Printed(out.text.partition("three common mistakes")[0])
    for name in ("dW", "db", "dx"):
        by_hand, by_difference, relative = table.row(name)
        assert by_hand != 0
        assert abs(by_hand - by_difference) < 1e-7 * abs(by_hand)
        assert relative < 1e-7
    for mistake in ("dW without the 2 / N", "db from the first row only", "dx divided by T instead of N = T n"):
        (relative,) = out.row(mistake)
        assert relative > 0.5, "the check does not see this mistake"
    assert out.row("ml.Linear against the lines above")[0] < 1e-14
    assert "Linear: ok" in out.text


def test_02_mlp_boundary(printed):
    out = printed("02_mlp_boundary", picture=True)
    first, last, _ = out.row("loss")
    assert last < 0.02 * first
    before, after = out.row("accuracy, new points")
    assert before < 0.7
    assert after > 0.95


def test_03_the_seeds_layer(printed):
    out = printed("03_the_seeds_layer", picture=True)
    assert out.row("x @ (W + A @ B) against x W + (x A) B       relative difference")[0] < 1e-13
    assert out.row("trainable parameters")[:2] == [20_000, 1_020_000]
    lines = [line for line in out.text.splitlines() if line.startswith("  A")]
    (seed, zero_B, nothing), (seed_run, zero_run) = ([Printed(line) for line in part] for part in (lines[:3], lines[3:]))
    ratio, dA, dB = seed.row("A, B ~ N(0, 1)")
    assert 50 < ratio < 66  # sqrt(r d) = 55.4
    assert dA > 1
    assert dB > 1
    ratio, dA, dB = zero_B.row("A Kaiming, B = 0")
    assert (ratio, dA) == (0, 0)
    assert dB > 0
    assert nothing.row("A = 0, B = 0") == [0, 0, 0]
    (frozen,) = out.row("mean squared error on new data, frozen W")
    _, first, last, _ = seed_run.row("A, B ~ N(0, 1)")
    assert first > 1000 * frozen
    assert last > 10 * frozen  # training never undoes the initial perturbation
    _, first, last, training = zero_run.row("A Kaiming, B = 0")
    assert first == frozen
    assert last < 0.8 * frozen
    assert training < 1e-6


def test_04_planted_low_rank_shift(printed):
    out = printed("04_planted_low_rank_shift", picture=True)
    for rank in (1, 2, 3):
        reached, whitened, plain, excess = out.row(f"{rank}    ")
        assert reached == pytest.approx(whitened, rel=2e-6)  # to the printed digits
        assert abs(excess) < 1e-9
        assert reached < 0.99 * plain
    for rank in (4, 8, 32):
        assert out.row(f"{rank}    ")[0] < 1e-20
    *first_four, all_eight = out.row("trained  ")
    assert min(first_four) >= 0.99
    assert all_eight < 0.7
    assert max(out.row("before training")) < 0.25
    assert out.row("expected at random") == [0.12] * 4


def test_05_digits_pretrain_adapt(printed):
    pytest.importorskip("sklearn")
    out = printed("05_digits_pretrain_adapt", picture=True)
    _, base_new, base_old = out.row("base  ")
    assert base_new < 0.4
    assert base_old > 0.98
    lora = [out.row(f"LoRA, r = {r}  ") for r in (1, 2, 4, 8)]
    assert [row[0] for row in lora] == [581, 1162, 2324, 4116]
    assert all(row[3] == base_old for row in lora)
    assert out.row("with the adapter off, the outputs differ from the base's by at most") == [0]
    accuracies = [row[1] for row in lora]
    assert accuracies[0] + 0.03 < accuracies[-1]  # a higher rank helps
    trained, full, old_after_full = out.row("full  ")
    assert trained == 25_477
    assert old_after_full < 0.6
    assert full - 0.03 < accuracies[-1]
    assert accuracies[-1] > 0.94
    assert accuracies[0] > out.row("head only  ")[1] + 0.03  # with fewer parameters


def test_06_switch_to_gpu(printed, backend):
    out = printed("06_switch_to_gpu", picture=True)
    rows = [line.split() for line in out.text.splitlines() if line.startswith(("numpy", "cupy"))]
    assert [row[:2] for row in rows] == [["numpy", "float64"], ["numpy", "float32"], ["cupy", "float32"]][: 2 + (backend == "cupy")]
    for row in rows:
        assert float(row[3]) < 0.1 * float(row[2])
    for row in rows[1:]:
        assert float(row[4]) < 1e-4


def test_06_without_cupy_reports_it_and_runs_on_numpy(tmp_path):
    done = run("06_switch_to_gpu", cwd=tmp_path, without=("cupy",))
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NumPy only: ")]
    assert "pip install 'minilora[cuda13]'" in line
    assert "numpy    float32" in done.stdout


@pytest.mark.parametrize(
    ("script", "args", "missing", "command"),
    [
        ("06_switch_to_gpu", ("--backend", "cupy"), "cupy", "pip install 'minilora[cuda13]'"),
        ("05_digits_pretrain_adapt", ("--backend", "numpy"), "sklearn", "pip install scikit-learn"),
    ],
)
def test_missing_packages_are_named_in_one_line(tmp_path, script, args, missing, command):
    done = run(script, *args, cwd=tmp_path, without=(missing,))
    assert done.returncode == 1
    assert done.stdout == ""
    assert command in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_table_lists_every_example():
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in EXAMPLES.glob("*.py"))
