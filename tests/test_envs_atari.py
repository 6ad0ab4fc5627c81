"""Envs of ppo_atari.py against gymnasium's own AtariEnv and preprocessing, picture by picture."""

import os
import sys
from contextlib import closing, suppress
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import ppo_atari

gym.register_envs(ale_py)
SEED = 4


class RecordedEnv(AtariVectorEnv):
    """Keeps what the simulator was asked for and which frame of its game each environment is at."""

    def __init__(self, **options):
        super().__init__(**options)
        self.options = options
        self.frames: list[np.ndarray] = []  # of each reset and step

    def reset(self, **options):
        obs, infos = super().reset(**options)
        self.frames.append(infos["episode_frame_number"].copy())
        return obs, infos

    def step(self, actions):
        result = super().step(actions)
        self.frames.append(result[-1]["episode_frame_number"].copy())
        return result


def make_envs(monkeypatch, env_id: str, num_envs: int = 2, seed: int = SEED, training=True, **options):
    """Envs on a recorded simulator, with some of the options of its game replaced."""
    original = ppo_atari.game_options
    monkeypatch.setattr(ppo_atari, "AtariVectorEnv", RecordedEnv)
    monkeypatch.setattr(ppo_atari, "game_options", lambda env_id: original(env_id) | options)
    return ppo_atari.Envs(ppo_atari.Args(env_id=env_id), num_envs, seed, training)


class Opening(gym.Wrapper):
    """Begins a game as AtariVectorEnv does: FIRE where the game has it, then as many no-ops as it drew."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.frame = 0  # the one to begin at
        self.has_fire = "FIRE" in env.unwrapped.get_action_meanings()

    def reset(self, **options):
        result = self.env.reset(**options)
        noops = self.frame - self.unwrapped.ale.getEpisodeFrameNumber() - self.has_fire
        for action in [1] * self.has_fire + [0] * noops:
            self.env.step(action)
        return result


class Twin:
    """One game, never sticky, in gymnasium's AtariPreprocessing and FrameStackObservation.

    The time limit is inside, as it is in AtariVectorEnv: both leave out the very last frame of a game cut.
    """

    def __init__(self, game: str, max_steps: int | None):
        env = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0, disable_env_checker=True)
        self.opening = Opening(env)
        env = gym.wrappers.TimeLimit(self.opening, 4 * max_steps) if max_steps else self.opening
        env = AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84, grayscale_obs=True)
        self.env = FrameStackObservation(env, 4, padding_type="zero")

    def reset(self, frame: int) -> np.ndarray:
        self.opening.frame = frame
        obs, _ = self.env.reset()
        self.score, self.length, self.lives = 0.0, 0, self.opening.unwrapped.ale.lives()
        return obs

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, bool]:
        """Picture, reward, game over, time limit reached, life lost."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.score, self.length = self.score + reward, self.length + 1
        life_lost, self.lives = info["lives"] < self.lives, info["lives"]
        return obs, reward, terminated, truncated, life_lost


class Play(NamedTuple):
    """The same actions in Envs and in its twins; rows are steps, columns environments."""

    steps: list[ppo_atari.Step]
    finished: list[tuple[int, float, int]]
    same_pictures: np.ndarray  # (T + 1, N), the first row is the reset
    same_final: np.ndarray  # (T, N) False where final_obs is not what the twin saw last before a time limit
    rewards: np.ndarray  # (T, N) of the twins, as are all below
    over: np.ndarray  # (T, N) games over
    cut: np.ndarray  # (T, N) time limits
    lost: np.ndarray  # (T, N) lives lost
    expected: list[tuple[int, float, int]]  # what should be in `finished`


