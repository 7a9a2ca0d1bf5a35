"""Bytes each process sends in a step: measured on the loopback device and from the calls, against grpo.plan's figure.

    unshare --user --map-root-user --net bash -c "ip link set lo up; python benchmarks/traffic.py [--ranks 2 3]"

train.py itself under torchrun with gloo, for ddp and ZeRO 1 to 3, on a random Qwen3 made on the spot; prompts and
completions at their longest, every row with a gradient, several micro-batches a rank: the case that the plan describes.
ZeRO-3 runs twice: as it is, and with `stage3_max_live_parameters` 0, so that weights are freed after each use, as they
are where a model exceeds what DeepSpeed keeps gathered (10^9 parameters).

wire    what the loopback device carried from the end of one step to the end of the next (/proc/net/dev), over W. That
        counts everybody's loopback traffic: start it in a network of its own, as above, or on a quiet machine.
calls   sizes of the tensors given to torch.distributed's collectives, times what a ring algorithm sends for them.
control the wire's bytes over the plan of each other backend: wrong formulas, which must miss.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from memory_plan import arguments, make

PROJECT = Path(__file__).resolve().parent.parent
STEPS, WARM_UP = 5, 2
SETTINGS = {
    "batch_size": 4,
    "num_generations": 4,
    "max_generate_length": 16,
    "micro_batch_tokens": 64,
    "rollout_chunk_rows": 4,
    "logits_chunk_mb": 16,
    "max_steps": STEPS,
}
CASE: dict = {"shape": (8000, 512, 1536, 4, 8, 4, 64), "prompt": 16, "ranks": 2, "settings": SETTINGS}
BACKENDS: dict[str, dict] = {"ddp": {}} | {
    f"ZeRO-{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)
}
SMALL = "ZeRO-3, live limit 0"  # as if the model were larger than what DeepSpeed keeps gathered
BACKENDS[SMALL] = BACKENDS["ZeRO-3"]
LIVE_LIMIT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
REWARD = """def noise(completion_ids, **columns):
    return [float(sum(i * token for i, token in enumerate(ids))) for ids in completion_ids]
