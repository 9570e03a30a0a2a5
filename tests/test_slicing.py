"""Arrays that slice and are not in memory: never loaded, the same bits, what they hold planned."""

import subprocess
import sys

import numpy as np
import pytest

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, StreamingPCA, StreamingSVC, open_images, plan, rows, sources
from streamcnn.errors import DataError
from streamcnn.pipeline import Run
from streamcnn.slicing import Pieced, is_sliced

LAYERS = [ConvLayer(8, 3, filters="random", pool_size=2)]
SMALL = {"layers": LAYERS, "image_shape": (8, 8), "random_state": 0}


class Sliced:
    """An array that counts the rows of its largest slice and how often each row is asked for, and cannot be loaded."""

    def __init__(self, values, chunks=None, shape=None):
        self._values, self.chunks = values, chunks
        self.shape, self.dtype, self.ndim = shape or values.shape, values.dtype, values.ndim
        self.largest, self.asked = 0, np.zeros(len(values), int)

    def __len__(self):
        return self.shape[0]

    def __array__(self, *args, **kwargs):
        raise AssertionError("the whole array was loaded")

    def __getitem__(self, key):
        assert isinstance(key, slice)
        self.asked[key] += 1
        self.largest = max(self.largest, len(self._values[key]))
        return self._values[key].copy()


def classify(data, labels, folder):
    """Everything a classifier does with data."""
    classifier = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear", store=folder).fit(data, labels)
    first = [classifier.decision_function(data), classifier.predict(data), classifier.score(data, labels)]
    return [*first, classifier.partial_fit(data, labels).decision_function(data), plan(data, labels, image_shape=(8, 8)).n_features]


def convolve(data, labels, folder):
    return [ConvFeatures(**SMALL).fit_transform(data), ConvFeatures(**SMALL).fit(data).transform(data)]


def reduce(data, labels, folder):
    made = [StreamingPCA(5, solver=solver).fit_transform(data) for solver in ("covariance", "randomized", "incremental")]
    return [*made, StreamingPCA(5, solver="covariance").partial_fit(data).partial_fit(data).components_]


def separate(data, labels, folder):
    svc = StreamingSVC("linear", random_state=0).fit(data, labels)
    return [svc.decision_function(data), svc.predict(data), svc.score(data, labels)]


USES = [(classify, (-1, 8, 8, 1)), (classify, (-1, 8, 8)), (classify, (-1, 64)), (convolve, (-1, 8, 8)), (convolve, (-1, 64))]
USES += [(reduce, (-1, 64)), (separate, (-1, 64))]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 64 rows of 64 bytes; few rows are then enough to see that none is larger."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 64 * 64)
    monkeypatch.setattr(rows, "_PIECE_BYTES", 64 * 64)


@pytest.mark.parametrize("chunks", [None, 20])
@pytest.mark.parametrize(("use", "shape"), USES, ids=lambda value: getattr(value, "__name__", None) or f"{len(value)}-D")
def test_nothing_loads_more_than_a_piece(digits, small_pieces, tmp_path, use, shape, chunks):
    """Whatever an estimator does with an array that slices, no slice has more rows than a piece or chunk, and the bits are the array's."""
    values, labels = digits[0][:700].reshape(shape), digits[1][:700]
    data = Sliced(values, chunks and (chunks, *values.shape[1:]))
    found, expected = use(data, labels, tmp_path / "a"), use(values, labels, tmp_path / "b")
    # scikit-learn's batches of the incremental PCA are dealt by stripes, of at most 64 rows here
    assert 0 < data.largest <= (chunks or 64)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_a_large_chunk_is_decoded_once(small_pieces):
    """Chunks above a quarter of a piece are read whole, once in a pass however it is cut, and one is kept; smaller ones are not."""
    values = np.arange(500 * 64).reshape(500, 64).astype(np.uint8)
    data = Sliced(values, (100, 64))
    source = open_images(data)
    for chunk in source.iter_chunks(7):
        assert chunk[0].shape[1:] == (1, 64, 1)
    assert data.asked.tolist() == [1] * 500 and data.largest == 100
    assert source.scratch_bytes(7) == {"conversion": 6400, "chunks of the array": 12800}
    source.close()
    assert source._data._kept is None
    fine = Sliced(values, (16, 64))
    assert open_images(fine).scratch_bytes(7) == {"conversion": 7 * 64}
    assert not Pieced(fine, 64 * 64).chunk_rows and Pieced(Sliced(values, (17, 64)), 64 * 64).chunk_rows == 17


