"""What stands between an image and an image tower: resize, crop or pad, normalise; on device and in batches.

A resize with the antialiasing of Pillow and torchvision is linear and separable, so it is two small matrix products
whose matrices depend on the sizes only. Where the original scorer goes through 8-bit images, `eight_bit` computes
what Pillow computes, bit for bit: its weights are whole numbers (22 binary places), and a pass rounds back to 8 bit.
Where the original resizes floats, nothing is rounded or clipped and bicubic overshoot is kept. (Recent Pillow takes
the vertical pass first where that one shrinks much more; resizes that keep the aspect ratio, which are all there are
here, do not.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marble_jax.errors import InputError, one_of
from marble_jax.validation import Factor, Offset, Positive, Side, short, validated

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PIL_FILTERS = {2: "bilinear", 3: "bicubic"}


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Returns Keys' cubic with a = -1/2, the constant of Pillow and of torch's antialiased resize."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    # Two polynomials that meet at 1; the second reaches 0 at 2, where the kernel ends.
    beyond_one = np.where(x < 2, far, 0)
    return np.where(x < 1, near, beyond_one)


FILTERS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}
PLACES = 22
"""Binary places of Pillow's weights on 8-bit images: 32 less 8 for the pixel and 2 for overshoot."""
DIGIT = 8
"""Bits of a digit of such a weight: a digit times a pixel, summed over up to 256 taps, is exact in float32."""
CROPS: dict[str, Callable[[int], int]] = {
    "floor": lambda spare: spare // 2,
    "round": lambda spare: int(round(spare / 2)),
}
"""Margin before a centred crop: transformers rounds half a pixel down, torchvision to even."""


def _weights(size_in: int, size_out: int, method: str) -> np.ndarray:
    """Returns `resize_matrix` in float64."""
    one_of("resize method", method, FILTERS)
    kernel, radius = FILTERS[method]
    scale = size_in / size_out
    # A kernel as wide as an output pixel when scaling down, which is the antialiasing; its own width otherwise.
    stretch = max(scale, 1.0)
    reach = radius * stretch
    centres = (np.arange(size_out) + 0.5) * scale
    first = (centres - reach + 0.5).astype(int)
    last = (centres + reach + 0.5).astype(int)
    first, last = np.maximum(first, 0), np.minimum(last, size_in)
    taps = np.arange(size_in)
    # [size_out, size_in]: how far each tap is from each centre.
    distances = taps[None] + 0.5 - centres[:, None]
    weights = kernel(distances / stretch)
    # Taps are cut off by whole pixels, as Pillow does, and what remains is made to sum to 1.
    within = (taps >= first[:, None]) & (taps < last[:, None])
    weights = np.where(within, weights, 0)
    return weights / weights.sum(1, keepdims=True)


@functools.lru_cache(maxsize=128)
def resize_matrix(size_in: int, size_out: int, method: str) -> np.ndarray:
    """Returns float32 [size_out, size_in]: one axis of an antialiased resize; every row sums to 1.

    The kernel is stretched by the reduction factor when scaling down and kept at its own width when scaling up.
    Source: the coefficient rule of Pillow's `Resample.c`, shared by torch's `interpolate(antialias=True)`.
    """
    return _weights(size_in, size_out, method).astype(np.float32)


@functools.lru_cache(maxsize=128)
def _digits(size_in: int, size_out: int, method: str) -> np.ndarray:
    """Returns float32 [3, size_out, size_in]: Pillow's whole-number weights in digits of DIGIT bits, lowest first."""
    weights = _weights(size_in, size_out, method) * 2**PLACES
    # Rounded half away from zero, as a cast in C after adding the half.
    half = np.copysign(0.5, weights)
    whole = np.trunc(weights + half).astype(np.int64)
    low_bits = 2**DIGIT - 1
    low = whole & low_bits
    middle = whole >> DIGIT & low_bits
    # The highest digit keeps the sign.
    high = whole >> 2 * DIGIT
    return np.stack([low, middle, high]).astype(np.float32)


def _pass(pixels: jax.Array, digits: np.ndarray, equation: str) -> jax.Array:
    """Returns one axis of Pillow's resize: whole numbers in [0, 255], held in float32, to the same."""
    # Half of the last place, so that the shift below rounds to nearest.
    total = jnp.int32(1 << PLACES - 1)
    for place, digit in enumerate(digits):
        # Digit by digit: only such small products sum exactly in float32, which an accelerator multiplies.
        part = jnp.einsum(equation, pixels, digit, precision="highest").astype(jnp.int32)
        total = total + (part << DIGIT * place)
    return jnp.clip(total >> PLACES, 0, 255).astype(jnp.float32)


