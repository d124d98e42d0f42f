"Measures and their intervals on numbers small enough for pen and paper, or against loops over pairs and repeated rows."

from functools import partial

import numpy as np
import pytest
from scipy import stats as sps
from scipy.special import expit, logit
from sklearn import metrics as skm

from codetrace.core.errors import BadInput
from codetrace.core.metrics import (
    _statistic_in_batches,
    _t_interval,
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
    trivial_f1,
)
from codetrace.core.stats import effective_df

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

LABEL = [0, 0, 1, 1]
SCORE = [0.1, 0.4, 0.35, 0.8]
TWICE = [[1, 1, 1, 1], [2, 1, 0, 1]]  # The rows as they are, and with the first row twice and the third left out


def test_measures_of_scores():
    "Three of four pairs are in order; then two of two, one of them counted twice."
    assert auroc(LABEL, SCORE) == 0.75
    assert auroc(LABEL, SCORE, TWICE).tolist() == [0.75, 1]
    assert auprc(LABEL, SCORE) == pytest.approx((1 + 2 / 3) / 2)
    assert auprc(LABEL, SCORE, TWICE).tolist() == pytest.approx([(1 + 2 / 3) / 2, 1])
    assert auprc([1, 0, 1], [2, 2, 1]) == pytest.approx((1 / 2 + 2 / 3) / 2)  # A tie counts as one threshold
    assert auprc([0, 1], [2, 1], [0, 1]) == 1  # The first threshold predicts no row that counts
    assert np.isnan(auroc([1, 1], [0, 1])) and np.isnan(auprc([0, 0], [0, 1]))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_scores_of_any_kind_of_number_are_ranked(dtype):
    "Minus one has no place among unsigned numbers, and minus false is no number."
    score = np.array([0, 0, 1, 1], dtype)
    assert auroc([0, 1, 0, 1], score) == auprc([0, 1, 0, 1], score) == 0.5
    assert auroc([0, 0, 1, 1], score) == auprc([0, 0, 1, 1], score) == 1
    assert roc_with_band([0, 0, 1, 1], score, range(4), 2)["true_positive_rate"][0] == 1


def test_only_shares_of_the_weight_count():
    "A tenth of a row each is as good as a row each."
    weights = np.full(10, 0.01)
    for measure in (f1, mcc, balanced_accuracy):
        assert measure(*DECIDED, weights) == pytest.approx(measure(*DECIDED))
    for measure in (auroc, auprc, brier_score, calibration_error):
        assert measure(LABEL, SCORE, weights[:4]) == pytest.approx(measure(LABEL, SCORE))
    assert f1([0], [0], [0.01]) == mcc([0], [0], [0.01]) == 0


# Three true positives, one false positive, two false negatives, four true negatives
DECIDED = ([1] * 5 + [0] * 5, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0])


