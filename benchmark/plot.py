"""Makes the figures and tables of benchmark/results/ from the summaries of benchmark/run.py.

    python benchmark/plot.py

Each study gets a picture of its learning curves and a table of final returns. The tables of docs/
and benchmark/README.md are made here as well, between their marks. Figures are 840 pixels wide.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import speed
import tyro
from details import DETAIL_TASKS, DETAILS
from matplotlib.ticker import EngFormatter
from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = Path(__file__).resolve().parent.parent / "docs"

plt.rcParams |= {"font.size": 8.5, "axes.titlesize": 9.5, "legend.fontsize": 8, "figure.dpi": 100}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
WIDTH = 8.4  # inches, so 840 pixels
# Okabe and Ito's colours, each with one meaning in all figures
OURS, CHANGED, KL, CLEANRL, BLACK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#000000"

# docs' table of results: study, environment, script, its arguments, and the means published for
# older versions of the task: of CleanRL's scripts (CartPole's of ppo.py, after 0.5M steps) and,
# by Huang et al. (2022), of openai/baselines' on Atari:
# https://docs.cleanrl.dev/rl-algorithms/ppo/; of baselines' on MuJoCo:
# https://github.com/openai/baselines/blob/master/benchmarks_mujoco1M.htm
DOCS_ROWS = (
    ("mujoco", "HalfCheetah-v5", "ppo_continuous.py", "defaults", "1443 ± 46", "1669"),
    ("mujoco", "Hopper-v5", "ppo_continuous.py", "defaults", "2383 ± 272", "2316"),
    ("mujoco", "Walker2d-v5", "ppo_continuous.py", "defaults", "2288 ± 572", "3425"),
    ("mujoco", "Swimmer-v5", "ppo_continuous.py", "defaults", "", "111"),
    ("mujoco", "InvertedDoublePendulum-v5", "ppo_continuous.py", "defaults", "", "7103"),
    ("mujoco", "Ant-v5", "ppo_continuous.py", "defaults", "", ""),
    ("mujoco", "Humanoid-v5", "ppo_continuous.py", "defaults", "716 ± 49", ""),
    ("mujoco", "Hopper-v5", "ppo_kl_penalty.py", "defaults: adaptive β, d_targ 0.01", "", ""),
    ("interrupted", "Hopper-v5", "ppo_continuous.py", "killed 7 to 15 times and resumed", "", ""),
    ("classic", "BipedalWalker-v3", "ppo_continuous.py", "`--gamma 0.995`", "", ""),
    ("classic", "Pendulum-v1", "ppo_continuous.py", "recipe", "", ""),
    ("classic", "LunarLander-v3", "ppo_kl_penalty.py", "`--gamma 0.995`", "", ""),
    ("classic", "CartPole-v1", "ppo_continuous.py", "recipe", "490 ± 6", "498 ± 4"),
    ("classic", "CartPole-v1", "ppo_kl_penalty.py", "defaults", "", ""),
    ("rewritten", "HalfCheetah-v5", "ppo_continuous.py", "defaults, rewritten", "", ""),
    ("rewritten", "Hopper-v5", "ppo_continuous.py", "defaults, rewritten", "", ""),
    ("rewritten", "LunarLander-v3", "ppo_continuous.py", "`--gamma 0.995`, rewritten", "", ""),
    ("rewritten", "CartPole-v1", "ppo_continuous.py", "defaults, rewritten", "", ""),
    *(
        ("mujoco-v4", f"{task}-v4", "ppo_continuous.py", "defaults, rewritten", "", "")
        for task in ("HalfCheetah", "Hopper", "Walker2d")
    ),
    ("pong/bf16", "PongNoFrameskip-v4", "ppo_atari.py", "earlier recipe", "", ""),
    ("atari", "PongNoFrameskip-v4", "ppo_atari.py", "defaults", "20.36 ± 0.20", "20.5"),
    ("atari", "BreakoutNoFrameskip-v4", "ppo_atari.py", "defaults", "415 ± 28", "407"),
)

PUBLISHERS = (("CleanRL, published", CLEANRL), ("baselines, published", BLACK))
PUBLISHED = {  # their means, of those that have one
    env_id: [float(text.split(" ")[0]) if text else None for text in published]
    for _, env_id, _, _, *published in DOCS_ROWS
    if any(published)
}

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


def draw(axis: plt.Axes, group: list[dict], color: str, label: str, scale: float = 1.0) -> None:
    """Each seed faintly, their mean, and its 95 % band (of t) from five on; x is scale · step."""
    curves = [np.array(run["curve"], dtype=float) for run in group]
    steps = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), 200)
    values = np.array([np.interp(steps, *curve.T) for curve in curves])
    for curve in curves:
        axis.plot(scale * curve[:, 0], curve[:, 1], color=color, alpha=0.25, linewidth=0.6)
    mean = values.mean(0)
    if len(curves) >= 5:
        half = stats.t.ppf(0.975, len(curves) - 1) * stats.sem(values)
        axis.fill_between(scale * steps, mean - half, mean + half, color=color, alpha=0.15, lw=0)
    label += f" ({len(curves)} seed{'s' if len(curves) > 1 else ''})"
    axis.plot(scale * steps, mean, color=color, linewidth=1.8, label=label)


def panels(number: int, height: float = 2.7) -> tuple[plt.Figure, list[plt.Axes]]:
    """At most three in a row."""
    rows = -(-number // 3)
    columns = -(-number // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False)
    for axis in axes.flat[number:]:
        axis.remove()
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("return, mean of 100 episodes")
    return figure, list(axes.flat[:number])


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot(study: Path, runs: dict[tuple[str, str], list[dict]]) -> None:
    env_ids = sorted({env_id for env_id, _ in runs})
    figure, axes = panels(len(env_ids))
    for axis, env_id in zip(axes, env_ids, strict=True):
        colors = [OURS, CHANGED, "#CC79A7", "#D55E00", BLACK, "#F0E442"]
        for script in (script for env, script in runs if env == env_id):
            color = KL if script == "ppo_kl_penalty.py" else colors.pop(0)
            draw(axis, runs[env_id, script], color, script.replace("ppo_continuous.py", "clipped"))
        for published, (name, color) in zip(PUBLISHED.get(env_id, ()), PUBLISHERS, strict=False):
            if published and study.name in {row[0] for row in DOCS_ROWS}:  # not of shorter runs
                axis.axhline(published, color=color, linestyle="--", linewidth=1.2, label=name)
        axis.set_title(env_id)
        axis.set_xlabel("steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(fontsize=7.5)
    save(figure, study / "curves.png")


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
        finals = finals_of(group)
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
            finals = finals_of(group)
            steps = f"{steps_of(group) / 1e6:.2g}M"
            each, mean = per_seed(finals, digits=0 if abs(finals).max() >= 100 else 1)
            others = [text or "–" for text in published]
            cells = (env_id, f"`{script}`", steps, arguments, each, mean, *others)
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def pong(folder: Path) -> list[str]:
    """When each seed of Pong's recipe was solved, by the points that its summary keeps."""
    rows = [
        "| | mean return at the end | reached 19.5 after, in millions of steps |",
        "|---|---|---|",
    ]
    names = {"solved": "recipe", "anneal-ent": "with `--ent-coef 0.003 --anneal-ent`"}
    for how in ("solved", "anneal-ent", "bf16", "fp32", "fp32-eager"):
        name = names.get(how, f"earlier one, {how.replace('-', ', ')}")
        runs = sum(load(folder / how).values(), [])
        solved = [next((step for step, mean in run["curve"] if mean >= 19.5), None) for run in runs]
        steps = ", ".join(f"{step / 1e6:.2f}" if step else "never" for step in solved)
        rows.append(f"| {name} | {per_seed(finals_of(runs))[0]} | {steps} |")
    return rows


