"""Advantages, losses, rollouts and updates of each script, against independent definitions."""

import copy
from functools import partial
from math import inf, nextafter
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.utils._pytree import tree_map

import ppo_atari
import ppo_continuous
import ppo_kl_penalty


class Case(NamedTuple):  # a script on one kind of observations and actions
    script: ModuleType
    observation_space: Box
    action_space: Box | Discrete

    def args(self, **changes):  # 32 transitions; without those that this script does not know
        small = {"num_envs": 4, "num_steps": 8, "num_minibatches": 4, "update_epochs": 2}
        small |= {"total_timesteps": 64, "device": "cpu", "precision": "fp32"} | changes
        known = self.script.Args.__dataclass_fields__
        return self.script.Args(**{name: x for name, x in small.items() if name in known})

    def random_obs(self, *shape):  # vectors far from mean 0 and deviation 1
        if self.script is ppo_atari:
            return torch.randint(256, (*shape, *self.observation_space.shape), dtype=torch.uint8)
        return torch.randn(*shape, 3) * torch.tensor([0.5, 1.0, 3.0]) + torch.tensor([2.0, 0, -1])

    def agent(self):  # unlike that of a fresh agent, its policy clearly depends on the state
        torch.manual_seed(0)
        agent = self.script.Agent(self.observation_space, self.action_space)
        last = agent.actor if self.script is ppo_atari else agent.actor[-1]
        last.weight.data *= 200.0
        last.bias.data.copy_(torch.linspace(1.0, -1.0, len(last.bias)))
        if isinstance(self.action_space, Box):
            agent.log_std.data.copy_(torch.tensor([-0.7, 0.4]))
        if self.script is not ppo_atari:
            agent.normalize.update(self.random_obs(50))
        return agent

    def rollout(self, agent, args, seed=0):
        torch.manual_seed(seed)
        envs = FakeEnvs(self, args, seed)
        return self.script.collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)[0]


class FakeEnvs:  # in place of Envs: random, whatever one does, with ends of both kinds
    def __init__(self, case, args, seed):
        self.case, self.args, self.random = case, args, np.random.default_rng(seed)
        self.observation_space, self.action_space = case.observation_space, case.action_space
        self.close, self.finished, self.return_stats = lambda: None, [], np.zeros(3)
        self.global_step, self.shown, self.taken, self.steps = 0, [], [], []

    def observe(self):
        return self.case.random_obs(self.args.num_envs).numpy()

    def reset(self):
        self.shown.append(self.observe())
        return self.shown[-1]

    def step(self, actions):
        n, obs, final_obs = self.args.num_envs, self.observe(), self.observe()
        dones, terminal = self.random.random((2, n)) < 0.4
        if self.case.script is not ppo_atari:  # there it is valid at a time limit only
            final_obs[~dones] = obs[~dones]
        rewards = self.random.standard_normal(n)
        self.steps.append(self.case.script.Step(obs, rewards, dones & terminal, dones, final_obs))
        self.shown.append(obs)
        self.taken.append(actions)
        self.global_step += n
        return self.steps[-1]

    def scale_rewards(self, rewards, dones, gamma):
        return rewards / 2.0


VECTORS, CONTROLS = Box(-inf, inf, (3,)), Box(-1.0, 1.0, (2,))
CASES = {
    "atari": Case(ppo_atari, Box(0, 255, (3, 44, 36), np.uint8), Discrete(3)),  # not Atari's 84x84
    "box": Case(ppo_continuous, VECTORS, CONTROLS),
    "discrete": Case(ppo_continuous, VECTORS, Discrete(3)),
    "kl-box": Case(ppo_kl_penalty, VECTORS, CONTROLS),
    "kl-discrete": Case(ppo_kl_penalty, VECTORS, Discrete(3)),
}


