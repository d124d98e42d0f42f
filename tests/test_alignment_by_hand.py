"Which token plays which role, with tokens cut by hand; what a patch does, from three logits."

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace import models
from codetrace.patching.alignment import (
    CELL_COLUMNS,
    PATCH_METRICS,
    AlignedPair,
    CannotTrace,
    Misaligned,
    RoleSharesToken,
    TraceCase,
    _chain_names,
    _is_redirected,
    _pair_names,
    _role_spans,
    _span_token,
    _token_lines,
    _token_names,
    align_pair,
    cell_rows,
    measure_patch,
    named_positions,
    one_token_answer,
    pair_positions,
    program_start,
    token_roles,
)
from codetrace.tasks.programs import ChainLink, Program, as_program

PREFIX = "k = 5\nprint(k)  # prints 5\n\n"
PROGRAM = as_program(("a = 1\nz = 8\nb = 2\nc = a + b\nprint(c)  # prints ", "3"))
COUNTERFACTUAL = as_program(("a = 1\nz = 8\nb = 4\nc = a + b\nprint(c)  # prints ", "5"))
REFERENCE = as_program(("k = 4\nm = 7\nx = k\nb = x\n#b:", "4"))
REDIRECTED = as_program(("k = 4\nm = 7\nx = m\nb = x\n#b:", "7"))


@pytest.fixture(scope="module")
def lm():
    return models.load("tiny:llama")


def characters(text: str) -> list[tuple[int, int]]:
    "A token for each character."
    return [(i, i + 1) for i in range(len(text))]


def linked(code: str, *links: tuple[int, int]) -> Program:
    "A program of which only the code and the chain are of interest: lines and depths."
    span = (0, 1)
    chain = tuple(ChainLink(line, "x", depth, span, span) for line, depth in links)
    return Program(code, "x", "1", chain, (), (), (0, 1))


def test_links_of_one_depth_have_letters():
    program = linked("x\n" * 6, (0, 1), (1, 1), (2, 2), (3, 1), (4, 2), (5, 3))
    assert [name for _, name in _chain_names(program)] == ["1", "1b", "2", "1c", "2b", "3"]
    assert [link for link, _ in _chain_names(program)] == list(program.chain)


def test_roles_and_where_they_stand():
    spans = [("rhs 1", (4, 5)), ("lhs 1", (0, 1)), ("rhs 1b", (16, 17)), ("lhs 1b", (12, 13))]
    spans += [("rhs 2", (22, 27)), ("lhs 2", (18, 19)), ("end 1", (5, 6)), ("end other", (11, 12))]
    spans += [("end 1b", (17, 18)), ("end 2", (27, 28))]
    assert list(_role_spans(PROGRAM, False)) == spans
    assert list(_role_spans(PROGRAM, True)) == [("query", (34, 35)), *spans]


def test_a_line_with_two_links_ends_the_first():
    names = [name for name, _ in _role_spans(linked("ab\nc\n", (0, 1), (0, 2)), False)]
    assert names == ["rhs 1", "lhs 1", "rhs 2", "lhs 2", "end 1", "end other"]


def test_a_span_is_its_last_token():
    text = "ab = cd"
    assert _span_token((5, 7), text, characters(text), "rhs 1") == 6
    assert _span_token((0, 2), text, [(0, 0), (0, 2), (2, 4), (4, 7)], "lhs 1") == 1
    assert _span_token((5, 7), text, [(0, 2), (2, 4), (4, 7)], "rhs 1") == 2  # A space before it is no matter
    assert _span_token((0, 2), text, [(0, 3), (3, 7)], "lhs 1") == 0  # nor one after it
    assert _span_token((4, 5), text, [(0, 2), (2, 6), (6, 7)], "end 1") == 1  # nor anything at the end of a line


SHARED = {
    "no token covers rhs 1 ('cd')": ((5, 7), [(0, 2), (2, 5)]),
    "lhs 1 ('b') is part of the token 'ab'": ((1, 2), [(0, 2), (2, 5), (5, 7)]),
    "rhs 1 ('c') is part of the token ' cd'": ((5, 6), [(0, 2), (2, 4), (4, 7)]),
    "query ('d') is part of the token 'cd'": ((6, 7), [(0, 2), (2, 5), (5, 7)]),
    "rhs 2 (' c') is part of the token 'cd'": ((4, 6), [(0, 2), (2, 5), (5, 7)]),
    "rhs 3 ('= c') is part of the token 'c'": ((3, 6), [(0, 2), (1, 4), (4, 5), (5, 6)]),
}


