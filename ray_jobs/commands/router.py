"""`cascade tune-router`: quality and cost by threshold, and setting it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cascade.benchmarks.sources import cache_dir
from cascade.config import Config
from cascade.errors import ConfigError
from cascade.routing.model import current_report, set_threshold
from cascade.store import Store


def tune_router(config: Config, path: str, threshold: float | None) -> None:
    """Print what each threshold gives; set one, if it is given.

    Args:
        path: of the config, for the command that would train a router.

    Raises:
        CascadeError: there is no router whose thresholds were measured.
    """
    store = Store(config.storage)
    report = current_report(store)
    if not report.get("curve"):
        raise ConfigError(
            f"there is no router with a curve in {store.uri}: train one with `cascade train-router {path}`"
        )
    table = Table(title="The router on held-out queries", title_justify="left")
    for heading in ("threshold", "decided", "to a modifier", "right answers", "interval", "other to base"):
        table.add_column(heading, justify="right")
    for point in report["curve"]:
        quality = point["quality"]
        shares = [f"{x:.1%}" for x in (point["coverage"], point["modifier_share"], quality["value"])]
        table.add_row(
            f"{point['threshold']:.2f}",
            *shares,
            f"[{quality['low']:.1%}, {quality['high']:.1%}]",
            f"{point['other_to_base']:.1%}",
        )
    beside = ", ".join(f"{name} {report['quality'][name]['value']:.1%}" for name in ("base", "best_single", "random"))
    table.caption = f"beside it: {beside}, oracle {report['quality']['oracle']['value']:.1%} (n = {report['queries']})"
    Console().print(table)
    if threshold is not None:
        version = set_threshold(store, cache_dir() / "router", threshold)
        print(f"the threshold is {threshold}, in version {version}")
