"""A surface in three dimensions, quiet enough for print."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.cli import style

if TYPE_CHECKING:
    from dynprobe.cli.figure_planes import Scale


def plot_surface(
    ax: Any, x: np.ndarray, y: np.ndarray, values: np.ndarray, scale: Scale, labels: tuple[str, str]
) -> None:
    """Draw `values` `(len(y), len(x))` as a surface coloured by height, with holes where not finite."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    z = np.clip(np.where(np.isfinite(values), values, np.nan), scale.low, scale.high)
    height = np.log10(z) if scale.log else z
    low, high = np.log10([scale.low, scale.high]) if scale.log else (scale.low, scale.high)
    colours = scale.cmap(scale.norm(np.ma.masked_invalid(z)))
    ax.plot_surface(
        *np.meshgrid(x, y),
        height,
        facecolors=_shaded(colours, (height - low) / (high - low)),
        rcount=100,
        ccount=100,
        shade=False,
        linewidth=0,
        antialiased=False,
        rasterized=True,  # thousands of polygons would show hairlines and weigh megabytes
    )
    ax.set_zlim(low, high)
    ax.zaxis.set_major_locator(MaxNLocator(4, integer=bool(scale.log and high - low > 2)))
    ax.zaxis.set_major_formatter(
        FuncFormatter(lambda v, _: style.number(float(f"{10**v:.2g}") if scale.log else v))
    )
    _dress_box(ax, labels)


def _shaded(colours: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Colours a little darker on slopes that face away from the light, so that a surface has relief."""
    from matplotlib.colors import LightSource

    n_y, n_x = height.shape
    filled = np.where(np.isfinite(height), height, 0.0)
    light = LightSource(azdeg=300, altdeg=50).hillshade(filled, dx=1.5 / n_x, dy=1.5 / n_y)
    out = colours.copy()
    out[..., :3] *= 0.75 + 0.25 * light[..., None]
    return out


def _dress_box(ax: Any, labels: tuple[str, str]) -> None:
    """Three-dimensional axes with thin lines, few ticks and labels close to them."""
    from matplotlib.ticker import MaxNLocator

    for axis, text in ((ax.xaxis, labels[0]), (ax.yaxis, labels[1]), (ax.zaxis, "")):
        axis._axinfo["grid"].update(linewidth=0.3, color=style.PALE)
        axis.set_pane_color((1, 1, 1, 0))
        axis.line.set_linewidth(0.5)
        axis.set_tick_params(pad=-4, labelsize=5)
        axis.labelpad = -10
        axis.set_label_text("\n".join(textwrap.wrap(text.replace("\n", " "), 20)), fontsize=5)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(style.number)
    ax.patch.set_visible(False)  # it would cover the labels of its neighbours
    ax.view_init(elev=30, azim=-55)
    ax.set_box_aspect((1, 1, 0.75), zoom=1.0)
