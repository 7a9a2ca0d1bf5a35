"""vLLM itself, where launch/setup_vllm.sh has installed it: the same promises as with the stand-in, and its own faults.

python -m pytest --full -m vllm tests/rollout/vllm            minutes: a server takes about 50 seconds to start
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.forward.logprobs import Head
from grpo.randomness import uniforms
from grpo.rollout.sampling import Sampling, draw, sampling_of
from grpo.rollout.vllm import broadcast
from grpo.rollout.vllm.client import Client
from grpo.rollout.vllm.wire import TOKEN_VARIABLE, frames
from tests.faults.runs import Arena
from tests.rollout.vllm.asking import PROMPTS, Trainer
from tests.rollout.vllm.real_server import (
    PYTHON,
    RealServer,
    group_members,
    is_free,
    processes_with,
    save_served,
    wait_until_gone,
)
from tests.rollout.vllm.test_runs import tokens_of
from tests.support.jobs import PROJECT, wait_for
from tests.support.rollout_server import TOKEN

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: bash launch/setup_vllm.sh"),
]
CLOSE = 1e-4
SAMPLINGS = {
    "plain": {},
    "warm": {"temperature": 1.3},
    "top_p": {"top_p": 0.9, "max_support": 20},
    "top_k, min_p": {"top_k": 6, "min_p": 0.02},
    "stop": {"stop": ["a", "7"]},
    "padded": {"num_tokens": 200},
}
SLOW = {"rollout_timeout_s": 300.0, "max_generate_length": 24}


@pytest.fixture(scope="module", params=["qwen3", "llama", "gemma3", "qwen3_moe"])
def served(request, tmp_path_factory):
    """A model folder, and a server that holds another model of the same shape."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_served(folder / "model", request.param)
    server = RealServer(save_served(folder / "other", request.param, seed=1), folder)
    yield model, server
    server.stop()
    assert server.processes() == {} and is_free(server.port)


