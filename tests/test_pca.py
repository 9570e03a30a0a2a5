import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from streamcnn.errors import DataError, ParameterError
from streamcnn.incremental import default_batch_size, incremental_batches, iter_incremental
from streamcnn.pca import StreamingPCA
from streamcnn.pcaplan import choose_solver, pca_bytes, pca_passes, resolve_solver
from streamcnn.rows import ArrayRows, block_rows
from streamcnn.threads import limit_blas, resolve_n_jobs

RESULTS = ("components_", "mean_", "var_", "explained_variance_", "explained_variance_ratio_", "singular_values_", "noise_variance_")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """BLAS threads wait for each other in a loop: two on cores that others use too were measured to take 10 to 40 times as long."""
    with pytest.MonkeyPatch.context() as patch, limit_blas(1):
        patch.setattr("streamcnn.pca.resolve_n_jobs", lambda n_jobs: min(1, resolve_n_jobs(n_jobs)))
        yield


class StoredRows:
    """Rows as a store gives them: float32, any range."""

    def __init__(self, array):
        self.array = np.asarray(array, np.float32)
        self.n_rows, self.n_features = self.array.shape

    def read(self, start, stop, out):
        assert out.dtype == np.float32 and stop - start <= len(out)
        out[: stop - start] = self.array[start:stop]


def slow_spectrum(n, d, seed=0, offset=0.0):
    """Rows whose variances fall slowly, at an offset."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5 @ basis + offset * rng.uniform(0.5, 1.5, d)


def assert_same_bits(one, two):
    for name in RESULTS:
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


@parametrize_with_checks(
    [
        StreamingPCA(),
        StreamingPCA(n_components=1, solver="incremental"),
        StreamingPCA(n_components=1, whiten=True),
        StreamingPCA(n_components=1, solver="randomized"),
    ],
    legacy=True,
    expected_failed_checks=lambda pca: (
        dict.fromkeys(("check_fit_score_takes_y", "check_n_features_in_after_fitting"), "calls partial_fit, which needs a one-pass solver")
        if pca.solver == "randomized"
        else {}
    ),
)
def test_scikit_learn_checks(estimator, check):
    """Every check scikit-learn has for a transformer passes, except two that call the `partial_fit` randomized cannot have."""
    check(estimator)


@pytest.mark.parametrize(("n", "d", "k"), [(1500, 40, 7), (300, 300, 300), (60, 90, 12), (2100, 300, 20)])
def test_covariance_is_exact(n, d, k):
    """All attributes of scikit-learn's full PCA, to float64 rounding, on whole and partial blocks and strips."""
    rows = slow_spectrum(n, d, offset=3)
    ours, theirs = StreamingPCA(k, solver="covariance").fit(rows), PCA(k, svd_solver="full").fit(rows)
    # the covariance squares the condition: eigenvalues to 1e-13 of the largest
    atol = 1e-13 * theirs.explained_variance_[0] * d
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=0, atol=atol)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.var_, rows.var(axis=0), rtol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=0, atol=1e-11)
    np.testing.assert_allclose(ours.noise_variance_, theirs.noise_variance_, rtol=1e-8, atol=atol)
    np.testing.assert_allclose(ours.singular_values_[:5], theirs.singular_values_[:5], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(ours.components_[:5] * theirs.components_[:5], axis=1)), 1, rtol=1e-9)
    np.testing.assert_allclose(ours.components_ @ ours.components_.T, np.eye(k), atol=1e-10)
    largest = np.abs(ours.components_).argmax(axis=1)
    assert (ours.components_[np.arange(k), largest] > 0).all()


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_covariance_of_float32_rows_survives_an_offset(offset):
    """Eigenvalues within 1e-6 of the largest, of float64 PCA on the same float32 rows."""
    rows = slow_spectrum(3000, 60, offset=offset).astype(np.float32)
    ours = StreamingPCA(20).fit(StoredRows(rows))
    theirs = PCA(20, svd_solver="full").fit(rows.astype(np.float64))
    assert np.abs(ours.explained_variance_ - theirs.explained_variance_).max() <= 1e-6 * theirs.explained_variance_[0]


