"What a model writes, and what of it is its answer: every kind of completion that a right program can hide in."

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codetrace.models.smollm2 import smollm2_folder
from codetrace.models.tokenizer import load_tokenizer
from codetrace.tasks.extraction import extract_code, is_answer_complete
from codetrace.tasks.problem_prompts import Prompt, render_chat_turn, render_problem_prompt
from codetrace.tasks.problems import load_problems

F = "```"
PLAIN = Prompt("q")
OPENED = Prompt("…```python\n", fenced=True)
OPENED_WITH_STOP = Prompt("…```python\n", ("\n```",), "", True)
THINKING = Prompt("<assistant>\n<think>\n")
HEAD = "from math import floor\n\ndef half(x):\n    return x / 2\n\n"
CONTINUED = Prompt("…", prefix=HEAD + "def f(x):\n    'Half of x, rounded down.'\n")
COMPLETION = Prompt(CONTINUED.prefix, ("\ndef", "\nprint"), CONTINUED.prefix, True)
ADD = "def f(x):\n    return x + 1\n"
DOCSTRING = f"def f(x):\n    '''Add one.\n\n    {F}\n    f(1)\n    {F}\n    '''\n    return x + 1\n"
AT_MARGIN = f"def f(x):\n    '''Add one.\n{F}python\nf(1)\n{F}\n'''\n    return x + 1\n"
ADDS = "assert f(1) == 2"

