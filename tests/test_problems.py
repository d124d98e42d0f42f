"What a notebook cannot hold of `problems`: the prompts to the letter, real completions cut at every character, files that are wrong."

import ast
import base64
import hashlib
import json
import pickle
import re
import zlib
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codetrace.core.errors import BadInput
from codetrace.tasks.difficulty import measure_difficulty
from codetrace.tasks.extraction import extract_code, is_answer_complete
from codetrace.tasks.problem_prompts import Prompt, render_problem_prompt
from codetrace.tasks.problems import BadProblem, Problem, load_problems

HERE = Path(__file__).parent
MBPP = HERE.parents[1] / "shared" / "data" / "mbpp.jsonl"
needs_mbpp = pytest.mark.skipif(not MBPP.is_file(), reason="the shared MBPP file is not here")

PROBLEM = Problem(
    "7",
    "Return the larger of two numbers.",
    "def larger(a, b):\n    return max(a, b)\n",
    ("assert larger(1, 2) == 2", "assert larger(5, 3) == 5", "assert larger(-1, -1) == -1"),
    "",
    "larger",
    "test",
    "CC0",
)


# prompts, to the letter


def test_the_published_prompt():
    assert render_problem_prompt(PROBLEM, "pva").text == (
        "Return the larger of two numbers.\n"
        "\n"
        "assert larger(1, 2) == 2\n"
        "assert larger(5, 3) == 5\n"
        "assert larger(-1, -1) == -1\n"
        "\n"
        "# Solution:"
    )


def test_the_three_shot_prompt():
    assert render_problem_prompt(PROBLEM, "three_shot").text == (
        "You are an expert Python programmer, and here is your task: Write a function to find the similar elements from "
        "the given two tuple lists. Your code should pass these tests:\n"
        "\n"
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
        "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)\n"
        "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)\n"
        "[BEGIN]\n"
        "def similar_elements(test_tup1, test_tup2):\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\n"
        "  return (res) \n"
        "[DONE]\n"
        "\n"
        "You are an expert Python programmer, and here is your task: Write a python function to identify non-prime "
        "numbers. Your code should pass these tests:\n"
        "\n"
        "assert is_not_prime(2) == False\n"
        "assert is_not_prime(10) == True\n"
        "assert is_not_prime(35) == True\n"
        "[BEGIN]\n"
        "import math\n"
        "def is_not_prime(n):\n"
        "    result = False\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\n"
        "        if n % i == 0:\n"
        "            result = True\n"
        "    return result\n"
        "[DONE]\n"
        "\n"
        "You are an expert Python programmer, and here is your task: Write a function to find the largest integers from "
        "a given list of numbers using heap queue algorithm. Your code should pass these tests:\n"
        "\n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] \n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] \n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]\n"
        "[BEGIN]\n"
        "import heapq as hq\n"
        "def heap_queue_largest(nums,n):\n"
        "  largest_nums = hq.nlargest(n, nums)\n"
        "  return largest_nums\n"
        "[DONE]\n"
        "\n"
        "You are an expert Python programmer, and here is your task: Return the larger of two numbers. Your code should "
        "pass these tests:\n"
        "\n"
        "assert larger(1, 2) == 2\n"
        "assert larger(5, 3) == 5\n"
        "assert larger(-1, -1) == -1\n"
        "[BEGIN]\n"
    )


def test_the_completion_prompt():
    first = load_problems("humaneval")[0]
    assert render_problem_prompt(first, "completion").text == (
        "from typing import List\n"
        "\n"
        "\n"
        "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
        '    """ Check if in given list of numbers, are any two numbers closer to each other than\n'
        "    given threshold.\n"
        "    >>> has_close_elements([1.0, 2.0, 3.0], 0.5)\n"
        "    False\n"
        "    >>> has_close_elements([1.0, 2.8, 3.0, 4.0, 5.0, 2.0], 0.3)\n"
        "    True\n"
        '    """\n'
    )
    assert render_problem_prompt(first, "completion").stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class Chat:
    "A tokenizer as Gemma's: the template writes the first token, and so does the tokenizer."

    chat_template = "…"
    bos_token = "<bos>"
    bos_token_id = 2

    def __init__(self, adds: bool):
        self.adds = adds

    def __call__(self, text: str) -> dict:
        return {"input_ids": [2, 5] if self.adds else [5]}

    def apply_chat_template(self, turns, add_generation_prompt, tokenize) -> str:
        assert add_generation_prompt and not tokenize
        return "<bos>" + "".join(f"<{t['role']}>{t['content']}<end>" for t in turns) + "<model>"


