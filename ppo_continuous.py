# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Proximal Policy Optimization with the clipped objective for continuous actions, in one file.

    python ppo_continuous.py --env-id HalfCheetah-v5

A Gaussian policy for any gymnasium environment with Box actions; the run is written to runs/NAME/.
Letters: T steps of N environments make a batch of B = T·N transitions; a minibatch has M of them.

[PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, https://arxiv.org/abs/1707.06347
[GAE]  Schulman et al. 2016, Generalized Advantage Estimation, https://arxiv.org/abs/1506.02438
[CHAN] Chan et al. 1983, Algorithms for Computing the Sample Variance, merging two samples
[TIME] Pardo et al. 2018, Time Limits in Reinforcement Learning, https://arxiv.org/abs/1712.00378
[37]   Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization,
       https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/
"""

import csv
import difflib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class ArgumentError(Exception):
    """Input that cannot work; main() prints it as one line and exits with status 2."""


class TrainingDiverged(Exception):
    """A loss or gradient became NaN or infinite; main() prints it as one line and exits with status 1."""


@dataclass(frozen=True)
class Args:
    exp_name: str = "ppo_continuous"  # name of the experiment, part of the default run name
    run_name: str | None = None  # the run is written to runs/RUN_NAME; default ENV_ID__EXP_NAME__SEED__TIME
    seed: int = 1  # seed of weights, actions, minibatches and environments
    torch_deterministic: bool = True  # only repeatable cuDNN algorithms
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto is the CPU, faster for networks this small
    track: bool = False  # log to Weights & Biases as well, offline where nobody is logged in
    wandb_project_name: str = "ppo"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases
    env_id: str = "HalfCheetah-v5"  # any gymnasium environment with Box actions
    async_envs: bool = False  # one process per environment: pays where a step takes longer than about 1 ms
    total_timesteps: int = 1_000_000  # environment steps of the whole training
    target_return: float | None = None  # stop as solved once the mean return of 100 episodes reaches this
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
    target_kl: float | None = None  # skip the remaining epochs once approx_kl of one exceeds this

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    def __post_init__(self) -> None:
        counts = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps")
        coefs = ("learning_rate", "clip_coef", "ent_coef", "vf_coef")
        for names, valid, rule in (
            (counts, lambda x: x >= 1, "at least 1"),
            (coefs, lambda x: 0 <= x < math.inf, "finite and not negative"),
            (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1, "between 0 and 1"),
            (("max_grad_norm", "target_kl"), lambda x: x > 0, "positive"),
            (("target_return",), math.isfinite, "finite"),
            (("seed",), lambda x: 0 <= x < 2**63, "between 0 and 2^63 - 1"),
            (("run_name",), lambda x: x not in ("", "..") and x == Path(x).name, "one folder's name"),
        ):
            for name in names:
                value = getattr(self, name)
                flag = "--" + name.replace("_", "-")
                require(value is None or valid(value), f"{flag} must be {rule}, not {value}")
        batch = f"--num-envs {self.num_envs} x --num-steps {self.num_steps} = {self.batch_size}"
        minibatches = f"--num-minibatches {self.num_minibatches}"
        require(self.batch_size % self.num_minibatches == 0, f"{minibatches} does not divide {batch}")
        lone = self.norm_adv and self.minibatch_size == 1
        require(not lone, f"{minibatches} of {batch} leaves 1 sample, too few for --norm-adv")
        enough = self.total_timesteps >= self.batch_size
        require(enough, f"--total-timesteps {self.total_timesteps} is less than one rollout, {batch}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


class RunningMeanStd(nn.Module):
    """Normalises by mean and variance, per element, of all data so far, merged batch by batch [CHAN]."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:  # (B, *shape)
        var, mean = torch.var_mean(batch, dim=0, correction=0)
        delta, self.count = mean - self.mean, self.count + len(batch)
        weight = len(batch) / self.count
        self.var = self.var + (var - self.var) * weight + delta.square() * weight * (1.0 - weight)
        self.mean = self.mean + delta * weight

    def forward(self, x: Tensor) -> Tensor:  # (B, *shape), in standard deviations from the mean, within ±10
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10.0, 10.0)


