"""Settings of all tests."""

import torch

# As the vector scripts do in train(), or it would depend on the order of the tests; and threads that wait for
# each other waste most of a busy machine.
torch.set_num_threads(1)
