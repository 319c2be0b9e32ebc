"""How far the jobs are, for people: a live table on a terminal, plain lines elsewhere (a log, a job submission)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cascade.reports.progress import time_left
from ray_jobs._meter import TierState


class Progress:
    """Takes the jobs' reports. The base class says nothing; `Progress.live` shows them."""

    def connected(self, dashboard: str) -> None:
        """Ray is there; `dashboard` is the address of its pages, "" if it has none."""

    def started(self, job: str) -> None:
        """A job begins."""

    def reused(self, job: str) -> None:
        """A job was done before, nothing is run."""

    def update(self, job: str, done: int, total: int, note: str = "") -> None:
        """A job has done `done` of `total` pieces of its current stage, which `note` names."""

    def tier(self, job: str, state: TierState) -> None:
        """A tier's teacher has got that far."""
        self.update(job, state.done, state.total, state.note)

    def finished(self, job: str, metrics: dict[str, Any]) -> None:
        """A job is done."""

    def in_use(self, current: str, made: str) -> None:
        """All jobs are done: which version of the modifier is CURRENT ("" for none), and which one they made."""

    @staticmethod
    @contextmanager
    def live(title: str, jobs: tuple[str, ...] = ()) -> Iterator[Progress]:
        """A progress display for the time of the block."""
        console = Console()
        if not console.is_terminal:
            yield _Lines(console)
            return
        display = _LiveTable(title, jobs)
        with Live(console=console, refresh_per_second=4, get_renderable=display.render):
            yield display