@pytest.mark.parametrize("message", SHARED)
def test_a_span_that_shares_its_token_is_refused(message):
    span, offsets = SHARED[message]
    with pytest.raises(RoleSharesToken) as refusal:
        _span_token(span, "ab = cd", offsets, message.partition(" (")[0].removeprefix("no token covers "))
    advice = ": this tokenizer cannot be traced there; try another query style"
    assert str(refusal.value) == message + ("" if message.startswith("no") else advice)


def test_a_program_begins_where_it_stands_last():
    code = PROGRAM.code
    assert program_start(PROGRAM, code) == (0, True)
    assert program_start(PROGRAM, code + "\n" + code) == (len(code) + 1, True)
    assert program_start(PROGRAM, "# " + code.rstrip(" ")) == (2, True)
    assert program_start(PROGRAM, "In words:\n" + PROGRAM.source + "\nWhat is c?") == (10, False)
    with pytest.raises(CannotTrace) as refusal:
        program_start(PROGRAM, "-" * 99)
    assert str(refusal.value) == f"the program {code!r} does not stand in its prompt, which ends in {'-' * 60!r}"


def test_names_of_tokens_that_are_characters():
    "What is named first keeps its token; the last token of the prompt is final."
    program = as_program(("k = 2\nj = k\nprint(j)", "2"))
    prompt = "\n" + program.code
    names = _token_names(program, prompt, characters(prompt))
    expected = {1: "lhs 1", 5: "rhs 1", 6: "end 1", 7: "lhs 2", 11: "rhs 2", 12: "end 2", 19: "query", 20: "final"}
    assert names == [expected.get(i, "") for i in range(21)]


def test_a_token_of_two_roles_has_the_first():
    "A token that holds a value and the end of its line is the value; the last one is final, whatever else it is."
    program = as_program(("k = 2\n#k:", "2"))
    offsets = [(0, 1), (1, 4), (4, 6), (6, 7), (7, 8), (8, 9)]
    assert _token_names(program, program.code, offsets) == ["lhs 1", "", "rhs 1", "", "query", "final"]
    assert _token_names(program, program.code, offsets[:5]) == ["lhs 1", "", "rhs 1", "", "final"]


def test_lines_of_tokens_before_in_and_after_a_program():
    prompt = "#\n" + PROGRAM.code
    lines = _token_lines(PROGRAM, prompt, characters(prompt))
    assert lines == [-1, -1, *(PROGRAM.code.count("\n", 0, i) for i in range(len(PROGRAM.code)))]
    asked = "#\n" + PROGRAM.source + "\nc?"
    lines = _token_lines(PROGRAM, asked, characters(asked))
    assert lines == [-1, -1, *(PROGRAM.code.count("\n", 0, i) for i in range(len(PROGRAM.source))), -1, -1, -1]
    joined = [(0, 1), (1, 3), (3, 6)]  # The second token begins before the program and ends in it
    assert _token_lines(PROGRAM, prompt, joined) == [-1, 0, 0]


def test_roles_of_a_prompt(lm):
    table = token_roles(lm, PROGRAM, PREFIX + PROGRAM.code)
    assert list(table) == ["position", "token", "start", "end", "line", "position_name"]
    assert table["position"].tolist() == list(range(len(table)))
    assert table["token"].tolist() == [
        (PREFIX + PROGRAM.code)[start:end] for start, end in zip(table["start"], table["end"])
    ]
    named = table[table["position_name"] != ""].iloc[:5]
    assert named[["token", "start", "end", "line", "position_name"]].to_numpy().tolist() == [
        ["a", 28, 29, 0, "lhs 1"],
        ["1", 32, 33, 0, "rhs 1"],
        ["\n", 33, 34, 0, "end 1"],
        ["\n", 39, 40, 1, "end other"],
        ["b", 40, 41, 2, "lhs 1b"],
    ]
    assert set(table["line"][:16]) == {-1} and table["line"].iloc[-1] == 4
    alone = token_roles(lm, PROGRAM)
    assert alone["position_name"].tolist() == table["position_name"][16:].tolist()


