"""A `generate_*` job puts the ledger's many small objects together where files cannot be appended to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from cascade.config import check_config
from cascade.tasks import Task
from cascade.teachers.ledger import Ledger, LedgerEntry, compact
from ray_jobs import _generate_tables
from ray_jobs._generate_tables import Tables, settle, so_far
from ray_jobs._results import UNSOLVED
from ray_jobs._runs import Runs


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    where = f"127.0.0.1:{port}"
    filesystem = pafs.S3FileSystem(
        endpoint_override=where, scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    filesystem.create_dir("ledger-test")
    yield f"s3://ledger-test/team-{port}?endpoint_override={where.replace(':', '%3A')}&scheme=http&region=us-east-1"
    server.stop()


@pytest.mark.parametrize("when", ["start", "end"])
def test_small_objects_are_put_together(bucket: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_generate_tables, "compact", partial(compact, at_least=10))
    tier = {"name": "m", "endpoints": [{"base_url": "http://x/v1"}]}
    tier |= {"input_usd_per_million": 1.0, "output_usd_per_million": 1.0}
    tasks = {split: {"sources": [{"benchmark": "jsonl"}]} for split in ("train", "validation", "test")}
    raw = {"domain": "sums", "storage": bucket, "base": {"model": "none"}, "budget_usd": 50.0}
    config = check_config(raw | {"tasks": tasks, "tiers": [tier] * 3})
    runs = Runs(config)
    runs.__dict__.update(base_sha256="none", train_tasks=[], validation_tasks=[], test_tasks=[])
    runs.test_domain.start(config)
    runs.test_domain.write_table(UNSOLVED, Task, [])
    runs.test_domain.finish({})
    ledger = Ledger(runs.store, config.domain)
    for n in range(12):
        ledger.record(LedgerEntry(str(n), config.domain, 1, f"t/{n}", 0, "m", "u", price_usd=0.5, text=f"{n}"))
    ledger.close()
    assert len(_objects(runs)) == 12
    tables = Tables(runs.test_domain, runs.test_domain, runs.generate_tier1, config, 1)
    (so_far if when == "start" else settle)(tables)
    assert len(_objects(runs)) == 1
    again = Ledger(runs.store, config.domain)
    assert again.spent() == pytest.approx(6)
    assert {again.get(str(n)).text for n in range(12)} == {str(n) for n in range(12)}  # type: ignore[union-attr]


def _objects(runs: Runs) -> list[str]:
    return [n for n in runs.store.list(f"ledger/{runs.config.domain}", recursive=True) if n.endswith(".json")]
