"""Envs of the two vector scripts on small environments whose every step is known in advance."""

import itertools
import random
import signal
import subprocess
from contextlib import closing
from time import monotonic
from typing import ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from fakes import over_scripts
from gymnasium.spaces import Box, Dict, Discrete
from torch.distributions import Categorical, Independent, Normal

import ppo_continuous
import ppo_kl_penalty

over_vector_scripts = over_scripts([ppo_continuous, ppo_kl_penalty])
LIMIT = 4


class Event(NamedTuple):
    """One step of one walker."""

    obs: tuple  # before
    reward: float
    terminated: bool
    truncated: bool
    last: tuple  # the observation the step led to
    next: tuple  # the one to act on next: `last`, or the first of the next episode


class Walk(gym.Env):
    """Shows (walker, episode, time) and terminates after a number of steps that differs from walk to walk.

    Registered with a limit of 4 steps: some walks of 2 to 6 terminate, some are cut and those of 4 are both.
    With `reuse` all observations are one array, overwritten also by reset.
    """

    made: ClassVar[list["Walk"]] = []  # in the order of the vector environment

    def __init__(self, reuse: bool = False, discrete: bool = False, dtype: type = np.float64):
        self.observation_space = Box(-np.inf, np.inf, (3,), dtype)
        self.action_space = Discrete(2, start=5) if discrete else Box(-1.0, 1.0, (1,))
        self.walker, self.episode, self.dtype = len(Walk.made), -1, dtype
        self.buffer = np.zeros(3, dtype) if reuse else None
        self.log = []  # (obs before, action, reward) of each step really taken
        Walk.made.append(self)

    @staticmethod
    def length(walker: int, episode: int) -> int:
        return 2 + (2 * walker + 3 * episode) % 5

    @staticmethod
    def reward(walker: int, episode: int, time: int) -> float:
        return (walker + 1) * (time - 1.5) + 0.25 * (episode % 3)

    def observe(self) -> np.ndarray:
        if self.buffer is None:
            return np.array([self.walker, self.episode, self.time], self.dtype)
        self.buffer[:] = self.walker, self.episode, self.time
        return self.buffer

    def reset(self, *, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        before = (self.walker, self.episode, self.time)
        reward = self.reward(*before)
        self.log.append((before, np.array(action), reward))
        self.time += 1
        return self.observe(), reward, self.time == self.length(self.walker, self.episode), False, {}


class Forever(gym.Env):
    """One state, reward 1 and no end but for the limit it is registered with."""

    observation_space, action_space = Box(-1.0, 1.0, (1,)), Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}


gym.register("Walk-v0", Walk, max_episode_steps=LIMIT)
gym.register("WalkReuse-v0", Walk, max_episode_steps=LIMIT, kwargs={"reuse": True})
gym.register("WalkFloat32-v0", Walk, max_episode_steps=LIMIT, kwargs={"dtype": np.float32})
gym.register("WalkDiscrete-v0", Walk, max_episode_steps=LIMIT, kwargs={"discrete": True})
gym.register("Forever-v0", Forever, max_episode_steps=10)


def story(walker: int, num_steps: int) -> list[Event]:
    """What happens to a walker, told without vector environments and wrappers."""
    events = []
    for episode in itertools.count():
        length = Walk.length(walker, episode)
        for time in range(min(length, LIMIT)):
            here, there = (walker, episode, time), (walker, episode, time + 1)
            terminated, truncated = time + 1 == length, time + 1 == LIMIT
            following = (walker, episode + 1, 0) if terminated or truncated else there
            events.append(Event(here, Walk.reward(*here), terminated, truncated, there, following))
            if len(events) == num_steps:
                return events


def stories(name: str, num_steps: int, num_envs: int = 3) -> np.ndarray:  # (T, N, …)
    told = [[getattr(event, name) for event in story(i, num_steps)] for i in range(num_envs)]
    return np.swapaxes(np.array(told), 0, 1)


def make_envs(script, env_id: str, num_envs: int = 3, seed: int = 1, training: bool = False, **args):
    Walk.made.clear()
    return script.Envs(script.Args(env_id=env_id, **args), num_envs, seed, training)


