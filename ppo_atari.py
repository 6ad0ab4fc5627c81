# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#     "box2d==2.3.10; python_version < '3.14' and platform_machine != 'aarch64'", "ale-py==0.12.1",
#     "opencv-python-headless==5.0.0.93", "moviepy==2.2.1", "tensorboard==2.21.0", "wandb==0.31.0",
#     "tyro==1.0.17", "pydantic==2.14.4",
# ]
# ///
"""Proximal Policy Optimization, clipped, for Atari games.

    python ppo_atari.py --env-id PongNoFrameskip-v4

    ARGUMENTS     every option
    ENVIRONMENTS  all that is special about the simulator
    AGENT         policy and value function
    PPO           rollout, advantages, losses, update
    TRAINING      the loop
    PLUMBING      evaluation, checkpoints, logging, torchrun, speed, command line

T steps in each of N environments make a batch of B = T·N transitions; a minibatch has M of them.

[PPO]  Schulman et al. 2017, Proximal Policy Optimization, https://arxiv.org/abs/1707.06347
[GAE]  Schulman et al. 2016, Generalized Advantage Estimation, https://arxiv.org/abs/1506.02438
[TIME] Pardo et al. 2018, Time Limits in Reinforcement Learning, https://arxiv.org/abs/1712.00378
[DQN]  Mnih et al. 2015, Human-level control, https://doi.org/10.1038/nature14236
[37]   Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/
"""

import copy
import importlib
import json
import os
import signal
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from math import inf, isfinite, nan
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py import Action, AtariEnv, AtariVectorEnv, roms
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TimeLimit
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, distributed, nn
from torch.distributions import Categorical, Distribution
from torch.utils.tensorboard import SummaryWriter

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes; each has a part of the environments
RANK = int(os.environ.get("RANK", 0))  # of this process, from 0 on; it has a part of N, B and M
FORMAT = "ppo_atari, format 4"  # of checkpoints


# ---- ARGUMENTS -----------------------------------------------------------------------------------
@dataclass
class Args:
    # the run
    env_id: str = "PongNoFrameskip-v4"  # any Atari game, also as Pong-v4, ALE/Pong-v5 or module:id
    seed: NonNegativeInt = 1  # of weights, actions, minibatches and environments
    total_timesteps: PositiveInt = 10_000_000  # agent steps of 4 frames, rounded down to rollouts
    target_return: float = 1e9  # stop once the mean return of 100 episodes reaches this; 1e9: never
    run_name: str | None = None  # a name in runs/, or a folder; default ENV__EXP__SEED__TIME
    exp_name: str = "ppo_atari"  # part of the default run name
    resume: bool = False  # go on with RUN_NAME from its checkpoint, or start it where there is none
    evaluate: str | None = None  # only play: the name of a run, its folder or a checkpoint file
    # the algorithm; the numbers after the semicolons are usual values, not limits
    num_envs: PositiveInt = 8  # N, environments stepped together; 1 to 64
    num_steps: PositiveInt = 128  # T, steps of each environment per rollout; 32 to 2048
    learning_rate: NonNegativeFloat = 2.5e-4  # step size of Adam; 1e-4 to 1e-3
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: NonNegativeFloat = 0.99  # γ, discount factor; 0.95 to 0.999
    gae_lambda: NonNegativeFloat = 0.95  # λ: 0 trusts the critic, 1 the observed returns; 0.9 to 1
    num_minibatches: PositiveInt = 4  # minibatches per epoch; 4 to 64
    update_epochs: PositiveInt = 4  # passes over each batch; 3 to 10
    norm_adv: bool = True  # bring the advantages of a minibatch to mean 0, standard deviation 1
    clip_coef: NonNegativeFloat = 0.1  # ε, how far the probability ratio may move; 0.1 to 0.3
    clip_vloss: bool = True  # also clip the value, to ±ε around the old one
    ent_coef: NonNegativeFloat = 0.01  # weight of the entropy bonus; 0 to 0.01
    anneal_ent: bool = False  # lower the entropy bonus linearly to 0, reached at half of the run
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss; 0.5 to 1
    max_grad_norm: PositiveFloat = 0.5  # longer gradients are scaled down to this norm; 0.5 to 5
    target_kl: PositiveFloat | None = None  # an approx_kl above this ends the epochs; 0.01 to 0.05
    channels: PositiveInt = 32  # of the first convolution, other layers in proportion; 16 or 32
    background: NonNegativeFloat = 0.0  # grey level subtracted from pictures; 87 in Pong
    shared_network: bool = True  # one network for policy and value, or one for each
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto is cuda where there is one, else cpu
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto: bf16 where it is fast
    compile: bool = True  # torch.compile, and CUDA graphs on a GPU
    torch_deterministic: bool = True  # only repeatable cuDNN algorithms
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
    rewards: np.ndarray  # (N,) signs of the game's
    terminations: np.ndarray  # (N,) bool: the new state is terminal
    dones: np.ndarray  # (N,) bool: the episode ended, by termination or by time limit
    final_obs: np.ndarray  # (N, *obs), valid only where a time limit cut


