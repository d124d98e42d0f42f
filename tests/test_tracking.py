"What a notebook cannot hold of `tracking`: generators given as functions, one scoring a table, and baselines that no headline leaves out."

from functools import partial

import numpy as np
import pandas as pd
import pytest

from codetrace import models
from codetrace.core.errors import BadInput
from codetrace.core.files import read_json
from codetrace.phases import tracking
from codetrace.phases.tracking import (
    ExperimentRunner,
    TrackingResult,
    accuracy_table,
    answer_questions,
    draw_questions,
    heuristic_agreement_table,
    quick_experiment,
    score_answer,
    tracking_claims,
    tracking_headline,
    tracking_summary_rows,
)
from codetrace.planted.binding import load_binding_model
from codetrace.runs.manifest import newest_run
from codetrace.runs.run import open_scratch_run
from codetrace.tasks.generators import GENERATORS, make_boolean_program
from codetrace.tasks.heuristics import shallow_heuristics


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2", dtype="float32")


def make_sum(seq_len, rng):
    "x = 3 + 1 + 4 …"
    terms = rng.integers(0, 4, seq_len).tolist()
    return f"x = {' + '.join(map(str, terms))}\nprint(x)  # prints ", str(sum(terms))


def marked(config, complete) -> pd.DataFrame:
    "The records of a model that completes each program as a function says."
    rows = []
    for question in draw_questions(config):
        output = {"completion": complete(question["program"]), "log_prob": None, "rank": None}
        rows.append(score_answer(config, "m", question, question["prompt"], output))
    return pd.DataFrame(rows)


# --- through the front door


@pytest.mark.parametrize("task", sorted(GENERATORS))
@pytest.mark.parametrize("form", ["name", "function", "partial"])
def test_a_generator_by_name_and_as_a_function_is_one_experiment(task, form):
    "Whoever writes the right answer is right, and the questions are the same."
    generator = {"name": task, "function": GENERATORS[task], "partial": partial(GENERATORS[task])}[form]
    config = quick_experiment("x", program_generator=generator, models=["m"], num_seqs=4)
    by_name = quick_experiment("x", program_generator=task, models=["m"], num_seqs=4)
    assert [q["prompt"] for q in draw_questions(config)] == [q["prompt"] for q in draw_questions(by_name)]
    assert marked(config, lambda program: f" {program.answer}\n").correct.all()
    assert not marked(config, lambda program: f" {program.answer}1\n").correct.any()


OWN_ANSWERS = {
    "x = 'ball'": "ball",
    "x = not False": "True",
    "x = None": "None",
    "x = 3 / 2": "1.5",
    "x = 3 - 10": "-7",
    "x = [1, 2]": "[1, 2]",
    "x = 'a b'": "a b",
    "x = 10**12": "1000000000000",
    "x = (1, 'a')": "(1, 'a')",
}


@pytest.mark.parametrize("line", OWN_ANSWERS)
def test_answers_of_any_kind_from_a_function_of_ones_own(line):
    config = quick_experiment(
        "own", program_generator=lambda n, rng: (f"{line}\n#x:", OWN_ANSWERS[line]), models=["m"], num_seqs=1
    )
    assert marked(config, lambda program: f" {program.answer}\nnext").correct.all()
    assert not marked(config, lambda program: " what?").correct.any()


@pytest.mark.parametrize("task", ["boolean", pytest.param("entity", marks=pytest.mark.slow)])
def test_the_seeds_own_pattern_scores_as_the_name_does(smollm2, task):
    options = dict(models=["smollm2"], num_seqs=3, seq_lens=[3], num_shots=2)
    rows = {}
    for generator in (task, GENERATORS[task]):
        config = quick_experiment("x", program_generator=generator, **options)
        rows[str(generator)] = answer_questions(smollm2, config, draw_questions(config))
    by_name, by_function = rows.values()
    assert by_name == by_function and sum(row["correct"] for row in by_function) > 0


