"""Pictures in scikit-learn's style: each class draws by matplotlib (extra `plot`) into `ax=`, or a new figure, and returns itself.

`from_estimator` takes a fitted `StreamCNNClassifier` (for filters also a `ConvFeatures`), `from_model` a `Model`, `from_store` a
`FeatureStore` or its folder. What is drawn is then in `ax_` and `figure_`; `plot(ax=...)` draws it again elsewhere. Colours are told apart
by colour-blind eyes, and readable on light and dark.
"""

from streamcnn.displays.fitted import FilterBankDisplay, SimilarityDisplay, SpectrumDisplay
from streamcnn.displays.results import ConfusionDisplay, ImagesDisplay
from streamcnn.displays.runs import MemoryDisplay, StageTimeDisplay

__all__ = [
    "ConfusionDisplay",
    "FilterBankDisplay",
    "ImagesDisplay",
    "MemoryDisplay",
    "SimilarityDisplay",
    "SpectrumDisplay",
    "StageTimeDisplay",
]
