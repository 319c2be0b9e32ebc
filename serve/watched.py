"""What is read from the store again and again, so that nobody who asks has to wait for the store."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)


class Watched:
    """Something in the store that is followed in a thread of its own, whatever the store does meanwhile."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def refresh(self) -> None:
        """Read the store once."""
        raise NotImplementedError

    def watch(self, every_s: float = 1.0) -> None:
        """Keep following the store until `close`."""
        threading.Thread(target=self._watch, args=(every_s,), name=type(self).__name__, daemon=True).start()

    def close(self) -> None:
        """End watching."""
        self._closed.set()

    def _watch(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self.refresh()
            except Exception:  # a store that cannot be reached now may be again
                logger.exception("the store cannot be read; what is in use stays")
