"""What the settings' docstrings say, for `--help`, docs/configuration.md and error lines."""

import ast
import dataclasses
import inspect

from grpo.config.settings import Config


def field_docs(settings: type = Config) -> dict[str, str]:
    """Field name -> the docstring under it.

    >>> field_docs()["lr"]
    'Peak learning rate.'
    """
    body = ast.parse(inspect.getsource(settings)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for before, after in zip(body, body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[before.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return docs


def markdown_table() -> str:
    """The table of docs/configuration.md. Written by `python -m grpo.config`."""
    docs = field_docs()
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for f in dataclasses.fields(Config):
        default = getattr(Config(), f.name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        lines.append(f"| `{f.name}` | `{shown}` | {docs[f.name]} |")
    return "\n".join(lines)
