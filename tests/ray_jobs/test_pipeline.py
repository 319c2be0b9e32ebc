"""What the pipeline refuses before any of its jobs begins, and what it says when all are done."""

from __future__ import annotations

import json
from types import SimpleNamespace

import forged
import pytest
import yaml
from pipelines import write_config
from sums import own_sums
from typer.testing import CliRunner

from cascade import modifiers
from cascade.config import load_config
from cascade.errors import ConfigError, TeacherError
from cascade.models import bits
from cascade.training import trackers
from ray_jobs import JOBS, pipeline
from ray_jobs._runs import Runs
from ray_jobs.cli import app
from ray_jobs.pipeline import run_pipeline


def test_a_modifier_that_could_not_be_compressed_is_refused_before_anything_is_paid(tmp_path):
    with open("configs/quickstart.yaml") as file:
        config = yaml.safe_load(file)
    config |= {"storage": str(tmp_path / "out"), "training": config["training"] | {"lora": {"dora": True}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"training\.lora\.dora: a DoRA modifier is more than B A"):
        run_pipeline(load_config(path), str(path))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bare(monkeypatch):
    """A machine with none of the packages that are optional, on which no job may begin."""
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(trackers, "importlib", missing)
    monkeypatch.setattr(bits, "importlib", missing)
    monkeypatch.setattr(pipeline, "connect_ray", lambda *_: pytest.fail("a job was begun"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"trackers": ["mlflow"]}, "training.trackers names mlflow"),
        ({"base_bits": 4}, "training.base_bits: 4 needs bitsandbytes"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_paid_and_noted_by_the_plan(tmp_path, bare, setting, said):
    tasks = own_sums(tmp_path, train=8, validation=8, test=8)
    path = write_config(tmp_path, tasks=tasks, training={"lora": {"rank": 4}} | setting)
    with pytest.raises(ConfigError, match=said):
        run_pipeline(load_config(path), str(path))
    planned = CliRunner().invoke(app, ["plan", str(path)])
    assert planned.exit_code == 0
    assert f"note: {said}" in " ".join(planned.output.split())
    Runs(load_config(path)).train_modifier.finish({})
    with pytest.raises(pytest.fail.Exception, match="a job was begun"):  # trained it is, so nothing is missed
        run_pipeline(load_config(path), str(path))


def test_tasks_that_only_a_judge_could_score_are_told_before_any_job(tmp_path, bare):
    tasks = own_sums(tmp_path, train=8, validation=8, test=8)
    with open(tmp_path / "tasks/train.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"id": "open", "kind": "open", "prompt": "Write a poem."}\n')
    tasks["train"]["count"] = 9
    path = write_config(tmp_path, tasks=tasks)
    with pytest.raises(ConfigError, match=r"1 training tasks have no exact scorer .*name a model under judge:"):
        run_pipeline(load_config(path), str(path))
    planned = CliRunner().invoke(app, ["plan", str(path)])
    assert planned.exit_code == 2
    assert "name a model under judge:" in planned.output


def test_a_key_of_any_tier_that_is_not_set_is_told_before_anything_is_paid(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_KEY", "k")
    monkeypatch.delenv("THIRD_KEY", raising=False)
    monkeypatch.setattr(pipeline, "connect_ray", lambda *_: pytest.fail("a job was begun"))
    path = write_config(tmp_path, tasks=own_sums(tmp_path, train=8, validation=8, test=8))
    config = yaml.safe_load(path.read_text())
    for tier, key in ((0, "FIRST_KEY"), (2, "THIRD_KEY")):
        config["tiers"][tier]["endpoints"] = [{"base_url": "https://teachers.example/v1", "api_key_env": key}]
        config["tiers"][tier].pop("answer_key", None)
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(TeacherError, match=r"not set in the environment: THIRD_KEY \(tier 3, .*--runtime-env-json"):
        run_pipeline(load_config(path), str(path))
    runs = Runs(load_config(path))
    assert not (tmp_path / "out" / "ledger").exists()
    for job in JOBS[: JOBS.index("generate_tier3") + 1]:
        runs.run(job).finish({})
    with pytest.raises(pytest.fail.Exception, match="a job was begun"):  # that tier is done and asked no more
        run_pipeline(load_config(path), str(path))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A pipeline of which every job is done, and the config that it is of."""
    path = write_config(tmp_path, tasks=own_sums(tmp_path, train=8, validation=8, test=8))
    runs = Runs(load_config(path))
    made = modifiers.publish(runs.store, "sums", forged.PLAIN, fp16_size=100_000).version
    for job in JOBS:
        runs.run(job).finish({"version": made} if job == "validate_modifier" else {})
    monkeypatch.setattr(pipeline, "_write_report", lambda *_: None)
    monkeypatch.setattr(pipeline, "print_summary", lambda _: None)
    return path, runs, made


def said(capsys):
    """What a finished pipeline says of the version in use."""
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Current: "))


def test_a_pipeline_says_which_version_is_in_use_and_how_its_own_becomes_so(finished, capsys):
    path, runs, made = finished
    run_pipeline(load_config(path), str(path))
    assert said(capsys) == f"Current: sums/{made}"
    later = modifiers.publish(runs.store, "sums", forged.PLAIN, fp16_size=100_000, version="later").version
    run_pipeline(load_config(path), str(path))
    line = said(capsys)
    assert line.startswith(f"Current: sums/{later}; this config made sums/{made}, ")
    assert modifiers.current(runs.store, "sums").version == later  # somebody may have chosen it
    command = line.split("`")[1].split()
    assert command[0] == "cascade"
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert modifiers.current(runs.store, "sums").version == made


@pytest.mark.parametrize("content", [None, b"gone\n", b"\xff../x"])
def test_a_version_in_use_that_is_lost_is_said_and_does_not_fail_what_is_done(finished, capsys, content):
    path, runs, made = finished
    runs.store.delete("modifiers/sums/CURRENT")
    if content is not None:
        runs.store.write_bytes("modifiers/sums/CURRENT", content)
    run_pipeline(load_config(path), str(path))
    assert said(capsys).startswith(f"Current: no version; this config made sums/{made}, ")


def test_a_log_says_which_version_is_in_use_too(finished, capsys):
    path, runs, made = finished
    config = load_config(path)
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"logs": "json"})})
    for version, level in ((made, "INFO"), ("later", "WARNING")):
        modifiers.publish(runs.store, "sums", forged.PLAIN, fp16_size=100_000, version=version)
        run_pipeline(config, str(path))
        line = next(e for e in map(json.loads, capsys.readouterr().out.splitlines()) if e["event"] == "modifier in use")
        assert (line["level"], line["current"], line["made"]) == (level, version, made)