@cache
def play(game: str, num_steps: int, max_steps: int | None = None, training: bool = True) -> Play:
    """Two environments and their twins, `max_steps` to a game."""
    options = {"max_num_frames_per_episode": 4 * max_steps} if max_steps else {}
    rng, num_envs = np.random.default_rng(8), 1 if game == "Pong" else 2
    twins = [Twin(game, max_steps) for _ in range(num_envs)]
    steps, same_pictures, same_final, outcomes, expected = [], [], [], [], []
    with pytest.MonkeyPatch.context() as monkeypatch:
        envs = make_envs(monkeypatch, f"{game}NoFrameskip-v4", num_envs, training=training, **options)
        with closing(envs):
            obs, frames = envs.reset(), envs.envs.frames
            first = [twin.reset(frame) for twin, frame in zip(twins, frames[0], strict=True)]
            same_pictures.append([np.array_equal(*pair) for pair in zip(obs, first, strict=True)])
            for t in range(num_steps):
                actions = rng.integers(envs.action_space.n, size=num_envs)
                step = envs.step(actions)
                same, final, outcome = [], [], []
                for i, twin in enumerate(twins):
                    picture, *what = twin.step(actions[i])
                    outcome.append(what)
                    _, over, cut, lost = what
                    only_cut = cut and not over and not (lost and training)
                    final.append(not only_cut or np.array_equal(step.final_obs[i], picture))
                    if over or cut:
                        expected.append((t * num_envs + i + 1, twin.score, twin.length))
                        picture = twin.reset(frames[-1][i])
                    same.append(np.array_equal(step.obs[i], picture))
                steps.append(step)
                same_pictures.append(same)
                same_final.append(final)
                outcomes.append(outcome)
            finished = envs.finished
    rewards, over, cut, lost = np.moveaxis(np.array(outcomes, dtype=float), -1, 0)
    over, cut, lost = (x.astype(bool) for x in (over, cut, lost))
    same = np.array(same_pictures), np.array(same_final)
    return Play(steps, finished, *same, rewards, over, cut, lost, expected)


def field(play: Play, name: str) -> np.ndarray:  # (T, N)
    return np.stack([getattr(step, name) for step in play.steps])


# Pong has no lives and both signs of reward, Breakout FIRE and five lives, Berzerk rewards of 50. The numbers
# of steps are what it takes random actions to end a game; Pong gets one environment as it takes the longest.
GAMES = [("Pong", 805), ("Breakout", 220), ("Berzerk", 240)]
over_games = pytest.mark.parametrize(("game", "num_steps"), GAMES)


@over_games
def test_pictures_are_those_of_gymnasium(game, num_steps):
    """Also across game overs, whose no-ops and FIRE the twin repeats."""
    result = play(game, num_steps)
    assert result.over.any(0).all(), "each environment should end a game"
    assert result.same_pictures.all()


@over_games
def test_training_rewards_are_signs(game, num_steps):
    result = play(game, num_steps)
    rewards = field(result, "rewards")
    assert rewards.dtype == np.float32
    assert np.abs(result.rewards).max() >= (50 if game == "Berzerk" else 1)
    np.testing.assert_array_equal(rewards, np.sign(result.rewards))


@over_games
def test_finished_reports_whole_games_in_the_score_of_the_game(game, num_steps):
    """One entry per game, whatever the lives lost and the signs trained on."""
    result = play(game, num_steps)
    assert result.expected
    assert result.finished == result.expected


@over_games
def test_a_lost_life_is_terminal_in_training(game, num_steps):
    """The simulator's game goes on (test_pictures…) and so does its score (test_finished…)."""
    result = play(game, num_steps)
    if game != "Pong":
        assert (result.lost & ~result.over).any()
    np.testing.assert_array_equal(field(result, "terminations"), result.lost | result.over)
    np.testing.assert_array_equal(field(result, "dones"), result.lost | result.over)
    assert all(step.final_obs is None for step in result.steps)


def test_without_training_lives_and_rewards_are_those_of_the_game():
    result = play("Berzerk", 240, training=False)
    assert (result.lost & ~result.over).any()
    assert result.over.any()
    np.testing.assert_array_equal(field(result, "rewards"), result.rewards)
    assert field(result, "rewards").dtype == np.float32
    np.testing.assert_array_equal(field(result, "terminations"), result.over)
    np.testing.assert_array_equal(field(result, "dones"), result.over)
    assert result.finished == result.expected
    assert result.same_pictures.all()


@pytest.mark.parametrize("training", [True, False])
def test_time_limit_is_no_termination(training):
    """Two games of 127 and 216 steps: with a limit of 150 one is over and the other one cut."""
    result = play("Breakout", 155, max_steps=150, training=training)
    ends = result.over | (result.lost & training)
    assert (result.cut & ~ends).any()
    assert result.over.any()
    np.testing.assert_array_equal(field(result, "terminations"), ends)
    np.testing.assert_array_equal(field(result, "dones"), ends | result.cut)
    assert result.finished == result.expected
    assert result.same_pictures.all()


def test_final_obs_is_the_last_picture_of_a_game_that_was_cut():
    result = play("Breakout", 155, max_steps=150, training=True)
    cut = result.cut & ~result.lost & ~result.over
    assert cut.any()
    assert result.same_final.all()
    given = [step.final_obs is not None for step in result.steps]
    np.testing.assert_array_equal(given, cut.any(1))
    for step in (step for step in result.steps if step.final_obs is not None):
        assert (step.final_obs.shape, step.final_obs.dtype) == ((2, 4, 84, 84), np.uint8)


