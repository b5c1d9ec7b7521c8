"""Report of a run as one HTML page that needs nothing else: no server, no script, no network.

Every headline number says what it means and on what grounds it stands: *measured* on the data of the run, *estimated* from a
sample, *guaranteed* by a bound, or *conditional* on Lipschitz constants that are not certified. The words are in
``page.html.jinja``.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

from iresnet_jax.report.contents import Report
from iresnet_jax.report.formatting import duration, number, percent, setting, signed, uncertain


def render(
    report: Report, figures: Mapping[str, str], *, title: str, references: Mapping[str, float | int] | None = None
) -> str:
    """Writes the report of a run as one self-contained HTML page.

    Args:
        figures: Image data URIs by name; ``page.html.jinja`` lists the names.
        references: Published numbers to compare with, by name.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        ValueError: If a figure is not an image data URI.
    """
    for name, uri in figures.items():
        if not uri.startswith("data:image/"):
            raise ValueError(f"figure {name!r} must be an image data URI, got {uri[:40]!r}: encode it with to_svg_or_png")
    return _template().render(
        report=report,
        facts=asdict(report.environment),
        figures=figures,
        title=title,
        references=references or {},
        style=_text("style.css"),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    for write in (number, uncertain, duration, percent, signed, setting):
        environment.filters[write.__name__] = write
    environment.tests["finite"] = math.isfinite
    return environment.from_string(_text("page.html.jinja"))


def _text(name: str) -> str:
    return files("iresnet_jax.report").joinpath(name).read_text(encoding="utf-8")
