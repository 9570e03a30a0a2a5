"""The step from a chunk of images to a chunk of feature rows.

Nothing here is trained: filters are drawn at random (section 3 of Lee & Lee 2017), or are windows of the data, and only scaled, so that
responses are of order one on the data at hand.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from streamcnn import preprocess
from streamcnn.errors import DataError, FilterBankError, warn
from streamcnn.filters import random_filter_bank
from streamcnn.kernels import ACTIVATIONS, POOLS, empty_lines
from streamcnn.layers import ConvLayer, Geometry, is_int, layer_from_dict, layer_to_dict, resolve_layers
from streamcnn.patches import draw_patches, mean_variance

logger = logging.getLogger("streamcnn")

CALIBRATION_BYTES = 1 << 24
# of the mean variance of windows, added to the variance of each by which contrast is normalised: of CIFAR-10 130
NORM_SHARE = 0.1
# images that filters are scaled on at most, and that patches are drawn from
SCALE_IMAGES, PATCH_IMAGES = 256, 4096
# multiplications with additions of all images that filters are scaled on, where the first DRAW_CHUNK take less: half a minute
_SCALE_WORK = 1 << 41
# images convolved at a time to scale the filters
DRAW_CHUNK = 16
# of a network that is loaded: values of an image (512 MiB of float32), and padding, whose sum with a side is held in arrays
_MOST_VALUES, _MOST_PADDING = 1 << 27, 1 << 12
# a bank is drawn a little below its threshold: scaling to float32 may move a similarity by a few 2**-24
_ROUNDING = 1 - 1e-6


class Network:
    """Stacked layers with their filters: what turns images into feature rows.

    Parameters
    ----------
    geometry : list of Geometry
    steps : tuple of str
        Preprocessing, see `preprocess.PREPROCESS`.
    filters : list of ndarray of shape (n_filters, height, width, channels), float32
        As applied, scale and gain included.
    biases : list of ndarray of shape (n_filters,), float32
        Likewise; zeros but for patches.
    mirror : bool
        Rows are the mean of those of an image and of its mirror image, left and right swapped: so the two are the same to whatever
        reads the rows. With a bank that holds each filter's mirror image, a linear SVM on such rows is the one that training on all
        images and their mirror images gives (its objective is convex and has the symmetry, so its minimum has it), for rows half as
        many.
    """

    def __init__(
        self,
        geometry: list[Geometry],
        steps: tuple[str, ...],
        filters: list[np.ndarray] | None = None,
        biases: list[np.ndarray] | None = None,
        mirror: bool = False,
    ):
        self.geometry, self.steps, self.mirror = geometry, steps, mirror
        self.filters, self.biases = filters or [], biases or []
        self.info: list[dict[str, Any]] = []

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.geometry[0].in_shape

    @property
    def n_features(self) -> int:
        return int(np.prod(self.geometry[-1].out_shape))

    @property
    def multiply_adds(self) -> int:
        """Of one image, in all layers."""
        return sum(g.multiply_adds for g in self.geometry) * (2 if self.mirror else 1)

    def buffer_shapes(self, chunk_size: int, n_threads: int, kernels) -> dict[str, tuple[int, ...]]:
        """Shapes of every float32 buffer `transform` uses for chunks of at most `chunk_size` images."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.steps:
            shapes["preprocessed images"] = (chunk_size, *self.image_shape)
        for number in range(1, len(self.geometry) + 1):
            shapes[f"layer {number} output"] = self._output_shape(number, chunk_size, kernels)
        if self.mirror:
            shapes["mirror images"] = (chunk_size, *self.image_shape)
            shapes["rows of mirror images"] = shapes[f"layer {len(self.geometry)} output"]
        scratch = [
            kernels.conv_scratch(g.in_shape, g.filters_shape, g.out_shape, g.layer.padding, g.layer.patch_norm) for g in self.geometry
        ]
        scratch.append(preprocess.scratch(self.steps, self.image_shape, kernels))
        shapes["kernel scratch"] = (n_threads, max(scratch))
        return shapes

    def _output_shape(self, number: int, n: int, kernels) -> tuple[int, ...]:
        """Shape of what layer `number`, from 1, makes of `n` images: interleaved where it and the next gain by that.

        Never larger for fewer images, as `conv_lanes` promises.
        """
        g, *following = self.geometry[number - 1 : number + 1]
        lanes = min(kernels.conv_lanes(n, each.layer.n_filters) for each in (g, *following)) if following else 1
        return (-(-n // lanes), *g.out_shape, lanes) if lanes > 1 else (n, *g.out_shape)

    def buffer_bytes(self, chunk_size: int, n_threads: int, kernels) -> dict[str, int]:
        """Bytes of each of those buffers."""
        return {name: 4 * int(np.prod(shape)) for name, shape in self.buffer_shapes(chunk_size, n_threads, kernels).items()}

    def draw(self, sample: np.ndarray, seed: int, n_threads: int, kernels) -> None:
        """Draw the filters of every layer and scale them on a sample of images.

        The scale of a layer is 1 / mean |w * x|, of all positions and all its filters, normalisation and bias included, so that
        responses are of order one whatever the range of the pixels; over the sample, or at most `SCALE_IMAGES` spread evenly over it, of
        large images with many filters fewer.

        Parameters
        ----------
        sample : ndarray of shape (m, height, width, channels), uint8 or float32
        seed : int
        """
        step = min(DRAW_CHUNK, len(sample))
        self.geometry, self.filters, self.biases = list(self.geometry), [], []
        for number, g in enumerate(self.geometry):
            n_scaled = min(SCALE_IMAGES, max(DRAW_CHUNK, _SCALE_WORK // g.multiply_adds))
            scaled_on = sample[:: -(-len(sample) // n_scaled)]
            below = Network(self.geometry[:number], self.steps, self.filters, self.biases) if number else None
            buffers = (below or self).allocate(step, n_threads, kernels) if number or self.steps else {}

            def inputs(images: np.ndarray, below=below, buffers=buffers, shape=g.in_shape) -> Iterator[np.ndarray]:
                """What the layer gets of the images, some at a time."""
                for start in range(0, len(images), step):
                    part = np.ascontiguousarray(images[start : start + step])
                    if below is None:
                        yield self._preprocessed(part, buffers, kernels)
                    else:
                        yield below.transform(part, buffers, kernels).reshape(-1, *shape)

            if g.layer.patch_norm == "auto":
                contrast = mean_variance(inputs(sample), len(sample), g.kernel, seed)
                if min(g.kernel) > 1 and contrast > 0:
                    layer = replace(g.layer, patch_norm=NORM_SHARE * contrast)
                else:  # `whitening` too is then in the unit of the windows
                    layer = replace(g.layer, patch_norm=None, whitening=g.layer.whitening * (contrast or 1.0))
                g = replace(g, layer=layer)
                self.geometry[number] = g
            if g.layer.filters == "patches":
                bank, bias = self._draw_patches(number, g, seed, inputs(sample), len(sample))
            else:
                bank, bias = self._draw_bank(number, g, seed), np.zeros(g.layer.n_filters, np.float32)
            # the fused kernel itself averages |w * x|: one window over the whole map
            probe, norm = np.empty((step, 1, 1, g.layer.n_filters), np.float32), g.layer.patch_norm
            scratch_size = kernels.conv_scratch(g.in_shape, bank.shape, (1, 1, len(bank)), g.layer.padding, norm)
            scratch = np.empty((n_threads, scratch_size), np.float32)
            rows, cols = ((s + 2 * g.layer.padding - k) // g.layer.stride + 1 for s, k in zip(g.in_shape, g.kernel))
            total = 0.0
            for images in inputs(scaled_on):
                kernels.conv_layer(
                    *(images, bank, bias, g.layer.stride, g.layer.padding),
                    *(ACTIVATIONS["abs"], 0.0, POOLS["mean"], np.array([0, rows]), np.array([0, cols])),
                    *(scratch, probe[: len(images)], norm),
                )
                total += float(probe[: len(images)].sum(dtype=np.float64))
            mean = total / (len(scaled_on) * len(bank))
            scale = g.layer.gain / mean if mean > 0 and np.isfinite(mean) else g.layer.gain
            self.filters.append((bank * scale).astype(np.float32))
            self.biases.append((bias * scale).astype(np.float32))
            self.info[-1]["scale"] = scale

    def _draw_patches(
        self, number: int, g: Geometry, seed: int, maps: Iterator[np.ndarray], n_images: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Filters and bias of windows of the layer's input, float32."""
        layer = g.layer
        assert not isinstance(layer.patch_norm, str)  # `draw` has made it a number
        # below 2**63: one is added to it
        hashed = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        automatic = layer.kernel_size == "auto"
        try:
            bank, bias, info = draw_patches(
                *(maps, n_images, g.filters_shape, layer.patch_norm, layer.whitening, hashed, automatic, layer.brightness)
            )
        except FilterBankError as error:
            raise FilterBankError(f"layer {number + 1}: {error}") from None
        bank, bias = bank.astype(np.float32), bias.astype(np.float32)
        missing = layer.n_filters - len(bank)
        if missing and g.kernel != (1, 1):  # single pixels have no contrast
            n_windows = len(bank) - (layer.brightness and layer.patch_norm is not None)
            drawn = "all" if missing == layer.n_filters else f"the other {missing}"
            warn(
                f"layer {number + 1}: images have {n_windows} different windows of {g.kernel[0]} x {g.kernel[1]} that are not (nearly) "
                f"constant, and {layer.n_filters} filters are to be made of them: {drawn} are drawn at random; with more or "
                f"larger images there are more windows"
            )
        if missing:
            # where there is no contrast to be normalised, brightness is all there is
            random = replace(g, layer=replace(layer, n_filters=missing, filters="random"))
            others = self._draw_bank(number, random, seed, zero_mean=layer.patch_norm is not None)
            bank, bias = np.concatenate([bank, others]), np.concatenate([bias, np.zeros(missing, np.float32)])
        self.info = [*self.info[:number], info | {"n_random": missing}]
        return bank, bias

    def _draw_bank(self, number: int, g: Geometry, seed: int, zero_mean: bool = True) -> np.ndarray:
        layer = g.layer
        rule = layer.max_similarity if layer.filters == "discriminating" else None
        automatic = layer.kernel_size == "auto" and min(g.kernel) < 5
        # a zero mean discards the brightness, which in a single row or pixel may be all there is
        options: dict[str, Any] = {"zero_mean": zero_mean and min(g.kernel) > 1, "similarity": layer.similarity, "return_info": True}
        if automatic:  # hardly ever to be filled, so not worth a long search
            options["max_candidates"] = max(1000, 10 * layer.n_filters)
        seeds = np.random.SeedSequence([seed, number])
        try:
            threshold = None if rule is None else rule * _ROUNDING
            bank, info = random_filter_bank(
                layer.n_filters, g.kernel, g.in_shape[2], threshold, random_state=np.random.default_rng(seeds), **options
            )
        except FilterBankError as error:
            if not automatic:
                raise FilterBankError(f"layer {number + 1}: {error}") from None
            warn(
                f"layer {number + 1}: images leave room for filters of {g.kernel[0]} x {g.kernel[1]} only, where {layer.n_filters} "
                f"dissimilar ones do not exist: the similarity rule is dropped"
            )
            bank, info = random_filter_bank(
                layer.n_filters, g.kernel, g.in_shape[2], None, random_state=np.random.default_rng(seeds), **options
            )
        self.info = [*self.info[:number], info]
        rate = 100 * info["acceptance_rate"]
        logger.info("layer %d: kept %d of %d candidate filters (%.1f %%)", number + 1, layer.n_filters, info["n_candidates"], rate)
        return bank

    def allocate(self, chunk_size: int, n_threads: int, kernels) -> dict[str, np.ndarray]:
        """The buffers of `buffer_shapes`, to be used again for every chunk."""
        return {name: empty_lines(s) for name, s in self.buffer_shapes(chunk_size, n_threads, kernels).items()}

    def _preprocessed(self, images: np.ndarray, buffers: dict[str, np.ndarray], kernels) -> np.ndarray:
        if not self.steps:
            return images
        out = buffers["preprocessed images"][: len(images)]
        preprocess.apply(self.steps, images, buffers["kernel scratch"], out, kernels)
        return out

    def _output(self, number: int, n: int, buffers: dict[str, np.ndarray], kernels) -> np.ndarray:
        """Where layer `number` writes for `n` images."""
        shape = self._output_shape(number, n, kernels)
        return buffers[f"layer {number} output"].reshape(-1)[: prod(shape)].reshape(shape)

    def transform(self, images: np.ndarray, buffers: dict[str, np.ndarray], kernels) -> np.ndarray:
        """Feature rows (n, n_features) float32 of images (n, height, width, channels): a view of a buffer, valid until the next call."""
        last = buffers[f"layer {len(self.geometry)} output"][: len(images)]
        self._convolve(images, buffers, kernels, last)
        if self.mirror:
            # bytes of a buffer of float32: pixels of either kind fit
            mirrored = buffers["mirror images"].view(images.dtype).reshape(-1)[: images.size].reshape(images.shape)
            np.copyto(mirrored, images[:, :, ::-1])
            other = buffers["rows of mirror images"][: len(images)]
            self._convolve(mirrored, buffers, kernels, other)
            last += other
            last *= np.float32(0.5)
        return last.reshape(len(images), -1)

    def transform_rounded(self, images: np.ndarray, buffers: dict[str, np.ndarray], kernels, out: np.ndarray) -> None:
        """Write feature rows to `out` (n, n_features), float16 or float32, as `round_features` does; same errors."""
        if out.dtype == np.float16 and kernels.WRITES_HALF and not self.mirror:
            _check_range(self._convolve(images, buffers, kernels, out.reshape(-1, *self.geometry[-1].out_shape)), out.dtype)
        else:
            round_features(self.transform(images, buffers, kernels), out)

    def _convolve(self, images: np.ndarray, buffers: dict[str, np.ndarray], kernels, last: np.ndarray) -> bool:
        """All layers, the last one into `last`; what its kernel returns."""
        x, result = self._preprocessed(images, buffers, kernels), True
        for number, (g, filters, bias) in enumerate(zip(self.geometry, self.filters, self.biases), start=1):
            out = last if number == len(self.geometry) else self._output(number, len(images), buffers, kernels)
            result = kernels.conv_layer(
                *(x, filters, bias, g.layer.stride, g.layer.padding),
                *(ACTIVATIONS[g.layer.activation], g.layer.threshold, POOLS[g.layer.pool or "mean"], g.row_edges, g.col_edges),
                *(buffers["kernel scratch"], out, g.layer.patch_norm),
            )
            x = out
        return result

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The filters by name, for saving, and the bias of patches; the rest follows from `describe`."""
        arrays = {f"filters_{number}": filters for number, filters in enumerate(self.filters, start=1)}
        return arrays | {f"bias_{number}": self.biases[number - 1] for number in self._biased()}

    def _biased(self) -> list[int]:
        """Numbers, from 1, of the layers whose bias is not zeros."""
        return [number for number, g in enumerate(self.geometry, start=1) if g.layer.filters == "patches"]

    def describe(self) -> dict[str, Any]:
        """Parameters that rebuild the network together with its arrays (JSON)."""
        layers = [layer_to_dict(g.layer) for g in self.geometry]
        mirror = {"mirror": True} if self.mirror else {}
        return {"image_shape": list(self.image_shape), "steps": list(self.steps), "layers": layers, "info": self.info} | mirror

    @classmethod
    def from_arrays(cls, description: dict[str, Any], arrays: dict[str, np.ndarray]) -> "Network":
        """Rebuild what `describe` and `to_arrays` gave.

        Raises
        ------
        DataError
            When they do not fit together, or describe what no memory could hold.
        """
        try:
            shape, layers = tuple(description["image_shape"]), [layer_from_dict(values) for values in description["layers"]]
            _check_sizes(shape, layers)
            geometry = resolve_layers(layers, shape)
            network = cls(geometry, preprocess.resolve_preprocess(description["steps"]), mirror=description.get("mirror", False) is True)
            network.filters = [arrays[f"filters_{number}"] for number in range(1, len(geometry) + 1)]
            # as many as there are filters in the file, whatever number is declared
            network.biases = [np.zeros(filters.shape[:1], np.float32) for filters in network.filters]
            for number in network._biased():
                network.biases[number - 1] = arrays[f"bias_{number}"]
            network.info = [dict(info) for info in description["info"]]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"a saved network lacks or misstates a part ({error}); train it again") from None
        for g, filters, bias in zip(geometry, network.filters, network.biases):
            for name, array, shape in (("filters", filters, g.filters_shape), ("bias", bias, g.filters_shape[:1])):
                if array.shape != shape or array.dtype != np.float32:
                    raise DataError(f"{name} are {array.shape} {array.dtype}, the layer needs {shape} float32; train it again")
            if math.prod(g.out_shape) > _MOST_VALUES:
                raise DataError(
                    f"a saved network makes {math.prod(g.out_shape)} values of an image, more than {_MOST_VALUES}: train it again"
                )
        if len(arrays) != len(geometry) + len(network._biased()) or len(network.info) != len(geometry):
            raise DataError(f"a saved network of {len(geometry)} layers has {len(arrays)} arrays of filters and bias; train it again")
        return network


def _check_sizes(image_shape: tuple[Any, ...], layers: list[ConvLayer]) -> None:
    """Refuse sizes that would fill the memory before they are compared with the filters, which are as they are in the file."""
    if len(image_shape) != 3 or not all(is_int(side) and side > 0 for side in image_shape) or math.prod(image_shape) > _MOST_VALUES:
        raise DataError(f"image_shape must be three positive whole numbers whose product is at most {_MOST_VALUES}, got {image_shape}")
    for layer in layers:
        layer.check()
        if layer.patch_norm == "auto":
            raise DataError('patch_norm of a saved network must be a number or None, got "auto": train it again')
        if layer.padding > _MOST_PADDING:
            raise DataError(f"padding must be at most {_MOST_PADDING}, got {layer.padding}")


def round_features(rows: np.ndarray, out: np.ndarray) -> None:
    """Write float32 `rows` to `out` in its dtype, float16 or float32; rounding is part of the model.

    Raises
    ------
    DataError
        When a value does not fit (float16 ends at 65,504).
    """
    if out.dtype == np.float16:
        from streamcnn.kernels.half import narrow  # numba is loaded by those who convolve only

        fits = narrow(rows, out)
    else:
        out[:] = rows
        fits = bool(np.isfinite(out).all())
    _check_range(fits, out.dtype)


def _check_range(fits: bool, dtype: np.dtype) -> None:
    if not fits:
        raise DataError(f'features exceed the range of {dtype.name}: choose feature_dtype="float32", or a smaller gain')
