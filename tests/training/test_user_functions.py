"""Functions of the user's own for weighting, advantage and group filter: used as they are, refused in one line."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from grpo.config.checks import check
from grpo.config.settings import Config
from grpo.errors import UserError
from grpo.runtime.distributed import World
from grpo.training.draws import filter_of, varied_groups
from grpo.training.exchange import deliver
from grpo.training.losses import WEIGHTINGS
from grpo.training.metrics import Tally
from grpo.training.minibatches import make_plan
from grpo.training.scoring import advantages_of
from grpo.training.user_functions import UserFunction
from grpo.training.user_table_functions import check_equal, check_functions, load_weighting, tiny_table
from tests.support.jobs import fork_server
from tests.support.launcher import PROJECT, fork_script, metrics_of
from tests.support.rank_jobs import config, injected, make_policy, table_of

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
NEEDED = dict(model="m", data="d", rewards={"mark_reward": 1.0, "b_reward": 0.5})
ARGUMENTS = {
    "weighting": "num_trained, max_length",
    "advantage": "rewards, scores, lengths",
    "group_filter": "rewards, scores, lengths, truncated",
}


def own(tmp_path, setting, body, arguments=None, **more):
    """Settings with a function of this body; each file in a folder of its own, because files are read once."""
    file = tmp_path / "own.py"
    arguments = arguments or ARGUMENTS[setting]
    file.write_text(f"import numpy as np\n\ndef mine({arguments}):\n    {body}\n")
    if setting == "group_filter":
        more.setdefault("filter_groups", "drop")
    return Config(**NEEDED, **{setting: f"{file}:mine"}, **more)


# --- what they compute


@pytest.mark.parametrize(
    "name, body",
    [
        ("grpo", "return 1 / (len(num_trained) * num_trained)"),
        ("dapo", "return [1 / num_trained.sum()] * len(num_trained)"),
        ("dr_grpo", "return np.full(len(num_trained), 1 / (len(num_trained) * max_length))"),
    ],
)
def test_the_three_weightings_written_by_hand_give_the_same_weights(tmp_path, name, body):
    """Row 1 has no trained token: 1 / 0 there is nothing that a weight could act on."""
    cfg = own(tmp_path, "weighting", body)
    counts = [3, 0, 5, 8]
    plain = load_weighting(dataclasses.replace(cfg, weighting=name), ALONE)(counts, 8)
    found = load_weighting(cfg, ALONE)(counts, 8)
    assert found[1] == 0.0 and [found[n] for n in (0, 2, 3)] == pytest.approx([plain[n] for n in (0, 2, 3)], rel=1e-15)
    assert set(check_functions(cfg)) == {"surrogate_source", "weighting_source"}


def gradient_of_a_step(cfg):
    """The gradient of one step on injected completions."""
    policy = make_policy(cfg, ALONE)
    prompts, completions, advantages = injected(cfg, 0)
    lengths = np.array([len(completion.token_ids) for completion in completions])
    plan = make_plan(cfg, prompts, lengths, advantages, 1)
    [batch] = deliver(
        ALONE, cfg, plan, prompts, completions, table_of(cfg, lengths, np.zeros(len(lengths))), advantages
    )
    sum(policy.loss(micro, Tally(), True) for micro in batch).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in policy.model.parameters() if parameter.grad is not None]
    )


def test_a_step_is_trained_with_the_weights_of_the_function(tmp_path):
    """That of dapo by hand gives dapo's gradient; the control, grpo's, gives another."""
    value = own(tmp_path, "weighting", "return np.full(len(num_trained), 1 / num_trained.sum())").weighting
    mine, dapo, grpo = (gradient_of_a_step(config(weighting=name)) for name in (value, "dapo", "grpo"))
    torch.testing.assert_close(mine, dapo)
    assert float((mine - grpo).norm() / grpo.norm()) > 1e-2


def test_an_advantage_gets_the_step_as_a_grid_and_rows_without_a_reward_get_0(tmp_path):
    """The function returns a number for those rows too."""
    body = (
        "return np.nan_to_num(rewards - np.nanmean(rewards, 1, keepdims=True) + scores['b_reward']) + 1000.0 * lengths"
    )
    cfg = own(tmp_path, "advantage", body)
    assert "advantage_source" in check_functions(cfg)
    table = tiny_table(cfg)
    rewards, lengths = table.grouped, table.lengths.reshape(table.grouped.shape)
    given = table.scores[:, 1].reshape(rewards.shape)
    expected = rewards - np.nanmean(rewards, 1, keepdims=True) + given + 1000 * lengths
    found = advantages_of(table, cfg).reshape(rewards.shape)
    assert np.isnan(rewards[2, -1]) and found[2, -1] == 0.0
    known = ~np.isnan(rewards)
    np.testing.assert_allclose(found[known], expected[known])


def test_a_function_cannot_change_the_table(tmp_path):
    body = "rewards[:] = 0; scores['mark_reward'][:] = 0; lengths[:] = 0; return rewards"
    cfg = own(tmp_path, "advantage", body)
    table, untouched = tiny_table(cfg), tiny_table(cfg)
    assert not advantages_of(table, cfg).any()
    np.testing.assert_array_equal(table.grouped, untouched.grouped)
    np.testing.assert_array_equal(table.scores, untouched.scores)
    np.testing.assert_array_equal(table.lengths, untouched.lengths)


def test_a_filter_sees_which_completions_were_cut(tmp_path):
    cfg = own(tmp_path, "group_filter", "return ~truncated.any(1)")
    assert "group_filter_source" in check_functions(cfg)
    table = tiny_table(cfg)
    table.facts["stopped"][:] = 1
    table.facts["stopped"][0] = 0  # group 0: cut
    table.facts["stopped"][5], table.facts["broken"][5] = 0, 1  # group 1: an error, not a cut
    assert filter_of(cfg, ALONE)(table).tolist() == [False, True, True]
    assert filter_of(Config(), ALONE) is varied_groups and varied_groups(table).tolist() == [True, False, True]


# --- what is refused

BAD = {
    ("weighting", "raises"): ("raise ValueError('two\\nlines')", "raised ValueError: two lines. Fix it."),
    ("weighting", "scalar"): ("return 1.0", "must return a weight for each row, numbers of shape [3], got []."),
    ("weighting", "text"): ("return 'abc'", "must return a weight for each row, numbers of shape [3], got"),
    ("weighting", "booleans"): ("return num_trained > 0", "must return a weight for each row, numbers of shape [3]"),
    ("weighting", "nothing"): ("return None", "must return a weight for each row"),
    ("weighting", "negative"): ("return -1.0 / num_trained", "negative or not finite"),
    ("weighting", "not finite"): ("return num_trained / 0", "negative or not finite"),
    ("weighting", "zero"): ("return 0.0 * num_trained", "the weight 0 for every row"),
    ("advantage", "shape"): (
        "return rewards.ravel()",
        "must return an advantage for each row, numbers of shape [3, 4]",
    ),
    ("advantage", "not finite"): (
        "return (rewards - np.nanmean(rewards, 1, keepdims=True)) / np.nanstd(rewards, 1, keepdims=True)",
        "returned an advantage that is not finite",
    ),
    ("advantage", "raises"): ("return scores['nothing']", "raised KeyError: 'nothing'"),
    ("group_filter", "numbers"): ("return rewards.sum(1)", "must return whether each group is kept, true or false"),
    ("group_filter", "shape"): ("return truncated", "true or false of shape [3], got [3, 4]"),
}


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("setting, name", BAD)
def test_a_function_that_gives_something_else_is_refused_in_one_line(tmp_path, setting, name):
    body, said = BAD[setting, name]
    cfg = own(tmp_path, setting, body)
    check(cfg)
    with pytest.raises(UserError) as error:
        check_functions(cfg)
    assert str(error.value).startswith(f"{setting}: ") and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ARGUMENTS)
def test_files_names_and_arguments(tmp_path, setting):
    for value, said in {
        "nowhere/own.py:f": "no such Python file 'nowhere/own.py'",
        "README.md:f": "no such Python file 'README.md'",
        "reward_func.py:nothing": "reward_func.py has no function 'nothing'",
    }.items():
        with pytest.raises(UserError, match=f"^{setting}: {re.escape(said)}"):
            check_functions(Config(**NEEDED, **{setting: value}))
    with pytest.raises(UserError, match=f"^{setting}: .*own.py cannot be imported: SyntaxError"):
        check_functions(own(tmp_path, setting, "return ("))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=f"^{setting}: .* raised TypeError: .*unexpected keyword argument"):
        check_functions(own(tmp_path / "b", setting, "return x", arguments="x"))
    (tmp_path / "c").mkdir()
    takes_all = {"weighting": "num_trained", "advantage": "rewards", "group_filter": "truncated"}[setting]
    body = f"return {takes_all}" + ("[:, 0]" if setting == "group_filter" else "")
    check_functions(own(tmp_path / "c", setting, body, arguments=f"{takes_all}, **others"))


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"weighting": "bnpo"},
            "weighting: must be one of grpo, dapo, dr_grpo, or path/to/file.py:function, got 'bnpo'",
        ),
        ({"group_filter": "x"}, "group_filter: must be one of zero_variance, or path/to/file.py:function, got 'x'"),
        ({"advantage": "group"}, "advantage: must be path/to/file.py:function, got 'group'"),
        ({"surrogate": "ppo"}, "surrogate: must be one of ppo_clip, cispo, sapo, gmpo, reinforce, or path/to/file.py"),
        ({"group_filter": "my.py:f"}, "group_filter: it acts with filter_groups drop or resample, got keep"),
        (
            {"advantage": "my.py:f", "baseline": "batch"},
            "baseline: the function of advantage takes its place, got batch",
        ),
        ({"advantage": "my.py:f", "scale_rewards": "none"}, "scale_rewards: the function of advantage takes its place"),
        ({"advantage": "my.py:f", "normalize_each_reward": True}, "normalize_each_reward: the function of advantage"),
        ({"advantage": "my.py:f", "advantage_clip": 5.0}, "advantage_clip: the function of advantage takes its place"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(UserError) as error:
        check(Config(**NEEDED, **settings))
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_what_is_wrong_only_later_ends_the_run_in_one_line(tmp_path):
    cfg = own(tmp_path, "weighting", "return [1.0 if n < 6 else float('nan') for n in num_trained]")
    check_functions(cfg)
    with pytest.raises(UserError, match=r"^weighting: .* negative or not finite"):
        load_weighting(cfg, ALONE)([3, 7], 8)


# --- a whole run, and the page


def blocks():
    """The examples of the page: file name -> text."""
    page = (PROJECT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^`(my_\w+\.py)`:\n\n```python\n(.*?)```", page, re.S | re.M))


def command_of(tmp_path, steps, **settings):
    more = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    folders = ["--output_dir", str(tmp_path / "o"), "--runs_dir", str(tmp_path / "r")]
    command = [
        "--config",
        "configs/demo.yaml",
        "--eval_data",
        "null",
        "--batch_size",
        "2",
        "--max_generate_length",
        "8",
    ]
    command += ["--report_to", "none", "--num_threads", "1", "--lr_schedule", "constant", "--max_steps", str(steps)]
    return [*command, *folders, *more]


def run_of(tmp_path, steps, **settings):
    return fork_script("train.py", *command_of(tmp_path, steps, **settings))


def test_the_examples_of_the_page_train_and_their_text_belongs_to_the_run(tmp_path):
    """All four at once; then one file after the other is changed, and the resume is refused by name."""
    files = blocks()
    names = {name: re.search(r"^def (\w+)", text, re.M)[1] for name, text in files.items()}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    value = {name: f"{tmp_path}/{name}:{function}" for name, function in names.items()}
    settings = {
        "surrogate": value["my_loss.py"],
        "weighting": value["my_weighting.py"],
        "advantage": value["my_advantage.py"],
        "group_filter": value["my_filter.py"],
        "filter_groups": "resample",
        "max_rounds": 2,
    }
    assert len(files) == 4
    done = run_of(tmp_path, 1, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any("surrogate/bounded" in line for line in metrics_of(tmp_path / "r"))
    for name, setting in {
        "my_weighting.py": "weighting",
        "my_advantage.py": "advantage",
        "my_filter.py": "group_filter",
    }.items():
        (tmp_path / name).write_text(files[name] + "\n# changed\n")
        done = run_of(tmp_path, 2, **settings)
        assert done.returncode == 2 and f"{setting}_source has changed" in done.stderr, done.stderr[-2000:]
        (tmp_path / name).write_text(files[name])
    done = run_of(tmp_path, 2, **settings)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr[-2000:]


OF_A_RANK = {  # body, other settings
    "weighting": ("return np.full(len(num_trained), (1 + 1e-6 * RANK) / num_trained.sum())", {}),
    "advantage": ("return np.nan_to_num(rewards - np.nanmean(rewards, 1, keepdims=True)) + lengths * 1e-6 * RANK", {}),
    "group_filter": ("return np.arange(len(rewards)) != RANK", {"filter_groups": "resample", "max_rounds": 2}),
}


@pytest.mark.parametrize("same", [False, True], ids=["differs", "control"])
@pytest.mark.parametrize("setting", OF_A_RANK)
def test_ranks_that_get_different_results_end_in_one_line(tmp_path, setting, same):
    """Neither rank waits for the other. Control: the same function with one value on both.

    The launcher ends a rank that is still closing when the other one has left, so one of the codes may be SIGTERM's.
    """
    body, more = OF_A_RANK[setting]
    rank = "0" if same else "int(os.environ['RANK'])"
    (tmp_path / "own.py").write_text(
        f"import os\n\nimport numpy as np\n\nRANK = {rank}\n\n\ndef mine({ARGUMENTS[setting]}):\n    {body}\n"
    )
    job = fork_server().launch(
        str(PROJECT / "train.py"),
        command_of(tmp_path, 1, **{setting: f"{tmp_path}/own.py:mine"}, **more),
        2,
        torchrun=True,
        cwd=PROJECT,
    )
    codes = job.wait(120)
    errors = [line for rank in range(2) for line in job.text(rank, "err").splitlines() if line.startswith("error:")]
    if same:
        assert codes == [0, 0] and not errors
        return
    assert 2 in codes and {*codes} <= {2, -15}
    if codes[0] != 2:
        return  # rank 0, which speaks for both, was ended
    assert len(errors) == 1 and errors[0].startswith(
        f"error: {setting}: {tmp_path}/own.py:mine returned one result on rank 0 and another on"
    )


class Ranks(World):
    """A rank beside another one, whose row of a gather is given."""

    def gather_rows(self, row):
        return np.stack([row, self.waits(row)])


@pytest.mark.parametrize(
    "values, equal",
    [
        ([1.0, -2.0, 0.0], True),
        ([1.0 + 1e-13, -2.0, 0.0], True),  # rounding
        ([1.0 + 1e-6, -2.0, 0.0], False),
        ([-2.0, 1.0, 0.0], False),  # another order
        ([1.0, -2.0, 1e-30], False),  # a row that one rank would compute and the other would not
        ([1.0, -2.0], False),
    ],
)
def test_results_are_equal_up_to_rounding(tmp_path, values, equal):
    own = UserFunction("advantage", "own.py:mine", len, "")
    found = []
    second = Ranks(1, 2, 1, 2, torch.device("cpu"), waits=lambda row: found.append(row) or row)
    check_equal(second, own, np.array([values]))
    first = Ranks(0, 2, 0, 2, torch.device("cpu"), waits=lambda row: found[0])
    if equal:
        check_equal(first, own, np.array([[1.0, -2.0, 0.0]]))
    else:
        with pytest.raises(UserError, match="another on rank 1, from the same numbers"):
            check_equal(first, own, np.array([[1.0, -2.0, 0.0]]))


def test_a_run_without_own_functions_has_no_further_fingerprints():
    """So checkpoints of older versions resume."""
    assert check_functions(Config(**NEEDED)) == {"surrogate_source": ""}
    assert all(check_functions(Config(**NEEDED, weighting=name)) == {"surrogate_source": ""} for name in WEIGHTINGS)
