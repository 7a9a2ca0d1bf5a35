"""Whole runs of train.py that sample with stand-ins of a rollout server.

Tokens equal those of native runs, what servers hold equals the checkpoints, and after every fault the same command ends
with the bits of a run without faults. The model is random, so nothing here is equal by chance.
"""

import json
import signal
import threading
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.checkpoints.contents import step_of
from grpo.export.command import main as export
from grpo.rollout.vllm import probes
from grpo.rollout.vllm.wire import TOKEN_VARIABLE, packed, unpacked
from tests.faults.runs import Arena, flat
from tests.support.rollout_server import TOKEN, Died

STEPS = 5
SETTINGS = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 99, "rollout_timeout_s": 20}
ENV = {TOKEN_VARIABLE: TOKEN}


@pytest.fixture(scope="module")
def arena(tiny_folder, tmp_path_factory):
    """As the fault tests have it, with the model that the stand-ins hold. Nothing may outlive these tests."""
    arena = Arena(tmp_path_factory.mktemp("vllm_runs"))
    arena.settings |= {"model": tiny_folder, "eval_data": arena.settings["data"], "eval_steps": 2, **SETTINGS}
    yield arena
    assert arena.fork_server.orphans() == []


def asking(*servers, **settings):
    """Settings of a run that samples with these servers."""
    return {"rollout_engine": "vllm", "rollout_server": json.dumps([one.url for one in servers]), **settings}


def tokens_of(run):
    """(step, row) -> tokens, over all ranks."""
    found = {}
    for file in (run.seen / "rollouts").glob("step_*.json"):
        step = int(file.name.split(".")[0][5:])
        found |= {(step, int(row)): one[0] for row, one in json.loads(file.read_text())["completions"].items()}
    return found


def assert_held(server, run, weights_of):
    """Transfer k brought the weights of the checkpoint after step k - 1, to the bit."""
    assert len(server.loads) == STEPS + 1  # one before each step, and one for the last evaluation
    for step, held in enumerate(server.loads[1:], 1):
        saved = weights_of(run.output / f"checkpoint_{step}")
        assert held.keys() == saved.keys()
        assert [name for name in held if not torch.equal(held[name], saved[name])] == []
    before, after = server.loads[0], server.loads[-1]
    assert not all(torch.equal(before[name], after[name]) for name in before), "nothing was trained"


@pytest.fixture(scope="module")
def native(arena):
    """Tokens and weights of a native run."""
    run = arena.run(world=1)
    run.finish()
    return tokens_of(run), run.weights()


@pytest.mark.parametrize("world, number", [(1, 1), (2, 2)])
def test_a_run_samples_what_the_native_engine_samples(arena, native, stand_in, world, number):
    """All tokens of all steps, on one rank with one server, and on two with two."""
    servers = [stand_in() for _ in range(number)]
    run = arena.run(world=world, **asking(*servers))
    run.finish(env=ENV)
    tokens, weights = native
    assert len(tokens) == STEPS * 12 and tokens_of(run) == tokens
    travelled = (weights - flat(arena.settings["model"])).norm()
    assert float((run.weights() - weights).norm()) < 1e-3 * float(travelled)
    for server in servers:
        assert_held(server, run, lambda folder: load_file(folder / "model.safetensors"))
    assert max(row["sampler_gap/max"] for row in run.metrics() if "sampler_gap/max" in row) < 1e-4


def test_weights_that_zero_has_sharded(arena, native, stand_in):
    """Stage 3 on two ranks: whole tensors arrive, and the first step's tokens are the native ones."""
    server = stand_in()
    run = arena.run("zero-3", **asking(server))
    run.finish(env=ENV)
    assert_held(server, run, lambda folder: load_file(folder / "model.safetensors"))
    assert {key: ids for key, ids in tokens_of(run).items() if key[0] == 1} == {
        key: ids for key, ids in native[0].items() if key[0] == 1
    }