def walk(script, env_id: str = "Walk-v0", num_steps: int = 40, **options):
    """Envs after some steps, with all that they returned, kept as a learner keeps it: uncopied."""
    with closing(make_envs(script, env_id, **options)) as envs:
        first = envs.reset()
        actions = np.zeros((envs.num_envs, 1), dtype=np.float32)
        steps = [envs.step(actions) for _ in range(num_steps)]
    return envs, first, steps


def field(steps: list, name: str) -> np.ndarray:  # (T, N, …)
    return np.stack([getattr(step, name) for step in steps])


def test_the_walks_cover_every_kind_of_end():
    terminated, truncated = stories("terminated", 40), stories("truncated", 40)
    assert (terminated & truncated).any()
    only_terminated, cut = terminated & ~truncated, truncated & ~terminated
    assert (only_terminated.any(1) & cut.any(1)).any(), "both kinds in one step, in different slots"
    assert (cut.any(1) & ~cut.all(1)).any()


@pytest.mark.parametrize("env_id", ["Walk-v0", "WalkReuse-v0", "WalkFloat32-v0"])
@over_vector_scripts
def test_observations_and_ends(script, env_id):
    """After an end comes the next episode's first observation, and the true last one only at time limits."""
    _, first, steps = walk(script, env_id)
    np.testing.assert_array_equal(first, stories("obs", 1)[0])
    np.testing.assert_array_equal(field(steps, "obs"), stories("next", 40))
    terminated, truncated = stories("terminated", 40), stories("truncated", 40)
    np.testing.assert_array_equal(field(steps, "terminations"), terminated)
    np.testing.assert_array_equal(field(steps, "dones"), terminated | truncated)
    cut, last = truncated & ~terminated, stories("last", 40)
    for t, step in enumerate(steps):
        assert (step.final_obs is not None) == cut[t].any()
        if step.final_obs is not None:
            np.testing.assert_array_equal(step.final_obs[cut[t]], last[t][cut[t]])


@over_vector_scripts
def test_arrays_are_float32_and_bool(script):
    _, first, steps = walk(script)
    assert first.dtype == np.float32
    for step in steps:
        assert step.obs.dtype == np.float32
        assert (step.terminations.dtype, step.dones.dtype) == (bool, bool)
        assert step.final_obs is None or step.final_obs.dtype == np.float32


@over_vector_scripts
def test_rewards_of_a_step_are_those_of_the_environment(script):
    _, _, steps = walk(script)
    np.testing.assert_array_equal(field(steps, "rewards"), stories("reward", 40))


def scaled(rewards: np.ndarray, dones: np.ndarray, gamma: float) -> np.ndarray:
    """By the deviation of all discounted returns so far, computed anew at each step from all of them."""
    seen, discounted, result = [], np.zeros(rewards.shape[1]), []
    for reward, done in zip(rewards, dones, strict=True):
        discounted = gamma * discounted + reward
        seen.extend(discounted)
        result.append(np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10.0, 10.0))
        discounted = np.where(done, 0.0, discounted)
    return np.array(result)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
@over_vector_scripts
def test_rewards_of_rollouts_are_scaled(script, gamma):
    """Also from one rollout to the next."""
    rollout, _ = collect(script, "Walk-v0", (7, 1, 32), scaled=True, gamma=gamma)
    dones = stories("terminated", 40) | stories("truncated", 40)
    expected = scaled(stories("reward", 40), dones, gamma)
    assert rollout.rewards.dtype == np.float32
    np.testing.assert_allclose(rollout.rewards, expected, rtol=1e-4)


@over_vector_scripts
def test_scaled_rewards_stay_within_ten(script):
    """A first reward has no deviation yet to be divided by."""
    rollout, _ = collect(script, "Walk-v0", (2,), scaled=True, num_envs=1)
    assert rollout.rewards[0] == -10.0


