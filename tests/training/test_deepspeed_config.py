"""The user's own DeepSpeed JSON: auto is filled in, contradictions are refused by name; checkpoints cross backends."""

import json

import pytest

from grpo.config.command_line import load_config
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.training.backends.deepspeed import deepspeed_config
from tests.support.launcher import fork_script, metrics_of


def config(tmp_path, settings, **ours):
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    return Config(backend="deepspeed", deepspeed_config=str(tmp_path / "ds.json"), **ours)


def test_auto_is_filled_in_and_the_rest_is_kept(tmp_path):
    settings = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": "auto", "overlap_comm": False, "reduce_bucket_size": "auto"},
    }
    result = deepspeed_config(config(tmp_path, settings, zero_stage=3, max_grad_norm=0.5))
    assert result["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert result["gradient_clipping"] == 0.5 and result["gradient_accumulation_steps"] == 1
    assert not {"optimizer", "bf16", "fp16", "train_batch_size"} & set(result) and "auto" not in json.dumps(result)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer contradicts"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler contradicts"),
        ({"bf16": {"enabled": True}}, "bf16 contradicts"),
        ({"gradient_clipping": 3.0}, "gradient_clipping must be 1.0 or auto, got 3.0"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps must be 1 or auto"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1, zero_stage is 2"),
        ([1], "must hold a JSON object"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config(config(tmp_path, settings))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--offload", "optimizer"], "need --backend deepspeed"),
        (["--backend", "deepspeed", "--offload", "all"], "needs zero_stage >= 3"),
        (["--backend", "deepspeed", "--deterministic", "true"], "deterministic: it needs --backend ddp"),
        (["--backend", "deepspeed", "--zero_stage", "4"], "zero_stage"),
    ],
)
def test_settings_that_do_not_go_together(args, message):
    with pytest.raises(UserError, match=message):
        load_config(args)


def test_the_deepspeed_launchers_local_rank_is_accepted():
    assert load_config(["--local_rank=1", "--seed", "4"])[0].seed == 4


def test_a_run_crosses_backends_and_world_sizes(tmp_path):
    """Two ZeRO-3 ranks, then one plain process: the same steps as an uninterrupted single run, to rounding."""
    common = ("--eval_data", "null", "--max_steps", "4", "--save_steps", "2", "--batch_size", "4")
    common += ("--num_threads", "1")

    def run(name, *extra, nproc=None):
        folders = ("--output_dir", str(tmp_path / name / "output"), "--runs_dir", str(tmp_path / name / "runs"))
        done = fork_script("train.py", *common, *folders, *extra, nproc=nproc)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    run("whole")
    run("crossed", "--backend", "deepspeed", "--zero_stage", "3", nproc=2)
    shards = sorted(p.name for p in (tmp_path / "crossed/output/checkpoint_2/trainer").glob("optimizer-*"))
    assert shards == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    (tmp_path / "crossed/output/checkpoint_4/MANIFEST.json").unlink()
    assert "resuming from" in run("crossed").stdout
    whole, crossed = (metrics_of(tmp_path / name / "runs") for name in ("whole", "crossed"))
    assert [row["step"] for row in crossed] == [1, 2, 3, 4]
    for a, b in zip(whole, crossed):
        keys = ("reward/mean", "completions/length_mean", "entropy", "grad_norm")
        assert {key: a[key] for key in keys} == pytest.approx({key: b[key] for key in keys}, rel=1e-3)
