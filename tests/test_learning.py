"""The same seed twice, and tasks learned in seconds that no script learns with a sign turned round."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from fakes import SCRIPTS, over_scripts
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

TINY = {"device": "cpu", "num_envs": 2, "num_minibatches": 2, "update_epochs": 2}
TINY_RUNS = {
    ppo_atari: {"env_id": "BreakoutNoFrameskip-v4", "num_steps": 16, "total_timesteps": 64},
    ppo_continuous: {"env_id": "Pendulum-v1", "num_steps": 128, "total_timesteps": 768},
    ppo_kl_penalty: {"env_id": "CartPole-v1", "num_steps": 64, "total_timesteps": 384},
}


def tiny_run(script, folder, name: str, **args) -> tuple[list[str], dict[str, list[tuple[int, float]]]]:
    """Episodes without their wall time, and all scalars but speed and times, as (step, value)."""
    script.train(script.Args(**TINY | TINY_RUNS[script] | args, run_name=name))
    rows = (folder / "runs" / name / "episodes.csv").read_text().splitlines()
    episodes = [",".join(row.split(",")[:1] + row.split(",")[2:]) for row in rows]
    reader = EventAccumulator(str(folder / "runs" / name)).Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if not tag.startswith(("charts/SPS", "time/"))]
    return episodes, {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


@over_scripts(SCRIPTS)
def test_a_run_repeats_bit_by_bit(monkeypatch, tmp_path, script):
    monkeypatch.chdir(tmp_path)
    options = ppo_atari.game_options
    short_games = {"max_num_frames_per_episode": 40}
    monkeypatch.setattr(ppo_atari, "game_options", lambda env_id: options(env_id) | short_games)
    first, again, other = (
        tiny_run(script, tmp_path, name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    episodes, scalars = first
    assert len(episodes) > 2
    assert len(scalars["losses/policy_loss"]) >= 2
    assert again == first
    assert other[1]["losses/policy_loss"] != scalars["losses/policy_loss"]
    if script is not ppo_atari:  # all its games are cut after as many steps, without a point
        assert other[0] != episodes
    assert other[1].keys() == scalars.keys()


class Target(gym.Env):
    """Shows 1 or −1 and ends with the next action, the best of which is half of what was shown."""

    observation_space, action_space = Box(-1.0, 1.0, (1,)), Box(-3.0, 3.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = self.np_random.choice([-1.0, 1.0])
        return np.array([self.shown], dtype=np.float32), {}

    def step(self, action):
        reward = self.shown - (action[0] - self.shown / 2.0) ** 2
        return np.zeros(1, dtype=np.float32), reward, True, False, {}


NOTHING = np.ones((1, 1), dtype=np.float32)


class Nothing(gym.Env):
    """No reward whatever one does: all there is to gain is entropy."""

    observation_space = Box(-1.0, 1.0, (1,))

    def __init__(self, action_space: gym.Space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        return NOTHING[0], {}

    def step(self, action):
        return NOTHING[0], 0.0, True, False, {}


gym.register("Target-v0", Target)
gym.register("NothingBox-v0", Nothing, kwargs={"action_space": Box(-3.0, 3.0, (1,))})
gym.register("NothingDiscrete-v0", Nothing, kwargs={"action_space": Discrete(2)})


class Pictures:
    """In place of the Atari simulator: one half of the picture is bright, and it names the action to take."""

    observation_space, action_space = Box(0, 255, (4, 84, 84), np.uint8), Discrete(2)
    both = np.zeros((2, 4, 84, 84), dtype=np.uint8)
    both[0, :, :, :42] = both[1, :, :, 42:] = 200
    rewards = np.array([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32)  # of (picture, action): values 1 and 0

    def __init__(self, args, num_envs: int, seed: int, training: bool = True):
        self.rng, self.num_envs, self.num_steps, self.finished = np.random.default_rng(seed), num_envs, 0, []

    def reset(self) -> np.ndarray:
        self.shown = self.rng.integers(2, size=self.num_envs)
        return self.both[self.shown]

    def step(self, actions: np.ndarray) -> ppo_atari.Step:
        rewards, ends = self.rewards[self.shown, actions], np.ones(self.num_envs, dtype=bool)
        for reward in rewards.tolist():
            self.num_steps += 1
            self.finished.append((self.num_steps, reward, 1))
        return ppo_atari.Step(self.reset(), rewards, ends, ends, None)

    def state_dict(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def close(self) -> None:
        pass


class NoRewards(Pictures):
    rewards = np.zeros((2, 2), dtype=np.float32)


@pytest.fixture
def train(monkeypatch, tmp_path):
    """A function that trains as the command line does and returns the mean return and the agent."""

    def run(script, prepare=None, **args):
        monkeypatch.chdir(tmp_path)
        agents, make_agent = [], script.Agent

        def remembered(*inputs, **options):
            agents.append(make_agent(*inputs, **options))
            if prepare is not None:
                prepare(agents[-1])
            return agents[-1]

        monkeypatch.setattr(script, "Agent", remembered)
        mean_return = script.train(script.Args(device="cpu", **args))
        return mean_return, agents[-1]

    return run


@torch.no_grad()
def act(agent, obs: torch.Tensor):
    """Policy and values, detached."""
    return agent(obs)


SMALL = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 3e-3}
SMALL_PICTURES = {"num_envs": 16, "num_steps": 8, "update_epochs": 2, "learning_rate": 1e-3}
TARGET_RUNS = {
    "clip": (ppo_continuous, {}),
    "adaptive": (ppo_kl_penalty, {}),
    "fixed": (ppo_kl_penalty, {"kl_mode": "fixed", "kl_coef": 1.0}),
    "no penalty": (ppo_kl_penalty, {"kl_mode": "fixed", "kl_coef": 0.0}),
}


@pytest.mark.parametrize(("script", "args"), TARGET_RUNS.values(), ids=TARGET_RUNS)
def test_gaussian_policy_finds_its_target(train, script, args):
    """From means of 0 and a deviation of 1; values are those of scaled rewards."""
    _, agent = train(script, env_id="Target-v0", total_timesteps=4096, **SMALL, **args)
    policy, values = act(agent, torch.tensor([[1.0], [-1.0]]))
    means = policy.mean.squeeze(-1).tolist()
    assert means == pytest.approx([0.5, -0.5], abs=0.2)
    assert agent.log_std.item() < -0.2
    assert values[0] - values[1] > 0.8


def test_categorical_policy_balances_a_pole(train):
    """A random one keeps it up for 22 steps, this one for 170 and more with any of some seeds."""
    sizes = {"num_steps": 64, "update_epochs": 6, "num_minibatches": 4, "total_timesteps": 20480}
    mean_return, _ = train(ppo_kl_penalty, env_id="CartPole-v1", learning_rate=2.5e-3, **sizes)
    assert mean_return > 120.0


PICTURE_RUNS = {
    "shared": {"precision": "fp32"},
    "separate": {"precision": "fp32", "shared_network": False},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("args", PICTURE_RUNS.values(), ids=PICTURE_RUNS)
def test_atari_agent_tells_pictures_apart(monkeypatch, train, args):
    monkeypatch.setattr(ppo_atari, "Envs", Pictures)
    precisions = set()

    def prepare(agent):
        agent.network.register_forward_hook(lambda module, inputs, output: precisions.add(output.dtype))

    mean_return, agent = train(ppo_atari, prepare, total_timesteps=1280, **SMALL_PICTURES, **args)
    assert precisions == {torch.bfloat16 if args["precision"] == "bf16" else torch.float32}
    assert (agent.value_network is None) == args.get("shared_network", True)
    policy, values = act(agent, torch.from_numpy(Pictures.both))
    assert policy.logits.dtype == values.dtype == torch.float32  # of the two heads in any case
    assert policy.probs.diagonal().min() > 0.7
    assert mean_return > 0.2  # 0.5 at best
    assert values[0] - values[1] > 0.5


NOTHING_BOX = SMALL | {"total_timesteps": 2048, "env_id": "NothingBox-v0"}
NOTHING_DISCRETE = SMALL | {"total_timesteps": 2048, "env_id": "NothingDiscrete-v0"}
ENTROPY_RUNS = {
    "atari": (ppo_atari, Pictures.both, SMALL_PICTURES | {"total_timesteps": 384}),
    "continuous": (ppo_continuous, NOTHING, NOTHING_BOX),
    "kl box": (ppo_kl_penalty, NOTHING, NOTHING_BOX),
    "kl discrete": (ppo_kl_penalty, NOTHING, NOTHING_DISCRETE),
}


@pytest.mark.parametrize(("script", "obs", "args"), ENTROPY_RUNS.values(), ids=ENTROPY_RUNS)
def test_entropy_bonus_widens_the_policy(monkeypatch, train, script, obs, args):
    """Where there is no reward. A categorical policy is first made to peak: a new one is nearly uniform."""
    monkeypatch.setattr(ppo_atari, "Envs", NoRewards)
    entropies = []

    def entropy(agent) -> float:
        return act(agent, torch.from_numpy(obs))[0].entropy().mean().item()

    def prepare(agent):
        last = agent.actor if script is ppo_atari else agent.actor[-1]
        if len(last.bias) == 2:
            last.bias.data[0] = 2.0
        entropies.append(entropy(agent))

    _, agent = train(script, prepare, ent_coef=0.1, norm_adv=False, **args)
    assert entropy(agent) > entropies[0] + 0.1
