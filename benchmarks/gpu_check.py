"""What a first look at a GPU should show, part by part, the most valuable first; each has its own limit of time.

    bash benchmarks/gpu_check.sh                        all parts, at most six minutes on one H100 or H200
    bash benchmarks/gpu_check.sh --only attention       one of them
    bash benchmarks/gpu_check.sh --device cpu           a dry run on small sizes

    environment   GPU, driver, versions, which optional packages there are
    gradients     gradient of a micro-batch in fp32 and bf16 beside the CPU's in fp32, with shared prompts and as rows
    attention     the update's attention at 512 to 16k tokens beside flash attention over rows: time, memory, TFLOP/s
    ceilings      a large matrix product in bf16 and a copy: what the next parts can reach at best
    step          two steps of the shape of Qwen3-0.6B, phase by phase; beside TRL where it is installed
    graphs        tokens a second of its rollout with CUDA graphs and without
    demo          the demo, trained for 60 steps: accuracy before and after
    ranks         two processes that share the GPU (gloo): the log of two steps is that of one process
    real          ten steps of SmolLM2-135M (--model FILE.gguf), or of a random model of its shape
    tests         pytest -m gpu

Each part is a process of its own. One line of JSON a part goes to FOLDER/gpu_check.jsonl, what a part printed to
FOLDER/PART.log, and a table is printed at the end. Packages to bring along where there is no network, beside torch and
transformers (wheels, 7 MB together): datasets dill multiprocess xxhash jsonargparse docstring_parser typeshed_client
pydantic pydantic_core annotated-types typing_extensions gguf math-verify latex2sympy2_extended antlr4-python3-runtime,
and trl (1 MB); bitsandbytes (60 MB) only for its tests.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
QUESTION = ("--answer_format", "hash", "--chat_template", "false", "--prompt_template", "{question}\n")
OPTIONAL = "datasets deepspeed trl gguf bitsandbytes flash-attn vllm tensorboard peft"

Found = dict[str, Any]


def output_of(command: list[str], **environment: str) -> str:
    """Standard output of a command of this interpreter; RuntimeError with the end of its output where it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: code {done.returncode}: {done.stdout[-600:]}")
    return done.stdout


def trained(args: argparse.Namespace, *settings: str, processes: int = 1) -> list[dict[str, float]]:
    """Run train.py in a temporary folder; its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        places = ("--output_dir", f"{folder}/output", "--runs_dir", f"{folder}/runs", "--report_to", "none")
        start = (
            ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}") if processes > 1 else ()
        )
        output_of([*start, "train.py", *settings, *places, "--device", args.device])
        [file] = Path(folder).glob("runs/*/metrics.jsonl")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def environment(args: argparse.Namespace) -> Found:
    """Card, driver, versions."""
    import torch
    import transformers

    found: Found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if args.on_gpu:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name,
            "memory_gb": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
        }
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    versions = {}
    for name in OPTIONAL.split():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    return found | versions


def gradients(args: argparse.Namespace) -> Found:
    """Relative distance of gradients from those of the CPU in fp32."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grpo.config.settings import Config
    from grpo.forward import logprobs
    from grpo.models.loading import prepare
    from grpo.training.collate import collate
    from grpo.types import TrainRow

    torch.manual_seed(0)
    length = 700 if args.on_gpu else 40
    config = Qwen3Config(**(SMALL | {"head_dim": 64}), vocab_size=512, max_position_embeddings=4096)
    weights = Qwen3ForCausalLM(config).state_dict()
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 512, 90).tolist()) for _ in range(2)]
    rows = []
    for n in range(8):
        ids = rng.integers(0, 512, length - length // 8 * (n % 4)).astype(np.int32)
        zeros = np.zeros(len(ids), np.float32)
        rows.append(TrainRow(n, prompts[n // 4], ids, zeros, None, float(rng.normal())))

    def gradient(device: str, dtype: str, shares: bool) -> torch.Tensor:
        model = Qwen3ForCausalLM(config)
        model.load_state_dict(weights)
        scorer = logprobs.Scorer(prepare(model.to(device)), Config(model="none", dtype=dtype))
        assert scorer.shares_prompts, "the check of shared prompts failed"
        scorer.shares_prompts = shares
        micro = collate(rows, {row.row: 1.0 for row in rows}, torch.device(device))
        (scorer(micro) * micro.advantages[:, None] * micro.trained).sum().backward()
        return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])

    logprobs.FLAT_BELOW = 10.0
    exact = gradient("cpu", "fp32", False)
    found = {}
    for dtype, limit in (("fp32", 1e-3), ("bf16", 0.1)):
        for shares in (True, False):
            gap = float((gradient(args.device, dtype, shares) - exact).norm() / exact.norm())
            found[f"{dtype} {'shared' if shares else 'rows'}"] = round(gap, 7)
            if not gap < limit:
                raise RuntimeError(f"{found}: above {limit}")
    return found


def attention(args: argparse.Namespace) -> Found:
    """benchmarks.attention: milliseconds, MB and TFLOP/s (forward and backward, ours)."""
    cases = ["8x8x512x512", "2x8x512x2048", "1x8x512x4096", "1x4x512x16384"] if args.on_gpu else ["2x2x8x16"]
    shape = (
        ["--heads", "16", "--kv", "8", "--width", "128"]
        if args.on_gpu
        else ["--heads", "4", "--kv", "2", "--width", "8"]
    )
    found: Found = {}
    for dtype in ("bf16", "fp32"):
        for case in cases if dtype == "bf16" else cases[:2]:
            groups, completions, prompt, length = map(int, case.split("x"))
            pairs = groups * (prompt**2 / 2 + completions * (length**2 / 2 + length * prompt))
            flops = 3.5 * 4 * pairs * int(shape[1]) * int(shape[5])  # forward 2 products, backward 5
            for side in ("ours", "repeated"):
                command = [
                    "-m",
                    "benchmarks.attention",
                    "--device",
                    args.device,
                    "--dtype",
                    dtype,
                    *shape,
                    "--cases",
                    case,
                ]
                one = json.loads(output_of([*command, "--only", side]).splitlines()[-1])
                found[f"{dtype} {case} {side}"] = [round(1e3 * one["s"], 2), round(one["mb"])]
                if side == "ours":
                    found[f"{dtype} {case} {side}"].append(round(flops / one["s"] / 1e12, 1))
    return found


def ceilings(args: argparse.Namespace) -> Found:
    """TFLOP/s of a matrix product in bf16, GB/s of a copy (bytes read and written)."""
    import torch

    size = 8192 if args.on_gpu else 256
    left, right = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size * size * 8, device=args.device)
    target = torch.empty_like(source)

    def seconds(run: Callable[[], Any]) -> float:
        taken = []
        for _ in range(8):
            if args.on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if args.on_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[2:])

    product, copy = seconds(lambda: left @ right), seconds(lambda: target.copy_(source))
    return {"bf16 TFLOP/s": round(2 * size**3 / product / 1e12, 1), "GB/s": round(8 * source.numel() / copy / 1e9)}


