"""What survives the end of a process, however it ends: checkpoints, resuming, signals, broken files."""

import csv
import errno
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from fakes import SCRIPTS, over_scripts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

KILLS = int(os.environ.get("KILLS", "20"))  # more of them by hand: KILLS=100 pytest -k sigkill

# 6 iterations of 40 steps in episodes of 10 to 20 steps; smaller networks for the pictures.
gym.register("BriefPendulum-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=13)
ENV_IDS = {
    ppo_atari: "BreakoutNoFrameskip-v4",
    ppo_continuous: "BriefPendulum-v0",
    ppo_kl_penalty: "CartPole-v1",
}
TINY = {"num_envs": 2, "num_steps": 20, "num_minibatches": 2, "update_epochs": 1, "device": "cpu", "seed": 3}
BATCH, STOPPED, ITERATIONS = 40, 3, 6
EPISODES = {"charts/episodic_return", "charts/episodic_length"}
KEYS = {"format", "script", "args", "iteration", "rng", "agent", "optimizer", "envs", "logger"}


def tiny_args(script: ModuleType, **changes):
    total = {"total_timesteps": ITERATIONS * BATCH + 1}  # rounded down
    return script.Args(**TINY | total | {"env_id": ENV_IDS[script], "run_name": "run"} | changes)


def options(args) -> list[str]:
    """The same as a command line."""
    default, words = type(args)(), []
    for name, value in asdict(args).items():
        if value != getattr(default, name):
            flag = name.replace("_", "-")
            words += (
                [f"--{'' if value else 'no-'}{flag}"]
                if isinstance(value, bool)
                else [f"--{flag}", str(value)]
            )
    return words


def small_cnn(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 2, 8, stride=12), nn.Flatten(), nn.Linear(98, 512), nn.ReLU())


def shorten_games(patch: pytest.MonkeyPatch) -> None:
    original = ppo_atari.game_options
    patch.setattr(ppo_atari, "game_options", lambda id: original(id) | {"max_num_frames_per_episode": 52})
    patch.setattr(ppo_atari, "nature_cnn", small_cnn)


def next_second() -> None:
    """TensorBoard sorts its files by the second they were begun in; in real life a start takes longer."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def last(folder: Path) -> dict:
    return load(folder / "runs" / "run" / "checkpoints" / "last.pt")


def best(folder: Path) -> dict:
    return load(folder / "runs" / "run" / "checkpoints" / "best.pt")


def same(a, b) -> bool:
    """Equal to the last bit, with NaN equal to itself."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every name below a folder, with what is in the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point, by TensorBoard's own reader."""
    reader = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def repeatable(run: Path) -> dict[str, list[tuple[int, float]]]:
    return {
        tag: points for tag, points in scalars(run).items() if not tag.startswith(("charts/SPS", "time/"))
    }


