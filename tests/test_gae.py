"""Generalized advantage estimation against hand-computed cases and its definition, [GAE] eq. 16."""

import pytest
import torch
from fakes import SCRIPTS, over_scripts

ROLLOUT = ("rewards", "values", "next_values", "terminations", "dones")


def gae(script, rollout: dict[str, torch.Tensor], gamma: float, gae_lambda: float):
    return script.compute_gae(*(rollout[name] for name in ROLLOUT), gamma, gae_lambda)


def random_rollout(steps: int = 12, envs: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64, with episodes that end by termination and by time limit anywhere in the rollout."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(steps, envs, generator=generator, dtype=torch.float64)

    def coins(probability: float) -> torch.Tensor:
        return (torch.rand(steps, envs, generator=generator, dtype=torch.float64) < probability).double()

    dones = coins(0.4)
    terminations = dones * coins(0.5)
    assert 0 < terminations.sum() < dones.sum() < dones.numel()
    return dict(zip(ROLLOUT, (normal(), normal(), normal(), terminations, dones), strict=True))


# γ = λ = 1/2, rewards 1, 2, 3, values 4, 5, 6 and V(s_{t+1}) 5, 6, 8; with no end of an episode
#   δ0 = 1 + 5/2 − 4 = −1/2      δ1 = 2 + 6/2 − 5 = 0       δ2 = 3 + 8/2 − 6 = 1
#   A2 = δ2 = 1                  A1 = 0 + 1/4 · 1 = 1/4     A0 = −1/2 + 1/4 · 1/4 = −7/16
HAND_COMPUTED = {
    "no end": dict(next_values=[5, 6, 8], terminations=[0, 0, 0], dones=[0, 0, 0], gae=[-0.4375, 0.25, 1]),
    # δ1 = 2 − 5 = −3 without the value beyond; A1 = −3; A0 = −1/2 − 3/4
    "terminal": dict(next_values=[5, 6, 8], terminations=[0, 1, 0], dones=[0, 1, 0], gae=[-1.25, -3, 1]),
    # V(final observation) = 10: δ1 = 2 + 10/2 − 5 = 2; A1 = 2, nothing of A2; A0 = −1/2 + 2/4
    "time limit": dict(next_values=[5, 10, 8], terminations=[0, 0, 0], dones=[0, 1, 0], gae=[0, 2, 1]),
    # δ2 = 3 − 6 = −3; A1 = 0 − 3/4; A0 = −1/2 − 3/16
    "terminal last": dict(
        next_values=[5, 6, 8], terminations=[0, 0, 1], dones=[0, 0, 1], gae=[-0.6875, -0.75, -3]
    ),
    # a rollout that ends at a time limit, V(final observation) = 8, is like one that goes on at V = 8
    "time limit last": dict(
        next_values=[5, 6, 8], terminations=[0, 0, 0], dones=[0, 0, 1], gae=[-0.4375, 0.25, 1]
    ),
    # every step an episode: A_t = δ_t; δ0 = 1 − 4, δ1 = 2 + 6/2 − 5, δ2 = 3 − 6
    "all ends": dict(next_values=[5, 6, 8], terminations=[1, 0, 1], dones=[1, 1, 1], gae=[-3, 0, -3]),
}


def columns(names) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Hand-computed cases side by side, one environment each."""
    cases = [HAND_COMPUTED[name] for name in names]
    rollout = {"rewards": [[1, 2, 3]] * len(cases), "values": [[4, 5, 6]] * len(cases)}
    for name in ROLLOUT[2:]:
        rollout[name] = [case[name] for case in cases]
    tensors = {name: torch.tensor(rows, dtype=torch.float32).T for name, rows in rollout.items()}
    return tensors, torch.tensor([case["gae"] for case in cases], dtype=torch.float32).T


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_hand_computed(script, name):
    rollout, expected = columns([name])
    advantages, returns = gae(script, rollout, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == expected.tolist()  # all numbers are exact in binary
    assert returns.tolist() == (expected + torch.tensor([[4.0], [5.0], [6.0]])).tolist()


@over_scripts(SCRIPTS)
def test_environments_do_not_mix(script):
    rollout, expected = columns(HAND_COMPUTED)
    advantages, returns = gae(script, rollout, gamma=0.5, gae_lambda=0.5)
    assert advantages.shape == returns.shape == (3, len(HAND_COMPUTED))
    assert advantages.tolist() == expected.tolist()


def double_sum(rollout, gamma: float, gae_lambda: float) -> torch.Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l} up to the end of the episode or of the rollout, one number at a time."""
    rows = {name: tensor.tolist() for name, tensor in rollout.items()}
    steps, envs = rollout["rewards"].shape
    advantages = torch.zeros(steps, envs, dtype=torch.float64)
    for env in range(envs):
        for t in range(steps):
            for k in range(t, steps):
                beyond = 0.0 if rows["terminations"][k][env] else rows["next_values"][k][env]
                delta = rows["rewards"][k][env] + gamma * beyond - rows["values"][k][env]
                advantages[t, env] += (gamma * gae_lambda) ** (k - t) * delta
                if rows["dones"][k][env]:
                    break
    return advantages


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)])
def test_equals_its_definition(script, gamma, gae_lambda):
    for seed in range(3):
        rollout = random_rollout(seed=seed)
        advantages, returns = gae(script, rollout, gamma, gae_lambda)
        expected = double_sum(rollout, gamma, gae_lambda)
        torch.testing.assert_close(advantages, expected)
        torch.testing.assert_close(returns, expected + rollout["values"])


