"""What a notebook cannot hold of `core.metrics`: oracles on random input, and coverage by simulation with samples that share tasks."""

from functools import partial

import numpy as np
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
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 60), levels=st.integers(1, 30))
def test_measures_are_scikit_learns(seed, n, levels):
    rng = np.random.default_rng(seed)
    y, s, w = rng.random(n) < 0.5, rng.integers(0, levels, n) / 3, rng.integers(0, 4, (3, n))
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
    y, s, w = rng.random(50) < 0.4, rng.normal(size=50).round(1), rng.integers(0, 4, 50)
    for measure in (auroc, auprc, brier_score, calibration_error):
        value = s if measure in (auroc, auprc) else sps.norm.cdf(s)
        if measure is not calibration_error:  # whose bins are those of the rows that were drawn from
            assert np.isclose(measure(y, value, w), measure(np.repeat(y, w), np.repeat(value, w)))


def test_the_interval_is_scipys_bca():
    x = np.random.default_rng(1).exponential(size=40)
    expected = sps.bootstrap((x,), np.mean, n_resamples=20_000, rng=np.random.default_rng(2)).confidence_interval

    def weighted_mean(weights):
        return (weights * x).sum(-1) / weights.sum(-1)

    value, low, high = cluster_interval(weighted_mean, np.arange(40), n_resamples=20_000)
    assert value == pytest.approx(x.mean()) and np.allclose((low, high), expected, atol=0.012)


def test_labels_and_scores_must_fit():
    with pytest.raises(BadInput, match="one of each a row"):
        auroc([0, 1, 1], [0.1, 0.2])
    with pytest.raises(BadInput, match="NaN"):
        f1([0, 1], [np.nan, 1])


def study(rng, tasks: int, samples: int):
    "Labels, scores and tasks; the true AUROC is 0.75, samples of a task share their difficulty and a part of their score."
    task = np.repeat(np.arange(tasks), samples)
    label = rng.random(len(task)) < rng.beta(1, 1.5, tasks)[task]
    score = rng.normal(0, 0.6, tasks)[task] + rng.normal(0, 0.8, len(task)) + label * np.sqrt(2) * sps.norm.ppf(0.75)
    return label, score, task


def auroc_difference(label, score, baseline, weights):
    return auroc(label, score, weights) - auroc(label, baseline, weights)


def covered(tasks: int, samples: int, trials: int, seed: int) -> dict[str, float]:
    "How often each interval contains the truth."
    shift = np.sqrt(2) * sps.norm.ppf(0.75)
    sensitivity, specificity = sps.norm.sf(0.5, loc=shift), sps.norm.cdf(0.5)
    truth = {"auroc": 0.75, "se": 0.75, "balanced accuracy": (sensitivity + specificity) / 2, "difference": 0.25}
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(truth, 0)
    for _ in range(trials):
        label, score, task = study(rng, tasks, samples)
        baseline = rng.normal(size=len(task))
        ends = {
            "auroc": cluster_interval(partial(auroc, label, score), task, n_resamples=600),
            "se": auroc_interval(label, score, task),
            "balanced accuracy": cluster_interval(
                partial(balanced_accuracy, label, score > 0.5), task, n_resamples=600
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
