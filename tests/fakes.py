"""Short environments and runs for the tests of what is around the learning."""

import os
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

SCRIPTS = [ppo_atari, ppo_continuous, ppo_kl_penalty]
VECTOR_SCRIPTS = [ppo_continuous, ppo_kl_penalty]


def over_scripts(scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


class Walk(gym.Env):
    """Episodes of 3 to 7 steps; observations far from 0, rewards far from 1, both random."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 30}  # noqa: RUF012
    steps, episodes = [], []  # (obs, action) and (return, length) of all in this process
    longer, hook = 0, None  # to be changed in a test

    def __init__(self, action_space, size=3, render_mode=None):
        self.observation_space, self.render_mode = Box(-100, 100, (size,)), render_mode
        self.action_space = action_space

    def obs(self):
        self.now = self.np_random.normal(5.0, 2.0, self.observation_space.shape)
        return self.now.astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.total, self.length = self.np_random.integers(3, 8), 0.0, 0
        return self.obs(), {}

    def step(self, action):
        if self.hook:
            self.hook()
        Walk.steps.append((self.now, np.array(action)))
        reward = 100.0 * self.np_random.normal() + np.sum(action)
        self.total, self.length, self.left = self.total + reward, self.length + 1, self.left - 1
        done = bool(self.left + self.longer <= 0)
        if done:
            Walk.episodes.append((self.total, self.length))
        return self.obs(), reward, done, False, {}

    def render(self):
        return np.full((32, 32, 3), 10 * self.length, np.uint8)


gym.register("Walk-v0", Walk, kwargs={"action_space": Box(-1.0, 1.0, (2,))})
gym.register("Wide-v0", Walk, kwargs={"action_space": Box(-1.0, 1.0, (2,)), "size": 4})
gym.register("Pick-v0", Walk, kwargs={"action_space": Discrete(4)})
gym.register("Multi-v0", Walk, kwargs={"action_space": MultiDiscrete([2, 3])})
gym.register("Short-v0", "ale_py.env:AtariEnv", kwargs={"game": "pong"}, max_episode_steps=6)
gym.register("Full-v0", "ale_py.env:AtariEnv", kwargs={"game": "pong", "full_action_space": True})
ENVS = {ppo_atari: "Short-v0", ppo_continuous: "Walk-v0", ppo_kl_penalty: "Pick-v0"}


def tiny(script, iterations=4, **changes):
    """Iterations of 16 steps, each of 2 epochs of 2 minibatches."""
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2}
    sizes |= {"total_timesteps": 16 * iterations + 5, "compile": False, "run_name": "run"}
    return script.Args(**{"env_id": ENVS.get(script), "device": "cpu"} | sizes | changes)


def options(args):
    """What to type for these arguments."""
    changed = [(k, v) for k, v in asdict(args).items() if v != getattr(type(args), k)]
    typed = [f"--{'no-' * (v is False)}{k} {v}".replace("_", "-", k.count("_")) for k, v in changed]
    return [x for text in typed for x in text.split(" ", 1) if x not in ("True", "False")]


def scalars(folder):
    """What TensorBoard shows: {name: [(step, value), ...]}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {name: [(x.step, x.value) for x in values] for name, values in points.items()}


def rows(folder):
    """Of episodes.csv: (global_step, wall_time, return, length), all finished ones."""
    header, *lines = (folder / "episodes.csv").read_text().splitlines()
    assert header == "global_step,wall_time,return,length"
    return [tuple(float(x) for x in line.split(",")) for line in lines]


def next_second():  # TensorBoard reads its files in order of their names: second, process
    time.sleep(1.0 - time.time() % 1.0)


def start(script, folder, *argv, before=lambda: None):
    """Runs the script's main() in a fork of this process, which prints into a file; its number."""
    (folder / "log").touch()
    if child := os.fork():
        return child
    status = 99
    try:
        os.chdir(folder)
        sys.stdout = sys.stderr = open("log", "a", buffering=1)
        sys.argv = [f"{script.__name__}.py", *argv]
        before()
        script.main()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # or pytest would end twice


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for(condition):
    while not condition():
        time.sleep(0.005)


@contextmanager
def after(script, iterations, action):
    """Calls `action` once that many iterations of a training have ended; gives the Runs."""
    end_iteration, runs = script.Run.end_iteration, []

    def ends(run, metrics):
        end_iteration(run, metrics)
        runs.append(run)
        if len(runs) == iterations:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Run, "end_iteration", ends)
        yield runs
