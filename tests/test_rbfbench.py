import json

import numpy as np

from streamcnn import rbfbench
from streamcnn.cli import main
from streamcnn.store import FeatureStore


def test_a_sixth_of_the_rows_is_held_out_and_none_lost(tmp_path, monkeypatch):
    """Every row is in one of the two stores, in order, with its label, whatever the batches."""
    rows, labels = np.arange(6000, dtype=np.float32).reshape(3000, 2), np.arange(3000) % 7
    rbfbench.write_stores(tmp_path, ((rows[i : i + 700], labels[i : i + 700]) for i in range(0, 3000, 700)))
    train, test = FeatureStore(tmp_path / "train"), FeatureStore(tmp_path / "test")
    # four standard errors of a sixth
    assert abs(test.n_rows - 500) < 4 * np.sqrt(3000 * 5 / 36) and train.n_rows + test.n_rows == 3000
    parts = [[(x.copy(), y) for x, y in store.iter_batches(999)] for store in (train, test)]
    x, y = (np.concatenate([pair[i] for part in parts for pair in part]) for i in (0, 1))
    order = np.argsort(x[:, 0])
    assert np.array_equal(x[order], rows) and np.array_equal(y[order], labels)
    assert all((np.diff(np.concatenate([pair[0][:, 0] for pair in part])) > 0).all() for part in parts)


def test_bench_rbf_prints_a_row_for_each_contestant(capsys):
    """`bench rbf --json` at small size: more landmarks come nearer to SVC, whose rows are scaled as ours."""
    assert main(["bench", "rbf", "--rows", "3000", "--landmarks", "30", "1500", "--threads", "1", "--json"]) == 0
    printed = capsys.readouterr()
    few, many, exact = json.loads(printed.out)["rbf"]["rows"]
    assert [row["n_landmarks"] for row in (few, many, exact)] == [30, 1500, None] and exact["points"] == 0
    assert few["accuracy"] < many["accuracy"] and abs(many["points"]) < 5
    assert exact["accuracy"] > 0.3 and all(row["peak_bytes"] > 50 << 20 and row["seconds"] > 0 for row in (few, many, exact))
    assert "| streamcnn nystroem, 1 thread | " in printed.err and "| SVC, exact, 1 thread |" in printed.err
