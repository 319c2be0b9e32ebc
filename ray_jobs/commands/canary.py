"""`cascade canary`: the versions of a domain's modifier, and what share of its requests each answers."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from cascade import modifiers
from cascade.config import Config
from cascade.errors import ConfigError
from cascade.store import Store


def canary(config: Config, version: str | None, weight: float | None, promote: bool) -> None:
    """Give a version a share of the requests, or all, if one is named; print all versions.

    Raises:
        CascadeError: there is no such version, or it is not said what to do with it.
    """
    store = Store(config.storage)
    if (version is not None) != (promote or weight is not None) or (promote and weight is not None):
        raise ConfigError("give VERSION with either --weight or --promote; `cascade canary CONFIG` shows the versions")
    if version is not None and promote:
        modifiers.set_current(store, config.domain, version)
        modifiers.end_canary(store, config.domain)
    elif version is not None and weight is not None:
        modifiers.set_canary(store, config.domain, version, weight)
    Console().print(_versions_table(store, config.domain))


def _versions_table(store: Store, domain: str) -> Table:
    """The versions of a domain's modifier, and what share of its requests each answers."""
    current, tried = modifiers.current(store, domain), modifiers.canary(store, domain)
    table = Table(title=f"{domain}: versions", title_justify="left")
    for heading in ("version", "created", "disk MB", "compressed score", "requests"):
        table.add_column(heading, justify="left" if heading in ("version", "created") else "right")
    for found in modifiers.list_modifiers(store, domain):
        share = tried.share if tried is not None and tried.version == found.version else 0.0
        if current is not None and current.version == found.version:
            share = 1.0 if tried is None or share else 1 - tried.share
        score = found.scores.get("compressed")
        created = datetime.fromtimestamp(found.created, UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        said = "" if score is None else f"{score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}]"
        table.add_row(found.version, created, f"{found.disk_bytes / 1e6:.2f}", said, f"{share:.0%}")
    table.caption = "created in UTC"
    return table
