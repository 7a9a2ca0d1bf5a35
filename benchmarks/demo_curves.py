"""Run the demo as a user does, for several seeds, beside its control; print the figures and draw the curves.

    python benchmarks/demo_curves.py                          seeds 1 2 3, docs/demo_curves.png (needs matplotlib)
    python benchmarks/demo_curves.py --seeds 7 --plot ""      one more seed, no plot
    python benchmarks/demo_curves.py --lr 5e-5 --max_steps 30 what it does not know itself goes to train.py

The control trains on shuffled rewards (shuffled_reward.py): the same rewards, given to the wrong answers.
Accuracy is that of the 256 held-out questions. Wall time is that of the whole command, imports and
evaluation included; seconds of a phase are those of its slowest rank, summed over the steps.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from grpo.config.command_line import load_config  # noqa: E402
from grpo.data.questions import load_questions  # noqa: E402
from grpo.data.recipe import make_recipe  # noqa: E402
from grpo.evaluate.held_out import evaluate  # noqa: E402
from grpo.models.checks import load_model, quiet, stop_token_ids  # noqa: E402
from grpo.models.loading import load_tokenizer  # noqa: E402
from grpo.rewards.pool import open_rewards  # noqa: E402
from grpo.rollout.engine import NativeEngine  # noqa: E402
from grpo.runtime.distributed import start  # noqa: E402
from grpo.training.metrics import PHASES  # noqa: E402

SHUFFLED = {"benchmarks/shuffled_reward.py:shuffled_final_answer_reward": 1.0}
BLUES, GREY = ("#12395f", "#2f7fc4", "#7db8e8"), "#a8a8a8"


@dataclass(frozen=True)
class Result:
    """One finished run."""

    seed: int
    shuffled: bool
    wall_s: float
    steps: list[dict[str, float]]
    before: dict[str, float]
    after: dict[str, float]
    sampled_before: float

    @property
    def gain(self) -> float:
        """Greedy held-out accuracy won."""
        return self.after["eval/accuracy"] - self.before["eval/accuracy"]


def run(seed: int, shuffled: bool, sampled_before: float, extra: list[str]) -> Result:
    """Train the demo on two ranks in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        control = ["--rewards", json.dumps(SHUFFLED)] if shuffled else []
        start_s = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                "train.py",
                "--seed",
                str(seed),
                "--output_dir",
                f"{folder}/output",
                "--runs_dir",
                f"{folder}/runs",
                *control,
                *extra,
            ],
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )
        wall_s = time.monotonic() - start_s
        if done.returncode:
            sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
        [file] = Path(folder).glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    evals = [row for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "reward/mean" in row]
    return Result(seed, shuffled, wall_s, steps, evals[0], evals[-1], sampled_before)


def sampled_accuracy(seed: int, extra: list[str]) -> float:
    """Accuracy of the base on the held-out questions, one completion each at temperature 1."""
    cfg, _ = load_config([*extra, "--seed", str(seed)])
    tokenizer = load_tokenizer(cfg.model)
    model = load_model(cfg.model, start().device)
    questions = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer, held_out=True)
    engine = NativeEngine(model, stop_token_ids(model, tokenizer), cfg.max_generate_length, cfg.seed, cfg.dtype)
    cfg = dataclasses.replace(cfg, eval_generations=1)  # the demo samples at temperature 1
    metrics = evaluate(engine, questions, open_rewards(cfg, print), tokenizer, cfg, start(), print)
    return metrics["eval/accuracy"]


def table(results: list[Result]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| rewards | seed | greedy before | sampled before | greedy after | gain, points | length before | after "
        "| wall s | " + " | ".join(f"{phase} s" for phase in PHASES) + " |",
        "| --- |" + " ---: |" * (8 + len(PHASES)),
    ]
    for r in results:
        seconds = [sum(step[f"time/{phase}_s"] for step in r.steps) for phase in PHASES]
        cells = [
            "shuffled" if r.shuffled else "true",
            r.seed,
            f"{r.before['eval/accuracy']:.1%}",
            f"{r.sampled_before:.1%}",
            f"{r.after['eval/accuracy']:.1%}",
            f"{100 * r.gain:+.1f}",
            f"{r.before['eval/length_mean']:.1f}",
            f"{r.after['eval/length_mean']:.1f}",
            f"{r.wall_s:.0f}",
            *(f"{s:.1f}" for s in seconds),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def verdicts(results: list[Result]) -> list[tuple[str, bool]]:
    """What the demo promises, and whether it held."""
    true, control = [r for r in results if not r.shuffled], [r for r in results if r.shuffled]
    return [
        ("greedy before <= 50 %", all(r.before["eval/accuracy"] <= 0.5 for r in results)),
        ("sampled before 20-50 %", all(0.2 <= r.sampled_before <= 0.5 for r in results)),
        ("greedy after >= 90 % on true rewards", all(r.after["eval/accuracy"] >= 0.9 for r in true)),
        ("within 5 minutes", all(r.wall_s <= 300 for r in true)),
        ("gain <= 5 points on shuffled rewards", all(r.gain <= 0.05 for r in control)),
    ]


def plot(results: list[Result], path: Path) -> None:
    """Reward and completion length against the step, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    controls, learning = [r for r in results if r.shuffled], [r for r in results if not r.shuffled]
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    curves = [
        ("reward/mean", "mean reward of the step", (0, 1.02)),
        ("completions/length_mean", "mean completion length, tokens", (0, None)),
    ]
    for panel, (key, label, limits) in zip(panels, curves, strict=True):
        for r in controls:
            panel.plot(
                [s["step"] for s in r.steps],
                [s[key] for s in r.steps],
                color=GREY,
                linewidth=1.0,
                label="control: rewards shuffled" if r is controls[0] else None,
            )
        for r, blue in zip(learning, itertools.cycle(BLUES)):
            panel.plot(
                [s["step"] for s in r.steps],
                [s[key] for s in r.steps],
                color=blue,
                linewidth=1.6,
                label=f"seed {r.seed}",
            )
        panel.set(xlabel="step", ylabel=label, xlim=(1, None), ylim=limits)
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[1:] + handles[:1], labels[1:] + labels[:1], loc="outside upper center", ncols=4, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--plot", default="docs/demo_curves.png", help="where to draw the curves; empty: nowhere")
    args, extra = parser.parse_known_args()
    quiet()
    results = []
    for shuffled in (False, True):
        for seed in args.seeds:
            results.append(run(seed, shuffled, sampled_accuracy(seed, extra), extra))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(results) + "\n")
    for promise, held in verdicts(results):
        print(f"{'holds' if held else 'FAILS'}  {promise}")
    if args.plot:
        try:
            plot(results, PROJECT / args.plot)
        except ImportError:
            print("no plot: matplotlib is not installed")
    return 0 if all(held for _, held in verdicts(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
