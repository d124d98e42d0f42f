"Nulls of few enough labels to list all their arrangements, and differences to baselines from repeated rows."

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps

from codetrace.core.errors import BadInput
from codetrace.sae.baseline_differences import simultaneous_differences, verdict_on_baselines
from codetrace.sae.null_of_maximum import (
    NOMINAL_LEVEL,
    count_exchangeable,
    describe_unit,
    expected_label,
    family_wise_p,
    null_of_maximum_t,
    permutation_design,
    permute_labels,
    refusal_of_null,
)
from codetrace.sae.separation import ActiveLatents

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

X = np.array([0.3, -0.2, 0.5, 0.1, 0.4, 0.2, -0.1, 0.6])
Y = np.array([0.1, 0.2, 0.0, 0.3, -0.4, 0.1, 0.2, 0.0])
TASKS = list("babccadd")


def mean_of(values: np.ndarray):
    return lambda weights: (weights * values).sum(-1) / weights.sum(-1)


def test_differences_have_the_defaults_that_are_documented():
    first = simultaneous_differences(mean_of(X), {"y": mean_of(Y)}, TASKS)
    second = simultaneous_differences(mean_of(X), {"y": mean_of(Y)}, TASKS, n_resamples=1000, level=0.95, seed=0)
    pd.testing.assert_frame_equal(first, second)


def test_resamples_without_a_value_are_left_out_of_all():
    "Where task a is not drawn there is no value; where it never is, there are no ends."
    is_a = np.array(TASKS) == "a"

    def of_a(weights):
        total = (weights * is_a).sum(-1)
        return np.where(total > 0, (weights * is_a * X).sum(-1) / np.maximum(total, 1), np.nan)

    table = simultaneous_differences(of_a, {"y": mean_of(Y)}, TASKS, 60)
    assert np.isfinite(table[["low", "high"]]).all(axis=None) and table["value"][0] == pytest.approx(-Y.mean())
    seeds = [
        seed for seed in range(99) if (np.random.default_rng(seed).multinomial(4, [1 / 4] * 4, 2)[:, 0] > 0).sum() == 1
    ]
    one_value = simultaneous_differences(of_a, {"y": mean_of(Y), "x": mean_of(X)}, TASKS, 2, seed=seeds[0])
    assert one_value[["low", "high"]].isna().all(axis=None) and one_value["value"].notna().all()
    assert one_value["baseline"].tolist() == ["y", "x"]


def test_two_tasks_and_two_resamples_are_enough_and_one_is_not():
    table = simultaneous_differences(mean_of(X), {"y": mean_of(Y)}, [0] * 4 + [1] * 4, 2, seed=1)
    assert table[["low", "high"]].notna().all(axis=None)
    for clusters, n in ([[7] * 8, 1], [[], 0]):
        with pytest.raises(BadInput) as refusal:
            simultaneous_differences(mean_of(X), {}, clusters)
        assert str(refusal.value) == f"{n} tasks: intervals over tasks need at least 2"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        ([0.1, 0.2], [0.3, 0.4], "beats all 2 baselines at once"),
        ([0.1, 0.0], [0.3, 0.4], "cannot be told from 1 of 2 baselines"),
        ([np.nan, -0.1], [np.nan, 0.0], "cannot be told from 2 of 2 baselines"),
        ([-0.3, -0.5], [-0.1, 0.4], "is worse than 1 of 2 baselines"),
    ],
)
def test_a_verdict_on_baselines(low, high, verdict):
    assert verdict_on_baselines(pd.DataFrame({"low": low, "high": high})) == verdict


# Three tasks of two samples, and one of three; tasks 0 and 3 are near-duplicates in the last design
LABEL = np.array([1, 0, 0, 0, 1, 1, 1, 0, 0])
TASK = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])
TEMPERATURE = np.array([0, 1, 0, 1, 0, 1, 0, 0, 1])
COPIES = list("abcdefgga")

DESIGNS = {
    "tasks": dict(),
    "within tasks": dict(between_groups=False),
    "temperatures": dict(temperature=TEMPERATURE),
    "copies": dict(copies=COPIES),
    "groups": dict(group=[4, 4, 5, 5, 4, 4, 5, 5, 5]),
}


