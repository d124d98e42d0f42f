"""All checks, in the order in which they are quick; each says how long it took.

`python scripts/check.py` is `make test`; `--slow` adds what takes longer.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
SLOW = "--slow" in sys.argv[1:]
NOTEBOOKS = ["nbdev_test", "--n_workers", "2", "--timing", *(["--flags", "slow"] if SLOW else [])]
TESTS = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--durations=12"]
TESTS += ["--dist", "loadscope"]  # a file stays with one worker, and with what its tests share
TESTS += ["-m", "slow or not slow"] if SLOW else []
STAGES = [  # Checks of one stage run side by side: each of these uses one core
    {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "imports": ["lint-imports"],
    },
    {
        "types": [
            "basedpyright",
            "--level",
            "error",
        ],  # tests/types-baseline.json holds what is known, and only shrinks
        "docs": [sys.executable, "scripts/docs.py", "--check"],
    },
    {"notebooks": NOTEBOOKS},
    {"tests": TESTS},
]


def run_stage(stage: dict[str, list[str]], environment: dict[str, str]) -> list[str]:
    "Run the checks of a stage side by side; names of those that failed."
    began = time.monotonic()
    alone = len(stage) == 1
    processes = {}
    for name, command in stage.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        output = None if alone else tempfile.TemporaryFile("w+")
        process = subprocess.Popen(command, cwd=HOME, env=environment, stdout=output, stderr=output)
        processes[name] = process, output
    failed = []
    for name, (process, output) in processes.items():
        status = process.wait()
        if output is not None and status != 0:
            output.seek(0)
            print(output.read(), flush=True)
        seconds = time.monotonic() - began
        print(f"== {name}: {'passed' if status == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
        failed += [name] if status else []
    return failed


def main() -> int:
    environment = os.environ | {
        "CODETRACE_RUNS": tempfile.mkdtemp(prefix="codetrace-runs-"),
        "OMP_NUM_THREADS": "1",  # notebooks and tests run two at a time
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    failed = []
    for stage in STAGES:
        failed += run_stage(stage, environment)
    total = sum(map(len, STAGES))
    print(f"{total - len(failed)} passed, {len(failed)} failed" + (f" ({', '.join(failed)})" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
