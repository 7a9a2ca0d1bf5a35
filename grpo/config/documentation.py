"""What the settings' docstrings say, for `--help`, docs/configuration.md and error lines."""

import dataclasses

import docstring_parser

from grpo.config.settings import Config


def field_docs(settings: type = Config) -> dict[str, str]:
    """Field name -> the docstring under it.

    >>> field_docs()["lr"]
    'Peak learning rate.'
    """
    described = docstring_parser.parse_from_object(settings).params
    return {field.arg_name: " ".join((field.description or "").split()) for field in described}


def markdown_rows(settings: type = Config) -> list[str]:
    """The rows of the table of settings, in docs/configuration.md or docs/sft_and_lora.md."""
    docs = field_docs(settings)
    rows = []
    for name, default in dataclasses.asdict(settings()).items():
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        rows.append(f"| `{name}` | `{shown}` | {docs[name]} |")
    return rows


def markdown_table() -> str:
    """The table of docs/configuration.md. Written by `python -m grpo.config`."""
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *markdown_rows()])
