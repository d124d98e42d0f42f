"""What phase watch finds where the mechanism is known, and that it finds nothing where there is nothing."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from codetrace.core.errors import BadInput
from codetrace.patching.state_probes import is_read, random_weights_model
from codetrace.patching.state_reading import ReadOptions, collect_target, judge_target, read_directions, read_target
from codetrace.patching.state_swaps import is_used, use_states
from codetrace.patching.swap_cases import swap_cases
from codetrace.phases.watch import (
    beyond_rules_test,
    confined_claims,
    count_said,
    mark_dreval,
    read_claim,
    said_claims,
    used_claims,
    used_sentence,
    watch_limitations,
)
from codetrace.planted.binding import D_HEAD, load_binding_model
from codetrace.runs.claims import adjust_claims
from codetrace.runs.manifest import reference_runs
from codetrace.tasks.dreval import DREvalInput, dreval_truth, load_dreval, record_dreval
from codetrace.tasks.execution import Execution, TracedProgram, record_executions
from codetrace.tasks.state_accuracy import state_accuracy, with_line_facts
from codetrace.tasks.state_questions import StateAnswer, pack_questions, state_questions
from codetrace.tasks.style_choice import try_question_styles
from codetrace.tasks.watched_programs import WatchedSource, load_watched_executions
from codetrace.tasks.watching import watch_execution, watch_table


@pytest.fixture(scope="module")
def executions() -> list[Execution]:
    return load_watched_executions(WatchedSource(count=6, lines=(9,), max_depth=2))[0]


def said_of(lm, executions) -> pd.DataFrame:
    "What a model says of each variable that a line changed."
    tables = [with_line_facts(watch_execution(lm, e, style="hash", max_new_tokens=1), e) for e in executions]
    return pd.concat(tables, ignore_index=True)


def test_the_way_of_asking_is_chosen_on_other_programs_by_what_is_answered_right(monkeypatch):
    asked_code = set()

    def answer(lm, execution, style, max_new_tokens):
        "Right if asked in a comment, and of what lines leave alone however it is asked."
        asked_code.add(execution.program.code)
        rows = {"changed": [True, True, False], "correct": [style.startswith("comment"), style != "hash", True]}
        return pd.DataFrame(rows).assign(program=execution.program.name)

    monkeypatch.setattr("codetrace.tasks.style_choice.watch_execution", answer)
    kinds = WatchedSource(count=40, generators=("boolean", "copies"), lines=(3, 4, 5, 6), max_depth=2)
    watched, _ = load_watched_executions(kinds)
    styles = try_question_styles(None, kinds, watched, 16)
    assert styles["style"].tolist() == ["comment", "print", "assertion", "hash"]
    of_digits = try_question_styles(None, kinds, watched, 1)["style"].tolist()
    assert of_digits == ["comment, digits", "print, digits", "assertion, digits", "hash"]
    assert styles["accuracy"].tolist() == [1, 0.5, 0.5, 0]
    assert set(styles["programs"]) == {len(asked_code)} and set(styles["n"]) == {2 * len(asked_code)}
    assert asked_code and not asked_code & {execution.program.code for execution in watched}
    monkeypatch.setattr("codetrace.tasks.style_choice.load_watched_executions", lambda chosen: (watched[:2], {}))
    with pytest.raises(BadInput, match="give style=print"):
        try_question_styles(None, kinds, watched, 1)


def test_limitations_name_the_way_of_asking_that_was_taken():
    styles = [{"style": "comment", "n": 48}, {"style": "print", "n": 48}]
    manifest = {"parameters": {"style": "auto"}, "question_styles": styles}
    assert "in one way (comment, the best of 4 on 48 values of other programs)" in watch_limitations(manifest)[1]
    assert "in one way (hash)" in watch_limitations({"parameters": {"style": "hash"}})[1]
    left_out = {"parameters": {"style": "hash"}, "targets_left_out": {"iterations": "no row is beyond rules"}}
    assert watch_limitations(left_out)[0] == "iterations is not read: no row is beyond rules."


@torch.no_grad()
def without_hop_1():
    "The planted model, whose head that follows a reference writes nothing."
    lm = load_binding_model()
    lm.layers[1].attn.c_proj.weight[3 * D_HEAD : 4 * D_HEAD] = 0
    return lm


def changed_by_depth(states: pd.DataFrame) -> pd.DataFrame:
    return state_accuracy(states, ["depth"]).query("changed").set_index("depth")


def test_with_a_hop_cut_values_at_depth_2_are_lost_and_those_at_depth_1_are_not(executions):
    whole = changed_by_depth(said_of(load_binding_model(), executions))
    cut = changed_by_depth(said_of(without_hop_1(), executions))
    assert whole["accuracy"].tolist() == [1, 1]
    assert cut["accuracy"][1] == 1 and cut["beyond_high"][2] < 0.4


def test_truth_that_is_shifted_by_one_line_is_seen():
    (execution,) = record_executions([TracedProgram("a = 1\na = 2\nb = 3\na = 5\nb = 4")])

    def constants_that_are_true(run: Execution) -> float:
        "On lines that assign a constant: how often the variable has that value after the line."
        questions = [q for q in state_questions(run) if q.variable in q.step.changed]
        table = watch_table(run, questions, [StateAnswer("", -1.0, 9, True)] * len(questions))
        return float((table["truth"] == table["line_constant"]).mean())

    later = [replace(step, after=following.after) for step, following in zip(execution.steps, execution.steps[1:])]
    assert constants_that_are_true(execution) == 1
    assert constants_that_are_true(replace(execution, steps=tuple(later))) < 0.5


def test_each_visit_of_a_line_is_a_question_of_its_own():
    from codetrace.models.loading import load

    lm = load("tiny:llama")
    (looped,) = record_executions([TracedProgram("t = 0\nfor k in range(3):\n    t = t + 2")])
    questions = [q for q in state_questions(looped) if q.step.line == 3 and q.variable == "t"]
    packed = pack_questions(lm, looped, questions, "hash")
    prompts = {tuple(packed.prompt_ids(i)) for i in range(len(questions))}
    assert [q.truth.text for q in questions] == ["2", "4", "6"] and len(prompts) == 3


def test_who_says_the_last_constant_makes_no_claim_where_it_is_right_in_seven_of_ten():
    rng = np.random.default_rng(0)
    programs = []
    for number in range(30):
        digits = rng.permutation(10)[:3]
        lines = [f"{name} = {digit}" for name, digit in zip("abc", digits)]
        sources = ["c" if rng.random() < 0.7 else "ab"[int(rng.integers(2))] for _ in range(5)]
        lines += [f"{target} = {source}" for target, source in zip("vwxyz", sources)]
        programs.append(TracedProgram("\n".join(lines), name=str(number)))
    tables = []
    for execution in record_executions(programs):
        questions = state_questions(execution)
        blank = watch_table(execution, questions, [StateAnswer("", -1.0, 9, True, -1.0)] * len(questions))
        answers = [StateAnswer(text or "", -1.0, 0, True, -1.0) for text in blank["last_constant"]]
        tables.append(with_line_facts(watch_table(execution, questions, answers), execution))
    states = pd.concat(tables, ignore_index=True)
    copies = states[states["changed"] & (states["kind"] == "copy")]
    assert 0.6 < copies["correct"].mean() < 0.8
    claims = said_claims(count_said(states))
    assert [claim["verdict"].startswith(("more ", "said")) for claim in claims] == [False, False]
    assert not beyond_rules_test(states) <= 0.05 or claims[1]["number"] == 0


def test_what_is_read_and_not_used_is_told_from_what_is_used():
    lm = load_binding_model()
    executions, _ = load_watched_executions(WatchedSource(count=14, lines=(8,), max_depth=2, seed=3))
    used = use_states(lm, swap_cases(lm, executions))
    rates = used.table.set_index(["place", "layer"])["used"]
    verdicts = {place: is_used(rows) for place, rows in used.gains.groupby("place")}
    assert rates["line"][[2, 3]].tolist() == [1, 1] and rates["line"][[0, 1, 4, 5]].max() == 0
    assert rates["line end"].max() == 0 and not verdicts["line end"] and verdicts["query"]
    assert used.table.dropna(subset=["others_kept"])["others_kept"].min() == 1


@pytest.mark.slow
def test_what_a_probe_of_the_planted_model_reads_is_what_is_used():
    lm = load_binding_model()
    executions, _ = load_watched_executions(WatchedSource(count=80, lines=(8,), max_depth=2, seed=3))
    swapped = [execution.program.name for execution in executions[:24]]
    directions_of = read_directions(collect_target(lm, executions), without=swapped)
    used = use_states(lm, swap_cases(lm, executions[:24]), directions_of=directions_of)
    claims = pd.DataFrame(confined_claims(used)).set_index("claim")
    assert len(claims) == 3 and set(claims["verdict"]) == {"what the probe reads is used"}
    assert claims["number"].min() == 1 and used.read_gains["flips"].max() < 0.25
    at_used = used.read_gains[used.read_gains["place"] != "line end"]
    assert at_used["without"].max() == 0
    whole = use_states(lm, swap_cases(lm, executions[:24]))
    assert confined_claims(whole) == [] and "what the probe reads of it alone 1.00" in used_sentence(used)


def study_claims(seed: int) -> pd.DataFrame:
    "All claims of a small study of a model whose weights are random."
    lm = random_weights_model(load_binding_model(), seed)
    executions, _ = load_watched_executions(WatchedSource(count=32, lines=(9,), max_depth=2, seed=seed))
    options = ReadOptions(per_program=9, seed=seed)
    collected = collect_target(lm, executions, options, random_weights_model(lm, seed + 1000))
    read = judge_target(collected)
    of_places = [place for place in (read, read.in_program) if place is not None]
    claims = [*said_claims(count_said(said_of(lm, executions))), *map(read_claim, of_places)]
    cases = swap_cases(lm, executions[:12], seed=seed)
    claims += (
        used_claims(
            use_states(
                lm,
                cases,
                seed,
                directions_of=read_directions(collected, without=[e.program.name for e in executions[:12]]),
            )
        )
        if cases
        else []
    )
    return adjust_claims(pd.DataFrame(claims))


def claims_anything(claims: pd.DataFrame) -> bool:
    "Is any verdict one that something was found?"
    return bool(
        claims["verdict"]
        .isin(
            [
                "used",
                "what the probe reads is used",
                "more than every baseline",
                "more often than the best constant",
                "more than the best rule",
            ]
        )
        .any()
    )


@pytest.mark.slow
def test_one_study_of_random_weights_claims_nothing():
    assert not claims_anything(study_claims(1))


@pytest.mark.slow
def test_of_a_hundred_studies_of_random_weights_at_most_five_claim_anything():
    assert sum(claims_anything(study_claims(seed)) for seed in range(100)) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("hold_out", ["programs", "names", "lengths"])
def test_a_study_of_the_planted_model_reads_at_the_layers_where_it_was_planted(hold_out):
    lm = load_binding_model()
    executions, _ = load_watched_executions(WatchedSource(count=160, lines=(8, 9, 10, 11), max_depth=2))
    read = read_target(lm, executions, ReadOptions(), random_weights_model(lm), hold_out)
    table = read.table.set_index(["place", "layer"])["accuracy"]
    assert is_read(read.gains)
    assert min(table["line"][2], table["line end"][3], table["query"][4], table["final"][5]) > 0.9
    assert max(table["line"][1], table["line end"][2], table["query"][3], table["final"][4]) < 0.6


@pytest.mark.slow
def test_questions_of_dreval_are_answered_by_what_is_recorded():
    data = Path(os.environ.get("CODETRACE_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))
    files = [data / name for name in ("dreval_data.jsonl", "dreval_tasks.jsonl")]
    if not all(path.is_file() for path in files):
        pytest.skip(f"{files[0]} is not here")
    inputs, left_out = load_dreval(*files)
    assert len(inputs) + left_out == 690 and left_out <= 3
    assert sum(len(program.questions) for program in inputs) > 3100
    few = inputs[::15]
    executions = record_dreval(few)
    assert sum(execution.ending == "return" for execution in executions) >= len(few) - 3
    truths = [dreval_truth(e, program, *q) for e, program in zip(executions, few) for q in program.questions]
    assert np.mean([truth.values is not None for truth in truths]) > 0.95
    assert 0.3 < np.mean([truth.executed for truth in truths]) < 0.9
    assert all(truth.values == () for truth in truths if not truth.executed)


KEPT = [manifest for manifest in reference_runs("watch") if "states.parquet" not in manifest.get("left_out", [])]


@pytest.mark.parametrize("manifest", KEPT, ids=lambda manifest: manifest["run_id"])
def test_what_a_record_says_is_in_its_tables(manifest):
    "Accuracy beyond rules, and what swaps do, counted again with pandas alone."
    folder = Path(manifest["folder"])
    states = pd.read_parquet(folder / "states.parquet")
    beyond = states[states["beyond"] & states["changed"]]
    assert len(beyond) > 200 and (beyond["said"] == beyond["truth"]).equals(beyond["correct"].astype(bool))
    commonest = (beyond["truth"] == beyond["truth"].mode()[0]).mean()
    told = f"of {len(beyond)} (commonest value {commonest:.2f})"
    if "best constant" in manifest["headline"]:  # records since 30 November 2026
        right = 0
        for name, kind in set(zip(beyond["program"], beyond["type"])):
            is_of_type = beyond["type"] == kind
            elsewhere = beyond[is_of_type & (beyond["program"] != name)]["truth"]
            in_program = beyond[is_of_type & (beyond["program"] == name)]["truth"]
            right += len(elsewhere) and (in_program == elsewhere.value_counts().index[0]).sum()
        constant = max(commonest, right / len(beyond))
        told = f"of {len(beyond)} in {beyond['program'].nunique()} programs (the best constant {constant:.2f})"
    assert f"beyond rules {beyond['correct'].mean():.2f} [" in manifest["headline"] and told in manifest["headline"]
    controls = pd.read_parquet(folder / "swap_controls.parquet")
    controls["flips"] = controls["flips"].astype(float)
    wide = controls.groupby(["place", "program", "case", "kind"])["flips"].mean().unstack()
    gains = pd.read_parquet(folder / "swap_gains.parquet")
    assert len(gains) >= 8 or (gains.empty and "too few to judge" in manifest["headline"])
    for row in gains.itertuples():
        both = wide.loc[row.place][
            ["other run", row.control]
        ].dropna()  # a control is compared on the cases that have it
        assert len(both) == row.n
        assert [row.used, row.flips] == pytest.approx(both.mean().tolist())


CONFINED = [m for m in reference_runs("watch") if (Path(m["folder"]) / "swap_read_gains.parquet").is_file()]


@pytest.mark.parametrize("manifest", CONFINED, ids=lambda manifest: manifest["run_id"])
def test_what_a_record_says_of_confined_swaps_is_in_its_tables(manifest):
    "Counted again with pandas alone."
    controls = pd.read_parquet(Path(manifest["folder"]) / "swap_controls.parquet")
    controls["flips"] = controls["flips"].astype(float)
    wide = controls.groupby(["place", "program", "case", "kind"])["flips"].mean().unstack()
    gains = pd.read_parquet(Path(manifest["folder"]) / "swap_read_gains.parquet")
    kinds = ["what is read", "read of permuted labels", "all but what is read", "other run"]
    assert len(gains) >= 4 or (gains.empty and "too few to judge" in manifest["headline"])
    for row in gains.itertuples():
        shares = wide.loc[row.place][kinds].dropna().mean().tolist()
        assert [row.used, row.flips, row.without, row.whole] == pytest.approx(shares)
        if row.whole > 0.5:
            told = f"alone {row.used:.2f}, all but that {row.without:.2f}, permuted labels {row.flips:.2f}"
            assert told in manifest["headline"]


def test_what_the_record_of_dreval_says_is_in_its_table():
    (manifest,) = reference_runs("watch", source="dreval")
    marks = pd.read_parquet(Path(manifest["folder"]) / "dreval.parquet")
    percent = 100 * marks[["coverage", "state", "path"]].mean()
    percent["output"] = 100 * marks.drop_duplicates("input")["output"].mean()
    assert len(marks) > 3000 and marks["task"].nunique() == 154
    assert all(f"{name} {value:.1f} [" in manifest["headline"] for name, value in percent.items()), percent


def test_dreval_goes_on_where_it_was(tmp_path, monkeypatch):
    programs = [TracedProgram("def f(x):\n    y = x\n    return y", f"f({n})", "copy") for n in range(12)]
    inputs = [
        DREvalInput("copy", program.code, program, program.call, f"assert {program.call} == ??", ((2, "y"),))
        for program in programs
    ]
    asked = []
    texts = {"Is line": "YES", "What is": "3; int", "Line 2": "return y", "Replace": "assert f(3) == 3"}

    def answer(lm, prompts, max_new_tokens, stop, shares_prefixes):
        if len(asked) == 40:  # the questions about ten inputs
            asked.append("")
            raise KeyboardInterrupt
        asked.extend(prompts)
        questions = [prompt.split("\n")[-2] for prompt in prompts]
        return [next(text for start, text in texts.items() if q.startswith(start)) for q in questions]

    monkeypatch.setattr("codetrace.phases.watch.continue_texts", answer)
    with pytest.raises(KeyboardInterrupt):
        mark_dreval(None, inputs, tmp_path)
    marks = mark_dreval(None, inputs, tmp_path)
    assert len(asked) == 4 * 12 + 1 and len(set(asked)) == 4 * 12 + 1
    assert marks["input"].tolist() == list(range(12))
    assert marks["state"].tolist() == [n == 3 for n in range(12)]
    assert marks[["coverage", "path", "output"]].all(axis=None)