def episodes(run: Path) -> list[dict[str, float]]:
    with open(run / "episodes.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def without_time(run: Path) -> list[tuple[float, ...]]:
    return [(row["global_step"], row["return"], row["length"]) for row in episodes(run)]


class Stop(Exception):
    """Stands for the end of a test in the middle of train()."""


class Interrupted(NamedTuple):
    """A run that was stopped by SIGTERM in its third iteration of six."""

    script: ModuleType
    args: object
    folder: Path  # that has runs/run
    status: int
    agent: dict  # its weights and statistics in memory at the end
    seeds: list[int]  # of the environments
    handlers: list  # of signals, before and after


def capture(patch: pytest.MonkeyPatch, script: ModuleType) -> tuple[list, list]:
    """Lists to which train() will add its agents and environments."""
    agents, envs, make_agent, make_envs = [], [], script.make_agent, script.Envs

    def remember(known: list, made):
        known.append(made)
        return made

    patch.setattr(script, "make_agent", lambda *inputs: remember(agents, make_agent(*inputs)))
    patch.setattr(script, "Envs", lambda *inputs, **more: remember(envs, make_envs(*inputs, **more)))
    return agents, envs


def signal_in_update(patch: pytest.MonkeyPatch, script: ModuleType, iteration: int, number: int) -> None:
    update, calls = script.update, itertools.count(1)

    def interrupted(*inputs):
        if next(calls) == iteration:
            os.kill(os.getpid(), number)
        return update(*inputs)

    patch.setattr(script, "update", interrupted)


def handlers() -> list:
    return [signal.getsignal(number) for number in ppo_kl_penalty.stop_signals()]


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def stopped(request, tmp_path_factory) -> Interrupted:
    script, folder = request.param, tmp_path_factory.mktemp("stopped")
    args, before = tiny_args(script), handlers()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(folder)
        shorten_games(patch)
        agents, envs = capture(patch, script)
        signal_in_update(patch, script, STOPPED, signal.SIGTERM)
        next_second()
        script.train(args)
    agent = {name: value.clone() for name, value in agents[0].state_dict().items()}
    seeds = [int(seed) for seed in envs[0].seeds]
    return Interrupted(script, args, folder, stop.value.code, agent, seeds, [before, handlers()])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shorten_games(monkeypatch)
    return tmp_path


@pytest.fixture
def copied(stopped, here) -> Path:
    """A folder with a copy of the stopped run, to go on with."""
    shutil.copytree(stopped.folder, here, dirs_exist_ok=True)
    return here


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def command(here, monkeypatch, capfd):
    """A function that runs a command line in this process."""

    def run(script: ModuleType, *argv: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        capfd.readouterr()
        try:
            script.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capfd.readouterr())

    return run


def one_error(outcome: Outcome, status: int = 2) -> str:
    """The only line of an error."""
    assert outcome.status == status, outcome
    assert outcome.err.startswith("error: ") and outcome.err.endswith("\n"), outcome.err
    assert len(outcome.err.splitlines()) == 1, outcome.err
    return outcome.err


def stop_at_rollout(monkeypatch, script: ModuleType) -> None:
    def stop(*_):
        raise Stop

    monkeypatch.setattr(script, "collect_rollout", stop)


# ---- what a checkpoint holds ----


def assert_plain(value) -> None:
    assert type(value) in (dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor)
    if isinstance(value, dict):
        assert_plain(list(value))
        value = list(value.values())
    for inner in value if isinstance(value, list | tuple) else []:
        assert_plain(inner)


def test_files_of_a_run(stopped):
    names = [path.name for path in sorted((stopped.folder / "runs" / "run" / "checkpoints").iterdir())]
    assert names == ["best.pt", "last.pt"]
    for checkpoint in (last(stopped.folder), best(stopped.folder)):
        assert_plain(checkpoint)
        assert checkpoint.keys() == KEYS
        assert checkpoint["format"] == 3
        assert checkpoint["script"] == stopped.script.__name__
        assert checkpoint["args"] == asdict(stopped.args)
        assert (
            checkpoint["envs"]["num_steps"] == checkpoint["logger"]["step"] == checkpoint["iteration"] * BATCH
        )
    assert last(stopped.folder)["iteration"] == STOPPED
    assert 1 <= best(stopped.folder)["iteration"] <= STOPPED


def test_state_of_a_run(stopped):
    """As it was in memory and as it is in the other files."""
    checkpoint, run = last(stopped.folder), stopped.folder / "runs" / "run"
    assert same(checkpoint["agent"], OrderedDict(stopped.agent))
    moments = checkpoint["optimizer"]["state"]
    assert moments and all(state["exp_avg"].abs().max() > 0 for state in moments.values())
    assert all(state["step"] == STOPPED * 2 for state in moments.values())  # 2 minibatches, 1 epoch
    returns = [row["return"] for row in episodes(run)]
    assert returns and checkpoint["logger"]["returns"] == returns[-100:]
    assert checkpoint["logger"]["seconds"] >= episodes(run)[-1]["wall_time"] - 0.01
    if stopped.script is not ppo_atari:
        assert checkpoint["envs"]["return_stats"][0] == STOPPED * BATCH
        assert checkpoint["agent"]["normalize.count"] == STOPPED * BATCH
    if stopped.script is ppo_kl_penalty:
        assert checkpoint["optimizer"]["param_groups"][0]["kl_coef"] != stopped.args.kl_coef


# ---- going on ----


class Resumed(NamedTuple):
    rows: list
    scalars: dict
    agent: dict
    seeds: list[int]


@pytest.fixture(scope="module")
def resumed(stopped, tmp_path_factory) -> list[Resumed]:
    """The stopped run, gone on with to its end, twice."""
    results = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("resumed")
        shutil.copytree(stopped.folder, folder, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            shorten_games(patch)
            _, envs = capture(patch, stopped.script)
            next_second()
            stopped.script.train(replace(stopped.args, resume=True))
        run, checkpoint = folder / "runs" / "run", last(folder)
        assert checkpoint["iteration"] == ITERATIONS
        seeds = [int(seed) for seed in envs[0].seeds]
        results.append(Resumed(without_time(run), repeatable(run), checkpoint["agent"], seeds))
    return results


def test_resuming_repeats_bit_by_bit(stopped, resumed):
    first, again = resumed
    assert same(first.agent, again.agent) and not same(first.agent, OrderedDict(stopped.agent))
    assert first.scalars == again.scalars
    assert first.rows == again.rows
    assert first.seeds == again.seeds


def test_resuming_adds_to_what_was_there(stopped, resumed):
    before, after = stopped.folder / "runs" / "run", resumed[0]
    assert len(after.rows) > len(without_time(before)) > 0
    assert after.rows[: len(without_time(before))] == without_time(before)
    for tag, points in repeatable(before).items():
        assert after.scalars[tag][: len(points)] == points
        assert tag in EPISODES or [step for step, _ in points] == [BATCH * (i + 1) for i in range(STOPPED)]
    for tag, points in after.scalars.items():
        steps = [step for step, _ in points]
        assert all(a < b for a, b in itertools.pairwise(steps))
        assert tag in EPISODES or steps == [BATCH * (i + 1) for i in range(ITERATIONS)]


def test_seeds_after_resuming_are_new(stopped, resumed):
    """Or the environments would repeat the episodes of the beginning."""
    assert len(resumed[0].seeds) == len(stopped.seeds) == 2
    assert not {*resumed[0].seeds} & {*stopped.seeds}


def test_learning_rate_and_penalty_go_on(stopped, resumed):
    rates = [value for _, value in resumed[0].scalars["charts/learning_rate"]]
    expected = [stopped.args.learning_rate * (1 - i / ITERATIONS) for i in range(ITERATIONS)]
    assert rates == pytest.approx(expected, rel=1e-6)
    if stopped.script is ppo_kl_penalty:
        saved = last(stopped.folder)["optimizer"]["param_groups"][0]["kl_coef"]
        assert resumed[0].scalars["charts/kl_coef"][STOPPED] == ((STOPPED + 1) * BATCH, saved)


def test_state_right_after_restoring(stopped, copied, monkeypatch):
    """What is saved before the first step is what was loaded; so is what is in memory."""
    agents, envs = capture(monkeypatch, stopped.script)
    stop_at_rollout(monkeypatch, stopped.script)
    before = last(copied)
    before["logger"]["seconds"] = 5000.0
    torch.save(before, copied / "runs" / "run" / "checkpoints" / "last.pt")
    with pytest.raises(Stop):
        stopped.script.train(replace(stopped.args, resume=True))
    after = last(copied)
    assert same(dict(agents[0].state_dict()), dict(stopped.agent))
    assert envs[0].num_steps == STOPPED * BATCH
    assert after["args"] == before["args"] | {"resume": True}
    assert 5000.0 <= after["logger"]["seconds"] < 5200.0
    assert list(after) == list(before)
    for key in KEYS - {"args", "logger"}:
        assert same(after[key], before[key]), key
    for key in ("step", "returns", "best"):
        assert same(after["logger"][key], before["logger"][key]), key


def test_time_goes_on(stopped, copied):
    checkpoint = last(copied)
    checkpoint["logger"]["seconds"] = 5000.0
    torch.save(checkpoint, copied / "runs" / "run" / "checkpoints" / "last.pt")
    known = len(episodes(copied / "runs" / "run"))
    stopped.script.train(replace(stopped.args, resume=True))
    rows = episodes(copied / "runs" / "run")
    assert all(row["wall_time"] < 1000.0 for row in rows[:known])
    assert all(5000.0 <= row["wall_time"] < 5300.0 for row in rows[known:])
    assert len(rows) > known


def test_run_name_alone_takes_the_other_arguments_from_the_run(stopped, copied, command):
    outcome = command(stopped.script, "--run-name", "run", "--resume")
    assert outcome.status == 0 and outcome.err == ""
    assert f"on {stopped.args.env_id} from step {STOPPED * BATCH} on" in outcome.out
    assert last(copied)["args"] == asdict(replace(stopped.args, resume=True))
    assert last(copied)["iteration"] == ITERATIONS
    told = json.loads((copied / "runs" / "run" / "args.json").read_text())
    assert told["args"] == asdict(replace(stopped.args, resume=True))


def test_more_steps(stopped, copied, command):
    more = ["--total-timesteps", str(8 * BATCH)]
    next_second()
    assert command(stopped.script, "--run-name", "run", "--resume", *more).status == 0
    assert last(copied)["iteration"] == 8
    rates = [value for _, value in scalars(copied / "runs" / "run")["charts/learning_rate"]]
    expected = [stopped.args.learning_rate * (1 - i / (6 if i < STOPPED else 8)) for i in range(8)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_finished_run_stays_finished(stopped, copied, command):
    assert command(stopped.script, "--run-name", "run", "--resume").status == 0
    before, rows = last(copied), (copied / "runs" / "run" / "episodes.csv").read_bytes()
    again = command(stopped.script, "--run-name", "run", "--resume")
    assert again.status == 0 and "steps are done; a higher --total-timesteps goes on" in again.out
    assert same(last(copied)["agent"], before["agent"]) and last(copied)["iteration"] == ITERATIONS
    assert (copied / "runs" / "run" / "episodes.csv").read_bytes() == rows


FREE = {
    *("run_name", "resume", "evaluate", "render", "total_timesteps", "target_return", "device", "precision"),
    *("torch_deterministic", "async_envs", "exp_name", "track", "wandb_project_name", "wandb_entity"),
    *("checkpoint_interval", "capture_video", "eval_episodes", "deterministic", "compile"),
}
CHANGES = {
    "seed": 7,
    "env_id": "Other-v0",
    "learning_rate": 0.125,
    "num_envs": 4,
    "num_steps": 10,
    "anneal_lr": False,
    "gamma": 0.25,
    "gae_lambda": 0.25,
    "num_minibatches": 1,
    "update_epochs": 3,
    "norm_adv": False,
    "kl_mode": "fixed",
    "kl_coef": 0.25,
    "kl_target": 0.25,
    "clip_coef": 0.25,
    "clip_vloss": False,
    "target_kl": 0.25,
    "shared_network": False,
    "ent_coef": 0.25,
    "vf_coef": 0.25,
    "max_grad_norm": 0.25,
}


def test_another_hyper_parameter_is_another_run(stopped, copied, command):
    names = {field.name for field in fields(stopped.script.Args)} - FREE
    assert names <= CHANGES.keys()
    before = contents(copied)
    for name in sorted(names):
        flag, value, old = f"--{name.replace('_', '-')}", CHANGES[name], getattr(stopped.args, name)
        argv = [f"--no-{flag[2:]}"] if value is False else [flag, str(value)]
        message = one_error(command(stopped.script, "--run-name", "run", "--resume", *argv))
        assert f"{flag} {value}:" in message and f"{flag} {old}\n" in message
        assert contents(copied) == before, name


def test_fewer_steps_are_refused(stopped, copied, command):
    before = contents(copied)
    message = one_error(command(stopped.script, "--run-name", "run", "--resume", "--total-timesteps", "200"))
    assert "--total-timesteps 200 " in message and f" {stopped.args.total_timesteps} " in message
    assert contents(copied) == before


def test_processes_that_see_another_checkpoint_stop(stopped, copied, command, monkeypatch):
    """On a disk of several machines that shows what was there some seconds ago."""
    before = contents(copied)
    monkeypatch.setattr(stopped.script, "gather", lambda items: [*items, STOPPED - 1])
    message = one_error(command(stopped.script, "--run-name", "run", "--resume"))
    assert message == "error: some processes see an older checkpoint; try again\n"
    assert contents(copied) == before


def test_what_does_not_matter_may_change(stopped, copied, command, monkeypatch):
    stop_at_rollout(monkeypatch, stopped.script)
    free = [
        "--checkpoint-interval",
        "2.5",
        "--exp-name",
        "other",
        "--target-return",
        "1e9",
        "--deterministic",
    ]
    free += ["--eval-episodes", "3", "--no-torch-deterministic", "--wandb-project-name", "other"]
    free += ["--precision", "bf16"] if stopped.script is ppo_atari else ["--async-envs"]
    with pytest.raises(Stop):
        command(stopped.script, "--run-name", "run", "--resume", *free)
    assert last(copied)["args"]["exp_name"] == "other" and last(copied)["iteration"] == STOPPED


@over_scripts(SCRIPTS)
def test_resume_starts_a_run_where_there_is_none(script, here, command):
    argv = [*options(tiny_args(script, total_timesteps=2 * BATCH)), "--resume"]
    next_second()
    outcome = command(script, *argv)
    assert outcome.status == 0 and outcome.err == "" and "from step 0 on" in outcome.out
    assert last(here)["iteration"] == 2
    steps = [step for step, _ in scalars(here / "runs" / "run")["losses/policy_loss"]]
    assert steps == [BATCH, 2 * BATCH]


@over_scripts(SCRIPTS)
def test_resume_needs_a_name(script, here, command):
    assert "--run-name" in one_error(command(script, "--resume"))
    assert not any(here.iterdir())


def test_a_run_named_by_default_can_be_resumed(stopped, here, command, monkeypatch):
    name = "named-by-default"
    args = replace(stopped.args, run_name=None, total_timesteps=BATCH)
    monkeypatch.setattr(stopped.script, "slug", lambda _: name)
    next_second()
    stopped.script.train(args)
    assert [path.name for path in (here / "runs").iterdir()] == [name]
    next_second()
    outcome = command(stopped.script, "--run-name", name, "--resume", "--total-timesteps", str(2 * BATCH))
    assert outcome.status == 0, outcome.err
    assert load(here / "runs" / name / "checkpoints" / "last.pt")["iteration"] == 2


def test_without_resume_a_run_is_left_alone(stopped, copied, command):
    before = contents(copied)
    message = one_error(command(stopped.script, *options(stopped.args)))
    assert "--run-name run" in message and "--resume" in message
    assert contents(copied) == before


# ---- the moment of a checkpoint ----


def saved_iterations(monkeypatch, script: ModuleType) -> list[int]:
    """A list to which the iteration of every last.pt will be added."""
    written, original = [], script.replace_file

    def remember(path, content):
        original(path, content)
        if path.name == "last.pt":
            written.append(load(path)["iteration"])

    monkeypatch.setattr(script, "replace_file", remember)
    return written


@pytest.mark.parametrize(("interval", "expected"), [(1e9, [0, 3]), (0.0, [0, 1, 2, 3])])
@over_scripts(SCRIPTS)
def test_interval(script, interval, expected, here, monkeypatch):
    written = saved_iterations(monkeypatch, script)
    script.train(tiny_args(script, checkpoint_interval=interval, total_timesteps=3 * BATCH))
    assert sorted(set(written)) == expected
    assert len(written) <= len(expected) + 1  # the end may be saved again


@pytest.mark.parametrize("value", ["-1.0", "-0.001", "nan"])
@over_scripts(SCRIPTS)
def test_intervals_that_are_none(script, value, here, command):
    assert "--checkpoint-interval must be at least 0" in one_error(
        command(script, "--checkpoint-interval", value)
    )
    assert not any(here.iterdir())


class Counter:
    """Something to save, which changes in place as weights do."""

    def __init__(self):
        self.count = torch.zeros(1)

    def state_dict(self) -> dict:
        return {"count": self.count}


def checkpoints_of(script: ModuleType, state: dict | None = None, **changes):
    """A logger, a counter, and what saves them."""
    args, counter = tiny_args(script, resume=state is not None, **changes), Counter()
    logger = script.Logger(args, state)
    parts = dict.fromkeys(("agent", "optimizer", "envs"), counter)
    return logger, counter, script.Checkpoints(args, logger, **parts)


@over_scripts(SCRIPTS)
def test_interval_is_in_minutes(script, here):
    logger, _, checkpoints = checkpoints_of(script, checkpoint_interval=1.0)
    checkpoints.save(0)
    checkpoints.saved -= 50.0
    checkpoints.after(1)
    assert last(here)["iteration"] == 0
    checkpoints.saved -= 10.0
    checkpoints.after(2)
    assert last(here)["iteration"] == 2
    checkpoints.after(3)
    assert last(here)["iteration"] == 2
    logger.close()


def play(logger, counter: Counter, checkpoints, iteration: int, returns: list[float]) -> None:
    """An iteration in which episodes end."""
    counter.count.fill_(iteration)
    logger.log_episodes([(iteration * 1000 + i, value, 1) for i, value in enumerate(returns)])
    checkpoints.after(iteration)


@over_scripts(SCRIPTS)
def test_best_is_the_state_of_the_best_mean(script, here):
    logger, *rest = checkpoints_of(script)
    parts = (logger, *rest)
    play(*parts, 1, [1000.0])  # luck
    play(*parts, 2, [1.0] * 49)
    rest[1].save(2)
    assert best(here)["iteration"] == best(here)["agent"]["count"] == 2  # more episodes say more
    play(*parts, 3, [30.0] * 100)
    play(*parts, 4, [20.0] * 40)  # mean 26
    play(*parts, 5, [])
    rest[1].save(5)
    assert best(here)["iteration"] == best(here)["agent"]["count"] == 3
    assert best(here)["logger"]["returns"] == [30.0] * 100
    assert last(here)["iteration"] == last(here)["agent"]["count"] == 5
    play(*parts, 6, [31.0] * 100)
    rest[1].save(6)
    assert best(here)["iteration"] == best(here)["agent"]["count"] == 6
    logger.close()


@over_scripts(SCRIPTS)
def test_best_survives_a_worse_continuation(script, here):
    first = checkpoints_of(script)
    play(*first, 1, [30.0] * 100)
    play(*first, 2, [10.0] * 100)
    first[2].save(2)
    first[0].close()
    before = (here / "runs" / "run" / "checkpoints" / "best.pt").read_bytes()
    second = checkpoints_of(script, last(here)["logger"])
    play(*second, 3, [29.0] * 100)  # better than where it went on
    second[2].save(3)
    assert (here / "runs" / "run" / "checkpoints" / "best.pt").read_bytes() == before
    play(*second, 4, [30.5] * 100)
    second[2].save(4)
    assert best(here)["iteration"] == 4
    second[0].close()


@over_scripts(SCRIPTS)
def test_best_survives_an_attempt_that_failed(script, here):
    """It is written where training ends with an error, when last.pt knows nothing of it."""
    logger, *rest = checkpoints_of(script)
    parts = (logger, *rest)
    play(*parts, 1, [10.0] * 100)
    rest[1].save(1)
    play(*parts, 2, [30.0] * 100)
    rest[1].close()
    logger.close()
    again = checkpoints_of(script, last(here)["logger"])
    play(*again, 2, [15.0] * 100)  # better than where it went on
    again[2].save(2)
    assert best(here)["logger"]["returns"] == [30.0] * 100
    again[0].close()
    (here / "runs" / "run" / "checkpoints" / "best.pt").write_bytes(b"damaged")
    last_one = checkpoints_of(script, last(here)["logger"] | {"best": [100, 10.0]})
    play(*last_one, 3, [20.0] * 100)
    last_one[2].save(3)
    assert best(here)["iteration"] == 3
    last_one[0].close()


@over_scripts(SCRIPTS)
def test_without_episodes_nothing_is_best(script, here):
    logger, _, checkpoints = checkpoints_of(script)
    checkpoints.after(1)
    checkpoints.save(1)
    assert [path.name for path in (here / "runs" / "run" / "checkpoints").iterdir()] == ["last.pt"]
    logger.close()


@over_scripts(SCRIPTS)
def test_nan_leaves_the_last_good_state(script, here, command, monkeypatch):
    original, calls = script.minibatch_loss, itertools.count(1)

    def breaks_in_the_third_iteration(*inputs):
        loss, metrics = original(*inputs)
        return (
            (loss * math.nan, metrics | {"losses/value_loss": loss * math.nan})
            if next(calls) > 4
            else (loss, metrics)
        )

    monkeypatch.setattr(script, "minibatch_loss", breaks_in_the_third_iteration)
    message = one_error(command(script, *options(tiny_args(script, checkpoint_interval=0.0))), status=1)
    assert "became NaN" in message
    assert last(here)["iteration"] == 2
    floats = [x for x in last(here)["agent"].values() if x.is_floating_point()]
    assert floats and all(x.isfinite().all() for x in floats)


@over_scripts(SCRIPTS)
def test_rows_that_go_on(script, tmp_path):
    header, path = "global_step,wall_time,return,length\n", tmp_path / "episodes.csv"
    script.open_csv(path, 100).close()
    assert path.read_text() == header
    rows = ["5,0.10,1.5,5\n", "99,0.20,-2.0,94\n", "100,0.30,3.0,7\n"]
    garbage = [b"\0\0\0\0\n", b"\xff\xfe,1,2,3\n", b"\n", b"-7,0.1,1.0,1\n", header.encode(), b"nan,1,1,1\n"]
    later = ["101,0.40,4.0,8\n", "1000,0.50,5.0,9\n"]
    lines = [header.encode(), rows[0].encode(), *garbage, *(row.encode() for row in (*rows[1:], *later))]
    path.write_bytes(b"".join(lines) + b"42,0.6")
    with script.open_csv(path, 100) as file:
        assert path.read_text() == header + "".join(rows)
        file.write("103,0.7,1.0,3\n")
        assert path.read_text() == header + "".join(rows) + "103,0.7,1.0,3\n"  # at once
    assert [name.name for name in tmp_path.iterdir()] == ["episodes.csv"]


# ---- files that cannot be written ----


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
@over_scripts(SCRIPTS)
def test_all_or_nothing(script, step, tmp_path, monkeypatch):
    path = tmp_path / "some.pt"
    script.replace_file(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"some\.pt .*No space left"):
        patch.setattr(os, step, full)
        script.replace_file(path, b"new")
    assert contents(tmp_path) == {path: b"old"}
    script.replace_file(path, b"new")
    assert contents(tmp_path) == {path: b"new"}


@pytest.mark.parametrize("readings", [3, math.inf])
@over_scripts(SCRIPTS)
def test_a_file_that_is_being_read(script, readings, tmp_path, monkeypatch):
    """Windows does not replace it then; a scanner or an evaluation is done soon."""
    path, tries, rename = tmp_path / "some.pt", [], os.replace
    script.replace_file(path, b"old")

    def replace(*names):
        tries.append(names)
        return rename(*names) if len(tries) > readings else forbid()

    def forbid():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"some\.pt .*denied") if readings == math.inf else nullcontext():
        script.replace_file(path, b"new")
    assert contents(tmp_path) == {path: b"old" if readings == math.inf else b"new"}
    assert 3 < len(tries) < 100


@over_scripts(SCRIPTS)
def test_content_is_on_the_disk_before_its_name(script, tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), rename(*names)))
    script.replace_file(tmp_path / "some.pt", b"content")
    assert done[:2] == [7, "renamed"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_full_disk_ends_training(stopped, copied, name, command, monkeypatch):
    """At the second checkpoint of a run that goes on."""
    rename = os.replace

    def sometimes_full(source, target):
        checkpoint = last(copied)["iteration"] > STOPPED if name == "last.pt" else True
        return full() if Path(target).name == name and checkpoint else rename(source, target)

    monkeypatch.setattr(os, "replace", sometimes_full)
    monkeypatch.setattr(stopped.script.Logger, "is_best", lambda logger: True)
    argv = ["--run-name", "run", "--resume", "--checkpoint-interval", "0"]
    kept = best(copied)
    message = one_error(command(stopped.script, *argv), status=1)
    assert str(Path("runs", "run", "checkpoints", name)) in message and "No space left" in message
    assert not list(copied.rglob("*.tmp"))
    assert last(copied)["iteration"] == STOPPED + (name == "last.pt")
    assert name == "last.pt" or same(best(copied), kept)


# ---- broken and hostile files ----


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def changed(path: Path, **changes) -> None:
    torch.save(load(path) | changes, path)


def without(key: str):
    def remove(path: Path) -> None:
        torch.save({name: value for name, value in load(path).items() if name != key}, path)

    return remove


def with_args(**changes):
    return lambda path: changed(path, args=load(path)["args"] | changes)


def of_other_sizes(path: Path) -> None:
    agent = {
        name: value.new_zeros([n + 1 for n in value.shape]) for name, value in load(path)["agent"].items()
    }
    changed(path, agent=agent)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "pickle in a dictionary": lambda path: path.write_bytes(pickle.dumps(dict.fromkeys(KEYS, Hostile()))),
    "object": lambda path: changed(path, agent=Hostile()),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte missing": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "random": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
    "empty": lambda path: path.write_bytes(b""),
    "directory": directory,
    "loop": loop,
    "other script": lambda path: changed(path, script="ppo_other"),
    "other sizes": of_other_sizes,
    "newer format": lambda path: changed(path, format=4),
    "unknown argument": with_args(no_such_argument=1),
    "argument out of range": with_args(num_envs=-1),
    "argument of another type": with_args(gamma="high"),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "list": lambda path: torch.save([1, 2, 3], path),
    "script in two lines": lambda path: changed(path, script="ppo\nother"),
    "format that is no number": lambda path: changed(path, format=torch.ones(2)),
    **{f"without {key}": without(key) for key in sorted(KEYS)},
}
NOT_EVALUATED = {"iteration", "rng", "optimizer", "logger"}  # a checkpoint can be played without them


