"""One file: what is in it, what is left out, what may act in it."""

import base64
import gzip
import hashlib
import json
import re

import numpy as np
import pytest

from grpo.view.command import main
from grpo.view.export import groups_in_order, report
from grpo.view.runs import RunLogs
from tests.support.many_completions import GROUP, write_run
from tests.view.test_logs_of_unknown_origin import columns_of


def data_in(page: bytes) -> dict:
    [block] = re.findall(rb'<script type="application/octet-stream" id="data">([A-Za-z0-9+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(block)))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunLogs:
    folder = tmp_path_factory.mktemp("export") / "many"
    write_run(folder, 4000, 600)
    with (folder / "tokens-rank0.jsonl").open("w") as file:
        for step in range(1, 60):
            file.write(json.dumps({"step": step, "row": 0, "ids": [1], "texts": ["so"], "logprob": [-0.5]}) + "\n")
    run = RunLogs("many", folder)
    run.refresh()
    return run


def test_everything_is_in_it_where_it_fits(run):
    data = data_in(report([run]))
    [one] = data["runs"]
    header, columns = columns_of(base64.b64decode(one["rows"]))
    assert data["left_out"] == [] and header["count"] == len(one["records"]) == len(run.rollouts)
    assert header["questions"] == list(run.rollouts.questions)
    assert len(one["tokens"]) == 59 and one["tokens"]["7:0"]["logprob"] == [-0.5]
    for number in (0, 1234, 3999):
        assert one["records"][number]["completion"] == run.rollouts.records([number])[0]["completion"]
        assert columns["step"][number] == run.rollouts.columns["step"][number]
    assert one["metrics"] == run.metrics.packed()


@pytest.mark.parametrize("limit_mb", [0.3, 0.6])
def test_the_limit_holds_and_what_is_left_out_is_named(run, limit_mb):
    """Whole groups, from every step: neither the first steps alone nor single rows. The test above is the control."""
    page = report([run, run], limit_mb)
    data = data_in(page)
    assert 0.5 * limit_mb * 1e6 < len(page) <= limit_mb * 1e6
    for one, line in zip(data["runs"], data["left_out"], strict=True):
        header, columns = columns_of(base64.b64decode(one["rows"]))
        assert line == f"many: {header['count']} of 4000 completions, whole groups, evenly over the steps"
        per_step = np.array([(columns["step"] == step).sum() for step in range(1, 64)])
        assert set(per_step % GROUP) <= {0, 4000 % GROUP} and per_step.max() - per_step.min() <= GROUP
        shares = [part.sum() / per_step.sum() for part in np.array_split(per_step, 3)]
        assert min(shares) > 0.25, "every third of the run has its part"
        assert one["metrics"] == run.metrics.packed(), "curves are whole"


def test_every_beginning_of_the_order_is_spread_over_the_run(run):
    order = groups_in_order(run)
    assert sorted(row for group in order for row in group) == list(range(4000))
    steps, questions = run.rollouts.columns["step"], run.rollouts.columns["question"]
    assert all(len({(steps[row], questions[row]) for row in group}) == 1 for group in order)
    assert [steps[group[0]] for group in order[:4]] == [1, 33, 17, 49]


def test_only_the_page_s_own_script_and_style_may_act(run):
    """Hashes of the very script and style; the data is a block that browsers do not execute."""
    page = report([run])
    [policy] = re.findall(rb'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert b"default-src 'none'" in policy and b"unsafe" not in policy and b"'self'" not in policy
    for tag, directive in ((b"script", b"script-src"), (b"style", b"style-src")):
        [content] = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", page, re.S)
        digest = base64.b64encode(hashlib.sha256(content).digest())
        assert directive + b" 'sha256-" + digest + b"'" in policy


def test_the_command_writes_it(run, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main([str(run.folder), "--export", str(path), "--limit_mb", "1"]) == 0
    assert capsys.readouterr().out == f"{path}: 1 runs, {path.stat().st_size / 1e6:.2f} MB\n"
    assert data_in(path.read_bytes())["runs"][0]["about"]["name"] == "many" and path.stat().st_size <= 1e6
