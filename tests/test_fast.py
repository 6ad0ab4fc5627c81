"""Whatever is there to be fast gives what the plain version gives: NumPy, one vector, torch.compile."""

import copy
import functools
import io
import itertools
import math
import signal
import warnings
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from fakes import (
    ATARI,
    CASES,
    GAUSSIAN_CASES,
    KL_BOX,
    KL_CASES,
    KL_DISCRETE,
    MLP_CASES,
    SCRIPTS,
    make_agent,
    make_args,
    make_rollout,
    over_cases,
    over_scripts,
    random_obs,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

CPU, GPU = torch.device("cpu"), torch.device("cuda")
over_devices = pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
over_vector_scripts = over_scripts([ppo_continuous, ppo_kl_penalty])


def close(found, expected, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def said_nothing_yet():
    """A line that another test has seen would not come again."""
    for script in SCRIPTS:
        script.say_once.cache_clear()


def shift(agent, seed: int = 0) -> None:
    """Every parameter a little."""
    torch.manual_seed(seed)
    for parameter in agent.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)


# ---- acting ----


@torch.no_grad()
def expected_logprobs(case, agent, obs, actions) -> np.ndarray:
    """From the textbook, in float64."""
    policy, _ = agent(obs)
    if case in GAUSSIAN_CASES:
        mean, std, x = (x.double().numpy() for x in (policy.mean, agent.log_std.exp(), actions))
        return (-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2.0 * np.pi)).sum(-1)
    powers = np.exp(policy.logits.double().numpy())
    return np.log((powers / powers.sum(-1, keepdims=True))[np.arange(len(obs)), actions.numpy()])


@over_cases([ATARI])
@torch.no_grad()
def test_act_tells_the_policy_s_log_probabilities_and_values(case):
    """In the other scripts they are computed for the whole rollout; see also test_envs_vector.py."""
    agent, obs = make_agent(case), random_obs(case, 64)
    actions, logprobs, values = case.script.act(agent, obs, agent.noise(64))
    np.testing.assert_allclose(logprobs, expected_logprobs(case, agent, obs, actions), rtol=1e-4, atol=1e-4)
    close(values, agent(obs)[1])
    assert actions.dtype == torch.int64


class StillEnvs:
    """Shows random observations whatever one does, and keeps them; nothing ever ends."""

    def __init__(self, case):
        self.case, self.shown = case, []

    def step(self, actions):
        no = np.zeros(8, dtype=bool)
        self.shown.append(random_obs(self.case, 8))
        return self.case.script.Step(self.shown[-1].numpy(), np.ones(8), no, no, None)

    def scale(self, rewards, dones):
        return rewards


@over_cases(MLP_CASES)
@torch.no_grad()
def test_rollouts_tell_the_policy_s_log_probabilities_and_values(case):
    """However it acts: of the actions taken, each beside the observation that it answers."""
    agent = make_agent(case)
    far_statistics(agent)
    for act in (case.script.act, case.script.numpy_act(agent)):
        rollout, obs = case.script.collect_rollout(agent, StillEnvs(case), random_obs(case, 8), 16, act)
        for t in range(16):
            expected = expected_logprobs(case, agent, rollout.obs[t], rollout.actions[t])
            np.testing.assert_allclose(rollout.logprobs[t], expected, rtol=1e-4, atol=1e-4)
            close(rollout.values[t], agent(rollout.obs[t])[1])
        close(rollout.next_values, torch.cat([rollout.values[1:], agent(obs)[1][None]]))
        assert rollout.actions.dtype == (torch.float32 if case in GAUSSIAN_CASES else torch.int64)


