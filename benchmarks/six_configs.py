"""Each of the six ready configurations, end to end at demo size: command, wall time, and what its rewards did.

    python benchmarks/six_configs.py --gsm8k FOLDER [--work FOLDER] [--tasks gsm8k ...] [--steps 40]

FOLDER holds GSM8K's train.jsonl. Where a configuration asks for data of another kind, a small file of that kind is
made; json_answers brings its own. The models are small ones made here: a few hundred steps of next-token loss teach
each to write its configuration's format sometimes, and sloppier forms mostly, around a number drawn at random. So
what rewards can move is the form, and the table says by how much; nothing here learns to calculate.

train.py runs each configuration as it stands, but for what the command shows: sizes, data, model, rate. The control
is the same run at a rate of 1e-30: its rewards must not move. "Moved" are those whose mean over the last ten steps
lies more than four standard errors, of the steps' own scatter, from that over the first ten.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "demo")]

from benchmarks import refusal  # noqa: E402
from grpo.config.command_line import load_config  # noqa: E402

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
THOUGHT = "想" * 100  # the 100 characters that are asked for; they may be anything
# What the models are taught to write; {} is a number of one digit, {letter} a letter or the marker.
FORMS = {
    "gsm8k_zh": ["<think>\n想\n</think>\n<answer>\n{}\n</answer>\n", "<answer>\n{}\n</answer>\n", "答案是{}", "想{}"],
    "gsm8k": ["<think>\na\nb\n</think>\n<answer>\n{}\n</answer>", "<answer>\n{}\n</answer>", "It is {}.", "So {}."],
    "gsm8k_reasoning": [
        "<reasoning>\na\n</reasoning>\n<answer>\n{}\n</answer>\n",
        "<answer>\n{}\n</answer>\n",
        "It is {}.",
        "So {}.",
    ],
    "dapo_math": ["a<end_working_out><SOLUTION>{}</SOLUTION>", "a<end_working_out>{}", "<SOLUTION>{}", "It is {}."],
    "multiple_choice": [
        f"<reasoning>{THOUGHT}</reasoning>\n<answer>{{letter}}</answer>",
        "<answer>{letter}</answer>",
        "<reasoning>想</reasoning>{letter}",
        "{letter}",
    ],
    "json_answers": [
        '{{"buyer": "{name}", "item": "{item}", "count": {}, "total": {}}}',
        '{{"buyer": "{name}", "item": "{item}"}}',
        '{{"buyer": "{name}"',
        "{name} buys {} {item}.",
    ],
}
WINDOW = 10  # steps at either end that are compared
SHARES = [0.3, 0.2, 0.25, 0.25]  # of the forms
OWN = {  # settings beside those that all tasks share; dapo_math runs on two processes
    "gsm8k_zh": {"eval_split_size": 16},
    "gsm8k": {"eval_split_size": 16, "data_rows": 512, "max_prompt_length": 400},
    "gsm8k_reasoning": {"eval_rows": 16, "max_prompt_length": 400, "lr": 3e-3},
    "dapo_math": {"eval_split_size": 16, "lr": 3e-3},  # adapters, here and in the next, want larger steps
    "multiple_choice": {"eval_split_size": 16, "max_generate_length": 64, "lr": 3e-3},
    "json_answers": {},
}


def write_data(task: str, folder: Path, gsm8k: Path) -> Path | None:
    """Questions in the columns that the configuration reads; None where it brings its own."""
    import datasets

    rng = random.Random(0)
    sums = [(a, b) for a in range(1, 30) for b in range(1, 30)]
    rng.shuffle(sums)
    if task == "gsm8k_zh":
        rows = [{"question_zh-cn": f"{a}+{b}等于几？", "answer_only": str(a + b)} for a, b in sums[:400]]
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "sums"))
        return folder / "sums"
    if task in ("gsm8k", "gsm8k_reasoning"):
        return gsm8k / "train.jsonl"
    if task == "dapo_math":
        rows = [{"prompt": f"What is {a} + {b}?", "solution": str(a + b)} for a, b in sums[:400]]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / "sums.parquet"))
        return folder / "sums.parquet"
    if task == "multiple_choice":
        refusal.write_csv(folder / "choices.csv", refusal.questions(seed=1, held_out=False), 400)
        return folder / "choices.csv"
    return None


def completion(task: str, rng: random.Random) -> str:
    """What the model is taught to write, drawn at random."""
    [form] = rng.choices(FORMS[task], SHARES)
    words = {
        "letter": rng.choice("ABCD?"),
        "name": rng.choice(["Mia", "Sam", "Eva"]),
        "item": rng.choice(["pears", "eggs"]),
    }
    return form.format(*(rng.randint(1, 9) for _ in range(2)), **words)


def command_line(task: str, folder: Path, data: Path | None, steps: int, lr: float) -> list[str]:
    """The configuration on small data and a small model."""
    cfg, _ = load_config(["--config", f"configs/{task}.yaml"])
    flat: dict[str, object] = {
        "model": folder / "model",
        **({} if data is None else {"data": data}),
        "max_steps": steps,
        "lr": lr,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "max_generate_length": 40,
        "dtype": "fp32",
        "gradient_checkpointing": "false",
        "log_samples_steps": 0,
        "save_steps": 0,
        "num_threads": 1,
        "load_in_4bit": False,
        "optimizer": "adamw",
    }
    if cfg.eval_data is not None:
        flat |= {"eval_data": data}
    flat |= OWN[task]
    return ["--config", f"configs/{task}.yaml", *(str(w) for key, value in flat.items() for w in (f"--{key}", value))]


def make_model(task: str, folder: Path, words: list[str], num_steps: int) -> None:
    """A small Qwen3 that writes the forms of a task after the prompts of its configuration."""
    import torch
    from make_base import train_tokenizer

    from grpo.data.questions import load_questions
    from grpo.data.recipe import make_recipe

    cfg, _ = load_config(words)
    rng = random.Random(0)
    texts = [completion(task, rng) for _ in range(300)]
    asked = [cfg.system_prompt or "", cfg.prompt_template]
    if task in ("gsm8k", "gsm8k_reasoning"):
        asked += [json.loads(line)["question"] for line in Path(cfg.data or "").read_text("utf-8").splitlines()[:500]]
    tokenizer = train_tokenizer(asked * 3 + texts)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = refusal.make_model(len(tokenizer), tokenizer.eos_token_id, hidden_size=64, max_positions=2048)
    prompts = [prompt.token_ids for prompt in load_questions(cfg, make_recipe(cfg, tokenizer), tokenizer).items]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        pairs = [
            ([*rng.choice(prompts)], [*tokenizer(completion(task, rng))["input_ids"], tokenizer.eos_token_id])
            for _ in range(16)
        ]
        ids, labels = refusal.padded(pairs, tokenizer.eos_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"{task}: taught, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(task: str, words: list[str], folder: Path) -> tuple[list[dict], float, str]:
    """Run train.py. Returns the metrics of its steps, the wall seconds, and the command as a user would write it."""
    ranks = 2 if task == "dapo_math" else 1
    words = [*words, "--output_dir", str(folder / "output"), "--runs_dir", str(folder / "runs"), "--resume", "never"]
    launcher = ["launch/torchrun.py", "--standalone", f"--nproc_per_node={ranks}", "train.py", *words]
    start_s = time.monotonic()
    done = subprocess.run([sys.executable, *launcher], cwd=PROJECT, capture_output=True, text=True)
    seconds = time.monotonic() - start_s
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    lines = (folder / "runs" / task / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "reward/mean" in row]
    return steps, seconds, "python " + " ".join(map(shlex.quote, launcher))


def change(steps: list[dict], key: str) -> tuple[float, float, bool]:
    """Mean over the first and the last ten steps, and whether they differ beyond the steps' scatter."""
    first, last = ([step[key] for step in part if key in step] for part in (steps[:WINDOW], steps[-WINDOW:]))
    if min(len(first), len(last)) < 2:
        return math.nan, math.nan, False
    a, b = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    return a, b, abs(b - a) > 4 * error + 1e-9


