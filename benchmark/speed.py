"""How fast the scripts train, beside others on the same machine: `python benchmark/run.py speed`.

Every contest runs all sides one after the other, several rounds of that, on an otherwise idle
machine. Speed is read from TensorBoard: environment steps per second of wall clock, everything
included, between the end of a burn-in (compiling, warming up) and the end of the run (LeanRL prints
that rate instead). Peak memory is that of the process. CleanRL is needed; the others are left out
where their interpreter is not given.
"""

import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import matplotlib
import matplotlib.pyplot as plt
from ale_py.vector_env import AtariVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "speed"

# contest: {side: command}; {baseline}, {envpool}, {sb3}, {sbx} and {lean} are interpreters with the
# packages of CleanRL, its EnvPool script, Stable-Baselines3, SBX and LeanRL; {cleanrl} and {leanrl}
# are checkouts
OURS = "{python} {root}/ppo_continuous.py --total-timesteps 30720 --env-id"
ONE = " --num-envs 1 --num-steps 2048"
CLEANRL = "{baseline} {cleanrl}/cleanrl/ppo_continuous_action.py --total-timesteps 14336 --no-cuda"
OTHERS = "{root}/benchmark/sb3.py"
CONTESTS = {
    "Pong": {
        "ours": "{python} {root}/ppo_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 9216",
        "ours, fp32, eager": "{python} {root}/ppo_atari.py --env-id PongNoFrameskip-v4"
        " --total-timesteps 6144 --precision fp32 --no-compile",
        "CleanRL": "{baseline} {cleanrl}/cleanrl/ppo_atari.py --env-id PongNoFrameskip-v4"
        " --total-timesteps 5120 --no-cuda",
        "CleanRL, EnvPool": "{envpool} {cleanrl}/cleanrl/ppo_atari_envpool.py --env-id Pong-v5"
        " --total-timesteps 5120 --no-cuda",
        "Stable-Baselines3": "{sb3} " + OTHERS + " sb3 PongNoFrameskip-v4 5120 8",
    },
    "HalfCheetah": {
        "ours": OURS + " HalfCheetah-v4",
        "ours, 1 environment": OURS + " HalfCheetah-v4" + ONE,
        "CleanRL": CLEANRL + " --env-id HalfCheetah-v4",
        "Stable-Baselines3": "{sb3} " + OTHERS + " sb3 HalfCheetah-v4 14336 8",
        "Stable-Baselines3, 1 environment": "{sb3} " + OTHERS + " sb3 HalfCheetah-v4 14336 1",
        "SBX": "{sbx} " + OTHERS + " sbx HalfCheetah-v4 20480 8",
        "SBX, 1 environment": "{sbx} " + OTHERS + " sbx HalfCheetah-v4 14336 1",
        "LeanRL": "{lean} {leanrl}/leanrl/ppo_continuous_action_torchcompile.py"
        " --env-id HalfCheetah-v4 --total-timesteps 24576 --compile --no-cuda --measure-burnin 4",
    },
    "Hopper": {
        "ours": OURS + " Hopper-v4",
        "KL penalty": OURS.replace("continuous", "kl_penalty") + " Hopper-v4",
        "CleanRL": CLEANRL + " --env-id Hopper-v4",
    },
}
BASELINES = {  # side: its interpreter
    "CleanRL": "baseline",
    "CleanRL, EnvPool": "envpool",
    "Stable-Baselines3": "sb3",
    "Stable-Baselines3, 1 environment": "sb3",
    "SBX": "sbx",
    "SBX, 1 environment": "sbx",
    "LeanRL": "lean",
}
SHORT = dict.fromkeys(  # as the report calls them
    ("python", "baseline", "envpool", "sb3", "sbx", "lean"), "python"
)
SHORT |= {"root": ".", "cleanrl": "cleanrl", "leanrl": "leanrl"}
BURN_IN = 3  # iterations
CARTPOLE = "--total-timesteps 100000 --num-steps 32 --num-minibatches 1 --update-epochs 5"
CARTPOLE += " --learning-rate 2e-3 --no-compile"
STARTS = {"CartPole": "{python} {root}/ppo_continuous.py --env-id CartPole-v1 " + CARTPOLE}
STARTS |= {"HalfCheetah": OURS.replace("30720", "8192") + " HalfCheetah-v4"}
SOLVED = 475.0  # mean return of 100 episodes, of CartPole-v1

