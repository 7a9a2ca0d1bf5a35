"""A headless Chromium, where playwright and a Chromium are installed; pages that note what goes wrong in them."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launcher import PROJECT

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing() -> str | None:
    """Why there is no browser here; None: there is one."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install -e '.[browser]')"
    return None if any(map(shutil.which, NAMES)) else f"no Chromium on PATH ({', '.join(NAMES)})"


@pytest.fixture(autouse=True)
def _skip_without_browser(request):
    if request.node.get_closest_marker("browser") and (reason := missing()):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    if reason := missing():
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, NAMES))), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium) -> Iterator[Callable]:
    """Opens pages; at the end none of them had an error, a refused script, or a request that left this machine."""
    faults: list[str] = []
    contexts = []

    def opened(width: int = 1300, height: int = 850, offline: bool = False, **options):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, offline=offline, accept_downloads=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("popup", lambda popup: faults.append(f"popup {popup.url}"))
        page.on("request", lambda request: _is_local(request.url) or faults.append(f"request {request.url}"))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:///"))


@pytest.fixture(scope="module")
def viewer() -> Iterator[Callable[..., str]]:
    """Starts `python -m grpo.view` as a user does; returns the address that it prints."""
    started = []

    def start(*folders: Path) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo.view", *map(str, folders), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        started.append(process)
        assert process.stdout is not None
        return re.search(r"http://\S+", process.stdout.readline())[0]

    yield start
    for process in started:
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert err == "", "no traceback on the console"
