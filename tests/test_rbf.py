"""The decision function of the exact RBF SVM over blocks that are mostly padding."""

import numpy as np
import pytest
from sklearn.svm import SVC

from streamcnn.rbf import TILE, RbfMachine


@pytest.mark.parametrize("n_classes", [2, 4])
def test_rows_of_zeros_are_decided_like_any_other(n_classes):
    """Sixteen rows of zeros, whose result is kept, get scikit-learn's decisions, first and again, between rows that are not zero."""
    rng = np.random.default_rng(0)
    rows, codes = rng.normal(size=(120, 5)), np.arange(120) % n_classes
    rows[:, 0] += codes
    svc = SVC(kernel="rbf", gamma=0.5, C=1.0, decision_function_shape="ovr").fit(rows, codes)
    parts = (svc.support_vectors_, svc.dual_coef_, svc.intercept_, svc.n_support_.astype(np.int64))
    machine = RbfMachine(0.5, 1.0, *parts)
    block = rng.normal(size=(64, 5))
    block[16:48] = 0
    expected = svc.decision_function(block).reshape(64, -1)
    for _ in range(2):
        out = np.full((64, machine.n_outputs), np.nan)
        machine.decide(block.copy(), out)
        # sums of 100 products below 1
        np.testing.assert_allclose(out, expected, atol=1e-12)


def test_a_row_has_the_same_bits_beside_padding_as_beside_other_rows():
    """The decisions of rows 0 to 15 of a block do not depend on the rest of it."""
    rng = np.random.default_rng(1)
    support = rng.normal(size=(1500, 6))
    machine = RbfMachine(0.3, 0.7, support, rng.normal(size=(2, 1500)), rng.normal(size=3), np.array([500, 600, 400]))
    full = rng.normal(size=(64, 6))
    alone = np.zeros_like(full)
    alone[:16] = full[:16]
    results = [np.empty((64, 3)) for _ in range(2)]
    for block, out in zip((full, alone), results):
        machine.decide(block.copy(), out)
    assert np.array_equal(results[0][:16], results[1][:16])


def test_votes_and_their_settling_are_those_of_scikit_learn():
    """Seven overlapping classes, whose vectors begin and end inside of tiles: each row's decisions are scikit-learn's, ties included."""
    rng = np.random.default_rng(2)
    rows, codes = rng.normal(size=(1400, 3)), np.arange(1400) % 7
    rows[np.arange(1400), codes % 3] += codes / 4
    svc = SVC(kernel="rbf", gamma=0.4, C=3.0, decision_function_shape="ovr").fit(rows, codes)
    assert len(svc.support_vectors_) > TILE
    block = rng.normal(size=(64, 3))
    expected = svc.decision_function(block)
    top = np.sort(np.round(expected), axis=1)
    assert (top[:, -1] == top[:, -2]).any()  # equal votes, told apart by the confidence alone
    out = np.empty((64, 7))
    RbfMachine(0.4, 1.0, svc.support_vectors_, svc.dual_coef_, svc.intercept_, svc.n_support_.astype(np.int64)).decide(block, out)
    # sums of 1400 products of at most 3
    np.testing.assert_allclose(out, expected, atol=1e-11)
