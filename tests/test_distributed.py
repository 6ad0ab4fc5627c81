"""Two processes learn what one would; they write one run, stop together and come back."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import SCRIPTS, next_second, over_scripts, rows, scalars, tiny
from gymnasium.spaces import Box, Discrete
from torch import distributed

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).resolve().parents[1]
KL = ppo_kl_penalty


def small_network(*_):
    """Nature's takes seconds to initialise and megabytes to save."""
    layers = torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(36, 512), torch.nn.ReLU()
    return torch.nn.Sequential(*layers)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ppo_atari, "nature_cnn", small_network)


# ---- two processes, which do all jobs of this file ----


def work(rank, port, pipe):
    """One of them: what torchrun would set, then what comes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ppo_atari.nature_cnn = small_network
    for script in SCRIPTS:  # imported before
        script.RANK, script.WORLD_SIZE = rank, 2
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))  # what hangs fails
    while True:
        job, name, *inputs = pipe.recv()
        try:
            pipe.send(job(sys.modules[name], *inputs))
        except BaseException:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def pair():
    """Calls job(script, *inputs) in both; returns what the first and what the second returned."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(2):
        pipe, end = context.Pipe()
        pipes.append(pipe)
        context.Process(target=work, args=(rank, store.port, end), daemon=True).start()

    def call(job, script, *inputs):
        for pipe in pipes:
            pipe.send((job, script.__name__, *inputs))
        assert all(pipe.poll(90.0) for pipe in pipes), "they hang"
        results = [pipe.recv() for pipe in pipes]
        assert not any(isinstance(result, str) for result in results), "\n".join(map(str, results))
        return results

    yield call
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def numpy(tensors):
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


# ---- the same update in one process and in two ----


def make_agent(script):
    torch.manual_seed(0)
    if script is ppo_atari:
        return script.Agent(Box(0, 255, (4, 84, 84), np.uint8), Discrete(4))
    return script.Agent(Box(-np.inf, np.inf, (3,)), Box(-np.inf, np.inf, (2,)))


@torch.no_grad()
def make_rollout(script):
    """Of 16 steps in 4 environments; the second two went another way."""
    agent = make_agent(script)
    torch.manual_seed(1)
    obs = torch.randint(256, (64, 4, 84, 84), dtype=torch.uint8)
    obs = obs if script is ppo_atari else 1.0 + 2.0 * torch.randn(64, 3)
    policy, values = agent(obs)
    actions, second = policy.sample(), (torch.arange(64) % 4 > 1) * 1.0
    numbers = {"obs": obs, "actions": actions, "values": values}
    numbers |= {name: torch.randn(64) for name in script.Rollout._fields if name not in numbers}
    numbers["logprobs"] = policy.log_prob(actions) + 0.2 * torch.randn(64) - 0.3 * second
    if script is KL:
        means = policy.mean + 0.2 * second[:, None]
        numbers["old"] = torch.cat([means, 0.8 * policy.stddev], -1)
    return script.Rollout(**{name: x.unflatten(0, (16, 4)) for name, x in numbers.items()})


def learn(script, changes, half=None):
    """An update by all environments, or by a half: that of the process, or a given one."""
    args = tiny(script, num_envs=4, num_steps=16, num_minibatches=1, **changes)
    rollout, agent, gradients = make_rollout(script), make_agent(script), []
    half = script.RANK if script.WORLD_SIZE > 1 else half
    if half is not None:
        rollout = script.Rollout(*(x[:, 2 * half : 2 * half + 2] for x in rollout))
    optimizer, coef = script.make_optimizer(agent, args), [1.0] * (script in (KL, ppo_atari))

    def gradient(*inputs):
        vector, metrics = script.minibatch_gradient(*inputs)
        gradients.append(vector.numpy().copy())
        return vector, metrics

    metrics = script.update(agent, optimizer, rollout, *coef, args, gradient)
    metrics.pop("losses/explained_variance")  # of the process's own transitions
    found = {"gradient": gradients[0], "epochs": len(gradients)}
    return found | {"metrics": metrics, "agent": numpy(agent.state_dict())}


