"""Envs of ppo_atari.py against its make_env, picture by picture, and what becomes of each id."""

from contextlib import closing
from itertools import count
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from ale_py import AtariEnv

import ppo_atari

NUMBERS = count()


def register(limit=None, entry_point="ale_py.env:AtariEnv", wrappers=(), **options):
    env_id = f"Game{next(NUMBERS)}-v0"
    rest = {"max_episode_steps": limit, "additional_wrappers": wrappers}
    gym.register(env_id, entry_point, kwargs={"game": "pong"} | options, **rest)
    return env_id


def make_envs(env_id, num_envs=1, seed=4):
    return ppo_atari.Envs(ppo_atari.Args(env_id=env_id, num_envs=num_envs), seed)


class Drawn:
    """In place of a generator: as many no-ops as the simulator of Envs drew for this game."""

    def __init__(self, envs):
        self.envs = envs

    def integers(self, high):
        assert high == 30  # as its noop_max: 0 to 29, of which FIRE replaces one
        return int(self.envs.frames[0])


def seed_game(self, seed=None):
    self.ale.setInt("random_seed", seed or 0)  # AtariEnv would hash it first
    return seed, seed


def play(env_id, num_steps, monkeypatch):
    """The same random actions in Envs and in make_env; all that they return must agree."""
    envs, env = make_envs(env_id), ppo_atari.make_env(env_id)
    assert env.observation_space == envs.observation_space
    assert env.action_space == envs.action_space
    monkeypatch.setattr(AtariEnv, "np_random", Drawn(envs))
    monkeypatch.setattr(AtariEnv, "seed_game", seed_game)
    seen = SimpleNamespace(actions=envs.action_space.n, over=0, cut=0, lost=[], rewards=set())
    np.testing.assert_array_equal(envs.reset()[0], env.reset(seed=int(envs.seeds[0]))[0])
    seen.openings, rng = [int(envs.frames[0])], np.random.default_rng(8)
    score, length, lives, finished = 0.0, 0, env.unwrapped.ale.lives(), []
    with closing(envs.envs), closing(env):
        for t in range(num_steps):
            action = int(rng.integers(seen.actions))
            step = envs.step(np.array([action]))
            obs, reward, terminated, truncated, info = env.step(action)
            score, length = score + reward, length + 1
            lost, lives = info["lives"] < lives, info["lives"]
            assert step.rewards[0] == np.sign(reward), t
            assert step.terminations[0] == (terminated or lost), t
            assert step.dones[0] == (terminated or lost or truncated), t
            seen.rewards.add(reward)
            if lost and not terminated:
                seen.lost.append(t)
            if terminated or truncated:
                if truncated and not (terminated or lost):
                    np.testing.assert_array_equal(step.final_obs[0], obs)
                    seen.cut += 1
                seen.over += terminated
                finished.append((t + 1, 0, score, length))
                obs, _ = env.reset()
                seen.openings.append(int(envs.frames[0]))
                score, length, lives = 0.0, 0, env.unwrapped.ale.lives()
            np.testing.assert_array_equal(step.obs[0], obs, err_msg=f"step {t}")
            assert envs.returns[0] == score and envs.lengths[0] == length, t
    assert envs.global_step == num_steps
    assert envs.finished == finished
    seen.lengths = [length for *_, length in finished]
    return seen


SURE = {"repeat_action_probability": 0.0}
PLAYED = {  # each game, and what is to be seen in it
    "BreakoutNoFrameskip-v4": (250, lambda x: x.over and len(x.lost) > 4 and max(x.openings) > 1),
    "SpaceInvadersDeterministic-v4": (400, lambda x: x.lost and max(x.rewards) > 1),
    "PongNoFrameskip-v4": (90, lambda x: x.rewards == {-1.0, 0.0}),
    "FreewayNoFrameskip-v4": (20, lambda x: x.openings[0] > 0),  # it has no FIRE
    "ALE/Breakout-v5": (120, lambda x: x.lost),  # sticky actions
    register(**SURE, frameskip=2): (40, lambda x: x.actions == 6),
    register(**SURE, full_action_space=True): (40, lambda x: x.actions == 18),
    register(**SURE, max_num_frames_per_episode=120): (65, lambda x: x.lengths == [30, 30]),
    register(30, **SURE): (35, lambda x: x.lengths == [30] and x.cut == 1),
    register(**SURE, max_num_frames_per_episode=150): (40, lambda x: x.lengths == [38]),
}


@pytest.mark.parametrize(("env_id", "what"), PLAYED.items(), ids=PLAYED)
def test_same_pictures_rewards_and_ends(env_id, what, monkeypatch):
    num_steps, condition = what
    seen = play(env_id, num_steps, monkeypatch)
    assert condition(seen), seen


