"""What a notebook cannot hold of `core.stats`: coverage and error rates by simulation, oracles on random input, the time of a whole trace."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from codetrace.core.stats import benjamini_hochberg, bootstrap_interval, mcnemar_exact, sign_flip_p, wilson


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 2000), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_is_scipys(n, share, level):
    k = round(share * n)
    low, high = wilson(k, n, level)
    assert np.allclose((low, high), sps.binomtest(k, n).proportion_ci(level, method="wilson"), atol=1e-9)
    assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize("clusters", [12, 40])
@pytest.mark.parametrize("size", ["equal", "unequal"])
def test_coverage_of_the_cluster_bootstrap(clusters, size):
    "Within what is known of the bootstrap for so few clusters (it is a little too short), over 600 experiments."
    rng = np.random.default_rng(clusters)
    hits = 0
    trials = 600
    for _ in range(trials):
        sizes = np.full(clusters, 5) if size == "equal" else rng.integers(1, 10, clusters)
        member = np.repeat(np.arange(clusters), sizes)
        x = rng.normal(0, 1, clusters)[member] + rng.normal(0, 0.5, len(member))
        low, high = bootstrap_interval(x, member, n_resamples=500)
        hits += low <= 0 <= high
    assert (0.86 if clusters == 12 else 0.91) < hits / trials < 0.98


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
    exact, drawn = sign_flip_p(x), sign_flip_p(x, n_resamples=5000)
    assert np.abs(exact - drawn).max() < 4 * np.sqrt(0.25 / 5000) and drawn.min() >= 1 / 5001


def test_sign_flip_keeps_its_error_rate():
    "2,000 cells without an effect, skewness aside symmetric: p is uniform."
    p = sign_flip_p(np.random.default_rng(2).laplace(size=(40, 2000)), n_resamples=1999)
    for alpha in (0.01, 0.05, 0.2):
        assert abs((p <= alpha).mean() - alpha) < 4 * np.sqrt(alpha * (1 - alpha) / 2000)


@settings(max_examples=60, deadline=None)
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
