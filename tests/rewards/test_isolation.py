"""Rewards that hang, die, fork, allocate and forge: each costs its own completion's score, and nothing else.

Attacks are in hostile_rewards.py. Every one runs among completions that must be scored as usual, in workers with
namespaces, and (long tier) without.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import reward_func
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.rewards import RewardInput, supervisor_handle
from grpo.rewards.calls import Call
from grpo.rewards.pool import InProcess, Pool, open_rewards
from grpo.rewards.sandbox import WITHOUT_NAMESPACES
from tests.support import hostile_rewards
from tests.support.asking_rewards import answers_of
from tests.support.launcher import PROJECT
from tests.support.tiers import sampled, short

HOSTILE = str(Path(hostile_rewards.__file__))
TIMEOUT_S, MEMORY_MB = 1.5, 256
LATE = "no answer within"
TOO_MANY = (1.0, "more than 64 processes", "more than 256 MB")  # whatever is noticed first
ATTACKS = {  # name -> what the failure says, or the score
    "loop": LATE,
    "regex": LATE,
    "deaf": LATE,
    "c_loop": LATE,
    "power": LATE,
    "stops_itself": LATE,
    "exits_hard": "ended with exit code 0",
    "system_exit": "SystemExit",
    "interrupt": "KeyboardInterrupt",
    "base_exception": "Outside: not an Exception",
    "recursion": "RecursionError",
    "stack_overflow": ("SIGSEGV", "RecursionError", LATE),
    "segfault": "SIGSEGV",
    "bomb": TOO_MANY,
    "daemon": 1.0,
    "ten_gigabytes": "MemoryError",
    "many_megabytes": "more than 256 MB",
    "prints": 1.0,
    "writes": ("File too large", LATE),
    "long_text": "returned str",
    "long_list": "returned 1000000 scores for 1",
    "closes": "ended with exit code",
    "odd_object": "Odd (no repr: RuntimeError)",
    "kills_parent": (LATE, "ended from outside"),
    "patches": (1.0, 99.0, "exit code"),
    "forges": (1.0, 99.0),
    "traces": 0.0,
    "kills_worker": ("SIGKILL", LATE),
    "chokes": 1.0,
    "code_exits": "exit code 0",
    "code_bomb": TOO_MANY,
    "code_hangs": LATE,
}
WITHOUT = [name for name in ATTACKS if name not in ("traces", "kills_worker", "kills_parent", "chokes")]
# without namespaces a user's own processes can be reached: what those four try is not prevented there


def input_of(text, **columns):
    own = {"trainer": os.getpid(), "namespace": os.stat("/proc/self/ns/pid").st_ino}
    return RewardInput("question", text, [1, 2], {"answer": "4", **own, **columns})


def cfg_of(names, file=HOSTILE, **how):
    rewards = {f"{file}:{name}": 1.0 for name in names}
    return Config(
        rewards=rewards, **{"reward_timeout_s": TIMEOUT_S, "reward_memory_mb": MEMORY_MB, "reward_workers": 1, **how}
    )


@contextlib.contextmanager
def opened(cfg):
    """A pool that is closed, whatever happens."""
    with contextlib.closing(open_rewards(cfg, print)) as pool:
        yield pool


def outcomes(pool, k, *inputs):
    """One call for each input."""
    answers = answers_of(pool, inputs, [Call(k, (i,)) for i in range(len(inputs))])
    return [answer.outcomes[0] for answer in answers]


def left(trainer=None):
    """Processes of this test's reward workers that run anywhere on the machine, zombies not included."""
    marks = (f"grpo.rewards.supervisor\0{trainer or os.getpid()}\0", f"sleep\0{hostile_rewards.SECONDS}\0")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if any(mark in (folder / "cmdline").read_text() for mark in marks):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def zombies():
    """Descendants of this process that have ended and were not reaped."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            parents[int(folder.name)] = (state, int(parent))
    ours, before = {os.getpid()}, 0
    while len(ours) != before:
        before = len(ours)
        ours |= {pid for pid, (_, parent) in parents.items() if parent in ours}
    return [pid for pid in ours if parents.get(pid, "?")[0] == "Z"]


def gone(count, within_s=20.0):
    """Whether `count()` becomes empty in time."""
    deadline = time.monotonic() + within_s
    while (there := count()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not there


@pytest.fixture
def nothing_left():
    """Every process that the test starts ends."""
    before = set(left())
    yield
    assert gone(lambda: set(left()) - before)


class Figures:
    """Durations and counts of the attacks, for the table under -s."""

    def __init__(self):
        self.overruns, self.tried, self.forged, self.zombies = [], 0, 0, 0

    def show(self, title):
        low, high = np.percentile(self.overruns, [50, 99]) if self.overruns else (0.0, 0.0)
        print(
            f"\n{title}: attacks {self.tried}; overrun of the deadline, ms: p50 {1e3 * low:.0f}, "
            f"p99 {1e3 * high:.0f}; forged {self.forged}; zombies {self.zombies}"
        )


@pytest.fixture(scope="module", params=["namespaces", pytest.param("without", marks=pytest.mark.full)])
def arena(request):
    """A pool with every attack, in one worker; afterwards no process of it may be left."""
    before, notices = set(left()), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WITHOUT_NAMESPACES, "1" if request.param == "without" else "")
        pool = open_rewards(cfg_of(ATTACKS), notices.append)
    figures = Figures()
    yield pool, request.param, figures
    figures.zombies = len(zombies())
    pool.close()
    figures.show(request.param)
    assert len(notices) == (request.param == "without"), "a run reports when there are no namespaces"
    assert figures.forged == figures.zombies == 0
    assert gone(lambda: set(left()) - before) and not zombies()


HANGS = [name for name, outcome in ATTACKS.items() if outcome == LATE]  # each takes the whole time limit


@pytest.mark.parametrize("name", short(ATTACKS, {*ATTACKS} - {*HANGS} | {*sampled(HANGS, 3, seed=1)}))
def test_an_attack_costs_its_own_sample_only(arena, name):
    pool, kind, figures = arena
    if kind == "without" and name not in WITHOUT:
        pytest.skip("not prevented without namespaces")
    k = list(ATTACKS).index(name)
    start_s = time.monotonic()
    first, outcome, *rest = outcomes(pool, k, *map(input_of, ("before", "attack", "after", "hi", "later")))
    took_s = time.monotonic() - start_s
    expected = ATTACKS[name] if isinstance(ATTACKS[name], tuple) else (ATTACKS[name],)
    assert any(outcome == e if isinstance(e, float) else isinstance(outcome, str) and e in outcome for e in expected)
    figures.tried += 1
    figures.forged += [first, *rest] != [6.0, 5.0, 2.0, 5.0]
    if isinstance(outcome, str) and LATE in outcome:
        figures.overruns.append(took_s - TIMEOUT_S)
    assert [first, *rest] == [6.0, 5.0, 2.0, 5.0]
    assert took_s < TIMEOUT_S + 20


@pytest.mark.parametrize("name", ["bomb", "daemon", "code_bomb", "forges"])
def test_what_a_call_leaves_behind_ends_with_it(arena, name):
    pool, _, _ = arena
    harmless = [Call(list(ATTACKS).index(name), (0,)) for name in ("loop", "code_hangs")]  # one for each worker
    answers_of(pool, [input_of("hi")], harmless)
    before = len(left())
    outcomes(pool, list(ATTACKS).index(name), input_of("attack"))
    answers_of(pool, [input_of("hi")], harmless)
    assert gone(lambda: left()[before:])


def test_there_is_no_network(nothing_left):
    """The control: a worker without namespaces connects."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        port = server.getsockname()[1]
        with opened(cfg_of(["connects"])) as pool:
            assert "Network is unreachable" in outcomes(pool, 0, input_of("hi", port=port))[0]
        patch.setenv(WITHOUT_NAMESPACES, "1")
        with opened(cfg_of(["connects"])) as pool:
            assert outcomes(pool, 0, input_of("hi", port=port)) == [1.0]