class Opening(gym.Wrapper):  # as AtariVectorEnv opens a game: FIRE if any, no-ops, up to 29 in all
    def reset(self, **options):
        result, game = self.env.reset(**options), self.unwrapped
        fire = "FIRE" in game.get_action_meanings()
        for action in [Action.FIRE] * fire + [Action.NOOP] * (game.np_random.integers(30) - fire):
            game.ale.act(action)
        return result  # AtariPreprocessing takes the picture itself


def make_env(env_id, render_mode=None):
    """One game to play and render; its observations are those of Envs, bit for bit."""
    options = game_options(env_id)
    skip, limit = options.pop("frameskip"), options.pop("max_num_frames_per_episode")
    env = AtariEnv(**options, frameskip=1, obs_type="grayscale", render_mode=render_mode)
    env.metadata = env.metadata | {"render_fps": 60 // skip}
    env = TimeLimit(Opening(env), limit)  # in frames, without those of the opening
    env = AtariPreprocessing(env, noop_max=0, frame_skip=skip)
    return FrameStackObservation(env, 4, padding_type="zero")


class Envs:
    """N games in C++ threads; observations are the last 4 pictures, grey, 84x84 [DQN].

    A picture is the maximum of two frames; games begin as in Opening: AtariVectorEnv's defaults.
    Rewards become their sign, and a lost life is terminal to the learner; game and score go on.
    """

    def __init__(self, args, seed):  # seed: [seed, step]; a resumed run has other episodes
        n, cores = args.num_envs // WORLD_SIZE, (os.cpu_count() or 1) // WORLD_SIZE
        options = game_options(args.env_id) | {"num_threads": max(1, min(n, cores))}
        options |= {"autoreset_mode": "SameStep", "life_loss_info": True, "reward_clipping": False}
        self.envs = AtariVectorEnv(num_envs=n, **options)
        self.close = self.envs.close
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        seeds = np.random.SeedSequence(seed).generate_state(args.num_envs)[RANK * n :][:n]
        self.seeds = (seeds % 2**31).astype(int)  # of this process
        self.returns, self.lengths = np.zeros((2, n))  # of the games so far
        self.finished = []  # (global_step, environment, return, length) of each game
        self.global_step = 0  # steps of all environments in all processes

    def reset(self):  # -> (N, 4, 84, 84)
        obs, infos = self.envs.reset(seed=self.seeds)
        self.frames = infos["episode_frame_number"]
        return obs

    def step(self, actions):  # (N,)
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        self.global_step += len(obs) * WORLD_SIZE
        self.returns += rewards
        self.lengths += 1
        # a lost life terminates as well, but only a new game counts its frames from the start
        before, self.frames = self.frames, infos["episode_frame_number"]
        for i in np.flatnonzero(truncations | (terminations & (self.frames < before))):
            self.finished.append((self.global_step, i, self.returns[i], self.lengths[i]))
            self.returns[i] = self.lengths[i] = 0
        dones = terminations | truncations
        return Step(obs, np.sign(rewards), terminations, dones, infos.get("final_obs", obs))


# ---- AGENT ---------------------------------------------------------------------------------------
def init(layer, gain=2**0.5):  # orthogonal weights and zero biases [37]
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def nature_cnn(observation_space, c=32):  # (M, 4, 84, 84) -> (M, 16c)
    """The convolutional network of [DQN], where c is 32."""
    frames, *_ = observation_space.shape
    layers = [init(nn.Conv2d(frames, c, 8, stride=4)), nn.ReLU()]  # (M, c, 20, 20)
    layers += [init(nn.Conv2d(c, 2 * c, 4, stride=2)), nn.ReLU()]  # (M, 2c, 9, 9)
    layers += [init(nn.Conv2d(2 * c, 2 * c, 3)), nn.ReLU(), nn.Flatten()]  # (M, 2c * 7 * 7)
    with torch.no_grad():  # so that pictures of other sizes fit as well
        size = nn.Sequential(*layers)(torch.zeros(1, *observation_space.shape)).shape[1]
    return nn.Sequential(*layers, init(nn.Linear(size, 16 * c)), nn.ReLU())


class Agent(nn.Module):
    """Policy and value function: two heads on one convolutional network, or on one each."""

    def __init__(
        self,
        observation_space,
        action_space,
        channels=32,
        shared_network=True,
        bf16=False,
        background=0.0,
    ):
        super().__init__()
        self.background = background
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # of nature_cnn; weights stay fp32
        self.network = nature_cnn(observation_space, channels)
        self.value_network = None if shared_network else nature_cnn(observation_space, channels)
        features, actions = 16 * channels, int(action_space.n)
        self.actor = init(nn.Linear(features, actions), gain=0.01)  # nearly uniform at first
        self.critic = init(nn.Linear(features, 1), gain=1.0)

    def value(self, obs):  # (M, *obs) -> V(s) (M,)
        return self(obs)[1]

    def forward(self, obs):  # uint8 (M, *obs) -> π(·|s), V(s) (M,)
        # channels last is faster on CPUs; not tried on mps
        layout = torch.contiguous_format if obs.device.type == "mps" else torch.channels_last
        x = ((obs.to(self.dtype) - self.background) / 255.0).contiguous(memory_format=layout)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.network(x)
            value_hidden = hidden if self.value_network is None else self.value_network(x)
        policy = Categorical(logits=self.actor(hidden.float()))
        return policy, self.critic(value_hidden.float()).squeeze(-1)

    def noise(self, *shape):  # Gumbel, (*shape, actions); from the CPU's generator, which is saved
        return -torch.empty(*shape, self.actor.out_features).exponential_().log()

    def act(self, obs, noise):  # actions (N,), their log-probabilities and V(s)
        policy, values = self(obs)
        actions = (policy.logits + noise).argmax(-1)  # samples: the Gumbel-max trick
        return actions, policy.log_prob(actions), values


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
def collect_rollout(agent, envs, obs, args, act=Agent.act):
    """Acts from `obs` (N, *obs) on; returns the Rollout and the observations that come next."""
    agent.eval()
    (num_envs, *size), device = obs.shape, obs.device
    noise = agent.noise(args.num_steps, num_envs).to(device)
    shape = args.num_steps * num_envs, *size  # (B, *obs); channels last: see Agent.forward
    flat = torch.empty(shape, dtype=obs.dtype, device=device, memory_format=torch.channels_last)
    all_obs = flat.unflatten(0, (args.num_steps, num_envs))
    acted, steps, final_values = [], [], {}
    for t in range(args.num_steps):
        all_obs[t] = obs
        # copies, since a CUDA graph writes its next outputs over these
        acted.append([x.clone() for x in act(agent, all_obs[t], noise[t])])
        step = envs.step(acted[t][0].cpu().numpy())
        steps.append((step.rewards, step.terminations, step.dones))
        if (step.dones & ~step.terminations).any():  # a time limit is no end of the task [TIME]
            final_values[t] = agent.value(torch.from_numpy(step.final_obs).to(device))
        obs = torch.from_numpy(step.obs).to(device)
    actions, logprobs, values = (torch.stack(x) for x in zip(*acted))
    steps = torch.from_numpy(np.array(steps, dtype=np.float32)).to(device)  # (T, 3, N)
    rewards, terminations, dones = steps.unbind(1)
    next_values = torch.cat([values[1:], agent.value(obs)[None]])
    for t, value in final_values.items():  # only where a time limit cut
        next_values[t] = torch.where(dones[t] > terminations[t], value, next_values[t])
    trajectory = rewards, values, next_values, terminations, dones  # in the order of Rollout
    advantages, returns = compute_gae(*trajectory, args.gamma, args.gae_lambda)
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


def minibatch_loss(agent, mb: Rollout, ent_coef, args):
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
    return pg_loss - ent_coef * entropy + args.vf_coef * v_loss, metrics


def minibatch_gradient(agent, batch, rows, ent_coef, args):  # a vector, clipped; compiled by train
    loss, metrics = minibatch_loss(agent, Rollout(*(x[rows] for x in batch)), ent_coef, args)
    trained = [p for p in agent.parameters() if p.requires_grad]  # in the order of the vector
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)  # 0 if unused
    gradient = all_mean(torch.cat([x.flatten() for x in gradients]))
    metrics["losses/grad_norm"] = norm = gradient.norm()
    gradient = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return gradient, {name: metric.detach() for name, metric in metrics.items()}


