"""The number of processes and the backend change the speed and nothing else.

(a) equal weights give equal tokens; (b) 20 updates on injected rollouts end within 1e-3 of the distance
travelled, while broken controls end above 1e-2; (c) deterministic mode, free-running, is bit-identical.
P·G = 15 rows divide by no W here, groups straddle ranks, one completion is empty, a quarter of the advantages
is zero. All jobs of one W share a launch. The short tier has every backend on two ranks, and samples of the rest.
"""

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.launcher import run_ranks
from tests.support.tiers import sampled, short
from tests.support.tiny import ARCHITECTURES, tiny_model

WORLDS = [1, 2, 3, 4]
ZERO = {f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)}
BACKENDS = {"ddp": {}, **ZERO}
VARIANTS = {
    "dapo": {"weighting": "dapo"},
    "masked tokens": {"masked": True},
    "dr_grpo with KL": {"weighting": "dr_grpo", "beta": 0.04},
    "two passes": {"num_iterations": 2, "num_minibatches": 2, "steps": 5},
    "gspo": {"ratio": "sequence", "num_iterations": 2, "num_minibatches": 2, "steps": 5},
    "cispo": {"surrogate": "cispo", "weighting": "dapo", "num_iterations": 2, "num_minibatches": 2, "steps": 5},
    "sapo with KL": {
        "surrogate": "sapo",
        "beta": 0.04,
        "kl_estimator": "k3_weighted",
        "num_iterations": 2,
        "steps": 10,
    },
    "rows off policy": {"off_policy_threshold": 0.3, "num_iterations": 2, "steps": 10},
    "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 5},
    "micro": {"micro_batch_tokens": 1},
    "chunks": {"rollout_chunk_rows": 2},
    "deterministic": {"deterministic": True},
    "zero3 two passes": {**ZERO["zero3"], "num_iterations": 2, "num_minibatches": 2, "steps": 5},
    "zero3 dr_grpo with KL": {**ZERO["zero3"], "weighting": "dr_grpo", "beta": 0.04},
    "zero3 offloaded": {**ZERO["zero3"], "offload": "all"},
}
BROKEN = {
    "denominator": {"broken": "denominator"},
    "seed": {"seed": 1},
    **{f"moments {name}": {"broken": "moments", **how} for name, how in BACKENDS.items()},
}
UPDATES = BACKENDS | VARIANTS
ROLLOUTS = {**BACKENDS, "top_p": {"top_p": 0.8, "temperature": 0.9}, "another seed": {"seed": 43}}
STEPS = {name: {"architecture": name, "temperature": 0.8, "top_p": 0.9, "num_iterations": 2} for name in ARCHITECTURES}
STEPS |= {
    "bf16": {"architecture": "qwen3", "dtype": "bf16", "lr": 1e-6},
    "checkpointing": {"architecture": "llama", "gradient_checkpointing": True},
    "plain": {"architecture": "llama"},
}
BROKEN_SHORT = ["denominator", "seed", "moments ddp", *sampled([f"moments {name}" for name in ZERO], seed=5)]
ZERO3 = {name for name in VARIANTS if name.startswith("zero3")}
ELSEWHERE = {"accumulated", "micro", "chunks"}  # the short tier holds them against "ddp", not against one rank
UPDATES_SHORT: dict[int, set[str]] = {
    1: {"ddp", *VARIANTS} - ZERO3 - ELSEWHERE | {*sampled(ZERO, seed=1)},
    2: {*UPDATES} - ZERO3 | {*sampled(sorted(ZERO3), seed=2)},
    3: {"ddp", "dr_grpo with KL", "deterministic", *sampled(ZERO, seed=3)},
}
ROLLOUTS_SHORT: dict[int, set[str]] = {
    1: {"ddp", "top_p", "another seed"},
    2: {*ROLLOUTS},
    3: {"ddp", "top_p", *sampled(ZERO, seed=4)},
}
STEPS_SHORT = {"qwen3", *sampled(["qwen2", "llama", "gpt2"], seed=6), *sampled(["gemma2", "gemma3"], seed=7)}
FREE = {"architecture": "qwen3", "deterministic": True, "steps": 5, "beta": 0.02}
BALANCED = {"architecture": "qwen3_moe", "steps": 5, "router_aux_loss_coef": 0.5}  # mixtures of experts
COUNTED = {
    "plain": {},
    "other data": {"seed": 3},
    "accumulated": {"gradient_accumulation_steps": 4, "batch_size": 2},
    "many micro-batches": {"micro_batch_tokens": 1, "rollout_chunk_rows": 1},
    "zero3": ZERO["zero3"],
}


def pairs(names, worlds, chosen):
    """Names with numbers of ranks, as parameters; `chosen` has those of the short tier."""
    cases = [(name, world_size) for world_size in worlds for name in names]
    return short(cases, [(name, world_size) for world_size in chosen for name in chosen[world_size]])


