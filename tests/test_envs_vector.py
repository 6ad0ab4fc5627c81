"""The environments of both scripts for vectors, against small ones whose every step is known."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Tuple

import ppo_continuous
import ppo_kl_penalty

SEED = [1, 0]
SECOND = int(np.random.SeedSequence(SEED).generate_state(2)[1])  # seed of the second environment


@pytest.fixture(params=[ppo_continuous, ppo_kl_penalty], ids=lambda script: script.__name__)
def script(request):
    return request.param


def make_args(script, env_id, num_envs=2, **changes):
    small = {"num_steps": 32, "num_minibatches": 2, "total_timesteps": 128, "compile": False}
    return script.Args(env_id=env_id, num_envs=num_envs, **small | changes)


@contextmanager
def opened(script, env_id, num_envs=2, seed=SEED, **changes):
    made = script.Envs(make_args(script, env_id, num_envs, **changes), seed)
    with closing(made.envs):
        yield made


def play(script, env_id, num_steps, num_envs=2, seed=SEED, **changes):
    """Envs after random actions, its first observations, all that it returned, uncopied."""
    actions = np.random.default_rng(0).normal(size=(num_steps, num_envs, 1)).astype(np.float32)
    with opened(script, env_id, num_envs, seed, **changes) as made:
        first = made.reset()
        steps = [made.step(row) for row in actions]
    return made, first, steps, actions.clip(-1.0, 1.0)[..., 0]


WALKS = {
    "one array for all": {"reuse": True},
    "float64": {"observation_space": Box(-np.inf, np.inf, (3,), np.float64)},
    "async": {"reuse": True},
}


@pytest.mark.parametrize("kind", WALKS)
@pytest.mark.filterwarnings("ignore:.*share an object")
def test_steps_and_episodes(script, kind):
    """Where an episode ended, obs is the next one's first, and final_obs its own last."""
    env_id = envs.register(envs.Walk, envs.LIMIT, **WALKS[kind])
    made, first, steps, actions = play(script, env_id, 40, 3, async_envs=kind == "async")
    stories = [envs.story(seed, column) for seed, column in zip(made.seeds, actions.T)]
    np.testing.assert_array_equal(first, [(seed % 1000, 0, 0) for seed in made.seeds])
    for what, got in zip(script.Step._fields, zip(*steps)):
        i = script.Step._fields.index(what)
        expected = [[rows[t][i] for rows, _ in stories] for t in range(40)]
        np.testing.assert_allclose(np.stack(got), expected, rtol=1e-6, err_msg=what)
    assert {steps[0].obs.dtype, steps[0].final_obs.dtype, first.dtype} == {np.dtype(np.float32)}
    assert (steps[0].terminations.dtype, steps[0].dones.dtype) == (bool, bool)
    episodes = [(t, i, *rest) for i, (_, ends) in enumerate(stories) for t, *rest in ends]
    expected = [(3 * t, i, total, length) for t, i, total, length in sorted(episodes)]
    np.testing.assert_allclose(made.finished, expected)
    assert made.global_step == 120


@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_an_id_may_stand_for_any_function(script, bonus):
    """Without render_mode; with wrappers of its own."""

    def make():
        wrap = gym.wrappers.TransformReward
        return wrap(envs.Odd(), lambda reward: reward + bonus) if bonus else envs.Odd()

    gym.register("Made-v0", make, max_episode_steps=3)
    try:
        assert play(script, "Made-v0", 3)[0].finished == [(6, i, 3.0 * bonus, 3) for i in (0, 1)]
    finally:
        del gym.registry["Made-v0"]


