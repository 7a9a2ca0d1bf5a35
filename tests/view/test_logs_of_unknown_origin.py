"""Logs as they are found: still being written, cut, replaced, damaged, hostile, of earlier versions."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import UserError
from grpo.view.lines import BLOCK, MAX_LINE, GrowingFile, parse_line
from grpo.view.metrics import Metrics
from grpo.view.rollouts import Rollouts
from grpo.view.runs import RunLogs, find_runs
from grpo.view.tokens import Tokens

OLD = {"question": "2+2?", "gold": "4", "finish": "stop", "rewards": {"f": 1.0}, "reward": 1.0, "advantage": 0.5}


def rollout(step: int, row: int, completion: object = "4", **more: object) -> str:
    return json.dumps({"step": step, "row": row, "completion": completion, **OLD, **more}, ensure_ascii=False) + "\n"


def columns_of(packed: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and columns, read as the page reads them."""
    (size,) = struct.unpack("<I", packed[:4])
    header, place, columns = json.loads(packed[4 : 4 + size]), 4 + size, {}
    assert place % 8 == 0
    for name, code in header["columns"]:
        columns[name] = np.frombuffer(packed, {"i": "<i4", "f": "<f4"}[code], header["count"], place)
        place += -(-header["count"] * 4 // 8) * 8
    assert place == len(packed)
    return header, columns


@pytest.fixture
def rows(tmp_path) -> Rollouts:
    return Rollouts(tmp_path)


def test_a_line_that_is_still_being_written_waits(tmp_path, rows):
    """A reader that took the half line would count a damaged one; one that skipped it would miss a row."""
    file = tmp_path / "rollouts-rank0.jsonl"
    whole = rollout(1, 0) + rollout(1, 1)
    for end in range(0, len(whole) + 1, 7):
        file.write_text(whole[:end])
        rows.refresh()
    file.write_text(whole)
    rows.refresh()
    assert (len(rows), rows.bad, rows.generation) == (2, 0, 0)
    assert [one["completion"] for one in rows.records([0, 1])] == ["4", "4"]


def test_ranks_write_at_the_same_time_and_numbers_of_rows_stay(tmp_path, rows):
    files = [tmp_path / f"rollouts-rank{rank}.jsonl" for rank in (0, 1)]
    for step in (1, 2, 3):
        for rank, file in enumerate(files):
            with file.open("a") as out:
                out.write(rollout(step, rank, f"step {step} rank {rank}"))
            rows.refresh()
    texts = [one["completion"] for one in rows.records(range(6))]
    assert texts == [f"step {step} rank {rank}" for step in (1, 2, 3) for rank in (0, 1)]
    assert rows.search("RANK 1") == [1, 3, 5]
    header, columns = columns_of(rows.packed(first=4))
    assert (header["first"], header["count"]) == (4, 2) and columns["step"].tolist() == [3, 3]


@pytest.mark.parametrize("how", ["cut", "replaced", "rewritten in place"])
def test_a_file_that_was_rewritten_is_read_anew(tmp_path, rows, how):
    """A resumed run drops the lines of steps that it will do again. Without the check the old rows would stay."""
    file = tmp_path / "rollouts-rank0.jsonl"
    file.write_text(rollout(1, 0, "a") + rollout(2, 0, "b"))
    rows.refresh()
    new = rollout(1, 0, "a") if how == "cut" else rollout(1, 0, "A" * 9) + rollout(2, 0, "c" * 90)
    if how == "replaced":
        (tmp_path / "new").write_text(new)
        os.replace(tmp_path / "new", file)
    else:
        file.write_text(new)
    rows.refresh()
    assert rows.generation == 1 and [one["completion"][0] for one in rows.records(range(len(rows)))] == (
        ["a"] if how == "cut" else ["A", "c"]
    )


BAD_LINES = [
    b"{",
    b"[1, 2]",
    b'"text"',
    b"null",
    b'{"step": 1}',
    b'{"step": 1, "row": 0}',
    b'{"step": true, "row": 0, "completion": ""}',
    b'{"step": -1, "row": 0, "completion": ""}',
    b'{"step": 1e400, "row": 0, "completion": ""}',
    b'{"step": ' + b"9" * 30 + b', "row": 0, "completion": ""}',
    b'{"step": ' + b"9" * 5000 + b', "row": 0, "completion": ""}',
    b'{"step": 1, "row": 0, "completion": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"\x00" * 100,
    b"\xff\xfe\xfd",
]


def test_damaged_lines_are_counted_and_left_out(tmp_path, rows):
    (tmp_path / "rollouts-rank0.jsonl").write_bytes(
        b"\n".join([rollout(1, 0).strip().encode(), *BAD_LINES, rollout(1, 1).strip().encode(), b""])
    )
    rows.refresh()
    assert (len(rows), rows.bad) == (2, len(BAD_LINES))
    assert rows.problems() == [f"{len(BAD_LINES)} damaged lines of completions left out"]


def test_a_search_passes_over_damaged_lines(tmp_path, rows):
    """The text stands in rows, in lines that are none between them, and in a row before such a line."""
    bad = json.dumps({"step": 1, "completion": "needle"}).encode()
    lines = [rollout(1, 0, "needle").encode().strip(), bad, bad, rollout(1, 1, "hay").encode().strip(), bad]
    lines += [rollout(1, 2, "a needle").encode().strip(), b""]
    (tmp_path / "rollouts-rank0.jsonl").write_bytes(b"\n".join(lines))
    rows.refresh()
    assert rows.search("needle") == [0, 2] and rows.search("hay") == [1] and rows.bad == 3


STRANGE = [
    {"finish": ["list"], "rewards": "none", "reward": "high", "advantage": None, "length": -5},
    {"rewards": {"f": 1e300, "g": 10**400, "h": True, "i": None}, "reward": float("nan"), "advantage": float("inf")},
    {"gold": {"a": [1, {"b": float("nan")}]}, "question": {"q": 1}, "extra": {"x": [float("inf")], "y": "\ud800"}},
    {"completion": [{"role": "assistant", "content": "4"}, {"role": None, "content": {"deep": [1]}}]},
    {"completion": 7, "extracted": 7, "question": None},
    {"rewards": {f"reward{i}": 1.0 for i in range(500)}},
]


@pytest.mark.parametrize("more", STRANGE)
def test_strange_values_are_shown_as_far_as_they_go(tmp_path, rows, more):
    """Whatever was read must also be writable: as columns, and as JSON without NaN."""
    (tmp_path / "rollouts-rank0.jsonl").write_text(
        rollout(1, 0) + json.dumps({"step": 1, "row": 1, "completion": "4", **more}) + "\n"
    )
    rows.refresh()
    header, columns = columns_of(rows.packed())
    assert header["count"] == len(rows) == 2 and all(len(column) == 2 for column in columns.values())
    json.dumps(rows.shown([0, 1], whole=True), allow_nan=False).encode("ascii")
    assert rows.search("4") and columns["reward"][0] == 1.0


def test_a_line_without_end_takes_no_memory(tmp_path):
    """The line is larger than the limit: it is passed over, and what follows it is read."""
    path = tmp_path / "rollouts-rank0.jsonl"
    with path.open("wb") as file:
        file.write(rollout(1, 0).encode())
        file.truncate(file.tell() + MAX_LINE + 3 * BLOCK)  # a hole: zeros
        file.seek(0, 2)
        file.write(b"\n" + rollout(1, 1).encode())
    growing = GrowingFile(path)
    found = [parse_line(line) for _, line in growing.new_lines()]
    assert [one["row"] for one in found if one] == [0, 1] and growing.too_long == 1


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_regular_files_are_opened(tmp_path, kind):
    """A link may lead out of the run's folder; a FIFO would block for ever."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text(rollout(1, 0, "secret"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    bad = folder / "rollouts-rank0.jsonl"
    {"link": lambda: bad.symlink_to(secret), "fifo": lambda: os.mkfifo(bad), "folder": bad.mkdir}[kind]()
    run = RunLogs("run", folder)
    run.refresh()
    assert len(run.rollouts) == 0 and run.about()["problems"] == ["rollouts-rank0.jsonl cannot be read"]


def test_bytes_and_surrogates(tmp_path, rows):
    """Bytes that are no UTF-8, and escapes of half a character, in the file as another program may have written it."""
    (tmp_path / "rollouts-rank0.jsonl").write_bytes(
        rollout(1, 0, "caf\xe9 数学").encode("utf-8")
        + rollout(1, 1, "caf\xe9").encode("latin-1")
        + b'{"step": 1, "row": 2, "completion": "\\ud83d half", "question": "\\u6570"}\n'
    )
    rows.refresh()
    assert [one["completion"] for one in rows.shown(range(3), True)] == ["caf\xe9 数学", "caf\ufffd", "\ud83d half"]
    assert rows.search("数学") == [0] and rows.search("数") == [0, 2] and rows.search("HALF") == [2]


def test_search_reads_what_a_person_reads(tmp_path, rows):
    """Not the JSON: names of fields are in every line, quotes and line breaks are escaped there."""
    (tmp_path / "rollouts-rank0.jsonl").write_text(
        rollout(1, 0, 'he said "no"\nthen') + rollout(1, 1, "\\frac{1}{2}") + rollout(1, 2, "x", question="finish?")
    )
    rows.refresh()
    found = [rows.search(text) for text in ('"no"\nTHEN', "\\frac", "finish", "advantage", ".*")]
    assert found == [[0], [1], [2], [], []]


def test_metrics_of_any_kind(tmp_path):
    lines = [
        '{"step": 1, "reward/mean": 0.25, "time/step_s": 2.0}',
        '{"step": 1, "eval/accuracy": 0.5}',
        "{damaged",
        '{"step": 2, "reward/mean": NaN, "loss": Infinity, "note": "text", "time/step_s": 3.0}',
        '{"step": 3, "reward/mean": 0.75, "time/st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics = Metrics(tmp_path)
    metrics.refresh()
    packed = metrics.packed()
    assert packed["curves"]["reward/mean"] == [[1], [0.25]] and packed["curves"]["eval/accuracy"] == [[1], [0.5]]
    assert packed["seconds"] == [[1, 2], [2.0, 5.0]] and metrics.problems() == ["1 damaged lines of metrics left out"]
    json.dumps(packed, allow_nan=False)
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[4] + 'ep_s": 1}', ""]))
    metrics.refresh()
    assert metrics.packed()["generation"] == 1 and metrics.last("reward/mean") == 0.75


def test_figures_of_tokens_are_joined_and_checked(tmp_path):
    lines = [
        {"step": 1, "row": 0, "ids": [5, 6], "texts": ["a", "b"], "logprob": [-0.1, None], "trained": "10"},
        {"step": 1, "row": 1, "ids": [5], "texts": ["a", "too many"], "logprob": {"no": 1}, "trained": "xx"},
    ]
    (tmp_path / "tokens-rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tokens-rank1.jsonl").write_text('{"step": 1, "row": 0, "policy": [-0.1, -0.2], "ratio": [1.0]}\n')
    tokens = Tokens(tmp_path)
    tokens.refresh()
    assert tokens.of(1, 0) == {
        "ids": [5, 6], "texts": ["a", "b"], "logprob": [-0.1, None], "policy": [-0.1, -0.2], "trained": "10",
    }  # fmt: skip
    assert tokens.of(1, 1) == {"ids": [5]} and tokens.of(2, 0) is None


def test_a_run_of_an_earlier_version(tmp_path):
    """No run.json, no exit.json, no lengths: settings from the events, the end from train.log."""
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 60, "reward/mean": 0.9}\n')
    (folder / "rollouts-rank0.jsonl").write_text(rollout(60, 0))
    (folder / "train.log").write_text("step: 59/60  grpo_loss: 0.0\nstep: 60/60  grpo_loss: 0.0\nsaved\n")
    (folder / "events.out.tfevents.1.vm.1.0").write_bytes(
        b'\x00\x01config/text_summary```json\n{\n  "lr": 5e-05,\n  "model": "demo"\n}\n```\xff'
    )
    [(name, found)] = find_runs([tmp_path / "runs"])
    run = RunLogs(name, found)
    run.refresh()
    about = run.about()
    assert (about["name"], about["state"], about["steps"], about["total"]) == ("demo", "done", 60, 60)
    assert about["settings"] == {"lr": 5e-05, "model": "demo"} and about["problems"] == []


def test_which_folders_are_runs(tmp_path):
    for name in ("a/demo", "b/demo", "b/other", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "b" / "empty").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "elsewhere")
    names = [name for name, _ in find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "other"])]
    assert names == ["a/demo", "b/demo", "other"]
    for wrong in ([tmp_path / "none"], [tmp_path / "b" / "empty"]):
        with pytest.raises(UserError, match=r"^runs: "):
            find_runs(wrong)


def test_reading_never_writes(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (folder / "rollouts-rank0.jsonl").write_text(rollout(1, 0) + "{")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()}
    run = RunLogs("run", folder)
    run.refresh()
    run.about()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).iterdir()} == before
