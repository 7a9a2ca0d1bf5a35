"""What a checkpoint costs: steps without saving, saving in the background, and saving in the foreground, in turn.

    python benchmarks/save_cost.py [--pairs 5] [--nproc 1] [--hidden 256]

A random Qwen3 of the given width on the demo's questions, 12 steps, a checkpoint after every second one. Seconds per
step are the wall time from the third step's end to the last step's end, divided by the steps; medians, lowest and
highest in brackets. Added: what saving adds to the wall time, for each checkpoint. Blocked: what the
loop itself measured as waiting (save/snapshot_s + save/wait_s), for each checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 12, 2
KINDS = {
    "none": ("--save_steps", "0"),
    "background": ("--save_steps", str(EVERY)),
    "foreground": ("--save_steps", str(EVERY), "--save_in_background", "false"),
}
START = """
import sys, time
sys.path.insert(0, {project!r})
import train
from grpo.config.command_line import load_config
from grpo.run.log import RunLog
from grpo.run.main import run_main
plain = RunLog.log_step

def log_step(self, step, *args):
    metrics = plain(self, step, *args)
    if self.world.is_main:
        print("at", step, time.monotonic(), flush=True)
    return metrics

RunLog.log_step = log_step
sys.exit(run_main(train.train, load_config, sys.argv[1:]))
"""


def make_model(folder: Path, hidden: int) -> None:
    """A random model with the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(PROJECT / "demo" / "base")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, 3 * hidden, 8
    config.layer_types = ["full_attention"] * 8
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PROJECT / "demo" / "base").save_pretrained(folder)


def run(model: Path, nproc: int, kind: str) -> tuple[float, dict[str, float]]:
    """Train once. Returns seconds a step, and the mean of each save/ metric over the checkpoints that reported it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "start.py").write_text(START.format(project=str(PROJECT)))
        command = [
            sys.executable,
            "launch/torchrun.py",
            "--standalone",
            f"--nproc_per_node={nproc}",
            str(folder / "start.py"),
            "--config",
            "configs/demo.yaml",
            "--model",
            str(model),
            "--eval_data",
            "null",
            "--max_steps",
            str(STEPS),
            "--output_dir",
            str(folder / "output"),
            "--runs_dir",
            str(folder / "runs"),
            "--num_threads",
            "1",
            "--save_total_limit",
            "2",
            *KINDS[kind],
        ]
        done = subprocess.run(command, cwd=PROJECT, env=os.environ, check=True, capture_output=True, text=True)
        at = {int(w[1]): float(w[2]) for line in done.stdout.splitlines() if (w := line.split())[:1] == ["at"]}
        [file] = (folder / "runs").glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        names = ("save/snapshot_s", "save/wait_s", "save/write_s")
        means = {n: statistics.mean(values) for n in names if (values := [row[n] for row in rows if n in row])}
        return (at[STEPS] - at[3]) / (STEPS - 3), means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    saves: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args.hidden)
        size = (Path(name) / "model.safetensors").stat().st_size * 3 / 1e6
        for _ in range(args.pairs):
            for kind in KINDS:
                step, means = run(Path(name), args.nproc, kind)
                seconds[kind].append(step)
                saves[kind].append(means)
    print(f"{args.nproc} process(es), checkpoints of {size:.0f} MB after every {EVERY} steps, {args.pairs} turns")
    base = seconds["none"]
    for kind, values in seconds.items():
        added = [(a - b) * EVERY * 1000 for a, b in zip(values, base)]
        shares = [(a - b) / b for a, b in zip(values, base)]
        line = f"{kind}: {statistics.median(values):.3f} s a step ({min(values):.3f} - {max(values):.3f})"
        if kind != "none":
            blocked = [1000 * (m.get("save/snapshot_s", 0) + m.get("save/wait_s", 0)) for m in saves[kind]]
            write = [1000 * m["save/write_s"] for m in saves[kind]]
            line += (
                f"; added {statistics.median(added):.0f} ms a checkpoint ({min(added):.0f} - {max(added):.0f}), "
                f"{statistics.median(shares):.1%} of the step time; the loop was blocked "
                f"{statistics.median(blocked):.0f} ms, the write took {statistics.median(write):.0f} ms"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
