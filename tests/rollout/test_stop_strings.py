"""A completion ends with the first token after which its decoded text contains a stop string, and nothing else changes.

The rule that the tests compare with decodes the whole completion after every token.
"""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.forward import logprobs
from grpo.rollout import Request, row_buffer, sampling
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.drawn_tokens import DrawnTokens
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Draw, Sampling
from grpo.rollout.stop_strings import StopStrings
from tests.support.step_tape import record
from tests.support.tiny import tiny_model, tiny_tokenizer

NEW = 40
LENGTHS = (3, 9, 5, 14)
REQUESTS = [
    Request(p * 3 + g, p, g, tuple(5 + (7 * p + i) % 50 for i in range(n)))
    for p, n in enumerate(LENGTHS)
    for g in range(3)
]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: words begin with ▁, and a character that is no token is written as its bytes."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁the", "▁a", "a", "b", "END", "EN", "D", ".", "▁END", "s>", "</", "answer", ">", "小", "\n"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder that puts blanks between tokens."""
    words = ["[UNK]", "the", "an", "##swer", "END", "##ND", "E", "D", ".", "##.", "a", "b"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {"byte level": tiny_tokenizer, "byte fallback": byte_fallback_tokenizer, "words": word_piece_tokenizer}


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def end_by_rule(tokenizer, ids, strings) -> int | None:
    """Tokens of the completion; None: no string is in it."""
    lengths = range(1, len(ids) + 1)
    return next((n for n in lengths if any(string in text_of(tokenizer, ids[:n]) for string in strings)), None)


def end_found(stops: StopStrings, rows: list[list[int]], steps_per_read: int) -> list[int | None]:
    """The same for rows of one length, token by token through a batch's drawn tokens."""
    drawn_tokens = DrawnTokens(len(rows[0]), torch.device("cpu"))
    drawn_tokens.join([Request(row, row, 0, (1,)) for row in range(len(rows))])
    for n, column in enumerate(np.array(rows).T, 1):
        zeros = torch.zeros(len(rows))
        draw = Draw(torch.from_numpy(column.copy()), zeros, zeros == 0, None)
        drawn_tokens.add(draw, zeros > 0)
        if n % steps_per_read == 0 or n == len(rows[0]):
            stops.mark(drawn_tokens, np.full(len(rows), n))
    drawn_tokens.flush()
    done = drawn_tokens.completions(np.arange(len(rows)))
    return [len(one.token_ids) if one.finish == "stop" else None for one in done]


@pytest.mark.parametrize("steps_per_read", [1, 8])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_end_is_that_of_decoding_everything_after_every_token(kind, steps_per_read):
    """Strings are pieces of other random texts: within tokens, over several, with characters cut by tokens."""
    tokenizer, rng = TOKENIZERS[kind](), np.random.default_rng(7)
    found, counted = [], 0
    for _ in range(25):
        size = int(rng.integers(1, 60))
        rows = rng.integers(0, len(tokenizer), (8, size)).tolist()
        if kind == "byte level":  # real characters over several tokens
            rows = [(row + tokenizer("小明 10個 ok 明")["input_ids"] + row)[:size] for row in rows]
        texts = [text_of(tokenizer, row).replace("\ufffd", "") for row in rows]
        pieces = [text[at : at + int(rng.integers(1, 6))] for text in texts if text for at in [rng.integers(len(text))]]
        strings = [piece for piece in pieces[:3] if piece] or ["x"]
        ends = [end_by_rule(tokenizer, row, strings) for row in rows]
        assert end_found(StopStrings(tokenizer, strings), rows, steps_per_read) == ends, (strings, texts)
        found += ends
        counted += sum(end is not None and end > 1 for end in ends)
    assert counted > 30 and None in found


def test_characters_of_several_bytes_and_long_tails():
    tokenizer = byte_fallback_tokenizer()
    bytes_of = lambda text: [2 + byte for byte in text.encode()]  # noqa: E731
    row = bytes_of("很长的一段中文" * 9) + bytes_of("停") + bytes_of("后")
    assert end_found(StopStrings(tokenizer, ["停"]), [row], 1) == [len(row) - 3]
    assert end_found(StopStrings(tokenizer, ["文停"]), [row], 8) == [len(row) - 3]
    empty = tokenizer.convert_tokens_to_ids("<unk>")
    tiny = tiny_tokenizer()
    row = tiny("a stop", add_special_tokens=False)["input_ids"] + [tiny.convert_tokens_to_ids("s")] * 90
    assert end_found(StopStrings(tiny, ["p" + "s" * 90]), [row], 1) == [len(row)] and empty == 0