# name: (command, transitions per batch) for each number of environments of SWEEP
SWEEPS = {
    "HalfCheetah": ("{python} {root}/ppo_continuous.py --env-id HalfCheetah-v5", 2048),
    "Pong": ("{python} {root}/ppo_atari.py --env-id PongNoFrameskip-v4", 1024),
}
SWEEP = (1, 4, 8, 16, 64, 256)
# name: (what simulates that many environments, how many of their steps one call of it takes)
SIMULATORS: dict[str, Callable[[int], tuple]] = {
    "HalfCheetah": lambda num_envs: (
        gym.make("HalfCheetah-v5").unwrapped,
        1,
    ),  # one after the other
    "Pong": lambda num_envs: (AtariVectorEnv("pong", num_envs=num_envs), num_envs),
}


@dataclass(frozen=True)
class Measurement:
    steps_per_second: float
    peak_megabytes: float
    first: float | None  # seconds from the command to the end of the first iteration
    solved: float | None  # to a mean return of 100 episodes of SOLVED
    end: float  # to the end of the process


def measure(command: str, folder: Path, environment: dict[str, str]) -> Measurement:
    """Runs a command in an empty folder and reads what it wrote below runs/."""
    start = time.time()
    process = subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    end = time.time() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}\n{output[-2000:]}")
    if rates := re.findall(r"speed: *([\d.]+) sps", output):
        return Measurement(float(rates[-1]), usage.ru_maxrss / 1024, None, None, end)
    (events,) = folder.glob("runs/*/events.out.tfevents.*")
    reader = EventAccumulator(str(events), {"scalars": 0}).Reload()
    ours = "losses/policy_loss" in reader.Tags()["scalars"]  # and CleanRL's: once per iteration
    points = reader.Scalars("losses/policy_loss" if ours else "time/fps")
    first, *_, last = points[BURN_IN - 1 :]
    rate = (last.step - first.step) / (last.wall_time - first.wall_time)
    episodes = reader.Scalars("charts/episodic_return") if ours else []
    solved = [
        last.wall_time - start
        for i, last in enumerate(episodes[99:])
        if statistics.fmean(x.value for x in episodes[i : i + 100]) >= SOLVED
    ]
    first = points[0].wall_time - start
    return Measurement(rate, usage.ru_maxrss / 1024, first, min(solved, default=None), end)


def processor() -> str:
    """Name of the CPU, where the system tells, and what it has for bf16."""
    about = Path("/proc/cpuinfo")  # of Linux
    text = about.read_text() if about.exists() else ""
    names = [*re.findall(r"model name\s*: (.+)", text), platform.processor() or platform.machine()]
    units = sorted({*re.findall(r"\b(?:avx512|amx)_bf16\b", text)})
    return ", ".join([names[0], *units])


def commit() -> str:
    """Of this repository; "-dirty": changed since."""
    return subprocess.getoutput(f'git -C "{ROOT}" describe --always --match= --abbrev=40 --dirty')


def run(command: str, words: dict, environment: dict[str, str]) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        return measure(command.format(**words), Path(folder), environment)


def sweep(words: dict, environment: dict[str, str]) -> dict[str, dict[int, dict[str, float]]]:
    """Steps per second with several numbers of environments and the same size of batch."""
    rows = {}
    for name, (command, batch_size) in SWEEPS.items():
        for num_envs in SWEEP:
            sizes = f" --num-envs {num_envs} --num-steps {batch_size // num_envs}"
            one = run(f"{command}{sizes} --total-timesteps {8 * batch_size}", words, environment)
            row = {"steps_per_second": round(one.steps_per_second)}
            rows.setdefault(name, {})[num_envs] = row
            print(name, num_envs, rows[name][num_envs], flush=True)
    return rows