def over(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


over_cases, over_scripts = over(*CASES), over("atari", "box", "kl-box")


def replayed(function):  # like a CUDA graph: it returns the same memory each time
    memory = []

    def call(*inputs):
        results = function(*inputs)
        memory[:] = memory or [results]
        tree_map(lambda old, new: old.copy_(new), memory[0], results)
        return memory[0]

    return call


def vector(agent):
    return nn.utils.parameters_to_vector(agent.parameters()).detach()


close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


# γ = λ = 1/2, rewards 1, 2, 3, values 4, 5, 6; of each case V(s_{t+1}), terminations, dones, A
HAND_COMPUTED = [  # each in an environment of its own: they do not mix
    # goes on: δ = 1 + 5/2 − 4, 2 + 6/2 − 5, 3 + 8/2 − 6 = −1/2, 0, 1; A1 = 1/4, A0 = −1/2 + 1/16
    ([5, 6, 8], [0, 0, 0], [0, 0, 0], [-0.4375, 0.25, 1]),
    # terminal: δ1 = 2 − 5 = −3 without the value beyond, A1 = −3, A0 = −1/2 − 3/4
    ([5, 6, 8], [0, 1, 0], [0, 1, 0], [-1.25, -3, 1]),
    # time limit, V(final observation) = 10: δ1 = 2 + 10/2 − 5 = 2, A1 = 2, A0 = −1/2 + 2/4
    ([5, 10, 8], [0, 0, 0], [0, 1, 0], [0, 2, 1]),
]


@over_scripts
def test_gae_by_hand(case):
    columns = [torch.tensor(x, dtype=torch.float32).T for x in zip(*HAND_COMPUTED)]
    next_values, terminations, dones, expected = columns
    rewards, values = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[..., None].expand(2, 3, 3)
    outcome = rewards, values, next_values, terminations, dones
    advantages, returns = case.script.compute_gae(*outcome, 0.5, 0.5)
    assert torch.equal(advantages, expected)  # all numbers are exact in binary
    assert torch.equal(returns, expected + values)


@over_scripts
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.9), (0.9, 0.0), (0.8, 1.0)])
def test_gae_is_that_of_its_definition(case, gamma, gae_lambda):
    """A_t = Σ (γλ)^(k − t) δ_k up to the end of the episode or of the rollout."""
    random, expected = np.random.default_rng(0), np.zeros((12, 5))
    rewards, values, next_values = random.standard_normal((3, 12, 5))
    dones, coins = random.random((2, 12, 5)) < 0.4
    for t, n in np.ndindex(12, 5):
        for k in range(t, 12):
            beyond = 0.0 if dones[k, n] and coins[k, n] else gamma * next_values[k, n]
            delta = rewards[k, n] + beyond - values[k, n]
            expected[t, n] += (gamma * gae_lambda) ** (k - t) * delta
            if dones[k, n]:
                break
    outcome = [torch.tensor(x * 1.0) for x in (rewards, values, next_values, dones & coins, dones)]
    advantages, returns = case.script.compute_gae(*outcome, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected + values, atol=1e-12)


@over_cases
def test_a_rollout_is_what_the_agent_did_and_saw(case):
    agent, args = case.agent(), case.args(gamma=0.9, gae_lambda=0.8, num_steps=16)
    envs, act = FakeEnvs(case, args, 0), [replayed(ppo_atari.Agent.act)]
    act, scale = (act, 1.0) if case.script is ppo_atari else ([], 0.5)
    first = torch.from_numpy(envs.reset())
    rollout, last = case.script.collect_rollout(agent, envs, first, args, *act)
    assert torch.equal(torch.cat([rollout.obs, last[None]]), torch.from_numpy(np.stack(envs.shown)))
    if case.script is ppo_atari:  # or each minibatch rearranges what it takes
        assert rollout.obs.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(rollout.actions, np.stack(envs.taken))
    _, rewards, terminal, dones, final_obs = (np.stack(x) for x in zip(*envs.steps))
    close(rollout.rewards, torch.tensor(scale * rewards, dtype=torch.float32))
    assert np.array_equal(rollout.terminations, terminal) and np.array_equal(rollout.dones, dones)
    cut, counts = torch.from_numpy(dones & ~terminal), torch.from_numpy(~terminal)
    for t in range(16):
        policy, values = agent(rollout.obs[t])
        close(rollout.logprobs[t], policy.log_prob(rollout.actions[t]))  # the first ratio is 1
        close(rollout.values[t], values)
        goes_on = agent.value(torch.from_numpy(envs.shown[t + 1]))
        beyond = torch.where(cut[t], agent.value(torch.from_numpy(final_obs[t])), goes_on)
        close(rollout.next_values[t][counts[t]], beyond[counts[t]])
    outcome = rollout.rewards, rollout.values, rollout.next_values, rollout.terminations
    advantages = case.script.compute_gae(*outcome, rollout.dones, 0.9, 0.8)
    close((rollout.advantages, rollout.returns), advantages)


