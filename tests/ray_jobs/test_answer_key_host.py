"""Where the teacher that replays known answers listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs import _generate


@pytest.mark.parametrize(
    ("machines", "host"),
    [(["10.0.0.1"], "127.0.0.1"), (["10.0.0.1", "10.0.0.1"], "127.0.0.1"), (["10.0.0.1", "10.0.0.2"], "10.0.0.1")],
)
def test_on_loopback_unless_other_machines_have_to_reach_it(
    monkeypatch: pytest.MonkeyPatch, machines: list[str], host: str
) -> None:
    @contextmanager
    def server(*_: Any, host: str) -> Iterator[str]:
        yield f"http://{host}/v1"

    gone = {"Alive": False, "NodeManagerAddress": "10.0.0.9"}
    nodes = [{"Alive": True, "NodeManagerAddress": address} for address in machines]
    monkeypatch.setattr(_generate.ray, "nodes", lambda: [*nodes, gone])
    monkeypatch.setattr(_generate.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(_generate, "answer_key_server", server)
    job: Any = SimpleNamespace(runs=SimpleNamespace(train_tasks=[]), config=SimpleNamespace(tiers=[], seed=0))
    asked: Any = SimpleNamespace(teacher=SimpleNamespace(is_answer_key=True))
    with _generate._answer_key(job, asked) as resolve:
        assert resolve == {"answer-key": f"http://{host}/v1"}
    asked.teacher.is_answer_key = False
    with _generate._answer_key(job, asked) as resolve:
        assert resolve == {}
