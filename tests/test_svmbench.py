import json

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import LinearSVC

from streamcnn import svmbench
from streamcnn.cli import main
from streamcnn.store import FeatureStore


def test_made_rows_are_the_same_for_any_number(monkeypatch):
    """The first rows do not depend on how many follow; labels are all there, variances fall as 1 / i."""
    monkeypatch.setattr(svmbench, "_BATCH", 700)
    few, many = (list(svmbench.overlapping_rows(n, 20, 5, seed=3)) for n in (1000, 3000))
    rows, labels = (np.concatenate([batch[i] for batch in many]) for i in (0, 1))
    assert rows.shape == (3000, 20) and rows.dtype == np.float32 and set(labels) == set(range(5))
    assert np.array_equal(few[1][0], rows[700:1000]) and np.array_equal(few[0][1], labels[:700])
    # a centre's share of the variance is a tenth on average, and 3,000 rows know a variance to 3 %
    assert np.all(np.abs(rows.var(axis=0) * np.arange(1, 21) - 1.09) < 0.4)
    assert not np.array_equal(next(svmbench.overlapping_rows(1000, 20, 5, seed=4))[0], few[0][0])


@pytest.mark.parametrize("n_classes", [2, 4])
def test_objective_is_that_of_linear_svc(tmp_path, monkeypatch, n_classes):
    """f of LinearSVC's planes, from a store in several batches, is the smallest in all directions tried."""
    monkeypatch.setattr(svmbench, "_BATCH", 300)
    svmbench.write_store(tmp_path / "rows", svmbench.overlapping_rows(1000, 6, n_classes))
    store = FeatureStore(tmp_path / "rows")
    X, y = (np.concatenate(parts) for parts in zip(*svmbench.scaled_batches(store, 0.5)))
    assert X.dtype == np.float64 and X.shape == (1000, 6)
    model = LinearSVC(C=svmbench.C, dual=False, tol=1e-10, max_iter=10_000).fit(X, y)
    best = np.column_stack([model.coef_, model.intercept_])
    values = svmbench.objective(store, 0.5, best)
    assert values.shape == (1 if n_classes == 2 else n_classes,)
    rng = np.random.default_rng(0)
    for _ in range(5):
        worse = svmbench.objective(store, 0.5, best + 0.1 * rng.standard_normal(best.shape))
        assert (worse > values).all()


def test_bench_svm_prints_a_row_for_each_contestant(capsys, monkeypatch):
    """`bench svm --json` at small size: fresh processes, equal objectives, and ours alone where LinearSVC would not fit."""
    monkeypatch.setattr(svmbench, "machine_bytes", lambda: 1.25 * svmbench.rival_bytes(3000, 200))
    assert main(["bench", "svm", "--rows", "4000", "2000", "--repeats", "1", "--threads", "1", "--json"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["svm"]["rows"]
    assert [(row["engine"], row["n_rows"]) for row in rows] == [(svmbench.OURS, 2000), (svmbench.THEIRS, 2000), (svmbench.OURS, 4000)]
    ours, theirs, alone = rows
    assert abs(ours["objective_difference"]) < 1e-6 and theirs["objective_difference"] == 0 and alone["objective"] is None
    assert theirs["times_as_long"] == theirs["seconds"] / ours["seconds"] and ours["times_as_long"] == alone["times_as_long"] == 1
    assert all(row["peak_bytes"] >= row["before_bytes"] > 50 << 20 and row["n_iter"] > 2 for row in rows)
    # six passes of half a whole fit or more, but not of ten
    assert ours["pass_row_ns"] > 0 and theirs["pass_row_ns"] is None
    assert "| streamcnn linear, 1 thread | 4,000 x 200 (made) |" in printed.err


def test_features_of_images_become_rows(tmp_path):
    """Class folders of two parts: reduced rows in order, labels as the folders sort."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("b", "a"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / part / name / f"{number}.png")
    ((rows, labels),) = svmbench.image_rows([tmp_path / "train", tmp_path / "test"], 5)
    assert rows.shape == (16, 5) and rows.dtype == np.float32 and np.ptp(rows, axis=0).min() > 0
    assert labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
