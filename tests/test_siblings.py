"""The scripts share no module, so that each can be copied alone; what they have in common must not drift."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("atari", "continuous", "kl_penalty")

# All that is not the same in the three: which script differs from the other two (or "all" do), and why.
# Where a name is missing in some of them, that is a difference as well.
DIFFERENCES = {
    "docstring": ("all", "each says what it is and cites what it uses"),
    "imports": ("all", "each imports what it uses"),
    "OpenMP": ("atari", "more than one thread pays"),
    "Setup.exp_name": ("all", "the script's own name"),
    "Setup.compile": ("atari", "see numpy_act"),
    "Setup.device": ("atari", "a GPU pays for the convolutional network only"),
    "Setup.precision": ("atari", "bf16 pays for the convolutional network only"),
    "Args.env_id": ("all", "each has an example of its own"),
    "Args.shared_network": ("atari", "the others always have two networks"),
    "Setup.async_envs": ("atari", "its games run in C++ threads"),
    "Setup.total_timesteps": ("atari", "the usual budget of the benchmark"),
    "Args.learning_rate": ("atari", "hyper-parameters of [PPO] for Atari"),
    "Args.num_steps": ("atari", "hyper-parameters of [PPO] for Atari"),
    "Args.num_minibatches": ("atari", "hyper-parameters of [PPO] for Atari"),
    "Args.update_epochs": ("atari", "hyper-parameters of [PPO] for Atari"),
    "Args.ent_coef": ("atari", "hyper-parameters of [PPO] for Atari"),
    "Args.clip_coef": ("all", "0.1 for Atari; the KL penalty clips nothing"),
    "Args.clip_vloss": ("kl_penalty", "it clips nothing"),
    "Args.target_kl": ("kl_penalty", "β keeps the policy from moving too far"),
    "Args.kl_mode": ("kl_penalty", "the KL penalty"),
    "Args.kl_coef": ("kl_penalty", "the KL penalty"),
    "Args.kl_target": ("kl_penalty", "the KL penalty"),
    "Args.__post_init__": ("kl_penalty", "checks arguments of the KL penalty"),
    "RunningMeanStd": ("atari", "pictures have a range, and rewards become their sign"),
    "RunningMeanStd.__init__": ("atari", "see RunningMeanStd"),
    "RunningMeanStd.update": ("atari", "see RunningMeanStd"),
    "RunningMeanStd.forward": ("atari", "see RunningMeanStd"),
    "Envs": ("atari", "another simulator"),
    "Envs.__init__": ("all", "another simulator; the spaces that each can handle"),
    "Envs.reset": ("atari", "another simulator"),
    "Envs.step": ("all", "another simulator; Discrete actions are not clipped to bounds"),
    "Envs.scale": ("atari", "see RunningMeanStd"),
    "Envs.close": ("atari", "its games run in C++ threads"),
    "Envs.state_dict": ("atari", "see RunningMeanStd"),
    "Envs.load_state_dict": ("atari", "see RunningMeanStd"),
    "FewInfos": ("atari", "its games run in C++ threads"),
    "FewInfos._add_info": ("atari", "see FewInfos"),
    "patient_threads": ("atari", "its games run in C++ threads"),
    "VisibleAtariVectorEnv": ("atari", "the others can draw what they simulate"),
    "VisibleAtariVectorEnv.render_mode": ("atari", "see VisibleAtariVectorEnv"),
    "VisibleAtariVectorEnv.__init__": ("atari", "see VisibleAtariVectorEnv"),
    "VisibleAtariVectorEnv.reset": ("atari", "see VisibleAtariVectorEnv"),
    "VisibleAtariVectorEnv.step": ("atari", "see VisibleAtariVectorEnv"),
    "VisibleAtariVectorEnv.render": ("atari", "see VisibleAtariVectorEnv"),
    "game_options": ("atari", "ids of Atari games"),
    "mlp": ("atari", "another network"),
    "init": ("atari", "another network"),
    "nature_cnn": ("atari", "another network"),
    "Agent": ("atari", "another network"),
    "Agent.__init__": ("all", "another network; the policies that each has"),
    "Agent.forward": ("all", "another network; the policies that each has"),
    "Agent.noise": ("all", "as many numbers as its policy needs, of their distribution"),
    "Agent.sample": ("all", "the policies that each has"),
    "act": ("atari", "one network for policy and value: neither costs anything more"),
    "numpy_act": (
        "all",
        "NumPy is faster for networks of a few small layers only; the policies that each has",
    ),
    "agrees": ("atari", "see numpy_act"),
    "collect_rollout": ("atari", "see act and Envs.scale"),
    "policy_loss": ("kl_penalty", "another objective"),
    "value_loss": ("kl_penalty", "it clips nothing: the squared error takes one line of minibatch_loss"),
    "kl_penalty_loss": ("kl_penalty", "another objective"),
    "exact_kl": ("kl_penalty", "another objective"),
    "adapt_kl_coef": ("kl_penalty", "another objective"),
    "rows_of": ("kl_penalty", "another objective: the old policy takes part in it"),
    "minibatch_loss": ("kl_penalty", "another objective"),
    "minibatch_gradient": ("kl_penalty", "another objective: β and the old policy take part in it"),
    "update": ("all", "β and the old policy; no Gaussian and no normalisation of pictures"),
    "prepare": ("atari", "more than one thread pays"),
    "make_agent": ("atari", "arguments of its Agent"),
    "accelerate": ("atari", "see numpy_act"),
}
# Resuming, evaluation, videos and torchrun take as many lines as the algorithm; each script brings its own.
MAX_LINES, MAX_FUNCTION, MAX_TRAIN, MAX_COLUMNS, MAX_NESTING = 1181, 50, 59, 110, 3


def path_of(script: str) -> Path:
    return ROOT / f"ppo_{script}.py"


def sources() -> dict[str, str]:
    return {script: path_of(script).read_text(encoding="utf-8") for script in SCRIPTS}


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "imports"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring"
    if isinstance(node, ast.If):
        return "__main__" if "main()" in ast.unparse(node) else "OpenMP"
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    return getattr(node, "name", ast.unparse(node))


def definitions(source: str) -> dict[str, str]:
    """The whole text cut into named pieces; comments belong to what they stand beside or before."""
    lines, done, pieces = source.splitlines(), 0, {}

    def cut(name: str, end: int) -> None:
        nonlocal done
        text = "\n".join(line for line in lines[done:end] if line)
        pieces[name] = f"{pieces[name]}\n{text}" if name in pieces else text
        done = end

    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            members = node.body[1:] if ast.get_docstring(node) else node.body
            cut(node.name, first_line(members[0]) - 1 if members else node.end_lineno)
            for member in members:
                cut(f"{node.name}.{name_of(member)}", member.end_lineno)
        else:
            cut(name_of(node), node.end_lineno)
    assert done == len(lines)
    return pieces


def odd_ones_out() -> dict[str, str]:
    """For each name that is not the same everywhere, the script that differs from the other two, or "all"."""
    of = {script: definitions(source) for script, source in sources().items()}
    found = {}
    for name in {name for pieces in of.values() for name in pieces}:
        texts = [of[script].get(name) for script in SCRIPTS]  # None where a script lacks it
        groups = Counter(texts)
        if len(groups) == 3:
            found[name] = "all"
        elif len(groups) == 2:
            found[name] = next(s for s, text in zip(SCRIPTS, texts, strict=True) if groups[text] == 1)
    return found


over_scripts = pytest.mark.parametrize("script", SCRIPTS)


# ---- copies do not drift ----


def test_no_difference_that_is_not_listed():
    found = odd_ones_out()
    unlisted = {name: odd for name, odd in found.items() if DIFFERENCES.get(name, ("",))[0] != odd}
    assert not unlisted, "bring these in line in all three scripts, or list them in DIFFERENCES with a reason"


def test_no_difference_is_listed_that_is_gone():
    found = odd_ones_out()
    stale = {name: odd for name, (odd, _) in DIFFERENCES.items() if found.get(name) != odd}
    assert not stale, "these are the same by now, or differ in another script than listed"


@over_scripts
def test_no_line_escapes_the_comparison(script):
    source = sources()[script]
    compared = Counter(line for text in definitions(source).values() for line in text.splitlines())
    assert compared == Counter(line for line in source.splitlines() if line)


def test_the_order_is_the_same():
    orders = [list(definitions(source)) for source in sources().values()]
    common = set.intersection(*map(set, orders))
    first, *others = ([name for name in order if name in common] for order in orders)
    assert all(other == first for other in others)


# ---- pins ----


def normalised(requirement: str) -> str:
    return requirement.replace(" ", "").replace("'", '"')


def inline_metadata(source: str) -> tuple[str, list[str]]:
    """requires-python and dependencies of the PEP 723 block; there is no tomllib in Python 3.10."""
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source, re.MULTILINE)
    text = "\n".join(line[2:] for line in block[1].splitlines())
    requires_python = re.search(r'^requires-python = "(.*)"$', text, re.MULTILINE)[1]
    dependencies = re.search(r"^dependencies = (\[.*\])", text, re.MULTILINE | re.DOTALL)[1]
    return requires_python, ast.literal_eval(dependencies)


def runtime_requirements() -> list[str]:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    runtime = re.search(r"^# Runtime.*?$(.*?)^# Development", text, re.MULTILINE | re.DOTALL)[1]
    return [line for line in runtime.splitlines() if line.strip()]


@over_scripts
def test_inline_metadata_has_the_pins_of_requirements_txt(script):
    _, dependencies = inline_metadata(sources()[script])
    expected = runtime_requirements()
    assert Counter(map(normalised, dependencies)) == Counter(map(normalised, expected))
    assert all("==" in requirement for requirement in dependencies)


@over_scripts
def test_syntax_is_that_of_the_oldest_python_it_promises(script):
    requires_python, _ = inline_metadata(sources()[script])
    oldest = tuple(map(int, re.match(r">=(\d+)\.(\d+)", requires_python).groups()))
    assert requires_python == ">=3.10,<3.15"  # what it pins has no wheels for 3.15
    ast.parse(sources()[script], feature_version=oldest)


# ---- each stands alone ----


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name.partition(".")[0] for name in names}


@over_scripts
def test_imports_only_what_it_pins(script):
    """Nothing of this repository, then: a copy in an empty folder runs."""
    source = sources()[script]
    _, dependencies = inline_metadata(source)
    pinned = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in dependencies}
    assert imported(ast.parse(source)) <= pinned | sys.stdlib_module_names


@over_scripts
def test_nothing_happens_at_the_top_level(script):
    docstring, *others = ast.parse(sources()[script]).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)
    *others, guard = others
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    main()"
    if script == "atari":  # read by torch as it is loaded
        tuning = "if __name__ == '__main__':\n    os.environ.setdefault('GOMP_SPINCOUNT', '20000')"
        others = [node for node in others if ast.unparse(node) != tuning]
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    assert [ast.unparse(node) for node in others if not isinstance(node, allowed)] == []


IMPORT_ALONE = """
import os, sys, gymnasium, torch  # gymnasium sets a variable of its own
def settings():
    yield from (torch.get_num_threads(), torch.initial_seed(), torch.backends.cudnn.deterministic)
    yield from sorted(os.environ.items())
