"""Random changes of training images that keep their class: pure functions for use inside a jitted training step.

Every example has its own key, so a result depends neither on the batch that an example is in nor on the number of devices. The
usual augmentation of CIFAR-10 is `crop_and_flip`; digits and house numbers must not be flipped.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, Shaped


def random_crop(keys: Key[Array, " b"], images: Shaped[Array, "b h w c"], *, padding: int = 4) -> Shaped[Array, "b h w c"]:
    """Shifts each image by up to ``padding`` pixels along both axes, uniformly, and fills the border by reflection.

    Equal to padding all sides symmetrically (the edge itself is repeated) and cutting a window of the old size out at random.

    Args:
        padding: Largest shift in pixels, from 0 to the smaller side of an image; 4 is customary for 32x32.

    Raises:
        ValueError: If ``padding`` is out of range.
    """
    height, width = images.shape[1:3]
    if not 0 <= padding <= min(height, width):
        raise ValueError(f"padding must lie in [0, {min(height, width)}] for {height}x{width} images, got {padding}")
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, margins, mode="symmetric")

    def of_example(key, image):
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(of_example)(keys, padded)


def random_flip(keys: Key[Array, " b"], images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""

    def of_example(key, image):
        return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

    return jax.vmap(of_example)(keys, images)


def crop_and_flip(keys: Key[Array, " b"], images: Shaped[Array, "b h w c"], *, padding: int = 4) -> Shaped[Array, "b h w c"]:
    """Crops each image by `random_crop` and mirrors it by `random_flip`, independently.

    Example::

        images = crop_and_flip(jax.random.split(key, len(images)), images)
    """
    key_pairs = jax.vmap(jax.random.split)(keys)
    return random_flip(key_pairs[:, 1], random_crop(key_pairs[:, 0], images, padding=padding))
