"""Where a density starts: the code length of test images when pixels are independent, by two histograms of the training data.

    python benchmarks/equalization.py [--data digits mnist fashion_mnist] [--quick]

The baseline is the histogram over all pixels; beside it every pixel's own share of the commonest level (see `equalize`).
"""

import math

import jax.numpy as jnp
import numpy as np
from _record import parser, table, write

from iresnet_jax import data
from iresnet_jax.bijections.transforms.equalize import WEIGHT_OF_ALL, Equalize, entry_shares, level_frequencies
from iresnet_jax.models import priors

ALPHA = 1e-9  # the logit behind the histogram and the logistic prior cancel up to this


def bits(images, num_levels, equalize):
    """The mean code length of images under a histogram, in bits/dim: it does not depend on the noise in a cell."""
    x = (jnp.asarray(images, jnp.float32) + 0.5) / num_levels
    y, log_det = equalize.forward_and_logdet(x)
    y = y.reshape(len(y), -1)
    log_prior = priors.log_prob("logistic", priors.standard("logistic", y.shape[1]), y)
    log_prob = np.asarray(log_prior, np.float64) + np.asarray(log_det, np.float64)
    return math.log2(num_levels) - float(log_prob.mean()) / (y.shape[1] * math.log(2))


def measure(name, num):
    """Both code lengths of a data set's test images."""
    found = data.load(name)
    levels = found.num_levels
    if levels is None:
        raise SystemExit(f"error: {name} are points, which have no histogram: name data sets of images")
    train, test = found.examples["train"], found.examples["test"][:num]
    frequencies = level_frequencies(train, levels)
    shares = {"all": None, "entrywise": entry_shares(train, frequencies)}
    lengths = {how: bits(test, levels, Equalize(frequencies, own, ALPHA)) for how, own in shares.items()}
    return {"data": name, "num_examples": len(test), **lengths, "ratio": lengths["entrywise"] / lengths["all"]}


def main():
    options = parser(__doc__)
    options.add_argument("--data", nargs="+", default=["digits", "mnist", "fashion_mnist"], metavar="NAME", help="data sets")
    arguments = options.parse_args()
    results = [measure(name, 100 if arguments.quick else None) for name in arguments.data]
    rows = [(row["data"], f"{row['all']:.4f}", f"{row['entrywise']:.4f}", f"{row['ratio']:.3f}") for row in results]
    print(table(rows, ("test images, bits/dim", "all pixels alike", "by their own share", "ratio")))
    write("equalization", arguments, {"weight_of_all": WEIGHT_OF_ALL}, results)


if __name__ == "__main__":
    main()
