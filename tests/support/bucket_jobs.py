"""Gradient sums over two ranks, by bucket: `torchrun ... tests/support/bucket_jobs.py FOLDER`. Each rank saves JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from grpo.runtime.distributed import World, start, stop
from grpo.training.backends import gradient_sums
from grpo.training.metrics import Tally
from tests.forward.test_host_reads import minibatch_of
from tests.support.rank_jobs import config, injected_step, make_policy, poisoned_update, weights_sha256

CASES = {  # architecture, settings, micro-batches of rank 0 and of rank 1
    "equal work": ("qwen3", {}, (3, 3)),
    "unequal work": ("llama", {}, (1, 3)),
    "no work": ("gemma2", {}, (2, 0)),
    "checkpointing": ("qwen3", {"gradient_checkpointing": True}, (2, 3)),
    "adapter": ("qwen3", {"lora_r": 4}, (1, 2)),
    "other order": ("llama", {}, (2, 1)),  # on rank 1 the last backward begins with another parameter, and ends there
}


class Watched:
    """Records what is added and sent, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.plain = dist.all_reduce

    def __enter__(self) -> "Watched":
        def sent(tensor, *args, **how):
            if how.get("group") is None:  # not the control group
                self.events.append(f"sent {tensor.numel()}")
            return self.plain(tensor, *args, **how)

        dist.all_reduce = sent
        return self

    def __exit__(self, *error) -> None:
        dist.all_reduce = self.plain


def losses_of(policy, minibatch, cut_off):
    """This rank's losses, and whether each is the last; cut_off: the last one depends on one parameter only."""
    for i, micro in enumerate(minibatch):
        first = next(p for p in policy.model.parameters() if p.requires_grad)
        last = i + 1 == len(minibatch)
        yield (first.square().sum() if cut_off and last else policy.loss(micro, Tally(), True)), last


def gradient(world: World, name: str) -> dict:
    """BucketSum's sum over ranks, compared with one all-reduce of each gradient after the backward."""
    architecture, settings, numbers = CASES[name]
    cfg = config(**settings)
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    plain, policy = make_policy(cfg, alone, architecture), make_policy(cfg, world, architecture)
    for model in (plain, policy):
        model.backend.train(True)
    minibatch = minibatch_of(plain, cfg)[: numbers[world.rank]]
    cut_off = name == "other order" and world.rank == 1
    for loss, _ in losses_of(plain, minibatch, cut_off):
        loss.backward()
    wanted = {}
    for key, parameter in plain.backend.parameters.items():
        wanted[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(wanted[key])
    with Watched() as seen:
        for parameter in policy.backend.parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda _: seen.events.append("added"))
        for loss, last in losses_of(policy, minibatch, cut_off):
            seen.events.append("backward")
            policy.backend.backward(loss, last)
        seen.events.append("step")
        policy.backend.buckets.finish()
    wrong = [key for key, p in policy.backend.parameters.items() if not torch.equal(p.grad, wanted[key])]
    return {
        "events": seen.events,
        "wrong": wrong,
        "parameters": len(wanted),
        "buckets": [sum(p.numel() for p in bucket) for bucket in policy.backend.buckets.buckets],
    }


def flat(policy) -> torch.Tensor:
    """All weights."""
    return torch.cat([tensor.flatten().double() for _, tensor in policy.weights()])


def crowded(world: World, fail: bool) -> dict:
    """Three updates; rank 1 runs out of memory within the last backward, after some buckets were sent."""
    cfg = config()
    policy = make_policy(cfg, world)
    begun = flat(policy)
    failures: list[int] = []

    def full(_):
        buckets = policy.backend.buckets
        if fail and world.rank == 1 and buckets.sending and buckets.sums and len(failures) < 3:
            failures.append(len(buckets.sums))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    true_step, twice = policy.backend.step, []

    def step_of(*args):
        twice.extend(i for i in policy.backend.buckets.flats if i < policy.backend.buckets.num_sent_before)
        return true_step(*args)

    policy.backend.step = step_of
    first = policy.model.model.layers[0]
    first.register_forward_hook(lambda module, inputs, output: output.register_hook(full) and None)
    tally = Tally()
    sent = []
    for step in range(3):
        with Watched() as seen:
            injected_step(cfg, world, policy, step, 3, 0, tally)
        sent.append(seen.events)
    weights = flat(policy)
    return {
        "sha256": weights_sha256(policy),
        "failures": failures,
        "sent": sent,
        "weights": weights.tolist(),
        "begun": begun.tolist(),
        "twice": twice,
        "halvings": policy.fitting.halvings,
        "loss": tally.reduce(world).metrics["loss"],
    }


def main() -> None:
    """Run all cases in one launch."""
    out = Path(sys.argv[1])
    world = start("cpu", num_threads=1)
    gradient_sums.BUCKET_ELEMENTS = 1000  # several buckets, although the model is small
    results: dict = {name: gradient(world, name) for name in CASES}
    results |= {name: crowded(world, name == "crowded") for name in ("crowded", "roomy")}
    results["poisoned"] = poisoned_update(world, out, rank=1)
    (out / f"rank_{world.rank}.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main()
