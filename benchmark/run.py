"""Runs the studies behind the results, several at a time, and keeps a small file of each run.

    python benchmark/run.py mujoco eager --workers 2

Finished runs are skipped and interrupted ones resumed, so the command can be repeated. A run is
written to runs/STUDY__ENV__SCRIPT__SEED/ like any other; its summary to
benchmark/results/STUDY/ENV__SCRIPT__SEED.json. `python benchmark/plot.py` makes the figures and
tables from the summaries.
"""

import csv
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import speed
import tyro
from details import ATARI_DETAILS, DETAIL_TASKS, DETAILS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
RUNNING: set[subprocess.Popen] = set()
STARTING = threading.RLock()  # a second SIGTERM may come while the first is handled
STOPPING = threading.Event()

MUJOCO_TASKS = "HalfCheetah Hopper Walker2d Swimmer InvertedDoublePendulum Ant Humanoid".split()
SEEDS = {"HalfCheetah": 10}  # instead of 5: some seeds end twice as high as others

# [PPO] Table 1: its seven tasks, and its eleven objectives, the most telling ones first
PAPER_TASKS = (
    "HalfCheetah Hopper InvertedDoublePendulum InvertedPendulum Reacher Swimmer Walker2d".split()
)
PAPER_OBJECTIVES = {
    "none": "ppo_kl_penalty.py --kl-mode fixed --kl-coef 0",
    "clip-0.2": "ppo_continuous.py --clip-coef 0.2",
    "adaptive-0.01": "ppo_kl_penalty.py --kl-target 0.01",
    "fixed-1": "ppo_kl_penalty.py --kl-mode fixed --kl-coef 1",
    "clip-0.1": "ppo_continuous.py --clip-coef 0.1",
    "clip-0.3": "ppo_continuous.py --clip-coef 0.3",
    "fixed-3": "ppo_kl_penalty.py --kl-mode fixed --kl-coef 3",
    "adaptive-0.003": "ppo_kl_penalty.py --kl-target 0.003",
    "adaptive-0.03": "ppo_kl_penalty.py --kl-target 0.03",
    "fixed-0.3": "ppo_kl_penalty.py --kl-mode fixed --kl-coef 0.3",
    "fixed-10": "ppo_kl_penalty.py --kl-mode fixed --kl-coef 10",
}
UNCLIPPED_TASKS = ("unclipped:UnclippedHalfCheetah", "unclipped:UnclippedReacher")


def paper_study(objective: str, flags: str, seeds: int, tasks=PAPER_TASKS) -> list[tuple]:
    """The paper's hyper-parameters, where they are not the defaults, on its tasks."""
    script, _, chosen = objective.partition(" ")
    flags = f"{chosen} --num-envs 1 --num-steps 2048 {flags}".strip()
    flags += " --no-clip-vloss" if script == "ppo_continuous.py" else ""
    return [(script, f"{task}-v5", seeds, flags) for task in tasks]


CLEANRL_SCRIPT = "cleanrl/ppo_continuous_action.py"

PENDULUM_RECIPE = "--total-timesteps 200000 --gamma 0.95 --learning-rate 1e-3 --no-clip-vloss"
PONG_SOLVED = (
    "--background 87 --total-timesteps 1100000 --target-return 19.5 --num-envs 16"
    " --num-minibatches 8 --update-epochs 8 --target-kl 0.015 --learning-rate 1e-3 --gamma 0.98"
    " --gae-lambda 0.9 --ent-coef 0.001 --no-norm-adv --no-clip-vloss"
)
PONG_ANNEALED = PONG_SOLVED.replace("--ent-coef 0.001", "--ent-coef 0.003 --anneal-ent")
PONG_RECIPE = "--num-envs 16 --learning-rate 5e-4 --num-minibatches 16 --no-clip-vloss"

