"""Sending files to a repository of the hub in one commit. The token is of HF_TOKEN or a login, and is never shown.

HF_ENDPOINT selects another hub. `python -m grpo.models.upload` is the process in which a run's checkpoints are sent
(grpo/run/pushing.py): one JSON line on stdin says what, one on stdout how it ended. It runs at the lowest priority, and
ends at once when stdin closes, which is when the trainer ends.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars

from grpo.errors import UserError, first_line


def find_token(setting: str) -> str:
    """The token of HF_TOKEN or of a login. Raises UserError without one."""
    token = get_token()
    if not token:
        raise UserError(f"{setting}: no token. Set HF_TOKEN, or run `hf auth login`.")
    return token


def send(files: Mapping[str, Path | bytes], repo: str, private: bool, token: str | None, message: str) -> str:
    """Make the repository if it is not there, and commit the files. Returns its address.

    Raises whatever the client raises; `without_token` makes a line of it.
    """
    disable_progress_bars()
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    done = api.create_commit(repo, operations, commit_message=message)
    return str(done.repo_url or repo)


def without_token(token: str | None, error: Exception) -> str:
    """An error's first line, with the token removed."""
    line = first_line(error)
    return (line.replace(token, "***") if token else line)[:300].rstrip(".")


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Send every file of a folder, but for hidden ones."""
    job: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    with contextlib.suppress(OSError):
        os.nice(19)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    token = get_token()
    try:
        folder = Path(job["folder"])
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        reply = {"sent": len(files), "to": send(files, job["repo"], True, token, job["message"])}
    except Exception as error:  # the client, its HTTP library and its upload library raise many types
        reply = {"error": without_token(token, error)}
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of the client may still wait for an answer


if __name__ == "__main__":
    main()
