import numpy as np
from sklearn.utils.estimator_checks import parametrize_with_checks

from streamcnn.svm import StreamingSVC


@parametrize_with_checks(
    [StreamingSVC(), StreamingSVC(kernel="linear"), StreamingSVC(kernel="rbf", C=1.0, gamma="scale")], legacy=True, xfail_strict=True
)
def test_scikit_learn_checks(estimator, check):
    """Every check scikit-learn has for a classifier passes, none excused."""
    check(estimator)