@over_cases
@torch.no_grad()
def test_actions_follow_the_policy(case):
    """Within 4 standard errors, and one says nothing of the next step or environment."""
    agent, args = case.agent(), case.args(num_envs=96, num_steps=48)
    envs, obs, count = FakeEnvs(case, args, 0), case.random_obs(1), 96 * 48
    envs.observe = lambda: obs.expand(96, *obs.shape[1:]).numpy()
    rollout, _ = case.script.collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)
    (policy, _), x = agent(obs), rollout.actions
    if isinstance(case.action_space, Discrete):
        x, mean = nn.functional.one_hot(x, 3).float(), policy.probs
        variance = mean * (1.0 - mean)
    else:
        mean, variance = policy.mean, policy.variance
        within = ((x - mean).abs() < variance.sqrt()).float().mean((0, 1))
        assert ((within - 0.6827).abs() < 4.0 * (0.6827 * 0.3173 / count) ** 0.5).all()
    z = (x - mean) / variance.sqrt()
    for zero in (z, z[1:] * z[:-1], z[:, 1:] * z[:, :-1]):
        assert zero.mean((0, 1)).abs().max() < 4.0 / count**0.5
    obs = case.random_obs(20)
    noise = torch.zeros_like(agent.noise(20))  # without any, the likeliest
    if case.script is ppo_atari:
        found, *_ = agent.act(obs, noise)
    else:
        found = agent.sample(*agent.policy(obs), noise)
    assert torch.equal(found, agent(obs)[0].mode)


# ε = 0.2; ratio, advantage, objective, its derivative by the ratio
CLIP_TABLE = [
    (1.1, +2.0, +2.2, +2.0),
    (0.9, -2.0, -1.8, -2.0),
    (1.5, +2.0, +2.4, 0.0),  # good, and likelier by more than ε: no more of it
    (0.5, -2.0, -1.6, 0.0),  # bad, and less likely by more than ε
    (0.5, +2.0, +1.0, +2.0),  # moved the wrong way: back again
    (1.5, -2.0, -3.0, -2.0),
]
# ε = 0.2; V, old V, return, loss, its derivative
VALUE_TABLE = [
    (1.0, 0.9, 3.0, 2.0, -2.0),  # within ±ε of the old value: (1 − 3)²/2
    (1.0, 0.0, 2.0, 1.62, 0.0),  # moved towards the return by more than ε: (0.2 − 2)²/2
    (1.0, 0.0, -1.0, 2.0, 2.0),  # moved away from it: (1 + 1)²/2, and back again
    (-1.0, 0.0, -2.0, 1.62, 0.0),
]


def check_loss(loss, x, expected, derivatives):
    x = x.clone().requires_grad_()
    assert loss(x).item() == pytest.approx(expected.mean().item())
    close(torch.autograd.grad(loss(x), x)[0], derivatives / len(x))
    assert torch.autograd.gradcheck(loss, x)  # finite differences


@over("atari", "box")
def test_clipped_losses_by_hand(case):
    ratio, advantages, objective, slope = torch.tensor(CLIP_TABLE).double().T
    loss = partial(case.script.policy_loss, advantages=advantages, clip_coef=0.2)
    check_loss(loss, ratio.log(), -objective, -slope * ratio)  # d ratio / d log ratio = ratio
    value, old_value, returns, losses, slopes = torch.tensor(VALUE_TABLE).double().T
    loss = partial(case.script.value_loss, old_value=old_value, returns=returns)
    check_loss(partial(loss, clip_coef=0.2), value, losses, slopes)
    error = value - returns
    check_loss(partial(loss, clip_coef=None), value, error.square() / 2, error)


def test_kl_penalty_loss_by_hand():
    logratio, advantages, kl = torch.tensor([[-0.5, 0.7], [3.0, -1.0], [0.1, 0.5]]).double()
    surrogate, loss = logratio.exp() * advantages, ppo_kl_penalty.kl_penalty_loss
    expected = 0.6 * kl - surrogate
    of_ratio = partial(loss, advantages=advantages, kl=kl, kl_coef=0.6)
    check_loss(of_ratio, logratio, expected, -surrogate)
    check_loss(partial(loss, logratio, advantages, kl_coef=0.6), kl, expected, kl / kl * 0.6)


