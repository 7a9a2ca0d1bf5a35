"""Rewards as the trainer holds them: calls go in, an answer for each comes out, whatever the functions do.

`open_rewards` gives a Pool of supervisors (see `grpo/rewards/__init__.py`), or, with reward_workers 0, functions that are
called right here, for debugging. Both give the same answers for functions that depend on their arguments alone.

A round of calls is begun, submitted at once or bit by bit, and collected. A pool makes calls from the moment they are
submitted, as far as `advance` is called now and then: no thread, so that nothing happens while nobody looks.
"""

import atexit
import selectors
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from grpo.config.settings import Config
from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Answer, Call, read_answer
from grpo.rewards.functions import RewardFunction, call, describe
from grpo.rewards.loading import locate, make_rewards
from grpo.rewards.pending_calls import PendingCalls
from grpo.rewards.protocol import dump, frame
from grpo.rewards.supervisor_handle import GRACE_S, IMPORT_S, SupervisorHandle
from grpo.types import Pulse

PULSE_S = 0.1
LOOK_S = 0.02  # at least, between two looks of `advance`
EARLY_S = 0.05  # a round that takes so long when all its calls are made in the end: the next ones begin early
MEASURED_ROUNDS = 16  # after so many rounds that is measured anew
UNSEEN_S = 1.0  # more than that between two looks is not held against a supervisor: nobody was there to hear it


