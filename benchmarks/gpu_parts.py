"""The parts of benchmarks/gpu_check.py, one a process: python -m benchmarks.gpu_parts PART --findings FILE ...

A part says what it has found as soon as it has found it, and raises where something is wrong.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import PARTS, PROJECT, adopt_orphans
from benchmarks.gpu_kernels import HEADS, SMALL, SMOLLM2, Say, attention, gradients, graphs
from benchmarks.workloads import QWEN3_06B, REWARDS, Workload, random_questions, word_model

PACKAGES = (
    "transformers datasets jsonargparse docstring-parser typeshed-client pydantic trl accelerate peft tensorboard gguf "
    "math-verify deepspeed bitsandbytes flash-attn vllm pytest pytest-xdist pytest-timeout hypothesis"
)


def environment(args: argparse.Namespace, say: Say) -> None:
    """Versions, card, ceilings, and whether train.py can be imported."""
    from benchmarks import floors

    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in PACKAGES.split():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    if args.on_gpu:
        card = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip() if shutil.which(asked[0]) else "?"
        say({"gpu": card.name, "GB": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda, "driver": driver})
    say({"cores": os.cpu_count(), "versions": versions})
    ceilings = floors.measure(torch.device(args.device), torch.bfloat16 if args.on_gpu else torch.float32)
    say({"TFLOP/s": round(ceilings.flops_per_s / 1e12, 2), "GB/s": round(ceilings.bytes_per_s / 1e9)})
    importlib.import_module("train")
    say({"train.py": "can be imported"})


def large(args: argparse.Namespace) -> Workload:
    """A step of the shape of Qwen3-0.6B, small on a CPU; its files are written once for all parts."""
    file = args.shared / "workload.json"
    if not file.exists():
        words = word_model(args.shared, 151_936 if args.on_gpu else 96, **(QWEN3_06B if args.on_gpu else SMALL))
        data = random_questions(args.shared, words, *((200, 256) if args.on_gpu else (8, 12)))
        prompts, group, new, rows = (16, 8, 128, 32) if args.on_gpu else (2, 2, 8, 4)
        reward = f"{REWARDS}:spread_reward"
        work = Workload(
            f"{args.shared}/model", data, reward, prompts, group, 256, new, rows, dtype="bf16", device=args.device
        )
        file.write_text(json.dumps(asdict(work)))
    return Workload(**json.loads(file.read_text()))


def model(args: argparse.Namespace, say: Say) -> None:
    """Write the model of `step` and `trl`."""
    say({"folder": large(args).model})


def threads(args: argparse.Namespace) -> int:
    return min(8, os.cpu_count() or 1) if args.on_gpu else 1


def step(args: argparse.Namespace, say: Say) -> None:
    """Each phase: seconds, its floor, how many times the floor, and what the floor is made of."""
    from benchmarks.step_profile import profiled
    from benchmarks.vs_trl_sides import our_settings
    from grpo.forward.fused_attention import fused_kernel

    work = large(args)
    with tempfile.TemporaryDirectory(dir=args.shared) as folder:
        words = [*our_settings(work, Path(folder), threads(args)), "--rollout_chunk_rows", "256"]
        found = profiled(words, 1)
    say({"s": round(found["step_s_without_probes"], 3), "with probes": round(found["step_s"], 3)})
    phases = found["phases"]
    for name, part in (
        ("rollout", ("prefill", "decode", "drawing")),
        ("update", ("micro_batches", "reduce", "update")),
    ):
        seconds, floor_s = (sum(phases[phase][key] for phase in part) for key in ("s", "floor_s"))
        say({name: {"s": round(seconds, 3), "floor": round(floor_s, 4), "x": round(seconds / floor_s, 1)}})
    for name, phase in phases.items():
        if phase.get("times_floor"):
            figures = {"s": round(phase["s"], 3), "floor": round(phase["floor_s"], 4)}
            say({name: figures | {"x": round(phase["times_floor"], 1), "of": phase.get("bound", "")}})
    if args.on_gpu:
        kernel = fused_kernel(torch.device("cuda", 0), torch.bfloat16, *HEADS["Qwen3-0.6B"])  # what the run used
        say({"attention": type(kernel).__name__ if kernel else "scores in memory"})


def trained(args: argparse.Namespace, *settings: str, processes: int = 1) -> list[dict[str, float]]:
    """Run train.py in a temporary folder; its metrics."""
    command = [sys.executable, "-u"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "benchmarks.shared_gpu"]
    else:
        command += ["train.py"]
    with tempfile.TemporaryDirectory(dir=args.shared) as folder:
        places = ["--output_dir", f"{folder}/output", "--runs_dir", f"{folder}/runs", "--report_to", "none"]
        subprocess.run([*command, *settings, *places, "--device", args.device], cwd=PROJECT, check=True)
        [file] = Path(folder).glob("runs/*/metrics.jsonl")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def seconds_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the steps but the first."""
    steps = [row for row in rows if "time/step_s" in row][1:]
    return {
        name: round(statistics.median(row[f"time/{name}_s"] for row in steps), 3)
        for name in ("step", "rollout", "update")
    }


def demo(args: argparse.Namespace, say: Say) -> None:
    """The demo's accuracy before and after."""
    short = () if args.on_gpu else ("--max_steps", "2", "--eval_rows", "8")
    rows = trained(args, "--config", "configs/demo.yaml", *short)
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    say({"before": accuracy[0], "after": accuracy[-1]} | seconds_of(rows))
    if args.on_gpu and not accuracy[-1] >= 0.9:
        raise RuntimeError(f"accuracy {accuracy}")


