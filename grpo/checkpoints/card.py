"""README.md, the model card: base, data, rewards, curve, metrics, config.

Names and settings are untrusted text; each is written in a code span or by a YAML writer, so that none of them can
become markup.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from grpo.config.checks import REPOSITORY
from grpo.errors import UserError
from grpo.strict_json import check_regular

MAX_METRICS_BYTES = 2**28
MAX_ROWS = 12  # of the curve
LIBRARIES = {
    "checkpoint": "transformers",
    "merged_16bit": "transformers",
    "merged_4bit": "transformers",
    "lora": "peft",
    "gguf": "gguf",
}
CURVE = ("reward/mean", "reward/std", "completions/length_mean", "kl")


def read_metrics(config: dict[str, Any], step: int, path: Path | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl up to the checkpoint's step. Without `path`: the run's own file; [] if there is none.

    config: the run's settings, with this machine's paths. A last line that is not written to its end is left out.

    Raises UserError for a file that cannot be read or has a line without a step.
    """
    named = path is not None
    if path is None:
        path = Path(str(config.get("runs_dir"))) / str(config.get("run_name")) / "metrics.jsonl"
        if not path.is_file():
            return []
    try:
        check_regular(path, MAX_METRICS_BYTES)
        written, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        lines = [json.loads(line) for line in written.splitlines()]
        if not all(isinstance(line, dict) and type(line.get("step")) is int for line in lines):
            raise ValueError("a line has no step")
    except (OSError, ValueError, RecursionError) as error:
        advice = "Name another file" if named else "Name the right one with --metrics"
        raise UserError(f"metrics: {path} cannot be read: {str(error)[:120]}. {advice}.") from None
    return [line for line in lines if line["step"] <= step]


def code(value: Any) -> str:
    """A value as a code span on one line, which its content cannot end, not even inside a table.

    >>> print(code("a`b|c"))
    `` a`b\\|c ``
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(c if c.isprintable() else " " for c in text)[:300].replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest or not text.strip() else f"{fence}{text}{fence}"


def is_hub_name(value: Any) -> bool:
    """Whether a setting has the form of a hub name and is not a local folder."""
    return isinstance(value, str) and REPOSITORY.fullmatch(value) is not None and not Path(value).exists()


def front_matter(config: dict[str, Any], methods: list[str]) -> str:
    """The card's YAML header, which the hub reads."""
    entries: dict[str, Any] = {"library_name": LIBRARIES[methods[0]], "pipeline_tag": "text-generation"}
    kind = ["sft"] if config.get("sft") else ["grpo", "reinforcement-learning"]
    entries["tags"] = [*kind, *(["gguf"] if "gguf" in methods else [])]
    if is_hub_name(config.get("model")):
        entries["base_model"] = config["model"]
    if is_hub_name(config.get("data")):
        entries["datasets"] = [config["data"]]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=False)


def for_one_method(text: str, method: str) -> str:
    """The card of an export of several methods, for one of its folders; what the user has edited away stays away.

    >>> whole = "---\\nlibrary_name: peft\\ntags:\\n- grpo\\n- gguf\\n---\\nFormats here: lora, gguf. More."
    >>> for_one_method(whole, "lora")
    '---\\nlibrary_name: peft\\ntags:\\n- grpo\\n---\\nFormats here: lora. More.'
    """
    parts = text.split("---\n", 2)
    try:
        entries = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        entries = None
    if isinstance(entries, dict):
        if "library_name" in entries:
            entries["library_name"] = LIBRARIES[method]
        if isinstance(entries.get("tags"), list):
            entries["tags"] = [tag for tag in entries["tags"] if tag != "gguf" or method == "gguf"]
        text = f"{parts[0]}---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---\n{parts[2]}"
    return re.sub(rf"Formats here: (?:{'|'.join(LIBRARIES)}|, )+\.", f"Formats here: {method}.", text)


def curve_table(lines: list[dict[str, Any]]) -> str:
    """A table of at most MAX_ROWS evenly spaced steps, with the first and the last; "" without any step."""
    trained = [line for line in lines if _number(line.get("reward/mean")) is not None]
    if not trained:
        return ""
    last = len(trained) - 1
    picked = sorted({round(i * last / (MAX_ROWS - 1)) for i in range(MAX_ROWS)})
    keys = [key for key in CURVE if any(key in line for line in trained)]
    head = f"| step | {' | '.join(code(key) for key in keys)} |\n| ---: |{' ---: |' * len(keys)}\n"
    rows = (f"| {trained[i]['step']} | {' | '.join(_cell(trained[i].get(key)) for key in keys)} |" for i in picked)
    return head + "\n".join(rows) + "\n"


def metrics_table(lines: list[dict[str, Any]]) -> str:
    """A table of the last evaluation on held-out questions; "" without any."""
    evaluated = [line for line in lines if any(key.startswith("eval/") for key in line)]
    if not evaluated:
        return ""
    values = {key: value for key, value in evaluated[-1].items() if key.startswith("eval/")}
    rows = "\n".join(f"| {code(key)} | {_cell(value)} |" for key, value in values.items())
    return f"At step {evaluated[-1]['step']}:\n\n| metric | value |\n| --- | ---: |\n{rows}\n"


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _cell(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:.4g}"


def card_text(config: dict[str, Any], step: int, methods: list[str], lines: list[dict[str, Any]]) -> str:
    """The whole card. config: without paths of this machine. lines: metrics up to the checkpoint's step."""
    rewards = config.get("rewards") or {}
    weights = "\n".join(f"| {code(name)} | {code(weight)} |" for name, weight in rewards.items())
    paper = "[arXiv 2402.03300](https://arxiv.org/abs/2402.03300)"
    method = "on reference solutions" if config.get("sft") else f"with Group Relative Policy Optimization ({paper})"
    settings = "\n".join(f"| {code(key)} | {code(value)} |" for key, value in sorted(config.items()))
    parts = [
        f"---\n{front_matter(config, methods)}---\n",
        f"# {code(config.get('run_name') or 'model')}\n",
        f"Trained from {code(config.get('model'))} {method}, step {step}. "
        f"Formats here: {', '.join(methods)}. The licences of the base model and of the data apply.\n",
        f"## Data\n\n{code(config.get('data'))}, question in {code(config.get('question_column'))}, answer in "
        f"{code(config.get('answer_column'))}.\n",
        f"## Rewards\n\n| function | weight |\n| --- | --- |\n{weights}\n",
        f"## Curve\n\n{curve_table(lines) or 'There were no metrics at the time of the export.'}",
        f"## Evaluation\n\n{metrics_table(lines) or 'The run was not evaluated on held-out questions.'}",
        "## Prompt\n\n`trainer/recipe.json` describes how a prompt is built from a question.\n",
        f"## Config\n\n| setting | value |\n| --- | --- |\n{settings}\n",
    ]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def without_paths(value: Any) -> Any:
    """Settings with absolute paths cut to their last part, because an export is opened on other machines.

    >>> without_paths({"data": "/home/mia/q.jsonl", "rewards": {"~/r.py:f": 1.0}, "model": "demo/base"})
    {'data': 'q.jsonl', 'rewards': {'r.py:f': 1.0}, 'model': 'demo/base'}
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value else value