def test_the_environment_is_scrubbed_and_the_folder_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setenv("RANK", "0")
    with opened(cfg_of(["environment"])) as pool:
        assert outcomes(pool, 0, input_of("hi")) == [0.0]
        folders = [supervisor.folder for supervisor in pool.supervisors]
    assert not any(folder.exists() for folder in folders)
    assert hostile_rewards.environment(["hi"])[0] >= 2  # the control: this process has both


def test_a_function_that_runs_code_gets_a_process_for_each_call():
    with opened(cfg_of(["counts"])) as pool:
        assert outcomes(pool, 0, *map(input_of, "abc")) == [1.0, 1.0, 1.0]
    plain = InProcess.of({"counts": hostile_rewards.counts})
    assert outcomes(plain, 0, *map(input_of, "abc")) == [1.0, 2.0, 3.0]  # the control


# --- what becomes of the workers


OWNER = """
import os, sys, time
from grpo.config.settings import Config
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import open_rewards
pool = open_rewards(Config(rewards={sys.argv[1]: 1.0}, reward_timeout_s=1000.0), print)
started = time.monotonic()
def pulse():
    if time.monotonic() > started + 1.5:
        print("busy", flush=True)
        sys.stdin.read(1)
    return False
pool.begin()
pool.submit([RewardInput("", "attack", [], {})] * 2, [Call(0, (0,)), Call(0, (1,))])
pool.collect(pulse)
"""


