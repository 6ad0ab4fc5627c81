"""What a run leaves behind and shows: metrics, episodes, arguments, lines, Weights & Biases."""

import json
import struct
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from fakes import SCRIPTS, VECTOR_SCRIPTS, Walk, after, options, over_scripts, rows, scalars, tiny
from wandb.proto.wandb_internal_pb2 import Record

import ppo_continuous
import ppo_kl_penalty

pytestmark = pytest.mark.usefixtures("small_network")
CLEANRL = """charts/SPS charts/episodic_length charts/episodic_return charts/learning_rate
losses/entropy losses/explained_variance losses/policy_loss losses/value_loss losses/grad_norm"""
CLIPPED = "losses/clipfrac losses/approx_kl losses/old_approx_kl"
OWN = {ppo_kl_penalty: "losses/kl charts/kl_coef"}


@over_scripts(SCRIPTS)
def test_metrics(script, here):
    args = tiny(script, gamma=0.9)
    script.train(args)
    points = scalars(here / "runs" / "run")
    assert points.keys() == {*CLEANRL.split(), *OWN.get(script, CLIPPED).split()}
    for name in points.keys() - {"charts/episodic_return", "charts/episodic_length"}:
        expected = [16, 32, 48, 64][name == "charts/SPS" :]  # the speed not of the first
        assert [step for step, _ in points[name]] == expected, name
    returns = [(row[0], pytest.approx(row[2])) for row in rows(here / "runs" / "run")]
    assert points["charts/episodic_return"] == returns
    about = json.loads((here / "runs" / "run" / "args.json").read_text())
    assert about["args"] == asdict(args) and about["args"]["gamma"] == 0.9
    assert torch.__version__ in str(about) and "git" in about


@over_scripts(VECTOR_SCRIPTS)
def test_episodes(script, here):
    """As the environments know them, in order, each on disk at once."""
    Walk.episodes.clear()
    folder, begun, seen = here / "runs" / "run", time.time() - 0.01, []
    with after(script, 2, lambda: seen.extend(rows(folder))) as runs:
        mean = script.train(tiny(script, 6))
    steps, times, returns, lengths = zip(*rows(folder))
    assert 0 < len(seen) < len(steps) and seen == rows(folder)[: len(seen)]
    assert sorted(returns) == pytest.approx(sorted(float(x) for x, _ in Walk.episodes), rel=1e-4)
    assert sorted(lengths) == sorted(n for _, n in Walk.episodes)
    assert [*steps] == sorted(steps) and begun <= min(times) <= max(times) <= time.time() + 0.01
    assert sum(lengths) + runs[-1].envs.lengths.sum() == 96
    assert mean == pytest.approx(sum(returns) / len(returns))


