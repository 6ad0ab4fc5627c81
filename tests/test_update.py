"""One update from a rollout made by hand: which rows it uses, when it stops, what it changes and reports."""

import math
import sys

import numpy as np
import pytest
import torch
from fakes import (
    ATARI,
    CASES,
    GAUSSIAN_CASES,
    KL_CASES,
    MLP_CASES,
    SCRIPTS,
    Batch,
    make_agent,
    make_args,
    make_rollout,
    minibatch_loss,
    over_cases,
    over_scripts,
    random_obs,
)
from torch.distributions import kl_divergence

import ppo_continuous
import ppo_kl_penalty

METRICS = {
    "charts/learning_rate",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/old_approx_kl",
    "losses/explained_variance",
    "losses/grad_norm",
}


def adam(agent, learning_rate: float = 1e-3) -> torch.optim.Optimizer:
    script = sys.modules[type(agent).__module__]
    return script.make_optimizer(agent, make_args(script, learning_rate=learning_rate))


class Spy:
    """Records the calls of minibatch_loss and passes them on."""

    def __init__(self, script):
        self.original = script.minibatch_loss
        self.calls: list[dict] = []

    def __call__(self, agent, minibatch, *rest):
        loss, metrics = self.original(agent, minibatch, *rest)
        call = {"minibatch": minibatch, "rest": rest, "metrics": dict(metrics), "loss": loss.item()}
        if hasattr(agent, "normalize"):
            call["statistics"] = [buffer.clone() for buffer in agent.normalize.buffers()]
        norms = [g.norm() for g in torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True)]
        self.calls.append(call | {"grad_norm": torch.stack(norms).norm().item()})
        return loss, metrics


@pytest.fixture
def spy_on(monkeypatch):
    def install(script) -> Spy:
        spy = Spy(script)
        monkeypatch.setattr(script, "minibatch_loss", spy)
        return spy

    return install


def whole_batch(case, rollout, args) -> Batch:
    advantages, returns = case.script.compute_gae(*rollout[3:], args.gamma, args.gae_lambda)
    parts = (rollout.obs, rollout.actions, rollout.logprobs, rollout.values, advantages, returns)
    return Batch(*(x.flatten(0, 1) for x in parts))


# ---- which rows ----


