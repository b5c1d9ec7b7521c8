"""A prior for every class: Bayes' rule, samples of a class, and training on both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import scipy.special
import scipy.stats
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax.data import augment, load
from iresnet_jax.models.classifier import cross_entropy
from iresnet_jax.models.contractions import constrain
from iresnet_jax.models.model import How
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.runs.job import Job
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import HybridConfig, hybrid_loss
from iresnet_jax.training.step import Keys

SAME = 1e-5  # the same maths by another route, float32
K, D = 3, 2


workdir, _ = runs.fixtures_of("hybrid")
PLANE = ir.FlowSpec((D,), (ir.StageSpec(num_blocks=2, hidden=(8,)),), coeff=0.7)


@functools.cache
def plane(num_classes=K):
    """A model of the plane with a random prior for every class, and points of it, in float32."""
    spec = ir.DensitySpec(PLANE, prior_family="logistic", num_levels=None, num_classes=num_classes)

    @jax.jit
    def make(key):
        key_prior, key_points = jax.random.split(key)
        return scattered(key_prior, spec.standard_prior()), jax.random.normal(key_points, (16, D))

    with jax.enable_x64(False):  # the first test that asks may be one in float64
        prior, points = make(jax.random.key(3))
        return ir.Density(spec, kept.weights(PLANE), prior), points


def scattered(key, tree):
    """The tree with normal noise on every number: classes start alike."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [leaf + jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


def by_hand(prior, z):
    """``log p(y) + log p_Z(z | y)`` in numpy, class by class."""
    prior, z = jax.tree.map(np.asarray, (prior, z))
    moments = zip(prior.by_class.mean, np.exp(prior.by_class.log_scale), strict=True)
    classes = [scipy.stats.logistic.logpdf(z, mean, scale).sum(axis=1) for mean, scale in moments]
    return np.stack(classes, axis=1) + scipy.special.log_softmax(prior.logits)


def test_prior_and_posterior_are_those_of_bayes_rule_and_the_loss_has_both(x64):
    model, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), plane())
    key, labels = jax.random.key(0), jnp.arange(len(x)) % K
    keys = Keys(jnp.int32(0), key, key, jax.random.split(key, len(x)))

    @jax.jit
    def compute(model, x):
        z, loss = model.encode(x), hybrid_loss(HybridConfig(weight=2.0))
        return (
            z,
            model.prior.log_prob_by_class(z),
            model.terms(x, key, key),
            model.class_log_probs(x),
            loss(model, (x, labels), keys).value,
        )

    z, by_class, terms, posterior, loss = compute(model, x)
    expected = by_hand(model.prior, z)
    np.testing.assert_allclose(by_class, expected, rtol=1e-10)
    np.testing.assert_allclose(terms.log_prior, np.log(np.exp(expected).sum(axis=1)), rtol=1e-10)
    np.testing.assert_allclose(terms.log_prob, terms.log_prior + terms.log_det, rtol=1e-10)
    np.testing.assert_allclose(np.exp(posterior).sum(axis=1), 1, rtol=1e-10)
    # log p(x, y) - log p(x)
    joint = np.asarray(terms.log_prior_by_class) - np.asarray(terms.log_prior)[:, None]
    np.testing.assert_allclose(posterior, joint, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        loss, -posterior[np.arange(len(x)), labels].mean() - 2 * terms.log_prob.mean(), rtol=1e-10
    )


def test_samples_of_a_class_follow_its_prior(x64):
    model, _ = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), plane())
    labels = jnp.append(jnp.repeat(jnp.arange(K), 2000), K)  # there is no class K

    @jax.jit
    def draw_and_encode(model, labels, bounds):
        x, info = model.sample(jax.random.key(5), len(labels), labels=labels, bounds=bounds)
        return model.encode(x), info

    z, info = draw_and_encode(model, labels, model.bounds())
    np.testing.assert_array_equal(info.converged, labels < K)
    z, labels = np.asarray(z), np.asarray(labels)

    # of every dimension, that a class's latents are those of this component
    def pvalues(component):
        by_class = model.prior.by_class
        of_component = scipy.stats.logistic(
            by_class.mean[component], np.exp(by_class.log_scale[component])
        )
        return [
            [
                scipy.stats.kstest(of_component.cdf(z[labels == k])[:, d], "uniform").pvalue
                for d in range(D)
            ]
            for k in range(K)
        ]

    for k in range(K):
        assert min(pvalues(k)[k]) > 1e-3
        assert min(pvalues(k)[k - 1]) < 1e-6  # the test can tell classes apart