def test_seeds_and_ranks(script, monkeypatch):
    """A seed decides all; every environment of every process has its own."""
    env_id = envs.register(obs=lambda self: self.np_random.random(2, np.float32))

    def seen(seed):
        _, first, steps, _ = play(script, env_id, 3, 4, seed)
        return np.stack([first, *(step.obs for step in steps)])

    alone = seen([1, 0])
    np.testing.assert_array_equal(alone, seen([1, 0]))
    assert len(np.unique([alone, seen([2, 0]), seen([1, 64])])) == 3 * 4 * 4 * 2
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    for rank in 0, 1:
        monkeypatch.setattr(script, "RANK", rank)
        with opened(script, env_id, 4, [1, 0]) as made:
            np.testing.assert_array_equal(made.reset(), alone[0, 2 * rank :][:2])
            made.step(np.zeros((2, 1), np.float32))
        assert made.global_step == 4


WHOLE = Box(0, 3, (2,), np.int64)
FAR = Box(2**62, np.iinfo(np.int64).max, (1,), np.int64)
BOUNDS = np.array([[-1.0, 0.0], [0.5, np.inf]], np.float32)
GRID = np.arange(6.0).reshape(1, 6) / 4.0 - 0.5
ACTIONS = {  # space, what the policy sampled for each environment, what they should get
    "clipped": (Box(*BOUNDS), [[-3.0, -0.5], [0.25, 7.0]], [[-1.0, 0.0], [0.25, 7.0]]),
    "float64": (Box(-0.1, 0.1, (1,), np.float64), [[0.5], [-0.0625]], [[0.1], [-0.0625]]),
    "float16": (Box(-1.0, 1.0, (1,), np.float16), [[0.5], [-7.0]], [[0.5], [-1.0]]),
    "whole": (
        WHOLE,
        [[0.4, 0.6], [-7.0, 9.0], [1.7, 2.2]],
        [[0, 0], [0, 3], [1, 2]],
    ),  # without what follows the point
    "far": (FAR, [[1.0]], [[2**62]]),
    "bytes": (Box(0, 255, (2,), np.uint8), [[-1.0, 3.7]], [[0, 3]]),
    "bool": (Box(0, 1, (2,), bool), [[-2.0, 0.7]], [[False, True]]),
    "0-d": (Box(-1.0, 1.0, ()), [[0.25], [2.0]], [0.25, 1.0]),
    "2-d": (Box(-1.0, 0.5, (2, 3)), GRID, GRID.reshape(1, 2, 3).clip(-1.0, 0.5)),
    "start": (Discrete(3, start=-1), [0, 2], [-1, 1]),
    "dtype": (Discrete(5, start=251, dtype=np.uint8), [0, 4], [251, 255]),
    "huge": (Discrete(3, start=2**62), [0, 1], [2**62, 2**62 + 1]),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.filterwarnings("ignore:.*Casting input")
def test_actions_fit_their_space(script, name):
    space, sampled, expected = ACTIONS[name]
    sampled = np.array(sampled, np.int64 if isinstance(space, Discrete) else np.float32)
    with opened(script, envs.register(action_space=space), len(sampled)) as made:
        obs, before = torch.from_numpy(made.reset()), sampled.copy()
        made.step(sampled)
        received = [np.asarray(env.unwrapped.actions[0]) for env in made.envs.envs]
    np.testing.assert_array_equal(sampled, before, "the learner's own")
    for got, want in zip(received, expected):
        assert (got.dtype, got.shape) == (space.dtype, space.shape)
        np.testing.assert_array_equal(got, np.array(want, space.dtype))
    agent = script.Agent(made.observation_space, made.action_space)
    assert agent.sample(*agent.policy(obs), agent.noise(len(obs))).shape == sampled.shape


NESTED = Dict(z=Discrete(3, start=5), a=Dict(x=Box(0, 255, (2, 2), np.uint8)), b=MultiBinary(2))
PAIR = Tuple((MultiDiscrete([2, 3]), Box(-1.0, 1.0, ())))
IMAGE = Box(0, 255, (4, 5, 3), np.uint8)
WIDE = Box(-9.0, 9.0, (2, 2), np.float64)


@pytest.mark.parametrize("space", [NESTED, PAIR, Discrete(4, start=2), IMAGE, WIDE], ids=str)
@pytest.mark.filterwarnings("ignore:.*Casting input", "ignore:.*share an object")
def test_observations_are_flattened_as_by_gymnasium(script, space):
    space.seed(3)
    shown = space.sample()
    env_id = envs.register(observation_space=space, obs=lambda self: shown)
    _, first, (step,), _ = play(script, env_id, 1)
    expected = np.tile(gym.spaces.flatten(space, shown).astype(np.float32), (2, 1))
    for obs in first, step.obs:
        assert obs.dtype == np.float32
        np.testing.assert_array_equal(obs, expected)


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
def test_spaces_that_differ_in_their_bounds(script, async_envs):
    limits = count(1.0)

    def init(self, render_mode=None):
        limit, self.actions = next(limits), []
        self.observation_space = self.action_space = Box(-limit, limit, (2,))

    with opened(script, envs.register(__init__=init), async_envs=async_envs) as made:
        made.reset()
        made.step(np.zeros((2, 2), np.float32))


MANY, EMPTY = Dict({f"motor{i}": Box(-1.0, 1.0) for i in range(40)}), Box(-1.0, 1.0, (0,))
UNFIT = [("action_space", x) for x in (MANY, MultiDiscrete([9] * 200), MultiBinary(2), EMPTY, None)]
UNFIT += [
    ("observation_space", x) for x in (EMPTY, Dict(), Graph(WIDE, None), Sequence(WIDE), None)
]


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda unfit: str(unfit)[:40])
def test_other_spaces_are_refused_in_a_line_that_says_what_is_handled(script, unfit, capsys):
    """Whatever the length of that line: only its beginning is shown."""
    with pytest.raises(script.Refusal) as refusal:
        script.make_env(envs.register(**dict([unfit])))
    script.say(f"error: {refusal.value}")
    assert "Box or Discrete actions" in capsys.readouterr().out