@pytest.mark.parametrize("without", ["", "1"], ids=["namespaces", "without"])
def test_a_trainer_that_is_killed_takes_everything_along(without):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, f"{HOSTILE}:stubborn"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=PROJECT,
        env={**os.environ, WITHOUT_NAMESPACES: without, "PYTHONPATH": str(PROJECT)},
        text=True,
    )
    with owner:
        while (line := owner.stdout.readline()) and line != "busy\n":
            pass
        there = left(owner.pid)
        for pid in there:
            os.kill(pid, signal.SIGTERM)  # they ignore it: the trainer ends them
        time.sleep(0.2)
        assert len(there) >= 10 and set(there) <= set(left(owner.pid))
        owner.kill()
    assert gone(lambda: left(owner.pid))


def test_a_request_to_stop_leaves_the_rest_undone_at_once(nothing_left):
    inputs = [input_of("hi"), *[input_of("attack")] * 3]
    started, beats = time.monotonic(), []

    def pulse():
        beats.append(time.monotonic())
        return time.monotonic() > started + 1

    with opened(cfg_of(["loop"], reward_timeout_s=1000.0, reward_workers=2)) as pool:
        answers = answers_of(pool, inputs, [Call(0, (i,)) for i in range(4)], pulse)
        assert answers[1:] == [None] * 3 and beats[-1] > started + 1
        assert np.median(np.diff(beats)) < 0.2
        assert outcomes(pool, 0, input_of("again")) == [5.0]  # and it can go on


def test_supervisors_that_are_killed_cost_one_call_each_and_are_replaced(nothing_left):
    killed = []

    def pulse():
        if not killed and all(supervisor.busy for supervisor in pool.supervisors):
            time.sleep(0.3)
            killed.extend(supervisor.process for supervisor in pool.supervisors)
            for process in killed:
                process.kill()
        return False

    inputs = [input_of("attack"), input_of("abc"), input_of("attack"), input_of("abcd")]
    calls = [Call(0, (i,)) for i in range(4)]
    with opened(cfg_of(["code_hangs"], reward_timeout_s=1000.0, reward_workers=2)) as pool:
        given = [answer.outcomes[0] for answer in answers_of(pool, inputs, calls, pulse)]
    assert given[1] == 3.0 and given[3] == 4.0
    assert all("ended from outside" in given[i] for i in (0, 2))


def test_a_new_worker_runs_the_text_that_was_read_at_the_start(tmp_path):
    file = tmp_path / "mine.py"
    text = (
        "import os\n\n\ndef reward(completions, **columns):\n"
        "    if completions == ['attack']:\n        os._exit(0)\n    return [1.0]\n"
    )
    file.write_text(text)
    with opened(cfg_of(["reward"], file=file)) as pool:
        file.write_text(text.replace("1.0", "2.0"))
        first, killed, last = outcomes(pool, 0, *map(input_of, ("a", "attack", "a")))
    assert (first, last) == (1.0, 1.0) and "exit code 0" in killed


