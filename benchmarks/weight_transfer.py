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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from grpo.config.command_line import load_config
from grpo.models.checks import stop_token_ids
from grpo.rollout import Weights
from grpo.run.task import load_task
from grpo.runtime.distributed import start, stop
from grpo.runtime.signals import Stopping
from grpo.training.load_policy import load_policy
from grpo.training.open_engine import open_engine

TRANSFERS = 5
SETTINGS = ["--config", "configs/demo.yaml", "--rollout_engine", "vllm", "--report_to", "none"]


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def whole(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """All tensors are gathered, then the first is sent."""
    yield from [(name, tensor.clone()) for name, tensor in weights()]


def measured(call: Callable[..., Any], peaks: list[float]) -> Callable[..., Any]:
    """The call; appends the highest resident size during it above that before it."""

    def wrapped(*args: Any) -> Any:
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = call(*args)
        peaks.append(resident_mb("VmHWM") - before)
        return result

    return wrapped


def main(argv: list[str]) -> None:
    """Print a line on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config([*SETTINGS, "--output_dir", f"{folder}/o", "--runs_dir", f"{folder}/r", *argv])[0]
        world = start("cpu", cfg.num_threads)
        task = load_task(cfg)
        policy = load_policy(cfg, world)
        stops = stop_token_ids(policy.model, task.tokenizer, task.recipe.end_of_turn, lambda line: None)
        engine = open_engine(cfg, world, policy, stops, task.tokenizer, Stopping(sys.exit))
        sizes = sorted(tensor.numel() * 4 / 1e6 for _, tensor in policy.weights())
        for kind, weights in (
            ("as it is", policy.weights),
            ("control, whole", partial(whole, policy.weights)),
        ):
            seconds, peaks = [], {"_send": [], "_probe": []}
            for part, found in peaks.items():
                setattr(engine, part, measured(getattr(type(engine), part).__get__(engine), found))
            for _ in range(TRANSFERS):
                policy.counters.updates += 1
                began = time.monotonic()
                engine.load_weights(weights, policy.counters.updates)
                seconds.append(time.monotonic() - began)
            worst = [max(found, default=0.0) for found in peaks.values()]
            found = world.gather_rows(np.array([np.median(seconds), *worst])).max(0)
            if world.is_main:
                print(
                    f"{kind}: {sum(sizes):.1f} MB in {found[0]:.2f} s, median of {TRANSFERS}; peak above idle of any "
                    f"rank {found[1]:.1f} MB, of the probes {found[2]:.1f}; a shard is {sum(sizes) / world.size:.1f} "
                    f"MB, the two largest tensors {sum(sizes[-2:]):.1f} MB",
                    flush=True,
                )
        stop()


if __name__ == "__main__":
    main(sys.argv[1:])
