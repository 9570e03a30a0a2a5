"""Where scikit-learn's users are: searches, curves, unions, frames, labels of all kinds, pickles, parallel jobs."""

import io
import pickle
import warnings

import cloudpickle
import h5py
import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_val_predict,
    learning_curve,
    permutation_test_score,
)
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, StreamingPCA, StreamingSVC

LAYERS = [ConvLayer(8, 3, filters="random", pool_size=2)]
CONV = {"layers": LAYERS, "image_shape": (8, 8), "random_state": 0}
SMALL = CONV | {"C": 1.0, "gamma": 1.0}


@pytest.fixture(scope="module")
def some(digits):
    """300 digits as images and as rows, and their names."""
    return digits[0][:300], digits[0][:300].reshape(300, 64), np.array([f"digit {label}" for label in digits[1][:300]])


@pytest.mark.parametrize("search", [GridSearchCV, RandomizedSearchCV, HalvingGridSearchCV])
def test_searches_find_the_parameters_that_learn(some, search):
    """Of a useless C and a good one each search takes the good one, and its refitted estimator predicts names."""
    images, _, names = some
    options = {RandomizedSearchCV: {"n_iter": 2}}.get(search, {})
    found = search(StreamCNNClassifier(**CONV, gamma=1.0, kernel="rbf"), {"C": [1e-6, 10.0]}, cv=2, error_score="raise", **options)
    found.fit(images, names)
    assert found.best_params_ == {"C": 10.0} and found.best_score_ > 0.85
    assert set(found.predict(images[:20])) <= set(names)


def test_curves_calibration_and_permutations(some):
    """Cross-validated predictions, learning curves, calibrated probabilities and permutation tests see a classifier that learns."""
    images, rows, names = some
    assert np.mean(cross_val_predict(StreamCNNClassifier(**SMALL), images, names, cv=3) == names) > 0.9
    few, many = learning_curve(StreamCNNClassifier(**SMALL), images, names, cv=2, train_sizes=[0.3, 1.0])[2].mean(axis=1)
    assert few < many and many > 0.85
    chances = CalibratedClassifierCV(StreamCNNClassifier(**SMALL), cv=2).fit(rows, names).predict_proba(rows)
    assert chances.shape == (300, 10) and np.mean(np.unique(names)[chances.argmax(axis=1)] == names) > 0.9
    score, by_chance, _ = permutation_test_score(StreamCNNClassifier(**SMALL), images, names, cv=2, n_permutations=3)
    assert score > 0.85 and by_chance.max() < 0.3


def test_all_steps_of_a_pipeline_may_be_ours(some):
    """Features, PCA and SVM in one pipeline, with weights of rows for the SVM: a class of hardly any weight is not said."""
    images, _, names = some
    steps = [("conv", ConvFeatures(**CONV)), ("pca", StreamingPCA(20)), ("svm", StreamingSVC(C=1.0, gamma=1.0))]
    pipeline = Pipeline(steps).fit(images, names)
    assert pipeline.score(images, names) > 0.95 and np.sum(pipeline.predict(images) == "digit 3") > 20
    without = np.where(names == "digit 3", 1e-9, 1.0)
    pipeline.fit(images, names, svm__sample_weight=without)
    assert np.sum(pipeline.predict(images) == "digit 3") < 10


