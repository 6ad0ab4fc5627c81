"""Environments of which a test knows every step, or in which it replaces whatever it wants odd."""

from itertools import count

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

LIMIT, NUMBERS = 4, count()


def register(base=None, limit=None, **members):
    """Returns the id of an environment with these members in place of those of `base`."""
    env_id = f"Test{next(NUMBERS)}-v0"
    gym.register(env_id, type("Test", (base or Odd,), members), max_episode_steps=limit)
    return env_id


class Odd(gym.Env):
    """Nothing happens here; it keeps the actions it gets."""

    observation_space, action_space = Box(-1.0, 1.0, (2,)), Box(-1.0, 1.0, (1,))

    def __init__(self, render_mode=None):
        self.actions = []

    def obs(self):
        return np.zeros(2, np.float32)

    def reward(self):
        return 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.name, self.time = self.name if seed is None else seed, 0
        return self.obs(), {}

    def step(self, action):
        self.time += 1
        self.actions.append(action)
        return self.obs(), self.reward(), False, False, {}


class Walk(Odd):
    """Shows (its seed, episode, time); walks of 2 to 6 steps terminate, or are cut by the LIMIT."""

    observation_space, reuse, buffer = Box(-np.inf, np.inf, (3,)), False, None

    def look(self):
        if self.buffer is None or not self.reuse:
            self.buffer = np.empty(3, self.observation_space.dtype)
        self.buffer[:] = self.name, self.episode, self.time
        odd = {"final_obs": 1, "path": np.zeros(self.time), "goal": "?" if self.time % 2 else None}
        return self.buffer, odd

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.name, self.episode = seed % 1000, -1
        self.episode, self.time = self.episode + 1, 0
        return self.look()

    def step(self, action):
        self.time += 1
        reward = self.name % 7 + self.time + self.episode % 3 / 4 + action[0]
        end = self.time == 2 + (self.name + 3 * self.episode) % 5
        obs, info = self.look()
        return obs, float(reward), end, False, info


def story(seed, actions):
    """What each step of a walk is to a learner, and each whole one: (step, return, length)."""
    name, episode, time, total, rows, finished = seed % 1000, 0, 0, 0.0, [], []
    for t, action in enumerate(actions):
        time += 1
        reward = name % 7 + time + episode % 3 / 4 + action
        final, total = (name, episode, time), total + reward
        terminated, done = time == 2 + (name + 3 * episode) % 5, False
        if terminated or time == LIMIT:
            finished.append((t + 1, total, time))
            episode, time, total, done = episode + 1, 0, 0.0, True
        rows.append(((name, episode, time), reward, terminated, done, final))
    return rows, finished
