"""Settings and fixtures of all tests."""

import os
import signal
import sys
from typing import NamedTuple

# Compiling takes longer than most tests; tests/test_fast.py turns it on again.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Weights & Biases must never reach a network, nor write into somebody's home.
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import pytest
import torch

torch.set_num_threads(1)  # threads that wait for each other waste most of a busy machine


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small_network():
    """A network for Atari with few parameters: to initialise and to save Nature's takes seconds."""
    import ppo_atari

    def network(*_):
        layers = torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(36, 512)
        return torch.nn.Sequential(*layers, torch.nn.ReLU())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari, "nature_cnn", network)
        yield


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def refusal(self):  # the one line of it
        assert self.status == 2, self
        (line,) = self.err.splitlines()
        assert line.startswith("error: "), line
        return line


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script's main() in this process, as if from a shell."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        capsys.readouterr()
        status = 0
        try:
            script.main()
        except SystemExit as end:
            status = end.code
        return Outcome(status, *capsys.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
