"""Jobs that tests run on several ranks: `torchrun ... tests/rank_jobs.py JOB OUT JSON`. Each rank saves JSON."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from grpo.advantages import group_advantages
from grpo.batching import deliver, make_plan
from grpo.config import Config, prompts_per_step, updates_per_step
from grpo.distributed import World, start, stop
from grpo.metrics import Tally
from grpo.policy import Policy
from grpo.rollout import cut_chunks, rollout, samplers
from grpo.rollout.native import NativeEngine
from grpo.types import Completion, Prompt
from tests.tiny import tiny_model

VOCAB = 300


def config(**settings) -> Config:
    """Small shapes; 5 prompts of 3, so that nothing divides evenly, and chunks of 4 rows."""
    defaults = dict(
        batch_size=5, gradient_accumulation_steps=1, num_generations=3, rollout_chunk_rows=4, micro_batch_tokens=64,
        max_generate_length=16, lr=1e-3, rewards={"final_answer_reward": 1.0}, model="tiny", data="none",
    )  # fmt: skip
    return Config(**{**defaults, **settings})


def injected(cfg: Config, step: int, seed: int = 0) -> tuple[list[Prompt], list[Completion], np.ndarray]:
    """Prompts, completions and advantages of a step, the same on every rank: lengths 1 to max, one row empty."""
    rng = np.random.default_rng([seed, step])
    prompts = [
        Prompt(p, "", tuple(rng.integers(1, VOCAB, rng.integers(2, 12)).tolist()), {})
        for p in range(prompts_per_step(cfg))
    ]
    completions = []
    for n in range(len(prompts) * cfg.num_generations):
        length = 0 if n == 7 else int(rng.integers(1, cfg.max_generate_length + 1))
        ids = rng.integers(1, VOCAB, length).astype(np.int32)
        logprobs = rng.normal(-5.5, 0.5, length).astype(np.float32)
        completions.append(Completion(n, ids, logprobs, "stop"))
    return prompts, completions, rng.choice([-1.0, 0.0, 0.5, 1.5], len(completions))


def make_policy(cfg: Config, world: World, architecture: str = "qwen3") -> Policy:
    """A tiny random policy, its reference (when beta > 0) another one."""
    reference = tiny_model(architecture, VOCAB, seed=1, spread=2.0) if cfg.beta > 0 else None
    model = tiny_model(architecture, VOCAB, spread=2.0).to(world.device)
    return Policy(cfg, world, model, reference)


def injected_step(
    cfg: Config, world: World, policy: Policy, step: int, steps: int, seed: int, tally: Tally
) -> list[float]:
    """One step of training on injected rollouts; each rank holds only what it would have sampled."""
    prompts, completions, advantages = injected(cfg, step, seed)
    owners = samplers(cut_chunks(len(prompts), cfg.num_generations, cfg.rollout_chunk_rows), world.size)
    mine = [completion for completion in completions if owners[completion.sample] == world.rank]
    lengths = np.array([len(completion.token_ids) for completion in completions])
    plan = make_plan(cfg, prompts, lengths, advantages, world.size)
    batches = policy.annotate(deliver(world, cfg, plan, prompts, mine, lengths, advantages))
    return policy.train_on(batches, tally, steps * updates_per_step(cfg), False, on_skip=lambda *_: None)


def weights_sha256(policy: Policy) -> str:
    """Hash of all weights, in order."""
    digest = hashlib.sha256()
    for _, tensor in policy.weights():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def injected_updates(world: World, out: Path, name: str, steps: int = 20, seed: int = 0, broken: str = "", **settings):
    """Train on injected rollouts; rank 0 saves the weights. `broken` names a deliberate defect, for controls."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    tally = Tally()
    norms = []
    for step in range(steps):
        if broken == "moments" and step == steps // 2:
            policy.backend.optimizer.state.clear()  # type: ignore[attr-defined]
        if broken == "denominator":  # each row weighs by its micro-batch, not by the whole minibatch
            import grpo.batching as batching

            batching.row_weights = lambda loss, lengths, most: [1 / max(1, c) / 7 / (1 + c % 2) for c in lengths]
        norms += injected_step(cfg, world, policy, step, steps, seed, tally)
    weights = {key: value.contiguous().clone() for key, value in policy.weights()}
    if world.is_main:
        save_file(weights, out / f"{name}.safetensors")
    return {"sha256": weights_sha256(policy), "norms": norms, "metrics": tally.reduce(world)}