def test_what_a_generator_does_not_take_is_said():
    with pytest.raises(BadInput, match="takes no query_style"):
        quick_experiment("x", program_generator=make_sum, query_style="print")
    asked = draw_questions(quick_experiment("x", program_generator=make_boolean_program, query_style="print"))
    assert asked[0]["prompt"].endswith("# prints ")


# --- scoring


def test_one_rule_marks_a_table(smollm2):
    "Sums of three terms are one digit and sums of six are two; each unit is marked as the whole is, and as decoding marks it."
    options = dict(program_generator=make_sum, models=["smollm2"], seq_lens=[3, 6], num_seqs=6)
    config = quick_experiment("sums", **options)
    decoding = quick_experiment("sums", scoring="decode", **options)
    asked = draw_questions(config)
    scorings = set()
    for unit in (asked[:6], asked[6:]):
        auto = answer_questions(smollm2, config, unit)
        decoded = answer_questions(smollm2, decoding, unit)
        assert [row["correct"] for row in auto] == [row["correct"] for row in decoded]
        scorings |= {row["scoring"] for row in auto}
    assert scorings == {"decode"}


def test_reading_the_token_changes_no_mark():
    "Of a model that knows depth 1 and not depth 3."
    lm = load_binding_model()
    options = dict(models=["m"], num_seqs=6, seq_lens=[5], depths=[1, 3], query_style="hash", num_shots=0)
    token, decode = (quick_experiment("x", scoring=scoring, **options) for scoring in ("token", "decode"))
    auto = answer_questions(lm, quick_experiment("x", **options), draw_questions(token))
    read, written = (answer_questions(lm, config, draw_questions(config)) for config in (token, decode))
    assert [row["correct"] for row in read] == [row["correct"] for row in written] and auto == read
    assert {row["correct"] for row in read} == {True, False}
    assert all(row["log_prob"] <= 0 for row in read) and all(row["log_prob"] is None for row in written)
    assert all(row["rank"] == 0 for row in read if row["correct"])


@pytest.mark.parametrize("scoring", ["auto", "token", "decode"])
@pytest.mark.parametrize(
    "text", ["12\n", "10", *(pytest.param(text, marks=pytest.mark.slow) for text in ("1.5\n", "1,000\n", "1st\n"))]
)
def test_the_first_digit_of_a_longer_number_earns_nothing(monkeypatch, scoring, text):
    lm = models.load("tiny:llama")
    monkeypatch.setattr(type(lm), "generate", lambda self, prompts, **options: [text] * len(prompts))
    config = quick_experiment(
        "x", program_generator=lambda n, rng: ("x = 1\n#x:", "1"), models=["m"], num_seqs=1, scoring=scoring
    )
    (row, *_) = answer_questions(lm, config, draw_questions(config))
    assert not row["correct"] and row["stated"] != "1"


def test_scoring_is_decided_for_all_of_a_run_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    options = dict(models=["tiny:llama", "tiny:gpt2"], num_seqs=2, seq_lens=[3])
    one_token = quick_experiment("binding", **options)
    result = ExperimentRunner().run([one_token], no_cache=True)
    assert newest_run("tracking")["scoring"] == "token" and set(result.samples["scoring"]) == {"token"}
    longer = quick_experiment("range", program_generator="range", **options)
    result = ExperimentRunner().run([one_token, longer], no_cache=True)
    assert newest_run("tracking")["scoring"] == "decode" and set(result.samples["scoring"]) == {"decode"}


def test_a_scoring_that_cannot_be_is_refused_before_a_run_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    config = quick_experiment("x", program_generator="range", models=["tiny:llama"], seq_lens=[9], scoring="token")
    with pytest.raises(BadInput, match="several tokens"):
        ExperimentRunner().run(config)
    assert not list(tmp_path.rglob("run.json"))


# --- beside its baseline


