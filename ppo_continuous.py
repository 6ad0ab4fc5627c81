# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "ale-py==0.12.1", "tyro==1.0.17",
#     "mujoco==4.0.0; python_version >= '3.11'", "mujoco==3.17.0; python_version < '3.11'", "tqdm==4.70.1",
#     "box2d==2.3.10; python_version < '3.14' and platform_machine != 'aarch64'", "wandb==0.31.0",
#     "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'", "moviepy==2.2.1",
#     "opencv-python-headless==5.0.0.93", "tensorboard==2.21.0",
# ]
# ///
"""Proximal Policy Optimization with the clipped objective for continuous actions, in one file.

    python ppo_continuous.py --env-id HalfCheetah-v5

A Gaussian policy for any gymnasium environment with Box actions; the run is written to runs/NAME/.
Letters: T steps of N environments make a batch of B = T·N transitions; a minibatch has M of them.

[PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, https://arxiv.org/abs/1707.06347
[GAE]  Schulman et al. 2016, Generalized Advantage Estimation, https://arxiv.org/abs/1506.02438
[TIME] Pardo et al. 2018, Time Limits in Reinforcement Learning, https://arxiv.org/abs/1712.00378
[37]   Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/
"""

import copy
import io
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from torch import Tensor, distributed, nn
from torch.distributions import Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class ArgumentError(Exception):
    """Input that cannot work; main() prints it as one line and exits with status 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


@dataclass(frozen=True)
class Setup:
    """Arguments that may change when a run is resumed; those that Args adds may not: they define the run."""

    run_name: str | None = None  # the run is written to runs/RUN_NAME; default ENV_ID__EXP_NAME__SEED__TIME
    resume: bool = False  # go on with runs/RUN_NAME from its last checkpoint, or start it where there is none
    evaluate: str | None = None  # only play, with the agent of this run folder or checkpoint file
    exp_name: str = "ppo_continuous"  # name of the experiment, part of the default run name
    torch_deterministic: bool = True  # only repeatable cuDNN algorithms
    compile: bool = True  # torch.compile for learning, NumPy for acting; CUDA graphs on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto is the CPU, faster for networks this small
    track: bool = False  # log to Weights & Biases as well, offline where nobody is logged in
    wandb_project_name: str = "ppo"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases
    checkpoint_interval: float = 5.0  # minutes between checkpoints; there is always one at the end
    capture_video: bool = False  # record an mp4 of an episode at checkpoints, and of those of --evaluate
    render: bool = False  # show the episodes of --evaluate in a window
    eval_episodes: int = 10  # episodes of --evaluate
    deterministic: bool = False  # in evaluation and videos take the likeliest action, do not sample
    async_envs: bool = False  # one process per environment: pays where a step takes longer than about 1 ms
    total_timesteps: int = 1_000_000  # environment steps in all, rounded down to whole rollouts
    target_return: float | None = None  # stop as solved once the mean return of 100 episodes reaches this


@dataclass(frozen=True)
class Args(Setup):
    env_id: str = "HalfCheetah-v5"  # any gymnasium environment with Box actions
    seed: int = 1  # seed of weights, actions, minibatches and environments
    learning_rate: float = 3e-4  # step size of Adam
    num_envs: int = 8  # N, environments stepped together
    num_steps: int = 256  # T, steps of each environment per rollout
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # γ, discount factor
    gae_lambda: float = 0.95  # λ of the advantage estimation: 0 trusts the critic, 1 the observed returns
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over each batch
    norm_adv: bool = True  # shift and scale the advantages of each minibatch to mean 0 and deviation 1
    clip_coef: float = 0.2  # ε, how far the probability ratio may move from 1
    clip_vloss: bool = True  # also keep the value within ±ε of the old one
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    target_kl: float | None = None  # leave out the remaining epochs once approx_kl exceeds this
    batch_size = property(lambda self: self.num_envs * self.num_steps)  # B
    minibatch_size = property(lambda self: self.batch_size // self.num_minibatches)  # M
    num_iterations = property(lambda self: self.total_timesteps // self.batch_size)

    def __post_init__(self) -> None:
        for name, x in vars(self).items():
            if isinstance(x, np.generic):  # of a sweep; files keep plain numbers
                object.__setattr__(self, name, x.item())
        counts = "num_envs num_steps num_minibatches update_epochs total_timesteps eval_episodes".split()
        coefs = ("learning_rate", "clip_coef", "ent_coef", "vf_coef")
        for names, valid, rule in (
            (counts, lambda x: x >= 1, "at least 1"),
            (coefs, lambda x: 0 <= x < math.inf, "at least 0 and finite"),
            (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1, "between 0 and 1"),
            (("max_grad_norm", "target_kl"), lambda x: x > 0, "positive"),
            (("target_return",), math.isfinite, "finite"),
            (("checkpoint_interval",), lambda x: x >= 0, "at least 0"),
            (("seed",), lambda x: 0 <= x < 2**63, "between 0 and 2^63 - 1"),
            (("run_name",), lambda x: x == Path(x).name not in ("", ".."), "the name of one folder"),
        ):
            for name in names:
                x = getattr(self, name)
                require(x is None or valid(x), f"--{name.replace('_', '-')} must be {rule}, not {x!r}")
        require(not self.resume or self.run_name is not None, "--resume needs a --run-name to go on with")
        require(not self.resume or self.evaluate is None, "--evaluate plays, there is nothing to --resume")
        require(not self.render or self.evaluate is not None, "--render shows what --evaluate plays")
        require(not (self.render and self.capture_video), "--render shows, --capture-video records: take one")
        batch = f"--num-envs {self.num_envs} x --num-steps {self.num_steps} = {self.batch_size}"
        minibatches = f"--num-minibatches {self.num_minibatches}"
        require(self.batch_size % self.num_minibatches == 0, f"{minibatches} does not divide {batch}")
        require(self.num_iterations >= 1, f"--total-timesteps {self.total_timesteps} is less than {batch}")
        even = self.num_envs % world_size() == self.minibatch_size % world_size() == 0
        require(even, f"{world_size()} processes cannot share {batch} in {minibatches} evenly")
        require(self.evaluate is None or world_size() == 1, "--evaluate plays in one process, not in several")
        alone = self.norm_adv and self.minibatch_size == 1
        require(not alone, f"{minibatches} leaves 1 transition of {batch} in each, too few for --norm-adv")


class RunningMeanStd(nn.Module):
    """Normalises by mean and variance, per element, of all batches so far, merged as in Chan et al. 1983."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:  # (B, *shape), of this process
        (mean,), (var,) = moments(batch, dim=0)
        delta, number = mean - self.mean, len(batch) * world_size()
        self.count += number  # in place, as all that follows: CUDA graphs remember addresses
        weight = number / self.count
        self.var += (var - self.var) * weight + delta.square() * weight * (1.0 - weight)
        self.mean += delta * weight

    def forward(self, x: Tensor) -> Tensor:  # (B, *shape), in standard deviations from the mean, within ±10
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10.0, 10.0)


