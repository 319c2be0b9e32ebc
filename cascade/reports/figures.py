"""Figures of a report as inline SVG that follows the page's light or dark theme.

Matplotlib draws with stand-in colours; `to_svg` swaps each for a CSS variable of the page, so one picture serves both
themes. Text stays text: it scales, can be selected and read aloud.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from cascade.reports.data import CurvePoint, TrialRow
from cascade.reports.summary import MODELS, TierRow
from cascade.scoring.statistics import Score

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
BASE, MODIFIER, COMPRESSED = "#050505", "#060606", "#070707"
TIERS = ("#080808", "#090909", "#0a0a0a")
BAD = "#0b0b0b"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    BASE: "--base",
    MODIFIER: "--modifier",
    COMPRESSED: "--compressed",
    TIERS[0]: "--tier1",
    TIERS[1]: "--tier2",
    TIERS[2]: "--tier3",
    BAD: "--bad",
}
_MODEL_COLOURS = dict(zip(MODELS, (BASE, MODIFIER, COMPRESSED), strict=True))
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDTH = 5.2
"""Inches. Narrow, so that the text is still readable when a phone shrinks the picture to its screen."""


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element without size, ids of its own, and theme variables for colours.

    Args:
        label: what a screen reader says; also keeps the ids of two figures on one page apart.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    return re.sub(
        r'<svg([^>]*?) height="[^"]*"([^>]*?) width="[^"]*"|<svg([^>]*?) width="[^"]*"([^>]*?) height="[^"]*"',
        lambda m: f'<svg role="img" aria-label="{label}"' + "".join(g or "" for g in m.groups()),
        svg,
        count=1,
    )


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    return figure, figure.add_subplot(facecolor="none")


@mpl.rc_context(_STYLE)
def accuracy(groups: Mapping[str, Mapping[str, Score]], label: str) -> str:
    """Horizontal bars with 95 % intervals, one group of three (base, modifier, compressed) per row.

    Args:
        groups: row name -> model -> score. Rows are drawn in order, top to bottom.
    """
    figure, axes = _figure(0.9 + 0.55 * max(1.8, len(groups)))
    for row, scores in enumerate(groups.values()):
        for place, model in enumerate(m for m in MODELS if m in scores):
            s, y = scores[model], row + 0.26 * (place - 1)
            axes.barh(y, s.accuracy, height=0.24, color=_MODEL_COLOURS[model], label=model if row == 0 else None)
            axes.plot([s.low, s.high], [y, y], color=INK, linewidth=1)
            axes.text(s.high + 0.01, y, f"{s.accuracy:.0%}", va="center", fontsize=8, color=INK)
    names = [f"{name} ({next(iter(scores.values())).n})" for name, scores in groups.items()]
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=3, labelcolor=INK)
    return to_svg(figure, label)


def _band(axes: Axes, x: tuple[float, float], left: tuple[float, float], right: tuple[float, float], c: str) -> None:
    """A flow between two edges, each given as its lower and upper end."""
    middle = (x[0] + x[1]) / 2
    points = [(x[0], left[0]), (middle, left[0]), (middle, right[0]), (x[1], right[0]), (x[1], right[1])]
    points += [(middle, right[1]), (middle, left[1]), (x[0], left[1]), (x[0], left[0])]
    codes = [Outline.MOVETO, *[Outline.CURVE4] * 3, Outline.LINETO, *[Outline.CURVE4] * 3, Outline.CLOSEPOLY]
    axes.add_patch(PathPatch(Outline(points, codes), facecolor=c, alpha=0.3, linewidth=0))


@mpl.rc_context(_STYLE)
def tier_flow(tiers: Sequence[TierRow]) -> str:
    """Failures flow into the tiers; what a tier settles leaves to the right, the rest climbs to the next.

    The settled parts are stacked in the order of the tiers, so no two flows cross.
    """
    figure, axes = _figure(3.2)
    total = max(1, tiers[0].tasks_in if tiers else 1)
    gap, width, end = 0.09 * total, 0.09, float(len(tiers))
    settled = 0
    for place, t in enumerate(tiers):
        colour, x, floor = TIERS[place % 3], float(place), settled + place * gap
        axes.add_patch(Rectangle((x, floor), width, max(t.tasks_in, 0.004 * total), color=colour, linewidth=0))
        if t.settled:
            _band(axes, (x + width, end), (floor, floor + t.settled), (floor, floor + t.settled), colour)
            axes.add_patch(Rectangle((end, floor), width, t.settled, color=colour, linewidth=0))
        last = place == len(tiers) - 1
        if t.escalated:
            left, step = (floor + t.settled, floor + t.tasks_in), 1 if not last else 0
            right = (left[0] + gap, left[1] + gap)
            colour = BAD if last else TIERS[(place + 1) % 3]
            _band(axes, (x + width, x + 1), left, right if step or last else left, colour)
            if last:
                axes.add_patch(Rectangle((end, right[0]), width, t.escalated, color=BAD, linewidth=0))
        note = f"tier {t.tier}\n{t.tasks_in} in"
        axes.text(x, floor + t.tasks_in + 0.02 * total, note, fontsize=9, va="bottom", color=INK)
        axes.text(end + 0.14, floor + t.settled / 2, f"{t.settled}\n{t.settled / total:.1%}", fontsize=9, va="center")
        settled += t.settled
    if tiers and tiers[-1].escalated:
        y = settled + len(tiers) * gap + tiers[-1].escalated / 2
        text = f"{tiers[-1].escalated} unsolved"
        axes.text(end + 0.14, y, text, fontsize=9, va="center", color=BAD)
    axes.set_xlim(-0.05, end + 0.75)
    axes.set_ylim(-0.02 * total, total * 1.22 + len(tiers) * gap)
    axes.axis("off")
    return to_svg(figure, "Failures flow into the tiers")


@mpl.rc_context(_STYLE)
def cost(tiers: Sequence[TierRow], single_usd: float) -> str:
    """What the tiers cost, stacked, against the last tier answering every failure."""
    figure, axes = _figure(1.9)
    left = 0.0
    for place, t in enumerate(tiers):
        axes.barh(0, t.cost_usd, left=left, height=0.55, color=TIERS[place % 3], label=f"tier {t.tier}")
        left += t.cost_usd
    axes.barh(1, single_usd, height=0.55, color=BASE, label="last tier alone")
    for y, value in enumerate((left, single_usd)):
        text = f"${value:,.4f}" if value < 1 else f"${value:,.2f}"
        axes.annotate(text, (value, y), (5, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    axes.set_yticks([0, 1], ["three tiers", "one teacher"], color=INK)
    axes.set_ylim(1.5, -0.5)
    axes.set_xlim(0, 1.25 * max(left, single_usd, 1e-9))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"${x:g}"))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=4, labelcolor=INK)
    return to_svg(figure, "Cost against a single teacher")


@mpl.rc_context(_STYLE)
def loss_curve(curve: Sequence[CurvePoint]) -> str:
    """Training loss per step, with the held-out loss where it was measured."""
    figure, axes = _figure(2.6)
    axes.plot([p.step for p in curve], [p.loss for p in curve], color=MODIFIER, linewidth=1.3, label="training")
    held = [(p.step, p.validation_loss) for p in curve if p.validation_loss is not None]
    if held:
        steps, losses = zip(*held, strict=True)
        axes.plot(steps, losses, color=COMPRESSED, marker="o", markersize=4, linewidth=1.3, label="held out")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", labelcolor=INK)
    return to_svg(figure, "Training loss")


def pareto_front(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Trials than which no other is both smaller and better, by rising size."""
    front: list[TrialRow] = []
    for trial in sorted(trials, key=lambda t: (t.bytes, t.loss)):
        if not front or trial.loss < front[-1].loss:
            front.append(trial)
    return front


