"""The trainer's side of rewards: calls go in, an answer for each comes out, whatever the functions do.

`open_rewards` returns a Pool of supervisors (see `grpo/rewards/__init__.py`), or, with reward_workers 0, an InProcess,
which calls the functions in the trainer, for debugging. Both give the same answers for functions that depend on their
arguments alone.

A round of calls is begun, submitted at once or in parts, and collected. There is no thread: a pool sends calls and
reads answers only inside `advance` and `collect`.
"""

import atexit
import selectors
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from grpo.config.settings import Config
from grpo.rewards import Reward, RewardInput
from grpo.rewards.calls import Answer, Call, read_answer
from grpo.rewards.functions import Arguments, Loaded, Outcome, RewardFunction, call, call_together, describe
from grpo.rewards.loading import locate, make_rewards
from grpo.rewards.logged import TrainerState
from grpo.rewards.pending_calls import Lane, PendingCalls
from grpo.rewards.protocol import dump, frame
from grpo.rewards.supervisor_handle import GRACE_S, IMPORT_S, SupervisorHandle
from grpo.types import Pulse

PULSE_S = 0.1
LOOK_S = 0.02  # `advance` reads answers at most this often
EARLY_S = 0.05  # if a round takes this long when all its calls are made in `collect`, later rounds begin early
MEASURED_ROUNDS = 16  # every so many rounds that time is measured again
UNSEEN_S = 1.0  # the most that the time between two reads counts against a supervisor's deadline


