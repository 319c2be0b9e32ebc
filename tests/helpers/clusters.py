"""Nodes of a Ray cluster that runs here."""

from __future__ import annotations

from typing import Any

from ray.cluster_utils import Cluster
from stand_in import free_port

WITHOUT_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
"""For processes of a Ray that has none: nobody answers there at once, where Ray Train would wait for one to appear."""


def add_worker(cluster: Cluster, **resources: int) -> Any:
    """A node with so many CPUs and GPUs (`num_cpus`, `num_gpus`)."""
    return cluster.add_node(**resources, **ports())


def ports() -> dict[str, int]:
    """Ports whose defaults may belong to another Ray."""
    return {"dashboard_agent_listen_port": free_port()}
