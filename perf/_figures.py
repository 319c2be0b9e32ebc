"""A figure as the last line of every script here has it: {"value": …, "target": …, "met": true or false}."""

from __future__ import annotations

from typing import Any

Figure = dict[str, Any]
Figures = dict[str, Figure]


def figure(value: float | str, target: float | str | None = None, met: bool = True, **more: Any) -> Figure:
    """A value, to six significant digits; without a target there is nothing to miss."""
    shown = float(f"{value:.6g}") if isinstance(value, float) else value
    return {"value": shown, "target": target, "met": bool(met), **more}


def at_most(value: float, target: float, **more: Any) -> Figure:
    return figure(value, target, value <= target, **more)


def at_least(value: float, target: float, **more: Any) -> Figure:
    return figure(value, target, value >= target, **more)