def ranks(args: argparse.Namespace, say: Say) -> None:
    """Two processes on one GPU log what one process logs; both runs at once."""
    settings = ("--config", "configs/demo.yaml", "--max_steps", "2", "--eval_rows", "8")
    names = ("reward/mean", "completions/length_mean", "grad_norm")

    def first_step(processes: int) -> list[float]:
        row = next(row for row in trained(args, *settings, processes=processes) if "grad_norm" in row)
        say({f"{processes} ranks": [round(row[name], 4) for name in names]})
        return [row[name] for name in names]

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(first_step, (1, 2))
    if any(abs(a - b) > 2e-3 * max(1, abs(a)) for a, b in zip(one, two, strict=True)):
        raise RuntimeError(f"{names}: {one} and {two}")


def real(args: argparse.Namespace, say: Say) -> None:
    """Ten steps of SmolLM2's task, or of a random model of its shape."""
    from benchmarks.vs_trl_sides import our_settings

    steps = ("--max_steps", "10" if args.on_gpu else "2", "--save_steps", "0")
    if args.model:
        rows = trained(args, "--config", "configs/smollm2.yaml", "--model", args.model, "--lr", "1e-5", *steps)
        accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
        say({"before": accuracy[0], "after": accuracy[-1]} | seconds_of(rows))
        return
    with tempfile.TemporaryDirectory(dir=args.shared) as name:
        folder = Path(name)
        words = word_model(folder, 49_152 if args.on_gpu else 96, **(SMOLLM2 if args.on_gpu else SMALL))
        data = random_questions(folder, words, *((60, 90) if args.on_gpu else (8, 12)))
        work = Workload(f"{folder}/model", data, f"{REWARDS}:spread_reward", 8, 8, 96, 96 if args.on_gpu else 8)
        say(seconds_of(trained(args, *our_settings(work, folder, threads(args)), "--lr", "1e-6", *steps)))


class Results:
    """Says each result of pytest as it comes."""

    def __init__(self, say: Say):
        self.say = say
        self.counts: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See pytest."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            self.say({"results": self.counts, "last": report.nodeid})
            if report.failed:
                self.say({report.nodeid: str(report.longrepr)[-400:]})

    def pytest_collectreport(self, report: Any) -> None:
        """See pytest."""
        if report.failed:
            self.say({f"not collected: {report.nodeid}": str(report.longrepr)[-400:]})

    def pytest_collection_finish(self, session: Any) -> None:
        """See pytest."""
        self.say({"collected": len(session.items)})


def gpu_tests() -> list[str]:
    """The files that hold tests for a GPU."""
    files = (PROJECT / "tests").rglob("test_*.py")
    return sorted(str(file.relative_to(PROJECT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8"))


def tests(args: argparse.Namespace, say: Say) -> None:
    """pytest -m gpu, several at once where xdist is installed; on a CPU only what it would collect."""
    import pytest

    words = [*gpu_tests(), "-m", "gpu", "-vv", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if not args.on_gpu:
        words += ["--collect-only"]
    elif importlib.util.find_spec("xdist"):
        words += ["-n", "10", "--dist", "worksteal"]
    results = Results(say)
    code = pytest.main(words, plugins=[results])
    if code:
        raise RuntimeError(f"pytest ended with {int(code)}: {results.counts}")


def trl(args: argparse.Namespace, say: Say) -> None:
    """A step of `step` on each side in turn; the first pair warms up."""
    from benchmarks.vs_trl import Side, ratios_of, turns

    if importlib.util.find_spec("trl") is None:
        say({"TRL": "is not installed"})
        return
    work, count = large(args), threads(args)
    with tempfile.TemporaryDirectory(dir=args.shared) as name:
        more = (["--rollout_chunk_rows", "256"], [])
        sides = [
            Side(which, sys.executable, work, Path(name) / which, count, own, "/dev/stdout")
            for which, own in zip(("ours", "trl"), more, strict=True)
        ]
        for turn, pair in enumerate(turns(sides, 1, 1)):
            kept = ("step_s", "rollout_s", "update_s", "new_tokens", "peak_mb")
            for which, found in zip(("ours", "TRL"), pair, strict=True):
                say({f"{which}, {'warm' if turn else 'first'}": {key: round(found[key], 2) for key in kept}})
            if turn:
                say({"TRL's over ours": {key: round(values[0], 2) for key, values in ratios_of([pair]).items()}})


RUNS: dict[str, Callable[[argparse.Namespace, Say], None]] = {
    "environment": environment,
    "attention_bf16": functools.partial(attention, dtype="bf16"),
    "attention_fp32": functools.partial(attention, dtype="fp32"),
    "model": model,
    "step": step,
    "graphs": graphs,
    "gradients": gradients,
    "tests": tests,
    "demo": demo,
    "ranks": ranks,
    "real": real,
    "trl": trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--findings", type=Path, required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--model")
    args = parser.parse_args()
    args.on_gpu = args.device == "cuda"
    adopt_orphans()
    if PARTS[args.part].at_once:
        os.environ.setdefault("OMP_NUM_THREADS", "2")  # the others use the cores too
        torch.set_num_threads(min(2, torch.get_num_threads()))

    def say(found: dict[str, Any]) -> None:
        line = json.dumps({"part": args.part} | found)
        with args.findings.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    RUNS[args.part](args, say)


if __name__ == "__main__":
    main()
