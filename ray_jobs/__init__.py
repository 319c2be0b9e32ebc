"""The Ray jobs: what a user submits to a cluster, one module per job, each reading top to bottom.

`python -m ray_jobs.<job> --config configs/<x>.yaml`, or all in order through `ray_jobs.pipeline`. Modules that
begin with an underscore are the Ray side that the jobs share.
"""