class Step(NamedTuple):
    """What N environments return; where an episode ended, `obs` is the first of the next one."""

    obs: np.ndarray  # (N, *obs)
    rewards: np.ndarray  # (N,)
    terminations: np.ndarray  # (N,) bool, the action led to a terminal state
    dones: np.ndarray  # (N,) bool, the episode ended, by termination or by time limit
    final_obs: np.ndarray | None  # (N, *obs) valid only where a time limit cut the episode


class FewInfos:
    """Leaves out infos that nobody reads: they take 10 to 20 µs a step, and may not fit into one array."""

    def _add_info(self, infos: dict, info: dict, i: int) -> dict:
        return super()._add_info(infos, {"final_obs": info["final_obs"]}, i) if "final_obs" in info else infos


class Envs:
    """N environments stepped together; all that is special about a simulator stays in here.

    Actions are clipped to the bounds only here: the learner keeps what it sampled. scale() divides rewards by
    the standard deviation of the discounted return up to each of them, and keeps them within ±10 [37].
    """

    def __init__(self, args: Args, num_envs: int, seed, training: bool = True, videos: Path | None = None):
        def make_env(seed: int) -> gym.Env:
            if os.getpid() != pid:  # a process of --async-envs: the main one decides when to stop
                for number in stop_signals():
                    signal.signal(number, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, lambda *_: None)  # a simulator's process would inherit SIG_IGN
                np.random.seed(seed)
                random.seed(seed)
            if rendering and sys.platform == "linux" and "DISPLAY" not in os.environ:
                os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo and pygame draw without it, if told to
                if videos:
                    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
            env = gym.make(args.env_id, disable_env_checker=True, **rendering)
            if rendering and hasattr(env.unwrapped, "mujoco_renderer"):
                with suppress(KeyError):  # the camera that follows the robot, where there is one
                    env.unwrapped.mujoco_renderer.camera_id = env.unwrapped.model.camera("track").id
            return gym.wrappers.FlattenObservation(env)  # which copies: SAME_STEP does not copy final_obs

        self.first = rank() * num_envs if training else 0  # how many the processes before this one have
        self.seeds = np.random.SeedSequence(seed).generate_state(self.first + num_envs)[self.first :].tolist()
        pid = os.getpid()
        rendering = {"render_mode": "rgb_array"} if videos or args.render else {}
        bases = (FewInfos, gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv)
        try:
            makers = [partial(make_env, seed) for seed in self.seeds]
            self.envs = type("QuietEnvs", bases, {})(makers, copy=False, autoreset_mode="SameStep")
        except (gym.error.Error, ImportError, ValueError) as error:
            hint = " (Atari games: ppo_atari.py)" if isinstance(error, gym.error.UnregisteredEnv) else ""
            raise ArgumentError(f"--env-id {args.env_id}: {str(error).partition(chr(10))[0]}{hint}") from None
        self.envs = show(self.envs, args, videos)
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        if not (isinstance(self.action_space, Box) and isinstance(self.observation_space, Box)):
            self.close()
            kinds = " actions, ".join(type(s).__name__ for s in (self.action_space, self.observation_space))
            advice = "for Discrete actions use ppo_kl_penalty.py"
            raise ArgumentError(f"--env-id {args.env_id}: {kinds} observations; {advice}")
        self.num_envs, self.training, self.gamma = num_envs, training, args.gamma
        self.return_stats = np.zeros(3)  # number, sum and sum of squares of all discounted returns so far
        self.num_steps = 0  # taken in all environments of all processes together
        self.finished: list[tuple[int, float, int]] = []  # (num_steps at its end, return, length) per episode

    def reset(self) -> np.ndarray:  # (N, *obs)
        self.episodic_returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self.discounted_returns = np.zeros(self.num_envs)
        return self.envs.reset(seed=self.seeds)[0].astype(np.float32)

    def step(self, actions: np.ndarray) -> Step:  # (N, *act)
        actions = actions.reshape(-1, *self.action_space.shape)
        actions = actions.clip(self.action_space.low, self.action_space.high)
        if self.action_space.dtype.kind != "f":  # whole numbers
            actions = actions.round().astype(self.action_space.dtype)
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        dones = terminations | truncations
        self.episodic_returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(dones).tolist():
            end = self.num_steps + self.first + i + 1  # as if one environment were stepped after the other
            self.finished.append((end, self.episodic_returns[i].item(), self.lengths[i].item()))
            self.episodic_returns[i] = self.lengths[i] = 0
        self.num_steps += self.num_envs * (world_size() if self.training else 1)
        obs, final_obs = obs.astype(np.float32), None
        if (cut := truncations & ~terminations).any():
            final_obs = np.zeros_like(obs)
            final_obs[cut] = np.stack(infos["final_obs"][cut])
        return Step(obs, rewards, terminations, dones, final_obs)

    def scale(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:  # (T, N)
        """Rewards as the learner gets them; called once for each rollout, in all processes together."""
        returns = np.empty(rewards.shape)  # discounted, of the episodes so far
        for t in range(len(returns)):
            returns[t] = self.discounted_returns * self.gamma + rewards[t]
            self.discounted_returns = returns[t] * (1.0 - dones[t])
        new_stats = np.array([np.ones_like(returns), returns, returns**2]).sum(2).cumsum(1)  # (3, T)
        new_stats = average(torch.tensor(new_stats)).numpy() * world_size()  # of all processes
        count, total, squares = self.return_stats[:, None] + new_stats
        variance = np.maximum(squares / count - (total / count) ** 2, 0.0)  # up to each step
        self.return_stats += new_stats[:, -1]
        return (rewards / np.sqrt(variance + 1e-8)[:, None]).clip(-10.0, 10.0)

    def close(self) -> None:
        processes = getattr(self.envs.unwrapped, "processes", [])
        if processes and sys.exc_info()[0]:  # one may be dead: waiting for its answer would never end
            for process in processes:
                process.kill()
            self.envs.unwrapped.closed = True
        self.envs.close()

    def state_dict(self) -> dict[str, object]:
        return {"num_steps": self.num_steps, "return_stats": self.return_stats.tolist()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.num_steps = state["num_steps"]
        self.return_stats[:] = state["return_stats"]


def show(envs: gym.vector.VectorEnv, args: Args, videos: Path | None) -> gym.vector.VectorEnv:
    """The same environments, recorded as VIDEOS-episode-0.mp4 and so on, or shown in a window by --render."""
    if videos is None:
        return gym.wrappers.vector.HumanRendering(envs) if args.render else envs
    warnings.filterwarnings("ignore", ".*(video|last frame)")  # of a folder that exists; errors get a line
    wanted = {"episode_trigger": lambda episode: episode < args.eval_episodes, "name_prefix": videos.name}
    return gym.wrappers.vector.RecordVideo(envs, str(videos.parent), **wanted)


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units with orthogonal weights and zero biases, [37]."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, layer_gain in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """Policy and value function: two networks over the same normalised observation."""

    def __init__(self, observation_space: Box, action_space: Box):
        super().__init__()
        inputs, outputs = math.prod(observation_space.shape), math.prod(action_space.shape)
        self.normalize = RunningMeanStd(observation_space.shape)
        self.actor = mlp(inputs, outputs, gain=0.01)  # nearly the same policy in all states at first
        self.critic = mlp(inputs, 1, gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(outputs))

    def forward(self, obs: Tensor) -> tuple[Independent, Tensor]:  # (M, *obs) -> π(·|s), V(s) (M,)
        x = self.normalize(obs)
        mean = self.actor(x)
        std = self.log_std.exp().expand_as(mean)
        policy = Independent(Normal(mean, std), 1)
        return policy, self.critic(x).squeeze(-1)

    def noise(self, *shape: int) -> Tensor:  # standard normal (*shape, *act)
        noise = torch.randn(*shape, len(self.log_std))
        return noise.to(self.log_std.device)  # from the CPU: one generator to seed, save and fork

    def sample(self, policy: Independent, noise: Tensor) -> Tensor:  # (M, *act)
        return policy.mean + policy.stddev * noise

    def value(self, obs: Tensor) -> Tensor:  # (M, *obs) -> V(s) (M,)
        return self(obs)[1]


class Rollout(NamedTuple):
    """One batch of experience; row t is (s_t, a_t) and what followed from it."""

    obs: Tensor  # (T, N, *obs)
    actions: Tensor  # (T, N, *act)
    logprobs: Tensor  # (T, N) log π_old(a_t | s_t)
    rewards: Tensor  # (T, N)
    values: Tensor  # (T, N) V(s_t)
    next_values: Tensor  # (T, N) V(s_{t+1}); of the episode's last observation where a time limit cut it
    terminations: Tensor  # (T, N) 1.0 where s_{t+1} is terminal: no value beyond
    dones: Tensor  # (T, N) 1.0 where the episode ended, by termination or by time limit


def act(agent: Agent, obs: Tensor, noise: Tensor) -> Tensor:
    """Actions (N, *act) in N states, sampled with Agent.noise (N, …)."""
    policy, _ = agent(obs)
    return agent.sample(policy, noise)


def numpy_act(agent: Agent) -> Callable:
    """act() of this agent, on a CPU: calling PyTorch takes longer than computing a network this small."""
    mean, var = agent.normalize.mean.numpy(), agent.normalize.var.numpy()
    arrays = [x.detach().numpy() for x in agent.actor.parameters()]  # views: updates are in place
    *hidden, last = zip(arrays[::2], arrays[1::2], strict=True)
    log_std = agent.log_std.detach().numpy()

    def fast_act(_: Agent, obs: Tensor, noise: Tensor) -> Tensor:
        x = ((obs.numpy() - mean) / np.sqrt(var + 1e-8)).clip(-10.0, 10.0)
        for weight, bias in hidden:
            x = np.tanh(x @ weight.T + bias)
        x = x @ last[0].T + last[1]
        return torch.from_numpy(x + np.exp(log_std) * noise.numpy())

    return fast_act


@torch.no_grad()
def collect_rollout(agent: Agent, envs: Envs, obs: Tensor, num_steps: int, act=act) -> tuple[Rollout, Tensor]:
    """Act `num_steps` times in every environment, from `obs` (N, *obs) on; also returns where it got to."""
    device = obs.device
    acted, followed, cut_values = [], [], {}
    for t, noise in enumerate(agent.noise(num_steps, len(obs))):
        actions = act(agent, obs, noise)
        acted.append((obs, actions))
        step = envs.step(actions.cpu().numpy())
        followed.append((step.rewards, step.terminations, step.dones))
        if step.final_obs is not None:
            cut_values[t] = agent.value(torch.from_numpy(step.final_obs).to(device))
        obs = torch.from_numpy(step.obs).to(device)
    outcome = np.array(followed, dtype=np.float32)  # (T, 3, N)
    all_obs, all_actions = (torch.stack(rows) for rows in zip(*acted, strict=True))
    finite = [x.isfinite().all() for x in (torch.from_numpy(outcome), all_obs, obs, *cut_values.values())]
    if not all(finite):  # it would spoil the running statistics for good
        raise FloatingPointError("an observation or a reward of the environment is NaN or infinite")
    outcome[:, 0] = envs.scale(outcome[:, 0], outcome[:, 2])
    rewards, terminations, dones = torch.from_numpy(outcome).to(device).unbind(1)
    policy, values = agent(all_obs.flatten(0, 1))  # of all steps at once: acting needs neither
    logprobs = policy.log_prob(all_actions.flatten(0, 1)).view_as(rewards)
    values = values.view_as(rewards)
    next_values = torch.cat([values[1:], agent.value(obs)[None]])
    for t, final_values in cut_values.items():  # a time limit is not the end of the task, [TIME]
        next_values[t] = torch.where(dones[t] > terminations[t], final_values, next_values[t])
    return Rollout(all_obs, all_actions, logprobs, rewards, values, next_values, terminations, dones), obs


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages, [GAE] eq. 16, and returns, their sum with the values; all tensors are (T, N)."""
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values
    decays = gamma * gae_lambda * (1.0 - dones)
    advantages, last = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + decays[t] * last
    return advantages, advantages + values


def policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Clipped surrogate, [PPO] eq. 7, negated so that it is minimised. Inputs (M,)."""
    ratio = logratio.exp()
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the squared error; of V, or of V kept within ±ε of the old one where that is worse [37]. (M,)"""
    error = (value - returns).square()
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * error.mean()


def minibatch_loss(agent: Agent, minibatch: list[Tensor], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """[PPO] eq. 9, negated so that it is minimised, and what to log of it. Everything (M, …)."""
    obs, actions, logprobs, old_values, advantages, returns = minibatch
    policy, values = agent(obs)
    logratio = policy.log_prob(actions) - logprobs
    pg_loss = policy_loss(logratio, advantages, args.clip_coef)
    v_loss = value_loss(values, old_values, returns, args.clip_coef if args.clip_vloss else None)
    entropy = policy.entropy().mean()
    ratio = logratio.exp()
    metrics = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy,
        "losses/old_approx_kl": -logratio.mean(),  # "k1" estimate of KL(π_old‖π_θ)
        "losses/approx_kl": (ratio - 1.0 - logratio).mean(),  # "k3": never negative, less noise
        "losses/clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
    }
    return pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss, metrics


def minibatch_gradient(
    agent: Agent, batch: list[Tensor], rows: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the loss of some rows of the batch, as one vector no longer than max_grad_norm."""
    loss, metrics = minibatch_loss(agent, [x[rows] for x in batch], args)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])
    metrics["losses/grad_norm"] = norm = gradient.norm()
    gradient = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as nn.utils.clip_grad_norm_
    return gradient, {name: metric.detach() for name, metric in metrics.items()}


def standardize(advantages: Tensor) -> Tensor:  # (K, M) of K minibatches, to mean 0 and deviation 1 in each
    mean, variance = moments(advantages, dim=1)
    number = advantages.shape[1] * world_size()
    return (advantages - mean) / ((variance * number / (number - 1)).sqrt() + 1e-8)  # no 0 / 0


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, args: Args, gradient=minibatch_gradient
) -> dict[str, float]:
    """Learn from one rollout in epochs of minibatches; returns what to log, averaged over all of them."""
    advantages, returns = compute_gae(*rollout[3:], args.gamma, args.gae_lambda)  # from the rewards on
    learned_from = (*rollout[:3], rollout.values, advantages, returns)  # (T, N, …) each
    obs, _, _, values, advantages, returns = batch = [x.flatten(0, 1) for x in learned_from]  # (B, …)
    (parameters,), history = optimizer.param_groups[0]["params"], []
    own_args = args if world_size() == 1 else replace(args, max_grad_norm=math.inf)  # clipped once averaged
    orders = torch.stack([torch.randperm(len(obs)) for _ in range(args.update_epochs)]).to(obs.device)
    for order in orders.view(args.update_epochs, args.num_minibatches, -1):
        if args.norm_adv:
            batch[-2] = advantages.index_put((order,), standardize(advantages[order]))
        for rows in order:
            parameters.grad, metrics = gradient(agent, batch, rows, own_args)
            if world_size() > 1:
                average(parameters.grad)
                metrics["losses/grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            agent.log_std.data.clamp_(-20.0, 2.0)  # after the step, so that its gradient never vanishes
            history.append(torch.stack(list(metrics.values())))
        if args.target_kl is not None and average(metrics["losses/approx_kl"]) > args.target_kl:
            break
    agent.normalize.update(obs)  # not before: both policies of the ratio see the same input
    means = dict(zip(metrics, average(torch.stack(history).mean(0)).tolist(), strict=True))
    errors, spread = (moments(x, dim=0)[1] for x in (returns - values, returns))
    means["losses/explained_variance"] = (1.0 - errors / spread.clamp(min=1e-8)).item()
    return means | {"charts/learning_rate": optimizer.param_groups[0]["lr"]}


@contextmanager  # which makes a decorator as well
def undisturbed() -> Iterator[None]:
    """Leaves random numbers and threads to the caller, a training or a sweep, as they were."""
    numpy_state, python_state, threads = np.random.get_state(), random.getstate(), torch.get_num_threads()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_num_threads(threads)


@undisturbed()
@torch.no_grad()
def evaluate(agent: Agent, args: Args, videos: Path | None = None) -> list[tuple[float, int]]:
    """Return (unscaled) and length of --eval-episodes episodes.

    Each environment plays its share: the first episodes to end among all of them would mostly be short ones.
    """
    screens = {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"}
    if args.render and sys.platform == "linux" and not screens & os.environ.keys():
        raise OSError("there is no display")  # SDL would draw where nobody sees it
    num_envs = 1 if videos or args.render else min(args.eval_episodes, args.num_envs)
    episodes, device = [[] for _ in range(num_envs)], next(agent.parameters()).device
    with (
        closing(Envs(args, num_envs, [args.seed, 0, 1], training=False, videos=videos)) as envs,
        tqdm(unit=" episodes", file=sys.stdout, leave=False, disable=None) as bar,
    ):
        torch.manual_seed(args.seed)
        obs = envs.reset()
        while any(len(episodes[i % num_envs]) <= i // num_envs for i in range(args.eval_episodes)):
            policy, _ = agent(torch.from_numpy(obs).to(device))
            actions = policy.mode if args.deterministic else agent.sample(policy, agent.noise(num_envs))
            obs = envs.step(actions.cpu().numpy()).obs
            for step, *episode in envs.finished:
                episodes[(step - 1) % num_envs].append(tuple(episode))  # environment i, see Envs.step
                bar.update()
            envs.finished.clear()
    return [episodes[i % num_envs][i // num_envs] for i in range(args.eval_episodes)]


@undisturbed()
def evaluate_checkpoint(args: Args) -> None:
    """Prints a table, and writes it with every episode to eval.json beside the checkpoint."""
    path = checkpoint_path(args)
    checkpoint, device = load_checkpoint(path), prepare(args)
    with closing(Envs(replace(args, render=False), 1, args.seed, training=False)) as envs:
        agent = make_agent(args, envs, device)
    with fitting(path, args.env_id):
        agent.load_state_dict(checkpoint["agent"])
        step = int(checkpoint["envs"]["num_steps"])
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    videos = run_dir / "videos" / f"{path.stem}-{slug(args.env_id)}" if args.capture_video else None
    actions = "likeliest" if args.deterministic else "sampled"
    recorded = f", recorded in {videos.parent}" if videos else ""
    print(f"{path}, step {step:,}, on {args.env_id}, {actions} actions{recorded}", flush=True)
    try:
        episodes = evaluate(agent, args, videos)
    except Exception as error:  # no display, no ffmpeg, no EGL: each simulator has its own
        if not (videos or args.render):
            raise
        print(f"no {'videos' if videos else 'window'}: {one_line(error)}", file=sys.stderr)
        episodes = evaluate(agent, replace(args, render=False))
    returns, lengths = np.array(episodes).T
    row = {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()}
    print(*(f"{name:>10}" for name in ("episodes", *row, "length")))
    print(f"{len(episodes):10}", *(f"{x:10.2f}" for x in (*row.values(), lengths.mean())))
    about = {"checkpoint": path.name, "global_step": step, "env_id": args.env_id, "seed": args.seed}
    series = {"returns": returns.tolist(), "lengths": lengths.tolist()}
    report = about | {"deterministic": args.deterministic} | row | series
    replace_file(path.with_name("eval.json"), (json.dumps(report, indent=2) + "\n").encode())


class Checkpoints:
    """Keeps a run in checkpoints/: last.pt as it is, best.pt as it was when its mean return was the best."""

    def __init__(self, args: Args, logger: "Logger", **parts):
        self.args, self.logger, self.parts = args, logger, parts | {"logger": logger}
        self.new_best = None  # the state that the next save writes to best.pt
        self.saved, self.recorded, self.capture_video = time.monotonic(), logger.step, args.capture_video
        (logger.dir / "checkpoints").mkdir(exist_ok=True)
        with suppress(ArgumentError):  # none yet; after a failure it is newer than last.pt
            logger.best = load_checkpoint(logger.dir / "checkpoints" / "best.pt")["logger"]["best"]

    def state(self, iteration: int) -> dict[str, object]:
        about = {"format": 3, "script": Args.exp_name, "args": asdict(self.args), "iteration": iteration}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return about | {"rng": torch.get_rng_state()} | parts

    def after(self, iteration: int) -> None:
        """Saves the run every --checkpoint-interval, and remembers it where it plays better than before."""
        if self.logger.is_best():
            self.new_best = copy.deepcopy(self.state(iteration))
        if time.monotonic() - self.saved >= 60.0 * self.args.checkpoint_interval:
            self.save(iteration)
            self.record()

    def save(self, iteration: int) -> None:
        self.logger.flush()  # first: where there is a checkpoint, all that was logged before it is there too
        self.close()  # writes best.pt
        self.write("last.pt", self.state(iteration))
        self.saved = time.monotonic()

    def write(self, name: str, state: dict[str, object]) -> None:
        if rank() == 0:
            torch.save(state, buffer := io.BytesIO())
            replace_file(self.logger.dir / "checkpoints" / name, buffer.getvalue())

    def close(self) -> None:  # also where training fails
        if self.new_best is not None:
            self.write("best.pt", self.new_best)
        self.new_best = None

    def record(self) -> None:
        """With --capture-video: plays an episode, for an mp4 and charts/eval_return."""
        step, args = self.logger.step, replace(self.args, eval_episodes=1)
        if rank() > 0 or not self.capture_video or step == self.recorded:
            return
        self.recorded = step
        video = self.logger.dir / "videos" / f"step-{step}"
        try:
            ((episodic_return, _),) = evaluate(self.parts["agent"], args, video)
            self.logger.log(step, {"charts/eval_return": episodic_return})
            self.logger.log_video(step, video.with_name(f"{video.name}-episode-0.mp4"))
        except Exception as error:  # no ffmpeg, no EGL: each simulator has its own
            self.capture_video = False
            say(f"training goes on without videos: {one_line(error)}")


def checkpoint_path(args: Setup) -> Path | None:
    """The file that --evaluate or --resume means; None where a run begins."""
    if args.evaluate is not None:
        path = Path(args.evaluate)
        return path / "checkpoints" / "last.pt" if path.is_dir() else path
    path = Path("runs", args.run_name or "", "checkpoints", "last.pt")
    return path if args.resume and os.path.lexists(path) else None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of this script as plain data: no file can make torch.load run code."""
    require(path.is_file(), f"{path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line is enough
            checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        script, version = str(checkpoint["script"]), int(checkpoint["format"])
    except Exception as error:  # as many kinds as there are ways to break a file
        raise ArgumentError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from None
    require(script == Args.exp_name, f"{path}: written by {script!r}, not by this script, {Args.exp_name}")
    require(version == 3, f"{path}: of format {version}, while this script writes and reads format 3")
    with fitting(path, "this script"):
        parts = set("iteration rng agent optimizer envs logger step seconds returns best".split())
        missing = parts - {*checkpoint, *checkpoint["logger"]}
        require(not missing, f"it lacks {', '.join(sorted(missing))}")
        checkpoint["args"] = Args(**checkpoint["args"])
    return checkpoint


def checkpoint_to_resume(args: Args) -> dict | None:
    """The checkpoint to resume, None for a new run; refuses arguments that would make it another run."""
    path = checkpoint_path(args)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    before = checkpoint["args"]
    for name in Args.__annotations__:  # not those of Setup
        value, old, flag = getattr(args, name), getattr(before, name), f"--{name.replace('_', '-')}"
        require(value == old, f"{flag} {value}: the run that --resume goes on with has {flag} {old}")
    steps, old = args.total_timesteps, before.total_timesteps
    require(steps >= old, f"--total-timesteps {steps} of a run with {old} can only be raised")
    return checkpoint


def restore(checkpoint: dict, args: Args, **parts) -> None:
    """Loads the state of all parts, and that of the random numbers."""
    with fitting(checkpoint_path(args), args.env_id):
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])


@contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """Turns any error that comes from what a checkpoint contains into one line."""
    try:
        yield
    except Exception as error:
        raise ArgumentError(f"{path} does not fit {what}: {one_line(error)}") from None


def say(line: str) -> None:
    """Prints above the progress bar; training goes on if nobody reads it, as when Ctrl-C has ended tee(1)."""
    try:
        with tqdm.external_write_mode():
            print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def say_once(line: str) -> None:
    say(line)


def one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)


def replace_file(path: Path, content: bytes) -> None:
    """All of it or nothing: written beside the old file, flushed to the disk, and only then renamed."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for _ in range(20):
            with suppress(PermissionError):  # on Windows, while --evaluate or a scanner reads the old file
                return os.replace(beside, path)
            time.sleep(0.1)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written and stays as it was: {error.strerror}") from None


def stop_signals() -> list[int]:
    """Ctrl-C, kill(1), and a terminal that closes, of which Windows knows nothing."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Notes the first, so that the iteration ends and is saved; a second Ctrl-C or SIGTERM acts at once."""
    noted, handlers = [], {}

    def note(number: int, _) -> None:
        noted.append(number)
        for caught in handlers:  # a terminal that closes sends SIGHUP up to three times
            signal.signal(caught, signal.SIG_IGN)
        time.sleep(0.1)  # timeout(1) sends the same signal twice at once
        alone = world_size() == 1  # torchrun repeats what it gets
        for caught in handlers.keys() & {signal.SIGINT, signal.SIGTERM} if alone else ():
            signal.signal(caught, handlers[caught])
        at_once = "; a second signal stops at once" if alone else ""
        with suppress(OSError):  # as in say()
            if rank() == 0:
                os.write(2, f"\nstopping once this iteration is done and saved{at_once}\n".encode())

    with suppress(ValueError):  # only the main thread can catch any
        for number in stop_signals():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # by nohup(1), or not Python's
                handlers[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Logger:
    """Writes a run to runs/NAME/, to W&B with --track, and its progress to the screen.

    `state` is the state_dict in the checkpoint that is resumed; whatever was logged after it is dropped.
    """

    def __init__(self, args: Args, state: dict | None = None):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.6f}"
        self.elsewhere = TemporaryDirectory() if rank() > 0 else None  # only the first process writes the run
        self.dir = Path(self.elsewhere.name if self.elsewhere else "runs", args.run_name or slug(name))
        try:
            self.dir.mkdir(parents=True, exist_ok=args.resume)
        except OSError as error:
            hint = "; --resume goes on with it" if isinstance(error, FileExistsError) else ""
            raise ArgumentError(f"--run-name {self.dir.name}: {self.dir}: {error.strerror}{hint}") from None
        state = state or {"step": 0, "seconds": 0.0, "returns": [], "best": [0, -math.inf]}
        self.step, self.start, self.best = state["step"], time.monotonic() - state["seconds"], state["best"]
        self.returns: deque[float] = deque(state["returns"], maxlen=100)  # of the last episodes
        replace_file(self.dir / "args.json", (json.dumps(describe_run(args), indent=2) + "\n").encode())
        self.csv = open_csv(self.dir / "episodes.csv", self.step)
        self.tensorboard = SummaryWriter(str(self.dir), purge_step=self.step + 1 if args.resume else None)
        self.wandb = None
        try:
            self.wandb = init_wandb(args, self.dir) if args.track and rank() == 0 else None
        except Exception as error:  # no network, or the project has a run of this name
            say(f"training goes on without W&B: {one_line(error)}")
        self.status, self.printed = "", time.monotonic()
        self.times, self.profile = Counter(), []  # seconds in this iteration, microseconds per step in each
        since = f" from step {self.step:,} on" if args.resume else ""
        say(f"training on {args.env_id}{since}, written to {self.dir}")
        total = args.num_iterations * args.batch_size
        if self.step >= total:
            self.status = f"all {total:,} steps are done; a higher --total-timesteps goes on"
        elif args.compile:
            say("compiling: the first steps take up to a minute, seconds with a warm cache")
        steps = {"total": total, "initial": self.step, "unit": " steps"}
        self.bar = tqdm(**steps, unit_scale=True, file=sys.stdout, disable=None)  # no pipe

    def state_dict(self) -> dict[str, object]:
        return {"step": self.step, "seconds": self.seconds(), "returns": [*self.returns], "best": self.best}

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def mean_return(self) -> float:
        return sum(self.returns) / len(self.returns) if self.returns else math.nan

    def is_best(self) -> bool:
        """Is the mean return the best so far? That of more episodes (up to 100) beats that of fewer."""
        before, self.best = self.best, max(self.best, [len(self.returns), self.mean_return()])
        return self.best is not before

    def solved(self, target_return: float | None) -> bool:
        return target_return is not None and len(self.returns) == 100 and self.mean_return() >= target_return

    def log_episodes(self, finished: list[tuple[int, float, int]]) -> None:
        for step, episodic_return, length in finished:
            self.returns.append(episodic_return)
            self.csv.write(f"{step},{self.seconds():.2f},{episodic_return},{length}\n")
            self.log(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})

    def log_iteration(self, step: int, metrics: dict[str, float]) -> None:
        bad = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        if bad:
            advice = "try a lower --learning-rate or --max-grad-norm, or fewer --update-epochs"
            raise FloatingPointError(f"{bad} became NaN or infinite before step {step:,}; {advice}")
        seconds = self.seconds()
        self.times["time/act"] -= self.times["time/env"]  # which was a part of it
        times = {name: 1e6 * x / (step - self.step) for name, x in self.times.items()}
        self.profile.append(times)
        self.times.clear()
        self.step = step
        self.log(step, metrics | times | {"charts/SPS": step / seconds})
        self.bar.set_postfix_str(f"return {self.mean_return():.2f}" if self.returns else "", refresh=False)
        self.bar.update(step - self.bar.n)
        returns = f"mean return {self.mean_return():.2f} of the last {len(self.returns)} episodes"
        returns = returns if self.returns else "no episode has ended yet"
        self.status = f"step {step:,}: {returns}, {step / seconds:,.0f} steps/s, {seconds / 60:.1f} min"
        if self.bar.disable and time.monotonic() - self.printed > 5.0:
            self.print_status()

    @contextmanager  # which makes a decorator as well
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[name] += time.perf_counter() - start

    def print_status(self) -> None:
        if self.status:
            say(self.status)
        self.status, self.printed = "", time.monotonic()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self.tensorboard.add_scalar(key, value, step)
        self.tell_wandb(lambda run: run.log(scalars | {"global_step": step}, step=step))

    def log_video(self, step: int, path: Path) -> None:
        if self.wandb:
            from wandb import Video

            self.tell_wandb(lambda run: run.log({"videos": Video(str(path), format="mp4")}, step=step))

    def tell_wandb(self, message: Callable[[object], object]) -> None:
        """Training goes on, whatever happens to W&B or to the network."""
        try:
            if self.wandb:
                message(self.wandb)
        except Exception as error:
            self.wandb = None
            say(f"training goes on without W&B: {one_line(error)}")

    def flush(self) -> None:
        self.tensorboard.flush()
        os.fsync(self.csv.fileno())  # Python has handed over every line already

    def close(self) -> None:
        self.bar.close()
        self.print_status()
        if self.profile:
            medians = {name: np.median([times[name] for times in self.profile]) for name in self.profile[0]}
            say("µs per step: " + ", ".join(f"{name[5:]} {median:.1f}" for name, median in medians.items()))
        self.csv.close()
        self.tensorboard.close()
        checkpoint = self.dir / "checkpoints" / "last.pt"
        if checkpoint.exists():
            self.tell_wandb(lambda run: run.log_model(str(checkpoint), f"{run.id}-last"))
        self.tell_wandb(lambda run: run.finish(exit_code=int(sys.exc_info()[0] is not None)))
        if self.elsewhere:
            self.elsewhere.cleanup()


