"""Decisions of rows by a trained machine, a few rows at a time: the same row has the same bits in any company."""

import numpy as np

from streamcnn.linear import LinearMachine
from streamcnn.nystroem import NystroemMachine
from streamcnn.rbf import RbfMachine

Machine = RbfMachine | LinearMachine | NystroemMachine
# rows of one decision product: every block is cut into these
TILE = 64


def decide_rows(machine: Machine, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Decisions of raw rows (n, n_features) in tiles of 64, the last one zero-padded."""
    columns = machine.n_outputs
    if out is None:
        out = np.empty(len(rows) if columns == 1 else (len(rows), columns))
    tile, result, table = np.zeros((TILE, rows.shape[1])), np.empty((TILE, columns)), out.reshape(len(rows), columns)
    for start in range(0, len(rows), TILE):
        n_valid = min(TILE, len(rows) - start)
        tile[:n_valid], tile[n_valid:] = rows[start : start + n_valid], 0
        machine.decide(tile, result)
        table[start : start + n_valid] = result[:n_valid]
    return out


def to_codes(decisions: np.ndarray) -> np.ndarray:
    """Class codes (m,) of decisions, (m,) for two classes or (m, n_classes); of equal decisions the first class."""
    return (decisions > 0).astype(np.intp) if decisions.ndim == 1 else decisions.argmax(axis=1)


def codes_of(machine: Machine, rows: np.ndarray) -> np.ndarray:
    """Class codes (n,) int32 of raw rows (n, n_features)."""
    # block by block: all decisions at once would be the largest thing in memory with thousands of classes
    codes = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), 16 * TILE):
        codes[start : start + 16 * TILE] = to_codes(decide_rows(machine, rows[start : start + 16 * TILE]))
    return codes
