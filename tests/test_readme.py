"""What README and docs/ say: code runs, commands parse, links lead somewhere, numbers are right."""

import ast
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tyro
from gymnasium.utils.env_checker import check_env
from onnx.reference import ReferenceEvaluator

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {path.name: path.read_text("utf8") for path in PATHS}
README, ALL = TEXTS["README.md"], "\n".join(TEXTS.values())
SCRIPTS = [ppo_continuous, ppo_kl_penalty, ppo_atari]
SOURCES = [Path(script.__file__).read_text("utf8") for script in SCRIPTS]
FIELDS = [{field.name: field.default for field in fields(script.Args)} for script in SCRIPTS]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
over_documents = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def tables(text, first):  # rows, as lists of cells, of the tables whose first column has this title
    rows = []
    title = rf"^\| {first} ?\|.*\n\|[-|]+\n((?:\|.*\n)+)"
    for table in re.findall(title, text, re.MULTILINE):
        rows += [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return rows


def paragraphs(text):  # words of prose: no code, tables, pictures, headings and targets of links
    text = re.sub(
        r"^[#|].*$|!\[.*?\]\(.*?\)|<!--.*?-->", "", CODE.sub("", text), flags=re.MULTILINE
    )
    parts = re.split(r"\n\s*\n|\n(?=- )", re.sub(r"\]\([^)]*\)", "]", text))
    return [part.split() for part in parts if part.strip()]


def test_readme_takes_two_minutes():
    lines, words = README.splitlines(), [len(words) for words in paragraphs(README)]
    assert len(lines) <= 200 and max(map(len, lines)) <= 110
    assert sum(words) <= 1500 and max(words) <= 60


def commands(text):  # script and arguments of each command, in a block or in `…`
    lines = "".join(code for _, code in CODE.findall(text)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", CODE.sub("", text))
    for line in lines:
        if start := re.search(r"(?:python|run|^srun.*|^torchrun.*) (ppo_\w+\.py.*)", line):
            yield shlex.split(start[1], comments=True)


@over_documents
def test_commands_parse(path):
    found = list(commands(TEXTS[path.name]))
    assert len(found) > 3 or path.name not in ("README.md", "usage.md", "scaling.md")
    for name, *argv in found:
        (script,) = (script for script in SCRIPTS if script.__name__ == name.removesuffix(".py"))
        try:
            tyro.cli(script.Args, args=argv)
        except SystemExit as stop:
            pytest.fail(f"{name} {argv}: status {stop.code}")


@over_documents
def test_flags_exist(path):
    """Every --flag is an argument, but for other programs' and, between marks, those now gone."""
    known = {name for of_script in FIELDS for name in of_script}
    known |= set("help logdir nproc_per_node max_restarts nnodes rdzv_id rdzv_backend".split())
    known |= set(
        "rdzv_endpoint nodes ntasks_per_node cpus_per_task gpus_per_node time signal".split()
    )
    text = re.sub(r"<!-- old -->.*?<!-- end -->", "", TEXTS[path.name], flags=re.DOTALL)
    text = re.sub(r"^python benchmark/.*", "", text, flags=re.MULTILINE)
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)):
        assert flag.removeprefix("no-").replace("-", "_") in known, flag


