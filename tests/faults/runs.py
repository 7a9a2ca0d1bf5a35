"""Runs of a second or two on a tiny model, and what "the same end" means."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from grpo.checkpoints import contents as checkpoint
from tests.faults.fault import FAULTS, Fault, as_json
from tests.support.jobs import PROJECT, Job, fork_server
from tests.support.tiny import save_tiny

STEPS = 12
QUESTIONS = 10  # 12 steps of 3 prompts are 3.6 epochs, whose borders lie inside steps
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deterministic": {"deterministic": True},
    "iterated": {"num_iterations": 2, "num_minibatches": 2, "beta": 0.05, "lr_schedule": "linear"},
    "linear": {"lr_schedule": "linear"},
    **{f"zero-{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}
REWARD = '''"""A pure function of the text, different for nearly every text."""


def score(completions, **columns):
    return [sum(map(ord, text)) % 11 / 11 + len(text) / 50 for text in completions]
'''
WALL_CLOCK = ("time/", "idle/", "save/", "tokens_per_s")


@dataclass(frozen=True)
class Ending:
    """All that a run leaves, as hashes where it is large."""

    weights: dict[str, str]
    moments: dict[str, str]
    counters: dict[str, Any]
    metrics: dict[str, str]  # step -> its line, wall-clock metrics left out
    rollouts: dict[str, str]  # step -> its prompts and tokens

    def differences(self, other: "Ending") -> list[str]:
        """What is not the same, by name; empty: bit-identical."""
        found = []
        for part in ("weights", "moments", "counters", "metrics", "rollouts"):
            ours, theirs = getattr(self, part), getattr(other, part)
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            found += [f"{part} {name}" for name in names]
        return found


class Run:
    """One run: its folders, and launches of the one command that starts and continues it."""

    def __init__(self, arena: "Arena", name: str, kind: str = "plain", world: int = 2, **changes: Any):
        self.arena, self.world = arena, world
        self.folder = arena.folder / name
        self.folder.mkdir()
        self.output, self.logs, self.seen = self.folder / "output", self.folder / "runs", self.folder / "seen"
        self.seen.mkdir()
        self.settings = {
            **arena.settings,
            **KINDS[kind],
            "output_dir": self.output,
            "runs_dir": self.logs,
            "run_name": "run",
            **changes,
        }

    def launch(self, faults: Sequence[Fault] = (), world: int | None = None, **how: Any) -> Job:
        """Start the command. `how` goes to `ForkServer.launch`; other settings can be given as `settings`."""
        argv = as_argv(self.settings | how.pop("settings", {}))
        env = {"GRPO_FAULTS_OUT": str(self.seen), "GRPO_FAULTS_RUNS": str(self.logs)} | how.pop("env", {})
        env[FAULTS] = as_json([*faults, Fault("record")])
        program = str(PROJECT / "tests" / "faults" / "rank.py")
        return self.arena.fork_server.launch(program, argv, world or self.world, env=env, **how)

    def finish(self, timeout: float = 60.0, **how: Any) -> Job:
        """Run the command to its end, which has to be a good one."""
        job = self.launch(**how)
        codes = job.wait(timeout)
        assert set(codes) == {0}, f"{codes}\n{job.text()[-3000:]}"
        return job

    def valid(self) -> list[int]:
        """Steps of the valid checkpoints, the newest first."""
        return [
            checkpoint.step_of(path)
            for path in checkpoint.checkpoint_folders(self.output)
            if not checkpoint.verify(path)
        ]

    def leftovers(self) -> list[str]:
        """Half-written and half-deleted folders."""
        return [path.name for path in self.output.glob(".*") if path.name.startswith((".tmp", ".trash", ".probe"))]

    def last_logged(self) -> int:
        """The last step in metrics.jsonl, 0 when there is none."""
        file = self.logs / "run" / "metrics.jsonl"
        lines = [line for line in file.read_text().splitlines(True) if line.endswith("\n")] if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.logs / "run" / "metrics.jsonl").read_text().splitlines()]

    def ended_with(self, job: Job, code: int, timeout: float = 60.0) -> list[str]:
        """Wait for the end; what is wrong with its code, empty when nothing is.

        exit.json and the ranks must have that code, except a rank that gets the launcher's SIGTERM while its
        interpreter shuts down: no handler runs then.
        """
        codes = job.wait(timeout)
        note = self.exit_note() if (self.output / "exit.json").exists() else {"code": None, "reason": "no exit.json"}
        good = code in codes and set(codes) <= {code, -signal.SIGTERM} and note["code"] == code
        return [] if good else [f"codes {codes}, exit.json {note}: {job.text()[-600:]}"]

    def exit_note(self) -> dict[str, Any]:
        """exit.json."""
        return json.loads((self.output / "exit.json").read_text())

    def trace(self, rank: int) -> list[dict[str, Any]]:
        """What the fault `trace` wrote for a rank."""
        return [json.loads(line) for line in (self.seen / f"trace_{rank}.jsonl").read_text().splitlines()]

    def ending(self) -> Ending:
        """What it leaves. Fails when the newest valid checkpoint is not that of the last step."""
        assert self.valid()[:1] == [self.settings["max_steps"]], self.valid()
        folder = self.output / f"checkpoint_{self.settings['max_steps']}"
        counters = json.loads((folder / "trainer" / "state.json").read_text())["counters"]
        moments: dict[str, str] = {}
        for file in sorted((folder / "trainer").glob("optimizer-*.safetensors")):
            moments |= tensor_hashes(file)
        return Ending(
            tensor_hashes(folder / "model.safetensors"), moments, counters, dict(self._lines()), self._rollouts()
        )

    def _lines(self) -> Iterator[tuple[str, str]]:
        seen = set()
        for row in self.metrics():
            compared = {key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)}
            name = str(row["step"]) if row["step"] not in seen else f"{row['step']} twice"
            seen.add(row["step"])
            yield name, json.dumps(compared, sort_keys=True)

    def _rollouts(self) -> dict[str, str]:
        steps: dict[str, dict[str, Any]] = {}
        for file in sorted((self.seen / "rollouts").glob("step_*.json")):
            recorded = json.loads(file.read_text())
            step = steps.setdefault(file.name.split(".")[0], {"prompts": recorded["prompts"]})
            assert step["prompts"] == recorded["prompts"], f"{file}: the questions of a step changed"
            for sample, tokens in recorded["completions"].items():
                assert step.setdefault(sample, tokens) == tokens, f"{file}: completion {sample} changed"
        return {
            step: hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest() for step, seen in steps.items()
        }

    def prompts(self) -> dict[int, list[int]]:
        """Step -> rows of the data that it asked."""
        files = (self.seen / "rollouts").glob("step_*.json")
        return {int(file.name.split(".")[0][5:]): json.loads(file.read_text())["prompts"] for file in files}

    def weights(self) -> torch.Tensor:
        """The last weights, flat, float64."""
        return flat(self.output / f"checkpoint_{self.settings['max_steps']}")


class Arena:
    """The folder of a test session: a model, questions, a reward, a fork server."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = save_tiny(folder / "model", spread=2.0)
        (folder / "reward.py").write_text(REWARD)
        write_questions(folder / "questions.jsonl", QUESTIONS)
        self.settings: dict[str, Any] = {
            "model": self.model,
            "data": folder / "questions.jsonl",
            "eval_data": None,
            "max_steps": STEPS,
            "rewards": {f"{folder}/reward.py:score": 1.0},
            "batch_size": 3,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "max_prompt_length": 32,
            "max_generate_length": 8,
            "rollout_chunk_rows": 4,
            "micro_batch_tokens": 64,
            "lr": 1e-3,
            "num_threads": 1,
            "save_steps": 3,
            "chat_template": False,
        }
        self.fork_server = fork_server()
        self.references: dict[tuple[str, int], tuple[Run, Ending, float]] = {}
        self.runs = 0

    def run(self, kind: str = "plain", world: int = 2, **changes: Any) -> Run:
        """A new run, in folders of its own."""
        self.runs += 1
        return Run(self, f"run_{self.runs}", kind, world, **changes)

    def reference(self, kind: str = "plain", world: int = 2) -> tuple[Run, Ending, float]:
        """The uninterrupted run of a kind, what it leaves, and its seconds from launch to end. Done once."""
        if (kind, world) not in self.references:
            run = self.run(kind, world)
            job = run.finish()
            self.references[kind, world] = (run, run.ending(), time.monotonic() - job.began)
        return self.references[kind, world]

    def same(self, run: Run, kind: str = "plain") -> list[str]:
        """Differences between a run's end and the uninterrupted one's."""
        return run.ending().differences(self.reference(kind, run.world)[1])


def as_argv(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line.

    >>> as_argv({"lr": 0.1, "eval_data": None, "deterministic": True})
    ['--lr', '0.1', '--eval_data', 'null', '--deterministic', 'true']
    """
    argv = []
    for name, value in settings.items():
        plain = value is None or isinstance(value, (bool, dict))
        argv += [f"--{name}", json.dumps(value) if plain else str(value)]
    return argv


def write_questions(file: Path, number: int) -> Path:
    """A data file of that many different questions."""
    pairs = [(row, row * row % 7) for row in range(number)]
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tensor_hashes(file: Path) -> dict[str, str]:
    """sha256 of each tensor of a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        return {name: hashlib.sha256(tensors.get_tensor(name).numpy().tobytes()).hexdigest() for name in names}


def flat(folder: Path) -> torch.Tensor:
    """The weights of a model folder as one float64 vector."""
    weights = load_file(folder / "model.safetensors")
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])
