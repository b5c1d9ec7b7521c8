"""Report of a run as one HTML page that needs nothing else: no server, no script, no network.

Every headline number says what it means and on what grounds it stands: *measured* on the data of the run, *estimated* from a
sample, *guaranteed* by a bound, or *conditional* on Lipschitz constants that are not certified. The words are in
``page.html.jinja``; the functions of this file write its numbers.
"""

import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from iresnet_jax.report.contents import Report

MINUS = "\N{MINUS SIGN}"  # as wide as a plus sign, unlike a hyphen
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(
    report: Report, figures: Mapping[str, str], *, title: str, references: Mapping[str, float | int] | None = None
) -> str:
    """Writes the report of a run as one self-contained HTML page.

    Args:
        figures: Image data URIs of `to_svg_or_png` by name; ``page.html.jinja`` lists the names.
        references: Published numbers to compare with, by name.
    """
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


def number(value: Any, digits: int = 4) -> str:
    """Writes a number with ``digits`` significant digits, with a power of ten if it is tiny or huge, and an integer in full.

    Example:
        >>> number(60000), number(0.93217), number(1.28e-7, 2)
        ('60,000', '0.9322', '1.3 × 10⁻⁷')
    """
    if value is None:
        return "not recorded"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else MINUS + "∞"
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if not -4 <= power < max(digits, 5):
        return f"{mantissa.replace('-', MINUS)} \N{MULTIPLICATION SIGN} 10{str(power).translate(_SUPERSCRIPTS)}"
    return signed(value, max(digits - 1 - power, 0))


def uncertain(mean: float, stderr: float | None) -> str:
    """Writes ``mean ± stderr``: two significant digits of the error, and the mean to the same decimal place.

    Example:
        >>> uncertain(1.062314, 0.00213), uncertain(1.062314, None)
        ('1.0623 ± 0.0021', '1.062')
    """
    if stderr is None or not (math.isfinite(mean) and math.isfinite(stderr)) or stderr <= 0.0:
        return number(mean) if stderr is None or stderr == 0.0 else f"{number(mean)} ± {number(stderr, 2)}"
    decimals = max(1 - int(f"{stderr:.1e}".split("e")[1]), 0)
    if decimals > 8:
        return f"{signed(mean, 8)} ± {number(stderr, 2)}"
    return f"{signed(mean, decimals)} ± {signed(stderr, decimals)}"


def duration(seconds: Any) -> str:
    """Writes a time in microseconds, milliseconds or seconds below a minute, then in minutes and seconds or hours and minutes.

    Example:
        >>> duration(0.0831), duration(75.0), duration(7384)
        ('83.1 ms', '1 min 15 s', '2 h 3 min')
    """
    if seconds is None or not math.isfinite(seconds) or seconds < 0.0:
        return number(seconds)
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (59.95, 1.0, "s")):
        if seconds < limit:
            return f"{number(float(seconds) * scale, 3)} {unit}"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def percent(fraction: float) -> str:
    """Writes a fraction in percent, with at most four significant digits."""
    return f"{100 * fraction:.4g} %"


def signed(value: float | int, decimals: int, *, plus: bool = False) -> str:
    """Writes a fixed number of decimals, thousands separated by commas; ``plus`` also marks positive numbers."""
    return f"{value:{'+' * plus},.{decimals}f}".replace("-", MINUS)


def setting(value: object) -> str:
    """Writes a setting as words and numbers, without Python's brackets and quotes.

    Example:
        >>> setting({"widths": (61, 67), "bias": True})
        'widths 61, 67, bias True'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {setting(entry)}" for name, entry in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "[]"
    return str(value)
