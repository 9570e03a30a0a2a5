"""float16 conversions against numpy's, for every float16 there is."""

import numpy as np
import pytest

from streamcnn.kernels.half import narrow, widen

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = HALVES[np.isfinite(HALVES)]


def test_every_finite_float16_widens_to_the_same_bits():
    """All 63,488 of them, zeros of both signs and denormals included."""
    out = np.empty(FINITE.size, np.float32)
    widen(FINITE, out)
    np.testing.assert_array_equal(out.view(np.uint32), FINITE.astype(np.float32).view(np.uint32))


def test_narrowing_rounds_as_numpy_does():
    """Every float16, every point half-way between two, their neighbours, and random bits: nearest, ties to even."""
    rng = np.random.default_rng(0)
    exact = np.sort(FINITE.astype(np.float32))
    middle = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    noise = rng.integers(0, 0x477FEFFF, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [exact, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, -np.float32(np.inf)), noise, -noise]
    )
    values = values[np.abs(values) < 65520]
    out = np.empty(values.size, np.float16)
    assert narrow(values, out)
    np.testing.assert_array_equal(out.view(np.uint16), values.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e9, np.inf, -np.inf, np.nan])
def test_what_float16_cannot_hold_is_told(value):
    """One number beyond the range among good ones is noticed; the largest that rounds down is not."""
    out = np.empty(3, np.float16)
    assert narrow(np.array([1, 65519.0, 2], np.float32), out)
    assert not narrow(np.array([1, value, 2], np.float32), out)
