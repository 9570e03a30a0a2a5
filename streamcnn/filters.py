"""Banks of random filters that differ from one another: section 2 of Lee & Lee (2017).

Eq. (2) there compares two filters by shifting one over the other, summing the absolute products of the coefficients that meet,
and taking the largest sum; a filter enters the bank only when its similarity to every filter kept before is at most 10 %. The
paper does not say what the 10 % is a percentage of. `filter_similarity` offers four readings; the choice decides whether the
rule selects at all (measured, Gaussian zero-mean candidates of one channel, threshold 10 %, 4,000 candidates):

========== ===================================================== =============================================================
reading    similarity is divided by                              what 10 % does
========== ===================================================== =============================================================
`"peak"`   height * width * channels * max|F1| * max|F2|, the    selects: 64 filters 5x5 need 800 to 4,000 candidates (20
           largest value it can have at these peaks              seeds), 7x7 200 to 1,300; 3x3 keeps a single filter
`"l1"`     sum|F1| * sum|F2|                                     lets nearly everything pass from 4x4 on; 3x3 keeps 2 or 3
`"l2"`     norm(F1) * norm(F2)                                   no second filter at any size from 3x3 to 11x11
`"signed"` norm(F1) * norm(F2), and the products keep their      no second filter at any size from 3x3 to 11x11
           sign: |sum F1 F2|, normalised cross-correlation
========== ===================================================== =============================================================

With more channels `"peak"` lets more pass (64 filters 3x3: 856 candidates of 3 channels, 156 of 8, 93 of 16; 5x5 of 16 channels:
64), because the peak of hundreds of Gaussian coefficients lies far above their mean.

For recognition the choice matters little (`tools/study.py`): with 24 filters about a point on faces, nothing on CIFAR-10. Lowest signed
similarity of many candidates and orthogonal filters were tried too: up to 3 points on faces, nothing on CIFAR-10, so they are not offered.
"""

from typing import Any

import numpy as np

from streamcnn.errors import FilterBankError, ParameterError
from streamcnn.threads import limit_blas

SIMILARITIES = ("peak", "l1", "l2", "signed")
# candidates tested together; the outcome is that of one by one
_BATCH = 64
# float64 coefficients of all shifted copies held at a time: 16 MiB
_UNROLLED = 2 << 20


def _check_filters(filters, name: str) -> np.ndarray:
    filters = np.asarray(filters, dtype=np.float64)
    if filters.ndim != 4 or 0 in filters.shape[1:]:
        raise ParameterError(f"{name} must have shape (n_filters, height, width, channels), got {filters.shape}")
    if not np.isfinite(filters).all():
        raise ParameterError(f"{name} must be finite, got NaN or infinity")
    return filters


def _shifted(filters: np.ndarray) -> np.ndarray:
    """All shifts of (m, kh, kw, c) filters, zeros outside: (m * (2 kh - 1) * (2 kw - 1), kh * kw * c)."""
    m, kh, kw, channels = filters.shape
    padded = np.zeros((m, 3 * kh - 2, 3 * kw - 2, channels))
    padded[:, kh - 1 : 2 * kh - 1, kw - 1 : 2 * kw - 1] = filters
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(1, 2))
    # (m, shifts, shifts, c, kh, kw) -> coefficients in the filters' own order
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * channels)