@pytest.mark.parametrize("training", [True, False])
@over_vector_scripts
def test_finished_are_the_episodes_in_their_own_rewards(script, training):
    envs, _, _ = walk(script, training=training)
    expected, start = [], [0, 0, 0]
    for t, i in itertools.product(range(40), range(3)):
        event = story(i, t + 1)[-1]
        if event.terminated or event.truncated:
            rewards = [e.reward for e in story(i, t + 1)[start[i] :]]
            expected.append((3 * t + i + 1, sum(rewards), len(rewards)))
            start[i] = t + 1
    assert envs.finished == expected
    ends = [step for step, _, _ in expected]
    assert ends == sorted(set(ends))
    assert envs.num_steps == 120


class Bounded(gym.Env):
    """Keeps the actions it gets; the bounds differ from element to element, some are infinite."""

    low = np.array([[-1.0, -0.1, -np.inf], [0.0, -np.inf, 0.5]], dtype=np.float32)
    high = np.array([[0.5, 2.0, 0.25], [0.1, np.inf, np.inf]], dtype=np.float32)
    observation_space, action_space = Box(-1.0, 1.0, (2,)), Box(low, high)
    received: ClassVar[list[np.ndarray]] = []

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        self.received.append(np.array(action))
        return np.zeros(2, dtype=np.float32), 0.0, False, False, {}


gym.register("Bounded-v0", Bounded)


@over_vector_scripts
def test_clipped_action_is_executed_and_sampled_one_learned_from(script):
    torch.manual_seed(0)
    Bounded.received.clear()
    with closing(make_envs(script, "Bounded-v0", num_envs=2)) as envs:
        agent = script.Agent(envs.observation_space, envs.action_space)
        agent.log_std.data.fill_(1.0)
        rollout, _ = script.collect_rollout(agent, envs, torch.from_numpy(envs.reset()), num_steps=20)
    actions = rollout.actions.numpy()
    assert actions.shape == (20, 2, 6)
    assert (actions < Bounded.low.ravel()).any()
    assert (actions > Bounded.high.ravel()).any()
    assert np.abs(actions).max() > 3.0, "also where nothing bounds them; the deviation is e"
    inside = np.minimum(np.maximum(actions.reshape(-1, 2, 3), Bounded.low), Bounded.high)
    np.testing.assert_array_equal(np.array(Bounded.received), inside)
    with torch.no_grad():
        mean = agent(rollout.obs[0])[0].mean.numpy()
    z = (actions - mean) / np.e
    expected = (-0.5 * z**2 - 1.0 - 0.5 * np.log(2.0 * np.pi)).sum(-1)
    np.testing.assert_allclose(rollout.logprobs.numpy(), expected, rtol=1e-4)


def test_discrete_actions_are_counted_from_zero_by_the_learner():
    torch.manual_seed(0)
    with closing(make_envs(ppo_kl_penalty, "WalkDiscrete-v0", num_envs=2)) as envs:
        agent = ppo_kl_penalty.Agent(envs.observation_space, envs.action_space)
        rollout, _ = ppo_kl_penalty.collect_rollout(agent, envs, torch.from_numpy(envs.reset()), num_steps=20)
        executed = np.array([[action for _, action, _ in env.log] for env in Walk.made]).T
    assert set(executed.ravel().tolist()) == {5, 6}
    np.testing.assert_array_equal(rollout.actions.numpy(), executed - 5)


class Shown(gym.Env):
    """Shows one thing."""

    action_space = Box(-1.0, 1.0, (1,))

    def __init__(self, observation_space: gym.Space, obs: object):
        self.observation_space, self.obs = observation_space, obs

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, action):
        return self.obs, 0.0, False, False, {}


BOTH = Dict({"second": Discrete(3), "first": Box(-1.0, 1.0, (2,), np.float32)})
OBSERVATIONS = {
    "Dict": (BOTH, {"first": np.array([0.5, -1.0], dtype=np.float32), "second": 2}, [0.5, -1, 0, 0, 1]),
    "Box34": (Box(0.0, 20.0, (3, 4), np.float64), np.arange(12.0).reshape(3, 4), list(range(12))),
    "Discrete": (Discrete(4, start=2), 3, [0, 1, 0, 0]),
    "Bytes": (Box(0, 255, (2,), np.uint8), np.array([0, 255], dtype=np.uint8), [0, 255]),
}
for name, (space, shown, _) in OBSERVATIONS.items():
    gym.register(f"Shown{name}-v0", Shown, kwargs={"observation_space": space, "obs": shown})