# study: (script, environment, number of seeds, flags, and processes of torchrun if several)
STUDIES = (
    {
        "mujoco": [
            ("ppo_continuous.py", f"{task}-v5", SEEDS.get(task, 5), "") for task in MUJOCO_TASKS
        ]
        + [("ppo_kl_penalty.py", "Hopper-v5", 3, "--total-timesteps 1000000")],
        "cleanrl": [  # cannot resume; beside `mujoco`
            (CLEANRL_SCRIPT, f"{task}-v4", 5, "--total-timesteps 1000000 --no-cuda")
            for task in ("HalfCheetah", "Hopper", "Walker2d")
        ],
        "mujoco-v4": [  # the same tasks as CleanRL's, on the versions named in benchmark/README.md
            ("ppo_continuous.py", f"{task}-v4", 10, "")
            for task in ("HalfCheetah", "Hopper", "Walker2d")
        ],
        "classic": [
            ("ppo_continuous.py", "BipedalWalker-v3", 5, "--total-timesteps 2000000 --gamma 0.995"),
            ("ppo_continuous.py", "Pendulum-v1", 5, PENDULUM_RECIPE),
            ("ppo_kl_penalty.py", "LunarLander-v3", 5, "--total-timesteps 1000000 --gamma 0.995"),
            ("ppo_kl_penalty.py", "CartPole-v1", 5, "--total-timesteps 200000"),
            ("ppo_continuous.py", "CartPole-v1", 5, speed.CARTPOLE),
        ],
        "eager": [  # beside the same runs of `mujoco`
            ("ppo_continuous.py", f"{task}-v5", SEEDS.get(task, 5), "--no-compile")
            for task in ("HalfCheetah", "Hopper")
        ],
        "rewritten": [  # the same again after the scripts were rewritten; the clipped one elsewhere
            *(("ppo_continuous.py", f"{task}-v5", 10, "") for task in MUJOCO_TASKS),
            ("ppo_continuous.py", "CartPole-v1", 5, "--total-timesteps 200000"),
            ("ppo_continuous.py", "LunarLander-v3", 3, "--total-timesteps 1000000 --gamma 0.995"),
        ],
        "atari": [
            ("ppo_atari.py", f"{game}NoFrameskip-v4", 3, "")
            for game in ("Breakout", "Pong", "BeamRider")
        ],
    }
    | {
        "details/random": paper_study(  # the zero of the scores, beside that of `paper`
            "ppo_continuous.py", "--total-timesteps 50000 --learning-rate 0", 1, ("Ant",)
        ),
    }
    | {  # beside the same runs of `mujoco` and `rewritten`
        f"details/{name}": [
            ("benchmark/details.py", f"{task}-v5", 5, f"--detail {name} {detail.flags}")
            for task in DETAIL_TASKS
        ]
        for name, detail in DETAILS.items()
    }
    | {
        "details-atari/defaults": [
            ("ppo_atari.py", f"{game}NoFrameskip-v4", 3, "--total-timesteps 2000000")
            for game in dict.fromkeys(detail.game for detail in ATARI_DETAILS.values())
        ],
    }
    | {
        f"details-atari/{name}": [
            (
                "benchmark/details.py",
                f"{detail.game}NoFrameskip-v4",
                3,
                f"--detail {name} --total-timesteps 2000000 {detail.flags}",
            )
        ]
        for name, detail in ATARI_DETAILS.items()
    }
    | {
        "pong/solved": [("ppo_atari.py", "PongNoFrameskip-v4", 5, PONG_SOLVED)],
        "pong/anneal-ent": [("ppo_atari.py", "PongNoFrameskip-v4", 5, PONG_ANNEALED)],
    }
    | {
        f"pong/{name}": [
            (
                "ppo_atari.py",
                "PongNoFrameskip-v4",
                3,
                f"{PONG_RECIPE} --total-timesteps 1500160 --precision {how}",
            )
        ]
        for name, how in {"bf16": "bf16", "fp32": "fp32", "fp32-eager": "fp32 --no-compile"}.items()
    }
    | {
        f"torchrun/processes={processes}": [
            ("ppo_continuous.py", "Hopper-v5", 8, "--total-timesteps 300000", processes),
        ]
        for processes in (1, 2)
    }
    | {
        f"torchrun-pong/processes={processes}": [
            (
                "ppo_atari.py",
                "PongNoFrameskip-v4",
                3,
                f"{PONG_RECIPE} --total-timesteps 299008 --no-anneal-lr",
                processes,
            ),
        ]
        for processes in (1, 2)
    }
    | {
        "paper/random": paper_study(
            "ppo_continuous.py", "--total-timesteps 50000 --learning-rate 0", 1
        ),
    }
    | {
        f"paper/{name}": paper_study(objective, "--total-timesteps 1000000 --no-anneal-lr", 3)
        for name, objective in PAPER_OBJECTIVES.items()
    }
    | {
        "unclipped": paper_study(  # beside the same runs of paper/none
            PAPER_OBJECTIVES["none"],
            "--total-timesteps 1000000 --no-anneal-lr",
            3,
            UNCLIPPED_TASKS,
        ),
        "unclipped/random": paper_study(
            "ppo_continuous.py", "--total-timesteps 50000 --learning-rate 0", 1, UNCLIPPED_TASKS
        ),
    }
)


