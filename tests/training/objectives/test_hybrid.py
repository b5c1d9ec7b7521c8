"""A density with a prior for every class: Bayes' rule, samples of a class, and training on images and labels at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import scipy.special
import scipy.stats
from iresnet_jax.training.source import load_source

from iresnet_jax.__main__ import main
from iresnet_jax.evaluation import frozen, ood, trained
from iresnet_jax.evaluation import samples as sample
from iresnet_jax.models import classifier, density
from iresnet_jax.models import flow as model
from iresnet_jax.models import linen as modules
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.report import report
from iresnet_jax.training import loop, parallel, state
from iresnet_jax.training.building import build_constraint, density_spec
from iresnet_jax.training.config import HybridConfig
from iresnet_jax.training.metrics import read_metrics
from iresnet_jax.training.objectives import hybrid

DEVICE_RTOL, DEVICE_ATOL = 1e-4, 1e-5  # the same sums in another order, in float32
SAME = 1e-5  # the same maths by another route, float32
K, D = 3, 2

CONFIG = """
from iresnet_jax.training.config import default_config

def get_config():
    config = default_config()
    config.objective = "hybrid"
    config.model.stages = ({"num_blocks": 2, "hidden": (4,), "kernel_sizes": (3, 3), "squeeze": 2},)
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 2})
    config.hybrid.update({"weight": 2.0, "initial_weight": 4.0, "ramp_steps": 4})
    config.training.update({"total_steps": 8, "eval_every_steps": 4, "log_every_steps": 2, "batch_size": 32,
        "actnorm_examples": 64, "ema_decay": 0.5, "blocks": "scan"})
    config.evaluation.update({"num_dequantisations": 1, "num_probe_draws": 1})
    config.evaluation.logdet.num_exact_terms = 4
    return config
"""

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with runs.shared_compilations(tmp_path_factory):
        yield


@pytest.fixture
def config():
    return runs.config_of(CONFIG)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    loop.train(runs.config_of(CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def trained_model(workdir):
    return trained.load(workdir)


def plane(prior="gaussian", num_classes=K):
    """A model of the plane with a random prior for every class."""
    spec = density.DensitySpec(
        FlowSpec((D,), (StageSpec(num_blocks=2, hidden=(8,)),), coeff=0.7),
        prior=prior,
        transform="none",
        num_levels=None,
        num_classes=num_classes,
    )
    keys = jax.random.split(jax.random.key(3), 4)
    module = modules.ResidualFlow(spec.flow, prior=prior, num_classes=num_classes)
    variables = module.init(keys[0], jax.random.normal(keys[1], (64, D)))
    prior = scattered(keys[2], variables["params"]["prior"])
    return spec, model.freeze(spec.flow, variables["params"]).weights, prior, jax.random.normal(keys[3], (16, D))


def scattered(key, tree):
    """The tree with independent normal noise on every number: classes start alike, which hides what tells them apart."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([leaf + jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


# --- the model ------------------------------------------------------------------------------------------------------


def by_hand(kind, prior, z):
    """``log p(y) + log p_Z(z | y)`` in numpy, class by class."""
    distribution, scale = {"gaussian": (scipy.stats.norm, "log_std"), "logistic": (scipy.stats.logistic, "log_scale")}[kind]
    prior, z = jax.tree.map(np.asarray, (prior, z))
    classes = []
    for mean, log_scale in zip(prior["mean"], prior[scale], strict=True):
        classes.append(distribution.logpdf(z, mean, np.exp(log_scale)).sum(axis=1))
    return np.stack(classes, axis=1) + scipy.special.log_softmax(prior["class_logits"])