MESSAGE = (
    "You are an expert Python programmer, and here is your task:\nReturn the larger of two numbers.\n"
    "Your code should pass these tests:\nassert larger(1, 2) == 2\nassert larger(5, 3) == 5\nassert larger(-1, -1) == -1"
)


def test_the_chat_prompt():
    assert render_problem_prompt(PROBLEM, "chat", Chat(adds=True)).text == f"<user>{MESSAGE}<end><model>"
    assert render_problem_prompt(PROBLEM, "chat", Chat(adds=False)).text == f"<bos><user>{MESSAGE}<end><model>"
    assert (
        render_problem_prompt(PROBLEM, "chat_code", Chat(adds=True)).text == f"<user>{MESSAGE}<end><model>```python\n"
    )


def test_the_chat_prompt_of_a_real_tokenizer():
    from codetrace import models

    assert render_problem_prompt(PROBLEM, "chat", models.load("tiny:llama").tokenizer).text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{MESSAGE}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_humaneval_in_chat():
    first = load_problems("humaneval")[0]
    asked = render_problem_prompt(first, "chat", Chat(adds=True)).text
    assert asked == (
        "<user>Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{first.text.rstrip()}\n```<end><model>"
    )


@pytest.mark.parametrize("style", ["pva", "three_shot", "chat", "chat_code"])
def test_every_assert_stands_in_the_prompt_once(style):
    for p in load_problems():
        text = render_problem_prompt(p, style, Chat(adds=True)).text
        assert all(text.count(test) == 1 for test in p.tests), p.task_id
        assert text.count("assert") == (9 if style == "three_shot" else 0) + sum(t.count("assert") for t in p.tests)
        assert "assert assert" not in text


# completions that a real model wrote

WRITTEN = [json.loads(line) for line in (HERE / "data" / "smollm2_completions.jsonl").read_text().splitlines()]


PROBLEMS = {(name, p.task_id): p for name in ("basics", "humaneval") for p in load_problems(name)}


def asked(row: dict) -> tuple[Prompt, str]:
    problem = PROBLEMS[row["problems"], row["task_id"]]
    return render_problem_prompt(problem, row["style"], Chat(adds=True)), problem.entry_point


@pytest.mark.parametrize("row", WRITTEN, ids=lambda r: f"{r['style']}-{r['task_id']}")
def test_what_counts_does_not_change_once_it_is_answered(row):
    put, name = asked(row)
    whole = extract_code(row["completion"], put, name)
    answered = False
    for end in range(len(row["completion"]) + 1):
        now = is_answer_complete(row["completion"][:end], put, name)
        assert now or not answered, "an answer was complete, and then it was not"
        if now and not answered:
            assert extract_code(row["completion"][:end], put, name) == whole
        answered = now


@pytest.mark.parametrize("row", WRITTEN, ids=lambda r: f"{r['style']}-{r['task_id']}")
def test_what_counts_is_code_and_only_code(row):
    put, name = asked(row)
    code = extract_code(row["completion"], put, name)
    for line in code.removeprefix(put.prefix).splitlines():
        assert line.strip() in put.text + row["completion"]
    try:
        body = ast.parse(code).body
    except SyntaxError:
        assert row["style"] == "three_shot" or row["completion"].rstrip().endswith(code.rstrip().splitlines()[-1])
        return
    assert all(isinstance(n, ast.FunctionDef | ast.Import | ast.ImportFrom | ast.Assign) for n in body)


ANSWERS = {
    ("pva", "4"): "def reverse_string(input_str):\n    return input_str[::-1]\n",
    ("chat", "4"): "def reverse_string(input_str):\n    return input_str[::-1]\n",
    ("chat_code", "4"): "def reverse_string(input_str):\n    return input_str[::-1]\n",
    ("three_shot", "4"): "def reverse_string(s):\n  return s[::-1]\n",
    ("pva", "49"): "def gcd(a, b):\n    if a == 0:\n        return 1\n    return gcd(a, b % a)\n",
    ("chat", "101"): "",
}


