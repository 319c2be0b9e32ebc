"""generate_tier3: let the teacher of tier 3 answer what tier 2 left unsolved; only verified answers become examples.

`python -m ray_jobs.generate_tier3 --config configs/quickstart.yaml`
"""

from __future__ import annotations

from ray_jobs._context import Job, Metrics, main
from ray_jobs._generate import generate_answers


def work(job: Job) -> Metrics:
    return generate_answers(job, tier=3)


if __name__ == "__main__":
    main("generate_tier3", work)
