"""One rank of the runs of test_ranks.py: mpiexec -n N python ranks_worker.py RUNS FAULT.

RUNS   JSON, [[settings of a recipe, run folder], ...]; settings null: continue the run in the folder; with "rows" and "seeds": a study
FAULT  JSON, {"rank": r, "step": s, "do": "hang" | "fail" | "kill" | "stop"}, or {"rank": r, "settings": {...}} that differ, or
       {"rank": r, "version": of minilora}; or {}
"""

import json
import os
import signal
import sys
import time

import minilora.training.ranks
from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe
from minilora.runs.resume import resume
from minilora.runs.study import study
from minilora.training.replicas import Replicas

if devices := int(os.environ.get("FAKE_GPUS", 0)):
    import fakecupy

    sys.modules |= fakecupy.modules
    fakecupy.module.cuda.runtime.getDeviceCount = lambda: devices
runs, fault = map(json.loads, sys.argv[1:])
mine = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0))) == fault.get("rank")
gradients = Replicas.gradients


def faulty(self, batches, seed=(), scale=1.0):
    if seed[-1] == fault["step"]:
        if fault["do"] == "hang":
            time.sleep(600)
        if fault["do"] == "fail":
            raise MemoryError("no memory is left")
        os.kill(os.getpid(), signal.SIGKILL if fault["do"] == "kill" else signal.SIGTERM)
    return gradients(self, batches, seed, scale)


if mine and "do" in fault:
    Replicas.gradients = faulty
if mine and "version" in fault:
    minilora.training.ranks.__version__ = fault["version"]
for settings, out in runs:
    if settings is None:
        result = resume(out)
    elif "rows" in settings:
        result = study(Recipe(**settings["recipe"]), settings["rows"], settings["seeds"], out)
    else:
        result = finetune(Recipe(**settings | (fault.get("settings", {}) if mine else {})), out)
    print(f"returned {[*result][:1]}")
