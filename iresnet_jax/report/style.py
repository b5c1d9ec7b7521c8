"""The look of our figures, and their encoding for a page that may be light or dark.

Nothing here touches pyplot or ``rcParams``: figures are built through the object API, with no display, no global state and
safely in threads. Figures are transparent. In SVG, ``INK`` becomes the text colour of the reader's scheme; where pixels are
baked, ``MIDTONE`` reads on both grounds.
"""

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2a2f36"  # text and axes; rewritten to the colour scheme of the reader in SVG
MIDTONE = "#727b87"  # contrast above 4:1 on white and on near-black
BLUE, ORANGE, PLUM = "#3f83d1", "#de7c22", "#b0479b"  # told apart with the common colour deficiencies


def to_svg_or_png(figure: "Figure", *, max_bytes: int = 200_000) -> str:
    """Encodes a figure as a data URI: SVG for curves, PNG for images.

    SVG text and axes follow the light or dark scheme of the reader. A figure over the limit is drawn at fewer
    dots per inch.

    Args:
        figure: A figure of this module, or any other.
        max_bytes: Size aimed for, before base64 adds a third; an SVG above it becomes a PNG on white. The default keeps a
            page of five figures below 1.5 MB.

    Returns:
        ``data:image/svg+xml;base64,...`` or ``data:image/png;base64,...``.

    Example:
        >>> to_svg_or_png(figure(width=1.0, height=1.0))[:19]
        'data:image/svg+xml;'
    """
    pictures = any(axes.images for axes in figure.axes)
    if not pictures:
        svg = _themed(_save(figure, "svg", dpi=160, ground="none").decode())
        if len(svg) <= max_bytes:
            return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    png = b""
    for dpi in (180, 120, 80, 50):
        png = _save(figure, "png", dpi=dpi, ground="none" if pictures else "white")  # INK would vanish on a dark page
        if len(png) <= max_bytes:
            break
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _save(figure: "Figure", kind: str, *, dpi: int, ground: str) -> bytes:
    """Renders to memory, without a date."""
    file = io.BytesIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(file, format=kind, dpi=dpi, facecolor=ground, metadata=metadata)
    return file.getvalue()


def _themed(svg: str) -> str:
    """Lets everything drawn in INK take the colour scheme of the page around it."""
    style = (
        f"<style>svg{{color:{INK};color-scheme:light dark}}@media(prefers-color-scheme:dark){{svg{{color:#d8dde4}}}}</style>"
    )
    head, tag, body = svg.partition("<defs>")
    return head + style + tag + body.replace(INK, "currentColor")


def figure(*, width: float, height: float, row_gap: float | None = 0.04) -> "Figure":
    """A figure whose axes make room for their labels, or fill it without (``row_gap=None``); sizes in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = None if row_gap is None else ConstrainedLayoutEngine(h_pad=row_gap)
    return Figure(figsize=(width, height), layout=layout)


def label(axes: "Axes", x: str, y: str, *, title: str = "", size: int = 9, ink: str = INK) -> None:
    """Applies the house style to axes: quiet frame, light grid, small type."""
    axes.set_xlabel(x, size=size, color=ink)
    axes.set_ylabel(y, size=size, color=ink)
    axes.set_title(title, size=size, color=ink, loc="left")
    axes.tick_params(labelsize=size - 1, labelcolor=ink, color=MIDTONE, length=3)
    axes.grid(visible=True, color=MIDTONE, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MIDTONE)
    axes.xaxis.get_offset_text().set(size=size - 2, color=ink)
    axes.yaxis.get_offset_text().set(size=size - 2, color=ink)


def legend(axes: "Axes", **options: Any) -> Any:
    """A legend without a frame."""
    return axes.legend(frameon=False, fontsize=8, labelcolor=INK, **options)


def colorbar(figure: Any, shown: Any, axes: list[Any], *, label: str, extend: str = "neither") -> None:
    """A slim colour bar in the tone that reads on light and dark."""
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02, extend=extend)
    bar.set_label(label, size=8, color=MIDTONE)
    bar.ax.tick_params(labelsize=7, labelcolor=MIDTONE, color=MIDTONE, length=2)
    bar.ax.yaxis.get_offset_text().set(size=7, color=MIDTONE)
    bar.outline.set_visible(False)
