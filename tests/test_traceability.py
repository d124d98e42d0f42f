"Every generator under every tokenizer: pairs that can be traced, ways of asking that fit, and what is said where nothing is left."

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from codetrace import models
from codetrace.core.errors import BadInput
from codetrace.models.gguf_header import check_gguf_file
from codetrace.models.gguf_models import write_gguf_tokenizer
from codetrace.models.lm import LM
from codetrace.models.tokenizer import load_tokenizer
from codetrace.patching import cases as patching_cases
from codetrace.patching.alignment import CannotTrace, RoleSharesToken, one_token_answer, token_roles
from codetrace.patching.cases import (
    CUT_ROLE,
    EXCLUSION_REASONS,
    NO_COUNTERFACTUAL,
    NOT_ALIGNED,
    SEVERAL_TOKENS,
    CaseOptions,
    ProgramShapes,
    _draw_fitting,
    check_enough_cases,
    choose_query_style,
    draw_cases,
    traceability_table,
    with_query_style,
)
from codetrace.phases.tracking import (
    ExperimentRunner,
    answer_questions,
    choose_scoring,
    draw_questions,
    quick_experiment,
)
from codetrace.planted.tokenizer_kinds import TOKENIZER_KINDS, tokenizer_of_kind
from codetrace.tasks.counterfactuals import NoCounterfactual, make_counterfactual_pair
from codetrace.tasks.generators import GENERATORS, make_variable_binding_program
from codetrace.tasks.heuristics import resists_shallow_heuristics
from codetrace.tasks.program_drawing import ENTITY_NAMES
from codetrace.tasks.programs import QUERY_STYLES, as_program

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def llama():
    return models.load("tiny:llama")


def of_kind(lm, kind) -> LM:
    return LM(kind, lm.hf, tokenizer_of_kind(kind))


