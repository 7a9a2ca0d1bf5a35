"""From the command line to a running job and its exit code."""

import os
from collections.abc import Callable
from pathlib import Path

from grpo.config import Config
from grpo.console import warn
from grpo.distributed import World, start, stop
from grpo.errors import UserError
from grpo.liveness import die_with_parent
from grpo.models import quiet
from grpo.run import write_exit


def run_main(
    job: Callable[[Config, World], None], load_config: Callable[[list[str]], tuple[Config, str | None]], argv: list[str]
) -> int:
    """Read the settings, join the ranks, do the job. Returns the exit code.

    What the user can mend ends in one line, from rank 0, and a code of its own (grpo/errors.py).
    """
    is_main = int(os.environ.get("RANK", 0)) == 0
    cfg = None
    try:
        die_with_parent()
        cfg, notice = load_config(argv)
        if is_main and notice:
            print(notice, flush=True)
        quiet()
        world = start(cfg.device, 1 if cfg.deterministic else cfg.num_threads)
        try:
            job(cfg, world)
        finally:
            stop()
    except UserError as error:
        if is_main:
            warn(f"error: {error}")
            write_exit(Path(cfg.output_dir if cfg else "output"), error.code, str(error))
        return error.code
    if is_main:
        write_exit(Path(cfg.output_dir), 0, "done")
    return 0