def test_many_copies_are_probed_where_zero_has_sharded_the_head(arena, stand_in):
    """The rank that asks them scores 960 tokens, in two blocks of the head; the other one joins in both gathers."""
    server = stand_in()
    server.change_facts = lambda facts: facts | {"copies": 40}
    run = arena.run("zero-3", **asking(server), max_steps=1, eval_steps=0, logits_chunk_mb=1)
    run.finish(env=ENV)
    assert server.asked[0][1] == 120


@pytest.mark.parametrize("kind, world", [("plain", 1), pytest.param("zero-3", 2, marks=pytest.mark.full)])
def test_an_adapter_is_sent_merged(arena, stand_in, tmp_path, kind, world):
    """Equal to the bit to peft's merge of each checkpoint, and rounded to the last one's export."""
    server = stand_in()
    run = arena.run(kind, world, **asking(server), lora_r=4, lora_alpha=16, lr=1e-2)
    run.finish(env=ENV)

    def merged(folder):
        base = AutoModelForCausalLM.from_pretrained(arena.settings["model"], dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).merge_and_unload()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    assert_held(server, run, merged)
    last = run.output / f"checkpoint_{STEPS}"
    how = ["--to", "merged_16bit", "--out", str(tmp_path / "exported")]
    assert export(["--checkpoint", str(last), *how]) in (0, None)
    (file,) = (tmp_path / "exported").rglob("model.safetensors")
    exported = load_file(file)
    assert step_of(last) == STEPS and exported.keys() == server.loads[-1].keys()
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in server.loads[-1].items())


def test_settings_that_read_what_the_engine_returns(arena, stand_in):
    """Truncated sampling with its supports, and the tokens of largest entropy, which the server does not record."""
    tokens = []
    for settings in ({}, asking(stand_in())):
        how = dict(top_p=0.9, max_support=16, top_entropy_share=0.5, max_steps=2)
        run = arena.run(world=1, **how, **settings)
        run.finish(env=ENV)
        tokens.append(tokens_of(run))
    assert len(tokens[0]) == 24 and tokens[0] == tokens[1]


@pytest.mark.parametrize("settings, slept", [({}, STEPS), ({"rollout_ahead": 1}, 0)], ids=["a step", "ahead"])
def test_a_server_that_can_sleeps_during_updates(arena, stand_in, settings, slept):
    """Once a step, after the rollout of all ranks; never while it samples ahead. A server that cannot is not asked."""
    server = stand_in()
    for can in (True, False):
        server.behave()
        server.change_facts = lambda facts: facts | {"sleeps": can}  # noqa: B023
        run = arena.run(**asking(server), **settings)
        run.finish(env=ENV)
        assert server.slept == (slept if can else 0)


# --- faults


def step_of_rollout(given):
    """Step, counted from 1, that a body of /generate belongs to; 0: probes and evaluations."""
    slot = given["requests"][0][4]
    return slot // 3 + 1 if slot < 2**62 else 0


def at_step(step, number, fault):
    """Before completion `number` of this step's rollout: fault(), once."""
    left = [True]

    def change(lines, given):
        for place, line in enumerate(lines):
            if left and place == number and step_of_rollout(given) == step:
                left.clear()
                fault()
                raise Died
            yield line

    return change


def shifted_logprobs(lines, given):
    """Log-probs of completions, not of probes, that are 0.1 nats too low; this server has a group of three."""
    for line in lines:
        one = json.loads(line)
        if "logprobs" in one and given["requests"][0][4] < probes.SLOT:
            one["logprobs"] = packed(unpacked(one["logprobs"], "<f4") - 0.1, "<f4")
        yield json.dumps(one).encode() + b"\n"


def ends_lost(run, arena, words, saved):
    """Launch; it must end with code 74, these words in one line, and this checkpoint as the newest one."""
    job = run.launch(env=ENV)
    assert run.ended_with(job, 74, timeout=90) == []
    text, reason = job.text(), run.exit_note()["reason"]
    assert words in text and "Traceback" not in text, text[-2000:]
    assert "the same command continues" in reason or "is not saved" in reason
    assert run.valid()[0] == saved, (run.valid(), text[-2000:])