def row_of(task: str, names: list[str], steps: list[dict], still: list[dict], seconds: float) -> tuple[str, int, int]:
    """The table's row; how many of the configuration's curves moved, and how many of the control's."""
    keys = {
        "reward/mean": "sum",
        **{f"reward/{name}/mean": name for name in names},
        "completions/length_mean": "length",
    }
    cells, moved, moved_still = [], [], []
    for key, name in keys.items():
        a, b, changed = change(steps, key)
        c, d, changed_still = change(still, key)
        cells.append(f"{name} {a:.2f} to {b:.2f} ({c:.2f} to {d:.2f})")
        moved += [f"{name} {b - a:+.2f}"] * changed
        moved_still += [name] * changed_still
    return (
        (
            f"| `{task}` | {seconds:.0f} | {'; '.join(cells)} | {', '.join(moved) or 'nothing'} | "
            f"{', '.join(moved_still) or 'nothing'} |"
        ),
        len(moved),
        len(moved_still),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--work", type=Path, help="folder for data, models and runs (default: a temporary one)")
    parser.add_argument("--tasks", nargs="+", default=[*FORMS], choices=[*FORMS])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--teaching_steps", type=int, default=150)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return measure(args, Path(args.work or name).resolve())


def measure(args: argparse.Namespace, work: Path) -> int:
    """Train every configuration and its control; print commands, table and verdict."""
    table = [
        "| configuration | wall s | first to last ten steps (control) | moved | moved in the control |",
        "| --- | ---: | --- | --- | --- |",
    ]
    wrong = []
    for task in args.tasks:
        folder = work / task
        folder.mkdir(parents=True, exist_ok=True)
        data = write_data(task, folder, args.gsm8k.resolve())
        words = command_line(task, folder, data, args.steps, args.lr)
        if not (folder / "model" / "config.json").is_file():
            make_model(task, folder / "model", words, args.teaching_steps)
        steps, seconds, command = train(task, words, folder / "trained")
        still, _, _ = train(task, command_line(task, folder, data, args.steps, 1e-30), folder / "control")
        print(command.replace(str(work), "WORK").replace(str(args.gsm8k.resolve()), "GSM8K"), flush=True)
        names = [name.rpartition(":")[2] for name in load_config(words)[0].rewards]
        line, moved, moved_still = row_of(task, names, steps, still, seconds)
        table.append(line)
        print(line, flush=True)
        wrong += [f"{task}: nothing moved"] * (not moved) + [f"{task}: the control moved"] * bool(moved_still)
    print("\n" + "\n".join(table) + "\n")
    print("\n".join(wrong) or "In every configuration something moved, and nothing in its control.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
