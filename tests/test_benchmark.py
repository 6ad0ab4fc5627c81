"""The studies behind the README: run, left out when done, resumed, summarised and drawn."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import animate  # noqa: E402
import plot  # noqa: E402
import run as runner  # noqa: E402
import scaling  # noqa: E402

FLAGS = "--total-timesteps 512 --num-envs 4 --num-steps 64 --num-minibatches 4 --update-epochs 1 --no-compile"


MARKED = """before
<!-- results, by hand never -->
old
<!-- end -->
between
<!-- objectives -->
<!-- end -->
after
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with one script and two small studies, one of which cannot work."""
    shutil.copy(ROOT / "ppo_kl_penalty.py", tmp_path)
    results = tmp_path / "benchmark" / "results"
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "RESULTS", results)
    monkeypatch.setattr(plot, "RESULTS", results)
    monkeypatch.setattr(plot, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(MARKED)
    studies = {
        "small": [("ppo_kl_penalty.py", "CartPole-v1", 2, FLAGS)],
        "wrong": [("ppo_kl_penalty.py", "CartPole-v1", 1, "--gamma 2")],
    }
    monkeypatch.setattr(runner, "STUDIES", studies)
    return tmp_path


def test_a_study_from_its_runs_to_its_picture(project, monkeypatch, capsys):
    runner.main(("small",), workers=2)
    folder = project / "benchmark" / "results" / "small"
    files = [folder / f"CartPole-v1__ppo_kl_penalty__{seed}.json" for seed in (1, 2)]
    for seed, file in zip((1, 2), files, strict=True):
        summary = json.loads(file.read_text())
        assert summary["command"] == f"python ppo_kl_penalty.py --env-id CartPole-v1 --seed {seed} {FLAGS}"
        assert summary["args"]["seed"] == seed and summary["versions"]["torch"]
        assert summary["processor"] == plot.speed.processor()
        rows = (project / "runs" / f"small__{file.stem}" / "episodes.csv").read_text().splitlines()[1:]
        returns = [float(row.split(",")[2]) for row in rows][-100:]
        assert summary["final_mean_return"] == pytest.approx(sum(returns) / len(returns), abs=0.01)
        steps = [step for step, _ in summary["curve"]]
        assert summary["episodes"] == len(rows) and steps == sorted(steps)
        assert summary["global_step"] == int(rows[-1].split(",")[0])

    plot.main()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| CartPole-v1 | ppo_kl_penalty.py | 512 |" in (folder / "table.md").read_text()

    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, **__: pytest.fail("runs again what is done"))
    runner.main(("small",), workers=1)


def test_a_failure_is_reported_and_leaves_no_result(project):
    with pytest.raises(SystemExit, match=r"these runs failed:(.|\n)*--gamma must be between 0 and 1"):
        runner.main(("wrong",), workers=1)
    assert not (project / "benchmark" / "results" / "wrong").exists()


def test_a_run_that_cannot_start_does_not_keep_the_others(project, monkeypatch):
    """CleanRL without its interpreter, for example."""
    wrong = [(runner.CLEANRL_SCRIPT, "Hopper-v4", 1, "--total-timesteps 1500")]
    small = [("ppo_kl_penalty.py", "CartPole-v1", 2, FLAGS)]
    monkeypatch.setattr(runner, "STUDIES", {"wrong": wrong, "small": small})
    with pytest.raises(SystemExit, match=r"these runs failed:\nwrong, Hopper-v4__\w+__1: .*none"):
        runner.main(("all",), workers=1, baseline="/none", cleanrl="/none")
    assert len(list((project / "benchmark" / "results" / "small").iterdir())) == 2


def test_sigterm_ends_the_runs_as_well(project):
    """Or they would go on, and the same command would start them a second time."""
    study = project / "runs" / "small__CartPole-v1__ppo_kl_penalty__1"
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "benchmark")!r})
import run
run.ROOT = run.Path({str(project)!r})
run.RESULTS = run.ROOT / "benchmark" / "results"
run.STUDIES = {{"small": [("ppo_kl_penalty.py", "CartPole-v1", 2, "--no-compile --total-timesteps 9999999")]}}
signal.signal(signal.SIGTERM, run.stop)
run.main(("small",), workers=1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60.0
        while not (study / "checkpoints" / "last.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        before = (study / "checkpoints" / "last.pt").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60.0) == 128 + signal.SIGTERM
    assert (study / "checkpoints" / "last.pt").read_bytes() != before
    assert [path.name for path in (project / "runs").iterdir()] == [study.name]
    assert not list((project / "benchmark").rglob("*.json"))


def test_nothing_starts_once_the_queue_is_stopping(project, monkeypatch):
    """As between SIGTERM and the end of the last run."""
    stopping = threading.Event()
    stopping.set()
    monkeypatch.setattr(runner, "STOPPING", stopping)
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, **__: pytest.fail("it starts"))
    runner.main(("small",), workers=1)


def test_an_unknown_study_is_refused(project):
    with pytest.raises(SystemExit, match="no study mujocco; there are small, wrong"):
        runner.main(("small", "mujocco"))


CLEANRL = """
import sys
from torch.utils.tensorboard import SummaryWriter
env_id, seed = sys.argv[sys.argv.index("--env-id") + 1], sys.argv[sys.argv.index("--seed") + 1]
writer = SummaryWriter(f"runs/{env_id}__{seed}")
for i in range(150):
    writer.add_scalar("charts/episodic_return", i * int(seed), 10 * (i + 1))
