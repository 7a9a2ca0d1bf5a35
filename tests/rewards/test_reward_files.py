"""Reward files as users have them: neighbours beside them, one name in two files, any kind of array as return value."""

import array
import collections
import contextlib

import numpy as np
import pytest
import torch

from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.rewards import RewardInput, short_names
from grpo.rewards.calls import Call
from grpo.rewards.functions import weigh
from grpo.rewards.pool import open_rewards
from grpo.training.rollout_metrics import rollout_metrics
from grpo.types import FACTS, Table
from tests.support.asking_rewards import answers_of

INPUT = RewardInput("question", "hi", [1, 2], {"answer": "4"})


def scores(names, workers, before_call=lambda: None):
    """Each function's score of one completion."""
    with contextlib.closing(
        open_rewards(Config(rewards=dict.fromkeys(names, 1.0), reward_workers=workers), print)
    ) as pool:
        before_call()
        return [answer.outcomes[0] for answer in answers_of(pool, [INPUT], [Call(k, (0,)) for k in range(len(names))])]


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


USES = {
    "import": "import helpers\ndef f_reward(completions, **c):\n    return [helpers.VALUE]\n",
    "from": "from helpers import VALUE\ndef f_reward(completions, **c):\n    return [VALUE]\n",
    "late": "def f_reward(completions, **c):\n    from helpers import VALUE\n    return [VALUE]\n",
    "by a name made at run time": "from importlib import import_module\n"
    "def f_reward(completions, **c):\n    return [import_module('help' + 'ers').VALUE]\n",
    "the function itself": "from helpers import f_reward\n",
    "a package": "from pack.inner import VALUE\ndef f_reward(completions, **c):\n    return [VALUE]\n",
    "through another": "import other\ndef f_reward(completions, **c):\n    return [other.helpers.VALUE]\n",
    "a package's relative import": "import pack\ndef f_reward(completions, **c):\n    return [pack.VALUE]\n",
}


