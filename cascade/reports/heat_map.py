"""What compression left of each layer: rows are the blocks, columns the modules; as a picture and for a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cascade.compression.account import LayerShare
from cascade.reports.figures import COMPRESSED, INK, STYLE, WIDTH, to_svg

_ROW, _TALLEST = 0.17, 11.0
"""Inches: of a row, and of all rows together."""
_PALEST = 0.06


@dataclass(frozen=True)
class Heat:
    """Layers in rows and columns.

    Attributes:
        rows: by block, a layer or None for each module.
        pruned: whether any number was pruned; else rank says it all.
    """

    modules: list[str]
    rows: dict[int, list[LayerShare | None]]
    pruned: bool


def heat_rows(layers: Sequence[LayerShare]) -> Heat:
    """Blocks in order, modules as they first come."""
    modules = list(dict.fromkeys(layer.module for layer in layers))
    found = {(layer.block, layer.module): layer for layer in layers}
    blocks = sorted({layer.block for layer in layers})
    rows = {block: [found.get((block, module)) for module in modules] for block in blocks}
    return Heat(modules, rows, any(min(layer.density_a, layer.density_b) < 1 for layer in layers))


@mpl.rc_context(STYLE)
def heat_map(layers: Sequence[LayerShare]) -> str:
    """The rank of every layer and, where numbers were pruned, the share of A's and of B's that is left, in percent."""
    heat = heat_rows(layers)
    full = max(layer.full_rank for layer in layers)
    panels: list[tuple[str, Callable[[LayerShare], float], float]] = [(f"rank, of {full}", lambda c: c.rank, full)]
    if heat.pruned:
        panels.append(("% of A kept", lambda c: 100 * c.density_a, 100))
        panels.append(("% of B kept", lambda c: 100 * c.density_b, 100))
    height = min(_ROW * len(heat.rows), _TALLEST)
    figure = Figure(figsize=(WIDTH, 1.2 + height), layout="constrained", facecolor="none")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (title, value, top) in zip(axes, panels, strict=True):
        _panel(place, heat, value, top, numbers=height / len(heat.rows) > 0.11)
        place.set_title(title, color=INK)
    axes[0].set_ylabel("block")
    return to_svg(figure, "What is left of each layer")


def _panel(axes: Axes, heat: Heat, value: Callable[[LayerShare], float], top: float, *, numbers: bool) -> None:
    """One square per layer, the fuller the darker: from nothing to the largest that there is."""
    values = [value(cell) for cells in heat.rows.values() for cell in cells if cell is not None]
    most = max([*values, 1e-9]) if max(values) < top / 2 else top
    for y, cells in enumerate(heat.rows.values()):
        for x, cell in enumerate(cells):
            if cell is None:
                continue
            shade = _PALEST + (0.9 - _PALEST) * value(cell) / most
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=COMPRESSED, alpha=shade, linewidth=0))
            if numbers:
                axes.text(x, y, f"{value(cell):.0f}", fontsize=5.5, ha="center", va="center", color=INK)
    axes.set_xlim(-0.6, len(heat.modules) - 0.4)
    axes.set_ylim(len(heat.rows) - 0.4, -0.6)
    axes.set_xticks(range(len(heat.modules)), [m.removesuffix("_proj") for m in heat.modules], rotation=90, fontsize=8)
    step = max(1, -(-len(heat.rows) // 40))
    blocks = [str(b) if b >= 0 else "–" for b in heat.rows]
    axes.set_yticks(range(0, len(blocks), step), blocks[::step], fontsize=7)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
