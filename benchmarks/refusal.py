"""Refusal learned on a multiple-choice task half of whose questions nobody can know; three seeds and a control.

    python benchmarks/refusal.py [--work FOLDER] [--seeds 1 2 3] [--steps 120]

Makes a task in the CSV form of configs/multiple_choice.yaml and a small base model for it, trains the base with
train.py on that configuration and its `refusal_reward` (1 right, 0.4 refused, 0 else), and lets
`python -m grpo.evaluate` answer held-out questions before and after. Everything is made here, from seeds; FOLDER
(default: a temporary one) keeps the base, so that it is taught once.

The task. A question says how many things one of eight people had and bought, and asks for a number:

    小明3顆梨，買1顆。小明幾顆梨？     A. 2  B. 3  C. 4  D. 5

In half of the questions the one asked for is the one told about, and the number is a sum: those can be known. In the
other half it is another of the eight, of whom nothing is told: the gold answer is a letter drawn at random. That is
the only cue: whether the two names are the same. Each name, number and letter is as frequent in one half as in the
other, and all questions have the same shape and the same options, among which the sum of what is told always is.

The base is taught by next-token loss to answer nearly all of them: rightly what can be known, with a random letter what
cannot. Of the answers that it is taught 2 % are refusals where the answer can be known, and 15 % where it cannot: each
letter is likelier there, so greedily it never refuses, and sampled it seldom does. (Taught 10 % in both halves alike,
a base lost the habit in both halves before it learned where refusing pays: that costs 0.6 in one half, and wins 0.15
in the other.)

Held-out questions are those that a hash of their text puts aside; no teaching and no training sees them. The control
hands out the same rewards shuffled within each group of completions, which says nothing about refusing.
"""

import argparse
import csv
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "demo")]

from grpo.reward_library.multiple_choice import refusal_reward  # noqa: E402

CONFIG = PROJECT / "configs" / "multiple_choice.yaml"
CONTROL = "benchmarks/refusal.py:shuffled_refusal_reward"
PARAMETERS = {"refuse": 0.4, "options": 4, "marker": "?", "min_reasoning": 8}  # of reasoning, as short as the task
NAMES = ["小明", "小華", "小美", "小玲", "阿強", "阿福", "大雄", "志玲"]
ITEMS = [*"梨蛋糖球桃李棗豆珠杏橘柚"]
LETTERS = "ABCD"
COLUMNS = ["題目", *(f"選項{letter}" for letter in LETTERS), "推理正確答案", "正確答案"]
OPTIONS = [2, 3, 4, 5]
REFUSAL = "題目沒有說，不猜。"
REFUSALS_KNOWABLE, REFUSALS_UNKNOWABLE = 0.02, 0.15  # shares of the answers that the base is taught
TRAIN_ROWS, HELD_OUT_ROWS = 1600, 200


def make_row(rng: random.Random, knowable: bool) -> dict[str, str]:
    """Draw one question: a row of the CSV."""
    told, other = rng.sample(NAMES, 2)
    asked = told if knowable else other
    place, item = rng.randrange(len(LETTERS)), rng.choice(ITEMS)  # of the sum among the options
    had = rng.randint(1, OPTIONS[place] - 1)
    bought = OPTIONS[place] - had
    gold = place if knowable else rng.randrange(len(LETTERS))
    return {
        "題目": f"{told}{had}顆{item}，買{bought}顆。{asked}幾顆{item}？",
        **{f"選項{letter}": str(number) for letter, number in zip(LETTERS, OPTIONS, strict=True)},
        "推理正確答案": f"{asked}{OPTIONS[gold]}顆{item}，選{LETTERS[gold]}。",
        "正確答案": LETTERS[gold],
    }


def is_knowable(question: str) -> bool:
    """Say whether the person asked for is the one told about.

    >>> is_knowable("小明3顆梨，買1顆。小明幾顆梨？"), is_knowable("小明3顆梨，買1顆。小美幾顆梨？")
    (True, False)
    """
    told, _, asked = question.partition("。")
    return asked.partition("幾")[0] in told


def is_held_out(question: str) -> bool:
    """Say whether a question belongs to the held-out side: one in eight, by a hash of its text."""
    return hashlib.sha256(question.encode()).digest()[0] % 8 == 0


def questions(seed: int, held_out: bool, distinct: bool = True) -> Iterator[dict[str, str]]:
    """Yield questions of one side, knowable and unknowable in turn, as a function of the seed.

    For ever when they may repeat; of distinct ones that can be known there are some 840, and 120 held out.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    knowable = True
    while True:
        row = make_row(rng, knowable)
        if is_held_out(row["題目"]) == held_out and row["題目"] not in seen:
            if distinct:
                seen.add(row["題目"])
            knowable = not knowable
            yield row


def write_csv(path: Path, rows: Iterator[dict[str, str]], count: int) -> None:
    """Write the first `count` rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row, _ in zip(rows, range(count), strict=False))