def refused_in(mode: str, stopped: Interrupted, folder: Path, command) -> None:
    """Neither run nor written to, and explained in one line."""
    path, before = folder / "runs" / "run" / "checkpoints" / "last.pt", contents(folder)
    argv = ["--evaluate", str(path)] if mode == "evaluate" else ["--run-name", "run", "--resume"]
    message = one_error(command(stopped.script, *argv))
    assert "last.pt" in message
    assert not (folder / "executed").exists()
    assert contents(folder) == before


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_refused(stopped, copied, broken, command, monkeypatch):
    stop_at_rollout(monkeypatch, stopped.script)  # one that is taken for a new run would be long
    BROKEN[broken](copied / "runs" / "run" / "checkpoints" / "last.pt")
    refused_in("resume", stopped, copied, command)
    if broken.removeprefix("without ") not in NOT_EVALUATED:
        refused_in("evaluate", stopped, copied, command)


@pytest.mark.parametrize("part", ["agent", "optimizer", "envs", "logger"])
def test_parts_that_hold_nothing_are_refused(stopped, copied, part, command, monkeypatch):
    stop_at_rollout(monkeypatch, stopped.script)
    changed(copied / "runs" / "run" / "checkpoints" / "last.pt", **{part: {}})
    refused_in("resume", stopped, copied, command)