def may_change_places(name: str) -> list[tuple[int, ...]]:
    "All labellings that a design allows, listed by hand."
    two = [(1, 0), (0, 1)]
    one_of_three = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    none = [(0, 0)]
    both = [(1, 1)]
    if name == "within tasks":
        orders = [(two, none, both)]
        last = one_of_three
    elif name == "groups":  # Of five samples in one, of four in the other: nothing to change places with
        orders = [(two, none, both)]
        last = one_of_three
    elif name == "temperatures":  # One sample of a task at a temperature: wholes alone; of task 3 there are two at 0
        whole = [(1, 0)]
        orders = orders_of(whole, none, both)
        last = [(1, 0, 0), (0, 1, 0)]
    elif name == "copies":  # g is right in one row and wrong in another: two solutions; nothing is a copy
        orders = orders_of(two, none, both)
        last = one_of_three
    else:
        orders = orders_of(two, none, both)
        last = one_of_three
    labellings = {sum(parts, ()) for order in orders for parts in product(*order, last)}
    return sorted(labellings)


def orders_of(*tasks: list) -> list[tuple]:
    a, b, c = tasks
    return [(a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a)]


@pytest.mark.parametrize("name", DESIGNS)
def test_every_arrangement_that_is_allowed_is_drawn_and_no_other(name):
    "About equally often, and their number and mean are what is said."
    design = permutation_design(LABEL, TASK, **DESIGNS[name])
    expected = may_change_places(name)
    drawn = permute_labels(design, 150 * len(expected), seed=1).astype(int)
    arrangements, counts = np.unique(drawn.T, axis=0, return_counts=True)
    assert [tuple(labels) for labels in arrangements.tolist()] == expected
    assert sps.chisquare(counts).pvalue > 1e-3
    assert count_exchangeable(design)["arrangements"] == pytest.approx(len(expected))
    assert np.allclose(expected_label(design), np.mean(expected, 0))


def test_copies_share_a_label_and_move_with_it():
    "Rows 0 and 2 are one solution drawn twice; it changes places with nothing that was drawn once."
    label = [1, 0, 1, 0, 0, 0, 1, 0]
    task = [0, 0, 0, 0, 1, 1, 1, 1]
    copies = list("abadwxyz")
    design = permutation_design(label, task, copies=copies, between_groups=False)
    drawn = permute_labels(design, 40, seed=2)
    assert (drawn[0] == drawn[2]).all() and drawn[0].all() and not drawn[[1, 3]].any()
    assert (drawn[4:].sum(0) == 1).all() and len(np.unique(drawn, axis=1).T) == 4
    at_two_temperatures = permutation_design(label, task, [0, 0, 1, 0] * 2, copies=copies, between_groups=False)
    assert len(np.unique(permute_labels(at_two_temperatures, 40)[4:], axis=1).T) == 3 - 2  # y alone at 1
    assert design.n_tasks == 2


def test_permutations_have_a_seed_and_a_number():
    design = permutation_design(LABEL, TASK)
    assert permute_labels(design).shape == (9, 1000)
    assert np.array_equal(permute_labels(design, 20), permute_labels(design, 20, seed=0))
    assert not np.array_equal(permute_labels(design, 20), permute_labels(design, 20, seed=1))


def test_units_are_counted_and_named():
    counts = {"groups": 4, "moving_groups": 3, "strata": 4, "mixed_strata": 2}
    design = permutation_design(LABEL, TASK)
    units = count_exchangeable(design)
    assert {name: units[name] for name in counts} == counts and list(units) == [*counts, "arrangements"]
    sets = "within 2 of 4 sets of samples of one task and temperature"
    assert describe_unit(design) == f"labels of 3 of 4 tasks permuted as wholes, and {sets}"
    within = permutation_design(LABEL, TASK, between_groups=False)
    assert describe_unit(within) == f"labels permuted {sets}"
    assert count_exchangeable(within)["moving_groups"] == 0
    grouped = permutation_design(LABEL, TASK, group=DESIGNS["groups"]["group"])
    assert describe_unit(grouped).startswith(
        "labels of 0 of 2 groups of near-duplicates among 4 tasks permuted as wholes"
    )
    wholes = permutation_design([1, 1, 0, 0], [0, 0, 1, 1])
    assert describe_unit(wholes) == "labels of 2 of 2 tasks permuted as wholes"


