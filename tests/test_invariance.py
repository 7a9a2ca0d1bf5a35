"""The number of processes changes the speed and nothing else.

(a) equal weights give equal tokens; (b) 20 updates on injected rollouts end within 1e-3 of the distance
travelled, while broken controls end above 1e-2. P·G = 15 rows divide by no W here, groups straddle ranks,
one completion is empty, a third of the advantages is zero.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.launcher import run_ranks
from tests.tiny import ARCHITECTURES, tiny_model

UPDATES = [
    {"name": "grpo"},
    {"name": "dapo", "loss": "dapo"},
    {"name": "dr_grpo_kl", "loss": "dr_grpo", "beta": 0.04},
    {"name": "two passes", "num_iterations": 2, "num_minibatches": 2, "steps": 5},
    {"name": "accumulated", "batch_size": 1, "gradient_accumulation_steps": 5},
    {"name": "micro", "micro_batch_tokens": 1},
    {"name": "chunks", "rollout_chunk_rows": 2},
]
BROKEN = [
    {"name": "broken denominator", "broken": "denominator"},
    {"name": "broken moments", "broken": "moments"},
    {"name": "broken seed", "seed": 1},
]


def flat(weights):
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every update run on 1, 2 and 3 ranks, one launch each; controls on 2."""
    folder = tmp_path_factory.mktemp("invariance")
    results = {}
    for world_size in (1, 2, 3):
        calls = UPDATES + (BROKEN if world_size == 2 else [])
        out = folder / str(world_size)
        by_rank = run_ranks("injected_updates", world_size, out, calls=calls)
        for i, call in enumerate(calls):
            hashes = {rank[i]["sha256"] for rank in by_rank}
            results[world_size, call["name"]] = (
                flat(load_file(out / f"{call['name']}.safetensors")),
                hashes,
                by_rank[0][i],
            )
    return results


START = flat({name: p.detach() for name, p in tiny_model("qwen3", 300, spread=2.0).named_parameters()})


def distance(a, b):
    """How far two ends are apart, as a share of the way travelled."""
    return float((a - b).norm() / (a - START).norm())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", [call["name"] for call in UPDATES])
def test_updates_do_not_depend_on_the_number_of_ranks(runs, name, world_size):
    assert distance(runs[1, name][0], runs[world_size, name][0]) < 1e-3


def test_every_rank_ends_with_the_same_weights(runs):
    assert all(len(hashes) == 1 for _, hashes, _ in runs.values())


@pytest.mark.parametrize("name", ["accumulated", "micro", "chunks"])
def test_batching_changes_memory_and_speed_only(runs, name):
    assert distance(runs[1, "grpo"][0], runs[2, name][0]) < 1e-3


@pytest.mark.parametrize("name", [call["name"] for call in BROKEN])
def test_controls_are_caught(runs, name):
    assert distance(runs[1, "grpo"][0], runs[2, name][0]) > 1e-2


def test_metrics_do_not_depend_on_the_number_of_ranks(runs):
    for name in ("grpo", "dr_grpo_kl"):
        one, three = runs[1, name][2]["metrics"], runs[3, name][2]["metrics"]
        for key in one:
            if not key.startswith("time/"):
                assert three[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def test_equal_weights_give_equal_tokens(tmp_path):
    """With and without truncation; another seed, the control, gives other tokens."""
    calls = [{}, {"top_p": 0.8, "temperature": 0.9}, {"seed": 43}]
    by_world = {}
    for world_size in (1, 2, 3):
        ranks = run_ranks("free_rollout", world_size, tmp_path / str(world_size), calls=calls)
        by_world[world_size] = [{k: v for rank in ranks for k, v in rank[i].items()} for i in range(len(calls))]
    for i in range(len(calls)):
        assert len(by_world[1][i]) == 15
        for world_size in (2, 3):
            for sample, (ids, logprobs, finish) in by_world[1][i].items():
                other_ids, other_logprobs, other_finish = by_world[world_size][i][sample]
                assert (ids, finish) == (other_ids, other_finish)
                np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-5)
    assert by_world[1][0] != by_world[1][2]


def test_collectives(tmp_path):
    for rank, seen in enumerate(run_ranks("collectives", 3, tmp_path)):
        assert seen["sum"] == [[0.5, -1.0], [1.5, 1.0], [2.5, 1.0]]
        assert seen["gather"] == [[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]
        assert seen["any"] == [True, False]
        assert seen["incoming"] == [[100 * source + i for i in range(source + rank)] for source in range(3)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_on_one_rank_skips_the_update_on_all(tmp_path, rank):
    ranks = run_ranks("poisoned_update", 2, tmp_path, rank=rank)
    for seen in ranks:
        assert seen["before"] == seen["after"] and seen["moments_same"], "a skipped update left traces"
        assert seen["norms"] == [] and seen["skipped"] == 1
        assert seen["in_a_row"] == 0 and seen["later"] != seen["after"], "training did not go on"
    assert ranks[0]["later"] == ranks[1]["later"]


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    """Two free-running steps of every architecture, on 1 and on 2 ranks; bf16 with a tiny rate beside them."""
    folder = tmp_path_factory.mktemp("architectures")
    calls = [{"architecture": name, "temperature": 0.8, "top_p": 0.9, "num_iterations": 2} for name in ARCHITECTURES]
    calls += [
        {"architecture": "qwen3", "dtype": "bf16", "lr": 1e-6},
        {"architecture": "llama", "gradient_checkpointing": True},
        {"architecture": "llama"},
    ]
    return {w: run_ranks("architecture_steps", w, folder / str(w), calls=calls) for w in (1, 2)}, folder


@pytest.mark.parametrize("i", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_every_architecture_trains_alike_on_one_and_two_ranks(architectures, i):
    """Truncated sampling, temperature, two passes: the same tokens, finite norms, and the gap stays small."""
    runs, _ = architectures
    one, two = runs[1][0][i], [runs[2][rank][i] for rank in range(2)]
    assert one["sampled"] == two[0]["sampled"] | two[1]["sampled"]
    assert two[0]["sha256"] == two[1]["sha256"]
    assert len(one["norms"]) == 4 and all(0 < norm < 1e4 for norm in one["norms"])
    np.testing.assert_allclose(one["norms"], two[0]["norms"], rtol=1e-3)
    assert one["metrics"]["ratio_gap"] <= 1e-5
    assert one["metrics"]["kl_old"] > 0, "the second pass met the same policy: nothing was updated in between"


def test_bf16_moves_fp32_weights_by_tiny_steps(architectures):
    """lr 1e-6: about two steps of 1e-6. The control: in bf16 such a weight would not move at all."""
    run = architectures[0][1][0][len(ARCHITECTURES)]
    assert run["dtypes"] == ["torch.float32"]
    assert all(1e-6 < moved < 3e-6 for name, moved in run["moved"].items() if "embed" not in name)
    weight = torch.tensor(0.1, dtype=torch.bfloat16)
    assert weight + 2e-6 == weight
    assert run["metrics"]["sampler_gap/max"] > 1e-4, "bf16 arithmetic left no trace"


def test_gradient_checkpointing_changes_nothing_but_memory(architectures):
    runs = architectures[0][1][0]
    np.testing.assert_allclose(runs[-1]["norms"], runs[-2]["norms"], rtol=1e-5)
