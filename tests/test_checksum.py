"""Our checksum against HDF5's own filter."""

import h5py
import numpy as np
import pytest

from streamcnn.kernels.checksum import fletcher32

RNG = np.random.default_rng(0)
# around the 360 words that are summed at a time; sums that are zero, and multiples of 65,535, which HDF5 does not write as zero
WORDS = {
    **{f"{n} random": RNG.integers(0, 1 << 16, n, dtype=np.uint16) for n in (1, 2, 359, 360, 361, 721, 131_072)},
    "zeros": np.zeros(500, np.uint16),
    "all ones": np.full(131_072, 65535, np.uint16),
    "one among zeros": np.array([0, 0, 65535, 0, 0], np.uint16),
    "sum 65535": np.array([1, 65534], np.uint16),
    "weighted sum a multiple": np.full(131_070, 256, np.uint16),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_checksum_is_the_one_hdf5_writes(name):
    """Bit-equal to what HDF5's filter puts behind the same chunk."""
    words = WORDS[name]
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        data = file.create_dataset("x", data=words, chunks=words.shape, fletcher32=True)
        stored = data.id.read_direct_chunk((0,))[1]
    assert fletcher32(words) == int.from_bytes(stored[-4:], "little")
