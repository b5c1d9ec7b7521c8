"""What a figure is: a drawing and the numbers behind it, and how both become files."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iresnet_jax.atomic_files import replacing
from iresnet_jax.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160  # of the pictures inside of an SVG

Row = Mapping[str, Any]


class Drawing(NamedTuple):
    """A figure.

    Attributes:
        figure: The drawing.
        rows: The numbers behind it, all with the same names; names end in their unit where they have one.
    """

    figure: "Figure"
    rows: Sequence[Row]


def write(drawing: Drawing, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes ``NAME.svg``, which needs no other file, and ``NAME.csv`` into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, table = folder / f"{name}.svg", folder / f"{name}.csv"
    with replacing(svg) as incoming:
        incoming.write_text(_svg(drawing.figure), encoding="utf-8")
    with replacing(table) as incoming, incoming.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(drawing.rows[0]))
        writer.writeheader()
        writer.writerows(drawing.rows)
    return svg, table


def _svg(figure: "Figure") -> str:
    """The same SVG every time, with text that is text."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "iresnet_jax"}):
        return smaller(style.rendered(figure, "svg", dpi=DPI, ground="white").decode())


def smaller(svg: str) -> str:
    """An SVG of matplotlib without what cannot be seen: places to a tenth of a point, one font, no names, no indentation."""
    svg = re.sub(r'="(?!matrix)[^"]*"', lambda attribute: re.sub(r"(\.\d)\d+", r"\1", attribute[0]), svg)  # which scale
    svg = re.sub(r"(font[^\"]*?'DejaVu Sans')(, '[^']*')+", r"\1", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", svg)
