import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcnn.errors import FilterBankError, ParameterError
from streamcnn.filters import SIMILARITIES, filter_similarity, random_filter_bank, similarity_bytes


def by_definition(a, b, similarity):
    """Eq. (2) by plain loops, divided as the reading says."""
    kh, kw, channels = a.shape
    largest = 0.0
    for i in range(-kh + 1, kh):
        for j in range(-kw + 1, kw):
            total = 0.0
            for x in range(kh):
                for y in range(kw):
                    for c in range(channels):
                        if 0 <= x + i < kh and 0 <= y + j < kw:
                            product = a[x, y, c] * b[x + i, y + j, c]
                            total += product if similarity == "signed" else abs(product)
            largest = max(largest, abs(total))
    divisors = {
        "peak": kh * kw * channels * np.abs(a).max() * np.abs(b).max(),
        "l1": np.abs(a).sum() * np.abs(b).sum(),
        "l2": np.sqrt((a**2).sum() * (b**2).sum()),
    }
    return largest / divisors["l2" if similarity == "signed" else similarity]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shape", [(3, 3, 1), (2, 4, 1), (3, 2, 3), (1, 1, 2)])
def test_similarity_is_equation_2(shape, similarity):
    """All shifts of both axes, zeros outside, channels summed, against loops written from the formula."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((4, *shape)), rng.standard_normal((3, *shape))
    expected = [[by_definition(x, y, similarity) for y in b] for x in a]
    # float64 sums of at most 27 terms in another order
    np.testing.assert_allclose(filter_similarity(a, b, similarity), expected, rtol=1e-13)


def test_similarity_finds_the_shift():
    """One coefficient in opposite corners: only the largest shift brings them together."""
    a, b = np.zeros((1, 3, 3, 1)), np.zeros((1, 3, 3, 1))
    a[0, 0, 0, 0], b[0, 2, 2, 0] = 2, -5
    assert filter_similarity(a, b, "l2") == pytest.approx(1)
    assert filter_similarity(b, a, "signed") == pytest.approx(1)
    assert filter_similarity(a, b, "peak") == pytest.approx(1 / 9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), similarity=st.sampled_from(SIMILARITIES), n=st.integers(1, 6))
def test_similarity_is_symmetric_bounded_and_blind_to_scale(seed, similarity, n):
    """From 0 to 1, the same both ways round, unchanged when filters are multiplied by numbers."""
    rng = np.random.default_rng(seed)
    filters = rng.standard_normal((n, 3, 4, 2))
    matrix = filter_similarity(filters, similarity=similarity)
    assert matrix.shape == (n, n) and matrix.dtype == np.float64
    assert (matrix >= 0).all() and (matrix <= 1).all()
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-12)
    scaled = filters * rng.uniform(-9, 9, (n, 1, 1, 1))
    np.testing.assert_allclose(filter_similarity(scaled, filters, similarity), matrix, rtol=1e-10)
    if similarity in ("l2", "signed"):
        np.testing.assert_allclose(matrix.diagonal(), 1)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_filter_of_zeros_resembles_nothing(similarity):
    """Similarity 0 instead of 0 / 0."""
    filters = np.zeros((2, 3, 3, 1))
    filters[1] = 1
    assert filter_similarity(filters, similarity=similarity).tolist()[0] == [0, 0]


def test_similarity_does_not_depend_on_the_pieces_it_is_computed_in(monkeypatch):
    """Shifted copies made a few filters at a time give the same matrix."""
    filters = np.random.default_rng(0).standard_normal((20, 5, 5, 2))
    whole = filter_similarity(filters)
    monkeypatch.setattr("streamcnn.filters._UNROLLED", 3 * 81 * 50)
    # the same sums by BLAS in other shapes
    np.testing.assert_allclose(filter_similarity(filters), whole, rtol=1e-13)


def test_the_table_of_readings_is_what_happens():
    """Feasibility as the module says: peak selects at 5x5, l1 passes all, l2 and signed pass no second filter."""
    filters = random_filter_bank(60, 5, max_similarity=None, random_state=0)
    pairs = np.triu_indices(60, 1)
    passing = {s: float((filter_similarity(filters, similarity=s)[pairs] <= 0.1).mean()) for s in SIMILARITIES}
    assert 0.05 < passing["peak"] < 0.5
    assert passing["l1"] > 0.99
    assert passing["l2"] == 0 and passing["signed"] < 0.01


@pytest.mark.parametrize(
    ("shape", "match"), [((3, 3, 3), "n_filters, height, width, channels"), ((2, 0, 3, 1), "got"), ((2, 3, 3, 1), "finite")]
)
def test_bad_filters_are_named(shape, match):
    """Wrong shape and NaN are errors that say so."""
    with pytest.raises(ParameterError, match=match):
        filter_similarity(np.full(shape, np.nan))


def test_bad_readings_and_pairs_are_named():
    """An unknown reading and banks of different shapes are errors that say so."""
    with pytest.raises(ParameterError, match="similarity must be one of peak, l1, l2, signed, got 'cosine'"):
        filter_similarity(np.ones((1, 3, 3, 1)), similarity="cosine")
    with pytest.raises(ParameterError, match="agree in shape"):
        filter_similarity(np.ones((1, 3, 3, 1)), np.ones((1, 5, 5, 1)))


@pytest.mark.parametrize("args", [(64, 5), (64, 7), (16, (5, 7), 2), (32, 3, 8)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_bank_is_full_and_dissimilar_as_finally_used(args, seed):
    """The right number of float32 filters, zero mean, unit norm, and no pair above 10 % after all of that."""
    bank, info = random_filter_bank(*args, random_state=seed, return_info=True)
    size = args[1] if isinstance(args[1], tuple) else (args[1], args[1])
    assert bank.shape == (args[0], *size, args[2] if len(args) > 2 else 1) and bank.dtype == np.float32
    similarity = filter_similarity(bank)
    np.fill_diagonal(similarity, 0)
    assert similarity.max() <= 0.10
    assert info["largest_similarity"] == similarity.max()
    assert info["n_candidates"] >= args[0]
    assert info["acceptance_rate"] == args[0] / info["n_candidates"]
    # rounding of the coefficients to float32, at most 2**-25 each for coefficients below 1
    assert np.abs(bank.astype(np.float64).sum(axis=(1, 2, 3))).max() <= bank[0].size * 2**-25
    assert np.abs(np.square(bank.astype(np.float64)).sum(axis=(1, 2, 3)) - 1).max() <= 2**-20


@pytest.mark.parametrize("similarity", ["peak", "signed"])
def test_selection_is_one_by_one(similarity):
    """Testing candidates in batches keeps exactly those that one candidate after the other would."""
    threshold = {"peak": 0.12, "signed": 0.55}[similarity]
    bank, info = random_filter_bank(12, 4, 1, threshold, similarity, random_state=3, return_info=True)
    candidates = random_filter_bank(info["n_candidates"], 4, 1, None, random_state=3)
    kept: list[np.ndarray] = []
    for candidate in candidates:
        if not kept or filter_similarity(candidate[None], np.stack(kept), similarity).max() <= threshold:
            kept.append(candidate)
    # the last candidate looked at is the one that filled the bank
    assert np.array_equal(bank, np.stack(kept)) and np.array_equal(bank[-1], candidates[-1])


def test_the_same_seed_gives_the_same_bank():
    """Equal for an int, a Generator and a RandomState of the same seed; other for another seed; None differs each time."""
    for make in (lambda s: s, np.random.default_rng, np.random.RandomState):
        one, two, other = (random_filter_bank(8, 5, random_state=make(s)) for s in (5, 5, 6))
        assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert not np.array_equal(random_filter_bank(2, 5), random_filter_bank(2, 5))


def test_plain_filters_without_options():
    """Without zero mean and unit norm the filters are Gaussian as drawn, the first candidates in order."""
    bank, info = random_filter_bank(500, 5, 2, None, zero_mean=False, unit_norm=False, random_state=0, return_info=True)
    # 25,000 standard normal values: five standard errors of mean and deviation
    assert abs(bank.mean()) < 5 / np.sqrt(25_000) and abs(bank.std() - 1) < 5 / np.sqrt(50_000)
    assert info["n_candidates"] == 500 and info["acceptance_rate"] == 1


def test_zero_mean_comes_before_unit_norm():
    """Each option alone does its part, in the documented order."""
    only_mean = random_filter_bank(4, 3, 1, None, unit_norm=False, random_state=0).astype(np.float64)
    both = random_filter_bank(4, 3, 1, None, random_state=0)
    norms = np.sqrt((only_mean**2).sum(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(both, only_mean / norms, rtol=1e-5, atol=1e-7)


def test_a_bank_that_cannot_be_filled_says_what_works():
    """The error names how many were found and a threshold which fills the bank, where a thousandth less does not."""
    arguments = {"max_candidates": 400, "random_state": 0}
    with pytest.raises(FilterBankError, match=r"only \d+ of 16 filters 3x3x1 .*larger kernel_size, or fewer filters") as caught:
        random_filter_bank(16, 3, max_similarity=0.1, **arguments)
    works = float(str(caught.value).split("use max_similarity=")[1].split()[0])
    found = int(str(caught.value).split("only ")[1].split()[0])
    assert random_filter_bank(found, 3, max_similarity=0.1, **arguments).shape == (found, 3, 3, 1)
    assert len(random_filter_bank(16, 3, max_similarity=works, **arguments)) == 16
    with pytest.raises(FilterBankError, match="only"):
        random_filter_bank(16, 3, max_similarity=works - 0.001, **arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_filters": 0}, "n_filters must be a whole number"),
        ({"kernel_size": 0}, "kernel_size must be a positive whole number or a pair"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be"),
        ({"kernel_size": 2.5}, "kernel_size must be"),
        ({"channels": 0}, "channels must be"),
        ({"max_similarity": 1.5}, "max_similarity must lie from 0 to 1"),
        ({"similarity": "other"}, "similarity must be one of"),
        ({"max_candidates": 3}, "max_candidates must be at least n_filters = 4"),
        ({"kernel_size": 1}, "zero_mean leaves nothing"),
        ({"random_state": -1}, "random_state must be"),
    ],
)
def test_bad_parameters_are_named(arguments, match):
    """Every parameter out of range is an error that names it."""
    with pytest.raises(ParameterError, match=match):
        random_filter_bank(**({"n_filters": 4, "kernel_size": 5} | arguments))


@pytest.mark.parametrize("shape", [(24, 5, 5, 1), (8, 15, 15, 3), (2, 31, 31, 1)])
def test_similarities_hold_what_they_say(shape):
    """The arrays of a comparison are at most what is declared, and more than a quarter of it: shifted copies, their sums and absolutes."""
    bank = np.random.default_rng(0).normal(size=shape)
    filter_similarity(bank[:1, :2, :2])  # loads what is loaded once
    tracemalloc.start()
    filter_similarity(bank)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # besides: the bank itself, padded, and results
    assert similarity_bytes(shape) / 4 < peak < similarity_bytes(shape) + 20 * bank.nbytes + (64 << 10)
