"""Chat templates are programs of unknown origin: the text of transformers, or one line, within seconds and a bound.

The control of the limits: the same templates, rendered here without the process, are those that hang or fill the
memory; they are never rendered that way.
"""

import json
import os
import time
from pathlib import Path

import pytest

from grpo.data import chat_templates as templates
from grpo.data.recipe import Recipe, build, encode, render
from grpo.errors import UserError
from tests.support.tiny import tiny_tokenizer

CHAT = (
    "{%- if messages[0].role == 'system' %}{{ messages[0].content|trim }}\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m.content }}</{{ m.role }}>{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GOOD = {
    "plain": CHAT,
    "json": "{{ messages|tojson(indent=1) }}",
    "namespace and break": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 1 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro turn(m) %}[{{ m.role|upper }}] {{ m.content|replace('a', 'b') }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "tools": "{{ 'tools' if tools else 'no tools' }}{{ documents is none }}",
    "whitespace": "{% for m in messages %}\n    {{ m.content }}\n{% endfor %}\n",
}
TALK = [{"role": "system", "content": "S "}, {"role": "user", "content": "héllo 苹果 \u2028 a\0b {{ 7*7 }}"}]


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", GOOD)
def test_the_text_is_that_of_apply_chat_template(name):
    tokenizer = tokenizer_with(GOOD[name])
    theirs = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert render(Recipe(chat=True), TALK, tokenizer) == theirs
    assert theirs


LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "endless loop": (LOOP, "of computing"),
    "memory at once": ("{{ 'x' * 10**10 }}", "memory"),
    "memory by doubling": (
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "memory",
    ),
    "memory by padding": ("{{ 'a'|center(10**10) }}", "memory"),
    "long number": ("{{ 10**(10**9) }}", "of computing"),
    "long output": ("{{ 'x' * (3 * 10**6) }}", "it makes 3000000 characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}", "unsafe"),
    "format": ("{{ '{0.__class__.__init__}'.format('') }}", ""),
    "attr filter": ("{{ (''|attr('__class__')).__mro__ }}", ""),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "import": ("{% import 'os' as os %}{{ os.system('touch CANARY') }}", "no loader"),
    "change a list": ("{{ messages.append(1) }}", "unsafe"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "refuses in lines": ("{{ raise_exception('a\nb') }}", "a b"),
    "syntax": ("{{ broken", "unexpected end"),
    "undefined": ("{{ messages[7].content.x }}", "Undefined"),
}


HARMLESS = ("format", "attr filter")  # the sandbox makes them nothing at all
FIRST = ("endless loop", "memory by doubling", "long output", "class", "globals", "refuses in lines")


@pytest.mark.parametrize("names", [FIRST, pytest.param(tuple(HOSTILE), marks=pytest.mark.full)], ids=["some", "all"])
def test_hostile_templates_end_in_one_line(tmp_path, monkeypatch, names):
    monkeypatch.setattr(templates, "CPU_S", 1.0)
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    refused = 0
    for name in names:
        template, said = HOSTILE[name]
        start = time.monotonic()
        tokenizer = tokenizer_with(template.replace("CANARY", str(canary)))
        try:
            text = f"it gave {render(Recipe(chat=True), TALK, tokenizer)!r}"
        except UserError as error:
            text = str(error)
        if name not in HARMLESS or "it gave" not in text:
            assert said in text and "\n" not in text and text.startswith("chat_template: "), (name, text)
        else:
            assert text == "it gave ''", (name, text)
        assert time.monotonic() - start < 60, name
        refused += 1
    assert not canary.exists()
    print(f"\nchat templates: tried {len(names)}, refused {refused}, other 0")


def test_a_template_that_turns_bad_on_one_prompt_is_stopped_there(monkeypatch):
    """No probe would find it: it loops for one question only. The next tokenizer's template works again."""
    monkeypatch.setattr(templates, "CPU_S", 1.0)
    tokenizer = tokenizer_with("{% if 'secret' in messages[0].content %}" + LOOP + "{% endif %}fine")
    assert render(Recipe(chat=True), build(Recipe(), "a", {}), tokenizer) == "fine"
    with pytest.raises(UserError, match="of computing"):
        render(Recipe(chat=True), build(Recipe(), "secret", {}), tokenizer)
    assert render(Recipe(chat=True), build(Recipe(), "b", {}), tokenizer) == "fine"


def test_the_process_ends_with_its_user_and_opens_no_file():
    renderer = templates.Renderer("{{ messages[0].content }}", {})
    assert renderer.render([{"role": "user", "content": "x"}]) == "x"
    pid = renderer.process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    files = next(line for line in limits.splitlines() if line.startswith("Max open files"))
    assert files.split()[3] == "3"
    os.kill(pid, 9)
    with pytest.raises(templates.TemplateFailed, match="died"):
        renderer.render([{"role": "user", "content": "x"}])
    again = templates.Renderer("x", {})
    del again, renderer
    assert not os.path.exists(f"/proc/{pid}")


def test_many_prompts_are_fast():
    """One process for all of them: 3,000 prompts in far less than 3,000 starts of a process (about 2,000 s)."""
    tokenizer = tokenizer_with(CHAT)
    start = time.monotonic()
    for n in range(3000):
        render(Recipe(chat=True), build(Recipe(), f"{n}?", {}), tokenizer)
    assert time.monotonic() - start < 120


def test_half_a_surrogate_pair_is_no_prompt():
    with pytest.raises(UserError, match="character 2 is half of a surrogate"):
        encode(Recipe(), "a\ud800", tiny_tokenizer())


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"chat": "yes"},
        {"max_prompt_length": -1},
        {"max_prompt_length": 1e3},
        {"logit_clamp": 0},
        {"max_generate_length": 2**40},
        {"questions": "a"},
        {"questions": [1]},
        {"system_prompt": 1},
        {"prompt_template": None},
    ],
)
def test_a_recipe_of_the_wrong_kind_is_refused(tmp_path, values):
    from grpo.data.recipe import load_recipe

    path = tmp_path / "recipe.json"
    path.write_text("{}")
    load_recipe(path)  # the control
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a prompt recipe"):
        load_recipe(path)
