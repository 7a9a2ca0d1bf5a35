"""Rewards as the trainer holds them: calls go in, an answer for each comes out, whatever the functions do.

`open_rewards` gives a Pool of wardens (see `grpo/rewards/__init__.py`), or, with reward_workers 0, functions that are
called right here, for debugging. Both give the same answers for functions that depend on their arguments alone.
"""

import atexit
import contextlib
import math
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from grpo.config import PROJECT, Config
from grpo.errors import UserError
from grpo.rewards import Reward, Sample
from grpo.rewards.calls import Answer, Call, Packed, failed, read_answer
from grpo.rewards.confine import WITHOUT_NAMESPACES
from grpo.rewards.functions import RewardFunction, call, describe
from grpo.rewards.loading import locate, make_rewards
from grpo.rewards.protocol import MAX_ANSWER, MAX_REQUEST, Splitter, dump, frame, load, read_frame
from grpo.types import Pulse

IMPORT_S = 60.0  # for importing the functions' files
GRACE_S = 10.0  # beyond all deadlines, before a warden itself counts as lost
PULSE_S = 0.1
MAX_BATCH = 64  # calls handed out together
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "SYSTEMROOT", "VIRTUAL_ENV")  # and LC_*


class Rewards(Protocol):
    """What scoring needs."""

    rewards: list[Reward]

    def run(self, samples: Sequence[Sample], calls: Sequence[Call], pulse: Pulse) -> list[Answer | None]:
        """Make the calls. Answers in their order; None for what was left undone because `pulse` said stop."""

    def close(self) -> None:
        """End every process that was started."""


def open_rewards(cfg: Config, notice: Callable[[str], None]) -> Rewards:
    """Find, import and describe the reward functions of a run. Raises UserError. `close` it in the end."""
    if cfg.reward_workers == 0:
        from grpo.rewards.worker import load_functions

        functions, said = load_functions(locate(cfg))
        return InProcess(make_rewards(cfg, said), functions)
    return Pool(cfg, notice)


