"""Train image classifiers on data larger than RAM, under a memory limit, without back-propagation."""

from importlib.metadata import version

from streamcnn.errors import StreamCNNError
from streamcnn.estimators import ConvFeatures, StreamCNNClassifier
from streamcnn.filters import filter_similarity, random_filter_bank
from streamcnn.images import open_images
from streamcnn.layers import ConvLayer
from streamcnn.memory import MemoryBudget, MemoryMonitor
from streamcnn.model import load_model
from streamcnn.pca import StreamingPCA
from streamcnn.plan import plan
from streamcnn.store import FeatureStore
from streamcnn.svm import StreamingSVC

__version__ = version("streamcnn")
__all__ = [
    "ConvFeatures",
    "ConvLayer",
    "FeatureStore",
    "MemoryBudget",
    "MemoryMonitor",
    "StreamCNNClassifier",
    "StreamCNNError",
    "StreamingPCA",
    "StreamingSVC",
    "filter_similarity",
    "load_model",
    "open_images",
    "plan",
    "random_filter_bank",
]
