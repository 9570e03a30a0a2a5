import numpy as np
import pytest
from scipy.linalg import eigh

from streamcnn import StreamingPCA, eigen
from streamcnn.checkpoint import FileCheckpoint
from streamcnn.moments import Moments, n_strips
from streamcnn.threads import limit_blas, share

D, K = 300, 24
SPECTRA = {
    "1/i": np.arange(1, D + 1.0) ** -1,
    "1/i^2": np.arange(1, D + 1.0) ** -2,
    "flat": np.arange(1, D + 1.0) ** -0.25,
    "steep": 0.6 ** np.arange(D),
    "of rank 10": np.arange(D) < 10,
    "in steps": np.repeat([1e8, 1e3, 1e-4, 0.0], D // 4),
    "huge": 1e150 * np.arange(1, D + 1.0) ** -1,
    "tiny": 1e-60 * np.arange(1, D + 1.0) ** -1,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Matrices of any width are taken for wide; one BLAS thread, as two wait for each other on cores that others use too."""
    monkeypatch.setattr(eigen, "NARROWEST", 100)
    with limit_blas(1):
        yield


def matrix_of(values, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("name", SPECTRA)
def test_pairs_are_those_of_lapack(name):
    """Eigenvalues to 1e-12 of the largest, no less variance captured than by LAPACK's vectors (1e-10 of it allowed), and orthonormal."""
    matrix = matrix_of(SPECTRA[name])
    expected, exact = eigh(matrix, subset_by_index=(D - K, D - 1))
    values, vectors = eigen.leading_pairs(np.asfortranarray(matrix), K)
    assert values.shape == (K,) and vectors.shape == (D, K) and (np.diff(values) >= 0).all()
    assert np.abs(values - expected).max() <= 1e-12 * expected[-1]
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(K), atol=1e-13)
    captured, best = (np.einsum("ij,ij->", v, matrix @ v) for v in (vectors, exact))
    assert captured >= best * (1 - 1e-10)


def test_only_one_triangle_is_looked_at(monkeypatch):
    """What stands above the diagonal does not matter, not even NaN, and does not send it to LAPACK."""
    monkeypatch.setattr(eigen.logger, "debug", lambda *words: pytest.fail("went to LAPACK"))
    matrix = matrix_of(SPECTRA["1/i"])
    half = np.where(np.tri(D, dtype=bool), matrix, np.nan)
    values = eigen.leading_pairs(np.asfortranarray(half), K)[0]
    np.testing.assert_allclose(values, eigh(matrix, subset_by_index=(D - K, D - 1), eigvals_only=True), rtol=1e-11)


def test_equal_eigenvalues_and_none_at_all_are_right(monkeypatch):
    """Where there are no leading ones: any orthonormal vectors; zeros are LAPACK's in float64, a flat spectrum is not."""
    lapack = []
    monkeypatch.setattr(eigen.logger, "debug", lambda *words: lapack.append(words))
    for matrix, value in ((np.eye(D), 1.0), (np.zeros((D, D)), 0.0)):
        values, vectors = eigen.leading_pairs(np.asfortranarray(matrix), K)
        assert np.array_equal(values, np.full(K, value)) and np.allclose(vectors.T @ vectors, np.eye(K))
    assert len(lapack) == 1
    eigen.leading_pairs(np.asfortranarray(matrix_of(SPECTRA["flat"])), K)
    assert len(lapack) == 1


def test_pairs_that_are_no_good_are_refused(monkeypatch):
    """Vectors that do not hold the leading directions are found out by their residuals, and LAPACK's come instead."""
    matrix, lapack = matrix_of(SPECTRA["flat"]), []
    real = eigen.eigh
    monkeypatch.setattr(eigen.logger, "debug", lambda *words: lapack.append(words))

    def wrong(a, **options):
        if a.dtype == np.float32:
            return None, np.linalg.qr(np.random.default_rng(0).standard_normal((D, K + 16)))[0].astype(np.float32)
        return real(a, **options)

    monkeypatch.setattr(eigen, "eigh", wrong)
    values, _ = eigen.leading_pairs(np.asfortranarray(matrix), K)
    np.testing.assert_allclose(values, real(matrix, subset_by_index=(D - K, D - 1), eigvals_only=True), rtol=1e-12)
    assert len(lapack) == 1


def test_small_matrices_and_many_components_are_lapacks():
    """A quarter of the directions or more, or narrow matrices, are not worth it."""
    assert eigen.takes_float32(100, 25) and not eigen.takes_float32(100, 26) and not eigen.takes_float32(99, 2)


# -- few rows ----------------------------------------------------------------------------------------------------------
def rows_of(n, dtype=np.float32, decay=-0.5, seed=0):
    """`n` rows of D features about a mean far from 0."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, n + 1.0)[:, None] ** decay
    return (rng.standard_normal((n, n)) @ (weights * rng.standard_normal((n, D))) + 5).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (40, 39), (75, 20)])
def test_components_of_few_rows_are_those_of_all_their_features(dtype, n, k, monkeypatch):
    """Up to a quarter as many rows as features: pairs, mean and ratios as by LAPACK's SVD in float64, without any d x d eigenproblem, and
    without random directions where there are enough of the rows' own."""
    rows = rows_of(n, dtype)
    monkeypatch.setattr("streamcnn.moments.leading_pairs", lambda *a: pytest.fail("of all features"))
    monkeypatch.setattr("numpy.random.default_rng", lambda *a: pytest.fail("at random"))
    pca = StreamingPCA(k, solver="covariance").fit(rows)
    centred = rows - rows.mean(0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(pca.singular_values_, singular[:k], rtol=1e-6 if dtype == np.float32 else 1e-10)
    total = np.square(singular).sum()
    np.testing.assert_allclose(pca.explained_variance_ratio_, np.square(singular[:k]) / total, rtol=1e-10)
    # what is left over by those of all directions is the rounding of float64
    np.testing.assert_allclose(pca.noise_variance_ * (n - 1), (total - np.square(singular[:k]).sum()) / (n - k), atol=1e-12 * total)
    np.testing.assert_allclose(pca.components_ @ pca.components_.T, np.eye(k), atol=1e-9)
    shares = np.square(centred @ pca.components_.T).sum(0) / np.square(singular[:k])  # of the variance along the true ones
    np.testing.assert_allclose(shares, 1, rtol=1e-6)
    assert all(vector[np.abs(vector).argmax()] > 0 for vector in pca.components_)


def test_few_rows_in_batches_have_the_same_bits_and_one_more_is_not_few(tmp_path, monkeypatch):
    """As an array, in batches of any size, and after an interruption; 76 of 300 features are many, whoever brings them."""
    for n, few in ((75, True), (76, False)):
        rows = rows_of(n)
        expected = StreamingPCA(10, solver="covariance").fit(rows).components_
        for size in (1, 13, 80):
            batches = [rows[start : start + size] for start in range(0, n, size)]
            assert np.array_equal(StreamingPCA(10, solver="covariance").fit(batches).components_, expected)
        with monkeypatch.context() as patch:
            patch.setattr("streamcnn.checkpoint.STATE_SECONDS", 0)
            patch.setattr(Moments, "leading", interrupt)
            with pytest.raises(KeyboardInterrupt):
                StreamingPCA(10, solver="covariance").fit(rows, checkpoint=FileCheckpoint(tmp_path / f"{n}/pca", "digest", durable=False))
        resumed = FileCheckpoint(tmp_path / f"{n}/pca", "digest", durable=False)
        assert np.array_equal(StreamingPCA(10, solver="covariance").fit(rows, checkpoint=resumed).components_, expected)
        # sums are gone on from, few rows are read again
        assert resumed.used is not few


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_few_rows_may_vary_in_fewer_directions_than_are_wanted(monkeypatch):
    """As many components as rows, the same rows again and again, or a dozen decades of variance: orthonormal, and as by SVD."""
    monkeypatch.setattr("streamcnn.moments.leading_pairs", lambda *a: pytest.fail("of all features"))
    rows, steep = rows_of(40), rows_of(40, np.float64, -6)
    flat = np.repeat(np.random.default_rng(1).integers(0, 9, (3, D)), 20, axis=0)
    for X, k in ((rows, 40), (np.repeat(rows[:20], 2, 0), 30), (steep, 39), (flat.astype(np.float32), 50), (np.full((40, D), 0.1), 5)):
        pca = StreamingPCA(k, solver="covariance").fit(X)
        np.testing.assert_allclose(pca.components_ @ pca.components_.T, np.eye(k), atol=1e-9)
        centred = X - X.mean(0, dtype=np.float64)
        singular = np.linalg.svd(centred, compute_uv=False)[:k]
        np.testing.assert_allclose(pca.singular_values_, singular, rtol=1e-6, atol=1e-10 * np.sqrt(np.square(X, dtype=np.float64).sum()))
        along = np.linalg.norm(centred @ pca.components_.T, axis=0)
        np.testing.assert_allclose(along, singular, rtol=1e-6, atol=1e-10 * np.sqrt(np.square(X, dtype=np.float64).sum()))


# -- moments by several threads ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_do_not_change_moments(dtype):
    """Wide rows: any number of threads gives the same bits, and those of numpy to rounding."""
    d, rng = 1500, np.random.default_rng(0)
    rows = (rng.standard_normal((190, d)) + 3).astype(dtype)
    one, three = Moments(rows[0], dtype), Moments(rows[0], dtype, n_jobs=3)
    assert (n_strips(d, 1), n_strips(d, 3), n_strips(d, 99), n_strips(1000, 9)) == (1, 3, 6, 1)
    for moments in (one, three):
        for start in (0, 64, 128):
            block = np.zeros((64, d), dtype)
            part = rows[start : start + 64]
            block[: len(part)] = part
            moments.add(block, len(part))
    assert np.array_equal(one.total, three.total) and np.array_equal(np.tril(one.gram), np.tril(three.gram))
    # float32 products of 64 rows: rounding 6e-8 of each, of values near 3 from the shift
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(one.mean, rows.mean(axis=0, dtype=np.float64), rtol=tolerance)
    expected = (rows - rows[0]).astype(np.float64).T @ (rows - rows[0])
    assert np.abs(np.tril(one.gram - expected)).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_work_is_shared_out_once_each(n_threads):
    """Every item is done once, by this thread alone or by several, and an error in any of them comes back."""
    done: list[int] = []
    share(done.append, range(100), n_threads)
    assert sorted(done) == list(range(100))
    with pytest.raises(ZeroDivisionError):
        share(lambda item: 1 // (item - 50), range(100), n_threads)