def test_frames_keep_their_index_and_get_names(some):
    """set_output gives pandas frames with the names of get_feature_names_out and the index of a frame given; beside other columns, too."""
    images, rows, names = some
    conv = ConvFeatures(**CONV).set_output(transform="pandas").fit(images)
    frame = conv.transform(images)
    assert list(frame.columns) == list(conv.get_feature_names_out()) == [f"convfeatures{i}" for i in range(72)]
    pixels = pd.DataFrame(rows, columns=[f"pixel {i}" for i in range(64)], index=np.arange(300) + 7)
    assert conv.fit(pixels).transform(pixels).index.equals(pixels.index) and conv.feature_names_in_[3] == "pixel 3"
    reduced = StreamingPCA(2).set_output(transform="pandas").fit_transform(pixels)
    assert list(reduced.columns) == ["streamingpca0", "streamingpca1"] and reduced.index.equals(pixels.index)
    union = FeatureUnion([("conv", ConvFeatures(**CONV)), ("pca", StreamingPCA(3))]).set_output(transform="pandas")
    assert list(union.fit_transform(rows).columns[[0, -1]]) == ["conv__convfeatures0", "pca__streamingpca2"]
    columns = ColumnTransformer([("conv", ConvFeatures(**CONV), list(pixels.columns))], remainder="passthrough")
    both = make_pipeline(columns, StreamingSVC(C=1.0, gamma=1.0)).fit(pixels.assign(age=1.0), names)
    assert both.score(pixels.assign(age=1.0), names) > 0.95


def test_polars_frames(some):
    """set_output(transform="polars"), from arrays and polars frames."""
    polars = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    _, rows, _ = some
    out = ConvFeatures(**CONV).set_output(transform="polars").fit_transform(polars.DataFrame(rows))
    assert isinstance(out, polars.DataFrame) and out.columns[0] == "convfeatures0"
    assert StreamingPCA(2).set_output(transform="polars").fit_transform(rows).shape == (300, 2)


@pytest.mark.parametrize("kind", ["series", "category", "string", "HDF5 text", "HDF5 bytes"])
def test_labels_of_every_container(some, tmp_path, kind):
    """Labels in pandas' and HDF5's strings are the same classes as in NumPy's, in fit and in score, of both classifiers."""
    images, rows, names = some
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["text"], file["bytes"] = names.astype(object), names.astype("S")
        series = pd.Series(names, index=np.arange(300)[::-1])
        labels = {"series": series, "HDF5 text": file["text"], "HDF5 bytes": file["bytes"]}.get(kind)
        labels = series.astype(kind) if labels is None else labels
        for estimator, X in ((StreamCNNClassifier(**SMALL), images), (StreamingSVC(C=1.0, gamma=1.0), rows)):
            expected = clone(estimator).fit(X, names)
            estimator.fit(X, labels)
            assert estimator.classes_.tolist() == expected.classes_.tolist()
            assert estimator.score(X, labels) == expected.score(X, names) > 0.95


def test_estimators_survive_every_kind_of_pickle(some):
    """Pickle, cloudpickle and joblib bring back fitted estimators that give the same bits; clone one that is not fitted."""
    images, rows, names = some
    made = [(StreamCNNClassifier(**SMALL), images, "decision_function"), (ConvFeatures(**CONV), images, "transform")]
    made += [(StreamingPCA(3), rows, "transform"), (StreamingSVC(C=1.0), rows, "decision_function")]
    for estimator, X, method in made:
        expected = getattr(estimator.fit(X, names), method)(X)
        file = io.BytesIO()
        joblib.dump(estimator, file)
        file.seek(0)
        for copy in (pickle.loads(pickle.dumps(estimator)), cloudpickle.loads(cloudpickle.dumps(estimator)), joblib.load(file)):  # noqa: S301
            np.testing.assert_array_equal(getattr(copy, method)(X), expected, strict=True)
        assert not [name for name in vars(clone(estimator)) if name.endswith("_")]


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_a_search_in_parallel_scores_as_one_alone(some, backend):
    """Two processes or threads, each under the limit: the scores of one job, bit for bit; nothing warns of jobs that were lost."""
    images, _, names = some
    model, grid = StreamCNNClassifier(**SMALL, n_jobs=1, memory_limit="2GiB"), {"C": [0.01, 10.0]}
    alone = GridSearchCV(model, grid, cv=2, error_score="raise").fit(images, names)
    with warnings.catch_warnings(), joblib.parallel_backend(backend, n_jobs=2):
        warnings.filterwarnings("error", message=".*worker stopped.*")
        both = GridSearchCV(model, grid, cv=2, error_score="raise", n_jobs=2).fit(images, names)
    np.testing.assert_array_equal(both.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(both.decision_function(images), alone.decision_function(images))
