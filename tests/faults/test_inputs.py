"""Data of odd sizes and odd prompts, through whole runs."""

import json

import pytest

from tests.faults.runs import write_questions

ROWS_OF_DATA = (0, 1, 2, 3, 4, 11)  # P is 3, G is 4: 0, 1, P-1, P and G-1, P+1 and G, and a prime


@pytest.mark.parametrize("sizes", [(0, 4), pytest.param(ROWS_OF_DATA, marks=pytest.mark.full)], ids=["sample", "all"])
def test_F30_few_rows(arena, record, sizes):
    """Nothing to train on is refused; else every row is asked once an epoch, whatever P is, and none is dropped."""
    bad = []
    for size in sizes:
        file = write_questions(arena.folder / f"rows_{size}.jsonl", size)
        run = arena.run(world=1, data=file, max_steps=None, epoch=3)
        job = run.launch()
        codes = job.wait()
        if size == 0:
            good = codes == [2] and "Traceback" not in job.text()
        else:
            used_rows = [row for _, rows in sorted(run.prompts().items()) for row in rows]
            epochs = [used_rows[start : start + size] for start in range(0, 3 * size, size)]
            whole = all(sorted(epoch) == list(range(size)) for epoch in epochs)
            good = codes == [0] and whole and len(used_rows) == -(-3 * size // 3) * 3
        if not good:
            bad.append((size, codes, job.text()[-400:]))
    record("F30", len(sizes), len(sizes) - len(bad), f"wrong: {bad}" if bad else f"rows: {sizes}")


ODD = {
    "over the limit": "x " * 200,
    "one token": "7",
    "right to left": "مرحبا שלום",
    "NUL": "a\x00b",
    "emoji": "👩‍👩‍👧‍👦 2+2?",
    "special token as text": "<|endoftext|> 2+2?",
    "control": "\x1b[31mred\x07",
}


@pytest.mark.full
def test_F29_odd_prompts(arena, record):
    """Each is trained on, or left out with a count; nothing is an exception."""
    file = arena.folder / "odd.jsonl"
    file.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in ODD.values()))
    run = arena.run(world=1, data=file, max_steps=None, epoch=1)
    job = run.launch()
    codes = job.wait()
    used_rows = {row for rows in run.prompts().values() for row in rows}
    good = codes == [0] and "1 dropped as too long" in job.text() and used_rows == set(range(len(ODD) - 1))
    record("F29", len(ODD), len(ODD) if good else 0, "1 left out, the rest asked" if good else job.text()[-600:])


@pytest.mark.full
@pytest.mark.parametrize("text", ["", "\n\n", " \t"])
def test_F29_an_empty_prompt(arena, record, text):
    """Refused, with its row."""
    file = arena.folder / "empty_prompt.jsonl"
    file.write_text('{"question": "2+2?", "answer": "4"}\n' + json.dumps({"question": text, "answer": "1"}) + "\n")
    job = arena.run(world=1, data=file, max_steps=2).launch()
    codes = job.wait()
    good = codes == [2] and "row 2" in job.text() and "Traceback" not in job.text()
    record("F29", 1, int(good), f"empty prompt {text!r}: code {codes[0]}")


STOPS = {  # name -> (ids that end a completion, a pad token, share of completions cut at the limit: at least, at most)
    "every token stops": (list(range(300)), True, 0.0, 0.0),
    "no token stops": ([], True, 1.0, 1.0),
    "half of the tokens stop": (list(range(0, 300, 2)), True, 0.0, 0.2),
    "pad is the stop token": ([0], True, 0.5, 1.0),
    "no pad token": ([0], False, 0.5, 1.0),
}


def stopping_model(folder, ids, pad):
    """A model folder with these stop tokens, and no other."""
    from tests.support.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(pad=pad)
    model = tiny_model("qwen3", len(tokenizer), spread=2.0)
    model.config.eos_token_id = model.generation_config.eos_token_id = ids or None
    if not ids:
        tokenizer.eos_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "names", [["every token stops"], pytest.param(list(STOPS), marks=pytest.mark.full)], ids=["sample", "all"]
)
def test_F28_odd_stop_tokens(arena, record, names):
    """Completions of one token, or without an end: trained on, and counted as cut only where they are."""
    bad = []
    for name in names:
        ids, pad, least, most = STOPS[name]
        model = stopping_model(arena.folder / f"{name}, {len(names)}", ids, pad)
        run = arena.run(world=1, model=model, max_steps=2)
        job = run.launch()
        codes = job.wait()
        cut = [row["completions/truncated"] for row in run.metrics()] if codes == [0] else [-1.0]
        if codes != [0] or not all(least <= share <= most for share in cut):
            bad.append((name, codes, cut, job.text()[-400:]))
    record("F28", len(names), len(names) - len(bad), f"wrong: {bad}" if bad else ", ".join(names))
