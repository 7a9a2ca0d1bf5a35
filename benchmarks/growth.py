"""How a step's time grows with the size of the group, prompts, completions, the vocabulary and the model.

    python -m benchmarks.growth [--png growth.png] [--steps 3] [--threads 2] [--axes group ...] [-- --our_setting value]

Each point is train.py's own loop in a process of its own (benchmarks/vs_trl_sides.py), on a random Qwen3 that never
ends a completion, so that lengths are what they are set to; one axis moves, the others stay as in BASE. All points
of an axis are started, then take steps in turn, up the axis and down again, one at a time: what else the machine
does falls on all of them. The first step warms up. Times are medians, x the axis's own number (for the model its
parameters without the embedding).

The slope is that of log time against log x, least squares: 1 is linear, 2 quadratic. `upper` takes the upper half of
the points alone, where what a step costs anyway weighs least; above 1.1 the axis is flagged as super-linear.
"""

import argparse
import contextlib
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from benchmarks.vs_trl import Side
from benchmarks.workloads import REWARDS, Workload, word_model, write_questions

PROMPTS = 4  # a step
BASE: dict[str, Any] = {"group": 8, "prompt": 64, "completion": 32, "vocabulary": 4000, "model": (256, 3)}
AXES: dict[str, list[Any]] = {  # five points each
    "group": [4, 8, 16, 32, 64],
    "prompt": [32, 64, 128, 512, 1024],
    "completion": [16, 32, 64, 128, 256],
    "vocabulary": [1000, 4000, 16_000, 48_000, 150_000],
    "model": [(64, 2), (128, 3), (256, 3), (384, 4), (512, 6)],  # hidden size, layers
}
TITLES = {
    "group": "completions of a prompt, G",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
    "vocabulary": "words of the vocabulary",
    "model": "parameters without the embedding",
}
PARTS = {"step_s": "whole step", "rollout_s": "rollout", "update_s": "update"}
STEEP = 1.1
COLOURS = {"step_s": "#12395f", "rollout_s": "#2f9e6e", "update_s": "#d9822b"}


@dataclass(frozen=True)
class Point:
    """One value of one axis, measured."""

    x: float
    seconds: dict[str, float]  # by the names in PARTS


def never_ends(folder: Path) -> int:
    """Make word 0 too unlikely to be drawn. Returns the parameters without the embedding.

    The embedding is the head too. One number of every word's vector is 1, of word 0's -1: the normed hidden state has
    much of it, so word 0's logit lies far below all others, which stay equally far apart.
    """
    model = Qwen3ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        embedding[0, 0] = -1.0
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) - embedding.numel()


def make_point(setting: dict[str, Any], folder: Path) -> tuple[Workload, int]:
    """A point's model and questions, and the parameters of its body."""
    folder.mkdir()
    hidden, layers = setting["model"]
    body = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
    }
    words = word_model(folder, setting["vocabulary"], **body)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=setting["prompt"])) for _ in range(8 * PROMPTS)]
    data = write_questions(folder, [{"prompt": text, "answer": "none"} for text in texts])
    work = Workload(
        str(folder / "model"),
        data,
        f"{REWARDS}:spread_reward",
        PROMPTS,
        setting["group"],
        setting["prompt"],
        setting["completion"],
    )
    return work, never_ends(folder / "model")


def turns(count: int, rounds: int) -> list[int]:
    """Which point takes a step when: up the axis, down again, and so on.

    >>> turns(3, 2)
    [0, 1, 2, 2, 1, 0]
    """
    return [i for turn in range(rounds) for i in (range(count) if turn % 2 == 0 else range(count - 1, -1, -1))]


def measure(axis: str, steps: int, threads: int, more: list[str], folder: Path) -> list[Point]:
    """All points of an axis. Ends the program where completions did not have the length they should have."""
    settings = [BASE | {axis: value} for value in AXES[axis]]
    made = [make_point(setting, folder / str(i)) for i, setting in enumerate(settings)]
    found: list[list[dict[str, float]]] = [[] for _ in settings]
    with contextlib.ExitStack() as open_sides:
        sides = []
        for i, (work, _) in enumerate(made):
            sides.append(Side("ours", sys.executable, work, folder / f"side_{i}", threads, more))
            open_sides.callback(sides[-1].close)
            sides[-1].run(1)
        for i in turns(len(sides), steps):
            found[i].append(sides[i].run(1))
    points = []
    for setting, (_, parameters), measured in zip(settings, made, found, strict=True):
        forced = PROMPTS * setting["group"] * setting["completion"]
        tokens = {step["new_tokens"] for step in measured}
        if tokens != {forced}:
            raise SystemExit(f"{axis}: {setting}: {tokens} tokens in a step, not {forced}: completions ended early.")
        x = parameters if axis == "model" else setting[axis]
        points.append(Point(x, {part: statistics.median(step[part] for step in measured) for part in PARTS}))
    return points


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Exponent of the power law that fits best: least squares on the logarithms.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def slopes(points: list[Point], part: str) -> tuple[float, float]:
    """Over all points, and over the upper half, the middle one included."""
    xs, ys = [point.x for point in points], [point.seconds[part] for point in points]
    middle = len(points) // 2
    return slope(xs, ys), slope(xs[middle:], ys[middle:])


