"""Jobs that tests run on several ranks: `torchrun ... tests/support/rank_jobs.py FOLDER`. Each rank saves JSON."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from grpo.config.settings import Config, prompts_per_step, updates_per_step
from grpo.rewards.pool import InProcess
from grpo.rollout import rollout
from grpo.rollout.engine import NativeEngine
from grpo.runtime.distributed import World, start, stop
from grpo.training import entropy
from grpo.training import exchange as batching
from grpo.training.advantages import group_advantages
from grpo.training.draws import Draws
from grpo.training.exchange import deliver
from grpo.training.kl_in_reward import put_kl_into_rewards
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.policy import Policy
from grpo.training.reference_renewal import renew_reference
from grpo.training.scoring import Scored, Scoring, advantages_of, gather
from grpo.training.user_table_functions import load_weighting
from grpo.types import FACTS, Completion, Prompt, Table
from tests.support.tiny import tiny_model, tiny_tokenizer

VOCAB = 300


def config(**settings) -> Config:
    """Small shapes; 5 prompts of 3, so that nothing divides evenly, and chunks of 4 rows."""
    defaults = dict(
        batch_size=5,
        gradient_accumulation_steps=1,
        num_generations=3,
        rollout_chunk_rows=4,
        micro_batch_tokens=64,
        max_generate_length=16,
        lr=1e-3,
        rewards={"final_answer_reward": 1.0},
        model="tiny",
        data="none",
    )
    return Config(**{**defaults, **settings})


def injected(
    cfg: Config, step: int, seed: int = 0, masked: bool = False
) -> tuple[list[Prompt], list[Completion], np.ndarray]:
    """Prompts, completions and advantages of a step, the same on every rank: lengths 1 to max, one row empty.

    masked: about a third of the tokens carry no loss, and all tokens of row 4. With top_entropy_share completions have
    entropies, which are no model's.
    """
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
    advantages = rng.choice([-1.0, 0.0, 0.5, 1.5], len(completions))
    if cfg.top_entropy_share < 1:
        rng_of_entropies = np.random.default_rng([seed, step, 1])
        recorded = [rng_of_entropies.gamma(2.0, size=len(c.token_ids)).astype(np.float32) for c in completions]
        completions = [dataclasses.replace(c, entropy=h) for c, h in zip(completions, recorded, strict=True)]
    if masked:
        flags = [rng.random(len(one.token_ids)) > (1 if one.row == 4 else 1 / 3) for one in completions]
        completions = [dataclasses.replace(c, trained=flag) for c, flag in zip(completions, flags, strict=True)]
    return prompts, completions, advantages


def table_of(cfg: Config, lengths: np.ndarray, sampled_by: np.ndarray, num_trained: np.ndarray | None = None) -> Table:
    """A table of lengths, trained tokens (None: all) and samplers, without scores."""
    trained = lengths if num_trained is None else num_trained
    facts = {name: np.zeros(len(lengths)) for name in FACTS}
    facts |= {"length": lengths, "trained": trained, "rank": sampled_by}
    return Table([], np.zeros((len(lengths), 0)), np.zeros(len(lengths)), facts, cfg.num_generations)


def make_policy(cfg: Config, world: World, architecture: str = "qwen3") -> Policy:
    """A tiny random policy, its reference (when beta > 0) another one."""
    reference = tiny_model(architecture, VOCAB, seed=1, spread=2.0) if cfg.beta > 0 and not cfg.lora_r else None
    return Policy(
        cfg, world, with_adapter(cfg, tiny_model(architecture, VOCAB, spread=2.0).to(world.device)), reference
    )


def with_adapter(cfg: Config, model: PreTrainedModel) -> PreTrainedModel:
    """The model as the settings train it: with a new adapter where they ask for one."""
    if not cfg.lora_r:
        return model
    from grpo.models.lora import start_lora  # late: peft takes seconds

    return start_lora(model, cfg)


def injected_step(
    cfg: Config, world: World, policy: Policy, step: int, steps: int, seed: int, tally: Tally, masked: bool = False
) -> list[float]:
    """One step of training on injected rollouts; each rank has only the rows it would have sampled."""
    prompts, completions, advantages = injected(cfg, step, seed, masked)
    mine = [completion for completion in completions if completion.row % world.size == world.rank]
    lengths = np.array([len(completion.token_ids) for completion in completions])
    num_trained = np.array([np.count_nonzero(completion.trained) for completion in completions])
    table = table_of(cfg, lengths, np.arange(len(completions)) % world.size, num_trained)
    if cfg.kl_estimator == "k1_reward":  # what else are advantages are rewards
        table = dataclasses.replace(table, rewards=advantages)
        draws = Draws(SimpleNamespace(cfg=cfg, world=world), 0)  # type: ignore[arg-type]
        draws.add(prompts, Scored(mine, [], np.zeros((0, 0)), np.zeros((0, 0)), len(completions)), table)
        put_kl_into_rewards(draws, policy, tally)
        advantages = draws.advantages()
    plan = make_plan(cfg, prompts, lengths, advantages, world.size, num_trained=num_trained)
    batches = deliver(world, cfg, plan, prompts, mine, table, advantages, policy.even_block)
    batches = policy.annotate(batches)
    return policy.train_on(batches, tally, steps * updates_per_step(cfg), False, on_skip=lambda *_: None)


def moments_of(policy: Policy) -> dict[str, float]:
    """A number for each piece of this rank's optimizer state."""
    return {f"{p.name}|{p.moment}|{p.start}": p.values.double().sum().item() for p in policy.backend.moments()}