def world_size() -> int:
    """Number of processes that torchrun has started; each has an equal part of the environments."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process among them, from 0 on."""
    return int(os.environ.get("RANK", 0))


def average(x: Tensor) -> Tensor:
    """The mean of what every process passes, in place; `x` as it is where there is only one."""
    if world_size() > 1:
        distributed.all_reduce(x)
        x /= world_size()
    return x


def gather(items: list) -> list:
    """Those of every process, in order of rank."""
    lists = [items] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def moments(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance along a dimension, which becomes 1, over all processes."""
    mean = average(x.mean(dim, keepdim=True))
    return mean, average((x - mean).square().mean(dim, keepdim=True))


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes of torchrun, if any: what all but the first one print is thrown away."""
    with ExitStack() as stack:
        if world_size() > 1:
            store, *_ = next(distributed.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives an attempt:
                # a restart would find the addresses of the dead in it, so each attempt gets its own prefix
                store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            nccl = torch.cuda.is_available() and distributed.is_nccl_available()  # not on Windows
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            distributed.init_process_group(backend=backend, store=store, rank=rank(), world_size=world_size())
            stack.callback(distributed.destroy_process_group)
        if rank() > 0:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", errors="replace"))))
        yield


def open_csv(path: Path, step: int):
    """To append to; rows that an earlier attempt wrote after `step` are dropped, they will come again."""
    text = path.read_text(errors="replace") if path.exists() else ""
    kept = [row[0] for row in re.finditer(r"^(\d+),.*\n", text, re.MULTILINE) if int(row[1]) <= step]
    replace_file(path, "".join(["global_step,wall_time,return,length\n", *kept]).encode())
    return open(path, "a", buffering=1)


def describe_run(args: Args) -> dict[str, object]:
    """What it takes to repeat a run: arguments, versions, hardware, git commit ("-dirty": changed since)."""
    script, packages = Path(__file__).resolve(), ("torch", "gymnasium", "ale-py", "mujoco", "numpy")
    git = f'git -C "{script.parent}" describe --always --match= --abbrev=40 --dirty'
    status, commit = subprocess.getstatusoutput(git)
    return {
        "script": script.name,
        "args": asdict(args),
        "versions": {d.name: d.version for d in distributions() if d.name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "processes": world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "git_commit": None if status else commit,
    }


def init_wandb(args: Args, run_dir: Path):
    """A W&B run named as its folder; offline, and never a prompt, where nobody is logged in."""
    import wandb

    mode = "offline"
    with suppress(wandb.Error):  # a wrong key, or no network to check it
        if os.environ.get("WANDB_MODE") in ("offline", "disabled") or wandb.login(prompt=False):
            mode = None  # as WANDB_MODE says, or else online
    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": run_dir}
    identity = {"name": run_dir.name, "id": slug(run_dir.name), "resume": "allow" if args.resume else "never"}
    return wandb.init(**identity, **where, config=asdict(args), save_code=True, mode=mode)


def prepare(args: Args, iteration: int = 0) -> torch.device:
    """Returns the device; prepares torch for it, and seeds torch, NumPy and Python."""
    name = "cpu" if args.device == "auto" else args.device  # a GPU takes longer to call than it computes
    known = re.fullmatch(r"cpu|(cuda|mps)(:\d+)?", name)
    require(known is not None, f"--device {name}: not auto, cpu, cuda, cuda:1 or mps")
    require(name[:3] != "mps" or world_size() == 1, f"--device {name}: torchrun has no means for it")
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # every process on a machine has its own
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name}: {str(error).splitlines()[0]}") from None
    torch.set_num_threads(1)  # two threads wait for each other longer than such small layers take
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "TensorFloat32")  # the compiler suggests it
    torch.manual_seed(args.seed)
    entropy = [args.seed % 2**32, iteration, rank()]
    np.random.seed(entropy)  # these two for environments that draw from them
    random.seed(str(entropy))
    Distribution.set_default_validate_args(False)  # its checks cost as much as the distributions themselves
    return device


def make_agent(args: Args, envs: Envs, device: torch.device) -> Agent:
    return Agent(envs.observation_space, envs.action_space).to(device)


def make_optimizer(agent: Agent, args: Args) -> torch.optim.Optimizer:
    """Adam of one vector, of which all parameters of the agent become views: one call for all of them."""
    vector = nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, agent.parameters())
    return torch.optim.Adam([nn.Parameter(vector)], lr=args.learning_rate, eps=1e-5, fused=True)


