"""What TensorBoard shows first: the overview, the charts, accuracy beside the settings, distributions.

The events are those of a real run, read by TensorBoard's own reader; names that do not exist would leave charts empty.
"""

import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from grpo.config.settings import Config
from grpo.run.trackers.tensorboard import CHARTS, OVERVIEW, SFT_CHARTS, open_tracker, overview_tag
from tests.support.launcher import fork_script

COMMON = ["--max_steps", "2", "--eval_rows", "8", "--report_to", "tensorboard", "--save_steps", "0", "--device", "cpu"]


def events_of(folder, *args, program="train.py"):
    places = ["--output_dir", str(folder / "output"), "--runs_dir", str(folder / "runs")]
    done = fork_script(program, *COMMON, *places, *args)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (folder / "runs").rglob("events.out.tfevents*")
    found = EventAccumulator(str(file), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0}).Reload()
    metrics = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    return found, {name for one in metrics for name in one}


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    more = [
        "--config",
        "configs/demo.yaml",
        "--batch_size",
        "2",
        "--max_generate_length",
        "24",
        "--log_samples_steps",
        "2",
    ]
    return events_of(tmp_path_factory.mktemp("tensorboard"), *more, "--entropy_coef", "0.001")


def layout_in(events) -> layout_pb2.Layout:
    [value] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(value.tensor_proto.string_val[0])
    return layout


def test_every_chart_has_curves(grpo_run):
    events, metrics = grpo_run
    [category] = layout_in(events).category
    assert [chart.title for chart in category.chart] == list(CHARTS) and len(CHARTS) >= 8
    scalars = events.Tags()["scalars"]
    for chart in category.chart:
        shown = [tag for tag in scalars if any(re.match(one, tag) for one in chart.multiline.tag)]
        assert shown and set(shown) <= metrics, chart.title


def test_the_overview_comes_first_and_repeats_the_metrics(grpo_run):
    events, metrics = grpo_run
    tags = sorted(events.Tags()["scalars"])
    first = [tag for tag in tags if tag.startswith(OVERVIEW)]
    assert tags[: len(first)] == first and first[0].endswith("reward/mean")
    assert len(first) == sum(overview_tag(name, CHARTS) is not None for name in metrics) >= 12
    for tag in first:
        of_metric = tag.partition("/")[2].partition(" ")[2]
        assert [event.value for event in events.Scalars(tag)] == [event.value for event in events.Scalars(of_metric)]
    assert not any("user/" in tag or "length_mean" in tag for tag in first if "/2" in tag)


def test_the_settings_stand_beside_the_held_out_accuracy(grpo_run):
    """HParams takes the last value of the scalar that it names: here the final accuracy."""
    events, _ = grpo_run
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    named = [info.name.tag for info in experiment.metric_infos]
    assert named[0] == "eval/accuracy" and set(named) <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 2]
    assert {"lr", "num_generations", "beta"} <= {info.name for info in experiment.hparam_infos}


def test_rewards_lengths_and_advantages_have_distributions(grpo_run):
    events, _ = grpo_run
    for name in ("reward", "length", "advantage"):
        shown = events.Histograms(f"distribution/{name}")
        assert [event.step for event in shown] == [1, 2]
        assert all(event.histogram_value.num == 16 for event in shown), "one number a row"


@pytest.mark.parametrize(
    "numbers",
    [
        [0.3, 0.1 + 0.2],
        [0.0, 5e-324],
        [1.0] * 9,
        [-1e9, *[0.1] * 50],
        [1e300, -1e300],
        [float("nan"), 1.0],
        [2.0**53] * 2,
    ],
)
def test_any_rewards_have_a_distribution(tmp_path, numbers):
    tracker = open_tracker(Config(), tmp_path, 0)
    tracker.histograms(1, {"reward": np.array(numbers)})
    tracker.close()
    [file] = tmp_path.rglob("events.out*")
    found = EventAccumulator(str(file), size_guidance={"histograms": 0}).Reload().Histograms("distribution/reward")
    assert [int(event.histogram_value.num) for event in found] == [int(np.isfinite(numbers).sum())]


def test_supervised_training_has_charts_of_its_own(tmp_path):
    more = ["--config", "configs/demo.yaml", "--solution_template", "{answer}"]
    events, metrics = events_of(tmp_path, *more, program="grpo.sft")
    [category] = layout_in(events).category
    assert [chart.title for chart in category.chart] == list(SFT_CHARTS)
    assert {"sft/loss"} <= metrics
    assert all(
        any(re.match(one, tag) for tag in events.Tags()["scalars"] for one in c.multiline.tag) for c in category.chart
    )
