"""The Ray jobs: what a user submits to a cluster, one module per job, each reading top to bottom.

`python -m ray_jobs.<job> --config configs/<x>.yaml`, or all in order through `ray_jobs.pipeline`. Modules that
begin with an underscore are the Ray side that the jobs share.
"""

JOBS = (
    "test_domain",
    "generate_tier1",
    "test_tier1",
    "generate_tier2",
    "test_tier2",
    "generate_tier3",
    "train_modifier",
    "compress_modifier",
    "validate_modifier",
    "train_router",
)
"""All jobs, in the order in which the pipeline runs them."""