def test_the_changed_position_is_the_first_right_hand_side_that_differs():
    assert TraceCase(REFERENCE, REDIRECTED).changed_position == "rhs 2"
    assert TraceCase(PROGRAM, PROGRAM).changed_position == "rhs 1"
    changed_root = as_program(("k = 5\nm = 7\nx = m\nb = x\n#b:", "7"))
    assert TraceCase(REFERENCE, changed_root).changed_position == "rhs 1"
    assert TraceCase(REFERENCE, REDIRECTED).pair == (REFERENCE, REDIRECTED)
    assert TraceCase(REFERENCE, REDIRECTED).prefix == ""


def test_an_answer_is_one_token_and_may_take_the_space_before_it(lm):
    assert one_token_answer(lm, PROGRAM.code, PROGRAM) == (PROGRAM.code, *lm.tokenizer("3")["input_ids"])
    truth = as_program(("c = True\nprint(c)  # prints ", "True"))
    assert one_token_answer(lm, truth.code, truth) == (truth.code.rstrip(), *lm.tokenizer(" True")["input_ids"])
    with pytest.raises(CannotTrace) as refusal:
        one_token_answer(lm, PROGRAM.code, replace(PROGRAM, answer="34"))
    assert str(refusal.value) == (f"the answer '34' is 2 tokens for {lm.name}: tracing needs answers of one token")


NAMES = pd.Series(["", "lhs 1", "end other", "rhs 2", "final"])


def test_names_of_a_pair():
    "A changed reference gives the counterfactual's own names a b, where the program has none."
    assert _pair_names(NAMES, NAMES, False).tolist() == NAMES.tolist()
    unaligned = pd.Series(["lhs 1", "end other", "end 1", "rhs 2", ""])
    expected = ["lhs 1b", "lhs 1", "end 1b", "rhs 2", "final"]
    assert _pair_names(NAMES, unaligned, True).tolist() == expected
    conflicting = NAMES.replace("rhs 2", "rhs 1")
    for names, redirected in ((unaligned, False), (conflicting, True), (conflicting, False)):
        with pytest.raises(Misaligned) as refusal:
            _pair_names(NAMES, names, redirected)
        assert str(refusal.value) == "a program and its counterfactual do not play the same roles at the same tokens"


def test_a_reference_was_changed_where_one_token_and_the_chain_differ():
    pair = (REFERENCE, REDIRECTED)
    assert _is_redirected(pair, [1, 2, 3], [1, 5, 3])
    assert not _is_redirected(pair, [1, 2, 3], [1, 5, 4])
    assert not _is_redirected(pair, [1, 2, 3], [1, 2, 3])
    assert not _is_redirected((PROGRAM, COUNTERFACTUAL), [1, 2, 3], [1, 5, 3])


def test_a_pair_that_lines_up(lm):
    pair = (PROGRAM, COUNTERFACTUAL)
    aligned = align_pair(lm, pair, prefix=PREFIX)
    base, source = lm.ids([PREFIX + program.code for program in pair])
    assert (aligned.base, aligned.source) == (tuple(base), tuple(source))
    assert aligned.answer_ids == tuple(lm.tokenizer(answer)["input_ids"][0] for answer in "35")
    assert [i for i, (b, s) in enumerate(zip(base, source)) if b != s] == [aligned.first_difference] == [29]
    roles = token_roles(lm, PROGRAM, PREFIX + PROGRAM.code)
    pd.testing.assert_frame_equal(aligned.roles, roles[16:].reset_index(drop=True))
    noise = align_pair(lm, pair, "noise", PREFIX)
    assert (noise.base, noise.source) == (aligned.source, aligned.base)
    assert noise.answer_ids == aligned.answer_ids[::-1] and noise.first_difference == 29
    assert noise.roles["token"][13] == "4" and aligned.roles["token"][13] == "2"
    assert noise.roles["position_name"].tolist() == aligned.roles["position_name"].tolist()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_names_are_the_programs_in_both_directions(lm, direction):
    names = align_pair(lm, (REFERENCE, REDIRECTED), direction).roles["position_name"]
    assert [name for name in names if name] == [
        *("lhs 1", "rhs 1", "end 1", "lhs 1b", "rhs 1b", "end 1b", "lhs 2", "rhs 2", "end 2"),
        *("lhs 3", "rhs 3", "end 3", "query", "final"),
    ]


