"""What README says: its commands work, its links lead somewhere, its scores are those of the results."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_evaluate
from fakes import SCRIPTS

import ppo_atari

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))

import plot  # noqa: E402

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmark" / "README.md"]


def commands() -> list[list[str]]:
    """Script and arguments of all command lines that start one of the scripts, in order, without torchrun."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    starts = [[i for i, word in enumerate(line) if re.fullmatch(r"ppo_\w+\.py", word)] for line in words]
    return [line[start[0] :] for line, start in zip(words, starts, strict=True) if start]


def shrunk(args):
    """The same with batches of 16, and 256 steps instead of 1M, unless it goes on with such a run."""
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "device": "cpu"}
    steps = args.total_timesteps if args.total_timesteps <= 512 else args.total_timesteps // 3_900
    sizes["total_timesteps"] = min(max(16, steps), 512)
    return replace(args, **sizes)


def test_commands_in_their_order(tmp_path, monkeypatch, capsys):
    with test_evaluate.at_home(tmp_path) as patch:
        for script in SCRIPTS:
            train = script.train
            patch.setattr(script, "train", lambda args, train=train: train(shrunk(args)))
        ppo_atari.train(ppo_atari.Args(run_name="pong"))  # as README assumes
        assert len(commands()) >= 12
        for name, *argv in commands():
            (script,) = (script for script in SCRIPTS if Path(script.__file__).name == name)
            monkeypatch.setattr(sys, "argv", [name, *argv])
            try:
                script.main()
            except SystemExit as stop:
                pytest.fail(f"{name} {shlex.join(argv)}: status {stop.code}, {capsys.readouterr().err}")
        assert (tmp_path / "runs" / "hopper" / "checkpoints" / "eval.json").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures(document):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text())
    for target in targets:
        assert (document.parent / target).exists(), target
    assert document != ROOT / "README.md" or len(targets) > 5


def test_every_metric_is_explained(tmp_path):
    logged = set()
    with test_evaluate.at_home(tmp_path) as patch:
        for script in SCRIPTS:
            patch.setattr(script.Logger, "log", lambda self, step, scalars: logged.update(scalars))
            script.train(test_evaluate.small_args(script, run_name=script.__name__))
    explained = set(re.findall(r"`((?:charts|losses|time)/\w+)`", README))
    assert explained == logged | {"charts/eval_return"}  # the last one only with --capture-video


def test_tables_are_those_of_the_results(tmp_path):
    """As benchmark/plot.py makes them."""
    for study in ("paper", "cleanrl"):
        shutil.copytree(plot.RESULTS / study, tmp_path / study)
    measured = json.loads((plot.RESULTS / "speed" / "speed.json").read_text())
    tables = {"results": plot.results(), "speed": plot.speed.summarize(measured)}
    tables |= {"objectives": plot.paper(tmp_path / "paper"), "cleanrl": plot.cleanrl(tmp_path / "cleanrl")}
    for name, table in tables.items():
        assert len(table) > 3
        assert plot.fill(README, name, table) == README
        assert plot.fill(README, name, ["| another |"]) != README


def test_animations_are_of_the_episodes_that_it_says():
    reports = sorted((plot.RESULTS / "animations").glob("*.json"))
    assert [f"{path.stem}.gif" for path in reports] == sorted(re.findall(r"animations/(\w+\.gif)", README))
    for report in map(json.loads, map(Path.read_text, reports)):
        (episode,) = report["returns"]
        steps = f"{report['global_step'] / 1e6:.0f}M steps of `{report['script']}` ({episode:.0f} "
        assert steps in " ".join(README.split()), steps


def test_arguments_exist():
    """What README calls by name, but for --cuda, which it says is gone, and the options of other programs."""
    known = {field for script in SCRIPTS for field in script.Args.__dataclass_fields__}
    others = "cuda help logdir nodes ntasks-per-node cpus-per-task signal".split()
    others += "nnodes nproc-per-node max-restarts rdzv-id rdzv-backend rdzv-endpoint".split()
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README)):
        name = flag.removeprefix("no-").replace("-", "_")
        assert name in known or flag in others, flag