def update(agent, optimizer, rollout: Rollout, ent_coef, args, get_gradient=minibatch_gradient):
    """Learns from one rollout in epochs of minibatches; returns the means of what is logged."""
    agent.train()
    batch = Rollout(*(x.flatten(0, 1) for x in rollout))  # (B, …)
    coef = torch.tensor(ent_coef, device=batch.obs.device)  # a float would be compiled in
    vector, history = optimizer.param_groups[0]["params"][0], []  # all weights: see make_optimizer
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch.obs)).to(batch.obs.device)
        for rows in order.chunk(args.num_minibatches):
            vector.grad, metrics = get_gradient(agent, batch, rows, coef, args)  # no backward()
            optimizer.step()
            history.append(torch.stack(list(metrics.values())))  # a copy: CUDA graphs reuse outputs
        if args.target_kl is not None and all_mean(metrics["losses/approx_kl"]) > args.target_kl:
            break  # approx_kl of the last minibatch, as in CleanRL
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
        spaces = envs.observation_space, envs.action_space
        bf16 = wants_bf16(args, device)
        agent = Agent(*spaces, args.channels, args.shared_network, bf16, args.background).to(device)
        optimizer = make_optimizer(agent, args)  # Adam
        act = compiled(Agent.act, args, device)
        get_gradient = compiled(minibatch_gradient, args, device)
        with closing(Run(args, checkpoint, agent, optimizer, envs)) as run:  # loads checkpoint
            obs = torch.from_numpy(envs.reset()).to(device)
            while run.goes_on():
                progress = envs.global_step / (args.num_iterations * args.batch_size)
                lr = args.learning_rate * (1.0 - progress * args.anneal_lr)
                optimizer.param_groups[0]["lr"] = lr
                ent_coef = args.ent_coef * max(0.0, 1.0 - 2.0 * progress * args.anneal_ent)
                rollout, obs = collect_rollout(agent, envs, obs, args, act)
                metrics = update(agent, optimizer, rollout, ent_coef, args, get_gradient)
                run.end_iteration(metrics | {"charts/learning_rate": lr})
            run.save()
    say(f"return {run.mean_return:.2f}; tensorboard --logdir {run.folder}; --evaluate {run.folder}")
    if run.signals:
        raise KeyboardInterrupt(*run.signals)  # main() makes it the exit status
    return run.mean_return


