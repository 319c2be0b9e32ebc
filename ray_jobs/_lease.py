"""Who is at work on a run whose storage has no file locks (s3://, gs://, abfs://): a lease, renewed by its holder."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil

from cascade.errors import CascadeError
from cascade.store import Store
from cascade.teachers.ledger import FOLDER

LEASE = "driver.lease"
BEAT_S = 5.0
"""Seconds between two renewals."""
TERM_S = 60.0
"""Seconds without a renewal after which a holder stops, and a beat later another may follow it."""
SETTLE_S = 0.3
"""Seconds that a claim waits for one made at the same moment: these storages have no conditional write."""
_STOP = signal.SIGUSR2  # SIGINT and SIGUSR1 are taken by Ray Train and Ray Tune
_log = logging.getLogger(__name__)


class Sole(Protocol):
    """What one process at a time may do: a run, or `Purchases`."""

    @property
    def store(self) -> Store: ...

    @property
    def name(self) -> str:
        """For people."""

    @property
    def folder(self) -> str:
        """Where the lock or lease lies, relative to the store."""


@dataclass(frozen=True)
class Purchases:
    """Asking a domain's teachers: runs of different configs share its budget and may have the same tasks."""

    store: Store
    domain: str

    @property
    def name(self) -> str:
        return f"purchases for {self.domain}"

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.domain}"


