"""Small models with weights of no meaning, and folders that hold one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import tiny_runs as runs

from iresnet_jax import data
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths import activations
from iresnet_jax.models import contexts, noise
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.contractions import freeze, of_stored
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.flow import bounded
from iresnet_jax.runs import trained_run as run
from iresnet_jax.runs.config import EvaluationConfig, LogdetConfig
from iresnet_jax.training.objectives import evaluation_keys

CLASSES, LEVELS, SHAPE = 3, 256, (4, 4, 1)
STAGES = (StageSpec(2, hidden=(3,), kernel_sizes=(3, 3)),)
POINTS = DensitySpec(FlowSpec((2,), (StageSpec(2, hidden=(8, 8)),)))
GIVEN = dataclasses.replace(POINTS, flow=dataclasses.replace(POINTS.flow, context_dim=3))
CONTEXTS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
IMAGES = DensitySpec(
    FlowSpec(SHAPE, (StageSpec(2, hidden=(3,)),)), transform=Logit(0.05), num_levels=LEVELS
)
CLASSES_OF_POINTS = dataclasses.replace(POINTS, num_classes=CLASSES)
HYBRID = dataclasses.replace(IMAGES, num_classes=CLASSES)
DIGITS = FlowSpec((8, 8, 1), (StageSpec(1, hidden=(2,)),))
TEN_DIGITS = DensitySpec(DIGITS, transform=Logit(0.05), num_levels=17, num_classes=10)
CLASSIFIER = ClassifierSpec(FlowSpec((4, 4, 2), STAGES), SHAPE, CLASSES, LEVELS, pad_channels=1)
SETTINGS = EvaluationConfig(
    logdet=LogdetConfig(kind="roulette", num_exact_terms=8),
    batch_size=32,
    num_dequantisations=2,
    num_probe_draws=2,
)


def random_params(flow, seed=0):
    """Parameters of a flow, drawn by NumPy: a program that draws them compiles for long."""
    rng, params = np.random.default_rng(seed), {}

    def drawn(path, leaf):
        """Weights have the variance 1 / fan_in, as when they are initialised."""
        name, shape = path[-1].key, (num, *leaf.shape)
        if name == "beta":
            return np.full(shape, activations.get("lipswish").initial_beta, np.float32)
        size = {"bias": 0.3, "psi": 0}.get(name, 1 / math.sqrt(math.prod(leaf.shape[:-1])))
        return rng.normal(0, size, shape).astype(np.float32)

    for stage in flow.all_stages:
        num, shapes = (
            stage.spec.num_blocks,
            jax.eval_shape(stage.branch.initial_weights, jax.random.key(0)),
        )
        blocks = jax.tree.map_with_path(drawn, shapes)
        bias, log_scale = rng.normal(0, 0.1, (2, num, stage.branch.in_shape[-1])).astype(np.float32)
        params[stage.name] = {
            "blocks": {**blocks, "actnorm": {"bias": bias, "log_scale": log_scale}}
        }
    return params


@functools.cache
def weights(flow, seed=0):
    """Frozen weights of a flow."""
    return bounded(freeze(flow, random_params(flow, seed)), None)


@functools.cache
def model(spec, seed=0):
    """A frozen model of a spec; one without a constraint has weights beyond it."""
    if isinstance(spec, ClassifierSpec):
        own = (
            weights(spec.flow, seed)
            if spec.constrained
            else of_stored(spec.flow, random_params(spec.flow, seed))
        )
        return Classifier(spec, own, **jax.jit(spec.initial_arrays)(jax.random.key(1)))
    rng = np.random.default_rng(1)
    prior = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), spec.standard_prior()
    )
    network = contexts.initial_network(jax.random.key(1), spec.context_dim, spec.context_hidden)
    of_noise = (
        jax.jit(noise.initial_network, static_argnums=0)(spec.flow, jax.random.key(1))
        if spec.flow.noise
        else {}
    )
    return Density(spec, weights(spec.flow, seed), prior, network=network, noise_network=of_noise)


def exact_model(spec, seed=0, atol=1e-12):
    """That model in float64, which the caller has switched on, and inverses to this tolerance."""
    with jax.enable_x64(False):
        single = model(spec, seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), single).with_(
        solver=Solver(atol=atol)
    )


def images(num, seed=0):
    """Images and their classes, which their brightness tells."""
    rng = np.random.default_rng(seed)
    labels = np.resize(np.arange(CLASSES), num)
    return (rng.integers(0, 100, (num, *SHAPE)) + 70 * labels[:, None, None, None]).astype(
        np.uint8
    ), labels


def write_data(path, seed=0):
    """A data set as a file, which the name ``npz:PATH`` loads."""
    (train, train_labels), (test, test_labels) = images(40, seed), images(25, seed + 1)
    np.savez(path, x_train=train, y_train=train_labels, x_test=test, y_test=test_labels)
    return f"npz:{path}"


dequantize = jax.jit(Density.dequantize)


@jax.jit
def latents_and_jacobians(model, u):
    flow, transform = model.flow(), model.spec.transform

    def latent(u):
        return flow.forward(transform.forward(u[None]))[0]

    return jax.vmap(latent)(u), jax.vmap(jax.jacfwd(latent))(u)


def dense_bits(model, examples, seed, noise_draw):
    """Bits/dim by the Jacobian of the whole model in float64, one per image."""
    with jax.enable_x64(True):
        keys, _ = evaluation_keys(jax.random.key(seed), np.arange(len(examples)), noise_draw, 0)
        prior = jax.tree.map(np.asarray, model.prior)
        with jax.enable_x64(False):
            u = jax.device_get(dequantize(model, examples, keys))
        z, jacobian = map(np.asarray, latents_and_jacobians(model, u.astype(np.float64)))
        log_scale = prior.log_scale.astype(np.float64)
        log_prior = (
            -0.5 * ((z - prior.mean) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)
        ).sum(axis=1)
        log_p = log_prior + np.linalg.slogdet(jacobian.reshape(len(z), z.shape[1], -1))[1]
        return -log_p / (z.shape[1] * np.log(2)) + np.log2(LEVELS)


OBJECTIVES = {
    **dict.fromkeys((POINTS, GIVEN, IMAGES), "density"),
    **dict.fromkeys((HYBRID, TEN_DIGITS, CLASSES_OF_POINTS), "hybrid"),
    CLASSIFIER: "classification",
}
CONFIG = """
from iresnet_jax.runs.config import default_config

def get_config():
    config = default_config()
    config.evaluation.logdet.num_exact_terms = 8
    config.evaluation.update({"num_dequantisations": 2, "num_probe_draws": 2})
    config.evaluation.update({"batch_size": 32, "num_examples": 64})
    config.references.values = (("somebody", 2.45),)
    return config
"""


def folder(path, spec, data_name="moons"):
    """A folder with nothing but ``model.npz``, as a run on these data leaves it."""
    config = runs.config_of(CONFIG, **{"objective": OBJECTIVES[spec], "data.name": data_name})
    fingerprint = data.load(data_name).fingerprint
    path.mkdir()
    run.save(run.Run(path, model(spec), config, fingerprint, step=7))
    return path
