"""Published data sets of random images, and no cache but the one beside the data."""

import pytest
from image_sets import NUM_TEST, NUM_TRAIN, examples


@pytest.fixture(autouse=True)
def _no_other_cache(monkeypatch):
    monkeypatch.delenv("IRESNET_JAX_CACHE_DIR", raising=False)


@pytest.fixture
def mnist_like():
    return examples(NUM_TRAIN, (28, 28)), examples(NUM_TEST, (28, 28), seed=1)


@pytest.fixture
def cifar_like():
    return examples(NUM_TRAIN, (32, 32, 3)), examples(NUM_TEST, (32, 32, 3), seed=1)
