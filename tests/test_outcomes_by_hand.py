"What steering changed, in eight made-up answers that can be counted on two hands; intervals and p by their formulas."

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps
from statsmodels.stats.proportion import proportion_confint

from codetrace import models
from codetrace.core.errors import BadInput
from codetrace.core.stats import bootstrap_interval
from codetrace.steering.outcomes import (
    COHERENCE_MEASURES,
    MIN_RANDOM_DIRECTIONS,
    coherence_table,
    mean_answer_logprobs,
    net_change_interval,
    null_band,
    pair_with_baseline,
    parses_as_python,
    random_direction_p,
    repetition_rate,
    steering_effects,
    steering_p,
    steering_rates,
    steering_sentence,
    task_outcomes,
    verdict_transitions,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

BASE = ["passed", "passed", "passed", "exception", "exception", "exception", "timeout", "exception"]
PUSHED = ["passed", "exception", "passed", "passed", "passed", "failed_assertion", "exception", "timeout"]


def answers_to(verdicts: list[str], setting: int | str, first: str = "a") -> pd.DataFrame:
    tasks = [chr(ord(first) + i) for i in range(len(verdicts))]
    passed = [verdict == "passed" for verdict in verdicts]
    return pd.DataFrame({"setting": setting, "task_id": tasks, "passed": passed, "verdict": verdicts})


def eight_answers(baseline: int | str = 0) -> pd.DataFrame:
    return pd.concat([answers_to(PUSHED, 1), answers_to(BASE, baseline)], ignore_index=True)


def test_each_answer_stands_beside_the_baselines():
    pairs = pair_with_baseline(eight_answers())
    assert list(pairs) == ["setting", "task_id", "passed", "verdict", "base_passed", "base_verdict"]
    assert pairs["setting"].tolist() == [1] * 8 + [0] * 8
    assert pairs["base_verdict"].tolist() == BASE * 2 and pairs["verdict"].tolist() == PUSHED + BASE
    assert pairs["base_passed"].tolist() == [True] * 3 + [False] * 5 + [True] * 3 + [False] * 5
    assert pairs["passed"].dtype == pairs["base_passed"].dtype == bool
    named = pair_with_baseline(eight_answers("none"), "none")
    assert named["base_verdict"].tolist() == BASE * 2


def test_what_the_grader_failed_on_is_left_out_with_its_pair():
    "Task b is not judged at the baseline, task d when pushed."
    table = eight_answers()
    table.loc[3, "verdict"] = "runner_error"
    table.loc[9, "verdict"] = "unsupported"
    table["passed"] = table["passed"].astype(object)
    pairs = pair_with_baseline(table)
    assert pairs["task_id"].tolist() == list("acefgh") + list("acdefgh")
    assert pairs.index.tolist() == list(range(13)) and pairs["passed"].dtype == bool


PAIRS_REFUSED = {
    "the baseline, setting 7, has 0 answers to 0 tasks: one each is needed": (eight_answers(), 7),
    "the baseline, setting 1, has 9 answers to 8 tasks: one each is needed": (
        pd.concat([eight_answers(), answers_to(["passed"], 1)]),
        1,
    ),
    "task 'c' has no answer at baseline: the settings must be tried on the same tasks": (
        eight_answers().drop(index=[10, 12]),
        0,
    ),
}


@pytest.mark.parametrize("message", PAIRS_REFUSED)
def test_answers_without_one_baseline_each_are_refused(message):
    with pytest.raises(BadInput) as refusal:
        pair_with_baseline(*PAIRS_REFUSED[message])
    assert str(refusal.value) == message


def test_the_net_change_is_agrestis_with_a_half_added_to_each_cell():
    "Two corrected and one corrupted of eight: as if three and two of ten."
    half = sps.norm.ppf(0.9) * np.sqrt((0.5 - 0.01) / 10)
    assert net_change_interval(2, 1, 8, 0.8) == pytest.approx((0.125, 0.1 - half, 0.1 + half))
    assert net_change_interval(2, 1, 8) == net_change_interval(2, 1, 8, 0.95)
    assert net_change_interval(0, 3, 3)[1] == -1 and net_change_interval(3, 0, 3)[2] == 1
    assert np.isfinite(net_change_interval(1, 0, 1)).all()
    nothing = net_change_interval(0, 0, 0)
    assert len(nothing) == 3 and np.isnan(nothing).all()


def test_rates_of_a_setting():
    rates = steering_rates(pair_with_baseline(eight_answers()).query("setting == 1"))
    counts = {"n": 8, "right": 3, "wrong": 5, "corrected": 2, "corrupted": 1}
    shares = {"correction": (2, 5), "corruption": (1, 3), "pass@1": (4, 8)}
    expected = dict(counts)
    for name, (k, n) in shares.items():
        low, high = proportion_confint(k, n, method="wilson")
        expected |= {name: k / n, f"{name}_low": low, f"{name}_high": high}
    net, net_low, net_high = net_change_interval(2, 1, 8)
    expected |= {"net": net, "net_low": net_low, "net_high": net_high, "p": 1.0}
    assert rates == pytest.approx(expected)
    assert list(rates) == [*counts, *(n + e for n in ("correction", "corruption", "net", "pass@1") for e in ENDS), "p"]


ENDS = ("", "_low", "_high")


def test_rates_where_nothing_was_wrong():
    rates = steering_rates(pair_with_baseline(eight_answers()).query("setting == 1 and base_passed"))
    assert np.isnan([rates["correction" + end] for end in ENDS]).all() and rates["corruption"] == 1 / 3


def test_p_is_of_the_tasks_that_changed():
    "Six corrected, none corrupted: 2 / 2**6."
    pairs = pd.DataFrame({"base_passed": [0] * 6 + [1] * 4, "passed": [1] * 10})
    assert steering_rates(pairs)["p"] == pytest.approx(2 / 64)


def test_every_setting_has_its_rates():
    pairs = pair_with_baseline(eight_answers())
    table = steering_effects(pairs)
    assert table["setting"].tolist() == [1, 0] and table["corrected"].tolist() == [2, 0]
    layers = pairs.assign(layer=[4.0] * 4 + [np.nan] * 12)
    table = steering_effects(layers, ["setting", "layer"])
    assert table[["setting", "n", "corrected"]].to_numpy().tolist() == [[1, 4, 1], [1, 4, 1], [0, 8, 0]]
    assert table["layer"].isna().tolist() == [False, True, True]


def test_outcomes_of_tasks_and_how_often_random_pushes_change_them():
    "Two random pushes: one is as the baseline, one as the push; of task a there is a third, which breaks it."
    names = {1: 1, 2: 0, 3: 1}
    tables = [answers_to(BASE, 0)]
    tables += [answers_to(PUSHED if is_pushed else BASE, setting) for setting, is_pushed in names.items()]
    tables += [answers_to(["exception"], "r"), answers_to(["exception"] * 8, "left out")]
    pairs = pair_with_baseline(pd.concat(tables, ignore_index=True))
    table = task_outcomes(pairs, 1, iter([2, 3, "r"]))
    assert list(table) == ["task_id", "base_verdict", "verdict", "outcome", "null_change_rate"]
    assert table["task_id"].tolist() == list("abcdefgh")
    assert table["verdict"].tolist() == PUSHED and table["base_verdict"].tolist() == BASE
    expected = ["kept", "corrupted", "kept", "corrected", "corrected", "missed", "missed", "missed"]
    assert table["outcome"].tolist() == expected
    assert table["null_change_rate"].tolist() == [1 / 3, 0.5, 0, 0.5, 0.5, 0, 0, 0]
    assert task_outcomes(pairs, 1)["null_change_rate"].isna().all()


def test_verdicts_before_and_after():
    pairs = pair_with_baseline(eight_answers()).query("setting == 1")
    table = verdict_transitions(pairs)
    order = ["passed", "failed_assertion", "exception", "timeout"]
    assert table.index.tolist() == table.columns.tolist() == order
    assert table.to_numpy().tolist() == [[2, 0, 1, 0], [0, 0, 0, 0], [2, 1, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("code", ["", " \n\t", "def f(:", "x = \0", "  indented = 1\nout = 2", "'\ud800'"])
def test_what_is_no_python(code):
    assert parses_as_python(code) is False


@pytest.mark.filterwarnings("error::DeprecationWarning", "error::SyntaxWarning")
@pytest.mark.parametrize("code", ["x = 1", "assert (1, 2)", "x is 1", "'\\d'"])
def test_what_python_warns_of_is_python(code):
    assert parses_as_python(code) is True


def test_code_that_is_nested_too_deep_is_no_answer():
    assert parses_as_python("(" * 5000 + ")" * 5000) is False
    assert parses_as_python("-" * 100_000 + "1") is False


def test_repeated_sequences_of_tokens():
    assert repetition_rate([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5)
    assert repetition_rate([1, 2, 3, 4]) == 0 and np.isnan(repetition_rate([1, 2, 3]))
    assert repetition_rate([5, 5, 5, 5], k=1) == 0.75 and repetition_rate([5, 5, 6, 5, 5], k=2) == 0.25


@pytest.fixture(scope="module")
def lm():
    return models.load("tiny:llama")


def logprob_alone(lm, prompt: list[int], answer: list[int]) -> float:
    "One answer by itself, token by token."
    logprobs = lm.logits([[*prompt, *answer]], last=False)[0].log_softmax(-1)
    return float(np.mean([logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_probabilities_are_those_of_each_answer_by_itself(lm, batch_size):
    "Two prompts between each other, answers of several lengths, one twice, two empty."
    first = list(range(3, 12))
    second = [9, 8, 7]
    prompts = [first, second, first, first, second, first, second, first]
    answers = [[5, 6, 7, 8], [5], [6], [9, 9], [4, 5], [6], [], [7, 7, 7]]
    expected = [logprob_alone(lm, prompt, answer) if answer else np.nan for prompt, answer in zip(prompts, answers)]
    means = mean_answer_logprobs(lm, prompts, answers, batch_size)
    assert np.allclose(means, expected, atol=1e-5, equal_nan=True) and means[2] == means[5]


def test_a_prompt_is_read_once_and_its_answers_in_batches(lm, monkeypatch):
    passes = []
    shown = []
    whole = type(lm)._hidden

    def counted(self, inputs, **options):
        if self is lm:  # a thread that another test left may still read with its own model
            passes.append(tuple(inputs["input_ids"].shape))
        return whole(self, inputs, **options)

    def bar(prompts, desc):
        shown.append((desc, len(prompts)))
        return prompts

    monkeypatch.setattr(type(lm), "_hidden", counted)
    answers = [[i] * (1 + i % 3) for i in range(3, 12)]
    mean_answer_logprobs(lm, [[1, 2, 3]] * 9, answers, progress=bar)
    assert passes == [(1, 3), (8, 3), (1, 3)] and shown == [("perplexity", 1)]
    mean_answer_logprobs(lm, [[1, 2, 3]] * 9, answers, batch_size=3)
    assert passes[3:] == [(1, 3), (3, 1), (3, 2), (3, 3)]  # Those of one length together


def some_answers() -> pd.DataFrame:
    "Answers at two settings; one has no perplexity, and a setting without any."
    rows = {
        "setting": ["b", "b", "b", "a", "a"],
        "parses": [True, True, False, True, True],
        "repetition": [0.0, 0.2, 0.5, 0.1, 0.3],
        "generated_tokens": [10, 20, 60, 5, 5],
        "perplexity": [1.0, 4.0, np.inf, np.nan, np.nan],
    }
    return pd.DataFrame(rows)


def test_coherence_is_told_of_each_setting_and_measure():
    table = coherence_table(some_answers())
    assert list(table) == ["setting", "measure", "n", "value", "low", "high"]
    assert table["setting"].tolist() == ["b"] * 4 + ["a"] * 4
    assert table["measure"].tolist() == [*COHERENCE_MEASURES] * 2
    assert table["n"].tolist() == [3, 3, 3, 2, 2, 2, 2, 0]
    assert np.allclose(table["value"], [2 / 3, 0.7 / 3, 30, 2, 1, 0.2, 5, np.nan], equal_nan=True)
    assert table.iloc[-1][["low", "high"]].isna().all()


def test_intervals_of_coherence_are_bootstraps_of_the_mean_and_of_the_log():
    table = coherence_table(some_answers(), n_resamples=300).set_index(["setting", "measure"])
    low, high = bootstrap_interval(np.array([10.0, 20, 60]), n_resamples=300)
    assert table.loc[("b", "generated_tokens"), ["low", "high"]].tolist() == [low, high]
    low, high = bootstrap_interval(np.log([1.0, 4]), n_resamples=300)
    assert table.loc[("b", "perplexity"), ["low", "high"]].tolist() == pytest.approx([np.exp(low), np.exp(high)])
    many = pd.DataFrame(
        {"setting": 0} | {name: np.random.default_rng(1).gamma(2, size=30) for name in COHERENCE_MEASURES}
    )
    pd.testing.assert_frame_equal(coherence_table(many), coherence_table(many, n_resamples=1000))


def test_coherence_of_answers_of_which_some_were_not_measured():
    "What is None in a column of objects is left out, like what is NaN."
    objects = some_answers().astype({"perplexity": object})
    objects.loc[2:, "perplexity"] = None
    pd.testing.assert_frame_equal(coherence_table(objects), coherence_table(some_answers()))


def test_coherence_by_several_columns():
    table = coherence_table(some_answers().assign(layer=[1.0, np.nan, np.nan, 1, 1]), ["setting", "layer"])
    assert table["n"].tolist() == [1, 1, 1, 1, 2, 2, 2, 1, 2, 2, 2, 0]
    assert table["layer"].isna().sum() == 4


def test_the_p_among_random_directions_counts_the_chosen_one():
    "The median of 0.5, 0, 0.1, 0.2, 0.3 is 0.2: only the first lies 0.3 from it; 0 and 0.1 lie 0.2 and 0.1 from it."
    null = [0.0, 0.1, 0.2, 0.3]
    assert random_direction_p(0.5, null) == 1 / 5
    assert random_direction_p(0.4, [*null, np.nan, np.inf]) == 2 / 5  # 0 lies as far, on the other side
    assert random_direction_p(0.2, null) == 1
    assert random_direction_p(0.1 + 0.2, [0.1, 0.2, 0.3]) == 1  # 0.3 but for rounding, as far as 0.2 and 0.3
    assert np.isnan([random_direction_p(0.1, [np.nan]), random_direction_p(np.nan, null)]).all()


def test_the_band_of_random_directions_is_from_the_least_to_the_most():
    effects = pd.DataFrame({"coefficient": [2, 1, 1, 1, 1], "net": [0.1, 0.4, np.nan, -0.2, 0.0], "p": [1, 2, 3, 4, 5]})
    effects["layer"] = [np.nan, 0, 0, 0, np.nan]  # of no concern
    band = null_band(effects)
    assert list(band) == ["coefficient", "n", "median", "low", "high"]
    assert band.to_numpy().tolist() == [[1, 3, 0, -0.2, 0.4], [2, 1, 0.1, 0.1, 0.1]]
    assert null_band(effects, "p")["high"].tolist() == [5, 1]


NETS = [i / 100 for i in range(-9, 10)]  # Of nineteen random directions


@pytest.mark.parametrize(
    ("net", "p", "null", "expected"),
    [
        (0.5, 0.001, NETS, 1 / 20),
        (-0.5, 0.001, NETS, 1 / 20),
        (0.5, 0.2, NETS, 0.2),
        (0.5, 0.001, [*NETS, *NETS], 1 / 39),
        (0.5, 0.001, [*NETS, np.nan], 1 / 20),
        (0.5, 0.001, [*NETS[:18], np.nan], np.nan),
        (np.nan, 0.001, NETS, np.nan),
        (0.5, 0.001, [x + 0.8 for x in NETS], 1),  # Random pushes raise more
        (0.02, 0.001, [x - 0.2 for x in NETS], 1 / 20),
        (0.5, 0.001, [0.5] * 19, 1),  # They do as much
        (0.0, 0.001, [x - 0.5 for x in NETS], 1),  # The push does nothing
    ],
)
def test_p_is_the_larger_of_two(net, p, null, expected):
    assert len(NETS) == MIN_RANDOM_DIRECTIONS
    assert steering_p({"net": net, "p": p}, null) == pytest.approx(expected, nan_ok=True)


ROW = {
    "n": 40,
    "right": 15,
    "wrong": 25,
    "corrected": 21,
    "corrupted": 1,
    **{"correction": 0.84, "correction_low": 0.65, "correction_high": 0.94},
    **{"corruption": 0.07, "corruption_low": 0.01, "corruption_high": 0.3},
    **{"net": 0.5, "net_low": 0.3, "net_high": 0.6, "p": 0.0012},
}
COUNTED = (
    "21 of 25 wrong ones corrected (0.84 [0.65, 0.94]), 1 of 15 right ones corrupted (0.07 [0.01, 0.30]), "
    "net 0.50 [0.30, 0.60], p = 0.0012 against no push"
)
AMONG = "; 19 random pushes as strong give -0.09 to +0.09, p = 0.05 among them"


def test_a_sentence_is_made_from_the_numbers():
    sentence = steering_sentence(ROW, "It", [*NETS, np.nan])
    assert sentence == f"It raises the number of solved tasks: {COUNTED}{AMONG}."
    silent = steering_sentence(ROW, "It")
    assert silent == f"It no verdict (nothing random was tried beside it): {COUNTED}."


VERDICTS = [
    ({}, NETS, {}, "It raises the number of solved tasks: "),
    ({"net": -0.5}, NETS, {}, "It lowers the number of solved tasks: "),
    ({"p": 0.05}, NETS, {}, "It raises the number of solved tasks: "),
    ({"p": 0.051}, NETS, {}, "It does not measurably change the number of solved tasks: "),
    ({}, NETS[:18], {"random": "twins"}, "It no verdict (18 twins, 19 are needed): "),
    ({}, [*NETS[:18], 0.6], {"random": "twins"}, "It changes the number of solved tasks no more than twins: "),
    ({}, NETS, {"kept": False}, "It no verdict (p is above 0.05 when adjusted for the other claims): "),
    ({"n": 5}, NETS, {}, "It no verdict (5 tasks cannot give a p below 0.062) (only 5 tasks): "),
    ({"n": 6}, NETS, {}, "It raises the number of solved tasks (only 6 tasks): "),
    ({"n": 9.0}, NETS, {}, "It raises the number of solved tasks (only 9 tasks): "),
    ({"n": 10}, NETS, {}, "It raises the number of solved tasks: "),
]


@pytest.mark.parametrize(("changes", "null", "options", "start"), VERDICTS)
def test_a_verdict_needs_random_pushes_enough_tasks_and_a_small_p(changes, null, options, start):
    sentence = steering_sentence(ROW | changes, "It", null, **options)
    assert sentence.startswith(start), sentence
    assert f"; {len(null)} {options.get('random', 'random pushes as strong')} give " in sentence


@pytest.mark.parametrize("n", [12, 30, 60])
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.2, 0.05), (0.05, 0.0), (0.0, 0.0), (0.3, 0.1), (0.02, 0.02)])
def test_the_interval_of_a_net_change_holds_what_it_promises(n, shares):
    "Over every outcome that n tasks can have, weighted by how likely it is: 95% at least hold the truth, all hold their own estimate."
    from scipy.stats import multinomial

    corrected, corrupted = shares
    likely = multinomial(n, [corrected, corrupted, 1 - corrected - corrupted])
    coverage = 0.0
    for right in range(n + 1):
        for wrong in range(n + 1 - right):
            net, low, high = net_change_interval(right, wrong, n)
            assert low <= net <= high
            if low <= corrected - corrupted <= high:
                coverage += likely.pmf([right, wrong, n - right - wrong])
    assert coverage >= 0.95
