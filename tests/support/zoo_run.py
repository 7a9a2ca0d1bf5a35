"""A run of train.py in this process on one tiny model of the zoo, and the table of docs/models.md.

python -m tests.support.zoo_run [TYPE ...] > docs/models.md
"""

import contextlib
import io
import json
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

import train
from grpo.config.command_line import load_config
from grpo.errors import UserError, first_line
from grpo.forward.arguments import accepted
from grpo.models.checks import load_model, quiet
from grpo.models.loading import resolve
from grpo.rollout import Request
from grpo.rollout.engine import NativeEngine
from grpo.rollout.sampling import Sampling
from grpo.runtime.distributed import start
from tests.support.tiny import tiny_tokenizer
from tests.support.zoo import TYPES, zoo_model

HEADER = """# Models

Every type in transformers' table of causal language models, tried with a tiny random model (transformers {version}). `python -m tests.support.zoo_run` writes this page, and `pytest --full tests/models/test_zoo.py` compares it. What the columns say is measured by a training run of two updates, full and with LoRA on all linear layers (`lora_target_modules: all-linear`): the checkpoint gives the same logits when it is loaded again, greedy tokens are those of `generate`, and sampler and trainer agree within 1e-4 on every token.

- **rows decode**: *shared*, each prompt is stored once for its completions; *padded*, with transformers' own cache; *equal lengths*, the same, but only rows whose prompts have one length decode together; *recompute*, without a cache. From left to right each is slower than the one before.
- **prompts in the update**: *shared*, each prompt is computed once for its completions; *by row*, with each of them.
- A type that is refused ends with one line and exit code 2 before the first rollout.

"""  # noqa: E501
STEPS, NEW = 2, 12
PROMPTS = (4, 9, 15, 9, 6, 11)  # tokens


@dataclass
class Trial:
    """What a run showed."""

    model_type: str
    refused: str = ""  # the reason
    cache: str = ""
    shares_prompts: bool = False
    gap: float = 0.0  # largest |sampler - trainer| log-prob of any token
    updates: int = 0
    reload_gap: float = 0.0  # largest difference of logits after saving and loading
    greedy: int = 0  # prompts whose greedy tokens are not those of generate
    distinct: int = 0  # different tokens among the greedy ones

    def row(self, lora: "Trial | None") -> str:
        """A line of the table."""
        if self.refused:
            return f"| {self.model_type} | no | | | | {self.refused} |"
        adapters = "" if lora is None else "no" if lora.refused else "yes"
        shared = "shared" if self.shares_prompts else "by row"
        reason = "" if lora is None else lora.refused
        return f"| {self.model_type} | yes | {self.cache.replace('_', ' ')} | {shared} | {adapters} | {reason} |"


def settings(folder: Path, **more: object) -> list[str]:
    """train.py's command line."""
    rewards = folder / "rewards.py"
    rewards.write_text(
        "def varied(completions, **columns):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    words = {
        "model": folder / "base",
        "data": "demo/train.jsonl",
        "answer_format": "hash",
        "data_rows": 8,
        "prompt_template": "{question}\n",
        "chat_template": "false",
        "max_prompt_length": 100,
        "max_steps": STEPS,
        "rewards": f'{{"{rewards}:varied": 1.0}}',
        "reward_workers": 0,
        "batch_size": 2,
        "num_generations": 4,
        "max_generate_length": NEW,
        "device": "cpu",
        "report_to": "none",
        "save_steps": STEPS,
        "lr": 1e-3,
        "num_threads": 1,
        "output_dir": folder / "output",
        "runs_dir": folder / "runs",
        **more,
    }
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def save_base(folder: Path, model_type: str) -> None:
    """A model folder of this type, as save_pretrained writes it."""
    zoo_model(model_type).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")


