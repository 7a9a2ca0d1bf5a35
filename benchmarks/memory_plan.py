"""Measured peak memory of real training steps on the CPU against what grpo.plan says.

    python benchmarks/memory_plan.py [--only CASE] [--phases]
    python benchmarks/memory_plan.py --table       # the table of docs/scaling.md; measures nothing

Each case is train.py itself for two steps (fp32, rewards in workers of their own) on a random Qwen3 made on the
spot, in a fresh process: its highest resident size (VmHWM) above that of an idle process, one that has imported the
same and multiplied two small matrices. Every case is chosen so that another row of the estimate is the largest; its
control is the same comparison with that row left out. Large blocks are made to come from mmap and go back at once
(MALLOC_MMAP_THRESHOLD_), so that resident memory is what is alive, not what the C library keeps for later.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "2",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": str(PROJECT),
}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
CASES: dict[str, dict] = {
    "optimizer state": {
        "shape": (32000, 768, 2048, 8, 12, 4, 64),
        "row": "moments",
        "ranks": 1,
        "settings": {
            "batch_size": 2,
            "num_generations": 4,
            "max_generate_length": 24,
            "micro_batch_tokens": 256,
            "rollout_chunk_rows": 8,
            "logits_chunk_mb": 16,
        },
        "prompt": 40,
    },
    "adapter": {  # of the model above
        "shape": (32000, 768, 2048, 8, 12, 4, 64),
        "row": "weights",
        "ranks": 1,
        "settings": {
            "batch_size": 2,
            "num_generations": 4,
            "max_generate_length": 24,
            "micro_batch_tokens": 256,
            "rollout_chunk_rows": 8,
            "logits_chunk_mb": 16,
            "lora_r": 8,
        },
        "prompt": 40,
    },
    "activations": {
        "shape": (4000, 256, 1024, 8, 8, 4, 64),
        "row": "activations",
        "ranks": 1,
        "settings": {
            "batch_size": 4,
            "num_generations": 8,
            "max_generate_length": 32,
            "micro_batch_tokens": 5120,
            "rollout_chunk_rows": 16,
            "logits_chunk_mb": 16,
        },
        "prompt": 288,
    },
    "vocabulary": {
        "shape": (120000, 128, 256, 2, 4, 2, 32),
        "row": "logits block",
        "ranks": 1,
        "settings": {
            "batch_size": 4,
            "num_generations": 8,
            "max_generate_length": 32,
            "micro_batch_tokens": 2048,
            "rollout_chunk_rows": 32,
            "logits_chunk_mb": 256,
        },
        "prompt": 32,
    },
    "KV cache": {
        "shape": (2000, 256, 512, 8, 8, 8, 64),
        "row": "KV cache",
        "ranks": 1,
        "settings": {
            "batch_size": 8,
            "num_generations": 8,
            "max_generate_length": 16,
            "micro_batch_tokens": 700,
            "rollout_chunk_rows": 64,
            "logits_chunk_mb": 16,
        },
        "prompt": 640,
    },
    "ZeRO-2, 2 ranks": {
        "shape": (32000, 768, 2048, 8, 12, 4, 64),
        "row": "moments",
        "ranks": 2,
        "settings": {
            "batch_size": 4,
            "num_generations": 4,
            "max_generate_length": 24,
            "micro_batch_tokens": 256,
            "rollout_chunk_rows": 8,
            "logits_chunk_mb": 16,
            "backend": "deepspeed",
            "zero_stage": 2,
        },
        "prompt": 40,
    },
    "ZeRO-3, 2 ranks": {
        "shape": (32000, 768, 2048, 8, 12, 4, 64),
        "row": "rollout copy",
        "ranks": 2,
        "settings": {
            "batch_size": 4,
            "num_generations": 4,
            "max_generate_length": 24,
            "micro_batch_tokens": 256,
            "rollout_chunk_rows": 8,
            "logits_chunk_mb": 16,
            "backend": "deepspeed",
            "zero_stage": 3,
        },
        "prompt": 40,
    },
}
FAMILIES = {  # name: model type, SHAPE, tied head
    "0.5B": ("qwen2", (151936, 896, 4864, 24, 14, 2, 64), True),  # as Qwen2.5-0.5B
    "3B": ("qwen2", (151936, 2048, 11008, 36, 16, 2, 128), True),  # as Qwen2.5-3B
    "8B": ("qwen3", (151936, 4096, 12288, 36, 32, 8, 128), False),  # as Qwen3-8B
    "32B": ("qwen3", (151936, 5120, 25600, 64, 64, 8, 128), False),  # as Qwen3-32B
    "70B": ("llama", (128256, 8192, 28672, 80, 64, 8, 128), False),  # as Llama-3-70B
}
TABLE = {  # the settings of the table
    "batch_size": 256,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_prompt_length": 512,
    "max_generate_length": 1024,
    "micro_batch_tokens": 3072,
    "rollout_chunk_rows": 16,
    "dtype": "bf16",
    "gradient_checkpointing": True,
}
REWARD = "def noise(completions, **columns):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"


def high_water_mb() -> float:
    """This process's highest resident size since it was last reset, in MB of 10^6."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def make(case: dict, folder: Path) -> None:
    """A random model, a tokenizer, questions of exactly as many tokens as the prompt may have."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.support.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(zip(SHAPE, case["shape"], strict=True))
    Qwen3ForCausalLM(
        Qwen3Config(**shape, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)
    letters = [t for t in "bcdfghjklmnpqrstvwxz" if len(tokenizer(t + t).input_ids) == 2]
    rows = []
    for n in range(64):
        text = (letters[n % len(letters)] + letters[n // len(letters)]) * case["prompt"]
        while len(tokenizer(text).input_ids) > case["prompt"]:
            text = text[:-1]
        rows.append(json.dumps({"question": text, "answer": "1"}))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARD)


def arguments(case: dict, folder: Path) -> list[str]:
    """train.py's command line."""
    settings = {
        "model": folder,
        "data": folder / "questions.jsonl",
        "rewards": json.dumps({f"{folder}/reward.py:noise": 1.0}),
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
        "device": "cpu",
        "chat_template": "off",
        "max_steps": 2,
        "save_steps": 0,
        "save_in_background": False,
        "resume": "never",
        "num_threads": 1,
        "gradient_accumulation_steps": 1,
        "max_prompt_length": case["prompt"],
        **case["settings"],
    }
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def measure_training(case: dict, folder: Path, phases: bool) -> None:
    """Train; each rank leaves its highest resident size, and that of each phase when asked."""
    import grpo.training.metrics
    from grpo.run.run import Run

    Run.save = lambda *args, **how: None  # type: ignore[method-assign]  # checkpoints are not what is measured
    found: dict[str, float] = {}
    if phases:
        phase = grpo.training.metrics.Tally.phase

        def watched(self, name):
            Path("/proc/self/clear_refs").write_text("5")
            found["before " + name] = high_water_mb()
            inner = phase(self, name)

            class Watch:
                def __enter__(self):
                    return inner.__enter__()

                def __exit__(self, *error):
                    found[name] = max(found.get(name, 0.0), high_water_mb())
                    return inner.__exit__(*error)

            return Watch()

        grpo.training.metrics.Tally.phase = watched  # type: ignore[method-assign, assignment]
    import train
    from grpo.config.command_line import load_config
    from grpo.run.main import run_main

    code = run_main(train.train, load_config, arguments(case, folder))
    found["peak"] = high_water_mb()
    (folder / f"rank_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(code)


def measure_idle(case: dict) -> None:
    """Import what training imports; touch the maths libraries once."""
    import torch
    import torch.utils.tensorboard
    from transformers import Qwen3ForCausalLM

    import train  # noqa: F401

    if case["settings"].get("lora_r"):
        pass
    if case["settings"].get("backend") == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401
    assert Qwen3ForCausalLM is not None  # its module is imported
    square = torch.ones(64, 64, requires_grad=True)
    (square @ square).sum().backward()
    print(json.dumps({"peak": high_water_mb()}))


def print_estimate(case: dict, folder: Path) -> None:
    """The plan's peak, with and without the row that the control leaves out; and every row."""
    from transformers import AutoConfig

    from grpo.config.command_line import load_config
    from grpo.plan.memory import MEMORY_PHASES, estimate

    cfg, _ = load_config(arguments(case, folder))
    found = estimate(cfg, AutoConfig.from_pretrained(folder), case["ranks"])
    rows = {f"{row.name} ({', '.join(row.phases)})": row.bytes / 1e6 for row in found.memory}
    phases = {phase: found.at(phase) / 1e6 for phase in MEMORY_PHASES}
    print(
        json.dumps(
            {
                "peak": found.peak() / 1e6,
                "control": found.peak(case["row"]) / 1e6,
                "worst": found.worst,
                "rows": rows,
                "phases": phases,
                "parameters": found.size.parameters,
            }
        )
    )


def print_table(limit_gb: float = 80.0) -> None:
    """Memory and bytes sent for five shapes, 1 to 1,024 GPUs and three ways to share them, as Markdown."""
    from transformers import AutoConfig

    from grpo.config.settings import Config
    from grpo.plan.memory import estimate_for
    from grpo.plan.model_size import model_size

    ways = {"ddp": {}, "ZeRO-2": {"zero_stage": 2}, "ZeRO-3": {"zero_stage": 3}}
    print("| model | GPUs | " + " | ".join(f"{way}: GB, highest in, GB sent" for way in ways) + " |")
    print("| --- | ---: |" + " --- |" * len(ways))
    for name, (kind, values, tied) in FAMILIES.items():
        size = model_size(AutoConfig.for_model(kind, **dict(zip(SHAPE, values, strict=True)), tie_word_embeddings=tied))
        for gpus in (1, 8, 64, 1024):
            cells = []
            for way in ways.values():
                backend = {"backend": "deepspeed", **way} if way else {}
                found = estimate_for(Config(**TABLE, **backend), size, gpus)
                sent = sum(row.bytes for row in found.traffic) / 1e9
                fits = "fits" if found.peak() <= limit_gb * 1e9 else "**no**"
                cells.append(f"{found.peak() / 1e9:.0f}, {found.worst}, {sent:.0f}: {fits}")
            print(f"| {name} ({size.parameters / 1e9:.2f}) | {gpus} | " + " | ".join(cells) + " |")


def child(what: str, name: str, folder: Path, ranks: int = 1, extra: tuple[str, ...] = ()) -> dict:
    """Run a part of this file in a fresh process; its last line, or its ranks' files."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, __file__, "--do", what, "--only", name, "--folder", str(folder), *extra]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, cwd=PROJECT)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    if what == "train":
        return json.loads(max(folder.glob("rank_*.json"), key=lambda f: json.loads(f.read_text())["peak"]).read_text())
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--phases", action="store_true", help="also the highest of each phase of a step")
    parser.add_argument("--table", action="store_true", help="print the table of docs/scaling.md")
    parser.add_argument("--do", choices=["make", "idle", "train", "plan"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        case = CASES[args.only]
        {
            "make": lambda: make(case, args.folder),
            "idle": lambda: measure_idle(case),
            "train": lambda: measure_training(case, args.folder, args.phases),
            "plan": lambda: print_estimate(case, args.folder),
        }[args.do]()
        return
    if args.table:
        return print_table()
    print(
        "| case | parameters, million | measured, MB | plan, MB | plan / measured | row left out | control / measured |"
    )
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |", flush=True)
    for name in [args.only] if args.only else CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            child("make", name, folder)
            idle = child("idle", name, folder)["peak"]
            extra = ("--phases",) if args.phases else ()
            measured = child("train", name, folder, case["ranks"], extra)
            plan = child("plan", name, folder)
        peak = max(measured.values()) - idle
        print(
            f"| {name} | {plan['parameters'] / 1e6:.0f} | {peak:.0f} | {plan['peak']:.0f} "
            f"| {plan['peak'] / peak:.2f} | {case['row']} | {plan['control'] / peak:.2f} |",
            flush=True,
        )
        if args.phases:
            for key, value in measured.items():
                print(f"    measured {key}: {value - idle:.0f}")
            for key, value in [*plan["phases"].items(), *plan["rows"].items()]:
                print(f"    plan {key}: {value:.0f}")


if __name__ == "__main__":
    main()
