"""What a reader changes still learns, compiled and not; and the same seed gives the same run."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from gymnasium.spaces import Box
from test_ppo import CASES, FakeEnvs, close, over
from torch import nn

import ppo_atari
import ppo_kl_penalty


class Dropout(nn.Dropout):
    def forward(self, x):
        assert self.training == torch.is_grad_enabled()  # on while learning, and only then
        return super().forward(x)


def change(agent, what):
    def mlp(outputs):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))

    match what:
        case "hidden":
            agent.actor, agent.critic = mlp(agent.act_size), mlp(1)
        case "relu":
            agent.actor[1], agent.critic[1] = nn.ReLU(), nn.ReLU()
        case "unused":
            agent.unused = nn.Parameter(torch.ones(3))
        case "frozen":
            encoder = agent.network if isinstance(agent, ppo_atari.Agent) else agent.actor[0]
            encoder.requires_grad_(False)
        case "std":  # of each state its own, beside a log_std without use
            agent.actor = mlp(2 * agent.act_size)
        case "raw":  # observations, not normalised
            agent.normalize = nn.Identity()
            agent.normalize.update = lambda obs: None
        case "dropout":
            agent.actor.insert(2, Dropout(0.5))


UNMOVED = {"unused": ("unused",), "frozen": ("actor.0.", "network."), "std": ("log_std",)}


def policy_with_std(agent, obs):
    mean, log_std = agent.actor(agent.normalize(obs)).chunk(2, -1)
    return mean, log_std.clamp(-5.0, 2.0)


def policy_with_mask(agent, obs):  # in some states, of which none may come first
    seldom = obs[..., 2:] > 1.5  # Pendulum is never that fast at first
    return agent.actor(agent.normalize(obs)) - 1e3 * seldom, agent.log_std


POLICIES = {"std": policy_with_std, "mask": policy_with_mask}


def learn(monkeypatch, case, *changes, envs=None, **args):
    """Trains and plays; returns the agent, what was logged, and the mean return."""
    script, agents, logged = case.script, [], []
    envs = FakeEnvs if script is ppo_atari and envs is None else envs

    def init(agent, *inputs, original=script.Agent.__init__):
        original(agent, *inputs)
        for what in changes:
            change(agent, what)

    def make_optimizer(agent, args, original=script.make_optimizer):
        agents.append((agent, {k: x.detach().clone() for k, x in agent.named_parameters()}))
        return original(agent, args)

    def update(agent, optimizer, rollout, *rest, original=script.update):
        batch = script.Rollout(*(x.flatten(0, 1) for x in rollout))
        with torch.no_grad():
            policy, _ = agent(batch.obs)  # that of the rollout
        close(policy.log_prob(batch.actions), batch.logprobs)
        if script is ppo_kl_penalty:
            assert script.exact_kl(batch.old, policy).max() < 1e-5
        logged.append(original(agent, optimizer, rollout, *rest))
        return dict(logged[-1])

    env_id = "Pendulum-v1" if isinstance(case.action_space, Box) else "CartPole-v1"
    few = {"run_name": "run", "total_timesteps": 96, "update_epochs": 1, "env_id": env_id}
    args = case.args(**few | args)
    with monkeypatch.context() as patch:
        patch.setattr(script.Agent, "__init__", init)
        for what in POLICIES.keys() & {*changes}:
            patch.setattr(script.Agent, "policy", POLICIES[what])
        patch.setattr(script, "make_optimizer", make_optimizer)
        patch.setattr(script, "update", update)
        if envs:
            patch.setattr(script, "Envs", partial(envs, case))
        mean_return = script.train(args)
        if not envs:
            script.evaluate_checkpoint(replace(args, evaluate=args.run_name, eval_episodes=1))
    agent, first = agents[0]
    still = sum((UNMOVED.get(what, ()) for what in changes), ())
    for name, x in agent.named_parameters():
        assert torch.equal(x, first[name]) == name.startswith(still), name
    return agent.eval(), logged, mean_return


ALONE = [
    ("box", x) for x in ("hidden", "relu", "unused", "frozen", "std", "raw", "dropout", "mask")
]
ALONE += [("kl-box", x) for _, x in ALONE] + [("atari", x) for x in ("unused", "frozen")]


@pytest.mark.parametrize("name, what", ALONE)
def test_a_change_learns_without_compiling(name, what, monkeypatch, here, capsys):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: pytest.fail("compiled"))
    learn(monkeypatch, CASES[name], what, compile=False)
    other = name != "atari" and what in ("relu", "std", "raw", "mask")
    assert capsys.readouterr().out.count("acting in PyTorch") == other  # not what NumPy does


TOGETHER = {  # the first one as users compile it, the others without the minute that C++ takes
    "kl-box": (["hidden", "relu", "unused", "std"], None),
    "discrete": (["raw", "frozen", "dropout"], "aot_eager"),
    "atari": (["unused", "frozen"], "aot_eager"),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_changes_learn_compiled(name, monkeypatch, here, capsys):
    """Whatever is compiled gives what it gives uncompiled; once; and the same when repeated."""
    case, (changes, backend) = CASES[name], TOGETHER[name]
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
        _, logged, _ = learn(monkeypatch, case, *changes)
        _, again, _ = learn(monkeypatch, case, *changes, run_name="again")
    assert logged == again
    assert len(calls) == 2 * 3 * (4 + 8 * (name == "atari"))  # minibatches, and steps
    assert counters["stats"]["unique_graphs"] == len({*calls})
    assert "slower without" not in capsys.readouterr().out


def test_without_a_compiler_it_learns_the_same(monkeypatch, here, capsys):
    tries = []

    def no_compiler(*inputs):
        tries.append(inputs)
        raise RuntimeError("no C++ compiler\nbut a long\ntrace")

    _, expected, _ = learn(monkeypatch, CASES["kl-box"], compile=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    _, found, _ = learn(monkeypatch, CASES["kl-box"], run_name="slow")
    assert found == expected and len(tries) == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "slower" in x]
    assert line.startswith("slower without torch.compile: ") and "trace" in line


@over("atari", "box", "kl-discrete")
def test_the_same_seed_gives_the_same_run(case, monkeypatch, here):
    learned = []
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        agent, logged, _ = learn(monkeypatch, case, run_name=name, seed=seed)
        learned.append((nn.utils.parameters_to_vector(agent.parameters()).tolist(), logged))
    assert learned[0] == learned[1] != learned[2]