def run_type(folder: Path, model_type: str, **more: object) -> Trial:
    """Train, save, load again, decode greedily. A refusal by one line is a result; any other exception is raised."""
    trial = Trial(model_type)
    try:
        save_base(folder, model_type)
    except Exception as error:  # its default config cannot be shrunk, or a package is missing
        trial.refused = f"not tried: {type(error).__name__}: {reason_of(error)}"
        return trial
    caught: list = []
    load_policy = train.load_policy

    def remembered(*args):
        caught.append(load_policy(*args))
        return caught[-1]

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        train.load_policy = remembered
        try:
            resolve(str(folder / "base"))
            cfg, _ = load_config(settings(folder, **more))
            train.train(cfg, start(cfg.device, 1))
        except UserError as error:
            trial.refused = reason_of(error)
            return trial
        finally:
            train.load_policy = load_policy
        [policy] = caught
        measure(trial, folder, policy.model)
        trial.shares_prompts = policy.scorer.shares_prompts
    return trial


def reason_of(error: BaseException) -> str:
    """The part of a message that names the reason, without folders and measured values."""
    text = str(error).strip().split("can be trained: ")[-1].split(". Use a decoder")[0]
    if "could not be loaded: " in text:
        text = text.split("could not be loaded: ")[1].split(" Give a ")[0]
    text = re.sub(r"^model: '\S+' is an? ", "a ", text).split(". Use one")[0]
    text = re.sub(r" \(logits differ by [^)]*\)", "", text)
    return first_line(Exception(text))[:110].strip(" :").replace("|", "/")


@torch.no_grad()
def measure(trial: Trial, folder: Path, model: PreTrainedModel) -> None:
    """Fill in what the run's metrics and its last checkpoint show."""
    lines = next((folder / "runs").rglob("metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "grad_norm" in row]
    trial.updates = len(steps)
    trial.gap = max(row["sampler_gap/max"] for row in steps)
    again = load_model(str(folder / "output" / f"checkpoint_{STEPS}"), model.device)
    ids = torch.arange(3, 20, device=model.device)[None]
    arguments = accepted(model, {"use_cache": False})
    before, after = (one.eval()(input_ids=ids, **arguments).logits for one in (model, again))
    trial.reload_gap = float((after - before).abs().max())
    engine = NativeEngine(again, (0,), NEW, 3)
    trial.cache = engine.cache_kind
    prompts = [tuple(5 + (7 * p + i * i) % 250 for i in range(n)) for p, n in enumerate(PROMPTS)]
    rows = engine.generate([Request(i, i, 0, ids) for i, ids in enumerate(prompts)], Sampling(temperature=0.0))
    trial.greedy = sum(row.token_ids.tolist() != generated(again, ids) for ids, row in zip(prompts, rows, strict=True))
    trial.distinct = len({token for row in rows for token in row.token_ids.tolist()})


def generated(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    """What generate gives; without its cache, where that changes its tokens or raises (moshi, blt)."""
    found = []
    for cached in (False, True):
        model.generation_config = GenerationConfig(
            eos_token_id=0, pad_token_id=0, max_new_tokens=NEW, do_sample=False, use_cache=cached
        )
        with contextlib.suppress(AttributeError, ValueError, RuntimeError):
            ids = torch.tensor([prompt], device=model.device)
            found.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())
    return found[0]


def table(types: list[str]) -> str:
    """The page docs/models.md."""
    rows = []
    for model_type in types:
        trials, began = [], time.perf_counter()
        for more in ({}, {"lora_r": 4}):
            with tempfile.TemporaryDirectory() as name:
                trials.append(run_type(Path(name), model_type, **more))
            if trials[0].refused:
                break
        rows.append(trials[0].row(trials[1] if len(trials) > 1 else None))
        gaps = "".join(f" gap {trial.gap:.1e}" for trial in trials)
        print(f"{rows[-1]}{gaps} {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    head = ["| type | trained | rows decode | prompts in the update | LoRA | why not |", "| --- " * 6 + "|"]
    return HEADER.format(version=transformers.__version__) + "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    quiet()
    print(table(sys.argv[1:] or list(TYPES)), end="")