@pytest.mark.parametrize("style, task_id", ANSWERS)
def test_answers(style, task_id):
    row = next(r for r in WRITTEN if (r["style"], r["task_id"]) == (style, task_id))
    assert extract_code(row["completion"], *asked(row)) == ANSWERS[style, task_id]


def function(code: str, name: str) -> str:
    return next(ast.dump(n) for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == name)


@pytest.mark.parametrize("name", ["basics", "humaneval"])
@pytest.mark.parametrize("style", ["pva", "three_shot", "chat", "chat_code"])
def test_a_reference_given_as_an_answer_is_the_answer(name, style):
    for p in load_problems(name):
        put = render_problem_prompt(p, style, Chat(adds=True))
        for answer in (p.reference, f"Sure, here it is:\n```python\n{p.reference}```\nI hope that helps."):
            if put.fenced and "```" in answer:
                continue
            code = extract_code(answer, put, p.entry_point)
            assert function(code, p.entry_point) == function(p.reference, p.entry_point), p.task_id


def test_humaneval_bodies_continue_their_prompts():
    for p in load_problems("humaneval"):
        body = p.reference.removeprefix(p.text)
        code = extract_code(
            body + "\n\ndef other():\n    pass\n", render_problem_prompt(p, "completion"), p.entry_point
        )
        assert code.strip() == p.reference.strip(), p.task_id


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet=st.sampled_from(list("def f(x):\n    return x`#=[]\"'@ print assert\t\r\\")), max_size=120),
    st.booleans(),
)
def test_any_text_is_read(text, fenced):
    put = Prompt("", fenced=fenced)
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    assert all(line.strip() in lines for line in extract_code(text, put, "f").split("\n") if line.strip())
    assert is_answer_complete(text, put, "f") in (True, False)


# problem sets


def words(text: str) -> set[tuple[str, ...]]:
    matches = re.findall(r"\w+", text.lower())
    return {tuple(matches[i : i + 2]) for i in range(max(1, len(matches) - 1))}


