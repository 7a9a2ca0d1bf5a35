"""`python -m grpo.sft --show_prompt N`: the prompt with the text to be learned; and texts that continue a turn."""

import json

import pytest

from grpo.data.questions import load_questions
from grpo.data.recipe import make_recipe
from grpo.sft.texts import load_texts
from tests.sft.test_sft import config
from tests.support.launcher import fork_script
from tests.support.tiny import save_tiny, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "It is ", "weight": 1}]
ROWS = [{"question": "2+2?", "answer": 4}, {"question": TURNS, "answer": "six."}, {"question": "?", "answer": "Z" * 40}]


def written(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_the_text_to_be_learned_is_shown(tmp_path):
    """Prompt and text on stdout as they are trained on, end token included; nothing is written or trained."""
    base = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)
    lengths = ["--max_prompt_length", "64", "--max_generate_length", "16"]
    task = ["--model", str(base), "--data", written(tmp_path), "--solution_column", "answer", *lengths]

    def shown(row):
        return fork_script("grpo.sft", *task, "--show_prompt", str(row), cwd=tmp_path)

    done = shown(1)
    prompt = "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\nIt is "
    assert (done.returncode, done.stdout) == (0, prompt + "six.<|im_end|>\n"), done.stderr
    count = len(tokenizer("six.<|im_end|>")["input_ids"])
    assert f"text to be learned after it: {count} tokens, 'six.<|im_end|>'" in done.stderr
    assert "1 dropped: solutions longer than max_generate_length" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rows.jsonl"]
    refused = shown(2)  # too long a solution: no text of the run
    assert refused.returncode == 2 and "show_prompt: must be 0 to 1, got 2." in refused.stderr


@pytest.mark.parametrize("chat", [True, False])
def test_a_solution_continues_the_assistants_turn(tmp_path, chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML if chat else None
    cfg = config(data=written(tmp_path), max_prompt_length=64, solution_column="answer")
    recipe = make_recipe(cfg, tokenizer)
    texts = load_texts(cfg, recipe, tokenizer, load_questions(cfg, recipe, tokenizer), frozenset({0, 1}))
    plain, continued = texts.all()
    end = "<|im_end|>" if chat else "<|endoftext|>"
    before = "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\nIt is " if chat else "3+3?\nIt is "
    assert tokenizer.decode(list(continued.prompt_ids)) == before
    assert tokenizer.decode(continued.token_ids.tolist()) == "six." + end
    assert tokenizer.decode(plain.token_ids.tolist()) == "4" + end


def test_an_object_is_learned_as_the_json_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "?", "answer": {"a": [1, "é"]}}\n{"question": "?", "answer": {"b": true}}\n')
    cfg = config(data=str(path), answer_format="json", solution_column="answer")
    tokenizer = tiny_tokenizer()
    recipe = make_recipe(cfg, tokenizer)
    texts = load_texts(cfg, recipe, tokenizer, load_questions(cfg, recipe, tokenizer), frozenset({0}))
    assert [tokenizer.decode(row.token_ids.tolist()) for row in texts.all()] == [
        '{"a":[1,"é"]}<|endoftext|>',
        '{"b":true}<|endoftext|>',
    ]
