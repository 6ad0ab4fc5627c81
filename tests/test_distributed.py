"""Two processes learn what one would; they write one run, stop together and come back."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed

import ppo_atari
import ppo_continuous
import ppo_kl_penalty

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ppo_atari, ppo_continuous, ppo_kl_penalty]
KL = ppo_kl_penalty
over_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)

ENV_IDS = dict(zip(SCRIPTS, ("BreakoutNoFrameskip-v4", "Pendulum-v1", "CartPole-v1")))
SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
SMALL |= {"device": "cpu", "compile": False}


def make_args(script, **changes):
    args = script.Args(**SMALL | {"env_id": ENV_IDS[script], "total_timesteps": 128} | changes)
    if script is ppo_atari:
        args.precision = "fp32"
    return args


def small_network(_):
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
    torch.set_num_threads(1)
    ppo_atari.nature_cnn = small_network
    for script in SCRIPTS:  # imported before
        script.RANK, script.WORLD_SIZE = rank, 2
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
    context = multiprocessing.get_context("spawn")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, ends = zip(*(context.Pipe() for _ in range(2)))
    inputs = [(rank, store.port, end) for rank, end in enumerate(ends)]
    processes = [context.Process(target=work, args=x, daemon=True) for x in inputs]
    for process in processes:
        process.start()

    def call(job, script, *inputs):
        for pipe in pipes:
            pipe.send((job, script.__name__, *inputs))
        assert all(pipe.poll(90.0) for pipe in pipes), "they hang"
        results = [pipe.recv() for pipe in pipes]
        errors = [result for result in results if isinstance(result, str)]
        assert not errors, "\n".join(errors)
        return results

    yield call
    for process in processes:
        process.terminate()
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
def make_rollout(script, args):
    """Of all environments; those of the second half went another way."""
    agent, (steps, envs) = make_agent(script), (args.num_steps, args.num_envs)
    torch.manual_seed(1)
    if script is ppo_atari:
        obs = torch.randint(256, (steps, envs, 4, 84, 84), dtype=torch.uint8)
        policy, values = (x for x in agent(obs.flatten(0, 1)))
        policy = torch.distributions.Categorical(logits=policy.logits.view(steps, envs, -1))
        values = values.view(steps, envs)
    else:
        obs = 1.0 + 2.0 * torch.randn(steps, envs, 3) + torch.arange(envs)[:, None]
        policy, values = agent(obs)
    actions = policy.sample()
    numbers = {name: torch.randn(steps, envs) for name in ("rewards", "advantages", "returns")}
    numbers["logprobs"] = policy.log_prob(actions) + 0.2 * torch.randn(steps, envs)
    numbers["logprobs"][:, envs // 2 :] -= 0.3
    numbers |= {"next_values": values, "terminations": values * 0, "dones": values * 0}
    if script is KL:
        means = policy.mean + 0.1 * torch.arange(envs)[:, None]
        numbers["policy"] = torch.cat([means, 0.8 * policy.stddev], -1)
    return script.Rollout(obs=obs, actions=actions, values=values, **numbers)


def learn(script, changes, half=None):
    """An update; with half 0 or 1 by that half of the environments, as if it were alone."""
    args = make_args(script, num_minibatches=1, **changes)
    rollout, n = make_rollout(script, args), args.num_envs // 2
    if half is None and script.WORLD_SIZE > 1:
        half = script.RANK
    if half is not None:
        rollout = script.Rollout(*(x[:, half * n : half * n + n] for x in rollout))
    agent, gradients, norms = make_agent(script), [], []
    optimizer, beta = script.make_optimizer(agent, args), [1.0] * (script is KL)

    def gradient(*inputs):
        vector, metrics = script.minibatch_gradient(*inputs)
        gradients.append(vector.numpy().copy())
        norms.append(metrics["losses/grad_norm"].item())
        return vector, metrics

    torch.manual_seed(5 + script.RANK)
    metrics = script.update(agent, optimizer, rollout, *beta, args, gradient)
    metrics.pop("losses/explained_variance")  # of the process's own transitions
    found = {"gradient": gradients[0], "norm": norms[0], "epochs": len(gradients)}
    return found | {"metrics": metrics, "agent": numpy(agent.state_dict())}


@over_scripts
@pytest.mark.parametrize("max_grad_norm", [1e6, 0.01], ids=["whole", "shortened"])
def test_the_gradient_is_that_of_the_mean(script, max_grad_norm, pair):
    """As if one process had all environments; averaged before its norm is taken and limited."""
    changes = {"norm_adv": False, "max_grad_norm": max_grad_norm, "learning_rate": 1e-5}
    one, two = learn(script, changes), pair(learn, script, changes)
    scale = abs(one["gradient"]).max()
    for mine in two:
        np.testing.assert_allclose(mine["gradient"], one["gradient"], atol=1e-4 * scale)
        assert mine["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)
        for name, value in one["agent"].items():  # weights, and statistics of observations
            np.testing.assert_allclose(mine["agent"][name], value, 1e-4, 3e-5, err_msg=name)
            np.testing.assert_array_equal(two[0]["agent"][name], two[1]["agent"][name])
    assert two[0]["metrics"] == two[1]["metrics"]
    assert (one["norm"] > max_grad_norm) == (max_grad_norm == 0.01)


@over_scripts
def test_advantages_are_normalised_in_each_process(script, pair):
    changes = {"max_grad_norm": 1e6, "update_epochs": 1}
    alone = [learn(script, changes, half)["gradient"] for half in (0, 1)]
    for mine in pair(learn, script, changes):
        scale = abs(alone[0]).max()
        np.testing.assert_allclose(mine["gradient"], sum(alone) / 2.0, atol=1e-4 * scale)
    assert abs(alone[0] - alone[1]).max() > 0.1 * scale


@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.__name__)
def test_all_processes_stop_at_the_same_epoch(script, pair):
    """Where one alone would stop and the other go on, or they would wait for each other."""
    changes = {"learning_rate": 1e-6, "norm_adv": False}
    kls = [learn(script, changes, half)["metrics"]["losses/approx_kl"] for half in (0, 1)]
    assert min(kls) < 0.8 * max(kls)
    for beyond, epochs in ((max(kls), 2), (min(kls), 1)):
        target = float(np.mean(kls) + beyond) / 2
        two = pair(learn, script, changes | {"target_kl": target})
        assert [mine["epochs"] for mine in two] == [epochs, epochs]


# ---- environments ----


@over_scripts
def test_each_process_has_a_part_of_the_environments(script, monkeypatch):
    args, seen, seeds = make_args(script), [], []
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
    envs = script.Envs(make_args(script), [1, 0])
    rewards = np.random.default_rng(0).normal(size=(16, 4)) * [1.0, 2.0, 3.0, 4.0]
    n = len(envs.returns)
    mine = rewards[:, script.RANK * n : script.RANK * n + n]
    envs.scale_rewards(mine, np.zeros_like(mine, dtype=bool))
    envs.envs.close()
    return envs.return_stats * script.WORLD_SIZE


def test_statistics_of_rewards_are_those_of_all_environments(pair):
    one, two = scale(ppo_continuous), pair(scale, ppo_continuous)
    for mine in two:
        np.testing.assert_allclose(mine, one)


# ---- runs ----


def train(script, folder, changes):
    """train() in a folder; the agent it ends with, and the first actions."""
    agents, actions, here = [], [], Path.cwd()
    make_optimizer, collect_rollout = script.make_optimizer, script.collect_rollout

    def make(agent, args):
        agents.append(agent)
        return make_optimizer(agent, args)

    def collect(*inputs):
        rollout, obs = collect_rollout(*inputs)
        actions.append(rollout.actions.numpy().copy())
        return rollout, obs

    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_optimizer", make)
        patch.setattr(script, "collect_rollout", collect)
        script.train(make_args(script, **changes))
    os.chdir(here)
    return {"agent": numpy(agents[0].state_dict()), "actions": actions[0]}


def load(run):
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


def assert_complete(run, batch, steps):
    """Every iteration and every episode is there, once."""
    with open(run / "episodes.csv", newline="") as file:
        episodes = [int(row["global_step"]) for row in csv.DictReader(file)]
    reader = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points = {tag: [x.step for x in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert points["losses/policy_loss"] == [*range(batch, steps + 1, batch)]
    assert points.get("charts/episodic_return", []) == episodes == sorted(episodes)
    assert load(run)["global_step"] == steps
    return episodes


@over_scripts
def test_a_run_of_two_goes_on_with_one_and_with_two(script, tmp_path, pair):
    run, changes, pairs = tmp_path / "runs" / "run", {"run_name": "run", "resume": True}, []
    for iterations in (2, 3, 4):
        wanted = changes | {"total_timesteps": 64 * iterations}
        if iterations == 3:
            train(script, tmp_path, wanted)
        else:
            pairs.append(pair(train, script, tmp_path, wanted))
        assert len(assert_complete(run, 64, 64 * iterations)) > 3 or script is not KL
        time.sleep(1.0)  # TensorBoard sorts its files by the second they were begun in
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
    """The process id of each rank that runs, from Linux."""
    found = {}
    for path in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            with suppress(OSError):  # it may be gone by now
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
                found |= dict.fromkeys(ranks, pid)
    return found


def wait_for(condition, torchrun):
    deadline = time.monotonic() + 120.0
    while not (value := condition()):
        assert torchrun.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_job_restarts_after_sigkill_and_ends_saved_after_sigterm(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", ROOT / "ppo_kl_penalty.py", "--env-id", "CartPole-v1"]
    command += "--num-envs 4 --num-steps 64 --num-minibatches 2 --update-epochs 1".split()
    command += "--no-compile --run-name run --resume --checkpoint-interval 0".split()
    run, surroundings = tmp_path / "runs" / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    surroundings |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        options = {"cwd": tmp_path, "env": surroundings, "stdout": out, "stderr": err}
        with subprocess.Popen(command, **options) as torchrun:
            try:
                wait_for((run / "checkpoints" / "last.pt").exists, torchrun)
                first = workers(torchrun)
                os.kill(first[1], signal.SIGKILL)
                wait_for(
                    lambda: len({*workers(torchrun).values()} - {*first.values()}) == 2, torchrun
                )
                reached = load(run)["global_step"]
                wait_for(lambda: load(run)["global_step"] > reached, torchrun)
                torchrun.send_signal(signal.SIGTERM)
                assert torchrun.wait(60.0) != 0
            finally:
                for pid in workers(torchrun).values() if torchrun.poll() is None else ():
                    os.kill(pid, signal.SIGKILL)
                torchrun.kill()
    done = load(run)["global_step"]
    assert 256 <= reached < done < 1_000_000
    assert assert_complete(run, 256, done)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.pt", "last.pt"}
    resumed, *progress, last = (tmp_path / "out").read_text().splitlines()  # of one process
    assert "arguments as they were" in resumed and last.startswith("tensorboard --logdir ")
    steps = [int(line.split(":")[0][5:].replace(",", "")) for line in progress]
    assert steps == sorted({*steps})


# ---- what one process tells of two ----


@over_scripts
def test_how_processes_meet(script, monkeypatch):
    """An attempt finds no addresses of the one before; beside a GPU some tensors are on the CPU."""
    store, started, empty = distributed.HashStore(), {}, torch.empty
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    for name, value in {"LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(store, 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda *x, **y: started.update(y, by=x))
    fake = lambda *_, device: SimpleNamespace(device=torch.device(device))  # noqa: E731
    for name, device, backends in (
        ("cpu", "cpu", {"cpu": "gloo"}),
        ("cuda", "cuda:1", {"cpu": "gloo", "cuda": "nccl"}),
    ):
        monkeypatch.setattr(torch, "empty", fake)
        assert str(script.prepare(make_args(script, device=name))) == device
        monkeypatch.setattr(torch, "empty", empty)
        config = distributed.distributed_c10d.BackendConfig(distributed.Backend(started["by"][0]))
        assert backends.items() <= config.get_device_backend_map().items()
    started["store"].set("address", "here")
    assert store.check(["3/address"])


@over_scripts
def test_environments_that_cannot_be_shared_are_refused(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(script.Refusal, match="num_envs must be a multiple of the number of proc"):
        script.prepare(make_args(script))


@over_scripts
def test_the_first_process_tells(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "RANK", 1)
    script.say("what all would say")
    script.say("what is wrong here", file=sys.stderr)
    assert capsys.readouterr() == ("", "what is wrong here\n")


@over_scripts
def test_one_process_has_nothing_to_do_with_others(script, tmp_path, monkeypatch):
    for name in ("init_process_group", "all_reduce", "all_gather_object"):
        monkeypatch.setattr(distributed, name, lambda *_: pytest.fail("there are no others"))
    train(script, tmp_path, {"run_name": "run", "total_timesteps": 64})
    assert_complete(tmp_path / "runs" / "run", 64, 64)
