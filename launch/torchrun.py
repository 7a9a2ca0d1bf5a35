"""torchrun, ending with the worker's exit code instead of its own 1, and without its report.

    python launch/torchrun.py --standalone --nproc_per_node=2 train.py [settings]

Rank 0 leaves its code in output_dir/exit.json (0 done, 2 a setting or file to mend, others in grpo/errors.py).
Where it could not, because it was killed or the folder cannot be written, the code of the rank that failed first
counts; for a signal that is 128 + its number, as in a shell.
"""

import contextlib
import io
import json
import logging
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from grpo.command_line import load_config
from grpo.errors import UserError


def exit_file(argv: list[str]) -> Path:
    """Where rank 0 will leave its code, given torchrun's arguments: the same reading of the settings as its own."""
    script = next((i for i, arg in enumerate(argv) if arg.endswith(".py")), len(argv))
    output_dir = "output"
    with contextlib.suppress(UserError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
        output_dir = load_config(argv[script + 1 :])[0].output_dir
    return Path(output_dir) / "exit.json"


def told(file: Path) -> int:
    """Rank 0's own code; 0 when it left none."""
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def main(argv: list[str]) -> int:
    """Run torchrun; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, made aloud; the trainer sets its threads
    logging.disable(logging.ERROR)  # torchrun's account of a failure; the worker has said what is wrong
    file = exit_file(argv)
    with contextlib.suppress(OSError):
        file.unlink()  # an earlier run's: a worker that is killed leaves none
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            reason = signal.strsignal(-failure.exitcode)
            print(f"rank {rank} was ended by signal {-failure.exitcode} ({reason})", file=sys.stderr)
            return told(file) or 128 - failure.exitcode
        return told(file) or failure.exitcode
    except SignalException as error:
        return told(file) or 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
