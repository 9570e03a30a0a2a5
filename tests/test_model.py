"""A loaded model: where it convolves, and what it says of labels that it does not know."""

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.model_selection import cross_val_score

from streamcnn import ConvLayer, StreamCNNClassifier, load_model, open_images
from streamcnn import model as model_module
from streamcnn.evaluate import evaluate

LAYERS = ConvLayer(4, 3, filters="random", pool_size=2)


@pytest.fixture(scope="module")
def known(tmp_path_factory, digits):
    """A classifier of the digits 0 to 7, and the same as a loaded model."""
    images, labels = (part[:400] for part in digits)
    classifier = StreamCNNClassifier(layers=LAYERS, kernel="linear", C=1.0, n_jobs=1, random_state=0)
    classifier.fit(images[labels < 8], labels[labels < 8])
    path = tmp_path_factory.mktemp("model") / "m.h5"
    classifier.save(path)
    return classifier, load_model(path)


def test_unknown_classes_are_said_once_and_count_as_wrong(known, digits):
    """`score` of a model and of the classifier on a source warn, at the caller's line, of how many images of which classes are not known;
    `evaluate`, which reports them, does not, nor does `score` where all are known."""
    (classifier, model), (images, labels) = known, (part[:400] for part in digits)
    source, unknown = open_images(images, labels), labels >= 8
    right = np.sum(model.predict(images) == labels) / 400
    of_8, of_9 = (int(np.sum(labels == digit)) for digit in (8, 9))
    more, less = sorted([f"8 {of_8}", f"9 {of_9}"], key=lambda text: -int(text.split()[1]))
    for score in (lambda: model.score(images, labels), lambda: classifier.score(source)):
        with pytest.warns(UserWarning, match=f"^{unknown.sum()} of 400 .* not know \\({more}, {less}\\), and count") as caught:
            assert score() == right
        assert [Path(warning.filename).name for warning in caught] == ["test_model.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = evaluate(model, source)
        assert (measured["unknown"], measured["unknown_classes"]) == (unknown.sum(), {"8": of_8, "9": of_9})
        model.score(images[~unknown], labels[~unknown])


def test_save_replaces_models_only(known, tmp_path):
    """A photo or a text stays what it is, with an error that says so; a model and an empty file are replaced."""
    photo, there = tmp_path / "5.jpg", tmp_path / "m.h5"
    photo.write_bytes(b"\xff\xd8\xff\xe0 a photo")
    with pytest.raises(
        OSError, match=r"path must not be .*5\.jpg, which is no streamcnn model and so is not replaced: give another file name"
    ):
        known[0].save(photo)
    assert photo.read_bytes() == b"\xff\xd8\xff\xe0 a photo"
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["images"] = np.zeros((3, 8, 8), np.uint8)
    with pytest.raises(OSError, match=r"data\.h5, which is no streamcnn model"):
        known[0].save(tmp_path / "data.h5")
    there.touch()
    for _ in range(2):
        known[1].save(there)
        load_model(there)


def test_a_loaded_model_convolves_where_it_is_told(known, digits, monkeypatch):
    """`device` of each method is the one whose kernels are taken; a device that was planned for does not stand for another."""
    _, model = known
    images, labels, asked = digits[0][:8], digits[1][:8] % 8, []
    original = model_module.get_kernels
    monkeypatch.setattr(model_module, "get_kernels", lambda device: asked.append(device) or original(device))
    expected = model.predict(images)
    for method in (model.predict, model.decision_function, lambda X, **options: model.score(X, labels, **options)):
        asked.clear()
        method(images, device="naive")
        assert set(asked) == {"naive"}
    assert len(asked) == 1  # planned above for these shapes and this device
    asked.clear()
    assert (model.predict(images, device="cpu") == expected).all()
    assert asked == ["cpu", "cpu"]


def test_a_warning_in_cross_validation_points_at_the_line_that_called_it(digits):
    """Between it and what warns lie frames of scikit-learn and of joblib."""
    rows, labels = digits[0][:90].reshape(90, 64), digits[1][:90] % 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cross_val_score(StreamCNNClassifier(layers=ConvLayer(2), n_jobs=1), rows, labels, cv=2)
    said = [warning for warning in caught if "image_shape" in str(warning.message)]
    assert said and {Path(warning.filename).name for warning in said} == {"test_model.py"}
