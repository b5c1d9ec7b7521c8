"""The report of a training run as one HTML page that needs nothing else: no server, no script, no network.

Every headline number says what it means and on what grounds it stands: *measured* on this run's data, *estimated* from a
sample, *guaranteed* by a bound, or *conditional* on a Lipschitz constant that was estimated and not certified.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from iresnet_jax.report import claims
from iresnet_jax.report.markup import Html, document, duration, join, number, signed, table, tag, uncertain

# key -> (alternative text, caption) of the figures the page has a place for.
FIGURES = {
    "learning_curves": (
        "Curves of the objective against training step and wall-clock time, with its terms in small panels.",
        "Training values are noisy one-batch estimates, the line is their running median. The log-determinant used "
        "while training may be cut short, so only the number above, from the evaluation, is the result.",
    ),
    "samples": (
        "Samples drawn from the model.",
        "Samples drawn from the prior and mapped through the inverse; not selected.",
    ),
    "samples_by_class": (
        "Samples drawn from the model, a row of them of each class.",
        "Samples of each class (the first ten), by row: from its own prior, mapped through the inverse; not selected.",
    ),
    "density": (
        "Map of the model's density over the plane.",
        "Density of the model over the plane; the colour scale ends at the 99.5 % quantile.",
    ),
    "reconstructions": (
        "Test images above their reconstructions, with maps of the absolute error.",
        "Test images, the same images after encoding and inverting, and the absolute difference, with the largest error "
        "of each below.",
    ),
    "confusion": (
        "Confusion matrix of the test images.",
        "Test images of each class, by row, and what they were taken for, by column. Colour is the share of a class, on a log "
        "scale.",
    ),
    "mistakes": (
        "Test images that were mistaken.",
        "The first of the test images that were mistaken: the class, and what each was taken for.",
    ),
    "error_histogram": (
        "Histogram of inversion errors and of their bounds over the test examples.",
        "Spread of the inversion errors over the test examples, Euclidean and in float64. A bound that holds lies right of "
        "its error.",
    ),
    "lipschitz": (
        "Bar chart of the Lipschitz estimate of every block, with certified bounds and target.",
        "Estimates approach the true constant from below. Only a certified bound below 1 proves that a block is invertible.",
    ),
}

SAMPLED = ("samples", "samples_by_class", "density")
PICTURES = (*SAMPLED, "confusion", "mistakes")


def render(report: Mapping[str, Any], figures: Mapping[str, str], *, title: str) -> str:
    """Writes the report of a run as one self-contained HTML page.

    Anything missing is left out with a sentence saying so. Beside the warnings of the report, the page states
    contradictions it can see itself: a likelihood below the entropy of the data, an error above its bound, a block whose
    Lipschitz constant is not below 1.

    Args:
        report: Results of a run; every key is optional. ``bits_per_dim`` (images) or ``nll`` (toys, in nats): ``mean``,
            ``stderr``, ``stderr_data``, ``stderr_probes``, ``stderr_dequantisation``, ``truncation_bound``,
            ``num_examples``, ``num_probes``, ``num_dequantisations``, ``estimator``; and ``classification``: ``error``,
            ``interval``, ``confidence``, ``num_errors``, ``num_examples``, ``loss``. Bounds are taken to rest on the
            certified Lipschitz bounds where every block has one, and are called conditional otherwise.
            ``entropy_floor`` in nats. ``inverse``: ``max_abs_error``, ``max_euclidean_error``, ``max_error_bound``,
            ``fraction_within_bound``, ``fraction_converged``, ``mean_evals``, and ``refined``, the same in float64.
            ``lipschitz``: ``max_block``, ``model_bounds`` (``forward``, ``inverse``), and ``blocks``, a list of
            ``name``, ``target``, ``estimate``, ``bound`` or None, and ``layers``, by name the same three. ``train``: ``steps``,
            ``seconds_per_step``, ``compile_seconds``, ``total_seconds``. ``environment``, ``config``: any nesting; published
            numbers to compare with are read from
            ``config["reference"]``, name to number. ``warnings``: sentences.
        figures: Data URIs by the names in ``FIGURES``; other names are shown at the end.
        title: Heading of the page.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        ValueError: If a figure is not an image data URI.

    Example:
        >>> page = render({"bits_per_dim": {"mean": 1.0623, "stderr": 0.0021}}, {}, title="MNIST")
        >>> "1.0623 ± 0.0021" in page
        True
    """
    for name, uri in figures.items():
        if not uri.startswith("data:image/"):
            raise ValueError(f"figure {name!r} must be an image data URI, got {uri[:40]!r}: encode it with to_svg_or_png")
    no_samples = None if "classification" in report and not report.get("bits_per_dim") else "No samples were drawn."
    sections = {
        "Result": _result(report),
        "Learning curves": _shown(figures, "learning_curves") or "No training or validation records yet.",
        "Mistakes": _shown(figures, "confusion", "mistakes", side_by_side=True),
        "Samples": _shown(figures, *SAMPLED, side_by_side=sum(name in figures for name in SAMPLED) > 1) or no_samples,
        "Inversion": _inversion(report, figures),
        "Lipschitz constants": _lipschitz(report, figures),
        "Time": _time(report.get("train")),
        "Environment": _environment(report.get("environment")),
        "Configuration": _configuration(report.get("config")),
    }
    sections = {name: content for name, content in sections.items() if content is not None}
    if more := [name for name in figures if name not in FIGURES]:
        sections["More figures"] = _shown(figures, *more)
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = tag("nav", *(tag("a", name, href=f"#{ids[name]}") for name in sections), aria_label="Sections")
    header = tag("header", tag("h1", title), tag("p", _subtitle(report), class_="soft"), links)
    body = [
        tag("section", tag("h2", name), content if isinstance(content, Html) else _note(content), id=ids[name])
        for name, content in sections.items()
    ]
    return str(document(header, tag("main", _warnings(report), *body), _footer(), title=title))


def _result(report: Mapping[str, Any]) -> Html:
    """Tiles of the headline numbers, then where the uncertainty comes from and what to compare with."""
    key, unit = claims.objective(report)
    likelihood = report.get(key)
    if "classification" in report and not likelihood:
        return _accuracy(report)
    tiles = _likelihood_tiles(likelihood, key, unit, certified=claims.is_certified(report)) if likelihood else []
    if "classification" in report:
        tiles += _accuracy_tiles(report["classification"])
    tiles += _inverse_tile(report) + _lipschitz_tile(report)
    parts = [] if likelihood else [_note("The likelihood of the test data has not been evaluated yet.")]
    if tiles:
        parts.append(tag("div", *tiles, class_="tiles"))
    if likelihood:
        tables = [_uncertainty(likelihood, unit), _comparison(report, likelihood, unit)]
        parts.append(tag("div", *(t for t in tables if t), class_="columns"))
    return join(parts)


def _accuracy(report: Mapping[str, Any]) -> Html:
    """Tiles of a classifier's headline numbers, then what to compare with."""
    result = report["classification"]
    tiles = _accuracy_tiles(result) + _inverse_tile(report) + _lipschitz_tile(report)
    parts = [tag("div", *tiles, class_="tiles")]
    error = {"mean": 100 * result["error"]}
    if comparison := _comparison(report, error, "% error"):
        parts.append(tag("div", comparison, class_="columns"))
    return join(parts)


