"""What an implementation detail is worth: trains with one of them switched off.

    python benchmark/details.py --detail no-reward-scaling --env-id Hopper-v5
    python benchmark/run.py details

Each change is made to the imported script; all other flags are the script's own. What one is worth
is in docs/details.md, by benchmark/plot.py.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_atari
import ppo_continuous as ppo


def no_observation_normalization() -> None:
    ppo.RunningMeanStd.update = lambda self, batch: None
    ppo.RunningMeanStd.forward = lambda self, x: x


def statistics_at_every_step() -> None:
    """As gymnasium's NormalizeObservation: what is stored is normalised already."""
    update, normalize = ppo.RunningMeanStd.update, ppo.RunningMeanStd.forward
    init, reset, step = ppo.Agent.__init__, ppo.Envs.reset, ppo.Envs.step
    statistics = []  # the agent's, since those are saved and loaded

    def new_init(agent, *spaces):
        init(agent, *spaces)
        statistics.append(agent.normalize)

    def normalized(obs):
        return normalize(statistics[0], torch.from_numpy(obs)).numpy()

    def new_reset(envs):
        obs = reset(envs)
        update(statistics[0], torch.from_numpy(obs))
        return normalized(obs)

    def new_step(envs, actions):
        new = step(envs, actions)
        update(statistics[0], torch.from_numpy(new.obs))
        return new._replace(obs=normalized(new.obs), final_obs=normalized(new.final_obs))

    no_observation_normalization()
    ppo.Agent.__init__, ppo.Envs.reset, ppo.Envs.step = new_init, new_reset, new_step


def no_reward_scaling() -> None:
    ppo.Envs.scale_rewards = lambda self, rewards, dones, gamma: rewards


def time_limits_terminal() -> None:
    step = ppo.Envs.step

    def new_step(envs, actions):
        new = step(envs, actions)
        return new._replace(terminations=new.dones)

    ppo.Envs.step = new_step


def dummy_rows() -> None:
    """As under gymnasium's NEXT_STEP: a step that resets, with no reward, which is learned from."""

    class NextStep(ppo.gym.vector.SyncVectorEnv):
        def __init__(self, makers, copy, autoreset_mode):
            super().__init__(makers, copy=copy, autoreset_mode="NextStep")

        def step(self, actions):
            obs, *outcome, _ = super().step(actions)
            return obs, *outcome, {"final_obs": obs}  # the last one of an episode is returned

    ppo.gym.vector.SyncVectorEnv = NextStep


def default_initialization() -> None:
    ppo.init = lambda layer, gain=1.0: layer


def last_layer_gain_1() -> None:
    mlp = ppo.mlp
    ppo.mlp = lambda inputs, outputs, gain: mlp(inputs, outputs, gain=1.0)


def advantages_per_batch() -> None:
    collect_rollout = ppo.collect_rollout

    def new_collect_rollout(*inputs):
        rollout, obs = collect_rollout(*inputs)
        x = rollout.advantages
        return rollout._replace(advantages=(x - x.mean()) / (x.std() + 1e-8)), obs

    ppo.collect_rollout = new_collect_rollout


def adam_eps_1e_8() -> None:
    make_optimizer = ppo.make_optimizer

    def new_make_optimizer(*inputs):
        optimizer = make_optimizer(*inputs)
        optimizer.param_groups[0]["eps"] = 1e-8
        return optimizer

    ppo.make_optimizer = new_make_optimizer


def clipped_actions_stored() -> None:
    sample = ppo.Agent.sample
    ppo.Agent.sample = lambda *inputs: sample(*inputs).clamp(-1.0, 1.0)  # bounds of the four tasks


def state_dependent_std() -> None:
    class Agent(ppo.Agent):
        def __init__(self, observation_space, action_space):
            super().__init__(observation_space, action_space)
            size = ppo.flatdim(observation_space)
            self.actor, self.log_std = ppo.mlp(size, 2 * self.act_size, gain=0.01), None

        def policy(self, obs):
            return self.actor(self.normalize(obs)).chunk(2, -1)  # means and logs of deviations

    ppo.Agent = Agent


