"""What a run leaves on disk, on the screen and in W&B, read with the readers of others."""

import csv
import fcntl
import io
import itertools
import json
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
import wandb
from fakes import SCRIPTS, over_scripts
from gymnasium.spaces import Box
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).resolve().parents[1]

# Runs of a second or two: 4 iterations; the episodes of Pendulum last 200 steps, those of Pong too long.
RUNS = {
    ppo_atari: {"env_id": "PongNoFrameskip-v4", "num_envs": 2, "num_steps": 16, "total_timesteps": 128},
    ppo_continuous: {"env_id": "Pendulum-v1", "num_envs": 4, "num_steps": 60, "total_timesteps": 960},
    ppo_kl_penalty: {"env_id": "CartPole-v1", "num_envs": 4, "num_steps": 60, "total_timesteps": 960},
}
LOSSES = {
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/old_approx_kl",
    "losses/explained_variance",
    "losses/grad_norm",
    "charts/learning_rate",
    "charts/SPS",
}
TIMES = {"time/env", "time/act", "time/update"}
EPISODES = {"charts/episodic_return", "charts/episodic_length"}


def short_args(script, **changes):
    small = {"num_minibatches": 2, "update_epochs": 1, "device": "cpu", "run_name": "test"}
    return script.Args(**small | RUNS[script] | changes)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point, by TensorBoard's own reader."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def episodes(folder: Path) -> list[dict[str, float]]:
    with open(folder / "episodes.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- a whole run ----


class Run(NamedTuple):
    script: object
    args: object
    folder: Path
    result: float  # what train() returned
    stdout: str
    stderr: str


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def run(request, tmp_path_factory) -> Run:
    script, home = request.param, tmp_path_factory.mktemp("run")
    args, stdout, stderr = short_args(script), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.chdir(home)
        result = script.train(args)
    assert [path.name for path in home.iterdir()] == ["runs"]
    return Run(script, args, home / "runs" / "test", result, stdout.getvalue(), stderr.getvalue())


def test_files(run):
    names = {path.name.partition(".out.")[0] for path in run.folder.iterdir()}
    assert names == {"args.json", "checkpoints", "episodes.csv", "events"}


def test_args_json_tells_how_to_repeat_it(run):
    told = json.loads((run.folder / "args.json").read_text())
    assert told["args"] == asdict(run.args)
    assert run.script.Args(**told["args"]) == run.args
    assert told["script"] == f"{run.script.__name__}.py"
    names = ("torch", "gymnasium", "ale-py", "mujoco", "numpy")
    assert told["versions"] == {name: version(name) for name in names}
    assert told["python"] == sys.version.split()[0]
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
    expected = {None} if git.returncode else {git.stdout.strip(), git.stdout.strip() + "-dirty"}
    assert told["git_commit"] in expected


@over_scripts(SCRIPTS)
def test_the_commit_says_whether_files_were_changed_since(script, tmp_path, monkeypatch):
    copy = tmp_path / "a folder" / "ppo.py"
    copy.parent.mkdir()
    copy.write_text("one")
    monkeypatch.setattr(script, "__file__", str(copy))
    assert script.describe_run(script.Args())["git_commit"] is None
    git = ["git", "-C", copy.parent, "-c", "user.name=a", "-c", "user.email=b"]
    for command in ("init -q", "add .", "commit -qm one", "tag -a v1 -m one"):
        subprocess.run([*git, *command.split()], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert script.describe_run(script.Args())["git_commit"] == commit
    copy.write_text("two")
    assert script.describe_run(script.Args())["git_commit"] == f"{commit}-dirty"


def test_episodes_csv(run):
    text = (run.folder / "episodes.csv").read_text()
    assert text.startswith("global_step,wall_time,return,length\n") and text.endswith("\n")
    rows = episodes(run.folder)
    for before, after in itertools.pairwise(rows):
        assert before["global_step"] < after["global_step"] <= run.args.total_timesteps
        assert 0.0 <= before["wall_time"] <= after["wall_time"]
    if run.script is ppo_atari:
        assert rows == []
    elif run.script is ppo_continuous:
        assert [row["length"] for row in rows] == [200.0] * 4
        assert all(-200 * 16.28 < row["return"] < -200.0 for row in rows)  # a step costs up to π² + 6.4
    else:
        assert len(rows) > 10
        assert all(row["return"] == row["length"] for row in rows)  # each step is worth 1
        assert 8 <= min(row["length"] for row in rows) <= max(row["length"] for row in rows) <= 240


def test_lengths_add_up_to_the_steps_taken(run):
    """Every environment's episodes follow each other without a gap, from step 0 on."""
    taken = [0] * run.args.num_envs
    for row in episodes(run.folder):
        rounds, env = divmod(int(row["global_step"]) - 1, run.args.num_envs)
        taken[env] += int(row["length"])
        assert taken[env] == rounds + 1


def test_tensorboard_has_every_metric(run):
    expected = LOSSES | TIMES | (set() if run.script is ppo_atari else EPISODES)
    expected |= {"losses/kl", "charts/kl_coef"} if run.script is ppo_kl_penalty else {"losses/clipfrac"}
    assert scalars(run.folder).keys() == expected


def test_tensorboard_steps_and_values(run):
    ends = [run.args.batch_size * (i + 1) for i in range(4)]
    for tag, points in scalars(run.folder).items():
        steps = [step for step, _ in points]
        assert steps == ends if tag not in EPISODES else steps == sorted(set(steps)), tag
        assert all(math.isfinite(value) for _, value in points), tag


def test_tensorboard_and_csv_agree(run):
    rows, found = episodes(run.folder), scalars(run.folder)
    for tag, column in (("charts/episodic_return", "return"), ("charts/episodic_length", "length")):
        expected = [(row["global_step"], pytest.approx(row[column], rel=1e-6)) for row in rows]
        assert found.get(tag, []) == expected


def test_speed_is_steps_per_second(run):
    """Of the whole run: so its points, as seconds since the beginning, grow."""
    seconds = [step / value for step, value in scalars(run.folder)["charts/SPS"]]
    assert 0.0 < seconds[0] and seconds == sorted(seconds)


def test_times_add_up_to_the_time_it_took(run):
    """Microseconds per step, each of its own iteration; what is left out is logging and checkpoints."""
    found = scalars(run.folder)
    parts = [[1e-6 * run.args.batch_size * value for _, value in found[key]] for key in sorted(TIMES)]
    assert all(part > 0.0 for part in itertools.chain(*parts))
    spent = list(itertools.accumulate(map(sum, zip(*parts, strict=True))))
    seconds = [step / value for step, value in found["charts/SPS"]]
    assert all(part < whole for part, whole in zip(spent, seconds, strict=True))
    assert spent[-1] > 0.3 * seconds[-1]


def test_the_last_line_tells_the_median_times(run):
    found = scalars(run.folder)
    medians = {key: np.median([value for _, value in found[key]]) for key in TIMES}
    *_, last = run.stdout.splitlines()
    numbers = re.fullmatch(r"µs per step: env ([\d.]+), act ([\d.]+), update ([\d.]+)", last).groups()
    expected = [medians[key] for key in ("time/env", "time/act", "time/update")]
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.051, rel=1e-5)


def test_train_returns_the_mean_return(run):
    returns = [row["return"] for row in episodes(run.folder)]
    expected = sum(returns[-100:]) / len(returns[-100:]) if returns else math.nan
    assert run.result == pytest.approx(expected, nan_ok=True)


def test_on_a_pipe_progress_is_plain_lines(run):
    assert run.stderr == ""
    first, *_, last, times = run.stdout.splitlines()
    assert run.args.env_id in first and str(Path("runs", "test")) in first
    returns = "no episode has ended yet" if run.script is ppo_atari else "mean return "
    assert last.startswith(f"step {run.args.total_timesteps:,}: {returns}")
    assert run.stdout.count(last) == 1
    assert times.startswith("µs per step: ")
    assert "\r" not in run.stdout and "\x1b" not in run.stdout


# ---- parts of the logger ----


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@over_scripts(SCRIPTS)
def test_logged_numbers_come_back(script, here):
    logger = script.Logger(short_args(script))
    finished = [(5, -1.5, 5), (9, 300.25, 4)]
    logger.log_episodes(finished)
    logger.log_iteration(12, {"losses/value_loss": 0.5})
    logger.close()
    rows = [(row["global_step"], row["return"], row["length"]) for row in episodes(here / "runs" / "test")]
    assert rows == [(5, -1.5, 5), (9, 300.25, 4)]
    found = scalars(here / "runs" / "test")
    assert found["charts/episodic_return"] == [(5, -1.5), (9, 300.25)]
    assert found["charts/episodic_length"] == [(5, 5.0), (9, 4.0)]
    assert found["losses/value_loss"] == [(12, 0.5)]
    assert logger.mean_return() == (300.25 - 1.5) / 2


@over_scripts(SCRIPTS)
def test_episodes_are_on_disk_at_once(script, here):
    """A run that is killed keeps what it logged."""
    logger = script.Logger(short_args(script))
    logger.log_episodes([(5, -1.5, 5)])
    assert [row["return"] for row in episodes(here / "runs" / "test")] == [-1.5]
    logger.close()


@over_scripts(SCRIPTS)
def test_solved_is_the_mean_of_the_last_100_episodes(script, here):
    logger = script.Logger(short_args(script))
    logger.log_episodes([(i, 10.0, 1) for i in range(99)])
    assert not logger.solved(5.0)  # a lucky start proves nothing
    logger.log_episodes([(99, 10.0, 1)])
    assert logger.solved(5.0) and logger.solved(10.0)
    assert not logger.solved(10.5) and not logger.solved(None)
    logger.log_episodes([(100 + i, 0.0, 1) for i in range(51)])
    assert not logger.solved(5.0) and logger.solved(4.9)
    logger.close()


@over_scripts(SCRIPTS)
def test_default_name_is_new_for_every_run(script, here, monkeypatch):
    args = short_args(script, run_name=None)
    for now in (1e9, 1e9 + 0.001):  # as in a sweep
        monkeypatch.setattr(script.time, "time", lambda now=now: now)
        script.Logger(args).close()
    names = sorted(path.name for path in (here / "runs").iterdir())
    assert names == [f"{args.env_id}__{args.exp_name}__1__1000000000.00{i}000" for i in range(2)]


@over_scripts(SCRIPTS)
def test_an_existing_run_is_left_alone(script, here):
    folder = here / "runs" / "test"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("precious")
    before = contents(here)
    with pytest.raises(script.ArgumentError, match=r"--run-name test\b.*exists"):
        script.train(short_args(script))
    assert contents(here) == before


def test_target_return_stops_early(here, capsys):
    """CartPole's pole falls after some 20 steps at first: 100 episodes take about 2,000 of them."""
    args = short_args(ppo_kl_penalty, num_envs=8, target_return=1.0, total_timesteps=480 * 1000)
    result = ppo_kl_penalty.train(args)
    assert result >= 1.0
    rows, last = episodes(here / "runs" / "test"), scalars(here / "runs" / "test")["charts/SPS"][-1][0]
    assert f"solved at step {last:,} after 0." in capsys.readouterr().out
    assert rows[99]["global_step"] <= last < rows[99]["global_step"] + args.batch_size


@over_scripts(SCRIPTS)
def test_a_log_file_gets_a_line_every_few_seconds(script, here, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with closing(script.Logger(short_args(script))) as logger:
        for step in (100, 300, 600):
            clock[0] += 4.0
            logger.log_iteration(step, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines == [  # the second after 8 seconds, the last at the end
        "step 300: no episode has ended yet, 38 steps/s, 0.1 min",
        "step 600: no episode has ended yet, 50 steps/s, 0.2 min",
    ]
    assert scalars(here / "runs" / "test")["charts/SPS"] == [(100, 25.0), (300, 37.5), (600, 50.0)]


# ---- pipes of other code pages ----


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("encoding", ["gbk", "cp1252"])  # one lacks µ, the other γ
def test_what_cannot_be_encoded_stops_nothing(script, encoding, here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0
    monkeypatch.setattr(script, "parse_args", lambda: short_args(script, compile=False))
    script.main()
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode(encoding)
    assert "--gae-lambda" in printed and "s per step: env" in printed


@over_scripts(SCRIPTS)
def test_a_stream_without_encoding_as_in_notebooks(script, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0 and "--gae-lambda" in sys.stdout.getvalue()


# ---- NaN ----


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_bad_loss_stops_training(script, bad, here, monkeypatch):
    original, args, calls = script.minibatch_loss, short_args(script), 0

    def breaks_in_the_second_iteration(*inputs):
        nonlocal calls
        calls += 1
        loss, metrics = original(*inputs)
        if calls == 3:
            metrics["losses/value_loss"] = torch.tensor(bad)
        return loss, metrics

    monkeypatch.setattr(script, "minibatch_loss", breaks_in_the_second_iteration)
    with pytest.raises(FloatingPointError, match=f"^losses/value_loss .* step {2 * args.batch_size}\\b"):
        script.train(args)
    found = scalars(here / "runs" / "test")
    assert [step for step, _ in found["losses/value_loss"]] == [args.batch_size]
    assert episodes(here / "runs" / "test") is not None
    assert json.loads((here / "runs" / "test" / "args.json").read_text())


class Broken(gym.Env):
    """Its 42nd step returns what no learner can use."""

    action_space = Box(-1.0, 1.0, (1,))
    observation_space = Box(-math.inf, math.inf, (1,))

    def __init__(self, obs: float = 0.0, reward: float = 0.0, cut: bool = False):
        self.bad, self.cut, self.steps = (obs, reward), cut, 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        obs, reward = self.bad if self.steps == 42 else (0.0, 0.0)
        terminated, truncated = self.steps % 5 == 0, self.cut and self.steps == 42
        return np.full(1, obs, dtype=np.float32), reward, terminated, truncated, {}


@over_scripts([ppo_continuous, ppo_kl_penalty])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["obs", "reward"])
def test_a_broken_environment_stops_training(script, name, value, here):
    """Before anything is learned from it: statistics would be NaN from then on, hidden by their clipping."""
    gym.register("Broken-v0", Broken, kwargs={name: value})
    try:
        args = short_args(script, env_id="Broken-v0", num_envs=1, num_steps=32, total_timesteps=128)
        with pytest.raises(FloatingPointError, match=r"^an observation or a reward .* NaN or infinite$"):
            script.train(args)
    finally:
        gym.registry.pop("Broken-v0")
    assert [step for step, _ in scalars(here / "runs" / "test")["losses/value_loss"]] == [32]


@over_scripts([ppo_continuous, ppo_kl_penalty])
@pytest.mark.parametrize(("num_steps", "cut"), [(42, False), (32, True)], ids=["last step", "time limit"])
def test_an_observation_that_only_has_a_value_is_looked_at(script, num_steps, cut, here):
    """The one after a rollout, and the one that a time limit cuts off."""
    gym.register("Broken-v0", Broken, kwargs={"obs": math.nan, "cut": cut})
    try:
        sizes = {
            "num_envs": 1,
            "num_steps": num_steps,
            "total_timesteps": 2 * num_steps,
            "num_minibatches": 2,
        }
        with pytest.raises(FloatingPointError, match=r"^an observation or a reward .* NaN or infinite$"):
            script.train(short_args(script, env_id="Broken-v0", **sizes))
    finally:
        gym.registry.pop("Broken-v0")


@over_scripts(SCRIPTS)
def test_a_mad_learning_rate_stops_training(script, here):
    with pytest.raises(FloatingPointError, match=r"losses/.*--learning-rate"):
        script.train(short_args(script, learning_rate=1e30))
    assert scalars(here / "runs" / "test").keys() <= EPISODES


# ---- W&B ----


def on_a_terminal(command: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a command that could ask its user, who never answers."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))  # a bar needs some width
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output, deadline = b"", time.monotonic() + 240.0
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1.0)[0]:
            continue
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            chunk = b""
        if not chunk:
            break
        output += chunk
    else:
        process.kill()  # it is still waiting for an answer
    os.close(ours)
    return process.wait(), output.decode(errors="replace")


def without_login(home: Path) -> dict[str, str]:
    """The environment of a user who has never heard of W&B."""
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    return kept | {"HOME": str(home), "TERM": "xterm"}  # wandb asks nothing of a dumb one


def test_wandb_without_a_login_is_offline_and_asks_nothing(tmp_path):
    script = Path(ppo_kl_penalty.__file__)
    options = "--run-name test --track --num-envs 4 --num-steps 60 --total-timesteps 480 --update-epochs 1"
    command = [sys.executable, str(script), *options.split(), "--num-minibatches", "2"]
    status, output = on_a_terminal(command, tmp_path, without_login(tmp_path / "home"))
    assert status == 0, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "runs"]
    (folder,) = (tmp_path / "runs" / "test" / "wandb").glob("offline-run-*")
    (log,) = (file.read_bytes() for file in folder.glob("run-*.wandb"))
    for key in (*LOSSES, *TIMES, *EPISODES, "losses/kl", "charts/kl_coef", "global_step"):
        assert key.encode() in log
    assert "wandb sync" in output  # the command that uploads it
    assert "480/480" in output  # on a terminal there is a progress bar


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("resume", [False, True])
def test_wandb_is_told_what_the_run_is(script, resume, here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **told: told)
    args = short_args(script, resume=resume, wandb_project_name="project", wandb_entity="team")
    told = script.init_wandb(args, here / "test")
    assert (told["id"], told["resume"]) == ("test", "allow" if resume else "never")
    assert (told["project"], told["entity"], told["save_code"]) == ("project", "team", True)
    assert told["config"] == asdict(args)


@over_scripts(SCRIPTS)
def test_wandb_that_does_not_start_stops_nothing(script, here, monkeypatch, capsys):
    def fail(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(script, "init_wandb", fail)
    with closing(script.Logger(short_args(script, track=True))) as logger:
        assert logger.wandb is None
    assert "training goes on without W&B: ConnectionError: no network\n" in capsys.readouterr().out


def test_wandb_disabled_writes_nothing(here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()  # so that it reads the environment again
    run = ppo_continuous.init_wandb(short_args(ppo_continuous, track=True), here)
    run.log({"charts/SPS": 1.0})
    run.finish()
    wandb.teardown()
    assert run.disabled
    assert list(here.iterdir()) == []
