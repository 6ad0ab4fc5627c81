"""Small agents and rollouts made by hand: all that the learner sees of an environment, without one."""

import copy
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

SCRIPTS = [ppo_atari, ppo_continuous, ppo_kl_penalty]
CLIPPED_SCRIPTS = [ppo_atari, ppo_continuous]


class Case(NamedTuple):
    """A script on one kind of observations and actions."""

    name: str
    script: ModuleType
    observation_space: Box
    action_space: Box | Discrete


PICTURES = Box(0, 255, (4, 84, 84), np.uint8)
VECTORS = Box(-np.inf, np.inf, (3,), np.float32)
CONTROLS = Box(-1.0, 1.0, (2,), np.float32)
ATARI = Case("atari", ppo_atari, PICTURES, Discrete(4))
CONTINUOUS = Case("continuous", ppo_continuous, VECTORS, CONTROLS)
KL_BOX = Case("kl-box", ppo_kl_penalty, VECTORS, CONTROLS)
KL_DISCRETE = Case("kl-discrete", ppo_kl_penalty, VECTORS, Discrete(4))
CASES = [ATARI, CONTINUOUS, KL_BOX, KL_DISCRETE]
KL_CASES = [KL_BOX, KL_DISCRETE]
GAUSSIAN_CASES = [CONTINUOUS, KL_BOX]
MLP_CASES = [CONTINUOUS, KL_BOX, KL_DISCRETE]


def over_scripts(scripts: list[ModuleType]):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


def over_cases(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def make_args(script: ModuleType, **changes):
    """8 steps of 2 environments: 16 transitions in 4 minibatches of 4."""
    small = {"num_envs": 2, "num_steps": 8, "num_minibatches": 4, "update_epochs": 2, "total_timesteps": 64}
    return script.Args(**small | {"device": "cpu"} | changes)


def make_agent(case: Case, seed: int = 0):
    """An agent whose policy clearly depends on the state, unlike that of a fresh one."""
    agent = copy.deepcopy(first_agent(case.name, seed))
    torch.manual_seed(seed)
    return agent


@cache  # the orthogonal matrices of the convolutional network take longer than a test
def first_agent(name: str, seed: int):
    (case,) = (case for case in CASES if case.name == name)
    torch.manual_seed(seed)
    agent = case.script.Agent(case.observation_space, case.action_space)
    last_layer = agent.actor if case is ATARI else agent.actor[-1]
    last_layer.weight.data *= 50.0
    if case in GAUSSIAN_CASES:
        agent.log_std.data.copy_(torch.tensor([-0.7, 0.4]))
    return agent


def random_obs(case: Case, *leading: int) -> Tensor:
    """Vectors far from mean 0 and deviation 1, so that normalising them matters."""
    shape = (*leading, *case.observation_space.shape)
    if case is ATARI:
        return torch.randint(256, shape, dtype=torch.uint8)
    return torch.randn(shape) * torch.tensor([0.5, 1.0, 3.0]) + torch.tensor([2.0, 0.0, -1.0])


@torch.no_grad()
def make_rollout(case: Case, agent, args, seed: int = 0):
    """Actions of the agent itself in random states, with terminal states and time limits on the way."""
    torch.manual_seed(seed)
    steps, envs = args.num_steps, args.num_envs
    obs = random_obs(case, steps, envs)
    actions, logprobs, values = [], [], []
    for t in range(steps):
        policy, value = agent(obs[t])
        action = policy.sample()
        actions.append(action)
        logprobs.append(policy.log_prob(action))
        values.append(value)
    dones = (torch.rand(steps, envs) < 0.3).float()
    terminations = dones * (torch.rand(steps, envs) < 0.5).float()
    return case.script.Rollout(
        obs=obs,
        actions=torch.stack(actions),
        logprobs=torch.stack(logprobs),
        rewards=torch.randn(steps, envs),
        values=torch.stack(values),
        next_values=torch.randn(steps, envs),
        terminations=terminations,
        dones=dones,
    )


class Batch(NamedTuple):
    """What an objective is a function of, besides the agent; all (M, …)."""

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def minibatch_loss(case: Case, agent, batch: Batch, args, old_policy=None, kl_coef: float = 1.0):
    """The script's own loss of a batch; the KL script wants a policy in place of old values."""
    if case not in KL_CASES:
        return case.script.minibatch_loss(agent, list(batch), args)
    if old_policy is None:
        with torch.no_grad():
            old_policy = agent(batch.obs)[0]
    minibatch = [batch.obs, batch.actions, batch.logprobs, batch.advantages, batch.returns]
    return case.script.minibatch_loss(agent, minibatch, old_policy, kl_coef, args)