def test_the_hostile_object_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["nowhere", "folder", "runs/run/episodes.csv"])
def test_what_is_no_checkpoint_is_not_played(stopped, copied, name, command):
    (copied / "folder").mkdir()
    before = contents(copied)
    assert name in one_error(command(stopped.script, "--evaluate", name))
    assert contents(copied) == before


def test_checkpoints_of_another_script_are_refused(stopped, copied, command):
    other = SCRIPTS[SCRIPTS.index(stopped.script) - 1]
    before = contents(copied)
    for argv in (["--evaluate", "runs/run"], ["--run-name", "run", "--resume"]):
        message = one_error(command(other, *argv))
        assert f"written by {stopped.script.__name__!r}, " in message and f" {other.__name__}\n" in message
        assert contents(copied) == before


# ---- signals ----


def test_sigterm_ends_with_the_iteration(stopped):
    assert stopped.status == 128 + signal.SIGTERM
    assert last(stopped.folder)["iteration"] == STOPPED
    steps = [step for step, _ in scalars(stopped.folder / "runs" / "run")["losses/policy_loss"]]
    assert steps == [BATCH * (i + 1) for i in range(STOPPED)]


def test_handlers_are_put_back(stopped):
    before, after = stopped.handlers
    assert before == after


@over_scripts(SCRIPTS)
def test_handlers_are_put_back_after_an_error(script, here, monkeypatch):
    stop_at_rollout(monkeypatch, script)
    before = handlers()
    with pytest.raises(Stop):
        script.train(tiny_args(script))
    assert handlers() == before


