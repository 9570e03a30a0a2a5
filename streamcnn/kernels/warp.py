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


_LEAST_CROP = 0.6
_MAX_BRIGHTNESS = 0.25


@jit()
def _crop_rows(pictures, keys, originals, mirror, first, last, out):
    """Rows `first` to `last` of `crop`."""
    height, width, channels = pictures.shape[1:]
    out_height, out_width = out.shape[1], out.shape[2]
    one, half, zero, most = np.float32(1), np.float32(0.5), np.float32(0), np.float32(255)
    for row in range(first, last):
        key = keys[row]
        picture = pictures[originals[row]]
        scale = _LEAST_CROP + (1 - _LEAST_CROP) * (0.5 + 0.5 * _symmetric(key, np.uint64(1)))
        top = (0.5 + 0.5 * _symmetric(key, np.uint64(2))) * (1 - scale) * height
        left = (0.5 + 0.5 * _symmetric(key, np.uint64(3))) * (1 - scale) * width
        mirrored = mirror and _symmetric(key, np.uint64(4)) < 0
        gain = np.float32(1 + _MAX_BRIGHTNESS * _symmetric(key, np.uint64(5)))
        for y in range(out_height):
            v = np.float32(min(max(top + (y + 0.5) * scale * height / out_height - 0.5, 0.0), height - 1.0))
            i = min(np.int64(v), max(height - 2, 0))
            i_next, fv = min(i + 1, height - 1), v - np.float32(i)
            for x in range(out_width):
                place = out_width - 1 - x if mirrored else x
                u = np.float32(min(max(left + (place + 0.5) * scale * width / out_width - 0.5, 0.0), width - 1.0))
                j = min(np.int64(u), max(width - 2, 0))
                j_next, fu = min(j + 1, width - 1), u - np.float32(j)
                for c in range(channels):
                    upper = np.float32(picture[i, j, c]) * (one - fu) + np.float32(picture[i, j_next, c]) * fu
                    lower = np.float32(picture[i_next, j, c]) * (one - fu) + np.float32(picture[i_next, j_next, c]) * fu
                    value = (upper * (one - fv) + lower * fv) * gain
                    out[row, y, x, c] = np.uint8(min(max(value, zero), most) + half)


def crop(pictures: np.ndarray, keys: np.ndarray, originals: np.ndarray, mirror: bool, out: np.ndarray, n_threads: int = 1) -> None:
    """Fill `out` with resized crops of pictures.

    The crop has 0.6 to 1 times the sides and lies anywhere inside; it is mirrored in half of the rows, where `mirror` is True, and
    its pixels are multiplied by 0.75 to 1.25, each uniform; bilinear between pixel centres, rounded to the nearest, cut at 255.

    Parameters
    ----------
    pictures : ndarray (k, h, w, c), uint8
    keys : ndarray (m,), uint64
        One random number per row; all its other random numbers come from it.
    originals : ndarray (m,), int64
        Picture of each row.
    mirror : bool
    out : ndarray (m, height, width, c), uint8
    """
    bounds = np.linspace(0, len(out), n_threads + 1).astype(int).tolist()
    run_workers(lambda w: _crop_rows(pictures, keys, originals, mirror, bounds[w], bounds[w + 1], out), n_threads)
