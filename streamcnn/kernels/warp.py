"""Small pictures enlarged, turned, moved and made noisy: each output image a pure function of (seed, row number).

All randomness is a counter through splitmix64 (Steele, Lea, Flood 2014): nothing depends on how rows are cut into calls or
shared among threads.
"""

import math

import numpy as np

from streamcnn.kernels.jit import jit, run_workers

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_SHIFTS = np.uint64(8), np.uint64(16), np.uint64(24)
_BYTE = np.uint64(255)
_MAX_ANGLE = math.radians(12)
_MAX_SHIFT = 0.10
_MAX_SCALE = 0.15
# sum of 4 bytes: mean 510, standard deviation sqrt(4 (256**2 - 1) / 12) = 147.8
_NOISE_MEAN = np.float32(510)
_NOISE_GAIN = np.float32(8 / 147.8)


@jit(cache=False)
def _mix(x):
    """splitmix64's finaliser: uint64 -> uint64."""
    x = (x ^ (x >> _SHIFT_30)) * _MIX_1
    x = (x ^ (x >> _SHIFT_27)) * _MIX_2
    return x ^ (x >> _SHIFT_31)


@jit(cache=False)
def _symmetric(key, stream):
    """Uniform float64 in [-1, 1) of `stream` (uint64)."""
    return 2.0 * (_mix(key + stream * _GOLDEN) >> _SHIFT_11) * 2.0**-53 - 1.0


@jit()
def _warp_rows(pictures, keys, originals, first, last, out):
    """Rows `first` to `last` of `warp`."""
    height, width = pictures.shape[1] - 2, pictures.shape[2] - 2
    size = out.shape[1]
    top, right = np.float32(height + 0.999), np.float32(width + 0.999)
    zero, one, half, most = np.float32(0), np.float32(1), np.float32(0.5), np.float32(255)
    for row in range(first, last):
        key = keys[row]
        picture = pictures[originals[row]]
        angle = _MAX_ANGLE * _symmetric(key, np.uint64(1))
        scale = 1.0 + _MAX_SCALE * _symmetric(key, np.uint64(2))
        down = _MAX_SHIFT * _symmetric(key, np.uint64(3))
        across = _MAX_SHIFT * _symmetric(key, np.uint64(4))
        cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
        dv, du = np.float32(-sine * height / size), np.float32(cosine * width / size)
        for y in range(size):
            dy, dx = (y + 0.5) / size - 0.5 - down, 0.5 / size - 0.5 - across
            # + 0.5: the picture has a border of one zero pixel, whose centre is at 0
            v0 = np.float32((cosine * dy - sine * dx + 0.5) * height + 0.5)
            u0 = np.float32((sine * dy + cosine * dx + 0.5) * width + 0.5)
            counter = key + np.uint64(8 + y * size) * _GOLDEN
            for x in range(size):
                v = min(max(v0 + np.float32(x) * dv, zero), top)
                u = min(max(u0 + np.float32(x) * du, zero), right)
                i, j = np.int32(v), np.int32(u)
                fv, fu = v - np.float32(i), u - np.float32(j)
                upper = picture[i, j] * (one - fu) + picture[i, j + 1] * fu
                lower = picture[i + 1, j] * (one - fu) + picture[i + 1, j + 1] * fu
                bits = _mix(counter + np.uint64(x) * _GOLDEN)
                total = (bits & _BYTE) + ((bits >> _SHIFTS[0]) & _BYTE) + ((bits >> _SHIFTS[1]) & _BYTE) + ((bits >> _SHIFTS[2]) & _BYTE)
                noise = (np.float32(total) - _NOISE_MEAN) * _NOISE_GAIN
                value = upper * (one - fv) + lower * fv + noise
                out[row, y, x] = np.uint8(min(max(value, zero), most) + half)


def warp(pictures: np.ndarray, keys: np.ndarray, originals: np.ndarray, out: np.ndarray, n_threads: int = 1) -> None:
    """Fill `out` with distorted enlargements.

    Turned by up to 12 degrees, scaled by 0.85 to 1.15, moved by up to 10 % of the side, each uniform; bilinear between pixel
    centres; noise of standard deviation 8 (sum of four uniform bytes), cut to 0 to 255, rounded to the nearest.

    Parameters
    ----------
    pictures : ndarray (k, h + 2, w + 2), float32
        With a border of one zero pixel, values 0 to 255.
    keys : ndarray (m,), uint64
        One random number per row; all its other random numbers come from it.
    originals : ndarray (m,), int64
        Picture of each row.
    out : ndarray (m, size, size), uint8
    """
    bounds = np.linspace(0, len(out), n_threads + 1).astype(int).tolist()
    run_workers(lambda worker: _warp_rows(pictures, keys, originals, bounds[worker], bounds[worker + 1], out), n_threads)
