# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#     "box2d==2.3.10; python_version < '3.14' and platform_machine != 'aarch64'", "ale-py==0.12.1",
#     "opencv-python-headless==5.0.0.93", "moviepy==2.2.1", "tensorboard==2.21.0", "wandb==0.31.0",
#     "tyro==1.0.17", "pydantic==2.14.4",
# ]
# ///
"""Proximal Policy Optimization, clipped, for vector observations and Box or Discrete actions.

    python ppo_continuous.py --env-id HalfCheetah-v5

    ARGUMENTS     every option
    ENVIRONMENTS  all that is special about gymnasium
    AGENT         policy and value function
    PPO           rollout, advantages, losses, update
    TRAINING      the loop
    PLUMBING      evaluation, checkpoints, logging, torchrun, speed, command line

T steps in each of N environments make a batch of B = T·N transitions; a minibatch has M of them.

[PPO]  Schulman et al. 2017, Proximal Policy Optimization, https://arxiv.org/abs/1707.06347
[GAE]  Schulman et al. 2016, Generalized Advantage Estimation, https://arxiv.org/abs/1506.02438
[TIME] Pardo et al. 2018, Time Limits in Reinforcement Learning, https://arxiv.org/abs/1712.00378
[37]   Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/
"""

import copy
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from math import inf, isfinite, nan
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, flatdim, flatten
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, distributed, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes; each has a part of the environments
RANK = int(os.environ.get("RANK", 0))  # of this process, from 0 on; it has a part of N, B and M
FORMAT = "ppo_continuous, format 4"  # of checkpoints


