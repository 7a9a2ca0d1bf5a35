"""The documents say what the code does: settings, metrics, files, links, flags, examples. And the budgets hold.

Nothing here is started: commands in the documents are read as the scripts would read them.
"""

import ast
import dataclasses
import importlib
import re
import shlex
import subprocess
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo import errors
from grpo.checkpoints.resume import FREE_TO_CHANGE
from grpo.config.command_line import load_config
from grpo.config.documentation import markdown_table
from grpo.config.settings import Config
from grpo.data.questions import Questions, load_questions
from grpo.data.recipe import make_recipe
from grpo.evaluate.held_out import evaluate
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.logged import Logs
from grpo.rewards.pool import InProcess, open_rewards
from grpo.run.log import RunLog
from grpo.runtime.distributed import World
from grpo.runtime.out_of_memory import FittingSize
from grpo.training.metrics import COUNTS, MAXIMA, MEANS, SUMS, Tally
from grpo.types import FACTS, Completion, Counters, Prompt, Table
from tests.support.asking_rewards import answers_of
from tests.support.launcher import PROJECT
from tests.support.tiny import tiny_tokenizer

importlib.import_module("grpo.sft.policy")  # it and what it imports declare metrics
DECLARED = {*MEANS, *SUMS, *COUNTS, *MAXIMA}  # by the code alone: no test has run yet
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def tracked() -> list[str]:
    """Files of the project, as git knows them (or as they lie there, where there is no git)."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode == 0:
        return sorted(name for name in done.stdout.split("\0") if name and (PROJECT / name).exists())
    skip = re.compile(r"(^|/)(\.(?!ci)|__pycache__|[^/]*\.egg-info)|^(runs|output)/.")
    files = (path.relative_to(PROJECT).as_posix() for path in PROJECT.rglob("*") if path.is_file())
    return sorted(name for name in files if not skip.search(name))


FILES = tracked()
PAGES = sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "docs").glob("*.md"))  # the English ones
DOCUMENTS = sorted(
    {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *PAGES, *(f for f in FILES if f.endswith(".md"))}
)
ENGLISH = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *PAGES]
SOURCES = sorted({*(PROJECT / "grpo").rglob("*.py"), *PROJECT.glob("*.py")})
PYTHON = sorted({*SOURCES, *(PROJECT / f for f in FILES if f.endswith(".py"))})


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


README = read("README.md")


def section(name: str, title: str) -> str:
    """A document's text under a second-level heading."""
    return read(name).split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[list[str]]:
    """The lines of all bash blocks, as words."""
    blocks = [body for language, body in FENCE.findall(text) if language == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


# --- settings


def test_the_table_of_settings_is_the_generated_one():
    shown = (
        read("docs/configuration.md")
        .split("<!-- config table: python -m grpo.config -->\n")[1]
        .split("\n<!-- end -->")[0]
    )
    assert shown == markdown_table(), "paste what `python -m grpo.config` writes between the two comments"


def test_what_may_change_on_resume_is_named():
    may_change = re.search(
        r"any setting except (.*?)\. The number", section("docs/running.md", "Checkpoints and resuming"), re.S
    )
    assert set(re.findall(r"`(\w+)`", may_change[1])) == set(FREE_TO_CHANGE)


def test_exit_codes_are_named():
    rows = set(re.findall(r"^\| (\d+) \|", section("docs/running.md", "Exit codes, errors and logs"), re.M))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    assert {str(kind.code) for kind in kinds} <= rows


# --- metrics


class Answerer:
    chunk_rows = None
    """An engine that says one token."""

    fitting = FittingSize("rollout", "rollout_chunk_rows", "rows")

    def generate(self, requests, sampling, pulse, on_finished=None):
        one = np.ones(1)
        return [Completion(r.row, one.astype(np.int32), one.astype(np.float32), "stop") for r in requests]


def logged_keys(tmp_path) -> set[str]:
    """Every key that the code logs, NAME standing for a reward function's: real tables, and literals in the source."""
    rewards = InProcess.of({"mine.py:NAME": lambda completions, log_metric, **columns: [log_metric("NAME", 1) or 1.0]})
    scores = np.ones((4, 1))
    facts = {name: np.ones(4) for name in FACTS}
    table = Table(["mine.py:NAME"], scores, scores[:, 0], facts, 2)
    prompt = Prompt(0, "2+2?", (1, 2), {})
    cfg = Config(output_dir=str(tmp_path / "output"), runs_dir=str(tmp_path / "runs"), run_name="r")
    several = dataclasses.replace(cfg, eval_generations=2, prompt_template="<answer> {question}")
    keys = set()
    for how in (cfg, several):
        questions = Questions([prompt, dataclasses.replace(prompt, data_row=1)], 0)
        keys |= set(evaluate(Answerer(), questions, rewards, tiny_tokenizer(), how, ALONE, print))
    keys = {re.sub(r"@\d+$", "@K", key) for key in keys}

    tally = Tally()
    for name in DECLARED:
        if name in tally.counts:
            tally.mean(name, 1.0, 1.0)
    run_log = RunLog(cfg, ALONE, tmp_path)
    run_log.of_rewards = rewards.rewards
    for norms in ([], [1.0]):
        policy = SimpleNamespace(counters=Counters(), last_lr=0.0, fitting=Answerer.fitting, vocab_size=10)
        keys |= set(
            run_log.log_step(1, 2, table, np.ones(4), tally.reduce(ALONE), norms, policy, Logs({}, {"NAME": [1.0]}))
        )
    assert keys >= DECLARED

    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    first = "rollout|reward|advantage|completions|groups|questions|clip|sampler_gap|guards|time|save|idle|eval|sft"
    literal = rf"[\"']((?:{first})/[a-z_/]+)[\"']"
    return keys | set(re.findall(literal, source))


def test_every_metric_is_in_the_glossary_and_nothing_else(tmp_path):
    """Both ways; a metric added anywhere in the code fails this until it is explained."""
    documented = re.findall(r"^\| `([^`]+)` \|", section("docs/metrics.md", "Metrics"), re.M)
    assert len(documented) == len(set(documented))
    assert set(documented) == logged_keys(tmp_path)


# --- files, links, names


def test_the_readme_names_every_room_and_every_folder():
    """Rooms of grpo/, one line each with a purpose; files that stand in grpo/ itself are in the package's docstring."""
    lines = dict(re.findall(r"^- `grpo/(\w+)/`: (\S.+)$", README, re.M))
    assert set(lines) == {path.parent.name for path in (PROJECT / "grpo").glob("*/__init__.py")}
    folders = {name.split("/")[0] for name in FILES if "/" in name and not name.startswith(".")}
    prose = FENCE.sub("", README)
    assert [folder for folder in sorted(folders) if not re.search(rf"[`(]{folder}/", prose)] == []
    package = ast.get_docstring(ast.parse(read("grpo/__init__.py"))) or ""
    modules = {path.stem for path in (PROJECT / "grpo").glob("*.py")} - {"__init__"}
    assert [module for module in sorted(modules) if not re.search(rf"^    .*\b{module}\b", package, re.M)] == []


def test_every_program_says_what_it_is_for():
    """Modules in their docstring, scripts and configurations in a comment among their first lines."""
    for name in FILES:
        if name.endswith(".py") and not name.startswith("tests/"):
            assert ast.get_docstring(ast.parse(read(name))), name
        elif name.startswith(("launch/", "configs/")) and not name.endswith(".jsonl"):
            assert re.search(r"^(?:# \w|\{#- \w)", "\n".join(read(name).splitlines()[:3]), re.M), name


def test_every_page_is_in_the_index():
    index = README.rsplit("\n## ", 1)[1]
    assert [page for page in PAGES if f"]({page})" not in index] == []


def test_the_readme_is_two_screens():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1800


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (PROJECT / name).parent / path if path else PROJECT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", ENGLISH)
def test_files_and_functions_named_in_prose_exist(name):
    """`grpo/x.py` is a file; `name()`, `Class.name` and `name` followed by "in grpo/x.py" are defined there."""
    text = FENCE.sub("", read(name))
    examples = {"path.py"}
    for path in set(re.findall(r"(?<![\w./])((?:[\w.]+/)*\w+\.(?:py|sh|yaml))\b", text)) - examples:
        assert (PROJECT / path).is_file() or "NAME" in path or path.startswith("my_"), path
    for named, path in re.findall(r"`([\w.]+)(?:\([^`]*\))?` in `?(grpo/[\w/]+\.py)", text):
        for part in named.split("."):
            assert re.search(rf"\b{part}\b", (PROJECT / path).read_text(encoding="utf-8")), (named, path)


def test_every_promise_names_its_test():
    """And the test exists."""
    promised = read("docs/guarantees.md").split("\n## Not promised\n")[0]
    promises = re.findall(r"^- (.+)$", promised, re.M)
    assert len(promises) >= 32
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        assert named, promise
        for file, test in named:
            assert f"def {test}(" in read(file), (file, test)
    assert "](docs/guarantees.md)" in section("README.md", "What is guaranteed")


# --- commands


def flags_in(*paths: Path) -> set[str]:
    """Flags that the sources speak of."""
    return set(re.findall(r"(?<![\w-])--(\w+)", "".join(path.read_text(encoding="utf-8") for path in paths)))


OF_TRAIN = {*vars(Config()), "config", "print_config", "show_prompt", "help"}
OF_INFERENCE = set(re.findall(r'"--(\w+)"', (PROJECT / "inference.py").read_text(encoding="utf-8")))
OF_EVALUATION = set(
    re.findall(r'"--(\w+)"', (PROJECT / "grpo" / "evaluate" / "command.py").read_text(encoding="utf-8"))
)
OF_EXPORT = set(re.findall(r'"--(\w+)"', (PROJECT / "grpo" / "export" / "command.py").read_text(encoding="utf-8")))
# torchrun's, tensorboard's, sbatch's; those of vLLM, of servers (docs/serving.md) and of other trainers
OF_VLLM = {
    "max-logprobs",
    "max-lora-rank",
    "logprobs-mode",
    "trust-request-chat-template",
    "enable-sleep-mode",
    "gpu-memory-utilization",
    "max-model-len",
    "tensor-parallel-size",
    "enable-lora",
    "enforce-eager",
}
OF_SERVERS = {
    "api-key",
    "api_key",
    "chat-template",
    "jinja",
    "logprobs",
    "lora",
    "lora-modules",
    "model_alias",
    "n_ctx",
}
OF_OTHERS = OF_VLLM | OF_SERVERS | {"served-model-name", "standalone", "nproc_per_node", "policy_loss_type"}
OF_OTHERS |= {"gpus-per-node", "logdir", "nodes", "requeue", "signal"}
OF_SCRIPTS = flags_in(
    *(PROJECT / "launch").glob("*.sh"),
    PROJECT / "grpo" / "rollout" / "vllm" / "server.py",
    *(PROJECT / "benchmarks").glob("*.py"),
    *(PROJECT / "demo").glob("*.py"),
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_exists(name):
    """On a line that starts a program, its own flags; elsewhere, anybody's."""
    text = (PROJECT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    planner = OF_TRAIN | flags_in(PROJECT / "grpo" / "plan" / "command.py")
    everybody = planner | OF_INFERENCE | OF_EVALUATION | OF_EXPORT | OF_OTHERS | OF_SCRIPTS
    owners = {"inference.py": OF_INFERENCE, "grpo.plan": planner, "train.py": OF_TRAIN}
    owners["grpo.config"] = flags_in(PROJECT / "grpo" / "config" / "__main__.py")
    owners["grpo.doctor"] = flags_in(PROJECT / "grpo" / "doctor" / "command.py")
    everybody |= owners["grpo.config"] | owners["grpo.doctor"]
    owners["launch/"] = OF_TRAIN | OF_SCRIPTS
    owners["grpo.evaluate"] = OF_EVALUATION
    owners["grpo.export"] = OF_EXPORT
    owners["grpo.view"] = flags_in(PROJECT / "grpo" / "view" / "command.py")
    everybody |= owners["grpo.config"] | owners["grpo.view"]
    for line in text.splitlines():
        flags = {flag.split(".")[0] for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", line)}
        known = everybody
        if re.match(r"(python|torchrun|bash) ", line):
            known = next((own for program, own in owners.items() if program in line), OF_SCRIPTS) | OF_OTHERS
        assert flags <= known, (line, flags - known)


def example_files(name: str) -> dict[str, str]:
    """Files that a document shows whole: the block after a line that ends in `name`:"""
    return dict(re.findall(r"`(my_\w+\.\w+)`:\n\n?```\w+\n(.*?)^```$", read(name), re.M | re.S))


@pytest.mark.parametrize("name", ENGLISH)
def test_commands_name_what_exists(name, tmp_path, monkeypatch):
    """Scripts and modules are there; train.py accepts the settings, beside the examples of README and document."""
    for file, content in {**example_files("README.md"), **example_files(name)}.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    monkeypatch.chdir(tmp_path)
    starts = ("python", "torchrun", "bash")
    bare = [list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)) for words in commands(read(name))]
    known = [words for words in bare if words and words[0] in starts]
    assert known or "```bash" not in read(name)
    for words in known:
        if "-m" in words:
            module = PROJECT / words[words.index("-m") + 1].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words
            continue
        script = next(word for word in words[1:] if not word.startswith("-"))
        assert (PROJECT / script).is_file(), words
        settings = words[words.index(script) + 1 :]
        if script == "train.py" and "--print_config" not in settings:
            load_config(settings)
        elif script in ("launch/single_node.sh", "launch/multi_node.sh"):
            load_config(settings[1:] if settings and settings[0].isdigit() else settings)


def open_example(name: str, folder: Path):
    """The example of a document: its questions, its rewards, and a function that scores (row, text) pairs by name."""
    for file, content in example_files(name).items():
        (folder / file).write_text(content, encoding="utf-8")
    assert {"my_questions.csv", "my_rewards.py", "my_task.yaml"} <= set(example_files(name))
    cfg, _ = load_config(["--config", "my_task.yaml"])
    tokenizer = tiny_tokenizer()
    questions = load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer)
    rewards = open_rewards(dataclasses.replace(cfg, reward_workers=0), print)
    index = {reward.short: k for k, reward in enumerate(rewards.rewards)}

    def scores(name, *pairs):
        samples = [
            RewardInput(questions.items[row].text, text, [1], questions.items[row].columns) for row, text in pairs
        ]
        [answer] = answers_of(rewards, samples, [Call(index[name], tuple(range(len(samples))))])
        assert not any(isinstance(outcome, str) for outcome in answer.outcomes)
        return answer.outcomes

    return questions, rewards, scores


def test_the_example_of_the_readme_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions, _, scores = open_example("README.md", tmp_path)
    assert len(questions.items) == 2
    right, wrong = (0, "5, buys 3: 8, eats 2: 6\n#### 6"), (1, "#### 9")
    assert scores("last_word_reward", right, wrong, (0, "")) == [1.0, 0.0, 0.0]


def test_the_examples_work(tmp_path, monkeypatch):
    """Data, rewards and YAML together: questions are read, each reward scores, None included."""
    monkeypatch.chdir(tmp_path)
    questions, rewards, scores = open_example("docs/task.md", tmp_path)
    assert len(questions.items) == 3
    sees_group = {reward.short: reward.sees_group for reward in rewards.rewards}
    assert sees_group["variety_reward"] and not sees_group["shows_work_reward"]
    assert scores("final_answer_reward", (0, "5, buys 3: 8\n#### 6")) == [1.0]
    assert scores("shows_work_reward", (0, "#### 6")) == [0.0]
    assert scores("two_digits_reward", (2, "2, wins 9: 11, loses 1: 10\n#### 10")) == [1.0]
    assert scores("two_digits_reward", (0, "#### 6")) == [None]
    assert scores("variety_reward", (0, "a"), (0, "a"), (0, "b")) == [0.5, 0.5, 1.0]


# --- style

MAX_LINES, MAX_FUNCTION = 400, 70
MAY_USE_COLLECTIVES = ("grpo/runtime/distributed.py", "grpo/training/backends/", "grpo/run/main.py")


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_collectives_stand_where_they_belong(path):
    uses = re.search(r"torch\.distributed|from torch import .*\bdistributed\b", path.read_text(encoding="utf-8"))
    prose = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert not uses or "torch.distributed" in prose or name_of(path).startswith(MAY_USE_COLLECTIVES)


def dangers(text: str) -> list[str]:
    """What may stand in no file: names of calls and imports, and bare excepts."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            found += [name for name in ("eval", "exec", "torch.load") if ast.unparse(node.func) == name]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in ("pickle", "dill", "marshal", "shelve")]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in ("pickle", "dill", "marshal") else []
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("bare except")
    return found


# what unit_test_reward runs, each in a process of its own: the code (as a program, or not), and a test of the data
RUN_UNIT_TESTS = {"grpo/reward_library/solution_process.py": 2, "grpo/reward_library/unit_tests.py": 1}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_evaluates_or_unpickles(path):
    runs_tests = name_of(path) in RUN_UNIT_TESTS
    assert dangers(path.read_text(encoding="utf-8")) == (["exec"] * RUN_UNIT_TESTS[name_of(path)] if runs_tests else [])


def test_dangers_are_seen():
    """The control of the test above."""
    text = "import pickle, os\ntry:\n    eval('1')\nexcept:\n    torch.load('x')\nmodel.eval()"
    assert sorted(dangers(text)) == ["bare except", "eval", "pickle", "torch.load"]


def test_no_file_is_called_after_nothing():
    nothing = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [f for f in FILES if {*Path(f).parts, Path(f).stem} & nothing] == []