def overlap(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def test_basics_are_all_different():
    texts = [words(p.text) for p in load_problems()]
    code = [ast.dump(ast.parse(p.reference)) for p in load_problems()]
    assert max(overlap(a, b) for n, a in enumerate(texts) for b in texts[:n]) < 0.5
    assert len(set(code)) == len(code) >= 120


@needs_mbpp
def test_basics_are_not_from_mbpp():
    theirs = load_problems(str(MBPP))

    def plain(text: str) -> str:
        return re.sub(r"\s", "", text)

    asserts = {plain(test) for p in theirs for test in p.tests}
    code = {plain(p.reference) for p in theirs}
    texts = [words(p.text) for p in theirs]
    for p in load_problems():
        assert not asserts & {plain(t) for t in p.tests} and plain(p.reference) not in code, p.task_id
        assert max(overlap(words(p.text), t) for t in texts) < 0.5, p.text


@needs_mbpp
def test_all_of_mbpp_is_read():
    problems = load_problems(str(MBPP))
    assert [p.task_id for p in problems] == [str(n) for n in range(1, 975)]
    assert not any("\r" in field for p in problems for field in (p.text, p.reference, p.setup, *p.tests))
    names = {p.task_id: p.entry_point for p in problems}
    assert (names["1"], names["601"], names["367"]) == ("min_cost", "max_chain_length", "is_tree_balanced")
    assert "\t" in problems[0].reference and "’" in problems[121].text and {p.source for p in problems} == {"mbpp"}
    digest = hashlib.sha256("".join(render_problem_prompt(p).text for p in problems).encode()).hexdigest()
    assert digest == "f65cd28f1c35e3a96e4f17a47494442f92be92e7b9e9beb5d2b2e5aec8e33c6e"


ROW = {"task_id": 1, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}
WRONG = {
    "no field 'test_list'": ROW | {"test_list": None},
    "'test_list' must be a list of strings": ROW | {"test_list": [1]},
    "no field 'text' or 'prompt'": {k: v for k, v in ROW.items() if k != "text"},
    "the code is not Python": ROW | {"code": "def add(a, b:"},
    "test 1 is not Python": ROW | {"test_list": ["assert add(1,"], "entry_point": "add"},
    "test 1 does not call 'add'": ROW | {"test_list": ["assert 1 == 1"], "entry_point": "add"},
    "no function that all tests call": ROW | {"test_list": ["assert sub(1, 2) == 3"]},
    "does not define 'plus'": ROW | {"entry_point": "plus"},
    "no tests": ROW | {"test_list": []},
    "no description": ROW | {"text": "  "},
    "no 'task_id'": {k: v for k, v in ROW.items() if k != "task_id"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_a_row_is_said(message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(WRONG[message]))
    with pytest.raises(BadProblem, match=re.escape(message)) as caught:
        load_problems(str(tmp_path / "x.jsonl"))
    assert "x.jsonl" in str(caught.value) and "\n" not in str(caught.value)


PLAIN = {"task_id": 1, "text": "t", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"]}
EVAL = {
    "task_id": "a",
    "prompt": "def f(x):\n    'x'\n",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
    "entry_point": "f",
}
OWN = {
    **{"task_id": "a", "text": "t", "reference": "def f(x): return x", "tests": ["assert f(1) == 1"]},
    **{"setup": "", "entry_point": "f", "source": "s", "licence": "l"},
}
LIVE = {  # As LiveCodeBench has them
    "question_content": "Add one to each.",
    "question_id": "2727",
    "starter_code": "class Solution:\n    def addOne(self, numbers: List[int]) -> List[int]:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]", "output": "[2, 3]", "testtype": "functional"}]),
    "private_test_cases": "[]",
    "metadata": '{"func_name": "addOne"}',
}


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


DEEP = "assert f(1)" + " + 0" * 3000 + " == 1"
ODD_ROWS = {  # What a row holds instead, and what the message must name
    "deep code": (PLAIN | {"code": "def f(x): return " + "(" * 3000 + "x" + ")" * 3000}, "not Python"),
    "minus code": (PLAIN | {"code": "def f(x): return " + "-" * 200_000 + "1"}, "too deeply nested|not Python"),
    "long sum": (PLAIN | {"code": "def f(x): return x" + " + x" * 3000}, "not Python|levels deep"),
    "long attribute": (PLAIN | {"code": "def f(x): return x" + ".y" * 900}, "levels deep"),
    "long elif": (
        PLAIN | {"code": "def f(x):\n    if x: return x\n" + "    elif x: return x\n" * 400},
        "levels deep|not Python",
    ),
    "deep test": (PLAIN | {"test_list": [DEEP]}, "not Python|levels deep"),
    "deep check": (
        EVAL | {"test": "def check(candidate):\n    " + DEEP.replace("f(1)", "candidate(1)")},
        "not Python|levels",
    ),
    "check": (EVAL | {"test": "x = 1"}, "no function check"),
    "async check": (EVAL | {"test": "async def check(candidate): pass"}, "no function check"),
    "check class": (EVAL | {"test": "class check: pass"}, "no function check"),
    "empty check": (EVAL | {"test": "def check(candidate): pass"}, "no tests"),
    "prompt": (EVAL | {"prompt": None}, "no field 'prompt'"),
    "eval entry": (EVAL | {"entry_point": ["f"]}, "'entry_point' must be text"),
    "own setup": (OWN | {"setup": None}, "no field 'setup'"),
    "own tests": (OWN | {"tests": "assert f(1) == 1"}, "'tests' must be a list"),
    "own id": (OWN | {"task_id": 3}, "'task_id' must be text"),
    "own licence": (OWN | {"licence": "\ud800"}, "'licence' holds half a character"),
    **{
        f"entry {value!r}": (PLAIN | {"entry_point": value}, "'entry_point' must be text")
        for value in (7, ["f"], {"a": 1}, True)
    },
    **{
        f"id {value!r}": (PLAIN | {"task_id": value}, "'task_id' must be")
        for value in (1.5, float("inf"), True, [1], {})
    },
    "id nan": (PLAIN | {"task_id": float("nan")}, "no 'task_id'"),
    "shown": (OWN | {"n_shown": 2}, "'n_shown' must be a number of tests, at most 1"),
    "live without a name": (LIVE | {"metadata": "{}"}, "func_name"),
    "live that runs code": (LIVE | {"private_test_cases": packed(Evil())}, "print are not read"),
    "live tests": (LIVE | {"public_test_cases": "5"}, "list of objects"),
    **{
        f"half of {name}": (PLAIN | {name: "\ud800"}, f"'{name}' holds half")
        for name in ("task_id", "text", "code", "entry_point")
    },
    "half a test": (PLAIN | {"test_list": ["assert f('\ud800') == 1"]}, "'test_list' holds half"),
    "half a key": ({"\ud800": 1}, "no 'task_id'"),
    "nul code": (PLAIN | {"code": "def f(x): return '\0'"}, "null bytes"),
    **{
        f"tests {value!r}": (PLAIN | {"test_list": value}, "'test_list' must be a list")
        for value in (5, True, "x", {"a": 1}, [["a"]], [None])
    },
    "imports": (PLAIN | {"test_imports": "import x"}, "'test_imports' must be a list"),
    "setup": (PLAIN | {"test_setup_code": ["x"]}, "'test_setup_code' must be text"),
    "bad setup": (PLAIN | {"test_setup_code": "def ("}, "the setup is not Python"),
    "text": (PLAIN | {"text": ["t"]}, "'text' must be text"),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_any_row_is_read_or_its_fault_named(name, tmp_path):
    "The message can be printed, and is one line with the file's name."
    row, message = ODD_ROWS[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadProblem, match=message) as error:
        load_problems(str(tmp_path / "x.jsonl"))
    error_text = str(error.value)
    assert "x.jsonl" in error_text and "\n" not in error_text and error_text.encode() and not error_text.endswith(": ")


ODD_FILES = {
    "deep": b"[" * 100_000,
    "deep object": b'{"task_id":' * 3000,
    "huge integer": b'{"task_id":' + b"9" * 5000 + b"}",
    "nul": b"\0",
    "not utf-8": b"\xff\xfe{}",
    "null": b"null",
    "junk": b"PAR1junkPAR1",
}


@pytest.mark.parametrize("name", ODD_FILES)
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_any_file_is_read_or_its_fault_named(name, kind, tmp_path):
    (tmp_path / f"x.{kind}").write_bytes(ODD_FILES[name])
    with pytest.raises(BadProblem, match="x\\."):
        load_problems(str(tmp_path / f"x.{kind}"))


ODD_COLUMNS = {
    "bytes": {"text": [b"\xff"]},
    "bytes code": {"code": [b"def f(x): return x"]},
    "null test": {"test_list": [["assert f(1) == 1", None]]},
    "null id": {"task_id": [None]},
    "nan id": {"task_id": [float("nan")]},
    "decimal id": {"task_id": [Decimal(1)]},
    "date id": {"task_id": [datetime(2020, 1, 1)]},
    "date tests": {"test_list": [datetime(2020, 1, 1)]},
    "text tests": {"test_list": ["assert f(1) == 1"]},
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_any_parquet_is_read_or_its_fault_named(name, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {key: [value] for key, value in PLAIN.items()} | ODD_COLUMNS[name]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(BadProblem, match="x\\.parquet"):
        load_problems(str(tmp_path / "x.parquet"))


def test_dates_that_python_has_not_and_columns_of_one_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {key: [value] for key, value in PLAIN.items()}
    later = pa.table(columns | {"task_id": pa.array([2**62], pa.timestamp("us"))})
    twice = pa.table([pa.array([1]), pa.array([2])], names=["task_id", "task_id"])
    maps = pa.table(columns | {"test_list": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))})
    for table in (later, twice, maps):
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(BadProblem, match="x\\.parquet"):
            load_problems(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    "name",
    [
        "/etc",
        ".jsonl",
        "/dev/null.jsonl",
        "x\0.jsonl",
        "nope.parquet",
        "a" * 5000 + ".jsonl",
        "\udce9.jsonl",
        5,
        None,
        b"x.jsonl",
    ],
)
def test_any_name_is_a_file_a_set_or_a_clear_error(name):
    with pytest.raises(BadInput) as error:
        load_problems(name)
    assert str(error.value).encode()


def test_what_is_odd_but_sound_is_read(tmp_path):
    rows = [
        PLAIN | {"task_id": "../../x"},
        PLAIN | {"text": "a\0b"},
        PLAIN | {"task_id": "\0"},
        PLAIN | {"task_id": 2**62},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    problems = load_problems(str(tmp_path / "x.json"))
    assert [problem.task_id for problem in problems] == ["../../x", "1", "\0", str(2**62)]
    assert len(measure_difficulty(problems)) == 4


def test_files_of_all_kinds(tmp_path):
    import pandas as pd

    rows = [ROW, ROW | {"task_id": 2, "text": "Add\u2028two."}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
    )
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    read = [load_problems(str(tmp_path / f"x.{kind}")) for kind in ("json", "jsonl", "parquet")]
    assert read[0] == read[1] == read[2] and [p.text for p in read[0]] == ["Add.", "Add\u2028two."]


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", "not json", '{"task_id": 1}\n[2]'])
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_files_that_hold_no_problems(content, kind, tmp_path):
    (tmp_path / f"x.{kind}").write_text(content)
    with pytest.raises(BadProblem, match="x\\."):
        load_problems(str(tmp_path / f"x.{kind}"))


def test_two_problems_with_one_id(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([ROW, ROW]))
    with pytest.raises(BadProblem, match="another problem has this id"):
        load_problems(str(tmp_path / "x.json"))
    with pytest.raises(BadProblem, match="nowhere"):
        load_problems(str(tmp_path / "nowhere.jsonl"))


def test_mbpp_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    sanitized = {"source_file": "x", "task_id": 12, "prompt": "Add.", "test_imports": ["import math"]}
    splits = {"train": [sanitized | {k: ROW[k] for k in ("code", "test_list")}], "test": [ROW | {"task_id": 2}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    problems = load_problems("mbpp-sanitized")
    assert [(p.task_id, p.setup, p.source) for p in problems] == [
        ("2", "", "mbpp-sanitized"),
        ("12", "import math", "mbpp-sanitized"),
    ]

    def offline(*_):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadInput, match="give a local copy: --problems"):
        load_problems("mbpp")


# rows with more inputs

EVAL_PLUS = {
    "task_id": "HumanEval/0",
    "prompt": "def near(numbers, t):\n    ' close? '\n",
    "canonical_solution": "    return any(abs(a - b) < t for i, a in enumerate(numbers) for b in numbers[:i])\n",
    "entry_point": "near",
    "test": """

from math import isclose

unused = 1

def is_float(x) -> bool:
    return isinstance(x, float)

def assertion(out, exp, atol):
    if atol == 0 and is_float(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert isclose(out, exp, rel_tol=1e-07, abs_tol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

def check(candidate):
    inputs = [[[1.0, 2.0], 0.5], [[1.0, 1.1], 0.5]]
    results = [False, True]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
""",
}


PLUS_TEST = """import numpy as np
from math import inf

def assertion(out, exp, atol):
    assert out == exp

inputs = [[1], [2], [-5]]
results = [2, 3, -4]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(inc(*inp), exp, 0)
"""
MBPP_PLUS = {
    **{"task_id": 2, "code": "def inc(x):\n    return x + 1\n", "prompt": "Write inc.", "source_file": "x"},
    **{"test_imports": [], "test_list": ["assert inc(1) == 2"], "test": PLUS_TEST},
}
CHECKS = {  # Further forms of HumanEval's test, and how many tests they are
    "named for the function": ("def check(f):\n    assert f(1) == 1\n    assert f(2) == 2\n\ncheck(f)\n", 2),
    "another name": ("def check(fn):\n    assert fn(1) == 1\n", 1),
    "early return": ("def check(candidate):\n    if candidate(0):\n        return\n    assert candidate(1) == 1\n", 1),
    "with what changes a value": (
        "def check(candidate):\n    inputs = []\n    inputs.append(1)\n    for x in inputs:\n        assert candidate(x) == 1\n",
        1,
    ),
    "reference function": (
        "def ref_func(x):\n    return x\n\ndef check(candidate):\n    for x in [1, 2]:\n        assert candidate(x) == ref_func(x)\n",
        1,
    ),
}


def load_rows(folder: Path, *rows: dict) -> list[Problem]:
    (folder / "x.json").write_text(json.dumps(rows))
    return load_problems(str(folder / "x.json"))


def verdicts(problem: Problem, *codes: str) -> list[str]:
    from codetrace.sandbox.pool import GradingJob, grade

    jobs = [GradingJob(code, problem.entry_point, problem.tests, problem.setup) for code in codes]
    return [verdict.verdict for verdict in grade(jobs, workers=1)]


def test_checks_that_call_helpers_are_judged(tmp_path):
    (problem,) = load_rows(tmp_path, EVAL_PLUS)
    (test,) = problem.tests
    assert "def assertion" in test and "def is_float" in test and "isclose" in test and "unused" not in test
    wrong = problem.reference.replace("any(", "not any(")
    assert verdicts(problem, problem.reference, wrong) == ["passed", "failed_assertion"]


@pytest.mark.parametrize("form", CHECKS)
def test_every_form_of_check_is_read(form, tmp_path):
    test, n = CHECKS[form]
    (problem,) = load_rows(tmp_path, EVAL | {"test": test})
    assert len(problem.tests) == n
    for part in problem.tests:
        space = {}
        exec(problem.reference + part, space)
        with pytest.raises(AssertionError):
            exec("def f(x):\n    return [] if x else 0\n" + part, {})


@pytest.mark.parametrize("solution", ["def f(x):\n    return x\n", "import math\n\ndef f(x):\n    return x\n"])
def test_solutions_that_are_whole_functions(solution, tmp_path):
    "As MBPP is in HumanEval's form: the prompt is words, or a head that the solution states again."
    for prompt in ("from typing import List\n\ndef f(x):\n    ", "Return the number itself.", '"""\nReturn it.\n"""\n'):
        (problem,) = load_rows(tmp_path, EVAL | {"prompt": prompt, "canonical_solution": solution})
        exec(problem.reference + problem.tests[0], {})
        assert problem.text == prompt and problem.reference.endswith(solution)


def test_further_inputs_are_graded_and_not_shown(tmp_path):
    (problem,) = load_rows(tmp_path, MBPP_PLUS)
    assert problem.tests == ("assert inc(1) == 2", PLUS_TEST.strip()) and problem.n_shown == 1
    assert "assert inc(1) == 2" in (text := render_problem_prompt(problem).text) and "inputs" not in text
    only_shown = "def inc(x):\n    return 2\n"
    assert verdicts(problem, problem.reference, only_shown) == ["passed", "failed_assertion"]
    assert load_rows(tmp_path, problem.row()) == [problem]


def test_functional_tests_are_read(tmp_path, caplog):
    hidden = packed(json.dumps([{"input": "[5]", "output": "[6]", "testtype": "functional"}]))
    program = LIVE | {
        "question_id": "abc301_a",
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]',
    }
    (problem,) = load_rows(tmp_path, LIVE | {"private_test_cases": hidden}, program)
    assert problem.tests == ("assert Solution().addOne([1, 2]) == [2, 3]", "assert Solution().addOne([5]) == [6]")
    assert problem.shown_tests == problem.tests[:1] and problem.task_id == "2727"
    assert "1 of 2 problems read standard input" in caplog.text and "1 problems come without a solution" in caplog.text
    right = "class Solution:\n    def addOne(self, numbers):\n        return [n + 1 for n in numbers]\n"
    for test in problem.tests:
        exec(right + test, {})


def test_tables_of_any_text_type_and_with_gaps(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [PLAIN | {"test_setup_code": None, "task_id": 1.0}, EVAL | {"task_id": 2.0, "entry_point": "f"}]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    plain = pa.table(columns)
    large = {pa.string(): pa.large_string(), pa.list_(pa.string()): pa.large_list(pa.large_string())}
    schema = pa.schema([field.with_type(large.get(field.type, field.type)) for field in plain.schema])
    coded = plain.set_column(1, "text", plain["text"].dictionary_encode())
    for table in (plain, plain.cast(schema), coded):
        pq.write_table(table, tmp_path / "x.parquet")
        assert [p.task_id for p in load_problems(str(tmp_path / "x.parquet"))] == ["1", "2"]
    lines = [
        json.dumps({name: float("nan") if value is None else value for name, value in row.items()}) for row in rows
    ]
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\n\ufeff".join(lines), encoding="utf-8-sig")
    assert [p.task_id for p in load_problems(str(tmp_path / "x.jsonl"))] == ["1", "2"]