def test_life_lost_at_the_time_limit_is_terminal_and_ends_the_game():
    """The same game twice: the second time cut in the very step in which the first one lost a life."""
    result = play("Breakout", 220)
    t = int(np.flatnonzero(result.lost.sum(1) == 1)[0])
    i = int(result.lost[t].argmax())
    again = play("Breakout", t + 1, max_steps=t + 1)
    assert again.cut[t].all()
    assert again.lost[t, i] and not again.lost[t, 1 - i]
    step = again.steps[t]
    assert (step.terminations[i], step.dones[i]) == (True, True)
    assert (step.terminations[1 - i], step.dones[1 - i]) == (False, True)
    assert [end for end, _, _ in again.finished] == [2 * t + 1, 2 * t + 2]
    assert again.finished == again.expected


def test_finished_counts_every_game_from_zero():
    """Two games cut in one step three times: steps that increase, and nothing kept of the game before."""
    result = play("Berzerk", 125, max_steps=40)
    ends, scores, lengths = zip(*result.finished, strict=True)
    assert ends == (79, 80, 159, 160, 239, 240)
    assert lengths == (40,) * 6
    assert any(scores[:2]) and any(scores[2:4])
    assert result.finished == result.expected


IDS = {
    "PongNoFrameskip-v4": (4, 0.0),
    "PongNoFrameskip-v0": (4, 0.25),
    "PongDeterministic-v4": (4, 0.0),
    "PongDeterministic-v0": (4, 0.25),
    "SpaceInvadersDeterministic-v4": (3, 0.0),
    "SpaceInvadersNoFrameskip-v4": (4, 0.0),
    "Pong-v4": (4, 0.0),
    "Pong-v0": (4, 0.25),
    "ALE/Pong-v5": (4, 0.25),
    "ALE/SpaceInvaders-v5": (4, 0.25),
}


@pytest.mark.parametrize(("env_id", "expected"), IDS.items(), ids=IDS)
def test_ids_name_game_frameskip_and_sticky_actions(env_id, expected):
    options = ppo_atari.game_options(env_id)
    assert (options["frameskip"], options["repeat_action_probability"]) == expected
    assert options["game"] == ("space_invaders" if "SpaceInvaders" in env_id else "pong")


@pytest.mark.parametrize("env_id", ["SpaceInvadersDeterministic-v4", "PongDeterministic-v4", "ALE/Pong-v5"])
def test_simulator_is_given_what_the_id_says(monkeypatch, env_id):
    frameskip, sticky = IDS[env_id]
    with closing(make_envs(monkeypatch, env_id)) as envs:
        assert envs.envs.options["repeat_action_probability"] == sticky
        assert envs.action_space.n == 6
        envs.reset()
        for _ in range(5):
            envs.step(np.array([2, 3]))
        frames = np.array(envs.envs.frames)
    assert (np.diff(frames, axis=0) == frameskip).all()


def observe(envs: ppo_atari.Envs, num_steps: int) -> list[np.ndarray]:
    """Reset and random actions, the same ones for the same number of environments."""
    rng = np.random.default_rng(1)
    with closing(envs):
        seen = [envs.reset()]
        for _ in range(num_steps):
            seen.append(envs.step(rng.integers(envs.action_space.n, size=envs.num_envs)).obs)
    return seen


def test_observations_are_fresh_bytes_of_the_promised_space(monkeypatch):
    envs = make_envs(monkeypatch, "PongNoFrameskip-v4")
    assert (envs.observation_space.shape, envs.observation_space.dtype) == ((4, 84, 84), np.uint8)
    seen = observe(envs, 5)
    for obs in seen:
        assert (obs.shape, obs.dtype) == ((2, 4, 84, 84), np.uint8)
    for i, obs in enumerate(seen):
        assert not any(np.shares_memory(obs, other) for other in seen[i + 1 :])


def test_nothing_returned_changes_later(monkeypatch):
    """A learner keeps the arrays of a whole rollout."""
    with closing(make_envs(monkeypatch, "BreakoutNoFrameskip-v4", max_num_frames_per_episode=4)) as envs:
        envs.reset()
        step = envs.step(np.array([1, 2]))
        copies = [field.copy() for field in step]
        for _ in range(10):
            envs.step(np.array([3, 0]))
    for kept, copy in zip(step, copies, strict=True):
        np.testing.assert_array_equal(kept, copy)


