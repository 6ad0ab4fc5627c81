"""How fast the scripts train, beside CleanRL on the same machine: `python benchmark/run.py speed`.

Every contest runs all sides one after the other, several rounds of that, on an otherwise idle machine.
Speed is read from TensorBoard: environment steps per second of wall clock, everything included, between the
end of a burn-in (compiling, warming up) and the end of the run. Peak memory is that of the process.
"""

import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "speed"

# contest: {side: command}; {baseline} is an interpreter with CleanRL's packages, {cleanrl} a checkout of it
CONTESTS = {
    "Pong": {
        "ours": "{python} {root}/ppo_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 9216",
        "ours, fp32": "{python} {root}/ppo_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 6144"
        " --precision fp32 --no-compile",
        "CleanRL": "{baseline} {cleanrl}/cleanrl/ppo_atari.py --env-id PongNoFrameskip-v4"
        " --total-timesteps 5120 --no-cuda",
    },
    "HalfCheetah": {
        "ours": "{python} {root}/ppo_continuous.py --env-id HalfCheetah-v5 --total-timesteps 30720",
        "CleanRL": "{baseline} {cleanrl}/cleanrl/ppo_continuous_action.py --env-id HalfCheetah-v4"
        " --total-timesteps 14336 --no-cuda",
    },
    "Hopper": {
        "ours": "{python} {root}/ppo_continuous.py --env-id Hopper-v5 --total-timesteps 30720",
        "KL penalty": "{python} {root}/ppo_kl_penalty.py --env-id Hopper-v5 --total-timesteps 30720",
        "CleanRL": "{baseline} {cleanrl}/cleanrl/ppo_continuous_action.py --env-id Hopper-v4"
        " --total-timesteps 14336 --no-cuda",
    },
}
BURN_IN = 3  # iterations

# name: (command, transitions per batch) for each number of environments of SWEEP
SWEEPS = {
    "HalfCheetah": ("{python} {root}/ppo_continuous.py --env-id HalfCheetah-v5", 2048),
    "Pong": ("{python} {root}/ppo_atari.py --env-id PongNoFrameskip-v4", 1024),
}
SWEEP = (1, 4, 8, 16, 64, 256)
PARTS = ("env", "act", "update")


@dataclass(frozen=True)
class Measurement:
    steps_per_second: float
    peak_megabytes: float
    parts: tuple[float, ...]  # microseconds per step in PARTS; empty for the baselines


def measure(command: str, folder: Path, environment: dict[str, str]) -> Measurement:
    """Runs a command in an empty folder and reads what it wrote below runs/."""
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}\n{output[-2000:]}")
    (events,) = folder.glob("runs/*/events.out.tfevents.*")
    reader = EventAccumulator(str(events)).Reload()
    first, *_, last = reader.Scalars("charts/SPS")[BURN_IN - 1 :]
    rate = (last.step - first.step) / (last.wall_time - first.wall_time)
    tags = [f"time/{part}" for part in PARTS if f"time/{part}" in reader.Tags()["scalars"]]
    parts = [statistics.median(point.value for point in reader.Scalars(tag)[BURN_IN:]) for tag in tags]
    return Measurement(rate, usage.ru_maxrss / 1024, tuple(parts))


def run(command: str, words: dict, environment: dict[str, str]) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        return measure(command.format(**words), Path(folder), environment)


def sweep(words: dict, environment: dict[str, str]) -> dict[str, dict[int, dict[str, float]]]:
    """Where the time of a step goes, for several numbers of environments and the same size of batch."""
    rows = {}
    for name, (command, batch_size) in SWEEPS.items():
        for num_envs in SWEEP:
            sizes = f" --num-envs {num_envs} --num-steps {batch_size // num_envs}"
            one = run(f"{command}{sizes} --total-timesteps {8 * batch_size}", words, environment)
            parts = {part: round(value, 1) for part, value in zip(PARTS, one.parts, strict=True)}
            rows.setdefault(name, {})[num_envs] = {"steps_per_second": round(one.steps_per_second), **parts}
            print(name, num_envs, rows[name][num_envs], flush=True)
    return rows


def tabulate(report: dict) -> str:
    rows = ["| contest | side | steps/s: median (all) | ratio to CleanRL: median | peak memory, MB |"]
    rows.append("|---|---|---|---|---|")
    for contest, sides in report["contests"].items():
        base = sides["CleanRL"]["steps_per_second"]
        for side, one in sides.items():
            rates = one["steps_per_second"]
            ratio = statistics.median(x / y for x, y in zip(rates, base, strict=True))
            speed = f"{statistics.median(rates):.0f} ({', '.join(f'{rate:.0f}' for rate in rates)})"
            rows.append(f"| {contest} | {side} | {speed} | {ratio:.2f} | {max(one['peak_megabytes'])} |")
    rows += [
        "",
        "| environment | N | steps/s | simulator, acting, update: µs per step |",
        "|---|---|---|---|",
    ]
    for name, numbers in report.get("sweep", {}).items():
        for num_envs, row in numbers.items():
            split = ", ".join(f"{row[part]:.0f}" for part in PARTS)
            rows.append(f"| {name} | {num_envs} | {row['steps_per_second']} | {split} |")
    return "\n".join(rows) + "\n"


def main(rounds: int, baseline: str, cleanrl: str) -> None:
    """Contests that speed.json holds already are left out; delete it to measure anew."""
    environment = os.environ | {"PYTHONPATH": cleanrl, "PYTHONWARNINGS": "ignore"}
    words = {"python": sys.executable, "root": ROOT, "baseline": baseline, "cleanrl": cleanrl}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "speed.json"
    report = json.loads(path.read_text()) if path.exists() else {"contests": {}}
    report["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    report["versions"] = {name: version(name) for name in ("torch", "gymnasium", "ale-py", "mujoco", "numpy")}
    report["burn_in_iterations"] = BURN_IN
    for contest, sides in CONTESTS.items():
        if contest in report["contests"]:
            continue
        measured = {side: [] for side in sides}
        for _, (side, command) in itertools.product(range(rounds), sides.items()):
            one = run(command, words, environment)
            measured[side].append(one)
            print(f"{contest}, {side}: {one.steps_per_second:.0f} steps/s", flush=True)
        report["contests"][contest] = {
            side: {
                "command": command.format(python="python", baseline="python", root=".", cleanrl="cleanrl"),
                "steps_per_second": [round(one.steps_per_second, 1) for one in measured[side]],
                "peak_megabytes": [round(one.peak_megabytes) for one in measured[side]],
            }
            for side, command in sides.items()
        }
        path.write_text(json.dumps(report, indent=1) + "\n")
    if "sweep" not in report:
        report["sweep"] = sweep(words, environment)
        path.write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "table.md").write_text(tabulate(report))
    print(tabulate(report))