@over_cases(CASES)
def test_every_transition_takes_part_once_per_epoch(case, spy_on):
    args, agent = make_args(case.script, update_epochs=3, norm_adv=False), make_agent(case)
    rollout = make_rollout(case, agent, args)
    rollout.obs[..., 0] = torch.arange(16).view(8, 2, *[1] * (rollout.obs.dim() - 3))  # the row's number
    spy = spy_on(case.script)
    case.script.update(agent, adam(agent), rollout, args)

    batch = list(whole_batch(case, rollout, args))
    if case in KL_CASES:
        del batch[3]  # it has no use for old values
    orders = []
    for call in spy.calls:
        rows = call["minibatch"][0].flatten(1)[:, 0].long()
        assert len(rows) == args.minibatch_size
        for found, whole in zip(call["minibatch"], batch, strict=True):
            assert torch.equal(found, whole[rows])  # obs, actions, … of one transition stay together
        orders.append(rows)
    epochs = torch.cat(orders).view(3, 16)
    assert all(sorted(epoch.tolist()) == list(range(16)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


@over_cases(CASES)
def test_advantages_are_normalized_in_each_minibatch(case, spy_on):
    """Those of the batch, not those that the epoch before has normalised."""
    args, agent = make_args(case.script, update_epochs=3), make_agent(case)
    rollout, spy = make_rollout(case, agent, args), spy_on(case.script)
    rollout.obs[..., 0] = torch.arange(16).view(8, 2, *[1] * (rollout.obs.dim() - 3))  # the row's number
    advantages = whole_batch(case, rollout, args).advantages
    case.script.update(agent, adam(agent), rollout, args)
    assert len(spy.calls) == 12
    for call in spy.calls:
        x = advantages[call["minibatch"][0].flatten(1)[:, 0].long()]
        torch.testing.assert_close(call["minibatch"][-2], (x - x.mean()) / (x.std() + 1e-8))


@over_cases(CASES)
def test_the_first_minibatch_has_ratio_1(case, spy_on):
    """π_old and π_θ are the same there: the normalisation must not have moved in between."""
    args, agent = make_args(case.script), make_agent(case)
    spy, optimizer = spy_on(case.script), adam(agent)
    for iteration in range(2):
        case.script.update(agent, optimizer, make_rollout(case, agent, args, seed=iteration), args)
    first_calls = (spy.calls[0], spy.calls[8])  # 2 epochs of 4 minibatches lie in between
    for call in first_calls:
        assert abs(call["metrics"]["losses/approx_kl"]) < 1e-6
        assert abs(call["metrics"]["losses/old_approx_kl"]) < 1e-5
        assert call["metrics"].get("losses/clipfrac", 0.0) == 0.0
    last = spy.calls[7]["metrics"]
    assert last["losses/approx_kl"] > 1e-5  # so the bounds above mean something


@over_cases(KL_CASES)
def test_the_old_policy_is_the_one_that_acted(case, spy_on):
    args, agent = make_args(case.script), make_agent(case)
    spy = spy_on(case.script)
    case.script.update(agent, adam(agent), make_rollout(case, agent, args), args)
    for call in spy.calls:
        _, actions, logprobs, *_ = call["minibatch"]
        torch.testing.assert_close(call["rest"][0].log_prob(actions), logprobs, rtol=1e-4, atol=1e-5)


# ---- what it reports ----


@over_cases(CASES)
def test_metrics_are_means_over_all_minibatches(case, spy_on):
    args, agent = make_args(case.script, max_grad_norm=1e6), make_agent(case)
    spy = spy_on(case.script)
    metrics = case.script.update(agent, adam(agent), make_rollout(case, agent, args), args)
    assert len(spy.calls) == 8
    for key in spy.calls[0]["metrics"].keys() - {"losses/grad_norm"}:
        values = [call["metrics"][key].item() for call in spy.calls]
        assert metrics[key] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-7), key
        assert len(set(values)) > 1 or key == "losses/clipfrac"
    norms = [call["grad_norm"] for call in spy.calls]  # each of its own minibatch, not of all so far
    assert metrics["losses/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)


@over_cases(CASES)
def test_keys(case):
    args, agent = make_args(case.script), make_agent(case)
    metrics = case.script.update(agent, adam(agent, 7e-4), make_rollout(case, agent, args), args)
    own = {"losses/kl", "charts/kl_coef"} if case in KL_CASES else {"losses/clipfrac"}
    assert metrics.keys() == METRICS | own
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert metrics["charts/learning_rate"] == 7e-4


@over_cases(CASES)
def test_without_learning_the_means_are_those_of_the_whole_batch(case):
    args, agent = make_args(case.script, norm_adv=False), make_agent(case)
    rollout = make_rollout(case, agent, args)
    rollout = rollout._replace(logprobs=rollout.logprobs + 0.3 * torch.randn_like(rollout.logprobs))
    with torch.no_grad():
        _, expected = minibatch_loss(case, agent, whole_batch(case, rollout, args), args)
    before = [parameter.clone() for parameter in agent.parameters()]
    metrics = case.script.update(agent, adam(agent, 0.0), rollout, args)
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
    assert all(torch.equal(old, new) for old, new in zip(before, agent.parameters(), strict=True))


@over_cases(CASES)
def test_explained_variance(case):
    """1 where the values are the returns, 0 where they say nothing, negative where they are worse."""
    args, agent = make_args(case.script, gae_lambda=1.0, update_epochs=1), make_agent(case)
    rollout = make_rollout(case, agent, args)
    ends = torch.ones_like(rollout.dones)
    rollout = rollout._replace(dones=ends, terminations=ends)  # so that returns are the rewards
    for values, explained in ((rollout.rewards, 1.0), (ends, 0.0), (-rollout.rewards, -3.0)):
        metrics = case.script.update(agent, adam(agent), rollout._replace(values=values), args)
        assert metrics["losses/explained_variance"] == pytest.approx(explained, abs=1e-5)


# ---- what it changes ----


@over_cases(CASES)
def test_gradients_are_scaled_down_to_max_grad_norm(case, monkeypatch):
    args, agent = make_args(case.script, max_grad_norm=1e-3, update_epochs=1), make_agent(case)
    optimizer, norms = adam(agent), []

    def norm_then_step() -> None:
        (parameters,) = optimizer.param_groups[0]["params"]
        norms.append(parameters.grad.norm().item())

    monkeypatch.setattr(optimizer, "step", norm_then_step)
    metrics = case.script.update(agent, optimizer, make_rollout(case, agent, args), args)
    assert metrics["losses/grad_norm"] > 0.01  # the norm that it reports is the one before
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


@over_cases(CASES)
def test_all_parameters_learn(case):
    args, agent = make_args(case.script), make_agent(case)
    before = [parameter.clone() for parameter in agent.parameters()]
    case.script.update(agent, adam(agent), make_rollout(case, agent, args), args)
    assert not any(torch.equal(old, new) for old, new in zip(before, agent.parameters(), strict=True))


@over_cases(CASES)
def test_rewarded_actions_become_likelier(case):
    """The sign of it all: actions with an advantage gain probability, the others lose it."""
    args, agent = make_args(case.script, update_epochs=4, norm_adv=False), make_agent(case)
    rollout = make_rollout(case, agent, args)
    ends = torch.ones_like(rollout.dones)
    rewards = rollout.values + torch.randn(8, 2).sign()
    rollout = rollout._replace(dones=ends, terminations=ends, rewards=rewards)
    case.script.update(agent, adam(agent, 1e-4), rollout, args)
    batch = whole_batch(case, rollout, args)
    with torch.no_grad():
        if case is not ATARI:  # undo what the update learnt of the observations
            agent.normalize = case.script.RunningMeanStd(case.observation_space.shape)
        policy, values = agent(batch.obs)
    change = policy.log_prob(batch.actions) - batch.logprobs
    assert (change * batch.advantages).mean() > 0
    assert (values - batch.returns).square().mean() < (batch.old_values - batch.returns).square().mean()


@over_cases(GAUSSIAN_CASES)
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["down", "up"])
def test_log_std_stays_within_bounds_and_can_come_back(case, direction):
    args, agent = make_args(case.script, update_epochs=1), make_agent(case)
    rollout = make_rollout(case, agent, args)
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}

    def log_std_only(*inputs):
        """Its gradient or the opposite; the networks stay."""
        gradient, metrics = case.script.minibatch_gradient(*inputs)
        sizes = [parameter.numel() for parameter in agent.parameters()]
        names = [name for name, _ in agent.named_parameters()]
        parts = zip(names, gradient.split(sizes), strict=True)
        return torch.cat([part * (direction if name == "log_std" else 0.0) for name, part in parts]), metrics

    for _ in range(3):
        case.script.update(agent, adam(agent, 1e3), rollout, args, log_std_only)
        assert agent.log_std.isfinite().all()
        assert agent.log_std.min() >= -20.0 and agent.log_std.max() <= 2.0
    assert set(agent.log_std.tolist()) <= {-20.0, 2.0}  # it did reach a bound
    moved = {name for name, parameter in agent.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"log_std"}

    rollout = make_rollout(case, agent, args)  # actions of the policy at the bound
    loss, _ = minibatch_loss(case, agent, whole_batch(case, rollout, args), args)
    (gradient,) = torch.autograd.grad(loss, agent.log_std)
    assert gradient.isfinite().all() and (gradient != 0.0).all()


