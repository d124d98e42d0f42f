"""Runs in an object store that speaks S3, on loopback: three machines, each with a mirror of its own, make the shards of one study and
merge them to the bytes of the whole; a machine that is killed, and another that goes on with its run. The store and its client are
installed into a folder of this test alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from shards import Workspace, wait_for

pytestmark = pytest.mark.slow
SHARDED = ["run", "letters", "-q", "-p", "shards=3"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "The environment in which `s3://bucket` is a store on this machine."
    import fsspec

    packages = tmp_path_factory.mktemp("packages")
    wanted = [f"s3fs=={fsspec.__version__}", "moto[server]"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", packages, *wanted]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if installed.returncode:
        pytest.skip(f"s3fs and moto cannot be installed here: {installed.stderr[-300:]}")
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = keys | {"PYTHONPATH": str(packages), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    server = subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-p', '{port}'])"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: is_up(environment["AWS_ENDPOINT_URL"]), 60)
        yield environment
    finally:
        server.kill()
        server.wait()


def is_up(address: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(f"{address}/moto-api/data.json").status == 200
    return False


def in_store(store: dict, code: str) -> str:
    "What a program prints that has the store open as `s3`."
    source = f"import s3fs; s3 = s3fs.S3FileSystem(); {code}"
    done = subprocess.run([sys.executable, "-c", source], env=os.environ | store, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def bucket(store, request) -> str:
    name = request.node.name.replace("_", "-")[:40].strip("-")
    in_store(store, f"s3.mkdir({name!r})")
    return name


@pytest.fixture
def machine(store, bucket, tmp_path):
    "A workspace by name, whose runs lie in the store."

    def open_machine(name: str) -> Workspace:
        home = tmp_path / name
        variables = store | {"CODETRACE_RUNS": f"s3://{bucket}/study", "CODETRACE_CACHE": str(home / "cache")}
        workspace = Workspace(home, **variables)
        workspace.runs = home / "cache" / "runs"
        return workspace

    return open_machine


def mirror(workspace: Workspace) -> Path:
    (folder,) = workspace.runs.iterdir()
    return folder


def manifest_of(workspace: Workspace, shard: int) -> dict:
    workspace.runs = mirror(workspace) if workspace.runs.name == "runs" else workspace.runs
    return workspace.manifests(shard)[-1]


def test_shards_of_three_machines_are_merged_to_the_bytes_of_the_whole(machine, store, bucket, tmp_path):
    alone = Workspace(tmp_path / "alone")
    assert alone.call("run", "letters", "-q").returncode == 0
    machines = [machine(name) for name in ("first", "second", "third")]
    for shard, workspace in enumerate(machines):
        done = workspace.call(*SHARDED, "-p", f"shard={shard}")
        assert done.returncode == 0, done.stderr
    merged = machines[2].call("merge", "letters", "-q")
    assert merged.returncode == 0, merged.stderr
    expected = alone.parts(alone.manifests()[0])
    assert machines[2].parts(manifest_of(machines[2], -1)) == expected
    listed = machines[0].call("runs", "--json")
    assert listed.returncode == 0 and len(json.loads(listed.stdout)) == 4, listed.stdout + listed.stderr
    whole = manifest_of(machines[0], -1)
    assert whole["status"] == "complete" and not machines[0].part_files(whole)
    assert machines[0].call("show", whole["run_id"]).returncode == 0
    assert machines[0].parts(whole) == expected
    assert machines[1].call("clean", "letters", "--force").returncode == 0
    assert in_store(store, f"print(len(s3.find({bucket!r})))") == "1"  # the mark of the store


def test_a_run_of_a_machine_that_died_is_continued_by_another(machine, store, bucket):
    first, second = machine("first"), machine("second")
    slow = ["run", "letters", "-q", "-p", "seconds=0.3"]
    process = first.begin(*slow)
    wait_for(lambda: first.runs.is_dir() and any(first.runs.glob("*/letters/*/progress.json")), 120)
    refused = second.call(*slow)
    assert refused.returncode != 0 and "is being written by another machine" in refused.stderr, refused.stderr
    process.send_signal(signal.SIGINT)  # which writes what it has, and says so
    process.wait(60)
    done = manifest_of(first, -1)
    rows = first.rows(done)
    assert done["status"] == "interrupted" and 0 < rows < 60
    in_store_now = in_store(store, f"print(sum(name.endswith('.parquet') for name in s3.find({bucket!r})))")
    assert int(in_store_now) == len(first.part_files(done))
    began = time.monotonic()
    continued = second.call(*slow)
    assert continued.returncode == 0, continued.stderr
    assert time.monotonic() - began < 0.3 * (60 - rows) + 60
    theirs = manifest_of(second, -1)
    assert theirs["run_id"] == done["run_id"] and second.rows(theirs) == 60 and theirs["resumed"]
    assert first.call("show", done["run_id"]).returncode == 0
    ours = manifest_of(first, -1)
    assert ours["status"] == "complete" and first.parts(ours) == second.parts(theirs)


def test_a_store_that_is_away_costs_nothing(machine, store, bucket):
    workspace = machine("only")
    assert workspace.call("run", "letters", "-q").returncode == 0
    away = Workspace.call
    workspace.environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    lost = away(workspace, "runs")
    assert lost.returncode != 0 and "cannot be reached" in lost.stderr and "Traceback" not in lost.stderr
