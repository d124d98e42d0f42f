"A small phase that can be split, and what the tests of shards do with it."

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from codetrace.core.environment import KERNELS_VARIABLE
from codetrace.runs.manifest import shard_number
from codetrace.runs.parameters import write_phase_notebook

BIN = Path(sys.executable).parent

PARAMETERS = """n: int = 60  # How many
model: str = ""  # Also ask this one; empty: none
seconds: float = 0.0  # Each row takes
shards: int = 1  # Parts
shard: int = -1  # Which; -1: all"""
PHASE = """import os
import time
from pathlib import Path

from codetrace.core.records import Records
from codetrace.core.shards import collect_shard_rows
from codetrace.core.shards import shard_range
from codetrace.runs.run import start_run

run = start_run(LETTERS, n=n, model=model, seconds=seconds, shards=shards, shard=shard)
indices = shard_range(n, shards, shard)
lm = None
if model and not run.shards:
    from codetrace import models
    lm = models.load(model)


def compute(i):
    time.sleep(seconds)
    assert i != 40 or not Path(os.environ.get("CODETRACE_OBSTACLE", "/nothing")).exists(), "row 40 is out of reach"
    return {"i": i, "letter": chr(97 + i % 26)} | ({} if lm is None else {"logit": lm.logits(f"x = {i}")[0, 5].item()})


with Records(run.folder / "letters", "i") as records:
    remaining = [i for i in indices if (i,) not in records.done()]
    rows = collect_shard_rows(run, "letters", ["i"], {(i,) for i in indices}) if run.shards else map(compute, remaining)
    for row in run.progress(rows, len(remaining), "writing"):
        records.append([row])
run.finish(f"{len(records)} letters")"""


def write_phase(folder: Path) -> Path:
    return write_phase_notebook(folder, "letters", PARAMETERS, PHASE).parent


def restore_sigint():
    "A shell that starts the tests in the background has had them ignore Ctrl-C."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def note(*words: object):
    "A line in the record of the tests, if there is to be one."
    if path := os.environ.get("CODETRACE_TEST_RECORD"):
        with open(path, "a") as file:
            print(time.strftime("%H:%M:%S"), *words, file=file)


KINDS = ("last_prompt", "last_generated", "mean_generated")
RESULTS = ("samples.parquet", *(f"activations/{kind}.safetensors" for kind in KINDS))


class Workspace:
    "A folder for runs and a phase, and the command line on it."

    def __init__(self, folder: Path, phase: str = "letters", **environment: str):
        self.runs = folder / "runs"
        self.phase = phase
        folders = {"CODETRACE_RUNS": str(self.runs), "CODETRACE_NOTEBOOKS": str(write_phase(folder / "nbs"))}
        self.environment = os.environ | folders | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment

    def begin(self, *words: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [BIN / "codetrace", *words]
        own_kernels = self.environment | {KERNELS_VARIABLE: ""}  # children of its own, which can be found
        return subprocess.Popen(command, env=own_kernels, preexec_fn=restore_sigint, **pipes)

    def call(self, *words: str, timeout: float = 900) -> subprocess.CompletedProcess:
        command = [BIN / "codetrace", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def manifests(self, shard: int | None = None) -> list[dict]:
        "Runs, the oldest first; of one shard, or of all."
        paths = sorted(self.runs.glob(f"{self.phase}/*/run.json"))
        manifests = [json.loads(path.read_text()) | {"folder": path.parent} for path in paths]
        return [m for m in manifests if shard is None or shard_number(m) == shard]

    def parts(self, manifest: dict) -> dict[str, bytes]:
        "The files of a run's table, by name."
        return {path.name: path.read_bytes() for path in self.part_files(manifest)}

    def part_files(self, manifest: dict) -> list[Path]:
        table = manifest["folder"] / ("samples" if self.phase == "generation" else self.phase)
        return sorted(table.glob("part-*.parquet"))

    def result(self, manifest: dict) -> dict[str, bytes]:
        "What a complete run leaves for others: answers and states, or the table."
        if self.phase != "generation":
            return self.parts(manifest)
        return {name: (manifest["folder"] / name).read_bytes() for name in RESULTS}

    def rows(self, manifest: dict) -> int:
        "How many rows are on the disk."
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(part).num_rows for part in self.part_files(manifest))

    def jobs(self) -> dict[int, dict]:
        "What was submitted, by shard."
        jobs = [job for path in self.runs.glob(".jobs/*/jobs.json") for job in json.loads(path.read_text())]
        return {job["shard"]: job for job in jobs}

    def progress(self, shard: int) -> int:
        "Rows that a running shard has computed."
        for m in self.manifests(shard)[-1:]:
            try:
                return json.loads((m["folder"] / "progress.json").read_text())["done"]
            except (OSError, ValueError):
                pass
        return 0


def wait_for(condition, seconds: float = 600):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def kernel_of(process: subprocess.Popen) -> psutil.Process | None:
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # git, say, that has just ended
            if "ipykernel" in " ".join(child.cmdline()):
                return child
    return None