@settings(deadline=None, max_examples=12)
@given(cuts=st.lists(st.integers(1, 2499), max_size=6), solver=st.sampled_from(["covariance", "incremental", "randomized"]))
def test_fit_has_the_same_bits_however_batches_are_cut(cuts, solver):
    """Any cutting of the same rows into batches, with or without labels, gives the identical model."""
    rows = slow_spectrum(2500, 30, offset=2).astype(np.float32)
    parts = np.split(rows, sorted(set(cuts)))
    whole = StreamingPCA(4, solver=solver).fit([rows])
    assert_same_bits(StreamingPCA(4, solver=solver).fit(parts), whole)
    assert_same_bits(StreamingPCA(4, solver=solver).fit([(part, np.zeros(len(part))) for part in parts]), whole)


@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
def test_a_store_and_an_array_give_the_same_bits(solver):
    """float32 rows from `Rows`, from an array, in Fortran order: the identical model."""
    rows = slow_spectrum(2500, 30, offset=2).astype(np.float32)
    model = StreamingPCA(4, solver=solver).fit(StoredRows(rows))
    for other in (rows, np.asfortranarray(rows), rows.astype(">f4")):
        assert_same_bits(StreamingPCA(4, solver=solver).fit(other), model)
    assert model.n_samples_seen_ == 2500 and model.n_features_in_ == 30


def test_half_precision_and_bytes_are_taken_as_they_are():
    """float16 and uint8 rows equal the same values in float32, and come out as float32."""
    values = np.random.default_rng(0).integers(0, 256, (400, 12))
    expected = StreamingPCA(3).fit(values.astype(np.float32))
    for dtype in (np.uint8, np.float16):
        model = StreamingPCA(3).fit(values.astype(dtype))
        assert_same_bits(model, expected)
        assert model.transform(values.astype(dtype)).dtype == np.float32


@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(2, 698), min_size=1, max_size=3, unique=True), order=st.randoms(use_true_random=False))
def test_merging_parts_in_any_order_equals_one_fit(cuts, order):
    """Parts with quite different means, merged in random order: eigenvalues within 1e-12 of the largest, and the same mean."""
    rows = slow_spectrum(700, 280, offset=1)
    rows[300:] += 50
    parts = [StreamingPCA(5).partial_fit(part) for part in np.split(rows, sorted(cuts))]
    order.shuffle(parts)
    first, *others = parts
    before = [other.n_samples_seen_ for other in others]
    for other in others:
        first.merge(other)
    assert before == [other.n_samples_seen_ for other in others]
    whole = StreamingPCA(5).fit(rows)
    assert first.n_samples_seen_ == 700
    np.testing.assert_allclose(first.mean_, whole.mean_, rtol=1e-12)
    assert np.abs(first.explained_variance_ - whole.explained_variance_).max() <= 1e-12 * whole.explained_variance_[0]
    np.testing.assert_allclose(first.var_, whole.var_, rtol=1e-9)


def test_computing_components_keeps_what_was_accumulated():
    """The eigensolver overwrites half of the matrix; fitting on, asking in between, still equals one fit."""
    rows = slow_spectrum(1200, 300, offset=2)
    model = StreamingPCA(5).fit(rows[:500])
    model.partial_fit(rows[500:900])
    early = model.components_.copy()
    model.partial_fit(rows[900:])
    whole = StreamingPCA(5).fit(rows)
    assert not np.array_equal(model.components_, early)
    np.testing.assert_allclose(model.explained_variance_, whole.explained_variance_, rtol=1e-11)
    np.testing.assert_allclose(model.var_, whole.var_, rtol=1e-11)


def test_merge_needs_exact_moments_of_the_same_width():
    """Merging incremental or narrower models is refused by name."""
    rows = slow_spectrum(400, 20)
    model, narrow = StreamingPCA(2).fit(rows), StreamingPCA(2).fit(rows[:, :10])
    with pytest.raises(DataError, match="same width, got 20 and 10"):
        model.merge(narrow)
    with pytest.raises(ParameterError, match='solver="covariance" on both sides'):
        model.merge(StreamingPCA(2, solver="incremental").fit(rows))
    with pytest.raises(NotFittedError):
        model.merge(StreamingPCA(2))


