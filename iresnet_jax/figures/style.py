"""The style of the figures: curves that differ in colour, dash and marker, on white, at the width of the docs' page.

It adds to `iresnet_jax.report.style`, which has the fonts and axes of all figures.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from iresnet_jax.report import style
from iresnet_jax.report.style import INK, figure, label, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CURVES", "GREY", "INK", "PAGE_WIDTH", "bound", "curve", "figure", "label", "legend", "strip"]

PAGE_WIDTH = 8.0  # inches: labels of 8 and 9 points are read at the width of the docs' page without zooming
GREY = style.MIDTONE

# One curve each: their darkness, dashes and markers differ, so that they can be told apart without colour.
CURVES: tuple[dict[str, Any], ...] = (
    {"color": "#1f4e8c", "linestyle": "-", "marker": "o"},
    {"color": style.ORANGE, "linestyle": (0, (5, 2)), "marker": "s"},
    {"color": style.PLUM, "linestyle": (0, (1, 1.5)), "marker": "^"},
    {"color": "#5c9e6e", "linestyle": (0, (6, 2, 1, 2)), "marker": "D"},
)


def curve(axes: "Axes", which: int, x: Any, y: Any, name: str, **options: Any) -> None:
    """Draws a measured curve in the style of its number in `CURVES`."""
    axes.plot(x, y, label=name, **{**CURVES[which], "linewidth": 1.4, "markersize": 4, **options})


def bound(axes: "Axes", which: int, x: Any, y: Any, name: str) -> None:
    """Draws what bounds a measured curve: thin, without markers, in the curve's colour."""
    axes.plot(x, y, label=name, color=CURVES[which]["color"], linestyle=CURVES[which]["linestyle"], linewidth=0.8)


def strip(axes: "Axes", images: Float[np.ndarray, "n h w c"], name: str) -> None:
    """Draws images in [0, 1] side by side, with a name to the left; what is outside is clipped, what is not finite is black."""
    grey = images if images.shape[-1] == 3 else np.repeat(images[..., :1], 3, axis=-1)
    seen = np.clip(np.nan_to_num(grey, posinf=0.0, neginf=0.0), 0.0, 1.0)
    framed = np.pad(seen, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=1.0)
    axes.imshow(np.concatenate(list(framed), axis=1), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(name, size=7, color=INK, rotation=0, ha="right", va="center")
