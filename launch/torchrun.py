"""torchrun, ending with the worker's exit code instead of its own 1, and without its report.

    python launch/torchrun.py [--restarts N] --standalone --nproc_per_node=2 train.py [settings]

Rank 0 leaves its code in output_dir/exit.json (0 done, 2 a setting or file to mend, others in grpo/errors.py).
Where it could not, because it was killed or the folder cannot be written, the code of the rank that failed first
counts; for a signal that is 128 + its number, as in a shell.

--restarts N (default 0): start again, N times at most, a run that stalled (74) or whose process was killed, if it
has saved a checkpoint since it was started. What was asked to stop, and what would fail again, is left as it is.
"""

import contextlib
import io
import json
import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from grpo.config.command_line import load_config, load_sft_config
from grpo.config.exit_file import output_dir_of
from grpo.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_STALLED, EXIT_USER, UserError


def exit_file(argv: list[str]) -> Path:
    """Where rank 0 will leave its code, given torchrun's arguments: the same reading of the settings as its own."""
    script = next((i for i, arg in enumerate(argv) if arg.endswith(".py") or arg == "grpo.sft"), len(argv))
    supervised = argv[script : script + 1] == ["grpo.sft"]
    read = load_sft_config if supervised else load_config
    output_dir = output_dir_of(argv[script + 1 :], supervised)
    with contextlib.suppress(UserError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        output_dir = Path(read(argv[script + 1 :])[0].output_dir)
    return output_dir / "exit.json"


def told(file: Path) -> int:
    """Rank 0's own code; 0 when it left none, or met a bug: the failure of another rank, or its end by a signal."""
    try:
        code = int(json.loads(file.read_text(encoding="utf-8"))["code"])
        return 0 if code == EXIT_BUG else code
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def main(argv: list[str]) -> int:
    """Run torchrun, again if that is asked for and makes sense; return the exit code."""
    logging.disable(
        logging.ERROR
    )  # torchrun's words on failures, which the worker explains, and on threads, which it sets
    restarts = 0
    if argv[:1] == ["--restarts"]:
        if len(argv) < 2 or not argv[1].isdigit():
            print(f"error: --restarts: must be a number >= 0, got {' '.join(argv[1:2])!r}", file=sys.stderr)
            return EXIT_USER
        restarts, argv = int(argv[1]), argv[2:]
    file = exit_file(argv)
    while True:
        began_at = newest_step(file.parent)
        code, asked = attempt(argv, file)
        again = not asked and (code in (EXIT_STALLED, EXIT_PREEMPTED) or code > 128)
        if not again or restarts == 0 or newest_step(file.parent) <= began_at:
            return code
        restarts -= 1
        print(f"the run ended with {code}; starting it again, {restarts} more restarts allowed", file=sys.stderr)


def newest_step(output_dir: Path) -> int:
    """Steps behind the newest checkpoint, 0 without one. Which is valid, the trainer finds out."""
    names = (path.name.removeprefix("checkpoint_") for path in output_dir.glob("checkpoint_*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def attempt(argv: list[str], file: Path) -> tuple[int, bool]:
    """Run torchrun once. Returns the exit code, and whether this process was itself asked to stop."""
    with contextlib.suppress(OSError):
        file.unlink()  # an earlier run's: a worker that is killed leaves none
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            reason = signal.strsignal(-failure.exitcode)
            print(f"rank {rank} was ended by signal {-failure.exitcode} ({reason})", file=sys.stderr)
            return told(file) or 128 - failure.exitcode, False
        return told(file) or failure.exitcode, False
    except SignalException as error:
        return told(file) or 128 + error.sigval, True
    return 0, False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