# ---- ARGUMENTS -----------------------------------------------------------------------------------
@dataclass
class Args:
    # the run
    env_id: str = "HalfCheetah-v5"  # id of a gymnasium environment, also module:id
    seed: NonNegativeInt = 1  # of weights, actions, minibatches and environments
    total_timesteps: PositiveInt = 1_000_000  # of all environments, rounded down to rollouts
    target_return: float = 1e9  # stop once the mean return of 100 episodes reaches this; 1e9: never
    run_name: str | None = None  # a name in runs/, or a folder; default ENV__EXP__SEED__TIME
    exp_name: str = "ppo_continuous"  # part of the default run name
    resume: bool = False  # go on with RUN_NAME from its checkpoint, or start it where there is none
    evaluate: str | None = None  # only play: the name of a run, its folder or a checkpoint file
    # the algorithm; the numbers after the semicolons are usual values, not limits
    num_envs: PositiveInt = 8  # N, environments stepped together; 1 to 64
    num_steps: PositiveInt = 256  # T, steps of each environment per rollout; 32 to 2048
    learning_rate: NonNegativeFloat = 3e-4  # step size of Adam; 1e-4 to 1e-3
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: NonNegativeFloat = 0.99  # γ, discount factor; 0.95 to 0.999
    gae_lambda: NonNegativeFloat = 0.95  # λ: 0 trusts the critic, 1 the observed returns; 0.9 to 1
    num_minibatches: PositiveInt = 32  # minibatches per epoch; 4 to 64
    update_epochs: PositiveInt = 10  # passes over each batch; 3 to 10
    norm_adv: bool = True  # bring the advantages of a minibatch to mean 0, standard deviation 1
    clip_coef: NonNegativeFloat = 0.2  # ε, how far the probability ratio may move; 0.1 to 0.3
    clip_vloss: bool = True  # also clip the value, to ±ε around the old one
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus; 0 to 0.01
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss; 0.5 to 1
    max_grad_norm: PositiveFloat = 0.5  # longer gradients are scaled down to this norm; 0.5 to 5
    target_kl: PositiveFloat | None = None  # an approx_kl above this ends the epochs; 0.01 to 0.05
    # the machine
    device: str = "cpu"  # cpu, cuda, cuda:1 or mps
    compile: bool = True  # torch.compile the loss and its gradient, the slowest part
    torch_deterministic: bool = True  # only repeatable cuDNN algorithms
    async_envs: bool = False  # one process per environment: pays where a step takes over 1 ms
    # what is kept and shown
    checkpoint_interval: NonNegativeFloat = 5.0  # minutes; there is always one at the end
    track: bool = False  # also log to Weights & Biases, offline where nobody is logged in
    wandb_project_name: str = "ppo"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases
    capture_video: bool = False  # record an episode at each checkpoint, or those of --evaluate
    render: bool = False  # show the episodes of --evaluate in a window
    eval_episodes: PositiveInt = 10  # episodes of --evaluate
    deterministic: bool = False  # play the likeliest actions in --evaluate and videos

    batch_size = property(lambda self: self.num_envs * self.num_steps)  # B
    minibatch_size = property(lambda self: self.batch_size // self.num_minibatches)  # M
    num_iterations = property(lambda self: self.total_timesteps // self.batch_size)


# ---- ENVIRONMENTS --------------------------------------------------------------------------------
class Step(NamedTuple):  # of N environments; where an episode ended, the next one has begun
    obs: np.ndarray  # (N, *obs)
    rewards: np.ndarray  # (N,)
    terminations: np.ndarray  # (N,) bool: the new state is terminal
    dones: np.ndarray  # (N,) bool: the episode ended, by termination or by time limit
    final_obs: np.ndarray  # (N, *obs) s_{t+1}: where an episode ended, its last one


class Vectors(gym.Wrapper):  # to float vectors; without bounds, which may differ, and infos
    def __init__(self, env):
        super().__init__(env)
        self.observation_space = Box(-inf, inf, (flatdim(env.observation_space),))
        if isinstance(env.action_space, Box):
            self.action_space = Box(-inf, inf, env.action_space.shape)

    def reset(self, **options):
        return self.vector(self.env.reset(**options)[0]), {}

    def step(self, action):
        obs, *outcome, _ = self.env.step(action)
        return self.vector(obs), *outcome, {}

    def vector(self, obs):  # a copy: some environments write into what they have returned
        space = self.env.observation_space
        return np.array(obs if isinstance(space, Box) else flatten(space, obs), np.float32).ravel()


def make_env(env_id, **options):  # an id or a spec; to train and to play in
    with refusing(f"--env-id {env_id}", gym.error.Error, ModuleNotFoundError):
        env = gym.make(env_id, disable_env_checker=True, **options)
    obs, actions = env.observation_space, env.action_space
    fits = isinstance(actions, Box | Discrete) and obs and obs.is_np_flattenable
    wanted = "PPO here takes observations that flatten to a vector, and Box or Discrete actions"
    require(fits and flatdim(obs) * flatdim(actions) > 0, f"{wanted}, not {obs}, {actions}")
    if multiprocessing.current_process().daemon:  # of --async-envs: Ctrl-C is for the main process
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Vectors(gym.wrappers.PassiveEnvChecker(env))  # after the refusals, which it asserts


def to_space(actions, space):  # (N, *act); clips for the environment, the learner keeps its own
    if isinstance(space, Discrete):
        return (actions + space.start).astype(space.dtype)
    return actions.reshape(-1, *space.shape).clip(space.low, space.high).astype(space.dtype)


class Envs:  # N environments stepped together; where one ends, it begins again in the same step
    def __init__(self, args, seed):  # seed: [seed, step]; a resumed run has other episodes
        with closing(make_env(args.env_id)) as env:  # its spec: workers may not know ids
            self.observation_space, self.action_space = env.observation_space, env.action_space
            self.bounded_space, spec = env.env.action_space, gym.spec(env.unwrapped.spec.id)
        n = args.num_envs // WORLD_SIZE
        vectorize = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
        self.envs = vectorize([lambda: make_env(spec)] * n, copy=False, autoreset_mode="SameStep")
        seeds = np.random.SeedSequence(seed).generate_state(args.num_envs)[RANK * n :][:n]
        self.seeds = seeds.tolist()  # of this process
        self.returns, self.discounted_returns, self.lengths = np.zeros((3, n))  # of open episodes
        self.return_stats = np.zeros(3)  # number, sum, sum of squares of all discounted returns
        self.finished = []  # (global_step, environment, return, length) of each episode
        self.global_step = 0  # steps of all environments in all processes

    def reset(self):  # -> (N, *obs)
        obs, _ = self.envs.reset(seed=self.seeds)
        self.check_finite(observation=obs)
        return obs.copy()

    def step(self, actions):  # (N, *act)
        actions = to_space(actions, self.bounded_space)
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        final_obs, dones = obs.copy(), terminations | truncations
        if dones.any():
            final_obs[dones] = list(infos["final_obs"][dones])  # an array of arrays
        self.lengths += 1
        self.check_finite(observation=obs, last_observation=final_obs, reward=rewards)
        self.global_step += len(obs) * WORLD_SIZE
        self.returns += rewards
        for i in np.flatnonzero(dones):
            self.finished.append((self.global_step, i, self.returns[i], self.lengths[i]))
            self.returns[i] = self.lengths[i] = 0
        return Step(obs.copy(), rewards, terminations, dones, final_obs)

    def check_finite(self, **arrays):  # (N, …)
        for name, x in arrays.items():
            wrong = ~np.isfinite(x)
            if wrong.any():
                i = np.argwhere(wrong)[0, 0]
                raise Refusal(f"environment {i}, step {self.lengths[i]:.0f}: {name} is NaN or inf")

    def close(self):
        self.envs.close(terminate=sys.exception())  # true after a failure, when one may not answer

    def scale_rewards(self, rewards, dones, gamma):  # (T, N)
        """Divides rewards by the standard deviation of discounted returns, within ±10 [37]."""
        scaled = np.empty_like(rewards)
        for t in range(len(rewards)):
            x = self.discounted_returns * gamma + rewards[t]
            self.discounted_returns = x * (1.0 - dones[t])
            self.return_stats += len(x), x.sum(), (x**2).sum()
            count, total, squares = self.return_stats
            variance = max(squares / count - (total / count) ** 2, 0.0)
            scaled[t] = rewards[t] / (variance + 1e-8) ** 0.5
        all_mean(torch.from_numpy(self.return_stats))  # over processes, in place: a view
        return scaled.clip(-10.0, 10.0)


# ---- AGENT ---------------------------------------------------------------------------------------
def init(layer, gain=2**0.5):  # orthogonal weights and zero biases [37]
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class RunningMeanStd(nn.Module):  # normalises by all batches so far, merged as in Chan et al. 1983
    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.tensor(0.0))

    @torch.no_grad()
    def update(self, batch):  # (B, size), of this process
        mean = all_mean(batch.mean(0))
        var = all_mean((batch - mean).square().mean(0))
        number = len(batch) * WORLD_SIZE
        self.count += number  # in place, as all below: others hold these tensors
        delta, weight = mean - self.mean, number / self.count  # weight of this batch in all
        self.mean += delta * weight
        self.var += (var - self.var + delta.square() * (1.0 - weight)) * weight

    def forward(self, x):  # (…, size)
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10.0, 10.0)