def free_rollout(world: World, out: Path, **settings):
    """Sample one step with equal weights; every rank reports its own rows."""
    cfg = config(**settings)
    model = tiny_model("qwen3", VOCAB, spread=2.0)
    prompts, _, _ = injected(cfg, 0)
    engine = NativeEngine(model, [0, 9], cfg.max_generate_length, seed=cfg.seed)
    completions = rollout(engine, prompts, 3, cfg, world)
    return {str(c.sample): [c.token_ids.tolist(), c.sampler_logprobs.tolist(), c.finish] for c in completions}


def poisoned_update(world: World, out: Path, rank: int, **settings):
    """A NaN in one rank's log-probs: weights and moments before and after, on every rank."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    injected_step(cfg, world, policy, 0, 3, 0, Tally())
    before = weights_sha256(policy)
    moments = {k: v.double().sum().item() for k, v in policy.backend.optimizer_state().items()}
    true_loss = policy.loss
    if world.rank == rank:
        policy.loss = lambda *args: true_loss(*args) * float("nan")  # type: ignore[method-assign]
    norms = injected_step(cfg, world, policy, 1, 3, 0, Tally())
    same = moments == {k: v.double().sum().item() for k, v in policy.backend.optimizer_state().items()}
    policy.loss = true_loss  # type: ignore[method-assign]
    after = weights_sha256(policy)
    injected_step(cfg, world, policy, 2, 3, 0, Tally())
    return {
        "before": before, "after": after, "moments_same": same, "norms": norms, "later": weights_sha256(policy),
        "skipped": policy.counters.skipped_updates, "in_a_row": policy.counters.consecutive_skips,
    }  # fmt: skip


def architecture_steps(world: World, out: Path, architecture: str, steps: int = 2, **settings):
    """Whole steps, free-running: sample, reward by a rule on the ids, exchange, update."""
    cfg = config(**settings)
    policy = make_policy(cfg, world, architecture)
    start_weights = {name: tensor.clone() for name, tensor in policy.weights()}
    engine = NativeEngine(policy.model, [0, 9], cfg.max_generate_length, cfg.seed, cfg.dtype)
    sampled, norms, tally = {}, [], Tally()
    group = cfg.num_generations
    for step in range(steps):
        prompts, _, _ = injected(cfg, step)
        engine.load_weights(policy.weights())
        completions = rollout(engine, prompts, step, cfg, world)
        facts = np.zeros((len(prompts) * group, 2))
        for c in completions:
            facts[c.sample] = [len(c.token_ids), float((c.token_ids % 2 == 0).mean())]
        facts = world.sum_rows(facts)
        lengths, rewards = facts[:, 0].astype(int), facts[:, 1]
        advantages = group_advantages(rewards.reshape(-1, group)).ravel()
        plan = make_plan(cfg, prompts, lengths, advantages, world.size)
        batches = policy.annotate(deliver(world, cfg, plan, prompts, completions, lengths, advantages))
        norms += policy.train_on(batches, tally, steps * updates_per_step(cfg), False, on_skip=lambda *_: None)
        sampled |= {f"{step}.{c.sample}": c.token_ids.tolist() for c in completions}
        policy.trust(tally.reduce(world))
    ends = dict(policy.weights())
    moved = {name: float((ends[name] - start_weights[name]).abs().max()) for name in ends}
    if world.is_main:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in ends.items()}, out / f"{architecture}.safetensors"
        )
    return {"sha256": weights_sha256(policy), "norms": norms, "sampled": sampled, "moved": moved,
            "dtypes": sorted({str(tensor.dtype) for tensor in ends.values()}), "metrics": tally.reduce(world)}  # fmt: skip


def collectives(world: World, out: Path):
    """What each World method gives here."""
    table = np.zeros((world.size, 2))
    table[world.rank] = [world.rank + 0.5, np.nan if world.rank == 0 else 1.0]
    outgoing = [np.arange(world.rank + to, dtype=np.int32) + 100 * world.rank for to in range(world.size)]
    incoming = world.exchange(outgoing, [source + world.rank for source in range(world.size)])
    return {
        "sum": np.nan_to_num(world.sum_rows(table), nan=-1.0).tolist(),
        "gather": world.gather_rows(np.array([world.rank * 1.0, 7.0])).tolist(),
        "any": world.any_rank(world.rank == world.size - 1, False),
        "incoming": [part.tolist() for part in incoming],
    }


JOBS: dict[str, Callable] = {
    job.__name__: job for job in (injected_updates, free_rollout, poisoned_update, architecture_steps, collectives)
}


def main() -> None:
    """Run a job, or several of them in one launch: {"calls": [{...}, ...]}."""
    job, out, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    world = start("cpu", num_threads=1)
    calls = arguments.get("calls", [arguments])
    results = [JOBS[job](world, out, **call) for call in calls]
    (out / f"{job}_{world.rank}.json").write_text(json.dumps(results if "calls" in arguments else results[0]))
    stop(world)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main()
