"""Texts as a model, a data file or a stranger's run may hold them."""

import json
from pathlib import Path

SCRIPT = "<script>window.harmed = 1</script>"
HANDLER = "<img src=x onerror='window.harmed = 1'><svg onload=\"window.harmed = 1\">"
TEXTS = {
    "script": SCRIPT,
    "handler": HANDLER,
    "end of the data block": f"</script>{SCRIPT}<!-- ]]> --></textarea></style>{SCRIPT}",
    "link": "<a href='javascript:window.harmed=1'>x</a> [x](javascript:window.harmed=1)",
    "template": "${window.harmed=1} {{constructor.constructor('window.harmed=1')()}} `",
    "terminal": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \r\b\x00 bell\x07",
    "right to left": "abc \u202e gnp.exe \u2066 \u200f שלום \u202c\u2069 end",
    "invisible": "a\u200bb\ufeffc\u2060d" + "".join(chr(0xE0000 + ord(letter)) for letter in "hidden"),
    "half characters": "\ud83d lone \udc00 and \U0001f600 whole",
    "wide": "x" * 1_000_000,
    "tall": "\n" * 50_000 + "end",
    "combining": "Z" + "\u0301" * 500,
    "mixed": "数学：$\\frac{a}{b}$ = 三分之二；العربية 123; ไทย",
    "tool": f'<think>{HANDLER}</think><tool_call>{{"name": "{SCRIPT[:8]}", "n": 1}}</tool_call>'
    "<tool_response>3</tool_response><answer>3</answer>",
    "empty": "",
}


def write_hostile_run(folder: Path) -> None:
    """A run whose every text is hostile: completions, questions, answers, names of rewards and columns, settings."""
    folder.mkdir(parents=True)
    lines, figures = [], []
    for row, text in enumerate(TEXTS.values()):
        short = text[:5000]
        lines.append(
            {
                "step": 1,
                "row": row,
                "question": f"q{row} {short}",
                "gold": short,
                "completion": text,
                "finish": SCRIPT if row == 0 else "stop",
                "rewards": {HANDLER: 1.0, f"{SCRIPT}:b": 0.0},
                "reward": row / len(TEXTS),
                "advantage": 0.0,
                "extracted": short,
                "extra": {HANDLER: short},
                "length": len(text),
            }
        )
        pieces = [short[i : i + 7] for i in range(0, min(700, len(short)), 7)]
        figures.append(
            {"step": 1, "row": row, "ids": list(range(len(pieces))), "texts": pieces, "logprob": [-1.0] * len(pieces)}
        )
    for name, content in (("rollouts-rank0.jsonl", lines), ("tokens-rank0.jsonl", figures)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in content), encoding="ascii")
    metrics = {"step": 1, "reward/mean": 0.5, f"reward/{HANDLER}/mean": 0.5, f"user/{SCRIPT}": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    settings = {"model": SCRIPT, "rewards": {HANDLER: 1.0}, HANDLER: "\u202e", "run_name": TEXTS["half characters"]}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "total_steps": 1, "started": SCRIPT}))
    (folder / "exit.json").write_text(json.dumps({"code": 2, "reason": HANDLER + TEXTS["terminal"]}))
