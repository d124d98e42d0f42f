"Programs that attack their grader, and honest ones that are easily mistaken for them."

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from codetrace.core.errors import BadInput
from codetrace.sandbox import pool
from codetrace.sandbox.pool import (
    NOT_JUDGED,
    VERDICTS,
    GradingJob,
    NoSandbox,
    SandboxLimits,
    SandboxPool,
    SandboxWorker,
    Verdict,
    WorkerLost,
    choose_sandbox_tier,
    grade,
    why_tier_unavailable,
)
from codetrace.tasks.problems import load_problems

HOME = Path(__file__).resolve().parents[1]
SHARED = HOME.parent / "shared" / "data"
QUICK = SandboxLimits(
    wall=2.0, patience=30.0
)  # short for who loops or sleeps, long for who is kept waiting by other tests
NOBODY = 65534


def our_programs() -> list[tuple[GradingJob, set[str]]]:
    "Our own collection: jobs, and the verdicts that are acceptable for each."
    programs = []
    for part in re.split(r"(?m)^(?=#: .* -> )", (HOME / "tests/data/hostile.txt").read_text()):
        if not part:
            continue
        head, _, code = part.partition("\n")
        name, verdicts = re.fullmatch(r"#: (.*) -> ([a-z_ ]+) \| .*", head).groups()
        tests = "assert g(2) == 5; assert g(3) == 10; assert g(7) == 50"
        if code.startswith("#: tests: "):
            tests, _, code = code.removeprefix("#: tests: ").partition("\n")
        code = re.sub(r"@repeat (\d+)", lambda m: "x = " + "(" * int(m[1]) + ")" * int(m[1]), code)
        programs.append((GradingJob(code, "g", tuple(tests.split("; ")), name=name), set(verdicts.split())))
    return programs


def shared_programs() -> list[tuple[GradingJob, set[str]]]:
    if not (SHARED / "hostile.jsonl").exists():
        pytest.skip("the shared programs are not on this machine")
    rows = map(json.loads, (SHARED / "hostile.jsonl").read_text().splitlines())
    return [
        (GradingJob(r["code"], r["entry_point"], tuple(r["tests"]), name=r["name"]), set(r["expected"])) for r in rows
    ]


def unacceptable(programs: list, verdicts: list) -> list[tuple]:
    assert len(programs) == len(verdicts)
    return [(j.name, v.verdict, v.detail) for (j, expected), v in zip(programs, verdicts) if v.verdict not in expected]


def orphans() -> list[psutil.Process]:
    "Processes that a sandbox has left behind."
    processes = []
    for process in psutil.process_iter(["cmdline", "ppid", "status"]):
        if (
            any("from codetrace.sandbox.supervisor" in word for word in process.info["cmdline"] or [])
            and process.info["ppid"] == 1
        ):
            processes.append(process)
    return processes


@pytest.fixture(params=[1, 2])
def tier(request) -> int:
    if reason := why_tier_unavailable(request.param):
        pytest.skip(f"tier {request.param}: {reason}")
    return request.param


def test_this_machine_can_grade():
    assert choose_sandbox_tier() in (1, 2)


def test_a_private_folder_for_temporary_files_is_no_obstacle(tmp_path, monkeypatch, tier):
    "Candidates of root are another user, who cannot enter it."
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    monkeypatch.setattr("tempfile.tempdir", str(private))
    assert grade_one("def f(x): return x + 1", tier=tier).verdict == "passed"


def test_what_is_installed_beside_the_standard_library_cannot_be_listed(tier):
    "In tier 1 it is not there; in tier 2 the library's folder is not listed, and yet all of it can be imported."
    code = """
import importlib, os
importlib.invalidate_caches()
import wave, xml.dom.minidom
library = os.path.dirname(wave.__file__)
def f(folder):
    try: return os.listdir(os.path.join(library, folder))
    except OSError: return []
"""
    tests = ["assert f('site-packages') == []", "assert 'minidom.py' in f('xml/dom')"]
    tests.append(f"assert ('wave.py' in f('.')) is {tier == 1}")
    assert grade_one(code, *tests, tier=tier).verdict == "passed"