@over_scripts(SCRIPTS)
def test_the_gradient_is_that_of_the_mean(script, pair):
    """As if one process had all environments; averaged before its norm is taken and limited."""
    changes = {"norm_adv": False, "max_grad_norm": 0.01, "learning_rate": 1e-5}
    one, two = learn(script, changes), pair(learn, script, changes)
    assert one["metrics"]["losses/grad_norm"] > 0.02
    for mine in two:
        np.testing.assert_allclose(mine["gradient"], one["gradient"], atol=1e-6)
        assert mine["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)
        for name, value in one["agent"].items():  # weights, and statistics of observations
            np.testing.assert_allclose(mine["agent"][name], value, 1e-4, 3e-5, err_msg=name)
            np.testing.assert_array_equal(mine["agent"][name], two[0]["agent"][name])
    assert two[0]["metrics"] == two[1]["metrics"]


@over_scripts(SCRIPTS)
def test_advantages_are_normalised_in_each_process(script, pair):
    changes = {"max_grad_norm": 1e6, "update_epochs": 1}
    alone = [learn(script, changes, half)["gradient"] for half in (0, 1)]
    scale = abs(alone[0]).max()
    assert abs(alone[0] - alone[1]).max() > 0.1 * scale
    for mine in pair(learn, script, changes):
        np.testing.assert_allclose(mine["gradient"], sum(alone) / 2.0, atol=1e-4 * scale)


@over_scripts(SCRIPTS[:2])
def test_all_processes_stop_at_the_same_epoch(script, pair):
    """Where one alone would stop and the other go on, or they would wait for each other."""
    changes = {"learning_rate": 1e-6, "norm_adv": False}
    kls = [learn(script, changes, half)["metrics"]["losses/approx_kl"] for half in (0, 1)]
    assert min(kls) < 0.8 * max(kls)
    for beyond, epochs in ((max(kls), 2), (min(kls), 1)):
        target = float(np.mean(kls) + beyond) / 2
        two = pair(learn, script, changes | {"target_kl": target})
        assert [mine["epochs"] for mine in two] == [epochs, epochs]


@over_scripts(SCRIPTS)
def test_each_process_has_a_part_of_the_environments(script, monkeypatch):
    args, seen, seeds = tiny(script, num_envs=4), [], []
    for rank, processes in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(script, "RANK", rank)
        monkeypatch.setattr(script, "WORLD_SIZE", processes)
        envs = script.Envs(args, [args.seed, 0])
        seen.append(envs.reset())
        seeds.append([int(seed) for seed in envs.seeds])
        envs.step(np.zeros((args.num_envs // processes, *envs.action_space.shape), int))
        assert envs.global_step == args.num_envs
        envs.envs.close()
    assert seeds[0] == seeds[1] + seeds[2] and len({*seeds[0]}) == args.num_envs
    np.testing.assert_array_equal(np.concatenate(seen[1:]), seen[0])


def scale(script):
    envs = script.Envs(tiny(script, num_envs=4), [1, 0])
    rewards = np.random.default_rng(0).normal(size=(16, 4)) * [1.0, 2.0, 3.0, 4.0]
    mine = rewards[:, script.RANK * 2 :][:, : len(envs.returns)]
    envs.scale_rewards(mine, np.zeros_like(mine, dtype=bool), 0.99)
    return envs.return_stats * script.WORLD_SIZE


def test_statistics_of_rewards_are_those_of_all_environments(pair):
    one = scale(ppo_continuous)
    for mine in pair(scale, ppo_continuous):
        np.testing.assert_allclose(mine, one)


# ---- runs ----


def train(script, folder, changes):
    """train() in a folder; the agent it ends with, and the first actions."""
    seen, update, here = [], script.update, Path.cwd()

    def learn(agent, optimizer, rollout, *rest):
        seen.append((agent, rollout.actions.numpy().copy()))
        return update(agent, optimizer, rollout, *rest)

    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", learn)
        script.train(tiny(script, **changes))
    os.chdir(here)
    return {"agent": numpy(seen[0][0].state_dict()), "actions": seen[0][1]}


def load(run):
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


def assert_complete(run, batch, steps):
    """Every iteration and every episode is there, once."""
    points = {name: [step for step, _ in values] for name, values in scalars(run).items()}
    episodes = [step for step, *_ in rows(run)]
    assert points["losses/policy_loss"] == [*range(batch, steps + 1, batch)]
    assert points["charts/episodic_return"] == episodes == sorted(episodes)
    assert load(run)["global_step"] == steps


@over_scripts(SCRIPTS)
def test_a_run_of_two_goes_on_with_one_and_with_two(script, tmp_path, pair):
    run, changes, pairs = tmp_path / "runs" / "run", {"resume": True}, []
    for iterations in (2, 3, 4):
        both = partial(pair, train) if iterations != 3 else train
        pairs.append(both(script, tmp_path, changes | {"iterations": iterations}))
        assert_complete(run, 16, 16 * iterations)
        assert sum(length for *_, length in rows(run)) > 16  # those of the first alone are fewer
        next_second()
    del pairs[1]  # of one process
    for first, second in pairs:
        for name, value in first["agent"].items():
            np.testing.assert_array_equal(value, second["agent"][name], err_msg=name)
        assert (first["actions"] != second["actions"]).any()  # they do not do the same twice
    for name, value in load(run)["agent"].items():
        np.testing.assert_array_equal(value.numpy(), first["agent"][name], err_msg=name)
    assert (pairs[0][1]["actions"] != pairs[1][1]["actions"]).any()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


def workers(torchrun):
    """Process ids in order of rank, from Linux."""
    return Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()


def wait_for(condition, torchrun):
    deadline = time.monotonic() + 120.0
    while not condition():
        assert torchrun.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_job_restarts_after_sigkill_and_ends_saved_after_sigterm(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", ROOT / "ppo_kl_penalty.py", "--env-id", "CartPole-v1"]
    command += "--num-envs 4 --num-steps 64 --num-minibatches 2 --update-epochs 1".split()
    command += "--no-compile --run-name run --resume --checkpoint-interval 0".split()
    run, surroundings = tmp_path / "runs" / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    surroundings |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    with open(tmp_path / "out", "w") as out:
        options = {"cwd": tmp_path, "env": surroundings, "stdout": out, "stderr": out}
        with subprocess.Popen(command, **options) as torchrun:
            try:
                wait_for((run / "checkpoints" / "last.pt").exists, torchrun)
                killed = {*workers(torchrun)}
                os.kill(int(workers(torchrun)[1]), signal.SIGKILL)
                wait_for(lambda: len({*workers(torchrun)} - killed) == 2, torchrun)
                reached = load(run)["global_step"]
                wait_for(lambda: load(run)["global_step"] > reached, torchrun)
                torchrun.send_signal(signal.SIGTERM)
                assert torchrun.wait(60.0) != 0
            finally:
                for pid in workers(torchrun) if torchrun.poll() is None else ():
                    os.kill(int(pid), signal.SIGKILL)
                torchrun.kill()
    done = load(run)["global_step"]
    assert 256 <= reached < done < 1_000_000
    assert_complete(run, 256, done)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.pt", "last.pt"}
    lines = (tmp_path / "out").read_text().splitlines()
    for what in ("arguments as they were", "tensorboard --logdir "):  # of one process
        assert sum(what in line for line in lines) == 1


@over_scripts(SCRIPTS)
def test_how_processes_meet(script, monkeypatch):
    """An attempt finds no addresses of the one before; each process has a GPU of its own."""
    store, started = distributed.HashStore(), {}
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(store, 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda **x: started.update(x))
    with monkeypatch.context() as patch:
        fake = lambda *_, device: SimpleNamespace(device=torch.device(device))  # noqa: E731
        patch.setattr(torch, "empty", fake)
        assert str(script.prepare(tiny(script, device="cuda"))[1]) == "cuda:1"
    started["store"].set("address", "here")
    assert store.check(["3/address"])


@over_scripts(SCRIPTS)
def test_what_the_second_process_says_and_what_three_refuse(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "RANK", 1)
    script.say("what all would say")
    script.say("what is wrong here", file=sys.stderr)
    assert capsys.readouterr() == ("", "what is wrong here\n")
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.Refusal, match="num_envs must be a multiple of the number of proc"):
        script.prepare(tiny(script, num_envs=4, num_steps=6))
