"""Settings of all tests."""

import os

# Compiling takes longer than most tests; tests/test_fast.py turns it on again.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest
import torch
import torch._dynamo

# As the vector scripts do in train(), or it would depend on the order of the tests; and threads that wait for
# each other waste most of a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile for real; a second compilation of a function is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()
