"""Trains like the study `mujoco` does, but kills every run again and again and resumes it each time.

    python benchmark/interrupted.py

The summaries in benchmark/results/interrupted/ are to be compared with those of the same seeds left alone.
"""

import json
import os
import random
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from run import ROOT, Run, episodes_in_csv, summarize

SECONDS = (40.0, 90.0)  # between a start and its SIGKILL
RUN = Run("interrupted", "ppo_continuous.py", "Hopper-v5", 1, "--checkpoint-interval 0.25")


def execute(run: Run) -> None:
    if run.result.exists():
        return
    command = f"python {run.script} --env-id {run.env_id} --seed {run.seed} {run.flags}"
    folder, kills, delays = ROOT / "runs" / f"{run.study}__{run.name}", 0, random.Random(run.seed)
    full = [sys.executable, *shlex.split(command)[1:], "--run-name", folder.name, "--resume"]
    while True:
        with subprocess.Popen(full, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            try:
                status = process.wait(timeout=delays.uniform(*SECONDS))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    if status:
        sys.exit(f"{command} ended with exit status {status}")
    run.result.parent.mkdir(parents=True, exist_ok=True)
    about = {"kills": kills} | json.loads((folder / "args.json").read_text())
    run.result.write_text(json.dumps(summarize(command, episodes_in_csv(folder), about)) + "\n")


if __name__ == "__main__":
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(execute, [replace(RUN, seed=seed) for seed in (1, 2, 3)]))
