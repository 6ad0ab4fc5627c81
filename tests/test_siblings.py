"""The scripts share no module, so that each can be copied alone: what they share must not drift.

And each is to be read in one sitting: the budget is that of one, the same for all, never raised.
"""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from difflib import SequenceMatcher
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ppo_atari", "ppo_continuous", "ppo_kl_penalty")
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in NAMES}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
over_scripts = pytest.mark.parametrize("name", NAMES)

MAX_LINES, MAX_TOKENS, MAX_COLUMNS, MAX_TRAIN_END = 750, 6500, 100, 430
MAX_FUNCTION, MAX_NESTING, MAX_DIFF = 50, 3, 90

# All that is in several scripts and not the same in them, by why; what is in one alone is its own.
DIFFERENCES = {
    "each says what it is, imports what it uses": "docstring imports Args.exp_name FORMAT",
    "hyper-parameters of [PPO] for Atari": "Args.env_id Args.total_timesteps Args.num_steps"
    " Args.learning_rate Args.num_minibatches Args.update_epochs Args.clip_coef Args.ent_coef",
    "a GPU pays for the convolutional network only": "Args.device Args.compile prepare",
    "another simulator": "Step.rewards Step.final_obs make_env Envs Envs.__init__"
    " Envs.reset Envs.step evaluate",
    "another network": "Agent Agent.__init__ Agent.forward Agent.value Agent.noise"
    " evaluate_checkpoint",
    "another objective": "minibatch_loss minibatch_gradient",
    "another network, another objective": "collect_rollout update train Run.__init__",
}


def tokens(source):
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    layout |= {tokenize.ENCODING, tokenize.ENDMARKER}
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type not in layout for token in found)