@over_scripts(SCRIPTS)
def test_sigint_ends_with_the_iteration(script, here, command, monkeypatch):
    signal_in_update(monkeypatch, script, 2, signal.SIGINT)
    previous = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell runs us with &
    try:
        outcome = command(script, *options(tiny_args(script)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert outcome.status == 128 + signal.SIGINT
    assert outcome.err == "\nstopping once this iteration is done and saved; a second signal stops at once\n"
    assert "saved; --run-name run --resume goes on with it\n" in outcome.out
    assert last(here)["iteration"] == 2


@over_scripts(SCRIPTS)
def test_ignored_signals_stay_ignored(script):
    """As SIGINT is by what a shell runs in the background."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with script.noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert noted == []
    finally:
        signal.signal(signal.SIGINT, previous)


# ---- processes ----

FORKS = """
import contextlib, json, os, resource, signal, sys, tempfile, traceback
import ppo_kl_penalty
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup(1) ignores it
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    os.chdir(folder)  # what is only imported once it is needed
    ppo_kl_penalty.train(ppo_kl_penalty.Args(total_timesteps=16, num_steps=2, num_minibatches=2))
    os.chdir("/")
for line in iter(sys.stdin.readline, ""):
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
else:
    sys.exit()
os.setsid()
os.chdir(order["folder"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
if order["largest_file"] is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], order["largest_file"]))
os.environ |= order["environment"]
sys.argv = ["ppo_kl_penalty.py", *order["argv"]]
status = 0
try:
    ppo_kl_penalty.main()
except SystemExit as stop:
    status = stop.code
except BaseException:
    traceback.print_exc()
    status = 99
for file in (sys.stdout, sys.stderr):
    file.flush()
os._exit(status)  # to take down a fork of so many libraries would take seconds
"""


class Process:
    """A command line of ppo_kl_penalty.py, in a session of its own, as from a terminal."""

    def __init__(
        self, forks: subprocess.Popen, logs: Path, folder: Path, *argv: str, largest_file=None, **environment
    ):
        self.forks, self.out, self.err = forks, logs / "out", logs / "err"
        order = {"folder": str(folder), "argv": argv, "out": str(self.out), "err": str(self.err)}
        for path in (self.out, self.err):
            path.write_text("")
        next_second()
        self.running = True
        self.pid = self.ask(order | {"largest_file": largest_file, "environment": environment})

    def ask(self, order: dict) -> int:
        self.forks.stdin.write(json.dumps(order) + "\n")
        self.forks.stdin.flush()
        return int(self.forks.stdout.readline())

    def wait(self) -> Outcome:
        status, self.running = self.ask({"wait": self.pid}), False
        return Outcome(status, self.out.read_text(), self.err.read_text())

    def signal(self, number: int) -> None:
        os.killpg(self.pid, number)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Starts processes that have imported everything; it takes seconds to do so in each."""
    logs = tmp_path_factory.mktemp("logs")
    environment = os.environ | {"PYTHONPATH": str(Path(ppo_kl_penalty.__file__).parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **pipes) as process:
        started = []

        def start(folder: Path, *argv: str, **more) -> Process:
            started.append(Process(process, logs, folder, *argv, **more))
            return started[-1]

        yield start
        for child in started:
            if child.running:  # a test has failed before its end
                child.signal(signal.SIGKILL)
        process.stdin.close()


def small_iterations(total: int, **changes) -> list[str]:
    sizes = {"num_envs": 2, "num_steps": 8, "total_timesteps": 16 * total + 5, "checkpoint_interval": 0.0}
    return options(tiny_args(ppo_kl_penalty, **sizes | changes))


def assert_complete(run: Path, iterations: int) -> None:
    """Every iteration was logged once, and nothing twice."""
    rows, points = episodes(run), scalars(run)
    steps = [row["global_step"] for row in rows]
    assert all(a < b for a, b in itertools.pairwise(steps)) and 0 < steps[0] and steps[-1] <= 16 * iterations
    times = [row["wall_time"] for row in rows]
    assert times == sorted(times)
    for tag, values in points.items():
        steps_of_tag = [step for step, _ in values]
        expected = steps if tag in EPISODES else [16 * (i + 1) for i in range(iterations)]
        assert steps_of_tag == expected, tag
    assert {"losses/policy_loss", "charts/SPS", "charts/kl_coef", *EPISODES} <= points.keys()
    assert [value for _, value in points["charts/episodic_return"]] == [row["return"] for row in rows]


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_nothing(forks, tmp_path):
    iterations, delays = 6 * KILLS, random.Random(1)
    argv, run = small_iterations(iterations), tmp_path / "killed" / "runs" / "run"
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    begin = time.monotonic()
    assert forks(tmp_path / "whole", *argv).wait().status == 0
    duration = (time.monotonic() - begin) / iterations  # of an iteration
    seen = []
    for _ in range(KILLS):
        process = forks(run.parents[1], *argv, "--resume")
        wait_for(lambda process=process: "training on" in process.out.read_text())
        time.sleep(delays.uniform(0.0, 3.0 * duration))
        process.signal(signal.SIGKILL)
        outcome = process.wait()
        assert (outcome.status, outcome.err) == (-signal.SIGKILL, "")
        if (run / "checkpoints" / "last.pt").exists():
            seen.append(last(run.parents[1])["iteration"])
    assert seen == sorted(seen) and 0 < seen[-1] < iterations
    assert len({*seen}) > KILLS / 4, "they were killed in the middle"
    final = forks(run.parents[1], "--run-name", "run", "--resume").wait()
    assert (final.status, final.err) == (0, "")
    whole, killed = last(tmp_path / "whole"), last(run.parents[1])
    assert killed["iteration"] == whole["iteration"] == iterations
    assert (
        killed["logger"]["step"] == whole["logger"]["step"] == killed["envs"]["num_steps"] == 16 * iterations
    )
    assert killed["agent"]["normalize.count"] == whole["agent"]["normalize.count"] == 16 * iterations
    assert_complete(tmp_path / "whole" / "runs" / "run", iterations)
    assert_complete(run, iterations)


@pytest.mark.parametrize("extra", [[], ["--async-envs"]], ids=["sync", "async"])
@pytest.mark.parametrize("number", ppo_kl_penalty.stop_signals(), ids=lambda number: number.name)
def test_signal_to_a_process(forks, tmp_path, number, extra):
    """And to all of its group, as from a terminal: environments in processes of their own finish too."""
    argv = small_iterations(100_000, checkpoint_interval=1e9)
    process = forks(tmp_path, *argv, *extra)
    wait_for((tmp_path / "runs" / "run" / "checkpoints" / "last.pt").exists)
    time.sleep(0.2)
    process.signal(number)
    outcome = process.wait()
    assert outcome.status == 128 + number
    assert outcome.err == "\nstopping once this iteration is done and saved; a second signal stops at once\n"
    assert last(tmp_path)["iteration"] >= 1
    assert_complete(tmp_path / "runs" / "run", last(tmp_path)["iteration"])


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stderr", [subprocess.STDOUT, subprocess.DEVNULL], ids=["2>&1", "stdout"])
def test_ctrl_c_into_a_pipeline(tmp_path, stderr):
    """It ends tee(1) as well, whose end of the pipe nobody reads from then on."""
    argv = [*small_iterations(100_000, checkpoint_interval=1e9), "--no-compile"]
    command = [sys.executable, ppo_kl_penalty.__file__, *argv]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr) as process:
        wait_for((tmp_path / "runs" / "run" / "checkpoints" / "last.pt").exists)
        process.stdout.close()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60.0) == 128 + signal.SIGINT
    assert last(tmp_path)["iteration"] >= 1
    assert_complete(tmp_path / "runs" / "run", last(tmp_path)["iteration"])


