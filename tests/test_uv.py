"`uv sync` in a fresh clone: the environment has the pinned versions, and tests and a notebook pass in it."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from working_tree import copy_working_tree

HOME = Path(__file__).resolve().parents[1]
ONLY_EXTRAS = {"gradio", "pypandoc-binary", "typst"}  # pinned, and installed by --extra app and --extra pdf alone
LIMIT = 1800  # Seconds for a command; downloads are about 600 MB where uv's cache is empty


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    "What a command says; it must succeed, and sees nothing of the environment that the tests run in."
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=kept | environment, timeout=LIMIT)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def pip(tmp_path_factory) -> Path:
    "The pip of an empty venv."
    home = tmp_path_factory.mktemp("uv") / "venv"
    run(sys.executable, "-m", "venv", home, cwd=HOME)
    return home / "bin" / "pip"


@pytest.fixture(scope="module")
def index_of_torch(tmp_path_factory, pip) -> Path:
    "An index with one file, the build of torch that pip takes: of itself, uv takes CUDA's, 3 GB."
    index = tmp_path_factory.mktemp("index")
    page = index / "torch" / "index.html"
    run(pip, "download", "-q", "--no-deps", "-c", "constraints.txt", "-d", page.parent, "torch", cwd=HOME)
    wheel = next(page.parent.glob("*.whl"))
    page.write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    return index


@pytest.fixture(scope="module")
def uv(tmp_path_factory, pip, index_of_torch):
    "Call uv in a fresh clone that `uv sync` has set up."
    clone = copy_working_tree(tmp_path_factory.mktemp("house") / "clone")
    run(pip, "install", "-q", "uv", cwd=HOME)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"

    def call(*words: str) -> str:
        return run(pip.parent / "uv", *words, cwd=clone, UV_INDEX=index_of_torch.as_uri(), UV_PYTHON=python)

    call("sync")
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    return call


def pins() -> dict[str, Requirement]:
    lines = (HOME / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.slow
def test_uv_sync_installs_the_pinned_versions(uv):
    packages = json.loads(uv("pip", "list", "--format", "json"))
    versions = {canonicalize_name(package["name"]): package["version"] for package in packages}
    assert set(pins()) - set(versions) == ONLY_EXTRAS
    checked = {name: pin for name, pin in pins().items() if name in versions}
    assert [str(pin) for name, pin in checked.items() if not pin.specifier.contains(versions[name])] == []


@pytest.mark.slow
def test_tests_pass_in_the_environment_of_uv(uv):
    assert " passed" in uv("run", "pytest", "-q", "tests/test_house.py")


@pytest.mark.slow
def test_a_notebook_runs_in_the_environment_of_uv(uv):
    "One that reads the weights which come in a package."
    uv("run", "nbdev_test", "--path", "nbs/models/smollm2.ipynb")