@pytest.mark.parametrize("name", OBSERVATIONS)
@over_vector_scripts
def test_observations_become_flat_float32(script, name):
    expected = OBSERVATIONS[name][-1]
    with closing(make_envs(script, f"Shown{name}-v0", num_envs=2)) as envs:
        first, step = envs.reset(), envs.step(np.zeros((2, 1), dtype=np.float32))
        assert envs.observation_space.shape == (len(expected),)
        values = script.Agent(envs.observation_space, envs.action_space).value(torch.from_numpy(first))
    for obs in (first, step.obs):
        assert obs.dtype == np.float32
        np.testing.assert_array_equal(obs, [expected, expected])
    assert values.shape == (2,)


def play(script, env_id: str, num_steps: int = 210, **options):
    """Reset and random actions, the same ones each time."""
    rng = np.random.default_rng(0)
    with closing(make_envs(script, env_id, num_envs=2, **options)) as envs:
        first, steps = envs.reset(), []
        for _ in range(num_steps):
            discrete = isinstance(envs.action_space, Discrete)
            actions = rng.integers(2, size=2) if discrete else rng.normal(size=(2, 1)).astype(np.float32)
            steps.append(envs.step(actions))
    return first, steps, envs.finished


@pytest.mark.parametrize(
    ("script", "env_id"), [(ppo_continuous, "Pendulum-v1"), (ppo_kl_penalty, "CartPole-v1")]
)
def test_processes_give_the_same_numbers(script, env_id):
    """Pendulum is cut after 200 steps, CartPole terminates."""
    first, steps, finished = play(script, env_id, training=True)
    async_first, async_steps, async_finished = play(script, env_id, training=True, async_envs=True)
    np.testing.assert_array_equal(async_first, first)
    assert async_finished == finished
    assert len(finished) >= 2
    for ours, theirs in zip(async_steps, steps, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@over_vector_scripts
def test_seeds(script):
    """One seed gives the same games, another one others, and each environment has its own."""
    first, *_ = play(script, "Pendulum-v1", 0, seed=1)
    again, *_ = play(script, "Pendulum-v1", 0, seed=1)
    other, *_ = play(script, "Pendulum-v1", 0, seed=2)
    np.testing.assert_array_equal(first, again)
    assert len({row.tobytes() for row in (*first, *other)}) == 4


class KnownValue:
    """An agent that values an observation at a number that tells it: 100·walker + 10·episode + time."""

    def __init__(self, discrete: bool = False):
        self.discrete = discrete

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape)

    def sample(self, policy, noise: torch.Tensor) -> torch.Tensor:
        return policy.sample()

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return obs @ torch.tensor([100.0, 10.0, 1.0])

    def __call__(self, obs: torch.Tensor):
        zeros = torch.zeros(len(obs), 2 if self.discrete else 1)
        policy = Categorical(logits=zeros) if self.discrete else Independent(Normal(zeros, zeros + 0.1), 1)
        return policy, self.value(obs)


ROLLOUTS = {
    "continuous": (ppo_continuous, "Walk-v0"),
    "reused buffer": (ppo_continuous, "WalkReuse-v0"),
    "kl": (ppo_kl_penalty, "Walk-v0"),
    "kl discrete": (ppo_kl_penalty, "WalkDiscrete-v0"),
}
over_rollouts = pytest.mark.parametrize(("script", "env_id"), ROLLOUTS.values(), ids=ROLLOUTS)