def mlp(inputs, outputs, gain):
    hidden = [init(nn.Linear(inputs, 64)), nn.Tanh(), init(nn.Linear(64, 64)), nn.Tanh()]
    return nn.Sequential(*hidden, init(nn.Linear(64, outputs), gain))


class Agent(nn.Module):
    """Policy and value function: two networks over the same normalised observation."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        obs_size = flatdim(observation_space)
        self.discrete = isinstance(action_space, Discrete)
        self.act_size = flatdim(action_space)
        self.normalize = RunningMeanStd(obs_size)
        self.actor = mlp(obs_size, self.act_size, gain=0.01)  # at first nearly the same everywhere
        self.critic = mlp(obs_size, 1, gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(self.act_size))
        self.fast_policy = None  # for acting; found after the first rollout

    def policy(self, obs):  # (…, obs) -> logits and None, or means and log σ
        return self.actor(self.normalize(obs)), self.log_std

    def value(self, obs):  # (…, obs) -> V(s)
        return self.critic(self.normalize(obs)).squeeze(-1)

    def forward(self, obs):  # (…, obs) -> π(·|s), V(s)
        output, log_std = self.policy(obs)
        if self.discrete:
            return Categorical(logits=output), self.value(obs)
        return Independent(Normal(output, log_std.exp()), 1), self.value(obs)

    def noise(self, *shape):  # (*shape, act_size); from the CPU's generator, which is saved
        noise = torch.empty(*shape, self.act_size)
        return -noise.exponential_().log() if self.discrete else noise.normal_()  # Gumbel or normal

    def sample(self, output, log_std, noise):  # from π; argmax with Gumbel noise samples softmax
        return (output + noise).argmax(-1) if self.discrete else output + log_std.exp() * noise


# ---- PPO -----------------------------------------------------------------------------------------
class Rollout(NamedTuple):
    """One batch of experience; row t is (s_t, a_t) and what followed from it."""

    obs: Tensor  # (T, N, *obs)
    actions: Tensor  # (T, N, *act)
    logprobs: Tensor  # (T, N) log π_old(a_t | s_t)
    rewards: Tensor  # (T, N) learned from; the log has the true ones
    values: Tensor  # (T, N) V(s_t)
    next_values: Tensor  # (T, N) V(s_{t+1}); where a time limit cut, of the last observation
    terminations: Tensor  # (T, N) 1.0 where s_{t+1} is terminal: no value beyond
    dones: Tensor  # (T, N) 1.0 where the episode ended, by termination or by time limit
    advantages: Tensor  # (T, N)
    returns: Tensor  # (T, N) advantages + values: what the critic learns


@torch.no_grad()
def collect_rollout(agent, envs, obs, args):
    """Acts from `obs` (N, *obs) on; returns the Rollout and the observations that come next."""
    agent.eval()
    noise = agent.noise(args.num_steps, len(obs)).to(obs.device)
    all_obs, all_actions, steps = [], [], []
    act = agent.fast_policy or agent.policy  # the same in NumPy, once checked
    for t in range(args.num_steps):
        all_obs.append(obs)
        all_actions.append(agent.sample(*act(obs), noise[t]))
        steps.append(envs.step(all_actions[t].cpu().numpy()))
        obs = torch.from_numpy(steps[t].obs).to(obs.device)
    stacked = Step(*map(np.stack, zip(*steps)))  # (T, N, …) each
    rewards = envs.scale_rewards(stacked.rewards, stacked.dones, args.gamma)
    arrays = rewards, stacked.terminations, stacked.dones, stacked.final_obs  # to dtype of obs
    rewards, terminations, dones, final_obs = (torch.from_numpy(x).to(obs) for x in arrays)
    all_obs, actions = torch.stack(all_obs), torch.stack(all_actions)
    if agent.fast_policy != agent.policy:  # checked after each rollout until it disagrees
        agent.fast_policy = numpy_policy(agent, all_obs[::4])
    policy, values = agent(all_obs)  # all steps at once: acting needs no values and no log π
    next_values = agent.value(final_obs)  # where a time limit cut, the task went on [TIME]
    trajectory = rewards, values, next_values, terminations, dones  # in the order of Rollout
    advantages, returns = compute_gae(*trajectory, args.gamma, args.gae_lambda)
    logprobs = policy.log_prob(actions)
    return Rollout(all_obs, actions, logprobs, *trajectory, advantages, returns), obs


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages, [GAE] eq. 16, and returns, their sum with the values; all tensors (T, N)."""
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values
    decay = gamma * gae_lambda * (1.0 - dones)
    advantages, last = torch.empty_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + decay[t] * last
    return advantages, advantages + values