def test_incremental_partial_fit_is_scikit_learns():
    """The same batches give scikit-learn's IncrementalPCA to the last bit (float64 rows)."""
    rows = slow_spectrum(900, 40, offset=1)
    ours, theirs = StreamingPCA(6, solver="incremental", n_jobs=1), IncrementalPCA(6)
    for part in np.split(rows, [300, 350, 700]):
        ours.partial_fit(part)
        theirs.partial_fit(part)
    for name in RESULTS:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)
    assert ours.n_samples_seen_ == 900


@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 5000), k=st.integers(1, 400), batch=st.one_of(st.none(), st.integers(1, 900)))
def test_every_batch_of_incremental_holds_enough_rows(n, k, batch):
    """Stripes dealt round robin cover every row once, no batch is below n_components or far above the batch size."""
    k = min(k, n)
    n_batches, stripe = incremental_batches(n, k, batch)
    starts = range(0, n, stripe)
    sizes = [sum(min(s + stripe, n) - s for s in starts[j::n_batches]) for j in range(n_batches)]
    assert sum(sizes) == n and min(sizes) >= k
    # a batch too small to stand alone is shared out among the others, which at most doubles them
    assert max(sizes) <= 2 * max(batch or default_batch_size(k), k, 2) + stripe


@pytest.mark.parametrize("made", [StoredRows, ArrayRows])
def test_batches_of_incremental_span_the_whole_source(made):
    """Stripes of consecutive rows, each batch from the first to the last; every row once, in order within a batch."""
    rows = np.arange(2003.0)[:, None] * np.ones(3)
    batches = [batch[:, 0].copy() for batch in iter_incremental(made(rows), 10, 300)]
    assert len(batches) == 7 and sorted(np.concatenate(batches).tolist()) == rows[:, 0].tolist()
    for number, batch in enumerate(batches):
        assert batch[:16].tolist() == list(range(16 * number, 16 * number + 16)) and batch[16] == 16 * (number + 7)
        assert batch[-1] >= 2003 - 8 * 16 and (np.diff(batch) > 0).all()


def test_incremental_takes_class_sorted_rows_in_mixed_batches():
    """Rows sorted by class and drifting: within 1 % of the variance that exact PCA captures."""
    rows = slow_spectrum(4000, 50) + np.repeat(np.random.default_rng(1).standard_normal((10, 50)) * 2, 400, axis=0)
    centred = rows - rows.mean(axis=0)

    def captured(model):
        return np.square(centred @ model.components_.T).sum()

    exact = captured(StreamingPCA(8).fit(rows))
    assert captured(StreamingPCA(8, solver="incremental").fit(rows)) >= 0.99 * exact


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
def test_transform_is_affine_and_inverse_transform_undoes_it(solver, whiten):
    """transform = (x - mean) components' (over the deviation when whitened); with all components the rows come back."""
    rows = slow_spectrum(600, 25, offset=4)
    model = StreamingPCA(25, solver=solver, whiten=whiten).fit(rows)
    expected = (rows - model.mean_) @ model.components_.T / (np.sqrt(model.explained_variance_) if whiten else 1)
    reduced = model.transform(rows)
    np.testing.assert_allclose(reduced, expected, atol=1e-10)
    np.testing.assert_allclose(model.inverse_transform(reduced), rows, atol=1e-9)
    if whiten and solver == "covariance":
        np.testing.assert_allclose(reduced.std(axis=0, ddof=1), 1, rtol=1e-9)
    assert model.get_feature_names_out().tolist() == [f"streamingpca{i}" for i in range(25)]


def test_transform_of_float32_rows_is_precise_at_an_offset():
    """At an offset of 1,000 deviations float32 transform agrees with float64 to float32 precision of the result."""
    rows = slow_spectrum(2000, 64, offset=1000).astype(np.float32)
    model = StreamingPCA(10).fit(rows)
    # 64 products of centred values below 6, each with relative error 2**-24 a few times over
    np.testing.assert_allclose(model.transform(rows), model.transform(rows.astype(np.float64)), atol=2e-5)