@pytest.mark.parametrize("kind", density.PRIORS)
def test_prior_and_posterior_are_those_of_bayes_rule(x64, kind):
    spec, weights, prior, x = plane(kind)
    z = density.encode(spec, weights, x)
    expected = by_hand(kind, prior, z)
    np.testing.assert_allclose(density.log_prior_by_class(spec, prior, z), expected, rtol=1e-10)
    terms = density.log_prob(spec, weights, prior, x, jax.random.key(0))
    np.testing.assert_allclose(terms.log_prior, np.log(np.exp(expected).sum(axis=1)), rtol=1e-10)
    np.testing.assert_allclose(terms.log_prob, terms.log_prior + terms.log_det, rtol=1e-10)
    posterior = density.class_log_probs(spec, weights, prior, x)
    np.testing.assert_allclose(np.exp(posterior).sum(axis=1), 1, rtol=1e-10)
    joint = np.asarray(terms.log_prior_by_class) - np.asarray(terms.log_prior)[:, None]  # log p(x, y) - log p(x)
    np.testing.assert_allclose(posterior, joint, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", density.PRIORS)
def test_samples_of_a_class_follow_its_prior(x64, kind):
    spec, weights, prior, _ = plane(kind)
    labels = jnp.repeat(jnp.arange(K), 2000)
    x, info = jax.jit(lambda key: density.sample(spec, weights, prior, key, len(labels), labels=labels))(jax.random.key(5))
    assert bool(info.converged.all())
    z = np.asarray(density.encode(spec, weights, x))
    distribution, scale = {"gaussian": (scipy.stats.norm, "log_std"), "logistic": (scipy.stats.logistic, "log_scale")}[kind]

    def pvalues(component):  # of every dimension, that a class's latents are those of this component
        priors = distribution(np.asarray(prior["mean"][component]), np.exp(np.asarray(prior[scale][component])))
        return [[scipy.stats.kstest(priors.cdf(z[labels == k])[:, d], "uniform").pvalue for d in range(D)] for k in range(K)]

    for k in range(K):
        assert min(pvalues(k)[k]) > 1e-3
        assert min(pvalues(k)[k - 1]) < 1e-6  # the test can tell classes apart


def test_without_labels_classes_come_as_often_as_the_model_says():
    spec, _, prior, _ = plane()
    prior = {**prior, "mean": jnp.repeat(100.0 * jnp.arange(K)[:, None], D, axis=1), "log_std": jnp.zeros((K, D))}
    z = density._sample_prior(spec, prior, jax.random.key(0), 6000, 1.0, None)
    counts = np.bincount(np.rint(np.asarray(z[:, 0]) / 100).astype(int), minlength=K)
    assert (
        scipy.stats.chisquare(counts, 6000 * scipy.special.softmax(np.asarray(prior["class_logits"], np.float64))).pvalue > 1e-3
    )
    assert density._sample_prior(spec, prior, jax.random.key(0), 5, 0.0, jnp.full(5, 2))[:, 0].tolist() == [200.0] * 5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plane(num_classes=1), "num_classes must be at least 2"),
        (lambda: density.log_prior_by_class(plane(num_classes=None)[0], {}, jnp.zeros((2, D))), "one prior for all"),
        (lambda: draw(plane(num_classes=None), jnp.zeros(4, int)), "one prior for all"),
        (lambda: draw(plane(), jnp.zeros(3, int)), "labels must be 4 integers"),
        (lambda: density._sample_prior(*plane()[::2], jax.random.key(0), 0, 1.0, None), "at least 1, got 0"),
    ],
)
def test_mistakes_of_callers(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_class_that_does_not_exist_gives_no_sample_and_says_so():
    x, info = draw(plane(), jnp.array([0, 3, -1, 2]))
    assert info.converged.tolist() == [True, False, False, True]
    assert np.isnan(x[1:3]).all()
    assert np.isfinite(x[::3]).all()


def draw(what, labels):
    spec, weights, prior, _ = what
    return density.sample(spec, weights, prior, jax.random.key(0), 4, labels=labels)


# --- training -------------------------------------------------------------------------------------------------------


def setup(config):
    """The objective of a run, a state whose classes differ, and the images and labels of a batch."""
    objective = loop.build_objective(config, load_source(config.data.name))
    start = state.create(objective.initial_variables(), objective.optimizer)
    prior = jax.tree.map(lambda noisy: 0.1 * noisy, scattered(jax.random.key(9), start.params["prior"]))
    start = start._replace(params={**start.params, "prior": prior})
    images, labels = objective.examples
    return objective, start, (images[:32], labels[:32].astype(np.int32))


def after_steps(config, num_shares, mapped, num_steps=2):
    """The state after a few steps with the batch in so many shares, and the metrics of the last."""
    objective, current, batch = setup(config)
    step = mapped(objective.make_step(objective.num_terms))
    for _ in range(num_steps):
        current, metrics = step(current, parallel.shard(batch, num_devices=num_shares))
    return jax.device_get((current, metrics))


def vmapped(step):
    return jax.jit(jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=(None, None)))


