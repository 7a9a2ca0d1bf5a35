"""What benchmarks/vs_trl.py runs: a model folder, questions, and the settings both sides share.

Models are made here: random Qwen3 bodies, or the demo's base. A random model spreads its probability, so lengths are
decided by the vocabulary: with 96 words one token in 96 ends a completion, which spreads lengths far; with
150,000 hardly any does. `long_completion` has 2,048 words and as many tokens at most: a third of the rows is cut there,
a quarter ends before a quarter of it; `long_completion_8k` has four times as many. `gpu` has the shape of Qwen3-0.6B,
and wants a GPU. `smollm2` and `real` are SmolLM2-135M-Instruct, with questions of GSM8K and those of demo/real_model.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROJECT = Path(__file__).resolve().parent.parent
REWARDS = Path(__file__).resolve().with_name("workload_rewards.py")
QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
BODY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
SIX_MILLION = {"num_hidden_layers": 7, "intermediate_size": 768}


@dataclass(frozen=True)
class Workload:
    """A step: `prompts` questions, `group` completions of each, of at most `max_new` tokens."""

    model: str
    data: str  # JSON lines with `prompt`, the text as the model reads it, and `answer`
    reward: str  # path.py:function
    prompts: int
    group: int
    max_prompt: int
    max_new: int
    trl_rows: int = 16  # TRL's per_device_train_batch_size
    lr: float = 1e-12  # leaves every fp32 weight as it is: all steps do the same work
    seed: int = 42  # what is sampled, and the order of the questions
    dtype: str = "fp32"  # or bf16
    device: str = "cpu"  # or cuda
    temperature: float = 1.0


def word_model(folder: Path, words: int, **body: int) -> list[str]:
    """A random Qwen3 whose tokens are the words w0, w1, …; word 0 ends a completion. Returns the other words."""
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=words,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **(BODY | body),
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    return list(vocabulary)[1:]


def write_questions(folder: Path, rows: list[dict[str, str]]) -> str:
    """rows: `prompt` and `answer`."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def random_questions(folder: Path, words: list[str], shortest: int, longest: int) -> str:
    """256 questions of random words."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(shortest, longest))) for _ in range(256)]
    return write_questions(folder, [{"prompt": text, "answer": "none"} for text in texts])


def demo_questions(folder: Path, shots: int = 0) -> str:
    """The demo's, with so many worked examples before each."""
    lines = (PROJECT / "demo" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: 256 + shots]]
    header = "".join(f"{row['question']}\n{row['answer']}\n\n" for row in rows[:shots])
    prompts = [{"prompt": f"{header}{row['question']}\n", "answer": row["answer"]} for row in rows[shots:]]
    return write_questions(folder, prompts)


def smollm2(folder: Path, model: str | None, file: Path, question: str, reward: str) -> Workload:
    """SmolLM2-135M-Instruct, as train.py takes it, with the settings of configs/smollm2.yaml and chat prompts.

    question: the column of `file` that holds it.
    """
    from grpo.config.command_line import load_config
    from grpo.data.recipe import build, make_recipe, render
    from grpo.models.checks import quiet
    from grpo.models.loading import load_tokenizer, resolve

    if model is None:
        raise SystemExit("give --model FILE.gguf, SmolLM2-135M-Instruct (see launch/real_model.sh)")
    quiet()
    cfg, _ = load_config(["--config", str(PROJECT / "configs" / "smollm2.yaml"), "--model", model])
    tokenizer = load_tokenizer(model)
    recipe = make_recipe(cfg, tokenizer)
    asked = [
        {"prompt": render(recipe, build(recipe, row[question], row), tokenizer), "answer": row["answer"]}
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())
    ]
    return Workload(
        resolve(model), write_questions(folder, asked), reward, cfg.batch_size, cfg.num_generations,
        cfg.max_prompt_length, cfg.max_generate_length, lr=cfg.lr, temperature=cfg.temperature,
    )  # fmt: skip


def make(name: str, folder: Path, gsm8k: Path | None = None, model: str | None = None) -> Workload:
    """Write a workload's files into `folder`."""
    if name == "real":
        reward = f"{PROJECT / 'reward_func.py'}:last_number_reward"
        return smollm2(folder, model, PROJECT / "demo" / "real_model" / "train.jsonl", "question", reward)
    if name in ("smollm2", "gsm8k") and gsm8k is None:
        raise SystemExit(f"{name}: give --gsm8k train.jsonl")
    if name == "smollm2":
        assert gsm8k is not None
        work = smollm2(folder, model, gsm8k, "question", f"{REWARDS}:spread_reward")
        return replace(work, prompts=2, max_prompt=320, max_new=96, trl_rows=4, temperature=1.0, lr=1e-12)
    demo = str(PROJECT / "demo" / "base")
    own = str(folder / "model")
    if name == "demo":
        return Workload(demo, demo_questions(folder), f"{REWARDS}:number_reward", 8, 8, 96, 80)
    if name == "easy":  # the demo, with 70 % of the groups without variance
        return Workload(demo, demo_questions(folder), f"{REWARDS}:easy_reward", 16, 8, 96, 80)
    if name == "long_prompt":
        return Workload(demo, demo_questions(folder, shots=8), f"{REWARDS}:spread_reward", 8, 8, 1024, 64)
    if name == "heavy_tail":
        data = random_questions(folder, word_model(folder, 96), 20, 60)
        return Workload(own, data, f"{REWARDS}:spread_reward", 8, 8, 64, 256)
    if name == "big_vocab":
        body = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
        data = random_questions(folder, word_model(folder, 150_000, **body), 20, 60)
        return Workload(own, data, f"{REWARDS}:spread_reward", 4, 8, 64, 32, trl_rows=8)
    if name == "gpu":
        data = random_questions(folder, word_model(folder, 151_936, **QWEN3_06B), 200, 256)
        return Workload(own, data, f"{REWARDS}:spread_reward", 32, 8, 256, 512, trl_rows=32, dtype="bf16")
    if name in ("long_completion", "long_completion_8k"):
        length = 2048 if name == "long_completion" else 8192
        data = random_questions(folder, word_model(folder, length, **SIX_MILLION), 100, 128)
        prompts = 2 if name == "long_completion" else 1
        return Workload(own, data, f"{REWARDS}:spread_reward", prompts, 8, 128, length, trl_rows=4)
    if name == "gsm8k":
        assert gsm8k is not None
        from benchmarks.gsm8k_random import make_model

        rows = [json.loads(line) for line in gsm8k.read_text(encoding="utf-8").splitlines()]
        make_model(rows, folder / "model")
        asked = [{"prompt": row["question"] + "\n", "answer": row["answer"]} for row in rows[:512]]
        return Workload(own, write_questions(folder, asked), f"{REWARDS}:spread_reward", 8, 8, 320, 96)
    raise SystemExit(
        f"no workload {name!r}: demo, easy, long_prompt, heavy_tail, big_vocab, long_completion, long_completion_8k, "
        "gpu, gsm8k, smollm2 or real"
    )