class InProcess:
    """Functions called in this process: no deadline, no limits, breakpoints work."""

    def __init__(self, rewards: list[Reward], functions: Sequence[RewardFunction]):
        self.rewards, self.functions = rewards, functions

    @classmethod
    def of(cls, functions: dict[str, RewardFunction]) -> "InProcess":
        """From functions that are at hand, with weight 1."""
        return cls([Reward(name, 1.0, **describe(f, name)) for name, f in functions.items()], list(functions.values()))

    def run(self, samples: Sequence[Sample], calls: Sequence[Call], pulse: Pulse) -> list[Answer | None]:
        """See Rewards."""
        answers: list[Answer | None] = [None] * len(calls)
        for i, one in enumerate(calls):
            if pulse():
                break
            chosen = [samples[row] for row in one.rows]
            columns = {key: [sample.columns[key] for sample in chosen] for key in chosen[0].columns}
            outcomes = call(
                self.functions[one.k], [s.prompt for s in chosen], [s.completion for s in chosen],
                [s.token_ids for s in chosen], columns,
            )  # fmt: skip
            answers[i] = Answer(outcomes)
        return answers

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Warden:
    """One warden's process, the socket to it, and the calls it is busy with."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    folder: Path
    splitter: Splitter = field(default_factory=lambda: Splitter(MAX_ANSWER + 1))
    busy: list[int] = field(default_factory=list)
    lost_at: float = math.inf  # when no answer by then means that the warden itself is gone

    def close(self) -> None:
        """Let it end by itself, which takes everything below along; kill it when it does not."""
        self.socket.close()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already, unless it was killed


class Pool:
    """`reward_workers` wardens. Calls go to whichever is free."""

    def __init__(self, cfg: Config, notice: Callable[[str], None]):
        """Start the wardens, all at once. Raises UserError when a function cannot be found or imported."""
        self.functions = locate(cfg)
        self.cfg = cfg
        self.wardens: list[Warden] = []
        atexit.register(self.close)
        try:
            self.wardens += [self._start() for _ in range(cfg.reward_workers)]
            said = [self._greeting(warden) for warden in self.wardens]
            self.rewards = make_rewards(cfg, said[0]["functions"])
        except BaseException:
            self.close()
            raise
        if not said[0]["enclosed"]:
            notice(
                "note: this system allows no namespaces: reward workers have network access, and a process that a "
                "reward starts can hide from its end"
            )

    def _start(self) -> Warden:
        ours, theirs = socket.socketpair()
        folder = Path(tempfile.mkdtemp(prefix="reward-"))
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "grpo.rewards.warden", str(os.getpid())],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd=PROJECT, env=_environment(folder),
                start_new_session=True,
            )  # fmt: skip
        finally:
            theirs.close()
        warden = Warden(process, ours, folder)
        hello = {
            "functions": self.functions, "path": sys.path, "folder": str(folder), "import_s": IMPORT_S,
            "timeout_s": self.cfg.reward_timeout_s, "memory_mb": self.cfg.reward_memory_mb,
        }  # fmt: skip
        ours.settimeout(IMPORT_S + GRACE_S)
        with contextlib.suppress(OSError):  # it died at once: the greeting will be missing
            ours.sendall(frame(dump(hello)))
        return warden

    def _greeting(self, warden: Warden) -> dict[str, Any]:
        warden.socket.setblocking(True)
        ready = selectors.DefaultSelector()
        with ready:
            ready.register(warden.socket, selectors.EVENT_READ)
            said = read_frame(warden.socket.fileno(), MAX_REQUEST) if ready.select(IMPORT_S + GRACE_S) else None
        warden.socket.settimeout(GRACE_S)
        if said is None:
            error = UserError(
                "rewards: a reward worker could not be started; its last words, if any, are above. "
                "--reward_workers 0 calls reward functions in the trainer's own process."
            )
            error.on_one_rank = True
            raise error
        return load(said)

    def run(self, samples: Sequence[Sample], calls: Sequence[Call], pulse: Pulse) -> list[Answer | None]:
        """See Rewards. Returns at once when `pulse` says stop: the workers that are busy are killed."""
        answers: list[Answer | None] = [None] * len(calls)
        packed = Packed(samples)
        waiting = deque(self._batches(packed, calls, answers))
        while waiting or any(warden.busy for warden in self.wardens):
            if pulse():
                for warden in [warden for warden in self.wardens if warden.busy]:
                    self._drop(warden)
                break
            self._revive()
            for warden in self.wardens:
                if waiting and not warden.busy:
                    self._hand_out(warden, packed, calls, waiting.popleft())
            for warden in self._ready(PULSE_S):
                if not self._receive(warden, calls, answers):
                    first, *rest = warden.busy
                    answers[first] = failed(calls[first], "its worker's warden was ended from outside")
                    if rest:
                        waiting.appendleft(rest)
                    self._drop(warden)
        return answers

    def close(self) -> None:
        """End every warden, and with it all that its workers started."""
        atexit.unregister(self.close)
        for warden in self.wardens:
            warden.socket.close()  # all first: they end side by side
        for warden in list(self.wardens):
            self._drop(warden)

    def _drop(self, warden: Warden) -> None:
        self.wardens.remove(warden)
        warden.close()

    def _revive(self) -> None:
        while len(self.wardens) < self.cfg.reward_workers:
            self.wardens.append(self._start())
            self._greeting(self.wardens[-1])

    def _batches(self, packed: Packed, calls: Sequence[Call], answers: list[Answer | None]) -> list[list[int]]:
        """Calls to hand out together: functions that run code apart, neighbouring rows together."""
        batches = []
        for runs_code in (False, True):
            chosen = []
            for i in sorted(range(len(calls)), key=lambda i: calls[i].rows):
                if self.rewards[calls[i].k].runs_code is not runs_code:
                    continue
                if reason := packed.problem(calls[i].rows):
                    answers[i] = failed(calls[i], reason)
                else:
                    chosen.append(i)
            size = min(MAX_BATCH, max(1, math.ceil(len(chosen) / (2 * self.cfg.reward_workers))))
            batches += [chosen[at : at + size] for at in range(0, len(chosen), size)]
        return batches

    def _hand_out(self, warden: Warden, packed: Packed, calls: Sequence[Call], batch: list[int]) -> None:
        header, body = packed.request([calls[i] for i in batch])
        header["runs_code"] = self.rewards[calls[batch[0]].k].runs_code
        warden.busy = batch
        warden.lost_at = self._lost_at(calls[batch[0]])
        with contextlib.suppress(OSError):  # it is gone: reading from it will tell
            warden.socket.sendall(frame(dump(header)) + frame(body))

    def _lost_at(self, current: Call) -> float:
        return time.monotonic() + self.cfg.reward_timeout_s * len(current.rows) + IMPORT_S + GRACE_S

    def _ready(self, wait_s: float) -> list[Warden]:
        """Wardens to read from, or that should have been; waits for one."""
        with selectors.DefaultSelector() as selector:
            for warden in self.wardens:
                if warden.busy:
                    selector.register(warden.socket, selectors.EVENT_READ, warden)
            ready = [key.data for key, _ in selector.select(wait_s)]
        return ready or [w for w in self.wardens if w.busy and time.monotonic() > w.lost_at]

    def _receive(self, warden: Warden, calls: Sequence[Call], answers: list[Answer | None]) -> bool:
        """Take the answers that are there. False: the warden is gone."""
        try:
            data = b"" if time.monotonic() > warden.lost_at else warden.socket.recv(1 << 18)
        except OSError:
            data = b""
        warden.splitter.feed(data)
        while warden.busy and (said := warden.splitter.next()) is not None:
            now = warden.busy.pop(0)
            answers[now] = read_answer(said, calls[now])
            if warden.busy:
                warden.lost_at = self._lost_at(calls[warden.busy[0]])
        return bool(data) or not warden.busy


def _environment(folder: Path) -> dict[str, str]:
    """What workers get of the environment: no tokens, no GPU, one thread, a home of their own."""
    kept = {key: value for key, value in os.environ.items() if key in KEPT_ENVIRONMENT or key.startswith("LC_")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **kept, **threads, "HOME": str(folder), "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **{key: os.environ[key] for key in (WITHOUT_NAMESPACES,) if key in os.environ},
    }  # fmt: skip
