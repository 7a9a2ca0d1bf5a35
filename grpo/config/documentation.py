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


def markdown_table() -> str:
    """The table of docs/configuration.md. Written by `python -m grpo.config`."""
    docs = field_docs()
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for f in dataclasses.fields(Config):
        default = getattr(Config(), f.name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        lines.append(f"| `{f.name}` | `{shown}` | {docs[f.name]} |")
    return "\n".join(lines)
