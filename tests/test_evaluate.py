"""Playing a checkpoint: scores, normalisation, random numbers, files, videos."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from fakes import ENVS, SCRIPTS, VECTOR_SCRIPTS, Walk, over_scripts, scalars, tiny

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

pytestmark = pytest.mark.usefixtures("small_network", "here")


@pytest.fixture
def play(here, command):
    """Trains where there is nothing yet, plays it and reads eval.json."""
    folder = here / "runs" / "run" / "checkpoints"

    def run(script, *more, name="run"):
        if not folder.exists():
            script.train(tiny(script, eval_episodes=6))
            state = torch.load(folder / "last.pt", weights_only=True)
            if script in VECTOR_SCRIPTS:  # a policy that depends on the observation
                state["agent"]["actor.4.weight"] *= 100.0
            state["args"]["device"] = "cuda:5"  # of the machine where it was trained
            torch.save(state, folder / "last.pt")
        Walk.steps.clear()
        Walk.episodes.clear()
        outcome = command(script, "--evaluate", name, *more)
        assert outcome.status == 0, outcome
        score = json.loads((folder / "eval.json").read_text())
        score["out"], score["seen"] = outcome.out, [(*obs, *np.ravel(a)) for obs, a in Walk.steps]
        return score

    return run


def by_hand(agent, obs, discrete):
    """The likeliest action, from the tensors of a checkpoint."""
    mean, var = agent["normalize.mean"], agent["normalize.var"]
    x = ((torch.tensor(obs, dtype=torch.float32) - mean) / (var + 1e-8).sqrt()).clamp(-10, 10)
    for layer in ("actor.0", "actor.2", "actor.4"):
        x = torch.tanh(x) if layer != "actor.0" else x
        x = agent[f"{layer}.weight"] @ x + agent[f"{layer}.bias"]
    return x.argmax() if discrete else x.clamp(-1, 1)


@over_scripts(VECTOR_SCRIPTS)
def test_scores_and_actions(script, play):
    """Whole episodes, not scaled, of the likeliest actions given the statistics of training."""
    score = play(script, "--deterministic")
    assert score["returns"] == pytest.approx([x for x, _ in Walk.episodes], abs=1e-3)
    assert len(Walk.episodes) == 6
    assert len(Walk.steps) == sum(n for _, n in Walk.episodes)
    mean, std = np.mean(score["returns"]), np.std(score["returns"])
    assert f"return {mean:.2f} ± {std:.2f}, 6 episodes" in score["out"]
    assert score["args"]["deterministic"] and not score["args"]["resume"]
    saved = torch.load("runs/run/checkpoints/last.pt", weights_only=True)["agent"]
    expected = [by_hand(saved, obs, script is ppo_kl_penalty) for obs, _ in Walk.steps]
    given = [action for _, action in Walk.steps]
    np.testing.assert_allclose(given, np.array(expected), atol=1e-4)
    assert len({action.tobytes() for action in given}) > 1


@over_scripts(VECTOR_SCRIPTS)
def test_seeds(script, play):
    """Repeatable, whatever was drawn before; another seed is another game with other actions."""
    first = play(script, "--seed", 5)
    np.random.seed(3)
    again, other = play(script, "--seed", 5), play(script, "--seed", 6)
    starts = {x[:3] for x in first["seen"]}
    assert again["seen"] == first["seen"] and len(starts) == len(first["seen"])
    likeliest = [play(script, "--seed", seed, "--deterministic")["seen"] for seed in (5, 6)]
    assert first["seen"] not in (other["seen"], likeliest[0])
    assert [x[:3] for x in likeliest[0]] != [x[:3] for x in likeliest[1]]


@over_scripts(SCRIPTS)
def test_name_folder_or_file(script, here, play, command):
    folder, one = here / "runs" / "run", ("--eval-episodes", 1)
    heads = [play(script, *one, name=name)["out"] for name in ("run", "runs/run", str(folder))]
    shutil.copy(folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt")
    heads.append(play(script, *one, name="runs/run/checkpoints/best.pt")["out"])
    heads = [out.splitlines()[-1].partition(" ± ")[0] for out in heads]
    assert heads == [heads[0]] * 3 + [heads[0].replace("last", "best")] and "step-64" in heads[0]
    assert "nowhere" in command(script, "--evaluate", "nowhere").refusal
    assert "no checkpoint" in command(script, "--evaluate", "").refusal


def test_videos_of_an_evaluation(here, play, monkeypatch):
    """Of a classic-control environment, which draws with pygame."""
    monkeypatch.setitem(ENVS, ppo_kl_penalty, "CartPole-v1")
    play(ppo_kl_penalty)
    monkeypatch.chdir(here / "runs" / "run" / "checkpoints")  # so that the file has no folder
    more = "--eval-episodes", 2, "--capture-video"
    returns = play(ppo_kl_penalty, *more, name="last.pt")["returns"]
    files = sorted((here / "runs" / "run" / "videos").glob("*.mp4"))
    frames = [cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT) for file in files]
    assert frames == [n + 1 for n in returns]  # which are lengths here


def test_a_window_instead_of_the_videos_of_training(here, play, monkeypatch):
    made, make_env = [], ppo_continuous.make_env
    ppo_continuous.train(tiny(ppo_continuous, 1, capture_video=True))
    monkeypatch.setattr(
        ppo_continuous, "make_env", lambda *x, **how: made.append(how) or make_env(*x, **how)
    )
    play(ppo_continuous, "--render")
    assert {"render_mode": "human"} in made and len([*here.glob("runs/run/videos/*.mp4")]) == 1


def test_videos_of_a_training(here, monkeypatch):
    """One at each checkpoint; the training is what it would be without, and so if one fails."""
    agents, script = {}, ppo_continuous
    for name in ("with", "without", "broken"):
        if name == "broken":
            monkeypatch.setattr(Walk, "render", lambda env: 1 / 0)
        more = {"capture_video": name != "without", "run_name": name}
        script.train(tiny(script, 2, checkpoint_interval=0.0, **more))
        path = here / "runs" / name / "checkpoints" / "last.pt"
        agents[name] = torch.load(path, weights_only=True)["agent"]
    for name, x in agents["with"].items():
        assert torch.equal(x, agents["without"][name]) and torch.equal(x, agents["broken"][name])
    videos = {path.name.partition("-episode")[0] for path in here.glob("runs/with/videos/*.mp4")}
    assert videos == {"step-16", "step-32"} and not (here / "runs/without/videos").exists()
    assert {16, 32} == {step for step, _ in scalars(here / "runs/with")["charts/eval_return"]}


def test_the_background_is_the_same_in_training_and_evaluation(monkeypatch, here):
    seen, noted = [], lambda self, obs: seen.append(self.background) or forward(self, obs)
    forward, args = ppo_atari.Agent.forward, tiny(ppo_atari, background=87.0, env_id="Short-v0")
    monkeypatch.setattr(ppo_atari.Agent, "forward", noted)
    for play in (lambda: ppo_atari.train(args), lambda: ppo_atari.evaluate_checkpoint(args)):
        seen.clear()
        play()
        assert {*seen} == {87.0}