def test_one_and_two_devices_give_the_same_result():
    config = runs.config_of(CONFIG, **{"augmentation.crop_padding": 1})
    one, two = after_steps(config, 1, vmapped), after_steps(config, 2, parallel.parallelize)
    chex.assert_trees_all_close(one, two, rtol=DEVICE_RTOL, atol=DEVICE_ATOL)


def test_the_loss_is_cross_entropy_plus_weighted_bits():
    """The gradient of a step by hand, from the functions of the model, against the metrics that the step reports."""
    plain_descent = {"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.clip_norm": 0.0}
    config = runs.config_of(CONFIG, **plain_descent, **{"classifier.label_smoothing": 0.1})
    _, start, (images, labels) = setup(config)
    _, metrics = after_steps(config, 1, vmapped, num_steps=1)
    spec = density_spec(config, load_source("digits"))
    key_length, key_examples = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key_examples, i), 4))(jnp.arange(len(images)))
    x = density.to_continuous(spec, keys[:, 0], jnp.asarray(images))
    estimator = config.logdet.build().fix_length(key_length)
    constrain = build_constraint(config.constraint, spec.flow, training=True)

    def terms(params):
        weights = constrain(params, start.spectral).weights
        bits = density.objective(spec, density.log_prob(spec, weights, params["prior"], x, keys[:, 1], estimator).log_prob)
        log_p = density.class_log_probs(spec, weights, params["prior"], x)
        entropy = classifier.cross_entropy(log_p, jnp.asarray(labels), label_smoothing=0.1)
        return jnp.stack([entropy.mean(), bits.mean()])

    (entropy, bits), by_term = jax.jit(lambda params: (terms(params), jax.jacrev(terms)(params)))(start.params)
    gradients = jax.tree.map(lambda g: g[0] + 4.0 * g[1], by_term)
    np.testing.assert_allclose(metrics["cross_entropy"], entropy, rtol=SAME)
    np.testing.assert_allclose(metrics["bits_per_dim"], bits, rtol=SAME)
    np.testing.assert_allclose(metrics["loss"], entropy + 4.0 * bits, rtol=SAME)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-4)
    assert metrics["bits_weight"] == 4.0  # initial_weight, at step 0
    of_kernels = by_term["stage0"]["blocks"]["conv0"]["kernel"][0]  # the cross-entropy reaches the network
    assert float(jnp.linalg.norm(of_kernels)) > 0.1


def test_augmentation_changes_what_is_classified_and_not_the_likelihood(config):
    before = after_steps(config, 1, vmapped, num_steps=1)[1]
    after = after_steps(runs.config_of(CONFIG, **{"augmentation.crop_padding": 3}), 1, vmapped, num_steps=1)[1]
    np.testing.assert_allclose(before["bits_per_dim"], after["bits_per_dim"], rtol=SAME)
    assert abs(before["cross_entropy"] - after["cross_entropy"]) > 1e-3


def test_weight_goes_from_the_first_to_the_last_in_a_straight_line(config):
    weight = hybrid.make_weight(config.hybrid)
    assert [float(weight(step)) for step in (0, 1, 4, 100)] == [4.0, 3.5, 2.0, 2.0]
    assert float(hybrid.make_weight(HybridConfig(weight=2.0, initial_weight=4.0))(0)) == 2.0


