"""The loss as a whole: surrogate x weighting, masks of trained tokens, surrogates of the user's own, refused names."""

import dataclasses
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.algorithm import NAMED
from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.runtime.distributed import World
from grpo.training import backends
from grpo.training.exchange import deliver
from grpo.training.losses import WEIGHTINGS, LossInputs, policy_loss
from grpo.training.metrics import MEANS, Tally
from grpo.training.minibatches import make_plan
from grpo.training.payload import Payload, payload_of
from grpo.training.surrogates import SURROGATES
from grpo.training.user_surrogate import load_surrogate
from grpo.types import Completion
from tests.support.launcher import PROJECT, fork_script, metrics_of
from tests.support.rank_jobs import config, injected, make_policy, table_of

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
OWN = """
import torch

def my_surrogate(logprobs, old_logprobs, ref_logprobs, sampler_logprobs, advantages, mask):
    ratio = torch.exp(logprobs - old_logprobs)
    return -ratio * advantages[:, None], {"ratio": ratio.detach(), "part/low": ratio.detach() < 1}
"""


def own(tmp_path, body):
    """The setting for a file with this text; each in a folder of its own, because files are read once in a process."""
    file = tmp_path / "my_loss.py"
    file.write_text(body)
    return Config(surrogate=f"{file}:my_surrogate")


# --- tables and names


def test_each_backend_is_a_file_of_its_name():
    """`single` is data parallel on one process."""
    allowed = set(typing.get_args(typing.get_type_hints(Config)["backend"])) - {"single"}
    files = {path.stem: path.read_text(encoding="utf-8") for path in Path(backends.__file__).parent.glob("*.py")}
    assert {name for name, text in files.items() if "\ndef open_backend(" in text} == allowed


def test_every_allowed_weighting_has_its_entry():
    """Else an allowed name would end in a KeyError in the first step."""
    assert set(NAMED["weighting"]) == set(WEIGHTINGS)
    assert Config().surrogate in SURROGATES


@pytest.mark.parametrize("name", ["ppo", "", "PPO_CLIP"])
def test_an_unlisted_surrogate_is_refused(name):
    with pytest.raises(UserError, match=r"surrogate: must be one of ppo_clip.*, or path/to/file.py:function"):
        load_surrogate(Config(surrogate=name))