@over_scripts(SCRIPTS)
def test_lambda_0_is_the_one_step_error(script):
    rollout = random_rollout()
    advantages, _ = gae(script, rollout, gamma=0.9, gae_lambda=0.0)
    beyond = torch.where(rollout["terminations"] == 1, 0.0, rollout["next_values"])
    torch.testing.assert_close(advantages, rollout["rewards"] + 0.9 * beyond - rollout["values"])


@over_scripts(SCRIPTS)
def test_lambda_1_returns_are_discounted_sums_of_rewards(script):
    """With λ = 1 the critic counts only where the rewards stop: at a time limit or the end of the rollout."""
    rollout = random_rollout()
    inside = rollout["dones"][:-1] == 0  # the sum telescopes where V(s_{t+1}) is the value of the next row
    rollout["next_values"][:-1] = torch.where(inside, rollout["values"][1:], rollout["next_values"][:-1])
    _, returns = gae(script, rollout, gamma=0.9, gae_lambda=1.0)
    steps, envs = returns.shape
    for env in range(envs):
        for t in range(steps):
            end = next((k for k in range(t, steps) if rollout["dones"][k, env]), steps - 1)
            expected = sum(0.9 ** (k - t) * rollout["rewards"][k, env] for k in range(t, end + 1))
            if not rollout["terminations"][end, env]:
                expected += 0.9 ** (end - t + 1) * rollout["next_values"][end, env]
            torch.testing.assert_close(returns[t, env], expected)


def with_end_at(t: int, terminal: bool) -> dict[str, torch.Tensor]:
    rollout = random_rollout(seed=1)
    rollout["dones"] = torch.zeros_like(rollout["dones"])
    rollout["terminations"] = torch.zeros_like(rollout["dones"])
    rollout["dones"][t] = 1.0
    rollout["terminations"][t] = float(terminal)
    return rollout


def changed_after(t: int, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same up to row t, another world from row t + 1 on."""
    other = random_rollout(seed=2)
    other["rewards"] += 10.0
    return {name: torch.cat([rollout[name][: t + 1], other[name][t + 1 :]]) for name in ROLLOUT}


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "time limit"])
def test_nothing_leaks_over_the_end_of_an_episode(script, terminal):
    rollout = with_end_at(6, terminal)
    before, _ = gae(script, rollout, gamma=0.99, gae_lambda=0.95)
    after, _ = gae(script, changed_after(6, rollout), gamma=0.99, gae_lambda=0.95)
    assert torch.equal(before[:7], after[:7])
    assert not torch.isclose(before[7:], after[7:]).any()


@over_scripts(SCRIPTS)
def test_within_an_episode_all_that_follows_counts(script):
    rollout = with_end_at(11, terminal=True)
    before, _ = gae(script, rollout, gamma=0.99, gae_lambda=0.95)
    after, _ = gae(script, changed_after(6, rollout), gamma=0.99, gae_lambda=0.95)
    assert not torch.isclose(before, after).any()


@over_scripts(SCRIPTS)
@pytest.mark.parametrize("terminal, gain", [(True, 0.0), (False, 0.99)], ids=["terminal", "time limit"])
def test_only_a_time_limit_counts_the_value_beyond(script, terminal, gain):
    """Raising V(s_{t+1}) at the end of an episode by 1 raises A_t by γ there, and by nothing if terminal."""
    rollout = with_end_at(6, terminal)
    before, _ = gae(script, rollout, gamma=0.99, gae_lambda=0.95)
    rollout["next_values"][6] += 1.0
    after, _ = gae(script, rollout, gamma=0.99, gae_lambda=0.95)
    expected = torch.zeros_like(before)
    for t in range(7):
        expected[t] = gain * (0.99 * 0.95) ** (6 - t)
    torch.testing.assert_close(after - before, expected)
