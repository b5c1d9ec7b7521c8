"""The three implementations of the convolution against a plain sum over taps."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

from iresnet_jax.maths import platforms
from iresnet_jax.maths.convolution import choose_implementation, conv, pads_of

EXACT = 1e-12  # the same sum of at most a hundred terms in another order, in float64
IMPLEMENTATIONS = ("xla", "patches", "taps")

# height, width, kernel shape, padding
CASES = {
    "3x3 same": (5, 6, (3, 3, 2, 3), "SAME"),
    "3x3 circular": (5, 4, (3, 3, 2, 2), "CIRCULAR"),
    "1x1": (3, 4, (1, 1, 3, 2), "SAME"),
    "even taps same": (5, 6, (2, 4, 2, 2), "SAME"),
    "even taps circular": (4, 5, (4, 2, 1, 2), "CIRCULAR"),
    "more channels in than out": (5, 4, (3, 3, 4, 2), "SAME"),
    "kernel larger than the image, same": (2, 3, (5, 5, 2, 2), "SAME"),
    "kernel larger than the image, circular": (2, 2, (5, 5, 1, 2), "CIRCULAR"),
    "one pixel": (1, 1, (3, 3, 2, 2), "SAME"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_agree_with_the_sum_over_taps(x64, name):
    height, width, kernel_shape, padding = CASES[name]
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, height, width, kernel_shape[2])), rng.normal(size=kernel_shape)
    expected = oracles.conv_forward(x, kernel, padding=padding)
    cotangent = rng.normal(size=expected.shape)

    @jax.jit
    def values_and_gradients(x, kernel, cotangent):
        def run(implementation):
            y, pullback = jax.vjp(
                lambda x, k: conv(x, k, padding=padding, implementation=implementation), x, kernel
            )
            return y, *pullback(cotangent)

        return {implementation: run(implementation) for implementation in IMPLEMENTATIONS}

    # The map is linear in each argument, so a gradient is the map of unit directions against the
    # cotangent.
    matrix = oracles.dense_conv_matrix(kernel, height, width, padding=padding)
    units = np.eye(kernel.size).reshape(-1, *kernel_shape)
    along_units = [np.sum(cotangent * oracles.conv_forward(x, k, padding=padding)) for k in units]
    wanted = expected, (cotangent.reshape(2, -1) @ matrix).reshape(x.shape), along_units
    for implementation, found in values_and_gradients(x, kernel, cotangent).items():
        for own, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(
                np.ravel(own), np.ravel(right), rtol=EXACT, atol=EXACT, err_msg=implementation
            )


def test_one_tap_is_a_plain_matrix_product_and_all_else_goes_to_xla():
    assert choose_implementation((1, 1, 64, 64)) == "patches"
    with platforms.compiling_for("tpu"):
        kernels = [(1, 1, 64, 64), (3, 3, 12, 512), (3, 3, 512, 12), (3, 3, 48, 512)]
        assert [choose_implementation(kernel) for kernel in kernels] == [
            "patches",
            "patches",
            "taps",
            "xla",
        ]
    assert choose_implementation((3, 3, 2, 64)) == choose_implementation((1, 3, 64, 2)) == "xla"


@pytest.mark.parametrize("name", ["more channels in than out", "even taps same"])
def test_every_derivative_agrees_with_those_of_jax(x64, name):
    """Alone and under each kind of ``vmap``, against `lax.conv_general_dilated`."""
    height, width, kernel_shape, padding = CASES[name]
    rng = np.random.default_rng(4)
    x, kernel = (
        jnp.asarray(rng.normal(size=(2, height, width, kernel_shape[2]))),
        jnp.asarray(rng.normal(size=kernel_shape)),
    )

    def ours(x, kernel):
        return conv(x, kernel, padding=padding, implementation="xla")

    def theirs(x, kernel):
        pads = pads_of(padding, kernel_shape)
        return lax.conv_general_dilated(
            x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    weights = jnp.asarray(rng.normal(size=theirs(x, kernel).shape))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(function, x, kernel):
        def loss(x, kernel):
            return jnp.sum(weights * jnp.tanh(function(x, kernel)))

        def loss_of_gradients(x, kernel):
            return sum(jnp.sum(jnp.sin(g)) for g in gradients(x, kernel))

        gradients = jax.grad(loss, (0, 1))
        xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel], axis=-1)
        return {
            "forward": jax.jvp(function, (x, kernel), (x + 1, kernel + 1)),
            "reverse": gradients(x, kernel),
            "second": jax.grad(loss_of_gradients, (0, 1))(x, kernel),
            "forward over reverse": jax.jvp(gradients, (x, kernel), (x + 1, kernel + 1)),
            "more images": jax.vmap(gradients, (0, None))(xs, kernel),
            "more kernels": jax.vmap(gradients, (None, -1))(x, kernels),
            "more of both": jax.vmap(gradients, (0, -1))(xs, kernels),
        }

    # it is ours that is tested
    assert set(re.findall(r"conv\w+", str(jax.make_jaxpr(ours)(x, kernel)))) == {"convolution"}
    actual = derivatives(ours, x, kernel)
    for kind, expected in derivatives(theirs, x, kernel).items():
        chex.assert_trees_all_close(
            actual[kind], expected, rtol=EXACT, atol=10 * EXACT, custom_message=kind
        )


@pytest.mark.slow
def test_gradients_in_a_loop_keep_the_layout_that_is_fast_on_cpu():
    """XLA:CPU runs other layouts in loops up to a hundred times slower."""

    def layouts(convolve, width=3):
        x, kernels = jnp.ones((2, 4, 4, width)), jnp.ones((2, 3, 3, width, width))

        def loss(x, kernels):
            return jnp.sum(lax.scan(lambda x, kernel: (convolve(x, kernel), None), x, kernels)[0])

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernels).compile().as_text()
        assert compiled is not None
        return re.findall(r"convolution\(.*dim_labels=([\w>-]+)", compiled)

    ours = layouts(conv)
    assert len(ours) == 3  # forward, gradient of the images, gradient of the kernel
    assert set(ours) == {"b01f_01io->b01f"}
    theirs = layouts(
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    assert set(theirs) != {"b01f_01io->b01f"}
