"""The objectives and the policies against formulas in plain numpy, finite differences and integrals."""

import math

import numpy as np
import pytest
import torch
from fakes import (
    CASES,
    CLIPPED_SCRIPTS,
    GAUSSIAN_CASES,
    KL_CASES,
    KL_DISCRETE,
    MLP_CASES,
    SCRIPTS,
    Batch,
    make_agent,
    make_args,
    minibatch_loss,
    over_cases,
    over_scripts,
    random_obs,
)
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import ppo_kl_penalty

# ---- the clipped surrogate, [PPO] eq. 7 ----

EPSILON = 0.2
# The gradient table of the third seed, two ratios for each of its rows: whether min() takes the clipped term,
# and its sign. In the third row the clipped term, (1 − ε)·A, is the larger one: the gradient flows.
CLIP_TABLE = [
    # ratio, advantage, clipped, sign of the objective
    (0.85, +2.0, False, +1),
    (1.15, +0.5, False, +1),
    (0.85, -2.0, False, -1),
    (1.15, -0.5, False, -1),
    (0.75, +2.0, False, +1),
    (0.10, +0.5, False, +1),
    (0.75, -2.0, True, -1),
    (0.10, -0.5, True, -1),
    (1.25, +2.0, True, +1),
    (9.00, +0.5, True, +1),
    (1.25, -2.0, False, -1),
    (9.00, -0.5, False, -1),
]


def surrogate(ratio: float, advantage: float) -> float:
    """min(r·A, clip(r, 1 − ε, 1 + ε)·A) of one sample, to be maximised."""
    return min(ratio * advantage, min(max(ratio, 1 - EPSILON), 1 + EPSILON) * advantage)


@over_scripts(CLIPPED_SCRIPTS)
@pytest.mark.parametrize("ratio, advantage, clipped, sign", CLIP_TABLE)
def test_clip_table_row(script, ratio, advantage, clipped, sign):
    logratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = script.policy_loss(logratio, torch.tensor([advantage], dtype=torch.float64), EPSILON)
    loss.backward()
    edge = 1 + EPSILON if ratio > 1 else 1 - EPSILON
    objective = (edge if clipped else ratio) * advantage
    assert -loss.item() == pytest.approx(objective)
    assert -loss.item() == pytest.approx(surrogate(ratio, advantage))
    assert math.copysign(1, -loss.item()) == sign
    # d(r·A)/d(log r) = r·A
    assert logratio.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


@over_scripts(CLIPPED_SCRIPTS)
def test_clip_table_as_one_minibatch(script):
    ratios, advantages, clipped, _ = (torch.tensor(column) for column in zip(*CLIP_TABLE, strict=True))
    logratio = ratios.log().requires_grad_()
    loss = script.policy_loss(logratio, advantages, EPSILON)
    loss.backward()
    rows = zip(ratios.tolist(), advantages.tolist(), strict=True)
    assert loss.item() == pytest.approx(-np.mean([surrogate(r, a) for r, a in rows]), rel=1e-5)
    expected = torch.where(clipped, 0.0, -ratios * advantages / len(CLIP_TABLE))
    torch.testing.assert_close(logratio.grad, expected)


@over_scripts(CLIPPED_SCRIPTS)
def test_clip_coef_sets_where_the_gradient_stops(script):
    for clip_coef, gradient in ((0.1, 0.0), (0.3, -1.2)):
        logratio = torch.tensor([math.log(1.2)], requires_grad=True)
        script.policy_loss(logratio, torch.ones(1), clip_coef).backward()
        assert logratio.grad.item() == pytest.approx(gradient)


# ---- the value loss, [PPO] eq. 9 and its clipping ----

# value, old value, return, loss and gradient at ε = 0.2: half of (V − R)², or of (V_clipped − R)² if larger
VALUE_TABLE = [
    (1.0, 0.9, 3.0, 2.0, -2.0),  # within ±ε of the old value: (1 − 3)²/2
    (1.0, 0.0, 2.0, 1.62, 0.0),  # moved towards the return by more than ε: (0.2 − 2)²/2, no gradient
    (1.0, 0.0, -1.0, 2.0, 2.0),  # moved away from it: (1 + 1)²/2, and the gradient brings it back
    (-1.0, 0.0, -2.0, 1.62, 0.0),
    (-1.0, 0.0, 1.0, 2.0, -2.0),
]