def fill(text: str, name: str, lines: list[str]) -> str:
    """The text with `lines` between its marks <!-- NAME … --> and <!-- end -->."""
    marks = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end -->\n)", re.DOTALL)
    return marks.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), text)


def interval(samples: list[np.ndarray], weights: list[float]) -> tuple[float, float, float]:
    """Σ wᵢ · mean of sample i, and the ends of its 95 % interval, after Welch and Satterthwaite.

    With weights 1 and -1 it is Welch's interval of a difference.
    """
    mean = sum(w * x.mean() for w, x in zip(weights, samples, strict=True))
    parts = np.array([w**2 * x.var(ddof=1) / len(x) for w, x in zip(weights, samples, strict=True)])
    freedom = parts.sum() ** 2 / sum(parts**2 / [len(x) - 1 for x in samples])
    half = stats.t.ppf(0.975, freedom) * parts.sum() ** 0.5
    return float(mean), float(mean - half), float(mean + half)


def finals_of(group: list[dict]) -> np.ndarray:
    return np.array([run["final_mean_return"] for run in group])


def cleanrl(folder: Path, rates: dict[str, dict[str, float]]) -> list[str]:
    """CleanRL's runs beside ours of the same tasks: two figures, and the table of docs/.

    `rates` has the steps per second of both sides on each task, where they were measured.
    """
    ours = load(RESULTS / "mujoco") | {
        key: group for key, group in load(RESULTS / "mujoco-v4").items() if len(group) >= 5
    }
    rows = ["| task | ours (seeds) | CleanRL, v4 (seeds) | difference | 95 % |", "|---" * 5 + "|"]
    pairs = {}  # task: runs of both sides, ours of v5 where there are too few of v4
    for (env_id, _), group in load(folder).items():
        task = env_id.removesuffix("-v4")
        mine = ours.get((env_id, "ppo_continuous.py")) or ours[f"{task}-v5", "ppo_continuous.py"]
        pairs[task] = mine, group
        finals = [finals_of(mine), finals_of(group)]
        cells = [f"{x.mean():.0f} ± {x.std(ddof=1):.0f} ({len(x)})" for x in finals]
        mean, low, high = interval(finals, [1.0, -1.0])
        cells = [f"{mine[0]['args']['env_id'][-2:]}: {cells[0]}", cells[1], f"{mean:.0f}"]
        rows.append(f"| {task} | {' | '.join(cells)} | {low:.0f} to {high:.0f} |")
    timed = {task: sides for task, sides in pairs.items() if task in rates}
    side_by_side(pairs, {}, folder / "learning.png")
    side_by_side(timed, rates, folder / "minutes.png")
    (folder / "table.md").write_text("\n".join(rows) + "\n")
    return rows