def policy_loss(logratio, advantages, clip_coef):  # (M,)
    """Clipped surrogate, [PPO] eq. 7, negated so that it is minimised."""
    ratio = logratio.exp()
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(value, old_value, returns, clip_coef):  # (M,); clip_coef None: without clipping
    """Half the squared error of V, or of V within ±ε of the old one where that is worse [37]."""
    error = (value - returns).square()
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * error.mean()


def minibatch_loss(agent, mb: Rollout, args):
    """[PPO] eq. 9, negated so that it is minimised, and what to log of it; all tensors (M, …)."""
    advantages = mb.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy, values = agent(mb.obs)
    logratio = policy.log_prob(mb.actions) - mb.logprobs
    pg_loss = policy_loss(logratio, advantages, args.clip_coef)
    v_loss = value_loss(values, mb.values, mb.returns, args.clip_coef if args.clip_vloss else None)
    entropy = policy.entropy().mean()
    ratio = logratio.exp()  # for the log only
    metrics = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy,
        "losses/old_approx_kl": -logratio.mean(),  # "k1" estimate of KL(π_old‖π_θ)
        "losses/approx_kl": (ratio - 1.0 - logratio).mean(),  # "k3": never negative, less noise
        "losses/clipfrac": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
    }
    return pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss, metrics


def minibatch_gradient(agent, batch, rows, args):  # one vector, clipped; compiled by train
    loss, metrics = minibatch_loss(agent, Rollout(*(x[rows] for x in batch)), args)
    trained = [p for p in agent.parameters() if p.requires_grad]  # in the order of the vector
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)  # 0 if unused
    gradient = all_mean(torch.cat([x.flatten() for x in gradients]))
    metrics["losses/grad_norm"] = norm = gradient.norm()
    gradient = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return gradient, {name: metric.detach() for name, metric in metrics.items()}


