"""What a notebook cannot hold of `core.metrics`: oracles on random input, and coverage by simulation with samples that share tasks."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from sklearn import metrics as skm

from codetrace.core.errors import BadInput
from codetrace.core.metrics import (
    auprc,
    auroc,
    auroc_interval,
    balanced_accuracy,
    brier_score,
    calibration_error,
    cluster_interval,
    f1,
    mcc,
    roc_with_band,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 60), levels=st.integers(1, 30))
def test_measures_are_scikit_learns(seed, n, levels):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    s = rng.integers(0, levels, n) / 3
    w = rng.integers(0, 4, (3, n))
    y[:2] = True, False
    w[:, :2] = 1
    assert np.allclose(auroc(y, s, w), [skm.roc_auc_score(y, s, sample_weight=v) for v in w])
    assert np.allclose(auprc(y, s, w), [skm.average_precision_score(y, s, sample_weight=v) for v in w])
    called = s >= np.median(s)
    assert np.allclose(f1(y, called, w), [skm.f1_score(y, called, sample_weight=v) for v in w])
    assert np.allclose(mcc(y, called, w), [skm.matthews_corrcoef(y, called, sample_weight=v) for v in w])
    assert np.allclose(
        balanced_accuracy(y, called, w), [skm.balanced_accuracy_score(y, called, sample_weight=v) for v in w]
    )
    p = rng.random(n)
    assert np.allclose(brier_score(y, p, w), [skm.brier_score_loss(y, p, sample_weight=v) for v in w])


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    y = rng.random(50) < 0.4
    s = rng.normal(size=50).round(1)
    w = rng.integers(0, 4, 50)
    for measure in (auroc, auprc, brier_score, calibration_error):
        value = s if measure in (auroc, auprc) else sps.norm.cdf(s)
        if measure is not calibration_error:  # whose bins are those of the rows that were drawn from
            assert np.isclose(measure(y, value, w), measure(np.repeat(y, w), np.repeat(value, w)))


def test_far_from_its_bounds_the_interval_is_students():
    x = np.random.default_rng(1).normal(size=40)
    expected = sps.t.interval(0.95, 39, x.mean(), sps.sem(x))

    def weighted_mean(weights):
        return (weights * x).sum(-1) / weights.sum(-1)

    value, low, high = cluster_interval(weighted_mean, np.arange(40), n_resamples=20_000, bounds=(-1e3, 1e3))
    assert value == pytest.approx(x.mean()) and np.allclose((low, high), expected, atol=0.012)


def test_labels_and_scores_must_fit():
    with pytest.raises(BadInput, match="one of each a row"):
        auroc([0, 1, 1], [0.1, 0.2])
    with pytest.raises(BadInput, match="NaN"):
        f1([0, 1], [np.nan, 1])


MEASURES_OF_SCORES = (auroc, auprc)
MEASURES_OF_DECISIONS = (f1, mcc, balanced_accuracy)
MEASURES_OF_PROBABILITIES = (brier_score, calibration_error)
ALL_MEASURES = MEASURES_OF_SCORES + MEASURES_OF_DECISIONS + MEASURES_OF_PROBABILITIES

extended_score = st.one_of(st.sampled_from([np.inf, -np.inf, 0.0, 1.0]), st.floats(-1e308, 1e308))


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), extended_score), max_size=12), seed=st.integers(0, 99))
def test_infinite_scores_are_ranks_like_any_other(rows, seed):
    "AUROC by its definition, over all pairs; whatever the order of the rows."
    label = np.array([y for y, _ in rows], bool)
    score = np.array([s for _, s in rows], float)
    pairs = [(s > z) + (s == z) / 2 for s in score[label] for z in score[~label]]
    expected = np.mean(pairs) if pairs else np.nan
    order = np.random.default_rng(seed).permutation(len(rows))
    for measure in MEASURES_OF_SCORES:
        assert np.array_equal(measure(label, score), measure(label[order], score[order]), equal_nan=True) or np.isclose(
            measure(label, score), measure(label[order], score[order])
        )
        ranks = sps.rankdata(score)
        assert np.isclose(measure(label, score), measure(label, ranks), equal_nan=True)
    assert np.isclose(auroc(label, score), expected, equal_nan=True)


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_equal_infinite_scores_are_ties(infinity):
    for label in ([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]):
        assert auroc(label, [infinity] * 4) == auprc(label, [infinity] * 4) == 0.5
        band = roc_with_band(label, [infinity] * 4, range(4))
        assert np.allclose(band["true_positive_rate"], band["false_positive_rate"])


@pytest.mark.parametrize("measure", ALL_MEASURES)
def test_what_is_no_label_is_refused(measure):
    for label in ([1.0, np.nan, 0.0], [1, None, 0], [0, 1, 2], [1, -1, 1], ["a", "b", "c"], [0.5, 0, 1]):
        with pytest.raises(BadInput):
            measure(label, [1, 0, 1])
    with pytest.raises(BadInput, match="NaN"):
        measure([1, 0, 1], [1, np.nan, 0])
    for weights in ([1, -1, 1], [1, np.nan, 1], [1, np.inf, 1], [1, 1]):
        with pytest.raises(BadInput):
            measure([1, 0, 1], [1, 0, 1], weights)
    assert measure([True, False, True], [1, 0, 1]) == measure([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])


@pytest.mark.parametrize("measure", ALL_MEASURES)
def test_nothing_and_one_class_give_what_is_documented(measure):
    assert np.isnan(measure([], []))
    assert np.isnan(measure([], [], np.ones((3, 0)))).tolist() == [True] * 3
    assert np.isnan(measure([1, 0], [1, 0], [0, 0]))  # no row counts
    values = [float(measure([label] * 3, [0, 1, 1])) for label in (0, 1)]
    expected = {
        auroc: [np.nan, np.nan],
        auprc: [np.nan, 1],
        f1: [0, 0.8],
        mcc: [0, 0],
        balanced_accuracy: [np.nan, np.nan],
        brier_score: [2 / 3, 1 / 3],
    }
    if measure in expected:
        assert np.allclose(values, expected[measure], equal_nan=True)


def test_intervals_of_nothing_one_class_and_one_task():
    for label, clusters in (([], []), ([1, 1], [0, 1]), ([0, 0], [0, 1]), ([0, 1], [0, 0])):
        score = list(range(len(label)))
        assert np.isnan(auroc_interval(label, score, clusters)[1:]).all()
        assert np.isnan(cluster_interval(partial(auroc, label, score), clusters)[1:]).all()
        if len(set(label)) < 2:
            with pytest.raises(BadInput, match="needs both"):
                roc_with_band(label, score, clusters)
    for bad in ([0, 1, 2], [0, np.nan], [None, "a"]):
        with pytest.raises(BadInput):
            auroc_interval([0, 1], [0, 1], bad)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), tasks=st.integers(2, 12), level=st.floats(0.5, 0.9999))
def test_an_interval_has_width_and_stays_between_its_bounds(seed, tasks, level):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(tasks), 2)
    label = rng.random(2 * tasks) < 0.5
    score = rng.integers(0, 3, 2 * tasks) + 3 * label * rng.integers(0, 2)  # perfect in half of the studies
    for value, low, high in (
        cluster_interval(partial(auroc, label, score), task, 100, level, bounds=(0, 1)),
        auroc_interval(label, score, task, level),
    ):
        assert np.isnan(low) or (0 <= low <= value <= high <= 1 and low < high)


def study(rng, tasks: int, samples: int):
    "Labels, scores and tasks; the true AUROC is 0.75, samples of a task share their difficulty and a part of their score."
    task = np.repeat(np.arange(tasks), samples)
    label = rng.random(len(task)) < rng.beta(1, 1.5, tasks)[task]
    score = rng.normal(0, 0.6, tasks)[task] + rng.normal(0, 0.8, len(task)) + label * np.sqrt(2) * sps.norm.ppf(0.75)
    return label, score, task


def auroc_difference(label, score, baseline, weights):
    return auroc(label, score, weights) - auroc(label, baseline, weights)


def paired_study(rng, tasks: int, samples: int, areas: tuple[float, float], unequal: bool, share: float = 0.4):
    "Labels, two scores that share a half of their noise, and tasks; the true AUROCs are `areas`."
    sizes = rng.integers(1, 2 * samples, tasks) if unequal else np.full(tasks, samples)
    task = np.repeat(np.arange(tasks), sizes)
    label = rng.random(len(task)) < rng.beta(4 * share, 4 * (1 - share), tasks)[task]
    noise = 0.6 * rng.normal(size=(tasks, 3))[task] + 0.8 * rng.normal(size=(len(task), 3))
    shifts = np.sqrt(2) * sps.norm.ppf(areas)
    scores = [shift * label + 0.7 * noise[:, 0] + 0.714 * noise[:, k] for k, shift in enumerate(shifts, 1)]
    return label, *scores, task


def difference_coverage(trials: int, **design) -> float:
    "How often the interval of a paired AUROC difference contains the truth, of the studies that have both labels."
    truth = design["areas"][0] - design["areas"][1]
    hits = []
    for trial in range(trials):
        rng = np.random.default_rng([trial, design["tasks"], design["samples"]])
        label, score, baseline, task = paired_study(rng, **design)
        if label.any() and not label.all():
            _, low, high = cluster_interval(partial(auroc_difference, label, score, baseline), task, 400, seed=trial)
            hits.append(low <= truth <= high)
    return float(np.mean(hits))


def test_the_interval_of_an_auroc_difference_covers_at_30_tasks_of_5_samples():
    "It was 0.907 with quantiles of resamples."
    coverage = difference_coverage(400, tasks=30, samples=5, areas=(0.75, 0.70), unequal=False)
    assert 0.93 <= coverage <= 0.98, coverage


@pytest.mark.slow
@pytest.mark.parametrize("areas", [(0.75, 0.70), (0.9, 0.85), (0.75, 0.75), (0.95, 0.7)])
@pytest.mark.parametrize(("samples", "unequal"), [(1, False), (5, False), (5, True)])
@pytest.mark.parametrize("tasks", [12, 30, 60])
def test_the_interval_of_an_auroc_difference_covers(tasks, samples, unequal, areas):
    "Never under 93%; with 12 to 30 samples in all, few values are possible, and it is too long instead."
    coverage = difference_coverage(2000, tasks=tasks, samples=samples, areas=areas, unequal=unequal)
    assert 0.93 <= coverage <= (0.975 if tasks * samples > 100 else 1), coverage


def covered(tasks: int, samples: int, trials: int, seed: int) -> dict[str, float]:
    "How often each interval contains the truth."
    shift = np.sqrt(2) * sps.norm.ppf(0.75)
    sensitivity = sps.norm.sf(0.5, loc=shift)
    specificity = sps.norm.cdf(0.5)
    truth = {"auroc": 0.75, "se": 0.75, "balanced accuracy": (sensitivity + specificity) / 2, "difference": 0.25}
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(truth, 0)
    for _ in range(trials):
        label, score, task = study(rng, tasks, samples)
        baseline = rng.normal(size=len(task))
        ends = {
            "auroc": cluster_interval(partial(auroc, label, score), task, 600, bounds=(0, 1)),
            "se": auroc_interval(label, score, task),
            "balanced accuracy": cluster_interval(
                partial(balanced_accuracy, label, score > 0.5), task, 600, bounds=(0, 1)
            ),
            "difference": cluster_interval(partial(auroc_difference, label, score, baseline), task, 600),
        }
        for name, (_, low, high) in ends.items():
            hits[name] += low <= truth[name] <= high
    return {name: n / trials for name, n in hits.items()}


def test_intervals_cover_in_a_small_simulation():
    coverage = covered(60, 4, 60, seed=0)
    assert all(0.85 < share <= 1 for share in coverage.values()), coverage


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "samples"), [(60, 4), (100, 5)])
def test_intervals_cover_as_often_as_they_say(tasks, samples):
    "At nominal 95%: between 92% and 97.5% of 500 studies."
    coverage = covered(tasks, samples, 500, seed=tasks)
    assert all(0.92 <= share <= 0.975 for share in coverage.values()), coverage


def noise_activations(n: int = 60, d_model: int = 96):
    "States that say nothing of the label, with more dimensions than rows: a probe is perfect on what it was fitted on."
    from codetrace.sae.dataset import LabelledActivations
    from codetrace.sae.sae import random_sae

    rng = np.random.default_rng(0)
    states = rng.normal(size=(n, d_model)).astype(np.float32)
    columns = {"task_id": np.arange(n), "group": np.arange(n), "label": rng.random(n) < 0.5, "split": "sae"}
    columns |= {"prompt_tokens": 10, "generated_tokens": 10, "mean_logprob": -1.0}
    sae = random_sae(d_model, 32, 4)
    return LabelledActivations(pd.DataFrame(columns), ("last_prompt",), (0,), lambda *_: states, lambda _: sae)


def test_thresholds_of_a_readout_are_of_scores_out_of_fold():
    "In sample, half-way between the classes looks perfect; out of fold nothing is."
    from codetrace.sae.linear_probes import best_threshold
    from codetrace.sae.predictors import probes_at_layer, refit_best_probe

    noise = noise_activations()
    label = noise.rows["label"].to_numpy()
    probe = next(p for p in probes_at_layer(noise, "last_prompt", 0) if p.name == "logistic probe")
    readout = refit_best_probe(probe, noise)
    in_sample = readout.score(noise)[0]
    assert auroc(label, in_sample) > 0.95 and auroc(label, probe.out_of_fold) < 0.75
    threshold = readout.thresholds["correct"][0]
    assert threshold == best_threshold(label, probe.out_of_fold)
    assert threshold != best_threshold(label, in_sample)