# ==== PLUMBING: nothing below belongs to the algorithm ============================================
# ---- evaluation and video ------------------------------------------------------------------------
@torch.no_grad()
def evaluate(agent, args, videos=None, name="episode"):  # -> the game's score of each episode
    options = {"render_mode": "rgb_array" if videos else "human"}
    env = make_env(args.env_id, **options if args.render or videos else {})
    agent = copy.deepcopy(agent).cpu().eval()
    if videos:
        env = gym.wrappers.RecordVideo(env, str(videos), lambda _: True, name_prefix=name)
    env = gym.wrappers.RecordEpisodeStatistics(env, args.eval_episodes)
    with closing(env), torch.random.fork_rng([]):  # random numbers of training go on as they were
        torch.manual_seed(args.seed)
        for i in range(args.eval_episodes):
            (obs, _), done = env.reset(seed=args.seed + i), False
            while not done:
                noise = agent.noise(1) * (not args.deterministic)  # 0: the likeliest
                action, *_ = agent.act(torch.from_numpy(obs[None]), noise)
                obs, _, terminated, truncated, _ = env.step(action.item())
                done = terminated or truncated
    return [*map(float, env.return_queue)]


def evaluate_checkpoint(args):  # prints the score, and writes eval.json beside the checkpoint
    args, device = prepare(replace(args, device="cpu"))
    path, env = checkpoint_path(args), make_env(args.env_id)
    checkpoint, spaces = load_checkpoint(path), (env.observation_space, env.action_space)
    env.close()
    bf16 = wants_bf16(args, device)
    agent = Agent(*spaces, args.channels, args.shared_network, bf16, args.background)
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
        self.state |= {"returns": [], "best": -inf, "global_step": 0, "csv_size": 0}
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
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    name = auto if args.device == "auto" else args.device
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    with refusing(f"--device {name}", Exception):  # no such device, or no driver
        device = torch.empty(0, device=name).device
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        store, *_ = next(distributed.rendezvous("env://"))  # a restart must not see the old keys
        store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        distributed.init_process_group(store=store, rank=RANK, world_size=WORLD_SIZE)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.deterministic = args.torch_deterministic
    Distribution.set_default_validate_args(False)  # its checks cost as much as the distributions
    return args, device


