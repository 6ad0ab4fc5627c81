"""Studies: run, left out when done, summarised, drawn; and what is read of real runs."""

import importlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import envs
import numpy as np
import pytest
import torch
import tyro
from fakes import tiny
from PIL import Image
from scipy import stats

import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))

import animate  # noqa: E402
import details  # noqa: E402
import healthy  # noqa: E402
import plot  # noqa: E402
import run as runner  # noqa: E402
import unclipped  # noqa: E402

speed = plot.speed

# In place of a script: 150 episodes, of which the last 100 return 2 on average.
SCRIPT = """
import json, pathlib, sys
run = pathlib.Path("runs", sys.argv[sys.argv.index("--run-name") + 1])
assert "--resume" in sys.argv and "--gamma" not in sys.argv, "--gamma is wrong"
run.mkdir(parents=True)
args = {"env_id": "Task-v5", "total_timesteps": 1500}
(run / "args.json").write_text(json.dumps({"args": args, "versions": "torch 1", "git": "abc"}))
rows = [f"{10 * i},{1e9 + i},{0 if i <= 50 else 1 + 2 * (i % 2)},10" for i in range(1, 151)]
(run / "episodes.csv").write_text("\\n".join(["global_step,wall_time,return,length", *rows]))
sys.exit("--seed 2" in " ".join(sys.argv) and "error: it became NaN")
"""
DOCS = "a\n<!-- results, made -->\nold\n<!-- end -->\nb\n<!-- objectives -->\n<!-- end -->\nc\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a script and small studies, one of which cannot work."""
    results, docs = tmp_path / "benchmark" / "results", tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text(DOCS)
    results.mkdir(parents=True)
    (results.parent / "README.md").write_text("<!-- provenance -->\n<!-- end -->\n")
    (tmp_path / "ppo_fake.py").write_text(SCRIPT)
    for module, names in ((runner, {"ROOT": tmp_path}), (plot, {"DOCS": docs})):
        for name, value in (names | {"RESULTS": results}).items():
            monkeypatch.setattr(module, name, value)
    studies = {"small": [("ppo_fake.py", "Task-v5", 2, "--flag 1")]}
    studies |= {"wrong": [("ppo_fake.py", "Task-v5", 1, "--gamma 2")]}
    monkeypatch.setattr(runner, "STUDIES", studies)
    return tmp_path


def test_a_study_from_its_runs_to_its_picture(project, monkeypatch):
    wrong = r"these runs failed:\nwrong, Task-v5__ppo_fake__1: (.|\n)*gamma"
    with pytest.raises(SystemExit, match=wrong):
        runner.main(("all",), workers=2)  # the others go on
    folder = project / "benchmark" / "results" / "small"
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    for seed in (1, 2):
        summary = json.loads((folder / f"Task-v5__ppo_fake__{seed}.json").read_text())
        assert summary["command"] == f"python ppo_fake.py --env-id Task-v5 --seed {seed} --flag 1"
        assert (summary["script"], summary["git"]) == ("ppo_fake.py", "abc")
        assert (summary["final_mean_return"], summary["episodes"]) == (2.0, 150)
        assert (summary["global_step"], summary["wall_time"]) == (1500, 149.0)
        assert summary["curve"][0] == [10, 0.0] and len(summary["curve"]) == 150
        assert summary["processor"] == speed.processor()
        assert summary.get("diverged") == (None, "error: it became NaN")[seed - 1]
    row = "small", "Task-v5", "ppo_fake.py", "defaults", "7", ""
    monkeypatch.setattr(plot, "DOCS_ROWS", (row,))
    plot.main()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| Task-v5 | ppo_fake.py | 1,500 | 2.0, 2.0 |" in (folder / "table.md").read_text()
    docs = (project / "docs" / "results.md").read_text()
    assert "| Task-v5 | `ppo_fake.py` | 0.0015M | defaults | 2.0, 2.0 | 2.0 ± 0.0 | 7 | – |" in docs
    parts = re.split(r"<!--.*-->", docs)  # what is not between the marks stays
    assert [part.strip() for part in parts][::2] == ["a", "b", "c"] and "old" not in docs
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, **__: pytest.fail("it is done"))
    runner.main(("small",), workers=1)
    with pytest.raises(SystemExit, match="no study mujocco; there are small, wrong"):
        runner.main(("small", "mujocco"))


