"""Chat templates are programs that come with a model: they run in a process of their own, under limits.

The process renders with transformers' `render_jinja_template` (a sandbox without attributes that start with an
underscore), so the text is exactly that of `apply_chat_template`. The sandbox bounds neither time nor memory; the
process does: CPU seconds for each prompt, address space, length of the output, and no file can be opened once it is
ready. Where a date is given, `strftime_now` prints that one in place of today's. It starts once for each template, in
about a second, and then renders thousands of prompts a second.

Protocol, on its stdin and stdout: a JSON object of settings and one reply, then one JSON line per prompt in each
direction. The process ends when its stdin closes; the kernel ends it when a prompt exceeds its CPU time.
"""

import contextlib
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from grpo.errors import UserError

CPU_S = 5.0  # of one prompt; an ordinary one takes a tenth of a millisecond
WAIT_S = 120.0  # wall clock, for start-up and each prompt, in case the machine is busy or the process stopped
MEMORY_BYTES = 2**29  # address space above what the process has when it is ready
MAX_CHARACTERS = 2**20  # of a rendered prompt, beside eight times its conversation
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


Ending = Literal["open", "closed", "continued"]  # the start of the assistant's turn follows; nothing; a turn stays open


class TemplateFailed(Exception):
    """The template gave no text; the message is the reason."""


class TemplateRefused(UserError):
    """The template gave no text for a prompt."""

    def __init__(self, reason: str, advice: str = "Try --chat_template false."):
        super().__init__(f"chat_template: the tokenizer's template refused the prompt: {reason}. {advice}")
        self.reason = reason


class Renderer:
    """One chat template in its process. Its methods raise TemplateFailed."""

    def __init__(self, template: str, variables: Mapping[str, Any], date: str | None = None):
        """date: what `strftime_now` prints, as in 2026-11-27T09:30:00; None: the time of rendering."""
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grpo.data.chat_templates"],
            cwd=Path(__file__).resolve().parents[2],
            text=True,
            encoding="utf-8",
            env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self.process)  # also runs when Python exits
        self._request({"template": template, "variables": dict(variables), "cpu_s": CPU_S, "date": date})

    def render(self, messages: list[dict[str, Any]], ending: Ending = "open") -> str:
        """The text of a conversation."""
        # Keys whose value is None are dropped, as apply_chat_template does.
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
        return self._request({"turns": turns, "ending": ending})

    def _request(self, message: Any) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message, default=str) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
            line = self.process.stdout.readline() if ready else ""
        except (OSError, ValueError):  # the process has ended: its pipe is broken or closed
            line = ""
        if not line:
            self.close()
            reason = f"it was stopped after {CPU_S:.0f} s of computing"
            raise TemplateFailed(reason if self.process.returncode == -signal.SIGPROF else "its process died")
        reply = json.loads(line)
        if "error" in reply:
            raise TemplateFailed(reply["error"])
        return reply["text"]


def _end(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.5)  # a closed stdin ends it; a killed process is reaped here
    if process.poll() is None:
        process.kill()
        process.wait()


@functools.lru_cache(maxsize=4)
def _renderer(template: str, variables: str, date: str | None) -> Renderer:
    return Renderer(template, json.loads(variables), date)


def render_chat(
    template: str,
    variables: Mapping[str, Any],
    messages: list[dict[str, Any]],
    ending: Ending = "open",
    date: str | None = None,
) -> str:
    """Render a conversation under limits. Raises TemplateRefused when the template refuses it or exceeds a limit.

    ending: open appends the start of the assistant's turn; continued leaves the last turn, the assistant's, open.
    """
    try:
        renderer = _renderer(template, json.dumps(dict(variables), default=str, sort_keys=True), date)
        return renderer.render(messages, ending)
    except TemplateFailed as failed:
        end_renderers()  # its process may be dead
        raise TemplateRefused(" ".join(str(failed).split())[:300]) from None


def end_renderers() -> None:
    """End the processes; the next prompt starts a new one."""
    _renderer.cache_clear()


def _limit() -> None:
    """Limit the address space, and forbid writing files and opening files or sockets, from now on."""
    pages = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        if Path("/proc/self/statm").exists()
        else 2**18
    )
    space = pages * resource.getpagesize() + MEMORY_BYTES
    for limit, value in (
        (resource.RLIMIT_AS, space),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
            resource.setrlimit(limit, (value, value))


def _reply(cpu_s: float, function: Any, *args: Any) -> str:
    """One line for the parent: the function's result or its error, within a limit of CPU seconds."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF's default action ends the process, in C code as well
    try:
        reply = {"text": function(*args)}
    except MemoryError:
        reply = {"error": "it needs too much memory"}
    except RecursionError:
        reply = {"error": "it nests too deeply"}
    except Exception as error:  # an expression of the template may raise any exception
        reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    return json.dumps(reply)


def main() -> None:
    """The process: read settings, then conversations; write one line for each."""
    # jinja and Python import these modules at first use, when no file can be opened any more.
    import encodings.unicode_escape  # noqa: F401
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401
    from transformers.utils import chat_template_utils
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    settings = json.loads(sys.stdin.readline())
    # Filters and functions import modules at first use, too.
    render_jinja_template([[]], chat_template="{{ 'é' ~ strftime_now('%B') ~ 1.5|tojson }}")

    def fix_date() -> str:
        if settings["date"] is not None:
            given = datetime.fromisoformat(settings["date"])
            setattr(chat_template_utils, "datetime", type("Fixed", (), {"now": lambda: given}))  # noqa: B010  for mypy
            shown = render_jinja_template([[]], chat_template="{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}")
            if str(shown[0][0]) != settings["date"]:
                raise ValueError("this version of transformers does not let strftime_now be fixed")
        return ""

    sys.stdout.write(_reply(settings["cpu_s"], fix_date) + "\n")
    sys.stdout.flush()
    _limit()

    def render(line: str) -> str:
        message = json.loads(line)
        rendered = render_jinja_template(
            [message["turns"]],
            chat_template=settings["template"],
            add_generation_prompt=message["ending"] == "open",
            continue_final_message=message["ending"] == "continued",
            **settings["variables"],
        )
        text = str(rendered[0][0])
        if len(text) > MAX_CHARACTERS + 8 * len(line):
            raise ValueError(f"it makes {len(text)} characters of {len(line)}")
        return text

    for line in sys.stdin:
        sys.stdout.write(_reply(settings["cpu_s"], render, line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