@dataclass(frozen=True)
class Run:
    study: str
    script: str
    env_id: str
    seed: int
    flags: str
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{re.sub('[/:]', '-', self.env_id)}__{Path(self.script).stem}__{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / self.study / f"{self.name}.json"


def attempt(run: Run, *how) -> str | None:
    """Returns what went wrong, if anything, so that the other runs go on."""
    try:
        execute(run, *how)
    except Exception as error:
        return f"{run.study}, {run.name}: {error}"


def execute(run: Run, threads: int, baseline: str, cleanrl: Path) -> None:
    """Trains, unless that was done before, and writes the summary."""
    if run.result.exists():
        return
    run_dir = ROOT / "runs" / f"{run.study.replace('/', '-')}__{run.name}"
    arguments = f"{run.script} --env-id {run.env_id} --seed {run.seed} {run.flags}".strip()
    command, launcher, folder = f"python {arguments}", [sys.executable], ROOT
    words = [*shlex.split(arguments), "--run-name", run_dir.name, "--resume"]
    if run.processes > 1:
        flags = f"--standalone --nproc-per-node={run.processes}"
        command = f"torchrun {flags} {arguments}"
        launcher += ["-m", "torch.distributed.run", *flags.split()]
    if run.script == CLEANRL_SCRIPT:
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        about = describe_cleanrl(run, baseline, cleanrl)
        launcher, folder, words = (
            [baseline],
            run_dir,
            [cleanrl / run.script, *shlex.split(arguments)[1:]],
        )
    surroundings = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    surroundings["PYTHONPATH"] = str(ROOT / "benchmark")  # of unclipped.py
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with STARTING:
        if STOPPING.is_set():
            return
        print(command, flush=True)
        process = subprocess.Popen(
            [*launcher, *words], cwd=folder, env=os.environ | surroundings, **pipes
        )
        RUNNING.add(process)
    _, errors = process.communicate()
    RUNNING.discard(process)
    diverged = "became NaN" in errors  # a result as well: that of the episodes before
    if process.returncode and not diverged:
        raise RuntimeError(f"{command}\n{errors}")
    if run.script == CLEANRL_SCRIPT:
        summary = summarize(command, episodes_in_tensorboard(run_dir), about)
    else:
        about = {"script": run.script, "processes": run.processes}
        about |= json.loads((run_dir / "args.json").read_text())
        about |= {"diverged": errors.strip()} if diverged else {}
        summary = summarize(command, episodes_in_csv(run_dir), about)
    write(run, summary, threads)


def write(run: Run, summary: dict, threads: int) -> None:
    machine = f"{platform.platform()}, {os.cpu_count()} cores, {threads} threads"
    summary |= {"machine": machine, "processor": speed.processor()}
    run.result.parent.mkdir(parents=True, exist_ok=True)
    part = run.result.with_suffix(".tmp")  # a full disk leaves no half of a summary
    part.write_text(json.dumps(summary) + "\n")
    part.replace(run.result)
    print(f"{run.result.relative_to(ROOT)} written", flush=True)


def episodes_in_csv(run_dir: Path) -> list[tuple[int, float, float]]:
    """(global_step, wall_time, return), the time in seconds since 1970."""
    with open(run_dir / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["global_step"]), float(row["wall_time"]), float(row["return"])) for row in rows
    ]


def episodes_in_tensorboard(folder: Path) -> list[tuple[int, float, float]]:
    (events,) = folder.glob("runs/*/events.out.tfevents.*")
    reader = EventAccumulator(str(events), {"scalars": 0}).Reload()
    return [(x.step, x.wall_time, x.value) for x in reader.Scalars("charts/episodic_return")]


