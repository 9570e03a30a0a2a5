"""scikit-learn faces: contract, inputs, reuse."""

import pickle
import re
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_info, threadpool_limits

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, load_model, open_images
from streamcnn.errors import DataError, MemoryBudgetError, ParameterError, StoreError

SMALL = {"layers": [ConvLayer(8, 3, activation="split", filters="random", pool_size=2)], "random_state": 0}


@pytest.mark.filterwarnings("ignore:layer 1. images leave room:UserWarning")
@parametrize_with_checks([StreamCNNClassifier(random_state=0), ConvFeatures(random_state=0)], legacy=True)
def test_scikit_learn_contract(estimator, check):
    """Every check of scikit-learn, legacy ones included, with no expected failure."""
    check(estimator)


def test_learns_digits_from_images_rows_and_sources(digits):
    """4-D, 3-D and 2-D arrays, memory maps and sources of the same pixels give the same predictions, and good ones."""
    images, labels = digits
    classifier = StreamCNNClassifier(**SMALL).fit(images[:1000], labels[:1000])
    expected = classifier.predict(images[1000:])
    assert np.mean(expected == labels[1000:]) > 0.93
    grey = StreamCNNClassifier(**SMALL).fit(images[:1000, :, :, 0], labels[:1000])
    rows = StreamCNNClassifier(**SMALL, image_shape=(8, 8)).fit(images[:1000].reshape(1000, 64), labels[:1000])
    source = StreamCNNClassifier(**SMALL).fit(open_images(images[:1000], labels[:1000]))
    np.testing.assert_array_equal(grey.predict(images[1000:, :, :, 0]), expected)
    np.testing.assert_array_equal(rows.predict(images[1000:].reshape(-1, 64)), expected)
    np.testing.assert_array_equal(source.predict(images[1000:]), expected)


def test_h5py_data_sets_are_read_in_slices(tmp_path, digits):
    """An open HDF5 data set works as X without being loaded."""
    images, labels = digits
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"] = images[:400]
        classifier = StreamCNNClassifier(**SMALL).fit(file["x"], labels[:400])
        np.testing.assert_array_equal(classifier.predict(file["x"]), classifier.predict(images[:400]))


def test_folder_in_names_out(tree):
    """A path is enough; labels are the folders' names, and score needs no y."""
    path, images, names = tree
    classifier = StreamCNNClassifier(**SMALL).fit(path)
    assert classifier.classes_.tolist() == sorted(set(names))
    np.testing.assert_array_equal(classifier.predict(path), classifier.predict(images))
    assert classifier.score(path) > 0.95


def test_predict_takes_one_image_a_flat_folder_and_arrays_without_labels(tree, tmp_path):
    """A path to an image file, a folder without classes, and bare arrays: the labels that the tree's images have."""
    path, images, _ = tree
    classifier = StreamCNNClassifier(**SMALL).fit(path)
    expected = classifier.predict(images)
    files = sorted(path.rglob("*.png"), key=lambda file: (file.parent.name, file.name))
    (tmp_path / "flat").mkdir()
    for row in (7, 100, 250):
        assert classifier.predict(files[row]).tolist() == [expected[row]]
        (tmp_path / "flat" / files[row].name).write_bytes(files[row].read_bytes())
    in_flat = sorted((7, 100, 250), key=lambda row: files[row].name)
    assert classifier.predict(tmp_path / "flat").tolist() == expected[in_flat].tolist()
    np.savez(tmp_path / "bare.npz", images=images[:5])
    assert classifier.predict(tmp_path / "bare.npz").tolist() == expected[:5].tolist()


def test_in_a_notebook_an_estimator_is_a_diagram_and_a_fit_a_plan(digits):
    """scikit-learn's diagram before and after the fit, with explicit parameters; the plan and the trace of the last fit beside it."""
    classifier = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear")
    assert "StreamCNNClassifier" in classifier._repr_html_()
    classifier.fit(digits[0][:100], digits[1][:100])
    assert "sk-estimator fitted" in classifier._repr_html_()
    assert ">stage</th>" in classifier.report_.plan._repr_html_()
    assert classifier.report_.trace._repr_html_().startswith("<svg")
    assert pickle.loads(pickle.dumps(classifier)).report_.trace == classifier.report_.trace  # noqa: S301