def start_compiler(device: torch.device) -> None:
    """Starts the compiler's processes for a GPU, deaf to SIGHUP: it would wait for dead ones forever."""
    if device.type == "cuda" and hasattr(signal, "SIGHUP"):
        from torch._inductor.async_compile import maybe_warm_pool

        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        try:
            maybe_warm_pool()  # they inherit what is blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def compiled(function: Callable, device: torch.device) -> Callable:
    """By torch.compile, into a CUDA graph on a GPU; the function itself, with a warning, where that fails."""
    cuda, fast = device.type == "cuda", None

    def call(*inputs):
        nonlocal fast
        try:
            if fast is None:
                start_compiler(device)
                torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradient become one graph
                unchecked = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe  # nn.Linear stays as it is
                options = {"triton.cudagraphs": cuda, "guard_filter_fn": unchecked}
                fast = torch.compile(function, fullgraph=True, dynamic=False, options=options)
            outputs = fast(*inputs)
        except Exception as error:  # no compiler, or one that cannot cope
            if fast is function:
                raise
            say_once(f"slower without torch.compile: {one_line(error)}")
            fast = function
            return function(*inputs)
        # the next replay of a CUDA graph overwrites what this one returned
        return torch.utils._pytree.tree_map(torch.clone, outputs) if cuda else outputs

    return call


