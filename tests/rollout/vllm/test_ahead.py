"""`rollout_ahead: 1`: whole runs whose servers sample a step ahead, their weights, and what checkpoints keep of it.

The servers are stand-ins, of which equal requests get equal bits. Every ending is compared with that of a run that
nothing happened to; the model is random, so nothing is equal by chance.
"""

import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo.config.command_line import load_config
from grpo.errors import UserError
from grpo.rollout.sampling import sampling_of
from grpo.rollout.vllm.ahead import NAME, Ahead
from grpo.runtime.signals import Stopping
from grpo.types import Completion, Counters
from tests.faults.fault import Fault
from tests.rollout.vllm.asking import ALONE, Trainer
from tests.rollout.vllm.test_runs import ENV, STEPS, arena, asking, step_of_rollout, tokens_of  # noqa: F401

ROWS = 12  # of a step


def versions_of(server):
    """Let a server write down which transfer each step's requests were asked of: {step: number of the transfer}."""
    asked = {}

    def note(lines, given):
        if step := step_of_rollout(given):
            asked.setdefault(step, set()).add(int(given["version"].split("-")[1]))
        return lines

    server.change_lines = note
    return asked


def slow(lines, given):
    """Longer than an update takes."""
    for line in lines:
        time.sleep(0.05 if step_of_rollout(given) else 0.0)
        yield line


@pytest.mark.parametrize("world, number", [(1, 1), (2, 2)])
def test_a_step_is_sampled_by_the_weights_before_the_last_update(arena, stand_in, world, number):  # noqa: F811
    """The first two steps by those of the start; tokens on two ranks and servers are those of one."""
    servers = [stand_in() for _ in range(number)]
    asked = [versions_of(server) for server in servers]
    run = arena.run(world=world, **asking(*servers), rollout_ahead=1, eval_steps=0, save_steps=9)
    run.finish(env=ENV)
    # transfer k holds the weights after k - 1 updates; the last one is the evaluation's
    assert asked == [{1: {1}, 2: {1}, 3: {2}, 4: {3}, 5: {4}}] * number
    steps = [row for row in run.metrics() if "loss" in row]
    assert [row["rollout/updates_behind"] for row in steps] == [0, 1, 1, 1, 1]
    assert not any(row["guards/trust_sampler"] for row in steps)
    assert max(row["sampler_gap/max"] for row in steps[:1]) < 1e-4 < min(row["sampler_gap/mean"] for row in steps[1:])
    tokens = tokens_of(run)
    assert len(tokens) == STEPS * ROWS
    if world == 1:
        plain = arena.run(world=1, **asking(*servers), eval_steps=0)
        servers[0].behave()
        plain.finish(env=ENV)
        same = [
            step
            for step in range(1, STEPS + 1)
            if all(tokens[step, row] == tokens_of(plain)[step, row] for row in range(ROWS))
        ]
        assert same == [1]  # the control: by newer weights other tokens are drawn
    else:
        alone = arena.run(world=1, **asking(servers[0]), rollout_ahead=1, eval_steps=0, save_steps=9)
        servers[0].behave()
        servers[0].change_lines = slow  # weights must wait for what is sampled
        alone.finish(env=ENV)
        assert tokens_of(alone) == tokens


ENDS = [
    ("kill9", "update", 5, 2),
    ("term", "reward", 3, 9),
    ("kill9", "rollout", 3, 1),
    ("term", "rollout", 2, 9),
    ("term", "update", 4, 9),
]


@pytest.mark.parametrize("ends", [ENDS[:2], pytest.param(ENDS[2:], marks=pytest.mark.full)], ids=["sample", "others"])
def test_killed_and_asked_to_stop_it_goes_on_with_what_was_sampled_ahead(arena, stand_in, ends):  # noqa: F811
    """Signal, phase, step, save_steps; evaluations between: the same end to the bit."""
    servers = [stand_in(), stand_in()]
    ahead = dict(**asking(*servers), rollout_ahead=1)
    calm = arena.run(**ahead)
    calm.finish(env=ENV)
    for kind, phase, step, every in ends:
        for server in servers:
            server.behave()
        run = arena.run(**ahead, save_steps=every)
        job = run.launch([Fault(kind, phase, None, step)], env=ENV)
        if kind == "term":
            assert run.ended_with(job, 75) == []
        job.wait(60)
        done = {"rollout": step - 1, "reward": step - 1, "update": step}[phase] // every * every
        assert run.valid()[0] == (done if kind == "kill9" else step - (phase != "update")), (kind, phase, run.valid())
        for server in servers:
            server.behave()
        run.finish(env=ENV)
        assert run.ending().differences(calm.ending()) == [], (kind, phase)