# ---- normalisation ----


@over_scripts([ppo_continuous, ppo_kl_penalty])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_running_statistics_are_those_of_all_data_at_once(script, shape):
    random = np.random.default_rng(0)
    statistics = script.RunningMeanStd(shape)
    batches = [random.normal(5.0 * i, 1.0 + i, size=(n, *shape)) for i, n in enumerate([1, 64, 2, 7, 300])]
    for i, batch in enumerate(batches):
        statistics.update(torch.tensor(batch, dtype=torch.float32))
        seen = np.concatenate(batches[: i + 1])
        assert statistics.count.item() == len(seen)
        np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.var, seen.var(0), rtol=1e-4, atol=1e-5)
    x = seen[:50]
    normalised = (x - seen.mean(0)) / seen.std(0)
    found = statistics(torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(found, normalised, rtol=1e-3, atol=1e-3)
    far = statistics(torch.full((1, *shape), 1e6)), statistics(torch.full((1, *shape), -1e6))
    assert far[0].eq(10.0).all() and far[1].eq(-10.0).all()


@over_scripts([ppo_continuous, ppo_kl_penalty])
def test_a_constant_observation_is_normalised_to_0(script):
    statistics = script.RunningMeanStd((2,))
    statistics.update(torch.full((10, 2), 3.0))
    assert statistics(torch.full((4, 2), 3.0)).eq(0.0).all()


@over_cases(MLP_CASES)
def test_statistics_change_after_the_update_and_not_during_it(case, spy_on):
    args, agent = make_args(case.script), make_agent(case)
    spy, optimizer = spy_on(case.script), adam(agent)
    seen = []
    for iteration in range(2):
        rollout = make_rollout(case, agent, args, seed=iteration)
        before = [buffer.clone() for buffer in agent.normalize.buffers()]
        spy.calls.clear()
        case.script.update(agent, optimizer, rollout, args)
        for call in spy.calls:
            assert all(torch.equal(*pair) for pair in zip(before, call["statistics"], strict=True))
        seen.append(rollout.obs.flatten(0, 1).numpy())
        data = np.concatenate(seen)
        assert agent.normalize.count.item() == len(data)
        np.testing.assert_allclose(agent.normalize.mean, data.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(agent.normalize.var, data.var(0), rtol=1e-4, atol=1e-5)


@over_cases(MLP_CASES)
def test_statistics_are_saved_but_not_learnt(case):
    agent = make_agent(case)
    agent.normalize.update(random_obs(case, 10))
    assert {"normalize.mean", "normalize.var", "normalize.count"} <= agent.state_dict().keys()
    assert not any(name.startswith("normalize") for name, _ in agent.named_parameters())
    copy = make_agent(case, seed=1)
    copy.load_state_dict(agent.state_dict())
    obs = random_obs(case, 5)
    assert torch.equal(copy.value(obs), agent.value(obs))


# ---- when it stops: target_kl in the clipped scripts ----


@over_cases([case for case in CASES if case not in KL_CASES])
@pytest.mark.parametrize(
    "target_kl, epochs", [(None, 5), (0.5, 5), (0.025, 3), (0.005, 1)], ids=["none", "far", "third", "first"]
)
def test_target_kl_leaves_out_the_remaining_epochs(case, monkeypatch, target_kl, epochs):
    """approx_kl is made to be 0.01 in the first epoch, 0.02 in the second and so on."""
    args, agent = make_args(case.script, update_epochs=5, target_kl=target_kl), make_agent(case)
    original, count = case.script.minibatch_loss, 0

    def growing(*inputs):
        nonlocal count
        loss, metrics = original(*inputs)
        metrics["losses/approx_kl"] = torch.tensor(0.01 * (1 + count // args.num_minibatches))
        count += 1
        return loss, metrics

    monkeypatch.setattr(case.script, "minibatch_loss", growing)
    metrics = case.script.update(agent, adam(agent), make_rollout(case, agent, args), args)
    assert count == epochs * args.num_minibatches
    assert metrics["losses/approx_kl"] == pytest.approx(0.01 * (1 + epochs) / 2)


# ---- β ----


@over_cases(KL_CASES)
@pytest.mark.parametrize("kl_target, factor", [(1e-6, 2.0), (1e3, 0.5), (None, 1.0)])
def test_kl_coef_adapts_once_per_update(case, spy_on, kl_target, factor):
    """From the exact KL over the whole batch; None stands for a target that is just what was reached."""
    args, agent = make_args(case.script), make_agent(case)
    rollout = make_rollout(case, agent, args)
    obs = rollout.obs.flatten(0, 1)
    old, _ = make_agent(case)(obs)
    learner = make_agent(case)
    torch.manual_seed(5)
    case.script.update(learner, adam(learner), rollout, args)
    learner.normalize = case.script.RunningMeanStd(case.observation_space.shape)  # as it was in the update
    kl = kl_divergence(old, learner(obs)[0]).mean().item()
    assert kl > 1e-5

    args = make_args(case.script, kl_target=kl_target or kl, kl_coef=1.0)
    spy, optimizer = spy_on(case.script), adam(agent)
    torch.manual_seed(5)  # the same minibatches as above
    metrics = case.script.update(agent, optimizer, rollout, args)
    assert metrics["losses/kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["charts/kl_coef"] == 1.0
    assert [call["rest"][1].item() for call in spy.calls] == [1.0] * 8
    spy.calls.clear()
    metrics = case.script.update(agent, optimizer, make_rollout(case, agent, args), args)
    assert metrics["charts/kl_coef"] == factor
    assert [call["rest"][1].item() for call in spy.calls] == [factor] * 8


@over_cases(KL_CASES)
@pytest.mark.parametrize("kl_coef", [0.0, 3.0])
def test_fixed_kl_coef_stays(case, spy_on, kl_coef):
    args, agent = make_args(case.script, kl_mode="fixed", kl_coef=kl_coef, kl_target=1e-6), make_agent(case)
    spy, optimizer = spy_on(case.script), adam(agent)
    for _ in range(3):
        metrics = case.script.update(agent, optimizer, make_rollout(case, agent, args), args)
        assert metrics["charts/kl_coef"] == kl_coef
        assert metrics["losses/kl"] > 1e-5
    assert {call["rest"][1].item() for call in spy.calls} == {kl_coef}


@over_cases(KL_CASES)
def test_a_larger_kl_coef_holds_the_policy_back(case):
    moved = []
    for kl_coef in (0.0, 1.0, 100.0):
        args = make_args(case.script, kl_mode="fixed", kl_coef=kl_coef, update_epochs=10, norm_adv=False)
        agent = make_agent(case)
        metrics = case.script.update(agent, adam(agent, 1e-3), make_rollout(case, agent, args), args)
        moved.append(metrics["losses/kl"])
    assert moved[0] > moved[1] > 2.0 * moved[2]


# ---- over the iterations ----

CHEAP_ENVS = {
    "ppo_atari": "PongNoFrameskip-v4",
    "ppo_continuous": "Pendulum-v1",
    "ppo_kl_penalty": "CartPole-v1",
}


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("anneal, factors", [(True, [1.0, 0.75, 0.5, 0.25]), (False, [1.0] * 4)])
def test_learning_rate_over_the_iterations(script, anneal, factors, monkeypatch, tmp_path):
    rates = []

    def no_update(agent, optimizer, rollout, args, gradient) -> dict[str, float]:
        rates.extend(group["lr"] for group in optimizer.param_groups)
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "update", no_update)
    steps = {"num_envs": 1, "num_steps": 8, "total_timesteps": 35}  # 4 whole iterations and a rest
    env_id = CHEAP_ENVS[script.__name__]
    script.train(make_args(script, env_id=env_id, anneal_lr=anneal, learning_rate=1e-3, **steps))
    assert rates == pytest.approx([1e-3 * factor for factor in factors])