def filter_similarity(filters, other=None, similarity: str = "peak") -> np.ndarray:
    """Similarity of each filter to each other one, eq. (2) of Lee & Lee (2017).

    R(F1, F2) = max over shifts (i, j) of sum over x, y, channel of `|F1(x, y) F2(x + i, y + j)|`, zeros outside the filters,
    i from -(height - 1) to height - 1 and j likewise, divided by what `similarity` says. As `|F1 F2| = |F1| |F2|` this is a
    cross-correlation of absolute values, computed as one matrix product with all shifted copies.

    Parameters
    ----------
    filters : array of shape (n, height, width, channels)
    other : array of shape (m, height, width, channels), optional
        By default `filters` itself.
    similarity : {"peak", "l1", "l2", "signed"}
        `"peak"`: divided by `height * width * channels * max|F1| * max|F2|`; `"l1"`: by `sum|F1| * sum|F2|`; `"l2"`: by the
        product of the Euclidean norms; `"signed"`: max over shifts of `|sum F1 F2|`, by the product of the Euclidean norms.
        All lie from 0 to 1. See the head of this module for which of them selects.

    Returns
    -------
    ndarray of shape (n, m), float64
        A filter of zeros has similarity 0 to every filter, itself included.

    Raises
    ------
    ParameterError
        For another shape, NaN or infinity, or an unknown `similarity`.

    Notes
    -----
    Costs n * m * shifts * height * width * channels multiplications; scratch memory stays below about 48 MiB, or three times
    the shifted copies of one filter where those alone are larger.

    Examples
    --------
    >>> import numpy as np
    >>> from streamcnn import filter_similarity
    >>> filter_similarity(np.ones((2, 3, 3, 1)))  # equal in size everywhere: as similar as can be
    array([[1., 1.],
           [1., 1.]])
    """
    if similarity not in SIMILARITIES:
        raise ParameterError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    first = _check_filters(filters, "filters")
    second = first if other is None else _check_filters(other, "other")
    if first.shape[1:] != second.shape[1:]:
        raise ParameterError(f"filters and other must agree in shape, got {first.shape[1:]} and {second.shape[1:]}")
    n, kh, kw, channels = first.shape
    m, size = len(second), kh * kw * channels
    left = (first if similarity == "signed" else np.abs(first)).reshape(n, size)
    right = second if similarity == "signed" else np.abs(second)
    result = np.empty((n, m))
    shifts = (2 * kh - 1) * (2 * kw - 1)
    step = max(1, _UNROLLED // (shifts * max(size, n)))
    # one thread, so that a bank never depends on how many cores there are
    with limit_blas(1):
        for start in range(0, m, step):
            part = right[start : start + step]
            sums = left @ _shifted(part).T
            result[:, start : start + step] = np.abs(sums).reshape(n, len(part), shifts).max(axis=2)
    divisor = np.outer(_magnitude(first, similarity), _magnitude(second, similarity))
    # sums with a filter of zeros are 0 already
    np.divide(result, divisor, out=result, where=divisor > 0)
    return np.minimum(result, 1, out=result)


def _magnitude(filters: np.ndarray, similarity: str) -> np.ndarray:
    """What each of (n, kh, kw, c) filters contributes to the divisor of `filter_similarity`: (n,)."""
    rows = np.abs(filters).reshape(len(filters), int(np.prod(filters.shape[1:])))
    if similarity == "peak":
        return np.sqrt(rows.shape[1]) * rows.max(axis=1)
    if similarity == "l1":
        return rows.sum(axis=1)
    return np.sqrt(np.square(rows).sum(axis=1))


def _unshifted(first: np.ndarray, second: np.ndarray, similarity: str) -> np.ndarray:
    """`filter_similarity` of (n, kh, kw, c) and (m, kh, kw, c) filters, none of zeros, at shift (0, 0) alone: (n, m)."""
    size = int(np.prod(first.shape[1:]))
    left, right = first.reshape(len(first), size).astype(np.float64), second.reshape(len(second), size).astype(np.float64)
    if similarity != "signed":
        left, right = np.abs(left), np.abs(right)
    with limit_blas(1):
        sums = np.abs(left @ right.T)
    return sums / np.outer(_magnitude(first.astype(np.float64), similarity), _magnitude(second.astype(np.float64), similarity))


def _resolve_kernel_size(kernel_size) -> tuple[int, int]:
    pair = (kernel_size, kernel_size) if np.ndim(kernel_size) == 0 else tuple(kernel_size)
    if len(pair) != 2 or not all(isinstance(k, (int, np.integer)) and not isinstance(k, bool) and k >= 1 for k in pair):
        raise ParameterError(f"kernel_size must be a positive whole number or a pair of them, got {kernel_size!r}")
    return int(pair[0]), int(pair[1])


def _seed_of(random_state) -> int | None:
    """A seed from None, an int, a Generator or a RandomState (either is moved on by one draw)."""
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if random_state is None:
        return None
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool) and random_state >= 0:
        return int(random_state)
    raise ParameterError(f"random_state must be None, a whole number >= 0, a Generator or a RandomState, got {random_state!r}")