# --- the base model


def template() -> str:
    """The prompt of the configuration."""
    from grpo.config.command_line import load_config

    return load_config(["--config", str(CONFIG)])[0].prompt_template


def prompt_of(row: dict[str, str], form: str) -> str:
    """What the model reads."""
    return re.sub(r"\{(\w+)\}", lambda found: row["題目" if found[1] == "question" else found[1]], form)


def answer_of(row: dict[str, str], refuses: bool) -> str:
    """What the base is taught to answer."""
    name = row["題目"].partition("。")[2].partition("幾")[0]
    reasoning = f"{name}{REFUSAL}" if refuses else row["推理正確答案"]
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{'?' if refuses else row['正確答案']}</answer>"


def make_tokenizer(form: str):
    """The demo's byte-level tokenizer, in which the words and phrases of this task are tokens of their own."""
    from make_base import train_tokenizer

    before, _, rest = form.partition("{question}")
    after = re.split(r"\{\w+\}", rest)[-1].lstrip("\n")
    tokenizer = train_tokenizer([REFUSAL])
    tags = [f"<{end}{tag}>" for tag in ("reasoning", "answer") for end in ("", "/")]
    tokenizer.add_tokens(
        [
            before,
            after,
            REFUSAL,
            *tags,
            *NAMES,
            *ITEMS,
            *LETTERS,
            *"顆幾買，選。？?",
            *(f"{letter}. " for letter in LETTERS),
        ]
    )
    return tokenizer


def make_model(vocab_size: int, eos_token_id: int, hidden_size: int = 128, max_positions: int = 512):
    """A Qwen3 of half a million parameters, or less."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_positions,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def padded(pairs: list[tuple[list[int], list[int]]], pad: int):
    """Prompts and answers as input_ids [B, L] and labels [B, L], -100 on the prompt and the padding."""
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), pad)
    labels = torch.full((len(pairs), width), -100)
    for i, (prompt, answer) in enumerate(pairs):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def make_base(folder: Path, num_steps: int, batch_rows: int = 32, peak_lr: float = 3e-3) -> None:
    """Teach a small Qwen3 by next-token loss on answers; one cosine with 5 % warmup."""
    import torch

    torch.manual_seed(0)
    form, rng = template(), random.Random(0)
    tokenizer = make_tokenizer(form)
    model = make_model(len(tokenizer), tokenizer.eos_token_id)
    rows = questions(seed=1000, held_out=False, distinct=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    start_s = time.monotonic()
    for step in range(num_steps):
        rate = min(1.0, (step + 1) / (0.05 * num_steps)) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * rate
        pairs = []
        for row, _ in zip(rows, range(batch_rows), strict=False):
            share = REFUSALS_KNOWABLE if is_knowable(row["題目"]) else REFUSALS_UNKNOWABLE
            answer = answer_of(row, rng.random() < share)
            answer_ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            pairs.append((tokenizer(prompt_of(row, form))["input_ids"], answer_ids))
        ids, labels = padded(pairs, tokenizer.eos_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - start_s
            print(f"teaching {step + 1}/{num_steps}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- the runs


def shuffled_refusal_reward(prompts, completions, answer, **columns):
    """The control: the group's `refusal_reward`s, in an order that a hash of the prompt decides."""
    scores = refusal_reward(completions, answer, **PARAMETERS)
    key = lambda position: hashlib.sha256(f"{prompts[0]}\n{position}".encode()).digest()  # noqa: E731
    return [scores[position] for position in sorted(range(len(scores)), key=key)]


shuffled_refusal_reward.sees_group = True


@dataclass(frozen=True)
class Rates:
    """What a checkpoint did with the held-out questions, as shares."""

    refused_unknowable: float
    refused_knowable: float
    accuracy: float
    answered_accuracy: float

    @classmethod
    def of(cls, rows: list[dict]) -> "Rates":
        """From the lines that grpo.evaluate has written."""
        share = lambda part, whole: len(part) / max(len(whole), 1)  # noqa: E731
        known = [row for row in rows if is_knowable(row["q"])]
        unknown = [row for row in rows if not is_knowable(row["q"])]
        answered = [row for row in rows if row["pred"] in [*LETTERS]]
        right = [row for row in rows if row["correct"]]
        of_unknown, of_known = ([row for row in part if row["pred"] == "?"] for part in (unknown, known))
        return cls(share(of_unknown, unknown), share(of_known, known), share(right, rows), share(right, answered))


