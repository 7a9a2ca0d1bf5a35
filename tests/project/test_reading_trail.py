"""The way from a question to an optimizer step fits into an evening: ARCHITECTURE.md prints it, this adds it up.

One step is traced with the fast paths off. The model is a Gemma 2: no fast path computes its capped attention
scores and logits, so prompts are not shared, rows are padded, and the head is the model's own.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

import grpo
import train
from grpo.config.command_line import load_config
from grpo.run.run import Run
from grpo.runtime.distributed import start
from grpo.training.policy import Policy
from tests.support.launcher import PROJECT
from tests.support.tiny import save_tiny

MAX_LINES = 3000
SURROUNDINGS = {  # files that a step runs and that its reader may leave for another evening
    "grpo/data/questions.py": "hands out the prompts of a step",
    "grpo/rewards/__init__.py": "short names of rewards, for the log",
    "grpo/rewards/neighbours.py": "lets a reward file import what is beside it; only here with reward_workers 0",
    "grpo/rewards/functions.py": "calls a reward function; only here in the trainer, with reward_workers 0",
    "grpo/rewards/logged.py": "what reward functions logged, if anything",
    "grpo/rewards/pool.py": "passes the calls to reward workers",
    "grpo/forward/arguments.py": "leaves out arguments that a forward does not take",
    "grpo/forward/modes.py": "training mode for single modules",
    "grpo/forward/recomputed.py": "saves memory in the backward; the model computes what it computed before",
    "grpo/rollout/chunks.py": "cuts rows into chunks; any cut gives the same numbers",
    "grpo/runtime/shares.py": "cuts work into parts, as many for each rank",
    "grpo/rollout/prefill.py": "lists the distinct prompts for the plain cache",
    "grpo/models/offload.py": "does nothing unless something is offloaded",
    "grpo/training/payload.py": "what moves of a row to the rank that trains on it",
    "grpo/training/entropy.py": "does nothing unless a setting asks for entropies",
    "grpo/training/schedule.py": "the learning rate of an update",
    "grpo/training/rollout_metrics.py": "statistics of the table, for the log",
    "grpo/training/draws.py": "one round of P prompts, unless filter_groups says more",
    "grpo/training/user_table_functions.py": "the weighting by its name, unless it is the user's own",
    "grpo/training/kl_in_reward.py": "does nothing unless kl_estimator is k1_reward",
    "grpo/training/reference_renewal.py": "does nothing unless reference_sync_steps says so",
    "grpo/training/sampler_correction.py": "corrects a sampler that is not trusted",
    "grpo/run/run.py": "folders and notices; not the algorithm",
    "grpo/run/log.py": "writes the step's line and metrics",
    "grpo/run/completions_log.py": "completions as text, and the metrics of reward functions",
    "grpo/run/tokens_log.py": "does nothing in a step whose tokens are not logged",
    "grpo/run/console.py": "prints the line",
    "grpo/run/trackers/jsonl.py": "appends to metrics.jsonl",
    "grpo/checkpoints/background.py": "reports the seconds of the last save",
    "grpo/runtime/heartbeat.py": "tells the watchdog that work goes on",
    "grpo/runtime/signals.py": "tells whether a signal asked the run to stop",
    "grpo/runtime/checksums.py": "looks for flipped bits between updates",
    "grpo/runtime/out_of_memory.py": "remembers how much work fits into memory",
}
ONLY_TYPES = {"grpo/training/backends/__init__.py"}  # protocols: read, not run


def trail() -> list[str]:
    """The files of the table in ARCHITECTURE.md."""
    text = (PROJECT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("\n## The reading trail\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `?([\w/]+\.py)`? \|", section, re.M)


def num_lines(file: str) -> int:
    """Lines of a file; of the settings, those outside the class whose fields they are."""
    text = (PROJECT / file).read_text(encoding="utf-8")
    fields = 0
    if file == "grpo/config/settings.py":
        [config] = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Config"]
        fields = config.end_lineno - config.lineno + 1
    return len(text.splitlines()) - fields


def test_the_trail_is_an_evening():
    files = trail()
    assert 15 <= len(files) <= 25 and len(files) == len(set(files))
    assert sum(map(num_lines, files)) <= MAX_LINES


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> set[str]:
    """Files of the project whose code ran in the second step of a run, from its rollout to its log."""
    folder = tmp_path_factory.mktemp("trail")
    save_tiny(folder / "base", "gemma2")
    (folder / "rewards.py").write_text(
        "def varied(completions, **columns):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    settings = {
        "model": folder / "base",
        "data": "demo/train.jsonl",
        "answer_format": "hash",
        "data_rows": 8,
        "prompt_template": "{question}\n",
        "chat_template": "false",
        "max_prompt_length": 100,
        "max_steps": 2,
        "rewards": f'{{"{folder}/rewards.py:varied": 1.0}}',
        "reward_workers": 0,
        "batch_size": 2,
        "max_generate_length": 8,
        "device": "cpu",
        "report_to": "none",
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
    }
    cfg, _ = load_config([str(word) for name, value in settings.items() for word in (f"--{name}", value)])
    files: set[str] = set()
    here = str(Path(grpo.__file__).parent), str(Path(train.__file__))

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(here):
            files.add(Path(frame.f_code.co_filename).relative_to(PROJECT).as_posix())

    tally, trust = Run.tally, Policy.trust_sampler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Run, "tally", lambda run, step: (sys.setprofile(note if step == 2 else None), tally(run, step))[1]
        )
        patch.setattr(Policy, "trust_sampler", lambda policy, gap: (sys.setprofile(None), trust(policy, gap))[1])
        train.train(cfg, start("cpu", 1))
    return files | {"train.py"}


def test_a_step_runs_what_the_trail_shows(executed):
    assert executed - set(trail()) - set(SURROUNDINGS) == set()


def test_every_file_of_the_trail_and_of_the_surroundings_ran(executed):
    """So neither list keeps a file that a step no longer needs."""
    assert set(trail()) - ONLY_TYPES - executed == set()
    assert set(SURROUNDINGS) - executed == set()
