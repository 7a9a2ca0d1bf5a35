"""exit.json in output_dir: a run's exit code and the reason.

torchrun turns the code into 1; the launch scripts return the code from this file.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import yaml

from grpo.config.settings import Config

MAX_CHARACTERS = 2**20  # of a YAML file that is read for its output_dir


def write_exit(output_dir: Path, code: int, reason: str, first: bool = False) -> None:
    """Write the code and the reason. first: only if no rank has written it."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name that the locale cannot encode
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / "exit.json").open("x" if first else "w", encoding="utf-8") as file:
            file.write(json.dumps({"code": code, "reason": reason}) + "\n")


def await_exit(output_dir: Path, seconds: float = 10.0) -> None:
    """Wait until rank 0 has said why the run ends: torchrun stops it as soon as another rank has ended."""
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError, ValueError):
        while time.monotonic() < until and not (output_dir / "exit.json").exists():
            time.sleep(0.05)


def forget_exit(output_dir: Path) -> None:
    """Delete an earlier run's exit.json, so that its code is not returned when this run crashes."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name that the locale cannot encode
        (output_dir / "exit.json").unlink()


def output_dir_of(argv: list[str], supervised: bool = False) -> Path:
    """output_dir of a command line whose settings are refused: as far as it can be read, else the default.

    >>> output_dir_of(["--lr", "abc", "--output_dir=w/out"]), output_dir_of(["--lr"]), output_dir_of([], True)
    (PosixPath('w/out'), PosixPath('output'), PosixPath('output_sft'))
    """
    words = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    given: dict[str, Any] = {}
    for name, value in zip(words, words[1:]):
        if name == "--config":
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
                text = Path(value).read_text(encoding="utf-8")
                read = yaml.safe_load(text) if len(text) < MAX_CHARACTERS else None
                given |= read if isinstance(read, dict) else {}
    for name, value in zip(words, words[1:]):
        if name == "--output_dir":
            return Path(value)
    folder = given.get("output_dir")
    folder = folder if isinstance(folder, str) else Config.output_dir
    section = given.get("sft")
    if supervised:
        own = section.get("output_dir") if isinstance(section, dict) else None
        folder = own if isinstance(own, str) else folder.rstrip("/") + "_sft"
    return Path(folder)