def test_measures_of_decisions():
    assert f1(*DECIDED) == pytest.approx(6 / 9)
    assert mcc(*DECIDED) == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))
    assert balanced_accuracy(*DECIDED) == pytest.approx((3 / 5 + 4 / 5) / 2)
    without_mistakes = [1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    weights = [[1] * 10, [2] * 10, without_mistakes]
    assert f1(*DECIDED, weights).tolist() == pytest.approx([6 / 9, 6 / 9, 1])
    assert mcc(*DECIDED, weights).tolist() == pytest.approx([0.4082483, 0.4082483, 1])
    assert balanced_accuracy(*DECIDED, weights).tolist() == pytest.approx([0.7, 0.7, 1])
    assert mcc(*(1 - np.array(DECIDED))) == mcc(*DECIDED)


def test_decisions_about_nothing():
    assert f1([0, 0], [0, 0]) == mcc([0, 1], [0, 0]) == mcc([1, 1], [0, 1]) == 0
    assert np.isnan([f1([1, 0], [1, 0], [0, 0]), mcc([1, 0], [1, 0], [0, 0])]).all()
    assert np.isnan([balanced_accuracy([1, 1], [1, 0]), balanced_accuracy([0, 0], [1, 0])]).all()


def test_f1_of_everything_is_between_its_ends(wrong_types_pass):
    assert [trivial_f1(share) for share in (0, 0.25, 1)] == [0, 0.4, 1]
    assert trivial_f1(np.array([0, 1])).tolist() == [0, 1]
    for share in (-0.01, 1.01, np.array([0.5, 2])):
        with pytest.raises(BadInput, match=r"^share .*: give the share of rows with the label, from 0 to 1$"):
            trivial_f1(share)


def test_measures_of_probabilities():
    assert brier_score([1, 0], [0.8, 0.4]) == pytest.approx((0.04 + 0.16) / 2)
    assert brier_score([1, 0], [0.8, 0.4], [[1, 1], [3, 1]]).tolist() == pytest.approx([0.1, (3 * 0.04 + 0.16) / 4])
    assert brier_score([1, 0], [1, 0]) == 0


def test_calibration_is_of_bins_with_equally_many_rows():
    "Two bins: in the lower the probabilities miss by -0.1 + 0.8, in the upper by 0.2 + 0.1."
    label = [0, 1, 1, 1]
    probability = [0.1, 0.2, 0.8, 0.9]
    assert calibration_error(label, probability, bins=2) == pytest.approx((0.7 + 0.3) / 4)
    assert calibration_error(label, probability, bins=1) == pytest.approx(0.25)
    weights = [[1, 1, 1, 1], [1, 0, 1, 1]]
    assert calibration_error(label, probability, weights, bins=2).tolist() == pytest.approx([0.25, 0.4 / 3])
    on_the_edge = calibration_error([1, 0, 1], [0.2, 0.5, 0.8], bins=2)
    assert on_the_edge == pytest.approx((abs(0.8 - 0.5) + 0.2) / 3)  # It goes with what is below
    assert calibration_error([1, 0, 0], [0.5] * 3, bins=3) == pytest.approx(0.5 / 3)  # Equal probabilities: one bin
    assert np.isnan(calibration_error([], [], np.ones((2, 0)))).tolist() == [True, True]


def test_calibration_has_ten_bins():
    "Eleven rows: the tenths of the way from 0 to 1 are edges, and each row from the second has a bin of its own."
    probability = np.linspace(0, 1, 11)
    label = np.arange(1, 12) % 2
    misses = np.abs(probability - label)
    misses[0] = misses[1] = abs(misses[0] - misses[1]) / 2
    assert calibration_error(label, probability) == pytest.approx(misses.sum() / 11)


REFUSALS = {
    "labels ['a', 'b', 'c']: give True or False, or 1 or 0, for each row": (auroc, list("abcd"), [1, 2, 3, 4]),
    "2 labels are NaN: leave those rows out of every measure alike": (auroc, [np.nan, 1, np.nan], [1, 2, 3]),
    "label -1 is neither true nor false: give True or False, or 1 or 0": (auroc, [1, -1, 2], [1, 2, 3]),
    "decision 2 is neither true nor false: give True or False, or 1 or 0": (f1, [1, 0], [2, 3]),
    "1 decisions are NaN: leave those rows out of every measure alike": (f1, [1, 0], [np.nan, 1]),
    "decisions [None, 'b']: give True or False, or 1 or 0, for each row": (f1, [1, 0], [None, "b"]),
    "(2,) labels, (3,) scores, (2,) weights: one of each a row": (auprc, [1, 0], [1, 2, 3]),
    "(2,) labels, (2,) scores, (4, 3) weights: one of each a row": (auprc, [1, 0], [1, 2], np.ones((4, 3))),
    "(1, 2) labels, (1, 2) scores, (1, 2) weights: one of each a row": (auroc, [[1, 0]], [[1, 2]], [[1, 1]]),
    "() labels, () scores, () weights: one of each a row": (auroc, 1, 0.5, 1),
    "2 scores are NaN: leave those rows out of every measure alike": (auroc, [1, 0, 1], [np.nan, 1, np.nan]),
    "a weight is negative, infinite or NaN: give how often each row counts, 0 or more": (f1, [1, 0], [1, 0], [1, -1]),
    "probability 1.5: give numbers from 0 to 1; a score is measured by `auroc`": (brier_score, [1, 0], [1.5, 2]),
    "probability -0.1: give numbers from 0 to 1; a score is measured by `auroc`": (calibration_error, [1], [-0.1]),
    "bins=0: give at least 1, such as 10": (partial(calibration_error, bins=0), [1], [0.5]),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_refusal_names_the_value_and_what_to_give(message, wrong_types_pass):
    measure, *arguments = REFUSALS[message]
    with pytest.raises(BadInput) as refusal:
        measure(*arguments)
    assert str(refusal.value) == message


def test_degrees_of_freedom_are_few_where_one_task_is_all_of_the_variance():
    "A kurtosis of 1/pq - 3 for one of twenty; with equal sizes, one less than there are tasks."
    assert effective_df(np.r_[1.0, np.zeros(19)]) == pytest.approx(40 / (1 / (0.05 * 0.95) - 4))
    assert effective_df(np.array([1.0, -1, 1, -1])) == 3
    assert effective_df(np.full(7, 0.25)) == 6
    assert effective_df(np.array([0.5, 1.5])) == 1


@pytest.mark.parametrize(("value", "bounds", "place"), [(0.5, (0.0, 1.0), 0.5), (0.5, (-1.0, 1.0), 0.75)])
def test_the_interval_is_students_on_the_logit_scale(value, bounds, place):
    span = bounds[1] - bounds[0]
    half = sps.t.ppf(0.95, 10) * 0.1 / span / (place * (1 - place))
    ends = [bounds[0] + span * expit(logit(place) + sign * half) for sign in (-1, 1)]
    assert _t_interval(value, 0.1, 10, 11, 0.9, bounds) == pytest.approx(tuple(ends))


@pytest.mark.parametrize(("value", "low", "high"), [(1, 0.7, 1), (0, 0, 0.3), (0.5, 0.2, 0.8), (0.1, 0, 0.4)])
def test_without_variance_the_interval_is_what_so_many_tasks_can_tell(value, low, high):
    "At a level of 1 - 2 * 0.7**10, ten tasks leave three tenths of the span to either side."
    level = 1 - 2 * 0.7**10
    assert _t_interval(value, 0.0, 9, 10, level, (0.0, 1.0)) == pytest.approx((low, high))
    assert _t_interval(value, 1e-12, 9, 10, level, (0.0, 1.0)) == pytest.approx((low, high))
    widened = _t_interval(2 * value - 1, 0.0, 9, 10, level, (-1.0, 1.0))
    assert widened == pytest.approx((2 * low - 1, 2 * high - 1))
    assert _t_interval(2 * value - 1, 1.5e-12, 9, 10, level, (-1.0, 1.0)) == pytest.approx(widened)


def test_resamples_are_measured_in_batches_of_four_million_weights():
    batches = []

    def first_weight(weights):
        batches.append(weights.shape)
        return np.where(weights[:, 0] == 2, np.nan, weights[:, 0])

    weights = np.array([[5.0], [2], [3], [4], [1], [6]])
    values = _statistic_in_batches(first_weight, weights, np.zeros(1_000_000, int))
    assert values.tolist() == [5, 3, 4, 1, 6] and batches == [(4, 1_000_000), (2, 1_000_000)]
    assert _statistic_in_batches(np.ravel, weights, np.zeros(1, int)).tolist() == [5, 2, 3, 4, 1, 6]


X = np.array([0.3, -0.2, 0.5, 0.1, 0.4, 0.2, -0.1, 0.6])
TASKS = np.array(["b", "a", "b", "c", "c", "a", "d", "d"])


def mean_of_x(weights):
    return (weights * X).sum(-1) / weights.sum(-1)


def test_an_interval_over_tasks_is_what_repeated_rows_give():
    "Each resample as a list of rows, each task left out in turn."
    names = np.unique(TASKS)
    counts = np.random.default_rng(3).multinomial(4, [1 / 4] * 4, 50)
    drawn = [np.concatenate([np.repeat(X[TASKS == name], k) for name, k in zip(names, row)]).mean() for row in counts]
    left_out = np.array([X[TASKS != name].mean() for name in names])
    se = np.std(drawn) * np.sqrt(4 / 3)
    expected = _t_interval(X.mean(), se, effective_df(left_out), 4, 0.9, (-1.0, 1.0))
    assert cluster_interval(mean_of_x, TASKS, 50, 0.9, 3) == pytest.approx((X.mean(), *expected))


def test_intervals_have_the_defaults_that_are_documented():
    plain = cluster_interval(mean_of_x, TASKS)
    assert plain == cluster_interval(mean_of_x, TASKS, n_resamples=2000, level=0.95, seed=0, bounds=(-1.0, 1.0))
    label, score, task = clustered_rows()
    assert auroc_interval(label, score, task) == auroc_interval(label, score, task, level=0.95)
    band = roc_with_band(label, score, task)
    expected = roc_with_band(label, score, task, n_resamples=500, level=0.95, seed=0)
    assert all(np.array_equal(band[name], expected[name]) for name in band)


def total_of_x(weights):
    return (weights * X).sum(-1) / 8


def test_an_interval_needs_two_tasks_and_two_values():
    value, low, high = cluster_interval(total_of_x, ["t"] * 8, 50)
    assert value == X.mean() and np.isnan([low, high]).all()
    both = [1, 0, 1, 0]
    measure = partial(auroc, both, [1, 0, 0, 1])
    assert np.isfinite(cluster_interval(measure, [0, 0, 1, 1], 50, bounds=(0, 1))).all()
    apart = partial(auroc, both, [3, 1, 2, 0])
    assert cluster_interval(apart, [0, 1, 0, 1], 50, bounds=(0, 1))[0] == 1  # Each task has one label:
    assert np.isnan(cluster_interval(apart, [0, 1, 0, 1], 50, bounds=(0, 1))[1:]).all()  # alone, it has no AUROC
    assert np.isnan(cluster_interval(measure, ["t"] * 4, 50, bounds=(0, 1))[1:]).all()
    value, low, high = cluster_interval(partial(auroc, [1, 1], [0, 1]), [0, 1])
    assert np.isnan([value, low, high]).all()


INTERVAL_REFUSALS = {
    "n_resamples=1: give at least 2; 2000 is usual": dict(n_resamples=1),
    "level 0: give a confidence level between 0 and 1, such as 0.95": dict(level=0),
    "level 1: give a confidence level between 0 and 1, such as 0.95": dict(level=1),
    "the measure is 0.225, outside of its bounds (0.3, 1): give bounds=(lowest, highest)": dict(bounds=(0.3, 1)),
    "the measure is 0.225, outside of its bounds (-1, 0.2): give bounds=(lowest, highest)": dict(bounds=(-1, 0.2)),
    "2 rows have no task (None or NaN): give the task of each row": dict(clusters=[None, 1, 1, 1, 1, 1, 1, np.nan]),
}


@pytest.mark.parametrize("message", INTERVAL_REFUSALS)
def test_an_interval_that_cannot_be_is_refused(message):
    with pytest.raises(BadInput) as refusal:
        cluster_interval(**{"statistic": mean_of_x, "clusters": TASKS} | INTERVAL_REFUSALS[message])
    assert str(refusal.value) == message


def test_two_resamples_and_a_value_on_its_bound_are_enough():
    low = X.mean() - 1e-9
    high = X.mean()
    assert len(cluster_interval(mean_of_x, TASKS, 2, bounds=(-1.0, high))) == 3
    assert cluster_interval(mean_of_x, TASKS, 2, bounds=(X.mean(), 1.0))[0] == high > low


def clustered_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Labels, scores with ties and twelve tasks, one of them with as many samples as all others."
    rng = np.random.default_rng(2)
    task = np.repeat(np.arange(12), [12, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1])
    label = rng.random(len(task)) < 0.5
    return label, rng.integers(0, 6, len(task)) + 2.0 * label * (task < 1), task


def se_by_pairs(label, score, task) -> tuple[float, float]:
    "Obuchowski's standard error, from all pairs; and what each task adds, as degrees of freedom."

    def wins(i, j):
        return (score[i] > score[j]) + (score[i] == score[j]) / 2

    positives = np.flatnonzero(label)
    negatives = np.flatnonzero(~label)
    of_positive = {i: np.mean([wins(i, j) for j in negatives]) for i in positives}
    of_negative = {j: np.mean([wins(i, j) for i in positives]) for j in negatives}
    area = np.mean(list(of_positive.values()))
    names = np.unique(task)
    from_positives = np.array([sum(of_positive[i] - area for i in positives if task[i] == name) for name in names])
    from_negatives = np.array([sum(of_negative[j] - area for j in negatives if task[j] == name) for name in names])
    m = len(positives)
    n = len(negatives)
    tasks_m = len(set(task[positives]))
    tasks_n = len(set(task[negatives]))
    variance = tasks_m / (tasks_m - 1) * (from_positives**2).sum() / m**2
    variance += tasks_n / (tasks_n - 1) * (from_negatives**2).sum() / n**2
    variance += 2 * len(names) / (len(names) - 1) * (from_positives * from_negatives).sum() / (m * n)
    return np.sqrt(variance), effective_df(from_positives / m + from_negatives / n)


def test_the_interval_of_an_auroc_is_obuchowskis():
    label, score, task = clustered_rows()
    se, df = se_by_pairs(label, score, task)
    area = skm.roc_auc_score(label, score)
    assert df < 10
    expected = _t_interval(area, se, df, 12, 0.8, (0.0, 1.0))
    assert auroc_interval(label, score, task, 0.8) == pytest.approx((area, *expected))


def test_with_a_task_a_row_the_standard_error_is_delongs():
    "Placements of the two true rows are 1/2 and 1, those of the two false rows 1 and 1/2."
    value, low, high = auroc_interval(LABEL, SCORE, range(4))
    se = np.sqrt(0.125 / 2 + 0.125 / 2)
    assert (value, low, high) == pytest.approx((0.75, *_t_interval(0.75, se, 3, 4, 0.95, (0.0, 1.0))))


def test_in_perfect_order_the_interval_is_what_so_many_tasks_can_tell():
    value, low, high = auroc_interval([0, 0, 1, 1], [0, 1, 2, 3], range(4))
    assert value == high == 1 and low == pytest.approx(0.025 ** (1 / 4))


def test_one_task_with_a_label_has_no_small_sample_factor():
    "Both true rows are of task 0: it alone has a placement, and its deviations add up to nothing."
    value, low, high = auroc_interval(LABEL, SCORE, [1, 2, 0, 0])
    expected = _t_interval(0.75, np.sqrt(0.125 / 2), effective_df(np.array([0, 0.125, -0.125])), 3, 0.95, (0.0, 1.0))
    assert (value, low, high) == pytest.approx((0.75, *expected))
    assert np.isnan(auroc_interval(LABEL, SCORE, [3] * 4)[1:]).all()


@pytest.mark.parametrize("rows", [clustered_rows(), (np.array(LABEL, bool), np.array(SCORE), np.arange(4))])
def test_a_band_is_the_quantiles_of_the_curves_of_resampled_tasks(rows):
    "Of four tasks with one row each, many resamples have one label, and are left out."
    label, score, task = rows
    tasks = len(set(task))
    grid = np.linspace(0, 1, 101)
    curves = []
    for counts in np.random.default_rng(4).multinomial(tasks, [1 / tasks] * tasks, 30):
        drawn = np.repeat(np.arange(len(label)), counts[task])
        if len(set(label[drawn])) == 2:
            fpr, tpr, _ = skm.roc_curve(label[drawn], score[drawn], drop_intermediate=False)
            curves.append(np.interp(grid, fpr, tpr))
    assert tasks == 12 or len(curves) < 30
    band = roc_with_band(label, score, task, 30, 0.8, 4)
    fpr, tpr, _ = skm.roc_curve(label, score, drop_intermediate=False)
    expected = {"false_positive_rate": grid, "true_positive_rate": np.interp(grid, fpr, tpr)}
    expected |= {"low": np.quantile(curves, 0.1, axis=0), "high": np.quantile(curves, 0.9, axis=0)}
    assert list(band) == list(expected)
    assert all(np.allclose(band[name], expected[name]) for name in expected)


def test_a_band_needs_two_resamples_with_both_labels():
    "Two tasks of one label each, two resamples: how many of them hold both tasks depends on the seed."
    for seed in range(20):
        both = (np.random.default_rng(seed).multinomial(2, [1 / 2] * 2, 2) == 1).all(1).sum()
        band = roc_with_band([0, 1], [0, 1], [0, 1], 2, seed=seed)
        assert np.isfinite(band["low"]).all() == (both == 2), seed
        assert band["true_positive_rate"].tolist() == [1] * 101


def test_a_curve_needs_both_labels_and_a_band_two_tasks():
    message = "2 true and 0 false rows: a ROC curve needs both; use other rows"
    with pytest.raises(BadInput) as refusal:
        roc_with_band([1, 1], [0, 1], [0, 1])
    assert str(refusal.value) == message
    with pytest.raises(BadInput, match=r"^\(2,\) clusters for 4 rows: give the task of each row$"):
        roc_with_band(LABEL, SCORE, [0, 1])
    with pytest.raises(BadInput, match=r"^level 2: "):
        roc_with_band(LABEL, SCORE, range(4), level=2)
    one_task = roc_with_band(LABEL, SCORE, [0] * 4, 5)
    assert np.isnan([one_task["low"], one_task["high"]]).all() and one_task["true_positive_rate"][-1] == 1
    two_tasks = roc_with_band(LABEL, SCORE, [0, 1, 0, 1], 5)
    assert np.isfinite([two_tasks["low"], two_tasks["high"]]).all()