def jobs_of(world_size: int, full: bool = True) -> dict[tuple[str, str], tuple[str, dict]]:
    """All jobs of one launch, by (kind, name)."""
    updates = UPDATES if full else {name: UPDATES[name] for name in UPDATES if name in UPDATES_SHORT[world_size]}
    rollouts = ROLLOUTS if full else {name: ROLLOUTS[name] for name in ROLLOUTS if name in ROLLOUTS_SHORT[world_size]}
    steps = {name: how for name, how in STEPS.items() if full or name not in ARCHITECTURES or name in STEPS_SHORT}
    jobs = {("update", name): ("injected_updates", {"name": f"update {name}", **how}) for name, how in updates.items()}
    jobs |= {("rollout", name): ("free_rollout", how) for name, how in rollouts.items()}
    jobs["free", "deterministic"] = ("architecture_steps", FREE)
    refilled = {**FREE, "rollout_chunk_rows": 9, "rollout_tokens": 64}  # rows join while others decode
    jobs["free", "deterministic, refilled"] = ("architecture_steps", refilled)
    if world_size <= 2:
        jobs |= {("step", name): ("architecture_steps", how) for name, how in steps.items()}
        cut = {"micro_batch_tokens": 1} if world_size == 2 else {}
        for name, how in {"balanced": cut, "unbalanced": {**cut, "router_aux_loss_coef": 0.0}}.items():
            jobs["experts", name] = ("injected_updates", {"name": name, **BALANCED, **how})
    if world_size == 2:
        jobs |= {
            ("broken", name): ("injected_updates", {"name": f"broken {n}", **how})
            for n, (name, how) in enumerate(BROKEN.items())
            if full or name in BROKEN_SHORT
        }
        for backend, how in {**BACKENDS, "deterministic": {"deterministic": True}}.items():
            for rank in (0, 1):
                jobs["poison", f"{backend}, rank {rank}"] = ("poisoned_update", {"rank": rank, **how})
        jobs |= {("sealed", name): ("sealed_update", {"rank": 1, **how}) for name, how in BACKENDS.items()}
        for where in ("loss", "backward"):
            for name, how in {"ddp": {}, "deterministic": {"deterministic": True}}.items():
                jobs["crowded", f"{name}, {where}"] = (
                    "crowded_updates",
                    {"name": f"crowded {name} {where}", "where": where, **how},
                )
        jobs |= {("count", name): ("counted_step", how) for name, how in COUNTED.items()}
    if world_size == 3:
        jobs["world", "methods"] = ("collectives", {})
    return jobs


@pytest.fixture(scope="session")
def results(tmp_path_factory, request):
    """results(W)[kind, name]: what each rank reported, and the final weights where a job saves them."""
    folder = tmp_path_factory.mktemp("invariance")
    full = request.config.getoption("--full")

    @functools.cache
    def of_world(world_size: int):
        out = folder / str(world_size)
        jobs = jobs_of(world_size, full)
        by_rank = run_ranks(list(jobs.values()), world_size, out, timeout=240)
        found = {}
        for i, (key, (_, how)) in enumerate(jobs.items()):
            file = out / f"{how.get('name')}.safetensors"
            found[key] = ([rank[i] for rank in by_rank], flat(load_file(file)) if file.exists() else None)
        return found

    return of_world


def flat(weights):
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


START = flat({name: p.detach() for name, p in tiny_model("qwen3", 300, spread=2.0).named_parameters()})


def distance(a, b):
    """How far two ends are apart, as a share of the way travelled."""
    return float((a - b).norm() / (a - START).norm())


# --- (a) tokens


@pytest.mark.parametrize(("name", "world_size"), pairs([*BACKENDS, "top_p"], WORLDS, ROLLOUTS_SHORT))
def test_equal_weights_give_equal_tokens(results, name, world_size):
    reference = results(1)["rollout", name if name == "top_p" else "ddp"][0][0]
    merged = {k: v for rank in results(world_size)["rollout", name][0] for k, v in rank.items()}
    assert len(reference) == len(merged) == 15
    for sample, (ids, logprobs, finish) in reference.items():
        assert (ids, finish) == (merged[sample][0], merged[sample][2])
        np.testing.assert_allclose(logprobs, merged[sample][1], atol=1e-5)


def test_another_seed_gives_other_tokens(results):
    assert results(1)["rollout", "ddp"][0] != results(1)["rollout", "another seed"][0]


# --- (b) updates


@pytest.mark.parametrize(("backend", "world_size"), pairs(BACKENDS, WORLDS, UPDATES_SHORT))
def test_updates_depend_on_neither_backend_nor_number_of_ranks(results, backend, world_size):
    assert distance(results(1)["update", "ddp"][1], results(world_size)["update", backend][1]) < 1e-3