@pytest.mark.parametrize("parameters", [{"keep_features": False}, {"memory_limit": "1GiB"}, {"feature_dtype": "float16", "n_jobs": 1}])
def test_how_it_runs_never_changes_what_comes_out(digits, parameters):
    """Kept or recomputed features and another limit give the same bits (another thread count the same features)."""
    images, labels = digits[0][:500], digits[1][:500]
    base = StreamCNNClassifier(**SMALL, n_jobs=parameters.get("n_jobs")).fit(images, labels)
    other = StreamCNNClassifier(**SMALL, **parameters).fit(images, labels)
    for name, array in base.model_.to_arrays().items():
        np.testing.assert_array_equal(other.model_.to_arrays()[name], array)


@pytest.mark.parametrize("solver", ["covariance", "incremental", "randomized"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_every_solver_learns(digits, solver, kernel):
    """Each PCA solver with each SVM recognises digits."""
    images, labels = digits
    classifier = StreamCNNClassifier(**SMALL, pca_solver=solver, kernel=kernel, n_components=40).fit(images[:1000], labels[:1000])
    assert (classifier.pca_solver_, classifier.kernel_, classifier.n_components_) == (solver, kernel, 40)
    assert classifier.score(images[1000:], labels[1000:]) > 0.9


def test_landmarks_and_probabilities_reach_the_classifier(digits, tmp_path):
    """kernel="nystroem" and probability=True: stored, saved, loaded, added to, and part of what a stage is reused by."""
    images, labels = digits
    parameters = {"kernel": "nystroem", "n_landmarks": 300, "C": 10.0, "gamma": 0.5, "probability": True, "store": tmp_path / "store"}
    classifier = StreamCNNClassifier(**SMALL, **parameters).fit(images[:1000], labels[:1000])
    assert classifier.kernel_ == "nystroem" and 280 <= classifier.model_.svm.n_vectors <= 300
    assert classifier.score(images[1000:], labels[1000:]) > 0.9
    chances = classifier.predict_proba(images[1000:])
    assert chances.shape == (len(images) - 1000, 10) and np.abs(chances.sum(axis=1) - 1).max() < 1e-12
    assert np.array_equal(classifier.classes_[chances.argmax(axis=1)], classifier.predict(images[1000:]))
    right = chances[np.arange(len(chances)), np.searchsorted(classifier.classes_, labels[1000:])]
    assert -np.log(right).mean() < 0.5
    classifier.save(tmp_path / "m.h5")
    for name, array in load_model(tmp_path / "m.h5").to_arrays().items():
        np.testing.assert_array_equal(array, classifier.model_.to_arrays()[name])
    fewer = StreamCNNClassifier(**SMALL, **(parameters | {"n_landmarks": 100, "probability": False})).fit(images[:1000], labels[:1000])
    assert "project" in fewer.report_.reused and fewer.model_.svm.n_vectors <= 100 and not hasattr(fewer, "predict_proba")


def test_added_images_keep_the_landmarks(digits, tmp_path):
    """partial_fit of a Nystroem SVM goes on with its landmarks, and learns classes that had none of them."""
    images, labels = digits
    known = labels[:1200] < 8
    parameters = {"kernel": "nystroem", "n_landmarks": 200, "C": 1.0, "gamma": 0.5, "store": tmp_path / "store"}
    classifier = StreamCNNClassifier(**SMALL, **parameters).fit(images[:1200][known], labels[:1200][known])
    landmarks = classifier.model_.svm.landmarks_
    classifier.partial_fit(images[:1200][~known], labels[:1200][~known])
    assert np.array_equal(classifier.model_.svm.landmarks_, landmarks) and classifier.classes_.tolist() == list(range(10))
    assert classifier.score(images[1200:], labels[1200:]) > 0.85


def test_no_pca_trains_on_features(digits):
    """n_components=None leaves PCA away."""
    images, labels = digits[0][:400], digits[1][:400]
    classifier = StreamCNNClassifier(**SMALL, n_components=None).fit(images, labels)
    assert classifier.pca_solver_ is None
    assert classifier.model_.svm.n_features_in_ == classifier.model_.network.n_features
    assert classifier.score(images, labels) > 0.97


def test_a_store_is_reused_stage_by_stage(tmp_path, tree):
    """Another C reads no image and only the SVM runs again; another n_components keeps the features."""
    path, _, _ = tree
    first = StreamCNNClassifier(**SMALL, store=tmp_path / "s", C=1.0, n_components=20).fit(path)
    assert first.report_.reused == []
    with open_images(path) as source:
        again = StreamCNNClassifier(**SMALL, store=tmp_path / "s", C=10.0, n_components=20).fit(source)
        assert source.n_images_read == 0
    assert again.report_.reused == ["filters", "extract", "pca", "project"]
    seconds, reused, store, *plan = str(again.report_).splitlines()
    assert re.fullmatch(r"seconds    svm \d+\.\d", seconds) and re.fullmatch(r"store      \d[\d.]* [KM]iB", store)
    assert reused == "reused     filters, extract, pca, project" and plan == str(again.report_.plan).splitlines()
    fresh = StreamCNNClassifier(**SMALL, C=10.0, n_components=20).fit(path)
    for name, array in fresh.model_.to_arrays().items():
        np.testing.assert_array_equal(again.model_.to_arrays()[name], array)
    wider = StreamCNNClassifier(**SMALL, store=tmp_path / "s", C=10.0, n_components=25).fit(path)
    assert wider.report_.reused == ["filters", "extract"]


def test_resume_refuses_other_data_and_parameters(tmp_path, digits):
    """resume=True names what differs; without it the store is simply made anew."""
    images, labels = digits[0][:200], digits[1][:200]
    StreamCNNClassifier(**SMALL, store=tmp_path / "s").fit(images, labels)
    with pytest.raises(StoreError, match=r"made from images of 8 x 8 x 1, not 4 x 8 x 1: resume with the same data and image_shape"):
        StreamCNNClassifier(**SMALL, store=tmp_path / "s").fit(images[:, :4], labels, resume=True)
    with pytest.raises(StoreError, match="made from other data"):
        StreamCNNClassifier(**SMALL, store=tmp_path / "s").fit(images[:150], labels[:150], resume=True)
    with pytest.raises(StoreError, match="made with feature_dtype='float16', not 'float32'"):
        StreamCNNClassifier(**SMALL, store=tmp_path / "s", feature_dtype="float32").fit(images, labels, resume=True)
    assert StreamCNNClassifier(**SMALL, store=tmp_path / "new").fit(images, labels, resume=True).report_.reused == []
    assert StreamCNNClassifier(**SMALL, store=tmp_path / "s").fit(images[:150], labels[:150]).report_.reused == []


def test_saved_and_pickled_models_predict_the_same(tmp_path, digits):
    """The model file, the pickle and the estimator agree to the last bit."""
    images, labels = digits[0][:400], digits[1][:400].astype(str)
    classifier = StreamCNNClassifier(**SMALL).fit(images, labels)
    classifier.save(tmp_path / "m.h5")
    decisions = classifier.decision_function(images)
    model = load_model(tmp_path / "m.h5")
    streamed = np.concatenate([d for _, d in model.decisions(open_images(images), 7, classifier.n_jobs_)])
    np.testing.assert_array_equal(streamed, decisions)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(classifier)).decision_function(images), decisions)  # noqa: S301
    assert model.classes_.tolist() == classifier.classes_.tolist()


