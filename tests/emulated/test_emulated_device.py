"""The trainer on an emulated accelerator (tests/emulated), which refuses what a GPU would refuse.

The device changes torch for its whole process, so that the cases run in another process; each is reported here.
"""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

import pytest
from safetensors.torch import load_file

from tests import emulated
from tests.support.launcher import PROJECT, environment, metrics_of, run_ranks, run_script
from tests.support.rank_jobs import VOCAB
from tests.support.tiny import tiny_model

SHORT, LONG = ("device", "training"), ("rollout",)  # cases of each tier
NAMES = [
    pytest.param(f"{part}_cases::{line[4 : line.index('(')]}", marks=[pytest.mark.full] if part in LONG else [])
    for part in (*SHORT, *LONG)
    for line in (PROJECT / "tests" / "emulated" / f"{part}_cases.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("def test_")
]
DEMO = {
    "model": "demo/base",
    "data": "demo/train.jsonl",
    "answer_format": "hash",
    "prompt_template": "{question}\n",
    "max_prompt_length": 96,
    "max_steps": 3,
    "save_steps": 2,
    "num_threads": 1,
    "run_name": "run",
    "eval_data": "demo/test.jsonl",
    "eval_rows": 8,
    "lr": 5e-4,
}
STAGES = {
    "train": {
        "rewards": '{"final_answer_reward": 1.0}',
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_generate_length": 60,
        "chat_template": False,
        "beta": 0.05,
        "rollout_tokens": 1000,
    },
    "sft": {"solution_column": "answer", "batch_size": 4, "max_generate_length": 120, "data_rows": 40, "packing": True},
}


@pytest.fixture(scope="module")
def ready():
    """Build the device once for all processes; skip where it cannot be built."""
    if problem := emulated.missing():
        pytest.skip(problem)
    done = run_script("tests/emulated/build.py", timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def outcomes(ready, tmp_path_factory, request):
    """Name of a case -> the failure for each of its parameters; "": it passed."""
    report = tmp_path_factory.mktemp("emulated") / "report.xml"
    full = request.config.getoption("--full")
    cases = [f"tests/emulated/{part}_cases.py" for part in ((*SHORT, *LONG) if full else SHORT)]
    cases += ["--full"] if full else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *cases]
    done = subprocess.run(command, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=1800)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name', '').partition('[')[0]}"
        if case.find("skipped") is None:
            bad = [part.text or "" for kind in ("failure", "error") for part in case.findall(kind)]
            found[name][case.get("name", "")] = "\n".join(bad)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_case(name, outcomes):
    assert outcomes[name], "nothing ran"
    failed = {parameters: text for parameters, text in outcomes[name].items() if text}
    assert not failed, "\n".join(f"{parameters}\n{text[-2000:]}" for parameters, text in failed.items())


def ran(stage, device, folder, **settings):
    """Run the script to its end; its metrics."""
    words = {**DEMO, **STAGES[stage], **settings, "output_dir": folder / "output", "runs_dir": folder / "runs"}
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    done = run_script("tests/emulated/start.py", stage, device, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"on 1 x {device}" in done.stdout
    return metrics_of(folder / "runs")


@pytest.mark.full
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_whole_run_is_that_of_the_cpu(stage, ready, tmp_path):
    """Loading, rollout or texts, rewards, updates, evaluation, checkpoints; a second start resumes."""
    expected, found = (ran(stage, device, tmp_path / device) for device in ("cpu", emulated.NAME))
    assert len(expected) == len(found) >= DEMO["max_steps"] + 2
    for a, b in zip(expected, found, strict=True):
        names = {
            "loss",
            "reward/mean",
            "completions/length_mean",
            "entropy",
            "grad_norm",
            "kl",
            "eval/accuracy",
            "eval/loss",
            "step",
        } & a.keys()
        assert len(names) >= 2
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-3, abs=1e-5)
    assert any(a.get("grad_norm", 0) > 0 for a in expected)
    longer = ran(stage, emulated.NAME, tmp_path / emulated.NAME, max_steps=4)
    assert [row["step"] for row in longer if "grad_norm" in row] == [1, 2, 3, 4]


@pytest.mark.full
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_ranks_sum_gradients_of_the_device(deterministic, ready, tmp_path):
    """Buckets are sent during the backward, in a thread of the device; the expected result is one rank's on the CPU."""
    jobs = [("injected_updates", {"name": "ends", "steps": steps, "deterministic": deterministic}) for steps in (1, 5)]
    folders = [tmp_path / "cpu", tmp_path / "device"]
    for folder in folders:
        folder.mkdir()
        (folder / "jobs.json").write_text(json.dumps(jobs))
    [alone] = run_ranks(jobs, 1, folders[0])
    done = run_script("tests/emulated/ranks.py", str(folders[1]), nproc=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    both = [json.loads((folders[1] / f"rank_{rank}.json").read_text()) for rank in range(2)]
    for job in range(2):
        assert both[0][job]["sha256"] == both[1][job]["sha256"]
        assert both[0][job]["norms"] == pytest.approx(alone[job]["norms"], rel=1e-3)
    ends = [load_file(folder / "ends.safetensors") for folder in folders]
    start = {name: p.detach() for name, p in tiny_model("qwen3", VOCAB, spread=2.0).named_parameters()}
    length, gap = (
        sum(float((a[name] - ends[0][name]).square().sum()) for name in ends[0]) ** 0.5 for a in (start, ends[1])
    )
    assert gap < 1e-3 * length