def weights_sha256(policy: Policy) -> str:
    """Hash of all weights, in order."""
    digest = hashlib.sha256()
    for _, tensor in policy.weights():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def injected_updates(
    world: World,
    out: Path,
    name: str,
    steps: int = 20,
    seed: int = 0,
    broken: str = "",
    masked: bool = False,
    architecture: str = "qwen3",
    scored: bool = False,
    **settings,
):
    """Train on injected rollouts; rank 0 saves the weights. `broken` names a deliberate defect, for controls.

    scored: as with an engine that records no entropies.
    """
    cfg = config(**settings)
    records_entropy = entropy.records_entropy
    if scored:
        entropy.records_entropy = lambda cfg: False
    policy = make_policy(cfg, world, architecture)
    tally = Tally()
    norms = []
    for step in range(steps):
        if broken == "moments" and step == steps // 2:
            policy.backend.load_moments(lambda name, moment, start, length: torch.zeros(length), 1)
        if broken == "denominator":  # weights divide by the rows of a micro-batch, not of the minibatch
            batching.load_weighting = lambda *_: lambda counts, _: [1 / max(1, c) / 7 / (1 + c % 2) for c in counts]
        norms += injected_step(cfg, world, policy, step, steps, seed, tally, masked)
        renew_reference(policy, step + 1)
    batching.load_weighting, entropy.records_entropy = load_weighting, records_entropy  # of later jobs
    weights = {key: value.contiguous().clone() for key, value in policy.weights()}
    if world.is_main:
        save_file(weights, out / f"{name}.safetensors")
    of_reference = [] if policy.reference is None else [p.double().sum().item() for p in policy.reference.parameters()]
    return {
        "sha256": weights_sha256(policy),
        "norms": norms,
        "metrics": tally.reduce(world).metrics,
        "reference": of_reference,
    }


