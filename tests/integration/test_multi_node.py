"""Several nodes: the head computes nothing, and the node that asks the teachers is killed at work and replaced."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from clusters import add_worker
from pipelines import ROOT, answered, environment, write_config
from ray.cluster_utils import Cluster
from sums import own_sums

from cascade.config import load_config
from cascade.tasks import Verdict
from ray_jobs._runs import Runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def config_of(folder: Path, storage: Path) -> Path:
    """The same domain in a storage of its own, in small blocks, with two teacher actors that take their time."""
    tasks = own_sums(folder, levels=3, train=60, validation=24, test=30)
    config = yaml.safe_load(write_config(folder, storage=str(storage), tasks=tasks).read_text())
    config |= {"clusters": {"enabled": False}, "student": {"max_tokens": 8, "prompts": [{"name": "direct"}]}}
    config["execution"] = {"teacher_actors": 2, "task_block": 8}
    config["tiers"][0]["answer_key"]["latency_ms"] = 400
    path = folder / f"{storage.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, cluster: Cluster, *jobs: str) -> subprocess.Popen[bytes]:
    """Jobs one after the other in a process that joins the cluster."""
    work = "; ".join(f"run_one('{job}', {job}.work, load_config({str(config)!r}))" for job in jobs)
    script = "from ray_jobs import generate_tier1, test_domain; from ray_jobs._context import run_one; "
    script += f"from cascade.config import load_config; {work}"
    command = [sys.executable, "-c", script]
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment() | {"RAY_ADDRESS": cluster.address}, stdout=log, stderr=log
        )


def finish(driver: subprocess.Popen[bytes], config: Path) -> None:
    try:
        assert driver.wait(300) == 0, config.with_suffix(".log").read_text()[-3000:]
    finally:
        driver.kill()


def outcomes(runs: Runs) -> dict[str, tuple[str, str]]:
    return {v.task_id: (v.outcome, v.answer) for v in runs.generate_tier1.read("verdicts", Verdict)}


def test_the_node_of_the_teachers_is_killed_and_replaced(tmp_path: Path, cluster: Cluster) -> None:
    node = add_worker(cluster, num_cpus=2)
    unbroken, broken = (config_of(tmp_path, tmp_path / name) for name in ("unbroken", "broken"))
    finish(start(unbroken, cluster, "test_domain", "generate_tier1"), unbroken)
    untaught = shutil.ignore_patterns("ledger", "generate_tier1@*")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken", ignore=untaught)
    expected, runs = Runs(load_config(unbroken)), Runs(load_config(broken))
    assert runs.test_domain.done
    assert not runs.generate_tier1.manifest

    driver = start(broken, cluster, "generate_tier1")
    deadline = time.monotonic() + 120
    while len(answered(runs)) < 12:
        assert driver.poll() is None, broken.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, "no teacher answered"
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    bought = answered(runs)
    assert len(outcomes(runs)) < len(outcomes(expected)), "killed too late to show anything"
    add_worker(cluster, num_cpus=2)
    finish(driver, broken)

    assert runs.generate_tier1.done
    assert outcomes(runs) == outcomes(expected)
    paid = answered(runs)
    assert max(paid.values()) == 1, "a request was paid twice"
    assert bought <= paid
    assert set(paid) == set(answered(expected))


def test_students_share_a_gpu(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node only says that it has a GPU; what is shown is that Ray places the work there, as on a real one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    add_worker(cluster, num_cpus=2, num_gpus=1)
    path = config_of(tmp_path, tmp_path / "shared")
    config = yaml.safe_load(path.read_text())
    styles = [{"name": "direct"}, {"name": "shots", "shots": 1}]
    config |= {"clusters": {"enabled": True}, "student": {"max_tokens": 8, "prompts": styles, "selection_tasks": 10}}
    config["execution"] |= {"student_actors": 2, "use_gpu": True, "gpu_share": 0.5}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    finish(start(path, cluster, "test_domain"), path)
    runs = Runs(load_config(path))
    assert len(runs.test_domain.read("base_verdicts", Verdict)) == 60
    for style in ("direct", "shots"):
        assert len(runs.test_domain.read(f"style_{style}_verdicts", Verdict)) == 10
    assert runs.embed_failures.done
