"""Shards on a real Slurm: two nodes on this machine, with fake GPUs, started here and stopped here.

An array of three; a shard cancelled; a node that goes down with what ran on it; a preemption with `--requeue`: each ends
in the bytes of the unsharded run, of answers with their states or of a table of letters. Needs root, Debian's packages,
and the script beside the checkout that sets Slurm up.
"""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from shards import Workspace, note, wait_for
from slurm_cluster import slurm_cluster

from codetrace.core.records import read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm():
    yield from slurm_cluster()


@pytest.fixture
def workspace(tmp_path, slurm) -> Workspace:
    return Workspace(tmp_path, **slurm)


@pytest.fixture(autouse=True)
def timed(request):
    began = time.monotonic()
    note(f"-- {request.node.name}")
    yield
    note(f"   took {time.monotonic() - began:.0f} s")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    workspace = Workspace(tmp_path_factory.mktemp("whole"))
    assert workspace.call("run", "letters", "-q", "-p", "model=tiny:llama").returncode == 0
    return workspace.parts(workspace.manifests()[0])


ANSWERS = ["run", "1.0", "--model", "tiny:llama", "-n", "90", "-p", "slots=8", "-p", "max_new_tokens=300"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, bytes]:
    "Samples and states of an unsharded run of the phase that writes answers."
    workspace = Workspace(tmp_path_factory.mktemp("answers"), "generation")
    began = time.monotonic()
    assert workspace.call(*ANSWERS, "-q").returncode == 0
    note(f"unsharded: 90 answers, {time.monotonic() - began:.0f} s")
    return workspace.result(workspace.manifests()[0])


ARRAY = ["--shards", "3", "--cluster", "slurm", "--partition", "debug", "--time", "0:20:00", "--cpus", "1"]


def array_command(seconds: float, *options: str) -> list[str]:
    return ["run", "letters", "-p", "model=tiny:llama", "-p", f"seconds={seconds}", *ARRAY, *options]


def output_of(workspace: Workspace, *words: str) -> str:
    return subprocess.run(words, env=workspace.environment, capture_output=True, text=True, check=True).stdout.strip()


def test_an_array_is_the_whole_byte_for_byte(workspace, answers):
    workspace.phase = "generation"
    done = workspace.call(*ANSWERS, *ARRAY, "--gpus", "1", "--memory", "0.5", "--parallel", "2", timeout=900)
    assert done.returncode == 0, done.stderr
    jobs = [workspace.jobs()[k]["job_id"] for k in (0, 1, 2, -1)]
    assert len({job.split("_")[0] for job in jobs[:3]}) == 1 and [job.split("_")[1] for job in jobs[:3]] == [
        "0",
        "1",
        "2",
    ]
    script = next(workspace.runs.glob(f".jobs/*/{jobs[0].split('_')[0]}_submission.sh")).read_text()
    for line in (
        "--array=0-2%2",
        "--gpus-per-node=1",
        "--mem=500MB",
        "--partition=debug",
        "--time=20",
        "--cpus-per-task=1",
    ):
        assert line in script, script
    assert [workspace.rows(m) for k in range(3) for m in workspace.manifests(k)] == [30, 30, 30]
    assert workspace.result(workspace.manifests(-1)[0]) == answers and len(workspace.manifests()) == 4
    note(
        f"   array {jobs[0].split('_')[0]}, tasks 0 to 2, two at a time: samples.parquet and states are the same bytes"
    )


def test_a_shard_that_is_cancelled_is_reported_and_continued(workspace, answers):
    workspace.phase = "generation"
    command = [*ANSWERS, *ARRAY]
    launcher = workspace.begin(*command)
    wait_for(lambda: workspace.progress(1) >= 4, 400)
    job = workspace.jobs()[1]["job_id"]
    output_of(workspace, "scancel", job)
    done = workspace.progress(1)
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 1 and "1 of 3 shards failed; the same command runs only shard 1 again" in error, error
    assert "the last lines of" in error and "generation 0: complete" in error
    kept = [m["run_id"] for k in range(3) for m in workspace.manifests(k)]
    assert len(kept) == 3 and workspace.manifests(1)[0]["status"] == "interrupted"
    stored = workspace.rows(workspace.manifests(1)[0])
    note(f"   scancel {job} after {done} of 30 answers; {stored} stored: {max(0, done - stored)} written again")
    assert 4 <= done <= stored < 30, "it did not end at a checkpoint, or it was over"
    again = workspace.call(*command, timeout=900)
    assert again.returncode == 0, again.stderr
    assert "generation 0: complete already" in again.stderr and "generation 1: job" in again.stderr
    assert [m["run_id"] for k in range(3) for m in workspace.manifests(k)] == kept and workspace.manifests(1)[0][
        "resumed"
    ]
    assert workspace.result(workspace.manifests(-1)[0]) == answers
    table = workspace.manifests(-1)[0]["folder"] / "samples"
    assert "runner_error" not in {row["verdict"] for row in read_records(table, as_rows=True)}


