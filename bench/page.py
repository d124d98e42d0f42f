"""How long does somebody wait at the page? The last line is JSON.

    python bench/page.py                                   SmolLM2 (three minutes on two idle cores; needs codetrace[app,browser] and Chromium)
    python bench/page.py --model path.gguf                 another model
    python bench/page.py --out bench/results/page.json     rows of the same model are replaced

A browser opens the page of `codetrace app`, and somebody presses Run: seconds until the first table, and until all is done, of the program that each tab opens
with. `first` includes loading the model; the others are medians of further presses.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TABLES = {"watch": "table.watch", "trace": "table.grid"}
LONGEST = 600_000  # Milliseconds


@contextmanager
def served_page(model: str) -> Iterator[str]:
    "The address of a page with a model, and no runs."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-c", "from codetrace.cli import cli_main; cli_main()", "app"]
        with log.open("w") as output:
            server = subprocess.Popen(
                [*command, "--model", model, "--port", str(port)],
                env=os.environ | {"CODETRACE_RUNS": folder},
                stdout=output,
                stderr=output,
            )
        try:
            while "the page is at" not in log.read_text():
                if server.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.kill()
            server.wait()


def wait_for_result(page, view: str) -> dict[str, float]:
    "Seconds until the first table, and until all is done."
    began = time.perf_counter()
    page.wait_for_selector(f"#result_{view} {TABLES[view]}", timeout=LONGEST)
    table = time.perf_counter() - began
    page.wait_for_selector(f"#result_{view} :text('done:')", timeout=LONGEST)
    return {"table": table, "done": time.perf_counter() - began}


def timings(page, address: str, view: str, rounds: int) -> dict[str, float]:
    "Of one tab."
    page.goto(f"{address}?view={view}")
    first = wait_for_result(page, view)
    again = []
    for _ in range(rounds):
        page.evaluate(f"document.querySelector('#result_{view} table').closest('.codetrace').remove()")
        page.click(f"#show_{view}")
        again.append(wait_for_result(page, view))
    opening = {f"{view} first {name}": seconds for name, seconds in first.items()}
    return opening | {f"{view} {name}": statistics.median(run[name] for run in again) for name in first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    row: dict[str, object] = {"model": Path(options.model).stem, "cores": os.cpu_count()}
    with served_page(options.model) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        for view in TABLES:
            seconds = timings(page, address, view, options.rounds)
            row |= {name: round(value, 2) for name, value in seconds.items()}
            print(json.dumps(row), flush=True)
        browser.close()
    if options.out:
        rows = json.loads(options.out.read_text()) if options.out.exists() else []
        rows = [known for known in rows if known["model"] != row["model"]] + [row]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
