"""What a first look at a GPU should show, in one run of at most `--budget` seconds (six minutes on one H100 or H200).

    bash benchmarks/gpu_check.sh                        all parts, the most valuable first
    bash benchmarks/gpu_check.sh --only step graphs     some of them
    bash benchmarks/gpu_check.sh --device cpu           a dry run on small sizes

    environment      versions, card, driver; what a matrix product and a copy reach; whether train.py can be imported
    attention_bf16   whether the update's attention goes through torch's fused kernels; the update's attention at 512 to
    attention_fp32   16k tokens beside torch's own over rows: time, memory, TFLOP/s
    model            writes the model of the next part, random weights
    step             steps of the shape of Qwen3-0.6B: each phase beside its floor in operations and bytes
    graphs           its rollout with CUDA graphs and without
    gradients        gradient of a micro-batch in fp32 and bf16 beside the CPU's in fp32, prompts shared and as rows
    tests            pytest -m gpu, result by result
    demo             the demo, trained for 60 steps: accuracy before and after
    ranks            two processes that share the GPU (gloo): their first step is that of one process
    real             ten steps of SmolLM2-135M (--model FILE.gguf), or of a random model of its shape
    trl              steps of `step` in turn with TRL's, where TRL is installed

Each part is a process of its own, with a limit of its own; `gradients` to `real` time nothing and run at once. When a
part ends, or is ended, so does all that it started. A part that would get less than a third of its limit is left out,
with a line that says so. The parts stand in gpu_parts.py and gpu_kernels.py. Three files, written as findings come:

    FOLDER/gpu_check.jsonl   one line a finding, and one when a part ends; `failed` and `skipped` say why it has no more
    FOLDER/gpu_check.md      the table that is printed at the end
    FOLDER/gpu_check.log     what the parts printed, the part's name before each line

Wheels to bring along to a machine without a network that has torch, transformers, peft, accelerate, tensorboard, rich,
pyarrow, pandas, sympy, psutil, requests, pytest and hypothesis (6.2 MB together, in KB, for Python 3.12 on x86-64):

    datasets 610  dill 120  multiprocess 150  jsonargparse 180  docstring_parser 20  typeshed_client 810  pydantic 490
    pydantic_core 2,260  annotated-types 10  typing-inspection 10  typing_extensions 50  gguf 120  math-verify 0.9 30
    latex2sympy2_extended 210  antlr4-python3-runtime 4.13.2 140  trl 950

    python3 -m pip install --no-index --no-deps --target SITE *.whl && PYTHONPATH=SITE bash benchmarks/gpu_check.sh
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

PROJECT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT") or PROJECT / "output" / "gpu_check")
PR_SET_CHILD_SUBREAPER = 36
LEAST_SHARE = 1 / 3  # of a part's limit; with less left it is not begun
MODULE = "benchmarks.gpu_parts"
ENDS = ("failed", "skipped")  # why a part has no more to say
SHOWN = 900  # characters of a part in the table


@dataclass(frozen=True)
class Part:
    """How long a part may take, and whether it runs with its neighbours at once."""

    limit_s: int
    at_once: bool = False


PARTS = {
    "environment": Part(60),
    "attention_bf16": Part(50),
    "attention_fp32": Part(50),
    "model": Part(60),
    "step": Part(75),
    "graphs": Part(50),
    "gradients": Part(150, at_once=True),
    "tests": Part(150, at_once=True),
    "demo": Part(150, at_once=True),
    "ranks": Part(150, at_once=True),
    "real": Part(150, at_once=True),
    "trl": Part(110),
}


def descendants(root: int) -> list[int]:
    """All processes that descend from one, without those that have ended."""
    children = defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = file.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children[int(parent)].append(int(file.parent.name))
    found = children[root]
    for pid in found:  # grows meanwhile
        found += children[pid]
    return found


def end_descendants(root: int) -> None:
    """Kill all processes that descend from one. Orphans do as well: they fall to the next subreaper above them."""
    tries_end = time.monotonic() + 10
    while (found := descendants(root)) and time.monotonic() < tries_end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def adopt_orphans() -> None:
    """On Linux, become the parent of descendants whose own parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


