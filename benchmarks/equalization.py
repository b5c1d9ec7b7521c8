"""Where a density starts: the code length of test images when pixels are independent, by two histograms of the training data.

    python benchmarks/equalization.py [--data digits mnist fashion_mnist] [--quick]

The baseline is the histogram over all pixels; beside it every pixel's own share of the commonest level (see `histogram`).
"""

import jax.numpy as jnp
import numpy as np
from _record import parser, table, write
from iresnet_jax.training.source import load_source

from iresnet_jax.bijections import equalize as histogram
from iresnet_jax.bijections import likelihood


def bits(images, num_levels, frequencies, shares):
    """The mean code length of images under such a histogram, in bits/dim: it does not depend on the noise in a cell."""
    x = (jnp.asarray(images, jnp.float32) + 0.5) / num_levels
    _, log_det = histogram.equalize_forward_and_logdet(x, frequencies, shares)
    return float(np.asarray(likelihood.bits_per_dim(log_det, x[0].size, num_levels), np.float64).mean())


def measure(name, num):
    """Both code lengths of a data set's test images."""
    images = load_source(name).images
    train, test = images.images["train"], images.images["test"][:num]
    frequencies = histogram.level_frequencies(train, images.num_levels)
    shares = histogram.entry_shares(train, frequencies)
    by_all, by_entry = (bits(test, images.num_levels, frequencies, own) for own in (None, shares))
    return {"data": name, "num_examples": len(test), "all": by_all, "entrywise": by_entry, "ratio": by_entry / by_all}


def main():
    options = parser(__doc__)
    options.add_argument("--data", nargs="+", default=["digits", "mnist", "fashion_mnist"], metavar="NAME", help="data sets")
    arguments = options.parse_args()
    results = [measure(name, 100 if arguments.quick else None) for name in arguments.data]
    rows = [(row["data"], f"{row['all']:.4f}", f"{row['entrywise']:.4f}", f"{row['ratio']:.3f}") for row in results]
    print(table(rows, ("test images, bits/dim", "all pixels alike", "by their own share", "ratio")))
    write("equalization", arguments, {"weight_of_all": histogram.WEIGHT_OF_ALL}, results)


if __name__ == "__main__":
    main()