"""


def case_of(backend: str, ranks: int, folder: Path) -> dict:
    """The case, with a backend and a number of ranks."""
    settings = {**SETTINGS, **BACKENDS[backend]}
    if backend == SMALL:
        file = folder / "live_limit.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, **LIVE_LIMIT}}))
        settings["deepspeed_config"] = str(file)
    return {**CASE, "ranks": ranks, "settings": settings}


def ring_bytes(name: str, ranks: int, first, second) -> float:
    """Bytes that a rank sends for a collective with these first two arguments, by a ring algorithm."""
    size = lambda tensor: tensor.numel() * tensor.element_size()  # noqa: E731
    if name in ("all_reduce", "all_reduce_coalesced"):
        tensors = first if isinstance(first, list) else [first]
        return sum(2 * size(tensor) * (ranks - 1) / ranks for tensor in tensors)
    if name == "all_gather":
        return size(second) * (ranks - 1)
    if name == "reduce_scatter":
        return sum(map(size, second)) * (ranks - 1) / ranks
    whole = {
        "all_gather_into_tensor": first,
        "reduce_scatter_tensor": second,
        "all_to_all_single": second,
        "broadcast": first,
        "reduce": first,
    }[name]
    return size(whole) * (ranks - 1) / ranks


class Traffic:
    """Adds up what steps send."""

    NAMES = (
        "all_reduce",
        "all_reduce_coalesced",
        "all_gather",
        "reduce_scatter",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_to_all_single",
        "broadcast",
        "reduce",
    )

    def __init__(self) -> None:
        self.nested = False
        self.calls: dict[str, float] = {}
        self.wire = 0
        self.steps: list[dict] = []

    def install(self) -> None:
        """Wrap the collectives, before anything imports one by name."""
        import torch.distributed as dist

        for name in self.NAMES:
            wrapped = self.counted(name, getattr(dist, name))
            setattr(dist, name, wrapped)
            setattr(dist.distributed_c10d, name, wrapped)

    def counted(self, name: str, original: Callable) -> Callable:
        """A collective that adds its bytes."""

        def wrapped(*args, **kwargs):
            if self.nested:
                return original(*args, **kwargs)
            named = [v for k, v in kwargs.items() if k not in ("op", "group", "async_op", "src", "dst")]
            first, second = [*args, *named, None, None][:2]
            ranks = int(os.environ["WORLD_SIZE"])
            self.calls[name] = self.calls.get(name, 0.0) + ring_bytes(name, ranks, first, second)
            self.nested = True
            try:
                return original(*args, **kwargs)
            finally:
                self.nested = False

        return wrapped

    def end_step(self) -> None:
        """Record a step."""
        line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
        wire = int(line.split(":")[1].split()[8])  # bytes sent
        self.steps.append({"wire": (wire - self.wire) / int(os.environ["WORLD_SIZE"]), "calls": dict(self.calls)})
        self.wire = wire
        self.calls.clear()


def measure(case: dict, folder: Path) -> int:
    """train.py with completions of full length; rank 0 leaves its steps."""
    traffic = Traffic()
    traffic.install()
    import train
    from grpo.config.command_line import load_config
    from grpo.run.main import run_main
    from grpo.run.run import Run
    from grpo.training.metrics import Tally

    reduce = Tally.reduce

    def reduced(*args):
        metrics = reduce(*args)  # the last collective of a step
        traffic.end_step()
        return metrics

    Tally.reduce = reduced  # type: ignore[method-assign]
    Run.save = lambda *args, **how: None  # type: ignore[method-assign]
    train.stop_token_ids = lambda *args: frozenset()
    code = run_main(train.train, load_config, arguments(case, folder))
    if os.environ["RANK"] == "0":
        (folder / "traffic.json").write_text(json.dumps(traffic.steps[WARM_UP:]))
    return code


def planned(case: dict, folder: Path) -> float:
    """Bytes that grpo.plan says each process sends in a step."""
    from transformers import AutoConfig

    from grpo.config.command_line import load_config
    from grpo.plan.memory import estimate

    cfg, _ = load_config(arguments(case, folder))
    return sum(row.bytes for row in estimate(cfg, AutoConfig.from_pretrained(folder), case["ranks"]).traffic)


def compare(ranks: int, folder: Path) -> None:
    """Print a row for each backend."""
    plans = {backend: planned(case_of(backend, ranks, folder), folder) for backend in BACKENDS}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(PROJECT),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }
    for backend, plan in plans.items():
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            __file__,
            "--do",
            backend,
            "--folder",
            str(folder),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        steps = json.loads((folder / "traffic.json").read_text())
        wire = sum(step["wire"] for step in steps) / len(steps)
        calls = sum(sum(step["calls"].values()) for step in steps) / len(steps)
        others = ", ".join(f"{wire / other:.2f} ({name})" for name, other in plans.items() if other != plan)
        print(
            f"| {ranks} | {backend} | {plan / 1e6:.1f} | {wire / 1e6:.1f} | {wire / plan:.3f} | {calls / 1e6:.1f} "
            f"| {calls / plan:.3f} | {others} |",
            flush=True,
        )
        by_call = {name: round(size / 1e6, 1) for name, size in steps[-1]["calls"].items()}
        print(f"    {backend}, by call, MB: {by_call}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--do", choices=list(BACKENDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        sys.exit(measure(case_of(args.do, int(os.environ["WORLD_SIZE"]), args.folder), args.folder))
    print(
        "| processes | backend | plan, MB | wire, MB | wire / plan | calls, MB | calls / plan | control: wire / plan "
        "of another |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        make(CASE, Path(name))
        (Path(name) / "reward.py").write_text(REWARD)  # no ties: a row with advantage 0 would be left out
        for ranks in args.ranks:
            compare(ranks, Path(name))


if __name__ == "__main__":
    main()
