"Kernels that are forked from one process: the record is the same, the setting decides, nobody outlives his caller."

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from shards import Workspace, wait_for

from codetrace.core.environment import KERNELS_VARIABLE
from codetrace.runs import warm_kernels as kernels
from codetrace.runs.warm_kernels import ForkedProcess, fork_kernel, fork_process, warm_kernels

HOME = Path(__file__).resolve().parents[1]
SMALL = ["run", "letters", "-q", "-p", "n=3"]


@pytest.fixture(scope="module")
def server():
    "The process that waits: the one that all tests share, or one of this file's own."
    if os.environ.get(KERNELS_VARIABLE):
        yield os.environ[KERNELS_VARIABLE]
    else:
        with warm_kernels() as path:
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
    (first,) = cold.manifests()
    (second,) = warm.manifests()
    assert first["digest"] == second["digest"] and cold.result(first) == warm.result(second)


def test_a_fork_has_the_callers_surroundings(variables, tmp_path):
    kernel = fork_kernel(["-f", str(tmp_path / "kernel.json")], variables | {"CODETRACE_RUN": "here"}, tmp_path)
    process = psutil.Process(kernel.pid)
    wait_for((tmp_path / "kernel.json").exists, 60)
    assert kernel.poll() is None and Path(process.cwd()) == tmp_path and os.getpgid(kernel.pid) == kernel.pid
    kernel.kill()
    assert kernel.wait() == -9


@pytest.mark.parametrize(
    ("code", "status"),
    [("print(sys.stdin.read(), *sys.argv)", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("1/0", 1)],
)
def test_a_fork_runs_any_code_and_says_how_it_ended(variables, tmp_path, code, status):
    (tmp_path / "in").write_text("read,")
    with open(tmp_path / "in") as read, open(tmp_path / "out", "w") as out, open(os.devnull, "w") as nothing:
        files = (read.fileno(), out.fileno(), nothing.fileno())
        process = fork_process(f"import sys; {code}", ["a", "b"], variables, tmp_path, files)
    assert process.wait() == process.poll() == status
    assert (tmp_path / "out").read_text() == ("read, -c a b\n" if status == 0 else "")


@pytest.mark.parametrize(
    "change", [{"OMP_NUM_THREADS": "7"}, {"HF_HUB_OFFLINE": "maybe"}, {KERNELS_VARIABLE: "/nowhere"}]
)
def test_another_setting_gets_no_fork(variables, tmp_path, change):
    assert fork_kernel(["-f", str(tmp_path / "kernel.json")], variables | change, tmp_path) is None


def test_another_library_gets_no_fork(variables, tmp_path, monkeypatch):
    monkeypatch.setattr("codetrace.runs.warm_kernels.library_digest", lambda: "print('changed since')")
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


@pytest.mark.slow
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


def test_forks_draw_other_random_numbers(variables, tmp_path):
    "A kernel of one's own begins with a random state of its own; so does a fork."
    drawn = []
    for name in ("one", "two"):
        line = f"import numpy; open({str(tmp_path / name)!r}, 'w').write(str(numpy.random.rand()) + ';')"
        words = ["-f", str(tmp_path / f"{name}.json"), f"--IPKernelApp.exec_lines={[line]!r}"]
        kernel = fork_kernel(words, variables, tmp_path)
        wait_for(lambda name=name: (tmp_path / name).is_file() and ";" in (tmp_path / name).read_text(), 60)
        kernel.kill()
        kernel.wait()
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] != drawn[1]