def test_transform_gives_the_same_bits_from_any_source():
    """Array, `Rows`, batches and `transform_block` on padded blocks agree to the last bit."""
    rows = slow_spectrum(2300, 30, offset=2).astype(np.float32)
    model = StreamingPCA(4).fit(rows)
    expected = model.transform(rows)
    assert np.array_equal(model.transform(StoredRows(rows)), expected)
    assert np.array_equal(model.transform(np.array_split(rows, 7)), expected)
    block, out = np.zeros((block_rows(30), 30), np.float32), np.empty((block_rows(30), 4), np.float32)
    block[: 2300 - 2048] = rows[2048:]
    assert model.transform_block(block, out) is out
    assert np.array_equal(out[: 2300 - 2048], expected[2048:])
    # a new fit is not projected with the old components
    model.fit(rows[:, ::-1].copy())
    block[: 2300 - 2048] = rows[2048:]
    assert not np.array_equal(model.transform_block(block, out)[:252], expected[2048:])


@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
def test_constant_columns_and_fewer_rows_than_features(solver):
    """Columns without variance get none; whitening directions without variance does not blow up."""
    rows = slow_spectrum(40, 60)
    rows[:, 10:20] = 7.0
    model = StreamingPCA(40, solver=solver, whiten=True).fit(rows)
    np.testing.assert_allclose(model.var_[10:20], 0, atol=1e-12)
    # 40 centred rows span 39 directions
    assert model.explained_variance_[39] <= 1e-10 * model.explained_variance_[0]
    assert np.abs(model.transform(rows)).max() < 20
    flat = StreamingPCA(2, solver=solver).fit(np.full((300, 5), 3.0))
    assert flat.explained_variance_ratio_.tolist() == [0, 0] and not flat.transform(np.full((3, 5), 3.0)).any()


@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_bad_values_are_named_with_their_row(solver, bad, word):
    """NaN and infinity in any source: an error naming what and, for rows in order, where; the model stays unfitted."""
    rows = slow_spectrum(1500, 20).astype(np.float32)
    rows[1234, 7] = bad
    for source in (rows, StoredRows(rows), np.array_split(rows, 5)):
        model = StreamingPCA(3, solver=solver)
        with pytest.raises(DataError, match=f"row 1234 contains {word}"):
            model.fit(source)
        with pytest.raises(NotFittedError):
            model.transform(rows[:10])
    if solver != "randomized":
        with pytest.raises(DataError, match=f"row 34 contains {word}"):
            StreamingPCA(3, solver=solver).partial_fit(rows[1200:])
    with pytest.raises(DataError, match=word):
        StreamingPCA(3, solver=solver).fit(rows[:1000]).transform(rows)


def test_bad_rows_added_later_leave_the_model_as_it_was():
    """partial_fit looks at all rows before it adds any."""
    rows = slow_spectrum(3000, 20)
    model = StreamingPCA(3).fit(rows)
    before = model.components_.copy()
    rows[2900, 0] = np.nan
    with pytest.raises(DataError, match="row 5900 contains NaN"):
        model.partial_fit(rows)
    assert model.n_samples_seen_ == 3000 and np.array_equal(model.components_, before)


def test_large_values_whose_sum_overflows_are_accepted():
    """A block sum beyond float32 does not count as infinity."""
    rows = np.full((100, 4), 3e38, np.float32)
    rows[:50] *= 0.5
    assert np.isfinite(StreamingPCA(1).fit(rows.astype(np.float64)).components_).all()
    model = StreamingPCA(1).fit(slow_spectrum(50, 4))
    assert model.transform(rows).shape == (100, 1)


@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
def test_too_many_components_are_refused_with_the_numbers(solver):
    """More components than rows or features allow: the error says how many there may be."""
    rows = slow_spectrum(30, 20)
    for source in (rows, StoredRows(rows), [rows[:10], rows[10:]]):
        with pytest.raises(ParameterError, match=r"n_components must be at most min\(rows, features\) = min\(\d+, 20\) = 20, got 21"):
            StreamingPCA(21, solver=solver).fit(source)
    with pytest.raises(ParameterError, match=r"= min\(15, 20\) = 15, got 16"):
        StreamingPCA(16, solver=solver).fit(rows[:15])
    with pytest.raises(ParameterError, match=r"= min\(15, 20\) = 15, got 16"):
        StreamingPCA(16, solver=solver).fit([rows[:15]])
    assert StreamingPCA(solver=solver).fit(rows[:15]).n_components_ == 15