@pytest.mark.skipif(sys.platform != "linux", reason="the scheduler of Linux is told")
def test_threads_of_games_do_not_interrupt(monkeypatch):
    """Those of torch, which start later, may; where the scheduler refuses, games are played all the same."""

    def policies() -> list[int]:
        return sorted(os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task"))

    before = policies()
    with closing(make_envs(monkeypatch, "ALE/Breakout-v5", 2, num_threads=2)):
        assert policies() == sorted([*before, os.SCHED_BATCH, os.SCHED_BATCH])
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
    with suppress(ValueError), ppo_atari.patient_threads():
        raise ValueError
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    monkeypatch.setattr(os, "sched_setscheduler", Mock(side_effect=PermissionError))
    observe(make_envs(monkeypatch, "ALE/Breakout-v5", 1), 2)
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_IDLE)  # as the user may have chosen
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("changes it"))
    observe(make_envs(monkeypatch, "ALE/Breakout-v5", 1), 2)
    monkeypatch.delattr(os, "sched_getscheduler")  # as on other systems
    observe(make_envs(monkeypatch, "ALE/Breakout-v5", 1), 2)


def test_same_seed_same_games_on_any_number_of_threads(monkeypatch):
    """Sticky actions and no-ops included: the games are cut every 20 steps."""
    short = {"max_num_frames_per_episode": 80}
    runs = [
        observe(make_envs(monkeypatch, "ALE/Breakout-v5", 3, SEED, num_threads=threads, **short), 60)
        for threads in (1, 2)
    ]
    np.testing.assert_array_equal(*runs)


def test_threads_are_those_of_the_machine_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with closing(make_envs(monkeypatch, "PongNoFrameskip-v4", 1)) as envs:
        assert envs.envs.options["num_threads"] == 4


def test_other_seeds_and_other_environments_are_other_games(monkeypatch):
    pictures = []
    for seed in (SEED, SEED + 1):
        with closing(make_envs(monkeypatch, "BreakoutNoFrameskip-v4", 2, seed)) as envs:
            pictures += [picture.tobytes() for picture in envs.reset()]
    assert len(set(pictures)) == 4


def test_instances_keep_their_own_metadata(monkeypatch):
    """AtariVectorEnv writes its autoreset mode into a dict of the class."""
    with closing(make_envs(monkeypatch, "PongNoFrameskip-v4", 1)) as envs:
        other = AtariVectorEnv(game="pong", num_envs=1, autoreset_mode="NextStep")
        with closing(other), closing(make_envs(monkeypatch, "PongNoFrameskip-v4", 1)) as third:
            assert envs.envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
            assert third.envs.metadata is not envs.envs.metadata


# ---- rollouts ----


def picture(numbers: np.ndarray) -> np.ndarray:
    """One for each number, all of that grey."""
    return np.broadcast_to(numbers[:, None, None, None], (len(numbers), 4, 84, 84)).astype(np.uint8)


class GreyGames:
    """Two that show 10·t + i; one is cut at t = 1, the other terminates at t = 2 and is cut at t = 3."""

    first = picture(np.arange(2))

    def __init__(self):
        self.t = 0

    def step(self, actions: np.ndarray) -> ppo_atari.Step:
        t, self.t = self.t, self.t + 1
        over, cut = np.array([False, t == 2]), np.array([t == 1, t == 3])
        final = picture(np.array([200 + t, 200 + t])) if cut.any() else None
        return ppo_atari.Step(self.first + 10 * self.t, np.array([t, -t]), over, over | cut, final)


def test_rows_of_a_rollout():
    """The value after a time limit is that of the last picture, not of the next game's first."""

    def value(obs: torch.Tensor) -> torch.Tensor:
        return obs[:, 0, 0, 0].float()

    def act(agent, obs: torch.Tensor, noise: torch.Tensor):
        return torch.zeros(2, dtype=torch.int64), torch.zeros(2), value(obs)

    agent, first = SimpleNamespace(value=value, noise=torch.zeros), torch.from_numpy(GreyGames.first)
    rollout, obs = ppo_atari.collect_rollout(agent, GreyGames(), first, 4, act)
    assert rollout.obs[..., 0, 0, 0].tolist() == rollout.values.tolist()
    assert rollout.values.tolist() == [[0, 1], [10, 11], [20, 21], [30, 31]]
    assert rollout.next_values.tolist() == [[10, 11], [201, 21], [30, 31], [40, 203]]
    assert rollout.rewards.tolist() == [[0, 0], [1, -1], [2, -2], [3, -3]]
    assert rollout.terminations.tolist() == [[0, 0], [0, 0], [0, 1], [0, 0]]
    assert rollout.dones.tolist() == [[0, 0], [1, 0], [0, 1], [0, 1]]
    assert value(obs).tolist() == [40, 41]
