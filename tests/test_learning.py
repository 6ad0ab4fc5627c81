"""Tasks learned in seconds, most of them to an optimum in closed form."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from test_changes import learn
from test_ppo import CASES, Case, FakeEnvs

import ppo_atari
import ppo_continuous
import ppo_kl_penalty


class Choice(FakeEnvs):
    """State 0: stay for a reward of 1, until a time limit of 4 steps, or go to state 1.

    State 1: a reward of 5, and the end. So V(1) = 5, and V(0) is the larger of 1 / (1 − γ) and 5γ.
    The better choice is one action of six, so that luck does not find it.
    """

    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.states, self.ages = np.zeros((2, self.args.num_envs), dtype=int)

    def observe(self):
        return show(self.case, self.states)

    def step(self, actions):
        ends, better = self.states == 1, actions == 0
        stays = ~ends & (better if self.args.gamma == 0.8 else ~better)
        self.ages += 1
        self.states = 1 * ~stays
        dones, final_obs = ends | (self.ages == 4), self.observe()
        self.states[dones] = self.random.integers(2, size=dones.sum())
        self.ages[dones] = 0
        self.global_step += len(actions)
        return self.case.script.Step(self.observe(), stays + 5.0 * ends, ends, dones, final_obs)

    def scale_rewards(self, rewards, dones, gamma):
        return rewards


def show(case, states):  # as one half of a vector or picture
    obs = np.zeros((len(states), *case.observation_space.shape), case.observation_space.dtype)
    halves = np.split(obs, 2, axis=-1)
    for i, state in enumerate(states):
        halves[state][i] = 1.0 if obs.dtype == np.float32 else 200
    return obs


CHOICES = {
    "atari": Case(ppo_atari, CASES["atari"].observation_space, Discrete(6)),
    "continuous": Case(ppo_continuous, Box(-1.0, 1.0, (4,)), Discrete(6)),
    "kl_penalty": Case(ppo_kl_penalty, Box(-1.0, 1.0, (4,)), Discrete(6)),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("gamma", [0.5, 0.8])  # where it is better to go, and to stay
def test_the_optimum_of_a_choice(name, gamma, monkeypatch, here):
    steps, rate = (1280, 1e-3) if name == "atari" else (2048, 5e-3)
    args = {"num_envs": 8, "num_steps": 16, "update_epochs": 4, "total_timesteps": steps}
    args |= {"learning_rate": rate, "gamma": gamma, "max_grad_norm": 5.0, "clip_vloss": False}
    agent, *_ = learn(monkeypatch, CHOICES[name], envs=Choice, compile=False, **args)
    policy, values = agent(torch.from_numpy(show(CHOICES[name], [0, 1])))
    assert policy.probs[0, 0] > 0.9
    assert values.tolist() == pytest.approx([max(1.0 / (1.0 - gamma), 5.0 * gamma), 5.0], abs=0.5)


class Target(FakeEnvs):
    """Shows 1 or −1 and ends with the next action, the best of which is half of what was shown."""

    def observe(self):
        return self.random.choice([-1.0, 1.0], (self.args.num_envs, 1)).astype(np.float32)

    def step(self, actions):
        before, obs, ends = self.shown[-1], self.observe(), np.ones(len(actions), bool)
        self.shown.append(obs)
        self.global_step += len(actions)
        rewards = (before - (actions - before / 2.0) ** 2).squeeze(1)
        return self.case.script.Step(obs, rewards, ends, ends, obs)


@pytest.mark.parametrize("script", [ppo_continuous, ppo_kl_penalty])
def test_a_gaussian_policy_finds_its_target(script, monkeypatch, here):
    args = {"num_envs": 8, "num_steps": 32, "update_epochs": 4, "total_timesteps": 2560}
    case = Case(script, Box(-1.0, 1.0, (1,)), Box(-3.0, 3.0, (1,)))
    agent, *_ = learn(monkeypatch, case, envs=Target, compile=False, learning_rate=6e-3, **args)
    policy, values = agent(torch.tensor([[1.0], [-1.0]]))
    assert policy.mean.flatten().tolist() == pytest.approx([0.5, -0.5], abs=0.2)
    assert agent.log_std.item() < -0.2
    expected = (torch.tensor([1.0, -1.0]) - policy.variance.squeeze(1)) / 2.0  # rewards are halved
    assert (values - expected).abs().max() < 0.2


def test_the_clipped_objective_balances_a_pole(monkeypatch, here):
    """With the environments as they are; a random policy keeps it up for 22 steps."""
    args = {"num_envs": 8, "num_steps": 64, "update_epochs": 6, "learning_rate": 2.5e-3}
    args |= {"total_timesteps": 30_000, "target_return": 100.0}
    *_, mean_return = learn(monkeypatch, CASES["discrete"], compile=False, **args)
    assert mean_return >= 100.0