def large(folder: str, args: argparse.Namespace) -> list[str]:
    """Settings of a run of a random model in the shape of Qwen3-0.6B (small on a CPU)."""
    from benchmarks.workloads import QWEN3_06B, random_questions, word_model

    words = word_model(Path(folder), 151_936 if args.on_gpu else 96, **(QWEN3_06B if args.on_gpu else SMALL))
    data = (
        random_questions(Path(folder), words, 200, 256) if args.on_gpu else random_questions(Path(folder), words, 8, 12)
    )
    rows = ("32", "512") if args.on_gpu else ("2", "8")
    return [
        "--model", f"{folder}/model", "--data", data, "--question_column", "prompt", "--answer_format", "text",
        "--rewards", json.dumps({f"{PROJECT}/benchmarks/workload_rewards.py:spread_reward": 1.0}),
        "--chat_template", "false", "--prompt_template", "{question}", "--max_prompt_length", "256", "--dtype", "bf16",
        "--batch_size", rows[0], "--max_generate_length", rows[1], "--gradient_accumulation_steps", "1",
        "--num_generations", "8", "--max_steps", "3", "--save_steps", "1000", "--lr", "1e-6",
    ]  # fmt: skip


def phases(rows: list[dict[str, float]]) -> Found:
    """Seconds of the last steps by phase, and tokens a second of the rollout."""
    steps = [row for row in rows if "time/step_s" in row][1:]
    names = ("step", "rollout", "logprobs", "update", "exchange")
    middle = lambda key: statistics.median(row[key] for row in steps)  # noqa: E731
    found = {name: round(middle(f"time/{name}_s"), 2) for name in names if f"time/{name}_s" in steps[0]}
    return found | {"length": round(middle("completions/length_mean"), 1)}


def step(args: argparse.Namespace) -> Found:
    """Phases of a step; with TRL installed one pair of benchmarks.vs_trl."""
    with tempfile.TemporaryDirectory() as folder:
        found = phases(trained(args, *large(folder, args)))
    if args.on_gpu and importlib.util.find_spec("trl"):
        printed = output_of(["-m", "benchmarks.vs_trl", "--workload", "gpu", "--pairs", "1", "--steps", "1"])
        found["beside TRL"] = [line for line in printed.splitlines() if line.startswith("|")]
    return found


def graphs(args: argparse.Namespace) -> Found:
    """Seconds of a rollout with CUDA graphs and without."""
    with tempfile.TemporaryDirectory() as folder:
        settings = large(folder, args)
        return {on: phases(trained(args, *settings, "--cuda_graphs", on))["rollout"] for on in ("true", "false")}


