"""On a GPU the scripts learn what they learn on a CPU; without one, the CPU is its own match."""

import pytest
import torch
from fakes import SCRIPTS, over_scripts, scalars, tiny

import ppo_atari

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_both
@over_scripts(SCRIPTS)
def test_a_device_learns_as_a_cpu_and_goes_on_there(here, script, device):
    losses = {}
    for where in ("cpu", device):
        exact = {"precision": "fp32"} if script is ppo_atari else {}
        args = tiny(script, 1, device=where, run_name=f"{where}-{len(losses)}", **exact)
        script.train(args)
        points = scalars(here / "runs" / args.run_name)
        losses[where] = {name: x[0] for name, x in points.items() if name.startswith("losses/")}
    for name, (step, value) in losses["cpu"].items():
        assert losses[device][name] == (step, pytest.approx(value, rel=1e-2, abs=1e-3)), name
    path = here / "runs" / args.run_name / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True, map_location="cpu")["global_step"]
    args = tiny(script, 2, device="cpu", run_name=args.run_name, resume=True)
    script.train(args)
    assert torch.load(path, weights_only=True)["global_step"] == 2 * saved
