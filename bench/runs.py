"""Is the list of runs still quick when there are ten thousand? Seconds; the last line is JSON.

    python bench/runs.py                  10,000 runs, copies of a reference record under other names (a minute)
    python bench/runs.py --runs 100000    more
    python bench/runs.py --out bench/results/runs.json

All runs are of one phase. Each question is asked in a process of its own, as a command does, three times, in turn with the others: the median counts. `again` is a second list in one process,
as the page asks for it. Files are in the page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
QUESTIONS = {
    "all runs": "all_runs(root)",
    "a table of all": "[run_row(manifest) for manifest in all_runs(root)]",
    "one by its id": "find_run(last, root)",
    "newest of a phase": "newest_run('tracing', root)",
}
ASK = """
import json, sys, time
from pathlib import Path
from codetrace.runs.listing import run_row
from codetrace.runs.manifest import all_runs, find_run, newest_run
root, last = Path(sys.argv[1]), sys.argv[2]
began = time.perf_counter(); {question}; first = time.perf_counter()
{question}; print(json.dumps([first - began, time.perf_counter() - first]))
"""


def make_runs(root: Path, count: int) -> str:
    "Copies of a reference record under other names; the id of the last."
    source = sorted((HOME / "runs/reference/tracing").glob("*/run.json"))[-1]
    manifest = json.loads(source.read_text())
    notebook = (source.parent / "notebook.ipynb").read_bytes()
    for number in range(count):
        run_id = f"20270101T{number:09d}Z-{number:08x}"
        folder = root / "tracing" / run_id
        folder.mkdir(parents=True)
        (folder / "notebook.ipynb").write_bytes(notebook if number < 100 else b"{}")  # 1.5 GB else; none is read
        (folder / "run.json").write_text(json.dumps(manifest | {"run_id": run_id}, indent=1))
    return run_id


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="also write the row here")
    options = parser.parse_args()
    seconds = {name: [] for name in QUESTIONS}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        last = make_runs(Path(folder), options.runs)
        print(f"{options.runs} runs made in {time.perf_counter() - began:.0f} s", flush=True)
        for _ in range(3):
            for name, question in QUESTIONS.items():
                command = [sys.executable, "-c", ASK.format(question=question), folder, last]
                seconds[name].append(json.loads(subprocess.check_output(command)))
    row = {"runs": options.runs}
    for name, pairs in seconds.items():
        first, again = (statistics.median(column) for column in zip(*pairs))
        row[name] = round(first, 3)
        row[f"{name}, again"] = round(again, 3)
        print(f"{name}: {first:.2f} s, again {again:.2f} s")
    if options.out:
        options.out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
