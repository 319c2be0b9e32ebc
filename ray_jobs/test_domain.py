"""test_domain: run the base over the domain's training tasks and find what it fails.

`python -m ray_jobs.test_domain --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._embed import embed_failures
from ray_jobs._test import test_student


def work(job: Job) -> Metrics:
    metrics = test_student(job, tier=0)
    if job.config.clusters.enabled:
        embed_failures(job)
    return metrics


if __name__ == "__main__":
    main("test_domain", work)