def nesting(node):
    """How deep control flow goes; an elif is not deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        flow = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match)
        deepest = max(deepest, (flow and not is_elif) + nesting(child))
    return deepest


def first_line(node):
    return min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])


@over_scripts
def test_one_sitting(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= MAX_LINES
    assert tokens(SOURCES[name]) <= MAX_TOKENS
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
    functions = [x for x in ast.walk(TREES[name]) if isinstance(x, ast.FunctionDef)]
    for function in functions:
        assert function.end_lineno - first_line(function) + 1 <= MAX_FUNCTION, function.name
        assert nesting(function) <= MAX_NESTING, function.name
    (end,) = (x.end_lineno for x in functions if x.name == "train")
    assert end <= MAX_TRAIN_END


def test_the_diff_of_the_objectives():
    clipped, penalty = (SOURCES[name].splitlines() for name in NAMES[1:])
    matcher = SequenceMatcher(None, clipped, penalty, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert len(clipped) + len(penalty) - 2 * same <= MAX_DIFF


def name_of(node):
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "imports"
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    return getattr(node, "name", "docstring" if isinstance(node, ast.Expr) else "__main__")


def definitions(name):
    """The whole text in named pieces; comments belong to what they stand beside or before."""
    lines, done, pieces = SOURCES[name].splitlines(), 0, {}

    def cut(piece, end):
        nonlocal done
        pieces[piece] = pieces.get(piece, "") + "\n".join(filter(None, lines[done:end])) + "\n"
        done = end

    for node in TREES[name].body:
        if isinstance(node, ast.ClassDef):
            members = node.body[ast.get_docstring(node) is not None :]
            cut(node.name, first_line(members[0]) - 1 if members else node.end_lineno)
            for member in members:
                cut(f"{node.name}.{name_of(member)}", member.end_lineno)
        else:
            cut(name_of(node), node.end_lineno)
    text = "".join(pieces.values())  # no line escapes the comparison
    assert sorted(text.splitlines()) == sorted(filter(None, lines))
    return pieces


def test_what_differs_is_listed_with_a_reason():
    pieces = [definitions(name) for name in NAMES]
    names = {piece for of in pieces for piece in of}
    texts = {piece: [of[piece] for of in pieces if piece in of] for piece in names}
    differ = {piece for piece, versions in texts.items() if len(set(versions)) > 1}
    listed = {piece for listed in DIFFERENCES.values() for piece in listed.split()}
    assert differ - listed == set(), (
        "bring these in line in all scripts, or list them with a reason"
    )
    assert listed - differ == set(), "these are the same by now"


def test_the_order_is_the_same():
    orders = [list(definitions(name)) for name in NAMES]
    for one in orders:
        for other in orders:
            assert [x for x in one if x in other] == [x for x in other if x in one]


@over_scripts
def test_sections_are_those_of_the_docstring(name):
    lines, (docstring, *_) = SOURCES[name].splitlines(), TREES[name].body
    rules = [line for line in lines if re.fullmatch(r"# -{4} .* -+", line)]
    titles = [line.strip("# -") for line in rules]
    contents = re.findall(r"^    ([A-Z]+)  +\S", docstring.value.value, re.MULTILINE)
    assert contents == [x for x in titles if x.isupper()] + ["PLUMBING"]
    assert titles[: len(contents) - 1] == contents[:-1]  # the others come below the divider
    assert {len(rule) for rule in rules} == {MAX_COLUMNS}
    divider = lines.index(f"# ==== PLUMBING: nothing below belongs to the algorithm {'=' * 44}")
    *_, last = (x for x in TREES[name].body if x.end_lineno <= divider)
    assert last.name == "train" and divider < lines.index(rules[len(contents) - 1])


@over_scripts
def test_pins(name):
    """Those of requirements.txt; and the code needs no other package, and no newer Python."""
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SOURCES[name], re.MULTILINE)
    metadata = tomllib.loads("\n".join(line[2:] for line in block[1].splitlines()))
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    runtime, _ = re.split("^# Development.*$", text, flags=re.MULTILINE)
    pins = [line.replace('"', "'") for line in runtime.splitlines() if line and line[0] != "#"]
    assert sorted(metadata["dependencies"]) == sorted(pins)
    assert all("==" in pin for pin in pins)
    assert metadata["requires-python"] == ">=3.11,<3.15"  # what it pins has no wheels for others
    assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()
    ast.parse(SOURCES[name], feature_version=(3, 11))
    imported = [x for x in ast.walk(TREES[name]) if isinstance(x, ast.Import)]
    modules = {alias.name for x in imported for alias in x.names}
    modules |= {x.module for x in ast.walk(TREES[name]) if isinstance(x, ast.ImportFrom)}
    pinned = {re.match(r"[\w-]+", pin)[0].replace("-", "_") for pin in pins}
    assert {x.partition(".")[0] for x in modules} <= pinned | sys.stdlib_module_names


IMPORT_ALONE = """
import gymnasium, os, signal, sys, torch  # gymnasium sets a variable of its own
from contextlib import redirect_stdout
from io import StringIO

def state():
    yield from (torch.get_num_threads(), torch.initial_seed(), torch.backends.cudnn.deterministic)
    yield from (signal.getsignal(2), torch.distributions.Normal(0.0, 1.0)._validate_args)
    yield from sorted(os.environ.items())

before, scripts = list(state()), {}
for name in sys.argv[1:]:
    sys.path[0] = os.path.abspath(name)
    scripts[name] = __import__(name)
    assert list(state()) == before, (name, before, list(state()))
for name, script in scripts.items():
    for flag in ("--help", "-h"):
        sys.argv, out = [f"{name}.py", flag], StringIO()
        try:
            with redirect_stdout(out):
                script.main()
        except SystemExit as end:
            assert not end.code, (flag, end.code)
        words = out.getvalue().split()
        options = {"--" + x.replace("_", "-") for x in script.Args.__dataclass_fields__}
        assert options <= {word.strip(",") for word in words}, (flag, out.getvalue())
"""


def test_each_alone_in_an_empty_folder(tmp_path):
    """It imports, which changes nothing, and --help shows every argument."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    surroundings = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "2"}
    surroundings.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", IMPORT_ALONE, *NAMES]
    result = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted(tmp_path.rglob("*")) == before
