"""What a run logs: rollouts as JSON lines, text and table; the best checkpoint; wandb, SwanLab and Trackio offline.

These three are tested for real where they are installed, and skipped where not.
"""

import importlib.util
import io
import json
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.config.command_line import load_config
from grpo.config.names import tracker_names
from grpo.config.settings import Config, TrackerName
from grpo.errors import UserError
from grpo.rewards import RewardInput
from grpo.run import trackers
from grpo.run.completions_log import RolloutFile, as_markdown, as_table, forget_other_ranks, rollouts_of
from grpo.run.trackers import check_trackers, load_trackers, run_id
from grpo.run.trackers.jsonl import open_after
from grpo.training.advantages import group_advantages
from grpo.training.scoring import Scored
from grpo.types import Completion
from tests.support.launcher import PROJECT, environment, fork_script

HOSTILE = "<script>alert(1)</script>\n\x1b[31mred & [bold]gold[/bold]\u2028\x85\u2029\x0b"


# --- files of lines, after a resume


def test_a_resumed_log_keeps_whole_lines_of_finished_steps(tmp_path):
    """Damaged, foreign and cut lines go; a file in which nothing is to be dropped is not written."""
    file, good = (
        tmp_path / "rollouts-rank0.jsonl",
        ['{"step": 1, "text": "a\u2028b"}', '{"step": 2, "text": "\\ud800"}'],
    )
    file.write_text("\n".join([good[0], "{", "[1]", '{"step": "1"}', good[1], '{"step": 3}', '{"step": 1, "cu']))
    open_after(file, 2).close()
    assert file.read_text() == "".join(line + "\n" for line in good)
    before = file.stat()
    open_after(file, 2).close()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_ranks_that_are_no_more_leave_no_lines_of_steps_that_are_done_again(tmp_path):
    lines = '{"step": 1}\n{"step": 2}\n'
    for name in ("rollouts-rank0", "rollouts-rank2", "held_out-rank3", "tokens-rank10"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    forget_other_ranks(tmp_path, 2, 1)
    left = {path.stem: path.read_text().count("step") for path in tmp_path.iterdir()}
    assert left == {"rollouts-rank0": 2, "rollouts-rank2": 1, "held_out-rank3": 1, "tokens-rank10": 1}


# --- a real run on two processes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of the demo, everything logged at each."""
    folder = tmp_path_factory.mktemp("run")
    done = fork_script(
        "train.py",
        "--output_dir",
        str(folder / "output"),
        "--runs_dir",
        str(folder / "runs"),
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--eval_steps",
        "1",
        "--eval_rows",
        "8",
        "--log_samples_steps",
        "1",
        "--log_completions_steps",
        "2",
        "--report_to",
        "[tensorboard]",
        nproc=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def rollouts_in(folder: Path) -> list[dict]:
    files = sorted(folder.glob("rollouts-rank*.jsonl"))
    assert [file.name for file in files] == ["rollouts-rank0.jsonl", "rollouts-rank1.jsonl"]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_completion_is_kept_once_with_its_advantage(run):
    rows = rollouts_in(run[0] / "runs" / "demo")
    metrics = [json.loads(line) for line in (run[0] / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        mine = sorted((row for row in rows if row["step"] == step), key=lambda row: row["row"])
        assert [row["row"] for row in mine] == list(range(64))
        rewards = np.array([row["reward"] for row in mine]).reshape(8, 8)
        [logged_mean] = [row["reward/mean"] for row in metrics if row["step"] == step and "reward/mean" in row]
        assert 0 < rewards.mean() == pytest.approx(logged_mean, rel=1e-12)
        wanted = group_advantages(rewards, True, 10.0).ravel()
        assert [row["advantage"] for row in mine] == pytest.approx(wanted.tolist(), rel=1e-12)
        for row in mine:
            right = row["completion"].rpartition("####")[2].strip() == row["gold"]
            assert row["rewards"] == {"final_answer_reward": float(right and "####" in row["completion"])}
            assert row["question"].endswith("now?") and row["finish"] in ("stop", "length")


def test_a_few_show_as_text_and_as_a_table(run):
    [events] = (run[0] / "runs").rglob("events.out.tfevents*")
    curves = EventAccumulator(str(events.parent)).Reload()
    [tag] = [tag for tag in curves.Tags()["tensors"] if "samples" in tag]
    shown = curves.Tensors(tag)
    assert [event.step for event in shown] == [1, 2]
    text = shown[0].tensor_proto.string_val[0].decode()
    assert text.count("**question**") == text.count("**advantage**") == 4 and "final_answer_reward" in text
    log = (run[0] / "runs" / "demo" / "train.log").read_text(encoding="utf-8")
    for text in (run[1].stdout, log):
        assert text.count("completions of step 2") == 1 and text.count("completions of step 1") == 1
        assert "advantage" in text and "final_answer_reward" in text


def test_the_best_checkpoint_is_named(run):
    best = json.loads((run[0] / "output" / "best.json").read_text())
    assert best == {"checkpoint": "checkpoint_1", "step": 1, "metric": "eval/accuracy", "value": best["value"]}
    metrics = [json.loads(line) for line in (run[0] / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["eval/accuracy"] for row in metrics if "eval/accuracy" in row}
    assert set(values) == {0, 1, 2} and values[2] <= values[1] == best["value"], "step 2 did not do better"


# --- the parts


def scored(text=HOSTILE):
    completions = [Completion(row, np.ones(2, np.int32), np.zeros(2, np.float32), "stop") for row in (3, 1)]
    inputs = [RewardInput("the prompt", text, [1, 2], {"question": text, "answer": "5"}) for _ in completions]
    return Scored(completions, inputs, np.array([[1.0, np.nan], [np.nan, np.nan]]), np.zeros((2, 2)), 4)


CFG = Config(rewards={"mark_reward": 2.0, "my.py:other": 1.0})


def test_what_a_function_did_not_score_is_null():
    first, second = rollouts_of(7, scored(), np.array([0.0, -0.5, 0.0, 0.5]), CFG)
    assert (first.row, first.advantage, first.reward) == (1, -0.5, None)
    assert (second.row, second.advantage, second.reward) == (3, 0.5, 2.0)
    assert second.rewards == {"mark_reward": 1.0, "my.py:other": None}
    assert rollouts_of(7, Scored([], [], np.zeros((0, 2)), np.zeros((0, 2)), 4), np.zeros(4), CFG) == []


def test_a_models_text_is_shown_and_not_obeyed():
    """No HTML in TensorBoard, no escape sequences and no markup on the terminal."""
    from rich.console import Console

    rollouts = rollouts_of(7, scored(), np.zeros(4), CFG)
    markdown = as_markdown(rollouts)
    assert "<script" not in markdown and "&lt;script>" in markdown and "&amp;" in markdown
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(as_table(rollouts))
    shown = console.export_text()
    assert "\x1b" not in shown and "[bold]gold[/bold]" in shown and "other none" in shown


def test_a_resumed_run_writes_a_step_once(tmp_path):
    def write(step, done):
        file = RolloutFile(tmp_path, 3, done)
        file.write(rollouts_of(step, scored(), np.zeros(4), CFG))
        file.close()

    write(1, 0)
    write(2, 1)
    write(2, 1)  # step 2 was lost, and is done again
    (tmp_path / "rollouts-rank3.jsonl").open("a").write('{"step": 2, "row"')  # the line that a kill cut
    write(3, 2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "rollouts-rank3.jsonl").read_text().split("\n")[:-1]]
    assert steps == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "value, names",
    [("none", []), ("wandb", ["wandb"]), ("[wandb, swanlab]", ["wandb", "swanlab"]), ("[]", [])],
)
def test_one_tracker_or_several(value, names):
    cfg, _ = load_config(["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1}', "--report_to", value])
    assert tracker_names(cfg) == names


@pytest.mark.parametrize("value", ["nope", "[nope]", "[wandb, wandb]", "[none, wandb]", "3"])
def test_no_such_tracker(value):
    with pytest.raises(UserError, match="report_to"):
        load_config(["--model", "m", "--data", "d", "--rewards", '{"mark_reward": 1}', "--report_to", value])


def test_each_tracker_is_a_file_of_its_name():
    """The names that `report_to` allows, and the files in grpo/run/trackers/ that open_tracker is called in."""
    allowed = set(typing.get_args(TrackerName))
    files = {path.stem: path.read_text(encoding="utf-8") for path in Path(trackers.__file__).parent.glob("*.py")}
    assert {name for name, text in files.items() if "\ndef open_tracker(" in text} == allowed


def test_a_missing_package_is_one_line():
    missing = [name for name in ("wandb", "swanlab", "trackio") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all are installed")
    with pytest.raises(UserError, match=rf"^report_to: {missing[0]} is not installed\. Install it \(pip install"):
        check_trackers(Config(report_to=["tensorboard", *missing]))
    check_trackers(Config(report_to="tensorboard"))


def test_a_run_keeps_its_id(tmp_path):
    stored = run_id(tmp_path, "wandb")
    assert run_id(tmp_path, "wandb") == stored != run_id(tmp_path, "swanlab")
    (tmp_path / "wandb_id").write_text("../../elsewhere")
    assert run_id(tmp_path, "wandb") not in (stored, "../../elsewhere")


# --- the packages themselves, offline


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_offline_for_real(name, tmp_path, capfd):
    """Metrics, a text and the settings are in the files; a resumed run has the same id."""
    pytest.importorskip(name)
    cfg = Config(report_to=name, tracker_mode="offline", run_name="offline", seed=97531)
    for done in (0, 1):
        loaded = load_trackers(cfg, tmp_path, done)
        assert len(loaded) == 2
        for tracker in loaded:
            tracker.scalars(done + 1, {"reward/mean": 0.25})
            tracker.text(done + 1, "samples", "**gold** 5 &lt; 6")
            tracker.close()
    folders = sorted(path for path in (tmp_path / name).glob("*run-*") if not path.is_symlink())
    assert len(folders) == 2 and all(run_id(tmp_path, name) in folder.name for folder in folders)
    for folder in folders:
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        [log] = [content for path, content in files.items() if path.suffix == f".{name}"]
        assert b"reward/mean" in log
        texts = b"".join(content for path, content in files.items() if "media" in path.parts)
        assert (b"gold** 5 &lt; 6" if name == "wandb" else b"gold** 5 < 6") in texts
        assert any(b"97531" in content for content in files.values()), "the settings are missing"


READ_TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
[run] = SQLiteStorage.get_run_records("grpo")
of_run = ("grpo", run["name"])
print(json.dumps([run["name"], SQLiteStorage.get_logs(*of_run), SQLiteStorage.get_run_config(*of_run)]))
"""


def test_trackio_offline_for_real(tmp_path):
    """Two starts of one run are one run in the database of its folder, beside TensorBoard; no line on stdout.

    In processes of their own: the package reads its folder from the environment when it is imported.
    """
    pytest.importorskip("trackio")
    home = {"HF_HOME": str(tmp_path / "home"), "TRACKIO_SPACE_ID": "user/not-used"}
    start = (
        "import sys; from pathlib import Path; from grpo.config.settings import Config\n"
        "from grpo.run.trackers import load_trackers\n"
        "cfg = Config(report_to=['tensorboard', 'trackio'], tracker_mode='offline', run_name='offline', seed=97531)\n"
        "done = int(sys.argv[1])\n"
        "for tracker in load_trackers(cfg, Path(sys.argv[2]), done):\n"
        "    tracker.scalars(done + 1, {'reward/mean': 0.25 + done})\n"
        "    tracker.text(done + 1, 'samples', '**gold** 5 &lt; 6')\n"
        "    tracker.close()\n"
    )

    def run(code, *words, **more):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=PROJECT,
            env={**environment(), **home, **more},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert [run(start, str(done), str(tmp_path)) for done in (0, 1)] == ["", ""]
    assert not (tmp_path / "home" / "trackio").exists() and list(tmp_path.glob("events.*"))
    name, logs, config = json.loads(run(READ_TRACKIO, TRACKIO_DIR=str(tmp_path / "trackio")).splitlines()[-1])
    assert name == f"offline-{run_id(tmp_path, 'trackio')[:8]}" and config["seed"] == 97531
    values = sorted((log["step"], log["reward/mean"]) for log in logs if "reward/mean" in log)
    assert values == [(1, 0.25), (2, 1.25)]
    assert [log["samples"]["_value"] for log in logs if "samples" in log] == ["**gold** 5 &lt; 6"] * 2