class Running:
    """A part's process, its output on its way into the log, and its limits."""

    def __init__(self, name: str, command: list[str], limit_s: float, log: TextIO):
        self.name, self.limit_s, self.log = name, limit_s, log
        self.began = time.monotonic()
        self.last: deque[str] = deque(maxlen=3)  # lines
        self.process = subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip():
                self.last.append(line.strip())
                if line.startswith("{"):  # a finding: the printed output holds all of them, should no file come back
                    print(line.rstrip(), flush=True)
                self.log.write(f"{self.name:14} | {line.rstrip()}\n")

    @property
    def over(self) -> bool:
        """Whether it has ended, or must."""
        return self.process.poll() is not None or time.monotonic() - self.began >= self.limit_s

    def end(self) -> dict[str, Any]:
        """End it and what it started: its seconds, and what failed."""
        seconds, code = time.monotonic() - self.began, self.process.poll()
        if code is None:
            end_descendants(self.process.pid)
            self.process.kill()
            self.process.wait()
        self.reader.join(2)  # an orphan may hold the other end
        found: dict[str, Any] = {"seconds": round(seconds, 1)}
        if code is None:
            found["failed"] = f"not done in {self.limit_s:.0f} s"
        elif code:
            found["failed"] = f"code {code}: {' '.join(self.last)[-400:]}"
        return found


class Check:
    """The parts one after the other, or several at once, until the budget is used up."""

    def __init__(self, args: argparse.Namespace, shared: Path):
        """shared: a folder for what several parts need."""
        self.args, self.end = args, time.monotonic() + args.budget
        args.out.mkdir(parents=True, exist_ok=True)
        self.findings = args.out / "gpu_check.jsonl"
        self.findings.write_text("")
        self.log = (args.out / "gpu_check.log").open("w", buffering=1)
        how = ["--device", args.device, "--findings", str(self.findings.resolve()), "--shared", str(shared)]
        self.command = [sys.executable, "-u", "-m", MODULE, *how]
        self.command += ["--model", args.model] if args.model else []

    def run(self, names: list[str]) -> None:
        """Run parts at once, to their ends or limits."""
        running = []
        for name in names:
            left = self.end - time.monotonic()
            full = PARTS[name].limit_s if self.args.device == "cuda" else left
            if left < max(full * LEAST_SHARE, 1):
                self.say(name, {"skipped": f"{max(left, 0):.0f} s are left of {self.args.budget}"})
            else:
                running.append(Running(name, [*self.command, name], min(full, left), self.log))
        while running:
            for part in [part for part in running if part.over]:
                running.remove(part)
                self.say(part.name, part.end())
            time.sleep(0.02)
        end_descendants(os.getpid())  # what parts that ended have left behind

    def say(self, name: str, found: dict[str, Any]) -> None:
        """Write down how a part ended."""
        with self.findings.open("a") as file:
            file.write(json.dumps({"part": name} | found) + "\n")
        print(f"{name}: {json.dumps(found)}", flush=True)
        self.table()

    def rows(self) -> dict[str, dict[str, Any]]:
        """All findings so far, by part."""
        rows: dict[str, dict[str, Any]] = defaultdict(dict)
        for line in self.findings.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError, KeyError):  # a line that was cut
                found = json.loads(line)
                rows[found.pop("part")].update(found)
        return rows

    def table(self) -> str:
        """A row a part; written too."""
        lines = ["| part | seconds | found |", "| --- | ---: | --- |"]
        for name, found in self.rows().items():
            first = {key: found.pop(key) for key in ENDS if key in found}
            seconds = found.pop("seconds", "")
            shown = "; ".join(f"{key} {_short(value)}" for key, value in (first | found).items())
            lines.append(f"| {name} | {seconds} | {re.sub(r'[|]', '/', shown)[:SHOWN]} |")
        text = "\n".join(lines) + "\n"
        (self.args.out / "gpu_check.md").write_text(text)
        return text


def _short(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--budget", type=int, default=360, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: a GGUF file or a folder")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER")
    args = parser.parse_args()
    adopt_orphans()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as shared:
        check = Check(args, Path(shared))
        try:
            alone = lambda pair: None if PARTS[pair[1]].at_once else pair[0]  # noqa: E731
            for _, several in groupby(enumerate(args.only), alone):
                check.run([name for _, name in several])
        finally:
            end_descendants(os.getpid())
    print("\n" + check.table())
    return int(any(end in found for found in check.rows().values() for end in ENDS))


if __name__ == "__main__":
    sys.exit(main())