def resize(
    images: jax.Array, height: int, width: int, method: str, eight_bit: bool = False
) -> jax.Array:
    """Resizes images with antialiasing.

    Args:
      images: float32 [N, H, W, 3].
      height: rows of the result.
      width: columns of the result.
      method: "bilinear" or "bicubic".
      eight_bit: the images have 256 levels, and so has the result: Pillow's resize, bit for bit.

    Returns:
      float32 [N, height, width, 3]; may leave [0, 1] for "bicubic" unless `eight_bit`.
    """
    if eight_bit:
        images = jnp.round(images * 255)
    # Columns first, then rows, as Pillow: with rounding in between the order shows.
    images = _resize_axis(images, 2, width, method, eight_bit)
    images = _resize_axis(images, 1, height, method, eight_bit)
    if eight_bit:
        return images / 255
    return images


_EQUATIONS = {1: "nhwc,uh->nuwc", 2: "nhwc,vw->nhvc"}
"""One axis of images [N, H, W, 3] times a resize matrix [out, in]."""


def _resize_axis(
    images: jax.Array, axis: int, size: int, method: str, eight_bit: bool
) -> jax.Array:
    size_in = images.shape[axis]
    if size_in == size:
        return images
    if eight_bit:
        return _pass(images, _digits(size_in, size, method), _EQUATIONS[axis])
    matrix = resize_matrix(size_in, size, method)
    return jnp.einsum(_EQUATIONS[axis], images, matrix, precision="highest")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From images in [0, 1] to the pixels an image tower takes; call it on float32 [N, H, W, 3].

    Attributes:
      size: edge of the square result, in pixels.
      fit: "shortest" scales the shorter edge to `resize_to` and crops the centre; "stretch" scales both edges to it
        and crops; "longest" scales the longer edge to `size` and pads the rest with zeros before normalising.
      method: "bicubic" or "bilinear", antialiased.
      eight_bit: go through 256 levels, as scorers that take 8-bit images do.
      resize_to: edge for "shortest" and "stretch"; None means `size`.
      crop: "floor" or "round", how an odd margin of these is halved.
      mean: per channel, subtracted.
      std: per channel, divided by.
    """

    size: int
    fit: str = "shortest"
    method: str = "bicubic"
    eight_bit: bool = True
    resize_to: int | None = None
    crop: str = "floor"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        one_of("fit", self.fit, ("shortest", "stretch", "longest"))
        one_of("resize method", self.method, FILTERS)
        one_of("crop", self.crop, CROPS)
        if self.resize_to is not None and self.resize_to < self.size:
            raise InputError(
                f"resize_to: expected at least the crop size {self.size}; received {self.resize_to}"
            )

    def __call__(self, images: jax.Array) -> jax.Array:
        images = jnp.asarray(images, jnp.float32)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"images: expected [N, H, W, 3]; received {list(images.shape)}")
        if self.eight_bit:
            images = jnp.clip(jnp.round(images * 255), 0, 255) / 255
        height, width, top, left = self.frame(images.shape[1], images.shape[2])
        images = resize(images, height, width, self.method, self.eight_bit)
        if self.fit != "longest":
            images = images[:, top : top + self.size, left : left + self.size]
        else:
            below, right = self.size - height - top, self.size - width - left
            images = jnp.pad(images, ((0, 0), (top, below), (left, right), (0, 0)))
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return (images - mean) / std

    def on_host(self, image: np.ndarray) -> np.ndarray:
        """Returns pixels float32 [size, size, 3] of one image uint8 [H, W, 3], by Pillow: for cut-outs of many sizes.

        Raises:
          InputError: a preprocessing other than 8-bit, or with "longest".
        """
        from PIL import Image

        if not self.eight_bit or self.fit == "longest":
            raise InputError(
                f"preprocessing on the host: expected 8-bit and 'shortest' or 'stretch'; received {self}"
            )
        height, width, top, left = self.frame(image.shape[0], image.shape[1])
        resampling = Image.Resampling[self.method.upper()]
        resized = Image.fromarray(image).resize((width, height), resampling)
        pixels: np.ndarray = np.asarray(resized, np.float32)
        pixels = pixels[top : top + self.size, left : left + self.size] / 255
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels - mean) / std

    def frame(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Returns what becomes of an image of `rows` x `columns`: resized height and width, and where the square lies.

        The last two are the rows and columns cut off before the crop, or added before the image for "longest".
        """
        if self.fit != "longest":
            edge, short = self.resize_to or self.size, min(rows, columns)
            height, width = edge * rows // short, edge * columns // short
            if self.fit == "stretch":
                height, width = edge, edge
            margin = CROPS[self.crop]
            return height, width, margin(height - self.size), margin(width - self.size)
        factor = self.size / max(rows, columns)
        height, width = round(rows * factor), round(columns * factor)
        return height, width, (self.size - height) // 2, (self.size - width) // 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], size: int, **overrides: Any) -> Preprocess:
        """Returns the preprocessing that a Hugging Face `preprocessor_config.json` describes.

        Args:
          config: the parsed file; what it leaves out takes CLIP's value.
          size: the tower's input edge, which the crop must equal.
          **overrides: fields to replace, for scorers that depart from their own model's file.

        Raises:
          InputError: settings of another kind of images, another filter than bilinear or bicubic, another crop, or a
            step that is switched off.
        """
        _check_switches(config)
        resample = config.get("resample", 3)
        # By type: 3.0 and true are equal to numbers.
        if type(resample) is not int or resample not in PIL_FILTERS:
            raise InputError(
                f"preprocessor_config.json resample: expected 2 (bilinear) or 3 (bicubic); received "
                f"{short(resample)}"
            )
        edge, fit = _edge(config.get("size"), "size", size)
        crop, _ = _edge(config.get("crop_size"), "crop_size", size)
        # Without a crop the resized edge is the tower's input.
        if config.get("do_center_crop") is False:
            crop = edge
        if crop != size:
            raise InputError(
                f"preprocessor_config.json crop_size: expected the image tower's {size}; received {crop}"
            )
        fields: dict[str, Any] = dict(
            size=size,
            fit=fit,
            resize_to=edge,
            method=PIL_FILTERS[resample],
            mean=_channels(config, "image_mean", CLIP_MEAN, Offset),
            std=_channels(config, "image_std", CLIP_STD, Factor),
        )
        return cls(**{**fields, **overrides})


