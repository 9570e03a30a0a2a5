"""partial_fit of the classifier: images and classes added to a finished fit."""

import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.svm import SVC, LinearSVC
from sklearn.utils import estimator_checks

from streamcnn import ConvFeatures, ConvLayer, FeatureStore, StreamCNNClassifier, adding, load_model, open_images
from streamcnn.errors import DataError, MemoryBudgetError, NotKeptError, StoreError
from streamcnn.files import FolderLock
from streamcnn.linear import LinearProblem
from streamcnn.manifest import Manifest
from streamcnn.newton import continued, solve
from streamcnn.progress import CountedRows
from streamcnn.rows import ArrayRows
from streamcnn.shards import StoredRows

LAYERS = [ConvLayer(8, 3, activation="split", filters="random", pool_size=2)]


def make(store, **parameters):
    return StreamCNNClassifier(**{"layers": LAYERS, "random_state": 0, "kernel": "linear", "C": 1.0, "store": store} | parameters)


@pytest.fixture
def parts(digits):
    """700 digits of the classes 0 to 6, then 400 of all classes: (images, labels) of each."""
    images, labels = digits
    first = np.flatnonzero(labels < 7)[:700]
    second = np.setdiff1d(np.arange(len(labels)), first)[:400]
    return (images[first], labels[first]), (images[second], labels[second])


def kept_rows(path, kind="reduced"):
    """Rows as stored, those of the fit and those added, in order."""
    store = FeatureStore(path)
    with StoredRows(store.path, store.shards(kind) + store.shards("added")) as rows:
        out = np.empty((rows.n_rows, rows.n_features), np.float32)
        rows.read(0, rows.n_rows, out)
    return out


def assert_same_model(one, other):
    arrays = other.model_.to_arrays()
    assert one.model_.to_arrays().keys() == arrays.keys()
    for name, array in one.model_.to_arrays().items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert one.classes_.tolist() == other.classes_.tolist()
    assert one.model_.header["digest"] == other.model_.header["digest"]


def objective(rows, positive, weights, coef, intercept):
    """f of `streamcnn.linear` with C = 1 for scaled rows, float64."""
    loss = np.square(np.maximum(0, 1 - np.where(positive, 1, -1) * (rows @ coef + intercept)))
    return 0.5 * (coef @ coef + intercept**2) + (weights * loss).sum()


@pytest.mark.parametrize("n_components", [30, None])
@pytest.mark.parametrize("weight", [None, "balanced"])
def test_the_linear_svm_is_that_of_all_rows(tmp_path, parts, n_components, weight):
    """Filters, PCA and scaling keep their bits; each plane has LinearSVC's objective on all rows, new classes too, to 1e-6."""
    (images, labels), (more, more_labels) = parts
    classifier = make(tmp_path / "s", n_components=n_components, class_weight=weight).fit(images, labels)
    before = classifier.model_
    after = classifier.partial_fit(more, more_labels).model_
    for name, array in before.to_arrays().items():
        if name.startswith(("network", "pca")):
            np.testing.assert_array_equal(after.to_arrays()[name], array)
    assert (after.svm.scale_, after.svm.C_, after.header["n_train"]) == (before.svm.scale_, 1.0, 1100)
    labels = np.concatenate([labels, more_labels])
    rows = kept_rows(tmp_path / "s", "features" if n_components is None else "reduced").astype(np.float64) * after.svm.scale_
    weights = (np.ones(10) if weight is None else 1100 / (10 * np.bincount(labels)))[labels]
    for c in range(10):
        svc = LinearSVC(dual=False, tol=1e-10).fit(rows, labels == c, sample_weight=weights)
        ours = objective(rows, labels == c, weights, after.svm.coef_[c] / after.svm.scale_, after.svm.intercept_[c])
        assert ours <= objective(rows, labels == c, weights, svc.coef_[0], svc.intercept_[0]) * (1 + 1e-6)