def unscaled(rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
    return rewards


def collect(script, env_id: str, lengths: tuple[int, ...], scaled: bool = False, **options):
    """One rollout after the other, joined; and the environments' own logs."""
    agent, rollouts = KnownValue(env_id == "WalkDiscrete-v0"), []
    with closing(make_envs(script, env_id, **options)) as envs:
        envs.scale = envs.scale if scaled else unscaled
        obs = torch.from_numpy(envs.reset())
        for length in lengths:
            rollout, obs = script.collect_rollout(agent, envs, obs, length)
            rollouts.append(rollout)
    joined = script.Rollout(*(torch.cat(parts).numpy() for parts in zip(*rollouts, strict=True)))
    return joined, [env.log for env in Walk.made]


@over_rollouts
def test_every_row_is_a_step_of_an_environment(script, env_id):
    """No row for resets, none left out, also from one rollout to the next."""
    rollout, logs = collect(script, env_id, (7, 1, 12))
    np.testing.assert_array_equal(rollout.obs, stories("obs", 20))
    np.testing.assert_array_equal(rollout.rewards, stories("reward", 20).astype(np.float32))
    for i, log in enumerate(logs):
        obs, actions, rewards = zip(*log, strict=True)
        np.testing.assert_array_equal(rollout.obs[:, i], np.array(obs))
        start = 5 if env_id == "WalkDiscrete-v0" else 0
        np.testing.assert_array_equal(rollout.actions[:, i], np.array(actions) - start)
        np.testing.assert_array_equal(rollout.rewards[:, i], np.array(rewards, dtype=np.float32))


@pytest.mark.parametrize("lengths", [(20,), (4, 4, 4, 4, 4), (3, 17)], ids=str)
@over_rollouts
def test_next_values(script, env_id, lengths):
    """Of the next observation, at a time limit of the last one; also where a rollout ends there."""
    rollout, _ = collect(script, env_id, lengths)
    terminated, truncated = stories("terminated", 20), stories("truncated", 20)
    np.testing.assert_array_equal(rollout.terminations, terminated)
    np.testing.assert_array_equal(rollout.dones, terminated | truncated)
    weights = np.array([100.0, 10.0, 1.0])
    np.testing.assert_array_equal(rollout.values, stories("obs", 20) @ weights)
    expected = stories("last", 20) @ weights  # at a terminal state the value is not used
    np.testing.assert_array_equal(rollout.next_values[~terminated], expected[~terminated])


class ConstantValue(KnownValue):
    """Values every observation the same."""

    constant = 0.0

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.full((len(obs),), self.constant)


@over_vector_scripts
def test_value_of_an_endless_task_is_not_that_of_its_time_limit(script):
    """Reward 1 for ever is worth 1 / (1 − γ) = 10; a sum of 10 rewards would be less than 7."""
    agent = ConstantValue()
    with closing(make_envs(script, "Forever-v0", num_envs=2)) as envs:
        envs.scale = unscaled
        obs = torch.from_numpy(envs.reset())
        for _ in range(60):
            rollout, obs = script.collect_rollout(agent, envs, obs, num_steps=16)
            _, returns = script.compute_gae(*rollout[3:], 0.9, 0.95)
            agent.constant = returns.mean().item()
    assert rollout.dones.any()
    assert agent.constant == pytest.approx(10.0, abs=1e-3)


@over_vector_scripts
def test_critic_learns_the_value_of_an_endless_task(script):
    torch.manual_seed(0)
    unclipped = {"clip_vloss": False} if script is ppo_continuous else {}
    sizes = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 8}
    args = script.Args(learning_rate=2e-2, gamma=0.9, max_grad_norm=100.0, **sizes, **unclipped)
    with closing(make_envs(script, "Forever-v0", num_envs=2)) as envs:
        envs.scale = unscaled
        agent = script.Agent(envs.observation_space, envs.action_space)
        optimizer = script.make_optimizer(agent, args)
        obs = torch.from_numpy(envs.reset())
        for _ in range(15):
            rollout, obs = script.collect_rollout(agent, envs, obs, args.num_steps)
            script.update(agent, optimizer, rollout, args)
        with torch.no_grad():
            value = agent.value(obs).mean().item()
    assert value == pytest.approx(10.0, abs=0.5)