@dataclass(frozen=True)
class Holder:
    """Content of a lease.

    Attributes:
        token: of this one claim.
        machine: where process numbers mean the same; "" if that is not known.
        since: when the lease was taken, Unix time in seconds.
        beat: when it was last renewed, Unix time in seconds.
    """

    token: str
    host: str
    pid: int
    machine: str
    since: float
    beat: float

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        now = time.time()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _machine(), now, now)

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended: it was a process of this machine, and there is none of its number."""
        if not self.machine or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"


def _machine() -> str:
    """This boot of this kernel, and the namespace of process numbers that a container has."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """Keeps a run to one driver.

    A holder that has not renewed for the term stops, and nobody follows it sooner, by the clocks of both. Clocks that
    disagree shorten the wait to two beats at least, in which the holder must not have been seen to renew.

    Args:
        clock: seconds, of no particular beginning.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        run: Sole,
        *,
        beat_s: float = BEAT_S,
        term_s: float = TERM_S,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self.run, self.path = run, f"{run.folder}/{LEASE}"
        self.beat_s, self.term_s, self.clock, self.pause = beat_s, term_s, clock, pause
        self.mine = Holder.here()
        self._renewed = clock()
        self._lost: CascadeError | None = None
        self._ended = threading.Event()

    @contextmanager
    def held(self) -> Iterator[Callable[[], bool]]:
        """Hold the lease while the block runs, and break off the block (of the main thread) when it is lost.

        Yields:
            Whether it is still held.

        Raises:
            CascadeError: another process holds it, or has come to hold it.
            StorageError: the lease cannot be written.
        """
        self.take()
        breakable = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(_STOP)
        renewing = threading.Thread(target=self._keep_renewing, daemon=True)
        # In a thread of its own: a renewal can hang for longer than the term.
        watching = threading.Thread(target=self._watch, args=(breakable,), daemon=True)
        try:
            if breakable:
                signal.signal(_STOP, self._break_off)
            renewing.start()
            watching.start()
            yield lambda: self._lost is None
        except BaseException as error:
            self._ended.set()
            if self._lost:  # then the error only comes of being broken off
                raise self._lost from error
            raise
        finally:
            self._ended.set()
            if renewing.ident:
                renewing.join(self.beat_s)
            self.release()
            if watching.ident:
                watching.join()  # so that no signal of its comes after the handler is gone
            if breakable:
                signal.signal(_STOP, before)

    def take(self) -> None:
        """Write this process into the lease, once nobody else holds it. Waits only if somebody does or seems to.

        Raises:
            CascadeError: another process holds it.
            StorageError: it cannot be written.
        """
        found = self._standing()
        if found:
            self._outlast(found)
        self._write()
        self.pause(SETTLE_S)
        if (standing := self._standing()) != self.mine:
            raise self._taken_by(standing)

    def renew(self) -> None:
        """One beat. An error of the storage is left to the next one."""
        try:
            standing = self._standing()
            if standing and standing.token == self.mine.token:
                self._write()
            else:
                self._lost = self._lost or self._taken_by(standing, "this one is stopped; ")
        except Exception as error:  # whatever it is, the lease is not renewed, and that is what counts
            _log.warning("the lease of %s is not renewed, next try in %.0f s: %s", self.run.name, self.beat_s, error)

    def check(self) -> bool:
        """Whether it is still held: neither another's nor without a beat for the term."""
        if not self._lost and self.clock() - self._renewed > self.term_s:
            self._lost = CascadeError(
                f"this process could not renew its lease of {self.run.name} ({self._where}) for {self.term_s:.0f} s, "
                "and another may take it over: see that the storage can be reached and run it again; it goes on from "
                "what is done"
            )
        return not self._lost

    def release(self) -> None:
        """Delete the lease if it is this process's. Where the storage fails, the next one waits until it is over."""
        with suppress(Exception):
            standing = self._standing()
            if standing and standing.token == self.mine.token:
                self.run.store.delete(self.path)

    def _standing(self) -> Holder | None:
        try:
            return Holder(**self.run.store.read_json(self.path))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        began, self.mine = self.clock(), replace(self.mine, beat=time.time())
        self.run.store.write_json(self.path, asdict(self.mine))
        self._renewed = began  # before others saw it: they count from later on

    def _outlast(self, found: Holder) -> None:
        """Return once the lease that was found is nobody's any more.

        Raises:
            CascadeError: its holder is seen to renew it.
        """
        silent_s = max(0.0, time.time() - found.beat)
        wait_s = max(2 * self.beat_s, self.term_s + self.beat_s - silent_s)
        who = (self.run.name, found)
        if not found.is_gone:
            _log.warning(
                "%s is held by %s, last heard of %.0f s ago: waiting up to %.0f s for a sign of life",
                *(*who, silent_s, wait_s),
            )
        began = self.clock()
        while self.clock() - began < wait_s:
            if found.is_gone:
                _log.warning("%s was being done by %s, which was killed: going on from what is done", *who)
                return
            self.pause(self.beat_s / 5)
            standing = self._standing()
            if not standing:
                return
            if standing != found:
                raise self._taken_by(standing)
        _log.warning("%s: no sign of %s in %.0f s: going on from what is done", *who, wait_s)

    def _taken_by(self, holder: Holder | None, meanwhile: str = "") -> CascadeError:
        if not holder:
            return CascadeError(
                f"somebody has deleted the lease of this process ({self._where}), so that others may do "
                f"{self.run.name}: {meanwhile}run it again, and it goes on from what is done"
            )
        since = datetime.fromtimestamp(holder.since, UTC)
        return CascadeError(
            f"another process is doing {self.run.name}, {holder}, since {since:%Y-%m-%d %H:%M:%S} UTC (it renews "
            f"{self._where}): {meanwhile}wait until it has ended, or end it; then this one goes on from what is done"
        )

    @property
    def _where(self) -> str:
        return self.run.store.uri_of(self.path)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self.beat_s):
            self.renew()

    def _watch(self, breakable: bool) -> None:
        while not self._ended.wait(self.beat_s / 5):
            if not self.check() and breakable:
                signal.pthread_kill(threading.main_thread().ident or 0, _STOP)
                self._ended.wait(self.beat_s)  # to clean up; who has not ended by then is told again

    def _break_off(self, *_: object) -> None:
        if not self._ended.is_set():
            raise KeyboardInterrupt  # the one exception that Ray lets out of what it waits for
