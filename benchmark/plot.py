"""Makes the figures and tables of benchmark/results/ from the summaries of benchmark/run.py.

    python benchmark/plot.py

Each study gets a picture, its learning curves with the mean over seeds in bold, and a table of
final returns. The tables of docs/ are made here as well, between their marks.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import speed
import tyro
from matplotlib.ticker import EngFormatter

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = Path(__file__).resolve().parent.parent / "docs"

# docs' table of results: study, environment, script, its arguments, and the means published for
# older versions of the task: of CleanRL's scripts (HalfCheetah's second one in December 2022) and,
# by Huang et al. (2022), of openai/baselines' on Atari:
# https://docs.cleanrl.dev/rl-algorithms/ppo/; of baselines' on MuJoCo:
# https://github.com/openai/baselines/blob/master/benchmarks_mujoco1M.htm
DOCS_ROWS = (
    ("mujoco", "HalfCheetah-v5", "ppo_continuous.py", "defaults", "1443 ± 46, 2906 ± 1129", "1669"),
    ("mujoco", "Hopper-v5", "ppo_continuous.py", "defaults", "2383 ± 272", "2316"),
    ("mujoco", "Walker2d-v5", "ppo_continuous.py", "defaults", "2288 ± 572", "3425"),
    ("mujoco", "Swimmer-v5", "ppo_continuous.py", "defaults", "", "111"),
    ("mujoco", "InvertedDoublePendulum-v5", "ppo_continuous.py", "defaults", "", "7103"),
    ("mujoco", "Ant-v5", "ppo_continuous.py", "defaults", "", ""),
    ("mujoco", "Humanoid-v5", "ppo_continuous.py", "defaults", "716", ""),
    ("mujoco", "Hopper-v5", "ppo_kl_penalty.py", "defaults: adaptive β, d_targ 0.01", "", ""),
    ("interrupted", "Hopper-v5", "ppo_continuous.py", "killed 7 to 15 times and resumed", "", ""),
    ("classic", "BipedalWalker-v3", "ppo_continuous.py", "`--gamma 0.995`", "", ""),
    ("classic", "Pendulum-v1", "ppo_continuous.py", "recipe", "", ""),
    ("classic", "LunarLander-v3", "ppo_kl_penalty.py", "`--gamma 0.995`", "", ""),
    ("classic", "CartPole-v1", "ppo_kl_penalty.py", "defaults", "", ""),
    ("rewritten", "HalfCheetah-v5", "ppo_continuous.py", "defaults, rewritten script", "", ""),
    ("rewritten", "Hopper-v5", "ppo_continuous.py", "defaults, rewritten script", "", ""),
    ("rewritten", "LunarLander-v3", "ppo_continuous.py", "`--gamma 0.995`, rewritten", "", ""),
    ("rewritten", "CartPole-v1", "ppo_continuous.py", "defaults, rewritten script", "", ""),
    ("pong/bf16", "PongNoFrameskip-v4", "ppo_atari.py", "recipe", "", ""),
    ("atari", "PongNoFrameskip-v4", "ppo_atari.py", "defaults", "20.36 ± 0.20", "20.5"),
    ("atari", "BreakoutNoFrameskip-v4", "ppo_atari.py", "defaults", "415 ± 28", "407"),
)

# Studies that change one thing of the runs of another one, which are shown beside them: its name,
# their label
BESIDE = {"eager": ("mujoco", "compiled"), "interrupted": ("mujoco", "left alone")}
BESIDE |= {"rewritten": ("mujoco", "before")}


def load(study: Path) -> dict[tuple[str, str], list[dict]]:
    """The runs of a study by environment and script (and subfolder), in order of seeds."""
    runs = defaultdict(list)
    paths = study.rglob("*__*.json")  # ENV__SCRIPT__SEED, seed 10 after 9
    for path in sorted(paths, key=lambda path: (len(path.name), path)):
        run = json.loads(path.read_text())
        part = f", {path.parent.name}" if path.parent != study else ""
        runs[run["args"]["env_id"], run["script"] + part].append(run)
    return dict(sorted(runs.items()))


def beside(runs: dict, label: str, other: str, other_label: str) -> dict:
    """Those of another study in the same environments as well, each with its label."""
    others, both = load(RESULTS / other), {}
    for (env_id, script), group in runs.items():
        both[env_id, f"{script}, {label}"] = group
        if (env_id, script) in others:
            both[env_id, f"{script}, {other_label}"] = others[env_id, script]
    return both


def plot(study: Path, runs: dict[tuple[str, str], list[dict]]) -> None:
    env_ids = sorted({env_id for env_id, _ in runs})
    rows = -(-len(env_ids) // 4)
    columns = -(-len(env_ids) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(env_ids) :]:
        axis.remove()
    for axis, env_id in zip(axes.flat, env_ids, strict=False):
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
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("return, mean of 100 episodes")
    figure.tight_layout()
    figure.savefig(study / "curves.png", dpi=130)
    plt.close(figure)


def per_seed(finals: np.ndarray, digits: int = 1) -> tuple[str, str]:
    """Each of them, and their mean ± standard deviation."""
    spread = f" ± {finals.std(ddof=1):.{digits}f}" if len(finals) > 1 else ""
    return ", ".join(f"{x:.{digits}f}" for x in finals), f"{finals.mean():.{digits}f}{spread}"


def steps_of(group: list[dict]) -> int:
    """As many as were asked for, or fewer where a run was stopped, as its last episode tells."""
    asked = group[0]["args"]["total_timesteps"]
    taken = min(run.get("global_step", asked) for run in group)
    return asked if taken > 0.95 * asked else taken


def tabulate(study: Path, runs: dict[tuple[str, str], list[dict]]) -> None:
    titles = ("environment", "script", "steps", "final return per seed", "median", "mean ± sd")
    rows = [f"| {' | '.join(titles)} | minutes per run |", "|---" * 7 + "|"]
    for (env_id, script), group in runs.items():
        finals = np.array([run["final_mean_return"] for run in group])
        minutes = np.median([run["wall_time"] for run in group]) / 60
        (each, mean), median = per_seed(finals), np.median(finals)
        cells = (
            env_id,
            script,
            f"{steps_of(group):,}",
            each,
            f"{median:.1f}",
            mean,
            f"{minutes:.1f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    (study / "table.md").write_text("\n".join(rows) + "\n")


def results() -> list[str]:
    """The table of docs/, of what DOCS_ROWS names and there is."""
    titles = ("environment", "script", "steps", "arguments", "each seed", "mean ± sd", "CleanRL")
    rows = [f"| {' | '.join(titles)} | baselines |", "|---" * 8 + "|"]
    for study, env_id, script, arguments, *published in DOCS_ROWS:
        if group := load(RESULTS / study).get((env_id, script)):
            finals = np.array([run["final_mean_return"] for run in group])
            steps = f"{steps_of(group) / 1e6:.2g}M"
            each, mean = per_seed(finals, digits=0 if abs(finals).max() >= 100 else 1)
            others = [text or "–" for text in published]
            cells = (env_id, f"`{script}`", steps, arguments, each, mean, *others)
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def fill(text: str, name: str, lines: list[str]) -> str:
    """The text with `lines` between its marks <!-- NAME … --> and <!-- end -->."""
    marks = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end -->\n)", re.DOTALL)
    return marks.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), text)


def means_drawn_again(
    returns: np.ndarray, rng: np.random.Generator, draws: int = 10_000
) -> np.ndarray:
    """Of the returns of two or more seeds, for a bootstrap interval.

    Seeds drawn again vary less than new ones would, by (n - 1) / n: their deviations are enlarged.
    """
    deviations = returns - returns.mean()
    enlarged = returns.mean() + deviations * np.sqrt(len(returns) / (len(returns) - 1))
    return rng.choice(enlarged, (draws, len(returns))).mean(1)


def cleanrl(folder: Path) -> list[str]:
    """CleanRL's runs beside ours of the same tasks, and how much better ours are, for docs/."""
    ours, theirs = load(RESULTS / "mujoco"), load(folder)
    rows = [
        "| task | ours, v5 (seeds) | CleanRL, v4 (seeds) | difference | 95 % |",
        "|---" * 5 + "|",
    ]
    runs = {}
    for (env_id, script), group in theirs.items():
        task = env_id.removesuffix("-v4")
        mine = ours.get((f"{task}-v5", "ppo_continuous.py"))
        if mine is None:
            continue
        runs |= {(task, "ppo_continuous.py, v5"): mine, (task, f"{script}, v4"): group}
        finals = [np.array([run["final_mean_return"] for run in side]) for side in (mine, group)]
        cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f} ({len(x)})" for x in finals if len(x) > 1]
        if len(cells) == 2:
            rng = np.random.default_rng(0)
            mean, other = (means_drawn_again(x, rng) for x in finals)
            low, high = np.quantile(mean - other, (0.025, 0.975))
            cells += [f"{finals[0].mean() - finals[1].mean():.1f}", f"{low:.0f} to {high:.0f}"]
            rows.append(f"| {task} | {' | '.join(cells)} |")
    plot(folder, runs)
    (folder / "table.md").write_text("\n".join(rows) + "\n")
    return rows