def side_by_side(pairs: dict, rates: dict[str, dict[str, float]], path: Path) -> None:
    """Ours and CleanRL's of each task against steps, or against minutes at these steps/s."""
    if not pairs:
        return
    figure, axes = panels(len(pairs), 3.0)
    for axis, (task, sides) in zip(axes, pairs.items(), strict=True):
        for side, group, color in zip(("ours", "CleanRL"), sides, (OURS, CLEANRL), strict=True):
            draw(axis, group, color, side, 1.0 / (60.0 * rates[task][side]) if rates else 1.0)
        for value, (name, color) in zip(PUBLISHED[f"{task}-v5"], PUBLISHERS, strict=True):
            axis.axhline(value, color=color, linestyle="--", linewidth=1.2, label=name)
        axis.set_title(f"{task}, {sides[0][0]['args']['env_id'][-2:]}")
        axis.set_xlabel("minutes" if rates else "steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [label.partition(" (")[0] for label in labels]
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0.0, 0.07, 1.0, 1.0))
    figure.savefig(path)
    plt.close(figure)


# [PPO] Table 1, by the folders of results/paper/
PAPER_SCORES = {"none": -0.39, "clip-0.1": 0.76, "clip-0.2": 0.82, "clip-0.3": 0.70}
PAPER_SCORES |= {"adaptive-0.003": 0.68, "adaptive-0.01": 0.74, "adaptive-0.03": 0.71}
PAPER_SCORES |= {"fixed-0.3": 0.62, "fixed-1": 0.71, "fixed-3": 0.72, "fixed-10": 0.69}
PAPER_NAMES = {"none": "no limit", "clip": "clipped, ε = {}"}
PAPER_NAMES |= {"adaptive": "adaptive KL, d_targ = {}", "fixed": "fixed KL, β = {}"}
PAPER_NAMES = {
    objective: PAPER_NAMES[kind].format(value)
    for objective in PAPER_SCORES
    for kind, _, value in [objective.partition("-")]
}


