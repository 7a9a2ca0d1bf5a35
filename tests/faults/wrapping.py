"""Faults in functions of the product and of the system: they are wrapped before the run begins."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.faults.fault import Fault


def _each_loss(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Fault], None]:
    """A fault in the losses of one step: change(policy, loss) -> loss."""

    def wrap(fault: Fault) -> None:
        from grpo.training.policy import Policy

        plain = Policy.loss
        left = [fault.times]

        def loss(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            value = plain(self, *args, **kwargs)
            if not left[0] or fault.step not in (None, self.counters.step + 1):
                return value
            left[0] -= 1
            return change(self, value)

        Policy.loss = loss  # type: ignore[method-assign]

    return wrap


def _infinite_gradient(policy: Any, loss: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is not."""
    touched = next(policy.model.parameters()).sum() * 0.0
    touched.register_hook(lambda gradient: gradient * float("inf"))
    return loss + touched


def _nan_logits(fault: Fault) -> None:
    """The model of this rank gives NaN while it samples that step."""
    import train

    plain = train.rollout

    def rollout(engine: Any, prompts: Any, slots: Any, cfg: Any, world: Any, *more: Any, **named: Any) -> Any:
        if fault.step not in (None, slots[0] // len(prompts) + 1):
            return plain(engine, prompts, slots, cfg, world, *more, **named)
        handle = engine.model.get_output_embeddings().register_forward_hook(lambda *call: call[-1] * float("nan"))
        try:
            return plain(engine, prompts, slots, cfg, world, *more, **named)
        finally:
            handle.remove()

    train.rollout = rollout


def _little_memory_to_sample(fault: Fault) -> None:
    """Sampling more than `value` rows at once runs out of memory."""
    from grpo.rollout.shared_cache import SharedCache

    plain = SharedCache.join

    def join(self: Any, requests: Any, last: bool) -> Any:
        if (
            len(self.start_times) + len(requests) > fault.value and self.buffer.max_new_tokens > 2
        ):  # not the trial of a few tokens
            raise torch.OutOfMemoryError(f"no memory for {len(requests)} rows")
        return plain(self, requests, last)

    SharedCache.join = join  # type: ignore[method-assign]


def _little_memory_to_train(fault: Fault) -> None:
    """Training on more than `value` rows at once runs out of memory."""
    from grpo.training.policy import Policy

    plain = Policy.loss

    def loss(self: Any, micro: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if micro.input_ids.shape[0] > fault.value:
            raise torch.OutOfMemoryError(f"no memory for {micro.input_ids.shape[0]} rows")
        return plain(self, micro, *args, **kwargs)

    Policy.loss = loss  # type: ignore[method-assign]


def _tensor_file_error(fault: Fault) -> None:
    """Writing a file of tensors into that step's checkpoint fails with errno `value`."""
    plain = sys.modules["safetensors.torch"].save_file

    def save_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if f"checkpoint_{fault.step}/" in str(path):
            raise OSError(int(fault.value), os.strerror(int(fault.value)), str(path))
        plain(tensors, path, *args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith("grpo") and getattr(module, "save_file", None) is plain:
            vars(module)["save_file"] = save_file


def _sync_error(fault: Fault) -> None:
    """Bringing a file of that step's checkpoint to disk fails with errno `value`."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        if f"checkpoint_{fault.step}/" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(int(fault.value), os.strerror(int(fault.value)))
        plain(handle)

    vars(os)["fsync"] = fsync


def _lose(forget: Callable[[Any], None]) -> Callable[[Fault], None]:
    """A resume that forgets something: the controls of "resuming is exact"."""

    def wrap(fault: Fault) -> None:
        import train

        plain = train.restore

        def restore(policy: Any, folder: Any, *args: Any, **kwargs: Any) -> int:
            plain(policy, folder, *args, **kwargs)
            if folder is not None:
                forget(policy)
            return policy.counters.step

        train.restore = restore

    return wrap


def _lose_moments(policy: Any) -> None:
    policy.backend.load_moments(lambda name, moment, start, length: torch.zeros(length), policy.counters.updates)


def _lose_schedule(policy: Any) -> None:
    policy.counters.updates = 0


def _lose_step(policy: Any) -> None:
    policy.counters.step = 0


def _lose_trust(policy: Any) -> None:
    policy.counters.trust_sampler = not policy.counters.trust_sampler


def _lose_cursor(policy: Any) -> None:
    """The steps go on, the questions start again from the first."""
    from grpo.data.questions import Questions

    plain, first = Questions.prompts, policy.counters.step

    def prompts(self: Any, step: int, num_prompts: int) -> Any:
        return plain(self, step - first, num_prompts)

    Questions.prompts = prompts  # type: ignore[method-assign]


def _other_versions(fault: Fault) -> None:
    """This rank runs another version of torch."""
    torch.__version__ = type(torch.__version__)("1.0.0")


def _inject_rollouts(fault: Fault) -> None:
    """Completions are a function of seed and step alone, whatever the weights: for runs on different backends."""
    import train
    from grpo.types import Completion

    def rollout(engine: Any, prompts: Any, slots: Any, cfg: Any, world: Any, *more: Any, **named: Any) -> Any:
        rng = np.random.default_rng([cfg.seed, slots[0]])
        completions = []
        for n in range(len(prompts) * cfg.num_generations):
            length = int(rng.integers(1, cfg.max_generate_length + 1))
            ids = rng.integers(3, 290, length).astype(np.int32)
            completions.append(Completion(n, ids, rng.normal(-5.5, 0.5, length).astype(np.float32), "stop"))
        return [c for c in completions if c.row % world.size == world.rank]

    train.rollout = rollout


WRAPPING: dict[str, Callable[[Fault], None]] = {
    "nan loss": _each_loss(lambda policy, loss: loss * float("nan")),
    "infinite loss": _each_loss(lambda policy, loss: loss + float("inf")),
    "infinite gradient": _each_loss(_infinite_gradient),
    "nan logits": _nan_logits,
    "little memory to sample": _little_memory_to_sample,
    "little memory to train": _little_memory_to_train,
    "tensor file error": _tensor_file_error,
    "sync error": _sync_error,
    "lose moments": _lose(_lose_moments),
    "lose schedule": _lose(_lose_schedule),
    "lose cursor": _lose(_lose_cursor),
    "lose step": _lose(_lose_step),
    "lose trust": _lose(_lose_trust),
    "lose nothing": _lose(lambda policy: None),
    "other versions": _other_versions,
    "injected rollouts": _inject_rollouts,
}