def test_the_rbf_svm_is_that_of_all_rows(tmp_path, parts):
    """The exact RBF SVM decides as scikit-learn's SVC with the same C, gamma and scaling on all rows."""
    (images, labels), (more, more_labels) = parts
    classifier = make(tmp_path / "s", kernel="rbf", C="auto").fit(images, labels)
    C, gamma = classifier.C_, classifier.gamma_
    classifier.partial_fit(more, more_labels)
    assert (classifier.C_, classifier.gamma_) == (C, gamma)
    svm = classifier.model_.svm
    rows = kept_rows(tmp_path / "s")
    svc = SVC(C=C, gamma=gamma).fit(rows.astype(np.float64) * svm.scale_, np.concatenate([labels, more_labels]))
    # the same problem for the same libsvm: the support vectors are the same rows
    np.testing.assert_array_equal(svm.n_support_, svc.n_support_)
    np.testing.assert_allclose(svm.dual_coef_, svc.dual_coef_, rtol=1e-12)


@pytest.mark.parametrize("n_components", [30, None])
def test_new_images_become_the_rows_they_are_predicted_by(tmp_path, parts, n_components, monkeypatch):
    """Rows that were added, into shards of 64, are those of the same filters and PCA, in order, and without PCA to the bit."""
    monkeypatch.setattr(adding, "shard_rows", lambda *shape: 64)
    (images, labels), (more, more_labels) = parts
    classifier = make(tmp_path / "s", n_components=n_components).fit(images, labels)
    classifier.partial_fit(more[:150], more_labels[:150]).partial_fit(more[150:], more_labels[150:])
    added = kept_rows(tmp_path / "s", "features" if n_components is None else "reduced")[700:]
    features = ConvFeatures(LAYERS, random_state=0).fit(images).transform(more)
    if n_components is None:
        np.testing.assert_array_equal(added, features)
    else:
        expected = classifier.model_.pca.transform(features.astype(np.float64))
        # 144 products and sums in float32
        np.testing.assert_allclose(added, expected, atol=144 * 2**-24 * np.abs(features).max() * 12)


def test_classes_grow_and_stay_sorted(tmp_path, digits, monkeypatch):
    """Two classes become four and then five, names that sort before, between and after the old ones; codes and planes follow them."""
    places = []
    monkeypatch.setattr("streamcnn.svmtraining.continued", lambda *args: places.append(args[-1].tolist()) or continued(*args))
    images, labels = digits[0][:900], np.array(["m", "t", "a", "p", "z", "x"])[np.minimum(digits[1][:900], 5)]
    classifier = make(tmp_path / "s").fit(images[np.isin(labels, ["m", "t"])], labels[np.isin(labels, ["m", "t"])])
    for new in (["a", "z"], ["p"]):
        classifier.partial_fit(images[np.isin(labels, new)], labels[np.isin(labels, new)])
    assert classifier.classes_.tolist() == ["a", "m", "p", "t", "z"]
    assert places == [[1, 2], [0, 1, 3, 4]]
    known = labels != "x"
    # numbering mixed up anywhere would leave a fifth of it
    assert classifier.score(images[known], labels[known]) > 0.98
    assert classifier.model_.svm.coef_.shape[0] == 5
    saved = load_model(tmp_path / "s/model.h5")
    assert saved.classes_.tolist() == classifier.classes_.tolist()
    for name, array in classifier.model_.to_arrays().items():
        np.testing.assert_array_equal(saved.to_arrays()[name], array)


