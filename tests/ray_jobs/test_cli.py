"""What the commands import: nobody waits for libraries that compute before anything is to be computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import ROOT, environment, write_config
from typer.testing import CliRunner

from cascade import __version__
from ray_jobs.cli import app

COMPUTES = {"bitsandbytes", "deepspeed", "openai", "peft", "ray", "sklearn", "torch", "transformers"}
READS = {"numpy", "pandas", "pyarrow", "scipy"}
PROGRAM = """
import runpy, sys
module, heavy, sys.argv = sys.argv[1], set(sys.argv[2].split(",")), [sys.argv[1], *sys.argv[3:]]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("imported:", *sorted(heavy & sys.modules.keys()))
"""


def run(module: str, *words: str, but: set[str] = COMPUTES) -> subprocess.CompletedProcess[str]:
    """A command, of which the last line printed must name none of the libraries."""
    command = [sys.executable, "-c", PROGRAM, module, ",".join(but), *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1] == "imported:", done.stdout[-500:] + done.stderr[-2000:]
    return done


@pytest.mark.parametrize(
    "words", [("--help",), ("plan", "--help"), ("benchmarks", "--help"), ("test-domain", "--help")]
)
def test_help_needs_nothing_that_reads_or_computes(words: tuple[str, ...]) -> None:
    done = run("ray_jobs.cli", *words, but=COMPUTES | READS)
    assert (done.returncode, "Usage" in done.stdout) == (0, True)


def test_the_version_needs_nothing_either() -> None:
    assert run("ray_jobs.cli", "--version", but=COMPUTES | READS).stdout.splitlines()[0] == f"cascade {__version__}"


def test_help_of_the_server_needs_nothing_that_computes() -> None:
    assert run("serve", "--help", but=COMPUTES | READS).returncode == 0
    assert run("serve.keys", "--help").returncode == 0


@pytest.mark.parametrize("command", ["run", "plan", "test-domain", "train-router", "export-dataset", "system"])
def test_a_mistake_in_a_config_is_said_before_anything_that_computes_is_imported(command: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, budget="much")
    done = run("ray_jobs.cli", command, str(config))
    assert (done.returncode, "budget" in done.stderr) == (2, True)


def test_a_bundle_does_not_go_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["bundle", "no.yaml", str(tmp_path / "file")], env={"COLUMNS": "200"})
    assert (done.exit_code, "is a file" in done.output) == (2, True)


def test_so_is_one_in_what_is_to_be_served(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for words, said in [((), "there is no modifier in"), (("replica=2",), "serve argument replica")]:
        done = run("serve", str(config), *words)
        assert (done.returncode, said in done.stderr) == (2, True)


def test_a_plan_and_one_s_own_tasks_need_nothing_that_computes(tmp_path: Path) -> None:
    own = {"sources": [{"benchmark": "jsonl", "options": {"path": str(ROOT / "docs/examples/shop")}}]}
    config = write_config(tmp_path, tasks=dict.fromkeys(("train", "validation", "test"), own))
    done = run("ray_jobs.cli", "plan", str(config))
    assert (done.returncode, "train tasks" in done.stdout) == (0, True), done.stderr
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "1", "prompt": "2 + 2?", "kind": "exact", "answer": "4"}\n')
    done = run("ray_jobs.cli", "check-tasks", str(tasks))
    assert (done.returncode, "1 exact" in done.stdout) == (0, True), done.stderr
