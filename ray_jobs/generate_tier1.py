"""generate_tier1: let the teacher of tier 1 answer what the base fails; only verified answers become examples.

`python -m ray_jobs.generate_tier1 --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._generate import generate_answers


def work(job: Job) -> Metrics:
    return generate_answers(job, tier=1)


if __name__ == "__main__":
    main("generate_tier1", work)