def test_the_collection_is_large_and_mixed():
    programs = our_programs()
    assert len(programs) >= 60 and len({job.name for job, _ in programs}) == len(programs)
    seen = set().union(*(expected for _, expected in programs))
    assert seen == set(VERDICTS) - set(NOT_JUDGED)


def twice(programs: list, tier: int, limits: SandboxLimits):
    "Grade all programs two times with the same workers; nothing may be left behind."
    jobs = [job for job, _ in programs]
    with SandboxPool(2, limits, tier) as pool:
        workers = [pool.idle.get() for _ in range(2)]
        before = [len(psutil.Process(w.process.pid).children(recursive=True)) for w in workers]
        for worker in workers:
            pool.idle.put(worker)
        for _ in range(2):
            assert unacceptable(programs, list(pool.grade(jobs))) == []
        assert pool.restarts == 0
        assert [len(psutil.Process(w.process.pid).children(recursive=True)) for w in workers] == before
        folders = [w.folder for w in workers if tier == 2]
        assert [os.listdir(folder) for folder in folders] == [[] for _ in folders]
    assert not any(os.path.exists(folder) for folder in folders)
    assert not [path for path in ("/planted", "/dev/shm/note", "/var/tmp/note", "/run/note") if os.path.exists(path)]
    assert orphans() == []


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_no_program_of_ours_is_misjudged(tier, every):
    twice(our_programs()[::every], tier, QUICK)


AS_OTHER = """
import json, sys
from codetrace.sandbox.pool import GradingJob, SandboxLimits, SandboxPool
tier, limits, rows = json.load(sys.stdin)
with SandboxPool(2, SandboxLimits(**limits), tier) as pool:
    jobs = [GradingJob(**row) for row in rows]
    verdicts = [[v.verdict, v.detail] for _ in range(2) for v in pool.grade(jobs)]
    print(json.dumps([verdicts, pool.restarts]))
"""