def test_a_first_batch_below_n_components_is_refused():
    """incremental partial_fit needs n_components rows at once; covariance only in the end."""
    rows = slow_spectrum(30, 20)
    with pytest.raises(ParameterError, match="got 8; lower it or add rows"):
        StreamingPCA(8, solver="incremental").partial_fit(rows[:5])
    model = StreamingPCA(8, solver="covariance").partial_fit(rows[:5])
    with pytest.raises(ParameterError, match="got 8; lower it or add rows"):
        _ = model.components_
    assert model.partial_fit(rows[5:]).components_.shape == (8, 20)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"solver": "full"}, "solver must be one of auto, covariance, incremental, randomized, got 'full'"),
        ({"n_components": 0}, "n_components must be None or a whole number"),
        ({"n_components": 0.9}, "n_components must be None or a whole number"),
        ({"batch_size": -1}, "batch_size must be None or"),
        ({"n_jobs": 0}, "n_jobs must be"),
        ({"random_state": -1}, "random_state must be None or a whole number of at least 0, got -1"),
    ],
)
def test_bad_parameters_are_named(arguments, match):
    """Every parameter out of range is an error that names it."""
    with pytest.raises(ParameterError, match=match):
        StreamingPCA(**arguments).fit(slow_spectrum(30, 5))


def test_sources_that_do_not_fit_are_refused():
    """Generators, batches of other widths, no batches, text, a single row."""
    rows = slow_spectrum(30, 5)
    with pytest.raises(ParameterError, match="re-iterable, got generator"):
        StreamingPCA().fit(part for part in [rows])
    with pytest.raises(DataError, match="batch 1 must have 5 features as the first, got 4"):
        StreamingPCA(2).fit([rows, rows[:, :4]])
    with pytest.raises(DataError, match="batch 0 must be real numbers"):
        StreamingPCA(2).fit([np.array([["a", "b"]])])
    with pytest.raises(DataError, match="batch 0 has 30 rows but 2 labels"):
        StreamingPCA(2).fit([(rows, np.zeros(2))])
    with pytest.raises(DataError, match="at least 2 rows"):
        StreamingPCA(1).fit([rows[:1]])
    with pytest.raises(DataError, match="expecting 5 features"):
        StreamingPCA(2).fit(rows).transform(StoredRows(rows[:, :4]))
    with pytest.raises(ParameterError, match="one array of rows at a time"):
        StreamingPCA(2).partial_fit([rows])


def test_auto_goes_by_shape_and_says_why(caplog):
    """Covariance up to 8,192 features and where it is the smaller one, else randomized; partial_fit sees rows once."""
    assert resolve_solver("auto", 8192) == "covariance" and resolve_solver("auto", 8193, 100) == "randomized"
    assert resolve_solver("auto", 8193) == "randomized" and resolve_solver("auto", 8193, 2000) == "covariance"
    assert choose_solver("auto", 8193, 100, one_pass=True)[0] == "incremental"
    with caplog.at_level("INFO", logger="streamcnn"):
        model = StreamingPCA(2).fit(slow_spectrum(10, 5))
    assert model.solver_ == "covariance" and model.solver_reason_ in caplog.text and "5 features" in model.solver_reason_
    wide = np.random.default_rng(0).standard_normal((30, 8193))
    assert StreamingPCA(2).fit(wide).solver_ == "randomized" and StreamingPCA(2).partial_fit(wide).solver_ == "incremental"
    assert (pca_passes("auto", 8193, 100), pca_passes("covariance"), pca_passes("incremental")) == (6, 1, 1)


@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
def test_saved_arrays_give_the_same_model(solver):
    """Arrays without objects bring back every attribute and bit; a model so loaded takes no more rows."""
    rows = slow_spectrum(500, 20, offset=1)
    model = StreamingPCA(3, solver=solver, whiten=True, n_jobs=1).fit(rows)
    arrays = model.to_arrays()
    assert all(isinstance(a, np.ndarray) and a.dtype.kind in "fi" for a in arrays.values())
    loaded = StreamingPCA.from_arrays(arrays)
    assert_same_bits(loaded, model)
    assert np.array_equal(loaded.transform(rows), model.transform(rows))
    assert loaded.solver_ == solver and loaded.n_samples_seen_ == 500 and loaded.n_features_in_ == 20
    with pytest.raises(ParameterError, match="takes no more rows" if solver != "randomized" else "partial_fit sees each row once"):
        loaded.partial_fit(rows)
    with pytest.raises(DataError, match="must hold"):
        StreamingPCA.from_arrays({"mean_": np.zeros(3)})
    with pytest.raises(DataError, match="do not fit together"):
        StreamingPCA.from_arrays(arrays | {"mean_": np.zeros(3)})