def neighbours(folder, value):
    return write(
        folder,
        helpers=f"VALUE = {value}\ndef f_reward(completions, **c):\n    return [VALUE]\n",
        other="import helpers\n",
        pack__in____init__="from .inner import VALUE\n",
        pack__in__inner=f"VALUE = {value}\n",
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_file_imports_its_neighbours_however_it_does(tmp_path, workers):
    """Two folders with modules of the same names: each function gets its own folder's values."""
    names = []
    for i, use in enumerate(USES.values()):
        for value in (3, 5):
            folder = neighbours(tmp_path / f"{i}_{value}", value)
            write(folder, mine=use)
            names.append(f"{folder}/mine.py:f_reward")
    assert scores(names, workers) == [3.0, 5.0] * len(USES)


def test_a_neighbour_is_read_once_like_the_file_itself(tmp_path):
    """It changes, and disappears, before the first call imports it."""
    folder = write(neighbours(tmp_path, 3), mine=USES["late"])
    assert scores([f"{folder}/mine.py:f_reward"], 1, lambda: (folder / "helpers.py").unlink()) == [3.0]


def test_names_that_are_not_neighbours_stay_what_they_are(tmp_path):
    """A json.py beside the file, as anyone may have, is not the json that the file imports."""
    text = "import json, grpo\ndef f_reward(completions, **c):\n    return [len(json.dumps(1)) + len(grpo.__doc__)]\n"
    folder = write(tmp_path, mine=text, json="1/0\n", grpo="1/0\n")
    [score] = scores([f"{folder}/mine.py:f_reward"], 0)
    assert score > 1000


@pytest.mark.parametrize(
    "text, advice",
    [
        ("from .helpers import VALUE\n", "write `import helpers` for the file helpers.py beside it."),
        ("import no_such_thing\n", "Install no_such_thing, or put no_such_thing.py beside that file."),
    ],
)
def test_imports_that_fail_say_what_to_do(tmp_path, text, advice):
    folder = write(neighbours(tmp_path, 3), mine=text)
    with pytest.raises(UserError, match=advice):
        scores([f"{folder}/mine.py:f_reward"], 0)


ONE_NAME = (
    "import dataclasses\n@dataclasses.dataclass\nclass Score:\n    value: float\ndef f_reward(completions, **c):\n"
)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_of_one_name_are_two_modules(tmp_path, workers):
    """A pickle finds a class by its module's name: with one name for both, the first file's would be the second's."""
    text = ONE_NAME + "    import pickle\n    return [pickle.loads(pickle.dumps(Score({value}))).value]\n"
    for value in (1, 2):
        write(tmp_path / str(value), mine=text.replace("{value}", str(value)))
    assert scores([f"{tmp_path}/{value}/mine.py:f_reward" for value in (1, 2)], workers) == [1.0, 2.0]


@pytest.mark.parametrize(
    "names, shown",
    [
        (["a.py:f_reward", "b.py:f_reward"], ["a.f_reward", "b.f_reward"]),
        (["a.py:f_reward", "b.py:g_reward"], ["f_reward", "g_reward"]),
        (["f_reward", "b.py:f_reward", "g_reward"], ["reward_func.f_reward", "b.f_reward", "g_reward"]),
        (["x/a.py:f_reward", "y/a.py:f_reward", "b.py:f_reward"], ["x.a.f_reward", "y.a.f_reward", "b.f_reward"]),
        (["/x/a.py:f_reward", "x/a.py:f_reward"], ["x.a.f_reward", "x.a.f_reward_2"]),
        (["a.py:f_reward", "./a.py:f_reward"], ["a.f_reward", "a.f_reward_2"]),
    ],
)
def test_every_function_has_a_name_of_its_own(names, shown):
    assert list(short_names(names).values()) == shown


def table(names, all_scores, rewards):
    N = len(rewards)
    facts = {name: np.ones(N) for name in FACTS}
    return Table(names, np.array(all_scores), np.array(rewards), facts, 2, None, np.zeros((N, len(names))))


def test_two_functions_of_one_name_have_two_curves():
    """Before, the second one's mean of 5 was written over the first one's 1."""
    metrics = rollout_metrics(table(["a.py:f", "b.py:f"], [[1.0, 5.0]] * 2, [6.0, 6.0]), np.zeros(2), 10)
    assert metrics["reward/a.f/mean"] == 1.0 and metrics["reward/b.f/mean"] == 5.0
    assert {"reward/a.f/failures", "reward/b.f/failures", "reward/a.f/std"} <= metrics.keys()


def test_no_reward_has_no_mean():
    """A mean of 0 would be a point on the curve. The control: one row with a reward has one."""
    nan = float("nan")
    none = rollout_metrics(table(["f"], [[nan], [nan]], [nan, nan]), np.zeros(2), 10)
    assert not {"reward/mean", "reward/std", "reward/f/mean"} & none.keys() and none["reward/zero_std_groups"] == 1
    assert rollout_metrics(table(["f"], [[nan], [4.0]], [nan, 4.0]), np.zeros(2), 10)["reward/mean"] == 4.0


RETURNED = {
    "tensor": torch.tensor([1.0, 2.0]),
    "bf16 tensor with gradient": torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
    "column of logits": torch.tensor([[1.0], [2.0]]),
    "integers": torch.tensor([1, 2]),
    "list of scalars": [torch.tensor(1.0), np.float32(2.0)],
    "list of columns": [torch.tensor([1.0]), torch.tensor([2])],
    "numpy": np.array([1, 2], dtype=np.int8),
    "numpy objects": np.array([1, 2.0], dtype=object),
    "array": array.array("f", [1.0, 2.0]),
    "tuple": (1, 2),
    "range": range(1, 3),
    "generator": (float(i) for i in (1, 2)),
    "map": map(float, "12"),
    "deque": collections.deque([1, 2]),
    "values of a dict": {"a": 1, "b": 2}.values(),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_a_function_may_return(kind):
    assert weigh(RETURNED[kind], 2) == [1.0, 2.0]


@pytest.mark.parametrize(
    "returned, reason",
    [
        (torch.tensor(1.0), "returned Tensor, expected a list"),
        (np.float64(1.0), "returned float64, expected a list"),
        ({1.0, 2.0}, "returned set, expected a list"),
        ({"a": 1, "b": 2}, "returned dict, expected a list"),
        (b"ab", "returned bytes, expected a list"),
        (torch.tensor([1.0, 2.0, 3.0]), "returned 3 scores for 2"),
        ((1 for _ in range(1)), "returned 1 scores for 2"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "expected a number or None"),
        (torch.tensor([float("nan"), float("inf")]), "expected a finite number"),
    ],
)
def test_what_it_may_not_return(returned, reason):
    """An order of its own, or no order at all, would give scores to the wrong completions."""
    outcomes = weigh(returned, 2)
    assert len(outcomes) == 2 and reason in outcomes[0]


def test_none_and_booleans_in_arrays():
    assert weigh(np.array([None, True], dtype=object), 2) == [None, 1.0]
    assert weigh(torch.tensor([False, True]), 2) == [0.0, 1.0]


@pytest.mark.full
def test_a_worker_returns_tensors(tmp_path):
    """torch is imported in the worker, within its limits."""
    text = "import torch\ndef f_reward(completions, **c):\n    return torch.tensor([len(t) for t in completions])\n"
    assert scores([f"{write(tmp_path, mine=text)}/mine.py:f_reward"], 1) == [2.0]
