"""What a slow network costs a step: latency before every collective, this trainer and TRL's GRPOTrainer in turn.

    python benchmarks/latency.py [--trl_python PATH] [--pairs 5] [--latency_ms 5] [--turns 30]

Both sides: two gloo ranks under torchrun, one thread each, the demo's base model, the same 4 prompts x 4 completions of
exactly 8 tokens, gradient accumulation 4 (two rows a micro-batch, four of them a rank), AdamW at a rate of 1e-30,
which leaves the weights as they are. TRL: no telemetry, checkpoints, gradient checkpointing, bf16 or logging.

torch.distributed's collectives are wrapped: each call is counted, and sleeps before it runs. Turn by turn a step has
no latency (the control); latency before each collective; the same, and before each request to the rendezvous store
too (this trainer deals out its chunks of rows through it). In TRL's favour: a collective of Python objects counts
once, though it is two, and of the buckets that DistributedDataParallel sums from C++ (a hook shows them) only the
last one waits, as they overlap. `gloo` is the backend's own count of its operations: what it says beyond the calls
went past the wrappers. Seconds are rank 0's, from the end of a step to the end of the next; the added time of a run is
the median, over its turns, of a step's time with latency minus that of the step without it in the same turn.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BASE = PROJECT / "demo" / "base"
COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "gather",
    "gather_object",
    "scatter",
    "scatter_object_list",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "monitored_barrier",
    "_broadcast_coalesced",
)
REQUESTS = ("add", "get", "set", "wait", "check", "compare_set", "delete_key")
MODES = ("none", "collectives", "collectives and store")
PROMPTS, GROUP, ACCUMULATION, RANKS, TOKENS = 4, 4, 4, 2, 8
WARM_UP = 3
NEVER_RATE = 1e-30  # an AdamW step of this size is lost in the rounding of every weight


def noise(completions: list, **columns: object) -> list[float]:
    """A reward that differs within every group, so that every row is trained on."""
    return [float(sum(map(ord, text)) % 97) for text in completions]


class Latency:
    """Counts what the steps send, and delays it."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.mode = 0
        self.nested = False
        self.calls: Counter[str] = Counter()
        self.requests = 0
        self.operations = 0
        self.began = time.perf_counter()
        self.steps: list[dict] = []

    def install(self) -> None:
        """Wrap torch.distributed; before anything imports a collective by name."""
        import torch.distributed as dist

        for name in COLLECTIVES:
            wrapped = self.delayed(name, getattr(dist, name))
            setattr(dist, name, wrapped)
            if hasattr(dist.distributed_c10d, name):
                setattr(dist.distributed_c10d, name, wrapped)
        for name in REQUESTS:
            setattr(dist.Store, name, self.asked(getattr(dist.Store, name)))

    def delayed(self, name: str, original: Callable) -> Callable:
        """A collective that is counted and waits first; those it is made of go through."""

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            if self.nested:
                return original(*args, **kwargs)
            self.calls[name] += 1
            self.nested = True
            try:
                self.wait(1)
                return original(*args, **kwargs)
            finally:
                self.nested = False

        return wrapped

    def asked(self, original: Callable) -> Callable:
        """A request to the store, the same way."""

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            self.requests += 1
            self.wait(2)
            return original(*args, **kwargs)

        return wrapped

    def wait(self, mode: int) -> None:
        """Sleep when the step's mode reaches `mode`."""
        if self.mode >= mode:
            time.sleep(self.seconds)

    def bucket(self, _state: object, bucket):
        """A hook of DistributedDataParallel: its own sum, counted; the last bucket of a backward waits."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.calls["bucket of DistributedDataParallel"] += 1
        self.nested = True
        try:
            self.wait(1 if bucket.is_last() else len(MODES))
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]
        finally:
            self.nested = False

    def end_step(self) -> None:
        """Record a step and go on to the next mode; all ranks do so after the same step."""
        import torch.distributed as dist

        now = time.perf_counter()
        groups: list = list(dist.distributed_c10d._world.pg_map)
        operations = sum(group._get_sequence_number_for_group() for group in groups)
        self.steps.append(
            {
                "mode": self.mode,
                "seconds": now - self.began,
                "calls": dict(self.calls),
                "requests": self.requests,
                "gloo": operations - self.operations,
            }
        )
        self.mode = len(self.steps) % len(MODES)
        self.calls.clear()
        self.requests, self.operations, self.began = 0, operations, time.perf_counter()

    def save(self, file: Path) -> None:
        """Rank 0's steps, those of the warm-up left out."""
        if os.environ["RANK"] == "0":
            file.write_text(json.dumps(self.steps[WARM_UP:]))


