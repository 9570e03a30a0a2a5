import logging
import subprocess
import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA, IncrementalPCA

from streamcnn.errors import ParameterError
from streamcnn.krylov import KrylovSpace, _orthonormalise
from streamcnn.pca import StreamingPCA
from streamcnn.randomized import PASSES, CovarianceProduct
from streamcnn.rowinput import Pieces
from streamcnn.rows import iter_blocks
from streamcnn.threads import limit_blas


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products on two threads that others use too spend their time waiting."""
    with pytest.MonkeyPatch.context() as patch, limit_blas(1):
        patch.setattr("streamcnn.pca.resolve_n_jobs", lambda n_jobs: 1)
        yield


def rows_of(eigenvalues, n, seed=0, offset=0.0):
    """float64 rows (n, d) whose sample covariance has exactly these eigenvalues, in random directions."""
    rng = np.random.default_rng(seed)
    d = len(eigenvalues)
    left = rng.standard_normal((n, d))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (left * np.sqrt(np.asarray(eigenvalues) * (n - 1))) @ right + offset * rng.uniform(0.5, 1.5, d)


def captured(rows, components):
    """Variance of float64 rows along orthonormal components."""
    return np.square((rows - rows.mean(axis=0)) @ components.T).sum() / (len(rows) - 1)


INDEX = np.arange(1, 401.0)
SPECTRA = {
    "i^-0.5": INDEX**-0.5,
    "i^-1": 1 / INDEX,
    "i^-2": INDEX**-2,
    "exponential": np.exp(-INDEX / 6) + 1e-7,
    "steps": np.repeat([1.0, 0.5, 0.01, 0.001], 100),
    "few above a plateau": np.where(INDEX < 10, 100 / INDEX, INDEX**-0.2),
}


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("name", SPECTRA)
def test_at_least_9999_parts_of_the_variance_are_captured(name, offset):
    """float32 rows, spectra falling slowly, fast and in steps, offsets: 99.99 % of what exact components capture."""
    rows = rows_of(SPECTRA[name], 1100, offset=offset).astype(np.float32)
    exact = PCA(20, svd_solver="full").fit(rows.astype(np.float64))
    model = StreamingPCA(20, solver="randomized").fit(rows)
    share = captured(rows.astype(np.float64), model.components_) / exact.explained_variance_.sum()
    assert 0.9999 <= share <= 1 + 1e-12
    # never above the variance along the components, beyond rounding of float32 products (1e-7 each, a few of them)
    along = np.square((rows - exact.mean_) @ model.components_.T).sum(axis=0) / (len(rows) - 1)
    assert (model.explained_variance_ <= along + 3e-6 * along[0]).all()
    assert model.explained_variance_.sum() >= 0.9998 * exact.explained_variance_.sum()
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(20), atol=1e-12)
    assert 1 < model.n_passes_ <= PASSES


def test_attributes_are_those_of_full_pca():
    """On a fast spectrum every attribute equals scikit-learn's, signs as documented."""
    rows = rows_of(np.exp(-INDEX / 4) + 1e-9, 900, offset=3)
    ours, theirs = StreamingPCA(12, solver="randomized").fit(rows), PCA(12, svd_solver="full").fit(rows)
    # what is missing after two passes or more on this spectrum is below 1e-9
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(ours.singular_values_, theirs.singular_values_, rtol=1e-6)
    np.testing.assert_allclose(ours.noise_variance_, theirs.noise_variance_, rtol=1e-4)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.var_, rows.var(axis=0), rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(ours.components_ * theirs.components_, axis=1)), 1, atol=1e-6)
    assert (ours.components_[np.arange(12), np.abs(ours.components_).argmax(axis=1)] > 0).all()
    white = StreamingPCA(12, solver="randomized", whiten=True).fit(rows)
    np.testing.assert_allclose(white.transform(rows).std(axis=0, ddof=1), 1, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_all_directions_asked_for_are_exact(n):
    """n_components = min(rows, features): the first pass holds everything."""
    rows = np.random.default_rng(0).standard_normal((30, 50)) if n == 1 else np.random.default_rng(0).standard_normal((50, 30))
    model = StreamingPCA(solver="randomized").fit(rows)
    exact = PCA(svd_solver="full").fit(rows).explained_variance_
    np.testing.assert_allclose(model.explained_variance_, exact, atol=1e-9)
    assert model.n_components_ == 30


def test_components_do_not_depend_on_the_order_of_rows():
    """Rows sorted along their first component and rows shuffled: the same subspace's variance to 1e-4, whatever the sample holds."""
    rows = rows_of(SPECTRA["i^-1"], 1500)
    rows = rows[np.argsort(rows @ PCA(1).fit(rows).components_[0])]
    exact = PCA(15, svd_solver="full").fit(rows).explained_variance_.sum()
    shuffled = rows[np.random.default_rng(1).permutation(len(rows))]
    for source in (rows, shuffled, [rows[:700], rows[700:]]):
        assert captured(rows, StreamingPCA(15, solver="randomized").fit(source).components_) >= 0.9999 * exact


def test_a_direction_that_few_rows_share_is_found():
    """3 rows of 4,000, none of them in the sample, alone in a direction orthogonal to all others, of the largest variance."""
    rows = rows_of(np.append(1 / np.arange(1, 300.0), 0), 4000)
    alone = np.linalg.eigh(rows.T @ rows)[1][:, 0]
    rows[[1001, 2003, 3001]] += 60 * alone
    exact = PCA(10, svd_solver="full").fit(rows).explained_variance_.sum()
    model = StreamingPCA(10, solver="randomized").fit(rows)
    assert captured(rows, model.components_) >= 0.9999 * exact
    assert abs(model.components_[0] @ alone) > 0.99


def test_the_seed_decides_and_is_kept_to():
    """The same seed gives the same bits, another seed other ones; None is 0."""
    rows = rows_of(SPECTRA["i^-1"], 900)
    first, again, other = (StreamingPCA(5, solver="randomized", random_state=s).fit(rows).components_ for s in (None, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_constant_rows_and_too_few_rows():
    """No variance at all gives none and no warning; one row is refused, in an array and in batches."""
    flat = StreamingPCA(2, solver="randomized").fit(np.full((300, 5), 3.0, np.float32))
    assert flat.explained_variance_.tolist() == [0, 0] and not flat.transform(np.full((3, 5), 3.0, np.float32)).any()
    np.testing.assert_allclose(flat.components_ @ flat.components_.T, np.eye(2), atol=1e-12)
    for source in (np.ones((1, 5)), [np.ones((1, 5))], [np.ones((0, 5))]):
        with pytest.raises(ValueError, match=r"[01] sample\(s\)"):
            StreamingPCA(1, solver="randomized").fit(source)


def test_one_row_at_a_time_is_refused():
    """partial_fit and merge say which solvers can; the model stays as it was."""
    rows = rows_of(SPECTRA["i^-2"], 500)
    with pytest.raises(ParameterError, match='partial_fit sees each row once, which solver="randomized" cannot do with'):
        StreamingPCA(3, solver="randomized").partial_fit(rows)
    model = StreamingPCA(3, solver="randomized").fit(rows)
    before = model.components_.copy()
    with pytest.raises(ParameterError, match="partial_fit sees each row once"):
        model.partial_fit(rows)
    with pytest.raises(ParameterError, match='merge needs solver="covariance" on both sides'):
        model.merge(StreamingPCA(3).fit(rows))
    assert np.array_equal(model.components_, before)


def test_a_flat_spectrum_is_said_to_be_one(caplog):
    """White noise: all passes are used, and the log says what is missing and what to do."""
    rows = np.random.default_rng(0).standard_normal((3000, 700)).astype(np.float32)
    with caplog.at_level(logging.WARNING, logger="streamcnn"):
        model = StreamingPCA(30, solver="randomized").fit(rows)
    assert model.n_passes_ == PASSES and 'solver="covariance"' in caplog.text and "missing" in caplog.text
    caplog.clear()
    # a spectrum that falls fast is done early, without a word
    assert StreamingPCA(20, solver="randomized").fit(rows_of(SPECTRA["i^-2"], 1100)).n_passes_ <= 3 and not caplog.text


def test_a_pass_is_merged_from_parts():
    """Sums over parts of the rows add up to those over all: covariance times directions, mean and variance, by np.cov."""
    rng = np.random.default_rng(0)
    rows, directions, shift = rng.standard_normal((96, 9)) + 5, rng.standard_normal((4, 9)), np.full(9, 4.0)
    parts = [CovarianceProduct(directions, shift, np.float64, 32, squares=True) for _ in range(3)]
    for part, block in zip(parts, np.split(rows.copy(), 3)):
        part.add(block, 32)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    np.testing.assert_allclose(parts[2].mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(parts[2].variance(), rows.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(parts[2].finish(), directions @ np.cov(rows.T), atol=1e-12)


@pytest.mark.parametrize(
    ("true", "most"),
    # the 25 of the range, and what the 8 random directions have in its complement; all, of which most of each product is not new
    [(np.concatenate([np.linspace(9, 1, 25), np.zeros(15)]), 33), (np.logspace(1, -7, 40), 40)],
)
def test_a_krylov_space_keeps_its_recurrence(true, most):
    """C V = V_next H in every block, V orthonormal, also when directions run out; eigenvalues below the true ones."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    matrix = basis * true @ basis.T
    space = KrylovSpace(rng.standard_normal((8, 40)))
    missing = []
    while not space.finished:
        space.extend(space.blocks[-1] @ matrix)
        stacked = np.concatenate(space.blocks)
        np.testing.assert_allclose(stacked @ stacked.T, np.eye(space.width), atol=1e-12)
        known = space._coefficients.shape[1]
        # 1e-6 of the largest eigenvalue counts as nothing left
        np.testing.assert_allclose(stacked[:known] @ matrix, space._coefficients.T @ stacked, atol=1e-4)
        leading = space.leading(6, true.sum(), 40)
        assert (leading.values <= true[:6] + 1e-12).all()
        missing.append(true[:6].sum() - leading.values.sum())
    assert space.width <= most and (np.diff(missing) <= 1e-12).all()
    # eigenvalues are good to the square of what is neglected
    assert missing[-1] < 1e-9


def test_directions_of_very_different_sizes_are_made_orthonormal():
    """Singular values from 1 to 3e-6: orthonormal to rounding and the rows come back; smaller ones are left out."""
    rng = np.random.default_rng(0)
    left, right = np.linalg.qr(rng.standard_normal((6, 6)))[0], np.linalg.qr(rng.standard_normal((50, 6)))[0].T
    rows = left * [1, 1e-2, 1e-4, 3e-6, 1e-7, 0] @ right
    directions, factor = _orthonormalise(rows.copy(), 1e-6)
    np.testing.assert_allclose(directions @ directions.T, np.eye(4), atol=1e-13)
    # to the largest that was left out
    np.testing.assert_allclose(factor.T @ directions, rows, atol=1e-7)
    # rounding of the Gram matrix, 1e-16, over the smallest singular value kept
    np.testing.assert_allclose(factor, directions @ rows.T, atol=1e-10)


def test_rows_are_read_in_the_pieces_that_sources_plan_for():
    """A block larger than a piece is put together from pieces, each in its place."""
    values, sizes = np.arange(20.0)[:, None], []

    class Source:
        n_rows, n_features = 20, 1

        def read(self, start, stop, out):
            sizes.append(stop - start)
            out[: stop - start] = values[start:stop]

    block = np.empty((8, 1))
    rows = [block[:n].copy() for _, n in iter_blocks(Pieces(Source(), 3), block)]
    assert np.array_equal(np.concatenate(rows), values) and sizes == [3, 3, 2, 3, 3, 2, 3, 1]


CHILD = """
import numpy as np
from streamcnn.memory import peak_resident_bytes, reset_peak, resident_bytes
from streamcnn.pca import StreamingPCA
from streamcnn.pcaplan import pca_bytes

class Made:
    # white rows, on which no pass is spared
    def __init__(self, n, d):
        self.n_rows, self.n_features = n, d
    def read(self, start, stop, out):
        for row in range(start, stop):
            np.random.Generator(np.random.SFC64(row)).standard_normal(out=out[row - start], dtype=np.float32)

n, d, k = {n}, {d}, {k}
StreamingPCA(5, solver="randomized", n_jobs=1).fit(Made(600, 50))
for dtype in (np.float32, np.float64):  # BLAS keeps its work space, which is not the fit's
    np.ones((600, 3000), dtype) @ np.ones((3000, 600), dtype)
before = resident_bytes()
exact = reset_peak()
StreamingPCA(k, solver="randomized", n_jobs=1).fit(Made(n, d))
peak = peak_resident_bytes()
print(exact and peak is not None, (peak or 0) - before, sum(pca_bytes("randomized", d, k, n).values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process start its high-water mark afresh")
@pytest.mark.parametrize(("n", "d", "k"), [(1200, 12_000, 40), (60, 20_000, 20), (1000, 1500, 150)])
def test_declared_bytes_are_those_used(n, d, k):
    """The peak of a fit with all passes, in a fresh process, is 60 to 100 % of the sum of its declared buffers."""
    code = CHILD.format(n=n, d=d, k=k)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if output[0] != "True":
        pytest.skip("this system does not let a process reset its high-water mark")
    used, declared = int(output[1]), int(output[2])
    assert 0.6 * declared <= used <= declared


def test_more_variance_than_incremental_pca():
    """Never below scikit-learn's IncrementalPCA on a slow spectrum."""
    rows = rows_of(SPECTRA["i^-0.5"], 2000)
    theirs = IncrementalPCA(20, batch_size=200).fit(rows)
    assert captured(rows, StreamingPCA(20, solver="randomized").fit(rows).components_) > captured(rows, theirs.components_)