def as_policy(parameters):  # of these cases: logits of 3 actions, or 2 means and deviations
    if parameters.shape[1] == 3:
        return Categorical(logits=parameters)
    return Independent(Normal(*parameters.chunk(2, -1)), 1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_exact_kl_is_that_of_torch(scale):
    torch.manual_seed(0)
    logits, gaussians = (scale * torch.randn(2, 200, n, dtype=torch.float64) for n in (3, 4))
    gaussians[..., 2:] = (0.3 * gaussians[..., 2:]).exp()  # of each state its own
    for old, new in (logits.log_softmax(-1), gaussians):
        expected = kl_divergence(as_policy(old), as_policy(new))
        close(ppo_kl_penalty.exact_kl(old, as_policy(new)), expected, rtol=1e-6, atol=0)


def test_adapt_kl_coef():  # d_targ = 0.75 puts the thresholds at 0.5 and 1.125, exact in binary
    kls = [0.0, nextafter(0.5, 0.0), 0.5, 0.75, 1.125, nextafter(1.125, 2.0), 100.0]
    coefs = [1.5, 1.5, 3.0, 3.0, 3.0, 6.0, 6.0]
    assert [ppo_kl_penalty.adapt_kl_coef(3.0, kl, 0.75) for kl in kls] == coefs


def reference_loss(case, agent, mb, args, kl_coef):
    """[PPO] eq. 8 and 9 as they stand there, and what is logged."""
    (policy, values), a = agent(mb.obs), mb.advantages
    if isinstance(policy, Categorical):
        logprobs = policy.probs.gather(1, mb.actions[:, None]).squeeze(1).log()
        entropy = -(policy.probs * policy.probs.log()).sum(1)
    else:
        std = policy.stddev
        density = (-(((mb.actions - policy.mean) / std) ** 2) / 2).exp() / (std * 2.5066282746)
        logprobs, entropy = density.log().sum(1), (std.log() + 1.4189385332).sum(1)
    ratio, a = (logprobs - mb.logprobs).exp(), (a - a.mean()) / a.std() if args.norm_adv else a
    errors, logged = (values - mb.returns) ** 2, {}
    if case.script is ppo_kl_penalty:
        objective = ratio * a - kl_coef * kl_divergence(as_policy(mb.old), policy)
    else:
        low, high = 1.0 - args.clip_coef, 1.0 + args.clip_coef
        objective = torch.where(a > 0, ratio.clamp(max=high), ratio.clamp(min=low)) * a
        if args.clip_vloss:
            near = torch.clamp(values, mb.values - args.clip_coef, mb.values + args.clip_coef)
            errors = torch.maximum(errors, (near - mb.returns) ** 2)
        logged["clipfrac"] = ((ratio < low) | (ratio > high)).float().mean()
        logged["old_approx_kl"] = -ratio.log().mean()
        logged["approx_kl"] = (ratio - 1.0 - ratio.log()).mean()
    logged |= {"policy_loss": -objective.mean(), "entropy": entropy.mean()}
    logged |= {"value_loss": errors.mean() / 2}
    loss = logged["policy_loss"] - args.ent_coef * entropy.mean() + args.vf_coef * errors.mean() / 2
    return loss, {f"losses/{name}": x for name, x in logged.items()}


@over_cases
@pytest.mark.parametrize("norm_adv, clip_vloss", [(True, True), (True, False), (False, True)])
def test_minibatch_loss_is_that_of_the_paper(case, norm_adv, clip_vloss):
    """With ratios up to e^±0.5 and values up to ±0.5 from the old ones: on both sides of ε."""
    weights = {"ent_coef": 0.3, "vf_coef": 0.7, "clip_coef": 0.2}
    args, agent = case.args(norm_adv=norm_adv, clip_vloss=clip_vloss, **weights), case.agent()
    rollout = case.rollout(agent, args)
    moved = {x: getattr(rollout, x) + torch.rand(8, 4) - 0.5 for x in ("logprobs", "values")}
    coef = [torch.tensor(0.3)] if case.script is ppo_atari else []
    if case.script is ppo_kl_penalty:  # old policies of other states
        moved["old"], coef = rollout.old.roll(1, 0), [torch.tensor(0.6)]
    mb = type(rollout)(*(x.flatten(0, 1) for x in rollout._replace(**moved)))
    found, metrics = case.script.minibatch_loss(agent, mb, *coef, args)
    expected, logged = reference_loss(case, agent, mb, args, 0.6)
    close((found, metrics), (expected, logged))
    assert 0.1 < logged.get("losses/clipfrac", 0.5) < 0.9
    parameters = list(agent.parameters())
    close(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters))


