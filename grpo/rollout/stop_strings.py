"""Stop strings: a completion ends as soon as the text of its tokens contains one (setting `stop`).

The text is that of the completion's tokens decoded together, special tokens shown and white space as it was written;
the prompt is no part of it. The token that completes the string is the last one: the tokens up to it are the
completion, and rewards see their text with the string in it. So a format that asks for </answer> can be rewarded, and
what is scored is what was sampled and is trained on.

Decoding the whole text after every token would cost more than the token. So a token is looked up first: whether it can
be the one that completes a string, found once for each token id when it is first drawn. Only then the last tokens of
the row are decoded, as many as the longest string can need. Strings are looked for on the host where the engine reads
which rows are finished; the tokens that a row drew after its end are dropped, as they are after an EOS.
"""

import re
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.rollout.drawn_tokens import DrawnTokens

PARTIAL = "\ufffd"  # what bytes decode to that are no whole character
MARGIN = (
    8  # tokens decoded, and characters required, beyond the longest string: the first ones may come out differently
)
CONTINUES = re.compile(r"<0x[89AB][0-9A-F]>")  # a byte token inside a character: no text is cut before it


class StopStrings:
    """The strings that end a completion, and which tokens can complete one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        self.longest = max(map(len, strings))
        self.anchor = tokenizer("a", add_special_tokens=False)["input_ids"][
            -1:
        ]  # before a token: a text's first one may differ
        self.before = len(self._decode(self.anchor))
        self.parts: dict[int, str] = {}  # token id -> what it adds to a text
        self.completes = np.zeros(0, np.int8)  # by token id: 1 can complete a string, 0 cannot, -1 not known yet

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> "StopStrings | None":
        """None without any string."""
        return cls(tokenizer, strings) if strings else None

    def mark(self, drawn_tokens: DrawnTokens, ages: np.ndarray) -> Tensor:
        """Look at the tokens drawn since the last call; `stopped` is set where one completes a string.

        ages: [B] tokens of each row. Returns [B] bool, the rows that have ended so. Call it before rows leave or join.
        """
        own = [drawn_tokens.histories.setdefault(request.row, array("i")) for request in drawn_tokens.requests]
        steps = drawn_tokens.pending[len(drawn_tokens.pending) - int(ages[0]) + len(own[0]) :]
        ids = torch.stack([drawn.token_ids for drawn, _ in steps]).cpu().numpy()  # [steps, B]
        for history, column in zip(own, ids.T.tolist(), strict=True):
            history.extend(column)
        ended = np.zeros(len(own), bool)
        for step, row in zip(*np.nonzero(self._may_complete(ids)), strict=True):  # in the order of the steps
            text_ids = own[row][: len(own[row]) - len(ids) + step + 1]
            if not ended[row] and self._contains(text_ids):
                ended[row] = True
                steps[step][1][row] = True
        return torch.from_numpy(ended).to(drawn_tokens.device)

    def _may_complete(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token can be the one that completes a string; bool of the same shape."""
        missing = int(ids.max()) + 1 - len(self.completes)
        if missing > 0:
            self.completes = np.concatenate([self.completes, np.full(missing, -1, np.int8)])
        for token in np.unique(ids[self.completes[ids] < 0]).tolist():
            part = self.parts[token] = self._decode([*self.anchor, token])[self.before :]
            ways = {part, self._decode([token])}  # within a text, and as its first token
            self.completes[token] = any(_can_complete(way, string) for way in ways for string in self.strings)
        return self.completes[ids] > 0

    def _contains(self, ids: Sequence[int]) -> bool:
        """Whether the text of these tokens contains a string, given that without the last one it does not."""
        needed = self.longest + len(self.parts[ids[-1]]) + MARGIN  # characters
        count = needed
        while True:
            while count < len(ids) and CONTINUES.fullmatch(str(self.tokenizer.convert_ids_to_tokens(ids[-count]))):
                count += 1
            text = self._decode(ids[-count:])
            if count >= len(ids) or len(text) >= needed:
                break
            count *= 2
        seen = text if count >= len(ids) else text[-needed:]
        return any(string in seen for string in self.strings)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _can_complete(part: str, string: str) -> bool:
    """Whether a string can end within what a token adds to a text.

    >>> [_can_complete(part, "END") for part in ("ND.", " END", "EN", "")], _can_complete(PARTIAL, "停")
    ([True, True, False, False], True)
    """
    if string in part or (PARTIAL in part and not string.isascii()):
        return True
    return any(part.startswith(string[at:]) for at in range(1, len(string)))
