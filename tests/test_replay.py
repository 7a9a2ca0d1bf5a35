"""A skipped update is kept so that it can be run again: `python -m grpo.replay` meets the same numbers."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from grpo.replay import main
from tests.support.launcher import fork_script, patched_train
from tests.support.tiny import save_tiny

# On rank 1 alone, after the rollout of step 2: a weight becomes infinite, or huge; checks for flipped bits are off.
POISON = """
import torch
from grpo.training.policy import Policy
plain = Policy.annotate

def annotate(self, batches):
    if self.counters.step == 1 and self.world.rank == 1:
        with torch.no_grad():
            self.model.model.layers[1].mlp.down_proj.weight[3, 4] = float("inf")
    return plain(self, batches)

Policy.annotate = annotate
"""


@pytest.fixture(scope="module")
def anomaly(tmp_path_factory):
    """Three steps on two ranks, the second skipped."""
    folder = tmp_path_factory.mktemp("anomaly")
    save_tiny(folder / "model", spread=1.0)
    done = fork_script(
        patched_train(folder, POISON),
        "--config",
        "configs/demo.yaml",
        "--model",
        str(folder / "model"),
        "--eval_data",
        "null",
        "--max_steps",
        "2",
        "--max_generate_length",
        "8",
        "--check_weights_steps",
        "0",
        "--output_dir",
        str(folder / "output"),
        "--runs_dir",
        str(folder / "runs"),
        "--micro_batch_tokens",
        "512",
        "--rewards",
        '{"tests/support/rewards_for_tests.py:varied": 1.0}',
        nproc=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2: update skipped on all ranks (gradient norm nan)" in done.stdout
    return folder / "output" / "anomalies" / "step_2"


def test_the_number_comes_out_again_and_the_culprit_is_named(anomaly, capsys):
    assert main([str(anomaly)]) == 0
    printed = capsys.readouterr().out
    assert "weights that are not finite: model.layers.1.mlp.down_proj.weight" in printed
    assert "first module whose output is not finite: model.layers.1.mlp.down_proj" in printed
    assert "gradient norm over all ranks: recorded nan, replayed nan" in printed
    sane = printed[printed.index("rank 0:") : printed.index("rank 1:")]
    assert "loss recorded nan" not in sane and "replayed nan" not in sane and "not finite" not in sane


def test_other_weights_do_not_reproduce_it(anomaly, tmp_path, capsys):
    """The control: the weights of rank 0 in place of those of rank 1."""
    copy = tmp_path / "anomalies" / "step_2"
    shutil.copytree(anomaly, copy)
    shutil.copy(copy / "weights_rank_0.safetensors", copy / "weights_rank_1.safetensors")
    assert main([str(copy)]) == 1
    assert "not reproduced" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no folder", "no weights", "other weights", "torn"])
def test_what_is_missing_is_said(anomaly, tmp_path, capsys, damage):
    copy = tmp_path / "anomalies" / "step_2"
    if damage != "no folder":
        shutil.copytree(anomaly, copy)
    weights = copy / "weights_rank_1.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "other weights":
        save_file({"x": next(iter(load_file(weights).values()))}, weights)
    elif damage == "torn":
        (copy / "rank_1.safetensors").write_bytes(b"torn")
    assert main([str(copy)]) == 2
    assert capsys.readouterr().err.startswith("error: replay: ")