def paper(folder: Path) -> list[str]:
    """Our Table 1 beside the paper's; scores go from 0, random actions, to 1, the task's best run.

    Returns the table of docs/, of the objectives that every task was run with.
    """
    finals = {}  # objective: {task: final returns}
    for objective in ("random", *PAPER_SCORES):
        runs = load(folder / objective)
        finals[objective] = {env_id: finals_of(group) for (env_id, _), group in runs.items()}
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
        score = ends = ""
        if len(of) == len(floor) and several:
            score = f"{np.mean([x.mean() for x in scores]):.2f}"
            equal = [1 / len(scores)] * len(scores)
            _, low, high = interval(scores, equal) if seeds > 1 else [np.nan] * 3
            ends = f"{low:.2f} to {high:.2f}" if seeds > 1 else ""
            shown[objective] = (float(score), low, high, seeds)
        texts = [objective, str(runs), score, ends, f"{PAPER_SCORES[objective]:.2f}", *cells]
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
        ends = f"{low:.2f} to {high:.2f}" if seeds > 1 else ""
        paper_score = f"{PAPER_SCORES[objective]:.2f}"
        short.append(f"| {objective} | {seeds} | {score:.2f} | {ends} | {paper_score} |")
    if not shown:
        return short
    figure, axis = plt.subplots(figsize=(WIDTH, 0.3 * len(shown) + 1.2))
    for row, (score, low, high, _) in enumerate(shown.values()):
        axis.plot([low, high], [row, row], color=OURS, linewidth=1.5)
        axis.plot(score, row, "o", color=OURS, label="" if row else "ours, and its 95 % interval")
    axis.plot(
        [PAPER_SCORES[objective] for objective in shown], range(len(shown)), "D", markersize=5,
        color=BLACK, fillstyle="none", label="the paper",
    )  # fmt: skip
    axis.set_yticks(range(len(shown)), [PAPER_NAMES[objective] for objective in shown])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("score: 0 for random actions, 1 for the best run of a task; mean over tasks")
    axis.legend(loc="center left", bbox_to_anchor=(0.3, 0.5))
    save(figure, folder / "table1.png")
    return short


def comparisons(samples: dict[str, dict[str, np.ndarray]], control: str) -> dict[str, tuple]:
    """How much the control's mean is above that of each arm, by arm: mean over tasks, low, high.

    The intervals hold for all arms at once with 95 % (Bonferroni). A task's spread is pooled over
    its arms, since three runs of one do not tell it. Last come the differences by task.
    """
    arms = dict.fromkeys(arm for of in samples.values() for arm in of if arm != control)
    freedoms = {task: sum(len(x) - 1 for x in of.values()) for task, of in samples.items()}
    variances = {
        task: sum(len(x) * x.var() for x in of.values()) / freedoms[task]
        for task, of in samples.items()
    }
    found = {}
    for arm in arms:
        pairs = {task: (of[control], of[arm]) for task, of in samples.items() if arm in of}
        gaps = {task: a.mean() - b.mean() for task, (a, b) in pairs.items()}
        parts = [variances[task] * (1 / len(a) + 1 / len(b)) for task, (a, b) in pairs.items()]
        parts = np.array(parts) / len(pairs) ** 2
        freedom = parts.sum() ** 2 / sum(parts**2 / [freedoms[task] for task in pairs])
        half = stats.t.ppf(1.0 - 0.025 / len(arms), freedom) * parts.sum() ** 0.5
        mean = np.mean(list(gaps.values()))
        found[arm] = mean, mean - half, mean + half, gaps
    return found


