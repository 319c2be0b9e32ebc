"""`cascade system`: what base, modifiers and router weigh."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cascade.benchmarks.sources import cache_dir
from cascade.config import Config
from cascade.system import bill


def print_bill(config: Config) -> None:
    """
    Raises:
        ConfigError: see `bill`.
    """
    found = bill(config, cache_dir() / "router")
    table = Table(title="The system", title_justify="left")
    for heading in ("part", "version", "sha256", "disk MB", "resident MB"):
        table.add_column(heading, justify="right" if heading.endswith("MB") else "left")
    for item in found.items:
        figures = (f"{item.disk_bytes / 1e6:.2f}", f"{item.resident_bytes / 1e6:.2f}")
        table.add_row(f"{item.kind} {item.name}", item.version, item.sha256[:12], *figures)
    table.add_section()
    table.add_row("together", "", "", f"{found.disk_bytes / 1e6:.2f}", f"{found.resident_bytes / 1e6:.2f}")
    times = "" if found.loaded == 1 else f"{found.loaded} times "
    table.caption = f"resident: base, router, and {times}the largest modifier, in the type that the base computes in"
    Console().print(table)