@over_documents
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)]*)\)", TEXTS[path.name]):
        other = path.parent / target if target else path
        assert other.exists()
        if anchor:
            titles = re.findall(r"^#+ (.*)", other.read_text("utf8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{target}#{anchor}"


def test_map_of_a_script():
    """Where the scripts have moved on, what it prints is the table that README should have."""
    lines = []  # of each script, by name
    for source in SOURCES:
        nodes = [node for node in ast.parse(source).body if hasattr(node, "name")]
        lines.append({node.name: str(node.lineno) for node in nodes})
    rows, right = tables(README, "section"), []
    for section, names, *_ in rows:
        of = [", ".join(x[name] for name in re.findall(r"`(\w+)`", names)) for x in lines]
        right.append([section, names, *of])
    assert rows == right and rows, "\n".join(f"| {' | '.join(row)} |" for row in right)


def test_functions_that_the_documents_name_exist():
    names = set(re.findall(r"^ *(?:def|class) (\w+)", "\n".join(SOURCES), re.MULTILINE))
    named = set(re.findall(r"`(?:\w+\.)?(\w+)\(\)`", TEXTS["details.md"] + TEXTS["metrics.md"]))
    assert len(named) > 20 and named <= names, named - names


def test_every_argument_is_explained_with_its_defaults():
    rows = {row[0].strip("`-"): row[1:4] for row in tables(TEXTS["hyperparameters.md"], "argument")}
    assert set(rows) == {name.replace("_", "-") for of_script in FIELDS for name in of_script}
    for flag, said in rows.items():
        for value, of_script in zip(said, FIELDS):
            default = of_script.get(flag.replace("-", "_"), "–")
            assert default == (value if isinstance(default, str) else ast.literal_eval(value)), flag


def test_every_metric_is_explained():
    metric = r"((?:charts|losses|time)/\w+)"
    logged = set(re.findall(rf'"{metric}"', "\n".join(SOURCES)))
    assert len(logged) > 12
    assert {row[0].strip("`") for row in tables(TEXTS["metrics.md"], "metric")} == logged
    assert set(re.findall(rf"`{metric}`", ALL)) - {"time/fps"} == logged  # which is SB3's


def test_code_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    small = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 16}
    small |= {"device": "cpu", "compile": False}
    train, Args = ppo_continuous.train, ppo_continuous.Args
    train(Args(env_id="CartPole-v1", run_name="cartpole", **small))
    ppo_atari.train(ppo_atari.Args(run_name="pong", **small))
    monkeypatch.setattr(ppo_continuous, "train", lambda args: 0.0)  # the sweep takes minutes
    for code in (code for language, code in CODE.findall(ALL) if language == "python"):
        if own := re.search(r'register\("([\w-]+)"', code):
            Path("my_envs.py").write_text(code)
            sys.modules.pop("my_envs", None)
            own = f"my_envs:{own[1]}"
            check_env(ppo_continuous.make_env(own).unwrapped, skip_render_check=True)
            own = small | {"env_id": own, "num_steps": 128, "total_timesteps": 512}
            assert train(Args(**own)) < 0.0  # the longer episodes end after 200 steps
        else:
            lines = code.replace("\n\n", "\n").splitlines()
            assert len([line for line in lines if "import" not in line]) <= 10
            exec(code, names := {})
            if "onnx" in code:
                played = ReferenceEvaluator("policy.onnx").run(None, {"obs": names["obs"].numpy()})
                expected, _ = names["agent"].policy(names["obs"])
                np.testing.assert_allclose(played[0], expected.detach(), rtol=1e-4, atol=1e-6)


def scores(env_id, script):
    """Of each study of it, as tables print them: every seed, mean ± sd, number of seeds."""
    for study in "mujoco classic atari pong/bf16 interrupted rewritten mujoco-v4".split():
        paths = (RESULTS / study).glob(f"{env_id}__{script}__*.json")
        paths = sorted(paths, key=lambda path: (len(path.name), path))  # seed 10 after 9
        if paths:
            x = np.array([json.loads(path.read_text())["final_mean_return"] for path in paths])
            digits = 0 if abs(x).max() >= 100 else 1
            spread = f" ± {x.std(ddof=1):.{digits}f}" if len(x) > 1 else ""
            each = ", ".join(f"{value:.{digits}f}" for value in x)
            yield each, f"{x.mean():.{digits}f}{spread}", f"({len(x)})"


def test_numbers_are_those_of_the_results():
    short, long = tables(README, "task"), tables(TEXTS["results.md"], "environment")
    assert len(short) > 5 and len(long) > 10
    for task, script, _, score, *_ in short:
        known = list(scores(task.split(",")[0], script.strip("`").removesuffix(".py")))
        assert score in [f"{mean} {number}" for _, mean, number in known], task
    for env_id, script, _, _, each, mean, *_ in long:
        known = scores(env_id, script.strip("`").removesuffix(".py"))
        assert (each, mean) in [score[:2] for score in known], env_id
    measured = (RESULTS / "speed" / "table.md").read_text("utf8")
    for side, *cells in tables(README, "") + tables(TEXTS["speed.md"], ""):
        for speed in re.findall(r"(\d+) \(", " ".join(cells)):
            assert f"| {side} | {speed} (" in measured, (side, speed)