def test_flags_of_all_studies_are_known():
    for (script, _, _, flags, *_), *_ in runner.STUDIES.values():
        if script != runner.CLEANRL_SCRIPT:
            known = {"details": "ppo_continuous"}.get(Path(script).stem, Path(script).stem)
            names = {"detail", *importlib.import_module(known).Args.__dataclass_fields__}
            for flag in re.findall(r"--(?:no-)?([\w-]+)", flags):
                assert flag.replace("-", "_") in names, (script, flag)


def test_tables_are_those_of_the_results(tmp_path):
    for study in ("paper", "cleanrl", "details"):
        shutil.copytree(plot.RESULTS / study, tmp_path / study)
    measured = json.loads((plot.RESULTS / "speed" / "speed.json").read_text())
    tables = {"results": plot.results(), "speed": speed.summarize(measured)}
    tables["objectives"] = plot.paper(tmp_path / "paper")
    tables["cleanrl"] = plot.cleanrl(tmp_path / "cleanrl", speed.medians(measured))
    tables["details"] = plot.details(tmp_path / "details")
    tables["starts"] = speed.summarize_starts(measured)
    tables |= {"pong": plot.pong(plot.RESULTS / "pong"), "provenance": plot.provenance()}
    for name, table in tables.items():
        paths = [*plot.DOCS.glob("*.md"), ROOT / "benchmark" / "README.md"]
        (text,) = (x for x in map(Path.read_text, paths) if f"<!-- {name}" in x)
        assert plot.fill(text, name, table) == text != plot.fill(text, name, ["| another |"])
    for study in ("paper", "cleanrl", "details"):
        made, kept = (folder / study / "table.md" for folder in (tmp_path, plot.RESULTS))
        assert made.read_text() == kept.read_text()


@pytest.mark.parametrize("draw", ["normal", "two peaks"])
def test_95_percent_intervals_contain_the_truth_that_often(draw):
    """Welch's, of a difference and of a mean over tasks; also of tasks like HalfCheetah."""
    rng, hits, n = np.random.default_rng(1), [], 4000
    for _ in range(n):
        a, b = rng.normal(3.0, 1.0, 10), rng.normal(2.0, 3.0, 5)
        if draw == "two peaks":  # 0 or 1, and some noise
            a, b = ((rng.random(m) < 0.5) + x / 10 for m, x in ((10, a), (5, b)))
        _, low, high = plot.interval([a, b], [1.0, -1.0])
        truth = 1.0 if draw == "normal" else 0.1
        _, low_mean, high_mean = plot.interval([a, b], [0.5, 0.5])
        middle = 2.5 if draw == "normal" else 0.75
        hits.append((low < truth < high, low_mean < middle < high_mean))
    assert np.abs(np.mean(hits, axis=0) - 0.95).max() < (0.01 if draw == "normal" else 0.02)
    ours, scipys = plot.interval([a, b], [1.0, -1.0]), stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(ours[1:], scipys.confidence_interval())


