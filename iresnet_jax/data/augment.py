"""Random changes of training images: pure functions for use inside a jitted training step.

Every example has its own key, so a result depends neither on the example's batch nor on the number
of devices. The usual augmentation of CIFAR-10 is `crop_and_flip`, which keeps classes; digits and
house numbers must not be flipped. A density may see any changed images if the change is its
context, see `transformed`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, Shaped

IDENTITY_SHARE = 0.5  # share of images that `transformed` does not change


def random_crop(
    keys: Key[Array, " b"], images: Shaped[Array, "b h w c"], *, padding: int = 4
) -> Shaped[Array, "b h w c"]:
    """Shifts each image by up to ``padding`` pixels along both axes, uniformly, and fills the
    border by reflection.

    Equal to padding all sides symmetrically (the edge itself is repeated) and cutting a window of
    the old size out at random.

    Args:
        padding: Largest shift in pixels, from 0 to the smaller side of an image; 4 is customary for
            32x32.
    """
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, margins, mode="symmetric")

    def of_example(key, image):
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(of_example)(keys, padded)


def random_flip(
    keys: Key[Array, " b"], images: Shaped[Array, "b h w c"]
) -> Shaped[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""

    def of_example(key, image):
        return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

    return jax.vmap(of_example)(keys, images)


def crop_and_flip(
    keys: Key[Array, " b"], images: Shaped[Array, "b h w c"], *, padding: int = 4
) -> Shaped[Array, "b h w c"]:
    """Crops each image by `random_crop` and mirrors it by `random_flip`, independently.

    Example::

        images = crop_and_flip(jax.random.split(key, len(images)), images)
    """
    key_pairs = jax.vmap(jax.random.split)(keys)
    return random_flip(key_pairs[:, 1], random_crop(key_pairs[:, 0], images, padding=padding))


def _moved(down: int, right: int) -> Callable[[Array], Array]:
    """Moves an image by some pixels; the vacated pixels are zero."""
    return lambda image: lax.pad(
        image, image.dtype.type(0), ((down, -down, 0), (right, -right, 0), (0, 0, 0))
    )


TRANSFORMATIONS: dict[str, Callable[[Array], Array]] = {
    "left": _moved(0, -1),
    "right": _moved(0, 1),
    "up": _moved(-1, 0),
    "down": _moved(1, 0),
    "mirror": lambda image: image[:, ::-1],
    "upside_down": lambda image: image[::-1],
    "turn": lambda image: image[::-1, ::-1],
    "transpose": lambda image: image.swapaxes(0, 1),
}


def transformed(
    keys: Key[Array, " b"], images: Shaped[Array, "b h w c"], names: Sequence[str]
) -> tuple[Shaped[Array, "b h w c"], Float[Array, "b k"]]:
    """Changes each image by a random transformation, and returns which (Jun et al. 2020).

    A density ``p(T(x) | T)`` that is trained on both learns from more images than there are, and
    equals ``p(x)`` at the identity. The identity has the probability `IDENTITY_SHARE`; all other
    transformations are equally likely.

    Args:
        keys: Randomness of each image.
        images: The images.
        names: Transformations, see `TRANSFORMATIONS`.

    Returns:
        The images, and for each a vector with a 1 at the place of its transformation, or zeros for
        an unchanged image.
    """
    changes = [lambda image: image, *(TRANSFORMATIONS[name] for name in names)]

    def of_example(key, image):
        key_changed, key_which = jax.random.split(key)
        is_changed = jax.random.uniform(key_changed) >= IDENTITY_SHARE
        which = jnp.where(is_changed, jax.random.randint(key_which, (), 1, len(changes)), 0)
        # The one-hot vector of -1, the identity, is zero.
        return lax.switch(which, changes, image), jax.nn.one_hot(which - 1, len(names))

    return jax.vmap(of_example)(keys, images)
