"""What start-up says of questions that are not trained on: dropped by a rule, or held out."""

import json

import pytest

from grpo.config.settings import Config
from grpo.data.questions import length_summary, load_questions
from grpo.data.recipe import Recipe
from grpo.errors import UserError
from tests.support.tiny import tiny_tokenizer


def written(folder, lengths, answer="Z"):
    """Questions of so many tokens each."""
    path = folder / "rows.jsonl"
    rows = [{"question": f"{chr(65 + i % 26)}" * n, "answer": answer} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("size, count", [(2, 2), (0.5, 4)])
def test_held_out_questions_are_not_called_dropped(tmp_path, size, count):
    """The control: a question that is too long is."""
    data = written(tmp_path, range(1, 10))
    cfg = Config(model="m", data=data, eval_split_size=size, max_prompt_length=8)
    trained = load_questions(cfg, Recipe(), tiny_tokenizer())
    assert length_summary(trained).startswith(
        f"{8 - count} questions kept, 1 dropped as too long, {count} held out for evaluation; prompt tokens"
    )
    assert (trained.num_dropped, trained.num_held_out) == (1, count)
    held_out = load_questions(cfg, Recipe(), tiny_tokenizer(), held_out=True)
    assert (len(held_out.items), held_out.num_dropped, held_out.num_held_out) == (count, 1, 0)
    assert "held out" not in length_summary(held_out)


NONE_LEFT = {
    "all too long": ([30, 40], {}, "every prompt of DATA (2) is longer than max_prompt_length 20. Raise the limit, or"),
    "nothing else dropped": (
        [30, 40],
        {"max_answer_length": 5},
        "every prompt of DATA (2) is longer than max_prompt_length 20. Raise the limit, or",
    ),
    "answers too": (
        [30, 3, 4],
        {"max_answer_length": 1},
        "no question of DATA is left. Left out are prompts longer than max_prompt_length 20: 1; answers longer than 1 "
        "tokens: 2. Raise these limits.",
    ),
    "answers alone": (
        [3, 4],
        {"max_answer_length": 1},
        "no question of DATA is left. Left out are answers longer than 1 tokens: 2. Raise these limits.",
    ),
    "quantile": (
        [30, 40, 50],
        {"prompt_length_quantile": 0.5},
        "Left out are prompts longer than max_prompt_length 20: 2; longer than the 0.5 quantile, 40 tokens: 1.",
    ),
}


@pytest.mark.parametrize("name", NONE_LEFT)
def test_the_error_that_none_is_left_names_each_rule_with_its_count(tmp_path, name):
    lengths, settings, said = NONE_LEFT[name]
    data = written(tmp_path, lengths, "ZQ")
    with pytest.raises(UserError) as refused:
        load_questions(Config(model="m", data=data, max_prompt_length=20, **settings), Recipe(), tiny_tokenizer())
    assert said in str(refused.value).replace(data, "DATA") and " 0 " not in str(refused.value)
