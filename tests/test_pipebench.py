import json

import pytest

from streamcnn.cli import main
from streamcnn.timing import torch_with


@pytest.mark.skipif(torch_with(1) is None, reason="the rival convolves with PyTorch")
def test_bench_pipeline_trains_both_on_the_same_task(capsys):
    """`bench pipeline --json` at small size: both learn the digits equally well, stages add up, ratios are those of the figures."""
    assert main(["bench", "pipeline", "--repeats", "1", "--shrink", "20", "--threads", "1", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)["pipeline"]
    assert (result["images"], result["test_images"], result["shape"]) == (1000, 200, [32, 32, 1])
    ours, rival = result["rows"]
    assert ours["engine"] == "streamcnn" and ours["times_as_long"] == ours["times_the_memory"] == 1
    # the same filters, and PCA and SVM that differ little: of 200 images 95 % right, and at most 3 more or less
    assert ours["accuracy"] > 0.9 and abs(ours["accuracy"] - rival["accuracy"]) <= 0.015
    for row in (ours, rival):
        assert 0 < sum(row["stage_seconds"].values()) <= 1.01 * row["seconds"] and row["peak_bytes"] > 100 << 20
    assert rival["times_as_long"] == pytest.approx(rival["seconds"] / ours["seconds"])
    assert rival["times_the_memory"] == pytest.approx(rival["peak_bytes"] / ours["peak_bytes"])
    assert "| 1,000 images of 32 x 32 x 1 to a linear SVM |" in printed.err and "(convolve" in printed.err


def test_images_are_for_training_and_for_test(capsys):
    """One folder, or three, is one clear sentence."""
    assert main(["bench", "pipeline", "--images", "photos"]) == 1
    assert "--images must be two folders, of training and of test images, got 1" in capsys.readouterr().err
