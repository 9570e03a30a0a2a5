"""Checks of the CUDA kernels in numba's simulator: a program of its own, started by test_cuda.py with NUMBA_ENABLE_CUDASIM=1.

Its arguments are a part of the checks and the number of parts. Prints one JSON object, check -> what went wrong or "". The simulator runs
the device's threads in Python, so blocks are small, and of the table of convolutions only the smaller ones are run. Its multiply-add
rounds twice; here it gets one that rounds once, so that bits can be compared with the CPU's.
"""

import json
import os
import sys
import traceback
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import test_preprocess
from conv_cases import CASES, NON_FINITE, agree, bits, for_simulator, fused, make, rounds_as_the_cpu, run, same_as_cpu
from numba.cuda.simulator import kernelapi

from streamcnn import ConvFeatures, ConvLayer, gpubench
from streamcnn.errors import DataError, DeviceError, MemoryBudgetError, ParameterError
from streamcnn.kernels import ACTIVATIONS, POOLS, cpu, cuda, cudadevice, naive
from streamcnn.kernels.cudaloops import Tile

F32 = np.float32
SMALL = Tile(2, 4, 4, 4, 3)  # 8 threads: blocks of 8 cells x 16 filters, 3 taps at a time


def with_tile(tile):
    """The CUDA kernels with a tile of one's own."""
    return SimpleNamespace(conv_scratch=cuda.conv_scratch, conv_layer=partial(cuda.conv_layer, tile=tile))


kernelapi.FakeCUDAModule.fma = lambda self, a, b, c: fused(a, b, c)


def convolution(case, tile=SMALL):
    """Within the bound of rounding errors of the reference, and the bits of the CPU."""
    same_as_cpu(agree(with_tile(tile), case), case)


def nan_and_infinity(case):
    """NaN reaches exactly the cells that see it, infinity follows IEEE."""
    with np.errstate(invalid="ignore"):
        out = run(with_tile(SMALL), *case[0], **case[1])
    assert np.isnan(out).any() and np.isfinite(out).any()
    same_as_cpu(out, case)


def multiply_adds_are_fused():
    """The multiply-add of these checks rounds once: where two roundings, and float64 and one more, go wrong."""
    a, b = F32(1 + 2.0**-12), F32(1 + 2.0**-12)
    assert fused(a, b, F32(-1)) == F32(2.0**-11 + 2.0**-24) != a * b + F32(-1)
    # 2**-24 is half a unit: only the last bit of the product, below float64's precision, decides
    tiny = F32(2.0**-60)
    assert fused(tiny, F32(1), F32(1 + 2.0**-23)) == F32(1 + 2.0**-23)
    half_up = float(F32(1)) + 2.0**-24
    assert fused(F32(2.0**-24), F32(1 + 2.0**-23), F32(1)) == F32(1 + 2.0**-23) != F32(half_up)


def tiles_of_the_device():
    """The tiles that are used on a device agree: a block of 256 threads each, and cells and filters beyond its end."""
    for tile in cuda.TILES:
        convolution((make(1, (2, 5, 1), 3, (2, 2)), {}), tile._replace(taps=4))


def negative_zero_survives_the_filling_taps():
    """A sum of -0.0 keeps its sign through the taps that fill up the last step."""
    images, filters = np.zeros((1, 2, 2, 1), F32), np.full((1, 2, 2, 1), -1, F32)
    for value in (-0.0, 0.0):
        bias = np.full(1, value, F32)
        out, expected = (run(kernels, images, filters, bias, activation="clip", pool="max") for kernels in (with_tile(SMALL), cpu))
        assert np.array_equal(bits(out), bits(expected))
        assert np.signbit(out).all() == np.signbit(value)


def chunks():
    """Any device memory, any scratch and any number of host threads give the same bits; scratch is not touched."""
    images, filters, bias = make(7, (5, 4, 2), 3, (2, 2))
    edges = np.arange(4)
    arguments = (images, filters, bias, 1, 0, ACTIVATIONS["relu"], 0.0, POOLS["mean"], edges + 1, edges)
    expected = np.empty((7, 3, 3, 3), F32)
    cpu.conv_layer(*arguments, np.empty((1, cpu.conv_scratch((5, 4, 2), filters.shape, (3, 3, 3), 0)), F32), expected)
    per_image, fixed = cuda.conv_memory((5, 4, 2), 1, filters.shape, (3, 3, 3))
    seen = set()
    for images_in_flight, n_threads in [(2, 1), (4, 3), (8, 1), (100, 2)]:
        limit = fixed + images_in_flight * per_image + 2 * 3 * 256
        scratch = np.full((n_threads, cuda.conv_scratch((5, 4, 2), filters.shape, (3, 3, 3), 0)), np.nan, F32)
        out = np.full(expected.shape, np.nan, F32)
        cuda.conv_layer(*arguments, scratch, out, tile=SMALL, limit=limit)
        assert np.array_equal(bits(out), bits(expected))
        assert np.isnan(scratch).all()
        chunk, size = cudadevice.plan_chunk(7, 40, 108, 0, fixed, scratch.nbytes, limit)
        assert 2 * size + fixed <= limit and cudadevice.slot_bytes(chunk, 40, 108) <= size
        assert cudadevice.held_bytes() == 2 * size
        seen.add(chunk)
    assert seen == {1, 3, 7}  # the limits did make a difference


