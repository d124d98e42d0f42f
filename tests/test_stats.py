"""What a notebook cannot hold of `core.stats`: coverage and error rates by simulation, oracles on random input, the time of a whole trace."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from codetrace.core.errors import BadInput
from codetrace.core.stats import (
    benjamini_hochberg,
    bootstrap_interval,
    holm,
    mcnemar_exact,
    share_interval,
    sign_flip_p,
    smallest_sign_flip_p,
    wilson,
)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 2000), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_is_scipys(n, share, level):
    k = round(share * n)
    low, high = wilson(k, n, level)
    assert np.allclose((low, high), sps.binomtest(k, n).proportion_ci(level, method="wilson"), atol=1e-9)
    assert 0 <= low <= k / n <= high <= 1


def contains(interval, truth: float) -> np.ndarray:
    low, high = interval
    return (low <= truth) & (truth <= high)


@pytest.mark.parametrize("clusters", [12, 40])
@pytest.mark.parametrize("size", ["equal", "unequal"])
def test_coverage_of_the_cluster_bootstrap(clusters, size):
    "Over 1,200 experiments, for few clusters too; SciPy's BCa is too short for those."
    rng = np.random.default_rng(clusters)
    covered = {"expanded": [], "BCa": []}
    for _ in range(12):
        sizes = np.full(clusters, 5) if size == "equal" else rng.integers(1, 10, clusters)
        member = np.repeat(np.arange(clusters), sizes)
        x = rng.normal(0, 1, (clusters, 100))[member] + rng.normal(0, 0.5, (len(member), 100))
        for method, contained in covered.items():
            contained.append(contains(bootstrap_interval(x, member, n_resamples=800, method=method), 0))
    assert 0.93 <= np.mean(covered["expanded"]) <= 0.97
    assert clusters > 12 or np.mean(covered["BCa"]) < 0.92


def test_an_expanded_interval_of_many_clusters_is_no_longer():
    x = np.random.default_rng(0).exponential(size=(400, 2))
    plain, expanded = (bootstrap_interval(x, method=method) for method in ("BCa", "expanded"))
    assert np.allclose(np.subtract(*expanded), np.subtract(*plain), rtol=0.01)


@pytest.mark.parametrize("samples", [1, 5, 20])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_coverage_of_shares(share, samples):
    "Tasks of different difficulty, 12 and 40 of them."
    rng = np.random.default_rng(samples)
    for tasks in (12, 40):
        solved = rng.binomial(samples, rng.beta(2 * share, 2 * (1 - share), (500, tasks))) / samples
        assert 0.9 <= np.mean([contains(share_interval(study), share) for study in solved]) <= 0.99


def test_the_interval_of_a_share_is_of_its_level():
    "Also where every share is 0 or 1; what it does not take is refused."
    for values in ([0, 1, 1], [1, 1, 1], [0.2, 0.4, 1.0]):
        narrow, wide = (share_interval(values, level) for level in (0.5, 0.95))
        assert wide[0] < narrow[0] and (narrow[1] < wide[1] or values == [1, 1, 1]), values
    assert share_interval([0, 1, 1], 0.5) == wilson(2, 3, 0.5)
    with pytest.raises(TypeError):
        share_interval([0, 1, 1], levle=0.5)


def _pooled_mean_interval(values, member):
    "SciPy's percentile interval of the mean of the pooled values of the drawn clusters."
    groups = [values[(member == c) & ~np.isnan(values)] for c in np.unique(member)]
    groups = [group for group in groups if len(group)]

    def pooled_mean(drawn):
        return np.concatenate([groups[i] for i in drawn]).mean()

    options = dict(n_resamples=2000, method="percentile", vectorized=False, rng=np.random.default_rng(0))
    return tuple(sps.bootstrap((np.arange(len(groups)),), pooled_mean, **options).confidence_interval)


def test_cells_of_a_trace_are_as_each_by_itself():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3, 4))
    x[rng.random(x.shape) < 0.2] = np.nan
    member = np.repeat(np.arange(10), 3)
    low, high = bootstrap_interval(x, member, method="percentile")
    assert low.shape == (3, 4)
    for cell in np.ndindex(3, 4):
        alone = bootstrap_interval(x[(slice(None), *cell)], member, method="percentile")
        assert np.allclose((low[cell], high[cell]), alone)
        slow = _pooled_mean_interval(x[(slice(None), *cell)], member)
        assert np.allclose(alone, slow, atol=0.15)


def test_level_orders_intervals():
    x = np.random.default_rng(0).exponential(size=50)
    ends = [bootstrap_interval(x, level=level) for level in (0.5, 0.9, 0.99)]
    widths = [high - low for low, high in ends]
    assert widths == sorted(widths) and all(low < x.mean() < high for low, high in ends)


@pytest.mark.parametrize("n", [4, 9, 13])
def test_sign_flip_is_scipys_where_both_are_exact(n):
    x = np.random.default_rng(n).integers(-3, 4, (n, 20)).astype(float)  # whole numbers: many ties
    expected = sps.permutation_test((x,), lambda v, axis: v.mean(axis), permutation_type="samples", vectorized=True)
    assert np.allclose(sign_flip_p(x), np.minimum(expected.pvalue, 1))


def test_sign_flip_by_chance_is_near_exact():
    x = np.random.default_rng(1).normal(0.4, 1, (13, 50))
    exact = sign_flip_p(x)
    drawn = sign_flip_p(x, n_resamples=5000)
    assert np.abs(exact - drawn).max() < 4 * np.sqrt(0.25 / 5000) and drawn.min() >= 1 / 5001


def test_sign_flip_keeps_its_error_rate():
    "2,000 cells without an effect, skewness aside symmetric: p is uniform."
    p = sign_flip_p(np.random.default_rng(2).laplace(size=(40, 2000)), n_resamples=1999)
    for alpha in (0.01, 0.05, 0.2):
        assert abs((p <= alpha).mean() - alpha) < 4 * np.sqrt(alpha * (1 - alpha) / 2000)


@settings(max_examples=25, deadline=None)  # statsmodels takes most of the time
@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=40))
def test_benjamini_hochberg_is_statsmodels(p):
    from statsmodels.stats.multitest import multipletests

    assert np.allclose(benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1])


def test_benjamini_hochberg_keeps_its_rate():
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(300):
        p = np.concatenate([rng.random(160), rng.beta(0.1, 8, 40)])
        called = benjamini_hochberg(p) < 0.1
        shares.append(called[:160].sum() / max(1, called.sum()))
    assert 0.05 < np.mean(shares) < 0.1


@pytest.mark.parametrize("n", [1, 2, 9, 40])  # statsmodels takes most of the time
def test_holm_is_statsmodels(n):
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(n).beta(0.3, 3, n).round(3)  # with ties
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=40))
def test_holm_is_stricter(p):
    assert (holm(p) >= benjamini_hochberg(p) - 1e-12).all()


def test_holm_keeps_its_rate():
    "Of 2,000 reports of seven claims without an effect, at most 5% have any below 0.05."
    p = np.random.default_rng(5).random((2000, 7))
    assert abs(np.mean([(holm(row) <= 0.05).any() for row in p]) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 16), n_resamples=st.integers(50, 3000))
def test_no_sign_flip_p_is_below_the_smallest(n, n_resamples):
    values = np.random.default_rng(n).normal(2, 1, (n, 30))
    values[:, 0] = 1
    p = sign_flip_p(values, n_resamples)
    assert (p >= smallest_sign_flip_p(n, n_resamples) - 1e-12).all()
    if 2**n <= n_resamples:
        assert p[0] == smallest_sign_flip_p(n, n_resamples)


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, 2.0], [np.nan, np.nan]])
def test_fewer_than_two_values_have_no_bootstrap_interval(values):
    assert np.isnan(bootstrap_interval(values)).all()
    assert np.isnan(bootstrap_interval(np.reshape(values, (-1, 1)))).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0, np.nan]), max_size=8))
def test_a_share_is_never_certain(values):
    low, high = share_interval(values)
    measured = [x for x in values if x == x]
    assert np.isnan([low, high]).all() == (not measured)
    assert not measured or (0 <= low < high <= 1)


def test_what_cannot_be_computed_is_refused(wrong_types_pass):
    for call in (
        lambda: wilson(6, 5),
        lambda: wilson(-1, 5),
        lambda: wilson(1, np.inf),
        lambda: wilson(1, 5, 95),
        lambda: bootstrap_interval([1.0, np.inf]),
        lambda: bootstrap_interval([1.0, 2.0], [0]),
        lambda: bootstrap_interval([1.0, 2.0], method="student"),
        lambda: bootstrap_interval(1.0),
        lambda: share_interval([0.5, 50]),
        lambda: sign_flip_p([1.0, -np.inf]),
        lambda: benjamini_hochberg([0.5, 1.5]),
        lambda: holm([-0.1]),
        lambda: mcnemar_exact(-1, 2),
        lambda: mcnemar_exact(1.5, 2),
    ):
        with pytest.raises(BadInput):
            call()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_binomial(b, c):
    expected = sps.binomtest(b, b + c).pvalue if b + c else 1
    assert np.isclose(mcnemar_exact(b, c), expected) and mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_a_whole_trace_takes_seconds():
    x = np.random.default_rng(4).normal(size=(100, 30, 20))
    start = time.perf_counter()
    assert sign_flip_p(x).shape == bootstrap_interval(x, n_resamples=1000)[0].shape == (30, 20)
    assert time.perf_counter() - start < 30
