"""Draws what a healthy run looks like, for docs/metrics.md, from the events of a run.

python benchmark/healthy.py runs/NAME
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PICTURE = Path(__file__).resolve().parent / "results" / "healthy" / "run.png"
EXPECTED = {
    "charts/episodic_return": "rises, with noise",
    "losses/approx_kl": "below 0.05; falls\ntowards the end",
    "losses/clipfrac": "above 0, below a third",
    "losses/explained_variance": "rises, soon above 0.5",
    "losses/entropy": "falls slowly; may be\nnegative for Box actions",
    "losses/value_loss": "falls, and jumps where\nthe policy finds more",
}


def main(run: tyro.conf.Positional[Path], picture: Path = PICTURE) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 4.6))
    for axis, (name, expected) in zip(axes.flat, EXPECTED.items()):
        steps, values = np.array([(x.step, x.value) for x in events.Scalars(name)]).T
        smooth = np.convolve(values, np.ones(20) / 20, mode="valid")
        axis.plot(steps, values, color="#0072B2", alpha=0.3, linewidth=0.8)
        axis.plot(steps[19:], smooth, color="#0072B2")
        axis.set_title(name, fontsize=10)
        axis.text(0.5, 0.97, expected, transform=axis.transAxes, ha="center", va="top", fontsize=9)
        low, high = values.min(), values.max()
        axis.set_ylim(low - 0.05 * (high - low), high + 0.45 * (high - low))  # room for the text
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