def test_two_fits_make_the_same_file(tmp_path, digits):
    """Same data, parameters and seed: the same bytes."""
    images, labels = digits[0][:300], digits[1][:300]
    for name in "ab":
        StreamCNNClassifier(**SMALL).fit(images, labels).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_works_where_scikit_learn_people_are(digits):
    """Pipeline, grid search and cross-validation take both estimators."""
    images, labels = digits[0][:300], digits[1][:300]
    scores = cross_val_score(StreamCNNClassifier(**SMALL), images, labels, cv=3)
    assert scores.min() > 0.8
    pipeline = make_pipeline(ConvFeatures(**SMALL), LinearSVC())
    search = GridSearchCV(pipeline, {"convfeatures__layers": [SMALL["layers"], [ConvLayer(4, 3, filters="random", pool=None)]]}, cv=3)
    assert search.fit(images, labels).best_score_ > 0.8
    assert clone(StreamCNNClassifier(**SMALL)).get_params()["layers"] == SMALL["layers"]


def test_features_are_float32_rows_rounded_to_their_dtype(digits):
    """transform gives what the store would hold: float32 numbers that float16 can hold."""
    images = digits[0][:50]
    rows = ConvFeatures(**SMALL).fit(images).transform(images)
    assert rows.dtype == np.float32
    assert rows.shape == (50, 3 * 3 * 16)
    np.testing.assert_array_equal(rows, rows.astype(np.float16).astype(np.float32))
    exact = ConvFeatures(**SMALL, feature_dtype="float32").fit(images).transform(images)
    assert not np.array_equal(rows, exact)
    np.testing.assert_allclose(rows, exact, rtol=2**-11)


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({"preset": "best"}, ParameterError, "preset must be one of faces, fast, lee2017, patches, got 'best'"),
        ({"n_components": 10**6}, ParameterError, r"n_components must be at most min\(images, features\)"),
        ({"n_components": 0}, ParameterError, "n_components must be a positive whole number"),
        ({"memory_limit": "12 bananas"}, ParameterError, "memory_limit must be a positive number of bytes"),
        (
            {"memory_limit": "10MiB"},
            MemoryBudgetError,
            r"memory_limit of 10.0 MiB is too small: set memory_limit to at least \d+MiB .*as stage \w+ needs that",
        ),
        ({"memory_limit": 1}, MemoryBudgetError, 'memory_limit is 1 byte, which nothing fits: give it a unit, such as "1GiB"'),
        ({"memory_limit": 300}, MemoryBudgetError, 'memory_limit is 300 bytes, which nothing fits: give it a unit, such as "300MiB"'),
        ({"kernel": "poly"}, ParameterError, "kernel must be one of auto, linear, rbf, nystroem, got 'poly'"),
        ({"C": -1}, ParameterError, "C must be a positive number"),
        ({"gamma": "big"}, ParameterError, "gamma must be a positive number"),
        ({"device": "tpu"}, ParameterError, "device must be one of"),
        ({"feature_dtype": "int8"}, ParameterError, "feature_dtype must be one of float16, float32"),
        ({"keep_features": "yes"}, ParameterError, "keep_features must be True, False"),
        ({"n_jobs": 0}, ParameterError, "n_jobs must be a whole number of at least 1"),
        ({"random_state": -1}, ParameterError, "random_state must be"),
        ({"preprocess": "blur"}, ParameterError, "preprocess"),
        ({"layers": [ConvLayer(8, 9)]}, ParameterError, "kernel_size of 9 x 9 is larger than the 8 x 8 pixels"),
        ({"layers": ["conv"]}, ParameterError, "layers must be a sequence of ConvLayer"),
        ({"class_weight": {0: -1}}, ParameterError, "class_weight must be positive, got -1 for 0"),
        ({"class_weight": [1, 2]}, ParameterError, "class_weight must be None"),
        ({"n_landmarks": 0}, ParameterError, "n_landmarks must be a whole number"),
        ({"probability": "yes"}, ParameterError, "probability must be True or False"),
    ],
)
def test_wrong_parameters_get_one_clear_sentence(digits, parameters, error, text):
    """Each wrong parameter is named with its rule and its value, before anything is computed."""
    with pytest.raises(error, match=text):
        StreamCNNClassifier(**{**SMALL, **parameters}).fit(digits[0][:60], digits[1][:60])