KINDS = {  # A completion that holds a right program, its prompt, and a test
    # fences
    "plain": (ADD, PLAIN, ADDS),
    "in a fence": (f"Sure:\n\n{F}python\n{ADD}{F}\nThat is all.", PLAIN, ADDS),
    "fence without a language": (f"Sure:\n{F}\n{ADD}{F}\n", PLAIN, ADDS),
    "tildes": (f"Sure:\n~~~python\n{ADD}~~~\n", PLAIN, ADDS),
    "fence after words": (f"Sure! {F}python\n{ADD}{F}\n", PLAIN, ADDS),
    "fence after code": (f"{F}python\ndef f(x):\n    return x + 1{F}\nThat is all.", PLAIN, ADDS),
    "never closed": (f"Sure:\n{F}python\n{ADD}", PLAIN, ADDS),
    "never opened": (f"{ADD}{F}\nThis adds one.\n{F}python\nf(2)\n{F}\n", PLAIN, ADDS),
    "indented in a list": (f"1. So:\n   {F}python\n   def f(x):\n       return x + 1\n   {F}\n2. Done.\n", PLAIN, ADDS),
    "fence in a docstring": (f"Here:\n{F}python\n{DOCSTRING}{F}\n", PLAIN, ADDS),
    "fence in a docstring, unfenced": (DOCSTRING, PLAIN, ADDS),
    "fence in a docstring, opened": (f"{DOCSTRING}{F}\nSo.", OPENED, ADDS),
    "fence in a docstring, opened with a stop": (f"{AT_MARGIN}{F}\nSo.", OPENED_WITH_STOP, ADDS),
    "fence in a docstring at the margin": (f"{F}python\n{AT_MARGIN}{F}\n", PLAIN, ADDS),
    "fence in a string": (
        f"{F}python\nFENCE = '''\n{F}\n'''\n\ndef f(x):\n    return FENCE.strip() + x\n{F}\n",
        PLAIN,
        f"assert f('a') == '{F}a'",
    ),
    "fence in a string after it": (
        f"{F}python\ndef f(x):\n    return MARK + x\n\nMARK = '''\n{F}'''\n{F}\n",
        PLAIN,
        f"assert f('a') == '\\n{F}a'",
    ),
    "opened again": (f"{F}python\n{ADD}{F}\nThis adds one.", OPENED, ADDS),
    "opened again, with a stop": (f"\n{F}python\n{ADD}{F}\nThis adds one.", OPENED_WITH_STOP, ADDS),
    "opened again without a language": (f"{F}\n{ADD}{F}\nThis adds one.", OPENED, ADDS),
    "opened again after words": (f"Here is the code:\n{F}python\n{ADD}{F}\nThis adds one.", OPENED, ADDS),
    "opened again after a comment": (f"# the function\n{F}python\n{ADD}{F}\n", OPENED, ADDS),
    "opened inside an open one": (f"{F}\nA draft:\n{F}python\n{ADD}{F}\n{F}\n", PLAIN, ADDS),
    "in a longer fence": (f"{F}`markdown\nThe function:\n{F}python\n{ADD}{F}\n{F}`\n", PLAIN, ADDS),
    "after an example in a fence": (f"Run it so:\n{F}bash\npython f.py\n{F}\n{F}python\n{ADD}{F}\n", PLAIN, ADDS),
    # thoughts
    "draft in thoughts": (
        f"<think>\nMaybe\n{F}python\ndef f(x):\n    return x\n{F}\nNo.\n</think>\n\n{F}python\n{ADD}{F}\n",
        PLAIN,
        ADDS,
    ),
    "draft in thoughts, unfenced": (f"<think>\ndef f(x):\n    return x\n\nprint(f(1))\n</think>\n{ADD}", PLAIN, ADDS),
    "thoughts the prompt opened": (f"Maybe\n{F}python\ndef f(x):\n    return x\n{F}\n</think>\n{ADD}", THINKING, ADDS),
    "only the end of thoughts": (f"Maybe\n\ndef f(x):\n    return x\n\nNo.</think>\n\n{ADD}", PLAIN, ADDS),
    "thinking": (f"<thinking>\ndef f(x):\n    return x\n</thinking>\n{ADD}", PLAIN, ADDS),
    "empty thoughts": (f"<think>\n\n</think>\n\n{F}python\n{ADD}{F}", PLAIN, ADDS),
    "tag in a string": (
        "def f(x):\n    return '<think>' + x + '</think>'\n",
        PLAIN,
        "assert f('a') == '<think>a</think>'",
    ),
    # what follows the function
    "attribute after": ("def f(n):\n    f.calls += n\n    return f.calls\n\nf.calls = 0\n", PLAIN, "assert f(1) == 1"),
    "item after": ("def f(n):\n    return memo[n]\n\nmemo = {}\nmemo[0] = 1\n", PLAIN, "assert f(0) == 1"),
    "item after, memo before": (
        "memo = {}\n\ndef f(n):\n    return memo[n]\n\nmemo[0] = 1\n",
        PLAIN,
        "assert f(0) == 1",
    ),
    "update after": (
        "memo = {}\ndef f(n):\n    return memo[n]\nmemo.update({\n  0: 1,\n})\n",
        PLAIN,
        "assert f(0) == 1",
    ),
    "table filled after": (
        "def f(n):\n    return table[n]\n\ntable = []\nfor i in range(5):\n    table.append(i * i)\n\nprint(f(2))\n",
        PLAIN,
        "assert f(4) == 16",
    ),
    "table filled by a function": (
        "def f(n):\n    return table[n]\n\ntable = [0] * 9\n\ndef fill():\n    for i in range(9):\n        table[i] = 2 * i\n\nfill()\n",
        PLAIN,
        "assert f(4) == 8",
    ),
    "global set by a function": (
        "def f(n):\n    return n + K\n\ndef start():\n    global K\n    K = 1\n\nstart()\nprint(f(1))\n",
        PLAIN,
        ADDS,
    ),
    "decorated after": (
        "from functools import cache\ndef f(x):\n    return x + 1\n\nf = cache(f)\n",
        PLAIN,
        "f.cache_info()",
    ),
    "augmented after": ("K = 1\ndef f(x):\n    return x + K\nK += 1\nprint(f(0))", PLAIN, "assert f(1) == 3"),
    "setting after": (
        "import sys\ndef f(n):\n    return n and 1 + f(n - 1)\n\nsys.setrecursionlimit(5000)\n",
        PLAIN,
        "assert f(2000) == 2000",
    ),
    "import in a try after": (
        "def f(x):\n    return sqrt(x)\n\ntry:\n    from math import sqrt\nexcept ImportError:\n    sqrt = None\n",
        PLAIN,
        "assert f(4) == 2",
    ),
    "star import after": ("def f(x):\n    return floor(x)\n\nfrom math import *\n", PLAIN, "assert f(1.5) == 1"),
    "tests that need what is not here": (
        f"{ADD}\nimport no_such_module\n\n@no_such_module.mark\ndef test_f():\n    pass\n",
        PLAIN,
        ADDS,
    ),
    "wrong test after": (f"{ADD}\nassert f(1) == 3\n", PLAIN, ADDS),
    "program after": (f"{ADD}\ndef main():\n    print(f(int(input())))\n\nmain()\n", PLAIN, ADDS),
    "guarded program after": (f"{ADD}\nif __name__ == '__main__':\n    print(f(int(input())))\n", PLAIN, ADDS),
    "loop of tests after": (f"{ADD}\nfor x, y in [(1, 3)]:\n    assert f(x) == y\n", PLAIN, ADDS),
    "exit after": (f"import sys\n\n{ADD}\nprint(f(1))\nsys.exit(1)\n", PLAIN, ADDS),
    "exit after, module needed": (
        "import sys\ndef f(x):\n    return x + len(sys.argv[:1])\nsys.exit(1)\n",
        PLAIN,
        ADDS,
    ),
    "another task": (f"{ADD}\nWrite a function g.\n\ndef g(x:\n", PLAIN, ADDS),
    "code of another language": (f"{ADD}{F}\n{F}javascript\nfunction f(x) {{ return x }}\n{F}\n", PLAIN, ADDS),
    # what precedes it
    "prose that parses": (f"Language: Python\n\n{ADD}", PLAIN, ADDS),
    "bare word": (f"Solution\n\n{ADD}", PLAIN, ADDS),
    "assignment in words": (f"Complexity = O(n)\n\n{ADD}", PLAIN, ADDS),
    "annotation with a call": (f"Time: O(n)\n{ADD}", PLAIN, ADDS),
    "comparison in words": (f"here is code\n{ADD}", PLAIN, ADDS),
    "word of control": (f"continue\n{ADD}", PLAIN, ADDS),
    "return in words": (f"return x\n\n{ADD}", PLAIN, ADDS),
    "words that look like code": (f"import the module first\nx = the value, see below\n{ADD}", PLAIN, ADDS),
    "words in a block": (f"{F}python\nSolution:\n{ADD}{F}\n", PLAIN, ADDS),
    "session before": (f">>> f(1)\n2\n\n{ADD}", PLAIN, ADDS),
    "quotation": (f'"Add one"\n{ADD}', PLAIN, ADDS),
    "print before": (f"print(f(1))\n{ADD}", PLAIN, ADDS),
    "constants before": ("K = 1\nL: int = K\n\ndef f(x):\n    return x + L\n", PLAIN, ADDS),
    "loop before": ("T = []\nfor i in range(3):\n    T.append(i + 1)\n\ndef f(x):\n    return T[x]\n", PLAIN, ADDS),
    "setting before": ("import sys\nsys.setrecursionlimit(5000)\n" + ADD, PLAIN, ADDS),
    "space before": (" def f(x):\n    return x + 1\n", PLAIN, ADDS),
    "indented as in Markdown": (
        "Here it is:\n\n    import math\n\n    def f(x):\n        return math.ceil(x) + 1\n\nDone.",
        PLAIN,
        ADDS,
    ),
    "Windows lines": (ADD.replace("\n", "\r\n"), PLAIN, ADDS),
    # elsewhere
    "helper in an earlier block": (
        f"{F}python\ndef even(n):\n    return n % 2 == 0\n{F}\nthen\n{F}python\ndef f(a):\n    return [x for x in a if even(x)]\n{F}\n",
        PLAIN,
        "assert f([1, 2]) == [2]",
    ),
    "import in an earlier block": (
        f"First:\n{F}python\nimport math\nfrom typing import List\n{F}\nthen\n{F}python\ndef f(a: List[int]):\n    return math.prod(a)\n{F}\n",
        PLAIN,
        "assert f([2, 3]) == 6",
    ),
    "star import in an earlier block": (
        f"{F}python\nfrom math import *\n{F}\n{F}python\ndef f(x):\n    return floor(x)\n{F}\n",
        PLAIN,
        "assert f(1.5) == 1",
    ),
    "helper's helper in earlier blocks": (
        f"{F}python\nK = 1\n{F}\n{F}python\ndef g(x):\n    return x + K\n\nprint(g(1))\n{F}\n{F}python\ndef f(x):\n    return g(x)\n{F}\n",
        PLAIN,
        ADDS,
    ),
    "class in an earlier block": (
        f"{F}python\nclass Node:\n    value = 1\n{F}\n{F}python\ndef f(x):\n    return x + Node().value\n{F}\n",
        PLAIN,
        ADDS,
    ),
    "helper in a later block": (
        f"{F}python\ndef f(x):\n    return g(x)\n{F}\nwhere\n{F}python\ndef g(x):\n    return x + 1\n{F}\n",
        PLAIN,
        ADDS,
    ),
    "helper after a print": ("def f(x):\n    return g(x)\n\nprint('ok')\n\ndef g(x):\n    return x + 1\n", PLAIN, ADDS),
    "import after a call": (
        "def f(x):\n    return math.floor(x)\n\nf(1.5)\nimport math\n",
        PLAIN,
        "assert f(1.5) == 1",
    ),
    "helper after words": (
        "def f(x):\n    return g(x)\n\nThe helper:\n\ndef g(x):\n    return x + K\n\nK = 1\n",
        PLAIN,
        ADDS,
    ),
    "signature first": (f"{F}python\ndef f(x):\n    ...\n{F}\nFilled in:\n{F}python\n{ADD}{F}\n", PLAIN, ADDS),
    "signature and docstring first": (
        f"def f(x):\n    '''Add one.'''\n    pass\n\nNow the body:\n\n{ADD}",
        PLAIN,
        ADDS,
    ),
    "broken attempt first": (f"{F}python\ndef f(x):\n    retur x +\n{F}\nSorry:\n{F}python\n{ADD}{F}\n", PLAIN, ADDS),
    "class as the answer": (
        "class f:\n    def __init__(self, x):\n        self.y = x + K\n\nK = 1\nprint(f(1).y)\n",
        PLAIN,
        "assert f(1).y == 2",
    ),
    "lambda as the answer": ("f = lambda x: x + K\nK = 1\nprint(f(1))", PLAIN, ADDS),
    # after a prompt that begins the code
    "body": ("    return floor(half(x))\n", CONTINUED, "assert f(3) == 1"),
    "body in a fence": (f"Sure:\n{F}python\n    return floor(half(x))\n{F}\n", CONTINUED, "assert f(3) == 1"),
    "body before a fence": (
        f"    return floor(half(x))\n{F}\nIt is halved:\n{F}\nhalf(3)\n{F}\n",
        CONTINUED,
        "assert f(3) == 1",
    ),
    "whole function, its prompt's helpers": (
        f"{F}python\ndef f(x):\n    return floor(half(x))\n{F}\n",
        CONTINUED,
        "assert f(3) == 1",
    ),
    "body to a stop": ("    return floor(half(x))\n\ndef other():\n    pass\n", COMPLETION, "assert f(3) == 1"),
    "body in an opened fence": (f"    return floor(half(x))\n{F}\nSo.", COMPLETION, "assert f(3) == 1"),
}


