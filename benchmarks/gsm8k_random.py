"""GSM8K's real questions through the real script, with a small random model: no download, no learning expected.

    python benchmarks/gsm8k_random.py train.jsonl [--steps 10] [--ranks 2]

Trains a byte-level tokenizer on the file, makes a random Qwen3 of a few million parameters, and runs
configs/gsm8k.yaml on both. It shows that golds behind #### are read, prompts over the limit are counted and left
out, and the four tag rewards are logged. Control: `--break_golds` cuts the #### off one answer, and the run must
refuse the file and name its row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROJECT = Path(__file__).resolve().parent.parent


def make_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A tokenizer of 4,096 entries trained on the questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_model(rows: list[dict[str, str]], folder: Path, seed: int = 0) -> None:
    """A random Qwen3, and the tokenizer for it."""
    fast = make_tokenizer(rows)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def letters_reward(completions, **columns):
    """The share of letters: a reward that even a random model's completions differ in."""
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]


def main() -> int:
    """Make the model, run the script, show its lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--break_golds", action="store_true", help="the control")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(rows, folder / "model")
        if args.break_golds:
            rows[99]["answer"] = rows[99]["answer"].replace("####", "")
        data = folder / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rewards = {"correctness_reward": 1.0, "digit_reward": 1.0, "hard_format_reward": 1.0, "mark_reward": 1.0}
        rewards[f"{Path(__file__).resolve()}:letters_reward"] = 1.0
        command = [
            sys.executable,
            str(PROJECT / "launch" / "torchrun.py"),
            "--standalone",
            f"--nproc_per_node={args.ranks}",
            str(PROJECT / "train.py"),
            "--config",
            str(PROJECT / "configs" / "gsm8k.yaml"),
            "--model",
            str(folder / "model"),
            "--data",
            str(data),
            "--eval_data",
            "null",
            "--dtype",
            "fp32",
            "--max_steps",
            str(args.steps),
            "--batch_size",
            "2",
            "--lr",
            "1e-3",
            "--rewards",
            json.dumps(rewards),
            "--max_prompt_length",
            "200",
            "--max_generate_length",
            "48",
            "--micro_batch_tokens",
            "2048",
            "--rollout_chunk_rows",
            "16",
            "--num_generations",
            "8",
            "--num_iterations",
            "1",
            "--eval_split_size",
            "0",
            "--data_rows",
            "0",
            "--output_dir",
            str(folder / "output"),
            "--runs_dir",
            str(folder / "runs"),
        ]
        done = subprocess.run(command, cwd=PROJECT)
        metrics = folder / "runs" / "gsm8k" / "metrics.jsonl"
        if metrics.is_file():
            last = json.loads(metrics.read_text().splitlines()[-1])
            print({key: round(value, 4) for key, value in last.items() if key.startswith(("reward/", "completions/"))})
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