def describe_cleanrl(run: Run, baseline: str, cleanrl: Path) -> dict[str, object]:
    """What our scripts write to args.json."""
    packages = ("torch", "gymnasium", "mujoco", "numpy")
    code = f"from importlib.metadata import version; print(*map(version, {packages}))"
    versions = subprocess.check_output([baseline, "-c", code], text=True).split()
    commit = subprocess.check_output(["git", "-C", cleanrl, "rev-parse", "HEAD"], text=True).strip()
    steps = re.search(r"--total-timesteps (\d+)", run.flags)
    return {
        "script": "CleanRL",
        "args": {"env_id": run.env_id, "seed": run.seed, "total_timesteps": int(steps[1])},
        "versions": dict(zip(packages, versions, strict=True)),
        "git": commit,
    }


def stop(number: int, _) -> None:
    """Ends the runs as well: all but CleanRL's save themselves, and go on when started again."""
    STOPPING.set()
    with STARTING:
        for process in [*RUNNING]:
            process.send_signal(number)
    sys.exit(128 + number)


def summarize(
    command: str, episodes: list[tuple[int, float, float]], about: dict, points: int = 100
) -> dict:
    """The run in short: how it was made, its last 100 episodes, and `points` of its learning curve.

    `wall_time` is from the end of the first episode to that of the last one, pauses included.
    """
    steps, times, returns = zip(*episodes, strict=True)
    curve, every = [], max(1, len(episodes) // points)
    for i in [*range(0, len(episodes) - 1, every), len(episodes) - 1]:
        last = returns[max(0, i - 99) : i + 1]
        curve.append([steps[i], round(sum(last) / len(last), 3)])
    return {
        "command": command,
        "final_mean_return": round(sum(returns[-100:]) / len(returns[-100:]), 2),
        "episodes": len(episodes),
        "global_step": steps[-1],
        "wall_time": round(times[-1] - times[0], 2),
        **about,
        "curve_columns": ["global_step", "mean return of the last 100 episodes"],
        "curve": curve,
    }


def main(
    studies: tuple[str, ...],
    /,
    workers: int = os.cpu_count() or 1,
    threads: int = 1,
    seeds: int | None = None,
    envs: tuple[str, ...] = (),
    rounds: int = 5,
    baseline: str = sys.executable,
    cleanrl: str = "cleanrl",
    envpool: str | None = None,
    sb3: str | None = None,
    sbx: str | None = None,
    lean: str | None = None,
    leanrl: str = "leanrl",
) -> None:
    """Train every run of some studies that has no result yet.

    Args:
        studies: their names; paper, the paper's Table 1; all; or speed, beside CleanRL's.
        workers: runs at a time.
        threads: of each run; ppo_atari.py alone uses more than one.
        seeds: at most so many of each, where time does not suffice for all.
        envs: only these environments, where time does not suffice for all.
        rounds: of the speed measurement, each with one run of every side.
        baseline: Python interpreter for CleanRL, with its packages; of `speed` and `cleanrl`.
        cleanrl: a checkout of CleanRL.
        envpool: Python interpreter for CleanRL's EnvPool script; without, it is left out.
        sb3: Python interpreter for Stable-Baselines3; without, it is left out.
        sbx: Python interpreter for SBX; without, it is left out.
        lean: Python interpreter for LeanRL; without, it is left out.
        leanrl: a checkout of LeanRL.
    """
    if studies == ("speed",):
        checkouts = {"cleanrl": str(Path(cleanrl).resolve()), "leanrl": str(Path(leanrl).resolve())}
        interpreters = {"baseline": baseline, "envpool": envpool, "sb3": sb3, "sbx": sbx}
        interpreters |= {"lean": lean}
        return speed.main(
            rounds, checkouts, {name: path for name, path in interpreters.items() if path}
        )
    families = {name: {name, name.partition("/")[0], "all"} for name in STUDIES}
    unknown = set(studies) - set().union(*families.values())
    if unknown or not studies:
        names = ", ".join([*STUDIES, "paper", "details", "all and speed"])
        sys.exit(f"error: no study {', '.join(sorted(unknown)) or 'given'}; there are {names}")
    runs = [
        Run(name, script, env_id, seed, flags, *processes)
        for name, family in families.items()
        if family & set(studies)
        for script, env_id, most, flags, *processes in STUDIES[name]
        for seed in range(1, min(most, seeds or most) + 1)
        if not envs or env_id in envs
    ]
    runs.sort(key=lambda run: run.seed)  # stopped early, every study has some of its seeds
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(
            lambda run: attempt(run, threads, baseline, Path(cleanrl).resolve()), runs
        )
        failures = [failure for failure in results if failure]
    if failures:
        sys.exit("\n".join(["these runs failed:", *failures]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    tyro.cli(main)
