"""Printing a completion while it is sampled."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase


class TokenPrinter:
    """Receives the tokens of one completion as the engine samples them, and passes on the text that they add.

    Text that ends inside a character is delayed, because one character can be several tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.ids: list[int] = []
        self.shown = ""

    def __call__(self, pairs: list[tuple[int, int]]) -> None:
        """Take (row, token id) pairs of one decoding step."""
        self.ids += [token for _, token in pairs]
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if not text.endswith("\ufffd") and text.startswith(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text
