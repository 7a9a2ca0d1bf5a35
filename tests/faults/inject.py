"""Faults, put into a process that is about to train. The product has no hook for this: its functions are wrapped here.

A fault with a `phase` fires when this rank's heartbeat enters that phase of that step (start, rollout, reward,
exchange, logprobs, update), or that part of a save (save/snapshot, save/write, save/written, save/manifest,
save/rename, save/committed, save/prune). The others change what a function of the product does.
"""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.faults.fault import Fault, policies
from tests.faults.watching import WATCHING
from tests.faults.wrapping import WRAPPING

WRAPPED = {**WRAPPING, **WATCHING}


def install(faults: Sequence[Fault], rank: int) -> None:
    """Wrap the product's functions so that this rank's faults happen. Call it after `import train`, before the run."""
    mine = [fault for fault in faults if fault.rank in (None, rank)]
    unknown = [fault.kind for fault in mine if fault.kind not in (AT_A_PHASE if fault.phase else WRAPPED)]
    assert not unknown, f"no such fault: {unknown}"
    _remember_policies()
    at_a_phase = [[fault, fault.after + fault.times] for fault in mine if fault.phase]
    if at_a_phase:
        _wrap_heartbeat(at_a_phase)
    for fault in mine:
        if not fault.phase:
            WRAPPED[fault.kind](fault)


def _remember_policies() -> None:
    from grpo.training.policy import Policy

    plain = Policy.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        policies.append(self)

    Policy.__init__ = init  # type: ignore[method-assign]


def _wrap_heartbeat(pending: list[list[Any]]) -> None:
    from grpo.runtime.heartbeat import Heartbeat

    def fire(step: int, phase: str) -> None:
        for entry in pending:
            fault, left = entry
            if left and fault.phase == phase and fault.step in (None, step):
                entry[1] -= 1
                if left <= fault.times:
                    AT_A_PHASE[fault.kind](fault)

    plain_beat = Heartbeat.__call__

    def beat(self: Any, step: int, phase: str) -> None:
        plain_beat(self, step, phase)
        fire(step, phase)

    Heartbeat.__call__ = beat  # type: ignore[method-assign]
    if any(fault.phase.startswith("save/") for fault, _ in pending):
        plain_saving = Heartbeat.saving  # fails here, loudly, when saves have no heartbeat

        def saving(self: Any, step: int, phase: str) -> None:
            plain_saving(self, step, phase)
            fire(step, f"save/{phase}")

        Heartbeat.saving = saving  # type: ignore[method-assign]


def _kill(number: int) -> Callable[[Fault], None]:
    return lambda fault: os.kill(os.getpid(), number)


def _raise(fault: Fault) -> None:
    raise RuntimeError("out of luck")


def _flip_weight(fault: Fault) -> None:
    """One bit of one weight, as a cosmic ray would."""
    parameter = list(policies[-1].model.parameters())[1]
    _flip_bit(parameter.data, bit=12)


def _flip_moment(fault: Fault) -> None:
    """One bit of AdamW's first moment of the second parameter."""
    state = policies[-1].backend.optimizer.state
    _flip_bit(next(entry["exp_avg"] for entry in list(state.values())[1:]), bit=12)


def _flip_bit(tensor: torch.Tensor, bit: int) -> None:
    flat = tensor.view(-1)
    flat[3:4].copy_((flat[3:4].clone().view(torch.int32) ^ (1 << bit)).view(torch.float32))


def _limit_file_size(fault: Fault) -> None:
    """No file of this process may grow beyond `value` bytes: EFBIG from the kernel. 0 lifts the limit."""
    limit = int(fault.value) or resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _limit_memory(fault: Fault) -> None:
    """No more than `value` bytes beyond what this process maps now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(fault.value)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _turn_clock_back(fault: Fault) -> None:
    """From now on the wall clock is an hour behind, and the time zone another one."""
    plain = time.time
    time.time = lambda: plain() - 3600.0
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()


def _remove_runs(fault: Fault) -> None:
    """Somebody deletes the run's folder of logs, again where a rank wrote a new file meanwhile."""
    folder = Path(os.environ["GRPO_FAULTS_RUNS"])
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


AT_A_PHASE: dict[str, Callable[[Fault], None]] = {
    "kill9": _kill(signal.SIGKILL),
    "stop": _kill(signal.SIGSTOP),
    "term": _kill(signal.SIGTERM),
    "int": _kill(signal.SIGINT),
    "raise": _raise,
    "hang": lambda fault: time.sleep(3600),
    "sleep": lambda fault: time.sleep(fault.value),
    "exit0": lambda fault: os._exit(0),
    "flip weight": _flip_weight,
    "flip moment": _flip_moment,
    "file size": _limit_file_size,
    "memory": _limit_memory,
    "clock": _turn_clock_back,
    "remove runs": _remove_runs,
}
