"""Several ranks, started by mpiexec, leave what one process leaves, bit for bit; a rank that differs, fails or hangs is named."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_resume import models, quiet, recipe_of, what_is_left  # noqa: F401  (`models` is a fixture)

from minilora.runs import checkpoint, folder
from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe
from minilora.runs.study import study
from minilora.training.ranks import add_by_tree

HERE = Path(__file__).parent
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or MPIEXEC is None, reason="needs mpi4py and mpiexec: pip install mpi4py mpich")
RUNS = {
    "text": ("text", {"lora_dropout": 0.2, "accumulate": 2, "window": 11}),
    "lm": ("lm", {"lora_dropout": 0.1, "accumulate": 2}),
    "cached blocks": ("lm", {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]}),
    "classify": ("classify", {"lora_dropout": 0.1, "accumulate": 3}),
    "full": ("classify", {"method": "full"}),
    "float16, measured": ("lm", {"dtype": "float16", "eval_every": 2}),
}


def start(n, runs, fault=None, **environment):
    """Start n ranks, one after another on each of the runs [(recipe, or None, or a study, folder)]."""
    runs = [[asdict(what) if isinstance(what, Recipe) else what, str(out)] for what, out in runs]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", **environment}
    line = [MPIEXEC, "-n", str(n), sys.executable, HERE / "ranks_worker.py", json.dumps(runs), json.dumps(fault or {})]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=240, check=False)


def differences(expected, found):
    expected, found = what_is_left(expected), what_is_left(found)
    return [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]


def refused(n, recipe, out, fault=None):
    done = start(n, [(recipe, out)], fault)
    assert done.returncode != 0
    assert not out.exists()
    return done.stderr


# -- the same result ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", range(1, 18))
def test_blocks_of_lanes_are_summed_as_all_lanes_are(lanes):
    whole = add_by_tree({lane: f"({lane})" for lane in range(lanes)}, lanes, lanes)
    for size in range(1, lanes + 1):
        nodes = {}
        for rank in range(size):
            block = range(lanes * rank // size, lanes * (rank + 1) // size)
            nodes |= add_by_tree({lane: f"({lane})" for lane in block}, block.stop, lanes)
        assert len(nodes) == size or lanes % size or (lanes // size) & (lanes // size - 1)  # one each where blocks are powers of two
        assert add_by_tree(nodes, lanes, lanes) == whole


@needs_mpi
@pytest.mark.parametrize(("n", "lanes", "threads"), [(2, 4, 2), (4, 4, 1), (3, 5, 2)])
def test_the_number_of_ranks_changes_nothing(n, lanes, threads, models, tmp_path):  # noqa: F811
    names = list(RUNS) if n == 4 else ["text", "classify"]
    recipes = [
        recipe_of(models, kind, **{"lanes": lanes, "threads": threads, "steps": 4, **changes}) for kind, changes in map(RUNS.get, names)
    ]
    done = start(n, [(recipe, tmp_path / str(i)) for i, recipe in enumerate(recipes)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == len(recipes)  # one rank speaks
    assert done.stderr.count("| 0/4 [") == len(recipes)
    assert done.stdout.count("returned []") == (n - 1) * len(recipes)
    for i, recipe in enumerate(recipes):
        finetune(recipe, tmp_path / "alone", quiet)
        assert differences(tmp_path / "alone", tmp_path / str(i)) == [], names[i]
        shutil.rmtree(tmp_path / "alone")


@needs_mpi
def test_a_killed_rank_ends_all_and_the_run_continues_with_other_numbers(models, tmp_path):  # noqa: F811
    recipe, run = recipe_of(models, "lm", lanes=4, lora_dropout=0.1), tmp_path / "run"
    done = start(4, [(recipe, run)], {"rank": 2, "step": 4, "do": "kill"})
    assert done.returncode != 0
    assert checkpoint.read_last(run).step == 2
    done = start(2, [(None, run)], {"rank": 1, "step": 6, "do": "stop"})  # a signal to one rank ends all after their step
    assert done.returncode != 0
    assert re.search(rf"stopped after step (\d+); minilora finetune --resume {run} continues from step \1\n", done.stdout)
    assert checkpoint.read_last(run).step == 6
    assert "Abort" not in done.stderr
    assert start(3, [(None, run)]).returncode == 0
    finetune(recipe, tmp_path / "alone", quiet)
    assert differences(tmp_path / "alone", run) == []


@needs_mpi
def test_patience_ends_all_ranks(models, tmp_path):  # noqa: F811
    recipe = recipe_of(models, "text", steps=30, lr=10.0, eval_every=1, patience=2)
    assert start(2, [(recipe, tmp_path / "run")]).returncode == 0
    finetune(recipe, tmp_path / "alone", quiet)
    assert len(folder.read_lines(tmp_path / "run" / "metrics.jsonl")) < 30
    assert differences(tmp_path / "alone", tmp_path / "run") == []


@needs_mpi
def test_lanes_are_by_default_the_threads_of_all_ranks(models, tmp_path):  # noqa: F811
    done = start(2, [(recipe_of(models, "text", steps=1, lanes=0, threads=3), tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["configuration"]["lanes"] == 6


@needs_mpi
def test_a_study_hands_its_runs_to_the_ranks(models, tmp_path):  # noqa: F811
    recipe, rows = recipe_of(models, "classify", steps=3), {"LoRA": {}, "biases": {"method": "bitfit"}}
    study(recipe, rows, 1, tmp_path / "ranks", quiet)  # a part is there already
    done = start(3, [({"recipe": asdict(recipe), "rows": rows, "seeds": 3}, tmp_path / "ranks")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("returned [Summary") == 1
    study(recipe, rows, 3, tmp_path / "alone", quiet)
    alone, found = (
        {(r["row"], r["seed"]): {**r, "seconds": 0} for r in folder.read_lines(tmp_path / each / "runs.jsonl")}
        for each in ("alone", "ranks")
    )
    assert alone == found
    assert len(found) == 6


@needs_mpi
def test_gpus_exchange_gradients_by_nccl(models, tmp_path):  # noqa: F811
    """On the fake CuPy, whose NCCL is MPI: three ranks leave what one process with three lanes leaves on NumPy, but for rounding."""
    recipes = [recipe_of(models, kind, steps=3, lanes=3, lora_dropout=0.1) for kind in ("text", "classify")]
    on_gpus = [(replace(recipe, backend="cupy", threads=1), tmp_path / str(i)) for i, recipe in enumerate(recipes)]
    done = start(3, on_gpus, FAKE_GPUS="3")
    assert done.returncode == 0, done.stderr
    for i, recipe in enumerate(recipes):
        finetune(recipe, tmp_path / f"numpy-{i}", quiet)
        alone, found = (folder.read_lines(tmp_path / each / "metrics.jsonl") for each in (f"numpy-{i}", str(i)))
        for name in ("loss", "grad_norm"):
            assert [r[name] for r in found] == pytest.approx([r[name] for r in alone], rel=1e-4)
    assert "rank 2 needs a GPU of its own, and its computer has 2; start fewer ranks" in start(3, on_gpus[:1], FAKE_GPUS="2").stderr
    error = start(2, [(on_gpus[0][0], tmp_path / "2")], FAKE_GPUS="2").stderr
    assert "on GPUs each rank computes one lane, but 2 ranks share 3; start 3 ranks." in error


# -- what is refused -----------------------------------------------------------------------------------------------------------------


@needs_mpi
def test_ranks_that_differ_are_named(models, tmp_path):  # noqa: F811
    shutil.copy(models / "lm.jsonl", tmp_path / "other.jsonl")
    with (tmp_path / "other.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": " dog"}\n')
    recipe, out = recipe_of(models, "lm"), tmp_path / "run"
    for fault, message in (
        ({"version": "0.0.1"}, "rank 1 has minilora '0.0.1', rank 0 has "),
        ({"settings": {"lr": 0.5}}, "rank 1 has lr 0.5, rank 0 has 0.01; all ranks need the same."),
        ({"settings": {"data": str(tmp_path / "other.jsonl")}}, "rank 1 has the data with SHA-256 "),
        ({"settings": {"model": str(models / "nowhere")}}, "minilora: error: rank 1: there is no"),
    ):
        assert message in refused(2, recipe, out, {"rank": 1, **fault})
    assert "3 ranks share only 2 lanes; begin a run with --lanes 3," in refused(3, recipe, out)


@needs_mpi
def test_what_fails_on_all_ranks_is_said_once(models, tmp_path):  # noqa: F811
    (tmp_path / "empty.jsonl").touch()
    error = refused(2, recipe_of(models, "lm", data=str(tmp_path / "empty.jsonl")), tmp_path / "run")
    assert error.count("minilora: error: ") == 1
    assert "rank 0" in error


def alone(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr.strip().splitlines()[-1:]


def test_mpi_is_not_imported_by_a_process_that_is_alone():
    code = "import sys; from minilora.training.ranks import joined\n"
    code += "with joined() as ranks: assert (ranks, 'mpi4py' in sys.modules) == (None, False)"
    assert alone(code) == []
    assert alone(code, PMI_RANK="0", PMI_SIZE="1") == []


def test_mpi4py_that_is_missing():
    code = "import sys; sys.modules['mpi4py'] = None; from minilora.training.ranks import joined\nwith joined(): pass"
    assert "pip install mpi4py mpich" in alone(code, PMI_RANK="0", PMI_SIZE="2")[0]


@needs_mpi
def test_mpiexec_and_library_of_two_kinds():
    """The variables of another mpiexec: the library finds one process only."""
    code = "from minilora.training.ranks import joined\nwith joined(): pass"
    other = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    if "Open MPI" in subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=False).stdout:
        other = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert "mpiexec started 2 processes, but belongs to another MPI than " in alone(code, **other)[0]


# -- what goes wrong on the way --------------------------------------------------------------------------------------------------------


@needs_mpi
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_fails_ends_all(rank, models, tmp_path):  # noqa: F811
    begun = time.monotonic()
    done = start(3, [(recipe_of(models, "text", lanes=3), tmp_path / "run")], {"rank": rank, "step": 4, "do": "fail"})
    assert time.monotonic() - begun < 60
    assert done.returncode != 0
    assert f"minilora: error: rank {rank}: " in done.stderr
    assert ("no memory is left" if rank else "memory ran out after step 3") in done.stderr
    assert checkpoint.read_last(tmp_path / "run").step == 2
    assert start(1, [(None, tmp_path / "run")]).returncode == 0
    finetune(recipe_of(models, "text", lanes=3), tmp_path / "alone", quiet)
    assert differences(tmp_path / "alone", tmp_path / "run") == []


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(rank, models, tmp_path):  # noqa: F811
    recipe = recipe_of(models, "text", lanes=3)
    done = start(3, [(recipe, tmp_path / "run")], {"rank": rank, "step": 3, "do": "hang"}, MINILORA_WAIT="3")
    assert done.returncode != 0
    assert f"rank {rank} did not arrive at step 3 within {3 if rank else 6} s." in done.stderr