def test_one_image_is_not_several(digits):
    """An image without the axis of images is refused with how to add it, also where its rows would be as wide; several are taken."""
    colour = np.repeat(digits[0][:60], 3, axis=3)
    for images in (digits[0][:60], digits[0][:60, :, :, 0], colour):
        classifier = StreamCNNClassifier(**SMALL, kernel="linear", C=1.0).fit(images, digits[1][:60])
        for predict in (classifier.predict, classifier.model_.predict):
            with pytest.raises(DataError, match=r"got one image of shape \(8, 8.*\): give X\[np\.newaxis\]"):
                predict(images[0])
            assert len(predict(images[0][np.newaxis])) == 1
    rows = digits[0][:60].reshape(60, 64)
    classifier = StreamCNNClassifier(**SMALL, kernel="linear", C=1.0, image_shape=(8, 8)).fit(rows, digits[1][:60])
    assert len(classifier.predict(rows[:1])) == len(classifier.model_.predict(rows[:8])) - 7 == 1


def test_a_list_of_paths_is_no_array(digits):
    """It is refused with what to give instead, by the estimators and by a model."""
    classifier = StreamCNNClassifier(**SMALL, kernel="linear", C=1.0)
    for use in (lambda X: classifier.fit(X, [0, 1]), lambda X: open_images(X, [0, 1]), ConvFeatures().fit):
        with pytest.raises(DataError, match=r"got a list of paths, the first 'a\.png': give their folder"):
            use(["a.png", "b.png"])


