"The repository under nbdev 3, in a venv of its own: it exports without drift, and its notebooks pass."

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from working_tree import copy_working_tree

HOME = Path(__file__).resolve().parents[1]
QUICK = ["nbs/core/errors.ipynb", "nbs/core/stats.ipynb", "nbs/tasks/programs.ipynb", "nbs/sae/separation.ipynb"]


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | environment, timeout=900)


@pytest.fixture(scope="module")
def nbdev3(tmp_path_factory) -> Path:
    "The programs of a venv with nbdev 3, which sees this venv's packages behind its own."
    home = tmp_path_factory.mktemp("nbdev3") / "venv"
    assert run(sys.executable, "-m", "venv", str(home), cwd=HOME).returncode == 0
    installed = run(str(home / "bin" / "pip"), "install", "-q", "nbdev>=3,<4", cwd=HOME)
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
    done = run(str(nbdev3 / "nbdev-export"), cwd=clone, PYTHONPATH=str(clone))
    assert done.returncode == 0, done.stderr
    changed = {line[3:] for line in run("git", "status", "--porcelain", cwd=clone).stdout.splitlines()}
    assert changed <= {"codetrace/_modidx.py"}  # an index for links, written differently


@pytest.mark.slow
@pytest.mark.parametrize("notebook", QUICK)
def test_nbdev_3_runs_notebooks(nbdev3, clone, notebook):
    done = run(str(nbdev3 / "nbdev-test"), notebook, cwd=clone, PYTHONPATH=str(clone))
    assert done.returncode == 0, done.stdout + done.stderr
