"""How training scales over processes of torchrun: a model from measured parts, runs to check it.

    python benchmark/scaling.py

An iteration of W processes takes as long as one process with 1/W of the environments, which is run
here alone, plus E·K all-reduces of the gradient (E epochs of K minibatches). These are measured
between processes of this machine: a latency per hop of the ring and a rate. What W processes really
take is measured for as many as there are cores. Medians over iterations, the first ones left out.
An idle machine is needed. The last column of the table is for W times the environments, so that
each process has as many as one had.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed, multiprocessing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "scaling"

# name: (command, environments, steps per iteration of each, epochs, minibatches, parameters)
TASKS = {
    "HalfCheetah": ("ppo_continuous.py --env-id HalfCheetah-v5", 64, 32, 10, 32, 11_085),
    "Pong": ("ppo_atari.py --env-id PongNoFrameskip-v4", 64, 16, 4, 4, 1_687_719),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
ITERATIONS, BURN_IN = 8, 3


def iteration_seconds(command: str, ranks: int, num_envs: int, num_steps: int) -> float:
    """Median time of an iteration, from the wall times that TensorBoard has of them."""
    sizes = f"--num-envs {num_envs} --num-steps {num_steps} --checkpoint-interval 60"
    total = f"--total-timesteps {ITERATIONS * num_envs * num_steps}"
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*start, str(ROOT / script), *flags, *sizes.split(), *total.split()],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (events,) = Path(folder).glob("runs/*/events.out.tfevents.*")
        points = EventAccumulator(str(events)).Reload().Scalars("losses/policy_loss")[BURN_IN - 1 :]
    return statistics.median(b.wall_time - a.wall_time for a, b in itertools.pairwise(points))


def time_all_reduce(rank: int, ranks: int, port: int, sizes: list[int], path: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    medians = []
    for size in sizes:
        vector, seconds = torch.zeros(size), []
        for _ in range(60):
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(vector)
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds[10:]))
    if rank == 0:
        Path(path).write_text(json.dumps(medians))
    distributed.destroy_process_group()


def all_reduce_seconds(sizes: list[int], ranks: int = 2) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "medians.json"))
        multiprocessing.spawn(time_all_reduce, (ranks, 29_511, sizes, path), nprocs=ranks)
        return json.loads(Path(path).read_text())


def predict(
    alone: float, ranks: int, reductions: int, parameters: int, latency: float, rate: float
) -> float:
    """Seconds of an iteration; a ring of W takes 2·(W - 1) hops, each with 1/W of the vector."""
    hops = 2 * (ranks - 1)
    return alone + reductions * hops * (latency + 4 * parameters / ranks / rate)


def measure() -> dict:
    sizes = [parameters for *_, parameters in TASKS.values()]
    small, large = all_reduce_seconds(sizes)  # two processes: 2 hops
    rate = (4 * sizes[1] - 4 * sizes[0]) / (
        large - small
    )  # bytes per second: half the vector, twice
    latency = small / 2 - 2 * sizes[0] / rate
    report = {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "all_reduce_seconds": dict(zip(map(str, sizes), (small, large), strict=True)),
        "latency": latency,
        "bytes_per_second": rate,
        "tasks": {},
    }
    for name, (command, num_envs, num_steps, epochs, minibatches, parameters) in TASKS.items():
        rows = report["tasks"][name] = {}
        for ranks in RANKS:
            single = num_envs // ranks * num_steps == minibatches  # one transition has no deviation
            extra = " --no-norm-adv" if single else ""
            alone = iteration_seconds(command + extra, 1, num_envs // ranks, num_steps)
            predicted = predict(alone, ranks, epochs * minibatches, parameters, latency, rate)
            rows[ranks] = {"alone": alone, "predicted": predicted}
            if 1 < ranks <= (os.cpu_count() or 1):
                rows[ranks]["measured"] = iteration_seconds(command, ranks, num_envs, num_steps)
            print(name, ranks, rows[ranks], flush=True)
    return report


def tabulate(report: dict) -> str:
    titles = ("task", "processes", "compute, ms", "predicted, ms", "measured, ms", "speed-up")
    rows = [f"| {' | '.join(titles)} | more environments |", "|---" * 7 + "|"]
    for name, lines in report["tasks"].items():
        one = lines[next(iter(lines))]["alone"]
        for ranks, row in lines.items():
            times = [
                f"{1e3 * row[key]:.0f}" if key in row else ""
                for key in ("alone", "predicted", "measured")
            ]
            sending = row["predicted"] - row["alone"]
            speedups = one / row["predicted"], int(ranks) * one / (one + sending)
            cells = (name, ranks, *times, *(f"{speedup:.1f}" for speedup in speedups))
            rows.append(f"| {' | '.join(map(str, cells))} |")
    sizes = ", ".join(
        f"{int(n):,}: {1e3 * t:.2f} ms" for n, t in report["all_reduce_seconds"].items()
    )
    return (
        "\n".join([*rows, "", f"All-reduce of float32 between two processes (Gloo): {sizes}."])
        + "\n"
    )


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "scaling.json"
    if not path.exists():
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    table = tabulate(json.loads(path.read_text()))
    (RESULTS / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