def demo(args: argparse.Namespace) -> Found:
    """The demo's accuracy before and after."""
    short = () if args.on_gpu else ("--max_steps", "2", "--eval_rows", "8")
    rows = trained(args, "--config", "configs/demo.yaml", *short)
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    if args.on_gpu and not accuracy[-1] >= 0.9:
        raise RuntimeError(f"accuracy {accuracy}")
    return {"before": accuracy[0], "after": accuracy[-1]} | phases(rows)


def ranks(args: argparse.Namespace) -> Found:
    """Two processes on one GPU log what one process logs."""
    settings = ("--config", "configs/demo.yaml", "--max_steps", "2", "--eval_rows", "8")
    found: Found = {}
    for processes in (1, 2):
        rows = [row for row in trained(args, *settings, processes=processes) if "reward/mean" in row]
        found[f"{processes}"] = [
            round(rows[0][key], 4) for key in ("reward/mean", "completions/length_mean", "grad_norm")
        ]
    if any(abs(a - b) > 2e-3 * max(1, abs(a)) for a, b in zip(found["1"], found["2"], strict=True)):
        raise RuntimeError(f"{found}")
    return found


def real(args: argparse.Namespace) -> Found:
    """Ten steps of SmolLM2's task, or of a random model of its shape."""
    steps = ("--max_steps", "10" if args.on_gpu else "1", "--save_steps", "1000")
    if args.model:
        rows = trained(args, "--config", "configs/smollm2.yaml", "--model", args.model, "--lr", "1e-5", *steps)
        accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
        return {"before": accuracy[0], "after": accuracy[-1]} | phases(rows)
    from benchmarks.workloads import random_questions, word_model

    with tempfile.TemporaryDirectory() as folder:
        words = word_model(Path(folder), 49_152 if args.on_gpu else 96, **(SMOLLM2 if args.on_gpu else SMALL))
        settings = [
            *large(folder, argparse.Namespace(on_gpu=False)),
            "--data",
            random_questions(Path(folder), words, 60, 90),
        ]
        word_model(Path(folder), len(words) + 1, **(SMOLLM2 if args.on_gpu else SMALL))
        more = (
            "--max_generate_length",
            "96" if args.on_gpu else "8",
            *steps[2:],
            "--max_steps",
            "10" if args.on_gpu else "2",
        )
        return phases(trained(args, *settings, *more))


def tests(args: argparse.Namespace) -> Found:
    """pytest -m gpu; on a CPU only what it would collect."""
    more = () if args.on_gpu else ("--collect-only",)
    printed = output_of(["-m", "pytest", "-m", "gpu", *more])
    return {"pytest": [line for line in printed.splitlines() if line.strip()][-1].strip("= ")}


PARTS: dict[str, tuple[Callable[[argparse.Namespace], Found], int]] = {  # seconds at most
    "environment": (environment, 30),
    "gradients": (gradients, 40),
    "attention": (attention, 120),
    "ceilings": (ceilings, 20),
    "step": (step, 150),
    "graphs": (graphs, 80),
    "demo": (demo, 60),
    "ranks": (ranks, 60),
    "real": (real, 60),
    "tests": (tests, 150),
}


def run_part(name: str, args: argparse.Namespace) -> Found:
    """A part in a process of its own, ended at its limit."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_check", "--run", name, "--device", args.device]
    command += ["--model", args.model] if args.model else []
    limit = PARTS[name][1] if args.on_gpu else 300
    start, log = time.monotonic(), args.out / f"{name}.log"
    try:
        with log.open("w") as file:
            code = subprocess.run(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = json.loads(lines[-1]) if code == 0 else {"failed": " ".join(lines[-3:])[-400:]}
    except subprocess.TimeoutExpired:
        found = {"failed": f"not done in {limit} s"}
    return {"part": name, "seconds": round(time.monotonic() - start, 1)} | found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: a GGUF file, a folder or a hub name")
    parser.add_argument("--out", type=Path, default=PROJECT / "output" / "gpu_check")
    parser.add_argument("--run", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.on_gpu = args.device == "cuda"
    if args.run:
        print(json.dumps(PARTS[args.run][0](args)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.only:
        results.append(run_part(name, args))
        line = json.dumps(results[-1])
        with (args.out / "gpu_check.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
    print("\n| part | seconds | found |\n| --- | ---: | --- |")
    for one in results:
        shown = "; ".join(f"{key} {value}" for key, value in one.items() if key not in ("part", "seconds"))
        print(f"| {one['part']} | {one['seconds']} | {re.sub(r'[|]', '/', shown)[:400]} |")
    return int(any("failed" in one for one in results))


if __name__ == "__main__":
    sys.exit(main())