@over_devices
@torch.no_grad()
def test_frames_are_laid_out_for_convolutions(device):
    """So that no minibatch has to rearrange them; each as shown, beside the action that answers it."""
    agent, first, envs = make_agent(ATARI), random_obs(ATARI, 8), StillEnvs(ATARI)
    learner = copy.deepcopy(agent).to(device)
    rollout, last = ATARI.script.collect_rollout(learner, envs, first.to(device), 4)
    assert rollout.obs.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.stack([*rollout.obs, last]).to(CPU), torch.stack([first, *envs.shown]))
    tolerance = 1e-4 if device == CPU else 2e-2  # TF32
    for obs, actions, logprobs in zip(*(x.to(CPU) for x in rollout[:3]), strict=True):
        expected = expected_logprobs(ATARI, agent, obs, actions)
        np.testing.assert_allclose(logprobs, expected, rtol=tolerance, atol=tolerance)


@over_cases(CASES)
@torch.no_grad()
def test_actions_follow_the_policy(case):
    """Within 5 standard errors, in each of 3 states."""
    agent, obs, count = make_agent(case), random_obs(case, 3), 20_000
    policy, _ = agent(obs)
    noise = agent.noise(count, 3)
    actions = agent.sample(policy, noise)
    assert noise.isfinite().all()
    assert actions.shape == (count, 3, *case.action_space.shape)
    if case in GAUSSIAN_CASES:
        mean, std = policy.mean, policy.stddev
        assert ((actions.mean(0) - mean).abs() < 5.0 * std / math.sqrt(count)).all()
        assert ((actions.std(0) - std).abs() < 5.0 * std / math.sqrt(2 * count)).all()
        within = ((actions - mean).abs() < std).float().mean(0)
        assert ((within - 0.6827).abs() < 5.0 * math.sqrt(0.6827 * 0.3173 / count)).all()
    else:
        found = nn.functional.one_hot(actions, 4).float().mean(0)
        error = 5.0 * (policy.probs * (1.0 - policy.probs) / count).sqrt() + 1.0 / count
        assert ((found - policy.probs).abs() < error).all()
        assert (policy.probs - 0.25).abs().max() > 2.0 * error.max()  # so that equal chances would not do
    rows = actions.flatten(1).double() - actions.flatten(1).double().mean(0)
    correlation = (rows[:-1] * rows[1:]).mean(0) / rows.square().mean(0).clamp(min=1e-9)
    assert correlation.abs().max() < 5.0 / math.sqrt(count)  # one draw says nothing of the next


def far_statistics(agent) -> None:
    agent.normalize.mean.copy_(torch.tensor([100.0, -3.0, 0.02]))
    agent.normalize.var.copy_(torch.tensor([25.0, 1e-3, 4.0]))


def far_obs(case, count: int) -> torch.Tensor:
    """Some of the numbers are within ±10 of far_statistics, some are not."""
    return random_obs(case, count) * torch.tensor([30.0, 0.1, 8.0]) + torch.tensor([20.0, -3.0, 0.0])


@over_cases(MLP_CASES)
@torch.no_grad()
def test_acting_in_numpy_is_acting(case):
    """With the weights and statistics of the moment: also those just learnt or loaded."""
    args, agent = make_args(case.script), make_agent(case)
    optimizer, seen = case.script.make_optimizer(agent, args), []

    def check() -> None:
        torch.manual_seed(7)
        obs, noise = far_obs(case, 64), agent.noise(64)
        clipped = agent.normalize(obs).abs() == 10.0
        assert (clipped.any() and not clipped.all()) or agent.normalize.count > 0
        found, expected = (act(agent, obs, noise) for act in (numpy_act, case.script.act))
        assert found.dtype == expected.dtype and found.shape == expected.shape
        close(found, expected, rtol=1e-4, atol=1e-4)
        seen.append(found)

    numpy_act = case.script.numpy_act(agent)
    far_statistics(agent)
    check()
    with torch.enable_grad():
        case.script.update(agent, optimizer, make_rollout(case, agent, args), args)
    check()
    other = make_agent(case, seed=1)
    far_statistics(other)
    agent.load_state_dict(other.state_dict())
    check()
    assert not any(torch.allclose(*pair, rtol=1e-3) for pair in itertools.combinations(seen, 2))


