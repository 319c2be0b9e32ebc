"""Cascade: make a small language model strong where it is weak, for little money, and serve the result.

This package is plain Python and knows nothing of Ray; the jobs that a user submits to a cluster are in
`ray_jobs`, the HTTP application is in `serve`. Both import this package and never each other.
"""

import logging

__version__ = "0.1.0"

# peft imports bitsandbytes where it is installed, which on CPUs with bfloat16 warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
