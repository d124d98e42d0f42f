"What the report of a study reads: settled before its first cell, part of its digest, and kept when it is resumed."

from pathlib import Path

import pytest

from codetrace.core.errors import BadInput
from codetrace.phases.report import study_runs
from codetrace.runs.phases import Phase, find_phase, phase_function
from codetrace.runs.pipeline import report_inputs
from codetrace.runs.run import open_run, run_digest

GREEDY = {"split": "all", "temperature": [0.0], "samples": 1, "model": "m", "problems": "p"}
REPORT = {"failed": ""} | {read.parameter: "" for read in find_phase("report").reads}


@pytest.fixture
def answers(tmp_path, monkeypatch):
    "Makes complete runs of phase 1.0 with the answers that it is given; gives their folders."
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    monkeypatch.setattr("codetrace.runs.run.library_digest", str)  # quick, and the same throughout

    def make(text: str, **parameters) -> Path:
        if parameters.get("split", "all") != "all":
            open_run("splits", {"problems": "p"}, text).finish()
        run = open_run("generation", GREEDY | parameters, text)
        (run.folder / "samples.parquet").write_text(text)
        run.finish(text)
        return run.folder

    return make


def test_another_run_is_another_report(answers):
    first = answers("some answers")
    digest = run_digest("report", REPORT)
    assert run_digest("report", REPORT | {"input": first.name}) == digest
    second = answers("other answers")
    assert run_digest("report", REPORT) != digest == run_digest("report", REPORT | {"input": first.name})
    assert run_digest("report", REPORT | {"input": second.name}) == run_digest("report", REPORT)
    assert len({digest, run_digest("report", REPORT), run_digest("report", REPORT | {"input": "none"})}) == 3


def test_a_resumed_report_reads_what_it_began_with(answers):
    first = answers("some answers")
    begun = open_run("report", REPORT, "code")
    begun.release()  # as if its process had died
    second = answers("other answers")
    resumed = open_run("report", REPORT, "code")
    assert resumed.folder == begun.folder
    assert {number: m["run_id"] for number, m in study_runs(resumed.inputs).items()} == {"1.0": first.name}
    resumed.finish("done")
    assert open_run("report", REPORT, "code").inputs == {"input": second}


def test_a_damaged_run_is_no_run_that_was_never_made(answers):
    folder = answers("some answers")
    (folder / "samples.parquet").write_text("forged answers")
    with pytest.raises(BadInput, match=r"damaged: samples\.parquet changed"):
        run_digest("report", REPORT)


def test_sampled_answers_are_not_the_greedy_ones(answers):
    sampled = answers("sampled answers", split="validation", temperature=[0.8], samples=2)
    inputs = open_run("report", REPORT, "code").inputs
    assert inputs.keys() == {"sampled", "splits"} and inputs["sampled"] == sampled
    with pytest.raises(BadInput, match="takes one with split='all'"):
        run_digest("report", REPORT | {"input": sampled.name})


def test_the_report_of_a_chain_reads_its_runs_and_no_earlier_ones(answers):
    "What a chain did not get to is not taken from an older run."
    answers("sampled answers", split="validation", temperature=[0.8], samples=2)
    greedy = answers("greedy answers")
    inputs = report_inputs({"1.0": {"run_id": greedy.name}})
    assert open_run("report", REPORT | inputs, "code").inputs == {"input": greedy}


def test_claims_of_a_phase_of_ones_own_come_from_the_module_that_it_names(tmp_path, monkeypatch):
    (tmp_path / "my_phase.py").write_text("def my_claims(manifest):\n    return [manifest['headline']]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own_phase = Phase(name="mine", claims="my_claims", limitations="my_limitations", module="my_phase")
    assert phase_function(own_phase, own_phase.claims)({"headline": "seven"}) == ["seven"]
    with pytest.raises(BadInput, match="'mine' declares 'my_limitations', which my_phase does not hold"):
        phase_function(own_phase, own_phase.limitations)
    with pytest.raises(BadInput, match=r"codetrace\.phases\.mine does not hold"):
        phase_function(Phase(name="mine", claims="my_claims"), "my_claims")
