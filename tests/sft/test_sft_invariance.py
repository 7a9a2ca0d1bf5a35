"""The supervised stage gives the same weights for any number of processes and any backend, packed or not.

20 updates on random texts end within 1e-3 of the distance travelled, while broken controls end above 1e-2. P = 7
texts divide by no W here. All jobs of one W share a launch: this file is also the script that the ranks run.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.config.settings import Config
from grpo.data.questions import Questions
from grpo.runtime.distributed import World, start, stop
from grpo.sft import policy as sft_policy
from grpo.sft.policy import SftPolicy, sft_batches
from grpo.sft.texts import SftTexts
from grpo.training.metrics import Tally
from grpo.types import Prompt, TrainRow
from tests.support.launcher import fork_script
from tests.support.tiny import tiny_model

VOCAB, STEPS, TEXTS = 300, 20, 7
WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.full)]
ZERO = {f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)}
SHORT = {
    "ddp": {},
    "packed": {"packing": True},
    "zero3 packed": {**ZERO["zero3"], "packing": True},
    "deterministic": {"deterministic": True, "packing": True},
}
LONG = {**SHORT, **ZERO, "micro": {"micro_batch_tokens": 1}, "whole": {"loss_on": "all"}}
BROKEN = {
    "denominator": {"broken": "denominator"},
    "mixed": {"packing": True, "broken": "mixed"},
    "other texts": {"seed": 1},
}


def config(packing: bool = False, loss_on: str = "completion", **settings) -> Config:
    """Small shapes: rows of up to 40 tokens, micro-batches of up to 64."""
    sft = {
        "solution_column": "answer",
        "solution_template": None,
        "solution_remove": [],
        "loss_on": loss_on,
        "packing": packing,
    }
    defaults = dict(
        model="tiny",
        data="none",
        batch_size=TEXTS,
        gradient_accumulation_steps=1,
        lr=1e-3,
        micro_batch_tokens=64,
        max_prompt_length=20,
        max_generate_length=20,
        sft=sft,
    )
    return Config(**{**defaults, **settings})


def texts(step: int, seed: int, count: int = TEXTS, whole: bool = False) -> list[TrainRow]:
    """The texts of a step, the same on every rank: prompts of 1 to 16 tokens, completions of 1 to 16."""
    rng = np.random.default_rng([seed, step])
    draw = lambda: rng.integers(1, VOCAB, rng.integers(1, 17))  # noqa: E731
    pairs = [(draw(), draw().astype(np.int32)) for _ in range(count)]
    prompts = [Prompt(n, "", tuple(prompt_ids.tolist()), {}) for n, (prompt_ids, _) in enumerate(pairs)]
    return SftTexts(Questions(prompts, 0), [solution for _, solution in pairs], whole).all()


def updates(world: World, out: Path, name: str, seed: int = 0, broken: str = "", **settings):
    """Teach; rank 0 saves the weights. `broken` names a deliberate defect, for controls."""
    cfg = config(**settings)
    policy = SftPolicy(cfg, world, tiny_model("qwen3", VOCAB, spread=2.0).to(world.device))
    whole = settings.get("loss_on") == "all"
    tally, norms, true_collate = Tally(), [], sft_policy.collate_packs
    if broken == "denominator":  # each micro-batch weighs by its own tokens, not by the whole step's
        tokens = lambda packs: sum(len(row.token_ids) for texts in packs for row in texts)  # noqa: E731
        sft_policy.collate_packs = lambda n, packs, weight, device: true_collate(n, packs, 1 / tokens(packs), device)
    for step in range(STEPS):
        batches = sft_batches(cfg, world, texts(step, seed, whole=whole), policy.even_block)
        if broken == "mixed":
            batches = [dataclasses.replace(micro, position_ids=None) for micro in batches]
        norms += policy.train_on([batches], tally, STEPS, False, on_skip=lambda *_: None)
    sft_policy.collate_packs = true_collate  # the defect ends here: more jobs follow
    measured = policy.measure(texts(99, 0, count=5))
    weights = {key: value.contiguous().clone() for key, value in policy.weights()}
    if world.is_main:
        save_file(weights, out / f"{name}.safetensors")
    total = sum(float(value.double().sum()) for value in weights.values())
    return {"total": total, "norms": norms, "measured": measured, "metrics": tally.reduce(world).metrics}


def jobs_of(world_size: int, long: bool) -> dict[str, dict]:
    """Settings of all jobs of one launch, by name."""
    jobs = dict(LONG if long else SHORT)
    if world_size == 2:
        jobs |= {f"broken {name}": how for name, how in BROKEN.items()}
    return jobs


def main() -> None:
    """One rank: all jobs, then what came out as JSON."""
    out = Path(sys.argv[1])
    world = start("cpu", num_threads=1)
    results = {
        name: updates(world, out, name, **how) for name, how in json.loads((out / "jobs.json").read_text()).items()
    }
    (out / f"rank_{world.rank}.json").write_text(json.dumps(results))
    stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """results(W)[name]: what each rank reported, and the final weights."""
    folder = tmp_path_factory.mktemp("sft")
    long = request.config.getoption("--full")

    @functools.cache
    def of_world(world_size: int):
        out = folder / str(world_size)
        out.mkdir()
        jobs = jobs_of(world_size, long)
        (out / "jobs.json").write_text(json.dumps(jobs))
        done = fork_script("tests/sft/test_sft_invariance.py", str(out), nproc=world_size, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        ranks = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(world_size)]
        return {name: ([rank[name] for rank in ranks], flat(load_file(out / f"{name}.safetensors"))) for name in jobs}

    return of_world


def flat(weights):
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


@functools.cache
def beginning():
    return flat({name: p.detach() for name, p in tiny_model("qwen3", VOCAB, spread=2.0).named_parameters()})


def distance(a, b):
    """How far two ends are apart, as a share of the way travelled."""
    return float((a - b).norm() / (a - beginning()).norm())


def cases():
    """The long tier's are marked."""
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in LONG]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", cases())
def test_weights_depend_on_neither_backend_nor_packing_nor_number_of_ranks(results, name, world_size):
    reference = results(1)["whole" if name == "whole" else "ddp"][1]
    assert distance(reference, results(world_size)[name][1]) < 1e-3
    if name == "whole":
        assert distance(results(1)["ddp"][1], reference) > 1e-2, "loss_on has no effect"


@pytest.mark.parametrize("name", BROKEN)
def test_controls_are_caught(results, name):
    assert distance(results(1)["ddp"][1], results(2)[f"broken {name}"][1]) > 1e-2


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_deterministic_is_bit_identical_packed_as_well(results, world_size):
    """And without it (the control) bits differ: packing another row is another sum."""
    one, several = results(1)["deterministic"], results(world_size)["deterministic"]
    assert torch.equal(one[1], several[1])
    assert not torch.equal(one[1], results(1)["ddp"][1])


@pytest.mark.parametrize("world_size", WORLDS[1:])
@pytest.mark.parametrize("name", ["ddp", "packed", "zero3 packed"])
def test_metrics_and_held_out_loss_do_not_depend_on_the_number_of_ranks(results, name, world_size):
    [one], several = results(1)[name][0], results(world_size)[name][0]
    for result in several:
        assert result["measured"] == pytest.approx(one["measured"], rel=1e-3)
        for key in ("loss", "sft/token_accuracy"):
            assert result["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3, abs=1e-5)
        assert result["total"] == several[0]["total"], "ranks end with different weights"
    assert len(one["norms"]) == STEPS and all(norm > 0 for norm in one["norms"])


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed allocates gigabytes it never reads
    main()
