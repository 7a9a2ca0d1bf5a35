"""Numbers that are not finite, bits that flip, memory that runs out."""

import dataclasses

import pytest
import torch

from grpo.runtime.distributed import World
from grpo.training.advantages import group_advantages
from grpo.training.metrics import Tally
from tests.faults.fault import EVERY, Fault
from tests.faults.runs import STEPS

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
BAD = [(kind, rank) for kind in ("nan loss", "infinite loss", "infinite gradient", "nan logits") for rank in (0, 1)]
DIVERGED, CORRUPTED = 76, 77
TIMEOUT_S = 5.0
SECOND_PARAMETER = "model.layers.0.self_attn.q_proj.weight"  # what inject.py flips a bit of


@pytest.mark.parametrize(
    "chosen", [[("nan loss", 1)], pytest.param(BAD, marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F20_a_number_that_is_not_finite(arena, record, chosen):
    """On one rank, in one step: all ranks skip it, weights and moments stay bit for bit, then training goes on."""
    bad = []
    for kind, rank in chosen:
        run = arena.run()
        samples = (
            [Fault("sleep", "rollout", 1 - rank, 5, 1.5)] if kind == "nan logits" else []
        )  # this rank takes chunks
        job = run.finish(faults=[Fault("trace"), Fault(kind, rank=rank, step=5), *samples])
        wrong = []
        for trace_rank in (0, 1):
            at = {line["step"]: (line["weights"], line["moments"]) for line in run.trace(trace_rank)}
            wrong += [] if at[6] == at[5] else [f"rank {trace_rank}: step 5 left traces"]
            wrong += [] if at[5] != at[4] and at[7] != at[6] else [f"rank {trace_rank}: the trace sees nothing"]
        counts = [row["guards/skipped_updates"] for row in run.metrics()]
        wrong += [] if counts == [0.0] * 4 + [1.0] * (STEPS - 4) else [f"counted {counts}"]
        wrong += [] if (run.output / "anomalies" / "step_5" / f"rank_{rank}.json").exists() else ["no evidence"]
        wrong += [] if "step 5: update skipped on all ranks" in job.text() else ["no line in the log"]
        if wrong:
            bad.append((kind, rank, wrong))
    record("F20", len(chosen), len(chosen) - len(bad), f"wrong: {bad}" if bad else "bits before = bits after")


def test_F21_nan_in_every_step(arena, record):
    """After max_bad_steps of them the run ends with 76, each one kept."""
    run = arena.run(max_bad_steps=3)
    job = run.launch([Fault("nan loss", rank=1, times=EVERY)])
    wrong = run.ended_with(job, DIVERGED)
    evidence = sorted(path.name for path in (run.output / "anomalies").iterdir())
    good = not wrong and evidence == ["step_1", "step_2", "step_3"] and not run.valid()
    good = good and "3 updates in a row met NaN or Inf" in job.text()
    record(
        "F21", 1, int(good), f"ended after {len(evidence)} steps, allowed 3" + ("" if good else f": {wrong} {evidence}")
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_F22_nan_where_nothing_counts(record, poison):
    """Values in masked positions change neither loss nor gradients by a bit. Control: one that counts does."""
    from tests.support.rank_jobs import config, injected, make_policy, table_of

    def loss_and_gradients(change):
        import numpy as np

        from grpo.training.exchange import deliver
        from grpo.training.minibatches import make_plan

        cfg = config(beta=0.1, num_iterations=2, micro_batch_tokens=256)
        policy = make_policy(cfg, ALONE)
        prompts, completions, advantages = injected(cfg, 0)
        lengths = np.array([len(completion.token_ids) for completion in completions])
        table = table_of(cfg, lengths, np.zeros(len(completions)))
        plan = make_plan(cfg, prompts, lengths, advantages, 1)
        batches = deliver(ALONE, cfg, plan, prompts, completions, table, advantages, policy.even_block)
        [micro, *_] = policy.annotate(batches)[0]
        assert (~micro.trained).any() and micro.ref_logprobs is not None and micro.old_logprobs is not None
        loss = policy.loss(change(micro), Tally(), True)
        loss.backward()
        return [loss.detach(), *(p.grad for p in policy.model.parameters() if p.grad is not None)]

    def poisoned(micro, where):
        fields = ("sampler_logprobs", "old_logprobs", "ref_logprobs")
        return dataclasses.replace(
            micro, **{name: torch.where(where(micro), poison, getattr(micro, name)) for name in fields}
        )

    clean = loss_and_gradients(lambda micro: micro)
    masked = loss_and_gradients(lambda micro: poisoned(micro, lambda m: ~m.trained))
    counted = loss_and_gradients(lambda micro: poisoned(micro, lambda m: m.trained))
    same = all(torch.equal(a, b) for a, b in zip(clean, masked, strict=True))
    differ = not all(torch.equal(a, b) for a, b in zip(clean, counted, strict=True))
    record("F22", 1, int(same and differ), f"{poison} in masked places: bit-equal {same}; control differs {differ}")


GROUPS = {
    "all equal": [[2.98] * 8] * 2,
    "all equal, 64": [[0.1 + 0.2] * 64],
    "one ulp apart": [[1.0, 1.0 + 2**-52] * 4],
    "one part in 1e9": [[1.0, 1.0 + 1e-9] * 4],
}


def test_F27_rewards_that_are_equal_or_nearly(record):
    """Exactly 0 for groups that differ by rounding alone; never beyond (G - 1) / sqrt(G) for any other."""
    import numpy as np

    num_held, tries, largest = 0, 0, 0.0
    for equal in GROUPS.values():
        tries += 1
        num_held += bool((group_advantages(np.array(equal)) == 0.0).all())
    rng = np.random.default_rng(27)
    for size in (2, 3, 8, 64):
        one_hot = np.eye(size)[:1] * 1e6
        for rewards in (one_hot, rng.normal(size=(50, size)), rng.integers(0, 2, (50, size)) * 1.0):
            found = np.abs(group_advantages(rewards)).max()
            bound = min(10.0, (size - 1) / size**0.5)
            tries += 1
            num_held += bool(found <= bound * (1 + 1e-9))
            largest = max(largest, found / bound)
    record("F27", tries, num_held, f"largest advantage {largest:.6f} of the bound, equal groups exactly 0")


FLIPS = [(kind, rank) for kind in ("flip weight", "flip moment") for rank in (0, 1)]


@pytest.mark.parametrize(
    "chosen", [[("flip weight", 1)], pytest.param(FLIPS, marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F33_a_bit_flipped_in_memory(arena, record, chosen):
    """Seen before the next update: all ranks end with 77, rank and tensor are named, the last checkpoint is clean."""
    bad, noticed = [], []
    for kind, rank in chosen:
        run = arena.run()
        job = run.launch([Fault("trace"), Fault(kind, "rollout", rank, 5)])
        wrong = run.ended_with(job, CORRUPTED)
        noticed.append(run.trace(rank)[-1]["step"] - 5)
        named = f"rank {rank}" in run.exit_note()["reason"] and SECOND_PARAMETER in job.text(rank)
        wrong += [] if named else [f"not named: {job.text(rank)[-600:]}"]
        run.finish()
        wrong += arena.same(run)
        if wrong:
            bad.append((kind, rank, wrong))
    record(
        "F33",
        len(chosen),
        len(chosen) - len(bad),
        f"steps to detection {max(noticed)}" + (f"; wrong: {bad}" if bad else ""),
    )


def test_F41_too_little_memory(arena, record):
    """Fewer rows at once where memory runs out, counted; where one row is too many, one line and code 2."""
    results = {}
    for kind, metric in (("sample", "guards/oom_rollout"), ("train", "guards/oom_update")):
        run = arena.run(rollout_chunk_rows=12, micro_batch_tokens=512)
        run.finish(faults=[Fault(f"little memory to {kind}", value=2)])
        results[f"{kind} fewer rows"] = any(row.get(metric, 0) > 0 for row in run.metrics())
        run = arena.run()
        job = run.launch([Fault(f"little memory to {kind}", value=0)])
        results[f"{kind} not even one"] = not run.ended_with(job, 2) and "Traceback" not in job.text()
    bad = [name for name, good in results.items() if not good]
    record("F41", len(results), len(results) - len(bad), f"wrong: {bad}" if bad else ", ".join(results))


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_F41_no_more_memory_from_the_kernel(arena, record, rank):
    """From step 5 on the kernel gives one rank nothing more: it gets by without, or the job ends and says who.

    A thread that cannot be started may hang, so the watchdog is part of the promise; the C library may end the process
    itself, with words of its own. What was saved is intact.
    """
    run = arena.run(stall_timeout_s=TIMEOUT_S)
    job = run.launch([Fault("memory", "rollout", rank, 5)], kill_after_s=3.0)
    codes, output = job.wait(), job.text()
    named = f"STALL rank={rank} phase=" in output or f"error: rank {rank}, phase " in output
    named = named or ("cannot allocate memory" in output and f"error: rank {rank} is gone" in output)
    wrong = [] if set(codes) == {0} or named else [f"codes {codes}, not named: {output[-600:]}"]
    wrong += [] if run.valid() else ["nothing valid"]
    run.finish()
    halved = any(row.get("guards/oom_rollout", 0) + row.get("guards/oom_update", 0) > 0 for row in run.metrics())
    wrong += run.leftovers() + ([] if halved else arena.same(run))  # smaller pieces are summed in another order
    record(
        "F41", 1, int(not wrong), f"RLIMIT_AS on rank {rank}: codes {codes}" + (f"; wrong: {wrong}" if wrong else "")
    )
