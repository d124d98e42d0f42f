"Shards on this machine: equal to the whole, failing, stopped, orphaned, misspelt."

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from shards import Place, wait_for

from codetrace.core.errors import BadInput
from codetrace.core.records import read_records
from codetrace.runs import jobs as runs_jobs
from codetrace.runs.jobs import SubmittedJob
from codetrace.runs.launch import ShardedRun, alive_jobs

TWO = ["run", "letters", "--shards", "2", "--devices", "cpu,cpu"]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    "The table of an unsharded run, as its files."
    place = Place(tmp_path_factory.mktemp("whole"))
    done = place.call("run", "letters", "-q")
    assert done.returncode == 0, done.stderr
    (manifest,) = place.manifests()
    return place.parts(manifest)


@pytest.mark.slow
def test_two_shards_are_the_whole_byte_for_byte(place):
    asked = ["-p", "model=tiny:llama"]
    done = place.call(*TWO, *asked)
    assert done.returncode == 0, done.stderr
    assert [len(read_records(m["at"] / "letters")) for m in place.manifests() if m["parameters"]["shard"] >= 0] == [
        30,
        30,
    ]
    assert "letters 0: complete" in done.stderr and "letters 1: job" in done.stderr and "60 letters" in done.stdout
    alone = place.call("run", "letters", "-q", *asked)
    assert alone.returncode == 0, alone.stderr
    *_, merged, single = place.manifests(-1)
    assert place.parts(merged) == place.parts(single) and len(place.parts(single)) == 2
    assert [i["shard"] for i in merged["inputs"]] == [0, 1] and not single["inputs"]
    again = place.call(*TWO, *asked)  # nothing is left to do
    assert again.returncode == 0 and "letters 1: complete already" in again.stderr
    assert len(place.manifests()) == 4
    by_hand = place.call("merge", "letters", "-q")
    assert by_hand.returncode == 0, by_hand.stderr
    assert len(place.manifests()) == 5 and place.parts(place.manifests(-1)[-1]) == place.parts(single)