def test_uneven_chunks_of_dask_are_read_by_the_largest():
    """A tuple of sizes for each axis, as dask has them: their largest; every row comes at its place from wherever a read starts."""
    values = np.arange(100 * 3).reshape(100, 3)
    pieced = Pieced(Sliced(values, ((10, 60, 30), (3,))), 8)
    assert pieced.chunk_rows == 60
    for start in (0, 59, 60, 61):
        got = np.concatenate([part for _, part in pieced.pieces(start, 100)])
        np.testing.assert_array_equal(got, values[start:])


def test_what_is_no_array_of_rows_is_refused(digits):
    """Unknown shapes, other numbers of axes, no numbers, no rows and another width get one sentence, before a value is read."""
    values, labels = digits[0][:50].reshape(50, 64), digits[1][:50]
    unknown = Sliced(values, shape=(float("nan"), 64))
    with pytest.raises(DataError, match=r"X must have a known shape, got \(nan, 64\); call compute_chunk_sizes"):
        StreamingPCA(2).fit(unknown)
    with pytest.raises(DataError, match="images must have a known shape"):
        open_images(Sliced(values.reshape(50, 8, 8), shape=(float("nan"), 8, 8)), labels)
    for wrong in (values.reshape(50, 8, 8), values.astype("S3"), values.astype(complex)):
        with pytest.raises(DataError, match="X must be real numbers of shape"):
            StreamingSVC().fit(Sliced(wrong), labels)
    with pytest.raises(DataError, match="at least 2 rows of at least 1 feature, got 1 of 64"):
        StreamingPCA().fit(Sliced(values[:1]))
    for estimator in (StreamingPCA(2), StreamingSVC(C=1.0), StreamCNNClassifier(**SMALL), ConvFeatures(**SMALL)):
        estimator.fit(Sliced(values), labels)
        use = estimator.predict if hasattr(estimator, "predict") else estimator.transform
        with pytest.raises(DataError, match=r"X has 63 features, but .* is expecting 64"):
            use(Sliced(values[:, :63]))


def test_a_bad_row_of_a_later_call_changes_nothing(small_pieces):
    """partial_fit looks at all of a sliced array before it adds any, and names the row counted over all calls."""
    values = np.random.default_rng(0).standard_normal((300, 6))
    pca = StreamingPCA(2, solver="covariance").partial_fit(Sliced(values))
    before = pca.components_.copy()
    bad = values.copy()
    bad[299, 3] = np.inf
    with pytest.raises(DataError, match="row 599 contains infinity"):
        pca.partial_fit(Sliced(bad))
    assert pca.n_samples_seen_ == 300
    np.testing.assert_array_equal(pca.components_, before)


def test_numpy_sparse_and_frames_do_not_slice(digits):
    """What is in memory, or has no type of its own, is left to scikit-learn's conversion."""
    import pandas as pd
    import scipy.sparse

    frame = pd.DataFrame(np.eye(3))
    assert not any(map(is_sliced, (np.eye(3), scipy.sparse.eye_array(3), frame, [[1.0]], "text", np.float64(1))))
    assert is_sliced(Sliced(np.eye(3)))


def containers(values, folder):
    """The same values in every kind of container there is, by the name of its library."""
    h5py = pytest.importorskip("h5py")
    file = h5py.File(folder / "a.h5", "w")
    file["x"] = values
    yield "h5py", file["x"]
    chunks = (100, *values.shape[1:])
    try:
        import zarr
    except ImportError:
        zarr = None
    else:
        if zarr.__version__.startswith("2"):
            array = zarr.open(str(folder / "a.zarr"), mode="w", shape=values.shape, dtype=values.dtype, chunks=chunks)
        else:
            array = zarr.create_array(str(folder / "a.zarr"), shape=values.shape, dtype=values.dtype, chunks=chunks)
        array[:] = values
        yield "zarr", array
    try:
        import dask.array
    except ImportError:
        return
    yield "dask", dask.array.from_array(values, chunks=chunks)
    yield "dask computed", 255 - dask.array.from_array(255 - values, chunks=chunks)
    if zarr is not None:
        yield "dask over zarr", dask.array.from_zarr(str(folder / "a.zarr"))
    try:
        import xarray
    except ImportError:
        return
    yield "xarray", xarray.DataArray(values)
    yield "xarray over dask", xarray.DataArray(values).chunk(100)