def _accuracy_tiles(result: Mapping[str, Any]) -> list[Html]:
    """The error with its interval, and the cross-entropy."""
    low, high = (100 * end for end in result["interval"])
    confidence = f"{100 * result['confidence']:.0f} %"
    meaning = (
        f"Test images whose most likely class is wrong: {number(result['num_errors'])} of {number(result['num_examples'])}. "
        f"Other test images would give {low:.2f} to {high:.2f} % ({confidence} interval of Wilson). Lower is better."
    )
    tiles = [_tile("Test error", f"{100 * result['error']:.2f} %", "of the images", "measured", meaning)]
    meaning = "Mean code length of a test image's class, without label smoothing. Confident mistakes weigh most."
    return [*tiles, _tile("Cross-entropy", number(result["loss"]), "nats", "measured", meaning)]


def _likelihood_tiles(result: Mapping[str, Any], key: str, unit: str, *, certified: bool) -> list[Html]:
    """The likelihood with its standard error, and beside it the part of the error that no average removes."""
    meaning = {
        "bits_per_dim": "Code length of the test data, from a mean over examples. Random dequantisation makes it, in "
        "expectation, an upper bound of the discrete code length. Lower is better.",
        "nll": "Negative log-likelihood of fresh test points, a mean over examples. It cannot go below the entropy of "
        "the data. Lower is better.",
    }[key]
    if result.get("estimator"):
        meaning += f" Log-determinant: {result['estimator']}."
    name = {"bits_per_dim": "Test bits per dimension", "nll": "Test negative log-likelihood"}[key]
    tiles = [_tile(name, uncertain(result.get("mean"), result.get("stderr")), unit, "estimated", meaning)]
    bound = result.get("truncation_bound")
    if bound is None:
        return tiles
    meaning = (
        "The log-determinant is exact, so the likelihood has no truncation bias."
        if bound == 0
        else "What the sure terms of the log-determinant can miss at most, either way. An unbiased estimator draws the rest at "
        "random; a biased one leaves it out. Not part of the ±: more examples do not shrink it, more terms do."
    )
    grounds = "guaranteed" if certified or bound == 0 else "conditional"
    return [*tiles, _tile("Truncation bound", f"≤ {number(bound, 2)}" if bound else "0", unit, grounds, meaning)]


