"""A completion ends with the first token after which its decoded text contains a stop string, and nothing else changes.

The rule that the tests compare with decodes the whole completion after every token.
"""

import json

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.forward import logprobs
from grpo.rollout import Request, row_buffer, sampling
from grpo.rollout.cuda_graph import StepGraph
from grpo.rollout.drawn_tokens import DrawnTokens
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Draw, Sampling
from grpo.rollout.stop_strings import StopStrings
from tests.support.launcher import fork_script, metrics_of
from tests.support.step_tape import record
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same two steps on one, two and three processes, with completions that end at "10" or at a comma."""
    folder = tmp_path_factory.mktemp("stop")
    save_tiny(folder / "base", spread=1.5)
    questions = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "rewards.py").write_text("def length(completions, **columns):\n    return list(map(len, completions))\n")
    config = {
        "model": "base",
        "data": "rows.jsonl",
        "eval_split_size": 2,
        "rewards": {"rewards.py:length": 1.0},
        "reward_workers": 0,
        "max_steps": 2,
        "batch_size": 3,
        "num_generations": 5,
        "rollout_chunk_rows": 5,
        "max_prompt_length": 40,
        "max_generate_length": 24,
        "stop": [",", "1"],
        "deterministic": True,
        "device": "cpu",
        "report_to": "none",
        "log_samples_steps": 1,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(config))

    def train(*more, nproc):
        own = ("--output_dir", f"output_{nproc}", "--runs_dir", f"runs_{nproc}")
        return fork_script("train.py", "--config", "task.yaml", *own, *more, nproc=nproc, cwd=folder)

    for nproc in (1, 2, 3):
        done = train(nproc=nproc)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder, train


def test_any_number_of_processes_samples_the_same(runs):
    folder, _ = runs
    found = []
    for nproc in (1, 2, 3):
        files = sorted(folder.glob(f"runs_{nproc}/task/rollouts-rank*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        evaluations = [metrics for metrics in metrics_of(folder / f"runs_{nproc}") if "eval/length_mean" in metrics]
        found.append((sorted(lines, key=lambda line: (line["step"], line["row"])), evaluations))
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 60
    texts = [line["completion"] for line in found[0][0]]
    assert sum("," in text or "1" in text for text in texts) > 10
    for line in found[0][0]:
        assert "," not in line["completion"][:-2] and ("," not in line["completion"] or line["finish"] == "stop")


def test_a_checkpoint_is_asked_as_it_was_trained(runs):
    folder, train = runs
    recipe = json.loads((folder / "output_1/checkpoint_2/trainer/recipe.json").read_text())
    assert recipe["stop"] == [",", "1"]
    changed = train("--stop", '["x"]', nproc=1)
    assert changed.returncode == 2 and "stop: [',', '1'] there, ['x'] now" in changed.stderr
    asked = fork_script("inference.py", "--checkpoint", "output_1/checkpoint_2", "--json", "1,2", cwd=folder)
    told = json.loads(asked.stdout)
    measure = ("--checkpoint", "output_1/checkpoint_2", "--samples", "16", "--out", "r.jsonl", "--seed", "5")
    done = fork_script("grpo.evaluate", *measure, cwd=folder)
    assert asked.returncode == 0 and done.returncode == 0, asked.stderr + done.stderr
    texts = [json.loads(line)["full"] for line in (folder / "r.jsonl").read_text().splitlines()] + [told["text"]]
    ended = [text for text in texts if "," in text or "1" in text]
    assert ended and all("," not in text[:-2] and "1" not in text[:-2] for text in texts)
