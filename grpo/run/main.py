"""From the command line to a running job and its exit code."""

import os
from collections.abc import Callable
from pathlib import Path

from grpo.config.command_line import load_sft_config
from grpo.config.exit_file import await_exit, forget_exit, output_dir_of, write_exit
from grpo.config.settings import Config
from grpo.data.show_prompt import show_prompt
from grpo.errors import Preempted, UserError, warn
from grpo.models.checks import quiet
from grpo.runtime.distributed import World, start, stop
from grpo.runtime.heartbeat import die_with_parent
from grpo.runtime.signals import bugs_noted

START_S = 2000.0  # that ranks wait for one that starts a vLLM server, or loads from a slow disk
MARGIN_S = 60.0  # so that the watchdog names a rank that hangs before a collective of the others fails


def run_main(
    job: Callable[[Config, World], None],
    load_config: Callable[[list[str]], tuple[Config, str | None]],
    argv: list[str],
    show: Callable[[list[str]], int] = show_prompt,
) -> int:
    """Read the settings, start torch.distributed, run the job. Returns the exit code.

    show: what `--show_prompt N` runs in place of the job. A UserError ends in one line, from rank 0 unless it occurs on
    one rank only, and its own code (grpo/errors.py).
    """
    if any(arg.partition("=")[0] == "--show_prompt" for arg in argv):
        return show(argv)
    rank = int(os.environ.get("RANK", 0))
    is_main = rank == 0
    cfg = None
    world = None
    try:
        die_with_parent()
        cfg, notice = load_config(argv)
        if is_main:
            forget_exit(Path(cfg.output_dir))
            if notice and not cfg.quiet:
                print(notice, flush=True)
        quiet()
        output_dir = Path(cfg.output_dir)
        with bugs_noted(output_dir, rank):
            patience = max(START_S, cfg.stall_timeout_s + MARGIN_S)
            world = start(cfg.device, 1 if cfg.deterministic else cfg.num_threads, patience)
            try:
                with bugs_noted(output_dir, rank):  # before the other ranks' collectives fail
                    job(cfg, world)
            finally:
                stop()
    except UserError as error:
        if error.on_one_rank or is_main:
            rank_named = f"rank {rank}: " if error.on_one_rank else ""
            kind = "stopped" if isinstance(error, Preempted) else "error"
            warn(f"{kind}: {rank_named}{error}")
            folder = Path(cfg.output_dir) if cfg else output_dir_of(argv, load_config is load_sft_config)
            write_exit(folder, error.code, str(error))
        elif cfg is not None and world is None:  # torch.distributed did not start: each rank may have another reason
            warn(f"error: rank {rank}: {error}")
        elif cfg is not None:
            await_exit(Path(cfg.output_dir))
        return error.code
    if is_main:
        write_exit(Path(cfg.output_dir), 0, "done")
    return 0