def runs_without_details(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """By task and detail ("" is none) at least three final returns each, one of each seed.

    Of a run that diverged it is the mean return before that.
    """
    newest = {}  # the scripts learned the same before and after they were rewritten
    for study in ("mujoco", "rewritten"):
        for (env_id, script), group in load(RESULTS / study).items():
            if script == "ppo_continuous.py":
                newest |= {(env_id, run["args"]["seed"]): run for run in group}
    runs = {f"{task}-v5": {} for task in DETAIL_TASKS}
    for env_id, of in runs.items():
        of[""] = finals_of([run for (name, _), run in newest.items() if name == env_id])
        for detail in DETAILS:
            group = sum(load(folder / detail).values(), [])
            finals = finals_of([run for run in group if run["args"]["env_id"] == env_id])
            of |= {detail: finals} if len(finals) > 2 else {}
    return {env_id: of for env_id, of in runs.items() if len(of) > 1}


def details(folder: Path) -> list[str]:
    """What each detail is worth: the score with all of them minus that without it, for docs/.

    Scores as in the paper's Table 1.
    """
    runs = runs_without_details(folder)
    random = load(RESULTS / "paper" / "random") | load(folder / "random")
    floor = {env_id: finals_of(group).mean() for (env_id, _), group in random.items()}
    units = {task: max(x.max() for x in of.values()) - floor[task] for task, of in runs.items()}
    scores = {task: {arm: x / units[task] for arm, x in of.items()} for task, of in runs.items()}
    found = comparisons(scores, "")
    names = [task.removesuffix("-v5") for task in runs]
    rows = [f"| # | without it | worth | 95 % | verdict | {' | '.join(names)} |"]
    rows.append("|---" * (5 + len(names)) + "|")
    seeds = ["| without it | task | each seed | mean ± sd |", "|---" * 4 + "|"]
    order = sorted(found, key=lambda detail: -found[detail][0])
    for detail in order:
        worth, low, high, gaps = found[detail]
        number, instead = DETAILS[detail].number, DETAILS[detail].instead
        each = [
            f"{gaps[task]:z.2f} ({len(runs[task][detail])})" if task in gaps else "–"
            for task in runs
        ]
        cells = [f"{worth:z.2f}", f"{low:.2f} to {high:.2f}", verdict(low, high), *each]
        rows.append(f"| {number} | {instead} | {' | '.join(cells)} |")
    p = [f"{task}: p = {stats.f_oneway(*of.values()).pvalue:.2g}" for task, of in runs.items()]
    rows += ["", f"Do the rows differ at all? Analysis of variance, {', '.join(p)}."]
    for arm in ["", *order]:
        for task, of in runs.items():
            if arm in of:
                instead = DETAILS[arm].instead if arm else "nothing: the defaults"
                seeds.append(f"| {instead} | {task} | {' | '.join(per_seed(of[arm], 0))} |")
    if order:
        figure, axis = plt.subplots(figsize=(WIDTH, 0.27 * len(order) + 1.0))
        for row, detail in enumerate(order):
            worth, low, high, _ = found[detail]
            axis.plot([low, high], [row, row], color=OURS, linewidth=1.5)
            axis.plot(worth, row, "o", color=OURS)
        axis.axvline(0.0, color=BLACK, linewidth=0.8)
        axis.set_yticks(range(len(order)), [DETAILS[detail].instead for detail in order])
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.25)
        axis.set_xlabel("score lost so, and 95 % interval; right of 0 the detail helps")
        save(figure, folder / "worth.png")
    rows = rows if order else ["No detail has three runs of a task yet."]
    (folder / "table.md").write_text("\n".join([*rows, "", *seeds]) + "\n")
    return rows


def verdict(low: float, high: float) -> str:
    if low > 0.0:
        return "essential" if low > 0.25 else "helps"
    return "hurts" if high < 0.0 else "none seen"


def provenance() -> list[str]:
    """Of each study: runs by commit and processor, as their summaries say; for benchmark/README."""
    counts = Counter()
    for path in sorted(RESULTS.rglob("*__*.json")):
        run = json.loads(path.read_text())
        commit = run.get("git") or run.get("git_commit") or "not recorded"
        study = path.relative_to(RESULTS).parts[0]
        threads = run["machine"].rpartition(", ")[2].replace("1 threads", "1 thread")
        counts[study, commit[:7], run.get("processor") or "not recorded", threads] += 1
    rows = ["| study | runs | commit | processor, two cores | of each run |", "|---" * 5 + "|"]
    for (study, commit, processor, threads), number in counts.items():
        rows.append(f"| `{study}` | {number} | {commit} | {processor} | {threads} |")
    return rows


def main() -> None:
    measured = RESULTS / "speed" / "speed.json"
    report = json.loads(measured.read_text()) if measured.exists() else {"contests": {}}
    makers = {
        "paper": ("objectives", paper),
        "cleanrl": ("cleanrl", lambda folder: cleanrl(folder, speed.medians(report))),
        "details": ("details", details),
        "pong": ("pong", pong),
        "speed": ("speed", lambda folder: speed.publish(report)),
    }
    tables = {"results": results(), "provenance": provenance()}
    tables["starts"] = speed.summarize_starts(report)
    for study, (table, make) in makers.items():
        if (RESULTS / study).exists():
            tables[table] = make(RESULTS / study)
    for path in (*DOCS.glob("*.md"), RESULTS.parent / "README.md"):
        text = path.read_text()
        for name, table in tables.items():
            text = fill(text, name, table)
        path.write_text(text)
    others = {path for path in RESULTS.iterdir() if path.is_dir()}
    for study in sorted(others - {RESULTS / name for name in ("paper", "cleanrl", "details")}):
        if runs := load(study):
            if study.name in BESIDE:
                runs = beside(runs, study.name, *BESIDE[study.name])
            plot(study, runs)
            tabulate(study, runs)
            print(f"{study.name}: {sum(map(len, runs.values()))} runs")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