CHILD = """
import numpy as np
from streamcnn.memory import peak_resident_bytes, reset_peak, resident_bytes
from streamcnn.pca import StreamingPCA
from streamcnn.pcaplan import pca_bytes

class Made:
    def __init__(self, n, d):
        self.n_rows, self.n_features = n, d
        self.pool = np.random.default_rng(0).standard_normal(d + 997).astype(np.float32)
    def read(self, start, stop, out):
        for row in range(start, stop):
            out[row - start] = self.pool[row % 997 : row % 997 + self.n_features]

solver, n, d, k = {solver!r}, {n}, {d}, {k}
StreamingPCA(5, solver=solver, n_jobs=1).fit(Made(600, 50))
rows = Made(n, d)
before = resident_bytes()
exact = reset_peak()
StreamingPCA(k, solver=solver, n_jobs=1).fit(rows)
peak = peak_resident_bytes()
print(exact and peak is not None, (peak or 0) - before, sum(pca_bytes(solver, d, k, n).values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process start its high-water mark afresh")
@pytest.mark.parametrize(
    ("solver", "n", "d", "k"),
    [
        ("covariance", 600, 2500, 100),
        ("covariance", 600, 2000, 600),
        ("incremental", 263, 8000, 200),
        ("incremental", 900, 9000, 60),
        ("incremental", 1300, 2000, 100),
        # about as many rows in a batch as columns
        ("incremental", 2500, 1600, 400),
    ],
)
def test_declared_bytes_are_those_used(solver, n, d, k):
    """The peak of a fit in a fresh process is within 20 % of the sum of its declared buffers."""
    code = CHILD.format(solver=solver, n=n, d=d, k=k)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if output[0] != "True":
        pytest.skip("this system does not let a process reset its high-water mark")
    used, declared = int(output[1]), int(output[2])
    assert 0.8 * declared <= used <= 1.2 * declared


def test_declared_bytes_are_named():
    """Every buffer has a name; the Gram matrix is 8 d^2 and there is no second one but in float32."""
    claims = pca_bytes("auto", 4096, 256, 50_000)
    assert claims["Gram matrix"] == 8 * 4096**2 and claims["float32 covariance"] == 4 * 4096**2
    assert sum(claims.values()) - claims["float32 covariance"] < 1.75 * 8 * 4096**2
    # nearly all components, and narrow rows: LAPACK alone
    assert "float32 covariance" not in pca_bytes("covariance", 4096, 2000, 50_000) | pca_bytes("covariance", 1000, 20, 50_000)
    # rows and directions are never there at the same time
    assert "row block" not in claims and "row block" in pca_bytes("covariance", 1000, 20, 50_000)
    assert "IncrementalPCA" in pca_bytes("incremental", 10_000, 100, 1000)


@pytest.mark.parametrize("solver", ["covariance", "randomized", "incremental"])
@pytest.mark.parametrize("n_components", [None, 2])
def test_no_rows_are_refused(solver, n_components):
    """Empty batches and sources of no rows, by every solver; in transform too."""
    rows = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    for source in ([rows[:0]], StoredRows(rows[:0]), StoredRows(rows[:1])):
        with pytest.raises(DataError, match=r"at least [12] rows?( in its first batch)?, got [01] sample"):
            StreamingPCA(n_components, solver).fit(source)
    with pytest.raises(DataError, match="at least 1 row, got 0"):
        StreamingPCA(2, solver).fit(rows).transform([rows[:0]])


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("solver", ["covariance", "randomized"])
def test_squares_that_overflow_are_refused(solver):
    """float32 rows of 1e25 have no float32 covariance; as float64 they have that of the rows, times 1e50."""
    rows = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    with pytest.raises(DataError, match="X must have squares that its precision holds"):
        StreamingPCA(2, solver).fit(rows * np.float32(1e25))
    plain, large = (StreamingPCA(2, solver).fit(X).explained_variance_ for X in (rows.astype(float), rows.astype(float) * 1e25))
    np.testing.assert_allclose(large, plain * 1e50, rtol=1e-9)
