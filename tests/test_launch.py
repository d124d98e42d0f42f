"Shards on this machine: equal to the whole, failing, stopped, without their launcher, misspelt."

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from shards import Workspace, wait_for
from typer.testing import CliRunner

from codetrace.cli import app
from codetrace.core.errors import BadInput
from codetrace.core.records import read_records
from codetrace.runs.jobs import SubmittedJob, python_with_stop_signals_blocked
from codetrace.runs.launch import ShardedRun, alive_jobs

TWO_SHARDS = ["run", "letters", "--shards", "2", "--devices", "cpu,cpu"]


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    "The table of an unsharded run, as its files."
    workspace = Workspace(tmp_path_factory.mktemp("whole"))
    done = workspace.call("run", "letters", "-q")
    assert done.returncode == 0, done.stderr
    (manifest,) = workspace.manifests()
    return workspace.parts(manifest)


@pytest.mark.slow
def test_two_shards_are_the_whole_byte_for_byte(workspace):
    command = ["-p", "model=tiny:llama"]
    done = workspace.call(*TWO_SHARDS, *command)
    assert done.returncode == 0, done.stderr
    assert [
        len(read_records(m["folder"] / "letters")) for m in workspace.manifests() if m["parameters"]["shard"] >= 0
    ] == [
        30,
        30,
    ]
    assert "letters 0: complete" in done.stderr and "letters 1: job" in done.stderr and "60 letters" in done.stdout
    alone = workspace.call("run", "letters", "-q", *command)
    assert alone.returncode == 0, alone.stderr
    *_, merged, single = workspace.manifests(-1)
    assert workspace.parts(merged) == workspace.parts(single) and len(workspace.parts(single)) == 2
    assert [i["shard"] for i in merged["inputs"]] == [0, 1] and not single["inputs"]
    again = workspace.call(*TWO_SHARDS, *command)  # nothing is left to do
    assert again.returncode == 0 and "letters 1: complete already" in again.stderr
    assert len(workspace.manifests()) == 4
    by_hand = workspace.call("merge", "letters", "-q")
    assert by_hand.returncode == 0, by_hand.stderr
    assert len(workspace.manifests()) == 5 and workspace.parts(workspace.manifests(-1)[-1]) == workspace.parts(single)