@pytest.fixture(scope="module")
def first_lines(tmp_path_factory):
    "A tracking run of a model that repeats the first line's constant, with two numbers of examples and two tasks."
    tables = []
    for task, shots in [("variable_binding", 0), ("variable_binding", 2), ("balanced_binding", 0)]:
        config = quick_experiment(
            task, program_generator=task, models=["m"], seq_lens=[5, 8], depths=[2, 3], num_seqs=50, num_shots=shots
        )
        tables.append(marked(config, lambda program: shallow_heuristics(program)["first_line"]))
    samples = pd.concat(tables, ignore_index=True)
    run = open_scratch_run("tracking", {"models": ["m"]}, "test")
    result = TrackingResult(samples, accuracy_table(samples), heuristic_agreement_table(samples), run)
    ExperimentRunner()._write_results(result)
    return result


def test_a_model_that_repeats_the_first_line_knows_nothing_beyond_rules(first_lines):
    table = first_lines.table
    default = table[table["task"] == "variable_binding"]
    assert (default["accuracy"] == default["first_line"]).all() and (default["accuracy"] > 0.4).all()
    assert (table["beyond"].dropna() == 0).all() and (table["n_beyond"] > 0).sum() > 8
    assert (table["n_beyond"] <= table["n"]).all() and (table["beyond_high"].dropna() > 0).all()
    beyond = first_lines.samples[
        [row["answer"] not in row["heuristics"].values() for row in first_lines.samples.to_dict("records")]
    ]
    assert table["n_beyond"].sum() == len(beyond)
    balanced = table[table["task"] == "balanced_binding"]
    assert (balanced["baseline"] < 0.5).all() and (balanced["n_beyond"] > 10).all()


def test_a_headline_leaves_nothing_out(first_lines):
    headline = tracking_headline(first_lines)
    parts = headline.removeprefix("accuracy: ").split("; ")
    assert len(parts) == 3 and [part.split(":")[0] for part in parts] == [
        "variable_binding, 0 examples",
        "variable_binding, 2 examples",
        "balanced_binding, 0 examples",
    ]
    for part in parts:
        assert part.count("[") == 2 and "beyond rules 0.00 [0.00, " in part and "first line 0." in part, part
    for row in tracking_summary_rows(first_lines):
        assert {"accuracy", "best rule", "beyond rules"} <= set(row)
        assert "n=" in row["beyond rules"] or row["beyond rules"] == "no program"


def test_every_claim_has_its_counterpart_beyond_rules(first_lines):
    claims = tracking_claims({"folder": first_lines.run.folder})
    table = first_lines.table
    subjects = [claim["claim"] for claim in claims]
    assert len(claims) == len(table) + (table["n_beyond"] > 0).sum()
    for claim in claims:
        few = "fewer than 10" in claim["claim"]
        assert few == claim["verdict"].startswith("fewer than 10"), claim
        if "beyond rules" in claim["claim"]:
            assert claim["number"] == 0 and "guess" in claim["null"]
    assert any("beyond rules of m on variable_binding" in subject for subject in subjects)


def test_records_without_the_new_columns_are_read(first_lines, tmp_path):
    rows = read_json(first_lines.run.folder / "results.json")
    for row in rows:
        del row["beyond_chance"]
    (tmp_path / "results.json").write_text(pd.DataFrame(rows).to_json(orient="records"))
    claims = tracking_claims({"folder": tmp_path})
    beyond = [claim for claim in claims if "beyond rules" in claim["claim"]]
    assert beyond and {claim["null"] for claim in beyond} == {"–"}


def test_the_figure_shows_both_and_says_where_programs_are_few(first_lines):
    figure = tracking.accuracy_figure(first_lines)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles.count("beyond rules") == 4 and sum(title.startswith("variable binding") for title in titles) == 2
    labels = [label.get_text() for ax in figure.axes for label in ax.get_xticklabels()]
    few = [int(n) for n in first_lines.table["n_beyond"] if 0 < n < 10]
    assert bool(few) == any(label.endswith("*") or "* to" in label for label in labels)
    caption = figure._supxlabel.get_text().replace("\n", " ")
    assert "m on variable_binding, balanced_binding" in caption and "fewer than 10" in caption
    assert np.isfinite(figure.get_size_inches()).all()


# --- programs that all of some models answer