def test_rows_that_may_be_images_are_asked_about(digits):
    """Rows of a square number of values, or three times one, are warned of at the line of the call; others and shaped ones are not."""
    rows, labels = digits[0][:60].reshape(60, 64), digits[1][:60]
    classifier = StreamCNNClassifier(layers=ConvLayer(2, (1, 3), filters="random"), kernel="linear", C=1.0, random_state=0)
    with pytest.warns(UserWarning, match=r"images of 1 x 64 pixels; if they are of 8 x 8, give image_shape=\(8, 8\)") as caught:
        classifier.fit(rows, labels)
    assert {Path(warning.filename).name for warning in caught if "image_shape" in str(warning.message)} == {"test_estimators.py"}
    with pytest.warns(UserWarning, match=r"if they are of 8 x 8, give image_shape=\(8, 8, 3\) \(--image-size 8x8x3\); .*\(-1, 3, 8, 8\)"):
        clone(classifier).fit(np.tile(rows, 3), labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rows of")
        assert len(classifier.predict(rows[:1])) == len(classifier.model_.predict(rows[:1])) == 1  # a row is no image without an axis
        classifier.fit(rows[:, :63], labels)
        classifier.fit(rows[:, :49], labels)
        clone(classifier).set_params(image_shape=(1, 64)).fit(rows, labels)


def test_probabilities_that_were_not_asked_for_name_the_way_out(digits):
    """predict_proba is no attribute without probability=True, and the only thing said is what to do."""
    classifier = StreamCNNClassifier(**SMALL, kernel="linear", C=1.0).fit(digits[0][:60], digits[1][:60])
    assert not hasattr(classifier, "predict_proba")
    with pytest.raises(AttributeError, match=r"needs probability=True in fit: set_params\(probability=True\), then fit again"):
        classifier.predict_proba(digits[0])
    assert hasattr(classifier.set_params(probability=True), "predict_proba")


def test_numpy_scalars_are_numbers(digits):
    """Parameters as a grid search over arrays gives them are the same as Python's, and their model has the same digest."""
    plain = {"n_components": 20, "C": 10, "gamma": 1.0, "n_landmarks": 50, "probability": True, "keep_features": True}
    numpy = {"n_components": np.int64(20), "C": np.int64(10), "gamma": np.float32(1), "n_landmarks": np.int32(50)}
    numpy |= {"probability": np.True_, "keep_features": np.True_, "class_weight": {np.int64(3): np.float32(2)}, "n_jobs": np.int64(1)}
    images, labels = digits[0][:200], digits[1][:200]
    models = [
        StreamCNNClassifier(**(SMALL | {"kernel": "nystroem"} | parameters)).fit(images, labels).model_
        for parameters in (plain | {"class_weight": {3: 2.0}, "n_jobs": 1}, numpy)
    ]
    assert models[0].header["digest"] == models[1].header["digest"]


def test_too_few_images_to_calibrate_are_named_before_any_is_read(digits, monkeypatch):
    """By their label, not by its code."""
    images, labels = digits[0][:100], np.where(np.arange(100) == 7, 42, digits[1][:100])
    monkeypatch.setattr("streamcnn.pipeline.Run.run", lambda self: pytest.fail("the run has begun"))
    with pytest.raises(ValueError, match=r"probability=True needs at least 2 rows of each class .* got 1 of 100 rows for class 42"):
        StreamCNNClassifier(**SMALL, probability=True).fit(images, labels)


def test_wrong_data_get_one_clear_sentence(digits):
    """NaN pixels, one class, labels of another length, other shapes and other pixels are refused."""
    images, labels = digits[0][:100], digits[1][:100]
    broken = images.astype(np.float32)
    broken[7, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="image 7 contains NaN"):
        StreamCNNClassifier(**SMALL).fit(broken, labels)
    with pytest.raises(ValueError, match=r"at least 2 classes are needed .* got 1 class \(0\)"):
        StreamCNNClassifier(**SMALL).fit(images, np.zeros(100, int))
    with pytest.raises(ValueError, match="labels"):
        StreamCNNClassifier(**SMALL).fit(images, labels[:99])
    classifier = StreamCNNClassifier(**SMALL).fit(images, labels)
    with pytest.raises(ValueError, match=r"images must be 8 x 8 x 1 .* got 7 x 8 x 1"):
        classifier.predict(images[:, 1:])
    with pytest.raises(ValueError, match="pixels must be uint8 as in training, got float32"):
        classifier.predict(broken[:5])


def test_fitting_again_forgets_the_shape_before(digits):
    """Images of another size: the number of their values is published, and rows of as many are taken."""
    images, labels = digits[0][:100], digits[1][:100]
    classifier = StreamCNNClassifier(**SMALL, image_shape=(7, 8)).fit(images[:, :7].reshape(100, -1), labels)
    classifier.set_params(image_shape=(8, 8)).fit(images, labels)
    assert classifier.n_features_in_ == 64 and classifier.predict(images.reshape(100, -1)).shape == (100,)


def test_published_attributes(digits):
    """What fit resolved is there with a trailing underscore."""
    classifier = StreamCNNClassifier(**SMALL, memory_limit="1GiB", n_jobs=1).fit(digits[0][:300], digits[1][:300])
    assert (classifier.n_jobs_, classifier.memory_limit_, classifier.device_, classifier.kernel_) == (1, 1 << 30, "cpu", "rbf")
    assert classifier.image_shape_ == (8, 8, 1)
    assert classifier.n_features_in_ == 64
    assert classifier.peak_rss_bytes_ > 0
    assert set(classifier.report_.stage_seconds) == {"filters", "extract", "pca", "project", "svm"}


def test_a_second_prediction_of_few_images_is_not_planned_again(digits, monkeypatch):
    """For few images in memory the plan is made once for each number and limit; many are planned every time; labels stay the same."""
    from streamcnn import model

    images, labels = digits
    classifier = StreamCNNClassifier(random_state=0, kernel="linear", C=1.0).fit(images[:200], labels[:200])
    plan, calls = model.plan_decisions, []
    monkeypatch.setattr(model, "plan_decisions", lambda *args: calls.append(args[3]) or plan(*args))
    expected = classifier.predict(images[200:300])
    assert len(calls) == 1
    for i in range(3):
        assert classifier.predict(images[200 + i : 201 + i])[0] == expected[i]
    assert len(calls) == 2
    classifier.predict(images[200:300])
    assert len(calls) == 3
    classifier.set_params(memory_limit="4GiB").predict(images[:1])
    assert calls[3:] == [4 << 30]


def test_a_loaded_model_predicts_as_the_classifier_that_was_saved(tree, tmp_path, digits):
    """Labels and decisions of arrays, a folder and one file, under a limit; two classes have one decision; other images are refused."""
    folder, images, labels = tree
    classifier = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear").fit(folder)
    classifier.save(tmp_path / "model.h5")
    model = load_model(tmp_path / "model.h5")
    for X in (images, folder, next(folder.glob("*/*.png"))):
        assert np.array_equal(model.predict(X), classifier.predict(X))
        assert np.array_equal(model.decision_function(X, "1GiB"), classifier.decision_function(X))
    assert model.score(folder) == model.score(images, labels) == classifier.score(folder) > 0.8
    weights = np.arange(300) % 3
    assert model.score(folder, sample_weight=weights) == classifier.score(images, labels, weights)
    for bad in (weights[:3], 0 * weights, -weights, np.full(300, np.nan)):
        with pytest.raises(DataError, match="sample_weight must"):
            model.score(images, labels, sample_weight=bad)
    with pytest.raises(DataError, match="labels are missing"):
        model.score(images)
    with pytest.raises(ParameterError, match="probability must be True when fit is called"):
        model.predict_proba(images)
    with pytest.raises(MemoryBudgetError, match="stage predict needs"):
        model.predict(images, memory_limit="20MiB")
    with pytest.raises(DataError, match=r"images must be 8 x 8 x 1 .* by image_shape=\(8, 8\) \(--image-size 8x8\)"):
        model.predict(images[:, :4])
    with pytest.raises(DataError, match=r"by image_shape=\(8, 8, 1\) \(--image-size 8x8x1\)"):
        model.predict(np.repeat(images, 3, axis=3))
    for X in (folder, images.reshape(300, 64)):  # what was brought to a shape for training is brought to it again
        classifier = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear", image_shape=(8, 8)).fit(X, None if X is folder else labels)
        classifier.save(tmp_path / "shaped.h5")
        assert np.array_equal(load_model(tmp_path / "shaped.h5").predict(X), classifier.predict(X))
    classifier = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear", probability=True).fit(images, labels)
    classifier.save(tmp_path / "model.h5")
    assert np.array_equal(load_model(tmp_path / "model.h5").predict_proba(images, "1GiB"), classifier.predict_proba(images))
    few = labels < "digit 2"
    model = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear").fit(images[few], labels[few]).model_
    assert model.decision_function(images).shape == (300,)


def test_folders_of_several_sizes_are_brought_to_one(tmp_path, digits):
    """fit, predict, score, partial_fit and ConvFeatures take files of any size without image_shape, as they do with the one chosen."""
    images, labels = digits
    for row in range(80):
        path = tmp_path / ("train" if row < 60 else "test") / f"{labels[row] % 2}" / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row, :, :, 0]).resize((20 + row % 7, 16 + row % 5)).save(path)
    options = {"random_state": 0, "memory_limit": "2GiB"}
    with pytest.warns(UserWarning, match="several sizes, so all are stretched to 18 x 18 pixels"):
        found = StreamCNNClassifier(store=tmp_path / "store", **options).fit(tmp_path / "train")
    told = StreamCNNClassifier(image_shape=(18, 18), **options).fit(tmp_path / "train")
    assert found.image_shape_ == told.image_shape_ == (18, 18, 1)
    np.testing.assert_array_equal(found.predict(tmp_path / "test"), told.predict(tmp_path / "test"))
    assert found.score(tmp_path / "test") == told.score(tmp_path / "test") > 0.8
    found.partial_fit(tmp_path / "test")
    assert found.model_.header["n_train"] == 80
    with pytest.raises(DataError, match=r"image_shape is \(18, 18, 1\) but the array holds images of shape \(8, 8, 1\), and only files"):
        found.predict(images[:5])
    with pytest.warns(UserWarning, match="several sizes"):
        features = ConvFeatures(random_state=0).fit(tmp_path / "train")
    assert features.transform(tmp_path / "test").shape == (20, features.network_.n_features)


def test_decisions_are_made_on_one_blas_thread(digits, monkeypatch):
    """Whatever n_jobs is: so the bits of a prediction do not depend on it, and small products wait for no other thread."""
    model = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear").fit(digits[0][:100], digits[1][:100]).model_
    decide, counts = model.svm.decide_block, set()

    def counting(rows):
        counts.update(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return decide(rows)

    monkeypatch.setattr(model.svm, "decide_block", counting)
    with threadpool_limits(2, user_api="blas"):
        assert np.array_equal(model.decision_function(digits[0], n_jobs=2), model.decision_function(digits[0], n_jobs=1))
    assert counts == {1}


def test_what_is_shown_of_a_model(digits):
    """Preset, classes, images and sizes, as text and as a table of the same; of many classes the first ten and their number."""
    labels = np.arange(200) // 10
    model = StreamCNNClassifier(**SMALL, C=1.0, kernel="linear").fit(digits[0][:200], labels).model_
    shown = [*model.facts().values()]
    assert shown[:4] == ["fast", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (20 in all)", "8 x 8 x 1", "200 images"]
    assert all(str(value) in repr(model) and f">{value}</td>" in model._repr_html_() for value in shown)
