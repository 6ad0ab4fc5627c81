"""Evaluation: which episodes count, what is frozen, the command line, pictures and windows."""

import csv
import gc
import json
import multiprocessing
import multiprocessing.forkserver
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import cv2
import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pygame
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from fakes import PICTURES, SCRIPTS, over_scripts
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers.vector import rendering
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

VECTOR_SCRIPTS = [ppo_continuous, ppo_kl_penalty]
GAME_STEPS = 10  # of every Atari game here, unless it is to be played to its end


class Lottery(gym.Env):
    """Draws whether an episode has 2 or 12 steps and what they are worth; keeps how its episodes ended.

    The shapes are those of Pendulum and, with `discrete`, those of CartPole. With `careless` it draws from
    the global generators. Observations tell nothing: they are always 5. An action adds its value to the
    reward.
    """

    made: ClassVar[list["Lottery"]] = []  # in the order of the vector environment
    ended: ClassVar[list[tuple[float, int]]] = []  # (return, length) of the episodes of all of them

    def __init__(self, discrete: bool = False, careless: bool = False, prize: float = 100.0):
        self.observation_space = Box(-np.inf, np.inf, (4 if discrete else 3,), np.float32)
        self.action_space = Discrete(2) if discrete else Box(-2.0, 2.0, (1,), np.float32)
        self.careless, self.prize, self.episodes, self.actions = careless, prize, [], []
        if careless:
            random.random(), np.random.random()
        Lottery.made.append(self)

    def observe(self) -> np.ndarray:
        return np.full(self.observation_space.shape, 5.0, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        long, fraction = (random.random(), np.random.random()) if self.careless else self.np_random.random(2)
        self.length, self.worth = 12 if long < 0.3 else 2, self.prize * (1.0 + fraction)
        self.score, self.time = 0.0, 0
        return self.observe(), {}

    def step(self, action):
        self.actions.append(np.array(action))
        reward = self.worth + float(np.asarray(action).sum())
        self.score, self.time = self.score + reward, self.time + 1
        if self.time == self.length:
            self.episodes.append((self.score, self.length))
            Lottery.ended.append(self.episodes[-1])
        return self.observe(), reward, self.time == self.length, False, {}


for kind, discrete in (("Box", False), ("Discrete", True)):
    gym.register(f"Lottery{kind}-v0", Lottery, kwargs={"discrete": discrete})
    gym.register(f"Free{kind}-v0", Lottery, kwargs={"discrete": discrete, "prize": 0.0})
    gym.register(f"Careless{kind}-v0", Lottery, kwargs={"discrete": discrete, "careless": True})
PENDULUM = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
gym.register("ShortPendulum-v0", PENDULUM, max_episode_steps=15)

# What each script is trained on here; a lottery, one without prizes, and an environment of other shapes
ENVS = {ppo_atari: "ALE/Pong-v5", ppo_continuous: "ShortPendulum-v0", ppo_kl_penalty: "CartPole-v1"}
LOTTERY = {ppo_continuous: "LotteryBox-v0", ppo_kl_penalty: "LotteryDiscrete-v0"}
FREE = {ppo_continuous: "FreeBox-v0", ppo_kl_penalty: "FreeDiscrete-v0"}
CARELESS = {ppo_continuous: "CarelessBox-v0", ppo_kl_penalty: "CarelessDiscrete-v0"}
OTHER_SHAPES = {
    ppo_atari: "ALE/Breakout-v5",
    ppo_continuous: "MountainCarContinuous-v0",
    ppo_kl_penalty: "Acrobot-v1",
}
SIZES = {ppo_atari: (210, 160, 3), ppo_continuous: (500, 500, 3), ppo_kl_penalty: (400, 600, 3)}


def small_args(script, **changes):
    """3 iterations of 32 steps: the episodes of CartPole last about 20, those of the others 15 and 10."""
    sizes = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 96}
    about = {"env_id": ENVS[script], "device": "cpu", "run_name": "test", "seed": 5, "eval_episodes": 3}
    return script.Args(**about | sizes | changes)


def make_small(channels: int) -> nn.Sequential:  # (M, channels, 84, 84) -> (M, 512)
    """In place of the network of ppo_atari.py, whose checkpoints take most of a second."""
    return nn.Sequential(nn.AvgPool2d(21), nn.Flatten(), nn.Linear(channels * 16, 512), nn.Tanh())


