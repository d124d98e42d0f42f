"""Truth tests of the search for latents: what is planted is found, and where nothing is, nothing is claimed."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy import stats as sps

from codetrace.core.metrics import auroc, auroc_interval
from codetrace.planted.latents import draw_planted_activations
from codetrace.planted.null_studies import NULL_DESIGNS, calibration_table, draw_near_duplicates_study, power_table
from codetrace.sae.baseline_differences import simultaneous_differences, verdict_on_baselines
from codetrace.sae.latent_cards import selection_adjusted_level
from codetrace.sae.latent_search import (
    P_COLUMNS,
    LabelledSolutions,
    search_active_latents,
    search_all_positions,
    top_latents,
)
from codetrace.sae.null_of_maximum import (
    family_wise_p,
    null_of_maximum,
    permutation_design,
    permute_labels,
    weighted_labels,
)
from codetrace.sae.separation import ActiveLatents


def activities(
    rng,
    label: np.ndarray,
    task: np.ndarray,
    layers: int,
    d_sae: int,
    usual: float,
    plant: tuple[int, int] | None,
    area: float = 0.75,
) -> list[ActiveLatents]:
    "What is active in each layer: latents that come and go with the task, and one planted with a known AUROC."
    active = []
    for layer in range(layers):
        share = rng.beta(0.5, 0.5 / usual, d_sae) * rng.gamma(4, 0.25, (task.max() + 1, d_sae))[task]
        on = rng.random(share.shape) < share
        if plant and plant[0] == layer:
            on[:, plant[1]] = rng.random(len(label)) < np.where(label, area - 0.15, 0.85 - area)
        row, latent = on.nonzero()
        active.append(ActiveLatents(len(label), row, latent, rng.gamma(4, 0.25, len(row)), d_sae))
    return active


def labels(rng, tasks: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    task = np.repeat(np.arange(tasks), samples)
    return rng.random(len(task)) < rng.beta(2, 3, tasks)[task], task


def planted(seed: int, layers: int, d_sae: int, tasks: int = 100, samples: int = 3) -> dict[str, bool]:
    "Is it found first, at its layer, with a small family-wise p; and do the card's intervals contain the truth?"
    rng = np.random.default_rng(seed)
    label, task = labels(rng, tasks, samples)
    where = int(rng.integers(layers)), int(rng.integers(d_sae))
    active = activities(rng, label, task, layers, d_sae, 0.01, where)
    solutions = LabelledSolutions(label, task)
    result = search_active_latents(lambda layer: active[layer], range(layers), solutions, n_shuffles=200, seed=seed)
    best = top_latents(result.table, 1).sort_values("score").iloc[-1]
    column = active[where[0]].column(where[1])
    _, low, high = auroc_interval(label, column, task)
    _, wide_low, wide_high = auroc_interval(label, column, task, selection_adjusted_level(10, len(result.table)))
    first = (best["layer"], best["latent"]) == where and best["predicts"] == "correct"
    return {
        "first": first,
        "significant": best["family_wise_p"] <= 0.05,
        "95%": low <= 0.75 <= high,
        "as one chosen of many": wide_low <= 0.75 <= wide_high,
    }


def test_a_planted_latent_is_found():
    searches = [planted(seed, layers=3, d_sae=256) for seed in range(6)]
    assert all(f["first"] and f["significant"] and f["as one chosen of many"] for f in searches), searches


@pytest.mark.slow
def test_a_planted_latent_is_found_among_many():
    "AUROC 0.75 among 30 × 4096, in at least 95 of 100 studies."
    searches = [planted(seed, layers=30, d_sae=4096) for seed in range(100)]
    counts = {name: sum(f[name] for f in searches) for name in searches[0]}
    assert min(counts["first"], counts["significant"], counts["as one chosen of many"]) >= 95, counts
    assert sum(f["first"] and f["as one chosen of many"] for f in searches) >= 95, counts
    assert counts["95%"] >= sps.binom.ppf(0.001, 100, 0.95), (
        counts
    )  # the plain interval, of a latent that was not chosen by it


def smallest_p(seed: int, layers: int, d_sae: int, n_shuffles: int) -> float:
    "Of a study whose labels are shuffled within tasks."
    rng = np.random.default_rng(seed)
    label, task = labels(rng, 40, 4)
    active = activities(rng, label, task, layers, d_sae, 0.05, None)
    label = permute_labels(permutation_design(label, task, between_groups=False), 1, seed + 10_000)[:, 0]
    solutions = LabelledSolutions(label, task)
    search = search_active_latents(lambda layer: active[layer], range(layers), solutions, n_shuffles, seed)
    return search.table["family_wise_p"].min()


def claims_nothing(p: np.ndarray) -> None:
    "The smallest p is uniform, and at most one study in twenty claims something, give or take chance."
    assert sps.kstest(p, "uniform").pvalue > 0.01, np.quantile(p, [0.05, 0.25, 0.5, 0.75])
    assert sps.binomtest(int((p <= 0.05).sum()), len(p), 0.05, alternative="greater").pvalue > 0.01, (p <= 0.05).mean()


def test_nothing_is_claimed_where_nothing_is():
    claims_nothing(np.array([smallest_p(seed, 2, 64, 99) for seed in range(40)]))


@pytest.mark.slow
def test_nothing_is_claimed_in_two_hundred_studies():
    claims_nothing(np.array([smallest_p(seed, 10, 1024, 399) for seed in range(200)]))


def test_a_latent_that_only_sees_how_hard_a_task_is_tells_nothing_within_tasks():
    "Latents that only know the task: labels shuffled freely make them look like knowledge, within tasks they do not."
    claimed = {"within": 0, "within tasks alone": 0, "freely": 0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        task = np.repeat(np.arange(30), 6)
        easy = rng.random(30) < 0.5
        label = rng.random(180) < np.where(easy, 0.85, 0.15)[task]
        on = (
            rng.random((180, 40)) < np.where(easy[:, None], 0.6, 0.3)[task]
        )  # sees how easy the task is, not whether it was solved
        row, latent = on.nonzero()
        active = ActiveLatents(180, row, latent, np.ones(len(row)), 40)
        in_tasks, alone = LabelledSolutions(label, task), LabelledSolutions(label, np.arange(180))
        by_task = search_active_latents(lambda layer, a=active: a, [0], in_tasks, n_shuffles=99).table
        freely = search_active_latents(lambda layer, a=active: a, [0], alone, n_shuffles=99).table
        claimed["within"] += by_task["family_wise_p"].min() <= 0.05
        claimed["within tasks alone"] += by_task["family_wise_p_within_tasks"].min() <= 0.05
        claimed["freely"] += freely["family_wise_p"].min() <= 0.05
    assert max(claimed["within"], claimed["within tasks alone"]) <= 5 and claimed["freely"] >= 20, claimed


def test_the_null_is_what_a_loop_gives():
    "One sample a task: the separation itself."
    rng = np.random.default_rng(0)
    label, task = labels(rng, 90, 1)
    active = activities(rng, label, task, 1, 200, 0.1, None)[0]
    design = permutation_design(label, task)
    on = active.matrix().toarray().T
    shuffled = permute_labels(design, 50)
    slow = [np.abs(on[y].mean(0) - on[~y].mean(0)).max() for y in shuffled.T]
    assert np.allclose(null_of_maximum(active, weighted_labels(design, shuffled), block=7), slow, atol=1e-5)


def test_labels_are_weighed_once_for_all_layers(monkeypatch):
    "What a permutation weighs does not depend on the layer; it is computed for the two nulls, not for each layer."
    rng = np.random.default_rng(0)
    label, task = labels(rng, 30, 3)
    active = activities(rng, label, task, 5, 40, 0.1, None)
    computed = []

    def spy(design, permuted):
        computed.append(permuted.shape[1])
        return weighted_labels(design, permuted)

    monkeypatch.setattr("codetrace.sae.latent_search.weighted_labels", spy)
    search_active_latents(lambda layer: active[layer], range(5), LabelledSolutions(label, task), n_shuffles=19)
    assert computed == [19, 19]


def at_most(share: float, n: int) -> float:
    "What a true share of 5% exceeds in one of a thousand tests of `n` studies, or `share` where that is more."
    return max(share, sps.binom.ppf(0.999, n, 0.05) / n)


def test_null_latents_are_called_in_one_study_of_twenty_whatever_the_design():
    "Each design by itself, give or take chance, and all of them together."
    table = calibration_table(24)
    tested = table[table["n"] >= 10]
    limits = [at_most(0.07, n) for n in tested["n"]]
    assert (tested["observed"] <= limits).all(), tested[tested["observed"] > limits]
    pooled = (tested["observed"] * tested["n"]).groupby(tested["p"]).sum() / tested.groupby("p")["n"].sum()
    assert pooled.max() <= 0.08 and pooled.min() >= 0.02, pooled
    assert set(tested["design"]) == set(NULL_DESIGNS)


@pytest.mark.slow
def test_null_latents_are_called_in_at_most_seven_of_a_hundred_studies():
    "At nominal 5%: the share of 800 studies of each design and each p, and where a design refuses some, of the rest."
    table = calibration_table(800)
    tested = table[table["n"] >= 400]
    assert len(tested) >= 2 * len(NULL_DESIGNS)
    assert (tested["observed"] <= 0.07).all(), tested.round(3).to_string()


def test_a_planted_latent_is_found_however_few_tasks_are_mixed():
    power = power_table(10)
    assert (power["family_wise_p"] >= 0.9).all(), power


@pytest.mark.slow
def test_a_planted_latent_is_found_in_nine_of_ten_studies_of_each_design():
    power = power_table(200)
    assert (power["family_wise_p"] >= 0.9).all(), power


def test_rows_and_tasks_as_units_would_claim_too_much():
    "The designs can tell: what ignores groups, copies, temperatures or tasks calls null latents significant."
    ignored = {
        "four temperatures pooled": "temperature",
        "near-duplicates in groups of 4": "group",
        "identical solutions": "copies",
        "no mixed task, 5 samples": "task",
    }
    for design, unit in ignored.items():
        claimed = []
        for seed in range(20):
            study = NULL_DESIGNS[design](np.random.default_rng([9, seed]))
            units = {name: values for name, values in study.units.items() if name != unit}
            units.setdefault("task", np.arange(study.active.rows))
            solutions = LabelledSolutions(**units)
            search = search_active_latents(lambda layer, a=study.active: a, [0], solutions, n_shuffles=99, seed=seed)
            claimed.append(search.table[["family_wise_p", "family_wise_p_within_tasks"]].min().min() <= 0.05)
        assert np.mean(claimed) >= 0.15, (design, np.mean(claimed))


def test_p_is_over_every_layer_and_every_position():
    "A score is judged by the largest of all layers and positions, wherever those stand in the list."
    small, large = (draw_near_duplicates_study(np.random.default_rng(seed)) for seed in (1, 2))
    weak = ActiveLatents(small.active.rows, small.active.row[:9], small.active.latent[:9], small.active.value[:9], 64)
    for layers in ([weak, large.active], [large.active, weak]):
        solutions = LabelledSolutions(**large.units)
        search = search_active_latents(lambda layer, a=layers: a[layer], [0, 1], solutions, n_shuffles=99)
        nulls = [
            search_active_latents(lambda layer, a=active: a, [0], solutions, n_shuffles=99).nulls["family_wise_p"]
            for active in layers
        ]
        assert np.allclose(search.nulls["family_wise_p"], np.max(nulls, 0)) and nulls[0].mean() != nulls[1].mean()


@pytest.mark.parametrize("positions", [("last_prompt", "last_generated"), ("last_generated", "last_prompt")])
def test_the_second_p_is_over_all_positions(positions):
    "Whichever position comes first, a score is judged by the largest of both."
    made, _ = draw_planted_activations(seed=4)
    table, searches = search_all_positions(replace(made, positions=positions), n_shuffles=99)
    for name, score in P_COLUMNS.items():
        nulls = [search.nulls[name] for search in searches.values()]
        assert np.abs(nulls[0] - nulls[1]).min() < np.abs(nulls[0] - nulls[1]).max()
        expected = family_wise_p(table[score], np.maximum(*nulls))
        assert np.array_equal(table[f"{name}_all_positions"], expected)
        assert (table[f"{name}_all_positions"] >= table[name]).all()
        for first in nulls:
            assert not np.array_equal(expected, family_wise_p(table[score], first))


def test_no_baseline_is_picked_for_being_lucky():
    """Sixty readouts of true AUROC 0.60 against a log-probability of 0.68: the best when choosing is often a readout.

    A latent of 0.66 beats the readout that was picked more often than it beats both."""
    beats = {"the picked one": [], "all": []}
    for seed in range(80):
        rng = np.random.default_rng([5, seed])
        choosing, judging = (rng.random(n) < 0.25 for n in (82, 66))
        shared = [rng.normal(size=len(label)) for label in (choosing, judging)]
        readouts = [
            0.36 * label + 0.7**0.5 * common + 0.3**0.5 * rng.normal(size=(60, len(label)))
            for label, common in zip((choosing, judging), shared)
        ]
        logprob = [0.66 * label + rng.normal(size=len(label)) for label in (choosing, judging)]
        latent = 0.58 * judging + 0.7**0.5 * rng.normal(size=66) + 0.3**0.5 * shared[1]
        picked = int(np.argmax([auroc(choosing, score) for score in readouts[0]]))
        baselines = {"readout": readouts[1][picked], "log-probability": logprob[1]}
        better_when_chosen = auroc(choosing, readouts[0][picked]) > auroc(choosing, logprob[0])
        lucky = "readout" if better_when_chosen else "log-probability"

        def area_of(score, label=judging):
            return lambda weights: auroc(label, score, weights)

        statistics = {name: area_of(score) for name, score in baselines.items()}
        differences = simultaneous_differences(area_of(latent), statistics, np.arange(66), 200, seed=seed)
        alone = simultaneous_differences(area_of(latent), {lucky: statistics[lucky]}, np.arange(66), 200, seed=seed)
        beats["the picked one"].append(verdict_on_baselines(alone).startswith("beats"))
        beats["all"].append(verdict_on_baselines(differences).startswith("beats"))
    assert np.mean(beats["all"]) <= 0.05 < np.mean(beats["the picked one"]), {k: np.mean(v) for k, v in beats.items()}


@pytest.mark.slow
def test_differences_to_all_baselines_hold_together():
    "With seven baselines that are as good, all intervals hold in 93 to 99 of 100 studies of 40 and 66 tasks."
    for tasks in (40, 66):
        held = []
        for seed in range(400):
            rng = np.random.default_rng([tasks, seed])
            task = np.repeat(np.arange(tasks), 3)
            label = rng.random(len(task)) < rng.beta(2, 2, tasks)[task]
            noise = 0.6 * rng.normal(size=tasks)[task] + 0.8 * rng.normal(size=(8, len(task)))
            scores = {f"score {k}": score for k, score in enumerate(noise + 0.5 * label)}
            areas = {name: partial(auroc, label, score) for name, score in scores.items()}
            first = areas.pop("score 0")
            table = simultaneous_differences(first, areas, task, 400, seed=seed)
            held.append(((table["low"] <= 0) & (table["high"] >= 0)).all())
        assert 0.93 <= np.mean(held) <= 0.99, (tasks, np.mean(held))