def update(agent, optimizer, rollout: Rollout, args, get_gradient=minibatch_gradient):
    """Learns from one rollout in epochs of minibatches; returns the means of what is logged."""
    agent.train()
    batch = Rollout(*(x.flatten(0, 1) for x in rollout))  # (B, …)
    vector, history = optimizer.param_groups[0]["params"][0], []  # all weights: see make_optimizer
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch.obs)).to(batch.obs.device)
        for rows in order.chunk(args.num_minibatches):
            vector.grad, metrics = get_gradient(agent, batch, rows, args)  # no backward()
            optimizer.step()
            history.append(torch.stack(list(metrics.values())))  # a copy: CUDA graphs reuse outputs
        if args.target_kl is not None and all_mean(metrics["losses/approx_kl"]) > args.target_kl:
            break  # approx_kl of the last minibatch, as in CleanRL
    agent.normalize.update(batch.obs)  # last: π_old and π_θ see the same; the first batch is raw
    means = dict(zip(metrics, all_mean(torch.stack(history).mean(0)).tolist()))
    unexplained = (batch.returns - batch.values).var() / (batch.returns.var() + 1e-8)
    means["losses/explained_variance"] = 1.0 - unexplained.item()
    return means


# ---- TRAINING ------------------------------------------------------------------------------------
def train(args):
    """[PPO] algorithm 1; returns the mean return of the last 100 episodes."""
    args, device = prepare(args)
    path = checkpoint_path(args)
    checkpoint = load_checkpoint(path) if args.resume and path.exists() else None
    envs = Envs(args, [args.seed, checkpoint["global_step"] if checkpoint else 0])
    with closing(envs):
        agent = Agent(envs.observation_space, envs.action_space).to(device)
        optimizer = make_optimizer(agent, args)  # Adam
        get_gradient = compiled(minibatch_gradient, args, device)
        with closing(Run(args, checkpoint, agent, optimizer, envs)) as run:  # loads checkpoint
            obs = torch.from_numpy(envs.reset()).to(device)
            while run.goes_on():
                progress = envs.global_step / (args.num_iterations * args.batch_size)
                lr = args.learning_rate * (1.0 - progress * args.anneal_lr)
                optimizer.param_groups[0]["lr"] = lr
                rollout, obs = collect_rollout(agent, envs, obs, args)
                metrics = update(agent, optimizer, rollout, args, get_gradient)
                run.end_iteration(metrics | {"charts/learning_rate": lr})
            run.save()
    say(f"return {run.mean_return:.2f}; tensorboard --logdir {run.folder}; --evaluate {run.folder}")
    if run.signals:
        raise KeyboardInterrupt(*run.signals)  # main() makes it the exit status
    return run.mean_return


# ==== PLUMBING: nothing below belongs to the algorithm ============================================
# ---- evaluation and video ------------------------------------------------------------------------
@torch.no_grad()
def evaluate(agent, args, videos=None, name="episode"):  # -> the return of each episode
    if videos and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo draws without a display, if told to
    options = {"render_mode": "rgb_array" if videos else "human"}
    env = make_env(args.env_id, **options if args.render or videos else {})
    space, agent = env.env.action_space, copy.deepcopy(agent).cpu().eval()
    if videos:
        env = gym.wrappers.RecordVideo(env, str(videos), lambda _: True, name_prefix=name)
    env = gym.wrappers.RecordEpisodeStatistics(env, args.eval_episodes)
    with closing(env), torch.random.fork_rng([]):  # random numbers of training go on as they were
        torch.manual_seed(args.seed)
        for i in range(args.eval_episodes):
            (obs, _), done = env.reset(seed=args.seed + i), False
            while not done:
                noise = agent.noise(1) * (not args.deterministic)  # 0: the likeliest
                action = agent.sample(*agent.policy(torch.from_numpy(obs[None])), noise).numpy()
                obs, _, terminated, truncated, _ = env.step(to_space(action, space)[0])
                done = terminated or truncated
    return [*map(float, env.return_queue)]