def test_training_improves_both_and_logs_both(workdir):
    records = read_metrics(workdir)
    first, last = (record for record in records if record["split"] == "validation")
    assert last["bits_per_dim"] < first["bits_per_dim"]
    assert last["cross_entropy"] < first["cross_entropy"]
    trains = [record for record in records if record["split"] == "train"]
    assert [record["bits_weight"] for record in trains] == [3.75, 2.75, 2.0, 2.0]  # means over two steps
    assert {"loss", "bits_per_dim", "log_prior", "log_det", "cross_entropy", "accuracy", "max_lipschitz"} <= set(trains[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data.name": "moons"}, "a hybrid needs labelled images, and moons has none"),
        ({"constraint.norms": "none"}, "a density needs blocks that are contractions"),
        ({"hybrid.weight": -1.0}, r"config.hybrid.weight must lie in \[0, inf\), got -1.0"),
        ({"augmentation.crop_padding": 9}, "padding must lie in"),
    ],
)
def test_mistakes_are_answered_before_a_workdir_is_claimed(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        loop.train(runs.config_of(CONFIG, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- after training -------------------------------------------------------------------------------------------------


def test_report_holds_likelihood_and_error(trained_model, workdir, capsys):
    written = report.write(trained_model)
    labels = trained_model.source.labels("test")
    images = trained_model.source.held_out("test", len(labels), 0)
    x = (images + 0.5) / trained_model.spec.num_levels
    log_p = density.class_log_probs(trained_model.spec, trained_model.weights, trained_model.prior, jnp.asarray(x, jnp.float32))
    assert written["classification"]["num_errors"] == int((np.argmax(log_p, axis=1) != labels).sum())
    assert written["classification"]["num_examples"] == len(labels)
    assert 0 < written["bits_per_dim"]["mean"] < 5
    said = report.describe(written, workdir)
    assert "bits/dim" in said
    assert "test error" in said
    page = (workdir / "report.html").read_text()
    assert all(text in page for text in ("Test bits per dimension", "Test error", "Samples of each class"))
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert "bits/dim" in out
    assert "test error" in out


def test_samples_of_a_class_from_the_command_line(trained_model, workdir, capsys):
    assert main(["sample", "--workdir", str(workdir), "--num", "3", "--label", "7"]) == 0
    expected = sample.draw(trained_model, 3, labels=[7, 7, 7]).values
    np.testing.assert_array_equal(np.load(workdir / "samples.npy"), expected)
    assert (sample.draw(trained_model, 3, labels=[1, 1, 1]).values != expected).any()
    capsys.readouterr()
    assert main(["sample", "--workdir", str(workdir), "--label", "10"]) == 2
    assert "there is no class 10: classes are 0 to 9" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a label for each of 3 samples"):
        sample.draw(trained_model, 3, labels=[1])


def test_a_frozen_hybrid_is_the_same_in_one_file(trained_model, workdir, capsys):
    assert main(["freeze", "--workdir", str(workdir)]) == 0
    capsys.readouterr()
    loaded = frozen.load(workdir)
    images = trained_model.source.held_out("test", 8, 0)
    x = density.cell_centers(trained_model.spec, jnp.asarray(images))
    expected = density.class_log_probs(trained_model.spec, trained_model.weights, trained_model.prior, x)
    np.testing.assert_allclose(loaded.class_log_probs(jnp.asarray(images)), expected, rtol=SAME, atol=SAME)
    samples, info = loaded.sample(jax.random.key(0), 2, labels=jnp.array([3, 4]))
    assert samples.shape == (2, 8, 8, 1)
    assert bool(info.converged.all())


def test_scores_of_other_images_know_of_classes(trained_model):
    scores = ood.compare(trained_model, "noise", num=64)["scores"]
    assert set(scores) == {"likelihood", "typicality", "confidence"}
    sides = trained_model.source.held_out("test", 64, 0), ood.others(trained_model, "noise", 64)
    posteriors = [jax.nn.softmax(bayes(trained_model, images)) for images in sides]
    inside, outside = (-np.asarray(posterior.max(axis=1), np.float64) for posterior in posteriors)
    np.testing.assert_allclose(scores["confidence"]["auroc"], ood.auroc(inside, outside), atol=1e-3)


def bayes(loaded, images):
    """Logits of the classes of images, step by step."""
    x, _ = density.transform(loaded.spec, (jnp.asarray(images) + 0.5) / loaded.spec.num_levels)
    z = model.bijection(loaded.spec.flow, loaded.weights).forward(x)
    return density.log_prior_by_class(loaded.spec, loaded.prior, z)


@pytest.mark.parametrize("objective", ["density", "classification"])
def test_labels_are_refused_in_a_sentence_by_models_without_priors_of_classes(tmp_path, objective, capsys):
    short = {"objective": objective, "training.total_steps": 2, "training.eval_every_steps": 2}
    loop.train(runs.config_of(CONFIG, **short), tmp_path)
    assert main(["sample", "--workdir", str(tmp_path), "--label", "1"]) == 2
    assert {"density": "one prior for all", "classification": "has no samples"}[objective] in capsys.readouterr().err
