"""Figures of single tokens: the right ones, within the limit, from any rank; and what a run leaves beside its logs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.config.settings import Config
from grpo.run.tokens_log import KEPT_SHARE, Steps, TokensLog, TokenTexts
from grpo.types import Completion
from tests.support.launcher import fork_script, patched_train
from tests.support.tiny import tiny_tokenizer

TINY = ("--save_steps", "0", "--eval_data", "null", "--num_threads", "1", "--max_generate_length", "24")


def run(folder: Path, *settings: str, nproc: int | None = None, patch: str = "") -> tuple[list[dict], list[dict]]:
    """Train the demo for some steps. Returns the lines of tokens and of rollouts, of all ranks."""
    where = ("--output_dir", str(folder / "output"), "--runs_dir", str(folder / "runs"), "--run_name", "run")
    done = fork_script(patched_train(folder, patch), *TINY, *where, *settings, nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(
        [json.loads(line) for path in sorted((folder / "runs/run").glob(f"{kind}-rank*.jsonl"))
         for line in path.read_text(encoding="utf-8").splitlines()]
        for kind in ("tokens", "rollouts")
    )  # fmt: skip


@pytest.mark.parametrize("nproc", [None, 2])
def test_the_figures_are_those_of_the_step(tmp_path, nproc):
    """Sampler and policy hold the same weights in a step's first update, so their log-probs agree to 1e-3 (rounding);
    texts join to the completion; the second minibatch has moved weights, so its ratios are not all 1."""
    settings = ("--max_steps", "2", "--log_tokens_steps", "1", "--log_samples_steps", "1", "--lr", "1e-4")
    tokens, rollouts = run(tmp_path, *settings, "--num_minibatches", "2", "--entropy_coef", "0.01", nproc=nproc)
    rows = [*range(8), *range(56, 64)]  # of 8 groups the first and the last
    sampled = {(one["step"], one["row"]): one for one in tokens if "ids" in one}
    updated = {(one["step"], one["row"]): one for one in tokens if "policy" in one}
    assert sorted(sampled) == [(step, row) for step in (1, 2) for row in rows], "once, whoever sampled it"
    texts = {(one["step"], one["row"]): one for one in rollouts}
    for place, one in sampled.items():
        joined = "".join(one["texts"]).removesuffix("<|endoftext|>")
        assert joined == texts[place]["completion"] and texts[place]["length"] == len(one["ids"])
        assert len(one["trained"]) == len(one["logprob"]) == len(one["ids"]) and set(one["trained"]) == {"1"}
    assert updated.keys() <= sampled.keys() and len(updated) >= 8
    ratios = []
    for (step, row), one in updated.items():
        assert len(one["entropy"]) == len(one["ratio"]) == len(one["policy"]) and min(one["entropy"]) > -1e-3
        if row < 8:  # of the first minibatch
            assert np.abs(np.subtract(one["policy"], sampled[step, row]["logprob"])).max() <= 0.0011
            assert set(one["ratio"]) == {1.0}
        else:
            ratios += one["ratio"]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.005


def test_rows_without_gradient_and_other_steps_have_no_figures(tmp_path):
    tokens, _ = run(tmp_path, "--max_steps", "3", "--log_tokens_steps", "2", "--lr", "1e-12")
    assert {one["step"] for one in tokens} == {1, 2}
    assert all("ratio" not in one for one in tokens), "one update a step: the old log-probs are its own"


def test_0_writes_nothing(tmp_path):
    tokens, rollouts = run(tmp_path, "--max_steps", "1", "--log_tokens_steps", "0")
    assert tokens == [] and rollouts and not list(tmp_path.rglob("tokens-rank*"))


def test_the_run_s_folder_says_what_it_is_and_how_it_ended(tmp_path):
    """So that a copy of the folder is enough. An error during training is there with its code."""
    run(tmp_path, "--max_steps", "1", nproc=2)
    folder = tmp_path / "runs/run"
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["total_steps"], facts["processes"], facts["settings"]["max_steps"]) == (1, 2, 1)
    assert json.loads((folder / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    broken = "import math\nfrom grpo.training.policy import Policy\nPolicy.loss = lambda *args: 1 / 0\n"
    where = ("--output_dir", str(tmp_path / "output2"), "--runs_dir", str(tmp_path / "runs"), "--run_name", "bug")
    done = fork_script(patched_train(tmp_path, broken), *TINY, *where, "--max_steps", "1")
    assert done.returncode == 1
    end = json.loads((tmp_path / "runs/bug/exit.json").read_text())
    assert end["code"] == 1 and "ZeroDivisionError" in end["reason"]
    nan = "from grpo.training.policy import Policy\nloss = Policy.loss\n"
    nan += "Policy.loss = lambda *args: loss(*args) * math.nan"
    where = ("--output_dir", str(tmp_path / "output3"), "--runs_dir", str(tmp_path / "runs"), "--run_name", "nan")
    done = fork_script(patched_train(tmp_path, f"import math\n{nan}"), *TINY, *where, "--max_bad_steps", "1")
    assert done.returncode == 76
    assert json.loads((tmp_path / "runs/nan/exit.json").read_text())["code"] == 76


def lines_of(step: int, rows: int, length: int = 50) -> list[dict]:
    return [{"step": step, "row": row, "logprob": np.linspace(-3, 0, length)} for row in range(rows)]


def test_the_limit_holds_and_old_steps_are_thinned_first(tmp_path):
    """100 steps of 4 kB into 40 kB. The control without thinning is 10 times as large."""
    path, limit = tmp_path / "tokens-rank0.jsonl", 40_000
    steps, largest = Steps(path, 0, limit), 0
    for step in range(1, 101):
        steps.append(lines_of(step, 10))
        largest = max(largest, path.stat().st_size)
    steps.file.close()
    kept = sorted({json.loads(line)["step"] for line in path.read_text().splitlines()})
    assert largest <= limit and path.stat().st_size == sum(steps.sizes.values())
    assert kept[-3:] == [98, 99, 100] and kept[0] <= 40, "the newest whole, and some of the old ones"
    gaps = np.diff(kept)
    assert gaps[: len(gaps) // 2].mean() > gaps[len(gaps) // 2 :].mean()
    control = Steps(tmp_path / "control.jsonl", 0, 10**9)
    for step in range(1, 101):
        control.append(lines_of(step, 10))
    assert control.path.stat().st_size > 8 * limit * KEPT_SHARE


def test_a_step_larger_than_the_limit_leaves_an_empty_file(tmp_path):
    steps = Steps(tmp_path / "tokens-rank0.jsonl", 0, 500)
    steps.append(lines_of(1, 10))
    steps.file.close()
    assert steps.path.read_text() == "" and steps.sizes == {}


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    path = tmp_path / "tokens-rank0.jsonl"
    path.write_text('{"step":1,"row":0}\n{"step":2,"row":0}\n{"step":3,"ro')
    steps = Steps(path, 1, 10**6)
    steps.append(lines_of(2, 1, 2))
    steps.file.close()
    assert path.read_text() == '{"step":1,"row":0}\n{"step":2,"row":0,"logprob":[-3.0,0.0]}\n'
    assert sum(steps.sizes.values()) == path.stat().st_size


def test_a_full_disk_costs_the_figures_and_not_the_run(tmp_path, capsys):
    cfg = Config(log_tokens_steps=1)
    log = TokensLog(cfg, tmp_path / "no" / "folder", 0, 1, 0, TokenTexts(tiny_tokenizer()))
    for step in (1, 2):
        log.begin(step)
        log.write(step, [Completion(0, np.array([5], np.int32), np.zeros(1, np.float32), "stop")])
    log.close()
    assert capsys.readouterr().err.count("warning: no figures of tokens") == 1


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, which decoding drops at the beginning of a text."""
    words = {"<unk>": 0, "▁x": 1, "▁so": 2, "▁it": 3, "is": 4, "x": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", ["数学 = 三", "a\U0001f600b", "café\n\n", "", "plain"])
def test_texts_of_bytes_join_to_the_text(text):
    """A character of several tokens stands once, with its last token; decoded alone each would be U+FFFD."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    texts = TokenTexts(tokenizer).of(ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    half = TokenTexts(tokenizer).of(tokenizer.encode("数")[:2])
    assert half == ["", "\ufffd"], "a completion that was cut within a character"


def test_a_space_at_the_beginning_of_a_token_is_kept():
    """The control: decoded alone, the first token of a text has lost it."""
    tokenizer = word_tokenizer()
    assert TokenTexts(tokenizer).of([2, 3, 4]) == [" so", " it", "is"]
    assert tokenizer.decode([2]) == "so"


def test_values_that_are_not_finite():
    from grpo.run.tokens_log import rounded_list

    assert rounded_list(np.array([math.nan, -math.inf, -0.00004, 1.23456])) == [None, None, 0.0, 1.235]