def _edge(size: Any, key: str, default: int) -> tuple[int, str]:
    """Returns an edge in pixels, and how an image is fitted to it, from a number or from an object.

    Args:
      size: a number, or an object with `shortest_edge`, or with `height` and `width` of a square; None for nothing.
      key: of the setting, for the message.
      default: edge where nothing is said.

    Raises:
      InputError: no number of pixels, a height and a width that differ, or another way of fitting.
    """
    what = f"preprocessor_config.json {key}"
    fit = "shortest"
    if isinstance(size, Mapping):
        named = {name: value for name, value in size.items() if value is not None}
        height = named.get("height", named.get("width"))
        others = set(named) - {"shortest_edge", "height", "width"}
        if others or named.get("width", height) != height:
            raise InputError(
                f"{what}: expected shortest_edge, or height and width of a square; received "
                f"{short(dict(size))}"
            )
        # As in transformers, the shortest edge comes first.
        if "shortest_edge" not in named and height is not None:
            fit = "stretch"
        size = named.get("shortest_edge", height)
    return validated(Side, default if size is None else size, what), fit


def _channels(
    config: Mapping[str, Any], key: str, default: tuple[float, float, float], kind: Any
) -> tuple[float, float, float]:
    """Three numbers of a setting, one a channel."""
    value = config.get(key)
    if value is None:
        return default
    return validated(tuple[kind, kind, kind], value, f"preprocessor_config.json {key}")


def _check_switches(config: Mapping[str, Any]) -> None:
    """Raises InputError where a step that is always taken here is switched off, or another scale is asked for."""
    crop = config.get("do_center_crop")
    if crop is not None and not isinstance(crop, bool):
        raise InputError(
            f"preprocessor_config.json do_center_crop: expected true or false; received {short(crop)}"
        )
    for key in ("image_processor_type", "feature_extractor_type"):
        kind = config.get(key, "CLIP")
        # Other classes mean other things by the same names.
        if not isinstance(kind, str) or "CLIP" not in kind:
            raise InputError(
                f"preprocessor_config.json {key}: expected one of CLIP, such as CLIPImageProcessor; received "
                f"{short(kind)}"
            )
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(key, True) is not True and config.get(key) is not None:
            raise InputError(
                f"preprocessor_config.json {key}: expected true; received {short(config[key])}"
            )
    factor = config.get("rescale_factor")
    if factor is not None and abs(validated(Positive, factor, "rescale_factor") * 255 - 1) > 1e-3:
        raise InputError(
            f"preprocessor_config.json rescale_factor: expected 1/255; received {short(factor)}"
        )


prepare = jax.jit(lambda images, preprocess: preprocess(images), static_argnames="preprocess")
"""`preprocess(images)`, compiled apart from the tower behind it, which then does not depend on the images' size."""
