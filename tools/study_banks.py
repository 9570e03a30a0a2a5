"""The choices of filters that `study.py` compares, and what it tells of a bank besides recognition."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamcnn.filters import filter_similarity, random_filter_bank
from streamcnn.layers import Geometry
from streamcnn.network import Network

# candidates among which choices other than the rule choose: of 24 filters one in 21, as the rule does between 6 and 7.5 %
POOL = 512


@dataclass(frozen=True)
class Cell:
    """One choice of filters: a place of the study that every seed fills once.

    Parameters
    ----------
    factor : str
        Why the cell is there.
    selection : str
        A reading of eq. (2) for the rule, "random" for none, or one of `CHOICES`.
    max_similarity : float or None
        Of the rule.
    kernel_size, n_filters : int or None
        None leaves the sizes of the layers.
    """

    factor: str
    selection: str
    max_similarity: float | None = None
    kernel_size: int | None = None
    n_filters: int | None = None


def candidates_of(n: int, shape: tuple[int, ...], seed: int, number: int, **rule: Any) -> Any:
    """A bank of (n, *shape) from the candidates that `Network` draws for layer `number`, so that choices differ and luck does not."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    return random_filter_bank(n, shape[:2], shape[2], random_state=rng, **rule)


def lowest(pool: np.ndarray, n: int, similarity: str) -> np.ndarray:
    """The first filter, then again and again the one whose largest similarity to those taken is lowest."""
    between = filter_similarity(pool, None, similarity)
    taken, largest = [0], between[0].copy()
    while len(taken) < n:
        largest[taken[-1]] = np.inf
        taken.append(int(np.argmin(largest)))
        largest = np.maximum(largest, between[taken[-1]])
    return pool[taken]


def orthogonal(bank: np.ndarray) -> np.ndarray:
    """The orthonormal bank nearest to `bank`: its polar factor. More filters than dimensions become a tight frame of unit norm.

    A frame is tight when the filters, as one matrix, have equal singular values; making these equal and the norms one in turn leads
    there (Tropp et al. 2005).
    """
    rows = bank.reshape(len(bank), -1).astype(np.float64)
    for _ in range(50):
        u, s, v = np.linalg.svd(rows, full_matrices=False)
        # the mean, which no filter has, is no direction of the bank
        rows = u[:, s > 1e-6 * s[0]] @ v[s > 1e-6 * s[0]]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.reshape(bank.shape).astype(np.float32)


def peaks(pool: np.ndarray) -> np.ndarray:
    """Largest coefficient of each filter of unit norm: (n,)."""
    return np.abs(pool).max(axis=(1, 2, 3))


def roughness(pool: np.ndarray) -> np.ndarray:
    """Squared differences of neighbours, summed, of each filter of unit norm: (n,)."""
    down, across = (np.square(np.diff(pool, axis=axis)).sum(axis=(1, 2, 3)) for axis in (1, 2))
    return down + across


def blurred(bank: np.ndarray) -> np.ndarray:
    """The bank convolved by (1 2 1) / 4 both ways, zeros outside, with zero mean and unit norm again."""
    wide = np.pad(bank.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    tall = wide[:, :-2] / 4 + wide[:, 1:-1] / 2 + wide[:, 2:] / 4
    soft = tall[:, :, :-2] / 4 + tall[:, :, 1:-1] / 2 + tall[:, :, 2:] / 4
    soft -= soft.mean(axis=(1, 2, 3), keepdims=True)
    return (soft / np.sqrt(np.square(soft).sum(axis=(1, 2, 3), keepdims=True))).astype(np.float32)


CHOICES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "lowest peak": lambda pool, n: lowest(pool, n, "peak"),
    "lowest signed": lambda pool, n: lowest(pool, n, "signed"),
    "orthogonal": lambda pool, n: orthogonal(pool[:n]),
    # no similarity at all: whether few large coefficients are what the rule selects by
    "peaked": lambda pool, n: pool[np.argsort(-peaks(pool), kind="stable")[:n]],
    "flat": lambda pool, n: pool[np.argsort(peaks(pool), kind="stable")[:n]],
    # what the choice of another property does, for comparison
    "smoothest": lambda pool, n: pool[np.argsort(roughness(pool), kind="stable")[:n]],
    "blurred": lambda pool, n: blurred(pool[:n]),
}


class ChosenBanks(Network):
    """A network whose banks a cell chooses; they are scaled like any.

    Attributes
    ----------
    banks : list of ndarray
        Of each layer, before scaling.
    rates : list of float
        Part of the candidates looked at that was kept.
    """

    def __init__(self, geometry: list[Geometry], cell: Cell):
        super().__init__(geometry, ())
        self.cell = cell
        self.banks: list[np.ndarray] = []
        self.rates: list[float] = []

    def _draw_bank(self, number: int, g: Geometry, seed: int, zero_mean: bool = True) -> np.ndarray:
        n, *shape = g.filters_shape
        self.info = [*self.info[:number], {}]
        if choose := CHOICES.get(self.cell.selection):
            pool = candidates_of(max(n, POOL), tuple(shape), seed, number, max_similarity=None)
            bank, rate = choose(pool, n), n / len(pool)
        else:
            rule = {"max_similarity": None} if self.cell.selection == "random" else self.rule()
            bank, info = candidates_of(n, tuple(shape), seed, number, return_info=True, **rule)
            rate = info["acceptance_rate"]
        self.banks.append(bank)
        self.rates.append(rate)
        return bank

    def rule(self) -> dict[str, Any]:
        """The rule of the cell, as `random_filter_bank` takes it."""
        return {"max_similarity": self.cell.max_similarity, "similarity": self.cell.selection}

    def figures(self) -> dict[str, float]:
        """Of the first layer's bank: see the functions below; `shifted` is the mean of the "signed" similarity between two filters."""
        bank = self.banks[0]
        between = filter_similarity(bank, None, "signed")[np.triu_indices(len(bank), 1)]
        return {"kurtosis": kurtosis(bank), "correlation": correlation(bank), "shifted": float(between.mean()), "acceptance": self.rates[0]}


def kurtosis(bank: np.ndarray) -> float:
    """Mean excess kurtosis of the coefficients of a filter: 0 when Gaussian, larger with few large ones."""
    rows = bank.reshape(len(bank), -1).astype(np.float64)
    return float(np.mean(np.mean(rows**4, axis=1) / np.mean(rows**2, axis=1) ** 2 - 3))


def correlation(bank: np.ndarray) -> float:
    """Mean |F1 . F2| of two different filters of unit norm, not shifted."""
    rows = bank.reshape(len(bank), -1).astype(np.float64)
    return float(np.abs(rows @ rows.T)[np.triu_indices(len(rows), 1)].mean())