def _inverse_tile(report: Mapping[str, Any]) -> list[Html]:
    """The largest inversion error and its bound."""
    inverse = report.get("inverse") or {}
    error, bound = inverse.get("max_abs_error"), inverse.get("max_error_bound")
    if error is None and bound is None:
        return []
    meaning = (
        "Largest absolute difference, over all pixels of the examples tried, between an input and the inverse of its code."
    )
    if bound is not None and not bound < math.inf:
        meaning += " No bound holds, as not every block is a contraction."
    elif bound is not None:
        holds = "guaranteed" if claims.is_certified(report) else "if the estimated Lipschitz constants are right"
        meaning += f" The residual of the solver bounds the error by {number(bound, 2)} ({holds}, up to rounding)."
    return [_tile("Inversion error", number(error, 2), "input units", "measured", meaning)]


def _lipschitz_tile(report: Mapping[str, Any]) -> list[Html]:
    """The largest block constant: proven when every block has a bound, otherwise said to be an estimate."""
    lipschitz = report.get("lipschitz") or {}
    blocks = lipschitz.get("blocks") or ()
    if not blocks:
        return []
    meaning = "Largest Lipschitz constant of a residual branch, as a product of its layers' norms. "
    value, grounds = number(max(block["estimate"] for block in blocks)), "estimated"
    if claims.is_certified(report):
        bound = max(block["bound"] for block in blocks)
        meaning += f"Certified, from above; power iteration, from below, gives {value}. "
        meaning += "Below 1, so every block is invertible." if bound < 1.0 else "Not below 1: invertibility is not proven."
        value, grounds = f"≤ {number(bound)}", "guaranteed"
    else:
        meaning += "Power iteration approaches norms from below: a value below 1 suggests, and does not prove, invertibility."
    return [_tile("Largest Lipschitz constant", value, "of a block", grounds, meaning)]


def _uncertainty(result: Mapping[str, Any], unit: str) -> Html | None:
    """Splits the standard error into its sources, with the share of the variance each has."""
    sources = (
        ("test examples", "stderr_data", "num_examples"),
        ("log-det probes", "stderr_probes", "num_probes"),
        ("dequantisation", "stderr_dequantisation", "num_dequantisations"),
    )
    known = [(name, result[key], result.get(count)) for name, key, count in sources if result.get(key) is not None]
    if not known:
        return None
    variance = sum(stderr**2 for _, stderr, _ in known)
    rows = [
        (name, number(count), number(stderr, 2), _share(stderr**2 / variance if variance > 0 else 0.0))
        for name, stderr, count in known
    ]
    if result.get("stderr") is not None:
        rows.append(("together", "", number(result["stderr"], 2), Html("")))
    header = ("source", "drawn", "standard error", "variance")
    return table(header, rows, caption=f"Where the ± comes from, in {unit}, and its share of the variance.")


def _comparison(report: Mapping[str, Any], result: Mapping[str, Any], unit: str) -> Html | None:
    """This run beside published numbers and, for toys, the entropy that no model can beat."""
    rows: list[tuple[object, ...]] = [("this run", uncertain(result.get("mean"), result.get("stderr")), "")]
    known = dict((report.get("config") or {}).get("reference") or {})
    if claims.entropy_floor(report) is not None:
        known["entropy floor"] = claims.entropy_floor(report)
    for name, value in known.items():
        is_number = isinstance(value, numbers.Real) and result.get("mean") is not None
        gap = signed(result["mean"] - value, 3, plus=True) if is_number else ""
        rows.append((name, value, gap))  # the digits as published
    if len(rows) == 1:
        return None
    caption = "Beside known numbers; above zero, this run is worse."
    return table(("model", unit, "difference"), rows, caption=caption)