class _Candidates:
    """The endless sequence of candidate filters of one seed; each `batches` starts it again."""

    def __init__(self, seed, shape: tuple[int, int, int], zero_mean: bool, unit_norm: bool):
        # an unseeded bank needs the same sequence again too, when a larger threshold is tried
        self.seed = np.random.SeedSequence(seed)
        self.shape, self.zero_mean, self.unit_norm = shape, zero_mean, unit_norm

    def batches(self, limit: int):
        """Yield float32 (at most `_BATCH`, kh, kw, c) as finally used, `limit` filters in all."""
        generator = np.random.Generator(np.random.PCG64(self.seed))
        for start in range(0, limit, _BATCH):
            drawn = generator.standard_normal((min(_BATCH, limit - start), *self.shape))
            if self.zero_mean:
                drawn -= drawn.mean(axis=(1, 2, 3), keepdims=True)
            if self.unit_norm:
                drawn /= np.sqrt(np.square(drawn).sum(axis=(1, 2, 3), keepdims=True))
            yield drawn.astype(np.float32)


def _select(candidates: _Candidates, n_filters: int, threshold, similarity: str, limit: int) -> tuple[np.ndarray, int]:
    """Keep, in order, each candidate whose similarity to all kept before is <= `threshold`.

    Returns
    -------
    bank : ndarray of shape (at most n_filters, kh, kw, c), float32
    n_candidates : int
        Candidates looked at.
    """
    bank = np.empty((n_filters, *candidates.shape), np.float32)
    n_kept = n_seen = 0
    for batch in candidates.batches(limit):
        if threshold is None:
            passing = np.arange(len(batch))
            among = None
        else:
            # unshifted sums bound the similarity from below: nearly all candidates fall here, without 4 k k shifted copies each
            bound = _unshifted(bank[:n_kept], batch, similarity) * (1 - 1e-12)
            passing = np.flatnonzero(np.all(bound <= threshold, axis=0))
            passing = passing[np.all(filter_similarity(bank[:n_kept], batch[passing], similarity) <= threshold, axis=0)]
            among = filter_similarity(batch[passing], None, similarity) <= threshold
        kept_here: list[int] = []
        for place, candidate in enumerate(passing):
            if among is None or among[place, kept_here].all():
                bank[n_kept] = batch[candidate]
                n_kept += 1
                kept_here.append(place)
                if n_kept == n_filters:
                    return bank, n_seen + int(candidate) + 1
        n_seen += len(batch)
    return bank[:n_kept], n_seen


