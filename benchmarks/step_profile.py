"""Where a step's time goes, and how far each phase is from its floor.

    python -m benchmarks.step_profile --workload demo [--steps 5] [--threads 2] [--json] [-- --our_setting value]

train.py's own loop on a workload of benchmarks/workloads.py, one process. Floors are those of benchmarks/floors.py,
with this process's own ceilings, measured before the run with the same threads. The learning rate moves nothing, and
every step is done twice, once with probes and once without: same prompts, same tokens. The first such pair warms up;
who goes first alternates. So the control stands beside the figures: what a step takes without probes.

    computed  tokens that enter the embedding; while decoding, rows times calls, finished rows that stayed included
    needed    prefill: distinct prompts; decode: tokens after each completion's first; update: rows that carry gradient,
              each group's prompt once
    s, floor  seconds a step, medians; `x floor` is their quotient, `bound` what the floor is made of

Phases are the trainer's own clocks; prefill and decode are the engine's calls. On a GPU every clock waits for the
device first (not tried). The floors are those of whole models: adapters and 4-bit weights are refused.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks import floors
from benchmarks.probes import Probes
from benchmarks.vs_trl_sides import our_settings
from benchmarks.workloads import make
from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.run.main import run_main
from grpo.run.run import Run
from grpo.runtime.distributed import start
from grpo.training.metrics import PHASES, Tally

NAMES = {
    "prefill": "rollout: prefill",
    "decode": "rollout: decode",
    "drawing": "rollout: draw, keep",
    "reward": "reward",
    "exchange": "exchange",
    "logprobs": "logprobs",
    "micro_batches": "update: forward, backward",
    "reduce": "update: reduce, optimizer",
    "update": "update: checksums",
    "rest": "the rest",
}


class Enough(BaseException):
    """All steps are measured; ends the run, and is no error that the run would report."""


@dataclass
class Step:
    """One step with probes."""

    seconds: dict[str, float]
    computed: dict[str, int]
    calls: dict[str, int]
    needed: dict[str, floors.Work]


class Profile:
    """The run, stopped between steps."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self.probes = Probes()
        self.begun = 0  # steps
        self.steps: list[Step] = []
        self.walls: dict[bool, list[float]] = {True: [], False: []}  # with probes, without
        self.tally: Tally | None = None
        self.rows: floors.Rows | None = None
        self.shape: floors.Shape | None = None

    def install(self) -> None:
        """Into train.py, around what it calls; for good, this process does nothing else."""
        plain_tally, plain_load, plain_plan = Run.tally, train.load_policy, train.make_plan
        plain_prompts, plain_rollout = Questions.prompts, train.rollout

        def tally(run, step):
            self.gate()
            self.tally = plain_tally(run, step)
            return self.tally

        def load_policy(cfg, *args):
            if cfg.lora_r or cfg.load_in_4bit:
                raise SystemExit("lora_r, load_in_4bit: the floors are those of models that are trained whole.")
            policy = plain_load(cfg, *args)
            self.probes.model = policy.model
            self.shape = floors.shape_of(policy.model, 2 if cfg.dtype == "bf16" else floors.FP32)
            return policy

        def make_plan(cfg: Config, prompts, lengths, *args, **how):
            plan = plain_plan(cfg, prompts, lengths, *args, **how)
            trained = [[n for micro in part.micro_batches for n in micro] for part in plan]
            asked = [prompt.token_ids for prompt in prompts]
            self.rows = floors.Rows(
                asked, cfg.num_generations, lengths.tolist(), trained, cfg.num_iterations, cfg.beta > 0
            )
            return plan

        Run.tally, train.load_policy, train.make_plan = tally, load_policy, make_plan
        Questions.prompts = lambda questions, step, count: plain_prompts(questions, step // 2, count)

        def rollout(engine, prompts, slots, *rest):
            first = slots[0] // len(prompts) // 2 * len(prompts)
            return plain_rollout(engine, prompts, range(first, first + len(prompts)), *rest)

        train.rollout = rollout

    def gate(self) -> None:
        """Between two steps. Raises Enough after the last."""
        self.probes.settle()
        now = time.perf_counter()
        if self.begun:
            number = self.begun - 1
            if number >= 2:  # the first pair warms up
                self.walls[probed(number)].append(now - self.began)
                if probed(number):
                    self.keep(now - self.began)
            self.probes.take_off()
        if self.begun == 2 * (self.num_steps + 1):
            raise Enough
        self.probes.clear()
        if probed(self.begun):
            self.probes.put()
        self.begun += 1
        self.began = time.perf_counter()

    def keep(self, wall_s: float) -> None:
        """Note the step that ends here."""
        assert self.tally is not None and self.rows is not None and self.shape is not None
        shape, rows = self.shape, self.rows
        clocks = {name: self.tally.maxima[f"time/{name}_s"] for name in (*PHASES, "micro_batches", "reduce")}
        rollout_s = clocks.pop("rollout")
        clocks |= {name: self.probes.seconds[name] for name in ("prefill", "decode")}
        clocks["drawing"] = rollout_s - clocks["prefill"] - clocks["decode"]
        clocks["update"] -= clocks["micro_batches"] + clocks["reduce"]
        seconds = clocks | {"rest": wall_s - sum(clocks.values())}
        needed = {
            "prefill": floors.prefill(shape, rows),
            "decode": floors.decode(shape, rows),
            "drawing": floors.drawing(shape, rows),
            "logprobs": floors.logprobs(shape, rows),
            "micro_batches": floors.forward_backward(shape, rows),
            "reduce": floors.optimizer(shape, rows),
        }
        self.steps.append(Step(seconds, dict(self.probes.computed), dict(self.probes.calls), needed))


def probed(number: int) -> bool:
    """Whether step `number`, from 0, has probes: one of each pair, the second and the first in turn.

    >>> [probed(number) for number in range(6)]
    [False, True, True, False, False, True]
    """
    return bool((number + number // 2) % 2)


def summary(steps: list[Step], ceilings: floors.Ceilings) -> dict[str, dict[str, Any]]:
    """Each phase: medians over the steps."""
    middle = lambda values: statistics.median(list(values))  # noqa: E731
    found: dict[str, dict[str, Any]] = {}
    whole = middle(sum(step.seconds.values()) for step in steps)
    for name in NAMES:
        needs = [step.needed.get(name, floors.Work()) for step in steps]
        seconds, floor_s = middle(s.seconds[name] for s in steps), middle(map(ceilings.floor_s, needs))
        found[name] = {
            "s": seconds,
            "share": seconds / whole,
            "calls": middle(s.calls.get(name, 0) for s in steps),
            "computed": middle(s.computed.get(name, 0) for s in steps),
            "needed": middle(w.tokens for w in needs),
            "flops": middle(w.flops for w in needs),
            "bytes": middle(w.bytes for w in needs),
            "floor_s": floor_s,
            "times_floor": seconds / floor_s if floor_s else None,
            "bound": ceilings.bound(needs[0]) if floor_s else None,
        }
    floor_s = sum(phase["floor_s"] for phase in found.values())
    found["whole step"] = {"s": whole, "share": 1.0, "floor_s": floor_s, "times_floor": whole / floor_s}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """For people."""
    titles = ("phase", "s", "share", "calls", "computed", "needed", "GFLOP", "MB", "floor s", "x floor", "bound")
    widths = (26, 8, 7, 7, 9, 9, 9, 9, 9, 8, 6)
    lines = [titles]
    for name, phase in found.items():
        blank = lambda key, text, scale=1.0, phase=phase: (  # noqa: E731
            format(phase[key] / scale, text) if phase.get(key) else ""
        )
        lines.append(
            (
                NAMES.get(name, name),
                f"{phase['s']:.4f}",
                f"{phase['share']:.1%}",
                blank("calls", ",.0f"),
                blank("computed", ",.0f"),
                blank("needed", ",.0f"),
                blank("flops", ",.2f", 1e9),
                blank("bytes", ",.1f", 1e6),
                blank("floor_s", ".4f"),
                blank("times_floor", ".1f"),
                phase.get("bound") or "",
            )
        )
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )


def profiled(words: list[str], pairs: int) -> dict[str, Any]:
    """Train with these settings of train.py: ceilings and phases. Ends the process where the run fails."""
    cfg, _ = load_config(words)
    world = start(cfg.device, cfg.num_threads)
    ceilings = floors.measure(world.device, torch.bfloat16 if cfg.dtype == "bf16" else torch.float32)
    profile = Profile(pairs)
    profile.install()
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Enough):
        sys.exit(run_main(train.train, load_config, words))
    return {
        "device": world.device.type,
        "dtype": cfg.dtype,
        "ceilings": asdict(ceilings),
        "step_s": statistics.median(profile.walls[True]),
        "step_s_without_probes": statistics.median(profile.walls[False]),
        "ratio": statistics.median(a / b for a, b in zip(profile.walls[True], profile.walls[False], strict=True)),
        "phases": summary(profile.steps, ceilings),
    }


def main() -> int:
    """Measure the ceilings, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", required=True)
    parser.add_argument("--steps", type=int, default=5, help="pairs of steps, with probes and without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gsm8k", type=Path, help="train.jsonl, for gsm8k and smollm2")
    parser.add_argument("--model", help="for smollm2 and real")
    parser.add_argument("--json", action="store_true", help="also one line of JSON")
    args, more = parser.parse_known_args()
    more = [word for word in more if word != "--"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = our_settings(make(args.workload, folder, args.gsm8k, args.model), folder, args.threads) + more
        found = profiled(words, args.steps)
    print(
        f"{args.workload}: {args.steps} steps, medians, on {found['device']}, {found['dtype']}, {args.threads} threads"
    )
    ceilings = found["ceilings"]
    print(f"ceilings: {ceilings['flops_per_s'] / 1e9:,.1f} GFLOP/s, {ceilings['bytes_per_s'] / 1e9:,.1f} GB/s\n")
    print(table(found["phases"]))
    with_s, without_s = found["step_s"], found["step_s_without_probes"]
    print(f"\na step with probes {with_s:.4f} s, without {without_s:.4f} s, with / without {found['ratio']:.3f}")
    if args.json:
        told = {"workload": args.workload, "steps": args.steps, "threads": args.threads, "settings": more}
        print(json.dumps(told | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