def evaluate_checkpoint(args):  # prints the score, and writes eval.json beside the checkpoint
    args, _ = prepare(replace(args, device="cpu"))
    path, env = checkpoint_path(args), make_env(args.env_id)
    checkpoint, agent = load_checkpoint(path), Agent(env.observation_space, env.action_space)
    env.close()
    restore({"agent": agent.state_dict()}, checkpoint)
    name = f"{path.stem}-step-{checkpoint['global_step']}"
    videos = path.parent / "../videos" if args.capture_video and not args.render else None
    returns = evaluate(agent, args, videos, name)
    print(f"{name}: return {np.mean(returns):.2f} ± {np.std(returns):.2f}, {len(returns)} episodes")
    path.with_name("eval.json").write_text(json.dumps({"args": asdict(args), "returns": returns}))


# ---- checkpoints, log, signals -------------------------------------------------------------------
def checkpoint_path(args):  # of a run, by name or folder; --evaluate may also name the file itself
    path = Path(args.evaluate or args.run_name or "")
    folder = path if len(path.parts) > 1 else "runs" / path
    return path if args.evaluate and path.is_file() else folder / "checkpoints" / "last.pt"


def load_checkpoint(path):  # as plain data: no file can make torch.load run code
    with refusing(f"{path} is no checkpoint of this script", Exception):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(checkpoint["format"] == FORMAT, f"it is of {checkpoint['format']}")
        checkpoint["args"] = Args(**checkpoint["args"])
    return checkpoint


def restore(own, saved):  # into `own`, tensors in place; refuses what does not fit
    for name, value in own.items():
        with refusing(f"{name} of the checkpoint does not fit", Exception):
            if isinstance(value, dict):
                restore(value, saved[name])
            elif isinstance(value, Tensor):
                require(saved[name].shape == value.shape, "another shape")
                value.copy_(saved[name])
            else:
                own[name] = type(value)(saved[name])


