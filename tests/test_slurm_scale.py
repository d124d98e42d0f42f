"""A job array of 300 shards on a real Slurm with its accounting daemon, each with a tiny model; the launcher is killed on the way, and the
same command goes on with the jobs that it finds. The merged rows are those of one process, byte for byte. Takes twenty minutes; CODETRACE_TEST_SHARDS=24 two."""

import os
import signal
import subprocess
import time

import pytest
from shards import Workspace, note, wait_for
from slurm_cluster import slurm_cluster

pytestmark = pytest.mark.slow
SHARDS = int(os.environ.get("CODETRACE_TEST_SHARDS", "300"))
LETTERS = ["run", "letters", "-p", f"n={2 * SHARDS}", "-p", "model=tiny:llama"]
ARRAY = ["--shards", str(SHARDS), "--cluster", "slurm", "--partition", "debug", "--time", "0:20:00", "--cpus", "1"]


@pytest.fixture(scope="module")
def slurm():
    yield from slurm_cluster("dbd")


@pytest.fixture
def workspace(tmp_path, slurm) -> Workspace:
    return Workspace(tmp_path, **slurm)


def job_states(workspace: Workspace, job: str) -> list[str]:
    "The states of an array's tasks, as the accounting daemon has them."
    words = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "State"]
    done = subprocess.run(words, env=workspace.environment, capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines()]  # CANCELLED by 0


def complete(workspace: Workspace) -> int:
    return sum(manifest["status"] == "complete" for manifest in workspace.manifests())


def test_three_hundred_shards_and_a_launcher_that_dies(workspace, tmp_path):
    alone = Workspace(tmp_path / "alone")
    assert alone.call(*LETTERS, "-q").returncode == 0
    began = time.monotonic()
    launcher = workspace.begin(*LETTERS, *ARRAY)
    wait_for(lambda: complete(workspace) >= SHARDS // 15, 900)
    jobs = workspace.jobs()
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    done = complete(workspace)
    again = workspace.call(*LETTERS, *ARRAY, timeout=3000)
    assert again.returncode == 0, again.stderr[-2000:]
    submitted = {shard: job for shard, job in workspace.jobs().items() if shard >= 0}  # the merge was not, by the first
    assert submitted == jobs, "it has submitted jobs again that were under way"
    note(
        f"   {done} of {SHARDS} were complete when the launcher was killed; all after {time.monotonic() - began:.0f} s"
    )
    assert complete(workspace) == SHARDS + 1 and len(workspace.manifests()) == SHARDS + 1
    assert workspace.parts(workspace.manifests(-1)[0]) == alone.parts(alone.manifests()[0])
    states = job_states(workspace, jobs[0]["job_id"].split("_")[0])
    assert states == ["COMPLETED"] * SHARDS


def test_a_job_that_was_killed_is_known_from_the_accounts(workspace):
    "Killed before it wrote a result, and forgotten by the controller: only the accounting daemon knows how it ended."
    few = ["run", "letters", "-p", "seconds=1.0", *ARRAY[:1], "3", *ARRAY[2:]]
    launcher = workspace.begin(*few)
    wait_for(lambda: workspace.progress(1) >= 2, 400)
    job = workspace.jobs()[1]["job_id"]
    subprocess.run(["scancel", "--signal=KILL", job], env=workspace.environment, check=True)
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 1 and "1 of 3 shards failed; the same command runs only shard 1 again" in error, error
    number = job.split("_")[0]
    assert sorted(set(job_states(workspace, number))) == ["CANCELLED", "COMPLETED"], job_states(workspace, number)
    again = workspace.call(*few, timeout=900)
    assert again.returncode == 0 and len(workspace.manifests()) == 4, again.stderr