@mpl.rc_context(_STYLE)
def pareto(trials: Sequence[TrialRow], limit_bytes: float | None) -> str:
    """Size against held-out loss of every recipe tried; the chosen one is marked, the size limit drawn."""
    figure, axes = _figure(2.9)
    unit, name = (1e6, "MB") if max(t.bytes for t in trials) >= 1e6 else (1e3, "kB")
    axes.scatter([t.bytes / unit for t in trials], [t.loss for t in trials], s=26, color=MUTED, label="tried")
    front = pareto_front(trials)
    axes.plot([t.bytes / unit for t in front], [t.loss for t in front], color=MODIFIER, linewidth=1.2, label="best")
    for t in trials:
        if t.chosen:
            axes.scatter([t.bytes / unit], [t.loss], s=130, marker="*", color=COMPRESSED, label="chosen", zorder=3)
    if limit_bytes is not None:
        axes.axvline(limit_bytes / unit, color=BAD, linewidth=1.2, linestyle="--", label="size limit")
    axes.set_xlabel(f"size on disk ({name})")
    axes.set_ylabel("held-out loss (nats)")
    axes.margins(0.12)
    figure.legend(loc="outside upper left", ncols=4, labelcolor=INK)
    return to_svg(figure, "Size against loss of the recipes tried")


@mpl.rc_context(_STYLE)
def reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Confidence against the share that was right, per candidate, with 95 % intervals.

    Args:
        bins: candidate -> bins with `confidence`, `accuracy`, `low`, `high`, `n`.
    """
    figure, axes = _figure(3.2)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
    colours = (BASE, MODIFIER, COMPRESSED, *TIERS)
    for place, (candidate, rows) in enumerate(bins.items()):
        colour = colours[place % len(colours)]
        x, y = [b["confidence"] for b in rows], [b["accuracy"] for b in rows]
        axes.plot(x, y, marker="o", markersize=4, color=colour, linewidth=1.3, label=candidate)
        axes.vlines(x, [b["low"] for b in rows], [b["high"] for b in rows], color=colour, linewidth=1, alpha=0.6)
    axes.set_xlabel("the router's confidence")
    axes.set_ylabel("share that was right")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="upper left", labelcolor=INK)
    return to_svg(figure, "Reliability of the router")
