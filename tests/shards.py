"A small phase that can be split, and what the tests of shards do with it."

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil

BIN = Path(sys.executable).parent

PARAMETERS = """n = 60  # How many
model = ""  # Also ask this one; empty: none
seconds = 0.0  # Each row takes
broken = ""  # While this file is there, row 40 cannot be computed
shards = 1  # Parts
shard = -1  # Which; -1: all"""
PHASE = """import time
from pathlib import Path

from codetrace import machines, runs
from codetrace.store import Records

run = runs.start("letters", globals())
mine = runs.part(n, shards, shard)
lm = None
if model and not run.shards:
    from codetrace import models
    lm = models.load(model)


def row(i):
    time.sleep(seconds)
    assert i != 40 or not Path(broken or "/nothing").exists(), "row 40 is out of reach"
    return {"i": i, "letter": chr(97 + i % 26)} | ({} if lm is None else {"logit": lm.logits(f"x = {i}")[0, 5].item()})


with Records(run.folder / "letters", "i") as records:
    left = [i for i in mine if (i,) not in records.done()]
    rows = machines.collected(run, "letters", ["i"], {(i,) for i in mine}) if run.shards else map(row, left)
    for one in run.progress(rows, len(left), "writing"):
        records.append([one])
run.finish(f"{len(records)} letters")"""


def write_phase(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(PHASE)]
    spec = {"name": "python3", "language": "python", "display_name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), folder / "10_letters.ipynb")
    return folder


def note(*words: object):
    "A line in the record of the tests, where somebody wants one."
    if path := os.environ.get("CODETRACE_TEST_RECORD"):
        with open(path, "a") as file:
            print(time.strftime("%H:%M:%S"), *words, file=file)


KINDS = ("last_prompt", "last_generated", "mean_generated")
RESULTS = ("samples.parquet", *(f"activations/{kind}.safetensors" for kind in KINDS))


class Place:
    "A folder for runs, and the command line on it."

    def __init__(self, folder: Path, phase: str = "letters", **environment: str):
        self.runs, self.phase = folder / "runs", phase
        more = {"CODETRACE_RUNS": str(self.runs), "CODETRACE_NOTEBOOKS": str(write_phase(folder / "nbs"))}
        self.environment = os.environ | more | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment

    def begin(self, *words: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([BIN / "codetrace", *words], env=self.environment, preexec_fn=heeds, **pipes)

    def call(self, *words: str, timeout: float = 900) -> subprocess.CompletedProcess:
        command = [BIN / "codetrace", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def manifests(self, shard: int | None = None) -> list[dict]:
        "Runs, the oldest first; of one shard, or of all."
        found = [
            json.loads(p.read_text()) | {"at": p.parent} for p in sorted(self.runs.glob(f"{self.phase}/*/run.json"))
        ]
        return [m for m in found if shard is None or m["parameters"]["shard"] == shard]

    def parts(self, manifest: dict) -> dict[str, bytes]:
        "The files of a run's table, by name."
        table = manifest["at"] / ("samples" if self.phase == "generation" else self.phase)
        return {p.name: p.read_bytes() for p in sorted(table.glob("part-*.parquet"))}

    def result(self, manifest: dict) -> dict[str, bytes]:
        "What a complete run leaves for others: answers and states, or the table."
        if self.phase != "generation":
            return self.parts(manifest)
        return {name: (manifest["at"] / name).read_bytes() for name in RESULTS}

    def rows(self, manifest: dict) -> int:
        "How many rows are on the disk."
        import pyarrow.parquet as pq

        table = manifest["at"] / ("samples" if self.phase == "generation" else self.phase)
        return sum(pq.read_metadata(part).num_rows for part in table.glob("part-*.parquet"))

    def jobs(self) -> dict[int, dict]:
        "What was submitted, by shard."
        return {j["shard"]: j for path in self.runs.glob(".jobs/*/jobs.json") for j in json.loads(path.read_text())}

    def progress(self, shard: int) -> int:
        "Rows that a running shard has computed."
        for m in self.manifests(shard)[-1:]:
            try:
                return json.loads((m["at"] / "progress.json").read_text())["done"]
            except (OSError, ValueError):
                pass
        return 0


def wait_for(condition, seconds: float = 600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def kernel_of(process: subprocess.Popen) -> psutil.Process | None:
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # git, say, that has just ended
            if "ipykernel" in " ".join(child.cmdline()):
                return child
    return None
