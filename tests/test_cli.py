"""What is refused, in one line and before there is a run; names of runs; other people's errors."""

import linecache
import multiprocessing
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from fakes import ENVS, SCRIPTS, VECTOR_SCRIPTS, Walk, options, over_scripts, tiny
from pydantic import ValidationError

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

pytestmark = pytest.mark.usefixtures("small_network", "here")


@over_scripts(SCRIPTS)
def test_unknown_options(script, command):
    """Those of CleanRL, or of another script here, are told what replaces them."""
    hints = {
        "--no-such-thing": "no-such-thing",
        "--no-cuda": "--device",
        "--cuda False": "--device",
    }
    hints |= {"--save-model": "--save-model always on", "--anneal-lr False": "--no-x"}
    if script is ppo_kl_penalty:
        hints["--clip-coef 0.2"] = "--clip-coef is of ppo_continuous.py"
    else:
        hints["--kl-coef 1.0"] = "--kl-coef of ppo_kl_penalty.py"
    for option, hint in hints.items():
        assert hint in command(script, *option.split()).refusal and os.listdir() == []


WRONG = [(f"num_{name}", 0) for name in ("envs", "steps", "minibatches")]
WRONG += [(name, 0) for name in ("total_timesteps", "update_epochs", "eval_episodes")]
WRONG += [(name, -0.1) for name in ("learning_rate", "gamma", "gae_lambda", "ent_coef", "vf_coef")]
WRONG += [("gamma", 1.01), ("gae_lambda", 99.0), ("gamma", float("nan")), ("max_grad_norm", 0.0)]
WRONG += [("seed", -1), ("checkpoint_interval", -1.0), ("device", "abacus"), ("device", "cuda:77")]
WRONG += [("minibatches", 3), ("total_timesteps", 15), ("minibatches", 16), ("resume", True)]
WRONG += [("env_id", "Nonsense-v0"), ("env_id", "nosuchmodule:CartPole-v1")]
CLIPPED = [("clip_coef", -0.1), ("target_kl", 0.0)]
OWN = {
    ppo_atari: [*CLIPPED, ("env_id", "CartPole-v1"), ("precision", "float32")],
    ppo_continuous: [*CLIPPED, ("env_id", "Multi-v0")],
    ppo_kl_penalty: [("kl_coef", -1.0), ("kl_target", 0.0), ("kl_mode", "adaptative")],
}


@over_scripts(SCRIPTS)
def test_values(script, command):
    """Refused when given to Args, when set later, and on the command line."""
    refused = script.Refusal, ValidationError
    for says, value in WRONG + OWN[script]:
        name = says.replace("minib", "num_minib") if says[0] == "m" else says
        says = value.split("-")[0] if name == "env_id" else says.removesuffix("es")
        run_name = None if name == "resume" else "run"
        args = tiny(script, run_name=run_name)
        setattr(args, name, value)
        with pytest.raises(refused, match=says):
            script.train(args)
        with pytest.raises(refused, match=says):
            script.train(tiny(script, **{"run_name": run_name, name: value}))
        outcome = command(script, *options(args))
        assert outcome.status == 2 and (says in outcome.err or "choice" in outcome.err)
        assert os.listdir() == []


@over_scripts(SCRIPTS)
def test_numpy_scalars_and_default_name(script):
    """As a sweep draws them; what is saved of them is plain, or it could not be loaded."""
    drawn = {"num_envs": np.int64(1), "gamma": np.float32(1.0), "gae_lambda": np.float64(0.0)}
    drawn |= {"anneal_lr": np.bool_(False), "learning_rate": np.float32(0.0), "num_steps": 2}
    drawn |= {"num_minibatches": 1, "total_timesteps": np.int32(2), "max_grad_norm": float("inf")}
    own, spec = f"{script.__name__}/Env-v0", gym.spec(ENVS[script])
    gym.register(own, spec.entry_point, kwargs=spec.kwargs)
    drawn |= {"run_name": None, "env_id": f"fakes:{own}", "exp_name": "exp", "seed": np.int64(7)}
    script.train(tiny(script, **drawn))
    (name,) = os.listdir("runs")
    assert re.fullmatch(f"fakes-{script.__name__}" + r"-Env-v0__exp__7__\d{10}", name)
    saved = torch.load(f"runs/{name}/checkpoints/last.pt", weights_only=True)
    seen = [saved["args"][name] for name in ("num_envs", "gamma", "anneal_lr", "total_timesteps")]
    assert [(x, type(x)) for x in seen] == [(1, int), (1.0, float), (False, bool), (2, int)]