@over_scripts(VECTOR_SCRIPTS)
def test_speed_and_status(script, here, command, monkeypatch):
    """Without compiling; a line in 5 seconds, a checkpoint in minutes; the end says what next."""
    now, saved, update, save = [0.0], [], script.update, script.Run.save

    def slow(*args):
        now[0] += 2.0 + 100.0 * (now[0] == 0.0)
        return update(*args)

    def spy(run):
        saved.append(run.envs.global_step // 16)
        save(run)

    clock = SimpleNamespace(time=time.time, monotonic=lambda: now[0])
    for owner, name, new in (
        (script, "time", clock),
        (script, "update", slow),
        (script.Run, "save", spy),
    ):
        monkeypatch.setattr(owner, name, new)
    outcome = command(script, *options(tiny(script, 8, checkpoint_interval=0.08)))
    assert saved == [1, 4, 7, 8]
    speeds = scalars(here / "runs" / "run")["charts/SPS"]
    assert speeds == [(16 * i, pytest.approx(8.0)) for i in range(2, 9)]
    *lines, end = outcome.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 64", "step 112"]
    shown = [score for step, _, score, _ in rows(here / "runs" / "run") if step <= 112]
    assert f"mean return {sum(shown) / len(shown):.2f}, 8 steps/s" in lines[-1]
    shown = [score for _, _, score, _ in rows(here / "runs" / "run")][-100:]
    score, board, play = end.split("; ")
    assert score == f"return {sum(shown) / len(shown):.2f}"
    assert board == "tensorboard --logdir runs/run"
    argv = play.split()
    assert command(script, *argv, "--eval-episodes", 1).status == 0


def test_target_return(here):
    """Reached by the mean of 100 episodes, no sooner."""
    ppo_continuous.train(tiny(ppo_continuous, 200, target_return=-1e9))
    steps = [row[0] for row in rows(here / "runs" / "run")]
    assert len(steps) >= 100 > sum(step <= steps[-1] - 16 for step in steps)


# ---- Weights & Biases ----


def records(path):  # as in LevelDB's log, of which these files fill less than a block
    data, place = path.read_bytes(), 7
    while place < len(data):
        _, length, _ = struct.unpack("<IHB", data[place : place + 7])
        place += 7 + length
        record = Record.FromString(data[place - length : place])
        yield record.WhichOneof("record_type"), record


def told():
    """What W&B was told of the latest run, from its file."""
    path = max(Path("wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime)
    end = time.monotonic() + 20.0  # W&B's process may write a little later
    while "exit" not in [kind for kind, _ in records(path)] and time.monotonic() < end:
        time.sleep(0.1)
    seen = SimpleNamespace(rows=[], files=[], axes={})
    for kind, record in records(path):
        if kind == "run":
            seen.run = record.run
        elif kind == "history":
            row = {x.key or x.nested_key[0]: json.loads(x.value_json) for x in record.history.item}
            seen.rows.append(row)
        elif kind == "metric":
            seen.axes[record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            seen.files += [part.path for part in record.artifact.manifest.contents]
        elif kind == "exit":
            seen.exit = record.exit.exit_code
    return seen


def test_wandb(here, monkeypatch):
    """Several runs in one process, some of which fail: each its own, whatever its folder's name."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(here / "data"))
    wandb.teardown()  # it keeps to the folder of its first run
    seen = {}
    for name in ("ü", "fails at once", "x" * 124, "fails", "$(a)?*[b]:#%"):
        Walk.steps.clear()
        last = {"fails": 40, "fails at once": 5}.get(name, 10**6)
        off = staticmethod(lambda last=last: 1 / (len(Walk.steps) < last))
        monkeypatch.setattr(Walk, "hook", off)
        args = tiny(ppo_continuous, run_name=str(here / name), track=True, wandb_project_name="own")
        if "fails" in name:
            with pytest.raises(ZeroDivisionError):
                ppo_continuous.train(args)
        else:
            ppo_continuous.train(args)
        assert wandb.run is None
        seen[name] = told()
    assert len({x.run.run_id for x in seen.values()}) == 5
    for name, x in seen.items():
        assert (x.run.display_name, x.run.project, x.exit) == (name, "own", "fails" in name)
        assert x.axes["*"] == "global_step"
        assert {*x.files} == (set() if "fails" in name else {"last.pt"})
        points = {} if name == "fails at once" else scalars(here / name)
        for tag, values in points.items():
            logged = [(row["global_step"], row[tag]) for row in x.rows if tag in row]
            assert logged == [(step, pytest.approx(value, rel=1e-5)) for step, value in values]
        tags = "losses/entropy", "charts/episodic_return"
        assert len(x.rows) == sum(len(points.get(tag, [])) for tag in tags)


def test_wandb_without_login(here, command, monkeypatch):
    """Kept offline with one line about it; nothing is asked."""
    for name in ("WANDB_DATA_DIR", "HOME", "NETRC"):
        monkeypatch.setenv(name, str(here / "nothing"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    wandb.teardown()  # it keeps to the folder of its first run
    args = tiny(ppo_kl_penalty, track=True, run_name=str(here / "run"))
    outcome = command(ppo_kl_penalty, *options(args))
    assert outcome.status == 0 and outcome.out.count("wandb login") == 1
    assert told().exit == 0
