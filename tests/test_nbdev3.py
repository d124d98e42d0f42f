"The repository under nbdev 3, in a venv of its own: it exports without drift, and all its notebooks pass."

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from working_tree import copy_working_tree

from codetrace.core.environment import KERNELS_VARIABLE

HOME = Path(__file__).resolve().parents[1]
LIMIT = 3600  # Seconds for a command; all notebooks take about twelve minutes of processor time, in two processes


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    "Run a command without the kernels that `make test` keeps ready, for they are nbdev 2's."
    kept = {name: value for name, value in os.environ.items() if name != KERNELS_VARIABLE}
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=kept | environment, timeout=LIMIT)


@pytest.fixture(scope="module")
def nbdev3(tmp_path_factory) -> Path:
    "The programs of a venv with nbdev 3, which sees this venv's packages behind its own."
    home = tmp_path_factory.mktemp("nbdev3") / "venv"
    assert run(sys.executable, "-m", "venv", home, cwd=HOME).returncode == 0
    installed = run(home / "bin" / "pip", "install", "-q", "nbdev>=3,<4", cwd=HOME)
    assert installed.returncode == 0, installed.stderr
    site = next(home.glob("lib/python*/site-packages"))
    (site / "zz_codetrace.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    "The working tree, in a folder of its own."
    return copy_working_tree(tmp_path_factory.mktemp("house") / "clone")


@pytest.mark.slow
def test_nbdev_3_exports_without_drift(nbdev3, clone):
    done = run(nbdev3 / "nbdev-export", cwd=clone, PYTHONPATH=str(clone))
    assert done.returncode == 0, done.stderr
    changed = {line[3:] for line in run("git", "status", "--porcelain", cwd=clone).stdout.splitlines()}
    assert changed <= {"codetrace/_modidx.py"}  # an index for links, written differently


@pytest.mark.slow
def test_all_notebooks_pass_under_nbdev_3(nbdev3, clone):
    "In two processes, as `make test-slow` runs them under nbdev 2."
    done = run(nbdev3 / "nbdev-test", "--n-workers", "2", "--timing", cwd=clone, PYTHONPATH=str(clone))
    assert done.returncode == 0, done.stdout + done.stderr
    timed = re.findall(r"^(\S+\.ipynb): \d+ secs$", done.stdout, re.M)
    assert sorted(timed) == sorted(path.name for path in (clone / "nbs").rglob("*.ipynb"))


@pytest.mark.slow
def test_nbdev_3_sees_a_notebook_that_fails(nbdev3, clone):
    done = run(nbdev3 / "nbdev-test", "tests/canary.ipynb", cwd=clone, PYTHONPATH=str(clone))
    assert done.returncode != 0 and "the canary sings" in done.stderr + done.stdout