class Step(NamedTuple):
    """What N environments return; where an episode ended, the next one has begun already."""

    obs: np.ndarray  # (N, *obs)
    rewards: np.ndarray  # (N,) float32, as the learner sees them
    terminations: np.ndarray  # (N,) bool, the action led to a terminal state
    dones: np.ndarray  # (N,) bool, the episode ended, by termination or by time limit
    final_obs: np.ndarray | None  # (N, *obs) valid only where a time limit cut the episode


class Envs:
    """N environments stepped together; all that is special about a simulator stays in here.

    Rewards for the learner are divided by the standard deviation of the discounted return so far and kept within
    ±10 [37]. Actions are clipped to the bounds only here: the learner keeps what it sampled.
    """

    def __init__(self, args: Args, num_envs: int, seed: int, training: bool = True):
        def make_env() -> gym.Env:  # observations of any kind become fresh, flat float32 vectors
            env = gym.make(args.env_id, disable_env_checker=True)
            space = env.observation_space
            require(space.is_np_flattenable, f"--env-id {args.env_id}: {space} observations are not vectors")
            vector = Box(-np.inf, np.inf, (gym.spaces.flatdim(space),), np.float32)
            flatten = lambda obs: gym.spaces.flatten(space, obs).astype(np.float32)  # noqa: E731
            return gym.wrappers.TransformObservation(env, flatten, vector)

        make_envs = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
        same_step = gym.vector.AutoresetMode.SAME_STEP
        try:
            self.envs = make_envs([make_env] * num_envs, copy=False, autoreset_mode=same_step)
        except (gym.error.Error, ImportError) as error:
            raise ArgumentError(f"--env-id {args.env_id}: {explain_env_error(args.env_id, error)}") from None
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        check_action_space(args.env_id, self.action_space)
        self.num_envs, self.training, self.gamma = num_envs, training, args.gamma
        self.seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
        self.return_stats = RunningMeanStd(())
        self.num_steps = 0  # taken in all environments together
        self.finished: list[tuple[int, float, int]] = []  # (num_steps at its end, return, length) per episode

    def reset(self) -> np.ndarray:  # (N, *obs)
        self.episodic_returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self.discounted_returns = torch.zeros(self.num_envs)
        return self.envs.reset(seed=self.seeds)[0].copy()

    def step(self, actions: np.ndarray) -> Step:  # (N, *act)
        if isinstance(self.action_space, Box):
            actions = actions.reshape(-1, *self.action_space.shape)
            actions = np.clip(actions, self.action_space.low, self.action_space.high)
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        dones = terminations | truncations
        self.episodic_returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(dones).tolist():
            episode = (self.num_steps + i + 1, self.episodic_returns[i].item(), self.lengths[i].item())
            self.finished.append(episode)
            self.episodic_returns[i] = self.lengths[i] = 0
        self.num_steps += self.num_envs
        final_obs = None
        if (cut := truncations & ~terminations).any():
            final_obs = np.zeros_like(obs)
            final_obs[cut] = np.stack(infos["final_obs"][cut])
        rewards = rewards.astype(np.float32)
        if self.training:
            rewards = self.scale(torch.from_numpy(rewards), torch.from_numpy(dones)).numpy()
        return Step(obs.copy(), rewards, terminations, dones, final_obs)

    def scale(self, rewards: Tensor, dones: Tensor) -> Tensor:  # (N,)
        self.discounted_returns = self.discounted_returns * self.gamma + rewards
        self.return_stats.update(self.discounted_returns)
        self.discounted_returns[dones] = 0.0
        return (rewards / (self.return_stats.var + 1e-8).sqrt()).clamp(-10.0, 10.0)

    def state_dict(self) -> dict[str, Tensor]:
        return self.return_stats.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.return_stats.load_state_dict(state)

    def close(self) -> None:
        self.envs.close()


