"""Where jobs find their Ray."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.data import DataContext

from cascade.artifacts import Run, open_run
from cascade.config import Config, load_config
from cascade.errors import CascadeError, ConfigError
from cascade.store import Store
from cascade.teachers.ledger import Ledger
from ray_jobs import _context
from ray_jobs._context import connect_ray, run_job, sole_driver
from ray_jobs._exit import exit_with_code
from ray_jobs._lease import Purchases


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.init` was asked for."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(_context, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: arguments.update(given))
    monkeypatch.setattr(ray, "nodes", lambda: [node("10.0.0.1", 4)])
    return arguments


def node(address: str, cpus: int, alive: bool = True) -> dict[str, Any]:
    """As `ray.nodes` tells of it."""
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": cpus} if cpus else {}}


@pytest.fixture
def config() -> Config:
    return load_config(Path(__file__).parents[2] / "configs/quickstart.yaml")


def test_without_an_address_ray_starts_here_even_if_the_machine_remembers_another(asked, config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect_ray(config)
    assert asked["address"] == "local"
    assert asked["num_cpus"] >= 2


def test_a_ray_that_starts_here_is_asked_through_its_own_dashboard(asked, config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:8265")
    connect_ray(config)
    port = asked["dashboard_port"]
    assert asked["runtime_env"]["env_vars"]["RAY_API_SERVER_ADDRESS"] == f"http://127.0.0.1:{port}"
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        connect_ray(config)
    assert asked["dashboard_port"] != port


def test_a_submitted_job_joins_the_cluster_that_it_was_submitted_to(asked, config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    connect_ray(config)
    assert not {"address", "num_cpus", "object_store_memory", "dashboard_port"} & asked.keys()
    assert "RAY_API_SERVER_ADDRESS" not in asked["runtime_env"]["env_vars"]


HEAD = node("10.0.0.1", 0)
REFUSED = {
    "two machines": [node("10.0.0.1", 4), node("10.0.0.2", 4)],
    "a head without CPUs and a worker": [HEAD, node("10.0.0.2", 4)],
    "a head without CPUs, whose workers come when there is work": [HEAD],
    "a head without CPUs that has lost its worker": [HEAD, node("10.0.0.2", 4, alive=False)],
}
ALLOWED = {
    "one machine": [node("10.0.0.1", 4)],
    "several nodes of one machine": [HEAD, node("10.0.0.1", 4), node("10.0.0.1", 4)],
    "a machine that has gone": [node("10.0.0.1", 4), node("10.0.0.2", 4, alive=False)],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_path_is_refused_as_storage_of_several_machines(asked, config, monkeypatch, case):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "nodes", lambda: REFUSED[case])
    with pytest.raises(ConfigError, match=r"s3://.*shared_storage"):
        connect_ray(config)
    for allowed in (
        config.model_copy(update={"execution": config.execution.model_copy(update={"shared_storage": True})}),
        config.model_copy(update={"storage": "s3://bucket/team?region=us-east-1"}),
    ):
        connect_ray(allowed)


@pytest.mark.parametrize("shared", [False, True])
def test_a_path_in_ray_s_copy_of_the_submitted_folder_is_no_storage(asked, config, monkeypatch, tmp_path, shared):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    execution = config.execution.model_copy(update={"shared_storage": shared})
    with pytest.raises(ConfigError, match=r"storage: out/quickstart would be a folder in Ray's copy.*absolute path"):
        connect_ray(config.model_copy(update={"execution": execution}))
    connect_ray(config.model_copy(update={"storage": str(tmp_path / "out")}))


def test_the_address_that_jobs_are_submitted_to_is_no_cluster_s(asked, config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=http://127.0.0.1:8265 is where `ray job submit`.*auto"):
        connect_ray(config)
    assert not asked


def test_nodes_may_be_long_in_coming(asked, config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1800)
    connect_ray(config)
    assert DataContext.get_current().execution_no_progress_timeout_s == -1


@pytest.mark.parametrize("case", ALLOWED)
def test_a_path_is_storage_enough_for_one_machine(asked, config, monkeypatch, case):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "nodes", lambda: ALLOWED[case])
    connect_ray(config)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: run it again"),
        (ConfigError("storage: none"), 2, "error: storage: none"),
    ],
)
def test_what_is_no_defect_ends_a_job_with_a_line_and_a_code(error, code, said, capsys):
    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        exit_with_code(work)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(said)


def test_sigterm_ends_a_job_as_ctrl_c_does() -> None:
    code = """
import time
from ray_jobs._exit import end_on_sigterm, exit_with_code
end_on_sigterm()
exit_with_code(lambda: (print("at work", flush=True), time.sleep(60)))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as job:
        assert job.stdout.readline() == b"at work\n"
        job.terminate()
        said = job.stderr.read().decode()
        assert job.wait(30) == 143
    assert said == "interrupted: run it again, and it goes on where it was\n"


def test_two_drivers_never_do_one_run_and_a_killed_one_holds_nobody_up(tmp_path: Path) -> None:
    run = open_run(Store(str(tmp_path)), "reasoning", "generate_tier1", seed=1)
    code = f"""
import time
from cascade.artifacts import Run, open_run
from cascade.store import Store
from ray_jobs._context import sole_driver
with sole_driver(open_run(Store({str(tmp_path)!r}), "reasoning", "generate_tier1", seed=1)):
    print("at work", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"at work\n"
        with pytest.raises(CascadeError, match=rf"another process is doing {run.name}"), sole_driver(run):
            pass
        with sole_driver(open_run(run.store, "reasoning", "generate_tier1", seed=2)):
            pass
        other.kill()
    with sole_driver(run):
        assert run.tables() == []


def test_two_runs_of_one_domain_never_buy_at_once(tmp_path: Path) -> None:
    """They share its budget, and may ask the same: each would know nothing of what the other has under way."""
    store = Store(str(tmp_path))
    with sole_driver(Purchases(store, "reasoning")):
        with (
            pytest.raises(CascadeError, match="another process is doing purchases for reasoning"),
            sole_driver(Purchases(store, "reasoning")),
        ):
            pass
        with sole_driver(Purchases(store, "code")):
            pass
    assert len(Ledger(store)) == 0


def test_what_another_process_has_done_meanwhile_is_not_done_again(tmp_path: Path, monkeypatch) -> None:
    run = open_run(Store(str(tmp_path)), "reasoning", "generate_tier1", seed=1)
    runs: Any = SimpleNamespace(config={}, run=lambda name: run)

    @contextmanager
    def after_another(mine: Run) -> Iterator[None]:
        mine.start({})
        mine.finish({"bought": 7})
        yield

    monkeypatch.setattr(_context, "sole_driver", after_another)
    assert run_job("generate_tier1", lambda job: pytest.fail("bought again"), runs) == {"bought": 7}
