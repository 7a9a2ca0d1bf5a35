"""Shows runs in a browser: curves, completions, comparisons.

    python -m grpo.view [runs ...] [--port 6007] [--export report.html [--limit_mb 20]]

Imports neither torch nor transformers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from grpo.errors import UserError, warn
from grpo.view.export import MAX_MB, report
from grpo.view.server import Logs, serve

PORT = 6007


class Parser(argparse.ArgumentParser):
    """Errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See python -m grpo.view --help.")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = Parser(prog="python -m grpo.view", description="Show runs in a browser, or write them to one HTML file.")
    parser.add_argument("runs", nargs="*", default=["runs"], help="folders of runs, or folders with runs in them")
    parser.add_argument("--port", type=int, default=PORT, help=f"port on 127.0.0.1, 0: a free one ({PORT})")
    parser.add_argument("--export", metavar="FILE", help="write the page with its data to this file and end")
    parser.add_argument("--limit_mb", type=float, default=MAX_MB, help=f"largest export in MB ({MAX_MB:g})")
    args = parser.parse_args(list(argv))
    if not 0 <= args.port <= 65535:
        raise UserError(f"port: {args.port}, allowed: 0 to 65535.")
    if not 1 <= args.limit_mb <= 150:
        raise UserError(f"limit_mb: {args.limit_mb:g}, allowed: 1 to 150 (browsers open no more).")
    return args


def write_report(logs: Logs, path: Path, limit_mb: float) -> None:
    """Write an export. Raises UserError."""
    logs.refresh()
    content = report(logs.runs, limit_mb)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"export: {path} cannot be written: {error}. Name another file.") from None
    over = f", more than limit_mb {limit_mb:g}: the curves alone" if len(content) > limit_mb * 1e6 else ""
    print(f"{path}: {len(logs.runs)} runs, {len(content) / 1e6:.2f} MB{over}")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    try:
        args = arguments(argv)
        logs = Logs([Path(name) for name in args.runs])
        if args.export is not None:
            write_report(logs, Path(args.export), args.limit_mb)
        else:
            serve(logs, args.port, lambda line: print(line, flush=True))
    except UserError as error:
        warn(f"error: {error}")
        return error.code
    return 0