@over_scripts(CLIPPED_SCRIPTS)
@pytest.mark.parametrize("value, old, target, loss, gradient", VALUE_TABLE)
def test_clipped_value_loss(script, value, old, target, loss, gradient):
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    result = script.value_loss(v, torch.tensor([old]).double(), torch.tensor([target]).double(), EPSILON)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert v.grad.item() == pytest.approx(gradient)


@over_scripts(CLIPPED_SCRIPTS)
@pytest.mark.parametrize("clip_coef", [None, 0.2])
def test_value_loss_formula_and_gradient(script, clip_coef):
    random = np.random.default_rng(0)
    value, old, target = random.normal(size=(3, 64))

    def formula(v: np.ndarray) -> float:
        error = (v - target) ** 2
        if clip_coef is not None:
            error = np.maximum(error, (np.clip(v, old - clip_coef, old + clip_coef) - target) ** 2)
        return 0.5 * error.mean()

    v = torch.tensor(value, requires_grad=True)
    loss = script.value_loss(v, torch.tensor(old), torch.tensor(target), clip_coef)
    loss.backward()
    assert loss.item() == pytest.approx(formula(value))
    h = 1e-6
    for i in range(64):
        up, down = value.copy(), value.copy()
        up[i] += h
        down[i] -= h
        assert v.grad[i].item() == pytest.approx((formula(up) - formula(down)) / (2 * h), abs=1e-8)


# ---- the KL penalty, [PPO] eq. 8, and its coefficient, section 4 ----


