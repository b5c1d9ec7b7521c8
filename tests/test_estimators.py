"""The scikit-learn estimators: scikit-learn's own checks, and what users rely on."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.datasets import make_blobs
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import iresnet_jax as ir
from iresnet_jax.estimators import (
    ResidualFlowClassifier,
    ResidualFlowDensity,
    ResidualFlowDetector,
)

SAME = 1e-12  # no program may see another shape, so only the host's float64 may differ
ROUNDED = 1e-4  # float32 by another route

# One small program for each number of features: no shape depends on the number of samples.
TINY = {
    "steps": 2,
    "architecture": (ir.StageSpec(num_blocks=1, hidden=(4,)),),
    "random_state": 0,
    "settings": {"batch_size": 2},
}


TINY_DETECTOR = {"minutes": 0.02, "random_state": 0}  # the likeliest start, as nothing trains


@pytest.mark.slow
@parametrize_with_checks(
    [
        ResidualFlowDensity(**TINY),
        ResidualFlowClassifier(**TINY),
        ResidualFlowDetector(**TINY_DETECTOR),
    ]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def correlated(num=400, seed=0):
    """A normal density of three features with correlations of 0.9, and its samples."""
    density = scipy.stats.multivariate_normal(
        [5.0, -2.0, 100.0], 4 * (0.1 * np.eye(3) + 0.9 * np.ones((3, 3)))
    )
    return density, density.rvs(num, random_state=seed)


@pytest.fixture(scope="module")
def density():
    return ResidualFlowDensity(**TINY).fit(correlated()[1])


@pytest.fixture(scope="module")
def blobs():
    x, y = make_blobs(120, centers=2, n_features=2, random_state=3)
    return x, np.array(["ham", "spam"])[y]


@pytest.fixture(scope="module")
def classifier(blobs):
    return ResidualFlowClassifier(**TINY).fit(*blobs)


def test_a_density_of_correlated_data_beats_a_standard_normal_and_is_near_the_true_one(density):
    true, x = correlated(1000, seed=1)
    scores = density.score_samples(x)
    standard = (
        scipy.stats.norm.logpdf(StandardScaler().fit_transform(x)).sum(axis=1)
        - np.log(x.std(axis=0)).sum()
    )
    assert density.score(x) == pytest.approx(scores.mean())
    assert density.score(x) > standard.mean() + 1
    # two steps from a normal one
    assert density.score(x) == pytest.approx(true.logpdf(x).mean(), abs=0.3)
    np.testing.assert_allclose(
        density.model_.log_prob(x.astype(np.float32)), scores, atol=10 * ROUNDED
    )
    x[1] = 1e308  # as far as float64 reaches
    far = density.score_samples(x)
    assert far[1] == -np.inf
    assert np.all(np.isfinite(np.delete(far, 1)))


def test_samples_follow_the_density(density):
    true, _ = correlated()
    x = density.sample(2000, random_state=0)
    np.testing.assert_array_equal(density.sample(2000, random_state=0), x)
    assert not np.array_equal(density.sample(3), density.sample(3))
    np.testing.assert_allclose(x.mean(axis=0), true.mean, atol=0.4)
    np.testing.assert_allclose(np.cov(x.T), true.cov, atol=1.0)


@pytest.mark.parametrize("method", ["score_samples", "predict_proba"])
def test_a_score_does_not_depend_on_the_batch(method, density, classifier, blobs):
    estimator, x = (
        (density, correlated(300)[1])
        if method == "score_samples"
        else (classifier, np.tile(blobs[0], (3, 1)))
    )
    score = getattr(estimator, method)
    whole = score(x)
    np.testing.assert_allclose(score(x[::-1])[::-1], whole, rtol=SAME)
    np.testing.assert_allclose(
        np.concatenate([score(x[i : i + 1]) for i in (0, 17, 299)]), whole[[0, 17, 299]], rtol=SAME
    )


def test_features_on_a_grid_are_counted():
    """A die: the log-probability of each face, a bound that is near log(1/6), the same in every
    batch.
    """
    x = np.random.RandomState(0).randint(1, 7, size=(600, 1)).astype(float)
    flow = ResidualFlowDensity(**TINY | {"steps": 60}).fit(x)
    assert flow.model_.spec.cells is not None
    faces = np.arange(1.0, 7.0)[:, None]
    assert flow.score_samples(x).mean() == pytest.approx(-np.log(6), abs=0.25)
    np.testing.assert_allclose(
        flow.score_samples(faces[2:3]), flow.score_samples(faces)[2:3], rtol=SAME
    )
    assert len(set(flow.score_samples(np.repeat(faces, 3, axis=0)))) == 6
    samples = flow.sample(1000, random_state=0)[:, 0]
    assert set(range(1, 7)) <= set(samples)
    assert np.all(samples == np.rint(samples))
    assert np.isfinite(flow.score_samples([[0.0], [7.0], [2.5]])).all()


def test_a_classifier_separates_two_blobs(classifier, blobs):
    x, y = blobs
    assert classifier.classes_.tolist() == ["ham", "spam"]
    assert classifier.score(x, y) == 1
    proba = classifier.predict_proba(x)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=SAME)
    assert np.mean(proba[np.arange(len(x)), (y == "spam").astype(int)]) > 0.95
    np.testing.assert_allclose(
        np.exp(classifier.model_.class_log_probs(x.astype(np.float32))), proba, atol=ROUNDED
    )
    with pytest.raises(ValueError, match="sample 1 is so far from"):
        classifier.predict(np.stack([x[0], np.full(x.shape[1], 1e30)]))


def test_whitening_within_classes():
    residuals, classes = correlated(400)[1], np.arange(400) % 2
    shifted = residuals + 10 * np.outer(classes, [1, -1, 0])
    residuals -= np.stack([residuals[classes == label].mean(axis=0) for label in (0, 1)])[classes]
    for given, is_white in ((residuals, True), (None, False)):
        whitened = np.linalg.solve(np.asarray(ir.Whiten.fit(shifted, given).factor), residuals.T)
        # Up to the shrinkage of correlations.
        assert np.allclose(np.cov(whitened, bias=True), np.eye(3), atol=0.05) == is_white


def people(num, seed):
    """Rows of a data frame whose height tells most of the weight."""
    rng = np.random.default_rng(seed)
    height = rng.normal(170, 10, num)
    columns = {
        "city": rng.choice(["Bern", "Oslo"], num),
        "smoker": rng.uniform(size=num) < 0.3,
        "age": rng.integers(18, 90, num),
        "share": rng.integers(0, 5, num) / 2,
        "height": height,
        "weight": height - 100 + 2 * rng.normal(size=num),
        "blood": pd.Categorical(rng.choice(["A", "B"], num), ["A", "B"]),
    }
    return pd.DataFrame(columns)


@pytest.fixture(scope="module")
def detector():
    return ResidualFlowDetector(**TINY_DETECTOR, calibration_fraction=0.4).fit(people(500, 0))


ODD = {
    "city": "Rome",
    "smoker": 7,
    "age": 1000,
    "share": 0.3,
    "height": -1e300,
    "weight": np.finfo(float).max,
    "blood": "C",
}


@pytest.mark.parametrize("column", ODD)
def test_an_unseen_value_is_rare_and_no_error(detector, column):
    rows = people(8, 1)
    odd = rows.astype({column: object}).assign(**{column: ODD[column]})
    if column in ("age", "height", "share", "weight"):
        odd = odd.astype({column: float})
    scores = detector.score_samples(odd)
    assert np.all(np.isfinite(scores))
    assert np.all(scores < detector.score_samples(rows) - 2)
    assert np.isfinite(detector.decision_function(odd)).all()


def test_p_values_are_ranks_among_rows_held_out(detector):
    scores = detector.calibration_scores_
    assert len(scores) == 200
    rows = people(50, 2)
    p_values = detector.p_values(rows)
    expected = [(1 + np.sum(scores <= own)) / 201 for own in detector.score_samples(rows)]
    np.testing.assert_allclose(p_values, expected, rtol=SAME)
    np.testing.assert_array_equal(detector.predict(rows, alpha=0.2) == -1, p_values <= 0.2)
    far = detector.p_values(rows.assign(height=-1e5))
    np.testing.assert_allclose(far, 1 / 201, rtol=SAME)


@pytest.mark.parametrize("alpha", [0.5, 0.1])
def test_false_alarms_are_as_rare_as_stated(detector, alpha):
    """The rate is a draw of a Beta distribution, given the rows that calibrate."""
    num = int(201 * alpha)
    low, high = scipy.stats.betabinom(4000, num, 201 - num).ppf([5e-4, 1 - 5e-4]) / 4000
    rate = np.mean(detector.p_values(people(4000, 3)) <= alpha)
    assert low <= rate <= high
    in_sample = np.mean(detector.score_samples(people(500, 0)) <= detector.offset_)
    assert in_sample == pytest.approx(detector.contamination, abs=0.002)


def test_discoveries_are_those_of_benjamini_and_hochberg(detector):
    rows = pd.concat([people(90, 4), people(30, 5).assign(height=300.0)], ignore_index=True)
    p_values = np.sort(detector.p_values(rows))
    cut = max(p for rank, p in enumerate(p_values, 1) if p <= 0.1 * rank / len(rows))
    found = detector.discoveries(rows, 0.1)
    np.testing.assert_array_equal(found, detector.p_values(rows) <= cut)
    assert found[90:].all()
    assert found[:90].mean() < 0.2


def test_an_explanation_names_the_column(detector):
    rows = people(3, 6)
    rows.loc[0, "weight"] = rows.loc[0, "height"] - 85  # by itself a usual weight
    rows.loc[1, "city"] = "Rome"
    found = detector.explain(rows)
    assert found.gains.shape == (3, 7)
    assert set(np.array(found.names)[np.argsort(-found.gains[0])[:2]]) == {"height", "weight"}
    assert found.names[found.gains[1].argmax()] == "city"
    assert "city = Rome" in str(found).splitlines()[1]
    assert str(found).count("\n") == 2
    assert [text.get_text() for text in found.plot().axes[0].get_xticklabels()] == list(found.names)


def test_a_gain_is_that_of_the_mean_density_when_the_column_is_drawn_anew(detector):
    row = people(1, 7)
    drawn = pd.concat([row] * 64).assign(age=detector.quantiles_[:, 2])
    mean = np.exp(detector.score_samples(drawn)).mean()
    expected = np.log(mean) - detector.score_samples(row)[0]
    assert detector.explain(row).gains[0, 2] == pytest.approx(expected, abs=1e-6)
