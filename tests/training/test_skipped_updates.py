"""Numbers that are not finite: all ranks skip the update, count it, keep evidence, and stop after too many in a row."""

import json

import numpy as np
import pytest
import torch

from grpo.errors import Diverged
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.runtime.distributed import World
from grpo.training.metrics import Tally
from grpo.training.rollout_metrics import rollout_metrics
from grpo.training.skipped_updates import count_skip
from grpo.types import FACTS, Counters, Table
from tests.support.launcher import fork_script, metrics_of
from tests.support.rank_jobs import config, injected_step, make_policy
from tests.support.tiny import save_tiny, tiny_model

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_the_norm_after_clipping_is_at_most_the_limit():
    cfg = config(max_grad_norm=0.05)
    policy = make_policy(cfg, ALONE)
    seen = []
    true_step = policy.backend.optimizer.step

    def step():
        seen.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in policy.model.parameters()]))))
        true_step()

    policy.backend.optimizer.step = step
    norms = injected_step(cfg, ALONE, policy, 0, 1, 0, Tally())
    assert norms[0] > 0.05 and seen[0] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_weight_is_met_by_a_skip_and_a_count(poison):
    cfg = config()
    policy = make_policy(cfg, ALONE)
    with torch.no_grad():
        next(policy.model.parameters())[3, 0] = poison
    norms = injected_step(cfg, ALONE, policy, 0, 1, 0, Tally())
    assert norms == [] and policy.counters.skipped_updates == 1 and policy.counters.updates == 0
    assert list(policy.backend.moments()) == []


def test_k_in_a_row_stop_the_run_and_a_good_one_resets_the_count():
    counters = Counters()
    count_skip(counters, 3)
    count_skip(counters, 3)
    with pytest.raises(Diverged) as caught:
        count_skip(counters, 3)
    assert caught.value.code == 76 and counters.skipped_updates == 3


def test_rollout_marks_rows_with_broken_logits():
    """The rows that meet NaN end as errors; the others are as they would be without them."""
    model = tiny_model("qwen3", spread=2.0)
    requests = [Request(0, 0, 0, (5, 6)), Request(1, 1, 0, (7, 8))]
    clean = NativeEngine(model, [0], 6, 1).generate(requests, Sampling())
    engine = NativeEngine(model, [0], 6, 1)
    plain = engine.head.logits

    def logits(hidden):
        made = plain(hidden)
        made[1 if len(hidden) == 2 else slice(0, 0)] = float("nan")
        return made

    engine.head.logits = logits
    fine, broken = engine.generate(requests, Sampling())
    assert broken.finish == "error" and len(broken.token_ids) == 0
    assert fine.finish != "error" and fine.token_ids.tolist() == clean[0].token_ids.tolist()


def test_metrics_never_average_what_is_not_finite():
    tally = Tally()
    tally.mean("kl", float("nan"), 3)
    tally.mean("kl", 2.0, 4)
    tally.top("ratio_gap", float("inf"))
    tally.add("loss", float("nan"))
    reduced = tally.reduce(ALONE).metrics
    assert reduced["kl"] == 0.5 and reduced["ratio_gap"] == 0.0 and reduced["loss"] == 0.0
    assert "clip/low" not in reduced, "a mean of nothing is not 0"


def test_rollout_metrics_by_hand():
    facts = {name: np.zeros(4) for name in FACTS} | {
        "length": np.array([2.0, 4.0, 2.0, 0.0]),
        "trained": np.array([2.0, 4.0, 2.0, 0.0]),
        "stopped": np.array([1.0, 1.0, 0.0, 0.0]),
        "broken": np.array([0.0, 0.0, 0.0, 1.0]),
        "logprob_sum": np.array([-2.0, -4.0, -2.0, 0.0]),
        "entropy_sum": np.array([1.0, 6.0, 1.0, 4.0]),
        "clamped": np.array([8.0, 0.0, 0.0, 0.0]),
    }
    scores = np.array([[1.0], [0.0], [2.0], [np.nan]])
    table = Table(["my.py:f"], scores, scores[:, 0], facts, 2)
    metrics = rollout_metrics(table, np.array([1.0, -1.0, 0.0, 0.0]), vocab_size=10)
    wanted = {
        "reward/mean": 1.0,
        "reward/f/mean": 1.0,
        "reward/zero_std_groups": 0.5,
        "completions/length_mean": 2.0,
        "completions/truncated": 0.25,
        "completions/broken": 1.0,
        "entropy": 1.0,
        "entropy/true": 1.5,
        "guards/clamped_logits": 0.1,
        "advantage/abs_mean": 0.5,
    }
    assert {key: metrics[key] for key in wanted} == pytest.approx(wanted)


def test_a_run_whose_weights_break_stops_with_its_own_code_and_keeps_the_evidence(tmp_path):
    """NaN in the base model's weights, through the script on two ranks: skip, skip, stop; exit.json says 76."""
    folder = save_tiny(tmp_path / "model", spread=1.0)
    model = tiny_model("qwen3", 300, spread=1.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    model.save_pretrained(folder)
    done = fork_script(
        "train.py",
        "--config",
        "configs/demo.yaml",
        "--model",
        str(folder),
        "--eval_data",
        "null",
        "--max_bad_steps",
        "2",
        "--output_dir",
        str(tmp_path / "output"),
        "--runs_dir",
        str(tmp_path / "runs"),
        "--max_generate_length",
        "8",
        nproc=2,
    )
    assert done.returncode != 0 and "2 updates in a row met NaN" in done.stderr
    assert json.loads((tmp_path / "output" / "exit.json").read_text())["code"] == 76
    assert sorted(p.name for p in (tmp_path / "output" / "anomalies").iterdir()) == ["step_1", "step_2"]
    assert [row["guards/skipped_updates"] for row in metrics_of(tmp_path / "runs")] == [1.0]
    assert metrics_of(tmp_path / "runs")[0]["completions/broken"] == 64