def test_without_labels_classes_come_as_often_as_the_model_says():
    prior = plane()[0].prior
    means = np.repeat(100 * np.arange(K, dtype=np.float32)[:, None], D, axis=1)
    prior = dataclasses.replace(prior, by_class=Gaussian(means, np.zeros((K, D), np.float32)))
    counts = np.bincount(
        np.rint(np.asarray(prior.sample(jax.random.key(0), (6000,))[:, 0]) / 100).astype(int),
        minlength=K,
    )
    expected = 6000 * scipy.special.softmax(np.asarray(prior.logits, np.float64))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def setup(config):
    """The job of a run, a state whose classes differ, and the images and labels of a batch."""
    job = Job.of(config, load(config.data.name))
    images, labels = job.examples
    return job, runs.random_state(job), (images[:32], labels[:32].astype(np.int32))


def test_the_loss_is_cross_entropy_plus_weighted_bits():
    """A step's gradient by hand; augmentation changes what is classified alone."""
    changes = {
        "optimizer.name": "sgd",
        "optimizer.clip_norm": 0.0,
        "model.dequantization": "uniform",
    }
    changes |= {"classifier.label_smoothing": 0.1, "augmentation.crop_padding": 3}
    config = runs.config_of(runs.HYBRID_CONFIG, **changes)
    job, start, (images, labels) = setup(config)
    step, fixed = job.step()
    mapped = jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, None, 0), out_axes=(None, None))
    _, metrics = jax.jit(mapped)(start, fixed, parallel.shard((images, labels), num_devices=1))

    @jax.jit
    def drawn(images):
        key_length, key_examples = jax.random.split(
            jax.random.fold_in(jax.random.key(config.seed), 0)
        )
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key_examples, i), 4))(
            jnp.arange(len(images))
        )
        estimator = config.logdet.build().fix_length(key_length)
        return keys, estimator, augment.random_crop(keys[:, 2], images, padding=3)

    keys, estimator, cropped = drawn(images)
    free = ir.Free({}, {}, {}, job.spec, How(estimator), config.constraint)
    assert np.any(cropped != images)

    def terms(params):
        weights = constrain(
            job.spec.flow, params, start.spectral, num_steps=config.constraint.num_steps
        ).weights
        model = free.build(weights, params)
        bits = model.spec.in_units(model.terms(images, keys[:, 0], keys[:, 1]).log_prob)
        log_p = model.class_log_probs(cropped, keys[:, 3])
        entropy = cross_entropy(log_p, jnp.asarray(labels), label_smoothing=0.1)
        return (both := jnp.stack([entropy.mean(), bits.mean()])), both

    by_term, (entropy, bits) = jax.device_get(
        jax.jit(jax.jacrev(terms, has_aux=True))(start.params)
    )
    squares = [np.sum((g[0].astype(float) + 4.0 * g[1]) ** 2) for g in jax.tree.leaves(by_term)]
    np.testing.assert_allclose(metrics["cross_entropy"], entropy, rtol=SAME)
    np.testing.assert_allclose(metrics["bits_per_dim"], bits, rtol=SAME)
    np.testing.assert_allclose(metrics["loss"], entropy + 4.0 * bits, rtol=SAME)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(squares)), rtol=1e-4)
    assert metrics["bits_weight"] == 4.0  # initial_weight, at step 0
    # the cross-entropy reaches the network
    of_kernels = by_term["stage0"]["blocks"]["dense0"]["kernel"][0]
    assert np.linalg.norm(of_kernels) > 0.1


def test_training_improves_both_and_logs_both(workdir):
    records = read_metrics(workdir)
    first, last = (record for record in records if record["split"] == "validation")
    assert last["bits_per_dim"] < first["bits_per_dim"]
    assert last["cross_entropy"] < first["cross_entropy"]
    trains = [record for record in records if record["split"] == "train"]
    # means over two steps
    assert [record["bits_weight"] for record in trains] == [3.75, 2.75, 2.0, 2.0]
    assert {
        "loss",
        "bits_per_dim",
        "log_prior",
        "log_det",
        "cross_entropy",
        "accuracy",
        "max_lipschitz",
    } <= set(trains[0])