MISFITS = {
    "{0!r} has {1} tokens and its counterfactual {2}: patching needs equal numbers; make the pair with a tokenizer": (
        Misaligned,
        as_program(("a = 1\nz = 88\nb = 4\nc = a + b\nprint(c)  # prints ", "5")),
    ),
    "a program and its counterfactual do not play the same roles at the same tokens": (
        Misaligned,
        as_program(("a = 1\nb = 8\nz = 4\nc = a + b\nprint(c)  # prints ", "9")),
    ),
    "{0!r}: program and counterfactual, or their answers, are the same: there is no difference to trace": (
        CannotTrace,
        as_program(("a = 1\nz = 9\nb = 2\nc = a + b\nprint(c)  # prints ", "3")),
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_pair_that_does_not_line_up_is_refused(lm, message):
    error, counterfactual = MISFITS[message]
    with pytest.raises(error) as refusal:
        align_pair(lm, (PROGRAM, counterfactual))
    tokens = [len(row) for row in lm.ids([PROGRAM.code, counterfactual.code])]
    assert str(refusal.value) == message.format(PROGRAM.code, *tokens)


def test_a_pair_of_one_code_is_refused_whatever_its_answers(lm):
    with pytest.raises(CannotTrace, match="there is no difference to trace"):
        align_pair(lm, (PROGRAM, replace(PROGRAM, answer="5")))
    with pytest.raises(ValueError, match="unknown direction 'denoize'"):
        align_pair(lm, (PROGRAM, COUNTERFACTUAL), "denoize")


ROLES = pd.DataFrame({"position": [4, 5, 6, 7], "token": list("a=1\n"), "position_name": ["lhs 1", "", "rhs 1", ""]})


def made_pair(names: tuple[str, ...] = ("lhs 1", "", "rhs 1", "end other")) -> AlignedPair:
    return AlignedPair((0,) * 8, (1,) * 8, (2, 0), ROLES.assign(position_name=list(names)))


def test_positions_with_a_name_of_their_own():
    assert named_positions(made_pair().roles) == pair_positions(made_pair()) == {"lhs 1": 4, "rhs 1": 6}
    assert {type(position) for position in pair_positions(made_pair()).values()} == {int}
    assert made_pair().first_difference == 0 and "roles" not in repr(made_pair())


def test_metrics_of_a_patch():
    "Three tokens; the base answers with the last, the source with the first."
    logits = torch.tensor([[math.log(5), math.log(3), math.log(2)], [math.log(1), math.log(1), math.log(8)]])
    base = torch.tensor([0.2, 0.2, 0.6]).log()
    measured = measure_patch(logits, made_pair(), base)
    kl = [0.2 * math.log(0.2 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.6 * math.log(0.6 / 0.2)]
    kl += [0.2 * math.log(0.2 / 0.1) * 2 + 0.6 * math.log(0.6 / 0.8)]
    expected = [[math.log(5 / 2), math.nan, 1, 0.5, kl[0]], [math.log(1 / 8), math.nan, 0, 0.1, kl[1]]]
    assert PATCH_METRICS == ("logit_diff", "effect", "success", "prob", "kl")
    assert np.allclose(measured, expected, atol=1e-6, equal_nan=True)
    of_each_row = torch.stack([base, logits[1].log_softmax(-1)])
    assert np.allclose(measure_patch(logits, made_pair(), of_each_row)[:, 4], [kl[0], 0], atol=1e-6)


def test_cells_are_rows_layer_by_layer_head_by_head():
    cells = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5) / 3
    table = cell_rows(made_pair(), 7, "head_out", cells)
    columns = ["program", "site", "layer", "head", "position", "token", "position_name", *PATCH_METRICS]
    assert list(table) == columns and len(table) == 24
    assert table["layer"].tolist() == [0] * 12 + [1] * 12
    assert table["head"].tolist() == ([0] * 4 + [1] * 4 + [2] * 4) * 2 and table["head"].dtype == "Int64"
    assert table["position"].tolist() == [4, 5, 6, 7] * 6
    assert table["token"].tolist() == list("a=1\n") * 6
    assert table["position_name"].tolist() == ["lhs 1", "", "rhs 1", "end other"] * 6
    assert np.array_equal(table[list(PATCH_METRICS)].to_numpy(), cells.double().reshape(24, 5))
    assert CELL_COLUMNS == ("site", "layer", "head", "position_name")
    assert set(table["program"]) == {7} and set(table["site"]) == {"head_out"}


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_a_site_of_one_vector_has_no_heads(site):
    table = cell_rows(made_pair(), 0, site, torch.zeros(2, 1, 4, 5))
    assert table["head"].isna().all() and table["head"].dtype == "Int64" and len(table) == 8