def shorten_games(monkeypatch, steps: int = GAME_STEPS) -> None:
    original, limit = ppo_atari.game_options, {"max_num_frames_per_episode": 4 * steps}
    monkeypatch.setattr(ppo_atari, "game_options", lambda env_id: original(env_id) | limit)


@contextmanager
def at_home(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """A folder to run in, with short games and a small network."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(home)
        monkeypatch.setattr(ppo_atari, "nature_cnn", make_small)
        monkeypatch.setattr(rendering, "gc", SimpleNamespace(collect=list))  # half a second after each video
        shorten_games(monkeypatch)
        yield monkeypatch


@pytest.fixture
def here(tmp_path) -> Iterator[Path]:
    with at_home(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable:
    """A function from a script to the folder of a finished run, made on first use."""

    @cache
    def make(script) -> Path:
        home = tmp_path_factory.mktemp(script.__name__)
        with at_home(home):
            script.train(small_args(script))
        return home / "runs"

    return make


@pytest.fixture
def trained(here, runs, script) -> Path:
    """A finished run in runs/test, for this test alone."""
    shutil.copytree(runs(script), here / "runs")
    return here / "runs" / "test"


@pytest.fixture
def command(monkeypatch, capsys) -> Callable:
    """A function from a command line to its exit status, standard output and standard error."""

    def run(script, *argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        capsys.readouterr()
        try:
            script.main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report_of(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "eval.json").read_text())


def fresh_agent(script):
    """One for the lottery, or for Breakout."""
    torch.manual_seed(0)
    if script is ppo_atari:
        return script.Agent(PICTURES, Discrete(4))
    with closing(script.Envs(lottery_args(script), 1, 0, training=False)) as envs:
        return script.Agent(envs.observation_space, envs.action_space)


def lottery_args(script, **changes):
    env_id = "ALE/Breakout-v5" if script is ppo_atari else LOTTERY[script]
    return small_args(script, **{"env_id": env_id} | changes)


def play_lottery(script, **changes) -> list[tuple[float, int]]:
    agent = fresh_agent(script)
    Lottery.made.clear()
    Lottery.ended.clear()
    return script.evaluate(agent, lottery_args(script, **changes))


# ---- the episodes that count ----


@pytest.mark.parametrize(("num_envs", "eval_episodes"), [(3, 7), (3, 9), (4, 30), (5, 2), (1, 4)])
@over_scripts(VECTOR_SCRIPTS)
def test_the_first_episodes_of_each_environment_count(script, num_envs, eval_episodes):
    """As many of one as of the other, at most one more of the first ones, in the rewards of the game."""
    played = play_lottery(script, num_envs=num_envs, eval_episodes=eval_episodes)
    slots = min(num_envs, eval_episodes)
    assert len(Lottery.made) == slots
    assert played == [Lottery.made[i % slots].episodes[i // slots] for i in range(eval_episodes)]
    assert len({episodic_return for episodic_return, _ in played}) == eval_episodes


@over_scripts(VECTOR_SCRIPTS)
def test_short_episodes_do_not_push_long_ones_out(script):
    """Three of ten episodes are long, but of the first ones to end hardly any."""
    played = play_lottery(script, num_envs=20, num_steps=4, eval_episodes=20)
    first_to_end = Lottery.ended[:20]
    assert played == [env.episodes[0] for env in Lottery.made]
    long, biased = (sum(length == 12 for _, length in some) for some in (played, first_to_end))
    assert biased <= 2 and long >= 5


@over_scripts(SCRIPTS)
def test_evaluation_leaves_no_trace(script, here):
    """Neither in the agent nor in anybody's random numbers."""
    agent = fresh_agent(script)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1:3]
    assert script.evaluate(agent, lottery_args(script))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_equal(np.random.get_state()[1:3], numpy_state)
    assert agent.state_dict().keys() == before.keys()
    for name, x in agent.state_dict().items():
        assert torch.equal(x, before[name]), name
        assert x.grad is None and not x.is_inference(), name


def actions_of(monkeypatch, script, agent, **changes) -> list[np.ndarray]:
    """What evaluation gives to its environments."""
    given = []

    class Recorded(script.Envs):
        def step(self, actions):
            given.append(actions.copy())
            return super().step(actions)

    with monkeypatch.context() as patch:
        patch.setattr(script, "Envs", Recorded)
        script.evaluate(agent, lottery_args(script, **changes))
    return given


