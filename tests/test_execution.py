"""What the line tracer records is what `sys.settrace` sees, and hostile programs neither stop it nor speak for it."""

import ast
import json
import math
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest

from codetrace import models
from codetrace.sandbox.pool import GradingJob, SandboxLimits, grade
from codetrace.tasks.execution import TracedProgram, TraceLimits, record_executions
from codetrace.tasks.question_styles import DIGIT_STYLES
from codetrace.tasks.state_questions import StateAnswer, pack_questions, state_questions
from codetrace.tasks.watching import first_divergence, watch_execution

DATA = Path(os.environ.get("CODETRACE_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))

# An independent recorder: by call, the line and the `repr` of all variables at each line, and at its end.
REFERENCE = """
import sys
def record(source, call):
    frames, numbers = [], {}
    def describe(frame):
        names = [n for n in frame.f_locals if not n.startswith((".", "__"))]
        texts = {n: repr(frame.f_locals[n]) for n in names if not callable(frame.f_locals[n])}
        return {n: text for n, text in texts.items() if ' at 0x' not in text}
    def trace(frame, event, argument):
        if frame.f_code.co_filename != "<reference>":
            return None
        if frame not in numbers:
            numbers[frame] = len(frames)
            frames.append([])
        if event in ("line", "return"):
            frames[numbers[frame]].append((frame.f_lineno if event == "line" else 0, describe(frame)))
        return trace
    namespace = {}
    exec(compile(source, "<reference>", "exec"), namespace)
    compiled = compile(call, "<call>", "eval")
    sys.settrace(trace)
    try:
        value = repr(eval(compiled, namespace))
    except Exception as error:
        value = type(error).__name__
    finally:
        sys.settrace(None)
    return [frames, value]
"""

SAME_FRAMES = """found, expected = {lines}
found = [[step for step in frame if step[0]] for frame in found]
assert [[line for line, _ in frame] for frame in found] == [[line for line, _ in frame] for frame in expected]
for frame, ours in zip(found, expected):
    for (_, names), (_, texts) in zip(frame, ours):
        assert all(texts.get(name) == text for name, text in names.items())
"""

OWN_PROGRAMS = [
    ("def f(a, b):\n    c = a + b\n    c *= 2\n    a = c\n    return a", "f(1, 2)"),
    (
        "def f(n):\n    if n > 2:\n        m = 'big'\n    elif n == 2:\n        m = 'two'\n    else:\n        m = 'small'\n    return m",
        "f(2)",
    ),
    (
        "def f(n):\n    t = 0\n    while n:\n        t += n\n        n -= 1\n        if t > 5:\n            break\n    else:\n        t = -1\n    return t",
        "f(9)",
    ),
    ("def g(x):\n    y = x * x\n    return y\ndef f(x):\n    z = g(x) + g(x + 1)\n    return z", "f(3)"),
    ("def f(n):\n    if n < 2:\n        return n\n    return f(n - 1) + f(n - 2)", "f(5)"),
    ("def f(xs):\n    ys = [x * 2 for x in xs if x]\n    d = {y: str(y) for y in ys}\n    return d", "f([0, 1, 2])"),
    ("def f(xs):\n    xs.append(1)\n    ys = xs\n    ys[0] = [2]\n    ys[0].append(3)\n    return xs", "f([0])"),
    (
        "def f(d):\n    for k, v in sorted(d.items()):\n        d[k] = v + 1\n    d.pop('a')\n    return d",
        "f({'a': 1, 'b': 2})",
    ),
    ("def f(s):\n    out = ''\n    for c in s:\n        out = c + out\n    return out.upper()", "f('ab\\n')"),
    (
        "def f(x):\n    try:\n        y = 1 / x\n    except ZeroDivisionError as e:\n        y = None\n    finally:\n        z = 1\n    return y",
        "f(0)",
    ),
    ("def f(x):\n    y = [1]\n    return y[x]", "f(3)"),
    (
        "def f(n):\n    def inner(k):\n        nonlocal n\n        n += k\n        return n\n    a = inner(2)\n    return a + n",
        "f(1)",
    ),
    (
        "def f(n):\n    def count():\n        for i in range(n):\n            yield i\n    t = 0\n    for x in count():\n        t += x\n    return t",
        "f(3)",
    ),
    ("def f(a):\n    x = 1\n    del x\n    x, (y, *z) = a\n    return z", "f((1, (2, 3, 4)))"),
    ("def f(s):\n    t = set(s)\n    u = frozenset(t)\n    t.discard(1)\n    return (t, u, ())", "f([1, 2, 1])"),
    (
        "def f():\n    x = 1.5\n    y = x // 0.4\n    z = -0.0\n    w = 2 ** 70\n    b = b'a' * 2\n    return (x, y, z, w, b, 1j)",
        "f()",
    ),
    (
        "class A:\n    def __init__(self, k):\n        self.k = k\n    def up(self):\n        k = self.k + 1\n        return k\ndef f():\n    n = A(1).up()\n    return n",
        "f()",
    ),
    (
        "import contextlib\ndef f(n):\n    with contextlib.nullcontext([n]) as h:\n        t = n\n    m = (lambda q: q + t)(1)\n    return m",
        "f(1)",
    ),
    ("def f(n):\n    r = [[i * j for j in range(i)] for i in range(n)]\n    return sum(map(sum, r))", "f(4)"),
    (
        "def f(m):\n    match m:\n        case [a, b]:\n            r = a\n        case {'k': v}:\n            r = v\n        case _:\n            r = 0\n    return r",
        "f({'k': 5})",
    ),
]


def _frames(execution):
    """Steps as the reference has them: by call, line and variables before it, and those at the end under line 0."""
    frames = {frame: [] for frame in sorted({step.frame for step in execution.steps})}
    ends = {}
    for step in execution.steps:
        assert step.complete
        frames[step.frame].append((step.line, {n: v.text for n, v in step.before.items()}))
        ends[step.frame] = {n: v.text for n, v in step.after.items()}
    return frames, ends


def _same_as_reference(execution, reference):
    frames, ends = _frames(execution)
    expected = [[(line, dict(names)) for line, names in frame if line] for frame in reference[0]]
    names_of = [{n for _, names in frame for n in names} for frame in reference[0]]
    ours = [
        [(line, {n: t for n, t in names.items() if n in names_of[i]}) for line, names in frames[key]]
        for i, key in enumerate(frames)
    ]
    assert ours == expected
    for i, key in enumerate(frames):
        if key in ends:
            assert {n: t for n, t in ends[key].items() if n in names_of[i]} == reference[0][i][-1][1]


@pytest.fixture(scope="module")
def own_executions():
    return record_executions([TracedProgram(code, call) for code, call in OWN_PROGRAMS], workers=1)


@pytest.mark.parametrize("index", range(len(OWN_PROGRAMS)))
def test_record_is_what_settrace_sees(own_executions, index):
    code, call = OWN_PROGRAMS[index]
    namespace = {}
    previous = sys.gettrace()
    exec(REFERENCE, namespace)
    try:
        reference = namespace["record"](code, call)
    finally:
        sys.settrace(previous)
    execution = own_executions[index]
    _same_as_reference(execution, reference)
    assert (execution.value.text if execution.value else execution.detail.partition("(")[0]) == reference[1]


def test_branches_visits_and_unbound_variables(own_executions):
    by_line = {step.line: step.branch for step in own_executions[1].steps}
    assert by_line == {2: False, 4: True, 5: None, 8: None}
    assert [s.visit for s in own_executions[2].steps if s.line == 4] == [1]
    assert own_executions[9].steps[1].raised == "ZeroDivisionError"
    steps = [step for step in own_executions[13].steps if step.complete and step.line == 3]
    assert not any(step.after.get("x") for step in steps)


TOLD = {
    "header of two lines": (
        "def f(x):\n    if (x >\n            0):\n        y = 1\n    return x",
        "f(1)",
        [None, None, True, None, None],
    ),
    "last line, not entered": ("x = 3\nif x > 5:\n    x = 4", "", [None, False]),
    "iterator class": (
        "class It:\n    def __iter__(self):\n        return self\n    def __next__(self):\n        raise StopIteration\n"
        "def f():\n    for x in It():\n        y = x\n    return 1",
        "f()",
        [None, None, False, None],
    ),
    "callee reaches the limit": (
        "def g():\n    while True:\n        pass\ndef f():\n    if g():\n        x = 1",
        "f()",
        [None],
    ),
    "callee raises": (
        "def g():\n    return 1 / 0\ndef f():\n    try:\n        if g():\n            x = 1\n    except ZeroDivisionError:\n        x = 2",
        "f()",
        [None, None, None, None, None],
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_branches_are_told_where_they_are_known(name):
    code, call, branches = TOLD[name]
    steps = record_executions([TracedProgram(code, call)], TraceLimits(steps=30), workers=1)[0].steps
    steps = [step for step in steps if step.function != "g" or "limit" not in name]
    assert sorted(branches, key=str) == sorted((step.branch for step in steps), key=str)
    assert not any(step.raised for step in steps if step.branch is not None)


def test_comprehensions_are_no_visits_and_calls_are_done_before_their_line():
    code = "def g(v):\n    w = v + 1\n    return w\ndef f(xs):\n    for _ in range(2):\n        t = sum([x for x in xs])\n    return g(t)"
    steps = record_executions([TracedProgram(code, "f([1, 2, 3])")], workers=1)[0].steps
    assert [step.visit for step in steps if step.function == "f" and step.line == 6] == [1, 2]
    by_line = {step.line: step for step in steps if step.function in ("f", "g")}
    assert by_line[7].step < by_line[2].step and by_line[7].finished > by_line[3].finished > by_line[2].finished


def test_a_caller_is_asked_when_its_callee_has_been_read():
    code = "def f(x):\n    y = g(x)\n    return y\ndef g(v):\n    w = v + 1\n    return w"
    questions = state_questions(record_executions([TracedProgram(code, "f(1)")], workers=1)[0])
    asked = [(question.variable, question.step.line, question.last_line) for question in questions]
    assert asked.index(("w", 5, 5)) < asked.index(("y", 2, 6))
    assert ("y", 2, 2) not in asked
    table = pd.DataFrame({"step": [2, 1], "finished": [1, 2], "correct": [False, False]})
    assert first_divergence(table) == 2


def test_a_question_does_not_depend_on_its_true_answer():
    lm = models.load("tiny:llama")
    asked = []
    for value in ("7", "'a'", "[1, 2]", "True"):
        execution = record_executions([TracedProgram(f"x = {value}")], workers=1)[0]
        packed = pack_questions(lm, execution, state_questions(execution))
        same = len(lm.tokenizer(f"x = {value}")["input_ids"])
        asked.append(packed.prompt_ids(0)[same:])
    assert all(question == asked[0] for question in asked)
    assert not lm.tokenizer.decode(asked[0]).endswith(" ")
    of_digits = pack_questions(lm, execution, state_questions(execution), DIGIT_STYLES["assertion"])
    assert lm.tokenizer.decode(of_digits.question_ids[0]).endswith("== ")


def test_what_is_printed_has_no_quotes_and_counts_all_the_same():
    lm = models.load("tiny:llama")
    (execution,) = record_executions([TracedProgram("x = 'ab c'\ny = 7\nz = '7'")], workers=1)
    questions = state_questions(execution)
    packed = pack_questions(lm, execution, questions, "print")
    written = [lm.tokenizer.decode(ids).strip() for ids in packed.truth_ids]
    truths = [question.truth.text for question in questions]
    assert dict(zip(truths, written)) == {"'ab c'": "ab c", "7": "7", "'7'": "7"}
    with patch(
        "codetrace.tasks.state_questions.answer_packed",
        lambda _, p, n: [StateAnswer("7", -1.0, 0, True)] * len(p.visible),
    ):
        table = watch_execution(lm, execution, style="print")
    assert set(table[table["correct"]]["truth"]) == {"7", "'7'"}


TAKEN_FOR_AN_INT = """
log = []
class A:
    @property
    def __class__(self):
        log.append(1)
        return int
a = A()
b = len(log)
"""
ODD_NAMESPACE = """
class Odd:
    def __init__(self):
        self.d = {}
    def __getitem__(self, name):
        return self.d[name]
    def __setitem__(self, name, value):
        self.d[name] = value
def make(name, bases, namespace):
    return namespace.d["x"]
make.__prepare__ = lambda *_: Odd()
class C(metaclass=make):
    x = 1
y = C
"""


def test_the_tracer_runs_no_code_of_the_program():
    lied, odd = record_executions([TracedProgram(TAKEN_FOR_AN_INT), TracedProgram(ODD_NAMESPACE)], workers=1)
    assert (lied.ending, odd.ending) == ("return", "return")
    assert {step.after["b"].text for step in lied.steps if "b" in step.after} == {"0"}
    assert odd.steps[-1].after["y"].text == "1"


HOSTILE = {
    "tracer off": ("import sys\ndef f():\n    x = 1\n    sys.settrace(None)\n    x = 2", "tampering"),
    "profiler": ("import sys\ndef f():\n    sys.setprofile(print)", "tampering"),
    "exit": ("import os\ndef f():\n    os._exit(0)", "crashed"),
    "kill": ("import os\ndef f():\n    os.kill(os.getpid(), 9)", "tampering"),
    "fork": ("import os\ndef f():\n    os.fork()", "tampering"),
    "endless": ("def f():\n    while True:\n        pass", "limit"),
    "endless in C": ("import itertools\ndef f():\n    sum(itertools.repeat(0))", "timeout"),
    "deep": ("def f(n=0):\n    return f(n + 1)", "limit"),
    "huge": (
        "def f():\n    x = 'a' * 10**7\n    y = [x] * 10**6\n    for i in range(10**5):\n        z = [i] * 900",
        "limit",
    ),
    "writes": ("import os\ndef f():\n    os.write(3, bytes([0, 0, 0, 5]) + b'hello')\n    x = 1", "forged"),
    "closes": ("import os\ndef f():\n    os.close(3)\n    x = 1", "crashed"),
    "frame": ("import sys\ndef f():\n    sys._getframe().f_back.f_locals['state'] = 0", "tampering"),
    "traceback": (
        "def f():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        e.__traceback__.tb_frame.f_back",
        "tampering",
    ),
    "generator": ("def f():\n    def g(): yield\n    g().gi_frame.f_back", "tampering"),
    "objects": ("import gc\ndef f():\n    gc.get_objects()", "tampering"),
    "ctypes": ("def f():\n    import ctypes", "tampering"),
    "hook": ("import sys\ndef f():\n    sys.addaudithook(print)", "tampering"),
    "signal": ("import signal\ndef f():\n    signal.signal(14, print)", "tampering"),
    "gettrace": ("import sys\ndef f():\n    return sys.gettrace()", "exception"),
    "made anew": ("import _imp, sys\ndef f():\n    _imp.create_builtin(sys.__spec__)", "tampering"),
    "reloaded": ("import importlib, sys\ndef f():\n    return importlib.reload(sys).gettrace()", "exception"),
    "thread": ("import threading\ndef f():\n    threading.Thread(target=print).start()", "tampering"),
    "in definitions": ("import sys\nsys.settrace(None)\ndef f(): pass", "tampering"),
    "builtins": (
        "import builtins\ndef f():\n    builtins.len = builtins.type = builtins.repr = lambda *_: 7\n    x = [1]\n    return x",
        "return",
    ),
    "os.write": ("import os\ndef f():\n    os.write = lambda *_: 1\n    x = 1\n    return x", "return"),
}


@pytest.fixture(scope="module")
def hostile_executions():
    programs = [TracedProgram(code, "f()", name) for name, (code, _) in HOSTILE.items()]
    limits = TraceLimits(steps=500, size=200_000)
    executions = record_executions(programs, limits, workers=1, sandbox_limits=SandboxLimits(wall=1, cpu=1))
    return dict(zip(HOSTILE, executions))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_ends_as_data(hostile_executions, name):
    execution = hostile_executions[name]
    assert execution.ending == HOSTILE[name][1], (execution.ending, execution.detail)
    if execution.ending == "return":
        assert execution.steps[-1].after["x"].text in ("[1]", "1")


def test_every_limit_is_named(hostile_executions):
    assert [hostile_executions[name].detail for name in ("endless", "deep", "huge")] == ["steps", "depth", "size"]


def test_values_are_written_without_asking_them():
    code = """class Meta(type):
    def __eq__(self, other): raise SystemExit
    def __hash__(self): raise SystemExit
class Liar(list, metaclass=Meta):
    def __repr__(self): return '7'
    def __iter__(self): return iter(())
    def __len__(self): return 0
    def __getattribute__(self, name): raise SystemExit
def f():
    x = Liar([1, 2])
    return 1
"""
    (execution,) = record_executions([TracedProgram(code, "f()")])
    assert execution.ending == "return" and execution.steps[-1].after["x"].text == "Liar([1, 2])"


def _rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_cruxeval_as_settrace_sees_it():
    rows = _rows("cruxeval.jsonl")
    calls = [f"f({row['input']})" for row in rows]
    executions = record_executions([TracedProgram(row["code"], call) for row, call in zip(rows, calls)], workers=2)
    right = [
        e.value is not None and ast.literal_eval(e.value.text) == ast.literal_eval(r["output"])
        for e, r in zip(executions, rows)
    ]
    assert sum(right) == 800
    jobs = []
    for row, call, execution in zip(rows, calls, executions):
        frames, _ = _frames(execution)
        expected = [frames[key] for key in frames]
        if not all(v.whole for s in execution.steps for v in s.before.values()):
            continue
        lines = f"record({row['code']!r}, {call!r})[0], {expected!r}"
        jobs_test = SAME_FRAMES.format(lines=lines)
        jobs.append(GradingJob(REFERENCE, "record", (jobs_test,), name=row["id"]))
    verdicts = grade(jobs, workers=2)
    assert [job.name for job, v in zip(jobs, verdicts) if v.verdict != "passed"] == []


@pytest.mark.slow
def test_dreval_outputs():
    programs = []
    outputs = []
    for row in _rows("dreval_data.jsonl"):
        for call_input, output in zip(row["inputs"], row["outputs"]):
            programs.append(TracedProgram(row["code"], f"{row['entry_point']}(*{call_input})", row["task_id"]))
            outputs.append(output)
    limits = TraceLimits(steps=400_000, size=60_000_000)
    sandbox_limits = SandboxLimits(wall=60, cpu=60, answer=64 << 20, memory=4 << 30)
    executions = record_executions(programs, limits, workers=2, sandbox_limits=sandbox_limits)
    wrong = []
    for execution, output in zip(executions, outputs):
        value_text = execution.value.text if execution.value else execution.detail
        value = eval(output, {"nan": math.nan, "inf": math.inf, "__builtins__": {}})
        if repr(value) != value_text:
            wrong.append((execution.program.name, execution.program.call, value_text, output))
    assert len(outputs) > 400 and wrong == []
