"""What the command line refuses and explains, and how it stops; mostly main() in this process, for speed."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from fakes import SCRIPTS, over_scripts

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).parent.parent
VECTOR_SCRIPTS = [ppo_continuous, ppo_kl_penalty]


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """A function that expects a command line to be refused in one line, and returns that line."""

    def accepted(*args):
        raise AssertionError("accepted: the training begins")

    def run(script, *argv: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(script, "collect_rollout", accepted)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            script.main()
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err)
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


# Arguments, and the values of them that no script accepts
OUT_OF_RANGE = {
    "--num-envs": ["0", "-3"],
    "--num-steps": ["0"],
    "--num-minibatches": ["0"],
    "--update-epochs": ["-1"],
    "--total-timesteps": ["0"],
    "--eval-episodes": ["0", "-1"],
    "--learning-rate": ["-1.0", "nan", "inf"],
    "--ent-coef": ["-0.01", "nan", "inf"],
    "--vf-coef": ["-0.5", "nan", "inf"],
    "--gamma": ["1.01", "-0.1", "nan"],
    "--gae-lambda": ["1.01", "-0.1", "nan"],
    "--max-grad-norm": ["0.0", "-1.0", "nan"],
    "--target-return": ["nan", "inf"],
    "--seed": ["-1", str(2**63)],
    "--run-name": ["a/b", "..", ".", "", "../elsewhere", "/runs"],
}
CLIPPED = {"--clip-coef": ["-0.2", "nan", "inf"], "--target-kl": ["0.0", "-0.1", "nan"]}
PENALTY = {"--kl-coef": ["-1.0", "nan", "inf", "1000001.0"], "--kl-target": ["0.0", "-0.1", "nan"]}
CASES = [
    pytest.param(script, name, value, id=f"{script.__name__}{name}={value}")
    for script in SCRIPTS
    for name, values in (OUT_OF_RANGE | (PENALTY if script is ppo_kl_penalty else CLIPPED)).items()
    for value in values
]


@pytest.mark.parametrize(("script", "name", "value"), CASES)
def test_values_out_of_range(refuse, script, name, value):
    message = refuse(script, name, value)
    assert f"{name} must be " in message
    assert message.endswith((f", not {value}\n", f", not {value!r}\n"))


@over_scripts(SCRIPTS)
def test_values_at_the_edge_are_accepted(script):
    edges = {"gamma": 0.0, "gae_lambda": 1.0, "learning_rate": 0.0, "ent_coef": 0.0, "vf_coef": 0.0}
    one = {"num_envs": 1, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 2}
    script.Args(**edges, **one, seed=2**63 - 1, max_grad_norm=float("inf"), run_name="a b.c")
    script.Args(gamma=1.0, gae_lambda=0.0, seed=0)


@over_scripts(SCRIPTS)
def test_batch_that_does_not_divide(refuse, script):
    message = refuse(script, "--num-envs", "3", "--num-steps", "10", "--num-minibatches", "4")
    assert "--num-minibatches 4" in message
    assert "--num-envs 3 x --num-steps 10 = 30" in message


@over_scripts(SCRIPTS)
def test_minibatches_of_one_cannot_be_normalised(refuse, script):
    sizes = {"num_envs": 2, "num_steps": 4, "num_minibatches": 8}
    message = refuse(script, "--num-envs", "2", "--num-steps", "4", "--num-minibatches", "8")
    assert "--num-minibatches 8" in message
    assert "--norm-adv" in message
    assert script.Args(**sizes, norm_adv=False).minibatch_size == 1


@over_scripts(SCRIPTS)
def test_less_than_one_rollout(refuse, script):
    message = refuse(script, "--num-steps", "16", "--total-timesteps", "127")
    assert "--total-timesteps 127" in message
    assert "--num-envs 8 x --num-steps 16 = 128" in message
    assert script.Args(num_steps=16, total_timesteps=128).num_iterations == 1


def test_penalty_of_zero_cannot_adapt(refuse):
    message = refuse(ppo_kl_penalty, "--kl-coef", "0")
    assert "--kl-coef 0 " in message
    assert "--kl-mode fixed" in message
    assert ppo_kl_penalty.Args(kl_coef=0.0, kl_mode="fixed").kl_coef == 0.0


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
@over_scripts(SCRIPTS)
def test_devices_that_are_not_there(refuse, script, device):
    assert f"--device {device}: " in refuse(script, "--device", device)


UNKNOWN = [
    (ppo_continuous, "HalfCheeta-v5", "HalfCheetah"),
    (ppo_kl_penalty, "CartPol-v1", "CartPole"),
    (ppo_atari, "PongNoFrameskipp-v4", "PongNoFrameskip"),
    (ppo_atari, "ALE/Breakot-v5", "Breakout"),
]


@pytest.mark.parametrize(("script", "env_id", "match"), UNKNOWN)
def test_unknown_environments(refuse, script, env_id, match):
    message = refuse(script, "--env-id", env_id)
    assert f"--env-id {env_id}" in message
    assert f"`{match}`" in message


@pytest.mark.parametrize("env_id", ["nonsense", "CartPole-v99", "no_such_module:Env-v0", "No/Such-v0"])
@over_scripts(SCRIPTS)
def test_ids_that_resemble_nothing(refuse, script, env_id):
    assert f"--env-id {env_id}" in refuse(script, "--env-id", env_id)


def test_a_game_without_its_version(refuse):
    message = refuse(ppo_atari, "--env-id", "Pong")
    assert "--env-id Pong: " in message and "PongNoFrameskip-v4" in message and "ALE/Pong-v5" in message


@pytest.mark.parametrize("env_id", ["ALE/PongDeterministic-v5", "Deterministic-v4", "PongDeterministic"])
def test_deterministic_ids_that_never_were(refuse, env_id):
    assert f"--env-id {env_id}" in refuse(ppo_atari, "--env-id", env_id)


@pytest.mark.parametrize("env_id", ["Pong-ram-v4", "Pong-ramNoFrameskip-v4", "ALE/Pong-ram-v5"])
def test_memory_is_no_picture(refuse, env_id):
    message = refuse(ppo_atari, "--env-id", env_id)
    assert f"--env-id {env_id}" in message
    assert "memory" in message, "that it is not registered would not help"


OTHER_SCRIPT = [
    (ppo_continuous, "CartPole-v1", "ppo_kl_penalty.py"),
    (ppo_atari, "HalfCheetah-v5", "ppo_continuous.py"),
    (ppo_atari, "CartPole-v1", "ppo_kl_penalty.py"),
]


@pytest.mark.parametrize(("script", "env_id", "other"), OTHER_SCRIPT)
def test_environments_for_another_script(refuse, script, env_id, other):
    message = refuse(script, "--env-id", env_id)
    assert f"--env-id {env_id}" in message
    assert other in message


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
@over_scripts(VECTOR_SCRIPTS)
def test_atari_games_are_for_the_atari_script(refuse, monkeypatch, script, env_id):
    """The vector scripts do not import ale_py; that this process did is undone."""
    for name, spec in list(gym.registry.items()):
        if "ale_py" in str(spec.entry_point):
            monkeypatch.delitem(gym.registry, name)
    message = refuse(script, "--env-id", env_id)
    assert f"--env-id {env_id}" in message
    assert "ppo_atari.py" in message


RUNNING = [
    (ppo_continuous, "Pendulum-v1"),
    (ppo_kl_penalty, "CartPole-v1"),
    (ppo_atari, "PongNoFrameskip-v4"),
]


@pytest.mark.parametrize(("script", "env_id"), RUNNING)
def test_existing_run(refuse, tmp_path, script, env_id):
    old = tmp_path / "runs" / "first" / "episodes.csv"
    old.parent.mkdir(parents=True)
    old.write_text("of an older run")
    message = refuse(script, "--env-id", env_id, "--run-name", "first", "--device", "cpu")
    assert "--run-name first" in message and "--resume" in message
    assert old.read_text() == "of an older run"


def test_folder_that_cannot_be_made(refuse, tmp_path):
    (tmp_path / "runs").write_text("a file")
    message = refuse(ppo_kl_penalty, "--run-name", "first")
    assert "--run-name first" in message and "--resume" not in message


PARSE_ERRORS = [
    *((script, argv) for script in SCRIPTS for argv in (["--no-such-flag"], ["--num-envs", "many"])),
    (ppo_kl_penalty, ["--kl-mode", "sometimes"]),
    (ppo_atari, ["--precision", "fp16"]),
]


@pytest.mark.parametrize(("script", "argv"), PARSE_ERRORS)
def test_what_cannot_be_parsed(monkeypatch, capsys, tmp_path, script, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def without_layout(text: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


@over_scripts(SCRIPTS)
def test_help_explains_every_argument(monkeypatch, capsys, script):
    explanations = dict(re.findall(r"^    (\w+): .+?  # (.+)$", Path(script.__file__).read_text(), re.M))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0
    shown = without_layout(capsys.readouterr().out)
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert without_layout(explanations[field.name]) in shown


def start(script, folder: Path, *argv: str) -> subprocess.Popen:
    """The script as a user runs it: copied alone into an empty folder."""
    copy = shutil.copy(script.__file__, folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, copy, *argv], cwd=folder, env=environment, **pipes)


REFUSED_PROCESSES = [
    (ppo_continuous, ["--env-id", "ALE/Pong-v5"], "ppo_atari.py"),
    (ppo_kl_penalty, ["--kl-coef", "0"], "--kl-mode fixed"),
    (ppo_atari, ["--env-id", "HalfCheetah-v5"], "ppo_continuous.py"),
]


@pytest.mark.parametrize(("script", "argv", "hint"), REFUSED_PROCESSES)
def test_refusal_of_a_process(tmp_path, script, argv, hint):
    with start(script, tmp_path, *argv) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert " ".join(argv) in err
    assert hint in err
    assert [path.name for path in tmp_path.iterdir()] == [f"{script.__name__}.py"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("script", "env_id"), RUNNING)
def test_interrupted_run_stops_quietly(tmp_path, script, env_id):
    argv = ["--env-id", env_id, "--run-name", "interrupted", "--device", "cpu"]
    with start(script, tmp_path, *argv) as process:
        try:
            assert "training on" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert (tmp_path / "runs" / "interrupted" / "episodes.csv").read_text().startswith("global_step,")