def chunks_with_deviations():
    """The deviations of windows, which lie on the device, follow the chunks; their room is part of scratch and of a chunk's memory."""
    case = make(5, (5, 4, 2), 3, (2, 2)), {"patch_norm": 10.0, "padding": 1, "stride": 2}
    fixed = cuda.conv_memory((5, 4, 2), 1, (3, 2, 2, 2), (3, 3, 3))[1]
    original, launched = cuda.inverse_deviations, []

    class Counted:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append(arguments[-1].size // 9) or original[grid](*arguments)

    cuda.inverse_deviations = Counted()
    try:
        for n_chunks, images_of_chunk in ((5, 1), (3, 2), (1, 5)):
            launched.clear()
            limit = fixed + 2 * images_of_chunk * (40 + 108 + 36) + 2 * 4 * 256
            limited = SimpleNamespace(conv_scratch=cuda.conv_scratch, conv_layer=partial(cuda.conv_layer, tile=SMALL, limit=limit))
            same_as_cpu(run(limited, *case[0], **case[1]), case)
            assert len(launched) == n_chunks and sum(launched) == 5
    finally:
        cuda.inverse_deviations = original
    big = (500, 400, 1), (1, 2, 2, 1), (1, 1, 1), 1
    assert cuda.conv_scratch(*big, 10.0) >= cuda.conv_scratch(*big) and cuda.conv_scratch((5000, 4000, 1), *big[1:], 10.0) > 5000 * 4000


def plans():
    """A chunk fills no more than the memory, cuts a call in four, and is no shorter than a transfer worth starting."""
    plan = cudadevice.plan_chunk
    assert plan(1000, 1 << 16, 1 << 20, 0, 0, 1 << 40, 1 << 40)[0] == 250
    assert plan(1000, 100, 900, 0, 0, 1 << 40, 1 << 40)[0] == 1000
    assert plan(4000, 100, 900, 0, 0, 1 << 40, 1 << 40)[0] == (1 << 20) // 1000
    for n, image, out, work, fixed, host, limit in [
        (512, 3072, 50176, 0, 30000, 8 << 20, 1 << 30),
        (512, 3072, 50176, 0, 30000, 64 << 20, 5 << 20),
        (9, 1 << 20, 1 << 20, 16 << 20, 0, 64 << 20, 1 << 30),
    ]:
        chunk, size = plan(n, image, out, work, fixed, host, limit)
        assert 2 * size <= min(host, limit - fixed) and cudadevice.slot_bytes(chunk, image, out, work) <= size
        # not wasteful: one image more would not fit, unless the call or a quarter of it is what limits
        assert chunk >= -(-n // 4) or cudadevice.slot_bytes(chunk + 1, image, out, work) > size - 3 * 256


def memory_errors():
    """Neither device memory nor scratch for one image is an error that names what would do; what it names does."""
    for expected, host, limit in [(MemoryBudgetError, 1 << 20, 5000), (ParameterError, 5000, 1 << 20)]:
        try:
            cudadevice.plan_chunk(5, 1000, 2000, 0, 700, host, limit)
        except expected as error:
            assert "one image" in str(error) or "conv_scratch" in str(error)
        else:
            raise AssertionError("no error")
    assert cudadevice.plan_chunk(5, 1000, 2000, 0, 700, 6144, 6144 + 700) == (1, 3072)
    for told, limit in [("2GiB", 2 << 30), ("5000", 5000), ("", 1 << 62)]:
        os.environ[cudadevice.LIMIT_VARIABLE] = told
        assert cudadevice.device_limit() == limit
    del os.environ[cudadevice.LIMIT_VARIABLE]
    m = cudadevice.host_floats(500_000, 2_000_000)
    assert cudadevice.plan_chunk(5, 2_000_000, 8_000_000, 0, 0, 4 * m, 1 << 40)[0] == 1


def an_interrupted_call_leaves_nothing_behind():
    """After a launch that failed, the next call neither writes to the old results nor gives other ones."""
    images, old, new = np.arange(8, dtype=F32).reshape(8, 1), np.full((8, 1), -1, F32), np.full((8, 1), -1, F32)
    calls = []

    def launch(stream, source, target, work, n):
        calls.append(n)
        if len(calls) == 2:
            raise KeyboardInterrupt
        target.copy_to_device(source.copy_to_host() + 1)

    host = 2 * cudadevice.slot_bytes(1, 4, 4) + 2 * 256  # two images
    try:
        cudadevice.stream_chunks(images, old, host, 1, launch)
    except KeyboardInterrupt:
        cudadevice.stream_chunks(images, new, host, 1, launch)
    assert len(calls) > 3 and (new == images + 1).all() and (old == -1).all()


def a_forked_child_is_refused():
    """CUDA does not survive a fork: the child gets an error that says what to do, and the parent goes on."""
    if not hasattr(os, "fork"):
        return
    images, out = np.ones((1, 2, 2, 1), F32), np.empty((1, 2, 2, 1), F32)
    cuda.log(images, out)
    child = os.fork()
    if child == 0:
        try:
            cuda.log(images, out)
        except DeviceError as error:
            os._exit(0 if 'start processes by the "spawn" method' in str(error) else 2)
        except BaseException:
            os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    cuda.log(images, out)


def conv_memory_covers_what_is_sent():
    """`conv_memory` counts at least the bytes of filters and tables for every tile, and not twice as many for a large bank."""
    sent = []
    original = cuda.cuda.to_device
    cuda.cuda.to_device = lambda array, **options: sent.append(array.nbytes) or original(array, **options)
    try:
        for n_filters, kernel, split in [
            (1, (1, 1), False),
            (7, (3, 3), True),
            (64, (5, 5), False),
            (256, (5, 5), False),
            (70, (11, 11), True),
        ]:
            sent.clear()
            tile = cuda.choose_tile(n_filters, kernel[0] * kernel[1] * 3, split)
            filters, edges = np.zeros((n_filters, *kernel, 3), F32), np.arange(11)
            cuda.prepare_conv((20, 20, 3), filters, np.zeros(n_filters, F32), 1, 0, 0, 0, 0, edges, edges, tile)
            fixed = cuda.conv_memory((20, 20, 3), 1, filters.shape, (10, 10, n_filters * (1 + split)))[1]
            assert sum(sent) <= fixed
            assert n_filters < 128 or fixed < 2 * sum(sent)
    finally:
        cuda.cuda.to_device = original


def chosen_tiles():
    """Every choice fits a block; banks get a tile of their size; few taps are multiplied in vain."""
    for n_filters, n_taps, split in product([1, 8, 16, 33, 64, 100, 256, 2048], [1, 3, 9, 25, 27, 49, 75, 121, 363, 1600], [False, True]):
        tile = cuda.choose_tile(n_filters, n_taps, split)
        assert tile.threads == 256 and tile.threads % tile.block_cells == 0 and tile.cells % 4 == tile.filters % 4 == 0
        assert 8 * (tile.taps + 1) * (tile.block_cells + tile.block_filters) <= 48 << 10
        assert -(-n_taps // tile.taps) * tile.taps <= 1.25 * n_taps
    assert cuda.choose_tile(256, 75, False).block_filters == 128
    assert cuda.choose_tile(64, 75, False).block_filters == cuda.choose_tile(256, 75, True).block_filters == 64
    assert cuda.choose_tile(8, 25, False).block_filters == 16


def halves():
    """float16 results are rounded as on the host, in the device's kernel; those beyond its range are told."""
    rounds_as_the_cpu(with_tile(SMALL))


def no_images_is_no_work():
    images, filters, bias = make(0, (5, 5, 1), 3, (3, 3))
    assert run(with_tile(SMALL), images, filters, bias).shape == (0, 3, 3, 3)
    for step in ("standardize", "log", "smooth", "local_contrast"):
        assert test_preprocess.run(step, np.empty((0, 4, 4, 1), F32), cuda).shape == (0, 4, 4, 1)


def preprocessing(steps, dtype, shape):
    """The bits of the CPU, and the reference's values; in place too."""
    images = test_preprocess.make(3, shape, dtype)
    out = test_preprocess.run(steps, images, cuda)
    assert np.array_equal(bits(out), bits(test_preprocess.run(steps, images, cpu)))
    np.testing.assert_allclose(out, test_preprocess.run(steps, images, naive), rtol=1e-5, atol=1e-5)
    if dtype == F32:
        scratch = np.empty((2, test_preprocess.preprocess.scratch((steps,), shape, cuda)), F32)
        test_preprocess.preprocess.apply((steps,), images, scratch, images, cuda)
        assert np.array_equal(images, out)


def preprocessing_of_odd_images():
    """Constant images give zeros, NaN stays in its image, and images larger than a block are summed whole."""
    for dtype in (np.uint8, F32):
        constant = np.full((2, 3, 3, 2), 7, dtype)
        assert not test_preprocess.run("standardize", constant, cuda).any()
        assert not test_preprocess.run("local_contrast", constant, cuda).any()
        images = test_preprocess.make(2, (9, 7, 3), dtype)
        out, expected = np.empty(images.shape, F32), test_preprocess.run("standardize", images, cpu)
        cuda.standardize(images, out, threads=8)
        assert np.array_equal(bits(out), bits(expected))
    images[0, 1, 1] = np.nan
    out = test_preprocess.run("standardize", images, cuda)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def features_are_the_same_on_both():
    """ConvFeatures on the device, preprocessing and the scale of its filters included, gives the bits of the CPU."""
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 7), dtype=np.uint8)
    original, cuda.TILES = cuda.TILES, (SMALL,)
    fetched, stream = [], cuda.stream_chunks
    cuda.stream_chunks = lambda images, out, *rest, **more: fetched.append(out.dtype.name) or stream(images, out, *rest, **more)
    try:
        rows = []
        for device in ("cpu", "cuda"):
            layers = [ConvLayer(3, 3, filters="patches", patch_norm=0.1, pool_size=2), ConvLayer(2, 2, filters="random", pool=None)]
            features = ConvFeatures(layers=layers, preprocess="standardize", device=device, n_jobs=2, random_state=0)
            rows.append(features.fit_transform(images))
            assert features.device_ == device
            layers[1] = ConvLayer(2, 2, filters="random", pool=None, activation="abs", gain=1e5)
            try:
                ConvFeatures(layers=layers, device=device, n_jobs=2, random_state=0).fit_transform(images)
            except DataError as error:
                assert 'exceed the range of float16: choose feature_dtype="float32"' in str(error)
            else:
                raise AssertionError("no error")
        assert set(fetched) == {"float32", "float16"}  # the last layer's results alone travel as float16
    finally:
        cuda.TILES, cuda.stream_chunks = original, stream
    assert rows[0].any() and np.array_equal(bits(rows[0]), bits(rows[1]))


def the_benchmark_runs():
    """A tiny row of the benchmark without the rival: every figure is there and positive."""
    gpubench.measure_peak.__defaults__ = (1, 1)  # blocks, turns
    table = gpubench.conv_cuda_rows([gpubench.Case(2, 4, 5, 1, 3, 2, 2, "uint8")], repeats=1, seconds=0, n_threads=1, rival=False)
    (row,) = table["rows"]
    assert row["case"] == "2, 4x5, 1 -> 3, 2, 2" and table["peak_gflops"] > 0
    assert all(value > 0 for key, value in row.items() if key != "case")
    assert gpubench.Case(2, 4, 5, 1, 3, 2, 2, "uint8").flop == 2 * 2 * (2 * 4) * 3 * 4


CHECKS = {name: partial(convolution, case) for name, case in for_simulator(CASES).items()}
CHECKS |= {name: partial(nan_and_infinity, case) for name, case in NON_FINITE.items()}
for steps, dtype, shape in product(["standardize", "log", "smooth", "local_contrast"], [np.uint8, F32], [(1, 1, 1), (5, 4, 2), (2, 11, 1)]):
    CHECKS[f"{steps} {np.dtype(dtype).name} {shape}"] = partial(preprocessing, steps, dtype, shape)
for check in (
    multiply_adds_are_fused,
    tiles_of_the_device,
    negative_zero_survives_the_filling_taps,
    chunks,
    chunks_with_deviations,
    plans,
    memory_errors,
    an_interrupted_call_leaves_nothing_behind,
    a_forked_child_is_refused,
    conv_memory_covers_what_is_sent,
    chosen_tiles,
    halves,
    no_images_is_no_work,
    preprocessing_of_odd_images,
    features_are_the_same_on_both,
    the_benchmark_runs,
):
    CHECKS[check.__name__.replace("_", " ")] = check


def main() -> None:
    # numba's simulator polls its threads without rest, and each turn of that holds the interpreter for this long. Measured: half the
    # time of the default 5 ms for blocks of 8 threads; below 1 ms blocks of 256 take longer again
    sys.setswitchinterval(1e-3)
    results, (part, n_parts) = {}, map(int, sys.argv[1:])
    for name, check in list(CHECKS.items())[part::n_parts]:
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