@pytest.mark.parametrize(
    ("name", "world_size"),
    pairs(VARIANTS, WORLDS[1:], {size: UPDATES_SHORT[size] - ELSEWHERE for size in (2, 3)}),
)
def test_variants_do_not_depend_on_the_number_of_ranks(results, name, world_size):
    alone = results(1)["update", name.removeprefix("zero3 ") if name.removeprefix("zero3 ") in VARIANTS else "ddp"][1]
    if name in ("dapo", "dr_grpo with KL", "two passes"):
        assert distance(results(1)["update", "ddp"][1], alone) > 1e-2, "the variant has no effect"
    assert distance(alone, results(world_size)["update", name][1]) < 1e-3


@pytest.mark.parametrize("name", ["accumulated", "micro", "chunks", "deterministic"])
def test_batching_changes_memory_and_speed_only(results, name):
    assert distance(results(1)["update", "ddp"][1], results(2)["update", name][1]) < 1e-3


def test_the_balancing_loss_of_experts_depends_on_neither_micro_batches_nor_ranks(results):
    """One rank, and two with each row on its own. Controls: without the loss the end is another; the test sees 1e-3."""
    one, two = ({name: results(size)["experts", name] for name in ("balanced", "unbalanced")} for size in (1, 2))
    start = flat({name: p.detach() for name, p in tiny_model("qwen3_moe", 300, spread=2.0).named_parameters()})
    way = (one["balanced"][1] - start).norm()
    assert float((one["balanced"][1] - two["balanced"][1]).norm() / way) < 1e-3
    assert float((one["balanced"][1] - one["unbalanced"][1]).norm() / way) > 1e-2
    first, second = (found["balanced"][0][0]["metrics"]["router_aux"] for found in (one, two))
    assert first == pytest.approx(second, rel=1e-4) and 1 < first < 4
    assert "router_aux" not in one["unbalanced"][0][0]["metrics"]


@pytest.mark.parametrize("name", short(BROKEN, BROKEN_SHORT))
def test_controls_are_caught(results, name):
    assert distance(results(1)["update", "ddp"][1], results(2)["broken", name][1]) > 1e-2


@pytest.mark.parametrize("world_size", short(WORLDS, [1, 2, 3]))
def test_every_rank_ends_with_the_same_weights(results, world_size):
    for key, (ranks, _) in results(world_size).items():
        if key[0] == "update":
            assert len({rank["sha256"] for rank in ranks}) == 1, key