def test_arrangements_that_are_too_many_to_count_are_very_many():
    label = np.arange(4000) % 2
    assert count_exchangeable(permutation_design(label, np.arange(4000)))["arrangements"] == pytest.approx(np.exp(700))


def test_a_null_needs_forty_arrangements_for_a_p_of_a_twentieth():
    "Sixteen choose one of sixteen tasks; one of forty is just enough."
    few = permutation_design([1] + [0] * 38, range(39))
    message = "labels have only 39 distinct arrangements, and a p of 0.05 needs 40: take more problems or samples"
    assert refusal_of_null(few) == message and NOMINAL_LEVEL == 0.05
    assert refusal_of_null(few, 0.1) == "" and refusal_of_null(permutation_design([1] + [0] * 39, range(40))) == ""


DESIGN_REFUSALS = {
    "2 labels, 3 tasks, 2 temperatures, 3 groups: one of each a row": ([1, 0], [0, 1, 2], {}),
    "2 labels, 2 tasks, 3 temperatures, 2 groups: one of each a row": ([1, 0], [0, 1], {"temperature": [0, 0, 1]}),
    "2 labels, 2 tasks, 2 temperatures, 1 groups: one of each a row": ([1, 0], [0, 1], {"group": [0]}),
    "2 of 2 rows are correct: both kinds are needed; take more problems": ([1, 1], [0, 1], {}),
    "0 of 2 rows are correct: both kinds are needed; take more problems": ([0, 0], [0, 1], {}),
    "a task is in two groups: give each task the group of its near-duplicates": ([1, 0], [0, 0], {"group": [0, 1]}),
}


@pytest.mark.parametrize("message", DESIGN_REFUSALS)
def test_a_design_that_cannot_be_is_refused(message):
    label, task, options = DESIGN_REFUSALS[message]
    with pytest.raises(BadInput) as refusal:
        permutation_design(label, task, **options)
    assert str(refusal.value) == message


def random_latents(rows: int = 9, d_sae: int = 13, seed: int = 0) -> ActiveLatents:
    "Latents of every density; the first is never active."
    rng = np.random.default_rng(seed)
    active = rng.random((rows, d_sae)) < np.linspace(0, 0.9, d_sae)
    row, latent = active.nonzero()
    return ActiveLatents(rows, row, latent, rng.gamma(2, size=len(row)).astype(np.float32), d_sae)


@pytest.mark.parametrize("block", [1, 4, 512])
def test_the_null_of_t_is_welchs(block):
    active = random_latents(24, 20)
    design = permutation_design(np.arange(24) % 3 == 0, np.arange(24))
    permuted = permute_labels(design, 25)
    values = active.matrix(binary=False).toarray()[1:]
    t = [sps.ttest_ind(values[:, y], values[:, ~y], axis=1, equal_var=False).statistic for y in permuted.T]
    assert np.allclose(null_of_maximum_t(active, permuted, block), np.nanmax(np.abs(t), 1), rtol=1e-3)


def test_t_needs_two_rows_of_each_label_and_something_that_varies():
    active = random_latents(6)
    for label in ([1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]):
        permuted = permute_labels(permutation_design(label, range(6)), 4)
        assert null_of_maximum_t(active, permuted).tolist() == [0] * 4
    constant = ActiveLatents(6, np.arange(6), np.zeros(6, int), np.full(6, 0.1, np.float32), 1)
    permuted = permute_labels(permutation_design([1, 1, 0, 0, 0, 0], range(6)), 4)
    assert null_of_maximum_t(constant, permuted).tolist() == [0] * 4


def test_p_counts_the_permutations_that_are_as_large():
    null = np.array([0.4, 0.1, 0.3, 0.2])
    assert family_wise_p([0.5, -0.3, 0.3 - 1e-6, 0.05, np.nan], null) == pytest.approx(
        [1 / 5, 3 / 5, 3 / 5, 1, np.nan], nan_ok=True
    )
    assert family_wise_p([[0.35]], null).tolist() == [[2 / 5]]
    assert family_wise_p([1e6 + 5, 1e6 + 15], np.array([1e6])).tolist() == [1, 0.5]  # Sums of 32-bit numbers
    assert family_wise_p([0.3 + 5e-6, 0.3 + 2e-5], np.array([0.3])).tolist() == [1, 0.5]
    assert np.isnan(family_wise_p([0.3, 0.4], np.zeros(0))).tolist() == [True, True]