def explain_env_error(env_id: str, error: Exception) -> str:
    if not isinstance(error, gym.error.UnregisteredEnv):
        return str(error).splitlines()[0]
    import ale_py

    gym.register_envs(ale_py)
    if env_id.replace("Deterministic", "") in gym.registry:
        return "an Atari game, use ppo_atari.py"
    close = difflib.get_close_matches(env_id, gym.registry)
    return "unknown environment" + (f", did you mean {' or '.join(close)}?" if close else "")


def check_action_space(env_id: str, space: gym.Space) -> None:
    hint = ", use ppo_kl_penalty.py" if isinstance(space, Discrete) else ""
    continuous = isinstance(space, Box) and np.issubdtype(space.dtype, np.floating)
    require(continuous, f"--env-id {env_id} has {space} actions, not a Box of floats{hint}")


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
        policy = Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)
        return policy, self.critic(x).squeeze(-1)

    def value(self, obs: Tensor) -> Tensor:  # (M, *obs) -> V(s) (M,)
        return self(obs)[1]


class Rollout(NamedTuple):
    """One batch of experience; row t is (s_t, a_t) and what followed from it."""

    obs: Tensor  # (T, N, *obs)
    actions: Tensor  # (T, N, *act)
    logprobs: Tensor  # (T, N) log π_old(a_t | s_t)
    values: Tensor  # (T, N) V(s_t)
    next_values: Tensor  # (T, N) V(s_{t+1}); of the episode's last observation where a time limit cut it
    rewards: Tensor  # (T, N)
    terminations: Tensor  # (T, N) 1.0 where s_{t+1} is terminal: no value beyond
    dones: Tensor  # (T, N) 1.0 where the episode ended, by termination or by time limit


@torch.no_grad()
def collect_rollout(agent: Agent, envs: Envs, obs: Tensor, num_steps: int) -> tuple[Rollout, Tensor]:
    """Act `num_steps` times in every environment, from `obs` (N, *obs) on; also returns where it got to."""
    device = obs.device
    acted, followed, cut_values = [], [], {}
    for t in range(num_steps):
        policy, values = agent(obs)
        actions = policy.sample()
        acted.append((obs, actions, policy.log_prob(actions), values))
        step = envs.step(actions.cpu().numpy())
        followed.append((step.rewards, step.terminations, step.dones))
        if step.final_obs is not None:
            cut_values[t] = agent.value(torch.from_numpy(step.final_obs).to(device))
        obs = torch.from_numpy(step.obs).to(device)
    all_obs, all_actions, logprobs, values = (torch.stack(rows) for rows in zip(*acted, strict=True))
    rewards, terminations, dones = (
        torch.from_numpy(np.array(rows, dtype=np.float32)).to(device) for rows in zip(*followed, strict=True)
    )
    next_values = torch.cat([values[1:], agent.value(obs)[None]])
    for t, final_values in cut_values.items():  # a time limit is not the end of the task, [TIME]
        next_values[t] = torch.where(dones[t] > terminations[t], final_values, next_values[t])
    return Rollout(all_obs, all_actions, logprobs, values, next_values, rewards, terminations, dones), obs


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages, [GAE] eq. 16, and returns, their sum with the values. Everything (T, N)."""
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values
    advantages = torch.empty_like(deltas)
    last = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + gamma * gae_lambda * (1.0 - dones[t]) * last
    return advantages, advantages + values


def normalize_advantages(advantages: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the minibatch, [37]; all 0 where all are equal. (M,)"""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


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