before = list(settings())
for script in sys.argv[1:]:
    os.chdir(script)
    sys.path[0] = os.getcwd()
    __import__(script)
    os.chdir("..")
    assert before == list(settings()), (script, before, list(settings()))
    assert torch.distributions.Normal(0.0, 1.0)._validate_args, script
"""


def test_importing_has_no_side_effect(tmp_path):
    for script in SCRIPTS:
        folder = tmp_path / f"ppo_{script}"
        folder.mkdir()
        shutil.copy(path_of(script), folder)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", IMPORT_ALONE, *(f"ppo_{script}" for script in SCRIPTS)]
    # two threads, which is not what train() sets, on any machine
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted(tmp_path.rglob("*")) == before


# ---- budget ----


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def nesting(node: ast.AST) -> int:
    """How deep control flow goes; an elif is not deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        elif_of = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        flow = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try) and not elif_of
        deepest = max(deepest, flow + nesting(child))
    return deepest


@over_scripts
def test_budget(script):
    lines = sources()[script].splitlines()
    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
    for function in functions(ast.parse("\n".join(lines))):
        length = function.end_lineno - first_line(function) + 1
        assert length <= (MAX_TRAIN if function.name == "train" else MAX_FUNCTION), function.name
        assert nesting(function) <= MAX_NESTING, function.name
