"""test_tier1: what does the student still fail after tier 1's data?

`python -m ray_jobs.test_tier1 --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._test import test_student


def work(job: Job) -> Metrics:
    return test_student(job, tier=1)


if __name__ == "__main__":
    main("test_tier1", work)
