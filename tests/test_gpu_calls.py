"""benchmarks.gpu: its five calls on the fake CuPy, what is kept when one is cut off, and where results go."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_figures, gpu_jobs
from benchmarks.harness import Failed
from benchmarks.report import Measured
from minilora.kernels import cuda

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not cuda.ENABLED, reason="CUDA sources run through g++ here")
@pytest.mark.parametrize("number", gpu.CALLS)
def test_a_dry_run_walks_every_call(number, tmp_path):
    for needed in ("tokenizers", "threadpoolctl"):
        pytest.importorskip(needed)
    if number > 2:
        pytest.importorskip("peft", reason="a dry run of this call takes 5 to 20 s; it runs with: pip install 'minilora[oracle]'")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--call", str(number), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "gpu-fake.json").read_text())["results"]
    try:
        import peft  # noqa: F401
    except ImportError:
        jobs = {name: r for name, r in results.items() if "losses" in r}
        assert all("No module named" in r["left_out"]["eager"] for r in jobs.values())
        assert done.returncode == (1 if jobs else 0)  # nothing to compare with
    else:
        assert done.returncode == 0, done.stdout + done.stderr
    assert set(results) == {"versions", *(name for name in gpu.CALLS[number] if "compile" not in name)}
    assert [name for name, r in results.items() if {"failed", "unfinished"} & r.keys() or r.get("exit_code")] == []
    if number == 1:
        assert results["launches"]["graph"] == {"2 x 8": False, "2 x 8, graph": True, "1 x 4": False, "1 x 4, graph": True}
    if number == 2:
        assert results["dense-bf16"]["how_ours"] == {"products": "cuBLAS", "tf32": True, "graph": True, "warnings": []}
    if number == 5:
        assert results["snippets"]["how_ours"]["graph"] is False  # their shapes change
        assert results["curves"]["losses_apart"] < 1e-4
    assert not list(tmp_path.glob("*.part"))


def test_every_measurement_belongs_to_a_call_and_fits_it():
    assert sorted(gpu.MEASUREMENTS) == sorted(name for names in gpu.CALLS.values() for name in names)
    assert all(sum(gpu.MEASUREMENTS[name][0] for name in names) < 9 * 60 - 30 for names in gpu.CALLS.values())


def test_a_rival_that_fails_is_left_out_with_the_reason_and_rounds_are_kept(monkeypatch, tmp_path):
    class Worker:
        start = 1.0

        def __init__(self, workload, side, settings):
            if side == "half":
                raise Failed("half: out of memory")
            self.measured = Measured(side, losses=[1.0, 1.0], memory=1)

        def round(self):
            if self.measured.side == "compile" and self.measured.seconds:
                raise Failed("compile: it crashed")
            self.measured.seconds.append(2.0)

        def stop(self):
            pass

    monkeypatch.setattr(gpu_jobs, "Worker", Worker)
    (tmp_path / "how_ours.json").write_text('{"products": "CuPy"}')
    kept = []
    settings = {"rounds": 2, "steps": 10, "dtype": "float32", "folder": str(tmp_path)}
    result = gpu_jobs.turns(["ours", "eager", "half", "compile"], settings, lambda r: kept.append(json.loads(json.dumps(r))))
    assert result["left_out"] == {"half": "half: out of memory", "compile": "compile: it crashed"}
    assert list(result["sides"]) == ["ours", "eager"]
    assert result["how_ours"] == {"products": "CuPy"}
    assert kept[0]["ready"] == {"ours": 1.0}
    assert list(kept[4]["sides"]) == ["ours", "eager", "compile"]  # after the first round
    assert [len(r["sides"]["ours"]["seconds_per_step"]) for r in kept[4:]] == [1, 2]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:  # it has ended
        return False


def test_a_measurement_is_cut_off_and_what_it_has_is_kept(monkeypatch, tmp_path):
    """The process and what it started are ended."""
    begun = tmp_path / "begun"
    code = f"""