def runs(code: str, test: str) -> None:
    space = {"__name__": "answer"}
    exec(code, space)
    exec(test, space)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_program_is_found(kind):
    completion, prompt, test = KINDS[kind]
    runs(extract_code(completion, prompt, "f"), test)


@pytest.mark.parametrize("kind", KINDS)
def test_what_counts_stays_once_an_answer_is_complete(kind):
    completion, prompt, _ = KINDS[kind]
    if kind in ("only the end of thoughts",):  # the prompt does not tell that the completion begins with thoughts
        return
    whole = extract_code(completion, prompt, "f")
    complete = False
    for end in range(len(completion) + 1):
        now = is_answer_complete(completion[:end], prompt, "f")
        assert now or not complete, completion[:end]
        if now and not complete:
            assert extract_code(completion[:end], prompt, "f") == whole, completion[:end]
        complete = now


WRONG = {  # A completion that is no right program, and stays none
    "draft in thoughts alone": f"<think>\n{F}python\n{ADD}{F}\n",
    "only a test": "assert f(1) == 2\nprint(f(1))\n",
    "broken": "def f(x):\n    return x +\n",
    "another function": "def g(x):\n    return x + 1\n",
    "helper is missing": "def f(x):\n    return g(x)\n",
    "module is missing": "def f(x):\n    return math.floor(x)\n",
    "method": "class A:\n    def f(self, x):\n        return x + 1\n",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_right_program_stays_none(kind):
    assert not is_answer_complete(WRONG[kind], PLAIN, "f")
    with pytest.raises((SyntaxError, NameError)):
        runs(extract_code(WRONG[kind], PLAIN, "f"), ADDS)


PIECES = [
    "def f(x):\n",
    "    return x\n",
    "    '''\n",
    "'''",
    f"{F}\n",
    f"{F}python\n",
    "   ",
    "g(x)\n",
    "m[0] = 1\n",
    "@g\n",
]
PIECES += [
    "def g(x): return h(x)\n",
    "import h\n",
    "print(f(1))\n",
    "words here\n",
    "(\n",
    "]\n",
    "<think>\n",
    "</think>\n",
    "\n",
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans())
def test_any_answer_stays_once_it_is_complete(pieces, fenced):
    prompt = Prompt("", fenced=fenced)
    text = ""
    complete = None
    for piece in pieces:
        text += piece
        if complete is not None:
            assert is_answer_complete(text, prompt, "f") and extract_code(text, prompt, "f") == complete
        elif is_answer_complete(text, prompt, "f"):
            complete = extract_code(text, prompt, "f")


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking", None])
def test_thinking_is_switched_off_where_the_template_has_a_switch(switch):
    tokenizer = load_tokenizer(smollm2_folder("tokenizer"))
    closed = "{% if " + str(switch) + " is defined and not " + str(switch) + " %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>" + closed * bool(
        switch
    )
    text = render_chat_turn(tokenizer, "Hello")
    assert text == "<user>Hello<assistant>" + ("<think>\n\n</think>\n\n" if switch else "")


def test_an_answer_that_begins_as_code_has_no_thoughts():
    tokenizer = load_tokenizer(smollm2_folder("tokenizer"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<assistant><think>"
    problem = load_problems("basics", 1)[0]
    assert render_problem_prompt(problem, "chat", tokenizer).text.endswith("<assistant><think>")
    assert render_problem_prompt(problem, "chat_code", tokenizer).text.endswith(
        "<assistant><think></think>\n\n```python\n"
    )


LONG = ["'''\n" * 501, "f(\n" * 2000, "word word\n" * 5000, f"{F}\n" * 300, "def f(x):\n    '''\n" + "word\n" * 2000]


@pytest.mark.parametrize("text", LONG, ids=["quotes", "brackets", "words", "fences", "docstring"])
def test_long_texts_are_read_in_time(text):
    begin = time.process_time()
    extract_code(text, PLAIN, "f")
    assert time.process_time() - begin < 5