def simulators_alone(seconds: float) -> dict[str, dict[int, float]]:
    """Microseconds per step with random actions and nothing else: no script can undercut them."""
    rows = {}
    for name, num_envs in itertools.product(SIMULATORS, SWEEP):
        env, steps_per_call = SIMULATORS[name](num_envs)
        actions = itertools.cycle([env.action_space.sample() for _ in range(64)])
        env.reset(seed=1)
        for action in itertools.islice(actions, 64):  # warm up
            env.step(action)
        start, steps = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            env.step(next(actions))
            steps += steps_per_call
        env.close()
        rows.setdefault(name, {})[num_envs] = round(1e6 * passed / steps, 1)
        print(name, num_envs, f"simulator alone: {rows[name][num_envs]} µs per step", flush=True)
    return rows


def starts(
    rounds: int, words: dict, environment: dict[str, str]
) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """Seconds from the command to what happens, with the compiler's cache empty and warm."""
    rows = {}
    for _, (name, command) in itertools.product(range(rounds), STARTS.items()):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "warm"):
                one = run(command, words, environment | {"TORCHINDUCTOR_CACHE_DIR": cache})
                row = rows.setdefault(name, {}).setdefault(state, {})
                for what in ("first", "solved", "end"):
                    seconds = getattr(one, what)
                    row.setdefault(what, []).append(seconds and round(seconds, 1))
                print(name, state, row, flush=True)
    return rows


def medians(report: dict) -> dict[str, dict[str, float]]:
    """Steps per second of each side in each contest."""
    return {
        contest: {side: statistics.median(one["steps_per_second"]) for side, one in sides.items()}
        for contest, sides in report["contests"].items()
    }


def ratio(sides: dict, side: str) -> float:
    """Of the medians, to CleanRL."""
    ours, theirs = (statistics.median(sides[x]["steps_per_second"]) for x in (side, "CleanRL"))
    return ours / theirs


def summarize(report: dict) -> list[str]:
    """The table of docs/: medians of steps per second, and ratios to CleanRL."""
    contests = report["contests"]
    rows = [f"| | {' | '.join(contests)} |", "|---" * (1 + len(contests)) + "|"]
    names = dict.fromkeys(side for sides in contests.values() for side in sides)
    for side in sorted(names, key=lambda side: side in BASELINES):  # ours first
        cells = [
            f"{statistics.median(sides[side]['steps_per_second']):.0f} ({ratio(sides, side):.1f}×)"
            if side in sides
            else "–"
            for sides in contests.values()
        ]
        rows.append(f"| {side} | {' | '.join(cells)} |")
    return rows


def summarize_starts(report: dict) -> list[str]:
    """The table of docs/: median seconds after the command."""
    rows = ["| | compiler's cache | first iteration | solved | end |", "|---" * 5 + "|"]
    for name, states in report.get("starts", {}).items():
        for state, row in states.items():
            cells = [statistics.median(x) if None not in x else "–" for x in row.values()]
            rows.append(f"| {name} | {state} | {' | '.join(map(str, cells))} |")
    return rows


def tabulate(report: dict) -> str:
    rows = [report["machine"], ""]
    rows.append(
        "| contest | side | steps/s: median (all) | ratio to CleanRL | peak memory, MB: median |"
    )
    rows.append("|---|---|---|---|---|")
    for contest, sides in report["contests"].items():
        for side, one in sides.items():
            rates = one["steps_per_second"]
            speed = f"{statistics.median(rates):.0f} ({', '.join(f'{rate:.0f}' for rate in rates)})"
            cells = (
                contest,
                side,
                speed,
                f"{ratio(sides, side):.2f}",
                f"{statistics.median(one['peak_megabytes']):.0f}",
            )
            rows.append(f"| {' | '.join(cells)} |")
    rows += [
        "",
        "| environment | N | simulator alone, µs per step | in training |",
        "|---" * 4 + "|",
    ]
    for name, numbers in report.get("simulators_alone", {}).items():
        for num_envs, alone in numbers.items():
            row = report.get("sweep", {}).get(name, {}).get(num_envs)
            total = f"{1e6 / row['steps_per_second']:.0f}" if row else "–"
            rows.append(f"| {name} | {num_envs} | {alone:.0f} | {total} |")
    rows += ["", *summarize_starts(report)]
    return "\n".join(rows) + "\n"


COLORS = {"ours": "#0072B2", "KL penalty": "#009E73", "CleanRL": "#E69F00"}  # as in plot.py


