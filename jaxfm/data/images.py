"""Images at the door: one layout, [N, H, W, C], and one scale.

Grey images get one channel, channels that come first are moved last. The scale follows from the
values of all images together: bytes (whole numbers in 0..255) stay u8, which tasks scale to 0..1;
whole numbers up to 65535 are divided by 65535; fractions within 0..1, or with negative values
(normalised already), stay; other fractions within 0..255 are divided by 255; the rest is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxfm.data.tables import read_arrays

_CHANNELS = (1, 2, 3, 4)


def as_images(images: np.ndarray, origin: object = "images") -> np.ndarray:
    """Returns images u8 or f32 [N, H, W, C].

    Args:
      images: [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 to 4 channels; channels are last where
        both would fit.
      origin: what errors name.
    Raises:
      ValueError: another shape; values that are no image's: NaN, infinite, or out of all ranges.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in _CHANNELS and images.shape[1] in _CHANNELS:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in _CHANNELS or not images.size:
        raise ValueError(
            f"{origin}: images of shape {images.shape} are neither [N, H, W], [N, H, W, C] nor "
            "[N, C, H, W] with 1 to 4 channels."
        )
    return np.ascontiguousarray(_scaled(images, origin))


def _scaled(images: np.ndarray, origin: object) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "biuf":
        raise ValueError(f"{origin}: images must be numbers; found {images.dtype}.")
    if images.dtype.kind == "b":
        return images.astype(np.float32)
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        row = int(np.argmax(~np.isfinite(images).all(axis=(1, 2, 3))))
        raise ValueError(f"{origin}: image {row + 1} holds NaN or infinity.")
    if images.dtype.kind in "iu":
        if low >= 0 and high <= 255:
            return images.astype(np.uint8)
        if low >= 0 and high <= 65535:
            return images.astype(np.float32) / np.float32(65535)
    elif low < 0 or high <= 1:
        return images.astype(np.float32)
    elif high <= 255:
        return images.astype(np.float32) / np.float32(255)
    raise ValueError(
        f"{origin}: images hold {low}..{high}; give whole numbers in 0..255 or 0..65535, or "
        "fractions in 0..1 or 0..255."
    )


def read_images(paths: Sequence[Path], size: tuple[int, int] | None = None) -> np.ndarray:
    """Returns image files as one array [N, H, W, C], u8, or u16 for deep grey ones.

    Grey if all of them are grey, otherwise RGB.

    Args:
      paths: files that Pillow opens, or .npy files of one image each.
      size: height and width that each is scaled to; None: all must be of one size.
    Raises:
      FileNotFoundError, ValueError: a file is missing, damaged or of another size.
      ImportError: Pillow is not installed.
    """
    return stack_images([_open(path) for path in paths], paths, size)


def stack_images(
    images: Sequence[Any], names: Sequence[Any], size: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns images, opened by Pillow or arrays, as one array [N, H, W, C]; see `read_images`."""
    opened = [image for image in images if hasattr(image, "convert")]
    grey = all(image.mode in ("1", "L", "LA") or image.mode.startswith("I") for image in opened)
    deep = any(image.mode.startswith("I") for image in opened)
    if deep and not all(image.mode.startswith("I") for image in opened):
        raise ValueError(f"{names[0]}: some images have 16 bits and others 8; give one kind.")
    first, arrays = None, []
    for image, name in zip(images, names):
        if hasattr(image, "convert"):
            if size is not None:
                image = image.resize(size[::-1])
            image = image if deep else image.convert("L" if grey else "RGB")
        elif size is not None and np.shape(image)[:2] != size:
            raise ValueError(f"{name}: arrays cannot be scaled to {size}; give image files.")
        arrays.append(np.asarray(image))
        first = arrays[0].shape if first is None else first
        if arrays[-1].shape != first:
            raise ValueError(
                f"{name} has shape {arrays[-1].shape}, {names[0]} has {first}; give an image "
                "size to scale to."
            )
    return np.stack(arrays)


def open_image(source: Any, name: object) -> Any:
    """Returns an image opened by Pillow from a path or a file object."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{name}: image files need Pillow: pip install 'jaxfm[data]'.") from error
    try:
        image = Image.open(source)
        image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}.") from error
    return image


def _open(path: Path) -> Any:
    if path.suffix.lower() != ".npy":
        return open_image(path, path)
    return read_arrays(path)