@pytest.mark.parametrize(
    ("name", "world_size"), pairs(["ddp", "dr_grpo with KL", "zero3 dr_grpo with KL"], WORLDS[1:], UPDATES_SHORT)
)
def test_metrics_do_not_depend_on_the_number_of_ranks(results, name, world_size):
    one = results(1)["update", name.removeprefix("zero3 ")][0][0]["metrics"]
    several = results(world_size)["update", name][0][0]["metrics"]
    keys = {key for key in one if not key.startswith(("time/", "idle/", "sampler/gap_"))}
    assert {key: several[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-3, abs=1e-5)
    shares = [key for key in one if key.startswith("sampler/gap_")]  # rounding moves single tokens over an edge
    assert [several[key] for key in shares] == pytest.approx([one[key] for key in shares], abs=5e-3) and len(
        shares
    ) == 5


# --- (c) bits


@pytest.mark.parametrize("name", ["deterministic", "deterministic, refilled"])
@pytest.mark.parametrize("world_size", short(WORLDS[1:], [2, 3]))
def test_deterministic_mode_is_bit_identical(results, world_size, name):
    """Free-running: sampling, rewards, KL and updates for five steps. Control: the sums of another mode differ."""
    one, several = results(1)["free", name][0], results(world_size)["free", name][0]
    assert {rank["sha256"] for rank in several} == {one[0]["sha256"]}
    assert one[0]["sampled"] == {k: v for rank in several for k, v in rank["sampled"].items()}
    assert all(norm > 0 for norm in one[0]["norms"]) and len(one[0]["norms"]) == 5


@pytest.mark.parametrize("world_size", short(WORLDS[1:], [2, 3]))
def test_deterministic_updates_are_bit_identical_and_plain_ones_are_not(results, world_size):
    def sha256(name, size):
        return results(size)["update", name][0][0]["sha256"]

    assert sha256("deterministic", 1) == sha256("deterministic", world_size)
    assert sha256("ddp", 1) != sha256("ddp", world_size), "nothing to fix: the test shows nothing"


# --- whole steps


@pytest.mark.parametrize("name", short(ARCHITECTURES, STEPS_SHORT))
def test_every_architecture_trains_alike_on_one_and_two_ranks(results, name):
    """Truncated sampling, temperature, two passes: the same tokens, finite norms, and the gap stays small."""
    one, two = results(1)["step", name][0][0], results(2)["step", name][0]
    assert one["sampled"] == two[0]["sampled"] | two[1]["sampled"]
    assert two[0]["sha256"] == two[1]["sha256"]
    assert len(one["norms"]) == 4 and all(0 < norm < 1e4 for norm in one["norms"])
    np.testing.assert_allclose(one["norms"], two[0]["norms"], rtol=1e-3)
    assert one["metrics"]["ratio_gap"] <= 1e-5
    assert one["metrics"]["kl_old"] > 0, "the second pass met the same policy: nothing was updated in between"


def test_bf16_moves_fp32_weights_by_tiny_steps(results):
    """lr 1e-6: about two steps of 1e-6. The control: in bf16 such a weight would not move at all."""
    run = results(1)["step", "bf16"][0][0]
    assert run["dtypes"] == ["torch.float32"]
    assert all(1e-6 < moved < 3e-6 for name, moved in run["moved"].items() if "embed" not in name)
    weight = torch.tensor(0.1, dtype=torch.bfloat16)
    assert weight + 2e-6 == weight
    assert run["metrics"]["sampler_gap/max"] > 1e-4, "bf16 arithmetic left no trace"


def test_gradient_checkpointing_changes_nothing_but_memory(results):
    run = results(1)
    np.testing.assert_allclose(
        run["step", "checkpointing"][0][0]["norms"], run["step", "plain"][0][0]["norms"], rtol=1e-5
    )


# --- guards and collectives


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("backend", [*BACKENDS, "deterministic"])
def test_a_nan_on_one_rank_skips_the_update_on_all(results, backend, rank):
    ranks = results(2)["poison", f"{backend}, rank {rank}"][0]
    for seen in ranks:
        assert seen["before"] == seen["after"] and seen["moments_same"], "a skipped update left traces"
        assert seen["norms"] == [] and seen["skipped"] == 1
        assert seen["in_a_row"] == 0 and seen["later"] != seen["after"], "training did not go on"
    assert ranks[0]["later"] == ranks[1]["later"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_is_found_by_the_rank_that_holds_it(results, backend):
    """Every tensor that a rank holds, weights and optimizer state; nothing else is taken for a flipped bit."""
    first, second = results(2)["sealed", backend][0]
    assert first["untouched"] is first["other"] is second["untouched"] is second["other"] is None
    assert first["found"] == {} and first["changed"] >= first["remembered"] - 1, "an update changes what is remembered"
    assert second["found"] == {name: name for name in second["found"]}
    words = " ".join(second["found"])
    assert len(second["found"]) >= 4 and "exp_avg" in words and "exp_avg_sq" in words


@pytest.mark.parametrize("where", ["loss", "backward"])
@pytest.mark.parametrize("mode", ["ddp", "deterministic"])
def test_out_of_memory_on_one_rank_changes_nothing_but_its_micro_batches(results, mode, where):
    """Halved and tried again, from the start of the update: same weights, same metrics, and the size is remembered."""
    (first, second), weights = results(2)["crowded", f"{mode}, {where}"]
    assert distance(results(1)["update", "ddp"][1], weights) < 1e-3
    assert first["halvings"] == 0 and 1 <= second["halvings"] <= 3 and second["size"] <= 32
    plain = results(2)["update", "ddp"][0][0]["metrics"]
    assert first["metrics"]["guards/oom_update"] > 0 == plain["guards/oom_update"]
    keys = {key for key in plain if not key.startswith(("time/", "idle/", "guards/oom"))}
    assert {k: first["metrics"][k] for k in keys} == pytest.approx({k: plain[k] for k in keys}, rel=1e-3, abs=1e-5)
    assert first["sha256"] == second["sha256"]


def test_collectives(results):
    for rank, seen in enumerate(results(3)["world", "methods"][0]):
        assert seen["sum"] == [[0.5, -1.0], [1.5, 1.0], [2.5, 1.0]]
        assert seen["gather"] == [[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]
        assert seen["any"] == [True, False]
        assert seen["incoming"] == [[100 * source + i for i in range(source + rank)] for source in range(3)]


@pytest.mark.parametrize("name", COUNTED)
def test_few_and_fixed_collectives(results, name):
    """Three a step beside the gradients': the table, the exchange, the metrics. No pickle."""
    for counts in results(2)["count", name][0]:
        ours = {key: count for key, count in counts.items() if key.startswith("distributed.")}
        assert ours == {"distributed.all_reduce": 1, "distributed.all_to_all_single": 1, "distributed.all_gather": 1}
        assert not any("object" in key for key in counts)
        if name != "zero3":
            assert counts["gradient_sums.all_reduce"] == 1, "one bucket of gradients for so small a model"
