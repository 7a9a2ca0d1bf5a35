"""What logging the figures of tokens costs a step: the demo, every second step with it, the others as control.

    python -m benchmarks.token_log_cost [--max_steps 60] [more settings]

Measured in the trainer's own process: the CPU seconds that its main thread spends in the log's methods, those of the
writing thread, and the CPU seconds of whole steps with and without (medians of interleaved steps), which other work on
the machine changes less than the wall clock. The share is that of a run with the default, every 10 steps.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from grpo.config.command_line import load_config
from grpo.run.main import run_main
from grpo.run.tokens_log import TokensLog

METHODS = ("begin", "observe", "write")


class Clock:
    """CPU seconds in the log's methods, and of the whole process, by step."""

    def __init__(self) -> None:
        self.step = 0
        self.main: dict[int, float] = {}
        self.thread = 0.0
        self.whole: dict[int, float] = {}
        self.began = 0.0

    def around(self, name: str) -> None:
        """Measure one method of TokensLog."""
        method = getattr(TokensLog, name)

        def measured(log: TokensLog, *args: object) -> object:
            if name == "begin":
                self.step = int(args[0])  # type: ignore[call-overload]
                self.began = time.process_time()
            start = time.thread_time()
            try:
                return method(log, *args)
            finally:
                self.main[self.step] = self.main.get(self.step, 0.0) + time.thread_time() - start
                if name == "write":
                    self.whole[self.step] = time.process_time() - self.began

        setattr(TokensLog, name, measured)

    def around_thread(self) -> None:
        """Measure the writing thread."""
        work = TokensLog._work

        def measured(log: TokensLog) -> None:
            work(log)
            assert threading.current_thread() is not threading.main_thread()
            self.thread += time.thread_time()

        TokensLog._work = measured  # type: ignore[method-assign]


def report(clock: Clock) -> str:
    """The figures as text. The first two steps, which warm up, do not count."""
    steps = [step for step in sorted(clock.whole) if step > 2]
    due, other = [step for step in steps if step % 2 == 0], [step for step in steps if step % 2]
    whole = [statistics.median(clock.whole[step] for step in own) for own in (due, other)]
    cost = statistics.median(clock.main[step] for step in due)
    control = statistics.median(clock.main[step] for step in other)
    thread = clock.thread / max(1, len(due) + 2)
    return "\n".join(
        [
            f"main thread, a step with figures      {cost * 1e3:8.3f} ms CPU",
            f"main thread, a step without (control) {control * 1e3:8.3f} ms CPU",
            f"writing thread, a step with figures   {thread * 1e3:8.3f} ms CPU",
            f"whole step, with and without          {whole[0]:8.3f} and {whole[1]:.3f} s CPU",
            f"share of a step, every 10 steps       {(cost + thread) / 10 / whole[1]:8.3%} (both threads)",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_steps", default="60")
    args, more = parser.parse_known_args()
    clock = Clock()
    for name in METHODS:
        clock.around(name)
    clock.around_thread()
    from train import train  # the methods above are replaced first

    with tempfile.TemporaryDirectory() as folder:
        where = ["--output_dir", str(Path(folder) / "output"), "--runs_dir", str(Path(folder) / "runs")]
        fixed = ["--save_steps", "0", "--eval_data", "null", "--log_tokens_steps", "2", "--num_threads", "1"]
        code = run_main(train, load_config, [*where, *fixed, "--max_steps", args.max_steps, *more])
    if code == 0:
        print(report(clock))
    return code


if __name__ == "__main__":
    sys.exit(main())