def free_rollout(world: World, out: Path, **settings):
    """Sample one step with equal weights, streamed from the backend into an engine; each rank reports its rows."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    prompts, _, _ = injected(cfg, 0)
    sampler = tiny_model("qwen3", VOCAB, seed=5)
    if cfg.lora_r:  # only adapters are streamed: the frozen model is the policy's own
        sampler = with_adapter(dataclasses.replace(cfg, seed=5), tiny_model("qwen3", VOCAB, spread=2.0))
        for step in range(3):
            injected_step(cfg, world, policy, step, 3, 0, Tally())
    engine = NativeEngine(sampler, [0, 9], cfg.max_generate_length, seed=cfg.seed)
    engine.load_weights(policy.weights)
    completions = rollout(engine, prompts, range(3, 100), cfg, world)
    return {str(c.row): [c.token_ids.tolist(), c.sampler_logprobs.tolist(), c.finish] for c in completions}


def poisoned_update(world: World, out: Path, rank: int, **settings):
    """A NaN in one rank's log-probs: weights and moments before and after, on every rank."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    injected_step(cfg, world, policy, 0, 3, 0, Tally())
    before = weights_sha256(policy)
    moments = moments_of(policy)
    true_loss = policy.loss
    if world.rank == rank:
        policy.loss = lambda *args: true_loss(*args) * float("nan")  # type: ignore[method-assign]
    norms = injected_step(cfg, world, policy, 1, 3, 0, Tally())
    same = moments == moments_of(policy)
    policy.loss = true_loss  # type: ignore[method-assign]
    after = weights_sha256(policy)
    injected_step(cfg, world, policy, 2, 3, 0, Tally())
    return {
        "before": before,
        "after": after,
        "moments_same": same,
        "norms": norms,
        "later": weights_sha256(policy),
        "skipped": policy.counters.skipped_updates,
        "in_a_row": policy.counters.consecutive_skips,
    }


def sealed_update(world: World, out: Path, rank: int, **settings):
    """Checksums after an update; sample and score, then flip a bit of each tensor of a rank: what each rank finds."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    injected_step(cfg, world, policy, 0, 3, 0, Tally())
    NativeEngine(with_adapter(cfg, tiny_model("qwen3", VOCAB)), [0], 4, 1).load_weights(policy.weights)
    untouched = policy.changed_tensor()
    tensors = dict(policy.backend.local_tensors())
    found = {}
    for name, tensor in tensors.items():
        if world.rank == rank and tensor.numel():
            bits = tensor.view(-1)[-1:].view(torch.int32)
            bits ^= 1 << 11
            found[name] = policy.changed_tensor()
            bits ^= 1 << 11
    other, remembered = policy.changed_tensor(), policy.known_checksums
    injected_step(cfg, world, policy, 1, 3, 0, Tally())
    changed = sum(policy.known_checksums[name] != value for name, value in remembered.items())
    return {
        "untouched": untouched,
        "found": found,
        "other": other,
        "changed": changed,
        "remembered": len(remembered),
    }


def crowded_updates(world: World, out: Path, name: str, where: str, **settings):
    """Train on injected rollouts; on rank 1 memory runs out above 30 tokens, before or after gradients were added."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    true_loss, true_backward = policy.loss, policy.backend.backward
    tried = []

    def loss(micro, *args):
        tried.append(micro.input_ids.numel())
        if where == "loss" and world.rank == 1 and tried[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return true_loss(micro, *args)

    def backward(value, last):
        true_backward(value, last)
        if where == "backward" and world.rank == 1 and tried[-1] > 30:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    policy.loss, policy.backend.backward = loss, backward  # type: ignore[method-assign]
    tally = Tally()
    for step in range(20):
        injected_step(cfg, world, policy, step, 20, 0, tally)
    weights = {key: value.contiguous().clone() for key, value in policy.weights()}
    if world.is_main:
        save_file(weights, out / f"{name}.safetensors")
    return {
        "sha256": weights_sha256(policy),
        "halvings": policy.fitting.halvings,
        "size": policy.fitting.size,
        "metrics": tally.reduce(world).metrics,
    }


def architecture_steps(world: World, out: Path, architecture: str, steps: int = 2, **settings):
    """Whole steps, free-running: sample, reward by a rule on the ids, exchange, update."""
    cfg = config(**settings)
    policy = make_policy(cfg, world, architecture)
    start_weights = {name: tensor.clone() for name, tensor in policy.weights()}
    engine = NativeEngine(policy.model, [0, 9], cfg.max_generate_length, cfg.seed, cfg.dtype, cfg.rollout_tokens)
    sampled, norms, tally = {}, [], Tally()
    group = cfg.num_generations
    for step in range(steps):
        prompts, _, _ = injected(cfg, step)
        engine.load_weights(policy.weights)
        completions = rollout(engine, prompts, range(step, 100), cfg, world)
        facts = np.zeros((len(prompts) * group, 3))
        for c in completions:
            facts[c.row] = [len(c.token_ids), float((c.token_ids % 2 == 0).mean()), world.rank]
        facts = world.sum_rows(facts)
        lengths, rewards = facts[:, 0].astype(int), facts[:, 1]
        table = table_of(cfg, lengths, facts[:, 2])
        advantages = group_advantages(rewards.reshape(-1, group)).ravel()
        plan = make_plan(cfg, prompts, lengths, advantages, world.size)
        batches = deliver(world, cfg, plan, prompts, completions, table, advantages, policy.even_block)
        batches = policy.annotate(batches)
        norms += policy.train_on(batches, tally, steps * updates_per_step(cfg), False, on_skip=lambda *_: None)
        sampled |= {f"{step}.{c.row}": c.token_ids.tolist() for c in completions}
        policy.trust_sampler(tally.reduce(world))
    ends = dict(policy.weights())
    moved = {name: float((ends[name] - start_weights[name]).abs().max()) for name in ends}
    if world.is_main:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in ends.items()}, out / f"{architecture}.safetensors"
        )
    return {
        "sha256": weights_sha256(policy),
        "norms": norms,
        "sampled": sampled,
        "moved": moved,
        "dtypes": sorted({str(tensor.dtype) for tensor in ends.values()}),
        "metrics": tally.reduce(world).metrics,
    }


