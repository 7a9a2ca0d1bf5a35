"""Turns of a conversation: a system message for templates without that role, and the token that ends a turn."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.chat_templates import TemplateRefused, render_chat
from grpo.errors import UserError

ANSWER = "Fortytwo"  # a word that is in no template


def fold_system(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with the system messages before the first user turn, a blank line between them.

    >>> fold_system([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    [{'role': 'user', 'content': 'S\\n\\nU'}]
    """
    system = [str(turn["content"]) for turn in turns if turn["role"] == "system" and turn.get("content")]
    others = [turn for turn in turns if turn["role"] != "system"]
    first = next((i for i, turn in enumerate(others) if turn["role"] == "user"), None)
    if not system or first is None:
        return list(turns)
    others[first] = {**others[first], "content": "\n\n".join([*system, str(others[first]["content"])])}
    return others


def check_reads_text(template: str, variables: Mapping[str, Any], date: str | None) -> None:
    """Refuse a template whose prompts do not depend on the user's text, as some that want content in parts do.

    Raises UserError. A template that refuses the two prompts compared here will be judged by those of the data.
    """
    texts = []
    for content in ("?", ANSWER):
        with contextlib.suppress(TemplateRefused):
            turns = [{"role": "user", "content": content}]
            texts.append(render_chat(template, variables, turns, "open", date))
    if len(texts) == 2 and texts[0] == texts[1]:
        raise UserError(
            "chat_template: the tokenizer's template leaves the user's text out (templates of vision models want it in "
            "parts). Give one that reads text: --chat_template_file FILE, or try --chat_template false."
        )


def end_of_turn(
    template: str, variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, date: str | None
) -> str | None:
    """The token that follows an assistant turn in a chat template, such as <|im_end|>; None where there is none.

    It is one of the tokenizer's added or special tokens, so that no ordinary text holds it. Where nothing follows the
    last turn, it is what stands between an assistant turn and the user's next one.
    """
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}
    for turns in ([user, assistant], [user, assistant, user]):
        try:
            text = render_chat(template, variables, turns, "closed", date)
        except TemplateRefused:  # it wants other turns: the first prompt will show it
            continue
        _, found, rest = text.rpartition(ANSWER)
        ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found and rest.strip() else []
        if ids and ids[0] in {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}:
            return str(tokenizer.convert_ids_to_tokens(ids[0]))
    return None
