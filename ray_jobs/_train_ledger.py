"""What a training keeps of itself in its run: its curve, the starts that it took, and what was seen how often."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cascade.artifacts import Run
from cascade.errors import DataError
from cascade.tasks import Example
from cascade.training.examples import EncodedSet
from cascade.training.measures import StepReport

CURVE, ATTEMPTS, REFUSED = "curve", "attempts", "refused"
PROGRESS = "progress.json"
"""What the workers note for people while they train, in the run."""
NOTE_S, REMOTE_NOTE_S = 1.0, 10.0
"""Seconds between two notes; object stores take one write a second to an object at most."""


@dataclass(frozen=True)
class Attempt:
    """One start of the workers.

    Attributes:
        number: from 1.
        first_step: steps that the checkpoint held which it went on from.
        again: steps behind that which had been computed before, as far as they were noted: they are computed again.
    """

    number: int
    workers: int
    first_step: int
    again: int


@dataclass(frozen=True)
class Refused:
    """An example that is not trained on, and why: "too long", "without target" or "by template"."""

    task_id: str
    reason: str


class Recorder:
    """Keeps the ledger: every step in memory, in the run at each checkpoint, and a note for people now and then.

    The first worker's is written, the others' are empty. A thread writes the notes: no step waits for the store.
    """

    def __init__(self, run: Run, steps: int, first: bool) -> None:
        self.run, self.steps, self.first = run, steps, first
        self.pending: list[StepReport] = []
        self.noted, self.warned = 0.0, False
        self.notes, self.note = ThreadPoolExecutor(1, "note"), Future[None]()
        self.note.set_result(None)
        self.between = NOTE_S if run.store.is_local else REMOTE_NOTE_S

    def start(self, first_step: int, workers: int, encoded: EncodedSet) -> None:
        """Note that the workers begin, and with what; what an earlier start noted of later steps is void."""
        if not self.first:
            return
        curve = self.run.read(CURVE, StepReport)
        reached = max([_noted_step(self.run), *(p.step + 1 for p in curve)])
        self.run.write_table(CURVE, StepReport, [p for p in curve if p.step < first_step])
        number = 1 + len(self.run.read(ATTEMPTS, Attempt))
        self.run.write_part(ATTEMPTS, [Attempt(number, workers, first_step, max(0, reached - first_step))])
        reasons = {"too long": encoded.too_long, "without target": encoded.without_target}
        refused = [Refused(i, reason) for reason, ids in reasons.items() for i in ids]
        refused += [Refused(i, "by template") for i in encoded.by_template]
        self.run.write_table(REFUSED, Refused, refused)

    def add(self, report: StepReport) -> None:
        if not self.first:
            return
        self.pending.append(report)
        if self.note.done() and time.monotonic() - self.noted > self.between:
            self.noted = time.monotonic()
            self.note = self.notes.submit(self._note, report)

    def _note(self, report: StepReport) -> None:
        note = {"step": report.step + 1, "steps": self.steps, "loss": report.loss}
        try:
            self.run.store.write_json(f"{self.run.folder}/{PROGRESS}", note)
        except OSError as error:  # only for people: no reason to end a training
            if not self.warned:
                logging.getLogger(__name__).warning("progress cannot be noted (%s); training goes on", error)
            self.warned = True

    def write(self, done: int) -> None:
        """Store what was added of the steps before `done`. Another thread may go on adding."""
        if not self.first:
            return
        self.note.result()
        reports = [report for report in self.pending if report.step < done]
        self.run.write_part(CURVE, reports)
        del self.pending[: len(reports)]


def _noted_step(run: Run) -> int:
    path = f"{run.folder}/{PROGRESS}"
    return int(run.store.read_json(path)["step"]) if run.store.exists(path) else 0


def check_ledger(run: Run, steps: int, planned_steps: int, epochs: float) -> dict[str, Any]:
    """See that every example was seen as often as planned, by the curve and the examples of the run alone.

    Args:
        steps: that were taken; planned_steps: that there would have been without an early end.
        epochs: times that every example is to be seen; of a fraction, a part of the examples once more.

    Returns:
        Figures of it.

    Raises:
        DataError: a step is missing, or an example was seen more or less often.
    """
    points = run.read(CURVE, StepReport)
    missing = sorted(set(range(steps)).symmetric_difference(p.step for p in points))
    refused = {r.task_id for r in run.read(REFUSED, Refused)}
    there = Counter(e.task_id for e in run.read("examples", Example) if e.task_id not in refused)
    seen = Counter(i for p in points for i in p.sample_ids)
    times = {i: seen[i] / there[i] if there[i] else math.inf for i in there | seen}
    least, most = min(times.values(), default=0), max(times.values(), default=0)
    bounds = (math.floor(epochs), math.ceil(epochs)) if steps == planned_steps else (math.floor(least), least + 1)
    wrong = [i for i, n in times.items() if not bounds[0] <= n <= bounds[1]]
    if missing or wrong:
        found = (
            f"steps {_some(missing)} are missing or too many"
            if missing
            else (f"{_some(wrong)} were seen between {least:g} and {most:g} times, not {bounds[0]:g} to {bounds[1]:g}")
        )
        raise DataError(
            f"the ledger of {run.folder} does not hold what was planned: {found}. What was trained is not to be "
            "trusted: remove that folder and run again, which trains anew"
        )
    attempts = run.read(ATTEMPTS, Attempt)
    return {
        "seen_least": least,
        "seen_most": most,
        "skipped_steps": sum(p.skipped for p in points),
        "attempts": len(attempts),
        "steps_again": sum(a.again for a in attempts),
    }


def _some(things: Sequence[object]) -> str:
    shown = ", ".join(str(t) for t in things[:10])
    return f"{shown} and {len(things) - 10} more" if len(things) > 10 else shown