def test_unlisted_names_end_a_run_at_its_start(tmp_path):
    """Both settings, in whole runs: one line, code 2, before a model is loaded (there is none)."""
    common = [
        "--model",
        str(tmp_path),
        "--data",
        "x.jsonl",
        "--rewards",
        '{"mark_reward": 1.0}',
        "--output_dir",
        str(tmp_path / "o"),
        "--runs_dir",
        str(tmp_path / "r"),
    ]
    for flags, words in (
        (["--surrogate", "nothing"], "surrogate: must be one of ppo_clip"),
        (["--weighting", "nothing"], "weighting"),
    ):
        done = fork_script("train.py", *common, *flags)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_loss_is_the_old_name_of_weighting(tmp_path):
    needed = ["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1.0}']
    assert load_config([*needed, "--loss", "dapo"])[0].weighting == "dapo"
    file = tmp_path / "old.yaml"
    file.write_text("loss: dr_grpo\n")
    assert load_config(["--config", str(file), *needed])[0].weighting == "dr_grpo"
    assert load_config(["--config", str(file), *needed, "--loss", "grpo"])[0].weighting == "grpo"
    with pytest.raises(UserError, match="loss: it is the old name of weighting"):
        load_config([*needed, "--loss", "dapo", "--weighting", "grpo"])
    file.write_text("loss: dr_grpo\nweighting: dapo\n")
    with pytest.raises(UserError, match="loss: it is the old name of weighting"):
        load_config(["--config", str(file), *needed])


# --- the composition, by hand


def test_the_parts_of_the_loss_by_hand():
    """One row, two tokens, the second not trained: (s * c + beta * k3) * w on the first, 0 on the second."""
    inputs = LossInputs(
        torch.tensor([[-1.0, float("nan")]]),
        torch.tensor([[-1.2, 0.0]]),
        torch.tensor([[-1.5, 0.0]]),
        torch.tensor([[-1.0, 0.0]]),
        torch.tensor([2.0]),
        torch.tensor([[True, False]]),
    )
    cfg = Config(beta=0.5, max_importance_weight=3.0)
    loss, measured = policy_loss(inputs, torch.tensor([[0.25, 0.25]]), cfg, weights_unchanged=True)
    surrogate, correction = -1.2 * 2.0, np.exp(-0.2)  # exp(0.2) is clipped at 1.2
    k3 = np.exp(-0.5) + 0.5 - 1
    assert loss.tolist() == [[pytest.approx((surrogate * correction + 0.5 * k3) * 0.25), 0.0]]
    assert measured.means["clip/high"].tolist() == [[True, False]]
    assert measured.sampler_gap.item() == 0.0
    trusted, _ = policy_loss(inputs, torch.tensor([[0.25, 0.25]]), cfg, trust_sampler=True)
    assert trusted[0, 0].item() == pytest.approx((surrogate + 0.5 * k3) * 0.25)


def test_trust_comes_from_a_value_and_not_from_the_log():
    """A metric of that name changes nothing; the measured gap, over all micro-batches, decides."""
    policy = make_policy(config(), ALONE)
    tally, mask = Tally(), torch.ones(1, 1, dtype=torch.bool)
    policy.trust_sampler(tally.reduce(ALONE))
    assert policy.counters.trust_sampler is None, "nothing was measured"
    for gap in (3e-6, 5e-5):
        tally.micro_batch(torch.tensor(0.0), {}, {"sampler_gap/max": torch.tensor(1.0)}, mask, torch.tensor(gap))
    reduced = tally.reduce(ALONE)
    assert reduced.sampler_gap == pytest.approx(5e-5) and reduced.metrics["sampler_gap/max"] == 1.0
    policy.trust_sampler(reduced)
    assert policy.counters.trust_sampler is True
    policy.trust_sampler(dataclasses.replace(reduced, sampler_gap=2e-4))
    assert policy.counters.trust_sampler is False


# --- a mask of what is trained


def naive_loss(policy, cfg, prompts, completions, advantages):
    """Row by row and token by token, with plain forwards: the objective as it is written down."""
    counts = [int(completion.trained.sum()) for completion in completions]
    total = torch.zeros((), dtype=torch.float64)
    for completion, gain, count in zip(completions, advantages, counts, strict=True):
        prompt = prompts[completion.row // cfg.num_generations].token_ids
        ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
        logits = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        for t in np.flatnonzero(completion.trained):
            logprob = logits[len(prompt) - 1 + t, int(completion.token_ids[t])]
            ratio = (logprob - logprob.detach()).exp()
            correction = (logprob.detach() - completion.sampler_logprobs[t]).exp().clamp(max=cfg.max_importance_weight)
            weight = {
                "grpo": 1 / (len(completions) * max(1, count)),
                "dapo": 1 / max(1, sum(counts)),
                "dr_grpo": 1 / (len(completions) * cfg.max_generate_length),
            }[cfg.weighting]
            total = total - weight * correction * ratio * float(gain)
    return total


def gradient(policy, loss):
    policy.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]).double()


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(WEIGHTINGS)), st.integers(0, 2**16), st.sampled_from([24, 64, 4096]))
def test_masked_tokens_leave_loss_and_gradient(weighting, seed, budget):
    """Against a naive loss over random masks, in any micro-batches; the control counts lengths in the denominators.

    Tokens that are not trained still are context: leaving them out of the input would change every later log-prob.
    """
    cfg = config(weighting=weighting, micro_batch_tokens=budget, batch_size=2)
    policy = make_policy(cfg, ALONE)
    prompts, completions, advantages = injected(cfg, 0, seed, masked=True)
    lengths = np.array([len(completion.token_ids) for completion in completions])
    num_trained = np.array([int(completion.trained.sum()) for completion in completions])

    def ours(counted):
        table = table_of(cfg, lengths, np.zeros(len(lengths)), counted)
        plan = make_plan(cfg, prompts, lengths, advantages, 1, num_trained=num_trained)
        [minibatch] = deliver(ALONE, cfg, plan, prompts, completions, table, advantages)
        return sum((policy.loss(micro, Tally(), True) for micro in minibatch), torch.zeros(()))

    expected = naive_loss(policy, cfg, prompts, completions, advantages)
    assert ours(num_trained).item() == pytest.approx(expected.item(), abs=2e-5)
    if not any(count and gain for count, gain in zip(num_trained, advantages, strict=True)):
        return  # no row carries gradient, and none is computed
    wanted, found = gradient(policy, expected), gradient(policy, ours(num_trained))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    if weighting == "dapo" and num_trained.sum() < 0.9 * lengths.sum():  # one factor for all rows: sure to show
        control = gradient(policy, ours(lengths))
        assert float((control - wanted).norm() / wanted.norm()) > 1e-2


