"""All checks, in the order in which they are quick; each says how long it took.

`python scripts/check.py` is `make test`; `--slow` adds what takes longer.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from codetrace.runs.warm_kernels import warm_kernels

HOME = Path(__file__).resolve().parents[1]
SLOW = "--slow" in sys.argv[1:]
FORKED = [sys.executable, "scripts/forked_python.py"]  # by the process that has the library imported
TESTS = [sys.executable, "-m", "pytest", "-q", "--durations=12", "--dist", "loadscope", "--no-loadscope-reorder"]
if SLOW:  # also checks types, which forks of an imported library cannot
    TESTS += ["-n", "2", "-m", "slow or not slow"]
else:
    TESTS += ["--tx", f"2*popen//python={shlex.join(FORKED)}", "tests", "scripts/test_notebooks.py"]
FIRST = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "imports": ["lint-imports"],
}
TYPES = ["basedpyright", "--level", "error"]  # tests/types-baseline.json holds what is known, and only shrinks
LANES = [{"types": TYPES}, {"tests": TESTS}]  # side by side; the checks of a lane one after the other
if SLOW:
    LANES[0] |= {
        "notebooks": ["nbdev_test", "--n_workers", "2", "--flags", "slow"],
        "docs": [sys.executable, "scripts/docs.py", "--check"],
    }


def run_check(name: str, command: list[str], quiet: bool) -> bool:
    "Run one check, say how long it took, show what it wrote if it failed or is not quiet; did it pass?"
    began = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    done = subprocess.run(command, cwd=HOME, text=True, **pipes)
    seconds = time.monotonic() - began
    shown = done.stdout if quiet and done.returncode != 0 else ""
    print(f"{shown}== {name}: {'passed' if done.returncode == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
    return done.returncode == 0


def run_lane(lane: dict[str, list[str]]) -> list[str]:
    "Run checks one after the other; names of those that failed."
    failed = []
    for name, command in lane.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        if not run_check(name, command, quiet=name != "tests"):
            failed.append(name)
    return failed


def main() -> int:
    with ExitStack() as open_until_the_end:
        scratch = open_until_the_end.enter_context(
            tempfile.TemporaryDirectory(prefix="codetrace-", ignore_cleanup_errors=True)
        )
        os.environ |= {
            "TMPDIR": scratch,  # examples leave their runs there
            "CODETRACE_RUNS": f"{scratch}/runs",
            "OMP_NUM_THREADS": "1",  # three processes share the cores
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "CODETRACE_CHECK_TYPES": "1" if SLOW else "0",  # at run time, which takes a third longer
        }
        open_until_the_end.enter_context(warm_kernels())  # imports of runs are done once
        failed = run_lane(FIRST)
        with ThreadPoolExecutor(len(LANES)) as pool:
            failed += [name for names in pool.map(run_lane, LANES) for name in names]
    total = sum(map(len, [FIRST, *LANES]))
    print(f"{total - len(failed)} passed, {len(failed)} failed" + (f" ({', '.join(failed)})" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