def collectives(world: World, out: Path):
    """The result of each World method on this rank."""
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


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_to_all_single",
    "broadcast",
    "barrier",
    "reduce",
    "gather",
    "scatter",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "monitored_barrier",
)


def counted_step(world: World, out: Path, seed: int = 0, **settings):
    """One whole step (sample, score table, exchange, update, metrics); the collectives it took, by caller's file."""
    cfg = config(**settings)
    policy = make_policy(cfg, world)
    prompts, _, _ = injected(cfg, 0, seed)
    engine = NativeEngine(tiny_model("qwen3", VOCAB), [0, 9], cfg.max_generate_length, cfg.seed)
    engine.load_weights(policy.weights)
    counts: dict[str, int] = {}
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def counting(name):
        def wrapped(*args, **kwargs):
            caller = Path(sys._getframe(1).f_code.co_filename).stem
            counts[f"{caller}.{name}"] = counts.get(f"{caller}.{name}", 0) + 1
            return originals[name](*args, **kwargs)

        return wrapped

    for name in COLLECTIVES:
        setattr(torch.distributed, name, counting(name))
    tally = Tally()
    completions = rollout(engine, prompts, range(100), cfg, world)
    even = lambda completion_ids, **_: [sum(i % 2 for i in ids) / 9 for ids in completion_ids]  # noqa: E731
    rewards = InProcess.of({"even": even})
    scored = Scoring(cfg, rewards, prompts, tiny_tokenizer(), print).finish(completions)
    table = gather(world, cfg, rewards.rewards, scored, (False, False))
    advantages = advantages_of(table, cfg)
    plan = make_plan(cfg, prompts, table.lengths, advantages, world.size)
    batches = deliver(world, cfg, plan, prompts, completions, table, advantages, policy.even_block)
    policy.train_on(policy.annotate(batches), tally, 1, table.any_broken, on_skip=lambda *_: None)
    tally.reduce(world)
    for name in COLLECTIVES:
        setattr(torch.distributed, name, originals[name])
    return counts


JOBS: dict[str, Callable] = {
    job.__name__: job
    for job in (
        injected_updates,
        free_rollout,
        poisoned_update,
        sealed_update,
        crowded_updates,
        architecture_steps,
        collectives,
        counted_step,
    )
}


def main() -> None:
    """Run the jobs of a JSON file, [[job, {arguments}], ...], in one launch; save the results by rank."""
    out = Path(sys.argv[1])
    world = start("cpu", num_threads=1)
    results = []
    for job, arguments in json.loads((out / "jobs.json").read_text()):
        results.append(JOBS[job](world, out, **arguments))
    (out / f"rank_{world.rank}.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed allocates gigabytes that it never reads
    main()