def test_a_node_that_goes_down_costs_nothing(workspace, whole, slurm):
    "Its daemon is killed, and all that ran there: Slurm notices, and the shard goes on elsewhere by itself."
    command = array_command(1.0, "--gpus", "1")  # a node has one: one shard fills it
    launcher = workspace.begin(*command)
    wait_for(lambda: workspace.progress(1) >= 3, 400)
    node = output_of(workspace, "squeue", "-h", "-r", "-j", workspace.jobs()[1]["job_id"], "-o", "%N")
    number = int(Path(slurm["HOME_OF"], "run", f"slurmd-{node}.pid").read_text())
    try:
        done = workspace.progress(1)
        victims = _power_off(psutil.Process(number), workspace.jobs()[1]["job_id"].split("_")[0], node)
        stored = workspace.rows(workspace.manifests(1)[0])
        note(f"   kill -9 of slurmd {node} and {victims - 1} processes of its job after {done} of 20 rows")
        note(f"   {stored} stored: {done - stored} computed again")
        assert 0 < done - stored <= 50
        wait_for(lambda: output_of(workspace, "sinfo", "-h", "-n", node, "-o", "%t").startswith("down"), 120)
        _, error = launcher.communicate(timeout=900)
    finally:
        subprocess.run(["slurmd", "-f", slurm["SLURM_CONF"], "-N", node], env=workspace.environment, check=True)
    assert launcher.returncode == 0, error
    (manifest,) = workspace.manifests(1)
    assert manifest["resumed"] and manifest["status"] == "complete"
    assert workspace.parts(workspace.manifests(-1)[0]) == whole
    wait_for(lambda: output_of(workspace, "sinfo", "-h", "-n", node, "-o", "%t").startswith("idle"), 60)


def _power_off(daemon: psutil.Process, job: str, node: str) -> int:
    "Kill a node's daemon and every process of the job's steps on it; how many that were."

    def is_step(process: psutil.Process) -> bool:
        environment = process.environ()
        return environment.get("SLURMD_NODENAME") == node and environment.get("SLURM_ARRAY_JOB_ID") == job

    victims = [daemon]
    for process in psutil.process_iter():
        try:
            if process.name() == "slurmstepd" and any(is_step(child) for child in process.children(recursive=True)):
                victims += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    for process in victims:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims, 10)
    for process in victims:  # a zombie has ended: it waits for a parent that does not ask, here the first process
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, process
    return len(victims)


def _steps(number: str) -> list[psutil.Process]:
    "What still runs of a job, by Slurm's own number: its processes call themselves `slurmstepd: [7.batch]`."
    return [p for p in psutil.process_iter(["cmdline"]) if f"[{number}." in " ".join(p.info["cmdline"] or [])]


def test_what_is_preempted_requeues_itself(workspace, whole):
    "SIGTERM to a job that nobody cancelled is a preemption: it ends at a checkpoint and waits in the queue again."
    launcher = workspace.begin(*array_command(0.5, "--requeue"))
    wait_for(lambda: workspace.progress(1) >= 4, 400)
    job = workspace.jobs()[1]["job_id"]
    output_of(workspace, "scancel", "--signal=TERM", job)
    done = workspace.progress(1)
    wait_for(lambda: workspace.manifests(1)[0]["status"] == "interrupted", 60)
    stored = workspace.rows(workspace.manifests(1)[0])
    note(f"   SIGTERM to {job} after {done} of 20 rows; {stored} stored: {max(0, done - stored)} computed again")
    assert 4 <= done <= stored
    wait_for(lambda: output_of(workspace, "squeue", "-h", "-r", "-j", job, "-o", "%T") == "PENDING", 60)
    number = output_of(workspace, "squeue", "-h", "-r", "-j", job, "-o", "%A")
    wait_for(lambda: not _steps(number), 60)  # a step that ends later would be taken for the new job's
    output_of(workspace, "scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets it wait two minutes
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 0, error
    assert workspace.manifests(1)[0]["resumed"] and workspace.jobs()[1]["job_id"] == job  # the same job, not a new one
    assert workspace.parts(workspace.manifests(-1)[0]) == whole


def test_handed_in_and_left(workspace, whole):
    left = workspace.call(*array_command(0, "--detach"))
    assert left.returncode == 0, left.stderr
    jobs = workspace.jobs()
    assert sorted(jobs) == [-1, 0, 1, 2] and all(job["job_id"] in left.stdout for job in jobs.values())
    watched = workspace.call(*array_command(0), timeout=900)  # finds the jobs that were handed in
    assert watched.returncode == 0 and workspace.jobs() == jobs, watched.stderr
    assert len(workspace.manifests()) == 4 and workspace.parts(workspace.manifests(-1)[0]) == whole


def test_what_slurm_refuses_is_one_line(workspace):
    done = workspace.call(*[word if word != "debug" else "nowhere" for word in array_command(0, "-q")])
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "codetrace: Slurm takes no job" in line and "nvalid partition" in line, done.stderr