def _inversion(report: Mapping[str, Any], figures: Mapping[str, str]) -> Html | str:
    """How well the inverse works: the pictures, then the solver's own account."""
    shown = _shown(figures, "reconstructions", "error_histogram")
    inverse = report.get("inverse")
    if not inverse:
        return shown or "The inverse has not been evaluated."
    refined = inverse.get("refined")
    quantities = (
        ("largest absolute error", "max_abs_error", "measured, in input units"),
        ("largest Euclidean error", "max_euclidean_error", "measured, of an example"),
        ("largest error bound", "max_error_bound", "from the solver's residuals |y - x - g(x)|, times L / (1 - L)"),
        ("errors within their bound", "fraction_within_bound", "example by example"),
        ("examples converged", "fraction_converged", "within the solver's budget"),
        ("examples recovered", "fraction_recovered", "to 1e-4, whatever the bounds promise"),
        ("largest padding residual", "max_padding_residual", "Euclidean norm of what should be zeros"),
        ("evaluations of g", "mean_evals", "mean a block and example"),
    )
    columns = [inverse, refined] if refined else [inverse]
    rows = [
        (name, *(_inverse_number(column, key) for column in columns), meaning)
        for name, key, meaning in quantities
        if inverse.get(key) is not None
    ]
    header = ("quantity", "as trained", "in float64", "meaning") if refined else ("quantity", "value", "meaning")
    account = table(header, rows, caption="Fixed-point inverse of the whole model.")
    return join((shown or "", tag("div", account, class_="words narrow")))


def _inverse_number(inverse: Mapping[str, Any], key: str) -> str:
    """A fraction as percent, anything else to two or three digits."""
    value = inverse.get(key)
    if value is not None and key.startswith("fraction"):
        return f"{100 * value:.4g} %"
    return number(value, 3 if key == "mean_evals" else 2)


def _lipschitz(report: Mapping[str, Any], figures: Mapping[str, str]) -> Html | str:
    """The chart and the table of every block's layer norms, product and bound."""
    lipschitz = report.get("lipschitz") or {}
    shown = _shown(figures, "lipschitz")
    blocks: Sequence[Mapping[str, Any]] = lipschitz.get("blocks") or ()
    if not blocks:
        return shown or "The Lipschitz constants have not been measured."
    rows: list[tuple[object, ...]] = []
    for i, block in enumerate(blocks):
        name = block.get("name", f"block {i}")
        for layer, norm in (block.get("layers") or {}).items():
            rows.append((f"{name}/{layer}", *(_limit(norm, key) for key in ("target", "estimate", "bound"))))
        rows.append((tag("strong", name), *(_limit(block, key) for key in ("target", "estimate", "bound"))))
    caption = (
        "Every layer's norm and, in the block's own row, their product: the target, what power iteration finds from below, "
    )
    caption += "and the certified bound from above."
    listing = table(("block and layer", "target", "estimate", "certified bound"), rows, caption=caption)
    summary = tag("summary", f"Every block ({len(blocks)})")
    return join((shown or "", _whole_model(lipschitz), tag("details", summary, listing, open=len(blocks) <= 12)))


def _whole_model(lipschitz: Mapping[str, Any]) -> Html | str:
    """What the blocks' bounds say about the model from data to latents."""
    bounds = lipschitz.get("model_bounds")
    if not bounds:
        return ""
    rows = [
        ("from data to latents", number(bounds.get("forward"), 3)),
        ("from latents to data", number(bounds.get("inverse"), 3)),
    ]
    caption = "Bounds of the whole model's Lipschitz constants: products of every block's worst case, which no input attains."
    return tag("div", table(("map", "Lipschitz constant at most"), rows, caption=caption), class_="narrow")


def _limit(row: Mapping[str, Any], key: str) -> Html | str:
    """One entry of the table of Lipschitz constants, empty where there is none."""
    value = row.get(key)
    return _bound(value) if key == "bound" else "" if value is None else number(value)


