"""What an update of the live page costs the browser after ten thousand steps.

    python benchmarks/bench_page.py [--updates 30]

A real training under the TrainingMonitor, of more steps and more history points than are kept, and a real
headless Chromium that looks at it: once as fast as this machine is, once slowed down four times, about as a
phone is. `work` is the page's own, from the answer to the finished charts; `main thread` is all that the
browser's main thread does meanwhile, layout and painting too, for each update.

Goal: less than 100 ms of work per update.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "browser")]  # the training is that of the page's tests

if TYPE_CHECKING:
    from long_run import LongRun
    from playwright.sync_api import Browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
GOAL_MS = 100.0
OBSERVE = """
window.updates = [];
new PerformanceObserver((list) => {
  for (const { duration } of list.getEntriesByName("update")) updates.push(duration);
}).observe({ type: "measure" });
"""

SIZES = """performance.getEntriesByType("resource").filter((one) => one.name.includes("/api/live"))
  .map((one) => one.encodedBodySize)"""


def look(browser: Browser, run: LongRun, updates: int, slower: int) -> None:
    """Open the page, let it update so often, and print what that cost."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.add_init_script(OBSERVE)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    devtools.send("Emulation.setCPUThrottlingRate", {"rate": slower})

    def main_thread_seconds() -> float:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

    page.goto(run.url)
    while page.evaluate("updates.length") < 3:
        page.wait_for_timeout(100)
    page.evaluate("performance.clearResourceTimings()")
    first, before = page.evaluate("updates.length"), main_thread_seconds()
    while page.evaluate("updates.length") < first + updates:
        page.wait_for_timeout(500)
    busy = (main_thread_seconds() - before) * 1e3
    took = page.evaluate("updates")[first:]
    sizes = page.evaluate(SIZES)
    nodes = page.evaluate("document.querySelectorAll('*').length")
    page.close()
    print(
        f"processor ÷ {slower}: work {statistics.median(took):.1f} ms median, {max(took):.1f} at most, "
        f"goal {GOAL_MS:.0f}; main thread {busy / len(took):.1f} ms per update"
    )
    print(
        f"  answers {statistics.median(sizes) / 1024:.1f} KiB median, {max(sizes) / 1024:.0f} at most; "
        f"{nodes} elements"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=30)
    arguments = parser.parse_args()
    from long_run import SAMPLE_SECONDS, LongRun
    from playwright.sync_api import sync_playwright

    executable = os.environ.get("OBSINFRA_TEST_CHROMIUM") or shutil.which("chromium")
    if executable is None:
        sys.exit(
            "error: no chromium; expected one on the PATH; fix: install it or set OBSINFRA_TEST_CHROMIUM"
        )
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        run = LongRun(Path(scratch))
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start; Chromium "
            f"{browser.version}; {run.steps} steps, a point every {SAMPLE_SECONDS * 1e3:.0f} ms "
            f"(default: every second)",
            flush=True,
        )
        try:
            for slower in (1, 4):
                look(browser, run, arguments.updates, slower)
        finally:
            run.stop()
            browser.close()


if __name__ == "__main__":
    main()