def wants_bf16(args, device):  # auto: where matrix products are faster with it
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        units = torch.cpu.get_capabilities()
        fast = bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    return args.precision == "bf16" or (args.precision == "auto" and fast)


def game_options(env_id):  # what an id says, as arguments of AtariVectorEnv, or a refusal
    module, _, name = env_id.rpartition(":")
    with refusing(f"--env-id {env_id}", gym.error.Error, ModuleNotFoundError):
        if module:  # registers its ids when it is imported, as in gymnasium
            importlib.import_module(module)
        dropped = name not in gym.registry and "Deterministic-v" in name  # no longer in ale-py
        spec = gym.spec(name.replace("Deterministic", "") if dropped else name)
    plain = spec.entry_point in ("ale_py.env:AtariEnv", "ale_py:AtariEnv", AtariEnv)
    game = spec.kwargs.get("game")
    wrong = f"--env-id {env_id}: {spec.entry_point}, game {game!r}, is no plain game of ale-py"
    require(plain and game in roms.get_all_rom_ids() and not spec.additional_wrappers, wrong)
    options = {"game": game, "frameskip": 4, "repeat_action_probability": 0.25}  # as in AtariEnv
    options |= {"full_action_space": False, "max_num_frames_per_episode": None}
    usual = (None, 0, "rgb", "grayscale", 0.5)  # defaults, of mode, obs_type and the like
    odd = {k: v for k, v in spec.kwargs.items() if k not in options and v not in usual}
    require(not odd, f"--env-id {env_id}: ppo_atari.py cannot do {odd}")
    options |= {k: v for k, v in spec.kwargs.items() if k in options}
    skip, limit = options["frameskip"], options["max_num_frames_per_episode"] or 108_000
    # 1 or random becomes 4, as usual; in gym's SpaceInvadersDeterministic it was 3
    if skip == 1 or isinstance(skip, tuple):
        options["frameskip"] = 3 if dropped and game == "space_invaders" else 4
    if spec.max_episode_steps is not None:
        limit = min(limit, spec.max_episode_steps * (1 if skip == 1 else options["frameskip"]))
    return options | {"max_num_frames_per_episode": limit}


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