class Rewards(Protocol):
    """The interface that scoring uses: `begin` a round, `submit` its calls, `collect` their answers."""

    rewards: list[Reward]

    def at(self, step: int, total: int) -> "Rewards":
        """Itself, with the trainer's state for functions that ask for it: the steps done, and those of the run."""

    @property
    def early(self) -> bool:
        """Whether making calls while completions are still sampled saves time."""

    def begin(self) -> None:
        """Start a new round. Calls that were submitted before and not collected are dropped."""

    def submit(self, inputs: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        """Add calls; their rows are places among all inputs of the round, including these. Does not wait."""

    def advance(self) -> None:
        """Send calls and read answers, without waiting. Cheap enough to be called once a token."""

    def collect(self, pulse: Pulse) -> list[Answer | None]:
        """Wait for the round's answers, in the order of submission; None: not made, because `pulse` asked to stop."""

    def close(self) -> None:
        """End every process that was started."""


def open_rewards(cfg: Config, notice: Callable[[str], None]) -> Rewards:
    """Find, import and describe the reward functions of a run. The caller must `close` them. Raises UserError."""
    if cfg.reward_workers == 0:
        from grpo.rewards.worker import load_functions

        functions, descriptions = load_functions(locate(cfg))
        return InProcess(make_rewards(cfg, descriptions), functions)
    return Pool(cfg, notice)


class InProcess:
    """Functions called in this process by `collect`: no deadline, no limits, breakpoints work."""

    early = False

    def __init__(self, rewards: list[Reward], functions: Sequence[Loaded]):
        self.rewards, self.functions = rewards, functions
        self.state = TrainerState()
        self.inputs: list[RewardInput] = []
        self.calls: list[Call] = []

    @classmethod
    def of(cls, functions: dict[str, RewardFunction]) -> "InProcess":
        """From imported functions, by name, each with weight 1."""
        rewards = [Reward(name, 1.0, **describe(f, name)) for name, f in functions.items()]
        return cls(rewards, [Loaded.of(f) for f in functions.values()])

    def at(self, step: int, total: int) -> "InProcess":
        self.state = TrainerState(step, total)
        return self

    def begin(self) -> None:
        self.inputs, self.calls = [], []

    def submit(self, inputs: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        self.inputs += inputs
        self.calls += calls

    def advance(self) -> None:
        pass

    def collect(self, pulse: Pulse) -> list[Answer | None]:
        answers: list[Answer | None] = [None] * len(self.calls)
        arguments = [self._arguments(one) for one in self.calls]

        def done(i: int, outcomes: list[Outcome] | None) -> None:
            log = arguments[i].log
            answers[i] = Answer(outcomes or [], columns=log.columns, metrics=log.metrics)

        lanes: dict[Lane, list[int]] = {}  # coroutines of one file at the same time
        for i, one in enumerate(self.calls):
            if (lane := self.rewards[one.k].lane)[1]:
                lanes.setdefault(lane, []).append(i)
            elif pulse():
                return answers
            else:
                done(i, call(self.functions[one.k], arguments[i]))
        for places in lanes.values():
            calls = [(self.functions[self.calls[i].k], arguments[i]) for i in places]
            call_together(calls, lambda at, outcomes, places=places: done(places[at], outcomes), stop=pulse)  # type: ignore[misc]
        return answers

    def _arguments(self, one: Call) -> Arguments:
        chosen = [self.inputs[row] for row in one.rows]
        columns = {key: [each.columns[key] for each in chosen] for key in chosen[0].columns}
        prompts, completions, ids = zip(*((each.prompt, each.completion, each.token_ids) for each in chosen))
        return Arguments(list(prompts), list(completions), list(ids), columns, self.state)

    def close(self) -> None:
        pass


class Pool:
    """`reward_workers` supervisors. A call goes to any supervisor that is free."""

    def __init__(self, cfg: Config, notice: Callable[[str], None]):
        """Start all supervisors at the same time. Raises UserError when a function cannot be found or imported."""
        self.functions = locate(cfg)
        self.cfg = cfg
        self.state = TrainerState()
        self.supervisors: list[SupervisorHandle] = []
        self.pending = PendingCalls([], cfg.reward_workers)
        self.looked_at = 0.0
        self.num_rounds = 0
        self.whole_s = 0.0  # duration of the last round whose calls were all made in `collect`
        atexit.register(self.close)
        try:
            self.supervisors += [SupervisorHandle(cfg, self.functions) for _ in range(cfg.reward_workers)]
            greetings = [supervisor.greeting() for supervisor in self.supervisors]
            self.rewards = make_rewards(cfg, greetings[0]["functions"])
        except BaseException:
            self.close()
            raise
        if not greetings[0]["enclosed"]:
            notice(
                "note: this system allows no namespaces: reward workers have network access, and a process that a "
                "reward starts can hide from its end"
            )

    def at(self, step: int, total: int) -> "Pool":
        self.state = TrainerState(step, total)
        return self

    def begin(self) -> None:
        """See Rewards. Replaces supervisors that were lost or are still working on dropped calls."""
        self._drop_busy()
        self._restart_missing()
        self.pending = PendingCalls(self.rewards, self.cfg.reward_workers)
        self.num_rounds += 1

    @property
    def early(self) -> bool:
        """See Rewards. Only for slow rewards: where processors are few, workers slow the trainer's own decoding."""
        return self.whole_s >= EARLY_S and self.num_rounds % MEASURED_ROUNDS != 0

    def submit(self, inputs: Sequence[RewardInput], calls: Sequence[Call]) -> None:
        self.pending.add(inputs, calls)

    def advance(self) -> None:
        """See Rewards. Replacing a lost supervisor takes time, so that is left to `collect`."""
        if time.monotonic() >= self.looked_at + LOOK_S and (self.pending.waits or self._busy()):
            self._take_answers(0.0)
            self._hand_out()

    def collect(self, pulse: Pulse) -> list[Answer | None]:
        """See Rewards. Returns at once when `pulse` asks to stop, and kills the busy workers."""
        began, whole, stopped = time.monotonic(), self.pending.untouched, False
        while self.pending.waits or self._busy():
            if stopped := pulse():
                self._drop_busy()
                break
            self._restart_missing()
            self._hand_out()
            self._take_answers(PULSE_S)
        if whole and not stopped:
            self.whole_s = time.monotonic() - began
        answers, self.pending = self.pending.answers, PendingCalls(self.rewards, self.cfg.reward_workers)
        return answers

    def close(self) -> None:
        """End every supervisor, and with it every process that its workers started."""
        atexit.unregister(self.close)
        for supervisor in self.supervisors:
            supervisor.socket.close()  # all sockets first, so that the supervisors end at the same time
        for supervisor in list(self.supervisors):
            self._drop(supervisor)

    def _drop(self, supervisor: SupervisorHandle) -> None:
        self.supervisors.remove(supervisor)
        supervisor.close()

    def _restart_missing(self) -> None:
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
            if self.pending.waits and not supervisor.busy:
                supervisor.busy = self.pending.next_batch()
                header, body = self.pending.request(supervisor.busy)
                supervisor.time_left_s = self._time_allowed_s(supervisor)
                state = [self.state.global_step, self.state.max_steps]
                supervisor.send(frame(dump({**header, "state": state})) + frame(body))

    def _time_allowed_s(self, supervisor: SupervisorHandle) -> float:
        current = self.pending.calls[supervisor.busy[0]]
        twice = 2 if self.rewards[current.k].is_async else 1  # with others, and once more alone
        return twice * (self.cfg.reward_timeout_s * len(current.rows) + IMPORT_S + GRACE_S)

    def _take_answers(self, wait_s: float) -> None:
        """Read the answers of busy supervisors, waiting at most `wait_s` for the first. Drops lost supervisors."""
        # charge the time since the last read to every busy supervisor
        now = time.monotonic()
        passed_s, self.looked_at = now - self.looked_at, now
        for supervisor in self._busy():
            supervisor.time_left_s -= min(passed_s, UNSEEN_S)
        # a lost supervisor costs the call that ran; the others of its batch wait again
        for supervisor in self._ready(wait_s):
            if not self._receive(supervisor):
                first, *rest = supervisor.busy
                self.pending.fail(first, "its worker's supervisor was ended from outside")
                self.pending.put_back(rest)
                self._drop(supervisor)

    def _ready(self, wait_s: float) -> list[SupervisorHandle]:
        """Busy supervisors with data to read; if there are none after `wait_s`, those whose time is up."""
        with selectors.DefaultSelector() as selector:
            for supervisor in self._busy():
                selector.register(supervisor.socket, selectors.EVENT_READ, supervisor)
            ready = [key.data for key, _ in selector.select(wait_s)]
        return ready or [supervisor for supervisor in self._busy() if supervisor.time_left_s < 0]

    def _receive(self, supervisor: SupervisorHandle) -> bool:
        """Read the answers that have arrived. False: the supervisor is lost."""
        try:
            data = b"" if supervisor.time_left_s < 0 else supervisor.socket.recv(1 << 18)
        except OSError:
            data = b""
        supervisor.splitter.feed(data)
        while supervisor.busy and (answer := supervisor.splitter.next()) is not None:
            i = supervisor.busy.pop(0)
            current = self.pending.calls[i]
            self.pending.answers[i] = read_answer(answer, current, self.rewards[current.k].if_ended)
            if supervisor.busy:
                supervisor.time_left_s = self._time_allowed_s(supervisor)
        return bool(data) or not supervisor.busy