def test_chunks_and_limits_change_no_bit(tmp_path, parts, monkeypatch):
    """Chunks of 16 images or of all give the same model, and so does not keeping features in the first fit."""
    first, (more, more_labels) = parts
    whole = make(tmp_path / "a").fit(*first).partial_fit(more, more_labels)
    monkeypatch.setattr("streamcnn.planning.CHUNK_SIZES", (16, 1))
    small = make(tmp_path / "b", keep_features=False, memory_limit="3GiB").fit(*first).partial_fit(more, more_labels)
    assert (whole.report_.plan.chunk_size, small.report_.plan.chunk_size) == (512, 16)
    assert_same_model(small, whole)
    assert 0 < small.peak_rss_bytes_ <= small.report_.plan.peak_bytes


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["writing", "training", "saving", "recording", "after"])
def test_an_interrupted_call_made_again_adds_once(tmp_path, parts, monkeypatch, where):
    """Wherever it stops, the classifier is as it was, and the same call ends in the model of an undisturbed one, reading no image twice."""
    first, (more, more_labels) = parts
    monkeypatch.setattr(adding, "shard_rows", lambda *shape: 128)
    whole = make(tmp_path / "a").fit(*first).partial_fit(more, more_labels)
    classifier = make(tmp_path / "b").fit(*first)
    before = classifier.model_
    with monkeypatch.context() as patch:
        if where == "writing":
            written = FeatureStore.writing
            patch.setattr(
                FeatureStore, "writing", lambda self, kind, shard, *rest: written(self, kind, shard, *rest) if shard < 2 else stop()
            )
        elif where == "training":
            patch.setattr("streamcnn.svmtraining.linear_solver", stop)
        elif where == "saving":
            patch.setattr("streamcnn.model.save_arrays", stop)
        elif where == "recording":
            record = Manifest.add
            patch.setattr(Manifest, "add", lambda self, entry: stop() if "stage" in entry else record(self, entry))
        else:
            patch.setattr("streamcnn.estimators.add_images", lambda *args, **more: stop(adding.add_images(*args, **more)))
        with pytest.raises(KeyboardInterrupt):
            classifier.partial_fit(more, more_labels)
    assert classifier.model_ is before
    with open_images(more, more_labels) as source:
        classifier.partial_fit(source)
        assert source.n_images_read == (400 - 256 if where == "writing" else 0)
    assert classifier.report_.resumed
    assert_same_model(classifier, whole)
    assert len(kept_rows(tmp_path / "b")) == 1100
    assert FeatureStore(tmp_path / "b").verify() == []


def test_after_an_interruption_other_images_may_come(tmp_path, parts, monkeypatch):
    """What an interrupted call has written is dropped when another one is made instead."""
    first, (more, more_labels) = parts
    whole = make(tmp_path / "a").fit(*first).partial_fit(more[:200], more_labels[:200])
    classifier = make(tmp_path / "b").fit(*first)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("streamcnn.svmtraining.linear_solver", stop)
        classifier.partial_fit(more, more_labels)
    assert_same_model(classifier.partial_fit(more[:200], more_labels[:200]), whole)
    assert len(kept_rows(tmp_path / "b")) == 900


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_the_same_images_may_be_added_twice(tmp_path, parts):
    """A finished call made again is a new one: its rows then count double. (Here the rounding of f once kept a plane from ending.)"""
    first, (more, more_labels) = parts
    classifier = make(tmp_path / "s").fit(*first).partial_fit(more, more_labels).partial_fit(more, more_labels)
    assert classifier.model_.header["n_train"] == 1500
    rows = kept_rows(tmp_path / "s")
    np.testing.assert_array_equal(rows[700:1100], rows[1100:])


def test_a_fit_into_the_store_drops_what_was_added(tmp_path, parts):
    """The stages of the fit itself are reused, and the model is as before the additions."""
    first, second = parts
    alone = make(tmp_path / "s").fit(*first)
    added = make(tmp_path / "s").fit(*first).partial_fit(*second)
    again = make(tmp_path / "s").fit(*first)
    assert again.report_.reused == ["filters", "extract", "pca", "project", "svm"]
    assert_same_model(again, alone)
    assert not (tmp_path / "s/added").exists()
    with pytest.raises(StoreError, match=r"the fit and the additions that this model was trained on, .* holds others"):
        added.partial_fit(*second)


def test_a_pickled_classifier_goes_on(tmp_path, parts):
    """The store's folder is all a classifier needs beside itself; a pickle older than the store's last addition is refused."""
    first, (more, more_labels) = parts
    classifier = make(tmp_path / "s").fit(*first)
    old = pickle.dumps(classifier)
    new = pickle.loads(pickle.dumps(classifier.partial_fit(more[:200], more_labels[:200])))  # noqa: S301
    assert new.partial_fit(more[200:], more_labels[200:]).model_.header["n_train"] == 1100
    with pytest.raises(StoreError, match="holds others: repeat the call that was interrupted"):
        pickle.loads(old).partial_fit(more[200:], more_labels[200:])  # noqa: S301


def test_an_unfitted_classifier_is_fitted(tmp_path, parts):
    """The first call is a fit; labels outside `classes` are refused there and later, and those inside need not all come."""
    (images, labels), (more, more_labels) = parts
    classifier = make(tmp_path / "s").partial_fit(images, labels, classes=range(8))
    assert_same_model(classifier, make(tmp_path / "t").fit(images, labels))
    assert classifier.classes_.tolist() == list(range(7))
    with pytest.raises(DataError, match="labels must be among classes, got 8: add it to classes"):
        classifier.partial_fit(more, more_labels, classes=range(8))
    with pytest.raises(DataError, match="labels must be among classes, got 6"):
        make(None).partial_fit(images, labels, classes=range(6))