@over_scripts(SCRIPTS)
def test_likeliest_or_sampled_actions(script, here, monkeypatch):
    """Given always the same observation the likeliest action is always the same, sampled ones are not."""
    agent = fresh_agent(script)
    last_layer = agent.actor if script is ppo_atari else agent.actor[-1]
    last_layer.weight.data.zero_()
    last_layer.bias.data.fill_(0.3)
    last_layer.bias.data[-1] = 0.7  # a little likelier than the others
    likeliest = last_layer.out_features - 1 if script is not ppo_continuous else np.float32(0.7)
    given = actions_of(monkeypatch, script, agent, deterministic=True)
    np.testing.assert_array_equal(np.concatenate(given).ravel(), likeliest)
    given = np.concatenate(actions_of(monkeypatch, script, agent)).ravel()
    assert (given == likeliest).mean() < 0.9
    assert len(given) >= 6


@over_scripts(SCRIPTS)
def test_the_seed_decides(script, here, monkeypatch):
    """Actions and environments, also when the training has drawn other random numbers before."""
    agent, seen = fresh_agent(script), []

    class Recorded(script.Envs):
        def step(self, actions):
            step = super().step(actions)
            seen.append((actions.tobytes(), step.obs.tobytes(), step.rewards.tobytes()))
            return step

    def play(drawn: int, **changes):
        torch.manual_seed(drawn)
        np.random.seed(drawn)
        seen.clear()
        return script.evaluate(agent, lottery_args(script, **changes)), seen.copy()

    monkeypatch.setattr(script, "Envs", Recorded)
    sampled = play(1, seed=5)
    assert play(2, seed=5) == sampled
    _, other = play(1, seed=6)
    assert [actions for actions, _, _ in other] != [actions for actions, _, _ in sampled[1]]
    games = [play(1, seed=seed, deterministic=True)[1] for seed in (5, 6)]
    assert games[0] != games[1], "not the environments"


@over_scripts(VECTOR_SCRIPTS)
@pytest.mark.parametrize(("env_id", "camera"), [("Hopper-v5", "track"), ("InvertedPendulum-v5", None)])
def test_the_camera_follows_a_robot(script, env_id, camera, tmp_path):
    """Gymnasium's own one stays where the episode began, and soon shows nothing but the floor."""
    args = script.Args(env_id=env_id, num_envs=1)
    with closing(script.Envs(args, 1, 1, training=False, videos=tmp_path / "video")) as envs:
        env = envs.envs.env.envs[0].unwrapped
        expected = env.model.camera(camera).id if camera else -1  # -1: the free one
        assert env.mujoco_renderer.camera_id == expected


@over_scripts(VECTOR_SCRIPTS)
def test_processes_play_the_same_episodes(script):
    alone = play_lottery(script, num_envs=2, eval_episodes=5)
    assert play_lottery(script, num_envs=2, eval_episodes=5, async_envs=True) == alone


# ---- whole games of Atari ----


class Always(nn.Module):
    """An agent of one action."""

    def __init__(self, action: int, num_actions: int):
        super().__init__()
        self.logits = nn.Parameter(torch.eye(num_actions)[action])

    def forward(self, obs):
        return Categorical(logits=self.logits.expand(len(obs), -1)), None


def simulate(game: str, action: int, counts: list[int], seed) -> tuple[list[list[tuple[float, int]]], bool]:
    """Scores and lengths of the games of each environment, and whether lives were lost on the way."""
    seeds = np.random.SeedSequence(seed).generate_state(len(counts)) % 2**31
    plain = {"reward_clipping": False, "episodic_life": False, "life_loss_info": False}
    envs = AtariVectorEnv(game=game, num_envs=len(counts), autoreset_mode="SameStep", **plain)
    _, infos = envs.reset(seed=seeds.astype(int))
    scores, lengths, games = np.zeros(len(counts)), np.zeros(len(counts), int), [[] for _ in counts]
    lost, lives = False, infos["lives"].copy()
    while any(len(played) < count for played, count in zip(games, counts, strict=True)):
        _, rewards, terminations, truncations, infos = envs.step(np.full(len(counts), action))
        scores, lengths = scores + rewards, lengths + 1
        lost |= bool((infos["lives"] < lives).any())
        lives = infos["lives"].copy()
        for i in np.flatnonzero(terminations | truncations):
            games[i].append((float(scores[i]), int(lengths[i])))
            scores[i] = lengths[i] = 0
    envs.close()
    return games, lost


