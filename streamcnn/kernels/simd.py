"""Vector code for the CPU kernels: one register holds the same number of several images.

SIMD runs across images, so that every step is a full vector operation for any image width, kernel size and channel count, and
no sum depends on how many lanes there are. The intrinsics emit LLVM vector code directly: from scalar Python loops LLVM makes
heap accumulators, or leaves unrolled taps scalar (measured at a tenth of this).

A *tile* is P positions x F filters x L lanes of accumulators that stay in registers over all taps of the filter. It is passed
as an array of type `accumulators`, whose dtype carries P, F and L, because numba compiles (and caches) by type.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import extending, types
from numba.core import cgutils, config

from streamcnn.kernels import ACTIVATIONS, POOLS
from streamcnn.kernels.emitter import F32, F64, I32, I64, Emitter

intrinsic: Any = extending.intrinsic  # its callers pass all arguments but the first, which type checkers cannot know


def make_tile(positions: int, filters: int, lanes: int) -> np.ndarray:
    """Empty array whose type says: tiles of `positions` x `filters` x `lanes`."""
    return np.empty(0, [("accumulators", np.float32, (positions, filters, lanes))])


def cpu_name() -> str:
    """The CPU numba compiles for, by LLVM's name: this machine's, or that of NUMBA_CPU_NAME."""
    return getattr(config, "CPU_NAME", None) or binding.get_host_cpu_name()


def choose_tile() -> np.ndarray:
    """The tile that fits the registers of the CPU numba compiles for; its choice changes no bit of any result."""
    name, features = cpu_name(), getattr(config, "CPU_FEATURES", None)
    if name == binding.get_host_cpu_name():
        found = dict(binding.get_host_cpu_features())
    else:  # another CPU by NUMBA_CPU_NAME: what it has cannot be looked up, and only the oldest lack AVX2
        found = {"avx2": name != "generic" and not name.startswith("x86-64")}
    found |= {feature[1:]: feature[0] == "+" for feature in (features or "").split(",") if feature}
    if found.get("avx512f"):
        return make_tile(4, 4, 16)
    if found.get("avx2"):  # 16 registers: 4 x 3 spills, and runs at half the speed
        return make_tile(2, 6, 8)
    return make_tile(4, 4, 4) if binding.get_default_triple().startswith(("aarch64", "arm64")) else make_tile(2, 4, 4)


def _shape_of(tile) -> tuple[int, int, int]:
    return tile.dtype.fields["accumulators"].type.shape


@intrinsic
def tile_shape(typingctx, tile):
    """(P, F, L) of a tile as constants."""
    shape = _shape_of(tile)

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, signature.return_type, [ir.Constant(I64, n) for n in shape])

    return types.UniTuple(types.int64, 3)(tile), generate


@intrinsic
def interleave(typingctx, images, starts, offset, buffer, at, tile):
    """Elements `offset` to `offset + L` of L images, each from `starts[lane]`, to `buffer[at:at + L * L]`, element by element."""
    lanes = _shape_of(tile)[2]

    def generate(context, builder, signature, args):
        e = Emitter(context, builder, signature, args, lanes)
        source, starts_, offset_, target = e.data(0), e.data(1), args[2], e.at(e.data(3), args[4])
        element = source.type.pointee if hasattr(source.type, "pointee") else context.get_value_type(images.dtype)
        vectors = []
        for lane in range(lanes):
            start = builder.load(e.at(starts_, lane))
            vectors.append(e.load(e.at(source, start, offset_), element, align=images.dtype.bitwidth // 8))
        for i, vector in enumerate(e.transpose(vectors)):
            e.store(vector if element == F32 else builder.uitofp(vector, e.vector), e.at(target, i * lanes))
        return context.get_dummy_value()

    return types.void(images, starts, offset, buffer, at, tile), generate


@intrinsic
def deinterleave(typingctx, buffer, at, out, starts, offset, n_lanes, tile):
    """`buffer[at:at + L * L]` to elements `offset` to `offset + L` of the first `n_lanes` images, each from `starts[lane]`.

    Takes 5 cycles a vector on a Zen 4, and 10 where images are a multiple of 4 KiB apart and fall into one set of the cache.
    Transposing in quarters of a register instead of by perfect shuffles gained nothing; stores that bypass the cache gained 2 % of
    a small layer, which whoever reads the rows next pays back.
    """
    lanes = _shape_of(tile)[2]

    def generate(context, builder, signature, args):
        e = Emitter(context, builder, signature, args, lanes)
        source, out_, starts_ = e.at(e.data(0), args[1]), e.data(2), e.data(3)
        for lane, vector in enumerate(e.transpose([e.load(e.at(source, i * lanes)) for i in range(lanes)])):
            with builder.if_then(builder.icmp_signed(">", args[5], e.int(lane))):
                e.store(vector, e.at(out_, builder.load(e.at(starts_, lane)), args[4]))
        return context.get_dummy_value()

    return types.void(buffer, at, out, starts, offset, n_lanes, tile), generate


@intrinsic
def copy(typingctx, source, start, target, at, count):
    """`source[start : start + count]`, uint8 or float32, to `target[at : at + count]`, float32.

    A loop in numba asks of each index whether it is negative, and so moves one number at a time: slower than to interleave (measured).
    """

    def generate(context, builder, signature, args):
        e = Emitter(context, builder, signature, args, 1)
        source_, target_ = e.at(e.data(0), args[1]), e.at(e.data(2), args[3])
        with cgutils.for_range(builder, args[4]) as loop:
            value = builder.load(e.at(source_, loop.index))
            builder.store(value if source.dtype == target.dtype else builder.uitofp(value, F32), e.at(target_, loop.index))
        return context.get_dummy_value()

    return types.void(source, start, target, at, count), generate


@intrinsic
def inverse_deviations(typingctx, images, buffer, taps, places, norms, epsilon, by_filter, tile):
    """1 / sqrt(variance + epsilon) of the windows at P positions, rounded to float32: P L numbers to `buffer[norms:]`.

    With d the differences to a window's first number and n taps, in float64 and in the order of the taps,
    variance = max(n sum d^2 - (sum d)^2, 0) / n^2: exact for bytes but for the quotient, and 0 where all numbers are equal. NaN stays.

    Parameters
    ----------
    images, buffer : (m,) float32
    taps, places, by_filter
        As of `convolve`; by filter the L numbers of a position are one.
    norms : int64
    epsilon : float64
    """
    n_positions, _, lanes = _shape_of(tile)

    def generate(context, builder, sig, args):
        b = builder
        n_taps = context.make_array(sig.args[2])(context, b, args[2]).nitems
        both = Emitter(context, builder, sig, args, lanes)
        images_, buffer_, taps_, places_ = (both.data(i) for i in range(4))
        targets = [both.at(buffer_, args[4], p * lanes) for p in range(n_positions)]

        def deviations(e):
            """With vectors of images, or of one number."""
            wide = ir.VectorType(F64, e.lanes)
            zero, one = e.constant(0.0, wide), e.constant(1.0, wide)

            def load(pixel, tap):
                return b.fpext(e.load(e.at(pixel, tap)), wide)

            pixels = [e.at(images_, b.load(e.at(places_, p))) for p in range(n_positions)]
            firsts = [load(pixel, b.load(taps_)) for pixel in pixels]
            sums = [[cgutils.alloca_once_value(b, zero) for _ in range(2)] for _ in pixels]
            with cgutils.for_range(b, n_taps) as loop:
                tap = b.load(e.at(taps_, loop.index))
                for pixel, first, (total, squares) in zip(pixels, firsts, sums):
                    value = b.fsub(load(pixel, tap), first)
                    b.store(b.fadd(b.load(total), value), total)
                    b.store(b.fadd(b.load(squares), b.fmul(value, value)), squares)
            count, shift = e.splat(b.sitofp(n_taps, F64), wide), e.splat(args[5], wide)
            for target, (total, squares) in zip(targets, sums):
                total = b.load(total)
                value = b.fsub(b.fmul(count, b.load(squares)), b.fmul(total, total))
                value = b.select(b.fcmp_ordered(">", zero, value), zero, value)
                variance = b.fdiv(value, b.fmul(count, count))
                inverse = b.fptrunc(b.fdiv(one, e.call("sqrt", b.fadd(variance, shift))), e.vector)
                if e.lanes == 1:
                    inverse = both.splat(b.extract_element(inverse, ir.Constant(I32, 0)))
                both.store(inverse, target)

        with b.if_else(args[6]) as (filters, images):
            with filters:
                deviations(Emitter(context, builder, sig, args, 1))
            with images:
                deviations(both)
        return context.get_dummy_value()

    return types.void(images, buffer, taps, places, norms, epsilon, by_filter, tile), generate


@intrinsic
def convolve(
    typingctx, images, buffer, out, taps, places, scales, ats, n_vectors, split, activation, threshold, pool, by_filter, epsilon, tile
):
    """One tile: convolve P positions by F vectors, activate, and pool into the cells.

    A vector holds one filter for L images, whose pixels are interleaved; or, `by_filter`, L filters for one image as it is.

    Parameters
    ----------
    images, buffer, out : (m,) float32
        Of pixels, of filters and bias, of cells; any of them may be one array. The other integers are offsets into them.
    taps : (n_taps,) int64
        From a position's first pixel to the pixel of each tap, in order.
    places : (4 P,) int64
        First pixel of each position; its cell; whether it is the first of its cell; in the last P entries, whether all P lie in
        one cell (entry 0) and the number of positions that count (entry 1).
    scales : (P,) float32
        What the cell is multiplied by after the position is added.
    ats : tuple of int64
        Weights, bias and cells of the tile's first filter, L floats of `buffer` where what does not count is written, and what
        `inverse_deviations` left; weights are (n_taps, F) or, by filter, (n_taps, F L); the cell of position p begins at
        `cells + places[P + p]`.
    n_vectors : int64
        Vectors of the tile that count.
    split : int64
        From a filter's cell to that of its negative part.
    by_filter : boolean
    epsilon : None or float64
        If not None, sums start at zero, are multiplied by the inverse deviations of their windows, and then the bias is added. The type
        alone decides, so that who wants none of it runs the code without: a flag took 1 % of a layer of 8 filters 3 x 3.
    activation, pool : int64
        Codes.
    threshold : float32
    """
    n_positions, n_wide, lanes = _shape_of(tile)
    normed = epsilon != types.none
    flags = (activation, threshold, pool, by_filter, epsilon)
    signature = types.void(images, buffer, out, taps, places, scales, ats, n_vectors, split, *flags, tile)

    def generate(context, builder, sig, args):
        e, b = Emitter(context, builder, sig, args, lanes), builder
        images_, buffer_, out_, taps_, places_, scales_ = (e.data(i) for i in range(6))
        weights_, bias_, cells_, spare_, norms_ = cgutils.unpack_tuple(builder, args[6])
        n_vectors_, split_, activation_, threshold_, pool_, by_filter_ = args[7:13]
        positions, wide = range(n_positions), range(n_wide)
        # mem2reg turns these into registers
        acc = [[cgutils.alloca_once(b, e.vector) for _ in wide] for _ in positions]

        pixels = [e.at(images_, b.load(e.at(places_, p))) for p in positions]
        n_taps = context.make_array(sig.args[3])(context, b, args[3]).nitems

        def sums(load_pixel, load_weight, size):
            """Run over the taps; a weight takes `size` floats."""
            for f in wide:
                start = e.constant(0.0) if normed else load_weight(e.at(buffer_, bias_, f * size))
                for p in positions:
                    b.store(start, acc[p][f])
            with cgutils.for_range(b, n_taps) as loop:
                tap = b.load(e.at(taps_, loop.index))
                loaded = [load_pixel(e.at(pixel, tap)) for pixel in pixels]
                here = e.at(buffer_, weights_, b.mul(loop.index, e.int(n_wide * size)))
                for f in wide:
                    weight = load_weight(e.at(here, f * size))
                    for p in positions:
                        b.store(e.call("fma", loaded[p], weight, b.load(acc[p][f])), acc[p][f])
            for p in positions if normed else ():
                norm = e.load(e.at(buffer_, norms_, p * lanes))
                for f in wide:
                    b.store(e.call("fma", b.load(acc[p][f]), norm, load_weight(e.at(buffer_, bias_, f * size))), acc[p][f])

        def one_number(pointer):
            return e.splat(b.load(pointer))

        with b.if_else(by_filter_) as (filters, images):
            with filters:
                sums(one_number, e.load, lanes)
            with images:
                sums(e.load, one_number, 1)

        zero, one, minus_one = e.constant(0.0), e.constant(1.0), e.constant(-1.0)
        shift_ = e.splat(threshold_)
        is_max = e.is_code(pool_, POOLS["max"])
        empty = b.select(is_max, e.constant(float("-inf")), zero)

        def positive(value):
            """max(value, 0) that lets NaN through: an ordered comparison is false for it."""
            return b.select(b.fcmp_ordered(">", zero, value), zero, value)

        def rectified(value):
            return positive(b.fsub(value, shift_))

        def clipped(value):
            value = b.select(b.fcmp_ordered(">", minus_one, value), minus_one, value)
            return b.select(b.fcmp_ordered("<", one, value), one, value)

        def larger(old, new):
            return b.select(b.or_(b.fcmp_ordered(">", new, old), b.fcmp_unordered("uno", new, new)), new, old)

        def pooled(activate, shift=0):
            """Combine the activated sums with the cells `shift` further on."""

            def cell(p, f):
                return e.at(out_, cells_, b.load(e.at(places_, n_positions + p)), shift, f * lanes)

            def counts(f):
                return b.icmp_signed(">", n_vectors_, e.int(f))

            def before(p, pointer):
                first = b.icmp_signed("!=", b.load(e.at(places_, 2 * n_positions + p)), e.int(0))
                return b.select(first, empty, e.load(pointer))

            def one_cell(combine):
                scale = e.splat(b.load(e.at(scales_, n_positions - 1)))
                for f in wide:
                    pointer = b.select(counts(f), cell(0, f), e.at(buffer_, spare_))
                    total = before(0, pointer)
                    for p in positions:
                        total = combine(total, activate(b.load(acc[p][f])))
                    e.store(b.fmul(total, scale), pointer)

            def many_cells(combine):
                n_valid = b.load(e.at(places_, 3 * n_positions + 1))
                for p in positions:
                    scale = e.splat(b.load(e.at(scales_, p)))
                    valid = b.icmp_signed(">", n_valid, e.int(p))
                    for f in wide:
                        pointer = b.select(b.and_(valid, counts(f)), cell(p, f), e.at(buffer_, spare_))
                        e.store(b.fmul(combine(before(p, pointer), activate(b.load(acc[p][f]))), scale), pointer)

            with b.if_else(b.icmp_signed("!=", b.load(e.at(places_, 3 * n_positions)), e.int(0))) as (together, apart):
                for branch, write in ((together, one_cell), (apart, many_cells)):
                    with branch, b.if_else(is_max) as (largest, mean):
                        with largest:
                            write(larger)
                        with mean:
                            write(b.fadd)

        with b.if_else(e.is_code(activation_, ACTIVATIONS["clip"])) as (clip, other):
            with clip:
                pooled(clipped)
            with other, b.if_else(e.is_code(activation_, ACTIVATIONS["abs"])) as (absolute, plain):
                with absolute:
                    pooled(lambda value: rectified(e.call("fabs", value)))
                with plain:
                    # subtracting zero changes nothing, and is worth 2 % of the time of a small filter
                    with b.if_else(b.fcmp_ordered("==", threshold_, ir.Constant(F32, 0.0))) as (none, some):
                        with none:
                            pooled(positive)
                        with some:
                            pooled(rectified)
                    with b.if_then(e.is_code(activation_, ACTIVATIONS["split"])):
                        pooled(lambda value: rectified(b.fneg(value)), split_)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def multiply_adds(typingctx, n_steps, numbers, tile):
    """P F chains r = r * factor + summand of L lanes, `n_steps` links each, in registers.

    Parameters
    ----------
    n_steps : int64
    numbers : (P F + 2,) float32, P F + 2 >= L
        Start of each chain, then factor and summand; the sum of all ends goes to the front.
    """
    n_positions, n_wide, lanes = _shape_of(tile)

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder, signature, args, lanes), builder
        numbers_ = e.data(1)
        chains = [cgutils.alloca_once(b, e.vector) for _ in range(n_positions * n_wide)]
        for i, chain in enumerate(chains):
            b.store(e.splat(b.load(e.at(numbers_, i))), chain)
        factor, summand = (e.splat(b.load(e.at(numbers_, len(chains) + i))) for i in range(2))
        with cgutils.for_range(b, args[0]):
            for chain in chains:
                b.store(e.call("fma", b.load(chain), factor, summand), chain)
        total = b.load(chains[0])
        for chain in chains[1:]:
            total = b.fadd(total, b.load(chain))
        e.store(total, numbers_)
        return context.get_dummy_value()

    return types.void(n_steps, numbers, tile), generate
