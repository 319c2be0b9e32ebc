"""A whole pipeline with all its state on an S3 server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from pipelines import check_results, run_cascade, write_config
from stand_in import free_port

from cascade.config import load_config
from cascade.teachers.ledger import Ledger
from ray_jobs._runs import Runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket's URI, on a server of its own."""
    port = free_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(port)
        yield f"s3://cascade-test/team?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1"
    finally:
        server.terminate()
        server.wait(30)


def _make_bucket(port: int) -> None:
    filesystem = pafs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            filesystem.create_dir("cascade-test")
            return
        except OSError:
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.5)


def test_the_whole_pipeline_keeps_its_state_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    config = write_config(tmp_path, storage=bucket)
    finished = run_cascade(config)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert bucket.replace("team?", "team/sums/report.html?") in finished.stdout
    runs = Runs(load_config(config))
    check_results(runs)
    answered = Counter(e.key for e in Ledger(runs.store, "sums").entries() if e.responded)
    assert answered
    assert max(answered.values()) == 1
    again = run_cascade(config)
    assert again.returncode == 0
    assert "done before, reused" in again.stdout
    assert not (tmp_path / "out").exists()
