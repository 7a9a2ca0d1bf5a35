"""How fast the page over a run of 100,000 logged completions opens, scrolls, sorts and searches, in headless Chromium.

    python -m benchmarks.view_speed [--completions 100000]

Seconds of the wall clock, so only a quiet machine's figures count. "open" is from starting the command to the first
group with its texts on the screen, the index included; the browser is already running.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.support.many_completions import write_run
from tests.view.conftest import NAMES

SCROLL = """async ([list, steps]) => {
  const node = document.querySelector(list), gaps = [];
  let last = performance.now();
  for (let i = 0; i < steps; i++) {
    node.scrollTop += 900;
    await new Promise(requestAnimationFrame);
    gaps.push(performance.now() - last);
    last = performance.now();
  }
  return gaps;
}"""
JUMP = """async ([list, share]) => {
  const node = document.querySelector(list), start = performance.now();
  node.scrollTop = share * node.scrollHeight;
  for (;;) {
    await new Promise(requestAnimationFrame);
    const rows = [...node.querySelectorAll('.preview')];
    if (rows.length > 5 && rows.every((row) => row.textContent !== '…')) return performance.now() - start;
  }
}"""
LIST = "#rollouts .list"


def seconds(work: Callable[[], object], until: Callable[[], bool]) -> float:
    """Seconds from starting some work until a condition holds."""
    start = time.perf_counter()
    work()
    while not until():
        time.sleep(0.005)
    return time.perf_counter() - start


def measure(page: Page, url: str, started: float, completions: int) -> dict[str, str]:
    """Name -> figure. started: when the command was started."""
    page.goto(f"{url}#rollouts")
    page.wait_for_selector("#rollouts .card")
    found = {"open, from the command on": f"{time.perf_counter() - started:.2f} s"}
    page.goto("about:blank")
    start = time.perf_counter()
    page.goto(f"{url}#rollouts")
    page.wait_for_selector("#rollouts .card")
    found["open again"] = f"{time.perf_counter() - start:.2f} s"
    gaps = sorted(page.evaluate(SCROLL, [LIST, 200]))
    found["frame while scrolling, median and 95 %"] = f"{statistics.median(gaps):.0f} and {gaps[190]:.0f} ms"
    jumps = [page.evaluate(JUMP, [LIST, share]) for share in (0.2, 0.9, 0.5, 0.01, 0.7)]
    found["jump anywhere until texts are there, slowest of 5"] = f"{max(jumps):.0f} ms"

    def counted() -> str:
        return page.inner_text("#count")

    every = f"{completions:,} of"
    found["from groups to completions"] = (
        f"{seconds(lambda: page.select_option('#mode', 'rows'), lambda: counted().startswith(every)):.2f} s"
    )
    found["sort by length"] = f"{seconds(lambda: page.select_option('#sort', 'length'), lambda: True):.2f} s"
    took = seconds(lambda: page.fill("#filter-text", "#### 333"), lambda: not counted().startswith(every))
    found["search (a quarter of a second of it is waiting for the next key)"] = f"{took:.2f} s"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_run(Path(folder) / "many", args.completions)
        executable = next(filter(None, map(shutil.which, NAMES)))
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        started = time.perf_counter()
        command = [sys.executable, "-m", "grpo.view", folder, "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address is not None
            for name, figure in measure(page, address[0], started, args.completions).items():
                print(f"{name:66} {figure}")
        finally:
            process.terminate()
            process.wait()
            browser.close()


if __name__ == "__main__":
    main()
