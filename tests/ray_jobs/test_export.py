"""Where an exported data set is said to be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascade.store import Store
from ray_jobs import _export

OPTIONS = "?endpoint_override=127.0.0.1%3A9&scheme=http&region=us-east-1"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths, within their file systems, of what is written."""
    paths: list[str] = []
    kinds = SimpleNamespace(of={}, kinds=[])
    for name, stand_in in {
        "failure_kinds": lambda runs: kinds,
        "dataset_rows": lambda *_: ["row"],
        "write_dataset": lambda store, folder, rows, about: paths.append(store.path(folder)),
        "_provenance": lambda runs: None,
    }.items():
        monkeypatch.setattr(_export, name, stand_in)
    return paths


def runs_in(storage: str) -> Any:
    run = SimpleNamespace(read=lambda table, record: [])
    run.require = lambda: run
    config = SimpleNamespace(domain="sums", tiers=[])
    return SimpleNamespace(train_modifier=run, test_domain=run, config=config, store=Store(storage))


@pytest.mark.parametrize(
    ("storage", "to", "expected"),
    [
        ("/tmp/out", None, "/tmp/out/sums/dataset"),
        ("/tmp/out", "/tmp/elsewhere/sums", "/tmp/elsewhere/sums"),
        ("/tmp/out", "sums", str(Path("sums").absolute())),
        ("/tmp/out", f"s3://bucket/x{OPTIONS}", f"s3://bucket/x/dataset{OPTIONS}"),
        ("/tmp/out", "s3://bucket/x/?region=eu-west-1", "s3://bucket/x/dataset?region=eu-west-1"),
        (f"s3://bucket/team{OPTIONS}", None, f"s3://bucket/team/sums/dataset{OPTIONS}"),
    ],
)
def test_it_is_said_to_be_where_it_was_written(written: list[str], storage: str, to: str | None, expected: str) -> None:
    where, rows = _export.export_dataset(runs_in(storage), to)
    assert (where, rows) == (expected, 1)
    assert written == [Store(where).path().replace("//", "/")]
