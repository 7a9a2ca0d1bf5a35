"""kl_estimator k1_reward: the KL of each row by hand, rewards less beta times it, no KL in the loss, on any ranks."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.models import offload
from grpo.runtime.distributed import start
from grpo.training import policy as policy_module
from grpo.training.draws import Draws
from grpo.training.exchange import deliver
from grpo.training.kl_in_reward import put_kl_into_rewards
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.other_advantages import advantages_from
from grpo.training.scoring import Scored
from tests.support.launcher import fork_script, metrics_of, run_ranks
from tests.support.rank_jobs import config, injected, make_policy, table_of
from tests.support.tiny import save_tiny

RLOO = {"baseline": "leave_one_out", "scale_rewards": "none", "weighting": "dr_grpo"}
KL = {"beta": 0.04, "kl_estimator": "k1_reward", **RLOO}
ZERO3 = {"backend": "deepspeed", "zero_stage": 3}
LORA = {"lora_r": 4, "lr": 1e-2}


def drawn(cfg, policy, rewards=None, masked=True):
    """A step's groups, all rows sampled here; about a third of the tokens without loss, and all of row 4."""
    prompts, completions, advantages = injected(cfg, 0, masked=masked)
    lengths = np.array([len(one.token_ids) for one in completions])
    trained = np.array([np.count_nonzero(one.trained) for one in completions])
    table = table_of(cfg, lengths, np.zeros(len(completions)), trained)
    table = dataclasses.replace(table, rewards=advantages if rewards is None else rewards)
    draws = Draws(SimpleNamespace(cfg=cfg, world=start()), 0)
    draws.add(prompts, Scored(completions, [], np.zeros((0, 0)), np.zeros((0, 0)), len(completions)), table)
    tally = Tally()
    put_kl_into_rewards(draws, policy, tally)
    return draws, tally