@pytest.mark.parametrize(
    "check",
    ["check_estimators_partial_fit_n_features", "check_n_features_in_after_fitting", "check_dataframe_column_names_consistency"]
    + ["check_fit_score_takes_y", "check_fit2d_1sample"],
)
@pytest.mark.filterwarnings("ignore:layer 1. images leave room:UserWarning")
def test_scikit_learn_contract_with_a_store(tmp_path, check):
    """Its checks that call partial_fit on a fitted estimator hold with a store as well as without one."""
    getattr(estimator_checks, check)("StreamCNNClassifier", StreamCNNClassifier(random_state=0, store=tmp_path / "s"))


def test_without_kept_rows_there_is_one_clear_error(tmp_path, parts):
    """No store, a store that is gone, another's, one without feature rows: each named, and the model stays usable."""
    first, second = parts
    classifier = make(None).fit(*first)
    assert not hasattr(classifier, "partial_fit")
    text = "store must be the folder in which the first fit kept the rows .*, got None: fit with store="
    with pytest.raises(NotKeptError, match=text):
        classifier.partial_fit(*second)
    classifier = make(None).partial_fit(*first)
    with pytest.raises(NotKeptError, match=text):
        classifier.partial_fit(*second)
    classifier = make(tmp_path / "s").fit(*first)
    make(tmp_path / "s", C=0.5).fit(*first)
    with pytest.raises(StoreError, match="must hold the fit"):
        classifier.partial_fit(*second)
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(StoreError, match="holds no store"):
        classifier.partial_fit(*second)
    classifier = make(tmp_path / "s", n_components=None, keep_features=False).fit(*first)
    with pytest.raises(StoreError, match=r"must keep the 700 rows .* has 0: fit again, with keep_features=True"):
        classifier.partial_fit(*second)
    assert classifier.score(*first) > 0.9


def test_a_store_in_use_is_left_alone(tmp_path, parts):
    """While another holds the store's lock nothing is added; afterwards it is."""
    first, second = parts
    classifier = make(tmp_path / "s").fit(*first)
    lock = FolderLock(tmp_path / "s")
    lock.acquire()
    with pytest.raises(StoreError, match="in use by another process"):
        classifier.partial_fit(*second)
    lock.release()
    assert classifier.partial_fit(*second).model_.header["n_train"] == 1100


def test_wrong_images_and_labels_are_refused(tmp_path, parts):
    """Another shape, other pixels, no labels, names instead of numbers: named, and nothing reaches the store."""
    first, (more, labels) = parts
    classifier = make(tmp_path / "s").fit(*first)
    entries = FeatureStore(tmp_path / "s").entries
    for images, given, text in (
        (more[:, 1:], labels, r"images must be 8 x 8 x 1 .* got 7 x 8 x 1"),
        (more.astype(np.float32), labels, "pixels must be uint8 as in training, got float32"),
        (open_images(more), None, "labels are missing"),
        (more, labels.astype(str), r"labels must be whole numbers \(int64\) as in the first fit, got names such as .*0.*: convert them"),
        (more, labels[1:], "labels"),
    ):
        with pytest.raises(DataError, match=text):
            classifier.partial_fit(images, given)
    assert FeatureStore(tmp_path / "s").entries == entries


def test_a_class_too_small_to_calibrate_is_refused_before_it_is_added(tmp_path, parts):
    """Named by its label; nothing reaches the store, and two images of it are enough."""
    first, (more, _) = parts
    classifier = make(tmp_path / "s", probability=True).fit(*first)
    entries = FeatureStore(tmp_path / "s").entries
    with pytest.raises(DataError, match=r"at least 2 rows of each class .* got 1 of 701 rows for class 42"):
        classifier.partial_fit(more[:1], [42])
    assert FeatureStore(tmp_path / "s").entries == entries
    assert classifier.partial_fit(more[:2], [42, 42]).predict_proba(more[:3]).shape == (3, 8)


