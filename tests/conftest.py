"""For all tests: what hypothesis tries may take as long as the machine takes.

Where the variable CI is set it tries the same at each run (its own profile for that is the parent): a run says whether
a change broke something, not whether chance found what was there before.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", parent=settings(), deadline=None)
settings.load_profile("untimed")