@pytest.fixture
def robust(monkeypatch):
    "The command `codetrace robust`, where one model is the planted one and another has random weights."
    from typer.testing import CliRunner

    from codetrace.cli import app

    known = {"tiny:gpt2": load_binding_model(), "tiny:llama": models.load("tiny:llama")}
    monkeypatch.setattr("codetrace.models.loading.load", known.get)
    return lambda *words: CliRunner().invoke(app, ["robust", *words, "--seq-len", "5", "--depth", "2"])


def test_the_command_finds_programs_that_the_model_answers(robust):
    done = robust("--model", "tiny:gpt2", "-n", "2")
    assert done.exit_code == 0, done.output
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        seed, *code, answer = block.splitlines()
        expected = GENERATORS["variable_binding"](5, np.random.default_rng(int(seed.removeprefix("seed "))), depth=2)
        assert "\n".join(code) == expected.code and answer == f"# answer: {expected.answer}"


def test_every_model_must_answer_and_too_few_programs_are_an_error(robust):
    done = robust("--model", "tiny:gpt2", "--model", "tiny:llama", "--seeds", "6")
    assert done.exit_code == 1 and done.stdout == ""
    assert "0 of 1 programs in 6 seeds" in done.stderr


# --- what decides a run that is started from Python


def digest_of_run(runner, monkeypatch, configs) -> str:
    "What a run of these experiments is opened with, as one hash; nothing is asked."
    from codetrace.runs.inputs import outcome_digest

    opened = []

    def stop(phase, parameters, source):
        opened.append(outcome_digest("code", parameters, []))
        raise InterruptedError

    monkeypatch.setattr(tracking, "open_run", stop)
    monkeypatch.setattr(ExperimentRunner, "_fit_to_tokenizers", lambda self, configs, no_cache: configs)
    with pytest.raises(InterruptedError):
        runner.run(configs)
    return opened[0]


def test_a_run_from_python_is_told_from_those_with_another_parser_generator_or_dtype(monkeypatch):
    "Functions count by what they do, not by their names: every lambda and every closure has the same one."

    def parser(position):
        return lambda text: text.split()[position]

    def digest(runner=ExperimentRunner(), **options):
        return digest_of_run(runner, monkeypatch, quick_experiment("e", **options))

    assert digest(answer_parser=parser(0)) == digest(answer_parser=parser(0))
    experiments = [digest(answer_parser=parser(0)), digest(answer_parser=parser(1)), digest()]
    experiments += [digest(answer_parser=lambda text: text), digest(answer_parser=lambda text: text.strip())]
    experiments += [digest(program_generator=lambda seq_len, rng, end=end: (f"{end}", "1")) for end in "ab"]
    experiments += [digest(ExperimentRunner(dtype=dtype)) for dtype in ("float32", "bfloat16")]
    assert len(set(experiments)) == len(experiments)


def test_two_experiments_of_one_name_are_refused(monkeypatch):
    pair = [quick_experiment("e", program_generator=task) for task in ("variable_binding", "boolean")]
    with pytest.raises(BadInput, match="two experiments are called 'e' with 0 solved examples: give each a name"):
        ExperimentRunner().run(pair)
    told_apart = [pair[0], quick_experiment("e", program_generator="boolean", num_shots=2)]
    assert digest_of_run(ExperimentRunner(), monkeypatch, told_apart)


def test_an_interrupted_experiment_is_gone_on_with_by_the_same_cell(monkeypatch, tmp_path):
    "The manifest says interrupted; the same call, in the process that was interrupted, opens the same run."
    from codetrace.runs.manifest import all_runs

    monkeypatch.setenv("CODETRACE_RUNS", str(tmp_path))
    monkeypatch.setattr(ExperimentRunner, "_fit_to_tokenizers", lambda self, configs, no_cache: configs)
    runner = ExperimentRunner()
    for error, status in [(KeyboardInterrupt("stopped"), "interrupted"), (BadInput("wrong"), "failed")]:

        def stop(*arguments, error=error):
            raise error

        monkeypatch.setattr(runner, "_answer_all", stop)
        with pytest.raises(type(error)):
            runner.run(quick_experiment("e"))
        (stopped,) = all_runs(tmp_path)
        assert stopped["status"] == status
