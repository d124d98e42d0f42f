"A record is run again from its manifest, and compared."

import sys
from pathlib import Path

import pytest

from codetrace.cli import cli_main
from codetrace.runs.manifest import reference_runs
from codetrace.runs.rerun import find_record, rerun_record
from codetrace.runs.run import open_run


def exit_status(monkeypatch, *words: str) -> int:
    "How `codetrace WORDS` ends."
    monkeypatch.setattr(sys, "argv", ["codetrace", *words])
    with pytest.raises(SystemExit) as ended:
        cli_main()
    return ended.value.code


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    return tmp_path


def test_what_cannot_be_run_again_is_said_in_one_line(root, monkeypatch, capsys):
    run = open_run("tracking", {"num_seqs": 2}, "code", root=root)
    unfinished = run.manifest["run_id"]
    run.release()
    damaged = open_run("tracking", {"num_seqs": 3}, "code", root=root)
    damaged.write_json("results.json", [1])
    damaged.finish("done")
    (damaged.folder / "results.json").write_text("[2]")
    for name, reason in {
        "2099": "no run '2099'",
        unfinished: "is interrupted, not complete",
        damaged.manifest["run_id"]: "is damaged: results.json changed",
    }.items():
        assert exit_status(monkeypatch, "rerun", name) == 2
        message = capsys.readouterr().err
        assert reason in message and message.count("\n") == 1


SMALL = [manifest["run_id"] for manifest in reference_runs("tracing", model="binding")]


@pytest.mark.slow
@pytest.mark.parametrize("run_id", SMALL)
def test_the_small_reference_records_hold(run_id, tmp_path):
    again = rerun_record(find_record(run_id, tmp_path), root=tmp_path, tolerance=1e-2, show_progress=False)
    assert again.holds, [vars(comparison) for comparison in again.outputs]
    assert not (tmp_path / ".reruns/tracing" / again.repeated["run_id"]).exists()