class Run:  # what is kept of a training: log, checkpoints, signals; only the first process writes
    mean_return = property(lambda self: float(np.mean(self.state["returns"] or nan)))

    def __init__(self, args, checkpoint, agent, optimizer, envs):
        self.args, self.agent, self.envs = args, agent, envs
        self.state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()["state"][0]}
        self.state |= {"return_stats": torch.from_numpy(envs.return_stats), "returns": []}
        self.state |= {"best": -inf, "global_step": 0, "csv_size": 0}
        self.state |= {"rng": torch.get_rng_state(), "wandb_id": os.urandom(4).hex()}
        if checkpoint:
            restore(self.state, checkpoint)  # into the tensors that are trained: state shares them
            torch.set_rng_state(self.state["rng"])
            envs.global_step = self.state["global_step"]
        self.state |= {"format": FORMAT, "args": asdict(args)}
        self.saved_at = time.monotonic()
        self.started, self.wandb, self.signals, self.handlers = None, None, [], {}
        self.path = checkpoint_path(args)
        self.folder = self.path.parents[1]
        if RANK:  # the same agent, but other actions and minibatches; it writes nothing
            torch.manual_seed(args.seed + envs.global_step + RANK)
            return
        with refusing(f"{self.folder} (--resume goes on with a run)", OSError):
            self.path.parent.mkdir(parents=True, exist_ok=args.resume)
            commit = os.popen(f"git describe --always --dirty 2>{os.devnull}").read()
            about = {"args": asdict(args), "torch": torch.__version__, "git": commit}
            (self.folder / "args.json").write_text(json.dumps(about, indent=2))
        self.writer = SummaryWriter(str(self.folder), purge_step=envs.global_step + 1)
        self.csv = open(self.folder / "episodes.csv", "a", buffering=1)  # line by line
        size = min(self.state["csv_size"], self.csv.tell())
        self.csv.truncate(size)  # what came after the checkpoint comes again
        self.csv.write("" if size else "global_step,wall_time,return,length\n")
        if args.track:
            self.start_wandb(args)

    def start_wandb(self, args):  # a run named as its folder; never a prompt
        with refusing("--track", Exception):
            import wandb

            mode = None if "WANDB_MODE" in os.environ or wandb.login(prompt=False) else "offline"
            if mode:
                say("W&B: this run is kept offline; wandb login before the next one")
            where = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            what = {"name": self.folder.name, "id": self.state["wandb_id"], "resume": "allow"}
            self.wandb = wandb.init(**where, **what, config=asdict(args), mode=mode)
            self.wandb.define_metric("*", "global_step")  # the axis of all charts

    def goes_on(self):
        solved = len(self.state["returns"]) == 100 and self.mean_return >= self.args.target_return
        done = self.envs.global_step + self.args.batch_size > self.args.total_timesteps
        return not (done or solved or gather(self.signals))

    def end_iteration(self, metrics):  # logs it, and saves it where it is time to
        bad = [name for name, value in metrics.items() if not isfinite(value)]
        require(not bad, f"{bad} became NaN or infinite; try a lower --learning-rate")
        for step, _, episodic_return, length in sorted(gather(self.envs.finished)):
            self.state["returns"] = [*self.state["returns"][-99:], float(episodic_return)]
            row = {"charts/episodic_return": episodic_return, "charts/episodic_length": length}
            self.log(step, row, f"{step},{time.time():.2f},{episodic_return},{length:.0f}\n")
        self.envs.finished.clear()
        now, step, speed = time.monotonic(), self.envs.global_step, nan
        if self.started:
            metrics["charts/SPS"] = speed = (step - self.started[1]) / (now - self.started[0])
        else:  # the first iteration compiles; from now on a signal ends the run after saving
            self.started, self.printed_at = (now, step), now
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note_signal)
        self.log(step, metrics)
        if now - self.printed_at > 5.0:
            self.printed_at = now
            say(f"step {step:,}: mean return {self.mean_return:.2f}, {speed:,.0f} steps/s")
        if now - self.saved_at > 60.0 * self.args.checkpoint_interval:
            self.save()

    def note_signal(self, number, _):  # the run ends after the iteration; a second Ctrl-C: at once
        if self.signals and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.signals.append(number)

    def log(self, step, scalars, csv_row=""):
        if RANK == 0:
            self.csv.write(csv_row)
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(scalars | {"global_step": step})

    def save(self):  # last.pt, best.pt if the mean return is the best at any save, and a video
        self.saved_at, step, mean = time.monotonic(), self.envs.global_step, self.mean_return
        if RANK:
            return
        self.writer.flush()  # first: no checkpoint is ahead of its log
        names = ["best.pt", "last.pt"] if mean > self.state["best"] else ["last.pt"]
        self.state |= {"best": max(self.state["best"], mean), "rng": torch.get_rng_state()}
        self.state |= {"csv_size": os.stat(self.csv.name).st_size, "global_step": step}
        for name in names:  # all of it or nothing: the old file stays until the new one is complete
            with refusing(f"{name} cannot be written, and stays as it was", OSError, RuntimeError):
                with open(self.path.with_name("new.pt"), "wb") as file:
                    torch.save(self.state, file)
                    os.fsync(file.fileno())
                os.replace(file.name, self.path.with_name(name))
        if self.wandb:
            self.wandb.log_model(self.path)
        if self.args.capture_video:
            try:
                args, videos = replace(self.args, eval_episodes=1), self.folder / "videos"
                (eval_return,) = evaluate(self.agent, args, videos, f"step-{step}")
                self.log(step, {"charts/eval_return": eval_return})
            except Exception as error:  # no ffmpeg, no display, …: training goes on
                say(f"no video: {error!r}")

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if RANK == 0:
            self.csv.close()
            self.writer.close()
        if self.wandb:
            self.wandb.finish(int(bool(sys.exception())))  # 1 after a failure


# ---- speed and torchrun --------------------------------------------------------------------------
def all_mean(x):  # over all processes, in place
    if WORLD_SIZE > 1:
        distributed.all_reduce(x)
        x /= WORLD_SIZE
    return x


def gather(items):  # of all processes, in order of rank
    lists = [items] * WORLD_SIZE  # to be overwritten
    if WORLD_SIZE > 1:
        distributed.all_gather_object(lists, items)
    return sum(lists, [])


def make_optimizer(agent, args):  # all parameters become views of one vector: faster to update
    trained = [p for p in agent.parameters() if p.requires_grad]
    vector = nn.Parameter(nn.utils.parameters_to_vector(trained))
    nn.utils.vector_to_parameters(vector, trained)
    optimizer = torch.optim.Adam([vector], lr=args.learning_rate, eps=1e-5, fused=True)
    vector.grad = torch.zeros_like(vector)
    optimizer.step()  # makes Adam's moments, which a checkpoint can be loaded into
    optimizer.state[vector]["step"].zero_()
    return optimizer


