"""The main job, small: the steps of recipes/demo.yaml, its two halves at the same time. With --study: those of recipes/study.yaml.

Variables are watched, tracked and traced; beside that SmolLM2 solves problems, latents that separate right from wrong are found and judged on other
problems, and the model is steered along one of them. Each step says its finding as it ends; a table of all of them, and where the records are, closes it.
"""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import yaml

from codetrace.core.errors import BadInput
from codetrace.runs.execute import RunFailed, execute_phase
from codetrace.runs.listing import print_table
from codetrace.runs.phases import find_phase, runs_root
from codetrace.runs.warm_kernels import warm_kernels

HOME = Path(__file__).resolve().parents[1]
STEPS = HOME / "recipes" / ("study.yaml" if "--study" in sys.argv else "demo.yaml")
OPEN_PAGE = "make app"


def say(text: str) -> None:
    "Print in one piece, since two halves print at the same time."
    sys.stdout.write(text.rstrip() + "\n\n")
    sys.stdout.flush()


def watch(step: dict) -> dict:
    "Watch a program from a terminal of its own, and show what that prints."
    command = ["codetrace", "watch", step["watch"], "--model", step["model"]]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(done.stderr.strip())
    *table, finding, record = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    folder = Path(record.split()[1]).parent.relative_to(runs_root())
    return {"step": "watch", "model": step["model"], "run": str(folder), "finding": finding, "shown": table}


def run_phase(step: dict) -> dict:
    "Run a phase in a kernel forked from the one that waits."
    manifest = execute_phase(step["phase"], step.get("parameters", {}), show_progress=False)
    parameters = manifest["parameters"]
    models = parameters.get("models") or [parameters.get("model", "")]
    row = {"step": find_phase(step["phase"]).name, "model": ", ".join(models), "run": manifest["run_id"]}
    return row | {"finding": manifest["headline"]}


def run_half(half: str, began: float, results: Path) -> int:
    "The steps of one half, each said as it ends."
    for step in yaml.safe_load(STEPS.read_text(encoding="utf-8"))[half]:
        start = time.time()
        try:
            row = watch(step) if "watch" in step else run_phase(step)
        except (BadInput, RunFailed) as error:
            say(f"{half}: {error}")
            return 1
        row["seconds"] = round(time.time() - start)
        shown = row.pop("shown", [])
        title = f"[{time.time() - began:3.0f} s] {row['step']}: {step['purpose']}"
        say("\n".join([title, *shown, "  " + textwrap.shorten(row["finding"], 180, placeholder=" …")]))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


def close(results: Path, began: float) -> None:
    "The table of all findings, the records, and how to go on."
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    print_table([row | {"finding": row["finding"][:110]} for row in rows])
    report = next((row["run"] for row in rows if row["step"] == "report"), None)
    print(f"records: {runs_root()}, one notebook a run; codetrace show RUN for its tables")
    if report:
        print(f"report: {runs_root() / 'report' / report / 'report.md'}")
    print(f"the same to click on, with programs of your own: {OPEN_PAGE}")
    print(f"{time.time() - began:.0f} s")


def main() -> int:
    "Both halves at the same time, each with half of the processors."
    began = time.time()
    halves = list(yaml.safe_load(STEPS.read_text(encoding="utf-8")))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 2) // len(halves), 1)))
    with warm_kernels(), tempfile.TemporaryDirectory(prefix="codetrace-demo-") as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        study = ["--study"] if "--study" in sys.argv else []
        commands = [[sys.executable, __file__, half, str(began), str(results), *study] for half in halves]
        processes = [subprocess.Popen(command, cwd=HOME) for command in commands]
        failures = [process.wait() for process in processes]
        close(results, began)
    return max(failures)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--study"]
    if arguments:
        half, began, results = arguments
        sys.exit(run_half(half, float(began), Path(results)))
    sys.exit(main())
