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
"""Proximal Policy Optimization with the clipped objective for Atari games, in one file.

    python ppo_atari.py --env-id PongNoFrameskip-v4

A convolutional policy for any game of the Arcade Learning Environment; the run is written to runs/NAME/.
Letters: T steps of N environments make a batch of B = T·N transitions; a minibatch has M of them.

[PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, https://arxiv.org/abs/1707.06347
[GAE]  Schulman et al. 2016, Generalized Advantage Estimation, https://arxiv.org/abs/1506.02438
[DQN]  Mnih et al. 2015, Human-level control, https://doi.org/10.1038/nature14236
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
from typing import Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class ArgumentError(Exception):
    """Input that cannot work; main() prints it as one line and exits with status 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)


@dataclass(frozen=True)
class Args:
    exp_name: str = "ppo_atari"  # name of the experiment, part of the default run name
    run_name: str | None = None  # the run is written to runs/RUN_NAME; default ENV_ID__EXP_NAME__SEED__TIME
    seed: int = 1  # seed of weights, actions, minibatches and environments
    torch_deterministic: bool = True  # only repeatable cuDNN algorithms
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto is a GPU where there is one
    precision: Literal["fp32", "bf16"] = "fp32"  # of the convolutional networks; all else is float32
    track: bool = False  # log to Weights & Biases as well, offline where nobody is logged in
    wandb_project_name: str = "ppo"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases
    env_id: str = "PongNoFrameskip-v4"  # any Atari game, also as PongDeterministic-v4, Pong-v4 or ALE/Pong-v5
    shared_network: bool = True  # one convolutional network for policy and value together, or one for each
    total_timesteps: int = 10_000_000  # agent steps in all (of 4 frames), rounded down to whole rollouts
    target_return: float | None = None  # stop as solved once the mean return of 100 episodes reaches this
    learning_rate: float = 2.5e-4  # step size of Adam
    num_envs: int = 8  # N, environments stepped together
    num_steps: int = 128  # T, steps of each environment per rollout
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # γ, discount factor
    gae_lambda: float = 0.95  # λ of the advantage estimation: 0 trusts the critic, 1 the observed returns
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over each batch
    norm_adv: bool = True  # shift and scale the advantages of each minibatch to mean 0 and deviation 1
    clip_coef: float = 0.1  # ε, how far the probability ratio may move from 1
    clip_vloss: bool = True  # also keep the value within ±ε of the old one
    ent_coef: float = 0.01  # weight of the entropy bonus
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


class Step(NamedTuple):
    """What N environments return; where an episode ended, `obs` is the first of the next one."""

    obs: np.ndarray  # (N, *obs)
    rewards: np.ndarray  # (N,) float32, as the learner sees them
    terminations: np.ndarray  # (N,) bool, the action led to a terminal state
    dones: np.ndarray  # (N,) bool, the episode ended, by termination or by time limit
    final_obs: np.ndarray | None  # (N, *obs) valid only where a time limit cut the episode


class Envs:
    """N Atari games stepped together in C++ threads; all that is special about the simulator stays in here.

    Observations are the last 4 pictures, grey, 84x84, each the maximum of 2 frames; a game begins with up to
    30 no-ops [DQN]. Sticky actions are as the id says, and so is the number of frames an action is held, but
    4 where the id leaves that to the agent (NoFrameskip) or to chance (Pong-v4). In training, rewards become
    their sign, and a lost life is terminal to the learner while the game and its score go on.
    """

    def __init__(self, args: Args, num_envs: int, seed: int, training: bool = True):
        options = game_options(args.env_id) | {"reward_clipping": False, "life_loss_info": training}
        self.envs = AtariVectorEnv(num_envs=num_envs, autoreset_mode="SameStep", **options)
        self.envs.metadata = dict(self.envs.metadata)  # or the next instance would write into this one's
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        self.close = self.envs.close
        self.num_envs, self.training = num_envs, training
        self.seeds = np.random.SeedSequence(seed).generate_state(num_envs) % 2**31
        self.num_steps = 0  # taken in all environments together
        self.finished: list[tuple[int, float, int]] = []  # (num_steps at its end, return, length) per episode

    def reset(self) -> np.ndarray:  # (N, 4, 84, 84)
        self.episodic_returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        obs, infos = self.envs.reset(seed=self.seeds.astype(int))
        self.frames = infos["episode_frame_number"].copy()
        return obs

    def step(self, actions: np.ndarray) -> Step:  # (N,)
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        self.episodic_returns += rewards
        self.lengths += 1
        # A lost life terminates as well, but only a new game counts its frames from the start again.
        game_over = truncations | (terminations & (infos["episode_frame_number"] < self.frames))
        self.frames = infos["episode_frame_number"].copy()
        for i in np.flatnonzero(game_over).tolist():
            episode = (self.num_steps + i + 1, self.episodic_returns[i].item(), self.lengths[i].item())
            self.finished.append(episode)
            self.episodic_returns[i] = self.lengths[i] = 0
        self.num_steps += self.num_envs
        final_obs = infos["final_obs"] if (truncations & ~terminations).any() else None
        rewards = (np.sign(rewards) if self.training else rewards).astype(np.float32)
        return Step(obs, rewards, terminations, terminations | truncations, final_obs)


