"""Figures of a report as inline SVG that follows the page's light or dark theme.

Matplotlib draws with stand-in colours; `to_svg` swaps each for a CSS variable of the page, so one picture serves both
themes. Text stays text: it scales, can be selected and read aloud.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from cascade.reports.data import CurvePoint, KindRow, TrialRow, front_of
from cascade.reports.summary import MODELS, TierRow
from cascade.scoring.statistics import Score, wilson

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
STYLE: Any = {
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
    with mpl.rc_context({"svg.hashsalt": label}), warnings.catch_warnings():
        # Text stays text: the browser has the letters that are missing here.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
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


_NAME, _LABEL = 32, 64
"""Letters of a row's name that leave room for its bars, beside them and above."""


def _short(name: str, most: int) -> str:
    """A name in one line, cut off where it is too long; the tables have it whole."""
    line = " ".join(name.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


@mpl.rc_context(STYLE)
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
    names = [f"{_short(name, _NAME)} ({next(iter(scores.values())).n})" for name, scores in groups.items()]
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


@mpl.rc_context(STYLE)
def tier_flow(tiers: Sequence[TierRow]) -> str:
    """Failures flow into the tiers; what a tier settles leaves to the right as examples, the rest climbs to the next.

    The settled parts are stacked in the order of the tiers, so no two flows cross. Tasks sent past a tier pass over
    its bar.
    """
    figure, axes = _figure(3.2)
    total = max(1, tiers[0].tasks_in + tiers[0].skipped if tiers else 1)
    gap, end, settled = 0.09 * total, float(len(tiers)), 0
    axes.add_patch(Rectangle((-0.75, 0), _BAR, total, color=BASE, linewidth=0))
    _band(axes, (-0.75 + _BAR, 0), (0, total), (0, total), BASE)
    axes.text(-0.75, 1.02 * total, f"{total:,}\nfailures", fontsize=9, va="bottom", color=INK)
    for place, t in enumerate(tiers):
        floor, colour = settled + place * gap, TIERS[place % 3]
        _tier_bar(axes, t, float(place), floor, total)
        if t.settled:
            _band(axes, (place + _BAR, end), (floor, floor + t.settled), (floor, floor + t.settled), colour)
            axes.add_patch(Rectangle((end, floor), _BAR, t.settled, color=colour, linewidth=0))
        share = f"{t.settled:,} examples\n{t.settled / total:.1%}"
        axes.text(end + 0.14, floor + t.settled / 2, share, fontsize=9, va="center", color=INK)
        settled += t.settled
        rest = total - settled
        if rest > 0:
            last = place == len(tiers) - 1
            left, target = (floor + t.settled, floor + t.settled + rest), BAD if last else TIERS[(place + 1) % 3]
            _band(axes, (place + _BAR, place + 1), left, (left[0] + gap, left[1] + gap), target)
            if last:
                axes.add_patch(Rectangle((end, left[0] + gap), _BAR, rest, color=BAD, linewidth=0))
                note = f"{rest:,} unsolved"
                axes.text(end + 0.14, left[0] + gap + rest / 2, note, fontsize=9, va="center", color=BAD)
    axes.set_xlim(-0.85, end + 0.95)
    axes.set_ylim(-0.02 * total, total * 1.22 + len(tiers) * gap)
    axes.axis("off")
    return to_svg(figure, "Failures flow into the tiers and out as examples")


_BAR = 0.09


def _tier_bar(axes: Axes, t: TierRow, x: float, floor: float, total: int) -> None:
    """A tier's bar with its number of tasks; those sent past it are a thin flow above."""
    axes.add_patch(
        Rectangle((x, floor), _BAR, max(t.tasks_in, 0.004 * total), color=TIERS[(t.tier - 1) % 3], linewidth=0)
    )
    top = floor + t.tasks_in + t.skipped
    if t.skipped:
        _band(axes, (x, x + _BAR), (top - t.skipped, top), (top - t.skipped, top), MUTED)
    note = f"tier {t.tier}\n{t.tasks_in:,} in" + (f", {t.skipped:,} past" if t.skipped else "")
    axes.text(x, top + 0.02 * total, note, fontsize=9, va="bottom", color=INK)


@mpl.rc_context(STYLE)
def kinds(rows: Sequence[KindRow]) -> str:
    """One bar per kind of failure, stacked by the tier that repaired its tasks; what nobody repaired at the end."""
    shown = rows[:_KINDS_DRAWN]
    figure, axes = _figure(0.8 + 0.5 * max(1.8, len(shown)))
    for y, row in enumerate(shown):
        left = 0
        parts = [(n, TIERS[tier % 3], f"tier {tier + 1}") for tier, n in enumerate(row.settled)]
        for n, colour, label in [*parts, (row.unsolved, BAD, "unsolved")]:
            axes.barh(y, n, left=left, height=0.42, color=colour, label=label if y == 0 else None)
            left += n
        axes.text(0, y - 0.28, _short(row.label, _LABEL), fontsize=9, va="bottom", color=INK)
        axes.annotate(f"{row.failures:,}", (left, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(len(shown) - 0.6, -0.75)
    axes.set_xlim(0, 1.12 * max(1, *(r.failures for r in shown)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("failed tasks")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=4, labelcolor=INK)
    return to_svg(figure, "Kinds of failures by the tier that repaired them")


_KINDS_DRAWN = 16


@mpl.rc_context(STYLE)
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


@mpl.rc_context(STYLE)
def training_curves(curve: Sequence[CurvePoint]) -> str:
    """Small multiples over the steps: loss, accuracy on validation tasks, learning rate, gradient, speed, memory.

    What was not measured has no panel.
    """
    panels = _training_panels(curve)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(WIDTH, 1.55 * rows + 0.2), layout="constrained", facecolor="none")
    for place, (title, draw) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, 2, place + 1, facecolor="none")
        draw(axes)
        axes.set_title(title, fontsize=9, color=INK)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, 1.02 * max(p.step + 1 for p in curve))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if place >= len(panels) - 2:
            axes.set_xlabel("optimiser step", fontsize=8)
    return to_svg(figure, "Training, step by step")


def _training_panels(curve: Sequence[CurvePoint]) -> dict[str, Callable[[Axes], object]]:
    """Title of each panel and what draws it."""
    steps = [p.step + 1 for p in curve]

    def line(values: Sequence[float]) -> Callable[[Axes], object]:
        return lambda axes: axes.plot(steps, values, color=MODIFIER, linewidth=1.1)

    panels: dict[str, Callable[[Axes], object]] = {"loss (nats per token)": lambda axes: _losses(axes, curve)}
    if any(p.answered for p in curve):
        panels["right answers, validation"] = lambda axes: _validation_accuracy(axes, curve)
    panels["learning rate"] = line([p.learning_rate for p in curve])
    norms = [p.gradient_norm if p.gradient_norm is not None else math.nan for p in curve]
    if not all(math.isnan(norm) for norm in norms):
        panels["norm of the gradient"] = line(norms)
    panels["tokens per second"] = line([p.tokens_per_s for p in curve])
    if any(p.memory_bytes for p in curve):
        panels["memory (GB)"] = line([p.memory_bytes / 1e9 if p.memory_bytes else math.nan for p in curve])
    return panels


def _losses(axes: Axes, curve: Sequence[CurvePoint]) -> None:
    axes.plot([p.step + 1 for p in curve], [p.loss for p in curve], color=MODIFIER, linewidth=1.1, label="training")
    held = [(p.step + 1, p.validation_loss) for p in curve if p.validation_loss is not None]
    if held:
        style: Any = {"color": COMPRESSED, "marker": "o", "markersize": 3, "linewidth": 1.1}
        axes.plot(*zip(*held, strict=True), label="held out", **style)
    axes.legend(loc="upper right", labelcolor=INK, fontsize=8)


def _validation_accuracy(axes: Axes, curve: Sequence[CurvePoint]) -> None:
    """Shares with 95 % intervals."""
    found = [(p.step + 1, wilson(p.passed, p.answered)) for p in curve if p.answered]
    steps, scores = zip(*found, strict=True)
    axes.vlines(steps, [s.low for s in scores], [s.high for s in scores], color=COMPRESSED, linewidth=1, alpha=0.6)
    style: Any = {"color": COMPRESSED, "marker": "o", "markersize": 3, "linewidth": 1.1}
    axes.plot(steps, [p.passed / p.answered for p in curve if p.answered], **style)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


@mpl.rc_context(STYLE)
def pareto(trials: Sequence[TrialRow], limit_bytes: float | None) -> str:
    """Size against held-out loss of every recipe tried; the front, the chosen one and the size limit are marked."""
    figure, axes = _figure(2.9)
    unit, name = (1e6, "MB") if max(t.bytes for t in trials) >= 1e6 else (1e3, "kB")
    fitting = [t for t in trials if t.fits and t.share == 1]
    groups: list[tuple[list[TrialRow], str, str, str]] = [
        (fitting, "o", MUTED, "tried"),
        ([t for t in trials if t.fits and t.share < 1], "o", "none", "given up early"),
        ([t for t in trials if not t.fits], "x", BAD, "too large"),
    ]
    for some, marker, face, label in groups:
        if some:
            x, y = [t.bytes / unit for t in some], [t.loss for t in some]
            edge: dict[str, Any] = {"edgecolors": MUTED, "facecolors": face} if marker == "o" else {"color": face}
            axes.scatter(x, y, s=26, marker=marker, label=label, **edge)
    best = front_of(trials)
    if best:
        axes.plot([t.bytes / unit for t in best], [t.loss for t in best], color=MODIFIER, linewidth=1.2, label="best")
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


@mpl.rc_context(STYLE)
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
