"Verdicts are those that plain Python gives, in the test styles that people use; and no program talks its judge into one."

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from codetrace.sandbox.judge_connection import JudgeConnection
from codetrace.sandbox.pool import (
    GradingJob,
    SandboxLimits,
    SandboxPool,
    SandboxWorker,
    Verdict,
    grade,
    why_tier_unavailable,
)

HOME = Path(__file__).resolve().parents[1]
SHARED = HOME.parent / "shared" / "data"
QUICK = SandboxLimits(wall=3.0, patience=20.0)
NEVER_PASSED = ["never passed"]


@pytest.fixture(params=[1, 2])
def tier(request) -> int:
    if reason := why_tier_unavailable(request.param):
        pytest.skip(f"tier {request.param}: {reason}")
    return request.param


def read_programs(path: Path) -> list[tuple[GradingJob, list[str]]]:
    "Jobs, and the verdicts that are acceptable for each."
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    programs = []
    for row in rows:
        entry_point = row.get("entry_point", "f")
        job = GradingJob(row["code"], entry_point, tuple(row["tests"]), row.get("setup") or "", row["name"])
        programs.append((job, row.get("expected", ["passed"])))
    return programs


PROGRAMS = read_programs(HOME / "tests/data/judged.jsonl.gz")


def misjudged(programs: list, verdicts: list[Verdict]) -> list[tuple]:
    "Names and verdicts of the programs that are judged wrong."
    wrong = []
    for (job, expected), verdict in zip(programs, verdicts, strict=True):
        is_right = verdict.verdict in expected or (
            expected == NEVER_PASSED and verdict.verdict not in ("passed", "runner_error")
        )
        if not is_right:
            wrong.append((job.name, verdict.verdict, verdict.detail))
    return wrong


def judge_twice(programs: list, tier: int, limits: SandboxLimits = QUICK):
    jobs = [job for job, _ in programs]
    with SandboxPool(2, limits, tier) as pool:
        for _ in range(2):
            assert misjudged(programs, list(pool.grade(jobs))) == []
        assert pool.restarts == 0  # also where a program leaves what is hard to remove


def test_names_are_unique():
    assert len({job.name for job, _ in PROGRAMS}) == len(PROGRAMS) > 400


HEAVY = ("numpy", "asyncio", "unittest", "time.sleep", "while True", "flood")  # slow to import, or to end


def test_some_programs_are_judged_as_python_does():
    light = [program for program in PROGRAMS if not any(word in str(program[0]) for word in HEAVY)]
    with SandboxPool(1, QUICK) as pool:
        sample = light[::9] + light[len(light) // 2 :] + [p for p in PROGRAMS if p[0].name == "async with swallows"]
        assert misjudged(sample, list(pool.grade(job for job, _ in sample))) == []


@pytest.mark.slow
def test_all_programs_are_judged_as_python_does(tier):
    judge_twice(PROGRAMS, tier)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["judged", "hostile"])
def test_shared_programs_are_judged_as_python_does(tier, name):
    if not (SHARED / f"{name}.jsonl").exists():
        pytest.skip("the shared programs are not on this machine")
    programs = read_programs(SHARED / f"{name}.jsonl")
    refused = {"eval_reads_test", "pickle_in_test"}  # their tests execute an answer
    programs = [(job, ["unsupported"] if job.name in refused else expected) for job, expected in programs]
    judge_twice(programs, tier, SandboxLimits())


def test_a_default_signal_ends_a_candidate(tier):
    signalled = [program for program in PROGRAMS if "signal_to_its" in program[0].name]
    assert len(signalled) == 3
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to what it starts
    try:
        with SandboxPool(1, QUICK, tier) as pool:
            assert misjudged(signalled, list(pool.grade(job for job, _ in signalled))) == []
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_worker_can_be_closed_whatever_became_of_it(tier):
    worker = SandboxWorker(tier, QUICK)
    worker.process.kill()
    worker.close()
    worker.close()
    assert tier == 1 or not os.path.exists(worker.folder)


PLAIN = """
import json, sys, types
job = json.load(sys.stdin)
module = types.ModuleType("__main__")
sys.modules["__main__"] = sys.modules["solution"] = module
namespace = vars(module)
for part in (job["code"], job["setup"], *job["tests"]):
    exec(compile(part, "<part>", "exec", dont_inherit=True), namespace)
"""


@pytest.mark.slow
def test_honest_programs_pass_in_plain_python(tmp_path):
    "The collection itself is held to Python: what is to pass does pass where nothing stands between."
    failed = []
    for number, (job, expected) in enumerate(PROGRAMS):
        if expected == ["passed"] and job.name != "shadow helper":  # in the grader, builtins stay what they are
            folder = tmp_path / str(number)
            folder.mkdir()
            message = json.dumps({"code": job.code, "setup": job.setup, "tests": job.tests})
            start = {"input": message, "text": True, "capture_output": True, "cwd": folder}
            done = subprocess.run([sys.executable, "-c", PLAIN], **start)
            failed += [(job.name, done.stderr[-200:])] if done.returncode else []
    assert failed == []


def grade_one(
    code: str, *tests: str, setup: str = "", entry_point: str = "f", limits: SandboxLimits = QUICK
) -> Verdict:
    return grade([GradingJob(code, entry_point, tests, setup)], workers=1, limits=limits)[0]


def test_a_definite_failure_decides_beside_a_test_that_cannot_be_judged():
    verdict = grade_one("def f(x): return x", "import no_such_package", "assert f(1) == 2")
    assert (verdict.verdict, verdict.per_test) == ("failed_assertion", ("unsupported", "failed_assertion"))
    assert grade_one("def f(x): return x", "import no_such_package", "assert f(1) == 1").verdict == "unsupported"


def test_limits_of_an_answer_can_be_set():
    test = "assert len(f(300_000)) == 300_000"
    assert grade_one("def f(n): return 'x' * n", test).verdict == "passed"
    small = SandboxLimits(answer=1 << 16)
    assert grade_one("def f(n): return 'x' * n", test, limits=small).verdict == "output_limit"


def test_messages_are_made_visible_once():
    verdict = grade_one("def f(x): raise ValueError('\\x1b[2K\\ud800')", "assert f(1) == 2")
    assert (
        verdict.verdict == "exception"
        and "\x1b" not in verdict.detail
        and verdict.detail.isprintable()
        and "\\ud800" in verdict.detail
    )


def test_a_judge_forgets_what_its_tests_have_let_go():
    "A long test holds no more objects than it uses."
    ours, theirs = socket.socketpair()
    serve = (
        f"from codetrace.sandbox.candidate_connection import serve_requests; serve_requests({theirs.fileno()}, 9999)"
    )
    child = subprocess.Popen([sys.executable, "-c", serve], pass_fds=[theirs.fileno()])
    connection = JudgeConnection(ours.fileno(), 9999, finish=print)
    connection.send_message("load", ["class C:\n    pass\ndef f(x): return [x, {}, C()]", "f"], {}, {})
    (function,), _ = connection.decode(connection.receive())
    for i in range(100):
        function([i])
    assert len(connection.graph.objects) < 20
    child.kill()
    child.wait()