def test_atari_games_are_whole_and_their_scores_true():
    """Running into walls with three lives, while robots die for 50 points each."""
    games, lost = simulate("berzerk", 8, [2, 1], [5, 0, 1])
    args = {"env_id": "BerzerkNoFrameskip-v4", "num_envs": 2, "deterministic": True}
    played = ppo_atari.evaluate(Always(8, 18), small_args(ppo_atari, **args))
    assert played == [games[0][0], games[1][0], games[0][1]]
    assert lost
    assert max(score for score, _ in played) >= 50.0


# ---- frozen normalisation ----


def follow_the_sign(agent: dict[str, torch.Tensor], mean: float) -> None:
    """Likeliest is a positive action, or action 1, where the first number observed is above `mean`."""
    for name in [name for name in agent if name.startswith("actor.")]:
        agent[name].zero_()
    agent["actor.0.weight"][0, 0] = agent["actor.2.weight"][0, 0] = agent["actor.4.weight"][-1, 0] = 1.0
    agent["normalize.mean"].fill_(mean)
    agent["normalize.var"].fill_(1.0)
    agent["normalize.count"].fill_(1.0)


@over_scripts(VECTOR_SCRIPTS)
def test_normalisation_is_that_of_the_checkpoint(script, trained, command):
    """What is always 5 lies above a mean of −100 and below one of 100; statistics of its own would see 0."""
    signs = []
    for mean in (-100.0, 100.0):
        path = trained / "checkpoints" / "last.pt"
        checkpoint = torch.load(path, weights_only=True)
        follow_the_sign(checkpoint["agent"], mean)
        torch.save(checkpoint, path)
        argv = ["--deterministic", "--env-id", FREE[script], "--eval-episodes", "6"]
        status, _, _ = command(script, "--evaluate", str(trained), *argv)
        report = report_of(trained)
        assert status == 0
        signs.append(np.array(report["returns"]) / report["lengths"])
    up = np.tanh(np.tanh(10.0))  # 10 deviations at most, through two layers
    down = 0.0 if script is ppo_kl_penalty else -up
    np.testing.assert_allclose(signs, [[up if script is ppo_continuous else 1.0] * 6, [down] * 6], rtol=1e-5)


# ---- the command line ----


def table(out: str) -> dict[str, float]:
    """The one row, by the names above it; whatever else is printed comes before them."""
    *_, names, row = out.splitlines()
    return dict(zip(names.split(), map(float, row.split()), strict=True))


def check_table(out: str, report: dict, episodes: int) -> None:
    returns, lengths = np.array(report["returns"]), np.array(report["lengths"])
    assert len(returns) == len(lengths) == episodes
    statistics = {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()}
    assert {name: report[name] for name in statistics} == pytest.approx(statistics)
    expected = {"episodes": episodes, **statistics, "length": lengths.mean()}
    shown = table(out)
    assert list(shown) == list(expected)
    assert shown == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("name", ["", "checkpoints/last.pt", "checkpoints/best.pt"])
