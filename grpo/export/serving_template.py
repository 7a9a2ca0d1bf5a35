"""A chat template that holds the prompt recipe, for servers of the OpenAI protocol (docs/serving.md).

A server renders the client's messages with the chat template of the model's folder, and knows nothing of the recipe:
the system prompt, the text around the question, the example, the variables and the date would be missing, and a
checkpoint that was trained without a template would be asked through one. The template that is made here prepares the
messages as `build` in grpo/data/recipe.py does, and the model's own template follows, if training used it. So

    {"messages": [{"role": "user", "content": question}]}

becomes the prompt of training. A conversation of more than one user turn is kept as it is, but for the system prompt
and the example, as conversations in data files are; a system message of the client replaces the recipe's.
"""

import dataclasses
import json
import re
from datetime import datetime
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.chat_templates import render_chat
from grpo.data.recipe import Recipe, build, encode, render
from grpo.errors import UserError

PROBES = (
    "Tom has 5 eggs. How many?",
    " two\n lines\n",
    "小明有10个苹果",
    "{question} {{ x }} {% y %} \\n \"'",
    "<b>&amp;</b>",
)
PLAIN_TURNS = """\
{%- for turn in messages %}
{{- turn['content'] }}
{%- if not loop.last and turn['content'][-1:] != "\\n" %}{{- "\\n" }}{%- endif %}
{%- endfor %}
"""
FOLD = """\
{%- if messages[0]['role'] == 'system' %}
{%- set folded = namespace(turns=[], system=messages[0]['content']) %}
{%- for turn in messages[1:] %}
{%- if turn['role'] == 'user' and folded.system %}
{%- set folded.turns = folded.turns + [{'role': 'user', 'content': folded.system ~ "\\n\\n" ~ turn['content']}] %}
{%- set folded.system = '' %}
{%- else %}
{%- set folded.turns = folded.turns + [turn] %}
{%- endif %}
{%- endfor %}
{%- if not folded.system %}{%- set messages = folded.turns %}{%- endif %}
{%- endif %}
"""
DATES = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def literal(value: Any) -> str:
    """A JSON value as an expression of Jinja.

    >>> literal({"a": [None, True, 'x\\n"']})
    '{"a": [none, true, "x\\\\n\\\\""]}'
    """
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(name)}: {literal(one)}' for name, one in value.items())}}}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def serving_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template: preparations, then the tokenizer's own where training used it. Raises UserError.

    Its prompts are compared with the recipe's, token by token, for the built-in questions and for PROBES.
    """
    template = _preparations(recipe)
    if recipe.chat:
        own = str(tokenizer.get_chat_template())
        template += _variables(recipe) + _fixed_date(recipe, own) + own
    else:
        template += _start(tokenizer) + PLAIN_TURNS
    problem = _problem(template, recipe, tokenizer)
    if problem is not None:
        raise UserError(f"for_serving: no template gives this recipe's prompts: {problem}. Leave it out.")
    return template


def served_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a folder whose template holds `recipe` already: for inference.py a question is all it needs."""
    return dataclasses.replace(
        recipe,
        chat=True,
        system_prompt=None,
        prompt_template="{question}",
        strip_cells=False,
        example_question=None,
        example_answer=None,
        system_role="system",
        date=None,
        chat_template_kwargs={},
        rules=2,
    )


def response_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """How `transformers serve` finds the completion in its text, where the prompt has no marks of turns.

    By default it looks for the marks of the model type's usual template, and without them answers with the prompt too.
    """
    if recipe.chat:
        return None
    ends = "|".join(re.escape(str(token)) for token in tokenizer.all_special_tokens)
    content = {"content": "text", **({"close_pattern": ends} if ends else {})}
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\Z", "fields": {"content": content}}


def _preparations(recipe: Recipe) -> str:
    """Statements that set `messages` to the turns that `build` makes of them."""
    question = "turns[0]['content']" + " | trim" * recipe.strip_cells
    parts = [literal(text) for text in recipe.prompt_template.split("{question}")]
    content = " ~ question ~ ".join(parts)
    lines = [
        "set client = messages[0]['role'] == 'system'",
        "set turns = messages[1:] if client else messages",
        "if turns | length == 1 and turns[0]['role'] == 'user'",
        f"set question = {question}",
        f"set turns = [{{'role': 'user', 'content': {content}}}]",
        "endif",
    ]
    if recipe.example_question is not None and recipe.example_answer is not None:
        example = [
            {"role": "user", "content": recipe.example_question},
            {"role": "assistant", "content": recipe.example_answer},
        ]
        lines.append(f"set turns = {literal(example)} + turns")
    own = literal([{"role": "system", "content": recipe.system_prompt}] if recipe.system_prompt else [])
    lines.append(f"set messages = (messages[:1] if client else {own}) + turns")
    return _statements(lines) + (FOLD if recipe.system_role == "user" else "")


def _statements(lines: list[str]) -> str:
    return "".join(f"{{%- {line} %}}\n" for line in lines)


def _variables(recipe: Recipe) -> str:
    """The recipe's variables, which a client may still set otherwise."""
    return "".join(
        _statements([f"if {name} is not defined", f"set {name} = {literal(value)}", "endif"])
        for name, value in recipe.chat_template_kwargs.items()
    )


def _fixed_date(recipe: Recipe, template: str) -> str:
    """A macro in place of `strftime_now`, that prints the date of the recipe. Raises UserError."""
    if recipe.date is None or "strftime_now(" not in template:
        return ""
    formats = [double or single for double, single in DATES.findall(template)]
    if len(formats) != template.count("strftime_now("):
        raise UserError(
            "for_serving: the chat template prints a date in a format that it computes, and the date of the run's "
            "start cannot be put there. Leave it out."
        )
    date = datetime.fromisoformat(recipe.date)
    dates = literal({how: date.strftime(how) for how in formats})
    return f"{{%- macro strftime_now(how) -%}}{{{{ {dates}[how] }}}}{{%- endmacro %}}\n"


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens that the tokenizer puts before plain text (BOS): servers add none to what a chat template gives."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = list(takewhile(lambda token: token not in letter, tokenizer("a")["input_ids"]))
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    return f"{{{{- {literal(text)} }}}}\n" if text else ""


def _problem(template: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str | None:
    variables = tokenizer.special_tokens_map
    for question in (*recipe.questions, *PROBES):
        wanted = encode(recipe, render(recipe, build(recipe, question, {}), tokenizer), tokenizer)
        text = render_chat(template, variables, [{"role": "user", "content": question}])
        if tokenizer(text, add_special_tokens=False)["input_ids"] != wanted:
            return f"the question {question[:60]!r} becomes {text[:200]!r}"
    return None