def reference_update(case, agent, adam, rollout, args, kl_coef, norms):
    batch, history = type(rollout)(*(x.flatten(0, 1) for x in rollout)), []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(32).split(8):
            mb = type(batch)(*(x[rows] for x in batch))
            loss, metrics = reference_loss(case, agent, mb, args, kl_coef)
            adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            adam.step()
            history.append({k: x.item() for k, x in (metrics | {"losses/grad_norm": norm}).items()})
    norms += [row["losses/grad_norm"] for row in history]
    means = {name: np.mean([row[name] for row in history]) for name in history[0]}
    unexplained = (batch.returns - batch.values).var() / batch.returns.var()
    if case.script is ppo_kl_penalty:
        kl = kl_divergence(as_policy(batch.old), agent(batch.obs)[0]).mean()
        means |= {"losses/kl": kl.item(), "charts/kl_coef": kl_coef}
    return means | {"losses/explained_variance": 1.0 - unexplained.item()}


@over_cases
def test_update_is_adam_on_minibatches(case):
    """Over three rollouts; the normalisation learns after the networks, or π_old was another."""
    args = case.args(learning_rate=1e-3, max_grad_norm=1.8, ent_coef=0.1)
    script, agent = case.script, case.agent()
    coef, slow = {ppo_atari: [0.1], ppo_kl_penalty: [0.5]}.get(script, []), copy.deepcopy(agent)
    optimizer, norms, start = script.make_optimizer(agent, args), [], vector(slow)
    adam = torch.optim.Adam(slow.parameters(), lr=1e-3, eps=1e-5)
    for seed in range(3):
        rollout, gradient = case.rollout(slow, args, seed), replayed(script.minibatch_gradient)
        torch.manual_seed(seed)
        metrics = script.update(agent, optimizer, rollout, *coef, args, gradient)
        torch.manual_seed(seed)
        expected = reference_update(case, slow, adam, rollout, args, 0.5, norms)
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-4)
        change = vector(slow) - start
        assert (vector(agent) - start - change).norm() < 2e-3 * change.norm()
        if script is not ppo_atari:
            slow.normalize.update(rollout.obs.flatten(0, 1))
            close(list(agent.normalize.buffers()), list(slow.normalize.buffers()))
    assert min(norms) < 1.8 < max(norms)