@over_scripts(SCRIPTS)
def test_table_and_eval_json(script, trained, command, name):
    """With the arguments of the run; nothing else of it changes."""
    path = trained / (name or "checkpoints/last.pt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["envs"]["num_steps"] = 1000 + len(name)  # which no other checkpoint has
    torch.save(checkpoint, path)
    before = contents(trained)
    status, out, err = command(script, "--evaluate", str(Path("runs", "test", name)))
    after = contents(trained)
    report = json.loads(after.pop(trained / "checkpoints" / "eval.json"))
    assert (status, err) == (0, "")
    assert after == before
    assert len(out.splitlines()) == 3
    assert ENVS[script] in out and path.name in out
    check_table(out, report, episodes=3)
    about = {"checkpoint": path.name, "global_step": 1000 + len(name), "env_id": ENVS[script], "seed": 5}
    assert {key: report[key] for key in about} == about
    assert report["deterministic"] is False
    if script is ppo_kl_penalty:
        assert report["returns"] == report["lengths"]  # each step is worth 1
    else:
        assert report["lengths"] == [GAME_STEPS if script is ppo_atari else 15] * 3


@over_scripts(SCRIPTS)
def test_a_checkpoint_without_its_run(script, trained, command, here):
    """eval.json comes beside it, wherever it is."""
    shutil.copy(trained / "checkpoints" / "last.pt", here / "mine.pt")
    shutil.rmtree(here / "runs")
    status, out, _ = command(script, "--evaluate", "mine.pt")
    assert status == 0
    assert sorted(path.name for path in here.iterdir()) == ["eval.json", "mine.pt"]
    check_table(out, json.loads((here / "eval.json").read_text()), episodes=3)


@over_scripts(SCRIPTS)
def test_arguments_begin_at_those_of_the_run(script, trained, monkeypatch):
    """Those given win, also where they are the defaults of the script; recording was for the training."""
    path = trained / "checkpoints" / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"] |= {"gamma": 0.5, "deterministic": True, "capture_video": True}
    torch.save(checkpoint, path)

    def parsed(*argv: str):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--evaluate", "runs/test", *argv])
        return script.parse_args()

    expected = small_args(script, evaluate="runs/test", gamma=0.5, deterministic=True)
    assert parsed() == expected
    argv = ["--seed", "1", "--eval-episodes", "10", "--no-deterministic", "--capture-video"]
    changes = {"seed": 1, "eval_episodes": 10, "deterministic": False, "capture_video": True}
    assert parsed(*argv) == script.replace(expected, **changes)
    default = script.Args().env_id
    assert default != ENVS[script] or script is ppo_kl_penalty
    assert parsed("--env-id", default).env_id == default


@over_scripts(VECTOR_SCRIPTS)
def test_another_environment_of_the_same_shapes(script, trained, command):
    before = contents(trained)
    status, out, err = command(script, "--evaluate", "runs/test", "--env-id", LOTTERY[script])
    report, after = report_of(trained), contents(trained)
    assert (status, err) == (0, "")
    assert after.keys() - before.keys() == {trained / "checkpoints" / "eval.json"}
    assert report["env_id"] == LOTTERY[script] and LOTTERY[script] in out
    assert set(report["lengths"]) <= {2, 12}
    assert min(report["returns"]) > 150.0  # no episode of the other environment is worth as much
    check_table(out, report, episodes=3)


@pytest.mark.parametrize("script", [ppo_atari])
def test_another_version_of_the_same_game(script, trained, command, monkeypatch):
    """Its id is the default of the script, and not what the checkpoint says."""
    made = []

    class Recorded(AtariVectorEnv):
        def __init__(self, **options):
            made.append(options["repeat_action_probability"])
            super().__init__(**options)

    monkeypatch.setattr(script, "AtariVectorEnv", Recorded)
    assert script.Args().env_id == "PongNoFrameskip-v4"
    status, _, _ = command(script, "--evaluate", "runs/test", "--env-id", "PongNoFrameskip-v4")
    assert (status, report_of(trained)["env_id"]) == (0, "PongNoFrameskip-v4")
    assert set(made) == {0.0}
    made.clear()
    assert command(script, "--evaluate", "runs/test")[0] == 0
    assert (set(made), report_of(trained)["env_id"]) == ({0.25}, "ALE/Pong-v5")


@over_scripts(SCRIPTS)
def test_environments_of_other_shapes_are_refused(script, trained, command):
    before = contents(trained)
    status, out, err = command(script, "--evaluate", "runs/test", "--env-id", OTHER_SHAPES[script])
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert OTHER_SHAPES[script] in err and str(Path("runs", "test", "checkpoints", "last.pt")) in err
    assert contents(trained) == before


# ---- pictures ----


def visible(env_id: str, **changes) -> ppo_atari.VisibleAtariVectorEnv:
    options = ppo_atari.game_options(env_id) | {"reward_clipping": False, "autoreset_mode": "SameStep"}
    return ppo_atari.VisibleAtariVectorEnv(num_envs=2, **options | changes)


@pytest.mark.parametrize(
    ("env_id", "maxpool"),
    [
        ("ALE/Pong-v5", True),
        ("ALE/Pong-v5", False),
        ("ALE/Breakout-v5", False),
        ("CarnivalNoFrameskip-v4", False),
    ],
)
def test_pictures_are_what_the_agent_sees(env_id, maxpool, monkeypatch):
    """In colour and full size, at every step, also across the ends of games; some actions are sticky.

    With the maximum of two frames, where things of different colours move, that of the colours is brighter
    than that of the greys.
    """
    shorten_games(monkeypatch, steps=60)
    height = 214 if "Carnival" in env_id else 210
    rng, ends, different = np.random.default_rng(2), 0, set()
    with closing(visible(env_id, maxpool=maxpool)) as envs:
        obs, _ = envs.reset(seed=np.array([11, 12]))
        for _ in range(250):
            pictures = envs.render()
            assert [picture.shape for picture in pictures] == [(height, 160, 3)] * 2
            for picture, seen in zip(pictures, obs, strict=True):
                grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
                small = cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)
                if maxpool:
                    assert (small >= seen[-1]).all()
                    assert (small != seen[-1]).mean() < 0.03
                else:
                    np.testing.assert_array_equal(small, seen[-1])
                different.add(picture.tobytes())
            obs, _, terminations, truncations, _ = envs.step(rng.integers(envs.single_action_space.n, size=2))
            ends += (terminations | truncations).sum()
    assert ends >= 8
    assert len(different) > 250
    assert (np.ptp(pictures[0].astype(int), axis=-1) > 50).any(), "in colour"