def test_a_life_lost_at_the_time_limit_is_terminal_and_ends_the_game(monkeypatch):
    t, *_ = play(register(**SURE, game="breakout"), 60, monkeypatch).lost
    env_id = register(**SURE, game="breakout", max_num_frames_per_episode=4 * (t + 1))
    seen = play(env_id, t + 2, monkeypatch)
    assert (seen.lost, seen.lengths, seen.cut) == ([t], [t + 1], 0)


def test_seeds_and_ranks(monkeypatch):
    """A seed decides no-ops and sticky actions; every game of every process has its own."""

    def seen(seed):
        envs = make_envs("ALE/Breakout-v5", 2, seed)
        with closing(envs.envs):
            first, right = envs.reset(), np.full(len(envs.seeds), 2)
            return np.stack([first, *(envs.step(right).obs for _ in range(12))], 1), envs

    alone, _ = seen([1, 0])
    np.testing.assert_array_equal(alone, seen([1, 0])[0])
    assert len({game.tobytes() for game in (*alone, *seen([2, 0])[0])}) == 4
    monkeypatch.setattr(ppo_atari, "WORLD_SIZE", 2)
    for rank in 0, 1:
        monkeypatch.setattr(ppo_atari, "RANK", rank)
        part, envs = seen([1, 0])
        np.testing.assert_array_equal(part[0], alone[rank])
        assert envs.global_step == 12 * 2


USUAL = {"game": "pong", "frameskip": 4, "repeat_action_probability": 0.25}
USUAL |= {"full_action_space": False, "max_num_frames_per_episode": 108_000}
INVADERS, LIMIT = {"game": "space_invaders"}, "max_num_frames_per_episode"
TIME_AWARE = gym.wrappers.TimeAwareObservation.wrapper_spec()
DONE = [
    ("PongNoFrameskip-v4", SURE),
    ("SpaceInvadersDeterministic-v4", SURE | INVADERS | {"frameskip": 3}),
    ("SpaceInvadersNoFrameskip-v4", SURE | INVADERS),
    ("ale_py:ALE/Pong-v5", {}),
    ("ale_py:PongDeterministic-v4", SURE),
    (register(entry_point=AtariEnv, mode=None, difficulty=0), {}),
    (register(full_action_space=True, obs_type="rgb"), {"full_action_space": True}),
    (register(50, frameskip=1), {LIMIT: 50}),
    (register(50, frameskip=2), {LIMIT: 100, "frameskip": 2}),
    (register(50, frameskip=(2, 5)), {LIMIT: 200}),
    (register(50, **{LIMIT: 120}), {LIMIT: 120}),
    (register(**{LIMIT: 0}), {}),  # no limit in AtariEnv
]
REFUSED = [
    (register(mode=1), "'mode': 1"),
    (register(difficulty=1), "'difficulty': 1"),
    (register(obs_type="ram"), "'obs_type': 'ram'"),
    (register(continuous=True, continuous_action_threshold=0.3), "'continuous': True"),
    (register(sound_obs=True), "'sound_obs': True"),
    (register(game="no_such_game"), "no_such_game"),
    (register(wrappers=(TIME_AWARE,)), "no plain game"),
    ("no_module:Pong-v4", "No module named 'no_module'"),
    ("CartPole-v1", "CartPoleEnv"),
    ("Pongg-v4", "Pongg"),
    ("Pong v4", "Malformed"),
]


@pytest.mark.parametrize(("env_id", "options"), DONE)
def test_what_an_id_says_is_done(env_id, options):
    assert ppo_atari.game_options(env_id) == USUAL | options


@pytest.mark.parametrize(("env_id", "reason"), REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(env_id, reason, recwarn):
    for make in make_envs, ppo_atari.make_env:
        with pytest.raises(ppo_atari.Refusal) as refusal:
            make(env_id)
        assert str(refusal.value).startswith(f"--env-id {env_id}: ")
        assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert not recwarn


@pytest.mark.parametrize(("options", "fps"), [({}, 15), ({"frameskip": 2}, 30)])
def test_pictures_are_in_colour_and_at_the_speed_of_the_game(options, fps):
    with closing(ppo_atari.make_env(register(**options), render_mode="rgb_array")) as env:
        env.reset(seed=1)
        picture = env.render().astype(int)
        assert env.metadata["render_fps"] == fps
    assert picture.shape == (210, 160, 3) and np.ptp(picture, axis=-1).max() > 50
    assert AtariEnv.metadata["render_fps"] == 30  # the class is left alone
