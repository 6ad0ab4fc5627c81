"""Settings of all tests."""

import os
import signal

# Compiling takes longer than most tests; tests/test_fast.py turns it on again.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest
import torch

# As the vector scripts do in train(), or it would depend on the order of the tests; and threads that wait for
# each other waste most of a busy machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture
def interruptible():
    """A child inherits that SIGINT is ignored, as it is where a shell runs the tests in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