def videos_of(run: Path) -> dict[str, np.ndarray]:  # (frames, height, width, 3) by name
    return {path.name: iio.imread(path, plugin="FFMPEG") for path in sorted((run / "videos").iterdir())}


def check_video(video: np.ndarray, script, length: float) -> None:
    assert video.shape[1:] == SIZES[script]
    assert abs(len(video) - length) <= 1  # the reader may drop one
    assert np.ptp(video[0].astype(int)) > 50, "something is drawn"
    assert (video[0] != video[-1]).any(), "and moves"


@over_scripts(SCRIPTS)
def test_videos_of_an_evaluation(script, trained, command):
    """One of each episode, of all its steps; best.pt does not overwrite those of last.pt."""
    videos, prefix = {}, ENVS[script].replace("/", "-")
    for name, count in (("last", 2), ("best", 1)):
        argv = ["--capture-video", "--eval-episodes", str(count), "--num-envs", "2"]
        before = set((trained / "videos").glob("*"))
        status, out, err = command(script, "--evaluate", f"runs/test/checkpoints/{name}.pt", *argv)
        assert (status, err, len(out.splitlines())) == (0, "", 3)
        assert out.splitlines()[0].endswith("actions, recorded in runs/test/videos")
        check_table(out, report_of(trained), episodes=count)
        written = sorted(set((trained / "videos").iterdir()) - before)
        assert [path.name for path in written] == [f"{name}-{prefix}-episode-{i}.mp4" for i in range(count)]
        for path, length in zip(written, report_of(trained)["lengths"], strict=True):
            videos[path.name] = iio.imread(path, plugin="FFMPEG")
            check_video(videos[path.name], script, length)
    if script is ppo_atari:
        check_colours(videos["last-ALE-Pong-v5-episode-0.mp4"][0])


def check_colours(picture: np.ndarray) -> None:
    """Field, walls and scores are those of any other game of Pong."""
    with closing(visible("ALE/Pong-v5")) as envs:
        envs.reset(seed=np.array([1, 2]))
        expected = envs.render()[0].astype(int)
    assert np.abs(expected - picture).mean() < 5.0
    assert np.abs(expected - picture[..., ::-1]).mean() > 10.0, "red and blue exchanged"


# ---- videos of the training ----


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    known = tag in reader.Tags()["scalars"]
    return [(event.step, event.value) for event in reader.Scalars(tag)] if known else []


def episodes_of(run: Path) -> list[tuple]:
    """Without their wall time."""
    with open(run / "episodes.csv", newline="") as file:
        return [(row["global_step"], row["return"], row["length"]) for row in csv.DictReader(file)]


class FakeWandbRun:
    """Keeps what it is told."""

    id = "fake"

    def __init__(self):
        self.logged: list[tuple[int, dict]] = []
        self.models: list[tuple[int, str]] = []  # iteration of a checkpoint, name

    def log(self, data: dict, step: int) -> None:
        self.logged.append((step, data))

    def log_model(self, path: str, name: str) -> None:
        self.models.append((torch.load(path, weights_only=True)["iteration"], name))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code

    def steps_of(self, key: str) -> list[int]:
        return [step for step, data in self.logged if key in data]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Callable:
    """A function from a script to a run recorded at each iteration, and to what W&B got of it."""

    @cache
    def make(script) -> tuple[Path, FakeWandbRun]:
        home, fake = tmp_path_factory.mktemp(script.__name__), FakeWandbRun()
        with at_home(home) as monkeypatch:
            monkeypatch.setattr(script, "init_wandb", lambda *_: fake)
            script.train(small_args(script, capture_video=True, checkpoint_interval=0.0, track=True))
        return home / "runs" / "test", fake

    return make


