"""Densities inside of NumPyro and under NUTS of BlackJAX."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import moments
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.models.priors import Gaussian

SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32
BOUNDED = dataclasses.replace(kept.GIVEN, transform=ir.Bounded((0.0, -np.inf), (1.0, np.inf)))
KEY = jax.random.key(0)


@pytest.fixture
def numpyro():
    """Imported by the one process that runs this file; it broadcasts implicitly."""
    with jax.numpy_rank_promotion("allow"):
        yield pytest.importorskip("numpyro", reason="NumPyro is not installed")


def run_nuts(numpyro, model, num_samples=1500):
    """Draws of the site "x"; none of them may diverge."""
    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=300, num_samples=num_samples, progress_bar=False
    )
    mcmc.run(KEY, extra_fields=("diverging",))
    assert np.mean(mcmc.get_extra_fields()["diverging"]) < 0.01
    return mcmc.get_samples()["x"]


def test_it_is_a_distribution_of_numpyro(numpyro):
    model = kept.model(kept.GIVEN)
    prior = ir.adapters.to_numpyro(model, context=kept.CONTEXTS)
    assert (prior.batch_shape, prior.event_shape, prior.has_rsample) == ((5,), (2,), True)
    x = prior.sample(KEY, (4,))
    assert x.shape == prior.shape((4,)) == (4, 5, 2)
    np.testing.assert_allclose(prior.log_prob(x), model.log_prob(x, context=kept.CONTEXTS), **SAME)
    of_pytree = jax.jit(lambda prior, x: prior.log_prob(x))(prior, x)
    np.testing.assert_allclose(of_pytree, prior.log_prob(x), **SAME)
    own = model.log_prob(x[2, 3], context=kept.CONTEXTS[3])
    np.testing.assert_allclose(prior.log_prob(x)[2, 3], own, **SAME)
    kept_by_guides = prior.sample_with_intermediates(KEY, (4,))
    np.testing.assert_allclose(prior.log_prob(kept_by_guides[0]), kept_by_guides[1][0], **SAME)
    normal = numpyro.distributions.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    assert type(prior.support) is type(normal.support)  # for mixtures
    assert prior.expand((3, 5)).to_event(1).log_prob(prior.expand((3, 5)).sample(KEY)).shape == (3,)


def test_a_posterior_under_a_conditional_prior_with_bounds_is_that_of_importance_sampling(numpyro):
    model, context = kept.model(BOUNDED), kept.CONTEXTS[0]
    prior = ir.adapters.to_numpyro(model, context=context)
    np.testing.assert_array_equal(prior.support(jnp.array([[0.5, 9.0], [1.5, 0.0]])), [True, False])
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert prior.log_prob(jnp.array([1.5, 0.0])) == -jnp.inf
    one_end = dataclasses.replace(kept.GIVEN, transform=ir.Bounded((0.0, -np.inf), (np.inf, 2.0)))
    support = ir.adapters.to_numpyro(kept.model(one_end), context=context).support
    np.testing.assert_array_equal(
        support(jnp.array([[9.0, -9.0], [-0.1, 0.0], [1.0, 2.1]])), [True, False, False]
    )

    def posterior():
        x = numpyro.sample("x", prior)
        numpyro.sample("seen", numpyro.distributions.Normal(x[0] + x[1], 1.0), obs=0.5)

    samples, _ = model.sample(KEY, 8000, context=context)
    weights = np.exp(-0.5 * np.square(np.asarray(samples).sum(axis=1) - 0.5))
    moments.assert_agree(run_nuts(numpyro, posterior), samples, weights)


def test_a_guide_is_trained_by_gradients_of_its_samples(numpyro):
    """The target's evidence is known; without a flow the bound is .6 nats below."""
    spec = ir.DensitySpec(ir.FlowSpec((2,), (ir.StageSpec(1, (6,), activation="tanh"),)))
    scale = jnp.array([[1.0, 0.0], [0.9, 0.6]])
    params = jax.tree.map(jnp.asarray, kept.random_params(spec.flow))
    start = {"flow": params, "prior": Gaussian(jnp.array([1.0, -1.0]), jnp.zeros(2))}

    def density(parameters):
        return ir.Density(spec, ir.freeze(spec.flow, parameters["flow"]), parameters["prior"])

    def target():
        numpyro.sample(
            "x", numpyro.distributions.MultivariateNormal(jnp.zeros(2), scale_tril=scale)
        )
        numpyro.factor("evidence", 2.0)

    def guide():
        numpyro.sample("x", ir.adapters.to_numpyro(density(numpyro.param("density", start))))

    elbo = numpyro.infer.Trace_ELBO(num_particles=32)
    inference = numpyro.infer.SVI(target, guide, numpyro.optim.Adam(0.03), elbo)
    result = inference.run(KEY, 300, progress_bar=False)
    assert result.losses[0] > -1
    np.testing.assert_allclose(np.mean(result.losses[-30:]), -2.0, atol=0.05)
    before, after = (
        tree["flow"]["stage0"]["blocks"]["dense0"]["kernel"]
        for tree in (start, result.params["density"])
    )
    assert np.abs(after - before).max() > 1e-2


def test_nuts_of_blackjax_and_the_model_s_own_samples_have_the_same_moments():
    blackjax = pytest.importorskip("blackjax", reason="BlackJAX is not installed")
    model = kept.model(kept.POINTS)

    nuts = blackjax.nuts(model.log_prob, step_size=0.6, inverse_mass_matrix=jnp.ones(2))

    @jax.jit
    def run(key):
        def step(state, key):
            state, info = nuts.step(key, state)
            return state, (state.position, info.is_divergent)

        return jax.lax.scan(step, nuts.init(jnp.zeros(2)), jax.random.split(key, 2000))[1]

    draws, is_divergent = run(jax.random.key(0))
    assert jnp.mean(is_divergent) < 0.01
    samples, info = model.sample(jax.random.key(1), 4000)
    assert info.converged.all()
    moments.assert_agree(draws, samples)