def test_a_token_is_decoded_once_and_texts_only_where_a_string_may_end(monkeypatch):
    """The cost of a stop string: after the first look at a token id, nothing is decoded for tokens that end none."""
    tokenizer = tiny_tokenizer()
    stops = StopStrings(tokenizer, ["</answer>"])
    rows = np.random.default_rng(0).integers(40, 60, (4, 50)).tolist()
    assert all("</answer>" not in text_of(tokenizer, row) for row in rows)
    end_found(stops, rows, 1)
    calls, decode = [], stops._decode
    monkeypatch.setattr(stops, "_decode", lambda ids: (calls.append(len(ids)), decode(ids))[1])
    end_found(stops, rows, 1)
    closing = stops.completes[np.array(rows)].sum()
    assert len(calls) == closing and max(calls, default=0) <= 2 * (stops.longest + 9)


def test_special_tokens_are_part_of_the_text_that_is_searched():
    tokenizer = tiny_tokenizer()
    row = [*tokenizer("7, buys")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>"), 60, 61]
    assert end_found(StopStrings(tokenizer, ["<|im_end|>"]), [row], 1) == [len(row) - 2]


def engine_of(architecture, strings, **settings):
    stops = StopStrings.of(tiny_tokenizer(), strings)
    vocabulary = len(tiny_tokenizer())
    model = tiny_model(architecture, vocabulary, spread=1.5)
    return NativeEngine(model, range(0, 5), NEW, 3, stop_strings=stops, **settings)


def cut_by_rule(completions, strings):
    """What completions of an engine without stop strings become."""
    tokenizer = tiny_tokenizer()
    for one in completions:
        ids = one.token_ids.tolist()
        length = end_by_rule(tokenizer, ids, strings)
        yield one.row, ids[:length], "stop" if length else one.finish, one.sampler_logprobs[: length or len(ids)]


def same(completions, expected):
    for one, (row, ids, finish, sampled_logprobs) in zip(completions, expected, strict=True):
        assert (one.row, one.token_ids.tolist(), one.finish) == (row, ids, finish)
        np.testing.assert_allclose(one.sampler_logprobs, sampled_logprobs, atol=1e-4)
        assert one.trained.all()


@pytest.fixture(scope="module")
def strings():
    """Pieces of two characters from the middle of some completions, and a text longer than any completion."""
    whole = engine_of("qwen3", []).generate(REQUESTS[::2], Sampling())
    texts = [text_of(tiny_tokenizer(), one.token_ids) for one in whole]
    pairs = [[text[i : i + 2] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 2]] for text in texts]
    return [pair[0] for pair in pairs if pair] + ["longer than any completion" * 20]


@pytest.mark.parametrize(
    "how", ["plain", "refill", "graph", "graph and refill", "padded", "equal_lengths", "recompute"]
)
def test_every_cache_ends_rows_where_the_rule_does(how, strings, monkeypatch):
    expected = list(cut_by_rule(engine_of("qwen3", []).generate(REQUESTS, Sampling()), strings))
    budget = 5 * (max(LENGTHS) + NEW) if "refill" in how else None
    engine = engine_of("qwen3", strings, max_tokens=budget)
    if "graph" in how:
        monkeypatch.setattr(row_buffer, "FIRST_OWN_COLUMNS", 16)
        for module in (logprobs, sampling):
            monkeypatch.setattr(module, "host_reads_are_free", lambda device: False)
        engine.graph, engine.read_done_steps = StepGraph(record), 8
    elif how in ("padded", "equal_lengths", "recompute"):
        engine.cache_kind = how
    same(engine.generate(REQUESTS, Sampling()), expected)
    assert {finish for _, _, finish, _ in expected} == {"stop", "length"}
    assert sum(ids[-1] > 4 and finish == "stop" for _, ids, finish, _ in expected) > 1, "no row ends with a string"
    assert len({len(ids) for _, ids, _, _ in expected}) > 4
    assert engine.graph is None or (engine.graph.usable and engine.graph.replays > 8)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_other_architectures(architecture):
    strings = ["1", "a"]
    expected = list(cut_by_rule(engine_of(architecture, []).generate(REQUESTS, Sampling()), strings))
    same(engine_of(architecture, strings).generate(REQUESTS, Sampling()), expected)


def test_chunks_and_their_neighbours_change_no_end(strings):
    engine = engine_of("qwen3", strings)
    whole = engine.generate(REQUESTS, Sampling())
    parts = [one for at in range(0, 12, 3) for one in engine.generate(REQUESTS[at : at + 3], Sampling())]
    assert [c.token_ids.tolist() for c in whole] == [c.token_ids.tolist() for c in parts]


def test_nothing_is_streamed_beyond_the_end(strings):
    engine = engine_of("qwen3", strings)
    engine.read_done_steps = 8  # as on a GPU
    streamed = []
    for request in REQUESTS:
        [completion] = engine.generate([request], Sampling(), on_tokens=streamed.extend)
        assert [token for _, token in streamed] == completion.token_ids.tolist()
        streamed.clear()


def test_truncated_sampling_keeps_its_support(strings):
    how = Sampling(top_k=20, max_support=16)
    expected = list(cut_by_rule(engine_of("qwen3", []).generate(REQUESTS, how), strings))
    found = engine_of("qwen3", strings).generate(REQUESTS, how)
    same(found, expected)
    assert all(len(one.support) == len(one.token_ids) for one in found)