def assert_same_or_close(trainer, ours, theirs, sampling):
    """Equal tokens, or a first different one that numbers within 1e-4 of the native engine's would draw as well."""
    different = 0
    head = Head(trainer.model)
    head.num_tokens = trainer.num_tokens
    for own, other in zip(ours, theirs, strict=True):
        length = min(len(own.token_ids), len(other.token_ids))
        places = np.flatnonzero(own.token_ids[:length] != other.token_ids[:length])
        if not len(places):
            assert len(own.token_ids) == len(other.token_ids) and own.finish == other.finish
            if other.support is not None:
                assert own.support.tolist() == other.support.tolist()
            np.testing.assert_allclose(own.sampler_logprobs, other.sampler_logprobs, atol=CLOSE)
            continue
        different += 1
        at, (slot, generation) = int(places[0]), (10 + own.row // 3, own.row % 3)
        ids = torch.tensor([[*PROMPTS[own.row // 3], *own.token_ids[:at].tolist()]])
        with torch.no_grad():
            logits = head.logits(head.body()(input_ids=ids).last_hidden_state[:, -1])[:, : trainer.num_tokens]
        if sampling.temperature == 0:
            top = logits[0].topk(2).values
            assert float(top[0] - top[1]) < CLOSE
            continue
        number = uniforms(trainer.cfg.seed, np.array([slot]), np.array([generation]), at + 1)[0, at]
        near = [draw(logits, torch.tensor([number + shift]), sampling).token_ids.item() for shift in (-CLOSE, CLOSE)]
        assert int(own.token_ids[at]) in near, f"row {own.row}, token {at}"
    assert different <= len(ours) // 4, "rounding does not explain so many"
    return different


def test_tokens_and_supports_are_the_native_engines(served):
    """After two transfers of other weights; the server was started with a model of its own (the control)."""
    folder, server = served
    for name, how in SAMPLINGS.items():
        trainer = Trainer(folder, [server], **SLOW, **how)
        control = trainer.native()
        for _ in range(2):
            trainer.update()
            trainer.send()
        assert trainer.problems == [], name
        ours, sampling = trainer.sample(), sampling_of(trainer.cfg)
        assert trainer.problems == [], name
        different = assert_same_or_close(trainer, ours, trainer.native(), sampling)
        assert [one.token_ids.tolist() for one in control] != [one.token_ids.tolist() for one in ours]
        gaps = [np.abs(one.sampler_logprobs - trainer.score([(PROMPTS[one.row // 3], one)], 1)[0]) for one in ours]
        gap = np.concatenate(gaps)
        print(f"{folder.parent.name} {name}: gap max {gap.max():.2g} mean {gap.mean():.2g}, {different} rows differ")
        assert gap.max() < CLOSE
        if not how:
            greedy = Sampling(temperature=0.0)
            assert_same_or_close(trainer, trainer.sample(greedy), trainer.native(greedy), greedy)


def test_weights_that_vllm_does_not_take_over_are_noticed(served):
    """The probes compare with another model than the one that was sent."""
    folder, server = served
    trainer = Trainer(folder, [server], **SLOW)
    sent = [(name, parameter.detach().clone()) for name, parameter in trainer.model.named_parameters()]
    for _ in range(5):
        trainer.update()
    trainer.engine.load_weights(lambda: sent, 1)
    assert len(trainer.problems) == 1 and "on fixed texts" in trainer.problems[0]


def ask(server, method, path, token=None, body=None):
    """(status, answer) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {} if token is None else {"Authorization": token}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_half_a_transfer_changes_nothing(served):
    """Refused, and what was held goes on to be sampled."""
    folder, server = served
    trainer = Trainer(folder, [server], **SLOW)
    trainer.send()
    before = [one.token_ids.tolist() for one in trainer.sample()]
    whole = b"".join(bytes(piece) for piece in frames(trainer.model.named_parameters()))
    status, answer = ask(server, "POST", "/weights?version=half", f"Bearer {TOKEN}", whole[: len(whole) // 2])
    assert status == 400 and b"weights" in answer
    assert json.loads(ask(server, "GET", "/health", f"Bearer {TOKEN}")[1])["version"] == trainer.engine.version
    assert [one.token_ids.tolist() for one in trainer.sample()] == before and not trainer.problems


@pytest.mark.parametrize("own", [False, True], ids=["gloo", "shared memory"])
def test_weights_as_broadcasts(served, monkeypatch, own):
    """Two transfers through one group; then one that breaks off, one with a changed bit, and one that is whole."""
    folder, server = served
    trainer = Trainer(folder, [server], own=own, rollout_transfer="broadcast", **SLOW)
    for _ in range(2):
        trainer.update()
        trainer.send()
    assert trainer.problems == []
    assert_same_or_close(trainer, trainer.sample(), trainer.native(), sampling_of(trainer.cfg))

    def broken():
        named = list(trainer.model.named_parameters())
        yield from named[:3]
        trainer.engine.send.__self__.group.close()
        yield from named[3:]

    left = [broken, trainer.model.named_parameters]
    trainer.update()
    trainer.engine.load_weights(lambda: left.pop(0)(), trainer.updates)
    assert trainer.problems == [] and left == []
    assert_same_or_close(trainer, trainer.sample(), trainer.native(), sampling_of(trainer.cfg))
    told, wrong = broadcast.header_of, [True]

    def lies(name, *rest):
        return told(name, *rest) | ({"checksum": 1} if wrong and wrong.pop() else {})

    monkeypatch.setattr(broadcast, "header_of", lies)
    trainer.update()
    trainer.send()
    assert trainer.problems == [] and not wrong
    assert_same_or_close(trainer, trainer.sample(), trainer.native(), sampling_of(trainer.cfg))


def test_a_server_that_slept_samples_the_same(served):
    """The route and what it calls in vLLM; on a CPU vLLM itself keeps its memory."""
    folder, server = served
    trainer = Trainer(folder, [server], **SLOW)
    trainer.send()
    before = [one.token_ids.tolist() for one in trainer.sample()]
    assert ask(server, "POST", "/sleep", f"Bearer {TOKEN}") == (200, b'{"asleep":true}')
    assert [one.token_ids.tolist() for one in trainer.sample()] == before and not trainer.problems
    assert ask(server, "POST", "/sleep", f"Bearer {TOKEN}")[0] == 200
    trainer.update()
    trainer.send()
    assert_same_or_close(trainer, trainer.sample(), trainer.native(), sampling_of(trainer.cfg))
    assert json.loads(ask(server, "GET", "/health", f"Bearer {TOKEN}")[1])["sleeps"] is False  # no --enable-sleep-mode


def test_every_route_wants_the_token(served):
    """Also those that do not exist; with the token (the control) the known one answers."""
    _, server = served
    for path in (
        "/health",
        "/generate",
        "/weights",
        "/group",
        "/broadcast",
        "/sleep",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/metrics",
        "/v1/models",
        "/x",
    ):
        for method in ("GET", "POST", "PUT", "OPTIONS"):
            for token in (None, "Bearer ", f"Bearer {TOKEN}x", f"bearer {TOKEN}", TOKEN):
                assert ask(server, method, path, token)[0] == 401, (method, path, token)
    assert ask(server, "GET", "/health", f"Bearer {TOKEN}")[0] == 200
    assert ask(server, "GET", "/docs", f"Bearer {TOKEN}")[0] == 404
    for pid in server.processes():
        assert b"VLLM_ALLOW_INSECURE_SERIALIZATION" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_insecure_serialization_is_never_asked_for():
    files = [*PROJECT.glob("grpo/**/*.py"), *PROJECT.glob("launch/*"), *PROJECT.glob("docs/**/*.md")]
    assert not [file for file in files if "VLLM_ALLOW_INSECURE_SERIALIZATION=" in file.read_text(encoding="utf-8")]


# --- other servers


@pytest.mark.parametrize("flags", [["--gpus", "2"], ["--tensor-parallel-size", "2"]], ids=["copies", "workers"])
def test_several_processes_of_vllm(tmp_path, monkeypatch, flags):
    """Weights reach all of them any way, also after a break; a killed script leaves nothing behind."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = save_served(tmp_path / "model", "qwen3")
    server = RealServer(save_served(tmp_path / "other", "qwen3", seed=1), tmp_path, *flags)
    try:
        for how in ({}, {"rollout_transfer": "broadcast"}, {"rollout_transfer": "broadcast", "own": True}):
            trainer = Trainer(model, [server], **SLOW, **how)
            for _ in range(2):
                trainer.update()
                trainer.send()
            assert trainer.problems == []
            assert trainer.engine.clients[0].copies == (2 if "--gpus" in flags else 1)
            assert_same_or_close(trainer, trainer.sample(), trainer.native(), sampling_of(trainer.cfg))
    finally:
        leaders = [pid for pid, command in server.processes().items() if "grpo.rollout.vllm.server" in command]
        server.script.kill()
        server.script.wait()
    for leader in leaders:
        wait_until_gone(leader)
    assert leaders and server.processes() == {} and is_free(server.port)


def test_another_rope_is_noticed(tmp_path):
    """The same weights, and every checksum right: the probes stop it. With its own rope: the tests above."""
    model = save_served(tmp_path / "model", "qwen3")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}
    server = RealServer(model, tmp_path, "--hf-overrides", json.dumps(rope))
    try:
        trainer = Trainer(model, [server], **SLOW)
        trainer.send()
    finally:
        server.stop()
    assert len(trainer.problems) == 1 and "on fixed texts" in trainer.problems[0]


# --- whole runs


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """Runs long enough to be hit in the middle of a rollout."""
    arena = Arena(tmp_path_factory.mktemp("real_runs"))
    arena.settings |= {"model": save_served(arena.folder / "served", "qwen3"), "max_steps": 5, "save_steps": 1}
    arena.settings |= {"max_generate_length": 128, "rollout_timeout_s": 900, "stall_timeout_s": 1800}
    return arena


@pytest.fixture(scope="module")
def native(arena):
    run = arena.run()
    run.finish(timeout=600)
    return tokens_of(run)


def in_rollout(run, step):
    """Whether its first rank samples this step or a later one."""
    try:
        beat = json.loads((run.output / ".ranks" / "rank_0.json").read_text())
    except (OSError, ValueError):
        return False
    return beat["step"] >= step and beat["phase"] == "rollout"


def share_of_equal(ours, theirs):
    """Of rows."""
    assert ours.keys() == theirs.keys()
    return sum(ours[key] == theirs[key] for key in theirs) / len(theirs)


def test_kills_in_the_middle_of_rollouts(arena, native, tmp_path):
    """vLLM's engine, then the server, by SIGKILL: the run waits for the restart and ends with the native tokens."""
    server = RealServer(arena.settings["model"], tmp_path)
    try:
        run = arena.run(rollout_engine="vllm", rollout_server=server.url)
        job = run.launch(env={TOKEN_VARIABLE: TOKEN})
        for step, engine in ((2, True), (4, False)):
            wait_for(lambda step=step: in_rollout(run, step) or not job.running(), 1200)
            assert job.running(), job.text()[-3000:]
            time.sleep(0.3)
            server.kill(engine)
            server.wait()
        assert set(job.wait(1200)) == {0}, job.text()[-3000:]
    finally:
        server.stop()
    assert server.log.read_text().count("are loaded again") == 2
    share = share_of_equal(tokens_of(run), native)
    print(f"rows with the tokens of the native run: {share:.3f}")
    assert share > 0.9
    assert server.processes() == {} and is_free(server.port)


def test_share_of_equal_tokens(arena, native, tmp_path):
    """Of rows, against the native run: one rank, again, two ranks, killed in the third step and continued."""
    server = RealServer(arena.settings["model"], tmp_path)
    environment = {TOKEN_VARIABLE: TOKEN}
    found = {}
    try:
        for name, world in {"one rank": 1, "again": 1, "two ranks": 2, "continued": 1}.items():
            run = arena.run(world=world, rollout_engine="vllm", rollout_server=server.url)
            if name == "continued":
                job = run.launch(env=environment)
                wait_for(lambda run=run, job=job: in_rollout(run, 3) or not job.running(), 1200)
                assert job.running(), job.text()[-3000:]
                job.kill(signal.SIGKILL)
                job.wait(60)
            run.finish(timeout=1800, env=environment)
            found[name] = tokens_of(run)
    finally:
        server.stop()
    shares = {name: share_of_equal(tokens, native) for name, tokens in found.items()}
    shares |= {f"{name}, against one rank": share_of_equal(found[name], found["one rank"]) for name in found}
    print(shares)
    assert min(shares.values()) > 0.9


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_learns(tmp_path, seed):
    """With a server of its own and weights through shared memory; benchmarks/rollout_ahead.py has the controls."""
    command = [sys.executable, "train.py", "--rollout_engine", "vllm", "--rollout_transfer", "broadcast"]
    command += ["--seed", str(seed)]
    command += ["--output_dir", str(tmp_path / "output"), "--runs_dir", str(tmp_path / "runs")]
    own = {"GRPO_VLLM_PYTHON": str(PYTHON), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=PROJECT, env=os.environ | own, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (file,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    print(accuracies)
    assert accuracies[0] < 0.2 and accuracies[-1] >= 0.9


@pytest.mark.parametrize("who, transfer", [("trainer", "http"), ("server", "http"), ("server", "broadcast")])
def test_a_server_of_the_trainers_own_leaves_nothing_behind(arena, native, who, transfer):
    """Killed by SIGKILL in a rollout: either the server ends with its trainer, or it is started again.

    Weights that came through shared memory are lost with it: the same command continues.
    """
    run = arena.run(rollout_engine="vllm", rollout_transfer=transfer)
    environment = {"GRPO_VLLM_PYTHON": str(PYTHON)}
    job = run.launch(env=environment)
    folder = str(run.output / ".vllm" / "rank_0")
    wait_for(lambda: in_rollout(run, 2) or not job.running(), 1800)
    assert job.running(), job.text()[-3000:]
    (leader,) = [pid for pid, command in processes_with(folder).items() if "grpo.rollout.vllm.server" in command]
    assert len(group_members(leader)) > 1
    if who == "trainer":
        job.kill(signal.SIGKILL)
        job.wait(60)
        wait_until_gone(leader)
        run.finish(timeout=1800, env=environment)
    else:
        os.kill(leader, signal.SIGKILL)
        wait_until_gone(leader)
        if set(job.wait(1800)) != {0}:  # its rollout was not over
            assert transfer == "broadcast" and run.exit_note()["code"] == 74, job.text()[-3000:]
            assert "lost the weights" in job.text()
            run.finish(timeout=1800, env=environment)
    wait_for(lambda: processes_with(folder) == {}, 60)
    assert share_of_equal(tokens_of(run), native) > 0.9


def test_a_client_that_leaves_frees_its_requests(served):
    """A rollout that is given up half-way does not go on in the server."""
    folder, server = served
    trainer = Trainer(folder, [server], rollout_timeout_s=300.0, max_generate_length=200, stop_ids=())
    trainer.send()
    trainer.sample(pulse=lambda: True)
    facts = Client(server.url, TOKEN, 60.0)
    wait_for(lambda: facts.facts()["unfinished"] == 0, 90)