def _time(train: Mapping[str, Any] | None) -> Html | str:
    """Step, compile and total time."""
    if not train:
        return "No training times were recorded."
    rows = [
        ("steps", number(train.get("steps"))),
        ("time per step", duration(train.get("seconds_per_step"))),
        ("compilation", duration(train.get("compile_seconds"))),
        ("total", duration(train.get("total_seconds"))),
    ]
    return tag("div", table(("quantity", "value"), rows, caption="Wall-clock time of training."), class_="narrow")


def _environment(environment: Mapping[str, Any] | None) -> Html | str:
    """Versions, devices and commit, as given."""
    if not environment:
        return "The environment was not recorded."
    rows = [(name, tag("code", _leaf(value))) for name, value in environment.items()]
    return tag("div", table(("item", "value"), rows, caption="What this ran with."), class_="words narrow")


def _configuration(config: Mapping[str, Any] | None) -> Html | str:
    """The configuration as a tree that starts folded."""
    if not config:
        return "The configuration was not recorded."
    return tag("details", tag("summary", "Every setting of this run"), tag("div", _tree(config), class_="tree"))


def _tree(config: Mapping[str, Any]) -> Html:
    """Nested mappings as nested lists that fold."""
    items = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            items.append(tag("li", tag("details", tag("summary", tag("b", key)), _tree(value), open=True)))
        else:
            items.append(tag("li", tag("b", key), ": ", _leaf(value)))
    return tag("ul", *items)


def _warnings(report: Mapping[str, Any]) -> Html:
    """The report's warnings and the contradictions visible in its numbers."""
    found = [*report.get("warnings", ()), *claims.contradictions(report)]
    if not found:
        return Html("")
    items = tag("ul", *(tag("li", sentence) for sentence in found))
    return tag("aside", tag("strong", "Read this first"), items, role="note", aria_label="Warnings")


def _shown(figures: Mapping[str, str], *names: str, side_by_side: bool = False) -> Html | None:
    """The figures of these names that exist, or None."""
    parts = []
    for name in names:
        if name not in figures:
            continue
        alternative, caption = FIGURES.get(name, (name.replace("_", " "), name.replace("_", " ")))
        kind = "picture" if name in PICTURES else "chart"
        image = tag("img", src=figures[name], alt=alternative, class_=kind)
        parts.append(tag("figure", tag("div", image, class_="wide"), tag("figcaption", caption)))
    if side_by_side:
        parts = [tag("div", *parts, class_="columns")]
    return join(parts) if parts else None


def _tile(name: str, value: str, unit: str, grounds: str, meaning: str) -> Html:
    """One headline number: name, value, on what grounds it stands, and what it means."""
    line = tag("div", tag("span", unit), tag("span", grounds, class_=f"badge {grounds}"), class_="unit")
    return tag("div", tag("h3", name), tag("div", value, class_="value"), line, tag("p", meaning), class_="tile")


def _share(fraction: float) -> Html:
    """A percentage with a bar."""
    bar = tag("span", tag("i", style=f"width:{100 * fraction:.1f}%"), class_="bar", aria_hidden="true")
    return join((f"{100 * fraction:.0f} %", bar))


def _bound(bound: float | None) -> str:
    return "none" if bound is None else number(bound) + ("" if bound < 1.0 else " (not below 1)")


def _subtitle(report: Mapping[str, Any]) -> str:
    """One line on what was run where."""
    steps = (report.get("train") or {}).get("steps")
    environment = report.get("environment") or {}
    facts = [f"{number(steps)} training steps" if steps is not None else ""]
    facts += [
        label + _leaf(environment[name]) for name, label in (("devices", ""), ("commit", "commit ")) if name in environment
    ]
    return " · ".join(filter(None, facts)) or "Invertible residual network"


def _leaf(value: object) -> str:
    """A setting as text: lists without Python's quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_leaf(v)}" for k, v in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_leaf, value)) or "[]"
    return str(value)


def _note(sentence: str | None) -> Html:
    return tag("p", sentence or "", class_="soft")


def _footer() -> Html:
    words = (
        ("measured", "computed on the data of this run, as it is"),
        ("estimated", "from a random sample or an iteration; the ± is one standard error"),
        ("guaranteed", "follows from a certified bound, up to floating-point rounding"),
        ("conditional", "would be guaranteed if the estimated Lipschitz constants were certified"),
    )
    lines = [tag("p", tag("span", word, class_=f"badge {word}"), f" {meaning}.") for word, meaning in words]
    return tag("footer", *lines)
