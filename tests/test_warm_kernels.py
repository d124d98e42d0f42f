"Kernels that are forked from one process: the record is the same, the setting decides, nobody outlives his caller."

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from shards import Workspace, wait_for

from codetrace.core.environment import KERNELS_VARIABLE
from codetrace.runs.warm_kernels import fork_kernel, warm_kernels

SMALL = ["run", "letters", "-q", "-p", "n=3"]


@pytest.fixture(scope="module")
def server():
    "The process that waits: the one that all tests share, or one of this file's own."
    if KERNELS_VARIABLE in os.environ:
        yield os.environ[KERNELS_VARIABLE]
    else:
        with warm_kernels() as path:
            wait_for(lambda: Path(path).exists(), 60)
            yield path


@pytest.fixture
def variables(server) -> dict[str, str]:
    "What a run's process has when it asks for a kernel."
    return {"OMP_WAIT_POLICY": "passive"} | os.environ | {KERNELS_VARIABLE: server}


def outputs_of(workspace: Workspace) -> list[str]:
    "What the cells of the one run's record gave, but for the name of the run and its folder."
    (manifest,) = workspace.manifests()
    notebook = json.loads((manifest["folder"] / "notebook.ipynb").read_text())
    texts = [json.dumps(cell.get("outputs")) for cell in notebook["cells"]]
    return [text.replace(manifest["run_id"], "").replace(str(workspace.runs), "") for text in texts]


def test_a_record_is_the_same_from_a_forked_kernel(server, tmp_path):
    cold = Workspace(tmp_path / "cold", **{KERNELS_VARIABLE: ""})
    warm = Workspace(tmp_path / "warm", **{KERNELS_VARIABLE: server})
    for workspace in (cold, warm):
        done = workspace.call(*SMALL)
        assert done.returncode == 0, done.stderr
    assert outputs_of(cold) == outputs_of(warm)
    (first,), (second,) = cold.manifests(), warm.manifests()
    assert first["digest"] == second["digest"] and cold.result(first) == warm.result(second)


def test_a_fork_has_the_callers_surroundings(variables, tmp_path):
    kernel = fork_kernel(["-f", str(tmp_path / "kernel.json")], variables | {"CODETRACE_RUN": "here"}, tmp_path)
    process = psutil.Process(kernel.pid)
    wait_for((tmp_path / "kernel.json").exists, 60)
    assert kernel.poll() is None and Path(process.cwd()) == tmp_path and os.getpgid(kernel.pid) == kernel.pid
    kernel.kill()
    assert kernel.wait() == 0


@pytest.mark.parametrize(
    "change", [{"OMP_NUM_THREADS": "7"}, {"HF_HUB_OFFLINE": "maybe"}, {KERNELS_VARIABLE: "/nowhere"}]
)
def test_another_setting_gets_no_fork(variables, tmp_path, change):
    assert fork_kernel(["-f", str(tmp_path / "kernel.json")], variables | change, tmp_path) is None


def test_another_library_gets_no_fork(variables, tmp_path, monkeypatch):
    monkeypatch.setattr("codetrace.runs.warm_kernels.library_code", lambda: "print('changed since')")
    assert fork_kernel(["-f", str(tmp_path / "kernel.json")], variables, tmp_path) is None


ASKER = """import os, sys, time
from codetrace.runs.warm_kernels import fork_kernel
kernel = fork_kernel(["-f", sys.argv[1]], os.environ, "/")
print(kernel.pid, flush=True)
time.sleep(600)"""


def test_a_kernel_ends_with_its_caller(variables, tmp_path):
    command = [sys.executable, "-c", ASKER, str(tmp_path / "kernel.json")]
    caller = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    kernel = psutil.Process(int(caller.stdout.readline()))
    wait_for((tmp_path / "kernel.json").exists, 60)
    assert kernel.is_running()
    caller.kill()
    caller.communicate()
    wait_for(lambda: not kernel.is_running(), 20)


def test_the_process_that_waits_ends_with_its_owner():
    code = "from codetrace.runs.warm_kernels import warm_kernels\nwith warm_kernels() as path: print(path, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    alone = os.environ | {KERNELS_VARIABLE: ""}
    owner = subprocess.Popen([sys.executable, "-c", code], text=True, env=alone, **pipes)
    path = owner.stdout.readline().strip()
    (server,) = wait_for(psutil.Process(owner.pid).children, 20)
    owner.kill()
    owner.communicate()
    wait_for(lambda: not server.is_running(), 60)
    assert not Path(path).exists() or fork_kernel([], {KERNELS_VARIABLE: path}, Path("/")) is None


def test_who_has_a_server_starts_no_other(server, monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, server)
    with warm_kernels() as path:
        assert path == server
    assert os.environ[KERNELS_VARIABLE] == server
