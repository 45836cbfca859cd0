"""Image augmentation on device, driven by a key."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def pad_crop_flip(images: Array, key: Array, *, pad: int = 4, flip: bool = True) -> Array:
    """Pads each image by reflection, crops it back at random and mirrors it half of the time.

    Args:
      images: [B, H, W, C], any dtype; H and W above `pad`.
      key: drives both draws.
      pad: pixels on each side; 0 leaves cropping out.
      flip: mirror left and right.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """
    crop_key, flip_key = jax.random.split(key)
    batch, height, width, channels = images.shape
    if pad:
        if min(height, width) <= pad:
            raise ValueError(f"Images of {height} x {width} are too small to reflect {pad} pixels.")
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)

        def crop(image, corner):
            start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
            return jax.lax.dynamic_slice(image, start, (height, width, channels))

        images = jax.vmap(crop)(padded, corners)
    if flip:
        mirror = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    return images


def image_transform(
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pad: int = 0,
    flip: bool = False,
) -> Callable[[Array, Array | None], Array]:
    """Returns `(images, key) -> f32 images` for `jaxfm.tasks.classification(transform=...)`.

    u8 is scaled to 0..1, then (x - mean) / std per channel; with a key (training) the images are
    first augmented by `pad_crop_flip`.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"Give both of mean and std or neither; got mean={mean}, std={std}.")

    def transform(images: Array, key: Array | None = None) -> Array:
        if key is not None and (pad or flip):
            images = pad_crop_flip(images, key, pad=pad, flip=flip)
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        if mean is not None and std is not None:
            shape = (1, 1, 1, images.shape[-1])
            centre = jnp.asarray(np.reshape(mean, shape), jnp.float32)
            images = (images - centre) / jnp.asarray(np.reshape(std, shape), jnp.float32)
        return images

    return transform