def plot(report: dict) -> None:
    """Median steps per second of every side as bars with their ratio to CleanRL, rounds as dots."""
    contests = report["contests"]
    most = max(map(len, contests.values()))
    figure, axes = plt.subplots(1, len(contests), figsize=(8.4, 0.9 + 0.3 * most), squeeze=False)
    for axis, (contest, sides) in zip(axes[0], contests.items(), strict=True):
        rates = [side["steps_per_second"] for side in sides.values()]
        colors = [COLORS.get(side, "#999999" if side in BASELINES else "#56B4E9") for side in sides]
        medians = [statistics.median(rate) for rate in rates]
        axis.barh(range(len(sides)), medians, color=colors)
        for row, (side, rate) in enumerate(zip(sides, rates, strict=True)):
            axis.plot(rate, [row] * len(rate), "k.", markersize=3)
            text = f"  {ratio(sides, side):.1f}×"
            axis.text(max(rate), row, text, va="center", fontsize=8)
        names = [side.replace("Stable-Baselines3", "SB3") for side in sides]
        names = [name.replace(", 1 environment", " (N = 1)") for name in names]
        axis.set_yticks(range(len(sides)), names, fontsize=8)
        axis.set_xlim(0.0, 1.25 * max(map(max, rates)))
        axis.tick_params(axis="x", labelsize=7)
        axis.set_ylim(most - 0.5, -0.5)
        axis.set_title(contest, fontsize=10)
    figure.supxlabel(f"steps per second, {report['machine'].split(', Linux')[0]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png", dpi=100)
    plt.close(figure)


def publish(report: dict) -> list[str]:
    """Makes figure and table, and returns the short table for docs/."""
    plot(report)
    (RESULTS / "table.md").write_text(tabulate(report))
    return summarize(report)


def main(rounds: int, checkouts: dict[str, str], interpreters: dict[str, str]) -> None:
    """Contests that speed.json holds already are left out; delete it to measure anew."""
    paths = os.pathsep.join(checkouts.values())
    environment = os.environ | {
        "PYTHONPATH": paths,
        "PYTHONWARNINGS": "ignore",
        "WANDB_MODE": "disabled",
    }
    words = {"python": sys.executable, "root": ROOT} | checkouts | interpreters
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "speed.json"
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.platform()}"
    versions = {name: version(name) for name in ("torch", "gymnasium", "ale-py", "mujoco", "numpy")}
    about = {"machine": machine, "versions": versions, "burn_in_iterations": BURN_IN}
    report = json.loads(path.read_text()) if path.exists() else about | {"contests": {}}
    for name, value in about.items():
        if report[name] != value:
            sys.exit(
                f"{path} is of another {name} ({report[name]}): move it away to measure this one"
            )
    for contest, sides in CONTESTS.items():
        if contest in report["contests"]:
            continue
        sides = {
            side: command
            for side, command in sides.items()
            if BASELINES.get(side, "python") in words
        }
        measured = {side: [] for side in sides}
        for _, (side, command) in itertools.product(range(rounds), sides.items()):
            one = run(command, words, environment)
            measured[side].append(one)
            print(f"{contest}, {side}: {one.steps_per_second:.0f} steps/s", flush=True)
        report.setdefault("git_commits", {})[contest] = commit()
        report["contests"][contest] = {
            side: {
                "command": command.format_map(SHORT),
                "steps_per_second": [round(one.steps_per_second, 1) for one in measured[side]],
                "peak_megabytes": [round(one.peak_megabytes) for one in measured[side]],
            }
            for side, command in sides.items()
        }
        path.write_text(json.dumps(report, indent=1) + "\n")
    if "simulators_alone" not in report:
        report["simulators_alone"] = simulators_alone(seconds=2.0)
        path.write_text(json.dumps(report, indent=1) + "\n")
    if "starts" not in report:
        report["starts"] = starts(rounds, words, environment)
        path.write_text(json.dumps(report, indent=1) + "\n")
    if "sweep" not in report:
        report["sweep"] = sweep(words, environment)
        path.write_text(json.dumps(report, indent=1) + "\n")
    publish(json.loads(path.read_text()))  # whose keys are all strings
    print((RESULTS / "table.md").read_text())
