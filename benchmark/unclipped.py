"""MuJoCo tasks that take actions of any size and charge for them as they are, as in [PPO]'s time.

    PYTHONPATH=benchmark python ppo_kl_penalty.py --env-id unclipped:UnclippedHalfCheetah-v5

The simulator limits forces by itself; only what an action costs is no longer limited.
"""

import functools

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Unclipped(gym.ActionWrapper):
    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.action_space = Box(-np.inf, np.inf, env.action_space.shape, np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        return action


def make(task: str, **options) -> gym.Env:
    return Unclipped(gym.make(task, **options))


for task in ("HalfCheetah-v5", "Reacher-v5"):
    gym.register(f"Unclipped{task}", functools.partial(make, task))
