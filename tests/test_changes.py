"""What a reader changes still learns, compiled and not; and the same seed gives the same run."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from test_ppo import CASES, Case, FakeEnvs, close
from torch import nn

import ppo_atari
import ppo_continuous

COLOURS = Case(ppo_atari, Box(0, 255, (3, 64, 64), np.uint8), Discrete(2))


def small_hidden(agent):
    for name, outputs in (("actor", agent.act_size), ("critic", 1)):
        setattr(agent, name, ppo_continuous.mlp(3, outputs, 1.0, hidden=(8,)))


def relu(agent):
    for network in (agent.actor, agent.critic):
        for i in range(1, len(network), 2):
            network[i] = nn.ReLU()


def unused(agent):
    agent.unused = nn.Parameter(torch.ones(3))


def frozen(agent):
    encoder = agent.network if isinstance(agent, ppo_atari.Agent) else agent.actor[0]
    encoder.requires_grad_(False)


def std_of_state(agent):  # and policy_with_std; log_std is left unused
    agent.actor = ppo_continuous.mlp(3, 2 * agent.act_size, 1.0, hidden=(8,))


def policy_with_std(agent, obs):
    mean, log_std = agent.actor(agent.normalize(obs)).chunk(2, -1)
    return mean, log_std.clamp(-5.0, 2.0).exp()


def not_normalized(agent):
    agent.normalize = nn.Identity()
    agent.normalize.update = lambda obs: None


class Dropout(nn.Dropout):
    def forward(self, x):
        assert self.training == torch.is_grad_enabled()  # on while learning, and only then
        return super().forward(x)


def dropout(agent):
    agent.actor.insert(2, Dropout(0.5))


UNMOVED = {unused: ("unused",), frozen: ("actor.0.", "network."), std_of_state: ("log_std",)}


@cache  # a class for each: what is compiled is compiled for one
def changed(script, *edits):
    class Agent(script.Agent):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            for edit in edits:
                edit(self)

    if std_of_state in edits:
        Agent.policy = policy_with_std
    return Agent


def learn(monkeypatch, case, *edits, envs=None, **changes):
    """Trains and plays; returns the agent, what was logged, and the mean return."""
    script, agents, logged = case.script, [], []

    def make_optimizer(agent, args, original=script.make_optimizer):
        agents.append((agent, {k: x.detach().clone() for k, x in agent.named_parameters()}))
        return original(agent, args)

    def update(*inputs, original=script.update):
        logged.append(original(*inputs))
        return dict(logged[-1])

    args = {"run_name": "run", "total_timesteps": 128, "learning_rate": 1e-3} | changes
    env_id = "Pendulum-v1" if isinstance(case.action_space, Box) else "CartPole-v1"
    args = case.args(**{"env_id": env_id} | args)
    with monkeypatch.context() as patch:
        patch.setattr(script, "Agent", changed(script, *edits))
        patch.setattr(script, "make_optimizer", make_optimizer)
        patch.setattr(script, "update", update)
        if envs:
            patch.setattr(script, "Envs", partial(envs, case))
        mean_return = script.train(args)
        if not envs:
            script.evaluate_checkpoint(replace(args, evaluate=args.run_name, eval_episodes=1))
    ((agent, first),) = agents[:1]
    still = sum((UNMOVED.get(edit, ()) for edit in edits), ())
    for name, x in agent.named_parameters():
        assert torch.equal(x, first[name]) == name.startswith(still), name
    return agent.eval(), logged, mean_return


CHANGES = [small_hidden, relu, unused, frozen, std_of_state, not_normalized, dropout]
ALONE = [(CASES[name], edit) for name in ("box", "kl-box") for edit in CHANGES]
ALONE += [(COLOURS, edit) for edit in (unused, frozen)]
NAMES = [f"{case.script.__name__}-{edit.__name__}" for case, edit in ALONE]


@pytest.mark.parametrize("case, edit", ALONE, ids=NAMES)
def test_a_change_learns_without_compiling(case, edit, monkeypatch, here):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail)
    envs = FakeEnvs if case is COLOURS else None
    _, logged, _ = learn(monkeypatch, case, edit, envs=envs, compile=False)
    assert len(logged) == 4


TOGETHER = {  # the first one as users compile it, the others without the minute that C++ takes
    "vectors": (CASES["kl-box"], [small_hidden, relu, unused, std_of_state], None, None),
    "dropout": (CASES["discrete"], [not_normalized, frozen, dropout], None, "aot_eager"),
    "pictures": (COLOURS, [unused, frozen], FakeEnvs, "aot_eager"),
}


@pytest.mark.parametrize("case, edits, envs, backend", TOGETHER.values(), ids=TOGETHER)
def test_changes_learn_compiled(case, edits, envs, backend, monkeypatch, here, capsys):
    """Whatever is compiled gives what it gives uncompiled; once; and the same when repeated."""
    compiled, torch_compile, calls = case.script.compiled, torch.compile, []
    counters = torch._dynamo.utils.counters

    def compile(function, options, **others):
        how = {"backend": backend} if backend else {"options": options}
        return torch_compile(function, **others, **how)

    def compared(function, *inputs):
        fast = compiled(function, *inputs)

        def call(*inputs):
            state = torch.get_rng_state()
            expected = function(*inputs)
            torch.set_rng_state(state)  # of dropout
            found = fast(*inputs)
            close(found, expected, rtol=1e-3, atol=1e-5)
            calls.append(function.__name__)
            return found

        return call

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(case.script, "compiled", compared)
    with torch._dynamo.config.patch(error_on_recompile=True):
        runs = [learn(monkeypatch, case, *edits, envs=envs, run_name=x)[1] for x in ("one", "same")]
    assert runs[0] == runs[1]
    assert calls.count("minibatch_gradient") == 2 * 4 * 8
    assert counters["stats"]["unique_graphs"] == len({*calls})
    assert "slower without" not in capsys.readouterr().out


def test_without_a_compiler_it_learns_the_same(monkeypatch, here, capsys):
    tries = []

    def no_compiler(*inputs):
        tries.append(inputs)
        raise RuntimeError("no C++ compiler\nbut a long\ntrace")

    _, expected, _ = learn(monkeypatch, CASES["kl-box"], compile=False)
    assert "slower" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    _, found, _ = learn(monkeypatch, CASES["kl-box"], run_name="slow")
    assert found == expected and len(tries) == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "slower" in x]
    assert line.startswith("slower without torch.compile: ") and "no C++ compiler" in line


@pytest.mark.parametrize("case", [CASES["box"], CASES["kl-discrete"], COLOURS])
def test_the_same_seed_gives_the_same_run(case, monkeypatch, here):
    learned, envs = [], FakeEnvs if case is COLOURS else None
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        agent, logged, _ = learn(monkeypatch, case, envs=envs, run_name=name, seed=seed)
        learned.append((nn.utils.parameters_to_vector(agent.parameters()).tolist(), logged))
    assert learned[0] == learned[1]
    assert learned[0][0] != learned[2][0] and learned[0][1] != learned[2][1]