@pytest.mark.parametrize(
    "text, error",
    [
        (
            "import nowhere_at_all.inner\n",
            r"importing .* raised ModuleNotFoundError: No module named 'nowhere_at_all'; install it \(pip install "
            r"nowhere_at_all, .*\), or put nowhere_at_all.py beside the file",
        ),
        ("import json.more\n", "No module named 'json.more'; the json that is installed lacks it, so install the"),
        ("raise SystemExit(3)\n", "importing .* raised SystemExit: 3"),
        ("import os\nos._exit(5)\n", "importing the reward functions failed: its process ended with exit code 5"),
        ("while True:\n    pass\n", "importing the reward functions failed: no answer within 1.5 s"),
        ("def other_reward(**columns):\n    pass\n", "mine.py has no function 'reward'. It has: other_reward."),
        ("def broken(:\n", "importing .* raised SyntaxError"),
    ],
    ids=["module", "inner module", "exit", "dies", "hangs", "misnamed", "syntax"],
)
def test_a_file_that_cannot_be_imported_is_one_clear_error(nothing_left, tmp_path, monkeypatch, text, error):
    monkeypatch.setattr(supervisor_handle, "IMPORT_S", 1.5)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=error):
        Pool(cfg_of(["reward"], file=tmp_path / "mine.py"), print)


def test_a_module_that_is_missed_in_a_call_or_in_prepare_gets_the_same_advice(nothing_left, tmp_path):
    """The control: another exception is passed on as it is."""
    text = "def reward(**columns):\n    import nowhere_at_all\n\ndef other(**columns):\n    raise ImportError('x')\n"
    (tmp_path / "mine.py").write_text(text)
    with opened(cfg_of(["reward", "other"], file=tmp_path / "mine.py")) as pool:
        [late] = outcomes(pool, 0, input_of("a"))
        [plain] = outcomes(pool, 1, input_of("a"))
    assert late.endswith("put nowhere_at_all.py beside the file") and plain == "ImportError: x"
    (tmp_path / "mine.py").write_text(text + "\nreward.prepare = reward\n")
    with pytest.raises(UserError, match=r"preparing it raised .*put nowhere_at_all.py beside the file"):
        Pool(cfg_of(["reward"], file=tmp_path / "mine.py"), print)


# --- the same scores


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_bit_equal_to_those_in_process(workers):
    lines = (
        (Path(__file__).parents[1] / "reward_library" / "reward_golden.jsonl").read_text(encoding="utf-8").splitlines()
    )
    rows = [row for row in map(json.loads, lines) if row["seed"] == "001"]
    names = ["final_answer_reward", "correctness_reward", "digit_reward", "hard_format_reward", "mark_reward"]
    inputs = [RewardInput("?", row["completion"], [1], {"answer": row["answer"]}) for row in rows]
    calls = [Call(k, (i,)) for k in range(len(names)) for i in range(len(inputs))]
    in_process = InProcess.of({name: getattr(reward_func, name) for name in names})
    with opened(Config(rewards=dict.fromkeys(names, 1.0), reward_workers=workers)) as pool:
        assert answers_of(pool, inputs, calls) == answers_of(in_process, inputs, calls)


MATH_VERIFY = """
from math_verify import parse, verify


def reward(completions, **columns):
    return [float(verify(parse("$4$", parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))
            for text in completions]
"""


@pytest.mark.full
def test_the_string_that_hangs_math_verify(tmp_path):
    """huggingface/Math-Verify#65, its own time-out being off."""
    pytest.importorskip("math_verify", reason="pip install math-verify[antlr4_13_2]")
    (tmp_path / "mine.py").write_text(MATH_VERIFY)
    hang = r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})} - 4)} - 5}{16}}"
    with opened(cfg_of(["reward"], file=tmp_path / "mine.py", reward_timeout_s=10.0, reward_memory_mb=2048)) as pool:
        assert outcomes(pool, 0, *map(input_of, ("$4$", hang, "$5$"))) == [1.0, "no answer within 10 s", 0.0]
