"""What the ranks of a run did, written down from inside: no fault, but installed like one."""

import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.fault import Fault, policies


def _trace(fault: Fault) -> None:
    """Append to trace_R.jsonl, when a rollout begins: step, hash of weights, hash of moments, open files, memory."""
    from grpo.runtime.heartbeat import Heartbeat

    plain = Heartbeat.__call__
    folder = Path(os.environ["GRPO_FAULTS_OUT"])

    def digest(tensors: Any) -> str:
        sha256 = hashlib.sha256()
        for tensor in tensors:
            sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return sha256.hexdigest()

    def beat(self: Any, step: int, phase: str) -> None:
        plain(self, step, phase)
        if phase != "rollout":
            return
        policy = policies[-1]
        line = {
            "step": step,
            "weights": digest(tensor for _, tensor in policy.weights()),
            "moments": digest(piece.values for piece in policy.backend.moments()),
            "files": len(os.listdir("/proc/self/fd")),
            "rss_mb": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20,
            "collectives": dict(_collectives),
        }
        with (folder / f"trace_{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    Heartbeat.__call__ = beat  # type: ignore[method-assign]


_collectives: dict[str, int] = {}


def _count_collectives(fault: Fault) -> None:
    """Count this rank's calls of torch.distributed's collectives; they show in the trace."""
    for name in ("all_reduce", "all_gather", "all_to_all_single", "broadcast", "monitored_barrier"):
        plain = getattr(torch.distributed, name)

        def counted(*args: Any, _name: str = name, _plain: Any = plain, **kwargs: Any) -> Any:
            _collectives[_name] = _collectives.get(_name, 0) + 1
            return _plain(*args, **kwargs)

        setattr(torch.distributed, name, counted)


def _record(fault: Fault) -> None:
    """Write each step's prompts and sampled tokens to rollouts/step_N.rank_R.json."""
    import train

    plain = train.rollout
    folder = Path(os.environ["GRPO_FAULTS_OUT"]) / "rollouts"

    def rollout(engine: Any, prompts: Any, slots: Any, cfg: Any, world: Any, *more: Any, **named: Any) -> Any:
        completions = plain(engine, prompts, slots, cfg, world, *more, **named)
        step = slots[0] // len(prompts) if cfg.filter_groups == "keep" else slots[0]  # there a name for the round
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {str(c.row): [c.token_ids.tolist(), c.sampler_logprobs.tolist()] for c in completions}
        aside = folder / f".step_{step + 1}.rank_{world.rank}"
        aside.write_text(json.dumps({"prompts": [prompt.data_row for prompt in prompts], "completions": tokens}))
        aside.rename(folder / f"step_{step + 1}.rank_{world.rank}.json")
        return completions

    train.rollout = rollout


WATCHING: dict[str, Callable[[Fault], None]] = {
    "trace": _trace,
    "count collectives": _count_collectives,
    "record": _record,
}
