"""What moves of a row to the rank that trains on it, as int32 words."""

from dataclasses import dataclass

import numpy as np

from grpo.types import Completion


def _packed(flags: np.ndarray) -> np.ndarray:
    """[C] bool as words of 32 tokens."""
    bits = np.packbits(flags)
    return np.pad(bits, (0, -len(bits) % 4)).view(np.int32)


def _unpacked(words: np.ndarray, length: int) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8), count=length).astype(bool)


@dataclass(frozen=True)
class Payload:
    """The part of a completion that is trained on, C tokens."""

    token_ids: np.ndarray  # [C] int32
    sampler_logprobs: np.ndarray  # [C] float32
    trained: np.ndarray  # [C] bool
    support: np.ndarray | None  # [C, K] int32
    chosen: np.ndarray | None = None  # [C] bool, tokens with a surrogate; None: all, or not known yet

    def pack(self) -> np.ndarray:
        """As int32 words; each of the flags takes one bit per token."""
        none = np.zeros(0, np.int32)
        support = none if self.support is None else self.support.ravel()
        chosen = none if self.chosen is None else _packed(self.chosen)
        parts = [self.token_ids, self.sampler_logprobs.view(np.int32), _packed(self.trained), support, chosen]
        return np.concatenate(parts).astype(np.int32)

    @staticmethod
    def num_words(length: int, support_width: int, chooses: bool = False) -> int:
        """Length of `pack`'s result for C = length and K = support_width.

        >>> Payload.num_words(33, 0), len(payload_of(Completion(0, *[np.zeros(33, np.int32)] * 2, "stop")).pack())
        (68, 68)
        """
        return length * (2 + support_width) + (1 + chooses) * -(-length // 32)

    @staticmethod
    def unpack(words: np.ndarray, length: int, support_width: int, chooses: bool = False) -> "Payload":
        """The inverse of `pack`."""
        flags = -(-length // 32)
        ends = np.cumsum([length, length, flags, length * support_width])
        token_ids, logprobs, trained, support, chosen = np.split(words.copy(), ends)
        return Payload(
            token_ids,
            logprobs.view(np.float32),
            _unpacked(trained, length),
            support.reshape(length, support_width) if support_width else None,
            _unpacked(chosen, length) if chooses else None,
        )


def payload_of(completion: Completion, chosen: np.ndarray | None = None) -> Payload:
    """The payload of a completion; its arrays are shared. chosen: see Payload."""
    return Payload(completion.token_ids, completion.sampler_logprobs, completion.trained, completion.support, chosen)
