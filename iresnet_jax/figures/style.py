"""The look of all figures: curves that differ in darkness, dash and marker, on white, at the width of the docs' page.

It adds to `iresnet_jax.report.style`, which has the fonts and axes of reports.
"""

from collections.abc import Sequence
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
)


def curve(axes: "Axes", which: int, x: Any, y: Any, name: str, **options: Any) -> None:
    """Draws a measured curve in the style of its number in `CURVES`."""
    axes.plot(x, y, label=name, **{**CURVES[which], "linewidth": 1.4, "markersize": 4, **options})


def bound(axes: "Axes", which: int, x: Any, y: Any, name: str) -> None:
    """Draws what bounds a measured curve: thin, without markers, in the curve's colour."""
    curve(axes, which, x, y, name, marker=None, linewidth=0.8)


def strip(axes: "Axes", images: Float[np.ndarray, "n h w c"], name: str, *, captions: Sequence[str] = ()) -> None:
    """Draws images in [0, 1] side by side, with a name to the left; what is outside is clipped, what is not finite is black."""
    grey = images if images.shape[-1] == 3 else np.repeat(images[..., :1], 3, axis=-1)
    seen = np.clip(np.nan_to_num(grey, posinf=0.0, neginf=0.0), 0.0, 1.0)
    framed = np.pad(seen, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=1.0)
    axes.imshow(np.concatenate(list(framed), axis=1), interpolation="none")
    width = framed.shape[2]
    axes.set_xticks([width * i + width / 2 - 1 for i in range(len(captions))], captions)
    axes.set_yticks([])
    axes.tick_params(length=0, pad=2, labelsize=8, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(name, size=8, color=INK, rotation=0, ha="right", va="center")
