"""unit_test_reward: what counts as a test, what a test sees, and what code that wants the score without the work gets.

Every attack's score is 0, or what its right part deserves; none is a failure, which would cost less than being wrong.
"""

import json
import os
import re
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.reward_library import solution_process, unit_tests
from grpo.reward_library.unit_test_cases import last_code, read_tests
from grpo.reward_library.unit_tests import unit_test_reward
from grpo.rewards import RewardInput
from grpo.rewards.calls import Call
from grpo.rewards.pool import open_rewards
from tests.support.asking_rewards import answers_of

SQUARES = "assert f(7) == 49\nassert f(-12) == 144"
TIMES = {"timeout_s": 1.0, "total_s": 2.5, "memory_mb": 128}


@pytest.fixture(scope="module")
def pool():
    name = "unit_test_reward"
    cfg = Config(rewards={name: 1.0}, reward_parameters={name: TIMES}, reward_workers=1, reward_memory_mb=1024)
    with closing(open_rewards(cfg, print)) as rewards:
        yield rewards


def outcome(pool, code, tests=SQUARES, **columns):
    inputs = [RewardInput("q", f"So:\n```python\n{code}\n```\n", [1], {"tests": tests, **columns})]
    [answer] = answers_of(pool, inputs, [Call(0, (0,))])
    return answer.outcomes[0]


# --- what it accepts

PAGE = (Path(__file__).with_name("unit_test_code.md")).read_text(encoding="utf-8")
FORMS, ATTACKS = (
    [(head.split(), re.findall(r"^```(\w+)\n(.*?)^```$", body, re.M | re.S)) for head, body in found]
    for found in (re.findall(r"^### (.+)\n((?:(?!^##).*\n?)*)", part, re.M) for part in PAGE.split("\n## ")[1:])
)


@pytest.mark.parametrize("head, blocks", FORMS)
def test_forms_of_tests(pool, head, blocks):
    [(_, code), (language, tests)] = blocks
    assert outcome(pool, code, tests) == float(head[1])
    if language == "json":  # as text, and as the data's own lists
        assert outcome(pool, code, json.loads(tests)) == float(head[1])


def test_the_page_is_read_as_a_whole():
    assert len(FORMS) + len(ATTACKS) == PAGE.count("\n### ") and len(FORMS) >= 20 and len(ATTACKS) >= 30


def test_the_form_of_human_eval(pool):
    check = "def check(candidate):\n    assert candidate(2) == 4\n"
    assert outcome(pool, "def g(x):\n    return x * x", check, entry_point="g") == 1.0
    assert outcome(pool, "def g(x):\n    return x", check, entry_point="g") == 0.0


@pytest.mark.parametrize(
    "tests, says",
    [
        ([], "no tests"),
        (None, "no tests"),
        ("def check(f):\n    assert f(1)", "tests nothing"),
        (["import os"], "tests nothing"),
        ([3], "a test must be"),
        ("assert (", "no Python"),
    ],
)
def test_tests_that_are_none_are_a_failure_that_says_so(pool, tests, says):
    assert says in outcome(pool, "a = 1", tests)
    with pytest.raises(ValueError, match=says):
        list(read_tests(tests))


def test_a_missing_column_and_bad_parameters(pool):
    inputs = [RewardInput("q", "```\na\n```", [1], {})]
    [answer] = answers_of(pool, inputs, [Call(0, (0,))])
    assert "the data has no column 'tests'" in answer.outcomes[0]
    for parameters in ({"column": ""}, {"timeout_s": 0}, {"total_s": -1}, {"memory_mb": 1.5}):
        how = {"unit_test_reward": parameters}
        with pytest.raises(UserError, match=r"rewards: unit_test_reward: .*, got "):
            open_rewards(Config(rewards={"unit_test_reward": 1.0}, reward_parameters=how, reward_workers=0), print)


def test_the_last_closed_fence_counts():
    assert last_code("```python\na\n```\n```py\nb\n```\n```bash\nls\n```") == "b\n"
    assert last_code("```python\na\n```\n```python\nb") == "a\n"
    assert last_code("a") is None and unit_test_reward(["a"], tests=[SQUARES]) == [0.0]


# --- what code without the work gets

RIGHT = "\ndef f(x):\n    return x * x\n"
SLOW = {"loops_at_once", "sleeps", "prints_without_end", "stack_overflow"}  # each ends with its time limit
BY_NAME = {name: (code, set(map(float, scores))) for (name, *scores), [(_, code)] in ATTACKS}
BY_NAME |= {"deep_source": ("(" * 5000, {0.0}), "null": ("\0", {0.0})}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in SLOW else n for n in BY_NAME])
def test_code_without_the_work_gets_nothing(pool, name):
    code, allowed = BY_NAME[name]
    assert outcome(pool, code, "assert f(7) == 49") in allowed


def test_afterwards_right_code_is_right(pool):
    """The control: the tests above leave a worker that still tells right from wrong."""
    assert outcome(pool, RIGHT) == 1.0


