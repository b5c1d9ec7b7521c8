"""What a report says of guaranteed inverses: how many examples, by what theorem, and why where there is none."""

import json

import jax
import kept
import numpy as np
import pytest
from certified_flows import changed
from tiny_runs import ROOT

from iresnet_jax.evaluation import guarantee, inversion, samples
from iresnet_jax.evaluation.inversion import Inversion
from iresnet_jax.evaluation.samples import SampleQuality
from iresnet_jax.json_dataclasses import from_plain, to_plain
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import DensitySpec

JUMPS = DensitySpec(FlowSpec((2,), (StageSpec(2, hidden=(6,), activation="relu"),)))


@pytest.mark.parametrize("spec", [kept.IMAGES, kept.CLASSIFIER], ids=["density", "classifier"])
def test_reconstructions_are_certified_from_the_first(spec):
    images, _ = kept.images(11)
    result = inversion.reconstruct(kept.model(spec), images, 4, 0, num_certified=6)  # of two batches
    found, certificate = result.summary.guarantee, result.certificate
    assert (found.num_examples, found.num_applied, found.reason) == (6, 6, "")
    assert len(result.certified_errors) == 6
    assert np.all(result.certified_errors <= certificate.error_bound)
    assert 0 < found.median_bound <= found.max_bound == certificate.error_bound.max() <= result.trip.error_bound[:6].max()
    assert 0 < found.median_data_bound <= found.max_data_bound < 1e-4
    assert found.fraction_certain > 0.9
    assert "of 6 examples by the theorem for the whole flow" in str(result.summary)


def test_samples_are_certified_where_that_is_asked():
    model = kept.model(kept.IMAGES)
    quality = samples.draw(model, 5, 3, num_certified=4).quality
    assert (quality.guarantee.num_examples, quality.guarantee.num_applied) == (4, 4)
    assert quality.guarantee.max_data_bound < quality.max_error_bound
    assert "guaranteed error of the inverse" in str(quality)
    plain = samples.draw(model, 5, 3).quality
    assert plain.guarantee is None
    assert str(plain) == "samples: the inverse converged for 5 of 5"


def test_where_nothing_is_guaranteed_the_reason_is_said():
    points = np.asarray(jax.random.normal(jax.random.key(0), (3, 2)))
    of_blocks = inversion.reconstruct(kept.model(JUMPS), points, 4, 0, num_certified=2).summary.guarantee
    assert (of_blocks.num_applied, of_blocks.fraction_certain) == (0, None)
    assert "2 examples by the bounds of the blocks, which multiply (slopes of relu jump)" in str(of_blocks)
    assert np.isfinite(of_blocks.max_bound)
    bare = changed(kept.model(kept.POINTS), word="estimated")
    none, certificates = guarantee.bound_inverses(bare, [], 2)
    assert certificates is None
    assert "none, these weights are not certified" in str(none)
    dear, _ = guarantee.bound_inverses(kept.model(kept.POINTS), [], 0)
    assert "none, an example would take about" in str(dear)


def test_the_number_of_examples_follows_from_their_cost():
    small, large = kept.POINTS.flow, FlowSpec((32, 32, 3), (StageSpec(48, hidden=(8,), kernel_sizes=(3, 3)),))
    assert guarantee.affordable(small, 10.0) == guarantee.MOST_EXAMPLES
    assert guarantee.affordable(small, 1e-6) == 1
    assert guarantee.affordable(large, 1e9) == 0


def test_reports_without_a_guarantee_are_still_read():
    old = json.loads((ROOT / "benchmarks/results/digits_density/report.json").read_text())
    old["inverse"].pop("guarantee", None)
    old["samples"].pop("guarantee", None)
    read = from_plain(Inversion, old["inverse"], "inverse")
    assert read.guarantee is None
    assert from_plain(SampleQuality, old["samples"], "samples").guarantee is None
    again = from_plain(Inversion, to_plain(read), "inverse")
    assert again == read
