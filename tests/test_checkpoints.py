"""What has been saved is never lost: resuming, kills, signals, full disks, broken files."""

import copy
import errno
import os
import random
import shutil
import signal
import time
from itertools import pairwise

import fakes
import pytest
import torch
from fakes import SCRIPTS, VECTOR_SCRIPTS, Walk, after, options, over_scripts, rows, scalars, tiny

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

pytestmark = pytest.mark.usefixtures("small_network")
terminate = lambda: signal.raise_signal(signal.SIGTERM)  # noqa: E731
RESUME = ["--resume", "--run-name", "run"]


def read(folder, name="last.pt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def assert_equal(a, b, where="checkpoint"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_equal(a[name], b[name], name)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f"{where}: {a}, {b}"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory, small_network):
    return tmp_path_factory.mktemp("originals")


@pytest.fixture
def stopped(originals, here):
    """Gives runs/run, which would have 5 iterations and was ended after 2."""

    def duplicate(script, name="run"):
        folder = originals / script.__name__
        if not folder.exists():
            with after(script, 2, terminate), pytest.raises(KeyboardInterrupt):
                script.train(tiny(script, 5, run_name=str(folder), gamma=0.9))
        return shutil.copytree(folder, here / "runs" / name)

    return duplicate


# ---- resuming ----


@over_scripts(SCRIPTS)
def test_resuming_goes_on(script, stopped, command, monkeypatch):
    """Twice from one checkpoint, bit by bit the same, on other episodes than at first."""
    folders = [stopped(script, name) for name in ("a", "b")]
    reset, saved, begun = script.Envs.reset, read(folders[0]), []
    states = []

    def spy(envs):
        begun.append((list(envs.seeds), envs.global_step, torch.get_rng_state()))
        return reset(envs)

    monkeypatch.setattr(script.Envs, "reset", spy)
    fakes.next_second()
    for folder in folders:
        with after(script, 1, lambda: states.append(copy.deepcopy(runs[0].state))) as runs:
            assert command(script, "--resume", "--run-name", folder.name).status == 0
        assert begun[-1][1] == 32 and torch.equal(begun[-1][2], saved["rng"])
        assert states[-1]["optimizer"]["step"] == saved["optimizer"]["step"] + 4 == 12
        assert all(states[-1][name] == saved[name] for name in ("best", "wandb_id", "csv_size"))
        assert states[-1]["returns"][: len(saved["returns"])] == saved["returns"]
    args = {"run_name": "b", "resume": True}
    last, again = map(read, folders)
    last["args"] |= args
    assert_equal(last, again)
    assert last["args"] == saved["args"] | args
    assert last["global_step"] == 80 and last["optimizer"]["step"] == 20
    first = script.Envs(tiny(script), [1, 0])
    first.envs.close()
    assert begun[0][0] == begun[1][0] != list(first.seeds)
    points = {name: [y for _, y in xy] for name, xy in scalars(folders[0]).items()}
    lr = [script.Args().learning_rate * (1 - i / 5) for i in range(5)]
    assert points["charts/learning_rate"] == pytest.approx(lr)
    if script is not ppo_atari:
        assert last["agent"]["normalize.count"] == last["return_stats"][0] == 80
    if script is ppo_kl_penalty:
        betas, kls = points["charts/kl_coef"], points["losses/kl"]
        adapted = [script.adapt_kl_coef(beta, kl, 0.01) for beta, kl in zip(betas, kls)]
        assert betas == [1.0, *adapted[:-1]] != [1.0] * 5 and last["kl_coef"] == adapted[-1]
        fixed = "--kl-mode", "fixed", "--kl-coef", 3.0, "--total-timesteps", 96
        assert command(script, "--resume", "--run-name", "b", *fixed).status == 0
        assert scalars(folders[1])["charts/kl_coef"][-1][1] == 3.0


@over_scripts(SCRIPTS)
def test_what_does_not_fit(script, stopped, command):
    folder, atari = stopped(script), script is ppo_atari
    before, others = contents(folder), ["Full-v0"] if atari else ["Wide-v0", "Multi-v0"]
    changes = [["--env-id", other] for other in others]
    changes += [["--no-shared-network"], ["--channels", "16"]] * atari
    for change in changes:
        for argv in (RESUME, ["--evaluate", "run"])[: len(change)]:
            assert command(script, *argv, *change).refusal
        assert contents(folder) == before


@over_scripts(VECTOR_SCRIPTS)
def test_resume_starts_and_ends(script, here, command):
    args = [*options(tiny(script)), "--resume"]
    assert command(script, *args).status == 0
    before, points = read(here / "runs" / "run"), scalars(here / "runs" / "run")
    outcome = command(script, *args)
    assert outcome.status == 0 and "--evaluate runs/run" in outcome.out
    mean = sum(before["returns"]) / len(before["returns"])
    assert script.train(tiny(script, resume=True)) == pytest.approx(mean)  # to a sweep run again
    assert_equal(read(here / "runs" / "run"), before)
    assert scalars(here / "runs" / "run") == points
    changes = ["--total-timesteps", "80", "--no-anneal-lr"]
    line, *_ = command(script, *RESUME, *changes).out.splitlines()
    assert all(change in line for change in changes)
    before["args"] |= {"total_timesteps": 80, "anneal_lr": False}
    assert read(here / "runs" / "run")["args"] == before["args"]
    (here / "runs" / "run" / "episodes.csv").unlink()
    assert command(script, *RESUME, "--total-timesteps", "112").status == 0
    assert rows(here / "runs" / "run")[0][0] > 80


@pytest.mark.parametrize("saved", [0, 1])
def test_episodes_after_the_last_checkpoint_come_again(saved, here, command, monkeypatch):
    script, folder = ppo_continuous, here / "runs" / "run"
    args = [*options(tiny(script, 6)), "--resume"]
    with after(script, saved, lambda: runs[-1].save()) as runs, after(script, 3, lambda: 1 / 0):
        with pytest.raises(ZeroDivisionError):
            command(script, *args)
    lost = rows(folder)
    monkeypatch.setattr(Walk, "longer", 10**6)  # none ends before the next checkpoint
    with after(script, 1, terminate):
        assert command(script, *args).status == 143
    kept = [row for row in lost if row[0] <= 16 * saved]
    assert rows(folder) == kept and len(kept) < len(lost)
    assert read(folder)["csv_size"] == (folder / "episodes.csv").stat().st_size  # not as it was
    monkeypatch.setattr(Walk, "longer", 0)
    assert command(script, *args).status == 0
    assert rows(folder)[: len(kept)] == kept and rows(folder)[len(kept)][0] > 16 * (saved + 1)


# ---- what is saved, and when ----


def test_best(here, monkeypatch):
    """The state of the best mean so far, also before resuming; nothing without episodes."""
    script, folder, means = ppo_continuous, here / "runs" / "run", []
    save = script.Run.save

    def saved(run):
        run.state["returns"] = means.pop(0)
        save(run)

    monkeypatch.setattr(script.Run, "save", saved)
    plan = [(1, [[], []], None), (4, [[-3.0], [-1.0], [-2.0], [-2.0]], 48)]
    plan += [(6, [[-1.5], [-1.0], [-1.0]], 48), (7, [[5.0], [0.0]], 112)]
    for iterations, means[:], best in plan:
        script.train(tiny(script, iterations, resume=True, checkpoint_interval=0.0))
        assert means == [] and (folder / "checkpoints" / "best.pt").exists() == bool(best)
        assert best is None or read(folder, "best.pt")["global_step"] == best
        assert read(folder)["global_step"] == 16 * iterations


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(call, stopped, command, monkeypatch):
    """The old files stay as they are; no name is given to what is not on the disk yet."""
    folder, calls = stopped(ppo_continuous), []
    before = contents(folder / "checkpoints")
    real = {"fsync": os.fsync, "replace": os.replace}

    def spy(name, file, *more):
        path = os.readlink(f"/proc/self/fd/{file}") if name == "fsync" else os.path.realpath(file)
        calls.append((name, path))
        if name == call and path.endswith(".pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real[name](file, *more)

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, lambda *args, name=name: spy(name, *args))
        assert "cannot be written" in command(ppo_continuous, *RESUME).refusal
    assert before.items() <= contents(folder / "checkpoints").items()
    assert call != "replace" or calls[-2:] == [("fsync", calls[-1][1]), calls[-1]]
    assert command(ppo_continuous, *RESUME).status == 0 and read(folder)["global_step"] == 80


# ---- files that are no checkpoint ----


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def put(value, *names):  # the last of them is where
    def change(path):
        state = part = torch.load(path, weights_only=True)
        for name in names[:-1]:
            part = part[name]
        new = value(part.pop(names[-1])) if callable(value) else value
        part |= {} if new is KeyError else {names[-1]: new}
        torch.save(state, path)

    return change


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "hostile": put(Hostile(), "rng"),
    "older": put(lambda name: name[:-1] + "3", "format"),
    "other script": put(lambda name: name.replace("ppo_", "other_"), "format"),
    "no format": put(lambda _: KeyError, "format"),
    "no agent": put(lambda _: KeyError, "agent"),
    "half of exp_avg": put(lambda x: x[: len(x) // 2].clone(), "optimizer", "exp_avg"),
    "one of exp_avg": put(lambda x: x[:1].clone(), "optimizer", "exp_avg"),
    "no exp_avg_sq": put(None, "optimizer", "exp_avg_sq"),
}
for value in ([2], b"\xff", None, torch.zeros(2)):
    for name in ("num_envs", "anneal_lr", "env_id"):
        BROKEN[f"{name}: {type(value).__name__}"] = put(value, "args", name)


@pytest.mark.parametrize("name", BROKEN)
@over_scripts(VECTOR_SCRIPTS)
def test_broken_files(script, name, stopped, command):
    folder = stopped(script)
    BROKEN[name](folder / "checkpoints" / "last.pt")
    before = contents(folder)
    for argv in (RESUME, ["--evaluate", "run"])[: 1 + ("exp_avg" not in name)]:
        assert "checkpoint" in command(script, *argv).refusal
    assert contents(folder) == before and not os.path.exists("hacked")


# ---- kills and signals ----


def test_kills(here):
    """At any moment, several times: nothing saved is lost, nothing is there twice."""
    script, folder, chance, steps = ppo_kl_penalty, here / "runs" / "run", random.Random(3), [0]
    argv = [*options(tiny(script, 10**6, checkpoint_interval=0.0)), "--resume"]
    path = folder / "checkpoints" / "last.pt"
    for _ in range(5):
        fakes.next_second()
        begun = time.time_ns()
        process = fakes.start(script, here, *argv)
        try:
            fakes.wait_for(lambda: path.exists() and path.stat().st_mtime_ns > begun)  # noqa: B023
            time.sleep(chance.uniform(0.0, 0.2))
        finally:
            os.kill(process, signal.SIGKILL)
        assert fakes.ended(process) == -signal.SIGKILL
        steps.append(read(folder)["global_step"])
    assert all(a < b for a, b in pairwise(steps))
    last = steps[-1] + 48
    fakes.next_second()
    assert fakes.ended(fakes.start(script, here, *argv, "--total-timesteps", str(last))) == 0
    assert read(folder)["global_step"] == read(folder)["agent"]["normalize.count"] == last
    points, episodes = scalars(folder), rows(folder)
    shown = points.pop("charts/episodic_return")
    assert shown == [(step, pytest.approx(score)) for step, _, score, _ in episodes]
    assert points.pop("charts/episodic_length") == [(step, n) for step, _, _, n in episodes]
    assert [row[:2] for row in episodes] == sorted(row[:2] for row in episodes)
    assert len({score for _, _, score, _ in episodes}) == len(episodes)
    points.pop("charts/SPS")  # not of the first iteration of a process
    for name, values in points.items():
        assert [step for step, _ in values] == list(range(16, last + 1, 16)), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@over_scripts(VECTOR_SCRIPTS)
def test_first_signal(script, number, here, command):
    """Ends the run after the iteration; the handlers are put back, also after an error."""
    with after(script, 2, lambda: signal.raise_signal(number)):
        outcome = command(script, *options(tiny(script)))
    assert outcome.status == 128 + number and outcome.err == ""
    assert "--evaluate runs/run" in outcome.out
    assert read(here / "runs" / "run")["global_step"] == 32
    assert signal.getsignal(number) == signal.SIG_DFL
    with after(script, 2, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        command(script, *options(tiny(script, run_name="other")))
    assert signal.getsignal(number) == signal.SIG_DFL


def test_second_signal(here):
    """Ctrl-C acts at once; SIGTERM does not, since timeout(1) and others send it twice."""

    def hook():  # the second iteration takes 8 seconds
        if len(Walk.steps) == 17:
            print("slow", flush=True)
        time.sleep(0.5 * (len(Walk.steps) > 17))

    def before():
        Walk.steps.clear()
        Walk.hook = staticmethod(hook)

    process = fakes.start(ppo_continuous, here, *options(tiny(ppo_continuous)), before=before)
    fakes.wait_for(lambda: "slow" in (here / "log").read_text())
    for number, pause in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 1.0), (signal.SIGINT, 0.0)):
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        os.kill(process, number)
        time.sleep(pause)
    begun = time.monotonic()
    assert fakes.ended(process) == 130 and time.monotonic() - begun < 1.0
    assert not (here / "runs" / "run" / "checkpoints" / "last.pt").exists()
    assert "Traceback" not in (here / "log").read_text()


def test_interrupt_while_compiling(here):
    """There is nothing to save yet."""
    import torch._inductor.config

    def before():
        os.environ.pop("TORCHDYNAMO_DISABLE")
        torch._dynamo.config.disable = False
        torch._inductor.config.compile_threads = 1
        update = ppo_kl_penalty.update
        ppo_kl_penalty.update = lambda *x: print("compiling", flush=True) or update(*x)

    args = options(tiny(ppo_kl_penalty, compile=True))
    process = fakes.start(ppo_kl_penalty, here, *args, before=before)
    fakes.wait_for(lambda: "compiling" in (here / "log").read_text())
    time.sleep(0.7)
    begun = time.monotonic()
    os.kill(process, signal.SIGINT)
    assert fakes.ended(process) == -signal.SIGINT and time.monotonic() - begun < 3.0
    assert "Traceback" not in (here / "log").read_text()
