"""A Ray cluster of several nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clusters import WITHOUT_DASHBOARD, ports
from pipelines import environment
from ray.cluster_utils import Cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that offers no CPU, as in cluster.yaml; nodes are for the test to add (`add_worker`)."""
    for name, value in (environment() | WITHOUT_DASHBOARD).items():
        monkeypatch.setenv(name, value)
    # A dead node is noticed sooner than by default.
    noticed = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed, **ports()}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made
    finally:
        made.shutdown()
