"""LoRA keeps the contract: the number of processes and the backend change the speed and nothing else.

As tests/training/test_invariance.py, for the adapter alone: 10 updates on injected rollouts end within 1e-3 of the
distance travelled, controls end above 1e-2; the reference is the same model with its adapter off, under ZeRO too.
"""

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.launcher import run_ranks
from tests.support.tiers import sampled, short
from tests.support.tiny import tiny_model

LORA = {"lora_r": 4, "lr": 3e-3}
STEPS = {"steps": 10}
ZERO = {f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage, **LORA} for stage in (2, 3)}
KL = {"weighting": "dr_grpo", "beta": 0.3}
UPDATES = {
    "ddp": LORA,
    **ZERO,
    "kl": {**LORA, **KL},
    "zero3 kl": {**ZERO["zero3"], **KL},
    "micro": {**LORA, "micro_batch_tokens": 1, "gradient_checkpointing": True},
    "deterministic": {**LORA, "deterministic": True},
}
BROKEN = {
    "denominator": {**LORA, "broken": "denominator"},
    "other data": {**LORA, "seed": 1},
    "moments ddp": {**LORA, "broken": "moments"},
    "moments zero2": {**ZERO["zero2"], "broken": "moments"},
    "moments zero3": {**ZERO["zero3"], "broken": "moments"},
}


BROKEN_SHORT = ["denominator", "other data", "moments ddp", *sampled(["moments zero2", "moments zero3"], seed=1)]
STAGE = sampled(ZERO, seed=2)  # of the rollouts and the flipped bits in the short tier; updates have both
UPDATES_SHORT = {*UPDATES} - {"zero3 kl"}


def jobs_of(world_size: int, full: bool = True) -> dict[tuple[str, str], tuple[str, dict]]:
    held = {"ddp": LORA, **{name: how for name, how in ZERO.items() if full or name in STAGE}}
    updates = {name: how for name, how in UPDATES.items() if full or name in UPDATES_SHORT}
    rollouts = held
    if world_size == 1:
        updates, rollouts = {name: UPDATES[name] for name in ("ddp", "kl", "deterministic")}, {"ddp": LORA}
    jobs = {
        ("update", name): ("injected_updates", {"name": f"update {name}", **STEPS, **how})
        for name, how in updates.items()
    }
    jobs |= {("rollout", name): ("free_rollout", how) for name, how in rollouts.items()}
    if world_size == 2:
        jobs |= {
            ("broken", n): ("injected_updates", {"name": f"broken {n}", **STEPS, **how})
            for n, how in BROKEN.items()
            if full or n in BROKEN_SHORT
        }
        jobs |= {("sealed", n): ("sealed_update", {"rank": 1, **how}) for n, how in held.items()}
    return jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("lora")
    full = request.config.getoption("--full")

    @functools.cache
    def of_world(world_size: int):
        out = folder / str(world_size)
        jobs = jobs_of(world_size, full)
        by_rank = run_ranks(list(jobs.values()), world_size, out, timeout=240)
        found = {}
        for i, (key, (_, how)) in enumerate(jobs.items()):
            file = out / f"{how.get('name')}.safetensors"
            found[key] = ([rank[i] for rank in by_rank], load_file(file) if file.exists() else None)
        return found

    return of_world


def change(weights):
    """What the adapter adds to each layer, B A, one after the other: zero at the start."""
    names = sorted(name for name in weights if ".lora_A." in name)
    return torch.cat([(weights[n.replace("lora_A", "lora_B")].double() @ weights[n].double()).ravel() for n in names])


def distance(a, b):
    return float((change(a) - change(b)).norm() / change(a).norm())


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", short(UPDATES, UPDATES_SHORT))
def test_updates_depend_on_neither_backend_nor_number_of_ranks(results, name, world_size):
    alone = results(1)["update", "kl" if "kl" in name else "ddp"][1]
    assert distance(alone, results(world_size)["update", name][1]) < 1e-3
    assert len({rank["sha256"] for rank in results(world_size)["update", name][0]}) == 1


@pytest.mark.parametrize("name", short(BROKEN, BROKEN_SHORT))
def test_controls_are_caught(results, name):
    assert distance(results(1)["update", "ddp"][1], results(2)["broken", name][1]) > 1e-2


def test_only_the_adapter_is_trained_and_the_reference_counts(results):
    weights = results(1)["update", "ddp"][1]
    modules = [n for n, m in tiny_model("qwen3").named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert sorted(weights) == sorted(f"{n}.lora_{which}.default.weight" for n in modules for which in "AB")
    dr_grpo = results(1)["update", "kl"]
    assert distance(weights, dr_grpo[1]) > 1e-2, "the KL term has no effect"
    assert dr_grpo[0][0]["metrics"]["kl"] > 0


@pytest.mark.parametrize("name", short(["kl", "zero3 kl"], UPDATES_SHORT))
def test_kl_is_measured_alike(results, name):
    one, two = (results(w)["update", n][0][0]["metrics"]["kl"] for w, n in ((1, "kl"), (2, name)))
    assert two == pytest.approx(one, rel=1e-3)


def test_deterministic_updates_are_bit_identical_and_plain_ones_are_not(results):
    sha256 = {(n, w): results(w)["update", n][0][0]["sha256"] for n in ("deterministic", "ddp") for w in (1, 2)}
    assert sha256["deterministic", 1] == sha256["deterministic", 2]
    assert sha256["ddp", 1] != sha256["ddp", 2], "nothing to fix: the test shows nothing"


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", short(["ddp", *ZERO], ["ddp", *STAGE]))
def test_a_trained_adapter_reaches_the_engine_and_gives_equal_tokens(results, name, world_size):
    reference = results(1)["rollout", "ddp"][0][0]
    merged = {k: v for rank in results(world_size)["rollout", name][0] for k, v in rank.items()}
    assert len(reference) == len(merged) == 15
    for sample, (ids, logprobs, finish) in reference.items():
        assert (ids, finish) == (merged[sample][0], merged[sample][2])
        np.testing.assert_allclose(logprobs, merged[sample][1], atol=1e-4)


@pytest.mark.parametrize("name", short(["ddp", *ZERO], ["ddp", *STAGE]))
def test_a_flipped_bit_is_found_in_the_frozen_model_too(results, name):
    first, second = results(2)["sealed", name][0]
    assert first["untouched"] is first["other"] is second["untouched"] is second["other"] is None
    assert first["found"] == {} and second["found"] == {flipped: flipped for flipped in second["found"]}
    assert any("base_layer" in flipped for flipped in second["found"])
    assert any("lora_A" in flipped or "exp_avg" in flipped for flipped in second["found"])