def test_rows_without_a_trained_token_are_not_computed_and_still_count():
    cfg = config()
    prompts, completions, _ = injected(cfg, 0, masked=True)
    lengths = np.array([len(completion.token_ids) for completion in completions])
    num_trained = np.array([int(completion.trained.sum()) for completion in completions])
    assert num_trained[4] == 0 < lengths[4]
    [minibatch] = make_plan(cfg, prompts, lengths, np.ones(len(lengths)), 2, num_trained=num_trained)
    assert 4 in minibatch.rows and not any(4 in micro for micro in minibatch.micro_batches)


@given(st.integers(0, 70), st.integers(0, 3), st.booleans(), st.integers(0, 2**16))
def test_a_payload_arrives_as_it_was(length, support_width, chooses, seed):
    rng = np.random.default_rng(seed)
    support = rng.integers(-1, 99, (length, support_width)).astype(np.int32) if support_width else None
    sent = payload_of(
        Completion(
            3,
            rng.integers(0, 99, length).astype(np.int32),
            rng.normal(size=length).astype(np.float32),
            "stop",
            support,
            trained=rng.random(length) > 0.5,
        ),
        rng.random(length) > 0.5 if chooses else None,
    )
    words = sent.pack()
    assert len(words) == Payload.num_words(length, support_width, chooses)
    found = Payload.unpack(words, length, support_width, chooses)
    for field in dataclasses.fields(Payload):
        np.testing.assert_array_equal(getattr(sent, field.name), getattr(found, field.name))


# --- a step of other than P prompts


def test_table_plan_and_exchange_take_the_rows_they_are_given():
    """7 prompts where the settings say 5: weights divide by all 21 rows."""
    cfg = config()
    prompts, completions, advantages = injected(config(batch_size=7), 0)
    assert len(prompts) == 7 and cfg.batch_size == 5
    lengths = np.array([len(completion.token_ids) for completion in completions])
    plan = make_plan(cfg, prompts, lengths, advantages, 1)
    [minibatch] = deliver(ALONE, cfg, plan, prompts, completions, table_of(cfg, lengths, np.zeros(21)), advantages)
    total = sum(float(micro.weights.sum()) for micro in minibatch)
    assert total == pytest.approx(sum(bool(length) and gain != 0 for length, gain in zip(lengths, advantages)) / 21)


# --- a surrogate of the user's own


