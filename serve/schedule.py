"""Whose turn it is, and who may join: bounds on rows and memory, and a deadline for everybody who waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from serve.events import Failed
from serve.jobs import BARE, Group, Job, Key, Lane
from serve.limits import Limits
from serve.live import Live

_STARVED_S = 2.0
"""A job that has waited so long for room is let in before any that came later."""
_CHUNK_S = 0.2, 0.08
"""Seconds that a part of a prompt should take at most, and at least if more is left."""
_CHUNKS = 16, 4096
"""Fewest and most tokens in one."""


class Schedule:
    """The groups of an engine. What says that the lock is held must not run beside anything else that does.

    Attributes:
        held: key of the group whose modifier is in the slot.
    """

    def __init__(self, limits: Limits, make_group: Callable[[Live | None], Group]) -> None:
        self.groups: dict[Key, Group] = {}
        self.held: Key = BARE
        self._limits, self._make_group = limits, make_group

    @property
    def load(self) -> tuple[int, int]:
        """Jobs running (parked ones included) and waiting."""
        groups = list(self.groups.values())
        return sum(len(g.running) for g in groups), sum(len(g.waiting) for g in groups)

    def add(self, job: Job) -> Failed | None:
        """Let a job wait, or refuse it. The lock is held."""
        self.forget_waiting()
        running, waiting = self.load
        if waiting - max(self._limits.rows - running, 0) >= self._limits.waiting:
            return Failed(429, "the server is busy, try again shortly", "overloaded", retry_after_s=1)
        group = self.groups.get(job.key)
        if group is None:
            group = self.groups[job.key] = self._make_group(job.live)
        group.waiting.append(job)
        return None

    def forget_waiting(self) -> None:
        """Drop waiting jobs whose clients have gone. The lock is held."""
        for group in self.groups.values():
            for job in [j for j in group.waiting if j.cancelled]:
                group.waiting.remove(job)

    def forget_groups(self) -> None:
        """Drop groups without jobs. The lock is held, and nothing is computed for any of them."""
        self.groups = {key: group for key, group in self.groups.items() if group.busy}

    def next(self) -> Key:
        """The group to compute for now. The lock is held, and there is one."""
        now = time.perf_counter()
        able = {k: g for k, g in self.groups.items() if g.running or self._may_join(g)}
        held = able.pop(self.held, None)
        if held is not None and (not able or now - held.since <= self._limits.patience_s):
            return self.held
        longest = min(able, key=lambda k: able[k].since)
        if held is not None:
            held.since = now
        able[longest].since = now
        return longest

    def joining(self, group: Group) -> Job | None:
        """Take the next job that may join its group now from those that wait. The lock is held."""
        return group.waiting.popleft() if self._may_join(group) else None

    def make_room(self, lane: Lane) -> None:
        """See that one more token for each row of a lane fits into memory: the jobs that came last give way.

        The lock is held: whoever gives way waits again.
        """
        more = len(lane.batch.rows)
        while sum(g.held for g in self.groups.values()) + more > self._limits.tokens:
            running = [(job.arrived, index, g) for g in self.groups.values() for index, job in g.running.items()]
            if len(running) == 1:
                return
            _, index, group = max(running, key=lambda r: r[:2])
            for job in group.leave({index}):
                job.gave_way = True
                group.wait_again(job)

    def _may_join(self, group: Group) -> bool:
        """Whether there is room for the first that waits, and nobody starves who came before it."""
        if not group.waiting or not self._has_room(group):
            return False
        late = min(time.perf_counter() - _STARVED_S, group.waiting[0].arrived)
        return not any(g.waiting and g.waiting[0].arrived < late and not self._has_room(g) for g in self._others(group))

    def _has_room(self, group: Group) -> bool:
        """Whether the first that waits fits into the bounds. It always does where nobody runs."""
        if not any(g.running for g in self.groups.values()):
            return True
        if len(group.running) >= self._limits.rows or not group.open:
            return False
        return sum(g.room() for g in self._others(group)) + group.room(group.waiting[0]) <= self._limits.tokens

    def _others(self, group: Group) -> list[Group]:
        return [g for g in self.groups.values() if g is not group]


class Chunks:
    """How many tokens of prompts to compute at a time: so many that a client who leaves meanwhile is soon noticed."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def took(self, tokens: int, seconds: float) -> None:
        """Learn from a part that took so long."""
        longest, shortest = _CHUNK_S
        fewest, most = _CHUNKS
        if seconds > longest:
            self.tokens = max(min(self.tokens, tokens) // 2, fewest)
        elif seconds < shortest and tokens >= self.tokens:
            self.tokens = min(2 * self.tokens, most)
