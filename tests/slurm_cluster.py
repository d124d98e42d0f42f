"A Slurm of two nodes on this machine, with fake GPUs, for tests. Needs root, Debian's packages, and the script beside the checkout."

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shards import note

SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "slurm-up.sh"


def slurm_cluster(accounting: str = "shim") -> Iterator[dict[str, str]]:
    "What to add to the environment; all daemons are ended afterwards. With `dbd` the accounting daemon and its database run, too."
    if not SCRIPT.is_file():
        pytest.skip(f"there is no {SCRIPT}")
    if os.geteuid() != 0:
        pytest.skip("installing and starting Slurm needs root")
    home = Path(f"/tmp/codetrace-slurm-{accounting}")  # short, and readable for munge's own user
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # nproc heeds it
    environment |= {"SLURM_TEST_DIR": str(home), "SLURM_NODES": "2", "SLURM_GPUS": "1", "SLURM_ACCT": accounting}
    began = time.monotonic()
    up = subprocess.run(["bash", SCRIPT, "up"], env=environment, capture_output=True, text=True, timeout=600)
    note(f"Slurm is installed and started: {time.monotonic() - began:.1f} s")
    configured = {"SLURM_CONF": str(home / "slurm.conf")}
    try:
        if up.returncode != 0:
            pytest.skip(f"Slurm does not start here: {' '.join((up.stdout + up.stderr).split()[-60:])}")
        yield configured | {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME_OF": str(home)}
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment | configured, check=False)
        subprocess.run(["bash", SCRIPT, "down"], env=environment, capture_output=True, timeout=120)
        subprocess.run(["rm", "-rf", home], check=True)
