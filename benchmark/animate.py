"""Makes README's animations of trained agents: `python benchmark/animate.py CHECKPOINT NAME`.

Writes a part of an episode to results/animations/NAME.gif, and to NAME.json what it is of.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from moviepy import VideoFileClip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "animations"


def main(
    checkpoint: tyro.conf.Positional[Path],  # such as runs/hopper/checkpoints/last.pt
    name: tyro.conf.Positional[str],
    start: float = 0.0,  # seconds of the video to leave out at first
    seconds: float = 3.0,  # to show
    fps: int = 20,  # pictures per second
    height: int = 200,  # of the pictures
    seed: int = 1,  # of the episode
) -> None:
    trained = torch.load(checkpoint, weights_only=True)
    script, args = f"{trained['format'].partition(',')[0]}.py", trained["args"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "checkpoints", checkpoint.name)  # the run keeps its own eval.json
        copy.parent.mkdir()
        shutil.copy(checkpoint, copy)
        options = ["--capture-video", "--eval-episodes", "1", "--seed", str(seed)]
        subprocess.run([sys.executable, ROOT / script, "--evaluate", copy, *options], check=True)
        (video,) = Path(folder).rglob("*.mp4")
        RESULTS.mkdir(parents=True, exist_ok=True)
        with VideoFileClip(str(video)) as clip:
            part = clip.subclipped(start, min(start + seconds, clip.duration)).resized(
                height=height
            )
            part.write_gif(str(RESULTS / f"{name}.gif"), fps=fps, logger=None)
        report = {"script": script, "env_id": args["env_id"], "training_seed": args["seed"]}
        report |= {"checkpoint": checkpoint.name, "global_step": trained["global_step"]}
        score = json.loads((copy.parent / "eval.json").read_text())
        report |= {"returns": score["returns"], "seed": seed}
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
