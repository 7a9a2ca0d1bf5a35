"""Takes the pictures of docs/view.md: the page over real runs, in headless Chromium, as PNG files of 128 colours.

    python -m tests.view.pictures RUNS OUT [--scheme light] [--width 1180] [--height 700]

RUNS: a folder with two runs on the same questions, the later one by name with figures of tokens.
"""

import argparse
import io
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.view.server import Logs, Server
from tests.view.conftest import NAMES

if TYPE_CHECKING:
    from playwright.sync_api import Page


def shade_a_completion(page: "Page") -> None:
    """Open a group with figures and with both kinds of rewards, and shade one of its completions."""
    page.locator("#run").select_option(index=page.locator("#run option").count() - 1)
    page.wait_for_selector("#filter-tokens").check()
    page.locator("#sort").select_option("spread")
    page.locator("#rollouts .list").focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(400)
    cards = page.locator("#rollouts .card select.shade")
    for number in range(min(2, cards.count())):
        cards.nth(number).select_option("logprob")
    page.wait_for_selector("#rollouts .token")


def take(roots: list[Path], out: Path, scheme: str, width: int, height: int) -> None:
    """Write view_overview.png, view_rollouts.png and view_compare.png."""
    from PIL import Image  # late, like playwright: the tests import this file where neither is installed
    from playwright.sync_api import sync_playwright

    server = Server(Logs(roots), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        executable = next(filter(None, map(shutil.which, NAMES)))
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        for view in ("overview", "rollouts", "compare"):
            page.goto(f"{server.url}#{view}")
            page.wait_for_selector("html[data-ready]")
            page.wait_for_selector({"overview": ".chart path", "compare": "#compare mark"}.get(view, "#rollouts .card"))
            if view == "rollouts":
                shade_a_completion(page)
            page.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.quantize(128).save(out / f"view_{view}.png", optimize=True)
        browser.close()
    server.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="light", choices=["light", "dark"])
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--height", type=int, default=700)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    take([args.runs], args.out, args.scheme, args.width, args.height)


if __name__ == "__main__":
    main()
