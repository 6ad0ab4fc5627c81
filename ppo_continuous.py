# /// script
# requires-python = ">=3.10"
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

import json
import math
import os
import platform
import re
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
from gymnasium.spaces import Box
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class ArgumentError(Exception):
    """Input that cannot work; main() prints it as one line and exits with status 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


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
    total_timesteps: int = 1_000_000  # environment steps in all, rounded down to whole rollouts
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
    target_kl: float | None = None  # leave out the remaining epochs once approx_kl exceeds this
    batch_size = property(lambda self: self.num_envs * self.num_steps)  # B
    minibatch_size = property(lambda self: self.batch_size // self.num_minibatches)  # M
    num_iterations = property(lambda self: self.total_timesteps // self.batch_size)

    def __post_init__(self) -> None:
        counts = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps")
        coefs = ("learning_rate", "clip_coef", "ent_coef", "vf_coef")
        for names, valid, rule in (
            (counts, lambda x: x >= 1, "at least 1"),
            (coefs, lambda x: 0 <= x < math.inf, "at least 0 and finite"),
            (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1, "between 0 and 1"),
            (("max_grad_norm", "target_kl"), lambda x: x > 0, "positive"),
            (("target_return",), math.isfinite, "finite"),
            (("seed",), lambda x: 0 <= x < 2**63, "between 0 and 2^63 - 1"),
            (("run_name",), lambda x: x == Path(x).name not in ("", ".."), "the name of one folder"),
        ):
            for name in names:
                x = getattr(self, name)
                require(x is None or valid(x), f"--{name.replace('_', '-')} must be {rule}, not {x!r}")
        batch = f"--num-envs {self.num_envs} x --num-steps {self.num_steps} = {self.batch_size}"
        minibatches = f"--num-minibatches {self.num_minibatches}"
        require(self.batch_size % self.num_minibatches == 0, f"{minibatches} does not divide {batch}")
        require(self.num_iterations >= 1, f"--total-timesteps {self.total_timesteps} is less than {batch}")
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
    def update(self, batch: Tensor) -> None:  # (B, *shape)
        var, mean = torch.var_mean(batch, dim=0, correction=0)
        delta, self.count = mean - self.mean, self.count + len(batch)
        weight = len(batch) / self.count
        self.var = self.var + (var - self.var) * weight + delta.square() * weight * (1.0 - weight)
        self.mean = self.mean + delta * weight

    def forward(self, x: Tensor) -> Tensor:  # (B, *shape), in standard deviations from the mean, within ±10
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10.0, 10.0)


class Step(NamedTuple):
    """What N environments return; where an episode ended, `obs` is the first of the next one."""

    obs: np.ndarray  # (N, *obs)
    rewards: np.ndarray  # (N,) float32, as the learner sees them
    terminations: np.ndarray  # (N,) bool, the action led to a terminal state
    dones: np.ndarray  # (N,) bool, the episode ended, by termination or by time limit
    final_obs: np.ndarray | None  # (N, *obs) valid only where a time limit cut the episode


class Envs:
    """N environments stepped together; all that is special about a simulator stays in here.

    In training, rewards are divided by the standard deviation of the discounted return so far and kept within
    ±10 [37]. Actions are clipped to the bounds only here: the learner keeps what it sampled.
    """

    def __init__(self, args: Args, num_envs: int, seed: int, training: bool = True):
        def make_env() -> gym.Env:  # flat observations, and fresh ones: SAME_STEP does not copy final_obs
            return gym.wrappers.FlattenObservation(gym.make(args.env_id, disable_env_checker=True))

        vectorize = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
        try:
            self.envs = vectorize([make_env] * num_envs, copy=False, autoreset_mode="SameStep")
        except (gym.error.Error, ImportError, ValueError) as error:
            hint = "; Atari games: ppo_atari.py" if isinstance(error, gym.error.UnregisteredEnv) else ""
            raise ArgumentError(f"--env-id {args.env_id}: {str(error).partition(chr(10))[0]}{hint}") from None
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        fits = isinstance(self.action_space, Box) and isinstance(self.observation_space, Box)
        kinds = " actions, ".join(type(s).__name__ for s in (self.action_space, self.observation_space))
        require(
            fits, f"--env-id {args.env_id}: {kinds} observations; for Discrete actions use ppo_kl_penalty.py"
        )
        self.close = self.envs.close
        self.num_envs, self.training, self.gamma = num_envs, training, args.gamma
        self.seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
        self.return_stats = RunningMeanStd(())
        self.num_steps = 0  # taken in all environments together
        self.finished: list[tuple[int, float, int]] = []  # (num_steps at its end, return, length) per episode

    def reset(self) -> np.ndarray:  # (N, *obs)
        self.episodic_returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self.discounted_returns = torch.zeros(self.num_envs)
        return self.envs.reset(seed=self.seeds)[0].astype(np.float32)

    def step(self, actions: np.ndarray) -> Step:  # (N, *act)
        actions = actions.reshape(-1, *self.action_space.shape)
        actions = actions.clip(self.action_space.low, self.action_space.high)
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        dones = terminations | truncations
        self.episodic_returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(dones).tolist():
            episode = (self.num_steps + i + 1, self.episodic_returns[i].item(), self.lengths[i].item())
            self.finished.append(episode)
            self.episodic_returns[i] = self.lengths[i] = 0
        self.num_steps += self.num_envs
        obs, rewards, final_obs = obs.astype(np.float32), rewards.astype(np.float32), None
        if (cut := truncations & ~terminations).any():
            final_obs = np.zeros_like(obs)
            final_obs[cut] = np.stack(infos["final_obs"][cut])
        if self.training:
            rewards = self.scale(torch.from_numpy(rewards), torch.from_numpy(dones)).numpy()
        return Step(obs, rewards, terminations, dones, final_obs)

    def scale(self, rewards: Tensor, dones: Tensor) -> Tensor:  # (N,)
        self.discounted_returns = self.discounted_returns * self.gamma + rewards
        self.return_stats.update(self.discounted_returns)
        self.discounted_returns[dones] = 0.0
        return (rewards / (self.return_stats.var + 1e-8).sqrt()).clamp(-10.0, 10.0)


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
    outcome = torch.from_numpy(np.array(followed, dtype=np.float32)).to(device)  # (T, 3, N)
    rewards, terminations, dones = outcome.unbind(1)
    next_values = torch.cat([values[1:], agent.value(obs)[None]])
    for t, final_values in cut_values.items():  # a time limit is not the end of the task, [TIME]
        next_values[t] = torch.where(dones[t] > terminations[t], final_values, next_values[t])
    return Rollout(all_obs, all_actions, logprobs, rewards, values, next_values, terminations, dones), obs


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages, [GAE] eq. 16, and returns, their sum with the values; all tensors are (T, N)."""
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values
    advantages, last = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + gamma * gae_lambda * (1.0 - dones[t]) * last
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
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # no 0 / 0
    pg_loss = policy_loss(logratio, advantages, args.clip_coef)
    v_loss = value_loss(values, old_values, returns, args.clip_coef if args.clip_vloss else None)
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
    advantages, returns = compute_gae(*rollout[3:], args.gamma, args.gae_lambda)  # from the rewards on
    obs, actions, logprobs, _, values, *_ = rollout
    batch = [x.flatten(0, 1) for x in (obs, actions, logprobs, values, advantages, returns)]
    history = []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(args.batch_size, device=obs.device).split(args.minibatch_size):
            loss, metrics = minibatch_loss(agent, [x[rows] for x in batch], args)
            optimizer.zero_grad()
            loss.backward()
            metrics["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            agent.log_std.data.clamp_(-20.0, 2.0)  # after the step, so that its gradient never vanishes
            history.append(torch.stack([metric.detach() for metric in metrics.values()]))
        if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
            break
    agent.normalize.update(obs.flatten(0, 1))  # not before: both policies of the ratio see the same input
    means = dict(zip(metrics, torch.stack(history).mean(0).tolist(), strict=True))
    explained = 1.0 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    learning_rate = optimizer.param_groups[0]["lr"]
    return means | {"losses/explained_variance": explained.item(), "charts/learning_rate": learning_rate}


class Logger:
    """Writes a run to runs/NAME/, to W&B with --track, and its progress to the screen."""

    def __init__(self, args: Args):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.dir = Path("runs", args.run_name or re.sub(r"[^\w.-]", "-", name))
        try:
            self.dir.mkdir(parents=True)
        except OSError as error:  # above all, it exists
            raise ArgumentError(f"--run-name {self.dir.name}: {self.dir}: {error.strerror}") from None
        (self.dir / "args.json").write_text(json.dumps(describe_run(args), indent=2) + "\n")
        self.csv = open(self.dir / "episodes.csv", "w", buffering=1)
        self.csv.write("global_step,wall_time,return,length\n")
        self.tensorboard = SummaryWriter(str(self.dir))
        self.wandb = init_wandb(args, self.dir) if args.track else None
        self.returns: deque[float] = deque(maxlen=100)  # of the last episodes
        self.status, self.start, self.printed = "no steps yet", time.monotonic(), 0.0
        print(f"training on {args.env_id}, written to {self.dir}", flush=True)
        total = args.num_iterations * args.batch_size
        self.bar = tqdm(total=total, unit=" steps", unit_scale=True, file=sys.stdout, disable=None)  # no pipe

    def mean_return(self) -> float:
        return sum(self.returns) / len(self.returns) if self.returns else math.nan

    def solved(self, target_return: float | None) -> bool:
        return target_return is not None and len(self.returns) == 100 and self.mean_return() >= target_return

    def log_episodes(self, finished: list[tuple[int, float, int]]) -> None:
        for step, episodic_return, length in finished:
            self.returns.append(episodic_return)
            self.csv.write(f"{step},{time.monotonic() - self.start:.2f},{episodic_return},{length}\n")
            self.log(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
        finished.clear()

    def log_iteration(self, step: int, metrics: dict[str, float]) -> None:
        bad = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        if bad:
            advice = "try a lower --learning-rate or --max-grad-norm, or fewer --update-epochs"
            raise FloatingPointError(f"{bad} became NaN or infinite before step {step:,}; {advice}")
        seconds = time.monotonic() - self.start
        self.log(step, metrics | {"charts/SPS": step / seconds})
        self.bar.set_postfix_str(f"return {self.mean_return():.2f}", refresh=False)
        self.bar.update(step - self.bar.n)
        returns = f"mean return {self.mean_return():.2f} of the last {len(self.returns)} episodes"
        self.status = f"step {step:,}: {returns}, {step / seconds:,.0f} steps/s, {seconds / 60:.1f} min"
        if self.bar.disable and seconds - self.printed > 5.0:
            self.printed = seconds
            print(self.status, flush=True)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(scalars | {"global_step": step})

    def close(self) -> None:
        self.bar.close()
        print(self.status, flush=True)
        self.csv.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def describe_run(args: Args) -> dict[str, object]:
    """What it takes to repeat a run: arguments, versions, hardware and git commit."""
    script, packages = Path(__file__).resolve(), ("torch", "gymnasium", "ale-py", "mujoco", "numpy")
    status, commit = subprocess.getstatusoutput(f'git -C "{script.parent}" rev-parse --verify HEAD')
    return {
        "script": script.name,
        "args": asdict(args),
        "versions": {d.name: d.version for d in distributions() if d.name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": None if status else commit,
    }


def init_wandb(args: Args, run_dir: Path):
    """A W&B run named as its folder; offline, and never a prompt, where nobody is logged in."""
    import wandb

    try:
        usable = os.environ.get("WANDB_MODE") in ("offline", "disabled") or wandb.login(prompt=False)
    except wandb.Error:  # a wrong key, or no network to check it
        usable = False
    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": run_dir}
    run = wandb.init(name=run_dir.name, config=asdict(args), mode=None if usable else "offline", **where)
    run.define_metric("*", step_metric="global_step")
    return run


def resolve_device(name: str) -> torch.device:
    """`auto` is the CPU: starting a GPU's kernels takes longer than networks this small."""
    known = re.fullmatch(r"auto|cpu|(cuda|mps)(:\d+)?", name)
    require(known is not None, f"--device {name}: not auto, cpu, cuda, cuda:1 or mps")
    try:
        return torch.empty(0, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name}: {str(error).splitlines()[0]}") from None


def train(args: Args) -> float:
    """[PPO] algorithm 1; returns the mean return of the last 100 episodes."""
    device = resolve_device(args.device)
    torch.set_num_threads(1)  # two threads wait for each other longer than such small layers take
    torch.backends.cudnn.deterministic = args.torch_deterministic
    np.random.seed(args.seed % 2**32)  # for environments that draw from the global generator
    torch.manual_seed(args.seed)
    Distribution.set_default_validate_args(False)  # its checks cost as much as the distributions themselves
    with closing(Envs(args, args.num_envs, args.seed)) as envs, closing(Logger(args)) as logger:
        agent = Agent(envs.observation_space, envs.action_space).to(device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        obs = torch.from_numpy(envs.reset()).to(device)
        for iteration in range(args.num_iterations):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - iteration / args.num_iterations)
            rollout, obs = collect_rollout(agent, envs, obs, args.num_steps)
            logger.log_episodes(envs.finished)
            metrics = update(agent, optimizer, rollout, args)
            logger.log_iteration(envs.num_steps, metrics)
            if logger.solved(args.target_return):
                tqdm.write(f"solved: --target-return {args.target_return} reached at step {envs.num_steps:,}")
                break
    return logger.mean_return()


def main() -> None:
    try:
        train(tyro.cli(Args))
    except (ArgumentError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
