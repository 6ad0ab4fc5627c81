"""Two processes learn what one would; under torchrun they write one run, stop together and come back."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from fakes import (
    ATARI,
    CONTINUOUS,
    KL_BOX,
    KL_CASES,
    KL_DISCRETE,
    MLP_CASES,
    SCRIPTS,
    Case,
    make_agent,
    make_args,
    make_rollout,
    over_scripts,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("KILLS", "2"))  # more of them by hand: KILLS=10 pytest -s -k sigkill
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")

# Episodes of 13 steps, as those of the pictures below.
gym.register("TinyPendulum-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=13)


# ---- the same work in one process and in two ----

LEARNING = {"update_epochs": 4, "learning_rate": 1e-3}


class Orders:
    """In place of torch.randperm(): minibatches of one process are those of two processes put together."""

    def __init__(self, args):
        self.steps, self.envs, self.minibatches = args.num_steps, args.num_envs // 2, args.num_minibatches
        self.count, self.randperm = 0, torch.randperm

    def rows(self, rank: int) -> torch.Tensor:  # of the part of one of two processes
        generator = torch.Generator().manual_seed(2 * self.count + rank)
        return self.randperm(self.steps * self.envs, generator=generator)

    def __call__(self, number: int, device=None) -> torch.Tensor:
        self.count += 1
        parts = [self.rows(rank) for rank in range(2)]
        if "RANK" in os.environ:
            order = parts[int(os.environ["RANK"])]
        else:
            parts = [
                part // self.envs * 2 * self.envs + rank * self.envs + part % self.envs
                for rank, part in enumerate(parts)
            ]
            order = torch.cat([part.view(self.minibatches, -1) for part in parts], dim=1).flatten()
        assert len(order) == number
        return order


def share(script: ModuleType, rollout):
    """The environments of this process."""
    number = rollout.rewards.shape[1] // script.world_size()
    first = script.rank() * number
    return script.Rollout(*(x[:, first : first + number].contiguous() for x in rollout))


def learn(case: Case, changes: dict, folder: Path) -> dict:
    """Two updates with the same data in any number of processes, and what came of them."""
    script = case.script
    args = make_args(script, num_envs=4, ent_coef=0.01, **LEARNING | changes)
    agent, actor = make_agent(case), make_agent(case)
    optimizer = script.make_optimizer(agent, args)
    metrics, epochs, own_kls, own_whole_kls = [], [], [], []

    def gradient(*inputs):
        vector, measured = script.minibatch_gradient(*inputs)
        own_kls.append(measured["losses/approx_kl"].item())
        return vector, measured

    def exact_kl(*policies):
        own_whole_kls.append(original(*policies))
        return own_whole_kls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", Orders(args))
        if case in KL_CASES:
            original = script.exact_kl
            patch.setattr(script, "exact_kl", exact_kl)
        for iteration in range(2):
            rollout = make_rollout(case, actor, args, seed=iteration)
            rollout.logprobs[:, 2:] += 0.3 * torch.randn(args.num_steps, 2)  # the second process is ahead
            shared, before = share(script, rollout), len(own_kls)
            metrics.append(script.update(agent, optimizer, shared, args, gradient))
            epochs.append((len(own_kls) - before) // args.num_minibatches)
    (state,) = optimizer.state_dict()["state"].values()
    return {
        "parameters": torch.cat([p.detach().flatten() for p in agent.parameters()]),
        "moments": state["exp_avg"],
        "buffers": {name: buffer.clone() for name, buffer in agent.named_buffers()},
        "metrics": metrics,
        "epochs": epochs,
        "kl_coef": optimizer.param_groups[0].get("kl_coef"),
        "own_kls": own_kls[args.num_minibatches - 1 :: args.num_minibatches],  # at the end of epochs
        "own_whole_kl": own_whole_kls[-1].mean().item() if own_whole_kls else None,
    }


def play(script: ModuleType, env_id: str, folder: Path) -> dict:
    """Two rollouts with the same actions in any number of processes."""
    args = script.Args(env_id=env_id, num_envs=4, num_steps=20, num_minibatches=1, total_timesteps=80, seed=5)
    number = args.num_envs // script.world_size()
    with pytest.MonkeyPatch.context() as patch:
        if script is ppo_atari:
            options = script.game_options(env_id) | {"max_num_frames_per_episode": 52}
            patch.setattr(script, "game_options", lambda _: options)
        envs = script.Envs(args, number, [args.seed, 0])
        mine = slice(script.rank() * number, (script.rank() + 1) * number)
        random = np.random.default_rng(0)
        shape, space = (2 * args.num_steps, args.num_envs), envs.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = random.integers(int(space.n), size=shape)
        else:
            actions = random.normal(size=(*shape, *space.shape)).astype(np.float32)
        obs, rewards, dones, scaled, stats, steps, rounds = [envs.reset()], [], [], [], [], [], []
        for t, action in enumerate(actions):
            step = envs.step(action[mine])
            obs.append(step.obs)
            rewards.append(step.rewards)
            dones.append(step.dones)
            steps.append(envs.num_steps)
            if (t + 1) % args.num_steps == 0:
                rollout = [np.stack(x[-args.num_steps :]) for x in (rewards, dones)]
                scaled.append(rollout[0] if script is ppo_atari else envs.scale(*rollout))
                stats.append([float(x) for x in getattr(envs, "return_stats", [])])
                rounds.append(script.gather(envs.finished))
                envs.finished.clear()
        seeds, state = [int(seed) for seed in envs.seeds], envs.state_dict()
        envs.close()
    obs, rewards = torch.from_numpy(np.stack(obs).copy()), torch.from_numpy(np.stack(rewards))
    found = {"seeds": seeds, "obs": obs, "rewards": rewards, "stats": stats, "steps": steps}
    return found | {"scaled": torch.from_numpy(np.concatenate(scaled)), "finished": rounds, "state": state}


VARIANTS = [
    (MLP_CASES, "short", {"max_grad_norm": 0.02}),
    (MLP_CASES, "long", {"max_grad_norm": 1e6}),
    ([ATARI], "short", {"max_grad_norm": 0.02, "learning_rate": 3e-5}),  # larger steps would be chaotic
    ([ATARI], "long", {"max_grad_norm": 1e6, "learning_rate": 3e-5}),
    ([ATARI], "target", {"target_kl": 0.06, "update_epochs": 6, "learning_rate": 3e-5}),
    ([CONTINUOUS], "target", {"target_kl": 0.0275, "update_epochs": 6}),
    (KL_CASES, "larger", {"kl_target": 1e-6}),
    (KL_CASES, "smaller", {"kl_target": 1e3}),
    ([KL_BOX], "kept", {"kl_target": 0.0085}),  # one process alone would find its KL too large
    ([KL_DISCRETE], "kept", {"kl_target": 0.0026}),
]
UPDATES = {f"{case.name}-{name}": (case, changes) for cases, name, changes in VARIANTS for case in cases}
FACTORS = {"larger": 4.0, "smaller": 0.25, "kept": 2.0}  # by which β changes in two updates
ENV_IDS = {
    ppo_atari: "BreakoutNoFrameskip-v4",
    ppo_continuous: "TinyPendulum-v0",
    ppo_kl_penalty: "CartPole-v1",
}
# Five iterations, with ends of episodes.
SMALL = {"num_minibatches": 2, "update_epochs": 2, "device": "cpu", "seed": 3, "compile": False}
RUNS = {
    ppo_atari: {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 2, "num_steps": 50},
    ppo_continuous: {"env_id": "Pendulum-v1", "num_envs": 4, "num_steps": 50},
    ppo_kl_penalty: {"env_id": "CartPole-v1", "num_envs": 4, "num_steps": 20},
}


def run_args(script: ModuleType, iterations: int = 5, **changes):
    batch = RUNS[script]["num_envs"] * RUNS[script]["num_steps"]
    total = {"total_timesteps": batch * iterations + 1}  # rounded down
    return script.Args(**SMALL | RUNS[script] | total | changes)


def train_in(folder: Path, args) -> dict:
    """train() in this process, in a folder; the agent in memory at the end, and the first actions."""
    script, agents, rollouts = sys.modules[type(args).__module__], [], []
    make_agent, collect_rollout = script.make_agent, script.collect_rollout

    def remember(known: list, made):
        known.append(made)
        return made

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "make_agent", lambda *inputs: remember(agents, make_agent(*inputs)))
        patch.setattr(script, "collect_rollout", lambda *inputs: remember(rollouts, collect_rollout(*inputs)))
        mean_return = script.train(args)
    actions = rollouts[0][0].actions
    agent = {name: value.clone() for name, value in agents[0].state_dict().items()}
    return {"agent": agent, "actions": actions.clone(), "mean_return": mean_return}


def train_again(script: ModuleType, folder: Path) -> dict:
    return train_in(folder / script.__name__, run_args(script, run_name="again"))


def resume_alone(script: ModuleType, folder: Path) -> dict:
    """In more processes than the run was begun with."""
    return train_in(folder / script.__name__, run_args(script, iterations=7, run_name="alone", resume=True))


BOTH: dict[str, Callable] = {
    **{f"update {name}": partial(learn, *what) for name, what in UPDATES.items()},
    **{f"play {script.__name__}": partial(play, script, env_id) for script, env_id in ENV_IDS.items()},
}
TOGETHER: dict[str, Callable] = {
    **{f"train {script.__name__}": partial(train_again, script) for script in SCRIPTS},
    **{f"resume {script.__name__}": partial(resume_alone, script) for script in SCRIPTS},
}


def work(rank: int, folder: Path, ports: list[int]) -> None:
    """One of two processes: does everything, and writes down what came of it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    torch.set_num_threads(1)
    results = {}
    for port, (name, job) in zip(ports, (BOTH | TOGETHER).items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            if name in BOTH:
                distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
            results[name] = job(folder)
        except Exception:
            results[name] = traceback.format_exc()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        torch.save(results, folder / f"results-{rank}.pt")


class Results(NamedTuple):
    """What the first and the second of two processes found, and one alone; the runs are in `folder`."""

    folder: Path
    two: list[dict]
    one: dict

    def __call__(self, name: str) -> tuple[list[dict], dict | None]:
        two = [found.get(name, "it has not come so far") for found in self.two]
        for rank, result in enumerate(two):
            assert isinstance(result, dict), f"process {rank}: {result}"
        return two, self.one.get(name)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("two")
    for script in SCRIPTS:
        train_in(folder / script.__name__, run_args(script, iterations=3, run_name="alone"))
    spawn = torch.multiprocessing.get_context("spawn")
    open_store = partial(distributed.TCPStore, "127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [open_store() for _ in BOTH | TOGETHER]  # as torchrun has one, for the processes to meet
    inputs = folder, [store.port for store in stores]
    processes = [spawn.Process(target=work, args=(rank, *inputs), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    one = {name: job(folder) for name, job in BOTH.items()}
    deadline = time.monotonic() + 200.0
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    paths = [folder / f"results-{rank}.pt" for rank in range(2)]
    return Results(folder, [torch.load(path) if path.exists() else {} for path in paths], one)


over_updates = pytest.mark.parametrize("update", UPDATES)


@over_updates
def test_an_update_of_two_processes_is_that_of_one(update, results):
    two, one = results(f"update {update}")
    for found in two:
        for name in ("parameters", "buffers"):
            torch.testing.assert_close(found[name], one[name], rtol=1e-4, atol=2e-6, msg=name)
        scale = one["moments"].abs().max().item()  # they show the length of a gradient, the step does not
        torch.testing.assert_close(found["moments"], one["moments"], rtol=1e-3, atol=1e-5 * scale)
        assert found["epochs"] == one["epochs"]
        assert found["kl_coef"] == one["kl_coef"]
        for mine, expected in zip(found["metrics"], one["metrics"], strict=True):
            assert mine == pytest.approx(expected, rel=2e-4, abs=2e-6)
    first, second = two  # exactly, or they would drift apart
    assert torch.equal(first["parameters"], second["parameters"])
    assert all(torch.equal(first["buffers"][name], second["buffers"][name]) for name in first["buffers"])
    assert first["metrics"] == second["metrics"] and first["kl_coef"] == second["kl_coef"]


@over_updates
def test_the_updates_differ_as_they_should(update, results):
    """Or the test above would compare what is the same anyway."""
    (first, second), one = results(f"update {update}")
    assert first["own_kls"] != second["own_kls"]
    _, changes = UPDATES[update]
    norms = [metrics["losses/grad_norm"] for metrics in one["metrics"]]
    if "max_grad_norm" in changes:
        assert all((norm > changes["max_grad_norm"]) == update.endswith("short") for norm in norms)
    if "target_kl" in changes:
        assert 1 < one["epochs"][0] < changes["update_epochs"]
        pairs = zip(first["own_kls"], second["own_kls"], strict=True)
        assert any((x > changes["target_kl"]) != (y > changes["target_kl"]) for x, y in pairs)
    if "kl_target" in changes:
        assert one["kl_coef"] == FACTORS[update.rpartition("-")[2]]
    if update.endswith("kept"):
        assert one["metrics"][1]["losses/kl"] < 1.5 * changes["kl_target"] < second["own_whole_kl"]


@over_scripts(SCRIPTS)
def test_environments_of_two_processes_are_those_of_one(script, results):
    two, one = results(f"play {script.__name__}")
    assert [seed for found in two for seed in found["seeds"]] == one["seeds"]
    assert len(set(one["seeds"])) == 4
    for name in ("obs", "rewards"):
        assert torch.equal(torch.cat([found[name] for found in two], dim=1), one[name]), name
    torch.testing.assert_close(torch.cat([found["scaled"] for found in two], dim=1), one["scaled"])
    for found in two:
        assert found["steps"] == one["steps"] == [4 * (t + 1) for t in range(40)]
        assert found["state"]["num_steps"] == one["state"]["num_steps"]
        assert [sorted(episodes) for episodes in found["finished"]] == one["finished"]
        for stats, expected in zip(found["stats"], one["stats"], strict=True):
            assert stats == pytest.approx(expected, rel=1e-9)
    assert two[0]["stats"] == two[1]["stats"]
    ends = [end for episodes in one["finished"] for end, *_ in episodes]
    assert len(ends) > 8 and ends == sorted(set(ends))
    if script is not ppo_atari:
        assert [count for count, *_ in one["stats"]] == [80.0, 160.0]


# ---- runs ----


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def options(args) -> list[str]:
    """The same as a command line."""
    words, default = [], type(args)()
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"] if value != getattr(default, name) else []
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


class Job:
    """A script under torchrun, which writes to `folder` and has its temporary files in `temporary`."""

    def __init__(self, script: ModuleType, folder: Path, *argv: str, restarts: int = 0):
        self.folder, self.temporary = folder / "here", folder / "temporary"
        for path in (self.folder, self.temporary):
            path.mkdir(exist_ok=True)
        self.logs = [folder / "out", folder / "err"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, f"--max-restarts={restarts}", str(ROOT / f"{script.__name__}.py"), *argv]
        environment = os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        with open(self.logs[0], "wb") as out, open(self.logs[1], "wb") as err:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def out(self) -> str:
        return self.logs[0].read_text()

    def wait(self, seconds: float = 120.0) -> Outcome:
        return Outcome(self.process.wait(seconds), *(path.read_text() for path in self.logs))

    def workers(self) -> dict[int, int]:
        """The process id of each rank that runs."""
        found = {}
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, path.read_text().split()):
                with suppress(OSError):  # it may be gone by now
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    ranks = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
                    found |= dict.fromkeys(ranks, pid)
        return found

    def kill(self) -> None:  # where a test has failed before the end
        workers = self.workers() if self.process.poll() is None else {}
        self.process.kill()
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def torchrun(tmp_path):
    with ended_jobs(tmp_path) as start:
        yield start


@contextmanager
def ended_jobs(folder: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start(script: ModuleType, *argv: str, restarts: int = 0) -> Job:
        jobs.append(Job(script, folder, *argv, restarts=restarts))
        return jobs[-1]

    try:
        yield start
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.kill()
            job.process.wait()


def wait_for(condition: Callable, job: Job, seconds: float = 120.0):
    """What the condition returns once that is true, while the job runs."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert job.process.poll() is None, job.wait()
        assert time.monotonic() < deadline, job.logs
        time.sleep(0.01)
    return value


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def iteration_of(run: Path) -> int:
    path = run / "checkpoints" / "last.pt"
    return load(path)["iteration"] if path.exists() else 0


def episodes(run: Path) -> list[tuple[int, float, int]]:
    with open(run / "episodes.csv", newline="") as file:
        rows = csv.DictReader(file)
        return [(int(row["global_step"]), float(row["return"]), int(row["length"])) for row in rows]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point, by TensorBoard's own reader."""
    reader = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def assert_complete(run: Path, batch: int, iterations: int) -> None:
    """Every iteration was logged once, and nothing twice."""
    steps = [step for step, *_ in episodes(run)]
    assert steps and all(a < b for a, b in itertools.pairwise(steps))
    assert 0 < steps[0] and steps[-1] <= batch * iterations
    points = scalars(run)
    assert {"losses/policy_loss", "charts/SPS", "charts/episodic_return"} <= points.keys()
    for tag, values in points.items():
        expected = steps if "episodic" in tag else [batch * (i + 1) for i in range(iterations)]
        assert [step for step, _ in values] == expected, tag
    checkpoint = load(run / "checkpoints" / "last.pt")
    assert checkpoint["iteration"] == iterations
    assert checkpoint["envs"]["num_steps"] == checkpoint["logger"]["step"] == batch * iterations
    if "return_stats" in checkpoint["envs"]:
        assert checkpoint["envs"]["return_stats"][0] == batch * iterations
        assert checkpoint["agent"]["normalize.count"] == batch * iterations


class Run(NamedTuple):
    """One that torchrun has made, from its beginning to its end."""

    script: ModuleType
    args: object
    job: Job
    outcome: Outcome

    @property
    def dir(self) -> Path:
        (run,) = (self.job.folder / "runs").iterdir()
        return run


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def run(request, tmp_path_factory) -> Run:
    script, args = request.param, run_args(request.param)
    with ended_jobs(tmp_path_factory.mktemp("run")) as start:
        job = start(script, *options(args))
        return Run(script, args, job, job.wait())


def test_one_run_is_written(run):
    assert run.outcome.status == 0, run.outcome.err
    names = {path.relative_to(run.dir).as_posix() for path in run.dir.rglob("*")}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names == {
        *("args.json", "episodes.csv", events),
        *("checkpoints", "checkpoints/last.pt", "checkpoints/best.pt"),
    }
    assert [path.name for path in run.job.folder.iterdir()] == ["runs"]
    assert [*run.job.temporary.rglob("args.json")] == []  # nor is one left elsewhere
    assert_complete(run.dir, run.args.batch_size, 5)
    about = json.loads((run.dir / "args.json").read_text())
    assert about["processes"] == 2
    assert about["args"]["num_envs"] == run.args.num_envs  # of all processes


def test_one_process_prints(run):
    first, *progress, last = run.outcome.out.splitlines()
    assert first.startswith("training on ") and last.startswith("µs per step: ")
    steps = [int(line.removeprefix("step ").partition(":")[0].replace(",", "")) for line in progress]
    assert steps == sorted(set(steps)) and steps[-1] == 5 * run.args.batch_size  # more where it is slow
    assert run.outcome.err == ""


def test_the_same_run_again_is_the_same_bit_by_bit(run, results):
    (first, second), _ = results(f"train {run.script.__name__}")
    agent = load(run.dir / "checkpoints" / "last.pt")["agent"]
    again = results.folder / run.script.__name__ / "runs" / "again"
    assert episodes(again) == episodes(run.dir)
    assert agent.keys() == first["agent"].keys()
    for name, value in agent.items():
        assert torch.equal(value, first["agent"][name]), name
        assert torch.equal(value, second["agent"][name]), name  # and that of the other process
    assert not torch.equal(first["actions"], second["actions"])  # they do not do the same twice
    assert first["mean_return"] == second["mean_return"]


def test_one_process_goes_on_with_the_run_of_two(run, tmp_path):
    shutil.copytree(run.dir, tmp_path / "runs" / "run")
    before = episodes(run.dir)
    later()
    train_in(tmp_path, run_args(run.script, iterations=7, run_name="run", resume=True))
    assert_complete(tmp_path / "runs" / "run", run.args.batch_size, 7)
    assert episodes(tmp_path / "runs" / "run")[: len(before)] == before
    assert json.loads((tmp_path / "runs" / "run" / "args.json").read_text())["processes"] == 1


@over_scripts(SCRIPTS)
def test_two_processes_go_on_with_the_run_of_one(script, results):
    (first, second), _ = results(f"resume {script.__name__}")
    folder = results.folder / script.__name__
    assert_complete(folder / "runs" / "alone", run_args(script).batch_size, 7)
    assert json.loads((folder / "runs" / "alone" / "args.json").read_text())["processes"] == 2
    agent = load(folder / "runs" / "alone" / "checkpoints" / "last.pt")["agent"]
    for name, value in agent.items():
        assert torch.equal(value, first["agent"][name]) and torch.equal(value, second["agent"][name]), name
    assert not torch.equal(first["actions"], second["actions"])
    assert {path.name for path in folder.iterdir()} == {"runs"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"alone", "again"}


def later() -> None:
    """TensorBoard sorts its files by the second they were begun in."""
    time.sleep(1.0)


# ---- refusals ----


@over_scripts(SCRIPTS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_envs": 3, "num_steps": 8, "num_minibatches": 4},
        {"num_envs": 2, "num_steps": 9, "num_minibatches": 2},
        {"num_envs": 1, "num_steps": 16, "num_minibatches": 4},
    ],
    ids=["environments", "minibatches", "fewer environments than processes"],
)
def test_what_cannot_be_shared_evenly_is_refused(script, sizes, monkeypatch):
    args = make_args(script, **sizes)  # one process takes it
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(script.ArgumentError) as refused:
        make_args(script, **sizes)
    message = str(refused.value)
    assert "2 processes" in message and len(message.splitlines()) == 1
    for name in ("num_envs", "num_minibatches"):
        assert f"--{name.replace('_', '-')} {getattr(args, name)} " in message
    make_args(script, num_envs=4, num_steps=8, num_minibatches=16)


@over_scripts(SCRIPTS)
def test_evaluation_in_two_processes_is_refused(script, results, monkeypatch, capsys):
    folder = results.folder / script.__name__
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(script.ArgumentError, match="--evaluate"):
        make_args(script, evaluate="runs/alone")
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--evaluate", "runs/alone"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: --evaluate ") and len(err.splitlines()) == 1 and out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_torchrun_ends_where_the_script_refuses(torchrun):
    job = torchrun(ppo_continuous, "--num-envs", "3", "--num-steps", "64")
    outcome = job.wait()
    assert outcome.status != 0 and outcome.out == ""
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert 1 <= len(errors) <= 2 and len(set(errors)) == 1  # torchrun may stop the second before its turn
    assert "2 processes" in errors[0] and "--num-envs 3 " in errors[0]
    assert 'ppo_continuous.py", line' not in outcome.err  # what has a traceback is torchrun
    assert [*job.folder.iterdir()] == []


# ---- signals ----


def test_sigterm_ends_a_job_with_the_iteration(torchrun):
    """The same one in both processes, and it is saved; one process goes on with it."""
    iterations, batch = 150, run_args(ppo_kl_penalty).batch_size
    changes = {"iterations": iterations, "run_name": "run", "checkpoint_interval": 1e6}
    job = torchrun(ppo_kl_penalty, *options(run_args(ppo_kl_penalty, **changes)))
    run = job.folder / "runs" / "run"
    wait_for(lambda: (run / "episodes.csv").exists() and len(episodes(run)) > 2, job)
    job.process.send_signal(signal.SIGTERM)
    outcome = job.wait(60.0)
    assert outcome.status != 0
    assert outcome.err.count("stopping once this iteration is done and saved") == 1
    assert 'ppo_kl_penalty.py", line' not in outcome.err
    done = iteration_of(run)
    assert 0 < done < iterations
    assert_complete(run, batch, done)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.pt", "last.pt"}
    assert [*job.folder.rglob("*.tmp")] == []
    later()
    train_in(job.folder, run_args(ppo_kl_penalty, **changes, resume=True))
    assert_complete(run, batch, iterations)


@over_scripts(SCRIPTS)
def test_what_torchrun_passes_on_is_no_second_signal(script, monkeypatch, capfd):
    """From a terminal, a signal may reach a process both directly and through torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with script.noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        handler = signal.getsignal(signal.SIGTERM)
        assert handler is signal.SIG_IGN  # or the next one would end this process
        os.kill(os.getpid(), signal.SIGTERM)
    assert noted == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- faults ----


@needs_proc
def test_a_job_ends_with_one_of_its_processes(torchrun):
    changes = {"iterations": 100_000, "run_name": "run", "checkpoint_interval": 0.0}
    job = torchrun(ppo_kl_penalty, *options(run_args(ppo_kl_penalty, **changes)))
    run = job.folder / "runs" / "run"
    wait_for(lambda: iteration_of(run) > 1, job)
    os.kill(job.workers()[1], signal.SIGKILL)
    outcome = job.wait(60.0)
    assert outcome.status != 0
    done = iteration_of(run)
    assert done > 1
    steps = [step for step, *_ in episodes(run)]
    assert steps and all(a < b for a, b in itertools.pairwise(steps))


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * KILLS)
def test_a_job_restarts_after_sigkill_at_any_moment(torchrun):
    """While it learns, and every third time while it starts."""
    iterations, moments = 40 + 30 * KILLS, random.Random(1)
    changes = {"iterations": iterations, "run_name": "run", "resume": True, "checkpoint_interval": 0.0}
    job = torchrun(ppo_kl_penalty, *options(run_args(ppo_kl_penalty, **changes)), restarts=KILLS)
    run, workers, killed = job.folder / "runs" / "run", {}, None
    seen, pauses = [], []

    def restarted() -> dict[int, int] | None:
        found = job.workers()
        return found if len(found) == 2 and not {*found.values()} & {*workers.values()} else None

    for number in range(KILLS + 1):
        workers = wait_for(restarted, job)
        if number % 3 != 1 or number == KILLS:
            reached = iteration_of(run)
            wait_for(lambda reached=reached: iteration_of(run) > reached, job)
            pauses += [] if killed is None else [time.monotonic() - killed]
        if number < KILLS:
            time.sleep(moments.uniform(0.0, 2.0 if number % 3 == 1 else 0.1))
            os.kill(workers[moments.randrange(2)], signal.SIGKILL)
            killed = time.monotonic()
            seen.append(iteration_of(run))
    outcome = job.wait()
    print(f"killed after iterations {seen} of {iterations}; seconds from a kill to the next one:", pauses)
    assert outcome.status == 0, outcome.err
    assert seen == sorted(seen) and 0 < seen[0] and seen[-1] < iterations
    assert_complete(run, run_args(ppo_kl_penalty).batch_size, iterations)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.pt", "last.pt"}


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("shared", ["True", "False", None])
def test_attempts_share_no_keys(script, monkeypatch, shared):
    """Torchruns of several machines count restarts separately: without a shared store there is no prefix."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if shared is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    store, started = distributed.HashStore(), {}
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(store, 0, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda **options: started.update(options))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with script.process_group():
        started["store"].set("address", "here")
    assert store.check(["3/address" if shared == "True" else "address"])


@over_scripts(SCRIPTS)
@pytest.mark.parametrize(("gpu", "nccl"), [(False, True), (True, True), (True, False)])
def test_gloo_for_a_cpu_and_nccl_for_a_gpu(script, monkeypatch, gpu, nccl):
    """Beside a GPU some tensors are still on the CPU; by itself torch would start NCCL alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: nccl)  # not on Windows
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(distributed.HashStore(), 0, 2)]))
    started = {}
    monkeypatch.setattr(distributed, "init_process_group", lambda **options: started.update(options))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with script.process_group():
        found = distributed.distributed_c10d.BackendConfig(distributed.Backend(started["backend"]))
    assert found.get_device_backend_map()["cpu"] == "gloo"
    assert found.get_device_backend_map()["cuda"] == ("nccl" if gpu and nccl else "gloo")


@over_scripts(SCRIPTS)
def test_what_other_processes_print_is_thrown_away(script, monkeypatch, capsys):
    """Also what the locale cannot encode."""
    monkeypatch.setattr(script, "rank", lambda: 1)
    monkeypatch.setattr(script, "open", partial(open, encoding="ascii"), raising=False)
    with script.process_group():
        print("µs per step")
    print("here")
    assert capsys.readouterr().out == "here\n"


@over_scripts(SCRIPTS)
def test_a_process_takes_the_gpu_of_its_own_machine(script, monkeypatch):
    def empty(*_, device):
        raise RuntimeError("none here")

    monkeypatch.setattr(torch, "empty", empty)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(script.ArgumentError, match="--device cuda:1: none here"):
        script.prepare(run_args(script, device="cuda", num_envs=4))
    monkeypatch.delenv("LOCAL_RANK")  # as where each machine has one process
    with pytest.raises(script.ArgumentError, match="--device cuda:0: none here"):
        script.prepare(run_args(script, device="cuda", num_envs=4))


@over_scripts(SCRIPTS)
def test_torchrun_has_no_means_for_apples_gpus(script, monkeypatch):
    def empty(*_, device):
        raise RuntimeError("none here")

    monkeypatch.setattr(torch, "empty", empty)
    for processes, message in (("1", "none here"), ("2", "torchrun has no means")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(script.ArgumentError, match=f"--device mps: {message}"):
            script.prepare(run_args(script, device="mps"))


@over_scripts(SCRIPTS)
def test_random_numbers_differ_between_processes_and_after_a_resume(script, monkeypatch):
    """Those of numpy and Python, from which environments may draw."""
    seen = set()
    for iteration, rank in ((0, 0), (3, 0), (0, 1), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        script.prepare(run_args(script), iteration)
        seen |= {random.random(), np.random.random()}
    assert len(seen) == 8


@over_scripts(SCRIPTS)
def test_the_second_process_has_noise_of_its_own_after_a_resume_as_well(script, tmp_path, monkeypatch):
    draws, noise = [], script.Agent.noise

    def remember(agent, *shape):
        draws.append(noise(agent, *shape))
        return draws[-1]

    monkeypatch.setattr(script.Agent, "noise", remember)
    train_in(tmp_path, run_args(script, iterations=1, run_name="run"))
    train_in(tmp_path, run_args(script, iterations=2, run_name="run", resume=True))
    monkeypatch.setenv("RANK", "1")
    for start in ({"iterations": 1, "run_name": "new"}, {"iterations": 3, "run_name": "run", "resume": True}):
        train_in(tmp_path, run_args(script, **start))
        train_in(tmp_path, run_args(script, **start))
    assert [draw.shape for draw in draws] == [draws[0].shape] * len(draws)
    first, second, new, new_again, resumed, resumed_again = draws
    assert torch.equal(new, new_again) and torch.equal(resumed, resumed_again)
    assert not any(torch.equal(x, y) for x, y in itertools.combinations((first, second, new, resumed), 2))


@over_scripts(SCRIPTS)
def test_the_second_process_stays_where_it_is(script, tmp_path, monkeypatch):
    """For environments that read files; what it writes of the run goes elsewhere, and away in the end."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda **_: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "init_wandb", lambda *_: pytest.fail("tracks"))
    monkeypatch.setattr(script, "evaluate", lambda *_: pytest.fail("records"))
    args = run_args(script, run_name="run", track=True, capture_video=True)
    with script.process_group(), closing(script.Logger(args)) as logger:
        checkpoints = script.Checkpoints(args, logger, agent=None)
        checkpoints.recorded = None
        checkpoints.record()
        assert Path.cwd() == tmp_path
        assert (logger.dir / "args.json").exists()
    assert not logger.dir.parent.exists() and [*tmp_path.iterdir()] == []


# ---- one process ----


@over_scripts(SCRIPTS)
def test_one_process_has_nothing_to_do_with_others(script, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("there are no others")

    for name in ("init_process_group", "destroy_process_group", "all_reduce", "all_gather_object", "barrier"):
        monkeypatch.setattr(distributed, name, fail)
    assert (script.world_size(), script.rank()) == (1, 0)
    x, items, args = (
        torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]),
        [3, 1, 2],
        run_args(script, iterations=1),
    )
    assert script.average(x) is x
    assert script.gather(items) == items
    mean, variance = script.moments(x, dim=1)
    torch.testing.assert_close(mean, x.mean(1, keepdim=True))
    torch.testing.assert_close(variance, x.var(1, correction=0, keepdim=True))
    with script.process_group():
        assert Path.cwd() != tmp_path
    train_in(tmp_path, args)
    assert len([*tmp_path.glob("runs/*/checkpoints/last.pt")]) == 1