@pytest.mark.parametrize(("use", "shape"), [(classify, (-1, 8, 8)), (convolve, (-1, 64)), (reduce, (-1, 64)), (separate, (-1, 64))])
@pytest.mark.parametrize("library", ["h5py", "zarr", "dask", "xarray"])
def test_real_containers_give_the_bits_of_the_array(digits, tmp_path, library, use, shape):
    """HDF5, zarr (2 and 3), dask and xarray: what comes out is what the array gives."""
    pytest.importorskip(library, reason=f"{library} is not installed: pip install zarr dask xarray")
    values, labels = digits[0][:450].reshape(shape), digits[1][:450]
    expected = use(values, labels, tmp_path / "array")
    for name, data in containers(values, tmp_path):
        if name.split()[0] == library:
            for one, other in zip(use(data, labels, tmp_path / name), expected, strict=True):
                np.testing.assert_array_equal(one, other, strict=True, err_msg=name)


LARGER = """
import sys
import numpy as np, zarr
from streamcnn import ConvLayer, StreamCNNClassifier

array, labels = zarr.open_array(sys.argv[1], mode="r"), np.arange(int(sys.argv[4])) % 4
if sys.argv[2] == "dask":
    import dask.array
    array = dask.array.from_array(array, chunks=array.chunks)
if sys.argv[3] == "rows":
    array = array.reshape(len(array), -1) if sys.argv[2] == "dask" else array
layers = [ConvLayer(4, 3, filters="random", pool_grid=(3, 3))]
parameters = {"layers": layers, "kernel": "linear", "C": 1.0, "image_shape": (64, 64), "random_state": 0}
classifier = StreamCNNClassifier(**parameters, memory_limit="600MiB").fit(array, labels)
classifier.predict(array)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) << 10, classifier.report_.plan.peak_bytes, classifier.score(array, labels))
"""


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM, which is Linux's own")
@pytest.mark.parametrize(("library", "shape"), [("zarr", "images"), ("zarr", "rows"), ("dask", "images"), ("dask", "rows")])
def test_more_than_the_limit_from_zarr_and_dask(tmp_path, library, shape):
    """768 MiB in chunks of 16 MiB under a limit of 600 MiB, images or rows: the high-water mark of a fresh process is below the limit."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: pip install zarr dask xarray")
    pytest.importorskip(library, reason=f"{library} is not installed: pip install zarr dask xarray")
    n = 3 << 16
    sizes = (n, 64, 64) if shape == "images" or library == "dask" else (n, 4096)
    array = zarr.create_array(str(tmp_path / "a"), shape=sizes, dtype=np.uint8, chunks=(4096, *sizes[1:]))
    rng = np.random.default_rng(0)
    some = rng.integers(0, 100, (4, 64, 64))[np.arange(4096) % 4] + rng.integers(0, 40, (4096, 64, 64))
    for start in range(0, n, 4096):
        array[start : start + 4096] = some.astype(np.uint8).reshape(4096, *sizes[1:])
    command = [sys.executable, "-c", LARGER, str(tmp_path / "a"), library, shape, str(n)]
    peak, planned, score = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert peak < 600 << 20 and planned < 600 << 20 and score > 0.9


def test_stages_that_read_no_images_keep_no_chunk_of_them(small_pieces, digits, monkeypatch):
    """After features are extracted the chunk that was decoded is let go of: later stages do not declare it."""
    kept, reduce = [], Run._reduce

    def spy(run, network):
        kept.append(run.source._data._kept)
        return reduce(run, network)

    monkeypatch.setattr(Run, "_reduce", spy)
    data = Sliced(digits[0][:200], (100, 8, 8))
    StreamCNNClassifier(n_components=8, kernel="linear", C=1.0, random_state=0).fit(data, digits[1][:200])
    assert data.largest == 100 and kept == [None]
