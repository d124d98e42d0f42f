"""All checks, in the order in which they are quick; each says how long it took.

`python scripts/check.py` is `make test`; `--slow` adds what takes longer than ten minutes.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
SLOW = "--slow" in sys.argv[1:]
CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "docs": [sys.executable, "scripts/docs.py", "--check"],
    "notebooks": ["nbdev_test", "--n_workers", "2", "--timing", *(["--flags", "slow"] if SLOW else [])],
    "tests": [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "--dist",
        "loadscope",  # a file stays with one worker, and with what its tests share
        "--durations=12",
        *(["-m", "slow or not slow"] if SLOW else []),
    ],
}


def main() -> int:
    environment = os.environ | {
        "CODETRACE_RUNS": tempfile.mkdtemp(prefix="codetrace-runs-"),
        "OMP_NUM_THREADS": "1",  # notebooks and tests run two at a time
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    failed = []
    for name, command in CHECKS.items():
        began = time.monotonic()
        print(f"== {name}: {' '.join(command)}", flush=True)
        status = subprocess.run(command, cwd=HOME, env=environment).returncode
        print(f"== {name}: {'passed' if status == 0 else 'FAILED'} in {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] if status else []
    print(f"{len(CHECKS) - len(failed)} passed, {len(failed)} failed" + (f" ({', '.join(failed)})" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
