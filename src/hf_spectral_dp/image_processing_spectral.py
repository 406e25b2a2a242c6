"""Images of any kind to the square float batch that the codec takes, and back. NumPy and Pillow only.

An image is cropped to its central square, brought to the target side by area averaging (which is what the orthonormal
Haar low band computes, so a large image and its pre-shrunk copy give the same coarse tokens), padded and scaled to
[-1, 1]. Every step depends on that one image alone: nothing is estimated over the data set, so preprocessing never
mixes two privacy units.
"""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401  (diffusers looks this name up here)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
WHITE_LEVEL = 65535  # of images that use all of their 16 bits
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's convert("L")


class SpectralImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values`, float32 (B, num_channels, image_size, image_size) in [-1, 1].

    Args:
        image_size: side of the result in pixels, `SpectralConfig.image_size`.
        num_channels: 1 (grey) or 3 (RGB).
        pad: border in pixels on every side, inside `image_size`: 28x28 digits become 32x32 with `pad=2`.
        background: value in [-1, 1] of the border and of what lies behind transparent pixels; -1 is black.
        white_level: sample that is white in images of 16 bits, in [1, 65535]; all above are white, too. X-rays of 12
            bits fill 4095 only, and would be nearly black without it. No image is asked: the same level serves all.

    Raises:
        ValueError: a field out of range; names the field, its value, the rule and the remedy.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 1,
        pad: int = 0,
        background: float = -1.0,
        white_level: int = WHITE_LEVEL,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be a positive number of pixels.")
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels={num_channels} must be 1 (grey) or 3 (RGB).")
        if pad < 0 or 2 * pad >= image_size:
            raise ValueError(
                f"pad={pad} must be in [0, image_size / 2) for image_size={image_size}; use a narrower border."
            )
        if not -1 <= background <= 1:
            raise ValueError(f"background={background} must be in [-1, 1]; -1 is black, 1 is white.")
        if not 1 <= white_level <= WHITE_LEVEL:
            raise ValueError(f"white_level={white_level} must be in [1, {WHITE_LEVEL}]; 4095 is white in 12 bits.")
        self.image_size = image_size
        self.num_channels = num_channels
        self.pad = pad
        self.background = background
        self.white_level = white_level

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Preprocesses one image or several.

        Args:
            images: a Pillow image of any mode; an array or tensor (H, W), (H, W, C) or (C, H, W); a list of these of
                any sizes; or a batch (B, H, W), (B, H, W, C) or (B, C, H, W). C is 1, 2 (grey and alpha), 3 or 4 (RGB
                and alpha). Integer arrays are uint8 over its full range or uint16 up to `white_level`, boolean ones 0
                and 1, floating ones in [0, 1]. A three-dimensional array whose first or last side is 1, 3 or 4 is taken
                as one image.
            return_tensors: "pt" (default), "np" or None for NumPy.

        Returns:
            BatchFeature with "pixel_values", float32 (B, num_channels, image_size, image_size) in [-1, 1].

        Raises:
            ValueError: an empty image, a shape or range not listed above, or non-finite values.
        """
        if kwargs:
            raise ValueError(f"unknown arguments {sorted(kwargs)}; set them when the processor is made.")
        listed = _as_list(images)
        inner = self.image_size - 2 * self.pad
        border = (self.background + 1) * 127.5
        shape = (len(listed), self.num_channels, self.image_size, self.image_size)
        pixels = np.full(shape, border, dtype=np.float32)
        window = slice(self.pad, self.pad + inner)
        for index, image in enumerate(listed):
            square = _fit(image_levels(image, border, self.white_level), inner, self.num_channels)
            pixels[index, :, window, window] = square.transpose(2, 0, 1)
        pixels *= 1 / 127.5
        pixels -= 1
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def postprocess(self, images: Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        """Turns generated images into pictures: the inverse of `preprocess`, up to its cropping and resizing.

        Args:
            images: (B, num_channels, side, side) in [-1, 1]; values outside are clamped. A coarse image, of a side
                below `image_size`, has a border of `pad * side / image_size` pixels, rounded down so that no part of
                the picture is lost.
            output_type: "pil" for Pillow images of mode "L" or "RGB"; "np" for a float32 array (B, height, width, C)
                in [0, 1]; "pt" for a float32 Tensor (B, C, height, width) in [0, 1] on the device of `images`.

        Returns:
            The pictures without border, a list for "pil".

        Raises:
            ValueError: unknown `output_type`, another shape.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is unknown; use one of pil, np, pt.")
        if images.ndim != 4 or images.shape[1] != self.num_channels or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; this processor takes (B, {self.num_channels}, side, side)."
            )
        side = images.shape[-1]
        border = self.pad * side // self.image_size
        window = slice(border, side - border)
        pictures = ((images[..., window, window].detach().float() + 1) / 2).clamp(0, 1)
        if output_type == "pt":
            return pictures
        array = pictures.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        # One below the other, then cut apart: half the time of as many small arrays.
        count, height, width = array.shape[:3]
        if not count:
            return []
        levels = (array * 255).round().astype(np.uint8).reshape(-1, width, self.num_channels)
        column = Image.fromarray(levels[..., 0] if self.num_channels == 1 else levels)
        return [column.crop((0, top, width, top + height)) for top in range(0, count * height, height)]


def _as_list(images: Any) -> list[Any]:
    """Splits whatever `preprocess` accepts into single images."""
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, Image.Image):
        return [images]
    array = _array(images)
    if array.ndim == 4 or (array.ndim == 3 and not {array.shape[0], array.shape[-1]} & {1, 3, 4}):
        return list(array)
    return [array]


def _array(image: Any) -> np.ndarray:
    """NumPy array of an array, of a tensor on any device or of nested lists."""
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    return np.asarray(image)


def image_levels(image: Any, border: float, white_level: int = WHITE_LEVEL) -> Image.Image | np.ndarray:
    """One image in the levels 0..255: a Pillow "L" or "RGB" image, or float32 (H, W, 1 or 3) where eight bits lose.

    `border` is the level behind transparent pixels; `white_level` the sample that is white in images of 16 bits.
    """
    if isinstance(image, Image.Image):
        if min(image.size) < 1:
            raise ValueError(f"image of size {image.size} is empty.")
        if image.mode in _WIDE_MODES:
            # 16-bit samples; Pillow's own convert("L") would clip them at 255.
            return np.asarray(image, dtype=np.float32).clip(0, white_level)[..., None] / (white_level / 255)
        if image.mode == "F":
            return _float_levels(np.asarray(image)[..., None], border)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            grey = round(border)
            backdrop = Image.new("RGBA", image.size, (grey, grey, grey, 255))
            return Image.alpha_composite(backdrop, _rgba(image)).convert("RGB")
        if image.mode in ("1", "L"):
            return image.convert("L")
        return image.convert("RGB")
    array = _array(image)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"image of shape {_array(image).shape} is not (H, W), (H, W, C) or (C, H, W) with C in 1 to 4"
            " and no empty side."
        )
    if array.dtype == np.uint8 and array.shape[-1] in (1, 3):
        return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))
    if array.dtype in (np.uint8, np.uint16):
        white = 255 if array.dtype == np.uint8 else white_level
        return _float_levels(array.astype(np.float32).clip(0, white) / white, border)
    if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.floating):
        return _float_levels(array.astype(np.float32), border)
    raise ValueError(f"image of dtype {array.dtype} has no known range; give uint8, uint16, bool, or floats in [0, 1].")


def _rgba(image: Image.Image) -> Image.Image:
    """RGBA copy, also of modes that Pillow converts in two steps only."""
    if image.mode in ("La", "RGBa", "PA"):
        image = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}[image.mode])
    return image.convert("RGBA")


def _float_levels(array: np.ndarray, border: float) -> np.ndarray:
    """Levels 0..255 of a float32 image (H, W, C) in [0, 1], transparency resolved."""
    low, high = float(array.min()), float(array.max())
    if not (0 <= low and high <= 1):  # also refuses NaN
        raise ValueError(
            f"floating image with values in [{low}, {high}]; expected finite values in [0, 1]: rescale it first."
        )
    levels = array * np.float32(255)
    if array.shape[-1] in (2, 4):
        alpha = array[..., -1:]
        levels = levels[..., :-1] * alpha + np.float32(border) * (1 - alpha)
    return levels


def _fit(image: Image.Image | np.ndarray, side: int, channels: int) -> np.ndarray:
    """Central square of the image at `side` pixels and `channels` channels: (side, side, channels), levels 0..255."""
    if isinstance(image, np.ndarray):
        if image.shape[-1] == 3 and channels == 1:
            image = (image @ _LUMA)[..., None]
        planes = [_resize(Image.fromarray(np.ascontiguousarray(plane)), side) for plane in np.moveaxis(image, -1, 0)]
        array = np.stack(planes, axis=-1).clip(0, 255)
    else:
        array = _resize(image.convert("L") if channels == 1 and image.mode == "RGB" else image, side)
        array = array.reshape(side, side, -1)
    return np.broadcast_to(array, (side, side, channels))


def _resize(image: Image.Image, side: int) -> np.ndarray:
    """Central square at `side` pixels: area average when shrinking, bicubic when enlarging."""
    width, height = image.size
    crop = min(width, height)
    if width != height or crop != side:
        left, top = (width - crop) // 2, (height - crop) // 2
        filter_ = Image.Resampling.BOX if crop > side else Image.Resampling.BICUBIC
        image = image.resize((side, side), filter_, box=(left, top, left + crop, top + crop))
    return np.asarray(image)


__all__ = ["WHITE_LEVEL", "SpectralImageProcessor", "image_levels"]
