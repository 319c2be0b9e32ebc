"""The templates of all pages, without what draws figures: every process loads the page of a pipeline at work."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from cascade.reports.console import SMALLEST_P, duration, megabytes, points


def environment() -> Environment:
    """The templates, with the filters for their figures; everything that is put in is escaped."""
    made = Environment(
        loader=PackageLoader("cascade.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": lambda x: f"{x:.1%}",
        "points": points,
        "megabytes": megabytes,
        "duration": duration,
        "usd": usd,
        "p": lambda p: f"{p:.2g}" if p >= SMALLEST_P else f"< {SMALLEST_P:.0e}",
        "count": lambda n: f"{n:,}",
        "interval": lambda bounds: f"{bounds[0]:.1%} – {bounds[1]:.1%}",
    }
    return made


def usd(value: float) -> str:
    """Dollars with the digits that small runs need."""
    return f"${value:,.4f}" if value < 1 else f"${value:,.2f}"