def game_options(env_id: str) -> dict[str, object]:
    """What an id says about its game, as arguments of AtariVectorEnv."""
    gym.register_envs(ale_py)
    require("-ram" not in env_id, f"--env-id {env_id}: -ram ids show the memory, not the picture")
    deterministic = env_id.endswith(("Deterministic-v0", "Deterministic-v4"))  # ale-py has dropped these ids
    try:
        options = dict(gym.spec(env_id.replace("Deterministic", "") if deterministic else env_id).kwargs)
    except gym.error.Error as error:
        raise ArgumentError(f"--env-id {env_id}: {error}") from None
    others = "ppo_continuous.py for Box actions or ppo_kl_penalty.py for Discrete ones"
    require("game" in options, f"--env-id {env_id} is not an Atari game, use {others}")
    frameskip = options.pop("frameskip")
    if deterministic:
        frameskip = 3 if options["game"] == "space_invaders" else 4  # its shots blink every 4 frames
    return options | {"frameskip": frameskip if frameskip in (3, 4) else 4}


def init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights and zero biases, [37]."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def nature_cnn(channels: int) -> nn.Sequential:  # (M, channels, 84, 84) -> (M, 512)
    """The convolutional network of [DQN]."""
    return nn.Sequential(
        init(nn.Conv2d(channels, 32, 8, stride=4)),  # (M, 32, 20, 20)
        nn.ReLU(),
        init(nn.Conv2d(32, 64, 4, stride=2)),  # (M, 64, 9, 9)
        nn.ReLU(),
        init(nn.Conv2d(64, 64, 3)),  # (M, 64, 7, 7)
        nn.ReLU(),
        nn.Flatten(),
        init(nn.Linear(64 * 7 * 7, 512)),
        nn.ReLU(),
    )


class Agent(nn.Module):
    """Policy and value function: two heads on one convolutional network, or on one each."""

    def __init__(self, observation_space: Box, action_space: Discrete, shared_network=True, precision="fp32"):
        super().__init__()
        self.bf16 = precision == "bf16"
        self.network = nature_cnn(observation_space.shape[0])
        self.value_network = None if shared_network else nature_cnn(observation_space.shape[0])
        self.actor = init(nn.Linear(512, int(action_space.n)), gain=0.01)  # nearly uniform at first
        self.critic = init(nn.Linear(512, 1), gain=1.0)

    def forward(self, obs: Tensor) -> tuple[Categorical, Tensor]:  # uint8 (M, *obs) -> π(·|s), V(s) (M,)
        x = obs.float() / 255.0
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.network(x)
            value_hidden = hidden if self.value_network is None else self.value_network(x)
        policy = Categorical(logits=self.actor(hidden.float()))
        return policy, self.critic(value_hidden.float()).squeeze(-1)

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
            history.append(torch.stack([metric.detach() for metric in metrics.values()]))
        if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
            break
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
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    known = re.fullmatch(r"auto|cpu|(cuda|mps)(:\d+)?", name)
    require(known is not None, f"--device {name}: not auto, cpu, cuda, cuda:1 or mps")
    try:
        return torch.empty(0, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name}: {str(error).splitlines()[0]}") from None


def train(args: Args) -> float:
    """[PPO] algorithm 1; returns the mean return of the last 100 episodes."""
    device = resolve_device(args.device)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.manual_seed(args.seed)
    Distribution.set_default_validate_args(False)  # its checks cost as much as the distributions themselves
    with closing(Envs(args, args.num_envs, args.seed)) as envs, closing(Logger(args)) as logger:
        agent = Agent(envs.observation_space, envs.action_space, args.shared_network, args.precision).to(
            device
        )
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