@torch.no_grad()
def kl_by_hand(draws, model):
    """Each row alone, by the model's own forward: the sum over trained tokens of sampler - reference log-prob."""
    found = np.zeros(len(draws.table.rewards))
    for one in draws.scored.completions:
        prompt = draws.prompts[one.row // draws.cfg.num_generations].token_ids
        logits = model(torch.tensor([[*prompt, *one.token_ids.tolist()]])).logits[0]
        for t, (token, logprob, trained) in enumerate(
            zip(one.token_ids, one.sampler_logprobs, one.trained, strict=True)
        ):
            if trained:
                found[one.row] += logprob - float(logits[len(prompt) - 1 + t].log_softmax(-1)[int(token)])
    return found


def test_rewards_lose_beta_times_the_sum_over_the_row():
    cfg = config(**KL)
    policy = make_policy(cfg, start())
    draws, tally = drawn(cfg, policy)
    by_hand = kl_by_hand(draws, policy.reference.model)
    np.testing.assert_allclose(draws.kl_penalty, 0.04 * by_hand, atol=1e-6)
    assert by_hand[4] == by_hand[7] == 0.0 and abs(by_hand).max() > 1, "row 4 has no trained token, row 7 is empty"
    rewards = draws.table.grouped
    expected = advantages_from("leave_one_out", "none", rewards - 0.04 * by_hand.reshape(rewards.shape))
    np.testing.assert_allclose(draws.advantages(), expected.ravel(), atol=1e-6)
    assert np.abs(draws.advantages() - advantages_from("leave_one_out", "none", rewards).ravel()).max() > 1e-2
    metrics = tally.reduce(start()).metrics
    assert metrics["kl"] == pytest.approx(by_hand.sum() / draws.table.num_trained.sum())


def test_the_loss_has_no_kl_and_scores_no_reference(monkeypatch):
    cfg = config(**KL)
    policy = make_policy(cfg, start())
    draws, _ = drawn(cfg, policy)
    monkeypatch.setattr(policy.reference, "forward", lambda micro: pytest.fail("the reference was scored again"))
    advantages = np.where(np.arange(15) % 2, draws.advantages(), 0.0)
    plan = make_plan(cfg, draws.prompts, draws.table.lengths, advantages, 1, num_trained=draws.table.num_trained)
    assert all(advantages[row] for micro in plan[0].micro_batches for row in micro), (
        "rows without gradient are computed"
    )
    batches = deliver(policy.world, cfg, plan, draws.prompts, draws.scored.completions, draws.table, advantages)
    assert all(micro.ref_logprobs is None for micro in policy.annotate(batches)[0])
    with_k3 = make_plan(dataclasses.replace(cfg, kl_estimator="k3"), draws.prompts, draws.table.lengths, advantages, 1)
    assert len(with_k3[0].micro_batches) > len(plan[0].micro_batches)


@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_the_filter_sees_rewards_without_it(choice):
    """With it no group's rewards are ever all equal. The rows of dropped groups are not scored."""
    cfg = config(**KL, filter_groups=choice)
    rewards = np.arange(15.0) % 3
    rewards[3:6] = 1.0
    draws, tally = drawn(cfg, make_policy(cfg, start()), rewards, masked=False)
    assert draws.chosen == ([0, 2, 3, 4] if choice == "drop" else [0, 1, 2, 3, 4])
    assert bool(draws.kl_penalty[3:6].any()) == bool(draws.advantages()[3:6].any()) == (choice == "keep")
    assert draws.table.rewards.tolist() == rewards.tolist(), "the log shows rewards without it"
    counted = draws.table.num_trained.reshape(5, 3)[draws.chosen].sum()
    assert tally.reduce(start()).metrics["kl"] == pytest.approx(draws.kl_penalty.sum() / 0.04 / counted)


def test_a_reference_that_is_not_finite_skips_the_step():
    cfg = config(**KL)
    policy = make_policy(cfg, start())
    next(policy.reference.parameters()).data.fill_(float("nan"))
    draws, _ = drawn(cfg, policy)
    assert draws.table.any_broken


def test_an_offloaded_reference_is_moved_for_the_pass_and_memory_may_run_out(monkeypatch):
    cfg = config(**KL, reference_offload=True, micro_batch_tokens=200)
    policy, moved = make_policy(cfg, start()), []
    whole, _ = drawn(cfg, policy)

    def moving(model, device):
        moved.append(model)
        return offload.on_device(model, device)

    def crowded(micro, score=policy.reference.forward):
        if micro.input_ids.numel() > 60 and len(micro.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(micro)

    monkeypatch.setattr(policy_module, "on_device", moving)
    monkeypatch.setattr(policy.reference, "forward", crowded)
    halved, _ = drawn(cfg, policy)
    assert moved == [policy.reference] and policy.fitting.halvings > 0
    np.testing.assert_allclose(halved.kl_penalty, whole.kl_penalty, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl_estimator": "k1_reward"}, "kl_estimator: k1_reward needs beta > 0, got 0"),
        ({**KL, **RLOO, "normalize_each_reward": True}, "k1_reward is taken off the sum of the rewards"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        check(Config(model="m", data="d", rewards={"r": 1.0}, **settings))


# --- any number of ranks, any cut


JOBS = {
    1: {"start": {"steps": 0}, "KL": KL, "no KL": RLOO, "start LoRA": {"steps": 0, **LORA}, "LoRA": {**KL, **LORA}},
    2: {
        "KL": KL,
        "row by row": {**KL, "micro_batch_tokens": 1},
        "zero3": {**KL, **ZERO3},
        "zero3 LoRA": {**KL, **LORA, **ZERO3},
        "deterministic": {**KL, "deterministic": True},
    },
}
JOBS[1]["deterministic"] = JOBS[2]["deterministic"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(W, name) -> what each rank reported, and the final weights as one vector."""
    found = {}
    for world_size, jobs in JOBS.items():
        out = tmp_path_factory.mktemp(f"ranks_{world_size}")
        calls = [("injected_updates", {"name": name, "steps": 8, "masked": True, **how}) for name, how in jobs.items()]
        by_rank = run_ranks(calls, world_size, out, timeout=240)
        for i, name in enumerate(jobs):
            weights = load_file(out / f"{name}.safetensors")
            end = torch.cat([weights[key].flatten().double() for key in sorted(weights)])
            found[world_size, name] = ([rank[i] for rank in by_rank], end)
    return found


@pytest.mark.parametrize("name", ["KL", "row by row", "zero3", "zero3 LoRA"])
def test_any_number_of_ranks_and_any_cut(results, name):
    lora = name.endswith("LoRA")
    alone, begin = (results[1, one] for one in (("LoRA", "start LoRA") if lora else ("KL", "start")))
    several = results[2, name]
    way = (alone[1] - begin[1]).norm()
    assert float((alone[1] - several[1]).norm() / way) < 1e-3
    assert len({rank["sha256"] for rank in several[0]}) == 1
    assert several[0][0]["metrics"]["kl"] == pytest.approx(alone[0][0]["metrics"]["kl"], rel=1e-3)


def test_without_the_kl_the_end_is_another(results):
    """The control of the test above."""
    one, other, begin = (results[1, name][1] for name in ("KL", "no KL", "start"))
    assert float((one - other).norm() / (one - begin).norm()) > 1e-2
    assert "kl" not in results[1, "no KL"][0][0]["metrics"]


def test_deterministic_runs_are_bit_identical(results):
    assert torch.equal(results[1, "deterministic"][1], results[2, "deterministic"][1])


# --- a run


SETTINGS = """
model: base
data: d.jsonl
prompt_template: "{question}"
chat_template: false
algorithm: rloo
batch_size: 3
gradient_accumulation_steps: 1
num_generations: 4
max_prompt_length: 64
max_generate_length: 8
max_steps: 2
lr: 0.01
beta: 0.05
kl_estimator: k1_reward
filter_groups: resample
rewards: {"r.py:parity_reward": 1.0}
log_samples_steps: 0
report_to: none
num_threads: 1
"""
REWARD = "def parity_reward(completions, **columns):\n    return [len(text) % 2 for text in completions]\n"


@pytest.mark.parametrize("more", [(), ("--lora_r", "4"), ("--truncated", "mask")])
def test_a_run_draws_by_the_rewards_and_trains_with_the_kl(tmp_path, more):
    """On two ranks, in several rounds. The first step samples with the reference itself: its KL is 0 up to rounding."""
    save_tiny(tmp_path / "base")
    (tmp_path / "r.py").write_text(REWARD)
    rows = [json.dumps({"question": f"{n}+2?", "answer": str(n + 2)}) for n in range(9)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "t.yaml").write_text(SETTINGS)
    done = fork_script("train.py", "--config", "t.yaml", *more, nproc=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first, second = (metrics for metrics in metrics_of(tmp_path / "runs") if "loss" in metrics)
    assert first["groups/kept"] == 3
    if "mask" in more:  # this model never ends by itself: no token is trained
        assert first["completions/truncated"] == 1.0 and first["grad_norm"] == 0.0 and "kl" not in first
    else:
        assert abs(first["kl"]) < 1e-5 < abs(second["kl"]) and first["grad_norm"] > 0
