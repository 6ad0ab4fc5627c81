"""Trains like the study `mujoco`, but kills every run again and again and resumes it each time.

    python benchmark/interrupted.py

The summaries in benchmark/results/interrupted/ are to be compared with those of the same seeds left
alone.
"""

import json
import os
import random
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import tyro
from run import ROOT, Run, episodes_in_csv, summarize, write

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
    about = {"kills": kills, "script": run.script}
    about |= json.loads((folder / "args.json").read_text())
    write(run, summarize(command, episodes_in_csv(folder), about), threads=1)


def main() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(execute, [replace(RUN, seed=seed) for seed in (1, 2, 3)]))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
