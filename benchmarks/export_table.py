"""What an export costs and keeps: for each form its size, load time, token agreement and perplexity against fp32.

    python benchmarks/export_table.py --work /tmp/export_table [--steps 150] [--architectures llama,qwen2,qwen3,demo]

Small models (hidden 256, so that K-quants find rows of 256) are taught the demo's questions and answers, exported in
every form, and asked, as the demo's own base model is: 20 prompts, 48 greedy tokens each. Agreement is against our
own engine in fp32; for f16 also against our engine with weights rounded to f16, where a divergence is right only if
our two best logits are closer than 0.01. The control is a Llama file whose q and k were not put into llama.cpp's
order: it must fail.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch.nn import functional as F

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from grpo.checkpoints.manifest import write_manifest  # noqa: E402
from grpo.config.command_line import load_config  # noqa: E402
from grpo.data.recipe import make_recipe, recipe_text  # noqa: E402
from grpo.export import gguf_model  # noqa: E402
from grpo.export.command import main as run_export  # noqa: E402
from grpo.models.checks import load_model, quiet  # noqa: E402
from grpo.models.loading import load_tokenizer, prepare  # noqa: E402
from grpo.rollout import Request  # noqa: E402
from grpo.rollout.engine import NativeEngine  # noqa: E402
from grpo.rollout.sampling import Sampling  # noqa: E402
from grpo.types import Counters  # noqa: E402

CLOSE = 1e-2  # between the two best logits
NEW_TOKENS, NUM_PROMPTS, NUM_TEXTS = 48, 20, 40
QUANTS = ("f16", "q8_0", "q5_k_m", "q4_k_m")
FORMS = ["--to", "merged_16bit,merged_4bit,gguf", "--quant", ",".join(QUANTS)]
Logits = Callable[[list[int]], np.ndarray]  # tokens -> [tokens, V]


def config_of(architecture: str, vocab_size: int, **how: Any) -> transformers.PreTrainedConfig:
    """Two layers, hidden 256; tied or not and with fewer KV heads, as the real ones vary."""
    common = (
        dict(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        | how
    )
    if architecture == "llama":
        return transformers.LlamaConfig(**{"tie_word_embeddings": False, **common})
    if architecture == "qwen2":
        return transformers.Qwen2Config(**{"tie_word_embeddings": True, **common})
    return transformers.Qwen3Config(**{"tie_word_embeddings": True, "head_dim": 64, **common})


def texts_of(name: str) -> list[tuple[str, str]]:
    """Questions and answers of a demo file, as the demo puts them."""
    rows = map(json.loads, (PROJECT / "demo" / name).read_text(encoding="utf-8").splitlines())
    return [(row["question"] + " ", row["answer"]) for row in rows]


def teach(config: transformers.PreTrainedConfig, steps: int, seed: int = 0) -> transformers.PreTrainedModel:
    """A model that has read `steps` x 8 rows of 192 tokens of the demo's texts, one after the other."""
    tokenizer = load_tokenizer(str(PROJECT / "demo" / "base"))
    ends = [tokenizer.eos_token_id]
    stream = [i for pair in texts_of("train.jsonl") for i in tokenizer("".join(pair))["input_ids"] + ends]
    rows = torch.tensor(stream[: len(stream) // 192 * 192]).view(-1, 192)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        picked = rows[torch.randint(len(rows), (8,))]
        loss = F.cross_entropy(model(picked).logits[:, :-1].flatten(0, 1), picked[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # biases that training leaves near their start would hide an error in them
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return prepare(model)


def checkpoint_of(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """The model as a checkpoint of a demo run."""
    tokenizer = load_tokenizer(str(PROJECT / "demo" / "base"))
    cfg, _ = load_config(["--config", str(PROJECT / "configs" / "demo.yaml")])
    recipe = dataclasses.replace(make_recipe(cfg, tokenizer), questions=[texts_of("test.jsonl")[0][0]])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "trainer").mkdir()
    state = {"counters": dataclasses.asdict(Counters(step=1)), "config": dataclasses.asdict(cfg)}
    (folder / "trainer" / "state.json").write_text(json.dumps(state))
    (folder / "trainer" / "recipe.json").write_text(recipe_text(recipe), encoding="utf-8")
    write_manifest(folder, 1)
    return folder


def rounded(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model with every matrix rounded to f16, in fp32; vectors stay, as in a GGUF file."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    return model


def ours(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of our engine, NEW_TOKENS for each prompt: it does not stop."""
    engine = NativeEngine(model, [], NEW_TOKENS, seed=0)
    requests = [Request(i, i, 0, tuple(prompt)) for i, prompt in enumerate(prompts)]
    done = sorted(engine.generate(requests, Sampling(temperature=0.0)), key=lambda completion: completion.row)
    return [completion.token_ids.tolist() for completion in done]


def logits_of(model: transformers.PreTrainedModel) -> Logits:
    """The model's logits of a text."""

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy()

    return logits


class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread, with its KV cache in f32."""

    def __init__(self, path: Path):
        import llama_cpp

        f32 = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            str(path), n_ctx=512, logits_all=True, type_k=f32, type_v=f32, verbose=False, n_threads=1, n_threads_batch=1
        )

    def close(self) -> None:
        """Free it: at the interpreter's end llama-cpp-python no longer can."""
        self.model.close()

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of a text from its start."""
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, prompt: list[int]) -> list[int]:
        """NEW_TOKENS likeliest tokens, one after the other."""
        self.model.reset()
        self.model.eval(prompt)
        said: list[int] = []
        while len(said) < NEW_TOKENS:
            said.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            self.model.eval(said[-1:])
        return said


def divergences(
    mine: list[list[int]], theirs: list[list[int]], prompts: list[list[int]], logits: Logits
) -> list[float]:
    """Gap between our two best logits at the first difference of each prompt that has one."""
    gaps = []
    for prompt, a, b in zip(prompts, mine, theirs, strict=True):
        at = next((t for t, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            second, best = np.sort(logits(prompt + a[:at])[-1])[-2:]
            gaps.append(float(best - second))
    return gaps


def agreement(mine: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens before the first difference of their prompt."""
    same = 0
    for a, b in zip(mine, theirs, strict=True):
        same += next((t for t, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, mine))


def loss_of(logits: Logits, texts: list[list[int]]) -> float:
    """Mean negative log-likelihood of a token, nats."""
    total = count = 0.0
    for ids in texts:
        values = torch.from_numpy(logits(ids)[:-1])
        total += float(F.cross_entropy(values, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return total / count


def export(words: list[str]) -> None:
    """python -m grpo.export; what it says goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        assert run_export(words) == 0, words


def material() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and whole texts of held-out questions, as tokens."""
    tokenizer = load_tokenizer(str(PROJECT / "demo" / "base"))
    pairs = texts_of("test.jsonl")
    prompts = [tokenizer(question)["input_ids"] for question, _ in pairs[:NUM_PROMPTS]]
    return prompts, [tokenizer("".join(pair))["input_ids"] for pair in pairs[:NUM_TEXTS]]


def without_order(folder: Path, out: Path) -> Path:
    """The control: an f16 file of a Llama whose q and k keep the order of transformers."""
    with mock.patch.object(gguf_model, "_as_pairs", lambda name, values, config: values):
        export(["--checkpoint", str(folder), "--to", "gguf", "--out", str(out)])
    return out / "model-f16.gguf"


def measure(architecture: str, work: Path, steps: int) -> None:
    """Print one architecture's rows."""
    demo = architecture == "demo"
    model = load_model("demo/base", torch.device("cpu")) if demo else teach(config_of(architecture, 374), steps)
    folder = checkpoint_of(model, work / architecture / "checkpoint_1")
    out = work / architecture / "exported"
    export(["--checkpoint", str(folder), *FORMS, "--out", str(out)])
    cpu, (prompts, texts) = torch.device("cpu"), material()
    whole = load_model(str(folder), cpu)
    reference, base = ours(whole, prompts), loss_of(logits_of(whole), texts)

    def row(form: str, size: int, seconds: float, said: list[list[int]], logits: Logits) -> None:
        ratio = float(np.exp(loss_of(logits, texts) - base))
        print(
            f"| {architecture} | {form} | {size / 1e6:.2f} | {seconds:.2f} | {agreement(reference, said):.1%} "
            f"| {ratio:.4f} |",
            flush=True,
        )

    row("fp32", (folder / "model.safetensors").stat().st_size, 0.0, reference, logits_of(whole))
    for form in ("merged_16bit", "merged_4bit"):
        began = time.monotonic()
        how: dict[str, Any] = {"dtype": torch.float32} if form == "merged_16bit" else {"device_map": {"": "cpu"}}
        model = transformers.AutoModelForCausalLM.from_pretrained(out / form, **how)
        seconds = time.monotonic() - began
        said = ours(prepare(model), prompts)
        row(form, (out / form / "model.safetensors").stat().st_size, seconds, said, logits_of(model))
    files = {f"gguf {quant}": out / "gguf" / f"model-{quant}.gguf" for quant in QUANTS}
    if architecture == "llama":
        files["control: order of q, k"] = without_order(folder, work / architecture / "control")
    exact = rounded(load_model(str(folder), cpu))
    exact_said = ours(exact, prompts)
    for form, path in files.items():
        began = time.monotonic()
        there = LlamaCpp(path)
        seconds = time.monotonic() - began
        said = [there.greedy(prompt) for prompt in prompts]
        row(form, path.stat().st_size, seconds, said, there.logits)
        if form in ("gguf f16", "control: order of q, k"):
            gaps = divergences(exact_said, said, prompts, logits_of(exact))
            apart = max(float(np.abs(there.logits(ids) - logits_of(exact)(ids)).max()) for ids in texts[:5])
            print(
                f"  against weights rounded to f16: {NUM_PROMPTS - len(gaps)} of {NUM_PROMPTS} prompts equal over "
                f"{NEW_TOKENS} tokens; divergences at gaps {[round(gap, 4) for gap in gaps]}, of them "
                f"{sum(gap >= CLOSE for gap in gaps)} wrong; logits differ by at most {apart:.2g}",
                flush=True,
            )
        there.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for models and exports")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--architectures", default="llama,qwen2,qwen3,demo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    args.work.mkdir(parents=True)
    print(
        "| model | form | MB | load s | tokens equal | perplexity / fp32 |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for architecture in args.architectures.split(","):
        measure(architecture, args.work, args.steps)


if __name__ == "__main__":
    main()
