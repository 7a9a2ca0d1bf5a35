"""`rollout_ahead: 1`: whole runs whose servers sample a step ahead, their weights, and what checkpoints keep of it.

The servers are stand-ins, of which equal requests get equal bits. Every ending is compared with that of a run that
nothing happened to; the model is random, so nothing is equal by chance.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo.config.command_line import load_config
from grpo.errors import UserError
from grpo.rollout.sampling import sampling_of
from grpo.rollout.vllm.ahead import NAME, Ahead
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


@pytest.mark.parametrize("world, number", [(1, 1), (2, 2)])
def test_a_step_is_sampled_by_the_weights_before_the_last_update(arena, stand_in, world, number):  # noqa: F811
    """The first two steps by those of the start; tokens on two ranks and servers are those of one."""
    servers = [stand_in() for _ in range(number)]
    asked = [versions_of(server) for server in servers]
    run = arena.run(world=world, **asking(*servers), rollout_ahead=1, eval_steps=0)
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
        alone = arena.run(world=1, **asking(servers[0]), rollout_ahead=1, eval_steps=0)
        servers[0].behave()
        alone.finish(env=ENV)
        assert tokens_of(alone) == tokens


def test_killed_and_asked_to_stop_it_goes_on_with_what_was_sampled_ahead(arena, stand_in):  # noqa: F811
    """SIGKILL and SIGTERM in every phase, saves at other steps, evaluations between: the same end to the bit."""
    servers = [stand_in(), stand_in()]
    ahead = dict(**asking(*servers), rollout_ahead=1)
    calm = arena.run(**ahead)
    calm.finish(env=ENV)
    for kind, phase, step, every in (
        ("kill9", "rollout", 3, 1),
        ("kill9", "update", 5, 2),
        ("term", "rollout", 2, 9),
        ("term", "reward", 3, 9),
        ("term", "update", 4, 9),
    ):
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
    # on one rank instead of two: the kept completions are those of both
    run = arena.run(**ahead)
    run.launch([Fault("kill9", "update", None, 3)], env=ENV).wait(60)
    run.finish(env=ENV, world=1)
    assert tokens_of(run)[3, 5] == tokens_of(calm)[3, 5]
    assert {key: ids for key, ids in tokens_of(run).items() if key[0] <= 3} == {
        key: ids for key, ids in tokens_of(calm).items() if key[0] <= 3
    }


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
    other = Ahead(trainer.cfg, ALONE, trainer.num_tokens, lambda: False, trainer.problems.append)
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
