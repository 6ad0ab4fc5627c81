"""A GPU computes what the CPU computes, with CUDA graphs as well. Needs one."""

import warnings
from dataclasses import replace

import pytest
import torch
from fakes import (
    CASES,
    KL_CASES,
    SCRIPTS,
    make_agent,
    make_args,
    make_rollout,
    over_cases,
    over_scripts,
    random_obs,
)
from test_fast import close, graphs, losses

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")


def rollout_on_gpu(case, args, seed: int = 0):
    return case.script.Rollout(*(x.to(GPU) for x in make_rollout(case, make_agent(case), args, seed)))


@pytest.mark.slow
@over_cases(CASES)
def test_compiled_learning_is_learning(case, compiling, capsys):
    """On every minibatch of 3 iterations, in which β, the old policy and the statistics change."""
    target = {"kl_target": 1e-6} if case in KL_CASES else {}
    args, agent, norms = make_args(case.script, **target), make_agent(case).to(GPU), []
    optimizer = case.script.make_optimizer(agent, args)
    _, fast = case.script.accelerate(args, agent, GPU)

    def compared(*inputs):
        gradient, metrics = fast(*inputs)
        expected, others = case.script.minibatch_gradient(*inputs)
        assert gradient.device.type == expected.device.type == GPU.type
        assert (gradient - expected).norm() < 1e-2 * expected.norm()  # TF32 in convolutions
        assert metrics.keys() == others.keys()
        for name in metrics:
            close(metrics[name], others[name], rtol=1e-2, atol=1e-3)
        norms.append(others["losses/grad_norm"].item())
        return gradient, metrics

    for iteration in range(3):
        case.script.update(agent, optimizer, rollout_on_gpu(case, args, iteration), args, compared)
    assert len(norms) == len(set(norms)) == 24
    assert graphs() == 1
    assert capsys.readouterr().out == ""  # no warning that it went on without


@pytest.mark.slow
@over_cases(CASES)
@torch.no_grad()
def test_compiled_acting_is_acting(case, compiling, capsys):
    """Also after a change of the weights; earlier results stay as they were."""
    args, agent, kept = make_args(case.script), make_agent(case).to(GPU), []
    case.script.make_optimizer(agent, args)
    fast, _ = case.script.accelerate(args, agent, GPU)
    for step in range(4):
        obs, noise = random_obs(case, 8).to(GPU), agent.noise(3, 8)[step % 3]
        found, expected = fast(agent, obs, noise), case.script.act(agent, obs, noise)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and one.device.type == GPU.type
            kept.append((one, other, one.clone()))
        for parameter in agent.parameters():
            parameter.data *= 1.01
    for one, other, then in kept:
        assert torch.equal(one, then)
        close(one, other, rtol=1e-2, atol=1e-2)
    assert graphs() == 1
    assert capsys.readouterr().out == ""


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


@over_cases(CASES)
def test_minibatches_do_not_wait_for_the_gpu(case):
    """Only the beginning and the end of an update do."""
    counts = []
    for epochs in (1, 4):
        args, agent = make_args(case.script, update_epochs=epochs), make_agent(case).to(GPU)
        optimizer, rollout = case.script.make_optimizer(agent, args), rollout_on_gpu(case, args)
        case.script.update(agent, optimizer, rollout, args)  # the first time may wait for more
        counts.append(waits(lambda: case.script.update(agent, optimizer, rollout, args)))  # noqa: B023
    assert counts[0] == counts[1] > 0


ENVIRONMENTS = {
    ppo_atari: {"env_id": "PongNoFrameskip-v4", "precision": "fp32"},
    ppo_continuous: {"env_id": "Pendulum-v1"},
    ppo_kl_penalty: {"env_id": "CartPole-v1"},
}


@pytest.mark.slow
@over_scripts(SCRIPTS)
def test_a_run_is_that_of_the_cpu(script, compiling, monkeypatch, tmp_path, capsys):
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