def test_a_run_survives_what_happens_to_its_servers(arena, stand_in):
    """One after another, each in another phase; every time the same command goes on.

    The end is bit-identical to that of a run that nothing happened to. Two ranks, two servers.
    """
    servers = [stand_in(), stand_in()]
    calm = arena.run(**asking(*servers))
    calm.finish(env=ENV)
    for server in servers:
        server.behave()
    run, first = arena.run(**asking(*servers)), servers[0]

    def restart():
        first.die()
        time.sleep(0.3)
        first.revive(kept=True)

    # restarted within the first step, which goes on; in the second step it loads other weights than it was sent
    first.change_lines = at_step(1, 2, restart)
    first.change_weights = lambda sent: (
        {name: tensor * 2 if "o_proj" in name else tensor for name, tensor in sent.items()} if first.loads else sent
    )
    ends_lost(run, arena, f"{first.url}: every tensor arrived as it was sent", saved=1)
    # it dies in the middle of the third step, for good
    first.behave()
    first.change_lines = at_step(3, 1, first.die)
    run.settings["rollout_timeout_s"] = 2
    ends_lost(run, arena, f"{first.url}: no answer for 2 s (nothing listens there)", saved=2)
    # it is restarted, and has lost its weights
    first.behave()
    first.revive()
    first.change_lines = at_step(4, 1, lambda: (first.die(), first.revive(kept=False)))
    ends_lost(run, arena, f"{first.url}: it has restarted and lost the weights", saved=3)
    # log-probs of another distribution: this step is not saved
    first.behave()
    first.change_lines = shifted_logprobs
    ends_lost(run, arena, "max_sampler_gap: log-probs of the rollout server are 0.0", saved=3)
    # all is well until the last evaluation, whose weights the server has no memory for
    first.behave()
    first.before = lambda path: (
        (500, b'{"error": "out of memory"}') if path == "/weights" and len(first.loads) > 1 else None
    )
    ends_lost(run, arena, f"{first.url}: out of memory", saved=STEPS)
    first.behave()
    run.finish(env=ENV)
    assert tokens_of(run) == tokens_of(calm)
    assert run.ending().differences(calm.ending()) == []
    assert not run.leftovers()


@pytest.mark.parametrize("path, after", [("/weights", 3), ("/generate", 6), ("/group", 0), ("/broadcast", 2)])
def test_a_trainer_killed_while_a_server_works_for_it(arena, native, stand_in, path, after):
    """SIGKILL to all ranks inside a transfer, a rollout, the making of a group: the same command ends as if calm."""
    server = stand_in()
    how = "http" if path in ("/weights", "/generate") else "broadcast"
    run = arena.run(world=1, **asking(server), rollout_transfer=how)
    reached, killed, asked = threading.Event(), threading.Event(), []

    def before(asked_path):
        if asked_path == path and not killed.is_set():
            asked.append(path)
            if len(asked) > after:
                reached.set()
                killed.wait(20)

    server.before = before
    job = run.launch(env=ENV)
    assert reached.wait(60), job.text()[-2000:]
    job.kill(signal.SIGKILL)
    job.wait(20)
    killed.set()
    assert run.last_logged() < STEPS
    run.finish(env=ENV)
    tokens, weights = native
    assert tokens_of(run) == tokens
    assert float((run.weights() - weights).norm()) < 1e-3 * float((weights - flat(arena.settings["model"])).norm())
    assert not run.leftovers()


def test_no_server_at_the_start(arena, stand_in):
    """One line with the address and code 2 on every rank, and nothing is left that would stop the next try."""
    server = stand_in()
    server.die()
    run = arena.run(**asking(server, rollout_timeout_s=1, max_steps=1))
    job = run.launch(env=ENV)
    assert run.ended_with(job, 2) == []
    assert f"rollout_server: {server.url}: no answer for 1 s (nothing listens there)" in run.exit_note()["reason"]
    assert "Traceback" not in job.text()
    server.revive()
    run.settings["rollout_timeout_s"] = 20
    run.finish(env=ENV)