def as_nobody(programs: list, tier: int, limits: SandboxLimits):
    "The same, started by a user without privileges."
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else; the other tests ran as a plain user")
    usable = []
    environment = {"PYTHONPATH": str(HOME), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    start = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/", "env": environment, "text": True}
    for python in (
        os.path.realpath(sys.executable),
        "/usr/bin/python3.13",
        "/usr/bin/python3.12",
        "/usr/bin/python3.11",
    ):
        try:
            probe = [python, "-c", "import sys, codetrace.sandbox.pool; sys.exit(sys.version_info < (3, 11))"]
            usable += [python] if subprocess.run(probe, **start, capture_output=True).returncode == 0 else []
        except OSError:
            pass
    if not usable:
        pytest.skip("no interpreter here that a user without privileges can run codetrace with")
    rows = [{"code": j.code, "entry_point": j.entry_point, "tests": j.tests, "name": j.name} for j, _ in programs]
    done = subprocess.run(
        [usable[0], "-c", AS_OTHER], input=json.dumps([tier, asdict(limits), rows]), stdout=subprocess.PIPE, **start
    )
    assert done.returncode == 0
    verdicts, restarts = json.loads(done.stdout)
    wrong = [(j.name, *v) for (j, expected), v in zip(programs * 2, verdicts) if v[0] not in expected]
    assert (wrong, restarts) == ([], 0)
    assert orphans() == []


def test_users_without_privileges_can_grade(tier):
    chosen = ("honest", "yes-man", "many", "leaves", "kills its parent", "lifts", "becomes")
    as_nobody([p for p in our_programs() if p[0].name.startswith(chosen)], tier, QUICK)


@pytest.mark.slow
def test_users_without_privileges_can_grade_everything(tier):
    as_nobody(our_programs(), tier, QUICK)
    as_nobody(shared_programs(), tier, SandboxLimits())


@pytest.mark.slow
def test_no_shared_program_is_misjudged(tier):
    twice(shared_programs(), tier, SandboxLimits())


def published() -> list[GradingJob]:
    "All MBPP problems with their reference solutions."
    if not (SHARED / "mbpp.jsonl").exists():
        pytest.skip("MBPP is not on this machine")
    problems = load_problems(str(SHARED / "mbpp.jsonl"))
    return [GradingJob(p.reference, p.entry_point, p.tests, p.setup, p.task_id) for p in problems]


def negated(test: str) -> str:
    tree = ast.parse(test)
    for node in tree.body:
        if isinstance(node, ast.Assert):
            node.test = ast.UnaryOp(ast.Not(), node.test)
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.slow
def test_references_pass_and_fail_their_negated_tests(tier):
    jobs = published()
    limits = SandboxLimits(wall=60.0, cpu=60.0)  # one needs eight seconds where nothing else runs
    assert [
        (j.name, v.verdict, v.detail)
        for j, v in zip(jobs, grade(jobs, tier=tier, limits=limits))
        if v.verdict != "passed"
    ] == []
    jobs = [GradingJob(j.code, j.entry_point, tuple(map(negated, j.tests)), j.setup, j.name) for j in jobs]
    assert [j.name for j, v in zip(jobs, grade(jobs, tier=tier, limits=limits)) if v.verdict == "passed"] == []


def outcomes(verdicts: list[Verdict]) -> list[tuple]:
    return [(verdict.verdict, verdict.per_test) for verdict in verdicts]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_and_order_change_nothing(every):
    programs = [p for p in our_programs() if "timeout" not in p[1]][::every]
    jobs = [job for job, _ in programs]
    slow = SandboxLimits(wall=60.0)  # nobody here is to run out of it
    expected = outcomes(grade(jobs, workers=1, limits=slow))
    assert outcomes(grade(jobs[::-1], workers=3, limits=slow))[::-1] == expected


RIGHT = "def f(x): return x + 1"


def grade_one(
    code: str = RIGHT, *tests: str, setup: str = "", limits: SandboxLimits = QUICK, tier: int | None = None
) -> Verdict:
    return grade([GradingJob(code, "f", tests or ("assert f(1) == 2",), setup)], workers=1, limits=limits, tier=tier)[0]


def test_each_assert_has_its_own_verdict():
    tests = ("assert f(1) == 2", "assert f(1) == 3", "assert f('a') == 1", "assert f(2) == 3")
    verdict = grade_one(RIGHT, *tests)
    assert verdict.per_test == ("passed", "failed_assertion", "exception", "passed")
    assert verdict.verdict == "failed_assertion" and verdict.detail.startswith("test 2")
    assert grade_one("import os\ndef f(x): return x + 1 if x < 2 else os._exit(0)", *tests).per_test[1:] == (
        "failed_assertion",
        "exception",
        "crashed",
    )
    assert grade_one("def f(x): return x + 1 if x < 2 else g()\ndef f(", *tests).per_test == (None,) * 4


@pytest.mark.parametrize(
    "test",
    [
        "",
        "1",
        "# assert f(1) == 2",
        "assert (f(1) == 3, 'always true')",
        "if False: assert f(1) == 2",
        "assert f(1) == 2 and",
        "f = lambda x: 3\nraise SystemExit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL); assert f(1) == 3",
        "import os, signal; os.kill(-1, signal.SIGKILL); assert f(1) == 3",
        "import os; os.fork(); assert f(1) == 3",
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'["passed",""]\\n\') and 0\n    except OSError: pass\nassert f(1) == 3',
        "import os; os.write(4, b'passed\\n'); assert f(1) == 3",
        "import os; os.write(4, b'[1, 2, 3]\\n[]\\n{}\\n'); assert f(1) == 3",
        'import os; os.write(4, b\'["done", ""]\\n\' * 9); assert f(1) == 3',
        "while True: pass",
        "assert " + "(" * 3000 + "f(1)" + ")" * 3000,
        "assert " + "-" * 100_000 + "f(1)",
        "assert " + "-" * 19_000 + "f(1)",
        "assert f(10**6 * 'x')",
        "assert f('\ud800') == 1",
        "\0",
        "assert f(lambda: 1)(1)",
        "assert all(f(g) for g in [lambda: 1])",
        "'x' * 2**40",
    ],
)
def test_a_test_that_is_none_passes_nobody(tier, test):
    with SandboxPool(1, SandboxLimits(wall=1.0), tier) as pool:
        verdict, after = pool.grade(
            [GradingJob(RIGHT, "f", (test, "assert f(1) == 3")), GradingJob(RIGHT, "f", ("assert f(1) == 2",))]
        )
        assert verdict.verdict not in ("passed", "runner_error") and after.verdict == "passed" and pool.restarts == 0


def test_tests_may_be_programs():
    check = "def check(candidate):\n    for i in range(4):\n        assert candidate(i) == i + 1\n        assert abs(candidate(i) - i) < 2\n"
    assert grade_one(RIGHT, check + "check(f)").verdict == "passed"
    assert grade_one("def f(x): return 1", check + "check(f)").verdict == "failed_assertion"
    raising = "try:\n    f('a')\nexcept TypeError:\n    assert True\nelse:\n    assert False"
    assert (
        grade_one(RIGHT, raising).verdict == "passed"
        and grade_one("def f(x): return x", raising).verdict == "failed_assertion"
    )


def test_setup_is_the_candidates_and_its_imports_are_everybodys():
    code = "class Node:\n    def __init__(self, v): self.v = v\ndef f(node): return node.v"
    assert (
        grade_one(code, "assert sqrt(f(root)) == 3", setup="from math import sqrt\nroot = Node(9)").verdict == "passed"
    )


def test_nothing_of_the_machine_is_in_the_environment(tier, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    names = {
        "LANG",
        "TZ",
        "PATH",
        "PYTHONHASHSEED",
        "HOME",
        "TMPDIR",
        "OPENBLAS_NUM_THREADS",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "LD_LIBRARY_PATH",
        "LC_CTYPE",
        "PWD",
    }
    assert (
        grade_one("import os\ndef f(x): return set(os.environ)", f"assert f(1) <= {names!r}", tier=tier).verdict
        == "passed"
    )
    assert (
        grade_one("import os\ndef f(x): return os.listdir('/proc/self/fd')", "assert f(1)", tier=tier).verdict
        == "exception"
    )
    fds = "import os\ndef f(x):\n    n = []\n    for i in range(256):\n        try: os.fstat(i); n.append(i)\n        except OSError: pass\n    return n"
    open_fds = grade_one(fds, "assert f(1) == [0, 1, 2, 3]", tier=tier)
    assert open_fds.verdict == "passed" or (tier == 2 and os.getuid() == 0)  # there, one leads to the interpreter


def test_an_interpreter_that_was_moved_finds_its_compiled_modules(monkeypatch):
    "uv, conda and copies of a folder: what the interpreter was told when it was built names another place."
    monkeypatch.setattr(pool.sysconfig, "get_config_var", lambda name: "/where/it/was/built")
    pool.find_readable_paths.cache_clear()
    folder = Path(pool.find_readable_paths().path[1])
    assert list(folder.glob("_contextvars*")) or "_contextvars" in sys.builtin_module_names
    pool.find_readable_paths.cache_clear()


def test_libraries_are_found_through_debians_links(tier):
    "libblas.so.3, which numpy needs there, is a link into a folder of links."
    alternatives = Path("/etc/alternatives")
    if not alternatives.is_dir():
        pytest.skip("needs a system with /etc/alternatives")
    first = min(alternatives.iterdir())
    code = f"import os\ndef f(): return os.readlink({str(first)!r})\n"
    (verdict,) = grade([GradingJob(code, "f", (f"assert f() == {os.readlink(first)!r}",))], tier=tier, workers=1)
    assert verdict.verdict == "passed", verdict


def test_packages_beside_numpy_are_not_even_listed(tier):
    pytest.importorskip("numpy")
    code = """import os, numpy
def f():
    try:
        return sorted({*os.listdir(os.path.dirname(os.path.dirname(numpy.__file__)))} - {"numpy", "numpy.libs"})
    except OSError:
        return []
def g():
    return numpy.arange(3) @ numpy.ones(3)
"""
    (verdict,) = grade([GradingJob(code, "f", ("assert f() == []", "assert g() == 3"))], tier=tier, workers=1)
    assert verdict.verdict == "passed", verdict


def test_hashes_and_chance_repeat():
    code = "import random\ndef f(x): return hash('a'), random.random(), list({'a', 'b', 'c'})"
    seen = grade_one(code, "raise ValueError(repr(f(1)))").detail
    assert seen == grade_one(code, "raise ValueError(repr(f(1)))").detail and "ValueError" in seen


def test_a_lost_worker_is_replaced():
    with SandboxPool(1, QUICK) as pool:
        worker = pool.idle.get()
        pool.idle.put(worker)
        os.kill(worker.process.pid, signal.SIGKILL)
        verdicts = list(pool.grade([GradingJob(RIGHT, "f", ("assert f(1) == 2",))] * 3))
        assert [v.verdict for v in verdicts] == ["passed"] * 3 and pool.restarts == 1


STOPPED = """import os, signal, subprocess, sys, psutil
from codetrace.sandbox.pool import GradingJob, SandboxPool

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in the kernel of a run, whose launcher listens
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started the tests in the background
slow = "import time\\ndef f(x):\\n    time.sleep(4)\\n    return x + 1"
with SandboxPool(2, tier=int(sys.argv[1])) as pool:
    verdicts = [pool.submit(GradingJob(slow, "f", ("assert f(1) == 2",))) for _ in range(2)]
    print("begun", flush=True)
    try:
        print(*[verdict.result().verdict for verdict in verdicts], flush=True)
    except KeyboardInterrupt:
        print("stopped", *[verdict.result().verdict for verdict in verdicts], pool.restarts, flush=True)
"""


def test_who_stops_the_asker_does_not_stop_the_judges(tier):
    "Ctrl-C goes to a whole process group, a cluster's SIGTERM to everything: what is being judged is judged to its end."
    command = [sys.executable, "-c", STOPPED, str(tier)]
    asker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert asker.stdout.readline() == "begun\n"
    time.sleep(0.3)
    for process in psutil.Process(asker.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    os.killpg(asker.pid, signal.SIGINT)
    assert asker.communicate(timeout=120)[0] == "stopped passed passed 0\n"


def test_a_grader_that_cannot_work_gives_no_label(monkeypatch):
    with SandboxPool(1, QUICK) as pool:
        monkeypatch.setattr(SandboxWorker, "grade", lambda *_: (_ for _ in ()).throw(WorkerLost("gone")))
        assert [v.verdict for v in pool.grade([GradingJob(RIGHT, "f", ("assert f(1) == 2",))])] == ["runner_error"]


def test_nothing_outlives_a_killed_grader(tier):
    code = f"from codetrace.sandbox.pool import *\ngrade([GradingJob('while True: pass', 'f', ('assert f()',))] * 4, workers=2, tier={tier})"
    host = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(HOME)})
    family = []
    end = time.monotonic() + 60
    while len(family) < 6 and time.monotonic() < end:
        time.sleep(0.2)
        family = psutil.Process(host.pid).children(recursive=True)
    assert len(family) >= 6
    host.kill()
    host.wait()
    alive = [p for p in psutil.wait_procs(family, timeout=10)[1] if p.status() != psutil.STATUS_ZOMBIE]
    assert alive == [] and orphans() == []


def test_without_a_sandbox_nothing_runs(monkeypatch):
    monkeypatch.setattr(pool.shutil, "which", lambda name: None)
    monkeypatch.setattr(pool, "landlock_abi", lambda: 4)
    why_tier_unavailable.cache_clear()
    try:
        with pytest.raises(NoSandbox, match=r"apt-get install bubblewrap.*ABI 4 here, and 6 is needed"):
            grade_one()
        with pytest.raises(NoSandbox, match="tier 2"):
            grade_one(tier=2)
    finally:
        why_tier_unavailable.cache_clear()


def test_the_second_tier_is_never_taken_in_silence(monkeypatch, caplog):
    if why_tier_unavailable(2):
        pytest.skip(why_tier_unavailable(2))
    monkeypatch.setattr(pool.shutil, "which", lambda name: None)
    why_tier_unavailable.cache_clear()
    try:
        assert choose_sandbox_tier() == 2 and "bubblewrap is not installed" in caplog.text
    finally:
        why_tier_unavailable.cache_clear()


def test_a_job_without_tests_is_a_mistake():
    with pytest.raises(BadInput, match="no tests"):
        grade([GradingJob(RIGHT, "f", (), name="empty")])


def mutant(rng: random.Random, texts: list[str]) -> str:
    "Bytes at random, or a program with pieces cut, doubled, swapped or replaced."
    if rng.random() < 0.3:
        return rng.randbytes(rng.randrange(400)).decode(
            rng.choice(["latin-1", "utf-16-le"]), "surrogatepass" if rng.random() < 0 else "replace"
        )
    text = rng.choice(texts)
    for _ in range(rng.randrange(1, 5)):
        low, high = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        high = min(high, low + 40)
        donor = rng.choice(texts)
        start = rng.randrange(len(donor) + 1)
        text = rng.choice(
            [text[:low] + text[high:], text[:high] + text[low:], text[:low] + donor[start : start + 40] + text[high:]]
        )
    return text


def fuzz(n: int, tier: int, seed: int):
    rng = random.Random(seed)
    texts = [job.code for job, _ in our_programs() if len(job.code) < 3000]
    asserts = [
        "assert g(2) == 5",
        "assert g(3) == 10 and g(7) == 50",
        "assert sorted(g(i) for i in [1, 2]) == [2, 5]",
        *texts,
    ]
    jobs = []
    for i in range(n):
        code = mutant(rng, texts) if i % 2 else rng.choice(texts)
        tests = (
            ("assert g(2) == 5", "assert g(2) == 6")
            if i % 2
            else (mutant(rng, asserts), mutant(rng, asserts), "assert g(2) == 6 == 5")
        )
        jobs.append(GradingJob(code, "g", tests, name=str(i)))
    with SandboxPool(2, SandboxLimits(wall=0.7, cpu=1.0), tier) as pool:
        bad = [
            (j.name, v)
            for j, v in zip(jobs, pool.grade(jobs))
            if v.verdict in ("runner_error", "passed") or v.seconds > 30
        ]
        assert (bad, pool.restarts) == ([], 0)
    assert orphans() == []


def test_noise_is_judged(tier):
    fuzz(60, tier, seed=0)


@pytest.mark.slow
def test_much_noise_is_judged(tier):
    fuzz(5000, tier, seed=1)


BURNING = """
import threading, time
def burn():
    end = time.process_time() + 1.2
    while time.process_time() < end:
        pass
"""
BUSY = {
    "main thread": "def f(x):\n    burn()\n    return x + 1",
    "worker thread": "def f(x):\n    t = threading.Thread(target=burn)\n    t.start()\n    t.join()\n    return x + 1",
    "pool of processes": "from concurrent.futures import ProcessPoolExecutor\ndef f(x):\n    with ProcessPoolExecutor(1) as pool:\n"
    "        pool.submit(burn).result()\n    return x + 1",
    "sleeping thread": "def f(x):\n    t = threading.Thread(target=time.sleep, args=(6,))\n    t.start()\n    t.join()\n    return x + 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("who", BUSY)
@pytest.mark.parametrize("tier", [1, 2])
def test_who_waits_for_a_processor_is_given_more_time(tier, who):
    "Four times as many programs as processors: whichever thread or child computes, the wall time is not held against it; sleep is."
    if why_tier_unavailable(tier) or (tier == 2 and "processes" in who):
        pytest.skip("not here")
    n = 4 * len(os.sched_getaffinity(0))
    jobs = [GradingJob(BURNING + BUSY[who], "f", ("assert f(1) == 2",))] * n
    expected = "timeout" if who == "sleeping thread" else "passed"
    limits = SandboxLimits(wall=2.0, patience=30.0)
    assert [v.verdict for v in grade(jobs, workers=n, limits=limits, tier=tier)] == [expected] * n
