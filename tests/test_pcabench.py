import numpy as np
import pytest

from streamcnn.pcabench import captured, pca_rows, spectrum_rows


@pytest.mark.parametrize(("n", "d", "r", "offset"), [(300, 40, 40, 0), (50, 90, 49, 3.0)])
def test_rows_have_the_spectrum_asked_for(n, d, r, offset):
    """Eigenvalues of the sample covariance, to the rounding of float32 rows: 1e-7 of the largest entry, its square root over n."""
    values = 1 / np.arange(1, r + 1.0)
    rows = spectrum_rows(n, d, values, offset)
    assert rows.dtype == np.float32 and rows.shape == (n, d)
    found = np.linalg.eigvalsh(np.cov(rows.T.astype(np.float64)))[::-1]
    np.testing.assert_allclose(found[:r], values, atol=2e-6)
    assert np.abs(found[r:]).max(initial=0) < 2e-6 and (abs(rows.mean()) > 1) == (offset > 0)
    components = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:5]
    assert abs(captured(rows, rows.mean(axis=0, dtype=np.float64), components) - values[:5].sum()) < 5e-6


@pytest.mark.parametrize("solver", ["covariance", "randomized"])
def test_contestants_are_measured_on_the_same_rows(solver):
    """A row of figures for each; ours captures at least the promised share and more than IncrementalPCA."""
    ours, small, large = pca_rows(solver, 1500, 200, 10, batch_sizes=(64, 300), rounds=2, n_jobs=1)
    assert [row["engine"] for row in (ours, small, large)] == [
        f"streamcnn {solver}",
        "IncrementalPCA(batch_size=64)",
        "IncrementalPCA(batch_size=300)",
    ]
    assert ours["times_as_long"] == 1 and small["times_as_long"] == small["seconds"] / ours["seconds"] > 0
    assert max(0.9999, small["captured"], large["captured"]) <= ours["captured"] <= 1 + 1e-6
    assert ours["largest_error"] < 1e-4 < small["largest_error"] and ours["cpu_seconds"] > 0
    assert ours["n_passes"] == 1 if solver == "covariance" else ours["n_passes"] > 1


def test_a_part_of_the_rival_stands_for_all_of_it():
    """Three batches timed of 15: a time of at least that part, and nothing said about what it would capture."""
    ours, rival = pca_rows("covariance", 1500, 100, 10, batch_sizes=(100,), whole=False, n_jobs=1)
    assert rival["captured"] is None and rival["largest_error"] is None and not rival["whole"] and rival["seconds"] > 0
    assert ours["whole"] and ours["captured"] > 0.9999