class Dice(gym.Env):
    """Its first observation is of anybody's random numbers, as in environments that were written so."""

    observation_space, action_space = Box(0.0, 1.0, (2,)), Box(-1.0, 1.0, (1,))

    def reset(self, **_):
        return np.array([random.random(), np.random.random()], dtype=np.float32), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


gym.register("Dice-v0", Dice)


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
@over_vector_scripts
def test_global_random_numbers(script, async_envs):
    """The seed decides them, and no two environments have the same."""

    def first(seed: int) -> np.ndarray:
        args = script.Args(env_id="Dice-v0", num_envs=2, async_envs=async_envs, seed=seed)
        script.prepare(args)
        with closing(script.Envs(args, 2, [seed, 0])) as envs:
            return envs.reset()

    with torch.random.fork_rng([]):
        one, again, other = first(1), first(1), first(2)
    np.testing.assert_array_equal(one, again)
    assert len({*one.ravel(), *other.ravel()}) == 8


class Varied(gym.Env):
    """Its infos have another shape or type each time."""

    observation_space, action_space = Box(-np.inf, np.inf, (1,)), Box(-1.0, 1.0, (1,))

    def tell(self):
        self.told = getattr(self, "told", -1) + 1
        infos = {"path": np.zeros(self.told), "goal": None if self.told % 2 else 1}
        return np.full(1, self.told, dtype=np.float32), infos

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.told = seed % 5
        return self.tell()

    def step(self, action):
        obs, infos = self.tell()
        return obs, 0.0, False, False, infos


gym.register("Varied-v0", Varied, max_episode_steps=3)


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
@over_vector_scripts
def test_infos_that_fit_into_no_array(script, async_envs):
    first, steps, finished = play(script, "Varied-v0", 6, async_envs=async_envs)
    assert first[0] != first[1]
    cut = steps[2]
    assert cut.dones.all() and len(finished) == 4
    np.testing.assert_array_equal(cut.final_obs, first + 3)
    np.testing.assert_array_equal(cut.obs, first + 4)


class Counted(gym.Env):
    """Actions are whole numbers from 0 to 3."""

    observation_space, action_space = Box(-1.0, 1.0, (1,)), Box(0, 3, (2,), np.int64)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.reset()[0], float(action @ [10, 1]), False, False, {}


gym.register("Counted-v0", Counted)


@over_vector_scripts
def test_actions_that_are_whole_numbers(script):
    with closing(make_envs(script, "Counted-v0", num_envs=3)) as envs:
        envs.reset()
        step = envs.step(np.array([[0.4, 0.6], [-7.0, 9.0], [1.7, 2.2]], dtype=np.float32))
    np.testing.assert_array_equal(step.rewards, [1.0, 3.0, 22.0])


class Remote(gym.Env):
    """Its simulator is a process of its own, which it asks to stop."""

    observation_space, action_space = Box(-1.0, 1.0, (1,)), Box(-1.0, 1.0, (1,))

    def __init__(self):
        self.simulator = subprocess.Popen(["sleep", "60"])

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, dtype=np.float32), {}

    def close(self):
        self.simulator.terminate()
        self.simulator.wait()


gym.register("Remote-v0", Remote)


@pytest.mark.parametrize("async_envs", [False, True], ids=["sync", "async"])
@over_vector_scripts
def test_a_simulator_can_be_stopped(script, async_envs):
    start = monotonic()
    with closing(make_envs(script, "Remote-v0", num_envs=2, async_envs=async_envs)) as envs:
        envs.reset()
    assert monotonic() - start < 30.0


@pytest.mark.parametrize("dead", [0, 1])
@over_vector_scripts
def test_a_dead_process_ends_training(script, dead):
    """Instead of waiting for its answer, or for the others to end."""

    def too_long(*_):
        pytest.fail("it waits")

    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        with (
            pytest.raises((EOFError, OSError)),
            closing(make_envs(script, "Pendulum-v1", num_envs=2, async_envs=True)) as envs,
        ):
            envs.reset()
            processes = envs.envs.unwrapped.processes
            processes[dead].kill()
            processes[dead].join()
            envs.step(np.zeros((2, 1), dtype=np.float32))
        for process in processes:
            process.join()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