def test_a_users_surrogate_is_trained_on_like_ours(tmp_path):
    """Without clipping it is ppo_clip whose bounds never bind: same loss, same gradient, and its own metrics."""
    cfg = config(surrogate=own(tmp_path, OWN).surrogate, clip_eps=1e9)
    losses, tallies = [], []
    for surrogate in (cfg.surrogate, "ppo_clip"):
        policy = make_policy(dataclasses.replace(cfg, surrogate=surrogate), ALONE)
        prompts, completions, advantages = injected(cfg, 0)
        lengths = np.array([len(completion.token_ids) for completion in completions])
        plan = make_plan(cfg, prompts, lengths, advantages, 1)
        table, tally = table_of(cfg, lengths, np.zeros(len(lengths))), Tally()
        [minibatch] = deliver(ALONE, cfg, plan, prompts, completions, table, advantages)
        losses.append(gradient(policy, sum(policy.loss(micro, tally, True) for micro in minibatch)))
        tallies.append(tally.reduce(ALONE).metrics)
    torch.testing.assert_close(losses[0], losses[1])
    assert {"surrogate/ratio", "surrogate/part/low"} <= set(tallies[0]) and "clip/high" not in tallies[0]
    assert tallies[0]["surrogate/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert "surrogate/ratio" in MEANS


def test_the_worked_example_of_the_page_passes_the_check(tmp_path):
    """docs/algorithms.md, as printed; its bound is smooth, so a ratio at 1 keeps the gradient of the plain ratio."""
    page = (PROJECT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    [code] = re.findall(r"`my_loss.py`:\n\n```python\n(.*?)```", page, re.S)
    (tmp_path / "my_loss.py").write_text(code)
    cfg = Config(surrogate=f"{tmp_path}/my_loss.py:soft_clip")
    surrogate, source = load_surrogate(cfg)
    assert source == code
    logprobs = torch.zeros(1, 2, requires_grad=True)
    inputs = LossInputs(logprobs, torch.zeros(1, 2), None, torch.zeros(1, 2), torch.tensor([3.0]), logprobs == 0)
    loss, metrics = surrogate(inputs, cfg)
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-3.0, -3.0]] and metrics["surrogate/bounded"].tolist() == [[0.0, 0.0]]


WRONG = {
    "raises": ("    raise ValueError('no such thing')", "raised ValueError: no such thing"),
    "one value": ("    return -logprobs", "must return a tuple"),
    "shape": ("    return -logprobs.sum(-1), {}", "floats of shape [2, 3], got (2,)"),
    "not finite": ("    return logprobs * float('inf'), {}", "not finite"),
    "detached": ("    return -logprobs.detach(), {}", "without gradient"),
    "elsewhere": ("    return -old_logprobs.clone().requires_grad_(), {}", "does not reach logprobs"),
    "zero": ("    return logprobs * 0.0, {}", "does not reach logprobs"),
    "metric": ("    return -logprobs, {'A b': logprobs}", "must name its metrics"),
    "metric shape": ("    return -logprobs, {'a': logprobs.mean()}", "must return its metric a as a tensor"),
    "signature": ("", "raised TypeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_surrogate_that_cannot_train_is_refused(tmp_path, name):
    body, words = WRONG[name]
    head = "def my_surrogate(logprobs, old_logprobs, **others):\n"
    text = head + body if body else "def my_surrogate(x):\n    return x, {}\n"
    with pytest.raises(UserError) as error:
        load_surrogate(own(tmp_path, text))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting, words",
    [
        ("nowhere/my_loss.py:f", "no such Python file"),
        ("README.md:f", "no such Python file"),
        ("reward_func.py:nothing", "has no function 'nothing'"),
    ],
)
def test_a_surrogate_that_is_not_there_is_refused(setting, words):
    with pytest.raises(UserError, match=words):
        load_surrogate(Config(surrogate=setting))


def test_a_run_with_a_users_surrogate_trains_resumes_and_minds_its_source(tmp_path):
    """Two steps, then two more; with another text of the same function the resume is refused by name."""
    cfg = own(tmp_path, OWN)
    command = [
        "--config",
        "configs/demo.yaml",
        "--surrogate",
        cfg.surrogate,
        "--lr_schedule",
        "constant",
        "--eval_data",
        "null",
        "--batch_size",
        "2",
        "--max_generate_length",
        "8",
        "--output_dir",
        str(tmp_path / "o"),
        "--runs_dir",
        str(tmp_path / "r"),
        "--report_to",
        "none",
        "--num_threads",
        "1",
    ]
    done = fork_script("train.py", *command, "--max_steps", "1", nproc=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all("surrogate/ratio" in line for line in metrics_of(tmp_path / "r") if "loss" in line)
    done = fork_script("train.py", *command, "--max_steps", "2")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]
    (tmp_path / "my_loss.py").write_text(OWN.replace("-ratio", "-1.0 * ratio"))
    done = fork_script("train.py", *command, "--max_steps", "3")
    assert done.returncode == 2 and "surrogate_source has changed" in done.stderr