def random_filter_bank(
    n_filters: int,
    kernel_size,
    channels: int = 1,
    max_similarity: float | None = 0.10,
    similarity: str = "peak",
    zero_mean: bool = True,
    unit_norm: bool = True,
    max_candidates: int = 20_000,
    random_state=None,
    return_info: bool = False,
) -> Any:
    """Draw Gaussian filters and keep those that are discriminating: section 2 of Lee & Lee (2017).

    Each candidate is drawn, made zero-mean, scaled to unit norm, rounded to float32, in this order, and only then compared,
    in float64, with the filters kept before: the threshold holds for the filters as finally used.

    Parameters
    ----------
    n_filters : int
    kernel_size : int or (height, width)
    channels : int
    max_similarity : float or None
        Largest `filter_similarity` allowed between any two; None switches the rule off.
    similarity : {"peak", "l1", "l2", "signed"}
    zero_mean : bool
        Subtract the mean over all coefficients of a filter.
    unit_norm : bool
        Divide by the Euclidean norm over all coefficients of a filter.
    max_candidates : int
        Candidates looked at before giving up.
    random_state : None, int, Generator or RandomState
    return_info : bool

    Returns
    -------
    bank : ndarray of shape (n_filters, height, width, channels), float32
    info : dict
        Only with `return_info`: `n_candidates`, `acceptance_rate` and `largest_similarity` between two of the bank.

    Raises
    ------
    FilterBankError
        When `max_candidates` do not fill the bank. The message says how many filters were found and the smallest threshold
        of three decimals that fills it from the same candidates. Never fewer or more similar filters.
    ParameterError
        For a parameter out of range.

    Notes
    -----
    Feasible at 0.10 with `"peak"`, zero mean and one channel: 5x5 and larger; 4x4 keeps 30 to 41 filters of 4,000 candidates,
    3x3 only one (64 filters 3x3 need about 0.15), with `zero_mean=False` hardly more. From 3 channels on, 3x3 fills 64.

    Examples
    --------
    >>> from streamcnn import filter_similarity, random_filter_bank
    >>> bank, info = random_filter_bank(8, kernel_size=5, random_state=0, return_info=True)
    >>> bank.shape, info["largest_similarity"] <= 0.10
    ((8, 5, 5, 1), True)
    """
    shape = (*_resolve_kernel_size(kernel_size), channels)
    for name, value in (("n_filters", n_filters), ("channels", channels), ("max_candidates", max_candidates)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ParameterError(f"{name} must be a whole number of at least 1, got {value!r}")
    if max_candidates < n_filters:
        raise ParameterError(f"max_candidates must be at least n_filters = {n_filters}, got {max_candidates}")
    if max_similarity is not None and not 0 <= max_similarity <= 1:
        raise ParameterError(f"max_similarity must lie from 0 to 1 or be None (no rule), got {max_similarity!r}")
    if similarity not in SIMILARITIES:
        raise ParameterError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if zero_mean and np.prod(shape) == 1:
        raise ParameterError("zero_mean leaves nothing of a 1x1 filter of one channel; use a larger kernel_size or zero_mean=False")
    candidates = _Candidates(_seed_of(random_state), shape, zero_mean, unit_norm)
    bank, n_seen = _select(candidates, n_filters, max_similarity, similarity, max_candidates)
    if len(bank) < n_filters:
        assert max_similarity is not None
        works = _smallest_threshold(candidates, n_filters, max_similarity, similarity, max_candidates)
        raise FilterBankError(
            f"max_similarity={max_similarity} ({similarity}) lets only {len(bank)} of {n_filters} filters "
            f"{shape[0]}x{shape[1]}x{channels} pass out of {n_seen} candidates; use max_similarity={works:.3f} or more, "
            "a larger kernel_size, or fewer filters"
        )
    if not return_info:
        return bank
    between = filter_similarity(bank, None, similarity)
    np.fill_diagonal(between, 0)
    return bank, {"n_candidates": n_seen, "acceptance_rate": n_filters / n_seen, "largest_similarity": float(between.max())}


def similarity_bytes(filters_shape: tuple[int, int, int, int]) -> int:
    """Bytes that `filter_similarity` holds at the most for a bank of `filters_shape`: shifted copies of filters, with their sums."""
    n, kh, kw, channels = filters_shape
    one = (2 * kh - 1) * (2 * kw - 1) * max(kh * kw * channels, n)
    return 8 * 3 * min(n * one, max(_UNROLLED, one))


def selection_bytes(filters_shape: tuple[int, int, int, int]) -> int:
    """Bytes that choosing a bank of `filters_shape` holds at the most: shifted copies with their sums, and batches of candidates."""
    n, kh, kw, channels = filters_shape
    size = kh * kw * channels
    shifted = max(_UNROLLED, (2 * kh - 1) * (2 * kw - 1) * max(size, n))
    return 8 * 3 * shifted + 8 * 4 * _BATCH * size + 12 * n * size


def _smallest_threshold(candidates: _Candidates, n_filters: int, failed: float, similarity: str, limit: int) -> float:
    """Smallest threshold of three decimals above `failed` that fills the bank, by bisection over the same candidates."""
    # 1.000 always works, as no similarity is larger
    low, high = int(failed * 1000), 1000
    while high - low > 1:
        middle = (low + high) // 2
        if len(_select(candidates, n_filters, middle / 1000, similarity, limit)[0]) == n_filters:
            high = middle
        else:
            low = middle
    return high / 1000
