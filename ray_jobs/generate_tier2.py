"""generate_tier2: let the teacher of tier 2 answer what tier 1 left unsolved; only verified answers become examples.

`python -m ray_jobs.generate_tier2 --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._generate import generate_answers


def work(job: Job) -> Metrics:
    return generate_answers(job, tier=2)


if __name__ == "__main__":
    main("generate_tier2", work)
