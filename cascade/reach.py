"""Whether a cluster's machines reach what a config names, said before anything is spent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.errors import ConfigError
from cascade.store import Store

_UPLOADED = "working_dir_files"
"""Ray unpacks the folders of submitted jobs below this one, each under a name that is a hash of its content."""


def check_ray_address() -> None:
    """
    Raises:
        ConfigError: RAY_ADDRESS is where jobs are submitted, not the address of a cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is where `ray job submit` sends jobs to: submit this one with it, or on a machine "
            "of the cluster set RAY_ADDRESS to auto; without it a Ray starts on this machine alone"
        )


def check_storage(storage: str, nodes: Sequence[Mapping[str, Any]], *, shared: bool) -> None:
    """Refuse a path as storage where other machines, or the next job, would not find what is in it.

    Args:
        nodes: as `ray.nodes()` tells of them.
        shared: whether a path is a mount that every node has (`execution.shared_storage`).

    Raises:
        ConfigError: the path lies in Ray's copy of a submitted job's folder; or it is not shared, and the cluster has
            other machines, or a head that offers no CPU and will get some.
    """
    store = Store(storage)
    if not store.is_local:
        return
    if _UPLOADED in Path(store.path()).parts:
        raise ConfigError(
            f"storage: {storage} would be a folder in Ray's copy of the submitted one ({store.uri}), which a later job "
            "does not find, so that it would pay for all answers again: give an absolute path or a URI "
            "(s3://bucket/prefix, gs://bucket/prefix)"
        )
    if shared:
        return
    alive = [node for node in nodes if node["Alive"]]
    machines = {node["NodeManagerAddress"] for node in alive}
    if len(machines) > 1 or not any(node["Resources"].get("CPU") for node in alive):
        has = f"has {len(machines)} machines" if len(machines) > 1 else "computes on other machines than its head"
        raise ConfigError(
            f"storage: {storage} is a path of this machine, and the cluster {has}, which would each have a folder of "
            "their own: set storage to a URI (s3://bucket/prefix, gs://bucket/prefix), or, if the path is a mount that "
            "every node has (NFS, EFS, Filestore), execution.shared_storage to true"
        )
