"""The pipeline on a tiny random base: its jobs submitted to a cluster with all state in a bucket, and out of order."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from pipelines import ROOT, answered, check_results, environment, run_cascade, write_config
from ray.job_submission import JobStatus, JobSubmissionClient
from stand_in import free_port
from sums import own_sums

from cascade.config import load_config
from ray_jobs import JOBS
from ray_jobs._runs import Runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket's URI, on a server of its own."""
    port = free_port()
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
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
        patch.undo()


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


@pytest.fixture(scope="module")
def ray_head(bucket: str) -> Iterator[JobSubmissionClient]:
    """A local Ray head as a user would start it, with the bucket's keys; yields who submits to its job server."""
    port, dashboard = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # its default may belong to another Ray
    command += ["--object-store-memory=200000000", "--disable-usage-stats"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # The jobs share one package of code. Ray keeps it for ten minutes, later for as long as a job runs: it may then be
    # thrown away between the look whether it is still there and the start of the next.
    kept = {"RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_EXPIRATION_S": "3600"}
    head = subprocess.Popen(command, env=environment() | kept, start_new_session=True, **silent)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", environment()["RAY_AUTH_MODE"])
            yield client_of(head, f"http://127.0.0.1:{dashboard}")
    finally:
        head.kill()  # its processes end with it; asked to end them itself, it takes half a minute
        head.wait(60)


def client_of(head: subprocess.Popen[bytes], address: str) -> JobSubmissionClient:
    """Once the head takes jobs: its server is up sooner than the agent that starts them."""
    deadline = time.monotonic() + 120
    while True:
        assert head.poll() is None, "the Ray head did not start"
        try:
            client = JobSubmissionClient(address)
            client.submit_job(entrypoint="true")
            return client
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < deadline, "the Ray head takes no jobs"
            time.sleep(0.5)


def test_every_job_submitted_to_a_cluster_with_all_state_in_a_bucket(
    tmp_path: Path, ray_head: JobSubmissionClient, bucket: str
) -> None:
    tasks = own_sums(tmp_path, levels=3, train=60, validation=24, test=30, general=8)
    config = write_config(tmp_path, storage=bucket, tasks=tasks)
    runs = Runs(load_config(config))
    for job in JOBS:
        command = f"{sys.executable} -m ray_jobs.{job} --config {config}"
        ended, said = submit(ray_head, source_tree(tmp_path, job), command)
        if LOST_PACKAGE in said:
            ended, said = submit(ray_head, source_tree(tmp_path, f"{job} again"), command)
        assert ended == JobStatus.SUCCEEDED, f"{job}: {said[-5000:]}"
        assert runs.run(job).done
    again = run_cascade(config)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert bucket.replace("team?", "team/sums/report.html?") in again.stdout
    assert again.stdout.count("done before, reused") == len(JOBS)
    check_results(runs)
    assert max(answered(runs).values()) == 1
    assert sum(n.endswith(".json") for n in runs.store.list("ledger/sums", recursive=True)) < 64, "not compacted"
    assert not (tmp_path / "out").exists()


LOST_PACKAGE = "may have prematurely been deleted"
"""What Ray says when it has lost a job's package before it began; it asks to submit again with any file changed."""


def submit(client: JobSubmissionClient, tree: Path, command: str) -> tuple[JobStatus, str]:
    """What `ray job submit --working-dir TREE -- COMMAND` does, without a Python of its own: how it ended, and said."""
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(tree)})
    deadline = time.monotonic() + 300
    while not (ended := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)[-3000:]
        time.sleep(0.2)
    return ended, f"{client.get_job_logs(job)}{client.get_job_info(job).message}"


def source_tree(folder: Path, job: str) -> Path:
    """The three packages alone, as a working directory to submit.

    A file tells one job's from the next one's: Ray deletes the package of a finished job, and one that is equal and
    just submitted goes with it.
    """
    tree = folder / "tree"
    if not tree.exists():
        tree.mkdir()
        for package in ("cascade", "ray_jobs", "serve"):
            shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "JOB").write_text(job, encoding="utf-8")
    return tree


def test_job_out_of_order_says_what_is_missing(tmp_path: Path) -> None:
    config = write_config(tmp_path, tasks=own_sums(tmp_path, train=8, validation=8, test=8))
    refused = subprocess.run(
        [sys.executable, "-m", "ray_jobs.generate_tier1", "--config", str(config)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert refused.returncode == 2
    assert "cascade test-domain" in refused.stderr