@pytest.mark.parametrize("number", ppo_kl_penalty.stop_signals(), ids=lambda number: number.name)
@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_second_signal_ends_a_process_at_once(forks, tmp_path, number, second, status):
    process = forks(tmp_path, *small_iterations(10, num_steps=1_000_000, total_timesteps=10_000_000))
    wait_for((tmp_path / "runs" / "run" / "checkpoints" / "last.pt").exists)
    process.signal(number)
    wait_for(lambda: "second signal" in process.err.read_text())
    begin = time.monotonic()
    process.signal(second)
    outcome = process.wait()
    assert outcome.status == status and "Traceback" not in outcome.err
    assert time.monotonic() - begin < 10.0
    assert last(tmp_path)["iteration"] == 0


@pytest.mark.slow
def test_closing_the_terminal(tmp_path):
    """Nobody can be told anything then: every write to it fails."""
    fcntl, termios = map(pytest.importorskip, ("fcntl", "termios"))  # not on Windows
    terminal, own_end = os.openpty()
    os.set_blocking(terminal, False)
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # or no bar fits

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup(1) ignores it

    def shows_a_return() -> bool:
        with suppress(BlockingIOError):
            return b"return" in os.read(terminal, 10_000)
        return False

    argv = [*small_iterations(100_000, checkpoint_interval=1e9), "--no-compile"]
    command = [sys.executable, ppo_kl_penalty.__file__, *argv]
    streams = {"stdin": own_end, "stdout": own_end, "stderr": own_end, "start_new_session": True}
    with subprocess.Popen(command, cwd=tmp_path, preexec_fn=take_terminal, **streams) as process:
        os.close(own_end)
        try:
            wait_for(shows_a_return)
            os.close(terminal)
            assert process.wait(60.0) == 128 + signal.SIGHUP
        finally:
            process.kill()
    assert last(tmp_path)["iteration"] >= 1
    assert_complete(tmp_path / "runs" / "run", last(tmp_path)["iteration"])