def test_on_another_number_of_ranks_it_goes_on_with_what_was_sampled_ahead(arena, stand_in):  # noqa: F811
    """On one instead of two, and on two instead of one: the kept completions are those of all ranks."""
    servers = [stand_in(), stand_in()]
    ahead = dict(**asking(*servers), rollout_ahead=1)
    calm = arena.run(**ahead)
    calm.finish(env=ENV)
    for before, after in ((2, 1), (1, 2)):
        run = arena.run(**ahead)
        run.launch([Fault("kill9", "update", None, 3)], env=ENV, world=before).wait(60)
        assert run.valid()[0] == 2
        shutil.rmtree(run.seen / "rollouts")
        job = run.finish(env=ENV, world=after)
        assert "were not in the checkpoint" not in job.text()
        tokens = tokens_of(run)
        assert {step for step, _ in tokens} == {3, 4, 5}
        assert all(tokens[3, row] == tokens_of(calm)[3, row] for row in range(ROWS))


def test_asked_to_stop_it_waits_no_longer_than_a_save_allows(arena, stand_in):  # noqa: F811
    """A server that is slow: what it did not finish is sampled anew, and the finished step is saved in time."""
    server = stand_in()
    run = arena.run(world=1, **asking(server), rollout_ahead=1, eval_steps=0, save_steps=99, preempt_grace_s=3)

    def slow(lines, given):
        for place, line in enumerate(lines):
            if step_of_rollout(given) == 3 and place == 5:
                time.sleep(20)
            yield line

    server.change_lines = slow
    began = time.monotonic()
    job = run.launch([Fault("term", "update", None, 2)], env=ENV)
    assert run.ended_with(job, 75) == []
    assert run.valid() == [2] and time.monotonic() - began < 20
    kept = load_file(run.output / "checkpoint_2" / "trainer" / f"{NAME}.safetensors")
    assert len(kept["rows"]) == 5
    server.behave()
    assert "7 completions of the first step were not in the checkpoint" in run.finish(env=ENV).text()


def test_a_skipped_update_leaves_the_weights_and_the_step_goes_on(arena, stand_in):  # noqa: F811
    """The servers hold the version that was not changed: nothing is sent, and what was asked for is still collected."""
    server = stand_in()
    asked = versions_of(server)
    run = arena.run(world=1, **asking(server), rollout_ahead=1, eval_steps=0, save_steps=9)
    run.finish(faults=[Fault("nan loss", step=2)], env=ENV)
    assert asked == {1: {1}, 2: {1}, 3: {2}, 4: {2}, 5: {3}}
    steps = [row for row in run.metrics() if "loss" in row or "guards/skipped_updates" in row]
    assert [row["rollout/updates_behind"] for row in steps] == [0, 1, 0, 1, 1]


def test_what_a_lost_server_did_not_finish_is_sampled_anew(arena, stand_in):  # noqa: F811
    """It dies for good while it samples ahead: code 74, a checkpoint; the same command says so and goes on."""
    servers = [stand_in(), stand_in()]
    run = arena.run(world=1, **asking(*servers), rollout_ahead=1, rollout_timeout_s=2, eval_steps=0)

    def dying(lines, given):
        for place, line in enumerate(lines):
            if step_of_rollout(given) == 3 and place == 1:
                servers[0].die()
            yield line

    servers[0].change_lines = dying
    job = run.launch(env=ENV)
    assert run.ended_with(job, 74, timeout=90) == []
    assert f"{servers[0].url}: no answer for 2 s" in run.exit_note()["reason"]
    saved = run.valid()[0]
    kept = load_file(run.output / f"checkpoint_{saved}" / "trainer" / f"{NAME}.safetensors")
    assert 0 < len(kept["rows"]) < ROWS
    servers[0].behave()
    servers[0].revive(kept=False)
    job = run.finish(env=ENV)
    assert f"{ROWS - len(kept['rows'])} completions of the first step were not in the checkpoint" in job.text()
    tokens = tokens_of(run)
    assert len(tokens) == STEPS * ROWS


# --- what is read back from a checkpoint


