"""What sending the weights to a vLLM server takes: seconds, bytes, and each rank's memory, also where ZeRO shards them.

    torchrun --nproc_per_node=2 -m benchmarks.weight_transfer --backend deepspeed --zero_stage 3 \
        --rollout_server http://127.0.0.1:8100 [--model FILE.gguf] [settings]

GRPO_SERVER_TOKEN holds the server's secret; the server serves the same --model (default demo/base). A transfer is
`VllmEngine.load_weights`: the stream, vLLM's reload, the checksums, the probes. Memory is the highest resident size
during a transfer above that before it, the largest of all ranks; the rank's shard is in both. Asked: the two largest
tensors at most. Control: weights that are gathered whole before the first is sent.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from grpo.config.command_line import load_config
from grpo.models.checks import stop_token_ids
from grpo.run.task import load_task
from grpo.runtime.distributed import start, stop
from grpo.training.load_policy import load_policy
from grpo.training.open_engine import open_engine

TRANSFERS = 5
SETTINGS = ["--config", "configs/demo.yaml", "--rollout_engine", "vllm", "--report_to", "none"]


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def main(argv: list[str]) -> None:
    """Print a line on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config([*SETTINGS, "--output_dir", f"{folder}/o", "--runs_dir", f"{folder}/r", *argv])[0]
        world = start("cpu", cfg.num_threads)
        task = load_task(cfg)
        policy = load_policy(cfg, world)
        stops = stop_token_ids(policy.model, task.tokenizer, task.recipe.end_of_turn, lambda line: None)
        engine = open_engine(cfg, world, policy, stops, task.tokenizer, sys.exit)
        sizes = sorted(tensor.numel() * 4 / 1e6 for _, tensor in policy.weights())
        for kind, weights in (
            ("as it is", policy.weights),
            ("control, whole", lambda: [(name, tensor.clone()) for name, tensor in policy.weights()]),
        ):
            seconds, peaks = [], []
            for _ in range(TRANSFERS):
                policy.counters.updates += 1
                before = resident_mb("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")
                began = time.monotonic()
                engine.load_weights(weights, policy.counters.updates)
                seconds.append(time.monotonic() - began)
                peaks.append(resident_mb("VmHWM") - before)
            found = world.gather_rows(np.array([np.median(seconds), max(peaks[1:])])).max(0)
            if world.is_main:
                print(
                    f"{kind}: {sum(sizes):.1f} MB in {found[0]:.2f} s (median of {TRANSFERS}); peak above idle "
                    f"{found[1]:.1f} MB of any rank, two largest tensors {sum(sizes[-2:]):.1f} MB",
                    flush=True,
                )
        stop()


if __name__ == "__main__":
    main(sys.argv[1:])