@over("atari", "box")
@pytest.mark.parametrize("target_kl, epochs", [(None, 5), (0.5, 5), (0.025, 3), (0.005, 1)])
def test_target_kl_leaves_out_the_remaining_epochs(case, target_kl, epochs):
    args, agent, calls = case.args(update_epochs=5, target_kl=target_kl), case.agent(), []
    inputs = agent, case.script.make_optimizer(agent, args), case.rollout(agent, args)

    def gradient(agent, *inputs):
        calls.append(0.01 * (1 + len(calls) // 4))  # 0.02 in the second epoch, and so on
        return torch.zeros_like(vector(agent)), {"losses/approx_kl": torch.tensor(calls[-1])}

    metrics = case.script.update(*inputs, *[0.0] * (case.script is ppo_atari), args, gradient)
    assert len(calls) == 4 * epochs
    assert metrics["losses/approx_kl"] == pytest.approx(0.01 * (1 + epochs) / 2)


@over("box", "kl-box")
def test_running_statistics_are_those_of_all_data_at_once(case):
    random, seen = np.random.default_rng(0), np.zeros((0, 3))
    statistics = case.script.RunningMeanStd(3)
    for i, n in enumerate([1, 64, 2, 7, 300]):
        batch = random.normal(5.0 * i, 1.0 + i, (n, 3)) * [1.0, 10.0, 0.0]
        statistics.update(torch.tensor(batch, dtype=torch.float32))
        seen = np.concatenate([seen, batch])
        np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.var, seen.var(0), rtol=1e-4, atol=1e-5)
    found = statistics(torch.tensor(seen, dtype=torch.float32))  # what is constant becomes 0
    np.testing.assert_allclose(found, (seen - seen.mean(0)) / (seen.std(0) + 1e-9), atol=1e-3)
    assert statistics(torch.tensor([1e9, -1e9, 0.0])).tolist() == [10.0, -10.0, 0.0]


@over_scripts
@pytest.mark.parametrize("constant", [False, True])
def test_training_over_the_iterations(case, constant, monkeypatch, here):
    """What is annealed and adapted, and that each rollout goes on where the last one ended."""
    made, seen, rates, coefs, logged = [], [], [], [], []

    def update(agent, optimizer, rollout, coef, *_):
        seen.append(rollout.obs)
        rates.append(optimizer.param_groups[0]["lr"])
        coefs.append(coef)
        return {"losses/kl": [0.1, 0.1, 0.001, 0.01][len(rates) - 1]}  # d_targ is 0.01

    def end_iteration(run, metrics):
        logged.append(metrics["charts/learning_rate"])
        made.append(run.envs)

    monkeypatch.setattr(case.script, "Envs", partial(FakeEnvs, case))
    monkeypatch.setattr(case.script, "update", update)
    monkeypatch.setattr(case.script.Run, "end_iteration", end_iteration)
    changes = {"kl_mode": "fixed" if constant else "adaptive", "kl_coef": 3.0, "run_name": "run"}
    changes |= {"learning_rate": 8.0, "total_timesteps": 4 * 32 + 31}  # 4 iterations and a rest
    case.script.train(case.args(anneal_lr=not constant, anneal_ent=not constant, **changes))
    assert rates == logged == ([8.0] * 4 if constant else [8.0, 6.0, 4.0, 2.0])
    wanted = {ppo_atari: [0.01, 0.005, 0.0, 0.0], ppo_kl_penalty: [3.0, 6.0, 12.0, 6.0]}
    if wanted := wanted.get(case.script):
        assert coefs == (wanted[:1] * 4 if constant else wanted)
    assert torch.equal(torch.cat(seen), torch.from_numpy(np.stack(made[0].shown[:-1])))


@over_cases
def test_a_fresh_agent(case):
    """Orthogonal weights [37]: all singular values are the gain; so all actions are as likely."""
    agent, obs = case.script.Agent(case.observation_space, case.action_space), case.random_obs(5)
    heads = [x if case.script is ppo_atari else x[-1] for x in (agent.actor, agent.critic)]
    gains = dict(zip(heads, (0.01, 1.0)))
    for layer in agent.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found = torch.linalg.svdvals(layer.weight.flatten(1))
            close(found, torch.full_like(found, gains.get(layer, 2**0.5)))
            assert not layer.bias.any()
    policy, values = agent(obs)
    close(agent.value(obs), values)
    assert values.shape == policy.entropy().shape == (5,)
    assert isinstance(case.action_space, Discrete) or policy.stddev.eq(1.0).all()


def plain_cnn(network, x, c):
    *convs, linear = (layer for layer in network if hasattr(layer, "weight"))
    assert [len(layer.weight) for layer in (*convs, linear)] == [c, 2 * c, 2 * c, 16 * c]
    for conv, size, stride in zip(convs, (8, 4, 3), (4, 2, 1)):
        assert conv.weight.shape[2:] == (size, size)
        x = nn.functional.conv2d(x, conv.weight, conv.bias, stride).relu()
    return nn.functional.linear(x.flatten(1), linear.weight, linear.bias).relu()


@pytest.mark.parametrize(
    "shape, options", [((4, 84, 84), (32, 1, 0, 0.0)), ((3, 64, 64), (5, 0, 1, 87.0))]
)
def test_the_networks_of_pictures(shape, options):
    agent, dtypes = ppo_atari.Agent(Box(0, 255, shape, np.uint8), Discrete(6), *options), []
    channels, shared, bf16, background = options
    agent.actor.weight.data *= 100.0
    agent.network.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    obs = torch.randint(256, (9, *shape), dtype=torch.uint8)
    policy, values = agent(obs)
    x = (obs - background) / 255.0
    hidden = plain_cnn(agent.network, x, channels)
    value_hidden = hidden if shared else plain_cnn(agent.value_network, x, channels)
    tolerance = {"rtol": 0, "atol": 0.03} if bf16 else {}
    close(policy.logits, agent.actor(hidden).log_softmax(-1), **tolerance)
    close(values, agent.critic(value_hidden).squeeze(1), **tolerance)
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32]
    assert (agent.value_network is None) == shared
