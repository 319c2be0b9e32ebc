"""The Ray jobs: what a user submits to a cluster, one module per job, each reading top to bottom.

`python -m ray_jobs.<job> --config configs/<x>.yaml`, or all in order through `ray_jobs.pipeline`. Modules that
begin with an underscore are the Ray side that the jobs share.
"""

import gc

# What the libraries bring are half a million objects. By default all are looked through for garbage whenever a quarter
# more are there, a fifth of the time that a process takes to start; what is young is looked through as ever.
gc.set_threshold(*gc.get_threshold()[:2], 100)

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
