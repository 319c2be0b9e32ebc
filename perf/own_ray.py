"""The Ray that perf scripts measure on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import ray
import ray.data


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Ray on this machine alone, with room for eight actors that mostly wait."""
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