@pytest.fixture
def pair(tiny_folder, stand_in):
    """An engine with a step on its way, and what a checkpoint would keep of it."""
    trainer = Trainer(
        tiny_folder,
        [stand_in()],
        rollout_ahead=1,
        top_p=0.9,
        max_support=8,
        batch_size=3,
        num_generations=3,
        gradient_accumulation_steps=1,
    )
    trainer.send()
    trainer.engine.begin(trainer.requests(), sampling_of(trainer.cfg))
    ahead = trainer.engine.ahead
    ahead.gather(Counters(drawn=10))
    return trainer, ahead.tensors()


def loaded(trainer, tensors):
    """Another process that reads them."""
    other = Ahead(trainer.cfg, ALONE, trainer.num_tokens, Stopping(trainer.problems.append))
    other.load(tensors)
    return other


def test_a_checkpoint_gives_back_every_completion(pair):
    trainer, tensors = pair
    assert tensors["rows"].shape == (9, 5) and tensors["support"].shape == (len(tensors["token_ids"]), 8)
    heard: list[Completion] = []
    found = loaded(trainer, tensors).take(trainer.requests(), 4, lambda: False, heard.extend)
    now = trainer.sample()
    assert sorted(one.row for one in heard) == list(range(9))
    for one in now:
        other = found[one.row]
        assert other.row == one.row and other.finish == one.finish
        for name in ("token_ids", "sampler_logprobs", "support", "trained"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name))


DAMAGES = {
    "another name": lambda t: {**t, "more": t["rows"]},
    "no support": lambda t: {name: tensor for name, tensor in t.items() if name != "support"},
    "another type": lambda t: {**t, "token_ids": t["token_ids"].long()},
    "fewer tokens": lambda t: {**t, "token_ids": t["token_ids"][:-1]},
    "fewer rows": lambda t: {**t, "rows": t["rows"][:-1]},
    "a token beyond the vocabulary": lambda t: {**t, "token_ids": t["token_ids"] + 10**6},
    "a negative token": lambda t: {**t, "token_ids": -1 - t["token_ids"]},
    "support beyond the vocabulary": lambda t: {**t, "support": t["support"] + 10**6},
    "a group member too many": lambda t: {**t, "rows": t["rows"] + torch.tensor([0, 9, 0, 0, 0])},
    "an unknown end": lambda t: {**t, "rows": t["rows"] + torch.tensor([0, 0, 9, 0, 0])},
    "a negative slot": lambda t: {**t, "rows": t["rows"] - torch.tensor([100, 0, 0, 0, 0])},
    "NaN": lambda t: {**t, "sampler_logprobs": t["sampler_logprobs"] * float("nan")},
    "no shape": lambda t: {**t, "rows": t["rows"].sum()},
    "a row twice": lambda t: {**t, "rows": t["rows"] * torch.tensor([1, 0, 1, 1, 1])},
    "other steps": lambda t: {**t, "rows": t["rows"] + torch.arange(9)[:, None] * torch.tensor([5, 0, 0, 0, 0])},
    "a length beyond the limit": lambda t: {**t, "rows": t["rows"] + torch.tensor([0, 0, 0, 10**6, 0])},
    "tokens outside of their support": lambda t: {**t, "support": torch.full_like(t["support"], -1)},
    "a shape": lambda t: {**t, "rows": t["rows"].reshape(-1)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_completions_are_refused(pair, damage):
    trainer, tensors = pair
    with pytest.raises(ValueError):
        loaded(trainer, damage(tensors))


def test_none_at_all_are_read_too(pair, capsys):
    """A checkpoint of the last step keeps none."""
    trainer, tensors = pair
    none = {name: tensor[:0] for name, tensor in tensors.items()}
    ahead = loaded(trainer, none)
    assert not ahead.kept and ahead.take(trainer.requests(), 4, lambda: False, None) == {}
    ahead.gather(Counters())
    assert "9 completions of the first step were not in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, named",
    [
        ({}, "rollout_ahead: it needs --rollout_engine vllm"),
        ({"filter_groups": "resample"}, "filter_groups: resample does not go with rollout_ahead 1"),
        ({"difficulty_range": "[0.1, 0.9]"}, "difficulty_range: "),
        ({"sampler_correction": "none"}, "sampler_correction: none does not go with rollout_ahead 1"),
    ],
)
def test_settings_that_do_not_go_together(settings, named):
    how = {
        "rollout_ahead": 1,
        "model": "m",
        "data": "d",
        "rewards": '{"correctness_reward": 1.0}',
        **({"rollout_engine": "vllm"} if settings else {}),
        **settings,
    }
    with pytest.raises(UserError, match=named.replace("[", r"\[")):
        load_config([word for name, value in how.items() for word in (f"--{name}", str(value))])
