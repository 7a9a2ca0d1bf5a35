"""Build the demo's base model, demo/base, from nothing: tokenizer, random body, teaching. About ten minutes on 2 cores.

The body is a Qwen3 of 2M parameters; the tokenizer is a byte-level BPE with Qwen2's pre-tokenizer, so
that any text round-trips. `python -m grpo.sft` with demo/base.yaml teaches two ways of answering, one after the other:

    skill   mostly working it out     7, buys 3: 10, eats 2: 8.\\n#### 8
    habit   mostly blurting           #### 8

The result resembles a pretrained model: it can work things out and usually doesn't.

Nothing here sees a held-out question (make_task.is_held_out) or any reward.

    python demo/make_base.py [--skill_steps 960] [--habit_steps 240] [--out DIR] [--work DIR] [--seed 0] [settings]

What is made on the way stays in --work (demo/.base): the random model, the questions, both stages' checkpoints and
curves. Run again after an interruption, both stages go on from where they were. Other settings are those of grpo.sft.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from make_task import problems, write_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512
PROMPT = "{question}\n"  # the same text as prompt_template in configs/demo.yaml and demo/base.yaml
ROWS = 48  # texts of a step, batch_size in demo/base.yaml
BLURT_SHARES = {"skill": 0.1, "habit": 0.7}
RATES = {"skill": 2e-3, "habit": 2e-4}  # peaks
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most VOCAB_SIZE entries, the three special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocab_size: int, eos_token_id: int) -> Qwen3ForCausalLM:
    """A small Qwen3; row sizes are multiples of 256, so that every llama.cpp quantisation fits."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def answered(rows: Iterator[dict[str, str]], blurt_share: float, rng: random.Random) -> Iterator[dict[str, str]]:
    """Let that share of the answers be their last line alone."""
    for row in rows:
        blurts = rng.random() < blurt_share
        yield {"question": row["question"], "answer": row["answer"].split("\n")[-1] if blurts else row["answer"]}


def make_start(work: Path, steps: dict[str, int], seed: int) -> None:
    """Write the tokenizer, the random model and the questions of both stages."""
    torch.manual_seed(seed)
    sample = list(itertools.islice(problems(seed=500, held_out=False), 3000))
    tokenizer = train_tokenizer([PROMPT.format(**row) + row["answer"] for row in sample])
    model = make_model(len(tokenizer), tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    rows = problems(seed=1000 + seed, held_out=False)  # no question comes twice
    rng = random.Random(seed)
    for stage, share in BLURT_SHARES.items():
        write_jsonl(work / f"{stage}.jsonl", answered(rows, share, rng), steps[stage] * ROWS)
    tokenizer.save_pretrained(work / "random")
    model.save_pretrained(work / "random")


def teach(work: Path, stage: str, model: Path, num_steps: int, more: list[str]) -> Path:
    """One stage of supervised training, or what is left of it. Returns its last checkpoint."""
    settings = {
        "model": model,
        "data": work / f"{stage}.jsonl",
        "lr": RATES[stage],
        "max_steps": num_steps,
        "output_dir": work / stage,
        "runs_dir": work / "runs",
        "run_name": stage,
    }
    here = Path(__file__).resolve().parent
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "grpo.sft", "--config", str(here / "base.yaml"), *flags, *more]
    done = subprocess.run(command, cwd=here.parent)
    if done.returncode:
        sys.exit(done.returncode)
    return work / stage / f"checkpoint_{num_steps}"


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skill_steps", type=int, default=960)
    parser.add_argument("--habit_steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=here / "base")
    parser.add_argument("--work", type=Path, default=here / ".base")
    args, more = parser.parse_known_args()  # more: settings of grpo.sft, which refuses what it does not know
    work, out = args.work.resolve(), args.out.resolve()
    steps = {"skill": args.skill_steps, "habit": args.habit_steps}
    made = json.dumps({**steps, "seed": args.seed})
    note = work / "made.json"
    if not note.exists() or note.read_text(encoding="utf-8") != made:  # the random model is written last but this
        work.mkdir(parents=True, exist_ok=True)
        make_start(work, steps, args.seed)
        note.write_text(made, encoding="utf-8")
    skilled = teach(work, "skill", work / "random", steps["skill"], more)
    taught = teach(work, "habit", skilled, steps["habit"], more)
    AutoModelForCausalLM.from_pretrained(taught, dtype=torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(work / "random").save_pretrained(out)
    print(f"saved to {out}")


if __name__ == "__main__":
    main()