def test_details_without_effect_are_seldom_seen():
    """Three runs of each; on one task, as on HalfCheetah, most seeds end low, some much higher."""
    rng, wrong = np.random.default_rng(1), []
    for _ in range(1000):
        draw = lambda n: (rng.random(n) < 0.3) + rng.normal(0.0, 0.1, n)  # noqa: E731
        samples = {"a": {"": draw(10)} | {name: draw(3) for name in "123456789"}}
        samples["b"] = {"": rng.normal(size=5)} | {name: rng.normal(size=3) for name in "1234"}
        samples["b"]["1"] = samples["b"]["1"] - 2.0  # which is worth 2 there, so 1 on average
        found = plot.comparisons(samples, "")
        assert found.keys() == {*"123456789"}
        right = found["1"][1] < 1.0 < found["1"][2]
        wrong.append(
            not right or any(x[1] > 0.0 or x[2] < 0.0 for k, x in found.items() if k > "1")
        )
    assert np.mean(wrong) < 0.06
    samples = {"a": {"": rng.normal(size=9), "1": rng.normal(size=4)}}
    expected = stats.ttest_ind(*samples["a"].values()).confidence_interval()
    np.testing.assert_allclose(plot.comparisons(samples, "")["1"][1:3], expected)


SEEN = {}  # detail: weights after a short training


@pytest.mark.parametrize("name", ["", *details.DETAILS])
def test_a_detail_switched_off_changes_what_is_learned(here, monkeypatch, name):
    """Each in a copy of the script, whose changes end with the test."""
    copy = importlib.util.spec_from_file_location("copy_of_script", ppo_continuous.__file__)
    script = importlib.util.module_from_spec(copy)
    monkeypatch.setitem(sys.modules, copy.name, script)
    copy.loader.exec_module(script)
    monkeypatch.setattr(details, "ppo", script)
    for module, attribute in ((script.gym.vector, "SyncVectorEnv"), (script.nn, "Tanh")):
        monkeypatch.setattr(module, attribute, getattr(module, attribute))
    detail = details.DETAILS.get(name, details.Detail(0, ""))
    detail.change()
    flags = f"--env-id {envs.register(envs.Walk, envs.LIMIT)} --num-envs 2 --num-steps 16"
    flags += " --num-minibatches 4 --update-epochs 2 --total-timesteps 96 --learning-rate 0.02"
    flags += f" --no-compile --run-name run {detail.flags.replace('2048', '32')}"
    script.train(tyro.cli(script.Args, args=flags.split()))
    weights = torch.load("runs/run/checkpoints/last.pt")["agent"].items()
    SEEN[name] = torch.cat([x.flatten() for key, x in weights if "normalize" not in key]).tolist()
    assert [x for x in SEEN if SEEN[x] == SEEN[name]] == [name]


def test_details_of_atari_are_switched_off(monkeypatch):
    monkeypatch.setattr(details.ppo_atari, "AtariVectorEnv", details.ppo_atari.AtariVectorEnv)
    monkeypatch.setattr(details.ppo_atari.Envs, "step", details.ppo_atari.Envs.step)
    played = {}
    for name in ("", "no-life-loss", "no-maximum-over-frames", "rewards-as-they-are"):
        details.ATARI_DETAILS.get(name, details.Detail(0, "")).change()
        args = details.ppo_atari.Args("BeamRiderNoFrameskip-v4", num_envs=4)
        games = details.ppo_atari.Envs(args, [1, 0])
        games.reset()
        rng = np.random.default_rng(1)
        steps = [games.step(rng.integers(9, size=4)) for _ in range(500)]
        played[name] = steps, sum(games.returns) + sum(x for *_, x, _ in games.finished)
        games.close()
    ends = {name: sum(x.dones.sum() for x in steps) for name, (steps, _) in played.items()}
    assert ends["no-life-loss"] < ends[""]
    both = zip(played[""][0], played["no-maximum-over-frames"][0])
    assert any((x.obs != y.obs).any() for x, y in both)
    rewards = {name: sum(x.rewards.sum() for x in steps) for name, (steps, _) in played.items()}
    assert rewards["rewards-as-they-are"] == played["rewards-as-they-are"][1] > rewards[""]