def agrees(agent: Agent) -> bool:
    """Whether numpy_act() computes what act() does; not so once somebody has changed Agent alone."""
    probe = copy.deepcopy(agent)
    with suppress(Exception), torch.random.fork_rng([]), torch.no_grad():  # numpy_act() may not even run
        for parameter in probe.parameters():
            parameter.normal_(std=0.3)  # so small that noise decides as well, if actions are Discrete
        probe.normalize.mean.normal_()
        probe.normalize.var.exponential_()
        inputs = probe, 5.0 * torch.randn(1000, *probe.normalize.mean.shape), probe.noise(1000)
        return torch.allclose(act(*inputs), numpy_act(probe)(*inputs), rtol=1e-3, atol=1e-3)
    return False


def accelerate(args: Args, agent: Agent, device: torch.device) -> tuple[Callable, Callable]:
    """act() and minibatch_gradient(), or with --compile what does the same faster."""
    if not args.compile:
        return act, minibatch_gradient
    torch.compiler.reset()  # of earlier runs in this process: torch gives up a function compiled too often
    widest = max(x.numel() for x in agent.parameters())
    small = args.num_envs // world_size() * widest <= 2**18  # beyond, NumPy would start more threads
    in_numpy = small and device.type == "cpu" and agrees(agent)
    fast_act = numpy_act(agent) if in_numpy else compiled(act, device)
    return fast_act, compiled(minibatch_gradient, device)


