"""The style of all figures, and their encoding for a page that may be light or dark.

Figures are made without pyplot and ``rcParams``, so they need no display, share no state and can be drawn in threads. Their
background is transparent. An SVG shows everything of the colour ``INK`` in the text colour of the reader's scheme. A PNG keeps
its colours: ``MIDTONE`` is legible on light and dark pages.
"""

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2a2f36"  # text and axes
MIDTONE = "#727b87"  # contrast above 4:1 on white and on near-black
BLUE, ORANGE, PLUM = "#3f83d1", "#de7c22", "#b0479b"  # distinct to readers with the common colour deficiencies


def to_svg_or_png(figure: "Figure", *, max_bytes: int = 200_000) -> str:
    """Encodes a figure as a data URI: SVG for curves, PNG for images.

    An SVG above the size limit becomes a PNG on white. A PNG above it is drawn at fewer dots per inch, 50 at the least.

    Args:
        max_bytes: Limit of the size before base64 adds a third; the default keeps a page of five figures below 1.5 MB.

    Returns:
        ``data:image/svg+xml;base64,...`` or ``data:image/png;base64,...``.

    Example:
        >>> to_svg_or_png(figure(width=1.0, height=1.0))[:19]
        'data:image/svg+xml;'
    """
    has_pictures = any(axes.images for axes in figure.axes)
    if not has_pictures:
        svg = _themed(rendered(figure, "svg", dpi=160, ground="none").decode()).encode()
        if len(svg) <= max_bytes:
            return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    png = b""
    for dpi in (180, 120, 80, 50):
        png = rendered(figure, "png", dpi=dpi, ground="none" if has_pictures else "white")  # INK would vanish on a dark page
        if len(png) <= max_bytes:
            break
    return "data:image/png;base64," + base64.b64encode(png).decode()


def rendered(figure: "Figure", kind: str, *, dpi: int, ground: str) -> bytes:
    """A figure as a file of the kind "svg" or "png" on a ground, without the date of the rendering."""
    file = io.BytesIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    figure.savefig(file, format=kind, dpi=dpi, facecolor=ground, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _themed(svg: str) -> str:
    """Gives everything drawn in INK the text colour of the reader's light or dark scheme."""
    dark = "@media(prefers-color-scheme:dark){svg{color:#d8dde4}}"
    head, tag, body = svg.partition("<defs>")
    style = f"<style>svg{{color:{INK};color-scheme:light dark}}{dark}</style>"
    return head + style + tag + body.replace(INK, "currentColor")


def figure(*, width: float, height: float, row_gap: float | None = 0.04) -> "Figure":
    """Makes a figure, with sizes in inches; its axes leave room for their labels unless ``row_gap`` is None."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = None if row_gap is None else ConstrainedLayoutEngine(h_pad=row_gap)
    return Figure(figsize=(width, height), layout=layout)


def label(axes: "Axes", x: str, y: str, *, title: str = "", size: int = 9, ink: str = INK) -> None:
    """Labels axes and draws their frame, grid and ticks in the style of all figures."""
    axes.set_xlabel(x, size=size, color=ink)
    axes.set_ylabel(y, size=size, color=ink)
    axes.set_title(title, size=size, color=ink, loc="left")
    axes.tick_params(labelsize=size - 1, labelcolor=ink, color=MIDTONE, length=3)
    axes.grid(visible=True, color=MIDTONE, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MIDTONE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(size=size - 2, color=ink)


def legend(axes: "Axes", **options: Any) -> Any:
    """Adds a legend without a frame."""
    return axes.legend(frameon=False, fontsize=8, labelcolor=INK, **options)


def colorbar(figure: Any, shown: Any, axes: list[Any], *, label: str, extend: str = "neither") -> None:
    """Adds a slim colour bar in MIDTONE."""
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02, extend=extend)
    bar.set_label(label, size=8, color=MIDTONE)
    bar.ax.tick_params(labelsize=7, labelcolor=MIDTONE, color=MIDTONE, length=2)
    bar.ax.yaxis.get_offset_text().set(size=7, color=MIDTONE)
    bar.outline.set_visible(False)