def questions() -> list[str]:
    """The prompts of every step."""
    lines = (PROJECT / "demo" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    return [json.loads(line)["question"] for line in lines]


def run_ours(latency: Latency, folder: Path, steps: int) -> None:
    """train.py, with completions that never stop early."""
    sys.path.insert(0, str(PROJECT))
    import train
    from grpo.config.command_line import load_config
    from grpo.run.main import run_main
    from grpo.run.run import Run
    from grpo.training.metrics import Tally

    reduce = Tally.reduce

    def reduced(*args):
        metrics = reduce(*args)  # the last collective of a step
        latency.end_step()
        return metrics

    Tally.reduce = reduced  # type: ignore[method-assign]
    Run.save = lambda *args, **how: None  # type: ignore[method-assign]
    train.stop_token_ids = lambda *args: frozenset()
    data = folder / "questions.jsonl"
    if os.environ["RANK"] == "0":
        data.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions()))
    while not data.exists():
        time.sleep(0.01)
    settings = {
        "model": BASE,
        "data": data,
        "rewards": json.dumps({f"{__file__}:noise": 1.0}),
        "device": "cpu",
        "prompt_template": "{question}\n",
        "chat_template": "off",
        "batch_size": PROMPTS // ACCUMULATION,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_generations": GROUP,
        "max_prompt_length": 96,
        "max_generate_length": TOKENS,
        "rollout_chunk_rows": PROMPTS * GROUP // RANKS,
        "max_steps": steps,
        "micro_batch_tokens": 2 * (96 + TOKENS),
        "lr": NEVER_RATE,
        "num_threads": 1,
        "save_steps": 0,
        "resume": "never",
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
    }
    code = run_main(train.train, load_config, [part for k, v in settings.items() for part in (f"--{k}", str(v))])
    if code:
        sys.exit(code)


def run_trl(latency: Latency, folder: Path, steps: int) -> None:
    """GRPOTrainer on the same work."""
    import datasets
    import torch
    import trl
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)
    make = DistributedDataParallel.__init__

    def hooked(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.register_comm_hook(None, latency.bucket)

    DistributedDataParallel.__init__ = hooked  # type: ignore[method-assign]

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            latency.end_step()

    args = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        loss_type="grpo",
        beta=0.0,
        num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP // (RANKS * ACCUMULATION),
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        temperature=1.0,
        learning_rate=NEVER_RATE,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_dropout=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        reward_funcs=noise,
        args=args,
        processing_class=AutoTokenizer.from_pretrained(BASE),
        callbacks=[EndOfStep()],
        train_dataset=datasets.Dataset.from_dict({"prompt": [q + "\n" for q in questions()]}),
    ).train()


def launch(side: str, python: str, latency_ms: float, turns: int) -> list[dict]:
    """One run on two ranks; rank 0's steps."""
    with tempfile.TemporaryDirectory() as name:
        command = [
            python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={RANKS}",
            __file__,
            "--do",
            side,
            "--folder",
            name,
            "--latency_ms",
            str(latency_ms),
            "--turns",
            str(turns),
        ]
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "TRL_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(command, cwd=name, env={**os.environ, **quiet}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        return json.loads((Path(name) / "steps.json").read_text())


def shown(values: list[float], digits: int) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def compare(pairs: int, pythons: dict[str, str], latency_ms: float, turns: int) -> None:
    """Run the sides in turn and print the tables."""
    runs: dict[str, list[list[dict]]] = {side: [] for side in pythons}
    for _ in range(pairs):
        for side, python in pythons.items():
            runs[side].append(launch(side, python, latency_ms, turns))

    def seconds(steps: list[dict], mode: int) -> float:
        return statistics.median(step["seconds"] for step in steps if step["mode"] == mode)

    def added(steps: list[dict], mode: int) -> float:
        turns = zip(steps[mode :: len(MODES)], steps[:: len(MODES)], strict=True)
        return 1000 * statistics.median(slow["seconds"] - plain["seconds"] for slow, plain in turns)

    print(
        f"| side | step s, 0 ms | step s, {latency_ms:g} ms | added ms a step | collectives a step | gloo's count "
        "| added ms, store too | store requests a step |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side, found in runs.items():
        steps = [step for run in found for step in run]
        cells = [shown([seconds(run, mode) for run in found], 3) for mode in (0, 1)]
        cells += [shown([added(run, 1) for run in found], 0), shown([sum(s["calls"].values()) for s in steps], 0)]
        cells += [shown([s["gloo"] for s in steps], 0), shown([added(run, 2) for run in found], 0)]
        print(f"| {side} | " + " | ".join([*cells, shown([s["requests"] for s in steps], 0)]) + " |")
    for mode in (1, 2):
        trl, ours = (statistics.median(added(run, mode) for run in runs[side]) for side in ("trl", "ours"))
        print(f"added time, TRL / ours, latency before {MODES[mode]}: {trl / ours:.1f}")
    for side, found in runs.items():
        print(f"calls of one step, {side}: {found[0][0]['calls']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--latency_ms", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=30, help="steps of each kind in a run")
    parser.add_argument("--trl_python", default=sys.executable, help="an interpreter that has trl (pip install trl)")
    parser.add_argument("--do", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do:
        latency = Latency(args.latency_ms / 1000)
        latency.install()
        steps = WARM_UP + args.turns * len(MODES)
        {"ours": run_ours, "trl": run_trl}[args.do](latency, args.folder, steps)
        latency.save(args.folder / "steps.json")
        return
    probe = subprocess.run([args.trl_python, "-c", "import trl"], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        print(
            f"error: trl_python: {args.trl_python} cannot import trl ({reason}). Install trl==1.16.0 there, or give "
            "--trl_python the interpreter of an environment that has it.",
            file=sys.stderr,
        )
        sys.exit(2)
    compare(args.pairs, {"trl": args.trl_python, "ours": sys.executable}, args.latency_ms, args.turns)


if __name__ == "__main__":
    main()
