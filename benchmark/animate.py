"""Makes README's animations of trained agents: `python benchmark/animate.py CHECKPOINT NAME`.

Writes a part of an episode to results/animations/NAME.gif, and to NAME.json what `--evaluate` tells about it.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    about = json.loads((checkpoint.parent.parent / "args.json").read_text())
    script = about["script"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(checkpoint, folder))  # the run keeps its own eval.json
        options = ["--capture-video", "--eval-episodes", "1", "--seed", str(seed)]
        subprocess.run([sys.executable, ROOT / script, "--evaluate", copy, *options], check=True)
        (video,) = Path(folder).rglob("*.mp4")
        RESULTS.mkdir(parents=True, exist_ok=True)
        with VideoFileClip(str(video)) as clip:
            part = clip.subclipped(start, min(start + seconds, clip.duration)).resized(height=height)
            part.write_gif(str(RESULTS / f"{name}.gif"), fps=fps, logger=None)
        report = {"script": script, "training_seed": about["args"]["seed"]}
        report |= json.loads((copy.parent / "eval.json").read_text())
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
