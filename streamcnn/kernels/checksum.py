"""HDF5's checksum, several times as fast as HDF5 itself computes it, and bit-equal.

Fletcher's sums run over 16-bit words, high byte first, as H5_checksum_fletcher32 (H5checksum.c) has them: s1 = sum of w_i and
s2 = sum of (n - i) w_i. HDF5 folds a carry back in instead of dividing by 65,535, so a sum is 0 only when all words are, and a multiple
of 65,535 is written as 65,535. Neither depends on the order of the additions, which so may go into vectors.
"""

import sys

import numpy as np

from streamcnn.kernels.jit import jit

# words whose weighted sum is still below 2**32: 360 * 361 / 2 * 65,535, and HDF5's own number
_BLOCK = 360
_MODULUS = np.uint64(65535)
# swapping the bytes of a word is multiplying by 256 modulo 65,535, so words are summed as this machine reads them
_SWAP = np.uint64(256 if sys.byteorder == "little" else 1)


@jit()
def _fletcher32(words):
    first = second = np.uint64(0)
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK]
        total = weighted = np.uint32(0)
        for i in range(block.size):
            # numba makes 64-bit numbers of sums of 32-bit ones, which would halve the speed
            total = np.uint32(total + block[i])
            weighted = np.uint32(weighted + np.uint32(np.uint32(block.size - i) * np.uint32(block[i])))
        second = (second + np.uint64(block.size) * (first % _MODULUS) + np.uint64(weighted)) % _MODULUS
        first += np.uint64(total)
    if first == 0:
        return np.uint64(0)
    low, high = first % _MODULUS * _SWAP % _MODULUS, second * _SWAP % _MODULUS
    return (high if high else _MODULUS) << np.uint64(16) | (low if low else _MODULUS)


KERNELS = (_fletcher32,)


def fletcher32(data: np.ndarray) -> int:
    """The 32-bit checksum that HDF5's filter `fletcher32` puts behind a chunk, low byte first.

    Parameters
    ----------
    data : ndarray of an even number of bytes, C-contiguous

    Returns
    -------
    int
    """
    return int(_fletcher32(data.reshape(-1).view(np.uint16)))