def test_speeds_of_two_machines_are_not_mixed(tmp_path, monkeypatch):
    """And nothing is measured twice."""
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(speed, "CONTESTS", {"Pong": {"CleanRL": "", "ours": ""}})
    monkeypatch.setattr(speed, "SWEEPS", {"Pong": ("", 1024)})
    monkeypatch.setattr(speed, "SWEEP", (8,))
    monkeypatch.setattr(speed, "STARTS", {"Pong": ""})
    monkeypatch.setattr(speed, "simulators_alone", lambda seconds: {"Pong": {"8": 157.3}})
    rates = itertools.count(100.0, 50.0)
    monkeypatch.setattr(speed, "run", lambda *_: speed.Measurement(next(rates), 1, 7, None, 9))
    speed.main(1, {}, {"baseline": "python"})
    monkeypatch.setattr(speed, "run", lambda *_: pytest.fail("measures what is there"))
    speed.main(1, {}, {})
    table = (tmp_path / "table.md").read_text()
    rows = ("ours | 150 (150) | 1.50 | 1 |", "warm | 7 | – | 9 |", "8 | 157 | 3333 |")
    assert all(f"| Pong | {row}" in table for row in rows)
    report = json.loads((tmp_path / "speed.json").read_text())
    (tmp_path / "speed.json").write_text(json.dumps(report | {"machine": "other"}))
    with pytest.raises(SystemExit, match=r"is of another machine \(other\)"):
        speed.main(1, {}, {})


def test_what_is_read_of_a_real_run(here, monkeypatch):
    """Its episodes, its speed, and an animation of its agent; the run stays as it was."""
    args = tiny(ppo_kl_penalty, 12, env_id="CartPole-v1", num_steps=64, num_minibatches=2)
    args.total_timesteps = 12 * 128
    ppo_kl_penalty.train(args)
    run = here / "runs" / "run"
    episodes = runner.episodes_in_csv(run)
    assert episodes and abs(episodes[-1][1] - time.time()) < 60.0
    one = speed.measure(f"{sys.executable} -c 0", here, os.environ)  # as if it had written that
    assert one.steps_per_second > 1.0 and one.first < 0.0 < one.end and one.solved is None
    commands, before = [], {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    def call(command, check):
        commands.append(Path(command[1]).name)
        monkeypatch.setattr(sys, "argv", [*map(str, command[1:])])
        ppo_kl_penalty.main()

    monkeypatch.setattr(animate, "RESULTS", here / "animations")
    monkeypatch.setattr(animate.subprocess, "run", call)
    animate.main(run / "checkpoints" / "last.pt", "pole", seconds=0.2, fps=10, height=60)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    report = json.loads((here / "animations" / "pole.json").read_text())
    assert commands == [report["script"]] == ["ppo_kl_penalty.py"]
    assert (report["env_id"], report["global_step"]) == ("CartPole-v1", 1536)
    assert len(report["returns"]) == 1
    with Image.open(here / "animations" / "pole.gif") as picture:
        assert picture.size == (90, 60) and 2 <= picture.n_frames <= 3


def test_tasks_that_charge_for_actions_as_they_are():
    """The costs are 0.1 times the squares, also of what the simulator does not do."""
    rewards = []
    args = tiny(ppo_continuous, env_id="unclipped:UnclippedHalfCheetah-v5", num_envs=1)
    for size in (1.0, 3.0):
        envs = ppo_continuous.Envs(args, [1, 0])
        envs.reset()
        rewards.append(envs.step(unclipped.np.full((1, 6), size, "f")).rewards[0])
        envs.envs.close()
    assert rewards[0] - rewards[1] == pytest.approx(0.1 * 6 * (3.0**2 - 1.0**2))


def test_a_healthy_run_is_drawn_from_its_events(here):
    ppo_continuous.train(tiny(ppo_continuous, 24))
    healthy.main(here / "runs" / "run", here / "run.png")
    assert Image.open(here / "run.png").size == (840, 460)