@over_vector_scripts
def test_scaled_rewards_over_many_steps(script):
    """As in float64 from all discounted returns at once, also where rewards are far from 0."""
    random, steps, gamma = np.random.default_rng(0), 400, 0.95
    rewards = random.normal(-20.0, 3.0, (steps, 3)) * np.linspace(0.1, 2.0, steps)[:, None]
    dones = random.random((steps, 3)) < 0.05
    discounted, seen = np.zeros(3), []
    with closing(script.Envs(make_args(script, env_id="Pendulum-v1", gamma=gamma), 3, 0)) as envs:
        envs.reset()
        rollouts = zip(np.split(rewards, 2), np.split(dones, 2), strict=True)
        found = np.concatenate([envs.scale(*rollout) for rollout in rollouts])
        for reward, done, result in zip(rewards, dones, found, strict=True):
            discounted = gamma * discounted + reward
            seen.extend(discounted)
            expected = np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10.0, 10.0)
            np.testing.assert_allclose(result, expected, rtol=1e-5)
            discounted[done] = 0.0


# ---- KL divergence ----


def random_policy(case, count: int, scale: float = 1.0):
    if case is KL_DISCRETE:
        return Categorical(logits=scale * torch.randn(count, 4))
    return Independent(Normal(scale * torch.randn(count, 2), (0.5 * torch.randn(count, 2)).exp()), 1)


@over_cases(KL_CASES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_exact_kl_is_that_of_torch(case, scale):
    torch.manual_seed(0)
    old, new = random_policy(case, 200, scale), random_policy(case, 200, scale)
    close(ppo_kl_penalty.exact_kl(old, new), kl_divergence(old, new), rtol=1e-4, atol=1e-5)
    assert ppo_kl_penalty.exact_kl(old, old).eq(0.0).all()


def test_exact_kl_is_finite_where_that_of_torch_is_not():
    logits = torch.tensor([[0.0, 1000.0, 0.0]], requires_grad=True)
    old, new = Categorical(logits=torch.tensor([[1000.0, 0.0, 0.0]])), Categorical(logits=logits)
    kl = ppo_kl_penalty.exact_kl(old, new)
    assert kl_divergence(old, new).item() == math.inf
    assert kl.item() == pytest.approx(1000.0)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0]]  # towards the old policy


@pytest.mark.parametrize("old, new", [(-20.0, 2.0), (2.0, -20.0)])
def test_exact_kl_is_finite_between_the_bounds_of_log_std(old, new):
    log_std = torch.tensor([new], requires_grad=True)
    old_policy = Independent(Normal(torch.tensor([1.0]), torch.tensor([old]).exp()), 1)
    kl = ppo_kl_penalty.exact_kl(old_policy, Independent(Normal(torch.tensor([-1.0]), log_std.exp()), 1))
    (gradient,) = torch.autograd.grad(kl.sum(), log_std)
    assert kl.isfinite().all() and gradient.isfinite().all() and gradient.sign().item() == (new - old) / 22.0


# ---- float32 on a GPU ----


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_float32_is_rounded_to_tf32_only_by_choice(precision, expected):
    """PyTorch itself would round in convolutions, but not in matrix products."""
    for before in (True, False):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = before
        ppo_atari.prepare(make_args(ppo_atari, precision=precision, device="cpu"))
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == expected


# ---- what `auto` takes ----