writer.close()
"""


def test_cleanrl_is_run_and_read(project, monkeypatch):
    checkout = project / "checkout"
    (checkout / "cleanrl").mkdir(parents=True)
    (checkout / "cleanrl" / "ppo_continuous_action.py").write_text(CLEANRL)
    for command in ("init -q", "add .", "-c user.name=a -c user.email=b commit -qm c"):
        subprocess.run(["git", "-C", checkout, *command.split()], check=True)
    study = [(runner.CLEANRL_SCRIPT, "Hopper-v4", 2, "--total-timesteps 1500")]
    monkeypatch.setattr(runner, "STUDIES", {"cleanrl": study})
    runner.main(("cleanrl",), workers=1, cleanrl=str(checkout))
    folder = project / "benchmark" / "results" / "cleanrl"
    summary = json.loads((folder / "Hopper-v4__ppo_continuous_action__2.json").read_text())
    assert summary["final_mean_return"] == 2 * 99.5  # of episodes 50 to 149
    assert summary["curve"][0] == [10, 0.0] and summary["curve"][-1] == [1500, 199.0]
    assert summary["args"] == {"env_id": "Hopper-v4", "seed": 2, "total_timesteps": 1500}
    assert summary["versions"]["torch"] and len(summary["git_commit"]) == 40


def test_the_difference_to_cleanrl(project):
    results = project / "benchmark" / "results"
    curve = {"curve": [[1, 0.0], [1000, 1.0]]}
    write_runs(results / "mujoco", "Hopper-v5", "ppo_continuous.py", [300.0, 320.0, 340.0], **curve)
    write_runs(results / "mujoco", "Ant-v5", "ppo_continuous.py", [*range(1, 10), 100], **curve)
    write_runs(results / "cleanrl", "Hopper-v4", "CleanRL", [200.0, 210.0, 220.0], **curve)
    plot.main()
    *_, row = (results / "cleanrl" / "table.md").read_text().splitlines()
    assert row.startswith("| Hopper | 320.0 ± 20.0 (3) | 210.0 ± 10.0 (3) | 110.0 | ")
    low, high = map(float, row.split("|")[-2].split(" to "))
    assert 84.0 < low < 88.0 and 132.0 < high < 136.0  # 90 to 130 from the seeds as they are
    assert (results / "cleanrl" / "curves.png").exists()
    each = "1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 100.0"  # in order of seeds
    assert f"| {each} | 5.5 | 14.5 ± " in (results / "mujoco" / "table.md").read_text()


def write_runs(folder: Path, task: str, script: str, finals: list[float], **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"args": {"env_id": task, "total_timesteps": 1000}, "script": script, "wall_time": 60.0}
    for seed, final in enumerate(finals, 1):
        run = about | {"final_mean_return": final, "global_step": 1000} | more
        (folder / f"{task}__{Path(script).stem}__{seed}.json").write_text(json.dumps(run))


@pytest.mark.parametrize(("last_episodes", "shown"), [([999, 960], "1,000"), ([999, 612], "612")])
def test_a_run_that_was_stopped_shows_where(last_episodes, shown):
    """The last episode of a whole one ends some steps before the last step."""
    runs = [{"args": {"total_timesteps": 1000}, "global_step": step} for step in last_episodes]
    assert f"{plot.steps_of(runs):,}" == shown


def test_the_table_of_the_paper(project):
    """Scores by hand: task A goes from 10 to 110, task B from -1 to 1."""
    folder = project / "benchmark" / "results" / "paper"
    for objective, a, b in (
        ("random", [10.0], [-1.0]),
        ("none", [10.0, 10.0], [-2.0, 0.0]),
        ("clip-0.2", [110.0, 60.0], [1.0, 1.0]),
        ("fixed-1", [60.0, 60.0], []),
        ("fixed-3", [60.0, 70.0], [0.0]),
    ):
        write_runs(folder / objective, "A-v5", "ppo_continuous.py", a)
        write_runs(folder / objective, "B-v5", "ppo_continuous.py", b)
    plot.paper(folder)
    head, _, *rows = (folder / "table.md").read_text().splitlines()
    assert head == "| objective | runs | score | 95 % | paper | A | B |"
    assert rows[0] == "| none | 4 | 0.00 | -0.35 to 0.35 | -0.39 | 10.0 | -1.0 |"
    assert rows[1] == "| clip-0.2 | 4 | 0.88 | 0.70 to 1.05 | 0.82 | 85.0 | 1.0 |"
    assert rows[2] == "| fixed-1 | 2 |  |  | 0.71 | 60.0 |  |"  # no score before every task is there
    assert rows[3] == "| fixed-3 | 3 | 0.53 |  | 0.72 | 65.0 | 0.0 |"  # no interval before two seeds of all
    assert rows[5] == "Scores 0 to 1 stand for: A-v5 10.0 to 110.0, B-v5 -1.0 to 1.0."
    assert rows[7] == "| each seed | A | B |"
    assert rows[9:] == [
        "| none | 10.0, 10.0 | -2.0, 0.0 |",
        "| clip-0.2 | 110.0, 60.0 | 1.0, 1.0 |",
        "| fixed-1 | 60.0, 60.0 |  |",
        "| fixed-3 | 60.0, 70.0 | 0.0 |",
    ]
    assert (folder / "table1.png").exists()


def test_one_objective_alone_has_no_score(project):
    """It would be measured by its own best run."""
    folder = project / "benchmark" / "results" / "paper"
    for objective, final in (("random", 10.0), ("none", 20.0)):
        write_runs(folder / objective, "A-v5", "ppo_continuous.py", [final])
    plot.paper(folder)
    assert "| none | 1 |  |  | -0.39 | 20.0 |" in (folder / "table.md").read_text()
    assert not (folder / "table1.png").exists()


def test_the_tables_of_readme(project):
    """Only what is between their marks is made anew."""
    results = project / "benchmark" / "results"
    curve = {"curve": [[1, 0.0], [1000, 1.0]]}
    write_runs(results / "mujoco", "Hopper-v5", "ppo_continuous.py", [300.0, 320.0, 340.0], **curve)
    for objective, final in (("random", 10.0), ("none", 10.0), ("clip-0.2", 110.0)):
        write_runs(results / "paper" / objective, "A-v5", "ppo_continuous.py", [final])
    plot.main()
    before, results, between, objectives, after = re.split(r"\n\n?<!--.*-->\n", plot.README.read_text())
    assert (before, between, after) == ("before", "between", "after\n")
    (row,) = results.splitlines()[3:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:4] == ["Hopper-v5", "`ppo_continuous.py`", "0.001M", "defaults"]
    assert cells[4:] == ["300, 320, 340", "320 ± 20", "2383 ± 272", "2316"]
    assert objectives.splitlines()[3:] == [
        "| none | 1 | 0.00 |  | -0.39 |",
        "| clip-0.2 | 1 | 1.00 |  | 0.82 |",
    ]


def test_tasks_that_charge_for_actions_as_they_are():
    """The forces are the same, since the simulator limits them; the costs are 0.1 times the squares."""
    rewards, states = [], []
    for size in (1.0, 3.0):
        with closing(gym.make("unclipped:UnclippedHalfCheetah-v5")) as env:
            env.reset(seed=1)
            state, reward, *_ = env.step(np.full(6, size, dtype=np.float32))
            assert (env.action_space.low == -np.inf).all() and (env.action_space.high == np.inf).all()
        rewards.append(reward)
        states.append(state)
    np.testing.assert_array_equal(*states)
    assert rewards[0] - rewards[1] == pytest.approx(0.1 * 6 * (3.0**2 - 1.0**2))
    run = runner.Run("unclipped", "ppo_kl_penalty.py", "unclipped:UnclippedReacher-v5", 1, "")
    assert run.result.name == "unclipped-UnclippedReacher-v5__ppo_kl_penalty__1.json"


def test_the_model_of_scaling():
    """One process sends nothing; two send half of the vector twice, in 2 hops, for every reduction."""
    assert scaling.predict(3.0, 1, 320, 1_000, 1e-4, 1e9) == 3.0
    expected = 3.0 + 320 * 2 * (1e-4 + 4 * 500 / 1e9)
    assert scaling.predict(3.0, 2, 320, 1_000, 1e-4, 1e9) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["machine", "versions", "burn_in_iterations"])
def test_speeds_of_two_surroundings_are_not_mixed(name, tmp_path, monkeypatch):
    """Another machine or version ends with a line; in the same nothing is measured twice."""
    monkeypatch.setattr(plot.speed, "RESULTS", tmp_path)
    monkeypatch.setattr(plot.speed, "CONTESTS", {"Pong": {"CleanRL": "", "ours": ""}})
    monkeypatch.setattr(plot.speed, "SWEEPS", {})
    monkeypatch.setattr(plot.speed, "SIMULATORS", {})
    monkeypatch.setattr(plot.speed, "run", lambda *_: plot.speed.Measurement(100.0, 1.0, None, ()))
    plot.speed.main(1, {}, {"baseline": "python"})
    report = json.loads((tmp_path / "speed.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", report["git_commits"]["Pong"])
    report |= {"first_iteration": {"Pong": {"empty": 24.5, "warm": 7.5}}}
    row = {"steps_per_second": 400, "env": 300.4, "act": 1200.0, "update": 999.6}
    report |= {"sweep": {"Pong": {"8": row}}}
    report |= {"simulators_alone": {"Pong": {"8": 157.3}}}
    (tmp_path / "speed.json").write_text(json.dumps(report))
    monkeypatch.setattr(plot.speed, "run", lambda *_: pytest.fail("measures what is there"))
    plot.speed.main(1, {}, {})
    machine, *table = (tmp_path / "table.md").read_text().splitlines()
    assert machine.startswith(f"{plot.speed.processor()}, {os.cpu_count()} cores, ")
    assert "| Pong | CleanRL | 100 (100) | 1.00 | 1 |" in table and "| Pong | 24.5 | 7.5 |" in table
    assert "| Pong | 8 | 400 | 300, 1200, 1000 | 157 |" in table
    (tmp_path / "speed.json").write_text(json.dumps(report | {name: "other"}))
    with pytest.raises(SystemExit, match=rf"is of another {name} \(other\)"):
        plot.speed.main(1, {}, {})
    assert json.loads((tmp_path / "speed.json").read_text()) == report | {name: "other"}


def test_first_iterations_begin_with_an_empty_cache(monkeypatch):
    """Each round has a cache of its own, which its second run finds filled."""
    seen = []

    def run(command, words, environment):
        cache = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
        seen.append((cache, len(list(cache.iterdir()))))
        (cache / "kernel").touch()
        return plot.speed.Measurement(1.0, 1.0, 10.0 if seen[-1][1] else 20.0 + len(seen), ())

    monkeypatch.setattr(plot.speed, "run", run)
    monkeypatch.setattr(plot.speed, "SWEEPS", {"Pong": None})
    assert plot.speed.first_iterations(3, {}, {}) == {"Pong": {"empty": 23.0, "warm": 10.0}}
    assert [files for _, files in seen] == [0, 1] * 3 and len({cache for cache, _ in seen}) == 3


def test_simulators_alone(monkeypatch):
    """All games take a step in one call; robots take theirs one after the other."""
    monkeypatch.setattr(plot.speed, "SWEEP", (1, 4))
    monkeypatch.setattr(plot.speed.time, "perf_counter", itertools.count().__next__)  # a step takes a second
    rows = plot.speed.simulators_alone(seconds=6.0)
    robot, games = {1: 1.2e6, 4: 1.2e6}, {1: 1.2e6, 4: 0.3e6}  # 5 calls within 6 seconds
    assert rows == {"HalfCheetah": robot, "Pong": games}


def test_an_animation_of_an_agent(tmp_path, monkeypatch):
    """Of one episode; the run stays as it was."""
    monkeypatch.setattr(animate, "RESULTS", tmp_path / "animations")
    command = [sys.executable, ROOT / "ppo_kl_penalty.py", "--env-id", "CartPole-v1", "--run-name", "pole"]
    subprocess.run([*command, *FLAGS.split()], cwd=tmp_path, check=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpoint = tmp_path / "runs" / "pole" / "checkpoints" / "last.pt"
    animate.main(checkpoint, "pole", seconds=0.2, fps=10, height=60)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {path.name for path in after.keys() - before} == {"animations", "pole.gif", "pole.json"}
    assert all(after[path] == when for path, when in before.items() if path.is_file())
    report = json.loads((tmp_path / "animations" / "pole.json").read_text())
    assert report["script"] == "ppo_kl_penalty.py" and report["env_id"] == "CartPole-v1"
    assert len(report["returns"]) == 1 and report["global_step"] == 512
    with Image.open(tmp_path / "animations" / "pole.gif") as picture:
        assert picture.size == (90, 60) and 2 <= picture.n_frames <= 3


def test_the_processor_is_named(monkeypatch):
    about = "model name\t: Fast 9\nflags\t\t: fpu avx512_bf16 amx_bf16\n"
    monkeypatch.setattr(Path, "read_text", lambda _: about * 2)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert plot.speed.processor() == "Fast 9, amx_bf16, avx512_bf16"
    monkeypatch.setattr(Path, "exists", lambda _: False)  # macOS, Windows
    monkeypatch.setattr(plot.speed.platform, "processor", lambda: "arm")
    assert plot.speed.processor() == "arm"