def test_what_does_not_fit_is_refused_before_it_starts(tmp_path, parts, monkeypatch):
    """Too small a limit and too small a disk get their tables; the store stays as it was."""
    first, second = parts
    classifier = make(tmp_path / "s").fit(*first)
    with pytest.raises(
        MemoryBudgetError, match=r"memory_limit of 20.0 MiB is too small: set memory_limit to at least .*as stage svm needs"
    ):
        classifier.set_params(memory_limit="20MiB").partial_fit(*second)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="KiB free and the store needs"):
        classifier.set_params(memory_limit=None).partial_fit(*second)
    assert not (tmp_path / "s/added").exists()


def test_past_the_rows_of_the_exact_svm_another_is_trained(tmp_path, parts, monkeypatch):
    """With kernel="auto" the rows may leave the exact SVM's reach: C is then chosen anew, the scaling stays."""
    first, second = parts
    monkeypatch.setattr("streamcnn.ladder.RBF_ROWS", 1000)
    classifier = make(tmp_path / "s", kernel="auto", C="auto").fit(*first)
    scale = classifier.model_.svm.scale_
    assert classifier.kernel_ == "rbf"
    classifier.partial_fit(*second)
    assert (classifier.kernel_, classifier.model_.header["kernel"], classifier.model_.svm.scale_) == ("linear", "linear", scale)
    assert classifier.model_.svm.selection_.keys() == {0.01, 0.1, 1.0, 10.0, 100.0}
    assert classifier.score(*second) > 0.9


def test_damage_to_added_rows_is_found(tmp_path, parts):
    """verify names the shard, and a later addition does not train on it."""
    first, second = parts
    classifier = make(tmp_path / "s").fit(*first).partial_fit(*second)
    shard = tmp_path / "s/added/00000.h5"
    data = bytearray(shard.read_bytes())
    place = data.find(kept_rows(tmp_path / "s")[700:].tobytes()[:64])
    data[place + 5] ^= 1
    shard.write_bytes(data)
    assert FeatureStore(tmp_path / "s").verify() == ["added/00000.h5: " + FeatureStore(tmp_path / "s").verify()[0].partition(": ")[2]]
    with pytest.raises(StoreError, match=r"00000.h5 is damaged: features: chunk 0 does not match its checksum"):
        classifier.partial_fit(*second)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_warm_start_needs_fewer_passes(n_classes):
    """From the planes of most rows the solver is done in 3 passes, by the same measure as from nothing, and reads no row besides."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 20)).astype(np.float32)
    codes = np.argmax(rows @ rng.normal(size=(20, n_classes)) + 2 * rng.normal(size=(4000, n_classes)), axis=1).astype(np.int32)
    read = []
    problem = LinearProblem(CountedRows(ArrayRows(rows), read.append), rows.dtype, 0.2, codes, np.linspace(1, 2, n_classes))
    part = LinearProblem(ArrayRows(rows[:3900]), rows.dtype, 0.2, codes[:3900], problem.row_weights)
    machine, cold = part.machine(solve(part, 1.0, 1e-6, 50)), solve(problem, 1.0, 1e-6, 50)
    read.clear()
    start = continued(problem, 1.0, machine.coef, machine.intercept, np.arange(n_classes))
    warm = solve(problem, 1.0, 1e-6, 50, start)
    assert sum(read) == 4000 * warm.n_passes.max()
    # float32 products of the first pass from either point
    np.testing.assert_allclose(warm.start_gradient, cold.start_gradient, rtol=1e-5)
    assert warm.n_passes.max() <= 3 < cold.n_passes.min()
    np.testing.assert_allclose(warm.objective, cold.objective, rtol=1e-6)


def test_a_new_class_at_a_large_c_starts_from_nothing():
    """Newton steps from planes of 0 overshoot at a large C: the solver then takes its own way up to C. At others the one plane of two
    classes is both of theirs, seen from either side."""
    problem = LinearProblem(ArrayRows(np.eye(3, dtype=np.float32)), np.dtype(np.float32), 1.0, np.arange(3), np.ones(3))
    old = np.array([[1.0, 2.0, 3.0]]), np.array([4.0]), np.array([0, 2])
    assert continued(problem, 1000.0, *old) is None
    assert continued(problem, 1.0, *old).weights.tolist() == [[-1, -2, -3, -4], [0, 0, 0, 0], [1, 2, 3, 4]]