@pytest.mark.parametrize(
    "test",
    [
        "assert sorted(f(1)) == [4, 5]",  # by a sorted() of the code
        "assert all(map(lambda x: f(x) == 4, [1, 2]))",  # ended by StopIteration
        "assert abs(f(1) - 3.14) < 1e-6",
        "assert f(1) in (3, 4)",
        "assert f(1) < 5 and f(1) > 3",
        "import math\nassert math.isclose(f(1), 4)",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertAlmostEqual(f(1), 4)",
    ],
)
@pytest.mark.parametrize("how", ["raise StopIteration", "return A()"])
def test_tests_that_ask_more_of_a_result(pool, test, how):
    everything = "\n".join(
        f"    {one} = lambda *a: True" for one in ("__eq__", "__lt__", "__gt__", "__sub__", "__abs__")
    )
    code = f"class A:\n{everything}\n    __iter__ = lambda s: iter([])\ndef f(x):\n    {how}\nsorted = lambda x: [4, 5]"
    assert outcome(pool, code, test) == 0.0


READS = "import re\ndef f(x):\n    return int(re.search(r'f\\(%d\\) == (\\d+)' % x, open({path!r}).read())[1])\n"


def has_landlock():
    import ctypes

    return ctypes.CDLL(None).syscall(solution_process.RULESET, None, ctypes.c_size_t(0), 1) >= 1


@pytest.mark.skipif(not has_landlock(), reason="the kernel has no Landlock: docs/rewards.md says what that means")
def test_the_tests_cannot_be_read_from_files(pool, tmp_path):
    """Nor from /proc; the control reads them where nothing confines it."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"tests": SQUARES}))
    code = READS.format(path=str(path))
    scope = {}
    function = compile(code, "attack", "exec")
    unit_tests.__dict__["__builtins__"]["exec"](function, scope)
    assert scope["f"](7) == 49
    assert outcome(pool, code) == 0.0
    assert outcome(pool, "import os\ndef f(x):\n    return len(os.listdir('/tmp'))", "assert f(1) >= 0") == 0.0
    writes = f"open({str(tmp_path / 'x')!r}, 'w')\n{RIGHT}"
    assert outcome(pool, writes) == 0.0 and not (tmp_path / "x").exists()
    assert outcome(pool, "open('own', 'w').write('1')\nimport numpy, decimal, sqlite3\n" + RIGHT) in (0.0, 1.0)
    assert outcome(pool, "open('own', 'w').write('1')\nimport decimal, json.decoder\n" + RIGHT) == 1.0


def test_a_program_that_prints_too_much_or_starts_others(pool):
    cases = [{"input": "", "output": "1"}]
    assert outcome(pool, "while True:\n    print('1' * 10 ** 6)", cases) == 0.0
    assert outcome(pool, "print(1)\nraise SystemExit(3)", cases) == 0.0
    assert outcome(pool, "print(1)\nimport os\nos._exit(0)", cases) == 0.0  # never flushed
    assert outcome(pool, "import os\nwhile True:\n    os.fork()", cases) == 0.0


def test_all_tests_together_have_a_limit(pool):
    began = time.monotonic()
    assert (
        outcome(pool, "def f(x):\n    while x != 1:\n        pass\n    return 1", ["assert f(1) == 1"] + ["f(2)"] * 20)
        == 1 / 21
    )
    assert 2 < time.monotonic() - began < 6


@pytest.mark.parametrize("then, score", [("", 1.0), ("os._exit(0)\n", 0.0)])
def test_in_the_trainer_nothing_is_left(then, score):
    """Without the isolation of workers it still ends what it started, also where the parent has ended."""
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(4321)\n    os._exit(0)\n" + then + RIGHT
    )
    text = f"```python\n{code}\n```"
    assert unit_test_reward([text], tests=[SQUARES], timeout_s=2.0) == [score]
    marks = [path for path in Path("/proc").glob("[0-9]*/cmdline") if "solution_process" in _read(path)]
    assert marks == [] and os.getpid() != 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if ") Z " in _read(Path(f"/proc/{pid}/stat"))]
    subprocess.run(["sh", "-c", "sleep 0.2 & exit"])  # an orphan of others is not ours any more
    time.sleep(0.4)
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() == children


def _read(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def test_a_call_that_its_code_ends_has_a_score():
    """The mark `if_ended`: a failure would count as no reward, which is better than a wrong answer's."""
    from grpo.rewards.calls import read_answer

    for ended in (b"Tno answer within 1 s", b"Lmore than 64 processes", b'A"its process ended with exit code 0"'):
        assert read_answer(ended, Call(0, (0,)), 0.0).outcomes == [0.0]
        assert isinstance(read_answer(ended, Call(0, (0,))).outcomes[0], str)
    assert re.match("ValueError", read_answer(b'A["ValueError: x"]', Call(0, (0,)), 0.0).outcomes[0])