# [PPO] Table 1, by the folders of results/paper/
PAPER_SCORES = {"none": -0.39, "clip-0.1": 0.76, "clip-0.2": 0.82, "clip-0.3": 0.70}
PAPER_SCORES |= {"adaptive-0.003": 0.68, "adaptive-0.01": 0.74, "adaptive-0.03": 0.71}
PAPER_SCORES |= {"fixed-0.3": 0.62, "fixed-1": 0.71, "fixed-3": 0.72, "fixed-10": 0.69}


def bootstrap(scores: list[np.ndarray]) -> tuple[float, float]:
    """95 % interval of the mean over tasks and seeds, the seeds of each task drawn again."""
    rng = np.random.default_rng(0)
    means = [means_drawn_again(x, rng) for x in scores]
    return tuple(np.quantile(np.mean(means, axis=0), (0.025, 0.975)))


def paper(folder: Path) -> list[str]:
    """Our Table 1 beside the paper's; scores go from 0, random actions, to 1, the task's best run.

    Returns the table of docs/, of the objectives that every task was run with.
    """
    finals = {}  # objective: {task: final returns}
    for objective in ("random", *PAPER_SCORES):
        runs = load(folder / objective)
        finals[objective] = {
            env_id: np.array([run["final_mean_return"] for run in group])
            for (env_id, _), group in runs.items()
        }
    floor = {task: returns.mean() for task, returns in finals.pop("random").items()}
    best = {task: max(max(of.get(task, [-np.inf])) for of in finals.values()) for task in floor}
    titles = [task.removesuffix("-v5") for task in floor]
    rows = [
        f"| objective | runs | score | 95 % | paper | {' | '.join(titles)} |",
        "|---" * (5 + len(floor)) + "|",
    ]
    shown, several = {}, sum(len(of) == len(floor) for of in finals.values()) > 1  # or all are best
    for objective, of in finals.items():
        if not of:
            continue
        scores = [
            (of[task] - floor[task]) / (best[task] - floor[task]) for task in floor if task in of
        ]
        cells = [f"{of[task].mean():.1f}" if task in of else "" for task in floor]
        runs, seeds = sum(map(len, of.values())), min(map(len, of.values()))
        score = interval = ""
        if len(of) == len(floor) and several:
            score = f"{np.mean([x.mean() for x in scores]):.2f}"
            low, high = bootstrap(scores) if seeds > 1 else (np.nan, np.nan)
            interval = f"{low:.2f} to {high:.2f}" if seeds > 1 else ""
            shown[objective] = (float(score), low, high, seeds)
        texts = [objective, str(runs), score, interval, f"{PAPER_SCORES[objective]:.2f}", *cells]
        rows.append(f"| {' | '.join(texts)} |")
    ends = ", ".join(f"{task} {floor[task]:.1f} to {best[task]:.1f}" for task in floor)
    rows += ["", f"Scores 0 to 1 stand for: {ends}.", ""]
    rows += [f"| each seed | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for objective, of in finals.items():
        if of:
            cells = [per_seed(of[task])[0] if task in of else "" for task in floor]
            rows.append(f"| {objective} | {' | '.join(cells)} |")
    (folder / "table.md").write_text("\n".join(rows) + "\n")
    short = ["| objective | seeds | score | 95 % | paper |", "|---|---|---|---|---|"]
    for objective, (score, low, high, seeds) in shown.items():
        interval = f"{low:.2f} to {high:.2f}" if seeds > 1 else ""
        paper_score = f"{PAPER_SCORES[objective]:.2f}"
        short.append(f"| {objective} | {seeds} | {score:.2f} | {interval} | {paper_score} |")
    if not shown:
        return short
    figure, axis = plt.subplots(figsize=(6.5, 0.35 * len(shown) + 1.0))
    for row, (objective, (score, low, high, _)) in enumerate(shown.items()):
        axis.barh(row, score, color="tab:blue", alpha=0.6)
        axis.plot([low, high], [row, row], color="tab:blue")
        axis.plot(PAPER_SCORES[objective], row, "k|", markersize=14)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set_xlabel("normalised score: ours (bar, 95 % interval), the paper's (mark)")
    figure.tight_layout()
    figure.savefig(folder / "table1.png", dpi=130)
    plt.close(figure)
    return short


def main() -> None:
    tables, measured = {"results": results()}, RESULTS / "speed" / "speed.json"
    if (RESULTS / "paper" / "random").exists():
        tables["objectives"] = paper(RESULTS / "paper")
    if (RESULTS / "cleanrl").exists():
        tables["cleanrl"] = cleanrl(RESULTS / "cleanrl")
    if measured.exists():
        tables["speed"] = speed.summarize(json.loads(measured.read_text()))
    for path in DOCS.glob("*.md"):
        text = path.read_text()
        for name, table in tables.items():
            text = fill(text, name, table)
        path.write_text(text)
    others = {path for path in RESULTS.iterdir() if path.is_dir()}
    for study in sorted(others - {RESULTS / "paper", RESULTS / "cleanrl"}):
        if runs := load(study):
            if study.name in BESIDE:
                runs = beside(runs, study.name, *BESIDE[study.name])
            plot(study, runs)
            tabulate(study, runs)
            print(f"{study.name}: {sum(map(len, runs.values()))} runs")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