def becomes(value, at):
    return lambda self: value if self.time == at else 0.0


WRONG = {  # what becomes wrong after which step, where the limit of an episode is 4
    "observation": ("obs", becomes(np.nan, 3), 3),
    "infinite": ("obs", becomes(-np.inf, 3), 3),
    "last observation": ("obs", becomes(np.nan, 4), 4),
    "first observation": ("obs", becomes(np.nan, 0), 0),
    "reward": ("reward", becomes(np.nan, 3), 3),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:.*not within the observation space")
def test_numbers_that_are_not_finite(script, name):
    """The message says which environment, which number and when."""
    what, wrong, when = WRONG[name]

    def second(self):
        usual = getattr(envs.Odd, what)(self)
        return usual + np.float32(wrong(self) if self.name == SECOND else 0.0)

    shown = {"obs": "observation", "reward": "reward"}[what]
    with pytest.raises(script.Refusal, match=f"environment 1, step {when}: .*{shown}"):
        play(script, envs.register(limit=envs.LIMIT, **{what: second}), 4)


OLD = {
    "not a tuple of the form": {"reset": lambda self, **_: np.zeros(2, np.float32)},
    "old step API": {"step": lambda self, _: (np.zeros(2, np.float32), 0.0, False, {})},
    "expecting numpy array dtype to be uint8": {"observation_space": Box(0, 255, (2,), np.uint8)},
}


@pytest.mark.parametrize("warning", OLD)
def test_gymnasium_warns_of_what_does_not_keep_its_api(script, warning):
    with warnings.catch_warnings(record=True) as caught, suppress(ValueError):
        warnings.simplefilter("always")
        play(script, envs.register(**OLD[warning]), 1)
    assert any(warning in str(one.message) for one in caught)


def test_errors_of_the_environment_are_not_cut_down_to_a_line(script, here):
    for wrong in {"__init__": lambda self, **_: open("robot.urdf")}, {"step": lambda *_: open("x")}:
        with pytest.raises(FileNotFoundError) as error:
            script.train(make_args(script, envs.register(**wrong)))
        assert Path(error.traceback[-1].path) == Path(__file__), "the user's own line"


def test_an_environment_that_ends_the_process_is_an_error(script, here, command):
    env_id = envs.register(step=lambda *_: sys.exit(0))
    assert "ended the process" in command(script, "--env-id", env_id).refusal


class Trap(envs.Odd):
    def fail(self):
        pass

    def step(self, action):
        if self.time == 3 and self.name == SECOND:  # when the first one has answered
            self.fail()
        return super().step(action)


def throw(error):
    raise error


def interrupted(envs, wait=gym.vector.AsyncVectorEnv.step_wait):
    type(envs).step_wait = wait
    envs.parent_pipes[0].recv()
    raise KeyboardInterrupt


FAILURES = {  # what is replaced by what, and the error to be told of
    "an error": (Trap, "fail", lambda _: throw(ValueError("wheel")), "ValueError('wheel')"),
    "a dead process": (Trap, "fail", lambda _: os._exit(0), ""),
    "Ctrl-C within a step": (gym.vector.AsyncVectorEnv, "step_wait", interrupted, "Interrupt"),
    "the main process": (ppo_continuous, "compute_gae", lambda *_: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_no_process_stays_after_a_failure(name, here):
    *replaced, expected = FAILURES[name]
    args = make_args(ppo_continuous, envs.register(Trap), async_envs=True)
    reader, writer = os.pipe()  # inherited by all processes: it ends when the last one has ended

    def child():
        os.close(reader)
        os.setpgid(0, 0)
        setattr(*replaced)
        try:
            ppo_continuous.train(args)
        except BaseException as error:
            os.write(writer, f"{error!r}, left: {multiprocessing.active_children()}".encode())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writer)
    said, part, end = "", "?", time.monotonic() + 25.0
    try:
        while part and select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(reader, 1000).decode()
            said += part
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        os.close(reader)
    assert not part, f"still there after {said!r}"
    assert expected in said and said.endswith("left: []")


MINE = """
import envs

class Here(envs.Odd):
    pass

if __name__ == "__main__":
    gym.register("Here-v0", Here)
    for method in "forkserver", "spawn":
        multiprocessing.set_start_method(method, force=True)
        made = Envs(Args(env_id="Here-v0", async_envs=True, num_envs=1), 1)
        made.reset()
        made.step(np.zeros((1, 1), np.float32))
        made.envs.close()
        print(method)
"""


def test_environments_registered_in_the_running_script(here):
    """Python 3.14 starts processes by forkserver, macOS by spawn: neither knows their ids."""
    code, ending = (
        Path(ppo_continuous.__file__).read_text(),
        'if __name__ == "__main__":\n    main()\n',
    )
    assert ending in code
    (here / "mine.py").write_text(code.replace(ending, MINE))
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    options = {"env": path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "mine.py"], **options)
    assert done.stdout.split() == ["forkserver", "spawn"], done.stderr


def scaled(rewards, dones, gamma):
    """By the deviation of all discounted returns so far, computed anew from all of them."""
    seen, discounted, result = [], np.zeros(rewards.shape[1]), []
    for reward, done in zip(rewards, dones):
        discounted = gamma * discounted + reward
        seen.extend(discounted)
        result.append(np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10.0, 10.0))
        discounted[done] = 0.0
    return np.array(result)


def test_scaled_rewards(script):
    """From one rollout to the next; at first there is no deviation to divide by."""
    rng = np.random.default_rng(5)
    rewards, dones = rng.normal(2.0, 3.0, (12, 3)), rng.random((12, 3)) < 0.3
    rewards[0] = 1.0, 1.0, 1.0
    with opened(script, envs.register(), 3) as made:
        parts = [made.scale_rewards(rewards[t], dones[t], 0.9) for t in (slice(7), slice(7, 12))]
    np.testing.assert_allclose(np.concatenate(parts), scaled(rewards, dones, 0.9), rtol=1e-6)
    assert (parts[0][0] == 10.0).all()
