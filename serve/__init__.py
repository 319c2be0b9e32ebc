"""The Ray Serve application: OpenAI's protocol, the router, and an engine with one modifier slot."""

import gc

gc.set_threshold(*gc.get_threshold()[:2], 100)  # as in ray_jobs: a fifth of the time that a process takes to start