@contextmanager
def polling(look: Callable[[], None], every_s: float = 1.0) -> Iterator[None]:
    """Call `look` again and again while the block runs: for progress that workers leave in the store.

    A store that cannot be reached for a while is looked at again.
    """
    ended = threading.Event()

    def watch() -> None:
        failing = False
        while not ended.wait(every_s):
            try:
                look()
                failing = False
            except (OSError, ValueError) as error:
                if not failing:
                    logging.getLogger(__name__).warning("progress cannot be read (%s); it is tried again", error)
                failing = True

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class Tenths:
    """Tells what is worth a line: a stage's beginning, and each tenth of it."""

    def __init__(self) -> None:
        self._last: tuple[str, str, int] = ("", "", -1)

    def are(self, job: str, done: int, total: int, note: str) -> bool:
        """Whether these are news."""
        before, self._last = self._last, (job, note.split(",")[0], 10 * done // max(1, total))
        return self._last != before


class _Lines(Progress):
    """One line when a stage begins, each tenth of it, and when a job ends."""

    def __init__(self, console: Console) -> None:
        self.console, self.began = console, time.perf_counter()
        self.news = Tenths()

    def _say(self, text: str) -> None:
        self.console.print(f"[{time.perf_counter() - self.began:6.0f} s] {text}", highlight=False, markup=False)

    def started(self, job: str) -> None:
        self._say(f"{job} …")

    def reused(self, job: str) -> None:
        self._say(f"{job}: done before, reused")

    def update(self, job: str, done: int, total: int, note: str = "") -> None:
        if self.news.are(job, done, total, note):
            self._say(f"{job}: {done} of {total} {note}")

    def finished(self, job: str, metrics: dict[str, Any]) -> None:
        self._say(f"{job}: done. {headline(metrics)}")


class Several(Progress):
    """Tells all of several displays."""

    def __init__(self, *displays: Progress) -> None:
        self.displays = displays

    def connected(self, dashboard: str) -> None:
        for display in self.displays:
            display.connected(dashboard)

    def started(self, job: str) -> None:
        for display in self.displays:
            display.started(job)

    def reused(self, job: str) -> None:
        for display in self.displays:
            display.reused(job)

    def update(self, job: str, done: int, total: int, note: str = "") -> None:
        for display in self.displays:
            display.update(job, done, total, note)

    def tier(self, job: str, state: TierState) -> None:
        for display in self.displays:
            display.tier(job, state)

    def finished(self, job: str, metrics: dict[str, Any]) -> None:
        for display in self.displays:
            display.finished(job, metrics)

    def in_use(self, current: str, made: str) -> None:
        for display in self.displays:
            display.in_use(current, made)


@dataclass
class Row:
    """What is known of a job. `done` and `total` are of its present stage; times are of `time.perf_counter`."""

    state: Literal["", "running", "done", "reused"] = ""
    done: int = 0
    total: int = 0
    note: str = ""
    began: float | None = None
    ended: float | None = None
    stage_began: float = 0.0
    stage_from: int = 0

    @property
    def seconds(self) -> float | None:
        """That the job has taken, None if it was not run here."""
        if self.began is None:
            return None
        return (time.perf_counter() if self.ended is None else self.ended) - self.began

    @property
    def seconds_left(self) -> float | None:
        """To the end of the present stage at its pace so far, None if there is no pace yet."""
        made = self.done - self.stage_from
        if self.state != "running" or made <= 0 or self.done >= self.total:
            return None
        return (time.perf_counter() - self.stage_began) * (self.total - self.done) / made

    def update(self, done: int, total: int, note: str) -> None:
        """Another total, or fewer done, is another stage."""
        if total != self.total or done < self.done:
            self.stage_began, self.stage_from = time.perf_counter(), done
        self.done, self.total, self.note = done, total, note


class Tracked(Progress):
    """A display that keeps what it is told, a row per job."""

    def __init__(self, jobs: tuple[str, ...]) -> None:
        self.rows = {job: Row() for job in jobs}
        self.tiers: dict[int, TierState] = {}

    def _row(self, job: str) -> Row:
        return self.rows.setdefault(job, Row())

    def started(self, job: str) -> None:
        row = self._row(job)
        row.state, row.began = "running", time.perf_counter()

    def reused(self, job: str) -> None:
        self._row(job).state = "reused"

    def update(self, job: str, done: int, total: int, note: str = "") -> None:
        self._row(job).update(done, total, note)

    def tier(self, job: str, state: TierState) -> None:
        self.tiers[state.tier] = state
        self.update(job, state.done, state.total)

    def finished(self, job: str, metrics: dict[str, Any]) -> None:
        row = self._row(job)
        row.state, row.ended, row.note = "done", time.perf_counter(), headline(metrics)


class _LiveTable(Tracked):
    """A table with a row per job."""

    def __init__(self, title: str, jobs: tuple[str, ...]) -> None:
        super().__init__(jobs)
        self.title = title

    def render(self) -> Group:
        return Group(self._steps(), *([tier_table(list(self.tiers.values()))] if self.tiers else []))

    def _steps(self) -> Table:
        to_the_end = time_left(self.rows)
        caption = f"about {to_the_end:.0f} s left" if to_the_end else None
        table = Table(title=self.title, caption=caption, caption_justify="left", expand=False)
        for column in ("step", "", "progress", "seconds", "ETA", ""):
            table.add_column(column, justify="right" if column in ("seconds", "ETA") else "left")
        marks = {"": "·", "running": "▶", "done": "✓", "reused": "✓"}
        for job, row in list(self.rows.items()):
            filled = round(20 * row.done / row.total) if row.total else 0
            shown = row.state == "running" and row.total
            bar = "━" * filled + "─" * (20 - filled) + f" {row.done}/{row.total}" if shown else ""
            seconds = f"{row.seconds:.0f}" if row.seconds is not None else ""
            left = f"{row.seconds_left:.0f} s" if row.seconds_left is not None else ""
            table.add_row(job, marks[row.state], bar, seconds, left, "reused" if row.state == "reused" else row.note)
        return table


def tier_table(states: list[TierState]) -> Table:
    """What each tier has done, spent and has still to do."""
    table = Table(title="teachers", title_justify="left")
    for column in ("tier", "teacher", "done", "verified", "escalated", "spent", "budget left", "requests/min", "ETA"):
        table.add_column(column, justify="left" if column == "teacher" else "right")
    for s in states:
        rate = f"{s.requests_per_minute:,.0f}" if s.requests_per_minute else ""
        table.add_row(
            str(s.tier),
            s.teacher,
            f"{s.done:,}/{s.total:,}",
            f"{s.verified:,}",
            f"{s.escalated:,}",
            f"${s.spent_usd:.4f}",
            f"${s.remaining_usd:.4f}",
            rate,
            s.eta,
        )
    return table


def headline(metrics: dict[str, Any]) -> str:
    """The figures of a job in one line, in the order in which it reported them."""
    parts = []
    for key, value in metrics.items():
        if isinstance(value, float):
            parts.append(f"{key} {value:.4g}")
        elif isinstance(value, int | str):
            parts.append(f"{key} {value}")
    return ", ".join(parts[:6])