def report(axis: str, points: list[Point]) -> list[str]:
    """Print an axis; what grows faster than linearly there."""
    print(f"\n## {TITLES[axis]}")
    print(f"{'':12}" + "".join(f"{point.x:>12,.0f}" for point in points) + f"{'slope':>10}{'upper':>8}")
    steep = []
    for part, title in PARTS.items():
        over_all, upper = slopes(points, part)
        cells = "".join(f"{point.seconds[part]:12.4f}" for point in points)
        flag = "  super-linear" if upper > STEEP else ""
        print(f"{title:12}{cells}{over_all:10.2f}{upper:8.2f}{flag}", flush=True)
        steep += [f"{title} over {TITLES[axis]}: {upper:.2f}"] * bool(flag)
    return steep


def plot(found: dict[str, list[Point]], path: Path) -> None:
    """A panel an axis, both scales logarithmic; the grey line is linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = pyplot.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    panels = list(grid.flat)
    for panel, (axis, points) in zip(panels, found.items()):
        xs = [point.x for point in points]
        whole = [point.seconds["step_s"] for point in points]
        linear = [whole[-1] * x / xs[-1] for x in xs]
        lowest = min(min(point.seconds.values()) for point in points)
        shown = [(x, y) for x, y in zip(xs, linear) if y >= lowest / 2]
        panel.plot(*zip(*shown), color="#b5b5b5", linestyle="--", linewidth=1.0, label="linear: 1.00")
        for part, title in PARTS.items():
            over_all, upper = slopes(points, part)
            panel.plot(
                xs,
                [point.seconds[part] for point in points],
                marker="o",
                markersize=4,
                linewidth=1.6,
                color=COLOURS[part],
                label=f"{title}: {over_all:.2f}, upper {upper:.2f}",
            )
        panel.set(xscale="log", yscale="log", xlabel=TITLES[axis], ylabel="seconds a step")
        panel.set_xticks(xs, [short(x) for x in xs])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        panel.grid(alpha=0.25, which="major")
        panel.legend(frameon=False, fontsize=8, title="slopes of log time", title_fontsize=8, loc="upper left")
        bottom, top = panel.get_ylim()
        panel.set_ylim(bottom, top * (top / bottom) ** 0.45)  # room for the legend
    for panel in panels[len(found) :]:
        panel.axis("off")
    if len(found) < len(panels):
        panels[len(found)].text(0.06, 0.95, notes(), va="top", fontsize=9, linespacing=1.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def short(x: float) -> str:
    """A number for an axis.

    >>> short(64), short(1024), short(4000), short(1234567)
    ('64', '1024', '4k', '1.2M')
    """
    if x < 1000 or (x < 10_000 and x % 100):
        return f"{x:g}"
    return f"{x / 1e3:.3g}k" if x < 1e6 else f"{x / 1e6:.2g}M"


def notes() -> str:
    """What the panels share."""
    hidden, layers = BASE["model"]
    return (
        f"Elsewhere: {PROMPTS} prompts a step, G = {BASE['group']},\n"
        f"prompts of {BASE['prompt']} tokens, completions of {BASE['completion']},\n"
        f"{BASE['vocabulary']:,} words, hidden size {hidden}, {layers} layers.\n\n"
        "Dashed: linear growth through the last point.\nupper: slope of the upper three points."
    )


def main() -> int:
    """Measure every axis, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--axes", nargs="+", default=[*AXES], choices=[*AXES])
    parser.add_argument("--steps", type=int, default=3, help="steps of each point, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--png", type=Path, help="where to draw")
    args, more = parser.parse_known_args()
    more = [word for word in more if word != "--"]
    found, steep = {}, []
    for axis in args.axes:
        with tempfile.TemporaryDirectory() as name:
            found[axis] = measure(axis, args.steps, args.threads, more, Path(name))
        steep += report(axis, found[axis])
    print("\n" + ("super-linear: " + "; ".join(steep) if steep else f"No slope of the upper half is above {STEEP}."))
    if args.png:
        plot(found, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
