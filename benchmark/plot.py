"""Makes the figures and tables of benchmark/results/ from the summaries that benchmark/run.py wrote there.

    python benchmark/plot.py

Each study gets a picture, its learning curves with the mean over seeds in bold, and a table of final returns.
"""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"


def load(study: Path) -> dict[tuple[str, str], list[dict]]:
    """The runs of a study by environment and script, in order of seeds."""
    runs = defaultdict(list)
    for path in sorted(study.glob("*__*.json")):  # ENV__SCRIPT__SEED
        run = json.loads(path.read_text())
        runs[run["args"]["env_id"], run["script"]].append(run)
    return dict(sorted(runs.items()))


def plot(study: Path, runs: dict[tuple[str, str], list[dict]]) -> None:
    env_ids = sorted({env_id for env_id, _ in runs})
    figure, axes = plt.subplots(1, len(env_ids), figsize=(4.2 * len(env_ids), 3.2), squeeze=False)
    for axis, env_id in zip(axes[0], env_ids, strict=True):
        scripts = [script for env, script in runs if env == env_id]
        for script, color in zip(scripts, plt.cm.tab10.colors, strict=False):
            curves = [np.array(run["curve"], dtype=float) for run in runs[env_id, script]]
            for curve in curves:
                axis.plot(*curve.T, color=color, alpha=0.35, linewidth=0.8)
            steps = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), 200)
            mean = np.mean([np.interp(steps, *curve.T) for curve in curves], axis=0)
            label = f"{script} ({len(curves)} seed{'s' if len(curves) > 1 else ''})"
            axis.plot(steps, mean, color=color, linewidth=1.8, label=label)
        axis.set_title(env_id)
        axis.set_xlabel("steps")
        axis.legend(fontsize=7, loc="lower right")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("return, mean of 100 episodes")
    figure.tight_layout()
    figure.savefig(study / "curves.png", dpi=130)
    plt.close(figure)


def tabulate(study: Path, runs: dict[tuple[str, str], list[dict]]) -> None:
    rows = ["| environment | script | steps | final return per seed | mean ± sd | minutes per run |"]
    rows.append("|---|---|---|---|---|---|")
    for (env_id, script), group in runs.items():
        finals = np.array([run["final_mean_return"] for run in group])
        spread = f" ± {finals.std(ddof=1):.1f}" if len(finals) > 1 else ""
        steps = group[0]["args"]["total_timesteps"]
        minutes = np.median([run["wall_time"] for run in group]) / 60
        cells = (env_id, script, f"{steps:,}", ", ".join(f"{x:.1f}" for x in finals))
        rows.append(f"| {' | '.join(cells)} | {finals.mean():.1f}{spread} | {minutes:.1f} |")
    (study / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    for study in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if runs := load(study):
            plot(study, runs)
            tabulate(study, runs)
            print(f"{study.name}: {sum(map(len, runs.values()))} runs")


if __name__ == "__main__":
    main()