@over_scripts(SCRIPTS)
def test_training_records_at_checkpoints(script, recordings):
    """An mp4 at each one, and a point in TensorBoard and in W&B; also the last one comes once."""
    run, fake = recordings(script)
    videos, returns = videos_of(run), points(run, "charts/eval_return")
    assert sorted(videos) == [f"step-{step}-episode-0.mp4" for step in (32, 64, 96)]
    for step, episodic_return in returns:
        length = {ppo_atari: GAME_STEPS, ppo_continuous: 15, ppo_kl_penalty: episodic_return}[script]
        check_video(videos[f"step-{step}-episode-0.mp4"], script, length)
        assert -15 * 17 < episodic_return < 0 if script is ppo_continuous else episodic_return >= -1
    steps = [step for step, _ in fake.logged]
    assert steps == sorted(steps), "W&B drops what comes late"
    assert [step for step, _ in returns] == [32, 64, 96]
    assert fake.steps_of("charts/eval_return") == [32, 64, 96]
    assert fake.steps_of("videos") == [32, 64, 96]
    assert fake.exit_code == 0


@over_scripts(SCRIPTS)
def test_recording_does_not_change_the_training(script, runs, recordings):
    """Not a bit; the iterations after the first recording would show it."""
    (run, _), plain = recordings(script), runs(script) / "test"
    assert not (plain / "videos").exists()
    assert points(plain, "charts/eval_return") == []
    assert points(run, "charts/eval_return") != []
    assert len(episodes_of(run)) >= 3
    assert episodes_of(run) == episodes_of(plain)
    for key in ("losses/value_loss", "charts/episodic_return"):
        assert points(run, key) == points(plain, key) != []
    ours, theirs = (torch.load(x / "checkpoints" / "last.pt", weights_only=True) for x in (run, plain))
    for part in ("agent", "optimizer", "envs", "rng", "iteration"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0.0, atol=0.0)


@over_scripts(VECTOR_SCRIPTS)
def test_evaluation_leaves_the_global_generators_alone(script):
    """Environments may draw from them, and train() seeds them for that."""
    agent = fresh_agent(script)
    np.random.seed(3)
    before, python_before = np.random.get_state()[1:3], random.getstate()
    played = script.evaluate(agent, lottery_args(script, env_id=CARELESS[script]))
    assert len(played) == 3
    np.testing.assert_equal(np.random.get_state()[1:3], before)
    assert random.getstate() == python_before


def break_recording(monkeypatch, script, what: str) -> None:
    def fail(*_, **__):
        raise OSError(f"{what} is\nbroken")

    if what == "RecordVideo":
        monkeypatch.setattr(gym.wrappers.vector, "RecordVideo", fail)
    elif what == "the encoder":
        monkeypatch.setattr("moviepy.video.io.ImageSequenceClip.ImageSequenceClip.write_videofile", fail)
    elif script is ppo_atari:
        monkeypatch.setattr(ppo_atari.VisibleAtariVectorEnv, "render", fail)
    else:
        monkeypatch.setattr(gym.vector.SyncVectorEnv, "render", fail)


@pytest.mark.slow
def test_processes_tell_themselves_how_to_draw(tmp_path, monkeypatch):
    """As Python 3.14 does it, they come from a process that is older than the wish for pictures."""
    for name in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        multiprocessing.forkserver.ensure_running()
        args, videos = small_args(ppo_continuous, env_id="Hopper-v5", async_envs=True), tmp_path / "a" / "b"
        with closing(ppo_continuous.Envs(args, 1, 0, training=False, videos=videos)) as envs:
            envs.reset()
            (picture,) = envs.envs.render()
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert np.ptp(picture.astype(int)) > 50


over_failures = pytest.mark.parametrize(
    ("script", "what"),
    [
        *((script, "render") for script in SCRIPTS),
        (ppo_kl_penalty, "RecordVideo"),
        (ppo_continuous, "the encoder"),
    ],
)