def test_a_shard_that_fails_is_reported_and_only_it_runs_again(place, whole, tmp_path):
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    asked = [*TWO, "-p", f"broken={obstacle}"]
    failed = place.call(*asked)
    assert failed.returncode == 1
    said = failed.stderr.splitlines()
    assert "codetrace: 1 of 2 shards failed; the same command runs only shard 1 again" in said
    assert any("the last lines of" in line and ".jobs" in line for line in said)
    assert "row 40 is out of reach" in said[-1] and "\x1b" not in failed.stderr
    (first,), (second,) = place.manifests(0), place.manifests(1)
    assert (first["status"], second["status"]) == ("complete", "failed") and not place.manifests(-1)
    missing = place.call("merge", "letters")
    assert missing.returncode == 2 and "1 of 2 shards are missing" in missing.stderr
    obstacle.unlink()
    assert place.call(*asked, "-q").returncode == 0
    assert [m["run_id"] for m in place.manifests(0)] == [first["run_id"]]
    assert [m["run_id"] for m in place.manifests(1)] == [second["run_id"]]  # resumed
    assert place.parts(place.manifests(-1)[0]) == whole
    damaged = max((second["at"] / "letters").glob("part-*"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    mended = place.call(*asked)
    assert mended.returncode == 0, mended.stderr
    assert f"letters 1: run {second['run_id']} is damaged (letters/{damaged.name}): computed anew" in mended.stderr
    assert "letters 0: complete already" in mended.stderr and len(place.manifests(1)) == 2
    assert place.parts(place.manifests(-1)[-1]) == whole


@pytest.mark.slow
def test_sigterm_ends_at_a_checkpoint_and_requeue_continues(place, whole):
    "What preemption sends: no row is lost, though no part of fifty was full, and the shard goes on by itself."
    launcher = place.begin(*TWO, "--requeue", "-p", "seconds=0.3")
    wait_for(lambda: place.progress(1) >= 5)
    os.kill(int(place.jobs()[1]["job"]), signal.SIGTERM)
    kept = wait_for(lambda: place.parts(place.manifests(1)[0]))  # before the thirty rows are full
    assert len(kept) == 1
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 0, error
    assert "letters 1: stopped, again" in error
    (stopped,) = place.manifests(1)
    assert stopped["resumed"] and stopped["status"] == "complete"
    parts = sorted((stopped["at"] / "letters").glob("part-*"))
    rows = [read_rows(part) for part in parts]
    assert len(rows) == 2 and 5 <= rows[0] < 30 and sum(rows) == 30
    assert place.parts(place.manifests(-1)[0]) == whole


def read_rows(part) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(part).num_rows


def ended(job: dict) -> bool:
    "Is its process gone, or a zombie: a child of a launcher that is gone itself, and that nobody has asked how it ended?"
    assert not alive_jobs([SubmittedJob(**job)])
    try:
        return psutil.Process(int(job["job"])).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


KEPT_BACK = """import time
from codetrace import runs
print("here", flush=True)
time.sleep(1)
try:
    with runs.stoppable():
        time.sleep(20)
except KeyboardInterrupt:
    print("stopped")"""


def test_a_signal_that_comes_too_early_is_kept_back():
    "While Python starts and imports nobody listens: whoever submits has the system keep the signal."
    process = subprocess.Popen(
        f"exec {runs_jobs.signal_blocking_python()} -c '{KEPT_BACK}'", shell=True, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "stopped\n" and process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_sigterm_while_a_shard_starts_is_not_lost(place, whole, after):
    launcher = place.begin(*TWO, "--requeue", "-p", "seconds=0.3")
    task = wait_for(lambda: place.jobs().get(1) and psutil.Process(int(place.jobs()[1]["job"])).children())[0]
    time.sleep(after)
    task.send_signal(signal.SIGTERM)
    _, error = launcher.communicate(timeout=900)
    assert launcher.returncode == 0 and "letters 1: stopped, again" in error, error
    assert place.parts(place.manifests(-1)[0]) == whole and len(place.manifests()) == 3


def test_temperatures_have_shards_of_their_own(tmp_path):
    folder = tmp_path / "splits" / "20260101T000000000Z-00000000"
    folder.mkdir(parents=True)
    made = {"run_id": folder.name, "phase": "splits", "status": "complete", "outputs": {}, "inputs": []}
    (folder / "run.json").write_text(json.dumps(made | {"parameters": {"problems": "basics"}}))
    work = ShardedRun("1.2", {"model": "tiny:llama", "problems": "basics"}, 3, root=tmp_path)
    assert work.shards == work.of(11)["shards"] == 12 and work.of(11)["temperature"] == [0.3, 0.6, 0.9, 1.2]
    assert work.of(0)["samples"] == 5 and work.of(0)["input"] == folder.name  # also if phase 0.1 is run meanwhile
    with pytest.raises(BadInput, match="give shards=8 or fewer"):
        ShardedRun("1.2", {"problems": "basics", "num_problems": 2}, 3, root=tmp_path)


@pytest.mark.slow
def test_a_notebook_a_shard_and_temperature(tmp_path):
    "Phase 1.2 in two processes: eight records, each of one temperature, and the whole as if it had been one run."
    place = Place(tmp_path, "generation", OMP_NUM_THREADS="1")
    assert place.call("run", "0.1", "--problems", "basics", "-q").returncode == 0
    small = ["-n", "5", "-p", "samples=2", "-p", "max_new_tokens=8", "-p", "slots=8"]
    asked = ["run", "1.2", "--problems", "basics", "--model", "tiny:llama", *small]
    done = place.call(*asked, "--shards", "2", "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    shards = [m for m in place.manifests() if m["parameters"]["shard"] >= 0]
    assert len(shards) == 8 and all((m["at"] / "notebook.ipynb").is_file() for m in shards)
    warm = [(*{row["temperature"] for row in read_records(m["at"] / "samples", as_rows=True)},) for m in shards]
    assert sorted(warm) == [(0.3,), (0.3,), (0.6,), (0.6,), (0.9,), (0.9,), (1.2,), (1.2,)]
    assert place.call(*asked, "-q").returncode == 0
    merged, single = place.manifests(-1)
    assert place.result(merged) == place.result(single) and place.rows(single) == 40
    assert single["need"]["total"] > 0 and single["memory"]["host_gb"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped_stops_its_shards(place, whole, number):
    asked = [*TWO, "-p", "seconds=0.3"]
    launcher = place.begin(*asked)
    wait_for(lambda: min(place.progress(0), place.progress(1)) >= 3)
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=600)
    assert launcher.returncode == 2 and error.strip().splitlines()[-1].endswith("the same command continues it"), error
    for k in range(2):
        (manifest,) = place.manifests(k)
        assert manifest["status"] == "interrupted" and len(read_records(manifest["at"] / "letters")) >= 3
        assert ended(place.jobs()[k])
    assert place.call(*asked, "-q").returncode == 0
    assert place.parts(place.manifests(-1)[0]) == whole and len(place.manifests()) == 3


@pytest.mark.slow
def test_shards_outlive_their_launcher_and_are_found_again(place, whole):
    asked = [*TWO, "-p", "seconds=0.5"]
    launcher = place.begin(*asked)
    wait_for(lambda: min(place.progress(0), place.progress(1)) >= 2)
    launcher.kill()
    launcher.wait()  # its pipes stay open: the shards have them too
    before = place.jobs()
    kernel = next(
        c for c in psutil.Process(int(before[1]["job"])).children(recursive=True) if "submitit" in " ".join(c.cmdline())
    )
    kernel.kill()  # and one of them has lost its process
    wait_for(lambda: ended(before[1]), 30)
    again = place.call(*asked)
    assert again.returncode == 0, again.stderr
    assert "letters 0: running already" in again.stderr and "letters 1: job" in again.stderr
    assert place.jobs()[0] == before[0] and place.jobs()[1]["job"] != before[1]["job"]
    assert place.parts(place.manifests(-1)[0]) == whole and len(place.manifests()) == 3


SLIPS = {
    "no device '7' here": ["--devices", "cpu,7"],
    "phase 'binding' is not made to be split": ["--shards", "2"],
    "--shards 0: give how many processes": ["--shards", "0"],
    "unknown cluster 'pbs': expected slurm": ["--cluster", "pbs"],
    "--partition is for a cluster": ["--partition", "gpu"],
    "cannot read the time '4h'": ["--cluster", "slurm", "--time", "4h"],
    "give one of them": ["--cluster", "slurm", "--devices", "cpu"],
    "--detach is for a cluster": ["--detach"],
    "give shards=60 or fewer": ["--shards", "61"],
}


@pytest.mark.parametrize("message", SLIPS)
def test_a_slip_is_one_line_and_status_2(place, message):
    phase = "binding" if "binding" in message else "letters"
    done = place.call("run", phase, "-q", *SLIPS[message])
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not place.runs.exists(), "something was begun"
