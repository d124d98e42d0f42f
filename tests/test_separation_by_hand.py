"Separation scores of a handful of latents on pen and paper, Welch's t against SciPy's, and what is stored of each latent."

import numpy as np
import pytest
import torch
from scipy import stats as sps

from codetrace.core.errors import BadInput
from codetrace.sae.sae import random_sae
from codetrace.sae.separation import ActiveLatents, encode_active_latents, separation_scores

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Latent 0 is active in rows 0 and 3, latent 2 in row 3; latent 1 never
THREE_LATENTS = ActiveLatents(
    4, np.array([0, 3, 3], np.int32), np.array([0, 0, 2], np.int32), np.array([0.5, 2, 4], np.float32), 3
)


def test_a_matrix_holds_ones_or_activations():
    assert THREE_LATENTS.matrix().toarray().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert THREE_LATENTS.matrix(binary=False).toarray().tolist() == [[0.5, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 4]]
    assert [THREE_LATENTS.column(latent).tolist() for latent in (0, 1)] == [[0.5, 0, 0, 2], [0, 0, 0, 0]]
    assert THREE_LATENTS.matrix().dtype == THREE_LATENTS.matrix(binary=False).dtype == np.float32
    assert THREE_LATENTS.column(2).dtype == np.float32


def test_scores_of_three_latents():
    "Row 3 alone is wrong: latent 0 is active in one of three correct rows and in the only incorrect one."
    table = separation_scores(THREE_LATENTS, [1, 1, 1, 0])
    expected = {
        "latent": [0, 1, 2],
        "correct": [1 / 3, 0, 0],
        "incorrect": [1, 0, 1],
        "separation": [-2 / 3, 0, -1],
        "mean_correct": [0.5 / 3, 0, 0],
        "mean_incorrect": [2, 0, 4],
    }
    assert list(table) == [*expected, "t"]
    for name, values in expected.items():
        assert table[name].to_numpy() == pytest.approx(np.array(values)), name
    assert table["t"].isna().all()  # One incorrect row has no variance


@pytest.mark.parametrize(("label", "counts"), [([1, 1, 0], (2, 1)), ([1] * 4, (4, 0)), ([0] * 4, (0, 4))])
def test_rows_without_both_labels_are_refused(label, counts):
    with pytest.raises(BadInput) as refusal:
        separation_scores(THREE_LATENTS, label)
    assert str(refusal.value) == (
        f"4 rows, {counts[0]} labelled correct and {counts[1]} incorrect: "
        "a label for each row and both kinds are needed"
    )


def dense_latents(values: np.ndarray) -> ActiveLatents:
    "All of `[rows, latents]` is active."
    row, latent = (index.ravel() for index in np.indices(values.shape))
    return ActiveLatents(len(values), row, latent, values.ravel(), values.shape[1])


def test_t_is_scipys_and_nan_where_a_latent_is_constant():
    "Of every size, from thousandths to millions; constant but for rounding is constant, a ten-thousandth is not."
    rng = np.random.default_rng(0)
    label = np.arange(17) % 3 > 0
    size = np.geomspace(1e-3, 1e6, 40)
    varying = size * (1 + 1e-4 * rng.normal(size=(17, 40)) + 3e-5 * label[:, None])
    constant = np.broadcast_to(rng.random(40) * size, (17, 40))
    of_one_value_a_label = np.where(label[:, None], constant, 2 * constant)
    t = separation_scores(dense_latents(np.hstack([varying, constant, of_one_value_a_label])), label)["t"].to_numpy()
    expected = sps.ttest_ind(varying[label], varying[~label], equal_var=False).statistic
    assert np.allclose(t[:40], expected, rtol=1e-3) and np.isnan(t[40:]).all()


def test_one_exact_value_a_label_has_no_t():
    "Powers of two have no rounding: the standard error is 0."
    values = np.array([[1.0, 0], [1, 0], [4, 0], [4, 0]])
    assert separation_scores(dense_latents(values), [1, 1, 0, 0])["t"].isna().all()


@pytest.mark.parametrize("keep", [None, np.arange(12) % 3 == 0])
def test_encoding_in_portions_is_encoding_at_once(keep):
    sae = random_sae(6, 12, 3)
    states = np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32)
    latents = sae.encode(torch.tensor(states)).numpy() * (1 if keep is None else keep)
    for portion in (2, 7, 1024):
        active = encode_active_latents(sae, states, keep, portion)
        assert np.allclose(active.matrix(binary=False).toarray().T, latents, atol=1e-6)
        assert np.array_equal(active.matrix().toarray().T, latents != 0)
        assert [a.dtype for a in (active.row, active.latent, active.value)] == [np.int32, np.int32, np.float32]
    nothing = encode_active_latents(sae, states[:0], keep)
    assert (nothing.rows, len(nothing.row), nothing.d_sae, nothing.value.dtype) == (0, 0, 12, np.float32)
