"""test_tier2: what does the student still fail after tier 2's data?

`python -m ray_jobs.test_tier2 --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._test import test_student


def work(job: Job) -> Metrics:
    return test_student(job, tier=2)


if __name__ == "__main__":
    main("test_tier2", work)