UNITS = {"none": {}, "AVX2": {"avx2": True}, "AMX": {"amx_bf16": True}, "AVX-512": {"avx512_bf16": True}}


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_bf16_is_taken_where_the_processor_has_units_for_it(units, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    spaces = SimpleNamespace(observation_space=ATARI.observation_space, action_space=ATARI.action_space)
    agent = ppo_atari.make_agent(make_args(ppo_atari), spaces, CPU)
    assert (agent.dtype == torch.bfloat16) == any("bf16" in unit for unit in units)


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_a_line_says_that_emulated_bf16_is_slow(units, precision, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    spaces = SimpleNamespace(observation_space=ATARI.observation_space, action_space=ATARI.action_space)
    ppo_atari.make_agent(make_args(ppo_atari, precision=precision), spaces, CPU)
    emulated = precision == "bf16" and not any("bf16" in unit for unit in units)
    assert capsys.readouterr().out.startswith("bf16 may be many times slower") == emulated


DEVICES = [  # GPUs that there are, processes, device of ppo_atari.py
    ({"cuda", "mps"}, 1, "cuda"),
    ({"mps"}, 1, "mps"),
    ({"mps"}, 2, "cpu"),
    (set(), 1, "cpu"),
]


@over_scripts(SCRIPTS)
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_the_compilers_processes_outlive_the_terminal(script, monkeypatch):
    """They inherit which signals are blocked; without them it would wait forever."""
    blocked = []

    def start():
        blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        raise OSError("too many processes")

    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    script.start_compiler(CPU)
    assert blocked == []
    with pytest.raises(OSError):
        script.start_compiler(torch.device("cuda"))
    assert blocked == [before | {signal.SIGHUP}] != [before]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@over_scripts(SCRIPTS)
@pytest.mark.parametrize(("gpus", "processes", "device"), DEVICES)
def test_pictures_want_a_gpu_and_vectors_do_not(script, gpus, processes, device, monkeypatch):
    def empty(*_, device):
        raise RuntimeError("stop")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    expected = device if script is ppo_atari else "cpu"
    with pytest.raises(script.ArgumentError, match=f"--device {expected}: stop"):
        script.prepare(make_args(script, device="auto"))


# ---- one vector of all parameters ----


def vector_of(optimizer) -> torch.Tensor:
    (vector,) = optimizer.param_groups[0]["params"]
    return vector


def assert_shares(agent, optimizer) -> None:
    """A change of the vector is one of the agent, and the other way round; in the order of parameters()."""
    vector, pieces = vector_of(optimizer), [parameter.data for parameter in agent.parameters()]
    assert torch.equal(vector.data, torch.cat([piece.flatten() for piece in pieces]))
    before = vector.data.clone()
    vector.data.mul_(2.0)
    assert torch.equal(2.0 * before, torch.cat([piece.flatten() for piece in pieces]))
    for piece in pieces:
        piece.div_(2.0)
    assert torch.equal(vector.data, before)


@over_cases(CASES)
def test_parameters_are_views_of_one_vector(case):
    args, agent, same = make_args(case.script), make_agent(case), make_agent(case)
    optimizer = case.script.make_optimizer(agent, args)
    assert len(optimizer.param_groups) == 1
    assert_shares(agent, optimizer)
    for one, other in zip(agent.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad and one.is_leaf
    assert list(agent.state_dict()) == list(same.state_dict())


@over_cases(CASES)
def test_the_vector_survives_loading(case):
    """What goes on from saved states is what goes on without a break."""
    args, agent = make_args(case.script), make_agent(case)
    optimizer = case.script.make_optimizer(agent, args)
    rollout = make_rollout(case, agent, args)
    case.script.update(agent, optimizer, rollout, args)
    file = io.BytesIO()
    torch.save([agent.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    loaded = make_agent(case, seed=1)
    other = case.script.make_optimizer(loaded, args)
    for part, state in zip((loaded, other), torch.load(file), strict=True):
        part.load_state_dict(state)
    assert_shares(loaded, other)
    for learner, its_optimizer in ((agent, optimizer), (loaded, other)):
        torch.manual_seed(3)
        case.script.update(learner, its_optimizer, rollout, args)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert_shares(loaded, other)


def gradient_inputs(case, agent, args, seed: int = 0) -> list[tuple]:
    """What update() hands to minibatch_gradient() after the agent, for each minibatch; it learns nothing."""
    inputs, learner = [], copy.deepcopy(agent)
    optimizer = case.script.make_optimizer(learner, args)

    def note(_, *rest):
        inputs.append(rest)
        return torch.zeros_like(vector_of(optimizer)), {"losses/approx_kl": torch.zeros(())}

    case.script.update(learner, optimizer, make_rollout(case, agent, args, seed), args, note)
    return inputs


def backward(case, agent, batch, rows, *rest) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As everybody does it: fills parameter.grad; returns the norm before clipping, and the metrics."""
    *old, args = rest
    old = [case.script.rows_of(old[0], rows), old[1]] if old else []
    loss, metrics = case.script.minibatch_loss(agent, [x[rows] for x in batch], *old, args)
    agent.zero_grad()
    loss.backward()
    return nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm), metrics


@over_cases(CASES)
@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e6, math.inf])
def test_minibatch_gradient_is_the_clipped_gradient(case, max_grad_norm):
    args, agent = make_args(case.script, max_grad_norm=max_grad_norm, ent_coef=0.1), make_agent(case)
    minibatches = gradient_inputs(case, agent, args)[:3]
    shift(agent)  # or policy and old policy were the same
    for inputs in minibatches:
        gradient, metrics = case.script.minibatch_gradient(agent, *inputs)
        norm, others = backward(case, agent, *inputs)
        expected = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
        close(gradient, expected, rtol=1e-4, atol=1e-6 * expected.norm().item())
        assert norm.item() > 0.02
        assert gradient.norm().item() == pytest.approx(min(norm.item(), max_grad_norm), rel=1e-3)
        assert metrics.keys() == others.keys() | {"losses/grad_norm"}
        for name, value in (others | {"losses/grad_norm": norm}).items():
            close(metrics[name], value.detach())
        assert not gradient.requires_grad
        assert not any(metric.requires_grad for metric in metrics.values())


@over_cases(CASES)
def test_one_vector_learns_what_separate_parameters_learn(case):
    args, agent = make_args(case.script, learning_rate=1e-3), make_agent(case)
    minibatches = gradient_inputs(case, agent, args)
    plain = copy.deepcopy(agent)
    optimizer = case.script.make_optimizer(agent, args)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3, eps=1e-5)
    clipped = []
    for inputs in minibatches:
        vector_of(optimizer).grad, metrics = case.script.minibatch_gradient(agent, *inputs)
        optimizer.step()
        backward(case, plain, *inputs)
        adam.step()
        clipped.append(metrics["losses/grad_norm"].item() > args.max_grad_norm)
    first = torch.cat([parameter.flatten() for parameter in make_agent(case).parameters()])
    found, expected = (nn.utils.parameters_to_vector(x.parameters()) for x in (agent, plain))
    assert any(clipped)
    assert (expected - first).abs().max() > 5e-3
    assert (found - expected).norm() < 1e-3 * (expected - first).norm()


# ---- where torch.compile fails ----


@over_scripts(SCRIPTS)
def test_without_a_compiler_the_function_itself_is_called(script, monkeypatch, capsys):
    tries = []

    def no_compiler(*inputs):
        tries.append(inputs)
        raise RuntimeError("no C++ compiler\nbut a long\ntrace")

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    double = script.compiled(lambda x: 2 * x, CPU)
    assert tries == []
    assert [double(x) for x in (1, 2, 3)] == [2, 4, 6]
    assert tries == [(1,)]
    triple = script.compiled(lambda x: 3 * x, CPU)
    assert triple(1) == 3
    out, err = capsys.readouterr()
    (line,) = (out + err).splitlines()  # for both
    assert line.startswith("slower without torch.compile: ") and "no C++ compiler" in line


@over_scripts(SCRIPTS)
def test_an_error_of_the_function_itself_is_raised(script, monkeypatch):
    def broken(x):
        raise ValueError(f"not {x}")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    call = script.compiled(broken, CPU)
    for x in (1, 2):
        with pytest.raises(ValueError, match=f"not {x}"):
            call(x)


@over_scripts(SCRIPTS)
def test_results_of_a_cuda_graph_are_kept(script, monkeypatch):
    """Its next replay writes into the same memory; nothing is copied where there is no such graph."""
    memory, graphs = torch.zeros(2), []

    def graph(function, options, **_):
        graphs.append(options["triton.cudagraphs"])
        return lambda x: (memory.copy_(function(x)), {"metric": memory})

    monkeypatch.setattr(torch, "compile", graph)
    call = script.compiled(lambda x: x + 1.0, torch.device("cuda"))
    first, metrics = call(torch.zeros(2))
    call(torch.ones(2))
    assert first.tolist() == metrics["metric"].tolist() == [1.0, 1.0]
    assert script.compiled(lambda x: x, CPU)(torch.zeros(2))[0] is memory
    assert graphs == [True, False]


@over_scripts(SCRIPTS)
def test_no_compile_takes_the_plain_functions(script, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: pytest.fail("compiles"))
    plain = script.accelerate(make_args(script, compile=False), None, CPU)
    assert plain == (script.act, script.minibatch_gradient)


def acts_in_numpy(script, agent, device: torch.device) -> bool:
    act, _ = script.accelerate(make_args(script), agent, device)
    return act.__qualname__.startswith("numpy_act")


@over_scripts([ppo_continuous, ppo_kl_penalty])
def test_training_acts_with_what_accelerate_returns(script, monkeypatch, tmp_path):
    acts, collect = [], script.collect_rollout

    def collecting(*inputs):
        acts.append(inputs[-1])
        return collect(*inputs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "collect_rollout", collecting)
    monkeypatch.setattr(script, "compiled", lambda function, device: function)
    for compiles in (True, False):
        env_id = "Pendulum-v1" if script is ppo_continuous else "CartPole-v1"
        script.train(make_args(script, env_id=env_id, run_name=str(compiles), compile=compiles))
    assert [act.__qualname__.startswith("numpy_act") for act in acts] == [True] * 4 + [False] * 4


@over_cases(MLP_CASES)
def test_small_networks_act_in_numpy_on_a_cpu(case):
    script, agent, state = case.script, make_agent(case), torch.get_rng_state()
    assert acts_in_numpy(script, agent, CPU)
    assert not acts_in_numpy(script, agent, torch.device("cuda"))
    assert torch.equal(torch.get_rng_state(), state)


@over_cases(MLP_CASES)
def test_many_environments_do_not_act_in_numpy(case):
    """Whose products of large matrices take as many threads as there are cores."""
    script, agent = case.script, make_agent(case)
    widest = max(x.numel() for x in agent.parameters())
    for num_envs, small in ((2**18 // widest, True), (2**18 // widest + 1, False)):
        args = make_args(script, num_envs=num_envs, total_timesteps=1_000_000)
        act, _ = script.accelerate(args, agent, CPU)
        assert act.__qualname__.startswith("numpy_act") == small


@over_cases(MLP_CASES)
@pytest.mark.parametrize("change", ["relu", "tanh at the end", "temperature", "input", "no normalize"])
def test_a_changed_agent_does_not_act_in_numpy(case, change):
    """Somebody who copies the script and changes its Agent need not know of numpy_act(), nor be lucky."""
    script, agent = case.script, make_agent(case)
    if change == "relu":
        agent.actor[1] = torch.nn.ReLU()
    elif change == "tanh at the end":
        agent.actor.register_forward_hook(lambda module, inputs, output: output.tanh())
    elif change == "temperature":  # the likeliest action stays
        agent.actor.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    elif change == "input":
        agent.normalize.register_forward_hook(lambda module, inputs, output: output.clamp(-5.0, 5.0))
    else:
        agent.normalize = torch.nn.Identity()
    for seed in range(20):
        torch.manual_seed(seed)
        assert not script.agrees(agent)
    assert not acts_in_numpy(script, agent, CPU)


@over_cases(MLP_CASES)
def test_an_agent_as_it_is_acts_in_numpy(case):
    agent = make_agent(case)
    for seed in range(20):
        torch.manual_seed(seed)
        assert case.script.agrees(agent)


# ---- compiled for real ----


@pytest.fixture
def compiling(monkeypatch):
    """What conftest.py turns off; a second compilation of a function is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def recorded() -> int:
    """Grows whenever a CUDA graph is recorded."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"]


def small_cnn(channels: int) -> nn.Sequential:  # (M, channels, 84, 84) -> (M, 512)
    layers = [nn.Conv2d(channels, 4, 12, stride=12), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 512)]
    return nn.Sequential(*layers, nn.ReLU())


def small_agent(case, monkeypatch):
    if case is not ATARI:
        return make_agent(case)
    monkeypatch.setattr(ppo_atari, "nature_cnn", small_cnn)
    torch.manual_seed(0)
    agent = ppo_atari.Agent(case.observation_space, case.action_space)
    agent.actor.weight.data *= 50.0
    return agent


def rollout_on(device: torch.device, case, agent, args, seed: int = 0):
    rollout = make_rollout(case, copy.deepcopy(agent).to(CPU), args, seed)
    return case.script.Rollout(*(x.to(device) for x in rollout))


@pytest.mark.slow
@over_cases(CASES)
@over_devices
def test_compiled_learning_is_learning(case, device, compiling, monkeypatch, capsys):
    """On every minibatch of 3 iterations, in which β, the old policy and the statistics change."""
    target = {"kl_target": 1e-6} if case in KL_CASES else {}
    args, agent = make_args(case.script, **target), small_agent(case, monkeypatch).to(device)
    optimizer = case.script.make_optimizer(agent, args)
    _, fast = case.script.accelerate(args, agent, device)
    norms, coefs, rtol = [], set(), 1e-5 if device == CPU else 1e-2  # TF32

    def compared(*inputs):
        gradient, metrics = fast(*inputs)
        expected, others = case.script.minibatch_gradient(*inputs)
        assert (gradient - expected).norm() < rtol * expected.norm()
        assert metrics.keys() == others.keys()
        for name in metrics:
            close(metrics[name], others[name], rtol=rtol, atol=0.1 * rtol)
        assert not gradient.requires_grad
        norms.append(others["losses/grad_norm"].item())
        return gradient, metrics

    recordings = set()
    for iteration in range(3):
        rollout = rollout_on(device, case, agent, args, iteration)
        metrics = case.script.update(agent, optimizer, rollout, args, compared)
        coefs.add(metrics.get("charts/kl_coef", iteration))
        recordings.add(recorded())
    assert len(recordings) == 1 and (recordings == {0}) == (device == CPU)
    assert len(norms) == len(set(norms)) == 24
    assert len(coefs) == 3
    assert graphs() == 1
    assert capsys.readouterr().out == ""  # no warning that it went on without


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "device"),
    [(ATARI, CPU), *(pytest.param(case, GPU, marks=pytest.mark.gpu) for case in CASES)],
    ids=lambda x: getattr(x, "name", str(x)),
)
@torch.no_grad()
def test_compiled_acting_is_acting(case, device, compiling, monkeypatch, capsys):
    """Also after a change of the weights, without compiling again; earlier results stay as they were."""
    args, agent = make_args(case.script), small_agent(case, monkeypatch).to(device)
    case.script.make_optimizer(agent, args)
    fast, _ = case.script.accelerate(args, agent, device)
    results, rtol = [], 1e-4 if device == CPU else 1e-2  # TF32
    for step in range(4):
        obs, noise = random_obs(case, 8).to(device), agent.noise(3, 8)[step % 3]
        results.append((fast(agent, obs, noise), case.script.act(agent, obs, noise)))
        shift(agent, step)
    for found, expected in results:
        close(found, expected, rtol=rtol, atol=0.1 * rtol)
    actions = [found[0] if case is ATARI else found for found, _ in results]
    assert not torch.equal(actions[0], actions[1])
    assert graphs() == 1 and (recorded() == 0) == (device == CPU)
    assert capsys.readouterr().out == ""


def losses(folder) -> dict[str, list[float]]:
    reader = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag.startswith("losses/")]
    return {tag: [event.value for event in reader.Scalars(tag)] for tag in tags}


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(compiling, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    steps = {"env_id": "CartPole-v1", "num_steps": 32, "total_timesteps": 192, "seed": 3}
    for name, compiles in (("plain", False), ("compiled", True)):
        ppo_kl_penalty.train(make_args(ppo_kl_penalty, **steps, run_name=name, compile=compiles))
        assert graphs() == compiles
    assert "slower without" not in capsys.readouterr().out
    found, expected = losses(tmp_path / "runs" / "compiled"), losses(tmp_path / "runs" / "plain")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(values) == 3
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    assert expected["losses/kl"][0] > 1e-6 and len(set(expected["losses/grad_norm"])) == 3


@pytest.mark.slow
@over_scripts(SCRIPTS)
def test_compiled_runs_repeat_bit_by_bit(script, compiling, monkeypatch, tmp_path, capsys):
    """On two threads where threads are not set; also after a run with other arguments in the same process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_atari, "nature_cnn", small_cnn)
    args = make_args(script, **ENVIRONMENTS[script], seed=3)
    assert args.compile
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for name, ent_coef in (("one", 0.01), ("other", 0.02), ("again", 0.01)):
            script.train(replace(args, run_name=name, ent_coef=ent_coef))
    finally:
        torch.set_num_threads(threads)
    assert graphs() == (6 if script is ppo_atari else 3)
    assert "slower without" not in capsys.readouterr().out
    one, other, again = (losses(tmp_path / "runs" / name) for name in ("one", "other", "again"))
    assert one == again != other


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(compiling, capsys):
    """For real: Inductor finds none."""
    args, agent = make_args(ppo_kl_penalty), make_agent(KL_BOX)
    optimizer = ppo_kl_penalty.make_optimizer(agent, args)
    _, fast = ppo_kl_penalty.accelerate(args, agent, CPU)
    absent = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(absent):
        metrics = ppo_kl_penalty.update(agent, optimizer, make_rollout(KL_BOX, agent, args), args, fast)
    assert all(math.isfinite(value) for value in metrics.values())
    out, err = capsys.readouterr()
    (line,) = (out + err).splitlines()
    assert line.startswith("slower without torch.compile: ")


# ---- on a GPU ----


def waits(function) -> int:
    """How often the CPU waits for the GPU in it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.gpu
@over_cases(CASES)
def test_minibatches_do_not_wait_for_the_gpu(case, monkeypatch):
    """Only the beginning and the end of an update do."""
    monkeypatch.setattr(Distribution, "_validate_args", False)  # as prepare() does
    counts = []
    for epochs in (1, 4):
        args, agent = make_args(case.script, update_epochs=epochs), make_agent(case).to(GPU)
        optimizer, rollout = case.script.make_optimizer(agent, args), rollout_on(GPU, case, agent, args)
        learn = functools.partial(case.script.update, agent, optimizer, rollout, args)
        learn()  # the first time may wait for more
        counts.append(waits(learn))
    assert counts[0] == counts[1] > 0


ENVIRONMENTS = {
    ppo_atari: {"env_id": "PongNoFrameskip-v4", "precision": "fp32"},
    ppo_continuous: {"env_id": "Pendulum-v1"},
    ppo_kl_penalty: {"env_id": "CartPole-v1"},
}


@pytest.mark.gpu
@pytest.mark.slow
@over_scripts(SCRIPTS)
def test_a_run_on_a_gpu_is_that_on_the_cpu(script, compiling, monkeypatch, tmp_path, capsys):
    """In its first iteration; later ones differ by rounding. Then resumed, and evaluated on the CPU."""
    monkeypatch.chdir(tmp_path)
    args = make_args(script, **ENVIRONMENTS[script], compile=False, seed=3)
    script.train(replace(args, run_name="cpu"))
    on_gpu = replace(args, run_name="gpu", device=str(GPU), compile=True)
    script.train(on_gpu)
    found, expected = (losses(tmp_path / "runs" / name) for name in ("gpu", "cpu"))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(found[name]) == len(values) == 4
        assert found[name][0] == pytest.approx(values[0], rel=0.05, abs=1e-3), name
    torch._dynamo.reset()
    script.train(replace(on_gpu, resume=True, total_timesteps=128))
    assert len(losses(tmp_path / "runs" / "gpu")["losses/value_loss"]) == 8
    script.evaluate_checkpoint(replace(args, evaluate="runs/gpu", eval_episodes=1))
    assert "slower without" not in capsys.readouterr().out