@undisturbed()
def train(args: Args) -> float:
    """[PPO] algorithm 1; returns the mean return of the last 100 episodes."""
    checkpoint = checkpoint_to_resume(args)
    iteration = checkpoint["iteration"] if checkpoint else 0
    device = prepare(args, iteration)
    with process_group(), closing(Envs(args, args.num_envs // world_size(), [args.seed, iteration])) as envs:
        agent = make_agent(args, envs, device)
        optimizer = make_optimizer(agent, args)
        fast_act, fast_gradient = accelerate(args, agent, device)
        if checkpoint:
            restore(checkpoint, args, agent=agent, optimizer=optimizer, envs=envs)
        require(len({*gather([iteration])}) == 1, "some processes see an older checkpoint; try again")
        if rank() > 0:  # the same agent, but other actions and minibatches
            torch.manual_seed(int(np.random.default_rng([args.seed, iteration, rank()]).integers(2**63)))
        with (
            closing(Logger(args, checkpoint and checkpoint["logger"])) as logger,
            closing(Checkpoints(args, logger, agent=agent, optimizer=optimizer, envs=envs)) as checkpoints,
            noted_signals() as signals,
        ):
            checkpoints.save(iteration)
            collect, learn = logger.timed("time/act")(collect_rollout), logger.timed("time/update")(update)
            envs.step = logger.timed("time/env")(envs.step)
            obs = torch.from_numpy(envs.reset()).to(device)
            stop = gather(signals)
            while not stop and iteration < args.num_iterations and not logger.solved(args.target_return):
                left = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
                optimizer.param_groups[0]["lr"] = args.learning_rate * left
                rollout, obs = collect(agent, envs, obs, args.num_steps, fast_act)
                logger.log_episodes(sorted(gather(envs.finished)))
                envs.finished.clear()
                logger.log_iteration(envs.num_steps, learn(agent, optimizer, rollout, args, fast_gradient))
                del rollout  # or it would stay in memory while the next one is made
                iteration += 1
                checkpoints.after(iteration)
                stop = gather(signals)
            checkpoints.save(iteration)
            if stop:
                say(f"saved; --run-name {logger.dir.name} --resume goes on with it")
            else:
                checkpoints.record()
            if logger.solved(args.target_return):
                say(f"solved at step {logger.step:,} after {logger.seconds() / 60:.1f} min")
    if stop:
        sys.exit(128 + stop[0])
    return logger.mean_return()


def parse_args() -> Args:
    """The command line, on top of the arguments of the run that it resumes or evaluates."""
    setup, _ = tyro.cli(Setup, return_unknown_args=True, add_help=False)
    path = checkpoint_path(setup)
    if path is None:
        return tyro.cli(Args)
    before = replace(load_checkpoint(path)["args"], resume=False)
    return tyro.cli(Args, default=replace(before, capture_video=False) if setup.evaluate else before)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # whose code page may lack γ, as on Windows
        with suppress(AttributeError):  # there is none, or a notebook's
            stream.reconfigure(errors="replace")
    try:
        args = parse_args()
        train(args) if args.evaluate is None else evaluate_checkpoint(args)
    except (ArgumentError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