# ---- names of runs ----


@pytest.mark.parametrize("name", ["ü ä'$(touch PWNED)`;&", "x" * 200, "some/where", "/absolute"])
def test_names(name, here, command):
    """A name or a folder, here and with --resume and --evaluate; an existing run is left alone."""
    name = str(here / name[1:]) if name[0] == "/" else name
    folder = here / name if "/" in name else here / "runs" / name
    args = options(tiny(ppo_kl_penalty, run_name=name))
    assert command(ppo_kl_penalty, *args).status == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert folder / "checkpoints" / "last.pt" in before
    assert "--resume" in command(ppo_kl_penalty, *args).refusal
    assert all(path.read_bytes() == content for path, content in before.items())
    for other in (name, str(folder)):
        resume = ["--resume", "--run-name", other, "--total-timesteps", "80"]
        assert command(ppo_kl_penalty, *resume).status == 0
    assert command(ppo_kl_penalty, "--evaluate", name, "--eval-episodes", 1).status == 0
    assert os.listdir() == [folder.relative_to(here).parts[0]]


@over_scripts(SCRIPTS)
def test_pasted_into_a_notebook(script, here, monkeypatch):
    """A cell has no __file__; no shell may run the name of the folder."""
    (here / "x $(touch PWNED) `touch PWNED` y").mkdir()
    monkeypatch.chdir(here / "x $(touch PWNED) `touch PWNED` y")
    source, name, module = Path(script.__file__).read_text(), "<cell>", ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    lines = source.splitlines(True)
    monkeypatch.setitem(linecache.cache, name, (len(source), None, lines, name))
    cell = source.replace('if __name__ == "__main__":\n    main()', "")
    exec(compile(cell, name, "exec"), module.__dict__)
    if script is ppo_atari:
        monkeypatch.setattr(module, "nature_cnn", script.nature_cnn)
    module.train(tiny(module, env_id=ENVS[script]))
    assert os.listdir() == ["runs"] and os.listdir("runs") == ["run"]


# ---- errors that are not the script's ----


@pytest.mark.parametrize("more", [{}, {"async_envs": True}], ids=["sync", "async"])
@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), gym.error.Error("a wheel")])
def test_errors_of_an_environment(error, more, command, monkeypatch):
    """Keep their type and place; no process is left behind."""

    def off(*_, **__):
        raise error

    for name in ("hook", "__init__"):
        monkeypatch.setattr(Walk, name, staticmethod(off) if name == "hook" else off)
        if name == "hook" or isinstance(error, OSError):
            with pytest.raises(type(error), match=re.escape(error.args[-1])) as caught:
                command(ppo_continuous, *options(tiny(ppo_continuous, run_name=name, **more)))
            assert (more and name == "hook") or caught.traceback[-1].name == "off"
            assert multiprocessing.active_children() == []


@over_scripts(VECTOR_SCRIPTS)
def test_an_environment_that_exits(script, command, monkeypatch):
    """Is no success: not of a training, nor of an evaluation."""
    assert command(script, *options(tiny(script, run_name="good"))).status == 0
    for status in (None, 0, "bye"):
        monkeypatch.setattr(Walk, "hook", staticmethod(lambda status=status: sys.exit(status)))
        assert (
            "environment" in command(script, *options(tiny(script, run_name=f"{status}"))).refusal
        )
        assert "environment" in command(script, "--evaluate", "good").refusal


def test_values_set_after_construction_are_checked_and_converted(here):
    """And the caller's object stays as it was, ready for another training."""
    args = tiny(ppo_kl_penalty, 1, kl_mode="fixed")
    args.gamma, args.kl_coef, args.run_name = np.float64(0.9), 1, None
    for seed in (np.int64(1), np.int64(2)):
        args.seed = seed
        ppo_kl_penalty.train(args)
    assert args.run_name is None and len([*here.glob("runs/*")]) == 2
    for path in here.glob("runs/*/checkpoints/last.pt"):
        saved = ppo_kl_penalty.load_checkpoint(path)
        assert saved["args"].gamma == 0.9 and type(saved["kl_coef"]) is float