class Rewards(Protocol):
    """What scoring needs."""

    rewards: list[Reward]

    @property
    def early(self) -> bool:
        """Whether it pays to have calls made while completions are still sampled."""

    def begin(self) -> None:
        """A new round. What was submitted before and never collected is forgotten."""

    def submit(self, samples: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        """Have calls made; their rows count all samples of the round so far, these included. Does not wait."""

    def advance(self) -> None:
        """Move calls along, without waiting. Cheap enough to be called once a token."""

    def collect(self, pulse: Pulse) -> list[Answer | None]:
        """Wait for the round's answers, in the order of submission; None: left undone because `pulse` said stop."""

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
    """Functions called in this process, when they are collected: no deadline, no limits, breakpoints work."""

    early = False

    def __init__(self, rewards: list[Reward], functions: Sequence[RewardFunction]):
        self.rewards, self.functions = rewards, functions
        self.samples: list[RewardInput] = []
        self.calls: list[Call] = []

    @classmethod
    def of(cls, functions: dict[str, RewardFunction]) -> "InProcess":
        """From functions that are at hand, with weight 1."""
        return cls([Reward(name, 1.0, **describe(f, name)) for name, f in functions.items()], list(functions.values()))

    def begin(self) -> None:
        """See Rewards."""
        self.samples, self.calls = [], []

    def submit(self, samples: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        """See Rewards."""
        self.samples += samples
        self.calls += calls

    def advance(self) -> None:
        """See Rewards. Nothing moves before `collect`."""

    def collect(self, pulse: Pulse) -> list[Answer | None]:
        """See Rewards."""
        answers: list[Answer | None] = [None] * len(self.calls)
        for i, one in enumerate(self.calls):
            if pulse():
                break
            chosen = [self.samples[row] for row in one.rows]
            columns = {key: [sample.columns[key] for sample in chosen] for key in chosen[0].columns}
            outcomes = call(
                self.functions[one.k],
                [s.prompt for s in chosen],
                [s.completion for s in chosen],
                [s.token_ids for s in chosen],
                columns,
            )
            answers[i] = Answer(outcomes)
        return answers

    def close(self) -> None:
        """Nothing to end."""


class Pool:
    """`reward_workers` supervisors. Calls go to whichever is free."""

    def __init__(self, cfg: Config, notice: Callable[[str], None]):
        """Start the supervisors, all at once. Raises UserError when a function cannot be found or imported."""
        self.functions = locate(cfg)
        self.cfg = cfg
        self.supervisors: list[SupervisorHandle] = []
        self.round = PendingCalls([], cfg.reward_workers)
        self.looked_at = 0.0
        self.rounds = 0
        self.whole_s = 0.0  # what the last round took whose calls were all made in the end
        atexit.register(self.close)
        try:
            self.supervisors += [SupervisorHandle(cfg, self.functions) for _ in range(cfg.reward_workers)]
            said = [supervisor.greeting() for supervisor in self.supervisors]
            self.rewards = make_rewards(cfg, said[0]["functions"])
        except BaseException:
            self.close()
            raise
        if not said[0]["enclosed"]:
            notice(
                "note: this system allows no namespaces: reward workers have network access, and a process that a "
                "reward starts can hide from its end"
            )

    def begin(self) -> None:
        """See Rewards. Supervisors that were lost are replaced, those busy with forgotten calls too."""
        self._drop_busy()
        self._revive()
        self.round = PendingCalls(self.rewards, self.cfg.reward_workers)
        self.rounds += 1

    @property
    def early(self) -> bool:
        """See Rewards. Workers take turns with the trainer on few processors: it pays where rewards take their time."""
        return self.whole_s >= EARLY_S and self.rounds % MEASURED_ROUNDS != 0

    def submit(self, samples: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        """See Rewards."""
        self.round.add(samples, calls)

    def advance(self) -> None:
        """See Rewards. A supervisor that is lost meanwhile is replaced when answers are collected, as that takes time."""
        if time.monotonic() >= self.looked_at + LOOK_S and (self.round.waits or self._busy()):
            self._take_answers(0.0)
            self._hand_out()

    def collect(self, pulse: Pulse) -> list[Answer | None]:
        """See Rewards. Returns at once when `pulse` says stop: the workers that are busy are killed."""
        began, whole, stopped = time.monotonic(), self.round.untouched, False
        while self.round.waits or self._busy():
            if stopped := pulse():
                self._drop_busy()
                break
            self._revive()
            self._hand_out()
            self._take_answers(PULSE_S)
        if whole and not stopped:
            self.whole_s = time.monotonic() - began
        answers, self.round = self.round.answers, PendingCalls(self.rewards, self.cfg.reward_workers)
        return answers

    def close(self) -> None:
        """End every supervisor, and with it all that its workers started."""
        atexit.unregister(self.close)
        for supervisor in self.supervisors:
            supervisor.socket.close()  # all first: they end side by side
        for supervisor in list(self.supervisors):
            self._drop(supervisor)

    def _drop(self, supervisor: SupervisorHandle) -> None:
        self.supervisors.remove(supervisor)
        supervisor.close()

    def _revive(self) -> None:
        while len(self.supervisors) < self.cfg.reward_workers:
            self.supervisors.append(SupervisorHandle(self.cfg, self.functions))
            self.supervisors[-1].greeting()

    def _busy(self) -> list[SupervisorHandle]:
        return [supervisor for supervisor in self.supervisors if supervisor.busy]

    def _drop_busy(self) -> None:
        for supervisor in self._busy():
            self._drop(supervisor)

    def _hand_out(self) -> None:
        for supervisor in self.supervisors:
            if self.round.waits and not supervisor.busy:
                supervisor.busy = self.round.next_batch()
                header, body = self.round.request(supervisor.busy)
                supervisor.patience_s = self._patience_s(supervisor)
                supervisor.send(frame(dump(header)) + frame(body))

    def _patience_s(self, supervisor: SupervisorHandle) -> float:
        current = self.round.calls[supervisor.busy[0]]
        return self.cfg.reward_timeout_s * len(current.rows) + IMPORT_S + GRACE_S

    def _take_answers(self, wait_s: float) -> None:
        """Read what supervisors have answered; wait for one of them at most. Those that are lost are dropped."""
        now = time.monotonic()
        passed_s, self.looked_at = now - self.looked_at, now
        for supervisor in self._busy():
            supervisor.patience_s -= min(passed_s, UNSEEN_S)
        for supervisor in self._ready(wait_s):
            if not self._receive(supervisor):
                first, *rest = supervisor.busy
                self.round.fail(first, "its worker's supervisor was ended from outside")
                self.round.put_back(rest)
                self._drop(supervisor)

    def _ready(self, wait_s: float) -> list[SupervisorHandle]:
        """Supervisors to read from, or that should have been; waits for one."""
        with selectors.DefaultSelector() as selector:
            for supervisor in self._busy():
                selector.register(supervisor.socket, selectors.EVENT_READ, supervisor)
            ready = [key.data for key, _ in selector.select(wait_s)]
        return ready or [supervisor for supervisor in self._busy() if supervisor.patience_s < 0]

    def _receive(self, supervisor: SupervisorHandle) -> bool:
        """Take the answers that are there. False: the supervisor is gone."""
        try:
            data = b"" if supervisor.patience_s < 0 else supervisor.socket.recv(1 << 18)
        except OSError:
            data = b""
        supervisor.splitter.feed(data)
        while supervisor.busy and (said := supervisor.splitter.next()) is not None:
            now = supervisor.busy.pop(0)
            self.round.answers[now] = read_answer(said, self.round.calls[now])
            if supervisor.busy:
                supervisor.patience_s = self._patience_s(supervisor)
        return bool(data) or not supervisor.busy