class Batch(NamedTuple):
    """What the loss needs of each transition; (B, …) for a whole rollout, (M, …) for a minibatch."""

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def minibatch_loss(agent: Agent, mb: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """[PPO] eq. 9, negated so that it is minimised, and what to log of it."""
    policy, value = agent(mb.obs)
    logratio = policy.log_prob(mb.actions) - mb.logprobs
    advantages = normalize_advantages(mb.advantages) if args.norm_adv else mb.advantages
    pg_loss = policy_loss(logratio, advantages, args.clip_coef)
    v_loss = value_loss(value, mb.values, mb.returns, args.clip_coef if args.clip_vloss else None)
    entropy = policy.entropy().mean()
    ratio = logratio.detach().exp()
    metrics = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy,
        "losses/old_approx_kl": -logratio.mean(),  # "k1" estimate of KL(π_old‖π_θ)
        "losses/approx_kl": (ratio - 1.0 - logratio).mean(),  # "k3": never negative, less noise
        "losses/clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
    }
    return pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss, metrics


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, args: Args) -> dict[str, float]:
    """Learn from one rollout in epochs of minibatches; returns what to log, averaged over all of them."""
    obs, actions, logprobs, values, next_values, rewards, terminations, dones = rollout
    advantages, returns = compute_gae(
        rewards, values, next_values, terminations, dones, args.gamma, args.gae_lambda
    )
    batch = Batch(*(x.flatten(0, 1) for x in (obs, actions, logprobs, values, advantages, returns)))
    history = []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(args.batch_size, device=obs.device).split(args.minibatch_size):
            loss, metrics = minibatch_loss(agent, Batch(*(x[rows] for x in batch)), args)
            optimizer.zero_grad()
            loss.backward()
            metrics["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            agent.log_std.data.clamp_(-20.0, 2.0)  # after the step, so that its gradient never vanishes
            history.append(torch.stack([metric.detach() for metric in metrics.values()]))
        kl = torch.stack(history[-args.num_minibatches :]).mean(0)[list(metrics).index("losses/approx_kl")]
        if args.target_kl is not None and kl > args.target_kl:
            break
    agent.normalize.update(batch.obs)  # not before: π_old and π_θ of an update see the same observations
    metrics = dict(zip(metrics, torch.stack(history).mean(0).tolist(), strict=True))
    metrics["losses/explained_variance"] = explained_variance(batch.values, batch.returns).item()
    return metrics | {"charts/learning_rate": optimizer.param_groups[0]["lr"]}


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), (B,): 1 for a perfect critic, 0 for a constant one."""
    return 1.0 - (returns - values).var() / returns.var().clamp(min=1e-8)


class Logger:
    """Writes a run to runs/NAME/, to W&B with --track, and its progress to the screen."""

    def __init__(self, args: Args):
        default_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-")
        self.dir = Path("runs", args.run_name or default_name)
        require(not self.dir.exists(), f"--run-name {self.dir.name}: {self.dir} exists, choose another")
        self.dir.mkdir(parents=True)
        (self.dir / "args.json").write_text(json.dumps(describe_run(args), indent=2) + "\n")
        self.csv_file = open(self.dir / "episodes.csv", "w", newline="", buffering=1)
        self.csv = csv.writer(self.csv_file)
        self.csv.writerow(("global_step", "wall_time", "return", "length"))
        self.tensorboard = SummaryWriter(str(self.dir))
        self.wandb = init_wandb(args, self.dir) if args.track else None
        self.recent: deque[float] = deque(maxlen=100)  # returns of the last episodes
        self.step, self.start, self.last_line = 0, time.monotonic(), 0.0
        print(f"training on {args.env_id}, written to {self.dir}", flush=True)
        total = args.num_iterations * args.batch_size
        self.bar = tqdm(total=total, unit=" steps", unit_scale=True, disable=None)  # only on a terminal

    @property
    def mean_return(self) -> float:
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def episodes(self, finished: list[tuple[int, float, int]]) -> None:
        for step, episodic_return, length in finished:
            self.recent.append(episodic_return)
            self.csv.writerow((step, round(time.monotonic() - self.start, 2), episodic_return, length))
            self.scalars(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
        finished.clear()

    def iteration(self, step: int, metrics: dict[str, float]) -> None:
        seconds = time.monotonic() - self.start
        self.scalars(step, metrics | {"charts/SPS": step / seconds})
        self.bar.set_postfix_str(f"return {self.mean_return:.2f}", refresh=False)
        self.bar.update(step - self.step)
        self.step = step
        if self.bar.disable and seconds - self.last_line > 5.0:
            self.last_line = seconds
            print(self.status(), flush=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values | {"global_step": step})

    def status(self) -> str:
        seconds = time.monotonic() - self.start
        speed = f"{self.step / seconds:,.0f} steps/s, {seconds / 60:.1f} min"
        return (
            f"step {self.step:,}: return {self.mean_return:.2f} (last {len(self.recent)} episodes), {speed}"
        )

    def solved(self, target_return: float) -> bool:
        solved = len(self.recent) == 100 and self.mean_return >= target_return
        if solved:
            self.bar.write(f"solved: return {self.mean_return:.2f} over 100 episodes reaches {target_return}")
        return solved

    def close(self) -> None:
        self.bar.close()
        print(self.status(), flush=True)
        self.csv_file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def describe_run(args: Args) -> dict[str, object]:
    """What it takes to repeat a run."""
    script, packages = Path(__file__).resolve(), ("torch", "gymnasium", "ale-py", "mujoco", "numpy")
    git = subprocess.run(["git", "-C", script.parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "script": script.name,
        "args": asdict(args),
        "versions": {d.name: d.version for d in distributions() if d.name in packages},
        "hardware": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "git_commit": git.stdout.strip() or None,
    }


def init_wandb(args: Args, run_dir: Path):
    """A W&B run named as its folder; offline, and never a prompt, where nobody is logged in."""
    import wandb

    online = os.environ.get("WANDB_MODE") in ("offline", "disabled") or wandb.login(prompt=False)
    run = wandb.init(
        project=args.wandb_project_name,
        entity=args.wandb_entity,
        name=run_dir.name,
        dir=run_dir,
        config=asdict(args),
        save_code=True,
        mode=None if online else "offline",
    )
    if run.settings.mode == "offline":
        print(f"W&B logs offline, upload with: wandb sync {Path(run.dir).parent}", flush=True)
    return run


def resolve_device(name: str) -> torch.device:
    """`auto` is the CPU: a GPU spends more time on starting kernels than networks this small take."""
    try:
        return torch.empty(0, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name}: {str(error).splitlines()[0]}") from None


def train(args: Args) -> float:
    """[PPO] algorithm 1; returns the mean return of the last 100 episodes."""
    device = resolve_device(args.device)
    torch.set_num_threads(1)  # two threads wait for each other longer than such small layers take
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)
    with closing(Envs(args, args.num_envs, args.seed)) as envs, closing(Logger(args)) as logger:
        agent = Agent(envs.observation_space, envs.action_space).to(device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        obs = torch.from_numpy(envs.reset()).to(device)
        for iteration in range(args.num_iterations):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - iteration / args.num_iterations)
            rollout, obs = collect_rollout(agent, envs, obs, args.num_steps)
            logger.episodes(envs.finished)
            metrics = update(agent, optimizer, rollout, args)
            check_finite(metrics, envs.num_steps)
            logger.iteration(envs.num_steps, metrics)
            if args.target_return is not None and logger.solved(args.target_return):
                break
        return logger.mean_return


def check_finite(metrics: dict[str, float], step: int) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        advice = "try a lower --learning-rate or --max-grad-norm, or fewer --update-epochs"
        raise TrainingDiverged(f"{', '.join(bad)} became NaN or infinite by step {step:,}; {advice}")


def main() -> None:
    try:
        train(tyro.cli(Args))
    except (ArgumentError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