def joining(lm, tokens) -> LM:
    "A model with a tokenizer like SmolLM2's that knows further tokens."
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tokenizer_of_kind("SmolLM2"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return LM("other", lm.hf, tokenizer, "x")


@pytest.fixture(scope="module")
def cuts_print(llama):
    "`t(x` of `print(x)` is one token."
    return joining(llama, [f"t({letter}" for letter in LETTERS])


@pytest.fixture(scope="module")
def cuts_hash(llama):
    "`x:3` of `#x:3` is one token."
    return joining(llama, [f"{letter}:{digit}" for letter in LETTERS for digit in range(10)])


# --- the table


@pytest.mark.parametrize(
    ("seq_len", "n"), [(4, 2), pytest.param(3, 40, marks=pytest.mark.slow), pytest.param(7, 40, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", [*TOKENIZER_KINDS, None])
def test_every_generator_can_be_traced_whatever_the_tokenizer(llama, kind, seq_len, n):
    table = traceability_table([of_kind(llama, kind) if kind else llama], seq_len=seq_len, n=n)
    assert len(table) == len(GENERATORS) * len(QUERY_STYLES)
    assert (table["traceable"] >= 0.95).all(), table[table["traceable"] < 0.95]
    for row in table.to_dict("records"):
        assert NOT_ALIGNED not in row["passed_over"]
        assert row["passed_over"].get(CUT_ROLE, 0) <= n / 4, row  # a name of a thing that joins the colon before it
        if "binding" in row["generator"]:
            assert row["drawn"] == 1


CODE_MODELS = sorted((Path.home() / ".cache" / "coder-model").glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.skipif(not CODE_MODELS, reason="no code model in ~/.cache/coder-model")
def test_every_generator_can_be_traced_with_the_code_models_own_tokenizer(llama, tmp_path):
    write_gguf_tokenizer(check_gguf_file(CODE_MODELS[0]), tmp_path)
    lm = LM("code model", llama.hf, load_tokenizer(tmp_path))
    for seq_len in (3, 6):
        table = traceability_table([lm], seq_len=seq_len, n=40)
        assert (table["traceable"] >= 0.95).all(), table[table["traceable"] < 0.95]


@pytest.mark.parametrize("task", GENERATORS)
@pytest.mark.parametrize("kind", ["Qwen2.5", *(pytest.param(k, marks=pytest.mark.slow) for k in ("GPT-2", "Gemma 3"))])
def test_both_programs_of_a_pair_are_what_they_say(llama, kind, task):
    "By running them, and by the tokenizer alone."
    lm = of_kind(llama, kind)
    answers = set()
    for number, style in enumerate(2 * [*QUERY_STYLES]):
        options = CaseOptions(task, num_shots=1)
        make = partial(GENERATORS[task], query_style=style)
        case, reasons = _draw_fitting(lm, make, 3, np.random.default_rng(number), options)
        assert set(reasons) <= {SEVERAL_TOKENS, NO_COUNTERFACTUAL, CUT_ROLE}
        assert resists_shallow_heuristics(case.program)
        rows = []
        for program in case.pair:
            variables = {}
            exec(program.source, variables)
            assert str(variables[program.query]) == program.answer
            whole = lm.tokenizer(case.prefix + program.code + program.answer)["input_ids"]
            rows.append(whole)
            assert lm.tokenizer.decode(whole[-1:]).strip(" :▁") == program.answer
        differing = [i for i, (a, b) in enumerate(zip(*rows, strict=True)) if a != b]
        assert len(differing) == 2 and differing[1] == len(rows[0]) - 1
        roles = token_roles(lm, case.program, case.prefix + case.program.code).set_index("position_name")
        assert roles["position"]["rhs 1"] == differing[0]
        answers |= {program.answer for program in case.pair}
    assert len(answers) > 1


@pytest.mark.parametrize(
    ("root", "replacements"),
    [
        ("True", {"False"}),
        ("False", {"True"}),
        ('"ball"', {f'"{name}"' for name in ENTITY_NAMES} - {'"ball"'}),
        ("12 // 4", {f"12 // {divisor}" for divisor in (2, 3, 5, 6, 7, 8, 9)}),
        ("6", set("012345789")),
    ],
)
def test_a_root_is_replaced_by_its_like(root, replacements):
    program = as_program((f"a = {root}\n#a:", eval(root)))
    roots = set()
    for seed in range(40):
        counterfactual = make_counterfactual_pair(program, np.random.default_rng(seed))[1]
        roots.add(counterfactual.lines[0].removeprefix("a = "))
    assert roots <= replacements and len(roots) > len(replacements) / 2


@pytest.mark.parametrize("root", ["12", "None", "[1, 2]", "-3.5", "'two words'", "len('ab')"])
def test_a_root_without_a_constant_to_replace_is_refused(root):
    with pytest.raises(NoCounterfactual, match="no digit, truth value or word"):
        make_counterfactual_pair(as_program((f"a = {root}\n#a:", eval(root))), np.random.default_rng(0))


@pytest.mark.parametrize("task", GENERATORS)
def test_a_default_trace_finds_programs_of_every_generator(llama, monkeypatch, task):
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    cases, reasons = draw_cases(llama, 2, ProgramShapes((3,), ()), CaseOptions(task))
    assert len(cases) == 2 == reasons.count("") and cases[0].program != cases[1].program
    assert set(reasons) <= {"", *EXCLUSION_REASONS}
    for case in cases:
        assert all(map(resists_shallow_heuristics, case.pair))
        assert case.program.metadata["query_style"] == "print"


def test_what_is_passed_over_is_counted(llama, monkeypatch):
    "Of a loop of four turns, most answers are two digits; the solved examples are of one token as well."
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    options = CaseOptions("range", num_shots=2, include_shallow=True)
    (case,), reasons = draw_cases(llama, 1, ProgramShapes((4,), (), "hash"), options)
    assert reasons.count(SEVERAL_TOKENS) == len(reasons) - 1 > 3 and not reasons[-1]
    solved = case.prefix.strip().split("\n\n")
    assert len(solved) == 2
    for example in solved:
        assert len(example.rpartition(":")[2]) == 1


# --- roles


def test_the_root_of_a_word_is_the_word_and_not_its_quote(llama):
    program = as_program(('box_a = "ring"\nbox_b = None\nbox_b, box_a = box_a, None\nprint(box_b)  # prints ', "ring"))
    tokens = token_roles(llama, program).set_index("position_name")["token"]
    assert tokens["rhs 1"] == "ring" and tokens["lhs 2"].endswith("b") and tokens["rhs 2"].endswith("a")


def test_a_colon_that_joins_the_answer_is_left_to_the_model(llama):
    lm = joining(llama, [":True", ":False"])
    program = as_program(("a = True\nb = not a\nc = not b\n#c:", "True"))
    prompt, answer = one_token_answer(lm, program.code, program)
    assert prompt == program.code[:-1] and lm.tokenizer.decode([answer]) == ":True"
    pair = make_counterfactual_pair(program, np.random.default_rng(0), lm.tokenizer)
    assert pair[1].lines[0] == "a = False"
    assert token_roles(lm, program, prompt)["position_name"].iloc[-1] == "final"
    half = joining(llama, [":True"])  # the two prompts would end differently
    with pytest.raises(BadInput, match="exactly one token"):
        make_counterfactual_pair(program, np.random.default_rng(0), half.tokenizer)


def test_a_query_that_joins_the_answer_is_refused(cuts_hash):
    program = as_program(("a = 3\n#a:", "3"))
    with pytest.raises(RoleSharesToken, match="joins the end of the prompt"):
        one_token_answer(cuts_hash, program.code, program)


def test_an_answer_whose_colon_was_left_to_the_model_is_marked_right(llama, monkeypatch):
    lm = joining(llama, [":True", ":False"])
    monkeypatch.setattr(LM, "generate", lambda self, prompts, **options: [":True\n"] * len(prompts))
    words = dict(program_generator="boolean", models=["other"], num_seqs=8, query_style="hash")
    config = quick_experiment("x", scoring="decode", **words)
    assert choose_scoring(quick_experiment("x", **words), {"other": lm.tokenizer}, draw_questions(config)) == "token"
    rows = answer_questions(lm, config, draw_questions(config))
    assert not any(row["prompt"].endswith(":") for row in rows)
    assert [row["correct"] for row in rows] == [row["answer"] == "True" for row in rows]
    assert 0 < sum(row["correct"] for row in rows) < 16


# --- how a program asks


def test_the_first_way_that_fits_is_taken(llama, cuts_print, cuts_hash):
    for lm, style in [(llama, "print"), (cuts_hash, "print"), (cuts_print, "hash")]:
        shapes = with_query_style(lm, ProgramShapes(), CaseOptions())
        assert shapes.query_style == style == choose_query_style(lm, make_variable_binding_program, 5)
    explicit = ProgramShapes(query_style="print")
    assert with_query_style(cuts_print, explicit, CaseOptions()) is explicit


def test_drawn_cases_ask_as_the_tokenizer_needs(cuts_print, monkeypatch):
    monkeypatch.setattr(patching_cases, "_answers_correctly", lambda lm, asked: [True] * len(asked))
    cases, reasons = draw_cases(cuts_print, 2)
    assert [case.program.lines[-1][0] for case in cases] == ["#", "#"] and CUT_ROLE not in reasons


def test_an_experiment_asks_all_its_models_in_the_way_that_fits_each(llama, cuts_hash):
    runner = ExperimentRunner()
    runner.loaded |= {"tiny:llama": llama, "other": cuts_hash}
    ways = [(["tiny:llama"], "auto", "hash"), (["tiny:llama", "other"], "auto", "print"), (["other"], "hash", "hash")]
    for models_asked, asked, expected in ways:
        config = quick_experiment("x", models=models_asked, num_seqs=1, seq_lens=[3], query_style=asked)
        (fitted,) = runner._fit_to_tokenizers([config], False)
        assert fitted.program_generator.keywords == {"query_style": expected}
        assert {question["program"].metadata["query_style"] for question in draw_questions(fitted)} == {expected}
        assert fitted.scoring == ("decode" if models_asked == ["other"] else "token")


def test_without_a_tokenizer_an_experiment_asks_as_it_always_did():
    config, explicit = (
        quick_experiment("x", models=["m"], num_seqs=3, **words) for words in ({}, {"query_style": "hash"})
    )
    assert [q["prompt"] for q in draw_questions(config)] == [q["prompt"] for q in draw_questions(explicit)]


# --- where nothing is left


def test_what_is_said_where_no_program_is_left_counts_reasons_and_says_what_to_type(llama, cuts_print, monkeypatch):
    monkeypatch.setattr(patching_cases, "_DRAWS_PER_CANDIDATE", 3)
    cases, reasons = draw_cases(llama, 2, ProgramShapes((12,), (), "print"), CaseOptions("range"))
    assert cases == [] and set(reasons) == {SEVERAL_TOKENS} and len(reasons) == 24  # eight streams, and no more
    with pytest.raises(CannotTrace, match=r"none of 24 programs .*: 24 answer of several tokens \(.*seq_lens"):
        check_enough_cases(llama, cases, reasons)
    cases, reasons = draw_cases(cuts_print, 1, ProgramShapes(query_style="print"))
    assert cases == [] and set(reasons) == {CUT_ROLE}
    with pytest.raises(CannotTrace, match=r"40 role cut by a token \(.*query_style=hash or query_style=print"):
        check_enough_cases(cuts_print, cases, reasons)