@over_failures
def test_training_goes_on_without_videos(script, here, monkeypatch, capsys, what):
    break_recording(monkeypatch, script, what)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script.train(small_args(script, capture_video=True, checkpoint_interval=0.0))
    out, err = capsys.readouterr()
    assert re.findall(r"^.*videos: .*$", out, re.M) == [
        f"training goes on without videos: OSError: {what} is broken"
    ]
    assert err == ""
    assert not [str(w.message) for w in caught if "video" in str(w.message).lower()], "only one line"
    run = here / "runs" / "test"
    assert torch.load(run / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 3
    assert points(run, "charts/eval_return") == []
    assert [step for step, _ in points(run, "charts/SPS")] == [32, 64, 96]


@over_failures
def test_evaluation_without_videos_still_has_a_table(script, trained, command, monkeypatch, what):
    gc.collect()  # recorders of other tests, which warn of what they could not save
    break_recording(monkeypatch, script, what)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, out, err = command(script, "--evaluate", "runs/test", "--capture-video")
    assert (status, err) == (0, f"no videos: OSError: {what} is broken\n")
    assert not [str(w.message) for w in caught if "video" in str(w.message).lower()], "only one line"
    assert len(out.splitlines()) == 3
    check_table(out, report_of(trained), episodes=3)
    assert report_of(trained)["env_id"] == ENVS[script]


# ---- windows ----


@over_scripts(SCRIPTS)
def test_window_shows_every_step(script, trained, command, monkeypatch):
    """In the size of the simulator, the first picture too; on SDL's display without a screen."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    sizes, shown = [], []
    set_mode, flip = pygame.display.set_mode, pygame.display.flip

    def opened(size, *rest):
        sizes.append(tuple(size))
        return set_mode(size, *rest)

    def flipped():
        shown.append(pygame.surfarray.array3d(pygame.display.get_surface()).tobytes())
        flip()

    monkeypatch.setattr(pygame.display, "set_mode", opened)
    monkeypatch.setattr(pygame.display, "flip", flipped)
    before = contents(trained)
    argv = ["--render", "--eval-episodes", "2", "--num-envs", "2"]
    status, out, err = command(script, "--evaluate", "runs/test", *argv)
    report = report_of(trained)
    assert (status, err) == (0, "")
    check_table(out, report, episodes=2)
    height, width, _ = SIZES[script]
    assert sizes == [(width, height)]
    assert len(shown) == 1 + sum(report["lengths"])
    assert len(set(shown)) > 3
    assert contents(trained).keys() - before.keys() == {trained / "checkpoints" / "eval.json"}


@over_scripts(SCRIPTS)
def test_without_a_screen_there_is_still_a_table(script, trained, command, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "nonsense")
    status, out, err = command(script, "--evaluate", "runs/test", "--render")
    assert status == 0
    assert re.fullmatch(r"no window: [^\n]+\n", err)
    assert len(out.splitlines()) == 3
    check_table(out, report_of(trained), episodes=3)


@over_scripts(SCRIPTS)
def test_no_window_where_nobody_would_see_it(script, trained, command, monkeypatch):
    """SDL would take a driver of its own that shows nothing."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    status, out, err = command(script, "--evaluate", "runs/test", "--render")
    assert (status, err) == (0, "no window: OSError: there is no display\n")
    check_table(out, report_of(trained), episodes=3)


@over_scripts(SCRIPTS)
def test_window_only_for_evaluation_and_not_with_videos(script, trained, command):
    before = contents(trained.parent)
    alone = command(script, "--render")
    both = command(script, "--evaluate", "runs/test", "--render", "--capture-video")
    for (status, out, err), other in ((alone, "--evaluate"), (both, "--capture-video")):
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]*--render\b[^\n]*\n", err) and other in err
    assert contents(trained.parent) == before


# ---- W&B ----


@over_scripts(SCRIPTS)
def test_wandb_gets_the_video(script, here):
    iio.imwrite(here / "clip.mp4", np.zeros((3, 32, 32, 3), np.uint8), plugin="FFMPEG", fps=10)
    with closing(script.Logger(small_args(script))) as logger:
        logger.wandb = fake = FakeWandbRun()
        logger.log_video(64, here / "clip.mp4")
        ((step, data),) = fake.logged
    assert (step, list(data)) == (64, ["videos"])
    assert data["videos"]._format == "mp4"
    assert Path(data["videos"]._path).read_bytes() == (here / "clip.mp4").read_bytes()


@over_scripts(SCRIPTS)
def test_wandb_gets_the_last_checkpoint(script, recordings):
    assert recordings(script)[1].models == [(3, "fake-last")]


@over_scripts(SCRIPTS)
def test_wandb_knows_that_a_run_has_failed(script, here, monkeypatch):
    fake = FakeWandbRun()
    monkeypatch.setattr(script, "init_wandb", lambda *_: fake)
    with pytest.raises(FloatingPointError):
        script.train(small_args(script, track=True, learning_rate=1e30))
    assert fake.exit_code == 1


@over_scripts(SCRIPTS)
def test_without_wandb_a_video_goes_nowhere_else(script, here):
    with closing(script.Logger(small_args(script))) as logger:
        before = contents(here)
        logger.log_video(64, here / "there-is-none.mp4")
        assert contents(here) == before