@over_scripts(SCRIPTS)
@pytest.mark.skipif(os.name == "nt", reason="no SIGHUP")
def test_a_terminal_may_hang_up_again(script, monkeypatch, capfd):
    """The kernel tells the program, so does the shell, and the kernel once more when the shell ends."""
    previous = signal.signal(signal.SIGHUP, lambda *_: None)  # or what nohup(1) ignores stays ignored
    interrupt = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    try:
        with script.noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one stops at once
            assert signal.getsignal(signal.SIGINT) is interrupt  # or a notebook would lose everything
        assert noted == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, previous)


@over_scripts(SCRIPTS)
def test_the_same_signal_twice_at_once_counts_once(script, monkeypatch, capfd):
    """As timeout(1) sends it: to the process, and in the same moment to its group."""
    monkeypatch.setattr(script.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with script.noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert noted == [signal.SIGTERM]


def test_a_limit_to_the_size_of_files(forks, tmp_path):
    argv = small_iterations(4)
    assert forks(tmp_path, *argv).wait().status == 0
    run = tmp_path / "runs" / "run"
    before = {name: (run / "checkpoints" / name).read_bytes() for name in ("last.pt", "best.pt")}
    assert len(before["last.pt"]) > 50_000
    more = ["--run-name", "run", "--resume", "--total-timesteps", "160"]
    message = one_error(forks(tmp_path, *more, largest_file=50_000).wait(), status=1)
    assert "runs/run/checkpoints/last.pt" in message and os.strerror(errno.EFBIG) in message
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    assert forks(tmp_path, *more).wait().status == 0
    assert_complete(run, 10)


# ---- W&B ----


class Unreachable:
    """A W&B run without a network."""

    id = "unreachable"

    def __init__(self):
        self.calls = 0

    def log(self, *_, **__):
        self.calls += 1
        if self.calls == 5:
            raise ConnectionError("no\nnetwork")

    def log_model(self, *_):
        raise AssertionError("told again")

    finish = log_model


@over_scripts(SCRIPTS)
def test_training_goes_on_without_wandb(script, here, command, monkeypatch):
    run = Unreachable()
    monkeypatch.setattr(script, "init_wandb", lambda *_: run)
    outcome = command(script, *options(tiny_args(script, track=True)))
    assert outcome.status == 0 and outcome.err == ""
    lines = [line for line in outcome.out.splitlines() if "W&B" in line]
    assert lines == ["training goes on without W&B: ConnectionError: no network"]
    assert run.calls == 5
    assert last(here)["iteration"] == ITERATIONS


def test_wandb_knows_a_resumed_run(forks, tmp_path):
    argv = [*small_iterations(4), "--track"]
    for more in ([], ["--resume", "--total-timesteps", "96"]):
        outcome = forks(tmp_path, *argv, *more, WANDB_MODE="offline").wait()
        assert outcome.status == 0, outcome.err
    folders = [*(tmp_path / "runs" / "run" / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert {path.name.rpartition("-")[2] for path in folders} == {"run"}
    assert last(tmp_path)["iteration"] == 6


# ---- sweeps: several runs in one process ----


def shared_state() -> list:
    numpy_state = [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()]
    return [numpy_state, random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads()]


@over_scripts(SCRIPTS)
def test_a_sweep_draws_what_it_would_draw_without_training(script, here):
    """A random search would try the same again and again."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = shared_state()
        script.train(tiny_args(script, compile=False))
        assert shared_state() == before
        script.evaluate_checkpoint(tiny_args(script, evaluate="runs/run", eval_episodes=1))
        assert shared_state() == before
    finally:
        torch.set_num_threads(threads)


@over_scripts(SCRIPTS)
def test_arguments_may_be_scalars_of_numpy(script, here):
    """As np.logspace() and random generators give them; files have plain ones, and can be read."""
    scalars = {"seed": np.int64(7), "learning_rate": np.float64(1e-3), "gamma": np.float32(0.5)}
    script.train(tiny_args(script, compile=np.bool_(False), **scalars))
    found = asdict(script.load_checkpoint(Path("runs/run/checkpoints/last.pt"))["args"])
    expected = {"seed": 7, "learning_rate": 1e-3, "gamma": 0.5, "compile": False}
    assert {name: found[name] for name in expected} == expected
    assert [type(found[name]) for name in expected] == [int, float, float, bool]
