"""Gradients are sent during the backward: the same sum, in the same order on every rank."""

import json

import pytest
import torch

from tests.support.bucket_jobs import CASES
from tests.support.launcher import fork_script


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks, from one launch."""
    out = tmp_path_factory.mktemp("buckets")
    done = fork_script("tests/support/bucket_jobs.py", str(out), nproc=2, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def sent(events):
    return [event for event in events if event.startswith("sent")]


@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_each_parameters_own_sum_over_ranks_bit_by_bit(ranks, name):
    for rank in ranks:
        assert rank[name]["wrong"] == [] and rank[name]["parameters"] > 5


@pytest.mark.parametrize("name", CASES)
def test_every_rank_sends_every_bucket_once_in_one_order(ranks, name):
    for rank in ranks:
        assert len(rank[name]["buckets"]) > 1
        assert sent(rank[name]["events"]) == [f"sent {size}" for size in rank[name]["buckets"]]


@pytest.mark.parametrize("name", ["equal work", "unequal work", "checkpointing", "adapter"])
def test_the_first_bucket_is_sent_in_the_last_backward_before_its_last_gradients(ranks, name):
    for rank in ranks:
        events = rank[name]["events"]
        first = events.index(sent(events)[0])
        last_backward = len(events) - 1 - events[::-1].index("backward")
        assert last_backward < first, "a gradient was sent before it was complete"
        assert events[first:].count("added") > rank[name]["parameters"] / 4, "all waited for the end"
        assert events[last_backward:].count("added") == rank[name]["parameters"], "added once, tied ones too"


def test_a_rank_without_work_and_one_whose_order_differs_wait_for_the_order(ranks):
    idle, strange = ranks[1]["no work"]["events"], ranks[1]["other order"]["events"]
    assert idle[0] == "step" and "added" not in idle
    assert not sent(strange[: strange.index("step")]), "the one parameter of its last backward is in the last bucket"


def test_memory_that_runs_out_when_some_buckets_were_sent_changes_only_rounding(ranks):
    first, second = ranks[0]["crowded"], ranks[1]["crowded"]
    assert first["failures"] == [] and second["failures"] and min(second["failures"]) >= 1, "no bucket had been sent"
    assert second["halvings"] == len(second["failures"]) and first["halvings"] == 0
    assert first["sha256"] == second["sha256"]
    assert second["twice"] == [], "gradients that were sent were allocated again"
    for one, other in zip(first["sent"], second["sent"], strict=True):
        assert sent(one) == sent(other) == sent(ranks[0]["roomy"]["sent"][0]), "as many collectives as ever"
    ended, roomy, begun = (torch.tensor(w) for w in (first["weights"], ranks[0]["roomy"]["weights"], first["begun"]))
    assert (ended - roomy).norm() / (roomy - begun).norm() < 1e-3, "of the distance travelled"
    assert first["loss"] == pytest.approx(ranks[0]["roomy"]["loss"], abs=1e-6)


def test_a_bad_loss_on_one_rank_reaches_all_through_every_bucket(ranks):
    for rank in ranks:
        seen = rank["poisoned"]
        assert seen["before"] == seen["after"] and seen["moments_same"] and seen["skipped"] == 1
    assert ranks[0]["poisoned"]["later"] == ranks[1]["poisoned"]["later"] != ranks[0]["poisoned"]["after"]