def test_no_request_ends_the_process_that_waits(variables, tmp_path):
    "Neither an odd one, nor one whose folder is gone, which the caller hears at once."
    for line in (b"{}\n", b"[]\n", b"3\n", b"no json\n", b"[" * 5000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(60)
            caller.connect(variables[KERNELS_VARIABLE])
            caller.sendall(line)
            assert caller.recv(1) == b""
    assert fork_kernel(["-f", "x.json"], variables, tmp_path / "gone") is None
    kernel = fork_kernel(["-f", str(tmp_path / "kernel.json")], variables, tmp_path)
    assert kernel is not None
    kernel.kill()
    kernel.wait()


def test_a_process_with_many_open_files_can_wait_for_a_kernel():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("so many files cannot be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    ends = socket.socketpair()
    child = subprocess.Popen(["sleep", "60"])
    try:
        kernel = ForkedProcess(child.pid, ends[0])
        assert kernel.poll() is None
        kernel.kill()
        assert (kernel.wait(), kernel.poll(), kernel.wait()) == (-9, -9, -9)
    finally:
        child.kill()
        child.wait()
        for file in files:
            os.close(file)
        ends[1].close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def started(monkeypatch) -> list[tuple]:
    "Commands that would start a process that waits."
    commands = []
    process = SimpleNamespace(kill=lambda: None, communicate=lambda: None)
    start = SimpleNamespace(PIPE=subprocess.PIPE, Popen=lambda command, **options: commands.append(command) or process)
    monkeypatch.setattr(kernels, "subprocess", start)
    monkeypatch.setenv(KERNELS_VARIABLE, "")
    return commands


def test_files_where_one_stands_are_no_modules_of_the_process_that_waits(started, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("")
    with warm_kernels():
        pass
    ((python, option, code),) = started
    (tmp_path / "queue.py").write_text("")
    paths, imports = code.split("; from ", 1)
    assert imports.startswith("codetrace")
    done = subprocess.check_output([python, option, f"{paths}; import queue; print(queue.__file__)"], cwd=tmp_path)
    assert str(tmp_path) not in done.decode()


def test_a_long_name_of_the_folder_for_temporary_files_is_no_obstacle(started, tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with warm_kernels() as path:
        assert Path(path).is_socket()


def test_another_interpreter_gets_no_fork_of_this_one(tmp_path):
    interpreter = tmp_path / "python3"
    interpreter.symlink_to("/bin/true")
    assert kernels._is_this_python(sys.executable) and not kernels._is_this_python(str(interpreter))


def test_who_had_no_server_has_none_afterwards(started, monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE)
    with warm_kernels() as path:
        assert os.environ[KERNELS_VARIABLE] == path
    assert KERNELS_VARIABLE not in os.environ


def test_a_short_process_runs_once(variables, tmp_path):
    "However fast it is, its caller has a handle to it first."
    log = tmp_path / "log"
    code = f"import os; f = open({str(log)!r}, 'a'); f.write('x'); f.close(); os._exit(5)"
    for _ in range(20):
        process = fork_process(code, [], variables, tmp_path)
        assert process is not None and process.wait() == -9  # It told no status
    assert log.read_text() == "x" * 20


SAYING = "import sys; print(sys.argv[1:], 'torch' in sys.modules, sys.stdin.read()); sys.exit(3)"


@pytest.mark.parametrize("kind", ["code", "file"])
def test_python_is_forked_where_a_process_waits(variables, tmp_path, kind):
    (tmp_path / "saying.py").write_text(SAYING)
    words = ["-u", "-c", SAYING] if kind == "code" else [str(tmp_path / "saying.py")]
    command = [sys.executable, str(HOME / "scripts/forked_python.py"), *words, "a", "b"]
    for path, has_torch in ((variables[KERNELS_VARIABLE], True), ("", False)):
        environment = variables | {KERNELS_VARIABLE: path}
        done = subprocess.run(command, input="read", text=True, capture_output=True, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, f"['a', 'b'] {has_torch} read\n"), done.stderr


def test_a_fork_whose_caller_left_does_nothing(variables, tmp_path):
    log = tmp_path / "log"
    request = {"setting": kernels.kernel_setting(variables), "code": f"open({str(log)!r}, 'w').write('x')"}
    request |= {"arguments": [], "nice": 0, "environment": dict(variables), "folder": str(tmp_path)}
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(variables[KERNELS_VARIABLE])
        socket.send_fds(caller, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        pid = int(caller.makefile("rb", buffering=0).readline())
    wait_for(lambda: not psutil.pid_exists(pid), 20)
    assert not log.exists()
