"""Rollouts and updates of ppo_atari.py on every game of ale-py: `python benchmark/roms.py`."""

import contextlib
import io
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import ale_py
import gymnasium as gym
import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "roms"
sys.path.insert(0, str(ROOT))

import ppo_atari  # noqa: E402 (after the path to it)


def env_ids() -> dict[str, str]:
    """The newest id of each game that gymnasium knows, by the name of its ROM."""
    gym.register_envs(ale_py)
    specs = [
        spec
        for name, spec in gym.registry.items()
        if name.startswith("ALE/") and "-ram" not in name
    ]
    return {spec.kwargs["game"]: spec.id for spec in specs}


def smoke(env_id: str) -> str:
    """What went wrong; empty where a run ended as it should."""
    args = ppo_atari.Args(
        env_id=env_id,
        num_envs=2,
        num_steps=16,
        num_minibatches=2,
        update_epochs=1,
        total_timesteps=64,
        compile=False,
        precision="fp32",
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            ppo_atari.train(args)
        except Exception as error:
            return " ".join(f"{type(error).__name__}: {error}".split())
        finally:
            os.chdir(ROOT)
    return ""


def main() -> None:
    ids, roms = env_ids(), sorted(ale_py.roms.get_all_rom_ids())
    report = {"ale-py": version("ale-py"), "games": {}}
    for rom in roms:
        problem = smoke(ids[rom]) if rom in ids else "gymnasium has no id for it"
        report["games"][rom] = problem
        print(f"{rom}: {problem or 'works'}", flush=True)
    failures = {rom: problem for rom, problem in report["games"].items() if problem}
    rows = [
        f"{len(roms) - len(failures)} of the {len(roms)} games of ale-py {report['ale-py']} work.",
        "",
    ]
    if failures:
        rows += ["| game | what went wrong |", "|---|---|"]
        rows += [f"| {rom} | {problem} |" for rom, problem in failures.items()]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "roms.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
