"""Every type of transformers' causal language models trains, or is refused in one line before the first rollout."""

import re

import pytest
import transformers

from tests.support.launcher import PROJECT, metrics_of, run_script
from tests.support.zoo import TYPES
from tests.support.zoo_run import run_type, save_base, settings

SHORT = {  # one of each kind of cache and refusal
    "qwen3_5_text": "padded",  # linear attention
    "deepseek_v3": "shared",  # values are not as wide as keys
    "mamba": "equal_lengths",
    "rwkv": "recompute",
    "opt": "shared",  # its layers call dropout themselves
    "bert": "",  # not causal
}
KINDS = ("llama", "deepseek_v3", "qwen3_5_text", "lfm2", "mamba", "rwkv")
LORA = {"lora_r": 4}


def documented() -> dict[str, str]:
    """The lines of docs/models.md by type."""
    text = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    return {
        line.split(" | ")[0].strip("| "): line
        for line in text.splitlines()
        if re.match(r"\| [\w-]+ \| (yes|no) ", line)
    }


def check(trial, reload_gap=0.0) -> None:
    assert trial.updates == 2 and trial.gap <= 1e-4 and trial.reload_gap <= reload_gap, trial
    assert trial.greedy == 0 and trial.distinct >= (5 if reload_gap else 10), trial


@pytest.mark.parametrize("model_type", SHORT)
def test_one_of_each_kind(model_type, tmp_path):
    trial = run_type(tmp_path, model_type)
    if not SHORT[model_type]:
        assert trial.refused.startswith("a later token changes the logits of earlier ones")
        return
    assert trial.cache == SHORT[model_type], trial
    check(trial)


@pytest.mark.full
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_trains_or_is_refused(model_type, tmp_path):
    trial = run_type(tmp_path / "full", model_type)
    lora = None if trial.refused else run_type(tmp_path / "lora", model_type, **LORA)
    if not trial.refused:
        check(trial)
    if lora is not None and not lora.refused:
        check(lora, reload_gap=1e-4)  # loading merges the adapter, which rounds
    if transformers.__version__ in (PROJECT / "docs" / "models.md").read_text(encoding="utf-8"):
        assert trial.row(lora) == documented()[model_type]


def test_the_table_has_every_type_and_names_no_traceback():
    lines = documented()
    assert set(TYPES) <= set(lines) or transformers.__version__ not in (PROJECT / "docs" / "models.md").read_text()
    assert sum(" | yes | " in line for line in lines.values()) >= 150


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", [*KINDS, "qwen3_moe", "gpt_oss", "gemma4_text", "jamba"])
def test_on_a_gpu(model_type, tmp_path):
    trial = run_type(tmp_path, model_type, device="cuda")
    assert not trial.refused, trial
    check(trial)


@pytest.mark.full
@pytest.mark.parametrize("model_type", KINDS)
def test_two_ranks_are_one(model_type, tmp_path):
    found = []
    for ranks in (None, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        save_base(folder, model_type)
        done = run_script("train.py", *settings(folder), nproc=ranks, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([row for row in metrics_of(folder / "runs") if "grad_norm" in row])
    for name in ("reward/mean", "completions/length_mean", "grad_norm", "entropy"):
        assert [row[name] for row in found[1]] == pytest.approx([row[name] for row in found[0]], rel=1e-3, abs=1e-5)