def test_kl_penalty_loss_value_and_gradients():
    ratio, advantages, kl = np.random.default_rng(0).uniform(0.1, 3.0, size=(3, 16)) * [[1], [-1], [1]]
    logratio = torch.tensor(np.log(ratio), requires_grad=True)
    kl_tensor = torch.tensor(kl, requires_grad=True)
    loss = ppo_kl_penalty.kl_penalty_loss(logratio, torch.tensor(advantages), kl_tensor, 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(-np.mean(ratio * advantages) + 0.7 * np.mean(kl))
    np.testing.assert_allclose(logratio.grad, -ratio * advantages / 16)  # no ratio is clipped
    np.testing.assert_allclose(kl_tensor.grad, np.full(16, 0.7 / 16))


def categorical_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """Σ p·log(p/q) over the last axis."""
    p = np.exp(p_logits) / np.exp(p_logits).sum(-1, keepdims=True)
    q = np.exp(q_logits) / np.exp(q_logits).sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def gaussian_kl(p_mean, p_std, q_mean, q_std) -> np.ndarray:
    """The integral of p·log(p/q) for each of independent Gaussians, on a grid, summed over the last axis."""
    x = np.linspace(-30.0, 30.0, 20_001)

    def log_density(mean, std):
        return (
            -0.5 * ((x - mean[..., None]) / std[..., None]) ** 2
            - np.log(std * math.sqrt(2 * np.pi))[..., None]
        )

    log_p, log_q = log_density(p_mean, p_std), log_density(q_mean, q_std)
    return (np.exp(log_p) * (log_p - log_q)).sum((-1, -2)) * (x[1] - x[0])


def other_policy(policy):
    """A policy of the same kind, and plain numpy's KL divergence from it to `policy`."""
    random = np.random.default_rng(3)
    if isinstance(policy, Categorical):
        logits = random.normal(size=policy.logits.shape)
        kl = categorical_kl(logits, policy.logits.detach().double().numpy())
        return Categorical(logits=torch.tensor(logits).to(policy.logits)), kl
    mean = random.normal(size=policy.mean.shape)
    std = np.exp(random.normal(size=policy.mean.shape) * 0.3)
    new = policy.mean.detach().double().numpy(), policy.stddev.detach().double().numpy()
    old = Normal(torch.tensor(mean).to(policy.mean), torch.tensor(std).to(policy.mean))
    return Independent(old, 1), gaussian_kl(mean, std, *new)


@over_cases(KL_CASES)
def test_penalty_is_the_kl_from_the_old_to_the_new_policy(case):
    agent, args = make_agent(case), make_args(case.script)
    batch = random_batch(case, agent, 16)
    old, expected = other_policy(agent(batch.obs)[0])
    assert np.abs(expected).min() > 0.01
    np.testing.assert_allclose(kl_divergence(old, agent(batch.obs)[0]).detach(), expected, rtol=1e-3)
    without, _ = minibatch_loss(case, agent, batch, args, old, kl_coef=0.0)
    penalised, _ = minibatch_loss(case, agent, batch, args, old, kl_coef=2.0)
    assert (penalised - without).item() == pytest.approx(2.0 * expected.mean(), rel=1e-3)


@over_cases(KL_CASES)
def test_gradient_of_the_penalty_is_that_of_the_kl_divergence(case):
    agent, args = make_agent(case), make_args(case.script)
    batch = random_batch(case, agent, 16)
    old, _ = other_policy(agent(batch.obs)[0])
    policy = agent(batch.obs)[0]
    if case is KL_DISCRETE:
        expected = (old.probs * (old.logits - policy.logits)).sum(-1).mean()
    else:  # closed form for Gaussians
        variance = old.variance + (old.mean - policy.mean).square()
        log_stds = policy.stddev.log() - old.stddev.log()
        expected = (log_stds + variance / (2 * policy.variance) - 0.5).sum(-1).mean()
    parameters = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    with_kl, without = (minibatch_loss(case, agent, batch, args, old, kl_coef)[0] for kl_coef in (2.0, 0.0))
    found = torch.autograd.grad(with_kl - without, parameters)
    torch.testing.assert_close(found, torch.autograd.grad(2.0 * expected, parameters), rtol=1e-3, atol=1e-4)


# d_targ = 0.75 puts the thresholds at 0.5 and 1.125, exact in binary
@pytest.mark.parametrize(
    "kl, factor",
    [
        (0.0, 0.5),
        (math.nextafter(0.5, 0.0), 0.5),
        (0.5, 1.0),
        (math.nextafter(0.5, 1.0), 1.0),
        (0.75, 1.0),
        (math.nextafter(1.125, 1.0), 1.0),
        (1.125, 1.0),
        (math.nextafter(1.125, 2.0), 2.0),
        (100.0, 2.0),
    ],
)
def test_kl_coef_rule(kl, factor):
    assert ppo_kl_penalty.adapt_kl_coef(3.0, kl, kl_target=0.75) == 3.0 * factor


@pytest.mark.parametrize("first, back", [(0.0, 1.0), (1.0, 0.0)], ids=["halved", "doubled"])
def test_kl_coef_comes_back_from_any_number_of_changes(first, back):
    kl_coef = 1.0
    for _ in range(10_000):
        kl_coef = ppo_kl_penalty.adapt_kl_coef(kl_coef, first, kl_target=0.01)
        assert 0.0 < kl_coef < math.inf
    extreme = kl_coef
    assert abs(math.log(extreme)) > 5  # it did move
    for _ in range(64):
        kl_coef = ppo_kl_penalty.adapt_kl_coef(kl_coef, back, kl_target=0.01)
    assert (kl_coef > 1.0) == (extreme < 1.0)


ROWS = torch.tensor([4, 0, 2, 2])


@over_cases(KL_CASES)
def test_rows_of_takes_the_distributions_of_these_rows(case):
    agent = make_agent(case)
    policy = agent(random_obs(case, 6))[0]
    actions = policy.sample()
    some = ppo_kl_penalty.rows_of(policy, ROWS)
    assert type(some) is type(policy)
    torch.testing.assert_close(some.log_prob(actions[ROWS]), policy.log_prob(actions)[ROWS])
    torch.testing.assert_close(some.entropy(), policy.entropy()[ROWS])
    assert kl_divergence(some, ppo_kl_penalty.rows_of(policy, ROWS.flip(0))).shape == (4,)


# ---- the policies ----


@over_cases(CASES)
def test_one_number_per_state(case):
    agent = make_agent(case)
    policy, value = agent(random_obs(case, 5))
    other, _ = agent(random_obs(case, 5))
    actions = policy.sample()
    assert actions.shape == (5, *case.action_space.shape)
    assert value.shape == policy.log_prob(actions).shape == policy.entropy().shape == (5,)
    assert kl_divergence(policy, other).shape == (5,)


@over_cases(CASES)
def test_value_is_that_of_the_full_pass(case):
    agent, obs = make_agent(case), random_obs(case, 5)
    torch.testing.assert_close(agent.value(obs), agent(obs)[1])


@over_cases(GAUSSIAN_CASES)
def test_gaussian_log_prob_and_entropy_in_closed_form(case):
    agent, obs = make_agent(case), random_obs(case, 5)
    agent.normalize.update(obs)
    policy, _ = agent(obs)
    actions = policy.sample()
    mean = agent.actor(agent.normalize(obs)).detach().double().numpy()
    std = np.exp([-0.7, 0.4])  # as make_agent sets it
    z = (actions.numpy() - mean) / std
    log_prob = (-0.5 * z**2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)
    np.testing.assert_allclose(policy.log_prob(actions).detach(), log_prob, rtol=1e-5)
    entropy = (np.log(std) + 0.5 * math.log(2 * math.pi * math.e)).sum()
    np.testing.assert_allclose(policy.entropy().detach(), np.full(5, entropy), rtol=1e-5)


@over_cases([case for case in CASES if case not in GAUSSIAN_CASES])
def test_categorical_log_prob_and_entropy_in_closed_form(case):
    agent, obs = make_agent(case), random_obs(case, 5)
    policy, _ = agent(obs)
    if case is KL_DISCRETE:
        logits = agent.actor(agent.normalize(obs))
    else:
        logits = agent.actor(agent.network(obs / 255.0))
    logits = logits.detach().double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for action in range(4):
        found = policy.log_prob(torch.full((5,), action)).detach()
        np.testing.assert_allclose(found, np.log(probabilities[:, action]), rtol=1e-4)
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(policy.entropy().detach(), entropy, rtol=1e-4)


@over_cases(CASES)
def test_a_fresh_policy_is_nearly_the_same_everywhere(case):
    torch.manual_seed(0)
    agent = case.script.Agent(case.observation_space, case.action_space)
    policy, _ = agent(random_obs(case, 5))
    if isinstance(policy, Categorical):
        torch.testing.assert_close(policy.probs, torch.full((5, 4), 0.25), rtol=0, atol=0.02)
    else:
        torch.testing.assert_close(policy.mean, torch.zeros(5, 2), rtol=0, atol=0.05)
        torch.testing.assert_close(policy.stddev, torch.ones(5, 2))


@over_cases(CASES)
def test_weights_are_orthogonal(case):
    """All singular values are the gain: √2, 0.01 for the policy's last layer, 1 for the value's."""
    agent = case.script.Agent(case.observation_space, case.action_space)
    actor, critic = (x if isinstance(x, nn.Linear) else x[-1] for x in (agent.actor, agent.critic))
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(layers) == 6 and {actor, critic} < {*layers}
    for layer in layers:
        gains = torch.linalg.svdvals(layer.weight.flatten(1))
        expected = {actor: 0.01, critic: 1.0}.get(layer, math.sqrt(2))
        torch.testing.assert_close(gains, torch.full_like(gains, expected), rtol=1e-4, atol=1e-5)
        assert not layer.bias.any()


# ---- all terms together, [PPO] eq. 9 ----


def random_batch(case, agent, size: int, seed: int = 0) -> Batch:
    """Ratios and values up to ±50 % and ±0.5 away from the old ones, on both sides of every clip."""
    torch.manual_seed(seed)
    obs = random_obs(case, size)
    with torch.no_grad():
        policy, values = agent(obs)
        actions = policy.sample()
        logratio = torch.linspace(-0.5, 0.5, size)[torch.randperm(size)]
        old_values = values + torch.linspace(-0.5, 0.5, size)[torch.randperm(size)]
        return Batch(
            obs,
            actions,
            policy.log_prob(actions) - logratio,
            old_values,
            advantages=torch.randn(size) * 3.0 + 1.0,
            returns=values + torch.randn(size),
        )


def expected_terms(agent, batch: Batch, args) -> dict[str, float]:
    """The parts of the loss in float64 numpy, from what the network returns."""
    policy, values = agent(batch.obs)
    logprobs, entropy = policy.log_prob(batch.actions), policy.entropy()
    values, new, entropy = (x.detach().double().numpy() for x in (values, logprobs, entropy))
    _, _, old, old_values, advantages, returns = (x.double().numpy() for x in batch)
    ratio = np.exp(new - old)
    clip_coef = getattr(args, "clip_coef", math.inf)
    clipped = np.clip(ratio, 1 - clip_coef, 1 + clip_coef)
    error = (values - returns) ** 2
    if getattr(args, "clip_vloss", False):
        kept = np.clip(values, old_values - clip_coef, old_values + clip_coef)
        error = np.maximum(error, (kept - returns) ** 2)
    return {
        "losses/policy_loss": -np.minimum(ratio * advantages, clipped * advantages).mean(),
        "losses/value_loss": 0.5 * error.mean(),
        "losses/entropy": entropy.mean(),
        "losses/old_approx_kl": (old - new).mean(),
        "losses/approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "losses/clipfrac": (np.abs(ratio - 1) > clip_coef).mean(),
    }


@over_cases(CASES)
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_loss_and_metrics_are_those_of_the_paper(case, clip_vloss):
    changes = {"ent_coef": 0.3, "vf_coef": 0.7}
    if case not in KL_CASES:
        changes |= {"clip_vloss": clip_vloss, "clip_coef": 0.2}
    args = make_args(case.script, **changes)
    agent = make_agent(case)
    batch = random_batch(case, agent, 16)
    with torch.no_grad():
        loss, metrics = minibatch_loss(case, agent, batch, args)  # the old policy is the same: KL = 0
    expected = expected_terms(agent, batch, args)
    if case in KL_CASES:
        del expected["losses/clipfrac"]
    else:
        assert 0 < expected["losses/clipfrac"] < 1
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, rel=1e-4)
    policy, value, entropy = (expected[f"losses/{term}"] for term in ("policy_loss", "value_loss", "entropy"))
    assert loss.item() == pytest.approx(policy - 0.3 * entropy + 0.7 * value, rel=1e-4)


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("advantage", [0.0, 0.1, -7.3, 1e6])
def test_equal_advantages_stay_finite(script, advantage):
    """Their deviation is 0: normalising them must not divide by it."""
    assert script.standardize(torch.full((2, 8), advantage)).abs().max() < 10.0