def compiled(function, args, device):  # as a CUDA graph on a GPU; uncompiled where that fails
    torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradient become one graph
    options = {"triton.cudagraphs": device.type == "cuda" and WORLD_SIZE == 1}
    fast = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def call(*inputs):
        nonlocal fast
        try:
            return fast(*inputs)
        except Exception as error:
            say(f"slower without torch.compile: {error!r}")
            fast = function
            return function(*inputs)

    return call if args.compile else function


def numpy_policy(agent, obs):  # agent.policy in NumPy, quicker to call; itself where they differ
    with suppress(Exception):  # the Agent may have been changed, or be on a GPU
        mean, var = agent.normalize.mean.numpy(), agent.normalize.var.numpy()
        parameters = [x.data.numpy() for x in agent.actor.parameters()]  # share memory

        def policy(obs):
            x = ((obs.numpy() - mean) / np.sqrt(var + 1e-8)).clip(-10.0, 10.0)
            for weight, bias in zip(parameters[::2], parameters[1::2]):
                output = x @ weight.T + bias
                x = np.tanh(output)
            return torch.from_numpy(output), agent.log_std

        torch.testing.assert_close(policy(obs), agent.policy(obs), rtol=1e-3, atol=1e-4)
        return policy
    say("acting in PyTorch; acting in NumPy is for tanh networks on a CPU")
    return agent.policy


# ---- command line --------------------------------------------------------------------------------
class Refusal(Exception):
    """What this script cannot do; main() prints it as one line and exits with status 2."""


def require(condition, message):
    if not condition:
        raise Refusal(message)


@contextmanager
def refusing(what, *errors):
    try:
        yield
    except errors as error:
        raise Refusal(f"{what}: {str(error) or repr(error)}") from None


def say(line, file=None):
    if not RANK or file:  # errors come from all processes
        with suppress(OSError):  # nobody reads any more, as when Ctrl-C has ended tee(1)
            print(" ".join(line.split())[:300], flush=True, file=file)


def prepare(args):  # refuses what cannot work, prepares torch; returns checked args, the device
    args = replace(args)  # checked as by its constructor: values may have been set since
    problems = {
        "minibatches must be of equal size": args.batch_size % (args.num_minibatches * WORLD_SIZE),
        "total_timesteps is less than num_envs x num_steps": not args.num_iterations,
        "gamma and gae_lambda must be at most 1": max(args.gamma, args.gae_lambda) > 1,
        "num_envs must be a multiple of the number of processes": args.num_envs % WORLD_SIZE,
        "norm_adv needs larger minibatches": args.norm_adv and args.minibatch_size < 2 * WORLD_SIZE,
        "resume needs the run_name to go on with": args.resume and not args.run_name,
    }
    for problem, found in problems.items():
        require(not found, problem)
    default = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.0f}"
    args.run_name = args.run_name or default.replace("/", "-").replace(":", "-")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    with refusing(f"--device {name}", Exception):  # no such device, or no driver
        device = torch.empty(0, device=name).device
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        store, *_ = next(distributed.rendezvous("env://"))  # a restart must not see the old keys
        store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        distributed.init_process_group(store=store, rank=RANK, world_size=WORLD_SIZE)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # more only slow such small layers down
    torch.backends.cudnn.deterministic = args.torch_deterministic
    Distribution.set_default_validate_args(False)  # its checks cost as much as the distributions
    return args, device


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch.compile may swallow a KeyboardInterrupt
    try:
        args, unknown = tyro.cli(Args, return_unknown_args=True)
        hint = "CleanRL's --cuda is --device, --save-model always on, --x False is --no-x"
        other = "--clip-coef is of ppo_continuous.py, ppo_atari.py, --kl-coef of ppo_kl_penalty.py"
        require(not unknown, f"unknown {unknown}, see --help; {hint}; {other}")
        path, before = checkpoint_path(args), Args()
        if args.evaluate is not None or (args.resume and path.exists()):
            before = replace(load_checkpoint(path)["args"], resume=False)
            say(f"{path}: arguments as they were, but {' '.join(sys.argv[1:])}")
        args = tyro.cli(Args, default=before)  # again, over the arguments of the checkpoint
        with refusing("the environment ended the process", SystemExit):  # sys.exit() in its code
            train(args) if args.evaluate is None else evaluate_checkpoint(args)
    except Refusal as refusal:
        say(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (*interrupt.args, signal.SIGINT)[0])  # of the signal, or of Ctrl-C


if __name__ == "__main__":
    main()