@pytest.mark.slow  # chapter merge shows the same with a smaller phase
def test_a_shard_that_fails_is_reported_and_only_it_runs_again(workspace, whole, tmp_path):
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    workspace.environment["CODETRACE_OBSTACLE"] = str(obstacle)
    failed = workspace.call(*TWO_SHARDS)
    assert failed.returncode == 1
    lines = failed.stderr.splitlines()
    assert "codetrace: 1 of 2 shards failed; the same command runs only shard 1 again" in lines
    assert any("the last lines of" in line and ".jobs" in line for line in lines)
    assert "row 40 is out of reach" in lines[-1] and "\x1b" not in failed.stderr
    (first,) = workspace.manifests(0)
    (second,) = workspace.manifests(1)
    assert (first["status"], second["status"]) == ("complete", "failed") and not workspace.manifests(-1)
    missing = workspace.call("merge", "letters")
    assert missing.returncode == 2 and "1 of 2 shards are missing" in missing.stderr
    obstacle.unlink()
    assert workspace.call(*TWO_SHARDS, "-q").returncode == 0
    assert [m["run_id"] for m in workspace.manifests(0)] == [first["run_id"]]
    assert [m["run_id"] for m in workspace.manifests(1)] == [second["run_id"]]  # resumed
    assert workspace.parts(workspace.manifests(-1)[0]) == whole
    damaged = max((second["folder"] / "letters").glob("part-*"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    mended = workspace.call(*TWO_SHARDS)
    assert mended.returncode == 0, mended.stderr
    assert f"letters 1: run {second['run_id']} is damaged (letters/{damaged.name}): computed anew" in mended.stderr
    assert "letters 0: complete already" in mended.stderr and len(workspace.manifests(1)) == 2
    assert workspace.parts(workspace.manifests(-1)[-1]) == whole


@pytest.mark.slow
def test_sigterm_ends_at_a_checkpoint_and_requeue_continues(workspace, whole):
    "What preemption sends: no row is lost, though no part of fifty was full, and the shard goes on by itself."
    launcher = workspace.begin(*TWO_SHARDS, "--requeue", "-p", "seconds=0.3")
    wait_for(lambda: workspace.progress(1) >= 5)
    os.kill(int(workspace.jobs()[1]["job_id"]), signal.SIGTERM)
    kept = wait_for(lambda: workspace.parts(workspace.manifests(1)[0]))  # before the thirty rows are full
    assert len(kept) == 1
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 0, error
    assert "letters 1: stopped, again" in error
    (stopped,) = workspace.manifests(1)
    assert stopped["resumed"] and stopped["status"] == "complete"
    parts = sorted((stopped["folder"] / "letters").glob("part-*"))
    rows = [read_rows(part) for part in parts]
    assert len(rows) == 2 and 5 <= rows[0] < 30 and sum(rows) == 30
    assert workspace.parts(workspace.manifests(-1)[0]) == whole


def read_rows(part) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(part).num_rows


def ended(job: dict) -> bool:
    "Is its process gone, or a zombie: a child of a launcher that is gone itself, and that nobody has asked how it ended?"
    if alive_jobs([SubmittedJob(**job)]):
        return False
    try:
        return psutil.Process(int(job["job_id"])).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


BLOCKED_SIGNAL = """import time
from codetrace.runs.signals import interrupt_on_stop_signals
print("here", flush=True)
time.sleep(1)
try:
    with interrupt_on_stop_signals():
        time.sleep(20)
except KeyboardInterrupt:
    print("stopped")"""


def test_a_signal_that_comes_too_early_is_kept_back():
    "While Python starts and imports nobody listens: whoever submits has the system keep the signal."
    process = subprocess.Popen(
        f"exec {python_with_stop_signals_blocked()} -c '{BLOCKED_SIGNAL}'",
        shell=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "stopped\n" and process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_sigterm_while_a_shard_starts_is_not_lost(workspace, whole, after):
    launcher = workspace.begin(*TWO_SHARDS, "--requeue", "-p", "seconds=0.3")
    task = wait_for(lambda: workspace.jobs().get(1) and psutil.Process(int(workspace.jobs()[1]["job_id"])).children())[
        0
    ]
    time.sleep(after)
    task.send_signal(signal.SIGTERM)
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 0 and "letters 1: stopped, again" in error, error
    assert workspace.parts(workspace.manifests(-1)[0]) == whole and len(workspace.manifests()) == 3


def test_temperatures_have_shards_of_their_own(tmp_path):
    folder = tmp_path / "splits" / "20260101T000000000Z-00000000"
    folder.mkdir(parents=True)
    manifest = {"run_id": folder.name, "phase": "splits", "status": "complete", "outputs": {}, "inputs": []}
    (folder / "run.json").write_text(json.dumps(manifest | {"parameters": {"problems": "basics"}}))
    work = ShardedRun("1.2", {"model": "tiny:llama", "problems": "basics"}, 3, root=tmp_path)
    assert work.shards == work.shard_parameters(11)["shards"] == 12 and work.shard_parameters(11)["temperature"] == [
        0.3,
        0.6,
        0.9,
        1.2,
    ]
    assert (
        work.shard_parameters(0)["samples"] == 5 and work.shard_parameters(0)["input"] == folder.name
    )  # also if phase 0.1 is run meanwhile
    with pytest.raises(BadInput, match="give shards=8 or fewer"):
        ShardedRun("1.2", {"problems": "basics", "num_problems": 2}, 3, root=tmp_path)


@pytest.mark.slow
def test_a_notebook_a_shard_and_temperature(tmp_path):
    "Phase 1.2 in two processes: eight records, each of one temperature, and the whole as if it had been one run."
    workspace = Workspace(tmp_path, "generation", OMP_NUM_THREADS="1")
    assert workspace.call("run", "0.1", "--problems", "basics", "-q").returncode == 0
    small = ["-n", "5", "-p", "samples=2", "-p", "max_new_tokens=8", "-p", "slots=8"]
    command = ["run", "1.2", "--problems", "basics", "--model", "tiny:llama", *small]
    done = workspace.call(*command, "--shards", "2", "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    shards = [m for m in workspace.manifests() if m["parameters"]["shard"] >= 0]
    assert len(shards) == 8 and all((m["folder"] / "notebook.ipynb").is_file() for m in shards)
    warm = [(*{row["temperature"] for row in read_records(m["folder"] / "samples", as_rows=True)},) for m in shards]
    assert sorted(warm) == [(0.3,), (0.3,), (0.6,), (0.6,), (0.9,), (0.9,), (1.2,), (1.2,)]
    assert workspace.call(*command, "-q").returncode == 0
    merged, single = workspace.manifests(-1)
    assert workspace.result(merged) == workspace.result(single) and workspace.rows(single) == 40
    assert single["need"]["total"] > 0 and single["memory"]["host_gb"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped_stops_its_shards(workspace, whole, number):
    command = [*TWO_SHARDS, "-p", "seconds=0.3"]
    launcher = workspace.begin(*command)
    wait_for(lambda: min(workspace.progress(0), workspace.progress(1)) >= 3)
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=600)
    assert launcher.returncode == 2 and error.strip().splitlines()[-1].endswith("the same command continues it"), error
    for k in range(2):
        (manifest,) = workspace.manifests(k)
        assert manifest["status"] == "interrupted" and len(read_records(manifest["folder"] / "letters")) >= 3
        assert ended(workspace.jobs()[k])
    assert workspace.call(*command, "-q").returncode == 0
    assert workspace.parts(workspace.manifests(-1)[0]) == whole and len(workspace.manifests()) == 3


@pytest.mark.slow
def test_shards_outlive_their_launcher_and_are_found_again(workspace, whole):
    command = [*TWO_SHARDS, "-p", "seconds=0.5"]
    launcher = workspace.begin(*command)
    wait_for(lambda: min(workspace.progress(0), workspace.progress(1)) >= 2)
    launcher.kill()
    launcher.wait()  # its pipes stay open: the shards have them too
    before = workspace.jobs()
    kernel = next(
        c
        for c in psutil.Process(int(before[1]["job_id"])).children(recursive=True)
        if "submitit" in " ".join(c.cmdline())
    )
    kernel.kill()  # and one of them has lost its process
    wait_for(lambda: ended(before[1]), 30)
    again = workspace.call(*command)
    assert again.returncode == 0, again.stderr
    assert "letters 0: running already" in again.stderr and "letters 1: job" in again.stderr
    assert workspace.jobs()[0] == before[0] and workspace.jobs()[1]["job_id"] != before[1]["job_id"]
    assert workspace.parts(workspace.manifests(-1)[0]) == whole and len(workspace.manifests()) == 3


MISTAKES = {
    "no device '7' here": ["--devices", "cpu,7"],
    "phase 'binding' is not made to be split": ["--shards", "2"],
    "--shards 0: give how many processes": ["--shards", "0"],
    "unknown cluster 'pbs': expected slurm": ["--cluster", "pbs"],
    "--partition is for a cluster": ["--partition", "gpu"],
    "cannot read the time '4h'": ["--cluster", "slurm", "--time", "4h"],
    "give one of them": ["--cluster", "slurm", "--devices", "cpu"],
    "--detach is for a cluster": ["--detach"],
    "give shards=60 or fewer": ["--shards", "61"],
    "shard=2, shards=2": ["-p", "shards=2", "-p", "shard=2"],
}


def words_of(message: str) -> list[str]:
    return ["run", "binding" if "binding" in message else "letters", "-q", *MISTAKES[message]]


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_begins_nothing(workspace, message, monkeypatch):
    for name in ("CODETRACE_RUNS", "CODETRACE_NOTEBOOKS"):
        monkeypatch.setenv(name, workspace.environment[name])
    done = CliRunner().invoke(app, words_of(message))
    assert isinstance(done.exception, BadInput) and message in str(done.exception), done.exception
    assert not workspace.runs.exists(), "something was begun"


@pytest.mark.parametrize("message", list(MISTAKES)[:2])
def test_a_mistake_is_one_line_and_status_2(workspace, message):
    done = workspace.call(*words_of(message))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