@over_scripts(SCRIPTS)
def test_advantages_are_normalized_row_by_row(script):
    advantages = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 4.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]])  # deviations 1 and 4, of a sample
    torch.testing.assert_close(script.standardize(advantages), expected)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@over_cases(MLP_CASES)
@pytest.mark.usefixtures("float64")
def test_gradient_against_finite_differences(case):
    """Of the whole loss along random directions in the space of all weights."""
    agent, args = make_agent(case).double(), make_args(case.script, ent_coef=0.3, vf_coef=0.7)
    agent.normalize.update(random_obs(case, 32))
    batch = random_batch(case, agent, 16)
    old_policy = other_policy(agent(batch.obs)[0])[0] if case in KL_CASES else None
    parameters = list(agent.parameters())

    def loss() -> torch.Tensor:
        return minibatch_loss(case, agent, batch, args, old_policy, kl_coef=0.5)[0]

    def moved(direction: list[torch.Tensor], h: float) -> float:
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter += h * part
            value = loss().item()
            for parameter, part in zip(parameters, direction, strict=True):
                parameter -= h * part
        return value

    gradients = torch.autograd.grad(loss(), parameters)
    for _ in range(10):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
        difference = (moved(direction, 1e-6) - moved(direction, -1e-6)) / 2e-6
        assert difference == pytest.approx(slope, rel=1e-5, abs=1e-7)