import json, pathlib, subprocess, sys, time
o = json.loads(sys.argv[2])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(o["out"]).write_text(json.dumps({{"so far": o["rounds"]}}))
pathlib.Path({str(begun)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    popen = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda run, **keywords: popen([run[0], "-c", code, *run[3:]], **keywords))
    stored = []
    result = gpu.measure("dense-bf16", {"rounds": 3}, 3, stored.append)
    assert result == {"so far": 3, "unfinished": "stopped after 3 s"}
    assert stored == [{"so far": 3, "unfinished": "being measured"}]
    child, end = int(begun.read_text()), time.monotonic() + 10  # a signal takes a moment to arrive
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(child)


def test_why_a_measurement_failed_is_one_line():
    result = gpu.measure("launches", {}, 60, print)  # lacks the option `dry`
    assert result["failed"] == "AttributeError: 'Namespace' object has no attribute 'dry'"
    assert any("gpu.py" in line for line in result["traceback"])


def test_nothing_is_begun_without_the_time_for_it(monkeypatch, tmp_path, capsys):
    machine, asked = {"device": "NVIDIA H200"}, []

    def measure(name, o, seconds, store):
        asked.append((name, seconds))
        return {"machine": dict(machine), "products": "cuBLAS"} if name == "versions" else {"ok": True, "exit_code": 0}

    monkeypatch.setattr(gpu, "measure", measure)
    args = Namespace(minutes=1.75, dry_run=False, out=tmp_path, rivals=("eager",))
    assert gpu.call(("launches", "dense-bf16-compile", "memcheck", "toy"), args, 5) == 1
    assert [name for name, _ in asked] == ["versions", "launches", "toy"]
    assert all(seconds <= 105 for _, seconds in asked)
    assert "memcheck: not begun, as 105 s are left and it takes 120" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "measure", lambda *_: {"failed": "ImportError: the cupy backend needs CuPy"})
    assert gpu.call(("launches",), args, 5) == 1
    assert capsys.readouterr().err == "benchmarks.gpu: ImportError: the cupy backend needs CuPy\n"


def test_results_of_another_machine_are_never_replaced(tmp_path):
    names = {
        "NVIDIA H100 80GB HBM3": "gpu-h100",
        "NVIDIA H200": "gpu-h200",
        "NVIDIA A100-SXM4-80GB": "gpu-a100",
        "NVIDIA GeForce RTX 4090": "gpu-geforce-rtx-4090",
        "Tesla T4": "gpu-tesla-t4",
    }
    assert {device: gpu.place(tmp_path, {"device": device}).stem for device in names} == names
    machine = {"device": "NVIDIA H100 80GB HBM3", "cupy": "14.2.0"}
    path = gpu.place(tmp_path, machine)
    path.write_text(json.dumps({"machine": machine, "note": "kept", "results": {"toy": {"a": 1}}}))
    gpu.add(gpu.place(tmp_path, machine), machine, {"curves": {"b": 2}})
    assert json.loads(path.read_text()) == {"machine": machine, "note": "kept", "results": {"toy": {"a": 1}, "curves": {"b": 2}}}
    other = {**machine, "cupy": "15.0.0"}
    assert gpu.place(tmp_path, other).name == "gpu-h100-2.json"
    gpu.add(gpu.place(tmp_path, other), other, {"toy": {}})
    assert gpu.place(tmp_path, {**machine, "cupy": "16.0.0"}).name == "gpu-h100-3.json"
    assert gpu.place(tmp_path, other).name == "gpu-h100-2.json"
    for name in ("h100", "h200"):  # of the repository
        path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
        assert gpu.place(path.parent, json.loads(path.read_text())["machine"]) == path


def test_the_profile_sums_kernels_by_the_file_they_come_from():
    def event(name, ms, kind="kernel"):
        return {"cat": kind, "name": name, "dur": 1e3 * ms}

    one = [event("nvjet_hsh_128x256", 6), event("flash_forward", 2), event("flash_dq", 1), event("cupy_copy__bfloat16", 0.5)]
    one += [event("Memcpy HtoD", 0.25, "gpu_memcpy"), event("aten::mm", 99, "cpu_op")]
    result = gpu_figures.by_kernel([*one, *one, {"name": "no category"}], 2)
    assert result["ms_a_step"] == 9.75
    assert result["launches_a_step"] == 5
    assert result["by_source"] == {"products": 6, "flash.cu": 3, "CuPy": 0.5, "copies": 0.25}
    assert result["kernels"][0] == {"kernel": "nvjet_hsh_128x256", "launches": 1, "ms": 6}


def test_where_a_program_is_missing_the_result_says_so(monkeypatch):
    o = SimpleNamespace(dry=False, seconds=10)
    monkeypatch.setattr(gpu_figures.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_figures.Path, "glob", lambda self, pattern: iter(()))
    assert "compute-sanitizer is not installed" in gpu_figures.memcheck(o, print)["left_out"]
    monkeypatch.setattr(gpu_figures, "find_spec", lambda name: None)
    assert "torch is not installed" in gpu_figures.profile(o, print)["left_out"]
