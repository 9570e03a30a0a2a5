import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from streamcnn.pca import StreamingPCA


@parametrize_with_checks(
    [StreamingPCA(), StreamingPCA(n_components=1, solver="incremental"), StreamingPCA(n_components=1, whiten=True)],
    legacy=True,
    xfail_strict=True,
)
def test_scikit_learn_checks(estimator, check):
    """Every check scikit-learn has for a transformer passes, none excused."""
    check(estimator)