def call(*words: object) -> str:
    """Run a script of the project on this machine's cores. Returns its stdout; ends this program when it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    return done.stdout


def train(folder: Path, base: Path, data: Path, control: bool, settings: dict[str, object]) -> tuple[Path, float]:
    """Train the base on the configuration. Returns the last checkpoint and the wall seconds."""
    name = CONTROL if control else "refusal_reward"
    flat = {
        "model": base,
        "data": data,
        "eval_split_size": 0,
        "rewards": json.dumps({name: 1.0}),
        "num_generations": 8,
        "max_prompt_length": 96,
        "max_generate_length": 24,
        "dtype": "fp32",
        "gradient_checkpointing": "false",
        "num_threads": 1,
        "lr_schedule": "linear",
        "save_steps": 0,
        "log_samples_steps": 10,
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
        "resume": "never",
        "lora_r": 0,
        "sft": "{}",
        **settings,
    }
    flat["reward_parameters"] = json.dumps({} if control else {name: PARAMETERS})
    words = [word for key, value in flat.items() for word in (f"--{key}", value)]
    start_s = time.monotonic()
    call("train.py", "--config", CONFIG, *words)
    return folder / "output" / f"checkpoint_{settings['max_steps']}", time.monotonic() - start_s


def evaluate(checkpoint: Path, data: Path, seed: int, temperature: float = 0.0) -> Rates:
    """Answer the held-out questions with the command that everybody uses."""
    out = checkpoint.parent / f"{checkpoint.name}-{temperature:g}.jsonl"
    call(
        "-m",
        "grpo.evaluate",
        "--checkpoint",
        checkpoint,
        "--data",
        data,
        "--out",
        out,
        "--batch_rows",
        64,
        "--temperature",
        temperature,
        "--seed",
        seed,
        "--refusal",
        PARAMETERS["marker"],
    )
    return Rates.of([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()])


def line(rewards: str, seed: int, when: str, rates: Rates, seconds: float | None = None) -> str:
    """A row of the table."""
    shares = (rates.refused_unknowable, rates.refused_knowable, rates.accuracy, rates.answered_accuracy)
    wall = "" if seconds is None else f"{seconds:.0f}"
    cells = [rewards, str(seed), when, *(f"{share:.1%}" for share in shares), wall]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for base and runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--control_seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--teaching_steps", type=int, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return measure(args, Path(args.work or name).resolve())


def measure(args: argparse.Namespace, work: Path) -> int:
    """Make what is not there yet, train, print the table and what held."""
    work.mkdir(parents=True, exist_ok=True)
    base, data, held_out = work / "base", work / "train.csv", work / "held_out.csv"
    write_csv(data, questions(seed=1, held_out=False), TRAIN_ROWS)
    write_csv(held_out, questions(seed=2, held_out=True), HELD_OUT_ROWS)
    if not (base / "config.json").is_file():
        make_base(base, args.teaching_steps)
    still, _ = train(work / "before", base, data, False, {"max_steps": 1, "lr": 1e-30})  # the base, with its recipe
    before, sampled = evaluate(still, held_out, 1), evaluate(still, held_out, 1, temperature=1.0)
    print("| rewards | seed | | refused, unknowable | refused, knowable | accuracy | accuracy on answered | wall s |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    print(line("none", 1, "base, sampled", sampled) + "\n" + line("none", 1, "base", before), flush=True)
    held = []
    for control, seeds in ((False, args.seeds), (True, args.control_seeds)):
        rewards = "shuffled" if control else "refusal_reward"
        for seed in seeds:
            settings = {"max_steps": args.steps, "lr": args.lr, "seed": seed}
            checkpoint, seconds = train(work / f"{rewards}-{seed}", base, data, control, settings)
            after = evaluate(checkpoint, held_out, seed)
            print(line(rewards, seed, "after", after, seconds), flush=True)
            reached = (
                after.refused_unknowable >= 0.8
                and after.refused_knowable <= 0.1
                and after.answered_accuracy > before.answered_accuracy
            )
            said = f"{rewards}, seed {seed}: {'reaches' if reached else 'does not reach'} it"
            held.append((said, reached != control))
    print("\nIt: at least 80 % refused of unknowable, at most 10 % of knowable, accuracy on answered up.")
    print("\n".join(f"{'as asked' if right else 'NOT AS ASKED'}  {said}" for said, right in held))
    return 0 if all(right for _, right in held) else 1


if __name__ == "__main__":
    sys.exit(main())