def shared_trunk() -> None:
    class Agent(ppo.Agent):
        def __init__(self, observation_space, action_space):
            super().__init__(observation_space, action_space)
            self.actor, self.critic, self.trunk = self.actor[-1], self.critic[-1], self.actor[:-1]

        def policy(self, obs):
            return self.actor(self.trunk(self.normalize(obs))), self.log_std

        def value(self, obs):
            return self.critic(self.trunk(self.normalize(obs))).squeeze(-1)

    ppo.Agent = Agent


def relu() -> None:
    ppo.nn.Tanh = nn.ReLU


def atari_options(**options) -> None:
    class Games(ppo_atari.AtariVectorEnv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | options)

    ppo_atari.AtariVectorEnv = Games


def rewards_as_they_are() -> None:
    step = ppo_atari.Envs.step

    def new_step(envs, actions):
        before = envs.returns.copy()
        finished = len(envs.finished)
        new = step(envs, actions)
        ended = new.dones & (envs.lengths == 0)  # whose returns were moved to `finished`
        rewards = envs.returns - before
        rewards[ended] += [score for *_, score, _ in envs.finished[finished:]]
        return new._replace(rewards=rewards)

    ppo_atari.Envs.step = new_step


DETAIL_TASKS = ("HalfCheetah", "Hopper", "Walker2d", "Ant")  # of version 5


@dataclass(frozen=True)
class Detail:
    number: int | str  # in docs/details.md
    instead: str  # of it
    flags: str = ""
    change: Callable[[], None] = lambda: None
    game: str = "Pong"  # in Atari, one in which it can be seen


DETAILS = {
    "no-observation-normalization": Detail(
        "3, 4", "observations as they are", "", no_observation_normalization
    ),
    "statistics-at-every-step": Detail(3, "updated at every step", "", statistics_at_every_step),
    "no-reward-scaling": Detail(5, "rewards as they are", "", no_reward_scaling),
    "no-reward-scaling-no-value-clipping": Detail(
        "5, 22", "both rewards and value loss as they are", "--no-clip-vloss", no_reward_scaling
    ),
    "time-limits-terminal": Detail(1, "time limits are terminal", "", time_limits_terminal),
    "dummy-rows": Detail(2, "steps that reset are learned from", "", dummy_rows),
    "one-environment": Detail(7, "1 × 2048", "--num-envs 1 --num-steps 2048"),
    "clipped-actions-stored": Detail(8, "clipped before stored", "", clipped_actions_stored),
    "state-dependent-std": Detail(9, "deviation depends on the state", "", state_dependent_std),
    "shared-trunk": Detail(10, "one network with two heads", "", shared_trunk),
    "relu": Detail(10, "ReLU", "", relu),
    "default-initialization": Detail(
        16, "PyTorch's initialisation of all layers", "", default_initialization
    ),
    "last-layer-gain-1": Detail(16, "gain 1 of policy's last layer", "", last_layer_gain_1),
    "adam-eps-1e-8": Detail(17, "Adam's ε 1e-8", "", adam_eps_1e_8),
    "constant-learning-rate": Detail(17, "constant learning rate", "--no-anneal-lr"),
    "no-advantage-normalization": Detail(20, "advantages as they are", "--no-norm-adv"),
    "advantages-per-batch": Detail(
        20, "normalised per batch", "--no-norm-adv", advantages_per_batch
    ),
    "no-value-clipping": Detail(22, "value loss not clipped", "--no-clip-vloss"),
    "no-gradient-clipping": Detail(24, "gradient not clipped", "--max-grad-norm 1e9"),
}
ATARI_DETAILS = {
    "no-life-loss": Detail(
        14,
        "a lost life is nothing special",
        "",
        lambda: atari_options(life_loss_info=False),
        "Breakout",
    ),
    "rewards-as-they-are": Detail(6, "rewards as they are", "", rewards_as_they_are, "Breakout"),
    "two-epochs": Detail(19, "two epochs instead of four", "--update-epochs 2"),
    "no-maximum-over-frames": Detail(
        12, "the last frame alone", "", lambda: atari_options(maxpool=False), "SpaceInvaders"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--detail", required=True, choices=DETAILS | ATARI_DETAILS)
    options, sys.argv[1:] = parser.parse_known_args()
    (DETAILS | ATARI_DETAILS)[options.detail].change()
    (ppo if options.detail in DETAILS else ppo_atari).main()


if __name__ == "__main__":
    main()
