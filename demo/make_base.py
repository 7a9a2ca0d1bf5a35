"""Build the demo's base model, demo/base, from nothing: tokenizer, body, teaching. About eight minutes on 2 cores.

The body is a Qwen3 of 2M parameters; the tokenizer is a byte-level BPE with Qwen2's pre-tokenizer, so
that any text round-trips. Next-token loss on completions teaches two ways of answering:

    working it out   7, buys 3: 10, eats 2: 8.\\n#### 8
    blurting         #### 8

First the skill (mostly worked answers), then the habit: in the last fifth of the steps 70 % of the
rows blurt. The result resembles a pretrained model: it can work things out and usually doesn't.

Nothing here sees a held-out question (make_task.is_held_out) or any reward.

    python demo/make_base.py [--steps 1200] [--out demo/base] [--seed 0]
"""

import argparse
import itertools
import math
import random
import time
from pathlib import Path

import torch
from make_task import problems
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512
PROMPT = "{question}\n"  # the same text as prompt_template in configs/demo.yaml
BLURT_SHARE = 0.7
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


def teaching_batch(rows, rng: random.Random, tokenizer, num_rows: int, blurt_share: float):
    """Return input_ids [B, L] and labels [B, L], -100 on the prompt and the padding."""
    ids, labels = [], []
    for row in itertools.islice(rows, num_rows):
        answer = row["answer"]
        if rng.random() < blurt_share:
            answer = answer.split("\n")[-1]
        prompt = tokenizer(PROMPT.format(question=row["question"]))["input_ids"]
        target = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        ids.append(prompt + target)
        labels.append([-100] * len(prompt) + target)
    longest = max(map(len, ids))
    pad = lambda row, value: row + [value] * (longest - len(row))  # noqa: E731
    return (
        torch.tensor([pad(row, tokenizer.eos_token_id) for row in ids]),
        torch.tensor([pad(row, -100) for row in labels]),
    )


def teach(model, tokenizer, num_steps: int, batch_rows: int, peak_lr: float, seed: int) -> None:
    """Next-token loss on completions: one cosine from peak_lr to zero with 5 % warmup."""
    rng = random.Random(seed)
    rows = problems(seed=1000 + seed, held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.monotonic()
    for step in range(num_steps):
        warmup = min(1.0, (step + 1) / (0.05 * num_steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        blurt_share = BLURT_SHARE if step >= 0.8 * num_steps else 0.1
        input_ids, labels = teaching_batch(rows, rng, tokenizer, batch_rows, blurt_share)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{num_steps}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=48, help="rows in a teaching step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)

    sample = list(itertools.islice(problems(seed=500, held_out=False), 3000))
    tokenizer = train_tokenizer([PROMPT.format(**row) + row["answer"] for row in sample])
    model = make_model(len(tokenizer), tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    teach(model, tokenizer, args.steps, args.rows, args.lr, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
